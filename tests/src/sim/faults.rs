//! Chance decides what goes wrong, and how often: each run draws its own mix.

use super::acts::Act;
use super::quorum::VOTERS;
use super::rng::Rng;
use super::world::{CLIENTS, Happening, Node, World};

/// Kinds of faults.
const KINDS: usize = 22;
/// The one that stands for several, shortly after each other.
const CHAIN: usize = 21;

/// A run's mix of faults.
#[derive(Clone, Debug)]
pub struct Faults {
    weights: [u64; KINDS],
    every_ms: u64,
    /// The usual time between two operations of an application.
    pub gap_ms: u64,
    /// How often something goes wrong just after a moment at which that is awkward.
    pub tempt_permille: u64,
    /// How often a request arrives twice.
    pub repeat_permille: u64,
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
            repeat_permille: [0, 0, 0, 20, 200][rng.index(5)],
            sharing_permille: [0, 0, 5, 30, 1000][rng.index(5)],
            until_ms: 10_000 + rng.between(4, 16) * 1000,
        }
    }
}

impl World {
    /// Something goes wrong in `delay_ms`.
    fn fate(&mut self, delay_ms: u64, act: Act) {
        self.after_chance(delay_ms, Happening::Act(act));
    }
    fn kill_of(&mut self, brick: usize, power: bool) -> Act {
        Act::Kill { brick, power, down_ms: self.chaos.delay(1500, 6000) }
    }
    fn crash_of(&mut self, client: usize) -> Act {
        Act::Crash(client, self.chaos.between(50, 3000))
    }

    /// Mostly the voter that leads.
    fn some_leader(&mut self) -> usize {
        let other = self.chaos.index(VOTERS);
        if self.chaos.chance(700) { self.quorum.leads.unwrap_or(other) } else { other }
    }

    /// An awkward moment: sometimes a client and one of these bricks are struck shortly after it.
    pub(super) fn tempt(&mut self, client: Option<usize>, bricks: &[usize]) {
        if self.scripted || self.now >= self.faults.until_ms || !self.chaos.chance(self.faults.tempt_permille) {
            return;
        }
        self.count("tempted");
        if let Some(client) = client {
            let soon = self.chaos.between(0, self.delay_ms * 3);
            let crash = self.crash_of(client);
            self.fate(soon, crash);
        }
        if let Some(s) = (!bricks.is_empty()).then(|| bricks[self.chaos.index(bricks.len())])
            && (client.is_none() || self.chaos.chance(700))
        {
            let soon = self.chaos.delay(self.delay_ms * 6, 2500);
            match self.chaos.index(3) {
                0 | 1 => {
                    let power = self.chaos.chance(500);
                    let kill = self.kill_of(s, power);
                    self.fate(soon, kill);
                }
                _ => {
                    // It is put out.
                    let for_ms = self.chaos.between(1200, 5000);
                    for v in 0..VOTERS {
                        self.fate(soon, Act::Cut(Node::Brick(s), Node::Voter(v), for_ms));
                        self.fate(soon, Act::Cut(Node::Voter(v), Node::Brick(s), for_ms));
                    }
                }
            }
        }
    }

    pub(super) fn fault(&mut self) {
        if self.now >= self.faults.until_ms {
            return;
        }
        let next = self.chaos.delay(self.faults.every_ms * 2, self.faults.every_ms * 4) + 1;
        self.after_chance(next, Happening::Fault);
        let total: u64 = self.faults.weights.iter().sum();
        if total == 0 {
            return;
        }
        let mut drawn = self.chaos.below(total);
        let kind = self.faults.weights.iter().position(|w| {
            let hit = drawn < *w;
            drawn = drawn.saturating_sub(*w);
            hit
        });
        match kind.unwrap_or(0) {
            CHAIN => self.chain(),
            kind => self.fault_of(kind, 0),
        }
    }

    /// Several things go wrong, shortly after each other.
    fn chain(&mut self) {
        self.count("chain");
        let mut at = 0;
        if self.chaos.chance(500) {
            // A holder dies, its heir dies while it settles what was in doubt, and so does a brick.
            self.fault_of(5, 0);
            self.fault_of(5, 0);
            let heir = self.quorum.session_ttl_ms + self.chaos.below(800);
            for _ in 0..4 {
                let more = self.chaos.below(300);
                self.fault_of(5, heir + more);
            }
            at = heir;
        }
        for _ in 0..self.chaos.between(2, 4) {
            at += self.chaos.delay(600, 2500);
            let kind = [0, 0, 1, 1, 2, 3, 4, 5, 5, 5, 10][self.chaos.index(11)];
            self.fault_of(kind, at);
        }
    }

    /// A fault of this kind, in `after_ms`.
    fn fault_of(&mut self, kind: usize, after_ms: u64) {
        let s = self.chaos.index(3);
        let c = self.chaos.index(CLIENTS);
        let act = match kind {
            0 => self.kill_of(s, false),
            1 => self.kill_of(s, true),
            2 => Act::Pause(s, self.chaos.delay(800, 4000)),
            3 => {
                let voters = (0..VOTERS).map(Node::Voter);
                let nodes: Vec<Node> =
                    (0..=CLIENTS).map(Node::Client).chain((0..3).map(Node::Brick)).chain(voters).collect();
                let (a, b) = (nodes[self.chaos.index(nodes.len())], nodes[self.chaos.index(nodes.len())]);
                let for_ms = self.chaos.delay(2000, 6000);
                if self.chaos.chance(500) {
                    self.fate(after_ms, Act::Cut(b, a, for_ms));
                }
                Act::Cut(a, b, for_ms)
            }
            4 => Act::Break(self.chaos.index(CLIENTS + 1), s),
            5 => {
                let c = if self.chaos.chance(250) { CLIENTS } else { c };
                self.crash_of(c)
            }
            6 => Act::PauseVoter(self.some_leader(), self.chaos.delay(1000, 4000)),
            7 => Act::Elect,
            8 => {
                for s in 0..3 {
                    if self.chaos.chance(850) {
                        let kill = self.kill_of(s, true);
                        self.fate(after_ms, kill);
                    }
                }
                return;
            }
            9 => {
                for s in 0..3 {
                    let power = self.chaos.chance(250);
                    let kill = self.kill_of(s, power);
                    self.fate(after_ms, kill);
                }
                return;
            }
            10 => Act::Stop(s),
            11 => Act::FailFlush(s),
            13 => Act::FailRead(s),
            14 => Act::FailWrite(s),
            15 => Act::ReadOnly(s),
            16 => Act::SlowDisk(s, self.chaos.between(500, 4000)),
            17 => Act::HangDisk(s, self.chaos.between(300, 6000)),
            18 => Act::Jump(s, self.chaos.between(100, 5000)),
            19 => Act::Flaky(self.chaos.between(300, 3000)),
            20 => {
                let nodes = [Node::Client(c), Node::Brick(s), Node::Voter(s)];
                Act::Slow(nodes[self.chaos.index(3)], self.chaos.between(500, 4000))
            }
            12 => Act::KillVoter(self.some_leader(), self.chaos.delay(1500, 6000)),
            _ => {
                let full = !self.bricks[s].full;
                if self.chaos.chance(300) {
                    (0..3).filter(|other| *other != s).for_each(|other| self.fate(after_ms, Act::Full(other, full)));
                }
                Act::Full(s, full)
            }
        };
        self.fate(after_ms, act);
    }

    /// Faults stop: what was cut is mended, what was down comes up.
    pub(super) fn calm(&mut self) {
        self.event(|| "faults stop".to_owned());
        self.mend();
        self.faults.until_ms = 0;
        self.flaky_until = 0;
        self.slow = None;
        for v in 0..VOTERS {
            self.quorum.voters[v].paused_until = 0;
        }
        for s in 0..3 {
            self.bricks[s].paused_until = 0;
            self.bricks[s].full = false;
            self.bricks[s].flush_fails = false;
            self.bricks[s].read_fails = false;
            self.bricks[s].write_fails = false;
            self.bricks[s].read_only = false;
            self.bricks[s].slow_until = 0;
            self.bricks[s].hung_until = 0;
            // The administrator starts a brick that has failed again.
            if self.bricks[s].replica.as_ref().is_some_and(|r| r.has_failed()) {
                self.stop_brick(s, false, 100);
            }
        }
    }
}
