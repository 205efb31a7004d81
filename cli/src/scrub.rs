//! `mortar volume scrub NAME start|status|stop`: reading all data of the bricks, to find what their disks have changed.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Subcommand;
use mortar_proto::wire::cluster::{
    BrickScrubRow, ScrubAction as Action, ScrubStatus, VolumeScrubReply, VolumeScrubRequest,
};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, bytes, number, seconds, table, text_of};

/// What can be done about a scrub.
#[derive(Subcommand, Clone, Copy, Debug)]
pub enum ScrubAction {
    /// Begin one now, or go on with one that was stopped
    Start,
    /// Show how it does, and what the last one found
    Status,
    /// Stop it; it keeps its place
    Stop,
}

/// Does it.
///
/// # Errors
/// What was refused or failed; a brick whose server does not answer.
pub async fn run(cluster: &Cluster, output: Output, name: &str, action: ScrubAction) -> Outcome {
    let wanted = match action {
        ScrubAction::Start => Action::Start,
        ScrubAction::Status => Action::Status,
        ScrubAction::Stop => Action::Stop,
    };
    let request = VolumeScrubRequest { name: name.to_owned(), action: wanted.into() };
    let reply = cluster.ask(async |mut client| client.volume_scrub(request.clone()).await).await?;
    let silent: Vec<String> = reply.bricks.iter().filter(|b| b.status.is_none()).map(place).collect();
    let failed = |done: &str| {
        Failure::failed(format!("these bricks do not answer, and their scrub is not {done}: {}", silent.join(", ")))
    };
    match action {
        ScrubAction::Status => {
            output.show(&to_json(name, &reply), || to_text(name, &reply, now_s()));
            Ok(())
        }
        ScrubAction::Start if !silent.is_empty() => Err(failed("started")),
        ScrubAction::Stop if !silent.is_empty() => Err(failed("stopped")),
        ScrubAction::Start => {
            let say = format!(
                "The bricks of volume {name} are being scrubbed; 'mortar volume scrub {name} status' shows it."
            );
            output.done("scrub started", &say);
            Ok(())
        }
        ScrubAction::Stop => {
            let say =
                format!("No brick of volume {name} is being scrubbed; 'mortar volume scrub {name} start' goes on.");
            output.done("scrub stopped", &say);
            Ok(())
        }
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

fn place(brick: &BrickScrubRow) -> String {
    format!("{}:{}", brick.server, brick.path)
}

fn state(status: &ScrubStatus) -> &'static str {
    match status {
        ScrubStatus { running: true, .. } => "running",
        ScrubStatus { stopped: true, .. } => "stopped",
        _ => "idle",
    }
}

fn to_json(name: &str, reply: &VolumeScrubReply) -> Value {
    let known = |s: u64| (s > 0).then_some(s);
    let brick = |brick: &BrickScrubRow| match &brick.status {
        None => json!({ "server": brick.server, "path": brick.path, "state": "unknown" }),
        Some(status) => json!({
            "server": brick.server, "path": brick.path, "state": state(status),
            "looked_bytes": status.looked_bytes, "total_bytes": status.total_bytes, "rate_bytes": status.rate_bytes,
            "last_finished": known(status.ended_s), "next": known(status.next_s),
            "found": status.found, "undecided": status.undecided,
        }),
    };
    json!({ "volume": name, "bricks": reply.bricks.iter().map(brick).collect::<Vec<_>>() })
}

fn to_text(name: &str, reply: &VolumeScrubReply, now_s: u64) -> String {
    let mut rows =
        table(&["brick", "scrub", "looked at", "rate", "wrong blocks", "undecided", "last finished", "next"]);
    for brick in &reply.bricks {
        let Some(status) = &brick.status else {
            rows.add_row(vec![place(brick).into(), comfy_table::Cell::new("does not answer")]);
            continue;
        };
        let ago = match status.ended_s {
            0 => "never".to_owned(),
            at => format!("{} ago", seconds(now_s.saturating_sub(at))),
        };
        let next = match status.next_s {
            0 => "-".to_owned(),
            at => format!("in {}", seconds(at.saturating_sub(now_s))),
        };
        let rate = if status.rate_bytes == 0 { "-".to_owned() } else { format!("{}/s", bytes(status.rate_bytes)) };
        rows.add_row(vec![
            place(brick).into(),
            state(status).into(),
            number(format!("{} of {}", bytes(status.looked_bytes), bytes(status.total_bytes))),
            number(rate),
            number(status.found.to_string()),
            number(status.undecided.to_string()),
            number(ago),
            number(next),
        ]);
    }
    let mut text = format!("Volume {name}\n\n{}\n", text_of(&rows));
    if reply.bricks.iter().filter_map(|b| b.status.as_ref()).any(|s| s.undecided > 0) {
        text.push_str(
            "\nUndecided: bricks differ, and there is no majority for either. Nothing was changed; the servers' logs name\nthe files and blocks.\n",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrub_shows_how_far_it_is_and_what_nobody_can_decide() {
        let row = |status| BrickScrubRow { server: "s1:7440".into(), path: "/b".into(), status };
        let idle = ScrubStatus { ended_s: 1_000, next_s: 2_000, ..ScrubStatus::default() };
        let running = ScrubStatus {
            running: true,
            looked_bytes: 1 << 20,
            total_bytes: 4 << 20,
            rate_bytes: 1 << 20,
            found: 3,
            ..ScrubStatus::default()
        };
        let reply = VolumeScrubReply { bricks: vec![row(Some(idle)), row(Some(running)), row(None)] };
        let text = to_text("v", &reply, 1_060);
        for part in ["idle", "running", "1.0 MiB of 4.0 MiB", "1.0 MiB/s", "never", "ago", "does not answer"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(!text.contains("Undecided"));
        let torn = ScrubStatus { stopped: true, undecided: 1, ..ScrubStatus::default() };
        let reply = VolumeScrubReply { bricks: vec![row(Some(torn))] };
        assert!(to_text("v", &reply, 1_060).contains("Undecided: bricks differ"));
        assert_eq!(to_json("v", &reply)["bricks"][0]["state"], "stopped");
        assert_eq!(to_json("v", &reply)["bricks"][0]["last_finished"], Value::Null);
    }
}
