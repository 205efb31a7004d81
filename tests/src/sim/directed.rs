//! Scenarios written by hand, for what chance meets rarely: each shows what goes wrong when one rule is left out, as the
//! model of the protocol found it. They are played with many dice, for a few milliseconds more or less decide.

use mortar_proto::left_out::Rule;
use mortar_proto::types::Ino;

use super::acts::{Act, Ask, Script};
use super::quorum::VOTERS;
use super::world::{Node, Play, World};

/// The file of the client 0, which is about to lose something, and another one; by their place among the world's files.
const F: Ino = Ino(0);
const G: Ino = Ino(1);

/// A scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The rules that keep it from failing: without any one of them it fails.
    pub rules: &'static [Rule],
    /// What is done.
    pub script: Script,
}

/// The seed of a world that suits them: quick, with two files and time enough.
#[must_use]
pub fn seed() -> u64 {
    let suits = |seed: &u64| {
        let world = World::new(*seed, &Play::default());
        let quick = world.delay_ms <= 8 && world.disk_ms <= 8 && (1000..1400).contains(&world.session_ttl_ms());
        quick && !world.quorum.together && world.files.len() == 2 && world.faults.until_ms >= 25_000
    };
    (0..100_000).find(suits).unwrap_or(0)
}

fn write(client: usize, ino: Ino, block: usize) -> Act {
    Act::Ask(client, ino, Ask::Write { first: block, count: 1 })
}
fn kill(brick: usize, down_ms: u64) -> Act {
    Act::Kill { brick, power: false, down_ms }
}
fn power_cut(brick: usize, down_ms: u64) -> Act {
    Act::Kill { brick, power: true, down_ms }
}
/// What a client sends to these bricks is held up.
fn unsent(at: u64, client: usize, bricks: &[usize], for_ms: u64) -> Script {
    bricks.iter().map(|b| (at, Act::Cut(Node::Client(client), Node::Brick(*b), for_ms))).collect()
}
/// What a node sends to those who keep the log is held up.
fn to_log(at: u64, node: Node, for_ms: u64) -> Script {
    (0..VOTERS).map(|v| (at, Act::Cut(node, Node::Voter(v), for_ms))).collect()
}
/// What those who keep the log send to a node is held up.
fn from_log(at: u64, node: Node, for_ms: u64) -> Script {
    (0..VOTERS).map(|v| (at, Act::Cut(Node::Voter(v), node, for_ms))).collect()
}
fn scenario(rules: &'static [Rule], parts: &[&[(u64, Act)]]) -> Scenario {
    let mut script = parts.concat();
    script.sort_by_key(|(at, _)| *at);
    Scenario { rules, script }
}

/// A write of client 0 reaches one brick, and the client dies; client 1 wants the lease.
fn half_a_write(at: u64, missing: &[usize]) -> Script {
    let mut script = unsent(at, 0, missing, 3000);
    script.extend([(at + 20, write(0, F, 0)), (at + 100, Act::Crash(0, 12_000)), (at + 150, write(1, F, 2))]);
    script
}
/// Both files are written, and all is settled; then brick 2 is gone for so long, and is put out.
fn two_are_left(down_ms: u64) -> Script {
    let begun = [(10_420, write(0, F, 3)), (10_430, write(1, G, 0))];
    [&begun[..], &[(12_000, kill(2, down_ms)), (12_020, write(1, G, 0))]].concat()
}
/// Brick `gone` dies just before brick 2, which starts at `at`, comes back, so that only the other one tells it anything.
fn only_one_tells(gone: usize, at: u64) -> Script {
    vec![(at - 100, kill(gone, 9000)), (at + 600, write(1, G, 0)), (at + 900, write(1, G, 0))]
}

/// All of them.
#[must_use]
pub fn all() -> Vec<Scenario> {
    let begun: &[(u64, Act)] = &[(10_420, write(0, F, 3))];
    let mut all = recovery(begun);
    // The brick that is about to write it stands still while the next holder is granted the lease.
    for at in 10_621..10_627 {
        let half = half_a_write(10_600, &[1, 2]);
        all.push(scenario(&[Rule::F2Drain], &[begun, &half, &[(at, Act::Pause(0, 12_500 - at))]]));
    }
    // What brick 2 got back is not durable yet when it loses power, and nobody lists it any more.
    for at in (14_640..15_200).step_by(40) {
        all.push(scenario(&[Rule::W7Pulls], &[&two_are_left(2500), &[(at, power_cut(2, 300))]]));
    }
    // Brick 2 is put out before what one brick has is recovered. The target books that, dies, and the source has not.
    for at in (11_600..12_200).step_by(100) {
        all.push(scenario(
            &[Rule::W2BookkeepingSource, Rule::W2Bookkeeping],
            &[
                begun,
                &[(10_430, write(1, G, 0))],
                &half_a_write(11_200, &[1, 2]),
                &[(at, kill(2, 17_500 - at))],
                &only_one_tells(1, 17_500),
            ],
        ));
    }
    // Brick 2 is Syncing, and has all that was ever written by a dead client; or it lacks just that.
    for at in (12_100..12_400).step_by(40) {
        let syncing: Script = [begun, &[(12_000, kill(2, 50))], &to_log(at, Node::Brick(2), 16_400 - at)].concat();
        all.push(scenario(&[Rule::W2SyncingLists], &[&syncing, &half_a_write(12_700, &[0, 1])]));
        all.push(scenario(&[Rule::W2Targets], &[&syncing, &half_a_write(12_700, &[1, 2])]));
    }
    // Brick 2 starts again while it is Syncing.
    for at in (12_080..12_320).step_by(40) {
        let again = [(12_000, kill(2, 50)), (12_600, kill(2, 50))];
        all.push(scenario(&[Rule::E5Number], &[begun, &again, &to_log(at, Node::Brick(2), 13_000 - at)]));
    }
    // Client 0 does not know that brick 2 is back: what it writes reaches the others only.
    for at in (15_700..16_400).step_by(100) {
        let unaware = from_log(15_480, Node::Client(0), 1300);
        all.push(scenario(&[Rule::F1Older], &[&two_are_left(3500), &unaware, &[(at, write(0, F, 0))]]));
    }
    all.extend(lists(begun));
    all.extend(numbers(begun));
    all.extend(late(begun));
    all.extend(leading(begun));
    let files = World::new(seed(), &Play::default()).files;
    for (_, act) in all.iter_mut().flat_map(|s| &mut s.script) {
        if let Act::Ask(_, ino, _) | Act::Flip(_, ino, _) = act {
            *ino = files[ino.0 as usize];
        }
    }
    all
}

/// What a dead client left [W1], [W2], [S1], [E5].
fn recovery(begun: &[(u64, Act)]) -> Vec<Scenario> {
    let half = half_a_write(10_600, &[1, 2]);
    vec![
        scenario(&[Rule::W2Recover, Rule::W1Lapsed], &[begun, &half]),
        // The copy reaches one brick, the source is put out meanwhile, and recovery begins again.
        scenario(&[Rule::W2CopyInDoubt], &[begun, &half, &[(10_700, Act::Cut(Node::Brick(0), Node::Brick(2), 6000))]]),
        // Somebody has read it.
        scenario(
            &[Rule::W2Highest],
            &[
                begun,
                &[(10_600, write(0, F, 0)), (10_730, Act::Ask(1, F, Ask::Read { first: 0, count: 1 }))],
                &unsent(10_650, 0, &[0, 1], 3000),
                &[(10_700, write(0, F, 0)), (10_800, Act::Crash(0, 12_000)), (10_850, write(1, F, 2))],
            ],
        ),
        // The one that has it restarts, and has forgotten what was in doubt.
        scenario(&[Rule::S1Own], &[begun, &half, &[(10_720, kill(0, 100))]]),
        // The one that has it stops cleanly.
        scenario(&[Rule::E5Clean], &[begun, &half, &[(10_720, Act::Stop(0))]]),
    ]
}

/// What a brick that is out misses [W5], [W2], [S4], [E6].
fn lists(begun: &[(u64, Act)]) -> Vec<Scenario> {
    vec![
        // Brick 1 is Syncing when it takes a write; then only it can tell brick 2 of it.
        scenario(
            &[Rule::W5Syncing],
            &[
                &two_are_left(8000),
                &[(14_000, kill(1, 100)), (15_400, write(0, F, 0))],
                &to_log(14_310, Node::Brick(1), 1700),
                &only_one_tells(0, 20_000),
            ],
        ),
        // What only the source of a cold start has, it has entered as missed; brick 1 takes that over.
        scenario(
            &[Rule::S4TakeOver, Rule::E6Intents],
            &[
                &two_are_left(9000),
                &half_a_write(13_600, &[1]),
                &[(13_750, kill(0, 600)), (13_750, kill(1, 600))],
                &only_one_tells(0, 21_000),
            ],
        ),
        // What brick 2 misses has gone bad on the brick that it asks first.
        scenario(
            &[Rule::R5Source],
            &[
                &two_are_left(3500),
                &[(12_030, write(0, F, 0)), (14_000, Act::Ask(0, F, Ask::Flush)), (15_450, Act::Flip(0, F, 0))],
            ],
        ),
        // Nobody can repair brick 2, and the other two list what it misses.
        scenario(
            &[Rule::S4Reports],
            &[begun, &[(12_000, kill(2, 2500)), (12_020, write(0, F, 0))], &unsent(14_400, 0, &[2], 3000)],
        ),
        // Pulls come twice, the second time when a newer write has reached the target and not yet the source.
        scenario(
            &[Rule::F3Pulls],
            &[
                &[
                    (10_420, write(0, F, 0)),
                    (10_430, write(0, F, 1)),
                    (10_440, write(0, F, 2)),
                    (10_450, write(0, F, 3)),
                ],
                &[(10_600, Act::Repeat(1000)), (11_480, write(0, F, 1)), (11_500, kill(2, 50))],
                &to_log(12_300, Node::Brick(2), 4000),
                &unsent(12_590, 0, &[0], 300),
                &unsent(12_990, 0, &[0], 300),
                &unsent(13_390, 0, &[0], 300),
                &unsent(13_790, 0, &[0], 300),
                &[
                    (12_600, write(0, F, 0)),
                    (13_000, write(0, F, 2)),
                    (13_400, write(0, F, 1)),
                    (13_800, write(0, F, 3)),
                ],
            ],
        ),
    ]
}

/// Requests under other numbers than a brick's [F1].
fn numbers(begun: &[(u64, Act)]) -> Vec<Scenario> {
    vec![
        // Brick 0 does not know yet that brick 2 is out when it takes a write, and books nothing.
        scenario(
            &[Rule::F1Newer],
            &[
                begun,
                &from_log(11_950, Node::Brick(0), 2500),
                &[(12_000, kill(2, 5500)), (12_020, write(0, F, 0))],
                &only_one_tells(1, 17_500),
            ],
        ),
    ]
}

/// What comes late: frames of a connection that was given up, reports of an older configuration, answers of a leader that was
/// deposed [F3], [S4], [R1].
fn late(begun: &[(u64, Act)]) -> Vec<Scenario> {
    let mut all = Vec::new();
    // Nobody has space for what client 0 writes, and it is told so; brick 0 gets the same once more on the older connection.
    let full = |at, full| [0, 1, 2].map(|s| (at, Act::Full(s, full)));
    let writes = [0, 1, 2, 3].map(|block| (10_700, write(0, F, block)));
    let busy = [10_950, 11_250, 11_550, 11_850, 12_150].map(|at| (at, Act::Ask(0, F, Ask::Stat)));
    for at in (10_700..10_750).step_by(5) {
        all.push(scenario(
            &[Rule::F3Connection],
            &[
                begun,
                &[(10_600, Act::Repeat(1000)), (at, Act::Break(0, 0))],
                &full(10_650, true),
                &writes,
                &full(10_900, false),
                &busy,
            ],
        ));
    }
    // Brick 2 was repaired, which is not heard before it is put out and comes back; and it does not know that yet. All the same
    // the others have just taken what it lacks.
    for at in (14_600..14_800).step_by(10) {
        all.push(scenario(
            &[Rule::S4Number],
            &[
                begun,
                &[(12_000, kill(2, 50))],
                &to_log(12_200, Node::Brick(2), 1700),
                &unsent(12_250, 0, &[2], 4000),
                &[(12_300, Act::Ask(0, F, Ask::Flush))],
                &from_log(13_700, Node::Brick(2), 2500),
                &[(at, write(0, F, 0))],
            ],
        ));
    }
    // Brick 1 hears only the leader before, who has been deposed and does not know it.
    for v in 0..VOTERS {
        let others = (0..VOTERS).filter(|o| *o != v);
        let far = others.flat_map(|o| [(Node::Voter(v), Node::Voter(o)), (Node::Brick(1), Node::Voter(o))]);
        let far = far.chain([(Node::Voter(v), Node::Client(0))]);
        let cut: Script =
            far.flat_map(|(a, b)| [(11_000, Act::Cut(a, b, 9000)), (11_000, Act::Cut(b, a, 9000))]).collect();
        all.push(scenario(
            &[Rule::R1Quorum],
            &[begun, &cut, &unsent(11_050, 0, &[1], 9000), &[(11_100, write(0, F, 0))]],
        ));
    }
    all
}

/// What the leader decides [E1], [E2], [E6], [E7], [R1].
fn leading(begun: &[(u64, Act)]) -> Vec<Scenario> {
    // A write does not reach brick 1, which is therefore to be put out at about 12 100.
    let to_be_put_out: Script = [&unsent(10_590, 0, &[1], 5000)[..], &[(10_600, write(0, F, 0))]].concat();
    let b1 = Node::Brick(1);
    vec![
        scenario(&[Rule::E1Lapsed], &[begun, &to_be_put_out, &from_log(11_900, b1, 2500)]),
        scenario(
            &[Rule::E1Elected],
            &[begun, &to_be_put_out, &from_log(11_900, b1, 2500), &to_log(11_900, b1, 2500), &[(12_080, Act::Elect)]],
        ),
        // It was put out, and is heard again before it has applied that.
        scenario(&[Rule::R1Index], &[begun, &to_be_put_out, &from_log(11_900, b1, 2500), &to_log(11_900, b1, 2500)]),
        scenario(&[Rule::R1Index], &[begun, &to_be_put_out, &from_log(11_900, b1, 2730), &to_log(11_900, b1, 2730)]),
        // Answers to heartbeats come late.
        scenario(&[Rule::R1Sent], &[begun, &to_be_put_out, &from_log(10_600, b1, 3000), &to_log(11_000, b1, 2600)]),
        scenario(
            &[Rule::E2Last],
            &[
                begun,
                &[(10_500, kill(0, 6000)), (10_500, kill(1, 6000)), (10_500, kill(2, 6000)), (10_520, write(0, F, 0))],
            ],
        ),
        // Brick 2 is Syncing, brick 0 has restarted and is not registered, and brick 1 alone is InSync and out of reach.
        scenario(
            &[Rule::E2Restarted],
            &[
                begun,
                &[(12_000, kill(2, 50)), (13_000, kill(0, 300)), (13_050, write(0, F, 1))],
                &to_log(12_400, Node::Brick(2), 300),
                &to_log(12_900, Node::Brick(2), 300),
                &unsent(13_000, 0, &[1], 5000),
                &to_log(13_000, b1, 5000),
                &from_log(13_000, b1, 5000),
            ],
        ),
        scenario(
            &[Rule::E6Boot],
            &[begun, &[(10_500, power_cut(0, 300)), (10_500, kill(1, 400)), (10_500, kill(2, 400))]],
        ),
        scenario(
            &[Rule::E6Wait],
            &[begun, &to_log(10_400, b1, 8000), &to_log(10_400, Node::Brick(2), 8000), &[(10_500, kill(0, 2000))]],
        ),
        // The last InSync brick loses power; another one, which was Syncing, kept its boot id.
        scenario(
            &[Rule::E7Source, Rule::E7Told],
            &[
                &two_are_left(9000),
                &[(14_000, write(0, F, 0)), (14_200, kill(0, 50)), (14_800, power_cut(1, 300))],
                &[(16_500, Act::Ask(0, F, Ask::Flush)), (17_500, Act::Ask(0, F, Ask::Stat))],
            ],
        ),
    ]
}
