//! Commands of the administrator, applied to a state.

use super::state::State;
use super::{BrickPlace, Command, Effect, Entry, NameOp, NewNode, Outcome};
use crate::types::{ClusterId, Ino, LogIndex, ServerId, SessionId};

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
