//! What goes out on a connection. Nobody who answers waits for the peer: what the socket does not take at once is left to the
//! connection's own writer. The reader does wait when too much is under way, so that a peer that asks and does not listen
//! stops only itself (I9).

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mortar_proto::frame;
use mortar_proto::wire::data;
use parking_lot::{Condvar, Mutex, MutexGuard};
use socket2::SockRef;

/// Answers that may wait for the peer, in bytes.
const MAX_WAITING_BYTES: usize = 8 << 20;
/// Requests of one connection that may be in the hands of workers, and the bytes that they carry.
const MAX_JOBS: usize = 256;
const MAX_JOB_BYTES: usize = 64 << 20;
const SEND_NOW: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

#[derive(Default)]
struct Out {
    queue: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The writer is writing: nobody else may.
    is_draining: bool,
    jobs: usize,
    job_bytes: usize,
}

/// The sending side of a connection.
pub(super) struct Answers {
    socket: Arc<TcpStream>,
    out: Mutex<Out>,
    /// For the writer: there is something to write, or the end.
    work: Condvar,
    /// For the reader: there is room.
    room: Condvar,
    is_cut: AtomicBool,
}

/// A request in the hands of a worker.
pub(super) struct Permit {
    answers: Arc<Answers>,
    bytes: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut out = self.answers.out.lock();
        out.jobs -= 1;
        out.job_bytes -= self.bytes;
        drop(out);
        self.answers.room.notify_all();
    }
}

impl Permit {
    /// Sends the answer to the request.
    pub(super) fn answer(self, response: &data::Response, payload: &[u8]) {
        let mut bytes = frame::encode(response, payload.len());
        bytes.extend_from_slice(payload);
        self.answers.send(bytes);
    }

    /// See [`Answers::is_cut`].
    pub(super) fn is_cut(&self) -> bool {
        self.answers.is_cut()
    }
}

impl Answers {
    /// Starts the writer.
    pub(super) fn start(socket: Arc<TcpStream>) -> io::Result<Arc<Self>> {
        let answers = Arc::new(Self {
            socket,
            out: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            is_cut: AtomicBool::new(false),
        });
        let writer = Arc::clone(&answers);
        std::thread::Builder::new().name("data-write".into()).spawn(move || writer.drain())?;
        Ok(answers)
    }

    /// The connection has ended: nothing that came on it is admitted any more `[F3]`.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::Acquire)
    }

    /// Ends the connection.
    pub(super) fn cut(&self) {
        self.is_cut.store(true, Ordering::Release);
        let _ = self.socket.shutdown(Shutdown::Both);
        let out = self.out.lock();
        drop(out);
        self.work.notify_all();
        self.room.notify_all();
    }

    /// Sends whole frames.
    pub(super) fn send(&self, mut bytes: Vec<u8>) {
        let mut out = self.out.lock();
        if self.is_cut() {
            return;
        }
        if !out.is_draining && out.queue.is_empty() {
            match SockRef::from(&*self.socket).send_with_flags(&bytes, SEND_NOW) {
                Ok(sent) if sent == bytes.len() => return,
                Ok(sent) => drop(bytes.drain(..sent)),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => {
                    drop(out);
                    return self.cut();
                }
            }
        }
        out.bytes += bytes.len();
        out.queue.push_back(bytes);
        drop(out);
        self.work.notify_one();
    }

    /// Waits until the peer has taken enough of its answers that another request may be looked at.
    pub(super) fn wait_for_room(&self) {
        let mut out = self.out.lock();
        while out.bytes > MAX_WAITING_BYTES && !self.is_cut() {
            self.room.wait(&mut out);
        }
    }

    /// A request with a payload of `bytes` goes to a worker; waits while there are too many.
    pub(super) fn permit(self: &Arc<Self>, bytes: usize) -> Permit {
        let mut out = self.out.lock();
        while (out.jobs >= MAX_JOBS || out.job_bytes >= MAX_JOB_BYTES) && !self.is_cut() {
            self.room.wait(&mut out);
        }
        out.jobs += 1;
        out.job_bytes += bytes;
        drop(out);
        Permit { answers: Arc::clone(self), bytes }
    }

    fn drain(&self) {
        let mut out = self.out.lock();
        while !self.is_cut() {
            let Some(bytes) = out.queue.pop_front() else {
                self.work.wait(&mut out);
                continue;
            };
            out.is_draining = true;
            let written = MutexGuard::unlocked(&mut out, || (&*self.socket).write_all(&bytes));
            out.is_draining = false;
            out.bytes -= bytes.len();
            self.room.notify_all();
            if written.is_err() {
                // Whoever does not take its answers is cut off; it will ask again on its next connection.
                MutexGuard::unlocked(&mut out, || self.cut());
            }
        }
        out.queue.clear();
        out.bytes = 0;
    }
}
