//! `mortar volume heal NAME …`: repair that starts now, what each brick lacks, and how its repair goes on.

use std::time::Duration;

use mortar_proto::wire::cluster::{BrickHealRow, Corruption, FileHealRow, HealInfoReply, HealStartRow, VolumeRequest};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::failure::Outcome;
use crate::output::{Output, bytes, count, number, over, seconds, state, table, text_of};

/// What the servers say when the time left is not known.
const UNKNOWN: u32 = u32::MAX;

/// How often a watcher looks.
const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row that may fail: a new leader takes seconds, and each look itself waits for one.
const FAILED_LOOKS: u32 = 6;

/// Starts repair now.
///
/// # Errors
/// What was refused or failed.
pub async fn start(cluster: &Cluster, output: Output, request: VolumeRequest) -> Outcome {
    let reply = cluster.change(async |mut client| client.heal_start(request.clone()).await).await?;
    let row = |row: &HealStartRow| {
        let awaits = (!row.awaits.is_empty()).then_some(&row.awaits);
        json!({ "server": row.server, "path": row.path, "state": row.state, "awaits": awaits })
    };
    let sentence = |row: &HealStartRow| {
        let goes_on = match (row.awaits.as_str(), row.state.as_str()) {
            ("", "syncing") => "is being repaired".to_owned(),
            ("", _) => "comes back now".to_owned(),
            (awaits, _) => format!("waits: {awaits}"),
        };
        format!("{}:{} ({}) {goes_on}.", row.server, row.path, row.state)
    };
    output.show(&json!({ "bricks": reply.bricks.iter().map(row).collect::<Vec<_>>() }), || {
        match reply.bricks.as_slice() {
            [] => "Nothing to heal: every brick is in sync.".to_owned(),
            rows => rows.iter().map(sentence).collect::<Vec<_>>().join("\n"),
        }
    });
    Ok(())
}

async fn look(cluster: &Cluster, name: &str) -> Outcome<HealInfoReply> {
    let request = VolumeRequest { name: name.to_owned(), force: false };
    cluster.ask(async |mut client| client.heal_info(request.clone()).await).await
}

/// Shows it.
///
/// # Errors
/// What was refused or failed.
pub async fn info(cluster: &Cluster, output: Output, name: &str) -> Outcome {
    let reply = look(cluster, name).await?;
    output.show(&to_json(name, &reply), || to_text(name, &reply));
    Ok(())
}

/// Shows it again and again, until nothing is left.
///
/// # Errors
/// What was refused at first, or failed again and again.
pub async fn watch(cluster: &Cluster, output: Output, name: &str) -> Outcome {
    let mut drawn = String::new();
    let mut failed = 0;
    let mut reply = look(cluster, name).await?;
    loop {
        let is_done = reply.bricks.iter().all(is_whole);
        output.next(&to_json(name, &reply), || {
            if !output.can_draw() {
                return to_lines(&reply);
            }
            let before = if drawn.is_empty() { String::new() } else { over(&drawn) };
            drawn = to_text(name, &reply);
            format!("{before}{drawn}")
        });
        if is_done {
            return Ok(());
        }
        reply = loop {
            tokio::time::sleep(LOOK).await;
            match look(cluster, name).await {
                Ok(reply) => break reply,
                Err(failure) if failed == FAILED_LOOKS => return Err(failure),
                Err(failure) => {
                    failed += 1;
                    drawn.clear();
                    output.progress(&format!("No answer just now: {failure}"));
                }
            }
        };
        failed = 0;
    }
}

/// A line for each brick that lacks something.
fn to_lines(reply: &HealInfoReply) -> String {
    let line = |brick: &BrickHealRow| {
        let mut line = format!(
            "{}:{} {}, {} ({}) left in {}",
            brick.server,
            brick.path,
            told_state(brick),
            count(brick.missed_regions, "region"),
            bytes(brick.missed_bytes),
            count(brick.files.len() as u64, "file"),
        );
        if brick.rate_bytes > 0 {
            line.push_str(&format!(", {}/s", bytes(brick.rate_bytes)));
        }
        if brick.left_seconds != UNKNOWN && brick.missed_bytes > 0 {
            line.push_str(&format!(", {} to go", seconds(u64::from(brick.left_seconds))));
        }
        line
    };
    let lines: Vec<String> = reply.bricks.iter().filter(|b| !is_whole(b)).map(line).collect();
    if lines.is_empty() { "nothing to heal".to_owned() } else { lines.join("\n") }
}

fn is_whole(brick: &BrickHealRow) -> bool {
    brick.state == "in-sync" && brick.missed_regions == 0 && brick.files.is_empty() && !brick.compare
}

/// Its state, and that it waits to be compared with the others.
fn told_state(brick: &BrickHealRow) -> String {
    if brick.compare && brick.state == "in-sync" { "in-sync, to be compared".into() } else { brick.state.clone() }
}

fn corruption(brick: &BrickHealRow) -> Corruption {
    brick.corruption.unwrap_or_default()
}

fn to_json(name: &str, reply: &HealInfoReply) -> Value {
    let file = |file: &FileHealRow| {
        let path = (!file.path.is_empty()).then_some(&file.path);
        json!({ "path": path, "ino": file.ino, "regions": file.regions, "bytes": file.bytes })
    };
    let brick = |brick: &BrickHealRow| {
        json!({
            "server": brick.server, "path": brick.path, "state": brick.state, "compare": brick.compare,
            "missed_regions": brick.missed_regions, "missed_bytes": brick.missed_bytes, "rate_bytes": brick.rate_bytes,
            "left_seconds": (brick.left_seconds != UNKNOWN).then_some(brick.left_seconds),
            "corrupt_found": corruption(brick).found, "corrupt_repaired": corruption(brick).repaired,
            "corrupt_left": corruption(brick).left,
            "files": brick.files.iter().map(file).collect::<Vec<_>>(),
        })
    };
    json!({
        "volume": name,
        "nothing_to_heal": reply.bricks.iter().all(is_whole),
        "bricks": reply.bricks.iter().map(brick).collect::<Vec<_>>(),
    })
}

fn to_text(name: &str, reply: &HealInfoReply) -> String {
    let mut bricks = table(&["brick", "state", "missed", "bytes", "rate", "time left", "corrupt blocks"]);
    for brick in &reply.bricks {
        let rate = if brick.rate_bytes == 0 { "-".to_owned() } else { format!("{}/s", bytes(brick.rate_bytes)) };
        let left = match brick.left_seconds {
            _ if is_whole(brick) => "-".to_owned(),
            UNKNOWN => "unknown".to_owned(),
            left => seconds(u64::from(left)),
        };
        bricks.add_row(vec![
            format!("{}:{}", brick.server, brick.path).into(),
            state(&told_state(brick), true),
            number(count(brick.missed_regions, "region")),
            number(bytes(brick.missed_bytes)),
            number(rate),
            number(left),
            number(corrupt_text(corruption(brick))),
        ]);
    }
    let mut text = format!("Volume {name}\n\n{}\n", text_of(&bricks));
    if reply.bricks.iter().all(is_whole) {
        text.push_str("\nnothing to heal\n");
        return text;
    }
    for brick in reply.bricks.iter().filter(|brick| !brick.files.is_empty()) {
        let mut files = table(&["file", "regions", "bytes"]);
        for file in &brick.files {
            let path = if file.path.is_empty() {
                format!("(inode {}, no name any more)", file.ino)
            } else {
                file.path.clone()
            };
            files.add_row(vec![path.into(), number(file.regions), number(bytes(file.bytes))]);
        }
        text.push_str(&format!("\n{}:{} lacks\n{}\n", brick.server, brick.path, text_of(&files)));
    }
    text
}

/// Corrupt blocks since the brick's server started.
fn corrupt_text(Corruption { found, repaired, left }: Corruption) -> String {
    match (found, left) {
        (0, 0) => "-".to_owned(),
        (found, 0) => format!("{found} found, {repaired} repaired"),
        (found, left) => format!("{found} found, {repaired} repaired, {left} left"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brick(state: &str, regions: u64) -> BrickHealRow {
        BrickHealRow {
            server: "s1:7440".into(),
            path: "/b".into(),
            state: state.into(),
            missed_regions: regions,
            missed_bytes: regions << 20,
            rate_bytes: 0,
            left_seconds: UNKNOWN,
            files: Vec::new(),
            corruption: None,
            compare: false,
        }
    }

    #[test]
    fn nothing_to_heal_is_said_only_when_every_brick_is_in_sync_and_misses_nothing() {
        let said = |bricks: Vec<BrickHealRow>| {
            let reply = HealInfoReply { bricks };
            let text = to_text("v", &reply).contains("\nnothing to heal");
            assert_eq!(to_json("v", &reply)["nothing_to_heal"], text);
            text
        };
        assert!(said(vec![brick("in-sync", 0), brick("in-sync", 0)]));
        assert!(!said(vec![brick("in-sync", 0), brick("out", 0)]));
        assert!(!said(vec![brick("in-sync", 0), brick("syncing", 2)]));
        let mut corrupt = brick("in-sync", 1);
        corrupt.corruption = Some(Corruption { found: 3, repaired: 2, left: 1 });
        assert!(to_text("v", &HealInfoReply { bricks: vec![corrupt.clone()] }).contains("3 found, 2 repaired, 1 left"));
        assert!(!said(vec![corrupt]), "what is corrupt on a brick is there to be healed");
    }

    #[test]
    fn a_brick_under_repair_shows_what_is_left_and_for_which_files() {
        let mut syncing = brick("syncing", 2);
        syncing.rate_bytes = 1 << 20;
        syncing.left_seconds = 2;
        syncing.files.push(FileHealRow { path: "/vm1.qcow2".into(), ino: 7, regions: 2, bytes: 2 << 20 });
        syncing.files.push(FileHealRow { path: String::new(), ino: 8, regions: 0, bytes: 0 });
        let reply = HealInfoReply { bricks: vec![syncing] };
        let text = to_text("v", &reply);
        for part in ["2 regions", "2.0 MiB", "1.0 MiB/s", "2 s", "/vm1.qcow2", "(inode 8, no name any more)"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert_eq!(to_json("v", &reply)["bricks"][0]["left_seconds"], 2);
        assert_eq!(to_json("v", &reply)["bricks"][0]["files"][1]["path"], Value::Null);
    }
}
