//! Mortar's protocol: what clients, bricks and the metadata log say to each other, and the rules for saying it.
//!
//! The rules live in pure machines that know no clock, socket, thread, file, random number or payload byte:
//!
//! - [`coordinator`]: what the holder of a file's lease does (mount, janitor),
//! - [`replica`]: what a brick does,
//! - [`scrub`]: what a brick's scrub looks at, and what a difference between bricks means,
//! - [`metadata`]: the state machine of the cluster's log, and what its leader decides.
//!
//! Time and chance come in as arguments and effects go out as values, so the same code runs in the daemons and in the
//! simulator. Without the default feature `wire` nothing else is built, and the crate has no dependency.
//!
//! With `wire`: the gRPC messages ([`wire`]), the frames of the data plane ([`frame`]), block checksums ([`checksum`])
//! and the client side of both planes ([`client`]), which the mount, the janitor and the administrator's command share.
//!
//! Rules such as `[W3]` and invariants such as `I1` are told in `docs/replication.md`.

pub mod config;
pub mod coordinator;
pub mod interval;
pub mod left_out;
pub mod metadata;
pub mod replica;
pub mod scrub;
pub mod types;

#[cfg(feature = "wire")]
pub mod checksum;
#[cfg(feature = "wire")]
pub mod client;
#[cfg(feature = "wire")]
pub mod frame;
#[cfg(feature = "wire")]
pub mod wire;

pub use config::{BrickState, Configuration, Member, Slot, Slots};
pub use types::*;
