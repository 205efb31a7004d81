//! What the metadata log adds up to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::command::Outcome;
use crate::config::Configuration;
use crate::types::{BrickId, ClusterId, Epoch, Ino, LogIndex, ServerId, SessionId, SetId, VolumeId};

/// Outcomes that are remembered per session, so that a request that is sent again gets the answer it got. A client has
/// at most this many requests under way.
pub const REMEMBERED_OUTCOMES: usize = 256;
/// Sessions whose eviction is remembered, for as long as their clients may not have heard of it.
pub const REMEMBERED_EVICTIONS: usize = 1024;
/// Ended sessions whose outcomes are remembered, for as long as their clients may still ask what became of a request.
pub const REMEMBERED_SESSIONS: usize = 256;

/// The whole state of a cluster. Equal on every server that has applied the same prefix of the log.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct State {
    /// The cluster.
    pub cluster: ClusterId,
    /// The last entry applied.
    pub applied: LogIndex,
    /// The next number for volumes, bricks, sets, inodes and sessions: they share one counter, so none is ever used twice.
    pub next_id: u64,
    /// Servers.
    pub servers: BTreeMap<ServerId, Server>,
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// Bricks.
    pub bricks: BTreeMap<BrickId, Brick>,
    /// Replica sets.
    pub sets: BTreeMap<SetId, ReplicaSet>,
    /// Sessions.
    pub sessions: BTreeMap<SessionId, Session>,
    /// Sessions that the administrator ended, oldest first, at most [`REMEMBERED_EVICTIONS`]: their clients get no other.
    pub evicted: VecDeque<SessionId>,
    /// What became of the last requests of sessions that have ended, oldest first, at most [`REMEMBERED_SESSIONS`].
    pub ended: VecDeque<(SessionId, VecDeque<(u64, Outcome)>)>,
    /// Inodes of all volumes.
    pub inodes: BTreeMap<Ino, Inode>,
}

/// A server.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Server {
    /// Where it listens, `host:port`, as others reach it.
    pub address: String,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Clients may mount it.
    pub started: bool,
    /// Options that were set, by key, as text that [`super::options`] has accepted.
    pub options: BTreeMap<String, String>,
    /// Its replica sets.
    pub sets: Vec<SetId>,
    /// Its root directory.
    pub root: Ino,
}

/// A brick.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Brick {
    /// On which server.
    pub server: ServerId,
    /// Its directory there.
    pub path: String,
    /// Of which volume.
    pub volume: VolumeId,
    /// In which replica set.
    pub set: SetId,
}

/// A replica set.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct ReplicaSet {
    /// Of which volume.
    pub volume: VolumeId,
    /// Its configuration.
    pub configuration: Configuration,
    /// The cold starts `[E6]` so far: the configuration each made and the boot id of the source it took, newest last, at
    /// most 16. A client judges by it whether acknowledged writes were lost `[E7]`.
    pub cold_starts: VecDeque<(crate::types::ConfigNo, crate::types::BootId)>,
}

/// A mounted client, or the janitor.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Session {
    /// What it drew when it opened.
    pub nonce: u128,
    /// Its volume; `None` for the janitor.
    pub volume: Option<VolumeId>,
    /// What it says it is.
    pub client: String,
    /// Where it came from.
    pub address: String,
    /// When it was opened, by the leader's clock, in nanoseconds since 1970.
    pub opened_ns: u64,
    /// Files it has open.
    pub open: BTreeSet<Ino>,
    /// Leases it holds.
    pub leases: BTreeSet<Ino>,
    /// Its last requests and what became of them, oldest first, at most [`REMEMBERED_OUTCOMES`].
    pub outcomes: VecDeque<(u64, Outcome)>,
}

/// An inode.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Inode {
    /// Its volume.
    pub volume: VolumeId,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names that lead to it (a directory: 2 plus its subdirectories).
    pub links: u32,
    /// Access time, nanoseconds since 1970.
    pub atime_ns: i64,
    /// Modification time, nanoseconds since 1970; of a regular file, that of its creation.
    pub mtime_ns: i64,
    /// Change time of owner, mode, links and attributes, nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// How many sessions have it open.
    pub opens: u32,
    /// What it is.
    pub node: Node,
}

/// What an inode is.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum Node {
    /// A regular file: where its data is, and who may write it.
    File {
        /// The replica set.
        set: SetId,
        /// The lease.
        lease: Lease,
    },
    /// A directory.
    Directory(Directory),
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A device, FIFO or socket.
    Special {
        /// File type bits.
        format: u32,
        /// Device number.
        rdev: u32,
    },
}

/// The right to write a file `[W1]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Lease {
    /// The number of the last grant.
    pub epoch: Epoch,
    /// Who holds it, if anybody does.
    pub holder: Option<SessionId>,
    /// Who held it last.
    pub last: SessionId,
    /// What the last grant said to its holder, in case it asks again.
    pub recover: bool,
    /// The last holder did not finish `[W2]` or did not release: the next grant has `recover`. A file that was never
    /// leased is settled.
    pub unsettled: bool,
}

/// A directory. Entries are listed in the order of their cookies, which are never used twice in a directory, so a listing
/// that goes on after changes neither repeats nor skips what was there all the time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Directory {
    /// The directory it is in; of a root, itself.
    pub parent: Ino,
    /// Names, what they lead to, and their cookies.
    pub entries: BTreeMap<Vec<u8>, (Ino, u64)>,
    /// Cookies and their names.
    pub order: BTreeMap<u64, Vec<u8>>,
    /// The next cookie; cookies start at 3, after `.` and `..`.
    pub next_cookie: u64,
}
