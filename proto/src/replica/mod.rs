//! The replica: what a brick does with what it is asked. A pure state machine; `brickd` gives it a disk and a network, the
//! simulator gives it worse ones.
//!
//! It owns what a brick knows of configurations, leases, mutations in doubt, intents and missed regions. It never looks at
//! a payload and never does I/O: a request is *admitted* (or refused, or told to wait), the shell does what the admission
//! says — intents durable first, then the data, then missed regions durable — and tells the machine that it is *finished*.
//!
//! Keeps `[F1]`, `[F2]`, `[F3]`, `[W5]`, `[W6]`, `[W7]`, `[R1]`, `[R2]`, `[S1]`, `[S4]`, and its part of `[E1]`, `[E4]`, `[E5]`, `[E6]`; invariants I3,
//! I6 and I9 rest on it.
//!
//! ```text
//!  request ──▶ admit ──▶ Stale      the numbers are old, or the brick is not a live member [F1]
//!                  ├───▶ Wait       the log is not applied that far, or older work is not finished [F2]
//!                  ├───▶ Duplicate  applied already; only the bookkeeping is due [F3]
//!                  └───▶ Apply ──▶ intents durable ──▶ data ──▶ missed durable ──▶ finish ──▶ answer
//! ```

mod admit;
mod damage;
mod reports;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::config::{BrickState, Configuration, Slot, Slots};
use crate::interval::IntervalSet;
use crate::left_out::{Rule, left_out};
use crate::types::{
    BrickId, ByteRange, ConfigNo, EXTENT_BYTES, Epoch, Incarnation, Ino, LogIndex, REGION_BYTES, REPLICAS, SIZE_REGION,
    Seq, SessionId,
};

pub use admit::{Admission, Bookkeeping, Purpose, Refusal, Stamp, Ticket};
pub use reports::Report;

/// Read leases that wait for the log to be applied, at most: more than the heartbeats of one lease.
const PENDING_LEASES: usize = 16;

/// A mutation that this brick applied, or tried to, and does not know to be stable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Doubt {
    /// The epoch and seq it was sent under.
    pub epoch: Epoch,
    /// See `epoch`.
    pub seq: Seq,
    /// What it touched.
    pub range: ByteRange,
    /// It changed the size.
    pub sized: bool,
}

#[derive(Clone, Debug, Default)]
struct DoubtEntry {
    /// The bytes; a copy of [W2] brings the range of one mutation here piece by piece.
    bytes: IntervalSet,
    /// It changed the size.
    sized: bool,
    /// False: it failed half-way, so the bytes are anybody's guess; sent again it is tried again.
    applied: bool,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    ticket: u64,
    n: ConfigNo,
    epoch: Epoch,
    seq: Seq,
    range: ByteRange,
    /// It changes data here: its extents keep their intents.
    mutates: bool,
    /// The bricks that were out when it was accepted `[W5]`.
    out: Slots,
}

/// What a brick knows of one file.
#[derive(Clone, Debug, Default)]
struct File {
    /// By the applied log: who may write, under which number.
    epoch: Epoch,
    holder: SessionId,
    /// Everything up to here in `stable_epoch`, and all of older epochs, is stable `[W6]`.
    stable_epoch: Epoch,
    stable: Seq,
    doubt: BTreeMap<(Epoch, Seq), DoubtEntry>,
    /// Pulls and copies that ran, above `stable` `[F3]`.
    ran: BTreeSet<(Epoch, Seq)>,
    running: Vec<Running>,
    /// Extents whose intent is durable, and when they were last written, in the shell's milliseconds `[W7]`.
    intents: BTreeMap<u64, u64>,
    /// Extents whose intent stays until they are repaired `[W7]`.
    inherited: BTreeSet<u64>,
    /// By slot: regions that that brick misses `[W5]`.
    missed: [IntervalSet; REPLICAS],
    /// What this brick, `Syncing`, must get back besides what the others list `[S1]`.
    plan: IntervalSet,
    /// Regions that are corrupt here `[R5]`, and those among them that no other brick could give back.
    damaged: IntervalSet,
    given_up: IntervalSet,
}

impl DoubtEntry {
    /// It keeps the intent of an extent that has these bytes. A size alone keeps that of the file's first extent.
    fn touches(&self, bytes: &ByteRange) -> bool {
        self.bytes.iter().any(|r| r.start < bytes.end && bytes.start < r.end)
            || self.sized && self.bytes.is_empty() && bytes.start == 0
    }
}

impl File {
    fn is_blank(&self) -> bool {
        self.doubt.is_empty()
            && self.ran.is_empty()
            && self.running.is_empty()
            && self.intents.is_empty()
            && self.missed.iter().all(IntervalSet::is_empty)
            && self.plan.is_empty()
            && self.damaged.is_empty()
            && self.holder == SessionId(0)
            && self.epoch == Epoch(0)
    }
}

/// Whether the brick has agreed to its own `Out` `[E1]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Agreement {
    /// It has not.
    #[default]
    None,
    /// It has, and has not applied an `Out` of itself yet.
    Given,
    /// It has applied one since; the next configuration that has it `InSync` ends the agreement.
    SeenOut,
}

/// The state of one brick.
#[derive(Clone, Debug)]
pub struct Replica {
    brick: BrickId,
    slot: Slot,
    incarnation: Incarnation,
    applied: LogIndex,
    configuration: Option<Configuration>,
    agreement: Agreement,
    failed: bool,
    lease_until_ms: u64,
    lease_pending: Vec<(LogIndex, u64)>,
    files: BTreeMap<Ino, File>,
    next_ticket: u64,
    running_by_n: BTreeMap<ConfigNo, u32>,
    /// As a `Syncing` brick: the configuration since which the plan stands.
    planned_since: Option<ConfigNo>,
    /// As a `Syncing` brick: the configuration under which it has taken over the others' lists and flushed `[S4]`.
    repaired_under: Option<ConfigNo>,
    /// Recorded as missed by bricks that the applied configuration does not have.
    set_aside: Vec<(BrickId, Ino, Range<u64>)>,
}

/// What the store had recorded when the brick was opened.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// Intents, by file and extent.
    pub intents: Vec<(Ino, u64)>,
    /// Missed regions, by brick and file; under its own number, what is corrupt on it `[R5]`.
    pub missed: Vec<(BrickId, Ino, Range<u64>)>,
}

impl Replica {
    /// A brick that has just started, with what its disk remembers. It accepts nothing until it has applied a configuration
    /// that has `incarnation` registered `[E5]`.
    #[must_use]
    pub fn new(brick: BrickId, slot: Slot, incarnation: Incarnation, recorded: Recorded) -> Self {
        let mut files: BTreeMap<Ino, File> = BTreeMap::new();
        for (ino, extent) in recorded.intents {
            let file = files.entry(ino).or_default();
            file.intents.insert(extent, 0);
            file.inherited.insert(extent);
        }
        let (own, set_aside) = recorded.missed.into_iter().partition(|(x, _, _)| *x == brick);
        for (_, ino, regions) in Vec::from_iter::<Vec<_>>(own) {
            files.entry(ino).or_default().damaged.insert(regions);
        }
        Self {
            brick,
            slot,
            incarnation,
            applied: LogIndex(0),
            configuration: None,
            agreement: Agreement::None,
            failed: false,
            lease_until_ms: 0,
            lease_pending: Vec::new(),
            files,
            next_ticket: 1,
            running_by_n: BTreeMap::new(),
            planned_since: None,
            repaired_under: None,
            set_aside,
        }
    }

    /// Which brick.
    #[must_use]
    pub fn brick(&self) -> BrickId {
        self.brick
    }
    /// Its place in the set.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.slot
    }
    /// Its present start.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }
    /// The applied configuration, if there is one yet.
    #[must_use]
    pub fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }
    /// The applied configuration has this start registered `[E5]`.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.configuration
            .is_some_and(|c| c.members[self.slot.index()].incarnation == self.incarnation || left_out(Rule::E5Awaited))
    }
    /// Its own state by the applied log; `Out` when there is none.
    #[must_use]
    pub fn state(&self) -> BrickState {
        self.configuration.map_or(BrickState::Out, |c| c.state(self.slot))
    }

    /// The log is applied up to here, and all configurations and leases up to here were told.
    pub fn applied(&mut self, index: LogIndex) {
        self.applied = self.applied.max(index);
        let applied = self.applied;
        let mut until = self.lease_until_ms;
        self.lease_pending.retain(|(commit, lease)| {
            let ready = *commit <= applied;
            if ready {
                until = until.max(*lease);
            }
            !ready
        });
        self.lease_until_ms = until;
    }

    /// A configuration was applied. Returns missed regions that must be made durable before anything is answered or
    /// reported under it: the source of a cold start enters its own intents as missed by every other brick `[E6]`.
    #[must_use]
    pub fn configured(
        &mut self,
        configuration: Configuration,
        cold_start: Option<Slot>,
    ) -> Vec<(Slot, Ino, Range<u64>)> {
        let before = self.configuration.replace(configuration);
        debug_assert!(before.is_none_or(|b| b.n <= configuration.n), "configurations never go back");
        self.place_missed(before.as_ref(), &configuration);
        let was = before.map(|b| b.members[self.slot.index()]);
        let now = configuration.members[self.slot.index()];
        if before.is_some_and(|b| b.n == configuration.n) {
            return Vec::new();
        }
        match (self.agreement, now.state) {
            (Agreement::None, _) => {}
            (Agreement::SeenOut, BrickState::InSync) => self.agreement = Agreement::None,
            (_, BrickState::InSync) if left_out(Rule::E1Agreed) => self.agreement = Agreement::None,
            (_, BrickState::InSync) => {}
            _ => self.agreement = Agreement::SeenOut,
        }
        self.try_damaged_again();
        let live = now.incarnation == self.incarnation;
        if live
            && now.state == BrickState::Syncing
            && was.is_none_or(|w| w.syncing_since != now.syncing_since || w.state != now.state)
        {
            self.planned_since = None;
            for file in self.files.values_mut() {
                file.plan = IntervalSet::new();
                file.inherited = file.intents.keys().copied().collect();
            }
        }
        if live
            && now.state == BrickState::InSync
            && was.is_none_or(|w| w.state != BrickState::InSync || w.incarnation != now.incarnation)
        {
            self.planned_since = None;
            let source = cold_start == Some(self.slot) && !left_out(Rule::E6Intents);
            let mut entered = Vec::new();
            for (ino, file) in &mut self.files {
                file.plan = IntervalSet::new();
                if source {
                    for regions in regions_of_extents(file.intents.keys().copied()).iter() {
                        for x in Slot::ALL.into_iter().filter(|x| *x != self.slot) {
                            file.missed[x.index()].insert(regions.clone());
                            entered.push((x, *ino, regions.clone()));
                        }
                    }
                }
                file.inherited.clear();
            }
            return entered;
        }
        Vec::new()
    }

    /// What is missed is recorded by brick, and kept here by slot: when a slot gets another brick, the list of the one before is set
    /// aside. A brick that has just started goes through old configurations again, so both may be wanted.
    fn place_missed(&mut self, before: Option<&Configuration>, now: &Configuration) {
        for x in Slot::ALL.into_iter().filter(|x| *x != self.slot) {
            let was = before.map(|b| b.members[x.index()].brick);
            let is = now.members[x.index()].brick;
            if was == Some(is) {
                continue;
            }
            for (ino, file) in &mut self.files {
                let list = core::mem::take(&mut file.missed[x.index()]);
                self.set_aside.extend(
                    was.into_iter().flat_map(|was| list.iter().map(move |r| (was, *ino, r)).collect::<Vec<_>>()),
                );
            }
            let (back, rest) = core::mem::take(&mut self.set_aside).into_iter().partition(|(b, _, _)| *b == is);
            self.set_aside = rest;
            for (_, ino, regions) in Vec::from_iter::<Vec<_>>(back) {
                self.files.entry(ino).or_default().missed[x.index()].insert(regions);
            }
        }
    }

    /// Bricks that were replaced miss nothing any more: drops what is set aside, and returns whose records the store may forget. Not
    /// before this start is registered, for until then the applied configuration may be an old one.
    #[must_use]
    pub fn forget_replaced(&mut self) -> Vec<(BrickId, Ino)> {
        if !self.is_live() {
            return Vec::new();
        }
        let dropped: BTreeSet<(BrickId, Ino)> =
            core::mem::take(&mut self.set_aside).into_iter().map(|(brick, ino, _)| (brick, ino)).collect();
        dropped.into_iter().collect()
    }

    /// Bricks that are `InSync` by the applied configuration miss nothing: their lists, kept from an earlier absence, are
    /// dropped. Returns the slots and files whose records the store may forget. A brick that has just started goes through
    /// old configurations again, in which a brick that is out by now was still `InSync`: until its own start is registered
    /// it forgets nothing.
    #[must_use]
    pub fn forget_missed_of_in_sync(&mut self) -> Vec<(Slot, Ino)> {
        let Some(configuration) = self.configuration.filter(|_| self.is_live()) else { return Vec::new() };
        let mut dropped = Vec::new();
        for (ino, file) in &mut self.files {
            for x in configuration.in_sync().iter() {
                if !file.missed[x.index()].is_empty() {
                    file.missed[x.index()] = IntervalSet::new();
                    dropped.push((x, *ino));
                }
            }
        }
        self.files.retain(|_, file| !file.is_blank());
        dropped
    }

    /// A lease was granted or ended.
    pub fn leased(&mut self, ino: Ino, epoch: Epoch, holder: SessionId) {
        let file = self.files.entry(ino).or_default();
        debug_assert!(file.epoch <= epoch, "epochs never go back");
        file.epoch = epoch;
        file.holder = holder;
    }

    /// A file is gone for good: everything about it is forgotten.
    pub fn reclaimed(&mut self, ino: Ino) {
        self.set_aside.retain(|(_, of, _)| *of != ino);
        if let Some(file) = self.files.remove(&ino) {
            for running in &file.running {
                drop_count(&mut self.running_by_n, running.n);
            }
        }
    }

    /// The brick serves no reads from now on, until it has applied first an `Out` of itself and then a configuration that
    /// has it `InSync` `[E1]`.
    pub fn agree_to_out(&mut self) {
        if self.agreement == Agreement::None {
            self.agreement = Agreement::Given;
        }
    }
    /// The applied configuration, if the brick has agreed under it; otherwise 0.
    #[must_use]
    pub fn agreed_under(&self) -> ConfigNo {
        self.configuration.filter(|_| self.has_agreed()).map_or(ConfigNo(0), |c| c.n)
    }
    /// It has agreed.
    #[must_use]
    pub fn has_agreed(&self) -> bool {
        self.agreement != Agreement::None
    }
    /// The disk failed `[E4]`: it agrees and takes nothing more.
    pub fn fail(&mut self) {
        if left_out(Rule::W8Failed) {
            return;
        }
        self.failed = true;
        self.agree_to_out();
    }
    /// It declared itself failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// The leader answered a heartbeat: reads may be served until `until_ms` (when it was sent, plus the read lease, by this
    /// brick's own clock), once the log is applied up to `commit` `[R1]`.
    pub fn lease_answered(&mut self, until_ms: u64, commit: LogIndex) {
        if commit <= self.applied || left_out(Rule::R1Index) {
            self.lease_until_ms = self.lease_until_ms.max(until_ms);
            return;
        }
        if self.lease_pending.len() == PENDING_LEASES {
            self.lease_pending.remove(0);
        }
        self.lease_pending.push((commit, until_ms));
    }

    /// May a read be served at `now_ms` `[R1]`, `[R2]`?
    #[must_use]
    pub fn may_read(&self, now_ms: u64) -> bool {
        self.is_live()
            && (self.state() == BrickState::InSync || left_out(Rule::R2) && self.state() == BrickState::Syncing)
            && self.agreement == Agreement::None
            && !self.failed
            && (now_ms < self.lease_until_ms || left_out(Rule::R1Lease))
    }

    /// Every mutation in doubt of a file, for the answer to a `Fence` `[W2]`.
    #[must_use]
    pub fn in_doubt(&self, ino: Ino) -> Vec<Doubt> {
        self.files.get(&ino).map_or_else(Vec::new, |file| {
            let mut all = Vec::new();
            for ((epoch, seq), entry) in &file.doubt {
                let doubt = Doubt { epoch: *epoch, seq: *seq, range: ByteRange::default(), sized: false };
                all.extend(
                    entry.bytes.iter().map(|r| Doubt { range: ByteRange { start: r.start, end: r.end }, ..doubt }),
                );
                if entry.sized {
                    all.push(Doubt { sized: true, ..doubt });
                }
            }
            all
        })
    }

    /// These intents are durable now `[W7]`.
    pub fn intents_recorded(&mut self, ino: Ino, extents: impl IntoIterator<Item = u64>, now_ms: u64) {
        let file = self.files.entry(ino).or_default();
        for extent in extents {
            file.intents.insert(extent, now_ms);
        }
    }

    /// Intents that could be cleared once their file is flushed: not written for `idle_ms`, nothing in doubt or running in
    /// them, not inherited `[W7]`.
    #[must_use]
    pub fn clearable_intents(&self, now_ms: u64, idle_ms: u64) -> Vec<(Ino, Vec<u64>)> {
        let mut found = Vec::new();
        for (ino, file) in &self.files {
            let extents: Vec<u64> = file
                .intents
                .iter()
                .filter(|(extent, last)| **last + idle_ms <= now_ms && file.may_clear(**extent))
                .map(|(extent, _)| *extent)
                .collect();
            if !extents.is_empty() {
                found.push((*ino, extents));
            }
        }
        found
    }

    /// The file was flushed after `flush_began_ms`: clears those of `extents` that nothing has touched since and returns
    /// them, for the store to forget.
    #[must_use]
    pub fn clear_intents(&mut self, ino: Ino, extents: &[u64], flush_began_ms: u64) -> Vec<u64> {
        let Some(file) = self.files.get_mut(&ino) else { return Vec::new() };
        let mut cleared = Vec::new();
        for extent in extents {
            if file.intents.get(extent).is_some_and(|last| *last < flush_began_ms) && file.may_clear(*extent) {
                file.intents.remove(extent);
                cleared.push(*extent);
            }
        }
        if file.is_blank() {
            self.files.remove(&ino);
        }
        cleared
    }

    /// All intents, for a brick that plans its repair with this one as source `[S1]`.
    #[must_use]
    pub fn intents(&self) -> Vec<(Ino, Vec<u64>)> {
        self.files
            .iter()
            .filter(|(_, f)| !f.intents.is_empty())
            .map(|(ino, f)| (*ino, f.intents.keys().copied().collect()))
            .collect()
    }

    /// Files and regions that the brick in `x` misses by this one's list `[W5]`.
    #[must_use]
    pub fn missed(&self, x: Slot) -> Vec<(Ino, IntervalSet)> {
        self.files
            .iter()
            .filter(|(_, f)| !f.missed[x.index()].is_empty())
            .map(|(ino, f)| (*ino, f.missed[x.index()].clone()))
            .collect()
    }

    /// The regions of one file that the brick in `x` must get back as far as this brick knows: what `x` missed, or, when it
    /// is `x` itself, what it planned and what is corrupt on it. `None`: it is `Syncing` and has not planned yet.
    #[must_use]
    pub fn repair_list(&self, x: Slot, ino: Ino) -> Option<IntervalSet> {
        if x == self.slot {
            let mut regions = self.mendable(ino);
            if self.state() != BrickState::InSync {
                self.planned_since?;
                regions.union(&self.files.get(&ino).map(|f| f.plan.clone()).unwrap_or_default());
            }
            return Some(regions);
        }
        Some(self.files.get(&ino).map(|f| f.missed[x.index()].clone()).unwrap_or_default())
    }

    /// These missed regions are durable now.
    pub fn missed_recorded(&mut self, x: Slot, ino: Ino, regions: Range<u64>) {
        self.files.entry(ino).or_default().missed[x.index()].insert(regions);
    }

    /// A region that `x` missed was repaired `[S2]`.
    pub fn clear_missed(&mut self, x: Slot, ino: Ino, region: u64) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.missed[x.index()].remove(region..region + 1);
            if file.is_blank() {
                self.files.remove(&ino);
            }
        }
    }
}

impl File {
    fn may_clear(&self, extent: u64) -> bool {
        let bytes = ByteRange { start: extent * EXTENT_BYTES, end: (extent + 1) * EXTENT_BYTES };
        (!self.inherited.contains(&extent) || left_out(Rule::W7Inherited))
            && !self.running.iter().any(|r| r.mutates && r.range.overlaps(&bytes))
            && (!self.doubt.values().any(|d| d.touches(&bytes)) || left_out(Rule::W7Doubt))
    }
}

/// The regions of intent extents, and the size, which an interrupted mutation may have changed.
fn regions_of_extents(extents: impl Iterator<Item = u64>) -> IntervalSet {
    const PER_EXTENT: u64 = EXTENT_BYTES / REGION_BYTES;
    let mut set: IntervalSet = extents.map(|e| e * PER_EXTENT..(e + 1) * PER_EXTENT).collect();
    if !set.is_empty() {
        set.insert(SIZE_REGION..SIZE_REGION + 1);
    }
    set
}

fn drop_count(counts: &mut BTreeMap<ConfigNo, u32>, n: ConfigNo) {
    if let Some(count) = counts.get_mut(&n) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&n);
        }
    }
}
