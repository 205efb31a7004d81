//! This server's share of the metadata log: openraft, with RocksDB beneath and [`State`] on top.
//!
//! Everything else sees a [`Log`]: propose a command, look at the state, be told what was applied. An entry is durable here
//! before it is applied here `[F2]`.

mod machine;
mod membership;
mod network;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use mortar_proto::metadata::{Command, Effect, Entry, Outcome, State};
use mortar_proto::{LogIndex, ServerId, SessionId};
use openraft::error::{CheckIsLeaderError, ClientWriteError, RaftError};
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use openraft::{BasicNode, Config, Raft, ServerState, SnapshotPolicy};
use tokio::sync::{mpsc, oneshot, watch};

use crate::identity::Identity;

openraft::declare_raft_types!(
    /// The types of the metadata log.
    pub Types:
        D = Entry,
        R = Outcome,
);

/// How often the leader says that it lives, in milliseconds.
const HEARTBEAT_MS: u64 = 100;
/// How long followers wait for it, at least and at most, in milliseconds. They wait the longer one out first, which is the
/// leader's lease, and then a time between the two: a dead leader is replaced after 0.9 to 1.2 s, and should that election
/// fail, the next one ends before 2 s.
const ELECTION_MS: (u64, u64) = (300, 600);
/// How long a snapshot may be on its way, in milliseconds.
const SNAPSHOT_MS: u64 = 120_000;
/// Entries between snapshots.
const SNAPSHOT_EVERY: u64 = 5_000;
/// How long a proposal may take: without a quorum it would wait for ever.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a confirmation of the leadership may take.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a confirmation is tried again when too few answered: a message may be lost, or a disk busy.
const CONFIRM_PATIENCE: Duration = Duration::from_millis(600);

/// What was applied, in order.
#[derive(Debug)]
pub enum Applied {
    /// Look at the whole state: this is the start, or a snapshot was installed.
    Reset,
    /// One entry.
    Entry {
        /// Its index.
        index: LogIndex,
        /// What it brought about.
        effects: Vec<Effect>,
    },
}

/// Why a proposal failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// Somebody else leads, at this address if it is known.
    #[error("this server does not lead the cluster{}", .0.as_ref().map_or(String::new(), |a| format!("; {a} does")))]
    NotLeader(Option<String>),
    /// There is no quorum, or it does not answer; what was proposed may be done yet.
    #[error("{0}")]
    Unavailable(String),
}

type Confirmation = oneshot::Sender<Result<LogIndex, ProposeError>>;

/// A handle on the metadata log.
#[derive(Clone)]
pub struct Log {
    raft: Raft<Types>,
    shared: Arc<machine::Shared>,
    identity: Identity,
    confirm: mpsc::UnboundedSender<Confirmation>,
}

impl Log {
    /// Opens the log in `dir`. A server that is neither in a cluster nor on its way into one founds its own.
    ///
    /// # Errors
    /// When the disk or the log's own rules refuse.
    pub async fn open(
        dir: &Path,
        identity: Identity,
        address: &str,
    ) -> anyhow::Result<(Self, mpsc::UnboundedReceiver<Applied>)> {
        let db = store::open(&dir.join("log"))?;
        let (tell, applied) = mpsc::unbounded_channel();
        let (logs, machine, shared) = store::split(db, identity.cluster, tell)?;
        let config = Config {
            cluster_name: format!("{:032x}", identity.cluster.0),
            heartbeat_interval: HEARTBEAT_MS,
            election_timeout_min: ELECTION_MS.0,
            election_timeout_max: ELECTION_MS.1,
            install_snapshot_timeout: SNAPSHOT_MS,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: 500,
            ..Config::default()
        };
        let config = Arc::new(config.validate().context("the metadata log's times")?);
        let network = network::Network::new(identity.cluster, Arc::clone(&shared));
        let raft =
            Raft::new(identity.server.0, config, network, logs, machine).await.context("starting the metadata log")?;
        if !identity.absorbed && !raft.is_initialized().await? {
            let me = BTreeMap::from([(identity.server.0, BasicNode::new(address))]);
            raft.initialize(me).await.context("founding a cluster of one")?;
        }
        tokio::spawn(membership::run(raft.clone(), Arc::clone(&shared)));
        let (confirm, confirmations) = mpsc::unbounded_channel();
        tokio::spawn(confirm_in_batches(raft.clone(), confirmations, Arc::clone(&shared)));
        let log = Self { raft, shared, identity, confirm };
        log.tell_of_founder(address).await.context("founding a cluster of one")?;
        Ok((log, applied))
    }

    /// The state of a new cluster names its first server before anybody else can be added: one that is in the quorum and
    /// not named is let out of it. Done again after a crash in the middle; a server with others beside it was named long ago.
    async fn tell_of_founder(&self, address: &str) -> anyhow::Result<()> {
        let me = self.identity.server;
        if self.identity.absorbed || self.with_state(|state| state.servers.contains_key(&me)) {
            return Ok(());
        }
        let alone = self.raft.with_raft_state(move |state| {
            state.membership_state.effective().membership().nodes().all(|(id, _)| *id == me.0)
        });
        if !alone.await? {
            return Ok(());
        }
        self.raft.wait(Some(PROPOSE_TIMEOUT)).state(ServerState::Leader, "a cluster of one elects itself").await?;
        self.propose(Command::ServerAdd { server: me, address: address.to_owned() }, None).await?;
        Ok(())
    }

    /// Who this server is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Looks at the applied state.
    pub fn with_state<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        look(&self.shared.state.read())
    }

    /// The last index applied here.
    #[must_use]
    pub fn applied(&self) -> LogIndex {
        LogIndex(*self.shared.applied.borrow())
    }

    /// Waits until `index` is applied here.
    pub async fn wait_applied(&self, index: LogIndex, timeout: Duration) -> bool {
        let mut applied = self.shared.applied.subscribe();
        tokio::time::timeout(timeout, applied.wait_for(|at| *at >= index.0)).await.is_ok_and(|r| r.is_ok())
    }

    /// Tells of every applied index.
    #[must_use]
    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.shared.applied.subscribe()
    }

    /// Proposes a command, and waits until it is applied here.
    ///
    /// # Errors
    /// When this server does not lead, or there is no quorum.
    pub async fn propose(&self, command: Command, request: Option<(SessionId, u64)>) -> Result<Outcome, ProposeError> {
        let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let write = self.raft.client_write(Entry { time_ns, request, command });
        match tokio::time::timeout(PROPOSE_TIMEOUT, write).await {
            Ok(Ok(written)) => Ok(written.data),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))) => {
                Err(ProposeError::NotLeader(to.leader_id.and_then(|id| self.shared.address_of(id))))
            }
            Ok(Err(e)) => Err(ProposeError::Unavailable(format!("the metadata log refuses: {e}"))),
            Err(_) => Err(ProposeError::Unavailable("the metadata log has no quorum just now".into())),
        }
    }

    /// A quorum confirms, after this was called, that this server leads. Returns the commit index `[R1]`.
    ///
    /// # Errors
    /// When it does not lead, or cannot know in time.
    pub async fn confirm(&self) -> Result<LogIndex, ProposeError> {
        let (tell, told) = oneshot::channel();
        let gone = || ProposeError::Unavailable("the metadata log has stopped".into());
        self.confirm.send(tell).map_err(|_| gone())?;
        told.await.map_err(|_| gone())?
    }

    /// Confirms, and waits until what was committed by then is applied here: the state may be read as the latest.
    ///
    /// # Errors
    /// As [`Log::confirm`].
    pub async fn linearizable(&self) -> Result<(), ProposeError> {
        let commit = self.confirm().await?;
        if self.wait_applied(commit, CONFIRM_TIMEOUT).await {
            Ok(())
        } else {
            Err(ProposeError::Unavailable("this server is behind with the metadata log".into()))
        }
    }

    /// This server believes that it leads.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.raft.metrics().borrow().state == ServerState::Leader
    }

    /// The leader's address, as far as it is known.
    #[must_use]
    pub fn leader_address(&self) -> Option<String> {
        let leader = self.raft.metrics().borrow().current_leader?;
        self.shared.address_of(leader)
    }

    /// The leader.
    #[must_use]
    pub fn leader(&self) -> Option<ServerId> {
        self.raft.metrics().borrow().current_leader.map(ServerId)
    }

    /// The term: a change of it is a new leader.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.metrics().borrow().current_term
    }

    /// Stands for election at once, whoever leads; tests need it.
    ///
    /// # Errors
    /// When the log has stopped.
    pub async fn stand_for_election(&self) -> anyhow::Result<()> {
        Ok(self.raft.trigger().elect().await?)
    }

    /// Waits for the next change of leadership or membership.
    pub async fn changed(&self, timeout: Duration) {
        let mut metrics = self.raft.server_metrics();
        metrics.mark_unchanged();
        let _ = tokio::time::timeout(timeout, metrics.changed()).await;
    }

    /// Voters of the quorum.
    #[must_use]
    pub fn voters(&self) -> BTreeSet<ServerId> {
        self.raft.metrics().borrow().membership_config.membership().voter_ids().map(ServerId).collect()
    }

    /// For the peer service: openraft's own messages. Refused when they are meant for another server.
    pub(crate) async fn append(&self, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        let rpc: AppendEntriesRequest<Types> = network::open(&self.identity, body)?;
        Ok(mortar_proto::wire::encode(&self.raft.append_entries(rpc).await?))
    }
    pub(crate) async fn vote(&self, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        let rpc: VoteRequest<u64> = network::open(&self.identity, body)?;
        Ok(mortar_proto::wire::encode(&self.raft.vote(rpc).await?))
    }
    pub(crate) async fn snapshot(&self, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        let (vote, meta, data): network::SnapshotMessage = network::open(&self.identity, body)?;
        let snapshot = openraft::Snapshot { meta, snapshot: Box::new(std::io::Cursor::new(data)) };
        Ok(mortar_proto::wire::encode(&self.raft.install_full_snapshot(vote, snapshot).await?))
    }

    /// Stops.
    pub async fn stop(&self) {
        let _ = tokio::time::timeout(Duration::from_secs(3), self.raft.shutdown()).await;
    }
}

/// One round of confirmation serves all who asked before it began.
async fn confirm_in_batches(
    raft: Raft<Types>,
    mut asked: mpsc::UnboundedReceiver<Confirmation>,
    shared: Arc<machine::Shared>,
) {
    while let Some(first) = asked.recv().await {
        let mut batch = vec![first];
        while let Ok(more) = asked.try_recv() {
            batch.push(more);
        }
        let answer = match tokio::time::timeout(CONFIRM_TIMEOUT, confirmed(&raft)).await {
            Ok(Ok(read)) => Ok(read),
            Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(to)))) => {
                Err(ProposeError::NotLeader(to.leader_id.and_then(|id| shared.address_of(id))))
            }
            Ok(Err(e)) => Err(ProposeError::Unavailable(format!("the leadership cannot be confirmed: {e}"))),
            Err(_) => Err(ProposeError::Unavailable("the leadership cannot be confirmed: no quorum answers".into())),
        };
        for tell in batch {
            let _ = tell.send(answer.clone());
        }
    }
}

/// Asks the quorum, and again for a while when too few answered.
async fn confirmed(raft: &Raft<Types>) -> Result<LogIndex, RaftError<u64, CheckIsLeaderError<u64, BasicNode>>> {
    let began = Instant::now();
    loop {
        match raft.get_read_log_id().await {
            Ok((read, _)) => return Ok(LogIndex(read.map_or(0, |l| l.index))),
            Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_))) if began.elapsed() < CONFIRM_PATIENCE => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(e) => return Err(e),
        }
    }
}
