//! The messages of both planes, generated from `wire/*.proto`, and the postcard encoding of what the log's own types say.

#![allow(missing_docs, clippy::all, clippy::pedantic)]

/// Server to server.
pub mod peer {
    tonic::include_proto!("mortar.peer");
}
/// Mounted clients.
pub mod session {
    tonic::include_proto!("mortar.session");
}
/// The administrator's command.
pub mod cluster {
    tonic::include_proto!("mortar.cluster");
}
/// Frame headers of the data plane.
pub mod data {
    tonic::include_proto!("mortar.data");
}

/// Encodes one of the log's own types.
///
/// # Panics
/// Never: the types hold nothing that postcard refuses.
pub fn encode<T: serde::Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("the log's types are plain data")
}

/// Decodes one of the log's own types.
///
/// # Errors
/// When the bytes are no `T`.
pub fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    postcard::from_bytes(bytes)
}

/// A 128-bit id as its 16 bytes on the wire.
#[must_use]
pub fn id_bytes(id: u128) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(&id.to_be_bytes())
}

/// A 128-bit id from the wire; `None` unless there are 16 bytes.
#[must_use]
pub fn id_from(bytes: &[u8]) -> Option<u128> {
    bytes.try_into().ok().map(u128::from_be_bytes)
}
