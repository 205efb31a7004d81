//! Real processes under faults, for as long as one likes; nothing may be lost, stale, wrong or refused.
//!
//! `MORTAR_SOAK_SECONDS` says for how long faults go on (60), `MORTAR_SOAK_SEED` draws the faults of an earlier run again,
//! `MORTAR_SOAK_ONLY` names the kinds, separated by semicolons, `MORTAR_SOAK_GAP` the seconds between two (`5-60`; `1-5`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use mortar_tests::harness;
use mortar_tests::soak::{Plan, run};

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn number(name: &str) -> Result<Option<u64>> {
    set(name).map(|text| text.parse().with_context(|| format!("{name}={text} is no number"))).transpose()
}

#[test]
fn nothing_is_lost_whatever_fails() -> Result<()> {
    if harness::missing().is_some() {
        return Ok(());
    }
    let chance = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64 % 1_000_000_000);
    let gap = set("MORTAR_SOAK_GAP").unwrap_or_else(|| "1-5".into());
    let (least, most) = gap.split_once('-').context("MORTAR_SOAK_GAP is two numbers with '-' between them")?;
    let kinds = set("MORTAR_SOAK_ONLY");
    let only =
        kinds.iter().flat_map(|text| text.split(';')).map(|name| name.trim().parse().map_err(anyhow::Error::msg));
    run(&Plan {
        seed: number("MORTAR_SOAK_SEED")?.unwrap_or(chance),
        length: Duration::from_secs(number("MORTAR_SOAK_SECONDS")?.unwrap_or(60)),
        gap: (least.trim().parse()?, most.trim().parse()?),
        only: only.collect::<Result<_>>()?,
    })
}
