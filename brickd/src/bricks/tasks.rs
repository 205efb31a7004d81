//! What a brick does by itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use mortar_proto::config::{Slot, Slots};
use mortar_proto::replica::Stamp;
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{ConfigNo, Epoch, Ino, Seq, SessionId};

use super::brick::Brick;
use crate::store::{Record, Removal};

/// How often the end of a repair is looked for.
const REPAIR_EVERY: Duration = Duration::from_millis(50);
/// How often intents are cleared, and how long they must have been idle.
const INTENTS_EVERY: Duration = Duration::from_millis(1000);
const INTENT_IDLE_MS: u64 = 3_000;
/// How often the disk is probed.
const PROBE_EVERY: Duration = Duration::from_millis(1000);

/// Starts the brick's threads; they end with it.
pub(super) fn start(brick: &Arc<Brick>) -> std::io::Result<()> {
    let task = |name: &str, every: Duration, act: fn(&Brick)| {
        let weak: Weak<Brick> = Arc::downgrade(brick);
        std::thread::Builder::new().name(name.into()).spawn(move || {
            while let Some(brick) = weak.upgrade().filter(|b| !b.is_closed()) {
                act(&brick);
                drop(brick);
                std::thread::sleep(every);
            }
        })
    };
    task("brick-repair", REPAIR_EVERY, repair)?;
    task("brick-intents", INTENTS_EVERY, clear_intents)?;
    task("brick-space", PROBE_EVERY, Brick::look_at_space)?;
    probe(brick)
}

/// [E4] A probe write that fails or hangs fails the brick. Two threads: one that may hang, one that watches it.
fn probe(brick: &Arc<Brick>) -> std::io::Result<()> {
    let finished = Arc::new(AtomicU64::new(brick.now_ms()));
    let weak = Arc::downgrade(brick);
    let tell = Arc::clone(&finished);
    std::thread::Builder::new().name("brick-probe".into()).spawn(move || {
        while let Some(brick) = weak.upgrade().filter(|b| !b.is_closed()) {
            if let Err(e) = brick.objects.probe() {
                brick.complain(&e);
            }
            tell.store(brick.now_ms(), Ordering::Release);
            drop(brick);
            std::thread::sleep(PROBE_EVERY);
        }
    })?;
    let weak = Arc::downgrade(brick);
    std::thread::Builder::new().name("brick-watch".into()).spawn(move || {
        while let Some(brick) = weak.upgrade().filter(|b| !b.is_closed()) {
            let patience = PROBE_EVERY.as_millis() as u64 + brick.io_timeout_ms.load(Ordering::Relaxed).max(1000) * 5;
            if finished.load(Ordering::Acquire) + patience < brick.now_ms() {
                brick.fail("a probe write to the disk hangs");
            }
            drop(brick);
            std::thread::sleep(PROBE_EVERY);
        }
    })?;
    Ok(())
}

fn stamp(n: ConfigNo) -> Stamp {
    Stamp { n, epoch: Epoch(0), session: SessionId(0), seq: Seq(0), stable: Seq(0), settled: false }
}

fn repair(brick: &Brick) {
    let due = brick.replica.lock().plan_due();
    if let Some((n, sources)) = due {
        plan(brick, n, sources);
    }
    let due = brick.replica.lock().finish_due();
    if let Some((n, in_sync)) = due {
        finish(brick, n, in_sync);
    }
}

/// [S1] The plan: own intents, and, unless the stop was clean, those of a source.
fn plan(brick: &Brick, n: ConfigNo, sources: Slots) {
    if sources.is_empty() {
        brick.replica.lock().plan(n, &[]);
        return;
    }
    for source in sources.iter() {
        let asked = brick.ask_peer(source, Ino(0), &stamp(n), What::IntentList(data::IntentList {}));
        if let Ok((Some(Outcome::List(list)), _)) = asked {
            let intents: Vec<(Ino, Vec<u64>)> = list
                .files
                .iter()
                .map(|f| {
                    (
                        Ino(f.ino),
                        f.bounds.chunks_exact(2).flat_map(|b| b[0]..b[1].min(b[0].saturating_add(1 << 40))).collect(),
                    )
                })
                .collect();
            brick.replica.lock().plan(n, &intents);
            return;
        }
    }
}

/// [S4] When nothing is left: take the lists of the others over, flush, and say so.
fn finish(brick: &Brick, n: ConfigNo, in_sync: Slots) {
    for slot in in_sync.iter() {
        for x in Slot::ALL {
            if x == slot {
                continue;
            }
            let asked =
                brick.ask_peer(slot, Ino(0), &stamp(n), What::MissedList(data::MissedList { slot: u32::from(x.0) }));
            let Ok((Some(Outcome::List(list)), _)) = asked else { return };
            if x == brick.slot {
                if !list.files.is_empty() {
                    return;
                }
                continue;
            }
            let Some(id) = Brick::brick_of(&brick.replica.lock(), x) else { return };
            let regions = || {
                list.files.iter().flat_map(|f| {
                    f.bounds.chunks_exact(2).filter(|b| b[0] < b[1]).map(move |b| (Ino(f.ino), b[0]..b[1]))
                })
            };
            if let Err(e) = brick.journal.add(regions().map(|(ino, r)| Record::Missed(id, ino, r)).collect()) {
                return brick.fail(&format!("the journal cannot be written: {e}"));
            }
            let mut replica = brick.replica.lock();
            for (ino, r) in regions() {
                replica.missed_recorded(x, ino, r);
            }
        }
    }
    if let Err(e) = brick.objects.flush_all() {
        return brick.fail(&e.to_string());
    }
    if brick.replica.lock().repaired(n) {
        tracing::info!(brick = %brick.id, n = n.0, bytes = brick.repaired_bytes.load(Ordering::Relaxed), "repaired");
    }
}

/// [W7] Intents are cleared late and in batches.
fn clear_intents(brick: &Brick) {
    let due = brick.replica.lock().clearable_intents(brick.now_ms(), INTENT_IDLE_MS);
    for (ino, extents) in due {
        let began = brick.now_ms();
        if let Err(e) = brick.objects.flush(ino) {
            return brick.fail(&e.to_string());
        }
        let mut replica = brick.replica.lock();
        let cleared = replica.clear_intents(ino, &extents, began);
        // Under the lock, so that an intent that is made anew is recorded after its removal.
        brick.journal.remove(cleared.into_iter().map(|e| Removal::Intent(ino, e)).collect());
    }
}
