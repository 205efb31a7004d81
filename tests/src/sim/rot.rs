//! Bytes that a disk changes by itself: a block then does not match its checksum `[R5]`, until it is written over. Readers are told
//! so, pulls take another source, the brick remembers, and a scrub finds what nobody reads.
//!
//! A block is struck only on an `InSync` brick, and while another one holds it durably and all are sound: whatever happens then,
//! one brick has it, unless that is written over by a client that dies and the brick restarts too. So a read fails by it only while
//! the bricks that have it are not in sync, and at rest nothing corrupt may be left but what was lost in that way. Disks go on with
//! it after all other faults have stopped.
//!
//! An unclean stop takes a corrupt block in an extent with intent for a torn one `[S3]`: it has to be repaired like one, and where the
//! brick is the source of a cold start and nobody that it reaches has the block, it stays what it is.

use mortar_proto::coordinator::{Answer, Body};
use mortar_proto::interval::IntervalSet;
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::types::{BLOCK_BYTES, ByteRange, Ino, REGION_BYTES};
use mortar_proto::{BrickState, Slot};

use super::acts::Act;
use super::brick::{Job, Peer, Step};
use super::disk::{BLOCKS, Content, Torn, nobodys};
use super::rng::Rng;
use super::world::{Happening, Node, TIMEOUTS, World, slot};

/// How many of a thousand runs have it.
const RUNS_PERMILLE: u64 = 300;
/// And how many of a thousand have a disk that writes nowhere, or elsewhere, and says that all is well.
const LYING_PERMILLE: u64 = 200;
/// How often a brick looks for it by itself, in thousandths of its turns.
const SCRUB_PERMILLE: u64 = 10;

/// The dice of disks that lie: apart as well.
#[must_use]
pub fn lies(seed: u64) -> Rng {
    Rng::new(seed.rotate_left(29) ^ 0x11e5)
}

/// The dice of what disks change: apart from all others, so that a run without it is played as ever.
#[must_use]
pub fn dice(seed: u64) -> Rng {
    Rng::new(seed.rotate_left(23) ^ 0x0dd_b175)
}

impl World {
    /// Whether this run has it.
    pub(super) fn begin_to_rot(&mut self) {
        if self.rot.chance(RUNS_PERMILLE) {
            let first = self.rot.between(500, 2000);
            self.after_chance(first, Happening::Rot);
        }
        if self.lies.chance(LYING_PERMILLE) {
            let first = self.lies.between(500, 2000);
            self.after_chance(first, Happening::Lie);
        }
    }

    /// It turns out that some disk has not written what it said.
    pub(super) fn lies(&mut self) {
        if self.winding_down {
            return;
        }
        let next = self.lies.delay(500, 3000) + 20;
        self.after_chance(next, Happening::Lie);
        let s = self.lies.index(3);
        let [from, to] = [(); 2].map(|()| (self.files[self.lies.index(self.files.len())], self.lies.index(BLOCKS)));
        let is_lost = self.lies.chance(500);
        if is_lost && self.can_spare(s, from.0, from.1) {
            self.act(Act::LoseWrite(s, from.0, from.1));
        } else if !is_lost && from != to && [from, to].iter().all(|(ino, b)| self.can_spare(s, *ino, *b)) {
            self.act(Act::Misdirect(s, from, to));
        }
    }

    /// Some disk changes some block.
    pub(super) fn rots(&mut self) {
        if self.winding_down {
            return;
        }
        let next = self.rot.delay(500, 3000) + 20;
        self.after_chance(next, Happening::Rot);
        let (s, ino) = (self.rot.index(3), self.files[self.rot.index(self.files.len())]);
        let block = self.rot.index(BLOCKS);
        if self.can_spare(s, ino, block) {
            self.act(Act::Flip(s, ino, block));
        }
    }

    /// This brick and another one are `InSync` and hold a block durably, and it is corrupt nowhere.
    fn can_spare(&self, s: usize, ino: Ino, block: usize) -> bool {
        let configuration = self.configuration();
        let value = self.bricks[s].disk.block(ino, block);
        let holds = |s: &usize| {
            let disk = &self.bricks[*s].disk;
            let is_durable = (disk.block(ino, block), disk.durable(ino, block)) == (value, value);
            configuration.state(slot(*s)) == BrickState::InSync && is_durable
        };
        let is_sound = (0..3).all(|s| !self.bricks[s].disk.is_rotten(ino, block));
        value != 0 && is_sound && holds(&s) && (0..3).filter(holds).count() >= 2
    }

    pub(super) fn flip(&mut self, s: usize, ino: Ino, block: usize) {
        if self.can_spare(s, ino, block) {
            self.count("flipped");
            let data = nobodys(&mut self.tears);
            self.strike(s, ino, block, data);
        }
    }

    pub(super) fn lose_write(&mut self, s: usize, ino: Ino, block: usize) {
        let before = self.bricks[s].disk.data_before(ino, block);
        if self.can_spare(s, ino, block) && self.bricks[s].disk.block(ino, block) != before {
            self.count("lost write");
            self.strike(s, ino, block, before);
        }
    }

    pub(super) fn misdirect(&mut self, s: usize, from: (Ino, usize), to: (Ino, usize)) {
        let data = self.bricks[s].disk.block(from.0, from.1);
        let before = self.bricks[s].disk.data_before(from.0, from.1);
        let is_seen = data != before && data != self.bricks[s].disk.block(to.0, to.1);
        if from != to && is_seen && [from, to].iter().all(|(ino, b)| self.can_spare(s, *ino, *b)) {
            self.count("misdirected write");
            self.strike(s, from.0, from.1, before);
            self.strike(s, to.0, to.1, data);
        }
    }

    /// The data of a block is something else now.
    fn strike(&mut self, s: usize, ino: Ino, block: usize, data: u64) {
        self.bricks[s].disk.set_data(ino, block, data);
        self.struck.insert((ino, block));
        self.history.forget_seen(slot(s), Some((ino, block)));
    }

    /// [S3] A brick is about to serve, or to be repaired, after an unclean stop. The source of a cold start looks first whether
    /// another brick has what its checksums are of.
    /// True: a power cut had torn something, which is taken as it is.
    pub(super) fn settle_doubts(&mut self, s: usize, is_source: bool) -> bool {
        if !std::mem::take(&mut self.bricks[s].has_doubts) || left_out(Rule::S3) {
            return false;
        }
        let mut was_torn = false;
        for (ino, block) in self.bricks[s].disk.doubted() {
            let value = self.bricks[s].disk.block(ino, block);
            // Past the end of a file there is no data.
            let is_within = self.geometry.offset(block) < self.bricks[s].disk.size(ino);
            let has_it = |o: &usize| self.is_reachable(s, *o) && self.bricks[*o].disk.data_of(ino, block) == value;
            let is_vouched = is_within && value != 0 && (0..3).filter(|o| *o != s).any(|o| has_it(&o));
            let asks = is_source && !left_out(Rule::S3Vouched);
            let disk = &mut self.bricks[s].disk;
            if asks && is_vouched {
                disk.write(ino, block, value);
                self.count("another brick had what a checksum was of");
                continue;
            }
            if is_within && disk.is_spoiled(ino, block) && asks == is_source {
                // Nobody who is left can tell it from what a power cut has torn, so this is its content from now on.
                let torn = Torn { value: nobodys(&mut self.tears), parts: vec![value] };
                disk.set_spoiled(ino, block, torn.value);
                self.history.torn(torn, is_source);
                self.count("what a disk had changed was taken for torn");
            } else {
                was_torn = true;
            }
            self.bricks[s].disk.make_sum_anew(ino, block);
            self.event(|| format!("b{s} makes the checksum of block {block} of {ino} anew"));
        }
        was_torn
    }

    /// One brick can ask another one something now.
    fn is_reachable(&self, s: usize, other: usize) -> bool {
        let (from, to, brick) = (Node::Brick(s), Node::Brick(other), &self.bricks[other]);
        let is_cut = self.cut_until(from, to).or(self.cut_until(to, from)).is_some();
        brick.is_up() && brick.paused_until <= self.now && brick.hung_until <= self.now && !is_cut
    }

    /// A read failed because something of it is corrupt: on every `InSync` brick, as far as this client can know.
    pub(super) fn check_lost(&mut self, c: usize, ino: Ino, blocks: core::ops::Range<usize>, since_ms: u64) {
        self.count("read of what is corrupt everywhere");
        let configuration = self.configuration();
        let is_current = self.clients[c].configuration.is_some_and(|known| known.n == configuration.n);
        if !blocks.clone().any(|b| self.struck.contains(&(ino, b))) {
            self.fail(|| {
                format!("S3: a read of c{c} fails, but no disk has changed any of blocks {blocks:?} by itself")
            });
        }
        let is_sound = |s: Slot, b| self.bricks[s.index()].disk.is_sound_since(ino, b, since_ms);
        let is_lost = |b| !configuration.in_sync().iter().any(|s| is_sound(s, b));
        if is_current && !blocks.clone().any(is_lost) {
            self.fail(|| {
                format!("R5: a read of c{c} fails, but each of blocks {blocks:?} was sound on an InSync brick")
            });
        }
    }

    /// Blocks of a range that do not verify on a brick.
    fn corrupt_in(&self, s: usize, ino: Ino, range: ByteRange) -> Vec<usize> {
        self.geometry.blocks(range).filter(|b| self.bricks[s].disk.is_rotten(ino, *b)).collect()
    }

    /// The answer to a read, if something of it does not verify.
    pub(super) fn read_of_corrupt(
        &mut self,
        s: usize,
        ino: Ino,
        range: ByteRange,
        content: &mut Content,
    ) -> Option<Answer> {
        let corrupt = self.corrupt_in(s, ino, range);
        if corrupt.is_empty() {
            return None;
        }
        self.count("read of a corrupt block");
        if left_out(Rule::R5Read) {
            corrupt.into_iter().for_each(|b| content.blocks[b] = self.bricks[s].disk.data_of(ino, b));
            return None;
        }
        let number = |b: &usize| self.geometry.offset(*b) / BLOCK_BYTES;
        Some(Answer::Corrupt(corrupt.iter().map(number).map(|n| n..n + 1).collect()))
    }

    /// The brick looks for itself, and remembers what is to be repaired.
    pub(super) fn look_at(&mut self, s: usize, ino: Ino, range: ByteRange) {
        let region = |b: usize| self.geometry.offset(b) / REGION_BYTES;
        let regions: IntervalSet = self.corrupt_in(s, ino, range).into_iter().map(region).map(|r| r..r + 1).collect();
        for due in self.replica(s).damage_due(ino, &regions) {
            let own = self.bricks[s].id;
            self.bricks[s].disk.record_missed(own, ino, due.clone());
            self.replica(s).damage_recorded(ino, due);
        }
    }

    /// Now and then a brick scrubs, and looks again at what nobody could give back.
    pub(super) fn scrub(&mut self, s: usize) {
        if self.bricks[s].disk.has_rot() && self.rng.chance(SCRUB_PERMILLE) {
            for ino in self.files.clone() {
                self.look_at(s, ino, ByteRange::ALL);
            }
            self.replica(s).try_damaged_again();
        }
    }

    /// Something on an `InSync` brick is to be repaired in this file.
    pub(super) fn is_damaged(&self, ino: Ino) -> bool {
        let lists = |s: usize| {
            let replica = self.bricks[s].replica.as_ref().filter(|r| r.is_live() && r.state() == BrickState::InSync);
            replica.and_then(|r| r.repair_list(slot(s), ino)).is_some_and(|regions| !regions.is_empty())
        };
        (0..3).any(lists)
    }

    /// Writes what a source sent, as far as it verifies there; what does not is asked of another one. False: it goes on later,
    /// or was refused.
    pub(super) fn take_pulled(&mut self, s: usize, job: &mut Job, content: &Content) -> bool {
        let (ino, Body::Pull { range, doubt, .. }) = (job.wire.ino, job.wire.request.body) else { return true };
        let mut lost = Vec::new();
        for block in self.geometry.blocks(range).collect::<Vec<usize>>() {
            let disk = &mut self.bricks[s].disk;
            let is_sound = !disk.is_rotten(ino, block) || left_out(Rule::R5Target);
            if disk.block(ino, block) == content.blocks[block] && is_sound {
                continue;
            }
            if content.rotten[block] && left_out(Rule::R5Source) {
                disk.write(ino, block, content.data[block]);
            } else if content.rotten[block] {
                lost.push(block);
            } else {
                disk.write(ino, block, content.blocks[block]);
            }
        }
        if lost.is_empty() {
            return true;
        }
        self.count("source is corrupt");
        if doubt.is_some() {
            job.applied = false;
            job.answer = Answer::SourceCorrupt;
            return true;
        }
        let in_sync = self.replica(s).configuration().map(|c| c.in_sync()).unwrap_or_default();
        match in_sync.minus(job.tried).without(slot(s)).iter().next() {
            Some(other) => {
                let number = self.number();
                job.tried.insert(other);
                self.bricks[s].pulls.insert(number, job.clone());
                self.say(s, other.index(), Peer::Ask(number, job.wire));
                self.later(s, TIMEOUTS.io_timeout_ms / 2, Step::PullLate(number));
                false
            }
            // An InSync brick keeps its own; of others nobody knows whether it is old.
            None => {
                if !in_sync.has(slot(s)) {
                    for block in lost {
                        self.note_lost(ino, block);
                        let disk = &mut self.bricks[s].disk;
                        let data = disk.data_of(ino, block);
                        disk.write(ino, block, content.blocks[block]);
                        disk.set_data(ino, block, data);
                    }
                }
                true
            }
        }
    }

    /// A brick takes over what is corrupt. If it is so on every `InSync` one, nobody can give it back until it is written again:
    /// the copy that was sound had been written over by somebody who died, and its brick had restarted.
    fn note_lost(&mut self, ino: Ino, block: usize) {
        let in_sync = self.configuration().in_sync();
        let is_struck = self.struck.contains(&(ino, block));
        if is_struck && in_sync.iter().all(|s| self.bricks[s.index()].disk.is_rotten(ino, block)) {
            self.count("corrupt everywhere");
            self.lost.insert((ino, block));
        }
    }

    /// Nothing is corrupt but what is so everywhere, and could not be given back.
    pub(super) fn is_sound(&self) -> bool {
        let is_rotten = |s: usize, ino, block| self.bricks[s].disk.is_rotten(ino, block);
        self.files.iter().flat_map(|ino| (0..BLOCKS).map(move |b| (*ino, b))).all(|(ino, block)| {
            let corrupt = (0..3).filter(|s| is_rotten(*s, ino, block)).count();
            corrupt == 0 || corrupt == 3 && self.lost.contains(&(ino, block))
        })
    }

    /// A region was pulled: it is struck off if it is sound now.
    pub(super) fn settle_damage(&mut self, s: usize, ino: Ino, region: u64) {
        if !self.replica(s).is_damaged(ino, region) {
            return;
        }
        if self.corrupt_in(s, ino, ByteRange::at(region * REGION_BYTES, REGION_BYTES)).is_empty() {
            self.count("corrupt block repaired");
            self.replica(s).damage_repaired(ino, region);
            let own = self.bricks[s].id;
            self.bricks[s].disk.forget_missed(own, ino, region..region + 1);
        } else {
            self.replica(s).give_up(ino, region);
        }
    }
}
