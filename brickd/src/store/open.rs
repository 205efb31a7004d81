//! Opening a brick's disk: whose it is, what its journal remembers, and, after an unclean stop, checksums made anew where it was
//! being written `[S3]`.

use std::path::Path;
use std::sync::Arc;

use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::{ByteRange, EXTENT_BYTES};

use super::{BrickDir, BrickId3, Journal, Loaded, Memory, Objects, OpenError, Witness};

/// A brick's disk, open.
pub struct Opened {
    /// Its directory, which nobody else can open meanwhile.
    pub dir: BrickDir,
    /// Whether it has what was written and not flushed.
    pub memory: Memory,
    /// What must be durable at once.
    pub journal: Journal,
    /// What the server remembers of it.
    pub witness: Witness,
    /// Its objects.
    pub objects: Arc<Objects>,
    /// What the journal had.
    pub loaded: Loaded,
}

/// Opens it, or makes it in an empty directory. The server keeps its state in `state_dir`.
///
/// # Errors
/// When it is not this brick's, or an older copy of it, or a disk refuses.
pub fn open(root: &Path, state_dir: &Path, ids: BrickId3, volume_name: &str) -> Result<Opened, OpenError> {
    let witness = Witness::open(state_dir, ids)?;
    let dir = BrickDir::open(root, ids, volume_name)?;
    let (journal, loaded) = Journal::open(&dir.own().join("state"), |stamp| witness.check(root, stamp))?;
    witness.saw(loaded.stamp)?;
    let memory = Memory::open(&dir.own())?;
    let objects = Arc::new(Objects::new(&dir.own()));
    if !loaded.clean {
        if !loaded.intents.is_empty() {
            let extents = loaded.intents.len();
            tracing::info!(brick = %ids.brick, extents, "the last stop was unclean: making checksums anew where it was being written");
        }
        if memory.has_lost()
            && let Err(e) = objects.flush_all()
        {
            // It is told once to whoever flushes the whole file system, too: here, before anything is written again.
            tracing::info!(brick = %ids.brick, "the disk refused something before: {e}");
        }
        for (ino, extent) in &loaded.intents {
            let start = extent.saturating_mul(EXTENT_BYTES);
            let range = ByteRange::at(start, EXTENT_BYTES);
            if memory.has_lost() {
                // [W8] It looks as it should, and repair would find nothing to do; but the disk may not have it.
                objects.write_again(*ino, range)?;
            }
            if !left_out(Rule::S3) {
                objects.recompute_sums(*ino, range)?;
            }
        }
    }
    Ok(Opened { dir, memory, journal, witness, objects, loaded })
}
