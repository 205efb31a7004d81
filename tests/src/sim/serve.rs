//! What a brick's process does with requests: admission, then intents durable, data, missed regions durable, finish, answer,
//! each a step that takes time.

use mortar_proto::Slots;
use mortar_proto::coordinator::{Answer, Body, Mutation, Stat};
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::replica::{Admission, Purpose, Refusal, Stamp};
use mortar_proto::types::ByteRange;

use super::brick::{Job, Peer, Step};
use super::client::ZERO;
use super::disk::Content;
use super::world::{Happening, Node, TIMEOUTS, Wire, World, mutation_of, slot};

/// A request that is not ready waits this long before it is answered `Behind`.
const WAIT_MS: u64 = 800;
/// `EIO`, `ENOSPC`
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl World {
    pub(super) fn answer(&mut self, s: usize, wire: Wire, answer: Answer, content: Option<Content>) {
        let c = wire.connection;
        match (mutation_of(&wire.request), &answer) {
            (Some(op), Answer::Done) => self.history.held(op, slot(s)),
            (Some(_), Answer::Failed { brick: false, .. }) => self.refused = true,
            _ => {}
        }
        if self.bricks[s].accepted[c.client] != c.number {
            return;
        }
        self.note(|| format!("b{s} -> c{} {:?} {answer:?} {content:?}", c.client, wire.request.body));
        let happening = Happening::Answer { connection: c, ino: wire.ino, id: wire.request.id, answer, content };
        self.send(Node::Brick(s), Node::Client(c.client), true, happening);
    }

    pub(super) fn stamp(wire: &Wire) -> Stamp {
        let r = &wire.request;
        Stamp { n: r.n, epoch: r.epoch, session: wire.session, seq: r.seq, stable: r.stable, settled: r.settled }
    }

    /// A new connection of a client ends the older one before it is served [F3].
    pub(super) fn accept(&mut self, s: usize, client: usize, number: u64) {
        self.bricks[s].accepted[client] = number;
        self.bricks[s].waiting.retain(|(w, _)| w.connection.client != client);
    }

    pub(super) fn ask_again(&mut self, s: usize) {
        let waiting = std::mem::take(&mut self.bricks[s].waiting);
        for (wire, deadline) in waiting {
            if !self.try_request(s, wire) {
                self.bricks[s].waiting.push((wire, deadline));
            }
        }
    }

    pub(super) fn request(&mut self, wire: Wire) {
        let s = wire.connection.slot;
        if self.bricks[s].closed {
            return;
        }
        if !self.try_request(s, wire) {
            let deadline = self.now + WAIT_MS;
            self.bricks[s].waiting.push((wire, deadline));
        }
    }

    /// False: it has to wait.
    pub(super) fn try_request(&mut self, s: usize, wire: Wire) -> bool {
        let now = self.brick_now(s);
        let size = self.bricks[s].disk.size(wire.ino);
        let purpose = match wire.request.body {
            Body::Read(_) | Body::Stat | Body::Seek { .. } => {
                if self.replica(s).may_read(now) {
                    let delay = self.disk_delay(s);
                    self.later(s, delay, Step::Read(wire));
                } else {
                    self.answer(s, wire, Answer::Behind, None);
                }
                return true;
            }
            Body::Mutate(_, Mutation::Write { offset, length } | Mutation::Allocate { offset, length, .. }) => {
                Purpose::Mutate { range: ByteRange::at(offset, length) }
            }
            Body::Mutate(_, Mutation::Truncate { size: to }) => {
                Purpose::Mutate { range: ByteRange { start: to.min(size), end: to.max(size) } }
            }
            Body::Mutate(..) => Purpose::Settle,
            Body::Fence => Purpose::Fence,
            Body::Flush => Purpose::Flush,
            Body::Settle => Purpose::Settle,
            Body::Pull { range, size, doubt, .. } => {
                Purpose::Pull { range, doubt: doubt.map(|(epoch, seq)| (epoch, seq, size)) }
            }
            Body::Report { range } => {
                self.look_at(s, wire.ino, range);
                self.answer(s, wire, Answer::Done, None);
                return true;
            }
            Body::Note { range, sized } => Purpose::Note { range, sized },
            Body::RepairList(_) | Body::ClearMissed { .. } => Purpose::Repair,
        };
        let stamp = Self::stamp(&wire);
        let admission = self.replica(s).admit(wire.ino, &stamp, purpose, now);
        let mut job = Job {
            wire,
            purpose,
            ticket: None,
            missed: Vec::new(),
            sized: false,
            applied: true,
            answer: Answer::Done,
            tried: Slots::NONE,
        };
        match admission {
            Admission::Wait => return false,
            Admission::Refused(Refusal::Stale { n, epoch }) => self.answer(s, wire, Answer::Stale { n, epoch }, None),
            Admission::Refused(Refusal::Failed) => {
                self.answer(s, wire, Answer::Failed { errno: EIO, brick: true }, None);
            }
            Admission::Duplicate(bookkeeping) => {
                self.count("duplicate");
                job.missed = bookkeeping.missed;
                self.record_missed(s, job);
            }
            Admission::Apply(ticket, bookkeeping) => {
                self.check_holder(s, &wire);
                job.ticket = Some(ticket);
                job.missed = bookkeeping.missed;
                if bookkeeping.intents.is_empty() {
                    self.touch_data(s, job);
                } else {
                    let delay = self.disk_delay(s);
                    // The records of what is never acknowledged may be durable as well.
                    self.later(s, delay, Step::Intents(job, bookkeeping.intents));
                }
            }
        }
        true
    }

    pub(super) fn touch_data(&mut self, s: usize, mut job: Job) {
        let delay = self.disk_delay(s);
        match job.wire.request.body {
            Body::Mutate(..) => self.later(s, delay, Step::Data(job, 0)),
            Body::Pull { from, .. } => {
                let number = self.number();
                let ask = Peer::Ask(number, job.wire);
                job.tried.insert(from);
                self.bricks[s].pulls.insert(number, job);
                self.say(s, from.index(), ask);
                self.later(s, TIMEOUTS.io_timeout_ms / 2, Step::PullLate(number));
            }
            Body::Flush => {
                let upto = self.bricks[s].disk.written();
                self.later(s, delay * 2, Step::Flushed(job, upto));
            }
            Body::Fence => {
                let in_doubt = self.replica(s).in_doubt(job.wire.ino);
                let size = self.bricks[s].disk.size(job.wire.ino);
                job.answer = Answer::Fenced { in_doubt, size };
                self.done(s, job);
            }
            Body::RepairList(x) => {
                job.answer = match self.replica(s).repair_list(x, job.wire.ino) {
                    Some(regions) => Answer::Regions(regions),
                    None => Answer::Behind,
                };
                self.done(s, job);
            }
            Body::ClearMissed { x, region } => {
                let ino = job.wire.ino;
                self.replica(s).clear_missed(x, ino, region);
                if self.rng.chance(50) {
                    self.tempt(None, &[s, x.index()]);
                }
                let brick = self.brick_in(s, x);
                self.bricks[s].disk.forget_missed(brick, ino, region..region + 1);
                self.done(s, job);
            }
            _ => self.record_missed(s, job),
        }
    }

    pub(super) fn record_missed(&mut self, s: usize, job: Job) {
        if job.missed.is_empty() {
            self.done(s, job);
        } else {
            let delay = self.disk_delay(s);
            self.later(s, delay, Step::Missed(job));
        }
    }

    pub(super) fn done(&mut self, s: usize, job: Job) {
        if let Some(ticket) = job.ticket {
            let now = self.brick_now(s);
            self.replica(s).finish(ticket, job.purpose, job.sized, job.applied, now);
            if let (Body::Pull { range, size, doubt: None, .. }, true) = (job.wire.request.body, job.applied) {
                let region = if size {
                    mortar_proto::types::SIZE_REGION
                } else {
                    range.start / mortar_proto::types::REGION_BYTES
                };
                self.replica(s).pulled_region(job.wire.ino, region, job.wire.request.n);
                self.settle_damage(s, job.wire.ino, region);
            }
        }
        self.answer(s, job.wire, job.answer, None);
        self.ask_again(s);
    }

    pub(super) fn step(&mut self, s: usize, step: Step) {
        match step {
            Step::Intents(job, extents) => {
                let now = self.brick_now(s);
                if !left_out(Rule::W7Durable) {
                    self.bricks[s].disk.record_intents(job.wire.ino, &extents);
                }
                self.replica(s).intents_recorded(job.wire.ino, extents, now);
                self.touch_data(s, job);
            }
            Step::Data(job, from) => self.write_data(s, job, from),
            Step::Missed(job) => {
                for (x, regions) in job.missed.clone() {
                    if !left_out(Rule::W5Durable) {
                        let brick = self.brick_in(s, x);
                        self.bricks[s].disk.record_missed(brick, job.wire.ino, regions.clone());
                    }
                    self.replica(s).missed_recorded(x, job.wire.ino, regions);
                }
                self.done(s, job);
            }
            Step::Flushed(mut job, upto) => {
                if self.bricks[s].flush_fails {
                    self.count("flush failed");
                    self.bricks[s].disk.flush_failed(job.wire.ino);
                    self.lose(s);
                    job.answer = Answer::Failed { errno: EIO, brick: true };
                } else {
                    self.bricks[s].disk.flushed(job.wire.ino, upto);
                }
                self.done(s, job);
            }
            Step::Read(wire) => self.serve_read(s, wire),
            Step::Pulled(job, content) => self.write_pulled(s, job, content),
            Step::PullLate(number) => {
                if let Some(job) = self.bricks[s].pulls.remove(&number) {
                    self.pull_failed(s, job);
                }
            }
            Step::Clear(files, began_ms, upto) => {
                let failed = self.replica(s).has_failed();
                for (ino, extents) in files.into_iter().filter(|_| !failed) {
                    if !left_out(Rule::W7Flushed) {
                        self.bricks[s].disk.flushed(ino, upto);
                    }
                    let cleared = self.replica(s).clear_intents(ino, &extents, began_ms);
                    self.event(|| format!("b{s} clears intents {ino:?} {cleared:?}"));
                    self.bricks[s].disk.forget_intents(ino, &cleared);
                }
                self.bricks[s].clearing = false;
            }
            Step::TakenOver(n, missed) => {
                for (x, ino, regions) in missed.into_iter().filter(|_| !left_out(Rule::S4TakeOver)) {
                    let brick = self.brick_in(s, x);
                    self.bricks[s].disk.record_missed(brick, ino, regions.clone());
                    self.replica(s).missed_recorded(x, ino, regions);
                }
                let upto = self.bricks[s].disk.written();
                let delay = self.disk_delay(s);
                self.later(s, delay, Step::Repaired(n, upto));
            }
            Step::Repaired(n, upto) => {
                for ino in self.bricks[s].disk.files().into_iter().filter(|_| !left_out(Rule::S4Flush)) {
                    self.bricks[s].disk.flushed(ino, upto);
                }
                let done = self.replica(s).repaired(n);
                self.event(|| format!("b{s} repaired under n={n}: {done}"));
                if self.rng.chance(200) {
                    self.tempt(None, &[0, 1, 2]);
                }
                self.bricks[s].task = None;
            }
            Step::TaskLate(number) => {
                if self.bricks[s].task.as_ref().is_some_and(|t| t.number == number) {
                    self.bricks[s].task = None;
                }
            }
            Step::Stop(upto, began) => {
                for ino in self.bricks[s].disk.files() {
                    self.bricks[s].disk.flushed(ino, upto);
                }
                for (ino, extents) in self.replica(s).clearable_intents(began, 0) {
                    let cleared = self.replica(s).clear_intents(ino, &extents, began);
                    self.bricks[s].disk.forget_intents(ino, &cleared);
                }
                if left_out(Rule::E5Clean) {
                    self.bricks[s].disk.forget_own_intents();
                }
                self.bricks[s].disk.record_clean(true);
                self.count("clean stop");
                self.event(|| format!("b{s} stopped cleanly"));
                let down = self.rng.between(50, 2000);
                self.stop_brick(s, false, down);
            }
        }
    }

    pub(super) fn serve_read(&mut self, s: usize, wire: Wire) {
        if std::mem::take(&mut self.bricks[s].read_fails) {
            self.count("read failed");
            self.lose(s);
            return self.answer(s, wire, Answer::Failed { errno: EIO, brick: true }, None);
        }
        let mut content = self.bricks[s].disk.content(wire.ino);
        let answer = match wire.request.body {
            Body::Read(range) => {
                let corrupt = self.read_of_corrupt(s, wire.ino, range, &mut content);
                if corrupt.is_none() {
                    self.note_seen(s, wire.ino, range, &content);
                }
                corrupt.unwrap_or(Answer::Bytes)
            }
            Body::Stat => Answer::Stat(Stat { size: content.size, blocks: 0, mtime_ns: 0 }),
            _ => Answer::Seek(None),
        };
        self.answer(s, wire, answer, Some(content));
    }

    pub(super) fn write_data(&mut self, s: usize, mut job: Job, from: usize) {
        let ino = job.wire.ino;
        let Some(op) = mutation_of(&job.wire.request) else { return };
        if from == 0 {
            self.mutation_accepted(s, &job.wire);
        }
        if self.write_fails(s, &mut job) {
            return;
        }
        if self.bricks[s].full && self.rng.chance(700) {
            job.applied = false;
            job.answer = Answer::Failed { errno: ENOSPC, brick: false };
            self.count("no space");
            self.also_missed(s, &mut job);
            self.record_missed(s, job);
            return;
        }
        match job.wire.request.body {
            Body::Mutate(_, Mutation::Write { offset, length }) => {
                let blocks: Vec<usize> = self.geometry.blocks(ByteRange::at(offset, length)).collect();
                let torn = self.rng.chance(300);
                for (i, block) in blocks.iter().copied().enumerate().skip(from) {
                    job.sized |= self.bricks[s].disk.write(ino, block, op.0);
                    if torn && i + 1 < blocks.len() {
                        let delay = self.disk_delay(s);
                        self.later(s, delay, Step::Data(job, i + 1));
                        return;
                    }
                }
            }
            Body::Mutate(_, Mutation::Allocate { offset, length, mode }) => {
                let (disk, range) = (&mut self.bricks[s].disk, ByteRange::at(offset, length));
                if mode == ZERO && disk.size(ino) < range.end {
                    job.sized = disk.set_size(ino, range.end);
                }
                for block in self.geometry.blocks(range) {
                    disk.write(ino, block, 0);
                }
            }
            Body::Mutate(_, Mutation::Truncate { size }) => job.sized = self.bricks[s].disk.set_size(ino, size),
            _ => {}
        }
        self.event(|| format!("b{s} wrote {} of {ino:?}, sized={}", op.0, job.sized));
        if self.rng.chance(50) {
            self.tempt(Some(job.wire.connection.client), &[0, 1, 2]);
        }
        self.also_missed(s, &mut job);
        self.record_missed(s, job);
    }

    /// The disk takes a write no more: the brick fails [E4].
    fn write_fails(&mut self, s: usize, job: &mut Job) -> bool {
        if !std::mem::take(&mut self.bricks[s].write_fails) && !self.bricks[s].read_only {
            return false;
        }
        self.count("write failed");
        self.lose(s);
        job.applied = false;
        job.answer = Answer::Failed { errno: EIO, brick: true };
        self.also_missed(s, job);
        self.record_missed(s, job.clone());
        true
    }

    pub(super) fn also_missed(&mut self, s: usize, job: &mut Job) {
        if let (Some(ticket), Purpose::Mutate { range }) = (job.ticket, job.purpose) {
            let more = self.replica(s).also_missed(ticket, range, job.sized);
            job.missed.extend(more);
        }
    }

    pub(super) fn write_pulled(&mut self, s: usize, mut job: Job, content: Content) {
        let ino = job.wire.ino;
        if self.write_fails(s, &mut job) {
            return;
        }
        if let Body::Pull { range, size, from, doubt } = job.wire.request.body {
            self.count(if doubt.is_some() { "recovered" } else { "repaired" });
            if doubt.is_some() {
                self.tempt(Some(job.wire.connection.client), &[s, from.index()]);
            } else if self.rng.chance(50) {
                self.tempt(None, &[s, from.index()]);
            }
            if size {
                self.bricks[s].disk.set_size(ino, content.size);
            }
            if !self.take_pulled(s, &mut job, &content) {
                return;
            }
            job.sized = size;
            self.event(|| {
                format!("b{s} pulled {ino:?} {range:?} size={size} from b{} doubt={doubt:?} {content:?}", from.0)
            });
        }
        self.record_missed(s, job);
    }

    pub(super) fn pull_failed(&mut self, s: usize, mut job: Job) {
        job.applied = false;
        job.answer = Answer::SourceFailed;
        self.done(s, job);
    }
}
