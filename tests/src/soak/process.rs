//! Programs that are started in a host, and their ends. All carry a mark, so that what a killed run left is found by the next.

use std::fs::OpenOptions;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// The variable that every program of a run carries, with the run's directory.
pub const MARK: &str = "MORTAR_SOAK";

static TOLD_TO_END: AtomicBool = AtomicBool::new(false);

extern "C" fn note_signal(_: libc::c_int) {
    TOLD_TO_END.store(true, Ordering::Relaxed);
}

/// SIGINT and SIGTERM end the run, which then takes everything down.
pub fn heed_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores into an atomic.
        unsafe { libc::signal(signal, note_signal as *const () as libc::sighandler_t) };
    }
}

/// A signal has come.
#[must_use]
pub fn told_to_end() -> bool {
    TOLD_TO_END.load(Ordering::Relaxed)
}

/// A program that runs in the background.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts it in a process group of its own, its output appended to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, name: &str, dir: &Path, log: &Path) -> Result<Self> {
        let out = OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        command.env(MARK, dir).env_remove("MORTAR_SERVERS").current_dir("/").process_group(0);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { child, name: name.to_owned() })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal. The child is not buried yet, so its number is nobody else's.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none()
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it lives on.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() > until {
                bail!("{} (process {}) has not ended within {} s", self.name, self.pid(), limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL, and its end.
    ///
    /// # Errors
    /// When it does not die, or had died by itself before.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(status) = self.ended() {
            bail!("{} had ended by itself, with {status} (signal {:?})", self.name, status.signal());
        }
        self.signal(Signal::KILL);
        self.wait(Duration::from_secs(30)).map(|_| ())
    }

    /// SIGTERM, and its end.
    ///
    /// # Errors
    /// When it does not end, or not with success.
    pub fn terminate(&mut self, limit: Duration) -> Result<()> {
        self.signal(Signal::TERM);
        let status = self.wait(limit)?;
        if !status.success() {
            bail!("{} ended with {status} when it was told to", self.name);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        self.signal(Signal::KILL);
        let _ = self.wait(Duration::from_secs(10));
    }
}

/// Kills every process that carries the mark of the run in `dir`.
pub fn kill_marked(dir: &Path) {
    let mark = format!("{MARK}={}", dir.display());
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let marked: Vec<i32> = pids
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environ.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
            })
            .collect();
        if marked.is_empty() || Instant::now() > until {
            return;
        }
        for pid in marked.into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
