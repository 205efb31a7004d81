//! What Mortar is tested with: a deterministic simulator of its machines, what programs expect of a mount, and whole
//! clusters of real processes; and the benchmarks.

pub mod bench;
pub mod exhaustive;
pub mod harness;
pub mod scenarios;
pub mod sim;
pub mod soak;
