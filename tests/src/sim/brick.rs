//! A brick's process: the real [`Replica`] around a virtual disk. Does what `brickd` does, in the order in which it does it:
//! intents durable, data, missed regions durable, finish, answer; any of these takes time, and the process may die between
//! any two of them.

use std::collections::BTreeMap;
use std::ops::Range;

use mortar_proto::coordinator::{Answer, Body, Mutation, Stat};
use mortar_proto::interval::IntervalSet;
use mortar_proto::metadata::Effect;
use mortar_proto::metadata::command::Registration;
use mortar_proto::metadata::monitor::Beat;
use mortar_proto::replica::{Admission, Purpose, Refusal, Replica, Stamp, Ticket};
use mortar_proto::types::{BootId, BrickId, ByteRange, ConfigNo, Ino, LogIndex};
use mortar_proto::{BrickState, Incarnation, Slot, Slots};

use super::disk::{Content, Disk, Geometry};
use super::leader::ToLeader;
use super::world::{Connection, Happening, Node, TIMEOUTS, TIMING, Wire, World, mutation_of, slot};

/// A request that is not ready waits this long before it is answered `Behind`.
const WAIT_MS: u64 = 800;
/// Intents are cleared when nothing has touched them for this long.
const INTENT_IDLE_MS: u64 = 400;
/// `EIO`, `ENOSPC`
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// A request under way.
#[derive(Clone, Debug)]
pub struct Job {
    wire: Wire,
    purpose: Purpose,
    ticket: Option<Ticket>,
    missed: Vec<(Slot, Range<u64>)>,
    sized: bool,
    applied: bool,
    answer: Answer,
}

/// Where something that takes time has come to.
#[derive(Clone, Debug)]
pub enum Step {
    /// Intents are durable.
    Intents(Job, Vec<u64>),
    /// The data is written, from this block on.
    Data(Job, usize),
    /// Missed regions are durable.
    Missed(Job),
    /// A flush has ended that began at this write.
    Flushed(Job, u64),
    /// A read is served.
    Read(Wire),
    /// The content of a pull is written.
    Pulled(Job, Content),
    /// A pull's source has not answered in time.
    PullLate(u64),
    /// Files are flushed, these intents may go: file, extents, when the flush began, and at which write.
    Clear(Vec<(Ino, Vec<u64>)>, u64, u64),
    /// The end of repair: what the others missed is durable; then, all is flushed that was written up to here.
    TakenOver(ConfigNo, Vec<(Slot, Ino, Range<u64>)>),
    /// See above.
    Repaired(ConfigNo, u64),
    /// A task of the above has taken too long.
    TaskLate(u64),
    /// The last flush of a clean stop has ended.
    Stop(u64),
}

/// What bricks say to each other.
#[derive(Clone, Debug)]
pub enum Peer {
    /// Data, for a pull.
    Ask(u64, Wire),
    /// Its answer; `None`: refused.
    Data(u64, Option<Content>),
    /// The intents, and whether nothing is missed, under a configuration.
    AskLists(u64, ConfigNo),
    /// The answer; `None`: not under this configuration.
    Lists(u64, Option<Lists>),
}

/// What an `InSync` brick tells one that plans or finishes.
#[derive(Clone, Debug)]
pub struct Lists {
    intents: Vec<(Ino, Vec<u64>)>,
    missed: Vec<(Slot, Ino, IntervalSet)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum TaskKind {
    Plan,
    Finish,
}

/// Planning, or finishing, under way.
#[derive(Clone, Debug)]
struct Task {
    number: u64,
    kind: TaskKind,
    n: ConfigNo,
    left: Slots,
    lists: Vec<Lists>,
}

/// A brick.
pub struct Brick {
    slot: usize,
    /// Its process, if it runs.
    pub replica: Option<Replica>,
    /// Counts starts and ends of the process.
    pub generation: u64,
    /// The kernel's boot id.
    pub boot: BootId,
    /// Of the present start.
    pub incarnation: Incarnation,
    /// Its disk.
    pub disk: Disk,
    /// Log entries applied, durably.
    pub applied: usize,
    /// It does nothing until then.
    pub paused_until: u64,
    /// Its next start comes anyway.
    pub will_start: bool,
    /// The connection of each client that is served.
    pub accepted: Vec<u64>,
    waiting: Vec<(Wire, u64)>,
    pulls: BTreeMap<u64, Job>,
    task: Option<Task>,
    clearing: bool,
    registration: Registration,
    /// It is stopping cleanly, since then.
    pub stopping: Option<u64>,
    stop_flushing: bool,
    /// Its next flush fails.
    pub flush_fails: bool,
    /// Writes fail for want of space.
    pub full: bool,
    clock_offset: u64,
    /// How fast its clock runs, in thousandths.
    pub clock_permille: u64,
    ticks: u64,
}

impl Brick {
    /// A brick that has not started.
    #[must_use]
    pub fn new(index: usize, geometry: Geometry, incarnation: Incarnation, boot: BootId) -> Self {
        Self {
            slot: index,
            replica: None,
            generation: 0,
            boot,
            incarnation,
            disk: Disk::new(geometry),
            applied: 0,
            paused_until: 0,
            will_start: false,
            accepted: vec![0; super::world::CLIENTS + 1],
            waiting: Vec::new(),
            pulls: BTreeMap::new(),
            task: None,
            clearing: false,
            registration: Registration { incarnation, boot, clean: false },
            stopping: None,
            stop_flushing: false,
            flush_fails: false,
            full: false,
            clock_offset: index as u64 * 7_000,
            clock_permille: 1000,
            ticks: 0,
        }
    }
    /// Its process runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.replica.is_some()
    }
    /// Its process still is the one with this number.
    #[must_use]
    pub fn runs(&self, generation: u64) -> bool {
        self.is_up() && self.generation == generation
    }
}

impl World {
    /// The brick's own clock.
    #[must_use]
    pub fn brick_now(&self, s: usize) -> u64 {
        self.now * self.bricks[s].clock_permille / 1000 + self.bricks[s].clock_offset
    }
    fn disk_delay(&mut self) -> u64 {
        self.rng.delay(self.disk_ms, self.disk_ms * 15)
    }
    fn later(&mut self, s: usize, delay_ms: u64, step: Step) {
        let generation = self.bricks[s].generation;
        self.after(delay_ms, Happening::Step(s, generation, step));
    }
    fn replica(&mut self, s: usize) -> &mut Replica {
        self.bricks[s].replica.as_mut().expect("only running bricks are asked")
    }

    pub(super) fn start_brick(&mut self, s: usize) {
        let first = self.bricks[s].generation == 0;
        let incarnation = if first { self.bricks[s].incarnation } else { Incarnation(self.number()) };
        let brick = &mut self.bricks[s];
        brick.will_start = false;
        if brick.replica.is_some() {
            return;
        }
        brick.generation += 1;
        brick.incarnation = incarnation;
        brick.registration = Registration { incarnation, boot: brick.boot, clean: brick.disk.clean };
        brick.disk.record_clean(false);
        let replica = Replica::new(BrickId(s as u64 + 10), slot(s), incarnation, brick.disk.recorded());
        brick.replica = Some(replica);
        brick.stopping = None;
        brick.stop_flushing = false;
        brick.flush_fails = false;
        brick.full = false;
        let generation = brick.generation;
        let registration = brick.registration;
        self.note(|| format!("b{s} starts {registration:?}"));
        // The log's state as this server had applied it durably.
        let applied = self.bricks[s].applied;
        let mut configuration = None;
        let mut leases = BTreeMap::new();
        for effect in self.leader.log.entries[..applied].iter().flatten() {
            match effect {
                Effect::Configured { configuration: c, .. } => configuration = Some(*c),
                Effect::Leased { ino, epoch, holder, .. } => {
                    leases.insert(*ino, (*epoch, *holder));
                }
                _ => {}
            }
        }
        if let Some(c) = configuration {
            let entered = self.replica(s).configured(c, None);
            debug_assert!(entered.is_empty());
        }
        for (ino, (epoch, holder)) in leases {
            self.replica(s).leased(ino, epoch, holder);
        }
        self.replica(s).applied(LogIndex(applied as u64));
        self.after(0, Happening::Apply(s, generation));
        self.after(1, Happening::BrickTick(s, generation));
    }

    /// The process ends, one way or another.
    pub(super) fn stop_brick(&mut self, s: usize, power: bool, down_ms: u64) {
        if power {
            let boot = BootId(u128::from(self.number()));
            let (brick, rng) = (&mut self.bricks[s], &mut self.rng);
            brick.boot = boot;
            brick.disk.lose_power(rng);
        }
        let brick = &mut self.bricks[s];
        if brick.replica.take().is_some() {
            brick.generation += 1;
        }
        brick.waiting.clear();
        brick.pulls.clear();
        brick.task = None;
        brick.clearing = false;
        brick.paused_until = 0;
        brick.accepted.iter_mut().for_each(|a| *a = 0);
        if !brick.will_start {
            brick.will_start = true;
            self.after(down_ms, Happening::Start(s));
        }
        for client in 0..self.clients.len() {
            let number = self.clients[client].links[s];
            if number != 0 {
                let noticed = if power { self.rng.between(100, 2500) } else { self.rng.between(0, 50) };
                self.after(noticed, Happening::LinkBroken(Connection { client, slot: s, number }));
            }
        }
    }

    pub(super) fn apply_log(&mut self, s: usize) {
        if self.cut_until(Node::Leader, Node::Brick(s)).is_some() {
            return;
        }
        let mut applied = false;
        while self.bricks[s].applied < self.leader.log.entries.len() {
            // Entries come one by one, and now and then a while apart.
            if self.rng.chance(150) {
                let (generation, delay) = (self.bricks[s].generation, self.rng.delay(self.delay_ms, 1500));
                self.after(delay, Happening::Apply(s, generation));
                break;
            }
            let behind = self.leader.log.entries.len() - self.bricks[s].applied;
            // One that lags gets the state that several entries add up to.
            let many = if behind > 3 && self.rng.chance(300) { 1 + self.rng.index(behind) } else { 1 };
            let index = self.bricks[s].applied + many - 1;
            let effects = self.effects_of(s, index, many);
            for effect in effects {
                match effect {
                    Effect::Configured { configuration, cold_start, .. } => {
                        for (x, ino, regions) in self.replica(s).configured(configuration, cold_start) {
                            self.bricks[s].disk.record_missed(x, ino, regions);
                        }
                        for (x, ino) in self.replica(s).forget_missed_of_in_sync() {
                            self.bricks[s].disk.forget_all_missed(x, ino);
                        }
                        self.note(|| format!("b{s} applies n={}", configuration.n));
                    }
                    Effect::Leased { ino, epoch, holder, .. } => {
                        self.replica(s).leased(ino, epoch, holder);
                        self.note(|| format!("b{s} applies {ino:?} e={epoch} holder={holder}"));
                    }
                    _ => {}
                }
            }
            self.bricks[s].applied = index + 1;
            self.replica(s).applied(LogIndex(index as u64 + 1));
            applied = true;
        }
        if applied {
            self.ask_again(s);
        }
    }

    /// What the `many` entries up to `index` change for a brick.
    fn effects_of(&self, s: usize, index: usize, many: usize) -> Vec<Effect> {
        let all = self.leader.log.entries[index + 1 - many..=index].iter().flatten();
        if many == 1 {
            return all.cloned().collect();
        }
        let (mut configured, mut source, mut leases) = (None, None, BTreeMap::new());
        for effect in all {
            match effect {
                Effect::Configured { configuration, cold_start, .. } => {
                    let me = configuration.members[s];
                    if me.state != BrickState::InSync || me.incarnation != self.bricks[s].incarnation {
                        source = None;
                    } else if *cold_start == Some(slot(s)) {
                        source = *cold_start;
                    }
                    configured = Some(effect.clone());
                }
                Effect::Leased { ino, .. } => {
                    leases.insert(*ino, effect.clone());
                }
                _ => {}
            }
        }
        if let Some(Effect::Configured { cold_start, .. }) = &mut configured {
            *cold_start = source;
        }
        configured.into_iter().chain(leases.into_values()).collect()
    }

    pub(super) fn beat_answered(&mut self, s: usize, sent_ms: u64, commit: LogIndex, agree: bool) {
        let replica = self.replica(s);
        if agree {
            replica.agree_to_out();
        }
        replica.lease_answered(sent_ms + TIMING.read_lease_ms, commit);
        if agree {
            self.note(|| format!("b{s} agrees to its Out"));
        }
    }

    pub(super) fn brick_tick(&mut self, s: usize) {
        self.apply_log(s);
        let now = self.now;
        let late: Vec<Wire> = self.bricks[s].waiting.iter().filter(|w| w.1 <= now).map(|w| w.0).collect();
        self.bricks[s].waiting.retain(|w| w.1 > now);
        for wire in late {
            self.answer(s, wire, Answer::Behind, None);
        }
        self.bricks[s].ticks += 1;
        if self.bricks[s].ticks.is_multiple_of(4) {
            self.beat(s);
        }
        self.plan(s);
        self.clear_intents(s);
        self.stop_cleanly(s);
    }

    fn beat(&mut self, s: usize) {
        let sent_ms = self.brick_now(s);
        let brick = &self.bricks[s];
        let Some(replica) = &brick.replica else { return };
        let report = replica.report();
        let beat = Beat {
            brick: replica.brick(),
            registration: brick.registration,
            agreed: replica.has_agreed(),
            failed: replica.has_failed(),
            stopping: brick.stopping.is_some(),
            n: report.map_or(ConfigNo(0), |r| r.n),
            missed_empty: report.map_or(Slots::NONE, |r| r.missed_empty),
            repaired: report.is_some_and(|r| r.repaired),
        };
        let generation = brick.generation;
        let message = ToLeader::Beat { slot: s, generation, sent_ms, beat };
        self.send(Node::Brick(s), Node::Leader, false, Happening::ToLeader(message));
    }

    // -- requests ------------------------------------------------------------------------------------------------------

    pub(super) fn answer(&mut self, s: usize, wire: Wire, answer: Answer, content: Option<Content>) {
        let c = wire.connection;
        if self.bricks[s].accepted[c.client] != c.number {
            return;
        }
        self.note(|| format!("b{s} -> c{} {:?} {answer:?} {content:?}", c.client, wire.request.body));
        let happening = Happening::Answer { connection: c, ino: wire.ino, id: wire.request.id, answer, content };
        self.send(Node::Brick(s), Node::Client(c.client), true, happening);
    }

    fn stamp(wire: &Wire) -> Stamp {
        let r = &wire.request;
        Stamp { n: r.n, epoch: r.epoch, session: wire.session, seq: r.seq, stable: r.stable, settled: r.settled }
    }

    /// A new connection of a client ends the older one before it is served [F3].
    pub(super) fn accept(&mut self, s: usize, client: usize, number: u64) {
        self.bricks[s].accepted[client] = number;
        self.bricks[s].waiting.retain(|(w, _)| w.connection.client != client);
    }

    fn ask_again(&mut self, s: usize) {
        let waiting = std::mem::take(&mut self.bricks[s].waiting);
        for (wire, deadline) in waiting {
            if !self.try_request(s, wire) {
                self.bricks[s].waiting.push((wire, deadline));
            }
        }
    }

    pub(super) fn request(&mut self, wire: Wire) {
        let s = wire.connection.slot;
        if !self.try_request(s, wire) {
            let deadline = self.now + WAIT_MS;
            self.bricks[s].waiting.push((wire, deadline));
        }
    }

    /// False: it has to wait.
    fn try_request(&mut self, s: usize, wire: Wire) -> bool {
        let now = self.brick_now(s);
        let size = self.bricks[s].disk.size(wire.ino);
        let purpose = match wire.request.body {
            Body::Read(_) | Body::Stat | Body::Seek { .. } => {
                if self.replica(s).may_read(now) {
                    let delay = self.disk_delay();
                    self.later(s, delay, Step::Read(wire));
                } else {
                    self.answer(s, wire, Answer::Behind, None);
                }
                return true;
            }
            Body::Mutate(_, Mutation::Write { offset, length }) => {
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
            Body::Note { range, sized } => Purpose::Note { range, sized },
            Body::RepairList(_) | Body::ClearMissed { .. } => Purpose::Repair,
        };
        let stamp = Self::stamp(&wire);
        let admission = self.replica(s).admit(wire.ino, &stamp, purpose, now);
        let mut job =
            Job { wire, purpose, ticket: None, missed: Vec::new(), sized: false, applied: true, answer: Answer::Done };
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
                job.ticket = Some(ticket);
                job.missed = bookkeeping.missed;
                if bookkeeping.intents.is_empty() {
                    self.touch_data(s, job);
                } else {
                    let delay = self.disk_delay();
                    // The records of what is never acknowledged may be durable as well.
                    self.later(s, delay, Step::Intents(job, bookkeeping.intents));
                }
            }
        }
        true
    }

    fn touch_data(&mut self, s: usize, mut job: Job) {
        let delay = self.disk_delay();
        match job.wire.request.body {
            Body::Mutate(..) => self.later(s, delay, Step::Data(job, 0)),
            Body::Pull { from, .. } => {
                let number = self.number();
                let ask = Peer::Ask(number, job.wire);
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
                self.bricks[s].disk.forget_missed(x, ino, region..region + 1);
                self.done(s, job);
            }
            _ => self.record_missed(s, job),
        }
    }

    fn record_missed(&mut self, s: usize, job: Job) {
        if job.missed.is_empty() {
            self.done(s, job);
        } else {
            let delay = self.disk_delay();
            self.later(s, delay, Step::Missed(job));
        }
    }

    fn done(&mut self, s: usize, job: Job) {
        if let Some(ticket) = job.ticket {
            let now = self.brick_now(s);
            self.replica(s).finish(ticket, job.purpose, job.sized, job.applied, now);
            if let (Body::Pull { range, size, doubt: None, .. }, true) = (job.wire.request.body, job.applied) {
                let region = if size {
                    mortar_proto::types::SIZE_REGION
                } else {
                    range.start / mortar_proto::types::REGION_BYTES
                };
                self.replica(s).pulled_region(job.wire.ino, region);
            }
        }
        self.answer(s, job.wire, job.answer, None);
        self.ask_again(s);
    }

    pub(super) fn step(&mut self, s: usize, step: Step) {
        match step {
            Step::Intents(job, extents) => {
                let now = self.brick_now(s);
                self.bricks[s].disk.record_intents(job.wire.ino, &extents);
                self.replica(s).intents_recorded(job.wire.ino, extents, now);
                self.touch_data(s, job);
            }
            Step::Data(job, from) => self.write_data(s, job, from),
            Step::Missed(job) => {
                for (x, regions) in job.missed.clone() {
                    self.bricks[s].disk.record_missed(x, job.wire.ino, regions.clone());
                    self.replica(s).missed_recorded(x, job.wire.ino, regions);
                }
                self.done(s, job);
            }
            Step::Flushed(mut job, upto) => {
                if self.bricks[s].flush_fails {
                    self.count("flush failed");
                    self.replica(s).fail();
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
                for (ino, extents) in files {
                    self.bricks[s].disk.flushed(ino, upto);
                    let cleared = self.replica(s).clear_intents(ino, &extents, began_ms);
                    self.note(|| format!("b{s} clears intents {ino:?} {cleared:?}"));
                    self.bricks[s].disk.forget_intents(ino, &cleared);
                }
                self.bricks[s].clearing = false;
            }
            Step::TakenOver(n, missed) => {
                for (x, ino, regions) in missed {
                    self.bricks[s].disk.record_missed(x, ino, regions.clone());
                    self.replica(s).missed_recorded(x, ino, regions);
                }
                let upto = self.bricks[s].disk.written();
                let delay = self.disk_delay();
                self.later(s, delay, Step::Repaired(n, upto));
            }
            Step::Repaired(n, upto) => {
                for ino in self.bricks[s].disk.files() {
                    self.bricks[s].disk.flushed(ino, upto);
                }
                let done = self.replica(s).repaired(n);
                self.note(|| format!("b{s} repaired under n={n}: {done}"));
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
            Step::Stop(upto) => {
                let now = self.brick_now(s);
                for ino in self.bricks[s].disk.files() {
                    self.bricks[s].disk.flushed(ino, upto);
                }
                for (ino, extents) in self.replica(s).clearable_intents(now, 0) {
                    let cleared = self.replica(s).clear_intents(ino, &extents, u64::MAX);
                    self.bricks[s].disk.forget_intents(ino, &cleared);
                }
                self.bricks[s].disk.record_clean(true);
                self.count("clean stop");
                self.note(|| format!("b{s} stopped cleanly"));
                let down = self.rng.between(50, 2000);
                self.stop_brick(s, false, down);
            }
        }
    }

    fn serve_read(&mut self, s: usize, wire: Wire) {
        let content = self.bricks[s].disk.content(wire.ino);
        let answer = match wire.request.body {
            Body::Read(_) => Answer::Bytes,
            Body::Stat => Answer::Stat(Stat { size: content.size, blocks: 0, mtime_ns: 0 }),
            _ => Answer::Seek(None),
        };
        self.answer(s, wire, answer, Some(content));
    }

    fn write_data(&mut self, s: usize, mut job: Job, from: usize) {
        let ino = job.wire.ino;
        let Some(op) = mutation_of(&job.wire.request) else { return };
        if from == 0 {
            self.mutation_accepted(s, &job.wire);
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
                        let delay = self.disk_delay();
                        self.later(s, delay, Step::Data(job, i + 1));
                        return;
                    }
                }
            }
            Body::Mutate(_, Mutation::Truncate { size }) => job.sized = self.bricks[s].disk.set_size(ino, size),
            _ => {}
        }
        self.note(|| format!("b{s} wrote {} of {ino:?}, sized={}", op.0, job.sized));
        if self.rng.chance(50) {
            self.tempt(Some(job.wire.connection.client), &[0, 1, 2]);
        }
        self.also_missed(s, &mut job);
        self.record_missed(s, job);
    }

    fn also_missed(&mut self, s: usize, job: &mut Job) {
        if let (Some(ticket), Purpose::Mutate { range }) = (job.ticket, job.purpose) {
            let more = self.replica(s).also_missed(ticket, range, job.sized);
            job.missed.extend(more);
        }
    }

    fn write_pulled(&mut self, s: usize, mut job: Job, content: Content) {
        let ino = job.wire.ino;
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
            let blocks: Vec<usize> = self.geometry.blocks(range).collect();
            for block in blocks {
                self.bricks[s].disk.write(ino, block, content.blocks[block]);
            }
            job.sized = size;
            self.note(|| {
                format!("b{s} pulled {ino:?} {range:?} size={size} from b{} doubt={doubt:?} {content:?}", from.0)
            });
        }
        self.record_missed(s, job);
    }

    fn pull_failed(&mut self, s: usize, mut job: Job) {
        job.applied = false;
        job.answer = Answer::SourceFailed;
        self.done(s, job);
    }

    // -- brick to brick ------------------------------------------------------------------------------------------------

    fn say(&mut self, from: usize, to: usize, message: Peer) {
        let generation = self.bricks[from].generation;
        self.send(Node::Brick(from), Node::Brick(to), false, Happening::Peer { from, to, generation, message });
    }

    pub(super) fn peer(&mut self, from: usize, s: usize, message: Peer) {
        match message {
            Peer::Ask(number, wire) => {
                let now = self.brick_now(s);
                let stamp = Self::stamp(&wire);
                let content = match self.replica(s).admit(wire.ino, &stamp, Purpose::Source, now) {
                    Admission::Apply(ticket, _) => {
                        self.replica(s).finish(ticket, Purpose::Source, false, true, now);
                        Some(self.bricks[s].disk.content(wire.ino))
                    }
                    _ => None,
                };
                self.say(s, from, Peer::Data(number, content));
            }
            Peer::Data(number, content) => {
                let Some(job) = self.bricks[s].pulls.remove(&number) else { return };
                match content {
                    Some(content) => {
                        let delay = self.disk_delay();
                        self.later(s, delay, Step::Pulled(job, content));
                    }
                    None => self.pull_failed(s, job),
                }
            }
            Peer::AskLists(number, n) => {
                let replica = self.replica(s);
                let ready = replica.report().is_some_and(|r| r.n == n) && replica.state() == BrickState::InSync;
                let lists = ready.then(|| Lists {
                    intents: replica.intents(),
                    missed: Slot::ALL
                        .into_iter()
                        .flat_map(|x| replica.missed(x).into_iter().map(move |(ino, set)| (x, ino, set)))
                        .collect(),
                });
                self.say(s, from, Peer::Lists(number, lists));
            }
            Peer::Lists(number, lists) => self.listed(s, from, number, lists),
        }
    }

    /// Makes the plan, or comes to the end of repair, whichever is due [S1], [S4].
    fn plan(&mut self, s: usize) {
        if self.bricks[s].task.is_some() {
            return;
        }
        let replica = self.replica(s);
        let (kind, n, from) = match (replica.plan_due(), replica.finish_due()) {
            (Some((n, from)), _) => (TaskKind::Plan, n, from),
            (None, Some((n, from))) => (TaskKind::Finish, n, from),
            (None, None) => return,
        };
        let number = self.number();
        self.bricks[s].task = Some(Task { number, kind, n, left: from, lists: Vec::new() });
        self.later(s, 1000, Step::TaskLate(number));
        for source in from.iter() {
            self.say(s, source.index(), Peer::AskLists(number, n));
        }
        self.task_ready(s);
    }

    fn listed(&mut self, s: usize, from: usize, number: u64, lists: Option<Lists>) {
        let Some(task) = self.bricks[s].task.as_mut().filter(|t| t.number == number) else { return };
        match lists {
            Some(lists) => {
                task.left.remove(slot(from));
                task.lists.push(lists);
                self.task_ready(s);
            }
            None => self.bricks[s].task = None,
        }
    }

    fn task_ready(&mut self, s: usize) {
        let Some(task) = self.bricks[s].task.as_ref().filter(|t| t.left.is_empty()).cloned() else { return };
        match task.kind {
            TaskKind::Plan => {
                let intents: Vec<_> = task.lists.into_iter().flat_map(|l| l.intents).collect();
                let planned = self.replica(s).plan(task.n, &intents);
                self.note(|| format!("b{s} plans under n={}: {planned} {intents:?}", task.n));
                self.bricks[s].task = None;
            }
            TaskKind::Finish => {
                let missed: Vec<_> = task.lists.into_iter().flat_map(|l| l.missed).collect();
                if missed.iter().any(|(x, _, _)| x.index() == s) {
                    self.bricks[s].task = None;
                    return;
                }
                let all = missed.iter().flat_map(|(x, ino, set)| set.iter().map(move |r| (*x, *ino, r))).collect();
                let delay = self.disk_delay();
                self.later(s, delay, Step::TakenOver(task.n, all));
                if let Some(task) = self.bricks[s].task.as_mut() {
                    // It is not late from here on.
                    task.number = 0;
                }
            }
        }
    }

    // -- tidying -------------------------------------------------------------------------------------------------------

    fn clear_intents(&mut self, s: usize) {
        if self.bricks[s].clearing || !self.rng.chance(200) {
            return;
        }
        let now = self.brick_now(s);
        let files = self.replica(s).clearable_intents(now, INTENT_IDLE_MS);
        if !files.is_empty() {
            self.bricks[s].clearing = true;
            let upto = self.bricks[s].disk.written();
            let delay = self.disk_delay();
            self.later(s, delay, Step::Clear(files, now, upto));
        }
    }

    fn stop_cleanly(&mut self, s: usize) {
        let Some(since) = self.bricks[s].stopping else { return };
        let replica = self.replica(s);
        replica.agree_to_out();
        let ready = replica.state() == BrickState::Out && replica.is_drained();
        if ready && !self.bricks[s].stop_flushing {
            self.bricks[s].stop_flushing = true;
            let upto = self.bricks[s].disk.written();
            let delay = self.disk_delay();
            self.later(s, delay, Step::Stop(upto));
        } else if since + 5000 <= self.now && !self.bricks[s].stop_flushing {
            // It cannot be spared: it ends all the same, uncleanly.
            let down = self.rng.between(50, 2000);
            self.stop_brick(s, false, down);
        }
    }

    /// For [`Brick::slot`], so that a brick knows its place.
    #[must_use]
    pub fn place(&self, s: usize) -> usize {
        self.bricks[s].slot
    }
}
