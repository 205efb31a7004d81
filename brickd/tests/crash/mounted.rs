//! XFS on a disk of the test's own, mounted in a mount namespace of the test's own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Present in the process that has a mount namespace of its own.
const INSIDE: &str = "MORTAR_CRASH_INSIDE";

/// Runs the test `name` in a process and a mount namespace of its own: whatever becomes of it, mounts and loop devices go with
/// it. True in that process: there the test is to be done.
pub fn inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--kill-child"]).arg(program);
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    let status = command.status().expect("unshare cannot be started: install util-linux");
    assert!(status.success(), "{name} failed, see above");
    false
}

/// Makes an XFS in the file.
pub fn make_xfs(file: &Path) -> Result<()> {
    run(Command::new("mkfs.xfs").args(["-q", "-f", "-K"]).arg(file))
}

/// A mounted XFS; unmounted when dropped, and its loop device goes with it.
pub struct Xfs {
    at: PathBuf,
}

impl Xfs {
    /// Mounts the image on a directory; its log is recovered.
    pub fn mount(image: &Path, at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-t", "xfs", "-o", "loop,nouuid"]).arg(image).arg(at))?;
        Ok(Self { at: at.to_owned() })
    }

    /// Where.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// Unmounts, when nobody uses it any more.
    pub fn unmount(self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::empty()) {
                Ok(()) => {
                    std::mem::forget(self);
                    return Ok(());
                }
                Err(rustix::io::Errno::BUSY) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(e).with_context(|| format!("unmounting {}", self.at.display())),
            }
        }
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
    }
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !out.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
