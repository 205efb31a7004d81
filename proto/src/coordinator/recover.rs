//! Fences, and settling what an earlier holder left in doubt `[W2]`. Roll forward, never back: someone may have read it.

use super::requests::{AUDIT_MS, Job};
use super::{Body, Coordinator, Effect, Phase};
use crate::config::{Configuration, Slot, Slots};
use crate::left_out::{Rule, left_out};
use crate::replica::Doubt;
use crate::types::{BLOCK_BYTES, ByteRange, Epoch, MAX_IO_BYTES, Seq};

/// Ranges that are recovered at the same time.
const PARALLEL: usize = 8;

/// What does not verify at its source is tried again in so many parts, and so on down to single blocks.
const PARTS: u64 = 16;

/// What is to be copied from where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Item {
    range: ByteRange,
    /// It is the size that is copied.
    size: bool,
    source: Slot,
    /// The numbers that it stays in doubt under.
    from: (Epoch, Seq),
}

#[derive(Clone, Debug)]
pub(super) struct Recovery {
    items: Vec<Item>,
    next: usize,
    /// Of each item that has been started: bricks that have not answered.
    left: Vec<Slots>,
    /// A source turned out to be corrupt `[R5]`: when all that was sent is answered, it begins again without that source.
    spoiled: bool,
}

impl Coordinator {
    pub(super) fn begin_fence(&mut self, recover: bool, now_ms: u64, effects: &mut Vec<Effect>) {
        self.phase =
            Phase::Fencing { recover, fenced: Slots::NONE, lists: [Vec::new(), Vec::new(), Vec::new()], sizes: [0; 3] };
        for slot in self.configuration.writable().iter() {
            self.send(slot, Job::Fence, Body::Fence, Seq(0), now_ms, effects);
        }
    }

    /// What is wrong: goes on with what was gathered before `n` changed.
    pub(super) fn carry_on(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let mut unasked = Slots::NONE;
        match &mut self.phase {
            Phase::Fencing { fenced, .. } => unasked = self.configuration.writable().minus(*fenced),
            Phase::Recovering(recovery) => {
                recovery.next = recovery.left.iter().take_while(|left| left.is_empty()).count();
                recovery.left.truncate(recovery.next);
            }
            _ => {}
        }
        for slot in unasked.iter() {
            self.send(slot, Job::Fence, Body::Fence, Seq(0), now_ms, effects);
        }
    }

    pub(super) fn fenced(&mut self, slot: Slot, in_doubt: Vec<Doubt>, size: u64) {
        if let Phase::Fencing { fenced, lists, sizes, .. } = &mut self.phase {
            fenced.insert(slot);
            lists[slot.index()] = in_doubt;
            sizes[slot.index()] = size;
        }
    }

    pub(super) fn recovered(&mut self, item: usize, slot: Slot) {
        if let Phase::Recovering(recovery) = &mut self.phase
            && let Some(left) = recovery.left.get_mut(item)
        {
            left.remove(slot);
        }
    }

    /// [R5] What was to be copied does not verify at its source. What is corrupt on every `InSync` brick has no content any more
    /// that could be copied; everything else begins again, in parts, down to single blocks with another source.
    pub(super) fn recovery_spoiled(&mut self, item: usize, slot: Slot) {
        let Phase::Recovering(recovery) = &mut self.phase else { return };
        let (Some(left), Some(item)) = (recovery.left.get_mut(item), recovery.items.get(item)) else { return };
        left.remove(slot);
        let unsound = (item.source, item.range);
        if !self.unsound.contains(&unsound) {
            self.unsound.push(unsound);
            recovery.spoiled = true;
        }
    }

    pub(super) fn advance_recovery(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Holding) && self.only_failed_left() {
            self.repairs = [None, None, None];
            self.waiting.retain(|w| !matches!(w, super::Waiting::Repair { .. }));
            self.outstanding.retain(|_, o| matches!(o.job, Job::Read(_)));
            for flush in &mut self.flushes {
                flush.forget_sent();
            }
            self.begin_fence(true, now_ms, effects);
        }
        if let Phase::Fencing { recover, fenced, lists, sizes } = &self.phase {
            // [W2] Every InSync and Syncing brick has answered.
            if !fenced.covers(self.configuration.writable()) && !left_out(Rule::W2Fence) {
                return;
            }
            let recover = *recover && !left_out(Rule::W2Recover);
            // What another session left is nobody else's to flush.
            self.dirty |= recover;
            let items = if recover { items(&self.configuration, lists, sizes, &self.unsound) } else { Vec::new() };
            self.phase = Phase::Recovering(Recovery { items, next: 0, left: Vec::new(), spoiled: false });
        }
        loop {
            let Phase::Recovering(recovery) = &mut self.phase else { return };
            let active = recovery.left.iter().filter(|left| !left.is_empty()).count();
            if recovery.spoiled {
                // Nothing of the first attempt may still be under way when the next one begins.
                if active == 0 {
                    self.begin_fence(true, now_ms, effects);
                }
                return;
            }
            // The size comes first and alone: ranges are copied into files of equal size.
            let barrier = recovery.next > 0 && recovery.items[recovery.next - 1].size && active > 0;
            if active >= PARALLEL || barrier {
                return;
            }
            let Some(item) = recovery.items.get(recovery.next).copied() else {
                if active == 0 {
                    self.phase = Phase::Holding;
                    self.unsound.clear();
                    self.audit_ms = now_ms + AUDIT_MS;
                    if self.wanted {
                        self.doubted = self.configuration.in_sync();
                    }
                    self.drop_failed(effects);
                    self.send_flushes(now_ms, effects);
                }
                return;
            };
            let index = recovery.next;
            recovery.next += 1;
            let left = if left_out(Rule::W2Targets) { self.configuration.syncing() } else { Slots::NONE };
            let writable = self.configuration.writable().minus(left);
            recovery.left.push(writable);
            for slot in writable.iter() {
                let (body, seq) = if slot == item.source {
                    (Body::Note { range: item.range, sized: item.size }, Seq(0))
                } else {
                    let seq = self.take_seq();
                    let doubt = Some(item.from);
                    (Body::Pull { range: item.range, size: item.size, from: item.source, doubt }, seq)
                };
                self.send(slot, Job::Recovery(index), body, seq, now_ms, effects);
            }
        }
    }
}

/// What [W2] copies: for each range in any list the content of the `InSync` brick that applied the highest `(e, seq)` there, or
/// of any `InSync` brick if only `Syncing` ones list it. The size is treated alike, as one more range. A source that is corrupt
/// there gives way to another `InSync` brick, if there is a sound one `[R5]`.
fn items(
    configuration: &Configuration,
    lists: &[Vec<Doubt>; 3],
    sizes: &[u64; 3],
    unsound: &[(Slot, ByteRange)],
) -> Vec<Item> {
    let in_sync = configuration.in_sync();
    if in_sync.is_empty() {
        return Vec::new();
    }
    // The InSync bricks that may be the source of a range; the size is an empty one. More than a block is tried in parts before
    // another source is taken for it.
    let sound = |range: ByteRange| -> Slots {
        let is_unsound = |s: &Slot| unsound.iter().any(|(u, at)| u == s && at.len() <= BLOCK_BYTES && *at == range);
        let sound: Slots = in_sync.iter().filter(|s| !is_unsound(s)).collect();
        if sound.is_empty() { in_sync } else { sound }
    };
    let end = configuration.writable().iter().map(|s| sizes[s.index()]).max().unwrap_or(0);
    let asked = if left_out(Rule::W2SyncingLists) { in_sync } else { configuration.writable() };
    let listed: Vec<(Slot, Doubt)> =
        asked.iter().flat_map(|slot| lists[slot.index()].iter().map(move |d| (slot, *d))).collect();
    // The highest numbers among those that `wanted` picks, and who takes part as source.
    let choose = |from: Slots, wanted: &dyn Fn(&Doubt) -> bool| -> Option<(Slot, (Epoch, Seq))> {
        let any = from.iter().next()?;
        let highest = |of: &dyn Fn(Slot) -> bool| {
            let all = listed.iter().filter(|(s, d)| of(*s) && wanted(d)).map(|(s, d)| ((d.epoch, d.seq), *s));
            if left_out(Rule::W2Highest) {
                return all.min_by_key(|(key, s)| (*key, s.0));
            }
            all.max_by_key(|(key, s)| (*key, core::cmp::Reverse(s.0)))
        };
        match highest(&|s| from.has(s)) {
            Some((key, slot)) => Some((slot, key)),
            None => highest(&|_| true).map(|(key, _)| (any, key)),
        }
    };
    let mut items = Vec::new();
    if let Some((source, from)) = choose(sound(ByteRange::default()), &|d| d.sized) {
        let (source, from) = longest(&listed, sizes, sound(ByteRange::default()), (source, from));
        items.push(Item { range: ByteRange::default(), size: true, source, from });
    }
    let mut cuts: Vec<u64> = Vec::new();
    for (_, doubt) in &listed {
        let range = doubt.range.to_blocks();
        cuts.push(range.start.min(end));
        cuts.push(range.end.min(ByteRange::at(0, end).to_blocks().end));
    }
    let last = ByteRange::at(0, end).to_blocks().end;
    for (_, range) in unsound {
        let step = (range.len() / PARTS).next_multiple_of(BLOCK_BYTES).max(BLOCK_BYTES);
        cuts.extend((range.start..range.end).step_by(step as usize).chain([range.end]).map(|at| at.min(last)));
    }
    cuts.sort_unstable();
    cuts.dedup();
    for pair in cuts.windows(2) {
        let piece = ByteRange { start: pair[0], end: pair[1] };
        let Some((source, from)) = choose(sound(piece), &|d| d.range.to_blocks().overlaps(&piece)) else { continue };
        let mut start = piece.start;
        while start < piece.end {
            // Pieces end at multiples of what one pull carries.
            let stop = ((start / MAX_IO_BYTES + 1) * MAX_IO_BYTES).min(piece.end);
            items.push(Item { range: ByteRange { start, end: stop }, size: false, source, from });
            start = stop;
        }
    }
    items
}

/// Where the size comes from: `highest` names the brick that changed it under the highest numbers. Writes that were in flight
/// together may each have made the file longer, on one brick this one and on another that one: then the longest stays, or what
/// was written past the other's end would be cut off. A truncate is never in flight with anything else.
fn longest(
    listed: &[(Slot, Doubt)],
    sizes: &[u64; 3],
    sound: Slots,
    highest: (Slot, (Epoch, Seq)),
) -> (Slot, (Epoch, Seq)) {
    let made_longer = |(slot, key): (Slot, (Epoch, Seq))| {
        let bytes = |(s, d): &&(Slot, Doubt)| *s == slot && (d.epoch, d.seq) == key && !d.range.is_empty();
        let mut written = listed.iter().filter(bytes).peekable();
        written.peek().is_some() && written.all(|(_, d)| d.range.end <= sizes[slot.index()])
    };
    if !made_longer(highest) {
        return highest;
    }
    let sized = listed.iter().filter(|(s, d)| d.sized && sound.has(*s)).map(|(s, d)| (*s, (d.epoch, d.seq)));
    let longer = sized.filter(|(s, key)| sizes[s.index()] > sizes[highest.0.index()] && made_longer((*s, *key)));
    longer.max_by_key(|(s, key)| (sizes[s.index()], *key, core::cmp::Reverse(s.0))).unwrap_or(highest)
}
