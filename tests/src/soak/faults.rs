//! What goes wrong: which, where and for how long follows from the seed alone. Each fault is undone by whoever struck it.

use std::fmt;
use std::os::unix::fs::FileExt as _;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::Signal;

use super::cluster::{CLIENTS, Cluster, SERVERS};
use super::workers::Field;
use super::{WHOLE, sleep};
use crate::sim::rng::Rng;

/// Every kind of fault, by the name that it is printed under.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A daemon is killed with SIGKILL and started again.
    Kill,
    /// The same, to the one that leads.
    KillLeader,
    /// SIGTERM, and a start.
    Restart,
    /// SIGSTOP, SIGCONT: a machine that hangs.
    Stop,
    /// No frame goes to or from a server.
    CutOff,
    /// What a server sends is lost, or what is sent to it.
    CutOneWay,
    /// Two servers do not see each other.
    CutServers,
    /// A client and a server do not see each other.
    CutClient,
    /// The disk fails, and what was not flushed is lost on it.
    ShutDown,
    /// Every write to the disk hangs.
    Freeze,
    /// No room is left.
    Full,
    /// The server comes back with a disk that can only be read.
    ReadOnly,
    /// A few operations a second.
    SlowDisk,
    /// A byte of an object changes on the disk.
    FlipByte,
    /// An object is gone when the daemon starts.
    DeleteObject,
    /// A client dies and mounts again.
    KillClient,
    /// A client hangs, shorter than its session lasts.
    StopClient,
    /// All daemons are killed at once.
    KillAll,
    /// Two of three are killed; one returns, then the other.
    KillTwo,
    /// The administrator gives a brick another directory.
    ReplaceBrick,
    /// The disk dies; the daemon finds an empty one, and the administrator resets the brick.
    ExchangeDisk,
    /// The administrator has all bricks compared.
    CompareAll,
}

const NAMES: &[(Kind, &str)] = &[
    (Kind::Kill, "brick killed"),
    (Kind::KillLeader, "leader killed"),
    (Kind::Restart, "clean restart"),
    (Kind::Stop, "server hangs"),
    (Kind::CutOff, "server cut off"),
    (Kind::CutOneWay, "server cut off one way"),
    (Kind::CutServers, "two servers cut"),
    (Kind::CutClient, "client and server cut"),
    (Kind::ShutDown, "disk fails"),
    (Kind::Freeze, "disk hangs"),
    (Kind::Full, "disk full"),
    (Kind::ReadOnly, "disk read-only"),
    (Kind::SlowDisk, "disk slow"),
    (Kind::FlipByte, "byte flipped"),
    (Kind::DeleteObject, "object deleted"),
    (Kind::KillClient, "client killed"),
    (Kind::StopClient, "client hangs"),
    (Kind::KillAll, "all killed"),
    (Kind::KillTwo, "two killed, one returns"),
    (Kind::ReplaceBrick, "brick replaced"),
    (Kind::ExchangeDisk, "disk exchanged"),
    (Kind::CompareAll, "all compared"),
];

/// Those of a run that names none.
const USUAL: &[Kind] = &[
    Kind::Kill,
    Kind::KillLeader,
    Kind::Restart,
    Kind::Stop,
    Kind::CutOff,
    Kind::CutOneWay,
    Kind::CutServers,
    Kind::CutClient,
    Kind::ShutDown,
    Kind::Freeze,
    Kind::Full,
    Kind::ReadOnly,
    Kind::SlowDisk,
    Kind::FlipByte,
    Kind::DeleteObject,
    Kind::KillClient,
    Kind::StopClient,
    Kind::KillAll,
    Kind::KillTwo,
    Kind::ReplaceBrick,
    Kind::ExchangeDisk,
    Kind::CompareAll,
];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(kind, _)| kind == self).map_or("?", |(_, name)| name);
        f.pad(name)
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(_, name)| *name == text).map(|(kind, _)| *kind);
        found.ok_or_else(|| {
            let names: Vec<&str> = NAMES.iter().map(|(_, name)| *name).collect();
            format!("{text:?} is no fault; there are: {}", names.join("; "))
        })
    }
}

impl Kind {
    /// It takes unflushed data, or a copy, of one brick: the others must have theirs then.
    fn needs_whole(self) -> bool {
        matches!(self, Self::ShutDown | Self::FlipByte | Self::DeleteObject | Self::ReplaceBrick | Self::ExchangeDisk)
    }
}

/// One fault, drawn.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// All bricks must be whole before it comes.
    pub needs_whole: bool,
    server: usize,
    other: usize,
    client: usize,
    flag: bool,
    number: u64,
    hold: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (server, other, client) = (self.server + 1, self.other + 1, self.client + 1);
        write!(f, "{}", self.kind)?;
        match self.kind {
            Kind::KillLeader | Kind::KillAll => {}
            Kind::CutServers | Kind::KillTwo => write!(f, ", servers {server} and {other}")?,
            Kind::CutClient => write!(f, ", client {client} and server {server}")?,
            Kind::CutOneWay if self.flag => write!(f, ", what server {server} sends")?,
            Kind::CutOneWay => write!(f, ", what is sent to server {server}")?,
            Kind::KillClient | Kind::StopClient => write!(f, ", client {client}")?,
            Kind::CompareAll if self.flag => write!(f, ", server {other} killed meanwhile")?,
            Kind::CompareAll => {}
            Kind::ReplaceBrick | Kind::ExchangeDisk if self.flag => {
                write!(f, ", server {server}, server {other} killed meanwhile")?;
            }
            _ => write!(f, ", server {server}")?,
        }
        write!(f, ", {:.1} s", self.hold.as_secs_f64())
    }
}

/// Kinds in an order of chance, each once before any comes again.
#[derive(Debug)]
pub struct Deck {
    kinds: Vec<Kind>,
    left: Vec<Kind>,
}

impl Deck {
    /// Of these kinds, or of all usual ones.
    #[must_use]
    pub fn new(only: &[Kind]) -> Self {
        Self { kinds: if only.is_empty() { USUAL } else { only }.to_vec(), left: Vec::new() }
    }

    /// The next.
    pub fn draw(&mut self, rng: &mut Rng) -> Fault {
        if self.left.is_empty() {
            self.left.clone_from(&self.kinds);
        }
        let kind = self.left.swap_remove(rng.index(self.left.len()));
        let server = rng.index(SERVERS);
        let longest_ms = match kind {
            // Its session must not lapse, or what it wrote meanwhile may be refused rightly.
            Kind::StopClient => 6_000,
            Kind::KillLeader | Kind::Kill | Kind::Restart | Kind::KillTwo | Kind::KillAll | Kind::KillClient => 8_000,
            _ => 12_000,
        };
        Fault {
            kind,
            needs_whole: kind.needs_whole(),
            server,
            other: (server + 1 + rng.index(SERVERS - 1)) % SERVERS,
            client: rng.index(CLIENTS),
            flag: rng.chance(500),
            number: rng.draw(),
            hold: Duration::from_millis(rng.between(200, longest_ms)),
        }
    }
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct Struck {
    /// When one of several servers was back, in seconds since the run began.
    pub partly: Option<f64>,
    /// The client that it concerns.
    pub spared: Option<usize>,
}

impl Fault {
    /// Breaks something, waits, and undoes it.
    ///
    /// # Errors
    /// When it cannot be struck or undone, or when something that must not has gone wrong meanwhile.
    pub fn strike(&self, cluster: &mut Cluster, field: &Field) -> Result<Struck> {
        match self.kind {
            Kind::CutOff | Kind::CutOneWay | Kind::CutServers | Kind::CutClient => self.cut(cluster, field)?,
            Kind::ShutDown | Kind::Freeze | Kind::Full | Kind::ReadOnly | Kind::SlowDisk => {
                self.spoil_disk(cluster, field)?;
                // The others have ended with a start of the daemon.
                if matches!(self.kind, Kind::Freeze | Kind::Full | Kind::SlowDisk) {
                    cluster.suspect(self.server);
                }
            }
            Kind::FlipByte | Kind::DeleteObject => self.damage(cluster, field)?,
            Kind::KillClient | Kind::StopClient => {
                self.strike_client(cluster, field)?;
                return Ok(Struck { spared: Some(self.client), partly: None });
            }
            Kind::KillAll | Kind::KillTwo => return self.kill_several(cluster, field),
            Kind::ReplaceBrick | Kind::ExchangeDisk | Kind::CompareAll => self.administer(cluster, field)?,
            Kind::Kill | Kind::KillLeader => {
                // When nobody leads, any server will do.
                let leads = if self.kind == Kind::KillLeader { cluster.leader().ok() } else { None };
                let server = leads.unwrap_or(self.server);
                cluster.kill(server)?;
                sleep(self.hold, field)?;
                cluster.start(server)?;
            }
            Kind::Restart => {
                cluster.terminate(self.server)?;
                sleep(self.hold, field)?;
                cluster.start(self.server)?;
            }
            Kind::Stop => {
                cluster.daemon(self.server)?.signal(Signal::STOP);
                sleep(self.hold, field)?;
                cluster.daemon(self.server)?.signal(Signal::CONT);
            }
        }
        Ok(Struck::default())
    }

    fn cut(&self, cluster: &mut Cluster, field: &Field) -> Result<()> {
        let host = self.server + 1;
        let network = &mut cluster.network;
        let both_ways = match self.kind {
            Kind::CutServers => Some(self.other + 1),
            Kind::CutClient => Some(Cluster::client_host(self.client)),
            _ => None,
        };
        match both_ways {
            Some(other) => {
                network.cut(host, other)?;
                network.cut(other, host)?;
            }
            None if self.kind == Kind::CutOneWay => network.cut_off(host, self.flag, !self.flag)?,
            None => network.cut_off(host, true, true)?,
        }
        sleep(self.hold, field)?;
        cluster.network.mend()
    }

    fn spoil_disk(&self, cluster: &mut Cluster, field: &Field) -> Result<()> {
        let at = self.server;
        match self.kind {
            Kind::ShutDown => {
                cluster.disks[at].shut_down()?;
                sleep(self.hold, field)?;
                cluster.kill(at)?;
                cluster.disks[at].mount_again()?;
                cluster.start(at)
            }
            Kind::Freeze => {
                let dir = cluster.dir.clone();
                cluster.disks[at].freeze(&dir)?;
                sleep(self.hold, field)?;
                cluster.disks[at].thaw()
            }
            Kind::Full => {
                cluster.disks[at].fill()?;
                sleep(self.hold, field)?;
                cluster.disks[at].empty()
            }
            Kind::ReadOnly => {
                cluster.kill(at)?;
                cluster.disks[at].set_read_only(true)?;
                cluster.start(at)?;
                sleep(self.hold, field)?;
                cluster.kill(at)?;
                cluster.disks[at].set_read_only(false)?;
                cluster.start(at)
            }
            _ => {
                let device = cluster.disks[at].device_numbers()?;
                // A kernel that cannot throttle was told of at the start.
                let Some(throttle) = cluster.throttles.get(at) else { return Ok(()) };
                throttle.limit(&device, 2 + self.number % 40)?;
                sleep(self.hold, field)?;
                throttle.limit(&device, 0)
            }
        }
    }

    /// What nobody reads is found by a scrub. Until then this brick's copy counts for nothing, so nothing else may be struck.
    fn damage(&self, cluster: &mut Cluster, field: &Field) -> Result<()> {
        let brick = cluster.disks[self.server].brick();
        let path = brick.join(field.name(0));
        if self.kind == Kind::FlipByte {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(&path)?;
            let at = self.number % file.metadata()?.len();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at)?;
            file.write_all_at(&[byte[0] ^ 0x10], at)?;
        } else {
            cluster.kill(self.server)?;
            std::fs::remove_file(object_of(&brick, &path)?)?;
            std::fs::remove_file(&path)?;
            cluster.start(self.server)?;
        }
        sleep(self.hold, field)?;
        cluster.wait_until_whole(WHOLE, &mut || field.is_sound())?;
        cluster.scrub(WHOLE, &mut || field.is_sound())?;
        cluster.wait_until_whole(WHOLE, &mut || field.is_sound()).map(|_| ())
    }

    /// Other faults may come while the brick is being built, or the bricks are being compared.
    fn administer(&self, cluster: &mut Cluster, field: &Field) -> Result<()> {
        let at = self.server;
        let sound = &mut || field.is_sound();
        match self.kind {
            Kind::ReplaceBrick => {
                let new = cluster.disks[at].next_brick();
                cluster.exchange_brick(at, Some(&new), sound)?;
                cluster.disks[at].moved()?;
            }
            Kind::ExchangeDisk => {
                cluster.kill(at)?;
                cluster.disks[at].exchange()?;
                cluster.start(at)?;
                sleep(self.hold, field)?;
                cluster.exchange_brick(at, None, sound)?;
            }
            _ => cluster.compare_all(sound)?,
        }
        if self.flag {
            sleep(Duration::from_millis(self.number % 3000), field)?;
            cluster.kill(self.other)?;
            sleep(self.hold, field)?;
            cluster.start(self.other)?;
        }
        Ok(())
    }

    fn strike_client(&self, cluster: &mut Cluster, field: &Field) -> Result<()> {
        if self.kind == Kind::KillClient {
            cluster.kill_client(self.client)?;
            sleep(self.hold, field)?;
            return cluster.mount(self.client);
        }
        cluster.mount_process(self.client)?.signal(Signal::STOP);
        sleep(self.hold, field)?;
        cluster.mount_process(self.client)?.signal(Signal::CONT);
        Ok(())
    }

    fn kill_several(&self, cluster: &mut Cluster, field: &Field) -> Result<Struck> {
        let third = 3 - self.server - self.other;
        let mut order = vec![self.server, self.other];
        if self.kind == Kind::KillAll {
            order.push(third);
        }
        for server in &order {
            cluster.kill(*server)?;
        }
        sleep(self.hold, field)?;
        // Two have to be there before anything can go on.
        let enough = if self.kind == Kind::KillAll { 2 } else { 1 };
        let mut partly = None;
        for (returned, server) in order.iter().enumerate() {
            cluster.start(*server)?;
            if returned + 1 == enough {
                partly = Some(field.now());
            }
            if self.flag {
                sleep(Duration::from_millis(self.number % 6000), field)?;
            }
        }
        Ok(Struck { partly, spared: None })
    }
}

/// The object that is the same file as `path`.
fn object_of(brick: &std::path::Path, path: &std::path::Path) -> Result<std::path::PathBuf> {
    use std::os::unix::fs::MetadataExt as _;
    let ino = std::fs::metadata(path)?.ino();
    for shard in std::fs::read_dir(brick.join(".mortar/objects"))?.flatten() {
        for object in std::fs::read_dir(shard.path())?.flatten() {
            if object.metadata()?.ino() == ino {
                return Ok(object.path());
            }
        }
    }
    None.with_context(|| format!("{} is no object", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_faults_each_time_and_every_kind_before_one_comes_again() {
        let draw = |seed| {
            let (mut rng, mut deck) = (Rng::new(seed), Deck::new(&[]));
            (0..USUAL.len()).map(|_| deck.draw(&mut rng).to_string()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        for kind in USUAL {
            assert_eq!(draw(7).iter().filter(|f| f.starts_with(&format!("{kind},"))).count(), 1, "{kind}");
        }
    }

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        for (kind, name) in NAMES {
            assert_eq!(name.parse(), Ok(*kind));
        }
        assert!("x".parse::<Kind>().is_err());
    }
}
