//! `mortar playground` when things go wrong: refused with a sentence, and nothing left behind. The daemons here are shell
//! scripts that fail in the way a test needs; a playground that comes up is tested with the real ones.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use common::{Run, mortar};

/// A daemon that runs and never says where it listens.
const SILENT: &str = "while :; do sleep 0.2; done";

/// A program cannot be started while any process has it open for writing, and a child has all that its parent has open until
/// it starts its own program: so no test writes programs while another starts one.
static WRITING: RwLock<()> = RwLock::new(());

/// A folder with `mortar` and a `mortar-brickd` that is this script.
struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    fn new(brickd: Option<&str>) -> Self {
        let _writing = WRITING.write().unwrap_or_else(PoisonError::into_inner);
        let temp = tempfile::tempdir().unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_mortar"), temp.path().join("mortar")).unwrap();
        if let Some(script) = brickd {
            let path = temp.path().join("mortar-brickd");
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { temp }
    }

    /// The playground's directory.
    fn dir(&self) -> PathBuf {
        self.temp.path().join("play")
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(self.temp.path().join("mortar"));
        command.arg("playground").args(line.split_whitespace()).arg("--dir").arg(self.dir());
        command.stdin(Stdio::null()).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    fn run(&self, line: &str) -> Run {
        output(&mut self.command(line))
    }

    /// Runs `up` with daemons that never say where they listen, and kills it when it waits for them.
    fn half_up(&self, line: &str) {
        let starting = WRITING.read().unwrap_or_else(PoisonError::into_inner);
        let mut up = self.command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        drop(starting);
        let begun = Instant::now();
        while self.processes().len() < 4 {
            assert!(begun.elapsed() < Duration::from_secs(25), "the daemons did not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        up.kill().unwrap();
        up.wait().unwrap();
    }

    /// Pids of the processes whose command line names the playground's directory.
    fn processes(&self) -> Vec<String> {
        let dir = self.dir().to_string_lossy().into_owned();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
            .filter(|entry| {
                std::fs::read(entry.path().join("cmdline"))
                    .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&dir))
            })
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    fn nothing_is_left(&self) {
        assert!(!self.dir().exists(), "{} is still there", self.dir().display());
        assert_eq!(self.processes(), Vec::<String>::new(), "processes are still there");
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!text.contains(&*self.dir().to_string_lossy()), "something is still mounted");
        let loops = output(Command::new("losetup").args(["-l", "-n", "-O", "BACK-FILE"])).out;
        assert!(!loops.contains(&*self.dir().to_string_lossy()), "a loop device is still there");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // After a failed assertion: whatever is left must not outlive the test.
        let _ = output(&mut self.command("down"));
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn output(command: &mut Command) -> Run {
    let _starting = WRITING.read().unwrap_or_else(PoisonError::into_inner);
    command.output().unwrap().into()
}

/// XFS in a file can be made and mounted here; says so when not.
fn can_make_xfs() -> bool {
    let can = is_root() && Path::new("/dev/loop-control").exists() && Path::new("/usr/sbin/mkfs.xfs").exists();
    if !can {
        println!("skipped: needs root, loop devices and xfsprogs");
    }
    can
}

#[test]
fn without_the_daemon_it_says_where_it_looked() {
    let bench = Bench::new(None);
    let mut command = bench.command("up");
    let run = output(command.env("PATH", "/nonexistent"));
    run.expect(1, "mortar-brickd is neither at");
    bench.nothing_is_left();
}

#[test]
fn a_daemon_that_fails_is_told_with_its_last_words_and_nothing_is_left() {
    let bench = Bench::new(Some("echo 'the disk is made of cheese' >&2; exit 1"));
    let run = bench.run("up");
    assert_eq!(run.code, 1);
    for part in ["server 1", "the disk is made of cheese", "Everything that was started is undone"] {
        assert!(run.err.contains(part), "{part}: {}", run.err);
    }
    bench.nothing_is_left();
}

#[test]
fn a_daemon_that_dies_after_a_while_is_noticed() {
    let bench = Bench::new(Some("sleep 0.5; echo 'the disk is made of cheese' >&2; exit 1"));
    bench.run("up").expect(1, "the disk is made of cheese").expect(1, "has ended");
    bench.nothing_is_left();
}

#[test]
fn with_xfs_a_failure_takes_the_file_systems_and_loop_devices_with_it() {
    if !can_make_xfs() {
        return;
    }
    let bench = Bench::new(Some("sleep 0.2; exit 1"));
    bench.run("up --xfs --brick-size 512M").expect(1, "Everything that was started is undone");
    bench.nothing_is_left();
}

#[test]
fn an_up_that_was_killed_half_way_is_undone_by_down_and_down_may_be_said_twice() {
    let xfs = if can_make_xfs() { "up --xfs --brick-size 512M" } else { "up" };
    let bench = Bench::new(Some(SILENT));
    bench.half_up(xfs);
    bench.run("up").expect(1, "A playground is up already");
    bench.run("status").expect(0, "'up' has not finished, or failed");
    bench.run("stop 2").expect(0, "hangs (SIGSTOP)");
    bench.run("status").expect(0, "stopped");
    bench.run("down").expect(0, "is gone");
    bench.nothing_is_left();
    bench.run("down").expect(0, "There is no playground");
}

#[test]
fn commands_about_one_server_need_a_playground_and_a_number_it_has() {
    let bench = Bench::new(Some(SILENT));
    for line in ["status", "kill 1", "stop 1", "cont 1", "start 1"] {
        bench.run(line).expect(1, "There is no playground in");
    }
    bench.half_up("up");
    bench.run("kill 4").expect(2, "There is no server 4: this playground has servers 1 to 3");
    bench.run("start 1").expect(1, "runs already");
    bench.run("kill 1").expect(0, "is killed");
    bench.run("kill 1").expect(1, "does not run");
    bench.run("status").expect(0, "dead");
    let json = output(&mut bench.command("status --json")).json();
    assert_eq!((&json["servers"][0]["state"], &json["servers"][1]["state"]), (&"dead".into(), &"running".into()));
    assert_eq!(json["complete"], false);
    bench.run("down").expect(0, "is gone");
    bench.nothing_is_left();
}

#[test]
fn a_directory_with_other_things_in_it_is_not_taken_and_an_empty_one_is_kept() {
    let bench = Bench::new(Some("exit 1"));
    std::fs::create_dir(bench.dir()).unwrap();
    std::fs::write(bench.dir().join("mine"), "precious").unwrap();
    bench.run("up").expect(1, "is not empty");
    bench.run("down").expect(0, "There is no playground");
    assert_eq!(std::fs::read_to_string(bench.dir().join("mine")).unwrap(), "precious");
    std::fs::remove_file(bench.dir().join("mine")).unwrap();
    bench.run("up").expect(1, "undone");
    assert!(bench.dir().is_dir(), "it was there before");
    assert_eq!(std::fs::read_dir(bench.dir()).unwrap().count(), 0);
}

#[test]
fn a_record_that_cannot_be_read_is_not_acted_upon() {
    let bench = Bench::new(Some("exit 1"));
    std::fs::create_dir(bench.dir()).unwrap();
    std::fs::write(bench.dir().join("playground.json"), "{").unwrap();
    bench.run("down").expect(1, "is no record of a playground");
    assert!(bench.dir().join("playground.json").exists());
}

#[test]
fn a_mount_in_a_wrong_place_is_refused_before_anything_starts() {
    let bench = Bench::new(Some("exit 1"));
    std::fs::write(bench.temp.path().join("mortar-mount"), "").unwrap();
    if !Path::new("/dev/fuse").exists() {
        println!("skipped: no /dev/fuse");
        return;
    }
    let inside = bench.dir().join("mnt");
    bench.run(&format!("up --mount {}", inside.display())).expect(1, "must lie beside each other");
    bench.run("up --mount /proc").expect(1, "Something is mounted at /proc already");
    let file = bench.temp.path().join("mortar");
    bench.run(&format!("up --mount {}", file.display())).expect(1, "is no directory");
    bench.nothing_is_left();
}

#[test]
fn numbers_and_sizes_are_checked() {
    mortar("playground up --servers 2").expect(2, "3..=15");
    mortar("playground up --brick-size 10").expect(2, "is no size");
    mortar("playground up --brick-size 100M").expect(2, "at least 512M");
    mortar("playground kill").expect(2, "<N>");
}

#[test]
fn xfs_needs_root() {
    if !is_root() {
        let bench = Bench::new(Some("exit 1"));
        bench.run("up --xfs").expect(1, "needs root");
        return;
    }
    // As somebody else, in a folder that everybody may read.
    let bench = Bench::new(Some("exit 1"));
    std::fs::set_permissions(bench.temp.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = bench.command("up --xfs");
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    output(&mut command).expect(1, "needs root");
    bench.nothing_is_left();
}
