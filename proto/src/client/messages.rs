//! The coordinator's words as frames, and a brick's answers as the coordinator's words.

use bytes::Bytes;

use crate::checksum;
use crate::coordinator::{Answer, Body, Mutation, Request, Stat};
use crate::interval::IntervalSet;
use crate::replica::Doubt;
use crate::types::{BLOCK_BYTES, ByteRange, ConfigNo, Epoch, Ino, Seq};
use crate::wire::data::{self, request::What, response::Outcome};

/// `EHOSTUNREACH`: what a brick answers when it cannot reach the source of a pull.
const SOURCE_UNREACHABLE: u32 = 113;
/// `EBADMSG`: what a brick answers when a copy of `[W2]` does not verify at its source.
const SOURCE_CORRUPT: u32 = 74;
/// `EIDRM`: what a brick answers when the file was deleted and its data reclaimed.
pub(super) const GONE: u32 = 43;

/// The header of a request. `sums`: of a write's whole blocks.
pub(super) fn request(id: u64, ino: Ino, request: &Request, sums: Bytes) -> data::Request {
    let what = match request.body {
        Body::Mutate(_, Mutation::Write { offset, .. }) => What::Write(data::Write { offset, sums }),
        Body::Mutate(_, Mutation::Truncate { size }) => What::Truncate(data::Truncate { size }),
        Body::Mutate(_, Mutation::Allocate { offset, length, mode }) => {
            What::Allocate(data::Allocate { offset, length, mode })
        }
        Body::Mutate(_, Mutation::SetTime { mtime_ns }) => What::SetTime(data::SetTime { mtime_ns }),
        Body::Fence => What::Fence(data::Fence {}),
        Body::Flush => What::Flush(data::Flush {}),
        Body::Settle => What::Settle(data::Settle {}),
        Body::Read(range) => {
            let blocks = range.to_blocks();
            What::Read(data::Read { offset: blocks.start, length: blocks.len() as u32 })
        }
        Body::Stat => What::Stat(data::Stat {}),
        Body::Seek { offset, hole } => What::Seek(data::Seek { offset, hole }),
        Body::Pull { range, size, from, doubt } => {
            let (epoch, seq) = doubt.unwrap_or_default();
            What::Pull(data::Pull {
                start: range.start,
                end: range.end,
                size,
                from: u32::from(from.0),
                recovery: doubt.is_some(),
                doubt_epoch: epoch.0,
                doubt_seq: seq.0,
                sized: size,
            })
        }
        Body::Note { range, sized } => What::Note(data::Note { start: range.start, end: range.end, sized }),
        Body::Report { range } => What::Report(data::Report { start: range.start, end: range.end, compare: false }),
        Body::RepairList(x) => What::RepairList(data::RepairList { slot: u32::from(x.0) }),
        Body::ClearMissed { x, region } => What::ClearMissed(data::ClearMissed { slot: u32::from(x.0), region }),
    };
    let stamp = data::Stamp {
        n: request.n.0,
        epoch: request.epoch.0,
        seq: request.seq.0,
        stable: request.stable.0,
        settled: request.settled,
    };
    data::Request { id, ino: ino.0, stamp: Some(stamp), what: Some(what) }
}

/// The checksums of the whole blocks of a write, as the wire has them.
pub(super) fn sums_of(offset: u64, bytes: &[u8]) -> Bytes {
    let skip = (offset.next_multiple_of(BLOCK_BYTES) - offset) as usize;
    let Some(whole) = bytes.get(skip..) else { return Bytes::new() };
    let mut sums = Vec::with_capacity(whole.len() / BLOCK_BYTES as usize * 8);
    for block in whole.chunks_exact(BLOCK_BYTES as usize) {
        sums.extend_from_slice(&checksum::of_block(block).to_le_bytes());
    }
    sums.into()
}

/// A brick's answer. For a read of `range`, the bytes that were asked for come along, verified.
pub(super) fn answer(outcome: Option<Outcome>, body: &Body, payload: &[u8]) -> (Answer, Vec<u8>) {
    let answer = match (outcome, body) {
        (Some(Outcome::Read(reply)), Body::Read(range)) => return read(range, &reply, payload),
        (Some(Outcome::Done(_)), _) => Answer::Done,
        (Some(Outcome::Stale(s)), _) => Answer::Stale { n: ConfigNo(s.n), epoch: Epoch(s.epoch) },
        (Some(Outcome::Behind(_)), _) => Answer::Behind,
        (Some(Outcome::Failed(f)), Body::Pull { .. }) if f.errno == SOURCE_UNREACHABLE && !f.brick => {
            Answer::SourceFailed
        }
        (Some(Outcome::Failed(f)), Body::Pull { doubt: Some(_), .. }) if f.errno == SOURCE_CORRUPT && !f.brick => {
            Answer::SourceCorrupt
        }
        (Some(Outcome::Failed(f)), _) => Answer::Failed { errno: i32::try_from(f.errno).unwrap_or(5), brick: f.brick },
        (Some(Outcome::Fence(reply)), Body::Fence) => {
            let in_doubt = reply
                .in_doubt
                .iter()
                .map(|d| Doubt {
                    epoch: Epoch(d.epoch),
                    seq: Seq(d.seq),
                    range: ByteRange { start: d.start, end: d.end },
                    sized: d.sized,
                })
                .collect();
            Answer::Fenced { in_doubt, size: reply.size }
        }
        (Some(Outcome::Stat(s)), Body::Stat) => {
            Answer::Stat(Stat { size: s.size, blocks: s.blocks, mtime_ns: s.mtime_ns })
        }
        (Some(Outcome::Seek(s)), Body::Seek { .. }) => Answer::Seek(if s.end { None } else { Some(s.offset) }),
        (Some(Outcome::List(list)), Body::RepairList(_)) => {
            let bounds = list.files.iter().flat_map(|f| f.bounds.chunks_exact(2));
            Answer::Regions(bounds.filter(|b| b[0] < b[1]).map(|b| b[0]..b[1]).collect::<IntervalSet>())
        }
        // An answer to something else than was asked.
        _ => Answer::Failed { errno: 5, brick: false },
    };
    (answer, Vec::new())
}

fn read(range: &ByteRange, reply: &data::ReadReply, payload: &[u8]) -> (Answer, Vec<u8>) {
    let blocks = range.to_blocks();
    let expected = reply.size.clamp(blocks.start, blocks.end) - blocks.start;
    let count = payload.len().div_ceil(BLOCK_BYTES as usize);
    if payload.len() as u64 != expected || reply.sums.len() < count * 8 {
        // Not what was asked for: no sign of corrupt data.
        return (Answer::Failed { errno: 5, brick: false }, Vec::new());
    }
    let first = blocks.start / BLOCK_BYTES;
    let pairs = (first..).zip(payload.chunks(BLOCK_BYTES as usize).zip(reply.sums.chunks_exact(8)));
    let is_corrupt = |block: &[u8], sum: &[u8]| !checksum::matches(block, sum.try_into().map_or(0, u64::from_le_bytes));
    let corrupt: IntervalSet =
        pairs.filter(|(_, (block, sum))| is_corrupt(block, sum)).map(|(number, _)| number..number + 1).collect();
    if !corrupt.is_empty() {
        return (Answer::Corrupt(corrupt), Vec::new());
    }
    let skip = ((range.start - blocks.start) as usize).min(payload.len());
    let end = ((range.end - blocks.start) as usize).min(payload.len());
    (Answer::Bytes, payload[skip..end.max(skip)].to_vec())
}
