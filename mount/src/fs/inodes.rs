//! Inodes as the kernel knows them: their numbers, and where their data is for as long as the kernel remembers them.

use std::collections::HashMap;

use mortar_proto::{Ino, SetId};
use parking_lot::Mutex;

/// FUSE's number of the root directory.
const FUSE_ROOT: u64 = 1;

/// The kernel's inode numbers and the volume's: equal, except that the root's and 1 change places.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    root: u64,
}

impl Numbers {
    /// For a volume with this root directory.
    #[must_use]
    pub fn new(root: Ino) -> Self {
        Self { root: root.0 }
    }
    /// The kernel's number of an inode of the volume.
    #[must_use]
    pub fn kernel_number(self, ino: Ino) -> u64 {
        self.swap(ino.0)
    }
    /// The volume's inode of one of the kernel's numbers.
    #[must_use]
    pub fn inode(self, number: u64) -> Ino {
        Ino(self.swap(number))
    }
    fn swap(self, number: u64) -> u64 {
        match number {
            FUSE_ROOT => self.root,
            n if n == self.root => FUSE_ROOT,
            n => n,
        }
    }
}

/// What the kernel remembers.
#[derive(Default, Debug)]
pub struct Known(Mutex<HashMap<Ino, Entry>>);

#[derive(Debug)]
struct Entry {
    /// Of a regular file: where its data is, which never changes.
    set: Option<SetId>,
    /// How often the kernel was told of it, less what it has forgotten.
    lookups: u64,
}

impl Known {
    /// The kernel is told of an inode.
    pub fn told(&self, ino: Ino, set: Option<SetId>) {
        self.0.lock().entry(ino).or_insert(Entry { set, lookups: 0 }).lookups += 1;
    }
    /// The kernel forgets `lookups` of what it was told.
    pub fn forget(&self, ino: Ino, lookups: u64) {
        let mut known = self.0.lock();
        if let Some(entry) = known.get_mut(&ino) {
            entry.lookups = entry.lookups.saturating_sub(lookups);
            if entry.lookups == 0 {
                known.remove(&ino);
            }
        }
    }
    /// Where a regular file's data is, if the kernel was told of it.
    #[must_use]
    pub fn set(&self, ino: Ino) -> Option<SetId> {
        self.0.lock().get(&ino).and_then(|entry| entry.set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_the_kernels_1_and_every_number_leads_back() {
        for root in [1, 2, 77] {
            let numbers = Numbers::new(Ino(root));
            assert_eq!(numbers.kernel_number(Ino(root)), 1);
            assert_eq!(numbers.inode(1), Ino(root));
            for n in [0, 1, 2, 3, 76, 77, u64::MAX] {
                assert_eq!(numbers.inode(numbers.kernel_number(Ino(n))), Ino(n));
            }
        }
    }

    #[test]
    fn an_inode_is_known_until_the_kernel_has_forgotten_each_telling() {
        let known = Known::default();
        known.told(Ino(5), Some(SetId(9)));
        known.told(Ino(5), Some(SetId(9)));
        known.forget(Ino(5), 1);
        assert_eq!(known.set(Ino(5)), Some(SetId(9)));
        known.forget(Ino(5), 7);
        assert_eq!(known.set(Ino(5)), None);
        known.forget(Ino(5), 1);
    }
}
