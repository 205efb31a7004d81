//! What mounted clients say to the leader.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::time::{Duration, Instant};

use mortar_proto::config::Slot;
use mortar_proto::metadata::options::Options;
use mortar_proto::metadata::state::{Lease, Node, State};
use mortar_proto::metadata::{Command, NameOp, Outcome, Query};
use mortar_proto::wire::session::{
    Empty, EndRequest, Event, KeepAlive, LeaseReply, LeaseRequest, NameReply, NameRequest, OpenReply, OpenRequest,
    ReleaseRequest, StatFsReply, StatFsRequest, SuspectRequest, event, session_server::Session,
};
use mortar_proto::wire::{decode, encode, id_bytes, id_from, session as wire};
use mortar_proto::{ConfigNo, Epoch, Ino, SessionId, SetId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Server;
use super::lead::{options_event, picture};

/// How long one call waits for a lease; the client calls again.
const LEASE_WAIT: Duration = Duration::from_secs(20);
/// How often a holder is reminded.
const RECALL_EVERY: Duration = Duration::from_millis(500);
/// Events that wait for a slow client.
const EVENT_QUEUE: usize = 1024;

fn ended() -> Status {
    Status::not_found("the session has ended")
}

fn lease_of(state: &State, ino: Ino) -> Option<Lease> {
    match &state.inodes.get(&ino)?.node {
        Node::File { lease, .. } => Some(*lease),
        _ => None,
    }
}

impl Server {
    fn check_allowed(&self, volume: &str, from: Option<IpAddr>) -> Result<(), Status> {
        self.log.with_state(|state| {
            let Some((_, row)) = state.volume_named(volume) else {
                return Err(Status::invalid_argument(state.no_such_volume(volume)));
            };
            match from {
                Some(from) if !Options::of(row).allows(from) => Err(Status::permission_denied(format!(
                    "{from} may not mount volume {volume}: its option auth.allow is {:?}",
                    Options::of(row).auth_allow
                ))),
                _ => Ok(()),
            }
        })
    }
}

/// A session waits for a lease, as long as this lives: a call that is broken off waits no more.
struct Wanting<'a> {
    server: &'a Server,
    ino: Ino,
    session: SessionId,
}

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        // Who leads no more has nobody who waits.
        let _ = self.server.lead(|leader| leader.want_no_more(self.ino, self.session));
    }
}

/// Both ends of a connection are on this machine. A host's own name may lead to one loopback address, and what it sends from is another.
fn is_own(from: Option<SocketAddr>, here: Option<SocketAddr>) -> bool {
    let ip = |a: Option<SocketAddr>| a.map(|a| a.ip().to_canonical());
    let is_loopback = |a| ip(a).is_some_and(|ip| ip.is_loopback());
    ip(from) == ip(here) || is_loopback(from) && is_loopback(here)
}

#[tonic::async_trait]
impl Session for Server {
    async fn open(&self, request: Request<OpenRequest>) -> Result<Response<OpenReply>, Status> {
        self.log.linearizable().await?;
        let (from, here) = (request.remote_addr(), request.local_addr());
        let request = request.into_inner();
        let nonce = id_from(&request.nonce).ok_or_else(|| Status::invalid_argument("a nonce has 16 bytes"))?;
        if self.log.with_state(|state| state.evicted.contains(&SessionId(request.previous))) {
            return Ok(Response::new(OpenReply { evicted: true, ..OpenReply::default() }));
        }
        if request.volume.is_empty() {
            // The janitor has all volumes, and works on the leader's own machine; nobody else is given that.
            if !is_own(from, here) {
                return Err(Status::permission_denied("name the volume to be mounted"));
            }
        } else {
            self.check_allowed(&request.volume, from.map(|a| a.ip()))?;
        }
        let command = Command::SessionOpen {
            nonce,
            volume: request.volume.clone(),
            client: request.client,
            address: from.map_or(String::new(), |a| a.ip().to_canonical().to_string()),
        };
        let (session, volume, root) = match self.log.propose(command, None).await? {
            Outcome::Session { session, volume, root } => (session, volume, root),
            Outcome::Refused(why) => return Err(Status::failed_precondition(why)),
            other => return Err(Status::internal(format!("opening a session gave {other:?}"))),
        };
        let now = self.now_ms();
        self.lead(|leader| leader.session_heard(session, now))?;
        let reply = self.log.with_state(|state| {
            let options = state.volumes.get(&volume).map_or_else(Options::defaults, Options::of);
            let told = options_event(&options);
            OpenReply {
                session: session.0,
                volume: volume.0,
                root: root.0,
                cluster: id_bytes(self.log.identity().cluster.0),
                session_ttl_ms: told.session_ttl_ms,
                io_timeout_ms: told.io_timeout_ms,
                no_quorum_ms: told.no_quorum_ms,
                repair_rate: told.repair_rate,
                sets: pictures(state, request.volume.is_empty(), volume),
                servers: state.servers.values().map(|s| s.address.clone()).collect(),
                evicted: false,
            }
        });
        Ok(Response::new(reply))
    }

    type WatchStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<Event, Status>> + Send>>;

    async fn watch(&self, request: Request<Streaming<KeepAlive>>) -> Result<Response<Self::WatchStream>, Status> {
        let mut beats = request.into_inner();
        let first = beats.message().await?.ok_or_else(|| Status::invalid_argument("no keep-alive"))?;
        let session = SessionId(first.session);
        self.log.linearizable().await?;
        let (tell, events) = mpsc::channel(EVENT_QUEUE);
        let shown = self.log.with_state(|state| {
            let row = state.sessions.get(&session)?;
            Some(pictures(state, row.volume.is_none(), row.volume.unwrap_or_default()))
        });
        for set in shown.ok_or_else(ended)? {
            let _ = tell.try_send(Ok(Event { event: Some(event::Event::Set(set)) }));
        }
        let now = self.now_ms();
        // The leader's memory alone keeps the stream open. When that ends with an election, even one that this server wins
        // again, or drops a client that is too slow, the stream ends, and the client asks anew and is shown everything.
        let alive = tell.downgrade();
        self.lead(|leader| {
            leader.session_heard(session, now);
            leader.watch(session, tell);
        })?;
        let leader = self.me();
        tokio::spawn(async move {
            while let Ok(Some(beat)) = beats.message().await {
                let Some(server) = leader.upgrade() else { return };
                let now = server.now_ms();
                let known = server.log.with_state(|state| state.sessions.contains_key(&session));
                if !known || server.lead(|l| l.session_kept(session, now, beat.in_flight)).is_err() {
                    return;
                }
                let Some(tell) = alive.upgrade() else { return };
                if tell.try_send(Ok(Event { event: Some(event::Event::Alive(wire::Alive {})) })).is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn end(&self, request: Request<EndRequest>) -> Result<Response<Empty>, Status> {
        let session = SessionId(request.into_inner().session);
        self.log.propose(Command::SessionEnd { session }, None).await?;
        Ok(Response::new(Empty {}))
    }

    async fn acquire_lease(&self, request: Request<LeaseRequest>) -> Result<Response<LeaseReply>, Status> {
        let request = request.into_inner();
        let (to, ino) = (SessionId(request.session), Ino(request.ino));
        let until = Instant::now() + LEASE_WAIT;
        let mut applied = self.log.watch_applied();
        let mut waited = false;
        let _wanting = Wanting { server: self, ino, session: to };
        loop {
            self.lead(|_| ())?;
            let lease = self.log.with_state(|state| {
                if !state.sessions.contains_key(&to) {
                    return Err(ended());
                }
                lease_of(state, ino).ok_or_else(|| Status::failed_precondition("there is no such file"))
            })?;
            match lease.holder.filter(|h| *h != to) {
                // [W1] Granted by the entry in which the holder before released it.
                None if waited && lease.holder.is_some() => {
                    return Ok(Response::new(LeaseReply { epoch: lease.epoch.0, recover: lease.recover }));
                }
                None => match self.log.propose(Command::LeaseGrant { ino, to, from: None }, None).await? {
                    Outcome::Lease { epoch, recover, .. } => {
                        return Ok(Response::new(LeaseReply { epoch: epoch.0, recover }));
                    }
                    Outcome::Superseded => {}
                    Outcome::Errno(mortar_proto::metadata::NameError::SessionEnded) => return Err(ended()),
                    other => return Err(Status::failed_precondition(format!("the lease is refused: {other:?}"))),
                },
                Some(holder) => {
                    self.lead(|leader| {
                        leader.want(ino, to);
                        leader.recall(holder, ino, lease.epoch.0);
                    })?;
                    let again = Instant::now() + RECALL_EVERY;
                    let still_held =
                        || self.log.with_state(|s| lease_of(s, ino).is_some_and(|l| l.holder == Some(holder)));
                    while still_held() && Instant::now() < again {
                        let left = again.saturating_duration_since(Instant::now());
                        let _ = tokio::time::timeout(left, applied.changed()).await;
                    }
                    waited = true;
                }
            }
            if Instant::now() > until {
                return Err(Status::aborted("the lease is still held by another session"));
            }
        }
    }

    async fn release_lease(&self, request: Request<ReleaseRequest>) -> Result<Response<Empty>, Status> {
        let r = request.into_inner();
        let (ino, session, epoch) = (Ino(r.ino), SessionId(r.session), Epoch(r.epoch));
        // [W1] The release and the next grant are one entry, so that nobody comes in between.
        if let Some(to) = self.lead(|leader| leader.next_to_have(ino, session))? {
            let grant = Command::LeaseGrant { ino, to, from: Some((session, epoch, r.finished)) };
            if let Outcome::Lease { .. } = self.log.propose(grant, None).await? {
                return Ok(Response::new(Empty {}));
            }
        }
        let command = Command::LeaseRelease { ino, session, epoch, finished: r.finished };
        self.log.propose(command, None).await?;
        Ok(Response::new(Empty {}))
    }

    async fn suspect(&self, request: Request<SuspectRequest>) -> Result<Response<Empty>, Status> {
        let r = request.into_inner();
        let slot = Slot::ALL.get(r.slot as usize).copied().ok_or_else(|| Status::invalid_argument("no such slot"))?;
        let is_news = self.lead(|leader| {
            self.log.with_state(|state| leader.monitor.suspect(state, SetId(r.set), ConfigNo(r.n), slot))
        })?;
        if is_news {
            let (set, slot, n, session) = (r.set, r.slot, r.n, r.session);
            tracing::info!(set, slot, n, session, "a client complains of a brick: {}", r.why);
        }
        self.poke_leader();
        Ok(Response::new(Empty {}))
    }

    async fn submit(&self, request: Request<NameRequest>) -> Result<Response<NameReply>, Status> {
        let request = request.into_inner();
        let session = SessionId(request.session);
        let operation: NameOp =
            decode(&request.body).map_err(|e| Status::invalid_argument(format!("the change does not decode: {e}")))?;
        let command = Command::Name { session, operation };
        let outcome = self.log.propose(command, Some((session, request.number))).await?;
        Ok(Response::new(NameReply { body: encode(&outcome).into() }))
    }

    async fn ask(&self, request: Request<NameRequest>) -> Result<Response<NameReply>, Status> {
        let request = request.into_inner();
        let query: Query = decode(&request.body)
            .map_err(|e| Status::invalid_argument(format!("the question does not decode: {e}")))?;
        self.log.linearizable().await?;
        let answer = self.log.with_state(|state| {
            let row = state.sessions.get(&SessionId(request.session)).ok_or_else(ended)?;
            Ok::<_, Status>(state.ask(row.volume, &query))
        })?;
        Ok(Response::new(NameReply { body: encode(&answer).into() }))
    }

    async fn stat_fs(&self, request: Request<StatFsRequest>) -> Result<Response<StatFsReply>, Status> {
        let session = SessionId(request.into_inner().session);
        let reply = self.lead(|leader| {
            self.log.with_state(|state| {
                let volume = state.sessions.get(&session).and_then(|s| s.volume).ok_or_else(ended)?;
                let mut reply = StatFsReply {
                    files: state.inodes.values().filter(|i| i.volume == volume).count() as u64,
                    ..StatFsReply::default()
                };
                for set in state.sets.values().filter(|s| s.volume == volume) {
                    // The fullest brick bounds the set.
                    let rooms = set
                        .configuration
                        .members
                        .iter()
                        .filter_map(|m| leader.bricks.get(&m.brick))
                        .filter(|b| b.total_bytes > 0);
                    let (total, free) =
                        rooms.fold((u64::MAX, u64::MAX), |(t, f), b| (t.min(b.total_bytes), f.min(b.free_bytes)));
                    if total < u64::MAX {
                        reply.total_bytes += total;
                        reply.free_bytes += free;
                    }
                }
                Ok::<_, Status>(reply)
            })
        })??;
        Ok(Response::new(reply))
    }
}

fn pictures(state: &State, all: bool, volume: mortar_proto::VolumeId) -> Vec<wire::SetPicture> {
    let sets = state.sets.iter().filter(|(_, s)| all || s.volume == volume);
    sets.map(|(id, s)| picture(state, *id, &s.configuration)).collect()
}

#[cfg(test)]
mod tests {
    use super::is_own;

    #[test]
    fn a_host_whose_name_leads_to_another_loopback_address_is_itself_and_others_are_not() {
        let own = |from: &str, here: &str| is_own(from.parse().ok(), here.parse().ok());
        assert!(own("10.0.0.1:5", "10.0.0.1:7440") && own("[::ffff:10.0.0.1]:5", "10.0.0.1:7440"));
        // As Debian writes the host's own name into /etc/hosts.
        assert!(own("127.0.0.1:5", "127.0.1.1:7440") && own("[::1]:5", "127.0.1.1:7440"));
        assert!(!own("10.0.0.2:5", "10.0.0.1:7440") && !own("127.0.0.1:5", "10.0.0.1:7440"));
    }
}
