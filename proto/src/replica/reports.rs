//! What a brick reports to the leader, and how a `Syncing` brick comes to its end of repair `[S1]`, `[S4]`.

use super::{Replica, regions_of_extents};
use crate::config::{BrickState, Slot, Slots};
use crate::interval::IntervalSet;
use crate::left_out::{Rule, left_out};
use crate::types::{ConfigNo, Ino};

/// The part of a heartbeat that `[S4]` is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// The configuration that it is made under.
    pub n: ConfigNo,
    /// Of which other bricks nothing is known to be missed.
    pub missed_empty: Slots,
    /// As a `Syncing` brick: nothing is left to repair, the others' lists are taken over, all is flushed.
    pub repaired: bool,
}

impl Replica {
    /// What can be reported now. `None` while something accepted under an older configuration runs `[F2]`, and before this
    /// start is registered.
    #[must_use]
    pub fn report(&self) -> Option<Report> {
        let configuration = self.configuration?;
        if !self.is_live() || self.failed || self.runs_under_older(configuration.n) {
            return None;
        }
        let missed_empty = Slot::ALL
            .into_iter()
            .filter(|x| *x != self.slot && self.files.values().all(|f| f.missed[x.index()].is_empty()))
            .collect();
        let repaired = self.repaired_under == Some(configuration.n);
        Some(Report { n: configuration.n, missed_empty, repaired })
    }

    /// This brick is `Syncing` and has to make its plan: tells under which configuration, and from which bricks intents are
    /// to be fetched (none when its last shutdown was clean and it is not compared in full) `[S1]`.
    #[must_use]
    pub fn plan_due(&self) -> Option<(ConfigNo, Slots)> {
        let configuration = self.configuration?;
        let me = configuration.members[self.slot.index()];
        if !self.is_live() || me.state != BrickState::Syncing || self.planned_since == Some(me.syncing_since) {
            return None;
        }
        Some((configuration.n, if me.clean && !me.full { Slots::NONE } else { configuration.in_sync() }))
    }

    /// The plan is everything that the set has, not only intents `[S1]`.
    #[must_use]
    pub fn plans_in_full(&self) -> bool {
        self.configuration.is_some_and(|c| c.members[self.slot.index()].full) && !left_out(Rule::S1Full)
    }

    /// The intents of the source have come, under configuration `n`: makes the plan. False: the configuration has moved on.
    pub fn plan(&mut self, n: ConfigNo, source_intents: &[(Ino, Vec<u64>)]) -> bool {
        let Some((now, _)) = self.plan_due() else { return false };
        if now != n {
            return false;
        }
        for (ino, extents) in source_intents.iter().filter(|_| !left_out(Rule::S1Source)) {
            let regions = regions_of_extents(extents.iter().copied());
            self.files.entry(*ino).or_default().plan.union(&regions);
        }
        for file in self.files.values_mut().filter(|_| !left_out(Rule::S1Own)) {
            let own = regions_of_extents(file.inherited.iter().copied());
            file.plan.union(&own);
        }
        self.planned_since = self.configuration.map(|c| c.members[self.slot.index()].syncing_since);
        true
    }

    /// This brick is `Syncing`, planned, and nothing of its plan is left: it may ask the `InSync` bricks for their lists, and
    /// when none has anything of this brick's, take over the rest, flush, and call [`Replica::repaired`].
    #[must_use]
    pub fn finish_due(&self) -> Option<(ConfigNo, Slots)> {
        let configuration = self.configuration?;
        let me = configuration.members[self.slot.index()];
        let due = self.is_live()
            && me.state == BrickState::Syncing
            && !self.failed
            && self.planned_since == Some(me.syncing_since)
            && self.repaired_under != Some(configuration.n)
            && !self.runs_under_older(configuration.n)
            && self.files.values().all(|f| f.plan.is_empty());
        due.then(|| (configuration.n, configuration.in_sync()))
    }

    /// Under configuration `n` everything was taken over and flushed. False: the configuration has moved on.
    pub fn repaired(&mut self, n: ConfigNo) -> bool {
        if self.finish_due().is_none_or(|(now, _)| now != n) {
            return false;
        }
        self.repaired_under = Some(n);
        true
    }

    /// Regions of the plan that are left, in all files.
    #[must_use]
    pub fn planned_regions(&self) -> Vec<(Ino, IntervalSet)> {
        self.files.iter().filter(|(_, f)| !f.plan.is_empty()).map(|(ino, f)| (*ino, f.plan.clone())).collect()
    }
}
