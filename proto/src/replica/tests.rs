//! Lists of what other bricks miss, when bricks are replaced and when the log is gone through once more; plans of what is missed here.

use super::{Recorded, Replica};
use crate::config::{BrickState, Configuration, Member, Slot};
use crate::types::{BootId, BrickId, ConfigNo, Incarnation, Ino, SIZE_REGION};

const ME: Incarnation = Incarnation(7);

/// Brick 10 in sync with `mine` registered, `second` out, brick 12 in sync.
fn configuration(n: u64, mine: Incarnation, second: u64) -> Configuration {
    let member = |brick: u64, state: BrickState, incarnation: Incarnation| Member {
        brick: BrickId(brick),
        state,
        incarnation,
        boot: BootId(1),
        syncing_since: ConfigNo(0),
        clean: false,
        full: false,
    };
    let members = [
        member(10, BrickState::InSync, mine),
        member(second, BrickState::Out, Incarnation(1)),
        member(12, BrickState::InSync, Incarnation(1)),
    ];
    Configuration { n: ConfigNo(n), members, unflushed_lost: ConfigNo(0) }
}

fn started(missed: Vec<(BrickId, Ino, core::ops::Range<u64>)>) -> Replica {
    Replica::new(BrickId(10), Slot(0), ME, Recorded { intents: Vec::new(), missed })
}

#[test]
fn what_a_new_brick_misses_outlives_a_start_that_goes_through_the_log_from_before_it_was_there() {
    let mut replica = started(vec![(BrickId(21), Ino(5), 3..4), (BrickId(11), Ino(5), 8..9)]);
    let old = Incarnation(6);
    // The old brick was in that place then; the list of the new one must not get lost over it.
    let _ = replica.configured(configuration(1, old, 11), None);
    assert_eq!(replica.missed(Slot(1)).iter().map(|(_, r)| r.first()).collect::<Vec<_>>(), [Some(8)]);
    assert_eq!(replica.forget_replaced(), [], "nothing is forgotten before this start is registered");
    let _ = replica.configured(configuration(2, old, 21), None);
    assert_eq!(replica.missed(Slot(1)).iter().map(|(_, r)| r.first()).collect::<Vec<_>>(), [Some(3)]);
    let _ = replica.configured(configuration(3, ME, 21), None);
    assert_eq!(replica.forget_replaced(), [(BrickId(11), Ino(5))], "the old brick comes back never");
    assert_eq!(replica.missed(Slot(1)).iter().map(|(_, r)| r.first()).collect::<Vec<_>>(), [Some(3)]);
}

#[test]
fn a_brick_that_takes_anothers_place_does_not_take_over_what_that_one_missed() {
    let mut replica = started(Vec::new());
    let _ = replica.configured(configuration(1, ME, 11), None);
    replica.missed_recorded(Slot(1), Ino(5), 0..100);
    let _ = replica.configured(configuration(2, ME, 21), None);
    assert!(replica.missed(Slot(1)).is_empty(), "its list is a list of its own");
    replica.missed_recorded(Slot(1), Ino(6), 1..2);
    assert_eq!(replica.forget_replaced(), [(BrickId(11), Ino(5))]);
    assert_eq!(replica.missed(Slot(1)).iter().map(|(ino, _)| *ino).collect::<Vec<_>>(), [Ino(6)]);
}

#[test]
fn a_pull_of_an_earlier_repair_is_nothing_to_the_plan_of_the_next_one() {
    const INO: Ino = Ino(5);
    let mut replica = Replica::new(BrickId(10), Slot(0), ME, Recorded { intents: vec![(INO, 0)], missed: Vec::new() });
    let syncing = |n: u64, state: BrickState, since: u64| {
        let mut configuration = configuration(n, ME, 11);
        configuration.members[0].state = state;
        configuration.members[0].syncing_since = ConfigNo(since);
        configuration
    };
    let left = |replica: &Replica| replica.planned_regions().iter().map(|(_, r)| r.len()).sum::<u64>();
    let _ = replica.configured(syncing(2, BrickState::Syncing, 2), None);
    assert!(replica.plan(ConfigNo(2), &[]));
    assert_eq!(left(&replica), 17, "the regions of the extent, and the size");
    replica.pulled_region(INO, 0, ConfigNo(2));
    replica.pulled_region(INO, SIZE_REGION, ConfigNo(2));
    assert_eq!(left(&replica), 15);
    // Its disk hung: it was put out and is back, and only now two of the pulls from before end.
    let _ = replica.configured(syncing(3, BrickState::Out, 2), None);
    let _ = replica.configured(syncing(4, BrickState::Syncing, 4), None);
    replica.pulled_region(INO, 1, ConfigNo(2));
    assert!(replica.plan(ConfigNo(4), &[]));
    assert_eq!(left(&replica), 17, "the intent is planned for as if nothing had been pulled");
    replica.pulled_region(INO, 2, ConfigNo(2));
    assert_eq!(left(&replica), 17);
    assert_eq!(replica.clearable_intents(1000, 0), [], "and stays");
    for region in (0..16).chain([SIZE_REGION]) {
        replica.pulled_region(INO, region, ConfigNo(4));
    }
    assert_eq!(replica.clearable_intents(1000, 0), [(INO, vec![0])]);
}
