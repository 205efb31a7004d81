//! The world: a virtual clock, one thing at a time, and a network that delays, reorders, cuts and resets.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mortar_proto::coordinator::{Answer, Body, Event, OpId, Request, RequestId, Timeouts};
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::types::{BLOCK_BYTES, EXTENT_BYTES, Ino, LogIndex, REGION_BYTES, SessionId};
use mortar_proto::{Configuration, Incarnation, Slot};

use super::acts::{Act, Script};
use super::administrator::Administrator;
use super::brick::{Brick, Peer, Step};
use super::client::Client;
use super::copies::Copies;
use super::disk::{BLOCKS, Content, Geometry};
use super::faults::Faults;
use super::history::History;
use super::leader::{FromLeader, ToLeader};
use super::quorum::Quorum;
use super::rng::Rng;

/// Clients that run applications; the janitor comes after them.
pub const CLIENTS: usize = 2;
/// The janitor's place among the clients.
pub const JANITOR: usize = CLIENTS;

/// Times of a run, in milliseconds.
pub const TIMEOUTS: Timeouts = Timeouts { io_timeout_ms: 1500, hedge_ms: 200, no_quorum_ms: None };
/// Who sends or receives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Node {
    /// A mount, or the janitor.
    Client(usize),
    /// A brick.
    Brick(usize),
    /// A voter of the metadata log.
    Voter(usize),
}

/// A connection of a client to a brick.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// The client's place.
    pub client: usize,
    /// The brick's place.
    pub slot: usize,
    /// Its own number.
    pub number: u64,
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// On this connection.
    pub connection: Connection,
    /// By this session.
    pub session: SessionId,
    /// About this file.
    pub ino: Ino,
    /// What.
    pub request: Request,
}

/// What can happen next.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A request reaches a brick.
    Request(Wire),
    /// A request reaches a brick again.
    Repeated(Wire),
    /// An answer reaches a client.
    Answer {
        /// On this connection.
        connection: Connection,
        /// About this file.
        ino: Ino,
        /// To this request.
        id: RequestId,
        /// What.
        answer: Answer,
        /// The bytes.
        content: Option<Content>,
    },
    /// Something that a brick's process was doing has come further.
    Step(usize, u64, Step),
    /// A brick's message reaches another one.
    Peer {
        /// The sender.
        from: usize,
        /// The receiver.
        to: usize,
        /// The sender's start.
        generation: u64,
        /// What.
        message: Peer,
    },
    /// A brick looks after itself.
    BrickTick(usize, u64),
    /// A brick applies what it has of the log.
    Apply(usize, u64),
    /// A brick's process starts.
    Start(usize),
    /// A client looks after itself.
    ClientTick(usize, u64),
    /// An application asks for something.
    Application(usize, u64),
    /// A client's process starts.
    ClientStart(usize),
    /// A client notices that a connection is gone.
    LinkBroken(Connection),
    /// A client tries to connect.
    Connect(usize, u64, usize),
    /// A repair may go on.
    Permit(usize, u64, Ino),
    /// A message reaches a voter.
    ToLeader(usize, ToLeader),
    /// A message of a leader reaches its receiver.
    FromLeader(FromLeader),
    /// A proposal should have reached a quorum.
    Replicated(u64),
    /// A quorum should have confirmed that a voter leads.
    Confirmed {
        /// Which.
        voter: usize,
        /// Its start.
        generation: u64,
        /// What was committed when it was asked for, if it was confirmed then.
        commit: Option<LogIndex>,
        /// What is answered after it.
        message: ToLeader,
    },
    /// The voters look at their clocks.
    QuorumTick,
    /// A voter's process starts.
    VoterStart(usize),
    /// Chance decides what goes wrong.
    Fault,
    /// A disk changes a block by itself.
    Rot,
    /// A disk turns out to have lied.
    Lie,
    /// The administrator decides on something.
    Decide,
    /// A copy of a disk is made, or comes back.
    Copy,
    /// The administrator goes on with it.
    Administrator,
    /// Something is done from outside.
    Act(Act),
    /// A cut has lasted long enough for the connections to break.
    CutNoticed(Node, Node),
}

/// A line of a run's trace.
#[derive(Clone, Debug)]
pub struct Line {
    /// When, and what.
    pub text: String,
    /// It tells the story; the others are details.
    pub main: bool,
}

/// How a seed is played.
#[derive(Clone, Debug, Default)]
pub struct Play {
    /// Its events are wanted.
    pub traced: bool,
    /// These acts instead of random ones.
    pub script: Option<Script>,
    /// Other dice than the seed's own: 0 are those.
    pub dice: u64,
}

/// Everything.
pub struct World {
    /// The clock.
    pub now: u64,
    /// The dice: how long everything takes, and how it breaks.
    pub rng: Rng,
    /// What decides on acts; apart from the dice, so that a script of the same acts meets the same dice.
    pub chaos: Rng,
    /// Who exchanges disks.
    pub administrator: Administrator,
    /// Copies of disks.
    pub copies: Copies,
    /// The dice of what disks change.
    pub rot: Rng,
    /// The dice of holes, and how many of a thousand writes make some.
    pub holes: Rng,
    /// See `holes`.
    pub holes_permille: u64,
    /// The dice of disks that lie.
    pub lies: Rng,
    /// The dice of what a power cut tears.
    pub tears: Rng,
    /// Blocks that some disk has changed by itself, at some time.
    pub struck: BTreeSet<(Ino, usize)>,
    /// The acts come from a script.
    pub scripted: bool,
    /// What was done so far.
    pub done: Script,
    /// By time; of one time acts come first, the rest in the order in which it was asked for.
    queue: BTreeMap<(u64, bool, u64), Happening>,
    order: u64,
    /// The bricks.
    pub bricks: Vec<Brick>,
    /// The clients; the last one is the janitor.
    pub clients: Vec<Client>,
    /// The metadata log: who votes, who leads, what is committed.
    pub quorum: Quorum,
    /// What must be true.
    pub history: History,
    /// Where the blocks lie.
    pub geometry: Geometry,
    /// The files.
    pub files: Vec<Ino>,
    /// What goes wrong.
    pub faults: Faults,
    cuts: Vec<(Node, Node, u64)>,
    /// Connections whose client has died, and when the last byte of theirs arrives.
    pub dead: BTreeMap<u64, u64>,
    /// The longest usual delay of a message.
    pub delay_ms: u64,
    /// The longest usual time of a disk.
    pub disk_ms: u64,
    /// Numbers for connections, operations, starts.
    pub counter: u64,
    /// What went wrong with the machines.
    pub failure: Option<String>,
    /// The last events, if they are wanted.
    pub trace: Option<VecDeque<Line>>,
    /// The network is bad until then.
    pub flaky_until: u64,
    /// A node whose network is slow, and until when.
    pub slow: Option<(Node, u64)>,
    /// Blocks that were corrupt on every `InSync` brick when another one took them over.
    pub lost: BTreeSet<(Ino, usize)>,
    /// Some mutation was refused, for want of space say.
    pub refused: bool,
    /// Since when bricks are out.
    pub out_since: [u64; 3],
    /// When the leader heard of bricks last, by incarnation.
    pub heard: [BTreeMap<Incarnation, u64>; 3],
    /// Applications ask for nothing more.
    pub winding_down: bool,
    /// How many operations were submitted and completed.
    pub submitted: u64,
    /// See `submitted`.
    pub completed: u64,
    /// Highest epoch in which an `InSync` brick accepted a mutation, by file.
    pub accepted: BTreeMap<Ino, u64>,
    /// Kinds of things that happened, to see that a run is worth something.
    pub seen: BTreeMap<&'static str, u64>,
}

impl World {
    /// The world of a seed.
    #[must_use]
    pub fn new(seed: u64, play: &Play) -> Self {
        let mut rng = Rng::new(seed);
        let boundary = if rng.chance(300) { EXTENT_BYTES } else { REGION_BYTES };
        let geometry = Geometry { base: boundary - (BLOCKS as u64 / 2) * BLOCK_BYTES };
        let (quorum, files) = Quorum::new([1, 2, 2][rng.index(3)], &mut rng);
        let members = quorum.configuration().members;
        let faults = Faults::draw(&mut rng);
        let delay_ms = rng.between(2, 60);
        let disk_ms = rng.between(1, 40);
        let mut holes = Rng::new(seed.rotate_left(37) ^ 0x001e5);
        let mut world = Self {
            now: 10_000,
            queue: BTreeMap::new(),
            order: 0,
            bricks: (0..3).map(|i| Brick::new(i, geometry, members[i].brick)).collect(),
            clients: (0..=CLIENTS).map(Client::new).collect(),
            quorum,
            history: History::new(geometry),
            geometry,
            files,
            faults,
            cuts: Vec::new(),
            dead: BTreeMap::new(),
            delay_ms,
            disk_ms,
            counter: 1000,
            failure: None,
            trace: play.traced.then(VecDeque::new),
            lost: BTreeSet::new(),
            refused: false,
            out_since: [0; 3],
            heard: Default::default(),
            winding_down: false,
            flaky_until: 0,
            slow: None,
            submitted: 0,
            completed: 0,
            accepted: BTreeMap::new(),
            seen: BTreeMap::new(),
            rng,
            chaos: Rng::new(!seed),
            administrator: Administrator::new(seed),
            copies: Copies::new(seed),
            rot: super::rot::dice(seed),
            lies: super::rot::lies(seed),
            holes_permille: [0, 0, 60, 300][holes.index(4)],
            holes,
            tears: Rng::new(seed.rotate_left(11) ^ 0x07ea_25ed),
            struck: BTreeSet::new(),
            scripted: play.script.is_some(),
            done: Script::new(),
        };
        for slot in 0..3 {
            // Together with the read lease that stays within the leader's margin.
            let rate = world.rng.between(960, 1040);
            world.bricks[slot].clock_permille = rate;
            if world.quorum.together {
                world.quorum.voters[slot].clock_permille = rate;
            }
            world.after(0, Happening::Start(slot));
        }
        for client in 0..=CLIENTS {
            world.after(1, Happening::ClientStart(client));
        }
        world.after(5, Happening::QuorumTick);
        if play.dice != 0 {
            world.rng = Rng::new(seed ^ play.dice << 48);
        }
        match &play.script {
            Some(script) => {
                for (at, act) in script {
                    world.after_chance(at.saturating_sub(world.now), Happening::Act(*act));
                }
            }
            None => {
                world.after_chance(500, Happening::Fault);
                world.begin_to_rot();
                world.begin_to_administer();
                world.begin_to_copy();
            }
        }
        world
    }

    /// A number that nothing else has.
    pub fn number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }
    /// When a session ends that is not heard.
    #[must_use]
    pub fn session_ttl_ms(&self) -> u64 {
        self.quorum.session_ttl_ms
    }
    /// Counts something.
    pub fn count(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }
    /// Writes a detail into the trace.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        self.write_down(line, false);
    }
    /// Writes something that matters into the trace.
    pub fn event(&mut self, line: impl FnOnce() -> String) {
        self.write_down(line, true);
    }
    fn write_down(&mut self, line: impl FnOnce() -> String, main: bool) {
        if let Some(trace) = &mut self.trace {
            if trace.len() >= 4000 {
                trace.pop_front();
            }
            trace.push_back(Line { text: format!("{:>6} {}", self.now, line()), main });
        }
    }
    /// A rule is broken.
    pub fn fail(&mut self, what: impl FnOnce() -> String) {
        if self.failure.is_none() {
            let what = what();
            self.event(|| format!("FAILED {what}"));
            self.failure = Some(what);
        }
    }
    /// Something happens in `delay_ms`.
    pub fn after(&mut self, delay_ms: u64, happening: Happening) {
        self.order += 1;
        self.queue.insert((self.now + delay_ms, true, self.order), happening);
    }
    /// Something that comes from outside happens in `delay_ms`, and not in this same millisecond.
    pub fn after_chance(&mut self, delay_ms: u64, happening: Happening) {
        self.order += 1;
        self.queue.insert((self.now + delay_ms.max(1), false, self.order), happening);
    }
    /// Until when messages from one to another are held up.
    #[must_use]
    pub fn cut_until(&self, from: Node, to: Node) -> Option<u64> {
        let (from, to) = (self.place(from), self.place(to));
        self.cuts.iter().filter(|(a, b, until)| *a == from && *b == to && *until > self.now).map(|c| c.2).max()
    }
    /// Messages from one to another are held up.
    pub fn cut(&mut self, from: Node, to: Node, for_ms: u64) {
        let now = self.now;
        let (from, to) = (self.place(from), self.place(to));
        if from == to {
            return;
        }
        self.cuts.retain(|c| c.2 > now);
        self.cuts.push((from, to, now + for_ms));
        let noticed = self.rng.between(300, 3000);
        self.after(noticed, Happening::CutNoticed(from, to));
    }
    /// Where a node is: a brick and a voter may share a server.
    fn place(&self, node: Node) -> Node {
        match node {
            Node::Voter(v) if self.quorum.together => Node::Brick(v),
            node => node,
        }
    }
    /// A process does nothing for so long.
    pub fn pause(&mut self, node: Node, for_ms: u64) {
        let until = self.now + for_ms;
        let (Node::Brick(i) | Node::Voter(i)) = node else { return };
        if self.quorum.together || matches!(node, Node::Brick(_)) {
            self.bricks[i].paused_until = until;
        }
        if self.quorum.together || matches!(node, Node::Voter(_)) {
            self.quorum.voters[i].paused_until = until;
        }
    }
    /// All cuts end.
    pub fn mend(&mut self) {
        self.cuts.clear();
    }
    /// A message sets out. A stream's messages wait behind a cut; others may get lost in it.
    pub fn send(&mut self, from: Node, to: Node, stream: bool, happening: Happening) {
        if self.place(from) == self.place(to) {
            return self.after(1, happening);
        }
        let mut delay = self.rng.delay(self.delay_ms, self.delay_ms * 20);
        let ends = [self.place(from), self.place(to)];
        if self.slow.is_some_and(|(node, until)| until > self.now && ends.contains(&self.place(node))) {
            delay = delay * 5 + self.rng.below(300);
        }
        if self.flaky_until > self.now && self.is_spoiled(stream, delay, &happening) {
            return;
        }
        if let Some(until) = self.cut_until(from, to) {
            if !stream && self.rng.chance(600) {
                return;
            }
            delay += until - self.now;
        }
        self.after(delay, happening);
    }

    /// A bad network does something to a message. True when it does not arrive.
    fn is_spoiled(&mut self, stream: bool, delay: u64, happening: &Happening) -> bool {
        let connection = match happening {
            Happening::Request(wire) => Some(wire.connection),
            Happening::Answer { connection, .. } => Some(*connection),
            _ => None,
        };
        match connection {
            // In the middle of a frame: what is not whole is not taken.
            Some(connection) if self.rng.chance(20) => {
                self.count("reset in a frame");
                self.after(delay, Happening::LinkBroken(connection));
                true
            }
            None if !stream && self.rng.chance(200) => {
                self.count("lost");
                true
            }
            None if !stream && self.rng.chance(150) => {
                self.count("came twice");
                let later = delay + self.rng.delay(self.delay_ms * 5, 2000);
                self.after(later, happening.clone());
                false
            }
            _ => false,
        }
    }

    /// Runs until the end of the phase, or until a rule is broken.
    pub fn run_until(&mut self, end: u64) {
        while self.failure.is_none() {
            if self.queue.first_key_value().is_none_or(|((at, _, _), _)| *at > end) {
                break;
            }
            let Some(((at, _, _), happening)) = self.queue.pop_first() else { break };
            self.now = self.now.max(at);
            self.bricks.iter_mut().for_each(|b| b.disk.now_ms = self.now);
            self.happen(happening);
            self.check_step();
        }
        self.now = self.now.max(end);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Repeated(wire) => {
                // What was refused and sent again is another matter than what was done: only on a new connection can it be.
                let c = wire.connection;
                if !self.refused || self.bricks[c.slot].accepted[c.client] != c.number {
                    self.happen(Happening::Request(wire));
                }
            }
            Happening::Request(wire) => {
                if self.deferred(wire.connection.slot, || Happening::Request(wire)) {
                    return;
                }
                let c = wire.connection;
                if self.dead.get(&c.number).is_some_and(|until| *until <= self.now) {
                    return;
                }
                let served = self.bricks[c.slot].accepted[c.client];
                let current = served == c.number || served != 0 && left_out(Rule::F3Connection);
                if self.bricks[c.slot].is_up() && current {
                    self.note(|| {
                        format!(
                            "b{} <- c{} {:?} {:?} n={} e={} s={} stable={} {}",
                            c.slot,
                            c.client,
                            wire.ino,
                            wire.request.body,
                            wire.request.n,
                            wire.request.epoch,
                            wire.request.seq,
                            wire.request.stable,
                            if wire.request.settled { "settled" } else { "" }
                        )
                    });
                    self.request(wire);
                }
            }
            Happening::Answer { connection, ino, id, answer, content } => {
                self.answer_arrives(connection, ino, id, answer, content);
            }
            Happening::Step(slot, generation, step) => {
                if self.deferred(slot, || Happening::Step(slot, generation, step.clone())) {
                    return;
                }
                if self.bricks[slot].runs(generation) {
                    self.step(slot, step);
                }
            }
            Happening::Peer { from, to, generation, message } => {
                if self.deferred(to, || Happening::Peer { from, to, generation, message: message.clone() }) {
                    return;
                }
                if self.bricks[to].is_up() {
                    self.peer(from, to, message);
                }
            }
            Happening::BrickTick(slot, generation) => {
                if self.deferred(slot, || Happening::BrickTick(slot, generation)) {
                    return;
                }
                if self.bricks[slot].runs(generation) {
                    self.brick_tick(slot);
                    self.after(50, Happening::BrickTick(slot, generation));
                }
            }
            Happening::Apply(slot, generation) => {
                if self.deferred(slot, || Happening::Apply(slot, generation)) {
                    return;
                }
                if self.bricks[slot].runs(generation) {
                    self.apply_log(slot);
                }
            }
            Happening::Start(slot) => self.start_brick(slot),
            Happening::ClientTick(client, generation) => {
                if self.clients[client].runs(generation) {
                    self.client_tick(client);
                    self.after(25, Happening::ClientTick(client, generation));
                }
            }
            Happening::Application(client, generation) => {
                if self.clients[client].runs(generation) {
                    self.application(client);
                }
            }
            Happening::ClientStart(client) => self.start_client(client),
            Happening::LinkBroken(connection) => self.link_broken(connection),
            Happening::Connect(client, generation, slot) => {
                if self.clients[client].runs(generation) {
                    self.connect(client, slot);
                }
            }
            Happening::Permit(client, generation, ino) => {
                if self.clients[client].runs(generation) {
                    *self.clients[client].permits.entry(ino).or_default() += 1;
                    self.tell(client, ino, Event::Permit, None);
                }
            }
            Happening::ToLeader(v, message) => {
                if !self.is_held_up(v, || Happening::ToLeader(v, message.clone())) {
                    self.leader_gets(v, message);
                }
            }
            Happening::FromLeader(message) => self.leader_says(message),
            Happening::Replicated(number) => self.replicated(number),
            Happening::Confirmed { voter, generation, commit, message } => {
                let again = || Happening::Confirmed { voter, generation, commit, message: message.clone() };
                if self.quorum.voters[voter].generation == generation && !self.is_held_up(voter, again) {
                    self.confirmed(voter, commit, message);
                }
            }
            Happening::QuorumTick => {
                self.quorum_tick();
                self.after(40, Happening::QuorumTick);
            }
            Happening::VoterStart(v) => {
                if !self.quorum.voters[v].up {
                    self.start_voter(v);
                }
            }
            Happening::Fault => self.fault(),
            Happening::Rot => self.rots(),
            Happening::Lie => self.lies(),
            Happening::Decide => self.decide(),
            Happening::Copy => self.copies(),
            Happening::Administrator => self.administer(),
            Happening::Act(act) => self.act(act),
            Happening::CutNoticed(a, b) => {
                if self.cut_until(a, b).is_some()
                    && let (Node::Client(c), Node::Brick(s)) | (Node::Brick(s), Node::Client(c)) = (a, b)
                {
                    self.break_link(c, s);
                }
            }
        }
    }

    /// A paused process takes nothing in; what reaches it waits.
    fn deferred(&mut self, slot: usize, happening: impl FnOnce() -> Happening) -> bool {
        let until = self.bricks[slot].paused_until;
        if until <= self.now {
            return false;
        }
        let wait = until - self.now + self.rng.below(10);
        self.after(wait, happening());
        true
    }

    /// The same of a voter.
    fn is_held_up(&mut self, v: usize, happening: impl FnOnce() -> Happening) -> bool {
        let until = self.quorum.voters[v].paused_until;
        if until <= self.now {
            return false;
        }
        let wait = until - self.now + self.rng.below(20);
        self.after(wait, happening());
        true
    }

    /// The connection of a client to a brick breaks, if there is one.
    pub fn break_link(&mut self, client: usize, slot: usize) {
        let number = self.clients[client].links[slot];
        if number != 0 {
            self.link_broken(Connection { client, slot, number });
        }
    }

    /// The configuration that is committed.
    #[must_use]
    pub fn configuration(&self) -> Configuration {
        self.quorum.configuration()
    }
}

/// A request's operation, if it is a mutation.
#[must_use]
pub fn mutation_of(request: &Request) -> Option<OpId> {
    match request.body {
        Body::Mutate(op, _) => Some(op),
        _ => None,
    }
}

/// A slot by its place.
#[must_use]
pub fn slot(index: usize) -> Slot {
    Slot::ALL[index]
}
