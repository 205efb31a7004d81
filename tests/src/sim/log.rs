//! The metadata log as the bricks and clients see it: what each entry changed, by index.

use std::collections::{BTreeMap, BTreeSet};

use mortar_proto::config::{BrickState, Configuration, Member, Slot};
use mortar_proto::metadata::state::Lease;
use mortar_proto::metadata::{Command, Effect, Outcome};
use mortar_proto::types::{BootId, BrickId, ConfigNo, Incarnation, Ino, SessionId, SetId};

/// The replica set of a run.
pub const SET: SetId = SetId(1);

/// The log's state, and the effects of each of its entries.
#[derive(Debug)]
pub struct Log {
    /// The configuration in force.
    pub configuration: Configuration,
    /// The files' leases.
    pub leases: BTreeMap<Ino, Lease>,
    /// Sessions that live.
    pub sessions: BTreeSet<SessionId>,
    /// Sessions and the files' grants, oldest first: to tell a client whether another one wrote meanwhile.
    pub grants: BTreeMap<Ino, Vec<(u64, SessionId)>>,
    /// What each entry changed.
    pub entries: Vec<Vec<Effect>>,
    outcomes: BTreeMap<(SessionId, u64), Outcome>,
    next_session: u64,
}

impl Log {
    /// A cluster whose three bricks have registered and are `InSync`.
    #[must_use]
    pub fn new(files: &[Ino], incarnations: [Incarnation; 3], boots: [BootId; 3]) -> Self {
        let member = |i: usize| Member {
            brick: BrickId(i as u64 + 10),
            state: BrickState::InSync,
            incarnation: incarnations[i],
            boot: boots[i],
            syncing_since: ConfigNo(0),
            clean: false,
        };
        let members = [member(0), member(1), member(2)];
        let configuration = Configuration { n: ConfigNo(1), members, unflushed_lost: ConfigNo(0) };
        Self {
            configuration,
            leases: files.iter().map(|f| (*f, Lease::default())).collect(),
            sessions: BTreeSet::new(),
            grants: BTreeMap::new(),
            entries: vec![vec![Effect::Configured { set: SET, configuration, cold_start: None }]],
            outcomes: BTreeMap::new(),
            next_session: 100,
        }
    }

    /// Commits a command.
    pub fn propose(&mut self, request: Option<(SessionId, u64)>, command: &Command) -> Outcome {
        if let Some(outcome) = request.and_then(|r| self.outcomes.get(&r)) {
            return outcome.clone();
        }
        let mut effects = Vec::new();
        let outcome = self.apply(command, &mut effects);
        self.entries.push(effects);
        if let Some(request) = request {
            self.outcomes.insert(request, outcome.clone());
        }
        outcome
    }

    fn configure(
        &mut self,
        effects: &mut Vec<Effect>,
        cold: Option<Slot>,
        change: impl FnOnce(&mut Configuration),
    ) -> Outcome {
        self.configuration.n = self.configuration.n.next();
        change(&mut self.configuration);
        effects.push(Effect::Configured { set: SET, configuration: self.configuration, cold_start: cold });
        Outcome::Configuration(self.configuration)
    }

    fn apply(&mut self, command: &Command, effects: &mut Vec<Effect>) -> Outcome {
        let current = self.configuration;
        match *command {
            Command::Register { brick, incarnation, boot, clean } => {
                let Some(slot) = current.slot_of(brick) else { return Outcome::Superseded };
                if current.members[slot.index()].incarnation == incarnation {
                    return Outcome::Superseded;
                }
                if current.in_sync().without(slot).is_empty() {
                    return Outcome::Superseded;
                }
                self.configure(effects, None, |c| {
                    let n = c.n;
                    let m = &mut c.members[slot.index()];
                    *m = Member { state: BrickState::Syncing, incarnation, boot, clean, syncing_since: n, ..*m };
                })
            }
            Command::ColdStart { n, source, registered, .. } if n == current.n => {
                self.configure(effects, Some(source), |c| {
                    let n = c.n;
                    let kept =
                        registered[source.index()].is_some_and(|r| r.clean || r.boot == c.members[source.index()].boot);
                    if !kept {
                        c.unflushed_lost = n;
                    }
                    for slot in Slot::ALL {
                        let m = &mut c.members[slot.index()];
                        if m.state == BrickState::Out && slot != source {
                            continue;
                        }
                        m.state = BrickState::Out;
                        if let Some(r) = registered[slot.index()] {
                            m.incarnation = r.incarnation;
                            m.boot = r.boot;
                            m.clean = r.clean;
                            m.syncing_since = n;
                            m.state = if slot == source { BrickState::InSync } else { BrickState::Syncing };
                        }
                    }
                })
            }
            Command::PutOut { n, slot, .. } if n == current.n => {
                self.configure(effects, None, |c| c.members[slot.index()].state = BrickState::Out)
            }
            Command::Rejoin { n, slot, .. } if n == current.n => self.configure(effects, None, |c| {
                let n = c.n;
                let m = &mut c.members[slot.index()];
                m.state = BrickState::Syncing;
                m.clean = false;
                m.syncing_since = n;
            }),
            Command::Promote { n, slot, .. } if n == current.n => {
                self.configure(effects, None, |c| c.members[slot.index()].state = BrickState::InSync)
            }
            Command::SessionOpen { .. } => {
                self.next_session += 1;
                let session = SessionId(self.next_session);
                self.sessions.insert(session);
                Outcome::Session { session, volume: mortar_proto::VolumeId(1), root: Ino(1) }
            }
            Command::SessionEnd { session } => {
                self.sessions.remove(&session);
                for (ino, lease) in &mut self.leases {
                    if lease.holder == Some(session) {
                        lease.holder = None;
                        lease.unsettled = true;
                        effects.push(Effect::Leased { set: SET, ino: *ino, epoch: lease.epoch, holder: SessionId(0) });
                    }
                }
                effects.push(Effect::SessionEnded { session });
                Outcome::Done
            }
            Command::LeaseGrant { ino, to, from } => {
                let Some(lease) = self.leases.get_mut(&ino) else { return Outcome::Superseded };
                if !self.sessions.contains(&to) {
                    return Outcome::Superseded;
                }
                match (lease.holder, from) {
                    (None, _) => {}
                    (Some(holder), Some((session, epoch, finished))) if holder == session && epoch == lease.epoch => {
                        lease.unsettled |= !finished;
                        if finished {
                            lease.unsettled = false;
                        }
                    }
                    _ => return Outcome::Superseded,
                }
                let recover = lease.unsettled;
                let previous = (lease.last != to && lease.last != SessionId(0)).then_some(lease.last);
                *lease = Lease {
                    epoch: lease.epoch.next(),
                    holder: Some(to),
                    last: to,
                    recover: lease.unsettled,
                    unsettled: true,
                };
                self.grants.entry(ino).or_default().push((lease.epoch.0, to));
                effects.push(Effect::Leased { set: SET, ino, epoch: lease.epoch, holder: to });
                Outcome::Lease { epoch: lease.epoch, recover, previous }
            }
            Command::LeaseRelease { ino, session, epoch, finished } => {
                let Some(lease) = self.leases.get_mut(&ino) else { return Outcome::Superseded };
                if lease.holder != Some(session) || lease.epoch != epoch {
                    return Outcome::Superseded;
                }
                lease.holder = None;
                lease.unsettled = !finished;
                effects.push(Effect::Leased { set: SET, ino, epoch, holder: SessionId(0) });
                Outcome::Done
            }
            _ => Outcome::Superseded,
        }
    }
}
