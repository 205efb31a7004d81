//! What servers say to each other: openraft's messages, heartbeats, taking a fresh server in.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mortar_proto::config::Slots;
use mortar_proto::metadata::monitor::Beat;
use mortar_proto::metadata::{Command, Registration};
use mortar_proto::wire::id_from;
use mortar_proto::wire::peer::{
    AbsorbReply, AbsorbRequest, Blob, HeartbeatReply, HeartbeatRequest, peer_client::PeerClient, peer_server::Peer,
};
use mortar_proto::{BootId, BrickId, ClusterId, ConfigNo, Incarnation, ServerId};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

use super::Server;
use super::lead::{BrickNews, ServerNews};

/// How often a server is heard.
const HEARTBEAT: Duration = Duration::from_millis(100);
/// How long an answer may take to be worth anything.
const ANSWER: Duration = Duration::from_millis(900);
/// Over how long the rate of repair is measured.
const RATE_WINDOW_MS: u64 = 1000;

fn undecodable(e: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("the message does not decode: {e}"))
}

#[tonic::async_trait]
impl Peer for Server {
    async fn append(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        self.check_staying()?;
        let body = self.log.append(&request.into_inner().body).await.map_err(|e| Status::internal(format!("{e:#}")))?;
        Ok(Response::new(Blob { body: body.into() }))
    }

    async fn vote(&self, request: Request<Blob>) -> Result<Response<Blob>, Status> {
        self.check_staying()?;
        let body = self.log.vote(&request.into_inner().body).await.map_err(|e| Status::internal(format!("{e:#}")))?;
        Ok(Response::new(Blob { body: body.into() }))
    }

    async fn snapshot(&self, request: Request<Streaming<Blob>>) -> Result<Response<Blob>, Status> {
        self.check_staying()?;
        let mut chunks = request.into_inner();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            if bytes.len() + chunk.body.len() > 4 << 30 {
                return Err(Status::resource_exhausted("a snapshot of more than 4 GiB"));
            }
            bytes.extend_from_slice(&chunk.body);
        }
        let body = self.log.snapshot(&bytes).await.map_err(|e| Status::internal(format!("{e:#}")))?;
        Ok(Response::new(Blob { body: body.into() }))
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatReply>, Status> {
        self.heard(request.into_inner()).await.map(Response::new)
    }

    async fn absorb(&self, request: Request<AbsorbRequest>) -> Result<Response<AbsorbReply>, Status> {
        let request = request.into_inner();
        let cluster = id_from(&request.cluster).map(ClusterId).ok_or_else(|| undecodable("no cluster id"))?;
        let me = self.log.identity();
        let reply = || Response::new(AbsorbReply { server: me.server.0, address: self.address.clone() });
        if me.cluster == cluster {
            return Ok(reply());
        }
        let refusal = self.log.with_state(|state| {
            let names: Vec<&str> = state.volumes.values().map(|v| v.name.as_str()).collect();
            if !names.is_empty() {
                Some(format!(
                    "{} has volumes of its own already ({}); only a fresh server can be added",
                    self.address,
                    names.join(", ")
                ))
            } else if state.servers.len() > 1 || me.absorbed {
                Some(format!(
                    "{} belongs to another cluster ({:032x}, {} servers) already; remove it there first",
                    self.address,
                    me.cluster.0,
                    state.servers.len()
                ))
            } else {
                None
            }
        });
        if let Some(why) = refusal {
            return Err(Status::failed_precondition(why));
        }
        // Its own log is about to be wiped: what the other cluster's leader sent it now would be acknowledged and lost.
        self.leaving.store(true, Ordering::Release);
        me.join(&self.state_dir, cluster).map_err(|e| Status::internal(format!("{e:#}")))?;
        tracing::info!(
            cluster = format!("{:032x}", cluster.0),
            leader = request.leader,
            "joining another cluster; starting anew"
        );
        self.restart.notify_one();
        Ok(reply())
    }
}

impl Server {
    fn check_staying(&self) -> Result<(), Status> {
        if self.leaving.load(Ordering::Acquire) {
            return Err(Status::unavailable("this server is starting anew, in another cluster"));
        }
        Ok(())
    }

    /// A server's heartbeat has arrived. It is answered only after a quorum has confirmed, since then, that this server
    /// still leads `[R1]`.
    async fn heard(&self, request: HeartbeatRequest) -> Result<HeartbeatReply, Status> {
        self.lead(|_| ())?;
        let commit = self.log.confirm().await?;
        let now = self.now_ms();
        let beats: Vec<Beat> = request
            .bricks
            .iter()
            .map(|b| Beat {
                brick: BrickId(b.brick),
                registration: Registration {
                    incarnation: Incarnation(b.incarnation),
                    boot: BootId(id_from(&b.boot).unwrap_or(0)),
                    clean: b.clean,
                },
                known: ConfigNo(b.known),
                agreed_under: ConfigNo(b.agreed_under),
                failed: !b.failed.is_empty(),
                stopping: b.stopping,
                n: ConfigNo(b.n),
                missed_empty: Slots(b.missed_empty as u8 & 7),
                repaired: b.repaired,
            })
            .collect();
        let server = ServerId(request.server);
        let (asked, withheld, moved) = self.lead(|leader| {
            leader.servers.insert(server, ServerNews { heard_ms: now, applied: request.applied });
            for b in &request.bricks {
                let news = leader.bricks.entry(BrickId(b.brick)).or_insert_with(BrickNews::default);
                news.total_bytes = b.total_bytes;
                news.free_bytes = b.free_bytes;
                news.failed.clone_from(&b.failed);
                news.repaired_bytes = b.repaired_bytes;
                let (at, bytes) = news.before;
                if now >= at + RATE_WINDOW_MS || b.repaired_bytes < bytes {
                    news.rate_bytes = b.repaired_bytes.saturating_sub(bytes) * 1000 / (now - at).max(1);
                    news.before = (now, b.repaired_bytes);
                }
            }
            self.log.with_state(|state| {
                let asked = leader.monitor.heartbeat(state, now, &beats);
                let moved = state.servers.get(&server).is_some_and(|s| s.address != request.address);
                let bricks = beats.iter().map(|b| b.brick);
                let withheld = bricks.filter(|b| leader.monitor.withholds(state, *b)).map(|b| b.0).collect();
                (asked, withheld, moved)
            })
        })?;
        self.poke_leader();
        if moved {
            self.log.propose(Command::ServerAdd { server, address: request.address }, None).await?;
        }
        Ok(HeartbeatReply { commit: commit.0, asked_out: asked.into_iter().map(|b| b.0).collect(), withheld })
    }
}

/// Says that this server and its bricks live, again and again, to whoever leads.
pub(super) fn start_heartbeats(server: &Arc<Server>) {
    let server = Arc::clone(server);
    tokio::spawn(async move {
        let mut channels: HashMap<String, Channel> = HashMap::new();
        let mut every = tokio::time::interval(HEARTBEAT);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let request = HeartbeatRequest {
                server: server.log.identity().server.0,
                address: server.address.clone(),
                applied: server.log.applied().0,
                bricks: server.bricks.beats(),
            };
            let Some(leader) = server.log.leader_address() else { continue };
            let sent = Instant::now();
            let me = Arc::clone(&server);
            if server.log.is_leader() {
                tokio::spawn(async move {
                    if let Ok(reply) = me.heard(request).await {
                        me.bricks.heartbeat_answered(sent, &reply);
                    }
                });
                continue;
            }
            if channels.len() > 16 {
                channels.clear();
            }
            let channel = match channels.get(&leader) {
                Some(channel) => channel.clone(),
                None => {
                    let Ok(endpoint) = Endpoint::from_shared(format!("http://{leader}")) else { continue };
                    // A cut that heals leaves a connection that TCP would try for minutes; this finds out in three seconds.
                    let endpoint = endpoint
                        .http2_keep_alive_interval(Duration::from_secs(1))
                        .keep_alive_timeout(Duration::from_secs(2))
                        .keep_alive_while_idle(true);
                    let channel = endpoint.connect_timeout(ANSWER).tcp_nodelay(true).connect_lazy();
                    channels.insert(leader, channel.clone());
                    channel
                }
            };
            tokio::spawn(async move {
                let asked = tokio::time::timeout(ANSWER, PeerClient::new(channel).heartbeat(request)).await;
                if let Ok(Ok(reply)) = asked {
                    me.bricks.heartbeat_answered(sent, &reply.into_inner());
                }
            });
        }
    });
}
