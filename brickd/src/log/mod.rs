//! This server's share of the metadata log: openraft, with RocksDB beneath and [`State`] on top.
//!
//! Everything else sees a [`Log`]: propose a command, look at the state, be told what was applied. An entry is durable here
//! before it is applied here `[F2]`.

mod machine;
mod network;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use mortar_proto::metadata::{Command, Effect, Entry, Outcome, State};
use mortar_proto::{LogIndex, ServerId, SessionId};
use openraft::error::{CheckIsLeaderError, ClientWriteError, RaftError};
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use openraft::{BasicNode, ChangeMembers, Config, Raft, ServerState, SnapshotPolicy};
use tokio::sync::{mpsc, oneshot, watch};

use crate::identity::Identity;

openraft::declare_raft_types!(
    /// The types of the metadata log.
    pub Types:
        D = Entry,
        R = Outcome,
);

/// How often the leader says that it lives, in milliseconds.
const HEARTBEAT_MS: u64 = 120;
/// How long followers wait for it, at least and at most, in milliseconds.
const ELECTION_MS: (u64, u64) = (500, 900);
/// Entries between snapshots.
const SNAPSHOT_EVERY: u64 = 5_000;
/// How long a proposal may take: without a quorum it would wait for ever.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a confirmation of the leadership may take.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);
/// Voters at most; other servers learn.
const MAX_VOTERS: usize = 5;

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
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: 500,
            ..Config::default()
        };
        let config = Arc::new(config.validate().context("the metadata log's times")?);
        let network = network::Network::new(Arc::clone(&shared));
        let raft =
            Raft::new(identity.server.0, config, network, logs, machine).await.context("starting the metadata log")?;
        if !identity.absorbed && !raft.is_initialized().await? {
            let me = BTreeMap::from([(identity.server.0, BasicNode::new(address))]);
            raft.initialize(me).await.context("founding a cluster of one")?;
        }
        let (confirm, confirmations) = mpsc::unbounded_channel();
        tokio::spawn(confirm_in_batches(raft.clone(), confirmations, Arc::clone(&shared)));
        Ok((Self { raft, shared, identity, confirm }, applied))
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

    /// Takes a server in as a learner.
    ///
    /// # Errors
    /// When this server does not lead, or there is no quorum.
    pub async fn add_learner(&self, server: ServerId, address: &str) -> anyhow::Result<()> {
        let add = self.raft.add_learner(server.0, BasicNode::new(address), false);
        tokio::time::timeout(PROPOSE_TIMEOUT, add).await.context("the metadata log has no quorum just now")??;
        Ok(())
    }

    /// Takes a server out of the quorum.
    ///
    /// # Errors
    /// When this server does not lead, or there is no quorum.
    pub async fn remove_member(&self, server: ServerId) -> anyhow::Result<()> {
        for change in [
            ChangeMembers::RemoveVoters(BTreeSet::from([server.0])),
            ChangeMembers::RemoveNodes(BTreeSet::from([server.0])),
        ] {
            let change = self.raft.change_membership(change, false);
            tokio::time::timeout(PROPOSE_TIMEOUT, change)
                .await
                .context("the metadata log has no quorum just now")??;
        }
        Ok(())
    }

    /// As the leader: makes a learner that has caught up a voter, while there are fewer than five. At most one at a time.
    pub async fn promote_learners(&self) {
        let candidate = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow();
            let Some(replication) = metrics.replication.as_ref().filter(|_| metrics.state == ServerState::Leader)
            else {
                return;
            };
            let membership = metrics.membership_config.membership();
            if membership.voter_ids().count() >= MAX_VOTERS {
                return;
            }
            let last = metrics.last_log_index.unwrap_or(0);
            let caught_up =
                |id: &u64| replication.get(id).and_then(|l| l.as_ref()).is_some_and(|l| l.index + 200 >= last);
            membership.learner_ids().find(caught_up)
        };
        if let Some(id) = candidate {
            let change = self.raft.change_membership(ChangeMembers::AddVoterIds(BTreeSet::from([id])), true);
            match tokio::time::timeout(PROPOSE_TIMEOUT, change).await {
                Ok(Ok(_)) => tracing::info!(server = format!("{id:x}"), "votes now"),
                Ok(Err(e)) => tracing::debug!("a learner could not be made a voter yet: {e}"),
                Err(_) => {}
            }
        }
    }

    /// For the peer service: openraft's own messages.
    pub(crate) async fn append(&self, rpc: AppendEntriesRequest<Types>) -> Result<Vec<u8>, RaftError<u64>> {
        Ok(mortar_proto::wire::encode(&self.raft.append_entries(rpc).await?))
    }
    pub(crate) async fn vote(&self, rpc: VoteRequest<u64>) -> Result<Vec<u8>, RaftError<u64>> {
        Ok(mortar_proto::wire::encode(&self.raft.vote(rpc).await?))
    }
    pub(crate) async fn snapshot(&self, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        let (vote, meta, data): network::SnapshotMessage = mortar_proto::wire::decode(body)?;
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
        let answer = match tokio::time::timeout(CONFIRM_TIMEOUT, raft.get_read_log_id()).await {
            Ok(Ok((read, _))) => Ok(LogIndex(read.map_or(0, |l| l.index))),
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
