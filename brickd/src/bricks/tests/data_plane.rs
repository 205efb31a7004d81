//! Requests and answers.

use std::io::Write as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mortar_proto::checksum;
use mortar_proto::config::{BrickState, Slot};
use mortar_proto::frame;
use mortar_proto::wire::data::{self, request::What, response::Outcome};

use super::world::{Holder, World, wait_for};

const IN_SYNC: [BrickState; 3] = [BrickState::InSync; 3];
const A: Slot = Slot(0);

fn done() -> Outcome {
    Outcome::Done(data::Done::default())
}
fn write(offset: u64) -> What {
    What::Write(data::Write { offset, sums: Default::default() })
}
fn errno(outcome: &Outcome) -> i32 {
    match outcome {
        Outcome::Failed(f) => f.errno as i32,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_hello_of_another_version_cluster_or_brick_is_refused_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let good = world.hello(A, session);
    let wrong = [
        (data::Hello { version: 77, ..good.clone() }, "version"),
        (data::Hello { cluster: vec![1; 16].into(), ..good.clone() }, "another cluster"),
        (data::Hello { brick: 4711, ..good.clone() }, "not open on this server"),
    ];
    for (hello, why) in wrong {
        let refused = world.try_connect(&hello).err().unwrap().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    assert!(world.try_connect(&good).is_ok());
}

#[test]
fn what_was_written_is_read_and_sending_again_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    match holder.ask(A, holder.stamp(0), &What::Fence(data::Fence {}), &[]) {
        Outcome::Fence(reply) => assert!(reply.in_doubt.is_empty() && reply.size == 0),
        other => panic!("{other:?}"),
    }
    let blocks: Vec<u8> = (0..16_384_u32).map(|i| (i / 256) as u8 + 1).collect();
    let sums: Vec<u8> = blocks.chunks(4096).flat_map(|b| checksum::of_block(b).to_le_bytes()).collect();
    holder.mutate(&What::Write(data::Write { offset: 4096, sums: sums.into() }), &blocks);
    holder.write(5000, b"unaligned");
    let mut expected = vec![0; 4096 + 16_384];
    expected[4096..].copy_from_slice(&blocks);
    expected[5000..5009].copy_from_slice(b"unaligned");
    let mut client = world.connect(A, world.session());
    assert_eq!(client.read(ino, 0, 1 << 20), expected);
    assert_eq!(client.read(ino, 4096, 4096), expected[4096..8192]);
    assert_eq!(client.read(ino, 1 << 40, 4096), b"");
    // [F3] The same number again is not applied again, whatever it carries.
    let again = holder.stamp(2);
    assert_eq!(holder.ask(A, again, &write(5000), b"different"), done());
    assert_eq!(client.read(ino, 0, 1 << 20), expected);
    match holder.ask(A, holder.stamp(0), &What::Fence(data::Fence {}), &[]) {
        Outcome::Fence(reply) => {
            let in_doubt: Vec<_> = reply.in_doubt.iter().map(|d| (d.seq, d.start, d.end, d.sized)).collect();
            assert_eq!(in_doubt, [(1, 4096, 20_480, false), (1, 0, 0, true), (2, 5000, 5009, false)]);
            assert_eq!(reply.size, 20_480);
        }
        other => panic!("{other:?}"),
    }
    for slot in Slot::ALL {
        assert_eq!(holder.ask(slot, holder.stamp(0), &What::Flush(data::Flush {}), &[]), done());
        assert_eq!(std::fs::read(world.data(slot, ino)).unwrap(), expected);
    }
    holder.mutate(&What::SetTime(data::SetTime { mtime_ns: 1_500_000_000_123_456_789 }), &[]);
    holder.mutate(&What::Truncate(data::Truncate { size: 4100 }), &[]);
    match holder.ask(A, data::Stamp::default(), &What::Stat(data::Stat {}), &[]) {
        Outcome::Stat(stat) => assert_eq!(stat.size, 4100),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.read(ino, 0, 8192), expected[..4100]);
    let seek = |offset, hole| What::Seek(data::Seek { offset, hole });
    assert_eq!(
        holder.ask(A, data::Stamp::default(), &seek(0, false), &[]),
        Outcome::Seek(data::SeekReply { offset: 4096, end: false })
    );
    assert!(matches!(holder.ask(A, data::Stamp::default(), &seek(u64::MAX, false), &[]), Outcome::Seek(s) if s.end));
    // The image is there for whoever has nothing but XFS.
    assert_eq!(std::fs::read(dir.path().join("b1/disk")).unwrap(), expected[..4100]);
}

#[test]
fn old_numbers_and_other_sessions_are_stale_and_newer_numbers_behind() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let (session, other) = (world.session(), world.session());
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, b"first");
    let now = holder.stamp(2);
    let mut client = world.connect(A, session);
    let stale = Outcome::Stale(data::Stale { n: now.n, epoch: now.epoch });
    assert_eq!(client.ask(ino, data::Stamp { n: now.n - 1, ..now }, write(0), b"x").0, stale);
    assert_eq!(client.ask(ino, data::Stamp { epoch: now.epoch - 1, ..now }, write(0), b"x").0, stale);
    assert_eq!(world.connect(A, other).ask(ino, now, write(0), b"x").0, stale);
    let behind = Outcome::Behind(data::Behind {});
    assert_eq!(client.ask(ino, data::Stamp { n: now.n + 1, ..now }, write(0), b"x").0, behind);
    assert_eq!(client.ask(ino, data::Stamp { epoch: now.epoch + 1, ..now }, write(0), b"x").0, behind);
    assert_eq!(client.ask(ino, now, write(0), b"x").0, done());
}

#[test]
fn a_brick_without_a_lease_reads_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    Holder::new(&world, ino, session).write(0, b"data");
    let mut client = world.connect(A, session);
    assert_eq!(client.read(ino, 0, 4096), b"data");
    world.answers.store(false, Ordering::Release);
    std::thread::sleep(Duration::from_millis(1200));
    for what in [
        What::Read(data::Read { offset: 0, length: 4096 }),
        What::Stat(data::Stat {}),
        What::Seek(data::Seek { offset: 0, hole: false }),
    ] {
        assert_eq!(client.ask(ino, data::Stamp::default(), what, &[]).0, Outcome::Behind(data::Behind {}));
    }
    world.answers.store(true, Ordering::Release);
    assert_eq!(client.read(ino, 0, 4096), b"data");
}

#[test]
fn nonsense_is_refused_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    let stamp = holder.stamp(1);
    let mut client = world.connect(A, session);
    let mut refused = |what, payload: &[u8]| errno(&client.ask(ino, stamp, what, payload).0);
    assert_eq!(refused(write(0), &[]), libc::EINVAL);
    assert_eq!(refused(write(u64::MAX - 2), b"12345"), libc::EFBIG);
    assert_eq!(refused(What::Write(data::Write { offset: 0, sums: vec![0; 5].into() }), &[7; 4096]), libc::EINVAL);
    assert_eq!(refused(What::Truncate(data::Truncate { size: u64::MAX }), &[]), libc::EFBIG);
    assert_eq!(refused(What::Allocate(data::Allocate { offset: 0, length: 1, mode: 0x40 }), &[]), libc::EOPNOTSUPP);
    assert_eq!(refused(What::Allocate(data::Allocate { offset: 0, length: 0, mode: 0 }), &[]), libc::EINVAL);
    assert_eq!(refused(What::Read(data::Read { offset: 1, length: (1 << 20) + 8192 }), &[]), libc::EINVAL);
    assert_eq!(refused(What::Read(data::Read { offset: 0, length: u32::MAX }), &[]), libc::EINVAL);
    assert_eq!(refused(What::Pull(data::Pull { end: u64::MAX, ..Default::default() }), &[]), libc::EINVAL);
    assert_eq!(refused(What::Pull(data::Pull { from: 9, ..Default::default() }), &[]), libc::EINVAL);
    assert_eq!(refused(What::Note(data::Note { start: 0, end: u64::MAX, sized: true }), &[]), libc::EINVAL);
    assert_eq!(refused(What::ClearMissed(data::ClearMissed { slot: 1, region: u64::MAX }), &[]), libc::EINVAL);
    assert_eq!(refused(What::RepairList(data::RepairList { slot: 3 }), &[]), libc::EINVAL);
    assert_eq!(refused(What::Sums(data::Sums { start: 0, end: 4096 }), &[]), libc::EPERM);
    assert_eq!(refused(What::IntentList(data::IntentList {}), &[]), libc::EPERM);
    // What is no frame, or no request, ends its own connection only.
    let garbage: [Vec<u8>; 3] = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        [frame::MAGIC.as_slice(), &[0xff; 8]].concat(),
        [frame::MAGIC.as_slice(), &[3, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff]].concat(),
    ];
    for bytes in garbage {
        let mut bad = world.connect(A, world.session());
        (&*bad.socket).write_all(&bytes).unwrap();
        assert!(bad.receive().is_none());
    }
    assert_eq!(client.ask(ino, stamp, write(0), b"still here").0, done());
    assert!(world.bricks.beats().iter().all(|b| b.failed.is_empty()));
    holder.seq = 1;
    holder.write(0, b"still here");
}

#[test]
fn a_new_connection_of_a_session_ends_the_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let holder = Holder::new(&world, ino, session);
    let mut older = world.connect(A, session);
    let mut stranger = world.connect(A, world.session());
    let mut newer = world.connect(A, session);
    assert!(older.receive().is_none());
    assert_eq!(newer.ask(ino, holder.stamp(1), write(0), b"x").0, done());
    assert_eq!(stranger.read(ino, 0, 4096), b"x");
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let holder = Holder::new(&world, ino, session);
    let mut client = world.connect(A, session);
    // In other intent extents each, so that workers have to do it.
    for seq in 1..=400 {
        client.send(ino, holder.stamp(seq), write((seq % 50) << 24), &[seq as u8; 512]);
    }
    let mut answered: Vec<u64> = (0..400)
        .map(|_| {
            let (id, outcome, _) = client.receive().unwrap();
            assert_eq!(outcome, done());
            id
        })
        .collect();
    answered.sort_unstable();
    assert!(answered.into_iter().eq(1..=400));
}

#[test]
fn a_client_that_does_not_take_its_answers_stops_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[7; 1 << 20]);
    let mut deaf = world.connect(A, world.session());
    deaf.socket.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    for id in 0..2000 {
        let read = Some(What::Read(data::Read { offset: 0, length: 1 << 20 }));
        let request = data::Request { id, ino: ino.0, stamp: None, what: read };
        if (&*deaf.socket).write_all(&frame::encode(&request, 0)).is_err() {
            break;
        }
    }
    let began = std::time::Instant::now();
    for offset in 0..50 {
        holder.write(offset << 24, b"others go on");
    }
    assert_eq!(world.connect(A, session).read(ino, 0, 4096)[..12], *b"others go on");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(deaf.receive().is_some());
}

#[test]
fn a_sparse_file_of_any_size_is_grown_and_cut_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    let began = std::time::Instant::now();
    holder.write(5 << 20, b"data");
    holder.mutate(&What::Truncate(data::Truncate { size: 4 << 40 }), &[]);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    holder.mutate(&What::Allocate(data::Allocate { offset: 6 << 20, length: 2 << 40, mode: punch as u32 }), &[]);
    holder.mutate(&What::Truncate(data::Truncate { size: 0 }), &[]);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    match holder.ask(A, holder.stamp(0), &What::Fence(data::Fence {}), &[]) {
        Outcome::Fence(reply) => {
            let in_doubt: Vec<_> = reply.in_doubt.iter().map(|d| (d.start, d.end, d.sized)).collect();
            let first = (0, 1, false);
            let size = (0, 0, true);
            let data = |end: u64| (5_u64 << 20, (5_u64 << 20) + end, false);
            assert_eq!(in_doubt, [data(4), size, first, size, first, data(4096), size]);
        }
        other => panic!("{other:?}"),
    }
    let intents = world.bricks.brick(world.brick(A)).unwrap().replica.lock().intents();
    assert_eq!(intents, [(ino, vec![0])]);
}

#[test]
fn who_still_asks_for_a_file_that_was_deleted_is_told_so_instead_of_being_kept_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "gone");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[7; 4096]);
    let (fence, numbers) = (What::Fence(data::Fence {}), holder.stamp(0));
    assert!(matches!(holder.ask(A, numbers, &fence, &[]), Outcome::Fence(_)));
    world.unlink(session, "gone");
    wait_for("its data is gone", || (!world.data(A, ino).exists()).then_some(()));
    assert_eq!(errno(&holder.ask(A, numbers, &fence, &[])), libc::EIDRM);
}
