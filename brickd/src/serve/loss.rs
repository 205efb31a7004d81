//! Going on with less than was acknowledged, by the administrator's word `[E2]`, `[E6]`: what that loses, and doing it.

use mortar_proto::config::{BrickState, Slot};
use mortar_proto::metadata::Outcome;
use mortar_proto::metadata::state::{ReplicaSet, State};
use mortar_proto::wire::cluster::{AcceptLossReply, AcceptLossRequest, BrickHealReply};
use mortar_proto::{BrickId, Ino};
use tonic::Status;

use super::Server;
use super::cluster::state_name;
use super::replace::find_brick;

/// Files that are named, at most.
const MAX_NAMED: usize = 20;

impl Server {
    /// Tells what would be lost, and, with `commit`, makes the brick the one that is in sync.
    pub(super) async fn give_up(&self, request: AcceptLossRequest) -> Result<AcceptLossReply, Status> {
        self.log.linearizable().await?;
        let (brick, set, address) = self.log.with_state(|state| {
            let (volume, _) = state
                .volume_named(&request.volume)
                .ok_or_else(|| Status::invalid_argument(state.no_such_volume(&request.volume)))?;
            let (brick, set) = find_brick(state, volume, &request.brick.clone().unwrap_or_default())?;
            let server = state.bricks.get(&brick).and_then(|b| state.servers.get(&b.server));
            Ok::<_, Status>((brick, set, server.map_or(String::new(), |s| s.address.clone())))
        })?;
        let knows = self.ask_heal(address, brick).await;
        let now = self.now_ms();
        let (command, lost) = self.lead(|leader| {
            self.log.with_state(|state| {
                let row = state.sets.get(&set).ok_or_else(|| Status::failed_precondition("the volume is gone"))?;
                let slot = row.configuration.slot_of(brick);
                let slot = slot.ok_or_else(|| Status::failed_precondition("another brick has taken its place"))?;
                let command = leader.monitor.accept_loss(state, set, slot, now).map_err(Status::failed_precondition)?;
                if request.commit {
                    leader.monitor.proposes(state, &command);
                }
                let heard =
                    |brick: BrickId| leader.monitor.last_answered_ms(brick).map(|at| now.saturating_sub(at) / 1000);
                Ok::<_, Status>((command, losses(state, row, slot, knows.as_ref(), heard)))
            })
        })??;
        if request.commit {
            tracing::warn!(%brick, ?lost, "the administrator accepts that data is lost");
            match self.log.propose(command.clone(), None).await? {
                Outcome::Configuration(_) => self.poke_leader(),
                _ => {
                    self.lead(|leader| self.log.with_state(|state| leader.monitor.refused(state, &command)))?;
                    return Err(Status::failed_precondition("the bricks have changed meanwhile; look again"));
                }
            }
        }
        Ok(AcceptLossReply { lost })
    }
}

/// What is lost when the brick in `slot` is taken as source, in sentences.
fn losses(
    state: &State,
    row: &ReplicaSet,
    slot: Slot,
    knows: Option<&BrickHealReply>,
    heard_seconds: impl Fn(BrickId) -> Option<u64>,
) -> Vec<String> {
    let configuration = &row.configuration;
    let name = |slot: Slot| {
        let brick = state.bricks.get(&configuration.members[slot.index()].brick);
        let server = brick.and_then(|b| state.servers.get(&b.server)).map_or("", |s| s.address.as_str());
        format!("{server}:{}", brick.map_or("", |b| b.path.as_str()))
    };
    let taken = name(slot);
    let mut lost = vec![match configuration.state(slot) {
        BrickState::InSync => format!(
            "Brick {taken} was in sync: it has all that was acknowledged. If its server lost power or its kernel crashed, what was not flushed may be lost."
        ),
        _ if configuration.members[slot.index()].full => format!(
            "Brick {taken} is being built or compared, and had not got everything yet: what it had not got is lost, be it whole files."
        ),
        BrickState::Syncing => format!(
            "Brick {taken} was not in sync: it lacks what was written while it was out, as far as it had not got that back. Its files may mix older and newer content, and be damaged."
        ),
        BrickState::Out => format!("Brick {taken} was out: everything that was written since it went out is lost."),
    }];
    let own = knows.and_then(|k| k.missed.iter().find(|m| m.slot == u32::from(slot.0)));
    let files: Vec<String> = own
        .map_or(&[][..], |m| &m.files)
        .iter()
        .map(|f| state.path_of(Ino(f.ino)).unwrap_or_else(|| format!("inode {}", f.ino)))
        .collect();
    if configuration.state(slot) != BrickState::InSync {
        lost.push(if files.is_empty() {
            "Which files that concerns is not known: take it for all of them.".to_owned()
        } else {
            let more = if files.len() > MAX_NAMED { " and others" } else { "" };
            format!(
                "It knows that it lacks parts of {}{more}; there may be more.",
                files[..files.len().min(MAX_NAMED)].join(", ")
            )
        });
    }
    for other in Slot::ALL.into_iter().filter(|s| *s != slot) {
        let member = configuration.members[other.index()];
        let since = heard_seconds(member.brick)
            .map_or_else(|| "not heard by this leader".to_owned(), |s| format!("heard {s} s ago"));
        lost.push(format!(
            "Brick {} ({}, {since}) is given up as it is: when it comes back, it is made equal to {taken}, and what only it has is gone for good.",
            name(other),
            state_name(member.state)
        ));
    }
    if configuration.state(slot) != BrickState::InSync {
        let clients = state.sessions.values().filter(|s| s.volume == Some(row.volume)).count();
        lost.push(format!(
            "Every client of the volume is evicted ({clients} just now): guests with disks there crash, and mounts have to be unmounted and mounted again."
        ));
    }
    lost
}
