//! A brick's disk: an XFS in a sparse file, and how it breaks.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::mount::{UnmountFlags, unmount};

use super::process::Process;
use crate::harness::{run, sh};

/// Small, so that it can be filled, and large enough for what is written and its repair.
const BYTES: u64 = 1 << 30;
/// A file system that was frozen is thawed after this, whatever becomes of the run.
const WATCHDOG_SECONDS: u32 = 60;

/// One disk.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount_point: PathBuf,
    /// How often the brick has got another directory.
    moves: u32,
    watchdog: Option<Process>,
}

impl Disk {
    /// Makes and mounts the disk of this number.
    ///
    /// # Errors
    /// When one of these fails.
    pub fn make(dir: &Path, number: usize) -> Result<Self> {
        let disk = Self::at(dir, number);
        std::fs::create_dir(&disk.mount_point)?;
        disk.make_anew()?;
        Ok(disk)
    }

    /// The disk of this number, whether it is there or not.
    #[must_use]
    pub fn at(dir: &Path, number: usize) -> Self {
        let (image, mount_point) = (dir.join(format!("disk{number}.img")), dir.join(format!("disk{number}")));
        Self { image, mount_point, moves: 0, watchdog: None }
    }

    /// Where the brick is.
    #[must_use]
    pub fn brick(&self) -> PathBuf {
        self.directory(self.moves)
    }

    /// Where the brick would be next.
    #[must_use]
    pub fn next_brick(&self) -> PathBuf {
        self.directory(self.moves + 1)
    }

    /// The brick is there now. Where it was before the last time is removed: the last one may still be closing.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn moved(&mut self) -> Result<()> {
        self.moves += 1;
        match self.moves {
            0 | 1 => Ok(()),
            moves => match std::fs::remove_dir_all(self.directory(moves - 2)) {
                // The disk was exchanged since.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
                removed => removed.context("removing an old brick"),
            },
        }
    }

    fn directory(&self, moves: u32) -> PathBuf {
        self.mount_point.join(if moves == 0 { "data".to_owned() } else { format!("data{moves}") })
    }

    /// Another disk, and an empty one. It must not be mounted.
    fn make_anew(&self) -> Result<()> {
        let _ = std::fs::remove_file(&self.image);
        File::create_new(&self.image)?.set_len(BYTES)?;
        run(Command::new("mkfs.xfs").arg("-q").arg(&self.image))?;
        self.mount()
    }

    /// It dies, and an empty one is mounted in its place. Nobody may have files open on it.
    ///
    /// # Errors
    /// When it stays mounted, or the new one cannot be made.
    pub fn exchange(&mut self) -> Result<()> {
        self.unmount()?;
        self.make_anew()
    }

    fn mount(&self) -> Result<()> {
        run(Command::new("mount").args(["-t", "xfs", "-o", "loop,noatime"]).arg(&self.image).arg(&self.mount_point))
            .map(|_| ())
    }

    /// Unmounts it; its loop device goes with it.
    ///
    /// # Errors
    /// When it stays mounted.
    pub fn unmount(&self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(15);
        loop {
            match unmount(&self.mount_point, UnmountFlags::NOFOLLOW) {
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
                Err(e) if Instant::now() > until => bail!("{} cannot be unmounted: {e}", self.mount_point.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
        while let Some(device) = self.device() {
            if Instant::now() > until {
                let _ = run(Command::new("losetup").arg("-d").arg(&device));
                bail!("{} still has {}", device.display(), self.image.display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Mounts it anew, as a reboot does.
    ///
    /// # Errors
    /// When it does not unmount or mount.
    pub fn mount_again(&self) -> Result<()> {
        self.unmount()?;
        self.mount()
    }

    fn device(&self) -> Option<PathBuf> {
        if !self.image.exists() {
            return None;
        }
        let out = run(Command::new("losetup").args(["-n", "-O", "NAME", "-j"]).arg(&self.image)).ok()?;
        out.lines().next().map(|line| PathBuf::from(line.trim()))
    }

    /// The loop device's numbers, `7:3` for instance.
    ///
    /// # Errors
    /// When there is none.
    pub fn device_numbers(&self) -> Result<String> {
        let path = self.device().with_context(|| format!("{} has no loop device", self.image.display()))?;
        let device = std::fs::metadata(&path)?.rdev();
        Ok(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
    }

    /// The file system shuts itself down, as after an error of the disk: what was not flushed is lost.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn shut_down(&self) -> Result<()> {
        /// `XFS_IOC_GOINGDOWN`: `_IOR('X', 125, u32)`
        const GOING_DOWN: libc::c_ulong = 0x8004_587d;
        /// `XFS_FSOP_GOING_FLAGS_NOLOGFLUSH`
        const NO_LOG_FLUSH: u32 = 2;
        let flags = NO_LOG_FLUSH;
        let root = File::open(&self.mount_point)?;
        // SAFETY: the call reads one u32.
        let result = unsafe { libc::ioctl(root.as_raw_fd(), GOING_DOWN as _, &raw const flags) };
        ensure!(result == 0, "XFS does not shut down: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Everything that writes hangs.
    ///
    /// # Errors
    /// When it cannot be frozen.
    pub fn freeze(&mut self, dir: &Path) -> Result<()> {
        let mut thaw = Command::new("sh");
        thaw.arg("-c").arg(format!("sleep {WATCHDOG_SECONDS}; exec fsfreeze -u \"$0\"")).arg(&self.mount_point);
        self.watchdog = Some(Process::start(thaw, "the watchdog", dir, &dir.join("watchdog.log"))?);
        run(Command::new("fsfreeze").arg("-f").arg(&self.mount_point)).map(|_| ())
    }

    /// It goes on.
    ///
    /// # Errors
    /// When it does not.
    pub fn thaw(&mut self) -> Result<()> {
        let thawed = run(Command::new("fsfreeze").arg("-u").arg(&self.mount_point)).map(|_| ());
        if let Some(mut watchdog) = self.watchdog.take() {
            watchdog.kill()?;
        }
        thawed
    }

    /// Takes all room that is left.
    ///
    /// # Errors
    /// When it is not taken.
    pub fn fill(&self) -> Result<()> {
        let file = File::create(self.filler())?;
        let (mut at, mut piece) = (0_u64, BYTES);
        while piece >= 4096 {
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, piece) {
                Ok(()) => at += piece,
                Err(rustix::io::Errno::NOSPC) => piece /= 2,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).context("filling a disk"),
            }
        }
        Ok(())
    }

    /// Gives it back.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn empty(&self) -> Result<()> {
        std::fs::remove_file(self.filler()).context("emptying a disk")
    }

    fn filler(&self) -> PathBuf {
        self.mount_point.join("filler")
    }

    /// Can be read only from now on, or again written. Nobody may have files open on it.
    ///
    /// # Errors
    /// When somebody has.
    pub fn set_read_only(&self, read_only: bool) -> Result<()> {
        let how = if read_only { "remount,ro" } else { "remount,rw" };
        run(Command::new("mount").args(["-o", how]).arg(&self.mount_point)).map(|_| ())
    }

    /// XFS finds no mistake in itself. It must be unmounted.
    ///
    /// # Errors
    /// What xfs_repair says.
    pub fn is_sound(&self) -> Result<()> {
        sh(&format!("xfs_repair -n -f {0} >{0}.repair 2>&1 || {{ cat {0}.repair; exit 1; }}", self.image.display()))
            .map(|_| ())
    }

    /// Takes it down as far as that goes, in whatever state it is.
    pub fn take_down(&self) {
        // Frozen it would hold up whoever uses it.
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.mount_point).output();
        if let Err(e) = self.unmount() {
            println!("{e:#}");
        }
    }
}
