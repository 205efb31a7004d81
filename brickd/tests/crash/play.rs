//! What is done to a volume while its disk remembers: files that are written, cut, punched and flushed, names that change, a brick
//! that is out for a while, intents that are cleared, a clean stop and another start.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mortar_proto::config::{BrickState, Slot};
use mortar_proto::metadata::{Command, NameOp, NewNode};
use mortar_proto::{Ino, REGION_BYTES, SIZE_REGION, SessionId};

use crate::chance::Chance;
use crate::content::Mutation;
use crate::holder::Holder;
use crate::server::Server;
use crate::trace::{CleanStop, History, Miss, Recorder, State};

pub const IN_SYNC: [BrickState; 3] = [BrickState::InSync; 3];
const ONE_OUT: [BrickState; 3] = [BrickState::InSync, BrickState::InSync, BrickState::Out];
const ONE_SYNCING: [BrickState; 3] = [BrickState::InSync, BrickState::InSync, BrickState::Syncing];
/// Bricks clear intents that were not written for 3 s, and look each second `[W7]`.
const UNTIL_INTENTS_ARE_CLEARED: Duration = Duration::from_millis(4800);

/// Data and checksums of a file on a brick.
pub fn object(brick: &Path, ino: Ino) -> [PathBuf; 2] {
    ["objects", "sums"].map(|kind| brick.join(format!(".mortar/{kind}/{:02x}/{:x}", ino.0 & 0xff, ino.0)))
}

/// Has the kernel write a file back, without a flush: it may do so whenever it likes.
fn write_back(path: &Path) {
    let Ok(file) = File::open(path) else { return };
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open, and the call touches no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
}

/// A kernel that writes a file back all the time.
struct Impatience {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Impatience {
    fn with(paths: Vec<PathBuf>) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ends);
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Acquire) {
                paths.iter().for_each(|path| write_back(path));
                std::thread::yield_now();
            }
        });
        Self { ends, thread: Some(thread) }
    }
}

impl Drop for Impatience {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// One who does it.
pub struct Player<'a, 'd> {
    pub server: &'a Server,
    pub recorder: &'a mut Recorder<'d>,
    /// The brick whose disk remembers.
    pub brick: PathBuf,
    pub session: SessionId,
}

impl Player<'_, '_> {
    fn change(&mut self, holder: &mut Holder<'_>, file: usize, mutation: &Mutation) {
        let tag = self.recorder.next_tag();
        let (what, payload) = mutation.what(tag);
        let step = self.recorder.disk.recorded();
        let history: &mut History = &mut self.recorder.files[file];
        let content = history.states[history.states.len() - 1].content.after(mutation, tag);
        history.told += &format!("{mutation:?}, ");
        history.states.push(State { begun: step, acknowledged: Instant::now(), content });
        holder.mutate(&what, &payload);
    }

    fn flush(&mut self, holder: &mut Holder<'_>, file: usize) {
        holder.flush();
        let seen = self.server.seen();
        let step = self.recorder.disk.recorded();
        self.recorder.seen.push((step, seen));
        let history = &mut self.recorder.files[file];
        history.told += "flush, ";
        history.flushed.push((step, history.states.len() - 1));
    }

    fn size(&self, file: usize) -> u64 {
        self.recorder.files[file].states.last().map_or(0, |state| state.content.size)
    }

    /// A new file, with something in it that is flushed, and then one of the sequences.
    pub fn sequence(&mut self, number: u64, chance: &mut Chance) -> Ino {
        let ino = self.server.create(self.session, &format!("file-{number}"));
        let file = self.recorder.file(ino);
        let mut holder = Holder::new(self.server, ino, self.session);
        for mutation in &Mutation::FIRST {
            self.change(&mut holder, file, mutation);
        }
        self.flush(&mut holder, file);
        let impatience = chance.one_in(2).then(|| Impatience::with(object(&self.brick, ino).to_vec()));
        for kind in Mutation::sequence(number, chance) {
            let mutation = Mutation::of_kind(kind, self.size(file));
            self.change(&mut holder, file, &mutation);
            let [data, sums] = object(&self.brick, ino);
            match chance.below(5) {
                0 => write_back(&data),
                1 => write_back(&sums),
                2 => [&sums, &data].into_iter().for_each(|path| write_back(path)),
                3 => self.flush(&mut holder, file),
                _ => {}
            }
        }
        drop(impatience);
        self.flush(&mut holder, file);
        holder.settle();
        ino
    }

    /// Changes files once more, the intents of which have been cleared; not all of it is flushed.
    pub fn second_round(&mut self, files: usize, chance: &mut Chance) {
        std::thread::sleep(UNTIL_INTENTS_ARE_CLEARED);
        for _ in 0..files {
            let file = chance.below(self.recorder.files.len() as u64) as usize;
            if self.recorder.files[file].gone != usize::MAX {
                continue;
            }
            let ino = self.recorder.files[file].ino;
            let mut holder = Holder::new(self.server, ino, self.session);
            let _impatience = chance.one_in(2).then(|| Impatience::with(object(&self.brick, ino).to_vec()));
            let mutation = Mutation::of_kind(chance.below(Mutation::KINDS), self.size(file));
            self.change(&mut holder, file, &mutation);
            if chance.one_in(2) {
                object(&self.brick, ino).iter().for_each(|path| write_back(path));
            }
            if chance.one_in(2) {
                self.flush(&mut holder, file);
            }
        }
    }

    /// Names that come, move, and go.
    pub fn names(&mut self, inos: &[Ino]) {
        let (parent, session) = (self.server.root(), self.session);
        let directory = NameOp::Create {
            parent,
            name: "directory".into(),
            node: NewNode::Directory,
            mode: 0o750,
            uid: 0,
            gid: 0,
            or_existing: false,
            open: false,
        };
        self.server.name(session, directory);
        for (i, ino) in inos.iter().enumerate() {
            let name = self.server.log.with_state(|s| s.path_of(*ino)).unwrap_or_default();
            let name: Vec<u8> = name.trim_start_matches('/').into();
            match i % 4 {
                0 => {
                    // Another takes its name at once.
                    let step = self.recorder.disk.recorded();
                    if let Some(history) = self.recorder.files.iter_mut().find(|h| h.ino == *ino) {
                        history.gone = step;
                    }
                    self.server.name(session, NameOp::Unlink { parent, name: name.clone() });
                    let heir = self.server.create(session, &String::from_utf8_lossy(&name));
                    let file = self.recorder.file(heir);
                    let mut holder = Holder::new(self.server, heir, session);
                    self.change(&mut holder, file, &Mutation::Write { offset: 100, length: 5000 });
                    self.flush(&mut holder, file);
                    holder.settle();
                }
                1 => self.server.name(session, NameOp::Link { ino: *ino, parent, name: format!("link-{i}").into() }),
                _ => {
                    let new_name = format!("moved-{i}").into_bytes();
                    let (no_replace, exchange) = (false, false);
                    let rename = NameOp::Rename { parent, name, new_parent: parent, new_name, no_replace, exchange };
                    self.server.name(session, rename);
                }
            }
        }
    }

    /// A brick is out while a file changes, and gets back what it missed `[W5]`, `[S2]`.
    pub fn one_out(&mut self, ino: Ino, chance: &mut Chance) {
        let c = Slot(2);
        let brick = self.server.brick(c);
        let Some(file) = self.recorder.files.iter().position(|h| h.ino == ino) else { return };
        self.server.leads.store(false, Ordering::Release);
        let now = self.server.configuration();
        let set = self.server.log.with_state(|s| s.sets.keys().next().copied()).unwrap();
        self.server.propose(Command::PutOut { set, n: now.n, slot: c });
        self.server.wait_for_states(ONE_OUT);
        let mut holder = Holder::new(self.server, ino, self.session);
        let first = self.recorder.misses.len();
        for _ in 0..3 {
            let mutation = Mutation::of_kind(chance.below(6), self.size(file));
            let before = self.size(file);
            self.change(&mut holder, file, &mutation);
            let Mutation::Write { offset, length } = mutation else { continue };
            let mut regions: Vec<u64> = (offset / REGION_BYTES..(offset + length).div_ceil(REGION_BYTES)).collect();
            if self.size(file) != before {
                regions.push(SIZE_REGION);
            }
            let from = self.recorder.disk.recorded();
            let missed = regions.into_iter().map(|region| Miss { brick, ino, region, from, until: usize::MAX });
            self.recorder.misses.extend(missed);
        }
        self.flush(&mut holder, file);
        self.server.propose(Command::Rejoin { set, n: self.server.configuration().n, slot: c });
        self.server.wait_for_states(ONE_SYNCING);
        let until = self.recorder.disk.recorded();
        self.recorder.misses[first..].iter_mut().for_each(|m| m.until = until);
        drop(holder);
        self.server.leads.store(true, Ordering::Release);
        heal(self.server, self.session);
    }
}

/// Repairs all files on all bricks that are under repair, until all are in sync.
pub fn heal(server: &Server, session: SessionId) {
    server.wait_for("bricks that are in sync or under repair", |configuration| {
        let some = configuration.in_sync();
        !some.is_empty() && Slot::ALL.iter().all(|slot| configuration.state(*slot) != BrickState::Out)
    });
    let syncing = || server.configuration().syncing();
    // More than once: a brick that is promoted has lists of its own of what the other lacks [S4].
    for _ in 0..10 {
        for ino in server.files() {
            let mut holder = Holder::new(server, ino, session);
            for slot in syncing().iter() {
                holder.repair(slot);
            }
            holder.settle();
        }
        let until = Instant::now() + Duration::from_secs(1);
        while !syncing().is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if syncing().is_empty() {
            break;
        }
    }
    server.wait_for_states(IN_SYNC);
}

/// Stops the server cleanly and starts it again; all that was done is promised then. Returns who goes on.
pub fn stop_and_start(
    server: Server,
    recorder: &mut Recorder<'_>,
    start: impl FnOnce() -> Server,
) -> (Server, SessionId) {
    let begun = recorder.disk.recorded();
    server.stop();
    let done = recorder.disk.recorded();
    for history in &mut recorder.files {
        history.flushed.push((done, history.states.len() - 1));
    }
    let server = start();
    server.end_sessions();
    let session = server.session();
    heal(&server, session);
    let over = recorder.disk.recorded();
    recorder.stops.push(CleanStop { begun, over });
    (server, session)
}
