//! What one mount does and another sees: at once, also through handles that were open before. `a` and `b` are the same
//! directory through two mounts.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{
    CWD, FallocateFlags, RenameFlags, SeekFrom, XattrFlags, fallocate, getxattr, renameat_with, seek, setxattr,
};
use rustix::io::Errno;

use super::{Memory, TwoMounts, all, bytes, filled, listing, open, refused};

/// All of this file.
pub const ALL: &[TwoMounts] = &[
    ("names-at-once", names_at_once),
    ("one-creates-exclusively", one_creates_exclusively),
    ("both-create-without-error", both_create_without_error),
    ("size-at-once", size_at_once),
    ("data-at-once", data_at_once),
    ("writers-take-turns", writers_take_turns),
    ("holes-at-once", holes_at_once),
    ("replaced-file", replaced_file),
    ("unlinked-by-the-other", unlinked_by_the_other),
    ("owner-and-attributes-at-once", owner_and_attributes_at_once),
    ("cut-by-the-other", cut_by_the_other),
];

fn names_at_once(a: &Path, b: &Path) -> Result<()> {
    for n in 0..20 {
        let name = format!("n{n}");
        // The negative answer before must not be remembered.
        refused(fs::File::open(b.join(&name)), Errno::NOENT, "a name that is not there yet")?;
        filled(&a.join(&name), 1, 1)?;
        ensure!(fs::read(b.join(&name))? == [1], "{name} is not seen at once");
        ensure!(listing(b)? == [name.clone()], "the listing after {name} was made: {:?}", listing(b)?);
        fs::rename(a.join(&name), a.join("moved"))?;
        ensure!(!b.join(&name).exists() && b.join("moved").exists(), "{name} has moved");
        fs::remove_file(b.join("moved"))?;
        refused(fs::File::open(a.join("moved")), Errno::NOENT, "what the other mount has removed")?;
    }
    fs::create_dir(a.join("d"))?;
    filled(&b.join("d/f"), 1, 1)?;
    refused(fs::remove_dir(a.join("d")), Errno::NOTEMPTY, "a directory that the other mount has filled")?;
    filled(&a.join("x"), 2, 1)?;
    renameat_with(CWD, b.join("x"), CWD, b.join("d/f"), RenameFlags::EXCHANGE)?;
    ensure!(fs::read(a.join("x"))? == [1], "names exchanged by the other mount");
    Ok(())
}

fn one_creates_exclusively(a: &Path, b: &Path) -> Result<()> {
    for n in 0..10 {
        let name = format!("n{n}");
        let (one, other) = race(|| fs::File::create_new(a.join(&name)), || fs::File::create_new(b.join(&name)))?;
        ensure!(one.is_ok() != other.is_ok(), "{name}: both or neither have created it: {one:?}, {other:?}");
        let loser = one.err().or(other.err()).and_then(|e| e.raw_os_error());
        ensure!(loser == Some(libc::EEXIST), "{name}: the other gets {loser:?}");
    }
    Ok(())
}

fn both_create_without_error(a: &Path, b: &Path) -> Result<()> {
    for n in 0..10 {
        let name = format!("n{n}");
        let (one, other) = race(|| open(&a.join(&name), 0), || open(&b.join(&name), 0))?;
        let (one, other) = (one.context("one")?.metadata()?, other.context("the other")?.metadata()?);
        ensure!(one.ino() == other.ino(), "{name}: two files of one name");
    }
    Ok(())
}

fn race<T: Send>(one: impl FnOnce() -> T + Send, other: impl FnOnce() -> T + Send) -> Result<(T, T)> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(one);
        let second = other();
        thread.join().map(|first| (first, second)).map_err(|_| anyhow::anyhow!("a thread panicked"))
    })
}

fn size_at_once(a: &Path, b: &Path) -> Result<()> {
    let writer = filled(&a.join("f"), 1, 4096)?;
    let reader = fs::File::open(b.join("f"))?;
    for blocks in 2..30u64 {
        writer.write_all_at(&[2; 4096], (blocks - 1) * 4096)?;
        let (by_name, by_handle) = (fs::metadata(b.join("f"))?.len(), reader.metadata()?.len());
        ensure!(
            (by_name, by_handle) == (blocks * 4096, blocks * 4096),
            "size {by_name} by name, {by_handle} by handle"
        );
        ensure!(seek(&reader, SeekFrom::End(0))? == blocks * 4096, "SEEK_END");
        ensure!(all(&bytes(&reader, (blocks - 1) * 4096, 4096)?, 2), "what was appended");
    }
    writer.set_len(100)?;
    ensure!(reader.metadata()?.len() == 100 && fs::read(b.join("f"))?.len() == 100, "after a cut");
    Ok(())
}

fn data_at_once(a: &Path, b: &Path) -> Result<()> {
    filled(&a.join("f"), 0, 1 << 20)?;
    for flags in [0, libc::O_DIRECT] {
        let (one, other) = (open(&a.join("f"), flags)?, open(&b.join("f"), flags)?);
        for round in 1..30u8 {
            let mut memory = Memory::new(4096, 0, round);
            let (writer, reader) = if round % 2 == 0 { (&one, &other) } else { (&other, &one) };
            writer.write_all_at(memory.get(), 8192)?;
            memory.get_mut().fill(0);
            reader.read_exact_at(memory.get_mut(), 8192)?;
            ensure!(all(memory.get(), round), "round {round}: the other mount reads old data");
        }
    }
    Ok(())
}

fn writers_take_turns(a: &Path, b: &Path) -> Result<()> {
    filled(&a.join("f"), 0, 1 << 20)?;
    let write = |path: &Path, first: u64, byte: u8| -> Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        (0..32).try_for_each(|n| file.write_all_at(&vec![byte; 4096], (2 * n + first) * 4096)).map_err(Into::into)
    };
    let (one, other) = race(|| write(&a.join("f"), 0, 1), || write(&b.join("f"), 1, 2))?;
    one.and(other).context("two mounts writing blocks in turns")?;
    for path in [a, b] {
        let data = fs::read(path.join("f"))?;
        let right = data[..64 * 4096].chunks(4096).enumerate().all(|(n, c)| all(c, (n % 2) as u8 + 1));
        ensure!(right, "a block is not its writer's");
    }
    Ok(())
}

fn holes_at_once(a: &Path, b: &Path) -> Result<()> {
    filled(&a.join("f"), 7, 1 << 20)?;
    let reader = fs::File::open(b.join("f"))?;
    ensure!(all(&bytes(&reader, 0, 1 << 20)?, 7), "before");
    let writer = open(&a.join("f"), 0)?;
    fallocate(&writer, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 65536, 65536)?;
    fallocate(&writer, FallocateFlags::ZERO_RANGE, 262_144, 4096)?;
    ensure!(all(&bytes(&reader, 65536, 65536)?, 0), "a hole");
    ensure!(all(&bytes(&reader, 262_144, 4096)?, 0) && all(&bytes(&reader, 266_240, 4096)?, 7), "a zeroed range");
    fallocate(&writer, FallocateFlags::empty(), 0, 2 << 20)?;
    ensure!(reader.metadata()?.len() == 2 << 20, "an allocation that grows");
    Ok(())
}

fn replaced_file(a: &Path, b: &Path) -> Result<()> {
    for round in 1..10u8 {
        filled(&a.join("new"), round, 100)?;
        let old = fs::File::open(b.join("f"));
        fs::rename(a.join("new"), a.join("f"))?;
        ensure!(fs::read(b.join("f"))? == [round; 100], "round {round}: opening again gives the old file");
        if let Ok(old) = old {
            ensure!(all(&bytes(&old, 0, 100)?, round - 1), "round {round}: the handle of the replaced file");
        }
    }
    Ok(())
}

fn unlinked_by_the_other(a: &Path, b: &Path) -> Result<()> {
    filled(&a.join("f"), 9, 8192)?;
    let kept = open(&b.join("f"), 0)?;
    fs::remove_file(a.join("f"))?;
    // Whoever reclaims too early has had time to.
    std::thread::sleep(std::time::Duration::from_millis(500));
    ensure!(all(&bytes(&kept, 0, 8192)?, 9), "data of a file that the other mount has unlinked");
    kept.write_all_at(b"x", 8192)?;
    kept.sync_all()?;
    let seen = kept.metadata()?;
    ensure!(seen.len() == 8193 && seen.nlink() == 0, "size {}, links {}", seen.len(), seen.nlink());
    refused(fs::metadata(b.join("f")), Errno::NOENT, "its name")
}

fn owner_and_attributes_at_once(a: &Path, b: &Path) -> Result<()> {
    filled(&a.join("f"), 1, 1)?;
    let handle = fs::File::open(b.join("f"))?;
    for n in 1..10u32 {
        chown(a.join("f"), Some(n), Some(n + 1))?;
        fs::set_permissions(a.join("f"), Permissions::from_mode(0o600 | (n % 8)))?;
        for seen in [fs::metadata(b.join("f"))?, handle.metadata()?] {
            ensure!((seen.uid(), seen.gid(), seen.mode() & 0o777) == (n, n + 1, 0o600 | (n % 8)), "{seen:?}");
        }
        setxattr(b.join("f"), "trusted.libvirt.security.ref", n.to_string().as_bytes(), XattrFlags::empty())?;
        let mut buffer = [0u8; 16];
        let length = getxattr(a.join("f"), "trusted.libvirt.security.ref", &mut buffer)?;
        ensure!(buffer[..length] == *n.to_string().as_bytes(), "an attribute that the other mount has set");
    }
    Ok(())
}

fn cut_by_the_other(a: &Path, b: &Path) -> Result<()> {
    let writer = filled(&a.join("f"), 1, 1 << 20)?;
    OpenOptions::new().write(true).truncate(true).open(b.join("f"))?;
    ensure!(writer.metadata()?.len() == 0, "the size after the other mount's O_TRUNC");
    writer.write_all_at(&[2; 10], 4096)?;
    let data = fs::read(b.join("f"))?;
    ensure!(
        data.len() == 4106 && all(&data[..4096], 0) && all(&data[4096..], 2),
        "old data is back: {} bytes",
        data.len()
    );
    Ok(())
}
