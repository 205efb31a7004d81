//! What may stand in the metadata log, and what answers.

use crate::config::{Configuration, Slot};
use crate::types::{BootId, BrickId, ConfigNo, Epoch, Incarnation, Ino, ServerId, SessionId, SetId, VolumeId};

/// One entry of the log: a command, and what the leader adds so that every server applies it alike.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Entry {
    /// The leader's wall clock when it proposed the entry, in nanoseconds since 1970: for times of files, never for order.
    pub time_ns: u64,
    /// Who asked, and under which number: the same `(session, number)` is applied once, and answered with the same
    /// outcome again. `None`: proposed by the leader or the administrator, and safe to apply twice or guarded by its own
    /// fields.
    pub request: Option<(SessionId, u64)>,
    /// What is to be done.
    pub command: Command,
}

/// Where a brick of a new volume shall be.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct BrickPlace {
    /// On which server.
    pub server: ServerId,
    /// Its directory there, absolute.
    pub path: String,
}

/// What may be done to the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum Command {
    /// Names or re-addresses a server. `address` is `host:port`.
    ServerAdd {
        /// Which.
        server: ServerId,
        /// Where it listens, as others reach it.
        address: String,
    },
    /// Forgets a server; refused while it has a brick.
    ServerRemove {
        /// Which.
        server: ServerId,
    },
    /// Makes a volume, its replica sets and its root directory.
    VolumeCreate {
        /// Its name.
        name: String,
        /// Its replica sets, each of three bricks.
        sets: Vec<[BrickPlace; 3]>,
        /// Allows two bricks of a set on one server.
        force: bool,
    },
    /// Lets clients in.
    VolumeStart {
        /// Its name.
        name: String,
    },
    /// Shuts clients out; refused while sessions exist unless `force`, which ends them.
    VolumeStop {
        /// Its name.
        name: String,
        /// Ends the sessions.
        force: bool,
    },
    /// Forgets a stopped volume. The bricks' files stay where they are.
    VolumeDelete {
        /// Its name.
        name: String,
    },
    /// Sets an option; refused when unknown or ill-typed.
    VolumeSet {
        /// The volume's name.
        name: String,
        /// The option's key.
        key: String,
        /// Its value as text; `None` goes back to the default.
        value: Option<String>,
    },

    /// A brick has started `[E5]`. Makes `n + 1` and the brick `Syncing`. Applied only when another brick stays `InSync`
    /// or the brick is not `InSync` itself; the leader answers a start without a living `InSync` brick by `ColdStart`.
    Register {
        /// Which brick.
        brick: BrickId,
        /// Applied only under this configuration: what an earlier start said may come late.
        n: ConfigNo,
        /// Drawn at this start.
        incarnation: Incarnation,
        /// The kernel's.
        boot: BootId,
        /// Its last shutdown was clean.
        clean: bool,
    },
    /// All `InSync` bricks have restarted `[E6]`: `source` becomes the one `InSync` brick, others that were `InSync` or
    /// `Syncing` and registered become `Syncing`, the rest `Out`.
    ColdStart {
        /// Which replica set.
        set: SetId,
        /// Applied only under this configuration.
        n: ConfigNo,
        /// The brick that is taken as source.
        source: Slot,
        /// What the bricks that have restarted registered.
        registered: [Option<Registration>; 3],
    },
    /// Puts a brick out `[E1]`, `[E2]`.
    PutOut {
        /// Which replica set.
        set: SetId,
        /// Applied only under this configuration.
        n: ConfigNo,
        /// Which brick.
        slot: Slot,
    },
    /// Takes a brick that is `Out` and lives back as `Syncing`.
    Rejoin {
        /// Which replica set.
        set: SetId,
        /// Applied only under this configuration.
        n: ConfigNo,
        /// Which brick.
        slot: Slot,
    },
    /// Makes a `Syncing` brick `InSync` `[S4]`.
    Promote {
        /// Which replica set.
        set: SetId,
        /// Applied only under this configuration.
        n: ConfigNo,
        /// Which brick.
        slot: Slot,
    },

    /// An empty brick takes the place of another, for good. The leader has seen to it that the old one serves no reads `[E1]` and
    /// that another `InSync` one lives `[E2]`. Refused when the old one is the last that is `InSync`.
    ReplaceBrick {
        /// Which replica set.
        set: SetId,
        /// Applied only under this configuration.
        n: ConfigNo,
        /// Which brick goes.
        slot: Slot,
        /// Where the new one is: also the same directory, when its disk is a new one.
        place: BrickPlace,
        /// Allows two bricks of a set on one server.
        force: bool,
    },
    /// The administrator ends the wait of `[E2]` or `[E6]`: this brick becomes the one that is `InSync`, whatever others may have that
    /// it lacks. The leader has seen to it that none that is `InSync` lives, or may still serve reads `[E1]`.
    AcceptLoss {
        /// Which replica set.
        set: SetId,
        /// Applied only under this configuration.
        n: ConfigNo,
        /// The brick that is taken as source.
        source: Slot,
        /// What bricks that have restarted registered.
        registered: [Option<Registration>; 3],
    },
    /// All bricks of a set are to be compared with each other in full, one at a time.
    CompareAll {
        /// Which replica set.
        set: SetId,
        /// Applied only under this configuration.
        n: ConfigNo,
    },

    /// A client mounts a volume, or the janitor starts. Answered with [`Outcome::Session`].
    SessionOpen {
        /// Drawn by the client, so that asking twice makes one session.
        nonce: u128,
        /// The volume's name; empty for the janitor, which may lease files of every volume.
        volume: String,
        /// What `client list` shows: host name, process, mount point.
        client: String,
        /// Where it came from, as the leader saw it.
        address: String,
    },
    /// The client unmounted, or has not been heard for its time to live. Its leases end unsettled unless it released
    /// them, its open files are closed.
    SessionEnd {
        /// Which.
        session: SessionId,
    },
    /// The administrator ends a client's session for good: the client opens no other in its place. Refused for one that is not
    /// there, and for the janitor's.
    SessionEvict {
        /// Which.
        session: SessionId,
    },

    /// Grants a file's lease `[W1]`. If `from` is given, that holder's release is part of the same entry.
    LeaseGrant {
        /// Which file.
        ino: Ino,
        /// To whom.
        to: SessionId,
        /// The release that makes room: holder, its epoch, and whether it had finished `[W2]`.
        from: Option<(SessionId, Epoch, bool)>,
    },
    /// Gives a lease back.
    LeaseRelease {
        /// Which file.
        ino: Ino,
        /// By whom.
        session: SessionId,
        /// Which grant.
        epoch: Epoch,
        /// The holder had finished `[W2]`; if not, the next grant has `recover`.
        finished: bool,
    },

    /// A change of names, by a session.
    Name {
        /// Who.
        session: SessionId,
        /// What.
        operation: NameOp,
    },
}

/// What a brick says of itself when it starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Registration {
    /// Drawn at this start.
    pub incarnation: Incarnation,
    /// The kernel's.
    pub boot: BootId,
    /// Its last shutdown was clean.
    pub clean: bool,
}

/// What kind of thing a name leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum NewNode {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link and where it points.
    Symlink(Vec<u8>),
    /// A device, FIFO or socket: `mode & S_IFMT` and the device number.
    Special {
        /// File type bits as in `st_mode`.
        format: u32,
        /// The device number.
        rdev: u32,
    },
}

/// A change of one attribute set; `None` leaves it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct SetAttributes {
    /// Permission bits, `0o7777`.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Access time, nanoseconds since 1970.
    pub atime_ns: Option<i64>,
    /// Modification time of what is no regular file (a file's belongs to its data), nanoseconds since 1970.
    pub mtime_ns: Option<i64>,
}

/// A change of names. Names are bytes without `/` and NUL, at most 255; never `.` or `..`; in a volume's root never
/// `.mortar`, which is the bricks' own.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum NameOp {
    /// Makes something new. With `open`, the session has it open from the start.
    Create {
        /// The directory.
        parent: Ino,
        /// Its name there.
        name: Vec<u8>,
        /// What.
        node: NewNode,
        /// Permission bits, the umask already applied.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group (of the directory if that is set-gid).
        gid: u32,
        /// A file that exists already is no error but the answer (no `O_EXCL`).
        or_existing: bool,
        /// Count it as open by the session.
        open: bool,
    },
    /// A further name for a file.
    Link {
        /// Which file.
        ino: Ino,
        /// The directory.
        parent: Ino,
        /// Its name there.
        name: Vec<u8>,
    },
    /// Removes a name of what is no directory.
    Unlink {
        /// The directory.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
    },
    /// Removes an empty directory.
    Rmdir {
        /// The directory it is in.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
    },
    /// Moves a name.
    Rename {
        /// From this directory.
        parent: Ino,
        /// This name,
        name: Vec<u8>,
        /// to this directory,
        new_parent: Ino,
        /// as this name.
        new_name: Vec<u8>,
        /// Refuse to replace (`RENAME_NOREPLACE`).
        no_replace: bool,
        /// Swap the two (`RENAME_EXCHANGE`).
        exchange: bool,
    },
    /// Changes attributes.
    SetAttributes {
        /// Of what.
        ino: Ino,
        /// To what.
        set: SetAttributes,
    },
    /// Sets an extended attribute.
    SetXattr {
        /// Of what.
        ino: Ino,
        /// Its name, with the namespace.
        name: Vec<u8>,
        /// Its value, at most 64 KiB.
        value: Vec<u8>,
        /// Fail with `EEXIST` if it is there (`XATTR_CREATE`).
        create: bool,
        /// Fail with `ENODATA` if it is not (`XATTR_REPLACE`).
        replace: bool,
    },
    /// Removes an extended attribute.
    RemoveXattr {
        /// Of what.
        ino: Ino,
        /// Its name.
        name: Vec<u8>,
    },
    /// The session has the inode open: it lives on without a name until the session closes it.
    Open {
        /// Which.
        ino: Ino,
    },
    /// The session closed these.
    Close {
        /// Which.
        inos: Vec<Ino>,
    },
}

/// What became of a command.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum Outcome {
    /// Done, nothing to say.
    Done,
    /// The session that was opened.
    Session {
        /// Its id.
        session: SessionId,
        /// The volume.
        volume: VolumeId,
        /// The volume's root directory.
        root: Ino,
    },
    /// The lease that was granted.
    Lease {
        /// Its number.
        epoch: Epoch,
        /// The holder must do `[W2]` with recovery.
        recover: bool,
        /// The holder of the grant before this one, if that was another session.
        previous: Option<SessionId>,
    },
    /// The configuration that is now in force.
    Configuration(Configuration),
    /// The attributes after a change of names, and whether the node is new.
    Node {
        /// Its attributes.
        attributes: super::query::Attributes,
        /// It was made by this command.
        created: bool,
    },
    /// The number of the volume that was made.
    Volume(VolumeId),
    /// A sentence for the administrator: what was wrong, with which value, and what to do.
    Refused(String),
    /// A change of names that a file system refuses.
    Errno(NameError),
    /// The command was made for a configuration, lease or session that is no more.
    Superseded,
}

/// Why a change of names is refused; the mount turns it into an `errno` of the same name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum NameError {
    /// `ENOENT`
    NotFound,
    /// `EEXIST`
    Exists,
    /// `ENOTDIR`
    NotDirectory,
    /// `EISDIR`
    IsDirectory,
    /// `ENOTEMPTY`
    NotEmpty,
    /// `EINVAL`
    Invalid,
    /// `ENAMETOOLONG`
    NameTooLong,
    /// `EPERM`
    NotPermitted,
    /// `ENODATA`
    NoAttribute,
    /// `EMLINK`
    TooManyLinks,
    /// `ENOSPC`
    NoSpace,
    /// `E2BIG`
    TooBig,
    /// `ESTALE`: the session has ended.
    SessionEnded,
    /// `EBUSY`
    Busy,
}

/// What a server has to do because it applied an entry. Told in the log's order, to whoever keeps bricks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// A replica set has a new configuration (also the first one).
    Configured {
        /// Which set.
        set: SetId,
        /// Its configuration.
        configuration: Configuration,
        /// It came by a cold start with this source `[E6]`.
        cold_start: Option<Slot>,
    },
    /// A file's lease changed: who may write it, and under which epoch. `SessionId(0)`: nobody.
    Leased {
        /// The replica set that holds the file's data.
        set: SetId,
        /// Which file.
        ino: Ino,
        /// Under which number.
        epoch: Epoch,
        /// Who.
        holder: SessionId,
    },
    /// A name appeared, vanished or moved in a volume's tree.
    Named {
        /// In which volume.
        volume: VolumeId,
        /// What happened.
        change: TreeChange,
    },
    /// Owner or mode of a node changed.
    Owned {
        /// In which volume.
        volume: VolumeId,
        /// Of what.
        ino: Ino,
    },
    /// No name leads to the file and nobody has it open: its data is to be reclaimed.
    Reclaimed {
        /// The replica set that holds its data.
        set: SetId,
        /// Which file.
        ino: Ino,
    },
    /// A session ended.
    SessionEnded {
        /// Which.
        session: SessionId,
    },
    /// A volume was started, stopped, deleted or given another option.
    VolumeChanged {
        /// Which.
        volume: VolumeId,
    },
}

/// A change of the tree that bricks show.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TreeChange {
    /// `name` in `parent` now leads to `ino`.
    Added {
        /// The directory.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
        /// What it leads to.
        ino: Ino,
    },
    /// `name` in `parent` leads nowhere any more.
    Removed {
        /// The directory.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
        /// What it led to.
        ino: Ino,
    },
    /// A name moved; what the new name led to before is gone (told by `Removed` first).
    Moved {
        /// From this directory,
        parent: Ino,
        /// this name,
        name: Vec<u8>,
        /// to this directory,
        new_parent: Ino,
        /// this name.
        new_name: Vec<u8>,
        /// What it leads to.
        ino: Ino,
    },
    /// Two names were swapped.
    Exchanged {
        /// One directory,
        parent: Ino,
        /// one name,
        name: Vec<u8>,
        /// another directory,
        new_parent: Ino,
        /// another name.
        new_name: Vec<u8>,
    },
}
