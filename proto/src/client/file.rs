//! One file: its coordinator, with the payloads and callers of what is under way.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use parking_lot::Mutex;

use super::volume::{DataStat, FileId, IoError};
use crate::config::Slot;
use crate::coordinator::{Body, Completion, Coordinator, Effect, Event, OpId, Request};
use crate::types::{ConfigNo, Epoch};

type Call<T> = Box<dyn FnOnce(Result<T, IoError>) + Send>;

/// Who waits for an operation.
pub(super) enum Caller {
    Unit(Call<()>),
    Bytes(Call<Vec<u8>>),
    Stat(Call<DataStat>),
    Seek(Call<Option<u64>>),
}

impl Caller {
    fn answer(self, completion: Completion, bytes: Vec<u8>) {
        let error = match completion {
            Completion::Failed(errno) => IoError::Errno(errno),
            Completion::NoQuorum => IoError::NoQuorum,
            Completion::Corrupt => IoError::Corrupt,
            Completion::LeaseLost => IoError::SessionLost,
            // A completion of another kind than was asked for would be our own mistake; the caller gets an error, not a hang.
            _ => IoError::Errno(5),
        };
        match (self, completion) {
            (Self::Unit(call), Completion::Done) => call(Ok(())),
            (Self::Bytes(call), Completion::Bytes) => call(Ok(bytes)),
            (Self::Stat(call), Completion::Stat(s)) => {
                call(Ok(DataStat { size: s.size, blocks: s.blocks, mtime_ns: s.mtime_ns }));
            }
            (Self::Seek(call), Completion::Seek(at)) => call(Ok(at)),
            (Self::Unit(call), _) => call(Err(error)),
            (Self::Bytes(call), _) => call(Err(error)),
            (Self::Stat(call), _) => call(Err(error)),
            (Self::Seek(call), _) => call(Err(error)),
        }
    }
}

impl Caller {
    /// Tells it that nothing was even tried.
    pub(super) fn refuse(self, error: IoError) {
        match self {
            Self::Unit(call) => call(Err(error)),
            Self::Bytes(call) => call(Err(error)),
            Self::Stat(call) => call(Err(error)),
            Self::Seek(call) => call(Err(error)),
        }
    }
}

/// An operation under way.
pub(super) struct Pending {
    pub(super) payload: Bytes,
    pub(super) sums: Bytes,
    pub(super) caller: Option<Caller>,
}

/// What is asked of the control plane about a file's lease, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeaseJob {
    Acquire,
    Release { epoch: Epoch, finished: bool },
}

#[derive(Default)]
pub(super) struct LeaseQueue {
    pub(super) jobs: VecDeque<LeaseJob>,
    pub(super) running: bool,
    /// The last epoch that was granted to this client.
    pub(super) last: Epoch,
}

struct Inner {
    coordinator: Coordinator,
    pending: HashMap<OpId, Pending>,
    next_op: u64,
    effects: Vec<Effect>,
}

/// A frame to be sent.
pub(super) struct Outgoing {
    pub(super) request: Request,
    pub(super) payload: Bytes,
    pub(super) sums: Bytes,
}

/// What is to be done after a file's lock was let go.
#[derive(Default)]
pub(super) struct Todo {
    pub(super) send: Vec<Outgoing>,
    pub(super) suspect: Vec<(Slot, ConfigNo)>,
    pub(super) lease: bool,
    pub(super) refresh: bool,
    pub(super) permit: bool,
    answers: Vec<(Caller, Completion, Vec<u8>)>,
}

impl Todo {
    /// Tells the callers, who may do anything but block.
    pub(super) fn answer(&mut self) {
        for (caller, completion, bytes) in self.answers.drain(..) {
            caller.answer(completion, bytes);
        }
    }
}

/// One file.
pub(super) struct File {
    pub(super) id: FileId,
    inner: Mutex<Inner>,
    pub(super) leases: Mutex<LeaseQueue>,
}

impl File {
    pub(super) fn new(id: FileId, coordinator: Coordinator) -> Self {
        Self {
            id,
            inner: Mutex::new(Inner { coordinator, pending: HashMap::new(), next_op: 1, effects: Vec::new() }),
            leases: Mutex::default(),
        }
    }

    /// Starts an operation.
    pub(super) fn submit(&self, operation: crate::coordinator::Operation, pending: Pending, now_ms: u64) -> Todo {
        let mut inner = self.inner.lock();
        let op = OpId(inner.next_op);
        inner.next_op += 1;
        inner.pending.insert(op, pending);
        self.run(&mut inner, Event::Submit(op, operation), Vec::new(), now_ms)
    }

    /// Tells the coordinator something; `bytes` are those of the answer, if it is one to a read.
    pub(super) fn tell(&self, event: Event, bytes: Vec<u8>, now_ms: u64) -> Todo {
        let mut inner = self.inner.lock();
        self.run(&mut inner, event, bytes, now_ms)
    }

    /// Ends everything with an error.
    pub(super) fn abandon(&self) -> Todo {
        let mut inner = self.inner.lock();
        let mut effects = Vec::new();
        inner.coordinator.abandon(&mut effects);
        self.sort(&mut inner, effects, Vec::new())
    }

    /// Operations that somebody waits for.
    pub(super) fn in_flight(&self) -> usize {
        self.inner.lock().pending.values().filter(|p| p.caller.is_some()).count()
    }

    pub(super) fn with<R>(&self, look: impl FnOnce(&mut Coordinator) -> R) -> R {
        look(&mut self.inner.lock().coordinator)
    }

    fn run(&self, inner: &mut Inner, event: Event, bytes: Vec<u8>, now_ms: u64) -> Todo {
        let mut effects = std::mem::take(&mut inner.effects);
        inner.coordinator.handle(event, now_ms, &mut effects);
        self.sort(inner, effects, bytes)
    }

    fn sort(&self, inner: &mut Inner, mut effects: Vec<Effect>, mut bytes: Vec<u8>) -> Todo {
        let mut todo = Todo::default();
        for effect in effects.drain(..) {
            match effect {
                Effect::Send(request) => {
                    let (payload, sums) = match request.body {
                        Body::Mutate(op, _) => {
                            inner.pending.get(&op).map(|p| (p.payload.clone(), p.sums.clone())).unwrap_or_default()
                        }
                        _ => Default::default(),
                    };
                    todo.send.push(Outgoing { request, payload, sums });
                }
                Effect::Complete(op, completion) => {
                    if completion == Completion::Corrupt {
                        tracing::error!(ino = %self.id.ino, "a block is corrupt on every brick; the read fails with EIO");
                    }
                    if let Some(caller) = inner.pending.get_mut(&op).and_then(|p| p.caller.take()) {
                        todo.answers.push((caller, completion, std::mem::take(&mut bytes)));
                    }
                }
                Effect::Discard(op) => {
                    inner.pending.remove(&op);
                }
                Effect::AcquireLease => {
                    self.leases.lock().jobs.push_back(LeaseJob::Acquire);
                    todo.lease = true;
                }
                Effect::ReleaseLease { epoch, finished } => {
                    self.leases.lock().jobs.push_back(LeaseJob::Release { epoch, finished });
                    todo.lease = true;
                }
                Effect::Suspect(slot, n) => todo.suspect.push((slot, n)),
                Effect::Refresh => todo.refresh = true,
                Effect::WantPermit => todo.permit = true,
                Effect::Lost => tracing::error!(
                    ino = %self.id.ino,
                    "writes that were acknowledged and not flushed are gone, for all bricks lost power; the file fails with an \
                     input/output error until it is closed by everybody who has it open on this mount"
                ),
            }
        }
        // The vector's room is kept for the next event.
        inner.effects = effects;
        todo
    }
}
