//! The Mortar server: bricks, and its share of the metadata log.

pub mod identity;
pub mod log;
