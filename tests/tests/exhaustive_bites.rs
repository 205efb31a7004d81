//! Proof that the exhaustive searches bite: without a rule, one of them finds what breaks.
//!
//! `MORTAR_BITE_ALL=1` tries every rule and every search, and prints the table of docs/simulation.md; `MORTAR_BITE_RULE`
//! tries one by its name in `left_out`, and prints the trace.

use mortar_proto::left_out::{Rule, leave_out};
use mortar_tests::exhaustive::{self, Failure};
use mortar_tests::sim::kind_of;

/// A step of the search takes some hundred bytes of stack, and a way may be long.
const STACK_BYTES: usize = 64 << 20;

/// Rules that are left out, and the search that must notice.
const KNOWN: &[(Rule, &str)] = &[
    (Rule::W1Lapsed, "a write while a brick is out, and a client that dies or lapses"),
    (Rule::F2Drain, "a write while a brick is out, and a client that dies or lapses"),
    (Rule::E1Agreed, "a brick that is to stop lags"),
    (Rule::E2Last, "a brick lags"),
    (Rule::W2Recover, "a write while a brick is out, and a client that dies or lapses"),
    (Rule::W3OneAnswer, "a write and a connection that breaks"),
    (Rule::W3Syncing, "a write while a brick is out, and another killed"),
    (Rule::W4Again, "a write while a brick is out, and another killed"),
    (Rule::E5Awaited, "three faults"),
];

/// The first search that notices, of those with this name.
fn caught(rule: Rule, name: Option<&str>) -> Option<Box<Failure>> {
    leave_out(Some(rule));
    let mut scopes = exhaustive::all().into_iter().filter(|s| name.is_none_or(|n| n == s.name));
    let failure = scopes.find_map(|scope| exhaustive::explore(&scope).err());
    leave_out(None);
    failure
}

fn told(rule: Rule, failure: Option<&Failure>) -> String {
    let how = failure
        .map_or("**not noticed** | |".to_owned(), |f| format!("{} | {} | {} |", f.scope, f.length, kind_of(&f.what)));
    format!("| {}: {} | {how}", rule.rule(), rule.text())
}

fn in_a_quiet_thread(work: impl FnOnce() + Send + 'static) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // A broken assertion of the machines is what is looked for.
        if std::thread::current().name() != Some("searches") {
            hook(info);
        }
    }));
    let searches = std::thread::Builder::new().name("searches".to_owned()).stack_size(STACK_BYTES).spawn(work);
    if let Err(panic) = searches.expect("a thread for the searches").join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_rule_that_is_left_out_is_noticed() {
    let one = std::env::var("MORTAR_BITE_RULE").ok();
    let all = std::env::var("MORTAR_BITE_ALL").is_ok();
    in_a_quiet_thread(move || {
        if let Some(one) = one {
            let rule = Rule::ALL.iter().find(|r| format!("{r:?}") == one).copied();
            let rule = rule.unwrap_or_else(|| panic!("there is no rule {one}; there are {:?}", Rule::ALL));
            match caught(rule, None) {
                Some(failure) => println!("{failure}"),
                None => println!("{one} is not noticed"),
            }
        } else if all {
            for rule in Rule::ALL {
                println!("{}", told(*rule, caught(*rule, None).as_deref()));
            }
        } else {
            for (rule, name) in KNOWN {
                let failure = caught(*rule, Some(name));
                println!("{}", told(*rule, failure.as_deref()));
                assert!(failure.is_some(), "nobody notices that {:?} is left out: {}", rule, rule.text());
            }
        }
    });
}
