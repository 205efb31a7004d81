//! Giving a brick back what it lacks in this file, region by region, through the table of busy ranges: a `Syncing` brick what it
//! misses `[S2]`, an `InSync` one what turned out to be corrupt on it `[R5]`. The latter knows by itself what that is, and strikes
//! it off by itself.

use std::collections::BTreeMap;

use super::requests::Job;
use super::{Body, Coordinator, Effect, Waiting};
use crate::config::{Slot, Slots};
use crate::interval::IntervalSet;
use crate::left_out::{Rule, left_out};
use crate::types::{ByteRange, REGION_BYTES, SIZE_REGION, Seq};

/// Regions of one file and brick under repair at the same time `[S5]`.
const PARALLEL: usize = 4;

/// What a region keeps busy; the size keeps everything busy.
pub(super) fn range_of(region: u64) -> ByteRange {
    if region == SIZE_REGION { ByteRange::ALL } else { ByteRange::at(region * REGION_BYTES, REGION_BYTES) }
}

#[derive(Clone, Debug)]
struct Active {
    /// `None` while it waits for its range.
    seq: Option<Seq>,
    pulled: bool,
    /// `InSync` bricks that have not cleared it yet.
    left: Slots,
}

/// The repair of one brick in this file, under one configuration.
#[derive(Clone, Debug)]
pub(super) struct Repair {
    /// Bricks whose list has not come.
    lists_left: Slots,
    regions: IntervalSet,
    active: BTreeMap<u64, Active>,
    done: bool,
}

impl Repair {
    /// Nothing is left to do.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }
    /// Something is in flight.
    pub(super) fn is_pulling(&self) -> bool {
        self.active.values().any(|a| a.seq.is_some())
    }
    pub(super) fn lowest_seq(&self) -> Option<Seq> {
        self.active.values().filter(|a| !a.pulled).filter_map(|a| a.seq).min()
    }
    pub(super) fn busy(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.active.iter().filter(|(_, a)| a.seq.is_some()).map(|(region, _)| range_of(*region))
    }
}

impl Coordinator {
    /// `InSync` bricks that may have something corrupt, and that another one could give it back to.
    fn mendable(&self) -> Slots {
        let in_sync = self.configuration.in_sync();
        if in_sync.count() < 2 || left_out(Rule::R5Repair) {
            Slots::NONE
        } else {
            self.doubted.and(in_sync).and(self.links)
        }
    }

    pub(super) fn advance_repair(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        for x in self.configuration.syncing().or(self.mendable()).iter() {
            if self.repairs[x.index()].is_none() {
                self.ask_for_lists(x, now_ms, effects);
            }
            if self.release_wanted || self.resettle {
                continue;
            }
            while let Some(repair) = self.repairs[x.index()].as_mut() {
                if repair.done || !repair.lists_left.is_empty() || repair.active.len() >= PARALLEL {
                    break;
                }
                let Some(region) = repair.regions.first() else {
                    if repair.active.is_empty() {
                        // What was listed is done; ask whether that was all.
                        self.ask_for_lists(x, now_ms, effects);
                    }
                    break;
                };
                // The size is made equal last, alone.
                if region == SIZE_REGION && !repair.active.is_empty() {
                    break;
                }
                if self.permits == 0 && !left_out(Rule::S5) {
                    if !self.permit_asked {
                        self.permit_asked = true;
                        effects.push(Effect::WantPermit);
                    }
                    break;
                }
                self.permits = self.permits.saturating_sub(1);
                repair.regions.remove(region..region + 1);
                repair.active.insert(region, Active { seq: None, pulled: false, left: Slots::NONE });
                self.waiting.push_back(Waiting::Repair { x, region });
            }
        }
    }

    fn ask_for_lists(&mut self, x: Slot, now_ms: u64, effects: &mut Vec<Effect>) {
        let in_sync = self.configuration.in_sync();
        let asked = if in_sync.has(x) { Slots::NONE.with(x) } else { in_sync.with(x) };
        self.repairs[x.index()] =
            Some(Repair { lists_left: asked, regions: IntervalSet::new(), active: BTreeMap::new(), done: false });
        for slot in asked.iter() {
            self.send(slot, Job::RepairList(x), Body::RepairList(x), Seq(0), now_ms, effects);
        }
    }

    pub(super) fn repair_listed(&mut self, x: Slot, slot: Slot, regions: &IntervalSet) {
        if let Some(repair) = self.repairs[x.index()].as_mut() {
            repair.lists_left.remove(slot);
            repair.regions.union(regions);
            repair.done = repair.lists_left.is_empty() && repair.regions.is_empty();
            if repair.done && self.configuration.in_sync().has(x) {
                self.repairs[x.index()] = None;
                self.doubted.remove(x);
            }
        }
    }

    pub(super) fn start_pull(&mut self, x: Slot, region: u64, now_ms: u64, effects: &mut Vec<Effect>) {
        // A source that there is a connection to; the brick itself needs one of its own, and says so if it has none.
        let in_sync = self.configuration.in_sync().without(x);
        let Some(from) = in_sync.and(self.links).iter().next().or_else(|| in_sync.iter().next()) else { return };
        let seq = self.take_seq();
        let Some(active) = self.repairs[x.index()].as_mut().and_then(|r| r.active.get_mut(&region)) else { return };
        active.seq = Some(seq);
        let size = region == SIZE_REGION;
        let range = if size { ByteRange::default() } else { range_of(region) };
        self.send(x, Job::Pull(x, region), Body::Pull { range, size, from, doubt: None }, seq, now_ms, effects);
        if left_out(Rule::S2Clear) {
            self.pulled(x, region, now_ms, effects);
        }
    }

    pub(super) fn pulled(&mut self, x: Slot, region: u64, now_ms: u64, effects: &mut Vec<Effect>) {
        let in_sync = self.configuration.in_sync();
        let Some(repair) = self.repairs[x.index()].as_mut() else { return };
        if in_sync.has(x) {
            repair.active.remove(&region);
            return;
        }
        let Some(active) = repair.active.get_mut(&region) else { return };
        active.pulled = true;
        active.left = in_sync;
        for slot in in_sync.iter() {
            self.send(slot, Job::Clear(x, region), Body::ClearMissed { x, region }, Seq(0), now_ms, effects);
        }
    }

    pub(super) fn cleared(&mut self, x: Slot, region: u64, slot: Slot) {
        let Some(repair) = self.repairs[x.index()].as_mut() else { return };
        let Some(active) = repair.active.get_mut(&region) else { return };
        active.left.remove(slot);
        if active.left.is_empty() {
            repair.active.remove(&region);
        }
    }
}
