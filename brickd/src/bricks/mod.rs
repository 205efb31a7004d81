//! This server's bricks: opened as the metadata log says, fed with what it applies, served to clients and to each other.
//!
//! | file | owns |
//! | --- | --- |
//! | `mod` | the keeper: which bricks there are; applying the log to them in order |
//! | `brick` | one brick: its replica machine, store and journal; heartbeats; failing and stopping |
//! | `serve` | connections |
//! | `requests` | running a request: admission, durability, data, answer |
//! | `pull` | taking ranges from another brick `[S2]`, `[W2]` |
//! | `tasks` | what a brick does by itself: plan and end of repair `[S1]`, `[S4]`, clearing intents `[W7]`, probing the disk `[E4]` |

mod brick;
mod pull;
mod requests;
mod serve;
mod tasks;

use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mortar_proto::metadata::Effect;
use mortar_proto::metadata::state::{Node, State};
use mortar_proto::wire::{cluster, peer};
use mortar_proto::{BootId, BrickId, Ino, LogIndex, SetId};
use parking_lot::RwLock;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::log::{Applied, Log};
use brick::Brick;

/// All bricks of this server.
pub struct Bricks {
    log: Log,
    boot: BootId,
    bricks: RwLock<HashMap<BrickId, Arc<Brick>>>,
    /// Bricks that could not be opened, and why.
    broken: RwLock<BTreeMap<BrickId, String>>,
}

impl Bricks {
    /// Starts keeping bricks: `applied` tells what the log does.
    ///
    /// # Errors
    /// When the kernel's boot id cannot be read, or no thread be started.
    pub fn open(log: Log, applied: UnboundedReceiver<Applied>) -> anyhow::Result<Arc<Self>> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = u128::from_str_radix(&text.trim().replace('-', ""), 16)?;
        let keeper = Arc::new(Self { log, boot: BootId(boot), bricks: RwLock::default(), broken: RwLock::default() });
        let runner = Arc::clone(&keeper);
        std::thread::Builder::new().name("applier".into()).spawn(move || runner.run(applied))?;
        Ok(keeper)
    }

    fn run(&self, mut applied: UnboundedReceiver<Applied>) {
        // Entries that a look at the whole state has covered already.
        let mut covered = LogIndex(0);
        while let Some(next) = applied.blocking_recv() {
            match next {
                Applied::Reset => covered = self.log.with_state(|state| self.take_all(state)),
                Applied::Entry { index, effects } => {
                    if index > covered {
                        self.log.with_state(|state| self.take(state, index, effects));
                    }
                }
            }
        }
    }

    /// Makes everything as the state has it.
    fn take_all(&self, state: &State) -> LogIndex {
        self.open_bricks(state);
        let bricks: Vec<Arc<Brick>> = self.bricks.read().values().cloned().collect();
        for brick in bricks {
            let Some(set) = state.sets.get(&brick.set) else {
                self.drop_brick(brick.id);
                continue;
            };
            brick.configured(set.configuration, None);
            for (ino, inode) in &state.inodes {
                if let Node::File { set, lease } = &inode.node
                    && *set == brick.set
                {
                    brick.leased(*ino, lease.epoch, lease.holder.unwrap_or_default());
                }
            }
            let gone = |ino: &Ino| !state.inodes.contains_key(ino);
            match brick.objects.inodes() {
                Ok(inodes) => inodes.into_iter().filter(gone).for_each(|ino| brick.reclaim(ino)),
                Err(e) => brick.fail(&e.to_string()),
            }
            brick.mend_tree(state);
            brick.applied(state.applied);
        }
        state.applied
    }

    fn take(&self, state: &State, index: LogIndex, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Configured { set, configuration, cold_start } => {
                    self.open_bricks(state);
                    self.of_set(set, |brick| brick.configured(configuration, cold_start));
                }
                Effect::Leased { set, ino, epoch, holder } => {
                    self.of_set(set, |brick| brick.leased(ino, epoch, holder))
                }
                Effect::Reclaimed { set, ino } => self.of_set(set, |brick| brick.reclaim(ino)),
                Effect::Named { volume, change } => {
                    self.each(|brick| {
                        if brick.volume == volume {
                            brick.change_tree(&change, state);
                        }
                    });
                }
                Effect::Owned { volume, ino } => {
                    self.each(|brick| {
                        if brick.volume == volume {
                            brick.owned(ino, state);
                        }
                    });
                }
                Effect::VolumeChanged { volume } => match state.volumes.get(&volume) {
                    Some(row) => self.each(|brick| {
                        if brick.volume == volume {
                            brick.set_options(&mortar_proto::metadata::options::Options::of(row));
                        }
                    }),
                    None => {
                        let gone: Vec<BrickId> =
                            self.bricks.read().values().filter(|b| b.volume == volume).map(|b| b.id).collect();
                        gone.into_iter().for_each(|id| self.drop_brick(id));
                    }
                },
                Effect::SessionEnded { .. } => {}
            }
        }
        self.each(|brick| brick.applied(index));
    }

    fn each(&self, act: impl Fn(&Brick)) {
        let bricks: Vec<Arc<Brick>> = self.bricks.read().values().cloned().collect();
        bricks.iter().for_each(|b| act(b));
    }

    fn of_set(&self, set: SetId, act: impl Fn(&Brick)) {
        self.each(|brick| {
            if brick.set == set {
                act(brick);
            }
        });
    }

    /// Opens bricks of this server that are not open.
    fn open_bricks(&self, state: &State) {
        let me = self.log.identity().server;
        for (id, row) in &state.bricks {
            if row.server != me || self.bricks.read().contains_key(id) || self.broken.read().contains_key(id) {
                continue;
            }
            match Brick::open(*id, row, state, self.log.clone(), self.boot) {
                Ok(brick) => {
                    tracing::info!(brick = %id, path = row.path, "brick is open");
                    self.bricks.write().insert(*id, brick);
                }
                Err(e) => {
                    tracing::error!(brick = %id, path = row.path, "cannot open the brick: {e:#}");
                    self.broken.write().insert(*id, format!("{e:#}"));
                }
            }
        }
    }

    fn drop_brick(&self, id: BrickId) {
        if let Some(brick) = self.bricks.write().remove(&id) {
            tracing::info!(brick = %id, "the brick's volume was deleted; its files stay in {}", brick.root().display());
            brick.close();
        }
    }

    /// What the bricks say in a heartbeat.
    #[must_use]
    pub fn beats(&self) -> Vec<peer::BrickBeat> {
        let mut beats: Vec<peer::BrickBeat> = self.bricks.read().values().map(|b| b.beat()).collect();
        for (id, why) in &*self.broken.read() {
            beats.push(peer::BrickBeat { brick: id.0, failed: why.clone(), ..peer::BrickBeat::default() });
        }
        beats
    }

    /// The leader answered a heartbeat that was sent at `sent` `[R1]`.
    pub fn heartbeat_answered(&self, sent: Instant, reply: &peer::HeartbeatReply) {
        self.each(|brick| brick.heartbeat_answered(sent, reply));
    }

    /// What a brick knows of repair.
    #[must_use]
    pub fn heal(&self, brick: BrickId) -> Option<cluster::BrickHealReply> {
        self.bricks.read().get(&brick).map(|b| b.heal())
    }

    /// Serves a connection of the data plane, in threads of its own.
    pub fn serve_data(self: &Arc<Self>, socket: TcpStream, from: SocketAddr) {
        let keeper = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("data".into()).spawn(move || {
            if let Err(e) = serve::connection(&keeper, &socket, from) {
                tracing::info!(%from, "connection closed: {e:#}");
            }
            let _ = socket.shutdown(std::net::Shutdown::Both);
        });
        if let Err(e) = spawned {
            tracing::error!(%from, "no thread for a connection: {e}");
        }
    }

    fn brick(&self, id: BrickId) -> Option<Arc<Brick>> {
        self.bricks.read().get(&id).cloned()
    }

    /// Stops cleanly `[E5]`: asks to be put out, drains, flushes, records it. Bounded in time.
    pub fn stop(&self) {
        self.each(Brick::ask_to_stop);
        let until = Instant::now() + Duration::from_secs(4);
        while Instant::now() < until && self.bricks.read().values().any(|b| b.still_wanted()) {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.each(Brick::stop);
    }
}

/// Where a brick's files are: for checks before it is one.
#[must_use]
pub fn is_brick(path: &Path) -> Option<String> {
    crate::store::volume_of_brick(path).ok().flatten()
}
