//! The fuser adapter: decodes the kernel's requests, hands them to [`Fs`], replies. No logic.
//!
//! Requests about names run as tasks, so a slow metadata log never holds a thread that reads requests. Reads, writes and
//! flushes go straight to the volume, and its receiving thread replies. A reply that is dropped, by a panic for instance, is
//! answered with `EIO` by fuser.

use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};
use mortar_proto::Ino;
use mortar_proto::metadata::NewNode;

use crate::fs::attributes::{Change, Time, nanoseconds_of};
use crate::fs::data::Write;
use crate::fs::names::Place;
use crate::fs::xattrs::{Fitted, fit};
use crate::fs::{Caller, Errno, Fs, Node};
use crate::mountpoint::MAX_IO_BYTES;

/// A mounted connection to the kernel.
pub type Session = fuser::Session<Adapter>;

/// Threads that read the kernel's requests: each copies the data of writes, so there are some on any machine.
const MIN_THREADS: usize = 4;
/// Beyond these the volume is the limit.
const MAX_THREADS: usize = 8;
/// Asynchronous requests that the kernel sends before it makes callers wait: several guests at depth 128.
const MAX_BACKGROUND: u16 = 512;
/// Nothing may be remembered that another mount can change.
const NO_TIME: Duration = Duration::ZERO;
const GENERATION: Generation = Generation(0);
/// `st_blksize` and `f_bsize`.
const BLOCK_BYTES: u32 = 4096;
const NAME_BYTES: u32 = 255;
/// Requests reach the bricks as they are, and writes of one handle do not wait for each other.
const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// Agrees with the kernel on how to talk.
///
/// # Errors
/// When the kernel and fuser do not agree.
pub fn session(fs: Arc<Fs>, kernel: OwnedFd) -> io::Result<Session> {
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    config.n_threads = Some(cpus.clamp(MIN_THREADS, MAX_THREADS));
    config.clone_fd = true;
    fuser::Session::from_fd(Adapter { fs }, kernel, SessionACL::All, config)
}

/// fuser's view of a file system.
pub struct Adapter {
    fs: Arc<Fs>,
}

impl Adapter {
    /// Runs `work` as a task and lets `reply` answer with what it returns.
    fn run<F, T>(&self, work: impl FnOnce(Arc<Fs>) -> F, reply: impl FnOnce(&Fs, Result<T, Errno>) + Send + 'static)
    where
        F: Future<Output = Result<T, Errno>> + Send + 'static,
        T: Send + 'static,
    {
        let fs = Arc::clone(&self.fs);
        let work = work(Arc::clone(&fs));
        self.fs.runtime().spawn(async move {
            let result = work.await;
            reply(&fs, result);
        });
    }

    fn entry<F>(&self, work: impl FnOnce(Arc<Fs>) -> F, reply: ReplyEntry)
    where
        F: Future<Output = Result<Node, Errno>> + Send + 'static,
    {
        self.run(work, |fs, result| match result {
            Ok(node) => {
                fs.known.told(node.attributes.ino, node.attributes.set);
                reply.entry(&NO_TIME, &attr(fs, &node), GENERATION);
            }
            Err(e) => reply.error(errno(e)),
        });
    }

    fn empty<F>(&self, work: impl FnOnce(Arc<Fs>) -> F, reply: ReplyEmpty)
    where
        F: Future<Output = Result<(), Errno>> + Send + 'static,
    {
        self.run(work, |_, result| empty(reply, result));
    }

    fn attributes<F>(&self, work: impl FnOnce(Arc<Fs>) -> F, reply: ReplyAttr)
    where
        F: Future<Output = Result<Node, Errno>> + Send + 'static,
    {
        self.run(work, |fs, result| match result {
            Ok(node) => reply.attr(&NO_TIME, &attr(fs, &node)),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn xattr<F>(&self, size: u32, work: impl FnOnce(Arc<Fs>) -> F, reply: ReplyXattr)
    where
        F: Future<Output = Result<Vec<u8>, Errno>> + Send + 'static,
    {
        self.run(work, move |_, result| match result.and_then(|value| fit(value, size)) {
            Ok(Fitted::Length(length)) => reply.size(length),
            Ok(Fitted::Value(value)) => reply.data(&value),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn ino(&self, number: INodeNo) -> Ino {
        self.fs.numbers.inode(number.0)
    }

    fn place(&self, parent: INodeNo, name: &OsStr) -> Place {
        Place { parent: self.ino(parent), name: name.as_bytes().to_vec() }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::info!("this kernel has no {flag:?}");
            }
        }
        let limits = [
            config.set_max_write(MAX_IO_BYTES).map(|_| ()).map_err(|_| "max_write"),
            config.set_max_background(MAX_BACKGROUND).map(|_| ()).map_err(|_| "max_background"),
        ];
        for limit in limits.into_iter().filter_map(Result::err) {
            tracing::warn!("the kernel does not take the {limit} that is wanted");
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let place = self.place(parent, name);
        self.entry(|fs| async move { fs.lookup(place).await }, reply);
    }

    fn forget(&self, _: &Request, ino: INodeNo, lookups: u64) {
        self.fs.known.forget(self.ino(ino), lookups);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let ino = self.ino(ino);
        self.attributes(|fs| async move { fs.getattr(ino).await }, reply);
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (caller, ino) = (caller(request), self.ino(ino));
        let mode = mode.map(|m| m & 0o7777);
        let change = Change { mode, uid, gid, size, atime: atime.map(time), mtime: mtime.map(time) };
        self.attributes(|fs| async move { fs.setattr(caller, ino, change).await }, reply);
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let ino = self.ino(ino);
        self.run(
            |fs| async move { fs.read_link(ino).await },
            |_, result| match result {
                Ok(target) => reply.data(&target),
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (caller, place) = (caller(request), self.place(parent, name));
        let node = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => NewNode::File,
            format => NewNode::Special { format, rdev },
        };
        self.entry(|fs| async move { fs.make(caller, place, node, mode).await }, reply);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let (caller, place) = (caller(request), self.place(parent, name));
        self.entry(|fs| async move { fs.make(caller, place, NewNode::Directory, mode).await }, reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (caller, place) = (caller(request), self.place(parent, name));
        let node = NewNode::Symlink(target.as_os_str().as_bytes().to_vec());
        self.entry(|fs| async move { fs.make(caller, place, node, 0o777).await }, reply);
    }

    fn link(&self, _: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (ino, place) = (self.ino(ino), self.place(parent, name));
        self.entry(|fs| async move { fs.link(ino, place).await }, reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let place = self.place(parent, name);
        self.empty(|fs| async move { fs.unlink(place).await }, reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let place = self.place(parent, name);
        self.empty(|fs| async move { fs.rmdir(place).await }, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (self.place(parent, name), self.place(new_parent, new_name));
        self.empty(move |fs| async move { fs.rename(from, to, flags.bits()).await }, reply);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, place) = (caller(request), self.place(parent, name));
        let exclusive = flags & libc::O_EXCL != 0;
        self.run(
            move |fs| async move { fs.create(caller, place, mode, exclusive).await },
            |fs, result| match result {
                Ok((node, handle)) => {
                    fs.known.told(node.attributes.ino, node.attributes.set);
                    reply.created(&NO_TIME, &attr(fs, &node), GENERATION, FileHandle(handle), OPEN_FLAGS);
                }
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (caller, ino) = (caller(request), self.ino(ino));
        self.run(
            move |fs| async move { fs.open(caller, ino, flags.0).await },
            |_, result| match result {
                Ok(handle) => reply.opened(FileHandle(handle), OPEN_FLAGS),
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn read(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded(|| {
            self.fs.read(handle.0, offset, size, flags.0, |result| match result {
                Ok(data) => reply.data(&data),
                Err(e) => reply.error(errno(e)),
            });
        });
    }

    fn write(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guarded(|| {
            let length = data.len() as u32;
            let write = Write {
                handle: handle.0,
                offset,
                // The buffer is the reading thread's, which goes on to the next request.
                data: Bytes::copy_from_slice(data),
                flags: flags.0,
                kill: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
                mapped: write_flags.contains(WriteFlags::FUSE_WRITE_CACHE),
            };
            self.fs.write(write, move |result| match result {
                Ok(()) => reply.written(length),
                Err(e) => reply.error(errno(e)),
            });
        });
    }

    /// close(2): nothing is cached that would have to be written.
    fn flush(&self, _: &Request, _ino: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        guarded(|| self.fs.release(handle.0));
        reply.ok();
    }

    fn fsync(&self, _: &Request, _ino: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        guarded(|| self.fs.flush(handle.0, |result| empty(reply, result)));
    }

    /// Names are durable when they are acknowledged.
    fn fsyncdir(&self, _: &Request, _ino: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let ino = self.ino(ino);
        self.run(
            move |fs| async move { fs.list(ino, offset).await },
            |fs, result| match result {
                Ok(entries) => {
                    for entry in entries {
                        let number = INodeNo(fs.numbers.kernel_number(entry.attributes.ino));
                        let kind = kind(entry.attributes.mode);
                        if reply.add(number, entry.cookie, kind, OsStr::from_bytes(&entry.name)) {
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn statfs(&self, _: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.run(
            |fs| async move { fs.space().await },
            |_, result| match result {
                Ok(space) => {
                    let block = u64::from(BLOCK_BYTES);
                    let (total, free) = (space.total_bytes / block, space.free_bytes / block);
                    // Inodes have no limit but the room for them.
                    reply.statfs(total, free, free, space.files + free, free, BLOCK_BYTES, NAME_BYTES, BLOCK_BYTES);
                }
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn setxattr(
        &self,
        _: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (ino, name, value) = (self.ino(ino), name.as_bytes().to_vec(), value.to_vec());
        self.empty(move |fs| async move { fs.setxattr(ino, &name, value, flags).await }, reply);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (ino, name) = (self.ino(ino), name.as_bytes().to_vec());
        self.xattr(size, |fs| async move { fs.getxattr(ino, &name).await }, reply);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let (caller, ino) = (caller(request), self.ino(ino));
        self.xattr(size, |fs| async move { fs.listxattr(caller, ino).await }, reply);
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (ino, name) = (self.ino(ino), name.as_bytes().to_vec());
        self.empty(|fs| async move { fs.removexattr(ino, &name).await }, reply);
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let caller = caller(request);
        self.empty(move |fs| async move { fs.allocate(caller, handle.0, offset, length, mode).await }, reply);
    }

    fn lseek(&self, _: &Request, _ino: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.run(
            move |fs| async move { fs.seek(handle.0, offset, whence).await },
            |_, result| match result {
                Ok(found) => reply.offset(found),
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    /// QEMU, libvirt and qemu-img try ioctls and go on without.
    fn ioctl(
        &self,
        _: &Request,
        _ino: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    /// The kernel checks permissions (`default_permissions`) and does not ask again.
    fn access(&self, _: &Request, _ino: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    /// The kernel does not ask again, and copies by reading and writing.
    fn copy_file_range(
        &self,
        _: &Request,
        _ino_in: INodeNo,
        _: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _: FileHandle,
        _offset_out: u64,
        _len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    /// Files are always ready; the kernel does not ask again.
    fn poll(
        &self,
        _: &Request,
        _ino: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }
}

/// A panic must not take a thread away that reads requests: those left would be too few, and at last none.
fn guarded(work: impl FnOnce()) {
    // The reply that `work` took with it has answered EIO by then.
    let _ = catch_unwind(AssertUnwindSafe(work));
}

fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

fn errno(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e.0)
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

fn time(time: TimeOrNow) -> Time {
    match time {
        TimeOrNow::Now => Time::Now,
        TimeOrNow::SpecificTime(at) => Time::At(match UNIX_EPOCH.duration_since(at) {
            // fuser 0.18 takes the nanoseconds of a time before 1970 away from its second instead of adding them.
            Ok(before) if before.subsec_nanos() > 0 => {
                let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                i64::from(before.subsec_nanos()).saturating_sub(seconds.saturating_mul(1_000_000_000))
            }
            _ => nanoseconds_of(at),
        }),
    }
}

fn system_time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    if ns < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
}

fn kind(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn attr(fs: &Fs, node: &Node) -> FileAttr {
    let known = &node.attributes;
    let (size, blocks, mtime_ns) = match node.data {
        Some(data) => (data.size, data.blocks, data.mtime_ns),
        None => (known.size, known.size.div_ceil(512), known.mtime_ns),
    };
    FileAttr {
        ino: INodeNo(fs.numbers.kernel_number(known.ino)),
        size,
        blocks,
        atime: system_time(known.atime_ns),
        mtime: system_time(mtime_ns),
        // Writing changes it too, which the log does not hear of.
        ctime: system_time(if node.data.is_some() { known.ctime_ns.max(mtime_ns) } else { known.ctime_ns }),
        crtime: UNIX_EPOCH,
        kind: kind(known.mode),
        perm: (known.mode & 0o7777) as u16,
        nlink: known.links,
        uid: known.uid,
        gid: known.gid,
        rdev: known.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_come_through_as_the_kernel_meant_them() {
        assert_eq!(time(TimeOrNow::Now), Time::Now);
        assert_eq!(time(TimeOrNow::SpecificTime(UNIX_EPOCH + Duration::new(3, 7))), Time::At(3_000_000_007));
        // -2 s + 800 ms, which fuser hands over as -2 s - 800 ms.
        assert_eq!(time(TimeOrNow::SpecificTime(UNIX_EPOCH - Duration::new(2, 800_000_000))), Time::At(-1_200_000_000));
        assert_eq!(time(TimeOrNow::SpecificTime(UNIX_EPOCH - Duration::new(2, 0))), Time::At(-2_000_000_000));
        assert_eq!(system_time(-1_200_000_000), UNIX_EPOCH - Duration::new(1, 200_000_000));
        assert_eq!(system_time(5), UNIX_EPOCH + Duration::from_nanos(5));
    }

    #[test]
    fn every_type_of_file_is_told() {
        for (format, expected) in [
            (libc::S_IFREG, FileType::RegularFile),
            (libc::S_IFDIR, FileType::Directory),
            (libc::S_IFLNK, FileType::Symlink),
            (libc::S_IFIFO, FileType::NamedPipe),
            (libc::S_IFSOCK, FileType::Socket),
        ] {
            assert_eq!(kind(format | 0o644), expected);
        }
    }
}
