//! What goes wrong, and how often: each run draws its own mix.

use mortar_proto::types::BLOCK_BYTES;

use super::rng::Rng;
use super::world::{CLIENTS, Happening, Node, World};

/// Kinds of faults.
const KINDS: usize = 14;
/// The one that stands for several, shortly after each other.
const CHAIN: usize = 13;

/// A run's mix of faults.
#[derive(Clone, Debug)]
pub struct Faults {
    weights: [u64; KINDS],
    every_ms: u64,
    /// The usual time between two operations of an application.
    pub gap_ms: u64,
    /// How often something goes wrong just after a moment at which that is awkward.
    pub tempt_permille: u64,
    /// How often an application uses a file that is not its own.
    pub sharing_permille: u64,
    /// Nothing more goes wrong after this.
    pub until_ms: u64,
}

impl Faults {
    /// Draws a mix: most kinds are left out of most runs, so that what remains meets itself more often.
    #[must_use]
    pub fn draw(rng: &mut Rng) -> Self {
        let weights = core::array::from_fn(|_| if rng.chance(450) { rng.between(1, 10) } else { 0 });
        Self {
            weights,
            every_ms: rng.between(100, 2500),
            gap_ms: rng.between(1, 100),
            tempt_permille: [0, 0, 20, 60, 200][rng.index(5)],
            sharing_permille: [0, 0, 5, 30, 1000][rng.index(5)],
            until_ms: 10_000 + rng.between(4, 16) * 1000,
        }
    }
}

/// Something that goes wrong in one place.
#[derive(Clone, Copy, Debug)]
pub enum Strike {
    /// A client's process dies.
    Crash(usize),
    /// A brick's process dies.
    Kill(usize),
    /// A brick's server loses power.
    Power(usize),
    /// A brick and the leader cannot talk, so it is put out.
    Isolate(usize),
}

impl World {
    /// An awkward moment: sometimes a client and one of these bricks are struck shortly after it.
    pub(super) fn tempt(&mut self, client: Option<usize>, bricks: &[usize]) {
        if self.now >= self.faults.until_ms || !self.rng.chance(self.faults.tempt_permille) {
            return;
        }
        self.count("tempted");
        if let Some(client) = client {
            let soon = self.rng.between(0, self.delay_ms * 3);
            self.after(soon, Happening::Strike(Strike::Crash(client)));
        }
        if let Some(s) = (!bricks.is_empty()).then(|| bricks[self.rng.index(bricks.len())])
            && (client.is_none() || self.rng.chance(700))
        {
            let soon = self.rng.delay(self.delay_ms * 6, 2500);
            let strike = [Strike::Kill(s), Strike::Power(s), Strike::Isolate(s)][self.rng.index(3)];
            self.after(soon, Happening::Strike(strike));
        }
    }

    pub(super) fn strike(&mut self, strike: Strike) {
        if self.now >= self.faults.until_ms {
            return;
        }
        match strike {
            Strike::Crash(c) => {
                if self.clients[c].up {
                    self.crash_client(c);
                }
            }
            Strike::Kill(s) => self.kill(s, false),
            Strike::Power(s) => self.kill(s, true),
            Strike::Isolate(s) => {
                let for_ms = self.rng.between(1200, 5000);
                self.note(|| format!("b{s} and the leader are cut apart for {for_ms}"));
                self.cut(Node::Brick(s), Node::Leader, for_ms);
                self.cut(Node::Leader, Node::Brick(s), for_ms);
            }
        }
    }

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
        match kind.unwrap_or(0) {
            CHAIN => {
                self.count("chain");
                let mut at = 0;
                if self.rng.chance(500) {
                    // A holder dies, its heir dies while it settles what was in doubt, and so does a brick.
                    self.after(0, Happening::FaultOf(5));
                    self.after(0, Happening::FaultOf(5));
                    let heir = self.leader.session_ttl_ms + self.rng.below(800);
                    for _ in 0..4 {
                        let more = self.rng.below(300);
                        self.after(heir + more, Happening::FaultOf(5));
                    }
                    at = heir;
                }
                for _ in 0..self.rng.between(2, 4) {
                    at += self.rng.delay(600, 2500);
                    let kind = [0, 0, 1, 1, 2, 3, 4, 5, 5, 5, 10][self.rng.index(11)];
                    self.after(at, Happening::FaultOf(kind));
                }
            }
            kind => self.fault_of(kind),
        }
    }

    pub(super) fn fault_of(&mut self, kind: usize) {
        if self.now >= self.faults.until_ms {
            return;
        }
        let s = self.rng.index(3);
        let c = self.rng.index(CLIENTS);
        match kind {
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
                let c = if self.rng.chance(250) { CLIENTS } else { c };
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
