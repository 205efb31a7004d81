//! The mount point: whether it may be used, mount(2) on it, and taking the mount away.
//!
//! fuser could mount too, but it ignores the subtype and unmounts what lies beneath after an unmount from outside, so this
//! file opens `/dev/fuse` and calls mount(2) itself.

use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::options::{FILE_SYSTEM_TYPE, Options};

/// Bytes of one read or write at most: what a frame of the data plane carries.
pub const MAX_IO_BYTES: u32 = 1 << 20;

/// The real path of a directory on which a volume may be mounted.
///
/// # Errors
/// A sentence, when it is no directory or has a Mortar mount already.
pub fn check(path: &Path) -> Result<PathBuf, String> {
    let shown = path.display();
    let real = path.canonicalize().map_err(|e| match e.kind() {
        ErrorKind::NotFound => format!("the mount point {shown} does not exist: make the directory first."),
        ErrorKind::NotConnected => {
            format!("{shown} still has a FUSE mount whose process has died: run 'umount -l {shown}' first.")
        }
        _ => format!("the mount point {shown} cannot be used: {e}."),
    })?;
    let metadata = real.metadata().map_err(|e| format!("the mount point {shown} cannot be used: {e}."))?;
    if !metadata.is_dir() {
        return Err(format!("the mount point {shown} is no directory."));
    }
    let mounts =
        std::fs::read("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo cannot be read: {e}."))?;
    if let Some((kind, source)) = mounted(&mounts, &real)
        && kind == FILE_SYSTEM_TYPE.as_bytes()
    {
        let source = String::from_utf8_lossy(&source).into_owned();
        return Err(format!("{source} is mounted on {shown} already: unmount it first, or choose another directory."));
    }
    Ok(real)
}

/// Type and source of the topmost mount on `path`, by the text of `/proc/self/mountinfo`.
fn mounted(mountinfo: &[u8], path: &Path) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut top = None;
    for line in mountinfo.split(|b| *b == b'\n') {
        let mut fields = line.split(|b| *b == b' ');
        let Some(point) = fields.nth(4) else { continue };
        if OsString::from_vec(unescape(point)) != path.as_os_str() {
            continue;
        }
        let mut fields = fields.skip_while(|f| *f != b"-").skip(1);
        if let (Some(kind), Some(source)) = (fields.next(), fields.next()) {
            top = Some((unescape(kind), unescape(source)));
        }
    }
    top
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|d| byte == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        match digits {
            Some(digits) => {
                plain.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
                rest = &after[3..];
            }
            None => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    plain
}

/// Mounts, and returns the connection to the kernel.
///
/// # Errors
/// A sentence.
pub fn mount(source: &str, target: &Path, options: &Options) -> Result<OwnedFd, String> {
    let fuse = open_fuse()?;
    let mode = target.metadata().map_err(|e| format!("{} cannot be used: {e}.", target.display()))?.mode();
    let mut data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions,allow_other,max_read={MAX_IO_BYTES}",
        fuse.as_raw_fd(),
        mode & libc::S_IFMT,
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    for option in &options.kernel {
        data.push(',');
        data.push_str(option);
    }
    let data = CString::new(data).map_err(|_| "an option contains a zero byte: remove it.".to_owned())?;
    rustix::mount::mount(source, target, FILE_SYSTEM_TYPE, options.flags, data.as_c_str()).map_err(|e| match e {
        Errno::PERM => "only root may mount: run it as root.".to_owned(),
        Errno::NODEV => "the kernel has no FUSE: load its module with 'modprobe fuse'.".to_owned(),
        Errno::INVAL if !options.kernel.is_empty() => {
            format!(
                "the kernel refuses the options '{}': is SELinux enabled, and is the label one it knows?",
                options.kernel.join(",")
            )
        }
        _ => format!("mounting on {} failed: {e}.", target.display()),
    })?;
    Ok(OwnedFd::from(fuse))
}

fn open_fuse() -> Result<File, String> {
    OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|e| match e.kind() {
        ErrorKind::NotFound => "/dev/fuse does not exist: load the kernel's module with 'modprobe fuse'.".to_owned(),
        ErrorKind::PermissionDenied => "/dev/fuse may not be opened: run it as root.".to_owned(),
        _ => format!("/dev/fuse cannot be opened: {e}."),
    })
}

/// Takes the mount away; while files are open in it, it disappears from the tree and ends with the last of them.
///
/// # Errors
/// A sentence.
pub fn unmount(target: &Path) -> Result<(), String> {
    let result = match rustix::mount::unmount(target.as_os_str().as_bytes(), UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => {
            tracing::warn!("{} is in use; it is detached and ends when the last file is closed", target.display());
            rustix::mount::unmount(target.as_os_str().as_bytes(), UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
        }
        result => result,
    };
    match result {
        // Somebody else has unmounted it.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(e) => Err(format!("unmounting {} failed: {e}.", target.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &[u8] = b"29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        90 29 0:50 / /srv/a\\040b rw,nosuid shared:9 master:3 - fuse.mortar s1,s2:/v rw,user_id=0\n\
        91 29 0:51 / /srv/c rw - fuse.mortar s1:/v rw\n\
        92 91 0:52 / /srv/c rw - tmpfs none rw\n";

    #[test]
    fn a_mount_is_found_by_its_unescaped_path() {
        let found = mounted(MOUNTINFO, Path::new("/srv/a b"));
        assert_eq!(found, Some((b"fuse.mortar".to_vec(), b"s1,s2:/v".to_vec())));
        assert_eq!(mounted(MOUNTINFO, Path::new("/srv")), None);
    }

    #[test]
    fn the_topmost_mount_counts() {
        assert_eq!(mounted(MOUNTINFO, Path::new("/srv/c")).map(|m| m.0), Some(b"tmpfs".to_vec()));
    }

    #[test]
    fn a_file_and_a_missing_directory_are_refused_with_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(check(&file).unwrap_err().contains("no directory"));
        assert!(check(&dir.path().join("none")).unwrap_err().contains("does not exist"));
        assert_eq!(check(dir.path()).unwrap(), dir.path().canonicalize().unwrap());
    }
}
