//! openraft's state machine: the pure [`State`], told entry by entry.

use std::io::Cursor;
use std::sync::Arc;

use mortar_proto::metadata::{Outcome, State};
use mortar_proto::{LogIndex, ServerId};
use openraft::storage::RaftStateMachine;
use openraft::{
    BasicNode, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError,
    StorageIOError, StoredMembership,
};
use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};

use super::store::Db;
use super::{Applied, Types};

/// What the log adds up to, for all who look.
pub(super) struct Shared {
    pub(super) state: RwLock<State>,
    pub(super) applied: watch::Sender<u64>,
}

impl Shared {
    /// Where a server listens.
    pub(super) fn address_of(&self, server: u64) -> Option<String> {
        self.state.read().servers.get(&ServerId(server)).map(|s| s.address.clone())
    }
}

pub(super) struct Machine {
    pub(super) shared: Arc<Shared>,
    pub(super) db: Db,
    pub(super) tell: mpsc::UnboundedSender<Applied>,
    pub(super) last: Option<LogId<u64>>,
    pub(super) membership: StoredMembership<u64, BasicNode>,
}

/// Holds the state of one moment: openraft goes on applying entries while the snapshot is built.
pub(super) struct Builder {
    state: State,
    db: Db,
    last: Option<LogId<u64>>,
    membership: StoredMembership<u64, BasicNode>,
}

fn write_error(e: impl std::fmt::Display) -> StorageError<u64> {
    StorageIOError::write_snapshot(None, &std::io::Error::other(e.to_string())).into()
}

impl RaftSnapshotBuilder<Types> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, StorageError<u64>> {
        let meta = SnapshotMeta {
            last_log_id: self.last,
            last_membership: self.membership.clone(),
            snapshot_id: format!("{}", self.last.map_or(0, |l| l.index)),
        };
        let (state, db, kept) = (std::mem::take(&mut self.state), self.db.clone(), meta.clone());
        // It may take long, and heartbeats must not wait for it.
        let written = tokio::task::spawn_blocking(move || {
            let data = mortar_proto::wire::encode(&state);
            db.save_snapshot(&kept, &data).map(|()| data)
        });
        let data = written.await.map_err(write_error)?.map_err(write_error)?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(data)) })
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, BasicNode>), StorageError<u64>> {
        Ok((self.last, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome>, StorageError<u64>>
    where
        I: IntoIterator<Item = openraft::Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut outcomes = Vec::new();
        for entry in entries {
            let index = LogIndex(entry.log_id.index);
            // [F2] What is acted upon is durable here, even if others made up the quorum.
            self.db.ensure_durable(index.0).map_err(write_error)?;
            self.last = Some(entry.log_id);
            let (outcome, effects) = match entry.payload {
                EntryPayload::Blank => (Outcome::Done, Vec::new()),
                EntryPayload::Normal(command) => self.shared.state.write().apply(index, &command),
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    (Outcome::Done, Vec::new())
                }
            };
            outcomes.push(outcome);
            let _ = self.tell.send(Applied::Entry { index, effects });
            self.shared.applied.send_replace(index.0);
        }
        Ok(outcomes)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            state: self.shared.state.read().clone(),
            db: self.db.clone(),
            last: self.last,
            membership: self.membership.clone(),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, BasicNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError<u64>> {
        let data = snapshot.into_inner();
        let state: State = mortar_proto::wire::decode(&data).map_err(write_error)?;
        self.db.save_snapshot(meta, &data).map_err(write_error)?;
        *self.shared.state.write() = state;
        self.last = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        // The index first: whoever is told looks at it.
        self.shared.applied.send_replace(meta.last_log_id.map_or(0, |l| l.index));
        let _ = self.tell.send(Applied::Reset);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, StorageError<u64>> {
        let found = self.db.load_snapshot().map_err(write_error)?;
        Ok(found.map(|(meta, data)| Snapshot { meta, snapshot: Box::new(Cursor::new(data)) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::store;
    use mortar_proto::metadata::{Command, Entry};
    use mortar_proto::{ClusterId, wire::decode};
    use openraft::CommittedLeaderId;

    fn entry(index: u64) -> openraft::Entry<Types> {
        let command = Command::ServerAdd { server: ServerId(index), address: format!("s{index}:7440") };
        let log_id = LogId::new(CommittedLeaderId::new(1, 1), index);
        openraft::Entry { log_id, payload: EntryPayload::Normal(Entry { time_ns: 0, request: None, command }) }
    }

    /// openraft builds a snapshot beside the entries that it goes on to apply.
    #[tokio::test]
    async fn a_snapshot_holds_what_its_index_says_and_nothing_later() {
        let dir = tempfile::tempdir().unwrap();
        let db = store::open(dir.path()).unwrap();
        let (tell, _told) = mpsc::unbounded_channel();
        let (_, mut machine, _) = store::split(db, ClusterId(1), tell).unwrap();
        machine.apply([entry(1), entry(2)]).await.unwrap();
        let mut builder = machine.get_snapshot_builder().await;
        machine.apply([entry(3)]).await.unwrap();
        let built = builder.build_snapshot().await.unwrap();
        let state: State = decode(built.snapshot.get_ref()).unwrap();
        assert_eq!(built.meta.last_log_id.map(|id| id.index), Some(2));
        assert_eq!(state.applied, LogIndex(2));
        assert_eq!(state.servers.len(), 2);
    }
}
