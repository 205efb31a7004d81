//! Shrinks a failing run to the few acts that it needs, so that a person can read it.
//!
//! With an act less everything after it happens at other times, so what a rare interleaving showed is easily lost. Each
//! smaller script is therefore tried with several dice, and the first that break the same rule are kept.

use core::fmt;
use std::time::{Duration, Instant};

use super::acts::Script;
use super::world::Play;
use super::{Failure, run_as};

/// Dice that a script is tried with before it counts as passing.
const DICE: u64 = 24;

/// A failing run with as few acts as were found.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// What is done.
    pub script: Script,
    /// With which dice.
    pub dice: u64,
    /// How it fails.
    pub failure: Failure,
    /// Acts of the run that was shrunk.
    pub before: usize,
}

impl fmt::Display for Shrunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "shrunk from {} acts to {} (seed {}, dice {}):",
            self.before,
            self.script.len(),
            self.failure.seed,
            self.dice
        )?;
        for (at, act) in &self.script {
            writeln!(f, "{at:>6} {act}")?;
        }
        writeln!(f, "what happens then:")?;
        for line in self.failure.trace.iter().filter(|l| l.main) {
            writeln!(f, "{}", line.text)?;
        }
        Ok(())
    }
}

struct Shrinking<'a> {
    seed: u64,
    kind: &'a str,
    until: Instant,
    /// The dice that the present script fails with.
    dice: u64,
}

impl Shrinking<'_> {
    fn play(&self, script: &Script, dice: u64, traced: bool) -> Option<Box<Failure>> {
        let how = Play { traced, script: Some(script.clone()), dice };
        run_as(self.seed, &how).err().filter(|failure| failure.kind() == self.kind)
    }
    /// The acts that were done before the same rule broke, if it does with any of the dice.
    fn fails(&mut self, script: &Script) -> Option<Script> {
        for turn in 0..DICE {
            let dice = (self.dice + turn) % 1000;
            if let Some(failure) = self.play(script, dice, false) {
                self.dice = dice;
                return Some(failure.script);
            }
            if Instant::now() >= self.until {
                break;
            }
        }
        None
    }
    /// Leaves out halves, quarters, and so on down to single acts, as long as that changes anything.
    fn reduce(&mut self, mut script: Script) -> Script {
        let mut size = script.len().div_ceil(2);
        while size > 0 {
            let mut from = 0;
            let before = script.len();
            while from < script.len() && Instant::now() < self.until {
                let to = (from + size).min(script.len());
                let less: Script = script[..from].iter().chain(&script[to..]).copied().collect();
                match self.fails(&less) {
                    Some(done) => script = done,
                    None => from = to,
                }
            }
            if Instant::now() >= self.until {
                break;
            }
            let again = size == 1 && script.len() < before;
            size = if again { 1 } else { size / 2 };
        }
        script
    }
}

/// Shrinks a failure for at most so long. `None`: its acts, played from a script, do not fail in the same way.
#[must_use]
pub fn shrink(failure: &Failure, for_at_most: Duration) -> Option<Shrunk> {
    let kind = failure.kind();
    let mut shrinking = Shrinking { seed: failure.seed, kind, until: Instant::now() + for_at_most, dice: 0 };
    let script = shrinking.fails(&failure.script)?;
    let script = shrinking.reduce(script);
    let last = shrinking.play(&script, shrinking.dice, true)?;
    Some(Shrunk { script, dice: shrinking.dice, failure: *last, before: failure.script.len() })
}
