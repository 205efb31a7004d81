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
    pub(super) fn change(
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
        n: ConfigNo,
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
        let n = if left_out(Rule::E5Late) { configuration.n } else { n };
        let first = member.incarnation == Incarnation(0);
        let fresh = member.state == BrickState::InSync && (first || self.is_unused(set));
        let others = configuration.in_sync().without(slot);
        let other = others.iter().any(|s| configuration.members[s.index()].incarnation != Incarnation(0));
        if member.state == BrickState::InSync && !fresh && !other {
            // The last InSync brick comes back by a cold start only [E6].
            return Outcome::Superseded;
        }
        let outcome = self.change(set, n, effects, |next| {
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
        self.remember_cold_start(set, source, &outcome, effects);
        outcome
    }

    fn remember_cold_start(&mut self, set: SetId, source: Slot, outcome: &Outcome, effects: &mut [Effect]) {
        if let (Outcome::Configuration(configuration), Some(row)) = (outcome, self.sets.get_mut(&set)) {
            if row.cold_starts.len() == MAX_COLD_STARTS {
                row.cold_starts.pop_front();
            }
            row.cold_starts.push_back((configuration.n, configuration.members[source.index()].boot));
            if let Some(Effect::Configured { cold_start, .. }) = effects.last_mut() {
                *cold_start = Some(source);
            }
        }
    }

    /// [E2], [E6], by the administrator's word. When the source was not `InSync`, nobody knows what it lacks: the others are compared
    /// with it in full when they come back, and every client of the volume is evicted, for what it was told is not so any more.
    pub(super) fn accept_loss(
        &mut self,
        set: SetId,
        n: ConfigNo,
        source: Slot,
        registered: &[Option<Registration>; 3],
        time_ns: u64,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        if source.index() >= registered.len() {
            return Outcome::Superseded;
        }
        let mut had_all = false;
        let outcome = self.change(set, n, effects, |next| {
            let since = next.n.next();
            had_all = next.state(source) == BrickState::InSync;
            let known = next.members[source.index()];
            let taken = registered[source.index()];
            if taken.is_none() && (known.incarnation == Incarnation(0) || had_all) {
                return false;
            }
            // [E7] As in a cold start; and what one that was not InSync lacks was flushed or not.
            if !had_all || taken.is_some_and(|t| !t.clean && t.boot != known.boot) {
                next.unflushed_lost = since;
            }
            for slot in Slot::ALL {
                let member = &mut next.members[slot.index()];
                if let Some(r) = registered[slot.index()] {
                    (member.incarnation, member.boot, member.clean) = (r.incarnation, r.boot, r.clean);
                }
                member.full = slot != source && (member.full || !had_all);
                member.state = match registered[slot.index()] {
                    _ if slot == source => BrickState::InSync,
                    Some(_) => BrickState::Syncing,
                    None => BrickState::Out,
                };
                if member.state == BrickState::Syncing {
                    member.syncing_since = since;
                }
            }
            true
        });
        self.remember_cold_start(set, source, &outcome, effects);
        if matches!(outcome, Outcome::Configuration(_)) && !had_all {
            let volume = self.sets.get(&set).map(|row| row.volume);
            let clients = self.sessions.iter().filter(|(_, s)| s.volume.is_some() && s.volume == volume);
            for session in clients.map(|(id, _)| *id).collect::<Vec<_>>() {
                let _ = self.session_evict(session, time_ns, effects);
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
            next.members[slot.index()].full = false;
            true
        })
    }

    /// What `heal full` wants: an `InSync` brick keeps its state until the leader takes it out to be compared; one that is being
    /// repaired begins again, with all there is.
    pub(super) fn compare_all(&mut self, set: SetId, n: ConfigNo, effects: &mut Vec<Effect>) -> Outcome {
        self.change(set, n, effects, |next| {
            let since = next.n.next();
            for member in &mut next.members {
                member.full = true;
                if member.state == BrickState::Syncing {
                    member.syncing_since = since;
                }
            }
            true
        })
    }
}
