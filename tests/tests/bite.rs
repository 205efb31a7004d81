//! Proof that the simulator bites: each rule of the protocol is left out, and some seed of the standard set, which begins
//! at 0, must break an invariant.
//!
//! What chance meets rarely is shown by a scenario written by hand, which passes with all rules kept.
//!
//! In the gate each rule is tried until something fails. `MORTAR_BITE_SEEDS=1000` tries so many seeds for each rule and
//! prints the table of docs/simulation.md, `MORTAR_BITE_RULE` picks one by its name in `left_out`, `MORTAR_SIM_SHRINK` says
//! for how many seconds the first failing run of each is shrunk (0), `MORTAR_BITE_EVENTS=1` tells what happens in scenarios
//! that fail with no dice.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mortar_proto::left_out::{Rule, leave_out};
use mortar_tests::sim::{self, directed, shrink, world::Play};

/// Seeds that are tried in the gate.
const TRIED: u64 = 400;

/// Dice that a scenario is played with; `MORTAR_BITE_DICE` for more.
const DICE: u64 = 20;

/// Rules whose absence no seed shows, and why.
const UNSEEN: &[(Rule, &str)] = &[
    (Rule::F2Durable, "the entry of a brick's own registration [E5] lies behind every fence that it has answered"),
    (Rule::S4Drained, "what still runs was never answered, and is asked for again under the newer configuration"),
];

/// Rules whose absence fewer than one seed in fifty shows: the gate does not search that long, but plays those that are known to.
const RARE: &[(Rule, &[u64])] = &[
    (Rule::F3Running, &[]),
    (Rule::W1Unsettled, &[]),
    (Rule::W2Restart, &[]),
    (Rule::W5Durable, &[]),
    (Rule::W7Doubt, &[]),
    (Rule::W7Flushed, &[]),
    (Rule::W8Syncing, &[]),
    (Rule::R1Lease, &[]),
    (Rule::E1Answered, &[9_007_529_077]),
    (Rule::E5Late, &[2_111_084_478]),
    (Rule::S1Late, &[2_111_049_342]),
];

/// The seeds that are known to show the absence of a rare one.
fn known(rule: Rule) -> Option<&'static [u64]> {
    RARE.iter().find(|(rare, _)| *rare == rule).map(|(_, seeds)| *seeds)
}

fn is_sought(rule: Rule) -> bool {
    known(rule).is_none_or(|seeds| !seeds.is_empty()) && !UNSEEN.iter().any(|(unseen, _)| *unseen == rule)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

/// The seeds that catch a rule's absence, with what they break.
type Catches = BTreeMap<u64, String>;

/// Runs work on two threads whose panics, which are failures of the rule that is left out, are not told.
fn in_pairs(items: usize, work: impl Fn(usize) + Sync) {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().name() != Some("bite") {
            told(info);
        }
    }));
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let started = std::thread::Builder::new().name("bite".to_owned()).spawn_scoped(scope, || {
                loop {
                    let item = next.fetch_add(1, Ordering::Relaxed);
                    if item >= items {
                        break;
                    }
                    work(item);
                }
            });
            assert!(started.is_ok(), "a thread cannot be started: {started:?}");
        }
    });
}

fn caught_by(rule: Rule, seed: u64) -> Option<sim::Failure> {
    leave_out(Some(rule));
    let failure = sim::run_as(seed, &Play::default()).err();
    leave_out(None);
    failure.map(|f| *f)
}

/// The dice with which a scenario for this rule fails without it.
fn caught_by_scenario(rule: Rule) -> Option<(u64, String)> {
    let seed = directed::seed();
    for scenario in directed::all().into_iter().filter(|s| s.rules.contains(&rule)) {
        for dice in 0..dice() {
            let how = Play { script: Some(scenario.script.clone()), dice, ..Play::default() };
            leave_out(Some(rule));
            let failed = sim::run_as(seed, &how).err();
            leave_out(None);
            if let Some(failure) = failed {
                return Some((dice, failure.kind().to_owned()));
            }
        }
        if number("MORTAR_BITE_EVENTS").is_some() {
            leave_out(Some(rule));
            let how = Play { script: Some(scenario.script), traced: true, ..Play::default() };
            let run = sim::run_as(seed, &how).map_or_else(|f| f.trace, |s| s.trace);
            leave_out(None);
            run.iter().filter(|l| l.main).for_each(|l| println!("{}", l.text));
        }
    }
    None
}

fn dice() -> u64 {
    number("MORTAR_BITE_DICE").unwrap_or(DICE)
}

#[test]
fn scenarios_pass_with_every_rule_kept() {
    let (seed, all, dice) = (directed::seed(), directed::all(), dice());
    let failed = Mutex::new(Vec::new());
    in_pairs(all.len(), |item| {
        let scenario = &all[item];
        for dice in 0..dice {
            let how = Play { script: Some(scenario.script.clone()), dice, traced: false };
            if let Err(failure) = sim::run_as(seed, &how) {
                let what = failure.what.lines().next().unwrap_or_default();
                println!("{:?} with dice {dice} of seed {seed}: {what}", scenario.rules);
                failed.lock().unwrap_or_else(|e| e.into_inner()).push((item, dice));
            }
        }
    });
    let failed = failed.into_inner().unwrap_or_else(|e| e.into_inner());
    if let Some((item, dice)) = failed.first() {
        let how = Play { script: Some(all[*item].script.clone()), dice: *dice, traced: true };
        let trace = sim::run_as(seed, &how).map_or_else(|f| f.trace, |s| s.trace);
        trace.iter().filter(|l| l.main).for_each(|l| println!("{}", l.text));
        panic!("{} runs of scenarios fail, though no rule is left out; of the first, see above", failed.len());
    }
}

fn tell_shrunk(rule: Rule, failure: &sim::Failure, seconds: u64) {
    leave_out(Some(rule));
    let shrunk = shrink::shrink(failure, Duration::from_secs(seconds));
    leave_out(None);
    match shrunk {
        Some(shrunk) => println!("{rule:?}, {}\n{shrunk}", rule.text()),
        None => println!("{rule:?}: seed {} is not shrunk", failure.seed),
    }
}

#[test]
fn every_rule_is_missed() {
    let seeds = number("MORTAR_BITE_SEEDS");
    let wanted = std::env::var("MORTAR_BITE_RULE").ok();
    let rules: Vec<Rule> =
        Rule::ALL.iter().copied().filter(|r| wanted.as_ref().is_none_or(|w| format!("{r:?}") == *w)).collect();
    assert!(!rules.is_empty(), "there is no rule {wanted:?}; `left_out` has {:?}", Rule::ALL);
    let caught: Mutex<BTreeMap<Rule, Catches>> = Mutex::new(BTreeMap::new());
    let shown: Mutex<BTreeMap<Rule, (u64, String)>> = Mutex::new(BTreeMap::new());
    let shrink_s = number("MORTAR_SIM_SHRINK").unwrap_or(0);
    let note = |rule: Rule, failure: &sim::Failure| {
        let mut caught = caught.lock().unwrap_or_else(|e| e.into_inner());
        let catches = caught.entry(rule).or_default();
        catches.insert(failure.seed, failure.kind().to_owned());
        catches.len() == 1
    };
    in_pairs(rules.len(), |item| {
        let rule = rules[item];
        let by_hand = caught_by_scenario(rule);
        let all = match (seeds, &by_hand) {
            (Some(seeds), _) => seeds,
            (None, Some(_)) => 0,
            (None, None) if !is_sought(rule) || known(rule).is_some() => 0,
            (None, None) => TRIED,
        };
        if let Some(found) = by_hand {
            shown.lock().unwrap_or_else(|e| e.into_inner()).insert(rule, found);
        }
        for seed in known(rule).unwrap_or_default().iter().copied().chain(0..all) {
            let Some(failure) = caught_by(rule, seed) else { continue };
            if note(rule, &failure) && shrink_s > 0 {
                tell_shrunk(rule, &failure, shrink_s);
            }
            if seeds.is_none() {
                break;
            }
        }
        let caught = caught.lock().unwrap_or_else(|e| e.into_inner());
        let shown = shown.lock().unwrap_or_else(|e| e.into_inner());
        println!("{rule:?} {}", row(rule, caught.get(&rule).unwrap_or(&Catches::new()), shown.get(&rule)));
    });
    let shown = shown.into_inner().unwrap_or_else(|e| e.into_inner());
    let caught = caught.into_inner().unwrap_or_else(|e| e.into_inner());
    println!("\n| rule | model | left out | seeds | scenario | breaks |\n| --- | --- | --- | --- | --- | --- |");
    for rule in &rules {
        println!("{}", row(*rule, caught.get(rule).unwrap_or(&Catches::new()), shown.get(rule)));
    }
    for (rule, why) in UNSEEN {
        println!("{rule:?} ({}) is not seen: {why}", rule.text());
    }
    let missing: Vec<Rule> =
        rules.iter().copied().filter(|r| !caught.contains_key(r) && !shown.contains_key(r) && is_sought(*r)).collect();
    assert!(missing.is_empty(), "nothing showed that these were left out: {missing:?}");
}

fn row(rule: Rule, catches: &Catches, by_hand: Option<&(u64, String)>) -> String {
    let mut kinds: BTreeMap<&str, u32> = BTreeMap::new();
    for kind in catches.values().chain(by_hand.map(|(_, kind)| kind)) {
        *kinds.entry(kind).or_default() += 1;
    }
    let mut kinds: Vec<(&str, u32)> = kinds.into_iter().collect();
    kinds.sort_by_key(|(_, times)| core::cmp::Reverse(*times));
    let kinds: Vec<&str> = kinds.into_iter().map(|(kind, _)| kind).collect();
    let first: Vec<String> = catches.keys().take(3).map(u64::to_string).collect();
    let seeds = match first.is_empty() {
        true => "0".to_owned(),
        false => format!("{} ({})", catches.len(), first.join(", ")),
    };
    let scenario = if by_hand.is_some() { "yes" } else { "" };
    format!("| {} | {} | {} | {seeds} | {scenario} | {} |", rule.rule(), rule.found(), rule.text(), kinds.join(", "))
}
