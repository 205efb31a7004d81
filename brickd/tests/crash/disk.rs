//! A disk that remembers: one file on a FUSE file system of the test's own. Below a loop device every write and every flush of
//! the XFS on it arrives here, in order, and a disk can be made of any part of them.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    SessionACL, WriteFlags,
};
use parking_lot::Mutex;

/// What a disk writes whole or not at all.
pub const SECTOR: usize = 512;
/// The smallest that `mkfs.xfs` makes.
pub const DISK_BYTES: u64 = 320 << 20;
const PAGE: usize = 4096;
const MAX_IO_BYTES: u32 = 1 << 20;
const ROOT: INodeNo = INodeNo(1);
const ONLY_FILE: INodeNo = INodeNo(2);
const FILE: &str = "disk";
const NO_TIME: Duration = Duration::ZERO;

type Page = Arc<[u8; PAGE]>;
/// What is on a disk; a page that is not there is zeroes.
pub type Pages = HashMap<u64, Page>;

/// Something that the disk was told to do.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sectors to be written.
    Write(u64, Arc<[u8]>),
    /// All that was written before is to be made durable, and has been.
    Flush,
}

/// Puts bytes onto pages.
pub fn put(pages: &mut Pages, offset: u64, mut data: &[u8]) {
    let mut at = offset;
    while !data.is_empty() {
        let (number, from) = (at / PAGE as u64, (at % PAGE as u64) as usize);
        let length = data.len().min(PAGE - from);
        let page = pages.entry(number).or_insert_with(|| Arc::new([0; PAGE]));
        Arc::make_mut(page)[from..from + length].copy_from_slice(&data[..length]);
        data = &data[length..];
        at += length as u64;
    }
}

#[derive(Default)]
struct Content {
    below: Arc<Pages>,
    above: Pages,
    steps: Option<Vec<(Instant, Step)>>,
    refused: Option<Vec<u8>>,
}

fn has(data: &[u8], part: &[u8]) -> bool {
    data.windows(part.len()).any(|window| window == part)
}

impl Content {
    fn read(&self, offset: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let (number, from) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let length = (out.len() - done).min(PAGE - from);
            match self.above.get(&number).or_else(|| self.below.get(&number)) {
                Some(page) => out[done..done + length].copy_from_slice(&page[from..from + length]),
                None => out[done..done + length].fill(0),
            }
            done += length;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let pages = offset / PAGE as u64..(offset + data.len() as u64).div_ceil(PAGE as u64);
        for number in pages {
            if let (false, Some(page)) = (self.above.contains_key(&number), self.below.get(&number)) {
                self.above.insert(number, Arc::clone(page));
            }
        }
        put(&mut self.above, offset, data);
        if let Some(steps) = &mut self.steps {
            steps.push((Instant::now(), Step::Write(offset, data.into())));
        }
    }
}

/// The disk, served until it is dropped.
pub struct Disk {
    content: Arc<Mutex<Content>>,
    directory: PathBuf,
    session: Option<BackgroundSession>,
}

impl Disk {
    /// A disk of zeroes, as a file in `directory`.
    pub fn serve(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let fuse = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").context("opening /dev/fuse")?;
        let data =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={MAX_IO_BYTES}", fuse.as_raw_fd());
        let data = std::ffi::CString::new(data)?;
        rustix::mount::mount("crash", directory, "fuse.crash", rustix::mount::MountFlags::empty(), data.as_c_str())
            .with_context(|| format!("mounting on {}", directory.display()))?;
        let content = Arc::new(Mutex::new(Content::default()));
        let mut config = fuser::Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(2);
        let served = OneFile { content: Arc::clone(&content) };
        let session = fuser::Session::from_fd(served, OwnedFd::from(fuse), SessionACL::All, config)?.spawn()?;
        Ok(Self { content, directory: directory.to_owned(), session: Some(session) })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.directory.join(FILE)
    }

    /// From now on it writes nothing that has `part` in it.
    pub fn refuse(&self, part: Option<Vec<u8>>) {
        self.content.lock().refused = part;
    }

    /// `part` is somewhere on it, within a page.
    pub fn contains(&self, part: &[u8]) -> bool {
        let content = self.content.lock();
        let mut pages = content.above.values().chain(content.below.values());
        pages.any(|page| has(&page[..], part))
    }

    /// From now on it remembers what it is told. Returns what is on it now.
    pub fn record(&self) -> Pages {
        let mut content = self.content.lock();
        content.steps = Some(Vec::new());
        let mut pages = (*content.below).clone();
        pages.extend(content.above.iter().map(|(number, page)| (*number, Arc::clone(page))));
        pages
    }

    /// How much it remembers.
    pub fn recorded(&self) -> usize {
        self.content.lock().steps.as_ref().map_or(0, Vec::len)
    }

    /// What it remembers, and when each was.
    pub fn steps(&self) -> (Vec<Instant>, Vec<Step>) {
        self.content.lock().steps.clone().unwrap_or_default().into_iter().unzip()
    }

    /// Makes it another disk: one with these pages, onto which these sectors were written. Nobody may be using it.
    pub fn become_image<'a>(&self, below: Arc<Pages>, sectors: impl Iterator<Item = (u64, &'a [u8])>) {
        let mut image = Content { below, ..Content::default() };
        for (offset, data) in sectors {
            image.write(offset, data);
        }
        *self.content.lock() = image;
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.directory, rustix::mount::UnmountFlags::DETACH);
        if let Some(session) = self.session.take() {
            drop(session);
        }
    }
}

struct OneFile {
    content: Arc<Mutex<Content>>,
}

fn attributes(ino: INodeNo) -> FileAttr {
    let root = ino == ROOT;
    let size = if root { 0 } else { DISK_BYTES };
    FileAttr {
        ino,
        size,
        blocks: size / SECTOR as u64,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if root { FileType::Directory } else { FileType::RegularFile },
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PAGE as u32,
        flags: 0,
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config.set_max_write(MAX_IO_BYTES).map_err(|_| io::Error::other("the kernel takes no writes of 1 MiB"))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == ROOT && name == FILE {
            reply.entry(&NO_TIME, &attributes(ONLY_FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&NO_TIME, &attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Nothing of it may stay in a cache of the kernel's.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut out = vec![0; DISK_BYTES.saturating_sub(offset).min(u64::from(size)) as usize];
        self.content.lock().read(offset, &mut out);
        reply.data(&out);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if offset + data.len() as u64 > DISK_BYTES {
            return reply.error(Errno::ENOSPC);
        }
        let mut content = self.content.lock();
        if content.refused.as_ref().is_some_and(|part| has(data, part)) {
            return reply.error(Errno::EIO);
        }
        content.write(offset, data);
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        if let Some(steps) = &mut self.content.lock().steps {
            steps.push((Instant::now(), Step::Flush));
        }
        reply.ok();
    }
}
