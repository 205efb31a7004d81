//! The step for names: directories, files, links, attributes. POSIX semantics; permissions are the kernel's work on the
//! client (`default_permissions`).

use std::collections::{BTreeMap, BTreeSet};

use super::command::{Effect, NameError, NameOp, NewNode, Outcome, SetAttributes, TreeChange};
use super::state::{Directory, Inode, Lease, Node, State};
use crate::types::{Ino, SessionId, VolumeId};

/// Bytes in a name.
const MAX_NAME: usize = 255;
/// Bytes in the target of a symbolic link.
const MAX_TARGET: usize = 4095;
/// Names that lead to one file.
const MAX_LINKS: u32 = 65_000;
/// Bytes in the value of an extended attribute.
const MAX_XATTR: usize = 64 << 10;
/// Extended attributes of one inode.
const MAX_XATTRS: usize = 128;
/// The bricks' own directory in a volume's root.
const OWN: &[u8] = b".mortar";

type Step = Result<Outcome, NameError>;

impl State {
    pub(super) fn name(
        &mut self,
        session: SessionId,
        volume: VolumeId,
        operation: &NameOp,
        time_ns: u64,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let time = i64::try_from(time_ns).unwrap_or(i64::MAX);
        let mut step = Names { state: self, session, volume, time, effects };
        step.run(operation).unwrap_or_else(Outcome::Errno)
    }

    /// A session closed a file, or ended. Reclaims what has neither name nor opener.
    pub(super) fn closed(&mut self, ino: Ino, _time_ns: u64, effects: &mut Vec<Effect>) {
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.opens = inode.opens.saturating_sub(1);
            self.reclaim(ino, effects);
        }
    }

    fn reclaim(&mut self, ino: Ino, effects: &mut Vec<Effect>) {
        let Some(inode) = self.inodes.get(&ino) else { return };
        if inode.links > 0 || inode.opens > 0 {
            return;
        }
        if let Some(Inode { node: Node::File { set, lease }, .. }) = self.inodes.remove(&ino) {
            if let Some(holder) = lease.holder.and_then(|h| self.sessions.get_mut(&h)) {
                holder.leases.remove(&ino);
            }
            effects.push(Effect::Reclaimed { set, ino });
        }
    }
}

struct Names<'a> {
    state: &'a mut State,
    session: SessionId,
    volume: VolumeId,
    time: i64,
    effects: &'a mut Vec<Effect>,
}

impl Names<'_> {
    fn run(&mut self, operation: &NameOp) -> Step {
        match operation {
            NameOp::Create { parent, name, node, mode, uid, gid, or_existing, open } => {
                self.create(*parent, name, node, *mode, (*uid, *gid), *or_existing, *open)
            }
            NameOp::Link { ino, parent, name } => self.link(*ino, *parent, name),
            NameOp::Unlink { parent, name } => self.unlink(*parent, name),
            NameOp::Rmdir { parent, name } => self.rmdir(*parent, name),
            NameOp::Rename { parent, name, new_parent, new_name, no_replace, exchange } => {
                if *exchange && *no_replace {
                    return Err(NameError::Invalid);
                }
                if *exchange {
                    self.exchange((*parent, name), (*new_parent, new_name))
                } else {
                    self.rename((*parent, name), (*new_parent, new_name), *no_replace)
                }
            }
            NameOp::SetAttributes { ino, set } => self.set_attributes(*ino, set),
            NameOp::SetXattr { ino, name, value, create, replace } => {
                self.set_xattr(*ino, name, value, *create, *replace)
            }
            NameOp::RemoveXattr { ino, name } => {
                let time = self.time;
                let inode = self.inode(*ino)?;
                inode.xattrs.remove(name).ok_or(NameError::NoAttribute)?;
                inode.ctime_ns = time;
                Ok(Outcome::Done)
            }
            NameOp::Open { ino } => {
                self.inode(*ino)?;
                self.open(*ino);
                Ok(Outcome::Done)
            }
            NameOp::Close { inos } => {
                for ino in inos {
                    let was_open = self.state.sessions.get_mut(&self.session).is_some_and(|s| s.open.remove(ino));
                    if was_open {
                        self.state.closed(*ino, 0, self.effects);
                    }
                }
                Ok(Outcome::Done)
            }
        }
    }

    fn inode(&mut self, ino: Ino) -> Result<&mut Inode, NameError> {
        self.state.inodes.get_mut(&ino).filter(|i| i.volume == self.volume).ok_or(NameError::NotFound)
    }

    fn directory(&mut self, ino: Ino) -> Result<&mut Directory, NameError> {
        match &mut self.inode(ino)?.node {
            Node::Directory(directory) => Ok(directory),
            _ => Err(NameError::NotDirectory),
        }
    }

    fn is_directory(&self, ino: Ino) -> bool {
        matches!(self.state.inodes.get(&ino), Some(Inode { node: Node::Directory(_), .. }))
    }

    fn find(&mut self, parent: Ino, name: &[u8]) -> Result<Option<Ino>, NameError> {
        Ok(self.directory(parent)?.entries.get(name).map(|(ino, _)| *ino))
    }

    /// A name that may be made or taken away.
    fn check_name(&self, parent: Ino, name: &[u8]) -> Result<(), NameError> {
        if name.len() > MAX_NAME {
            return Err(NameError::NameTooLong);
        }
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
            return Err(NameError::Invalid);
        }
        if name == OWN && self.state.volumes.get(&self.volume).is_some_and(|v| v.root == parent) {
            return Err(NameError::NotPermitted);
        }
        Ok(())
    }

    fn node(&self, ino: Ino, created: bool) -> Step {
        let attributes = self.state.attributes(ino).ok_or(NameError::NotFound)?;
        Ok(Outcome::Node { attributes, created })
    }

    fn open(&mut self, ino: Ino) {
        let opened = self.state.sessions.get_mut(&self.session).is_some_and(|s| s.open.insert(ino));
        if opened && let Some(inode) = self.state.inodes.get_mut(&ino) {
            inode.opens += 1;
        }
    }

    /// Enters a name; the directory is there and does not have it.
    fn enter(&mut self, parent: Ino, name: &[u8], ino: Ino) -> Result<(), NameError> {
        let time = self.time;
        let directory = self.directory(parent)?;
        let cookie = directory.next_cookie;
        directory.next_cookie += 1;
        directory.entries.insert(name.to_vec(), (ino, cookie));
        directory.order.insert(cookie, name.to_vec());
        self.touch(parent, time);
        Ok(())
    }

    fn leave(&mut self, parent: Ino, name: &[u8]) -> Result<(), NameError> {
        let time = self.time;
        let directory = self.directory(parent)?;
        if let Some((_, cookie)) = directory.entries.remove(name) {
            directory.order.remove(&cookie);
        }
        self.touch(parent, time);
        Ok(())
    }

    fn touch(&mut self, ino: Ino, time: i64) {
        if let Some(inode) = self.state.inodes.get_mut(&ino) {
            inode.mtime_ns = time;
            inode.ctime_ns = time;
        }
    }

    fn changed(&mut self, ino: Ino) {
        let time = self.time;
        if let Some(inode) = self.state.inodes.get_mut(&ino) {
            inode.ctime_ns = time;
        }
    }

    fn add_links(&mut self, ino: Ino, by: i64) {
        if let Some(inode) = self.state.inodes.get_mut(&ino) {
            inode.links = u32::try_from(i64::from(inode.links) + by).unwrap_or(0);
        }
        self.changed(ino);
    }

    fn tree(&mut self, change: TreeChange) {
        self.effects.push(Effect::Named { volume: self.volume, change });
    }

    #[allow(clippy::too_many_arguments)]
    fn create(
        &mut self,
        parent: Ino,
        name: &[u8],
        node: &NewNode,
        mode: u32,
        owner: (u32, u32),
        or_existing: bool,
        open: bool,
    ) -> Step {
        self.check_name(parent, name)?;
        if let Some(ino) = self.find(parent, name)? {
            if !or_existing {
                return Err(NameError::Exists);
            }
            if self.is_directory(ino) {
                return Err(NameError::IsDirectory);
            }
            if open {
                self.open(ino);
            }
            return self.node(ino, false);
        }
        let directory = matches!(node, NewNode::Directory);
        let node = match node {
            NewNode::File => {
                Node::File { set: self.state.place(self.volume).ok_or(NameError::NoSpace)?, lease: Lease::default() }
            }
            NewNode::Directory => Node::Directory(Directory { parent, next_cookie: 3, ..Directory::default() }),
            NewNode::Symlink(target) if target.len() > MAX_TARGET => return Err(NameError::NameTooLong),
            NewNode::Symlink(target) if target.is_empty() || target.contains(&0) => return Err(NameError::Invalid),
            NewNode::Symlink(target) => Node::Symlink(target.clone()),
            NewNode::Special { format, rdev } => match format & 0o170_000 {
                0o010_000 | 0o020_000 | 0o060_000 | 0o140_000 => {
                    Node::Special { format: format & 0o170_000, rdev: *rdev }
                }
                _ => return Err(NameError::Invalid),
            },
        };
        if directory && self.inode(parent)?.links >= u32::MAX - 1 {
            return Err(NameError::TooManyLinks);
        }
        let ino = Ino(self.state.take_id());
        self.state.inodes.insert(
            ino,
            Inode {
                volume: self.volume,
                mode: mode & 0o7777,
                uid: owner.0,
                gid: owner.1,
                links: if directory { 2 } else { 1 },
                atime_ns: self.time,
                mtime_ns: self.time,
                ctime_ns: self.time,
                xattrs: BTreeMap::new(),
                opens: 0,
                node,
            },
        );
        self.enter(parent, name, ino)?;
        if directory {
            self.add_links(parent, 1);
        }
        if open {
            self.open(ino);
        }
        self.tree(TreeChange::Added { parent, name: name.to_vec(), ino });
        self.node(ino, true)
    }

    fn link(&mut self, ino: Ino, parent: Ino, name: &[u8]) -> Step {
        self.check_name(parent, name)?;
        let inode = self.inode(ino)?;
        if matches!(inode.node, Node::Directory(_)) {
            return Err(NameError::NotPermitted);
        }
        if inode.links == 0 {
            return Err(NameError::NotFound);
        }
        if inode.links >= MAX_LINKS {
            return Err(NameError::TooManyLinks);
        }
        if self.find(parent, name)?.is_some() {
            return Err(NameError::Exists);
        }
        self.enter(parent, name, ino)?;
        self.add_links(ino, 1);
        self.tree(TreeChange::Added { parent, name: name.to_vec(), ino });
        self.node(ino, false)
    }

    fn unlink(&mut self, parent: Ino, name: &[u8]) -> Step {
        let ino = self.find(parent, name)?.ok_or(NameError::NotFound)?;
        if self.is_directory(ino) {
            return Err(NameError::IsDirectory);
        }
        self.drop_name(parent, name, ino)?;
        Ok(Outcome::Done)
    }

    /// Takes a name of what is no directory away.
    fn drop_name(&mut self, parent: Ino, name: &[u8], ino: Ino) -> Result<(), NameError> {
        self.leave(parent, name)?;
        self.add_links(ino, -1);
        self.tree(TreeChange::Removed { parent, name: name.to_vec(), ino });
        let links = self.state.inodes.get(&ino).map_or(0, |i| i.links);
        if links == 0 && !matches!(self.state.inodes.get(&ino), Some(Inode { node: Node::File { .. }, .. })) {
            // Nothing but a file has data to be kept for those that have it open.
            self.state.inodes.remove(&ino);
            for session in self.state.sessions.values_mut() {
                session.open.remove(&ino);
            }
        } else {
            self.state.reclaim(ino, self.effects);
        }
        Ok(())
    }

    fn rmdir(&mut self, parent: Ino, name: &[u8]) -> Step {
        if name == b"." {
            return Err(NameError::Invalid);
        }
        if name == b".." {
            return Err(NameError::NotEmpty);
        }
        let ino = self.find(parent, name)?.ok_or(NameError::NotFound)?;
        if !self.directory(ino)?.entries.is_empty() {
            return Err(NameError::NotEmpty);
        }
        self.drop_directory(parent, name, ino)?;
        Ok(Outcome::Done)
    }

    fn drop_directory(&mut self, parent: Ino, name: &[u8], ino: Ino) -> Result<(), NameError> {
        self.leave(parent, name)?;
        self.add_links(parent, -1);
        self.state.inodes.remove(&ino);
        for session in self.state.sessions.values_mut() {
            session.open.remove(&ino);
        }
        self.tree(TreeChange::Removed { parent, name: name.to_vec(), ino });
        Ok(())
    }

    /// `inside` is `ino` or lies below it.
    fn is_below(&self, inside: Ino, ino: Ino) -> bool {
        let mut at = inside;
        let mut seen = BTreeSet::new();
        while seen.insert(at) {
            if at == ino {
                return true;
            }
            match self.state.inodes.get(&at) {
                Some(Inode { node: Node::Directory(d), .. }) => at = d.parent,
                _ => return false,
            }
        }
        false
    }

    fn rename(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8]), no_replace: bool) -> Step {
        self.check_name(to.0, to.1)?;
        let ino = self.find(from.0, from.1)?.ok_or(NameError::NotFound)?;
        let directory = self.is_directory(ino);
        if directory && self.is_below(to.0, ino) {
            return Err(NameError::Invalid);
        }
        match self.find(to.0, to.1)? {
            Some(_) if no_replace => return Err(NameError::Exists),
            Some(there) if there == ino => return Ok(Outcome::Done),
            Some(there) => match (directory, self.is_directory(there)) {
                (true, false) => return Err(NameError::NotDirectory),
                (false, true) => return Err(NameError::IsDirectory),
                (true, true) => {
                    if !self.directory(there)?.entries.is_empty() {
                        return Err(NameError::NotEmpty);
                    }
                    self.drop_directory(to.0, to.1, there)?;
                }
                (false, false) => self.drop_name(to.0, to.1, there)?,
            },
            None => {}
        }
        self.leave(from.0, from.1)?;
        self.enter(to.0, to.1, ino)?;
        if directory && from.0 != to.0 {
            self.add_links(from.0, -1);
            self.add_links(to.0, 1);
            self.directory(ino)?.parent = to.0;
        }
        self.changed(ino);
        self.tree(TreeChange::Moved {
            parent: from.0,
            name: from.1.to_vec(),
            new_parent: to.0,
            new_name: to.1.to_vec(),
            ino,
        });
        Ok(Outcome::Done)
    }

    fn exchange(&mut self, a: (Ino, &[u8]), b: (Ino, &[u8])) -> Step {
        let one = self.find(a.0, a.1)?.ok_or(NameError::NotFound)?;
        let other = self.find(b.0, b.1)?.ok_or(NameError::NotFound)?;
        if one == other {
            return Ok(Outcome::Done);
        }
        for (moved, target) in [(one, b.0), (other, a.0)] {
            if self.is_directory(moved) && self.is_below(target, moved) {
                return Err(NameError::Invalid);
            }
        }
        for (place, ino) in [(a, other), (b, one)] {
            if let Some(entry) = self.directory(place.0)?.entries.get_mut(place.1) {
                entry.0 = ino;
            }
            let time = self.time;
            self.touch(place.0, time);
        }
        for (moved, old, new) in [(one, a.0, b.0), (other, b.0, a.0)] {
            if self.is_directory(moved) && old != new {
                self.add_links(old, -1);
                self.add_links(new, 1);
                self.directory(moved)?.parent = new;
            }
            self.changed(moved);
        }
        self.tree(TreeChange::Exchanged { parent: a.0, name: a.1.to_vec(), new_parent: b.0, new_name: b.1.to_vec() });
        Ok(Outcome::Done)
    }

    fn set_attributes(&mut self, ino: Ino, set: &SetAttributes) -> Step {
        let (time, volume) = (self.time, self.volume);
        let inode = self.inode(ino)?;
        let before = (inode.mode, inode.uid, inode.gid);
        inode.mode = set.mode.map_or(inode.mode, |m| m & 0o7777);
        inode.uid = set.uid.unwrap_or(inode.uid);
        inode.gid = set.gid.unwrap_or(inode.gid);
        inode.atime_ns = set.atime_ns.unwrap_or(inode.atime_ns);
        inode.mtime_ns = set.mtime_ns.unwrap_or(inode.mtime_ns);
        inode.ctime_ns = time;
        if before != (inode.mode, inode.uid, inode.gid) {
            self.effects.push(Effect::Owned { volume, ino });
        }
        self.node(ino, false)
    }

    fn set_xattr(&mut self, ino: Ino, name: &[u8], value: &[u8], create: bool, replace: bool) -> Step {
        if name.is_empty() || name.contains(&0) {
            return Err(NameError::Invalid);
        }
        if name.len() > MAX_NAME {
            return Err(NameError::NameTooLong);
        }
        if value.len() > MAX_XATTR {
            return Err(NameError::TooBig);
        }
        let time = self.time;
        let inode = self.inode(ino)?;
        let there = inode.xattrs.contains_key(name);
        if create && there {
            return Err(NameError::Exists);
        }
        if replace && !there {
            return Err(NameError::NoAttribute);
        }
        if !there && inode.xattrs.len() >= MAX_XATTRS {
            return Err(NameError::NoSpace);
        }
        inode.xattrs.insert(name.to_vec(), value.to_vec());
        inode.ctime_ns = time;
        Ok(Outcome::Done)
    }
}
