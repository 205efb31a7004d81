//! A volume as its clients use it: names from the log, data from the bricks.
//!
//! Data operations never block: they are handed to the file's coordinator, and the caller's closure is called from the
//! thread that received the last answer (or at once). Names are asked of the metadata log's leader.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use super::control::Control;
use super::file::{Caller, File, LeaseJob, Outgoing, Pending, Todo};
use super::link::{Link, LinkEvents, Target};
use super::messages;
use super::session::Session;
use crate::config::{BrickState, Configuration, Slot, Slots};
use crate::coordinator::{Answer, Body, Coordinator, Event, Mutation, Operation, RequestId, Timeouts};
use crate::frame;
use crate::metadata::{self, NameOp, Outcome, Query};
use crate::types::{ByteRange, ClusterId, ConfigNo, Ino, REGION_BYTES, SetId};
use crate::wire::{data, session as wire};

/// How often coordinators are told the time.
const TICK: Duration = Duration::from_millis(20);
/// The most that counts as passed between two turns: a client that stood still must not take bricks for dead that had answered.
const MOST_PASSED: Duration = Duration::from_millis(500);
/// How long a lease, a suspicion or a release may take to be answered before it is asked again.
const CONTROL_DEADLINE: Duration = Duration::from_secs(10);
/// How long names wait for a leader before they fail: longer than any election.
const NAMES_DEADLINE: Duration = Duration::from_secs(60);

/// What is to be mounted.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Servers, `host` or `host:port`; any one that answers suffices.
    pub servers: Vec<String>,
    /// The volume's name; empty for the janitor.
    pub volume: String,
    /// What `volume status` shows of this client.
    pub client: String,
}

/// A regular file, and where its data is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileId {
    /// Its number.
    pub ino: Ino,
    /// Its replica set.
    pub set: SetId,
}

/// What the data knows of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DataStat {
    /// In bytes.
    pub size: u64,
    /// Allocated, in units of 512 bytes.
    pub blocks: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// How much room a volume has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// In bytes.
    pub total_bytes: u64,
    /// In bytes.
    pub free_bytes: u64,
    /// Inodes in use.
    pub files: u64,
}

/// Why an operation failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IoError {
    /// Too few bricks, for longer than the volume's `no-quorum` option allows `[E3]`.
    #[error("too few bricks answer, for longer than the volume's no-quorum option allows")]
    NoQuorum,
    /// The session ended while it was under way, and somebody else has written since.
    #[error("the session ended while the operation was under way")]
    SessionLost,
    /// A block does not match its checksum on any brick `[R5]`.
    #[error("a block does not match its checksum on any brick")]
    Corrupt,
    /// All bricks refused it.
    #[error("the bricks refuse it: errno {0}")]
    Errno(i32),
    /// The metadata log did not answer, or refused.
    #[error("{0}")]
    Control(String),
    /// The volume was closed.
    #[error("the volume is closed")]
    Closed,
    /// The administrator ended the session for good.
    #[error("the administrator has evicted this client; unmount the volume and mount it again")]
    Evicted,
}

/// Why a volume cannot be mounted.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct MountError(pub String);

struct ReplicaSet {
    configuration: RwLock<Configuration>,
    links: [Arc<Link>; 3],
    ports: [Arc<Port>; 3],
}

/// Whose request it was, and what it asked.
type Asked = (Arc<File>, RequestId, Body);

/// What a brick's link leads back to.
struct Port {
    volume: std::sync::Weak<Volume>,
    set: SetId,
    slot: Slot,
    up: std::sync::atomic::AtomicBool,
    outstanding: Mutex<HashMap<u64, Asked>>,
}

impl LinkEvents for Port {
    fn up(&self) {
        self.up.store(true, Ordering::Release);
        if let Some(volume) = self.volume.upgrade() {
            volume.tell_set(self.set, &Event::LinkUp(self.slot));
        }
    }
    fn down(&self) {
        self.up.store(false, Ordering::Release);
        self.outstanding.lock().clear();
        if let Some(volume) = self.volume.upgrade() {
            volume.tell_set(self.set, &Event::LinkDown(self.slot));
        }
    }
    fn response(&self, response: data::Response, payload: &[u8]) {
        let Some((file, request, body)) = self.outstanding.lock().remove(&response.id) else { return };
        if let (Some(data::response::Outcome::Done(done)), Body::Pull { .. }, Some(volume)) =
            (&response.outcome, &body, self.volume.upgrade())
        {
            volume.repair.lock().pause(u64::from(done.pause_ms));
        }
        if let (Some(data::response::Outcome::Failed(failed)), Some(volume)) =
            (&response.outcome, self.volume.upgrade())
            && failed.errno == messages::GONE
            && !failed.brick
        {
            return volume.gone(file.id.ino);
        }
        let (answer, bytes) = messages::answer(response.outcome, &body, payload);
        if let Answer::Corrupt(blocks) = &answer {
            let blocks: Vec<u64> = blocks.iter().flatten().collect();
            tracing::error!(ino = %file.id.ino, set = %self.set, slot = self.slot.0, ?blocks, "blocks do not match their checksums; reading another replica");
        }
        if let Some(volume) = self.volume.upgrade() {
            let todo = file.tell(Event::Answered(request, answer), bytes, volume.now_ms());
            volume.perform(&file, todo);
        }
    }
}

/// A mounted volume.
pub struct Volume {
    me: std::sync::Weak<Self>,
    runtime: tokio::runtime::Handle,
    session: Session,
    /// The clock of all that waits for bricks at the last turn, and when that was.
    clock: Mutex<(u64, Instant)>,
    cluster: ClusterId,
    root: Ino,
    sets: RwLock<HashMap<SetId, Arc<ReplicaSet>>>,
    files: RwLock<HashMap<Ino, Arc<File>>>,
    timeouts: RwLock<Timeouts>,
    repair: Mutex<RepairRate>,
    next_request: AtomicU64,
    next_name: AtomicU64,
    open: Mutex<HashSet<Ino>>,
    /// Bricks that the leader was told of, and when it had taken that in; `None` while it is being told.
    suspected: Mutex<HashMap<(SetId, Slot, ConfigNo), Option<u64>>>,
    names: tokio::sync::Semaphore,
}

/// Repair's share of the bandwidth `[S5]`.
#[derive(Default)]
struct RepairRate {
    /// Bytes a second; 0: no limit.
    rate: u64,
    allowance: u64,
    last_ms: u64,
    /// How long a region waits for the one before it: what bricks that are busy with applications asked for.
    pause_ms: u64,
    /// When the last one was permitted.
    permitted_ms: u64,
    wanting: VecDeque<Ino>,
}

impl RepairRate {
    /// A region was pulled, by a brick that asks for this pause.
    fn pause(&mut self, pause_ms: u64) {
        self.pause_ms = (self.pause_ms + pause_ms.min(1000)).div_ceil(2);
    }

    /// Whose region may be repaired next, if it is time for one.
    fn permit(&mut self, now_ms: u64) -> Option<Ino> {
        let passed = now_ms - self.last_ms.min(now_ms);
        self.last_ms = now_ms;
        let most = self.rate.max(REGION_BYTES);
        self.allowance = (self.allowance + self.rate * passed / 1000).min(most);
        let is_early = self.rate > 0 && self.allowance < REGION_BYTES || self.permitted_ms + self.pause_ms > now_ms;
        if is_early || self.wanting.is_empty() {
            return None;
        }
        self.allowance = self.allowance.saturating_sub(REGION_BYTES);
        self.permitted_ms = now_ms;
        self.wanting.pop_front()
    }
}

impl Volume {
    /// Mounts a volume: opens a session, and connects to its bricks in the background.
    ///
    /// # Errors
    /// When no server answers, or the leader refuses: a sentence.
    pub async fn mount(options: MountOptions) -> Result<Arc<Self>, MountError> {
        let control = Arc::new(Control::new(options.servers.clone()));
        let (session, opened) = Session::open(control, options).await.map_err(MountError)?;
        let cluster = crate::wire::id_from(&opened.cluster)
            .ok_or_else(|| MountError("the leader's answer names no cluster".into()))?;
        let volume = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            runtime: tokio::runtime::Handle::current(),
            session,
            clock: Mutex::new((0, Instant::now())),
            cluster: ClusterId(cluster),
            root: Ino(opened.root),
            sets: RwLock::default(),
            files: RwLock::default(),
            timeouts: RwLock::new(timeouts(opened.io_timeout_ms, opened.no_quorum_ms)),
            repair: Mutex::new(RepairRate { rate: opened.repair_rate, ..RepairRate::default() }),
            next_request: AtomicU64::new(1),
            next_name: AtomicU64::new(1),
            open: Mutex::default(),
            suspected: Mutex::default(),
            names: tokio::sync::Semaphore::new(metadata::state::REMEMBERED_OUTCOMES / 2),
        });
        for picture in &opened.sets {
            volume.picture(picture).map_err(|e| MountError(format!("the leader's answer makes no sense: {e}")))?;
        }
        let clock = Arc::downgrade(&volume);
        std::thread::Builder::new()
            .name("ticks".into())
            .spawn(move || {
                while let Some(volume) = clock.upgrade() {
                    volume.tick();
                    drop(volume);
                    std::thread::sleep(TICK);
                }
            })
            .map_err(|e| MountError(format!("cannot start a thread: {e}")))?;
        volume.session.watch(Arc::downgrade(&volume));
        Ok(volume)
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> Ino {
        self.root
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Milliseconds since the volume was mounted, without those in which this process stood still; never goes back.
    fn now_ms(&self) -> u64 {
        let (turn_ms, at) = *self.clock.lock();
        turn_ms + at.elapsed().min(MOST_PASSED).as_millis() as u64
    }

    /// The clock's next turn.
    fn turn(&self) -> u64 {
        let mut clock = self.clock.lock();
        let (turn_ms, at) = *clock;
        let passed = at.elapsed();
        let counted = Duration::from_millis(passed.min(MOST_PASSED).as_millis() as u64);
        let stood_still = passed > MOST_PASSED;
        *clock = (turn_ms + counted.as_millis() as u64, if stood_still { Instant::now() } else { at + counted });
        clock.0
    }

    // -- names ------------------------------------------------------------------------------------------------------

    /// Asks about names.
    ///
    /// # Errors
    /// When no leader answers for a minute.
    pub async fn ask(&self, query: Query) -> Result<metadata::Answer, IoError> {
        self.check_admitted()?;
        let body = Bytes::from(crate::wire::encode(&query));
        let reply = self
            .session
            .control()
            .call(NAMES_DEADLINE, |channel| {
                let request = wire::NameRequest { session: self.session.id().0, number: 0, body: body.clone() };
                async move { super::session::client(channel).ask(request).await.map(tonic::Response::into_inner) }
            })
            .await
            .map_err(|e| IoError::Control(e.message().to_owned()))?;
        crate::wire::decode(&reply.body)
            .map_err(|e| IoError::Control(format!("the leader's answer makes no sense: {e}")))
    }

    /// Changes names. Sent again as often as needed, done once.
    ///
    /// # Errors
    /// When no leader answers for a minute.
    pub async fn submit(&self, operation: NameOp) -> Result<Outcome, IoError> {
        // The log remembers a bounded number of outcomes per session, so no more may be under way.
        let _permit = self.names.acquire().await.map_err(|_| IoError::Closed)?;
        let number = self.next_name.fetch_add(1, Ordering::Relaxed);
        let body = Bytes::from(crate::wire::encode(&operation));
        let mut tries = 0;
        let (outcome, session) = loop {
            self.check_admitted()?;
            let session = self.session.id();
            let reply = self
                .session
                .control()
                .call(NAMES_DEADLINE, |channel| {
                    let request = wire::NameRequest { session: session.0, number, body: body.clone() };
                    async move { super::session::client(channel).submit(request).await.map(tonic::Response::into_inner) }
                })
                .await
                .map_err(|e| IoError::Control(e.message().to_owned()))?;
            let outcome: Outcome = crate::wire::decode(&reply.body)
                .map_err(|e| IoError::Control(format!("the leader's answer makes no sense: {e}")))?;
            // The session has lapsed, and this was not done under it, else the log would know its outcome.
            if outcome == Outcome::Errno(metadata::NameError::SessionEnded) && tries < 50 {
                tries += 1;
                self.session.lapsed(session);
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            break (outcome, session);
        };
        self.remember_open(&operation, &outcome);
        if session != self.session.id()
            && let (NameOp::Create { open: true, .. }, Outcome::Node { attributes, .. }) = (&operation, &outcome)
        {
            // Made and opened under a session that has lapsed since: the next one does not have it open.
            Box::pin(self.submit(NameOp::Open { ino: attributes.ino })).await?;
        }
        Ok(outcome)
    }

    fn check_admitted(&self) -> Result<(), IoError> {
        if self.session.is_evicted() { Err(IoError::Evicted) } else { Ok(()) }
    }

    /// Keeps the list of what has to be opened again if the session lapses.
    fn remember_open(&self, operation: &NameOp, outcome: &Outcome) {
        match (operation, outcome) {
            (NameOp::Create { open: true, .. }, Outcome::Node { attributes, .. }) => {
                self.open.lock().insert(attributes.ino);
            }
            (NameOp::Open { ino }, Outcome::Done | Outcome::Node { .. }) => {
                self.open.lock().insert(*ino);
            }
            (NameOp::Close { inos }, _) => {
                let mut open = self.open.lock();
                for ino in inos {
                    open.remove(ino);
                }
            }
            _ => {}
        }
    }

    /// How much room there is.
    ///
    /// # Errors
    /// When no leader answers for a minute.
    pub async fn space(&self) -> Result<Space, IoError> {
        let session = self.session.id().0;
        let reply = self
            .session
            .control()
            .call(NAMES_DEADLINE, |channel| async move {
                super::session::client(channel)
                    .stat_fs(wire::StatFsRequest { session })
                    .await
                    .map(tonic::Response::into_inner)
            })
            .await
            .map_err(|e| IoError::Control(e.message().to_owned()))?;
        Ok(Space { total_bytes: reply.total_bytes, free_bytes: reply.free_bytes, files: reply.files })
    }

    // -- data -------------------------------------------------------------------------------------------------------

    /// Reads up to `length` bytes; short at the end of the file.
    pub fn read(
        &self,
        file: FileId,
        offset: u64,
        length: u32,
        done: impl FnOnce(Result<Vec<u8>, IoError>) + Send + 'static,
    ) {
        let range = ByteRange::at(offset, u64::from(length));
        self.start(file, Operation::Read(range), Bytes::new(), Bytes::new(), Caller::Bytes(Box::new(done)));
    }

    /// Writes; at most `MAX_IO_BYTES`.
    pub fn write(
        &self,
        file: FileId,
        offset: u64,
        data: Bytes,
        done: impl FnOnce(Result<(), IoError>) + Send + 'static,
    ) {
        if data.is_empty() {
            return done(Ok(()));
        }
        let sums = messages::sums_of(offset, &data);
        let mutation = Mutation::Write { offset, length: data.len() as u64 };
        self.start(file, Operation::Mutate(mutation), data, sums, Caller::Unit(Box::new(done)));
    }

    /// Sets the size.
    pub fn truncate(&self, file: FileId, size: u64, done: impl FnOnce(Result<(), IoError>) + Send + 'static) {
        self.mutate(file, Mutation::Truncate { size }, done);
    }

    /// `fallocate(2)`.
    pub fn allocate(
        &self,
        file: FileId,
        offset: u64,
        length: u64,
        mode: u32,
        done: impl FnOnce(Result<(), IoError>) + Send + 'static,
    ) {
        self.mutate(file, Mutation::Allocate { offset, length, mode }, done);
    }

    /// Sets the modification time, in nanoseconds since 1970.
    pub fn set_mtime(&self, file: FileId, mtime_ns: i64, done: impl FnOnce(Result<(), IoError>) + Send + 'static) {
        self.mutate(file, Mutation::SetTime { mtime_ns }, done);
    }

    fn mutate(&self, file: FileId, mutation: Mutation, done: impl FnOnce(Result<(), IoError>) + Send + 'static) {
        self.start(file, Operation::Mutate(mutation), Bytes::new(), Bytes::new(), Caller::Unit(Box::new(done)));
    }

    /// Makes everything acknowledged durable `[W8]`.
    pub fn flush(&self, file: FileId, done: impl FnOnce(Result<(), IoError>) + Send + 'static) {
        self.start(file, Operation::Flush, Bytes::new(), Bytes::new(), Caller::Unit(Box::new(done)));
    }

    /// Size, blocks, time.
    pub fn stat(&self, file: FileId, done: impl FnOnce(Result<DataStat, IoError>) + Send + 'static) {
        self.start(file, Operation::Stat, Bytes::new(), Bytes::new(), Caller::Stat(Box::new(done)));
    }

    /// `SEEK_DATA`, or with `hole` `SEEK_HOLE`; `None`: nothing further.
    pub fn seek(
        &self,
        file: FileId,
        offset: u64,
        hole: bool,
        done: impl FnOnce(Result<Option<u64>, IoError>) + Send + 'static,
    ) {
        self.start(file, Operation::Seek { offset, hole }, Bytes::new(), Bytes::new(), Caller::Seek(Box::new(done)));
    }

    /// The last handle was closed: the lease is given back when nothing is under way.
    pub fn forget(&self, file: FileId) {
        self.tell(file, Event::Forget);
    }

    /// Takes a file's lease for its repair.
    pub fn adopt(&self, file: FileId) {
        self.tell(file, Event::Adopt);
    }

    /// The file was deleted and its data reclaimed: no brick will ever answer what is still under way.
    pub fn gone(&self, ino: Ino) {
        let file = self.files.write().remove(&ino);
        if let Some(file) = file {
            file.abandon().answer();
        }
    }

    /// The file's lease is held, and nothing of it is left to repair.
    #[must_use]
    pub fn is_repaired(&self, file: FileId) -> bool {
        self.files.read().get(&file.ino).is_some_and(|f| f.with(|c| c.is_repaired()))
    }

    /// Neither a lease nor anything to do.
    #[must_use]
    pub fn is_idle(&self, file: FileId) -> bool {
        self.files.read().get(&file.ino).is_none_or(|f| f.with(|c| c.is_idle()))
    }

    /// Settles and releases all leases, ends the session. Bounded in time: what cannot be released lapses.
    pub async fn close(&self) {
        let ids: Vec<FileId> = self.files.read().values().map(|f| f.id).collect();
        for id in &ids {
            self.forget(*id);
        }
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            let files: Vec<Arc<File>> = self.files.read().values().cloned().collect();
            if files.iter().all(|f| f.with(|c| c.is_idle()) && !f.leases.lock().running) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.session.end().await;
        self.cut_off();
    }

    /// Ends whatever is under way with an error, and hangs up on all bricks: there is no session any more, nor will there be.
    pub(super) fn cut_off(&self) {
        for set in self.sets.read().values() {
            for link in &set.links {
                link.stop();
            }
        }
        let files: Vec<Arc<File>> = self.files.read().values().cloned().collect();
        for file in files {
            file.abandon().answer();
        }
    }

    /// Operations on data that somebody waits for.
    pub(super) fn in_flight(&self) -> usize {
        self.files.read().values().map(|file| file.in_flight()).sum()
    }

    // -- the machinery ----------------------------------------------------------------------------------------------

    fn start(&self, id: FileId, operation: Operation, payload: Bytes, sums: Bytes, caller: Caller) {
        if let Err(evicted) = self.check_admitted() {
            return caller.refuse(evicted);
        }
        let pending = Pending { payload, sums, caller: Some(caller) };
        match self.file(id) {
            Some(file) => {
                let todo = file.submit(operation, pending, self.now_ms());
                self.perform(&file, todo);
            }
            None => {
                if let Some(caller) = pending.caller {
                    caller.refuse(IoError::Control(format!("replica set {} is not known", id.set)));
                }
            }
        }
    }

    fn tell(&self, id: FileId, event: Event) {
        if let Some(file) = self.file(id) {
            let todo = file.tell(event, Vec::new(), self.now_ms());
            self.perform(&file, todo);
        }
    }

    fn file(&self, id: FileId) -> Option<Arc<File>> {
        if let Some(file) = self.files.read().get(&id.ino) {
            return Some(Arc::clone(file));
        }
        let set = self.sets.read().get(&id.set).cloned()?;
        let mut files = self.files.write();
        let file = files.entry(id.ino).or_insert_with(|| {
            let links = Slot::ALL.into_iter().filter(|s| set.ports[s.index()].up.load(Ordering::Acquire)).collect();
            let coordinator = Coordinator::new(id.ino, *set.configuration.read(), links, *self.timeouts.read());
            Arc::new(File::new(id, coordinator))
        });
        let file = Arc::clone(file);
        drop(files);
        // What changed between looking and inserting is told again; the coordinator ignores what it knows.
        let now = self.now_ms();
        let configuration = *set.configuration.read();
        let mut todo = vec![file.tell(Event::Configured(configuration), Vec::new(), now)];
        for slot in Slot::ALL {
            if set.ports[slot.index()].up.load(Ordering::Acquire) {
                todo.push(file.tell(Event::LinkUp(slot), Vec::new(), now));
            }
        }
        for todo in todo {
            self.perform(&file, todo);
        }
        Some(file)
    }

    /// Does what a coordinator wants, without holding its lock.
    fn perform(&self, file: &Arc<File>, mut todo: Todo) {
        if !todo.send.is_empty() {
            let set = self.sets.read().get(&file.id.set).cloned();
            if let Some(set) = set {
                for outgoing in todo.send.drain(..) {
                    self.send(&set, file, outgoing);
                }
            }
        }
        todo.answer();
        if todo.lease {
            self.run_leases(file);
        }
        for (slot, n) in todo.suspect.drain(..) {
            self.suspect(file.id.set, slot, n);
        }
        if todo.refresh {
            self.session.refresh();
        }
        if todo.permit {
            self.repair.lock().wanting.push_back(file.id.ino);
            self.grant_permits();
        }
    }

    fn send(&self, set: &ReplicaSet, file: &Arc<File>, outgoing: Outgoing) {
        let Outgoing { request, payload, sums } = outgoing;
        let port = &set.ports[request.slot.index()];
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let header = messages::request(id, file.id.ino, &request, sums);
        port.outstanding.lock().insert(id, (Arc::clone(file), request.id, request.body));
        let head = frame::encode(&header, payload.len());
        set.links[request.slot.index()].send(head, payload);
    }

    /// Tells all files of a set.
    fn tell_set(&self, set: SetId, event: &Event) {
        let files: Vec<Arc<File>> = self.files.read().values().filter(|f| f.id.set == set).cloned().collect();
        for file in files {
            let todo = file.tell(event.clone(), Vec::new(), self.now_ms());
            self.perform(&file, todo);
        }
    }

    fn tick(&self) {
        let now = self.turn();
        if self.session.is_evicted() {
            // What slipped in while the session was found to be evicted.
            return self.cut_off();
        }
        let files: Vec<Arc<File>> = self.files.read().values().cloned().collect();
        for file in files {
            let todo = file.tell(Event::Tick, Vec::new(), now);
            self.perform(&file, todo);
        }
        self.grant_permits();
        self.suspected.lock().retain(|_, at| at.is_none_or(|at| at + 5_000 > now));
        // Files that nobody has open and nothing is under way with are let go.
        let open = self.open.lock();
        self.files.write().retain(|ino, file| {
            // One lock at a time: `File` takes the second within the first.
            let leasing = file.leases.lock().running;
            open.contains(ino) || Arc::strong_count(file) > 1 || leasing || !file.with(|c| c.is_idle() && !c.is_dirty())
        });
    }

    fn grant_permits(&self) {
        loop {
            let ino = self.repair.lock().permit(self.now_ms());
            let Some(ino) = ino else { return };
            let file = self.files.read().get(&ino).cloned();
            if let Some(file) = file {
                let todo = file.tell(Event::Permit, Vec::new(), self.now_ms());
                self.perform(&file, todo);
            }
        }
    }

    fn suspect(&self, set: SetId, slot: Slot, n: ConfigNo) {
        let Some(me) = self.me.upgrade() else { return };
        {
            let mut suspected = self.suspected.lock();
            match suspected.get(&(set, slot, n)) {
                None => {
                    tracing::warn!(set = %set, slot = slot.0, n = n.0, "a brick failed or does not answer; telling the leader");
                }
                // One at a time: while no leader answers, each of them goes round the servers.
                Some(None) => return,
                Some(Some(at)) if at + 200 > self.now_ms() => return,
                Some(Some(_)) => {}
            }
            suspected.insert((set, slot, n), None);
        }
        self.runtime.spawn(async move {
            let session = me.session.id().0;
            let _ = me
                .session
                .control()
                .call(CONTROL_DEADLINE, |channel| async move {
                    let why = "it failed or did not answer in io-timeout".to_owned();
                    let request = wire::SuspectRequest { session, set: set.0, n: n.0, slot: u32::from(slot.0), why };
                    super::session::client(channel).suspect(request).await
                })
                .await;
            me.suspected.lock().insert((set, slot, n), Some(me.now_ms()));
        });
    }

    /// Runs a file's lease jobs, one after the other.
    fn run_leases(&self, file: &Arc<File>) {
        {
            let mut leases = file.leases.lock();
            if leases.running {
                return;
            }
            leases.running = true;
        }
        let Some(me) = self.me.upgrade() else { return };
        let file = Arc::clone(file);
        self.runtime.spawn(async move {
            loop {
                let job = {
                    let mut leases = file.leases.lock();
                    let job = leases.jobs.pop_front();
                    leases.running = job.is_some();
                    job
                };
                match job {
                    Some(LeaseJob::Acquire) => me.acquire(&file).await,
                    Some(LeaseJob::Release { epoch, finished }) => {
                        let session = me.session.id();
                        me.session.release(session, file.id.ino, epoch, finished).await;
                    }
                    None => return,
                }
            }
        });
    }

    async fn acquire(&self, file: &Arc<File>) {
        loop {
            if self.session.is_ended() || !self.files.read().contains_key(&file.id.ino) {
                let mut todo = file.abandon();
                todo.answer();
                return;
            }
            let session = self.session.id();
            match self.session.acquire(session, file.id.ino).await {
                Ok(reply) => {
                    let last = file.leases.lock().last;
                    let epoch = crate::types::Epoch(reply.epoch);
                    if epoch <= last {
                        // A grant that was lost on its way here, or that the bricks no longer honour: it ends, and the next
                        // one begins with a recovery.
                        self.session.release(session, file.id.ino, epoch, false).await;
                        continue;
                    }
                    file.leases.lock().last = epoch;
                    let foreign = last.0 != 0 && epoch != last.next();
                    let event = Event::Granted { epoch, recover: reply.recover, foreign };
                    let todo = file.tell(event, Vec::new(), self.now_ms());
                    self.perform(file, todo);
                    return;
                }
                Err(status) => {
                    if status.code() == tonic::Code::NotFound {
                        self.session.lapsed(session);
                    }
                    tracing::debug!(ino = %file.id.ino, "no lease yet: {}", status.message());
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// A replica set as the leader shows it.
    pub(super) fn picture(&self, picture: &wire::SetPicture) -> anyhow::Result<()> {
        let configuration: Configuration = crate::wire::decode(&picture.configuration)?;
        let id = SetId(picture.set);
        let known = self.sets.read().get(&id).cloned();
        let target = |slot: Slot| -> anyhow::Result<Target> {
            let address = picture.addresses.get(slot.index()).cloned();
            let address = address.ok_or_else(|| anyhow::anyhow!("set {id} has no third address"))?;
            let brick = configuration.members[slot.index()].brick;
            Ok(Target { address, cluster: self.cluster, brick, session: self.session.id() })
        };
        match known {
            Some(set) => {
                for slot in Slot::ALL {
                    set.links[slot.index()].retarget(target(slot)?);
                }
                let went_out = {
                    let mut now = set.configuration.write();
                    if configuration.n <= now.n {
                        return Ok(());
                    }
                    let before = std::mem::replace(&mut *now, configuration);
                    configuration.out().iter().filter(move |slot| before.state(*slot) != BrickState::Out)
                };
                // One that was cut off is written to as soon as it is back, and what its old connection has to send again may take
                // the kernel seconds more.
                went_out.for_each(|slot| set.links[slot.index()].hang_up());
                tracing::info!(set = %id, n = configuration.n.0, in_sync = ?configuration.in_sync(), syncing = ?configuration.syncing(), out = ?configuration.out(), "configuration");
                self.tell_set(id, &Event::Configured(configuration));
            }
            None => {
                let mut links = Vec::new();
                let mut ports = Vec::new();
                for slot in Slot::ALL {
                    let port = Arc::new(Port {
                        volume: self.me.clone(),
                        set: id,
                        slot,
                        up: std::sync::atomic::AtomicBool::new(false),
                        outstanding: Mutex::default(),
                    });
                    links.push(Link::start(target(slot)?, Arc::clone(&port) as Arc<dyn LinkEvents>)?);
                    ports.push(port);
                }
                let (Ok(links), Ok(ports)) = (links.try_into(), ports.try_into()) else {
                    anyhow::bail!("a replica set has three bricks");
                };
                let set = ReplicaSet { configuration: RwLock::new(configuration), links, ports };
                self.sets.write().insert(id, Arc::new(set));
            }
        }
        Ok(())
    }

    /// Another session wants a lease of ours.
    pub(super) fn recalled(&self, ino: Ino, epoch: crate::types::Epoch) {
        let file = self.files.read().get(&ino).cloned();
        match file {
            Some(file) => {
                let todo = file.tell(Event::Recalled(epoch), Vec::new(), self.now_ms());
                self.perform(&file, todo);
            }
            None => {
                // Nobody here knows of it any more.
                let Some(me) = self.me.upgrade() else { return };
                self.runtime.spawn(async move {
                    let session = me.session.id();
                    me.session.release(session, ino, epoch, false).await;
                });
            }
        }
    }

    /// The session has lapsed and a new one was opened: leases are gone, links speak for the new session.
    pub(super) fn reopened(&self, pictures: &[wire::SetPicture]) {
        let files: Vec<Arc<File>> = self.files.read().values().cloned().collect();
        for file in &files {
            let todo = file.tell(Event::LeaseLost, Vec::new(), self.now_ms());
            self.perform(file, todo);
        }
        for picture in pictures {
            if let Err(e) = self.picture(picture) {
                tracing::error!("the leader's answer makes no sense: {e}");
            }
        }
        let Some(me) = self.me.upgrade() else { return };
        let open: Vec<Ino> = self.open.lock().iter().copied().collect();
        self.runtime.spawn(async move {
            for ino in open {
                let _ = me.submit(NameOp::Open { ino }).await;
            }
        });
    }

    /// Options were changed.
    pub(super) fn options(&self, options: &wire::Options) {
        let timeouts = timeouts(options.io_timeout_ms, options.no_quorum_ms);
        *self.timeouts.write() = timeouts;
        self.repair.lock().rate = options.repair_rate;
        for file in self.files.read().values() {
            file.with(|c| c.set_timeouts(timeouts));
        }
    }

    /// Replica sets and their present configurations.
    #[must_use]
    pub fn configurations(&self) -> Vec<(SetId, Configuration)> {
        self.sets.read().iter().map(|(id, set)| (*id, *set.configuration.read())).collect()
    }

    /// Bricks of a set that there is a connection to.
    #[must_use]
    pub fn connected(&self, set: SetId) -> Slots {
        self.sets.read().get(&set).map_or(Slots::NONE, |s| {
            Slot::ALL.into_iter().filter(|slot| s.ports[slot.index()].up.load(Ordering::Acquire)).collect()
        })
    }
}

fn timeouts(io_timeout_ms: u32, no_quorum_ms: u32) -> Timeouts {
    let io_timeout_ms = u64::from(io_timeout_ms.max(100));
    Timeouts {
        io_timeout_ms,
        hedge_ms: (io_timeout_ms / 8).clamp(50, 500),
        no_quorum_ms: (no_quorum_ms > 0).then(|| u64::from(no_quorum_ms)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repair_keeps_to_its_rate_and_to_the_pauses_that_busy_bricks_ask_for() {
        let permits = |rate: u64, pause_ms: u64| {
            let mut repair = RepairRate { rate, last_ms: 1_000, ..RepairRate::default() };
            repair.pause(pause_ms);
            repair.wanting = (0..10_000).map(Ino).collect();
            (1_000..11_000).filter(|now| repair.permit(*now).is_some()).count()
        };
        // Ten seconds: as often as it is asked, ten regions a second, one each 50 ms.
        assert_eq!(permits(0, 0), 10_000);
        assert_eq!(permits(10 * REGION_BYTES, 0), 99);
        assert_eq!(permits(0, 100), 200);
    }
}
