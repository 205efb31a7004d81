//! A client's talk with whoever leads: its session, its leases, changes of names. As the mount does it: one lease job of a file
//! after the other, sent again until it is answered, to one server after the other.

use mortar_proto::config::Configuration;
use mortar_proto::coordinator::{Event, OpId};
use mortar_proto::metadata::{NameError, NameOp, NewNode, Outcome};
use mortar_proto::types::{Epoch, Ino, SessionId};

use super::leader::{FromLeader, Question, Reply, ToLeader};
use super::quorum::VOTERS;
use super::world::{Connection, Happening, JANITOR, Node, World};

/// How long a server that says nothing is asked before the next one is.
const SILENT_MS: u64 = 1000;
/// Questions are asked again after this long.
const AGAIN_MS: u64 = 400;

/// What a mount asks the leader for, about one file, one at a time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Control {
    Acquire,
    Release { epoch: Epoch, finished: bool },
}

/// A client's side of its session.
#[derive(Debug)]
pub(super) struct Link {
    /// Which voter is asked.
    pub(super) voter: usize,
    /// When it was heard last.
    heard_ms: u64,
    /// What a session is being asked for with.
    nonce: u128,
    /// The session is over, as far as somebody told.
    pub(super) lapsed: bool,
    /// The stream of events.
    watch: Option<u64>,
    next_ms: u64,
}

impl Link {
    pub(super) fn new(voter: usize, nonce: u64) -> Self {
        Self { voter, heard_ms: 0, nonce: u128::from(nonce), lapsed: false, watch: None, next_ms: 0 }
    }
}

impl World {
    pub(super) fn ask_leader(&mut self, c: usize, question: Question) {
        let asker = (c, self.clients[c].generation);
        self.tell_leader(c, ToLeader::Asked(asker, question));
    }

    pub(super) fn tell_leader(&mut self, c: usize, message: ToLeader) {
        let voter = self.clients[c].link.voter;
        self.send(Node::Client(c), Node::Voter(voter), false, Happening::ToLeader(voter, message));
    }

    /// Keeps the session alive, or gets one.
    pub(super) fn session_tick(&mut self, c: usize) {
        let now = self.now;
        if c == JANITOR && self.quorum.voters[self.clients[c].home].claims.is_none() {
            // It works on the leader's own machine only.
            if let Some(session) = self.clients[c].session.filter(|_| self.quorum.voters[self.clients[c].home].up) {
                self.ask_leader(c, Question::End { session });
            }
            return self.crash_client(c, 300);
        }
        let every = (self.quorum.session_ttl_ms / 6).clamp(100, 1000);
        let link = &mut self.clients[c].link;
        let patience = if link.watch.is_some() { 3 * every + 700 } else { SILENT_MS };
        if link.heard_ms + patience <= now {
            link.voter = (link.voter + 1) % VOTERS;
            link.heard_ms = now;
            link.watch = None;
            link.next_ms = 0;
        }
        if link.next_ms > now {
            return;
        }
        let (watch, nonce, lapsed) = (link.watch, link.nonce, link.lapsed);
        match (self.clients[c].session.filter(|_| !lapsed), watch) {
            (None, _) => {
                self.clients[c].link.next_ms = now + AGAIN_MS;
                self.ask_leader(c, Question::Open { nonce });
            }
            (Some(session), None) => {
                let number = self.number();
                let link = &mut self.clients[c].link;
                (link.watch, link.next_ms) = (Some(number), now + every);
                self.ask_leader(c, Question::Watch { session, number });
            }
            (Some(session), Some(number)) => {
                self.clients[c].link.next_ms = now + every;
                self.ask_leader(c, Question::Alive { session, number });
            }
        }
    }

    pub(super) fn leader_says(&mut self, message: FromLeader) {
        match message {
            FromLeader::Beat { slot, generation, sent_ms, commit, agree } => {
                if self.bricks[slot].runs(generation) && self.bricks[slot].paused_until <= self.now {
                    self.beat_answered(slot, sent_ms, commit, agree);
                }
            }
            FromLeader::Told(v, (c, generation), reply) => {
                if self.clients[c].runs(generation) {
                    self.told(v, c, reply);
                }
            }
        }
    }

    fn told(&mut self, v: usize, c: usize, reply: Reply) {
        let now = self.now;
        let link = &mut self.clients[c].link;
        if let Reply::NotLeader(hint) = reply {
            if link.voter == v {
                link.voter = if hint == v { (v + 1) % VOTERS } else { hint };
                (link.watch, link.heard_ms, link.next_ms) = (None, now, now + 60);
            }
            return;
        }
        // What a stream says that is given up is not heard.
        let is_stale = |number: u64| link.watch != Some(number);
        match reply {
            Reply::Configured(number, _) | Reply::Alive(number) | Reply::Recall(number, ..) if is_stale(number) => {
                return;
            }
            _ if link.voter == v => link.heard_ms = now,
            _ => {}
        }
        match reply {
            Reply::NotLeader(_) | Reply::Alive(_) => {}
            Reply::Opened(nonce, session, configuration) => self.session_opened(c, nonce, session, configuration),
            Reply::Ended(session) => self.session_ended(c, session),
            Reply::Configured(_, configuration) => self.learn(c, configuration),
            Reply::Recall(_, ino, epoch) => {
                self.note(|| format!("c{c} recalled {ino:?} e={epoch}"));
                self.tell(c, ino, Event::Recalled(epoch), None);
            }
            Reply::Granted(ino, number, epoch, recover) => self.granted(c, ino, number, epoch, recover),
            Reply::Released(ino, number) => {
                self.control_done(c, ino, number);
            }
            Reply::Named(session, number, outcome) => self.named(c, session, number, &outcome),
        }
    }

    fn learn(&mut self, c: usize, configuration: Configuration) {
        if self.clients[c].configuration.is_none_or(|old| old.n < configuration.n) {
            self.clients[c].configuration = Some(configuration);
            self.event(|| format!("c{c} learns n={}", configuration.n));
            self.tell_all(c, &Event::Configured(configuration));
        }
    }

    fn session_opened(&mut self, c: usize, nonce: u128, session: SessionId, configuration: Configuration) {
        let client = &mut self.clients[c];
        if client.link.nonce != nonce || client.session.is_some() && !client.link.lapsed {
            return;
        }
        let again = client.session.replace(session).is_some();
        client.link.lapsed = false;
        client.link.next_ms = 0;
        let generation = client.generation;
        self.event(|| format!("c{c} has session {session}"));
        if again {
            // Leases are gone, and links speak for the new session.
            self.tell_all(c, &Event::LeaseLost);
        }
        self.learn(c, configuration);
        for s in 0..3 {
            if again {
                let number = self.clients[c].links[s];
                self.link_broken(Connection { client: c, slot: s, number });
            } else {
                self.after(0, Happening::Connect(c, generation, s));
            }
        }
    }

    fn session_ended(&mut self, c: usize, session: SessionId) {
        if self.clients[c].session != Some(session) || self.clients[c].link.lapsed {
            return;
        }
        self.event(|| format!("c{c} lost its session"));
        let nonce = self.number();
        let link = &mut self.clients[c].link;
        (link.lapsed, link.watch, link.nonce, link.next_ms) = (true, None, u128::from(nonce), 0);
    }

    // -- leases --------------------------------------------------------------------------------------------------------

    pub(super) fn want(&mut self, c: usize, ino: Ino, control: Control) {
        let number = self.number();
        let queue = self.clients[c].control.entry(ino).or_default();
        queue.push_back((number, control));
        if queue.len() == 1 {
            self.send_control(c, ino);
        }
    }

    fn send_control(&mut self, c: usize, ino: Ino) {
        let front = self.clients[c].control.get(&ino).and_then(|q| q.front()).copied();
        let (Some((number, control)), Some(session)) = (front, self.clients[c].session) else { return };
        let question = match control {
            Control::Acquire => Question::Acquire { session, ino, number },
            Control::Release { epoch, finished } => Question::Release { session, ino, number, epoch, finished },
        };
        self.ask_leader(c, question);
    }

    /// What was not answered is asked again.
    pub(super) fn ask_controls_again(&mut self, c: usize) {
        if self.clients[c].next_control > self.now {
            return;
        }
        self.clients[c].next_control = self.now + AGAIN_MS;
        let files: Vec<Ino> = self.clients[c].control.keys().copied().collect();
        for ino in files {
            self.send_control(c, ino);
        }
        self.send_name(c);
    }

    fn control_done(&mut self, c: usize, ino: Ino, number: u64) -> bool {
        let Some(queue) = self.clients[c].control.get_mut(&ino) else { return false };
        if queue.front().is_none_or(|f| f.0 != number) {
            return false;
        }
        queue.pop_front();
        self.send_control(c, ino);
        true
    }

    fn granted(&mut self, c: usize, ino: Ino, number: u64, epoch: Epoch, recover: bool) {
        let queue = self.clients[c].control.entry(ino).or_default();
        if queue.front().is_none_or(|f| f.0 != number) {
            return;
        }
        let last = self.clients[c].last_epoch.get(&ino).copied().unwrap_or_default();
        if epoch <= last {
            // A grant that was lost on its way here, or that the bricks no longer honour: it ends, and the next one begins
            // with a recovery.
            let (release, acquire) = (self.number(), self.number());
            if let Some(queue) = self.clients[c].control.get_mut(&ino) {
                queue.pop_front();
                queue.push_front((acquire, Control::Acquire));
                queue.push_front((release, Control::Release { epoch, finished: false }));
            }
            return self.send_control(c, ino);
        }
        self.control_done(c, ino, number);
        self.clients[c].last_epoch.insert(ino, epoch);
        let foreign = last.0 != 0 && epoch != last.next();
        self.event(|| format!("c{c} granted {ino:?} e={epoch} recover={recover} foreign={foreign}"));
        self.tell(c, ino, Event::Granted { epoch, recover, foreign }, None);
    }

    // -- names ---------------------------------------------------------------------------------------------------------

    /// An application makes a file that must not exist yet, and removes it again.
    pub(super) fn make_and_remove(&mut self, c: usize, op: OpId) {
        let (parent, name) = (self.quorum.root, format!("n{}", op.0).into_bytes());
        let node = NewNode::File;
        let (mode, uid, gid) = (0o600, 0, 0);
        let create =
            NameOp::Create { parent, name: name.clone(), node, mode, uid, gid, or_existing: false, open: false };
        for operation in [create, NameOp::Unlink { parent, name }] {
            let number = self.number();
            self.clients[c].names.push_back((number, op, operation));
        }
        self.send_name(c);
    }

    fn send_name(&mut self, c: usize) {
        let front = self.clients[c].names.front().cloned();
        if let (Some((number, _, operation)), Some(session)) = (front, self.clients[c].session) {
            let session = *self.clients[c].named_as.get_or_insert(session);
            self.ask_leader(c, Question::Name { session, number, operation });
        }
    }

    /// Sent again under its session and number, a change of names is answered as it was the first time.
    fn named(&mut self, c: usize, session: SessionId, number: u64, outcome: &Outcome) {
        if self.clients[c].named_as != Some(session) {
            return;
        }
        let Some((_, op, operation)) = self.clients[c].names.front().filter(|n| n.0 == number).cloned() else { return };
        self.clients[c].named_as = None;
        if *outcome == Outcome::Errno(NameError::SessionEnded) {
            // It was not done, and is asked for under the next session.
            return;
        }
        self.clients[c].names.pop_front();
        let is_right = match operation {
            NameOp::Create { .. } => matches!(outcome, Outcome::Node { created: true, .. }),
            _ => matches!(outcome, Outcome::Done | Outcome::Node { .. }),
        };
        if !is_right {
            self.fail(|| format!("State: {operation:?} of c{c} ends in {outcome:?}"));
        } else if self.clients[c].names.iter().all(|n| n.1 != op) {
            self.name_done(c, op);
        }
        self.send_name(c);
    }
}
