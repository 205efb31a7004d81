//! What programs may expect of a directory, as functions over its path: each makes what it needs inside, and says in its
//! error which expectation failed. A local XFS passes them all; so must the mount.
//!
//! | file | owns |
//! | --- | --- |
//! | `names` | create, link, rename, list, remove, special files |
//! | `attributes` | owners, modes, times, extended attributes, statfs |
//! | `data` | read, write, truncate, fallocate, seek, O_DIRECT, O_APPEND, mmap |
//! | `coherence` | what one mount does and another sees |

pub mod attributes;
pub mod coherence;
pub mod data;
pub mod names;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;

/// A promise about one directory.
pub type OneMount = (&'static str, fn(&Path) -> Result<()>);
/// A promise about one directory that is seen through two mounts.
pub type TwoMounts = (&'static str, fn(&Path, &Path) -> Result<()>);

/// All promises about one directory.
#[must_use]
pub fn one_mount() -> Vec<OneMount> {
    [names::ALL, attributes::ALL, data::ALL].concat()
}

/// Runs every promise in a directory of its own below `root`, and collects what failed.
///
/// # Errors
/// All failures, one line each.
pub fn run_one(root: &Path) -> Result<()> {
    let mut failed = Vec::new();
    for (name, promise) in one_mount() {
        let dir = root.join(name);
        let result = make_folder(&dir).and_then(|()| promise(&dir));
        failed.extend(result.err().map(|e| format!("{name}: {e:#}")));
    }
    verdict(&failed)
}

/// The same for promises about two mounts, whose roots are `a` and `b`.
///
/// # Errors
/// All failures, one line each.
pub fn run_two(a: &Path, b: &Path) -> Result<()> {
    let mut failed = Vec::new();
    for (name, promise) in coherence::ALL {
        let (one, other) = (a.join(name), b.join(name));
        let result = make_folder(&one).and_then(|()| promise(&one, &other));
        failed.extend(result.err().map(|e| format!("{name}: {e:#}")));
    }
    verdict(&failed)
}

fn make_folder(dir: &Path) -> Result<()> {
    std::fs::create_dir(dir).with_context(|| format!("making {}", dir.display()))
}

fn verdict(failed: &[String]) -> Result<()> {
    ensure!(failed.is_empty(), "{} promises are broken:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

/// A file that is read and written, made if it is not there.
fn open(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).custom_flags(flags).open(path)
}

/// A file of `length` bytes of `byte`.
fn filled(path: &Path, byte: u8, length: usize) -> Result<File> {
    let file = open(path, 0)?;
    file.write_all_at(&vec![byte; length], 0).context("filling a file")?;
    Ok(file)
}

fn bytes(file: &File, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut data = vec![0xee; length];
    file.read_exact_at(&mut data, offset).with_context(|| format!("reading {length} bytes at {offset}"))?;
    Ok(data)
}

fn all(data: &[u8], byte: u8) -> bool {
    data.iter().all(|b| *b == byte)
}

/// The call failed, and with that error.
fn refused<T, E: Into<io::Error>>(result: Result<T, E>, errno: Errno, what: &str) -> Result<()> {
    match result.map_err(Into::into) {
        Ok(_) => bail!("{what} succeeds, and should fail with {errno}"),
        Err(e) if e.raw_os_error() == Some(errno.raw_os_error()) => Ok(()),
        Err(e) => bail!("{what} fails with '{e}', and should with '{errno}'"),
    }
}

/// Memory that begins `shift` bytes after a page's beginning.
struct Memory {
    bytes: Vec<u8>,
    at: usize,
    length: usize,
}

impl Memory {
    fn new(length: usize, shift: usize, byte: u8) -> Self {
        let bytes = vec![byte; length + shift + 4096];
        let at = bytes.as_ptr().align_offset(4096) + shift;
        Self { bytes, at, length }
    }
    fn get(&self) -> &[u8] {
        &self.bytes[self.at..self.at + self.length]
    }
    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + self.length]
    }
}

/// Names in a directory, sorted.
fn listing(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Runs `work` as an ordinary user, who reaches `dir` by a descriptor: what lies above it may be closed to him.
fn as_user<T: Send>(uid: u32, gid: u32, dir: &Path, work: impl FnOnce(&Path) -> T + Send) -> Result<T> {
    let folder = File::open(dir)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&folder)));
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // The raw calls change this thread only, where libc's wrappers change all.
            // SAFETY: they take numbers, and an empty list of groups.
            let results = unsafe {
                [
                    libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
                    libc::syscall(libc::SYS_setresgid, gid, gid, gid),
                    libc::syscall(libc::SYS_setresuid, uid, uid, uid),
                ]
            };
            ensure!(results == [0; 3], "becoming user {uid} needs root");
            Ok(work(&path))
        });
        thread.join().unwrap_or_else(|_| bail!("the work of user {uid} panicked"))
    })
}

/// Runs `work` in so many threads at once, each with its number.
fn in_parallel(threads: u8, work: impl Fn(u8) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|n| scope.spawn(move || work(n))).collect();
        // All are waited for before the first failure is told.
        let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
        results.into_iter().try_for_each(|r| r.unwrap_or_else(|_| bail!("a thread panicked")))
    })
}
