//! One port for everything: the first bytes tell the data plane from gRPC.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mortar_proto::frame::MAGIC;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How long a connection may be silent before it is closed.
const FIRST_BYTES: Duration = Duration::from_secs(5);

/// Accepts connections: those of the data plane go to `data`, in blocking mode; the others come out as a stream.
pub(super) fn accept(
    listener: TcpListener,
    data: impl Fn(std::net::TcpStream, SocketAddr) + Send + Sync + 'static,
) -> ReceiverStream<std::io::Result<TcpStream>> {
    let (tell, incoming) = mpsc::channel(64);
    let data = Arc::new(data);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((socket, from)) => {
                    let (tell, data) = (tell.clone(), Arc::clone(&data));
                    tokio::spawn(async move {
                        let _ = socket.set_nodelay(true);
                        match tokio::time::timeout(FIRST_BYTES, is_data(&socket)).await {
                            Ok(Ok(true)) => {
                                let socket = socket.into_std().and_then(|s| s.set_nonblocking(false).map(|()| s));
                                match socket {
                                    Ok(socket) => data(socket, from),
                                    Err(e) => tracing::warn!(%from, "connection lost: {e}"),
                                }
                            }
                            Ok(Ok(false)) => {
                                let _ = tell.send(Ok(socket)).await;
                            }
                            _ => tracing::debug!(%from, "a connection said nothing"),
                        }
                    });
                }
                Err(e) => {
                    tracing::warn!("cannot accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    ReceiverStream::new(incoming)
}

async fn is_data(socket: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0; MAGIC.len()];
    loop {
        let got = socket.peek(&mut first).await?;
        if got == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if got == MAGIC.len() || first[..got] != MAGIC[..got] {
            return Ok(first == MAGIC);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
