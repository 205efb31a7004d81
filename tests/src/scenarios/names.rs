//! Names: what may be made, moved, listed and removed, and which error says that it may not.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev, mknodat, renameat_with};
use rustix::io::Errno;

use super::{OneMount, all, bytes, filled, listing, open, refused};

/// All of this file.
pub const ALL: &[OneMount] = &[
    ("create-exclusively", create_exclusively),
    ("unlinked-open-file-lives", unlinked_open_file_lives),
    ("unlink-and-create-again", unlink_and_create_again),
    ("rename-replaces", rename_replaces),
    ("rename-of-directories", rename_of_directories),
    ("rename-flags", rename_flags),
    ("hard-links", hard_links),
    ("symbolic-links", symbolic_links),
    ("directories", directories),
    ("special-files", special_files),
    ("long-and-odd-names", long_and_odd_names),
    ("listing-of-many", listing_of_many),
    ("listing-while-removing", listing_while_removing),
];

fn create_exclusively(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::File::create_new(&path)?;
    refused(fs::File::create_new(&path), Errno::EXIST, "O_EXCL on an existing name")?;
    refused(fs::File::open(dir.join("none")), Errno::NOENT, "opening a missing name")?;
    refused(fs::File::open(path.join("below")), Errno::NOTDIR, "a path through a file")?;
    ensure!(fs::metadata(&path)?.len() == 0, "a new file is empty");
    Ok(())
}

fn unlinked_open_file_lives(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = filled(&path, 0x11, 1 << 20)?;
    let second = fs::File::open(&path)?;
    fs::remove_file(&path)?;
    file.write_all_at(b"x", 4096).context("writing after unlink")?;
    ensure!(bytes(&second, 4096, 1)? == b"x" && bytes(&second, 0, 1)? == [0x11], "data of an unlinked file");
    let seen = file.metadata()?;
    ensure!(seen.len() == 1 << 20 && seen.nlink() == 0, "size {} and links {} after unlink", seen.len(), seen.nlink());
    file.set_len(5)?;
    file.sync_all()?;
    drop(file);
    ensure!(bytes(&second, 0, 5)?[0] == 0x11, "the second handle after the first was closed");
    ensure!(listing(dir)?.is_empty(), "something is left where the file was: {:?}", listing(dir)?);
    Ok(())
}

fn unlink_and_create_again(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    for round in 0..20u8 {
        let file = open(&path, 0)?;
        ensure!(file.metadata()?.len() == 0, "round {round}: a new file has an old one's data");
        file.write_all_at(&[round; 100], 0)?;
        drop(file);
        // At once after the last close, of which the log may not have heard.
        let again = fs::File::open(&path)?;
        fs::remove_file(&path)?;
        ensure!(all(&bytes(&again, 0, 100)?, round), "round {round}");
    }
    Ok(())
}

fn rename_replaces(dir: &Path) -> Result<()> {
    let (a, b) = (dir.join("a"), dir.join("b"));
    filled(&a, 1, 10)?;
    let old = filled(&b, 2, 10)?;
    fs::rename(&a, &b)?;
    ensure!(all(&bytes(&old, 0, 10)?, 2), "a replaced file that is open");
    ensure!(fs::read(&b)? == [1; 10], "the name leads to the new file");
    ensure!(listing(dir)? == ["b"], "names after rename: {:?}", listing(dir)?);
    fs::hard_link(&b, &a)?;
    fs::rename(&a, &b)?;
    ensure!(listing(dir)? == ["a", "b"], "renaming one name of a file to another does nothing");
    refused(fs::rename(dir.join("none"), &a), Errno::NOENT, "renaming nothing")
}

fn rename_of_directories(dir: &Path) -> Result<()> {
    let (a, b) = (dir.join("a"), dir.join("b"));
    fs::create_dir_all(a.join("inner"))?;
    fs::create_dir(&b)?;
    filled(&dir.join("f"), 1, 1)?;
    refused(fs::rename(&a, a.join("inner/x")), Errno::INVAL, "a directory into itself")?;
    refused(fs::rename(&a, dir.join("f")), Errno::NOTDIR, "a directory over a file")?;
    refused(fs::rename(dir.join("f"), &a), Errno::ISDIR, "a file over a directory")?;
    let over = fs::rename(&b, &a).err().and_then(|e| e.raw_os_error());
    // XFS says the former, ext4 the latter, and POSIX allows both.
    ensure!(matches!(over, Some(libc::EEXIST | libc::ENOTEMPTY)), "over a directory with content: {over:?}");
    fs::rename(&a, &b).context("over an empty directory")?;
    fs::rename(b.join("inner"), dir.join("inner")).context("to another directory")?;
    ensure!(fs::metadata(&b)?.nlink() == 2, "links of a directory that lost its subdirectory");
    ensure!(fs::metadata(dir.join("inner/.."))?.ino() == fs::metadata(dir)?.ino(), ".. of a moved directory");
    Ok(())
}

fn rename_flags(dir: &Path) -> Result<()> {
    let (a, b, sub) = (dir.join("a"), dir.join("b"), dir.join("sub"));
    filled(&a, 1, 1)?;
    filled(&b, 2, 1)?;
    fs::create_dir(&sub)?;
    refused(renameat_with(CWD, &a, CWD, &b, RenameFlags::NOREPLACE), Errno::EXIST, "NOREPLACE over a name")?;
    renameat_with(CWD, &a, CWD, dir.join("c"), RenameFlags::NOREPLACE).context("NOREPLACE to a free name")?;
    renameat_with(CWD, dir.join("c"), CWD, &b, RenameFlags::EXCHANGE).context("EXCHANGE")?;
    ensure!(fs::read(&b)? == [1] && fs::read(dir.join("c"))? == [2], "two files exchanged");
    renameat_with(CWD, &b, CWD, &sub, RenameFlags::EXCHANGE).context("EXCHANGE of a file and a directory")?;
    ensure!(b.is_dir() && sub.is_file(), "a file and a directory exchanged");
    refused(renameat_with(CWD, &b, CWD, &a, RenameFlags::EXCHANGE), Errno::NOENT, "EXCHANGE with nothing")?;
    let both = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE;
    refused(renameat_with(CWD, &b, CWD, &sub, both), Errno::INVAL, "both flags")
}

fn hard_links(dir: &Path) -> Result<()> {
    let (a, b) = (dir.join("a"), dir.join("b"));
    filled(&a, 1, 10)?;
    fs::hard_link(&a, &b)?;
    let (one, other) = (fs::metadata(&a)?, fs::metadata(&b)?);
    ensure!(one.ino() == other.ino() && one.nlink() == 2 && other.nlink() == 2, "two names, one file");
    refused(fs::hard_link(&a, &b), Errno::EXIST, "a link over a name")?;
    refused(fs::hard_link(dir, dir.join("d")), Errno::PERM, "a link to a directory")?;
    fs::remove_file(&a)?;
    ensure!(fs::metadata(&b)?.nlink() == 1 && fs::read(&b)? == [1; 10], "the other name after one is gone");
    Ok(())
}

fn symbolic_links(dir: &Path) -> Result<()> {
    let link = dir.join("l");
    symlink("f", &link)?;
    ensure!(fs::read_link(&link)? == Path::new("f"), "where it points");
    ensure!(fs::symlink_metadata(&link)?.len() == 1, "its size is its target's length");
    refused(fs::File::open(&link), Errno::NOENT, "a link to nothing")?;
    filled(&dir.join("f"), 7, 3)?;
    ensure!(fs::read(&link)? == [7; 3], "through the link");
    refused(symlink("x", &link), Errno::EXIST, "a link over a name")?;
    refused(fs::read_link(dir.join("f")), Errno::INVAL, "readlink of a file")
}

fn directories(dir: &Path) -> Result<()> {
    let sub = dir.join("sub");
    let before = fs::metadata(dir)?;
    fs::create_dir(&sub)?;
    ensure!(fs::metadata(dir)?.nlink() == before.nlink() + 1, "a subdirectory is a link");
    refused(fs::create_dir(&sub), Errno::EXIST, "mkdir over a name")?;
    filled(&sub.join("f"), 1, 1)?;
    refused(fs::remove_dir(&sub), Errno::NOTEMPTY, "rmdir of a directory with content")?;
    refused(fs::remove_dir(sub.join("f")), Errno::NOTDIR, "rmdir of a file")?;
    refused(fs::remove_file(&sub), Errno::ISDIR, "unlink of a directory")?;
    refused(open(&sub, 0), Errno::ISDIR, "writing a directory")?;
    fs::remove_file(sub.join("f"))?;
    fs::File::open(&sub)?.sync_all().context("fsync of a directory")?;
    fs::remove_dir(&sub)?;
    refused(fs::read_dir(&sub), Errno::NOENT, "listing a removed directory")?;
    ensure!(fs::metadata(dir)?.nlink() == before.nlink(), "the link is gone");
    Ok(())
}

fn special_files(dir: &Path) -> Result<()> {
    let mode = Mode::from_raw_mode(0o640);
    for (name, kind, device) in [
        ("fifo", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        ("file", FileType::RegularFile, 0),
    ] {
        mknodat(CWD, dir.join(name), kind, mode, device).with_context(|| format!("mknod of a {name}"))?;
        let seen = fs::symlink_metadata(dir.join(name))?;
        ensure!(seen.mode() & 0o7777 & !0o640 == 0 && seen.rdev() == device, "{name}: {:o}", seen.mode());
    }
    ensure!(fs::symlink_metadata(dir.join("fifo"))?.file_type().is_fifo(), "a FIFO is one");
    ensure!(fs::symlink_metadata(dir.join("socket"))?.file_type().is_socket(), "a socket is one");
    filled(&dir.join("file"), 3, 5)?;
    Ok(())
}

fn long_and_odd_names(dir: &Path) -> Result<()> {
    let longest = "x".repeat(255);
    filled(&dir.join(&longest), 1, 1)?;
    refused(open(&dir.join("x".repeat(256)), 0), Errno::NAMETOOLONG, "a name of 256 bytes")?;
    let odd = ["blank in it", "new\nline", "back\\slash", "...", "\u{1F9F1}"];
    for name in odd {
        filled(&dir.join(name), 1, 1).with_context(|| format!("the name {name:?}"))?;
    }
    let expected: BTreeSet<String> = odd.iter().map(|s| (*s).to_owned()).chain([longest]).collect();
    ensure!(listing(dir)?.into_iter().collect::<BTreeSet<_>>() == expected, "the listing has other names");
    Ok(())
}

fn listing_of_many(dir: &Path) -> Result<()> {
    let expected: Vec<String> = (0..1000).map(|n| format!("name-{n:04}")).collect();
    for name in &expected {
        fs::File::create(dir.join(name))?;
    }
    ensure!(listing(dir)? == expected, "a listing of 1000 names");
    Ok(())
}

fn listing_while_removing(dir: &Path) -> Result<()> {
    for n in 0..600 {
        fs::File::create(dir.join(n.to_string()))?;
    }
    // What `rm -r` does: remove what the listing gives, while it goes on.
    let mut seen = 0;
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
        seen += 1;
    }
    ensure!(seen == 600 && listing(dir)?.is_empty(), "{seen} of 600 names were listed while they were removed");
    Ok(())
}
