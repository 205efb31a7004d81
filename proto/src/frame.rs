//! Frames of the data plane: a fixed prefix, a small prost header, then the raw payload, which is never copied into a
//! message.
//!
//! ```text
//!  0        4            8             12
//!  ┌────────┬────────────┬─────────────┬─────────── ─ ─ ┬──────────── ─ ─
//!  │ magic  │ header len │ payload len │ header (prost) │ payload
//!  └────────┴────────────┴─────────────┴─────────── ─ ─ ┴──────────── ─ ─
//! ```
//!
//! All numbers are little-endian. A frame with another magic, or longer than the limits, ends its connection and harms
//! nobody else: nothing is allocated on a peer's word beyond [`MAX_HEADER_BYTES`] and [`MAX_PAYLOAD_BYTES`].

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;

use crate::types::{BLOCK_BYTES, MAX_IO_BYTES};

/// What a frame begins with; also what tells the data plane from gRPC on a server's port.
pub const MAGIC: [u8; 4] = *b"MRTD";
/// The protocol version that this code speaks.
pub const VERSION: u32 = 1;
/// Bytes before the header.
pub const PREFIX_BYTES: usize = 12;
/// The longest header: lists of regions and intents are the longest, and are cut to fit.
pub const MAX_HEADER_BYTES: usize = 4 << 20;
/// The longest payload: one read or write, rounded out to blocks.
pub const MAX_PAYLOAD_BYTES: usize = (MAX_IO_BYTES + 2 * BLOCK_BYTES) as usize;

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection broke or ended in the middle of a frame.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It does not begin like a frame.
    #[error("a frame begins with {0:02x?} instead of {MAGIC:02x?}")]
    Magic([u8; 4]),
    /// It is longer than the limits.
    #[error(
        "a frame announces {header} bytes of header and {payload} of payload, more than {MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES}"
    )]
    TooLong {
        /// Announced header length.
        header: usize,
        /// Announced payload length.
        payload: usize,
    },
    /// The header is no message of the kind expected.
    #[error("a frame's header does not decode: {0}")]
    Header(#[from] prost::DecodeError),
}

/// The prefix and header of a frame, ready to be sent before its payload.
#[must_use]
pub fn encode<M: prost::Message>(header: &M, payload_len: usize) -> Vec<u8> {
    let header_len = header.encoded_len();
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + header_len);
    append(header, payload_len, &mut bytes);
    bytes
}

/// Appends the prefix and header of a frame to `out`.
pub fn append<M: prost::Message>(header: &M, payload_len: usize, out: &mut Vec<u8>) {
    let header_len = header.encoded_len();
    debug_assert!(header_len <= MAX_HEADER_BYTES && payload_len <= MAX_PAYLOAD_BYTES);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&(header_len as u32).to_le_bytes());
    out.extend_from_slice(&(payload_len as u32).to_le_bytes());
    // A Vec grows, so encoding cannot run out of room.
    header.encode(out).unwrap_or_default();
}

/// The reading side of a socket that others write to.
#[derive(Clone, Debug)]
pub struct Receiver(pub Arc<TcpStream>);

impl Read for Receiver {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buf)
    }
}

/// Reads frames from a stream, many with one system call.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// A frame as it lies in the reader's buffer.
#[derive(Debug)]
pub struct Frame<'a> {
    /// The header, still encoded.
    pub header: &'a [u8],
    /// The payload.
    pub payload: &'a [u8],
}

impl<R: Read> FrameReader<R> {
    /// A reader with room for a few small frames; it grows when a large one comes.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: vec![0; 256 << 10], start: 0, end: 0 }
    }

    /// The stream.
    pub fn stream(&self) -> &R {
        &self.stream
    }

    /// True when a whole frame (or a wrong one) is in the buffer already, so that [`FrameReader::receive`] will not wait.
    #[must_use]
    pub fn has_frame(&self) -> bool {
        match self.announced() {
            Some(Ok((header, payload))) => self.end - self.start >= PREFIX_BYTES + header + payload,
            Some(Err(_)) => true,
            None => false,
        }
    }

    fn announced(&self) -> Option<Result<(usize, usize), FrameError>> {
        let have = self.buffer.get(self.start..self.end)?;
        let (magic, rest) = have.split_first_chunk::<4>()?;
        let (header, rest) = rest.split_first_chunk::<4>()?;
        let (payload, _) = rest.split_first_chunk::<4>()?;
        if *magic != MAGIC {
            return Some(Err(FrameError::Magic(*magic)));
        }
        let (header, payload) = (u32::from_le_bytes(*header) as usize, u32::from_le_bytes(*payload) as usize);
        if header > MAX_HEADER_BYTES || payload > MAX_PAYLOAD_BYTES {
            return Some(Err(FrameError::TooLong { header, payload }));
        }
        Some(Ok((header, payload)))
    }

    /// The next frame; `None` when the peer closed the connection between two frames.
    ///
    /// # Errors
    /// When the connection breaks, or what comes is no frame.
    pub fn receive(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let (header, payload) = loop {
            let need = match self.announced() {
                Some(announced) => {
                    let (header, payload) = announced?;
                    let need = PREFIX_BYTES + header + payload;
                    if self.end - self.start >= need {
                        break (header, payload);
                    }
                    need
                }
                None => PREFIX_BYTES,
            };
            if self.start > 0 && (self.start == self.end || self.buffer.len() - self.start < need) {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            if self.buffer.len() < need {
                self.buffer.resize(need, 0);
            }
            let got = match self.stream.read(&mut self.buffer[self.end..]) {
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            if got == 0 {
                if self.start == self.end {
                    return Ok(None);
                }
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.end += got;
        };
        let header_at = self.start + PREFIX_BYTES;
        let payload_at = header_at + header;
        self.start = payload_at + payload;
        Ok(Some(Frame { header: &self.buffer[header_at..payload_at], payload: &self.buffer[payload_at..self.start] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::data::{HelloReply, Request};
    use prost::Message;

    struct Drip(Vec<u8>, usize);
    impl Read for Drip {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(self.0.len()).min(buf.len());
            buf[..n].copy_from_slice(&self.0[..n]);
            self.0.drain(..n);
            Ok(n)
        }
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        for step in [1, 5, 13, 4096, 1 << 20] {
            let mut bytes = Vec::new();
            for i in 0..5_usize {
                let header = Request { id: i as u64 + 1, ino: 7, ..Request::default() };
                append(&header, i * 70_000, &mut bytes);
                bytes.extend(std::iter::repeat_n(i as u8, i * 70_000));
            }
            let mut reader = FrameReader::new(Drip(bytes, step));
            for i in 0..5_usize {
                let frame = reader.receive().unwrap().unwrap();
                assert_eq!(Request::decode(frame.header).unwrap().id, i as u64 + 1);
                assert_eq!(frame.payload, vec![i as u8; i * 70_000]);
            }
            assert!(reader.receive().unwrap().is_none());
        }
    }

    #[test]
    fn wrong_magic_and_boundless_lengths_are_refused_before_anything_is_allocated() {
        let mut reader = FrameReader::new(Drip(b"GET / HTTP/1.1\r\n".to_vec(), 100));
        assert!(matches!(reader.receive(), Err(FrameError::Magic(_))));
        let mut bytes = encode(&HelloReply::default(), 0);
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut reader = FrameReader::new(Drip(bytes, 100));
        assert!(matches!(reader.receive(), Err(FrameError::TooLong { .. })));
        assert!(reader.buffer.len() < 1 << 20);
    }

    #[test]
    fn an_end_within_a_frame_is_an_error() {
        let mut bytes = encode(&Request { id: 1, ..Request::default() }, 10);
        bytes.extend([0; 9]);
        assert!(matches!(FrameReader::new(Drip(bytes, 7)).receive(), Err(FrameError::Io(_))));
    }
}
