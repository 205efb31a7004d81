//! What was done, and what was promised at which step of the disk.

use std::time::{Duration, Instant};

use mortar_proto::metadata::state::State as Names;
use mortar_proto::{BrickId, Ino};

use crate::content::Content;
use crate::disk::{Disk, Step};

/// How long a brick leaves an intent alone, at least `[W7]`.
const INTENT_IDLE: Duration = Duration::from_millis(2900);

/// What a file was.
pub struct State {
    /// From this step of the disk on the change to it might show.
    pub begun: usize,
    /// The change was acknowledged then. Idle for long enough, the brick flushes the file by itself and clears its intents.
    pub acknowledged: Instant,
    pub content: Content,
}

/// A file's life.
pub struct History {
    pub ino: Ino,
    /// What was done to it, for people.
    pub told: String,
    /// What it was, in order.
    pub states: Vec<State>,
    /// From that step on, the state of that number is promised: a flush was acknowledged.
    pub flushed: Vec<(usize, usize)>,
    /// From that step on it may be gone.
    pub gone: usize,
}

impl History {
    /// It is being changed at a step, or was flushed shortly before.
    pub fn is_lively(&self, step: usize) -> bool {
        let (promised, begun) = self.between(step);
        let is_fresh = |at: usize| at <= step && step < at + 40;
        promised < begun || self.flushed.iter().any(|(at, _)| is_fresh(*at))
    }

    /// The numbers of the state that is promised at a step, and of the last that may show.
    pub fn between(&self, step: usize) -> (usize, usize) {
        let promised = self.flushed.iter().filter(|(at, _)| *at <= step).map(|(_, state)| *state).max();
        let begun = self.states.iter().rposition(|s| s.begun <= step);
        (promised.unwrap_or(0), begun.unwrap_or(0))
    }
}

/// A region that another brick misses: acknowledged from a step on, and until one at which it was struck off.
pub struct Miss {
    pub brick: BrickId,
    pub ino: Ino,
    pub region: u64,
    pub from: usize,
    pub until: usize,
}

/// A clean stop, begun at a step; from another on the record of it must be gone.
pub struct CleanStop {
    pub begun: usize,
    pub over: usize,
}

/// What the server remembered of its bricks at a step: a directory's files.
pub type Seen = Vec<(String, Vec<u8>)>;

/// All of it.
pub struct Trace {
    pub steps: Vec<Step>,
    times: Vec<Instant>,
    pub files: Vec<History>,
    pub misses: Vec<Miss>,
    pub stops: Vec<CleanStop>,
    /// What the server remembered, from a step on.
    pub seen: Vec<(usize, Seen)>,
    /// From here on the brick has been made, and was told of.
    pub made: usize,
    /// Names, as the metadata log has them in the end.
    pub names: Names,
}

impl Trace {
    /// The states of a file that an extent without intent may have at a step: what is promised, and what the brick may have
    /// flushed by itself since, before it cleared the intent.
    pub fn settled<'a>(&self, history: &'a History, step: usize) -> Vec<&'a Content> {
        let (promised, begun) = history.between(step);
        let time = self.times.get(step).or(self.times.last());
        let is_old = |state: &State| time.is_none_or(|now| *now >= state.acknowledged + INTENT_IDLE);
        let states = history.states[promised..=begun].iter().enumerate();
        states.filter(|(i, state)| *i == 0 || is_old(state)).map(|(_, state)| &state.content).collect()
    }
}

/// What is known so far.
pub struct Recorder<'a> {
    pub disk: &'a Disk,
    pub files: Vec<History>,
    pub misses: Vec<Miss>,
    pub stops: Vec<CleanStop>,
    pub seen: Vec<(usize, Seen)>,
    pub made: usize,
    tag: u64,
}

impl<'a> Recorder<'a> {
    pub fn new(disk: &'a Disk) -> Self {
        Self { disk, files: Vec::new(), misses: Vec::new(), stops: Vec::new(), seen: Vec::new(), made: 0, tag: 0 }
    }

    /// A file was made.
    pub fn file(&mut self, ino: Ino) -> usize {
        let states = vec![State { begun: 0, acknowledged: Instant::now(), content: Content::default() }];
        let history = History { ino, told: String::new(), states, flushed: Vec::new(), gone: usize::MAX };
        self.files.push(history);
        self.files.len() - 1
    }

    pub fn next_tag(&mut self) -> u64 {
        self.tag += 1;
        self.tag
    }

    pub fn end(self, names: Names) -> Trace {
        let Self { disk, files, misses, stops, seen, made, .. } = self;
        let (times, steps) = disk.steps();
        Trace { steps, times, files, misses, stops, seen, made, names }
    }
}
