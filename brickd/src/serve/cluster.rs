//! What the administrator says.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use mortar_proto::client::control::with_port;
use mortar_proto::config::{BrickState, Slot, Slots};
use mortar_proto::metadata::state::Volume;
use mortar_proto::metadata::{BrickPlace, Command, Outcome, State};
use mortar_proto::wire::cluster::{
    AcceptLossReply, AcceptLossRequest, BrickHealReply, BrickHealRequest, BrickHealRow, BrickReplaceRequest, BrickRow,
    BrickScrubRequest, BrickSpec, CheckBrickRequest, ClientEvictRequest, ClientListReply, ClientRow, Empty,
    FileHealRow, HealInfoReply, HealStartReply, IdentifyReply, MissedOf, ScrubStatus, ServerAddReply, ServerAddRequest,
    ServerListReply, ServerRemoveRequest, ServerRow, VolumeCreateRequest, VolumeInfoReply, VolumeRequest, VolumeRow,
    VolumeScrubReply, VolumeScrubRequest, VolumeSetRequest, VolumeStatusReply, VolumeStatusRow,
    cluster_client::ClusterClient, cluster_server::Cluster,
};
use mortar_proto::wire::id_bytes;
use mortar_proto::wire::peer::{AbsorbRequest, peer_client::PeerClient};
use mortar_proto::{BrickId, Ino, ServerId, VolumeId};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use super::{Server, checks};

/// How long another server may take.
const PEER_TIMEOUT: Duration = Duration::from_secs(3);
/// The same, for what only decorates an answer.
pub(super) const LOOK_TIMEOUT: Duration = Duration::from_millis(1000);
/// How long until a server that refused a connection is tried again.
const RETRY: Duration = Duration::from_millis(150);
/// How long a server that was taken in may take to be heard: it starts anew for that.
const ARRIVAL: Duration = Duration::from_secs(8);
/// "Unknown" and "never" in what is counted.
const UNKNOWN: u32 = u32::MAX;

pub(super) async fn connect(address: &str, timeout: Duration) -> Result<Channel, String> {
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|e| format!("{address} is no address: {e}"))?;
    let endpoint = endpoint.connect_timeout(timeout).tcp_nodelay(true);
    let until = Instant::now() + timeout;
    loop {
        // One that is just starting refuses for a moment.
        match tokio::time::timeout_at(until.into(), endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(_)) if Instant::now() + RETRY < until => tokio::time::sleep(RETRY).await,
            Ok(Err(_)) => return Err(format!("server {address} cannot be reached; is mortar-brickd running there?")),
            Err(_) => return Err(format!("server {address} does not answer within {} s", timeout.as_secs())),
        }
    }
}

fn refused(outcome: Outcome) -> Result<Response<Empty>, Status> {
    match outcome {
        Outcome::Refused(why) => Err(Status::failed_precondition(why)),
        Outcome::Superseded => Err(Status::failed_precondition("the volume has changed meanwhile; look again")),
        _ => Ok(Response::new(Empty {})),
    }
}

/// The server that an administrator means: by `host:port`, host or id.
pub(super) fn find_server(state: &State, meant: &str) -> Option<ServerId> {
    let full = with_port(meant);
    let by_address = state.servers.iter().find(|(_, s)| s.address == meant || s.address == full);
    let by_host = || {
        let mut found =
            state.servers.iter().filter(|(_, s)| s.address.rsplit_once(':').is_some_and(|(host, _)| host == meant));
        let first = found.next();
        if found.next().is_some() { None } else { first }
    };
    let by_id = || state.servers.get_key_value(&ServerId(u64::from_str_radix(meant, 16).ok()?));
    by_address.or_else(by_host).or_else(by_id).map(|(id, _)| *id)
}

pub(super) fn no_such_server(state: &State, meant: &str) -> Status {
    let known: Vec<&str> = state.servers.values().map(|s| s.address.as_str()).collect();
    Status::invalid_argument(format!("there is no server {meant:?} in this cluster; there are: {}", known.join(", ")))
}

pub(super) fn state_name(state: BrickState) -> String {
    match state {
        BrickState::InSync => "in-sync",
        BrickState::Syncing => "syncing",
        BrickState::Out => "out",
    }
    .to_owned()
}

impl Server {
    fn volumes<'a>(state: &'a State, name: &str) -> Result<Vec<(VolumeId, &'a Volume)>, Status> {
        if name.is_empty() {
            return Ok(state.volumes.iter().map(|(id, v)| (*id, v)).collect());
        }
        let found = state.volume_named(name).ok_or_else(|| Status::invalid_argument(state.no_such_volume(name)))?;
        Ok(vec![found])
    }

    fn volume_row(&self, state: &State, id: VolumeId, volume: &Volume, live: bool) -> VolumeRow {
        let mut bricks = Vec::new();
        for (number, set) in volume.sets.iter().enumerate() {
            let Some(set) = state.sets.get(set) else { continue };
            for member in set.configuration.members {
                let Some(brick) = state.bricks.get(&member.brick) else { continue };
                let now = self.now_ms();
                let news = if live {
                    self.lead(|leader| {
                        let news = leader.bricks.get(&member.brick).cloned().unwrap_or_default();
                        (leader.monitor.living(state, member.brick, now), news)
                    })
                    .ok()
                } else {
                    None
                };
                let (reachable, news) = news.unwrap_or_default();
                bricks.push(BrickRow {
                    server: state.servers.get(&brick.server).map_or(String::new(), |s| s.address.clone()),
                    path: brick.path.clone(),
                    set: number as u32,
                    state: state_name(member.state),
                    reachable,
                    total_bytes: news.total_bytes,
                    free_bytes: news.free_bytes,
                    failed: news.failed,
                });
            }
        }
        VolumeRow {
            name: volume.name.clone(),
            id: format!("{:x}", id.0),
            started: volume.started,
            replica: 3,
            bricks,
            options: volume.options.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        }
    }

    /// Asks a brick's server what the brick knows.
    pub(super) async fn ask_heal(&self, address: String, brick: BrickId) -> Option<BrickHealReply> {
        if address == self.address {
            return self.bricks.heal(brick);
        }
        let ask = async {
            let channel = connect(&address, LOOK_TIMEOUT).await.ok()?;
            let mut client = ClusterClient::new(channel).max_decoding_message_size(64 << 20);
            client.brick_heal(BrickHealRequest { brick: brick.0 }).await.ok()
        };
        tokio::time::timeout(LOOK_TIMEOUT, ask).await.ok().flatten().map(Response::into_inner)
    }
}

impl Server {
    /// Has a server check a directory of its own that shall become a brick.
    pub(super) async fn check_place(&self, place: &BrickPlace, force: bool, volume: &str) -> Result<(), Status> {
        let address =
            self.log.with_state(|s| s.servers.get(&place.server).map(|s| s.address.clone())).unwrap_or_default();
        let ask = CheckBrickRequest { path: place.path.clone(), force, volume: volume.to_owned() };
        let checked = if address == self.address {
            self.check_brick(Request::new(ask)).await
        } else {
            let channel = connect(&address, PEER_TIMEOUT).await.map_err(Status::failed_precondition)?;
            match tokio::time::timeout(PEER_TIMEOUT, ClusterClient::new(channel).check_brick(ask)).await {
                Ok(checked) => checked,
                Err(_) => Err(Status::failed_precondition(format!("server {address} does not answer"))),
            }
        };
        checked.map_err(|s| Status::new(s.code(), format!("server {address}: {}", s.message())))?;
        Ok(())
    }
}

#[tonic::async_trait]
impl Cluster for Server {
    async fn server_add(&self, request: Request<ServerAddRequest>) -> Result<Response<ServerAddReply>, Status> {
        self.log.linearizable().await?;
        let address = with_port(&request.into_inner().address);
        let channel = connect(&address, PEER_TIMEOUT).await.map_err(Status::invalid_argument)?;
        let mut peer = PeerClient::new(channel);
        let ask = AbsorbRequest { cluster: id_bytes(self.log.identity().cluster.0), leader: self.address.clone() };
        let answered = tokio::time::timeout(PEER_TIMEOUT, peer.absorb(ask)).await;
        let reply = match answered {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) if status.code() == Code::FailedPrecondition => {
                return Err(Status::invalid_argument(status.message().to_owned()));
            }
            Ok(Err(status)) => {
                return Err(Status::unavailable(format!("server {address} refuses: {}", status.message())));
            }
            Err(_) => return Err(Status::unavailable(format!("server {address} does not answer"))),
        };
        let server = ServerId(reply.server);
        let known = self.log.with_state(|state| state.servers.contains_key(&server));
        // One that was taken in but never heard is taken in once more: the first time may have been cut short.
        if known && self.lead(|leader| leader.servers.contains_key(&server))? {
            let me = if server == self.log.identity().server { " (it is the one that was asked)" } else { "" };
            return Err(Status::invalid_argument(format!("server {address} is in this cluster already{me}")));
        }
        // The address that was typed reaches it from here; what it says of itself may be 0.0.0.0.
        self.log.propose(Command::ServerAdd { server, address: address.clone() }, None).await?;
        // The log takes it into the quorum by itself; a crash here only delays that.
        tracing::info!(server = format!("{:x}", server.0), address, "taken into the cluster");
        let until = Instant::now() + ARRIVAL;
        // It is heard, and it votes: the next failure may be this server's.
        let arrived = || {
            let voters = self.log.voters();
            let votes = voters.contains(&server) || voters.len() >= 5;
            votes && self.lead(|leader| leader.servers.contains_key(&server)).unwrap_or(false)
        };
        while Instant::now() < until && !arrived() {
            tokio::time::sleep(RETRY).await;
        }
        Ok(Response::new(ServerAddReply { server: server.0, address }))
    }

    async fn server_remove(&self, request: Request<ServerRemoveRequest>) -> Result<Response<Empty>, Status> {
        self.log.linearizable().await?;
        let meant = request.into_inner().server;
        let server = self.log.with_state(|s| find_server(s, &meant).ok_or_else(|| no_such_server(s, &meant)))?;
        let count = self.log.with_state(|s| s.servers.len());
        if count == 1 {
            return Err(Status::failed_precondition("it is the only server of the cluster"));
        }
        // Refused by the log itself while the server has bricks. The log then lets it out of the quorum by itself.
        refused(self.log.propose(Command::ServerRemove { server }, None).await?)
    }

    async fn server_list(&self, _: Request<Empty>) -> Result<Response<ServerListReply>, Status> {
        self.log.linearizable().await?;
        let (now, voters, leader) = (self.now_ms(), self.log.voters(), self.log.leader());
        let news = self.lead(|l| l.servers.clone())?;
        let servers = self.log.with_state(|state| {
            let row = |(id, s): (&ServerId, &mortar_proto::metadata::state::Server)| {
                let heard = news.get(id);
                let heard_ms =
                    heard.map_or(UNKNOWN, |n| now.saturating_sub(n.heard_ms).min(u64::from(UNKNOWN - 1)) as u32);
                let role = if leader == Some(*id) {
                    "leader"
                } else if voters.contains(id) {
                    "voter"
                } else {
                    "learner"
                };
                ServerRow {
                    id: format!("{:x}", id.0),
                    address: s.address.clone(),
                    role: role.to_owned(),
                    reachable: heard_ms < 1500,
                    applied: heard.map_or(0, |n| n.applied),
                    bricks: state.bricks.values().filter(|b| b.server == *id).count() as u32,
                    heard_ms,
                }
            };
            state.servers.iter().map(row).collect()
        });
        Ok(Response::new(ServerListReply { cluster: format!("{:032x}", self.log.identity().cluster.0), servers }))
    }

    async fn volume_create(&self, request: Request<VolumeCreateRequest>) -> Result<Response<Empty>, Status> {
        self.log.linearizable().await?;
        let request = request.into_inner();
        if request.replica != 3 {
            return Err(Status::invalid_argument(format!(
                "replica {} is not served; a volume has replica 3",
                request.replica
            )));
        }
        if request.bricks.is_empty() || !request.bricks.len().is_multiple_of(3) {
            return Err(Status::invalid_argument(format!(
                "{} bricks make no replica sets of 3; name three, or a multiple of three",
                request.bricks.len()
            )));
        }
        let places = self.log.with_state(|state| {
            let place = |spec: &BrickSpec| {
                let server = find_server(state, &spec.server).ok_or_else(|| no_such_server(state, &spec.server))?;
                Ok::<_, Status>(BrickPlace { server, path: spec.path.clone() })
            };
            request.bricks.iter().map(place).collect::<Result<Vec<_>, _>>()
        })?;
        let sets: Vec<[BrickPlace; 3]> =
            places.chunks_exact(3).map(|c| [c[0].clone(), c[1].clone(), c[2].clone()]).collect();
        self.log
            .with_state(|s| s.check_new_volume(&request.name, &sets, request.force))
            .map_err(Status::invalid_argument)?;
        for place in &places {
            self.check_place(place, request.force, &request.name).await?;
        }
        refused(self.log.propose(Command::VolumeCreate { name: request.name, sets, force: request.force }, None).await?)
    }

    async fn volume_start(&self, request: Request<VolumeRequest>) -> Result<Response<Empty>, Status> {
        refused(self.log.propose(Command::VolumeStart { name: request.into_inner().name }, None).await?)
    }

    async fn volume_stop(&self, request: Request<VolumeRequest>) -> Result<Response<Empty>, Status> {
        let VolumeRequest { name, force } = request.into_inner();
        refused(self.log.propose(Command::VolumeStop { name, force }, None).await?)
    }

    async fn volume_delete(&self, request: Request<VolumeRequest>) -> Result<Response<Empty>, Status> {
        refused(self.log.propose(Command::VolumeDelete { name: request.into_inner().name }, None).await?)
    }

    async fn volume_set(&self, request: Request<VolumeSetRequest>) -> Result<Response<Empty>, Status> {
        let VolumeSetRequest { name, key, value, reset } = request.into_inner();
        let value = if reset { None } else { Some(value) };
        match self.log.propose(Command::VolumeSet { name, key, value }, None).await? {
            Outcome::Refused(why) => Err(Status::invalid_argument(why)),
            outcome => refused(outcome),
        }
    }

    async fn volume_info(&self, request: Request<VolumeRequest>) -> Result<Response<VolumeInfoReply>, Status> {
        self.log.linearizable().await?;
        let name = request.into_inner().name;
        let volumes = self.log.with_state(|state| {
            let found = Self::volumes(state, &name)?;
            Ok::<_, Status>(found.into_iter().map(|(id, v)| self.volume_row(state, id, v, true)).collect())
        })?;
        Ok(Response::new(VolumeInfoReply { volumes }))
    }

    async fn volume_status(&self, request: Request<VolumeRequest>) -> Result<Response<VolumeStatusReply>, Status> {
        self.log.linearizable().await?;
        let name = request.into_inner().name;
        let volumes = self.log.with_state(|state| {
            let row = |(id, volume): (VolumeId, &Volume)| VolumeStatusRow {
                volume: Some(self.volume_row(state, id, volume, true)),
                clients: state
                    .sessions
                    .iter()
                    .filter(|(_, s)| s.volume == Some(id))
                    .map(|(session, s)| ClientRow {
                        session: format!("{:x}", session.0),
                        client: s.client.clone(),
                        address: s.address.clone(),
                        open_files: s.open.len() as u32,
                        leases: s.leases.len() as u32,
                    })
                    .collect(),
                files: state.inodes.values().filter(|i| i.volume == id).count() as u64,
            };
            Ok::<_, Status>(Self::volumes(state, &name)?.into_iter().map(row).collect())
        })?;
        Ok(Response::new(VolumeStatusReply { volumes }))
    }

    async fn heal_info(&self, request: Request<VolumeRequest>) -> Result<Response<HealInfoReply>, Status> {
        self.log.linearizable().await?;
        let name = request.into_inner().name;
        let asked: Vec<(BrickId, String)> = self.log.with_state(|state| {
            let (id, _) =
                state.volume_named(&name).ok_or_else(|| Status::invalid_argument(state.no_such_volume(&name)))?;
            let bricks = state.bricks.iter().filter(|(_, b)| b.volume == id);
            Ok::<_, Status>(
                bricks
                    .map(|(brick, b)| {
                        (*brick, state.servers.get(&b.server).map_or(String::new(), |s| s.address.clone()))
                    })
                    .collect(),
            )
        })?;
        let answers = futures::future::join_all(
            asked.iter().map(|(brick, address)| async { (*brick, self.ask_heal(address.clone(), *brick).await) }),
        )
        .await;
        let known: HashMap<BrickId, BrickHealReply> = answers.into_iter().filter_map(|(b, a)| Some((b, a?))).collect();
        let news = self.lead(|l| l.bricks.clone())?;
        let bricks = self.log.with_state(|state| {
            let Some((_, volume)) = state.volume_named(&name) else { return Vec::new() };
            let mut rows = Vec::new();
            for set in volume.sets.iter().filter_map(|s| state.sets.get(s)) {
                for slot in Slot::ALL {
                    let member = set.configuration.members[slot.index()];
                    let files = missing(set, slot, &known);
                    let Some(brick) = state.bricks.get(&member.brick) else { continue };
                    let (regions, bytes) = files.values().fold((0, 0), |(r, b), f| (r + f.0, b + f.1));
                    let rate = news.get(&member.brick).map_or(0, |n| n.rate_bytes);
                    let rate_bytes = if member.state == BrickState::Syncing { rate } else { 0 };
                    rows.push(BrickHealRow {
                        server: state.servers.get(&brick.server).map_or(String::new(), |s| s.address.clone()),
                        path: brick.path.clone(),
                        state: state_name(member.state),
                        compare: member.full,
                        missed_regions: regions,
                        missed_bytes: bytes,
                        rate_bytes,
                        corruption: known.get(&member.brick).and_then(|reply| reply.corruption),
                        left_seconds: match (bytes, rate_bytes) {
                            (0, _) => 0,
                            (_, 0) => UNKNOWN,
                            (left, rate) => left.div_ceil(rate).min(u64::from(UNKNOWN - 1)) as u32,
                        },
                        files: files
                            .into_iter()
                            .map(|(ino, (regions, bytes))| FileHealRow {
                                path: state.path_of(ino).unwrap_or_default(),
                                ino: ino.0,
                                regions,
                                bytes,
                            })
                            .collect(),
                    });
                }
            }
            rows
        });
        Ok(Response::new(HealInfoReply { bricks }))
    }

    async fn accept_loss(&self, request: Request<AcceptLossRequest>) -> Result<Response<AcceptLossReply>, Status> {
        self.give_up(request.into_inner()).await.map(Response::new)
    }

    async fn heal_full(&self, request: Request<VolumeRequest>) -> Result<Response<Empty>, Status> {
        self.compare_all(&request.into_inner().name).await?;
        Ok(Response::new(Empty {}))
    }

    async fn brick_replace(&self, request: Request<BrickReplaceRequest>) -> Result<Response<Empty>, Status> {
        self.replace_brick(request.into_inner()).await?;
        Ok(Response::new(Empty {}))
    }

    async fn heal_start(&self, request: Request<VolumeRequest>) -> Result<Response<HealStartReply>, Status> {
        self.start_heal(&request.into_inner().name).await.map(Response::new)
    }

    async fn client_list(&self, request: Request<VolumeRequest>) -> Result<Response<ClientListReply>, Status> {
        self.list_clients(&request.into_inner().name).await.map(Response::new)
    }

    async fn client_evict(&self, request: Request<ClientEvictRequest>) -> Result<Response<Empty>, Status> {
        refused(self.evict_client(&request.into_inner().session).await?)
    }

    async fn volume_scrub(&self, request: Request<VolumeScrubRequest>) -> Result<Response<VolumeScrubReply>, Status> {
        self.scrub_volume(request.into_inner()).await.map(Response::new)
    }

    async fn brick_scrub(&self, request: Request<BrickScrubRequest>) -> Result<Response<ScrubStatus>, Status> {
        let request = request.into_inner();
        let status = self.scrub_brick(BrickId(request.brick), request.action()).await;
        status.map(Response::new).ok_or_else(|| Status::not_found("the brick is not open on this server"))
    }

    async fn identify(&self, _: Request<Empty>) -> Result<Response<IdentifyReply>, Status> {
        let (servers, volumes) = self.log.with_state(|s| (s.servers.len() as u32, s.volumes.len() as u32));
        Ok(Response::new(IdentifyReply {
            cluster: format!("{:032x}", self.log.identity().cluster.0),
            server: self.log.identity().server.0,
            address: self.address.clone(),
            leader: self.log.leader_address().unwrap_or_default(),
            servers,
            volumes,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn check_brick(&self, request: Request<CheckBrickRequest>) -> Result<Response<Empty>, Status> {
        let CheckBrickRequest { path, force, .. } = request.into_inner();
        tokio::task::spawn_blocking(move || checks::check(&path, force))
            .await
            .map_err(|e| Status::internal(e.to_string()))?
            .map_err(Status::invalid_argument)?;
        Ok(Response::new(Empty {}))
    }

    async fn brick_heal(&self, request: Request<BrickHealRequest>) -> Result<Response<BrickHealReply>, Status> {
        let brick = BrickId(request.into_inner().brick);
        let heal = self.bricks.heal(brick).ok_or_else(|| Status::not_found("the brick is not open on this server"))?;
        Ok(Response::new(heal))
    }
}

/// What the brick in `slot` lacks, by the lists of the `InSync` bricks (each of which has it all) and its own plan.
fn missing(
    set: &mortar_proto::metadata::state::ReplicaSet,
    slot: Slot,
    known: &HashMap<BrickId, BrickHealReply>,
) -> BTreeMap<Ino, (u64, u64)> {
    let mut files: BTreeMap<Ino, (u64, u64)> = BTreeMap::new();
    // [R5] What an InSync brick lacks is what is corrupt on it: it knows that by itself.
    let in_sync = set.configuration.in_sync();
    let tellers = if in_sync.has(slot) { Slots::NONE.with(slot) } else { in_sync.with(slot) };
    let of_slot = |reply: &BrickHealReply| -> Option<MissedOf> {
        reply.missed.iter().find(|m| m.slot == u32::from(slot.0)).cloned()
    };
    for teller in tellers.iter() {
        let brick = set.configuration.members[teller.index()].brick;
        let Some(missed) = known.get(&brick).and_then(of_slot) else { continue };
        for file in missed.files {
            let entry = files.entry(Ino(file.ino)).or_default();
            *entry = (entry.0.max(file.regions), entry.1.max(file.bytes));
        }
    }
    files
}
