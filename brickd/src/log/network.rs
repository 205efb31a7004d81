//! openraft's messages over the Peer service, on connections of their own.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mortar_proto::wire::peer::{Blob, peer_client::PeerClient};
use mortar_proto::wire::{decode, encode};
use openraft::error::{Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::{BasicNode, Snapshot, SnapshotMeta, Vote};
use tonic::transport::{Channel, Endpoint};

use super::Types;
use super::machine::Shared;

/// A snapshot on its way.
pub(super) type SnapshotMessage = (Vote<u64>, SnapshotMeta<u64, BasicNode>, Vec<u8>);

/// Bytes of a snapshot in one message.
const CHUNK_BYTES: usize = 1 << 20;
/// How long a connection may take to be made: less than an election.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);
/// The largest message: a batch of entries.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Makes connections.
pub(super) struct Network {
    shared: Arc<Shared>,
}

impl Network {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

/// A connection to one server.
pub(super) struct Peer {
    target: u64,
    fallback: String,
    shared: Arc<Shared>,
    channels: HashMap<String, Channel>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer { target, fallback: node.addr.clone(), shared: Arc::clone(&self.shared), channels: HashMap::new() }
    }
}

impl Peer {
    /// A client for where the server listens now, by the log itself if that knows.
    fn client(&mut self) -> Result<PeerClient<Channel>, tonic::Status> {
        let address = self.shared.address_of(self.target).unwrap_or_else(|| self.fallback.clone());
        if !self.channels.contains_key(&address) {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|e| tonic::Status::invalid_argument(e.to_string()))?
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(Duration::from_secs(1))
                .keep_alive_timeout(Duration::from_secs(2));
            self.channels.clear();
            self.channels.insert(address.clone(), endpoint.connect_lazy());
        }
        let channel = self.channels.get(&address).cloned().ok_or_else(|| tonic::Status::internal("no channel"))?;
        Ok(PeerClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
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
        let mut client = self.client().map_err(|e| RPCError::Unreachable(unreachable(&e)))?;
        let body = Bytes::from(encode(&rpc));
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
        let mut client = self.client().map_err(|e| RPCError::Unreachable(unreachable(&e)))?;
        let body = Bytes::from(encode(&rpc));
        call(option.hard_ttl(), client.vote(Blob { body })).await.map_err(|e| RPCError::Unreachable(unreachable(&e)))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<Types>,
        _cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<Types, Fatal<u64>>> {
        let mut client = self.client().map_err(|e| StreamingError::Unreachable(unreachable(&e)))?;
        let message: SnapshotMessage = (vote, snapshot.meta, snapshot.snapshot.into_inner());
        let body = Bytes::from(encode(&message));
        let chunks: Vec<Blob> = (0..body.len())
            .step_by(CHUNK_BYTES)
            .map(|at| Blob { body: body.slice(at..body.len().min(at + CHUNK_BYTES)) })
            .collect();
        let ttl = option.hard_ttl().max(Duration::from_secs(30));
        call(ttl, client.snapshot(tokio_stream::iter(chunks)))
            .await
            .map_err(|e| StreamingError::Unreachable(unreachable(&e)))
    }

    fn backoff(&self) -> Backoff {
        // A server that came back should not wait long for what it missed.
        Backoff::new(std::iter::repeat(Duration::from_millis(100)))
    }
}
