//! What a server remembers of its brick apart from the brick's disk: how far its journal had come. A disk that comes back as an older
//! copy of itself (a backup, a snapshot that was rolled back) looks sound, and nothing in it tells what it lacks.
//!
//! The journal has a number, its stamp. It is raised at each start and once a second while anything is changed, first in the journal
//! and then here, each durably; so a journal whose stamp is lower than the one here is an older one. A copy that is younger
//! than the last raise before an unclean end is not told from the disk itself.
//!
//! ```text
//! STATE_DIR/bricks/<cluster, 32 hex digits>-<brick, hex>    the stamp, 16 hex digits and a newline; written over in place
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::BrickId3;

const DIR: &str = "bricks";

/// What a server remembers of a brick.
#[derive(Debug)]
pub struct Witness {
    path: PathBuf,
    /// When it was opened.
    seen: u64,
}

impl Witness {
    /// What the server that keeps its state in `state_dir` remembers of a brick; of one that it never saw, nothing.
    ///
    /// # Errors
    /// When the file is there and makes no sense, or cannot be read.
    pub fn open(state_dir: &Path, ids: BrickId3) -> anyhow::Result<Self> {
        let path = state_dir.join(DIR).join(format!("{:032x}-{:x}", ids.cluster.0, ids.brick.0));
        let seen = match fs::read_to_string(&path) {
            Ok(text) => u64::from_str_radix(text.trim_end(), 16).with_context(|| {
                format!(
                    "{} makes no sense ({text:?}), so that nobody knows whether the brick's disk is the one that was last here; if it is, \
                     remove that file and restart mortar-brickd",
                    path.display()
                )
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Self { path, seen })
    }

    /// A journal with this stamp in `root` is the one that was here last.
    ///
    /// # Errors
    /// When it is an older one: a sentence for the administrator.
    pub fn check(&self, root: &Path, stamp: u64) -> anyhow::Result<()> {
        let seen = self.seen;
        if stamp < seen {
            bail!(
                "{} has an older copy of the brick (its stamp is {stamp}, and the last one here was {seen}): what was written since is \
                 not in it. Bring back the disk that was here last and restart mortar-brickd; or empty the directory, its .mortar \
                 too, and have the brick built anew with 'mortar volume reset-brick'. Only if this copy is all that is left \
                 of the volume: remove {} and restart mortar-brickd, and what the copy has will count",
                root.display(),
                self.path.display()
            );
        }
        Ok(())
    }

    /// The journal has come so far, durably.
    ///
    /// # Errors
    /// When the server's own disk refuses.
    pub fn saw(&self, stamp: u64) -> anyhow::Result<()> {
        let text = format!("{stamp:016x}\n");
        let written = match OpenOptions::new().write(true).open(&self.path) {
            // In place: less than a sector, which a disk writes whole or not at all.
            Ok(file) => file.write_all_at(text.as_bytes(), 0).and_then(|()| file.sync_data()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.make(&text),
            Err(e) => Err(e),
        };
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn make(&self, text: &str) -> io::Result<()> {
        let Some(dir) = self.path.parent() else { return Err(io::ErrorKind::InvalidInput.into()) };
        fs::create_dir_all(dir)?;
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        File::open(dir)?.sync_all()?;
        dir.parent().map_or(Ok(()), |above| File::open(above)?.sync_all())
    }
}

#[cfg(test)]
mod tests {
    use mortar_proto::{BrickId, ClusterId, VolumeId};

    use super::super::{Journal, Record};
    use super::*;

    const IDS: BrickId3 = BrickId3 { cluster: ClusterId(0xabc), volume: VolumeId(1), brick: BrickId(0x2f) };

    #[test]
    fn a_server_knows_an_older_copy_of_a_brick() {
        let dir = tempfile::tempdir().unwrap();
        let witness = Witness::open(dir.path(), IDS).unwrap();
        witness.check(Path::new("/b"), 0).unwrap();
        witness.saw(7).unwrap();
        witness.saw(8).unwrap();
        let path = dir.path().join("bricks/00000000000000000000000000000abc-2f");
        assert_eq!(fs::read_to_string(&path).unwrap(), "0000000000000008\n");

        let witness = Witness::open(dir.path(), IDS).unwrap();
        let told = witness.check(Path::new("/b"), 7).unwrap_err().to_string();
        assert!(
            told.starts_with("/b has an older copy of the brick (its stamp is 7, and the last one here was 8)"),
            "{told}"
        );
        assert!(told.contains(path.to_str().unwrap()), "{told}");
        witness.check(Path::new("/b"), 8).unwrap();
        witness.check(Path::new("/b"), 9).unwrap();

        let other = BrickId3 { brick: BrickId(0x30), ..IDS };
        Witness::open(dir.path(), other).unwrap().check(Path::new("/b"), 0).unwrap();
        fs::write(&path, "mice\n").unwrap();
        let told = Witness::open(dir.path(), IDS).unwrap_err().to_string();
        assert!(told.contains("makes no sense (\"mice\\n\")"), "{told}");
    }

    #[test]
    fn the_stamp_is_raised_while_something_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (state, brick) = (dir.path().join("state"), dir.path().join("brick"));
        let witness = Witness::open(&state, IDS).unwrap();
        Journal::make(&brick).unwrap();
        let (journal, loaded) = Journal::open(&brick, |stamp| witness.check(&brick, stamp)).unwrap();
        witness.saw(loaded.stamp).unwrap();
        let raise = || journal.raise().unwrap().into_iter().for_each(|stamp| witness.saw(stamp).unwrap());
        let seen = || Witness::open(&state, IDS).unwrap().seen;
        raise();
        assert_eq!(seen(), 1);
        journal.touch();
        raise();
        raise();
        assert_eq!(seen(), 2);
        journal.add(vec![Record::Scrub(vec![1])]).unwrap();
        raise();
        assert_eq!(seen(), 3);
    }
}
