//! What Mortar is tested with: a deterministic simulator of its machines, whole clusters of real processes, and what programs
//! expect of a mount.

pub mod harness;
pub mod scenarios;
pub mod sim;
