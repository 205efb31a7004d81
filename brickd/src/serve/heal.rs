//! Repair that starts now: bricks that wait before they come back `[E8]` wait no longer, and the administrator is told what the
//! others wait for.

use mortar_proto::config::{BrickState, Slot};
use mortar_proto::metadata::state::ReplicaSet;
use mortar_proto::wire::cluster::{HealStartReply, HealStartRow};
use tonic::Status;

use super::Server;
use super::cluster::state_name;
use super::lead::Leader;

impl Server {
    /// Has the bricks of a volume that can come back do so.
    pub(super) async fn start_heal(&self, name: &str) -> Result<HealStartReply, Status> {
        self.log.linearizable().await?;
        let now = self.now_ms();
        let bricks = self.lead(|leader| {
            self.log.with_state(|state| {
                let (_, volume) =
                    state.volume_named(name).ok_or_else(|| Status::invalid_argument(state.no_such_volume(name)))?;
                let mut rows = Vec::new();
                for set in volume.sets.iter().filter_map(|s| state.sets.get(s)) {
                    for member in set.configuration.members {
                        let Some(brick) = state.bricks.get(&member.brick) else { continue };
                        if member.state == BrickState::InSync && leader.monitor.living(state, member.brick, now) {
                            continue;
                        }
                        leader.monitor.forgive(member.brick);
                        let slot = set.configuration.slot_of(member.brick).unwrap_or(Slot(0));
                        let server = state.servers.get(&brick.server).map_or(String::new(), |s| s.address.clone());
                        let living =
                            |s: Slot| leader.monitor.living(state, set.configuration.members[s.index()].brick, now);
                        let source_lives = set.configuration.in_sync().iter().any(living);
                        rows.push(HealStartRow {
                            awaits: awaits(leader, set, slot, source_lives, &server, now),
                            server,
                            path: brick.path.clone(),
                            state: state_name(member.state),
                        });
                    }
                }
                Ok::<_, Status>(rows)
            })
        })??;
        self.poke_leader();
        Ok(HealStartReply { bricks })
    }
}

/// What the repair of a brick waits for; empty: for nothing.
fn awaits(leader: &Leader, set: &ReplicaSet, slot: Slot, source_lives: bool, server: &str, now_ms: u64) -> String {
    let brick = set.configuration.members[slot.index()].brick;
    let failed = leader.bricks.get(&brick).map_or("", |news| news.failed.as_str());
    let heard = leader.monitor.last_answered_ms(brick).is_some_and(|at| at + 2_000 > now_ms);
    if !failed.is_empty() {
        format!("it has failed: {failed}; mend that and restart mortar-brickd on {server}")
    } else if !heard {
        format!("it is not heard; see whether mortar-brickd runs on {server}")
    } else if !source_lives {
        "no brick that is in sync is heard; bring another one of its replica set back".to_owned()
    } else {
        String::new()
    }
}
