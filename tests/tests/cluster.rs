//! Real daemons, no mount: what an administrator does, and a leader that dies.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use mortar_tests::harness::{VOLUME, eventually, program, with_world};

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
