//! A whole Mortar for a test: real daemons on real XFS, made and ended by `mortar playground`, in a directory of its own.
//!
//! A test is a closure that [`with_world`] runs: it ends every process that was started and leaves nothing behind; what the
//! daemons logged is printed when the closure fails. What a killed test run left behind is removed by the next one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// How much of each log a failure shows.
const LOG_LINES: usize = 60;

/// The volume that a playground has.
pub const VOLUME: &str = "vmstore";

/// What this machine lacks for tests with daemons and mounts, if anything. Says so on standard output; with `MORTAR_CI` set
/// that counts as a failure.
#[must_use]
pub fn missing() -> Option<String> {
    let on_path =
        |name: &str| Command::new(name).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    let lacks = if !rustix::process::geteuid().is_root() {
        "root"
    } else if !Path::new("/dev/fuse").exists() {
        "/dev/fuse"
    } else if !on_path("mkfs.xfs") {
        "mkfs.xfs"
    } else if !Path::new("/dev/loop-control").exists() {
        "loop devices"
    } else if !program("mortar-brickd").exists() || !program("mortar-mount").exists() {
        "the programs (cargo build --workspace --bins)"
    } else {
        return None;
    };
    println!("SKIPPED: this machine lacks {lacks}");
    assert!(std::env::var_os("MORTAR_CI").is_none(), "the gate needs {lacks}");
    Some(lacks.to_owned())
}

/// Where a program of the workspace was built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().unwrap_or_default();
    // target/debug/deps/test-... -> target/debug/name
    path.pop();
    path.pop();
    path.join(name)
}

/// Runs a command to its end; an error, with what it said, unless it succeeds.
///
/// # Errors
/// When it cannot be started, or fails.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    said(command, &output)
}

fn said(command: &Command, output: &Output) -> Result<String> {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?} ended with {}\n{out}{err}", output.status);
    Ok(out.into_owned())
}

/// Runs a line of shell.
///
/// # Errors
/// When it fails.
pub fn sh(line: &str) -> Result<String> {
    run(Command::new("bash").args(["-o", "pipefail", "-ec", line]))
}

/// Asks until it is so.
///
/// # Errors
/// When it is not within `limit`; names `what` and the last error.
pub fn eventually(what: &str, limit: Duration, mut is_so: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let began = Instant::now();
    let mut last = None;
    while began.elapsed() < limit {
        match is_so() {
            Ok(true) => return Ok(began.elapsed()),
            Ok(false) => last = None,
            Err(e) => last = Some(e),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    match last {
        Some(e) => Err(e.context(format!("not within {} s: {what}", limit.as_secs()))),
        None => bail!("not within {} s: {what}", limit.as_secs()),
    }
}

/// Runs `story` in a world of its own, unless the machine lacks what that takes.
///
/// # Errors
/// What the story failed with; what the daemons logged is printed then.
pub fn with_world(name: &str, story: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    if missing().is_some() {
        return Ok(());
    }
    sweep();
    let mut world = World::new(name)?;
    let result = story(&mut world);
    world.failed = result.is_err();
    result
}

/// The same, with a mount.
///
/// # Errors
/// As [`with_world`].
pub fn with_mount(name: &str, story: impl FnOnce(&mut World, &Path) -> Result<()>) -> Result<()> {
    with_world(name, |world| {
        let mount = world.mount("m1")?;
        story(world, &mount)
    })
}

/// Worlds lie in `/var/tmp/mortar-test-NAME-PID`.
const PREFIX: &str = "mortar-test-";

/// Takes down worlds whose test run is dead, a killed one for instance.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/var/tmp") else { return };
    for dir in entries.flatten().map(|entry| entry.path()) {
        let name = dir.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.rsplit('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            println!("taking down what a dead test run left in {}", dir.display());
            World { dir, mounts: Vec::new(), servers: String::new(), failed: false }.take_down();
        }
    }
}

/// Three daemons, a volume, and perhaps mounts.
#[derive(Debug)]
pub struct World {
    dir: PathBuf,
    mounts: Vec<PathBuf>,
    servers: String,
    failed: bool,
}

impl World {
    /// Three servers with a brick each on an XFS of its own, and the volume started.
    fn new(name: &str) -> Result<Self> {
        let dir = PathBuf::from(format!("/var/tmp/{PREFIX}{name}-{}", std::process::id()));
        // From here on a failure cleans up, by drop.
        let mut world = Self { dir, mounts: Vec::new(), servers: String::new(), failed: false };
        world.playground(&["up", "--xfs", "--brick-size", "4G"])?;
        world.servers = world.status()?["mortar_servers"].as_str().context("no addresses")?.to_owned();
        Ok(world)
    }

    /// A further mount, named.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn mount(&mut self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        std::fs::create_dir_all(&path)?;
        let log = self.dir.join(format!("{name}.log"));
        let err = std::fs::File::create(&log)?;
        let source = format!("{}:/{VOLUME}", self.servers);
        let mut command = Command::new(program("mortar-mount"));
        command.arg(source).arg(&path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(err);
        let status = command.status()?;
        ensure!(status.success(), "mount: {status}\n{}", std::fs::read_to_string(&log).unwrap_or_default());
        self.mounts.push(path.clone());
        Ok(path)
    }

    /// Unmounts.
    ///
    /// # Errors
    /// When it cannot be unmounted.
    pub fn unmount(&mut self, path: &Path) -> Result<()> {
        run(Command::new("umount").arg(path))?;
        self.mounts.retain(|m| m != path);
        Ok(())
    }

    /// `mortar playground …` of this world.
    ///
    /// # Errors
    /// When it fails.
    pub fn playground(&self, args: &[&str]) -> Result<String> {
        run(Command::new(program("mortar")).arg("--json").arg("playground").args(args).arg("--dir").arg(&self.dir))
    }

    /// What `mortar playground status` says.
    ///
    /// # Errors
    /// When it fails.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.playground(&["status"])?)?)
    }

    /// `mortar …` with `--json`.
    ///
    /// # Errors
    /// When it fails.
    pub fn mortar(&self, line: &str) -> Result<Value> {
        let mut command = Command::new(program("mortar"));
        command.args(["--json", "--server", &self.servers]).args(line.split_whitespace());
        let out = run(&mut command)?;
        if out.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&out).with_context(|| format!("{line}: no JSON: {out}"))
    }

    /// The servers' addresses, separated by commas.
    #[must_use]
    pub fn servers(&self) -> &str {
        &self.servers
    }

    /// The states of the three bricks.
    ///
    /// # Errors
    /// When no server answers.
    pub fn states(&self) -> Result<Vec<String>> {
        let info = self.mortar(&format!("volume heal {VOLUME} info"))?;
        let bricks = info["bricks"].as_array().context("heal info has no bricks")?;
        Ok(bricks.iter().filter_map(|b| b["state"].as_str()).map(str::to_owned).collect())
    }

    /// Waits until all bricks are in sync and nothing is missed.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub fn healed(&self, limit: Duration) -> Result<Duration> {
        eventually("all bricks are in sync", limit, || {
            let info = self.mortar(&format!("volume heal {VOLUME} info"))?;
            let bricks = info["bricks"].as_array().context("heal info has no bricks")?;
            Ok(bricks.len() == 3 && bricks.iter().all(|b| b["state"] == "in-sync" && b["missed_regions"] == 0))
        })
    }

    /// A brick's directory, 1 to 3.
    #[must_use]
    pub fn brick(&self, number: usize) -> PathBuf {
        self.dir.join(format!("brick{number}")).join("data")
    }

    /// All three bricks hold the same files, byte by byte, readable with nothing but XFS.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn bricks_are_equal(&self) -> Result<()> {
        for other in [2, 3] {
            sh(&format!(
                "diff -r --no-dereference --exclude=.mortar {} {}",
                self.brick(1).display(),
                self.brick(other).display()
            ))?;
        }
        Ok(())
    }

    /// The number, 1 to 3, of the server that leads.
    ///
    /// # Errors
    /// When none does.
    pub fn leader(&self) -> Result<usize> {
        let list = self.mortar("server list")?;
        let servers = list["servers"].as_array().context("no servers")?;
        let leader = servers.iter().find(|s| s["role"] == "leader").context("no leader")?;
        let status = self.status()?;
        let of = status["servers"].as_array().context("no servers")?;
        let found =
            of.iter().find(|s| s["address"] == leader["address"]).context("the leader is not of the playground")?;
        Ok(found["number"].as_u64().context("no number")? as usize)
    }
}

impl World {
    /// The ends of all logs, without what openraft says of every lost connection.
    fn print_logs(&self) {
        let mut logs: Vec<PathBuf> = ["server1/log", "server2/log", "server3/log"].map(|l| self.dir.join(l)).into();
        logs.extend(self.mounts.iter().map(|m| m.with_extension("log")));
        for log in logs {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().filter(|l| !l.contains("openraft")).collect();
            println!("---- {}\n{}", log.display(), lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"));
        }
    }

    /// Unmounts, ends all daemons, removes the directory. What stays, because something is still mounted there, is named.
    fn take_down(&mut self) {
        let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounted.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
        // Mounts of the volume lie in the directory itself; bricks' file systems are the playground's to unmount.
        for mount in points.filter(|p| p.parent() == Some(&self.dir) && !self.is_brick(p)) {
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
        let down = self.playground(&["down"]);
        let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let inside = format!(" {}/", self.dir.display());
        if mounted.contains(&inside) {
            println!("{} stays: something is still mounted in it ({down:?})", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }

    fn is_brick(&self, point: &Path) -> bool {
        point.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("brick"))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.failed || std::thread::panicking() {
            self.print_logs();
        }
        self.take_down();
    }
}
