//! Commands of the administrator, applied to a state.

use super::state::{REMEMBERED_SESSIONS, State};
use super::{BrickPlace, Command, Effect, Entry, NameError, NameOp, NewNode, Outcome};
use crate::config::{BrickState, Configuration, Slot};
use crate::types::{BootId, ClusterId, Incarnation, Ino, LogIndex, ServerId, SessionId, SetId};

/// A cluster of four servers with the started volume `v` on the first three.
struct World {
    state: State,
    root: Ino,
}

impl World {
    fn new() -> Self {
        let mut world = Self { state: State::new(ClusterId(1)), root: Ino(0) };
        for server in 1..=4 {
            world.apply(Command::ServerAdd { server: ServerId(server), address: format!("s{server}:7440") });
        }
        let place = |n: u64| BrickPlace { server: ServerId(n), path: "/b".into() };
        let sets = vec![[place(1), place(2), place(3)]];
        world.apply(Command::VolumeCreate { name: "v".into(), sets, force: false });
        world.apply(Command::VolumeStart { name: "v".into() });
        world.root = world.state.volume_named("v").unwrap().1.root;
        world
    }

    fn run(&mut self, command: Command) -> (Outcome, Vec<Effect>) {
        let index = LogIndex(self.state.applied.0 + 1);
        self.state.apply(index, &Entry { time_ns: index.0 * 1_000_000_000, request: None, command })
    }

    #[track_caller]
    fn apply(&mut self, command: Command) -> Vec<Effect> {
        let (outcome, effects) = self.run(command);
        assert!(!matches!(outcome, Outcome::Refused(_) | Outcome::Superseded | Outcome::Errno(_)), "{outcome:?}");
        effects
    }

    #[track_caller]
    fn refused(&mut self, command: Command, why: &str) {
        let before = self.state.clone();
        let (outcome, effects) = self.run(command);
        assert!(matches!(&outcome, Outcome::Refused(sentence) if sentence.contains(why)), "{outcome:?}");
        assert!(effects.is_empty());
        assert_eq!(State { applied: before.applied, ..self.state.clone() }, before, "what is refused changes nothing");
    }

    fn set(&self) -> (SetId, Configuration) {
        let (id, set) = self.state.sets.first_key_value().unwrap();
        (*id, set.configuration)
    }

    /// The bricks in these places have started.
    fn register(&mut self, slots: &[Slot]) {
        for slot in slots {
            let brick = self.set().1.members[slot.index()].brick;
            let incarnation = Incarnation(100 + self.state.applied.0);
            let n = self.set().1.n;
            self.apply(Command::Register { brick, n, incarnation, boot: BootId(1), clean: false });
        }
    }

    fn replace(&self, slot: Slot, server: u64, path: &str, force: bool) -> Command {
        let (set, configuration) = self.set();
        let place = BrickPlace { server: ServerId(server), path: path.into() };
        Command::ReplaceBrick { set, n: configuration.n, slot, place, force }
    }

    fn mount(&mut self, volume: &str, nonce: u128) -> SessionId {
        let open = Command::SessionOpen { nonce, volume: volume.into(), client: "c".into(), address: "a".into() };
        match self.run(open).0 {
            Outcome::Session { session, .. } => session,
            other => panic!("{other:?}"),
        }
    }

    /// A file that the session has open and the lease of.
    fn write(&mut self, session: SessionId) -> Ino {
        let operation = NameOp::Create {
            parent: self.root,
            name: format!("f{}", session.0).into_bytes(),
            node: NewNode::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            or_existing: false,
            open: true,
        };
        let Outcome::Node { attributes, .. } = self.run(Command::Name { session, operation }).0 else {
            panic!("no file")
        };
        self.apply(Command::LeaseGrant { ino: attributes.ino, to: session, from: None });
        attributes.ino
    }
}

#[test]
fn an_evicted_session_is_gone_with_its_leases_and_is_remembered_for_good() {
    let mut world = World::new();
    let session = world.mount("v", 1);
    assert_eq!(world.state.sessions[&session].opened_ns, world.state.applied.0 * 1_000_000_000);
    let ino = world.write(session);
    let effects = world.apply(Command::SessionEvict { session });
    let freed = |e: &Effect| matches!(e, Effect::Leased { ino: of, holder: SessionId(0), .. } if *of == ino);
    assert!(effects.iter().any(freed), "bricks are told that nobody writes [F1]: {effects:?}");
    assert!(!world.state.sessions.contains_key(&session) && world.state.evicted.contains(&session));
    // The next holder recovers what was in flight [W2].
    let next = world.mount("v", 2);
    let (granted, _) = world.run(Command::LeaseGrant { ino, to: next, from: None });
    assert!(matches!(granted, Outcome::Lease { recover: true, .. }), "{granted:?}");
    world.refused(Command::SessionEvict { session }, "there is no session");
    assert!(!world.state.evicted.contains(&next));
}

#[test]
fn the_janitor_is_not_evicted() {
    let mut world = World::new();
    let janitor = world.mount("", 1);
    world.refused(Command::SessionEvict { session: janitor }, "the cluster's own janitor");
}

#[test]
fn a_new_brick_takes_the_place_of_another_and_is_compared_in_full_until_it_is_promoted() {
    let mut world = World::new();
    world.register(&Slot::ALL);
    let session = world.mount("v", 1);
    world.write(session);
    let old = world.set().1.members[1].brick;
    let effects = world.apply(world.replace(Slot(1), 4, "/b", false));
    let (set, now) = world.set();
    assert!(
        matches!(effects.as_slice(), [Effect::Configured { configuration, .. }] if *configuration == now),
        "{effects:?}"
    );
    let new = now.members[1];
    assert!(new.brick != old && new.state == BrickState::Out && new.full && new.incarnation == Incarnation(0));
    assert!(!world.state.bricks.contains_key(&old), "the old brick is no brick any more");
    let row = &world.state.bricks[&new.brick];
    assert_eq!((row.server, row.path.as_str(), row.set), (ServerId(4), "/b", set));
    // It starts, is put out, comes back: all of it is still to be compared. Only its promotion ends that.
    world.register(&[Slot(1)]);
    assert_eq!((world.set().1.state(Slot(1)), world.set().1.members[1].full), (BrickState::Syncing, true));
    world.apply(Command::PutOut { set, n: world.set().1.n, slot: Slot(1) });
    world.apply(Command::Rejoin { set, n: world.set().1.n, slot: Slot(1) });
    assert!(world.set().1.members[1].full);
    world.apply(Command::Promote { set, n: world.set().1.n, slot: Slot(1) });
    assert_eq!((world.set().1.state(Slot(1)), world.set().1.members[1].full), (BrickState::InSync, false));
    // The server that has no brick any more can go.
    world.apply(Command::ServerRemove { server: ServerId(2) });
}

#[test]
fn a_brick_is_not_replaced_by_what_would_be_no_third_copy_nor_when_it_is_the_last_good_one() {
    let mut world = World::new();
    world.register(&Slot::ALL);
    world.refused(world.replace(Slot(1), 9, "/b", false), "server 9 is not in this cluster");
    world.refused(world.replace(Slot(1), 4, "b", false), "is not absolute");
    world.refused(world.replace(Slot(1), 1, "/b", true), "is a brick of volume v already");
    world.refused(world.replace(Slot(1), 1, "/b/in", true), "lie within each other");
    world.refused(world.replace(Slot(1), 1, "/c", false), "would take two of three copies");
    let stale = world.replace(Slot(1), 4, "/b", false);
    // The same directory, for a new disk; two copies on one server, when that is meant.
    world.apply(world.replace(Slot(1), 2, "/b", false));
    assert_eq!(world.run(stale).0, Outcome::Superseded, "made for an older configuration");
    world.apply(world.replace(Slot(1), 1, "/c", true));
    let (set, n) = (world.set().0, world.set().1.n);
    world.register(&[Slot(1)]);
    let n = n.next();
    world.apply(Command::PutOut { set, n, slot: Slot(2) });
    world.refused(world.replace(Slot(0), 4, "/b", true), "the last good copy");
}

#[test]
fn all_bricks_are_marked_to_be_compared_and_one_that_is_repaired_begins_again() {
    let mut world = World::new();
    world.register(&Slot::ALL);
    let session = world.mount("v", 1);
    world.write(session);
    world.register(&[Slot(2)]);
    let (set, before) = world.set();
    assert_eq!(before.state(Slot(2)), BrickState::Syncing);
    world.apply(Command::CompareAll { set, n: before.n });
    let now = world.set().1;
    assert!(now.members.iter().all(|m| m.full));
    assert_eq!(now.members.map(|m| m.state), before.members.map(|m| m.state), "who serves goes on");
    assert_eq!(now.members[2].syncing_since, now.n, "a plan that was made for less is made anew");
}

#[test]
fn a_brick_that_was_out_is_taken_as_source_and_all_others_are_compared_with_it() {
    let mut world = World::new();
    world.register(&Slot::ALL);
    let session = world.mount("v", 1);
    let janitor = world.mount("", 2);
    world.write(session);
    let (set, n) = (world.set().0, world.set().1.n);
    world.apply(Command::PutOut { set, n, slot: Slot(2) });
    let n = n.next();
    let taken = Slot(2);
    // One that was in sync has started again meanwhile, or has not: either way it comes back to be made equal.
    let back = super::Registration { incarnation: Incarnation(999), boot: BootId(2), clean: false };
    let effects = world.apply(Command::AcceptLoss { set, n, source: taken, registered: [Some(back), None, None] });
    let now = world.set().1;
    assert_eq!(now.members.map(|m| m.state), [BrickState::Syncing, BrickState::Out, BrickState::InSync]);
    assert_eq!(now.members.map(|m| m.full), [true, true, false]);
    assert_eq!((now.members[0].incarnation, now.members[0].syncing_since), (Incarnation(999), now.n));
    assert_eq!(now.unflushed_lost, now.n, "[E7] clients learn of it");
    let told = |e: &Effect| matches!(e, Effect::Configured { cold_start: Some(source), .. } if *source == taken);
    assert!(effects.iter().any(told), "[E6] the source enters its own intents: {effects:?}");
    assert!(world.state.evicted.contains(&session) && !world.state.sessions.contains_key(&session));
    assert!(world.state.sessions.contains_key(&janitor), "what repairs goes on");
    // It stays so when they come back.
    world.register(&[Slot(1)]);
    assert_eq!((world.set().1.state(Slot(1)), world.set().1.members[1].full), (BrickState::Syncing, true));
}

#[test]
fn a_brick_that_was_in_sync_is_taken_as_in_a_cold_start_and_clients_go_on() {
    let mut world = World::new();
    world.register(&Slot::ALL);
    let session = world.mount("v", 1);
    world.write(session);
    let (set, n) = (world.set().0, world.set().1.n);
    let accept = |boot: u128, clean: bool| {
        let back = super::Registration { incarnation: Incarnation(999), boot: BootId(boot), clean };
        Command::AcceptLoss { set, n, source: Slot(0), registered: [Some(back), None, None] }
    };
    // One that has not started again is in sync as it is: there is nothing to accept.
    let nothing = Command::AcceptLoss { set, n, source: Slot(0), registered: [None; 3] };
    assert_eq!(world.run(nothing).0, Outcome::Superseded);
    for (boot, clean, is_lost) in [(1, false, false), (2, true, false), (2, false, true)] {
        let mut world = World { state: world.state.clone(), root: world.root };
        world.apply(accept(boot, clean));
        let now = world.set().1;
        assert_eq!(now.members.map(|m| m.state), [BrickState::InSync, BrickState::Out, BrickState::Out]);
        assert!(now.members.iter().all(|m| !m.full), "lists and intents say what they lack");
        assert_eq!(now.unflushed_lost == now.n, is_lost, "[E7] boot {boot}, clean {clean}");
        assert!(world.state.sessions.contains_key(&session));
    }
}

#[test]
fn what_a_session_had_done_before_it_ended_is_known_and_what_is_not_known_was_never_done() {
    let mut world = World::new();
    let session = world.mount("v", 1);
    let parent = world.root;
    let create = |name: &str| {
        let (mode, uid, gid) = (0o600, 0, 0);
        let name = name.as_bytes().to_vec();
        let operation =
            NameOp::Create { parent, name, node: NewNode::File, mode, uid, gid, or_existing: false, open: false };
        Command::Name { session, operation }
    };
    let ask = |world: &mut World, number, command| {
        let index = LogIndex(world.state.applied.0 + 1);
        world.state.apply(index, &Entry { time_ns: index.0, request: Some((session, number)), command }).0
    };
    let first = ask(&mut world, 1, create("a"));
    assert!(matches!(first, Outcome::Node { created: true, .. }));
    world.apply(Command::SessionEnd { session });
    assert_eq!(ask(&mut world, 1, create("a")), first);
    assert_eq!(ask(&mut world, 2, create("b")), Outcome::Errno(NameError::SessionEnded));
    // Not for ever.
    for nonce in 0..REMEMBERED_SESSIONS as u64 {
        let other = world.mount("v", u128::from(nonce) + 2);
        let index = LogIndex(world.state.applied.0 + 1);
        let name = Command::Name { session: other, operation: NameOp::Open { ino: parent } };
        world.state.apply(index, &Entry { time_ns: index.0, request: Some((other, 1)), command: name });
        world.apply(Command::SessionEnd { session: other });
    }
    assert_eq!(world.state.ended.len(), REMEMBERED_SESSIONS);
    assert_eq!(ask(&mut world, 1, create("a")), Outcome::Errno(NameError::SessionEnded));
}
