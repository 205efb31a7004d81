//! `mortar server …`: the cluster's servers.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Subcommand;
use mortar_proto::wire::cluster::{
    Empty, IdentifyReply, ServerAddRequest, ServerListReply, ServerRemoveRequest, ServerRow,
};
use serde_json::json;
use tokio::task::JoinSet;

use crate::address::Address;
use crate::cluster::{Client, Cluster, probe};
use crate::failure::{Failure, Outcome};
use crate::output::{Output, number, seconds, table, text_of};

/// What the servers say when something was never heard.
const NEVER: u32 = u32::MAX;

/// What can be done with servers.
#[derive(Subcommand, Debug)]
pub enum ServerCommand {
    /// Take fresh servers into the cluster
    #[command(
        after_help = "A server that has volumes, or belongs to another cluster, is refused: it would lose them. A fresh \
        server is one whose state directory is new.\n\nExamples:\n  mortar --server s1 server add s2 s3\n  mortar server add 10.0.0.4:7441 '[fd00::5]'"
    )]
    Add {
        /// Where each listens: host or host:port (7440 if none is given; IPv6 in brackets)
        #[arg(required = true, value_name = "HOST[:PORT]")]
        addresses: Vec<String>,
    },
    /// Take a server out of the cluster; refused while it has a brick of a volume
    #[command(after_help = "Example:\n  mortar server remove s4")]
    Remove {
        /// Its address or its id, as 'mortar server list' shows them
        #[arg(value_name = "SERVER")]
        which: String,
    },
    /// Show the servers as the cluster's leader knows them
    List,
    /// Ask every server itself, also when the cluster has no leader
    #[command(
        after_help = "Each server is asked directly, all at once, with 3 s to answer. Use it when other commands say that there \
        is no leader: it shows which servers answer, and whom each takes for the leader."
    )]
    Status,
}

/// Does it.
///
/// # Errors
/// What was refused or failed.
pub async fn run(command: ServerCommand, cluster: &Cluster, output: Output) -> Outcome {
    match command {
        ServerCommand::Add { addresses } => add(cluster, output, &addresses).await,
        ServerCommand::Remove { which } => remove(cluster, output, &which).await,
        ServerCommand::List => {
            let list = cluster.ask(async |mut client| client.server_list(Empty {}).await).await?;
            output.show(&list_json(&list), || list_text(&list));
            Ok(())
        }
        ServerCommand::Status => status(cluster, output).await,
    }
}

async fn add(cluster: &Cluster, output: Output, addresses: &[String]) -> Outcome {
    let mut parsed = Vec::new();
    for address in addresses {
        let address = Address::parse(address).map_err(|why| Failure::usage(format!("{why}.")))?;
        if parsed.contains(&address) {
            return Err(Failure::usage(format!("Server {address} is named twice.")));
        }
        parsed.push(address);
    }
    let mut added = Vec::new();
    for address in &parsed {
        let request = ServerAddRequest { address: address.as_str().to_owned() };
        let reply =
            cluster.change(async |mut client| client.server_add(request.clone()).await).await.map_err(|failure| {
                let before =
                    if added.is_empty() { String::new() } else { format!(" Added before it: {}.", names(&added)) };
                Failure::failed(format!("Server {address} was not added: {failure}{before}"))
            })?;
        added.push((format!("{:x}", reply.server), reply.address));
    }
    let json = json!({ "added": added.iter().map(|(id, address)| json!({ "id": id, "address": address })).collect::<Vec<_>>() });
    output.show(&json, || format!("Added {}.", names(&added)));
    Ok(())
}

fn names(added: &[(String, String)]) -> String {
    added.iter().map(|(_, address)| address.as_str()).collect::<Vec<_>>().join(", ")
}

async fn remove(cluster: &Cluster, output: Output, server: &str) -> Outcome {
    let list = cluster.ask(async |mut client| client.server_list(Empty {}).await).await?;
    let wanted = Address::parse(server).ok();
    let found = list.servers.iter().find(|row| {
        row.id == server || row.address == server || wanted.as_ref().is_some_and(|a| a.as_str() == row.address)
    });
    let Some(found) = found else {
        let known: Vec<_> = list.servers.iter().map(|row| row.address.as_str()).collect();
        return Err(Failure::failed(format!(
            "There is no server '{server}' in the cluster. Its servers are: {}.",
            known.join(", ")
        )));
    };
    let request = ServerRemoveRequest { server: found.id.clone() };
    cluster.change(async |mut client| client.server_remove(request.clone()).await).await?;
    output.done("server removed", &format!("Removed {}. Its daemon can be stopped now.", found.address));
    Ok(())
}

fn list_json(list: &ServerListReply) -> serde_json::Value {
    let row = |row: &ServerRow| {
        json!({
            "id": row.id, "address": row.address, "role": row.role, "reachable": row.reachable,
            "applied": row.applied, "bricks": row.bricks,
            "heard_ms": (row.heard_ms != NEVER).then_some(row.heard_ms),
        })
    };
    json!({ "cluster": list.cluster, "servers": list.servers.iter().map(row).collect::<Vec<_>>() })
}

fn list_text(list: &ServerListReply) -> String {
    let mut rows = table(&["server", "id", "role", "reachable", "heard", "applied", "bricks"]);
    for row in &list.servers {
        let heard = match row.heard_ms {
            NEVER => "never".to_owned(),
            ms if ms < 1000 => format!("{ms} ms ago"),
            ms => format!("{} ago", seconds(u64::from(ms / 1000))),
        };
        let reachable = if row.reachable { "yes" } else { "no" };
        rows.add_row(vec![
            row.address.as_str().into(),
            row.id.as_str().into(),
            row.role.as_str().into(),
            reachable.into(),
            heard.as_str().into(),
            number(row.applied),
            number(row.bricks),
        ]);
    }
    format!("Cluster {}\n\n{}", list.cluster, text_of(&rows))
}

/// Asks the servers that were named and all that the leader, if there is one, knows.
async fn status(cluster: &Cluster, output: Output) -> Outcome {
    let mut addresses = cluster.servers().to_vec();
    let mut answers = probe_each(&addresses).await;
    let leader =
        answers.values().flatten().find(|(_, identity)| !identity.leader.is_empty()).map(|(client, _)| client.clone());
    if let Some(mut client) = leader {
        let listed = tokio::time::timeout(Duration::from_secs(3), client.server_list(Empty {})).await;
        if let Ok(Ok(list)) = listed {
            let told_by_name: Vec<_> =
                answers.values().flatten().map(|(_, identity)| identity.address.clone()).collect();
            let further: Vec<_> = list
                .into_inner()
                .servers
                .iter()
                .filter(|row| !told_by_name.contains(&row.address))
                .filter_map(|row| Address::parse(&row.address).ok())
                .filter(|address| !addresses.contains(address))
                .collect();
            answers.extend(probe_each(&further).await);
            addresses.extend(further);
        }
    }
    let rows: Vec<_> =
        addresses.iter().filter_map(|address| answers.get(address).map(|answer| (address, answer))).collect();
    let json = json!({ "servers": rows.iter().map(|(address, answer)| match answer {
        Ok((_, i)) => json!({ "asked": address.as_str(), "answers": true, "address": i.address, "id": format!("{:x}", i.server), "cluster": i.cluster,
            "leader": (!i.leader.is_empty()).then_some(&i.leader), "servers": i.servers, "volumes": i.volumes, "version": i.version }),
        Err(why) => json!({ "asked": address.as_str(), "answers": false, "reason": why }),
    }).collect::<Vec<_>>() });
    if !rows.iter().any(|(_, answer)| answer.is_ok()) {
        let why: Vec<_> = rows
            .iter()
            .filter_map(|(address, answer)| answer.as_ref().err().map(|why| format!("{address}: {why}")))
            .collect();
        return Err(Failure::failed(format!("No server answered: {}.", why.join("; "))));
    }
    output.show(&json, || status_text(&rows));
    Ok(())
}

/// Who it is, or why it did not say.
type Said = Result<(Client, IdentifyReply), String>;
type Answers = BTreeMap<Address, Said>;

async fn probe_each(addresses: &[Address]) -> Answers {
    let mut asked = JoinSet::new();
    for address in addresses.iter().cloned() {
        asked.spawn(async move {
            let answer = probe(address.clone(), Duration::from_secs(3)).await;
            (address, answer.map(|answer| (answer.client, answer.identity)))
        });
    }
    asked.join_all().await.into_iter().collect()
}

fn status_text(rows: &[(&Address, &Said)]) -> String {
    let mut out = table(&["server", "answers", "leader it knows", "cluster", "servers", "volumes", "version"]);
    for (address, answer) in rows {
        match answer {
            Ok((_, identity)) => {
                let leader = if identity.leader.is_empty() { "none" } else { &identity.leader };
                let cluster: String = identity.cluster.chars().take(8).collect();
                out.add_row(vec![
                    address.as_str().into(),
                    "yes".into(),
                    leader.into(),
                    cluster.as_str().into(),
                    number(identity.servers),
                    number(identity.volumes),
                    identity.version.as_str().into(),
                ]);
            }
            Err(why) => {
                out.add_row(vec![address.as_str(), &format!("no: {why}")]);
            }
        }
    }
    text_of(&out)
}
