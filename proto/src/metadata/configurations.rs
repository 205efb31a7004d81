//! The step for configurations of replica sets `[E1]`..`[E6]`, `[S4]`. Each change makes `n + 1`; one that was proposed for
//! another `n` is superseded. What only the leader can know (who lives, who has agreed) it has checked before it proposed.

use super::command::{Effect, Outcome, Registration};
use super::state::State;
use crate::config::{BrickState, Slot};
use crate::left_out::{Rule, left_out};
use crate::types::{BrickId, ConfigNo, Incarnation, SetId};

/// Cold starts that are remembered per set.
const MAX_COLD_STARTS: usize = 16;

impl State {
    fn change(
        &mut self,
        set: SetId,
        n: ConfigNo,
        effects: &mut Vec<Effect>,
        change: impl FnOnce(&mut crate::config::Configuration) -> bool,
    ) -> Outcome {
        let Some(row) = self.sets.get_mut(&set) else { return Outcome::Superseded };
        if row.configuration.n != n {
            return Outcome::Superseded;
        }
        let mut next = row.configuration;
        if !change(&mut next) {
            return Outcome::Superseded;
        }
        next.n = n.next();
        // I8, whatever was proposed.
        if next.in_sync().is_empty() && !left_out(Rule::E2Last) {
            return Outcome::Superseded;
        }
        row.configuration = next;
        effects.push(Effect::Configured { set, configuration: next, cold_start: None });
        Outcome::Configuration(next)
    }

    /// No file of the set was ever leased, so no brick of it can hold anything.
    fn is_unused(&self, set: SetId) -> bool {
        !self
            .inodes
            .values()
            .any(|i| matches!(&i.node, super::state::Node::File { set: s, lease } if *s == set && lease.epoch.0 > 0))
    }

    /// [E5] A brick has started: it becomes `Syncing`, and `n + 1` even if it was so already. One that has been `InSync` since
    /// its set was made stays so at its very first start, and as long as the set is unused: there is nothing that it could
    /// lack, for what was acknowledged was so by every `InSync` brick [W3], and it has never answered anything.
    pub(super) fn register(
        &mut self,
        brick: BrickId,
        registration: Registration,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(set) = self.bricks.get(&brick).map(|b| b.set) else { return Outcome::Superseded };
        let Some(configuration) = self.sets.get(&set).map(|s| s.configuration) else { return Outcome::Superseded };
        let Some(slot) = configuration.slot_of(brick) else { return Outcome::Superseded };
        let member = configuration.members[slot.index()];
        if registration.incarnation == Incarnation(0) || member.incarnation == registration.incarnation {
            return Outcome::Superseded;
        }
        let first = member.incarnation == Incarnation(0);
        let fresh = member.state == BrickState::InSync && (first || self.is_unused(set));
        let others = configuration.in_sync().without(slot);
        let other = others.iter().any(|s| configuration.members[s.index()].incarnation != Incarnation(0));
        if member.state == BrickState::InSync && !fresh && !other {
            // The last InSync brick comes back by a cold start only [E6].
            return Outcome::Superseded;
        }
        let outcome = self.change(set, configuration.n, effects, |next| {
            let since = next.n.next();
            let member = &mut next.members[slot.index()];
            member.incarnation = registration.incarnation;
            member.boot = registration.boot;
            member.clean = registration.clean;
            if !fresh {
                member.state = BrickState::Syncing;
                member.syncing_since = since;
            }
            true
        });
        if left_out(Rule::E5Number) && member.state == BrickState::Syncing {
            return self.same_number(set, configuration.n, effects);
        }
        outcome
    }

    /// What is wrong: a change that makes no new `n`.
    fn same_number(&mut self, set: SetId, n: ConfigNo, effects: &mut [Effect]) -> Outcome {
        let Some(row) = self.sets.get_mut(&set) else { return Outcome::Superseded };
        row.configuration.n = n;
        if let Some(Effect::Configured { configuration, .. }) = effects.last_mut() {
            configuration.n = n;
        }
        Outcome::Configuration(row.configuration)
    }

    /// [E6]
    pub(super) fn cold_start(
        &mut self,
        set: SetId,
        n: ConfigNo,
        source: Slot,
        registered: &[Option<Registration>; 3],
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(Some(taken)) = registered.get(source.index()).copied() else { return Outcome::Superseded };
        let outcome = self.change(set, n, effects, |next| {
            if next.state(source) != BrickState::InSync {
                return false;
            }
            let since = next.n.next();
            // [E7] Where the kernel did not restart, or all was flushed, the source holds everything acknowledged.
            let kept = |s: &Slot| registered[s.index()].is_some_and(|r| r.boot == next.members[s.index()].boot);
            let stayed = |s: &Slot| *s != source && (registered[s.index()].is_none() || kept(s));
            let excused = left_out(Rule::E7Source) && Slot::ALL.iter().any(stayed);
            if !taken.clean && !kept(&source) && !excused {
                next.unflushed_lost = since;
            }
            for slot in Slot::ALL {
                let member = &mut next.members[slot.index()];
                match registered[slot.index()] {
                    Some(r) => {
                        member.incarnation = r.incarnation;
                        member.boot = r.boot;
                        member.clean = r.clean;
                        if slot != source {
                            member.state = BrickState::Syncing;
                            member.syncing_since = since;
                        }
                    }
                    None => member.state = BrickState::Out,
                }
            }
            true
        });
        if let (Outcome::Configuration(configuration), Some(row)) = (&outcome, self.sets.get_mut(&set)) {
            if row.cold_starts.len() == MAX_COLD_STARTS {
                row.cold_starts.pop_front();
            }
            row.cold_starts.push_back((configuration.n, taken.boot));
            if let Some(Effect::Configured { cold_start, .. }) = effects.last_mut() {
                *cold_start = Some(source);
            }
        }
        outcome
    }

    /// [E1], [E2]
    pub(super) fn put_out(&mut self, set: SetId, n: ConfigNo, slot: Slot, effects: &mut Vec<Effect>) -> Outcome {
        self.change(set, n, effects, |next| {
            if slot.index() >= next.members.len() || next.state(slot) == BrickState::Out {
                return false;
            }
            next.members[slot.index()].state = BrickState::Out;
            let stays = next.in_sync().iter().any(|s| next.members[s.index()].incarnation != Incarnation(0));
            stays && next.writable().count() >= 2 || left_out(Rule::E2Last)
        })
    }

    /// A brick that was put out and lives comes back.
    pub(super) fn rejoin(&mut self, set: SetId, n: ConfigNo, slot: Slot, effects: &mut Vec<Effect>) -> Outcome {
        self.change(set, n, effects, |next| {
            if slot.index() >= next.members.len() || next.state(slot) != BrickState::Out {
                return false;
            }
            let since = next.n.next();
            let member = &mut next.members[slot.index()];
            if member.incarnation == Incarnation(0) {
                return false;
            }
            member.state = BrickState::Syncing;
            member.syncing_since = since;
            // What it was told since its last start counts as unclean: only a registration tells of a clean stop.
            member.clean = false;
            true
        })
    }

    /// [S4]
    pub(super) fn promote(&mut self, set: SetId, n: ConfigNo, slot: Slot, effects: &mut Vec<Effect>) -> Outcome {
        self.change(set, n, effects, |next| {
            if slot.index() >= next.members.len() || next.state(slot) != BrickState::Syncing {
                return false;
            }
            next.members[slot.index()].state = BrickState::InSync;
            true
        })
    }
}
