//! The leader's memory: who lives, who is heard, what it proposes by itself. Made anew at each election; nothing of it is
//! needed to be right, only to go on.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use mortar_proto::config::Configuration;
use mortar_proto::metadata::monitor::{Monitor, Timing};
use mortar_proto::metadata::options::Options;
use mortar_proto::metadata::{Command, State};
use mortar_proto::wire::session as wire;
use mortar_proto::{BrickId, ConfigNo, Ino, ServerId, SessionId, SetId, VolumeId};
use tokio::sync::mpsc;
use tonic::Status;

use super::Server;

/// How often the leader looks round.
const LOOK: Duration = Duration::from_millis(40);

/// What is known of a brick besides what the monitor keeps.
#[derive(Clone, Debug, Default)]
pub(super) struct BrickNews {
    pub(super) total_bytes: u64,
    pub(super) free_bytes: u64,
    pub(super) failed: String,
    pub(super) repaired_bytes: u64,
    /// When, and how many bytes had been repaired then: for the rate.
    pub(super) before: (u64, u64),
    pub(super) rate_bytes: u64,
}

/// What is known of a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct ServerNews {
    pub(super) heard_ms: u64,
    pub(super) applied: u64,
}

/// What is known of a session besides what the log has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SessionNews {
    pub(super) heard_ms: u64,
    /// Operations on data that its applications waited for then.
    pub(super) in_flight: u32,
}

pub(super) struct Leader {
    term: u64,
    since_ms: u64,
    pub(super) monitor: Monitor,
    pub(super) bricks: HashMap<BrickId, BrickNews>,
    pub(super) servers: HashMap<ServerId, ServerNews>,
    /// Sessions that were heard.
    pub(super) sessions: HashMap<SessionId, SessionNews>,
    watchers: HashMap<SessionId, mpsc::Sender<Result<wire::Event, Status>>>,
    /// Sessions that wait for a lease which another one holds, the longest waiting first.
    wanting: HashMap<Ino, VecDeque<SessionId>>,
    told: HashMap<SetId, ConfigNo>,
    told_options: HashMap<VolumeId, Options>,
}

fn timing(state: &State) -> Timing {
    let lease = state.volumes.values().map(|v| Options::of(v).read_lease_ms).max();
    let lease = lease.unwrap_or(Options::defaults().read_lease_ms);
    Timing {
        read_lease_ms: lease,
        clock_margin_ms: lease / 10 + 50,
        cold_start_wait_ms: 30_000,
        back_off_ms: 1_000,
        back_off_max_ms: 60_000,
    }
}

impl Leader {
    fn new(term: u64, state: &State, now_ms: u64) -> Self {
        Self {
            term,
            since_ms: now_ms,
            monitor: Monitor::new(timing(state), now_ms),
            bricks: HashMap::new(),
            servers: HashMap::new(),
            sessions: HashMap::new(),
            watchers: HashMap::new(),
            wanting: HashMap::new(),
            told: HashMap::new(),
            told_options: HashMap::new(),
        }
    }

    /// A session was heard.
    pub(super) fn session_heard(&mut self, session: SessionId, now_ms: u64) {
        self.sessions.entry(session).or_default().heard_ms = now_ms;
    }

    /// A session was heard, and says how much it has under way.
    pub(super) fn session_kept(&mut self, session: SessionId, now_ms: u64, in_flight: u32) {
        self.sessions.insert(session, SessionNews { heard_ms: now_ms, in_flight });
    }

    /// A session listens.
    pub(super) fn watch(&mut self, session: SessionId, watcher: mpsc::Sender<Result<wire::Event, Status>>) {
        self.watchers.insert(session, watcher);
    }

    /// Tells a session; one that does not listen, or is too slow to, is told nothing.
    pub(super) fn tell(&mut self, session: SessionId, event: wire::event::Event) {
        if let Some(watcher) = self.watchers.get(&session) {
            let sent = watcher.try_send(Ok(wire::Event { event: Some(event) }));
            if sent.is_err() {
                // It connects again and is shown everything anew.
                self.watchers.remove(&session);
            }
        }
    }

    /// Another session wants a lease.
    pub(super) fn recall(&mut self, holder: SessionId, ino: Ino, epoch: u64) {
        self.tell(holder, wire::event::Event::Recall(wire::Recall { ino: ino.0, epoch }));
    }

    /// A session waits for a lease that another one holds.
    pub(super) fn want(&mut self, ino: Ino, session: SessionId) {
        let waiting = self.wanting.entry(ino).or_default();
        if !waiting.contains(&session) {
            waiting.push_back(session);
        }
    }

    /// It does not wait any more.
    pub(super) fn want_no_more(&mut self, ino: Ino, session: SessionId) {
        if let Some(waiting) = self.wanting.get_mut(&ino) {
            waiting.retain(|s| *s != session);
        }
        self.wanting.retain(|_, waiting| !waiting.is_empty());
    }

    /// Who is to have the lease after `holder`, if anybody waits for it.
    pub(super) fn next_to_have(&mut self, ino: Ino, holder: SessionId) -> Option<SessionId> {
        let next = self.wanting.get(&ino)?.iter().copied().find(|s| *s != holder)?;
        self.want_no_more(ino, next);
        Some(next)
    }

    /// Tells sessions what has changed.
    fn publish(&mut self, state: &State) {
        let mut news: Vec<(VolumeId, wire::event::Event)> = Vec::new();
        for (id, set) in &state.sets {
            if self.told.insert(*id, set.configuration.n) != Some(set.configuration.n) {
                news.push((set.volume, wire::event::Event::Set(picture(state, *id, &set.configuration))));
            }
        }
        for (id, volume) in &state.volumes {
            let options = Options::of(volume);
            if self.told_options.get(id) != Some(&options) {
                news.push((*id, wire::event::Event::Options(options_event(&options))));
                self.told_options.insert(*id, options);
                self.monitor.set_timing(timing(state));
            }
        }
        for (volume, event) in news {
            let listeners: Vec<SessionId> = state
                .sessions
                .iter()
                .filter(|(id, s)| s.volume.is_none_or(|v| v == volume) && self.watchers.contains_key(id))
                .map(|(id, _)| *id)
                .collect();
            for session in listeners {
                self.tell(session, event.clone());
            }
        }
        self.told.retain(|set, _| state.sets.contains_key(set));
        self.told_options.retain(|volume, _| state.volumes.contains_key(volume));
        let gone: Vec<SessionId> = self.watchers.keys().filter(|s| !state.sessions.contains_key(s)).copied().collect();
        for session in gone {
            self.tell(session, wire::event::Event::Lapsed(wire::Lapsed { reason: "the session has ended".into() }));
            self.watchers.remove(&session);
        }
        self.sessions.retain(|session, _| state.sessions.contains_key(session));
        self.wanting.retain(|_, waiting| {
            waiting.retain(|session| state.sessions.contains_key(session));
            !waiting.is_empty()
        });
    }

    /// Sessions that were not heard for their time to live; nobody is older than this leader.
    fn lapsed(&self, state: &State, now_ms: u64) -> Vec<SessionId> {
        let ttl = |volume: Option<VolumeId>| {
            volume
                .and_then(|v| state.volumes.get(&v))
                .map_or(Options::defaults().session_ttl_ms, |v| Options::of(v).session_ttl_ms)
        };
        state
            .sessions
            .iter()
            .filter(|(id, s)| self.sessions.get(id).map_or(self.since_ms, |n| n.heard_ms) + ttl(s.volume) < now_ms)
            .map(|(id, _)| *id)
            .collect()
    }
}

/// A replica set as clients are shown it.
pub(super) fn picture(state: &State, set: SetId, configuration: &Configuration) -> wire::SetPicture {
    let address = |brick: BrickId| {
        let server = state.bricks.get(&brick).map(|b| b.server);
        server.and_then(|s| state.servers.get(&s)).map_or(String::new(), |s| s.address.clone())
    };
    wire::SetPicture {
        set: set.0,
        configuration: mortar_proto::wire::encode(configuration).into(),
        addresses: configuration.members.iter().map(|m| address(m.brick)).collect(),
    }
}

/// Options as clients are told them.
pub(super) fn options_event(options: &Options) -> wire::Options {
    wire::Options {
        session_ttl_ms: options.session_ttl_ms as u32,
        io_timeout_ms: options.io_timeout_ms as u32,
        no_quorum_ms: options.no_quorum_ms.unwrap_or(0) as u32,
        repair_rate: options.repair_rate,
    }
}

impl Server {
    /// Looks into the leader's memory.
    pub(super) fn lead<R>(&self, look: impl FnOnce(&mut Leader) -> R) -> Result<R, Status> {
        match self.leader.lock().as_mut() {
            Some(leader) if self.log.is_leader() => Ok(look(leader)),
            _ => Err(super::not_leader(self.log.leader_address().filter(|a| *a != self.address))),
        }
    }

    /// Has the leader look round at once.
    pub(super) fn poke_leader(&self) {
        self.poke.notify_one();
    }
}

pub(super) fn start(server: &Arc<Server>) {
    tokio::spawn(look_round(Arc::clone(server)));
    tokio::spawn(publish(Arc::clone(server)));
    let members = Arc::clone(server);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            if members.log.is_leader() {
                let me = members.log.identity().server;
                // One that moved tells where to. A leader that is not named was removed, and the log is about to let it out
                // of the quorum.
                let moved =
                    members.log.with_state(|s| s.servers.get(&me).is_some_and(|s| s.address != members.address));
                if moved {
                    let command = Command::ServerAdd { server: me, address: members.address.clone() };
                    let _ = members.log.propose(command, None).await;
                }
            }
        }
    });
}

/// Tells clients of changes as they are applied.
async fn publish(server: Arc<Server>) {
    let mut applied = server.log.watch_applied();
    loop {
        let _ = tokio::time::timeout(Duration::from_millis(200), applied.changed()).await;
        let mut leader = server.leader.lock();
        if let Some(leader) = leader.as_mut() {
            server.log.with_state(|state| leader.publish(state));
        }
    }
}

async fn look_round(server: Arc<Server>) {
    loop {
        let _ = tokio::time::timeout(LOOK, server.poke.notified()).await;
        let now = server.now_ms();
        let commands: Vec<Command> = {
            let mut slot = server.leader.lock();
            if !server.log.is_leader() {
                *slot = None;
                continue;
            }
            let term = server.log.term();
            server.log.with_state(|state| {
                if slot.as_ref().is_none_or(|l| l.term != term) {
                    tracing::info!(term, "this server leads the cluster");
                    *slot = Some(Leader::new(term, state, now));
                }
                let Some(leader) = slot.as_mut() else { return Vec::new() };
                let mut commands = leader.monitor.poll(state, now);
                for session in leader.lapsed(state, now) {
                    tracing::warn!(session = %session, "a session was not heard for its time to live, and ends");
                    commands.push(Command::SessionEnd { session });
                }
                commands
            })
        };
        for command in commands {
            tracing::info!(?command, "proposing");
            if let Err(e) = server.log.propose(command, None).await {
                tracing::warn!("a proposal failed: {e}");
            }
        }
    }
}
