//! A server with three bricks of one volume: the real log, bricks and sockets, and a leader that keeps them going.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mortar_brickd::bricks::Bricks;
use mortar_brickd::identity::Identity;
use mortar_brickd::log::Log;
use mortar_proto::config::{BrickState, Configuration, Member, Slot, Slots};
use mortar_proto::metadata::monitor::{Beat, Monitor, Timing};
use mortar_proto::metadata::state::{Inode, Node, State};
use mortar_proto::metadata::{BrickPlace, Command, NameOp, NewNode, Outcome, Registration};
use mortar_proto::wire::{id_from, peer};
use mortar_proto::{BootId, BrickId, ConfigNo, Incarnation, Ino, SessionId};

use crate::trace::Seen;

/// Waits for something that must come.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where a server keeps what it has.
#[derive(Clone)]
pub struct Places {
    /// The metadata log.
    pub server: PathBuf,
    /// The bricks.
    pub bricks: [PathBuf; 3],
}

/// Where in its directory it remembers its bricks.
pub const WITNESSES: &str = "bricks";

/// The server.
pub struct Server {
    runtime: tokio::runtime::Runtime,
    pub log: Log,
    bricks: Arc<Bricks>,
    pub address: String,
    dir: PathBuf,
    /// It proposes what a leader proposes.
    pub leads: Arc<AtomicBool>,
    ends: Arc<AtomicBool>,
    leader: Option<JoinHandle<()>>,
    listener: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts it, or starts it again.
    pub fn start(places: &Places) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::fs::create_dir_all(&places.server).unwrap();
        let identity = Identity::load(&places.server).unwrap();
        let server = identity.server;
        let (log, applied) = runtime.block_on(Log::open(&places.server, identity, &address)).unwrap();
        let bricks = Bricks::open(log.clone(), applied, &places.server).unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let (keeper, end) = (Arc::clone(&bricks), Arc::clone(&ends));
        let listener = std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                if end.load(Ordering::Acquire) {
                    return;
                }
                let from = socket.peer_addr().unwrap();
                keeper.serve_data(socket, from);
            }
        });
        wait_for("a leader", || log.is_leader().then_some(()));
        let leads = Arc::new(AtomicBool::new(true));
        let dir = places.server.clone();
        let mut started =
            Self { runtime, log, bricks, address, dir, leads, ends, leader: None, listener: Some(listener) };
        started.propose(Command::ServerAdd { server, address: started.address.clone() });
        if started.log.with_state(|s| s.sets.is_empty()) {
            let place = |path: &Path| BrickPlace { server, path: path.display().to_string() };
            let sets = vec![places.bricks.each_ref().map(|path| place(path))];
            started.propose(Command::VolumeCreate { name: "v".into(), sets, force: true });
        }
        if started.log.with_state(|s| !s.volumes.values().all(|v| v.started)) {
            started.propose(Command::VolumeStart { name: "v".into() });
        }
        started.lead();
        started
    }

    /// What it remembers of its bricks just now.
    pub fn seen(&self) -> Seen {
        let files = std::fs::read_dir(self.dir.join(WITNESSES)).unwrap().map(Result::unwrap);
        let row =
            |file: std::fs::DirEntry| (file.file_name().into_string().unwrap(), std::fs::read(file.path()).unwrap());
        files.map(row).collect()
    }

    fn lead(&mut self) {
        let (log, bricks) = (self.log.clone(), Arc::clone(&self.bricks));
        let (leads, ends, handle) = (Arc::clone(&self.leads), Arc::clone(&self.ends), self.runtime.handle().clone());
        self.leader = Some(std::thread::spawn(move || {
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
                let asked = log.with_state(|s| monitor.heartbeat(s, now_ms, &beats));
                let asked_out = asked.into_iter().map(|b| b.0).collect();
                bricks.heartbeat_answered(
                    sent,
                    &peer::HeartbeatReply { commit: log.applied().0, asked_out, withheld: Vec::new() },
                );
                if leads.load(Ordering::Acquire) {
                    for command in log.with_state(|s| monitor.poll(s, now_ms)) {
                        let _ = handle.block_on(log.propose(command, None));
                    }
                }
            }
        }));
    }

    /// Has a command in the log.
    pub fn propose(&self, command: Command) -> Outcome {
        self.runtime.block_on(self.log.propose(command, None)).unwrap()
    }

    pub fn configuration(&self) -> Configuration {
        self.log.with_state(|s| s.sets.values().next().unwrap().configuration)
    }

    pub fn brick(&self, slot: Slot) -> BrickId {
        self.configuration().members[slot.index()].brick
    }

    pub fn state(&self) -> State {
        self.log.with_state(State::clone)
    }

    /// Waits until the bricks are in these states, and know it.
    pub fn wait_for_states(&self, states: [BrickState; 3]) {
        self.wait_for(&format!("{states:?}"), |configuration| {
            Slot::ALL.into_iter().all(|slot| configuration.state(slot) == states[slot.index()])
        });
    }

    /// Waits for a configuration in which all bricks are registered, and that they know.
    pub fn wait_for(&self, what: &str, is_so: impl Fn(&Configuration) -> bool) {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let (configuration, beats) = (self.configuration(), self.bricks.beats());
            let knows = |m: &Member| beats.iter().any(|b| b.brick == m.brick.0 && b.n == configuration.n.0);
            let is_live = |m: &Member| m.incarnation != Incarnation(0) && knows(m);
            if is_so(&configuration) && configuration.members.iter().all(is_live) {
                return;
            }
            assert!(Instant::now() < until, "waited in vain for {what}: {configuration:?}, {beats:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All files.
    pub fn files(&self) -> Vec<Ino> {
        let is_file = |i: &Inode| matches!(i.node, Node::File { .. });
        self.log.with_state(|s| s.inodes.iter().filter(|(_, i)| is_file(i)).map(|(ino, _)| *ino).collect())
    }

    /// Ends all sessions: those who had them are gone.
    pub fn end_sessions(&self) {
        for session in self.log.with_state(|s| s.sessions.keys().copied().collect::<Vec<_>>()) {
            self.propose(Command::SessionEnd { session });
        }
    }

    pub fn session(&self) -> SessionId {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).unwrap();
        let nonce = u128::from_be_bytes(nonce);
        let open = Command::SessionOpen { nonce, volume: "v".into(), client: "test".into(), address: String::new() };
        match self.propose(open) {
            Outcome::Session { session, .. } => session,
            other => panic!("{other:?}"),
        }
    }

    /// The volume's own directory.
    pub fn root(&self) -> Ino {
        self.log.with_state(|s| s.volumes.values().next().unwrap().root)
    }

    pub fn create(&self, session: SessionId, name: &str) -> Ino {
        let operation = NameOp::Create {
            parent: self.root(),
            name: name.into(),
            node: NewNode::File,
            mode: 0o640,
            uid: 0,
            gid: 0,
            or_existing: false,
            open: false,
        };
        match self.propose(Command::Name { session, operation }) {
            Outcome::Node { attributes, .. } => attributes.ino,
            other => panic!("{other:?}"),
        }
    }

    /// Changes names.
    pub fn name(&self, session: SessionId, operation: NameOp) {
        self.propose(Command::Name { session, operation });
    }

    /// The number of a file's lease.
    pub fn epoch(&self, ino: Ino) -> u64 {
        self.log.with_state(|s| match &s.inodes[&ino].node {
            Node::File { lease, .. } => lease.epoch.0,
            _ => panic!("no file"),
        })
    }

    /// Stops cleanly [E5].
    pub fn stop(self) {
        self.bricks.stop();
        self.kill();
    }

    /// Ends as it is, as when the process is killed.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if self.ends.swap(true, Ordering::AcqRel) {
            return;
        }
        let _ = TcpStream::connect(&self.address);
        for thread in [self.leader.take(), self.listener.take()].into_iter().flatten() {
            let _ = thread.join();
        }
        self.bricks.close();
        self.runtime.block_on(self.log.stop());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

fn beat(b: &peer::BrickBeat) -> Beat {
    Beat {
        brick: BrickId(b.brick),
        registration: Registration {
            incarnation: Incarnation(b.incarnation),
            boot: BootId(id_from(&b.boot).unwrap_or(0)),
            clean: b.clean,
        },
        agreed_under: ConfigNo(b.agreed_under),
        failed: !b.failed.is_empty(),
        stopping: b.stopping,
        n: ConfigNo(b.n),
        known: ConfigNo(b.known),
        missed_empty: Slots(b.missed_empty as u8),
        repaired: b.repaired,
    }
}
