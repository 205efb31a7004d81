//! `mortar`, the administrator's command: reads the command line, hands it to one file per noun, and ends with 0 (done), 1
//! (refused or failed) or 2 (called wrongly). It decides nothing about data: everything is asked of the cluster's leader.

mod address;
mod bricks;
mod client;
mod cluster;
mod confirm;
mod contact;
mod failure;
mod heal;
mod options;
mod output;
mod playground;
mod report;
mod scrub;
mod server;
mod volume;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use cluster::Cluster;
use contact::Contact;
use failure::{Failure, Outcome};
use output::Output;

/// Administer a Mortar cluster: servers, volumes, clients, repair
///
/// Mortar keeps the disk images of virtual machines on plain XFS directories of three servers, and gives every hypervisor one
/// POSIX directory that contains them.
#[derive(Parser, Debug)]
#[command(
    name = "mortar",
    version,
    max_term_width = 120,
    after_long_help = "\
Which servers are asked: those of --server, else of MORTAR_SERVERS, else of /etc/mortar/cli.toml (servers = [\"s1\", \"s2\"]), \
else localhost. Any server of the cluster will do; name several, so that the command works while one is down.

Exit codes: 0 done, 1 refused or failed, 2 called wrongly.

Examples: three servers, one volume
  mortar --server s1 server add s2 s3
  mortar --server s1,s2,s3 volume create vmstore replica 3 s1:/b1/d s2:/b1/d s3:/b1/d
  mortar --server s1,s2,s3 volume start vmstore
  mount -t mortar s1,s2,s3:/vmstore /var/lib/libvirt/images
A first look on one machine
  mortar playground up --xfs --mount /mnt/vmstore"
)]
struct Cli {
    /// Servers of the cluster, host or host:port (7440 if none is given), comma-separated
    #[arg(long, global = true, value_delimiter = ',', value_name = "HOST[:PORT],…")]
    server: Vec<String>,
    /// Print JSON instead of tables and sentences
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// The cluster's servers: add, remove, list, status
    #[command(subcommand)]
    Server(server::ServerCommand),
    /// Volumes: create, start, options, state, repair
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Who has volumes mounted: list, evict
    #[command(subcommand)]
    Client(client::ClientCommand),
    /// A cluster with a volume on this one machine, for a first look and for tests
    #[command(subcommand)]
    Playground(playground::PlaygroundCommand),
    /// Print completions for a shell
    #[command(after_help = "Example:\n  mortar completions bash > /etc/bash_completion.d/mortar")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output { json: cli.json };
    match run(cli, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: Cli, output: Output) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("Cannot start: {error}.")))?;
    let contact = || Contact::find(&cli.server).map(Cluster::new);
    match cli.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mortar", &mut script);
            let script = String::from_utf8_lossy(&script).into_owned();
            output.show(&serde_json::json!({ "shell": shell.to_string(), "script": script }), || script.clone());
            Ok(())
        }
        Command::Playground(command) => runtime.block_on(playground::run(command, output)),
        Command::Server(command) => runtime.block_on(server::run(command, &contact()?, output)),
        Command::Client(command) => runtime.block_on(client::run(command, &contact()?, output)),
        Command::Volume(command) => runtime.block_on(volume::run(command, &contact()?, output)),
    }
}
