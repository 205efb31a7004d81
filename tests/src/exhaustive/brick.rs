//! A brick's process: the real [`Replica`] around a disk of one block. Does what `brickd` does, in its order: intents and
//! missed regions durable, data, finish, answer. What can be told apart from outside is a step of its own: a mutation or a
//! pull is admitted, and takes effect later.

use mortar_proto::config::{BrickState, Slot};
use mortar_proto::coordinator::{Answer, Body, Mutation, OpId, Request, Stat};
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::metadata::Effect;
use mortar_proto::metadata::command::Registration;
use mortar_proto::metadata::monitor::Beat;
use mortar_proto::replica::{Admission, Bookkeeping, Purpose, Refusal, Replica, Stamp, Ticket};
use mortar_proto::types::{BLOCK_BYTES, BootId, BrickId, ByteRange, ConfigNo, Incarnation, LogIndex};
use mortar_proto::{REGION_BYTES, SIZE_REGION, Slots};

use super::disk::{Disk, INO};
use super::leader::Leader;
use super::part::Shown;
use super::world::{CLIENTS, Origin, World, slot};

/// What a brick answers when its disk fails.
const EIO: i32 = 5;

/// A request that was admitted.
#[derive(Clone, Debug)]
pub struct Job {
    pub(super) origin: Origin,
    pub(super) request: Request,
    purpose: Purpose,
    ticket: Ticket,
    /// What a pull has got from its source.
    fetched: OpId,
    /// What a flush makes durable.
    upto: u64,
}

/// A brick.
#[derive(Clone, Debug)]
pub struct Brick {
    id: BrickId,
    slot: Slot,
    /// Its process, if it runs.
    pub replica: Option<Replica>,
    pub(super) registration: Registration,
    /// Its disk.
    pub disk: Disk,
    /// Log entries applied, durably.
    pub applied: usize,
    /// Requests that wait for the log or for older ones.
    pub(super) waiting: Vec<(Origin, Request)>,
    /// Requests that were admitted.
    pub(super) jobs: Vec<Job>,
    /// The lists of others were taken over under this configuration, and the flush that follows began here.
    pub(super) taken_over: Option<(ConfigNo, u64)>,
    /// Intents that may go: extents, when the flush began, and what it makes durable.
    pub(super) tidying: Option<(Vec<u64>, u64, u64)>,
    /// The clock of intents: moves when a flush begins after which some may go.
    pub(super) clock: u64,
    pub(super) stopping: bool,
    pub(super) was_in_sync: bool,
}

impl Brick {
    /// One whose process does not run yet.
    #[must_use]
    pub fn new(leader: &Leader, s: usize) -> Self {
        let member = leader.configuration().members[s];
        Self {
            id: leader.brick(s),
            slot: slot(s),
            replica: None,
            registration: Registration { incarnation: member.incarnation, boot: member.boot, clean: false },
            disk: Disk::new(OpId(0)),
            applied: 0,
            waiting: Vec::new(),
            jobs: Vec::new(),
            taken_over: None,
            tidying: None,
            clock: 1,
            stopping: false,
            was_in_sync: false,
        }
    }
    /// Its process runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.replica.is_some()
    }
    /// The incarnation of its last start.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.registration.incarnation
    }
    /// It would serve a read at this time.
    #[must_use]
    pub fn may_read(&self, now_ms: u64) -> bool {
        self.replica.as_ref().is_some_and(|r| r.may_read(now_ms))
    }
    /// What it says in a heartbeat.
    #[must_use]
    pub fn beat(&self) -> Option<Beat> {
        let replica = self.replica.as_ref()?;
        let report = replica.report();
        Some(Beat {
            brick: self.id,
            registration: self.registration,
            known: replica.configuration().map_or(ConfigNo(0), |c| c.n),
            agreed_under: replica.agreed_under(),
            failed: replica.has_failed(),
            stopping: self.stopping,
            n: report.map_or(ConfigNo(0), |r| r.n),
            missed_empty: report.map_or(Slots::NONE, |r| r.missed_empty),
            repaired: report.is_some_and(|r| r.repaired),
        })
    }
    /// True when it has agreed just now.
    pub(super) fn beat_answered(&mut self, until_ms: u64, commit: LogIndex, agree: bool) -> bool {
        let Some(replica) = &mut self.replica else { return false };
        let agrees = agree && !replica.has_agreed();
        if agrees {
            replica.agree_to_out();
        }
        replica.lease_answered(until_ms, commit);
        agrees
    }
    pub(super) fn book(&mut self, due: &Bookkeeping) {
        let Some(replica) = &mut self.replica else { return };
        if !left_out(Rule::W7Durable) {
            self.disk.add(&due.intents, &[]);
        }
        if !left_out(Rule::W5Durable) {
            self.disk.add(&[], &due.missed);
        }
        if !due.intents.is_empty() {
            replica.intents_recorded(INO, due.intents.iter().copied(), self.clock);
        }
        for (x, regions) in &due.missed {
            replica.missed_recorded(*x, INO, regions.clone());
        }
    }
    fn finish(&mut self, job: &Job, sized: bool, applied: bool) {
        let clock = self.clock;
        if let Some(replica) = &mut self.replica {
            replica.finish(job.ticket, job.purpose, sized, applied, clock);
        }
    }
    /// It can begin to clear intents.
    #[must_use]
    pub fn can_tidy(&self) -> bool {
        let due = self.replica.as_ref().map(|r| r.clearable_intents(self.clock, 0));
        self.tidying.is_none() && due.is_some_and(|d| !d.is_empty())
    }
    /// It has begun.
    #[must_use]
    pub fn is_tidying(&self) -> bool {
        self.tidying.is_some()
    }
    /// [E5] It is stopping cleanly, and nothing keeps it.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        let ready = |r: &Replica| r.state() == BrickState::Out && r.is_live() && r.is_drained();
        self.stopping && self.replica.as_ref().is_some_and(ready)
    }
    /// It runs, and serves nothing until it is started again.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.replica.as_ref().is_some_and(|r| r.has_failed() || self.stopping)
    }
}

impl Shown for Brick {
    fn shown(&self) -> impl core::fmt::Debug + '_ {
        let jobs = self.jobs.iter().map(|j| (j.origin, &j.request, &j.ticket, j.fetched, self.disk.behind(j.upto)));
        let tidying = self.tidying.as_ref().map(|t| (&t.0, self.clock - t.1, self.disk.behind(t.2)));
        let taken = self.taken_over.map(|t| (t.0, self.disk.behind(t.1)));
        let flags = (self.stopping, self.was_in_sync, self.clock, tidying);
        (&self.replica, self.registration, &self.waiting, jobs.collect::<Vec<_>>(), taken, flags, self.disk.shown())
    }
}

impl World {
    pub(super) fn replica(&mut self, s: usize) -> Option<&mut Replica> {
        self.bricks[s].replica.as_mut()
    }

    pub(super) fn start_process(&mut self, s: usize) {
        let first = self.bricks[s].applied == 0;
        let incarnation = if first { self.bricks[s].incarnation() } else { Incarnation(self.number()) };
        let bricks = [0, 1, 2].map(|s| self.bricks[s].id);
        let brick = &mut *self.bricks[s];
        brick.registration.incarnation = incarnation;
        brick.registration.clean = brick.disk.clean;
        brick.disk.record_clean(false);
        brick.stopping = false;
        brick.was_in_sync = false;
        let mut replica = Replica::new(brick.id, brick.slot, incarnation, brick.disk.recorded(bricks));
        // The log's state as this server had applied it durably.
        for effect in self.leader.entries[..brick.applied].iter().flatten() {
            match effect {
                Effect::Configured { configuration, .. } => {
                    let entered = replica.configured(*configuration, None);
                    assert!(entered.is_empty(), "a start that the log does not know is no source");
                }
                Effect::Leased { ino, epoch, holder, .. } => replica.leased(*ino, *epoch, *holder),
                _ => {}
            }
        }
        replica.applied(LogIndex(brick.applied as u64));
        brick.replica = Some(replica);
        let registration = brick.registration;
        self.note(|| format!("b{s} starts as {:x}, clean: {}", registration.incarnation.0, registration.clean));
        for c in 0..CLIENTS {
            self.connect(c, s);
        }
    }

    /// The process ends.
    pub(super) fn stop_process(&mut self, s: usize) {
        let brick = &mut *self.bricks[s];
        brick.replica = None;
        brick.waiting.clear();
        brick.jobs.clear();
        brick.taken_over = None;
        brick.tidying = None;
        self.strays.retain(|(to, ..)| *to != s);
        for c in 0..CLIENTS {
            self.disconnect(c, s, false);
        }
    }

    pub(super) fn lose_power(&mut self, s: usize, version: usize, comes_back: bool) {
        let boot = BootId(u128::from(self.number()));
        self.stop_process(s);
        self.bricks[s].registration.boot = boot;
        self.bricks[s].disk.lose_power(version, comes_back);
    }

    /// The brick's server applies the next entry of the log.
    pub(super) fn apply(&mut self, s: usize) {
        let index = self.bricks[s].applied;
        let Some(effects) = self.leader.entries.get(index).cloned() else { return };
        let brick = &mut *self.bricks[s];
        brick.applied += 1;
        let Some(replica) = &mut brick.replica else { return };
        for effect in effects {
            match effect {
                Effect::Configured { configuration, cold_start, .. } => {
                    for (x, _, regions) in replica.configured(configuration, cold_start) {
                        brick.disk.add(&[], &[(x, regions)]);
                    }
                    for (x, _) in replica.forget_missed_of_in_sync() {
                        brick.disk.remove_all_missed(x);
                    }
                    brick.was_in_sync |= replica.is_live() && replica.state() == BrickState::InSync;
                }
                Effect::Leased { ino, epoch, holder, .. } => replica.leased(ino, epoch, holder),
                _ => {}
            }
        }
        replica.applied(LogIndex(index as u64 + 1));
        self.ask_again(s);
    }

    /// Something has changed that requests may have waited for.
    fn ask_again(&mut self, s: usize) {
        for (origin, request) in std::mem::take(&mut self.bricks[s].waiting) {
            self.request(s, origin, request);
        }
    }

    fn answer(&mut self, s: usize, origin: Origin, request: &Request, answer: Answer) {
        let value = self.bricks[s].disk.value();
        let about_nothing = match request.body {
            Body::Pull { .. } => !super::step::touches_block(&request.body),
            Body::ClearMissed { region, .. } => region != 0,
            _ => false,
        };
        if !about_nothing {
            self.note(|| format!("b{s} answers c{}'s {:?}: {answer:?}", origin.client, request.body));
        }
        let pipe = &mut *self.pipes[origin.client][s];
        if pipe.number == origin.number && pipe.number != 0 {
            pipe.answers.push((request.id, answer, value, request.body));
        }
    }

    /// A request arrives: it is admitted, answered, or waits.
    pub(super) fn request(&mut self, s: usize, origin: Origin, request: Request) {
        let now_ms = self.leader.now_ms;
        let brick = &mut *self.bricks[s];
        let clock = brick.clock;
        let Some(replica) = &mut brick.replica else { return };
        let purpose = match request.body {
            Body::Read(_) | Body::Stat | Body::Seek { .. } => {
                let answer = match request.body {
                    _ if !replica.may_read(now_ms) => Answer::Behind,
                    Body::Stat => Answer::Stat(Stat { size: BLOCK_BYTES, ..Stat::default() }),
                    Body::Seek { offset, .. } => Answer::Seek(Some(offset)),
                    _ => Answer::Bytes,
                };
                return self.answer(s, origin, &request, answer);
            }
            body => purpose(&body),
        };
        let r = &request;
        let stamp =
            Stamp { n: r.n, epoch: r.epoch, session: origin.session, seq: r.seq, stable: r.stable, settled: r.settled };
        match replica.admit(INO, &stamp, purpose, clock) {
            Admission::Wait => self.bricks[s].waiting.push((origin, request)),
            Admission::Refused(Refusal::Stale { n, epoch }) => {
                self.answer(s, origin, r, Answer::Stale { n, epoch });
            }
            Admission::Refused(Refusal::Failed) => {
                self.answer(s, origin, r, Answer::Failed { errno: EIO, brick: true });
            }
            Admission::Duplicate(due) => {
                self.bricks[s].book(&due);
                self.answer(s, origin, r, Answer::Done);
            }
            Admission::Apply(ticket, due) => {
                brick.book(&due);
                let upto = brick.disk.written();
                let job = Job { origin, request, purpose, ticket, fetched: OpId(0), upto };
                self.begin(s, job, &stamp);
            }
        }
    }

    /// What was admitted takes effect at once, or becomes a job.
    fn begin(&mut self, s: usize, mut job: Job, stamp: &Stamp) {
        let done = match job.request.body {
            Body::Mutate(..) | Body::Flush => {
                self.bricks[s].jobs.push(job);
                return;
            }
            Body::Pull { from, size, .. } => match self.fetch(from.index(), stamp) {
                Ok(value) => {
                    job.fetched = value;
                    self.bricks[s].jobs.push(job);
                    return;
                }
                Err(answer) => {
                    self.bricks[s].finish(&job, size, false);
                    self.answer(s, job.origin, &job.request, answer);
                    return self.ask_again(s);
                }
            },
            Body::Fence => {
                let in_doubt = self.replica(s).map_or_else(Vec::new, |r| r.in_doubt(INO));
                Answer::Fenced { in_doubt, size: BLOCK_BYTES }
            }
            Body::RepairList(x) => match self.replica(s).and_then(|r| r.repair_list(x, INO)) {
                Some(regions) => Answer::Regions(regions),
                None => Answer::Behind,
            },
            Body::ClearMissed { x, region } => {
                if let Some(replica) = self.replica(s) {
                    replica.clear_missed(x, INO, region);
                }
                self.bricks[s].disk.remove_missed(x, region..region + 1);
                Answer::Done
            }
            _ => Answer::Done,
        };
        self.bricks[s].finish(&job, false, true);
        self.answer(s, job.origin, &job.request, done);
        self.ask_again(s);
    }

    /// Another brick takes the block from this one.
    fn fetch(&mut self, s: usize, stamp: &Stamp) -> Result<OpId, Answer> {
        let brick = &mut *self.bricks[s];
        let clock = brick.clock;
        let Some(replica) = &mut brick.replica else { return Err(Answer::SourceFailed) };
        match replica.admit(INO, stamp, Purpose::Source, clock) {
            Admission::Apply(ticket, _) => {
                replica.finish(ticket, Purpose::Source, false, true, clock);
                Ok(brick.disk.value())
            }
            Admission::Refused(Refusal::Failed) => Err(Answer::SourceFailed),
            _ => Err(Answer::Behind),
        }
    }

    /// A job takes effect, is finished and answered.
    pub(super) fn run(&mut self, s: usize, index: usize) {
        let job = self.bricks[s].jobs.remove(index);
        let request = job.request;
        match request.body {
            Body::Mutate(op, _) => {
                self.check_mutation(s, &request);
                self.bricks[s].disk.write(op);
                self.note(|| format!("b{s} writes {}", op.0));
                let range = ByteRange::at(0, BLOCK_BYTES);
                let missed = self.replica(s).map_or_else(Vec::new, |r| r.also_missed(job.ticket, range, false));
                self.bricks[s].book(&Bookkeeping { intents: Vec::new(), missed });
                self.bricks[s].finish(&job, false, true);
            }
            Body::Pull { range, size, doubt, from } => {
                if range.start == 0 && !range.is_empty() {
                    self.bricks[s].disk.write(job.fetched);
                    self.note(|| format!("b{s} takes {} from b{}", job.fetched.0, from.0));
                }
                if let (None, Some(replica)) = (doubt, self.replica(s)) {
                    let region = if size { SIZE_REGION } else { range.start / REGION_BYTES };
                    replica.pulled_region(INO, region, request.n);
                }
                self.bricks[s].finish(&job, size, true);
            }
            _ => {
                self.bricks[s].disk.flushed(job.upto);
                self.bricks[s].finish(&job, false, true);
            }
        }
        self.answer(s, job.origin, &request, Answer::Done);
        self.ask_again(s);
    }
}

/// What a request is to the replica machine.
fn purpose(body: &Body) -> Purpose {
    match *body {
        Body::Mutate(_, Mutation::Write { offset, length }) => Purpose::Mutate { range: ByteRange::at(offset, length) },
        Body::Fence => Purpose::Fence,
        Body::Flush => Purpose::Flush,
        Body::Pull { range, size, doubt, .. } => {
            Purpose::Pull { range, doubt: doubt.map(|(epoch, seq)| (epoch, seq, size)) }
        }
        Body::Note { range, sized } => Purpose::Note { range, sized },
        Body::RepairList(_) | Body::ClearMissed { .. } => Purpose::Repair,
        _ => Purpose::Settle,
    }
}
