//! Open files: a handle per open(2), and one entry per inode that the log counts as open by this mount.
//!
//! The log hears of the first open of an inode, before it is answered, and some time after the last release that it is
//! closed. An inode that is opened again in between stays open; one that is being closed is waited for, so that the log never
//! sees an `Open` overtaken by an older `Close`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mortar_proto::Ino;
use mortar_proto::client::FileId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

/// An inode that this mount has open.
#[derive(Debug)]
pub struct OpenFile {
    /// Which.
    pub file: FileId,
    /// Held from finding the end of the file to having written there.
    pub append: tokio::sync::Mutex<()>,
    /// What a write would have to take away.
    pub privileges: Privileges,
}

/// What is known of set-user-id, set-group-id and file capabilities, which a write takes away.
///
/// Only "there are none" is remembered; another mount's chmod or setcap on a file that is open here is not seen until this
/// mount looks at the file's attributes, or opens it anew.
#[derive(Debug, Default)]
pub struct Privileges {
    no_bits: AtomicBool,
    no_capability: AtomicBool,
}

impl Privileges {
    /// A write must look. `kill`: the writer may not keep set-user-id bits.
    #[must_use]
    pub fn must_look(&self, kill: bool) -> bool {
        !self.no_capability.load(Ordering::Acquire) || (kill && !self.no_bits.load(Ordering::Acquire))
    }
    /// The file has no capability, and bits that a write takes away or not.
    pub fn looked(&self, bits: bool) {
        self.no_bits.store(!bits, Ordering::Release);
        self.no_capability.store(true, Ordering::Release);
    }
    /// A mode was seen, or set.
    pub fn bits_seen(&self) {
        self.no_bits.store(false, Ordering::Release);
    }
    /// A capability may have been set.
    pub fn capability_set(&self) {
        self.no_capability.store(false, Ordering::Release);
    }
}

/// One open(2).
#[derive(Debug)]
pub struct Handle {
    /// Of what.
    pub open: Arc<OpenFile>,
    /// The kernel has cut a request of this handle at a place that is no multiple of a sector, see `data`.
    pub was_cut: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// The log is being told that it is open.
    Opening,
    /// The log knows.
    Open,
    /// The log is being told that it is closed.
    Closing,
}

#[derive(Debug)]
struct Entry {
    open: Arc<OpenFile>,
    handles: usize,
    stage: Stage,
}

/// What whoever opens a file has to do.
#[derive(Debug)]
pub enum Claim {
    /// Nothing: the log knows that it is open.
    Ready(Arc<OpenFile>),
    /// Tell the log, then [`Handles::opened`].
    First(Arc<OpenFile>),
    /// Wait for [`Handles::changed`], and claim again.
    Wait,
}

/// All open files.
#[derive(Debug, Default)]
pub struct Handles {
    by_number: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
    inodes: Mutex<HashMap<Ino, Entry>>,
    /// Told when an inode has become open or closed.
    pub changed: Notify,
    /// Told when an inode has lost its last handle.
    pub idle: Notify,
}

impl Handles {
    /// Opens an inode once more. `known`: the log knows already, because it was created open.
    pub fn claim(&self, file: FileId, known: bool) -> Claim {
        let mut inodes = self.inodes.lock();
        match inodes.get_mut(&file.ino) {
            Some(entry) if entry.stage == Stage::Open => {
                entry.handles += 1;
                Claim::Ready(Arc::clone(&entry.open))
            }
            Some(_) => Claim::Wait,
            None => {
                let open =
                    Arc::new(OpenFile { file, append: tokio::sync::Mutex::new(()), privileges: Privileges::default() });
                let stage = if known { Stage::Open } else { Stage::Opening };
                inodes.insert(file.ino, Entry { open: Arc::clone(&open), handles: 1, stage });
                if known { Claim::Ready(open) } else { Claim::First(open) }
            }
        }
    }

    /// The log was told of a first open, or refused.
    pub fn opened(&self, ino: Ino, succeeded: bool) {
        let mut inodes = self.inodes.lock();
        if succeeded {
            if let Some(entry) = inodes.get_mut(&ino) {
                entry.stage = Stage::Open;
            }
        } else {
            inodes.remove(&ino);
        }
        drop(inodes);
        self.changed.notify_waiters();
    }

    /// A handle for a claim.
    pub fn insert(&self, open: Arc<OpenFile>) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.by_number.write().insert(number, Arc::new(Handle { open, was_cut: AtomicBool::new(false) }));
        number
    }

    /// The handle of that number.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.by_number.read().get(&number).cloned()
    }

    /// The inode, if it is open.
    #[must_use]
    pub fn of_inode(&self, ino: Ino) -> Option<Arc<OpenFile>> {
        self.inodes.lock().get(&ino).filter(|e| e.handles > 0).map(|e| Arc::clone(&e.open))
    }

    /// A handle is closed. Returns the file if it was the last one of its inode.
    pub fn release(&self, number: u64) -> Option<FileId> {
        let handle = self.by_number.write().remove(&number)?;
        self.let_go(handle.open.file)
    }

    /// A claim is given back that no handle was made for.
    pub fn let_go(&self, file: FileId) -> Option<FileId> {
        let mut inodes = self.inodes.lock();
        let entry = inodes.get_mut(&file.ino)?;
        entry.handles = entry.handles.saturating_sub(1);
        if entry.handles > 0 {
            return None;
        }
        drop(inodes);
        self.idle.notify_one();
        Some(file)
    }

    /// Inodes without a handle, at most `limit`: the log is to be told that they are closed, then [`Self::closed`].
    pub fn take_idle(&self, limit: usize) -> Vec<Ino> {
        let mut inodes = self.inodes.lock();
        let idle = inodes.iter_mut().filter(|(_, e)| e.handles == 0 && e.stage == Stage::Open).take(limit);
        idle.map(|(ino, entry)| {
            entry.stage = Stage::Closing;
            *ino
        })
        .collect()
    }

    /// The log was told that these are closed; if that failed they count as open, and are closed later.
    pub fn closed(&self, inos: &[Ino], succeeded: bool) {
        let mut inodes = self.inodes.lock();
        for ino in inos {
            if succeeded {
                inodes.remove(ino);
            } else if let Some(entry) = inodes.get_mut(ino) {
                entry.stage = Stage::Open;
            }
        }
        drop(inodes);
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use mortar_proto::SetId;

    use super::*;

    const FILE: FileId = FileId { ino: Ino(7), set: SetId(1) };

    fn first(handles: &Handles) -> u64 {
        let Claim::First(open) = handles.claim(FILE, false) else { panic!("the log is to be told") };
        handles.opened(FILE.ino, true);
        handles.insert(open)
    }

    fn ready(handles: &Handles) -> u64 {
        let Claim::Ready(open) = handles.claim(FILE, false) else { panic!("the log knows") };
        handles.insert(open)
    }

    #[test]
    fn the_log_hears_of_the_first_open_and_of_the_last_release_only() {
        let handles = Handles::default();
        let a = first(&handles);
        let b = ready(&handles);
        assert_ne!(a, b);
        assert_eq!(handles.release(a), None);
        assert!(handles.take_idle(9).is_empty());
        assert_eq!(handles.release(b), Some(FILE));
        assert_eq!(handles.take_idle(9), [FILE.ino]);
        handles.closed(&[FILE.ino], true);
        first(&handles);
    }

    #[test]
    fn a_file_opened_again_before_the_log_heard_of_the_release_stays_open() {
        let handles = Handles::default();
        let a = first(&handles);
        handles.release(a);
        ready(&handles);
        assert!(handles.take_idle(9).is_empty());
    }

    #[test]
    fn an_open_waits_for_a_close_under_way() {
        let handles = Handles::default();
        let a = first(&handles);
        handles.release(a);
        assert_eq!(handles.take_idle(9), [FILE.ino]);
        assert!(matches!(handles.claim(FILE, false), Claim::Wait));
        assert!(handles.take_idle(9).is_empty());
        handles.closed(&[FILE.ino], true);
        first(&handles);
    }

    #[test]
    fn a_close_that_failed_is_tried_again() {
        let handles = Handles::default();
        let a = first(&handles);
        handles.release(a);
        assert_eq!(handles.take_idle(9), [FILE.ino]);
        handles.closed(&[FILE.ino], false);
        assert_eq!(handles.take_idle(9), [FILE.ino]);
    }

    #[test]
    fn an_open_that_the_log_refused_leaves_nothing_behind() {
        let handles = Handles::default();
        assert!(matches!(handles.claim(FILE, false), Claim::First(_)));
        assert!(matches!(handles.claim(FILE, false), Claim::Wait));
        handles.opened(FILE.ino, false);
        assert!(handles.of_inode(FILE.ino).is_none());
        first(&handles);
    }

    #[test]
    fn a_file_that_was_created_open_needs_no_word_to_the_log() {
        let handles = Handles::default();
        assert!(matches!(handles.claim(FILE, true), Claim::Ready(_)));
        assert!(matches!(handles.claim(FILE, false), Claim::Ready(_)));
    }

    #[test]
    fn an_unknown_handle_is_nobodys() {
        let handles = Handles::default();
        assert!(handles.get(0).is_none());
        assert_eq!(handles.release(3), None);
    }

    #[test]
    fn a_write_looks_once_and_again_after_a_mode_or_a_capability_was_set() {
        let privileges = Privileges::default();
        assert!(privileges.must_look(false) && privileges.must_look(true));
        privileges.looked(false);
        assert!(!privileges.must_look(false) && !privileges.must_look(true));
        privileges.bits_seen();
        assert!(!privileges.must_look(false) && privileges.must_look(true));
        privileges.looked(true);
        assert!(privileges.must_look(true));
        privileges.looked(false);
        privileges.capability_set();
        assert!(privileges.must_look(false));
    }
}
