//! Mutations, flushes, and giving the lease back `[W1]`, `[W3]`, `[W4]`, `[W8]`.

use super::requests::Job;
use super::{Body, Completion, Coordinator, Effect, MAX_IN_FLIGHT, Mutation, OpId, Phase, Waiting};
use crate::config::{Slot, Slots};
use crate::left_out::{Rule, left_out};
use crate::types::{ByteRange, ConfigNo, Seq};

/// How long after a brick has failed a mutation that others have applied it is asked again.
const RETRY_FAILED_MS: u64 = 500;

/// A mutation that was sent and is not acknowledged by every writable brick yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) op: OpId,
    pub(super) mutation: Mutation,
    pub(super) range: ByteRange,
    pub(super) since_ms: u64,
    acknowledged: Slots,
    failed: Slots,
    errno: i32,
    /// When a brick failed it last.
    failed_ms: u64,
    /// The application has its answer already.
    pub(super) answered: bool,
}

impl InFlight {
    pub(super) fn is_acknowledged_by(&self, bricks: Slots) -> bool {
        self.acknowledged.covers(bricks)
    }
}

/// A flush under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flushing {
    number: u64,
    /// `None`: our own, before the lease is given back, or one that the application does not wait for any more.
    pub(super) op: Option<OpId>,
    pub(super) since_ms: u64,
    pub(super) done: Slots,
    sent: bool,
    /// Everything that had been started was acknowledged when it was sent, and this many had been.
    covers: Option<u64>,
    pub(super) needs_lease: bool,
    /// The oldest configuration under which something was acknowledged that this flush is to make durable `[E7]`.
    pub(super) unflushed: Option<ConfigNo>,
}

impl Flushing {
    /// The lease was lost: it goes on under the next one.
    pub(super) fn without_lease(mut self) -> Self {
        self.forget_sent();
        self.needs_lease = true;
        self
    }
    /// It is sent again, to whoever is writable then.
    pub(super) fn forget_sent(&mut self) {
        self.done = Slots::NONE;
        self.sent = false;
    }
}

/// How far giving the lease back has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Releasing {
    No,
    Flushing,
    Settling,
}

impl Coordinator {
    /// Starts what waits, in order: nothing starts before something earlier that overlaps it.
    pub(super) fn start_waiting(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        if self.waiting.is_empty() {
            return;
        }
        let may_mutate = matches!(self.phase, Phase::Holding) && !self.release_wanted && !self.resettle;
        let mut busy: Vec<ByteRange> = self.busy().collect();
        let mutating = self.mutations.len();
        // Reads wait for what this mount has in flight [R3], not for repairs: those change no InSync brick.
        let mut changing: Vec<ByteRange> = self.mutations.values().map(|m| m.range).collect();
        let mut in_flight = mutating;
        let mut index = 0;
        while index < self.waiting.len() {
            let waiting = self.waiting[index];
            match waiting {
                Waiting::Mutation { op, mutation, since_ms } => {
                    let range = mutation.busy_range();
                    let taken = busy.iter().any(|b| b.overlaps(&range)) && !left_out(Rule::W3Busy);
                    let free = may_mutate && in_flight < MAX_IN_FLIGHT && !taken;
                    busy.push(range);
                    if free {
                        self.waiting.remove(index);
                        in_flight += 1;
                        changing.push(range);
                        self.start_mutation(op, mutation, range, since_ms, now_ms, effects);
                        continue;
                    }
                }
                Waiting::Read { op, range, .. } => {
                    if !changing.iter().any(|b| b.overlaps(&range.to_blocks())) || left_out(Rule::R3) {
                        self.waiting.remove(index);
                        self.start_read(op, Body::Read(range), now_ms, effects);
                        continue;
                    }
                }
                Waiting::Repair { x, region } => {
                    let range = super::repair::range_of(region);
                    let taken = busy.iter().any(|b| b.overlaps(&range)) && !left_out(Rule::S2Busy);
                    let free = matches!(self.phase, Phase::Holding) && !taken;
                    busy.push(range);
                    if free {
                        self.waiting.remove(index);
                        self.start_pull(x, region, now_ms, effects);
                        continue;
                    }
                }
            }
            index += 1;
        }
    }

    fn start_mutation(
        &mut self,
        op: OpId,
        mutation: Mutation,
        range: ByteRange,
        since_ms: u64,
        now_ms: u64,
        effects: &mut Vec<Effect>,
    ) {
        let seq = self.take_seq();
        self.dirty = true;
        self.started += 1;
        self.mutations.insert(
            seq,
            InFlight {
                op,
                mutation,
                range,
                since_ms,
                acknowledged: Slots::NONE,
                failed: Slots::NONE,
                errno: 0,
                failed_ms: 0,
                answered: false,
            },
        );
        for slot in self.configuration.writable().iter() {
            self.send(slot, Job::Mutation(seq), Body::Mutate(op, mutation), seq, now_ms, effects);
        }
    }

    pub(super) fn mutation_acknowledged(&mut self, seq: Seq, slot: Slot, now_ms: u64, effects: &mut Vec<Effect>) {
        let writable = self.configuration.writable();
        let Some(m) = self.mutations.get_mut(&seq) else { return };
        m.acknowledged.insert(slot);
        // [W3] Every InSync and every Syncing brick has applied it, and they are at least two.
        let waited_for = if left_out(Rule::W3Syncing) { self.configuration.in_sync() } else { writable };
        let all = m.acknowledged.covers(waited_for) || left_out(Rule::W3OneAnswer);
        if all && (writable.count() >= 2 || left_out(Rule::W3Two)) {
            let (op, answered) = (m.op, m.answered);
            self.mutations.remove(&seq);
            if !answered {
                self.unflushed.get_or_insert(self.configuration.n);
                effects.push(Effect::Complete(op, Completion::Done));
            }
            effects.push(Effect::Discard(op));
        } else {
            self.suspect_those_that_failed(seq, now_ms, effects);
        }
    }

    pub(super) fn mutation_failed(&mut self, seq: Seq, slot: Slot, errno: i32, now_ms: u64, effects: &mut Vec<Effect>) {
        let writable = self.configuration.writable();
        let Some(m) = self.mutations.get_mut(&seq) else { return };
        m.failed.insert(slot);
        m.failed_ms = now_ms;
        m.errno = errno;
        let (failed, op) = (m.failed, m.op);
        if failed.covers(writable) {
            // All bricks agree that it cannot be done (no space, say). What it left on each is settled before anything
            // else starts; until then its seq is not stable.
            if !m.answered {
                m.answered = true;
                effects.push(Effect::Complete(op, Completion::Failed(errno)));
            }
            self.resettle = true;
        } else {
            self.suspect_those_that_failed(seq, now_ms, effects);
        }
    }

    /// [W4] When all have answered, and some have it and some cannot: those that cannot are put out.
    fn suspect_those_that_failed(&mut self, seq: Seq, now_ms: u64, effects: &mut Vec<Effect>) {
        let writable = self.configuration.writable();
        let Some(m) = self.mutations.get(&seq) else { return };
        let (acknowledged, failed) = (m.acknowledged, m.failed);
        if !acknowledged.is_empty() && acknowledged.or(failed).covers(writable) {
            for slot in failed.iter() {
                self.suspect(slot, now_ms, effects);
            }
        }
    }

    /// A brick that failed a mutation which others have applied cannot always be put out [E2], and the leader may not have
    /// heard of it: until the configuration changes it is reported and asked again, for what it lacked may be there by then.
    pub(super) fn retry_failed(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let writable = self.configuration.writable();
        let mut due = Vec::new();
        for (seq, m) in &mut self.mutations {
            let mixed =
                !m.failed.is_empty() && !m.acknowledged.is_empty() && m.acknowledged.or(m.failed).covers(writable);
            if mixed && m.failed_ms + RETRY_FAILED_MS <= now_ms {
                due.push((*seq, m.op, m.mutation, m.failed.and(writable)));
                m.failed = Slots::NONE;
            }
        }
        for (seq, op, mutation, failed) in due {
            for slot in failed.iter() {
                self.suspect(slot, now_ms, effects);
                self.send(slot, Job::Mutation(seq), Body::Mutate(op, mutation), seq, now_ms, effects);
            }
        }
    }

    /// [W8] A flush covers what was acknowledged before it began.
    pub(super) fn start_flush(&mut self, op: Option<OpId>, now_ms: u64, effects: &mut Vec<Effect>) {
        if !self.dirty && self.mutations.is_empty() && self.orphans.is_empty() {
            if let Some(op) = op {
                effects.push(Effect::Complete(op, Completion::Done));
                effects.push(Effect::Discard(op));
            }
            return;
        }
        let number = self.next_request;
        self.next_request += 1;
        let holding = matches!(self.phase, Phase::Holding);
        self.flushes.push(Flushing {
            number,
            op,
            since_ms: now_ms,
            done: Slots::NONE,
            sent: false,
            covers: None,
            needs_lease: !holding,
            unflushed: None,
        });
        if holding {
            self.send_flushes(now_ms, effects);
        }
    }

    pub(super) fn send_flushes(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let covers = (self.mutations.is_empty() && self.orphans.is_empty()).then_some(self.started);
        let mut numbers = Vec::new();
        for flush in self.flushes.iter_mut().filter(|f| !f.sent) {
            flush.sent = true;
            flush.needs_lease = false;
            flush.covers = covers;
            flush.unflushed = super::oldest(flush.unflushed, self.unflushed.take());
            numbers.push(flush.number);
        }
        let left = if left_out(Rule::W8Syncing) { self.configuration.syncing() } else { Slots::NONE };
        for number in numbers {
            for slot in self.configuration.writable().minus(left).iter() {
                self.send(slot, Job::Flush(number), Body::Flush, Seq(0), now_ms, effects);
            }
        }
    }

    pub(super) fn flushed(&mut self, number: u64, slot: Slot, effects: &mut Vec<Effect>) {
        let writable = self.configuration.writable();
        let Some(at) = self.flushes.iter().position(|f| f.number == number) else { return };
        self.flushes[at].done.insert(slot);
        let left = if left_out(Rule::W8Syncing) { self.configuration.syncing() } else { Slots::NONE };
        if !self.flushes[at].done.covers(writable.minus(left)) && !left_out(Rule::W8OneAnswer) {
            return;
        }
        // [E7] What an earlier one, still under way, was to make durable is durable now too.
        for earlier in self.flushes[..at].iter_mut().filter(|f| f.sent) {
            earlier.unflushed = None;
        }
        let flush = self.flushes.remove(at);
        if flush.covers == Some(self.started) {
            self.dirty = false;
        }
        if let Some(op) = flush.op {
            effects.push(Effect::Complete(op, Completion::Done));
            effects.push(Effect::Discard(op));
        }
    }

    /// [W4] Under a new configuration everything that is not acknowledged is sent again, to the bricks that remain; those
    /// that applied it already only do their bookkeeping.
    pub(super) fn resend_all(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        if left_out(Rule::W4Again) {
            let acknowledged: Vec<_> = self.mutations.iter().map(|(seq, m)| (*seq, m.acknowledged)).collect();
            for (seq, slot) in acknowledged.iter().filter_map(|(seq, a)| Some((*seq, a.iter().next()?))) {
                self.mutation_acknowledged(seq, slot, now_ms, effects);
            }
        }
        let again: Vec<(Seq, OpId, Mutation)> = self
            .mutations
            .iter_mut()
            .filter(|_| !left_out(Rule::W4Again))
            .map(|(seq, m)| {
                m.acknowledged = Slots::NONE;
                m.failed = Slots::NONE;
                (*seq, m.op, m.mutation)
            })
            .collect();
        for (seq, op, mutation) in again {
            for slot in self.configuration.writable().iter() {
                self.send(slot, Job::Mutation(seq), Body::Mutate(op, mutation), seq, now_ms, effects);
            }
        }
        for flush in &mut self.flushes {
            flush.forget_sent();
        }
        self.send_flushes(now_ms, effects);
        // Whatever was failed by all is tried again by the above, so its outcome is open again.
        self.resettle = false;
        if self.releasing == Releasing::Settling {
            self.releasing = Releasing::No;
        }
    }

    /// [W1] When the lease is wanted back: nothing new starts, what is in flight finishes, what was written is flushed and
    /// settled, then it is released.
    pub(super) fn advance_release(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        if self.release_wanted && left_out(Rule::W1Unsettled) && matches!(self.phase, Phase::Fencing { .. }) {
            return self.release(effects);
        }
        if !self.release_wanted || !matches!(self.phase, Phase::Holding) {
            return;
        }
        let repairing = self.repairs.iter().flatten().any(super::repair::Repair::is_pulling);
        let mutating = !self.mutations.is_empty() && !left_out(Rule::W1InFlight);
        if mutating || repairing || self.flushes.iter().any(|f| f.op.is_some()) {
            return;
        }
        match self.releasing {
            Releasing::No if self.dirty => {
                self.releasing = Releasing::Flushing;
                self.start_flush(None, now_ms, effects);
            }
            Releasing::Flushing if !self.flushes.is_empty() => {}
            Releasing::No | Releasing::Flushing => {
                self.releasing = Releasing::Settling;
                if self.stable() > self.told_stable {
                    self.tell_stable(now_ms, effects);
                } else {
                    self.release(effects);
                }
            }
            Releasing::Settling => {
                if !self.outstanding.values().any(|o| matches!(o.job, Job::Settle(_))) {
                    self.release(effects);
                }
            }
        }
    }

    fn release(&mut self, effects: &mut Vec<Effect>) {
        self.releasing = Releasing::No;
        self.release_wanted = false;
        self.repairs = [None, None, None];
        self.waiting.retain(|w| !matches!(w, Waiting::Repair { .. }));
        self.outstanding.retain(|_, o| matches!(o.job, Job::Read(_)));
        self.phase = Phase::Idle;
        effects.push(Effect::ReleaseLease { epoch: self.epoch, finished: true });
        // The janitor does not take back what a client asked for; a client that still has something to write asks anew.
        self.wanted = false;
        let wants = self.waiting.iter().any(|w| matches!(w, Waiting::Mutation { .. }));
        if wants {
            self.phase = Phase::Acquiring;
            effects.push(Effect::AcquireLease);
        }
    }

    /// After `[W2]` was gone through once more because of them: mutations that failed everywhere are settled now.
    pub(super) fn drop_failed(&mut self, effects: &mut Vec<Effect>) {
        self.resettle = false;
        for (_, m) in std::mem::take(&mut self.mutations) {
            debug_assert!(m.answered, "only failed mutations are left when [W2] is gone through again");
            effects.push(Effect::Discard(m.op));
        }
    }

    /// Every mutation in flight has failed on all writable bricks, and that has to be settled.
    pub(super) fn only_failed_left(&self) -> bool {
        self.resettle
            && self.mutations.values().all(|m| m.failed.covers(self.configuration.writable()))
            && self.repairs.iter().flatten().all(|r| !r.is_pulling())
    }
}
