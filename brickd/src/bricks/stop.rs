//! The end of a brick: a clean stop `[E5]`.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mortar_proto::config::BrickState;

use super::brick::Brick;
use crate::store::Removal;

/// How long what is running may take to end.
const DRAIN: Duration = Duration::from_secs(3);

impl Brick {
    pub(super) fn ask_to_stop(&self) {
        self.is_stopping.store(true, Ordering::Release);
        self.replica.lock().agree_to_out();
    }

    /// The configuration still has it, so that clients wait for it.
    pub(super) fn is_still_wanted(&self) -> bool {
        let replica = self.replica.lock();
        replica.is_live() && replica.state() != BrickState::Out && !replica.has_failed()
    }

    /// Drains, flushes, clears the intents of what is settled, and records that the stop was clean.
    pub(super) fn stop(&self) {
        self.close();
        if let Err(why) = self.end_cleanly() {
            tracing::warn!(brick = %self.id, "its next start counts as unclean: {why}");
        } else {
            tracing::info!(brick = %self.id, "stopped cleanly");
        }
    }

    fn end_cleanly(&self) -> Result<(), String> {
        let until = Instant::now() + DRAIN;
        loop {
            let mut replica = self.replica.lock();
            if replica.has_failed() {
                return Err("it has failed".into());
            }
            if replica.is_drained() {
                // [S1] After a clean stop only what this brick itself remembers is compared: it must have known all once,
                // and have nothing left of what others told it.
                let knew_all = self.registration.clean || self.was_in_sync.load(Ordering::Relaxed);
                if !knew_all || !replica.planned_regions().is_empty() {
                    return Err("it was still being repaired".into());
                }
                // A request that is still in some buffer must not come after the flush: nothing is admitted any more.
                replica.fail();
                break;
            }
            drop(replica);
            if Instant::now() >= until {
                return Err("requests were still running".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let began = self.now_ms() + 1;
        self.objects.flush_all().map_err(|e| {
            self.lose(&e.to_string());
            e.to_string()
        })?;
        let mut replica = self.replica.lock();
        for (ino, extents) in replica.clearable_intents(began, 0) {
            let cleared = replica.clear_intents(ino, &extents, began);
            self.journal.remove(cleared.into_iter().map(|e| Removal::Intent(ino, e)).collect());
        }
        self.raise_stamp();
        self.journal.set_clean().map_err(|e| format!("the journal cannot be written: {e}"))
    }
}
