//! An empty brick in the place of another, and comparing all bricks: what the leader sees to before the log says so `[E1]`, `[E2]`.

use std::time::{Duration, Instant};

use mortar_proto::metadata::monitor::Replacement;
use mortar_proto::metadata::state::State;
use mortar_proto::metadata::{BrickPlace, Command, Outcome};
use mortar_proto::wire::cluster::{BrickReplaceRequest, BrickSpec};
use mortar_proto::{BrickId, SetId, VolumeId};
use tonic::Status;

use super::Server;
use super::cluster::{find_server, no_such_server};

/// How long the old brick may take to agree to go, or its read lease to end.
const AGREEMENT: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(30);
/// How often a command is made again because the configuration had changed.
const TRIES: usize = 20;

impl Server {
    /// Puts an empty brick in the place of another.
    pub(super) async fn replace_brick(&self, request: BrickReplaceRequest) -> Result<(), Status> {
        self.log.linearizable().await?;
        let old = request.old.unwrap_or_default();
        let new = request.new.unwrap_or_else(|| old.clone());
        let (brick, set, place) = self.log.with_state(|state| {
            let (volume, _) = state
                .volume_named(&request.volume)
                .ok_or_else(|| Status::invalid_argument(state.no_such_volume(&request.volume)))?;
            let (brick, set) = find_brick(state, volume, &old)?;
            let server = find_server(state, &new.server).ok_or_else(|| no_such_server(state, &new.server))?;
            Ok::<_, Status>((brick, set, BrickPlace { server, path: new.path.clone() }))
        })?;
        // First what needs no directory to be looked at, for that makes it.
        self.may_replace(brick, set, &place, request.force, false)?;
        self.check_place(&place, request.force, &request.volume).await?;
        let until = Instant::now() + AGREEMENT;
        while Instant::now() < until {
            if let Some(command) = self.may_replace(brick, set, &place, request.force, true)? {
                match self.log.propose(command.clone(), None).await? {
                    Outcome::Superseded => {}
                    Outcome::Refused(why) => {
                        self.lead(|leader| self.log.with_state(|state| leader.monitor.refused(state, &command)))?;
                        return Err(Status::failed_precondition(why));
                    }
                    _ => {
                        tracing::warn!(%brick, path = place.path, "the administrator has replaced a brick");
                        return Ok(());
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
        Err(Status::failed_precondition(format!(
            "brick {}:{} has not agreed to go within {} s; nothing was replaced; try again",
            old.server,
            old.path,
            AGREEMENT.as_secs()
        )))
    }

    /// The command, when the time for it has come; with `ask` the old brick is asked to go, and the command is about to be proposed.
    fn may_replace(
        &self,
        brick: BrickId,
        set: SetId,
        place: &BrickPlace,
        force: bool,
        ask: bool,
    ) -> Result<Option<Command>, Status> {
        let now = self.now_ms();
        self.lead(|leader| {
            self.log.with_state(|state| {
                let slot = state.sets.get(&set).and_then(|row| row.configuration.slot_of(brick));
                let slot = slot.ok_or_else(|| Status::failed_precondition("another has replaced it meanwhile"))?;
                state.check_replacement(set, slot, place, force).map_err(Status::failed_precondition)?;
                match leader.monitor.may_replace(state, set, slot, force, now) {
                    Replacement::Refused(why) => Err(Status::failed_precondition(why)),
                    Replacement::Now(n) => {
                        let command = Command::ReplaceBrick { set, n, slot, place: place.clone(), force };
                        if ask {
                            leader.monitor.proposes(state, &command);
                        }
                        Ok(Some(command))
                    }
                    Replacement::Later if ask => {
                        leader.monitor.ask_to_leave(brick, now);
                        Ok(None)
                    }
                    Replacement::Later => Ok(None),
                }
            })
        })?
    }

    /// Has all bricks of a volume compared with each other.
    pub(super) async fn compare_all(&self, name: &str) -> Result<(), Status> {
        self.log.linearizable().await?;
        let sets = self.log.with_state(|state| {
            let found = state.volume_named(name).map(|(_, volume)| volume.sets.clone());
            found.ok_or_else(|| Status::invalid_argument(state.no_such_volume(name)))
        })?;
        for set in sets {
            let mut done = false;
            for _ in 0..TRIES {
                let n = self.log.with_state(|state| state.sets.get(&set).map(|row| row.configuration.n));
                let Some(n) = n else { break };
                done = self.log.propose(Command::CompareAll { set, n }, None).await? != Outcome::Superseded;
                if done {
                    break;
                }
            }
            if !done {
                return Err(Status::failed_precondition("the bricks come and go just now; try again"));
            }
        }
        self.poke_leader();
        Ok(())
    }
}

/// The brick of a volume that an administrator means.
pub(super) fn find_brick(state: &State, volume: VolumeId, meant: &BrickSpec) -> Result<(BrickId, SetId), Status> {
    let server = find_server(state, &meant.server).ok_or_else(|| no_such_server(state, &meant.server))?;
    if let Some((id, brick)) = state.brick_at(volume, server, &meant.path) {
        return Ok((id, brick.set));
    }
    let address = |b: &mortar_proto::metadata::state::Brick| {
        format!("{}:{}", state.servers.get(&b.server).map_or("", |s| s.address.as_str()), b.path)
    };
    let known: Vec<String> = state.bricks.values().filter(|b| b.volume == volume).map(address).collect();
    let (server, path) = (&meant.server, &meant.path);
    Err(Status::invalid_argument(format!("the volume has no brick {server}:{path}; it has: {}", known.join(", "))))
}
