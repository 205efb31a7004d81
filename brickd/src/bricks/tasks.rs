//! What a brick does by itself.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use mortar_proto::config::{Slot, Slots};
use mortar_proto::wire::data::{self, request::What};
use mortar_proto::{ConfigNo, EXTENT_BYTES, Ino, MAX_FILE_BYTES, SIZE_REGION};

use super::brick::Brick;
use crate::store::{Record, Removal, StoreError};

/// How often the end of a repair is looked for, and how long it is left alone when others still have something to give.
const REPAIR_EVERY: Duration = Duration::from_millis(50);
const REPAIR_AGAIN: Duration = Duration::from_millis(300);
/// How often intents are cleared, and how long they must have been idle.
const INTENTS_EVERY: Duration = Duration::from_millis(1000);
const INTENT_IDLE_MS: u64 = 3_000;
/// How often the disk is probed.
const PROBE_EVERY: Duration = Duration::from_millis(1000);
/// How often the stamp is raised while something is changed.
const STAMP_EVERY: Duration = Duration::from_millis(1000);
const SPACE_EVERY: Duration = Duration::from_millis(500);
/// How often records of files that are gone are looked for.
const GONE_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked at what was noticed to be corrupt, and again at what nobody could give back.
const DAMAGE_EVERY: Duration = Duration::from_millis(300);
const DAMAGE_AGAIN: Duration = Duration::from_secs(15);
/// Extents that a plan takes from another brick, at most (I9).
const MAX_PLANNED: usize = 1 << 24;

/// Starts the brick's threads; they end with it.
pub(super) fn start(brick: &Arc<Brick>) -> std::io::Result<()> {
    let task = |name: &str, every: Duration, act: fn(&Brick)| {
        let weak: Weak<Brick> = Arc::downgrade(brick);
        std::thread::Builder::new().name(name.into()).spawn(move || {
            while let Some(brick) = weak.upgrade().filter(|b| !b.is_closed()) {
                if !brick.has_failed() {
                    brick.guarded(|| act(&brick));
                }
                drop(brick);
                std::thread::sleep(every);
            }
        })
    };
    task("brick-repair", REPAIR_EVERY, repair)?;
    task("brick-intents", INTENTS_EVERY, clear_intents)?;
    task("brick-space", SPACE_EVERY, Brick::look_at_space)?;
    task("brick-stamp", STAMP_EVERY, Brick::raise_stamp)?;
    task("brick-damage", DAMAGE_EVERY, Brick::look_at_noticed)?;
    task("brick-again", DAMAGE_AGAIN, Brick::try_damage_again)?;
    task("brick-gone", GONE_EVERY, |brick| brick.forget_what_is_gone(Vec::new()))?;
    probe(brick)
}

/// [E4] A probe write that fails or hangs fails the brick. Two threads: one that may hang, one that watches it.
fn probe(brick: &Arc<Brick>) -> std::io::Result<()> {
    let finished = Arc::new(AtomicU64::new(0));
    let weak = Arc::downgrade(brick);
    let tell = Arc::clone(&finished);
    std::thread::Builder::new().name("brick-probe".into()).spawn(move || {
        while let Some(brick) = weak.upgrade().filter(|b| !b.is_closed()) {
            if let Err(e) = brick.objects.probe() {
                brick.complain(&e);
            }
            tell.fetch_add(1, Ordering::Release);
            drop(brick);
            std::thread::sleep(PROBE_EVERY);
        }
    })?;
    let weak = Arc::downgrade(brick);
    std::thread::Builder::new().name("brick-watch".into()).spawn(move || {
        // Counted in the watcher's own turns, not by the clock: the whole daemon may have stood still, and the disk not.
        let (mut seen, mut turns) = (0, 0);
        while let Some(brick) = weak.upgrade().filter(|b| !b.is_closed()) {
            let now = finished.load(Ordering::Acquire);
            turns = if now == seen { turns + 1 } else { 0 };
            seen = now;
            let patience = brick.io_timeout_ms.load(Ordering::Relaxed).max(1000) * 5 / PROBE_EVERY.as_millis() as u64;
            if turns > patience + 1 {
                brick.fail("a probe write to the disk hangs");
            }
            drop(brick);
            std::thread::sleep(PROBE_EVERY);
        }
    })?;
    Ok(())
}

fn repair(brick: &Brick) {
    let due = brick.replica.lock().plan_due();
    if let Some((n, sources)) = due {
        plan(brick, n, sources);
    }
    let due = brick.replica.lock().finish_due();
    if let Some((n, in_sync)) = due
        && !finish(brick, n, in_sync)
    {
        std::thread::sleep(REPAIR_AGAIN);
    }
}

/// The intervals of a list, as far as they make sense: another brick's word is no reason to panic.
fn intervals(file: &data::FileRegions, end: u64) -> impl Iterator<Item = Range<u64>> {
    file.bounds.chunks_exact(2).map(|b| b[0]..b[1]).filter(move |r| r.start < r.end && r.end <= end)
}

/// [S1] The plan: own intents, and, unless the stop was clean, those of a source. In full: wherever the source or this brick has
/// data, and every size; where both have none they do not differ.
fn plan(brick: &Brick, n: ConfigNo, sources: Slots) {
    let in_full = brick.replica.lock().plans_in_full();
    let list = if in_full { What::DataList(data::DataList {}) } else { What::IntentList(data::IntentList {}) };
    let mut intents: Vec<(Ino, Vec<u64>)> = Vec::new();
    let mut listed = 0;
    let mut ask = |source: Slot| {
        intents.clear();
        listed = 0;
        brick.ask_for_list(source, n, &list, |files| {
            for file in files {
                let extents: Vec<Range<u64>> = intervals(&file, MAX_FILE_BYTES / EXTENT_BYTES + 1).collect();
                listed += extents.iter().map(|r| (r.end - r.start) as usize).sum::<usize>();
                if listed > MAX_PLANNED {
                    tracing::error!(brick = %brick.id, "brick {} has more intents than can be planned for", source.0);
                    return false;
                }
                intents.push((Ino(file.ino), extents.into_iter().flatten().collect()));
            }
            true
        })
    };
    if sources.is_empty() || sources.iter().any(&mut ask) {
        if in_full {
            match own_data(brick) {
                Ok(own) => intents.extend(own),
                Err(e) => return brick.complain(&e),
            }
            let extents = intents.iter().map(|(_, extents)| extents.len()).sum::<usize>();
            tracing::info!(brick = %brick.id, n = n.0, extents, "the whole brick is compared");
        }
        brick.replica.lock().plan(n, &intents);
        brick.progress.notify_all();
    }
}

fn own_data(brick: &Brick) -> Result<Vec<(Ino, Vec<u64>)>, StoreError> {
    let of = |ino: Ino| Ok((ino, super::list::data_of(brick, ino)?.iter().flatten().collect()));
    brick.objects.inodes()?.into_iter().map(of).collect()
}

/// [S4] When nothing is left: takes the lists of the others over, flushes, and says so. False: it has to be tried again.
fn finish(brick: &Brick, n: ConfigNo, in_sync: Slots) -> bool {
    let missed_of = |x: Slot| What::MissedList(data::MissedList { slot: u32::from(x.0) });
    for slot in in_sync.iter() {
        // The first page says whether there is anything at all.
        if !brick.ask_for_list(slot, n, &missed_of(brick.slot), |_| false) {
            return false;
        }
    }
    for slot in in_sync.iter() {
        for x in Slot::ALL.into_iter().filter(|x| *x != slot && *x != brick.slot) {
            if !brick.ask_for_list(slot, n, &missed_of(x), |files| take_over(brick, x, &files)) {
                return false;
            }
        }
    }
    if let Err(e) = brick.objects.flush_all() {
        brick.lose(&e.to_string());
        return false;
    }
    brick.journal.touch();
    let repaired = brick.replica.lock().repaired(n);
    if repaired {
        let bytes = brick.repaired_bytes.load(Ordering::Relaxed);
        tracing::info!(brick = %brick.id, n = n.0, bytes, "repaired");
    }
    repaired
}

fn take_over(brick: &Brick, x: Slot, files: &[data::FileRegions]) -> bool {
    let Some(id) = Brick::brick_of(&brick.replica.lock(), x) else { return false };
    let regions = || files.iter().flat_map(|f| intervals(f, SIZE_REGION + 1).map(|r| (Ino(f.ino), r)));
    if let Err(e) = brick.journal.add(regions().map(|(ino, r)| Record::Missed(id, ino, r)).collect()) {
        brick.lose(&format!("the journal cannot be written: {e}"));
        return false;
    }
    let mut replica = brick.replica.lock();
    for (ino, r) in regions() {
        replica.missed_recorded(x, ino, r);
    }
    true
}

/// [W7] Intents are cleared late and in batches.
fn clear_intents(brick: &Brick) {
    let due = brick.replica.lock().clearable_intents(brick.now_ms(), INTENT_IDLE_MS);
    for (ino, extents) in due {
        let began = brick.now_ms();
        if let Err(e) = brick.objects.flush(ino) {
            return brick.lose(&e.to_string());
        }
        let mut replica = brick.replica.lock();
        // The kernel tells of what it could not write once: to another flush, it may be, than this one [W8].
        if replica.has_failed() {
            return;
        }
        let cleared = replica.clear_intents(ino, &extents, began);
        // Under the lock, so that an intent that is made anew is recorded after its removal.
        brick.journal.remove(cleared.into_iter().map(|e| Removal::Intent(ino, e)).collect());
    }
}
