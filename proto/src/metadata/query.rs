//! Reading the state.

use super::command::NameError;
use crate::types::{Ino, SetId};

/// The attributes that the log knows. Size, blocks and mtime of a regular file come from its data.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Attributes {
    /// Which inode.
    pub ino: Ino,
    /// `st_mode`: type and permission bits.
    pub mode: u32,
    /// Names that lead to it.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Size of a symbolic link in bytes; of a directory 4096; of a file 0, its data knows.
    pub size: u64,
    /// Access time, nanoseconds since 1970.
    pub atime_ns: i64,
    /// Modification time, nanoseconds since 1970 (of a file: its creation, its data knows better).
    pub mtime_ns: i64,
    /// Change time, nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Where a regular file's data is.
    pub set: Option<SetId>,
}

/// A question about names.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum Query {
    /// What does `name` in `parent` lead to? (`.` and `..` are understood.)
    Lookup {
        /// The directory.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
    },
    /// The attributes.
    Attributes {
        /// Of what.
        ino: Ino,
    },
    /// Entries of a directory, at most `limit`, after the one with cookie `after` (0: from the start).
    List {
        /// The directory.
        ino: Ino,
        /// Where to go on.
        after: u64,
        /// How many at most.
        limit: u32,
    },
    /// Where a symbolic link points.
    ReadLink {
        /// Which link.
        ino: Ino,
    },
    /// The value of an extended attribute.
    Xattr {
        /// Of what.
        ino: Ino,
        /// Its name.
        name: Vec<u8>,
    },
    /// The names of all extended attributes.
    XattrNames {
        /// Of what.
        ino: Ino,
    },
    /// How many inodes the volume has.
    Count {
        /// An inode of the volume.
        ino: Ino,
    },
}

/// The answer to a [`Query`].
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum Answer {
    /// To `Lookup` and `Attributes`.
    Attributes(Attributes),
    /// To `List`: entries in the order of their cookies; empty at the end. `.` has cookie 1 and `..` cookie 2.
    Entries(Vec<DirectoryEntry>),
    /// To `ReadLink`, `Xattr`.
    Bytes(Vec<u8>),
    /// To `XattrNames`.
    Names(Vec<Vec<u8>>),
    /// To `Count`.
    Count(u64),
    /// It is not there, or not of that kind.
    Errno(NameError),
}

/// A name in a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct DirectoryEntry {
    /// The name.
    pub name: Vec<u8>,
    /// Where to go on after it.
    pub cookie: u64,
    /// What it leads to.
    pub attributes: Attributes,
}
