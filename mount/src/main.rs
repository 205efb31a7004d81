//! `mortar-mount`: one volume as a FUSE file system.
//!
//! | file | owns |
//! | --- | --- |
//! | `main` | the command line, and the order in which a mount comes and goes |
//! | `source` | `SERVER,SERVER:/VOLUME` |
//! | `options` | what stands after `-o` |
//! | `mountpoint` | mount(2), and what may be mounted upon |
//! | `detach` | the background |
//! | `log` | where the log goes |
//! | `fuse` | the kernel's requests, decoded, and their replies |
//! | `fs` | what each file operation means, on a `mortar_proto::client::Volume` |
//!
//! Exit codes: 0, 1 when the volume cannot be mounted, 2 when the command line is wrong.

mod detach;
mod fs;
mod fuse;
mod log;
mod mountpoint;
mod options;
mod source;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use mortar_proto::client::{MountOptions, Volume};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::detach::Waiter;
use crate::options::Options;
use crate::source::Source;

/// Mounts a Mortar volume.
///
/// The mount is in the background when the command returns, and ready. It ends with 'umount PATH'.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// Servers and volume.
    #[arg(help = "Servers and volume: SERVER[:PORT][,SERVER…]:/VOLUME. Any one server that answers suffices")]
    source: String,
    /// The directory on which to mount.
    path: PathBuf,
    /// Mount options, as in fstab: ro, nosuid, nodev, noexec, noatime, sync and the like; context=, fscontext=,
    /// defcontext= and rootcontext= for SELinux; log-file=FILE; log-level=LEVEL. What only concerns mount(8) or systemd
    /// (_netdev, nofail, noauto, user, x-…) is left out.
    #[arg(short = 'o', value_name = "OPTION,OPTION…")]
    options: Vec<String>,
    /// Stay in the foreground, log to standard error, tell systemd when ready.
    #[arg(short, long)]
    foreground: bool,
    /// Write the log to this file. Without it: standard error in the foreground, else a file in /var/log/mortar if that
    /// folder is there.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// How much to log: error, warn, info, debug or trace. RUST_LOG overrides it.
    #[arg(long, value_name = "LEVEL", value_parser = options::check_level)]
    log_level: Option<String>,
}

/// A command line that makes sense.
struct Order {
    source: Source,
    path: PathBuf,
    options: Options,
    log_file: Option<PathBuf>,
    log_level: String,
}

impl Order {
    fn check(arguments: &Arguments) -> Result<Self, String> {
        let source = Source::parse(&arguments.source)?;
        let options = options::parse(&arguments.options)?;
        let path = mountpoint::check(&arguments.path)?;
        let mut log_file = arguments.log_file.clone().or_else(|| options.log_file.clone());
        if log_file.is_none() && !arguments.foreground {
            log_file = log::default_file(&path);
        }
        // The background process runs in the root directory.
        let log_file = log_file
            .map(std::path::absolute)
            .transpose()
            .map_err(|e| format!("the log file's path makes no sense: {e}."))?;
        let log_level = arguments.log_level.clone().or_else(|| options.log_level.clone()).unwrap_or("info".into());
        Ok(Self { source, path, options, log_file, log_level })
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let order = match Order::check(&arguments) {
        Ok(order) => order,
        Err(sentence) => {
            eprintln!("mortar-mount: {sentence}");
            return ExitCode::from(2);
        }
    };
    if arguments.foreground {
        return run(&order, Waiter::NOBODY);
    }
    // SAFETY: nothing before this line starts a thread.
    unsafe { detach::detach(|waiter| run(&order, waiter)) }
}

/// Mounts, serves until the mount is gone, and tells `waiter` in between.
fn run(order: &Order, waiter: Waiter) -> ExitCode {
    let started = log::start(order.log_file.as_deref(), &order.log_level).and_then(|()| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("names")
            .enable_all()
            .build()
            .map_err(|e| format!("no threads can be started: {e}."))
    });
    let runtime = match started {
        Ok(runtime) => runtime,
        Err(sentence) => {
            waiter.failed(&sentence);
            return ExitCode::FAILURE;
        }
    };
    let volume = match runtime.block_on(Volume::mount(client(order))) {
        Ok(volume) => volume,
        Err(e) => {
            waiter.failed(&e.to_string());
            return ExitCode::FAILURE;
        }
    };
    let code = match connect(order, &runtime, Arc::clone(&volume)) {
        Ok(session) => {
            unmount_on_signal(order.path.clone(), &runtime);
            serve(order, waiter, session)
        }
        Err(sentence) => {
            waiter.failed(&sentence);
            ExitCode::FAILURE
        }
    };
    runtime.block_on(volume.close());
    code
}

/// What the cluster knows this mount by.
fn client(order: &Order) -> MountOptions {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    MountOptions {
        servers: order.source.servers.clone(),
        volume: order.source.volume.clone(),
        client: format!("{host}:{} (process {})", order.path.display(), std::process::id()),
    }
}

/// Mounts, and agrees with the kernel on how to talk.
fn connect(order: &Order, runtime: &Runtime, volume: Arc<Volume>) -> Result<fuse::Session, String> {
    let fs = fs::Fs::new(volume, runtime.handle().clone());
    let kernel = mountpoint::mount(&order.source.text, &order.path, &order.options)?;
    fuse::session(fs, kernel).map_err(|e| {
        let _ = mountpoint::unmount(&order.path);
        format!("the kernel and this program do not agree on FUSE: {e}.")
    })
}

/// Serves the kernel's requests until the mount is gone.
fn serve(order: &Order, waiter: Waiter, session: fuse::Session) -> ExitCode {
    tracing::info!("{} is mounted on {}", order.source.text, order.path.display());
    if let Err(e) = waiter.ready() {
        tracing::warn!("whoever waits for the mount could not be told that it is ready: {e}");
    }
    let result = session.run();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    match result {
        Ok(()) => {
            tracing::info!("{} is unmounted", order.path.display());
            ExitCode::SUCCESS
        }
        Err(e) => {
            tracing::error!("the connection to the kernel broke: {e}");
            // Requests that nobody serves any more must fail rather than hang.
            let _ = mountpoint::unmount(&order.path);
            ExitCode::FAILURE
        }
    }
}

/// SIGTERM and SIGINT unmount; while files are open, the mount leaves the tree and the process goes on until they are
/// closed. A second signal ends it at once, and whoever has files open gets errors.
fn unmount_on_signal(path: PathBuf, runtime: &Runtime) {
    runtime.spawn(async move {
        let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            tracing::warn!("signals cannot be caught; use umount to end the mount");
            return;
        };
        for first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if !first {
                tracing::error!("told a second time to end: ending with files open");
                std::process::exit(1);
            }
            let path = path.clone();
            // umount(2) waits for the kernel, which may wait for us.
            tokio::task::spawn_blocking(move || {
                if let Err(sentence) = mountpoint::unmount(&path) {
                    tracing::error!("{sentence}");
                }
            });
        }
    });
}
