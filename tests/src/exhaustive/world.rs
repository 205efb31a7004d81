//! Everything there is in a search, and how it begins.

use mortar_proto::Slot;
use mortar_proto::config::Configuration;
use mortar_proto::coordinator::{Answer, Body, OpId, Request, RequestId};
use mortar_proto::types::SessionId;

use super::brick::Brick;
use super::check::History;
use super::client::Client;
use super::leader::Leader;
use super::part::{Part, Shown};
use super::scope::{Allowed, Before, Kind, Scope};

/// Bricks.
pub const BRICKS: usize = 3;
/// Clients.
pub const CLIENTS: usize = 2;
/// A client's clock begins here and goes on by [`PACE_MS`] with each step, so that every timer has run out by the next one:
/// which is why two worlds whose clocks differ can be the same.
pub const EPOCH_MS: u64 = 1_000_000_000_000_000;
/// See [`EPOCH_MS`].
pub const PACE_MS: u64 = 10_000;
/// What happens at once may be this much; more is a loop.
const AT_ONCE: usize = 3000;

/// Who sent a request: which client, under which session, on which of its connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin {
    /// The client.
    pub client: usize,
    /// Its session then.
    pub session: SessionId,
    /// The connection; 0: one that was given up.
    pub number: u64,
}

/// A connection between a client and a brick. Requests overtake each other, for workers take them.
#[derive(Clone, Debug, Default)]
pub struct Pipe {
    /// Its number; 0: none.
    pub number: u64,
    /// Under way to the brick.
    pub requests: Vec<Request>,
    /// Under way to the client, with the content that was read and what was asked.
    pub answers: Vec<(RequestId, Answer, OpId, Body)>,
}

impl Shown for Pipe {
    fn shown(&self) -> impl core::fmt::Debug + '_ {
        self
    }
}

/// Everything.
#[derive(Clone, Debug)]
pub struct World {
    /// The log and its leader.
    pub leader: Leader,
    /// The bricks.
    pub bricks: [Part<Brick>; BRICKS],
    /// The clients.
    pub clients: [Part<Client>; CLIENTS],
    /// Their connections.
    pub pipes: [[Part<Pipe>; BRICKS]; CLIENTS],
    /// Requests of connections that were given up: where to, and of whom.
    pub strays: Vec<(usize, Origin, Request)>,
    /// What was asked and acknowledged.
    pub history: Part<History>,
    /// What may still happen.
    pub allowed: std::collections::BTreeMap<Kind, Allowed>,
    /// Faults that may still happen.
    pub faults: u8,
    /// What can be struck.
    pub strikes: &'static [usize],
    /// The clients' clock.
    pub now_ms: u64,
    /// The next number for whatever needs one.
    pub next: u64,
    /// The rule that was broken.
    pub failure: Option<String>,
    /// What happened, if somebody wants to know.
    pub trace: Option<Vec<String>>,
}

/// The place of a brick.
#[must_use]
pub fn slot(s: usize) -> Slot {
    Slot(s as u8)
}

impl World {
    /// A new cluster, in which the block was written and flushed once, and then all that the scope wants to have happened.
    #[must_use]
    pub fn new(scope: &Scope, traced: bool) -> Self {
        let leader = Leader::new();
        let mut world = Self {
            bricks: std::array::from_fn(|s| Part::new(Brick::new(&leader, s))),
            clients: std::array::from_fn(|c| Part::new(Client::new(&leader, c))),
            pipes: std::array::from_fn(|_| std::array::from_fn(|_| Part::new(Pipe::default()))),
            strays: Vec::new(),
            history: Part::new(History::new()),
            allowed: at_rest(),
            faults: scope.faults,
            strikes: scope.bricks,
            now_ms: EPOCH_MS,
            next: 100,
            failure: None,
            trace: traced.then(Vec::new),
            leader,
        };
        world.write_first();
        for before in scope.before {
            world.before(*before);
        }
        world.allowed.clone_from(&scope.allowed);
        world.at_once();
        world
    }

    fn write_first(&mut self) {
        for s in 0..BRICKS {
            self.start_process(s);
        }
        self.at_once();
        self.write(0);
        self.at_once();
        self.flush(0);
        self.at_once();
        for s in 0..BRICKS {
            self.begin_tidying(s);
            self.end_tidying(s);
        }
    }

    fn before(&mut self, before: Before) {
        match before {
            Before::Out(s) => {
                self.stop_process(s);
                // A write that it does not get: so it misses something, and is complained of.
                self.write(0);
            }
            Before::Back(s) => {
                for kind in [Kind::Repair, Kind::RepairNothing, Kind::Plan] {
                    self.allowed.remove(&kind);
                }
                self.start_process(s);
            }
            Before::Write => self.write(0),
            Before::Released => self.tell(0, mortar_proto::coordinator::Event::Forget, None),
        }
        self.at_once();
        for _ in 0..3 {
            self.silence();
            self.at_once();
        }
    }

    /// The configuration in force.
    #[must_use]
    pub fn configuration(&self) -> Configuration {
        self.leader.configuration()
    }
    /// A number that was never used.
    pub fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
    /// For the trace.
    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("      {}", what()));
        }
    }
    /// A rule is broken.
    pub fn fail(&mut self, why: impl FnOnce() -> String) {
        if self.failure.is_none() {
            self.failure = Some(why());
        }
    }

    /// Lets everything happen that happens at once.
    pub fn at_once(&mut self) {
        for _ in 0..AT_ONCE {
            if self.failure.is_some() {
                return;
            }
            let Some(step) = self.next_at_once() else { return };
            self.take(step);
        }
        self.fail(|| "what happens at once never ends".to_owned());
    }

    /// Everything starts again, nothing fails any more, and all that can happen happens.
    pub fn rest(&mut self) {
        self.note(|| "everything comes to rest".to_owned());
        self.strays.clear();
        self.allowed = at_rest();
        for s in 0..BRICKS {
            if self.bricks[s].is_leaving() {
                self.stop_process(s);
            }
            if !self.bricks[s].is_up() {
                self.start_process(s);
            }
        }
        for round in 0..12 {
            self.at_once();
            if self.failure.is_some() || self.is_at_rest() {
                break;
            }
            self.end_sessions_of_the_dead();
            self.adopt_what_needs_it();
            self.at_once();
            for c in 0..CLIENTS {
                self.tick(c);
                self.at_once();
            }
            if round % 2 == 1 {
                self.silence();
            }
        }
        self.check_rest();
    }
}

/// When everything comes to rest, all that can happen does.
fn at_rest() -> std::collections::BTreeMap<Kind, Allowed> {
    use Kind::{
        Answer, AnswerMutation, AnswerPull, Apply, Beat, Deliver, DeliverMutation, DeliverPull, Grant, Learn, Plan,
        Poll, Recall, Repair, RepairNothing, Repaired, Run, RunMutation, RunPull, TakeOver, Told,
    };
    let kinds = [
        DeliverMutation,
        RunMutation,
        AnswerMutation,
        DeliverPull,
        RunPull,
        AnswerPull,
        Deliver,
        Run,
        Answer,
        Apply,
        Learn,
        Beat,
        Poll,
        Recall,
        Grant,
        Told,
        Repair,
        RepairNothing,
        Plan,
        TakeOver,
        Repaired,
    ];
    kinds.into_iter().map(|kind| (kind, Allowed::AtOnce)).collect()
}
