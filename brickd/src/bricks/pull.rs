//! Taking a range from another brick: compare sums, fetch what differs, keep holes holes `[S2]`, `[W2]`. Nothing is taken that does
//! not verify, and what is corrupt here counts as different, whatever its sum says `[R5]`.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::Ordering;

use mortar_proto::checksum::{self, HOLE, Sum};
use mortar_proto::config::{BrickState, Slot};
use mortar_proto::replica::{Bookkeeping, Stamp};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{BLOCK_BYTES, ByteRange, EXTENT_BYTES, Ino};

use super::brick::Brick;
use super::requests::{Answer, behind, failed, store_failed};
use super::run::{book, changed_data};

/// What a source answers whose file was cut off, and a puller when a copy of `[W2]` does not verify at its source.
pub(super) const CORRUPT: i32 = libc::EBADMSG;

fn unreachable(why: impl std::fmt::Display) -> Answer {
    failed(libc::EHOSTUNREACH, format!("the source cannot be reached: {why}"), false)
}

/// Why a source gives nothing.
enum Refused {
    /// It is corrupt there.
    Corrupt,
    /// Anything else, as the answer to who ordered the pull.
    Otherwise(Answer),
}

/// Asks a source; what it refuses for its numbers is asked again later.
fn ask(brick: &Brick, from: Slot, ino: Ino, stamp: &Stamp, what: What) -> Result<(Outcome, Vec<u8>), Refused> {
    let otherwise = |answer| Err(Refused::Otherwise(answer));
    match brick.ask_peer(from, ino, stamp, what) {
        Ok((Some(Outcome::Stale(_) | Outcome::Behind(_)), _)) => otherwise(behind()),
        Ok((Some(Outcome::Failed(f)), _)) if f.errno == CORRUPT.unsigned_abs() && !f.brick => Err(Refused::Corrupt),
        Ok((Some(Outcome::Failed(f)), _)) => otherwise(unreachable(f.why)),
        Ok((Some(outcome), payload)) => Ok((outcome, payload)),
        Ok((None, _)) => otherwise(unreachable("its answer says nothing")),
        Err(e) => otherwise(unreachable(e)),
    }
}

fn sums_from(bytes: &[u8]) -> Vec<Sum> {
    bytes.chunks_exact(8).map(|s| s.try_into().map_or(HOLE, Sum::from_le_bytes)).collect()
}

/// Makes the range (or the size) here as it is at the source. Tells whether the source is busy with applications `[S5]`.
pub(super) fn pull(brick: &Brick, ino: Ino, stamp: &Stamp, pull: &data::Pull) -> Result<bool, Answer> {
    let Some(from) = Slot::ALL.get(pull.from as usize).copied().filter(|s| *s != brick.slot) else {
        return Err(failed(libc::EINVAL, "a pull from a slot that is none, or from itself", false));
    };
    let mut sources = vec![from];
    // What is in doubt is right at its source only.
    if !pull.recovery {
        let replica = brick.replica.lock();
        let others = replica.configuration().map(|c| c.in_sync().without(from).without(brick.slot));
        sources.extend(others.unwrap_or_default().iter());
    }
    let range = ByteRange { start: pull.start, end: pull.end }.to_blocks();
    let asked = What::Sums(data::Sums { start: range.start, end: range.end });
    for source in &sources {
        let (sums, size, busy) = match ask(brick, *source, ino, stamp, asked.clone()) {
            Ok((Outcome::Sums(theirs), _)) => (sums_from(&theirs.sums), theirs.size, theirs.busy),
            Ok(_) => return Err(unreachable("it answered something else")),
            Err(Refused::Corrupt) => continue,
            Err(Refused::Otherwise(answer)) => return Err(answer),
        };
        if pull.size {
            return take_size(brick, ino, size).map(|()| busy);
        }
        let copy = Copy { brick, ino, stamp, sources: &sources, is_recovery: pull.recovery, range, size };
        return copy.compare_and_fetch(&sums).map(|()| busy);
    }
    if pull.recovery { Err(corrupt_source(range)) } else { nothing_sound(brick) }
}

fn corrupt_source(range: ByteRange) -> Answer {
    failed(CORRUPT, format!("the source is corrupt at {}", range.start), false)
}

/// The file is cut off on every brick that could be a source. One that has nothing of its own to serve meanwhile waits for them.
fn nothing_sound(brick: &Brick) -> Result<bool, Answer> {
    if brick.replica.lock().state() == BrickState::InSync { Ok(false) } else { Err(behind()) }
}

fn take_size(brick: &Brick, ino: Ino, size: u64) -> Result<(), Answer> {
    let own = brick.objects.stat(ino).map_err(|e| store_failed(brick, &e))?.size;
    // [W7] What is cut off is a mutation like any other.
    let cut = changed_data(brick, ino, ByteRange { start: size.min(own), end: own })?;
    book(brick, ino, &Bookkeeping { intents: cut.units(EXTENT_BYTES).collect(), missed: Vec::new() })?;
    brick.objects.truncate(ino, size).map(drop).map_err(|e| store_failed(brick, &e))
}

/// A block as a source has it, verified: its bytes, fewer than a block at the end of the file; `None`: a hole.
type Block = Option<Vec<u8>>;

struct Copy<'a> {
    brick: &'a Brick,
    ino: Ino,
    stamp: &'a Stamp,
    /// The one that was compared with, and others that have the same.
    sources: &'a [Slot],
    is_recovery: bool,
    range: ByteRange,
    /// The size at the source. Past its end it has nothing; what is here is cut off when the size is made equal.
    size: u64,
}

impl Copy<'_> {
    fn at(&self, block: usize) -> u64 {
        self.range.start + block as u64 * BLOCK_BYTES
    }

    fn compare_and_fetch(&self, theirs: &[Sum]) -> Result<(), Answer> {
        let refused = |e| store_failed(self.brick, &e);
        let count = (self.range.len() / BLOCK_BYTES) as usize;
        let (own, own_size) = self.brick.objects.sums(self.ino, self.range).map_err(refused)?;
        let own = sums_from(&own);
        if theirs.len() < count || own.len() < count {
            return Err(unreachable("it sent too few sums"));
        }
        let first = self.range.start / BLOCK_BYTES;
        let unsound = self.brick.objects.unsound(self.ino, self.range).map_err(refused)?;
        let unsound: BTreeSet<usize> = unsound.into_iter().map(|block| (block - first) as usize).collect();
        let their = |block: usize| if self.at(block) < self.size { theirs[block] } else { HOLE };
        // A block that one of the two files ends in may have equal sums and yet another length: it is fetched.
        let ends_here = |block: usize| their(block) != HOLE && self.at(block + 1) > self.size.min(own_size);
        let differs = |block: usize| their(block) != own[block] || unsound.contains(&block) || ends_here(block);
        let mut mended = Vec::new();
        let mut block = 0;
        while block < count {
            let start = block;
            block += 1;
            if !differs(start) {
                continue;
            }
            while block < count && differs(block) {
                block += 1;
            }
            for (lost, got) in self.fetch(start..block)? {
                if got {
                    mended.extend(unsound.get(&lost).map(|b| first + *b as u64));
                } else {
                    self.lost(lost, theirs[lost], unsound.contains(&lost))?;
                }
            }
        }
        if !mended.is_empty() {
            self.brick.mended(self.ino, &mended);
        }
        Ok(())
    }

    /// Takes blocks from whoever has them sound. Tells of each whether it came.
    fn fetch(&self, blocks: Range<usize>) -> Result<Vec<(usize, bool)>, Answer> {
        let mut got: Vec<Option<Block>> = vec![None; blocks.len()];
        for (turn, source) in self.sources.iter().enumerate() {
            if got.iter().all(Option::is_some) {
                break;
            }
            match self.read(*source, &blocks, &mut got) {
                Err(answer) if turn == 0 => return Err(answer),
                _ => {}
            }
        }
        if self.is_recovery && got.iter().any(Option::is_none) {
            return Err(corrupt_source(ByteRange { start: self.at(blocks.start), end: self.at(blocks.end) }));
        }
        self.put(blocks.start, &got)?;
        Ok(blocks.zip(got.iter().map(Option::is_some)).collect())
    }

    /// Takes what is missing from a source, as far as it verifies there; tells the source of what does not.
    fn read(&self, source: Slot, blocks: &Range<usize>, got: &mut [Option<Block>]) -> Result<(), Answer> {
        let piece = ByteRange { start: self.at(blocks.start), end: self.at(blocks.end) };
        let read = What::Read(data::Read { offset: piece.start, length: piece.len() as u32 });
        let (reply, bytes) = match ask(self.brick, source, self.ino, self.stamp, read) {
            Ok((Outcome::Read(reply), bytes)) => (reply, bytes),
            Ok(_) => return Err(unreachable("it answered something else")),
            Err(Refused::Corrupt) => return Ok(()),
            Err(Refused::Otherwise(answer)) => return Err(answer),
        };
        if bytes.len() as u64 != reply.size.clamp(piece.start, piece.end) - piece.start {
            return Err(unreachable("it sent another length than its own"));
        }
        let sums = sums_from(&reply.sums);
        let mut is_corrupt = false;
        for (index, slot) in got.iter_mut().enumerate().filter(|(_, slot)| slot.is_none()) {
            let at = index * BLOCK_BYTES as usize;
            let block = bytes.get(at..bytes.len().min(at + BLOCK_BYTES as usize)).unwrap_or_default();
            let sum = sums.get(index).copied().unwrap_or(HOLE);
            if !checksum::matches(block, sum) {
                is_corrupt = true;
            } else if sum == HOLE {
                *slot = Some(None);
            } else {
                *slot = Some(Some(block.to_vec()));
            }
        }
        if is_corrupt {
            tracing::warn!(brick = %self.brick.id, ino = %self.ino, "brick {} has corrupt data at {}", source.0, piece.start);
            let report = What::Report(data::Report { start: piece.start, end: piece.end, compare: false });
            // If it does not hear of it now, it is found again.
            let _ = self.brick.ask_peer(source, self.ino, self.stamp, report);
        }
        Ok(())
    }

    /// Writes what came, neighbours together.
    fn put(&self, first: usize, got: &[Option<Block>]) -> Result<(), Answer> {
        let refused = |e| store_failed(self.brick, &e);
        let mut index = 0;
        while index < got.len() {
            let start = index;
            index += 1;
            let Some(block) = &got[start] else { continue };
            let Some(bytes) = block else {
                while index < got.len() && got[index] == Some(None) {
                    index += 1;
                }
                let hole = ByteRange { start: self.at(first + start), end: self.at(first + index) };
                self.brick.objects.put(self.ino, hole, None).map_err(refused)?;
                continue;
            };
            let mut bytes = bytes.clone();
            while let Some(Some(Some(next))) = got.get(index) {
                bytes.extend_from_slice(next);
                index += 1;
            }
            let piece = ByteRange { start: self.at(first + start), end: self.at(first + index) };
            self.brick.objects.put(self.ino, piece, Some(&bytes)).map_err(refused)?;
            self.brick.repaired_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// No source has this block sound. An `InSync` brick keeps its own, which may be the last good one. A `Syncing` brick cannot
    /// know whether its own is old: it takes the sum, by which old content does not verify, here as little as anywhere.
    fn lost(&self, block: usize, sum: Sum, is_unsound: bool) -> Result<(), Answer> {
        if self.brick.replica.lock().state() == BrickState::InSync {
            return Ok(());
        }
        let refused = |e| store_failed(self.brick, &e);
        let start = self.at(block);
        if !is_unsound {
            self.brick.objects.disown(self.ino, start / BLOCK_BYTES, sum).map_err(refused)?;
        }
        self.brick.look_at(self.ino, ByteRange::at(start, BLOCK_BYTES)).map(drop).map_err(refused)
    }
}
