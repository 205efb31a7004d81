//! What is corrupt on a brick `[R5]`: whoever finds it, the brick looks for itself, remembers it durably, and tells holders and the
//! janitor, who have it repaired. Counted and logged here, whoever found it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use mortar_proto::interval::IntervalSet;
use mortar_proto::wire::{cluster, data};
use mortar_proto::{BLOCK_BYTES, ByteRange, Ino, REGION_BYTES, SIZE_REGION};
use parking_lot::Mutex;

use super::brick::Brick;
use super::requests::{Answer, done, store_failed};
use crate::store::{Noticed, Record, Removal, StoreError, regions_of};

/// Corrupt blocks that are known one by one, at most (I9).
const MAX_KNOWN: usize = 100_000;
/// Blocks that are named in one line of the log.
const MAX_NAMED: usize = 16;

/// What was found since the brick was opened.
#[derive(Default)]
pub(super) struct Damage {
    /// Blocks that are corrupt now, as far as is known.
    known: Mutex<BTreeSet<(Ino, u64)>>,
    pub(super) found: AtomicU64,
    pub(super) repaired: AtomicU64,
}

/// Somebody read blocks that did not verify.
pub(super) fn reported(brick: &Brick, ino: Ino, report: &data::Report) -> Answer {
    if report.compare {
        brick.scrubbing.compare_too(ino, report.start / REGION_BYTES);
        return done();
    }
    match brick.look_at(ino, ByteRange { start: report.start, end: report.end }) {
        Ok(_) => done(),
        Err(e) => store_failed(brick, &e),
    }
}

impl Brick {
    /// Looks whether blocks match their sums, and remembers those that do not. Returns them.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(super) fn look_at(&self, ino: Ino, range: ByteRange) -> Result<Vec<u64>, StoreError> {
        let blocks = self.objects.unsound(ino, range)?;
        self.remember_corrupt(ino, &blocks);
        Ok(blocks)
    }

    /// These blocks do not match their sums.
    pub(super) fn remember_corrupt(&self, ino: Ino, blocks: &[u64]) {
        if !blocks.is_empty() {
            self.found_wrong(ino, blocks, "corrupt blocks: they do not match their checksums, and are to be repaired");
            self.remember_damage(ino, &regions_of(blocks));
        }
    }

    /// Looks at what the store has noticed by the way.
    pub(super) fn look_at_noticed(&self) {
        for noticed in self.objects.take_noticed() {
            let looked = match noticed {
                Noticed::Block(ino, block) => {
                    self.look_at(ino, ByteRange::at(block.saturating_mul(BLOCK_BYTES), BLOCK_BYTES)).map(drop)
                }
                Noticed::Size(ino) => self.look_at_size(ino),
            };
            if let Err(e) = looked {
                return self.complain(&e);
            }
        }
    }

    /// A file that is shorter than its sums say lacks what they are of, and its size.
    fn look_at_size(&self, ino: Ino) -> Result<(), StoreError> {
        let mut regions = self.objects.cut_off(ino)?;
        if !regions.is_empty() {
            regions.insert(SIZE_REGION..SIZE_REGION + 1);
            let file = self.path_of(ino);
            tracing::error!(brick = %self.id, file, ino = %ino, "the file was cut off, or its data is gone");
            self.remember_damage(ino, &regions);
        }
        Ok(())
    }

    pub(super) fn path_of(&self, ino: Ino) -> String {
        self.log.with_state(|state| state.path_of(ino)).unwrap_or_default()
    }

    /// These blocks are otherwise than on the two other bricks, which agree.
    pub(super) fn found_outvoted(&self, ino: Ino, blocks: &[u64]) {
        self.found_wrong(ino, blocks, "blocks differ from the two other bricks, which agree, and are to be repaired");
    }

    fn found_wrong(&self, ino: Ino, blocks: &[u64], what: &str) {
        let new: Vec<u64> = {
            let mut known = self.damage.known.lock();
            let room = MAX_KNOWN.saturating_sub(known.len());
            blocks.iter().copied().take(room).filter(|b| known.insert((ino, *b))).collect()
        };
        if !new.is_empty() {
            self.damage.found.fetch_add(new.len() as u64, Ordering::Relaxed);
            let (file, some) = (self.path_of(ino), &new[..new.len().min(MAX_NAMED)]);
            tracing::error!(brick = %self.id, file, ino = %ino, count = new.len(), blocks = ?some, "{what}");
        }
    }

    /// Enters regions in the list of what is to be repaired here, durably.
    pub(super) fn remember_damage(&self, ino: Ino, regions: &IntervalSet) {
        let due = self.replica.lock().damage_due(ino, regions);
        let records = due.iter().map(|r| Record::Missed(self.id, ino, r.clone())).collect();
        if let Err(e) = self.journal.add(records) {
            return self.lose(&format!("the journal cannot be written: {e}"));
        }
        let mut replica = self.replica.lock();
        for regions in due {
            replica.damage_recorded(ino, regions);
        }
    }

    /// Corrupt blocks got their content back.
    pub(super) fn mended(&self, ino: Ino, blocks: &[u64]) {
        let known = {
            let mut known = self.damage.known.lock();
            blocks.iter().filter(|b| known.remove(&(ino, **b))).count()
        };
        self.damage.found.fetch_add((blocks.len() - known) as u64, Ordering::Relaxed);
        self.damage.repaired.fetch_add(blocks.len() as u64, Ordering::Relaxed);
        let (file, some) = (self.path_of(ino), &blocks[..blocks.len().min(MAX_NAMED)]);
        tracing::warn!(brick = %self.id, file, ino = %ino, count = blocks.len(), blocks = ?some, "corrupt blocks repaired");
    }

    /// A region that is in the list was pulled, or may have been written over: strikes it off if it is sound; otherwise no other
    /// brick has what is corrupt in it, and it is left alone for a while.
    pub(super) fn settle_damage(&self, ino: Ino, region: u64) -> Result<(), StoreError> {
        if !self.replica.lock().is_damaged(ino, region) {
            return Ok(());
        }
        let unsound = if region == SIZE_REGION {
            !self.objects.cut_off(ino)?.is_empty()
        } else {
            !self.look_at(ino, ByteRange::at(region * REGION_BYTES, REGION_BYTES))?.is_empty()
        };
        // Under the lock, so that what is found from now on is recorded after this removal.
        let mut replica = self.replica.lock();
        if unsound {
            let is_news = !replica.has_given_up(ino, region);
            replica.give_up(ino, region);
            drop(replica);
            if is_news {
                let file = self.path_of(ino);
                tracing::error!(brick = %self.id, file, ino = %ino, region, "corrupt, and no other brick has it sound just now");
            }
        } else {
            replica.damage_repaired(ino, region);
            self.journal.remove(vec![Removal::Missed(self.id, ino, region..region + 1)]);
            drop(replica);
            let blocks = region.saturating_mul(REGION_BYTES / BLOCK_BYTES);
            let gone = (ino, blocks)..(ino, blocks.saturating_add(REGION_BYTES / BLOCK_BYTES));
            let mut known = self.damage.known.lock();
            let before = known.len();
            known.retain(|block| !gone.contains(block));
            // Those that verified, and differed from what the others agree on; or were written over.
            self.damage.repaired.fetch_add((before - known.len()) as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What was given up is looked at again: it may have been written over, or another brick be back.
    pub(super) fn try_damage_again(&self) {
        let given_up = self.replica.lock().given_up();
        for (ino, regions) in given_up {
            for region in regions.iter().flatten() {
                if let Err(e) = self.settle_damage(ino, region) {
                    return self.complain(&e);
                }
            }
        }
        self.replica.lock().try_damaged_again();
    }

    /// For `heal info`.
    pub(super) fn corruption(&self) -> cluster::Corruption {
        cluster::Corruption {
            found: self.damage.found.load(Ordering::Relaxed),
            repaired: self.damage.repaired.load(Ordering::Relaxed),
            left: self.damage.known.lock().len() as u64,
        }
    }
}
