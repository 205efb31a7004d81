//! How long operations had to wait, and during which fault.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::Instant;

use super::faults::Kind;

/// Waits shorter than this, in seconds, are not remembered.
const SHORT: f64 = 0.1;
/// At most so many waits are remembered.
const MOST: usize = 200_000;

/// What kind of operation waited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Read, write or fsync of a file that is held.
    Data,
    /// Something that needs the metadata log: names, or a lease that another mount has.
    Log,
}

/// One fault, in seconds since the run began.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Which.
    pub kind: Kind,
    /// All bricks were in sync and whole when it came.
    pub was_whole: bool,
    /// When it came.
    pub from: f64,
    /// When it was first undone in part, if it has such a moment: when one of several servers was back.
    pub partly: Option<f64>,
    /// When it was undone.
    pub until: f64,
    /// The mount that it concerns; its waits are not counted.
    pub spared: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    from: f64,
    until: f64,
    client: usize,
    what: What,
}

/// The run's clock, its faults, and its waits.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    waits: Mutex<Vec<Wait>>,
    events: Mutex<Vec<Event>>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Default)]
struct Row {
    times: u32,
    whole: u32,
    during: f64,
    after: f64,
    log: f64,
    not_whole: f64,
}

impl Timeline {
    /// Begins now.
    #[must_use]
    pub fn new() -> Self {
        Self { began: Instant::now(), waits: Mutex::default(), events: Mutex::default() }
    }

    /// Seconds since the run began.
    #[must_use]
    pub fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// An operation that began at `from` has ended.
    pub fn waited(&self, from: f64, client: usize, what: What) {
        let until = self.now();
        if until - from < SHORT {
            return;
        }
        let mut waits = self.waits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if waits.len() < MOST {
            waits.push(Wait { from, until, client, what });
        }
    }

    /// A fault that is over.
    pub fn add(&self, event: Event) {
        self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(event);
    }

    /// By kind of fault: the longest wait after it came, and after it was undone, in seconds.
    #[must_use]
    pub fn table(&self) -> String {
        let events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let waits = self.waits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut rows: BTreeMap<String, Row> = BTreeMap::new();
        for (number, event) in events.iter().enumerate() {
            let next = events.get(number + 1).map_or(f64::INFINITY, |next| next.from);
            let longest = |from: f64, to: f64, what: What| {
                let of = waits.iter().filter(|w| w.what == what && Some(w.client) != event.spared);
                of.map(|w| w.until.min(to) - w.from.max(from)).fold(0.0, f64::max)
            };
            let row = rows.entry(event.kind.to_string()).or_default();
            row.times += 1;
            let undone = event.partly.unwrap_or(event.until);
            let (during, after) = (longest(event.from, undone, What::Data), longest(undone, next, What::Data));
            if event.was_whole {
                row.whole += 1;
                row.during = row.during.max(during);
                row.after = row.after.max(after);
                row.log = row.log.max(longest(event.from, next, What::Log));
            } else {
                row.not_whole = row.not_whole.max(longest(event.from, next, What::Data));
            }
        }
        let mut text = format!(
            "longest waits, in seconds          times  on whole  came  undone  names   on bricks under repair\n{}\n",
            "-".repeat(96)
        );
        for (kind, row) in rows {
            let _ = writeln!(
                text,
                "{kind:33} {:6} {:9} {:5.1} {:7.1} {:6.1} {:24.1}",
                row.times, row.whole, row.during, row.after, row.log, row.not_whole
            );
        }
        text
    }
}
