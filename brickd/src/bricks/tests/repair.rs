//! Bricks that go out, come back, stop and start.

use mortar_proto::SIZE_REGION;
use mortar_proto::config::{BrickState, Slot};
use mortar_proto::metadata::Command;
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use std::sync::atomic::Ordering;

use super::world::{Holder, ONE_SYNCING, World, put_out, same_everywhere, take_back};

const IN_SYNC: [BrickState; 3] = [BrickState::InSync; 3];
const C: Slot = Slot(2);

#[test]
fn a_brick_that_was_out_gets_back_exactly_what_it_missed() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[1; 100_000]);
    holder.write(20 << 20, &[2; 1 << 20]);
    // Long enough ago that nothing of it needs to be compared.
    holder.mutate(&What::SetTime(data::SetTime { mtime_ns: 1 }), &[]);
    put_out(&world, C);
    holder.write(40 << 20, &[3; 70_000]);
    holder.write(20 << 20, &[4; 5000]);
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    holder.mutate(&What::Allocate(data::Allocate { offset: 0, length: 65_536, mode: punch }), &[]);
    let missed = world.bricks.heal(world.brick(Slot(0))).unwrap();
    let of_c = missed.missed.iter().find(|m| m.slot == 2).unwrap();
    assert_eq!((of_c.files[0].ino, of_c.files[0].regions, of_c.files[0].size), (ino.0, 3, true));
    take_back(&world, C);
    let repaired = holder.repair(C);
    assert!([0, 20, 40, SIZE_REGION].iter().all(|r| repaired.contains(r)), "{repaired:?}");
    world.wait_for_states(IN_SYNC);
    let content = same_everywhere(&world, ino);
    assert_eq!(content.len(), (40 << 20) + 70_000);
    assert!(content[..65_536].iter().all(|b| *b == 0) && content[65_536..100_000].iter().all(|b| *b == 1));
    // Holes stayed holes.
    let blocks = |slot| std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(world.data(slot, ino)).unwrap());
    assert!(blocks(C) * 512 < 4 << 20, "{} blocks", blocks(C));
    let mut client = world.connect(C, session);
    assert_eq!(client.read(ino, 20 << 20, 4096), [4; 4096]);
}

#[test]
fn a_file_that_shrank_and_grew_while_a_brick_was_out_has_no_old_bytes_there() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[1; 1 << 20]);
    holder.write(1 << 20, &[1; 1 << 20]);
    put_out(&world, C);
    holder.mutate(&What::Truncate(data::Truncate { size: 1000 }), &[]);
    holder.mutate(&What::Truncate(data::Truncate { size: 3 << 20 }), &[]);
    take_back(&world, C);
    holder.repair(C);
    world.wait_for_states(IN_SYNC);
    let content = same_everywhere(&world, ino);
    assert_eq!(content.len(), 3 << 20);
    assert!(content[1000..].iter().all(|b| *b == 0));
}

#[test]
fn the_copy_of_what_is_in_doubt_stays_in_doubt_under_the_numbers_it_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    let stamp = holder.stamp(1);
    let write = What::Write(data::Write { offset: 0, sums: Default::default() });
    assert!(matches!(holder.ask(Slot(0), stamp, &write, &[9; 4096]), Outcome::Done(_)));
    let size =
        data::Pull { size: true, recovery: true, doubt_epoch: 1, doubt_seq: 1, sized: true, ..Default::default() };
    let range = data::Pull { end: 4096, recovery: true, doubt_epoch: 1, doubt_seq: 1, ..Default::default() };
    holder.seq = 1;
    for slot in [Slot(1), C] {
        for pull in [size, range] {
            holder.seq += 1;
            let stamp = holder.stamp(holder.seq);
            assert!(matches!(holder.ask(slot, stamp, &What::Pull(pull), &[]), Outcome::Done(_)));
        }
        match holder.ask(slot, holder.stamp(0), &What::Fence(data::Fence {}), &[]) {
            Outcome::Fence(reply) => {
                assert_eq!(reply.size, 4096);
                assert!(reply.in_doubt.iter().all(|d| (d.epoch, d.seq) == (1, 1)), "{:?}", reply.in_doubt);
                assert!(reply.in_doubt.iter().any(|d| (d.start, d.end) == (0, 4096)));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(same_everywhere(&world, ino), [9; 4096]);
}

#[test]
fn after_a_kill_all_that_was_acknowledged_is_there_and_bricks_become_in_sync_again() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let (ino, gone) = (world.create(session, "disk"), world.create(session, "gone"));
    let mut holder = Holder::new(&world, ino, session);
    holder.write(100 << 20, &[5; 10_000]);
    Holder::new(&world, gone, session).write(0, b"soon forgotten");
    put_out(&world, C);
    holder.write(7 << 20, &[6; 10_000]);
    let lost = world.data(Slot(0), gone);
    assert!(lost.exists());
    world.unlink(session, "gone");
    world.propose(Command::SessionEnd { session });
    world.kill();

    let world = World::start(dir.path());
    // [E6] All have restarted: one is taken as source, the others are repaired.
    world.wait_for_states([BrickState::InSync, BrickState::Syncing, BrickState::Syncing]);
    assert!(!lost.exists());
    let session = world.session();
    let mut holder = Holder::new(&world, ino, session);
    // One after the other: a brick that is in sync again still knows what it saw another miss before.
    holder.repair(Slot(1));
    world.wait_for_states(ONE_SYNCING);
    holder.repair(C);
    drop(holder);
    world.wait_for_states(IN_SYNC);
    let content = same_everywhere(&world, ino);
    assert_eq!(content.len(), (100 << 20) + 10_000);
    assert!(content[7 << 20..(7 << 20) + 10_000].iter().all(|b| *b == 6));
}

#[test]
fn a_start_goes_through_the_log_again_and_forgets_nothing_by_that() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[1; 4096]);
    put_out(&world, C);
    holder.write(33 << 20, &[2; 4096]);
    world.leads.store(false, Ordering::Release);
    world.kill();
    // Old configurations, in which C was InSync, come by again before the starts are registered.
    let world = World::start(dir.path());
    world.leads.store(false, Ordering::Release);
    let brick = loop {
        if let Some(brick) = world.bricks.brick(world.brick(Slot(0))) {
            break brick;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    let missed = brick.replica.lock().missed(C);
    assert!(missed.iter().any(|(i, regions)| *i == ino && regions.contains(33)), "{missed:?}");
    assert!(world.data(Slot(0), ino).exists());
    drop(brick);
}

#[test]
fn after_a_clean_stop_nothing_has_to_be_compared() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[1; 4096]);
    // [W6] Told that all is stable, the bricks have nothing in doubt.
    let settle = data::Stamp { stable: 1, ..holder.stamp(0) };
    for slot in Slot::ALL {
        assert!(matches!(holder.ask(slot, settle, &What::Settle(data::Settle {}), &[]), Outcome::Done(_)));
    }
    drop(holder);
    world.stop();
    let world = World::start(dir.path());
    // Nobody repairs anything here.
    world.wait_for_states(IN_SYNC);
    assert_eq!(same_everywhere(&world, ino), [1; 4096]);
    let beats = world.bricks.beats();
    assert!(beats.iter().all(|b| b.clean), "{beats:?}");
}
