//! `mortar client …`: who has volumes mounted, what they hold, and ending one that will not end by itself.

use clap::Subcommand;
use mortar_proto::wire::cluster::{ClientEvictRequest, ClientListReply, SessionFile, SessionRow, VolumeRequest};
use serde_json::{Value, json};

use crate::bricks::check_name;
use crate::cluster::Cluster;
use crate::confirm::confirm;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, count, number, seconds, table, text_of};

/// What the servers say when something was never heard.
const NEVER: u32 = u32::MAX;

/// What can be done with clients.
#[derive(Subcommand, Debug)]
pub enum ClientCommand {
    /// Show the clients: who they are, what they have open and may write, what they have under way
    #[command(after_help = "\
A client is a mount. Each has a session with the cluster, kept alive by its signs of life ('heard'). A lease is the right to \
write one file: a client takes it with its first write, and gives it back when another one wants to write, or when it has \
closed the file. 'In flight' are reads and writes that its applications wait for just now. Clients hold no locks on \
byte ranges in the cluster: those are kept by each mount for itself.

The cluster's own janitor, which repairs files that nobody has open, is shown with volume '-'.

Examples:
  mortar client list
  mortar client list vmstore --files")]
    List {
        /// Of this volume; of all if none is given
        volume: Option<String>,
        /// Also which files each has open (O) and holds the lease of (L), at most 200 a client
        #[arg(long)]
        files: bool,
    },
    /// End a client's session for good; asks first
    #[command(after_help = "\
For a host that hangs while it holds what others need, or that is to be kept from writing for certain: once the command is \
done, no brick takes anything from that client any more, even if it wakes up later. What its applications were told is \
written is kept. Its mount stays and answers everything with input/output errors until it is unmounted and mounted again.

A client that is merely gone needs no eviction: its session ends by itself after the volume's 'session-ttl'.

Example:
  mortar client evict 1f --yes")]
    Evict {
        /// Its session, as 'mortar client list' shows it
        session: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

/// Does it.
///
/// # Errors
/// What was refused or failed.
pub async fn run(command: ClientCommand, cluster: &Cluster, output: Output) -> Outcome {
    match command {
        ClientCommand::List { volume, files } => {
            let name = volume.unwrap_or_default();
            if !name.is_empty() {
                check_name(&name)?;
            }
            let reply = list(cluster, &name).await?;
            output.show(&to_json(&reply), || to_text(&reply, files));
            Ok(())
        }
        ClientCommand::Evict { session, yes } => evict(cluster, output, &session, yes).await,
    }
}

async fn list(cluster: &Cluster, name: &str) -> Outcome<ClientListReply> {
    let request = VolumeRequest { name: name.to_owned(), force: false };
    cluster.ask(async |mut client| client.client_list(request.clone()).await).await
}

async fn evict(cluster: &Cluster, output: Output, session: &str, yes: bool) -> Outcome {
    if u64::from_str_radix(session, 16).is_err() {
        return Err(Failure::usage(format!("'{session}' is no session; 'mortar client list' shows them.")));
    }
    let session = session.to_ascii_lowercase();
    let reply = list(cluster, "").await?;
    let Some(row) = reply.clients.iter().find(|row| row.session == session) else {
        return Err(Failure::failed(format!(
            "There is no session {session}; 'mortar client list' shows those there are."
        )));
    };
    let holds = format!("{} open, {}", count(row.open_files, "file"), count(row.leases, "lease"));
    confirm(
        yes,
        &format!(
            "Evicting client {} at {} ({holds}) makes every access to its mount of volume {} fail until it is unmounted and \
             mounted again; guests with disks there crash.",
            row.client, row.address, row.volume
        ),
    )?;
    let request = ClientEvictRequest { session };
    cluster.change(async |mut client| client.client_evict(request.clone()).await).await?;
    output.done("client evicted", &format!("Client {} is evicted: nothing it sends is taken any more.", row.client));
    Ok(())
}

fn to_json(reply: &ClientListReply) -> Value {
    let file = |file: &SessionFile| {
        let path = (!file.path.is_empty()).then_some(&file.path);
        json!({ "path": path, "ino": file.ino, "open": file.open, "lease": file.lease })
    };
    let row = |row: &SessionRow| {
        json!({
            "session": row.session, "client": row.client, "address": row.address,
            "volume": (!row.volume.is_empty()).then_some(&row.volume), "opened_seconds": row.opened_ns / 1_000_000_000,
            "heard_ms": (row.heard_ms != NEVER).then_some(row.heard_ms), "in_flight": row.in_flight,
            "open_files": row.open_files, "leases": row.leases, "files": row.files.iter().map(file).collect::<Vec<_>>(),
        })
    };
    json!({ "clients": reply.clients.iter().map(row).collect::<Vec<_>>() })
}

/// How long ago a moment was, by this machine's clock.
fn since(opened_ns: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    seconds(now.as_secs().saturating_sub(opened_ns / 1_000_000_000))
}

fn to_text(reply: &ClientListReply, files: bool) -> String {
    if reply.clients.is_empty() {
        return "No client has a volume mounted.".to_owned();
    }
    let header = ["session", "client", "address", "volume", "for", "heard", "open files", "leases", "in flight"];
    let mut rows = table(&header);
    for row in &reply.clients {
        let heard = match row.heard_ms {
            NEVER => "never".to_owned(),
            ms if ms < 1000 => format!("{ms} ms ago"),
            ms => format!("{} ago", seconds(u64::from(ms / 1000))),
        };
        rows.add_row(vec![
            row.session.as_str().into(),
            row.client.as_str().into(),
            row.address.as_str().into(),
            if row.volume.is_empty() { "-" } else { &row.volume }.into(),
            number(since(row.opened_ns)),
            number(heard),
            number(row.open_files),
            number(row.leases),
            number(row.in_flight),
        ]);
    }
    let mut text = text_of(&rows);
    for row in reply.clients.iter().filter(|row| files && !row.files.is_empty()) {
        let mut names = table(&["file", ""]);
        for file in &row.files {
            let path = if file.path.is_empty() {
                format!("(inode {}, no name any more)", file.ino)
            } else {
                file.path.clone()
            };
            names.add_row(vec![
                path,
                format!("{}{}", if file.open { "O" } else { "-" }, if file.lease { "L" } else { "-" }),
            ]);
        }
        text.push_str(&format!("\n\nSession {}\n{}", row.session, text_of(&names)));
    }
    text
}
