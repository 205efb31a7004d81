//! Scrub: when a brick reads all it has, how fast, where it goes on after a restart; and what a difference between the bricks of
//! a set means.
//!
//! A pure machine: the shell gives it the time, reads what it is told to, and keeps its [`Record`].
//!
//! Each brick scrubs what is on itself, region by region. What does not match its checksum is corrupt `[R5]`. Then checksums are
//! compared with those of the other `InSync` bricks. Bricks may differ for a moment where a mutation is in flight, so a
//! difference counts only when it is the same in several looks, and nothing is in doubt or running there on any of them (I5).
//! A brick against two that agree is wrong, and is repaired. Without such a majority nobody can know who is right: that is
//! reported, and nothing is changed.

use crate::config::Slot;
use crate::types::{HOLE, Ino, REPLICAS, Sum};

/// How often the same difference has to be seen, one after the other, before it counts.
const LOOKS: u32 = 3;
/// After so many looks that saw something else each time, a region is left alone until the next scrub: it is being written to.
const MOST_LOOKS: u32 = 10;

/// What of a scrub survives a restart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Record {
    /// It runs; a stopped one, or none at all, does not.
    pub running: bool,
    /// The file and region that come next; `None`: the next scrub begins at the beginning.
    pub place: Option<(Ino, u64)>,
    /// The time that the interval to the next scrub counts from, in seconds since 1970.
    pub since_s: u64,
    /// When the last one that came to its end did; 0: none did yet.
    pub ended_s: u64,
    /// Bytes of this scrub, or the last one, that were looked at.
    pub looked_bytes: u64,
    /// Bytes there were to look at when it began.
    pub total_bytes: u64,
    /// Blocks of this scrub, or the last one, that were corrupt, or otherwise than on the two other bricks.
    pub found: u64,
    /// Blocks, and sizes, that differ between bricks, and nobody knows who is right.
    pub undecided: u64,
}

/// What to do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Nothing: no scrub is running.
    Idle,
    /// Nothing for so many milliseconds.
    Wait(u64),
    /// Begin: tell how much there is to look at ([`Scrub::began`]).
    Begin,
    /// Look at this region of this file, or at what comes next after it; then [`Scrub::looked`].
    Look(Ino, u64),
}

/// A brick's scrub.
#[derive(Clone, Debug)]
pub struct Scrub {
    record: Record,
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// From the end of one to the beginning of the next; `None`: only when it is told to.
    interval_s: Option<u64>,
    /// Nothing is looked at before.
    free_ms: u64,
}

impl Scrub {
    /// After a start, at `now_s`; a brick without a record is new.
    #[must_use]
    pub fn new(record: Option<Record>, now_s: u64) -> Self {
        let record = record.unwrap_or(Record { since_s: now_s, ..Record::default() });
        Self { record, rate: 0, interval_s: None, free_ms: 0 }
    }

    /// Sets the volume's options.
    pub fn set(&mut self, rate: u64, interval_s: Option<u64>) {
        self.rate = rate;
        self.interval_s = interval_s;
    }

    /// What is to be kept.
    #[must_use]
    pub fn record(&self) -> Record {
        self.record
    }

    /// When the next one begins by itself, in seconds since 1970.
    #[must_use]
    pub fn next_s(&self) -> Option<u64> {
        self.interval_s.filter(|_| !self.record.running).map(|interval| self.record.since_s.saturating_add(interval))
    }

    /// The administrator starts it: one that was stopped goes on where it was. False: it is running.
    pub fn start(&mut self) -> bool {
        let was_running = self.record.running;
        self.record.running = true;
        !was_running
    }

    /// The administrator stops it, and it keeps its place. The next one begins by itself an interval later. False: none is
    /// running.
    pub fn stop(&mut self, now_s: u64) -> bool {
        let was_running = self.record.running;
        if was_running {
            self.record.running = false;
            self.record.since_s = now_s;
        }
        was_running
    }

    /// What to do at `now_ms`, of a clock that never goes back, and `now_s`, the time of day, which may.
    pub fn turn(&mut self, now_ms: u64, now_s: u64) -> Turn {
        // A clock that was far ahead when it was written down must not put the next scrub off for ever.
        self.record.since_s = self.record.since_s.min(now_s);
        if self.next_s().is_some_and(|at| at <= now_s) {
            self.record.running = true;
        }
        match self.record.place {
            _ if !self.record.running => Turn::Idle,
            None => Turn::Begin,
            Some(_) if now_ms < self.free_ms => Turn::Wait(self.free_ms - now_ms),
            Some((ino, region)) => Turn::Look(ino, region),
        }
    }

    /// It begins at the beginning, with so much to look at.
    pub fn began(&mut self, total_bytes: u64) {
        let Record { since_s, ended_s, .. } = self.record;
        let place = Some((Ino(0), 0));
        self.record = Record { running: true, place, since_s, ended_s, total_bytes, ..Record::default() };
    }

    /// So many bytes were looked at, and so many blocks found wrong here; `next` is what comes next, and `None` the end.
    pub fn looked(&mut self, next: Option<(Ino, u64)>, bytes: u64, found: u64, now_ms: u64, now_s: u64) {
        self.record.looked_bytes += bytes;
        self.record.found += found;
        self.record.place = next;
        if next.is_none() {
            self.record.running = false;
            (self.record.since_s, self.record.ended_s) = (now_s, now_s);
        }
        if self.rate > 0 {
            let takes_ms = u128::from(bytes) * 1000 / u128::from(self.rate);
            self.free_ms = self.free_ms.max(now_ms) + takes_ms as u64;
        }
    }

    /// Something differs between bricks, and nobody knows who is right.
    pub fn undecided(&mut self, count: u64) {
        self.record.undecided += count;
    }
}

/// What an `InSync` brick has in a region.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Picture {
    /// The size of the file.
    pub size: u64,
    /// A sum for each block of the region, that of a hole past the end.
    pub sums: Vec<Sum>,
}

/// By brick: what each has that can be asked.
type Of<T> = [Option<T>; REPLICAS];

/// How the pictures of one region differ.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Difference {
    /// The blocks of the region that are not the same everywhere, and the sum of each brick.
    blocks: Vec<(u64, Of<Sum>)>,
    /// The sizes, if they are not the same everywhere.
    sizes: Option<Of<u64>>,
}

/// Who is right about something that is not the same everywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// All but this one.
    Outvoted(usize),
    /// Nobody knows.
    Undecided,
}

fn verdict<T: PartialEq>(of: &Of<T>) -> Verdict {
    match of {
        [Some(a), Some(b), Some(c)] if b == c && a != b => Verdict::Outvoted(0),
        [Some(a), Some(b), Some(c)] if a == c && a != b => Verdict::Outvoted(1),
        [Some(a), Some(b), Some(c)] if a == b && a != c => Verdict::Outvoted(2),
        _ => Verdict::Undecided,
    }
}

fn differ<T: PartialEq>(of: &Of<T>) -> bool {
    let mut known = of.iter().flatten();
    known.next().is_some_and(|first| known.any(|other| other != first))
}

impl Difference {
    /// There is none.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.blocks.is_empty() && self.sizes.is_none()
    }
    /// Blocks of the region in which this brick is alone against two that agree.
    #[must_use]
    pub fn outvoted(&self, slot: Slot) -> Vec<u64> {
        self.with(Verdict::Outvoted(slot.index()))
    }
    /// Its size, and that of two others that agree.
    #[must_use]
    pub fn outvoted_size(&self, slot: Slot) -> Option<(u64, u64)> {
        let of = self.sizes.as_ref().filter(|of| verdict(of) == Verdict::Outvoted(slot.index()))?;
        let others = of.iter().enumerate().find(|(i, _)| *i != slot.index())?.1;
        of.get(slot.index()).copied().flatten().zip(*others)
    }
    /// Blocks of the region of which nobody knows who is right.
    #[must_use]
    pub fn undecided(&self) -> Vec<u64> {
        self.with(Verdict::Undecided)
    }
    /// Nobody knows which size is right.
    #[must_use]
    pub fn is_size_undecided(&self) -> bool {
        self.sizes.as_ref().is_some_and(|of| verdict(of) == Verdict::Undecided)
    }
    fn with(&self, wanted: Verdict) -> Vec<u64> {
        self.blocks.iter().filter(|(_, of)| verdict(of) == wanted).map(|(block, _)| *block).collect()
    }
}

/// Compares what the bricks have, by slot; `None`: the brick is not in sync, and is not asked.
#[must_use]
pub fn compare(pictures: &Of<Picture>) -> Difference {
    let count = pictures.iter().flatten().map(|p| p.sums.len()).max().unwrap_or(0);
    let sums = |block: usize| -> Of<Sum> {
        core::array::from_fn(|i| pictures[i].as_ref().map(|p| p.sums.get(block).copied().unwrap_or(HOLE)))
    };
    let sizes: Of<u64> = core::array::from_fn(|i| pictures[i].as_ref().map(|p| p.size));
    Difference {
        blocks: (0..count).map(|b| (b as u64, sums(b))).filter(|(_, of)| differ(of)).collect(),
        sizes: Some(sizes).filter(differ),
    }
}

/// Several looks at one region.
#[derive(Clone, Debug, Default)]
pub struct Looks {
    seen: Option<Difference>,
    same: u32,
    looks: u32,
}

/// What to do after a look.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// The bricks are the same, or one cannot tell just now.
    Done,
    /// Look again, a little later.
    Again,
    /// They do differ.
    Differ(Difference),
}

impl Looks {
    /// What was seen; `None`: something is in doubt or running there, on one brick at least.
    pub fn saw(&mut self, difference: Option<Difference>) -> Next {
        self.looks += 1;
        if difference.as_ref().is_some_and(Difference::is_none) {
            return Next::Done;
        }
        let is_same = difference.is_some() && self.seen == difference;
        self.same = if is_same { self.same + 1 } else { 1 };
        self.seen = difference;
        match self.seen.take_if(|_| self.same >= LOOKS) {
            Some(difference) => Next::Differ(difference),
            None if self.looks >= MOST_LOOKS => Next::Done,
            None => Next::Again,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(size: u64, sums: &[Sum]) -> Option<Picture> {
        Some(Picture { size, sums: sums.to_vec() })
    }

    #[test]
    fn one_brick_against_two_is_wrong_and_without_a_majority_nobody_is() {
        let d = compare(&[picture(9, &[1, 2, 3, 4]), picture(9, &[1, 7, 3, 5]), picture(8, &[1, 2, 8, 6])]);
        assert_eq!(Slot::ALL.map(|s| d.outvoted(s)), [vec![], vec![1], vec![2]]);
        assert_eq!(Slot::ALL.map(|s| d.outvoted_size(s)), [None, None, Some((8, 9))]);
        assert_eq!((d.undecided(), d.is_size_undecided()), (vec![3], false));
        let d = compare(&[picture(9, &[1]), None, picture(8, &[2])]);
        assert_eq!((d.undecided(), d.is_size_undecided()), (vec![0], true));
        assert!(Slot::ALL.iter().all(|s| d.outvoted(*s).is_empty() && d.outvoted_size(*s).is_none()));
        assert!(compare(&[picture(9, &[1]), None, None]).is_none());
        assert!(compare(&[picture(9, &[1, 2]), picture(9, &[1, 2]), picture(9, &[1, 2])]).is_none());
        assert_eq!(compare(&[picture(9, &[1, 2]), picture(9, &[1]), picture(9, &[1, 2])]).outvoted(Slot(1)), [1]);
    }

    #[test]
    fn a_difference_counts_only_when_it_stays_the_same() {
        let differ = |sum| Some(compare(&[picture(9, &[sum]), picture(9, &[1]), picture(9, &[1])]));
        let mut looks = Looks::default();
        assert_eq!(looks.saw(differ(2)), Next::Again);
        assert_eq!(looks.saw(differ(2)), Next::Again);
        assert_eq!(looks.saw(None), Next::Again, "something is in doubt: what was seen before may be of that");
        assert_eq!(looks.saw(differ(2)), Next::Again);
        assert_eq!(looks.saw(Some(Difference::default())), Next::Done);
        let mut looks = Looks::default();
        for _ in 0..2 {
            assert_eq!(looks.saw(differ(2)), Next::Again);
        }
        assert_eq!(looks.saw(differ(2)), Next::Differ(differ(2).unwrap()));
        // The brick is always the one that is ahead: it is being written to.
        let mut looks = Looks::default();
        assert_eq!((2..50).take_while(|sum| looks.saw(differ(*sum)) == Next::Again).count(), MOST_LOOKS as usize - 1);
        let mut looks = Looks::default();
        assert_eq!((0..50).take_while(|_| looks.saw(None) == Next::Again).count(), MOST_LOOKS as usize - 1);
    }

    #[test]
    fn it_goes_at_its_rate_and_goes_on_where_it_was() {
        let mut scrub = Scrub::new(None, 1_000);
        scrub.set(1 << 20, None);
        assert_eq!(scrub.turn(0, 1_000_000), Turn::Idle, "nobody told it to, and there is no interval");
        assert!(scrub.start() && !scrub.start());
        assert_eq!(scrub.turn(0, 1_000), Turn::Begin);
        scrub.began(8 << 20);
        assert_eq!(scrub.turn(0, 1_000), Turn::Look(Ino(0), 0));
        scrub.looked(Some((Ino(5), 3)), 1 << 20, 2, 10, 1_000);
        assert_eq!(scrub.turn(500, 1_000), Turn::Wait(510));
        assert_eq!(scrub.turn(1_010, 1_001), Turn::Look(Ino(5), 3));
        // Stopped, and started anew.
        assert!(scrub.stop(1_001) && !scrub.stop(1_001));
        assert_eq!(scrub.turn(1_010, 1_001), Turn::Idle);
        let mut scrub = Scrub::new(Some(scrub.record()), 1_002);
        assert_eq!(scrub.turn(0, 1_002), Turn::Idle);
        assert!(scrub.start());
        assert_eq!(scrub.turn(0, 1_002), Turn::Look(Ino(5), 3));
        scrub.looked(None, 7 << 20, 0, 0, 1_003);
        let record = scrub.record();
        assert_eq!((record.running, record.ended_s, record.looked_bytes, record.found), (false, 1_003, 8 << 20, 2));
        assert!(scrub.start());
        assert_eq!(scrub.turn(0, 1_003), Turn::Begin, "one that came to its end begins again");
    }

    #[test]
    fn it_begins_by_itself_an_interval_after_the_last_one_and_never_twice() {
        let mut scrub = Scrub::new(None, 1_000);
        scrub.set(0, Some(100));
        assert_eq!((scrub.turn(0, 1_099), scrub.next_s()), (Turn::Idle, Some(1_100)));
        assert_eq!(scrub.turn(0, 1_100), Turn::Begin);
        scrub.began(1);
        assert_eq!((scrub.turn(0, 9_999), scrub.next_s()), (Turn::Look(Ino(0), 0), None));
        scrub.looked(None, 1, 0, 0, 10_000);
        assert_eq!(scrub.turn(0, 10_099), Turn::Idle);
        assert_eq!(scrub.turn(0, 10_100), Turn::Begin);
        scrub.began(1);
        scrub.stop(10_100);
        assert_eq!(scrub.turn(0, 10_199), Turn::Idle);
        // A clock that goes back puts nothing off for longer than the interval.
        assert_eq!(scrub.turn(0, 50), Turn::Idle);
        assert_eq!(scrub.turn(0, 150), Turn::Look(Ino(0), 0));
    }
}
