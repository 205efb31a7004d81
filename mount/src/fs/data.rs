//! The bytes of files: open, read, write, truncate at open, allocate, seek, flush, release.
//!
//! The common read and write go straight to the volume, and the volume's thread that receives the last brick's answer calls
//! `done`: no task, no hop between threads. Whatever has to do something first (an append, a set-user-id bit, `O_DSYNC`, a
//! misaligned `O_DIRECT`) runs as a task.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use mortar_proto::{Ino, MAX_IO_BYTES};

use super::handles::Handle;
use super::{Caller, Errno, Fs, answered};

/// What offsets and lengths are multiples of under `O_DIRECT`: the sector size that QEMU then finds by probing.
const SECTOR_BYTES: u64 = 512;
/// The kernel cuts a request into pieces of at most so many pages; memory that begins within a page makes them up to a
/// page shorter than [`MAX_IO_BYTES`].
const SHORTEST_CUT: u64 = MAX_IO_BYTES - 4096;
/// How long the other piece of a request that the kernel cut may be on its way to us, by another thread.
const CUT_WAIT: Duration = Duration::from_millis(20);

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// A write as the kernel sends it.
#[derive(Debug)]
pub struct Write {
    /// Which handle.
    pub handle: u64,
    /// Where.
    pub offset: u64,
    /// What.
    pub data: Bytes,
    /// The handle's flags at this moment, as in open(2).
    pub flags: i32,
    /// The writer may not keep set-user-id bits.
    pub kill: bool,
    /// It comes from memory that a process has mapped; then `offset` is where, whatever the flags say.
    pub mapped: bool,
}

/// Whether `O_DIRECT` allows a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Alignment {
    Fits,
    /// The first piece of a request that the kernel has cut: whole pages, less what the memory lacks at its beginning.
    Head,
    /// What may be a further piece of such a request.
    Tail,
    Wrong,
}

fn alignment(offset: u64, length: u64) -> Alignment {
    let start = offset.is_multiple_of(SECTOR_BYTES);
    let end = offset.saturating_add(length).is_multiple_of(SECTOR_BYTES);
    match (start, end) {
        (true, true) => Alignment::Fits,
        (_, false) if length > SHORTEST_CUT => Alignment::Head,
        (false, true) => Alignment::Tail,
        (_, false) => Alignment::Wrong,
    }
}

impl Fs {
    fn handle(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.handles.get(number).ok_or(Errno::BADF)
    }

    /// Opens a file; `flags` as for open(2).
    pub async fn open(self: &Arc<Self>, caller: Caller, ino: Ino, flags: i32) -> Result<u64, Errno> {
        let open = self.claim(self.file(ino).await?, false).await?;
        let file = open.file;
        let number = self.handles.insert(Arc::clone(&open));
        if flags & libc::O_TRUNC == 0 {
            return Ok(number);
        }
        let truncated = async {
            self.drop_privileges(&open, caller.uid != 0).await?;
            answered(|done| self.volume.truncate(file, 0, done)).await
        };
        let result = truncated.await;
        if result.is_err() {
            self.release(number);
        }
        result.map(|()| number)
    }

    /// Closes a handle.
    pub fn release(&self, number: u64) {
        if let Some(file) = self.handles.release(number) {
            self.volume.forget(file);
        }
    }

    /// Reads; short at the end of the file.
    pub fn read(
        self: &Arc<Self>,
        number: u64,
        offset: u64,
        length: u32,
        flags: i32,
        done: impl FnOnce(Result<Vec<u8>, Errno>) + Send + 'static,
    ) {
        let handle = match self.handle(number) {
            Ok(handle) => handle,
            Err(errno) => return done(Err(errno)),
        };
        let file = handle.open.file;
        if flags & libc::O_DIRECT == 0 || alignment(offset, length.into()) == Alignment::Fits {
            return self.volume.read(file, offset, length, move |result| done(result.map_err(Errno::from)));
        }
        let fs = Arc::clone(self);
        self.runtime.spawn(async move {
            done(match fs.check_alignment(&handle, offset, length.into()).await {
                Ok(()) => answered(|done| fs.volume.read(file, offset, length, done)).await,
                Err(errno) => Err(errno),
            });
        });
    }

    /// Writes.
    pub fn write(self: &Arc<Self>, write: Write, done: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        let length = write.data.len() as u64;
        let handle = match self.handle(write.handle) {
            Ok(_) if length > MAX_IO_BYTES => return done(Err(Errno::INVAL)),
            Ok(handle) => handle,
            Err(errno) => return done(Err(errno)),
        };
        let special =
            if write.mapped { write.flags & libc::O_DSYNC } else { write.flags & (libc::O_APPEND | libc::O_DSYNC) };
        let aligned =
            write.mapped || write.flags & libc::O_DIRECT == 0 || alignment(write.offset, length) == Alignment::Fits;
        if special == 0 && aligned && !handle.open.privileges.must_look(write.kill) {
            let file = handle.open.file;
            return self.volume.write(file, write.offset, write.data, move |r| done(r.map_err(Errno::from)));
        }
        let fs = Arc::clone(self);
        self.runtime.spawn(async move { done(fs.write_with_care(&handle, write).await) });
    }

    async fn write_with_care(&self, handle: &Handle, write: Write) -> Result<(), Errno> {
        let open = &handle.open;
        let file = open.file;
        let appends = !write.mapped && write.flags & libc::O_APPEND != 0;
        if !write.mapped && !appends && write.flags & libc::O_DIRECT != 0 {
            self.check_alignment(handle, write.offset, write.data.len() as u64).await?;
        }
        if appends && write.flags & libc::O_DIRECT != 0 && !(write.data.len() as u64).is_multiple_of(SECTOR_BYTES) {
            return Err(Errno::INVAL);
        }
        if open.privileges.must_look(write.kill) {
            self.drop_privileges(open, write.kill).await?;
        }
        if appends {
            // The kernel sends the end of the file as it remembers it; another mount may have moved it.
            let _end = open.append.lock().await;
            let end = self.stat(file).await?.size;
            answered(|done| self.volume.write(file, end, write.data, done)).await?;
        } else {
            answered(|done| self.volume.write(file, write.offset, write.data, done)).await?;
        }
        if write.flags & libc::O_DSYNC != 0 {
            answered(|done| self.volume.flush(file, done)).await?;
        }
        Ok(())
    }

    /// `EINVAL` for what is no multiple of a sector, except for the pieces of a request that the kernel has cut because
    /// the memory it comes from or goes to begins within a page: memory alignment never matters.
    async fn check_alignment(&self, handle: &Handle, offset: u64, length: u64) -> Result<(), Errno> {
        match alignment(offset, length) {
            Alignment::Fits => Ok(()),
            Alignment::Head => {
                handle.was_cut.store(true, Ordering::Release);
                Ok(())
            }
            Alignment::Tail => {
                if !handle.was_cut.load(Ordering::Acquire) {
                    tokio::time::sleep(CUT_WAIT).await;
                }
                if handle.was_cut.load(Ordering::Acquire) { Ok(()) } else { Err(Errno::INVAL) }
            }
            Alignment::Wrong => Err(Errno::INVAL),
        }
    }

    /// fallocate(2).
    pub async fn allocate(
        &self,
        caller: Caller,
        number: u64,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<(), Errno> {
        let handle = self.handle(number)?;
        const KEEP_PUNCH: i32 = PUNCH_HOLE | KEEP_SIZE;
        const KEEP_ZERO: i32 = ZERO_RANGE | KEEP_SIZE;
        if !matches!(mode, 0 | KEEP_SIZE | KEEP_PUNCH | ZERO_RANGE | KEEP_ZERO) {
            return Err(Errno::OPNOTSUPP);
        }
        let mode = u32::try_from(mode).map_err(|_| Errno::OPNOTSUPP)?;
        let kill = caller.uid != 0;
        if handle.open.privileges.must_look(kill) {
            self.drop_privileges(&handle.open, kill).await?;
        }
        answered(|done| self.volume.allocate(handle.open.file, offset, length, mode, done)).await
    }

    /// Makes everything acknowledged durable.
    pub fn flush(&self, number: u64, done: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        match self.handle(number) {
            Ok(handle) => self.volume.flush(handle.open.file, move |result| done(result.map_err(Errno::from))),
            Err(errno) => done(Err(errno)),
        }
    }

    /// lseek(2) with `SEEK_DATA` and `SEEK_HOLE`.
    pub async fn seek(&self, number: u64, offset: i64, whence: i32) -> Result<i64, Errno> {
        let handle = self.handle(number)?;
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return Err(Errno::INVAL),
        };
        let offset = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
        let found = answered(|done| self.volume.seek(handle.open.file, offset, hole, done)).await?;
        found.and_then(|at| i64::try_from(at).ok()).ok_or(Errno::NXIO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn under_o_direct_only_whole_sectors_fit() {
        assert_eq!(alignment(0, 512), Alignment::Fits);
        assert_eq!(alignment(1024, 4096), Alignment::Fits);
        for (offset, length) in [(0, 1), (0, 511), (1, 512), (256, 512), (512, 100)] {
            assert_eq!(alignment(offset, length), Alignment::Wrong, "{offset}+{length}");
        }
    }

    #[test]
    fn what_the_kernel_cuts_out_of_unaligned_memory_is_told_from_what_a_program_asked() {
        // 2 MiB from memory that begins 100 bytes into a page: 256 pages less 100 bytes, and the rest.
        let head = (1 << 20) - 100;
        assert_eq!(alignment(4096, head), Alignment::Head);
        assert_eq!(alignment(4096 + head, 1 << 20), Alignment::Head);
        assert_eq!(alignment(4096 + head, (2 << 20) - head), Alignment::Tail);
        assert_eq!(alignment(1, 511), Alignment::Tail);
    }
}
