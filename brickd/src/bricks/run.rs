//! Running a request: admission by the replica machine, what must be durable first, the data, what must be durable then, the
//! answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mortar_proto::checksum::HOLE;
use mortar_proto::config::Slot;
use mortar_proto::replica::{Admission, Bookkeeping, Purpose, Stamp, Ticket};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{BLOCK_BYTES, ByteRange, Epoch, Ino, MAX_FILE_BYTES, REGION_BYTES, SIZE_REGION, Seq};

use super::answers::Permit;
use super::brick::Brick;
use super::damage;
use super::doubt;
use super::list;
use super::pull;
use super::requests::{Answer, Sender, behind, done, failed, has_wrong_size, refused, store_failed};
use crate::store::{Changed, Record, Removal, StoreError};

/// How long a request may wait for the log or for older requests, before its sender has to ask again `[F1]`.
const WAIT: Duration = Duration::from_secs(1);
/// The widest stretch of data that one change may cut off or zero, in bytes: every extent in it is recorded first.
const MAX_CHANGE_BYTES: u64 = 64 << 40;
/// `FALLOC_FL_PUNCH_HOLE`
const PUNCH: u32 = 2;

/// A request that a worker runs.
pub(super) struct Asked {
    pub(super) ino: Ino,
    pub(super) stamp: Stamp,
    pub(super) what: What,
    pub(super) payload: Vec<u8>,
    pub(super) sender: Sender,
}

/// Runs a request in a worker.
pub(super) fn run(brick: &Arc<Brick>, asked: &Asked, permit: &Permit) -> Answer {
    let ino = asked.ino;
    match (&asked.what, asked.sender) {
        (What::Read(what), Sender::Session(_)) => read(brick, ino, what, false).unwrap_or_else(behind),
        (What::Report(report), _) => damage::reported(brick, ino, report),
        (What::Matching(matching), _) => doubt::matching(brick, ino, matching),
        (What::Seek(_), _) if has_wrong_size(brick, ino) => behind(),
        (What::Seek(seek), _) => self::seek(brick, ino, seek),
        (What::IntentList(_) | What::MissedList(_) | What::DataList(_), _) => {
            list::for_peer(brick, ino, &asked.stamp, &asked.what)
        }
        _ => admitted(brick, asked, permit).map_or_else(
            |answer| answer,
            |(ticket, purpose, due)| match durably(brick, ino, ticket, purpose, &due) {
                Ok(()) => apply(brick, asked, ticket, purpose),
                Err(answer) => answer,
            },
        ),
    }
}

fn gone() -> Answer {
    failed(libc::EIDRM, "the file was deleted", false)
}

/// Asks for admission until it is given, refused, or has waited too long.
fn admitted(brick: &Brick, asked: &Asked, permit: &Permit) -> Result<(Ticket, Purpose, Bookkeeping), Answer> {
    let until = Instant::now() + WAIT;
    loop {
        let purpose = purpose_of(brick, asked)?;
        let admission = {
            let mut replica = brick.replica.lock();
            // [F3] Told under the lock under which connections are ended.
            if permit.is_cut() || brick.is_closed() {
                return Err(behind());
            }
            let admission = replica.admit(asked.ino, &asked.stamp, purpose, brick.now_ms());
            if admission == Admission::Wait {
                if !brick.wait(&mut replica, until) {
                    drop(replica);
                    // Its numbers went with the file: they would be waited for without end, and the brick taken for one that
                    // does not answer.
                    return Err(if brick.is_gone(asked.ino) { gone() } else { behind() });
                }
                continue;
            }
            admission
        };
        match admission {
            Admission::Refused(refusal) => return Err(refused(refusal)),
            Admission::Duplicate(due) => {
                return Err(book(brick, asked.ino, &due).map_or_else(|answer| answer, |()| done()));
            }
            Admission::Wait => {}
            Admission::Apply(ticket, due) => {
                // What it touches was looked at while older requests ran; now nothing that overlaps does.
                match purpose_of(brick, asked) {
                    Ok(now) if now == purpose => return Ok((ticket, purpose, due)),
                    looked => {
                        finish(brick, ticket, purpose, false, false);
                        looked?;
                        if Instant::now() >= until {
                            return Err(behind());
                        }
                    }
                }
            }
        }
    }
}

/// What a request is to the replica machine.
fn purpose_of(brick: &Brick, asked: &Asked) -> Result<Purpose, Answer> {
    let range = |start: u64, end: u64| ByteRange { start, end };
    Ok(match &asked.what {
        What::Write(w) => Purpose::Mutate { range: ByteRange::at(w.offset, asked.payload.len() as u64) },
        What::Truncate(t) => {
            Purpose::Mutate { range: or_first(changed_data(brick, asked.ino, range(t.size, MAX_FILE_BYTES))?) }
        }
        What::Allocate(a) => {
            Purpose::Mutate { range: or_first(changed_data(brick, asked.ino, ByteRange::at(a.offset, a.length))?) }
        }
        What::SetTime(_) => Purpose::Mutate { range: ByteRange::default() },
        What::Pull(p) => Purpose::Pull {
            range: range(p.start, p.end),
            doubt: p.recovery.then_some((Epoch(p.doubt_epoch), Seq(p.doubt_seq), p.sized)),
        },
        What::Fence(_) => Purpose::Fence,
        What::Note(n) => Purpose::Note { range: range(n.start, n.end), sized: n.sized },
        What::Flush(_) => Purpose::Flush,
        What::Settle(_) => Purpose::Settle,
        What::ClearMissed(_) | What::RepairList(_) => Purpose::Repair,
        What::Sums(_) | What::Read(_) => Purpose::Source,
        _ => return Err(failed(libc::EINVAL, "not a request with numbers", false)),
    })
}

/// [W7] A change of size alone needs an intent as well: that of the file's first extent stands for it.
fn or_first(range: ByteRange) -> ByteRange {
    if range.is_empty() { ByteRange::at(0, 1) } else { range }
}

/// The data in `range`, from its first byte to its last: all that can change when it is cut off, punched or zeroed. Holes stay
/// what they are, so a sparse file of any size can be cut or grown at once; a change of size is booked by itself.
pub(super) fn changed_data(brick: &Brick, ino: Ino, range: ByteRange) -> Result<ByteRange, Answer> {
    let data_from = |at: u64| -> Result<Option<u64>, Answer> {
        let found = brick.objects.seek(ino, at, false).map_err(|e| store_failed(brick, &e))?;
        Ok(found.filter(|at| *at < range.end))
    };
    let Some(start) = data_from(range.start)? else { return Ok(ByteRange::default()) };
    // The last block that has data from it on.
    let (mut has, mut has_not) = (start / BLOCK_BYTES, range.end.div_ceil(BLOCK_BYTES));
    while has + 1 < has_not {
        let middle = has + (has_not - has) / 2;
        match data_from(middle * BLOCK_BYTES)? {
            Some(at) => has = at / BLOCK_BYTES,
            None => has_not = middle,
        }
    }
    let data = ByteRange { start, end: ((has + 1) * BLOCK_BYTES).min(range.end) };
    if data.len() > MAX_CHANGE_BYTES {
        let why = format!(
            "{} bytes from the first to the last; at most {MAX_CHANGE_BYTES} can be changed at once",
            data.len()
        );
        return Err(failed(libc::EFBIG, why, false));
    }
    Ok(data)
}

/// Makes durable what must be before the data is touched; if that fails, the request is finished.
pub(super) fn durably(
    brick: &Brick,
    ino: Ino,
    ticket: Ticket,
    purpose: Purpose,
    due: &Bookkeeping,
) -> Result<(), Answer> {
    book(brick, ino, due).inspect_err(|_| finish(brick, ticket, purpose, false, false))
}

/// Makes intents `[W7]` and missed regions `[W5]` durable.
pub(super) fn book(brick: &Brick, ino: Ino, due: &Bookkeeping) -> Result<(), Answer> {
    if due.intents.is_empty() && due.missed.is_empty() {
        return Ok(());
    }
    let mut records: Vec<Record> = due.intents.iter().map(|e| Record::Intent(ino, *e)).collect();
    if !due.missed.is_empty() {
        let replica = brick.replica.lock();
        let missed = |(x, regions): &(Slot, std::ops::Range<u64>)| {
            Some(Record::Missed(Brick::brick_of(&replica, *x)?, ino, regions.clone()))
        };
        records.extend(due.missed.iter().filter_map(missed));
    }
    if let Err(e) = brick.journal.add(records) {
        let why = format!("the journal cannot be written: {e}");
        brick.lose(&why);
        return Err(failed(libc::EIO, why, true));
    }
    let mut replica = brick.replica.lock();
    if !due.intents.is_empty() {
        replica.intents_recorded(ino, due.intents.iter().copied(), brick.now_ms());
    }
    for (x, regions) in &due.missed {
        replica.missed_recorded(*x, ino, regions.clone());
    }
    Ok(())
}

fn finish(brick: &Brick, ticket: Ticket, purpose: Purpose, sized: bool, applied: bool) {
    brick.journal.touch();
    brick.replica.lock().finish(ticket, purpose, sized, applied, brick.now_ms());
    brick.progress.notify_all();
}

/// Does what was admitted, and finishes it.
fn apply(brick: &Arc<Brick>, asked: &Asked, ticket: Ticket, purpose: Purpose) -> Answer {
    let ino = asked.ino;
    match &asked.what {
        What::Write(write) => self::write(brick, ino, ticket, write, &asked.payload),
        What::Truncate(t) => conclude(brick, ino, ticket, purpose, brick.objects.truncate(ino, t.size)),
        What::Allocate(a) if a.mode & PUNCH == 0 && lacks_room(brick, a.length) => {
            finish(brick, ticket, purpose, false, false);
            no_room()
        }
        What::Allocate(a) => {
            conclude(brick, ino, ticket, purpose, brick.objects.allocate(ino, a.offset, a.length, a.mode))
        }
        What::SetTime(t) => {
            let changed = brick.objects.set_mtime(ino, t.mtime_ns).map(|()| Changed { old_size: 0, new_size: 0 });
            conclude(brick, ino, ticket, purpose, changed)
        }
        What::Pull(p) => {
            let began_ms = brick.now_ms();
            let pulled = pull::pull(brick, ino, &asked.stamp, p);
            let region = p.start / REGION_BYTES;
            let is_region = p.start % REGION_BYTES == 0 && p.end - p.start == REGION_BYTES;
            let now_ms = brick.now_ms();
            let pulled = pulled.and_then(|busy| {
                let region = if p.size { SIZE_REGION } else { region };
                if !p.recovery && (p.size || is_region) {
                    brick.replica.lock().pulled_region(ino, region, asked.stamp.n);
                    brick.settle_damage(ino, region).map_err(|e| store_failed(brick, &e))?;
                }
                Ok(busy)
            });
            finish(brick, ticket, purpose, p.size, pulled.is_ok());
            let pause = |busy| brick.pace.pause_ms(busy, now_ms - began_ms, now_ms) as u32;
            pulled
                .map_or_else(|answer| answer, |busy| (Outcome::Done(data::Done { pause_ms: pause(busy) }), Vec::new()))
        }
        what => {
            let answer = ask(brick, ino, what);
            finish(brick, ticket, purpose, false, true);
            answer
        }
    }
}

/// After the data was changed: what others miss by it `[W5]`, then it is finished.
fn conclude(brick: &Brick, ino: Ino, ticket: Ticket, purpose: Purpose, changed: Result<Changed, StoreError>) -> Answer {
    let touched = match purpose {
        Purpose::Mutate { range } => range,
        _ => ByteRange::default(),
    };
    match changed {
        Ok(changed) => {
            let missed = brick.replica.lock().also_missed(ticket, touched, changed.sized());
            let booked = book(brick, ino, &Bookkeeping { intents: Vec::new(), missed });
            finish(brick, ticket, purpose, changed.sized(), true);
            booked.map_or_else(|answer| answer, |()| done())
        }
        Err(e) => {
            // Nobody knows how far it came: all of it is in doubt, the size too.
            finish(brick, ticket, purpose, true, false);
            store_failed(brick, &e)
        }
    }
}

/// Writes what was admitted, and finishes it.
pub(super) fn write(brick: &Brick, ino: Ino, ticket: Ticket, write: &data::Write, payload: &[u8]) -> Answer {
    let range = ByteRange::at(write.offset, payload.len() as u64);
    let purpose = Purpose::Mutate { range };
    if brick.is_low.load(Ordering::Relaxed) && needs_room(brick, ino, range) {
        finish(brick, ticket, purpose, false, false);
        return no_room();
    }
    conclude(brick, ino, ticket, purpose, brick.objects.write(ino, write.offset, payload, &write.sums))
}

fn no_room() -> Answer {
    failed(libc::ENOSPC, "the brick would have less room than storage.reserve keeps free", false)
}

fn lacks_room(brick: &Brick, length: u64) -> bool {
    brick.is_low.load(Ordering::Relaxed) || length > brick.total_bytes()
}

/// It writes to blocks that were never written.
fn needs_room(brick: &Brick, ino: Ino, range: ByteRange) -> bool {
    brick
        .objects
        .sums(ino, range)
        .is_ok_and(|(sums, _)| sums.chunks_exact(8).any(|s| s.try_into().is_ok_and(|s| u64::from_le_bytes(s) == HOLE)))
}

/// Whole blocks and their sums. `None`: with `nowait` it would have waited for the disk.
pub(super) fn read(brick: &Brick, ino: Ino, read: &data::Read, nowait: bool) -> Option<Answer> {
    let range = ByteRange::at(read.offset, u64::from(read.length)).to_blocks();
    let (mut bytes, mut sums) = (Vec::new(), Vec::new());
    match brick.objects.read(ino, range, nowait, &mut bytes, &mut sums) {
        // [R5] What it ends at may not be the end.
        Ok(Some(size)) if size < range.end && has_wrong_size(brick, ino) => Some(cut_off()),
        Ok(size) => size.map(|size| (Outcome::Read(data::ReadReply { sums: sums.into(), size }), bytes)),
        Err(e) => Some(store_failed(brick, &e)),
    }
}

fn cut_off() -> Answer {
    failed(pull::CORRUPT, "the file was cut off on this brick, and is to be repaired", false)
}

pub(super) fn stat(brick: &Brick, ino: Ino) -> Answer {
    match brick.objects.stat(ino) {
        Ok(s) => (Outcome::Stat(data::StatReply { size: s.size, blocks: s.blocks, mtime_ns: s.mtime_ns }), Vec::new()),
        Err(e) => store_failed(brick, &e),
    }
}

fn seek(brick: &Brick, ino: Ino, seek: &data::Seek) -> Answer {
    let found = if seek.offset > MAX_FILE_BYTES { Ok(None) } else { brick.objects.seek(ino, seek.offset, seek.hole) };
    match found {
        Ok(at) => (Outcome::Seek(data::SeekReply { offset: at.unwrap_or(0), end: at.is_none() }), Vec::new()),
        Err(e) => store_failed(brick, &e),
    }
}

/// Requests that change no data.
fn ask(brick: &Brick, ino: Ino, what: &What) -> Answer {
    match what {
        What::Fence(_) => fence(brick, ino),
        What::Flush(_) => match brick.objects.flush(ino) {
            Ok(()) => done(),
            Err(e) => {
                // [W8] A failed flush is never tried again: what it lost cannot be known.
                brick.lose(&e.to_string());
                failed(e.errno(), e.to_string(), true)
            }
        },
        What::ClearMissed(c) => {
            let Some(x) = Slot::ALL.get(c.slot as usize) else { return failed(libc::EINVAL, "no such slot", false) };
            // Under the lock, so that what is missed from now on is recorded after this removal.
            let mut replica = brick.replica.lock();
            replica.clear_missed(*x, ino, c.region);
            if let Some(id) = Brick::brick_of(&replica, *x) {
                brick.journal.remove(vec![Removal::Missed(id, ino, c.region..c.region + 1)]);
            }
            done()
        }
        What::RepairList(r) => list::to_repair(brick, ino, r.slot),
        What::Sums(_) if has_wrong_size(brick, ino) => cut_off(),
        What::Sums(s) => match brick.objects.sums(ino, ByteRange { start: s.start, end: s.end }) {
            Ok((sums, size)) => (
                Outcome::Sums(data::SumsReply {
                    sums: sums.into(),
                    size,
                    next_data: 0,
                    busy: brick.pace.is_busy(brick.now_ms()),
                    unsettled: !brick.replica.lock().is_settled(ino, ByteRange { start: s.start, end: s.end }),
                }),
                Vec::new(),
            ),
            Err(e) => store_failed(brick, &e),
        },
        What::Read(what) => read(brick, ino, what, false).unwrap_or_else(behind),
        // [W6] A note and a settling have done their work by being admitted and booked.
        _ => done(),
    }
}

fn fence(brick: &Brick, ino: Ino) -> Answer {
    let doubt = |d: mortar_proto::replica::Doubt| data::Doubt {
        epoch: d.epoch.0,
        seq: d.seq.0,
        start: d.range.start,
        end: d.range.end,
        sized: d.sized,
    };
    let in_doubt = brick.replica.lock().in_doubt(ino).into_iter().map(doubt).collect();
    match brick.objects.stat(ino) {
        Ok(stat) => (Outcome::Fence(data::FenceReply { in_doubt, size: stat.size }), Vec::new()),
        Err(e) => store_failed(brick, &e),
    }
}
