//! A deterministic simulator: the real coordinators, replicas, log's state and monitor in a world with one clock, a network that
//! delays, reorders, repeats and cuts, and disks that lose what was not flushed. A run is a seed; a failing run prints it.
//!
//! | file | owns |
//! | --- | --- |
//! | `world` | the clock, the queue of what happens next, the network |
//! | `brick`, `serve`, `peers` | a brick's process around the replica |
//! | `client`, `session` | a mount, or the janitor: applications and coordinators; its talk with the leader |
//! | `quorum`, `leader` | the voters and what they committed; what one does that believes to lead |
//! | `disk` | page cache and durable data, journal records |
//! | `acts` | what is done to it from outside: drawn by chance, or from a script |
//! | `faults`, `rot` | what goes wrong; what disks change by themselves |
//! | `administrator` | disks and bricks that are exchanged |
//! | `history`, `check` | what must be true: I1, I2, I3, I5, I7, I8, I10 |
//! | `directed` | scripts written by hand, for rules whose absence chance rarely shows |
//! | `shrink` | the few acts that a failing run needs |
//! | `rng` | chance |

pub mod acts;
pub mod administrator;
pub mod brick;
pub mod check;
pub mod client;
pub mod copies;
pub mod directed;
pub mod disk;
pub mod faults;
pub mod history;
pub mod leader;
pub mod peers;
pub mod quorum;
pub mod rng;
pub mod rot;
pub mod serve;
mod session;
pub mod shrink;
pub mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use acts::Script;
use world::{Line, Play, World};

/// How long everything may take to come to rest once faults have stopped, in milliseconds.
const REST_MS: u64 = 90_000;

/// What a good run has seen.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Operations that were completed.
    pub completed: u64,
    /// Kinds of things that happened.
    pub seen: BTreeMap<&'static str, u64>,
    /// What was done to the world.
    pub script: Script,
    /// When it came to rest.
    pub ended_ms: u64,
    /// Its last events, if they were wanted.
    pub trace: Vec<Line>,
}

/// A run that broke a rule.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// Which rule, and how.
    pub what: String,
    /// Its last events.
    pub trace: Vec<Line>,
    /// What was done to the world, until it failed.
    pub script: Script,
}

impl Failure {
    /// What was broken: `I1` to `I10`, or the rule, or `panic`.
    #[must_use]
    pub fn kind(&self) -> &str {
        kind_of(&self.what)
    }
}

/// Which invariant or rule a sentence about a failure names first; `panic` if it names none.
#[must_use]
pub fn kind_of(what: &str) -> &str {
    let is_name = |word: &&str| {
        let mut letters = word.chars();
        letters.next().is_some_and(|c| c.is_ascii_uppercase()) && word.len() > 1 && letters.all(|c| c.is_ascii_digit())
    };
    what.split([' ', ':', ',', '(', '\n', '[', ']']).find(is_name).unwrap_or("panic")
}

impl core::fmt::Display for Failure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let from = self.trace.len().saturating_sub(events_shown());
        for line in &self.trace[from..] {
            writeln!(f, "{}", line.text)?;
        }
        writeln!(f, "seed {} failed: {}", self.seed, self.what)?;
        write!(f, "replay it with MORTAR_SIM_SEED={}", self.seed)
    }
}

fn events_shown() -> usize {
    std::env::var("MORTAR_SIM_EVENTS").ok().and_then(|v| v.parse().ok()).unwrap_or(60)
}

/// Runs a seed; one that fails is run again to have its events.
///
/// # Errors
/// The rule that it breaks.
pub fn run(seed: u64) -> Result<Summary, Box<Failure>> {
    match run_as(seed, &Play::default()) {
        Ok(summary) => Ok(summary),
        Err(first) => match run_as(seed, &Play { traced: true, ..Play::default() }) {
            Ok(_) => Err(Box::new(Failure { what: format!("{} (but not when run again!)", first.what), ..*first })),
            Err(failure) => Err(failure),
        },
    }
}

/// Plays a seed in a given way.
///
/// # Errors
/// The rule that it breaks.
pub fn run_as(seed: u64, how: &Play) -> Result<Summary, Box<Failure>> {
    let mut world = World::new(seed, how);
    let ended = catch_unwind(AssertUnwindSafe(|| play(&mut world)));
    if let Err(panic) = ended {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        world.fail(|| format!("panic: {}", text.unwrap_or_default()));
    }
    let trace = world.trace.take().map(Vec::from).unwrap_or_default();
    match world.failure.take() {
        Some(what) => Err(Box::new(Failure { seed, what, trace, script: world.done })),
        None => {
            Ok(Summary { completed: world.completed, seen: world.seen, script: world.done, ended_ms: world.now, trace })
        }
    }
}

fn play(world: &mut World) {
    let end = world.faults.until_ms;
    world.run_until(end);
    world.calm();
    let calm = world.now + 3000;
    world.run_until(calm);
    world.winding_down = true;
    let deadline = world.now + REST_MS;
    while world.failure.is_none() && !world.is_at_rest() {
        if world.now >= deadline {
            let states: Vec<String> = world.clients.iter().map(client::Client::describe).collect();
            let configuration = world.configuration();
            world.fail(|| format!("I10: no rest under {configuration:?}\n{}", states.join("\n")));
        }
        let next = world.now + 500;
        world.run_until(next);
    }
    if world.failure.is_none() {
        world.check_equal();
    }
}
