//! What a power cut can leave of a brick. The real log, bricks, sockets and RocksDB work on a real XFS; below it is a disk that
//! remembers every sector written and every flush, so that every disk that the power cut could leave can be made: all that was
//! flushed, and any part of what was not. Each is mounted, so that XFS recovers its log, opened, and held against the promises.
//!
//! | file | owns |
//! | --- | --- |
//! | `disk` | the disk that remembers |
//! | `mounted` | XFS on it, in a mount namespace of the test's own |
//! | `server`, `holder` | a server with three bricks, and one who changes a file |
//! | `content` | what a file should contain; the mutations that are tried |
//! | `play` | what is done |
//! | `trace` | what was promised at which step of the disk |
//! | `images` | the disks that can be left |
//! | `check` | the promises, on one brick |
//! | `damage` | damage by hand: torn checksums, torn logs, names and objects that lack each other |
//! | `refused` | a disk that refuses some writes for a while |
//! | `chance` | chance, from a number that is printed |

mod chance;
mod check;
mod content;
mod damage;
mod disk;
mod holder;
mod images;
mod mounted;
mod play;
mod refused;
mod server;
mod trace;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chance::Chance;
use disk::{Disk, Pages};
use mounted::Xfs;
use play::Player;
use server::{Places, Server};
use trace::{Recorder, Trace};

/// Other parts of a window than the simplest, of each kind.
const OTHERS: usize = 3;
/// Images that are made in one passage through all that was done.
const AT_ONCE: usize = 25;

/// One brick on a disk that remembers, the others and the metadata log elsewhere.
fn record_one_brick(dir: &Path, disk: &Disk, sequences: u64, chance: &mut Chance) -> (Pages, Trace) {
    mounted::make_xfs(&disk.file()).unwrap();
    let xfs = Xfs::mount(&disk.file(), &dir.join("disk")).unwrap();
    let base = disk.record();
    let elsewhere = dir.join("elsewhere");
    let places = Places {
        server: elsewhere.join("server"),
        bricks: [xfs.at().join("brick"), elsewhere.join("b1"), elsewhere.join("b2")],
    };
    let mut recorder = Recorder::new(disk);
    let server = Server::start(&places);
    server.wait_for_states(play::IN_SYNC);
    recorder.made = disk.recorded();
    let session = server.session();
    let mut player = Player { server: &server, recorder: &mut recorder, brick: places.bricks[0].clone(), session };
    let mut inos: Vec<_> = (0..sequences).map(|number| player.sequence(number, chance)).collect();
    player.second_round(12, chance);
    player.one_out(inos.pop().unwrap(), chance);
    player.names(&inos[..inos.len().min(8)]);
    player.second_round(6, chance);
    let (server, session) = play::stop_and_start(server, &mut recorder, || Server::start(&places));
    let mut player = Player { server: &server, recorder: &mut recorder, brick: places.bricks[0].clone(), session };
    player.sequence(sequences, chance);
    player.second_round(6, chance);
    let names = server.state();
    server.kill();
    let trace = recorder.end(names);
    xfs.unmount().unwrap();
    (base, trace)
}

#[test]
fn whatever_a_power_cut_leaves_of_a_brick_keeps_what_was_promised() {
    if !mounted::inside("whatever_a_power_cut_leaves_of_a_brick_keeps_what_was_promised") {
        return;
    }
    let seed = chance::seed();
    let patience = Duration::from_secs(chance::given("MORTAR_CRASH_SECONDS").unwrap_or(60));
    let sequences = chance::given("MORTAR_CRASH_SEQUENCES").unwrap_or(24);
    println!("MORTAR_CRASH_SEED={seed}, {sequences} sequences, images for {patience:?}");
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::serve(&dir.path().join("remembers")).unwrap();
    let mut chance = Chance::new(seed);
    let (base, trace) = record_one_brick(dir.path(), &disk, sequences, &mut chance);
    drop(disk);
    let windows = images::windows(&trace.steps);
    let mut left = Vec::new();
    for (number, window) in windows.iter().enumerate() {
        left.extend(images::parts(&trace.steps, window, OTHERS, &mut chance).into_iter().map(|part| (number, part)));
    }
    let (files, steps, possible) = (trace.files.len(), trace.steps.len(), left.len());
    println!("{files} files, {steps} steps, {} flushes: {possible} images", windows.len());
    let image = Disk::serve(&dir.path().join("image")).unwrap();
    let began = Instant::now();
    let mut checked = 0;
    let mut broken = Vec::new();
    while began.elapsed() < patience && !left.is_empty() && broken.is_empty() {
        let mut durable = Arc::new(base.clone());
        let mut passed = 0;
        for (number, part) in images::sample(&mut left, AT_ONCE, &mut chance) {
            for window in &windows[passed..number] {
                images::pass(&mut durable, &trace.steps, window);
            }
            passed = number;
            let window = &windows[number];
            images::leave(&image, &durable, &trace.steps, window, part);
            let xfs = Xfs::mount(&image.file(), &dir.path().join("left")).unwrap();
            if let Err(why) = check::brick(&xfs.at().join("brick"), &trace, window.steps.end) {
                broken.push(format!("{window}, with {part:?} of {:?}: {why}", window.steps));
            }
            xfs.unmount().unwrap();
            checked += 1;
        }
    }
    println!("{checked} of {possible} images checked, {} broken, {:?}", broken.len(), began.elapsed());
    assert!(broken.is_empty(), "MORTAR_CRASH_SEED={seed}:\n{}", broken[..broken.len().min(12)].join("\n"));
}
