//! Proof that the simulator bites: each rule of the protocol is left out, and some seed of the standard set, which begins
//! at 0, must break an invariant.
//!
//! In the gate each rule is tried with the seed that caught it last, and then with others. `MORTAR_BITE_SEEDS=1000` tries
//! so many for each rule and prints the table of docs/simulation.md, `MORTAR_BITE_RULE` picks one by its name in
//! `left_out`, `MORTAR_SIM_SHRINK` says for how many seconds the first failing run of each is shrunk (0).

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mortar_proto::left_out::{Rule, leave_out};
use mortar_tests::sim::{self, shrink, world::Play};

/// Seeds that are tried in the gate, after the one that is known.
const TRIED: u64 = 1500;

/// A seed that catches each rule's absence, where the first ones do not.
const KNOWN: &[(Rule, u64)] = &[];

/// Rules whose absence no seed shows, and why.
const UNSEEN: &[(Rule, &str)] = &[];

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
    let shrink_s = number("MORTAR_SIM_SHRINK").unwrap_or(0);
    let note = |rule: Rule, failure: &sim::Failure| {
        let mut caught = caught.lock().unwrap_or_else(|e| e.into_inner());
        let catches = caught.entry(rule).or_default();
        catches.insert(failure.seed, failure.kind().to_owned());
        catches.len() == 1
    };
    in_pairs(rules.len(), |item| {
        let rule = rules[item];
        let known = KNOWN.iter().find(|(r, _)| *r == rule).map(|(_, seed)| *seed);
        let all: Vec<u64> = match seeds {
            Some(seeds) => (0..seeds).collect(),
            None if UNSEEN.iter().any(|(r, _)| *r == rule) => Vec::new(),
            None => known.into_iter().chain(0..TRIED).collect(),
        };
        for seed in all {
            let Some(failure) = caught_by(rule, seed) else { continue };
            if note(rule, &failure) && shrink_s > 0 {
                tell_shrunk(rule, &failure, shrink_s);
            }
            if seeds.is_none() {
                break;
            }
        }
        let caught = caught.lock().unwrap_or_else(|e| e.into_inner());
        println!("{}", row(rule, caught.get(&rule).unwrap_or(&Catches::new())));
    });
    let caught = caught.into_inner().unwrap_or_else(|e| e.into_inner());
    println!("\n| rule | model | left out | caught by | breaks |\n| --- | --- | --- | --- | --- |");
    for rule in &rules {
        println!("{}", row(*rule, caught.get(rule).unwrap_or(&Catches::new())));
    }
    let missing: Vec<Rule> = rules
        .iter()
        .copied()
        .filter(|r| !caught.contains_key(r) && !UNSEEN.iter().any(|(unseen, _)| unseen == r))
        .collect();
    assert!(missing.is_empty(), "nothing showed that these were left out: {missing:?}");
}

fn row(rule: Rule, catches: &Catches) -> String {
    let mut kinds: BTreeMap<&str, u32> = BTreeMap::new();
    for kind in catches.values() {
        *kinds.entry(kind).or_default() += 1;
    }
    let mut kinds: Vec<(&str, u32)> = kinds.into_iter().collect();
    kinds.sort_by_key(|(_, times)| core::cmp::Reverse(*times));
    let kinds: Vec<&str> = kinds.into_iter().map(|(kind, _)| kind).collect();
    let first: Vec<String> = catches.keys().take(3).map(u64::to_string).collect();
    format!(
        "| {} | {} | {} | {} ({}) | {} | {rule:?}",
        rule.rule(),
        rule.found(),
        rule.text(),
        catches.len(),
        first.join(", "),
        kinds.join(", "),
    )
}
