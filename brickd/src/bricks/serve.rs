//! Connections of the data plane: hello, requests in, answers out.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mortar_proto::frame::{self, FrameReader, Receiver};
use mortar_proto::wire::{data, id_bytes, id_from};
use mortar_proto::{BrickId, SessionId};
use parking_lot::Mutex;
use prost::Message as _;

use super::Bricks;
use super::requests;

/// How long a peer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a peer may take to take its answers.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers that are collected before they are sent.
const BATCH_BYTES: usize = 256 << 10;

/// Where answers go.
pub(super) struct Answers {
    socket: Arc<TcpStream>,
    writing: Mutex<()>,
}

impl Answers {
    fn write(&self, bytes: &[u8]) {
        let _one = self.writing.lock();
        if (&*self.socket).write_all(bytes).is_err() {
            // Whoever does not take its answers is cut off; it will send again on its next connection.
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Sends one answer.
    pub(super) fn send(&self, response: &data::Response, payload: &[u8]) {
        let mut bytes = frame::encode(response, payload.len());
        bytes.extend_from_slice(payload);
        self.write(&bytes);
    }
}

/// Serves a connection until it ends.
pub(super) fn connection(keeper: &Bricks, socket: &TcpStream, from: SocketAddr) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(HELLO_TIMEOUT))?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    let socket = Arc::new(socket.try_clone()?);
    let mut reader = FrameReader::new(Receiver(Arc::clone(&socket)));
    let Some(first) = reader.receive().context("no hello")? else { return Ok(()) };
    let hello = data::Hello::decode(first.header).context("the hello does not decode")?;
    let cluster = keeper.log.identity().cluster;
    let brick = keeper.brick(BrickId(hello.brick));
    let refused = if hello.version != frame::VERSION {
        format!("this server speaks version {} of the protocol, not {}", frame::VERSION, hello.version)
    } else if id_from(&hello.cluster) != Some(cluster.0) {
        "this server belongs to another cluster".to_owned()
    } else if brick.as_ref().is_none_or(|b| b.is_closed()) {
        format!("brick {:x} is not open on this server", hello.brick)
    } else {
        String::new()
    };
    let reply = data::HelloReply {
        version: frame::VERSION,
        features: 0,
        incarnation: brick.as_ref().map_or(0, |b| b.registration.incarnation.0),
        boot: id_bytes(keeper.boot.0),
        refused: refused.clone(),
    };
    let answers = Arc::new(Answers { socket: Arc::clone(&socket), writing: Mutex::new(()) });
    let Some(brick) = brick.filter(|_| refused.is_empty()) else {
        answers.write(&frame::encode(&reply, 0));
        bail!("refused {from}: {refused}");
    };
    let session = SessionId(hello.session);
    let from_brick = (session == SessionId(0)).then_some(BrickId(hello.from_brick));
    let key = (session, hello.channel);
    if from_brick.is_none() {
        // [F3] A new connection of a session ends the older one before it is served.
        let older = brick.connections.lock().insert(key, Arc::clone(&socket));
        if let Some(older) = older {
            let _ = older.shutdown(std::net::Shutdown::Both);
        }
    }
    socket.set_read_timeout(None)?;
    answers.write(&frame::encode(&reply, 0));
    let mut batch = Vec::new();
    let served = loop {
        if !batch.is_empty() && (batch.len() >= BATCH_BYTES || !reader.has_frame()) {
            answers.write(&batch);
            batch.clear();
        }
        let frame = match reader.receive() {
            Ok(Some(frame)) => frame,
            Ok(None) => break Ok(()),
            Err(frame::FrameError::Io(e)) => break Err(e.into()),
            Err(e) => break Err(anyhow::anyhow!("{from} sent what is no frame: {e}")),
        };
        let request = match data::Request::decode(frame.header) {
            Ok(request) => request,
            Err(e) => break Err(anyhow::anyhow!("{from} sent a request that does not decode: {e}")),
        };
        let answered = requests::take(&brick, request, frame.payload, session, from_brick, &answers);
        if let Some((response, payload)) = answered {
            frame::append(&response, payload.len(), &mut batch);
            batch.extend_from_slice(&payload);
        }
    };
    if !batch.is_empty() {
        answers.write(&batch);
    }
    if from_brick.is_none() {
        let mut connections = brick.connections.lock();
        if connections.get(&key).is_some_and(|s| Arc::ptr_eq(s, &socket)) {
            connections.remove(&key);
        }
    }
    served
}
