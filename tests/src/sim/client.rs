//! A mount's process, or the janitor's: real coordinators, one per file, around a virtual network and applications that ask
//! for things at random.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mortar_proto::config::{Configuration, Slots};
use mortar_proto::coordinator::{
    Answer, Body, Completion, Coordinator, Effect, Event, Mutation, OpId, Operation, Request, RequestId,
};
use mortar_proto::metadata::NameOp;
use mortar_proto::types::{BLOCK_BYTES, ByteRange, ConfigNo, Epoch, Ino, Seq, SessionId};

use super::acts::{Act, Ask};
use super::disk::{BLOCKS, Content};
use super::history::{Kind, Needs, SizeNeed};
use super::leader::ToLeader;
use super::quorum::{VOTERS, configuration_of, lease_of};
use super::session::{Control, Link};
use super::world::{Connection, Happening, JANITOR, Node, TIMEOUTS, Wire, World, mutation_of, slot};

/// Operations that an application has under way at most.
const AT_ONCE: usize = 6;

/// `FALLOC_FL_ZERO_RANGE`; `FALLOC_FL_PUNCH_HOLE` and `FALLOC_FL_KEEP_SIZE`
pub(super) const ZERO: u32 = 0x10;
const PUNCH_AND_KEEP: u32 = 3;

/// The janitor takes a file from its holder when nothing of it was repaired for this long.
const STUCK_MS: u64 = 20_000;

/// An operation that an application waits for.
#[derive(Clone, Debug)]
struct Pending {
    ino: Ino,
    what: What,
    since_ms: u64,
}

#[derive(Clone, Debug)]
enum What {
    Mutation,
    Read { first: usize, count: usize, needs: Needs },
    Flush(Vec<OpId>),
    Stat(SizeNeed),
    Name,
}

/// A client.
pub struct Client {
    index: usize,
    /// It runs.
    pub up: bool,
    /// Counts its starts.
    pub generation: u64,
    /// Its session, as far as it knows.
    pub session: Option<SessionId>,
    pub(super) link: Link,
    /// The janitor's server.
    pub(super) home: usize,
    /// The newest configuration that it knows.
    pub configuration: Option<Configuration>,
    coordinators: BTreeMap<Ino, Coordinator>,
    /// Files whose acknowledged writes are gone, until the application closes them `[E7]`.
    lost: BTreeSet<Ino>,
    /// The number of the connection to each brick; 0: none.
    pub links: [u64; 3],
    pending: BTreeMap<OpId, Pending>,
    pub(super) control: BTreeMap<Ino, VecDeque<(u64, Control)>>,
    pub(super) last_epoch: BTreeMap<Ino, Epoch>,
    pub(super) names: VecDeque<(u64, OpId, NameOp)>,
    /// The session under which the first of them is asked for.
    pub(super) named_as: Option<SessionId>,
    pub(super) next_control: u64,
    /// Repairs that may begin, and those that have: one number each [S5].
    pub(super) permits: BTreeMap<Ino, usize>,
    pulls: BTreeSet<(Ino, Epoch, Seq)>,
    /// Files that the janitor has in hand.
    in_hand: BTreeSet<Ino>,
    /// Held files that need repair: under which grant, how much was left when there was progress last, and when that was.
    watched: BTreeMap<Ino, (Epoch, u64, u64)>,
}

impl Client {
    /// One that has not started.
    #[must_use]
    pub fn new(index: usize) -> Self {
        Self {
            index,
            up: false,
            generation: 0,
            session: None,
            link: Link::new(0, 0),
            home: 0,
            configuration: None,
            coordinators: BTreeMap::new(),
            lost: BTreeSet::new(),
            links: [0; 3],
            pending: BTreeMap::new(),
            control: BTreeMap::new(),
            last_epoch: BTreeMap::new(),
            names: VecDeque::new(),
            named_as: None,
            next_control: 0,
            permits: BTreeMap::new(),
            pulls: BTreeSet::new(),
            in_hand: BTreeSet::new(),
            watched: BTreeMap::new(),
        }
    }
    /// It still is the one with this number.
    #[must_use]
    pub fn runs(&self, generation: u64) -> bool {
        self.up && self.generation == generation
    }
    /// Operations that are not completed.
    #[must_use]
    pub fn waits(&self) -> usize {
        self.pending.len()
    }
    /// What it does, for a failure's message.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "c{} session {:?} {:?} links {:?} control {:?} pending {:?} {:#?}",
            self.index, self.session, self.link, self.links, self.control, self.pending, self.coordinators
        )
    }
    /// None of its coordinators has anything under way, except for holding leases.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.pending.is_empty() && self.coordinators.values().all(|c| c.is_idle() || c.is_repaired())
    }
}

impl World {
    pub(super) fn start_client(&mut self, c: usize) {
        let claims: Vec<usize> = (0..VOTERS).filter(|v| self.quorum.voters[*v].claims.is_some()).collect();
        if c == JANITOR && claims.is_empty() {
            return self.after(300, Happening::ClientStart(c));
        }
        let generation = self.number();
        let mut client = Client::new(c);
        client.home = if claims.is_empty() { 0 } else { claims[self.rng.index(claims.len())] };
        let nonce = self.number();
        client.link = Link::new(if c == JANITOR { client.home } else { self.rng.index(VOTERS) }, nonce);
        client.up = true;
        client.generation = generation;
        self.clients[c] = client;
        self.note(|| format!("c{c} starts as {generation}"));
        self.after(0, Happening::ClientTick(c, generation));
        if c != JANITOR && !self.scripted {
            self.after_chance(10, Happening::Application(c, generation));
        }
    }

    pub(super) fn crash_client(&mut self, c: usize, down_ms: u64) {
        self.clients[c].up = false;
        // What it had sent reaches one brick and not the other.
        for number in std::mem::take(&mut self.clients[c].links) {
            let until = self.now + self.rng.below(self.delay_ms * 2);
            self.dead.insert(number, until);
        }
        let lost = self.clients[c].pending.len() as u64;
        self.clients[c].pending.clear();
        self.clients[c].lost.clear();
        self.submitted -= lost;
        self.after(down_ms, Happening::ClientStart(c));
    }

    pub(super) fn client_tick(&mut self, c: usize) {
        self.session_tick(c);
        if !self.clients[c].up {
            return;
        }
        self.ask_controls_again(c);
        let files: Vec<Ino> = self.clients[c].coordinators.keys().copied().collect();
        for ino in files {
            self.tell(c, ino, Event::Tick, None);
        }
        if c == JANITOR && self.rng.chance(100) {
            self.look_after_files();
        }
    }

    /// Section 7: files that a dead holder left in doubt or that a `Syncing` brick lacks something of, and that nobody holds.
    fn look_after_files(&mut self) {
        let c = JANITOR;
        if self.clients[c].session.is_none() || self.clients[c].configuration.is_none() {
            return;
        }
        let state = std::rc::Rc::clone(&self.quorum.voters[self.clients[c].home].state);
        let configuration = configuration_of(&state, self.quorum.set);
        let lacking = configuration.syncing();
        let mut wanted = BTreeMap::new();
        let mut all_told = true;
        for s in configuration.writable().iter().filter(|_| !lacking.is_empty()) {
            // A server may be too slow to answer.
            let asked = self.bricks[s.index()].replica.as_ref().filter(|_| self.rng.chance(900));
            all_told &= asked.is_some();
            for x in lacking.iter() {
                let files = asked.map(|r| if x == s { r.planned_regions() } else { r.missed(x) });
                for (ino, regions) in files.into_iter().flatten() {
                    *wanted.entry(ino).or_default() += regions.len();
                }
            }
        }
        for ino in self.files.clone() {
            let lease = lease_of(&state, ino).unwrap_or_default();
            let coordinator = self.clients[c].coordinators.get(&ino);
            if self.clients[c].in_hand.contains(&ino) {
                if coordinator.is_some_and(Coordinator::is_repaired) {
                    self.clients[c].in_hand.remove(&ino);
                    self.tell(c, ino, Event::Forget, None);
                } else if coordinator.is_none_or(Coordinator::is_idle) {
                    self.clients[c].in_hand.remove(&ino);
                }
            }
            let is_lacking = wanted.contains_key(&ino) || self.is_damaged(ino);
            let left = wanted.get(&ino).copied().unwrap_or_default();
            let is_stuck = is_lacking && self.is_stuck(ino, lease.epoch, left);
            if !is_lacking && all_told {
                self.clients[c].watched.remove(&ino);
            }
            let is_wanted = lease.holder.is_none() && (lease.unsettled || is_lacking) || is_stuck;
            if is_wanted && self.clients[c].in_hand.insert(ino) {
                self.coordinator(c, ino);
                self.tell(c, ino, Event::Adopt, None);
            }
        }
    }

    /// The holder of a file does not repair it.
    fn is_stuck(&mut self, ino: Ino, epoch: Epoch, left: u64) -> bool {
        let now = self.now;
        let seen = self.clients[JANITOR].watched.entry(ino).or_insert((epoch, left, now));
        if seen.0 != epoch || left < seen.1 {
            *seen = (epoch, left, now);
        }
        seen.2 + STUCK_MS <= now
    }

    fn coordinator(&mut self, c: usize, ino: Ino) {
        let client = &mut self.clients[c];
        if let (Some(configuration), false) = (client.configuration, client.coordinators.contains_key(&ino)) {
            let links = (0..3).filter(|s| client.links[*s] != 0).map(slot).collect::<Slots>();
            client.coordinators.insert(ino, Coordinator::new(ino, configuration, links, TIMEOUTS));
        }
    }

    /// Chance decides what an application asks for.
    pub(super) fn application(&mut self, c: usize) {
        let generation = self.clients[c].generation;
        let gap = self.chaos.delay(self.faults.gap_ms, 1500);
        if !self.winding_down {
            self.after_chance(gap, Happening::Application(c, generation));
        }
        if !self.may_ask(c) {
            return;
        }
        let own = c % self.files.len();
        let shared = self.chaos.chance(self.faults.sharing_permille);
        let ino = self.files[if shared { self.chaos.index(self.files.len()) } else { own }];
        if self.clients[c].lost.contains(&ino) && self.chaos.chance(300) {
            self.act(Act::Close(c, ino));
        }
        let ask = match self.chaos.below(100) {
            0..45 => {
                let first = self.chaos.index(BLOCKS);
                Ask::Write { first, count: 1 + self.chaos.index((BLOCKS - first).min(3)) }
            }
            45..52 => Ask::Truncate { blocks: self.chaos.index(BLOCKS + 1) },
            52..85 => {
                let first = self.chaos.index(BLOCKS);
                Ask::Read { first, count: 1 + self.chaos.index(BLOCKS - first) }
            }
            85..94 => Ask::Flush,
            94..96 => Ask::Name,
            _ => Ask::Stat,
        };
        let ask = match ask {
            // Dice of their own, so that a run without holes is played as ever.
            Ask::Write { first, count } if self.holes.chance(self.holes_permille) => {
                Ask::Zero { first, count, grows: self.holes.chance(400) }
            }
            ask => ask,
        };
        self.act(Act::Ask(c, ino, ask));
    }

    fn may_ask(&self, c: usize) -> bool {
        let client = &self.clients[c];
        let ready = client.up && client.session.is_some() && client.configuration.is_some();
        ready && !self.winding_down && client.pending.len() < AT_ONCE
    }

    pub(super) fn close_failed(&mut self, c: usize, ino: Ino) {
        self.clients[c].lost.remove(&ino);
        self.tell(c, ino, Event::Forget, None);
    }

    pub(super) fn ask(&mut self, c: usize, ino: Ino, ask: Ask) {
        if !self.may_ask(c) {
            return;
        }
        let generation = self.clients[c].generation;
        self.coordinator(c, ino);
        let op = OpId(self.number());
        let at = |block| self.geometry.offset(block);
        let (operation, what) = match ask {
            Ask::Write { first, count } => {
                let write = Mutation::Write { offset: at(first), length: count as u64 * BLOCK_BYTES };
                self.history.submitted(op, generation, ino, Kind::Write { first, count });
                (Operation::Mutate(write), What::Mutation)
            }
            Ask::Zero { first, count, grows } => {
                let mode = if grows { ZERO } else { PUNCH_AND_KEEP };
                let zero = Mutation::Allocate { offset: at(first), length: count as u64 * BLOCK_BYTES, mode };
                self.history.submitted(op, generation, ino, Kind::Zero { first, count, grows });
                (Operation::Mutate(zero), What::Mutation)
            }
            Ask::Truncate { blocks } => {
                let size = at(blocks);
                self.history.submitted(op, generation, ino, Kind::Truncate { size });
                (Operation::Mutate(Mutation::Truncate { size }), What::Mutation)
            }
            Ask::Read { first, count } => {
                let needs = self.history.needs(ino);
                let range = ByteRange::at(at(first), count as u64 * BLOCK_BYTES);
                (Operation::Read(range), What::Read { first, count, needs })
            }
            Ask::Flush => (Operation::Flush, What::Flush(self.history.to_flush(generation, ino))),
            Ask::Name => {
                self.submitted += 1;
                self.clients[c].pending.insert(op, Pending { ino, what: What::Name, since_ms: self.now });
                return self.make_and_remove(c, op);
            }
            Ask::Stat => (Operation::Stat, What::Stat(self.history.size_need(ino))),
        };
        self.note(|| format!("c{c} submits {} {ino:?} {operation:?}", op.0));
        self.submitted += 1;
        self.clients[c].pending.insert(op, Pending { ino, what, since_ms: self.now });
        self.tell(c, ino, Event::Submit(op, operation), None);
    }

    /// Hands an event to the coordinator of a file and does what it wants done.
    pub(super) fn tell(&mut self, c: usize, ino: Ino, event: Event, content: Option<Content>) {
        let now = self.now;
        let mut effects = Vec::new();
        let Some(coordinator) = self.clients[c].coordinators.get_mut(&ino) else { return };
        let held = coordinator.is_holding();
        coordinator.handle(event, now, &mut effects);
        let settled = !held && coordinator.is_holding();
        if settled || effects.iter().any(|e| matches!(e, Effect::ReleaseLease { finished: true, .. })) {
            self.check_settled(c, ino);
        }
        for effect in effects {
            self.effect(c, ino, effect, content);
        }
    }

    pub(super) fn tell_all(&mut self, c: usize, event: &Event) {
        let files: Vec<Ino> = self.clients[c].coordinators.keys().copied().collect();
        for ino in files {
            self.tell(c, ino, event.clone(), None);
        }
    }

    fn effect(&mut self, c: usize, ino: Ino, effect: Effect, content: Option<Content>) {
        let generation = self.clients[c].generation;
        match effect {
            Effect::Send(request) => {
                let s = request.slot.index();
                let number = self.clients[c].links[s];
                let session = self.clients[c].session.unwrap_or(SessionId(0));
                if let Some(op) = mutation_of(&request) {
                    self.history.sent(op, (request.epoch, request.seq), request.n);
                }
                if matches!(request.body, Body::Pull { doubt: None, .. }) {
                    self.check_permitted(c, ino, &request);
                }
                if number != 0 {
                    let connection = Connection { client: c, slot: s, number };
                    let wire = Wire { connection, session, ino, request };
                    self.send(Node::Client(c), Node::Brick(s), true, Happening::Request(wire));
                    // It comes once more, later [F3].
                    if self.rng.chance(self.faults.repeat_permille) {
                        let later = self.rng.between(0, 2000);
                        self.after(later, Happening::Repeated(wire));
                    }
                }
            }
            Effect::Complete(op, completion) => self.completed(c, op, completion, content),
            Effect::Discard(_) => {}
            Effect::AcquireLease => self.want(c, ino, Control::Acquire),
            Effect::ReleaseLease { epoch, finished } => {
                self.want(c, ino, Control::Release { epoch, finished });
            }
            Effect::Suspect(slot, n) => self.tell_leader(c, ToLeader::Suspect(slot, n)),
            Effect::Lost => {
                self.note(|| format!("c{c} is told that it lost writes of {ino:?}"));
                self.clients[c].lost.insert(ino);
                let owed = self.history.told_of_loss(generation, ino);
                self.count(if owed { "told of a loss" } else { "told of a loss that may have been none" });
            }
            // What is new comes by itself.
            Effect::Refresh => {}
            Effect::WantPermit => {
                let delay = self.rng.delay(20, 200);
                self.after(delay, Happening::Permit(c, generation, ino));
            }
        }
    }

    /// [S5] A repair begins, or is sent again.
    fn check_permitted(&mut self, c: usize, ino: Ino, request: &Request) {
        let client = &mut self.clients[c];
        if !client.pulls.insert((ino, request.epoch, request.seq)) {
            return;
        }
        match client.permits.get_mut(&ino).filter(|left| **left > 0) {
            Some(left) => *left -= 1,
            None => self.fail(|| format!("S5: c{c} repairs {ino:?} with {:?}, which nobody permitted", request.body)),
        }
    }

    fn completed(&mut self, c: usize, op: OpId, completion: Completion, content: Option<Content>) {
        let Some(pending) = self.clients[c].pending.remove(&op) else {
            self.fail(|| format!("operation {} was completed twice, or never asked for", op.0));
            return;
        };
        self.completed += 1;
        self.event(|| format!("c{c} completed {} {completion:?} {content:?}", op.0));
        let known = self.clients[c].configuration.map_or(ConfigNo(0), |known| known.n);
        let owed = self.history.is_owed_a_failure(self.clients[c].generation, pending.ino, known);
        if owed || self.clients[c].lost.contains(&pending.ino) {
            if !matches!(completion, Completion::Failed(_) | Completion::LeaseLost) {
                self.fail(|| format!("E7: c{c} lost writes of {:?}, and {} ends in {completion:?}", pending.ino, op.0));
            }
            return;
        }
        match (pending.what, completion) {
            (What::Mutation, Completion::Done) => {
                if let Err(why) = self.history.acknowledged(op) {
                    self.fail(|| format!("W3: {why}"));
                }
            }
            (What::Mutation, Completion::LeaseLost) => self.count("lease lost"),
            (What::Mutation, Completion::Failed(_)) => {
                self.count("failed");
                self.history.refused(op);
            }
            (What::Read { first, count, needs }, Completion::Bytes) => {
                let Some(content) = content else {
                    self.fail(|| format!("read {} completed without bytes", op.0));
                    return;
                };
                for (b, need) in needs.iter().copied().enumerate().skip(first).take(count) {
                    if let Err(why) = self.history.check(pending.ino, b, content.blocks[b], need) {
                        self.fail(|| format!("I2: read {} of c{c}: {why}", op.0));
                    }
                }
            }
            (What::Read { first, count, .. }, Completion::Corrupt) => {
                self.check_lost(c, pending.ino, first..first + count, pending.since_ms);
            }
            (What::Flush(ops), Completion::Done) => self.history.flushed(&ops),
            (What::Stat(need), Completion::Stat(stat)) => {
                if let Err(why) = self.history.check_size(pending.ino, stat.size, &need) {
                    self.fail(|| format!("I2: stat {} of c{c}: {why}", op.0));
                }
            }
            (What::Flush(_), Completion::LeaseLost) => {}
            (what, completion) => self.fail(|| format!("E3: operation {} {what:?} ended in {completion:?}", op.0)),
        }
    }

    pub(super) fn name_done(&mut self, c: usize, op: OpId) {
        if self.clients[c].pending.remove(&op).is_some() {
            self.completed += 1;
            self.count("name made and removed");
        }
    }

    /// A cold start has lost what reads that are under way would have had to see.
    pub(super) fn forgive_reads(&mut self) {
        for pending in self.clients.iter_mut().flat_map(|c| c.pending.values_mut()) {
            if let What::Read { needs, .. } = &mut pending.what {
                let now = self.history.needs(pending.ino);
                for (need, now) in needs.iter_mut().zip(now) {
                    *need = need.at_most(now);
                }
            }
        }
    }

    // -- connections ---------------------------------------------------------------------------------------------------

    pub(super) fn answer_arrives(
        &mut self,
        connection: Connection,
        ino: Ino,
        id: RequestId,
        answer: Answer,
        content: Option<Content>,
    ) {
        let Connection { client: c, slot: s, number } = connection;
        if self.clients[c].up && self.clients[c].links[s] == number {
            self.note(|| format!("c{c} <- b{s} {id:?} {answer:?}"));
            self.tell(c, ino, Event::Answered(id, answer), content);
        }
    }

    pub(super) fn link_broken(&mut self, connection: Connection) {
        let Connection { client: c, slot: s, number } = connection;
        if self.clients[c].links[s] != number || number == 0 {
            return;
        }
        self.note(|| format!("c{c} loses its connection to b{s}"));
        self.clients[c].links[s] = 0;
        self.tell_all(c, &Event::LinkDown(slot(s)));
        let generation = self.clients[c].generation;
        let delay = self.rng.between(1, 200);
        self.after(delay, Happening::Connect(c, generation, s));
    }

    pub(super) fn connect(&mut self, c: usize, s: usize) {
        if self.clients[c].links[s] != 0 {
            return;
        }
        let (client, brick) = (Node::Client(c), Node::Brick(s));
        let reachable = self.bricks[s].is_up()
            && self.bricks[s].paused_until <= self.now
            && self.cut_until(client, brick).is_none()
            && self.cut_until(brick, client).is_none();
        if !reachable || self.rng.chance(100) {
            let generation = self.clients[c].generation;
            let delay = self.rng.between(20, 300);
            self.after(delay, Happening::Connect(c, generation, s));
            return;
        }
        let number = self.number();
        self.note(|| format!("c{c} connects to b{s}"));
        self.accept(s, c, number);
        self.clients[c].links[s] = number;
        self.tell_all(c, &Event::LinkUp(slot(s)));
    }

    /// A request's body says whether it is served from a brick's cache alone.
    #[must_use]
    pub fn is_read(body: &Body) -> bool {
        matches!(body, Body::Read(_) | Body::Stat | Body::Seek { .. })
    }
}
