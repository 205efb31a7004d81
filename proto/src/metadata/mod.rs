//! The state machine of the cluster's metadata log.
//!
//! One log per cluster is the only authority for servers, volumes, options, configurations of replica sets, sessions,
//! leases and names. This folder is that log's meaning: [`Command`]s go in, one at a time and in the log's order, and
//! [`State::apply`] changes the [`State`] and answers with an [`Outcome`]. The same commands give the same state on every
//! server: no clock, no chance, no floating point. `apply` never panics, whatever the command says.
//!
//! | file | owns |
//! | --- | --- |
//! | `command` | what may stand in the log, and what answers |
//! | `state` | what the log adds up to |
//! | `apply` | the step from one state to the next: servers, volumes, sessions, leases |
//! | `names` | the step for names: directories, files, links, attributes |
//! | `configurations` | the step for configurations `[E1]`..`[E6]`, `[S4]` |
//! | `query` | reading the state |
//! | `options` | the table of volume options |
//! | `placement` | where a new file goes |
//! | `monitor` | what the leader proposes, from heartbeats, reports and time |

pub mod apply;
pub mod command;
pub mod configurations;
pub mod monitor;
pub mod names;
pub mod options;
pub mod placement;
pub mod query;
pub mod replacing;
pub mod state;
#[cfg(test)]
mod tests;

pub use command::*;
pub use query::{Answer, Attributes, DirectoryEntry, Query};
pub use state::State;
