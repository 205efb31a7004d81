//! Metrics of this server and its bricks, for Prometheus: made when they are asked for, from what the bricks know anyway.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use mortar_proto::BrickState;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;

use crate::bricks::{Bricks, Figures};
use crate::log::Log;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const STATES: [(BrickState, &str); 3] =
    [(BrickState::InSync, "in-sync"), (BrickState::Syncing, "syncing"), (BrickState::Out, "out")];

/// Serves them at `/metrics`, until the process ends; tells where.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(address: SocketAddr, log: Log, bricks: Arc<Bricks>) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot serve metrics on {address}"))?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "serving metrics");
    let answer = move || {
        let (log, bricks) = (log.clone(), Arc::clone(&bricks));
        // A look at the bricks may wait for locks.
        async move {
            match tokio::task::spawn_blocking(move || text(log, bricks)).await {
                Ok(Ok(text)) => Ok(([(CONTENT_TYPE, OPENMETRICS)], text)),
                _ => Err(StatusCode::INTERNAL_SERVER_ERROR),
            }
        }
    };
    tokio::spawn(axum::serve(listener, Router::new().route("/metrics", get(answer))).into_future());
    Ok(address)
}

/// All of them, in the text format of OpenMetrics.
///
/// # Errors
/// None that is known: formatting into a string does not fail.
fn text(log: Log, bricks: Arc<Bricks>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("mortar");
    registry.register_collector(Box::new(Metrics { log, bricks }));
    let mut told = String::new();
    text::encode(&mut told, &registry)?;
    Ok(told)
}

struct Metrics {
    log: Log,
    bricks: Arc<Bricks>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// One family: a figure of every brick that has it.
struct Family {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    of: fn(&Figures) -> Option<u64>,
}

const FAMILIES: &[Family] = &[
    Family {
        name: "brick_up",
        help: "Whether the brick is open and its disk has not failed",
        unit: None,
        kind: MetricType::Gauge,
        of: |f| Some(u64::from(f.open.as_ref().is_some_and(|(_, beat, _)| beat.failed.is_empty()))),
    },
    Family {
        name: "brick_size",
        help: "Size of the brick's file system",
        unit: Some(Unit::Bytes),
        kind: MetricType::Gauge,
        of: |f| f.open.as_ref().map(|(_, beat, _)| beat.total_bytes),
    },
    Family {
        name: "brick_free",
        help: "Free space of the brick's file system",
        unit: Some(Unit::Bytes),
        kind: MetricType::Gauge,
        of: |f| f.open.as_ref().map(|(_, beat, _)| beat.free_bytes),
    },
    Family {
        name: "brick_missed_regions",
        help: "Regions of 1 MiB that this brick knows another one to miss",
        unit: None,
        kind: MetricType::Gauge,
        of: |f| f.open.as_ref().map(|(_, beat, _)| beat.missed_regions),
    },
    Family {
        name: "brick_repaired",
        help: "What the brick got back from others since it began to be repaired last",
        unit: Some(Unit::Bytes),
        kind: MetricType::Gauge,
        of: |f| f.open.as_ref().map(|(_, beat, _)| beat.repaired_bytes),
    },
    Family {
        name: "brick_corrupt_blocks",
        help: "Blocks of 4 KiB that are known not to match their checksums just now",
        unit: None,
        kind: MetricType::Gauge,
        of: |f| f.open.as_ref().map(|(_, _, corrupt)| corrupt.left),
    },
    Family {
        name: "brick_corrupt_blocks_found",
        help: "Blocks that were found not to match their checksums",
        unit: None,
        kind: MetricType::Counter,
        of: |f| f.open.as_ref().map(|(_, _, corrupt)| corrupt.found),
    },
    Family {
        name: "brick_corrupt_blocks_repaired",
        help: "Corrupt blocks that were repaired",
        unit: None,
        kind: MetricType::Counter,
        of: |f| f.open.as_ref().map(|(_, _, corrupt)| corrupt.repaired),
    },
];

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let leads = ConstGauge::new(i64::from(self.log.is_leader()));
        let help = "Whether this server leads the metadata log";
        leads.encode(encoder.encode_descriptor("log_leader", help, None, MetricType::Gauge)?)?;
        let applied = ConstCounter::new(self.log.applied().0);
        let help = "Entries of the metadata log that this server has applied";
        applied.encode(encoder.encode_descriptor("log_applied", help, None, MetricType::Counter)?)?;

        let all = self.bricks.figures();
        let labels = |f: &Figures| [("volume", f.volume.clone()), ("brick", f.path.clone()), ("id", f.id.to_string())];
        for family in FAMILIES {
            let mut rows = encoder.encode_descriptor(family.name, family.help, family.unit.as_ref(), family.kind)?;
            for figures in &all {
                let Some(figure) = (family.of)(figures) else { continue };
                let labels = labels(figures);
                let row = rows.encode_family(&labels)?;
                match family.kind {
                    MetricType::Counter => ConstCounter::new(figure).encode(row)?,
                    _ => ConstGauge::new(figure as i64).encode(row)?,
                }
            }
        }
        let help = "The brick's state: 1 for the one that it has, by the metadata log";
        let mut rows = encoder.encode_descriptor("brick_state", help, None, MetricType::Gauge)?;
        for figures in &all {
            let Some((state, ..)) = &figures.open else { continue };
            for (of, name) in STATES {
                let [volume, brick, id] = labels(figures);
                let labels = [volume, brick, id, ("state", name.to_owned())];
                ConstGauge::new(i64::from(of == *state)).encode(rows.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
