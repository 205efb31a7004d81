//! A brick's disk: a page cache above what is durable. A killed process keeps the cache; a power cut keeps, of each block and of
//! each block's checksum on its own, anything between what was durable and what was written last, for file systems order nothing
//! until fsync; of a block also sectors of several.
//!
//! A block's content is the number of the operation that wrote it; 0 is a hole. Where data and checksum do not agree, the content
//! that the checksum is of counts, and the block is rotten.

use std::collections::{BTreeMap, BTreeSet};

use mortar_proto::interval::IntervalSet;
use mortar_proto::replica::Recorded;
use mortar_proto::types::{BLOCK_BYTES, BrickId, ByteRange, EXTENT_BYTES, Ino};

use super::rng::Rng;

/// Blocks of a file that are looked at.
pub const BLOCKS: usize = 4;
/// How often a power cut leaves a checksum of its own choice, and data that is a mixture, where it can.
const SUM_APART_PERMILLE: u64 = 300;
const TORN_PERMILLE: u64 = 300;

/// Where the blocks lie: the middle of them is a boundary of regions, or of intent extents.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// The offset of block 0.
    pub base: u64,
}

impl Geometry {
    /// The first byte of a block.
    #[must_use]
    pub fn offset(self, block: usize) -> u64 {
        self.base + block as u64 * BLOCK_BYTES
    }
    /// The bytes of a block.
    #[must_use]
    pub fn range(self, block: usize) -> ByteRange {
        ByteRange::at(self.offset(block), BLOCK_BYTES)
    }
    /// The blocks of a range.
    pub fn blocks(self, range: ByteRange) -> impl Iterator<Item = usize> {
        (0..BLOCKS).filter(move |b| self.range(*b).overlaps(&range))
    }
}

/// Something as it was written, and when. The checksum lies in another file than the data and has a fate of its own.
#[derive(Clone, Copy, Debug, Default)]
struct Version {
    at: u64,
    /// What the checksum is of.
    value: u64,
    /// What there is.
    data: u64,
    /// The disk has changed the data by itself.
    is_spoiled: bool,
}

/// One thing that is written as a whole, with everything it may be after a power cut, oldest first. The kernel forgets that
/// something is to be written once it could not write it: then no later flush makes it durable. Last, the data that was durable
/// before.
#[derive(Clone, Debug, Default)]
struct Cell(Vec<Version>, bool, u64);

impl Cell {
    fn last(&self) -> Version {
        self.0.last().copied().unwrap_or_default()
    }
    fn value(&self) -> u64 {
        self.last().value
    }
    fn is_rotten(&self) -> bool {
        self.last().value != self.last().data
    }
    fn durable(&self) -> u64 {
        self.0.first().map_or(0, |w| w.value)
    }
    fn write(&mut self, at: u64, value: u64) {
        if self.0.is_empty() {
            self.0.push(Version::default());
        }
        self.0.push(Version { at, value, data: value, is_spoiled: false });
        self.1 = false;
    }
    fn flushed(&mut self, upto: u64) {
        while !self.1 && self.0.len() > 1 && self.0[1].at <= upto {
            self.2 = self.0.remove(0).data;
        }
    }
    fn evict(&mut self, rng: &mut Rng) {
        if self.0.len() > 1 && rng.chance(500) {
            let kept = self.0[rng.index(self.0.len())];
            self.0 = vec![kept];
            self.1 = false;
        }
    }
    /// Returns what it may have been as well.
    fn lose_power(&mut self, rng: &mut Rng) -> Vec<Version> {
        self.1 = false;
        if self.0.len() < 2 {
            return Vec::new();
        }
        let kept = self.0[rng.index(self.0.len())];
        std::mem::replace(&mut self.0, vec![kept])
    }
    /// Of what a block may have been, its checksum and its data are left as they please; the data may be sectors of several.
    fn tear(&mut self, were: &[Version], tears: &mut Rng) -> Option<Torn> {
        let left = self.0.last_mut().filter(|_| !were.is_empty())?;
        if tears.chance(SUM_APART_PERMILLE) {
            left.value = were[tears.index(were.len())].value;
        }
        let mixed: Vec<&Version> = were.iter().filter(|_| tears.chance(700)).collect();
        let parts: BTreeSet<u64> = mixed.iter().map(|w| w.data).collect();
        if parts.len() < 2 || !tears.chance(TORN_PERMILLE) {
            return None;
        }
        left.is_spoiled = mixed.iter().any(|w| w.is_spoiled);
        left.data = nobodys(tears);
        Some(Torn { value: left.data, parts: parts.into_iter().collect() })
    }
}

/// A block that is a mixture of sectors, and of which contents: no operation wrote it.
#[derive(Clone, Debug)]
pub struct Torn {
    /// What it reads as.
    pub value: u64,
    /// What is mixed in it.
    pub parts: Vec<u64>,
}

/// A content that no operation wrote, and that is nowhere else.
pub fn nobodys(dice: &mut Rng) -> u64 {
    dice.draw() | 1 << 63
}

/// A file's data.
#[derive(Clone, Debug, Default)]
struct Data {
    blocks: [Cell; BLOCKS],
    size: Cell,
}

/// What a pull carries.
#[derive(Clone, Copy, Debug, Default)]
pub struct Content {
    /// The blocks.
    pub blocks: [u64; BLOCKS],
    /// The size.
    pub size: u64,
    /// Blocks that do not match their checksums.
    pub rotten: [bool; BLOCKS],
    /// What there is, whatever the checksums say.
    pub data: [u64; BLOCKS],
}

/// The disk.
#[derive(Clone, Debug)]
pub struct Disk {
    geometry: Geometry,
    files: BTreeMap<Ino, Data>,
    writes: u64,
    /// The journal's stamp, what was changed so far, and how much of that when the stamp was raised last.
    stamp: u64,
    changes: u64,
    stamped: u64,
    /// When a block that did not match its checksum was made to match one again.
    healed: BTreeMap<(Ino, usize), u64>,
    /// The simulated time.
    pub now_ms: u64,
    /// Write intents that are recorded.
    intents: BTreeSet<(Ino, u64)>,
    /// Missed regions that are recorded.
    missed: BTreeMap<(BrickId, Ino), IntervalSet>,
    /// The last stop was clean.
    pub clean: bool,
    /// Records that were deleted and may come back after a power cut.
    deleted_intents: Vec<(Ino, u64)>,
    deleted_missed: Vec<(BrickId, Ino, core::ops::Range<u64>)>,
}

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            files: BTreeMap::new(),
            writes: 0,
            stamp: 0,
            changes: 0,
            stamped: 0,
            healed: BTreeMap::new(),
            now_ms: 0,
            intents: BTreeSet::new(),
            missed: BTreeMap::new(),
            clean: false,
            deleted_intents: Vec::new(),
            deleted_missed: Vec::new(),
        }
    }
    /// A block as it would be read.
    #[must_use]
    pub fn block(&self, ino: Ino, block: usize) -> u64 {
        self.files.get(&ino).map_or(0, |f| f.blocks[block].value())
    }
    /// A block as it would be after a power cut that loses all it can.
    #[must_use]
    pub fn durable(&self, ino: Ino, block: usize) -> u64 {
        self.files.get(&ino).map_or(0, |f| f.blocks[block].durable())
    }
    /// A file's size.
    #[must_use]
    pub fn size(&self, ino: Ino) -> u64 {
        self.files.get(&ino).map_or(0, |f| f.size.value())
    }
    /// Everything of a file.
    #[must_use]
    pub fn content(&self, ino: Ino) -> Content {
        Content {
            blocks: core::array::from_fn(|b| self.block(ino, b)),
            size: self.size(ino),
            rotten: core::array::from_fn(|b| self.is_rotten(ino, b)),
            data: core::array::from_fn(|b| self.data_of(ino, b)),
        }
    }
    /// The data of a block, whatever its checksum says.
    #[must_use]
    pub fn data_of(&self, ino: Ino, block: usize) -> u64 {
        self.files.get(&ino).map_or(0, |f| f.blocks[block].last().data)
    }
    /// The data that was on the disk before a block became what it is.
    #[must_use]
    pub fn data_before(&self, ino: Ino, block: usize) -> u64 {
        self.files.get(&ino).map_or(0, |f| f.blocks[block].2)
    }
    /// The disk changes the data of a block by itself.
    pub fn set_data(&mut self, ino: Ino, block: usize, data: u64) {
        if let Some(last) = self.files.get_mut(&ino).and_then(|f| f.blocks[block].0.last_mut()) {
            last.data = data;
            last.is_spoiled = true;
        }
    }
    /// What the disk had made of a block, also of what is durable of it, is this.
    pub fn set_spoiled(&mut self, ino: Ino, block: usize, data: u64) {
        let versions = self.files.get_mut(&ino).into_iter().flat_map(|f| &mut f.blocks[block].0);
        versions.filter(|v| v.is_spoiled).for_each(|v| v.data = data);
    }
    /// The disk has changed the data of a block since it was written.
    #[must_use]
    pub fn is_spoiled(&self, ino: Ino, block: usize) -> bool {
        self.files.get(&ino).is_some_and(|f| f.blocks[block].last().is_spoiled)
    }
    /// A block does not match its checksum.
    #[must_use]
    pub fn is_rotten(&self, ino: Ino, block: usize) -> bool {
        self.files.get(&ino).is_some_and(|f| f.blocks[block].is_rotten())
    }
    /// A block matched its checksum all the time since then.
    #[must_use]
    pub fn is_sound_since(&self, ino: Ino, block: usize, since_ms: u64) -> bool {
        !self.is_rotten(ino, block) && self.healed.get(&(ino, block)).is_none_or(|at| *at < since_ms)
    }
    /// Some block does not.
    #[must_use]
    pub fn has_rot(&self) -> bool {
        self.files.values().any(|f| f.blocks.iter().any(Cell::is_rotten))
    }
    /// A block does not match its checksum, in an extent with intent.
    fn is_doubted(&self, ino: Ino, block: usize) -> bool {
        self.is_rotten(ino, block) && self.has_intent(ino, self.geometry.offset(block) / EXTENT_BYTES)
    }
    /// All such blocks.
    #[must_use]
    pub fn doubted(&self) -> Vec<(Ino, usize)> {
        let all = self.files.keys().flat_map(|ino| (0..BLOCKS).map(|b| (*ino, b)));
        all.filter(|(ino, b)| self.is_doubted(*ino, *b)).collect()
    }
    /// What a block is once doubts are settled `[S3]`: what its checksum is of, or its data.
    #[must_use]
    pub fn may_be(&self, ino: Ino, block: usize) -> Vec<u64> {
        let data = self.is_doubted(ino, block).then(|| self.data_of(ino, block));
        [self.block(ino, block)].into_iter().chain(data).collect()
    }
    /// The checksum of a block is made from its data `[S3]`.
    pub fn make_sum_anew(&mut self, ino: Ino, block: usize) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.blocks[block].0.iter_mut().for_each(|w| w.value = w.data);
            self.healed.insert((ino, block), self.now_ms);
        }
    }
    fn set_block(&mut self, ino: Ino, block: usize, value: u64) {
        self.writes += 1;
        self.changes += 1;
        let at = self.writes;
        let cell = &mut self.files.entry(ino).or_default().blocks[block];
        if cell.is_rotten() {
            self.healed.insert((ino, block), self.now_ms);
        }
        if cell.value() != value || cell.is_rotten() {
            cell.write(at, value);
        }
    }
    /// Sets the size; what lies beyond becomes a hole. True when it changed.
    pub fn set_size(&mut self, ino: Ino, size: u64) -> bool {
        let changed = self.size(ino) != size;
        if changed {
            self.writes += 1;
            self.changes += 1;
            let at = self.writes;
            self.files.entry(ino).or_default().size.write(at, size);
        }
        for block in 0..BLOCKS {
            if self.geometry.offset(block) >= size {
                self.set_block(ino, block, 0);
            }
        }
        changed
    }
    /// Writes one block. True when the file grew.
    pub fn write(&mut self, ino: Ino, block: usize, value: u64) -> bool {
        let end = self.geometry.range(block).end;
        let grew = value != 0 && self.size(ino) < end;
        if grew {
            self.set_size(ino, end);
        }
        self.set_block(ino, block, value);
        grew
    }
    /// What a flush that begins now makes durable when it ends.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.writes
    }
    /// A flush that began at `upto` has ended.
    pub fn flushed(&mut self, ino: Ino, upto: u64) {
        self.changes += 1;
        if let Some(file) = self.files.get_mut(&ino) {
            file.blocks.iter_mut().for_each(|c| c.flushed(upto));
            file.size.flushed(upto);
        }
    }
    /// A flush has failed.
    pub fn flush_failed(&mut self, ino: Ino) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.blocks.iter_mut().chain([&mut file.size]).for_each(|c| c.1 = c.0.len() > 1);
        }
    }
    /// The kernel has forgotten some of what it could not write: it was clean, and memory was short.
    pub fn evict(&mut self, rng: &mut Rng) {
        for file in self.files.values_mut() {
            let size = file.size.value();
            // What was cut off has no pages.
            let has_pages = |block: usize| self.geometry.offset(block) < size;
            file.blocks.iter_mut().enumerate().filter(|(b, c)| c.1 && has_pages(*b)).for_each(|(_, c)| c.evict(rng));
        }
    }
    /// A brick starts whose disk has refused something, and writes again what it can read `[W8]`.
    pub fn write_again(&mut self) {
        for file in self.files.values_mut() {
            file.blocks.iter_mut().chain([&mut file.size]).filter(|c| c.1).for_each(|c| c.1 = false);
        }
    }
    /// The files there are.
    #[must_use]
    pub fn files(&self) -> Vec<Ino> {
        self.files.keys().copied().collect()
    }
    /// Every file, with its extents that have data and its first one, which stands for its size.
    #[must_use]
    pub fn data(&self) -> Vec<(Ino, Vec<u64>)> {
        let extents = |ino: Ino| {
            let with_data = (0..BLOCKS).filter(|b| self.block(ino, *b) != 0);
            let found: BTreeSet<u64> = with_data.map(|b| self.geometry.offset(b) / EXTENT_BYTES).chain([0]).collect();
            found.into_iter().collect()
        };
        self.files().into_iter().map(|ino| (ino, extents(ino))).collect()
    }
    /// The power fails. What is torn has dice of its own. Returns blocks that are mixtures now.
    pub fn lose_power(&mut self, rng: &mut Rng, tears: &mut Rng) -> Vec<Torn> {
        let mut torn = Vec::new();
        for file in self.files.values_mut() {
            for cell in &mut file.blocks {
                let were = cell.lose_power(rng);
                torn.extend(cell.tear(&were, tears));
            }
            file.size.lose_power(rng);
            let size = file.size.value();
            for block in 0..BLOCKS {
                // Past its end there is no data, whatever its checksums say.
                if self.geometry.offset(block) >= size
                    && let Some(last) = file.blocks[block].0.last_mut()
                {
                    last.data = 0;
                }
            }
        }
        for intent in std::mem::take(&mut self.deleted_intents) {
            if rng.chance(500) {
                self.intents.insert(intent);
            }
        }
        for (x, ino, regions) in std::mem::take(&mut self.deleted_missed) {
            if rng.chance(500) {
                self.missed.entry((x, ino)).or_default().insert(regions);
            }
        }
        torn
    }
    /// The stamp.
    #[must_use]
    pub fn stamp(&self) -> u64 {
        self.stamp
    }
    /// How often something was changed.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }
    /// Raises the stamp, durably, if something was changed since that was done last.
    pub fn raise_stamp(&mut self) -> bool {
        let is_due = self.changes != self.stamped;
        if is_due {
            self.stamped = self.changes;
            self.stamp += 1;
        }
        is_due
    }
    fn sync_records(&mut self) {
        self.changes += 1;
        self.deleted_intents.clear();
        self.deleted_missed.clear();
    }
    /// These intents are durable now.
    pub fn record_intents(&mut self, ino: Ino, extents: &[u64]) {
        self.sync_records();
        self.intents.extend(extents.iter().map(|e| (ino, *e)));
    }
    /// These missed regions are durable now.
    pub fn record_missed(&mut self, x: BrickId, ino: Ino, regions: core::ops::Range<u64>) {
        self.sync_records();
        self.missed.entry((x, ino)).or_default().insert(regions);
    }
    /// Forgets intents; not durably.
    pub fn forget_intents(&mut self, ino: Ino, extents: &[u64]) {
        for extent in extents {
            self.intents.remove(&(ino, *extent));
            self.deleted_intents.push((ino, *extent));
        }
    }
    /// The intent of an extent is recorded.
    #[must_use]
    pub fn has_intent(&self, ino: Ino, extent: u64) -> bool {
        self.intents.contains(&(ino, extent))
    }
    /// Forgets all intents, as no clean stop may.
    pub fn forget_own_intents(&mut self) {
        self.intents.clear();
        self.deleted_intents.clear();
    }
    /// Forgets a missed region; not durably.
    pub fn forget_missed(&mut self, x: BrickId, ino: Ino, regions: core::ops::Range<u64>) {
        if let Some(set) = self.missed.get_mut(&(x, ino)) {
            set.remove(regions.clone());
            self.deleted_missed.push((x, ino, regions));
        }
    }
    /// Forgets all that a brick misses of a file; not durably.
    pub fn forget_all_missed(&mut self, x: BrickId, ino: Ino) {
        if let Some(set) = self.missed.remove(&(x, ino)) {
            self.deleted_missed.extend(set.iter().map(|r| (x, ino, r)));
        }
    }
    /// The clean-stop record is durable, or durably gone.
    pub fn record_clean(&mut self, clean: bool) {
        self.sync_records();
        self.clean = clean;
    }
    /// What the replica is told when it starts.
    #[must_use]
    pub fn recorded(&self) -> Recorded {
        Recorded {
            intents: self.intents.iter().copied().collect(),
            missed: self.missed.iter().flat_map(|((x, ino), set)| set.iter().map(|r| (*x, *ino, r))).collect(),
        }
    }
}
