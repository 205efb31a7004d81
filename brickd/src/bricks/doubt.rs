//! What does not match its checksum where it was being written, after an unclean stop `[S3]`: a power cut may have left it so, or
//! the disk has changed it, which nobody can tell by looking. A brick that is repaired gets it from its source anyhow. The source
//! of a cold start has none; it looks whether another brick has what its checksum is of. If one has, that is as good as
//! what was there, whatever has happened: a flush makes checksums durable last, so none is of anything older than what was flushed.

use std::time::{Duration, Instant};

use mortar_proto::checksum::{self, Sum};
use mortar_proto::config::{BrickState, Configuration};
use mortar_proto::left_out::{Rule, left_out};
use mortar_proto::replica::Stamp;
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{BLOCK_BYTES, BrickId, ByteRange, ConfigNo, Epoch, Ino, MAX_IO_BYTES, Seq, SessionId};

use super::brick::Brick;
use super::requests::{Answer, store_failed};
use crate::store::{Doubts, StoreError, make_sums_anew};

/// Blocks that are asked for together.
pub(super) const AT_ONCE: usize = (MAX_IO_BYTES / BLOCK_BYTES) as usize;
/// How long others are asked: applications wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
/// Asked of whoever it is, whatever it has applied.
const NO_NUMBERS: Stamp =
    Stamp { n: ConfigNo(0), epoch: Epoch(0), session: SessionId(0), seq: Seq(0), stable: Seq(0), settled: false };

impl Brick {
    /// This start is registered: settles what is in doubt before anything is served or repaired.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(super) fn settle_doubts(&self, configuration: &Configuration) -> Result<(), StoreError> {
        let doubts = std::mem::take(&mut *self.doubts.lock());
        if configuration.state(self.slot) == BrickState::InSync && !left_out(Rule::S3Vouched) {
            self.look_for_all(&doubts, configuration)?;
        }
        make_sums_anew(&self.objects, &doubts)
    }

    fn look_for_all(&self, doubts: &Doubts, configuration: &Configuration) -> Result<(), StoreError> {
        let mut others: Vec<BrickId> =
            configuration.members.iter().map(|m| m.brick).filter(|b| *b != self.id).collect();
        let until = Instant::now() + PATIENCE;
        let (mut all, mut found) = (0, 0);
        for (ino, blocks) in doubts {
            let blocks: Vec<u64> = blocks.iter().flatten().collect();
            for some in blocks.chunks(AT_ONCE) {
                all += some.len();
                found += self.look_for(*ino, some, &mut others, until)?;
            }
        }
        if all > 0 {
            tracing::warn!(brick = %self.id, "{all} blocks did not match their checksums after an unclean stop; other bricks had {found} of them");
        }
        Ok(())
    }

    /// Looks for the contents of blocks that their checksums are of. Who does not answer is not asked again.
    fn look_for(
        &self,
        ino: Ino,
        blocks: &[u64],
        others: &mut Vec<BrickId>,
        until: Instant,
    ) -> Result<usize, StoreError> {
        if others.is_empty() || Instant::now() >= until {
            return Ok(0);
        }
        let mut left: Vec<(u64, Sum)> = Vec::new();
        for block in blocks {
            let (sum, _) = self.objects.sums(ino, block_range(*block))?;
            left.extend(sum.try_into().ok().map(|sum| (*block, Sum::from_le_bytes(sum))));
        }
        let mut found = 0;
        for other in others.clone() {
            if left.is_empty() || Instant::now() >= until {
                break;
            }
            let sums: Vec<u8> = left.iter().flat_map(|(_, sum)| sum.to_le_bytes()).collect();
            let asked = data::Matching { blocks: left.iter().map(|(block, _)| *block).collect(), sums: sums.into() };
            match self.ask_brick(other, ino, &NO_NUMBERS, &What::Matching(asked)) {
                Ok((Some(Outcome::Matching(reply)), bytes)) => {
                    for (block, bytes) in reply.blocks.iter().zip(bytes.chunks_exact(BLOCK_BYTES as usize)) {
                        let is_it = |(b, sum): &(u64, Sum)| b == block && checksum::matches(bytes, *sum);
                        if let Some(at) = left.iter().position(is_it) {
                            left.swap_remove(at);
                            self.take_found(ino, *block, bytes)?;
                            found += 1;
                        }
                    }
                }
                // An older one does not know the question.
                Ok(_) => others.retain(|o| *o != other),
                Err(e) => {
                    tracing::info!(brick = %self.id, "brick {other} cannot be asked for what is in doubt: {e:#}");
                    others.retain(|o| *o != other);
                }
            }
        }
        Ok(found)
    }

    fn take_found(&self, ino: Ino, block: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let size = self.objects.stat(ino)?.size;
        let range = block_range(block);
        let length = size.clamp(range.start, range.end) - range.start;
        self.objects.put(ino, range, bytes.get(..length as usize))
    }
}

fn block_range(block: u64) -> ByteRange {
    ByteRange::at(block.saturating_mul(BLOCK_BYTES), BLOCK_BYTES)
}

/// The contents of blocks, as far as they are what these checksums are of.
pub(super) fn matching(brick: &Brick, ino: Ino, asked: &data::Matching) -> Answer {
    let (mut found, mut payload) = (data::MatchingReply::default(), Vec::new());
    for (block, sum) in asked.blocks.iter().zip(asked.sums.chunks_exact(8)) {
        let (mut bytes, mut own) = (Vec::new(), Vec::new());
        if let Err(e) = brick.objects.read(ino, block_range(*block), false, &mut bytes, &mut own) {
            return store_failed(brick, &e);
        }
        let is_it = sum.try_into().is_ok_and(|sum| checksum::matches(&bytes, Sum::from_le_bytes(sum)));
        if is_it && !bytes.is_empty() {
            found.blocks.push(*block);
            bytes.resize(BLOCK_BYTES as usize, 0);
            payload.append(&mut bytes);
        }
    }
    (Outcome::Matching(found), payload)
}
