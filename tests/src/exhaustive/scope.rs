//! What may happen in a search, and how often; and the searches there are.

use std::collections::BTreeMap;

use Kind::{
    Answer, AnswerMutation, AnswerPull, Apply, Beat, Break, Crash, Deliver, DeliverMutation, DeliverPull, DeliverStray,
    Elect, Fail, Flush, Grant, Kill, Lapse, Learn, Plan, Poll, Power, Read, Recall, Repair, RepairNothing, Repaired,
    Run, RunMutation, RunPull, Silence, Start, Stop, Stopped, TakeOver, Tick, Tidied, Tidy, Told, Write,
};

/// A kind of thing that can happen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A client's application writes the block.
    Write,
    /// It reads it.
    Read,
    /// It calls fsync.
    Flush,
    /// A mutation reaches a brick, which admits it.
    DeliverMutation,
    /// A brick writes what it has admitted.
    RunMutation,
    /// Its answer reaches the client.
    AnswerMutation,
    /// A pull or copy, likewise.
    DeliverPull,
    /// See above.
    RunPull,
    /// See above.
    AnswerPull,
    /// Any other request: `Fence`, `Flush`, `Settle`, `Note`, lists, reads.
    Deliver,
    /// See above.
    Run,
    /// See above.
    Answer,
    /// A request of a connection that its client has given up reaches the brick after all.
    DeliverStray,
    /// A connection breaks, and is made anew.
    Break,
    /// A brick's process is killed.
    Kill,
    /// A brick's server loses power.
    Power,
    /// A brick starts.
    Start,
    /// A brick declares itself failed.
    Fail,
    /// A brick is told to stop cleanly.
    Stop,
    /// It is out and drained: it flushes, records that and ends.
    Stopped,
    /// A brick's server applies one entry of the log.
    Apply,
    /// A client learns the configuration in force.
    Learn,
    /// A brick's heartbeat is heard and answered.
    Beat,
    /// Longer than every lease passes.
    Silence,
    /// The leader proposes what it thinks due.
    Poll,
    /// Another leader is elected, who has heard nobody.
    Elect,
    /// The leader asks the holder for its lease because another session wants it.
    Recall,
    /// The leader grants the lease.
    Grant,
    /// A client dies.
    Crash,
    /// The leader ends a session that may still live.
    Lapse,
    /// The client hears of it and opens another one.
    Told,
    /// A client takes the lease to repair, as the janitor does.
    Adopt,
    /// One region that has data is repaired.
    Repair,
    /// One that has none.
    RepairNothing,
    /// A `Syncing` brick makes its plan.
    Plan,
    /// It takes over the lists of others.
    TakeOver,
    /// It has flushed, and says that it is repaired.
    Repaired,
    /// A brick begins a flush after which intents may go.
    Tidy,
    /// It has flushed, and they go.
    Tidied,
    /// Time passes for a client.
    Tick,
}

/// How often something may happen.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Allowed {
    /// At once and by itself, whenever it can: nothing else comes in between.
    AtOnce,
    /// At any time.
    Any,
    /// At any time, this many times in all.
    Times(u8),
}

/// A search.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Its name.
    pub name: &'static str,
    /// Steps at most; what happens at once is not counted. `None`: until everything was seen.
    pub depth: Option<usize>,
    /// What may happen. What is not named may not.
    pub allowed: BTreeMap<Kind, Allowed>,
    /// Faults in all.
    pub faults: u8,
    /// Bricks that can be struck: killed, cut off, lagging.
    pub bricks: &'static [usize],
    /// What happened before it begins, each with everything at rest afterwards.
    pub before: &'static [Before],
    /// From each state that was not seen before everything comes to rest, and must be right then.
    pub rests: bool,
}

/// How a search begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// This brick was killed, and is out.
    Out(usize),
    /// It came back, and is `Syncing`, and nothing is repaired.
    Back(usize),
    /// Client 0 writes.
    Write,
    /// Nobody holds the lease.
    Released,
}

/// What follows from what was done before, so that nobody would call it an event.
const FOLLOWS: &[Kind] = &[Deliver, Run, Answer, Apply, Learn, Beat, RepairNothing, Told, Recall, Grant];
/// The messages of mutations and of what is pulled.
const MUTATIONS: &[Kind] = &[DeliverMutation, RunMutation, AnswerMutation];
const PULLS: &[Kind] = &[DeliverPull, RunPull, AnswerPull];
/// What the leader proposes, after however long.
const LEADS: &[Kind] = &[Silence, Poll];
/// What gives a brick back what it misses.
const REPAIRS: &[Kind] = &[Repair, Plan, TakeOver, Repaired];
/// Everything that strikes, and what ends it.
const STRIKES: &[Kind] = &[Kill, Power, Start, Fail, Stop, Stopped, Crash, Lapse, Break, DeliverStray];

impl Kind {
    /// It counts as a fault.
    #[must_use]
    pub fn is_fault(self) -> bool {
        matches!(self, Kill | Power | Fail | Stop | Crash | Lapse | Break | Elect)
    }
}

impl Scope {
    fn new(name: &'static str) -> Self {
        let allowed = BTreeMap::new();
        Self { name, depth: None, allowed, faults: 0, bricks: &[0, 1, 2], before: &[], rests: true }.at_once(FOLLOWS)
    }
    fn allow(mut self, kinds: &[Kind], allowed: Allowed) -> Self {
        self.allowed.extend(kinds.iter().map(|k| (*k, allowed)));
        self
    }
    fn at_once(self, kinds: &[Kind]) -> Self {
        self.allow(kinds, Allowed::AtOnce)
    }
    fn any(self, kinds: &[Kind]) -> Self {
        self.allow(kinds, Allowed::Any)
    }
    fn times(self, kind: Kind, times: u8) -> Self {
        self.allow(&[kind], Allowed::Times(times))
    }
    fn faults(self, faults: u8) -> Self {
        Self { faults, ..self.any(STRIKES) }
    }
    /// One of these may happen, once.
    fn one_of(self, faults: &[Kind]) -> Self {
        Self { faults: 1, ..self.any(faults) }
    }
    fn faults_are(self, faults: u8) -> Self {
        Self { faults, ..self }
    }
    fn depth(self, depth: usize) -> Self {
        Self { depth: Some(depth), ..self }
    }
    fn before(self, before: &'static [Before]) -> Self {
        Self { before, ..self }
    }
    fn bricks(self, bricks: &'static [usize]) -> Self {
        Self { bricks, ..self }
    }
}

/// Every search, each with what may happen in it.
#[must_use]
pub fn all() -> Vec<Scope> {
    const OUT: &[Before] = &[Before::Out(2)];
    const BACK: &[Before] = &[Before::Out(2), Before::Back(2)];
    let base = |name| Scope::new(name).at_once(MUTATIONS).at_once(PULLS).at_once(REPAIRS).any(LEADS).any(&[Start]);
    // Whole operations one after the other: what has begun runs to its end.
    let operations = |name| base(name).any(&[Write, Read, Flush, Tidy, Tidied]).faults(u8::MAX).depth(4);
    // Message by message.
    let messages = |name| base(name).any(MUTATIONS);
    let mending = |name| messages(name).before(BACK).any(PULLS).any(REPAIRS);
    vec![
        messages("a write and a connection that breaks").times(Write, 1).one_of(&[Break]).bricks(&[0]),
        messages("a write while a brick is out, and a client that dies or lapses")
            .before(OUT)
            .times(Write, 2)
            .one_of(&[Crash, Lapse])
            .bricks(&[]),
        messages("a write while a brick is out, and another killed")
            .before(OUT)
            .times(Write, 1)
            .one_of(&[Kill])
            .bricks(&[0]),
        mending("a write while a brick is repaired, and a client that dies or lapses")
            .times(Write, 1)
            .one_of(&[Crash, Lapse])
            .bricks(&[]),
        mending("a write while a brick is repaired, which is struck")
            .times(Write, 1)
            .one_of(&[Kill, Power])
            .bricks(&[2])
            .depth(7),
        messages("a write and a brick that is struck").times(Write, 1).one_of(&[Kill, Power]).bricks(&[0]).depth(7),
        base("a brick lags").any(&[Apply, Beat]).times(Write, 1).times(Read, 1).one_of(&[Kill]).bricks(&[0]).depth(6),
        base("three faults").times(Write, 1).times(Flush, 1).one_of(&[Kill, Power]).faults_are(3).depth(5),
        Scope::new("a brick that is to stop lags")
            .at_once(MUTATIONS)
            .at_once(PULLS)
            .at_once(REPAIRS)
            .before(BACK)
            .any(&[Apply, Beat, Poll])
            .times(Tick, 1)
            .times(Write, 1)
            .one_of(&[Stop])
            .bricks(&[0])
            .depth(10),
        messages("two writes and a client that dies or lapses").times(Write, 2).one_of(&[Crash, Lapse]).bricks(&[]),
        operations("operations"),
        operations("operations while a brick is out").before(OUT),
        operations("operations while a brick is repaired").before(BACK).any(REPAIRS),
    ]
}
