//! Repair gives way to applications `[S5]`: how busy a brick is with them, and for how long it asks repair to pause.
//!
//! The brick that pulls a region and the one it pulls from see what applications want of them, whichever client sent it; the
//! one that repairs does not. So the answer to a pull tells how long the next one shall wait: a multiple of what this one took,
//! which makes a slow or busy disk pause longer, and an idle brick not at all.

use std::sync::atomic::{AtomicU64, Ordering};

/// A brick is busy for so long after an application's last request.
const BUSY_MS: u64 = 100;
/// A pull that took one unit of time is followed by a pause of so many, if applications were busy meanwhile.
const PAUSES: u64 = 4;
/// The longest pause, in milliseconds: repair goes on, whatever the load.
const LONGEST_PAUSE_MS: u64 = 250;
/// How nice the threads are that repair: a processor that both want goes to the application.
pub(super) const NICENESS: i32 = 10;

/// When applications last wanted something of a brick.
#[derive(Debug, Default)]
pub(super) struct Pace {
    asked_ms: AtomicU64,
}

impl Pace {
    /// An application's request has come.
    pub(super) fn asked(&self, now_ms: u64) {
        self.asked_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Applications want something of this brick.
    pub(super) fn is_busy(&self, now_ms: u64) -> bool {
        self.asked_ms.load(Ordering::Relaxed) + BUSY_MS > now_ms
    }

    /// How long the next pull shall wait after one that took `took_ms`. `is_source_busy`: its source said so.
    pub(super) fn pause_ms(&self, is_source_busy: bool, took_ms: u64, now_ms: u64) -> u64 {
        if is_source_busy || self.is_busy(now_ms) { (took_ms.max(1) * PAUSES).min(LONGEST_PAUSE_MS) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repair_pauses_in_proportion_while_applications_are_busy_and_not_at_all_when_they_are_not() {
        let pace = Pace::default();
        assert_eq!(pace.pause_ms(false, 10, 10_000), 0);
        assert_eq!(pace.pause_ms(true, 10, 10_000), 40);
        pace.asked(10_000);
        assert_eq!(pace.pause_ms(false, 10, 10_050), 40);
        assert_eq!(pace.pause_ms(false, 0, 10_050), 4);
        assert_eq!(pace.pause_ms(false, 60_000, 10_050), LONGEST_PAUSE_MS);
        assert_eq!(pace.pause_ms(false, 10, 10_100), 0);
    }
}
