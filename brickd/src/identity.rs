//! Who this server is: kept in `STATE_DIR/identity.toml`, and changed once, when it joins another cluster.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use mortar_proto::{ClusterId, ServerId};
use serde::{Deserialize, Serialize};

const FILE: &str = "identity.toml";
/// Present while the server is on its way from its own cluster of one into another.
const JOIN: &str = "join.toml";

/// A server's own name and its cluster's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// This server.
    pub server: ServerId,
    /// It was taken into the cluster of others, and must not found one of its own.
    pub absorbed: bool,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    cluster: String,
    server: String,
    absorbed: bool,
}

impl Identity {
    /// Reads the identity, or draws one. Finishes a change of clusters that was begun: the old log is wiped first, then the
    /// new identity stands, then the mark of the change goes, so that a crash in between only repeats it.
    ///
    /// # Errors
    /// When the disk refuses, or the files make no sense.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        if let Some(joined) = read(&dir.join(JOIN))? {
            let log = dir.join("log");
            if log.exists() {
                fs::remove_dir_all(&log).with_context(|| format!("cannot remove {}", log.display()))?;
            }
            write(dir, FILE, &joined)?;
            fs::remove_file(dir.join(JOIN))?;
            sync_dir(dir)?;
            return Ok(joined);
        }
        if let Some(identity) = read(&dir.join(FILE))? {
            return Ok(identity);
        }
        let mut random = [0_u8; 24];
        getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random numbers: {e}"))?;
        let (cluster, server) = random.split_at(16);
        let identity = Self {
            cluster: ClusterId(u128::from_be_bytes(cluster.try_into()?)),
            // 48 bits are enough for a cluster's servers, and short enough to be typed.
            server: ServerId(u64::from_be_bytes(server.try_into()?) >> 16 | 1),
            absorbed: false,
        };
        write(dir, FILE, &identity)?;
        Ok(identity)
    }

    /// Marks that this server changes to `cluster` at its next start.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn join(&self, dir: &Path, cluster: ClusterId) -> anyhow::Result<()> {
        write(dir, JOIN, &Self { cluster, server: self.server, absorbed: true })
    }
}

fn read(path: &Path) -> anyhow::Result<Option<Identity>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let on_disk: OnDisk = toml::from_str(&text).with_context(|| format!("{} makes no sense", path.display()))?;
    let cluster = u128::from_str_radix(&on_disk.cluster, 16).with_context(|| format!("{}: cluster", path.display()))?;
    let server = u64::from_str_radix(&on_disk.server, 16).with_context(|| format!("{}: server", path.display()))?;
    Ok(Some(Identity { cluster: ClusterId(cluster), server: ServerId(server), absorbed: on_disk.absorbed }))
}

fn write(dir: &Path, name: &str, identity: &Identity) -> anyhow::Result<()> {
    let on_disk = OnDisk {
        cluster: format!("{:032x}", identity.cluster.0),
        server: format!("{:x}", identity.server.0),
        absorbed: identity.absorbed,
    };
    let temporary = dir.join(format!("{name}.new"));
    let mut file = fs::File::create(&temporary).with_context(|| format!("cannot write {}", temporary.display()))?;
    file.write_all(toml::to_string(&on_disk)?.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> anyhow::Result<()> {
    Ok(fs::File::open(dir)?.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_keeps_its_name_and_changes_its_cluster_once_asked_even_after_a_crash_in_between() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::load(dir.path()).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), first);
        fs::create_dir(dir.path().join("log")).unwrap();
        first.join(dir.path(), ClusterId(7)).unwrap();
        let joined = Identity::load(dir.path()).unwrap();
        assert_eq!(joined, Identity { cluster: ClusterId(7), server: first.server, absorbed: true });
        assert!(!dir.path().join("log").exists());
        assert_eq!(Identity::load(dir.path()).unwrap(), joined);
    }
}
