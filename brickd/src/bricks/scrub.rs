//! A brick's scrub: reads what is on its disk at a modest rate, compares it with its checksums, and these with those of the other
//! `InSync` bricks. What is wrong here enters the list of what is corrupt, and is repaired like all of it `[R5]`; what is wrong on
//! another brick is told to it. It gives way to applications `[S5]`.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use mortar_proto::checksum::{HOLE, Sum};
use mortar_proto::config::Slot;
use mortar_proto::interval::IntervalSet;
use mortar_proto::metadata::options::Options;
use mortar_proto::metadata::state::Node;
use mortar_proto::scrub::{Difference, Looks, Next, Picture, Scrub, Turn, compare};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::wire::{cluster, decode, encode};
use mortar_proto::{BLOCK_BYTES, ByteRange, Ino, REGION_BYTES, SIZE_REGION};
use parking_lot::Mutex;

use super::brick::Brick;
use super::pace::NICENESS;
use crate::store::Record;

/// How long it sleeps at most before it looks whether it is to begin or to end.
const NAP: Duration = Duration::from_millis(200);
/// Between two looks at a region that differs.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How often its place is written down, in milliseconds.
const KEEP_EVERY_MS: u64 = 5_000;
/// Regions that other bricks have asked to have compared, at most (I9).
const MAX_ASKED: usize = 4096;

/// What a brick keeps of its scrub.
pub(super) struct Scrubbing {
    scrub: Mutex<Scrub>,
    /// Regions in which another brick finds this one alone.
    asked: Mutex<BTreeSet<(Ino, u64)>>,
    /// When and how far it was, and the rate since the time before: bytes a second.
    pace: Mutex<(u64, u64, u64)>,
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

impl Scrubbing {
    /// As the journal has it.
    pub(super) fn new(kept: Option<&[u8]>, options: &Options) -> Self {
        let mut scrub = Scrub::new(kept.and_then(|bytes| decode(bytes).ok()), now_s());
        scrub.set(options.scrub_rate, options.scrub_interval_s);
        Self { scrub: Mutex::new(scrub), asked: Mutex::default(), pace: Mutex::default() }
    }

    pub(super) fn set_options(&self, options: &Options) {
        self.scrub.lock().set(options.scrub_rate, options.scrub_interval_s);
    }

    /// Another brick finds this one alone in a region: it is compared from here as well.
    pub(super) fn compare_too(&self, ino: Ino, region: u64) {
        let mut asked = self.asked.lock();
        if asked.len() < MAX_ASKED {
            asked.insert((ino, region));
        }
    }
}

/// Starts the brick's thread for it; it ends with the brick.
pub(super) fn start(brick: &Arc<Brick>) -> std::io::Result<()> {
    let weak: Weak<Brick> = Arc::downgrade(brick);
    std::thread::Builder::new().name("brick-scrub".into()).spawn(move || {
        // Without the right to it, it is as nice as the thread that opened the brick.
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
        let mut kept_ms = 0;
        while let Some(brick) = weak.upgrade().filter(|b| !b.is_closed()) {
            let nap = if brick.has_failed() { None } else { brick.guarded(|| turn(&brick, &mut kept_ms)) };
            drop(brick);
            std::thread::sleep(nap.unwrap_or(NAP));
        }
    })?;
    Ok(())
}

/// Does the next thing, and tells for how long to do nothing then.
fn turn(brick: &Brick, kept_ms: &mut u64) -> Duration {
    let asked = brick.scrubbing.asked.lock().pop_first();
    if let Some((ino, region)) = asked {
        compare_region(brick, ino, region);
        return Duration::ZERO;
    }
    let turn = brick.scrubbing.scrub.lock().turn(brick.now_ms(), now_s());
    match turn {
        Turn::Idle => NAP,
        Turn::Wait(ms) => NAP.min(Duration::from_millis(ms)),
        Turn::Begin => {
            let total = brick.used_bytes();
            brick.scrubbing.scrub.lock().began(total);
            tracing::info!(brick = %brick.id, total, "scrub begins");
            brick.keep_scrub();
            Duration::ZERO
        }
        Turn::Look(ino, region) => {
            let began_ms = brick.now_ms();
            let is_over = look(brick, ino, region);
            let now_ms = brick.now_ms();
            if is_over || *kept_ms + KEEP_EVERY_MS <= now_ms {
                *kept_ms = now_ms;
                brick.keep_scrub();
            }
            Duration::from_millis(brick.pace.pause_ms(false, now_ms - began_ms, now_ms))
        }
    }
}

/// Looks at a region, or the next one that has anything. True: there was none, and the scrub has come to its end.
fn look(brick: &Brick, ino: Ino, region: u64) -> bool {
    let Some((ino, region)) = next_used(brick, ino, region) else {
        let record = {
            let mut scrub = brick.scrubbing.scrub.lock();
            scrub.looked(None, 0, 0, brick.now_ms(), now_s());
            scrub.record()
        };
        tracing::info!(brick = %brick.id, bytes = record.looked_bytes, found = record.found, undecided = record.undecided, "scrub has come to its end");
        return true;
    };
    let range = ByteRange::at(region * REGION_BYTES, REGION_BYTES);
    if region == 0 && !brick.objects.keep_name(ino).unwrap_or(true) {
        let file = brick.path_of(ino);
        tracing::error!(brick = %brick.id, file, ino = %ino, "the object was deleted or replaced while it was open: it is lost, and comes back from another brick, when mortar-brickd ends");
    }
    let corrupt = brick.objects.unsound_on_disk(ino, range);
    match corrupt {
        Ok((corrupt, bytes)) => {
            brick.remember_corrupt(ino, &corrupt);
            let found = corrupt.len() as u64 + compare_region(brick, ino, region);
            let mut scrub = brick.scrubbing.scrub.lock();
            // It may have been stopped meanwhile: the place is kept all the same.
            scrub.looked(Some((ino, region + 1)), bytes, found, brick.now_ms(), now_s());
        }
        Err(e) => brick.complain(&e),
    }
    false
}

/// The first region from here on that has data or checksums; of each file, the first region in any case.
fn next_used(brick: &Brick, ino: Ino, region: u64) -> Option<(Ino, u64)> {
    let (mut ino, mut region) = (ino, region);
    loop {
        let found = brick.log.with_state(|state| {
            let set = state.bricks.get(&brick.id)?.set;
            let is_here = |node: &Node| matches!(node, Node::File { set: s, .. } if *s == set);
            state.inodes.range(ino..).find(|(_, inode)| is_here(&inode.node)).map(|(ino, _)| *ino)
        })?;
        if found != ino {
            (ino, region) = (found, 0);
        }
        if region == 0 {
            return Some((ino, 0));
        }
        match brick.objects.next_used(ino, region.saturating_mul(REGION_BYTES)) {
            Ok(Some(at)) => return Some((ino, at / REGION_BYTES)),
            Ok(None) => (ino, region) = (Ino(ino.0.saturating_add(1)), 0),
            Err(e) => {
                brick.complain(&e);
                return None;
            }
        }
    }
}

/// Compares a region with the other bricks, as often as it takes to know. Returns how many blocks are wrong here.
fn compare_region(brick: &Brick, ino: Ino, region: u64) -> u64 {
    let mut looks = Looks::default();
    loop {
        match looks.saw(see(brick, ino, region)) {
            Next::Done => return 0,
            Next::Again => std::thread::sleep(LOOK_AGAIN),
            Next::Differ(difference) => return differ(brick, ino, region, &difference),
        }
        if brick.is_closed() || brick.has_failed() {
            return 0;
        }
    }
}

/// One look at what the `InSync` bricks have in a region. `None`: something is in doubt or running there, or one of them does not
/// tell just now. A brick that is not in sync itself, or alone, sees no difference.
fn see(brick: &Brick, ino: Ino, region: u64) -> Option<Difference> {
    let range = ByteRange::at(region * REGION_BYTES, REGION_BYTES);
    let (stamp, in_sync) = {
        let replica = brick.replica.lock();
        match replica.source_stamp(ino) {
            Some((stamp, in_sync)) if in_sync.has(brick.slot) && in_sync.count() > 1 => {
                if !replica.is_settled(ino, range) {
                    return None;
                }
                (stamp, in_sync)
            }
            _ => return Some(Difference::default()),
        }
    };
    let mut pictures: [Option<Picture>; 3] = [None, None, None];
    let (own, size) = brick.objects.sums(ino, range).ok()?;
    for slot in in_sync.iter() {
        let (sums, size) = if slot == brick.slot {
            (own.clone(), size)
        } else {
            let ask = What::Sums(data::Sums { start: range.start, end: range.end });
            match brick.ask_peer(slot, ino, &stamp, ask) {
                Ok((Some(Outcome::Sums(sums)), _)) if !sums.unsettled => (sums.sums.to_vec(), sums.size),
                // What is cut off there is known there.
                _ => return None,
            }
        };
        *pictures.get_mut(slot.index())? = Some(picture(range, &sums, size));
    }
    Some(compare(&pictures))
}

fn picture(range: ByteRange, sums: &[u8], size: u64) -> Picture {
    let at = |block: usize| range.start + block as u64 * BLOCK_BYTES;
    let sum = |(block, sum): (usize, &[u8])| -> Sum {
        if at(block) < size { sum.try_into().map_or(HOLE, Sum::from_le_bytes) } else { HOLE }
    };
    Picture { size, sums: sums.chunks_exact(8).enumerate().map(sum).collect() }
}

/// The bricks do differ: what is wrong here is to be repaired, what is wrong elsewhere is told there, and what nobody can decide is
/// told to the administrator. Returns how many blocks are wrong here.
fn differ(brick: &Brick, ino: Ino, region: u64, difference: &Difference) -> u64 {
    let first = region * (REGION_BYTES / BLOCK_BYTES);
    let numbers = |blocks: Vec<u64>| -> Vec<u64> { blocks.into_iter().map(|b| first + b).collect() };
    let own = numbers(difference.outvoted(brick.slot));
    let mut regions = IntervalSet::new();
    if !own.is_empty() {
        brick.found_outvoted(ino, &own);
        regions.insert(region..region + 1);
    }
    if let Some((from, to)) = difference.outvoted_size(brick.slot) {
        let file = brick.path_of(ino);
        tracing::error!(brick = %brick.id, file, ino = %ino, from, to, "the file has another size than on the two other bricks, which agree, and is to be repaired");
        // Nobody knows here what it lacks at its end.
        regions.insert(from.min(to) / REGION_BYTES..from.max(to).div_ceil(REGION_BYTES));
        regions.insert(SIZE_REGION..SIZE_REGION + 1);
    }
    brick.remember_damage(ino, &regions);
    for slot in Slot::ALL.into_iter().filter(|s| *s != brick.slot) {
        if !difference.outvoted(slot).is_empty() || difference.outvoted_size(slot).is_some() {
            let (start, end) = (region * REGION_BYTES, (region + 1) * REGION_BYTES);
            let stamp = brick.replica.lock().source_stamp(ino);
            if let Some((stamp, _)) = stamp {
                // If it does not hear of it now, it is found again.
                let _ = brick.ask_peer(slot, ino, &stamp, What::Report(data::Report { start, end, compare: true }));
            }
        }
    }
    let undecided = numbers(difference.undecided());
    let sizes = u64::from(difference.is_size_undecided());
    if !undecided.is_empty() || sizes > 0 {
        brick.scrubbing.scrub.lock().undecided(undecided.len() as u64 + sizes);
        let file = brick.path_of(ino);
        tracing::error!(brick = %brick.id, file, ino = %ino, blocks = ?undecided, size = sizes > 0, "bricks differ, and nobody knows which is right: nothing is changed");
    }
    own.len() as u64
}

impl Brick {
    /// Bytes that all files of this brick take.
    fn used_bytes(&self) -> u64 {
        let files: Vec<Ino> = self.log.with_state(|state| {
            let Some(set) = state.bricks.get(&self.id).map(|b| b.set) else { return Vec::new() };
            let is_here = |node: &Node| matches!(node, Node::File { set: s, .. } if *s == set);
            state.inodes.iter().filter(|(_, inode)| is_here(&inode.node)).map(|(ino, _)| *ino).collect()
        });
        files.into_iter().filter_map(|ino| self.objects.stat(ino).ok()).map(|s| s.blocks * 512).sum()
    }

    /// Writes down how far the scrub is.
    fn keep_scrub(&self) {
        let record = self.scrubbing.scrub.lock().record();
        if let Err(e) = self.journal.add(vec![Record::Scrub(encode(&record))]) {
            self.lose(&format!("the journal cannot be written: {e}"));
        }
    }

    /// What the administrator wants of the scrub, and how it does.
    pub(super) fn scrub(&self, action: cluster::ScrubAction) -> cluster::ScrubStatus {
        let is_changed = match action {
            cluster::ScrubAction::Status => false,
            cluster::ScrubAction::Start => self.scrubbing.scrub.lock().start(),
            cluster::ScrubAction::Stop => self.scrubbing.scrub.lock().stop(now_s()),
        };
        if is_changed {
            self.keep_scrub();
        }
        let (record, next_s) = {
            let scrub = self.scrubbing.scrub.lock();
            (scrub.record(), scrub.next_s())
        };
        cluster::ScrubStatus {
            running: record.running,
            stopped: !record.running && record.place.is_some(),
            looked_bytes: record.looked_bytes,
            total_bytes: record.total_bytes,
            rate_bytes: if record.running { self.scrub_rate(record.looked_bytes) } else { 0 },
            ended_s: record.ended_s,
            next_s: next_s.unwrap_or(0),
            found: record.found,
            undecided: record.undecided,
        }
    }

    /// How fast it was since it was asked some time ago.
    fn scrub_rate(&self, looked: u64) -> u64 {
        let now = self.now_ms();
        let mut pace = self.scrubbing.pace.lock();
        let (at_ms, at, rate) = *pace;
        if looked < at || at_ms == 0 {
            *pace = (now, looked, 0);
        } else if now >= at_ms + 1000 {
            *pace = (now, looked, (looked - at) * 1000 / (now - at_ms));
        } else {
            return rate;
        }
        pace.2
    }
}
