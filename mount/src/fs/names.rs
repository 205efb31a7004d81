//! Directories and the names in them. Every change is one entry in the metadata log.

use std::sync::Arc;

use mortar_proto::Ino;
use mortar_proto::client::DataStat;
use mortar_proto::metadata::{Answer, Attributes, DirectoryEntry, NameOp, NewNode, Query};

use super::handles::Claim;
use super::{Caller, Errno, Fs, Node, file_of, unfitting};

/// Entries that are asked for at once: about what the kernel's buffer for a listing holds.
const ENTRIES_AT_ONCE: u32 = 256;

/// A place where a name is, or is to be.
#[derive(Clone, Debug)]
pub struct Place {
    /// The directory.
    pub parent: Ino,
    /// The name.
    pub name: Vec<u8>,
}

impl Fs {
    /// What a name leads to.
    pub async fn lookup(&self, place: Place) -> Result<Node, Errno> {
        let Place { parent, name } = place;
        let attributes = self.ask_attributes(Query::Lookup { parent, name }).await?;
        self.node(attributes).await
    }

    /// Makes something that is not opened. `mode`: permission bits.
    pub async fn make(&self, caller: Caller, place: Place, node: NewNode, mode: u32) -> Result<Node, Errno> {
        let attributes = self.submit_node(self.creation(caller, place, node, mode, false).await?).await?;
        Ok(new(attributes))
    }

    /// Makes a file and opens it.
    pub async fn create(
        self: &Arc<Self>,
        caller: Caller,
        place: Place,
        mode: u32,
        exclusive: bool,
    ) -> Result<(Node, u64), Errno> {
        let creation = self.creation(caller, place, NewNode::File, mode, true).await?;
        let attributes = match self.submit_node(creation).await {
            // Another mount was faster. The kernel walks the path again, finds that file, and checks who may open it.
            Err(Errno::EXIST) if !exclusive => return Err(Errno::STALE),
            result => result?,
        };
        let open = self.claim(file_of(&attributes)?, true).await?;
        Ok((new(attributes), self.handles.insert(open)))
    }

    async fn creation(
        &self,
        caller: Caller,
        place: Place,
        node: NewNode,
        mode: u32,
        open: bool,
    ) -> Result<NameOp, Errno> {
        let directory = self.attributes(place.parent).await?;
        let inherits = directory.mode & libc::S_ISGID != 0;
        let set_gid = if inherits && node == NewNode::Directory { libc::S_ISGID } else { 0 };
        Ok(NameOp::Create {
            parent: place.parent,
            name: place.name,
            node,
            mode: mode & 0o7777 | set_gid,
            uid: caller.uid,
            gid: if inherits { directory.gid } else { caller.gid },
            or_existing: false,
            open,
        })
    }

    /// A further name.
    pub async fn link(&self, ino: Ino, place: Place) -> Result<Node, Errno> {
        let attributes = self.submit_node(NameOp::Link { ino, parent: place.parent, name: place.name }).await?;
        self.node(attributes).await
    }

    /// Takes a name of what is no directory away.
    pub async fn unlink(&self, place: Place) -> Result<(), Errno> {
        self.submit(NameOp::Unlink { parent: place.parent, name: place.name }).await.map(drop)
    }

    /// Removes an empty directory.
    pub async fn rmdir(&self, place: Place) -> Result<(), Errno> {
        self.submit(NameOp::Rmdir { parent: place.parent, name: place.name }).await.map(drop)
    }

    /// Moves a name; `flags` as for renameat2(2).
    pub async fn rename(&self, from: Place, to: Place, flags: u32) -> Result<(), Errno> {
        let (no_replace, exchange) = match flags {
            0 => (false, false),
            libc::RENAME_NOREPLACE => (true, false),
            libc::RENAME_EXCHANGE => (false, true),
            _ => return Err(Errno::INVAL),
        };
        let operation = NameOp::Rename {
            parent: from.parent,
            name: from.name,
            new_parent: to.parent,
            new_name: to.name,
            no_replace,
            exchange,
        };
        self.submit(operation).await.map(drop)
    }

    /// Where a symbolic link points.
    pub async fn read_link(&self, ino: Ino) -> Result<Vec<u8>, Errno> {
        match self.ask(Query::ReadLink { ino }).await.map_err(Errno::of_inode)? {
            Answer::Bytes(target) => Ok(target),
            answer => Err(unfitting(&answer)),
        }
    }

    /// Some entries of a directory, after the one with cookie `after`; none at the end.
    pub async fn list(&self, ino: Ino, after: u64) -> Result<Vec<DirectoryEntry>, Errno> {
        match self.ask(Query::List { ino, after, limit: ENTRIES_AT_ONCE }).await.map_err(Errno::of_inode)? {
            Answer::Entries(entries) => Ok(entries),
            answer => Err(unfitting(&answer)),
        }
    }

    /// Opens an inode, telling the log if this mount has not had it open.
    pub(super) async fn claim(
        self: &Arc<Self>,
        file: mortar_proto::client::FileId,
        mut known: bool,
    ) -> Result<Arc<super::handles::OpenFile>, Errno> {
        loop {
            // Before looking, or what happens in between is missed.
            let changed = self.handles.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.handles.claim(file, known) {
                Claim::Ready(open) => return Ok(open),
                Claim::First(open) => {
                    // Also if this task ends in another way than expected, those that wait must not wait for ever.
                    let mut telling = Telling { fs: self, ino: file.ino, succeeded: false };
                    // ESTALE: a name may lead to another inode since the kernel looked.
                    self.submit(NameOp::Open { ino: file.ino }).await.map_err(Errno::of_inode)?;
                    telling.succeeded = true;
                    return Ok(open);
                }
                Claim::Wait => changed.await,
            }
            // What was created open has been closed meanwhile, perhaps.
            known = false;
        }
    }
}

struct Telling<'a> {
    fs: &'a Fs,
    ino: Ino,
    succeeded: bool,
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.fs.handles.opened(self.ino, self.succeeded);
    }
}

/// A node that was just made: its data, if it has any, is empty.
fn new(attributes: Attributes) -> Node {
    let data = attributes.set.map(|_| DataStat { size: 0, blocks: 0, mtime_ns: attributes.mtime_ns });
    Node { attributes, data }
}
