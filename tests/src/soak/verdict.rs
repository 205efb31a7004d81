//! What must be true when all faults are over: nothing is lost, the bricks are one copy, checksums are of their data, no daemon
//! has made a mistake, and the file systems are sound.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use mortar_proto::checksum;

use super::cluster::{CLIENTS, Cluster, SERVERS};
use super::workers::Field;
use super::{WHOLE, go_on};
use crate::harness::sh;

/// Bytes of a sum.
const SUM: usize = size_of::<checksum::Sum>();

/// Judges a run whose workers have ended.
///
/// # Errors
/// What is not as it must be.
pub fn judge(cluster: &mut Cluster, field: &Arc<Field>) -> Result<()> {
    for client in 0..CLIENTS {
        field.read_all(client).with_context(|| format!("at the end, through mount {}", client + 1))?;
    }
    for client in 0..CLIENTS {
        cluster.unmount(client)?;
    }
    cluster.wait_until_whole(WHOLE, &mut go_on)?;
    bricks_are_equal(cluster)?;
    for server in 0..SERVERS {
        sums_are_of_their_data(&cluster.disks[server].brick())?;
    }
    logs_are_clean(cluster)?;
    for server in 0..SERVERS {
        cluster.kill(server)?;
        cluster.disks[server].unmount()?;
        cluster.disks[server].is_sound().with_context(|| format!("the disk of server {}", server + 1))?;
    }
    println!("[{:7.1} s] nothing lost, stale or wrong; the bricks are one copy", field.now());
    Ok(())
}

/// Names, objects and sums are the same, byte by byte.
fn bricks_are_equal(cluster: &Cluster) -> Result<()> {
    let first = cluster.disks[0].brick();
    for other in &cluster.disks[1..] {
        let other = other.brick();
        sums_are_equal(&first, &other)?;
        for part in [".", ".mortar/objects"] {
            let exclude = if part == "." { "--exclude=.mortar" } else { "" };
            let (a, b) = (first.join(part), other.join(part));
            sh(&format!("diff -r --no-dereference {exclude} {} {}", a.display(), b.display()))
                .with_context(|| format!("{} and {} differ", a.display(), b.display()))?;
        }
    }
    Ok(())
}

/// The same sums, block by block; names the blocks where not. What was never written and what was written with zeroes reads
/// the same, and a brick that was repaired may have the one for the other; what is missing at the end was never written.
fn sums_are_equal(first: &Path, other: &Path) -> Result<()> {
    let zeroes = checksum::of_block(&[0; super::history::BLOCK]);
    let sum = |of: &[u8], number: usize| match sum_of(of, number) {
        sum if sum == zeroes => checksum::HOLE,
        sum => sum,
    };
    for shard in std::fs::read_dir(first.join(".mortar/sums"))? {
        for sums in std::fs::read_dir(shard?.path())? {
            let path = sums?.path();
            let there = other.join(path.strip_prefix(first)?);
            let (a, b) = (std::fs::read(&path)?, std::fs::read(&there)?);
            let blocks = a.len().max(b.len()) / SUM;
            let differ: Vec<usize> = (0..blocks).filter(|n| sum(&a, *n) != sum(&b, *n)).collect();
            ensure!(
                differ.is_empty(),
                "{} and {} differ in {} sums: {:?}",
                path.display(),
                there.display(),
                differ.len(),
                &differ[..differ.len().min(20)]
            );
        }
    }
    Ok(())
}

fn sum_of(sums: &[u8], number: usize) -> checksum::Sum {
    let at = number * SUM;
    let sum = sums.get(at..at + SUM).and_then(|s| s.try_into().ok());
    sum.map_or(checksum::HOLE, checksum::Sum::from_le_bytes)
}

/// Every block matches its sum.
fn sums_are_of_their_data(brick: &Path) -> Result<()> {
    let mut blocks = 0_u64;
    for shard in std::fs::read_dir(brick.join(".mortar/objects"))? {
        let shard = shard?;
        for object in std::fs::read_dir(shard.path())? {
            let object = object?;
            let data = std::fs::read(object.path())?;
            let sums = std::fs::read(brick.join(".mortar/sums").join(shard.file_name()).join(object.file_name()))?;
            for (number, block) in data.chunks(super::history::BLOCK).enumerate() {
                let path = object.path();
                ensure!(
                    checksum::matches(block, sum_of(&sums, number)),
                    "block {number} of {} does not match its sum",
                    path.display()
                );
                blocks += 1;
            }
        }
    }
    ensure!(blocks > 1000, "only {blocks} blocks in {}: nothing was tested", brick.display());
    Ok(())
}

fn logs_are_clean(cluster: &Cluster) -> Result<()> {
    let servers = (0..SERVERS).map(|server| cluster.server_log(server));
    let mounts = (0..CLIENTS).map(|client| cluster.mount_log(client));
    for log in servers.chain(mounts) {
        let text = std::fs::read_to_string(&log)?;
        for bad in ["panicked at", "made a mistake of its own"] {
            let line = text.lines().find(|line| line.contains(bad));
            ensure!(line.is_none(), "{}: {}", log.display(), line.unwrap_or_default());
        }
    }
    Ok(())
}
