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

use super::state::{Inode, Node, State};
use crate::types::VolumeId;

const FORMAT_DIRECTORY: u32 = 0o040_000;
const FORMAT_FILE: u32 = 0o100_000;
const FORMAT_SYMLINK: u32 = 0o120_000;
/// Entries in one answer at most.
const MAX_ENTRIES: usize = 4096;

impl State {
    /// The attributes of an inode.
    #[must_use]
    pub fn attributes(&self, ino: Ino) -> Option<Attributes> {
        let inode = self.inodes.get(&ino)?;
        let (format, size, rdev, set) = match &inode.node {
            Node::File { set, .. } => (FORMAT_FILE, 0, 0, Some(*set)),
            Node::Directory(_) => (FORMAT_DIRECTORY, 4096, 0, None),
            Node::Symlink(target) => (FORMAT_SYMLINK, target.len() as u64, 0, None),
            Node::Special { format, rdev } => (*format, 0, *rdev, None),
        };
        Some(Attributes {
            ino,
            mode: format | inode.mode,
            links: inode.links,
            uid: inode.uid,
            gid: inode.gid,
            rdev,
            size,
            atime_ns: inode.atime_ns,
            mtime_ns: inode.mtime_ns,
            ctime_ns: inode.ctime_ns,
            set,
        })
    }

    /// Answers a question about the names of `volume`; `None` may ask of any.
    #[must_use]
    pub fn ask(&self, volume: Option<VolumeId>, query: &Query) -> Answer {
        self.answer(volume, query).unwrap_or_else(Answer::Errno)
    }

    fn inode_of(&self, volume: Option<VolumeId>, ino: Ino) -> Result<&Inode, NameError> {
        self.inodes.get(&ino).filter(|i| volume.is_none_or(|v| v == i.volume)).ok_or(NameError::NotFound)
    }

    fn answer(&self, volume: Option<VolumeId>, query: &Query) -> Result<Answer, NameError> {
        let attributes = |ino| self.attributes(ino).map(Answer::Attributes).ok_or(NameError::NotFound);
        match query {
            Query::Lookup { parent, name } => {
                let Node::Directory(directory) = &self.inode_of(volume, *parent)?.node else {
                    return Err(NameError::NotDirectory);
                };
                match name.as_slice() {
                    b"." => attributes(*parent),
                    b".." => attributes(directory.parent),
                    name => attributes(directory.entries.get(name).ok_or(NameError::NotFound)?.0),
                }
            }
            Query::Attributes { ino } => {
                self.inode_of(volume, *ino)?;
                attributes(*ino)
            }
            Query::List { ino, after, limit } => self.list(volume, *ino, *after, *limit as usize),
            Query::ReadLink { ino } => match &self.inode_of(volume, *ino)?.node {
                Node::Symlink(target) => Ok(Answer::Bytes(target.clone())),
                _ => Err(NameError::Invalid),
            },
            Query::Xattr { ino, name } => {
                let value = self.inode_of(volume, *ino)?.xattrs.get(name).ok_or(NameError::NoAttribute)?;
                Ok(Answer::Bytes(value.clone()))
            }
            Query::XattrNames { ino } => {
                Ok(Answer::Names(self.inode_of(volume, *ino)?.xattrs.keys().cloned().collect()))
            }
            Query::Count { ino } => {
                let volume = self.inode_of(volume, *ino)?.volume;
                Ok(Answer::Count(self.inodes.values().filter(|i| i.volume == volume).count() as u64))
            }
        }
    }

    fn list(&self, volume: Option<VolumeId>, ino: Ino, after: u64, limit: usize) -> Result<Answer, NameError> {
        let Node::Directory(directory) = &self.inode_of(volume, ino)?.node else { return Err(NameError::NotDirectory) };
        let limit = limit.min(MAX_ENTRIES);
        let mut entries = Vec::new();
        for (cookie, name, of) in [(1, b".".as_slice(), ino), (2, b"..".as_slice(), directory.parent)] {
            if cookie > after
                && entries.len() < limit
                && let Some(attributes) = self.attributes(of)
            {
                entries.push(DirectoryEntry { name: name.to_vec(), cookie, attributes });
            }
        }
        for (cookie, name) in directory.order.range(after.saturating_add(1)..) {
            if entries.len() >= limit {
                break;
            }
            let found = directory.entries.get(name).and_then(|(ino, _)| self.attributes(*ino));
            if let Some(attributes) = found {
                entries.push(DirectoryEntry { name: name.clone(), cookie: *cookie, attributes });
            }
        }
        Ok(Answer::Entries(entries))
    }

    /// A path by which an inode can be reached in its volume, for people.
    #[must_use]
    pub fn path_of(&self, ino: Ino) -> Option<String> {
        let volume = self.inodes.get(&ino)?.volume;
        let mut at = ino;
        let mut path = String::new();
        // A file does not know its directories; a search finds the first that names it.
        if !matches!(self.inodes.get(&at)?.node, Node::Directory(_)) {
            let (parent, name) =
                self.inodes.iter().filter(|(_, i)| i.volume == volume).find_map(|(parent, i)| match &i.node {
                    Node::Directory(d) => {
                        d.entries.iter().find(|(_, (to, _))| *to == ino).map(|(name, _)| (*parent, name))
                    }
                    _ => None,
                })?;
            path = format!("/{}", String::from_utf8_lossy(name));
            at = parent;
        }
        for _ in 0..self.inodes.len() {
            let Node::Directory(d) = &self.inodes.get(&at)?.node else { return None };
            if d.parent == at {
                return Some(if path.is_empty() { "/".into() } else { path });
            }
            let Node::Directory(parent) = &self.inodes.get(&d.parent)?.node else { return None };
            let name = parent.entries.iter().find(|(_, (to, _))| *to == at).map(|(name, _)| name)?;
            path = format!("/{}{path}", String::from_utf8_lossy(name));
            at = d.parent;
        }
        None
    }
}
