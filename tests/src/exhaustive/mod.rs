//! Every order in which things can happen, up to a stated length, in a world of three bricks, two clients and one block: the
//! real coordinators, replicas, metadata state and monitor, without time and without chance.
//!
//! The simulator meets what is likely in large worlds; this meets everything in a small one. A [`Scope`] says what may
//! happen how often, what happens at once by itself, and where it begins.
//!
//! | file | owns |
//! | --- | --- |
//! | `scope` | what may happen, how often, and the scopes that are searched |
//! | `step` | one thing that can happen, which of them can happen now, and what each does |
//! | `world` | everything there is, and the messages in between |
//! | `brick`, `chores`, `disk` | a brick's process around the replica, what it does by itself, and what it keeps |
//! | `client` | a mount around the coordinator |
//! | `leader` | the metadata log and who leads it |
//! | `check` | what must be true: I1, I2, I3, I5, I6, I7, I8, and I10 by letting everything come to rest |
//! | `canonical`, `part` | when two worlds are the same; what they share until they differ |
//! | `search` | depth first, each world once; the shortest trace of a failure |

pub mod brick;
pub mod canonical;
pub mod check;
pub mod chores;
pub mod client;
pub mod disk;
pub mod leader;
pub mod part;
pub mod scope;
pub mod search;
pub mod step;
pub mod world;

pub use scope::{Allowed, Scope, all};
pub use search::{Failure, Report, explore};
