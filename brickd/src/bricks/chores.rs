//! What a brick does on its disk because names change: the tree of names, objects that are gone. In a thread of its own and in
//! the log's order; requests do not wait for it.

use std::sync::{Arc, Weak};

use crossbeam_channel::Receiver;
use mortar_proto::metadata::TreeChange;
use mortar_proto::metadata::state::{Directory, Inode, Node, State};
use mortar_proto::{Ino, LogIndex};

use super::brick::Brick;
use crate::tree::Tree;

/// Something to do.
pub(super) enum Chore {
    /// A name changed; what it leads to comes along, as far as it still is.
    Named(LogIndex, TreeChange, State),
    /// Owner or mode changed.
    Owned(LogIndex, Ino, State),
    /// Make everything as the log has it.
    Mend,
    /// The file is gone.
    Remove(Ino),
}

/// A state that has one inode, without what a directory contains.
fn only(ino: Ino, state: &State) -> State {
    let mut only = State::default();
    if let Some(inode) = state.inodes.get(&ino) {
        let node = match &inode.node {
            Node::Directory(_) => Node::Directory(Directory::default()),
            node => node.clone(),
        };
        only.inodes.insert(ino, Inode { node, xattrs: Default::default(), ..*inode });
    }
    only
}

impl Chore {
    pub(super) fn named(index: LogIndex, change: TreeChange, state: &State) -> Self {
        let state = match &change {
            TreeChange::Added { ino, .. } => only(*ino, state),
            _ => State::default(),
        };
        Self::Named(index, change, state)
    }

    pub(super) fn owned(index: LogIndex, ino: Ino, state: &State) -> Option<Self> {
        state.inodes.contains_key(&ino).then(|| Self::Owned(index, ino, only(ino, state)))
    }
}

/// Starts the brick's thread for chores; it ends with the brick.
pub(super) fn start(brick: &Arc<Brick>, tree: Tree, to_do: Receiver<Arc<Chore>>) -> std::io::Result<()> {
    let weak = Arc::downgrade(brick);
    std::thread::Builder::new().name("brick-chores".into()).spawn(move || {
        let mut keeper = Keeper { brick: weak, tree, mended: None };
        while let Ok(chore) = to_do.recv() {
            let Some(brick) = keeper.brick.upgrade().filter(|b| !b.is_closed() && !b.has_failed()) else { continue };
            brick.guarded(|| keeper.act(&brick, &chore));
        }
    })?;
    Ok(())
}

struct Keeper {
    brick: Weak<Brick>,
    tree: Tree,
    /// The tree is as the log had it here at least; `None`: it may be anything.
    mended: Option<LogIndex>,
}

impl Keeper {
    fn act(&mut self, brick: &Brick, chore: &Chore) {
        match chore {
            Chore::Named(index, change, state) => self.change(brick, *index, |tree| tree.apply(change, state)),
            Chore::Owned(index, ino, state) => self.change(brick, *index, |tree| tree.owned(*ino, state)),
            Chore::Mend => {
                brick.remove_what_is_gone();
                self.mend(brick);
            }
            Chore::Remove(ino) => {
                if let Err(e) = brick.objects.remove(*ino) {
                    brick.complain(&e);
                }
            }
        }
    }

    fn change(&mut self, brick: &Brick, index: LogIndex, act: impl FnOnce(&mut Tree) -> std::io::Result<()>) {
        match self.mended {
            // Mending has seen to it already; to do it now might undo something newer.
            Some(mended) if index <= mended => {}
            Some(_) => {
                if let Err(e) = act(&mut self.tree) {
                    tracing::debug!(brick = %brick.id, "the tree is mended: {e}");
                    self.mend(brick);
                }
            }
            None => self.mend(brick),
        }
    }

    fn mend(&mut self, brick: &Brick) {
        // A copy: the log must not wait for this disk.
        let state = brick.log.with_state(State::clone);
        self.mended = match self.tree.mend(brick.volume, &state) {
            Ok(()) => Some(state.applied),
            Err(e) => {
                tracing::error!(brick = %brick.id, "the tree in {} cannot be mended: {e}", brick.dir.root().display());
                None
            }
        };
    }
}

fn is_gone(state: &State, ino: Ino) -> bool {
    ino.0 < state.next_id && !state.inodes.contains_key(&ino)
}

impl Brick {
    /// Removes objects and records of files that the log does not have any more.
    fn remove_what_is_gone(&self) {
        match self.objects.inodes() {
            Ok(found) => self.forget_what_is_gone(found),
            Err(e) => self.complain(&e),
        }
    }

    /// Of `known`, and of what there are records of, files that are gone for good are forgotten. A server that has just
    /// started goes through the log once more, so a file that the state lacks may be one that it does not have *yet*: only
    /// numbers that it has given out already can be gone.
    pub(super) fn forget_what_is_gone(&self, mut known: Vec<Ino>) {
        {
            let replica = self.replica.lock();
            known.extend(replica.intents().into_iter().map(|(ino, _)| ino));
            known.extend(replica.lacking().into_iter().map(|(ino, _)| ino));
            for x in mortar_proto::config::Slot::ALL {
                known.extend(replica.missed(x).into_iter().map(|(ino, _)| ino));
            }
        }
        known.sort_unstable();
        known.dedup();
        self.log.with_state(|state| known.retain(|ino| is_gone(state, *ino)));
        for ino in known {
            self.reclaimed(ino);
        }
    }

    /// The file was deleted and is gone for good.
    pub(super) fn is_gone(&self, ino: Ino) -> bool {
        self.log.with_state(|state| is_gone(state, ino))
    }
}
