//! What is corrupt on a disk `[R5]`: found, never copied, never made to look sound, given back by another brick, counted.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mortar_proto::SIZE_REGION;
use mortar_proto::config::{BrickState, Slot};
use mortar_proto::metadata::Command;
use mortar_proto::wire::cluster::{Corruption, ScrubAction, ScrubStatus};
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{Ino, checksum};

use super::world::{Holder, World, put_out, same_everywhere, take_back};

const IN_SYNC: [BrickState; 3] = [BrickState::InSync; 3];
const A: Slot = Slot(0);
const B: Slot = Slot(1);
const C: Slot = Slot(2);
const BLOCK: usize = 4096;

/// Changes a byte of a file behind everybody's back.
fn flip(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

/// Where the checksums of a file are.
fn sums(world: &World, slot: Slot, ino: Ino) -> PathBuf {
    world.dir.join(format!("b{}/.mortar/sums/{:02x}/{:x}", slot.0, ino.0 & 0xff, ino.0))
}

/// Somebody read blocks of this brick that did not verify.
fn report(holder: &mut Holder<'_>, slot: Slot, start: u64, end: u64) {
    let stamp = holder.stamp(0);
    let report = What::Report(data::Report { start, end, compare: false });
    assert_eq!(holder.ask(slot, stamp, &report, &[]), Outcome::Done(data::Done::default()));
}

/// What a brick says is to be repaired on itself: regions, and whether it has been given up.
fn lacks(world: &World, slot: Slot, ino: Ino) -> Option<(u64, bool, bool)> {
    let heal = world.bricks.heal(world.brick(slot)).unwrap();
    let own = heal.missed.iter().find(|m| m.slot == u32::from(slot.0)).unwrap();
    own.files.iter().find(|f| f.ino == ino.0).map(|f| (f.regions, f.size, f.given_up))
}

fn corruption(world: &World, slot: Slot) -> Corruption {
    world.bricks.heal(world.brick(slot)).unwrap().corruption.unwrap()
}

/// The number of blocks of a brick that do not verify when they are read.
fn corrupt_blocks(world: &World, slot: Slot, ino: Ino, blocks: u32) -> usize {
    let mut client = world.connect(slot, world.session());
    let read = What::Read(data::Read { offset: 0, length: blocks * BLOCK as u32 });
    match client.ask_until_ready(ino, data::Stamp::default(), &read, &[]) {
        (Outcome::Read(reply), bytes) => {
            let sums = reply.sums.chunks_exact(8).map(|s| u64::from_le_bytes(s.try_into().unwrap()));
            bytes.chunks(BLOCK).zip(sums).filter(|(block, sum)| !checksum::matches(block, *sum)).count()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flipped_byte_in_data_or_sums_is_given_back_by_another_brick_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[7; 3 * BLOCK]);
    holder.write(5 << 20, &[8; 100]);
    // Nothing is believed that the brick does not see itself.
    report(&mut holder, B, 0, 3 * BLOCK as u64);
    assert_eq!((lacks(&world, B, ino), corruption(&world, B)), (None, Corruption::default()));

    flip(&world.data(B, ino), BLOCK as u64 + 17);
    flip(&sums(&world, B, ino), 8 * 2);
    flip(&world.data(B, ino), (5 << 20) + 3);
    assert_eq!(corrupt_blocks(&world, B, ino, 3), 2);
    report(&mut holder, B, 0, 3 * BLOCK as u64);
    report(&mut holder, B, 5 << 20, (5 << 20) + BLOCK as u64);
    report(&mut holder, B, 0, 3 * BLOCK as u64);
    assert_eq!(lacks(&world, B, ino), Some((2, false, false)));
    assert_eq!(corruption(&world, B), Corruption { found: 3, repaired: 0, left: 3 });
    assert_eq!(holder.repair(B), [0, 5]);
    assert_eq!((lacks(&world, B, ino), corruption(&world, B)), (None, Corruption { found: 3, repaired: 3, left: 0 }));
    assert_eq!(corrupt_blocks(&world, B, ino, 3), 0);
    let content = same_everywhere(&world, ino);
    assert!(content[..3 * BLOCK].iter().all(|b| *b == 7) && content[5 << 20..].iter().all(|b| *b == 8));
    world.wait_for_states(IN_SYNC);

    let metrics = world.metrics();
    assert!(
        metrics.starts_with("HTTP/1.1 200 OK\r\ncontent-type: application/openmetrics-text; version=1.0.0"),
        "{metrics}"
    );
    let id = world.brick(B);
    let labels = format!("volume=\"v\",brick=\"{}\",id=\"{id}\"", world.dir.join("b1").display());
    for row in [
        format!("mortar_brick_corrupt_blocks_found_total{{{labels}}} 3"),
        format!("mortar_brick_corrupt_blocks_repaired_total{{{labels}}} 3"),
        format!("mortar_brick_corrupt_blocks{{{labels}}} 0"),
        format!("mortar_brick_up{{{labels}}} 1"),
        format!("mortar_brick_missed_regions{{{labels}}} 0"),
        format!("mortar_brick_state{{{labels},state=\"in-sync\"}} 1"),
        format!("mortar_brick_state{{{labels},state=\"out\"}} 0"),
        "mortar_log_leader 1".to_owned(),
    ] {
        assert!(metrics.lines().any(|line| line == row), "{row}, in:\n{metrics}");
    }
}

#[test]
fn what_is_corrupt_is_remembered_by_a_brick_that_is_killed_before_it_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[1; BLOCK]);
    settle(&mut holder);
    // It was written long ago, so nothing else makes C compare it.
    for slot in Slot::ALL {
        let brick = world.bricks.brick(world.brick(slot)).unwrap();
        super::world::wait_for("intents to be cleared", || brick.replica.lock().intents().is_empty().then_some(()));
    }
    flip(&world.data(C, ino), 9);
    report(&mut holder, C, 0, BLOCK as u64);
    drop(holder);
    world.propose(Command::SessionEnd { session });
    world.kill();
    let world = World::start(dir.path());
    world.wait_for_states([BrickState::InSync, BrickState::Syncing, BrickState::Syncing]);
    let mut holder = Holder::new(&world, ino, world.session());
    holder.repair(B);
    assert!(holder.repair(C).contains(&0));
    drop(holder);
    world.wait_for_states(IN_SYNC);
    assert_eq!(same_everywhere(&world, ino), [1; BLOCK]);
}

#[test]
fn a_file_that_was_cut_off_serves_nothing_until_it_is_whole_again() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; 2 * BLOCK]);
    holder.write(3 << 20, &[2; 100]);
    std::fs::OpenOptions::new().write(true).open(world.data(B, ino)).unwrap().set_len(5).unwrap();
    let mut client = world.connect(B, world.session());
    let read = What::Read(data::Read { offset: 0, length: BLOCK as u32 });
    let (answer, _) = client.ask_until_ready(ino, data::Stamp::default(), &read, &[]);
    assert!(matches!(&answer, Outcome::Failed(f) if !f.brick), "{answer:?}");
    for what in [What::Stat(data::Stat {}), What::Seek(data::Seek { offset: 0, hole: false })] {
        assert_eq!(client.ask(ino, data::Stamp::default(), what, &[]).0, Outcome::Behind(data::Behind {}));
    }
    super::world::wait_for("the brick to notice", || lacks(&world, B, ino));
    assert_eq!(lacks(&world, B, ino), Some((2, true, false)));
    assert_eq!(holder.repair(B), [0, 3, SIZE_REGION]);
    assert_eq!(same_everywhere(&world, ino).len(), (3 << 20) + 100);
    assert_eq!(client.read(ino, 0, BLOCK as u32), [1; BLOCK]);
    assert_eq!(lacks(&world, B, ino), None);
}

#[test]
fn an_object_that_was_deleted_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[6; 2 * BLOCK]);
    settle(&mut holder);
    drop(holder);
    world.propose(Command::SessionEnd { session });
    // Stopped cleanly, so that nothing of it is compared after the start.
    world.stop();
    let path = |root: &Path| root.join(format!("b1/.mortar/objects/{:02x}/{:x}", ino.0 & 0xff, ino.0));
    std::fs::remove_file(path(dir.path())).unwrap();
    // Its name is the same file, and would become the object again.
    std::fs::remove_file(dir.path().join("b1/disk")).unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let mut client = world.connect(B, world.session());
    let read = What::Read(data::Read { offset: 0, length: BLOCK as u32 });
    let (answer, _) = client.ask_until_ready(ino, data::Stamp::default(), &read, &[]);
    assert!(matches!(&answer, Outcome::Failed(f) if !f.brick), "an empty file instead of an error: {answer:?}");
    super::world::wait_for("the brick to notice", || lacks(&world, B, ino));
    let mut holder = Holder::new(&world, ino, world.session());
    holder.repair(B);
    assert_eq!(same_everywhere(&world, ino), [6; 2 * BLOCK]);
}

#[test]
fn what_is_corrupt_at_the_source_is_taken_from_another_brick_and_told_to_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; 4 * BLOCK]);
    put_out(&world, C);
    holder.write(0, &[2; 2 * BLOCK]);
    // Block 0 has other data than its sum says; block 1 calls itself a hole; block 3 has a sum that C's good block lacks.
    flip(&world.data(A, ino), 100);
    let file = std::fs::OpenOptions::new().write(true).open(sums(&world, A, ino)).unwrap();
    file.write_all_at(&[0; 8], 8).unwrap();
    flip(&sums(&world, A, ino), 8 * 3 + 1);
    take_back(&world, C);
    assert!(holder.repair(C).contains(&0));
    world.wait_for_states(IN_SYNC);
    let right = [[2; 2 * BLOCK], [1; 2 * BLOCK]].concat();
    assert!(std::fs::read(world.data(C, ino)).unwrap() == right, "C has what was corrupt on A");
    assert_eq!(corrupt_blocks(&world, C, ino, 4), 0);
    // And A knows.
    assert_eq!(lacks(&world, A, ino), Some((1, false, false)));
    assert_eq!(holder.repair(A), [0]);
    assert!(same_everywhere(&world, ino) == right);
    assert_eq!(corruption(&world, A), Corruption { found: 3, repaired: 3, left: 0 });
}

#[test]
fn what_no_brick_has_is_never_answered_with_old_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; 2 * BLOCK]);
    put_out(&world, C);
    holder.write(0, &[2; 2 * BLOCK]);
    flip(&world.data(A, ino), 100);
    flip(&world.data(B, ino), 200);
    take_back(&world, C);
    assert!(holder.repair(C).contains(&0));
    world.wait_for_states(IN_SYNC);
    // C's own block 0 is old, and says so; block 1 came over.
    assert_eq!(corrupt_blocks(&world, C, ino, 2), 1);
    for slot in Slot::ALL {
        holder.repair(slot);
        assert_eq!(lacks(&world, slot, ino), Some((1, false, true)), "given up, and still told of");
        assert_eq!(corruption(&world, slot).left, 1);
    }
    // Written over, it is sound everywhere; what was given up is looked at again.
    holder.write(0, &[3; BLOCK]);
    for slot in Slot::ALL {
        world.bricks.brick(world.brick(slot)).unwrap().try_damage_again();
        assert_eq!((lacks(&world, slot, ino), corruption(&world, slot).left), (None, 0), "{slot:?}");
    }
    assert!(same_everywhere(&world, ino) == [[3; BLOCK], [2; BLOCK]].concat());
}

#[test]
fn a_change_of_a_part_of_a_corrupt_block_does_not_make_it_look_sound() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; 4 * BLOCK]);
    for block in 0..4 {
        flip(&world.data(B, ino), block * BLOCK as u64 + 4000);
    }
    holder.write(0, &[5; 512]);
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    let offset = BLOCK as u64 + 100;
    holder.mutate(&What::Allocate(data::Allocate { offset, length: BLOCK as u64, mode: punch }), &[]);
    holder.mutate(&What::Truncate(data::Truncate { size: 4 * BLOCK as u64 - 10 }), &[]);
    assert_eq!(corrupt_blocks(&world, B, ino, 4), 4);
    // The brick has noticed by itself.
    super::world::wait_for("the brick to notice", || lacks(&world, B, ino));
    assert_eq!(holder.repair(B), [0]);
    assert_eq!(corrupt_blocks(&world, B, ino, 4), 0);
    let content = same_everywhere(&world, ino);
    assert!(content[..512] == [5; 512] && content[512..BLOCK + 100].iter().all(|b| *b == 1));
    assert!(content[2 * BLOCK + 100..].iter().all(|b| *b == 1));
}

#[test]
fn a_copy_of_what_is_in_doubt_is_refused_when_it_is_corrupt_at_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; BLOCK]);
    holder.seq += 1;
    let write = What::Write(data::Write { offset: 0, sums: Default::default() });
    let stamp = holder.stamp(holder.seq);
    assert!(matches!(holder.ask(A, stamp, &write, &[9; BLOCK]), Outcome::Done(_)));
    flip(&world.data(A, ino), 1);
    holder.seq += 1;
    let copy = data::Pull { end: BLOCK as u64, recovery: true, doubt_epoch: 1, doubt_seq: 2, ..Default::default() };
    let stamp = holder.stamp(holder.seq);
    let answer = holder.ask(C, stamp, &What::Pull(copy), &[]);
    assert!(matches!(&answer, Outcome::Failed(f) if f.errno == libc::EBADMSG as u32 && !f.brick), "{answer:?}");
    assert_eq!(std::fs::read(world.data(C, ino)).unwrap(), [1; BLOCK]);
    assert_eq!(lacks(&world, A, ino), Some((1, false, false)), "the source knows");
}

fn scrub(world: &World, slot: Slot, action: ScrubAction) -> ScrubStatus {
    world.bricks.scrub(world.brick(slot), action).unwrap()
}

/// Scrubs a brick from one end to the other.
fn scrubbed(world: &World, slot: Slot) -> ScrubStatus {
    scrub(world, slot, ScrubAction::Start);
    super::world::wait_for("the end of a scrub", || {
        Some(scrub(world, slot, ScrubAction::Status)).filter(|status| !status.running)
    })
}

/// Tells all bricks that everything so far is stable.
fn settle(holder: &mut Holder<'_>) {
    let stable = data::Stamp { stable: holder.seq, ..holder.stamp(0) };
    for slot in Slot::ALL {
        assert!(matches!(holder.ask(slot, stable, &What::Settle(data::Settle {}), &[]), Outcome::Done(_)));
    }
}

#[test]
fn a_scrub_finds_what_nobody_reads_and_nothing_where_all_is_well() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let session = world.session();
    let (ino, other) = (world.create(session, "disk"), world.create(session, "other"));
    let mut holder = Holder::new(&world, ino, session);
    holder.write(0, &[7; 3 * BLOCK]);
    holder.write(70 << 20, &[8; 100]);
    settle(&mut holder);
    let mut second = Holder::new(&world, other, session);
    second.write(2 << 20, &[9; 100]);
    let status = scrubbed(&world, B);
    assert_eq!((status.found, status.undecided, lacks(&world, B, ino)), (0, 0, None));
    assert_eq!((status.looked_bytes, status.total_bytes), (5 * BLOCK as u64, 5 * BLOCK as u64), "holes do not count");
    assert!(status.ended_s > 0, "{status:?}");

    flip(&world.data(B, ino), (70 << 20) + 5);
    flip(&sums(&world, B, other), 8 * 512);
    let status = scrubbed(&world, B);
    assert_eq!(status.found, 2, "{status:?}");
    assert_eq!((lacks(&world, B, ino), lacks(&world, B, other)), (Some((1, false, false)), Some((1, false, false))));
    assert_eq!(holder.repair(B), [70]);
    assert_eq!(second.repair(B), [2]);
    assert_eq!(corruption(&world, B), Corruption { found: 2, repaired: 2, left: 0 });
    same_everywhere(&world, ino);
    assert_eq!(scrubbed(&world, B).found, 0);
}

#[test]
fn a_brick_that_differs_from_two_that_agree_is_repaired_whichever_brick_is_scrubbed() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; 4 * BLOCK]);
    settle(&mut holder);
    // Everything matches its checksums, and yet B has something else: writes that the disk lost, or put elsewhere.
    let brick = world.bricks.brick(world.brick(B)).unwrap();
    for scrubs in [B, A] {
        brick.objects.write(ino, BLOCK as u64, &[2; BLOCK], &[]).unwrap();
        brick.objects.put(ino, mortar_proto::ByteRange::at(2 * BLOCK as u64, BLOCK as u64), None).unwrap();
        scrubbed(&world, scrubs);
        super::world::wait_for("the brick to know", || lacks(&world, B, ino));
        assert_eq!(holder.repair(B), [0], "scrubbed {scrubs:?}");
        assert_eq!(same_everywhere(&world, ino), [1; 4 * BLOCK]);
        assert_eq!((lacks(&world, A, ino), lacks(&world, C, ino)), (None, None));
    }
    assert_eq!(corruption(&world, B), Corruption { found: 4, repaired: 4, left: 0 });
    // The size.
    for size in [BLOCK as u64 + 5, 5 * BLOCK as u64] {
        brick.objects.truncate(ino, size).unwrap();
        scrubbed(&world, B);
        super::world::wait_for("the brick to know", || lacks(&world, B, ino).filter(|(_, size, _)| *size));
        let stat = world.connect(B, world.session()).ask(ino, data::Stamp::default(), What::Stat(data::Stat {}), &[]).0;
        assert_eq!(stat, Outcome::Behind(data::Behind {}), "it tells a wrong size");
        assert_eq!(holder.repair(B), [0, SIZE_REGION]);
        assert_eq!(same_everywhere(&world, ino), [1; 4 * BLOCK]);
    }
}

#[test]
fn where_two_bricks_differ_and_there_is_no_third_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; 4 * BLOCK]);
    settle(&mut holder);
    put_out(&world, C);
    let brick = world.bricks.brick(world.brick(B)).unwrap();
    brick.objects.write(ino, BLOCK as u64, &[2; BLOCK], &[]).unwrap();
    for slot in [A, B] {
        let status = scrubbed(&world, slot);
        assert_eq!((status.found, status.undecided), (0, 1), "{slot:?}");
        assert_eq!(lacks(&world, slot, ino), None);
    }
    assert_eq!(std::fs::read(world.data(B, ino)).unwrap()[BLOCK..2 * BLOCK], [2; BLOCK]);
}

#[test]
fn what_is_in_doubt_is_no_difference() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let ino = world.create(world.session(), "disk");
    let mut holder = Holder::new(&world, ino, world.session());
    holder.write(0, &[1; BLOCK]);
    settle(&mut holder);
    // It has reached one brick, and is on its way to the others.
    holder.seq += 1;
    let write = What::Write(data::Write { offset: 0, sums: Default::default() });
    let stamp = holder.stamp(holder.seq);
    assert!(matches!(holder.ask(A, stamp, &write, &[9; BLOCK]), Outcome::Done(_)));
    for slot in [A, B] {
        let status = scrubbed(&world, slot);
        assert_eq!((status.found, status.undecided), (0, 0), "{slot:?}");
    }
    assert!(Slot::ALL.iter().all(|slot| lacks(&world, *slot, ino).is_none()));
}

#[test]
fn a_scrub_keeps_its_rate_is_stopped_and_goes_on_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path());
    world.wait_for_states(IN_SYNC);
    let rate = |world: &World, rate: &str| {
        let (key, value) = ("scrub.rate".to_owned(), Some(rate.to_owned()));
        world.propose(Command::VolumeSet { name: "v".into(), key, value });
    };
    rate(&world, "4M");
    let session = world.session();
    let ino = world.create(session, "disk");
    let mut holder = Holder::new(&world, ino, session);
    for region in 0..4 {
        holder.write(region << 20, &[7; 1 << 20]);
    }
    settle(&mut holder);
    drop(holder);
    world.propose(Command::SessionEnd { session });
    let began = std::time::Instant::now();
    scrub(&world, B, ScrubAction::Start);
    let looked = |world: &World, least: u64| {
        super::world::wait_for("a region", || {
            Some(scrub(world, B, ScrubAction::Status)).filter(|s| s.looked_bytes >= least)
        })
    };
    looked(&world, 2 << 20);
    // The second region came no sooner than the rate allows after the first.
    assert!(began.elapsed() >= std::time::Duration::from_millis(250), "{:?}", began.elapsed());
    let stopped = scrub(&world, B, ScrubAction::Stop);
    assert!(stopped.stopped && !stopped.running && stopped.looked_bytes < 4 << 20, "{stopped:?}");
    world.kill();
    let world = World::start(dir.path());
    super::world::wait_for("the brick", || world.bricks.brick(world.brick(B)));
    let status = scrub(&world, B, ScrubAction::Status);
    assert_eq!((status.stopped, status.looked_bytes), (true, stopped.looked_bytes));
    rate(&world, "0");
    let status = scrubbed(&world, B);
    assert_eq!((status.looked_bytes, status.total_bytes), (4 << 20, stopped.total_bytes), "{status:?}");
}
