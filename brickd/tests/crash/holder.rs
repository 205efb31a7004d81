//! The holder of a file's lease, as simple as can be: one request at a time, to one brick after the other.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use mortar_proto::client::link;
use mortar_proto::config::Slot;
use mortar_proto::frame::{self, FrameReader, Receiver};
use mortar_proto::metadata::{Command, Outcome as Applied};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::wire::id_bytes;
use mortar_proto::{Epoch, Ino, SIZE_REGION, SessionId};
use prost::Message as _;

use crate::server::{Server, wait_for};

struct Client {
    reader: FrameReader<Receiver>,
    socket: Arc<TcpStream>,
    next: u64,
}

impl Client {
    fn connect(server: &Server, slot: Slot, session: SessionId, channel: u32) -> Self {
        let hello = data::Hello {
            version: frame::VERSION,
            features: 0,
            cluster: id_bytes(server.log.identity().cluster.0),
            brick: server.brick(slot).0,
            session: session.0,
            channel,
            from_brick: 0,
        };
        let (reader, socket) = wait_for("a connection", || link::open(&server.address, &hello).ok());
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { reader, socket, next: 0 }
    }

    fn ask(&mut self, ino: Ino, stamp: data::Stamp, what: What, payload: &[u8]) -> Outcome {
        self.next += 1;
        let request = data::Request { id: self.next, ino: ino.0, stamp: Some(stamp), what: Some(what) };
        let mut bytes = frame::encode(&request, payload.len());
        bytes.extend_from_slice(payload);
        (&*self.socket).write_all(&bytes).unwrap();
        let answer = self.reader.receive().unwrap().expect("the connection has ended");
        data::Response::decode(answer.header).unwrap().outcome.unwrap()
    }
}

/// The holder.
pub struct Holder<'a> {
    server: &'a Server,
    ino: Ino,
    session: SessionId,
    seq: u64,
    clients: [Option<Client>; 3],
}

impl<'a> Holder<'a> {
    /// Takes the lease; one that the session has already it gives back first.
    pub fn new(server: &'a Server, ino: Ino, session: SessionId) -> Self {
        let epoch = Epoch(server.epoch(ino));
        server.propose(Command::LeaseRelease { ino, session, epoch, finished: true });
        let granted = server.propose(Command::LeaseGrant { ino, to: session, from: None });
        assert!(matches!(granted, Applied::Lease { .. }), "{granted:?}");
        Self { server, ino, session, seq: 0, clients: [None, None, None] }
    }

    fn stamp(&self, seq: u64) -> data::Stamp {
        let (n, epoch) = (self.server.configuration().n.0, self.server.epoch(self.ino));
        // One request at a time: what came before is acknowledged by all.
        data::Stamp { n, epoch, seq, stable: self.seq.saturating_sub(1), settled: true }
    }

    /// Asks one brick.
    pub fn ask(&mut self, slot: Slot, seq: u64, what: &What, payload: &[u8]) -> Outcome {
        let (server, session, channel, ino) = (self.server, self.session, self.ino.0 as u32, self.ino);
        wait_for("a brick that is not behind", || {
            let stamp = self.stamp(seq);
            let client =
                self.clients[slot.index()].get_or_insert_with(|| Client::connect(server, slot, session, channel));
            match client.ask(ino, stamp, what.clone(), payload) {
                // What it knows of is newer, or not as new; the stamp is made anew.
                Outcome::Behind(_) | Outcome::Stale(_) => None,
                answer => Some(answer),
            }
        })
    }

    fn ask_all(&mut self, seq: u64, what: &What, payload: &[u8]) {
        for slot in self.server.configuration().writable().iter() {
            let answer = self.ask(slot, seq, what, payload);
            assert!(matches!(answer, Outcome::Done(_)), "{what:?} on {slot:?}: {answer:?}");
        }
    }

    /// Changes the file on all bricks that are written to.
    pub fn mutate(&mut self, what: &What, payload: &[u8]) {
        self.seq += 1;
        self.ask_all(self.seq, what, payload);
    }

    /// Flushes it there [W8].
    pub fn flush(&mut self) {
        self.ask_all(0, &What::Flush(data::Flush {}), &[]);
    }

    /// Tells that all is stable [W6].
    pub fn settle(&mut self) {
        self.seq += 1;
        self.ask_all(0, &What::Settle(data::Settle {}), &[]);
    }

    /// Gives `x` back all that it and the others list [S2].
    pub fn repair(&mut self, x: Slot) {
        let in_sync = self.server.configuration().in_sync().without(x);
        loop {
            let mut regions = Vec::new();
            for slot in in_sync.with(x).iter() {
                let list = What::RepairList(data::RepairList { slot: u32::from(x.0) });
                match self.ask(slot, 0, &list, &[]) {
                    Outcome::List(list) => {
                        let bounds = list.files.iter().flat_map(|f| f.bounds.chunks_exact(2));
                        regions.extend(bounds.flat_map(|b| b[0]..b[1]));
                    }
                    other => panic!("{other:?}"),
                }
            }
            regions.sort_unstable();
            regions.dedup();
            if regions.is_empty() {
                return;
            }
            let from = u32::from(in_sync.iter().next().unwrap().0);
            for region in regions {
                let size = region == SIZE_REGION;
                let (start, end) = if size { (0, 0) } else { (region << 20, (region + 1) << 20) };
                let pull = data::Pull { start, end, size, from, ..Default::default() };
                self.seq += 1;
                let pulled = self.ask(x, self.seq, &What::Pull(pull), &[]);
                assert!(matches!(pulled, Outcome::Done(_)), "region {region} of {:?}: {pulled:?}", self.ino);
                for slot in in_sync.iter() {
                    let clear = What::ClearMissed(data::ClearMissed { slot: u32::from(x.0), region });
                    let cleared = self.ask(slot, 0, &clear, &[]);
                    assert!(matches!(cleared, Outcome::Done(_)), "{cleared:?}");
                }
            }
        }
    }
}
