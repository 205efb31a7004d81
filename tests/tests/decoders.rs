//! Nothing that a peer sends makes a decoder panic or take memory beyond measure, and no command, however odd, breaks the
//! structure of the state that all servers share.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Read;

use mortar_proto::frame::{FrameReader, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES};
use mortar_proto::metadata::state::Node;
use mortar_proto::metadata::{
    Answer, BrickPlace, Command, Entry, NameOp, NewNode, Outcome, Query, SetAttributes, State,
};
use mortar_proto::types::{ClusterId, Ino, LogIndex, ServerId, SessionId};
use mortar_proto::wire::{self, data, peer, session};
use proptest::prelude::*;
use prost::Message;

/// Counts what each thread has allocated, and the most it had at once.
struct Counting;
thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: everything is left to the system's allocator; counting touches no memory of others.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The most that `act` had allocated at once, in bytes.
fn peak(act: impl FnOnce()) -> usize {
    let before = LIVE.get();
    PEAK.set(before);
    act();
    usize::try_from(PEAK.get() - before).unwrap_or(0)
}

/// Bytes that came in pieces.
struct Drip<'a>(&'a [u8], usize);
impl Read for Drip<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.1.min(self.0.len()).min(buf.len());
        buf[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}

fn node() -> impl Strategy<Value = NewNode> {
    prop_oneof![
        3 => Just(NewNode::File),
        3 => Just(NewNode::Directory),
        1 => prop::collection::vec(any::<u8>(), 0..5000).prop_map(NewNode::Symlink),
        1 => (any::<u32>(), any::<u32>()).prop_map(|(format, rdev)| NewNode::Special { format, rdev }),
    ]
}

/// Names that are often the same, and now and then none that a directory may hold.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let few = ["a", "b", "c", "d"].map(|n| n.as_bytes().to_vec());
    let odd = ["", ".", "..", "a/b", "nul\0", ".mortar"].map(|n| n.as_bytes().to_vec());
    prop_oneof![
        12 => prop::sample::select(few.to_vec()),
        1 => prop::sample::select(odd.to_vec()),
        1 => prop::collection::vec(any::<u8>(), 250..260),
    ]
}

fn ino() -> impl Strategy<Value = Ino> {
    prop_oneof![20 => (0_u64..24).prop_map(Ino), 1 => any::<u64>().prop_map(Ino)]
}

fn name_op() -> impl Strategy<Value = NameOp> {
    let set = (any::<[Option<u32>; 3]>(), any::<[Option<i64>; 2]>())
        .prop_map(|([mode, uid, gid], [atime_ns, mtime_ns])| SetAttributes { mode, uid, gid, atime_ns, mtime_ns });
    prop_oneof![
        6 => (ino(), name(), node(), any::<[u32; 3]>(), any::<[bool; 2]>()).prop_map(
            |(parent, name, node, [mode, uid, gid], [or_existing, open])| NameOp::Create {
                parent, name, node, mode, uid, gid, or_existing, open,
            }
        ),
        2 => (ino(), ino(), name()).prop_map(|(ino, parent, name)| NameOp::Link { ino, parent, name }),
        2 => (ino(), name()).prop_map(|(parent, name)| NameOp::Unlink { parent, name }),
        2 => (ino(), name()).prop_map(|(parent, name)| NameOp::Rmdir { parent, name }),
        5 => (ino(), name(), ino(), name(), any::<[bool; 2]>()).prop_map(
            |(parent, name, new_parent, new_name, [no_replace, exchange])| NameOp::Rename {
                parent, name, new_parent, new_name, no_replace, exchange,
            }
        ),
        1 => (ino(), set).prop_map(|(ino, set)| NameOp::SetAttributes { ino, set }),
        1 => (ino(), name(), any::<[bool; 2]>()).prop_map(|(ino, name, [create, replace])| NameOp::SetXattr {
            ino, value: name.clone(), name, create, replace,
        }),
        1 => (ino(), name()).prop_map(|(ino, name)| NameOp::RemoveXattr { ino, name }),
        2 => ino().prop_map(|ino| NameOp::Open { ino }),
        2 => prop::collection::vec(ino(), 0..4).prop_map(|inos| NameOp::Close { inos }),
    ]
}

/// A started volume, two sessions that have it mounted, and the next index of the log.
fn volume() -> (State, [SessionId; 2], u64) {
    let mut state = State::new(ClusterId(1));
    let server = ServerId(9);
    let place = |i: u32| BrickPlace { server, path: format!("/b{i}") };
    let mut index = 0;
    let mut run = |command| {
        index += 1;
        state.apply(LogIndex(index), &Entry { time_ns: index, request: None, command }).0
    };
    run(Command::ServerAdd { server, address: "s:1".into() });
    run(Command::VolumeCreate { name: "v".into(), sets: vec![[place(0), place(1), place(2)]], force: true });
    run(Command::VolumeStart { name: "v".into() });
    let sessions = [1, 2].map(|nonce| {
        let open = Command::SessionOpen { nonce, volume: "v".into(), client: "c".into(), address: String::new() };
        match run(open) {
            Outcome::Session { session, .. } => session,
            other => panic!("{other:?}"),
        }
    });
    (state, sessions, index)
}

/// Small numbers become inodes, and as parents directories, that there are; most changes then do something.
fn aimed(mut operation: NameOp, state: &State) -> NameOp {
    let inodes: Vec<Ino> = state.inodes.keys().copied().collect();
    let is_directory = |i: &&Ino| matches!(state.inodes[i].node, Node::Directory(_));
    let directories: Vec<Ino> = inodes.iter().filter(is_directory).copied().collect();
    let aim = |ino: &mut Ino, among: &[Ino]| {
        if ino.0 < 24 {
            *ino = among[ino.0 as usize % among.len()];
        }
    };
    match &mut operation {
        NameOp::Create { parent, .. } | NameOp::Unlink { parent, .. } | NameOp::Rmdir { parent, .. } => {
            aim(parent, &directories);
        }
        NameOp::Link { ino, parent, .. } => {
            aim(ino, &inodes);
            aim(parent, &directories);
        }
        NameOp::Rename { parent, new_parent, .. } => {
            aim(parent, &directories);
            aim(new_parent, &directories);
        }
        NameOp::SetAttributes { ino, .. }
        | NameOp::SetXattr { ino, .. }
        | NameOp::RemoveXattr { ino, .. }
        | NameOp::Open { ino } => aim(ino, &inodes),
        NameOp::Close { inos } => inos.iter_mut().for_each(|ino| aim(ino, &inodes)),
    }
    operation
}

/// Names and inodes fit together.
fn check(state: &State) -> Result<(), TestCaseError> {
    let root = state.volumes.values().next().expect("a volume").root;
    let mut names = std::collections::BTreeMap::<Ino, u32>::new();
    for (ino, inode) in &state.inodes {
        let Node::Directory(directory) = &inode.node else { continue };
        prop_assert_eq!(directory.entries.len(), directory.order.len());
        for (name, (child, cookie)) in &directory.entries {
            prop_assert!(!name.is_empty() && name.len() <= 255 && !name.contains(&b'/') && !name.contains(&0));
            prop_assert!(name != b"." && name != b"..");
            prop_assert_eq!(directory.order.get(cookie), Some(name));
            let child_inode = state.inodes.get(child);
            prop_assert!(child_inode.is_some(), "{:?} names {:?}, which is gone", ino, child);
            *names.entry(*child).or_default() += 1;
            if let Some(Node::Directory(below)) = child_inode.map(|i| &i.node) {
                prop_assert_eq!(below.parent, *ino);
            }
        }
        // No directory lies within itself.
        let (mut at, mut steps) = (*ino, 0);
        while at != root && inode.links > 0 {
            let Some(Node::Directory(above)) = state.inodes.get(&at).map(|i| &i.node) else { break };
            at = above.parent;
            steps += 1;
            prop_assert!(steps <= state.inodes.len(), "{:?} lies within itself", ino);
        }
    }
    for (ino, inode) in &state.inodes {
        let named = names.get(ino).copied().unwrap_or(0);
        let opens = state.sessions.values().filter(|s| s.open.contains(ino)).count();
        prop_assert_eq!(inode.opens as usize, opens, "{:?}", ino);
        match &inode.node {
            Node::Directory(directory) => {
                prop_assert!(named == 1 || *ino == root || opens > 0 && named == 0, "{:?} has {} names", ino, named);
                let below = directory.entries.values();
                let is_directory = |i: &Ino| matches!(state.inodes.get(i).map(|i| &i.node), Some(Node::Directory(_)));
                let subdirectories = below.filter(|(child, _)| is_directory(child)).count();
                if named == 1 || *ino == root {
                    prop_assert_eq!(inode.links as usize, 2 + subdirectories, "{:?}", ino);
                }
            }
            _ => {
                prop_assert_eq!(inode.links, named, "{:?}", ino);
                prop_assert!(named > 0 || opens > 0, "{:?} is left over", ino);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_changes_breaks_the_tree_of_names(
        changes in prop::collection::vec((any::<bool>(), name_op()), 1..60),
        end in any::<bool>(),
    ) {
        let (mut state, sessions, mut index) = volume();
        for (number, (which, operation)) in changes.into_iter().enumerate() {
            index += 1;
            let session = sessions[usize::from(which)];
            let operation = aimed(operation, &state);
            let command = Command::Name { session, operation };
            let entry = Entry { time_ns: index, request: Some((session, number as u64)), command };
            let (outcome, _) = state.apply(LogIndex(index), &entry);
            check(&state)?;
            // Asked again, it is not done again.
            let before = state.clone();
            prop_assert_eq!(&state.apply(LogIndex(index), &entry).0, &outcome);
            prop_assert_eq!(&before, &state);
        }
        if end {
            for session in sessions {
                index += 1;
                state.apply(LogIndex(index), &Entry { time_ns: index, request: None, command: Command::SessionEnd { session } });
                check(&state)?;
            }
        }
        // What a snapshot holds is the state.
        let again: State = wire::decode(&wire::encode(&state)).expect("what was encoded decodes");
        prop_assert!(again == state);
    }

    #[test]
    fn a_frame_of_anything_takes_no_more_memory_than_the_limits(
        mut bytes in prop::collection::vec(any::<u8>(), 0..3000),
        lengths in any::<Option<(u32, u32)>>(),
        step in 1_usize..4000,
    ) {
        if let Some((header, payload)) = lengths {
            let header = (header % (2 * MAX_HEADER_BYTES as u32)).to_le_bytes();
            let payload = (payload % (2 * MAX_PAYLOAD_BYTES as u32)).to_le_bytes();
            let prefix = [mortar_proto::frame::MAGIC, header, payload].concat();
            bytes.splice(0..0, prefix);
        }
        let most = peak(|| {
            let mut reader = FrameReader::new(Drip(&bytes, step));
            while let Ok(Some(frame)) = reader.receive() {
                let _ = data::Request::decode(frame.header);
            }
        });
        prop_assert!(most <= MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES + (1 << 20), "{} bytes", most);
    }

    #[test]
    fn no_bytes_upset_a_decoder(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        decode_all(&bytes)?;
    }

    #[test]
    fn no_change_to_a_message_upsets_a_decoder(
        operation in name_op(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let session = SessionId(3);
        let request = data::Request {
            id: 7,
            ino: 9,
            stamp: Some(data::Stamp { n: 4, epoch: 2, seq: 8, stable: 7, settled: true }),
            what: Some(data::request::What::Pull(data::Pull { start: 4096, end: 8192, recovery: true, ..data::Pull::default() })),
        };
        let list = data::ListReply { files: vec![data::FileRegions { ino: 4, bounds: vec![1, 9, 12, 90_000] }; 20] };
        let response = data::Response { id: 7, outcome: Some(data::response::Outcome::List(list)) };
        let entry = Entry { time_ns: 5, request: Some((session, 1)), command: Command::Name { session, operation } };
        let (state, ..) = volume();
        for mut bytes in [request.encode_to_vec(), response.encode_to_vec(), wire::encode(&entry), wire::encode(&state)] {
            for (at, byte) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            decode_all(&bytes)?;
            // An entry that decodes is applied by every server.
            if let Ok(entry) = wire::decode::<Entry>(&bytes) {
                let (mut state, _, index) = volume();
                state.apply(LogIndex(index + 1), &entry);
            }
        }
    }
}

fn decode_all(bytes: &[u8]) -> Result<(), TestCaseError> {
    fn measure(bytes: &[u8], what: &str, times: usize, act: impl FnOnce()) -> Result<(), TestCaseError> {
        let most = peak(act);
        prop_assert!(most <= bytes.len() * times + (64 << 10), "{}: {} bytes for {}", what, most, bytes.len());
        Ok(())
    }
    // A request is what a stranger can send: it copies its bytes at most a few times. Lists of many empty messages take up
    // to 100 times their bytes.
    measure(bytes, "hello", 8, || drop(data::Hello::decode(bytes)))?;
    measure(bytes, "hello reply", 8, || drop(data::HelloReply::decode(bytes)))?;
    measure(bytes, "request", 8, || drop(data::Request::decode(bytes)))?;
    measure(bytes, "response", 100, || drop(data::Response::decode(bytes)))?;
    measure(bytes, "heartbeat", 500, || drop(peer::HeartbeatRequest::decode(bytes)))?;
    measure(bytes, "open", 8, || drop(session::OpenRequest::decode(bytes)))?;
    measure(bytes, "events", 100, || drop(session::Event::decode(bytes)))?;
    // postcard believes a length up to 1 MiB of elements before it has seen them.
    let cautious = 600;
    let measure = |what, act: &mut dyn FnMut()| {
        let most = peak(act);
        prop_assert!(most <= bytes.len() * cautious + (4 << 20), "{}: {} bytes for {}", what, most, bytes.len());
        Ok(())
    };
    measure("entry", &mut || drop(wire::decode::<Entry>(bytes)))?;
    measure("name", &mut || drop(wire::decode::<NameOp>(bytes)))?;
    measure("outcome", &mut || drop(wire::decode::<Outcome>(bytes)))?;
    measure("query", &mut || drop(wire::decode::<Query>(bytes)))?;
    measure("answer", &mut || drop(wire::decode::<Answer>(bytes)))?;
    measure("configuration", &mut || drop(wire::decode::<mortar_proto::config::Configuration>(bytes)))?;
    measure("state", &mut || drop(wire::decode::<State>(bytes)))
}
