//! Which servers to talk to: `--server`, else `MORTAR_SERVERS`, else the configuration file, else this machine.

use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::address::Address;
use crate::failure::{Failure, Outcome};

/// Where the configuration file is, unless `MORTAR_CLI_CONFIG` names another.
pub const CONFIG_PATH: &str = "/etc/mortar/cli.toml";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    servers: Vec<String>,
}

/// The servers to talk to, and who said so.
#[derive(Debug, Clone)]
pub struct Contact {
    /// At least one, in the order given.
    pub servers: Vec<Address>,
    /// For the sentence that says that none of them answered.
    pub told_by: String,
}

impl Contact {
    /// These servers, named by the command itself.
    pub fn of(servers: Vec<Address>) -> Self {
        Self { servers, told_by: "the playground's own record".to_owned() }
    }

    /// Finds the servers.
    ///
    /// # Errors
    /// When what names them holds something that is no address, or the configuration file cannot be read.
    pub fn find(option: &[String]) -> Outcome<Self> {
        let listed = |names: &[String], told_by: String| {
            let servers = names
                .iter()
                .map(|name| name.trim())
                .filter(|name| !name.is_empty())
                .map(Address::parse)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|why| Failure::usage(format!("{told_by}: {why}.")))?;
            if servers.is_empty() {
                return Err(Failure::usage(format!("{told_by} names no server.")));
            }
            Ok(Self { servers, told_by })
        };
        if !option.is_empty() {
            return listed(option, "--server".to_owned());
        }
        match std::env::var("MORTAR_SERVERS") {
            Ok(text) if !text.trim().is_empty() => {
                let names: Vec<_> = text.split(',').map(str::to_owned).collect();
                return listed(&names, "MORTAR_SERVERS".to_owned());
            }
            _ => {}
        }
        let named = std::env::var_os("MORTAR_CLI_CONFIG").filter(|path| !path.is_empty());
        let path = named.clone().unwrap_or_else(|| CONFIG_PATH.into());
        match read(Path::new(&path), named.is_some())? {
            Some(names) => listed(&names, path.to_string_lossy().into_owned()),
            None => {
                listed(&["localhost".to_owned()], format!("the default (no --server, MORTAR_SERVERS or {CONFIG_PATH})"))
            }
        }
    }
}

/// The servers in the configuration file; `None` when there is no file and none has to be.
fn read(path: &Path, must_exist: bool) -> anyhow::Result<Option<Vec<String>>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => return Ok(None),
        Err(error) => bail!("cannot read {}: {error}", path.display()),
    };
    let config: Config = toml::from_str(&text)
        .with_context(|| format!("{} must read: servers = [\"s1\", \"s2\", \"s3\"]", path.display()))?;
    Ok(Some(config.servers))
}
