//! A server's address as the administrator writes it: `host`, `host:port`, `[v6]`, `[v6]:port`.

use std::fmt;
use std::net::Ipv6Addr;

/// The port of a `mortar-brickd` when none is given.
pub const DEFAULT_PORT: u16 = 7440;

/// A server's address, always with a port: `host:port`, an IPv6 address in brackets.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Address(String);

impl Address {
    /// Reads an address; without a port it gets [`DEFAULT_PORT`].
    ///
    /// # Errors
    /// A sentence when it is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("'{text}' is no server address: {why}"));
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let Some((inner, after)) = rest.split_once(']') else { return wrong("the bracket is not closed") };
                if inner.parse::<Ipv6Addr>().is_err() {
                    return wrong("what stands in the brackets is no IPv6 address");
                }
                (format!("[{inner}]"), if after.is_empty() { None } else { after.strip_prefix(':').or(Some("")) })
            }
            None if text.matches(':').count() > 1 => {
                return wrong("write an IPv6 address in brackets, as in [fd00::1]:7440");
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host.to_owned(), Some(port)),
                None => (text.to_owned(), None),
            },
        };
        if host.is_empty() {
            return wrong("the host is missing");
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if !host.starts_with('[') && !host.chars().all(plain) {
            return wrong("a host has only letters, digits, '.', '-' and '_'");
        }
        match port.map(str::parse::<u16>) {
            None => Ok(Self(format!("{host}:{DEFAULT_PORT}"))),
            Some(Ok(port)) if port > 0 => Ok(Self(format!("{host}:{port}"))),
            Some(_) => wrong("the port must be a number from 1 to 65535"),
        }
    }

    /// `host:port`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_port_gets_the_default_one() {
        for (written, meant) in [
            ("s1", "s1:7440"),
            ("s1.example.org:7441", "s1.example.org:7441"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("[::1]", "[::1]:7440"),
            ("[fd00::1]:7441", "[fd00::1]:7441"),
        ] {
            assert_eq!(Address::parse(written).unwrap().as_str(), meant);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (written, why) in [
            ("", "host is missing"),
            (":7440", "host is missing"),
            ("s1:", "the port must be"),
            ("s1:0", "the port must be"),
            ("s1:70000", "the port must be"),
            ("::1", "in brackets"),
            ("[::1", "not closed"),
            ("[s1]:7440", "no IPv6 address"),
            ("[::1]7440", "the port must be"),
            ("s 1", "only letters"),
        ] {
            let refusal = Address::parse(written).unwrap_err();
            assert!(refusal.contains(why), "{written:?}: {refusal}");
        }
    }
}
