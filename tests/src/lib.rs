//! What Mortar is tested with: a deterministic simulator of its machines, and whole clusters of real processes.

pub mod harness;
pub mod sim;
