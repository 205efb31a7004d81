//! The coordinator: what the holder of one file's lease does. A pure state machine; the mount and the janitor give it links
//! to bricks and a clock, the simulator gives it worse ones.
//!
//! It is the only sequencer of its file: mutations, reads of what is being changed, and repairs go through its one table of
//! busy ranges, so nothing that overlaps is ever in flight together (I4). It holds no payload: an operation is known by the
//! [`OpId`] under which the shell keeps its bytes and its caller.
//!
//! Keeps `[W1]`..`[W4]`, `[W6]`, `[W8]`, `[R3]`, `[R4]`, `[R5]`, `[E3]`, `[E7]`, `[S2]`; invariants I1 and I4 rest on it.
//!
//! ```text
//!            first mutation          granted             all fenced            all copied
//!   Idle ───────────────▶ Acquiring ────────▶ Fencing ─────────────▶ Recovering ─────────▶ Holding
//!    ▲                                         ▲   │ (nothing in doubt) ───────────────────▶ │ │
//!    │                                         └───┴── the configuration changed ────────────┼─┘ (only before Holding [W2])
//!    └──────────────────── recalled, lapsed, or given back when idle ◀──────────────────────┘
//! ```
//!
//! | file | owns |
//! | --- | --- |
//! | `mod` | the state, events and effects, leases |
//! | `requests` | what is outstanding at bricks; sending, failing, timing out |
//! | `mutate` | mutations and flushes `[W3]`, `[W4]`, `[W8]` |
//! | `read` | reads and questions `[R3]`, `[R4]`; what is corrupt `[R5]` |
//! | `recover` | fences and recovery `[W2]` |
//! | `repair` | resynchronisation `[S2]`, and of what is corrupt `[R5]` |

mod mutate;
mod read;
#[cfg(test)]
mod recalls;
mod recover;
mod repair;
mod requests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use crate::config::{Configuration, Slot, Slots};
use crate::interval::IntervalSet;
use crate::left_out::{Rule, left_out};
use crate::replica::Doubt;
use crate::types::{ByteRange, ConfigNo, Epoch, Ino, Seq};

/// `errno` of what fails because acknowledged writes are gone `[E7]`.
const EIO: i32 = 5;

/// Mutations of one file in flight at most (I9); more wait.
const MAX_IN_FLIGHT: usize = 256;

/// An operation of the application, numbered by the shell.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// A request to a brick, numbered by the coordinator.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// A change of a file's data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutation {
    /// Bytes, which the shell keeps.
    Write {
        /// First byte.
        offset: u64,
        /// How many, `1..=MAX_IO_BYTES`.
        length: u64,
    },
    /// A new size.
    Truncate {
        /// In bytes.
        size: u64,
    },
    /// `fallocate(2)`: allocate, punch, zero.
    Allocate {
        /// First byte.
        offset: u64,
        /// How many.
        length: u64,
        /// `FALLOC_FL_*`.
        mode: u32,
    },
    /// A new modification time.
    SetTime {
        /// Nanoseconds since 1970.
        mtime_ns: i64,
    },
}

impl Mutation {
    /// What it keeps busy, in whole blocks `[W3]`. A change of size keeps everything busy.
    #[must_use]
    pub fn busy_range(&self) -> ByteRange {
        match *self {
            Self::Write { offset, length } | Self::Allocate { offset, length, .. } => {
                ByteRange::at(offset, length).to_blocks()
            }
            Self::Truncate { .. } => ByteRange::ALL,
            Self::SetTime { .. } => ByteRange { start: u64::MAX - 1, end: u64::MAX },
        }
    }
}

/// What an application may ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// A change.
    Mutate(Mutation),
    /// Bytes; short at the end of the file.
    Read(ByteRange),
    /// `fsync(2)` `[W8]`.
    Flush,
    /// Size, blocks and time.
    Stat,
    /// `lseek(2)` with `SEEK_DATA` or, with `hole`, `SEEK_HOLE`.
    Seek {
        /// Where to begin.
        offset: u64,
        /// Which of the two.
        hole: bool,
    },
}

/// What is sent to a brick.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Body {
    /// A mutation, with the payload of the operation.
    Mutate(OpId, Mutation),
    /// `Fence` `[W2]`.
    Fence,
    /// `Flush` `[W8]`.
    Flush,
    /// Nothing but the stable seq `[W6]`.
    Settle,
    /// A read.
    Read(ByteRange),
    /// Size, blocks and time.
    Stat,
    /// `SEEK_DATA`, `SEEK_HOLE`.
    Seek {
        /// Where to begin.
        offset: u64,
        /// Which of the two.
        hole: bool,
    },
    /// Blocks that came from this brick did not verify: it looks for itself, and remembers what has to be repaired `[R5]`.
    Report {
        /// Where, in whole blocks.
        range: ByteRange,
    },
    /// Take a range (or with `size` the size) from the brick in `from`. With `doubt`: a copy of `[W2]`.
    Pull {
        /// Which bytes.
        range: ByteRange,
        /// The size instead.
        size: bool,
        /// The source.
        from: Slot,
        /// The numbers that the content stays in doubt under.
        doubt: Option<(Epoch, Seq)>,
    },
    /// Bookkeeping of a recovered range at its source `[W2]`.
    Note {
        /// Which bytes.
        range: ByteRange,
        /// The size too.
        sized: bool,
    },
    /// What must the brick in this slot get back?
    RepairList(Slot),
    /// The brick in `x` got this region back `[S2]`.
    ClearMissed {
        /// Which brick.
        x: Slot,
        /// Which region.
        region: u64,
    },
}

/// A request, ready for a brick.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Its number; the answer carries it.
    pub id: RequestId,
    /// To which brick.
    pub slot: Slot,
    /// Under which configuration.
    pub n: ConfigNo,
    /// Under which lease.
    pub epoch: Epoch,
    /// Its own number, where it runs at most once `[F3]`.
    pub seq: Seq,
    /// Everything up to here is stable `[W6]`.
    pub stable: Seq,
    /// The holder has finished `[W2]`.
    pub settled: bool,
    /// What is asked.
    pub body: Body,
}

/// What a brick answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Done.
    Done,
    /// The numbers are old; these are current.
    Stale {
        /// The configuration.
        n: ConfigNo,
        /// The lease.
        epoch: Epoch,
    },
    /// Not now: the brick lags in the log, has no read lease, or is not ready. Ask again.
    Behind,
    /// It went wrong.
    Failed {
        /// Why, as an `errno`.
        errno: i32,
        /// The brick declared itself failed `[E4]`.
        brick: bool,
    },
    /// A pull could not reach its source.
    SourceFailed,
    /// What a copy of `[W2]` was to take does not verify at its source `[R5]`.
    SourceCorrupt,
    /// To `Fence`.
    Fenced {
        /// What is in doubt there.
        in_doubt: Vec<Doubt>,
        /// The size there, in bytes.
        size: u64,
    },
    /// To `Read`: the shell has the bytes, and has verified them.
    Bytes,
    /// To `Read`: the blocks with these numbers did not match their checksums `[R5]`.
    Corrupt(IntervalSet),
    /// To `Stat`.
    Stat(Stat),
    /// To `Seek`; `None`: nothing further.
    Seek(Option<u64>),
    /// To `RepairList`.
    Regions(IntervalSet),
}

/// What the data knows of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stat {
    /// In bytes.
    pub size: u64,
    /// Allocated, in units of 512 bytes.
    pub blocks: u64,
    /// Modification time, nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// What becomes of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completion {
    /// Done.
    Done,
    /// The bytes that came with the answer being handled.
    Bytes,
    /// To `Stat`.
    Stat(Stat),
    /// To `Seek`.
    Seek(Option<u64>),
    /// Every brick refused it with this `errno`.
    Failed(i32),
    /// A block of it is corrupt on every `InSync` brick `[R5]`.
    Corrupt,
    /// It waited for bricks longer than the volume's `no-quorum` allows `[E3]`.
    NoQuorum,
    /// The lease was lost, and another session has written since: the operation may or may not have happened.
    LeaseLost,
}

/// What happens to a coordinator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The application asks for something.
    Submit(OpId, Operation),
    /// The log granted the lease. `foreign`: another session has held it since this one did.
    Granted {
        /// Under which number.
        epoch: Epoch,
        /// Whether `[W2]` has to recover.
        recover: bool,
        /// See above.
        foreign: bool,
    },
    /// The log has another configuration.
    Configured(Configuration),
    /// Somebody wants the lease with this number `[W1]`.
    Recalled(Epoch),
    /// The session lapsed or the lease is gone.
    LeaseLost,
    /// Take the lease although nothing is to be written: the janitor `[S2]`, section 7.
    Adopt,
    /// Nobody has the file open any more: give the lease back when idle.
    Forget,
    /// A brick answered.
    Answered(RequestId, Answer),
    /// The connection to a brick broke, or could not be made.
    LinkDown(Slot),
    /// There is a connection to a brick again.
    LinkUp(Slot),
    /// One region may be repaired `[S5]`.
    Permit,
    /// Time has passed.
    Tick,
}

/// What a coordinator wants done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Send this; if there is no connection, keep quiet: [`Event::LinkUp`] makes it be sent again.
    Send(Request),
    /// Tell the application.
    Complete(OpId, Completion),
    /// The operation's payload is needed no more (always after its `Complete`).
    Discard(OpId),
    /// Ask the log for the lease.
    AcquireLease,
    /// Give the lease back.
    ReleaseLease {
        /// Which grant.
        epoch: Epoch,
        /// `[W2]` had ended.
        finished: bool,
    },
    /// Tell the leader that a brick failed or does not answer `[W4]`.
    Suspect(Slot, ConfigNo),
    /// Ask the log for the configuration that is now in force.
    Refresh,
    /// Ask for an [`Event::Permit`].
    WantPermit,
    /// Acknowledged writes are gone `[E7]`: everything asked of the file fails until it is closed.
    Lost,
}

/// Times, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// A brick that has not answered for this long is reported `[W4]`.
    pub io_timeout_ms: u64,
    /// A read that has not been answered for this long is sent to a further brick `[R4]`.
    pub hedge_ms: u64,
    /// Operations that have waited for this long end in an error; `None`: they wait `[E3]`.
    pub no_quorum_ms: Option<u64>,
}

#[derive(Clone, Debug)]
enum Phase {
    Idle,
    Acquiring,
    Fencing { recover: bool, fenced: Slots, lists: [Vec<Doubt>; 3], sizes: [u64; 3] },
    Recovering(recover::Recovery),
    Holding,
}

/// Something that waits for its range, in order of arrival.
#[derive(Clone, Copy, Debug)]
enum Waiting {
    Mutation { op: OpId, mutation: Mutation, since_ms: u64 },
    Read { op: OpId, range: ByteRange, since_ms: u64 },
    Repair { x: Slot, region: u64 },
}

/// The older of two configurations, where there are any.
fn oldest(a: Option<ConfigNo>, b: Option<ConfigNo>) -> Option<ConfigNo> {
    a.into_iter().chain(b).min()
}

/// What the coordinator of one file knows.
#[derive(Clone, Debug)]
pub struct Coordinator {
    ino: Ino,
    configuration: Configuration,
    timeouts: Timeouts,
    phase: Phase,
    epoch: Epoch,
    next_seq: Seq,
    next_request: u64,
    links: Slots,
    /// Since when there is no link, as far as it was noticed.
    unlinked_ms: [Option<u64>; 3],
    waiting: VecDeque<Waiting>,
    mutations: BTreeMap<Seq, mutate::InFlight>,
    flushes: Vec<mutate::Flushing>,
    reads: BTreeMap<OpId, read::Reading>,
    outstanding: BTreeMap<RequestId, requests::Outstanding>,
    repairs: [Option<repair::Repair>; 3],
    permit_asked: bool,
    permits: u32,
    /// `InSync` bricks that are to be asked whether something on them is corrupt `[R5]`.
    doubted: Slots,
    /// When all of them are asked again.
    audit_ms: u64,
    /// Sources of `[W2]` that turned out to be corrupt, and where.
    unsound: Vec<(Slot, ByteRange)>,
    /// Mutations that were in flight when the lease was lost.
    orphans: Vec<(OpId, Mutation, u64)>,
    /// Something was written, under this lease or an earlier one, and not flushed since.
    dirty: bool,
    /// The oldest configuration under which something was acknowledged that no flush was sent for since `[E7]`.
    unflushed: Option<ConfigNo>,
    /// Acknowledged writes are gone `[E7]`.
    lost: bool,
    /// Mutations that were started so far.
    started: u64,
    /// The highest stable seq that every writable brick was told.
    told_stable: Seq,
    release_wanted: bool,
    releasing: mutate::Releasing,
    /// A mutation failed on every brick: what it left is settled as in `[W2]` before anything else starts.
    resettle: bool,
    wanted: bool,
    recalled_early: Option<Epoch>,
    last_activity_ms: u64,
    reported_ms: [Option<u64>; 3],
    refresh_ms: Option<u64>,
}

impl Coordinator {
    /// The coordinator of one file, without a lease.
    #[must_use]
    pub fn new(ino: Ino, configuration: Configuration, links: Slots, timeouts: Timeouts) -> Self {
        Self {
            ino,
            configuration,
            timeouts,
            phase: Phase::Idle,
            epoch: Epoch(0),
            next_seq: Seq(1),
            next_request: 1,
            links,
            unlinked_ms: [None; 3],
            waiting: VecDeque::new(),
            mutations: BTreeMap::new(),
            flushes: Vec::new(),
            reads: BTreeMap::new(),
            outstanding: BTreeMap::new(),
            repairs: [None, None, None],
            permit_asked: false,
            permits: 0,
            doubted: Slots::NONE,
            audit_ms: 0,
            unsound: Vec::new(),
            orphans: Vec::new(),
            dirty: false,
            unflushed: None,
            lost: false,
            started: 0,
            told_stable: Seq(0),
            release_wanted: false,
            releasing: mutate::Releasing::No,
            resettle: false,
            wanted: false,
            recalled_early: None,
            last_activity_ms: 0,
            reported_ms: [None; 3],
            refresh_ms: None,
        }
    }

    /// Which file.
    #[must_use]
    pub fn ino(&self) -> Ino {
        self.ino
    }
    /// It holds the lease and has finished `[W2]`.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        matches!(self.phase, Phase::Holding)
    }
    /// It has neither a lease nor anything to do: it may be dropped.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle)
            && self.waiting.is_empty()
            && self.mutations.is_empty()
            && self.flushes.is_empty()
            && self.reads.is_empty()
            && self.orphans.is_empty()
    }
    /// What can be read may not be durable, and the next flush sees to it.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }
    /// It holds the lease and nothing of this file is left to repair under the present configuration.
    #[must_use]
    pub fn is_repaired(&self) -> bool {
        self.is_holding()
            && self.doubted.and(self.links).is_empty()
            && self
                .configuration
                .syncing()
                .iter()
                .all(|x| self.repairs[x.index()].as_ref().is_some_and(|r| r.is_done()))
    }

    /// Changes the times.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        self.timeouts = timeouts;
    }

    /// Takes one event in, and appends what it wants done to `effects`. `now_ms` never goes back.
    pub fn handle(&mut self, event: Event, now_ms: u64, effects: &mut Vec<Effect>) {
        match event {
            Event::Submit(op, operation) => {
                self.last_activity_ms = now_ms;
                self.submit(op, operation, now_ms, effects);
            }
            Event::Granted { epoch, recover, foreign } => self.granted(epoch, recover, foreign, now_ms, effects),
            Event::Configured(configuration) => self.configured(configuration, now_ms, effects),
            Event::Recalled(epoch) => {
                if left_out(Rule::W1Recall) {
                    return;
                }
                if epoch == self.epoch && !matches!(self.phase, Phase::Idle | Phase::Acquiring) {
                    self.release_wanted = true;
                } else if epoch > self.epoch && matches!(self.phase, Phase::Idle) {
                    // [W1] A request that was sent again, or came late, was granted after its sender had what it wanted:
                    // nobody here wants this lease, or would ever give it back.
                    effects.push(Effect::ReleaseLease { epoch, finished: false });
                } else if epoch > self.epoch {
                    self.recalled_early = Some(epoch);
                }
            }
            Event::LeaseLost => self.lease_lost(effects),
            Event::Adopt => {
                self.wanted = true;
                if self.is_holding() {
                    self.doubted = self.configuration.in_sync();
                }
            }
            Event::Forget => {
                self.wanted = false;
                self.lost = false;
                if !matches!(self.phase, Phase::Idle) {
                    self.release_wanted = true;
                }
            }
            Event::Answered(id, answer) => self.answered(id, answer, now_ms, effects),
            Event::LinkDown(slot) => self.link_down(slot, now_ms, effects),
            Event::LinkUp(slot) => self.link_up(slot, now_ms, effects),
            Event::Permit => {
                self.permit_asked = false;
                self.permits += 1;
            }
            Event::Tick => self.tick(now_ms, effects),
        }
        self.advance(now_ms, effects);
        #[cfg(debug_assertions)]
        self.check();
    }

    fn submit(&mut self, op: OpId, operation: Operation, now_ms: u64, effects: &mut Vec<Effect>) {
        if self.lost {
            effects.push(Effect::Complete(op, Completion::Failed(EIO)));
            effects.push(Effect::Discard(op));
            return;
        }
        match operation {
            Operation::Mutate(mutation) => {
                self.waiting.push_back(Waiting::Mutation { op, mutation, since_ms: now_ms });
            }
            Operation::Read(range) => self.waiting.push_back(Waiting::Read { op, range, since_ms: now_ms }),
            Operation::Flush => self.start_flush(Some(op), now_ms, effects),
            Operation::Stat => self.start_read(op, Body::Stat, now_ms, effects),
            Operation::Seek { offset, hole } => self.start_read(op, Body::Seek { offset, hole }, now_ms, effects),
        }
    }

    /// Starts whatever can start now.
    fn advance(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Idle) {
            self.release_wanted = false;
            let wants = self.wanted
                || !self.orphans.is_empty()
                || self.waiting.iter().any(|w| matches!(w, Waiting::Mutation { .. }))
                || self.flushes.iter().any(|f| f.needs_lease);
            if wants {
                self.phase = Phase::Acquiring;
                effects.push(Effect::AcquireLease);
            }
        }
        self.advance_recovery(now_ms, effects);
        if matches!(self.phase, Phase::Holding) {
            self.advance_repair(now_ms, effects);
        }
        self.start_waiting(now_ms, effects);
        self.advance_release(now_ms, effects);
    }

    fn granted(&mut self, epoch: Epoch, recover: bool, foreign: bool, now_ms: u64, effects: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Acquiring) || epoch <= self.epoch {
            // An answer that nobody waits for any more: give it straight back, so that it does not stay with us unused.
            if matches!(self.phase, Phase::Idle) && epoch > self.epoch {
                self.epoch = epoch;
                effects.push(Effect::ReleaseLease { epoch, finished: false });
            }
            return;
        }
        self.epoch = epoch;
        self.next_seq = Seq(1);
        self.told_stable = Seq(0);
        self.resettle = false;
        self.unsound.clear();
        for (op, mutation, since_ms) in std::mem::take(&mut self.orphans).into_iter().rev() {
            if foreign {
                // Another session wrote in between: to write again now could put old data over newer.
                effects.push(Effect::Complete(op, Completion::LeaseLost));
                effects.push(Effect::Discard(op));
            } else {
                self.waiting.push_front(Waiting::Mutation { op, mutation, since_ms });
            }
        }
        if self.recalled_early.take_if(|e| *e <= epoch).is_some_and(|e| e == epoch) {
            self.release_wanted = true;
        }
        self.begin_fence(recover, now_ms, effects);
    }

    fn lease_lost(&mut self, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Idle | Phase::Acquiring) {
            return;
        }
        self.phase = Phase::Idle;
        self.release_wanted = false;
        self.releasing = mutate::Releasing::No;
        self.resettle = false;
        self.doubted = Slots::NONE;
        self.repairs = [None, None, None];
        self.waiting.retain(|w| !matches!(w, Waiting::Repair { .. }));
        self.outstanding.retain(|_, o| matches!(o.job, requests::Job::Read(_)));
        for (_, m) in std::mem::take(&mut self.mutations) {
            if m.answered {
                effects.push(Effect::Discard(m.op));
            } else {
                self.orphans.push((m.op, m.mutation, m.since_ms));
            }
        }
        for flush in std::mem::take(&mut self.flushes) {
            if flush.op.is_some() {
                self.flushes.push(flush.without_lease());
            } else {
                self.unflushed = oldest(self.unflushed, flush.unflushed);
            }
        }
        // What was acknowledged and not flushed is still to be flushed, under the next lease: `dirty` stays.
    }

    fn configured(&mut self, configuration: Configuration, now_ms: u64, effects: &mut Vec<Effect>) {
        if configuration.n <= self.configuration.n {
            return;
        }
        self.configuration = configuration;
        if self.has_lost() {
            return self.lose(effects);
        }
        self.reported_ms = [None; 3];
        // A brick that has just come back is given time to be connected to.
        self.unlinked_ms = [None; 3];
        self.repairs = [None, None, None];
        self.waiting.retain(|w| !matches!(w, Waiting::Repair { .. }));
        self.outstanding.retain(|_, o| {
            matches!(o.job, requests::Job::Read(_))
                || left_out(Rule::W4Again) && matches!(o.job, requests::Job::Mutation(_))
        });
        self.doubted = self.doubted.and(configuration.in_sync());
        self.unsound.clear();
        self.reassign_reads(now_ms, effects);
        match &self.phase {
            Phase::Fencing { .. } | Phase::Recovering(_) if left_out(Rule::W2Restart) => {
                self.carry_on(now_ms, effects);
            }
            // [W2] starts again from the Fence.
            Phase::Fencing { recover, .. } => {
                let recover = *recover;
                self.begin_fence(recover, now_ms, effects);
            }
            Phase::Recovering(_) => self.begin_fence(true, now_ms, effects),
            Phase::Holding => self.resend_all(now_ms, effects),
            Phase::Idle | Phase::Acquiring => {}
        }
    }

    /// [E7] Something that was acknowledged and never flushed may be gone.
    fn has_lost(&self) -> bool {
        if left_out(Rule::E7Told) {
            return false;
        }
        let flushing = self.flushes.iter().filter_map(|f| f.unflushed).min();
        oldest(self.unflushed, flushing).is_some_and(|n| n < self.configuration.unflushed_lost)
    }

    /// [E7] Whoever has the file open is told, by everything that is asked from now on: the loss is never silent.
    fn lose(&mut self, effects: &mut Vec<Effect>) {
        effects.push(Effect::Lost);
        if !matches!(self.phase, Phase::Idle | Phase::Acquiring) {
            effects.push(Effect::ReleaseLease { epoch: self.epoch, finished: false });
        }
        self.end_all(Completion::Failed(EIO), effects);
        self.lost = true;
        self.unflushed = None;
        // Whoever opens the file again and flushes it must not take for durable what can be read and was never flushed.
        self.dirty = true;
    }

    /// Ends everything, for the shell: when a session cannot be had any more.
    pub fn abandon(&mut self, effects: &mut Vec<Effect>) {
        self.end_all(Completion::LeaseLost, effects);
    }

    fn end_all(&mut self, completion: Completion, effects: &mut Vec<Effect>) {
        self.lease_lost(effects);
        self.phase = Phase::Idle;
        let orphans = std::mem::take(&mut self.orphans).into_iter().map(|(op, _, _)| op);
        let waiting = std::mem::take(&mut self.waiting).into_iter().filter_map(|w| match w {
            Waiting::Mutation { op, .. } | Waiting::Read { op, .. } => Some(op),
            Waiting::Repair { .. } => None,
        });
        let flushes = std::mem::take(&mut self.flushes).into_iter().filter_map(|f| f.op);
        let reads = std::mem::take(&mut self.reads).into_keys();
        for op in orphans.chain(waiting).chain(flushes).chain(reads) {
            effects.push(Effect::Complete(op, completion));
            effects.push(Effect::Discard(op));
        }
        self.outstanding.clear();
        self.wanted = false;
    }

    /// Everything up to here is acknowledged by every writable brick, or failed on all and settled.
    fn stable(&self) -> Seq {
        let open =
            |m: &mutate::InFlight| !left_out(Rule::W6Stable) || !m.is_acknowledged_by(self.configuration.in_sync());
        let mutations = self.mutations.iter().find(|(_, m)| open(m)).map(|(seq, _)| *seq);
        let pulls = self.repairs.iter().flatten().filter_map(repair::Repair::lowest_seq).min();
        match (mutations, pulls) {
            (None, None) => Seq(self.next_seq.0 - 1),
            (a, b) => Seq(a.into_iter().chain(b).min().unwrap_or(self.next_seq).0 - 1),
        }
    }

    fn take_seq(&mut self) -> Seq {
        let seq = self.next_seq;
        self.next_seq = seq.next();
        seq
    }

    /// What is busy: every range in flight, by whom.
    fn busy(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let mutations = self.mutations.values().map(|m| m.range);
        let repairs = self.repairs.iter().flatten().flat_map(repair::Repair::busy);
        mutations.chain(repairs)
    }

    #[cfg(debug_assertions)]
    fn check(&self) {
        // I4: nothing that overlaps is in flight together. Quadratic, so only small tables are looked at whole.
        let busy: Vec<ByteRange> = self.busy().take(40).collect();
        for (i, a) in busy.iter().enumerate() {
            for b in &busy[i + 1..] {
                assert!(!a.overlaps(b), "I4: {a:?} and {b:?} of {:?} are in flight together", self.ino);
            }
        }
        assert!(self.dirty || self.unflushed.is_none(), "[E7] something is unflushed, and nobody would flush it");
        assert!(self.mutations.len() <= MAX_IN_FLIGHT, "I9: too many mutations in flight");
        if !matches!(self.phase, Phase::Holding) {
            assert!(self.mutations.is_empty() || matches!(self.phase, Phase::Fencing { .. } | Phase::Recovering(_)));
            assert!(self.repairs.iter().all(Option::is_none));
        }
    }
}
