//! What a brick does by itself: planning, coming to the end of repair, clearing intents, stopping cleanly `[S1]`, `[S4]`, `[W7]`,
//! `[E5]`.

use mortar_proto::config::Slot;
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::replica::{Bookkeeping, Replica};
use mortar_proto::types::ConfigNo;

use super::disk::INO;
use super::world::{World, slot};

/// Regions, and which brick misses them.
type Missed = Vec<(Slot, std::ops::Range<u64>)>;

impl World {
    fn lists_of(&self, source: usize, n: ConfigNo) -> Option<&Replica> {
        self.bricks[source].replica.as_ref().filter(|r| r.report().is_some_and(|r| r.n == n))
    }

    /// The bricks that could give their intents now for the plan that is due; the brick itself when none is needed [S1].
    #[must_use]
    pub fn plan_sources(&self, s: usize) -> Vec<usize> {
        let Some((n, from)) = self.bricks[s].replica.as_ref().and_then(Replica::plan_due) else { return Vec::new() };
        if from.is_empty() {
            return vec![s];
        }
        from.iter().map(Slot::index).filter(|source| self.lists_of(*source, n).is_some()).collect()
    }

    pub(super) fn plan(&mut self, s: usize, source: usize) {
        let Some((n, _)) = self.bricks[s].replica.as_ref().and_then(Replica::plan_due) else { return };
        let intents =
            if source == s { Vec::new() } else { self.lists_of(source, n).map_or_else(Vec::new, Replica::intents) };
        if let Some(replica) = self.replica(s) {
            replica.plan(n, &intents);
        }
        self.note(|| format!("b{s} plans with the intents of b{source}: {intents:?}"));
    }

    /// What the `InSync` bricks list of each other's absence, if it can be taken over now [S4].
    fn to_take_over(&self, s: usize) -> Option<(ConfigNo, Missed)> {
        let (n, from) = self.bricks[s].replica.as_ref().and_then(Replica::finish_due)?;
        let mut all = Vec::new();
        for source in from.iter() {
            let replica = self.lists_of(source.index(), n)?;
            if !replica.missed(slot(s)).is_empty() && !left_out(Rule::S4Reports) {
                return None;
            }
            for x in Slot::ALL.into_iter().filter(|x| x.index() != s && *x != source) {
                all.extend(replica.missed(x).iter().flat_map(|(_, set)| set.iter().map(move |r| (x, r))));
            }
        }
        Some((n, all))
    }
    /// Nothing is left to repair, and what others miss can be taken over.
    #[must_use]
    pub fn can_take_over(&self, s: usize) -> bool {
        let taken = self.bricks[s].taken_over.map(|t| t.0);
        self.to_take_over(s).is_some_and(|(n, _)| taken != Some(n))
    }

    pub(super) fn take_over(&mut self, s: usize) {
        let Some((n, missed)) = self.to_take_over(s) else { return };
        self.note(|| format!("b{s} takes over {missed:?}"));
        if !left_out(Rule::S4TakeOver) {
            self.bricks[s].book(&Bookkeeping { intents: Vec::new(), missed });
        }
        self.bricks[s].taken_over = Some((n, self.bricks[s].disk.written()));
    }

    pub(super) fn repaired(&mut self, s: usize) {
        let Some((n, upto)) = self.bricks[s].taken_over.take() else { return };
        if !left_out(Rule::S4Flush) {
            self.bricks[s].disk.flushed(upto);
        }
        let repaired = self.replica(s).is_some_and(|r| r.repaired(n));
        self.note(|| format!("b{s} is repaired under n={n}: {repaired}"));
    }

    pub(super) fn begin_tidying(&mut self, s: usize) {
        let brick = &mut *self.bricks[s];
        let Some(replica) = &brick.replica else { return };
        let extents = replica.clearable_intents(brick.clock, 0).into_iter().flat_map(|(_, e)| e).collect();
        brick.clock += 1;
        brick.tidying = Some((extents, brick.clock, brick.disk.written()));
    }

    pub(super) fn end_tidying(&mut self, s: usize) {
        let brick = &mut *self.bricks[s];
        let (Some((extents, began, upto)), Some(replica)) = (brick.tidying.take(), &mut brick.replica) else { return };
        if !left_out(Rule::W7Flushed) {
            brick.disk.flushed(upto);
        }
        let cleared = replica.clear_intents(INO, &extents, began);
        brick.disk.remove_intents(&cleared);
        self.note(|| format!("b{s} clears intents {cleared:?}"));
    }

    /// [E5] A clean stop ends.
    pub(super) fn end_cleanly(&mut self, s: usize) {
        let brick = &mut *self.bricks[s];
        let Some(replica) = &mut brick.replica else { return };
        let knew_all = brick.registration.clean || brick.was_in_sync;
        if knew_all && replica.planned_regions().is_empty() {
            let began = brick.clock + 1;
            brick.disk.flushed(brick.disk.written());
            for (_, extents) in replica.clearable_intents(began, 0) {
                let cleared = replica.clear_intents(INO, &extents, began);
                brick.disk.remove_intents(&cleared);
            }
            brick.disk.record_clean(true);
        }
        self.stop_process(s);
    }
}
