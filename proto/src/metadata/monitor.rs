//! What the leader proposes: from heartbeats, reports and time to commands `[E1]`..`[E6]`, `[E8]`, `[S4]`. Pure; one lives from
//! an election to the next. Being written.

use super::command::{Command, Registration};
use super::state::State;
use crate::config::{Slot, Slots};
use crate::types::{BrickId, ConfigNo, SetId};

/// What a brick says in a heartbeat.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beat {
    /// Which brick.
    pub brick: BrickId,
    /// Its present start.
    pub registration: Registration,
    /// It serves no reads until it was put out and came back `[E1]`.
    pub agreed: bool,
    /// It declares itself failed `[E4]` (and has agreed).
    pub failed: bool,
    /// It is shutting down cleanly `[E5]` (and has agreed).
    pub stopping: bool,
    /// The configuration its reports are made under.
    pub n: ConfigNo,
    /// For which other bricks its list of missed regions is empty `[S4]`.
    pub missed_empty: Slots,
    /// As a `Syncing` brick: nothing left, others' missed taken over, flushed `[S4]`.
    pub repaired: bool,
}

/// Times, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// How long an answered heartbeat lets a brick serve reads `[R1]`.
    pub read_lease_ms: u64,
    /// What is added for clocks that run at different rates `[E1]`.
    pub clock_margin_ms: u64,
    /// `[E6]`
    pub cold_start_wait_ms: u64,
    /// The first wait before a brick that was put out comes back; doubles with each failure up to `back_off_max_ms` `[E8]`.
    pub back_off_ms: u64,
    /// The longest such wait.
    pub back_off_max_ms: u64,
}

/// The leader's view of who lives.
#[derive(Debug)]
pub struct Monitor {}

impl Monitor {
    /// At an election: nobody was heard yet, and everybody counts as answered just now `[E1]`.
    #[must_use]
    pub fn new(_timing: Timing, _now_ms: u64) -> Self {
        Self {}
    }
    /// Heartbeats of a server's bricks are about to be answered. Returns the bricks to be asked to agree to their `Out`.
    pub fn heartbeat(&mut self, _state: &State, _now_ms: u64, _beats: &[Beat]) -> Vec<BrickId> {
        Vec::new()
    }
    /// A client says that a brick failed or did not answer, under configuration `n` `[W4]`.
    pub fn suspect(&mut self, _state: &State, _now_ms: u64, _set: SetId, _n: ConfigNo, _slot: Slot) {}
    /// What to propose now. Called at least every 50 ms and after each of the above; proposing the same again is harmless,
    /// since every command names the configuration it was made for.
    pub fn poll(&mut self, _state: &State, _now_ms: u64) -> Vec<Command> {
        Vec::new()
    }
}
