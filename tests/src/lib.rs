//! Mortar's simulations, cluster tests, mount tests and benchmarks.

pub mod scenarios;
