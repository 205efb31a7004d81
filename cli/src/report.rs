//! Volumes as people and programs read them: `volume list`, `info`, `status`.

use mortar_proto::wire::cluster::{BrickRow, VolumeInfoReply, VolumeRow, VolumeStatusReply, VolumeStatusRow};
use serde_json::{Value, json};

use crate::output::{bytes, number, state, table, text_of};
use crate::volume::sets;

const NONE: &str = "There is no volume. 'mortar volume create --help' tells how to make one.";

fn brick_json(brick: &BrickRow) -> Value {
    json!({
        "server": brick.server, "path": brick.path, "set": brick.set, "state": brick.state, "reachable": brick.reachable,
        "total_bytes": brick.total_bytes, "free_bytes": brick.free_bytes,
        "failed": (!brick.failed.is_empty()).then_some(&brick.failed),
    })
}

fn volume_json(volume: &VolumeRow) -> Value {
    let options: std::collections::BTreeMap<_, _> = volume.options.iter().collect();
    json!({
        "name": volume.name, "id": volume.id, "started": volume.started, "replica": volume.replica, "sets": sets(volume),
        "bricks": volume.bricks.iter().map(brick_json).collect::<Vec<_>>(), "options": options,
    })
}

fn in_sync(volume: &VolumeRow) -> usize {
    volume.bricks.iter().filter(|brick| brick.state == "in-sync").count()
}

fn started(volume: &VolumeRow) -> &'static str {
    if volume.started { "started" } else { "stopped" }
}

/// `volume list --json`
pub fn list_json(reply: &VolumeInfoReply) -> Value {
    let row = |volume: &VolumeRow| {
        json!({ "name": volume.name, "id": volume.id, "started": volume.started, "sets": sets(volume),
            "bricks": volume.bricks.len(), "bricks_in_sync": in_sync(volume) })
    };
    json!({ "volumes": reply.volumes.iter().map(row).collect::<Vec<_>>() })
}

/// `volume list`
pub fn list_text(reply: &VolumeInfoReply) -> String {
    if reply.volumes.is_empty() {
        return NONE.to_owned();
    }
    let mut rows = table(&["volume", "state", "replica sets", "bricks", "in sync"]);
    for volume in &reply.volumes {
        rows.add_row(vec![
            volume.name.as_str().into(),
            started(volume).into(),
            number(sets(volume)),
            number(volume.bricks.len()),
            number(in_sync(volume)),
        ]);
    }
    text_of(&rows)
}

/// `volume info --json`
pub fn info_json(reply: &VolumeInfoReply) -> Value {
    json!({ "volumes": reply.volumes.iter().map(volume_json).collect::<Vec<_>>() })
}

/// `volume info`
pub fn info_text(reply: &VolumeInfoReply) -> String {
    if reply.volumes.is_empty() {
        return NONE.to_owned();
    }
    let one = |volume: &VolumeRow| {
        let mut rows = table(&["set", "brick"]);
        for brick in &volume.bricks {
            rows.add_row(vec![number(brick.set + 1), format!("{}:{}", brick.server, brick.path).into()]);
        }
        let mut text = format!(
            "Volume {} (id {}), {}, replica {} x {}\n\n{}\n",
            volume.name,
            volume.id,
            started(volume),
            sets(volume),
            volume.replica,
            text_of(&rows)
        );
        if volume.options.is_empty() {
            text.push_str("\nAll options are at their defaults.\n");
        } else {
            let mut options: Vec<_> = volume.options.iter().collect();
            options.sort();
            let mut rows = table(&["option", "value"]);
            for (key, value) in options {
                rows.add_row(vec![key, value]);
            }
            text.push_str(&format!("\n{}\n", text_of(&rows)));
        }
        text
    };
    reply.volumes.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// `volume status --json`
pub fn status_json(reply: &VolumeStatusReply) -> Value {
    let row = |row: &VolumeStatusRow| {
        let clients: Vec<_> = row
            .clients
            .iter()
            .map(|c| json!({ "session": c.session, "client": c.client, "address": c.address, "open_files": c.open_files, "leases": c.leases }))
            .collect();
        let mut json = row.volume.as_ref().map_or_else(|| json!({}), volume_json);
        json["clients"] = clients.into();
        json["files"] = row.files.into();
        json
    };
    json!({ "volumes": reply.volumes.iter().map(row).collect::<Vec<_>>() })
}

/// `volume status`
pub fn status_text(reply: &VolumeStatusReply) -> String {
    if reply.volumes.is_empty() {
        return NONE.to_owned();
    }
    reply.volumes.iter().map(status_one).collect::<Vec<_>>().join("\n")
}

fn status_one(row: &VolumeStatusRow) -> String {
    let volume = row.volume.clone().unwrap_or_default();
    let mut bricks = table(&["set", "brick", "state", "free", "of", ""]);
    for brick in &volume.bricks {
        let size = |n: u64| if brick.total_bytes == 0 { "-".to_owned() } else { bytes(n) };
        bricks.add_row(vec![
            number(brick.set + 1),
            format!("{}:{}", brick.server, brick.path).into(),
            state(&brick.state, brick.reachable),
            number(size(brick.free_bytes)),
            number(size(brick.total_bytes)),
            brick.failed.as_str().into(),
        ]);
    }
    let files = crate::output::count(row.files, "file");
    let mut text = format!("Volume {}, {}, {files}\n\n{}\n", volume.name, started(&volume), text_of(&bricks));
    if row.clients.is_empty() {
        text.push_str("\nNo client has it mounted.\n");
    } else {
        let mut clients = table(&["client", "address", "open files", "leases", "session"]);
        for client in &row.clients {
            clients.add_row(vec![
                client.client.as_str().into(),
                client.address.as_str().into(),
                number(client.open_files),
                number(client.leases),
                client.session.as_str().into(),
            ]);
        }
        text.push_str(&format!("\n{}\n", text_of(&clients)));
    }
    text
}
