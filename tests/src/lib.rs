//! What Mortar is tested with: a deterministic simulator of its machines.

pub mod sim;
