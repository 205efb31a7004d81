//! Opening a brick's disk: whose it is, what its journal remembers, and, after an unclean stop, what does not match its checksum
//! where it was being written `[S3]`.

use std::path::Path;
use std::sync::Arc;

use mortar_proto::interval::IntervalSet;
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::{BLOCK_BYTES, ByteRange, EXTENT_BYTES, Ino};

use super::{BrickDir, BrickId3, Journal, Loaded, Memory, Objects, OpenError, StoreError, Witness};

/// Intervals of blocks in doubt that are remembered, at most (I9); the checksums of the rest are made anew at once.
const MAX_DOUBTS: usize = 1 << 18;

/// By file, blocks that have data and the checksum of something else.
pub type Doubts = Vec<(Ino, IntervalSet)>;

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
    /// Where the checksum may tell what the disk has changed: see [`make_sums_anew`].
    pub doubts: Doubts,
}

/// Makes checksums from data: whoever could have told what else they are of was asked, or need not be.
///
/// # Errors
/// When the disk refuses.
pub fn make_sums_anew(objects: &Objects, doubts: &Doubts) -> Result<(), StoreError> {
    for (ino, blocks) in doubts {
        for run in blocks.iter() {
            objects.recompute_sums(*ino, ByteRange { start: run.start * BLOCK_BYTES, end: run.end * BLOCK_BYTES })?;
        }
    }
    Ok(())
}

/// Makes the checksums of `range` anew, but for those that are of something else than the data that is there.
fn make_most_sums_anew(objects: &Objects, ino: Ino, range: ByteRange, room: usize) -> Result<IntervalSet, StoreError> {
    let (first, sums) = (range.start / BLOCK_BYTES, objects.sums(ino, range)?);
    let has_sum = |block: u64| {
        let sum = sums.0.chunks_exact(8).nth((block - first) as usize);
        sum.is_some_and(|sum| sum.iter().any(|b| *b != 0)) && block * BLOCK_BYTES < sums.1
    };
    let unsound = objects.unsound(ino, range)?.into_iter().filter(|b| has_sum(*b));
    let all: IntervalSet = unsound.map(|b| b..b + 1).collect();
    let doubted: IntervalSet = all.iter().take(room).collect();
    let mut at = range.start;
    for run in doubted.iter() {
        objects.recompute_sums(ino, ByteRange { start: at, end: run.start * BLOCK_BYTES })?;
        at = run.end * BLOCK_BYTES;
    }
    objects.recompute_sums(ino, ByteRange { start: at, end: range.end })?;
    Ok(doubted)
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
    let (mut doubts, mut room) = (Doubts::new(), MAX_DOUBTS);
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
                let doubted = make_most_sums_anew(&objects, *ino, range, room)?;
                room -= doubted.iter().count();
                doubts.push((*ino, doubted));
            }
        }
        doubts.retain(|(_, blocks)| !blocks.is_empty());
    }
    Ok(Opened { dir, memory, journal, witness, objects, loaded, doubts })
}
