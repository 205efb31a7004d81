//! What a brick's unflushed writes live in: the page cache of one boot of the kernel and one mount of the file system.
//!
//! [E6] prefers a source, and [E7] trusts one, that kept it. The kernel's boot id alone does not tell: a file system that was
//! shut down after an error and mounted again has lost what was not flushed, and the kernel has not restarted.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use mortar_proto::BootId;
use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};

/// `STATX_MNT_ID_UNIQUE` of Linux 6.8: a number that no later mount is given. Older kernels give the mount's id, which a later
/// one may be given again.
const MOUNT: StatxFlags = StatxFlags::MNT_ID.union(StatxFlags::from_bits_retain(0x4000));

/// The number under which a brick registers: another one when the kernel or the file system of `dir` was started anew.
///
/// # Errors
/// When the kernel's boot id or `dir` cannot be read.
pub(super) fn of(dir: &Path) -> anyhow::Result<BootId> {
    let path = "/proc/sys/kernel/random/boot_id";
    let boot = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let boot = u128::from_str_radix(&boot.trim().replace('-', ""), 16).with_context(|| format!("{path}: {boot:?}"))?;
    let mount = mount_of(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    Ok(BootId(boot ^ u128::from(mount)))
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
    fn a_brick_is_known_by_its_mount_and_its_kernel() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path()).unwrap(), of(dir.path()).unwrap());
        assert_ne!(of(dir.path()).unwrap(), of(Path::new("/proc")).unwrap());
        assert!(of(&dir.path().join("absent")).is_err());
    }
}
