//! `mortar-bench`: measures mounted file systems side by side. `make bench` sets them up and calls it.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use mortar_tests::bench::jobs::JOBS;
use mortar_tests::bench::report::Series;
use mortar_tests::bench::{cpu, fio, null, report};

#[derive(Parser, Debug)]
#[command(about = "Measures mounted file systems side by side, with fio")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the jobs on each target, in rounds, and print a table
    Run(RunArgs),
    /// Serve a FUSE file system that does nothing, until it is unmounted
    Null {
        /// The directory to mount it on
        mount: PathBuf,
        /// Bytes of its one file
        #[arg(long)]
        size: u64,
    },
}

#[derive(clap::Args, Debug)]
struct RunArgs {
    /// A directory to measure, and the processes that serve it; the first target is compared with all others
    #[arg(long = "target", required = true, value_name = "NAME=DIR[:PID,PID...]", value_parser = parse_target)]
    targets: Vec<Target>,
    /// Only these jobs, separated by commas
    #[arg(long, value_delimiter = ',')]
    jobs: Vec<String>,
    /// How often each job runs on each target
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How long each job runs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// The size of the file that the jobs work on, as fio writes sizes
    #[arg(long, default_value = "512m")]
    size: String,
    /// Also write every figure of every round here
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Debug)]
struct Target {
    name: String,
    dir: PathBuf,
    pids: Vec<u32>,
}

fn parse_target(text: &str) -> Result<Target, String> {
    let (name, rest) = text.split_once('=').ok_or_else(|| format!("'{text}' has no '=' between name and directory"))?;
    let (dir, pids) = rest.split_once(':').unwrap_or((rest, ""));
    let pid = |pid: &str| pid.parse().map_err(|_| format!("'{pid}' in '{text}' is no process number"));
    let pids = pids.split(',').filter(|p| !p.is_empty()).map(pid).collect::<Result<_, _>>()?;
    Ok(Target { name: name.to_owned(), dir: dir.into(), pids })
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Run(args) => run(&args),
        Command::Null { mount, size } => null::serve(&mount, size),
    }
}

fn run(args: &RunArgs) -> Result<()> {
    if let Some(unknown) = args.jobs.iter().find(|name| JOBS.iter().all(|job| job.name != **name)) {
        let names: Vec<_> = JOBS.iter().map(|job| job.name).collect();
        bail!("there is no job '{unknown}'; there are {}", names.join(", "));
    }
    let jobs: Vec<_> =
        JOBS.iter().filter(|job| args.jobs.is_empty() || args.jobs.iter().any(|n| n == job.name)).collect();
    for target in &args.targets {
        eprintln!("writing the file in {} once", target.dir.display());
        fio::prepare(&target.dir, &args.size).with_context(|| target.name.clone())?;
    }
    let mut all: Vec<Series> = jobs
        .iter()
        .flat_map(|job| args.targets.iter().map(|t| (job.name, t.name.clone())))
        .map(|(job, target)| Series { job, target, rounds: Vec::new() })
        .collect();
    for round in 1..=args.rounds {
        let mut series = all.iter_mut();
        for job in &jobs {
            for target in &args.targets {
                let before = cpu::seconds(&target.pids)?;
                let mut got = fio::run(&target.dir, &args.size, job, args.seconds)
                    .with_context(|| format!("{} on {}", job.name, target.name))?;
                if !target.pids.is_empty() {
                    got.cpu_us = Some((cpu::seconds(&target.pids)? - before) * 1e6 / got.requests.max(1) as f64);
                }
                eprintln!("round {round} {} {}: {:.0} IOPS, {:.1} MiB/s", job.name, target.name, got.iops, got.mib);
                series.next().context("a series for each job and target")?.rounds.push(got);
            }
        }
    }
    if cfg!(debug_assertions) {
        println!("Built with debug assertions: these are not figures to quote.\n");
    }
    println!(
        "Medians of {} rounds of {} s, targets in turn, O_DIRECT on a file of {}; the last column is the median, over the rounds, \
         of the IOPS of '{}' divided by those of the row. Latencies of the sync job are those of its flushes. CPU is that of the \
         target's own processes.\n",
        args.rounds, args.seconds, args.size, args.targets[0].name
    );
    print!("{}", report::table(&all));
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_names_its_directory_and_the_processes_behind_it() {
        let target = parse_target("mortar=/mnt/v:12,13").unwrap();
        assert_eq!((target.name.as_str(), target.pids), ("mortar", vec![12, 13]));
        assert!(parse_target("xfs=/mnt/x").unwrap().pids.is_empty());
        assert!(parse_target("xfs").unwrap_err().contains("no '='"));
        assert!(parse_target("x=/y:12,z").unwrap_err().contains("no process number"));
    }

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
