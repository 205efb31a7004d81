//! What the daemon is told: flags, and a TOML file with the same keys, which flags override.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Parser;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

/// Serves the bricks of this server and its share of the cluster's metadata log. A fresh one is a cluster of one; `mortar
/// server add` takes it into another.
#[derive(Parser, Debug, Default)]
#[command(name = "mortar-brickd", version)]
pub struct Flags {
    /// Where the server keeps its identity and the metadata log
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where to listen; port 0 takes any free one and keeps it
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// How clients and other servers reach this one, if not by the address it listens on, or, when that is every address, by
    /// the host name
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where to serve metrics for Prometheus, in the text format of OpenMetrics, at /metrics; nowhere unless told
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<String>,
    /// A TOML file with the same keys (state-dir, listen, advertise, metrics, log-level, log-json)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What to log: error, warn, info, debug, trace, or a filter as in RUST_LOG, which overrides it
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Log as JSON, a line each
    #[arg(long)]
    log_json: bool,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Filed {
    state_dir: Option<PathBuf>,
    listen: Option<String>,
    advertise: Option<String>,
    metrics: Option<String>,
    log_level: Option<String>,
    log_json: Option<bool>,
}

/// What holds.
#[derive(Debug)]
pub struct Config {
    pub state_dir: PathBuf,
    pub listen: SocketAddr,
    pub advertise: Option<String>,
    pub metrics: Option<SocketAddr>,
    log_level: String,
    log_json: bool,
}

/// The host name and the port, when every address is listened on.
fn own_name(listen: SocketAddr) -> Option<String> {
    let name = rustix::system::uname();
    let name = name.nodename().to_str().ok()?;
    let is_name = !name.is_empty() && name != "localhost" && name != "(none)";
    (listen.ip().is_unspecified() && listen.port() != 0 && is_name).then(|| format!("{name}:{}", listen.port()))
}

impl Flags {
    /// Flags and file together.
    ///
    /// # Errors
    /// A sentence about what is missing or wrong.
    pub fn settle(self) -> anyhow::Result<Config> {
        let filed = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                toml::from_str(&text).with_context(|| format!("{} makes no sense", path.display()))?
            }
            None => Filed::default(),
        };
        let state_dir = self.state_dir.or(filed.state_dir).context("no state directory: give --state-dir DIR")?;
        let listen = self.listen.or(filed.listen).context("no address to listen on: give --listen ADDR:PORT")?;
        let listen: SocketAddr = listen.parse().with_context(|| {
            format!("{listen:?} is no address to listen on; write an IP address and a port, like 10.0.0.1:7440")
        })?;
        let advertise = self.advertise.or(filed.advertise).or_else(|| own_name(listen));
        if let Some(address) = &advertise
            && !address
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
        {
            bail!("{address:?} cannot be advertised; write a host and a port, like s1.example.org:7440");
        }
        if advertise.is_none() && listen.ip().is_unspecified() {
            bail!(
                "{} is every address of this server, and its host name {:?} is none that others could reach: give \
                 --advertise HOST:PORT",
                listen.ip(),
                rustix::system::uname().nodename()
            );
        }
        let metrics = match self.metrics.or(filed.metrics) {
            Some(text) => Some(text.parse().with_context(|| {
                format!(
                    "{text:?} is no address to serve metrics on; write an IP address and a port, like 127.0.0.1:7441"
                )
            })?),
            None => None,
        };
        let log_level = self.log_level.or(filed.log_level).unwrap_or_else(|| "info".into());
        EnvFilter::try_new(&log_level)
            .with_context(|| format!("{log_level:?} is no log level; use error, warn, info, debug or trace"))?;
        Ok(Config {
            state_dir,
            listen,
            advertise,
            metrics,
            log_level,
            log_json: self.log_json || filed.log_json.unwrap_or(false),
        })
    }
}

/// Starts logging to stderr.
pub fn start_log(config: &Config) {
    let filter = EnvFilter::try_from_default_env()
        .or_else(|_| EnvFilter::try_new(format!("{},openraft=off,h2=error", config.log_level)))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    if config.log_json {
        log.json().init();
    } else {
        log.init();
    }
}
