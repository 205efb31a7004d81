//! The log, the vote and the snapshots in RocksDB.

use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use mortar_proto::ClusterId;
use mortar_proto::metadata::State;
use mortar_proto::wire::{decode, encode};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{
    BasicNode, Entry, LogId, LogState, OptionalSend, RaftLogReader, SnapshotMeta, StorageError, StorageIOError,
    StoredMembership, Vote,
};
use parking_lot::{Mutex, RwLock};
use rocksdb::{ColumnFamily, DB, Direction, IteratorMode, Options, WriteBatch, WriteOptions};
use tokio::sync::{mpsc, watch};

use super::machine::{Machine, Shared};
use super::{Applied, Types};

const LOG: &str = "log";
const META: &str = "meta";
const VOTE: &[u8] = b"vote";
const COMMITTED: &[u8] = b"committed";
const PURGED: &[u8] = b"purged";
const SNAPSHOT_META: &[u8] = b"snapshot-meta";
const SNAPSHOT: &[u8] = b"snapshot";

/// A snapshot as it is kept.
type Stored = (SnapshotMeta<u64, BasicNode>, Vec<u8>);

/// The database, and how far the log in it is durable.
#[derive(Clone)]
pub(super) struct Db(Arc<Inner>);

struct Inner {
    db: DB,
    /// The last index that is durable.
    durable: AtomicU64,
    syncing: Mutex<()>,
    /// Held while a snapshot takes the place of an older one.
    snapshots: Mutex<()>,
    flush: mpsc::UnboundedSender<(u64, LogFlushed<Types>)>,
}

/// Opens the database.
pub(super) fn open(dir: &Path) -> anyhow::Result<Db> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_keep_log_file_num(4);
    options.set_max_total_wal_size(64 << 20);
    options.set_write_buffer_size(16 << 20);
    // A log of fixed files needs no metadata commit of the file system with each sync.
    options.set_recycle_log_file_num(2);
    let db = DB::open_cf(&options, dir, [LOG, META])
        .with_context(|| format!("cannot open the metadata log in {}", dir.display()))?;
    let (flush, asked) = mpsc::unbounded_channel();
    let db = Db(Arc::new(Inner {
        db,
        durable: AtomicU64::new(0),
        syncing: Mutex::new(()),
        snapshots: Mutex::new(()),
        flush,
    }));
    // What was found at the start is durable.
    let last = db.last_index()?.unwrap_or(0);
    db.0.durable.store(last, Ordering::Release);
    let weak = Arc::downgrade(&db.0);
    std::thread::Builder::new().name("log-sync".into()).spawn(move || sync_in_batches(&weak, asked))?;
    Ok(db)
}

/// One sync serves all appends that came before it.
fn sync_in_batches(db: &std::sync::Weak<Inner>, mut asked: mpsc::UnboundedReceiver<(u64, LogFlushed<Types>)>) {
    while let Some(first) = asked.blocking_recv() {
        let mut batch = vec![first];
        while let Ok(more) = asked.try_recv() {
            batch.push(more);
        }
        let Some(inner) = db.upgrade() else { return };
        let upto = batch.iter().map(|(index, _)| *index).max().unwrap_or(0);
        let synced = Db(inner).ensure_durable(upto);
        for (_, callback) in batch {
            callback.log_io_completed(match &synced {
                Ok(()) => Ok(()),
                Err(e) => Err(std::io::Error::other(e.to_string())),
            });
        }
    }
}

/// The database as openraft wants it: log storage and state machine, and what all may look at.
pub(super) fn split(
    db: Db,
    cluster: ClusterId,
    tell: mpsc::UnboundedSender<Applied>,
) -> anyhow::Result<(Logs, Machine, Arc<Shared>)> {
    let (state, last, membership) = match db.load_snapshot()? {
        Some((meta, data)) => {
            let state: State = decode(&data).context("the snapshot of the metadata log does not decode")?;
            (state, meta.last_log_id, meta.last_membership)
        }
        None => (State::new(cluster), None, StoredMembership::default()),
    };
    let shared = Arc::new(Shared {
        state: RwLock::new(state),
        applied: watch::Sender::new(last.map_or(0, |l: LogId<u64>| l.index)),
    });
    let _ = tell.send(Applied::Reset);
    let machine = Machine { shared: Arc::clone(&shared), db: db.clone(), tell, last, membership };
    Ok((Logs(db), machine, shared))
}

impl Db {
    fn cf(&self, name: &str) -> anyhow::Result<&ColumnFamily> {
        self.0.db.cf_handle(name).with_context(|| format!("the metadata log's database has no part {name:?}"))
    }

    fn last_index(&self) -> anyhow::Result<Option<u64>> {
        let last = self.0.db.iterator_cf(self.cf(LOG)?, IteratorMode::End).next().transpose()?;
        Ok(last.and_then(|(key, _)| key.as_ref().try_into().ok().map(u64::from_be_bytes)))
    }

    /// Everything up to `index` survives a power cut from now on.
    pub(super) fn ensure_durable(&self, index: u64) -> anyhow::Result<()> {
        if self.0.durable.load(Ordering::Acquire) >= index {
            return Ok(());
        }
        let _one = self.0.syncing.lock();
        if self.0.durable.load(Ordering::Acquire) >= index {
            return Ok(());
        }
        self.0.db.flush_wal(true)?;
        self.0.durable.fetch_max(index, Ordering::AcqRel);
        Ok(())
    }

    fn get<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> anyhow::Result<Option<T>> {
        match self.0.db.get_cf(self.cf(META)?, key)? {
            Some(bytes) => Ok(Some(decode(&bytes).context("the metadata log's database does not decode")?)),
            None => Ok(None),
        }
    }

    fn put<T: serde::Serialize>(&self, key: &[u8], value: &T, sync: bool) -> anyhow::Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        Ok(self.0.db.put_cf_opt(self.cf(META)?, key, encode(value), &options)?)
    }

    pub(super) fn save_snapshot(&self, meta: &SnapshotMeta<u64, BasicNode>, data: &[u8]) -> anyhow::Result<()> {
        let _one = self.0.snapshots.lock();
        // One that was built while a newer one came from the leader: the log between the two is gone already.
        let kept: Option<SnapshotMeta<u64, BasicNode>> = self.get(SNAPSHOT_META)?;
        if kept.is_some_and(|kept| kept.last_log_id > meta.last_log_id) {
            return Ok(());
        }
        let mut batch = WriteBatch::default();
        batch.put_cf(self.cf(META)?, SNAPSHOT_META, encode(meta));
        batch.put_cf(self.cf(META)?, SNAPSHOT, data);
        let mut options = WriteOptions::default();
        options.set_sync(true);
        Ok(self.0.db.write_opt(batch, &options)?)
    }

    pub(super) fn load_snapshot(&self) -> anyhow::Result<Option<Stored>> {
        let Some(meta) = self.get(SNAPSHOT_META)? else { return Ok(None) };
        let data = self.0.db.get_cf(self.cf(META)?, SNAPSHOT)?.context("the metadata log's snapshot is missing")?;
        Ok(Some((meta, data)))
    }

    fn entries(&self, from: u64, to: Option<u64>) -> anyhow::Result<Vec<Entry<Types>>> {
        let start = from.to_be_bytes();
        let mut found = Vec::new();
        for row in self.0.db.iterator_cf(self.cf(LOG)?, IteratorMode::From(&start, Direction::Forward)) {
            let (key, value) = row?;
            let index = u64::from_be_bytes(key.as_ref().try_into().context("a key of the metadata log is no index")?);
            if to.is_some_and(|to| index >= to) {
                break;
            }
            found.push(decode(&value).with_context(|| format!("entry {index} of the metadata log does not decode"))?);
        }
        Ok(found)
    }
}

/// The log as openraft sees it.
#[derive(Clone)]
pub(super) struct Logs(Db);

fn read_error(e: impl std::fmt::Display) -> StorageError<u64> {
    StorageIOError::read_logs(&std::io::Error::other(e.to_string())).into()
}

fn write_error(e: impl std::fmt::Display) -> StorageError<u64> {
    StorageIOError::write_logs(&std::io::Error::other(e.to_string())).into()
}

impl RaftLogReader<Types> for Logs {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<Types>>, StorageError<u64>> {
        let from = match range.start_bound() {
            Bound::Included(at) => *at,
            Bound::Excluded(at) => at + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(at) => Some(at + 1),
            Bound::Excluded(at) => Some(*at),
            Bound::Unbounded => None,
        };
        self.0.entries(from, to).map_err(read_error)
    }
}

impl RaftLogStorage<Types> for Logs {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError<u64>> {
        let purged: Option<LogId<u64>> = self.0.get(PURGED).map_err(read_error)?;
        let last = match self.0.last_index().map_err(read_error)? {
            Some(index) => self.0.entries(index, None).map_err(read_error)?.last().map(|e| e.log_id),
            None => None,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last.or(purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        self.0
            .put(VOTE, vote, true)
            .map_err(|e| StorageIOError::write_vote(&std::io::Error::other(e.to_string())).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        self.0.get(VOTE).map_err(read_error)
    }

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<(), StorageError<u64>> {
        // Not synced: it only spares a restarted server from waiting for a leader to know what it had applied.
        self.0.put(COMMITTED, &committed, false).map_err(write_error)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, StorageError<u64>> {
        Ok(self.0.get::<Option<LogId<u64>>>(COMMITTED).map_err(read_error)?.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut batch = WriteBatch::default();
        let mut last = 0;
        for entry in entries {
            last = entry.log_id.index;
            batch.put_cf(self.0.cf(LOG).map_err(write_error)?, last.to_be_bytes(), encode(&entry));
        }
        // Readable at once, durable when the callback is called.
        self.0.0.db.write(batch).map_err(write_error)?;
        self.0.0.flush.send((last, callback)).map_err(|_| write_error("the sync thread is gone"))
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        let inner = &self.0.0;
        let _one = inner.syncing.lock();
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(self.0.cf(LOG).map_err(write_error)?, log_id.index.to_be_bytes(), u64::MAX.to_be_bytes());
        let mut options = WriteOptions::default();
        options.set_sync(true);
        inner.db.write_opt(batch, &options).map_err(write_error)?;
        // What is appended in their place is durable only when it is synced itself.
        inner.durable.fetch_min(log_id.index.saturating_sub(1), Ordering::AcqRel);
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.0.cf(META).map_err(write_error)?, PURGED, encode(&log_id));
        batch.delete_range_cf(
            self.0.cf(LOG).map_err(write_error)?,
            0_u64.to_be_bytes(),
            (log_id.index + 1).to_be_bytes(),
        );
        self.0.0.db.write(batch).map_err(write_error)
    }
}
