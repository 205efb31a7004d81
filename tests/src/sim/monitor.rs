//! What the leader proposes, as small as the rules allow `[E1]`, `[E2]`, `[E5]`, `[E6]`, `[S4]`.

use mortar_proto::config::{BrickState, Slot, Slots};
use mortar_proto::metadata::Command;
use mortar_proto::metadata::monitor::{Beat, Timing};
use mortar_proto::types::{BrickId, ConfigNo, Incarnation};

use super::log::{Log, SET};

/// One lives from an election to the next.
#[derive(Debug)]
pub struct Monitor {
    timing: Timing,
    since_ms: u64,
    beats: [Option<(u64, Beat)>; 3],
    answered_ms: [u64; 3],
    suspected: [Option<ConfigNo>; 3],
    out_since_ms: [Option<u64>; 3],
    cold_since_ms: Option<u64>,
}

impl Monitor {
    /// At an election.
    #[must_use]
    pub fn new(timing: Timing, now_ms: u64) -> Self {
        Self {
            timing,
            since_ms: now_ms,
            beats: [None; 3],
            answered_ms: [now_ms; 3],
            suspected: [None; 3],
            out_since_ms: [None; 3],
            cold_since_ms: None,
        }
    }
    /// Heartbeats are about to be answered. Returns bricks that are asked to agree to their `Out`.
    pub fn heartbeat(&mut self, log: &Log, now_ms: u64, beats: &[Beat]) -> Vec<BrickId> {
        let mut asked = Vec::new();
        for beat in beats {
            let Some(slot) = log.configuration.slot_of(beat.brick) else { continue };
            self.beats[slot.index()] = Some((now_ms, *beat));
            self.answered_ms[slot.index()] = now_ms;
            if self.suspected[slot.index()] == Some(log.configuration.n) && self.may_go(log, now_ms, slot) {
                asked.push(beat.brick);
            }
        }
        asked
    }
    /// A client says that a brick does not answer.
    pub fn suspect(&mut self, log: &Log, _now_ms: u64, n: ConfigNo, slot: Slot) {
        if n == log.configuration.n {
            self.suspected[slot.index()] = Some(n);
        }
    }
    fn heard(&self, now_ms: u64, slot: Slot) -> Option<&Beat> {
        let (at, beat) = self.beats[slot.index()].as_ref()?;
        (at + self.timing.read_lease_ms > now_ms).then_some(beat)
    }
    fn live(&self, log: &Log, now_ms: u64, slot: Slot) -> Option<&Beat> {
        let registered = log.configuration.members[slot.index()].incarnation;
        self.heard(now_ms, slot).filter(|b| b.registration.incarnation == registered && registered != Incarnation(0))
    }
    /// [E2]
    fn may_go(&self, log: &Log, now_ms: u64, slot: Slot) -> bool {
        let c = &log.configuration;
        let stays = c.in_sync().without(slot).iter().any(|s| self.live(log, now_ms, s).is_some_and(|b| !b.failed));
        match c.state(slot) {
            BrickState::Out => false,
            BrickState::InSync => stays && c.writable().without(slot).count() >= 2,
            BrickState::Syncing => true,
        }
    }
    /// What to propose now.
    pub fn poll(&mut self, log: &Log, now_ms: u64) -> Option<Command> {
        let c = &log.configuration;
        let n = c.n;
        let lapse = self.timing.read_lease_ms + self.timing.clock_margin_ms;
        let mut fresh = Slots::NONE;
        for slot in Slot::ALL {
            let member = &c.members[slot.index()];
            if member.state != BrickState::Out {
                self.out_since_ms[slot.index()] = None;
            } else if self.out_since_ms[slot.index()].is_none() {
                self.out_since_ms[slot.index()] = Some(now_ms);
            }
            if self.heard(now_ms, slot).is_some_and(|b| b.registration.incarnation != member.incarnation) {
                fresh.insert(slot);
            }
        }
        let living = c.in_sync().iter().any(|s| self.live(log, now_ms, s).is_some());
        for slot in fresh.iter() {
            let Some(beat) = self.heard(now_ms, slot).copied() else { continue };
            if beat.failed || beat.stopping {
                continue;
            }
            if c.state(slot) != BrickState::InSync || living {
                let r = beat.registration;
                return Some(Command::Register {
                    brick: beat.brick,
                    incarnation: r.incarnation,
                    boot: r.boot,
                    clean: r.clean,
                });
            }
        }
        // [E6]
        let in_sync = c.in_sync();
        if fresh.and(in_sync) == in_sync || (!living && fresh.and(in_sync).count() >= 2) {
            let since = *self.cold_since_ms.get_or_insert(now_ms);
            let all = fresh.covers(in_sync);
            let expired = in_sync.minus(fresh).iter().all(|s| self.answered_ms[s.index()] + lapse <= now_ms);
            if all || (since + self.timing.cold_start_wait_ms <= now_ms && expired) {
                let kept =
                    |s: &Slot| self.heard(now_ms, *s).is_some_and(|b| b.registration.boot == c.members[s.index()].boot);
                let able = fresh.and(in_sync);
                let source = able.iter().find(kept).or_else(|| able.iter().next());
                if let Some(source) = source {
                    self.cold_since_ms = None;
                    let registered = Slot::ALL.map(|s| self.heard(now_ms, s).map(|b| b.registration));
                    return Some(Command::ColdStart { set: SET, n, source, registered });
                }
            }
        } else {
            self.cold_since_ms = None;
        }
        for slot in c.writable().iter() {
            // An agreement lasts until the brick is `InSync` again, so it says nothing about a `Syncing` one.
            let agreed = self.live(log, now_ms, slot).is_some_and(|b| {
                b.agreed_under == n && (b.failed || b.stopping || c.state(slot) == BrickState::InSync)
            });
            let silent = self.answered_ms[slot.index()] + lapse <= now_ms && self.since_ms + lapse <= now_ms;
            let useless = c.state(slot) == BrickState::Syncing && self.suspected[slot.index()] == Some(n);
            if (agreed || silent || useless) && self.may_go(log, now_ms, slot) {
                return Some(Command::PutOut { set: SET, n, slot });
            }
        }
        for slot in c.out().iter() {
            let waited = self.out_since_ms[slot.index()].is_some_and(|at| at + self.timing.back_off_ms <= now_ms);
            if waited && self.live(log, now_ms, slot).is_some_and(|b| !b.failed && !b.stopping) {
                return Some(Command::Rejoin { set: SET, n, slot });
            }
        }
        for slot in c.syncing().iter() {
            let ready = self.live(log, now_ms, slot).is_some_and(|b| b.n == n && b.repaired)
                && in_sync
                    .iter()
                    .all(|s| self.live(log, now_ms, s).is_some_and(|b| b.n == n && b.missed_empty.has(slot)));
            if ready {
                return Some(Command::Promote { set: SET, n, slot });
            }
        }
        None
    }
}
