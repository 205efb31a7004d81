//! What a brick has found to be corrupt on itself: regions that the holder of the file's lease has it get back from another
//! brick `[R5]`. The list is durable, and bounded: what does not fit is found again.

use std::ops::Range;

use super::{Replica, Stamp};
use crate::config::Slots;
use crate::interval::IntervalSet;
use crate::types::{ByteRange, Epoch, Ino, REGION_BYTES, SIZE_REGION, Seq, SessionId};

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

    /// With what this brick, as one that is `InSync`, asks others for what they have of a file; and who is `InSync`. `None` when
    /// its own start is not registered.
    #[must_use]
    pub fn source_stamp(&self, ino: Ino) -> Option<(Stamp, Slots)> {
        let configuration = self.configuration.filter(|_| self.is_live() && !self.failed)?;
        let epoch = self.files.get(&ino).map_or(Epoch(0), |f| f.epoch);
        let (n, session) = (configuration.n, SessionId(0));
        let stamp = Stamp { n, epoch, session, seq: Seq(0), stable: Seq(0), settled: false };
        Some((stamp, configuration.in_sync()))
    }

    /// Nothing that changes this range, or the size, is running here or in doubt, nor is it known to be wrong.
    #[must_use]
    pub fn is_settled(&self, ino: Ino, range: ByteRange) -> bool {
        self.files.get(&ino).is_none_or(|f| {
            let regions = range.units(REGION_BYTES);
            !f.running.iter().any(|r| r.mutates && (r.range.is_empty() || r.range.overlaps(&range)))
                && !f.doubt.values().any(|d| d.sized || d.touches(&range))
                && !f.damaged.iter().any(|d| d.start < regions.end && regions.start < d.end)
                && !f.damaged.contains(SIZE_REGION)
        })
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
