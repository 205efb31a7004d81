//! Real processes on real XFS, in namespaces of their own, with something always going wrong: a run is a seed and a length.
//!
//! | file | owns |
//! | --- | --- |
//! | `process` | programs that are started in a host, and their ends |
//! | `network` | hosts as network namespaces, one switch, and what is cut |
//! | `disk` | an XFS in a file, and how it breaks |
//! | `throttle` | a control group that makes a disk slow |
//! | `cluster` | three servers, two clients, one volume; taking all of it down, also what a killed run left |
//! | `faults` | what goes wrong, drawn from the seed |
//! | `history` | what each block may hold, and what it does hold |
//! | `workers`, `sizes` | the programs on the mounts, which check all that they read |
//! | `pauses` | how long operations had to wait, by fault |
//! | `verdict` | what must be true when all faults are over |

pub mod cluster;
pub mod disk;
pub mod faults;
pub mod history;
pub mod network;
pub mod pauses;
pub mod process;
pub mod sizes;
pub mod throttle;
pub mod verdict;
pub mod workers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::sim::rng::Rng;
use cluster::Cluster;
use faults::{Deck, Kind, Struck};
use pauses::{Event, Timeline};
use workers::Field;

/// How long everything may take to be whole again once all faults are over.
const WHOLE: Duration = Duration::from_secs(120);
/// How long any operation may take in all: longer than any fault lasts, and what it takes to come back from it.
const HUNG: Duration = Duration::from_secs(150);

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Decides which faults come when, and what is written where.
    pub seed: u64,
    /// How long faults go on.
    pub length: Duration,
    /// Seconds between the end of a fault and the next.
    pub gap: (u64, u64),
    /// Only these; all when empty.
    pub only: Vec<Kind>,
}

/// Runs it, and prints what went wrong when and how long operations waited.
///
/// # Errors
/// Whatever was lost, stale, wrong, refused or hung.
pub fn run(plan: &Plan) -> Result<()> {
    println!("soak: seed {}, {} s", plan.seed, plan.length.as_secs());
    cluster::sweep();
    process::heed_signals();
    let timeline = Arc::new(Timeline::new());
    let mut cluster = Cluster::up(Arc::clone(&timeline))?;
    let field = Field::new(&cluster, plan.seed, Arc::clone(&timeline))?;
    let workers = field.start()?;
    let mut result = attack(plan, &mut cluster, &field, &timeline);
    if result.is_ok() {
        result = cluster.wait_until_whole(WHOLE, &mut || field.is_sound()).map(|_| ());
    }
    field.stop();
    let ended = workers.join(HUNG);
    let result = result.and(ended).and_then(|()| field.is_sound()).and_then(|()| verdict::judge(&mut cluster, &field));
    println!("{}", timeline.table());
    println!("{}", field.counts());
    if result.is_err() {
        cluster.keep_logs();
    }
    result
}

/// One fault after the other until the time is over; each is undone.
fn attack(plan: &Plan, cluster: &mut Cluster, field: &Field, timeline: &Timeline) -> Result<()> {
    let mut rng = Rng::new(plan.seed);
    let mut deck = Deck::new(&plan.only);
    let began = Instant::now();
    let mut number = 0;
    while began.elapsed() < plan.length {
        let fault = deck.draw(&mut rng);
        let gap = Duration::from_millis(rng.between(plan.gap.0 * 1000, plan.gap.1 * 1000));
        // Every other fault comes upon bricks that may not be whole again yet.
        let waits = rng.chance(500) || fault.needs_whole;
        sleep(gap, field)?;
        if waits {
            cluster.wait_until_whole(WHOLE, &mut || field.is_sound())?;
        }
        number += 1;
        let was_whole = cluster.is_whole();
        println!("[{:7.1} s] fault {number}: {fault}", timeline.now());
        let from = timeline.now();
        let Struck { partly, spared } = fault.strike(cluster, field)?;
        let until = timeline.now();
        println!("[{until:7.1} s]   undone{}", if was_whole { "" } else { "; it came while bricks were under repair" });
        timeline.add(Event { kind: fault.kind, was_whole, from, partly, until, spared });
        field.is_sound()?;
    }
    Ok(())
}

/// Sleeps, but no longer than all is well.
///
/// # Errors
/// What went wrong meanwhile.
pub fn sleep(time: Duration, field: &Field) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        field.is_sound()?;
        std::thread::sleep(Duration::from_millis(50).min(until.saturating_duration_since(Instant::now())));
    }
    field.is_sound()
}

/// Ends a run that was told to.
///
/// # Errors
/// When it was.
pub fn go_on() -> Result<()> {
    ensure!(!process::told_to_end(), "told to end by a signal");
    Ok(())
}

/// Asks until it is so, while all else is well.
///
/// # Errors
/// When it is not so in time, or something else is wrong.
pub fn until(
    what: &str,
    limit: Duration,
    sound: &mut dyn FnMut() -> Result<()>,
    mut is_so: impl FnMut() -> bool,
) -> Result<Duration> {
    let began = Instant::now();
    while !is_so() {
        sound()?;
        if began.elapsed() > limit {
            bail!("not within {} s: {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(began.elapsed())
}
