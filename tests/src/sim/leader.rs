//! Whoever leads the log: takes messages in, commits, tells bricks and clients. It pauses, and is replaced by one that knows
//! only the log.

use std::collections::BTreeMap;

use mortar_proto::config::{Configuration, Slot};
use mortar_proto::metadata::monitor::Beat;
use mortar_proto::metadata::{Command, Effect, Outcome};
use mortar_proto::types::{BootId, ConfigNo, Epoch, Incarnation, Ino, LogIndex, SessionId};

use super::log::Log;
use super::monitor::Monitor;
use super::world::{CLIENTS, Happening, Node, TIMING, World};

/// To the leader.
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
    /// From a client: what is the configuration?
    Refresh(usize, u64),
    /// From a client: I live.
    KeepAlive {
        /// Which.
        client: usize,
        /// Its start.
        generation: u64,
        /// Its session; `None`: it wants one.
        session: Option<SessionId>,
    },
    /// From a client: the lease, please.
    Acquire {
        /// Which.
        client: usize,
        /// Its start.
        generation: u64,
        /// Its session.
        session: SessionId,
        /// Which file.
        ino: Ino,
        /// The request's number.
        number: u64,
    },
    /// From a client: have it back.
    Release {
        /// Which.
        client: usize,
        /// Its start.
        generation: u64,
        /// Its session.
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
}

/// From the leader.
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
    /// A configuration, for a client.
    Configured(usize, u64, Configuration),
    /// A client's session; `None`: it has ended.
    Session(usize, u64, Option<SessionId>),
    /// A lease.
    Granted {
        /// Whom.
        client: usize,
        /// Its start.
        generation: u64,
        /// Under which session.
        session: SessionId,
        /// Which file.
        ino: Ino,
        /// The request's number.
        number: u64,
        /// Which grant, and whether to recover; `None`: refused.
        grant: Option<(Epoch, bool)>,
    },
    /// A release was taken.
    Released {
        /// Whom.
        client: usize,
        /// Its start.
        generation: u64,
        /// Which file.
        ino: Ino,
        /// The request's number.
        number: u64,
    },
    /// Somebody wants the lease.
    Recall {
        /// Whom.
        client: usize,
        /// Its start.
        generation: u64,
        /// Which file.
        ino: Ino,
        /// Which grant.
        epoch: Epoch,
    },
}

/// The leader.
#[derive(Debug)]
pub struct Leader {
    /// The log.
    pub log: Log,
    /// What it knows of the bricks.
    pub monitor: Monitor,
    /// A session that is not heard for this long ends.
    pub session_ttl_ms: u64,
    /// It does nothing until then.
    pub paused_until: u64,
    /// Sessions: the client, its start, and when it was heard last.
    pub heard: BTreeMap<SessionId, (usize, u64, u64)>,
    /// Who waits for a recalled lease.
    waiting: BTreeMap<Ino, (SessionId, usize, u64, u64)>,
}

impl Leader {
    /// The first one.
    #[must_use]
    pub fn new(files: &[Ino], incarnations: [Incarnation; 3], boots: [BootId; 3], now_ms: u64) -> Self {
        Self {
            log: Log::new(files, incarnations, boots),
            monitor: Monitor::new(TIMING, now_ms),
            session_ttl_ms: 2000,
            paused_until: 0,
            heard: BTreeMap::new(),
            waiting: BTreeMap::new(),
        }
    }
    /// Another one is elected.
    pub fn elected(&mut self, now_ms: u64) {
        self.monitor = Monitor::new(TIMING, now_ms);
        self.waiting.clear();
        for heard in self.heard.values_mut() {
            heard.2 = now_ms;
        }
    }
}

impl World {
    fn commit(&mut self, request: Option<(SessionId, u64)>, command: &Command) -> Outcome {
        let before = self.leader.log.entries.len();
        let old = self.configuration();
        let outcome = self.leader.log.propose(request, command);
        if self.leader.log.entries.len() > before {
            self.event(|| format!("LOG {before} {command:?} -> {outcome:?}"));
            let effects = self.leader.log.entries[before].clone();
            for effect in effects {
                if let Effect::Configured { configuration, cold_start, .. } = effect {
                    self.configuration_committed(&old, &configuration, cold_start);
                    for client in 0..=CLIENTS {
                        let generation = self.clients[client].generation;
                        let told = FromLeader::Configured(client, generation, configuration);
                        self.send(Node::Leader, Node::Client(client), false, Happening::FromLeader(told));
                    }
                }
            }
            for slot in 0..3 {
                let generation = self.bricks[slot].generation;
                self.send(Node::Leader, Node::Brick(slot), false, Happening::Apply(slot, generation));
            }
        }
        outcome
    }

    pub(super) fn leader_tick(&mut self) {
        let now = self.now;
        for _ in 0..3 {
            let Some(command) = self.leader.monitor.poll(&self.leader.log, now) else { break };
            self.commit(None, &command);
        }
        let ttl = self.leader.session_ttl_ms;
        let gone: Vec<SessionId> =
            self.leader.heard.iter().filter(|(_, h)| h.2 + ttl <= now).map(|(s, _)| *s).collect();
        for session in gone {
            self.leader.heard.remove(&session);
            self.count("session lapsed");
            self.commit(None, &Command::SessionEnd { session });
        }
    }

    fn recall(&mut self, ino: Ino) {
        let Some(lease) = self.leader.log.leases.get(&ino).copied() else { return };
        let Some((client, generation, _)) = lease.holder.and_then(|h| self.leader.heard.get(&h).copied()) else {
            return;
        };
        let message = FromLeader::Recall { client, generation, ino, epoch: lease.epoch };
        self.send(Node::Leader, Node::Client(client), false, Happening::FromLeader(message));
    }

    fn grant(
        &mut self,
        (session, client, generation, number): (SessionId, usize, u64, u64),
        ino: Ino,
        from: Option<(SessionId, Epoch, bool)>,
    ) {
        let outcome = self.commit(Some((session, number)), &Command::LeaseGrant { ino, to: session, from });
        let grant = match outcome {
            Outcome::Lease { epoch, recover, .. } => Some((epoch, recover)),
            _ => None,
        };
        let message = FromLeader::Granted { client, generation, session, ino, number, grant };
        self.send(Node::Leader, Node::Client(client), false, Happening::FromLeader(message));
    }

    pub(super) fn leader_gets(&mut self, message: ToLeader) {
        let now = self.now;
        match message {
            ToLeader::Beat { slot, generation, sent_ms, beat } => {
                self.heard[slot] = (beat.registration.incarnation, now);
                let asked = self.leader.monitor.heartbeat(&self.leader.log, now, &[beat]);
                let commit = LogIndex(self.leader.log.entries.len() as u64);
                let message =
                    FromLeader::Beat { slot, generation, sent_ms, commit, agree: asked.contains(&beat.brick) };
                self.send(Node::Leader, Node::Brick(slot), false, Happening::FromLeader(message));
            }
            ToLeader::Suspect(slot, n) => {
                self.note(|| format!("L suspect b{} n={n}", slot.0));
                self.leader.monitor.suspect(&self.leader.log, now, n, slot);
            }
            ToLeader::Refresh(client, generation) => {
                let message = FromLeader::Configured(client, generation, self.configuration());
                self.send(Node::Leader, Node::Client(client), false, Happening::FromLeader(message));
            }
            ToLeader::KeepAlive { client, generation, session } => {
                let session = match session {
                    Some(session) if self.leader.log.sessions.contains(&session) => Some(session),
                    Some(_) => None,
                    None => {
                        let command = Command::SessionOpen {
                            nonce: u128::from(generation),
                            volume: "v".into(),
                            client: format!("c{client}"),
                            address: String::new(),
                        };
                        match self.commit(None, &command) {
                            Outcome::Session { session, .. } => Some(session),
                            _ => None,
                        }
                    }
                };
                if let Some(session) = session {
                    self.leader.heard.insert(session, (client, generation, now));
                }
                let message = FromLeader::Session(client, generation, session);
                self.send(Node::Leader, Node::Client(client), false, Happening::FromLeader(message));
                let message = FromLeader::Configured(client, generation, self.configuration());
                self.send(Node::Leader, Node::Client(client), false, Happening::FromLeader(message));
            }
            ToLeader::Acquire { client, generation, session, ino, number } => {
                let asker = (session, client, generation, number);
                let Some(lease) = self.leader.log.leases.get(&ino).copied() else { return };
                match lease.holder {
                    None => {
                        self.grant(asker, ino, None);
                    }
                    // Our own, which we do not know of or have given up: what it left is to be settled.
                    Some(holder) if holder == session => {
                        self.grant(asker, ino, Some((session, lease.epoch, false)));
                    }
                    Some(_) => {
                        self.leader.waiting.insert(ino, asker);
                        self.recall(ino);
                    }
                }
            }
            ToLeader::Release { client, generation, session, ino, number, epoch, finished } => {
                let held =
                    self.leader.log.leases.get(&ino).is_some_and(|l| l.holder == Some(session) && l.epoch == epoch);
                let asker = self.leader.waiting.remove(&ino).filter(|_| held);
                if let Some(asker) = asker {
                    self.grant(asker, ino, Some((session, epoch, finished)));
                }
                // The one who waited may be gone, or may have had its answer long ago: then nobody gets it.
                let still =
                    self.leader.log.leases.get(&ino).is_some_and(|l| l.holder == Some(session) && l.epoch == epoch);
                if still || !held {
                    let command = Command::LeaseRelease { ino, session, epoch, finished };
                    self.commit(Some((session, number)), &command);
                }
                let message = FromLeader::Released { client, generation, ino, number };
                self.send(Node::Leader, Node::Client(client), false, Happening::FromLeader(message));
            }
        }
    }
}
