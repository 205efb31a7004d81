//! What is mounted where, and XFS file systems in sparse files.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, unmount};

use super::process::mark;
use super::record::Disk;

/// The type of a volume's mount.
const MORTAR: &str = "fuse.mortar";

/// One line of `/proc/self/mountinfo`.
pub struct Mounted {
    /// Where.
    pub path: PathBuf,
    /// The file system's type.
    pub kind: String,
}

/// Everything that is mounted, in the order in which it was.
pub fn mounted() -> Vec<Mounted> {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mounted> {
    let (before, after) = line.split_once(" - ")?;
    let path = unescape(before.split(' ').nth(4)?);
    Some(Mounted { path, kind: after.split(' ').next()?.to_owned() })
}

/// The kernel writes blanks and the like as `\040`.
fn unescape(text: &str) -> PathBuf {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits =
            tail.get(..3).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match (first, digits) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = &tail[3..];
            }
            (byte, _) => {
                out.push(*byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out).into()
}

/// The type of what is mounted uppermost at `path`.
fn kind_at(path: &Path) -> Option<String> {
    mounted().into_iter().rev().find(|m| m.path.as_os_str().as_bytes() == path.as_os_str().as_bytes()).map(|m| m.kind)
}

/// A Mortar volume is mounted at `path`.
pub fn is_mortar_mount(path: &Path) -> bool {
    kind_at(path).as_deref() == Some(MORTAR)
}

/// Anything is mounted at `path`.
pub fn is_mount_point(path: &Path) -> bool {
    kind_at(path).is_some()
}

/// Makes the sparse file, an XFS in it, and mounts that, for the playground in `dir`.
///
/// # Errors
/// When one of these fails.
pub fn make(disk: &Disk, size: u64, dir: &Path) -> Result<()> {
    let image =
        std::fs::File::create_new(&disk.image).with_context(|| format!("cannot make {}", disk.image.display()))?;
    image.set_len(size).with_context(|| format!("cannot make {} {size} bytes large", disk.image.display()))?;
    drop(image);
    run(mark(&mut Command::new("mkfs.xfs"), dir).arg("-q").arg(&disk.image), "install xfsprogs")?;
    std::fs::create_dir(&disk.mount_point).with_context(|| format!("cannot make {}", disk.mount_point.display()))?;
    run(
        mark(&mut Command::new("mount"), dir).args(["-t", "xfs", "-o", "loop"]).arg(&disk.image).arg(&disk.mount_point),
        "is there a free loop device, and does this kernel know XFS?",
    )
}

/// Unmounts a brick's file system; its loop device goes with it.
///
/// # Errors
/// When it stays mounted or its loop device stays.
pub fn unmake(disk: &Disk) -> Result<(), String> {
    let until = Instant::now() + Duration::from_secs(10);
    // Both are looked at again each time round: the kernel lets go of a loop device a moment after the unmount, and a
    // `mount` whose `up` was killed may be about to use the device that it has just set up.
    loop {
        let why = if is_mount_point(&disk.mount_point) {
            match unmount(&disk.mount_point, UnmountFlags::NOFOLLOW) {
                Ok(()) => continue,
                Err(error) => {
                    let path = disk.mount_point.display();
                    format!("{path} cannot be unmounted: {error}. Who uses it? See 'fuser -vm {path}'.")
                }
            }
        } else if let Some(device) = loop_device(&disk.image) {
            let _ = Command::new("losetup").arg("-d").arg(&device).output();
            format!(
                "The loop device {device} of {} is still in use; 'losetup -d {device}' frees it.",
                disk.image.display()
            )
        } else {
            return Ok(());
        };
        if Instant::now() >= until {
            return Err(why);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn loop_device(image: &Path) -> Option<String> {
    if !image.exists() {
        return None;
    }
    let out = Command::new("losetup").args(["-n", "-O", "NAME", "-j"]).arg(image).output().ok()?;
    let name = String::from_utf8_lossy(&out.stdout).lines().next()?.trim().to_owned();
    (!name.is_empty()).then_some(name)
}

/// Unmounts a volume; a busy or dead one is detached.
///
/// # Errors
/// When it stays mounted.
pub fn unmount_volume(path: &Path) -> Result<(), String> {
    // More than one may be stacked there, from a mount that died and one over it.
    for _ in 0..8 {
        if !is_mortar_mount(path) {
            return Ok(());
        }
        if unmount(path, UnmountFlags::NOFOLLOW).is_err() {
            unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                .map_err(|error| format!("{} cannot be unmounted: {error}.", path.display()))?;
        }
    }
    if is_mortar_mount(path) { Err(format!("{} is still mounted.", path.display())) } else { Ok(()) }
}

fn run(command: &mut Command, advice: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().with_context(|| format!("cannot start {name} ({advice})"))?;
    if !out.status.success() {
        bail!("{name} failed ({advice}): {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_blank_is_read_as_it_is_called() {
        let line = r"36 35 98:0 / /mnt/my\040disk\134x rw,noatime master:1 - fuse.mortar s1:/v rw";
        let mounted = parse_line(line).unwrap();
        assert_eq!(mounted.path, Path::new("/mnt/my disk\\x"));
        assert_eq!(mounted.kind, "fuse.mortar");
        assert!(parse_line("nonsense").is_none());
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mortar_mount(Path::new("/proc")));
    }
}
