//! What a brick's unflushed writes live in: the page cache of one boot of the kernel and one mount of the file system.
//!
//! [E6] prefers a source, and [E7] trusts one, that kept it. The kernel's boot id alone does not tell: a file system that was
//! shut down after an error and mounted again has lost what was not flushed, and the kernel has not restarted. Nor do both, once
//! the disk has refused something: the kernel tells once that it could not write a page, takes it for written from then on, and
//! forgets its content when it needs the room. So a loss is remembered, for as long as the page cache lasts, by the name of a
//! file; the name needs no room on the disk and changes in the file system's own memory, which is written or shut down.
//!
//! ```text
//! .mortar/memory-<boot and mount, 32 hex digits>-<loss, 16 hex digits, 0 for none>
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use mortar_proto::BootId;
use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};

/// `STATX_MNT_ID_UNIQUE` of Linux 6.8: a number that no later mount is given. Older kernels give the mount's id, which a later
/// one may be given again.
const MOUNT: StatxFlags = StatxFlags::MNT_ID.union(StatxFlags::from_bits_retain(0x4000));
const PREFIX: &str = "memory-";

/// Whether what was written and not flushed is still there.
#[derive(Debug)]
pub struct Memory {
    own: PathBuf,
    since: u128,
    loss: Mutex<u64>,
}

fn name(since: u128, loss: u64) -> String {
    format!("{PREFIX}{since:032x}-{loss:016x}")
}

impl Memory {
    /// That of the brick whose `.mortar` is `own`.
    ///
    /// # Errors
    /// When the kernel's boot id or `own` cannot be read, or the disk refuses.
    pub fn open(own: &Path) -> anyhow::Result<Self> {
        let since = boot()? ^ u128::from(mount_of(own).with_context(|| format!("cannot look at {}", own.display()))?);
        let known = name(since, 0);
        let known = &known[..known.len() - 16];
        let mut found = None;
        for file in fs::read_dir(own).with_context(|| format!("cannot list {}", own.display()))? {
            let file = file?;
            let Some(file_name) = file.file_name().to_str().map(str::to_owned) else { continue };
            match file_name.strip_prefix(known).and_then(|loss| u64::from_str_radix(loss, 16).ok()) {
                Some(loss) => found = Some(loss.max(found.unwrap_or(0))),
                // Of an earlier boot, or mount.
                None if file_name.starts_with(PREFIX) => fs::remove_file(file.path())?,
                None => {}
            }
        }
        let memory = Self { own: own.to_owned(), since, loss: Mutex::new(found.unwrap_or(0)) };
        if found.is_none() {
            let path = own.join(name(since, 0));
            fs::File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(memory)
    }

    /// The number under which the brick registers: another one when the kernel or the file system was started anew, or something
    /// was lost before this brick was opened.
    #[must_use]
    pub fn id(&self) -> BootId {
        BootId(self.since ^ u128::from(*self.loss.lock()) << 64)
    }

    /// The disk has refused something since the kernel and the file system were started.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        *self.loss.lock() != 0
    }

    /// The disk has refused something: the next start is told.
    ///
    /// # Errors
    /// When that cannot be noted.
    pub fn lose(&self) -> std::io::Result<()> {
        let mut loss = self.loss.lock();
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random).map_err(|e| std::io::Error::other(e.to_string()))?;
        let new = u64::from_le_bytes(random) | 1;
        fs::rename(self.own.join(name(self.since, *loss)), self.own.join(name(self.since, new)))?;
        *loss = new;
        Ok(())
    }
}

fn boot() -> anyhow::Result<u128> {
    let path = "/proc/sys/kernel/random/boot_id";
    let boot = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    u128::from_str_radix(&boot.trim().replace('-', ""), 16).with_context(|| format!("{path}: {boot:?}"))
}

/// The mount as the first process sees it: a service manager may give each start of a daemon mounts of its own.
fn mount_of(dir: &Path) -> anyhow::Result<u64> {
    let look = |path: &Path| statx(CWD, path, AtFlags::empty(), MOUNT | StatxFlags::INO);
    let own = look(dir)?;
    let mut outside = PathBuf::from("/proc/1/root");
    outside.push(dir.strip_prefix("/").unwrap_or(dir));
    let same = |other: &Statx| {
        (other.stx_dev_major, other.stx_dev_minor, other.stx_ino) == (own.stx_dev_major, own.stx_dev_minor, own.stx_ino)
    };
    Ok(look(&outside).ok().filter(same).unwrap_or(own).stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_brick_is_known_by_its_kernel_its_mount_and_what_its_disk_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Memory::open(dir.path()).unwrap();
        assert!(!first.has_lost());
        assert_eq!(Memory::open(dir.path()).unwrap().id(), first.id());
        assert_ne!(mount_of(dir.path()).unwrap(), mount_of(Path::new("/proc")).unwrap());
        assert!(Memory::open(&dir.path().join("absent")).is_err());

        let before = first.id();
        first.lose().unwrap();
        let second = Memory::open(dir.path()).unwrap();
        assert!(second.has_lost());
        assert_ne!(second.id(), before);
        second.lose().unwrap();
        let third = Memory::open(dir.path()).unwrap();
        assert_ne!(third.id(), before);

        // Another boot, or mount, knows nothing of it.
        let names = || fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().path()).collect::<Vec<_>>();
        assert_eq!(names().len(), 1);
        fs::rename(&names()[0], dir.path().join(name(7, 9))).unwrap();
        assert_eq!(Memory::open(dir.path()).unwrap().id(), before);
        assert_eq!(names().len(), 1);
    }
}
