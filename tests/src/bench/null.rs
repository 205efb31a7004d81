//! A FUSE file system that does nothing: one file, whose writes are forgotten and whose reads are zeros.
//!
//! It talks to the kernel as Mortar's mount does, with the same library, threads, open flags and sizes of requests. What it
//! reaches is the limit that FUSE sets, whatever stands behind it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL,
    WriteFlags,
};

use super::fio::FILE;

const MAX_IO_BYTES: u32 = 1 << 20;
const MAX_BACKGROUND: u16 = 512;
const ROOT: INodeNo = INodeNo(1);
const ONLY_FILE: INodeNo = INodeNo(2);
const NO_TIME: Duration = Duration::ZERO;
const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
static ZEROS: [u8; MAX_IO_BYTES as usize] = [0; MAX_IO_BYTES as usize];

/// Mounts it on a directory, with a file of `size` bytes, and serves it until it is unmounted.
///
/// # Errors
/// When it cannot be mounted, which needs root.
pub fn serve(on: &Path, size: u64) -> Result<()> {
    let fuse = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").context("opening /dev/fuse")?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={MAX_IO_BYTES}",
        fuse.as_raw_fd()
    );
    let data = std::ffi::CString::new(data)?;
    let flags = rustix::mount::MountFlags::NODEV | rustix::mount::MountFlags::NOSUID;
    rustix::mount::mount("null", on, "fuse.null", flags, data.as_c_str())
        .with_context(|| format!("mounting on {}", on.display()))?;
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(std::thread::available_parallelism().map_or(4, |n| n.get().clamp(4, 8)));
    config.clone_fd = true;
    let session = fuser::Session::from_fd(Null { size }, OwnedFd::from(fuse), SessionACL::All, config)?;
    session.spawn()?.join().context("serving")
}

struct Null {
    size: u64,
}

impl Null {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let root = ino == ROOT;
        FileAttr {
            ino,
            size: if root { 0 } else { self.size },
            blocks: if root { 0 } else { self.size / 512 },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if root { FileType::Directory } else { FileType::RegularFile },
            perm: if root { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Null {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS] {
            config.add_capabilities(flag).map_err(|_| io::Error::other(format!("this kernel has no {flag:?}")))?;
        }
        config.set_max_write(MAX_IO_BYTES).map_err(|_| io::Error::other("the kernel takes no writes of 1 MiB"))?;
        config.set_max_background(MAX_BACKGROUND).map_err(|_| io::Error::other("the kernel takes no 512 at once"))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == ROOT && name == FILE {
            reply.entry(&NO_TIME, &self.attributes(ONLY_FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&NO_TIME, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), OPEN_FLAGS);
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
        let length = self.size.saturating_sub(offset).min(u64::from(size)).min(u64::from(MAX_IO_BYTES));
        reply.data(&ZEROS[..length as usize]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
