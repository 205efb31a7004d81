//! What goes wrong, and how often: each run draws its own mix.

use mortar_proto::types::BLOCK_BYTES;

use super::rng::Rng;
use super::world::{CLIENTS, Happening, Node, World};

/// Kinds of faults.
const KINDS: usize = 13;

/// A run's mix of faults.
#[derive(Clone, Debug)]
pub struct Faults {
    weights: [u64; KINDS],
    every_ms: u64,
    /// The usual time between two operations of an application.
    pub gap_ms: u64,
    /// Nothing more goes wrong after this.
    pub until_ms: u64,
}

impl Faults {
    /// Draws a mix: most kinds are left out of most runs, so that what remains meets itself more often.
    #[must_use]
    pub fn draw(rng: &mut Rng) -> Self {
        let weights = core::array::from_fn(|_| if rng.chance(450) { rng.between(1, 10) } else { 0 });
        let gap_ms = rng.between(5, 150);
        Self { weights, every_ms: rng.between(100, 2500), gap_ms, until_ms: 10_000 + rng.between(4, 16) * 1000 }
    }
}

impl World {
    pub(super) fn fault(&mut self) {
        if self.now >= self.faults.until_ms {
            return;
        }
        let next = self.rng.delay(self.faults.every_ms * 2, self.faults.every_ms * 4) + 1;
        self.after(next, Happening::Fault);
        let total: u64 = self.faults.weights.iter().sum();
        if total == 0 {
            return;
        }
        let mut drawn = self.rng.below(total);
        let kind = self.faults.weights.iter().position(|w| {
            let hit = drawn < *w;
            drawn = drawn.saturating_sub(*w);
            hit
        });
        let s = self.rng.index(3);
        let c = self.rng.index(CLIENTS);
        match kind.unwrap_or(0) {
            0 => self.kill(s, false),
            1 => self.kill(s, true),
            2 => {
                let for_ms = self.rng.delay(800, 4000);
                self.note(|| format!("b{s} pauses for {for_ms}"));
                self.bricks[s].paused_until = self.now + for_ms;
            }
            3 => {
                let nodes: Vec<Node> =
                    (0..=CLIENTS).map(Node::Client).chain((0..3).map(Node::Brick)).chain([Node::Leader]).collect();
                let (a, b) = (nodes[self.rng.index(nodes.len())], nodes[self.rng.index(nodes.len())]);
                let for_ms = self.rng.delay(2000, 6000);
                self.note(|| format!("cut {a:?} -> {b:?} for {for_ms}"));
                self.cut(a, b, for_ms);
                if self.rng.chance(500) {
                    self.cut(b, a, for_ms);
                }
            }
            4 => {
                let c = self.rng.index(CLIENTS + 1);
                self.break_link(c, s);
            }
            5 => {
                let c = if self.rng.chance(200) { CLIENTS } else { c };
                if self.clients[c].up {
                    self.count("client crash");
                    self.crash_client(c);
                }
            }
            6 => {
                let for_ms = self.rng.delay(1000, 4000);
                self.note(|| format!("leader pauses for {for_ms}"));
                self.leader.paused_until = self.now + for_ms;
            }
            7 => {
                self.note(|| "another leader".to_owned());
                let now = self.now;
                self.leader.elected(now);
            }
            8 => {
                self.count("power cut of all");
                for s in 0..3 {
                    if self.rng.chance(850) {
                        self.kill(s, true);
                    }
                }
            }
            9 => {
                self.count("kill of all");
                for s in 0..3 {
                    let power = self.rng.chance(250);
                    self.kill(s, power);
                }
            }
            10 => {
                if self.bricks[s].is_up() && self.bricks[s].stopping.is_none() {
                    self.note(|| format!("b{s} is asked to stop"));
                    self.bricks[s].stopping = Some(self.now);
                }
            }
            11 => {
                self.note(|| format!("b{s} is going to fail its next flush"));
                self.bricks[s].flush_fails = true;
            }
            _ => {
                let full = !self.bricks[s].full;
                self.note(|| format!("b{s} full={full}"));
                if self.rng.chance(300) {
                    self.bricks.iter_mut().for_each(|b| b.full = full);
                } else {
                    self.bricks[s].full = full;
                }
                let _ = BLOCK_BYTES;
            }
        }
    }

    fn kill(&mut self, s: usize, power: bool) {
        let down = self.rng.delay(1500, 6000);
        self.count(if power { "power cut" } else { "kill" });
        self.note(|| format!("b{s} {} for {down}", if power { "loses power" } else { "is killed" }));
        self.stop_brick(s, power, down);
    }

    /// Faults stop: what was cut is mended, what was down comes up.
    pub(super) fn calm(&mut self) {
        self.note(|| "faults stop".to_owned());
        self.mend();
        self.faults.until_ms = 0;
        self.leader.paused_until = 0;
        for s in 0..3 {
            self.bricks[s].paused_until = 0;
            self.bricks[s].full = false;
            self.bricks[s].flush_fails = false;
            // The administrator starts a brick that has failed again.
            if self.bricks[s].replica.as_ref().is_some_and(|r| r.has_failed()) {
                self.stop_brick(s, false, 100);
            }
        }
    }
}
