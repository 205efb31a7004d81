//! Reads and questions, from whichever `InSync` brick answers `[R3]`, `[R4]`. What does not verify is told to the brick it came
//! from `[R5]`.

use super::requests::Job;
use super::{Answer, Body, Completion, Coordinator, Effect, OpId};
use crate::config::{Slot, Slots};
use crate::interval::IntervalSet;
use crate::left_out::{Rule, left_out};
use crate::types::{BLOCK_BYTES, ByteRange, REPLICAS, Seq};

/// How long a read that no brick could answer waits before it goes round again `[E3]`.
const AROUND_AGAIN_MS: u64 = 50;

/// A read under way.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    body: Body,
    pub(super) since_ms: u64,
    /// Bricks that were asked in this round.
    tried: Slots,
    /// Requests that are out.
    asked: u32,
    asked_ms: u64,
    /// When to go round again, if no brick is left.
    again_ms: Option<u64>,
    /// Of each brick that was asked in this round: blocks that did not verify `[R5]`.
    corrupt: [IntervalSet; REPLICAS],
}

impl Reading {
    /// Some block of it is corrupt on each of these bricks.
    fn is_lost(&self, bricks: Slots) -> bool {
        let mut of = bricks.iter().map(|s| &self.corrupt[s.index()]);
        let Some(first) = of.next() else { return false };
        let others: Vec<&IntervalSet> = of.collect();
        first.iter().flatten().any(|block| others.iter().all(|o| o.contains(block)))
    }
}

impl Coordinator {
    pub(super) fn start_read(&mut self, op: OpId, body: Body, now_ms: u64, effects: &mut Vec<Effect>) {
        debug_assert!(
            !matches!(body, Body::Read(r) if self.mutations.values().any(|m| m.range.overlaps(&r.to_blocks()))),
            "R3: a read goes past a mutation in flight that it overlaps"
        );
        let reading = Reading {
            body,
            since_ms: now_ms,
            tried: Slots::NONE,
            asked: 0,
            asked_ms: now_ms,
            again_ms: None,
            corrupt: Default::default(),
        };
        self.reads.insert(op, reading);
        self.ask_next(op, now_ms, effects);
    }

    /// Asks the next brick; prefers one that there is a connection to, and the same one for the same file, so that what it
    /// has cached serves again.
    fn ask_next(&mut self, op: OpId, now_ms: u64, effects: &mut Vec<Effect>) {
        let Some(reading) = self.reads.get_mut(&op) else { return };
        if left_out(Rule::R4) && !reading.tried.is_empty() {
            return;
        }
        let left = self.configuration.in_sync().minus(reading.tried).and(self.links);
        let first = (self.ino.0 % 3) as u8;
        let next = (0..3).map(|i| Slot((first + i) % 3)).find(|slot| left.has(*slot));
        match next {
            Some(slot) => {
                reading.tried.insert(slot);
                reading.asked += 1;
                reading.asked_ms = now_ms;
                reading.again_ms = None;
                let body = reading.body;
                self.send(slot, Job::Read(op), body, Seq(0), now_ms, effects);
            }
            // A brick that is being repaired may come to have it; a configuration that has none of those will not.
            None if reading.asked == 0
                && self.configuration.syncing().is_empty()
                && reading.is_lost(self.configuration.in_sync()) =>
            {
                self.reads.remove(&op);
                effects.push(Effect::Complete(op, Completion::Corrupt));
                effects.push(Effect::Discard(op));
            }
            None if reading.asked == 0 => {
                reading.corrupt = Default::default();
                reading.tried = Slots::NONE;
                reading.again_ms = Some(now_ms + AROUND_AGAIN_MS);
            }
            None => {}
        }
    }

    pub(super) fn read_answered(
        &mut self,
        op: OpId,
        slot: Slot,
        answer: Answer,
        now_ms: u64,
        effects: &mut Vec<Effect>,
    ) {
        let Some(reading) = self.reads.get_mut(&op) else { return };
        reading.asked = reading.asked.saturating_sub(1);
        let completion = match answer {
            Answer::Bytes => Completion::Bytes,
            Answer::Stat(stat) => Completion::Stat(stat),
            Answer::Seek(at) => Completion::Seek(at),
            Answer::Failed { brick, .. } => {
                if brick {
                    self.suspect(slot, now_ms, effects);
                }
                self.ask_next(op, now_ms, effects);
                return;
            }
            Answer::Corrupt(blocks) => {
                self.report(slot, &blocks, now_ms, effects);
                if let Some(reading) = self.reads.get_mut(&op) {
                    reading.corrupt[slot.index()] = blocks;
                }
                self.ask_next(op, now_ms, effects);
                return;
            }
            _ => {
                self.ask_next(op, now_ms, effects);
                return;
            }
        };
        self.reads.remove(&op);
        self.outstanding.retain(|_, o| o.job != Job::Read(op));
        effects.push(Effect::Complete(op, completion));
        effects.push(Effect::Discard(op));
    }

    /// [R5] Tells the brick whose blocks did not verify. It looks for itself and remembers, whoever repairs it then.
    fn report(&mut self, slot: Slot, blocks: &IntervalSet, now_ms: u64, effects: &mut Vec<Effect>) {
        let (Some(first), Some(last)) = (blocks.iter().next(), blocks.iter().last()) else { return };
        let range = ByteRange { start: first.start * BLOCK_BYTES, end: last.end * BLOCK_BYTES };
        let body = Body::Report { range };
        if !self.outstanding.values().any(|o| o.slot == slot && o.body == body) {
            self.send(slot, Job::Report, body, Seq(0), now_ms, effects);
        }
    }

    /// [R4] A slow read goes to a further brick as well; one that nobody could answer goes round again.
    pub(super) fn hedge_reads(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let due: Vec<OpId> = self
            .reads
            .iter()
            .filter(|(_, r)| match r.again_ms {
                Some(at) => at <= now_ms,
                None => r.asked_ms + self.timeouts.hedge_ms <= now_ms,
            })
            .map(|(op, _)| *op)
            .collect();
        for op in due {
            self.ask_next(op, now_ms, effects);
        }
    }

    /// The configuration changed: reads that were sent to bricks that serve none any more go elsewhere.
    pub(super) fn reassign_reads(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let in_sync = self.configuration.in_sync();
        let lost: Vec<(super::RequestId, OpId)> = self
            .outstanding
            .iter()
            .filter_map(|(id, o)| match o.job {
                Job::Read(op) if !in_sync.has(o.slot) => Some((*id, op)),
                _ => None,
            })
            .collect();
        for reading in self.reads.values_mut() {
            reading.tried = reading.tried.and(in_sync);
        }
        for (id, op) in lost {
            self.outstanding.remove(&id);
            if let Some(reading) = self.reads.get_mut(&op) {
                reading.asked = reading.asked.saturating_sub(1);
            }
            self.ask_next(op, now_ms, effects);
        }
    }
}
