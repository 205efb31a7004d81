//! The client side of both planes, which the mount, the janitor and the administrator's command share.
//!
//! | file | owns |
//! | --- | --- |
//! | `control` | finding the leader, and asking it |
//! | `session` | one session: keeping it alive, hearing its events, opening it again |
//! | `link` | one connection to one brick |
//! | `messages` | the coordinator's words as frames, and back |
//! | `file` | one file's coordinator with its payloads and callers |
//! | `volume` | a volume: its sets, links and files; what the mount calls |

pub mod control;
mod file;
pub mod link;
mod messages;
mod session;
pub mod volume;

pub use volume::{DataStat, FileId, IoError, MountError, MountOptions, Space, Volume};
