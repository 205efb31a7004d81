//! Objects and their checksums.
//!
//! Data and sums of a block are read and changed together, under the lock of the stripe that the block is in; a change of
//! size holds all stripes. Everything goes through the page cache; `flush` makes it durable, data before sums.

mod verify;

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mortar_proto::checksum::{self, HOLE};
use mortar_proto::{BLOCK_BYTES, ByteRange, Ino, REGION_BYTES};
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

pub use verify::{Noticed, regions_of};

const BLOCK: usize = BLOCK_BYTES as usize;
const SUM: usize = 8;
const STRIPES: usize = 64;
/// Objects that are kept open.
const MAX_OPEN: usize = 2048;

/// Why the store refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct StoreError {
    what: String,
    source: io::Error,
}

impl StoreError {
    fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { what: what.into(), source: source.into() }
    }
    /// The `errno`.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(libc::EIO)
    }
    /// The disk is broken, not merely full or asked for something it cannot do `[E4]`.
    #[must_use]
    pub fn is_disk_failure(&self) -> bool {
        !matches!(
            self.errno(),
            libc::ENOSPC
                | libc::EDQUOT
                | libc::EINVAL
                | libc::EOPNOTSUPP
                | libc::EFBIG
                | libc::ENXIO
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOMEM
        )
    }
}

type Result<T> = std::result::Result<T, StoreError>;

/// What a mutation did to the size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Changed {
    /// In bytes, before.
    pub old_size: u64,
    /// In bytes, after.
    pub new_size: u64,
}

impl Changed {
    /// The size is another.
    #[must_use]
    pub fn sized(&self) -> bool {
        self.old_size != self.new_size
    }
}

/// What is known of an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DataStat {
    /// In bytes.
    pub size: u64,
    /// Allocated, in units of 512 bytes.
    pub blocks: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
}

struct Object {
    data: File,
    sums: File,
    stripes: [RwLock<()>; STRIPES],
    /// Written since its last flush: it stays open, so that an error of writing back is not missed.
    dirty: AtomicBool,
}

/// All objects of a brick.
pub struct Objects {
    root: PathBuf,
    open: RwLock<HashMap<Ino, Arc<Object>>>,
    noticed: Mutex<BTreeSet<Noticed>>,
}

fn shard(ino: Ino) -> String {
    format!("{:02x}", ino.0 & 0xff)
}

impl Objects {
    /// The objects below `BRICK/.mortar`.
    #[must_use]
    pub fn new(own: &Path) -> Self {
        Self { root: own.to_owned(), open: RwLock::default(), noticed: Mutex::default() }
    }

    /// Where an object's data is.
    #[must_use]
    pub fn data_path(&self, ino: Ino) -> PathBuf {
        self.root.join("objects").join(shard(ino)).join(format!("{:x}", ino.0))
    }
    fn sums_path(&self, ino: Ino) -> PathBuf {
        self.root.join("sums").join(shard(ino)).join(format!("{:x}", ino.0))
    }

    /// The object; `None` when there is none and `create` is false: it reads as an empty file.
    fn object(&self, ino: Ino, create: bool) -> Result<Option<Arc<Object>>> {
        if let Some(object) = self.open.read().get(&ino) {
            return Ok(Some(Arc::clone(object)));
        }
        let mut open = self.open.write();
        if let Some(object) = open.get(&ino) {
            return Ok(Some(Arc::clone(object)));
        }
        let opened = |path: PathBuf, create: bool| -> Result<Option<File>> {
            let open = |create| OpenOptions::new().read(true).write(true).create(create).truncate(false).open(&path);
            match open(create) {
                Ok(file) => Ok(Some(file)),
                Err(e) if e.kind() == io::ErrorKind::NotFound && !create => Ok(None),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    if let Some(parent) = path.parent() {
                        fs::create_dir_all(parent)
                            .map_err(|e| StoreError::new(format!("making {}", parent.display()), e))?;
                    }
                    open(true).map(Some).map_err(|e| StoreError::new(format!("opening {}", path.display()), e))
                }
                Err(e) => Err(StoreError::new(format!("opening {}", path.display()), e)),
            }
        };
        // Data that is gone while its sums are not was lost: it is made anew, empty, and its sums tell what it lacks.
        let create = create || fs::metadata(self.sums_path(ino)).is_ok_and(|m| m.len() > 0);
        let Some(data) = opened(self.data_path(ino), create)? else { return Ok(None) };
        // A missing sums file beside data is made: its blocks count as holes until they are looked at.
        let Some(sums) = opened(self.sums_path(ino), true)? else { return Ok(None) };
        if open.len() >= MAX_OPEN {
            let victims: Vec<Ino> = open
                .iter()
                .filter(|(_, o)| Arc::strong_count(o) == 1 && !o.dirty.load(Ordering::Acquire))
                .map(|(ino, _)| *ino)
                .take(MAX_OPEN / 8)
                .collect();
            for victim in victims {
                open.remove(&victim);
            }
        }
        let object = Arc::new(Object {
            data,
            sums,
            stripes: std::array::from_fn(|_| RwLock::new(())),
            dirty: AtomicBool::new(false),
        });
        open.insert(ino, Arc::clone(&object));
        Ok(Some(object))
    }

    fn made(&self, ino: Ino) -> Result<Arc<Object>> {
        self.object(ino, true)?.ok_or_else(|| StoreError::new(format!("object {ino:?}"), Errno::IO))
    }

    /// Makes sure that the object is there, so that it can be linked to.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn ensure(&self, ino: Ino) -> Result<()> {
        self.made(ino).map(drop)
    }

    /// An object that is gone, though its checksums are there, while the file that its name leads to has no other name: that file is
    /// the object. Should it be something else, it does not match the checksums.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn adopt(&self, ino: Ino, name: &Path) -> Result<()> {
        let data = self.data_path(ino);
        let is_gone = data.symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        let is_orphan = || name.symlink_metadata().is_ok_and(|m| m.is_file() && m.nlink() == 1);
        if is_gone && self.sums_path(ino).exists() && is_orphan() {
            fs::hard_link(name, &data).map_err(|e| StoreError::new(format!("linking {}", data.display()), e))?;
        }
        Ok(())
    }

    /// Reads whole blocks: appends the data, clipped at the end of the file, to `out`, and the sums of the blocks it
    /// touches to `sums`. With `nowait`, gives `None` when that would wait for the disk. Returns the size.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn read(
        &self,
        ino: Ino,
        range: ByteRange,
        nowait: bool,
        out: &mut Vec<u8>,
        sums: &mut Vec<u8>,
    ) -> Result<Option<u64>> {
        let Some(object) = self.object(ino, false)? else { return Ok(Some(0)) };
        let _held = object.shared(range);
        let size = object.size()?;
        let end = range.end.min(size);
        if range.start >= end {
            return Ok(Some(size));
        }
        let at = out.len();
        let length = (end - range.start) as usize;
        out.resize(at + length, 0);
        let mut got = 0;
        while got < length {
            let flags = if nowait { ReadWriteFlags::NOWAIT } else { ReadWriteFlags::empty() };
            let mut parts = [io::IoSliceMut::new(&mut out[at + got..])];
            match rustix::io::preadv2(&object.data, &mut parts, range.start + got as u64, flags) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(Errno::AGAIN) if nowait => {
                    out.truncate(at);
                    return Ok(None);
                }
                Err(Errno::INTR) => {}
                Err(e) => {
                    out.truncate(at);
                    return Err(StoreError::new(format!("reading object {ino:?}"), e));
                }
            }
        }
        let first = range.start / BLOCK_BYTES;
        let count = length.div_ceil(BLOCK);
        sums.extend_from_slice(&object.sums_of(first, count)?);
        Ok(Some(size))
    }

    /// Writes. `given`: the sums of the whole blocks, in order; those of partial blocks are made here.
    ///
    /// # Errors
    /// When the disk refuses; some of it may have been written then.
    pub fn write(&self, ino: Ino, offset: u64, data: &[u8], given: &[u8]) -> Result<Changed> {
        let object = self.made(ino)?;
        let range = ByteRange::at(offset, data.len() as u64);
        let _held = object.exclusive(range);
        object.dirty.store(true, Ordering::Release);
        let old_size = object.size()?;
        let blocks = range.to_blocks();
        let count = (blocks.len() / BLOCK_BYTES) as usize;
        let whole_start = offset.next_multiple_of(BLOCK_BYTES);
        let whole_end = range.end / BLOCK_BYTES * BLOCK_BYTES;
        let whole = whole_end.saturating_sub(whole_start) / BLOCK_BYTES;
        let sums = if whole == count as u64 && given.len() == count * SUM {
            given.to_vec()
        } else {
            let mut sums = Vec::with_capacity(count * SUM);
            let mut given = given.chunks_exact(SUM);
            for index in 0..count as u64 {
                let start = blocks.start + index * BLOCK_BYTES;
                let block = ByteRange::at(start, BLOCK_BYTES);
                let (from, to) = (offset.max(block.start), range.end.min(block.end));
                let new = &data[(from - offset) as usize..(to - offset) as usize];
                let sum = if to - from == BLOCK_BYTES {
                    given
                        .next()
                        .and_then(|s| s.try_into().ok())
                        .map_or_else(|| checksum::of_block(new), u64::from_le_bytes)
                } else {
                    let was_sound = object.is_sound(start)?;
                    if !was_sound {
                        self.notice(Noticed::Block(ino, start / BLOCK_BYTES));
                    }
                    let mut merged = object.block(start)?;
                    merged[(from - start) as usize..(to - start) as usize].copy_from_slice(new);
                    Object::sum_of_changed(&merged, was_sound)
                };
                sums.extend_from_slice(&sum.to_le_bytes());
            }
            sums
        };
        if let Err(e) = object.data.write_all_at(data, offset) {
            // Nobody knows how much of it was written; it is in doubt, and no corruption.
            let _ = object.resum(blocks);
            return Err(StoreError::new(format!("writing object {ino:?}"), e));
        }
        object.put_sums(blocks.start / BLOCK_BYTES, &sums)?;
        Ok(Changed { old_size, new_size: old_size.max(range.end) })
    }

    /// Sets the size.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn truncate(&self, ino: Ino, size: u64) -> Result<Changed> {
        let object = self.made(ino)?;
        let _held = object.exclusive(ByteRange::ALL);
        object.dirty.store(true, Ordering::Release);
        let old_size = object.size()?;
        let edges = if size < old_size { object.edges(&[size])? } else { Vec::new() };
        object.data.set_len(size).map_err(|e| StoreError::new(format!("truncating object {ino:?}"), e))?;
        if size < old_size {
            object
                .sums
                .set_len(size.div_ceil(BLOCK_BYTES) * SUM as u64)
                .map_err(|e| StoreError::new(format!("truncating the sums of object {ino:?}"), e))?;
            self.resum_edges(ino, &object, &edges)?;
        }
        Ok(Changed { old_size, new_size: size })
    }

    /// `fallocate(2)` with mode 0, keep, punch and keep, zero, zero and keep.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for other modes; when the disk refuses.
    pub fn allocate(&self, ino: Ino, offset: u64, length: u64, mode: u32) -> Result<Changed> {
        let flags = FallocateFlags::from_bits_retain(mode);
        if !Self::takes_mode(mode) {
            return Err(StoreError::new(format!("fallocate mode {mode:#x}"), Errno::OPNOTSUPP));
        }
        let object = self.made(ino)?;
        let range = ByteRange::at(offset, length);
        let keeps = flags.contains(FallocateFlags::KEEP_SIZE);
        let _held = object.exclusive(if keeps { range } else { ByteRange::ALL });
        object.dirty.store(true, Ordering::Release);
        let old_size = object.size()?;
        let zeroes = flags.intersects(FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE);
        let zeroed = ByteRange { start: range.start, end: range.end.min(old_size.next_multiple_of(BLOCK_BYTES)) };
        let edges = if zeroes && !zeroed.is_empty() { object.edges(&[zeroed.start, zeroed.end])? } else { Vec::new() };
        rustix::fs::fallocate(&object.data, flags, offset, length)
            .map_err(|e| StoreError::new(format!("allocating in object {ino:?}"), e))?;
        let new_size = object.size()?;
        if zeroes {
            object.zero_sums(zeroed)?;
            self.resum_edges(ino, &object, &edges)?;
        }
        Ok(Changed { old_size, new_size })
    }

    /// One of the modes that [`Objects::allocate`] takes.
    #[must_use]
    pub fn takes_mode(mode: u32) -> bool {
        let (keep, punch, zero) =
            (FallocateFlags::KEEP_SIZE.bits(), FallocateFlags::PUNCH_HOLE.bits(), FallocateFlags::ZERO_RANGE.bits());
        [0, keep, punch | keep, zero, zero | keep].contains(&mode)
    }

    /// Sets the modification time.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn set_mtime(&self, ino: Ino, mtime_ns: i64) -> Result<()> {
        let object = self.made(ino)?;
        let omit = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
        let time = rustix::fs::Timespec {
            tv_sec: mtime_ns.div_euclid(1_000_000_000),
            tv_nsec: mtime_ns.rem_euclid(1_000_000_000),
        };
        rustix::fs::futimens(&object.data, &rustix::fs::Timestamps { last_access: omit, last_modification: time })
            .map_err(|e| StoreError::new(format!("setting the time of object {ino:?}"), e))
    }

    /// Size, blocks, time.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn stat(&self, ino: Ino) -> Result<DataStat> {
        let Some(object) = self.object(ino, false)? else { return Ok(DataStat::default()) };
        let stat = object.data.metadata().map_err(|e| StoreError::new(format!("looking at object {ino:?}"), e))?;
        Ok(DataStat {
            size: stat.len(),
            blocks: stat.blocks(),
            mtime_ns: stat.mtime().saturating_mul(1_000_000_000).saturating_add(stat.mtime_nsec()),
        })
    }

    /// `SEEK_DATA`, or with `hole` `SEEK_HOLE`; `None`: nothing further.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn seek(&self, ino: Ino, offset: u64, hole: bool) -> Result<Option<u64>> {
        let Some(object) = self.object(ino, false)? else { return Ok(None) };
        object.seek(offset, hole)
    }

    /// Makes an object durable: data, then sums `[W8]`.
    ///
    /// # Errors
    /// When the disk refuses; the brick is then failed for good, for what was lost cannot be known.
    pub fn flush(&self, ino: Ino) -> Result<()> {
        let Some(object) = self.object(ino, false)? else { return Ok(()) };
        object.dirty.store(false, Ordering::Release);
        let flushed = object.data.sync_data().and_then(|()| object.sums.sync_data());
        flushed.map_err(|e| {
            object.dirty.store(true, Ordering::Release);
            StoreError::new(format!("flushing object {ino:?}"), e)
        })
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn flush_all(&self) -> Result<()> {
        let dirty: Vec<Ino> =
            self.open.read().iter().filter(|(_, o)| o.dirty.load(Ordering::Acquire)).map(|(ino, _)| *ino).collect();
        for ino in dirty {
            self.flush(ino)?;
        }
        let root = File::open(&self.root).map_err(|e| StoreError::new("opening the brick", e))?;
        rustix::fs::syncfs(&root).map_err(|e| StoreError::new("flushing the brick", e))
    }

    /// For a brick that pulls: the sums of the blocks of `range`, and the size.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sums(&self, ino: Ino, range: ByteRange) -> Result<(Vec<u8>, u64)> {
        let blocks = range.to_blocks();
        let count = (blocks.len() / BLOCK_BYTES) as usize;
        let Some(object) = self.object(ino, false)? else { return Ok((vec![0; count * SUM], 0)) };
        let _held = object.shared(range);
        Ok((object.sums_of(blocks.start / BLOCK_BYTES, count)?, object.size()?))
    }

    /// Makes the sums of `range` from its data `[S3]`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn recompute_sums(&self, ino: Ino, range: ByteRange) -> Result<()> {
        let Some(object) = self.object(ino, false)? else { return Ok(()) };
        let _held = object.exclusive(range);
        object.dirty.store(true, Ordering::Release);
        object.resum(range)
    }

    /// Writes what can be read of `range` once more: the kernel takes for written what it once failed to write `[W8]`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write_again(&self, ino: Ino, range: ByteRange) -> Result<()> {
        let Some(object) = self.object(ino, false)? else { return Ok(()) };
        let _held = object.exclusive(range);
        object.dirty.store(true, Ordering::Release);
        let end = range.end.min(object.size()?);
        let mut piece = vec![0; REGION_BYTES as usize];
        let mut at = range.start;
        while at < end {
            let Some(start) = object.seek(at, false)?.filter(|start| *start < end) else { break };
            let stop = object.seek(start, true)?.unwrap_or(end).min(end).min(start + REGION_BYTES);
            let piece = &mut piece[..(stop - start) as usize];
            read_all(&object.data, piece, start)?;
            object
                .data
                .write_all_at(piece, start)
                .map_err(|e| StoreError::new(format!("writing object {ino:?} again"), e))?;
            at = stop;
        }
        Ok(())
    }

    /// Makes the sums of blocks anew of which a part was changed.
    fn resum_edges(&self, ino: Ino, object: &Object, edges: &[(u64, bool)]) -> Result<()> {
        for (block, was_sound) in edges {
            if !was_sound {
                self.notice(Noticed::Block(ino, *block));
            }
            object.resum_block(*block, *was_sound)?;
        }
        Ok(())
    }

    /// For repair: makes a block-aligned range exactly `data` (which may be shorter than the range only at the end of the
    /// file), or, with `None`, a hole. Never shrinks.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn put(&self, ino: Ino, range: ByteRange, data: Option<&[u8]>) -> Result<()> {
        let object = self.made(ino)?;
        let _held = object.exclusive(range);
        object.dirty.store(true, Ordering::Release);
        match data {
            Some(data) => {
                object
                    .data
                    .write_all_at(data, range.start)
                    .map_err(|e| StoreError::new(format!("repairing object {ino:?}"), e))?;
                let mut sums = Vec::new();
                for start in (range.start..range.start + data.len() as u64).step_by(BLOCK) {
                    sums.extend_from_slice(&checksum::of_block(&object.block(start)?).to_le_bytes());
                }
                object.put_sums(range.start / BLOCK_BYTES, &sums)
            }
            None => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let end = range.end.min(object.size()?.next_multiple_of(BLOCK_BYTES));
                if range.start >= end {
                    return Ok(());
                }
                rustix::fs::fallocate(&object.data, flags, range.start, end - range.start)
                    .map_err(|e| StoreError::new(format!("punching a hole into object {ino:?}"), e))?;
                object.zero_sums(ByteRange { start: range.start, end })
            }
        }
    }

    /// Forgets an object.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, ino: Ino) -> Result<()> {
        self.open.write().remove(&ino);
        for path in [self.data_path(ino), self.sums_path(ino)] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::new(format!("removing {}", path.display()), e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// All objects on the disk.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn inodes(&self) -> Result<Vec<Ino>> {
        let listing = |e| StoreError::new("listing the objects", e);
        let mut found = Vec::new();
        let objects = self.root.join("objects");
        for shard in fs::read_dir(&objects).map_err(listing)? {
            for object in fs::read_dir(shard.map_err(listing)?.path()).map_err(listing)? {
                let name = object.map_err(listing)?.file_name();
                if let Some(ino) = name.to_str().and_then(|n| u64::from_str_radix(n, 16).ok()) {
                    found.push(Ino(ino));
                }
            }
        }
        Ok(found)
    }

    /// Bytes of the file system that the brick is on: all, and free.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn space(&self) -> Result<(u64, u64)> {
        let stat =
            rustix::fs::statvfs(&self.root).map_err(|e| StoreError::new("looking at the brick's file system", e))?;
        Ok((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
    }

    /// Writes a little and makes it durable, to see whether the disk works `[E4]`.
    ///
    /// # Errors
    /// When it does not.
    pub fn probe(&self) -> Result<()> {
        let failed = |e| StoreError::new("probing the disk", e);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.root.join("probe"))
            .map_err(failed)?;
        file.write_all_at(b"mortar\n", 0).map_err(failed)?;
        file.sync_data().map_err(failed)
    }
}

enum Held<'a> {
    #[allow(dead_code, reason = "held for its drop")]
    Shared(Vec<RwLockReadGuard<'a, ()>>),
    #[allow(dead_code, reason = "held for its drop")]
    Exclusive(Vec<RwLockWriteGuard<'a, ()>>),
}

impl Object {
    fn stripes(range: ByteRange) -> Vec<usize> {
        let regions = range.units(REGION_BYTES);
        if regions.end - regions.start >= STRIPES as u64 {
            return (0..STRIPES).collect();
        }
        let mut stripes: Vec<usize> = regions.map(|r| (r % STRIPES as u64) as usize).collect();
        // In one order for all, so that two that need the same stripes cannot wait for each other.
        stripes.sort_unstable();
        stripes.dedup();
        stripes
    }
    fn shared(&self, range: ByteRange) -> Held<'_> {
        Held::Shared(Self::stripes(range.to_blocks()).into_iter().map(|s| self.stripes[s].read()).collect())
    }
    fn exclusive(&self, range: ByteRange) -> Held<'_> {
        Held::Exclusive(Self::stripes(range.to_blocks()).into_iter().map(|s| self.stripes[s].write()).collect())
    }

    fn size(&self) -> Result<u64> {
        self.data.metadata().map(|m| m.len()).map_err(|e| StoreError::new("looking at an object", e))
    }

    /// A block, with zeroes past the end of the file.
    fn block(&self, start: u64) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        read_all(&self.data, &mut block, start)?;
        Ok(block)
    }

    fn sums_of(&self, first: u64, count: usize) -> Result<Vec<u8>> {
        let mut sums = vec![0; count * SUM];
        read_all(&self.sums, &mut sums, first * SUM as u64)?;
        Ok(sums)
    }

    fn put_sums(&self, first: u64, sums: &[u8]) -> Result<()> {
        self.sums.write_all_at(sums, first * SUM as u64).map_err(|e| StoreError::new("writing sums", e))
    }

    /// A block's sum from its data, unless it is a hole.
    fn resum_block(&self, block: u64, was_sound: bool) -> Result<()> {
        let stored = self.sums_of(block, 1)?;
        if stored.iter().any(|b| *b != 0) {
            let sum = Self::sum_of_changed(&self.block(block * BLOCK_BYTES)?, was_sound);
            self.put_sums(block, &sum.to_le_bytes())?;
        }
        Ok(())
    }

    /// The sums of a range, held by the caller, from its data. What lies past the end of the data has none.
    fn resum(&self, range: ByteRange) -> Result<()> {
        let end = range.end.min(self.size()?.next_multiple_of(BLOCK_BYTES));
        let mut at = range.to_blocks().start;
        while at < end {
            let stop = (at / REGION_BYTES + 1) * REGION_BYTES;
            let piece = ByteRange { start: at, end: stop.min(end) };
            let data = self.seek(at, false)?.map_or(u64::MAX, |d| d / BLOCK_BYTES * BLOCK_BYTES);
            let mut sums = Vec::new();
            for start in (piece.start..piece.end).step_by(BLOCK) {
                let sum = if start < data { HOLE } else { checksum::of_block(&self.block(start)?) };
                sums.extend_from_slice(&sum.to_le_bytes());
            }
            self.put_sums(piece.start / BLOCK_BYTES, &sums)?;
            at = piece.end;
        }
        self.zero_sums(ByteRange { start: end.max(range.to_blocks().start), end: range.to_blocks().end })
    }

    /// The range reads as zeroes now: whole blocks are holes; the sums of those at its edges are left to the caller.
    fn zero_sums(&self, range: ByteRange) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let whole =
            ByteRange { start: range.start.next_multiple_of(BLOCK_BYTES), end: range.end / BLOCK_BYTES * BLOCK_BYTES };
        if !whole.is_empty() {
            let at = whole.start / BLOCK_BYTES * SUM as u64;
            let length = whole.len() / BLOCK_BYTES * SUM as u64;
            let end = self.sums.metadata().map(|m| m.len()).map_err(|e| StoreError::new("looking at sums", e))?;
            if at < end {
                let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                let zeroed = rustix::fs::fallocate(&self.sums, flags, at, length.min(end - at));
                if let Err(e) = zeroed {
                    // Not every file system can; zeroes can always be written.
                    if e != Errno::OPNOTSUPP {
                        return Err(StoreError::new("zeroing sums", e));
                    }
                    let zeroes = vec![0; length.min(end - at) as usize];
                    self.sums.write_all_at(&zeroes, at).map_err(|e| StoreError::new("zeroing sums", e))?;
                }
            }
        }
        Ok(())
    }

    fn seek(&self, offset: u64, hole: bool) -> Result<Option<u64>> {
        let to = if hole { SeekFrom::Hole(offset) } else { SeekFrom::Data(offset) };
        match rustix::fs::seek(&self.data, to) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(StoreError::new("seeking in an object", e)),
        }
    }
}

/// Reads as much as there is; what lies past the end stays as it was.
fn read_all(file: &File, mut buffer: &mut [u8], mut at: u64) -> Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                buffer = &mut buffer[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(StoreError::new("reading", e)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Random(u64);
    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }
    }

    /// Whatever is done to an object, it reads as a plain vector does, and every block's sum matches.
    #[test]
    fn an_object_reads_as_a_plain_vector_does_and_its_sums_match() {
        let dir = tempfile::tempdir().unwrap();
        let objects = Objects::new(dir.path());
        let (ino, mut model) = (Ino(0x1234), Vec::<u8>::new());
        let mut random = Random(11);
        for step in 0..1500_u64 {
            let offset = random.below(200_000);
            let length = 1 + random.below(30_000);
            let end = (offset + length) as usize;
            match random.below(8) {
                0..=3 => {
                    let data: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
                    objects.write(ino, offset, &data, &[]).unwrap();
                    if model.len() < end {
                        model.resize(end, 0);
                    }
                    model[offset as usize..end].copy_from_slice(&data);
                }
                4 => {
                    objects.truncate(ino, offset).unwrap();
                    model.resize(offset as usize, 0);
                }
                5 => {
                    let mode = [3, 0x10, 0x11, 0, 1][random.below(5) as usize];
                    let changed = objects.allocate(ino, offset, length, mode);
                    match changed {
                        Err(e) if e.errno() == libc::EOPNOTSUPP => {}
                        changed => {
                            changed.unwrap();
                            if mode & 1 == 0 && model.len() < end {
                                model.resize(end, 0);
                            }
                            if mode & 0x12 != 0 {
                                let (from, to) = (model.len().min(offset as usize), model.len().min(end));
                                model[from..to].fill(0);
                            }
                        }
                    }
                }
                6 => {
                    let range = ByteRange::at(offset, length).to_blocks();
                    objects.put(ino, range, None).unwrap();
                    let (from, to) = (model.len().min(range.start as usize), model.len().min(range.end as usize));
                    model[from..to].fill(0);
                }
                _ => objects.recompute_sums(ino, ByteRange::at(offset, length)).unwrap(),
            }
            let (mut data, mut sums) = (Vec::new(), Vec::new());
            let size = objects.read(ino, ByteRange { start: 0, end: 1 << 20 }, false, &mut data, &mut sums).unwrap();
            assert_eq!(size, Some(model.len() as u64), "step {step}");
            assert!(data == model, "step {step}: contents differ");
            for (i, (block, sum)) in data.chunks(BLOCK).zip(sums.chunks_exact(SUM)).enumerate() {
                let sum = u64::from_le_bytes(sum.try_into().unwrap());
                assert!(checksum::matches(block, sum), "step {step}: block {i}");
            }
        }
        objects.flush_all().unwrap();
        assert_eq!(objects.inodes().unwrap(), [ino]);
        objects.remove(ino).unwrap();
        assert_eq!(objects.stat(ino).unwrap(), DataStat::default());
    }
}
