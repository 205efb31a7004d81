//! A brick's process: the real [`Replica`] around a virtual disk. Does what `brickd` does, in the order in which it does it:
//! intents durable, data, missed regions durable, finish, answer; any of these takes time, and the process may die between
//! any two of them.

use std::collections::BTreeMap;
use std::ops::Range;

use mortar_proto::coordinator::Answer;
use mortar_proto::interval::IntervalSet;
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::metadata::Effect;
use mortar_proto::metadata::command::Registration;
use mortar_proto::metadata::monitor::Beat;
use mortar_proto::replica::{Purpose, Replica, Ticket};
use mortar_proto::types::{BootId, BrickId, ConfigNo, Ino, LogIndex};
use mortar_proto::{BrickState, Configuration, Incarnation, Slot, Slots};

use super::disk::{Content, Disk, Geometry};
use super::leader::ToLeader;
use super::quorum::lease_of;
use super::world::{Connection, Happening, Node, Wire, World, slot};

/// How long a probe of the disk may take.
const PROBE_MS: u64 = 3000;

/// A request under way.
#[derive(Clone, Debug)]
pub struct Job {
    pub(super) wire: Wire,
    pub(super) purpose: Purpose,
    pub(super) ticket: Option<Ticket>,
    pub(super) missed: Vec<(Slot, Range<u64>)>,
    pub(super) sized: bool,
    pub(super) applied: bool,
    pub(super) answer: Answer,
    /// The sources that a pull has asked.
    pub(super) tried: Slots,
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
    /// The last flush of a clean stop has ended: it began at this write, and then.
    Stop(u64, u64),
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
    pub(super) data: Vec<(Ino, Vec<u64>)>,
    pub(super) intents: Vec<(Ino, Vec<u64>)>,
    pub(super) missed: Vec<(Slot, Ino, IntervalSet)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TaskKind {
    Plan,
    Finish,
}

/// Planning, or finishing, under way.
#[derive(Clone, Debug)]
pub(super) struct Task {
    pub(super) number: u64,
    pub(super) kind: TaskKind,
    pub(super) n: ConfigNo,
    pub(super) left: Slots,
    pub(super) lists: Vec<Lists>,
}

/// A brick.
pub struct Brick {
    /// Its number in the log.
    pub id: BrickId,
    /// Which voter it believes to lead.
    pub voter: usize,
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
    /// Its last stop was unclean, and it has not settled yet what does not match its checksums `[S3]`.
    pub has_doubts: bool,
    /// Its disk was exchanged: there is no brick in its directory.
    pub disk_is_new: bool,
    /// Its disk was exchanged for an older copy, and it has not started since.
    pub disk_is_old: bool,
    /// The stamp that its server remembers, and when it was raised last.
    pub seen: u64,
    pub(super) raised_ms: u64,
    /// Log entries applied, durably.
    pub applied: usize,
    /// It does nothing until then.
    pub paused_until: u64,
    /// Its next start comes anyway.
    pub will_start: bool,
    /// The connection of each client that is served.
    pub accepted: Vec<u64>,
    pub(super) waiting: Vec<(Wire, u64)>,
    pub(super) pulls: BTreeMap<u64, Job>,
    pub(super) task: Option<Task>,
    pub(super) clearing: bool,
    pub(super) registration: Registration,
    /// It is stopping cleanly, since then.
    pub stopping: Option<u64>,
    pub(super) stop_flushing: bool,
    /// It takes no more requests, for it stops.
    pub(super) closed: bool,
    /// It was `InSync` since it started.
    pub(super) was_in_sync: bool,
    /// Its next flush fails.
    pub flush_fails: bool,
    /// Its disk has refused something since its machine was started.
    pub has_lost: bool,
    /// Writes fail for want of space.
    pub full: bool,
    /// Its next read fails.
    pub read_fails: bool,
    /// Its next write fails.
    pub write_fails: bool,
    /// Its file system takes no writes any more, until it is mounted anew.
    pub read_only: bool,
    /// Its disk is slow until then.
    pub slow_until: u64,
    /// Its disk does nothing until then.
    pub hung_until: u64,
    hung_since: Option<u64>,
    /// What its clock is ahead.
    pub clock_offset: u64,
    /// How fast its clock runs, in thousandths.
    pub clock_permille: u64,
    ticks: u64,
}

impl Brick {
    /// A brick that has not started.
    #[must_use]
    pub fn new(index: usize, geometry: Geometry, id: BrickId) -> Self {
        let (incarnation, boot) = (Incarnation(index as u64 + 1), BootId(index as u128 + 1));
        Self {
            id,
            voter: 0,
            replica: None,
            generation: 0,
            boot,
            incarnation,
            disk: Disk::new(geometry),
            has_doubts: false,
            disk_is_new: false,
            disk_is_old: false,
            seen: 0,
            raised_ms: 0,
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
            closed: false,
            was_in_sync: false,
            flush_fails: false,
            has_lost: false,
            full: false,
            read_fails: false,
            write_fails: false,
            read_only: false,
            slow_until: 0,
            hung_until: 0,
            hung_since: None,
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
    /// What it had is not on its disk.
    #[must_use]
    pub fn has_no_disk(&self) -> bool {
        self.disk_is_new || self.disk_is_old
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
    /// How long a disk takes for something.
    pub(super) fn disk_delay(&mut self, s: usize) -> u64 {
        let delay = self.rng.delay(self.disk_ms, self.disk_ms * 15);
        let brick = &self.bricks[s];
        let slower = if brick.slow_until > self.now { delay * 10 } else { delay };
        slower + brick.hung_until.saturating_sub(self.now)
    }
    /// The disk refuses something [E4]: what was not flushed may be gone, or only look as if it were there [W8].
    pub(super) fn lose(&mut self, s: usize) {
        if !left_out(Rule::W8Again) {
            self.bricks[s].boot = BootId(u128::from(self.number()));
        }
        self.bricks[s].has_lost = true;
        self.replica(s).fail();
    }
    /// A disk that hangs, as the probe finds out [E4].
    fn probe_disk(&mut self, s: usize) {
        let brick = &mut self.bricks[s];
        if brick.hung_until <= self.now {
            brick.hung_since = None;
        } else if *brick.hung_since.get_or_insert(self.now) + PROBE_MS <= self.now && !self.replica(s).has_failed() {
            self.event(|| format!("b{s} finds that its disk hangs"));
            self.replica(s).fail();
        }
    }
    pub(super) fn later(&mut self, s: usize, delay_ms: u64, step: Step) {
        let generation = self.bricks[s].generation;
        self.after(delay_ms, Happening::Step(s, generation, step));
    }
    pub(super) fn replica(&mut self, s: usize) -> &mut Replica {
        self.bricks[s].replica.as_mut().expect("only running bricks are asked")
    }

    pub(super) fn start_brick(&mut self, s: usize) {
        let first = self.bricks[s].generation == 0;
        let incarnation = if first { self.bricks[s].incarnation } else { Incarnation(self.number()) };
        self.bricks[s].will_start = false;
        if self.bricks[s].replica.is_some() {
            return;
        }
        self.look_at_disk(s);
        if self.waits_for_a_disk(s) {
            return;
        }
        let boot = BootId(u128::from(self.number()));
        let brick = &mut self.bricks[s];
        brick.generation += 1;
        brick.incarnation = incarnation;
        if brick.read_only {
            // Mounted anew: what was not flushed is gone.
            brick.boot = boot;
            self.lose_what_is_cached(s);
        } else if std::mem::take(&mut brick.has_lost) {
            brick.disk.evict(&mut self.rng);
            if !left_out(Rule::W8Again) {
                brick.disk.write_again();
            }
        }
        self.lost_unflushed(s);
        let brick = &mut self.bricks[s];
        brick.has_doubts = !brick.disk.clean;
        brick.registration = Registration { incarnation, boot: brick.boot, clean: brick.disk.clean };
        brick.disk.record_clean(false);
        // The record of the clean stop goes with that, so something was changed.
        brick.disk.raise_stamp();
        brick.seen = brick.disk.stamp();
        let replica = Replica::new(brick.id, slot(s), incarnation, brick.disk.recorded());
        brick.replica = Some(replica);
        brick.stopping = None;
        brick.stop_flushing = false;
        brick.closed = false;
        brick.was_in_sync = false;
        brick.flush_fails = false;
        brick.full = false;
        brick.read_fails = false;
        brick.write_fails = false;
        brick.read_only = false;
        let generation = brick.generation;
        let registration = brick.registration;
        self.event(|| format!("b{s} starts {registration:?}"));
        // Its server goes through the log once more, from its last snapshot on.
        let snapshot =
            if self.rng.chance(500) { self.bricks[s].applied } else { self.rng.index(self.bricks[s].applied + 1) };
        self.bricks[s].applied = 0;
        if snapshot > 0 {
            self.take_whole(s, snapshot);
        }
        if self.quorum.together && !self.quorum.voters[s].up {
            self.start_voter(s);
        }
        self.after(0, Happening::Apply(s, generation));
        self.after(1, Happening::BrickTick(s, generation));
    }

    /// The page cache of a brick's server is gone.
    fn lose_what_is_cached(&mut self, s: usize) {
        for torn in self.bricks[s].disk.lose_power(&mut self.rng, &mut self.tears) {
            self.count("torn block");
            self.history.torn(torn, false);
        }
    }

    /// The process ends, one way or another.
    pub(super) fn stop_brick(&mut self, s: usize, power: bool, down_ms: u64) {
        if power {
            let boot = BootId(u128::from(self.number()));
            self.lose_what_is_cached(s);
            let (brick, rng) = (&mut self.bricks[s], &mut self.rng);
            brick.boot = boot;
            brick.has_lost = false;
            if left_out(Rule::F2Durable) {
                brick.applied = rng.between(brick.applied.saturating_sub(8) as u64, brick.applied as u64) as usize;
            }
        }
        self.end_process(s);
        if !self.bricks[s].will_start {
            self.bricks[s].will_start = true;
            self.after(down_ms, Happening::Start(s));
        }
        if self.quorum.together {
            self.stop_voter(s);
        }
        self.break_links(s, power);
    }

    pub(super) fn end_process(&mut self, s: usize) {
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
    }

    pub(super) fn break_links(&mut self, s: usize, power: bool) {
        for client in 0..self.clients.len() {
            let number = self.clients[client].links[s];
            if number != 0 {
                let noticed = if power { self.rng.between(100, 2500) } else { self.rng.between(0, 50) };
                self.after(noticed, Happening::LinkBroken(Connection { client, slot: s, number }));
            }
        }
    }

    pub(super) fn apply_log(&mut self, s: usize) {
        let Some(leads) = self.quorum.leads else { return };
        if !self.quorum.voters[leads].up || self.cut_until(Node::Voter(leads), Node::Brick(s)).is_some() {
            return;
        }
        let mut applied = false;
        while self.bricks[s].applied < self.quorum.entries.len() {
            // Entries come one by one, and now and then a while apart.
            if self.rng.chance(150) {
                let (generation, delay) = (self.bricks[s].generation, self.rng.delay(self.delay_ms, 1500));
                self.after(delay, Happening::Apply(s, generation));
                break;
            }
            let behind = self.quorum.entries.len() - self.bricks[s].applied;
            // One that lags gets a snapshot.
            let is_whole = behind > 3 && self.rng.chance(300);
            let index = self.bricks[s].applied + if is_whole { 1 + self.rng.index(behind) } else { 1 };
            if let Some(other) = self.replaced_by(s, index) {
                return self.begin_anew(s, other, index);
            }
            if is_whole {
                self.take_whole(s, index);
            } else {
                self.take_entry(s);
            }
            applied = true;
        }
        if applied {
            self.ask_again(s);
        }
    }

    /// The next entry.
    fn take_entry(&mut self, s: usize) {
        let index = self.bricks[s].applied;
        for effect in self.quorum.entries[index].effects.clone() {
            match effect {
                Effect::Configured { configuration, cold_start, .. } => self.configured(s, configuration, cold_start),
                Effect::Leased { ino, epoch, holder, .. } => {
                    self.replica(s).leased(ino, epoch, holder);
                    self.note(|| format!("b{s} applies {ino:?} e={epoch} holder={holder}"));
                }
                Effect::Reclaimed { ino, .. } => self.replica(s).reclaimed(ino),
                _ => {}
            }
        }
        self.bricks[s].applied = index + 1;
        self.replica(s).applied(LogIndex(index as u64 + 1));
    }

    /// The state as it is after so many entries.
    fn take_whole(&mut self, s: usize, index: usize) {
        let state = std::rc::Rc::clone(&self.quorum.entries[index - 1].state);
        let Some(row) = state.sets.get(&self.quorum.set) else { return };
        // [E6] A cold start with this brick as source may be among what was not told one by one.
        let known = self.replica(s).configuration().map_or(row.configuration.n, |c| c.n);
        let boot = self.bricks[s].registration.boot;
        let cold_start = row.cold_starts.iter().any(|(n, of)| *n > known && *of == boot).then_some(slot(s));
        self.configured(s, row.configuration, cold_start);
        for ino in state.inodes.keys() {
            if let Some(lease) = lease_of(&state, *ino) {
                self.replica(s).leased(*ino, lease.epoch, lease.holder.unwrap_or_default());
            }
        }
        self.note(|| format!("b{s} takes the state as of {index}"));
        self.bricks[s].applied = index;
        self.replica(s).applied(LogIndex(index as u64));
    }

    /// The brick that a slot has by the configuration that another brick has applied.
    pub(super) fn brick_in(&self, s: usize, x: Slot) -> BrickId {
        let replica = self.bricks[s].replica.as_ref();
        replica.and_then(Replica::configuration).map_or(BrickId(0), |c| c.members[x.index()].brick)
    }

    fn configured(&mut self, s: usize, configuration: Configuration, cold_start: Option<Slot>) {
        // One without this brick is from before it was made.
        let is_ours = configuration.members[s].brick == self.bricks[s].id;
        if !is_ours || self.replica(s).configuration().is_some_and(|c| c.n >= configuration.n) {
            return;
        }
        if cold_start == Some(slot(s)) && self.replica(s).state() != BrickState::InSync {
            let disk = &mut self.bricks[s].disk;
            let upto = disk.written();
            disk.files().into_iter().for_each(|ino| disk.flushed(ino, upto));
        }
        if configuration.members[s].incarnation == self.bricks[s].incarnation {
            self.settle_doubts(s, false);
        }
        self.administrator.made_source.take_if(|(source, n)| *source == s && *n <= configuration.n);
        for (x, ino, regions) in self.replica(s).configured(configuration, cold_start) {
            self.bricks[s].disk.record_missed(configuration.members[x.index()].brick, ino, regions);
        }
        for (x, ino) in self.replica(s).forget_missed_of_in_sync() {
            self.bricks[s].disk.forget_all_missed(configuration.members[x.index()].brick, ino);
        }
        for (x, ino) in self.replica(s).forget_replaced() {
            self.bricks[s].disk.forget_all_missed(x, ino);
        }
        let is_in_sync = self.replica(s).is_live() && self.replica(s).state() == BrickState::InSync;
        self.bricks[s].was_in_sync |= is_in_sync;
        self.event(|| format!("b{s} applies n={}", configuration.n));
    }

    pub(super) fn beat_answered(&mut self, s: usize, sent_ms: u64, commit: LogIndex, agree: bool) {
        let now = self.brick_now(s);
        let read_lease_ms = self.quorum.timing.read_lease_ms;
        let replica = self.replica(s);
        let from_ms = if left_out(Rule::R1Sent) { now } else { sent_ms };
        replica.lease_answered(from_ms + read_lease_ms, commit);
        if agree {
            replica.agree_to_out();
        }
        if agree {
            self.event(|| format!("b{s} agrees to its Out"));
        }
    }

    pub(super) fn brick_tick(&mut self, s: usize) {
        self.apply_log(s);
        if let Some(leads) = self.quorum.leads
            && self.cut_until(Node::Voter(leads), Node::Brick(s)).is_none()
            && self.rng.chance(300)
        {
            self.bricks[s].voter = leads;
        }
        let now = self.now;
        let late: Vec<Wire> = self.bricks[s].waiting.iter().filter(|w| w.1 <= now).map(|w| w.0).collect();
        self.bricks[s].waiting.retain(|w| w.1 > now);
        for wire in late {
            self.answer(s, wire, Answer::Behind, None);
        }
        self.bricks[s].ticks += 1;
        if self.bricks[s].ticks.is_multiple_of(2) {
            self.beat(s);
        }
        self.probe_disk(s);
        if self.bricks[s].ticks.is_multiple_of(2) {
            self.check_bounds(s);
            self.check_known_differences(s);
        }
        self.plan(s);
        self.clear_intents(s);
        self.raise_stamp(s);
        self.scrub(s);
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
            known: replica.configuration().map_or(ConfigNo(0), |c| c.n),
            agreed_under: replica.agreed_under(),
            failed: replica.has_failed(),
            stopping: brick.stopping.is_some(),
            n: report.map_or(ConfigNo(0), |r| r.n),
            missed_empty: report.map_or(Slots::NONE, |r| r.missed_empty),
            repaired: report.is_some_and(|r| r.repaired),
        };
        let (generation, voter) = (brick.generation, brick.voter);
        let message = ToLeader::Beat { slot: s, generation, sent_ms, beat };
        self.send(Node::Brick(s), Node::Voter(voter), false, Happening::ToLeader(voter, message));
    }
}
