//! Taking a range from another brick: compare sums, fetch what differs, keep holes holes `[S2]`, `[W2]`.

use std::collections::HashMap;
use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use mortar_proto::checksum;
use mortar_proto::client::link;
use mortar_proto::config::Slot;
use mortar_proto::frame::{self, FrameReader, Receiver};
use mortar_proto::replica::Stamp;
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::wire::id_bytes;
use mortar_proto::{BLOCK_BYTES, BrickId, ByteRange, Ino};
use parking_lot::Mutex;
use prost::Message as _;

use super::brick::Brick;
use super::requests::failed;

/// How long a brick may take to answer another.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Idle connections that are kept per brick.
const MAX_IDLE: usize = 8;

/// A connection to another brick, for one request at a time.
pub(super) struct Peer {
    reader: FrameReader<Receiver>,
    socket: Arc<TcpStream>,
    next: u64,
}

/// Idle connections to other bricks.
#[derive(Default)]
pub(super) struct Peers(Mutex<HashMap<BrickId, Vec<Peer>>>);

impl Peer {
    fn ask(&mut self, ino: Ino, stamp: &Stamp, what: What) -> anyhow::Result<(Option<Outcome>, Vec<u8>)> {
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

impl Brick {
    /// Asks the brick in `slot` of the same set.
    ///
    /// # Errors
    /// When it cannot be reached or does not answer in time.
    pub(super) fn ask_peer(
        &self,
        slot: Slot,
        ino: Ino,
        stamp: &Stamp,
        what: What,
    ) -> anyhow::Result<(Option<Outcome>, Vec<u8>)> {
        let id = Self::brick_of(&self.replica.lock(), slot).context("no configuration yet")?;
        let idle = self.peers.0.lock().entry(id).or_default().pop();
        let mut peer = match idle {
            Some(peer) => peer,
            None => self.connect(id)?,
        };
        let answer = peer.ask(ino, stamp, what.clone());
        let answer = match answer {
            // An idle connection may have died meanwhile.
            Err(_) => {
                peer = self.connect(id)?;
                peer.ask(ino, stamp, what)?
            }
            Ok(answer) => answer,
        };
        let mut peers = self.peers.0.lock();
        let idle = peers.entry(id).or_default();
        if idle.len() < MAX_IDLE {
            idle.push(peer);
        }
        Ok(answer)
    }

    fn connect(&self, id: BrickId) -> anyhow::Result<Peer> {
        let address = self.log.with_state(|state| {
            let server = state.bricks.get(&id)?.server;
            state.servers.get(&server).map(|s| s.address.clone())
        });
        let address = address.context("its server is not known")?;
        let hello = data::Hello {
            version: frame::VERSION,
            features: 0,
            cluster: id_bytes(self.cluster.0),
            brick: id.0,
            session: 0,
            channel: 0,
            from_brick: self.id.0,
        };
        let (reader, socket, _) = link::open(&address, &hello)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Peer { reader, socket, next: 0 })
    }
}

type Refusal = (Outcome, Vec<u8>);

fn unreachable(why: impl std::fmt::Display) -> Refusal {
    failed(libc::EHOSTUNREACH, format!("the source cannot be reached: {why}"), false)
}

/// Asks the source; what it refuses for its numbers is asked again later.
fn ask(brick: &Brick, from: Slot, ino: Ino, stamp: &Stamp, what: What) -> Result<(Outcome, Vec<u8>), Refusal> {
    match brick.ask_peer(from, ino, stamp, what) {
        Ok((Some(Outcome::Stale(_) | Outcome::Behind(_)), _)) => Err((Outcome::Behind(data::Behind {}), Vec::new())),
        Ok((Some(Outcome::Failed(f)), _)) => Err(unreachable(f.why)),
        Ok((Some(outcome), payload)) => Ok((outcome, payload)),
        Ok((None, _)) => Err(unreachable("its answer says nothing")),
        Err(e) => Err(unreachable(e)),
    }
}

/// Makes the range (or the size) here as it is at the source.
pub(super) fn pull(brick: &Brick, ino: Ino, stamp: &Stamp, pull: &data::Pull) -> Result<(), Refusal> {
    let Some(from) = Slot::ALL.get(pull.from as usize).copied().filter(|s| *s != brick.slot) else {
        return Err(failed(libc::EINVAL, "a pull from a slot that is none, or from itself", false));
    };
    let range = ByteRange { start: pull.start, end: pull.end }.to_blocks();
    let store = |e: crate::store::StoreError| {
        brick.complain(&e);
        failed(e.errno(), e.to_string(), e.is_disk_failure())
    };
    let (outcome, _) = ask(brick, from, ino, stamp, What::Sums(data::Sums { start: range.start, end: range.end }))?;
    let Outcome::Sums(theirs) = outcome else { return Err(unreachable("it answered something else")) };
    if pull.size {
        return brick.objects.truncate(ino, theirs.size).map(drop).map_err(store);
    }
    let count = (range.len() / BLOCK_BYTES) as usize;
    if theirs.sums.len() < count * 8 {
        return Err(unreachable("it sent too few sums"));
    }
    let (own, own_size) = brick.objects.sums(ino, range).map_err(store)?;
    let sum = |sums: &[u8], block: usize| sums[block * 8..block * 8 + 8].try_into().map_or(0, u64::from_le_bytes);
    let at = |block: usize| range.start + block as u64 * BLOCK_BYTES;
    // Past its end the source has nothing; what is here is cut off when the size is made equal.
    let their_sum = |block: usize| if at(block) < theirs.size { sum(&theirs.sums, block) } else { checksum::HOLE };
    // A block that one of the two files ends in has equal sums but maybe another length: it is fetched.
    let differs = |block: usize| {
        let last = at(block) < theirs.size
            && at(block) + BLOCK_BYTES > theirs.size.min(own_size)
            && their_sum(block) != checksum::HOLE;
        their_sum(block) != sum(&own, block) || last
    };
    let mut block = 0;
    while block < count {
        if !differs(block) {
            block += 1;
            continue;
        }
        let hole = their_sum(block) == checksum::HOLE;
        let mut end = block + 1;
        while end < count && differs(end) && (their_sum(end) == checksum::HOLE) == hole {
            end += 1;
        }
        let piece = ByteRange { start: at(block), end: at(end) };
        if hole {
            brick.objects.put(ino, piece, None).map_err(store)?;
        } else {
            let read = What::Read(data::Read { offset: piece.start, length: piece.len() as u32 });
            let (outcome, bytes) = ask(brick, from, ino, stamp, read)?;
            let Outcome::Read(reply) = outcome else { return Err(unreachable("it answered something else")) };
            let sums = reply.sums.chunks_exact(8).map(|s| s.try_into().map_or(0, u64::from_le_bytes));
            let sound = bytes.chunks(BLOCK_BYTES as usize).zip(sums).all(|(b, s)| checksum::matches(b, s));
            if !sound || bytes.is_empty() || bytes.len() as u64 > piece.len() {
                return Err(failed(libc::EIO, "the source's data does not match its checksums", false));
            }
            brick.objects.put(ino, piece, Some(&bytes)).map_err(store)?;
            brick.repaired_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        block = end;
    }
    Ok(())
}
