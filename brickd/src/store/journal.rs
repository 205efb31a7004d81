//! What must be durable at once, in RocksDB: intents `[W7]`, missed regions `[W5]`, what is corrupt `[R5]`, whether the last stop
//! was clean `[E5]`, how far a scrub is, the stamp.
//!
//! One thread takes all that waits, writes one batch, syncs once, and tells all. Removals ride along unsynced: forgetting one
//! only means that something is repaired twice. Adds and removals keep their order.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Context as _;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use mortar_proto::{BrickId, Ino};
use rocksdb::{DB, IteratorMode, Options, WriteBatch, WriteOptions};

/// Regions that one record stands for, a bit each.
const CHUNK: u64 = 1024;
const WORDS: usize = (CHUNK / 64) as usize;
const INTENT: u8 = b'i';
const MISSED: u8 = b'm';
const CLEAN: &[u8] = b"clean";
const SCRUB: &[u8] = b"scrub";
const STAMP: &[u8] = b"stamp";

/// Something to be made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An intent extent of a file.
    Intent(Ino, u64),
    /// Regions of a file that a brick misses; with the brick's own number, those that are corrupt on it.
    Missed(BrickId, Ino, Range<u64>),
    /// How far the scrub is.
    Scrub(Vec<u8>),
}

/// Something to be forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// An intent extent of a file.
    Intent(Ino, u64),
    /// Regions of a file that a brick misses no more.
    Missed(BrickId, Ino, Range<u64>),
    /// All that a brick misses of a file.
    AllMissed(BrickId, Ino),
    /// Everything about a file.
    File(Ino),
}

/// What was found at the start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Intents.
    pub intents: Vec<(Ino, u64)>,
    /// Missed regions.
    pub missed: Vec<(BrickId, Ino, Range<u64>)>,
    /// The last stop was clean.
    pub clean: bool,
    /// How far the scrub is.
    pub scrub: Option<Vec<u8>>,
    /// The stamp, raised for this start.
    pub stamp: u64,
}

enum Job {
    Add(Vec<Record>, Sender<io::Result<()>>),
    Remove(Vec<Removal>),
    Clean(Sender<io::Result<()>>),
    Stamp(u64, Sender<io::Result<()>>),
}

/// The journal.
pub struct Journal {
    jobs: Sender<Job>,
    /// Something was changed here or in the data since the stamp was raised.
    changed: AtomicBool,
    stamp: AtomicU64,
}

impl Journal {
    /// Makes an empty one, durably, for a brick that is not one yet.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn make(dir: &Path) -> anyhow::Result<()> {
        let made = DB::open(&options(true), dir).map(drop);
        made.with_context(|| format!("cannot make the brick's journal in {}", dir.display()))
    }

    /// Opens it, raises its stamp, and takes the record of a clean stop away, durably: from now on the next one is not clean unless it
    /// says so. Nothing that it holds is changed if the stamp that it had does not pass the check.
    /// One that is gone is never made anew: without it nobody knows what was being written here, or what others miss.
    ///
    /// # Errors
    /// When it is not there or makes no sense, or the disk refuses.
    pub fn open(dir: &Path, check: impl FnOnce(u64) -> anyhow::Result<()>) -> anyhow::Result<(Self, Loaded)> {
        let db = DB::open(&options(false), dir).with_context(|| {
            format!(
                "the brick's journal in {} cannot be opened, and without it nobody knows which data here is good; if it \
                 cannot be brought back, have the brick built anew with 'mortar volume reset-brick'",
                dir.display()
            )
        })?;
        let stamp = db.get(STAMP)?.map_or(0, |stamp| word(&stamp, 0));
        check(stamp)?;
        let stamp = stamp.saturating_add(1);
        let mut loaded = Loaded { clean: db.get(CLEAN)?.is_some(), scrub: db.get(SCRUB)?, stamp, ..Loaded::default() };
        let mut missed = HashMap::new();
        for row in db.iterator(IteratorMode::Start) {
            let (key, value) = row?;
            match key.first() {
                Some(&INTENT) if key.len() == 17 => loaded.intents.push((Ino(word(&key, 1)), word(&key, 9))),
                Some(&MISSED) if key.len() == 25 && value.len() == WORDS * 8 => {
                    let bits: [u64; WORDS] = std::array::from_fn(|i| word(&value, i * 8));
                    let (brick, ino, chunk) = (BrickId(word(&key, 1)), Ino(word(&key, 9)), word(&key, 17));
                    for region in (0..CHUNK).filter(|r| bits[(r / 64) as usize] >> (r % 64) & 1 == 1) {
                        loaded.missed.push((brick, ino, chunk * CHUNK + region..chunk * CHUNK + region + 1));
                    }
                    missed.insert((brick, ino, chunk), bits);
                }
                _ => {}
            }
        }
        let mut started = WriteBatch::default();
        started.delete(CLEAN);
        started.put(STAMP, stamp.to_be_bytes());
        db.write_opt(started, &synced())?;
        let (jobs, taken) = unbounded();
        std::thread::Builder::new().name("journal".into()).spawn(move || Writer { db, missed }.run(&taken))?;
        Ok((Self { jobs, changed: AtomicBool::new(false), stamp: AtomicU64::new(stamp) }, loaded))
    }

    fn wait(&self, job: impl FnOnce(Sender<io::Result<()>>) -> Job) -> io::Result<()> {
        let gone = || io::Error::other("the journal has stopped");
        let (done, told) = bounded(1);
        self.jobs.send(job(done)).map_err(|_| gone())?;
        told.recv().map_err(|_| gone())?
    }

    /// Makes records durable.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn add(&self, records: Vec<Record>) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let added = self.wait(|done| Job::Add(records, done));
        self.touch();
        added
    }

    /// Forgets records, some time.
    pub fn remove(&self, removals: Vec<Removal>) {
        if !removals.is_empty() {
            // A journal that has stopped is told of by the next add.
            let _ = self.jobs.send(Job::Remove(removals));
        }
    }

    /// The data has been changed, or flushed: the stamp has to be raised. Told when it is done, else a raise might come in between.
    pub fn touch(&self) {
        self.changed.store(true, Ordering::Relaxed);
    }

    /// Raises the stamp, durably, if anything was changed since it was raised last, and tells what it is then.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn raise(&self) -> io::Result<Option<u64>> {
        if !self.changed.swap(false, Ordering::Relaxed) {
            return Ok(None);
        }
        let stamp = self.stamp.fetch_add(1, Ordering::Relaxed) + 1;
        self.wait(|done| Job::Stamp(stamp, done))?;
        Ok(Some(stamp))
    }

    /// Records a clean stop, durably.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn set_clean(&self) -> io::Result<()> {
        self.wait(Job::Clean)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

fn options(create: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(create);
    options.set_keep_log_file_num(2);
    options.set_max_total_wal_size(32 << 20);
    options.set_write_buffer_size(8 << 20);
    options.set_recycle_log_file_num(2);
    options
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

fn key(kind: u8, words: &[u64]) -> Vec<u8> {
    let mut key = vec![kind];
    for word in words {
        key.extend_from_slice(&word.to_be_bytes());
    }
    key
}

struct Writer {
    db: DB,
    missed: HashMap<(BrickId, Ino, u64), [u64; WORDS]>,
}

impl Writer {
    fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut batch = WriteBatch::default();
            let mut waiting = Vec::new();
            for job in std::iter::once(first).chain(jobs.try_iter()) {
                match job {
                    Job::Add(records, done) => {
                        for record in records {
                            self.add(&mut batch, record);
                        }
                        waiting.push(done);
                    }
                    Job::Remove(removals) => {
                        for removal in removals {
                            self.remove(&mut batch, removal);
                        }
                    }
                    Job::Clean(done) => {
                        batch.put(CLEAN, b"1");
                        waiting.push(done);
                    }
                    Job::Stamp(stamp, done) => {
                        batch.put(STAMP, stamp.to_be_bytes());
                        waiting.push(done);
                    }
                }
            }
            let written = if waiting.is_empty() { self.db.write(batch) } else { self.db.write_opt(batch, &synced()) };
            for done in waiting {
                let told = match &written {
                    Ok(()) => Ok(()),
                    Err(e) => Err(io::Error::other(e.to_string())),
                };
                let _ = done.send(told);
            }
            if let Err(e) = written {
                tracing::error!("the brick's journal cannot be written: {e}");
            }
        }
    }

    fn add(&mut self, batch: &mut WriteBatch, record: Record) {
        match record {
            Record::Intent(ino, extent) => batch.put(key(INTENT, &[ino.0, extent]), []),
            Record::Missed(brick, ino, regions) => self.change(batch, brick, ino, regions, true),
            Record::Scrub(place) => batch.put(SCRUB, place),
        }
    }

    fn remove(&mut self, batch: &mut WriteBatch, removal: Removal) {
        match removal {
            Removal::Intent(ino, extent) => batch.delete(key(INTENT, &[ino.0, extent])),
            Removal::Missed(brick, ino, regions) => self.change(batch, brick, ino, regions, false),
            Removal::AllMissed(brick, ino) => self.drop_chunks(batch, |b, i| b == brick && i == ino),
            Removal::File(ino) => {
                self.drop_chunks(batch, |_, i| i == ino);
                for row in self.db.prefix_iterator(key(INTENT, &[ino.0])).flatten() {
                    if !row.0.starts_with(&key(INTENT, &[ino.0])) {
                        break;
                    }
                    batch.delete(row.0);
                }
            }
        }
    }

    fn drop_chunks(&mut self, batch: &mut WriteBatch, is: impl Fn(BrickId, Ino) -> bool) {
        self.missed.retain(|(brick, ino, chunk), _| {
            let gone = is(*brick, *ino);
            if gone {
                batch.delete(key(MISSED, &[brick.0, ino.0, *chunk]));
            }
            !gone
        });
    }

    fn change(&mut self, batch: &mut WriteBatch, brick: BrickId, ino: Ino, regions: Range<u64>, set: bool) {
        let mut at = regions.start;
        while at < regions.end {
            let chunk = at / CHUNK;
            let end = regions.end.min((chunk + 1) * CHUNK);
            let bits = self.missed.entry((brick, ino, chunk)).or_insert([0; WORDS]);
            for region in at..end {
                let (word, bit) = ((region % CHUNK / 64) as usize, region % 64);
                if set {
                    bits[word] |= 1 << bit;
                } else {
                    bits[word] &= !(1 << bit);
                }
            }
            let name = key(MISSED, &[brick.0, ino.0, chunk]);
            if bits.iter().all(|w| *w == 0) {
                self.missed.remove(&(brick, ino, chunk));
                batch.delete(name);
            } else {
                batch.put(name, bits.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>());
            }
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mortar_proto::SIZE_REGION;
    use mortar_proto::interval::IntervalSet;

    #[test]
    fn what_was_recorded_is_found_again_and_a_clean_stop_once() {
        let dir = tempfile::tempdir().unwrap();
        let (x, ino) = (BrickId(9), Ino(77));
        Journal::make(dir.path()).unwrap();
        let open = || Journal::open(dir.path(), |_| Ok(()));
        {
            let (journal, loaded) = open().unwrap();
            assert!(loaded.intents.is_empty() && loaded.missed.is_empty() && !loaded.clean);
            journal.add(vec![Record::Intent(ino, 3), Record::Intent(ino, 4), Record::Intent(Ino(5), 1)]).unwrap();
            journal
                .add(vec![Record::Missed(x, ino, 1000..3000), Record::Missed(x, ino, SIZE_REGION..SIZE_REGION + 1)])
                .unwrap();
            journal.remove(vec![Removal::Intent(ino, 3), Removal::Missed(x, ino, 1500..1600), Removal::File(Ino(5))]);
            journal.set_clean().unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        {
            let (_journal, loaded) = open().unwrap();
            assert!(loaded.clean);
            assert_eq!(loaded.intents, [(ino, 4)]);
            let regions: IntervalSet = loaded.missed.iter().map(|(_, _, r)| r.clone()).collect();
            assert_eq!(regions.iter().collect::<Vec<_>>(), [1000..1500, 1600..3000, SIZE_REGION..SIZE_REGION + 1]);
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        {
            let loaded = open().unwrap().1;
            assert!(!loaded.clean);
            assert_eq!(loaded.stamp, 3);
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(Journal::open(dir.path(), |stamp| anyhow::bail!("{stamp}")).is_err_and(|e| e.to_string() == "3"));
    }
}
