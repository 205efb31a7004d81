//! Connections to other bricks, for one request at a time; idle ones are kept.

use std::collections::HashMap;
use std::io::{ErrorKind, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mortar_proto::client::link;
use mortar_proto::config::Slot;
use mortar_proto::frame::{self, FrameError, FrameReader, Receiver};
use mortar_proto::replica::Stamp;
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::wire::id_bytes;
use mortar_proto::{BrickId, ConfigNo, Epoch, Ino, Seq, SessionId};
use parking_lot::Mutex;
use prost::Message as _;

use super::brick::Brick;

/// How long a brick may take to answer another.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Idle connections that are kept per brick.
const MAX_IDLE: usize = 8;
/// Pages of a list at most (I9).
const MAX_PAGES: usize = 10_000;

/// A connection to another brick.
struct Peer {
    reader: FrameReader<Receiver>,
    socket: Arc<TcpStream>,
    next: u64,
}

/// Idle connections to other bricks.
#[derive(Default)]
pub(super) struct Peers(Mutex<HashMap<BrickId, Vec<Peer>>>);

impl Peers {
    /// The configuration has changed: whoever was cut off comes back in this way, and connections from before may be dead.
    pub(super) fn forget(&self) {
        self.0.lock().clear();
    }
}

pub(super) type Told = (Option<Outcome>, Vec<u8>);

impl Peer {
    fn ask(&mut self, ino: Ino, stamp: &Stamp, what: What) -> anyhow::Result<Told> {
        self.next += 1;
        let stamp = data::Stamp { n: stamp.n.0, epoch: stamp.epoch.0, ..data::Stamp::default() };
        let request = data::Request { id: self.next, ino: ino.0, stamp: Some(stamp), what: Some(what) };
        (&*self.socket).write_all(&frame::encode(&request, 0))?;
        let frame = self.reader.receive()?.context("it closed the connection")?;
        let response = data::Response::decode(frame.header)?;
        anyhow::ensure!(response.id == self.next, "it answered another request");
        Ok((response.outcome, frame.payload.to_vec()))
    }
}

fn is_timeout(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    let io = io.or_else(|| match error.downcast_ref::<FrameError>() {
        Some(FrameError::Io(io)) => Some(io),
        _ => None,
    });
    io.is_some_and(|e| matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
}

impl Brick {
    /// Asks the brick in `slot` of the same set.
    ///
    /// # Errors
    /// When it cannot be reached or does not answer in time.
    pub(super) fn ask_peer(&self, slot: Slot, ino: Ino, stamp: &Stamp, what: What) -> anyhow::Result<Told> {
        let id = Self::brick_of(&self.replica.lock(), slot).context("no configuration yet")?;
        self.ask_brick(id, ino, stamp, &what)
    }

    /// Asks a brick.
    ///
    /// # Errors
    /// See [`Self::ask_peer`].
    pub(super) fn ask_brick(&self, id: BrickId, ino: Ino, stamp: &Stamp, what: &What) -> anyhow::Result<Told> {
        let idle = self.peers.0.lock().entry(id).or_default().pop();
        let was_idle = idle.is_some();
        let mut peer = match idle {
            Some(peer) => peer,
            None => self.connect(id)?,
        };
        let answer = match peer.ask(ino, stamp, what.clone()) {
            // An idle connection may have died meanwhile.
            Err(e) if was_idle && !is_timeout(&e) => {
                peer = self.connect(id)?;
                peer.ask(ino, stamp, what.clone())?
            }
            answer => answer?,
        };
        let mut peers = self.peers.0.lock();
        let idle = peers.entry(id).or_default();
        if idle.len() < MAX_IDLE {
            idle.push(peer);
        }
        Ok(answer)
    }

    /// Asks the brick in `slot` for a list, page by page, under configuration `n`; `each` is given every page. False: it does
    /// not tell it just now.
    pub(super) fn ask_for_list(
        &self,
        slot: Slot,
        n: ConfigNo,
        what: &What,
        mut each: impl FnMut(Vec<data::FileRegions>) -> bool,
    ) -> bool {
        let stamp = Stamp { n, epoch: Epoch(0), session: SessionId(0), seq: Seq(0), stable: Seq(0), settled: false };
        let mut from = Ino(0);
        for _ in 0..MAX_PAGES {
            let Ok((Some(Outcome::List(list)), _)) = self.ask_peer(slot, from, &stamp, what.clone()) else {
                return false;
            };
            let Some(next) = list.files.last().map(|f| f.ino.saturating_add(1)) else { return true };
            if next <= from.0 || !each(list.files) {
                return false;
            }
            from = Ino(next);
        }
        false
    }

    fn connect(&self, id: BrickId) -> anyhow::Result<Peer> {
        let address = self.log.with_state(|state| {
            let server = state.bricks.get(&id)?.server;
            state.servers.get(&server).map(|s| s.address.clone())
        });
        let hello = data::Hello {
            version: frame::VERSION,
            features: 0,
            cluster: id_bytes(self.cluster.0),
            brick: id.0,
            session: 0,
            channel: 0,
            from_brick: self.id.0,
        };
        let (reader, socket) = link::open(&address.context("its server is not known")?, &hello)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Peer { reader, socket, next: 0 })
    }
}
