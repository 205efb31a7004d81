//! Taking a request in: what is refused whoever asks, what is done at once in the connection's own thread, and which worker
//! does the rest.

use std::sync::Arc;

use mortar_proto::config::Slot;
use mortar_proto::frame::MAX_PAYLOAD_BYTES;
use mortar_proto::replica::{Admission, Bookkeeping, Purpose, Refusal, Stamp};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{
    BLOCK_BYTES, ByteRange, ConfigNo, Epoch, Ino, MAX_FILE_BYTES, MAX_IO_BYTES, SIZE_REGION, Seq, SessionId,
};

use super::answers::{Answers, Permit};
use super::brick::{Brick, Job};
use super::doubt::AT_ONCE;
use super::run::{self, Asked};
use crate::store::{Objects, StoreError};

/// Who sends requests on a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sender {
    Session(SessionId),
    /// A brick that repairs itself.
    Brick,
}

pub(super) type Answer = (Outcome, Vec<u8>);

pub(super) fn done() -> Answer {
    (Outcome::Done(data::Done::default()), Vec::new())
}
pub(super) fn behind() -> Answer {
    (Outcome::Behind(data::Behind {}), Vec::new())
}
pub(super) fn failed(errno: i32, why: impl Into<String>, brick: bool) -> Answer {
    (Outcome::Failed(data::Failed { errno: errno.unsigned_abs(), why: why.into(), brick }), Vec::new())
}
pub(super) fn refused(refusal: Refusal) -> Answer {
    match refusal {
        Refusal::Stale { n, epoch } => (Outcome::Stale(data::Stale { n: n.0, epoch: epoch.0 }), Vec::new()),
        Refusal::Failed => failed(libc::EIO, "the brick has failed", true),
    }
}
/// The answer to a failed operation; a broken disk fails the brick.
pub(super) fn store_failed(brick: &Brick, error: &StoreError) -> Answer {
    brick.complain(error);
    failed(error.errno(), error.to_string(), error.is_disk_failure())
}

/// Takes a request in. Answers at once if it can; otherwise a worker sends the answer.
pub(super) fn take(
    brick: &Arc<Brick>,
    request: data::Request,
    payload: &[u8],
    sender: Sender,
    answers: &Arc<Answers>,
) -> Option<(data::Response, Vec<u8>)> {
    let id = request.id;
    let respond = |(outcome, payload): Answer| Some((data::Response { id, outcome: Some(outcome) }, payload));
    let Some(what) = request.what else {
        return respond(failed(libc::EINVAL, "a request that asks for nothing", false));
    };
    if let Some(refusal) = refuse(&what, payload, sender) {
        return respond(refusal);
    }
    // [S5] What applications ask for; what repairs asks of a client's link is none of it.
    let repairs =
        matches!(what, What::Pull(_) | What::RepairList(_) | What::ClearMissed(_) | What::Settle(_) | What::Fence(_));
    if sender != Sender::Brick && !repairs {
        brick.pace.asked(brick.now_ms());
    }
    let ino = Ino(request.ino);
    let stamp = stamp(&request.stamp.unwrap_or_default(), sender);
    let pool = match (&what, sender) {
        (_, Sender::Brick) => &brick.pools.peers,
        (What::Write(write), _) => {
            let purpose = Purpose::Mutate { range: ByteRange::at(write.offset, payload.len() as u64) };
            let admission = {
                let mut replica = brick.replica.lock();
                // [F3] Nothing of an ended connection is admitted: told under the lock under which it was ended.
                if answers.is_cut() || brick.is_closed() {
                    return None;
                }
                replica.admit(ino, &stamp, purpose, brick.now_ms())
            };
            match admission {
                Admission::Apply(ticket, due) if due == Bookkeeping::default() => {
                    return respond(run::write(brick, ino, ticket, write, payload));
                }
                Admission::Apply(ticket, due) => {
                    let (write, payload) = (write.clone(), payload.to_vec());
                    hand_over(brick, &brick.pools.admitted, answers, id, payload.len(), move |brick, _| {
                        run::durably(brick, ino, ticket, purpose, &due)
                            .map_or_else(|answer| answer, |()| run::write(brick, ino, ticket, &write, &payload))
                    });
                    return None;
                }
                Admission::Refused(refusal) => return respond(refused(refusal)),
                Admission::Wait | Admission::Duplicate(_) => &brick.pools.general,
            }
        }
        // [R1] The lease counts when the read comes in: what was acknowledged before that is here for good.
        (What::Read(_) | What::Stat(_) | What::Seek(_), _) if !brick.replica.lock().may_read(brick.now_ms()) => {
            return respond(behind());
        }
        (What::Read(read), _) => match run::read(brick, ino, read, true) {
            Some(answer) => return respond(answer),
            None => &brick.pools.general,
        },
        (What::Stat(_), _) if has_wrong_size(brick, ino) => return respond(behind()),
        (What::Stat(_), _) => return respond(run::stat(brick, ino)),
        (What::Pull(_), _) => &brick.pools.pulls,
        _ => &brick.pools.general,
    };
    let bytes = payload.len();
    let asked = Asked { ino, stamp, what, payload: payload.to_vec(), sender };
    hand_over(brick, pool, answers, id, bytes, move |brick, permit| run::run(brick, &asked, permit));
    None
}

/// [R5] The file was cut off on this brick: another one knows its size.
pub(super) fn has_wrong_size(brick: &Brick, ino: Ino) -> bool {
    brick.replica.lock().has_lost_size(ino) || brick.objects.is_cut_off(ino).unwrap_or(false)
}

fn hand_over(
    brick: &Arc<Brick>,
    pool: &crossbeam_channel::Sender<Job>,
    answers: &Arc<Answers>,
    id: u64,
    bytes: usize,
    act: impl FnOnce(&Arc<Brick>, &Permit) -> Answer + Send + 'static,
) {
    let permit = answers.permit(bytes);
    let own = Arc::clone(brick);
    let job = move || {
        let answer = own.guarded(|| act(&own, &permit));
        let answer = answer.unwrap_or_else(|| failed(libc::EIO, "a mistake of mortar-brickd's own", true));
        permit.answer(&data::Response { id, outcome: Some(answer.0) }, &answer.1);
    };
    // The pool ends only with the brick.
    let _ = pool.send(Box::new(job));
}

fn stamp(wire: &data::Stamp, sender: Sender) -> Stamp {
    let session = match sender {
        Sender::Session(session) => session,
        Sender::Brick => SessionId(0),
    };
    Stamp {
        n: ConfigNo(wire.n),
        epoch: Epoch(wire.epoch),
        session,
        seq: Seq(wire.seq),
        stable: Seq(wire.stable),
        settled: wire.settled,
    }
}

/// What is refused whatever the numbers say: it makes no sense, or is more than anybody asks for. Nothing has been touched.
fn refuse(what: &What, payload: &[u8], sender: Sender) -> Option<Answer> {
    let invalid = |why: &str| Some(failed(libc::EINVAL, why, false));
    let too_far = |offset: u64, length: u64| offset.checked_add(length).is_none_or(|end| end > MAX_FILE_BYTES);
    let too_big = || Some(failed(libc::EFBIG, format!("a file has at most {MAX_FILE_BYTES} bytes"), false));
    let no_slot = |slot: u32| slot as usize >= Slot::ALL.len();
    // A range of whole blocks that one request may be about.
    let no_piece = |start: u64, end: u64| {
        start > end || end > MAX_FILE_BYTES || ByteRange { start, end }.to_blocks().len() > MAX_IO_BYTES
    };
    let of_bricks = matches!(
        what,
        What::Sums(_) | What::IntentList(_) | What::MissedList(_) | What::DataList(_) | What::Matching(_)
    );
    if !(of_bricks && sender == Sender::Brick
        || !of_bricks && sender != Sender::Brick
        || matches!(what, What::Read(_) | What::Report(_)))
    {
        return Some(failed(libc::EPERM, "a request of another kind of connection", false));
    }
    match what {
        What::Write(w) => {
            let length = payload.len() as u64;
            let end = w.offset.saturating_add(length);
            let whole = (end / BLOCK_BYTES).saturating_sub(w.offset.div_ceil(BLOCK_BYTES));
            match w.sums.len() as u64 {
                _ if length == 0 || length > MAX_IO_BYTES => invalid("a write has 1 byte to 1 MiB"),
                _ if too_far(w.offset, length) => too_big(),
                sums if sums != 0 && sums != whole * 8 => invalid("a write has 8 bytes of sums a whole block, or none"),
                _ => None,
            }
        }
        What::Truncate(t) if t.size > MAX_FILE_BYTES => too_big(),
        What::Allocate(a) if a.length == 0 => invalid("an allocation has at least 1 byte"),
        What::Allocate(a) if too_far(a.offset, a.length) => too_big(),
        What::Allocate(a) if !Objects::takes_mode(a.mode) => {
            Some(failed(libc::EOPNOTSUPP, format!("fallocate mode {:#x} is not served", a.mode), false))
        }
        What::Read(r) => {
            let blocks = ByteRange::at(r.offset, u64::from(r.length)).to_blocks();
            if blocks.len() > MAX_PAYLOAD_BYTES as u64 {
                invalid("a read has at most 1 MiB and what rounds it out")
            } else {
                None
            }
        }
        What::Report(r)
            if r.start > r.end
                || ByteRange { start: r.start, end: r.end }.to_blocks().len() > MAX_PAYLOAD_BYTES as u64 =>
        {
            invalid("a report is of what one read may be of")
        }
        What::Pull(p) if no_slot(p.from) || no_piece(p.start, p.end) => invalid("a pull has a slot and at most 1 MiB"),
        What::Note(n) if no_piece(n.start, n.end) => invalid("a note has at most 1 MiB"),
        What::Sums(s) if no_piece(s.start, s.end) => invalid("sums are of at most 1 MiB"),
        What::ClearMissed(c) if no_slot(c.slot) || c.region > SIZE_REGION => invalid("no such slot or region"),
        What::RepairList(r) if no_slot(r.slot) => invalid("no such slot"),
        What::MissedList(m) if no_slot(m.slot) => invalid("no such slot"),
        What::Matching(m) if m.blocks.len() > AT_ONCE || m.sums.len() != m.blocks.len() * 8 => {
            invalid("a question for contents has 8 bytes of sums a block, and at most 1 MiB of blocks")
        }
        _ => None,
    }
}
