//! Real daemons: bricks that are replaced, found empty, compared.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mortar_tests::harness::{VOLUME, World, eventually, program, sh, with_mount};
use serde_json::Value;

const BLOCK: u64 = 4096;
/// After so long without a write a file has no intents any more, by which it would be repaired anyway.
const IDLE: Duration = Duration::from_secs(8);
/// Blocks of the image that guests use here.
const BLOCKS: u64 = 6144;

/// A block as the `round`th write to it leaves it.
fn content(block: u64, round: u64) -> [u8; BLOCK as usize] {
    let mut content = [0; BLOCK as usize];
    for (i, word) in content.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(block << 40 ^ round << 16 ^ i as u64).to_le_bytes());
    }
    content
}

/// An image whose blocks were all written once.
fn image(mount: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(mount.join("disk"))?;
    let whole: Vec<u8> = (0..BLOCKS).flat_map(|block| content(block, 0)).collect();
    file.write_all_at(&whole, 0)?;
    file.sync_all()?;
    Ok(file)
}

/// Writes here and there and reads back what it wrote before, until it is told to stop. Returns how often each block was written.
fn guest(file: &File, stops: &AtomicBool) -> Result<Vec<u64>> {
    let mut rounds = vec![0; BLOCKS as usize];
    let mut random = 1_u64;
    let mut below = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % n
    };
    while !stops.load(Ordering::Acquire) {
        let block = below(BLOCKS);
        rounds[block as usize] += 1;
        file.write_all_at(&content(block, rounds[block as usize]), block * BLOCK).context("a write")?;
        check(file, below(BLOCKS), &rounds)?;
    }
    Ok(rounds)
}

fn check(file: &File, block: u64, rounds: &[u64]) -> Result<()> {
    let mut found = [0; BLOCK as usize];
    file.read_exact_at(&mut found, block * BLOCK).context("a read")?;
    ensure!(found == content(block, rounds[block as usize]), "block {block} is not what was written last");
    Ok(())
}

/// Runs `story` beside a guest that writes and verifies; what the guest wrote is verified whole at the end.
fn beside_a_guest(mount: &Path, story: impl FnOnce() -> Result<()>) -> Result<()> {
    let file = image(mount)?;
    let stops = AtomicBool::new(false);
    let (told, rounds) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest(&file, &stops));
        let told = story();
        stops.store(true, Ordering::Release);
        (told, guest.join())
    });
    told?;
    let rounds = rounds.map_err(|_| anyhow::anyhow!("the guest panicked"))??;
    ensure!(rounds.iter().sum::<u64>() > 100, "the guest hardly wrote");
    (0..BLOCKS).try_for_each(|block| check(&file, block, &rounds))
}

/// What `heal info` says of the brick in a place, 1 to 3.
fn brick(world: &World, number: usize) -> Result<Value> {
    Ok(world.mortar(&format!("volume heal {VOLUME} info"))?["bricks"][number - 1].clone())
}

fn address(world: &World, number: usize) -> Result<String> {
    let address = world.servers().split(',').nth(number - 1).context("no such server")?;
    Ok(address.to_owned())
}

/// How a brick is written on the command line.
fn at(world: &World, number: usize, path: &Path) -> Result<String> {
    Ok(format!("{}:{}", address(world, number)?, path.display()))
}

fn are_equal(one: &Path, other: &Path) -> Result<()> {
    sh(&format!("diff -r --no-dereference --exclude=.mortar {} {}", one.display(), other.display())).map(drop)
}

#[test]
fn a_brick_is_replaced_under_load_while_servers_are_killed() -> Result<()> {
    with_mount("replace", |world, mount| {
        let new = world.brick(2).with_file_name("new");
        std::fs::write(mount.join("idle"), vec![5; 3_000_000])?;
        beside_a_guest(mount, || {
            std::thread::sleep(IDLE);
            // Slow enough that what follows happens in the middle.
            world.mortar(&format!("volume set {VOLUME} repair.rate 1M"))?;
            let (from, to) = (at(world, 2, &world.brick(2))?, at(world, 2, &new)?);
            world.mortar(&format!("volume replace-brick {VOLUME} {from} {to} --yes"))?;
            let built = |few: u64, many: u64| {
                let row = brick(world, 2)?;
                let left = row["missed_regions"].as_u64().context("no regions")?;
                Ok(row["state"] == "syncing" && (few..=many).contains(&left))
            };
            eventually("the new brick is being built", Duration::from_secs(30), || built(1, 22))?;
            world.playground(&["kill", "2"])?;
            eventually("it is out", Duration::from_secs(30), || Ok(brick(world, 2)?["state"] == "out"))?;
            world.playground(&["start", "2"])?;
            eventually("it is built on", Duration::from_secs(30), || built(1, 23))?;
            let leader = world.leader()?;
            world.playground(&["kill", &leader.to_string()])?;
            eventually("another leads", Duration::from_secs(20), || Ok(world.leader()? != leader))?;
            world.playground(&["start", &leader.to_string()])?;
            world.mortar(&format!("volume set {VOLUME} repair.rate 0"))?;
            world.healed(Duration::from_secs(120)).map(drop)
        })?;
        let info = world.mortar(&format!("volume info {VOLUME}"))?;
        let paths: Vec<&str> = (0..3).filter_map(|i| info["volumes"][0]["bricks"][i]["path"].as_str()).collect();
        ensure!(paths.contains(&new.to_string_lossy().as_ref()), "{paths:?}");
        are_equal(&world.brick(1), &new)?;
        are_equal(&world.brick(1), &world.brick(3))?;
        // It is a good copy: with another one gone, reads and writes go on.
        world.playground(&["kill", "3"])?;
        std::fs::write(mount.join("more"), "more")?;
        ensure!(std::fs::read(new.join("more"))? == b"more", "the new brick does not take what is written");
        world.playground(&["start", "3"])?;
        world.healed(Duration::from_secs(60)).map(drop)
    })
}

#[test]
fn a_brick_that_is_found_empty_stays_out_until_it_is_reset() -> Result<()> {
    with_mount("reset", |world, mount| {
        beside_a_guest(mount, || {
            world.playground(&["kill", "3"])?;
            let data = world.brick(3);
            sh(&format!("find {} -mindepth 1 -delete", data.display()))?;
            world.playground(&["start", "3"])?;
            let told = |words: &str| {
                let status = world.mortar(&format!("volume status {VOLUME}"))?;
                let row = &status["volumes"][0]["bricks"][2];
                Ok(row["state"] == "out" && row["failed"].as_str().is_some_and(|f| f.contains(words)))
            };
            eventually("the empty directory is told of", Duration::from_secs(30), || {
                told("have the brick built anew")
            })?;
            ensure!(std::fs::read_dir(&data)?.next().is_none(), "something was made in the empty directory");
            let started = world.mortar(&format!("volume heal {VOLUME}"))?;
            ensure!(started["bricks"][0]["awaits"].as_str().is_some_and(|a| a.contains("built anew")), "{started}");
            // A watcher that is there from before sees it through to the end, and ends by itself.
            let mut watch = Command::new(program("mortar"));
            watch.args(["--server", world.servers(), "volume", "heal", VOLUME, "watch"]);
            let watch = watch.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
            let reset = world.mortar(&format!("volume reset-brick {VOLUME} {} --yes", at(world, 3, &data)?));
            let healed = reset.and_then(|_| world.healed(Duration::from_secs(120)));
            let watched = match healed {
                Ok(_) => watch.wait_with_output()?,
                Err(e) => {
                    let mut watch = watch;
                    watch.kill()?;
                    watch.wait()?;
                    return Err(e);
                }
            };
            let said = String::from_utf8_lossy(&watched.stdout).into_owned();
            ensure!(watched.status.success() && said.ends_with("nothing to heal\n"), "{:?}: {said}", watched.status);
            ensure!(said.contains(" out, ") && !said.contains('\u{1b}'), "{said}");
            Ok(())
        })?;
        world.bricks_are_equal()?;
        // A brick that holds files is not taken for an empty disk.
        let refused = Command::new(program("mortar"))
            .args([
                "--server",
                world.servers(),
                "volume",
                "reset-brick",
                VOLUME,
                &at(world, 3, &world.brick(3))?,
                "--yes",
            ])
            .output()?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(refused.status.code() == Some(1) && said.contains("is a brick of volume"), "{said}");
        world.healed(Duration::from_secs(30)).map(drop)
    })
}

#[test]
fn an_older_copy_of_a_brick_stays_out_until_it_is_reset() -> Result<()> {
    with_mount("old-copy", |world, mount| {
        beside_a_guest(mount, || {
            let data = world.brick(3);
            let (of, kept) = (data.display(), data.with_extension("kept"));
            world.playground(&["kill", "3"])?;
            // Before that, all is well as far as anybody knows, and its next start would not be waited for.
            eventually("it is missed", Duration::from_secs(30), || Ok(world.states()?[2] == "out"))?;
            sh(&format!("cp -a {of} {}", kept.display()))?;
            world.playground(&["start", "3"])?;
            world.healed(Duration::from_secs(60))?;
            world.playground(&["kill", "3"])?;
            sh(&format!("find {of} -mindepth 1 -delete && cp -a {}/. {of}", kept.display()))?;
            world.playground(&["start", "3"])?;
            let told = || {
                let row = world.mortar(&format!("volume status {VOLUME}"))?["volumes"][0]["bricks"][2].clone();
                let says = |words: &str| row["failed"].as_str().is_some_and(|f| f.contains(words));
                Ok(row["state"] == "out" && says("has an older copy of the brick") && says("reset-brick"))
            };
            eventually("the older copy is told of", Duration::from_secs(30), told)?;
            sh(&format!("diff -r --no-dereference --exclude=state {} {of}", kept.display()))?;
            sh(&format!("find {of} -mindepth 1 -delete && rm -r {}", kept.display()))?;
            world.mortar(&format!("volume reset-brick {VOLUME} {} --yes", at(world, 3, &data)?))?;
            world.healed(Duration::from_secs(120)).map(drop)
        })?;
        world.bricks_are_equal()
    })
}

#[test]
fn comparing_everything_finds_what_changed_behind_the_bricks_back_and_keeps_two_copies_in_sync() -> Result<()> {
    with_mount("full", |world, mount| {
        drop(image(mount)?);
        std::thread::sleep(IDLE);
        // A byte, and a hole where data was; nobody reads there.
        let on_disk = |number: usize| OpenOptions::new().write(true).open(world.brick(number).join("disk"));
        on_disk(1)?.write_all_at(b"x", 5_000_000)?;
        sh(&format!("fallocate --punch-hole --offset 8M --length 2M {}", world.brick(3).join("disk").display()))?;
        world.mortar(&format!("volume heal {VOLUME} full"))?;
        let mut fewest = 3;
        eventually("all was compared", Duration::from_secs(120), || {
            let info = world.mortar(&format!("volume heal {VOLUME} info"))?;
            let bricks = info["bricks"].as_array().context("no bricks")?;
            let in_sync = bricks.iter().filter(|b| b["state"] == "in-sync").count();
            fewest = fewest.min(in_sync);
            Ok(info["nothing_to_heal"] == true)
        })?;
        ensure!(fewest == 2, "{fewest} bricks were in sync at times");
        world.bricks_are_equal()?;
        let rounds = vec![0; BLOCKS as usize];
        let file = File::open(mount.join("disk"))?;
        (0..BLOCKS).try_for_each(|block| check(&file, block, &rounds))
    })
}

/// Files come and go until it is told to stop. Returns how many went.
fn litter(mount: &Path, stops: &AtomicBool) -> Result<u64> {
    let mut gone = 0;
    while !stops.load(Ordering::Acquire) {
        let paths: Vec<_> = (0..8).map(|i| mount.join(format!("litter{i}"))).collect();
        paths.iter().try_for_each(|path| std::fs::write(path, [7; 100_000]))?;
        paths.iter().try_for_each(std::fs::remove_file)?;
        gone += paths.len() as u64;
    }
    Ok(gone)
}

#[test]
fn files_that_go_while_they_are_compared_hold_nothing_up() -> Result<()> {
    with_mount("litter", |world, mount| {
        drop(image(mount)?);
        let stops = AtomicBool::new(false);
        let (told, gone) = std::thread::scope(|scope| {
            let litter = scope.spawn(|| litter(mount, &stops));
            let told = (0..3).try_for_each(|_| {
                world.mortar(&format!("volume heal {VOLUME} full"))?;
                eventually("all was compared", Duration::from_secs(90), || {
                    Ok(world.mortar(&format!("volume heal {VOLUME} info"))?["nothing_to_heal"] == true)
                })
                .map(drop)
            });
            stops.store(true, Ordering::Release);
            (told, litter.join())
        });
        told?;
        let gone = gone.map_err(|_| anyhow::anyhow!("who litters panicked"))??;
        ensure!(gone > 100, "only {gone} files were removed meanwhile");
        world.bricks_are_equal()
    })
}

#[test]
fn with_two_disks_gone_an_older_brick_is_taken_by_the_administrators_word_and_clients_are_told() -> Result<()> {
    with_mount("loss", |world, mount| {
        drop(image(mount)?);
        world.playground(&["kill", "3"])?;
        eventually("it is out", Duration::from_secs(30), || Ok(brick(world, 3)?["state"] == "out"))?;
        let file = OpenOptions::new().read(true).write(true).open(mount.join("disk"))?;
        file.write_all_at(&content(0, 1), 0)?;
        file.sync_all()?;
        let accept = |number: usize, how: &str| -> Result<(Option<i32>, String)> {
            let at = at(world, number, &world.brick(number))?;
            let mut command = Command::new(program("mortar"));
            command.args(["--server", world.servers(), "volume", "heal", VOLUME, "accept-data-loss", &at]);
            let output = command.args(how.split_whitespace()).stdin(Stdio::null()).output()?;
            Ok((output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()))
        };
        let (code, said) = accept(1, "--yes-i-lose-data")?;
        ensure!(code == Some(1) && said.contains("nothing has to be given up"), "{said}");
        for number in [1, 2] {
            world.playground(&["kill", &number.to_string()])?;
            sh(&format!("find {} -mindepth 1 -delete", world.brick(number).display()))?;
        }
        for number in ["1", "2", "3"] {
            world.playground(&["start", number])?;
        }
        eventually("it would be taken", Duration::from_secs(60), || {
            let (code, said) = accept(3, "")?;
            ensure!(
                code == Some(2) && said.contains("--yes-i-lose-data") && said.contains("evicted"),
                "{code:?} {said}"
            );
            Ok(true)
        })?;
        ensure!(brick(world, 3)?["state"] != "in-sync", "to ask what is lost must not lose it");
        let (code, said) = accept(3, "--yes-i-lose-data")?;
        ensure!(code == Some(0), "{said}");
        ensure!(brick(world, 3)?["state"] == "in-sync");
        for number in [1, 2] {
            world.mortar(&format!("volume reset-brick {VOLUME} {} --yes", at(world, number, &world.brick(number))?))?;
        }
        world.healed(Duration::from_secs(120))?;
        world.bricks_are_equal()?;
        // A loss is never silent: who had the volume mounted is cut off; mounted again it has what that brick had.
        let end = file.write_all_at(&content(0, 2), 0);
        ensure!(end.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EIO)), "{end:?}");
        drop(file);
        let again = world.mount("m2")?;
        let file = File::open(again.join("disk"))?;
        let rounds = vec![0; BLOCKS as usize];
        (0..BLOCKS).try_for_each(|block| check(&file, block, &rounds))
    })
}
