//! What a file should contain, and the mutations that are tried on it.

use std::collections::BTreeMap;
use std::sync::Arc;

use mortar_proto::wire::data::{self, request::What};
use mortar_proto::{BLOCK_BYTES, EXTENT_BYTES};

use crate::chance::Chance;

const BLOCK: usize = BLOCK_BYTES as usize;
const KEEP: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
const PUNCH: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32 | KEEP;
const ZERO: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;

/// A file's content: its size, and the blocks that are not zeroes.
#[derive(Clone, Default)]
pub struct Content {
    pub size: u64,
    pub blocks: BTreeMap<u64, Arc<[u8; BLOCK]>>,
}

impl Content {
    /// A block, with zeroes past the end.
    pub fn block(&self, number: u64) -> &[u8] {
        const ZEROES: [u8; BLOCK] = [0; BLOCK];
        self.blocks.get(&number).map_or(&ZEROES, |b| &b[..])
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let at = offset + i as u64;
            let block = self.blocks.entry(at / BLOCK_BYTES).or_insert_with(|| Arc::new([0; BLOCK]));
            Arc::make_mut(block)[(at % BLOCK_BYTES) as usize] = *byte;
        }
        self.size = self.size.max(offset + data.len() as u64);
    }

    /// Zeroes, of what there is.
    fn clear(&mut self, start: u64, end: u64) {
        let numbers: Vec<u64> =
            self.blocks.range(start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).map(|b| *b.0).collect();
        for number in numbers {
            let first = number * BLOCK_BYTES;
            let (from, to) = (start.max(first) - first, end.min(first + BLOCK_BYTES) - first);
            if let Some(block) = self.blocks.get_mut(&number) {
                Arc::make_mut(block)[from as usize..to as usize].fill(0);
                if block.iter().all(|b| *b == 0) {
                    self.blocks.remove(&number);
                }
            }
        }
    }

    /// What it is after a mutation.
    pub fn after(&self, mutation: &Mutation, tag: u64) -> Self {
        let mut next = self.clone();
        match *mutation {
            Mutation::Write { offset, length } => next.put(offset, &payload(tag, offset, length)),
            Mutation::Truncate { size } => {
                next.clear(size, self.size.max(size));
                next.size = size;
            }
            Mutation::Allocate { offset, length, mode } => {
                if mode & KEEP == 0 {
                    next.size = self.size.max(offset + length);
                }
                if mode & (PUNCH | ZERO) & !KEEP != 0 {
                    next.clear(offset, offset + length);
                }
            }
        }
        next
    }
}

/// What a write writes: other bytes in each sector, and by each mutation; never zeroes.
pub fn payload(tag: u64, offset: u64, length: u64) -> Vec<u8> {
    let byte = |at: u64| ((tag * 37 + at / 512 * 11 + at % 512 * 3) as u8) | 1;
    (offset..offset + length).map(byte).collect()
}

/// A change of a file.
#[derive(Clone, Copy, Debug)]
pub enum Mutation {
    Write { offset: u64, length: u64 },
    Truncate { size: u64 },
    Allocate { offset: u64, length: u64, mode: u32 },
}

impl Mutation {
    /// As it is asked for.
    pub fn what(&self, tag: u64) -> (What, Vec<u8>) {
        match *self {
            Self::Write { offset, length } => {
                (What::Write(data::Write { offset, sums: Default::default() }), payload(tag, offset, length))
            }
            Self::Truncate { size } => (What::Truncate(data::Truncate { size }), Vec::new()),
            Self::Allocate { offset, length, mode } => {
                (What::Allocate(data::Allocate { offset, length, mode }), Vec::new())
            }
        }
    }

    /// What every file has before anything is tried on it: data at its start, and around the boundary of two intent extents.
    pub const FIRST: [Self; 2] =
        [Self::Write { offset: 0, length: 64 << 10 }, Self::Write { offset: EXTENT_BYTES - 8192, length: 28_192 }];

    /// How many there are to choose from.
    pub const KINDS: u64 = 15;

    /// One of those that are tried, for a file of that size.
    pub fn of_kind(kind: u64, size: u64) -> Self {
        match kind {
            // Over blocks; over parts of blocks; over both extents.
            0 => Self::Write { offset: 4096, length: 8192 },
            1 => Self::Write { offset: 5000, length: 9000 },
            2 => Self::Write { offset: EXTENT_BYTES - 5000, length: 10_000 },
            // Growing: by what comes next, far beyond.
            3 => Self::Write { offset: size, length: 30_000 },
            4 => Self::Write { offset: size.max(2 * EXTENT_BYTES + (1 << 20)), length: 12_288 },
            // Into a hole.
            5 => Self::Write { offset: (3 << 20) + 1000, length: 8192 },
            6 => Self::Truncate { size: 40_000 },
            7 => Self::Truncate { size: EXTENT_BYTES - 3000 },
            8 => Self::Truncate { size: size + 100_001 },
            9 => Self::Allocate { offset: 8192, length: 32_768, mode: PUNCH },
            10 => Self::Allocate { offset: 6000, length: 14_000, mode: PUNCH },
            11 => Self::Allocate { offset: EXTENT_BYTES - 7000, length: 20_000, mode: PUNCH },
            12 => Self::Allocate { offset: 3000, length: 27_000, mode: ZERO | KEEP },
            13 => Self::Allocate { offset: size.saturating_sub(5000), length: 20_000, mode: ZERO },
            _ => Self::Allocate { offset: size, length: 50_000, mode: 0 },
        }
    }

    /// A sequence of one to three kinds; the first ones are each kind alone.
    pub fn sequence(number: u64, chance: &mut Chance) -> Vec<u64> {
        if number < Self::KINDS {
            return vec![number];
        }
        (0..2 + chance.below(2)).map(|_| chance.below(Self::KINDS)).collect()
    }
}
