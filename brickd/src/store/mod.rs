//! A brick's disk: objects by inode with their checksums, and the journal of what must be durable at once.
//!
//! ```text
//! BRICK/                      the volume's own tree (see `tree`): hard links to the objects
//!   .mortar/brick.toml        whose brick it is; written once
//!   .mortar/objects/3f/<ino>  a file's data
//!   .mortar/sums/3f/<ino>     8 bytes a block of 4 KiB: its checksum, 0 for a hole
//!   .mortar/state/            the journal: intents, missed regions, clean shutdown, its stamp
//!   .mortar/memory-…          whether what was not flushed is still there
//! ```
//!
//! What its server remembers of it apart from its disk: see [`Witness`].
//!
//! What is assumed of the disk is told in `docs/architecture.md`; `tests/crash` tries what a power cut can leave of it.

mod dir;
mod journal;
mod memory;
mod objects;
mod open;
mod witness;

pub use dir::{BrickDir, BrickId3, OpenError, volume_of_brick};
pub use journal::{Journal, Loaded, Record, Removal};
pub use memory::Memory;
pub use objects::{Changed, DataStat, Noticed, Objects, StoreError, regions_of};
pub use open::{Doubts, Opened, make_sums_anew, open};
pub use witness::Witness;
