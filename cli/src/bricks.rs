//! Bricks as they are written on the command line, the checks that need no server, and one that takes another's place. What only a server can know (is it XFS, is it empty,
//! is it a brick already) is checked there.

use mortar_proto::metadata::apply::check_volume_name;
use mortar_proto::wire::cluster::{AcceptLossRequest, BrickReplaceRequest, BrickSpec};

use crate::address::Address;
use crate::cluster::Cluster;
use crate::confirm::{confirm, confirm_by};
use crate::failure::{Failure, Outcome};
use crate::output::Output;

/// Bricks in a replica set: the only number there is.
pub const REPLICA: usize = 3;

/// Where one brick shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brick {
    /// The server as it was written; the cluster knows what it is called.
    pub server: String,
    /// The server with its port, to compare.
    pub address: Address,
    /// The directory, absolute, without a trailing slash.
    pub path: String,
}

impl Brick {
    /// Reads `SERVER:/path`.
    ///
    /// # Errors
    /// A sentence when it is none.
    pub fn parse(word: &str) -> Result<Self, String> {
        let Some(colon) = word.find(":/") else {
            return Err(match word.rsplit_once(':') {
                Some((_, path)) if !path.is_empty() && path.parse::<u16>().is_err() => {
                    format!(
                        "The path of brick '{word}' is not absolute: write SERVER:/path, with a slash after the colon."
                    )
                }
                _ => format!("'{word}' is no brick: write SERVER:/path, for example s1:/bricks/b1."),
            });
        };
        let (server, path) = (&word[..colon], &word[colon + 1..]);
        let address = Address::parse(server).map_err(|why| format!("Brick '{word}': {why}."))?;
        if path.chars().any(char::is_control) {
            return Err(format!("The path of brick {word:?} has a control character in it; choose another directory."));
        }
        let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        if parts.contains(&"..") {
            return Err(format!("The path of brick '{word}' has '..' in it: write it out."));
        }
        if parts.is_empty() {
            return Err(format!("Brick '{word}' is the root directory: name a directory on a file system of its own."));
        }
        Ok(Self { server: server.to_owned(), address, path: format!("/{}", parts.join("/")) })
    }

    fn contains(&self, other: &Self) -> bool {
        self.address == other.address && other.path.strip_prefix(&self.path).is_some_and(|rest| rest.starts_with('/'))
    }

    /// As the cluster is told.
    pub fn to_spec(&self) -> BrickSpec {
        BrickSpec { server: self.server.clone(), path: self.path.clone() }
    }
}

/// Checks a volume's name, by the rule that the servers have.
///
/// # Errors
/// A usage failure with a sentence.
pub fn check_name(name: &str) -> Outcome {
    check_volume_name(name).map_err(Failure::Usage)
}

/// Reads `replica 3 S1:/path S2:/path S3:/path …`.
///
/// # Errors
/// A usage failure with a sentence for each way in which it can be wrong.
pub fn parse_layout(words: &[String], force: bool) -> Outcome<Vec<Brick>> {
    const SHAPE: &str = "mortar volume create NAME replica 3 S1:/path S2:/path S3:/path";
    let refuse = |sentence: String| Err(Failure::Usage(sentence));
    match words.first().map(String::as_str) {
        Some("replica") => {}
        Some(other) => {
            return refuse(format!("After the volume's name the word 'replica' must follow, not '{other}': {SHAPE}"));
        }
        None => return refuse(format!("The word 'replica' and the bricks are missing: {SHAPE}")),
    }
    match words.get(1).map(|word| (word, word.parse::<u32>())) {
        Some((_, Ok(3))) => {}
        Some((_, Ok(other))) => {
            return refuse(format!(
                "Replica {other} is not possible: Mortar keeps every file on exactly 3 bricks. Write 'replica 3'."
            ));
        }
        Some((word, Err(_))) => {
            return refuse(format!("After 'replica' the number 3 must follow, not '{word}': {SHAPE}"));
        }
        None => return refuse(format!("The number after 'replica' and the bricks are missing: {SHAPE}")),
    }
    let words = &words[2..];
    let bricks = words.iter().map(|word| Brick::parse(word)).collect::<Result<Vec<_>, _>>().map_err(Failure::Usage)?;
    if bricks.len() < REPLICA {
        return refuse(format!(
            "{} given, but a replica set has 3 bricks, on three servers: {SHAPE}",
            given(bricks.len())
        ));
    }
    if bricks.len() % REPLICA != 0 {
        return refuse(format!(
            "{} given, which is no multiple of 3: each three in a row, in the order given, make one replica set.",
            given(bricks.len())
        ));
    }
    for (i, brick) in bricks.iter().enumerate() {
        for other in &bricks[..i] {
            if brick == other || (brick.address == other.address && brick.path == other.path) {
                return refuse(format!("Brick {}:{} is named twice.", brick.address, brick.path));
            }
            for (outer, inner) in [(brick, other), (other, brick)] {
                if outer.contains(inner) {
                    return refuse(format!(
                        "Brick {}:{} lies inside brick {}:{}: choose directories beside each other.",
                        inner.address, inner.path, outer.address, outer.path
                    ));
                }
            }
        }
    }
    for (i, set) in bricks.chunks_exact(REPLICA).enumerate() {
        for (k, brick) in set.iter().enumerate() {
            if !force && set[..k].iter().any(|other| other.address == brick.address) {
                return refuse(format!(
                    "Server {} is named twice in replica set {}: its failure would take two of three copies. Name three \
                     different servers, or say --force if this is only a trial.",
                    brick.address,
                    i + 1
                ));
            }
        }
    }
    Ok(bricks)
}

fn given(n: usize) -> String {
    match n {
        0 => "No brick is".to_owned(),
        1 => "1 brick is".to_owned(),
        n => format!("{n} bricks are"),
    }
}

/// Which brick goes, and which comes; none: the same directory, whose disk is a new one.
pub struct Replacing {
    pub name: String,
    pub old: String,
    pub new: Option<String>,
    pub yes: bool,
    pub force: bool,
}

/// Puts an empty brick in the place of another.
///
/// # Errors
/// What was refused or failed.
pub async fn replace(cluster: &Cluster, output: Output, what: Replacing) -> Outcome {
    let Replacing { name, old, new, yes, force } = what;
    check_name(&name)?;
    let parse = |word: &str| Brick::parse(word).map_err(Failure::Usage);
    let from = parse(&old)?;
    let to = new.as_deref().map(parse).transpose()?;
    if to.as_ref().is_some_and(|to| to.address == from.address && to.path == from.path) {
        return Err(Failure::usage(format!(
            "{old} cannot take its own place; 'mortar volume reset-brick {name} {old}' builds it anew on a new disk."
        )));
    }
    let consequence = match &new {
        Some(new) => format!(
            "Brick {old} of volume {name} gives its place to {new} for good, which is then built from the others; until it is, there \
             is one copy less."
        ),
        None => {
            format!("Brick {old} of volume {name} is built anew from the others; until it is, there is one copy less.")
        }
    };
    confirm(yes, &consequence)?;
    let request =
        BrickReplaceRequest { volume: name.clone(), old: Some(from.to_spec()), new: to.map(|to| to.to_spec()), force };
    cluster.change(async |mut client| client.brick_replace(request.clone()).await).await?;
    let watch = format!("'mortar volume heal {name} watch' shows how far it is.");
    match &new {
        Some(new) => {
            output.done("brick replaced", &format!("{new} has taken the place of {old} and is being built. {watch}"))
        }
        None => output.done("brick reset", &format!("{old} is built anew. {watch}")),
    }
    Ok(())
}

/// Makes one brick the one that is in sync, after telling what that loses.
///
/// # Errors
/// What was refused or failed.
pub async fn accept_loss(cluster: &Cluster, output: Output, name: &str, brick: &str, yes: bool) -> Outcome {
    let spec = Brick::parse(brick).map_err(Failure::Usage)?.to_spec();
    let request = |commit| AcceptLossRequest { volume: name.to_owned(), brick: Some(spec.clone()), commit };
    let told = cluster.ask(async |mut client| client.accept_loss(request(false)).await).await?;
    confirm_by("--yes-i-lose-data", yes, &told.lost.join("\n"))?;
    cluster.change(async |mut client| client.accept_loss(request(true)).await).await?;
    let json = serde_json::json!({ "done": "data loss accepted", "lost": told.lost });
    output.show(&json, || {
        format!("{brick} is in sync now. 'mortar volume heal {name} watch' shows how the others come back.")
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_brick_is_a_server_with_or_without_a_port_and_an_absolute_path() {
        for (word, server, address, path) in [
            ("s1:/b", "s1", "s1:7440", "/b"),
            ("127.0.0.1:7441:/bricks/b1/", "127.0.0.1:7441", "127.0.0.1:7441", "/bricks/b1"),
            ("[::1]:/b//c/./d", "[::1]", "[::1]:7440", "/b/c/d"),
            ("[::1]:7441:/b:/c", "[::1]:7441", "[::1]:7441", "/b:/c"),
        ] {
            let brick = Brick::parse(word).unwrap();
            assert_eq!((brick.server.as_str(), brick.address.as_str(), brick.path.as_str()), (server, address, path));
        }
    }

    #[test]
    fn two_sets_may_use_the_same_servers_but_one_set_may_not_without_force() {
        let two = words("replica 3 a:/1 b:/1 c:/1 a:/2 b:/2 c:/2");
        assert_eq!(parse_layout(&two, false).unwrap().len(), 6);
        let same = words("replica 3 a:/1 a:7440:/2 c:/1");
        assert!(parse_layout(&same, false).unwrap_err().to_string().contains("Server a:7440 is named twice"));
        assert_eq!(parse_layout(&same, true).unwrap().len(), 3);
    }

    #[test]
    fn force_does_not_allow_one_directory_to_be_two_bricks() {
        let twice = words("replica 3 a:/1 a:/1/ c:/1");
        assert!(parse_layout(&twice, true).unwrap_err().to_string().contains("named twice"));
        let inside = words("replica 3 a:/1 a:/1/2 c:/1");
        assert!(parse_layout(&inside, true).unwrap_err().to_string().contains("lies inside"));
        let beside = words("replica 3 a:/1 a:/12 c:/1");
        assert!(parse_layout(&beside, true).is_ok());
    }
}
