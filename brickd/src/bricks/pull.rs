//! Taking a range from another brick: compare sums, fetch what differs, keep holes holes `[S2]`, `[W2]`.

use std::ops::Range;
use std::sync::atomic::Ordering;

use mortar_proto::checksum::{self, HOLE, Sum};
use mortar_proto::config::Slot;
use mortar_proto::replica::{Bookkeeping, Stamp};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{BLOCK_BYTES, ByteRange, EXTENT_BYTES, Ino};

use super::brick::Brick;
use super::requests::{Answer, behind, failed, store_failed};
use super::run::{book, changed_data};

fn unreachable(why: impl std::fmt::Display) -> Answer {
    failed(libc::EHOSTUNREACH, format!("the source cannot be reached: {why}"), false)
}

/// Asks the source; what it refuses for its numbers is asked again later.
fn ask(brick: &Brick, from: Slot, ino: Ino, stamp: &Stamp, what: What) -> Result<(Outcome, Vec<u8>), Answer> {
    match brick.ask_peer(from, ino, stamp, what) {
        Ok((Some(Outcome::Stale(_) | Outcome::Behind(_)), _)) => Err(behind()),
        Ok((Some(Outcome::Failed(f)), _)) => Err(unreachable(f.why)),
        Ok((Some(outcome), payload)) => Ok((outcome, payload)),
        Ok((None, _)) => Err(unreachable("its answer says nothing")),
        Err(e) => Err(unreachable(e)),
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
    let range = ByteRange { start: pull.start, end: pull.end }.to_blocks();
    let (outcome, _) = ask(brick, from, ino, stamp, What::Sums(data::Sums { start: range.start, end: range.end }))?;
    let Outcome::Sums(theirs) = outcome else { return Err(unreachable("it answered something else")) };
    if pull.size {
        return take_size(brick, ino, theirs.size).map(|()| theirs.busy);
    }
    let copy = Copy { brick, ino, stamp, from, is_recovery: pull.recovery, range, size: theirs.size };
    copy.compare_and_fetch(&sums_from(&theirs.sums)).map(|()| theirs.busy)
}

fn take_size(brick: &Brick, ino: Ino, size: u64) -> Result<(), Answer> {
    let own = brick.objects.stat(ino).map_err(|e| store_failed(brick, &e))?.size;
    // [W7] What is cut off is a mutation like any other.
    let cut = changed_data(brick, ino, ByteRange { start: size.min(own), end: own })?;
    book(brick, ino, &Bookkeeping { intents: cut.units(EXTENT_BYTES).collect(), missed: Vec::new() })?;
    brick.objects.truncate(ino, size).map(drop).map_err(|e| store_failed(brick, &e))
}

struct Copy<'a> {
    brick: &'a Brick,
    ino: Ino,
    stamp: &'a Stamp,
    from: Slot,
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
        let count = (self.range.len() / BLOCK_BYTES) as usize;
        let (own, own_size) =
            self.brick.objects.sums(self.ino, self.range).map_err(|e| store_failed(self.brick, &e))?;
        let own = sums_from(&own);
        if theirs.len() < count || own.len() < count {
            return Err(unreachable("it sent too few sums"));
        }
        let their = |block: usize| if self.at(block) < self.size { theirs[block] } else { HOLE };
        // A block that one of the two files ends in may have equal sums and yet another length: it is fetched.
        let ends_here = |block: usize| their(block) != HOLE && self.at(block + 1) > self.size.min(own_size);
        let differs = |block: usize| their(block) != own[block] || ends_here(block);
        let mut block = 0;
        while block < count {
            let first = block;
            block += 1;
            if !differs(first) {
                continue;
            }
            let is_hole = their(first) == HOLE;
            while block < count && differs(block) && (their(block) == HOLE) == is_hole {
                block += 1;
            }
            if is_hole {
                let hole = ByteRange { start: self.at(first), end: self.at(block) };
                self.brick.objects.put(self.ino, hole, None).map_err(|e| store_failed(self.brick, &e))?;
            } else {
                self.fetch(first..block, &theirs[first..block])?;
            }
        }
        Ok(())
    }

    fn fetch(&self, blocks: Range<usize>, sums: &[Sum]) -> Result<(), Answer> {
        let piece = ByteRange { start: self.at(blocks.start), end: self.at(blocks.end) };
        let bytes = self.bytes(piece, sums)?;
        self.brick.objects.put(self.ino, piece, Some(&bytes)).map_err(|e| store_failed(self.brick, &e))?;
        self.brick.repaired_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The bytes of a piece, verified. If they are corrupt at the source, another `InSync` brick has them `[R5]`, unless they are
    /// in doubt: then only the source is right.
    fn bytes(&self, piece: ByteRange, sums: &[Sum]) -> Result<Vec<u8>, Answer> {
        let mut sources = vec![self.from];
        if !self.is_recovery {
            let replica = self.brick.replica.lock();
            let others = replica.configuration().map(|c| c.in_sync().without(self.from).without(self.brick.slot));
            sources.extend(others.unwrap_or_default().iter());
        }
        for source in sources {
            let read = What::Read(data::Read { offset: piece.start, length: piece.len() as u32 });
            let bytes = match ask(self.brick, source, self.ino, self.stamp, read) {
                Ok((Outcome::Read(_), bytes)) => bytes,
                Ok(_) => return Err(unreachable("it answered something else")),
                Err(answer) if source == self.from => return Err(answer),
                Err(_) => continue,
            };
            let is_whole = bytes.len() as u64 == piece.end.min(self.size) - piece.start;
            let mut pairs = bytes.chunks(BLOCK_BYTES as usize).zip(sums);
            if is_whole && pairs.all(|(block, sum)| checksum::matches(block, *sum)) {
                return Ok(bytes);
            }
            tracing::warn!(brick = %self.brick.id, ino = %self.ino, "brick {} has corrupt data at {}", source.0, piece.start);
        }
        Err(failed(libc::EIO, format!("no brick has sound data at {}", piece.start), false))
    }
}
