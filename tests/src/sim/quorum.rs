//! The quorum of the metadata log: three voters, what they committed, and what that adds up to by the real [`State`].
//!
//! Raft itself is not run; what it promises is. One voter leads truly; others may still believe that they do, and can then
//! neither commit nor confirm. What a leader proposed and had not committed when it was deposed surfaces under the next
//! leader, or vanishes. A voter's own state lags behind what is committed, also that of one that was just elected.

use std::rc::Rc;

use mortar_proto::config::Configuration;
use mortar_proto::metadata::monitor::Timing;
use mortar_proto::metadata::state::{Lease, Node as Inode};
use mortar_proto::metadata::{BrickPlace, Command, Effect, Entry, NameOp, NewNode, Outcome, State};
use mortar_proto::types::{ClusterId, Ino, LogIndex, ServerId, SessionId, SetId};

use super::leader::{Leader, Then};
use super::rng::Rng;
use super::world::{Happening, Node, World};

/// Voters.
pub const VOTERS: usize = 3;
/// The volume of a run.
pub const VOLUME: &str = "v";
/// How long a proposal of the leader's own may take before it looks round again.
const PROPOSE_TIMEOUT_MS: u64 = 5000;

/// An entry that is committed.
pub struct Logged {
    /// What it brought about.
    pub effects: Vec<Effect>,
    /// The state after it.
    pub state: Rc<State>,
}

/// Something proposed that is not committed.
#[derive(Clone, Debug)]
struct Proposal {
    number: u64,
    term: u64,
    by: usize,
    entry: Entry,
    then: Then,
    /// Another voter may have it, so it can outlive its leader.
    reached: bool,
}

/// A voter.
pub struct Voter {
    /// Its process runs.
    pub up: bool,
    /// It does nothing until then.
    pub paused_until: u64,
    /// Counts its ends.
    pub generation: u64,
    /// Entries that it has applied.
    pub applied: usize,
    /// The state that it has applied.
    pub state: Rc<State>,
    /// The term in which it believes to lead.
    pub claims: Option<u64>,
    /// What it keeps in mind as a leader.
    pub leader: Option<Leader>,
    /// How fast its clock runs, in thousandths.
    pub clock_permille: u64,
}

/// The quorum.
pub struct Quorum {
    /// The voters.
    pub voters: Vec<Voter>,
    /// What is committed.
    pub entries: Vec<Logged>,
    /// Each voter's server has the brick of the same number too: they die, pause and are cut off together.
    pub together: bool,
    /// Who leads truly, if anybody does.
    pub leads: Option<usize>,
    /// The times of its leaders.
    pub timing: Timing,
    /// A session that is not heard for this long ends.
    pub session_ttl_ms: u64,
    /// The replica set.
    pub set: SetId,
    /// The volume's root.
    pub root: Ino,
    /// The wall clock's error, in milliseconds.
    pub wall_ms: u64,
    /// Entries that were there from the start.
    founded: usize,
    term: u64,
    limbo: Vec<Proposal>,
    /// When it was seen to have no leader, and how long it takes to elect one.
    unled: Option<(u64, u64)>,
}

impl Quorum {
    /// A cluster with a volume and so many files, made by the commands that an administrator's tools and a mount would send.
    ///
    /// # Panics
    /// When the state refuses one of them.
    #[must_use]
    pub fn new(files: usize, rng: &mut Rng) -> (Self, Vec<Ino>) {
        let state = Rc::new(State::new(ClusterId(1)));
        let read_lease_ms = rng.between(500, 1500);
        let back_off_ms = rng.between(100, 1000);
        let timing = Timing {
            read_lease_ms,
            clock_margin_ms: read_lease_ms / 10 + 50,
            cold_start_wait_ms: rng.between(1000, 6000),
            back_off_ms,
            back_off_max_ms: back_off_ms * rng.between(1, 8),
        };
        let voter = |permille: u64| Voter {
            up: true,
            paused_until: 0,
            generation: 0,
            applied: 0,
            state: Rc::clone(&state),
            claims: None,
            leader: None,
            clock_permille: permille,
        };
        let mut quorum = Self {
            voters: (0..VOTERS).map(|_| voter(rng.between(960, 1040))).collect(),
            entries: Vec::new(),
            together: rng.chance(500),
            leads: None,
            timing,
            session_ttl_ms: rng.between(700, 2500),
            set: SetId(0),
            root: Ino(0),
            wall_ms: 1_700_000_000_000,
            founded: 0,
            term: 0,
            limbo: Vec::new(),
            unled: Some((0, 0)),
        };
        let files = quorum.found(files);
        quorum.founded = quorum.entries.len();
        let (applied, state) = (quorum.entries.len(), Rc::clone(quorum.state()));
        for voter in &mut quorum.voters {
            (voter.applied, voter.state) = (applied, Rc::clone(&state));
        }
        (quorum, files)
    }

    fn found(&mut self, files: usize) -> Vec<Ino> {
        let server = |i: usize| ServerId(i as u64 + 1);
        for i in 0..VOTERS {
            self.append(None, Command::ServerAdd { server: server(i), address: format!("s{i}:7440") });
        }
        let place = |i: usize| BrickPlace { server: server(i), path: "/b".into() };
        let sets = vec![[place(0), place(1), place(2)]];
        self.append(None, Command::VolumeCreate { name: VOLUME.into(), sets, force: false });
        self.append(None, Command::VolumeStart { name: VOLUME.into() });
        self.set = *self.state().sets.keys().next().expect("the volume has a replica set");
        let volume = VOLUME.into();
        let open = Command::SessionOpen { nonce: 1, volume, client: "first".into(), address: String::new() };
        let Outcome::Session { session, root, .. } = self.append(None, open) else { panic!("no first session") };
        self.root = root;
        let made = (0..files).map(|i| {
            let operation = NameOp::Create {
                parent: root,
                name: format!("f{i}").into_bytes(),
                node: NewNode::File,
                mode: 0o600,
                uid: 0,
                gid: 0,
                or_existing: false,
                open: false,
            };
            match self.append(Some((session, i as u64)), Command::Name { session, operation }) {
                Outcome::Node { attributes, created: true } => attributes.ino,
                other => panic!("a file was not made: {other:?}"),
            }
        });
        let files = made.collect();
        self.append(None, Command::SessionEnd { session });
        files
    }

    fn append(&mut self, request: Option<(SessionId, u64)>, command: Command) -> Outcome {
        self.commit(Entry { time_ns: 0, request, command }).0
    }

    fn commit(&mut self, entry: Entry) -> (Outcome, &Logged) {
        let mut state = self.entries.last().map_or_else(|| State::new(ClusterId(1)), |l| (*l.state).clone());
        let (outcome, effects) = state.apply(LogIndex(self.entries.len() as u64 + 1), &entry);
        self.entries.push(Logged { effects, state: Rc::new(state) });
        (outcome, &self.entries[self.entries.len() - 1])
    }

    /// What everything that is committed adds up to.
    ///
    /// # Panics
    /// Never: a cluster begins with entries.
    #[must_use]
    pub fn state(&self) -> &Rc<State> {
        &self.entries.last().expect("a cluster begins with entries").state
    }
    /// The configuration that is committed.
    #[must_use]
    pub fn configuration(&self) -> Configuration {
        configuration_of(self.state(), self.set)
    }
    /// The lease of a file, as committed.
    #[must_use]
    pub fn lease(&self, ino: Ino) -> Lease {
        lease_of(self.state(), ino).unwrap_or_default()
    }
    /// The index of the last entry that is committed.
    #[must_use]
    pub fn committed(&self) -> LogIndex {
        LogIndex(self.entries.len() as u64)
    }
}

/// The configuration of the run's replica set.
///
/// # Panics
/// When the state has lost the set.
#[must_use]
pub fn configuration_of(state: &State, set: SetId) -> Configuration {
    state.sets.get(&set).expect("the replica set stays").configuration
}

/// The lease of a file.
#[must_use]
pub fn lease_of(state: &State, ino: Ino) -> Option<Lease> {
    match &state.inodes.get(&ino)?.node {
        Inode::File { lease, .. } => Some(*lease),
        _ => None,
    }
}

impl World {
    fn is_awake(&self, v: usize) -> bool {
        let voter = &self.quorum.voters[v];
        voter.up && voter.paused_until <= self.now
    }
    fn are_joined(&self, a: usize, b: usize) -> bool {
        let (a_node, b_node) = (Node::Voter(a), Node::Voter(b));
        self.is_awake(a)
            && self.is_awake(b)
            && self.cut_until(a_node, b_node).is_none()
            && self.cut_until(b_node, a_node).is_none()
    }
    fn has_quorum(&self, v: usize) -> bool {
        self.is_awake(v) && (0..VOTERS).any(|other| other != v && self.are_joined(v, other))
    }
    /// A quorum confirms, just now, that this voter leads.
    pub(super) fn confirms(&self, v: usize) -> bool {
        let voter = &self.quorum.voters[v];
        self.quorum.leads == Some(v) && voter.claims == Some(self.quorum.term) && self.has_quorum(v)
    }
    /// The voter's own clock.
    #[must_use]
    pub fn voter_now(&self, v: usize) -> u64 {
        self.now * self.quorum.voters[v].clock_permille / 1000
    }

    // -- proposals -----------------------------------------------------------------------------------------------------

    /// A voter that believes to lead proposes something.
    pub(super) fn propose(&mut self, v: usize, request: Option<(SessionId, u64)>, command: Command, then: Then) {
        let Some(term) = self.quorum.voters[v].claims else { return };
        // Wall clocks are wrong, and jump.
        if self.rng.chance(20) {
            self.quorum.wall_ms = self.rng.between(0, 4_000_000_000_000);
        }
        let number = self.number();
        let entry = Entry { time_ns: self.quorum.wall_ms * 1_000_000 + self.now, request, command };
        if let Some(leader) = self.quorum.voters[v].leader.as_mut()
            && matches!(then, Then::LookOn)
        {
            leader.proposing = Some((number, self.now + PROPOSE_TIMEOUT_MS));
        }
        if self.quorum.leads != Some(v) || term != self.quorum.term {
            // It is deposed and does not know: what it adds to its log is cut off again.
            self.count("proposed in vain");
            return;
        }
        let reached = self.has_quorum(v);
        self.quorum.limbo.push(Proposal { number, term, by: v, entry, then, reached });
        let delay = self.rng.delay(self.delay_ms, self.delay_ms * 10);
        self.after(delay, Happening::Replicated(number));
    }

    /// A proposal should have reached a quorum by now, and with it all before it.
    pub(super) fn replicated(&mut self, number: u64) {
        let Some(at) = self.quorum.limbo.iter().position(|p| p.number == number) else { return };
        let (term, by) = (self.quorum.limbo[at].term, self.quorum.limbo[at].by);
        if !self.confirms(by) || term != self.quorum.term {
            // It waits for its leader to get a quorum, or for the next leader.
            if self.quorum.leads == Some(by) && term == self.quorum.term {
                let again = self.rng.between(20, 200);
                self.after(again, Happening::Replicated(number));
            }
            return;
        }
        let ready: Vec<Proposal> = self.quorum.limbo.drain(..=at).collect();
        for proposal in ready {
            let outcome = self.commit(proposal.entry);
            self.catch_up(by);
            self.proposed(by, proposal.number, proposal.then, outcome);
        }
        self.look_round(by);
    }

    fn commit(&mut self, entry: Entry) -> Outcome {
        let old = self.quorum.configuration();
        let command = entry.command.clone();
        let line = self.trace.is_some().then(|| format!("{:?} {:?}", entry.request, entry.command));
        let index = self.quorum.entries.len();
        let (outcome, logged) = self.quorum.commit(entry);
        let configured = logged.effects.iter().find_map(|effect| match effect {
            Effect::Configured { configuration, cold_start, .. } => Some((*configuration, *cold_start)),
            _ => None,
        });
        self.event(|| format!("LOG {} {} -> {outcome:?}", index + 1, line.unwrap_or_default()));
        if let Some((configuration, cold_start)) = configured {
            self.configuration_committed(&old, &configuration, &command, cold_start);
        }
        if let Some(leads) = self.quorum.leads {
            for slot in 0..3 {
                let generation = self.bricks[slot].generation;
                self.send(Node::Voter(leads), Node::Brick(slot), false, Happening::Apply(slot, generation));
            }
        }
        outcome
    }

    /// A voter applies all that is committed.
    pub(super) fn catch_up(&mut self, v: usize) {
        let state = Rc::clone(self.quorum.state());
        let applied = self.quorum.entries.len();
        let voter = &mut self.quorum.voters[v];
        (voter.applied, voter.state) = (applied, state);
    }

    // -- elections -----------------------------------------------------------------------------------------------------

    pub(super) fn quorum_tick(&mut self) {
        let sound = self.quorum.leads.is_some_and(|l| self.confirms(l));
        match self.quorum.unled {
            _ if sound => self.quorum.unled = None,
            None => self.quorum.unled = Some((self.now, self.rng.between(300, 2500))),
            Some((since, patience)) if since + patience <= self.now => self.elect(),
            Some(_) => {}
        }
        for v in 0..VOTERS {
            if !self.is_awake(v) {
                continue;
            }
            self.hear_of_leader(v);
            self.look_round(v);
        }
    }

    /// A voter hears from the one who leads: it applies more, and knows if it was deposed.
    fn hear_of_leader(&mut self, v: usize) {
        let Some(leads) = self.quorum.leads.filter(|l| *l == v || self.are_joined(v, *l)) else { return };
        if leads != v && self.quorum.voters[v].claims.is_some() && self.rng.chance(400) {
            self.note(|| format!("v{v} knows that v{leads} leads"));
            self.quorum.voters[v].claims = None;
        }
        let (applied, all) = (self.quorum.voters[v].applied, self.quorum.entries.len());
        if applied < all && self.rng.chance(700) {
            let upto = if self.rng.chance(300) { applied + 1 + self.rng.index(all - applied) } else { all };
            let state = Rc::clone(&self.quorum.entries[upto - 1].state);
            let voter = &mut self.quorum.voters[v];
            (voter.applied, voter.state) = (upto, state);
        }
    }

    /// Another voter is elected, if there is one that can be.
    pub(super) fn elect(&mut self) {
        let able: Vec<usize> = (0..VOTERS).filter(|v| self.has_quorum(*v)).collect();
        let others: Vec<usize> = able.iter().copied().filter(|v| Some(*v) != self.quorum.leads).collect();
        let from = if others.is_empty() || self.rng.chance(100) { able } else { others };
        if from.is_empty() {
            return;
        }
        let v = from[self.rng.index(from.len())];
        self.count("election");
        self.quorum.unled = None;
        let before = self.quorum.leads.replace(v);
        self.quorum.term += 1;
        let term = self.quorum.term;
        self.quorum.voters[v].claims = Some(term);
        self.event(|| format!("v{v} leads, in term {term}, after {before:?}"));
        // The new leader's log has what is committed, and of the rest as much as had reached it.
        let limbo = std::mem::take(&mut self.quorum.limbo);
        let most = if before == Some(v) { limbo.len() } else { limbo.iter().take_while(|p| p.reached).count() };
        let surfacing = if before == Some(v) { most } else { self.rng.index(most + 1) };
        for (i, proposal) in limbo.into_iter().enumerate() {
            if i < surfacing {
                self.count("surfaced");
                self.commit(proposal.entry);
            } else {
                self.count("vanished");
            }
        }
    }

    // -- processes -----------------------------------------------------------------------------------------------------

    /// A voter's process ends.
    pub(super) fn stop_voter(&mut self, v: usize) {
        let voter = &mut self.quorum.voters[v];
        voter.up = false;
        voter.generation += 1;
        voter.paused_until = 0;
        voter.claims = None;
        voter.leader = None;
    }
    /// It starts: from its last snapshot, and it does not know yet how much of what follows is committed.
    pub(super) fn start_voter(&mut self, v: usize) {
        let founded = self.quorum.founded;
        let snapshot = founded + self.rng.index(self.quorum.voters[v].applied - founded + 1);
        let state = Rc::clone(&self.quorum.entries[snapshot - 1].state);
        let voter = &mut self.quorum.voters[v];
        voter.up = true;
        (voter.applied, voter.state) = (snapshot, state);
    }
}
