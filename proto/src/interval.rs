//! Sets of numbers as disjoint half-open intervals: missed regions, repair plans, intents.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of `u64` kept as disjoint, non-adjacent intervals.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IntervalSet(BTreeMap<u64, u64>);

impl IntervalSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }
    /// True when there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// How many numbers are in it.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.iter().map(|(s, e)| e - s).sum()
    }
    /// Its intervals, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(s, e)| *s..*e)
    }
    /// The first number in it.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        self.0.keys().next().copied()
    }
    /// True when `number` is in it.
    #[must_use]
    pub fn contains(&self, number: u64) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, e)| number < *e)
    }
    /// True when every number of `range` is in it.
    #[must_use]
    pub fn covers(&self, range: &Range<u64>) -> bool {
        range.is_empty() || self.0.range(..=range.start).next_back().is_some_and(|(_, e)| range.end <= *e)
    }
    /// Adds `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((s, e)) = self.0.range(..=end).next_back().map(|(s, e)| (*s, *e)) {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.0.remove(&s);
        }
        self.0.insert(start, end);
    }
    /// Takes `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((s, e)) = self.0.range(..range.end).next_back().map(|(s, e)| (*s, *e)) {
            if e <= range.start {
                break;
            }
            self.0.remove(&s);
            if e > range.end {
                self.0.insert(range.end, e);
            }
            if s < range.start {
                self.0.insert(s, range.start);
            }
        }
    }
    /// Adds all of `other`.
    pub fn union(&mut self, other: &Self) {
        for range in other.iter() {
            self.insert(range);
        }
    }
}

impl FromIterator<Range<u64>> for IntervalSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(iter: I) -> Self {
        let mut set = Self::new();
        for range in iter {
            set.insert(range);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every sequence of four inserts and removes over small ranges agrees with a plain set of numbers.
    #[test]
    fn agrees_with_a_plain_set() {
        let ranges: Vec<Range<u64>> = (0..6).flat_map(|s| (s..=6).map(move |e| s..e)).collect();
        let mut random = 7_u64;
        for _ in 0..20_000 {
            let (mut set, mut plain) = (IntervalSet::new(), BTreeSet::new());
            for _ in 0..6 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let range = ranges[(random >> 33) as usize % ranges.len()].clone();
                if random >> 62 == 0 {
                    set.remove(range.clone());
                    plain.retain(|n| !range.contains(n));
                } else {
                    set.insert(range.clone());
                    plain.extend(range.clone());
                }
                assert_eq!(set.iter().flatten().collect::<BTreeSet<_>>(), plain);
                assert_eq!(set.len() as usize, plain.len());
                assert_eq!(set.covers(&range), range.clone().all(|n| plain.contains(&n)));
                let spans: Vec<_> = set.iter().collect();
                assert!(spans.windows(2).all(|w| w[0].end < w[1].start), "{spans:?}");
            }
        }
    }
}
