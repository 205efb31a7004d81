//! Admission: may this request run now, and what must be durable when `[F1]`, `[F2]`, `[F3]`, `[W5]`, `[W6]`, `[W7]`.

use std::ops::Range;

use super::{File, Replica, Running, drop_count};
use crate::config::{BrickState, Slot, Slots};
use crate::left_out::{Rule, left_out};
use crate::types::{ByteRange, ConfigNo, EXTENT_BYTES, Epoch, Ino, REGION_BYTES, SIZE_REGION, Seq, SessionId};

/// The numbers that a request is made under.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// The configuration.
    pub n: ConfigNo,
    /// The lease.
    pub epoch: Epoch,
    /// Who asks.
    pub session: SessionId,
    /// Its number, for what runs at most once; otherwise 0.
    pub seq: Seq,
    /// The holder's stable seq `[W6]`.
    pub stable: Seq,
    /// The holder has finished `[W2]`: older epochs are stable, and `stable` may be believed.
    pub settled: bool,
}

/// What kind of request it is, as far as admission cares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Changes bytes of `range`: write, truncate, allocate, punch, zero, time.
    Mutate {
        /// What it touches here.
        range: ByteRange,
    },
    /// Takes `range` from another brick: a repair, or, with `doubt`, the copy of what is in doubt `[W2]`, which stays in
    /// doubt here under the numbers it came from.
    Pull {
        /// What it touches here.
        range: ByteRange,
        /// Where it came from, and whether it stands for the size.
        doubt: Option<(Epoch, Seq, bool)>,
    },
    /// `Fence` `[W2]`.
    Fence,
    /// Bookkeeping of a recovered range at a brick that has it `[W2]`.
    Note {
        /// What was recovered.
        range: ByteRange,
        /// The size was recovered too.
        sized: bool,
    },
    /// `Flush` `[W8]`.
    Flush,
    /// Nothing but the stable seq `[W6]`.
    Settle,
    /// Repair's questions and its clearing `[S2]`.
    Repair,
    /// Another brick takes data from this one for a pull.
    Source,
}

/// The answer to a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Admission {
    /// It is not served.
    Refused(Refusal),
    /// Ask again when the log has moved or something has finished.
    Wait,
    /// It was applied already: do the bookkeeping, then answer `[F3]`.
    Duplicate(Bookkeeping),
    /// Do it.
    Apply(Ticket, Bookkeeping),
}

/// Why a request is not served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Its numbers are old; these are current.
    Stale {
        /// The configuration.
        n: ConfigNo,
        /// The lease.
        epoch: Epoch,
    },
    /// The brick declared itself failed `[E4]`.
    Failed,
}

/// A request under way; to be given back to [`Replica::finish`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct Ticket {
    ino: Ino,
    number: u64,
}

/// What must be durable.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bookkeeping {
    /// Before the data is touched: intents of these extents `[W7]`.
    pub intents: Vec<u64>,
    /// Before the answer: regions missed by these bricks `[W5]`.
    pub missed: Vec<(Slot, Range<u64>)>,
}

impl Replica {
    /// Asks whether a request may run.
    pub fn admit(&mut self, ino: Ino, stamp: &Stamp, purpose: Purpose, now_ms: u64) -> Admission {
        if self.failed {
            return Admission::Refused(Refusal::Failed);
        }
        let Some(configuration) = self.configuration else { return Admission::Wait };
        let file_epoch = self.files.get(&ino).map_or(Epoch(0), |f| f.epoch);
        let stale = Admission::Refused(Refusal::Stale { n: configuration.n, epoch: file_epoch });
        // [F1] Older numbers are refused, newer ones are waited for.
        if (stamp.n < configuration.n || stamp.epoch < file_epoch) && !left_out(Rule::F1Older) {
            return stale;
        }
        if (stamp.n > configuration.n || stamp.epoch > file_epoch) && !left_out(Rule::F1Newer) {
            return Admission::Wait;
        }
        // [E5] A start that the log does not know yet takes nothing.
        if !self.is_live() {
            return Admission::Wait;
        }
        let state = configuration.state(self.slot);
        let serves = match purpose {
            Purpose::Source => state == BrickState::InSync,
            _ => state != BrickState::Out,
        };
        if !serves {
            return stale;
        }
        let file = self.files.entry(ino).or_default();
        if !matches!(purpose, Purpose::Source) && file.holder != stamp.session && !left_out(Rule::F1Session) {
            return stale;
        }
        // [F2] Nothing is answered under these numbers while something accepted under older ones runs.
        let older = file.running.iter().any(|r| (r.n, r.epoch) < (stamp.n, stamp.epoch));
        if older && !left_out(Rule::F2Drain) {
            return Admission::Wait;
        }
        let key = (stamp.epoch, stamp.seq);
        // [F3] The same one is running.
        let same = stamp.seq != Seq(0) && file.running.iter().any(|r| (r.epoch, r.seq) == key);
        if same && !left_out(Rule::F3Running) {
            return Admission::Wait;
        }
        if !matches!(
            purpose,
            Purpose::Fence | Purpose::Pull { doubt: Some(_), .. } | Purpose::Note { .. } | Purpose::Source
        ) || left_out(Rule::W6Fence)
        {
            file.prune(stamp);
        }
        let records = state == BrickState::InSync || !left_out(Rule::W5Syncing);
        let out = if records { configuration.out() } else { Slots::NONE };
        let bookkeeping = match purpose {
            Purpose::Mutate { range } => Bookkeeping {
                intents: file.intents_due(range, now_ms),
                missed: file.missed_due(out, range.units(REGION_BYTES)),
            },
            Purpose::Pull { range, doubt } => Bookkeeping {
                intents: if left_out(Rule::W7Pulls) {
                    Vec::new()
                } else {
                    file.intents_due(intent_range(range), now_ms)
                },
                missed: match doubt {
                    // [W2] A recovered range is booked by every brick, as if it were written now.
                    Some((_, _, sized)) => file.recovered_due(out, range, sized),
                    None => Vec::new(),
                },
            },
            Purpose::Note { range, sized } if !left_out(Rule::W2BookkeepingSource) => {
                Bookkeeping { intents: Vec::new(), missed: file.recovered_due(out, range, sized) }
            }
            _ => Bookkeeping::default(),
        };
        let done = match purpose {
            // What it changed is known from then: a truncate, say, finds nothing to cut off the second time.
            Purpose::Mutate { .. } if file.doubt.get(&key).is_some_and(|d| d.applied) && !left_out(Rule::F3Applied) => {
                return Admission::Duplicate(Bookkeeping {
                    intents: Vec::new(),
                    missed: file.missed_of_doubt(out, key),
                });
            }
            Purpose::Mutate { .. } => file.is_stable(key) && !left_out(Rule::F3Applied),
            Purpose::Pull { .. } => (file.is_stable(key) || file.ran.contains(&key)) && !left_out(Rule::F3Pulls),
            _ => false,
        };
        if done {
            return Admission::Duplicate(Bookkeeping { intents: Vec::new(), ..bookkeeping });
        }
        let (range, mutates) = match purpose {
            Purpose::Mutate { range } => (range, true),
            Purpose::Pull { range, .. } => (intent_range(range), true),
            _ => (ByteRange::default(), false),
        };
        let number = self.next_ticket;
        self.next_ticket += 1;
        file.running.push(Running {
            ticket: number,
            n: stamp.n,
            epoch: stamp.epoch,
            seq: stamp.seq,
            range,
            mutates,
            out,
        });
        *self.running_by_n.entry(stamp.n).or_default() += 1;
        Admission::Apply(Ticket { ino, number }, bookkeeping)
    }

    /// What is missed by a mutation that turned out to change the size, or to touch more than was known at admission.
    /// To be made durable before [`Replica::finish`].
    #[must_use]
    pub fn also_missed(&self, ticket: Ticket, touched: ByteRange, sized: bool) -> Vec<(Slot, Range<u64>)> {
        let Some(file) = self.files.get(&ticket.ino) else { return Vec::new() };
        let Some(running) = file.running.iter().find(|r| r.ticket == ticket.number) else { return Vec::new() };
        let mut due = file.missed_of_range(running.out, touched, sized);
        // An earlier attempt that failed half-way may have touched more.
        due.extend(file.missed_of_doubt(running.out, (running.epoch, running.seq)));
        due
    }

    /// A request has run. `touched`: for a mutation, what it changed and whether it changed the size; `applied` is false
    /// when it failed, in which case the bytes of its range are in doubt all the same. Whoever waits should ask again.
    pub fn finish(&mut self, ticket: Ticket, purpose: Purpose, sized: bool, applied: bool, now_ms: u64) {
        let Some(file) = self.files.get_mut(&ticket.ino) else { return };
        let Some(at) = file.running.iter().position(|r| r.ticket == ticket.number) else { return };
        let running = file.running.swap_remove(at);
        drop_count(&mut self.running_by_n, running.n);
        let key = (running.epoch, running.seq);
        match purpose {
            Purpose::Mutate { range } => {
                file.touch_intents(range, now_ms);
                if !file.is_stable(key) {
                    // An earlier attempt that failed half-way may have touched more.
                    let entry = file.doubt.entry(key).or_default();
                    entry.bytes.insert(range.start..range.end);
                    entry.sized |= sized;
                    entry.applied = applied;
                }
            }
            Purpose::Pull { range, doubt } => {
                file.touch_intents(intent_range(range), now_ms);
                match doubt {
                    Some((epoch, seq, sized)) if applied => {
                        // What is copied replaces what was in doubt here, and stays in doubt as what it is [W2].
                        let now = file.epoch;
                        file.doubt.retain(|(of, _), d| {
                            d.bytes.remove(range.start..range.end);
                            d.sized &= !sized;
                            *of == now || d.sized || !d.bytes.is_empty()
                        });
                        if !left_out(Rule::W2CopyInDoubt) {
                            let entry = file.doubt.entry((epoch, seq)).or_default();
                            entry.bytes.insert(range.start..range.end);
                            entry.sized |= sized;
                            entry.applied = true;
                        }
                    }
                    _ => {}
                }
                if applied && !file.is_stable(key) {
                    file.ran.insert(key);
                }
            }
            _ => {}
        }
    }

    /// The region was pulled, as ordered under `n`: the plan has it no more, and its intents are this brick's own again `[S2]`, `[W7]`.
    /// What was ordered before this brick became `Syncing` anew is nothing to a plan that has not been made yet, or was made since.
    pub fn pulled_region(&mut self, ino: Ino, region: u64, n: ConfigNo) {
        if self.planned_since.is_none_or(|since| n < since) && !left_out(Rule::S1Late) {
            return;
        }
        let Some(file) = self.files.get_mut(&ino) else { return };
        file.plan.remove(region..region + 1);
        // Any of its intents may stand for the size.
        if file.plan.contains(SIZE_REGION) {
            return;
        }
        let per_extent = EXTENT_BYTES / REGION_BYTES;
        let plan = &file.plan;
        let is_left = |extent: u64| (extent * per_extent..(extent + 1) * per_extent).any(|r| plan.contains(r));
        if region == SIZE_REGION {
            file.inherited.retain(|extent| is_left(*extent));
        } else if !is_left(region / per_extent) {
            file.inherited.remove(&(region / per_extent));
        }
    }

    /// The largest number of running requests of older configurations; 0 lets reports be made `[F2]`.
    pub(super) fn runs_under_older(&self, n: ConfigNo) -> bool {
        self.running_by_n.range(..n).next().is_some() && !left_out(Rule::S4Drained)
    }

    /// Nothing is running: for a clean stop `[E5]`.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.running_by_n.is_empty()
    }
}

/// The bytes whose intents a pull needs. The size alone has none, but what makes it durable may fail as well: the intent of
/// the file's first extent stands for it, and brings the size back with it [S1].
fn intent_range(range: ByteRange) -> ByteRange {
    if range.is_empty() { ByteRange::at(0, 1) } else { range }
}

impl File {
    fn is_stable(&self, key: (Epoch, Seq)) -> bool {
        key <= (self.stable_epoch, self.stable)
    }

    /// [W6] Forgets what is stable.
    fn prune(&mut self, stamp: &Stamp) {
        let settled = stamp.settled || left_out(Rule::W6Fence);
        if !settled || (stamp.epoch, stamp.stable) <= (self.stable_epoch, self.stable) {
            return;
        }
        self.stable_epoch = stamp.epoch;
        self.stable = stamp.stable;
        let upto = (stamp.epoch, stamp.stable);
        while self.doubt.first_key_value().is_some_and(|(key, _)| *key <= upto) {
            self.doubt.pop_first();
        }
        while self.ran.first().is_some_and(|key| *key <= upto) {
            self.ran.pop_first();
        }
    }

    /// Extents of `range` whose intent is not durable yet.
    fn intents_due(&mut self, range: ByteRange, now_ms: u64) -> Vec<u64> {
        let mut due = Vec::new();
        if left_out(Rule::W7Intents) {
            return due;
        }
        for extent in range.units(EXTENT_BYTES) {
            match self.intents.get_mut(&extent) {
                Some(last) => *last = now_ms.max(*last),
                None => due.push(extent),
            }
        }
        due
    }

    fn touch_intents(&mut self, range: ByteRange, now_ms: u64) {
        if range.len() > 1 << 40 {
            for last in self.intents.values_mut() {
                *last = now_ms;
            }
            return;
        }
        for extent in range.units(EXTENT_BYTES) {
            if let Some(last) = self.intents.get_mut(&extent) {
                *last = now_ms;
            }
        }
    }

    fn missed_due(&self, out: Slots, regions: Range<u64>) -> Vec<(Slot, Range<u64>)> {
        if out.is_empty() || regions.is_empty() || left_out(Rule::W5Missed) {
            return Vec::new();
        }
        out.iter().filter(|x| !self.missed[x.index()].covers(&regions)).map(|x| (x, regions.clone())).collect()
    }

    /// What is missed by a mutation that is in doubt here.
    fn missed_of_doubt(&self, out: Slots, key: (Epoch, Seq)) -> Vec<(Slot, Range<u64>)> {
        let Some(entry) = self.doubt.get(&key) else { return Vec::new() };
        let mut due = if entry.sized { self.missed_due(out, SIZE_REGION..SIZE_REGION + 1) } else { Vec::new() };
        for bytes in entry.bytes.iter() {
            let range = ByteRange { start: bytes.start, end: bytes.end };
            due.extend(self.missed_due(out, range.units(REGION_BYTES)));
        }
        due
    }

    /// A recovered range; one that stands for the size only has no bytes.
    fn recovered_due(&self, out: Slots, range: ByteRange, sized: bool) -> Vec<(Slot, Range<u64>)> {
        if left_out(Rule::W2Bookkeeping) {
            return Vec::new();
        }
        self.missed_of_range(out, range, sized)
    }

    fn missed_of_range(&self, out: Slots, range: ByteRange, sized: bool) -> Vec<(Slot, Range<u64>)> {
        let mut due = self.missed_due(out, range.units(REGION_BYTES));
        if sized {
            due.extend(self.missed_due(out, SIZE_REGION..SIZE_REGION + 1));
        }
        due
    }
}
