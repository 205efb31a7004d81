//! The step that puts an empty brick in the place of another `[E1]`, `[E2]`. The new one has a number of its own, so nothing that was
//! said to or of the old one is ever taken for its word.

use super::apply::{is_inside, refused, same_path};
use super::command::{BrickPlace, Effect, Outcome};
use super::state::{Brick, State};
use crate::config::{BrickState, Member, Slot};
use crate::left_out::{Rule, left_out};
use crate::types::{BootId, BrickId, ConfigNo, Incarnation, ServerId, SetId, VolumeId};

impl State {
    /// Why a brick at `place` cannot take the place of the one in `slot`, if it cannot. What only its server can know of a
    /// directory is checked there; who lives, by the leader.
    ///
    /// # Errors
    /// The sentence for the administrator.
    pub fn check_replacement(&self, set: SetId, slot: Slot, place: &BrickPlace, force: bool) -> Result<(), String> {
        let Some(row) = self.sets.get(&set).filter(|row| slot.index() < row.configuration.members.len()) else {
            return Err("there is no such replica set".into());
        };
        let Some(server) = self.servers.get(&place.server) else {
            return Err(format!("server {:x} is not in this cluster; add it with `mortar server add`", place.server.0));
        };
        if !place.path.starts_with('/') {
            return Err(format!(
                "brick path {:?} is not absolute; write it from the root, like /bricks/b1",
                place.path
            ));
        }
        let old = row.configuration.members[slot.index()].brick;
        for (id, brick) in self.bricks.iter().filter(|(id, b)| **id != old && b.server == place.server) {
            let volume = self.volumes.get(&brick.volume).map_or("", |v| v.name.as_str());
            let (path, address) = (&place.path, &server.address);
            if same_path(path, &brick.path) {
                return Err(format!(
                    "{path} on server {address} is a brick of volume {volume} already; use an empty directory"
                ));
            }
            if is_inside(path, &brick.path) || is_inside(&brick.path, path) {
                return Err(format!(
                    "{path} and {}, a brick of volume {volume} on server {address}, lie within each other; bricks must not",
                    brick.path
                ));
            }
            if !force && brick.set == set {
                return Err(format!(
                    "server {address} has brick {} of this replica set already (brick {id}): its failure would take two of three copies; use another server, or --force",
                    brick.path
                ));
            }
        }
        if row.configuration.in_sync().without(slot).is_empty() && !left_out(Rule::E2Replaced) {
            return Err("it is the only brick of its replica set that is in sync: with it the last good copy would go; bring another one back first".into());
        }
        Ok(())
    }

    /// A volume's brick by where it is.
    #[must_use]
    pub fn brick_at(&self, volume: VolumeId, server: ServerId, path: &str) -> Option<(BrickId, &Brick)> {
        let mut bricks = self.bricks.iter().filter(|(_, b)| b.volume == volume && b.server == server);
        bricks.find(|(_, b)| same_path(&b.path, path)).map(|(id, b)| (*id, b))
    }

    pub(super) fn replace_brick(
        &mut self,
        set: SetId,
        n: ConfigNo,
        slot: Slot,
        place: &BrickPlace,
        force: bool,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        let Some((volume, configuration)) = self.sets.get(&set).map(|row| (row.volume, row.configuration)) else {
            return Outcome::Superseded;
        };
        if configuration.n != n {
            return Outcome::Superseded;
        }
        if let Err(why) = self.check_replacement(set, slot, place, force) {
            return refused(why);
        }
        let old = configuration.members[slot.index()].brick;
        let brick = BrickId(self.take_id());
        let outcome = self.change(set, n, effects, |next| {
            next.members[slot.index()] = Member {
                brick,
                state: BrickState::Out,
                incarnation: Incarnation(0),
                boot: BootId(0),
                syncing_since: ConfigNo(0),
                clean: false,
                full: true,
            };
            true
        });
        if matches!(outcome, Outcome::Configuration(_)) {
            self.bricks.remove(&old);
            let row = Brick { server: place.server, path: place.path.clone(), volume, set };
            self.bricks.insert(brick, row);
        }
        outcome
    }
}
