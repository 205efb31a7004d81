//! The metadata log, and who leads it: the real [`State`] and [`Monitor`]. Commands are committed at once; which server has
//! applied them is another matter.

use std::rc::Rc;

use mortar_proto::config::{Configuration, Slot};
use mortar_proto::metadata::monitor::{Monitor, Timing};
use mortar_proto::metadata::state::{Lease, Node};
use mortar_proto::metadata::{BrickPlace, Command, Effect, Entry, NameOp, NewNode, Outcome, State};
use mortar_proto::types::{BootId, BrickId, ClusterId, ConfigNo, Incarnation, LogIndex, ServerId, SessionId, SetId};

use super::disk::INO;
use super::part::{Part, Shown};
use super::world::{CLIENTS, World};

/// Longer than everything that runs out.
pub const SILENCE_MS: u64 = 10_000;
/// The leader's clock begins here.
pub const BEGIN_MS: u64 = 3_000_000_000_000_000;
/// How long a heartbeat's answer lets a brick serve reads.
pub const READ_LEASE_MS: u64 = 1_000;

const TIMING: Timing = Timing {
    read_lease_ms: READ_LEASE_MS,
    clock_margin_ms: 150,
    cold_start_wait_ms: SILENCE_MS / 2,
    back_off_ms: 0,
    back_off_max_ms: 0,
};

/// The log's state, its entries, and the leader's view.
#[derive(Clone, Debug)]
pub struct Leader {
    state: Rc<State>,
    /// What each entry changed that concerns bricks.
    pub entries: Rc<Vec<Vec<Effect>>>,
    /// Who lives.
    pub monitor: Part<Monitor>,
    /// The clock of the leader and of the bricks' read leases: it moves by [`SILENCE_MS`] or not at all.
    pub now_ms: u64,
    set: SetId,
    bricks: [BrickId; 3],
    /// Each client's first session.
    pub sessions: [SessionId; CLIENTS],
}

impl Leader {
    /// A cluster with one volume, one file, three bricks that have registered, and a session for each client.
    #[must_use]
    pub fn new() -> Self {
        let mut leader = Self {
            state: Rc::new(State::new(ClusterId(1))),
            entries: Rc::new(Vec::new()),
            monitor: Part::new(Monitor::new(TIMING, BEGIN_MS)),
            now_ms: BEGIN_MS,
            set: SetId(0),
            bricks: [BrickId(0); 3],
            sessions: [SessionId(0); CLIENTS],
        };
        let places = [1, 2, 3].map(|s| BrickPlace { server: ServerId(s), path: "/brick".into() });
        for place in &places {
            leader.commit(&Command::ServerAdd { server: place.server, address: format!("s{}:1", place.server.0) });
        }
        leader.commit(&Command::VolumeCreate { name: "v".into(), sets: vec![places], force: false });
        leader.commit(&Command::VolumeStart { name: "v".into() });
        if let Some((set, row)) = leader.state.sets.first_key_value() {
            leader.set = *set;
            leader.bricks = row.configuration.members.map(|m| m.brick);
        }
        for c in 0..CLIENTS {
            leader.sessions[c] = leader.open_session(c as u128);
        }
        let root = leader.state.volumes.values().next().map(|v| v.root).unwrap_or_default();
        let operation = NameOp::Create {
            parent: root,
            name: b"file".to_vec(),
            node: NewNode::File,
            mode: 0o600,
            uid: 0,
            gid: 0,
            or_existing: false,
            open: true,
        };
        leader.commit(&Command::Name { session: leader.sessions[0], operation });
        assert!(
            leader.state.inodes.contains_key(&INO),
            "the file has another number: {:?}",
            leader.state.inodes.keys()
        );
        for (i, brick) in leader.bricks.into_iter().enumerate() {
            let (incarnation, boot) = (Incarnation(i as u64 + 1), BootId(i as u128 + 1));
            let n = ConfigNo(i as u64 + 1);
            leader.commit(&Command::Register { brick, n, incarnation, boot, clean: false });
        }
        leader
    }

    /// What the log adds up to.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }
    /// The configuration in force.
    #[must_use]
    pub fn configuration(&self) -> Configuration {
        self.state.sets.get(&self.set).map(|s| s.configuration).expect("the set is never deleted")
    }
    /// The file's lease.
    #[must_use]
    pub fn lease(&self) -> Lease {
        match self.state.inodes.get(&INO).map(|i| &i.node) {
            Some(Node::File { lease, .. }) => *lease,
            _ => Lease::default(),
        }
    }
    /// The session has not ended.
    #[must_use]
    pub fn has_session(&self, session: SessionId) -> bool {
        self.state.sessions.contains_key(&session)
    }
    /// The brick in a place.
    #[must_use]
    pub fn brick(&self, s: usize) -> BrickId {
        self.bricks[s]
    }
    /// How far the log goes.
    #[must_use]
    pub fn last(&self) -> LogIndex {
        LogIndex(self.entries.len() as u64)
    }

    /// Commits a command.
    pub fn commit(&mut self, command: &Command) -> Outcome {
        let index = LogIndex(self.entries.len() as u64 + 1);
        let entry = Entry { time_ns: 0, request: None, command: command.clone() };
        let (outcome, mut effects) = Rc::make_mut(&mut self.state).apply(index, &entry);
        effects.retain(|e| matches!(e, Effect::Configured { .. } | Effect::Leased { .. }));
        Rc::make_mut(&mut self.entries).push(effects);
        outcome
    }

    /// Opens a session.
    pub fn open_session(&mut self, nonce: u128) -> SessionId {
        let command = Command::SessionOpen { nonce, volume: "v".into(), client: String::new(), address: String::new() };
        match self.commit(&command) {
            Outcome::Session { session, .. } => session,
            other => panic!("a session was refused: {other:?}"),
        }
    }

    /// Somebody complains of a brick [W4].
    pub fn suspect(&mut self, slot: Slot, n: ConfigNo) {
        self.monitor.suspect(&self.state, self.set, n, slot);
    }
    /// What the leader would propose.
    #[must_use]
    pub fn proposal(&self) -> Option<Command> {
        Monitor::clone(&self.monitor).poll(&self.state, self.now_ms).into_iter().next()
    }
    /// Another leader.
    pub fn elect(&mut self) {
        self.monitor = Part::new(Monitor::new(TIMING, self.now_ms));
    }
}

impl Shown for Monitor {
    fn shown(&self) -> impl core::fmt::Debug + '_ {
        self
    }
}

impl Default for Leader {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// The leader proposes what it thinks due, and it is committed.
    pub(super) fn poll(&mut self) {
        let (state, now) = (Rc::clone(&self.leader.state), self.leader.now_ms);
        let Some(command) = self.leader.monitor.poll(&state, now).into_iter().next() else { return };
        self.commit_configuration(&command);
    }

    fn commit_configuration(&mut self, command: &Command) {
        let before = self.configuration();
        let outcome = self.leader.commit(command);
        let after = self.configuration();
        self.note(|| format!("the leader proposes {command:?}; now {}", shown(&after)));
        if !matches!(outcome, Outcome::Configuration(_)) {
            return;
        }
        let source = match command {
            Command::ColdStart { source, .. } => Some(*source),
            _ => None,
        };
        self.check_configuration(&before, &after, source);
    }

    /// Longer than every lease passes.
    pub(super) fn silence(&mut self) {
        self.leader.now_ms += SILENCE_MS;
    }

    /// A heartbeat is heard and answered.
    pub(super) fn beat(&mut self, s: usize) {
        let Some(beat) = self.bricks[s].beat() else { return };
        let (state, now) = (Rc::clone(&self.leader.state), self.leader.now_ms);
        let asked = self.leader.monitor.heartbeat(&state, now, &[beat]);
        if self.leader.monitor.withholds(&state, beat.brick) {
            return;
        }
        let commit = self.leader.last();
        if self.bricks[s].beat_answered(now + READ_LEASE_MS, commit, !asked.is_empty()) {
            self.note(|| format!("b{s} agrees to its Out"));
        }
    }

    /// A heartbeat now would be news, or bring some.
    pub(super) fn can_beat(&self, s: usize) -> bool {
        let Some(beat) = self.bricks[s].beat() else { return false };
        let (leader, now) = (&self.leader, self.leader.now_ms);
        let heard = leader.monitor.last_beat(beat.brick) == Some(beat)
            && leader.monitor.last_answered_ms(beat.brick) == Some(now);
        !heard || !Monitor::clone(&leader.monitor).heartbeat(&leader.state, now, &[beat]).is_empty()
    }

    /// What the leader does about the lease that a client waits for: asks for it, or grants it.
    pub(super) fn must_recall(&self, c: usize) -> bool {
        let holder = self.leader.lease().holder;
        self.wants_lease(c) && holder.is_some_and(|h| h != self.clients[c].session)
    }
    /// See above.
    pub(super) fn can_grant(&self, c: usize) -> bool {
        let holder = self.leader.lease().holder;
        self.wants_lease(c) && holder.is_none_or(|h| h == self.clients[c].session)
    }
    fn wants_lease(&self, c: usize) -> bool {
        let client = &self.clients[c];
        client.is_up() && client.wants_lease && self.leader.has_session(client.session)
    }

    /// The leader ends a session.
    pub(super) fn end_session(&mut self, session: SessionId) {
        self.leader.commit(&Command::SessionEnd { session });
        self.note(|| format!("session {session} ends"));
    }
}

/// A configuration, for a trace.
#[must_use]
pub fn shown(c: &Configuration) -> String {
    let states: Vec<String> = c.members.iter().map(|m| format!("{:?} as {:x}", m.state, m.incarnation.0)).collect();
    format!("n={} {}", c.n.0, states.join(", "))
}
