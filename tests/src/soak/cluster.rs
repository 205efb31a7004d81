//! Three servers, two clients with a mount each, one volume. Whatever happens, all of it is taken down in the end: by drop, or,
//! when the run was killed, by the next run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;

use super::disk::Disk;
use super::network::{ADMINISTRATOR, Host, Network};
use super::pauses::Timeline;
use super::process::{Process, kill_marked};
use super::throttle::Throttle;
use super::until;
use crate::harness::{VOLUME, program, run};

/// How many servers there are; each has one brick.
pub const SERVERS: usize = 3;
/// How many mounts there are.
pub const CLIENTS: usize = 2;

const PREFIX: &str = "mortar-soak-";
/// How long a start may take on a machine that does other things too.
const START: Duration = Duration::from_secs(60);
/// A clean stop drains, hands over and flushes.
const STOP: Duration = Duration::from_secs(30);

/// Where a mount is, and whether it is being killed.
#[derive(Debug, Default)]
pub struct Life {
    number: AtomicU64,
    is_dead: AtomicBool,
}

impl Life {
    /// Which mount process it is, by count; what an operation was asked of is known by it.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number.load(Ordering::SeqCst)
    }

    /// It was killed and is not mounted again.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.is_dead.load(Ordering::SeqCst)
    }
}

/// A host with a mount.
#[derive(Debug)]
pub struct Client {
    /// The mounted volume.
    pub mount: PathBuf,
    /// Whether it lives.
    pub life: Arc<Life>,
    process: Option<Process>,
}

/// All of it.
#[derive(Debug)]
pub struct Cluster {
    /// Where everything of this run is.
    pub dir: PathBuf,
    id: String,
    /// What is cut is decided here.
    pub network: Network,
    /// The servers' disks, from 0.
    pub disks: Vec<Disk>,
    /// The servers' groups, from 0; empty when this kernel cannot throttle.
    pub throttles: Vec<Throttle>,
    /// The mounts.
    pub clients: Vec<Client>,
    daemons: Vec<Option<Process>>,
    /// Their disks had something: their bricks may have declared themselves failed, and wait for somebody to look.
    suspects: [bool; SERVERS],
    timeline: Arc<Timeline>,
}

fn id_of(pid: u32) -> String {
    format!("mtr{pid}")
}

fn dir_of(pid: u32) -> PathBuf {
    PathBuf::from(format!("/var/tmp/{PREFIX}{pid}"))
}

/// Takes down what killed runs have left.
pub fn sweep() {
    for entry in std::fs::read_dir("/var/tmp").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|rest| rest.parse::<u32>().ok());
        if let Some(pid) = pid.filter(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            println!("taking down what a killed run has left in {}", entry.path().display());
            take_down(&entry.path(), &id_of(pid));
        }
    }
}

fn take_down(dir: &Path, id: &str) {
    let disks: Vec<Disk> = (1..=SERVERS).map(|number| Disk::at(dir, number)).collect();
    for number in 1..=SERVERS {
        // A frozen disk would keep its daemon from dying.
        let _ = Command::new("fsfreeze").arg("-u").arg(dir.join(format!("disk{number}"))).output();
    }
    kill_marked(dir);
    for number in 1..=CLIENTS {
        detach(&dir.join(format!("mount{number}")));
    }
    disks.iter().for_each(Disk::take_down);
    Network::remove(id);
    Throttle::remove(id);
    let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if mounted.contains(&format!(" {}/", dir.display())) {
        println!("{} stays: something is still mounted in it", dir.display());
    } else if let Err(e) = std::fs::remove_dir_all(dir) {
        println!("{} stays: {e}", dir.display());
    }
}

fn detach(mount: &Path) {
    while unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

impl Cluster {
    /// Starts everything.
    ///
    /// # Errors
    /// When something does not start.
    pub fn up(timeline: Arc<Timeline>) -> Result<Self> {
        let (id, dir) = (id_of(std::process::id()), dir_of(std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let network = match Network::up(&id) {
            Ok(network) => network,
            Err(e) => {
                take_down(&dir, &id);
                return Err(e);
            }
        };
        // From here on a failure cleans up, by drop.
        let mut cluster = Self {
            dir,
            id,
            network,
            disks: Vec::new(),
            throttles: Vec::new(),
            clients: Vec::new(),
            daemons: Vec::new(),
            suspects: [false; SERVERS],
            timeline,
        };
        for server in 0..SERVERS {
            cluster.disks.push(Disk::make(&cluster.dir, server + 1)?);
            cluster.throttles.extend(Throttle::make(&cluster.id, server + 1));
            cluster.daemons.push(None);
            cluster.start(server)?;
        }
        if cluster.throttles.len() < SERVERS {
            println!("this kernel can throttle no disk: none will be slow");
            cluster.throttles.clear();
        }
        cluster.make_volume()?;
        for client in 0..CLIENTS {
            let mount = cluster.dir.join(format!("mount{}", client + 1));
            std::fs::create_dir(&mount)?;
            cluster.clients.push(Client { mount, life: Arc::default(), process: None });
            cluster.mount(client)?;
        }
        Ok(cluster)
    }

    fn make_volume(&self) -> Result<()> {
        let address = |server: usize| Network::address(server + 1);
        until("the first server answers", START, &mut super::go_on, || {
            self.ask(&address(0), "server list").is_ok_and(|list| list.to_string().contains("leader"))
        })?;
        self.ask(&address(0), &format!("server add {} {}", address(1), address(2)))?;
        let bricks: Vec<String> = (0..SERVERS)
            .map(|server| format!("{}:{}", address(server), self.disks[server].brick().display()))
            .collect();
        self.mortar(&format!("volume create {VOLUME} replica 3 {}", bricks.join(" ")))?;
        self.mortar(&format!("volume set {VOLUME} scrub.rate 0"))?;
        self.mortar(&format!("volume start {VOLUME}"))?;
        Ok(())
    }

    /// All servers, as `mortar` and `mortar-mount` want them.
    #[must_use]
    pub fn servers() -> String {
        (1..=SERVERS).map(Network::address).collect::<Vec<_>>().join(",")
    }

    /// `mortar …`, on the administrator's host.
    ///
    /// # Errors
    /// When it fails, or takes too long.
    pub fn mortar(&self, line: &str) -> Result<Value> {
        self.ask(&Self::servers(), line)
    }

    fn ask(&self, servers: &str, line: &str) -> Result<Value> {
        let mut command = self.network.on(ADMINISTRATOR, Path::new("timeout"));
        command.arg("30").arg(program("mortar")).args(["--json", "--server", servers]).args(line.split_whitespace());
        let out = run(&mut command)?;
        if out.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&out).with_context(|| format!("{line}: no JSON: {out}"))
    }

    /// Where a server's daemon logs.
    #[must_use]
    pub fn server_log(&self, server: usize) -> PathBuf {
        self.dir.join(format!("server{}.log", server + 1))
    }

    /// Where a mount logs.
    #[must_use]
    pub fn mount_log(&self, client: usize) -> PathBuf {
        self.dir.join(format!("mount{}.log", client + 1))
    }

    /// The host of a client.
    #[must_use]
    pub fn client_host(client: usize) -> Host {
        SERVERS + 1 + client
    }

    // -- servers ----------------------------------------------------------------------------------------------------

    /// Starts a server's daemon.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, server: usize) -> Result<()> {
        let mut command = self.network.on(server + 1, &program("mortar-brickd"));
        command.arg("--state-dir").arg(self.dir.join(format!("state{}", server + 1)));
        command.args(["--listen", &format!("{}:7440", Network::address(server + 1))]);
        let name = format!("the daemon of server {}", server + 1);
        let daemon = Process::start(command, &name, &self.dir, &self.server_log(server))?;
        if let Some(throttle) = self.throttles.get(server) {
            throttle.take(daemon.pid())?;
        }
        self.daemons[server] = Some(daemon);
        Ok(())
    }

    /// The daemon of a server that is up.
    ///
    /// # Errors
    /// When it is not, or has ended by itself.
    pub fn daemon(&mut self, server: usize) -> Result<&mut Process> {
        let daemon = self.daemons[server].as_mut().with_context(|| format!("server {} is down", server + 1))?;
        if let Some(status) = daemon.ended() {
            anyhow::bail!("the daemon of server {} has ended by itself, with {status}", server + 1);
        }
        Ok(daemon)
    }

    /// Every daemon and mount that should run does.
    ///
    /// # Errors
    /// Names the one that has ended.
    pub fn all_run(&mut self) -> Result<()> {
        for server in 0..SERVERS {
            if self.daemons[server].is_some() {
                self.daemon(server)?;
            }
        }
        for (number, client) in self.clients.iter_mut().enumerate() {
            if let Some(status) = client.process.as_mut().and_then(Process::ended) {
                anyhow::bail!("mount {} has ended by itself, with {status}", number + 1);
            }
        }
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill(&mut self, server: usize) -> Result<()> {
        self.daemon(server)?.kill()?;
        self.daemons[server] = None;
        Ok(())
    }

    /// SIGTERM, and the end.
    ///
    /// # Errors
    /// When it does not end cleanly in time.
    pub fn terminate(&mut self, server: usize) -> Result<()> {
        self.daemon(server)?.terminate(STOP)?;
        self.daemons[server] = None;
        Ok(())
    }

    /// The server, from 0, that leads.
    ///
    /// # Errors
    /// When none does.
    pub fn leader(&self) -> Result<usize> {
        let list = self.mortar("server list")?;
        let servers = list["servers"].as_array().context("no servers")?;
        let leader = servers.iter().find(|s| s["role"] == "leader").context("no server leads")?;
        let address = leader["address"].as_str().unwrap_or_default();
        let found = (0..SERVERS).find(|server| {
            address
                .strip_prefix(&Network::address(server + 1))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
        });
        found.with_context(|| format!("{address} leads, which is none of ours"))
    }

    // -- clients ----------------------------------------------------------------------------------------------------

    /// Mounts the volume for a client.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn mount(&mut self, client: usize) -> Result<()> {
        let path = self.clients[client].mount.clone();
        let source = format!("{}:/{VOLUME}", Self::servers());
        let mut tries = 0;
        loop {
            let mut command = self.network.on(Self::client_host(client), &program("mortar-mount"));
            command.arg(&source).arg(&path).arg("-f");
            let mut process =
                Process::start(command, &format!("mount {}", client + 1), &self.dir, &self.mount_log(client))?;
            let mounted = until("the volume is mounted", START, &mut super::go_on, || {
                process.ended().is_some() || is_mounted(&path)
            });
            mounted?;
            if process.ended().is_none() {
                self.clients[client].process = Some(process);
                self.clients[client].life.is_dead.store(false, Ordering::SeqCst);
                return Ok(());
            }
            // While nobody leads, a mount may be refused; a person would try again too.
            tries += 1;
            ensure!(tries < 10, "mount {} does not come up; see its log", client + 1);
            std::thread::sleep(Duration::from_secs(2));
        }
    }

    /// The client's mount process.
    ///
    /// # Errors
    /// When it is not mounted.
    pub fn mount_process(&mut self, client: usize) -> Result<&mut Process> {
        self.clients[client].process.as_mut().with_context(|| format!("client {} has no mount", client + 1))
    }

    /// SIGKILL to a client; its mount is gone, as after a crash of the machine.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill_client(&mut self, client: usize) -> Result<()> {
        let life = Arc::clone(&self.clients[client].life);
        life.is_dead.store(true, Ordering::SeqCst);
        life.number.fetch_add(1, Ordering::SeqCst);
        self.mount_process(client)?.kill()?;
        self.clients[client].process = None;
        detach(&self.clients[client].mount);
        Ok(())
    }

    /// Unmounts a client that nobody uses.
    ///
    /// # Errors
    /// When it stays mounted, or its process does not end well.
    pub fn unmount(&mut self, client: usize) -> Result<()> {
        let Some(mut process) = self.clients[client].process.take() else { return Ok(()) };
        run(Command::new("umount").arg(&self.clients[client].mount))?;
        let status = process.wait(STOP)?;
        ensure!(status.success(), "mount {} ended with {status}", client + 1);
        Ok(())
    }

    // -- the volume -------------------------------------------------------------------------------------------------

    /// All bricks are in sync and nothing is to be healed.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.mortar(&format!("volume heal {VOLUME} info")).is_ok_and(|info| info["nothing_to_heal"] == true)
    }

    /// Waits until it is so.
    ///
    /// # Errors
    /// What is still missing after `limit`.
    pub fn wait_until_whole(&mut self, limit: Duration, sound: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.all_run()?;
        let took = until("all bricks are in sync and nothing is to be healed", limit, sound, || {
            let is_whole = self.is_whole();
            if !is_whole {
                self.nurse();
            }
            is_whole
        });
        took.with_context(|| {
            let told = |line: &str| match self.mortar(line) {
                Ok(value) => value.to_string(),
                Err(e) => format!("{e:#}"),
            };
            format!("{}\n{}", told(&format!("volume heal {VOLUME} info")), told("server list"))
        })
    }

    /// Has all bricks read all they have, and waits for the end of that.
    ///
    /// # Errors
    /// When it does not end, or bricks differ and none of them is known to be right.
    pub fn scrub(&self, limit: Duration, sound: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let look = || -> Vec<Value> {
            let status = self.mortar(&format!("volume scrub {VOLUME} status")).unwrap_or_default();
            status["bricks"].as_array().cloned().unwrap_or_default()
        };
        let before = look();
        self.mortar(&format!("volume scrub {VOLUME} start"))?;
        let mut bricks = Vec::new();
        until("the bricks are scrubbed", limit, sound, || {
            bricks = look();
            let is_new = |(at, brick): (usize, &Value)| {
                let last = &brick["last_finished"];
                brick["state"] == "idle" && last.is_u64() && before.get(at).is_none_or(|b| b["last_finished"] != *last)
            };
            bricks.len() == SERVERS && bricks.iter().enumerate().all(is_new)
        })
        .with_context(|| format!("{bricks:?}"))?;
        ensure!(bricks.iter().all(|b| b["undecided"] == 0), "nobody knows which brick is right: {bricks:?}");
        let found: u64 = bricks.iter().filter_map(|b| b["found"].as_u64()).sum();
        println!("[{:7.1} s]   scrubbed: {found} wrong blocks found", self.timeline.now());
        Ok(())
    }

    /// Has an empty brick take the place of a server's, in another directory or in the same one.
    ///
    /// # Errors
    /// What it was refused for until the end.
    pub fn exchange_brick(
        &self,
        server: usize,
        new: Option<&Path>,
        sound: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let at = |path: &Path| format!("{}:{}", Network::address(server + 1), path.display());
        let old = self.disks[server].brick();
        let line = match new {
            Some(new) => format!("volume replace-brick {VOLUME} {} {} --yes", at(&old), at(new)),
            None => format!("volume reset-brick {VOLUME} {} --yes", at(&old)),
        };
        let path = new.unwrap_or(&old).display().to_string();
        let mut refused = String::new();
        let replaced = until("the brick is replaced", START, sound, || match self.mortar(&line) {
            Ok(_) => true,
            Err(e) => {
                refused = format!("{e:#}");
                // It may have been done by the one who could not tell it any more.
                self.is_compared(&path)
            }
        });
        replaced.with_context(|| refused).map(|_| ())
    }

    /// The brick in this directory has to get back all there is.
    fn is_compared(&self, path: &str) -> bool {
        let info = self.mortar(&format!("volume heal {VOLUME} info")).unwrap_or_default();
        let bricks = info["bricks"].as_array().cloned().unwrap_or_default();
        bricks.iter().any(|brick| brick["path"] == path && brick["compare"] == true)
    }

    /// Has all bricks compared with each other.
    ///
    /// # Errors
    /// When nobody takes that on.
    pub fn compare_all(&self, sound: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        until("all bricks are going to be compared", START, sound, || {
            self.mortar(&format!("volume heal {VOLUME} full")).is_ok()
        })
        .map(|_| ())
    }

    /// What was wrong with the disk of this server is mended.
    pub fn suspect(&mut self, server: usize) {
        self.suspects[server] = true;
    }

    /// Does what an administrator is told to do with a brick that has declared itself failed, once its disk is mended.
    fn nurse(&mut self) {
        if self.suspects == [false; SERVERS] {
            return;
        }
        let Ok(status) = self.mortar(&format!("volume status {VOLUME}")) else { return };
        for server in 0..SERVERS {
            let path = self.disks[server].brick();
            let failed = failure_in(&status, &path.display().to_string());
            if let Some(why) = failed.filter(|_| self.suspects[server]) {
                println!("[{:7.1} s]   server {}: {why}; starting it again", self.timeline.now(), server + 1);
                self.suspects[server] = false;
                if let Err(e) = self.kill(server).and_then(|()| self.start(server)) {
                    println!("{e:#}");
                }
            }
        }
    }

    /// Keeps the logs of a failed run, and says where; with `MORTAR_SOAK_KEEP` set, the disks too.
    pub fn keep_logs(&self) {
        let kept = self.dir.with_file_name(format!("mortar-soak-failed-{}", std::process::id()));
        let _ = std::fs::create_dir_all(&kept);
        let all = std::env::var_os("MORTAR_SOAK_KEEP").is_some();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            if matches!(extension, "log" | "repair") || (all && extension == "img") {
                let _ = run(Command::new("cp").arg("--sparse=always").arg(&path).arg(&kept));
            }
        }
        println!("[{:7.1} s] the logs of this failed run are in {}", self.timeline.now(), kept.display());
    }
}

/// Why the brick at this path has failed, if it has, by `volume status`.
fn failure_in(status: &Value, path: &str) -> Option<String> {
    match status {
        Value::Object(fields) if fields.get("path").and_then(Value::as_str) == Some(path) => {
            fields.get("failed").and_then(Value::as_str).map(str::to_owned)
        }
        Value::Object(fields) => fields.values().find_map(|value| failure_in(value, path)),
        Value::Array(values) => values.iter().find_map(|value| failure_in(value, path)),
        _ => None,
    }
}

fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let point = format!(" {} ", path.display());
    mounts.lines().any(|line| line.contains(&point) && line.contains("fuse.mortar"))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for disk in &mut self.disks {
            let _ = disk.thaw();
        }
        for client in &mut self.clients {
            client.process = None;
        }
        self.daemons.clear();
        take_down(&self.dir, &self.id);
    }
}
