//! What is mounted: `SERVER[,SERVER…]:/VOLUME`.

/// Servers and a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// As written; the kernel lists the mount under it.
    pub text: String,
    /// `host` or `host:port` each.
    pub servers: Vec<String>,
    /// The volume's name.
    pub volume: String,
}

impl Source {
    /// Reads it.
    ///
    /// # Errors
    /// A sentence that says which part is missing or wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        // The last ":/", since an address may have a port and IPv6 addresses consist of colons.
        let Some((servers, volume)) = text.rsplit_once(":/") else {
            return Err(format!(
                "'{text}' names no volume: write SERVER[,SERVER…]:/VOLUME, for example s1,s2,s3:/vmstore."
            ));
        };
        if volume.is_empty() {
            return Err(format!("'{text}' names no volume: write its name after ':/'."));
        }
        if volume.contains('/') {
            return Err(format!(
                "'{volume}' is no volume name: only a whole volume can be mounted, not a folder of it."
            ));
        }
        if text.contains(char::is_whitespace) || text.contains(char::is_control) {
            return Err(format!("'{}' contains a space or a control character: leave it out.", text.escape_debug()));
        }
        if servers.is_empty() {
            return Err(format!("'{text}' names no server: write at least one before ':/'."));
        }
        let servers: Vec<String> = servers.split(',').map(str::to_owned).collect();
        if servers.iter().any(String::is_empty) {
            return Err(format!("'{text}' has an empty server name: remove the comma that is too much."));
        }
        Ok(Self { text: text.to_owned(), servers, volume: volume.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::Source;

    #[test]
    fn servers_and_volume_are_told_apart() {
        let source = Source::parse("s1,s2:7000,[fd00::1]:7440:/vm-store.1").unwrap();
        assert_eq!(source.servers, ["s1", "s2:7000", "[fd00::1]:7440"]);
        assert_eq!(source.volume, "vm-store.1");
    }

    #[test]
    fn what_is_missing_is_named() {
        for (text, named) in [
            ("s1,s2", "no volume"),
            ("s1:/", "no volume"),
            (":/v", "no server"),
            ("s1,,s2:/v", "empty server"),
            ("s1:/v/images", "whole volume"),
            ("s1: x:/v", "space"),
        ] {
            let sentence = Source::parse(text).unwrap_err();
            assert!(sentence.contains(named), "{text}: {sentence}");
        }
    }
}
