//! Block checksums: BLAKE3, truncated to 64 bits, of each 4 KiB block.
//!
//! Bytes past the end of a file count as zeroes, so a block's sum does not change when the file grows past it.
//! [`HOLE`] stands for a block that was never written or was punched: it reads as zeroes.

use crate::types::BLOCK_BYTES;
pub use crate::types::{HOLE, Sum};

/// The sum of one block of `BLOCK_BYTES` bytes, or of the shorter last block of a file. Never [`HOLE`].
#[must_use]
pub fn of_block(block: &[u8]) -> Sum {
    const ZEROES: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
    debug_assert!(block.len() as u64 <= BLOCK_BYTES);
    let hash = if block.len() == ZEROES.len() {
        blake3::hash(block)
    } else {
        let mut hasher = blake3::Hasher::new();
        hasher.update(block);
        hasher.update(&ZEROES[block.len().min(ZEROES.len())..]);
        hasher.finalize()
    };
    let bytes = hash.as_bytes();
    let sum = u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]);
    if sum == HOLE { 1 } else { sum }
}

/// True when `block` is what `sum` was made of; a hole matches zeroes only.
#[must_use]
pub fn matches(block: &[u8], sum: Sum) -> bool {
    if sum == HOLE { block.iter().all(|b| *b == 0) } else { of_block(block) == sum }
}
