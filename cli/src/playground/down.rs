//! `playground down`: undoes everything, in the reverse order, and may be called again at any time.

use std::path::Path;

use rustix::process::Signal;

use super::disk;
use super::process::{End, end, marked};
use super::record::Playground;
use crate::failure::{Failure, Outcome};
use crate::output::Output;

/// Ends the playground in `dir`; that there is none is fine.
///
/// # Errors
/// What could not be undone. What could is undone all the same, and calling it again goes on.
pub fn down(dir: &Path, output: Output) -> Outcome {
    let Some(playground) = Playground::load(dir)? else {
        output.done("nothing to do", &format!("There is no playground in {}.", dir.display()));
        return Ok(());
    };
    undo(&playground, output).map_err(Failure::Failed)?;
    output.done("playground ended", &format!("The playground in {} is gone.", dir.display()));
    Ok(())
}

/// Undoes what the record names.
///
/// # Errors
/// Sentences about all that is left.
pub fn undo(playground: &Playground, output: Output) -> Result<(), String> {
    let mut left = Vec::new();
    // A server that hangs would hold up the mount's last words.
    for id in playground.servers.iter().filter_map(|server| server.process) {
        let _ = id.signal(Signal::CONT);
    }
    if let Some(mount) = &playground.mount {
        output.progress(&format!("unmounting {}", mount.path.display()));
        left.extend(disk::unmount_volume(&mount.path).err());
        left.extend(mount.process.and_then(|id| end(id, End::Clean).err()));
        // One that mounted in the very moment in which it was told to end.
        left.extend(disk::unmount_volume(&mount.path).err());
        if mount.made_path && mount.path.is_dir() {
            left.extend(
                std::fs::remove_dir(&mount.path).err().map(|e| format!("{} stays: {e}.", mount.path.display())),
            );
        }
    }
    output.progress("stopping the servers");
    // All are told before any is waited for, else the last ones would elect leaders in vain meanwhile.
    for id in playground.servers.iter().rev().filter_map(|server| server.process) {
        let _ = id.signal(Signal::TERM);
    }
    for server in playground.servers.iter().rev() {
        left.extend(server.process.and_then(|id| end(id, End::Clean).err()));
    }
    // Those of an `up` that was killed before it could record them, and its helpers.
    for id in marked(&playground.dir) {
        left.extend(end(id, End::Clean).err());
    }
    for disk in playground.servers.iter().rev().filter_map(|server| server.disk.as_ref()) {
        left.extend(disk::unmake(disk).err());
    }
    // Never delete through a mount: what is below it is not this directory's.
    for mounted in disk::mounted().iter().filter(|m| m.path.starts_with(&playground.dir) && m.path != playground.dir) {
        left.push(format!("{} is still mounted.", mounted.path.display()));
    }
    if !left.is_empty() {
        left.dedup();
        return Err(left.join(" "));
    }
    output.progress(&format!("removing {}", playground.dir.display()));
    remove(playground).map_err(|error| format!("{} could not be removed: {error}.", playground.dir.display()))
}

/// Removes the files, the record last: while anything else is left, `down` must find it.
fn remove(playground: &Playground) -> std::io::Result<()> {
    let record = playground.dir.join(super::record::FILE);
    for entry in std::fs::read_dir(&playground.dir)? {
        let path = entry?.path();
        if path == record {
            continue;
        }
        if path.symlink_metadata()?.is_dir() { std::fs::remove_dir_all(&path)? } else { std::fs::remove_file(&path)? }
    }
    std::fs::remove_file(record)?;
    if playground.made_dir { std::fs::remove_dir(&playground.dir) } else { Ok(()) }
}
