//! openraft's messages over the Peer service, on connections of their own.
//!
//! Every message names the cluster and the server that it is for. A server that lost its disk, or another one that now
//! listens at the address, refuses it: it would else confirm what it does not have, or take a foreign cluster's log.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use mortar_proto::wire::peer::{Blob, peer_client::PeerClient};
use mortar_proto::wire::{decode, encode};
use mortar_proto::{ClusterId, ServerId};
use openraft::error::{Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::{BasicNode, Snapshot, SnapshotMeta, Vote};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tonic::transport::{Channel, Endpoint};

use super::Types;
use super::machine::Shared;
use crate::identity::Identity;

/// A snapshot on its way.
pub(super) type SnapshotMessage = (Vote<u64>, SnapshotMeta<u64, BasicNode>, Vec<u8>);

/// Bytes of a snapshot in one message.
const CHUNK_BYTES: usize = 1 << 20;
/// How long a connection may take to be made: less than an election.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);
/// The largest message: a batch of entries.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A message and whom it is for.
#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    cluster: ClusterId,
    to: ServerId,
    message: T,
}

/// Unwraps what came in.
///
/// # Errors
/// A sentence, when it is for another server or does not decode.
pub(super) fn open<T: DeserializeOwned>(me: &Identity, body: &[u8]) -> anyhow::Result<T> {
    let envelope: Envelope<T> = decode(body).context("the message does not decode")?;
    anyhow::ensure!(
        envelope.cluster == me.cluster && envelope.to == me.server,
        "this is server {:x} of cluster {:032x}, the message is for server {:x} of cluster {:032x}",
        me.server.0,
        me.cluster.0,
        envelope.to.0,
        envelope.cluster.0
    );
    Ok(envelope.message)
}

/// What a connection carries. A snapshot has its own, so that no heartbeat stands behind it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Carries {
    Entries,
    Snapshot,
}

/// Each with the address that it leads to.
type Channels = HashMap<(u64, Carries), (String, Channel)>;

/// The connections, kept for as long as the log lives: openraft asks for a new client with every confirmation.
#[derive(Clone)]
pub(super) struct Network {
    cluster: ClusterId,
    shared: Arc<Shared>,
    channels: Arc<Mutex<Channels>>,
}

impl Network {
    pub(super) fn new(cluster: ClusterId, shared: Arc<Shared>) -> Self {
        Self { cluster, shared, channels: Arc::default() }
    }
}

/// The way to one server.
pub(super) struct Peer {
    network: Network,
    target: u64,
    fallback: String,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer { network: self.clone(), target, fallback: node.addr.clone() }
    }
}

impl Peer {
    /// A client for where the server listens now, by the log itself if that knows.
    fn client(&self, carries: Carries) -> Result<PeerClient<Channel>, tonic::Status> {
        let address = self.network.shared.address_of(self.target).unwrap_or_else(|| self.fallback.clone());
        let mut channels = self.network.channels.lock();
        let channel = match channels.get(&(self.target, carries)) {
            Some((known, channel)) if *known == address => channel.clone(),
            _ => {
                let endpoint = Endpoint::from_shared(format!("http://{address}"))
                    .map_err(|e| tonic::Status::invalid_argument(e.to_string()))?
                    .connect_timeout(CONNECT_TIMEOUT)
                    .tcp_nodelay(true)
                    .http2_keep_alive_interval(Duration::from_secs(1))
                    .keep_alive_timeout(Duration::from_secs(2))
                    .keep_alive_while_idle(true);
                let channel = endpoint.connect_lazy();
                channels.insert((self.target, carries), (address, channel.clone()));
                channel
            }
        };
        Ok(PeerClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn seal<T: Serialize>(&self, message: T) -> Bytes {
        encode(&Envelope { cluster: self.network.cluster, to: ServerId(self.target), message }).into()
    }
}

fn unreachable(e: &tonic::Status) -> Unreachable {
    Unreachable::new(&std::io::Error::other(e.message().to_owned()))
}

async fn call<T: serde::de::DeserializeOwned>(
    ttl: Duration,
    ask: impl Future<Output = Result<tonic::Response<Blob>, tonic::Status>>,
) -> Result<T, tonic::Status> {
    let reply =
        tokio::time::timeout(ttl, ask).await.map_err(|_| tonic::Status::deadline_exceeded("no answer in time"))??;
    decode(&reply.into_inner().body).map_err(|e| tonic::Status::internal(format!("the answer does not decode: {e}")))
}

impl RaftNetwork<Types> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, RPCError<u64, BasicNode, RaftError<u64>>> {
        let mut client = self.client(Carries::Entries).map_err(|e| RPCError::Unreachable(unreachable(&e)))?;
        let body = self.seal(rpc);
        call(option.hard_ttl(), client.append(Blob { body })).await.map_err(|e| match e.code() {
            tonic::Code::Unavailable => RPCError::Unreachable(unreachable(&e)),
            _ => RPCError::Network(NetworkError::new(&std::io::Error::other(e.message().to_owned()))),
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, RPCError<u64, BasicNode, RaftError<u64>>> {
        let mut client = self.client(Carries::Entries).map_err(|e| RPCError::Unreachable(unreachable(&e)))?;
        let body = self.seal(rpc);
        call(option.hard_ttl(), client.vote(Blob { body })).await.map_err(|e| RPCError::Unreachable(unreachable(&e)))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<Types, Fatal<u64>>> {
        let mut client = self.client(Carries::Snapshot).map_err(|e| StreamingError::Unreachable(unreachable(&e)))?;
        let message: SnapshotMessage = (vote, snapshot.meta, snapshot.snapshot.into_inner());
        let body = self.seal(message);
        let chunks: Vec<Blob> = (0..body.len())
            .step_by(CHUNK_BYTES)
            .map(|at| Blob { body: body.slice(at..body.len().min(at + CHUNK_BYTES)) })
            .collect();
        let ttl = option.hard_ttl().max(Duration::from_secs(30));
        tokio::select! {
            sent = call(ttl, client.snapshot(tokio_stream::iter(chunks))) => {
                sent.map_err(|e| StreamingError::Unreachable(unreachable(&e)))
            }
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    fn backoff(&self) -> Backoff {
        // A server that came back should not wait long for what it missed.
        Backoff::new(std::iter::repeat(Duration::from_millis(100)))
    }
}
