//! Real daemons, no mount: what an administrator does, and a leader that dies.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mortar_tests::harness::{VOLUME, World, eventually, program, with_world};
use serde_json::Value;

#[test]
fn an_administrator_sets_a_volume_up_and_takes_it_down() -> Result<()> {
    with_world("admin", |world| {
        let list = world.mortar("server list")?;
        ensure!(list["servers"].as_array().is_some_and(|s| s.len() == 3), "{list}");
        let states = world.states()?;
        ensure!(states == ["in-sync"; 3], "{states:?}");
        world.mortar(&format!("volume set {VOLUME} io-timeout 3s"))?;
        let got = world.mortar(&format!("volume get {VOLUME} io-timeout"))?;
        ensure!(got.to_string().contains("3s"), "{got}");
        world.mortar(&format!("volume reset {VOLUME} io-timeout"))?;
        let refused = Command::new(program("mortar"))
            .args(["--server", world.servers(), "volume", "delete", VOLUME, "--yes"])
            .output()?;
        ensure!(refused.status.code() == Some(1), "a started volume must not be deleted");
        world.mortar(&format!("volume stop {VOLUME} --yes"))?;
        world.mortar(&format!("volume start {VOLUME}"))?;
        world.mortar(&format!("volume stop {VOLUME} --yes"))?;
        world.mortar(&format!("volume delete {VOLUME} --yes"))?;
        Ok(())
    })
}

#[test]
fn commands_are_answered_again_soon_after_the_leader_was_killed_and_after_all_were() -> Result<()> {
    with_world("leader", |world| {
        let info = world.mortar("volume info")?;
        let leader = world.leader()?;
        world.playground(&["kill", &leader.to_string()])?;
        let took = eventually("another server leads", Duration::from_secs(15), || Ok(world.leader()? != leader))?;
        println!("another server led {} ms after the kill", took.as_millis());
        world.playground(&["start", &leader.to_string()])?;
        world.healed(Duration::from_secs(30))?;
        for server in ["1", "2", "3"] {
            world.playground(&["kill", server])?;
        }
        for server in ["1", "2", "3"] {
            world.playground(&["start", server])?;
        }
        world.healed(Duration::from_secs(60))?;
        let again = world.mortar("volume info")?;
        ensure!(again["volumes"][0]["id"] == info["volumes"][0]["id"], "{again}");
        Ok(())
    })
}

#[test]
fn who_is_not_in_auth_allow_cannot_mount() -> Result<()> {
    with_world("allow", |world| {
        world.mortar(&format!("volume set {VOLUME} auth.allow 10.9.9.0/24"))?;
        let on = tempfile::tempdir()?;
        let source = format!("{}:/{VOLUME}", world.servers());
        let mount = || Command::new(program("mortar-mount")).arg(&source).arg(on.path()).output();
        let refused = mount()?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(refused.status.code() == Some(1), "{:?}: {said}", refused.status);
        ensure!(said.contains("127.0.0.1 may not mount volume vmstore") && said.contains("10.9.9.0/24"), "{said}");
        world.mortar(&format!("volume set {VOLUME} auth.allow 10.9.9.0/24,127.0.0.1"))?;
        let taken = mount()?;
        ensure!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
        ensure!(Command::new("umount").arg(on.path()).status()?.success(), "it does not unmount");
        Ok(())
    })
}

/// The session of the mount at `path`, as `mortar client list` has it.
fn client_at(world: &World, path: &Path) -> Result<Value> {
    let list = world.mortar(&format!("client list {VOLUME}"))?;
    let clients = list["clients"].as_array().context("no clients")?;
    let at = format!(":{} ", path.display());
    clients.iter().find(|c| c["client"].as_str().is_some_and(|c| c.contains(&at))).cloned().context("it has no session")
}

#[test]
fn an_evicted_client_writes_no_more_and_what_it_was_told_is_written_is_there() -> Result<()> {
    with_world("evict", |world| {
        let (first, second) = (world.mount("m1")?, world.mount("m2")?);
        let image = first.join("disk");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&image)?;
        let acknowledged = AtomicU64::new(0);
        let end = std::thread::scope(|scope| -> Result<std::io::Error> {
            let writer = scope.spawn(|| {
                (0_u64..).find_map(|n| {
                    let block = [(n % 251) as u8 + 1; 4096];
                    let written = file.write_all_at(&block, n * 4096);
                    acknowledged.store(n + u64::from(written.is_ok()), Ordering::Release);
                    written.err()
                })
            });
            let seen = eventually("it writes, and is listed so", Duration::from_secs(20), || {
                let row = client_at(world, &first)?;
                let holds = row["leases"] == 1 && row["files"][0]["path"] == "/disk";
                Ok(acknowledged.load(Ordering::Acquire) > 50 && holds && row["in_flight"] == 1)
            });
            // Evicted whatever was seen: the writer must end.
            let session = client_at(world, &first)?["session"].as_str().context("no session")?.to_owned();
            let evicted = world.mortar(&format!("client evict {session} --yes"));
            let end = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?;
            seen?;
            ensure!(evicted?["done"] == "client evicted");
            end.context("it wrote on without end")
        })?;
        ensure!(end.raw_os_error() == Some(libc::EIO), "{end}");
        ensure!(client_at(world, &first).is_err(), "an evicted client has no session");
        // Another mount gets the lease, and finds all that was acknowledged.
        let other = OpenOptions::new().read(true).write(true).open(second.join("disk"))?;
        let count = acknowledged.load(Ordering::Acquire);
        other.write_all_at(&[255; 4096], (count + 8) * 4096)?;
        let mut block = [0; 4096];
        for n in 0..count {
            other.read_exact_at(&mut block, n * 4096)?;
            ensure!(block == [(n % 251) as u8 + 1; 4096], "block {n} of {count} is not what was acknowledged");
        }
        // The evicted one stays out, names included, until it is mounted again.
        ensure!(file.write_all_at(&[254; 4096], 0).is_err() && std::fs::read(&image).is_err(), "it works again");
        ensure!(std::fs::write(first.join("new"), "x").is_err(), "an evicted client makes files");
        drop(file);
        world.unmount(&first)?;
        let again = world.mount("m1")?;
        ensure!(std::fs::read(again.join("disk"))?[..4096] == [1; 4096], "mounted again, it reads something else");
        world.healed(Duration::from_secs(30))?;
        world.bricks_are_equal()
    })
}
