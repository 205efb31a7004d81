//! What each block may hold, and what it does hold: every block tells its file, its number, its generation, and is filled to the
//! end by what follows from them. A block has one writer, which counts generations up; so a read that begins after generation
//! `g` was acknowledged and ends before `h + 1` was begun must find one of `g..=h`, whole.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::sim::rng::Rng;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
const MAGIC: u64 = 0x4d6f_7274_6172_536f;

/// All generations of one file's blocks.
#[derive(Debug)]
pub struct Ledger {
    /// Number of the file.
    pub file: u32,
    acknowledged: Vec<AtomicU32>,
    begun: Vec<AtomicU32>,
}

impl Ledger {
    /// A file whose blocks were never written.
    #[must_use]
    pub fn new(file: u32, blocks: usize) -> Self {
        let none = || (0..blocks).map(|_| AtomicU32::new(0)).collect();
        Self { file, acknowledged: none(), begun: none() }
    }

    /// How many blocks it has.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.begun.len()
    }

    /// Begins to write a block anew; fills `block` with what to write.
    pub fn begin(&self, number: usize, block: &mut [u8]) -> u32 {
        let generation = self.begun[number].fetch_add(1, Ordering::SeqCst) + 1;
        fill(self.file, number, generation, block);
        generation
    }

    /// The write of this generation was acknowledged.
    pub fn acknowledge(&self, number: usize, generation: u32) {
        self.acknowledged[number].store(generation, Ordering::SeqCst);
    }

    /// What a read that begins now must find at least, block by block.
    #[must_use]
    pub fn floor(&self, first: usize, count: usize) -> Vec<u32> {
        self.acknowledged[first..first + count].iter().map(|a| a.load(Ordering::SeqCst)).collect()
    }

    /// Checks what a read has found that has just ended.
    ///
    /// # Errors
    /// What is wrong with which block.
    pub fn check(&self, first: usize, floor: &[u32], data: &[u8]) -> Result<(), String> {
        for (index, (block, floor)) in data.chunks_exact(BLOCK).zip(floor).enumerate() {
            let number = first + index;
            let begun = self.begun[number].load(Ordering::SeqCst);
            let found = generation_of(self.file, number, block)
                .map_err(|why| format!("block {number} of file {}: {why}", self.file))?;
            if !(*floor..=begun).contains(&found) {
                let is = if found < *floor { "stale" } else { "from nowhere" };
                return Err(format!(
                    "block {number} of file {} is {is}: it holds generation {found}; {floor} was acknowledged before the \
                     read began, and {begun} is the newest that was begun",
                    self.file
                ));
            }
        }
        Ok(())
    }
}

fn rest(file: u32, number: usize, generation: u32) -> Rng {
    Rng::new((u64::from(file) << 56) ^ ((number as u64) << 28) ^ u64::from(generation))
}

fn fill(file: u32, number: usize, generation: u32, block: &mut [u8]) {
    let mut rng = rest(file, number, generation);
    for (index, word) in block.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => MAGIC,
            1 => (u64::from(file) << 32) | u64::from(generation),
            2 => number as u64,
            _ => rng.draw(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn word(block: &[u8], index: usize) -> u64 {
    block.get(index * 8..index * 8 + 8).and_then(|w| w.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// The generation that a block holds, whole; 0 if it was never written.
fn generation_of(file: u32, number: usize, block: &[u8]) -> Result<u32, String> {
    if block.iter().all(|b| *b == 0) {
        return Ok(0);
    }
    if word(block, 0) != MAGIC {
        return Err(format!("it holds nothing that was written, beginning {:02x?}", &block[..block.len().min(32)]));
    }
    let (tag, at) = (word(block, 1), word(block, 2));
    if (tag >> 32) as u32 != file || at != number as u64 {
        return Err(format!("it holds block {at} of file {}", tag >> 32));
    }
    let generation = tag as u32;
    let mut whole = vec![0; BLOCK];
    fill(file, number, generation, &mut whole);
    match whole.iter().zip(block).position(|(a, b)| a != b) {
        None => Ok(generation),
        Some(byte) => Err(format!("generation {generation} is mixed with something else from byte {byte} on")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(ledger: &Ledger, number: usize) -> (u32, Vec<u8>) {
        let mut block = vec![0; BLOCK];
        (ledger.begin(number, &mut block), block)
    }

    #[test]
    fn a_read_may_find_what_was_acknowledged_or_begun_and_nothing_else() {
        let ledger = Ledger::new(3, 8);
        let hole = vec![0; BLOCK];
        assert!(ledger.check(5, &ledger.floor(5, 1), &hole).is_ok());
        let (first, one) = written(&ledger, 5);
        let floor = ledger.floor(5, 1);
        assert!(ledger.check(5, &floor, &hole).is_ok(), "not acknowledged yet");
        assert!(ledger.check(5, &floor, &one).is_ok(), "but begun");
        ledger.acknowledge(5, first);
        assert!(ledger.check(5, &floor, &hole).is_ok(), "that read began before");
        let floor = ledger.floor(5, 1);
        assert!(ledger.check(5, &floor, &hole).unwrap_err().contains("stale"));
        let other = Ledger::new(3, 8);
        assert!(other.check(5, &[0], &one).unwrap_err().contains("from nowhere"));
    }

    #[test]
    fn mixed_and_misplaced_blocks_are_found() {
        let ledger = Ledger::new(3, 8);
        let (_, one) = written(&ledger, 5);
        let (_, two) = written(&ledger, 5);
        let mixed = [&two[..2048], &one[2048..]].concat();
        assert!(ledger.check(5, &[0], &mixed).unwrap_err().contains("mixed"));
        let (_, elsewhere) = written(&ledger, 6);
        assert!(ledger.check(5, &[0], &elsewhere).unwrap_err().contains("holds block 6"));
        let mut flipped = two.clone();
        flipped[4000] ^= 1;
        assert!(ledger.check(5, &[0], &flipped).is_err());
        assert!(ledger.check(5, &[0], &two).is_ok());
    }
}
