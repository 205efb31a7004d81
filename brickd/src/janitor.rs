//! The janitor: on the leader's server, a session like any other. It takes the lease of a file that needs repair or
//! recovery and that nobody holds, repairs it with the same machine as a client, and gives the lease up when asked (section
//! 7 of the protocol).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mortar_proto::client::{FileId, MountOptions, Volume};
use mortar_proto::config::Slot;
use mortar_proto::metadata::state::{Node, State};
use mortar_proto::wire::cluster::{BrickHealRequest, FileMissed, cluster_client::ClusterClient};
use mortar_proto::{BrickId, Epoch, Ino};
use tonic::transport::Endpoint;

use crate::log::Log;

/// How often it looks for work.
const LOOK: Duration = Duration::from_millis(300);
/// Of so many looks one asks all bricks what is corrupt on them.
const ALL_EVERY: u32 = 5;
/// Files that it has in hand at the same time.
const MAX_FILES: usize = 32;
/// How long a brick's server may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// A file is taken from its holder when nothing of it was repaired for this long: the lease may have been granted to somebody
/// who had given up waiting, and does not know.
const STUCK: Duration = Duration::from_secs(30);

/// Held files that need repair: under which grant, how much was left when there was progress last, and when that was.
type Watched = BTreeMap<Ino, (Epoch, u64, Instant)>;

/// Starts the janitor; it works while this server leads.
pub fn start(log: Log, address: String) {
    tokio::spawn(async move {
        let mut session: Option<Arc<Volume>> = None;
        let mut in_hand: BTreeSet<Ino> = BTreeSet::new();
        let mut watched = Watched::new();
        let mut looks = 0;
        loop {
            tokio::time::sleep(LOOK).await;
            if !log.is_leader() {
                if let Some(session) = session.take() {
                    in_hand.clear();
                    watched.clear();
                    session.close().await;
                }
                continue;
            }
            looks = (looks + 1) % ALL_EVERY;
            let (wanted, all_told) = look(&log, looks == 0).await;
            if session.is_none() && wanted.is_empty() {
                continue;
            }
            let me = match &session {
                Some(session) => Arc::clone(session),
                None => {
                    let options = MountOptions {
                        servers: vec![address.clone()],
                        volume: String::new(),
                        client: format!("janitor on {address}"),
                    };
                    match Volume::mount(options).await {
                        Ok(volume) => session.insert(volume).clone(),
                        Err(e) => {
                            tracing::debug!("the janitor has no session yet: {e}");
                            continue;
                        }
                    }
                }
            };
            // Who does not answer says nothing of what is repaired.
            if looks == 0 && all_told {
                watched.retain(|ino, _| wanted.contains_key(ino));
            }
            work(&log, &me, &wanted, &mut in_hand, &mut watched);
        }
    });
}

/// Takes files in hand, and lets go of those that are done.
fn work(log: &Log, me: &Volume, wanted: &BTreeMap<Ino, u64>, in_hand: &mut BTreeSet<Ino>, watched: &mut Watched) {
    let file = |ino: Ino| {
        log.with_state(|state| match &state.inodes.get(&ino)?.node {
            Node::File { set, lease } => Some((FileId { ino, set: *set }, *lease)),
            _ => None,
        })
    };
    in_hand.retain(|ino| {
        let Some((id, _)) = file(*ino) else { return false };
        if me.is_repaired(id) {
            me.forget(id);
            return false;
        }
        !me.is_idle(id)
    });
    for (ino, left) in wanted {
        if in_hand.len() >= MAX_FILES {
            return;
        }
        if let Some((id, lease)) = file(*ino)
            && (lease.holder.is_none() || is_stuck(watched, *ino, lease.epoch, *left))
            && in_hand.insert(*ino)
        {
            tracing::debug!(ino = %ino, "the janitor takes a file in hand");
            me.adopt(id);
        }
    }
}

/// The holder of a file does not repair it.
fn is_stuck(watched: &mut Watched, ino: Ino, epoch: Epoch, left: u64) -> bool {
    let seen = watched.entry(ino).or_insert((epoch, left, Instant::now()));
    if seen.0 != epoch || left < seen.1 {
        *seen = (epoch, left, Instant::now());
    }
    seen.2.elapsed() >= STUCK
}

/// Files that need something, and how much: what an earlier holder left unsettled, what a `Syncing` brick lacks, or, with `all`,
/// what is corrupt on an `InSync` one `[R5]`. True: every brick that was asked has told.
async fn look(log: &Log, all: bool) -> (BTreeMap<Ino, u64>, bool) {
    let (mut wanted, ask) = log.with_state(|state| (unsettled(state), tellers(state, all)));
    let answers = futures::future::join_all(ask.into_iter().map(|(brick, address, slots)| async move {
        let asked = async {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?.connect_timeout(ASK_TIMEOUT);
            let mut client = ClusterClient::new(endpoint.connect().await.ok()?).max_decoding_message_size(64 << 20);
            client.brick_heal(BrickHealRequest { brick: brick.0 }).await.ok()
        };
        let reply = tokio::time::timeout(ASK_TIMEOUT, asked).await.ok().flatten()?.into_inner();
        let lists = reply.missed.into_iter().filter(|m| slots.contains(&m.slot));
        let left = |f: FileMissed| (Ino(f.ino), f.regions + u64::from(f.size));
        Some(lists.flat_map(|m| m.files).filter(|f| !f.given_up).map(left).collect::<Vec<(Ino, u64)>>())
    }))
    .await;
    let all_told = answers.iter().all(Option::is_some);
    log.with_state(|state| {
        for (ino, left) in answers.into_iter().flatten().flatten() {
            if let Some(Node::File { .. }) = state.inodes.get(&ino).map(|i| &i.node) {
                *wanted.entry(ino).or_default() += left;
            }
        }
    });
    (wanted, all_told)
}

fn unsettled(state: &State) -> BTreeMap<Ino, u64> {
    let of = |(ino, inode): (&Ino, &mortar_proto::metadata::state::Inode)| match &inode.node {
        Node::File { lease, .. } if lease.unsettled && lease.holder.is_none() => Some((*ino, 0)),
        _ => None,
    };
    state.inodes.iter().filter_map(of).collect()
}

/// Bricks that know what a `Syncing` brick lacks: the `InSync` ones, and itself. With the slots they are asked about: with `all`,
/// each about itself as well.
fn tellers(state: &State, all: bool) -> Vec<(BrickId, String, Vec<u32>)> {
    let mut tellers = Vec::new();
    for set in state.sets.values() {
        let configuration = &set.configuration;
        let lacking: Vec<u32> = configuration.syncing().iter().map(|s| u32::from(s.0)).collect();
        if lacking.is_empty() && !all {
            continue;
        }
        for slot in Slot::ALL.into_iter().filter(|s| configuration.writable().has(*s)) {
            let brick = configuration.members[slot.index()].brick;
            let server = state.bricks.get(&brick).and_then(|b| state.servers.get(&b.server));
            if let Some(server) = server {
                let own = Some(u32::from(slot.0)).filter(|_| all);
                tellers.push((brick, server.address.clone(), lacking.iter().copied().chain(own).collect()));
            }
        }
    }
    tellers
}
