//! Real daemons and real mounts: what a hypervisor does, while servers die.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mortar_tests::harness::{eventually, sh, with_mount};
use mortar_tests::scenarios;
use serde_json::Value;

/// fio that writes and verifies for some seconds.
struct Load {
    child: Child,
    out: std::path::PathBuf,
}

impl Load {
    fn start(dir: &Path, seconds: u32) -> Result<Self> {
        let out = dir.with_extension("fio.json");
        let child = Command::new("fio")
            .args([
                "--name=load",
                "--size=96m",
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=8",
                "--ioengine=libaio",
                "--direct=1",
            ])
            .args([
                "--verify=crc32c",
                "--verify_state_save=0",
                "--verify_backlog=256",
                "--verify_fatal=1",
                "--time_based",
                "--output-format=json",
            ])
            .arg(format!("--runtime={seconds}"))
            .arg(format!("--filename={}", dir.join("load.img").display()))
            .arg(format!("--output={}", out.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting fio")?;
        Ok(Self { child, out })
    }

    /// Waits for its end; no error, nothing lost. Returns the longest pause in seconds.
    fn end(mut self) -> Result<f64> {
        let status = self.child.wait()?;
        let text = std::fs::read_to_string(&self.out).unwrap_or_default();
        let from = text.find('{').unwrap_or(0);
        let report: Value = serde_json::from_str(&text[from..]).with_context(|| format!("fio said {text}"))?;
        let job = &report["jobs"][0];
        ensure!(status.success() && job["error"] == 0, "fio ended with {status}, error {}", job["error"]);
        ensure!(
            job["write"]["total_ios"].as_u64().is_some_and(|n| n > 100),
            "fio wrote next to nothing: {}",
            job["write"]
        );
        let longest = |side: &str| job[side]["clat_ns"]["max"].as_f64().unwrap_or(0.0) / 1e9;
        Ok(longest("write").max(longest("read")))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pause() {
    std::thread::sleep(Duration::from_secs(3));
}

#[test]
fn a_killed_brick_costs_a_short_pause_and_gets_back_what_it_missed() -> Result<()> {
    with_mount("kill", |world, mount| {
        let load = Load::start(mount, 14)?;
        pause();
        world.playground(&["kill", "2"])?;
        pause();
        world.playground(&["start", "2"])?;
        let longest = load.end()?;
        println!("longest pause {longest:.3} s");
        world.healed(Duration::from_secs(60))?;
        world.bricks_are_equal()
    })
}

#[test]
fn a_hung_leader_costs_a_pause_and_comes_back() -> Result<()> {
    with_mount("hang", |world, mount| {
        let leader = world.leader()?.to_string();
        let load = Load::start(mount, 16)?;
        pause();
        world.playground(&["stop", &leader])?;
        std::thread::sleep(Duration::from_secs(6));
        world.playground(&["cont", &leader])?;
        let longest = load.end()?;
        println!("longest pause {longest:.3} s");
        world.healed(Duration::from_secs(60))?;
        world.bricks_are_equal()
    })
}

#[test]
fn all_daemons_are_killed_at_once_and_nothing_acknowledged_is_lost() -> Result<()> {
    with_mount("all", |world, mount| {
        sh(&format!(
            "head -c 40000000 /dev/urandom > {m}/kept; mkdir {m}/d; cp {m}/kept {m}/d/copy; sync {m}/kept",
            m = mount.display()
        ))?;
        let before = sh(&format!("cd {}; sha256sum kept d/copy", mount.display()))?;
        let load = Load::start(mount, 14)?;
        pause();
        for server in ["1", "2", "3"] {
            world.playground(&["kill", server])?;
        }
        for server in ["1", "2", "3"] {
            world.playground(&["start", server])?;
        }
        load.end()?;
        world.healed(Duration::from_secs(90))?;
        let after = sh(&format!("cd {}; sha256sum kept d/copy", mount.display()))?;
        ensure!(before == after, "{before}{after}");
        world.bricks_are_equal()
    })
}

#[test]
fn a_client_that_dies_leaves_equal_bricks_and_readable_data_to_the_next() -> Result<()> {
    with_mount("client", |world, mount| {
        world.mortar("volume set vmstore session-ttl 3s")?;
        let _load = Load::start(mount, 30)?;
        pause();
        // By its pid: the mount's own process is the one that has this mount point in its arguments.
        let pids = sh(&format!("pgrep -f -- 'mortar-mount .* {}$'", mount.display()))?;
        for pid in pids.split_whitespace() {
            sh(&format!("kill -9 {pid}"))?;
        }
        sh(&format!("umount -l {} || true", mount.display()))?;
        let second = world.mount("m2")?;
        let sum = sh(&format!("sha256sum < {}/load.img", second.display()))?;
        sh(&format!("echo more > {}/more", second.display()))?;
        world.healed(Duration::from_secs(60))?;
        eventually("the dead client's lease was settled", Duration::from_secs(40), || {
            let on_bricks: Vec<String> = (1..=3)
                .map(|b| sh(&format!("sha256sum < {}/load.img", world.brick(b).display())))
                .collect::<Result<_>>()?;
            Ok(on_bricks.iter().all(|s| *s == on_bricks[0]))
        })?;
        let again = sh(&format!("sha256sum < {}/load.img", second.display()))?;
        println!("read before recovery {sum}, after {again}");
        world.bricks_are_equal()
    })
}

#[test]
fn qemu_finds_on_the_mount_what_it_finds_on_xfs() -> Result<()> {
    with_mount("qemu", |world, mount| {
        let xfs = world.brick(1).parent().context("no parent")?.join("beside");
        let story = r#"
            cd "$D"
        qemu-img create -q -f qcow2 a.qcow2 256M
        qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 100M 64k' -c 'write -z 0 64k' -c 'discard 512k 64k' -c flush a.qcow2 | grep -c wrote
        qemu-io -f qcow2 -c 'read -P 0 0 64k' -c 'read -P 1 64k 64k' -c 'read -P 2 100M 64k' a.qcow2 | grep -c 'read 65536/65536'
        qemu-img snapshot -c one a.qcow2; qemu-img snapshot -l a.qcow2 | wc -l
        qemu-img resize -q a.qcow2 512M
        qemu-img check -q a.qcow2
        qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
        qemu-io -f qcow2 -c 'write -P 7 4M 1M' b.qcow2 | grep -c wrote
        qemu-img commit -q b.qcow2
        qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 c.qcow2
        qemu-img rebase -q -b '' c.qcow2
        qemu-img convert -q -O raw c.qcow2 c.raw
        qemu-img compare c.qcow2 c.raw
        qemu-img create -q -f raw -o preallocation=falloc r.raw 64M
        qemu-io -f raw -n -i native -c 'write -P 9 1M 1M' -c 'write -z 1M 64k' -c flush -c 'read -P 9 1088k 960k' r.raw | grep -c 960
        qemu-img resize -q -f raw r.raw 96M
        qemu-img map --output=json a.qcow2 | grep -c depth
        qemu-img info a.qcow2 | grep -E 'virtual|format'
            sha256sum c.raw r.raw
        "#;
        let tell = |dir: &Path| {
            std::fs::create_dir_all(dir)?;
            sh(&format!("D={}; {story}", dir.display()))
        };
        let (there, here) = (tell(&xfs)?, tell(&mount.join("q"))?);
        ensure!(there == here, "on XFS:\n{there}\non the mount:\n{here}");
        world.bricks_are_equal()
    })
}

#[test]
fn two_mounts_see_each_others_changes_at_once() -> Result<()> {
    with_mount("two", |world, one| {
        let other = world.mount("m2")?;
        let (a, b) = (one.display(), other.display());
        for round in 0..20 {
            sh(&format!(
                "echo {round} > {a}/f{round}; [ \"$(cat {b}/f{round})\" = {round} ]; rm {b}/f{round}; [ ! -e {a}/f{round} ]"
            ))?;
            // The lease goes to and fro.
            sh(&format!("echo a{round} >> {a}/log; echo b{round} >> {b}/log; [ \"$(tail -1 {a}/log)\" = b{round} ]"))?;
        }
        sh(&format!("[ \"$(wc -l < {a}/log)\" = 40 ]"))?;
        sh(&format!(
            "exec 3<>{a}/open; echo kept >&3; rm {b}/open; [ \"$(cat /proc/self/fd/3 || cat <&3)\" != lost ]"
        ))?;
        Ok(())
    })
}

#[test]
fn what_programs_expect_of_a_directory_holds_on_the_mount_and_between_two() -> Result<()> {
    with_mount("promises", |world, one| {
        let other = world.mount("m2")?;
        std::fs::create_dir(one.join("one"))?;
        std::fs::create_dir(one.join("two"))?;
        scenarios::run_one(&one.join("one"))?;
        scenarios::run_two(&one.join("two"), &other.join("two"))?;
        // diff has no time for 4 TiB of zeros, and knows nothing of pipes.
        for odd in ["sparse-4-tib", "special-files"] {
            std::fs::remove_dir_all(one.join("one").join(odd))?;
        }
        world.bricks_are_equal()
    })
}
