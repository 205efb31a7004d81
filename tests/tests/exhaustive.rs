//! Every order of events in a small world keeps every rule.
//!
//! `MORTAR_EXHAUSTIVE` names a search (all of them), `MORTAR_EXHAUSTIVE_DEPTH` lets those that have a bound go so many steps
//! further (0).

use mortar_tests::exhaustive::{self, Scope};

/// A step of the search takes some hundred bytes of stack, and a way may be long.
const STACK_BYTES: usize = 64 << 20;

fn search(scope: &Scope) {
    match exhaustive::explore(scope) {
        Ok(seen) => println!(
            "{}: {}, {} worlds, {} steps, the longest way has {}, {} s",
            scope.name,
            scope.depth.map_or("complete".to_owned(), |d| format!("up to {d} steps")),
            seen.worlds,
            seen.steps,
            seen.longest,
            seen.took.as_secs()
        ),
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn no_order_of_events_breaks_a_rule() {
    let only = std::env::var("MORTAR_EXHAUSTIVE").ok();
    let more = std::env::var("MORTAR_EXHAUSTIVE_DEPTH").ok().and_then(|d| d.parse().ok()).unwrap_or(0_usize);
    let scopes: Vec<Scope> =
        exhaustive::all().into_iter().filter(|s| only.as_deref().is_none_or(|o| o == s.name)).collect();
    assert!(!scopes.is_empty(), "no search is called {only:?}");
    let searches = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        for mut scope in scopes {
            scope.depth = scope.depth.map(|d| d + more);
            search(&scope);
        }
    });
    let ended = searches.expect("a thread for the searches").join();
    if let Err(panic) = ended {
        std::panic::resume_unwind(panic);
    }
}
