//! Attributes: read from the log and the data at once, set in either; and the bits that writing takes away.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mortar_proto::Ino;
use mortar_proto::client::{FileId, Space};
use mortar_proto::metadata::{Answer, NameOp, Query, SetAttributes};

use super::handles::OpenFile;
use super::xattrs::CAPABILITY;
use super::{Caller, Errno, Fs, Node, answered, file_of};

/// A time that is to be set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Time {
    /// This one, in nanoseconds since 1970.
    At(i64),
    /// That of the change.
    Now,
}

impl Time {
    fn nanoseconds(self) -> i64 {
        match self {
            Self::At(ns) => ns,
            Self::Now => nanoseconds_of(SystemTime::now()),
        }
    }
}

/// What setattr changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<Time>,
    /// Modification time.
    pub mtime: Option<Time>,
}

/// Nanoseconds since 1970, as far as they can be counted.
#[must_use]
pub fn nanoseconds_of(time: SystemTime) -> i64 {
    let signed = |d: Duration| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => signed(after),
        Err(before) => -signed(before.duration()),
    }
}

/// The mode without what a write by an ordinary user, or a change of owner, takes away; `None` if it has nothing of that.
/// Set-group-id without group execution means something else and stays, as in the kernel's `setattr_should_drop_suidgid`.
#[must_use]
pub fn without_privileges(mode: u32) -> Option<u32> {
    let mut kept = mode & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        kept &= !libc::S_ISGID;
    }
    (mode & libc::S_IFMT == libc::S_IFREG && kept != mode).then_some(kept & 0o7777)
}

impl Fs {
    /// All attributes.
    pub async fn getattr(&self, ino: Ino) -> Result<Node, Errno> {
        let Some(set) = self.known.set(ino) else {
            let attributes = self.attributes(ino).await?;
            return self.node(attributes).await;
        };
        let (attributes, data) = tokio::join!(self.attributes(ino), self.stat(FileId { ino, set }));
        // If the inode is gone, so is its data: the log's word is the clearer one.
        Ok(Node { attributes: attributes?, data: Some(data?) })
    }

    /// Changes attributes.
    pub async fn setattr(&self, caller: Caller, ino: Ino, change: Change) -> Result<Node, Errno> {
        let before = self.attributes(ino).await?;
        let file = before.set.map(|set| FileId { ino, set });
        let owner = change.uid.is_some() || change.gid.is_some();
        let mut set = SetAttributes {
            mode: change.mode,
            uid: change.uid,
            gid: change.gid,
            atime_ns: change.atime.map(Time::nanoseconds),
            mtime_ns: change.mtime.filter(|_| file.is_none()).map(Time::nanoseconds),
        };
        if set.mode.is_none() && (owner || (change.size.is_some() && caller.uid != 0)) {
            set.mode = without_privileges(before.mode);
        }
        if file.is_some() && (owner || change.size.is_some()) {
            self.remove_capability(ino).await?;
        }
        if let Some(size) = change.size {
            let file = file_of(&before)?;
            answered(|done| self.volume.truncate(file, size, done)).await?;
        }
        // A truncation leaves its own time.
        let mtime = change.mtime.filter(|time| change.size.is_none() || *time != Time::Now);
        // A change of a file's mtime changes its ctime, which only the log has.
        let attributes = if set != SetAttributes::default() || mtime.is_some() {
            self.submit_node(NameOp::SetAttributes { ino, set }).await.map_err(Errno::of_inode)?
        } else {
            before
        };
        if let (Some(file), Some(time)) = (file, mtime) {
            let ns = time.nanoseconds();
            answered(|done| self.volume.set_mtime(file, ns, done)).await?;
        }
        let node = self.node(attributes).await;
        if let Some(file) = file
            && self.handles.of_inode(ino).is_none()
        {
            // No release will follow that would give the lease back.
            self.volume.forget(file);
        }
        node
    }

    /// How much room there is.
    pub async fn space(&self) -> Result<Space, Errno> {
        Ok(self.volume.space().await?)
    }

    /// Before a write: takes away what a write takes away. `kill`: the writer may not keep set-user-id bits.
    pub(super) async fn drop_privileges(&self, open: &OpenFile, kill: bool) -> Result<(), Errno> {
        let ino = open.file.ino;
        let (attributes, capability) = tokio::join!(self.attributes(ino), self.remove_capability(ino));
        capability?;
        let left = match without_privileges(attributes?.mode) {
            Some(mode) if kill => {
                let set = SetAttributes { mode: Some(mode), ..SetAttributes::default() };
                self.submit_node(NameOp::SetAttributes { ino, set }).await.map_err(Errno::of_inode)?;
                false
            }
            bits => bits.is_some(),
        };
        open.privileges.looked(left);
        Ok(())
    }

    async fn remove_capability(&self, ino: Ino) -> Result<(), Errno> {
        match self.ask(Query::Xattr { ino, name: CAPABILITY.to_vec() }).await {
            Ok(Answer::Bytes(_)) => {}
            Err(Errno::NODATA) => return Ok(()),
            result => return result.map(drop).map_err(Errno::of_inode),
        }
        match self.submit(NameOp::RemoveXattr { ino, name: CAPABILITY.to_vec() }).await {
            Err(Errno::NODATA) => Ok(()),
            result => result.map(drop).map_err(Errno::of_inode),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_takes_set_user_id_away_and_set_group_id_of_what_the_group_may_execute() {
        let file = libc::S_IFREG;
        assert_eq!(without_privileges(file | 0o644), None);
        assert_eq!(without_privileges(file | 0o4755), Some(0o755));
        assert_eq!(without_privileges(file | 0o2755), Some(0o755));
        assert_eq!(without_privileges(file | 0o6711), Some(0o711));
        assert_eq!(without_privileges(file | 0o2644), None);
        assert_eq!(without_privileges(file | 0o6644), Some(0o2644));
        assert_eq!(without_privileges(libc::S_IFDIR | 0o2775), None);
    }

    #[test]
    fn times_before_1970_are_negative() {
        assert_eq!(nanoseconds_of(UNIX_EPOCH + Duration::new(1, 5)), 1_000_000_005);
        assert_eq!(nanoseconds_of(UNIX_EPOCH - Duration::new(1, 5)), -1_000_000_005);
        assert_eq!(nanoseconds_of(UNIX_EPOCH + Duration::from_secs(1 << 40)), i64::MAX);
    }
}
