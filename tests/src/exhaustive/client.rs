//! A mount's process: the real [`Coordinator`] of the one file, its session, and its connections.

use std::collections::BTreeMap;

use mortar_proto::config::Slots;
use mortar_proto::coordinator::{
    Answer, Completion, Coordinator, Effect, Event, Mutation, OpId, Operation, RequestId, Timeouts,
};
use mortar_proto::metadata::{Command, Outcome};
use mortar_proto::types::{BLOCK_BYTES, ByteRange, ConfigNo, Epoch, SessionId};

use super::check::Key;
use super::disk::INO;
use super::leader::Leader;
use super::part::{Part, Shown};
use super::world::{BRICKS, CLIENTS, Origin, PACE_MS, Pipe, World, slot};

const TIMEOUTS: Timeouts = Timeouts { io_timeout_ms: 2000, hedge_ms: 300, no_quorum_ms: None };

/// What an application waits for.
#[derive(Clone, Debug)]
enum What {
    Write,
    Read(Key),
    Flush(Vec<OpId>),
}

/// A client.
#[derive(Clone, Debug)]
pub struct Client {
    up: bool,
    /// Its session, as far as it knows.
    pub session: SessionId,
    coordinator: Coordinator,
    pending: BTreeMap<OpId, What>,
    /// It has asked for the lease.
    pub(super) wants_lease: bool,
    /// It has asked for leave to repair a region.
    pub(super) wants_permit: bool,
    last_epoch: Epoch,
    /// The grant that was asked back last.
    recalled: Epoch,
    /// The configuration it knows.
    pub(super) knows: ConfigNo,
}

impl Client {
    /// One that has just started.
    #[must_use]
    pub fn new(leader: &Leader, c: usize) -> Self {
        Self::with_session(leader, leader.sessions[c])
    }
    fn with_session(leader: &Leader, session: SessionId) -> Self {
        let configuration = leader.configuration();
        Self {
            up: true,
            session,
            coordinator: Coordinator::new(INO, configuration, Slots::NONE, TIMEOUTS),
            pending: BTreeMap::new(),
            wants_lease: false,
            wants_permit: false,
            last_epoch: Epoch(0),
            recalled: Epoch(0),
            knows: configuration.n,
        }
    }
    /// It lives.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.up
    }
    /// Operations that have not ended.
    #[must_use]
    pub fn waits(&self) -> usize {
        self.pending.len()
    }
    /// What a tick would do is worth doing.
    #[must_use]
    pub fn can_tick(&self, now_ms: u64) -> bool {
        let mut effects = Vec::new();
        self.coordinator.clone().handle(Event::Tick, now_ms + PACE_MS, &mut effects);
        self.up && !effects.is_empty()
    }
    /// The next region to be repaired has data.
    #[must_use]
    pub fn next_repair_has_data(&self, now_ms: u64) -> bool {
        let mut effects = Vec::new();
        self.coordinator.clone().handle(Event::Permit, now_ms + PACE_MS, &mut effects);
        let pulls = |e: &Effect| match e {
            Effect::Send(r) => super::step::touches_block(&r.body),
            _ => false,
        };
        // One that has to wait for its range may be any.
        effects.iter().any(pulls) || !effects.iter().any(|e| matches!(e, Effect::Send(_)))
    }
    /// It holds the lease and nothing is left to repair, or it does nothing at all.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.pending.is_empty() && (self.coordinator.is_idle() || self.coordinator.is_repaired())
    }
}

impl Shown for Client {
    fn shown(&self) -> impl core::fmt::Debug + '_ {
        let wants = (self.wants_lease, self.wants_permit);
        (self.up, self.session, &self.coordinator, &self.pending, wants, self.last_epoch, self.recalled, self.knows)
    }
}

impl World {
    pub(super) fn write(&mut self, c: usize) {
        let op = OpId(self.number());
        self.history.submitted(op);
        self.submit(c, op, What::Write, Operation::Mutate(Mutation::Write { offset: 0, length: BLOCK_BYTES }));
    }
    pub(super) fn read(&mut self, c: usize) {
        let (op, need) = (OpId(self.number()), self.history.need());
        self.submit(c, op, What::Read(need), Operation::Read(ByteRange::at(0, BLOCK_BYTES)));
    }
    pub(super) fn flush(&mut self, c: usize) {
        let (op, ops) = (OpId(self.number()), self.history.to_flush(c));
        self.submit(c, op, What::Flush(ops), Operation::Flush);
    }
    fn submit(&mut self, c: usize, op: OpId, what: What, operation: Operation) {
        if matches!(what, What::Write) {
            self.history.of_client(op, c);
        }
        self.clients[c].pending.insert(op, what);
        self.tell(c, Event::Submit(op, operation), None);
    }

    pub(super) fn tick(&mut self, c: usize) {
        if self.clients[c].up {
            self.tell(c, Event::Tick, None);
        }
    }

    /// Hands an event to the coordinator and does what it wants done.
    pub(super) fn tell(&mut self, c: usize, event: Event, read: Option<OpId>) {
        self.now_ms += PACE_MS;
        let (now_ms, client) = (self.now_ms, &mut *self.clients[c]);
        let held = client.coordinator.is_holding();
        let mut effects = Vec::new();
        client.coordinator.handle(event, now_ms, &mut effects);
        let settled = !held && client.coordinator.is_holding();
        if settled || effects.iter().any(|e| matches!(e, Effect::ReleaseLease { finished: true, .. })) {
            self.check_settled(c);
        }
        for effect in effects {
            self.effect(c, effect, read);
        }
    }

    fn effect(&mut self, c: usize, effect: Effect, read: Option<OpId>) {
        let client = &mut self.clients[c];
        match effect {
            Effect::Send(request) => {
                self.history.sent(&request);
                let pipe = &mut *self.pipes[c][request.slot.index()];
                if pipe.number != 0 {
                    pipe.requests.push(request);
                }
            }
            Effect::Complete(op, completion) => self.completed(c, op, completion, read),
            Effect::AcquireLease => client.wants_lease = true,
            Effect::ReleaseLease { epoch, finished } => {
                let session = client.session;
                self.leader.commit(&Command::LeaseRelease { ino: INO, session, epoch, finished });
                self.note(|| format!("c{c} gives e={epoch} back, finished: {finished}"));
            }
            Effect::Suspect(slot, n) => self.leader.suspect(slot, n),
            Effect::WantPermit => client.wants_permit = true,
            // The leader tells what it has to tell anyway, or later.
            Effect::Discard(_) | Effect::Refresh | Effect::Lost => {}
        }
    }

    fn completed(&mut self, c: usize, op: OpId, completion: Completion, read: Option<OpId>) {
        self.note(|| format!("c{c}'s operation {} ends: {completion:?}", op.0));
        let Some(what) = self.clients[c].pending.remove(&op) else {
            return self.fail(|| format!("operation {} of c{c} was completed twice", op.0));
        };
        match (what, completion) {
            (What::Write, Completion::Done) => self.history.acknowledged(op),
            (What::Read(need), Completion::Bytes) => {
                let value = read.unwrap_or(OpId(0));
                if let Err(why) = self.history.check(value, need) {
                    self.fail(|| format!("I2: a read of c{c} returned what is too old: {why}"));
                }
            }
            (What::Flush(ops), Completion::Done) => self.history.flushed(&ops),
            // [E7] and a lease that another session has had in between.
            (_, Completion::Failed(_)) | (What::Write | What::Flush(_), Completion::LeaseLost) => {}
            (what, completion) => self.fail(|| format!("{what:?} of c{c} ended in {completion:?}")),
        }
    }

    /// [E7]: what a cold start has lost, reads under way need not return.
    pub(super) fn forgive_reads(&mut self) {
        let now = self.history.need();
        for what in self.clients.iter_mut().flat_map(|c| c.pending.values_mut()) {
            if let What::Read(need) = what {
                *need = (*need).min(now);
            }
        }
    }

    pub(super) fn answer_arrives(&mut self, c: usize, id: RequestId, answer: Answer, value: OpId) {
        self.tell(c, Event::Answered(id, answer), Some(value));
    }

    pub(super) fn learn(&mut self, c: usize) {
        let configuration = self.configuration();
        self.clients[c].knows = configuration.n;
        self.tell(c, Event::Configured(configuration), None);
    }

    pub(super) fn grant(&mut self, c: usize) {
        let session = self.clients[c].session;
        let outcome = self.leader.commit(&Command::LeaseGrant { ino: INO, to: session, from: None });
        let Outcome::Lease { epoch, recover, .. } = outcome else { return };
        let last = self.clients[c].last_epoch;
        self.note(|| format!("c{c} is granted e={epoch}, recover: {recover}"));
        if epoch <= last {
            // One that the bricks no longer honour: it ends, and the next one begins with a recovery.
            self.leader.commit(&Command::LeaseRelease { ino: INO, session, epoch, finished: false });
            return;
        }
        let client = &mut self.clients[c];
        client.wants_lease = false;
        client.last_epoch = epoch;
        let foreign = last.0 != 0 && epoch != last.next();
        self.tell(c, Event::Granted { epoch, recover, foreign }, None);
    }

    fn holder(&self) -> Option<usize> {
        let holder = self.leader.lease().holder?;
        (0..CLIENTS).find(|c| self.clients[*c].up && self.clients[*c].session == holder)
    }
    /// The holder would hear something new.
    pub(super) fn recall_is_news(&self) -> bool {
        self.holder().is_some_and(|c| self.clients[c].recalled != self.leader.lease().epoch)
    }
    pub(super) fn recall(&mut self) {
        let epoch = self.leader.lease().epoch;
        if let Some(c) = self.holder() {
            self.clients[c].recalled = epoch;
            self.tell(c, Event::Recalled(epoch), None);
        }
    }

    pub(super) fn permit(&mut self, c: usize) {
        self.clients[c].wants_permit = false;
        self.tell(c, Event::Permit, None);
    }

    // -- connections and sessions --------------------------------------------------------------------------------------

    pub(super) fn connect(&mut self, c: usize, s: usize) {
        if !self.clients[c].up || !self.bricks[s].is_up() || self.pipes[c][s].number != 0 {
            return;
        }
        self.pipes[c][s] = Part::new(Pipe { number: self.number(), ..Pipe::default() });
        self.tell(c, Event::LinkUp(slot(s)), None);
    }

    /// `strays`: what was sent may still arrive.
    pub(super) fn disconnect(&mut self, c: usize, s: usize, strays: bool) {
        let pipe = std::mem::take(&mut *self.pipes[c][s]);
        if pipe.number == 0 {
            return;
        }
        if strays {
            let origin = Origin { client: c, session: self.clients[c].session, number: 0 };
            self.strays.extend(pipe.requests.into_iter().map(|r| (s, origin, r)));
        } else {
            // [F3] A session's new connection ends its old one before anything on it is served.
            self.bricks[s].waiting.retain(|(o, _)| o.number != pipe.number);
        }
        if self.clients[c].up {
            self.tell(c, Event::LinkDown(slot(s)), None);
        }
    }

    pub(super) fn crash(&mut self, c: usize) {
        self.clients[c].up = false;
        self.clients[c].pending.clear();
        for s in 0..BRICKS {
            self.disconnect(c, s, true);
        }
    }

    /// The client hears that its session has ended, and opens another one.
    pub(super) fn told(&mut self, c: usize) {
        self.tell(c, Event::LeaseLost, None);
        for s in 0..BRICKS {
            self.disconnect(c, s, true);
        }
        let nonce = u128::from(self.number());
        self.clients[c].session = self.leader.open_session(nonce);
        for s in 0..BRICKS {
            self.connect(c, s);
        }
    }

    /// For the end: sessions of the dead end, and the dead start again.
    pub(super) fn end_sessions_of_the_dead(&mut self) {
        for c in 0..CLIENTS {
            if self.clients[c].up {
                continue;
            }
            self.end_session(self.clients[c].session);
            let nonce = u128::from(self.number());
            let session = self.leader.open_session(nonce);
            self.clients[c] = Part::new(Client::with_session(&self.leader, session));
            for s in 0..BRICKS {
                self.connect(c, s);
            }
        }
    }

    /// For the end: what nobody holds is repaired and settled, as the janitor does.
    pub(super) fn adopt_what_needs_it(&mut self) {
        let lease = self.leader.lease();
        let needs = lease.unsettled || !self.configuration().syncing().is_empty();
        if needs && lease.holder.is_none() {
            self.tell(1, Event::Adopt, None);
        }
    }
}
