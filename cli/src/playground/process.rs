//! Processes of a playground: started on their own, found again by pid and start time, and signalled only when both still
//! fit, so that a pid that the kernel has given to somebody else is never touched.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde::{Deserialize, Serialize};

/// The variable that every process of a playground carries, with the playground's directory.
const MARK: &str = "MORTAR_PLAYGROUND";
/// How long a daemon may take to shut down cleanly before it is killed.
const CLEAN: Duration = Duration::from_secs(15);
/// How long the kernel may take to bury a killed process.
const KILL: Duration = Duration::from_secs(10);

/// A process, for good: its pid, when it started, and in which life of the machine.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id {
    /// Its pid.
    pub pid: i32,
    /// Its start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    start_ticks: u64,
    /// When the machine booted, in seconds since 1970: start times count from there.
    boot_seconds: u64,
}

/// How to end a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// SIGTERM; SIGKILL when that does not help.
    Clean,
    /// SIGKILL.
    Kill,
}

impl Id {
    /// The process that has this pid now.
    fn of(pid: i32) -> Option<Self> {
        let Stat { start_ticks, .. } = stat(pid)?;
        Some(Self { pid, start_ticks, boot_seconds: boot_seconds()? })
    }

    /// The kernel's letter for its state (`R`, `S`, `T` …); `None` when it is dead, also when nobody has buried it yet. One
    /// whose first thread is dead while others still die holds its files and locks: it is not dead.
    pub fn state(self) -> Option<char> {
        // When it is a child of this very process, bury it.
        if let Some(pid) = Pid::from_raw(self.pid) {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
        let Stat { state, threads, start_ticks } = stat(self.pid)?;
        let same = start_ticks == self.start_ticks && boot_seconds() == Some(self.boot_seconds);
        let is_dead = matches!(state, 'Z' | 'X') && threads <= 1;
        (same && !is_dead).then_some(state)
    }

    /// True while it lives.
    pub fn is_alive(self) -> bool {
        self.state().is_some()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// A sentence when it is gone or not ours to signal.
    pub fn signal(self, signal: Signal) -> Result<(), String> {
        if !self.is_alive() {
            return Err(format!("Process {} is gone.", self.pid));
        }
        let pid = Pid::from_raw(self.pid).ok_or("A pid of 0 is no process.")?;
        kill_process(pid, signal).map_err(|error| format!("Process {} cannot be signalled: {error}.", self.pid))
    }

    /// Stops it, and waits until it has: one within a system call goes on for a moment.
    ///
    /// # Errors
    /// A sentence when it is gone or does not stop.
    pub fn stop(self) -> Result<(), String> {
        self.signal(Signal::STOP)?;
        let until = Instant::now() + KILL;
        while self.state() != Some('T') {
            if Instant::now() >= until {
                return Err(format!("Process {} was told to stop and has not.", self.pid));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits for its end, at most so long. True when it has ended.
    pub fn wait(self, at_most: Duration) -> bool {
        let until = Instant::now() + at_most;
        while self.is_alive() {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }
}

/// Ends a process and waits for that. One that is gone already is fine.
///
/// # Errors
/// A sentence when it lives on.
pub fn end(id: Id, how: End) -> Result<(), String> {
    if !id.is_alive() {
        return Ok(());
    }
    if how == End::Clean {
        // One that was stopped (SIGSTOP) hears nothing until it goes on.
        let _ = id.signal(Signal::TERM);
        let _ = id.signal(Signal::CONT);
        if id.wait(CLEAN) {
            return Ok(());
        }
    }
    let _ = id.signal(Signal::KILL);
    if id.wait(KILL) {
        Ok(())
    } else {
        Err(format!("Process {} does not die of SIGKILL: it waits for a disk that does not answer.", id.pid))
    }
}

/// Marks what is about to be started as belonging to the playground in `dir`.
pub fn mark<'a>(command: &'a mut Command, dir: &Path) -> &'a mut Command {
    command.env(MARK, dir)
}

/// All living processes that carry the mark of the playground in `dir`: also those that were started by an `up` that was
/// killed before it could record them.
pub fn marked(dir: &Path) -> Vec<Id> {
    let mark = [MARK.as_bytes(), b"=", dir.as_os_str().as_bytes()].concat();
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|byte| *byte == 0).any(|variable| variable == mark)
        })
        .filter_map(Id::of)
        .filter(|id| id.is_alive())
        .collect()
}

/// Starts a daemon of the playground in `dir`, in a process group of its own, its output appended to `log`.
///
/// # Errors
/// When it cannot be started.
pub fn start<I, S>(program: &Path, args: I, dir: &Path, log: &Path) -> Result<Id>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open {}", log.display()))?;
    let again = file.try_clone().with_context(|| format!("cannot open {}", log.display()))?;
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(file).stderr(again).current_dir("/");
    // What the administrator's shell says of servers is for the command, not for daemons.
    command.env_remove("MORTAR_SERVERS").env_remove("NOTIFY_SOCKET");
    // A process group of its own: Ctrl-C in the shell that called `up` is not for the daemons.
    command.process_group(0);
    let child = mark(&mut command, dir).spawn().with_context(|| format!("cannot start {}", program.display()))?;
    let pid = i32::try_from(child.id()).context("a pid beyond the kernel's limit")?;
    Id::of(pid).with_context(|| format!("{} was gone at once; {}", program.display(), last_lines(log)))
}

/// Finds one of Mortar's programs: beside this one, else in `PATH`.
///
/// # Errors
/// When it is in neither.
pub fn find_program(name: &str) -> Result<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        beside.iter().cloned().chain(std::env::split_paths(&path).map(|dir| dir.join(name))).find(|p| p.is_file());
    found.with_context(|| match &beside {
        Some(beside) => format!("{name} is neither at {} nor in PATH: build or install it first", beside.display()),
        None => format!("{name} is not in PATH: build or install it first"),
    })
}

/// The end of a log, to show with a failure.
pub fn last_lines(log: &Path) -> String {
    let text = std::fs::read(log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(5)..];
    if shown.is_empty() {
        format!("its log {} is empty", log.display())
    } else {
        format!("the end of its log {}:\n{}", log.display(), shown.join("\n"))
    }
}

/// Fields 3, 20 and 22 of `/proc/PID/stat`.
struct Stat {
    state: char,
    threads: u64,
    start_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything, parentheses and blanks too.
    let after = &text[text.rfind(')')? + 1..];
    let mut fields = after.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let threads = fields.nth(16)?.parse().ok()?;
    let start_ticks = fields.nth(1)?.parse().ok()?;
    Some(Stat { state, threads, start_ticks })
}

fn boot_seconds() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> Id {
        let log = tempfile::NamedTempFile::new().unwrap();
        start(Path::new("/bin/sleep"), ["60"], log.path(), log.path()).unwrap()
    }

    #[test]
    fn a_process_is_found_again_and_ends_when_told() {
        let id = sleeper();
        assert!(id.is_alive());
        end(id, End::Clean).unwrap();
        assert!(!id.is_alive());
        assert!(end(id, End::Kill).is_ok(), "a second time is fine");
    }

    #[test]
    fn a_stopped_process_is_ended_too() {
        let id = sleeper();
        id.stop().unwrap();
        assert_eq!(id.state(), Some('T'));
        end(id, End::Clean).unwrap();
        assert!(!id.is_alive());
    }

    #[test]
    fn a_process_is_found_by_the_mark_it_was_started_with() {
        let dir = tempfile::tempdir().unwrap();
        let id = start(Path::new("/bin/sleep"), ["60"], dir.path(), &dir.path().join("log")).unwrap();
        // The kernel shows a program's environment a moment after it has been started.
        let until = Instant::now() + Duration::from_secs(10);
        while marked(dir.path()).is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(marked(dir.path()), [id]);
        end(id, End::Kill).unwrap();
        assert_eq!(marked(dir.path()), []);
    }

    #[test]
    fn a_pid_that_somebody_else_has_now_is_not_signalled() {
        let id = sleeper();
        let other = Id { start_ticks: id.start_ticks + 1, ..id };
        assert!(!other.is_alive());
        assert!(other.signal(Signal::KILL).is_err());
        end(other, End::Kill).unwrap();
        assert!(id.is_alive(), "the process that has the pid lives on");
        end(id, End::Kill).unwrap();
    }
}
