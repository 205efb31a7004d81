//! `mortar volume …`: what volumes there are, and what is done to them.

use clap::Subcommand;
use mortar_proto::wire::cluster::{VolumeCreateRequest, VolumeInfoReply, VolumeRequest, VolumeRow, VolumeSetRequest};
use serde_json::json;

use crate::bricks::{check_name, parse_layout};
use crate::cluster::Cluster;
use crate::confirm::confirm;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::scrub::ScrubAction;
use crate::{bricks, heal, options, report, scrub};

/// What can be done with volumes.
#[derive(Subcommand, Debug)]
pub enum VolumeCommand {
    /// Make a volume from empty directories on XFS, three a replica set
    #[command(after_help = "\
Each three bricks in a row, in the order given, make one replica set: every file lives on the three bricks of one set. Each brick must be an empty directory (or one that does not exist yet) on an XFS file system, below its mount point, so \
that a disk that is not mounted is noticed and not written beside. S may be host, host:port, or [v6]:port.

--force lifts what is a matter of taste: bricks on the root file system, and one server twice in a set. It never lifts \
what would lose data: a directory that is not empty, or a brick of another volume.

Examples:
  mortar volume create vmstore replica 3 s1:/bricks/b1/data s2:/bricks/b1/data s3:/bricks/b1/data
  mortar volume create vmstore replica 3 s1:/b1/d s2:/b1/d s3:/b1/d s1:/b2/d s2:/b2/d s3:/b2/d")]
    Create {
        /// The volume's name: letters, digits, '.', '-' and '_'
        name: String,
        /// 'replica 3' and the bricks, each SERVER:/path
        #[arg(value_name = "replica 3 S1:/path S2:/path S3:/path")]
        layout: Vec<String>,
        /// Allow bricks on the root file system, and one server twice in a set
        #[arg(long)]
        force: bool,
    },
    /// Let clients mount a volume
    #[command(after_help = "Example:\n  mortar volume start vmstore")]
    Start {
        /// The volume
        name: String,
    },
    /// Shut clients out; asks first
    #[command(
        after_help = "Refused while a client has the volume mounted, unless --force.\n\nExample:\n  mortar volume stop vmstore --yes"
    )]
    Stop {
        /// The volume
        name: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// Also while clients have it mounted: their guests' disks fail
        #[arg(long)]
        force: bool,
    },
    /// Forget a stopped volume; asks first. The files stay on the bricks
    #[command(
        after_help = "The bricks' directories keep their files, plainly readable, and have to be emptied by hand before they can \
        become bricks again.\n\nExample:\n  mortar volume delete vmstore"
    )]
    Delete {
        /// The volume
        name: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// List the volumes, one a line
    List,
    /// Show how volumes were set up: bricks and options
    Info {
        /// The volume; all if none is given
        name: Option<String>,
    },
    /// Show how volumes do just now: bricks, free space, clients
    Status {
        /// The volume; all if none is given
        name: Option<String>,
    },
    /// Set an option; it takes effect at once
    #[command(
        after_help = "'mortar volume options' lists the options.\n\nExample:\n  mortar volume set vmstore auth.allow 10.0.0.0/24,10.0.1.7"
    )]
    Set {
        /// The volume
        name: String,
        /// The option
        key: String,
        /// Its value
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
    /// Show options in force, set or default
    Get {
        /// The volume
        name: String,
        /// The option; all if none is given
        key: Option<String>,
    },
    /// Take an option back to its default
    Reset {
        /// The volume
        name: String,
        /// The option
        key: String,
    },
    /// List the options there are: default, range, meaning
    Options,
    /// Put an empty brick in the place of another, and build it from the others; asks first
    #[command(after_help = "\
For a disk or a server that is gone for good, or is to be taken away. NEW must be an empty directory (or one that does not exist \
yet) on XFS, on a server of the cluster, as for 'volume create'. The old brick is no part of the volume from then on; its \
files stay where they are. The volume stays in use: the new brick takes writes at once and is built beside them; 'mortar volume heal \
NAME watch' shows how far it is. Servers may be restarted meanwhile.

Refused when no other brick of the same replica set that is in sync is heard, for nothing could be built from; and, unless \
--force, when the old brick is in sync and only one other is, for the new one is no copy before it is built.

Example:
  mortar volume replace-brick vmstore s2:/bricks/b1/data s4:/bricks/b1/data")]
    ReplaceBrick {
        /// The volume
        name: String,
        /// The brick that goes, SERVER:/path
        old: String,
        /// The one that comes, SERVER:/path
        new: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// Also when one good copy is left, on the root file system, and twice on one server
        #[arg(long)]
        force: bool,
    },
    /// Build a brick anew in its own directory, whose disk is a new one; asks first
    #[command(after_help = "\
After a disk was replaced: mount the new, empty file system where the old one was, and say this. The directory must be empty (or not \
be there); one that still holds the brick's files is refused: empty it first, its '.mortar' too. Everything else is as for \
'mortar volume replace-brick'.

A brick whose directory is found empty is never taken for a brick with empty files: it stays out until this is said.

Example:
  mortar volume reset-brick vmstore s2:/bricks/b1/data")]
    ResetBrick {
        /// The volume
        name: String,
        /// The brick, SERVER:/path
        brick: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// Also when one good copy is left, on the root file system, and twice on one server
        #[arg(long)]
        force: bool,
    },
    /// Repair bricks that lack something: now, with a look at how it goes on
    #[command(
        args_conflicts_with_subcommands = false,
        after_help = "\
A brick that comes back is repaired by itself; nothing has to be started. Without an action, 'heal' has bricks come back at once \
that would wait a while because they have failed again and again, and tells what the others wait for.

Examples:
  mortar volume heal vmstore
  mortar volume heal vmstore info
  mortar volume heal vmstore watch"
    )]
    Heal {
        /// The volume
        name: String,
        /// What to do; without one, repair starts now
        #[command(subcommand)]
        action: Option<HealAction>,
    },
    /// Read all data, to find and repair what disks have changed
    #[command(
        after_help = "Every brick reads all it has, compares it with its checksums, and these with those of the other bricks. What is \
        wrong is repaired from another brick; a brick is wrong, too, when it differs from two that agree. Where bricks differ and no \
        two agree, nothing is changed, and 'status' counts it as undecided.\n\n\
        A scrub begins by itself an interval after the last one (option scrub.interval), reads at most scrub.rate, and gives way \
        to load.\n\nExample:\n  mortar volume scrub vmstore start"
    )]
    Scrub {
        /// The volume
        name: String,
        /// What to do
        #[command(subcommand)]
        action: ScrubAction,
    },
}

/// What can be done about repair.
#[derive(Subcommand, Debug)]
pub enum HealAction {
    /// Show what each brick lacks: regions (of 1 MiB), bytes, how fast they come, how long it will take, which files
    Info,
    /// Show it each second until nothing is left to heal
    #[command(after_help = "\
Ends by itself, with exit code 0, when every brick is in sync. On a terminal the table is drawn anew; elsewhere each brick that lacks \
something is a line each second, and with --json a line is one object as 'info' prints it. A leader that dies meanwhile is no end.")]
    Watch,
    /// Go on with one brick though others that had more are gone; tells what is lost, and asks
    #[command(after_help = "\
The last resort, when bricks that were in sync will not come back and I/O waits for them. BRICK, whose server must be up, becomes the one \
that is in sync, as it is. The others are made equal to it when they come back, whatever they have; those whose disks are gone can be \
replaced then. Reads work again at once, writes when a second brick is in sync or being repaired.

Refused while a brick that is in sync is heard, for then nothing has to be given up.

Example:
  mortar volume heal vmstore accept-data-loss s3:/bricks/b1/data")]
    AcceptDataLoss {
        /// The brick that is taken, SERVER:/path
        brick: String,
        /// Do not ask
        #[arg(long)]
        yes_i_lose_data: bool,
    },
    /// Compare all bricks with each other, all of their data
    #[command(after_help = "\
One brick of each replica set after the other stops serving reads, reads all it has, and gets back from another one what does not \
match its checksums or differs. It takes writes meanwhile, so two good copies stay at any time. When a brick is out, or fails, the \
comparison waits. 'info' and 'watch' show how far it is; it goes on by itself after restarts.")]
    Full,
}

/// Does it.
///
/// # Errors
/// What was refused or failed.
pub async fn run(command: VolumeCommand, cluster: &Cluster, output: Output) -> Outcome {
    match command {
        VolumeCommand::Create { name, layout, force } => create(cluster, output, name, &layout, force).await,
        VolumeCommand::Start { name } => {
            let request = named(&name)?;
            cluster.change(async |mut client| client.volume_start(request.clone()).await).await?;
            output.done("volume started", &format!("Volume {name} is started: clients can mount it."));
            Ok(())
        }
        VolumeCommand::Stop { name, yes, force } => {
            let request = VolumeRequest { force, ..named(&name)? };
            confirm(yes, &format!("Stopping volume {name} makes its files unavailable to every client."))?;
            cluster.change(async |mut client| client.volume_stop(request.clone()).await).await?;
            output.done("volume stopped", &format!("Volume {name} is stopped."));
            Ok(())
        }
        VolumeCommand::Delete { name, yes } => {
            let request = named(&name)?;
            confirm(
                yes,
                &format!("Deleting volume {name} makes the cluster forget it; the files stay on its bricks."),
            )?;
            cluster.change(async |mut client| client.volume_delete(request.clone()).await).await?;
            output.done("volume deleted", &format!("Volume {name} is deleted. Its files are still on its bricks."));
            Ok(())
        }
        VolumeCommand::List => {
            let reply = infos(cluster, None).await?;
            output.show(&report::list_json(&reply), || report::list_text(&reply));
            Ok(())
        }
        VolumeCommand::Info { name } => {
            let reply = infos(cluster, name.as_deref()).await?;
            output.show(&report::info_json(&reply), || report::info_text(&reply));
            Ok(())
        }
        VolumeCommand::Status { name } => {
            let request = match &name {
                Some(name) => named(name)?,
                None => VolumeRequest::default(),
            };
            let reply = cluster.ask(async |mut client| client.volume_status(request.clone()).await).await?;
            output.show(&report::status_json(&reply), || report::status_text(&reply));
            Ok(())
        }
        VolumeCommand::Set { name, key, value } => {
            let request = VolumeSetRequest { name: named(&name)?.name, key, value, reset: false };
            options::check(&request.key, &request.value)?;
            cluster.change(async |mut client| client.volume_set(request.clone()).await).await?;
            output.done("option set", &format!("{} of volume {name} is now {}.", request.key, request.value));
            Ok(())
        }
        VolumeCommand::Reset { name, key } => {
            let request = VolumeSetRequest { name: named(&name)?.name, key, value: String::new(), reset: true };
            let option = options::find(&request.key)?;
            cluster.change(async |mut client| client.volume_set(request.clone()).await).await?;
            output.done("option reset", &format!("{} of volume {name} is {} again.", option.key, option.default));
            Ok(())
        }
        VolumeCommand::Get { name, key } => get(cluster, output, &name, key.as_deref()).await,
        VolumeCommand::Options => {
            output.show(&options::table_json(), options::table_text);
            Ok(())
        }
        VolumeCommand::ReplaceBrick { name, old, new, yes, force } => {
            bricks::replace(cluster, output, bricks::Replacing { name, old, new: Some(new), yes, force }).await
        }
        VolumeCommand::ResetBrick { name, brick, yes, force } => {
            bricks::replace(cluster, output, bricks::Replacing { name, old: brick, new: None, yes, force }).await
        }
        VolumeCommand::Heal { name, action } => {
            let request = named(&name)?;
            match action {
                None => heal::start(cluster, output, request).await,
                Some(HealAction::Info) => heal::info(cluster, output, &name).await,
                Some(HealAction::Full) => {
                    cluster.change(async |mut client| client.heal_full(request.clone()).await).await?;
                    output.done(
                        "comparison started",
                        &format!(
                            "All bricks of volume {name} are compared, one of a replica set at a time. 'mortar volume heal {name} watch' \
                             shows how far it is."
                        ),
                    );
                    Ok(())
                }
                Some(HealAction::AcceptDataLoss { brick, yes_i_lose_data }) => {
                    bricks::accept_loss(cluster, output, &name, &brick, yes_i_lose_data).await
                }
                Some(HealAction::Watch) => heal::watch(cluster, output, &name).await,
            }
        }
        VolumeCommand::Scrub { name, action } => {
            named(&name)?;
            scrub::run(cluster, output, &name, action).await
        }
    }
}

/// A request about one volume, its name checked.
fn named(name: &str) -> Outcome<VolumeRequest> {
    check_name(name)?;
    Ok(VolumeRequest { name: name.to_owned(), force: false })
}

async fn create(cluster: &Cluster, output: Output, name: String, layout: &[String], force: bool) -> Outcome {
    check_name(&name)?;
    let bricks = parse_layout(layout, force)?;
    let specs = bricks.iter().map(crate::bricks::Brick::to_spec).collect();
    let request = VolumeCreateRequest { name: name.clone(), replica: 3, bricks: specs, force };
    cluster.change(async |mut client| client.volume_create(request.clone()).await).await?;
    output.done(
        "volume created",
        &format!("Volume {name} is created. 'mortar volume start {name}' lets clients mount it."),
    );
    Ok(())
}

async fn infos(cluster: &Cluster, name: Option<&str>) -> Outcome<VolumeInfoReply> {
    let request = match name {
        Some(name) => named(name)?,
        None => VolumeRequest::default(),
    };
    cluster.ask(async |mut client| client.volume_info(request.clone()).await).await
}

async fn get(cluster: &Cluster, output: Output, name: &str, key: Option<&str>) -> Outcome {
    let wanted = match key {
        Some(key) => vec![options::find(key)?],
        None => options::all().iter().collect(),
    };
    let reply = infos(cluster, Some(name)).await?;
    let Some(volume) = reply.volumes.first() else {
        return Err(Failure::failed(format!("There is no volume '{name}'.")));
    };
    let rows: Vec<_> = wanted
        .iter()
        .map(|option| {
            let set = volume.options.get(option.key).map(String::as_str);
            (option.key, set.unwrap_or(option.default), set.is_some())
        })
        .collect();
    let json = json!({ "volume": name, "options": rows.iter().map(|(key, value, set)| {
        json!({ "key": key, "value": value, "set": set })
    }).collect::<Vec<_>>() });
    output.show(&json, || {
        if let (Some(_), [(_, value, _)]) = (key, rows.as_slice()) {
            return (*value).to_owned();
        }
        let mut table = crate::output::table(&["option", "value", ""]);
        for (key, value, set) in &rows {
            table.add_row(vec![*key, value, if *set { "set" } else { "default" }]);
        }
        crate::output::text_of(&table)
    });
    Ok(())
}

/// How many replica sets a volume has.
pub fn sets(volume: &VolumeRow) -> u64 {
    volume.bricks.iter().map(|brick| u64::from(brick.set) + 1).max().unwrap_or(0)
}
