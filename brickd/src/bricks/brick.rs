//! One brick: its replica machine, store and journal.

use std::collections::HashMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use mortar_proto::config::{BrickState, Configuration, Slot};
use mortar_proto::metadata::options::Options;
use mortar_proto::metadata::state::{self, State};
use mortar_proto::metadata::{Registration, TreeChange};
use mortar_proto::replica::{Recorded, Replica};
use mortar_proto::wire::{cluster, id_bytes, peer};
use mortar_proto::{
    BootId, BrickId, ByteRange, ClusterId, EXTENT_BYTES, Epoch, Incarnation, Ino, LogIndex, REGION_BYTES, SIZE_REGION,
    SessionId, SetId, VolumeId,
};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::pull::Peers;
use crate::log::Log;
use crate::store::{BrickDir, BrickId3, Journal, Objects, Record, Removal};
use crate::tree::Tree;

/// Threads for what cannot be done at once: waiting, syncing, reading from the disk.
const WORKERS: usize = 32;
/// Threads for pulls, which wait for other bricks; apart, so that bricks that pull from each other cannot block each other.
const PULLERS: usize = 8;
/// Threads that answer other bricks.
const PEER_WORKERS: usize = 8;

pub(super) type Job = Box<dyn FnOnce() + Send>;

/// One brick.
pub struct Brick {
    pub(super) id: BrickId,
    pub(super) slot: Slot,
    pub(super) set: SetId,
    pub(super) volume: VolumeId,
    pub(super) cluster: ClusterId,
    pub(super) log: Log,
    dir: BrickDir,
    pub(super) objects: Arc<Objects>,
    pub(super) journal: Journal,
    pub(super) replica: Mutex<Replica>,
    /// Told whenever something that waits might go on.
    pub(super) progress: Condvar,
    tree: Mutex<(Tree, bool)>,
    pub(super) peers: Peers,
    pub(super) registration: Registration,
    began: Instant,
    read_lease_ms: AtomicU64,
    pub(super) io_timeout_ms: AtomicU64,
    reserve_percent: AtomicU64,
    /// Less room than the reserve.
    pub(super) is_low: AtomicBool,
    space: Mutex<(u64, u64)>,
    pub(super) repaired_bytes: AtomicU64,
    failed: Mutex<String>,
    stopping: AtomicBool,
    closed: AtomicBool,
    pub(super) connections: Mutex<HashMap<(SessionId, u32), Arc<TcpStream>>>,
    pub(super) general: Sender<Job>,
    pub(super) pulls: Sender<Job>,
    pub(super) peer_jobs: Sender<Job>,
}

fn pool(name: &str, threads: usize) -> std::io::Result<Sender<Job>> {
    let (jobs, taken) = crossbeam_channel::unbounded::<Job>();
    for _ in 0..threads {
        let taken = taken.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            while let Ok(job) = taken.recv() {
                job();
            }
        })?;
    }
    Ok(jobs)
}

impl Brick {
    /// Opens the brick; after an unclean stop makes the sums of what was being written anew first `[S3]`.
    pub(super) fn open(
        id: BrickId,
        row: &state::Brick,
        state: &State,
        log: Log,
        boot: BootId,
    ) -> anyhow::Result<Arc<Self>> {
        let volume = state.volumes.get(&row.volume);
        let name = volume.map_or("", |v| v.name.as_str());
        let cluster = log.identity().cluster;
        let dir = BrickDir::open(Path::new(&row.path), BrickId3 { cluster, volume: row.volume, brick: id }, name)?;
        let (journal, loaded) = Journal::open(&dir.own().join("state"))?;
        let objects = Arc::new(Objects::new(&dir.own()));
        let configuration = state.sets.get(&row.set).map(|s| s.configuration);
        let configuration = configuration.ok_or_else(|| anyhow::anyhow!("the brick's replica set is not known"))?;
        let slot = configuration.slot_of(id).ok_or_else(|| anyhow::anyhow!("the brick is not in its replica set"))?;
        if !loaded.clean && !loaded.intents.is_empty() {
            tracing::info!(brick = %id, extents = loaded.intents.len(), "the last stop was unclean: making checksums anew where something was being written");
        }
        if !loaded.clean {
            for (ino, extent) in &loaded.intents {
                let start = extent.saturating_mul(EXTENT_BYTES);
                objects.recompute_sums(*ino, ByteRange::at(start, EXTENT_BYTES))?;
            }
        }
        let missed =
            loaded.missed.into_iter().filter_map(|(x, ino, regions)| Some((configuration.slot_of(x)?, ino, regions)));
        let recorded = Recorded { intents: loaded.intents, missed: missed.collect() };
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random numbers: {e}"))?;
        let incarnation = Incarnation(u64::from_le_bytes(random) | 1);
        let registration = Registration { incarnation, boot, clean: loaded.clean };
        let tree = Tree::new(dir.root(), row.set, Arc::clone(&objects));
        let options = volume.map_or_else(Options::defaults, Options::of);
        let space = objects.space()?;
        let brick = Arc::new(Self {
            id,
            slot,
            set: row.set,
            volume: row.volume,
            cluster,
            log,
            dir,
            objects,
            journal,
            replica: Mutex::new(Replica::new(id, slot, incarnation, recorded)),
            progress: Condvar::new(),
            tree: Mutex::new((tree, true)),
            peers: Peers::default(),
            registration,
            began: Instant::now(),
            read_lease_ms: AtomicU64::new(options.read_lease_ms),
            io_timeout_ms: AtomicU64::new(options.io_timeout_ms),
            reserve_percent: AtomicU64::new(options.reserve_percent),
            is_low: AtomicBool::new(false),
            space: Mutex::new(space),
            repaired_bytes: AtomicU64::new(0),
            failed: Mutex::default(),
            stopping: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            connections: Mutex::default(),
            general: pool("brick-work", WORKERS)?,
            pulls: pool("brick-pull", PULLERS)?,
            peer_jobs: pool("brick-peer", PEER_WORKERS)?,
        });
        super::tasks::start(&brick)?;
        Ok(brick)
    }

    /// The brick's directory.
    pub(super) fn root(&self) -> PathBuf {
        self.dir.root().to_owned()
    }

    /// Milliseconds since the brick was opened; never goes back.
    pub(super) fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64 + 1
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    // -- what the log says ------------------------------------------------------------------------------------------

    pub(super) fn configured(&self, configuration: Configuration, cold_start: Option<Slot>) {
        let mut replica = self.replica.lock();
        if replica.configuration().is_some_and(|c| c.n >= configuration.n) {
            return;
        }
        let before = replica.state();
        let entered = replica.configured(configuration, cold_start);
        // [E6] Durable before anything is answered or reported under this configuration: the lock is kept.
        let records = entered
            .into_iter()
            .filter_map(|(x, ino, regions)| Some(Record::Missed(self.brick_in(&configuration, x)?, ino, regions)));
        if let Err(e) = self.journal.add(records.collect()) {
            drop(replica);
            return self.fail(&format!("the journal cannot be written: {e}"));
        }
        for (x, ino) in replica.forget_missed_of_in_sync() {
            if let Some(x) = self.brick_in(&configuration, x) {
                self.journal.remove(vec![Removal::AllMissed(x, ino)]);
            }
        }
        let now = replica.state();
        if before != now {
            tracing::info!(brick = %self.id, n = configuration.n.0, "{before:?} -> {now:?}");
            if now == BrickState::Syncing {
                self.repaired_bytes.store(0, Ordering::Relaxed);
            }
        }
        drop(replica);
        self.progress.notify_all();
    }

    fn brick_in(&self, configuration: &Configuration, slot: Slot) -> Option<BrickId> {
        configuration.members.get(slot.index()).map(|m| m.brick)
    }

    /// The brick in `slot` by the applied configuration.
    pub(super) fn brick_of(replica: &Replica, slot: Slot) -> Option<BrickId> {
        replica.configuration()?.members.get(slot.index()).map(|m| m.brick)
    }

    pub(super) fn leased(&self, ino: Ino, epoch: Epoch, holder: SessionId) {
        self.replica.lock().leased(ino, epoch, holder);
    }

    pub(super) fn applied(&self, index: LogIndex) {
        self.replica.lock().applied(index);
        self.progress.notify_all();
    }

    pub(super) fn reclaim(&self, ino: Ino) {
        let mut replica = self.replica.lock();
        replica.reclaimed(ino);
        self.journal.remove(vec![Removal::File(ino)]);
        drop(replica);
        if let Err(e) = self.objects.remove(ino) {
            self.complain(&e);
        }
    }

    pub(super) fn change_tree(&self, change: &TreeChange, state: &State) {
        let mut tree = self.tree.lock();
        if tree.1
            && let Err(e) = tree.0.apply(change, state)
        {
            tracing::debug!(brick = %self.id, "the tree is mended: {e}");
            tree.1 = false;
        }
        if !tree.1 {
            drop(tree);
            self.mend_tree(state);
        }
    }

    pub(super) fn mend_tree(&self, state: &State) {
        let mut tree = self.tree.lock();
        match tree.0.mend(self.volume, state) {
            Ok(()) => tree.1 = true,
            Err(e) => {
                tree.1 = false;
                tracing::error!(brick = %self.id, "the tree in {} cannot be mended: {e}", self.dir.root().display());
            }
        }
    }

    pub(super) fn owned(&self, ino: Ino, state: &State) {
        if let Err(e) = self.tree.lock().0.owned(ino, state) {
            tracing::warn!(brick = %self.id, "owner and mode of a file cannot be set: {e}");
        }
    }

    pub(super) fn set_options(&self, options: &Options) {
        self.read_lease_ms.store(options.read_lease_ms, Ordering::Relaxed);
        self.io_timeout_ms.store(options.io_timeout_ms, Ordering::Relaxed);
        self.reserve_percent.store(options.reserve_percent, Ordering::Relaxed);
    }

    // -- failing and stopping ---------------------------------------------------------------------------------------

    /// [E4] The brick declares itself failed.
    pub(super) fn fail(&self, why: &str) {
        {
            let mut failed = self.failed.lock();
            if failed.is_empty() {
                tracing::error!(brick = %self.id, "the brick has failed and goes out: {why}");
                why.clone_into(&mut failed);
            }
        }
        self.replica.lock().fail();
        self.progress.notify_all();
    }

    /// A store error: fails the brick if the disk is broken.
    pub(super) fn complain(&self, error: &crate::store::StoreError) {
        if error.is_disk_failure() {
            self.fail(&error.to_string());
        }
    }

    pub(super) fn ask_to_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.replica.lock().agree_to_out();
    }

    /// The configuration still has it, so that clients wait for it.
    pub(super) fn still_wanted(&self) -> bool {
        let replica = self.replica.lock();
        replica.is_live() && replica.state() != BrickState::Out && !replica.has_failed()
    }

    /// The end of a clean stop `[E5]`.
    pub(super) fn stop(&self) {
        self.close();
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until && !self.replica.lock().is_drained() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let drained = self.replica.lock().is_drained();
        if !drained || self.replica.lock().has_failed() {
            tracing::warn!(brick = %self.id, "stopped without being drained: its next start counts as unclean");
            return;
        }
        let began = self.now_ms() + 1;
        if let Err(e) = self.objects.flush_all() {
            tracing::error!(brick = %self.id, "cannot be flushed: {e}");
            return;
        }
        {
            let mut replica = self.replica.lock();
            for (ino, extents) in replica.clearable_intents(began, 0) {
                let cleared = replica.clear_intents(ino, &extents, began);
                self.journal.remove(cleared.into_iter().map(|e| Removal::Intent(ino, e)).collect());
            }
        }
        match self.journal.set_clean() {
            Ok(()) => tracing::info!(brick = %self.id, "stopped cleanly"),
            Err(e) => tracing::error!(brick = %self.id, "the clean stop cannot be recorded: {e}"),
        }
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        for socket in self.connections.lock().values() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.progress.notify_all();
    }

    // -- heartbeats -------------------------------------------------------------------------------------------------

    pub(super) fn look_at_space(&self) {
        match self.objects.space() {
            Ok((total, free)) => {
                *self.space.lock() = (total, free);
                let reserve = total / 100 * self.reserve_percent.load(Ordering::Relaxed);
                self.is_low.store(free < reserve, Ordering::Relaxed);
            }
            Err(e) => self.complain(&e),
        }
    }

    pub(super) fn beat(&self) -> peer::BrickBeat {
        let (total_bytes, free_bytes) = *self.space.lock();
        let failed = self.failed.lock().clone();
        let replica = self.replica.lock();
        let report = replica.report();
        let missed_regions = Slot::ALL
            .into_iter()
            .filter(|x| *x != self.slot)
            .map(|x| replica.missed(x).iter().map(|(_, r)| r.len()).sum::<u64>())
            .max()
            .unwrap_or(0);
        peer::BrickBeat {
            brick: self.id.0,
            incarnation: self.registration.incarnation.0,
            boot: id_bytes(self.registration.boot.0),
            clean: self.registration.clean,
            agreed: replica.has_agreed(),
            failed,
            n: report.map_or(0, |r| r.n.0),
            missed_empty: report.map_or(0, |r| u32::from(r.missed_empty.0)),
            repaired: report.is_some_and(|r| r.repaired),
            total_bytes,
            free_bytes,
            missed_regions,
            repaired_bytes: self.repaired_bytes.load(Ordering::Relaxed),
            stopping: self.stopping.load(Ordering::Acquire),
        }
    }

    pub(super) fn heartbeat_answered(&self, sent: Instant, reply: &peer::HeartbeatReply) {
        let sent_ms = sent.saturating_duration_since(self.began).as_millis() as u64 + 1;
        let until = sent_ms + self.read_lease_ms.load(Ordering::Relaxed);
        let mut replica = self.replica.lock();
        replica.lease_answered(until, LogIndex(reply.commit));
        if reply.asked_out.contains(&self.id.0) && !replica.has_agreed() {
            tracing::warn!(brick = %self.id, "clients cannot reach this brick; the leader asked it to go out, and it agreed");
            replica.agree_to_out();
        }
    }

    /// What this brick knows of repair: what others miss, and, as its own, what it has planned.
    pub(super) fn heal(&self) -> cluster::BrickHealReply {
        let lists: Vec<(Slot, Vec<(Ino, mortar_proto::interval::IntervalSet)>)> = {
            let replica = self.replica.lock();
            Slot::ALL
                .into_iter()
                .map(|x| (x, if x == self.slot { replica.planned_regions() } else { replica.missed(x) }))
                .collect()
        };
        let row = |(ino, regions): (Ino, mortar_proto::interval::IntervalSet)| {
            let size = self.objects.stat(ino).map_or(0, |s| s.size);
            let size_missed = regions.contains(SIZE_REGION);
            let bytes = regions
                .iter()
                .filter(|r| r.start < SIZE_REGION)
                .map(|r| {
                    r.end.saturating_mul(REGION_BYTES).min(size).saturating_sub(r.start.saturating_mul(REGION_BYTES))
                })
                .sum();
            cluster::FileMissed {
                ino: ino.0,
                regions: regions.len() - u64::from(size_missed),
                bytes,
                size: size_missed,
            }
        };
        let missed = lists
            .into_iter()
            .map(|(x, files)| cluster::MissedOf { slot: u32::from(x.0), files: files.into_iter().map(row).collect() })
            .collect();
        cluster::BrickHealReply { missed }
    }

    /// Waits for progress, at most until `until`. False when that has passed.
    pub(super) fn wait(&self, replica: &mut MutexGuard<'_, Replica>, until: Instant) -> bool {
        !self.progress.wait_until(replica, until).timed_out() && !self.is_closed()
    }
}
