//! `mortar-brickd`: a server of a Mortar cluster.

mod config;

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser as _;
use mortar_brickd::bricks::Bricks;
use mortar_brickd::identity::Identity;
use mortar_brickd::janitor;
use mortar_brickd::log::Log;
use mortar_brickd::metrics;
use mortar_brickd::serve::Server;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use config::{Config, Flags};

/// How nice the control plane's threads are: a leader that is not scheduled loses its followers.
const NICENESS: i32 = -10;

fn main() -> ExitCode {
    let config = match Flags::parse().settle() {
        Ok(config) => config,
        Err(e) => {
            eprintln!("mortar-brickd: {e:#}");
            return ExitCode::from(2);
        }
    };
    config::start_log(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .thread_name("control")
        .on_thread_start(|| {
            // Without the right to it, elections take longer under load, and that is all.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
        })
        .enable_all()
        .build();
    let ran = runtime.context("cannot start").and_then(|runtime| {
        let ran = runtime.block_on(run(&config));
        runtime.shutdown_timeout(Duration::from_secs(2));
        ran
    });
    match ran {
        Ok(End::Stopped) => ExitCode::SUCCESS,
        Ok(End::Restart) => {
            // It keeps its process id, its terminal and its supervisor.
            let e = std::process::Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec();
            eprintln!("mortar-brickd: cannot start anew: {e}");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("mortar-brickd: {e:#}");
            ExitCode::FAILURE
        }
    }
}

enum End {
    Stopped,
    Restart,
}

async fn run(config: &Config) -> anyhow::Result<End> {
    let dir = &config.state_dir;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make the state directory {}", dir.display()))?;
    let _lock = lock(dir)?;
    let identity = Identity::load(dir)?;
    let listener = bind(config).await?;
    let address = match &config.advertise {
        Some(address) => address.clone(),
        None => listener.local_addr()?.to_string(),
    };
    let (log, applied) = Log::open(dir, identity.clone(), &address).await?;
    let bricks = Bricks::open(log.clone(), applied, dir)?;
    let server = Server::new(log.clone(), bricks.clone(), address.clone(), dir.clone());
    janitor::start(log.clone(), address.clone());
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve(listener).await }
    });
    if let Some(address) = config.metrics {
        metrics::serve(address, log.clone(), Arc::clone(&bricks)).await?;
    }
    let temporary = dir.join("address.new");
    std::fs::write(&temporary, &address)?;
    std::fs::rename(&temporary, dir.join("address"))?;
    tracing::info!(
        address,
        server = format!("{:x}", identity.server.0),
        cluster = format!("{:032x}", identity.cluster.0),
        "serving"
    );
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let end = tokio::select! {
        _ = terminate.recv() => End::Stopped,
        _ = interrupt.recv() => End::Stopped,
        () = server.restart.notified() => {
            // The answer to the one who asked has to get out first.
            tokio::time::sleep(Duration::from_millis(200)).await;
            End::Restart
        }
        served = serving => return served?.map(|()| End::Stopped),
    };
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tokio::task::spawn_blocking(move || bricks.stop()).await?;
    log.stop().await;
    Ok(end)
}

fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    if rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        anyhow::bail!("the state directory {} is in use by another mortar-brickd; give each its own", dir.display());
    }
    Ok(file)
}

/// Port 0 is any free port at the first start, and the same one from then on: others know this server by it.
async fn bind(config: &Config) -> anyhow::Result<TcpListener> {
    let mut address = config.listen;
    if address.port() == 0
        && let Ok(before) = std::fs::read_to_string(config.state_dir.join("address"))
        && let Some(port) = before.trim().rsplit_once(':').and_then(|(_, port)| port.parse().ok())
    {
        address.set_port(port);
    }
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}
