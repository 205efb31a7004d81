//! What a brick has found to be corrupt on itself: regions that the holder of the file's lease has it get back from another
//! brick `[R5]`. The list is durable, and bounded: what does not fit is found again.

use std::ops::Range;

use super::Replica;
use crate::interval::IntervalSet;
use crate::types::{Ino, SIZE_REGION};

/// Intervals of regions that are remembered, at most (I9).
const MAX_DAMAGED: usize = 1 << 16;

impl Replica {
    /// Of these regions, those that are not in the list yet: to be made durable, then [`Replica::damage_recorded`]. None when the
    /// list is full.
    #[must_use]
    pub fn damage_due(&self, ino: Ino, regions: &IntervalSet) -> Vec<Range<u64>> {
        let listed: usize = self.files.values().map(|f| f.damaged.iter().count()).sum();
        let known = self.files.get(&ino).map(|f| &f.damaged);
        let due = regions.iter().filter(|r| known.is_none_or(|k| !k.covers(r)));
        due.take(MAX_DAMAGED.saturating_sub(listed)).collect()
    }

    /// These damaged regions are durable now.
    pub fn damage_recorded(&mut self, ino: Ino, regions: Range<u64>) {
        let file = self.files.entry(ino).or_default();
        file.given_up.remove(regions.clone());
        file.damaged.insert(regions);
    }

    /// This region is in the list.
    #[must_use]
    pub fn is_damaged(&self, ino: Ino, region: u64) -> bool {
        self.files.get(&ino).is_some_and(|f| f.damaged.contains(region))
    }

    /// The region is sound again.
    pub fn damage_repaired(&mut self, ino: Ino, region: u64) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.damaged.remove(region..region + 1);
            file.given_up.remove(region..region + 1);
            if file.is_blank() {
                self.files.remove(&ino);
            }
        }
    }

    /// No other brick has what is corrupt here: nobody is asked to repair it until [`Replica::try_damaged_again`].
    pub fn give_up(&mut self, ino: Ino, region: u64) {
        if let Some(file) = self.files.get_mut(&ino)
            && file.damaged.contains(region)
        {
            file.given_up.insert(region..region + 1);
        }
    }

    /// What was given up may be repaired by now: another brick may have come back.
    pub fn try_damaged_again(&mut self) {
        for file in self.files.values_mut() {
            file.given_up = IntervalSet::new();
        }
    }

    /// The region was given up.
    #[must_use]
    pub fn has_given_up(&self, ino: Ino, region: u64) -> bool {
        self.files.get(&ino).is_some_and(|f| f.given_up.contains(region))
    }

    /// What was given up.
    #[must_use]
    pub fn given_up(&self) -> Vec<(Ino, IntervalSet)> {
        self.files.iter().filter(|(_, f)| !f.given_up.is_empty()).map(|(ino, f)| (*ino, f.given_up.clone())).collect()
    }

    /// What this brick itself has to get back, by file: what is corrupt, and, while it is `Syncing`, what it planned.
    #[must_use]
    pub fn lacking(&self) -> Vec<(Ino, IntervalSet)> {
        let lacks = |f: &super::File| f.plan.iter().chain(f.damaged.iter()).collect::<IntervalSet>();
        self.files.iter().map(|(ino, f)| (*ino, lacks(f))).filter(|(_, set)| !set.is_empty()).collect()
    }

    /// What is damaged in a file and can be repaired, as far as is known.
    pub(super) fn mendable(&self, ino: Ino) -> IntervalSet {
        let Some(file) = self.files.get(&ino) else { return IntervalSet::new() };
        let mut regions = file.damaged.clone();
        for range in file.given_up.iter() {
            regions.remove(range);
        }
        regions
    }

    /// The size itself is wrong here: nothing of the file can be served to those who read `[R5]`.
    #[must_use]
    pub fn has_lost_size(&self, ino: Ino) -> bool {
        self.is_damaged(ino, SIZE_REGION)
    }
}
