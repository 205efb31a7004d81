//! The disks that a power cut can leave: all that was written before a flush that has ended, and any of the sectors written since.

use std::fmt;
use std::sync::Arc;

use crate::chance::Chance;
use crate::disk::{Disk, Pages, SECTOR, Step, put};

/// Which of the sectors written since the last flush are there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Nothing,
    Everything,
    /// So many writes, in order.
    Prefix(usize),
    /// All writes but one, or one only.
    WithoutWrite(usize),
    OnlyWrite(usize),
    /// All sectors but one, or one only.
    WithoutSector(usize),
    OnlySector(usize),
    /// Each sector with a chance in percent.
    Some(u64, u64),
}

/// The disk at a flush that was asked for and has not ended.
pub struct Window {
    /// The steps since the last flush.
    pub steps: std::ops::Range<usize>,
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the power cut before the flush of step {}", self.steps.end)
    }
}

/// The windows of what a disk remembers; those in which nothing was written too, for what is promised may have changed.
pub fn windows(steps: &[Step]) -> Vec<Window> {
    let mut found = Vec::new();
    let mut start = 0;
    for (at, step) in steps.iter().enumerate() {
        if matches!(step, Step::Flush) {
            found.push(Window { steps: start..at });
            start = at + 1;
        }
    }
    found.push(Window { steps: start..steps.len() });
    found
}

/// The writes of a window.
fn writes<'a>(steps: &'a [Step], window: &Window) -> Vec<(u64, &'a [u8])> {
    let written = |step: &'a Step| match step {
        Step::Write(offset, data) => Some((*offset, &data[..])),
        Step::Flush => None,
    };
    steps[window.steps.clone()].iter().filter_map(written).collect()
}

/// Parts of a window that are worth a try: all the simple ones of a few writes, and as many others as `others` says.
pub fn parts(steps: &[Step], window: &Window, others: usize, chance: &mut Chance) -> Vec<Part> {
    let writes = writes(steps, window);
    let (count, sectors) = (writes.len(), writes.iter().map(|(_, d)| d.len() / SECTOR).sum::<usize>());
    let mut parts = vec![Part::Nothing];
    if count == 0 {
        return parts;
    }
    parts.push(Part::Everything);
    let pick = |n: usize, chance: &mut Chance| chance.below(n as u64) as usize;
    let few = count.min(others);
    for i in 0..few {
        let write = if count <= others { i } else { pick(count, chance) };
        parts.extend([Part::Prefix(write), Part::WithoutWrite(write), Part::OnlyWrite(write)]);
    }
    for _ in 0..others {
        parts.push(Part::WithoutSector(pick(sectors, chance)));
        parts.push(Part::OnlySector(pick(sectors, chance)));
        parts.push(Part::Some([10, 50, 90][pick(3, chance)], chance.below(u64::MAX)));
    }
    parts.sort_by_key(|p| format!("{p:?}"));
    parts.dedup();
    parts
}

/// Makes `disk` the one that is left when of the window that part is there.
pub fn leave(disk: &Disk, durable: &Arc<Pages>, steps: &[Step], window: &Window, part: Part) {
    let mut chance = Chance::new(if let Part::Some(_, seed) = part { seed } else { 0 });
    let mut number = 0;
    let mut kept: Vec<(u64, &[u8])> = Vec::new();
    for (index, (offset, data)) in writes(steps, window).into_iter().enumerate() {
        for (i, sector) in data.chunks(SECTOR).enumerate() {
            let is_there = match part {
                Part::Nothing => false,
                Part::Everything => true,
                Part::Prefix(n) => index < n,
                Part::WithoutWrite(n) => index != n,
                Part::OnlyWrite(n) => index == n,
                Part::WithoutSector(n) => number != n,
                Part::OnlySector(n) => number == n,
                Part::Some(percent, _) => chance.below(100) < percent,
            };
            if is_there {
                kept.push((offset + (i * SECTOR) as u64, sector));
            }
            number += 1;
        }
    }
    disk.become_image(Arc::clone(durable), kept.into_iter());
}

/// The flush at the end of the window has ended.
pub fn pass(durable: &mut Arc<Pages>, steps: &[Step], window: &Window) {
    let pages = Arc::make_mut(durable);
    for (offset, data) in writes(steps, window) {
        put(pages, offset, data);
    }
}

/// Takes a sample of the images that are left, in the order of windows.
pub fn sample(left: &mut Vec<(usize, Part)>, most: usize, chance: &mut Chance) -> Vec<(usize, Part)> {
    let mut taken = Vec::new();
    while taken.len() < most && !left.is_empty() {
        taken.push(left.swap_remove(chance.below(left.len() as u64) as usize));
    }
    taken.sort_by_key(|(window, _)| *window);
    taken
}
