//! `mortar volume scrub`: asks the server of each brick.

use mortar_proto::BrickId;
use mortar_proto::config::Slot;
use mortar_proto::wire::cluster::{
    BrickScrubRequest, BrickScrubRow, ScrubAction, ScrubStatus, VolumeScrubReply, VolumeScrubRequest,
    cluster_client::ClusterClient,
};
use tonic::{Response, Status};

use super::Server;
use super::cluster::{LOOK_TIMEOUT, connect};

impl Server {
    /// Of all bricks of a volume, in their order.
    pub(super) async fn scrub_volume(&self, request: VolumeScrubRequest) -> Result<VolumeScrubReply, Status> {
        self.log.linearizable().await?;
        let action = request.action();
        let bricks: Vec<(BrickId, String, String)> = self.log.with_state(|state| {
            let (_, volume) = state
                .volume_named(&request.name)
                .ok_or_else(|| Status::invalid_argument(state.no_such_volume(&request.name)))?;
            let sets = volume.sets.iter().filter_map(|set| state.sets.get(set));
            let members = sets.flat_map(|set| Slot::ALL.map(|slot| set.configuration.members[slot.index()].brick));
            let place = |id: BrickId| {
                let brick = state.bricks.get(&id)?;
                Some((id, state.servers.get(&brick.server)?.address.clone(), brick.path.clone()))
            };
            Ok::<_, Status>(members.filter_map(place).collect())
        })?;
        let rows = bricks.into_iter().map(|(brick, server, path)| async move {
            let status = self.ask_scrub(&server, brick, action).await;
            BrickScrubRow { server, path, status }
        });
        Ok(VolumeScrubReply { bricks: futures::future::join_all(rows).await })
    }

    async fn ask_scrub(&self, address: &str, brick: BrickId, action: ScrubAction) -> Option<ScrubStatus> {
        if address == self.address {
            return self.scrub_brick(brick, action).await;
        }
        let ask = async {
            let mut client = ClusterClient::new(connect(address, LOOK_TIMEOUT).await.ok()?);
            client.brick_scrub(BrickScrubRequest { brick: brick.0, action: action.into() }).await.ok()
        };
        tokio::time::timeout(LOOK_TIMEOUT, ask).await.ok().flatten().map(Response::into_inner)
    }

    /// Of a brick of this server. What is changed is written down, which may take a while.
    pub(super) async fn scrub_brick(&self, brick: BrickId, action: ScrubAction) -> Option<ScrubStatus> {
        let bricks = std::sync::Arc::clone(&self.bricks);
        tokio::task::spawn_blocking(move || bricks.scrub(brick, action)).await.ok().flatten()
    }
}
