//! The control plane of a server: gRPC services, and what the leader keeps in memory.
//!
//! | file | owns |
//! | --- | --- |
//! | `port` | the one port: gRPC and the data plane told apart |
//! | `peer` | what servers say to each other |
//! | `session` | what mounted clients say |
//! | `cluster` | what the administrator says |
//! | `clients` | which clients there are; ending one |
//! | `heal` | repair that starts now |
//! | `replace` | an empty brick in the place of another; comparing all bricks |
//! | `loss` | going on with less than was acknowledged, by the administrator's word |
//! | `checks` | may this directory become a brick? |
//! | `scrub` | scrubs, started, stopped and shown |
//! | `lead` | the leader's memory: who lives, who is heard, what it proposes by itself |

mod checks;
mod clients;
mod cluster;
mod heal;
mod lead;
mod loss;
mod peer;
mod port;
mod replace;
mod scrub;
mod session;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::Instant;

use mortar_proto::client::control::LEADER_KEY;
use mortar_proto::wire::cluster::cluster_server::ClusterServer;
use mortar_proto::wire::peer::peer_server::PeerServer;
use mortar_proto::wire::session::session_server::SessionServer;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tonic::Status;

use crate::bricks::Bricks;
use crate::log::{Log, ProposeError};

/// The largest message of the control plane.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// What all services share.
pub struct Server {
    /// The metadata log.
    pub log: Log,
    /// This server's bricks.
    pub bricks: Arc<Bricks>,
    /// Where it listens, as others reach it.
    pub address: String,
    /// Where it keeps its state.
    pub state_dir: PathBuf,
    /// Told when the process shall start anew, because it joins another cluster.
    pub restart: Notify,
    me: Weak<Self>,
    /// It joins another cluster: its own log takes nothing any more.
    leaving: AtomicBool,
    began: Instant,
    leader: Mutex<Option<lead::Leader>>,
    poke: Notify,
}

impl Server {
    /// Puts the parts together.
    #[must_use]
    pub fn new(log: Log, bricks: Arc<Bricks>, address: String, state_dir: PathBuf) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            leaving: AtomicBool::new(false),
            log,
            bricks,
            address,
            state_dir,
            restart: Notify::new(),
            began: Instant::now(),
            leader: Mutex::new(None),
            poke: Notify::new(),
        })
    }

    fn me(&self) -> Weak<Self> {
        self.me.clone()
    }

    /// Milliseconds since the start; never goes back.
    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// When the port cannot be served.
    pub async fn serve(self: &Arc<Self>, listener: TcpListener) -> anyhow::Result<()> {
        lead::start(self);
        peer::start_heartbeats(self);
        let bricks = Arc::clone(&self.bricks);
        let incoming = port::accept(listener, move |socket, from: SocketAddr| bricks.serve_data(socket, from));
        tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(std::time::Duration::from_secs(2)))
            .http2_keepalive_timeout(Some(std::time::Duration::from_secs(4)))
            .add_service(
                PeerServer::from_arc(Arc::clone(self))
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES),
            )
            .add_service(SessionServer::from_arc(Arc::clone(self)).max_encoding_message_size(MAX_MESSAGE_BYTES))
            .add_service(ClusterServer::from_arc(Arc::clone(self)).max_encoding_message_size(MAX_MESSAGE_BYTES))
            .serve_with_incoming(incoming)
            .await?;
        Ok(())
    }
}

/// The status for a call that needs the leader.
fn not_leader(address: Option<String>) -> Status {
    let mut status = Status::failed_precondition("this server does not lead the cluster");
    let value = address.unwrap_or_default().parse().unwrap_or_else(|_| tonic::metadata::MetadataValue::from_static(""));
    status.metadata_mut().insert(LEADER_KEY, value);
    status
}

impl From<ProposeError> for Status {
    fn from(e: ProposeError) -> Self {
        match e {
            ProposeError::NotLeader(address) => not_leader(address),
            ProposeError::Unavailable(why) => Self::unavailable(why),
        }
    }
}
