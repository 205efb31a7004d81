//! Connections of the data plane: hello, requests in, answers out.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mortar_proto::frame::{self, FrameError, FrameReader, Receiver};
use mortar_proto::wire::{data, id_from};
use mortar_proto::{BrickId, SessionId};
use prost::Message as _;

use super::Bricks;
use super::answers::Answers;
use super::brick::Brick;
use super::requests::{self, Sender};

/// How long a peer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a peer may take to take any of its answers.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers that are collected before they are sent.
const BATCH_BYTES: usize = 256 << 10;

/// Serves a connection until it ends.
pub(super) fn connection(keeper: &Bricks, socket: &TcpStream) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(HELLO_TIMEOUT))?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    let socket = Arc::new(socket.try_clone()?);
    let mut reader = FrameReader::new(Receiver(Arc::clone(&socket)));
    let Some(first) = reader.receive().context("no hello")? else { return Ok(()) };
    let hello = data::Hello::decode(first.header).context("the hello does not decode")?;
    let answers = Answers::start(Arc::clone(&socket))?;
    let served = greet(keeper, &hello, &answers).and_then(|brick| {
        socket.set_read_timeout(None)?;
        let sender = match hello.session {
            0 => Sender::Brick,
            session => Sender::Session(SessionId(session)),
        };
        let channel = match sender {
            Sender::Session(_) => hello.channel,
            // A brick may have any number.
            Sender::Brick => brick.next_peer.fetch_add(1, Ordering::Relaxed),
        };
        let key = (SessionId(hello.session), channel);
        replace_older(&brick, key, &answers);
        answers.send(frame::encode(&reply(Some(&brick), String::new()), 0));
        let served = requests_of(&brick, sender, &mut reader, &answers);
        let mut connections = brick.connections.lock();
        if connections.get(&key).is_some_and(|a| Arc::ptr_eq(a, &answers)) {
            connections.remove(&key);
        }
        served
    });
    answers.cut();
    served.with_context(|| format!("brick {:x}", hello.brick))
}

fn reply(brick: Option<&Brick>, refused: String) -> data::HelloReply {
    data::HelloReply {
        version: frame::VERSION,
        features: 0,
        incarnation: brick.map_or(0, |b| b.registration.incarnation.0),
        refused,
    }
}

/// Which brick is meant; refused unless it is here and both speak the same.
fn greet(keeper: &Bricks, hello: &data::Hello, answers: &Answers) -> anyhow::Result<Arc<Brick>> {
    let brick = keeper.brick(BrickId(hello.brick)).filter(|b| !b.is_closed());
    let refused = match &brick {
        _ if hello.version != frame::VERSION => {
            format!("this server speaks version {} of the protocol, not {}", frame::VERSION, hello.version)
        }
        _ if id_from(&hello.cluster) != Some(keeper.log.identity().cluster.0) => {
            "this server belongs to another cluster".to_owned()
        }
        Some(brick) => return Ok(Arc::clone(brick)),
        None => format!("brick {:x} is not open on this server", hello.brick),
    };
    answers.send(frame::encode(&reply(brick.as_deref(), refused.clone()), 0));
    bail!("refused: {refused}");
}

/// [F3] A new connection of a session ends the older one before it is served: under the lock that admits requests, so that
/// nothing that came on the older one is admitted afterwards.
fn replace_older(brick: &Brick, key: (SessionId, u32), answers: &Arc<Answers>) {
    let older = brick.connections.lock().insert(key, Arc::clone(answers));
    if let Some(older) = older {
        let admits = brick.replica.lock();
        older.cut();
        drop(admits);
    }
    // The brick may have been closed while this one was not among its connections yet.
    if brick.is_closed() {
        answers.cut();
    }
}

/// Answers that are ready at once are sent together when nothing more has come in yet.
fn requests_of(
    brick: &Arc<Brick>,
    sender: Sender,
    reader: &mut FrameReader<Receiver>,
    answers: &Arc<Answers>,
) -> anyhow::Result<()> {
    let mut batch = Vec::new();
    loop {
        if !batch.is_empty() && (batch.len() >= BATCH_BYTES || !reader.has_frame()) {
            answers.send(std::mem::take(&mut batch));
        }
        answers.wait_for_room();
        let frame = match reader.receive() {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(()),
            // The other side went away, or this one was replaced by a newer connection.
            Err(FrameError::Io(_)) if answers.is_cut() => return Ok(()),
            Err(e) => return Err(e).context("what came is no frame"),
        };
        let request = data::Request::decode(frame.header).context("what came is no request")?;
        let Some(answered) = brick.guarded(|| requests::take(brick, request, frame.payload, sender, answers)) else {
            bail!("a request could not be served");
        };
        if let Some((response, payload)) = answered {
            frame::append(&response, payload.len(), &mut batch);
            batch.extend_from_slice(&payload);
        }
    }
}
