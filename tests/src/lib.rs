//! What Mortar is tested with: a deterministic simulator of its machines, and what programs expect of a mount.

pub mod scenarios;
pub mod sim;
