//! The volume's own tree on a brick: plain directories, hard links to the objects, symbolic links.
//!
//! It is derived from the metadata log and is what makes an image survive Mortar itself: with every daemon gone, `cp` gets it
//! back. A change is made as the log tells it; whatever cannot be made so is mended by comparing the whole.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mortar_proto::metadata::TreeChange;
use mortar_proto::metadata::state::{Inode, Node, State};
use mortar_proto::{Ino, SetId, VolumeId};

use crate::store::Objects;

const OWN: &str = ".mortar";

/// The keeper of one brick's tree.
pub struct Tree {
    root: PathBuf,
    set: SetId,
    objects: Arc<Objects>,
    /// Where each directory is now, on the disk: the log may be ahead of it.
    directories: HashMap<Ino, PathBuf>,
}

impl Tree {
    /// A keeper that knows nothing yet: [`Tree::mend`] comes first.
    #[must_use]
    pub fn new(root: &Path, set: SetId, objects: Arc<Objects>) -> Self {
        Self { root: root.to_owned(), set, objects, directories: HashMap::new() }
    }

    /// Makes one change.
    ///
    /// # Errors
    /// When the disk is not as expected; mending helps.
    pub fn apply(&mut self, change: &TreeChange, state: &State) -> io::Result<()> {
        match change {
            TreeChange::Added { parent, name, ino } => {
                let path = self.path(*parent, name)?;
                match state.inodes.get(ino) {
                    Some(inode) => self.make(*ino, inode, &path),
                    // It is gone again by now.
                    None => Ok(()),
                }
            }
            TreeChange::Removed { parent, name, ino } => {
                self.directories.remove(ino);
                remove(&self.path(*parent, name)?)
            }
            TreeChange::Moved { parent, name, new_parent, new_name, ino } => {
                let (from, to) = (self.path(*parent, name)?, self.path(*new_parent, new_name)?);
                if from.symlink_metadata().is_err() {
                    // A file of another set.
                    return Ok(());
                }
                fs::rename(&from, &to)?;
                self.moved(*ino, &from, &to);
                Ok(())
            }
            TreeChange::Exchanged { .. } => Err(io::Error::other("two names were swapped")),
        }
    }

    /// Owner or mode of a node changed.
    pub fn owned(&self, ino: Ino, state: &State) -> io::Result<()> {
        let Some(inode) = state.inodes.get(&ino) else { return Ok(()) };
        match &inode.node {
            Node::File { set, .. } if *set == self.set => own(&self.objects.data_path(ino), inode),
            Node::Directory(_) => self.directories.get(&ino).map_or(Ok(()), |path| own(path, inode)),
            _ => Ok(()),
        }
    }

    /// Makes the tree equal to the state.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn mend(&mut self, volume: VolumeId, state: &State) -> io::Result<()> {
        self.directories.clear();
        let Some(root) = state.volumes.get(&volume).map(|v| v.root) else { return Ok(()) };
        let mut todo = vec![(root, self.root.clone())];
        while let Some((ino, path)) = todo.pop() {
            self.directories.insert(ino, path.clone());
            let Some(Inode { node: Node::Directory(directory), .. }) = state.inodes.get(&ino) else { continue };
            for found in fs::read_dir(&path)? {
                let name = found?.file_name();
                let ours = path == self.root && name == OWN;
                if !ours && !directory.entries.contains_key(name.as_bytes()) {
                    remove(&path.join(&name))?;
                }
            }
            for (name, (child, _)) in &directory.entries {
                let Some(inode) = state.inodes.get(child) else { continue };
                let at = path.join(OsStr::from_bytes(name));
                self.make(*child, inode, &at)?;
                if matches!(inode.node, Node::Directory(_)) {
                    todo.push((*child, at));
                }
            }
        }
        Ok(())
    }

    fn path(&self, parent: Ino, name: &[u8]) -> io::Result<PathBuf> {
        let parent =
            self.directories.get(&parent).ok_or_else(|| io::Error::other("a directory is not where it should be"))?;
        Ok(parent.join(OsString::from(OsStr::from_bytes(name))))
    }

    fn moved(&mut self, ino: Ino, from: &Path, to: &Path) {
        if !self.directories.contains_key(&ino) {
            return;
        }
        for path in self.directories.values_mut() {
            if let Ok(rest) = path.strip_prefix(from) {
                *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
    }

    /// Makes `path` lead to `inode`, whatever was there.
    fn make(&mut self, ino: Ino, inode: &Inode, path: &Path) -> io::Result<()> {
        let there = path.symlink_metadata().ok();
        match &inode.node {
            Node::File { set, .. } => {
                if *set != self.set {
                    return if there.is_some() { remove(path) } else { Ok(()) };
                }
                self.objects.adopt(ino, path).map_err(io::Error::other)?;
                self.objects.ensure(ino).map_err(io::Error::other)?;
                let object = self.objects.data_path(ino);
                let same = there
                    .as_ref()
                    .is_some_and(|t| fs::metadata(&object).is_ok_and(|o| o.ino() == t.ino() && o.dev() == t.dev()));
                if !same {
                    if there.is_some() {
                        remove(path)?;
                    }
                    fs::hard_link(&object, path)?;
                }
                own(&object, inode)
            }
            Node::Directory(_) => {
                if !there.is_some_and(|t| t.is_dir()) {
                    remove(path)?;
                    fs::create_dir(path)?;
                }
                self.directories.insert(ino, path.to_owned());
                own(path, inode)
            }
            Node::Symlink(target) => {
                let target = Path::new(OsStr::from_bytes(target));
                if fs::read_link(path).ok().as_deref() != Some(target) {
                    remove(path)?;
                    std::os::unix::fs::symlink(target, path)?;
                }
                Ok(())
            }
            Node::Special { format, .. } => {
                // Devices and sockets mean nothing on a brick; a FIFO stands for their names.
                let _ = format;
                if !there.is_some_and(|t| t.file_type().is_fifo()) {
                    remove(path)?;
                    rustix::fs::mknodat(
                        rustix::fs::CWD,
                        path,
                        rustix::fs::FileType::Fifo,
                        rustix::fs::Mode::from_raw_mode(0o600),
                        0,
                    )?;
                }
                Ok(())
            }
        }
    }
}

fn own(path: &Path, inode: &Inode) -> io::Result<()> {
    let there = fs::metadata(path)?;
    if (there.uid(), there.gid()) != (inode.uid, inode.gid) {
        std::os::unix::fs::lchown(path, Some(inode.uid), Some(inode.gid))?;
    }
    if there.mode() & 0o7777 != inode.mode {
        fs::set_permissions(path, fs::Permissions::from_mode(inode.mode))?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
