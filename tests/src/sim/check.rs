//! What must be true after each step: I1, I2, I3, I7, I8, and what a cold start may lose.

use mortar_proto::BrickState;
use mortar_proto::config::{Configuration, Slot};
use mortar_proto::metadata::Command;
use mortar_proto::metadata::state::{REMEMBERED_OUTCOMES, REMEMBERED_SESSIONS};
use mortar_proto::types::{ByteRange, EXTENT_BYTES, Ino, REGION_BYTES};

use super::disk::{BLOCKS, Content};
use super::quorum::lease_of;
use super::world::{Wire, World, slot};

impl World {
    pub(super) fn check_step(&mut self) {
        if self.failure.is_some() {
            return;
        }
        let configuration = self.configuration();
        for s in 0..3 {
            let brick = &self.bricks[s];
            let member = configuration.members[s];
            let in_sync = member.state == BrickState::InSync && member.incarnation == brick.incarnation;
            let serves = brick.replica.as_ref().is_some_and(|r| r.may_read(self.brick_now(s)));
            if member.state != BrickState::InSync && !serves {
                continue;
            }
            for ino in &self.files {
                let content = brick.disk.content(*ino);
                let needs = self.history.needs(*ino);
                let checked = self.history.check_all(*ino, &content, &needs);
                // Sizes are dearer to check, so now and then is enough.
                let checked = if self.now.is_multiple_of(16) {
                    checked.and_then(|()| self.history.check_size(*ino, content.size, &self.history.size_need(*ino)))
                } else {
                    checked
                };
                if (serves || in_sync && brick.is_up())
                    && let Err(why) = checked
                {
                    let rule = if serves { "I2: it serves reads" } else { "I1" };
                    self.fail(|| format!("b{s}, {:?} under n={}: {rule}: {why}", member.state, configuration.n));
                    return;
                }
                // A disk that is gone is what I7 is about: another one has it.
                // And one that the administrator has just made the source flushes before it serves.
                let is_ready = self.administrator.made_source.is_none_or(|(source, _)| source != s);
                if member.state == BrickState::InSync && !brick.has_no_disk() && member.brick == brick.id && is_ready {
                    let needs = self.history.flushed_needs(*ino);
                    for (b, need) in needs.iter().enumerate() {
                        if let Err(why) = self.history.check_durable(*ino, b, brick.disk.durable(*ino, b), *need) {
                            self.fail(|| format!("I7: b{s} has not made durable what was flushed: {why}"));
                            return;
                        }
                    }
                }
            }
        }
    }

    pub(super) fn configuration_committed(
        &mut self,
        old: &Configuration,
        new: &Configuration,
        command: &Command,
        cold: Option<Slot>,
    ) {
        self.count("configuration");
        let is_live = |source: &usize| new.members[*source].incarnation == self.bricks[*source].incarnation;
        let source = cold.map(Slot::index).filter(is_live);
        let was_torn = source.is_some_and(|source| self.settle_doubts(source, true));
        self.administered(command, old, new);
        if new.in_sync().is_empty() {
            self.fail(|| format!("I8: no brick is InSync under {new:?}"));
        }
        self.put_out_or_back(old, new, cold);
        for s in old.in_sync().iter().filter(|s| new.state(*s) != BrickState::InSync) {
            let brick = &self.bricks[s.index()];
            let (is_meant, now) = (brick.id == old.members[s.index()].brick, self.brick_now(s.index()));
            if is_meant && brick.replica.as_ref().is_some_and(|r| r.may_read(now)) {
                self.fail(|| format!("E1: b{} is not InSync any more and may still serve reads", s.0));
            }
        }
        for s in Slot::ALL {
            let (was, is) = (old.members[s.index()], new.members[s.index()]);
            if is.state != BrickState::InSync || is.incarnation != was.incarnation {
                self.history.forget_seen(s, None);
            }
        }
        for s in Slot::ALL {
            if old.state(s) == BrickState::Syncing && new.state(s) == BrickState::InSync {
                self.count("promoted");
                if self.rng.chance(200) {
                    self.tempt(None, &[0, 1, 2]);
                }
            }
        }
        if let Some(source) = cold {
            self.count("cold start");
            if self.rng.chance(200) {
                self.tempt(None, &[0, 1, 2]);
            }
            let i = source.index();
            let fresh = |s: &Slot| new.members[s.index()].incarnation != old.members[s.index()].incarnation;
            let registered = old.in_sync().iter().filter(fresh).count();
            let is_ordered = matches!(command, Command::AcceptLoss { .. });
            if registered < 2 && old.in_sync().count() >= 2 && !is_ordered {
                self.fail(|| format!("E6: b{i} becomes the source without waiting for another that was InSync"));
            }
            let kept = |s: &Slot| new.members[s.index()].boot == old.members[s.index()].boot;
            if !kept(&source) {
                let better = old
                    .in_sync()
                    .iter()
                    .find(|s| kept(s) && new.members[s.index()].incarnation != old.members[s.index()].incarnation);
                if let Some(better) = better {
                    self.fail(|| format!("E6: b{i} is the source, but b{} kept its boot id", better.0));
                }
                self.count("cold start with loss");
            }
            // The power cut may have been before the last cold start, whose source had started again by then.
            if !kept(&source) || was_torn {
                let disk = self.bricks[i].disk.clone();
                self.history.cold_start(new.n, &disk);
                self.forgive_reads();
            }
        }
    }

    /// A leader may take a brick for living.
    pub(super) fn is_heard(&self, configuration: &Configuration, slot: Slot) -> bool {
        let silence_ms = (self.quorum.timing.read_lease_ms + self.quorum.timing.clock_margin_ms) * 11 / 10;
        let at = self.heard[slot.index()].get(&configuration.members[slot.index()].incarnation);
        at.is_some_and(|at| at + silence_ms > self.now)
    }

    /// [E2]: when a leader proposes to put an `InSync` brick out, it hears another one.
    pub(super) fn put_out_proposed(&mut self, configuration: &Configuration, slot: Slot) {
        let stays = configuration.in_sync().without(slot);
        let lives = stays.iter().any(|t| self.is_heard(configuration, t));
        if configuration.state(slot) == BrickState::InSync && !lives {
            self.fail(|| format!("E2: b{} is to be put out, and nobody who is InSync still lives", slot.0));
        }
    }

    /// [E8]: one that was put out does not return at once.
    fn put_out_or_back(&mut self, old: &Configuration, new: &Configuration, cold: Option<Slot>) {
        for s in Slot::ALL.into_iter().filter(|_| cold.is_none()) {
            let (before, after) = (old.members[s.index()], new.members[s.index()]);
            match (before.state, after.state) {
                (BrickState::Syncing | BrickState::InSync, BrickState::Out) => self.out_since[s.index()] = self.now,
                (BrickState::Out, BrickState::Syncing) if before.incarnation == after.incarnation => {
                    let after_ms = self.now - self.out_since[s.index()];
                    // By the leader's clock, which may be fast.
                    if after_ms < self.quorum.timing.back_off_ms * 9 / 10 {
                        self.fail(|| format!("E8: b{} returns after {after_ms} ms", s.0));
                    }
                }
                _ => {}
            }
        }
    }

    /// I3: no InSync brick accepts a mutation of a lower epoch after any of them has accepted one of a higher.
    pub(super) fn mutation_accepted(&mut self, s: usize, wire: &Wire) {
        let member = self.configuration().members[s];
        if member.state != BrickState::InSync || member.incarnation != self.bricks[s].incarnation {
            return;
        }
        let epoch = wire.request.epoch.0;
        let highest = self.accepted.entry(wire.ino).or_default();
        if epoch < *highest {
            let highest = *highest;
            self.fail(|| format!("I3: b{s} accepts a mutation of epoch {epoch} after one of {highest} was accepted"));
        } else {
            *highest = epoch;
        }
    }

    /// [F1]: by the log that a brick has applied, whoever changes a file holds its lease.
    pub(super) fn check_holder(&mut self, s: usize, wire: &Wire) {
        let Some(known) = self.bricks[s].applied.checked_sub(1).map(|i| &self.quorum.entries[i].state) else { return };
        let lease = lease_of(known, wire.ino).unwrap_or_default();
        if lease.epoch == wire.request.epoch && lease.holder != Some(wire.session) {
            let (session, body) = (wire.session, wire.request.body);
            self.fail(|| format!("F1: b{s} takes {body:?} of session {session}, which holds no lease: {lease:?}"));
        }
    }

    /// A brick serves a read: what it is about to show must stay, for somebody may have read it [W2].
    pub(super) fn note_seen(&mut self, s: usize, ino: Ino, range: ByteRange, content: &Content) {
        let member = self.configuration().members[s];
        if member.state == BrickState::InSync && member.incarnation == self.bricks[s].incarnation {
            for block in self.geometry.blocks(range).collect::<Vec<usize>>() {
                self.history.seen(slot(s), ino, block, content.blocks[block]);
            }
        }
    }

    /// I6: wherever a brick that is not `InSync` differs from one that is, that one knows, or an intent or doubt covers it.
    pub(super) fn check_known_differences(&mut self, s: usize) {
        let configuration = self.configuration();
        let member = configuration.members[s];
        let Some(replica) = &self.bricks[s].replica else { return };
        let is_current = replica.report().is_some_and(|r| r.n == configuration.n);
        if !is_current || member.state != BrickState::InSync {
            return;
        }
        let mut found = None;
        // One that is new is compared in full, whatever is known of it.
        let is_compared = |x: &Slot| configuration.members[x.index()].full || self.bricks[x.index()].has_no_disk();
        let others = Slot::ALL.into_iter().filter(|x| configuration.state(*x) != BrickState::InSync);
        for x in others.filter(|x| !is_compared(x)) {
            for ino in &self.files {
                let (mine, theirs) = (self.bricks[s].disk.content(*ino), self.bricks[x.index()].disk.content(*ino));
                for block in (0..mine.blocks.len()).filter(|b| mine.blocks[*b] != theirs.blocks[*b]) {
                    let range = self.geometry.range(block);
                    let (region, extent) = (range.start / REGION_BYTES, range.start / EXTENT_BYTES);
                    let is_missed = replica.missed(x).iter().any(|(of, set)| of == ino && set.contains(region));
                    let mut with_intent = configuration.in_sync().with(x).iter();
                    let is_intended = with_intent.any(|y| self.bricks[y.index()].disk.has_intent(*ino, extent));
                    let mut live = self.bricks.iter().filter_map(|b| b.replica.as_ref());
                    let is_doubted = live.any(|r| r.in_doubt(*ino).iter().any(|d| d.range.overlaps(&range)));
                    if !is_missed && !is_intended && !is_doubted && !self.history.is_unsettled(*ino, block) {
                        found = Some((x, *ino, block, mine, theirs));
                    }
                }
            }
        }
        if let Some((x, ino, block, mine, theirs)) = found {
            self.fail(|| {
                format!(
                    "I6: b{s} does not know that b{} differs in block {block} of {ino:?}: {mine:?}, {theirs:?}",
                    x.0
                )
            });
        }
    }

    /// I9: what a brick and the log keep in mind is bounded.
    pub(super) fn check_bounds(&mut self, s: usize) {
        let files = self.files.clone();
        let doubts = files.iter().map(|ino| self.replica(s).in_doubt(*ino).len()).max().unwrap_or(0);
        let state = self.quorum.state();
        let remembered = state.sessions.values().map(|session| session.outcomes.len()).max().unwrap_or(0);
        let cold_starts = state.sets.values().map(|set| set.cold_starts.len()).max().unwrap_or(0);
        if doubts > 256
            || remembered > REMEMBERED_OUTCOMES
            || state.ended.len() > REMEMBERED_SESSIONS
            || cold_starts > 16
        {
            self.fail(|| {
                format!("I9: b{s} has {doubts} in doubt, the log {remembered} outcomes, {cold_starts} cold starts")
            });
        }
    }

    /// I5 for one file: its holder has settled what was in doubt [W2], or gives it back, so nothing is in flight.
    pub(super) fn check_settled(&mut self, c: usize, ino: Ino) {
        let configuration = self.configuration();
        let lease = self.quorum.lease(ino);
        let current = self.clients[c].configuration.is_some_and(|known| known.n == configuration.n);
        if !current || lease.holder.is_none() || lease.holder != self.clients[c].session {
            return;
        }
        self.count("settled");
        let contents: Vec<_> = (0..3)
            .filter(|s| {
                let m = configuration.members[*s];
                m.state == BrickState::InSync && self.bricks[*s].is_up() && m.incarnation == self.bricks[*s].incarnation
            })
            .map(|s| (s, self.bricks[s].disk.content(ino)))
            .collect();
        // What a disk has changed is nobody's content until it is repaired: if it is the only source of a mutation in doubt,
        // those to which it would be copied keep what they have, which may be that mutation [R5].
        let is_changed = |c: &Content, b: usize| c.rotten[b] && self.struck.contains(&(ino, b));
        let sound: [Vec<u64>; BLOCKS] = core::array::from_fn(|b| {
            contents.iter().filter(|(_, c)| !is_changed(c, b)).map(|(_, c)| c.blocks[b]).collect()
        });
        let Some((_, content)) = contents.first() else { return };
        let differ = sound.iter().any(|blocks| blocks.iter().any(|block| *block != blocks[0]));
        if differ || contents.iter().any(|(_, c)| c.size != content.size) {
            self.fail(|| format!("I5: c{c} has settled {ino:?}, but its bricks differ: {contents:?}"));
        }
        let blocks = core::array::from_fn(|b| sound[b].first().copied().unwrap_or(content.blocks[b]));
        if let Err(why) = self.history.check_seen(ino, &Content { blocks, ..*content }) {
            self.fail(|| format!("W2: c{c} has settled {ino:?}, and what somebody has read is gone: {why}"));
        }
    }

    /// I5: the bricks are equal.
    pub(super) fn check_equal(&mut self) {
        for ino in self.files.clone() {
            let contents: Vec<_> = (0..3).map(|s| self.bricks[s].disk.content(ino)).collect();
            let differs = contents.iter().any(|c| c.blocks != contents[0].blocks || c.size != contents[0].size);
            if differs {
                self.fail(|| format!("I5: the bricks differ at rest in {ino:?}: {contents:?}"));
            }
        }
    }

    /// I10: everything has ended well.
    pub(super) fn is_at_rest(&self) -> bool {
        let c = self.configuration();
        c.in_sync().count() == 3
            && self.is_administered()
            && self.is_sound()
            && self.bricks.iter().enumerate().all(|(s, b)| {
                b.replica.as_ref().is_some_and(|r| r.is_drained() && c.members[s].incarnation == r.incarnation())
            })
            && self.clients.iter().all(|c| c.up && c.is_quiet())
            && self.files.iter().map(|f| self.quorum.lease(*f)).all(|l| l.holder.is_some() || !l.unsettled)
    }
}
