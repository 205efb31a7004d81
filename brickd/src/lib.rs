//! The Mortar server: bricks, and its share of the metadata log.

pub mod bricks;
pub mod identity;
pub mod janitor;
pub mod log;
pub mod metrics;
pub mod serve;
pub mod store;
pub mod tree;
