//! What a voter does that believes to lead: it hears bricks and clients, asks the real [`Monitor`] what to propose, tells
//! clients. As `brickd` does it, question by question: what is answered after a quorum has confirmed the leadership, what from
//! the voter's own state as it is, what when a proposal is committed.

use std::collections::{BTreeMap, VecDeque};

use mortar_proto::config::{Configuration, Slot};
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::metadata::monitor::{Beat, Monitor};
use mortar_proto::metadata::{Command, NameError, NameOp, Outcome};
use mortar_proto::types::{ConfigNo, Epoch, Ino, LogIndex, SessionId};

use super::quorum::{VOLUME, configuration_of, lease_of};
use super::world::{Happening, JANITOR, Node, World};

/// How long somebody who does not ask again counts as waiting for a lease: about until the end of a connection is noticed.
const WANTING_MS: u64 = 1500;

/// Who asks: a client, and which of its starts.
pub type Asker = (usize, u64);

/// To a voter.
#[derive(Clone, Debug)]
pub enum ToLeader {
    /// From a brick.
    Beat {
        /// Which.
        slot: usize,
        /// Its start.
        generation: u64,
        /// When it was sent, by the brick's clock.
        sent_ms: u64,
        /// What it says.
        beat: Beat,
    },
    /// From a client: a brick does not answer.
    Suspect(Slot, ConfigNo),
    /// From a client.
    Asked(Asker, Question),
}

/// What a client asks the leader.
#[derive(Clone, Debug)]
pub enum Question {
    /// A session, please.
    Open {
        /// Drawn by the client.
        nonce: u128,
    },
    /// Tell me everything from now on.
    Watch {
        /// The session.
        session: SessionId,
        /// The stream's number.
        number: u64,
    },
    /// I live; on a stream.
    Alive {
        /// The session.
        session: SessionId,
        /// The stream's number.
        number: u64,
    },
    /// The lease, please.
    Acquire {
        /// The session.
        session: SessionId,
        /// Which file.
        ino: Ino,
        /// The request's number.
        number: u64,
    },
    /// Have it back.
    Release {
        /// The session.
        session: SessionId,
        /// Which file.
        ino: Ino,
        /// The request's number.
        number: u64,
        /// Which grant.
        epoch: Epoch,
        /// [W2] had ended.
        finished: bool,
    },
    /// A change of names.
    Name {
        /// The session.
        session: SessionId,
        /// The request's number, the same when it is sent again.
        number: u64,
        /// What.
        operation: NameOp,
    },
    /// The session is over.
    End {
        /// The session.
        session: SessionId,
    },
}

/// From a voter.
#[derive(Clone, Debug)]
pub enum FromLeader {
    /// The answer to a heartbeat.
    Beat {
        /// Which brick.
        slot: usize,
        /// Its start.
        generation: u64,
        /// When the heartbeat was sent.
        sent_ms: u64,
        /// The commit index.
        commit: LogIndex,
        /// It shall agree to its `Out`.
        agree: bool,
    },
    /// To a client, from this voter.
    Told(usize, Asker, Reply),
}

/// What a client is told.
#[derive(Clone, Debug)]
pub enum Reply {
    /// This one does not lead; perhaps that one does.
    NotLeader(usize),
    /// The session that was asked for.
    Opened(u128, SessionId, Configuration),
    /// The session has ended.
    Ended(SessionId),
    /// On a stream: the configuration.
    Configured(u64, Configuration),
    /// On a stream: I heard you.
    Alive(u64),
    /// On a stream: somebody wants the lease.
    Recall(u64, Ino, Epoch),
    /// The lease: which request, which grant, and whether to recover.
    Granted(Ino, u64, Epoch, bool),
    /// A release was taken.
    Released(Ino, u64),
    /// What became of a session's change of names.
    Named(SessionId, u64, Outcome),
}

/// What is done when a proposal is committed and applied by who made it.
#[derive(Clone, Debug)]
pub enum Then {
    /// The leader looks on at what there is to propose.
    LookOn,
    /// Tells the session that was opened.
    Opened(Asker, u128),
    /// Tells the grant.
    Granted(Asker, SessionId, Ino, u64),
    /// Tells that the release was taken.
    Released(Asker, Ino, u64),
    /// Tells one that its release was taken and another one of the grant; or else there is only a release.
    HandedOver((Asker, u64), (Asker, u64), Command),
    /// Tells the outcome.
    Named(Asker, SessionId, u64),
    /// The administrator is told that all bricks are going to be compared.
    Compared,
    /// Nobody is told.
    Nothing,
}

/// Who waits for a lease.
#[derive(Clone, Copy, Debug)]
struct Wanting {
    session: SessionId,
    asker: Asker,
    number: u64,
    until_ms: u64,
}

/// What a leader keeps in mind; nothing of it is needed to be right.
#[derive(Debug)]
pub struct Leader {
    term: u64,
    since_ms: u64,
    pub(super) monitor: Monitor,
    heard: BTreeMap<SessionId, u64>,
    watchers: BTreeMap<SessionId, (Asker, u64)>,
    /// Who waits for a lease that another one holds, the longest waiting first, with the number of the request.
    /// They are forgotten when they ask no more.
    wanting: BTreeMap<Ino, VecDeque<Wanting>>,
    told: ConfigNo,
    to_propose: VecDeque<Command>,
    /// A proposal of its own that is not committed, and how long it is waited for.
    pub(super) proposing: Option<(u64, u64)>,
}

impl World {
    pub(super) fn leader(&mut self, v: usize) -> Option<&mut Leader> {
        let voter = &mut self.quorum.voters[v];
        voter.claims.and(voter.leader.as_mut())
    }

    /// A voter looks whether it leads, and what there is to propose.
    pub(super) fn look_round(&mut self, v: usize) {
        let (now, own_now, timing) = (self.now, self.voter_now(v), self.quorum.timing);
        let ttl = self.quorum.session_ttl_ms;
        let voter = &mut self.quorum.voters[v];
        let Some(term) = voter.claims else {
            voter.leader = None;
            return;
        };
        if voter.leader.as_ref().is_none_or(|l| l.term != term) {
            voter.leader = Some(Leader {
                term,
                since_ms: own_now,
                monitor: Monitor::new(timing, own_now),
                heard: BTreeMap::new(),
                watchers: BTreeMap::new(),
                wanting: BTreeMap::new(),
                told: ConfigNo(0),
                to_propose: VecDeque::new(),
                proposing: None,
            });
        }
        let (Some(leader), state) = (voter.leader.as_mut(), &voter.state) else { return };
        if leader.proposing.is_some_and(|(_, until)| until <= now) {
            leader.proposing = None;
        }
        if leader.proposing.is_none() {
            if leader.to_propose.is_empty() {
                leader.to_propose.extend(leader.monitor.poll(state, own_now));
                let lapsed = state
                    .sessions
                    .keys()
                    .filter(|id| leader.heard.get(id).copied().unwrap_or(leader.since_ms) + ttl < own_now);
                leader.to_propose.extend(lapsed.map(|session| Command::SessionEnd { session: *session }));
            }
            if let Some(command) = leader.to_propose.pop_front() {
                if matches!(command, Command::SessionEnd { .. }) {
                    self.count("session lapsed");
                }
                if let Command::PutOut { n, slot, .. } = command {
                    // Of an older one it comes to nothing.
                    let committed = self.configuration();
                    if committed.n == n {
                        self.put_out_proposed(&committed, slot);
                    }
                }
                self.propose(v, None, command, Then::LookOn);
            }
        }
        self.publish(v);
    }

    /// Tells those who watch what has changed.
    fn publish(&mut self, v: usize) {
        let state = std::rc::Rc::clone(&self.quorum.voters[v].state);
        let configuration = configuration_of(&state, self.quorum.set);
        let Some(leader) = self.leader(v) else { return };
        let mut told = Vec::new();
        if leader.told != configuration.n {
            leader.told = configuration.n;
            told.extend(leader.watchers.values().map(|(a, number)| (*a, Reply::Configured(*number, configuration))));
        }
        let gone: Vec<SessionId> =
            leader.watchers.keys().filter(|s| !state.sessions.contains_key(s)).copied().collect();
        for session in gone {
            told.extend(leader.watchers.remove(&session).map(|(asker, _)| (asker, Reply::Ended(session))));
        }
        leader.heard.retain(|session, _| state.sessions.contains_key(session));
        for waiting in leader.wanting.values_mut() {
            waiting.retain(|w| state.sessions.contains_key(&w.session));
        }
        for (asker, reply) in told {
            self.reply(v, asker, reply, true);
        }
    }

    fn reply(&mut self, v: usize, asker: Asker, reply: Reply, stream: bool) {
        let told = FromLeader::Told(v, asker, reply);
        self.send(Node::Voter(v), Node::Client(asker.0), stream, Happening::FromLeader(told));
    }

    /// A proposal of this voter's is committed, and applied here.
    pub(super) fn proposed(&mut self, v: usize, number: u64, then: Then, outcome: Outcome) {
        let own_now = self.voter_now(v);
        let configuration = configuration_of(&self.quorum.voters[v].state, self.quorum.set);
        match (then, outcome) {
            (Then::LookOn, _) => {
                if let Some(leader) = self.leader(v)
                    && leader.proposing.is_some_and(|(own, _)| own == number)
                {
                    leader.proposing = None;
                }
            }
            (Then::Opened(asker, nonce), Outcome::Session { session, .. }) => {
                if let Some(leader) = self.leader(v) {
                    leader.heard.insert(session, own_now);
                    self.reply(v, asker, Reply::Opened(nonce, session, configuration), false);
                }
            }
            (Then::Opened(..), other) => self.fail(|| format!("State: opening a session gave {other:?}")),
            (Then::Granted(asker, session, ino, asked), Outcome::Lease { epoch, recover, .. }) => {
                if let Some(waiting) = self.leader(v).and_then(|l| l.wanting.get_mut(&ino)) {
                    waiting.retain(|w| w.session != session);
                }
                self.reply(v, asker, Reply::Granted(ino, asked, epoch, recover), false);
            }
            (Then::Granted(asker, session, ..), Outcome::Errno(NameError::SessionEnded)) => {
                self.reply(v, asker, Reply::Ended(session), false);
            }
            // Somebody was faster; the client asks again.
            (Then::Granted(..) | Then::Compared, Outcome::Superseded) | (Then::Nothing, _) => {}
            (Then::Compared, _) => self.compared(),
            (Then::Granted(..), other) => self.fail(|| format!("State: a lease was refused: {other:?}")),
            (Then::HandedOver(from, to, release), outcome) => {
                let Command::LeaseRelease { ino, .. } = release else { return };
                if let Outcome::Lease { epoch, recover, .. } = outcome {
                    self.count("handed over");
                    self.reply(v, to.0, Reply::Granted(ino, to.1, epoch, recover), false);
                    self.reply(v, from.0, Reply::Released(ino, from.1), false);
                } else {
                    self.propose(v, None, release, Then::Released(from.0, ino, from.1));
                }
            }
            (Then::Released(asker, ino, asked), _) => self.reply(v, asker, Reply::Released(ino, asked), false),
            (Then::Named(asker, session, asked), outcome) => {
                self.reply(v, asker, Reply::Named(session, asked, outcome), false);
            }
        }
    }

    /// A message reaches a voter.
    pub(super) fn leader_gets(&mut self, v: usize, message: ToLeader) {
        if !self.quorum.voters[v].up {
            return;
        }
        if self.leader(v).is_none() {
            if let ToLeader::Asked(asker, _) = message {
                let hint = self.quorum.leads.unwrap_or(v);
                self.reply(v, asker, Reply::NotLeader(hint), false);
            }
            return;
        }
        match message {
            // Answered only after a quorum has confirmed, since it came, that this one leads [R1].
            ToLeader::Beat { .. } | ToLeader::Asked(_, Question::Watch { .. } | Question::Open { .. }) => {
                let commit = self.confirms(v).then(|| self.quorum.committed());
                if commit.is_none() {
                    self.count("not confirmed");
                }
                let generation = self.quorum.voters[v].generation;
                let delay = self.rng.delay(self.delay_ms * 2, self.delay_ms * 10);
                self.after(delay, Happening::Confirmed { voter: v, generation, commit, message });
            }
            ToLeader::Suspect(slot, n) => {
                let (set, state) = (self.quorum.set, std::rc::Rc::clone(&self.quorum.voters[v].state));
                if let Some(leader) = self.leader(v)
                    && leader.monitor.suspect(&state, set, n, slot)
                {
                    self.event(|| format!("v{v} hears that b{} is suspected under n={n}", slot.0));
                }
                self.look_round(v);
            }
            ToLeader::Asked(asker, question) => self.asked(v, asker, question),
        }
    }

    /// A quorum should have confirmed by now that this voter leads; `commit` is what was committed when it did.
    pub(super) fn confirmed(&mut self, v: usize, commit: Option<LogIndex>, message: ToLeader) {
        let commit = commit.or_else(|| self.confirms(v).then(|| self.quorum.committed()));
        let unconfirmed = left_out(Rule::R1Quorum) && matches!(message, ToLeader::Beat { .. });
        let commit = commit.or_else(|| unconfirmed.then(|| LogIndex(self.quorum.voters[v].applied as u64)));
        let (Some(commit), true) = (commit, self.leader(v).is_some()) else { return };
        let own_now = self.voter_now(v);
        match message {
            ToLeader::Beat { slot, generation, sent_ms, beat } => {
                let committed = self.configuration();
                if beat.registration.incarnation == committed.members[slot].incarnation || beat.known >= committed.n {
                    self.heard[slot].insert(beat.registration.incarnation, self.now);
                }
                let state = std::rc::Rc::clone(&self.quorum.voters[v].state);
                let Some(leader) = self.leader(v) else { return };
                let asked = leader.monitor.heartbeat(&state, own_now, &[beat]);
                let agree = asked.contains(&beat.brick);
                let is_withheld = leader.monitor.withholds(&state, beat.brick);
                let told = FromLeader::Beat { slot, generation, sent_ms, commit, agree };
                if !is_withheld {
                    self.send(Node::Voter(v), Node::Brick(slot), false, Happening::FromLeader(told));
                }
                self.look_round(v);
            }
            ToLeader::Asked(asker, Question::Watch { session, number }) => {
                self.catch_up_to(v, commit);
                let state = std::rc::Rc::clone(&self.quorum.voters[v].state);
                if !state.sessions.contains_key(&session) {
                    return self.reply(v, asker, Reply::Ended(session), false);
                }
                let configuration = configuration_of(&state, self.quorum.set);
                if let Some(leader) = self.leader(v) {
                    leader.heard.insert(session, own_now);
                    leader.watchers.insert(session, (asker, number));
                }
                self.reply(v, asker, Reply::Configured(number, configuration), true);
            }
            ToLeader::Asked(asker, Question::Open { nonce }) => {
                self.catch_up_to(v, commit);
                let volume = if asker.0 == JANITOR { String::new() } else { VOLUME.into() };
                let client = format!("c{}", asker.0);
                let command = Command::SessionOpen { nonce, volume, client, address: String::new() };
                self.propose(v, None, command, Then::Opened(asker, nonce));
            }
            _ => {}
        }
    }

    fn catch_up_to(&mut self, v: usize, commit: LogIndex) {
        if (self.quorum.voters[v].applied as u64) < commit.0 {
            self.catch_up(v);
        }
    }

    fn asked(&mut self, v: usize, asker: Asker, question: Question) {
        let own_now = self.voter_now(v);
        let state = std::rc::Rc::clone(&self.quorum.voters[v].state);
        match question {
            Question::Alive { session, number } => {
                let known = state.sessions.contains_key(&session);
                let Some(leader) = self.leader(v) else { return };
                // Not its stream, or a session that is over: the stream breaks, which the client finds out.
                if known && leader.watchers.get(&session) == Some(&(asker, number)) {
                    leader.heard.insert(session, own_now);
                    self.reply(v, asker, Reply::Alive(number), true);
                }
            }
            Question::Acquire { session, ino, number } => {
                if !state.sessions.contains_key(&session) {
                    return self.reply(v, asker, Reply::Ended(session), false);
                }
                let lease = lease_of(&state, ino).unwrap_or_default();
                match lease.holder.filter(|holder| *holder != session) {
                    None => {
                        let command = Command::LeaseGrant { ino, to: session, from: None };
                        self.propose(v, None, command, Then::Granted(asker, session, ino, number));
                    }
                    Some(holder) => {
                        if let Some(leader) = self.leader(v) {
                            let waiting = leader.wanting.entry(ino).or_default();
                            let new = Wanting { session, asker, number, until_ms: own_now + WANTING_MS };
                            match waiting.iter_mut().find(|w| w.session == session) {
                                Some(known) => *known = new,
                                None => waiting.push_back(new),
                            }
                        }
                        let watcher = self.leader(v).and_then(|l| l.watchers.get(&holder).copied());
                        if let Some((asker, number)) = watcher {
                            self.reply(v, asker, Reply::Recall(number, ino, lease.epoch), true);
                        }
                    }
                }
            }
            Question::Release { session, ino, number, epoch, finished } => {
                let release = Command::LeaseRelease { ino, session, epoch, finished };
                let waiting = self.leader(v).and_then(|l| l.wanting.get_mut(&ino));
                let next = waiting.and_then(|w| {
                    w.retain(|w| w.until_ms > own_now);
                    w.iter().position(|w| w.session != session).and_then(|at| w.remove(at))
                });
                match next {
                    // [W1] The release and the next grant are one entry.
                    Some(next) => {
                        let to = next.session;
                        let grant = Command::LeaseGrant { ino, to, from: Some((session, epoch, finished)) };
                        let then = Then::HandedOver((asker, number), (next.asker, next.number), release);
                        self.propose(v, None, grant, then);
                    }
                    None => self.propose(v, None, release, Then::Released(asker, ino, number)),
                }
            }
            Question::Name { session, number, operation } => {
                let command = Command::Name { session, operation };
                self.propose(v, Some((session, number)), command, Then::Named(asker, session, number));
            }
            Question::End { session } => self.propose(v, None, Command::SessionEnd { session }, Then::Nothing),
            Question::Open { .. } | Question::Watch { .. } => {}
        }
    }
}
