//! A brick's directory: whose it is.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use mortar_proto::{BrickId, ClusterId, VolumeId};
use serde::{Deserialize, Serialize};

use super::Journal;

/// The format that this code reads and writes.
const FORMAT: u32 = 1;

/// Why a brick's directory cannot be used: a sentence.
pub type OpenError = anyhow::Error;

/// Whose brick it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrickId3 {
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// The brick.
    pub brick: BrickId,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    format: u32,
    cluster: String,
    volume: String,
    brick: String,
    /// The volume's name when the brick was made, for people.
    volume_name: String,
}

/// An opened brick directory; nobody else can open it meanwhile.
#[derive(Debug)]
pub struct BrickDir {
    root: PathBuf,
    _lock: File,
}

impl BrickDir {
    /// Opens the brick, or makes it in an empty (or new) directory when there is none.
    ///
    /// # Errors
    /// When it is somebody else's, of another format, in use, or the disk refuses.
    pub fn open(root: &Path, ids: BrickId3, volume_name: &str) -> Result<Self, OpenError> {
        let own = root.join(".mortar");
        let toml_path = own.join("brick.toml");
        if let Some(found) = read(&toml_path)? {
            let hex = |text: &str| u128::from_str_radix(text, 16).unwrap_or(0);
            if found.format != FORMAT {
                bail!("{} has format {}, and this mortar-brickd knows {FORMAT}", root.display(), found.format);
            }
            if hex(&found.cluster) != ids.cluster.0 || hex(&found.brick) != u128::from(ids.brick.0) {
                bail!(
                    "{} is brick {} of volume {} in cluster {}, not brick {:x} of this one",
                    root.display(),
                    found.brick,
                    found.volume_name,
                    found.cluster,
                    ids.brick.0
                );
            }
        } else {
            fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
            if let Some(other) = fs::read_dir(root)?.flatten().find(|e| e.file_name() != ".mortar") {
                bail!("{} is to become a brick but is not empty: it has {}", root.display(), other.path().display());
            }
            for part in ["objects", "sums", "state"] {
                fs::create_dir_all(own.join(part))?;
            }
            for n in 0..=255_u8 {
                for part in ["objects", "sums"] {
                    fs::create_dir_all(own.join(part).join(format!("{n:02x}")))?;
                }
            }
            let on_disk = OnDisk {
                format: FORMAT,
                cluster: format!("{:032x}", ids.cluster.0),
                volume: format!("{:x}", ids.volume.0),
                brick: format!("{:x}", ids.brick.0),
                volume_name: volume_name.to_owned(),
            };
            Journal::make(&own.join("state"))?;
            // Written last, and durable before anybody relies on it: a brick without it is not one yet.
            let temporary = own.join("brick.toml.new");
            let mut file = File::create(&temporary)?;
            file.write_all(toml::to_string(&on_disk)?.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &toml_path)?;
            File::open(&own)?.sync_all()?;
            File::open(root)?.sync_all()?;
        }
        let lock = File::open(&toml_path)?;
        if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("{} is in use by another mortar-brickd", root.display());
        }
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// The brick's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// `.mortar` in it.
    #[must_use]
    pub fn own(&self) -> PathBuf {
        self.root.join(".mortar")
    }
}

/// The volume of the brick in this directory, if it is one: for refusing to use it for another.
///
/// # Errors
/// When there is a `brick.toml` that cannot be read.
pub fn volume_of_brick(root: &Path) -> anyhow::Result<Option<String>> {
    Ok(read(&root.join(".mortar/brick.toml"))?.map(|b| b.volume_name))
}

fn read(path: &Path) -> anyhow::Result<Option<OnDisk>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(toml::from_str(&text).with_context(|| format!("{} makes no sense", path.display()))?)),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}
