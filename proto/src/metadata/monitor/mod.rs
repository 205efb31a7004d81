//! What the leader proposes: from heartbeats, reports and time to commands `[E1]`..`[E6]`, `[E8]`, `[S4]`. Pure; one lives from
//! an election to the next.
//!
//! A brick *lives* when its registered incarnation was answered a heartbeat within the read lease and a margin. What a brick
//! reports counts under the configuration it was made under only.

use super::command::{Command, Registration};
use super::state::State;
use crate::config::{BrickState, Configuration, Slot, Slots};
use crate::left_out::{Rule, left_out};
use crate::types::{BrickId, ConfigNo, Incarnation, SetId};
use std::collections::BTreeMap;

#[cfg(test)]
mod tests;

/// What a brick says in a heartbeat.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beat {
    /// Which brick.
    pub brick: BrickId,
    /// Its present start.
    pub registration: Registration,
    /// The configuration that it has applied; 0: none.
    pub known: ConfigNo,
    /// The configuration that it had applied when it said that it serves no reads until it was put out and came back `[E1]`;
    /// 0 when it does not say so. What it said under an older one may be over.
    pub agreed_under: ConfigNo,
    /// It declares itself failed `[E4]` (and has agreed).
    pub failed: bool,
    /// It is shutting down cleanly `[E5]` (and has agreed).
    pub stopping: bool,
    /// The configuration its reports are made under.
    pub n: ConfigNo,
    /// For which other bricks its list of missed regions is empty `[S4]`.
    pub missed_empty: Slots,
    /// As a `Syncing` brick: nothing left, others' missed taken over, flushed `[S4]`.
    pub repaired: bool,
}

/// Times, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// How long an answered heartbeat lets a brick serve reads `[R1]`.
    pub read_lease_ms: u64,
    /// What is added for clocks that run at different rates `[E1]`.
    pub clock_margin_ms: u64,
    /// `[E6]`
    pub cold_start_wait_ms: u64,
    /// The first wait before a brick that was put out comes back; doubles with each failure up to `back_off_max_ms` `[E8]`.
    pub back_off_ms: u64,
    /// The longest such wait.
    pub back_off_max_ms: u64,
}

/// The wait of a brick that is put out again is at its first value if it was well for this long.
const FORGIVEN_AFTER_MS: u64 = 120_000;

/// A brick that was silent for so long is put out though nobody complains of it.
const ABSENT_MS: u64 = 5_000;

/// How long a brick is asked to leave after the administrator asked for that last.
const LEAVING_MS: u64 = 500;

#[derive(Clone, Copy, Debug)]
struct Heard {
    beat: Beat,
    /// When its last heartbeat was answered.
    answered_ms: u64,
    /// When this start of it was heard first.
    first_ms: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Past {
    /// Times it was put out of late.
    failures: u32,
    /// When it was seen to be `Out` first, this time.
    out_since_ms: Option<u64>,
    /// When it was put out last.
    failed_ms: u64,
}

/// Whether an empty brick may take another's place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Replacement {
    /// It may, under this configuration.
    Now(ConfigNo),
    /// Not yet: the old one has to agree, or its read lease to end `[E1]`.
    Later,
    /// Too few good copies would be left: a sentence.
    Refused(String),
}

/// The leader's view of who lives.
#[derive(Clone, Debug)]
pub struct Monitor {
    timing: Timing,
    elected_ms: u64,
    heard: BTreeMap<BrickId, Heard>,
    /// Bricks that clients complained of, and the configuration under which.
    suspected: BTreeMap<BrickId, ConfigNo>,
    past: BTreeMap<BrickId, Past>,
    /// Bricks that the administrator wants to leave, for another to take their place, and until when that is asked of them.
    leaving: BTreeMap<BrickId, u64>,
    /// Bricks that were asked to agree to their `Out`, and under which configuration.
    asked: BTreeMap<BrickId, ConfigNo>,
    /// Bricks whose `Out` is proposed because they were not heard, and under which configuration.
    doomed: BTreeMap<BrickId, ConfigNo>,
    /// When a second brick of a set that waits for its cold start had registered `[E6]`.
    cold_since_ms: BTreeMap<SetId, u64>,
}

impl Monitor {
    /// At an election: nobody was heard yet, and everybody counts as answered just now `[E1]`.
    #[must_use]
    pub fn new(timing: Timing, now_ms: u64) -> Self {
        Self {
            timing,
            elected_ms: now_ms,
            heard: BTreeMap::new(),
            suspected: BTreeMap::new(),
            past: BTreeMap::new(),
            leaving: BTreeMap::new(),
            asked: BTreeMap::new(),
            doomed: BTreeMap::new(),
            cold_since_ms: BTreeMap::new(),
        }
    }

    /// Changes the times.
    pub fn set_timing(&mut self, timing: Timing) {
        self.timing = timing;
    }

    /// How long nothing must have been answered before a brick surely serves no reads `[E1]`.
    fn silence_ms(&self) -> u64 {
        self.timing.read_lease_ms + self.timing.clock_margin_ms
    }

    /// The configuration of a brick's replica set.
    fn configuration_of(state: &State, brick: BrickId) -> Option<&Configuration> {
        let set = state.bricks.get(&brick)?.set;
        state.sets.get(&set).map(|row| &row.configuration)
    }

    fn registered(state: &State, brick: BrickId) -> Incarnation {
        let member = |c: &Configuration| c.slot_of(brick).map(|slot| c.members[slot.index()].incarnation);
        Self::configuration_of(state, brick).and_then(member).unwrap_or(Incarnation(0))
    }

    /// The brick's registered incarnation was answered of late.
    #[must_use]
    pub fn living(&self, state: &State, brick: BrickId, now_ms: u64) -> bool {
        self.heard.get(&brick).is_some_and(|h| {
            h.answered_ms + self.silence_ms() > now_ms
                && h.beat.registration.incarnation == Self::registered(state, brick)
        })
    }

    /// When a heartbeat of the brick was answered last, if ever by this leader.
    #[must_use]
    pub fn last_answered_ms(&self, brick: BrickId) -> Option<u64> {
        self.heard.get(&brick).map(|h| h.answered_ms)
    }

    /// What the brick said last.
    #[must_use]
    pub fn last_beat(&self, brick: BrickId) -> Option<Beat> {
        self.heard.get(&brick).map(|h| h.beat)
    }

    /// Heartbeats of a server's bricks are about to be answered. Returns the bricks to be asked to agree to their `Out`.
    pub fn heartbeat(&mut self, state: &State, now_ms: u64, beats: &[Beat]) -> Vec<BrickId> {
        let mut asked = Vec::new();
        for beat in beats {
            let Some(row) = state.bricks.get(&beat.brick) else { continue };
            let Some(set) = state.sets.get(&row.set) else { continue };
            let Some(slot) = set.configuration.slot_of(beat.brick) else { continue };
            // [E5] What an earlier start said comes late; it cannot know the configuration that registered a later one.
            let is_registered = beat.registration.incarnation == set.configuration.members[slot.index()].incarnation;
            if !is_registered && beat.known < set.configuration.n {
                continue;
            }
            if is_registered && self.withholds(state, beat.brick) {
                continue;
            }
            let same = |h: &&Heard| h.beat.registration.incarnation == beat.registration.incarnation;
            let first_ms = self.heard.get(&beat.brick).filter(same).map_or(now_ms, |h| h.first_ms);
            self.heard.insert(beat.brick, Heard { beat: *beat, answered_ms: now_ms, first_ms });
            let suspected = self.suspected.get(&beat.brick) == Some(&set.configuration.n)
                || self.compared_next(state, &set.configuration, now_ms) == Some(slot);
            let leaves = self.leaving.get(&beat.brick).is_some_and(|until| now_ms < *until);
            if leaves
                && is_registered
                && set.configuration.state(slot) == BrickState::InSync
                && beat.agreed_under != set.configuration.n
            {
                asked.push(beat.brick);
                continue;
            }
            // [E1] A brick that answers heartbeats but not clients has to agree; it is asked only if it can then be put out, and
            // no other one was asked: who has agreed serves nothing, and where all had, nobody would. A start that is not registered
            // serves nothing, and would still be bound by its word when it is.
            if suspected
                && is_registered
                && beat.agreed_under != set.configuration.n
                && !self.another_goes(&set.configuration, slot)
                && self.may_put_out(state, &set.configuration, slot, false, now_ms)
            {
                asked.push(beat.brick);
                self.asked.insert(beat.brick, set.configuration.n);
            }
        }
        asked
    }

    /// Another brick than the one in `slot` was asked to agree, or has agreed, under this configuration.
    fn another_goes(&self, configuration: &Configuration, slot: Slot) -> bool {
        configuration.in_sync().without(slot).iter().any(|s| {
            let brick = configuration.members[s.index()].brick;
            let has_agreed = self.heard.get(&brick).is_some_and(|h| h.beat.agreed_under == configuration.n);
            has_agreed || self.asked.get(&brick) == Some(&configuration.n)
        })
    }

    /// The bricks that a command takes out of those that are `InSync`, though they may not know, and the configuration that it is for.
    fn taken_out(state: &State, command: &Command) -> Vec<(BrickId, ConfigNo)> {
        let (set, n, out): (_, _, Slots) = match command {
            Command::PutOut { set, n, slot } | Command::ReplaceBrick { set, n, slot, .. } => {
                (set, *n, Slots::NONE.with(*slot))
            }
            Command::ColdStart { set, n, registered, .. } => {
                (set, *n, Slot::ALL.into_iter().filter(|s| registered[s.index()].is_none()).collect())
            }
            Command::AcceptLoss { set, n, source, registered } => {
                let absent = |s: &Slot| s != source && registered[s.index()].is_none();
                (set, *n, Slot::ALL.into_iter().filter(absent).collect())
            }
            _ => return Vec::new(),
        };
        let configuration = state.sets.get(set).map(|row| row.configuration).filter(|c| c.n == n);
        let bricks = |c: Configuration| {
            let was_in_sync = out.iter().filter(move |s| c.state(*s) == BrickState::InSync);
            was_in_sync.map(move |s| (c.members[s.index()].brick, n))
        };
        configuration.into_iter().flat_map(bricks).collect()
    }

    /// Something is about to be proposed. A brick that it takes out because nothing was answered to it for long must not be answered
    /// any more: it would serve reads when that is committed `[E1]`.
    pub fn proposes(&mut self, state: &State, command: &Command) {
        self.doomed.extend(Self::taken_out(state, command));
    }

    /// What was proposed is refused: who was to go is answered again.
    pub fn refused(&mut self, state: &State, command: &Command) {
        for (brick, _) in Self::taken_out(state, command) {
            self.doomed.remove(&brick);
        }
    }

    /// This brick is not answered: its `Out` is proposed. It ends with the configuration that it was proposed for.
    #[must_use]
    pub fn withholds(&self, state: &State, brick: BrickId) -> bool {
        let n = Self::configuration_of(state, brick).map(|c| c.n);
        !left_out(Rule::E1Answered) && n.is_some() && self.doomed.get(&brick).copied() == n
    }

    /// A client says that a brick failed or did not answer, under configuration `n` `[W4]`. True when that is news.
    pub fn suspect(&mut self, state: &State, set: SetId, n: ConfigNo, slot: Slot) -> bool {
        let configuration = state.sets.get(&set).map(|row| row.configuration).filter(|c| c.n == n);
        let member = configuration.and_then(|c| c.members.get(slot.index()).copied());
        member.is_some_and(|m| self.suspected.insert(m.brick, n) != Some(n))
    }

    /// [E2] With `slot` out, an `InSync` brick stays that lives, and two that are written to. One that has agreed to its own `Out`
    /// is about to go, but it has everything: where the brick in `slot` is gone, or is no copy yet, it stays until another is `InSync`.
    fn may_put_out(
        &self,
        state: &State,
        configuration: &Configuration,
        slot: Slot,
        is_gone: bool,
        now_ms: u64,
    ) -> bool {
        if left_out(Rule::E2Last) {
            return configuration.state(slot) != BrickState::Out;
        }
        if configuration.state(slot) == BrickState::Out || configuration.writable().without(slot).count() < 2 {
            return false;
        }
        let is_copy = configuration.state(slot) == BrickState::InSync;
        configuration.in_sync().without(slot).iter().any(|s| {
            let brick = configuration.members[s.index()].brick;
            let agreed = |b: &Beat| b.agreed_under == configuration.n && is_copy && (!is_gone || b.stopping);
            let goes = |b: &Beat| b.failed || agreed(b);
            let well = self.heard.get(&brick).is_some_and(|h| !goes(&h.beat));
            well && (self.living(state, brick, now_ms) || left_out(Rule::E2Restarted))
        })
    }

    /// What to propose now. Called at least every 50 ms and after each of the above; proposing the same again is harmless,
    /// since every command names the configuration it was made for.
    pub fn poll(&mut self, state: &State, now_ms: u64) -> Vec<Command> {
        self.heard.retain(|brick, _| state.bricks.contains_key(brick));
        self.past.retain(|brick, _| state.bricks.contains_key(brick));
        self.leaving.retain(|_, until| now_ms < *until);
        for of_now in [&mut self.suspected, &mut self.asked, &mut self.doomed] {
            of_now.retain(|brick, n| Self::configuration_of(state, *brick).is_some_and(|c| c.n == *n));
        }
        self.cold_since_ms.retain(|set, _| state.sets.contains_key(set));
        // One change of a set at a time: the next one is judged by the configuration that this one makes.
        let due: Vec<Command> = state
            .sets
            .iter()
            .filter_map(|(set, row)| self.next_change(state, *set, &row.configuration, now_ms))
            .collect();
        due.iter().for_each(|command| self.proposes(state, command));
        due
    }

    fn next_change(
        &mut self,
        state: &State,
        set: SetId,
        configuration: &Configuration,
        now_ms: u64,
    ) -> Option<Command> {
        for slot in Slot::ALL {
            let brick = configuration.members[slot.index()].brick;
            let past = self.past.entry(brick).or_default();
            if configuration.state(slot) == BrickState::Out {
                past.out_since_ms.get_or_insert(now_ms);
            } else {
                past.out_since_ms = None;
            }
        }
        self.registration(state, configuration, now_ms)
            .or_else(|| self.cold_start(state, set, configuration, now_ms))
            .or_else(|| self.put_out(state, set, configuration, now_ms))
            .or_else(|| self.promotion(state, set, configuration, now_ms))
            .or_else(|| self.return_of_one(state, set, configuration, now_ms))
    }

    /// The start of a brick that the log does not know yet, still being heard. What it said last has to be of this configuration:
    /// an earlier start, which the log does know or has known, may have been heard late `[E5]`.
    fn new_start(&self, configuration: &Configuration, slot: Slot, now_ms: u64) -> Option<Registration> {
        let member = configuration.members[slot.index()];
        let heard = self.heard.get(&member.brick)?;
        let fresh = heard.beat.registration.incarnation != member.incarnation;
        let is_of_now = heard.beat.known >= configuration.n || left_out(Rule::E5Late);
        (fresh && is_of_now && !heard.beat.failed && heard.answered_ms + self.silence_ms() > now_ms)
            .then_some(heard.beat.registration)
    }

    /// [E5]
    fn registration(&self, state: &State, configuration: &Configuration, now_ms: u64) -> Option<Command> {
        for slot in Slot::ALL {
            let member = configuration.members[slot.index()];
            let Some(new) = self.new_start(configuration, slot, now_ms) else { continue };
            // Heard since this one started: bricks that were killed together must not take each other for living.
            let since_ms = self.heard.get(&member.brick).map_or(now_ms, |h| h.first_ms);
            let another_lives = configuration.in_sync().without(slot).iter().any(|s| {
                let other = configuration.members[s.index()].brick;
                self.living(state, other, now_ms) && self.heard.get(&other).is_some_and(|h| h.answered_ms >= since_ms)
            });
            let first = member.incarnation == Incarnation(0);
            if member.state != BrickState::InSync || another_lives || first {
                let Registration { incarnation, boot, clean } = new;
                return Some(Command::Register { brick: member.brick, n: configuration.n, incarnation, boot, clean });
            }
        }
        None
    }

    /// [E6] No `InSync` brick has lived through.
    fn cold_start(&mut self, state: &State, set: SetId, configuration: &Configuration, now_ms: u64) -> Option<Command> {
        let in_sync = configuration.in_sync();
        if in_sync.iter().any(|s| self.living(state, configuration.members[s.index()].brick, now_ms)) {
            self.cold_since_ms.remove(&set);
            return None;
        }
        let registered = Slot::ALL.map(|slot| self.new_start(configuration, slot, now_ms));
        let back: Slots = in_sync.iter().filter(|s| registered[s.index()].is_some()).collect();
        if back.count() >= 2 {
            self.cold_since_ms.entry(set).or_insert(now_ms);
        } else {
            self.cold_since_ms.remove(&set);
        }
        let waited = self.cold_since_ms.get(&set).is_some_and(|at| at + self.timing.cold_start_wait_ms <= now_ms);
        // One that was not heard may be alive and serve reads for as long as its lease lasts [E1].
        let silent = now_ms >= self.elected_ms + self.silence_ms();
        let hasty = left_out(Rule::E6Wait) && !back.is_empty() && silent;
        if !(back == in_sync || (back.count() >= 2 && waited && silent) || hasty) {
            return None;
        }
        let kept = |s: &Slot| registered[s.index()].is_some_and(|r| r.boot == configuration.members[s.index()].boot);
        let clean = |s: &Slot| registered[s.index()].is_some_and(|r| r.clean);
        let source = match left_out(Rule::E6Boot) {
            true => back.iter().next()?,
            false => back.iter().max_by_key(|s| (kept(s), clean(s), core::cmp::Reverse(s.0)))?,
        };
        Some(Command::ColdStart { set, n: configuration.n, source, registered })
    }

    /// [E1], [E2], [E4]
    fn put_out(&mut self, state: &State, set: SetId, configuration: &Configuration, now_ms: u64) -> Option<Command> {
        for slot in configuration.writable().iter() {
            let brick = configuration.members[slot.index()].brick;
            let heard = self.heard.get(&brick);
            let registered = Self::registered(state, brick);
            let own = heard.filter(|h| h.beat.registration.incarnation == registered).map(|h| h.beat);
            // One that has agreed stays so until it is InSync again [E1]: while it is Syncing that is no wish to leave.
            let in_sync = configuration.state(slot) == BrickState::InSync;
            let is_of_now =
                |b: Beat| b.agreed_under == configuration.n || left_out(Rule::E1Agreed) && b.agreed_under.0 > 0;
            let agreed = own.is_some_and(is_of_now);
            let wants = own.is_some_and(|b| b.failed || b.stopping) || agreed && in_sync;
            let suspected = self.suspected.get(&brick) == Some(&configuration.n);
            let elected_ms = if left_out(Rule::E1Elected) { 0 } else { self.elected_ms };
            // Another start of it that is heard, but could not open the brick and is not registered, speaks for itself only: of
            // the one that may still serve reads nothing was answered since this one was heard first.
            let last = heard.map_or(0, |h| if own.is_some() { h.answered_ms } else { h.first_ms }).max(elected_ms);
            let silent = now_ms >= last + self.silence_ms();
            if !wants && !suspected && now_ms < last + self.silence_ms().max(ABSENT_MS) {
                continue;
            }
            // A Syncing brick serves no reads, so nothing has to run out.
            let serves_none = agreed || silent || !in_sync || left_out(Rule::E1Lapsed);
            let is_gone = silent && !agreed;
            if serves_none && self.may_put_out(state, configuration, slot, is_gone, now_ms) {
                let past = self.past.entry(brick).or_default();
                if past.out_since_ms.is_none() && past.failed_ms + 1000 < now_ms {
                    past.failures = if past.failed_ms + FORGIVEN_AFTER_MS < now_ms { 1 } else { past.failures + 1 };
                    past.failed_ms = now_ms;
                }
                return Some(Command::PutOut { set, n: configuration.n, slot });
            }
        }
        None
    }

    /// [S4]
    fn promotion(&self, state: &State, set: SetId, configuration: &Configuration, now_ms: u64) -> Option<Command> {
        let report = |slot: Slot| {
            let brick = configuration.members[slot.index()].brick;
            let heard = self.heard.get(&brick)?;
            let current = heard.beat.n == configuration.n || left_out(Rule::S4Number);
            (current && self.living(state, brick, now_ms)).then_some(heard.beat)
        };
        for slot in configuration.syncing().iter() {
            let empty = configuration.in_sync().iter().all(|s| report(s).is_some_and(|b| b.missed_empty.has(slot)));
            if (empty || left_out(Rule::S4Reports))
                && report(slot).is_some_and(|b| b.repaired && !b.failed && !b.stopping)
            {
                return Some(Command::Promote { set, n: configuration.n, slot });
            }
        }
        None
    }

    /// The last moment at which this start of a brick may have been given a read lease by this leader, or one before it. Another start
    /// of it that is heard speaks for itself only.
    fn last_sign_ms(&self, brick: BrickId, incarnation: Incarnation) -> u64 {
        let sign = |h: &Heard| if h.beat.registration.incarnation == incarnation { h.answered_ms } else { h.first_ms };
        self.heard.get(&brick).map_or(0, sign).max(self.elected_ms)
    }

    /// The brick that goes out next to be compared in full: one at a time, and only when all are well, so that two good ones stay.
    fn compared_next(&self, state: &State, configuration: &Configuration, now_ms: u64) -> Option<Slot> {
        let all_well = configuration.in_sync().count() == Slot::ALL.len() as u32
            && configuration.members.iter().all(|m| {
                self.living(state, m.brick, now_ms)
                    && self.heard.get(&m.brick).is_some_and(|h| !h.beat.failed && !h.beat.stopping)
            });
        Slot::ALL.into_iter().find(|s| all_well && configuration.members[s.index()].full)
    }

    /// May an empty brick take the place of the one in `slot` now?
    #[must_use]
    pub fn may_replace(&self, state: &State, set: SetId, slot: Slot, force: bool, now_ms: u64) -> Replacement {
        let Some(configuration) = state.sets.get(&set).map(|row| row.configuration) else { return Replacement::Later };
        let Some(member) = configuration.members.get(slot.index()).copied() else { return Replacement::Later };
        let is_well = |s: Slot| {
            let brick = configuration.members[s.index()].brick;
            let heard = self.heard.get(&brick);
            self.living(state, brick, now_ms)
                && heard.is_some_and(|h| !h.beat.failed && h.beat.agreed_under != configuration.n)
        };
        let others = configuration.in_sync().without(slot).iter().filter(|s| is_well(*s)).count();
        let is_good = member.state == BrickState::InSync && self.living(state, member.brick, now_ms);
        if others == 0 && !left_out(Rule::E2Replaced) {
            return Replacement::Refused(
                "no other brick of its replica set that is in sync is heard: nothing could be built from; bring another one back first".into(),
            );
        }
        if others == 1 && is_good && !force {
            return Replacement::Refused(
                "it is one of two good copies: until the new brick is built there would be one; bring the third brick back first, or say --force".into(),
            );
        }
        let heard = self.heard.get(&member.brick);
        let own = heard.filter(|h| h.beat.registration.incarnation == member.incarnation);
        let agreed = own.is_some_and(|h| h.beat.agreed_under == configuration.n);
        let last = self.last_sign_ms(member.brick, member.incarnation);
        // [E1] A brick that is InSync may serve reads until it has agreed not to, or cannot any more.
        let serves_none = member.state != BrickState::InSync || agreed || now_ms >= last + self.silence_ms();
        if serves_none || left_out(Rule::E1Replaced) {
            return Replacement::Now(configuration.n);
        }
        Replacement::Later
    }

    /// Asks a brick to agree that another takes its place, for a while: an administrator who gives up has to say nothing.
    pub fn ask_to_leave(&mut self, brick: BrickId, now_ms: u64) {
        self.leaving.insert(brick, now_ms + LEAVING_MS);
    }

    /// The command that makes a brick the one that is `InSync`, though others that were are not there `[E2]`, `[E6]`.
    ///
    /// # Errors
    /// Why that must not be, or need not be: a sentence.
    pub fn accept_loss(&self, state: &State, set: SetId, source: Slot, now_ms: u64) -> Result<Command, String> {
        let configuration = state.sets.get(&set).map(|row| row.configuration).ok_or("there is no such replica set")?;
        let brick_in = |slot: Slot| configuration.members[slot.index()].brick;
        let path = |slot: Slot| state.bricks.get(&brick_in(slot)).map_or("", |b| b.path.as_str());
        let registered = Slot::ALL.map(|slot| self.new_start(&configuration, slot, now_ms));
        let is_back = |slot: Slot| registered[slot.index()].is_some();
        let lives = |slot: Slot| self.living(state, brick_in(slot), now_ms);
        let failed = self.heard.get(&brick_in(source)).is_some_and(|h| h.beat.failed || h.beat.stopping);
        if failed || !lives(source) && !is_back(source) {
            return Err("it is not heard, or has failed: its server has to be up and its disk to work first".into());
        }
        if configuration.in_sync().iter().filter(|slot| is_back(*slot)).count() > 1 {
            return Err("two bricks that were in sync are back: it goes on by itself within a minute".into());
        }
        for slot in configuration.in_sync().iter() {
            let heard = self.heard.get(&brick_in(slot));
            // One that has failed has agreed: it serves nothing [E4].
            let member = configuration.members[slot.index()];
            let own = heard.filter(|h| h.beat.registration.incarnation == member.incarnation);
            let ended = own.is_some_and(|h| h.beat.failed);
            let last = self.last_sign_ms(member.brick, member.incarnation);
            if lives(slot) && !ended {
                return Err(format!(
                    "brick {} is in sync and is heard: nothing has to be given up. If writes wait, they wait for a second brick: bring one back, or replace one",
                    path(slot)
                ));
            }
            if slot != source && is_back(slot) && configuration.state(source) != BrickState::InSync {
                return Err(format!(
                    "brick {} was in sync and is back: if any has to be taken, take that one",
                    path(slot)
                ));
            }
            // [E1] It may serve reads for as long as its lease lasts.
            if !is_back(slot) && !ended && now_ms < last + self.silence_ms() {
                return Err(format!(
                    "brick {} was in sync and was heard just now; try again in some seconds",
                    path(slot)
                ));
            }
        }
        Ok(Command::AcceptLoss { set, n: configuration.n, source, registered })
    }

    /// The administrator wants a brick back now: its failures so far are forgiven `[E8]`.
    pub fn forgive(&mut self, brick: BrickId) {
        let past = self.past.entry(brick).or_default();
        *past = Past { failures: 0, out_since_ms: past.out_since_ms.map(|_| 0), ..*past };
    }

    /// [E8] A brick that was put out and lives comes back, after a while that grows with its failures.
    fn return_of_one(&self, state: &State, set: SetId, configuration: &Configuration, now_ms: u64) -> Option<Command> {
        for slot in configuration.out().iter() {
            let brick = configuration.members[slot.index()].brick;
            let Some(heard) = self.heard.get(&brick) else { continue };
            if !self.living(state, brick, now_ms) || heard.beat.failed || heard.beat.stopping {
                continue;
            }
            let past = self.past.get(&brick).copied().unwrap_or_default();
            let doublings = past.failures.saturating_sub(1).min(16);
            let wait = (self.timing.back_off_ms << doublings).min(self.timing.back_off_max_ms);
            let wait = if left_out(Rule::E8) { 0 } else { wait };
            if past.out_since_ms.is_some_and(|at| at + wait <= now_ms) {
                return Some(Command::Rejoin { set, n: configuration.n, slot });
            }
        }
        None
    }
}
