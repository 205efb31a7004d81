//! The leader's proposals, with the real machine of bricks behind the heartbeats.

use super::*;
use crate::config::BrickState::{InSync, Out};
use crate::metadata::{BrickPlace, Entry, NameOp, NewNode};
use crate::replica::{Recorded, Replica};
use crate::types::{BootId, ClusterId, LogIndex, ServerId};

const TIMING: Timing = Timing {
    read_lease_ms: 1000,
    clock_margin_ms: 100,
    cold_start_wait_ms: 30_000,
    back_off_ms: 200,
    back_off_max_ms: 60_000,
};
const STEP_MS: u64 = 50;
const ALL_IN: [BrickState; 3] = [InSync; 3];

struct Cluster {
    state: State,
    monitor: Monitor,
    replicas: Vec<Replica>,
    /// Its heartbeats come through.
    up: [bool; 3],
    now_ms: u64,
    done: Vec<Command>,
}

impl Cluster {
    /// Three bricks that have become `InSync`.
    fn new() -> Self {
        let mut cluster = Self::made();
        cluster.run(1000);
        assert_eq!(cluster.states(), ALL_IN);
        cluster.done.clear();
        cluster
    }

    /// A volume that was just made; its bricks have not registered yet.
    fn made() -> Self {
        let mut state = State::new(ClusterId(1));
        let server = ServerId(9);
        let place = |i: u32| BrickPlace { server, path: format!("/b{i}") };
        let commands = [
            Command::ServerAdd { server, address: "s:1".into() },
            Command::VolumeCreate { name: "v".into(), sets: vec![[place(0), place(1), place(2)]], force: true },
            Command::VolumeStart { name: "v".into() },
        ];
        for command in commands {
            Self::apply(&mut state, command);
        }
        let members = state.sets.values().next().expect("a set").configuration.members;
        let replica = |slot: Slot| {
            let incarnation = Incarnation(100 + u64::from(slot.0));
            Replica::new(members[slot.index()].brick, slot, incarnation, Recorded::default())
        };
        Self {
            state,
            monitor: Monitor::new(TIMING, 1_000_000),
            replicas: Slot::ALL.into_iter().map(replica).collect(),
            up: [true; 3],
            now_ms: 1_000_000,
            done: Vec::new(),
        }
    }

    fn apply(state: &mut State, command: Command) {
        let index = LogIndex(state.applied.0 + 1);
        state.apply(index, &Entry { time_ns: 0, request: None, command });
    }

    /// From now on bricks may hold something.
    fn lease_a_file(&mut self) {
        let open = Command::SessionOpen { nonce: 1, volume: "v".into(), client: "c".into(), address: String::new() };
        Self::apply(&mut self.state, open);
        let session = *self.state.sessions.keys().next().expect("a session");
        let root = self.state.volumes.values().next().expect("a volume").root;
        let operation = NameOp::Create {
            parent: root,
            name: b"f".to_vec(),
            node: NewNode::File,
            mode: 0o600,
            uid: 0,
            gid: 0,
            or_existing: false,
            open: true,
        };
        Self::apply(&mut self.state, Command::Name { session, operation });
        let ino = *self.state.inodes.keys().last().expect("a file");
        Self::apply(&mut self.state, Command::LeaseGrant { ino, to: session, from: None });
    }

    fn configuration(&self) -> Configuration {
        self.state.sets.values().next().expect("a set").configuration
    }
    fn states(&self) -> [BrickState; 3] {
        self.configuration().members.map(|m| m.state)
    }
    fn suspect(&mut self, slot: Slot) {
        let (set, n) = (*self.state.sets.keys().next().expect("a set"), self.configuration().n);
        self.monitor.suspect(&self.state, set, n, slot);
    }
    fn times_put_out(&self, slot: Slot) -> usize {
        self.done.iter().filter(|c| matches!(c, Command::PutOut { slot: s, .. } if *s == slot)).count()
    }

    /// The brick applies the log, and, `Syncing`, finds nothing to repair.
    fn brick_applies(&mut self, slot: Slot) {
        let (configuration, index) = (self.configuration(), self.state.applied);
        let replica = &mut self.replicas[slot.index()];
        let _ = replica.configured(configuration, None);
        replica.applied(index);
        if let Some((n, _)) = replica.plan_due() {
            replica.plan(n, &[]);
        }
        if let Some((n, _)) = replica.finish_due() {
            replica.repaired(n);
        }
    }

    fn beat_of(&self, slot: Slot) -> Beat {
        let replica = &self.replicas[slot.index()];
        let report = replica.report();
        let incarnation = replica.incarnation();
        Beat {
            brick: replica.brick(),
            registration: Registration { incarnation, boot: BootId(1), clean: false },
            known: replica.configuration().map_or(ConfigNo(0), |c| c.n),
            agreed_under: replica.agreed_under(),
            failed: replica.has_failed(),
            stopping: false,
            n: report.map_or(ConfigNo(0), |r| r.n),
            missed_empty: report.map_or(Slots::NONE, |r| r.missed_empty),
            repaired: report.is_some_and(|r| r.repaired),
        }
    }

    fn brick_beats(&mut self, slot: Slot) {
        let beat = self.beat_of(slot);
        let replica = &mut self.replicas[slot.index()];
        let asked = self.monitor.heartbeat(&self.state, self.now_ms, &[beat]);
        replica.lease_answered(self.now_ms + TIMING.read_lease_ms, self.state.applied);
        if asked.contains(&replica.brick()) {
            replica.agree_to_out();
        }
    }

    fn leader_looks(&mut self) {
        for command in self.monitor.poll(&self.state, self.now_ms) {
            if let Command::PutOut { slot, .. } = command {
                let serves = self.replicas[slot.index()].may_read(self.now_ms);
                assert!(!serves, "[E1]: {slot:?} serves reads and is put out, after {:?}", self.done);
            }
            self.done.push(command.clone());
            Self::apply(&mut self.state, command);
        }
    }

    fn run(&mut self, ms: u64) {
        for _ in 0..ms / STEP_MS {
            self.now_ms += STEP_MS;
            let up = self.up;
            for slot in Slot::ALL.into_iter().filter(|s| up[s.index()]) {
                self.brick_applies(slot);
                self.brick_beats(slot);
            }
            self.leader_looks();
        }
    }
}

#[test]
fn a_set_whose_files_were_leased_before_its_bricks_registered_comes_to_life() {
    let mut cluster = Cluster::made();
    cluster.lease_a_file();
    cluster.run(1000);
    assert_eq!(cluster.states(), ALL_IN);
    assert!(cluster.replicas.iter().all(|r| r.is_live()), "{:?}", cluster.done);
}

#[test]
fn a_client_that_complains_of_all_bricks_takes_one_of_them_out_and_no_word_of_the_others() {
    let mut cluster = Cluster::new();
    cluster.run(1000);
    Slot::ALL.into_iter().for_each(|slot| cluster.suspect(slot));
    for _ in 0..40 {
        cluster.run(STEP_MS);
        let serve = Slot::ALL.into_iter().filter(|s| cluster.replicas[s.index()].may_read(cluster.now_ms)).count();
        assert!(serve >= 2, "{serve} bricks serve reads, after {:?}", cluster.done);
    }
    let put_out = |slot: &Slot| cluster.times_put_out(*slot) > 0;
    assert_eq!(Slot::ALL.iter().filter(|slot| put_out(slot)).count(), 1, "{:?}", cluster.done);
}

#[test]
fn what_is_refused_for_one_set_has_no_brick_of_another_answered() {
    let mut cluster = Cluster::new();
    cluster.run(1000);
    let (set, n) = (*cluster.state.sets.keys().next().expect("a set"), cluster.configuration().n);
    let brick = cluster.configuration().members[0].brick;
    let out = |set| Command::PutOut { set, n, slot: Slot(0) };
    cluster.monitor.proposes(&cluster.state, &out(set));
    cluster.monitor.refused(&cluster.state, &out(SetId(set.0 + 1)));
    assert!(cluster.monitor.withholds(&cluster.state, brick));
    cluster.monitor.refused(&cluster.state, &out(set));
    assert!(!cluster.monitor.withholds(&cluster.state, brick));
}

#[test]
fn what_an_earlier_start_of_a_brick_said_is_not_taken_for_a_new_start() {
    let mut cluster = Cluster::new();
    let late = cluster.beat_of(Slot(0));
    let brick = late.brick;
    cluster.replicas[0] = Replica::new(brick, Slot(0), Incarnation(500), Recorded::default());
    cluster.run(2000);
    let registered = cluster.configuration();
    assert_eq!(registered.members[0].incarnation, Incarnation(500), "{:?}", cluster.done);
    cluster.monitor.heartbeat(&cluster.state, cluster.now_ms, &[late]);
    cluster.leader_looks();
    assert_eq!(cluster.configuration(), registered, "{:?}", cluster.done.last());
}

#[test]
fn an_earlier_start_that_is_heard_while_a_new_one_is_registered_does_not_take_its_place() {
    let mut cluster = Cluster::new();
    let first = cluster.beat_of(Slot(0));
    let start = |cluster: &mut Cluster, number: u64| {
        cluster.replicas[0] = Replica::new(first.brick, Slot(0), Incarnation(number), Recorded::default());
        cluster.brick_applies(Slot(0));
        cluster.beat_of(Slot(0))
    };
    let (second, third) = (start(&mut cluster, 500), start(&mut cluster, 501));
    let proposed = |cluster: &mut Cluster, beat: Beat| {
        cluster.now_ms += STEP_MS;
        let others = [cluster.beat_of(Slot(1)), cluster.beat_of(Slot(2))];
        cluster.monitor.heartbeat(&cluster.state, cluster.now_ms, &[beat, others[0], others[1]]);
        cluster.monitor.poll(&cluster.state, cluster.now_ms)
    };
    // Both are proposed before one is committed: the other one is not, whichever that is.
    let by_third = proposed(&mut cluster, third);
    let by_second = proposed(&mut cluster, second);
    assert!(matches!((&by_second[..], &by_third[..]), ([Command::Register { .. }], [Command::Register { .. }])));
    // And the one that is registered now is heard once more just before.
    proposed(&mut cluster, first);
    for command in by_third.into_iter().chain(by_second) {
        Cluster::apply(&mut cluster.state, command);
    }
    let registered = cluster.configuration();
    assert_eq!(registered.members[0].incarnation, Incarnation(501));
    assert_eq!(cluster.monitor.poll(&cluster.state, cluster.now_ms), [], "what it said was of an older configuration");
    cluster.run(2000);
    assert_eq!(cluster.configuration().members[0].incarnation, Incarnation(501));
    assert_eq!(cluster.states(), ALL_IN);
}

#[test]
fn a_brick_that_agreed_to_go_comes_back_once_and_for_all() {
    let mut cluster = Cluster::new();
    let slot = Slot(2);
    cluster.suspect(slot);
    cluster.run(150);
    assert_eq!(cluster.states(), [InSync, InSync, Out]);
    cluster.run(2000);
    assert_eq!((cluster.states(), cluster.times_put_out(slot)), (ALL_IN, 1), "{:?}", cluster.done);
}

#[test]
fn what_a_brick_agreed_to_before_it_came_back_is_not_believed_afterwards() {
    let mut cluster = Cluster::new();
    let slot = Slot(2);
    cluster.suspect(slot);
    while cluster.states() != ALL_IN || cluster.done.is_empty() {
        cluster.run(STEP_MS);
    }
    // It knows that it is InSync; the last that the leader heard of it is from before.
    cluster.brick_applies(slot);
    assert!(cluster.replicas[2].may_read(cluster.now_ms));
    cluster.suspect(slot);
    cluster.leader_looks();
    assert_eq!(cluster.times_put_out(slot), 1);
}

#[test]
fn a_brick_that_is_gone_is_put_out_though_nobody_complains() {
    let mut cluster = Cluster::new();
    cluster.up[1] = false;
    cluster.run(ABSENT_MS - 500);
    assert_eq!(cluster.states(), ALL_IN);
    cluster.run(1000);
    assert_eq!(cluster.states(), [InSync, Out, InSync]);
    // Two are gone: the last one stays.
    cluster.up[2] = false;
    cluster.run(10 * ABSENT_MS);
    assert_eq!(cluster.states(), [InSync, Out, InSync]);
    cluster.up = [true; 3];
    cluster.run(2000);
    assert_eq!(cluster.states(), ALL_IN);
}

#[test]
fn a_brick_that_is_gone_is_put_out_though_the_last_other_one_has_agreed_to_go() {
    let mut cluster = Cluster::new();
    cluster.lease_a_file();
    cluster.up[0] = false;
    cluster.run(1500);
    // The administrator thought of another brick in the place of the third and let it be; the second starts anew.
    cluster.replicas[2].agree_to_out();
    cluster.replicas[1] = Replica::new(cluster.replicas[1].brick(), Slot(1), Incarnation(201), Recorded::default());
    cluster.run(20_000);
    assert_eq!(cluster.states(), [Out, InSync, InSync]);
    // It goes and comes back as soon as two others are there.
    cluster.up[0] = true;
    cluster.run(5000);
    assert_eq!((cluster.states(), cluster.replicas[2].has_agreed()), (ALL_IN, false), "{:?}", cluster.done);
}

#[test]
fn a_brick_that_clients_cannot_reach_and_the_leader_cannot_either_goes_when_its_lease_is_over() {
    let mut cluster = Cluster::new();
    cluster.up[0] = false;
    cluster.suspect(Slot(0));
    cluster.run(TIMING.read_lease_ms);
    assert_eq!(cluster.states(), ALL_IN);
    cluster.run(200);
    assert_eq!(cluster.states(), [Out, InSync, InSync]);
}

#[test]
fn a_brick_whose_server_is_back_without_being_able_to_open_it_is_put_out_and_returns_once_it_is_open() {
    for suspected in [true, false] {
        let mut cluster = Cluster::new();
        cluster.up[0] = false;
        if suspected {
            cluster.suspect(Slot(0));
        }
        let brick = cluster.replicas[0].brick();
        let registration = Registration { incarnation: Incarnation(0), boot: BootId(0), clean: false };
        let unopened = Beat {
            brick,
            registration,
            known: ConfigNo(0),
            agreed_under: ConfigNo(0),
            failed: true,
            stopping: false,
            n: ConfigNo(0),
            missed_empty: Slots::NONE,
            repaired: false,
        };
        let within = if suspected { TIMING.read_lease_ms } else { ABSENT_MS } + 300;
        for _ in 0..within / STEP_MS {
            cluster.monitor.heartbeat(&cluster.state, cluster.now_ms, &[unopened]);
            cluster.run(STEP_MS);
        }
        assert_eq!(cluster.states(), [Out, InSync, InSync], "suspected: {suspected}");
        cluster.up[0] = true;
        cluster.run(2000);
        assert_eq!(cluster.states(), ALL_IN);
    }
}

fn set_of(cluster: &Cluster) -> SetId {
    *cluster.state.sets.keys().next().expect("a set")
}

#[test]
fn bricks_are_compared_one_at_a_time_and_only_when_two_good_ones_stay() {
    let mut cluster = Cluster::new();
    let (set, n) = (set_of(&cluster), cluster.configuration().n);
    cluster.up[1] = false;
    cluster.run(2000);
    Cluster::apply(&mut cluster.state, Command::CompareAll { set, n });
    cluster.run(2000);
    assert_eq!(cluster.states(), ALL_IN, "one is not heard: two good ones would not stay");
    cluster.up[1] = true;
    let mut fewest = 3;
    for _ in 0..400 {
        cluster.run(STEP_MS);
        fewest = fewest.min(cluster.configuration().in_sync().count());
    }
    assert_eq!((cluster.states(), fewest), (ALL_IN, 2), "{:?}", cluster.done);
    assert!(Slot::ALL.into_iter().all(|slot| cluster.times_put_out(slot) == 1), "{:?}", cluster.done);
    assert!(cluster.configuration().members.iter().all(|m| !m.full));
}

#[test]
fn a_brick_is_replaced_when_it_serves_no_reads_and_others_are_good() {
    let mut cluster = Cluster::new();
    let set = set_of(&cluster);
    let may = |cluster: &mut Cluster, slot: Slot, force: bool| {
        let now_ms = cluster.now_ms;
        let may = cluster.monitor.may_replace(&cluster.state, set, slot, force, now_ms);
        if may == Replacement::Later {
            cluster.monitor.ask_to_leave(cluster.configuration().members[slot.index()].brick, now_ms);
        }
        may
    };
    // [E1] It is asked, agrees, and serves nothing when it may be replaced.
    assert_eq!(may(&mut cluster, Slot(0), false), Replacement::Later);
    let n = cluster.configuration().n;
    while may(&mut cluster, Slot(0), false) == Replacement::Later {
        cluster.now_ms += STEP_MS;
        for slot in Slot::ALL {
            cluster.brick_applies(slot);
            cluster.brick_beats(slot);
        }
        assert!(cluster.now_ms < 1_010_000, "it is never told to go");
    }
    assert_eq!(may(&mut cluster, Slot(0), false), Replacement::Now(n));
    assert!(!cluster.replicas[0].may_read(cluster.now_ms));
    // One that is silent goes when its lease is over; then the good ones are two, and one has to stay.
    let mut cluster = Cluster::new();
    cluster.up[0] = false;
    assert_eq!(may(&mut cluster, Slot(0), false), Replacement::Later);
    cluster.run(2000);
    assert_eq!(may(&mut cluster, Slot(0), false), Replacement::Now(cluster.configuration().n));
    let refused = |r: Replacement, why: &str| matches!(r, Replacement::Refused(sentence) if sentence.contains(why));
    assert!(refused(may(&mut cluster, Slot(1), false), "one of two good copies"));
    assert_eq!(may(&mut cluster, Slot(1), true), Replacement::Later);
    // The administrator gives up: it is asked no more, and nothing has happened.
    cluster.run(5000);
    assert_eq!(cluster.states()[1..], [InSync, InSync]);
    cluster.up[1] = false;
    cluster.run(10_000);
    assert!(refused(may(&mut cluster, Slot(2), true), "nothing could be built from"));
}

#[test]
fn a_loss_is_accepted_only_when_no_brick_in_sync_is_there_or_may_serve_reads() {
    let mut cluster = Cluster::new();
    let set = set_of(&cluster);
    let why =
        |cluster: &Cluster, slot: Slot| cluster.monitor.accept_loss(&cluster.state, set, slot, cluster.now_ms).err();
    let says = |why: Option<String>, words: &str| assert!(why.as_ref().is_some_and(|w| w.contains(words)), "{why:?}");
    cluster.up[2] = false;
    cluster.run(10_000);
    assert_eq!(cluster.states(), [InSync, InSync, Out]);
    says(why(&cluster, Slot(2)), "it is not heard");
    says(why(&cluster, Slot(0)), "nothing has to be given up");
    cluster.up = [false, false, true];
    // Heard again, it becomes Syncing with nobody to get anything from.
    cluster.run(STEP_MS);
    says(why(&cluster, Slot(2)), "nothing has to be given up");
    let silent_ms = TIMING.read_lease_ms + TIMING.clock_margin_ms;
    cluster.run(silent_ms);
    assert_eq!(why(&cluster, Slot(2)), None);
    let command = cluster.monitor.accept_loss(&cluster.state, set, Slot(2), cluster.now_ms).expect("it may");
    Cluster::apply(&mut cluster.state, command);
    assert_eq!(cluster.states(), [Out, Out, InSync]);
    cluster.up = [true; 3];
    cluster.run(5000);
    assert_eq!(cluster.states(), ALL_IN);
    assert!(cluster.configuration().members.iter().all(|m| !m.full));
}
