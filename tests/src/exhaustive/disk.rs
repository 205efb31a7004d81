//! A brick's disk: one block with a page cache above what is durable, and the records of the journal. A killed process keeps
//! the cache; a power cut leaves of the block any content between what was durable and what was written last. Records are
//! durable when they are added; removed ones may come back after a power cut.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use mortar_proto::Slot;
use mortar_proto::coordinator::OpId;
use mortar_proto::interval::IntervalSet;
use mortar_proto::replica::Recorded;
use mortar_proto::types::{BrickId, Ino};

/// The file there is, by the number that the log gives it.
pub const INO: Ino = Ino(9);

/// A disk. A block's content is the operation that wrote it.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Everything that the block may be after a power cut, oldest first; the last is what is read.
    versions: Vec<OpId>,
    /// How many versions came before the first one that is kept.
    dropped: u64,
    intents: BTreeSet<u64>,
    missed: BTreeMap<Slot, IntervalSet>,
    /// The last stop was clean.
    pub clean: bool,
    removed_intents: BTreeSet<u64>,
    removed_missed: BTreeMap<Slot, IntervalSet>,
}

impl Disk {
    /// One that has `value`, durably.
    #[must_use]
    pub fn new(value: OpId) -> Self {
        Self { versions: vec![value], ..Self::default() }
    }
    /// The block as it is read.
    #[must_use]
    pub fn value(&self) -> OpId {
        self.versions.last().copied().unwrap_or(OpId(0))
    }
    /// Every content that a power cut may leave.
    #[must_use]
    pub fn versions(&self) -> &[OpId] {
        &self.versions
    }
    /// Writes the block.
    pub fn write(&mut self, value: OpId) {
        if self.value() != value {
            self.versions.push(value);
        }
    }
    /// What a flush that begins now makes durable when it ends.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.dropped + self.versions.len() as u64
    }
    /// A flush that began at `upto` has ended.
    pub fn flushed(&mut self, upto: u64) {
        while self.versions.len() > 1 && self.dropped + 1 < upto {
            self.versions.remove(0);
            self.dropped += 1;
        }
    }
    /// How many versions a flush that began at `upto` has still to make durable.
    #[must_use]
    pub fn behind(&self, upto: u64) -> u64 {
        self.written() - upto
    }
    /// A record was removed that may come back.
    #[must_use]
    pub fn has_removed(&self) -> bool {
        !self.removed_intents.is_empty() || !self.removed_missed.is_empty()
    }
    /// The power fails: of the block this version is left, and what was removed comes back or does not.
    pub fn lose_power(&mut self, version: usize, comes_back: bool) {
        if let Some(value) = self.versions.get(version).copied() {
            self.versions = vec![value];
        }
        let (intents, missed) = (std::mem::take(&mut self.removed_intents), std::mem::take(&mut self.removed_missed));
        if comes_back {
            self.intents.extend(intents);
            for (x, regions) in missed {
                self.missed.entry(x).or_default().union(&regions);
            }
        }
    }
    fn sync_journal(&mut self) {
        self.removed_intents.clear();
        self.removed_missed.clear();
    }
    /// These are durable now.
    pub fn add(&mut self, intents: &[u64], missed: &[(Slot, Range<u64>)]) {
        if intents.is_empty() && missed.is_empty() {
            return;
        }
        self.sync_journal();
        self.intents.extend(intents);
        for (x, regions) in missed {
            self.missed.entry(*x).or_default().insert(regions.clone());
        }
    }
    /// Removes intents; not durably.
    pub fn remove_intents(&mut self, extents: &[u64]) {
        for extent in extents.iter().filter(|e| self.intents.remove(*e)) {
            self.removed_intents.insert(*extent);
        }
    }
    /// Removes a missed region; not durably.
    pub fn remove_missed(&mut self, x: Slot, regions: Range<u64>) {
        if let Some(set) = self.missed.get_mut(&x).filter(|s| regions.clone().any(|r| s.contains(r))) {
            set.remove(regions.clone());
            self.removed_missed.entry(x).or_default().insert(regions);
        }
    }
    /// Removes all that a brick misses; not durably.
    pub fn remove_all_missed(&mut self, x: Slot) {
        if let Some(set) = self.missed.remove(&x) {
            self.removed_missed.entry(x).or_default().union(&set);
        }
    }
    /// The clean-stop record is durable, or durably gone.
    pub fn record_clean(&mut self, clean: bool) {
        self.sync_journal();
        self.clean = clean;
    }
    /// What the replica is told when it starts.
    #[must_use]
    pub fn recorded(&self, bricks: [BrickId; 3]) -> Recorded {
        Recorded {
            intents: self.intents.iter().map(|e| (INO, *e)).collect(),
            missed: self.missed.iter().flat_map(|(x, set)| set.iter().map(|r| (bricks[x.index()], INO, r))).collect(),
        }
    }
    /// The block is recorded as missed by the brick in `x`.
    #[must_use]
    pub fn has_missed(&self, x: Slot) -> bool {
        self.missed.get(&x).is_some_and(|set| set.contains(0))
    }
    /// An intent is recorded.
    #[must_use]
    pub fn has_intent(&self) -> bool {
        !self.intents.is_empty()
    }
    /// For [`super::canonical`].
    #[must_use]
    pub fn shown(&self) -> impl core::fmt::Debug + '_ {
        let removed = (&self.removed_intents, &self.removed_missed);
        (&self.versions, &self.intents, &self.missed, self.clean, removed)
    }
}
