//! One connection to one brick: made again whenever it breaks, never blocking a sender.
//!
//! A sender writes to the socket itself as long as the socket takes it; what does not fit waits for the link's own writer
//! thread. A brick that hangs thus delays nobody but those who wait for its answers; the coordinator's io-timeout bounds
//! what can pile up. `[F3]`: everything that was sent on a broken connection is sent again on the next, or not at all.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use prost::Message;
use socket2::{SockRef, TcpKeepalive};

use crate::frame::{self, FrameReader, Receiver};
use crate::types::{BrickId, ClusterId, SessionId};
use crate::wire::{data, id_bytes};

/// How long a connection may take to be made: not long, for the kernel asks again later and later, and a brick that was cut off and is
/// back would wait for that.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);
/// How long its hello may take to be answered.
const HELLO_TIMEOUT: Duration = Duration::from_millis(1000);
/// The waits between attempts, first and longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));
/// `MSG_DONTWAIT | MSG_NOSIGNAL` of Linux.
const SEND_NOW: i32 = 0x40 | 0x4000;

/// What a link tells its owner, from the link's own thread.
pub(super) trait LinkEvents: Send + Sync {
    /// There is a connection.
    fn up(&self);
    /// It broke.
    fn down(&self);
    /// A response came.
    fn response(&self, response: data::Response, payload: &[u8]);
}

/// Where a link leads, and who it speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) address: String,
    pub(super) cluster: ClusterId,
    pub(super) brick: BrickId,
    pub(super) session: SessionId,
}

#[derive(Default)]
struct Outbox {
    socket: Option<Arc<TcpStream>>,
    queue: VecDeque<Bytes>,
    /// The writer thread is writing: nobody else may.
    draining: bool,
}

/// One connection to one brick.
pub(super) struct Link {
    target: Mutex<Target>,
    out: Mutex<Outbox>,
    wake: Condvar,
    stopped: AtomicBool,
}

impl Link {
    /// Starts connecting.
    pub(super) fn start(target: Target, events: Arc<dyn LinkEvents>) -> io::Result<Arc<Self>> {
        let link = Arc::new(Self {
            target: Mutex::new(target),
            out: Mutex::default(),
            wake: Condvar::new(),
            stopped: AtomicBool::new(false),
        });
        let reader = Arc::clone(&link);
        std::thread::Builder::new().name("link-read".into()).spawn(move || reader.run(&*events))?;
        let writer = Arc::clone(&link);
        std::thread::Builder::new().name("link-write".into()).spawn(move || writer.drain())?;
        Ok(link)
    }

    /// Leads elsewhere, or speaks for another session, from now on.
    pub(super) fn retarget(&self, target: Target) {
        let mut now = self.target.lock();
        if *now != target {
            *now = target;
            drop(now);
            self.hang_up();
        }
    }

    /// Ends the link for good.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.hang_up();
        self.wake.notify_all();
    }

    /// Ends the connection, if there is one, and makes another.
    pub(super) fn hang_up(&self) {
        if let Some(socket) = &self.out.lock().socket {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Sends a frame, or keeps it for the writer thread, or drops it when there is no connection.
    pub(super) fn send(&self, head: Vec<u8>, payload: Bytes) {
        let mut out = self.out.lock();
        let Some(socket) = out.socket.clone() else { return };
        if out.draining || !out.queue.is_empty() {
            out.queue.push_back(head.into());
            if !payload.is_empty() {
                out.queue.push_back(payload);
            }
            return;
        }
        let total = head.len() + payload.len();
        let parts = [IoSlice::new(&head), IoSlice::new(&payload)];
        let sent = match SockRef::from(&*socket).send_vectored_with_flags(&parts, SEND_NOW) {
            Ok(sent) => sent,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            // The reader thread sees the break too, and tells the owner.
            Err(_) => return,
        };
        if sent == total {
            return;
        }
        if sent < head.len() {
            out.queue.push_back(Bytes::from(head).slice(sent..));
            out.queue.push_back(payload);
        } else {
            out.queue.push_back(payload.slice(sent - head.len()..));
        }
        drop(out);
        self.wake.notify_one();
    }

    fn drain(&self) {
        let mut out = self.out.lock();
        loop {
            if self.stopped.load(Ordering::Acquire) {
                return;
            }
            let Some(chunk) = out.queue.pop_front() else {
                out.draining = false;
                self.wake.wait(&mut out);
                continue;
            };
            let Some(socket) = out.socket.clone() else {
                out.queue.clear();
                continue;
            };
            out.draining = true;
            parking_lot::MutexGuard::unlocked(&mut out, || {
                // A failed write shows in the reader thread as well, which empties the queue.
                if (&*socket).write_all(&chunk).is_err() {
                    let _ = socket.shutdown(std::net::Shutdown::Both);
                }
            });
        }
    }

    fn run(&self, events: &dyn LinkEvents) {
        let mut wait = RETRY.0;
        let mut complained = false;
        while !self.stopped.load(Ordering::Acquire) {
            let target = self.target.lock().clone();
            match connect(&target) {
                Ok((mut reader, socket)) => {
                    tracing::debug!(brick = %target.brick, address = target.address, "connected");
                    complained = false;
                    wait = RETRY.0;
                    *self.out.lock() = Outbox { socket: Some(socket), ..Outbox::default() };
                    if *self.target.lock() != target || self.stopped.load(Ordering::Acquire) {
                        self.hang_up();
                    }
                    events.up();
                    let end = receive(&mut reader, events);
                    {
                        let mut out = self.out.lock();
                        if let Some(socket) = out.socket.take() {
                            let _ = socket.shutdown(std::net::Shutdown::Both);
                        }
                        out.queue.clear();
                    }
                    events.down();
                    if let Err(e) = end {
                        tracing::info!(brick = %target.brick, address = target.address, "connection lost: {e}");
                    }
                }
                Err(e) => {
                    if !complained {
                        tracing::info!(brick = %target.brick, address = target.address, "cannot connect: {e}");
                        complained = true;
                    }
                    std::thread::sleep(wait);
                    wait = (wait * 2).min(RETRY.1);
                }
            }
        }
    }
}

/// A connection that both sides have said hello on.
pub type Connected = (FrameReader<Receiver>, Arc<TcpStream>);

fn connect(target: &Target) -> anyhow::Result<Connected> {
    open(
        &target.address,
        &data::Hello {
            version: frame::VERSION,
            features: 0,
            cluster: id_bytes(target.cluster.0),
            brick: target.brick.0,
            session: target.session.0,
            channel: 0,
            from_brick: 0,
        },
    )
}

/// Connects to a brick and says hello.
///
/// # Errors
/// When it cannot be reached, does not answer in a second, or refuses.
pub fn open(address: &str, hello: &data::Hello) -> anyhow::Result<Connected> {
    let mut last = anyhow::anyhow!("{address} has no address");
    for at in address.to_socket_addrs()? {
        match open_at(at, hello) {
            Ok(opened) => return Ok(opened),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn open_at(address: SocketAddr, hello: &data::Hello) -> anyhow::Result<Connected> {
    let socket = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    socket.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(2)).with_interval(Duration::from_secs(1)).with_retries(3);
    SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
    socket.set_read_timeout(Some(HELLO_TIMEOUT))?;
    let socket = Arc::new(socket);
    (&*socket).write_all(&frame::encode(hello, 0))?;
    let mut reader = FrameReader::new(Receiver(Arc::clone(&socket)));
    let reply = match reader.receive()? {
        Some(frame) => data::HelloReply::decode(frame.header)?,
        None => anyhow::bail!("it closed the connection"),
    };
    anyhow::ensure!(reply.refused.is_empty(), "it refuses: {}", reply.refused);
    anyhow::ensure!(reply.version == frame::VERSION, "it speaks version {} of the protocol", reply.version);
    socket.set_read_timeout(None)?;
    Ok((reader, socket))
}

fn receive(reader: &mut FrameReader<Receiver>, events: &dyn LinkEvents) -> Result<(), frame::FrameError> {
    while let Some(frame) = reader.receive()? {
        let response = data::Response::decode(frame.header)?;
        events.response(response, frame.payload);
    }
    Ok(())
}
