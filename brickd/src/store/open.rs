//! Opening a brick's disk: whose it is, what its journal remembers, and, after an unclean stop, checksums made anew where it was
//! being written `[S3]`.

use std::path::Path;
use std::sync::Arc;

use mortar_proto::{ByteRange, EXTENT_BYTES};

use super::{BrickDir, BrickId3, Journal, Loaded, Objects, OpenError};

/// A brick's disk, open.
pub struct Opened {
    /// Its directory, which nobody else can open meanwhile.
    pub dir: BrickDir,
    /// What must be durable at once.
    pub journal: Journal,
    /// Its objects.
    pub objects: Arc<Objects>,
    /// What the journal had.
    pub loaded: Loaded,
}

/// Opens it, or makes it in an empty directory.
///
/// # Errors
/// When it is not this brick's, or the disk refuses.
pub fn open(root: &Path, ids: BrickId3, volume_name: &str) -> Result<Opened, OpenError> {
    let dir = BrickDir::open(root, ids, volume_name)?;
    let (journal, loaded) = Journal::open(&dir.own().join("state"))?;
    let objects = Arc::new(Objects::new(&dir.own()));
    if !loaded.clean {
        if !loaded.intents.is_empty() {
            let extents = loaded.intents.len();
            tracing::info!(brick = %ids.brick, extents, "the last stop was unclean: making checksums anew where it was being written");
        }
        for (ino, extent) in &loaded.intents {
            let start = extent.saturating_mul(EXTENT_BYTES);
            objects.recompute_sums(*ino, ByteRange::at(start, EXTENT_BYTES))?;
        }
    }
    Ok(Opened { dir, journal, objects, loaded })
}
