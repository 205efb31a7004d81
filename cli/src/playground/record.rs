//! `playground.json`: what a playground has started and made. It is written before each step is taken, so that `down`
//! finds everything, also after an `up` that was killed half-way.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::process::Id;

/// The record's name in the playground's directory.
pub const FILE: &str = "playground.json";

/// A playground.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Playground {
    /// Its directory, absolute.
    pub dir: PathBuf,
    /// `up` made the directory, so `down` removes it too.
    pub made_dir: bool,
    /// `up` has finished.
    pub complete: bool,
    /// Its servers, numbered from 1.
    pub servers: Vec<Server>,
    /// Its mount, if one was asked for.
    pub mount: Option<Mount>,
}

/// A server.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Server {
    /// From 1.
    pub number: u32,
    /// `host:port`; empty before it told.
    pub address: String,
    /// Its daemon, once started.
    pub process: Option<Id>,
    /// Its daemon's state directory.
    pub state_dir: PathBuf,
    /// Its brick.
    pub brick: PathBuf,
    /// Its daemon's log.
    pub log: PathBuf,
    /// The brick's own file system, with `--xfs`.
    pub disk: Option<Disk>,
}

/// A file system in a file.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Disk {
    /// The sparse file.
    pub image: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
}

/// The volume's mount.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Mount {
    /// Where.
    pub path: PathBuf,
    /// `up` made that directory, so `down` removes it.
    pub made_path: bool,
    /// The mount's process, once started.
    pub process: Option<Id>,
    /// Its log.
    pub log: PathBuf,
}

impl Playground {
    /// Reads the record in `dir`; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        serde_json::from_slice(&text).map(Some).with_context(|| {
            format!(
                "{} is no record of a playground: look at what runs and is mounted there, end it by hand, and remove the directory",
                path.display()
            )
        })
    }

    /// Writes the first record; fails when there is one, so that two `up`s never share a directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(&self) -> Result<()> {
        let path = self.dir.join(FILE);
        let beside = self.write_beside()?;
        let linked = std::fs::hard_link(&beside, &path).with_context(|| format!("cannot make {}", path.display()));
        std::fs::remove_file(&beside).with_context(|| format!("cannot remove {}", beside.display()))?;
        linked
    }

    /// Writes the record anew.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<()> {
        let path = self.dir.join(FILE);
        std::fs::rename(self.write_beside()?, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn write_beside(&self) -> Result<PathBuf> {
        let path = self.dir.join(format!(".{FILE}.{}", std::process::id()));
        let write = || -> Result<()> {
            let mut file = std::fs::File::create(&path)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            Ok(file.sync_all()?)
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// The addresses of all servers as `MORTAR_SERVERS` takes them.
    pub fn addresses(&self) -> String {
        let known: Vec<_> = self.servers.iter().map(|s| s.address.as_str()).filter(|a| !a.is_empty()).collect();
        known.join(",")
    }
}
