//! Owns who takes part in the log's quorum.
//!
//! The servers that the state names are the wish. While this server leads, it brings the quorum there, one step at a time
//! and again after every election: a named server becomes a learner, up to five of them vote, one that is named no more
//! leaves. So a crash anywhere on the way is only a delay.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::{BasicNode, ChangeMembers, Raft, ServerState};

use super::machine::Shared;
use super::{PROPOSE_TIMEOUT, Types};

/// Servers that vote at most; the others only learn.
const MAX_VOTERS: usize = 5;
/// Entries that a learner may lag behind and still be made a voter.
const CAUGHT_UP_ENTRIES: u64 = 200;
/// How often the quorum is compared with the wish.
const EVERY: Duration = Duration::from_millis(200);

/// A server in the quorum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Member {
    id: u64,
    votes: bool,
    /// The last entry that it is known to have.
    matched: Option<u64>,
}

/// Brings the quorum to the servers that the state names, while this server leads.
pub(super) async fn run(raft: Raft<Types>, shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(EVERY).await;
        if raft.metrics().borrow().running_state.is_err() {
            return;
        }
        let Some(change) = next_change(&raft, &shared) else { continue };
        tracing::info!(?change, "changing the quorum");
        match tokio::time::timeout(PROPOSE_TIMEOUT, raft.change_membership(change, false)).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::warn!("the quorum could not be changed, trying again: {e}"),
            Err(_) => tracing::warn!("the quorum could not be changed, trying again: too few servers answer"),
        }
    }
}

fn next_change(raft: &Raft<Types>, shared: &Shared) -> Option<ChangeMembers<u64, BasicNode>> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow();
    if metrics.state != ServerState::Leader {
        return None;
    }
    let replication = metrics.replication.as_ref()?;
    let named: BTreeMap<u64, String> =
        shared.state.read().servers.iter().map(|(id, server)| (id.0, server.address.clone())).collect();
    let membership = metrics.membership_config.membership();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let members: Vec<Member> = membership
        .nodes()
        .map(|(id, _)| Member {
            id: *id,
            votes: voters.contains(id),
            matched: replication.get(id).copied().flatten().map(|log_id| log_id.index),
        })
        .collect();
    step(&named, &members, metrics.id, metrics.last_log_index.unwrap_or(0))
}

/// One change at a time: take in, then let vote, then let go.
fn step(
    named: &BTreeMap<u64, String>,
    members: &[Member],
    me: u64,
    last: u64,
) -> Option<ChangeMembers<u64, BasicNode>> {
    // The first server has not told of itself yet.
    if named.is_empty() {
        return None;
    }
    let known = |id: &u64| members.iter().any(|m| m.id == *id);
    let new: BTreeMap<u64, BasicNode> =
        named.iter().filter(|(id, _)| !known(id)).map(|(id, address)| (*id, BasicNode::new(address))).collect();
    if !new.is_empty() {
        return Some(ChangeMembers::AddNodes(new));
    }
    let voters = members.iter().filter(|m| m.votes && named.contains_key(&m.id)).count();
    let ready: BTreeSet<u64> = members
        .iter()
        .filter(|m| !m.votes && named.contains_key(&m.id))
        .filter(|m| m.matched.is_some_and(|matched| matched + CAUGHT_UP_ENTRIES >= last))
        .map(|m| m.id)
        .take(MAX_VOTERS.saturating_sub(voters))
        .collect();
    if !ready.is_empty() {
        return Some(ChangeMembers::AddVoterIds(ready));
    }
    // This server itself leaves last: it leads the others out.
    let gone = |votes: bool| {
        let gone: BTreeSet<u64> =
            members.iter().filter(|m| m.votes == votes && !named.contains_key(&m.id)).map(|m| m.id).collect();
        let others: BTreeSet<u64> = gone.iter().copied().filter(|id| *id != me).collect();
        if others.is_empty() { gone } else { others }
    };
    let (voting, learning) = (gone(true), gone(false));
    if !voting.is_empty() && voters > 0 {
        return Some(ChangeMembers::RemoveVoters(voting));
    }
    (!learning.is_empty()).then_some(ChangeMembers::RemoveNodes(learning))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(ids: impl IntoIterator<Item = u64>) -> BTreeMap<u64, String> {
        ids.into_iter().map(|id| (id, format!("s{id}:7440"))).collect()
    }
    fn voter(id: u64) -> Member {
        Member { id, votes: true, matched: Some(500) }
    }
    fn learner(id: u64, matched: u64) -> Member {
        Member { id, votes: false, matched: Some(matched) }
    }
    fn ids(ids: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
        ids.into_iter().collect()
    }

    #[test]
    fn a_named_server_learns_first_and_votes_once_it_has_caught_up() {
        let nodes = BTreeMap::from([(2, BasicNode::new("s2:7440"))]);
        assert_eq!(step(&named(1..=2), &[voter(1)], 1, 500), Some(ChangeMembers::AddNodes(nodes)));
        assert_eq!(step(&named(1..=2), &[voter(1), learner(2, 3)], 1, 500), None);
        let promoted = Some(ChangeMembers::AddVoterIds(ids([2])));
        assert_eq!(step(&named(1..=2), &[voter(1), learner(2, 499)], 1, 500), promoted);
    }

    #[test]
    fn at_most_five_servers_vote() {
        let mut members: Vec<Member> = (1..=4).map(voter).chain((5..=8).map(|id| learner(id, 500))).collect();
        assert_eq!(step(&named(1..=8), &members, 1, 500), Some(ChangeMembers::AddVoterIds(ids([5]))));
        members[4].votes = true;
        assert_eq!(step(&named(1..=8), &members, 1, 500), None);
    }

    #[test]
    fn a_server_that_is_named_no_more_leaves_and_the_leader_itself_last() {
        let members = [voter(1), voter(2), voter(3), learner(4, 9)];
        assert_eq!(step(&named([3]), &members, 1, 500), Some(ChangeMembers::RemoveVoters(ids([2]))));
        let members = [voter(1), voter(3), learner(4, 9)];
        assert_eq!(step(&named([3]), &members, 1, 500), Some(ChangeMembers::RemoveVoters(ids([1]))));
        assert_eq!(step(&named([3]), &[voter(3), learner(4, 9)], 3, 500), Some(ChangeMembers::RemoveNodes(ids([4]))));
    }

    #[test]
    fn a_cluster_whose_first_server_has_not_told_of_itself_stays_as_it_is() {
        assert_eq!(step(&named([]), &[voter(1)], 1, 500), None);
    }
}
