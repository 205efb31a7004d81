//! A server with three bricks of one volume, over real disks and sockets, and a leader that keeps them going.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mortar_proto::client::link;
use mortar_proto::config::{BrickState, Configuration, Slot, Slots};
use mortar_proto::frame::{self, FrameReader, Receiver};
use mortar_proto::metadata::monitor::{Beat, Monitor, Timing};
use mortar_proto::metadata::state::Node;
use mortar_proto::metadata::{BrickPlace, Command, NameOp, NewNode, Outcome as Applied, Registration};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::wire::{id_bytes, id_from, peer};
use mortar_proto::{BrickId, ConfigNo, Incarnation, Ino, SessionId, SetId};
use prost::Message as _;

use super::super::Bricks;
use crate::identity::Identity;
use crate::log::Log;
use crate::metrics;

pub(super) struct World {
    pub(super) dir: PathBuf,
    runtime: tokio::runtime::Runtime,
    pub(super) log: Log,
    pub(super) bricks: Arc<Bricks>,
    address: String,
    /// The leader answers heartbeats.
    pub(super) answers: Arc<AtomicBool>,
    /// It also proposes.
    pub(super) leads: Arc<AtomicBool>,
    ends: Arc<AtomicBool>,
    leader: Option<JoinHandle<()>>,
}

pub(super) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl World {
    /// Starts, or starts again, the server whose disks are in `dir`.
    pub(super) fn start(dir: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::fs::create_dir_all(dir.join("server")).unwrap();
        let identity = Identity::load(&dir.join("server")).unwrap();
        let (log, applied) = runtime.block_on(Log::open(&dir.join("server"), identity.clone(), &address)).unwrap();
        let bricks = Bricks::open(log.clone(), applied, &dir.join("server")).unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let (keeper, end) = (Arc::clone(&bricks), Arc::clone(&ends));
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                if end.load(Ordering::Acquire) {
                    return;
                }
                let from = socket.peer_addr().unwrap();
                keeper.serve_data(socket, from);
            }
        });
        wait_for("a leader", || log.is_leader().then_some(()));
        let mut world = Self {
            dir: dir.to_owned(),
            runtime,
            log,
            bricks,
            address,
            answers: Arc::new(AtomicBool::new(true)),
            leads: Arc::new(AtomicBool::new(true)),
            ends,
            leader: None,
        };
        let server = identity.server;
        world.propose(Command::ServerAdd { server, address: world.address.clone() });
        if world.log.with_state(|s| s.sets.is_empty()) {
            let place = |i: u32| BrickPlace { server, path: dir.join(format!("b{i}")).display().to_string() };
            let sets = vec![[place(0), place(1), place(2)]];
            world.propose(Command::VolumeCreate { name: "v".into(), sets, force: true });
            world.propose(Command::VolumeStart { name: "v".into() });
        }
        world.lead();
        world
    }

    fn lead(&mut self) {
        let (log, bricks) = (self.log.clone(), Arc::clone(&self.bricks));
        let (answers, leads, ends) = (Arc::clone(&self.answers), Arc::clone(&self.leads), Arc::clone(&self.ends));
        let handle = self.runtime.handle().clone();
        let leader = std::thread::spawn(move || {
            let began = Instant::now();
            let timing = Timing {
                read_lease_ms: 1000,
                clock_margin_ms: 100,
                cold_start_wait_ms: 300,
                back_off_ms: 50,
                back_off_max_ms: 50,
            };
            let mut monitor = Monitor::new(timing, 0);
            while !ends.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(15));
                let now_ms = began.elapsed().as_millis() as u64;
                let sent = Instant::now();
                let beats: Vec<Beat> = bricks.beats().iter().map(beat).collect();
                if answers.load(Ordering::Acquire) {
                    let asked = log.with_state(|s| monitor.heartbeat(s, now_ms, &beats));
                    let reply = peer::HeartbeatReply {
                        commit: log.applied().0,
                        asked_out: asked.into_iter().map(|b| b.0).collect(),
                        withheld: Vec::new(),
                    };
                    bricks.heartbeat_answered(sent, &reply);
                }
                if leads.load(Ordering::Acquire) {
                    for command in log.with_state(|s| monitor.poll(s, now_ms)) {
                        let _ = handle.block_on(log.propose(command, None));
                    }
                }
            }
        });
        self.leader = Some(leader);
    }

    pub(super) fn propose(&self, command: Command) -> Applied {
        self.runtime.block_on(self.log.propose(command, None)).unwrap()
    }

    /// What Prometheus would be told.
    pub(super) fn metrics(&self) -> String {
        let any = "127.0.0.1:0".parse().unwrap();
        let address = self.runtime.block_on(metrics::serve(any, self.log.clone(), Arc::clone(&self.bricks))).unwrap();
        let mut socket = TcpStream::connect(address).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n").unwrap();
        let mut told = String::new();
        socket.read_to_string(&mut told).unwrap();
        told
    }

    pub(super) fn set(&self) -> SetId {
        self.log.with_state(|s| *s.sets.keys().next().unwrap())
    }
    pub(super) fn configuration(&self) -> Configuration {
        self.log.with_state(|s| s.sets.values().next().unwrap().configuration)
    }
    pub(super) fn brick(&self, slot: Slot) -> BrickId {
        self.configuration().members[slot.index()].brick
    }
    pub(super) fn epoch(&self, ino: Ino) -> u64 {
        self.log.with_state(|s| match &s.inodes[&ino].node {
            Node::File { lease, .. } => lease.epoch.0,
            _ => panic!("no file"),
        })
    }

    /// Waits until the bricks are in these states, and know it.
    pub(super) fn wait_for_states(&self, states: [BrickState; 3]) {
        wait_for(&format!("{states:?}, not {:?}", self.configuration()), || {
            let configuration = self.configuration();
            let is_so = Slot::ALL.into_iter().all(|s| {
                let known = self.bricks.brick(self.brick(s)).and_then(|b| b.replica.lock().configuration().copied());
                let is_registered = configuration.members[s.index()].incarnation != Incarnation(0);
                is_registered && configuration.state(s) == states[s.index()] && known == Some(configuration)
            });
            is_so.then_some(())
        });
    }

    pub(super) fn session(&self) -> SessionId {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).unwrap();
        let open = Command::SessionOpen {
            nonce: u128::from_be_bytes(nonce),
            volume: "v".into(),
            client: "test".into(),
            address: String::new(),
        };
        match self.propose(open) {
            Applied::Session { session, .. } => session,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn create(&self, session: SessionId, name: &str) -> Ino {
        let root = self.log.with_state(|s| s.volumes.values().next().unwrap().root);
        let operation = NameOp::Create {
            parent: root,
            name: name.into(),
            node: NewNode::File,
            mode: 0o640,
            uid: 0,
            gid: 0,
            or_existing: false,
            open: false,
        };
        match self.propose(Command::Name { session, operation }) {
            Applied::Node { attributes, .. } => attributes.ino,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn unlink(&self, session: SessionId, name: &str) {
        let root = self.log.with_state(|s| s.volumes.values().next().unwrap().root);
        self.propose(Command::Name { session, operation: NameOp::Unlink { parent: root, name: name.into() } });
    }

    pub(super) fn grant(&self, ino: Ino, to: SessionId) {
        let granted = self.propose(Command::LeaseGrant { ino, to, from: None });
        assert!(matches!(granted, Applied::Lease { .. }), "{granted:?}");
    }

    pub(super) fn hello(&self, slot: Slot, session: SessionId) -> data::Hello {
        data::Hello {
            version: frame::VERSION,
            features: 0,
            cluster: id_bytes(self.log.identity().cluster.0),
            brick: self.brick(slot).0,
            session: session.0,
            channel: 0,
            from_brick: 0,
        }
    }

    pub(super) fn try_connect(&self, hello: &data::Hello) -> anyhow::Result<Client> {
        let (reader, socket) = link::open(&self.address, hello)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Client { reader, socket, next: 0 })
    }

    pub(super) fn connect(&self, slot: Slot, session: SessionId) -> Client {
        self.try_connect(&self.hello(slot, session)).unwrap()
    }

    /// Where a file's data is on the disk of a brick.
    pub(super) fn data(&self, slot: Slot, ino: Ino) -> PathBuf {
        self.dir.join(format!("b{}/.mortar/objects/{:02x}/{:x}", slot.0, ino.0 & 0xff, ino.0))
    }

    /// Ends: the bricks stop as they are, as when the process is killed.
    pub(super) fn kill(mut self) {
        self.ends.store(true, Ordering::Release);
        let _ = TcpStream::connect(&self.address);
        self.leader.take().unwrap().join().unwrap();
        self.bricks.each(|b| b.close());
        let weak: Vec<_> =
            Slot::ALL.iter().filter_map(|s| self.bricks.brick(self.brick(*s))).map(|b| Arc::downgrade(&b)).collect();
        let Self { runtime, log, bricks, .. } = self;
        runtime.block_on(log.stop());
        bricks.kept.write().clear();
        drop((bricks, log));
        runtime.shutdown_timeout(Duration::from_secs(2));
        wait_for("the bricks' threads to end", || weak.iter().all(|b| b.upgrade().is_none()).then_some(()));
        // The databases are closed by threads of their own.
        std::thread::sleep(Duration::from_millis(200));
    }

    /// Stops cleanly.
    pub(super) fn stop(self) {
        self.bricks.stop();
        self.kill();
    }
}

fn beat(b: &peer::BrickBeat) -> Beat {
    Beat {
        brick: BrickId(b.brick),
        registration: Registration {
            incarnation: Incarnation(b.incarnation),
            boot: mortar_proto::BootId(id_from(&b.boot).unwrap_or(0)),
            clean: b.clean,
        },
        known: ConfigNo(b.known),
        agreed_under: ConfigNo(b.agreed_under),
        failed: !b.failed.is_empty(),
        stopping: b.stopping,
        n: ConfigNo(b.n),
        missed_empty: Slots(b.missed_empty as u8),
        repaired: b.repaired,
    }
}

/// A client of one brick.
pub(super) struct Client {
    reader: FrameReader<Receiver>,
    pub(super) socket: Arc<TcpStream>,
    next: u64,
}

impl Client {
    pub(super) fn send(&mut self, ino: Ino, stamp: data::Stamp, what: What, payload: &[u8]) -> u64 {
        self.next += 1;
        let request = data::Request { id: self.next, ino: ino.0, stamp: Some(stamp), what: Some(what) };
        let mut bytes = frame::encode(&request, payload.len());
        bytes.extend_from_slice(payload);
        (&*self.socket).write_all(&bytes).unwrap();
        self.next
    }

    /// The next answer; `None` when the connection has ended.
    pub(super) fn receive(&mut self) -> Option<(u64, Outcome, Vec<u8>)> {
        let frame = self.reader.receive().ok()??;
        let response = data::Response::decode(frame.header).unwrap();
        Some((response.id, response.outcome.unwrap(), frame.payload.to_vec()))
    }

    pub(super) fn ask(&mut self, ino: Ino, stamp: data::Stamp, what: What, payload: &[u8]) -> (Outcome, Vec<u8>) {
        let id = self.send(ino, stamp, what, payload);
        let (answered, outcome, payload) = self.receive().expect("the connection has ended");
        assert_eq!(answered, id);
        (outcome, payload)
    }

    /// Asks until the brick is not behind any more.
    pub(super) fn ask_until_ready(
        &mut self,
        ino: Ino,
        stamp: data::Stamp,
        what: &What,
        payload: &[u8],
    ) -> (Outcome, Vec<u8>) {
        wait_for("a brick that is not behind", || {
            let answer = self.ask(ino, stamp, what.clone(), payload);
            (!matches!(answer.0, Outcome::Behind(_))).then_some(answer)
        })
    }

    pub(super) fn read(&mut self, ino: Ino, offset: u64, length: u32) -> Vec<u8> {
        let read = What::Read(data::Read { offset, length });
        match self.ask_until_ready(ino, data::Stamp::default(), &read, &[]) {
            (Outcome::Read(reply), bytes) => {
                for (block, sum) in bytes.chunks(4096).zip(reply.sums.chunks_exact(8)) {
                    assert!(mortar_proto::checksum::matches(block, u64::from_le_bytes(sum.try_into().unwrap())));
                }
                bytes
            }
            other => panic!("{other:?}"),
        }
    }
}

/// The first two bricks are in sync, and the third is out, or under repair.
pub(super) const ONE_OUT: [BrickState; 3] = [BrickState::InSync, BrickState::InSync, BrickState::Out];
pub(super) const ONE_SYNCING: [BrickState; 3] = [BrickState::InSync, BrickState::InSync, BrickState::Syncing];

/// Takes a brick out, and has nobody take it back.
pub(super) fn put_out(world: &World, slot: Slot) {
    world.leads.store(false, Ordering::Release);
    let (set, n) = (world.set(), world.configuration().n);
    world.propose(Command::PutOut { set, n, slot });
    world.wait_for_states(ONE_OUT);
}

/// Takes a brick back that was taken out.
pub(super) fn take_back(world: &World, slot: Slot) {
    let (set, n) = (world.set(), world.configuration().n);
    world.propose(Command::Rejoin { set, n, slot });
    world.wait_for_states(ONE_SYNCING);
    world.leads.store(true, Ordering::Release);
}

/// The content of a file, which is the same on all bricks.
pub(super) fn same_everywhere(world: &World, ino: Ino) -> Vec<u8> {
    let [a, b, c] = Slot::ALL.map(|s| std::fs::read(world.data(s, ino)).unwrap());
    assert!(a == b && b == c, "contents differ");
    a
}

/// The holder of a file's lease, as simple as can be: one request at a time.
pub(super) struct Holder<'a> {
    world: &'a World,
    pub(super) ino: Ino,
    session: SessionId,
    pub(super) seq: u64,
    clients: [Option<Client>; 3],
}

impl<'a> Holder<'a> {
    pub(super) fn new(world: &'a World, ino: Ino, session: SessionId) -> Self {
        world.grant(ino, session);
        Self { world, ino, session, seq: 0, clients: [None, None, None] }
    }

    pub(super) fn stamp(&self, seq: u64) -> data::Stamp {
        let n = self.world.configuration().n.0;
        data::Stamp { n, epoch: self.world.epoch(self.ino), seq, stable: 0, settled: true }
    }

    pub(super) fn ask(&mut self, slot: Slot, stamp: data::Stamp, what: &What, payload: &[u8]) -> Outcome {
        let client = self.clients[slot.index()].get_or_insert_with(|| {
            // A channel of its own: a session's connection ends the older one of the same channel [F3].
            let hello = data::Hello { channel: self.ino.0 as u32, ..self.world.hello(slot, self.session) };
            self.world.try_connect(&hello).unwrap()
        });
        client.ask_until_ready(self.ino, stamp, what, payload).0
    }

    /// Does the same on all bricks that are written to.
    pub(super) fn mutate(&mut self, what: &What, payload: &[u8]) {
        self.seq += 1;
        let stamp = self.stamp(self.seq);
        for slot in self.world.configuration().writable().iter() {
            assert_eq!(self.ask(slot, stamp, what, payload), Outcome::Done(data::Done::default()), "{slot:?}");
        }
    }

    pub(super) fn write(&mut self, offset: u64, payload: &[u8]) {
        self.mutate(&What::Write(data::Write { offset, sums: Default::default() }), payload);
    }

    /// [S2] What the coordinator does: gives `x` back all that it and the others list. Returns the regions.
    pub(super) fn repair(&mut self, x: Slot) -> Vec<u64> {
        let mut repaired = Vec::new();
        'again: loop {
            let in_sync = self.world.configuration().in_sync();
            let mut regions = Vec::new();
            for slot in in_sync.with(x).iter() {
                let list = What::RepairList(data::RepairList { slot: u32::from(x.0) });
                match self.ask(slot, self.stamp(0), &list, &[]) {
                    Outcome::List(list) => {
                        let bounds = list.files.iter().flat_map(|f| f.bounds.chunks_exact(2));
                        regions.extend(bounds.flat_map(|b| b[0]..b[1]));
                    }
                    // Another brick was promoted meanwhile.
                    Outcome::Stale(_) => continue 'again,
                    other => panic!("{other:?}"),
                }
            }
            regions.sort_unstable();
            regions.dedup();
            if regions.is_empty() {
                return repaired;
            }
            let from = in_sync.without(x).iter().next().unwrap();
            for region in regions {
                let size = region == mortar_proto::SIZE_REGION;
                let (start, end) = if size { (0, 0) } else { (region << 20, (region + 1) << 20) };
                let pull = data::Pull { start, end, size, from: u32::from(from.0), ..Default::default() };
                self.seq += 1;
                let stamp = self.stamp(self.seq);
                let pulled = self.ask(x, stamp, &What::Pull(pull), &[]);
                if matches!(pulled, Outcome::Stale(_)) {
                    continue 'again;
                }
                assert!(matches!(pulled, Outcome::Done(_)), "region {region}: {pulled:?}");
                for slot in in_sync.iter() {
                    let clear = What::ClearMissed(data::ClearMissed { slot: u32::from(x.0), region });
                    let cleared = self.ask(slot, self.stamp(0), &clear, &[]);
                    if matches!(cleared, Outcome::Stale(_)) {
                        continue 'again;
                    }
                    assert_eq!(cleared, Outcome::Done(data::Done::default()));
                }
                repaired.push(region);
            }
        }
    }
}
