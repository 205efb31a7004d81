//! The administrator. A disk dies and is exchanged for an empty one, a brick is given another place, all bricks are compared: each is an
//! act, and what it takes until it is done is asked of whoever leads, again and again, as the command `mortar` does it. Where
//! bricks that were in sync will not come back, the administrator goes on with less `[E2]`, `[E6]`.
//!
//! A disk dies only while another brick that is `InSync` runs: no more is promised.

use std::rc::Rc;

use mortar_proto::BrickState;
use mortar_proto::config::{Configuration, Slot};
use mortar_proto::metadata::monitor::Replacement;
use mortar_proto::metadata::{BrickPlace, Command};
use mortar_proto::types::{BrickId, ConfigNo, ServerId};

use super::acts::Act;
use super::disk::Disk;
use super::leader::Then;
use super::quorum::{VOTERS, configuration_of};
use super::rng::Rng;
use super::world::{CLIENTS, Happening, Node, World, slot};

/// How many of a thousand runs have one.
const RUNS_PERMILLE: u64 = 250;
/// How often it is asked again whether something may be done now.
const AGAIN_MS: u64 = 100;
/// How long the new disk takes to be there.
const NEW_DISK_MS: u64 = 300;

/// What the administrator has in mind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Want {
    /// Another brick in the place of this one.
    Replace(BrickId),
    /// All bricks compared.
    Compare,
}

/// What it has in mind, and what it decides by: dice apart from all others, so that a run without it is played as ever.
pub struct Administrator {
    dice: Rng,
    wants: Vec<Want>,
    /// The source of a loss that was accepted, and since when, until it has applied that.
    pub(super) made_source: Option<(usize, ConfigNo)>,
}

impl Administrator {
    /// That of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { dice: Rng::new(seed.rotate_left(41) ^ 0xad_1111), wants: Vec::new(), made_source: None }
    }
    /// Everything is done.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.wants.is_empty()
    }
}

impl World {
    /// Whether this run has one.
    pub(super) fn begin_to_administer(&mut self) {
        if self.administrator.dice.chance(RUNS_PERMILLE) {
            let first = self.administrator.dice.between(500, 5000);
            self.after_chance(first, Happening::Decide);
        }
    }

    /// Something is decided on.
    pub(super) fn decide(&mut self) {
        if self.winding_down {
            return;
        }
        let dice = &mut self.administrator.dice;
        let next = dice.delay(6000, 2000) + 200;
        let act = match dice.index(5) {
            0 | 1 => Act::LoseDisk(dice.index(3)),
            2 | 3 => Act::Replace(dice.index(3)),
            _ => Act::Compare,
        };
        self.after_chance(next, Happening::Decide);
        self.act(act);
    }

    fn sets_out(&mut self, want: Want) {
        if self.administrator.wants.contains(&want) {
            return;
        }
        if self.administrator.wants.is_empty() {
            self.after(AGAIN_MS, Happening::Administrator);
        }
        self.administrator.wants.push(want);
    }

    pub(super) fn replace(&mut self, s: usize) {
        self.sets_out(Want::Replace(self.configuration().members[s].brick));
    }

    pub(super) fn compare(&mut self) {
        self.sets_out(Want::Compare);
    }

    /// No more is lost with a brick's disk than what others have.
    pub(super) fn may_lose_disk(&self, s: usize) -> bool {
        let configuration = self.configuration();
        let runs = |s: &Slot| {
            let brick = &self.bricks[s.index()];
            brick.is_up() && brick.incarnation == configuration.members[s.index()].incarnation
        };
        let is_sound = self.bricks.iter().all(|b| !b.disk.has_rot() && !b.has_no_disk());
        // One that has been replaced already is another one soon.
        let is_current = configuration.members[s].brick == self.bricks[s].id;
        is_sound && is_current && configuration.in_sync().without(slot(s)).iter().any(|other| runs(&other))
    }

    /// The disk of a brick dies, with its server; there is an empty one when the server is back.
    pub(super) fn lose_disk(&mut self, s: usize) {
        if !self.may_lose_disk(s) {
            return;
        }
        self.count("disk lost");
        self.stop_brick(s, false, NEW_DISK_MS);
        self.bricks[s].disk = Disk::new(self.geometry);
        self.bricks[s].disk_is_new = true;
        self.replace(s);
    }

    /// A brick whose directory is empty is none, until the log says that another has taken its place [E5].
    pub(super) fn waits_for_a_disk(&mut self, s: usize) -> bool {
        if !self.bricks[s].disk_is_new {
            return false;
        }
        if self.quorum.together && !self.quorum.voters[s].up {
            self.start_voter(s);
        }
        let index = self.quorum.entries.len();
        let hears = self.quorum.leads.is_some_and(|l| self.cut_until(Node::Voter(l), Node::Brick(s)).is_none());
        match self.replaced_by(s, index).filter(|_| hears) {
            Some(other) => self.begin_anew(s, other, index),
            None => {
                self.bricks[s].will_start = true;
                self.after(AGAIN_MS, Happening::Start(s));
            }
        }
        true
    }

    /// The brick that has taken the place of this one by the state after so many entries, if another one has.
    pub(super) fn replaced_by(&self, s: usize, index: usize) -> Option<BrickId> {
        let now = self.quorum.entries[index - 1].state.sets.get(&self.quorum.set)?.configuration.members[s].brick;
        (now > self.bricks[s].id).then_some(now)
    }

    /// The server of a brick has applied that another one, with an empty disk, has taken its place.
    pub(super) fn begin_anew(&mut self, s: usize, other: BrickId, applied: usize) {
        self.count("brick replaced");
        self.event(|| format!("b{s} begins anew as {other}"));
        self.end_process(s);
        self.break_links(s, false);
        let brick = &mut self.bricks[s];
        (brick.id, brick.applied) = (other, applied);
        (brick.disk, brick.disk_is_new, brick.seen) = (Disk::new(self.geometry), false, 0);
        self.start_brick(s);
    }

    /// What is wanted is asked of whoever leads.
    pub(super) fn administer(&mut self) {
        // [R1] is kept for the administrator too: what the leader says is of now.
        if let Some(v) = (0..VOTERS).find(|v| self.confirms(*v)) {
            self.catch_up(v);
            self.look_round(v);
            for want in self.administrator.wants.clone() {
                let is_done = match want {
                    Want::Replace(brick) => self.try_replace(v, brick),
                    Want::Compare => self.try_compare(v),
                };
                if is_done {
                    self.administrator.wants.retain(|w| *w != want);
                }
            }
        }
        if !self.administrator.wants.is_empty() {
            self.after(AGAIN_MS, Happening::Administrator);
        }
    }

    /// True: it is done, or given up.
    fn try_replace(&mut self, v: usize, brick: BrickId) -> bool {
        let (set, own_now, state) = (self.quorum.set, self.voter_now(v), Rc::clone(&self.quorum.voters[v].state));
        let configuration = configuration_of(&state, set);
        let Some(slot) = configuration.slot_of(brick) else { return true };
        let is_lost = self.bricks[slot.index()].disk_is_new;
        // With it the last sound copy of a block might go. What is corrupt on every brick has none.
        if !is_lost && !self.is_sound() {
            return false;
        }
        let Some(leader) = self.leader(v) else { return false };
        match leader.monitor.may_replace(&state, set, slot, false, own_now) {
            Replacement::Later => {
                leader.monitor.ask_to_leave(brick, own_now);
                false
            }
            Replacement::Now(n) => {
                let place = BrickPlace { server: ServerId(slot.index() as u64 + 1), path: "/b".into() };
                let command = Command::ReplaceBrick { set, n, slot, place, force: false };
                leader.monitor.proposes(&state, &command);
                self.propose(v, None, command, Then::Nothing);
                false
            }
            Replacement::Refused(_) if is_lost => {
                self.accept_loss(v, &configuration);
                false
            }
            Replacement::Refused(_) => {
                self.count("not replaced");
                true
            }
        }
    }

    /// One that is `InSync` and has its disk, or, when there is none, any other that has its disk.
    fn accept_loss(&mut self, v: usize, configuration: &Configuration) {
        let (set, own_now, state) = (self.quorum.set, self.voter_now(v), Rc::clone(&self.quorum.voters[v].state));
        let mut sources: Vec<Slot> = Slot::ALL.into_iter().filter(|s| !self.bricks[s.index()].has_no_disk()).collect();
        if sources.iter().any(|s| configuration.state(*s) == BrickState::InSync) {
            sources.retain(|s| configuration.state(*s) == BrickState::InSync);
        }
        let Some(leader) = self.leader(v) else { return };
        let command = sources.iter().find_map(|s| leader.monitor.accept_loss(&state, set, *s, own_now).ok());
        if let Some(command) = command {
            leader.monitor.proposes(&state, &command);
            self.propose(v, None, command, Then::Nothing);
        }
    }

    fn try_compare(&mut self, v: usize) -> bool {
        let set = self.quorum.set;
        let n = configuration_of(&self.quorum.voters[v].state, set).n;
        self.propose(v, None, Command::CompareAll { set, n }, Then::Compared);
        false
    }

    /// All bricks are going to be compared.
    pub(super) fn compared(&mut self) {
        self.administrator.wants.retain(|w| *w != Want::Compare);
    }

    /// A replacement, or a loss that was accepted, is committed.
    pub(super) fn administered(&mut self, command: &Command, old: &Configuration, new: &Configuration) {
        match command {
            Command::ReplaceBrick { slot, .. } => {
                // That a disk has died just now nobody can know.
                let is_lost = |s: Slot| self.bricks[s.index()].has_no_disk() && !self.is_heard(old, s);
                if new.in_sync().iter().all(is_lost) {
                    self.fail(|| format!("E2: b{} is replaced, and with it the last good copy goes", slot.0));
                }
            }
            Command::AcceptLoss { source, .. } => {
                self.count("loss accepted");
                if old.state(*source) == BrickState::InSync {
                    return;
                }
                self.count("gone back to a brick that was out");
                let disk = self.bricks[source.index()].disk.clone();
                self.history.went_back(new.n, &disk);
                self.administrator.made_source = Some((source.index(), new.n));
                self.forgive_reads();
                // What it had accepted before it was put out may end only now.
                self.accepted.clear();
                // They are evicted, and find out at once; whoever mounts again knows what happened.
                for c in 0..CLIENTS {
                    if self.clients[c].up {
                        self.crash_client(c, 500);
                    }
                }
            }
            _ => {}
        }
    }

    /// A brick has lost what it had not flushed: if it was made the source just now, that is gone for good.
    pub(super) fn lost_unflushed(&mut self, s: usize) {
        if let Some((source, n)) = self.administrator.made_source
            && source == s
        {
            let disk = self.bricks[s].disk.clone();
            self.history.went_back(n, &disk);
        }
    }

    /// Nothing is wanted, and nothing is still to be compared.
    pub(super) fn is_administered(&self) -> bool {
        self.administrator.is_done() && self.configuration().members.iter().all(|m| !m.full)
    }
}
