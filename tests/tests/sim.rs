//! The machines keep their promises in a world where everything fails, for as many seeds as there is time for.
//!
//! `MORTAR_SIM_SEEDS` says how many (3000), `MORTAR_SIM_SEED` replays one, `MORTAR_SIM_FROM` starts at a given one,
//! `MORTAR_SIM_EVENTS` says how many of a failing run's events are shown (60), `MORTAR_SIM_SHRINK` for how many seconds its
//! acts are shrunk (60).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mortar_tests::sim::{self, Failure, shrink};

/// Seeds that failed once; each found something.
const ONCE_FAILED: &[u64] = &[
    35,
    86,
    108,
    117,
    149,
    266,
    333,
    1078,
    2402,
    2840,
    3308,
    6_002_306,
    6_025_470,
    10_000_351,
    20_006_936,
    20_009_723,
    20_010_540,
    33_002_834,
    804_472_744_694,
    186_935_601_557,
    50_005_607,
    50_011_727,
    50_024_661,
    50_025_440,
    70_041_568,
    70_049_818,
    71_072_121,
    71_089_955,
    2_111_049_342,
    2_111_067_186,
    2_111_084_478,
    2_111_087_889,
    2_111_097_383,
    2_113_018_484,
    2_113_029_903,
    9_007_529_077,
    809_994_267_117,
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

/// Ends the test with the failure, as short as it can be told.
fn tell(failure: &Failure) -> ! {
    println!("{failure}");
    let seconds = number("MORTAR_SIM_SHRINK").unwrap_or(60);
    match shrink::shrink(failure, Duration::from_secs(seconds)) {
        Some(shrunk) => println!("{shrunk}"),
        None => println!("it was not shrunk in {seconds} s: from a script it does not fail in the same way"),
    }
    panic!("seed {} failed: {}", failure.seed, failure.what);
}

#[test]
fn seeds_that_failed_once_pass() {
    for seed in ONCE_FAILED {
        if let Err(failure) = sim::run(*seed) {
            tell(&failure);
        }
    }
}

#[test]
fn a_script_of_what_was_done_plays_the_same_run() {
    for seed in 0..40 {
        let first = sim::run(seed).unwrap_or_else(|failure| tell(&failure));
        let how = sim::world::Play { script: Some(first.script.clone()), ..Default::default() };
        let again = sim::run_as(seed, &how).unwrap_or_else(|failure| tell(&failure));
        assert_eq!(first.script, again.script, "seed {seed}");
        assert_eq!((first.completed, first.ended_ms), (again.completed, again.ended_ms), "seed {seed}");
    }
}

#[test]
fn no_seed_breaks_a_rule() {
    if let Some(seed) = number("MORTAR_SIM_SEED") {
        match sim::run(seed) {
            Ok(summary) => println!("{} completed, {:?}", summary.completed, summary.seen),
            Err(failure) => tell(&failure),
        }
        return;
    }
    let from = number("MORTAR_SIM_FROM").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64 % 1_000_000_000_000)
    });
    let seeds = number("MORTAR_SIM_SEEDS").unwrap_or(3000);
    println!("{seeds} seeds from {from}");
    let keep_going = number("MORTAR_SIM_KEEP_GOING").is_some();
    let mut seen = std::collections::BTreeMap::new();
    let mut failures = Vec::new();
    let next = AtomicU64::new(from);
    let (sender, ended) = mpsc::channel();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (next, sender) = (&next, sender.clone());
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + seeds || sender.send((seed, sim::run(seed))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (seed, run) in ended {
            match run {
                Ok(summary) => {
                    *seen.entry("completed").or_insert(0) += summary.completed;
                    for (what, times) in summary.seen {
                        *seen.entry(what).or_insert(0) += times;
                    }
                }
                Err(failure) if keep_going => {
                    println!("seed {seed}: {}", failure.what.lines().next().unwrap_or_default());
                    failures.push(seed);
                }
                Err(failure) => {
                    // The other threads end with the seed that they have.
                    next.store(from + seeds, Ordering::Relaxed);
                    tell(&failure);
                }
            }
        }
    });
    println!("{seen:?}");
    assert!(failures.is_empty(), "{} of {seeds} seeds failed", failures.len());
}
