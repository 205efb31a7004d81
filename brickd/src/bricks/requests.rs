//! Running a request: admission by the replica machine, what must be durable first, the data, what must be durable then, the
//! answer. What can be done at once is done in the connection's own thread; everything else in a worker.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mortar_proto::checksum::HOLE;
use mortar_proto::config::Slot;
use mortar_proto::replica::{Admission, Bookkeeping, Purpose, Refusal, Replica, Stamp, Ticket};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{
    BLOCK_BYTES, BrickId, ByteRange, ConfigNo, Epoch, Ino, MAX_FILE_BYTES, MAX_IO_BYTES, SIZE_REGION, Seq, SessionId,
};
use parking_lot::MutexGuard;

use super::brick::Brick;
use super::pull;
use super::serve::Answers;
use crate::store::{Changed, Objects, Record, Removal, StoreError};

/// How long a request may wait for the log or for older requests, before its sender has to ask again `[F1]`.
const WAIT: Duration = Duration::from_secs(1);
/// Regions or extents in one answer at most: a longer list is asked for again when these are done.
const MAX_LISTED: usize = 100_000;

type Answer = (Outcome, Vec<u8>);

fn done() -> Answer {
    (Outcome::Done(data::Done {}), Vec::new())
}
fn behind() -> Answer {
    (Outcome::Behind(data::Behind {}), Vec::new())
}
pub(super) fn failed(errno: i32, why: impl Into<String>, brick: bool) -> Answer {
    (Outcome::Failed(data::Failed { errno: errno.unsigned_abs(), why: why.into(), brick }), Vec::new())
}

/// Takes a request in. Answers at once if it can; otherwise a worker sends the answer.
pub(super) fn take(
    brick: &Arc<Brick>,
    request: data::Request,
    payload: &[u8],
    session: SessionId,
    from: Option<BrickId>,
    answers: &Arc<Answers>,
) -> Option<(data::Response, Vec<u8>)> {
    let id = request.id;
    let respond = |(outcome, payload): Answer| Some((data::Response { id, outcome: Some(outcome) }, payload));
    let Some(what) = request.what else {
        return respond(failed(libc::EINVAL, "a request that asks for nothing", false));
    };
    let ino = Ino(request.ino);
    let wire = request.stamp.unwrap_or_default();
    let stamp = Stamp {
        n: ConfigNo(wire.n),
        epoch: Epoch(wire.epoch),
        session,
        seq: Seq(wire.seq),
        stable: Seq(wire.stable),
        settled: wire.settled,
    };
    if let Some(refusal) = refuse(brick, ino, &what, payload) {
        return respond(refusal);
    }
    // A peer's reads and questions are not a client's, and the other way round.
    let of_peers = matches!(what, What::Sums(_) | What::IntentList(_) | What::MissedList(_));
    if from.is_some() != (of_peers || matches!(what, What::Read(_)) && from.is_some()) {
        return respond(failed(libc::EPERM, "not a request for this kind of connection", false));
    }
    match (&what, from) {
        (What::Write(write), None) => {
            let range = ByteRange::at(write.offset, payload.len() as u64);
            let purpose = Purpose::Mutate { range };
            let admission = brick.replica.lock().admit(ino, &stamp, purpose, brick.now_ms());
            match admission {
                Admission::Apply(ticket, due) if due == Bookkeeping::default() => {
                    return respond(write_now(brick, ino, ticket, write, payload));
                }
                Admission::Apply(ticket, due) => {
                    let (brick, answers, write, payload) =
                        (Arc::clone(brick), Arc::clone(answers), write.clone(), payload.to_vec());
                    let job = {
                        let brick = Arc::clone(&brick);
                        move || {
                            let answer = match make_durable(&brick, ino, &due, true) {
                                Ok(()) => write_now(&brick, ino, ticket, &write, &payload),
                                Err(answer) => {
                                    finish(&brick, ticket, purpose, false, false);
                                    answer
                                }
                            };
                            answers.send(&data::Response { id, outcome: Some(answer.0) }, &answer.1);
                        }
                    };
                    let _ = brick.general.send(Box::new(job));
                    return None;
                }
                Admission::Refused(refusal) => return respond(refused(refusal)),
                Admission::Wait | Admission::Duplicate(_) => {}
            }
        }
        (What::Read(read), None) => {
            if !brick.replica.lock().may_read(brick.now_ms()) {
                return respond(behind());
            }
            match read_range(brick, ino, read, true) {
                Ok(Some(answer)) => return respond(answer),
                Ok(None) => {}
                Err(answer) => return respond(answer),
            }
        }
        (What::Stat(_), None) => {
            if !brick.replica.lock().may_read(brick.now_ms()) {
                return respond(behind());
            }
            return respond(match brick.objects.stat(ino) {
                Ok(s) => (
                    Outcome::Stat(data::StatReply { size: s.size, blocks: s.blocks, mtime_ns: s.mtime_ns }),
                    Vec::new(),
                ),
                Err(e) => store_failed(brick, &e),
            });
        }
        _ => {}
    }
    let pool = match (&what, from) {
        (_, Some(_)) => &brick.peer_jobs,
        (What::Pull(_), None) => &brick.pulls,
        _ => &brick.general,
    };
    let job = {
        let (brick, answers, payload) = (Arc::clone(brick), Arc::clone(answers), payload.to_vec());
        move || {
            let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                run(&brick, ino, &stamp, &what, &payload, from)
            }));
            let answer = ran.unwrap_or_else(|_| {
                brick.fail("a mistake of mortar-brickd's own; its log says where");
                failed(libc::EIO, "a mistake of mortar-brickd's own", true)
            });
            answers.send(&data::Response { id, outcome: Some(answer.0) }, &answer.1);
        }
    };
    let _ = pool.send(Box::new(job));
    None
}

/// What is refused whoever asks: nothing has been touched yet.
fn refuse(brick: &Brick, ino: Ino, what: &What, payload: &[u8]) -> Option<Answer> {
    let fits = |offset: u64, length: u64| offset.checked_add(length).is_some_and(|end| end <= MAX_FILE_BYTES);
    let refusal = match what {
        What::Write(w) if payload.is_empty() || payload.len() as u64 > MAX_IO_BYTES => {
            failed(libc::EINVAL, format!("a write of {} bytes at {}", payload.len(), w.offset), false)
        }
        What::Write(w) if !fits(w.offset, payload.len() as u64) => {
            failed(libc::EFBIG, "beyond what a file can have", false)
        }
        What::Truncate(t) if t.size > MAX_FILE_BYTES => failed(libc::EFBIG, "beyond what a file can have", false),
        What::Allocate(a) if a.length == 0 => failed(libc::EINVAL, "an allocation of nothing", false),
        What::Allocate(a) if !fits(a.offset, a.length) => failed(libc::EFBIG, "beyond what a file can have", false),
        What::Allocate(a) if !Objects::takes_mode(a.mode) => {
            failed(libc::EOPNOTSUPP, "not a mode of fallocate that is served", false)
        }
        What::Read(r) if u64::from(r.length) > MAX_IO_BYTES + 2 * BLOCK_BYTES => {
            failed(libc::EINVAL, "a read of more than is served at once", false)
        }
        What::Pull(p) if p.start > p.end || p.end - p.start > MAX_IO_BYTES || p.end > 1 << 63 => {
            failed(libc::EINVAL, "a pull of more than is served at once", false)
        }
        What::Sums(s) if s.start > s.end || s.end - s.start > MAX_IO_BYTES => {
            failed(libc::EINVAL, "sums of more than is served at once", false)
        }
        What::ClearMissed(c) if c.slot > 2 => failed(libc::EINVAL, "no such slot", false),
        What::RepairList(r) if r.slot > 2 => failed(libc::EINVAL, "no such slot", false),
        What::MissedList(m) if m.slot > 2 => failed(libc::EINVAL, "no such slot", false),
        What::Note(n) if n.start > n.end => failed(libc::EINVAL, "a range that ends before it begins", false),
        What::Write(w)
            if brick.is_low.load(Ordering::Relaxed) && needs_room(brick, ino, w.offset, payload.len() as u64) =>
        {
            failed(libc::ENOSPC, "the brick has less room than its reserve", false)
        }
        What::Allocate(a) if brick.is_low.load(Ordering::Relaxed) && a.mode & 2 == 0 => {
            failed(libc::ENOSPC, "the brick has less room than its reserve", false)
        }
        _ => return None,
    };
    Some(refusal)
}

/// A write to blocks that were never written.
fn needs_room(brick: &Brick, ino: Ino, offset: u64, length: u64) -> bool {
    brick
        .objects
        .sums(ino, ByteRange::at(offset, length))
        .is_ok_and(|(sums, _)| sums.chunks_exact(8).any(|s| s.try_into().is_ok_and(|s| u64::from_le_bytes(s) == HOLE)))
}

fn refused(refusal: Refusal) -> Answer {
    match refusal {
        Refusal::Stale { n, epoch } => (Outcome::Stale(data::Stale { n: n.0, epoch: epoch.0 }), Vec::new()),
        Refusal::Failed => failed(libc::EIO, "the brick has failed", true),
    }
}

fn store_failed(brick: &Brick, error: &StoreError) -> Answer {
    brick.complain(error);
    failed(error.errno(), error.to_string(), error.is_disk_failure())
}

/// Makes what a mutation needs durable: its intents, then (or with `intents_only` not yet) what others miss by it.
fn make_durable(brick: &Brick, ino: Ino, due: &Bookkeeping, intents: bool) -> Result<(), Answer> {
    let broken = |e: std::io::Error| {
        brick.fail(&format!("the journal cannot be written: {e}"));
        failed(libc::EIO, "the journal cannot be written", true)
    };
    if intents && !due.intents.is_empty() {
        brick.journal.add(due.intents.iter().map(|e| Record::Intent(ino, *e)).collect()).map_err(broken)?;
        brick.replica.lock().intents_recorded(ino, due.intents.iter().copied(), brick.now_ms());
    }
    if !due.missed.is_empty() {
        let records: Vec<Record> = {
            let replica = brick.replica.lock();
            due.missed
                .iter()
                .filter_map(|(x, r)| Some(Record::Missed(Brick::brick_of(&replica, *x)?, ino, r.clone())))
                .collect()
        };
        brick.journal.add(records).map_err(broken)?;
        let mut replica = brick.replica.lock();
        for (x, regions) in &due.missed {
            replica.missed_recorded(*x, ino, regions.clone());
        }
    }
    Ok(())
}

fn finish(brick: &Brick, ticket: Ticket, purpose: Purpose, sized: bool, applied: bool) {
    brick.replica.lock().finish(ticket, purpose, sized, applied, brick.now_ms());
    brick.progress.notify_all();
}

/// After the data was changed: what others miss by it, then it is finished.
fn conclude(
    brick: &Brick,
    ino: Ino,
    ticket: Ticket,
    purpose: Purpose,
    touched: ByteRange,
    changed: Result<Changed, StoreError>,
) -> Answer {
    match changed {
        Ok(changed) => {
            let missed = brick.replica.lock().also_missed(ticket, touched, changed.sized());
            let recorded = if missed.is_empty() {
                Ok(())
            } else {
                make_durable(brick, ino, &Bookkeeping { intents: Vec::new(), missed }, false)
            };
            finish(brick, ticket, purpose, changed.sized(), true);
            recorded.map_or_else(|answer| answer, |()| done())
        }
        Err(e) => {
            finish(brick, ticket, purpose, true, false);
            store_failed(brick, &e)
        }
    }
}

fn write_now(brick: &Brick, ino: Ino, ticket: Ticket, write: &data::Write, payload: &[u8]) -> Answer {
    let range = ByteRange::at(write.offset, payload.len() as u64);
    let changed = brick.objects.write(ino, write.offset, payload, &write.sums);
    conclude(brick, ino, ticket, Purpose::Mutate { range }, range, changed)
}

fn read_range(brick: &Brick, ino: Ino, read: &data::Read, nowait: bool) -> Result<Option<Answer>, Answer> {
    let range = ByteRange::at(read.offset, u64::from(read.length)).to_blocks();
    let (mut bytes, mut sums) = (Vec::new(), Vec::new());
    match brick.objects.read(ino, range, nowait, &mut bytes, &mut sums) {
        Ok(Some(size)) => Ok(Some((Outcome::Read(data::ReadReply { sums: sums.into(), size }), bytes))),
        Ok(None) => Ok(None),
        Err(e) => Err(store_failed(brick, &e)),
    }
}

/// Asks for admission until it is given, refused, or has waited too long.
fn admit<'a>(brick: &'a Brick, ino: Ino, stamp: &Stamp, purpose: Purpose) -> (Admission, MutexGuard<'a, Replica>) {
    let until = Instant::now() + WAIT;
    let mut replica = brick.replica.lock();
    loop {
        let admission = replica.admit(ino, stamp, purpose, brick.now_ms());
        if admission != Admission::Wait || !brick.wait(&mut replica, until) {
            return (admission, replica);
        }
    }
}

/// Runs a request in a worker.
fn run(brick: &Arc<Brick>, ino: Ino, stamp: &Stamp, what: &What, payload: &[u8], from: Option<BrickId>) -> Answer {
    match what {
        What::Read(read) if from.is_none() => match read_range(brick, ino, read, false) {
            Ok(Some(answer)) => answer,
            Ok(None) => behind(),
            Err(answer) => answer,
        },
        What::Seek(seek) => {
            if !brick.replica.lock().may_read(brick.now_ms()) {
                return behind();
            }
            match brick.objects.seek(ino, seek.offset, seek.hole) {
                Ok(at) => (Outcome::Seek(data::SeekReply { offset: at.unwrap_or(0), end: at.is_none() }), Vec::new()),
                Err(e) => store_failed(brick, &e),
            }
        }
        What::IntentList(_) | What::MissedList(_) => list_for_peer(brick, stamp, what),
        _ => stamped(brick, ino, stamp, what, payload),
    }
}

/// What another brick needs to plan or to end its repair `[S1]`, `[S4]`: told under the same configuration only, and when
/// nothing accepted under an older one runs.
fn list_for_peer(brick: &Brick, stamp: &Stamp, what: &What) -> Answer {
    let replica = brick.replica.lock();
    if replica.report().is_none_or(|r| r.n != stamp.n) {
        return behind();
    }
    let files: Vec<data::FileRegions> = match what {
        What::MissedList(list) => {
            let Some(x) = Slot::ALL.get(list.slot as usize) else { return failed(libc::EINVAL, "no such slot", false) };
            replica
                .missed(*x)
                .into_iter()
                .map(|(ino, regions)| data::FileRegions {
                    ino: ino.0,
                    bounds: regions.iter().flat_map(|r| [r.start, r.end]).collect(),
                })
                .collect()
        }
        _ => replica
            .intents()
            .into_iter()
            .map(|(ino, extents)| data::FileRegions {
                ino: ino.0,
                bounds: extents.into_iter().flat_map(|e| [e, e + 1]).collect(),
            })
            .collect(),
    };
    (Outcome::List(data::ListReply { files }), Vec::new())
}

fn purpose_of(brick: &Brick, ino: Ino, what: &What, payload: &[u8]) -> Result<Purpose, Answer> {
    Ok(match what {
        What::Write(w) => Purpose::Mutate { range: ByteRange::at(w.offset, payload.len() as u64) },
        What::Truncate(t) => {
            let old = brick.objects.stat(ino).map_err(|e| store_failed(brick, &e))?.size;
            Purpose::Mutate { range: ByteRange { start: old.min(t.size), end: old.max(t.size) } }
        }
        What::Allocate(a) => Purpose::Mutate { range: ByteRange::at(a.offset, a.length) },
        What::SetTime(_) => Purpose::Mutate { range: ByteRange::default() },
        What::Pull(p) => Purpose::Pull {
            range: ByteRange { start: p.start, end: p.end },
            doubt: p.recovery.then_some((Epoch(p.doubt_epoch), Seq(p.doubt_seq), p.sized)),
        },
        What::Fence(_) => Purpose::Fence,
        What::Note(n) => Purpose::Note { range: ByteRange { start: n.start, end: n.end }, sized: n.sized },
        What::Flush(_) => Purpose::Flush,
        What::Settle(_) => Purpose::Settle,
        What::ClearMissed(_) | What::RepairList(_) => Purpose::Repair,
        What::Sums(_) | What::Read(_) => Purpose::Source,
        _ => return Err(failed(libc::EINVAL, "not a request with numbers", false)),
    })
}

fn stamped(brick: &Arc<Brick>, ino: Ino, stamp: &Stamp, what: &What, payload: &[u8]) -> Answer {
    let purpose = match purpose_of(brick, ino, what, payload) {
        Ok(purpose) => purpose,
        Err(answer) => return answer,
    };
    let (admission, replica) = admit(brick, ino, stamp, purpose);
    let (ticket, due) = match admission {
        Admission::Refused(refusal) => return refused(refusal),
        Admission::Wait => return behind(),
        Admission::Duplicate(due) => {
            drop(replica);
            return make_durable(brick, ino, &due, true).map_or_else(|answer| answer, |()| done());
        }
        Admission::Apply(ticket, due) => (ticket, due),
    };
    drop(replica);
    if let Err(answer) = make_durable(brick, ino, &due, true) {
        finish(brick, ticket, purpose, false, false);
        return answer;
    }
    match what {
        What::Write(write) => write_now(brick, ino, ticket, write, payload),
        What::Truncate(t) => {
            let changed = brick.objects.truncate(ino, t.size);
            let touched = match (&changed, purpose) {
                // The size at admission may have been another; what really changed is booked.
                (Ok(c), _) => ByteRange { start: c.old_size.min(c.new_size), end: c.old_size.max(c.new_size) },
                (Err(_), Purpose::Mutate { range }) => range,
                _ => ByteRange::default(),
            };
            conclude(brick, ino, ticket, purpose, touched, changed)
        }
        What::Allocate(a) => {
            let changed = brick.objects.allocate(ino, a.offset, a.length, a.mode);
            conclude(brick, ino, ticket, purpose, ByteRange::at(a.offset, a.length), changed)
        }
        What::SetTime(t) => {
            let changed = brick.objects.set_mtime(ino, t.mtime_ns).map(|()| Changed { old_size: 0, new_size: 0 });
            conclude(brick, ino, ticket, purpose, ByteRange::default(), changed)
        }
        What::Pull(p) => {
            let pulled = pull::pull(brick, ino, stamp, p);
            let applied = pulled.is_ok();
            if applied && !p.recovery {
                let region = if p.size { SIZE_REGION } else { p.start / mortar_proto::REGION_BYTES };
                brick.replica.lock().pulled_region(ino, region);
            }
            finish(brick, ticket, purpose, p.size, applied);
            pulled.map_or_else(|answer| answer, |()| done())
        }
        _ => {
            let answer = ask(brick, ino, what);
            finish(brick, ticket, purpose, false, true);
            answer
        }
    }
}

/// Requests that change no data.
fn ask(brick: &Brick, ino: Ino, what: &What) -> Answer {
    match what {
        What::Fence(_) => {
            let in_doubt = brick
                .replica
                .lock()
                .in_doubt(ino)
                .into_iter()
                .map(|d| data::Doubt {
                    epoch: d.epoch.0,
                    seq: d.seq.0,
                    start: d.range.start,
                    end: d.range.end,
                    sized: d.sized,
                })
                .collect();
            match brick.objects.stat(ino) {
                Ok(stat) => {
                    let boot = mortar_proto::wire::id_bytes(brick.registration.boot.0);
                    (Outcome::Fence(data::FenceReply { in_doubt, size: stat.size, boot }), Vec::new())
                }
                Err(e) => store_failed(brick, &e),
            }
        }
        What::Flush(_) => match brick.objects.flush(ino) {
            Ok(()) => done(),
            Err(e) => {
                // [W8] A failed flush is never tried again: what it lost cannot be known.
                brick.fail(&e.to_string());
                failed(e.errno(), e.to_string(), true)
            }
        },
        What::ClearMissed(c) => {
            let Some(x) = Slot::ALL.get(c.slot as usize) else { return failed(libc::EINVAL, "no such slot", false) };
            let mut replica = brick.replica.lock();
            replica.clear_missed(*x, ino, c.region);
            if let Some(id) = Brick::brick_of(&replica, *x) {
                brick.journal.remove(vec![Removal::Missed(id, ino, c.region..c.region.saturating_add(1))]);
            }
            done()
        }
        What::RepairList(r) => {
            let Some(x) = Slot::ALL.get(r.slot as usize) else { return failed(libc::EINVAL, "no such slot", false) };
            match brick.replica.lock().repair_list(*x, ino) {
                Some(regions) => {
                    let bounds = regions.iter().take(MAX_LISTED).flat_map(|r| [r.start, r.end]).collect();
                    (
                        Outcome::List(data::ListReply { files: vec![data::FileRegions { ino: ino.0, bounds }] }),
                        Vec::new(),
                    )
                }
                None => behind(),
            }
        }
        What::Sums(s) => match brick.objects.sums(ino, ByteRange { start: s.start, end: s.end }) {
            Ok((sums, size)) => (Outcome::Sums(data::SumsReply { sums: sums.into(), size, next_data: 0 }), Vec::new()),
            Err(e) => store_failed(brick, &e),
        },
        What::Read(read) => match read_range(brick, ino, read, false) {
            Ok(Some(answer)) => answer,
            Ok(None) => behind(),
            Err(answer) => answer,
        },
        _ => done(),
    }
}
