//! The programs on the mounts: they write their own blocks, read everybody's, and check all that they read.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::HUNG;
use super::cluster::{CLIENTS, Cluster, Life};
use super::history::{BLOCK, Ledger};
use super::pauses::{Timeline, What};
use super::sizes;
use crate::sim::rng::Rng;

/// Blocks that have one writer in a row; a write stays within them.
const CHUNK: usize = 16;
/// A writer flushes after about so many writes.
const FLUSH: u64 = 40;

/// A file: its name, its blocks, and who writes it: threads of the first client, and of the second.
const FILES: &[(&str, usize, [usize; CLIENTS])] =
    &[("one.img", 16384, [3, 0]), ("two.img", 8192, [0, 1]), ("both.img", 4096, [1, 1])];
/// Threads that only read, on each client.
const READERS: [usize; CLIENTS] = [1, 2];

/// What all workers share.
#[derive(Debug)]
pub struct Field {
    ledgers: Vec<Ledger>,
    mounts: Vec<(PathBuf, Arc<Life>)>,
    timeline: Arc<Timeline>,
    seed: u64,
    is_stopping: AtomicBool,
    wrong: Mutex<Vec<String>>,
    /// What each worker is at, and since when.
    busy: Mutex<HashMap<String, Instant>>,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    others: AtomicU64,
    excused: AtomicU64,
}

/// The threads.
#[derive(Debug)]
pub struct Workers(Vec<(String, JoinHandle<()>)>);

impl Workers {
    /// Waits for all.
    ///
    /// # Errors
    /// Names those that are still at something.
    pub fn join(self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        while self.0.iter().any(|(_, thread)| !thread.is_finished()) {
            if Instant::now() > until {
                let hung: Vec<_> = self.0.iter().filter(|(_, t)| !t.is_finished()).map(|(n, _)| n.as_str()).collect();
                bail!("requests have no answer after {} s: {}", limit.as_secs(), hung.join(", "));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for (name, thread) in self.0 {
            if thread.join().is_err() {
                bail!("{name} panicked");
            }
        }
        Ok(())
    }
}

impl Field {
    /// Makes the files, full of holes.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new(cluster: &Cluster, seed: u64, timeline: Arc<Timeline>) -> Result<Arc<Self>> {
        let mounts: Vec<_> = cluster.clients.iter().map(|c| (c.mount.clone(), Arc::clone(&c.life))).collect();
        for (name, blocks, _) in FILES {
            let file = File::create_new(mounts[0].0.join(name)).with_context(|| format!("making {name}"))?;
            file.set_len((blocks * BLOCK) as u64)?;
        }
        let ledgers = FILES.iter().enumerate().map(|(n, (_, blocks, _))| Ledger::new(n as u32 + 1, *blocks)).collect();
        Ok(Arc::new(Self {
            ledgers,
            mounts,
            timeline,
            seed,
            is_stopping: AtomicBool::new(false),
            wrong: Mutex::default(),
            busy: Mutex::default(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            others: AtomicU64::new(0),
            excused: AtomicU64::new(0),
        }))
    }

    /// Starts all workers.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(self: &Arc<Self>) -> Result<Workers> {
        let mut workers = Vec::new();
        let mut spawn = |name: String, client: usize, work: Box<dyn FnOnce(&mut Hand) + Send>| -> Result<()> {
            let number = workers.len() as u64;
            let mut hand = Hand::new(self, &name, client, self.seed ^ (number + 1).wrapping_mul(0x9e37_79b9));
            let thread = std::thread::Builder::new().name(name.clone()).spawn(move || work(&mut hand))?;
            workers.push((name, thread));
            Ok(())
        };
        for (file, (name, _, writers)) in FILES.iter().enumerate() {
            let all: usize = writers.iter().sum();
            let mut share = 0;
            for (client, threads) in writers.iter().enumerate() {
                for _ in 0..*threads {
                    let (of, mine) = (all, share);
                    share += 1;
                    let task = Box::new(move |hand: &mut Hand| write_on(hand, file, mine, of));
                    spawn(format!("writer {share} of {name} on client {}", client + 1), client, task)?;
                }
            }
        }
        for (client, threads) in READERS.iter().enumerate() {
            for number in 0..*threads {
                spawn(format!("reader {} on client {}", number + 1, client + 1), client, Box::new(read_on))?;
            }
        }
        let field = Arc::clone(self);
        let second = Hand::new(&field, "names on client 2", 1, self.seed ^ 0x5152);
        spawn("names on client 1".into(), 0, Box::new(move |hand| sizes::work(hand, second)))?;
        Ok(Workers(workers))
    }

    /// The name of a file.
    #[must_use]
    pub fn name(&self, file: usize) -> &'static str {
        FILES[file].0
    }

    /// Seconds since the run began.
    #[must_use]
    pub fn now(&self) -> f64 {
        self.timeline.now()
    }

    /// Workers end after what they are at.
    pub fn stop(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
    }

    /// Notes what must not be; the run ends soon.
    pub fn complain(&self, what: String) {
        let line = format!("[{:7.1} s] WRONG: {what}", self.now());
        println!("{line}");
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    /// Nothing is wrong so far, and nothing hangs.
    ///
    /// # Errors
    /// All that is.
    pub fn is_sound(&self) -> Result<()> {
        super::go_on()?;
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if !wrong.is_empty() {
            bail!("{}", wrong[..wrong.len().min(20)].join("\n"));
        }
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, since)) = busy.iter().find(|(_, since)| since.elapsed() > HUNG) {
            bail!("{name} has waited for one answer for {} s", since.elapsed().as_secs());
        }
        Ok(())
    }

    /// How much was done.
    #[must_use]
    pub fn counts(&self) -> String {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        format!(
            "{} writes, {} reads, {} flushes, {} operations on names and sizes; {} failed with a client that was killed",
            count(&self.writes),
            count(&self.reads),
            count(&self.flushes),
            count(&self.others),
            count(&self.excused)
        )
    }

    /// Reads every block of every file through a mount.
    ///
    /// # Errors
    /// What is wrong.
    pub fn read_all(self: &Arc<Self>, client: usize) -> Result<()> {
        let mut hand = Hand::new(self, "the last reader", client, 0);
        // It works although all others have been told to stop.
        hand.is_last = true;
        for (file, ledger) in self.ledgers.iter().enumerate() {
            for first in (0..ledger.blocks()).step_by(64) {
                hand.read(file, first, 64.min(ledger.blocks() - first));
            }
        }
        self.is_sound()
    }
}

/// One worker's way to one mount.
#[derive(Debug)]
pub struct Hand {
    field: Arc<Field>,
    name: String,
    client: usize,
    mount: PathBuf,
    life: Arc<Life>,
    known_life: u64,
    files: HashMap<usize, File>,
    /// Its own chance.
    pub rng: Rng,
    is_last: bool,
}

impl Hand {
    fn new(field: &Arc<Field>, name: &str, client: usize, seed: u64) -> Self {
        let (mount, life) = field.mounts[client].clone();
        let (files, rng) = (HashMap::new(), Rng::new(seed));
        let (field, name) = (Arc::clone(field), name.to_owned());
        Self { field, name, client, mount, known_life: life.number(), life, files, rng, is_last: false }
    }

    /// The run goes on.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        self.is_last || !self.field.is_stopping.load(Ordering::SeqCst)
    }

    /// Notes what must not be.
    pub fn complain(&self, what: &str) {
        self.field.complain(format!("{}: {what}", self.name));
    }

    /// Does something on the mount, once it is there, and measures it. `None`: the mount was killed meanwhile, and nobody knows
    /// whether it was done, or the run ends. Every other error is noted as wrong.
    pub fn attempt<R>(
        &mut self,
        what: What,
        name: &str,
        act: impl FnOnce(&Path, &mut HashMap<usize, File>) -> io::Result<R>,
    ) -> Option<R> {
        while self.life.is_dead() {
            self.files.clear();
            if !self.goes_on() {
                return None;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let life = self.life.number();
        if life != self.known_life {
            self.files.clear();
            self.known_life = life;
        }
        let busy = |since: Option<Instant>| {
            let mut busy = self.field.busy.lock().unwrap_or_else(PoisonError::into_inner);
            match since {
                Some(since) => drop(busy.insert(self.name.clone(), since)),
                None => drop(busy.remove(&self.name)),
            }
        };
        busy(Some(Instant::now()));
        let from = self.field.now();
        let result = act(&self.mount, &mut self.files);
        busy(None);
        let was_killed = self.life.is_dead() || self.life.number() != life;
        match result {
            Ok(done) => {
                if !was_killed {
                    self.field.timeline.waited(from, self.client, what);
                }
                Some(done)
            }
            Err(_) if was_killed => {
                self.field.excused.fetch_add(1, Ordering::Relaxed);
                self.files.clear();
                None
            }
            Err(e) => {
                self.complain(&format!("{name} failed after {:.1} s: {e}", self.field.now() - from));
                None
            }
        }
    }

    /// Something that names or sizes are about was done.
    pub fn count_other(&self) {
        self.field.others.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&mut self, file: usize, first: usize, count: usize) {
        let field = Arc::clone(&self.field);
        let ledger = &field.ledgers[file];
        let mut data = vec![0; count * BLOCK];
        // Before the mount is waited for, so that nothing newer is taken for the least that it must find.
        let floor = ledger.floor(first, count);
        let read = self.attempt(What::Data, &format!("reading {}", FILES[file].0), |mount, files| {
            opened(files, mount, file)?.read_exact_at(&mut data, (first * BLOCK) as u64)
        });
        if read.is_some() {
            field.reads.fetch_add(1, Ordering::Relaxed);
            if let Err(why) = ledger.check(first, &floor, &data) {
                self.complain(&format!("{}: {why}", FILES[file].0));
            }
        }
    }

    fn write(&mut self, file: usize, first: usize, count: usize, what: What) {
        let field = Arc::clone(&self.field);
        let ledger = &field.ledgers[file];
        let mut data = vec![0; count * BLOCK];
        let blocks = data.chunks_exact_mut(BLOCK).enumerate();
        let generations: Vec<u32> = blocks.map(|(index, block)| ledger.begin(first + index, block)).collect();
        let written = self.attempt(what, &format!("writing {}", FILES[file].0), |mount, files| {
            opened(files, mount, file)?.write_all_at(&data, (first * BLOCK) as u64)
        });
        if written.is_some() {
            field.writes.fetch_add(1, Ordering::Relaxed);
            for (index, generation) in generations.into_iter().enumerate() {
                ledger.acknowledge(first + index, generation);
            }
        }
    }

    /// A random moment of rest.
    pub fn rest(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.rng.below(most_ms + 1)));
    }
}

fn opened<'a>(files: &'a mut HashMap<usize, File>, mount: &Path, file: usize) -> io::Result<&'a File> {
    use std::collections::hash_map::Entry;
    Ok(match files.entry(file) {
        Entry::Occupied(open) => open.into_mut(),
        Entry::Vacant(closed) => {
            let path = mount.join(FILES[file].0);
            closed.insert(OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?)
        }
    })
}

/// Writes the chunks of `file` that are its own, of `writers` the `share`th.
fn write_on(hand: &mut Hand, file: usize, share: usize, writers: usize) {
    let chunks = FILES[file].1 / CHUNK;
    let is_shared = FILES[file].2.iter().all(|threads| *threads > 0);
    // A file that both clients write changes hands all the time: each write may need the log.
    let (what, most_rest) = if is_shared { (What::Log, 400) } else { (What::Data, 8) };
    while hand.goes_on() {
        let chunk = hand.rng.index(chunks / writers) * writers + share;
        let count = 1 + hand.rng.index(CHUNK);
        let first = chunk * CHUNK + hand.rng.index(CHUNK - count + 1);
        hand.write(file, first, count, what);
        if hand.rng.below(FLUSH) == 0 {
            let name = format!("fsync of {}", FILES[file].0);
            let flushed = hand.attempt(what, &name, |mount, files| opened(files, mount, file)?.sync_all());
            if flushed.is_some() {
                hand.field.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        if hand.rng.chance(200) {
            hand.read(file, first, count);
        }
        hand.rest(most_rest);
    }
}

/// Reads anything.
fn read_on(hand: &mut Hand) {
    while hand.goes_on() {
        let file = hand.rng.index(FILES.len());
        let count = 1 + hand.rng.index(2 * CHUNK);
        let first = hand.rng.index(FILES[file].1 - count);
        hand.read(file, first, count);
        hand.rest(8);
    }
}
