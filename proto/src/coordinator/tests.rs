//! Decisions about what is corrupt `[R5]`: who is asked next, what is told to whom, who repairs.

use super::*;
use crate::config::{BrickState, Member};
use crate::types::{BLOCK_BYTES, BootId, BrickId, Incarnation};

const A: Slot = Slot(0);
const B: Slot = Slot(1);
const C: Slot = Slot(2);
/// Its reads go to A first, then to B, then to C.
const INO: Ino = Ino(3);

struct Bench {
    coordinator: Coordinator,
    now_ms: u64,
    effects: Vec<Effect>,
}

fn configuration(n: u64, states: [BrickState; 3]) -> Configuration {
    let member = |i: usize| Member {
        brick: BrickId(i as u64 + 1),
        state: states[i],
        incarnation: Incarnation(1),
        boot: BootId(1),
        syncing_since: ConfigNo(0),
        clean: false,
        full: false,
    };
    Configuration { n: ConfigNo(n), members: [member(0), member(1), member(2)], unflushed_lost: ConfigNo(0) }
}

impl Bench {
    fn new(states: [BrickState; 3]) -> Self {
        let timeouts = Timeouts { io_timeout_ms: 2000, hedge_ms: 250, no_quorum_ms: None };
        let links: Slots = Slot::ALL.into_iter().collect();
        let coordinator = Coordinator::new(INO, configuration(1, states), links, timeouts);
        Self { coordinator, now_ms: 1000, effects: Vec::new() }
    }
    /// One that holds the lease of its file.
    fn holding() -> Self {
        let mut bench = Self::new([BrickState::InSync; 3]);
        bench.tell(Event::Submit(OpId(900), Operation::Mutate(Mutation::SetTime { mtime_ns: 1 })));
        bench.tell(Event::Granted { epoch: Epoch(1), recover: false, foreign: false });
        for slot in Slot::ALL {
            let fence = bench.sent(slot, |b| *b == Body::Fence);
            bench.answer(fence, Answer::Fenced { in_doubt: Vec::new(), size: 0 });
        }
        for slot in Slot::ALL {
            let write = bench.sent(slot, |b| matches!(b, Body::Mutate(..)));
            bench.answer(write, Answer::Done);
        }
        assert!(bench.coordinator.is_holding());
        bench
    }
    fn tell(&mut self, event: Event) {
        self.coordinator.handle(event, self.now_ms, &mut self.effects);
    }
    fn answer(&mut self, request: Request, answer: Answer) {
        self.tell(Event::Answered(request.id, answer));
    }
    fn wait(&mut self, ms: u64) {
        self.now_ms += ms;
        self.tell(Event::Tick);
    }
    fn is_sent(&self, slot: Slot, what: impl Fn(&Body) -> bool) -> bool {
        self.effects.iter().any(|e| matches!(e, Effect::Send(r) if r.slot == slot && what(&r.body)))
    }
    /// Takes the first request of this kind to a brick out of what was sent.
    fn sent(&mut self, slot: Slot, what: impl Fn(&Body) -> bool) -> Request {
        let is = |e: &Effect| matches!(e, Effect::Send(r) if r.slot == slot && what(&r.body));
        let at = self.effects.iter().position(is).unwrap_or_else(|| panic!("not sent: {:?}", self.effects));
        match self.effects.remove(at) {
            Effect::Send(request) => request,
            _ => unreachable!(),
        }
    }
    fn completion(&self) -> Option<Completion> {
        self.effects.iter().find_map(|e| match e {
            Effect::Complete(OpId(1), completion) => Some(*completion),
            _ => None,
        })
    }
    fn read(&mut self) {
        self.tell(Event::Submit(OpId(1), Operation::Read(ByteRange::at(0, 4 * BLOCK_BYTES))));
    }
}

fn is_read(body: &Body) -> bool {
    matches!(body, Body::Read(_))
}
fn is_list(body: &Body) -> bool {
    matches!(body, Body::RepairList(_))
}
fn corrupt(blocks: &[u64]) -> Answer {
    Answer::Corrupt(blocks.iter().map(|b| *b..*b + 1).collect())
}
fn regions(regions: &[u64]) -> Answer {
    Answer::Regions(regions.iter().map(|r| *r..*r + 1).collect())
}

#[test]
fn a_read_that_does_not_verify_is_taken_elsewhere_and_told_to_the_brick() {
    let mut bench = Bench::new([BrickState::InSync; 3]);
    bench.read();
    let read = bench.sent(A, is_read);
    bench.answer(read, corrupt(&[1, 3]));
    let report = bench.sent(A, |b| matches!(b, Body::Report { .. }));
    assert_eq!(report.body, Body::Report { range: ByteRange { start: BLOCK_BYTES, end: 4 * BLOCK_BYTES } });
    let read = bench.sent(B, is_read);
    assert_eq!(bench.completion(), None);
    bench.answer(read, Answer::Bytes);
    assert_eq!(bench.completion(), Some(Completion::Bytes));
    // It holds no lease: whoever does repairs.
    bench.answer(report, Answer::Done);
    assert!(!bench.is_sent(A, is_list));
}

#[test]
fn a_read_fails_only_when_the_same_block_is_corrupt_on_every_brick_in_sync() {
    let mut bench = Bench::new([BrickState::InSync; 3]);
    bench.read();
    for (slot, blocks) in [(A, [0, 1]), (B, [1, 2]), (C, [2, 3])] {
        let read = bench.sent(slot, is_read);
        bench.answer(read, corrupt(&blocks));
    }
    // Each block is sound somewhere: it is repaired, and the read goes round again.
    assert_eq!(bench.completion(), None);
    bench.wait(100);
    for slot in [A, B, C] {
        assert_eq!(bench.completion(), None);
        let read = bench.sent(slot, is_read);
        bench.answer(read, corrupt(&[2]));
    }
    assert_eq!(bench.completion(), Some(Completion::Corrupt));

    // A brick that cannot be asked may have it.
    let mut bench = Bench::new([BrickState::InSync; 3]);
    bench.tell(Event::LinkDown(C));
    bench.read();
    for slot in [A, B] {
        let read = bench.sent(slot, is_read);
        bench.answer(read, corrupt(&[0]));
    }
    assert_eq!(bench.completion(), None);
    // One that is being repaired may come to have it.
    let mut bench = Bench::new([BrickState::InSync, BrickState::Syncing, BrickState::Out]);
    bench.read();
    let read = bench.sent(A, is_read);
    bench.answer(read, corrupt(&[0]));
    assert_eq!(bench.completion(), None);
}

#[test]
fn the_holder_repairs_what_it_reported_and_asks_now_and_then_what_others_found() {
    let mut bench = Bench::holding();
    bench.read();
    let read = bench.sent(A, is_read);
    bench.answer(read, corrupt(&[0]));
    let report = bench.sent(A, |b| matches!(b, Body::Report { .. }));
    bench.answer(report, Answer::Done);
    let list = bench.sent(A, is_list);
    assert!(!bench.is_sent(B, is_list) && !bench.is_sent(C, is_list), "a brick in sync knows by itself");
    bench.answer(list, regions(&[0]));
    bench.tell(Event::Permit);
    let pull = bench.sent(A, |b| matches!(b, Body::Pull { .. }));
    let Body::Pull { range, from, doubt: None, .. } = pull.body else { panic!("{pull:?}") };
    assert_eq!((range, from), (ByteRange::at(0, 1 << 20), B));
    // [S2] What is written there meanwhile waits.
    bench.tell(Event::Submit(OpId(2), Operation::Mutate(Mutation::Write { offset: 0, length: BLOCK_BYTES })));
    assert!(!bench.is_sent(A, |b| matches!(b, Body::Mutate(OpId(2), _))));
    // The source cannot be reached: another one is taken, and nobody is blamed.
    bench.answer(pull, Answer::SourceFailed);
    bench.wait(300);
    let again = bench.sent(A, |b| matches!(b, Body::Pull { .. }));
    assert!(matches!(again.body, Body::Pull { from: C, .. }) && again.seq == pull.seq, "{again:?}");
    assert!(!bench.effects.iter().any(|e| matches!(e, Effect::Suspect(..))), "{:?}", bench.effects);
    bench.answer(again, Answer::Done);
    assert!(bench.is_sent(A, |b| matches!(b, Body::Mutate(OpId(2), _))));
    let list = bench.sent(A, is_list);
    bench.answer(list, regions(&[]));
    assert!(bench.coordinator.is_repaired());

    bench.effects.clear();
    bench.wait(11_000);
    for slot in Slot::ALL {
        let list = bench.sent(slot, is_list);
        bench.answer(list, regions(&[]));
    }
    bench.wait(100);
    assert!(!bench.is_sent(A, is_list));
}

#[test]
fn a_source_of_recovery_that_is_corrupt_gives_way_block_by_block() {
    let mut bench = Bench::new([BrickState::InSync; 3]);
    bench.tell(Event::Adopt);
    bench.tell(Event::Granted { epoch: Epoch(2), recover: true, foreign: true });
    let doubt =
        Doubt { epoch: Epoch(1), seq: Seq(1), range: ByteRange { start: 0, end: 2 * BLOCK_BYTES }, sized: false };
    let fence = |bench: &mut Bench| {
        for slot in Slot::ALL {
            let request = bench.sent(slot, |b| *b == Body::Fence);
            let in_doubt = if slot == B { vec![doubt] } else { Vec::new() };
            bench.answer(request, Answer::Fenced { in_doubt, size: 4 * BLOCK_BYTES });
        }
    };
    let pull = |bench: &mut Bench, slot, start, end| {
        let is = move |b: &Body| matches!(b, Body::Pull { range, .. } if (range.start, range.end) == (start, end));
        bench.sent(slot, is)
    };
    let is_note = |b: &Body| matches!(b, Body::Note { .. });
    fence(&mut bench);
    let (a, c) = (pull(&mut bench, A, 0, 2 * BLOCK_BYTES), pull(&mut bench, C, 0, 2 * BLOCK_BYTES));
    bench.answer(a, Answer::SourceCorrupt);
    assert!(!bench.is_sent(A, |b| *b == Body::Fence), "one of the first attempt is under way still");
    bench.answer(c, Answer::SourceCorrupt);
    let note = bench.sent(B, is_note);
    bench.answer(note, Answer::Done);
    // Block by block, from the same source; block 1 is corrupt there.
    fence(&mut bench);
    for slot in [A, C] {
        let first = pull(&mut bench, slot, 0, BLOCK_BYTES);
        assert!(matches!(first.body, Body::Pull { from: B, .. }));
        bench.answer(first, Answer::Done);
        let second = pull(&mut bench, slot, BLOCK_BYTES, 2 * BLOCK_BYTES);
        bench.answer(second, Answer::SourceCorrupt);
    }
    for _ in 0..2 {
        let note = bench.sent(B, is_note);
        bench.answer(note, Answer::Done);
    }
    fence(&mut bench);
    for slot in [B, C] {
        let copy = pull(&mut bench, slot, BLOCK_BYTES, 2 * BLOCK_BYTES);
        assert!(matches!(copy.body, Body::Pull { from: A, .. }), "{copy:?}");
        bench.answer(copy, Answer::Done);
    }
    for slot in [A, C] {
        let first = pull(&mut bench, slot, 0, BLOCK_BYTES);
        bench.answer(first, Answer::Done);
    }
    for slot in [A, B] {
        let note = bench.sent(slot, is_note);
        bench.answer(note, Answer::Done);
    }
    assert!(bench.coordinator.is_holding());
}

#[test]
fn what_is_in_doubt_and_corrupt_everywhere_holds_nobody_up() {
    let mut bench = Bench::new([BrickState::InSync; 3]);
    bench.tell(Event::Adopt);
    bench.tell(Event::Granted { epoch: Epoch(2), recover: true, foreign: true });
    let doubt = Doubt { epoch: Epoch(1), seq: Seq(1), range: ByteRange { start: 0, end: BLOCK_BYTES }, sized: false };
    let mut rounds = 0;
    while !bench.coordinator.is_holding() {
        rounds += 1;
        assert!(rounds < 10, "it goes round for ever");
        for slot in Slot::ALL {
            let request = bench.sent(slot, |b| *b == Body::Fence);
            bench.answer(request, Answer::Fenced { in_doubt: vec![doubt], size: BLOCK_BYTES });
        }
        for slot in Slot::ALL {
            let request = bench.sent(slot, |b| matches!(b, Body::Pull { .. } | Body::Note { .. }));
            let is_note = matches!(request.body, Body::Note { .. });
            bench.answer(request, if is_note { Answer::Done } else { Answer::SourceCorrupt });
        }
    }
    assert_eq!(rounds, 4, "each of the three was tried as source");
}

/// What each brick has in doubt of epoch 1, by seq, and its size, all in blocks; where the size is copied from then.
fn size_comes_from(doubts: [&[(u64, core::ops::Range<u64>)]; 3], blocks: [u64; 3]) -> Slot {
    let mut bench = Bench::new([BrickState::InSync; 3]);
    bench.tell(Event::Adopt);
    bench.tell(Event::Granted { epoch: Epoch(2), recover: true, foreign: true });
    for slot in Slot::ALL {
        let request = bench.sent(slot, |b| *b == Body::Fence);
        let mut in_doubt = Vec::new();
        for (seq, written) in doubts[slot.index()] {
            let range = ByteRange { start: written.start * BLOCK_BYTES, end: written.end * BLOCK_BYTES };
            let doubt = Doubt { epoch: Epoch(1), seq: Seq(*seq), range, sized: false };
            in_doubt.extend([doubt, Doubt { range: ByteRange::default(), sized: true, ..doubt }]);
        }
        bench.answer(request, Answer::Fenced { in_doubt, size: blocks[slot.index()] * BLOCK_BYTES });
    }
    let sources = bench.effects.iter().filter_map(|e| match e {
        Effect::Send(Request { body: Body::Pull { size: true, from, .. }, .. }) => Some(*from),
        _ => None,
    });
    let sources: Vec<Slot> = sources.collect();
    assert!(sources.len() == 2 && sources[0] == sources[1], "{sources:?}");
    sources[0]
}

#[test]
fn of_writes_that_were_in_flight_together_the_one_that_made_the_file_longest_decides_on_the_size() {
    // B has the second write only, A and C the first, which reaches further, and no brick has grown by both.
    assert_eq!(size_comes_from([&[(1, 2..4)], &[(2, 0..1)], &[(1, 2..4)]], [4, 1, 4]), A);
    // A truncate is newer than all that was written before it, and cuts that off.
    assert_eq!(size_comes_from([&[(1, 2..4)], &[(1, 2..4), (2, 1..4)], &[(1, 2..4)]], [4, 1, 4]), B);
    // A copy of it whose bytes did not come any more is as good.
    assert_eq!(size_comes_from([&[(1, 2..4)], &[], &[(2, 0..0)]], [4, 4, 1]), C);
}
