//! What was asked and acknowledged, and what must be true after each step.

use std::collections::BTreeMap;

use mortar_proto::config::{BrickState, Configuration, Slot};
use mortar_proto::coordinator::{Body, OpId, Request};
use mortar_proto::types::{ConfigNo, Epoch, Seq};

use super::disk::INO;
use super::part::Shown;
use super::world::{BRICKS, CLIENTS, World};

/// The place of a write in the file's order.
pub type Key = (Epoch, Seq);

#[derive(Clone, Copy, Debug, Default)]
struct Written {
    client: usize,
    /// What it was last sent under.
    key: Key,
    acknowledged: bool,
    flushed: bool,
    /// A cold start has lost it, and the log tells so [E7]; under which configuration.
    lost: Option<ConfigNo>,
}

/// All writes there were.
#[derive(Clone, Debug, Default)]
pub struct History {
    ops: BTreeMap<OpId, Written>,
    need: Key,
    flushed_need: Key,
    /// The highest epoch of which an `InSync` brick has accepted a mutation.
    accepted: Epoch,
}

impl History {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
    /// A write was asked for.
    pub fn submitted(&mut self, op: OpId) {
        self.ops.insert(op, Written::default());
    }
    /// By this client.
    pub fn of_client(&mut self, op: OpId, client: usize) {
        if let Some(o) = self.ops.get_mut(&op) {
            o.client = client;
        }
    }
    /// A request was sent.
    pub fn sent(&mut self, request: &Request) {
        let Body::Mutate(op, _) = request.body else { return };
        if let Some(o) = self.ops.get_mut(&op) {
            o.key = o.key.max((request.epoch, request.seq));
            o.lost = o.lost.filter(|n| request.n < *n);
        }
    }
    /// A write was acknowledged.
    pub fn acknowledged(&mut self, op: OpId) {
        if let Some(o) = self.ops.get_mut(&op) {
            o.acknowledged = true;
        }
        self.recompute();
    }
    /// The writes that an fsync which begins now covers.
    #[must_use]
    pub fn to_flush(&self, client: usize) -> Vec<OpId> {
        self.ops.iter().filter(|(_, o)| o.client == client && o.acknowledged).map(|(op, _)| *op).collect()
    }
    /// It was acknowledged.
    pub fn flushed(&mut self, ops: &[OpId]) {
        for op in ops {
            if let Some(o) = self.ops.get_mut(op) {
                o.flushed = true;
            }
        }
        self.recompute();
    }
    fn recompute(&mut self) {
        let kept = || self.ops.values().filter(|o| o.acknowledged && o.lost.is_none());
        let (need, flushed) = (kept().map(|o| o.key).max(), kept().filter(|o| o.flushed).map(|o| o.key).max());
        self.need = need.unwrap_or_default();
        self.flushed_need = flushed.unwrap_or_default();
    }
    fn key(&self, value: OpId) -> Key {
        self.ops.get(&value).map_or_else(Key::default, |o| o.key)
    }
    /// What a read that begins now must return at least.
    #[must_use]
    pub fn need(&self) -> Key {
        self.need
    }
    /// Is this content new enough?
    ///
    /// # Errors
    /// A sentence that says why not.
    pub fn check(&self, value: OpId, need: Key) -> Result<(), String> {
        let key = self.key(value);
        if key < need {
            return Err(format!("write {} of {key:?} is older than {need:?}", value.0));
        }
        Ok(())
    }
    /// A cold start took a source that had lost what it had not flushed.
    fn cold_start(&mut self, n: ConfigNo, value: OpId) {
        let kept = self.key(value);
        for o in self.ops.values_mut().filter(|o| o.key > kept && !o.flushed) {
            o.lost = Some(n);
        }
        self.recompute();
    }
}

impl Shown for History {
    fn shown(&self) -> impl core::fmt::Debug + '_ {
        (&self.ops, self.accepted)
    }
}

impl World {
    /// The brick is `InSync` in its registered incarnation, and runs.
    fn is_in_sync(&self, configuration: &Configuration, s: usize) -> bool {
        let member = configuration.members[s];
        let brick = &self.bricks[s];
        member.state == BrickState::InSync && member.incarnation == brick.incarnation() && brick.is_up()
    }

    /// I1, I2, I6, I7 on the disks.
    pub(super) fn check_step(&mut self) {
        let configuration = self.configuration();
        for s in 0..BRICKS {
            let serves = self.bricks[s].may_read(self.leader.now_ms);
            let disk = &self.bricks[s].disk;
            if (serves || self.is_in_sync(&configuration, s))
                && let Err(why) = self.history.check(disk.value(), self.history.need)
            {
                let rule = if serves { "I2: it serves reads and" } else { "I1: it is InSync and" };
                return self.fail(|| format!("b{s}: {rule} has what is too old: {why}"));
            }
            let durable = disk.versions().first().copied().unwrap_or(OpId(0));
            if configuration.members[s].state == BrickState::InSync
                && let Err(why) = self.history.check(durable, self.history.flushed_need)
            {
                return self.fail(|| format!("I7: b{s} is InSync and lacks what was flushed: {why}"));
            }
        }
        self.check_differences(&configuration);
    }

    /// I6: where a brick may differ from an `InSync` one, somebody knows.
    fn check_differences(&mut self, configuration: &Configuration) {
        let in_sync: Vec<usize> = (0..BRICKS).filter(|s| self.is_in_sync(configuration, *s)).collect();
        let all_run = configuration.in_sync().count() as usize == in_sync.len();
        for x in 0..BRICKS {
            let differs = in_sync.iter().any(|s| self.bricks[*s].disk.value() != self.bricks[x].disk.value());
            if !differs || !all_run || self.is_in_flight() {
                continue;
            }
            let missed = in_sync.iter().all(|s| self.bricks[*s].misses(x));
            let intent = self.bricks[x].has_intent() || in_sync.iter().any(|s| self.bricks[*s].has_intent());
            let doubt = (0..BRICKS).any(|s| self.bricks[s].has_doubt());
            if !missed && !intent && !doubt {
                return self.fail(|| format!("I6: b{x} differs from an InSync brick, and nobody knows"));
            }
        }
    }

    /// A mutation or a pull is under way somewhere.
    fn is_in_flight(&self) -> bool {
        let changes = |r: &Request| matches!(r.body, Body::Mutate(..) | Body::Pull { .. });
        let pipes = self.pipes.iter().flatten().any(|p| p.requests.iter().any(changes) || !p.answers.is_empty());
        let bricks = self.bricks.iter().any(|b| b.waiting.iter().any(|w| changes(&w.1)) || !b.jobs.is_empty());
        pipes || bricks || self.strays.iter().any(|(_, _, r)| changes(r)) || self.clients.iter().any(|c| c.waits() > 0)
    }

    /// I8, and [E6]'s choice of a source.
    pub(super) fn check_configuration(&mut self, old: &Configuration, new: &Configuration, source: Option<Slot>) {
        if new.in_sync().is_empty() {
            self.fail(|| "I8: no brick is InSync".to_owned());
        }
        let Some(source) = source else { return };
        let kept = |s: &Slot| new.members[s.index()].boot == old.members[s.index()].boot;
        if kept(&source) {
            return;
        }
        let registered = |s: &Slot| new.members[s.index()].incarnation != old.members[s.index()].incarnation;
        if let Some(better) = old.in_sync().iter().find(|s| kept(s) && registered(s)) {
            self.fail(|| format!("E6: b{} is the source, but b{} kept its boot id", source.0, better.0));
        }
        let value = self.bricks[source.index()].disk.value();
        self.history.cold_start(new.n, value);
        self.forgive_reads();
    }

    /// I3: no `InSync` brick accepts a mutation of a lower epoch after any of them has accepted one of a higher.
    pub(super) fn check_mutation(&mut self, s: usize, request: &Request) {
        if !self.is_in_sync(&self.configuration(), s) {
            return;
        }
        if request.epoch < self.history.accepted {
            let highest = self.history.accepted;
            self.fail(|| format!("I3: b{s} writes under e={} after e={highest} was accepted", request.epoch));
        }
        self.history.accepted = request.epoch.max(self.history.accepted);
    }

    /// I5 when a holder has settled what was in doubt [W2], or gives the lease back: nothing is in flight.
    pub(super) fn check_settled(&mut self, c: usize) {
        let configuration = self.configuration();
        let (lease, client) = (self.leader.lease(), &self.clients[c]);
        if client.knows != configuration.n || lease.holder != Some(client.session) {
            return;
        }
        let values: Vec<OpId> =
            (0..BRICKS).filter(|s| self.is_in_sync(&configuration, *s)).map(|s| self.bricks[s].disk.value()).collect();
        if values.iter().any(|v| *v != values[0]) {
            self.fail(|| format!("I5: c{c} has settled the file, and its InSync bricks have {values:?}"));
        }
    }

    /// Everything has come to its end.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        let c = self.configuration();
        let lease = self.leader.lease();
        c.in_sync().count() == 3
            && (0..BRICKS).all(|s| self.is_in_sync(&c, s))
            && self.clients.iter().all(|c| c.is_up() && c.is_quiet())
            && (lease.holder.is_some() || !lease.unsettled)
    }

    /// I10, and I5 and I2 at the end.
    pub(super) fn check_rest(&mut self) {
        if self.failure.is_some() {
            return;
        }
        if !self.is_at_rest() {
            let shown = super::leader::shown(&self.configuration());
            let (lease, clients) = (self.leader.lease(), &self.clients);
            let why = format!("I10: no rest: {shown}, {lease:?}, {clients:?}");
            return self.fail(|| why);
        }
        let values: Vec<OpId> = self.bricks.iter().map(|b| b.disk.value()).collect();
        if values.iter().any(|v| *v != values[0]) {
            return self.fail(|| format!("I5: at rest the bricks have {values:?}"));
        }
        for c in 0..CLIENTS {
            self.read(c);
            self.at_once();
        }
        if self.failure.is_none() && self.clients.iter().any(|c| c.waits() > 0) {
            self.fail(|| "I10: at rest a read does not end".to_owned());
        }
    }
}

impl super::brick::Brick {
    fn misses(&self, x: usize) -> bool {
        match &self.replica {
            Some(r) => r.missed(Slot(x as u8)).iter().any(|(_, set)| set.contains(0)),
            None => self.disk.has_missed(Slot(x as u8)),
        }
    }
    fn has_intent(&self) -> bool {
        self.disk.has_intent()
    }
    fn has_doubt(&self) -> bool {
        self.replica.as_ref().is_some_and(|r| !r.in_doubt(INO).is_empty())
    }
}
