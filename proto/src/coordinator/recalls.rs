//! Leases that are wanted back [W1].

use super::*;
use crate::config::{BrickState, Member};
use crate::types::{BootId, BrickId, Incarnation};

fn idle() -> Coordinator {
    let member = |i: u64| Member {
        brick: BrickId(i),
        state: BrickState::InSync,
        incarnation: Incarnation(i),
        boot: BootId(1),
        syncing_since: ConfigNo(0),
        clean: false,
        full: false,
    };
    let members = [member(1), member(2), member(3)];
    let configuration = Configuration { n: ConfigNo(1), members, unflushed_lost: ConfigNo(0) };
    let timeouts = Timeouts { io_timeout_ms: 1000, hedge_ms: 100, no_quorum_ms: None };
    Coordinator::new(Ino(1), configuration, Slots(7), timeouts)
}

#[test]
fn a_lease_that_was_granted_to_somebody_who_wants_it_no_more_is_given_back() {
    let (mut coordinator, mut effects) = (idle(), Vec::new());
    coordinator.handle(Event::Recalled(Epoch(8)), 1, &mut effects);
    assert_eq!(effects, [Effect::ReleaseLease { epoch: Epoch(8), finished: false }]);
}

#[test]
fn a_recall_that_overtakes_its_grant_is_kept_until_that_comes() {
    let (mut coordinator, mut effects) = (idle(), Vec::new());
    coordinator.handle(Event::Adopt, 1, &mut effects);
    assert_eq!(effects, [Effect::AcquireLease]);
    coordinator.handle(Event::Recalled(Epoch(8)), 2, &mut effects);
    assert_eq!(effects, [Effect::AcquireLease]);
    coordinator.handle(Event::Granted { epoch: Epoch(8), recover: false, foreign: false }, 3, &mut effects);
    assert!(coordinator.release_wanted);
}
