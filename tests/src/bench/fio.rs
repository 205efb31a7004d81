//! One fio job on one directory.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::jobs::{Job, Latency};

/// The file in each directory that the jobs work on.
pub const FILE: &str = "mortar-bench.img";

/// What one job on one directory gave.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Figures {
    /// Requests in all, reads and writes.
    pub requests: u64,
    /// Requests a second.
    pub iops: f64,
    /// MiB a second.
    pub mib: f64,
    /// Latency in microseconds that half of the requests kept to.
    pub p50_us: f64,
    /// The same for 99 of 100.
    pub p99_us: f64,
    /// The same for 999 of 1000.
    pub p999_us: f64,
    /// Processor time in microseconds per request, of the processes that serve the directory, if there are any.
    pub cpu_us: Option<f64>,
}

/// Writes the whole file once, so that no job measures allocation.
///
/// # Errors
/// When fio fails.
pub fn prepare(dir: &Path, size: &str) -> Result<()> {
    let arguments = ["--rw=write", "--bs=1m", "--ioengine=libaio", "--iodepth=4", "--end_fsync=1"];
    fio(dir, size, &arguments).map(|_| ())
}

/// Runs a job for some seconds. `cpu_us` is left for the caller.
///
/// # Errors
/// When fio fails, or reports an error of an operation.
pub fn run(dir: &Path, size: &str, job: &Job, seconds: u32) -> Result<Figures> {
    let runtime = format!("--runtime={seconds}");
    let mut arguments = vec!["--time_based", "--norandommap", "--randrepeat=0", &runtime];
    arguments.extend(job.arguments);
    let report = fio(dir, size, &arguments)?;
    figures(&report, job).with_context(|| format!("{}: fio's report lacks something: {report}", job.name))
}

fn fio(dir: &Path, size: &str, arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new("fio");
    command
        .args(["--name=job", "--direct=1", "--output-format=json", "--percentile_list=50:99:99.9"])
        .arg(format!("--filename={}", dir.join(FILE).display()))
        .arg(format!("--size={size}"))
        .args(arguments)
        // fio may leave files in its working directory.
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null());
    let output = command.output().context("starting fio: is it installed?")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = || format!("{command:?}\n{text}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "fio ended with {}: {}", output.status, said());
    // Warnings come before the report.
    let json = text.find('{').and_then(|at| serde_json::from_str::<Value>(&text[at..]).ok());
    let report = json.and_then(|v| v["jobs"].get(0).cloned()).with_context(|| format!("no report: {}", said()))?;
    ensure!(report["error"] == 0, "fio reports error {}: {}", report["error"], said());
    Ok(report)
}

fn figures(report: &Value, job: &Job) -> Option<Figures> {
    let sum = |key: &str| Some(report["read"][key].as_f64()? + report["write"][key].as_f64()?);
    let percentiles = match job.latency {
        Latency::Read => &report["read"]["clat_ns"]["percentile"],
        Latency::Write => &report["write"]["clat_ns"]["percentile"],
        Latency::Sync => &report["sync"]["lat_ns"]["percentile"],
    };
    let us = |key: &str| Some(percentiles[key].as_f64()? / 1000.0);
    Some(Figures {
        requests: sum("total_ios")? as u64,
        iops: sum("iops")?,
        mib: sum("bw_bytes")? / f64::from(1 << 20),
        p50_us: us("50.000000")?,
        p99_us: us("99.000000")?,
        p999_us: us("99.900000")?,
        cpu_us: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::jobs::JOBS;

    #[test]
    fn reads_and_writes_are_summed_and_the_latency_is_the_jobs_own() {
        let side = |ns: u32| {
            serde_json::json!({"total_ios": 10, "iops": 5.0, "bw_bytes": 1 << 20,
            "clat_ns": {"percentile": {"50.000000": ns, "99.000000": 2 * ns, "99.900000": 3 * ns}}})
        };
        let report = serde_json::json!({"read": side(1000), "write": side(7000)});
        let mixed = JOBS.iter().find(|j| j.name == "randrw70-4k-qd32").unwrap();
        let got = figures(&report, mixed).unwrap();
        assert_eq!((got.requests, got.iops, got.mib), (20, 10.0, 2.0));
        assert_eq!((got.p50_us, got.p99_us, got.p999_us), (7.0, 14.0, 21.0));
        let sync = JOBS.iter().find(|j| j.latency == Latency::Sync).unwrap();
        assert!(figures(&report, sync).is_none(), "a latency that is not there is not made up");
    }
}
