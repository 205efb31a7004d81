//! Which clients there are, what they hold and have under way; ending one for good.

use mortar_proto::metadata::state::{Session, State};
use mortar_proto::metadata::{Command, Outcome};
use mortar_proto::wire::cluster::{ClientListReply, SessionFile, SessionRow};
use mortar_proto::{Ino, SessionId};
use tonic::Status;

use super::Server;
use super::lead::SessionNews;

/// Files that are named of one client, at most: each costs a search for its path.
const MAX_NAMED: usize = 200;

impl Server {
    /// The sessions of a volume, or all.
    pub(super) async fn list_clients(&self, volume: &str) -> Result<ClientListReply, Status> {
        self.log.linearizable().await?;
        let (now, news) = (self.now_ms(), self.lead(|leader| leader.sessions.clone())?);
        self.log.with_state(|state| {
            let wanted = match volume {
                "" => None,
                name => Some(
                    state.volume_named(name).ok_or_else(|| Status::invalid_argument(state.no_such_volume(name)))?.0,
                ),
            };
            let sessions = state.sessions.iter().filter(|(_, s)| wanted.is_none() || s.volume == wanted);
            let clients = sessions.map(|(id, s)| row(state, *id, s, news.get(id), now)).collect();
            Ok(ClientListReply { clients })
        })
    }

    /// Ends a session, and tells its client.
    pub(super) async fn evict_client(&self, session: &str) -> Result<Outcome, Status> {
        self.log.linearizable().await?;
        let session = u64::from_str_radix(session, 16).map_err(|_| {
            Status::invalid_argument(format!("{session:?} is no session; `mortar client list` shows them"))
        })?;
        let outcome = self.log.propose(Command::SessionEvict { session: SessionId(session) }, None).await?;
        if outcome == Outcome::Done {
            tracing::warn!(session = format!("{session:x}"), "the administrator has evicted a client");
        }
        Ok(outcome)
    }
}

fn row(state: &State, id: SessionId, session: &Session, news: Option<&SessionNews>, now_ms: u64) -> SessionRow {
    let file = |ino: &Ino| SessionFile {
        path: state.path_of(*ino).unwrap_or_default(),
        ino: ino.0,
        open: session.open.contains(ino),
        lease: session.leases.contains(ino),
    };
    let named = session.leases.iter().chain(session.open.difference(&session.leases));
    SessionRow {
        session: format!("{:x}", id.0),
        client: session.client.clone(),
        address: session.address.clone(),
        volume: session.volume.and_then(|v| state.volumes.get(&v)).map_or_else(String::new, |v| v.name.clone()),
        opened_ns: session.opened_ns,
        heard_ms: news.map_or(u32::MAX, |n| now_ms.saturating_sub(n.heard_ms).min(u64::from(u32::MAX - 1)) as u32),
        in_flight: news.map_or(0, |n| n.in_flight),
        open_files: session.open.len() as u64,
        leases: session.leases.len() as u64,
        files: named.take(MAX_NAMED).map(file).collect(),
    }
}
