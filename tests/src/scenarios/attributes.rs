//! Owners, modes, times, extended attributes, and what statfs says.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{
    AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags, getxattr, getxattr_query, listxattr,
    removexattr, setxattr, statvfs, utimensat,
};
use rustix::io::Errno;

use super::{OneMount, as_user, filled, refused};

/// All of this file.
pub const ALL: &[OneMount] = &[
    ("owner-and-mode", owner_and_mode),
    ("permissions-are-enforced", permissions_are_enforced),
    ("set-gid-directory", set_gid_directory),
    ("chown-takes-set-uid-away", chown_takes_set_uid_away),
    ("writing-takes-set-uid-away", writing_takes_set_uid_away),
    ("writing-takes-capabilities-away", writing_takes_capabilities_away),
    ("times", times),
    ("extended-attributes", extended_attributes),
    ("acls-or-none", acls_or_none),
    ("room", room),
];

/// Nobody has these.
const USER: u32 = 45_678;
const GROUP: u32 = 56_789;

fn mode(path: &Path) -> Result<u32> {
    Ok(fs::symlink_metadata(path)?.mode() & 0o7777)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode)).with_context(|| format!("chmod {mode:o}"))
}

fn owner_and_mode(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    filled(&path, 1, 10)?;
    set_mode(&path, 0o640)?;
    chown(&path, Some(USER), Some(GROUP))?;
    let seen = fs::metadata(&path)?;
    ensure!((seen.uid(), seen.gid(), seen.mode() & 0o7777) == (USER, GROUP, 0o640), "{seen:?}");
    chown(&path, None, Some(0))?;
    let seen = fs::metadata(&path)?;
    ensure!((seen.uid(), seen.gid()) == (USER, 0), "only the group was to change");
    let exact = dir.join("exact");
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&exact)?;
    ensure!(mode(&exact)? == 0o600, "the mode given at creation: {:o}", mode(&exact)?);
    // Open read-only, with a mode that lets nobody write: the creator may all the same.
    let sealed = fs::OpenOptions::new().write(true).create_new(true).mode(0o444).open(dir.join("sealed"))?;
    sealed.write_all_at(b"x", 0).context("writing a file that was created read-only")
}

fn permissions_are_enforced(dir: &Path) -> Result<()> {
    filled(&dir.join("closed"), 1, 10)?;
    set_mode(&dir.join("closed"), 0o600)?;
    filled(&dir.join("readable"), 2, 10)?;
    set_mode(&dir.join("readable"), 0o644)?;
    set_mode(dir, 0o755)?;
    as_user(USER, GROUP, dir, |dir| -> Result<()> {
        refused(fs::File::open(dir.join("closed")), Errno::ACCESS, "reading another's closed file")?;
        ensure!(fs::read(dir.join("readable"))? == [2; 10], "reading a readable file");
        refused(
            fs::OpenOptions::new().write(true).open(dir.join("readable")),
            Errno::ACCESS,
            "writing another's file",
        )?;
        refused(fs::File::create_new(dir.join("new")), Errno::ACCESS, "creating in another's directory")?;
        refused(chown(dir.join("readable"), Some(USER), None), Errno::PERM, "taking another's file")
    })??;
    chown(dir.join("closed"), Some(USER), Some(GROUP))?;
    as_user(USER, GROUP, dir, |dir| fs::read(dir.join("closed")))?.context("reading it after it was given away")?;
    Ok(())
}

fn set_gid_directory(dir: &Path) -> Result<()> {
    let shared = dir.join("shared");
    fs::create_dir(&shared)?;
    chown(&shared, None, Some(GROUP))?;
    set_mode(&shared, 0o2775)?;
    filled(&shared.join("f"), 1, 1)?;
    fs::create_dir(shared.join("sub"))?;
    ensure!(fs::metadata(shared.join("f"))?.gid() == GROUP, "a file takes the directory's group");
    let sub = fs::metadata(shared.join("sub"))?;
    ensure!(sub.gid() == GROUP && sub.mode() & 0o2000 != 0, "a subdirectory takes group and set-gid: {:o}", sub.mode());
    ensure!(fs::metadata(shared.join("f"))?.mode() & 0o2000 == 0, "a file does not become set-gid");
    Ok(())
}

fn chown_takes_set_uid_away(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    filled(&path, 1, 10)?;
    for (before, after) in [(0o6755, 0o755), (0o4711, 0o711), (0o2644, 0o2644)] {
        set_mode(&path, before)?;
        ensure!(mode(&path)? == before, "chmod {before:o} gives {:o}", mode(&path)?);
        chown(&path, Some(USER), None)?;
        ensure!(mode(&path)? == after, "chown makes {:o} of {before:o}, and should {after:o}", mode(&path)?);
    }
    let sub = dir.join("sub");
    fs::create_dir(&sub)?;
    set_mode(&sub, 0o2775)?;
    chown(&sub, Some(USER), None)?;
    ensure!(mode(&sub)? == 0o2775, "a directory stays set-gid");
    Ok(())
}

fn writing_takes_set_uid_away(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = filled(&path, 1, 4096)?;
    chown(&path, Some(USER), Some(GROUP))?;
    set_mode(dir, 0o755)?;
    let opened = as_user(USER, GROUP, dir, |dir| fs::OpenOptions::new().write(true).open(dir.join("f")))??;
    for round in 0..2 {
        set_mode(&path, 0o6755)?;
        file.write_all_at(b"root", 0)?;
        ensure!(mode(&path)? == 0o6755, "root's write keeps set-user-id (round {round}): {:o}", mode(&path)?);
        as_user(USER, GROUP, dir, |_| opened.write_all_at(b"user", 0))??;
        ensure!(mode(&path)? == 0o755, "a user's write takes set-user-id away (round {round}): {:o}", mode(&path)?);
    }
    set_mode(&path, 0o4755)?;
    as_user(USER, GROUP, dir, |_| opened.set_len(100))??;
    ensure!(mode(&path)? == 0o755, "a user's truncation takes set-user-id away");
    set_mode(&path, 0o4755)?;
    as_user(USER, GROUP, dir, |dir| fs::OpenOptions::new().write(true).truncate(true).open(dir.join("f")).map(drop))??;
    ensure!(mode(&path)? == 0o755, "a user's O_TRUNC takes set-user-id away");
    Ok(())
}

fn writing_takes_capabilities_away(dir: &Path) -> Result<()> {
    const NAME: &str = "security.capability";
    // Version 2, no capability at all: well-formed is all that the kernel asks.
    let value = [0x01, 0, 0, 0x02, 0, 0x04, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let path = dir.join("f");
    let file = filled(&path, 1, 4096)?;
    for round in 0..2 {
        setxattr(&path, NAME, &value, XattrFlags::empty()).context("setting a capability")?;
        file.write_all_at(b"x", 0)?;
        refused(getxattr(&path, NAME, &mut [0u8; 64]), Errno::NODATA, "a capability after a write")
            .with_context(|| format!("round {round}"))?;
    }
    setxattr(&path, NAME, &value, XattrFlags::empty())?;
    file.set_len(1)?;
    refused(getxattr(&path, NAME, &mut [0u8; 64]), Errno::NODATA, "a capability after a truncation")
}

fn times(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = filled(&path, 1, 10)?;
    let at = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let set = |last_access, last_modification| {
        utimensat(CWD, &path, &Timestamps { last_access, last_modification }, AtFlags::empty()).context("utimensat")
    };
    for (seconds, ns) in [(1_234_567_890, 123_456_789), (0, 1), (-2, 800_000_000)] {
        set(at(seconds + 1, ns), at(seconds, ns))?;
        let seen = fs::metadata(&path)?;
        ensure!((seen.mtime(), seen.mtime_nsec()) == (seconds, ns), "mtime {}.{}", seen.mtime(), seen.mtime_nsec());
        ensure!((seen.atime(), seen.atime_nsec()) == (seconds + 1, ns), "atime {}.{}", seen.atime(), seen.atime_nsec());
        ensure!(seen.ctime() > 1_700_000_000, "ctime is the change's: {}", seen.ctime());
    }
    set(at(0, UTIME_OMIT), at(0, UTIME_NOW))?;
    let seen = fs::metadata(&path)?;
    ensure!(seen.mtime() > 1_700_000_000 && seen.atime() == -1, "UTIME_NOW and UTIME_OMIT: {seen:?}");
    set(at(5, 0), at(5, 0))?;
    file.write_all_at(b"x", 0)?;
    ensure!(fs::metadata(&path)?.mtime() > 1_700_000_000, "a write is a modification");
    set(at(5, 0), at(5, 0))?;
    file.set_len(3)?;
    ensure!(fs::metadata(&path)?.mtime() > 1_700_000_000, "a truncation is a modification");
    let before = fs::metadata(dir)?;
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::remove_file(&path)?;
    let after = fs::metadata(dir)?;
    ensure!((after.mtime(), after.mtime_nsec()) > (before.mtime(), before.mtime_nsec()), "a directory's mtime");
    Ok(())
}

fn extended_attributes(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    filled(&path, 1, 1)?;
    for name in ["user.mortar", "trusted.libvirt.security.dac", "security.mortar-test"] {
        let set = |value: &[u8], flags| setxattr(&path, name, value, flags);
        let mut buffer = [0u8; 64];
        refused(getxattr(&path, name, &mut buffer), Errno::NODATA, name)?;
        refused(set(b"v", XattrFlags::REPLACE), Errno::NODATA, "REPLACE of nothing")?;
        set(b"first", XattrFlags::CREATE).with_context(|| format!("setting {name}"))?;
        refused(set(b"v", XattrFlags::CREATE), Errno::EXIST, "CREATE over a value")?;
        set(b"second", XattrFlags::REPLACE)?;
        ensure!(getxattr(&path, name, &mut buffer)? == 6 && buffer.starts_with(b"second"), "{name}: {buffer:?}");
        ensure!(getxattr_query(&path, name)? == 6, "a probe tells the length");
        refused(getxattr(&path, name, &mut [0u8; 3]), Errno::RANGE, "a buffer that is too small")?;
        ensure!(names(&path)?.contains(&name.to_owned()), "{name} is not listed: {:?}", names(&path)?);
        set(b"", XattrFlags::empty())?;
        ensure!(getxattr(&path, name, &mut buffer)? == 0, "an empty value");
        removexattr(&path, name)?;
        refused(removexattr(&path, name), Errno::NODATA, "removing nothing")?;
    }
    setxattr(dir, "trusted.on-directory", b"x", XattrFlags::empty()).context("on a directory")?;
    setxattr(&path, "user.large", &[7; 3000], XattrFlags::empty()).context("3000 bytes")?;
    setxattr(&path, "trusted.hidden", b"x", XattrFlags::empty())?;
    set_mode(&path, 0o644)?;
    set_mode(dir, 0o755)?;
    let seen = as_user(USER, GROUP, dir, |dir| names(&dir.join("f")))??;
    ensure!(seen == ["user.large"], "what an ordinary user sees: {seen:?}");
    Ok(())
}

fn names(path: &Path) -> Result<Vec<String>> {
    let mut buffer = [0u8; 4096];
    let length = listxattr(path, &mut buffer)?;
    let names = buffer[..length].split(|b| *b == 0).filter(|n| !n.is_empty());
    // The local file system's security module may have labelled it.
    let names = names.map(|n| String::from_utf8_lossy(n).into_owned()).filter(|n| n != "security.selinux");
    Ok(names.collect())
}

fn acls_or_none(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    filled(&path, 1, 1)?;
    match getxattr(&path, "system.posix_acl_access", &mut [0u8; 256]) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        other => anyhow::bail!("a file without an ACL: {other:?}"),
    }
}

fn room(dir: &Path) -> Result<()> {
    let room = statvfs(dir)?;
    ensure!(room.f_blocks > 0 && room.f_bavail <= room.f_bfree && room.f_bfree <= room.f_blocks, "blocks");
    ensure!(room.f_files > 0 && room.f_ffree <= room.f_files && room.f_namemax == 255, "inodes");
    Ok(())
}
