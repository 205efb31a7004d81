//! What is outstanding at bricks: sending, answers, broken links, time `[W4]`, `[E3]`, `[R4]`.

use super::{Answer, Body, Completion, Coordinator, Effect, OpId, Phase, Request, RequestId, Waiting};
use crate::config::Slot;
use crate::left_out::{Rule, left_out};
use crate::types::Seq;

/// How long a request that a brick was not ready for waits before it is sent again.
const RETRY_MS: u64 = 50;
/// How long until the same brick is reported again, and the log is asked again.
const REPORT_AGAIN_MS: u64 = 300;
/// How long there may be no connection to a brick before that is reported: one that is just being made, or made anew for
/// another session, is no failure. A brick that died is put out no later by it, for its read lease lasts longer `[E1]`.
const LINK_GRACE_MS: u64 = 500;
/// How long after the last activity bricks are told the stable seq, so that they can forget what is in doubt `[W6]`.
const SETTLE_AFTER_MS: u64 = 500;

/// How often the holder asks the `InSync` bricks whether something on them has turned out to be corrupt `[R5]`: a scrub or
/// another mount may have found it.
pub(super) const AUDIT_MS: u64 = 10_000;

/// What a request is part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Job {
    Mutation(Seq),
    Flush(u64),
    Read(OpId),
    Fence,
    Recovery(usize),
    RepairList(Slot),
    Pull(Slot, u64),
    Clear(Slot, u64),
    Settle(Seq),
    Report,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Outstanding {
    pub(super) slot: Slot,
    pub(super) job: Job,
    pub(super) body: Body,
    pub(super) seq: Seq,
    pub(super) since_ms: u64,
    /// Set when the brick was not ready, or the link was down: when to send it again.
    pub(super) again_ms: Option<u64>,
}

impl Coordinator {
    pub(super) fn send(
        &mut self,
        slot: Slot,
        job: Job,
        body: Body,
        seq: Seq,
        now_ms: u64,
        effects: &mut Vec<Effect>,
    ) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let up = self.links.has(slot);
        self.outstanding.insert(id, Outstanding { slot, job, body, seq, since_ms: now_ms, again_ms: None });
        if up {
            effects.push(Effect::Send(self.request(id, slot, body, seq)));
        }
        id
    }

    fn request(&self, id: RequestId, slot: Slot, body: Body, seq: Seq) -> Request {
        let settled = matches!(self.phase, Phase::Holding);
        Request {
            id,
            slot,
            n: self.configuration.n,
            epoch: self.epoch,
            seq,
            stable: if settled { self.stable() } else { Seq(0) },
            settled,
            body,
        }
    }

    pub(super) fn suspect(&mut self, slot: Slot, now_ms: u64, effects: &mut Vec<Effect>) {
        let reported = &mut self.reported_ms[slot.index()];
        if reported.is_none_or(|at| at + REPORT_AGAIN_MS <= now_ms) {
            *reported = Some(now_ms);
            effects.push(Effect::Suspect(slot, self.configuration.n));
        }
    }

    fn refresh(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        if self.refresh_ms.is_none_or(|at| at + REPORT_AGAIN_MS <= now_ms) {
            self.refresh_ms = Some(now_ms);
            effects.push(Effect::Refresh);
        }
    }

    pub(super) fn answered(&mut self, id: RequestId, answer: Answer, now_ms: u64, effects: &mut Vec<Effect>) {
        let Some(outstanding) = self.outstanding.get_mut(&id) else { return };
        let Outstanding { slot, job, .. } = *outstanding;
        if let Job::Read(op) = job {
            self.outstanding.remove(&id);
            self.read_answered(op, slot, answer, now_ms, effects);
            return;
        }
        match answer {
            Answer::Behind => {
                outstanding.again_ms = Some(now_ms + RETRY_MS);
                return;
            }
            Answer::Stale { n, epoch } => {
                if epoch > self.epoch || (n == self.configuration.n && epoch == self.epoch) {
                    self.lease_lost(effects);
                } else {
                    // A newer configuration is on its way; it sends everything again.
                    outstanding.again_ms = Some(now_ms + RETRY_MS * 4);
                    self.refresh(now_ms, effects);
                }
                return;
            }
            Answer::Failed { brick: true, .. } => {
                outstanding.again_ms = Some(now_ms + RETRY_MS * 4);
                self.suspect(slot, now_ms, effects);
                return;
            }
            Answer::SourceFailed => {
                outstanding.again_ms = Some(now_ms + RETRY_MS * 4);
                if let Body::Pull { from, .. } = &mut outstanding.body {
                    let failed = *from;
                    if matches!(job, Job::Pull(x, _) if self.configuration.in_sync().has(x)) {
                        // [R5] Two bricks that are both in sync: no reason to put one of them out.
                        let others = self.configuration.in_sync().without(slot).without(failed);
                        *from = others.iter().next().unwrap_or(failed);
                    } else {
                        self.suspect(failed, now_ms, effects);
                    }
                }
                return;
            }
            _ => {}
        }
        let outstanding = *outstanding;
        self.outstanding.remove(&id);
        match (job, answer) {
            (Job::Mutation(seq), Answer::Failed { errno, .. }) => {
                self.mutation_failed(seq, slot, errno, now_ms, effects)
            }
            (Job::Mutation(seq), _) => self.mutation_acknowledged(seq, slot, now_ms, effects),
            (Job::Fence, Answer::Fenced { in_doubt, size }) => self.fenced(slot, in_doubt, size),
            (Job::Recovery(item), Answer::Done) => self.recovered(item, slot),
            (Job::Recovery(item), Answer::SourceCorrupt) => self.recovery_spoiled(item, slot),
            // [R5] It is known there now.
            (Job::Report, _) => self.doubted.insert(slot),
            (Job::RepairList(x), Answer::Regions(regions)) => self.repair_listed(x, slot, &regions),
            (Job::Pull(x, region), Answer::Done) => self.pulled(x, region, now_ms, effects),
            (Job::Clear(x, region), Answer::Done) => self.cleared(x, region, slot),
            (Job::Settle(seq), Answer::Done) => self.settled(seq),
            (Job::Flush(number), Answer::Done) => self.flushed(number, slot, effects),
            // Anything else is an error of the brick: it is reported, and asked again later.
            (_, _) => {
                self.outstanding.insert(id, Outstanding { again_ms: Some(now_ms + RETRY_MS * 4), ..outstanding });
                self.suspect(slot, now_ms, effects);
            }
        }
    }

    pub(super) fn link_down(&mut self, slot: Slot, now_ms: u64, effects: &mut Vec<Effect>) {
        self.links.remove(slot);
        self.unlinked_ms[slot.index()] = Some(now_ms);
        let mut reads = Vec::new();
        for (id, o) in &self.outstanding {
            if o.slot == slot
                && let Job::Read(op) = o.job
            {
                reads.push((*id, op));
            }
        }
        for (id, op) in reads {
            self.outstanding.remove(&id);
            self.read_answered(op, slot, Answer::Behind, now_ms, effects);
        }
    }

    pub(super) fn link_up(&mut self, slot: Slot, now_ms: u64, effects: &mut Vec<Effect>) {
        self.links.insert(slot);
        // [F3] Everything may be sent again.
        let ids: Vec<RequestId> = self.outstanding.iter().filter(|(_, o)| o.slot == slot).map(|(id, _)| *id).collect();
        for id in ids {
            self.resend(id, now_ms, effects);
        }
    }

    fn resend(&mut self, id: RequestId, now_ms: u64, effects: &mut Vec<Effect>) {
        let Some(o) = self.outstanding.get_mut(&id) else { return };
        o.again_ms = None;
        o.since_ms = o.since_ms.max(now_ms.saturating_sub(self.timeouts.io_timeout_ms));
        let (slot, body, seq) = (o.slot, o.body, o.seq);
        if self.links.has(slot) {
            effects.push(Effect::Send(self.request(id, slot, body, seq)));
        }
    }

    pub(super) fn tick(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let due: Vec<RequestId> = self
            .outstanding
            .iter()
            .filter(|(_, o)| o.again_ms.is_some_and(|at| at <= now_ms))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.resend(id, now_ms, effects);
        }
        for slot in Slot::ALL {
            let since = &mut self.unlinked_ms[slot.index()];
            *since = if self.links.has(slot) { None } else { since.or(Some(now_ms)) };
        }
        let mut late = crate::config::Slots::NONE;
        for o in self.outstanding.values() {
            let silent = o.since_ms + self.timeouts.io_timeout_ms <= now_ms;
            if silent && !matches!(o.job, Job::RepairList(_) | Job::Report) {
                late.insert(o.slot);
            }
            let unlinked = self.unlinked_ms[o.slot.index()].is_some_and(|at| at + LINK_GRACE_MS <= now_ms);
            // Nobody waits for what an InSync brick has to say of itself.
            let is_audit = matches!(o.job, Job::RepairList(x) if x == o.slot && self.configuration.in_sync().has(x));
            if unlinked && !is_audit && !matches!(o.job, Job::Read(_) | Job::Report) {
                late.insert(o.slot);
            }
        }
        for slot in late.iter() {
            self.suspect(slot, now_ms, effects);
        }
        if matches!(self.phase, Phase::Holding) && self.audit_ms <= now_ms {
            self.audit_ms = now_ms + AUDIT_MS;
            self.doubted = self.configuration.in_sync();
        }
        self.retry_failed(now_ms, effects);
        self.hedge_reads(now_ms, effects);
        let impatient = left_out(Rule::E3).then_some(self.timeouts.io_timeout_ms);
        if let Some(limit) = self.timeouts.no_quorum_ms.or(impatient) {
            self.give_up(limit, now_ms, effects);
        }
        if matches!(self.phase, Phase::Holding)
            && self.stable() > self.told_stable
            && self.last_activity_ms + SETTLE_AFTER_MS <= now_ms
            && !self.outstanding.values().any(|o| matches!(o.job, Job::Settle(_)))
        {
            self.tell_stable(now_ms, effects);
        }
    }

    pub(super) fn tell_stable(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let stable = self.stable();
        for slot in self.configuration.writable().iter() {
            self.send(slot, Job::Settle(stable), Body::Settle, Seq(0), now_ms, effects);
        }
    }

    fn settled(&mut self, seq: Seq) {
        if !self.outstanding.values().any(|o| o.job == Job::Settle(seq)) {
            self.told_stable = self.told_stable.max(seq);
        }
    }

    /// [E3] The administrator chose errors over waiting.
    fn give_up(&mut self, limit_ms: u64, now_ms: u64, effects: &mut Vec<Effect>) {
        let late = |since_ms: u64| since_ms + limit_ms <= now_ms;
        let mut gone: Vec<OpId> = Vec::new();
        self.waiting.retain(|w| match w {
            Waiting::Mutation { op, since_ms, .. } | Waiting::Read { op, since_ms, .. } if late(*since_ms) => {
                gone.push(*op);
                false
            }
            _ => true,
        });
        let reads: Vec<OpId> = self.reads.iter().filter(|(_, r)| late(r.since_ms)).map(|(op, _)| *op).collect();
        for op in reads {
            self.reads.remove(&op);
            self.outstanding.retain(|_, o| o.job != Job::Read(op));
            gone.push(op);
        }
        for op in gone {
            effects.push(Effect::Complete(op, Completion::NoQuorum));
            effects.push(Effect::Discard(op));
        }
        for m in self.mutations.values_mut() {
            if !m.answered && late(m.since_ms) {
                // It stays in flight: it may yet be applied everywhere.
                m.answered = true;
                effects.push(Effect::Complete(m.op, Completion::NoQuorum));
            }
        }
        for f in &mut self.flushes {
            if late(f.since_ms)
                && let Some(op) = f.op.take()
            {
                effects.push(Effect::Complete(op, Completion::NoQuorum));
                effects.push(Effect::Discard(op));
            }
        }
    }
}
