//! What each file operation means, on a [`Volume`]: names and owners from the log, sizes and bytes from the data.
//!
//! | file | owns |
//! | --- | --- |
//! | `inodes` | the kernel's inode numbers, and what it remembers |
//! | `handles` | open files |
//! | `names` | lookup, create, rename and their kin |
//! | `attributes` | getattr, setattr, statfs, set-user-id bits |
//! | `xattrs` | extended attributes |
//! | `data` | open, read, write, truncate, allocate, seek, flush |
//! | `error` | `errno` |
//!
//! Nothing here is cached that another mount could make stale, except what `handles::Privileges` says. Nothing here knows
//! FUSE's messages: `crate::fuse` decodes and replies.

pub mod attributes;
pub mod data;
pub mod error;
pub mod handles;
pub mod inodes;
pub mod names;
pub mod xattrs;

use std::sync::{Arc, Weak};
use std::time::Duration;

use mortar_proto::Ino;
use mortar_proto::client::{DataStat, FileId, IoError, Volume};
use mortar_proto::metadata::{Answer, Attributes, NameOp, Outcome, Query};
use tokio::runtime::Handle;

pub use error::Errno;
use handles::Handles;
use inodes::{Known, Numbers};

/// How long a file stays open in the log after its last release: a program that opens it again at once costs no entry.
const CLOSE_AFTER: Duration = Duration::from_millis(100);
/// The wait before a close that failed is tried again.
const CLOSE_AGAIN: Duration = Duration::from_secs(1);
/// Inodes in one entry of the log that closes them.
const CLOSE_AT_ONCE: usize = 256;

/// A mounted volume as a file system.
pub struct Fs {
    volume: Arc<Volume>,
    runtime: Handle,
    /// The kernel's inode numbers.
    pub numbers: Numbers,
    /// What the kernel remembers.
    pub known: Known,
    handles: Arc<Handles>,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// An inode with all its attributes.
#[derive(Clone, Debug)]
pub struct Node {
    /// What the log knows.
    pub attributes: Attributes,
    /// Of a regular file, what its data knows.
    pub data: Option<DataStat>,
}

impl Fs {
    /// For a mounted volume.
    #[must_use]
    pub fn new(volume: Arc<Volume>, runtime: Handle) -> Arc<Self> {
        let handles = Arc::<Handles>::default();
        let numbers = Numbers::new(volume.root());
        runtime.spawn(close_idle(Arc::downgrade(&volume), Arc::downgrade(&handles)));
        Arc::new(Self { volume, runtime, numbers, known: Known::default(), handles })
    }

    /// Where to run what must not block a thread that reads the kernel's requests.
    #[must_use]
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    async fn ask(&self, query: Query) -> Result<Answer, Errno> {
        match self.volume.ask(query).await? {
            Answer::Errno(error) => Err(error.into()),
            answer => Ok(answer),
        }
    }

    async fn submit(&self, operation: NameOp) -> Result<Outcome, Errno> {
        match self.volume.submit(operation).await? {
            Outcome::Errno(error) => Err(error.into()),
            Outcome::Refused(sentence) => {
                tracing::warn!("a change of names was refused: {sentence}");
                Err(Errno::IO)
            }
            Outcome::Superseded => Err(Errno::IO),
            outcome => Ok(outcome),
        }
    }

    async fn ask_attributes(&self, query: Query) -> Result<Attributes, Errno> {
        match self.ask(query).await? {
            Answer::Attributes(attributes) => {
                self.seen(&attributes);
                Ok(attributes)
            }
            answer => Err(unfitting(&answer)),
        }
    }

    async fn submit_node(&self, operation: NameOp) -> Result<Attributes, Errno> {
        match self.submit(operation).await? {
            Outcome::Node { attributes, .. } => {
                self.seen(&attributes);
                Ok(attributes)
            }
            outcome => Err(unfitting(&outcome)),
        }
    }

    /// What the log knows of an inode.
    async fn attributes(&self, ino: Ino) -> Result<Attributes, Errno> {
        self.ask_attributes(Query::Attributes { ino }).await.map_err(Errno::of_inode)
    }

    /// Whatever shows a file's mode tells writers whether they have to look for bits to take away.
    fn seen(&self, attributes: &Attributes) {
        if attributes::without_privileges(attributes.mode).is_some()
            && let Some(open) = self.handles.of_inode(attributes.ino)
        {
            open.privileges.bits_seen();
        }
    }

    /// The file's data, which the kernel has told us of, or the log knows.
    async fn file(&self, ino: Ino) -> Result<FileId, Errno> {
        let set = match self.known.set(ino) {
            Some(set) => set,
            None => file_of(&self.attributes(ino).await?)?.set,
        };
        Ok(FileId { ino, set })
    }

    async fn stat(&self, file: FileId) -> Result<DataStat, Errno> {
        answered(|done| self.volume.stat(file, done)).await
    }

    /// Completes what the log knows by what the data knows.
    async fn node(&self, attributes: Attributes) -> Result<Node, Errno> {
        let data = match attributes.set {
            Some(set) => Some(self.stat(FileId { ino: attributes.ino, set }).await?),
            None => None,
        };
        Ok(Node { attributes, data })
    }
}

/// The data of what must be a regular file.
fn file_of(attributes: &Attributes) -> Result<FileId, Errno> {
    match attributes.set {
        Some(set) => Ok(FileId { ino: attributes.ino, set }),
        None if attributes.mode & libc::S_IFMT == libc::S_IFDIR => Err(Errno::ISDIR),
        None => Err(Errno::INVAL),
    }
}

/// An answer to another question: the server speaks another language than we do.
fn unfitting(answer: &impl std::fmt::Debug) -> Errno {
    tracing::error!("the metadata log answered something else than was asked: {answer:?}");
    Errno::IO
}

type Done<T> = Box<dyn FnOnce(Result<T, IoError>) + Send>;

/// Waits for an operation on data, where the caller has time to.
async fn answered<T: Send + 'static>(start: impl FnOnce(Done<T>)) -> Result<T, Errno> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    start(Box::new(move |result| {
        // Whoever asked may be gone.
        let _ = sender.send(result);
    }));
    match receiver.await {
        Ok(result) => result.map_err(Errno::from),
        Err(_) => Err(Errno::IO),
    }
}

/// Tells the log what this mount has closed, in batches, until the mount is gone.
async fn close_idle(volume: Weak<Volume>, handles: Weak<Handles>) {
    loop {
        let Some(open) = handles.upgrade() else { return };
        open.idle.notified().await;
        tokio::time::sleep(CLOSE_AFTER).await;
        loop {
            let inos = open.take_idle(CLOSE_AT_ONCE);
            let Some(volume) = volume.upgrade().filter(|_| !inos.is_empty()) else { break };
            let result = volume.submit(NameOp::Close { inos: inos.clone() }).await;
            open.closed(&inos, result.is_ok());
            if let Err(e) = result {
                tracing::warn!("the metadata log cannot be told of closed files: {e}");
                tokio::time::sleep(CLOSE_AGAIN).await;
            }
        }
    }
}
