//! A disk that comes back as an older copy of itself: a snapshot that was rolled back, a backup. Its server knows by the stamp that the
//! journal had come further `[E5]`; then there is no brick, until the administrator has reset it.
//!
//! A copy that nothing tells from the disk is one that was made after the stamp was raised last. Where nothing was changed since, it
//! is as good as the disk; where something was, which is that of a second at most, it is not played: the product says that it
//! cannot know.

use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::types::BrickId;

use super::acts::Act;
use super::disk::Disk;
use super::rng::Rng;
use super::world::{Happening, World};

/// How many of a thousand runs have it.
const RUNS_PERMILLE: u64 = 150;
/// How often a brick raises its stamp while something is changed.
const RAISE_MS: u64 = 1000;
/// How long a disk is away that is exchanged.
const AWAY_MS: u64 = 300;

/// The copies that there are, and what chance does with them: dice apart from all others, so that a run without it is played as ever.
pub struct Copies {
    dice: Rng,
    kept: [Option<(BrickId, Disk)>; 3],
}

impl Copies {
    /// Those of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { dice: Rng::new(seed.rotate_left(11) ^ 0xc0_b1e5), kept: Default::default() }
    }
}

impl World {
    /// Whether this run has it.
    pub(super) fn begin_to_copy(&mut self) {
        if self.copies.dice.chance(RUNS_PERMILLE) {
            let first = self.copies.dice.between(200, 2000);
            self.after_chance(first, Happening::Copy);
        }
    }

    /// A copy is made, or comes back.
    pub(super) fn copies(&mut self) {
        if self.winding_down {
            return;
        }
        let next = self.copies.dice.delay(2500, 1000) + 200;
        self.after_chance(next, Happening::Copy);
        let s = self.copies.dice.index(3);
        let comes_back = self.copies.kept[s].is_some() && self.copies.dice.chance(600);
        self.act(if comes_back { Act::OldCopy(s) } else { Act::KeepCopy(s) });
    }

    /// A copy of a brick's disk is made, as a power cut would leave it.
    pub(super) fn keep_copy(&mut self, s: usize) {
        let brick = &self.bricks[s];
        if !brick.has_no_disk() {
            let mut copy = brick.disk.clone();
            for torn in copy.lose_power(&mut self.copies.dice, &mut self.tears) {
                self.history.torn(torn, false);
            }
            self.copies.kept[s] = Some((brick.id, copy));
        }
    }

    /// A brick's server loses power, and has the copy when it is back.
    pub(super) fn bring_old_copy(&mut self, s: usize) {
        let brick = &self.bricks[s];
        let Some((id, copy)) = &self.copies.kept[s] else { return };
        let is_told = copy.stamp() < brick.seen;
        let is_the_same = copy.changes() == brick.disk.changes();
        if *id != brick.id || !is_told && !is_the_same || !self.may_lose_disk(s) {
            return;
        }
        let copy = copy.clone();
        self.count(if is_told { "older copy" } else { "copy as good as the disk" });
        self.stop_brick(s, true, AWAY_MS);
        (self.bricks[s].disk, self.bricks[s].disk_is_old) = (copy, is_told);
    }

    /// A brick is about to start: what its server sees of its disk.
    pub(super) fn look_at_disk(&mut self, s: usize) {
        let brick = &mut self.bricks[s];
        brick.disk_is_old = false;
        if !brick.disk_is_new && brick.disk.stamp() < brick.seen && !left_out(Rule::E5Copy) {
            brick.disk_is_new = true;
            self.event(|| format!("b{s} has an older copy of itself"));
            self.replace(s);
        }
    }

    /// The stamp is raised while something is changed: in the journal, and some time later by the server.
    pub(super) fn raise_stamp(&mut self, s: usize) {
        let (now, brick) = (self.now, &mut self.bricks[s]);
        if brick.seen < brick.disk.stamp() {
            brick.seen = brick.disk.stamp();
        } else if now >= brick.raised_ms + RAISE_MS && brick.disk.raise_stamp() {
            brick.raised_ms = now;
        }
    }
}
