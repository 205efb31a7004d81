//! `mortar playground …`: servers, a volume and a mount on this one machine, for a first look, demos, tests and
//! benchmarks.
//!
//! | file | owns |
//! | --- | --- |
//! | `record` | `playground.json`: what was started, so that all of it can be undone |
//! | `process` | processes: start, find again, signal, never another one's pid |
//! | `disk` | what is mounted; images with XFS on them |
//! | `up` | starting all of it, and one daemon again |
//! | `down` | undoing all of it |

mod disk;
mod down;
mod process;
mod record;
mod up;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::failure::{Failure, Outcome};
use crate::output::{Output, table, text_of};
use record::{Playground, Server};

/// The playground's volume.
const VOLUME: &str = "vmstore";

/// What can be done with a playground.
#[derive(Subcommand, Debug)]
pub enum PlaygroundCommand {
    /// Start servers, make and start the volume 'vmstore', mount it if asked to
    #[command(after_help = "\
Starts mortar-brickd processes on the loopback address with ports of the kernel's choice, joins them to one cluster, and \
makes the volume 'vmstore' with one brick on each. When anything fails, what was started is undone.

Bricks need XFS. With --xfs (as root) each gets a file system of its own in a sparse file; else they are directories \
under DIR, which must then be on XFS.

Examples:
  mortar playground up --xfs --mount /mnt/vmstore
  mortar playground up --dir /xfs/play --servers 6 --brick-size 20G")]
    Up(UpArgs),
    /// Show what runs, where it listens, and what is mounted
    Status(Place),
    /// Stop and remove everything that 'up' made; also what is left of one that failed
    Down(Place),
    /// Kill server N's daemon with SIGKILL, as a crash does
    #[command(
        after_help = "Example: a crash and the way back\n  mortar playground kill 2\n  mortar volume heal vmstore info\n  mortar playground start 2"
    )]
    Kill {
        /// The server's number, from 1
        n: u32,
        /// SIGTERM instead, and wait: a clean shutdown
        #[arg(long)]
        clean: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Stop server N's daemon with SIGSTOP, as a hung machine does
    Stop {
        /// The server's number, from 1
        n: u32,
        #[command(flatten)]
        place: Place,
    },
    /// Let server N's daemon go on with SIGCONT
    Cont {
        /// The server's number, from 1
        n: u32,
        #[command(flatten)]
        place: Place,
    },
    /// Start server N's daemon again, on its old address
    Start {
        /// The server's number, from 1
        n: u32,
        #[command(flatten)]
        place: Place,
    },
}

/// Where the playground is.
#[derive(Args, Debug, Clone)]
pub struct Place {
    /// The playground's directory
    #[arg(long, default_value = "/var/tmp/mortar-playground")]
    dir: PathBuf,
}

/// What `up` is told.
#[derive(Args, Debug, Clone)]
pub struct UpArgs {
    #[command(flatten)]
    place: Place,
    /// How many servers, from 3 to 15; each three make a replica set
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(3..=15))]
    servers: u32,
    /// Give each brick an XFS of its own, in a sparse file (needs root)
    #[arg(long)]
    xfs: bool,
    /// Mount the volume here
    #[arg(long, value_name = "PATH")]
    mount: Option<PathBuf>,
    /// The size of each brick with --xfs, at least 512M; grows only as it fills
    #[arg(long, default_value = "10G", value_parser = parse_size, value_name = "SIZE")]
    brick_size: u64,
}

/// Reads `512M`, `10G`, `1T`.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size: write a number and M, G or T, for example 10G");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => return Err(wrong()),
    };
    let size = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(wrong)?;
    if size < 512 << 20 { Err(format!("{text} is too small for an XFS: at least 512M")) } else { Ok(size) }
}

/// Does it.
///
/// # Errors
/// What was refused or failed.
pub async fn run(command: PlaygroundCommand, output: Output) -> Outcome {
    match command {
        PlaygroundCommand::Up(args) => up::up(&args, output).await,
        PlaygroundCommand::Status(place) => {
            let playground = existing(&place)?;
            output.show(&to_json(&playground), || to_text(&playground));
            Ok(())
        }
        PlaygroundCommand::Down(place) => down::down(&place.dir, output),
        PlaygroundCommand::Kill { n, clean, place } => {
            let playground = existing(&place)?;
            let server = server(&playground, n)?;
            let how = if clean { process::End::Clean } else { process::End::Kill };
            process::end(running(server)?, how).map_err(Failure::Failed)?;
            let word = if clean { "shut down" } else { "killed" };
            output.done(
                "server killed",
                &format!("Server {n} ({}) is {word}. 'mortar playground start {n}' brings it back.", server.address),
            );
            Ok(())
        }
        PlaygroundCommand::Stop { n, place } => {
            running(server(&existing(&place)?, n)?)?.stop().map_err(Failure::Failed)?;
            output.done(
                "server stopped",
                &format!("Server {n} hangs (SIGSTOP). 'mortar playground cont {n}' lets it go on."),
            );
            Ok(())
        }
        PlaygroundCommand::Cont { n, place } => {
            running(server(&existing(&place)?, n)?)?.signal(Signal::CONT).map_err(Failure::Failed)?;
            output.done("server continued", &format!("Server {n} goes on (SIGCONT)."));
            Ok(())
        }
        PlaygroundCommand::Start { n, place } => up::start_again(&mut existing(&place)?, n, output).await,
    }
}

fn existing(place: &Place) -> Outcome<Playground> {
    Playground::load(&place.dir)?.ok_or_else(|| {
        Failure::failed(format!(
            "There is no playground in {}. 'mortar playground up --dir {0}' starts one.",
            place.dir.display()
        ))
    })
}

fn server(playground: &Playground, n: u32) -> Outcome<&Server> {
    playground.servers.iter().find(|server| server.number == n).ok_or_else(|| {
        Failure::usage(format!(
            "There is no server {n}: this playground has servers 1 to {}.",
            playground.servers.len()
        ))
    })
}

fn running(server: &Server) -> Outcome<process::Id> {
    match server.process {
        Some(id) if id.is_alive() => Ok(id),
        _ => Err(Failure::failed(format!(
            "Server {} does not run. 'mortar playground start {0}' starts it.",
            server.number
        ))),
    }
}

/// What a process does just now, in a word.
fn life(id: Option<process::Id>) -> &'static str {
    match id.and_then(process::Id::state) {
        Some('T') => "stopped",
        Some(_) => "running",
        None => "dead",
    }
}

fn to_json(playground: &Playground) -> Value {
    let servers: Vec<_> = playground
        .servers
        .iter()
        .map(|server| {
            json!({
                "number": server.number, "address": server.address, "pid": server.process.map(|id| id.pid),
                "state": life(server.process), "brick": server.brick, "log": server.log, "state_dir": server.state_dir,
                "image": server.disk.as_ref().map(|disk| &disk.image),
            })
        })
        .collect();
    let mount = playground.mount.as_ref().map(|mount| {
        json!({
            "path": mount.path, "pid": mount.process.map(|id| id.pid), "state": life(mount.process),
            "mounted": disk::is_mortar_mount(&mount.path), "log": mount.log,
        })
    });
    json!({
        "dir": playground.dir, "complete": playground.complete, "volume": VOLUME,
        "mortar_servers": playground.addresses(), "servers": servers, "mount": mount,
    })
}

fn to_text(playground: &Playground) -> String {
    let mut rows = table(&["server", "state", "pid", "address", "brick", "log"]);
    for server in &playground.servers {
        rows.add_row(vec![
            server.number.to_string(),
            life(server.process).to_owned(),
            server.process.map_or_else(|| "-".to_owned(), |id| id.pid.to_string()),
            server.address.clone(),
            server.brick.display().to_string(),
            server.log.display().to_string(),
        ]);
    }
    let mut text = format!("Playground in {}, volume {VOLUME}\n\n{}\n", playground.dir.display(), text_of(&rows));
    if let Some(mount) = &playground.mount {
        let mounted = if disk::is_mortar_mount(&mount.path) { "mounted at" } else { "NOT mounted at" };
        text.push_str(&format!("\n{VOLUME} is {mounted} {} (log {})\n", mount.path.display(), mount.log.display()));
    }
    if !playground.complete {
        text.push_str("\n'up' has not finished, or failed. 'mortar playground down' removes what is there.\n");
    }
    let dir = if playground.dir == std::path::Path::new("/var/tmp/mortar-playground") {
        String::new()
    } else {
        format!(" --dir {}", playground.dir.display())
    };
    text.push_str(&format!(
        "\nTo talk to it:\n  export MORTAR_SERVERS={}\n  mortar volume status {VOLUME}\nTo end it:\n  mortar playground down{dir}\n",
        playground.addresses()
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn a_brick_size_has_a_unit_and_room_for_an_xfs() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("10G"), Ok(10 << 30));
        assert!(parse_size("10").unwrap_err().contains("no size"));
        assert!(parse_size("").unwrap_err().contains("no size"));
        assert!(parse_size("1é").unwrap_err().contains("no size"));
        assert!(parse_size("99999999999T").unwrap_err().contains("no size"));
        assert!(parse_size("300M").unwrap_err().contains("too small"));
    }
}
