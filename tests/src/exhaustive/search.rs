//! The search: depth first, each world once, and the shortest trace of a failure that leaving steps out can find. A way may
//! have some hundred steps, each of which stands on the stack.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::canonical;
use super::scope::{Kind, Scope};
use super::step::Step;
use super::world::World;

/// What a search has seen.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Worlds that differ.
    pub worlds: u64,
    /// Steps that were made.
    pub steps: u64,
    /// The longest way to a new world.
    pub longest: usize,
    /// How long it took.
    pub took: Duration,
}

/// A rule was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The search.
    pub scope: &'static str,
    /// Which rule.
    pub what: String,
    /// The steps that lead there, and what they did.
    pub trace: Vec<String>,
    /// How many steps.
    pub length: usize,
}

impl core::fmt::Display for Failure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        write!(f, "after {} steps in {}: {}", self.length, self.scope, self.what)
    }
}

struct Search<'a> {
    scope: &'a Scope,
    /// Worlds that were seen, and how many steps were left then.
    seen: HashMap<u64, u32>,
    /// Worlds, whatever could still happen in them, that have come to rest well.
    rested: HashSet<u64>,
    way: Vec<(Step, Kind)>,
    report: Report,
}

/// Searches a scope.
///
/// # Errors
/// The first failure, with a trace from which no step can be left out.
pub fn explore(scope: &Scope) -> Result<Report, Box<Failure>> {
    let began = Instant::now();
    let mut search =
        Search { scope, seen: HashMap::new(), rested: HashSet::new(), way: Vec::new(), report: Report::default() };
    // A broken assertion is a failure like others; what it printed stands above the trace.
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let world = World::new(scope, false);
        let failure = world.failure.clone();
        failure.or_else(|| search.go(&world, scope.depth.unwrap_or(u32::MAX as usize) as u32))
    }));
    search.report.took = began.elapsed();
    search.report.worlds = search.seen.len() as u64;
    match ended {
        Ok(None) => Ok(search.report),
        Ok(Some(_)) | Err(_) => Err(Box::new(shortest(scope, search.way))),
    }
}

impl Search<'_> {
    fn go(&mut self, world: &World, left: u32) -> Option<String> {
        if left == 0 {
            return None;
        }
        for (step, kind) in world.steps() {
            let mut next = world.clone();
            self.way.push((step, kind));
            self.report.steps += 1;
            next.play(step, kind);
            if next.failure.is_some() {
                return next.failure;
            }
            let (is, hash) = canonical::hashes(&next);
            let known = self.seen.get(&hash).copied();
            // Without a bound each world is seen once; with one, again when more steps are left than before.
            if known.is_none_or(|before| before < left - 1 && self.scope.depth.is_some()) {
                self.seen.insert(hash, left - 1);
                self.report.longest = self.report.longest.max(self.way.len());
                if self.scope.rests && self.rested.insert(is) {
                    let mut end = next.clone();
                    end.rest();
                    if end.failure.is_some() {
                        return end.failure;
                    }
                }
                if let Some(failure) = self.go(&next, left - 1) {
                    return Some(failure);
                }
            }
            self.way.pop();
        }
        None
    }
}

/// What broke, if anything did, what was seen, and the steps that were possible.
type Played = (Option<String>, Vec<String>, Vec<(Step, Kind)>);

/// Plays steps as far as they are possible.
fn play(scope: &Scope, way: &[(Step, Kind)], traced: bool) -> Played {
    let mut world = World::new(scope, false);
    world.trace = traced.then(Vec::new);
    let mut played = Vec::new();
    let ended = catch_unwind(AssertUnwindSafe(|| {
        for step in way {
            if world.failure.is_none() && world.steps().contains(step) {
                played.push(*step);
                world.play(step.0, step.1);
            }
        }
        if world.failure.is_none() && scope.rests {
            world.rest();
        }
        world.failure.take()
    }));
    let failure = match ended {
        Ok(failure) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Some(format!("panic: {}", text.unwrap_or_default()))
        }
    };
    (failure, world.trace.unwrap_or_default(), played)
}

/// Leaves out what the failure does not need.
fn shortest(scope: &Scope, mut way: Vec<(Step, Kind)>) -> Failure {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut from = way.len();
    while from > 0 {
        from -= 1;
        let mut without = way.clone();
        if from < without.len() {
            without.remove(from);
        }
        let (failure, _, played) = play(scope, &without, false);
        if failure.is_some() && played.len() < way.len() {
            from = played.len();
            way = played;
        }
    }
    std::panic::set_hook(hook);
    let (what, trace, _) = play(scope, &way, true);
    let what = what.unwrap_or_else(|| "it does not fail when it is played again".to_owned());
    Failure { scope: scope.name, what, trace, length: way.len() }
}
