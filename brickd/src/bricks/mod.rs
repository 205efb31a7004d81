//! This server's bricks: opened as the metadata log says, fed with what it applies, served to clients and to each other.
//!
//! | file | owns |
//! | --- | --- |
//! | `mod` | the keeper: which bricks there are; telling each what the log says, in order |
//! | `brick` | one brick: its replica machine, store and journal; heartbeats; failing |
//! | `stop` | the end of a brick: a clean stop `[E5]` |
//! | `damage` | what is corrupt here: found, remembered, counted `[R5]` |
//! | `scrub` | looking for what is corrupt where nobody reads, and comparing bricks `[R5]` |
//! | `chores` | what a brick does on its disk because names change: its tree, objects that are gone |
//! | `serve` | connections |
//! | `answers` | what goes out on a connection, and how much may wait |
//! | `requests` | taking a request in: what is refused, what is done at once, who does the rest |
//! | `run` | running a request: admission, durability, data, answer |
//! | `list` | lists of regions and extents, in pages |
//! | `pace` | how repair gives way to applications `[S5]` |
//! | `pull` | taking ranges from another brick `[S2]`, `[W2]` |
//! | `peers` | connections to other bricks |
//! | `tasks` | what a brick does by itself: plan and end of repair `[S1]`, `[S4]`, clearing intents `[W7]`, probing the disk `[E4]` |
//!
//! A disk that hangs harms its own brick only: each brick has threads of its own, and nothing waits for a disk while it
//! looks at the log's state.

mod answers;
mod brick;
mod chores;
mod damage;
mod doubt;
mod list;
mod pace;
mod peers;
mod pull;
mod requests;
mod run;
mod scrub;
mod serve;
mod stop;
mod tasks;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use mortar_proto::config::{Configuration, Slot};
use mortar_proto::metadata::Effect;
use mortar_proto::metadata::options::Options;
use mortar_proto::metadata::state::{Node, ReplicaSet, State};
use mortar_proto::wire::{cluster, peer};
use mortar_proto::{BootId, BrickId, ConfigNo, Epoch, Incarnation, Ino, LogIndex, SessionId, SetId, VolumeId};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::log::{Applied, Log};
use brick::{Brick, Opening};
use chores::Chore;

/// How much a brick may lag behind the log (I9); one that does is given up, for its disk hangs.
const MAX_EVENTS: usize = 1_000_000;
/// How long a clean stop waits to be put out: clients then need not find out by themselves.
const STOP_WAIT: Duration = Duration::from_secs(4);

/// How long a brick waits for the one that was in its directory before it to end.
const CLOSE_WAIT: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(50);

/// What the log tells a brick, in the log's order.
#[derive(Clone)]
enum Event {
    Whole(Arc<Whole>),
    Configured(Configuration, Option<Slot>),
    Leased(Ino, Epoch, SessionId),
    Reclaimed(Ino),
    Options(Arc<Options>),
    Chore(Arc<Chore>),
    Applied(LogIndex),
}

/// All that a brick has to know: at the start, and when a snapshot was installed.
struct Whole {
    index: LogIndex,
    configuration: Configuration,
    cold_starts: Vec<(ConfigNo, BootId)>,
    leases: Vec<(Ino, Epoch, SessionId)>,
}

impl Whole {
    /// What the state says of the sets that `wants` picks.
    fn of(state: &State, index: LogIndex, wants: impl Fn(SetId) -> bool) -> BTreeMap<SetId, Arc<Self>> {
        let sets = state.sets.iter().filter(|(set, _)| wants(**set));
        let whole = |row: &ReplicaSet| {
            let cold_starts = row.cold_starts.iter().copied().collect();
            Self { index, configuration: row.configuration, cold_starts, leases: Vec::new() }
        };
        let mut wholes: BTreeMap<SetId, Self> = sets.map(|(set, row)| (*set, whole(row))).collect();
        if wholes.is_empty() {
            return BTreeMap::new();
        }
        for (ino, inode) in &state.inodes {
            if let Node::File { set, lease } = &inode.node
                && let Some(whole) = wholes.get_mut(set)
            {
                whole.leases.push((*ino, lease.epoch, lease.holder.unwrap_or_default()));
            }
        }
        wholes.into_iter().map(|(set, whole)| (set, Arc::new(whole))).collect()
    }
}

/// Whom an event is for.
enum For {
    Set(SetId),
    Volume(VolumeId),
}

type Opened = Arc<OnceLock<Result<Arc<Brick>, String>>>;

/// A brick of this server, open or on its way.
struct Kept {
    /// It is told everything up to here at once, and no more of it.
    knows: LogIndex,
    id: BrickId,
    set: SetId,
    volume: VolumeId,
    path: String,
    events: Sender<Event>,
    opened: Opened,
}

impl Kept {
    fn brick(&self) -> Option<&Arc<Brick>> {
        self.opened.get()?.as_ref().ok()
    }

    fn tell(&self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            match self.brick() {
                Some(brick) => brick.fail("its disk hangs: it lags behind the metadata log without end"),
                None => drop(self.opened.set(Err("its disk hangs while it is opened".into()))),
            }
        }
        // A failed brick takes nothing more until its next start.
        let is_well = match self.opened.get() {
            Some(Ok(brick)) => !brick.has_failed(),
            Some(Err(_)) => false,
            None => true,
        };
        if is_well {
            // Nobody listens any more when it has been closed.
            let _ = self.events.send(event);
        }
    }
}

/// A brick in figures.
pub struct Figures {
    /// Which.
    pub id: BrickId,
    /// The name of its volume.
    pub volume: String,
    /// Its directory.
    pub path: String,
    /// Its state by the log that it has applied, what it says in heartbeats, and its corrupt blocks; `None`: it is not open.
    pub open: Option<(mortar_proto::BrickState, peer::BrickBeat, cluster::Corruption)>,
}

/// All bricks of this server.
pub struct Bricks {
    log: Log,
    state_dir: PathBuf,
    kept: RwLock<BTreeMap<BrickId, Arc<Kept>>>,
    /// Bricks that are gone, by their directories: another one there waits until nothing of them runs.
    closing: Mutex<BTreeMap<String, Weak<Brick>>>,
    is_caught_up: Arc<AtomicBool>,
}

impl Bricks {
    /// Starts keeping bricks: `applied` tells what the log does. The server keeps its state in `state_dir`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn open(log: Log, applied: UnboundedReceiver<Applied>, state_dir: &Path) -> anyhow::Result<Arc<Self>> {
        let keeper = Arc::new(Self {
            log,
            state_dir: state_dir.to_owned(),
            kept: RwLock::default(),
            closing: Mutex::default(),
            is_caught_up: Arc::default(),
        });
        let runner = Arc::clone(&keeper);
        std::thread::Builder::new().name("applier".into()).spawn(move || runner.run(applied))?;
        Ok(keeper)
    }

    fn run(&self, mut applied: UnboundedReceiver<Applied>) {
        // Entries that a look at the whole state has covered already.
        let mut covered = LogIndex(0);
        while let Some(next) = applied.blocking_recv() {
            match next {
                Applied::Reset => covered = self.take_all(),
                Applied::Entry { index, effects } => {
                    if index > covered {
                        self.take(index, effects);
                    }
                }
            }
        }
    }

    /// Tells all bricks everything, as the state has it.
    fn take_all(&self) -> LogIndex {
        // Entries that are no commands do not show in the state; everything up to here is in it.
        let applied = self.log.applied();
        let (openings, wholes, index) = self.log.with_state(|state| {
            let index = applied.max(state.applied);
            let wholes = Whole::of(state, index, |_| true);
            (self.openings(state), wholes, index)
        });
        self.drop_replaced();
        openings.into_iter().for_each(|opening| drop(self.keep(opening, index)));
        for kept in self.all() {
            match wholes.get(&kept.set) {
                Some(whole) => kept.tell(Event::Whole(Arc::clone(whole))),
                None => self.drop_brick(kept.id),
            }
        }
        index
    }

    fn take(&self, index: LogIndex, effects: Vec<Effect>) {
        for effect in effects {
            // Entries that are no commands do not show in the state; everything up to here is in it.
            let applied = self.log.applied();
            let (openings, wholes, told, known) = self.log.with_state(|state| {
                let (openings, told) = self.told(state, index, effect);
                let known = applied.max(state.applied);
                let wholes = Whole::of(state, known, |set| openings.iter().any(|o| o.set == set));
                (openings, wholes, told, known)
            });
            self.drop_replaced();
            for opening in openings {
                // A brick that takes another's place has to know who may write its files: that was told before it was there.
                let whole = wholes.get(&opening.set).cloned();
                let kept = self.keep(opening, known);
                whole.into_iter().for_each(|whole| kept.tell(Event::Whole(whole)));
            }
            if let Some((whom, event)) = told {
                let is_meant = |kept: &Arc<Kept>| match whom {
                    For::Set(set) => kept.set == set && index > kept.knows,
                    For::Volume(volume) => kept.volume == volume && index > kept.knows,
                };
                self.all().iter().filter(|kept| is_meant(kept)).for_each(|kept| kept.tell(event.clone()));
            }
        }
        self.all().iter().for_each(|kept| kept.tell(Event::Applied(index)));
    }

    /// What an effect means for bricks; the state may be beyond it already.
    fn told(&self, state: &State, index: LogIndex, effect: Effect) -> (Vec<Opening>, Option<(For, Event)>) {
        let mut openings = Vec::new();
        let told = match effect {
            Effect::Configured { set, configuration, cold_start } => {
                openings = self.openings(state);
                Some((For::Set(set), Event::Configured(configuration, cold_start)))
            }
            Effect::Leased { set, ino, epoch, holder } => Some((For::Set(set), Event::Leased(ino, epoch, holder))),
            Effect::Reclaimed { set, ino } => Some((For::Set(set), Event::Reclaimed(ino))),
            Effect::Named { volume, change } => {
                let chore = Chore::named(index, change, state);
                Some((For::Volume(volume), Event::Chore(Arc::new(chore))))
            }
            Effect::Owned { volume, ino } => {
                Chore::owned(index, ino, state).map(|chore| (For::Volume(volume), Event::Chore(Arc::new(chore))))
            }
            Effect::VolumeChanged { volume } => match state.volumes.get(&volume) {
                Some(row) => Some((For::Volume(volume), Event::Options(Arc::new(Options::of(row))))),
                None => {
                    self.all().iter().filter(|k| k.volume == volume).for_each(|k| self.drop_brick(k.id));
                    None
                }
            },
            Effect::SessionEnded { .. } => None,
        };
        (openings, told)
    }

    /// Bricks in whose place are others by now, and those of volumes that are gone.
    fn drop_replaced(&self) {
        let all = self.all();
        let gone = self.log.with_state(|s| {
            let gone = all.iter().filter(|kept| !s.bricks.contains_key(&kept.id));
            gone.map(|kept| kept.id).collect::<Vec<_>>()
        });
        gone.into_iter().for_each(|id| self.drop_brick(id));
    }

    /// Bricks of this server that are not kept yet.
    fn openings(&self, state: &State) -> Vec<Opening> {
        let me = self.log.identity().server;
        let kept = self.kept.read();
        let new = state.bricks.iter().filter(|(id, row)| row.server == me && !kept.contains_key(id));
        new.filter_map(|(id, row)| Opening::of(*id, row, state)).collect()
    }

    /// Opens a brick, in the thread that will tell it what the log says.
    fn keep(&self, opening: Opening, knows: LogIndex) -> Arc<Kept> {
        let (events, told) = unbounded();
        let opened = Opened::default();
        let kept = Arc::new(Kept {
            knows,
            id: opening.id,
            set: opening.set,
            volume: opening.volume,
            path: opening.path.clone(),
            events,
            opened: Arc::clone(&opened),
        });
        self.kept.write().insert(kept.id, Arc::clone(&kept));
        let site = Site {
            log: self.log.clone(),
            state_dir: self.state_dir.clone(),
            before: self.closing.lock().remove(&opening.path),
            is_caught_up: Arc::clone(&self.is_caught_up),
        };
        let result = Arc::clone(&opened);
        let spawned =
            std::thread::Builder::new().name("brick-log".into()).spawn(move || feed(&opening, site, &result, &told));
        if let Err(e) = spawned {
            let _ = opened.set(Err(format!("no thread for it can be started: {e}")));
        }
        kept
    }

    fn all(&self) -> Vec<Arc<Kept>> {
        self.kept.read().values().cloned().collect()
    }

    fn each(&self, act: impl Fn(&Brick)) {
        self.all().iter().filter_map(|kept| kept.brick()).for_each(|brick| act(brick));
    }

    fn drop_brick(&self, id: BrickId) {
        // Its thread ends, and closes it, when nobody can tell it anything any more.
        if let Some(kept) = self.kept.write().remove(&id) {
            tracing::info!(brick = %id, "the brick is no part of any volume any more; its files stay in {}", kept.path);
            if let Some(brick) = kept.brick() {
                brick.close();
                self.closing.lock().insert(kept.path.clone(), Arc::downgrade(brick));
            }
        }
    }

    /// What the bricks say in a heartbeat.
    #[must_use]
    pub fn beats(&self) -> Vec<peer::BrickBeat> {
        let beat = |kept: &Arc<Kept>| match kept.opened.get()? {
            Ok(brick) => Some(brick.beat()),
            Err(why) => Some(peer::BrickBeat { brick: kept.id.0, failed: why.clone(), ..peer::BrickBeat::default() }),
        };
        self.all().iter().filter_map(beat).collect()
    }

    /// Each brick in figures: its volume, its directory, and, when it is open, its state and what it has counted.
    #[must_use]
    pub fn figures(&self) -> Vec<Figures> {
        let row = |kept: &Arc<Kept>| Figures {
            id: kept.id,
            volume: self.log.with_state(|s| s.volumes.get(&kept.volume).map_or_else(String::new, |v| v.name.clone())),
            path: kept.path.clone(),
            open: kept.brick().map(|b| {
                let state = b.replica.lock().state();
                (state, b.beat(), b.corruption())
            }),
        };
        self.all().iter().map(row).collect()
    }

    /// The leader answered a heartbeat that was sent at `sent` `[R1]`.
    pub fn heartbeat_answered(&self, sent: Instant, reply: &peer::HeartbeatReply) {
        if self.log.applied() >= LogIndex(reply.commit) {
            self.is_caught_up.store(true, Ordering::Release);
        }
        self.each(|brick| brick.heartbeat_answered(sent, reply));
    }

    /// What a brick knows of repair.
    #[must_use]
    pub fn heal(&self, brick: BrickId) -> Option<cluster::BrickHealReply> {
        self.brick(brick).map(|b| b.heal())
    }

    /// Serves a connection of the data plane, in threads of its own.
    pub fn serve_data(self: &Arc<Self>, socket: TcpStream, from: SocketAddr) {
        let keeper = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("data".into()).spawn(move || {
            if let Err(e) = serve::connection(&keeper, &socket) {
                tracing::info!(%from, "connection closed: {e:#}");
            }
            let _ = socket.shutdown(std::net::Shutdown::Both);
        });
        if let Err(e) = spawned {
            tracing::error!(%from, "no thread for a connection: {e}");
        }
    }

    /// Starts or stops a brick's scrub, and tells how it does.
    #[must_use]
    pub fn scrub(&self, brick: BrickId, action: cluster::ScrubAction) -> Option<cluster::ScrubStatus> {
        self.brick(brick).map(|b| b.scrub(action))
    }

    fn brick(&self, id: BrickId) -> Option<Arc<Brick>> {
        self.kept.read().get(&id)?.brick().cloned()
    }

    /// Ends all connections and takes no more, as when the process is killed.
    pub fn close(&self) {
        self.each(Brick::close);
    }

    /// Stops cleanly `[E5]`: asks to be put out, drains, flushes, records it. Bounded in time.
    pub fn stop(&self) {
        self.each(Brick::ask_to_stop);
        let until = Instant::now() + STOP_WAIT;
        while Instant::now() < until && self.all().iter().filter_map(|k| k.brick()).any(|b| b.is_still_wanted()) {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.each(Brick::stop);
    }
}

/// What a brick finds when it is opened.
struct Site {
    log: Log,
    state_dir: PathBuf,
    /// The brick that was in its directory before, as long as something of it runs.
    before: Option<Weak<Brick>>,
    /// The log is applied as far as it had come when this server was heard first.
    is_caught_up: Arc<AtomicBool>,
}

impl Site {
    fn open(&self, opening: &Opening) -> anyhow::Result<Arc<Brick>> {
        let until = Instant::now() + CLOSE_WAIT;
        while self.before.as_ref().is_some_and(|b| b.strong_count() > 0) {
            anyhow::ensure!(
                Instant::now() < until,
                "the brick that was in {} before still hangs on its disk; restart mortar-brickd",
                opening.path
            );
            std::thread::sleep(LOOK);
        }
        loop {
            match Brick::open(opening, self.log.clone(), &self.state_dir) {
                // The journal of the brick before is closed a moment after everything else of it.
                Err(_) if self.before.is_some() && Instant::now() < until => std::thread::sleep(LOOK),
                opened => return opened,
            }
        }
    }

    /// A directory without a brick becomes one only if there never was one: a disk that is not mounted, or was replaced by an empty
    /// one, would else be taken for a brick whose files are all empty. What the log says of that counts once it is applied as
    /// far as it goes.
    ///
    /// # Errors
    /// The sentence for the administrator.
    fn check_made(&self, opening: &Opening) -> anyhow::Result<()> {
        if is_brick(Path::new(&opening.path)).is_some() {
            return Ok(());
        }
        while !self.is_caught_up.load(Ordering::Acquire) && self.is_wanted(opening.id) {
            std::thread::sleep(LOOK);
        }
        let was_there = self.log.with_state(|state| {
            let members = state.sets.get(&opening.set).map(|set| set.configuration.members);
            members.is_some_and(|m| m.iter().any(|m| m.brick == opening.id && m.incarnation != Incarnation(0)))
        });
        anyhow::ensure!(
            !was_there,
            "there is no brick in {}, though there was one: is its disk mounted? If it is, restart mortar-brickd; if the disk is a new one, \
             have the brick built anew with 'mortar volume reset-brick'",
            opening.path
        );
        Ok(())
    }

    fn is_wanted(&self, brick: BrickId) -> bool {
        self.log.with_state(|state| state.bricks.contains_key(&brick))
    }
}

/// The life of a brick: opened, told what the log says, closed.
fn feed(opening: &Opening, site: Site, opened: &Opened, events: &Receiver<Event>) {
    let (id, path) = (opening.id, &opening.path);
    let made = site.check_made(opening);
    // A server that has just started goes through the log once more; a brick that is gone by now is left alone.
    if !site.is_wanted(id) {
        return;
    }
    let brick = match made.and_then(|()| site.open(opening)) {
        Ok(brick) => {
            tracing::info!(brick = %id, path, "brick is open");
            brick
        }
        Err(e) => {
            tracing::error!(brick = %id, path, "cannot open the brick: {e:#}");
            let _ = opened.set(Err(format!("{e:#}")));
            return;
        }
    };
    drop(site);
    if opened.set(Ok(Arc::clone(&brick))).is_err() {
        return brick.close();
    }
    while let Ok(event) = events.recv() {
        let brick = &brick;
        brick.guarded(move || match event {
            Event::Whole(whole) => brick.take_whole(&whole),
            Event::Configured(configuration, cold_start) => brick.configured(configuration, cold_start),
            Event::Leased(ino, epoch, holder) => brick.leased(ino, epoch, holder),
            Event::Reclaimed(ino) => brick.reclaimed(ino),
            Event::Options(options) => brick.set_options(&options),
            Event::Chore(chore) => brick.do_chore(chore),
            Event::Applied(index) => brick.applied(index),
        });
    }
    brick.close();
}

/// The name of the volume whose brick `path` is, if it is one: for checks before it becomes another's.
#[must_use]
pub fn is_brick(path: &Path) -> Option<String> {
    crate::store::volume_of_brick(path).ok().flatten()
}
