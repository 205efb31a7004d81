//! May this directory become a brick? Asked on its own server, before the volume is made.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path};

use crate::bricks::is_brick;

/// What `statfs(2)` says of XFS.
const XFS_MAGIC: i64 = 0x5846_5342;

/// Checks a directory that shall become a brick, and makes it if only its parent is there.
///
/// # Errors
/// The sentence for the administrator.
pub(super) fn check(path: &str, force: bool) -> Result<(), String> {
    let brick = Path::new(path);
    if !brick.is_absolute() {
        return Err(format!("brick path {path:?} is not absolute; write it from the root, like /bricks/b1"));
    }
    if brick.components().any(|c| matches!(c, Component::ParentDir)) {
        return Err(format!("brick path {path:?} has .. in it; write it without"));
    }
    if let Some(volume) = is_brick(brick) {
        return Err(format!(
            "{path} is a brick of volume {volume} already; use an empty directory, or remove it there and empty it first"
        ));
    }
    for above in brick.ancestors().skip(1) {
        if let Some(volume) = is_brick(above) {
            return Err(format!(
                "{path} lies inside {}, which is a brick of volume {volume}; use a directory outside it",
                above.display()
            ));
        }
    }
    let existing = if brick.exists() {
        brick
    } else {
        match brick.parent() {
            Some(parent) if parent.is_dir() => parent,
            _ => {
                return Err(format!(
                    "neither {path} nor the directory above it exists; make the file system's directory first"
                ));
            }
        }
    };
    if !existing.is_dir() {
        return Err(format!("{path} is no directory"));
    }
    let trouble = |e: std::io::Error| format!("{path} cannot be looked at: {e}");
    let device = fs::metadata(existing).map_err(trouble)?.dev();
    if existing == brick
        && let Some(parent) = brick.parent()
        && (fs::metadata(parent).map_err(trouble)?.dev() != device || parent == brick)
    {
        return Err(format!(
            "{path} is a mount point itself; use a directory inside it, like {path}/brick, so that a file system that is not mounted is noticed"
        ));
    }
    let statfs = rustix::fs::statfs(existing).map_err(|e| format!("{path} cannot be looked at: {e}"))?;
    let on_root = fs::metadata("/").map_err(trouble)?.dev() == device;
    if statfs.f_type as i64 != XFS_MAGIC {
        return Err(format!(
            "{path} is on a file system of type {:#x}, not on XFS{}; make one with mkfs.xfs and use a directory on it",
            statfs.f_type,
            if on_root { " (it is the root file system)" } else { "" }
        ));
    }
    if on_root && !force {
        return Err(format!(
            "{path} is on the root file system, which a full volume would fill; use a file system of its own, or --force"
        ));
    }
    if existing == brick
        && let Some(first) = fs::read_dir(brick).map_err(trouble)?.flatten().next()
    {
        return Err(format!("{path} is not empty: it has {}; use an empty directory", first.file_name().display()));
    }
    if existing != brick {
        fs::create_dir(brick).map_err(|e| format!("{path} cannot be made: {e}"))?;
    }
    Ok(())
}
