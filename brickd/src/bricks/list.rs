//! Lists of regions and extents. What one answer cannot hold comes in pages: a brick asks again from the file after the last
//! one it was told of, until it is told of none; a client asks again when it has repaired what it was told of.

use std::time::{Duration, Instant};

use mortar_proto::config::Slot;
use mortar_proto::interval::IntervalSet;
use mortar_proto::replica::Stamp;
use mortar_proto::wire::data::{self, request::What, response::Outcome};
use mortar_proto::{EXTENT_BYTES, Ino, SIZE_REGION};

use super::brick::Brick;
use super::requests::{Answer, behind, failed, store_failed};
use crate::store::StoreError;

/// Intervals in one answer, at most: they fit into a frame's header.
const MAX_LISTED: usize = 100_000;
/// How long a brick looks for data before it answers with what it has found: another one waits for it.
const PAGE_TIME: Duration = Duration::from_secs(1);
/// Intervals of one file in an answer to a brick, at most; more are told as fewer that cover them.
const MAX_OF_FILE: usize = 50_000;

fn reply(files: Vec<(Ino, IntervalSet)>) -> Answer {
    let row = |(ino, set): (Ino, IntervalSet)| data::FileRegions {
        ino: ino.0,
        bounds: set.iter().take(MAX_LISTED).flat_map(|r| [r.start, r.end]).collect(),
    };
    (Outcome::List(data::ListReply { files: files.into_iter().map(row).collect() }), Vec::new())
}

/// What the brick in `slot` must get back in a file, as far as this one knows `[S2]`.
pub(super) fn to_repair(brick: &Brick, ino: Ino, slot: u32) -> Answer {
    let Some(x) = Slot::ALL.get(slot as usize) else { return failed(libc::EINVAL, "no such slot", false) };
    let listed = brick.replica.lock().repair_list(*x, ino);
    listed.map_or_else(behind, |regions| reply(vec![(ino, regions)]))
}

/// What another brick needs to plan or to end its repair `[S1]`, `[S4]`, from file `from` on: told under the same configuration
/// only, and when nothing accepted under an older one runs.
pub(super) fn for_peer(brick: &Brick, from: Ino, stamp: &Stamp, what: &What) -> Answer {
    let replica = brick.replica.lock();
    if replica.report().is_none_or(|r| r.n != stamp.n) {
        return behind();
    }
    if matches!(what, What::DataList(_)) {
        drop(replica);
        return data_from(brick, from).map_or_else(|e| store_failed(brick, &e), reply);
    }
    let files: Vec<(Ino, IntervalSet)> = match what {
        What::MissedList(list) => match Slot::ALL.get(list.slot as usize) {
            Some(x) => replica.missed(*x),
            None => return failed(libc::EINVAL, "no such slot", false),
        },
        _ => {
            let set = |extents: Vec<u64>| extents.into_iter().map(|e| e..e + 1).collect();
            replica.intents().into_iter().map(|(ino, extents)| (ino, set(extents))).collect()
        }
    };
    drop(replica);
    reply(page(files, from))
}

/// Files from `from` on, each with its extents that have data: as many as fit into an answer, and as many as are looked at in time.
fn data_from(brick: &Brick, from: Ino) -> Result<Vec<(Ino, IntervalSet)>, StoreError> {
    let mut inos = brick.objects.inodes()?;
    inos.retain(|ino| *ino >= from);
    inos.sort_unstable();
    let (began, mut listed, mut page) = (Instant::now(), 0, Vec::new());
    for ino in inos {
        let extents = coarser(data_of(brick, ino)?, MAX_OF_FILE);
        listed += extents.iter().count();
        if !page.is_empty() && (listed > MAX_LISTED || began.elapsed() > PAGE_TIME) {
            break;
        }
        page.push((ino, extents));
    }
    Ok(page)
}

/// The extents of a file that have data here, and its first one, which stands for its size.
pub(super) fn data_of(brick: &Brick, ino: Ino) -> Result<IntervalSet, StoreError> {
    let mut extents = IntervalSet::new();
    extents.insert(0..1);
    let mut at = 0;
    while let Some(data) = brick.objects.seek(ino, at, false)? {
        let hole = brick.objects.seek(ino, data, true)?.unwrap_or(data).max(data + 1);
        let (first, end) = (data / EXTENT_BYTES, hole.div_ceil(EXTENT_BYTES));
        extents.insert(first..end);
        at = end * EXTENT_BYTES;
    }
    Ok(extents)
}

fn page(files: Vec<(Ino, IntervalSet)>, from: Ino) -> Vec<(Ino, IntervalSet)> {
    let mut page = Vec::new();
    let mut listed = 0;
    for (ino, set) in files.into_iter().filter(|(ino, _)| *ino >= from) {
        let set = coarser(set, MAX_OF_FILE);
        listed += set.iter().count();
        if !page.is_empty() && listed > MAX_LISTED {
            break;
        }
        page.push((ino, set));
    }
    page
}

/// At most about `limit` intervals that cover the set: what lies closest together is joined. More is repaired then than has to
/// be, never less. The size stays by itself.
fn coarser(set: IntervalSet, limit: usize) -> IntervalSet {
    let mut set = set;
    let mut gap = 1;
    while set.iter().count() > limit {
        let mut joined = IntervalSet::new();
        let mut last: Option<u64> = None;
        for range in set.iter() {
            match last.filter(|end| range.start < SIZE_REGION && range.start - end <= gap) {
                Some(end) => joined.insert(end..range.end),
                None => joined.insert(range.clone()),
            }
            last = Some(range.end);
        }
        set = joined;
        gap *= 2;
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_is_too_long_is_told_as_a_shorter_one_that_covers_it() {
        let size = SIZE_REGION..SIZE_REGION + 1;
        let set: IntervalSet = (0..1000_u64).map(|i| i * i..i * i + 1).chain([size.clone()]).collect();
        let shorter = coarser(set.clone(), 100);
        assert!(shorter.iter().count() <= 100);
        assert!(set.iter().all(|r| shorter.covers(&r)));
        assert!(shorter.iter().any(|r| r == size), "the size is no region among others");
    }

    #[test]
    fn pages_tell_of_every_file_once() {
        let files: Vec<_> =
            (1..=7_u64).map(|i| (Ino(i * 10), (0..40_000_u64).map(|r| r * 3..r * 3 + 1).collect())).collect();
        let (mut from, mut told) = (Ino(0), Vec::new());
        loop {
            let page = page(files.clone(), from);
            let Some((last, _)) = page.last() else { break };
            assert!(page.iter().map(|(_, s): &(_, IntervalSet)| s.iter().count()).sum::<usize>() <= MAX_LISTED);
            from = Ino(last.0 + 1);
            told.extend(page.iter().map(|(ino, _)| ino.0));
        }
        assert_eq!(told, [10, 20, 30, 40, 50, 60, 70]);
    }
}
