//! A control group for one server's daemon, in which its disk can be made slow: by `blkio.throttle` where the kernel has the
//! old hierarchy, by `io.max` where it has only the new one.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// One server's group.
#[derive(Debug)]
pub struct Throttle {
    group: PathBuf,
    is_old: bool,
}

const OLD: &str = "/sys/fs/cgroup/blkio";
const NEW: &str = "/sys/fs/cgroup";

impl Throttle {
    /// Makes the group; `None` when this kernel can throttle no disk.
    #[must_use]
    pub fn make(id: &str, server: usize) -> Option<Self> {
        let name = format!("{id}-s{server}");
        let old = Path::new(OLD);
        if old.join("cgroup.procs").exists() {
            let group = old.join(name);
            std::fs::create_dir(&group).ok()?;
            return Some(Self { group, is_old: true });
        }
        // Children get the controller only when their parent is told to hand it on; that it is there already is fine.
        let _ = std::fs::write(Path::new(NEW).join("cgroup.subtree_control"), "+io");
        let group = Path::new(NEW).join(name);
        std::fs::create_dir(&group).ok()?;
        if group.join("io.max").exists() {
            return Some(Self { group, is_old: false });
        }
        let _ = std::fs::remove_dir(&group);
        None
    }

    /// Puts a process in.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take(&self, pid: u32) -> Result<()> {
        std::fs::write(self.group.join("cgroup.procs"), pid.to_string()).context("putting a daemon into its group")
    }

    /// So many reads and writes a second on this device; 0 is no limit.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn limit(&self, device: &str, a_second: u64) -> Result<()> {
        let write = |file: &str, text: String| {
            std::fs::write(self.group.join(file), &text).with_context(|| format!("writing {text:?} to {file}"))
        };
        if self.is_old {
            write("blkio.throttle.read_iops_device", format!("{device} {a_second}"))?;
            return write("blkio.throttle.write_iops_device", format!("{device} {a_second}"));
        }
        let most = if a_second == 0 { "max".to_owned() } else { a_second.to_string() };
        write("io.max", format!("{device} riops={most} wiops={most}"))
    }

    /// Removes the groups of the run `id`, which must have no processes any more.
    pub fn remove(id: &str) {
        for root in [OLD, NEW] {
            let names = std::fs::read_dir(root).into_iter().flatten().flatten();
            for entry in names {
                let name = entry.file_name();
                let is_ours = name.to_str().and_then(|n| n.strip_prefix(id)).is_some_and(|rest| rest.starts_with("-s"));
                if is_ours && let Err(e) = std::fs::remove_dir(entry.path()) {
                    println!("{} stays: {e}", entry.path().display());
                }
            }
        }
    }
}
