//! Whether data and checksums of an object agree `[R5]`.
//!
//! A block that does not verify never comes to look sound by a change of a part of it: what is left of it makes its new checksum
//! a wrong one again. What is noticed by the way is remembered for whoever repairs.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use mortar_proto::checksum::{self, HOLE, Sum};
use mortar_proto::interval::IntervalSet;
use mortar_proto::{BLOCK_BYTES, ByteRange, Ino, REGION_BYTES};

use super::{BLOCK, Object, Objects, Result, SUM, StoreError, read_all};

/// What is remembered until it is taken, at most (I9); the rest is found again.
const MAX_NOTICED: usize = 4096;
/// Sums that are looked at together, in bytes.
const SUMS_AT_ONCE: usize = 64 << 10;

/// Something that does not agree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Noticed {
    /// A block of a file.
    Block(Ino, u64),
    /// A file that is shorter than its checksums say.
    Size(Ino),
}

/// The sum as it was stored, little-endian.
fn sum_at(sums: &[u8], index: usize) -> Sum {
    sums.get(index * SUM..(index + 1) * SUM).and_then(|s| s.try_into().ok()).map_or(HOLE, Sum::from_le_bytes)
}

/// A sum that a block of this sum does not match.
fn wrong(sum: Sum) -> Sum {
    if sum ^ 1 == HOLE { sum ^ 3 } else { sum ^ 1 }
}

impl Objects {
    /// The numbers of the blocks in `range` that do not match their sums.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn unsound(&self, ino: Ino, range: ByteRange) -> Result<Vec<u64>> {
        let mut found = Vec::new();
        let Some(object) = self.object(ino, false)? else { return Ok(found) };
        let blocks = range.to_blocks();
        let end = blocks.end.min(object.end()?);
        let mut at = blocks.start;
        while at < end {
            let piece = ByteRange { start: at, end: ((at / REGION_BYTES + 1) * REGION_BYTES).min(end) };
            let _held = object.shared(piece);
            found.extend(object.unsound(piece)?);
            at = piece.end;
        }
        Ok(found)
    }

    /// As [`Objects::unsound`], of a range of at most a region, read from the disk itself whatever the page cache has; and the
    /// bytes of blocks that are no holes. What is corrupt there is taken out of the page cache, so that everybody sees it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn unsound_on_disk(&self, ino: Ino, range: ByteRange) -> Result<(Vec<u64>, u64)> {
        let Some(object) = self.object(ino, false)? else { return Ok((Vec::new(), 0)) };
        let _held = object.shared(range);
        let piece = ByteRange { start: range.start, end: range.end.min(object.end()?) };
        if piece.is_empty() {
            return Ok((Vec::new(), 0));
        }
        let mut buffer = vec![0; (range.len() + BLOCK_BYTES) as usize];
        let skip = buffer.as_ptr().align_offset(BLOCK);
        let Some(aligned) = buffer.get_mut(skip..skip + range.len() as usize) else { return Ok((Vec::new(), 0)) };
        let path = self.data_path(ino);
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
        let read = match direct.as_ref().map(|file| (file, is_same(file, &object.data))) {
            Ok((file, true)) => read_direct(file, aligned, piece.start),
            // A file system that cannot, or an object whose name leads elsewhere now: what is open counts.
            _ => read_all(&object.data, aligned, piece.start),
        };
        match read {
            Err(e) if e.errno() == libc::EINVAL => read_all(&object.data, aligned, piece.start)?,
            read => read?,
        }
        let size = object.size()?.clamp(piece.start, piece.end);
        let data = aligned.get(..(size - piece.start) as usize).unwrap_or_default();
        let blocks = object.unsound_of(piece, data)?;
        if !blocks.is_empty() {
            let length = std::num::NonZeroU64::new(range.len());
            // If it stays there, it is found again when it has gone.
            let _ = rustix::fs::fadvise(&object.data, range.start, length, rustix::fs::Advice::DontNeed);
        }
        let sums = object.sums_of(piece.start / BLOCK_BYTES, piece.to_blocks().len() as usize / BLOCK)?;
        let used = sums.chunks_exact(SUM).filter(|sum| sum.iter().any(|b| *b != 0)).count();
        Ok((blocks, used as u64 * BLOCK_BYTES))
    }

    /// The first byte from `offset` on of a block that has data or a sum.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn next_used(&self, ino: Ino, offset: u64) -> Result<Option<u64>> {
        let Some(object) = self.object(ino, false)? else { return Ok(None) };
        let data = object.seek(offset, false)?;
        let sums = match rustix::fs::seek(&object.sums, rustix::fs::SeekFrom::Data(offset / BLOCK_BYTES * SUM as u64)) {
            Ok(at) => Some((at / SUM as u64 * BLOCK_BYTES).max(offset)),
            Err(rustix::io::Errno::NXIO) => None,
            Err(e) => return Err(StoreError::new("seeking in sums", e)),
        };
        Ok(data.into_iter().chain(sums).min())
    }

    /// The name of an object that is open is gone, or leads to something else: gives it its name back if it is gone and another
    /// name (that of the volume's tree) still keeps it. Tells whether it is as it should be now.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep_name(&self, ino: Ino) -> Result<bool> {
        let Some(object) = self.object(ino, false)? else { return Ok(true) };
        let path = self.data_path(ino);
        match File::open(&path) {
            Ok(found) => Ok(is_same(&found, &object.data)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let open = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&object.data));
                let follow = rustix::fs::AtFlags::SYMLINK_FOLLOW;
                Ok(rustix::fs::linkat(rustix::fs::CWD, open, rustix::fs::CWD, &path, follow).is_ok())
            }
            Err(e) => Err(StoreError::new(format!("looking for {}", path.display()), e)),
        }
    }

    /// Regions that the file had data in and that lie past its end now: it was cut off, or its data made anew, behind our back.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn cut_off(&self, ino: Ino) -> Result<IntervalSet> {
        let Some(object) = self.object(ino, false)? else { return Ok(IntervalSet::new()) };
        object.cut_off(usize::MAX)
    }

    /// It is shorter than its sums say; told of, if so.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn is_cut_off(&self, ino: Ino) -> Result<bool> {
        let Some(object) = self.object(ino, false)? else { return Ok(false) };
        let is_cut_off = !object.cut_off(1)?.is_empty();
        if is_cut_off {
            self.notice(Noticed::Size(ino));
        }
        Ok(is_cut_off)
    }

    /// What the content of a block should have been is not known here, but its sum is: from now on the block does not verify,
    /// unless it is that content.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn disown(&self, ino: Ino, block: u64, sum: Sum) -> Result<()> {
        let object = self.made(ino)?;
        let start = block * BLOCK_BYTES;
        let _held = object.exclusive(ByteRange::at(start, BLOCK_BYTES));
        object.dirty.store(true, std::sync::atomic::Ordering::Release);
        let sum = if sum == HOLE { wrong(checksum::of_block(&object.block(start)?)) } else { sum };
        object.put_sums(block, &sum.to_le_bytes())
    }

    /// What was noticed since this was called last.
    pub fn take_noticed(&self) -> BTreeSet<Noticed> {
        std::mem::take(&mut *self.noticed.lock())
    }

    pub(super) fn notice(&self, what: Noticed) {
        let mut noticed = self.noticed.lock();
        if noticed.len() < MAX_NOTICED {
            noticed.insert(what);
        }
    }
}

impl Object {
    /// Where data and sums both have ended.
    fn end(&self) -> Result<u64> {
        Ok(self.size()?.max(self.sums_len()? / SUM as u64 * BLOCK_BYTES))
    }

    fn sums_len(&self) -> Result<u64> {
        self.sums.metadata().map(|m| m.len()).map_err(|e| StoreError::new("looking at sums", e))
    }

    /// Of a piece of at most a region, held by the caller.
    fn unsound(&self, piece: ByteRange) -> Result<Vec<u64>> {
        let got = (self.size()?.clamp(piece.start, piece.end) - piece.start) as usize;
        let mut data = vec![0; got];
        read_all(&self.data, &mut data, piece.start)?;
        self.unsound_of(piece, &data)
    }

    /// Of a piece of which this is the data, as far as there is any.
    fn unsound_of(&self, piece: ByteRange, data: &[u8]) -> Result<Vec<u64>> {
        let first = piece.start / BLOCK_BYTES;
        let count = piece.to_blocks().len() as usize / BLOCK;
        let sums = self.sums_of(first, count)?;
        let is_unsound = |index: &usize| {
            let sum = sum_at(&sums, *index);
            match data.get(index * BLOCK..data.len().min((index + 1) * BLOCK)) {
                Some(block) if !block.is_empty() => !checksum::matches(block, sum),
                _ => sum != HOLE,
            }
        };
        Ok((0..count).filter(is_unsound).map(|index| first + index as u64).collect())
    }

    /// A block matches its sum, as it is.
    pub(super) fn is_sound(&self, start: u64) -> Result<bool> {
        Ok(checksum::matches(&self.block(start)?, sum_at(&self.sums_of(start / BLOCK_BYTES, 1)?, 0)))
    }

    /// The edge blocks of a range of which only a part is about to change, and whether each of them is sound.
    pub(super) fn edges(&self, edges: &[u64]) -> Result<Vec<(u64, bool)>> {
        let mut found: Vec<(u64, bool)> = Vec::new();
        for block in edges.iter().filter(|e| !e.is_multiple_of(BLOCK_BYTES)).map(|e| e / BLOCK_BYTES) {
            if !found.iter().any(|(b, _)| *b == block) {
                found.push((block, self.is_sound(block * BLOCK_BYTES)?));
            }
        }
        Ok(found)
    }

    /// The sum of a block of which a part was changed.
    pub(super) fn sum_of_changed(block: &[u8], was_sound: bool) -> Sum {
        let sum = checksum::of_block(block);
        if was_sound { sum } else { wrong(sum) }
    }

    /// Up to `limit` pieces of sums that have some past the end of the data, as regions.
    fn cut_off(&self, limit: usize) -> Result<IntervalSet> {
        // A change of size holds all stripes; one of them keeps it out.
        let _held = self.shared(ByteRange::at(0, 1));
        let mut regions = IntervalSet::new();
        let end = self.sums_len()?;
        let mut at = self.size()?.div_ceil(BLOCK_BYTES) * SUM as u64;
        let mut sums = vec![0; SUMS_AT_ONCE];
        while at < end && regions.iter().count() < limit {
            at = match rustix::fs::seek(&self.sums, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => data.max(at) / SUM as u64 * SUM as u64,
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(StoreError::new("seeking in sums", e)),
            };
            sums.fill(0);
            read_all(&self.sums, &mut sums, at)?;
            for index in (0..SUMS_AT_ONCE / SUM).filter(|index| sum_at(&sums, *index) != HOLE) {
                let region = (at / SUM as u64 + index as u64) * BLOCK_BYTES / REGION_BYTES;
                regions.insert(region..region + 1);
            }
            at += SUMS_AT_ONCE as u64;
        }
        Ok(regions)
    }
}

/// Both are open on the same file.
fn is_same(a: &File, b: &File) -> bool {
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Reads whole blocks past the page cache, as far as the file goes.
fn read_direct(file: &File, buffer: &mut [u8], at: u64) -> Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(read) => {
                done += read;
                // Less than whole blocks come only at the end.
                if read == 0 || !read.is_multiple_of(BLOCK) {
                    return Ok(());
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(StoreError::new("reading past the page cache", e)),
        }
    }
    Ok(())
}

/// The regions that blocks are in.
#[must_use]
pub fn regions_of(blocks: &[u64]) -> IntervalSet {
    let region = |block: &u64| block * BLOCK_BYTES / REGION_BYTES;
    blocks.iter().map(region).map(|r: u64| -> Range<u64> { r..r + 1 }).collect()
}
