//! Bytes that a disk has changed by itself: nobody is given them, and they are repaired.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mortar_tests::harness::{VOLUME, World, eventually, sh, with_mount};

const BLOCK: u64 = 4096;

/// Changes a byte of the image on a brick, 1 to 3, as a disk might.
fn flip(world: &World, brick: usize, block: u64) -> Result<()> {
    let path = world.brick(brick).join("disk");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    let (mut byte, at) = ([0], block * BLOCK + 77);
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[!byte[0]], at)?;
    file.sync_all()?;
    Ok(())
}

/// An image of 8 MiB on the mount, on the bricks' disks.
fn image(mount: &Path) -> Result<String> {
    let disk = mount.join("disk");
    sh(&format!("head -c 8M /dev/urandom > {0} && sync {0}", disk.display()))?;
    sum(mount)
}

fn sum(mount: &Path) -> Result<String> {
    sh(&format!("sha256sum < {}", mount.join("disk").display()))
}

/// Corrupt blocks that were found and repaired, by brick.
fn corruption(world: &World) -> Result<Vec<(u64, u64)>> {
    let info = world.mortar(&format!("volume heal {VOLUME} info"))?;
    let bricks = info["bricks"].as_array().context("heal info has no bricks")?;
    let of = |b: &serde_json::Value| Some((b["corrupt_found"].as_u64()?, b["corrupt_repaired"].as_u64()?));
    bricks.iter().map(|b| of(b).context("heal info does not tell of corrupt blocks")).collect()
}

/// What `mortar volume scrub` says of each brick.
fn scrub(world: &World) -> Result<Vec<serde_json::Value>> {
    let status = world.mortar(&format!("volume scrub {VOLUME} status"))?;
    status["bricks"].as_array().cloned().context("scrub status has no bricks")
}

#[test]
fn a_scrub_finds_and_repairs_what_nobody_reads() -> Result<()> {
    with_mount("scrub", |world, mount| {
        let right = image(mount)?;
        for brick in 1..=3 {
            flip(world, brick, 100 * brick as u64)?;
            flip(world, brick, 1000 + brick as u64)?;
        }
        ensure!(corruption(world)? == [(0, 0); 3], "nobody has looked yet");
        // The mount holds the file's lease, and is told within its next question.
        world.mortar(&format!("volume scrub {VOLUME} start"))?;
        eventually("all is found and repaired", Duration::from_secs(60), || {
            Ok(corruption(world)? == [(2, 2); 3] && scrub(world)?.iter().all(|b| b["state"] == "idle"))
        })?;
        for brick in scrub(world)? {
            ensure!(brick["found"] == 2 && brick["undecided"] == 0 && brick["last_finished"].is_u64(), "{brick}");
            ensure!(brick["looked_bytes"].as_u64() >= Some(8 << 20), "{brick}");
        }
        world.healed(Duration::from_secs(10))?;
        world.bricks_are_equal()?;
        ensure!(sum(mount)? == right, "the mount answers with something else");
        // Again: there is nothing to find.
        world.mortar(&format!("volume scrub {VOLUME} start"))?;
        eventually("the second scrub has ended", Duration::from_secs(60), || {
            let bricks = scrub(world)?;
            Ok(bricks.iter().all(|b| b["state"] == "idle" && b["found"] == 0))
        })?;
        world.mortar(&format!("volume scrub {VOLUME} stop"))?;
        Ok(())
    })
}

#[test]
fn a_block_that_is_read_and_does_not_verify_is_answered_rightly_and_repaired() -> Result<()> {
    with_mount("corrupt", |world, mount| {
        let right = image(mount)?;
        // Whichever brick the mount reads from.
        for brick in 1..=3 {
            flip(world, brick, 10 * brick as u64)?;
        }
        ensure!(sum(mount)? == right, "the mount answered with what is corrupt");
        eventually("what was read is repaired", Duration::from_secs(30), || {
            let of = corruption(world)?;
            Ok(of.iter().map(|b| b.0).sum::<u64>() > 0 && of.iter().all(|b| b.0 == b.1))
        })?;
        println!("found and repaired, by brick: {:?}", corruption(world)?);
        ensure!(sum(mount)? == right, "the mount answered with something else after the repair");
        Ok(())
    })
}

#[test]
fn what_a_disk_changed_where_was_written_lately_is_made_good_when_all_bricks_were_killed() -> Result<()> {
    with_mount("doubt", |world, mount| {
        let right = image(mount)?;
        // Whichever brick becomes the source of the cold start.
        for brick in 1..=3 {
            flip(world, brick, 100 * brick as u64)?;
        }
        let servers = ["1", "2", "3"];
        servers.iter().try_for_each(|server| world.playground(&["kill", server]).map(drop))?;
        servers.iter().try_for_each(|server| world.playground(&["start", server]).map(drop))?;
        ensure!(sum(mount)? == right, "the mount answers with what is corrupt");
        world.healed(Duration::from_secs(60))?;
        world.bricks_are_equal()?;
        let log = |server: &str| world.brick(1).join(format!("../../server{server}/log"));
        let was_in_doubt = |server: &&str| {
            let log = std::fs::read_to_string(log(server)).unwrap_or_default();
            log.contains("1 blocks did not match their checksums after an unclean stop; other bricks had 1 of them")
        };
        ensure!(servers.iter().any(was_in_doubt), "no source of a cold start had anything in doubt");
        Ok(())
    })
}
