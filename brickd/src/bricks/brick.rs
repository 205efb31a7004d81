//! One brick: its replica machine, store and journal; what the log tells it; its heartbeats.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_channel::{Sender, unbounded};
use mortar_proto::config::{BrickState, Configuration, Slot};
use mortar_proto::interval::IntervalSet;
use mortar_proto::metadata::Registration;
use mortar_proto::metadata::options::Options;
use mortar_proto::metadata::state::{self, State};
use mortar_proto::replica::{Recorded, Replica};
use mortar_proto::wire::{cluster, id_bytes, peer};
use mortar_proto::{
    BootId, BrickId, ClusterId, Epoch, Incarnation, Ino, LogIndex, REGION_BYTES, SIZE_REGION, SessionId, SetId,
    VolumeId,
};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::time::ClockId;

use super::Whole;
use super::answers::Answers;
use super::chores::Chore;
use super::damage::Damage;
use super::pace::{NICENESS, Pace};
use super::peers::Peers;
use super::scrub::Scrubbing;
use crate::log::Log;
use crate::store::{
    self, BrickDir, BrickId3, Doubts, Journal, Memory, Objects, Opened, Record, Removal, StoreError, Witness,
};
use crate::tree::Tree;

/// Threads for what may have to wait: for the log, for older requests, for the disk.
const WORKERS: usize = 32;
/// Threads for what is admitted already and must be made durable; apart, for others may wait for its end.
const ADMITTED: usize = 16;
/// Threads for pulls, which wait for other bricks; apart, so that bricks that pull from each other cannot block each other.
const PULLERS: usize = 8;
/// Threads that answer other bricks.
const PEER_WORKERS: usize = 8;
/// Two clocks that were read one after the other may differ by so much without the machine having slept.
const CLOCK_SLACK_MS: u64 = 20;

pub(super) type Job = Box<dyn FnOnce() + Send>;

/// What a brick lacks of a file, and whether no other has it.
type Lacking = (Ino, IntervalSet, bool);

/// What has to be known to open a brick.
pub(super) struct Opening {
    pub(super) id: BrickId,
    pub(super) set: SetId,
    pub(super) volume: VolumeId,
    pub(super) path: String,
    volume_name: String,
    options: Options,
    configuration: Configuration,
}

impl Opening {
    /// `None` when its replica set is not known, or does not have it.
    pub(super) fn of(id: BrickId, row: &state::Brick, state: &State) -> Option<Self> {
        let volume = state.volumes.get(&row.volume);
        let configuration = state.sets.get(&row.set)?.configuration;
        configuration.slot_of(id)?;
        Some(Self {
            id,
            set: row.set,
            volume: row.volume,
            path: row.path.clone(),
            volume_name: volume.map_or_else(String::new, |v| v.name.clone()),
            options: volume.map_or_else(Options::defaults, Options::of),
            configuration,
        })
    }
}

/// Threads for requests, by what they may wait for.
pub(super) struct Pools {
    pub(super) general: Sender<Job>,
    pub(super) admitted: Sender<Job>,
    pub(super) pulls: Sender<Job>,
    pub(super) peers: Sender<Job>,
}

/// One brick.
pub struct Brick {
    pub(super) id: BrickId,
    pub(super) slot: Slot,
    pub(super) volume: VolumeId,
    pub(super) cluster: ClusterId,
    pub(super) log: Log,
    pub(super) dir: BrickDir,
    memory: Memory,
    pub(super) objects: Arc<Objects>,
    pub(super) journal: Journal,
    witness: Witness,
    pub(super) replica: Mutex<Replica>,
    /// What is to be settled before it serves `[S3]`.
    pub(super) doubts: Mutex<Doubts>,
    /// Told whenever something that waits might go on.
    pub(super) progress: Condvar,
    pub(super) chores: Sender<Arc<Chore>>,
    pub(super) peers: Peers,
    pub(super) registration: Registration,
    began_ms: u64,
    /// How far the clock that goes on in sleep was ahead of the one that does not, at the last heartbeat.
    slept_ms: AtomicU64,
    read_lease_ms: AtomicU64,
    pub(super) io_timeout_ms: AtomicU64,
    reserve_percent: AtomicU64,
    /// Less room than the reserve.
    pub(super) is_low: AtomicBool,
    space: Mutex<(u64, u64)>,
    pub(super) repaired_bytes: AtomicU64,
    pub(super) pace: Pace,
    pub(super) damage: Damage,
    pub(super) scrubbing: Scrubbing,
    failed: Mutex<String>,
    pub(super) is_stopping: AtomicBool,
    is_closed: AtomicBool,
    /// It was `InSync` since it was opened.
    pub(super) was_in_sync: AtomicBool,
    pub(super) next_peer: AtomicU32,
    pub(super) connections: Mutex<HashMap<(SessionId, u32), Arc<Answers>>>,
    pub(super) pools: Pools,
}

/// Threads for jobs of one kind, as nice as that.
fn pool(name: &str, threads: usize, niceness: i32) -> std::io::Result<Sender<Job>> {
    let (jobs, taken) = unbounded::<Job>();
    for _ in 0..threads {
        let taken = taken.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            // Without the right to it, they are as nice as the thread that opened the brick.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), niceness);
            while let Ok(job) = taken.recv() {
                job();
            }
        })?;
    }
    Ok(jobs)
}

fn clock_ms(clock: ClockId) -> u64 {
    let time = rustix::time::clock_gettime(clock);
    time.tv_sec.unsigned_abs() * 1000 + time.tv_nsec.unsigned_abs() / 1_000_000
}

fn slept_ms() -> u64 {
    clock_ms(ClockId::Boottime).saturating_sub(clock_ms(ClockId::Monotonic))
}

impl Brick {
    /// Opens the brick.
    pub(super) fn open(opening: &Opening, log: Log, state_dir: &Path) -> anyhow::Result<Arc<Self>> {
        let Opening { id, set, volume, ref volume_name, ref options, configuration, .. } = *opening;
        let cluster = log.identity().cluster;
        let ids = BrickId3 { cluster, volume, brick: id };
        let Opened { dir, memory, journal, witness, objects, loaded, doubts } =
            store::open(Path::new(&opening.path), state_dir, ids, volume_name)?;
        let slot = configuration.slot_of(id).ok_or_else(|| anyhow::anyhow!("the brick is not in its replica set"))?;
        let recorded = Recorded { intents: loaded.intents, missed: loaded.missed };
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("no random numbers: {e}"))?;
        let incarnation = Incarnation(u64::from_le_bytes(random) | 1);
        let boot = memory.id();
        let tree = Tree::new(dir.root(), set, Arc::clone(&objects));
        let space = objects.space()?;
        let (chores, to_do) = unbounded();
        let brick = Arc::new(Self {
            id,
            slot,
            volume,
            cluster,
            log,
            dir,
            memory,
            objects,
            journal,
            witness,
            replica: Mutex::new(Replica::new(id, slot, incarnation, recorded)),
            doubts: Mutex::new(doubts),
            progress: Condvar::new(),
            chores,
            peers: Peers::default(),
            registration: Registration { incarnation, boot, clean: loaded.clean },
            began_ms: clock_ms(ClockId::Boottime),
            slept_ms: AtomicU64::new(slept_ms()),
            read_lease_ms: AtomicU64::new(options.read_lease_ms),
            io_timeout_ms: AtomicU64::new(options.io_timeout_ms),
            reserve_percent: AtomicU64::new(options.reserve_percent),
            is_low: AtomicBool::new(false),
            space: Mutex::new(space),
            repaired_bytes: AtomicU64::new(0),
            pace: Pace::default(),
            damage: Damage::default(),
            scrubbing: Scrubbing::new(loaded.scrub.as_deref(), options),
            failed: Mutex::default(),
            is_stopping: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            was_in_sync: AtomicBool::new(false),
            next_peer: AtomicU32::new(0),
            connections: Mutex::default(),
            pools: Pools {
                general: pool("brick-work", WORKERS, 0)?,
                admitted: pool("brick-write", ADMITTED, 0)?,
                pulls: pool("brick-pull", PULLERS, NICENESS)?,
                peers: pool("brick-peer", PEER_WORKERS, NICENESS)?,
            },
        });
        super::chores::start(&brick, tree, to_do)?;
        super::tasks::start(&brick)?;
        super::scrub::start(&brick)?;
        Ok(brick)
    }

    /// Milliseconds since the brick was opened, the machine's sleep included; never goes back.
    pub(super) fn now_ms(&self) -> u64 {
        clock_ms(ClockId::Boottime).saturating_sub(self.began_ms) + 1
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Runs something that must not panic; if it does, the brick has failed, for nobody knows what is left half done.
    pub(super) fn guarded<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        let ran = catch_unwind(AssertUnwindSafe(act)).ok();
        if ran.is_none() {
            self.fail("mortar-brickd made a mistake of its own; its log says where");
        }
        ran
    }

    // -- what the log says ------------------------------------------------------------------------------------------

    pub(super) fn take_whole(&self, whole: &Whole) {
        // [E6] A cold start with this brick as source may be among what was not told one by one. To take one too many for
        // such only makes others compare more.
        let known = self.replica.lock().configuration().map_or(whole.configuration.n, |c| c.n);
        let mine = |(n, boot): &(_, BootId)| *n > known && *boot == self.registration.boot;
        let cold_start = whole.cold_starts.iter().any(mine).then_some(self.slot);
        self.configured(whole.configuration, cold_start);
        let mut replica = self.replica.lock();
        for (ino, epoch, holder) in &whole.leases {
            replica.leased(*ino, *epoch, *holder);
        }
        drop(replica);
        self.do_chore(Arc::new(Chore::Mend));
        self.applied(whole.index);
    }

    pub(super) fn configured(&self, configuration: Configuration, cold_start: Option<Slot>) {
        let mut replica = self.replica.lock();
        // A configuration without this brick is from before it was made, or says that another has taken its place.
        let is_ours = configuration.slot_of(self.id) == Some(self.slot);
        if !is_ours || replica.configuration().is_some_and(|c| c.n >= configuration.n) {
            return;
        }
        if configuration.members[self.slot.index()].incarnation == self.registration.incarnation
            && !self.doubts.lock().is_empty()
        {
            drop(replica);
            if let Err(e) = self.settle_doubts(&configuration) {
                return self.lose(&e.to_string());
            }
            replica = self.replica.lock();
        }
        if cold_start == Some(self.slot) && replica.state() != BrickState::InSync {
            // [E2] A source by the administrator's word may be the only one that has what it pulled and did not flush.
            drop(replica);
            if let Err(e) = self.objects.flush_all() {
                return self.lose(&e.to_string());
            }
            replica = self.replica.lock();
        }
        self.peers.forget();
        let before = replica.state();
        let entered = replica.configured(configuration, cold_start);
        let brick_in = |slot: Slot| configuration.members.get(slot.index()).map(|m| m.brick);
        // [E6] Durable before anything is answered or reported under this configuration: the lock is kept.
        let records =
            entered.into_iter().filter_map(|(x, ino, regions)| Some(Record::Missed(brick_in(x)?, ino, regions)));
        if let Err(e) = self.journal.add(records.collect()) {
            drop(replica);
            return self.lose(&format!("the journal cannot be written: {e}"));
        }
        for (x, ino) in replica.forget_missed_of_in_sync() {
            if let Some(x) = brick_in(x) {
                self.journal.remove(vec![Removal::AllMissed(x, ino)]);
            }
        }
        self.journal.remove(replica.forget_replaced().into_iter().map(|(x, ino)| Removal::AllMissed(x, ino)).collect());
        let now = replica.state();
        if replica.is_live() && now == BrickState::InSync {
            self.was_in_sync.store(true, Ordering::Relaxed);
        }
        if before != now {
            tracing::info!(brick = %self.id, n = configuration.n.0, "{before:?} -> {now:?}");
            if now == BrickState::Syncing {
                self.repaired_bytes.store(0, Ordering::Relaxed);
            }
        }
        drop(replica);
        self.progress.notify_all();
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

    /// A file is gone for good.
    pub(super) fn reclaimed(&self, ino: Ino) {
        {
            let mut replica = self.replica.lock();
            replica.reclaimed(ino);
            self.journal.remove(vec![Removal::File(ino)]);
        }
        self.do_chore(Arc::new(Chore::Remove(ino)));
    }

    pub(super) fn do_chore(&self, chore: Arc<Chore>) {
        // Its thread ends only with the brick.
        let _ = self.chores.send(chore);
    }

    pub(super) fn set_options(&self, options: &Options) {
        self.read_lease_ms.store(options.read_lease_ms, Ordering::Relaxed);
        self.io_timeout_ms.store(options.io_timeout_ms, Ordering::Relaxed);
        self.reserve_percent.store(options.reserve_percent, Ordering::Relaxed);
        self.scrubbing.set_options(options);
    }

    // -- failing ----------------------------------------------------------------------------------------------------

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

    /// [E4], [W8] The disk refused something: what was not flushed may be gone, or may only look as if it were there.
    pub(super) fn lose(&self, why: &str) {
        if let Err(e) = self.memory.lose() {
            tracing::error!(brick = %self.id, "what was not flushed may be gone, and that cannot be noted: {e}");
        }
        self.fail(why);
    }

    /// Has the server remember how far the journal has come.
    pub(super) fn raise_stamp(&self) {
        match self.journal.raise() {
            Ok(Some(stamp)) => {
                if let Err(e) = self.witness.saw(stamp) {
                    tracing::warn!(brick = %self.id, "an older copy of the disk might not be noticed: {e:#}");
                }
            }
            Ok(None) => {}
            Err(e) => self.lose(&format!("the journal cannot be written: {e}")),
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        !self.failed.lock().is_empty()
    }

    /// A store error: fails the brick if the disk is broken.
    pub(super) fn complain(&self, error: &StoreError) {
        if error.is_disk_failure() {
            self.lose(&error.to_string());
        }
    }

    /// Takes no more requests.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        for connection in self.connections.lock().values() {
            connection.cut();
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

    pub(super) fn total_bytes(&self) -> u64 {
        self.space.lock().0
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
            known: replica.configuration().map_or(0, |c| c.n.0),
            agreed_under: replica.agreed_under().0,
            failed,
            n: report.map_or(0, |r| r.n.0),
            missed_empty: report.map_or(0, |r| u32::from(r.missed_empty.0)),
            repaired: report.is_some_and(|r| r.repaired),
            total_bytes,
            free_bytes,
            missed_regions,
            repaired_bytes: self.repaired_bytes.load(Ordering::Relaxed),
            stopping: self.is_stopping.load(Ordering::Acquire),
        }
    }

    pub(super) fn heartbeat_answered(&self, sent: Instant, reply: &peer::HeartbeatReply) {
        // [R1] `sent` was taken from a clock that stands still while the machine sleeps: if it slept, nobody knows how long
        // ago that was.
        let slept = slept_ms();
        let had_slept = self.slept_ms.swap(slept, Ordering::Relaxed);
        let now = self.now_ms();
        let mut replica = self.replica.lock();
        if slept <= had_slept + CLOCK_SLACK_MS && !reply.withheld.contains(&self.id.0) {
            let sent_ms = now.saturating_sub(sent.elapsed().as_millis() as u64 + 1);
            replica.lease_answered(sent_ms + self.read_lease_ms.load(Ordering::Relaxed), LogIndex(reply.commit));
        }
        if reply.asked_out.contains(&self.id.0) && !replica.has_agreed() {
            tracing::warn!(brick = %self.id, "clients cannot reach this brick; the leader asked it to go out, and it agreed");
            replica.agree_to_out();
        }
    }

    /// What this brick knows of repair: what others miss, and, as its own, what it has planned and what is corrupt.
    pub(super) fn heal(&self) -> cluster::BrickHealReply {
        let lists: Vec<(Slot, Vec<Lacking>)> = {
            let replica = self.replica.lock();
            let is_given_up = |x, ino| x == self.slot && replica.repair_list(x, ino).is_some_and(|r| r.is_empty());
            let files = |x| if x == self.slot { replica.lacking() } else { replica.missed(x) };
            Slot::ALL
                .into_iter()
                .map(|x| (x, files(x).into_iter().map(|(ino, set)| (ino, set, is_given_up(x, ino))).collect()))
                .collect()
        };
        let row = |(ino, regions, given_up): Lacking| {
            let size = self.objects.stat(ino).map_or(0, |s| s.size);
            let size_missed = regions.contains(SIZE_REGION);
            let clipped = |region: u64| region.saturating_mul(REGION_BYTES).min(size);
            let bytes = regions
                .iter()
                .filter(|r| r.start < SIZE_REGION)
                .map(|r| clipped(r.end).saturating_sub(clipped(r.start)))
                .sum();
            let regions = regions.len() - u64::from(size_missed);
            cluster::FileMissed { ino: ino.0, regions, bytes, size: size_missed, given_up }
        };
        let missed = lists
            .into_iter()
            .map(|(x, files)| cluster::MissedOf { slot: u32::from(x.0), files: files.into_iter().map(row).collect() })
            .collect();
        cluster::BrickHealReply { missed, corruption: Some(self.corruption()) }
    }

    /// Waits for progress, at most until `until`. False when that has passed.
    pub(super) fn wait(&self, replica: &mut MutexGuard<'_, Replica>, until: Instant) -> bool {
        !self.progress.wait_until(replica, until).timed_out() && !self.is_closed()
    }
}
