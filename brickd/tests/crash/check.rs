//! The promises, checked on one brick of a disk that a power cut left: the store is opened as the brick opens it, and looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use mortar_brickd::store::{self, BrickId3, Opened};
use mortar_brickd::tree::Tree;
use mortar_proto::metadata::state::{Node, State};
use mortar_proto::{BLOCK_BYTES, ByteRange, EXTENT_BYTES, Ino, SetId, VolumeId, checksum};

use crate::content::Content;
use crate::play::object;
use crate::server::WITNESSES;
use crate::trace::{History, Trace};

const BLOCK: usize = BLOCK_BYTES as usize;

/// Opens the brick in `root`, and holds it against what was promised at a step of its disk.
///
/// # Errors
/// A sentence: the promise that is broken.
pub fn brick(root: &Path, trace: &Trace, step: usize) -> Result<(), String> {
    let Some((id, row)) =
        trace.names.bricks.iter().find(|(_, b)| root.ends_with(Path::new(&b.path).file_name().unwrap_or_default()))
    else {
        return Err("the test does not know the brick".into());
    };
    if step >= trace.made && !root.join(".mortar/brick.toml").exists() {
        return Err("the brick was made, and is not there".into());
    }
    let ids = BrickId3 { cluster: trace.names.cluster, volume: row.volume, brick: *id };
    let server = server_at(trace, step).map_err(|e| e.to_string())?;
    let opened = store::open(root, server.path(), ids, "v").map_err(|e| format!("the brick does not open: {e:#}"))?;
    store::make_sums_anew(&opened.objects, &opened.doubts).map_err(|e| e.to_string())?;
    let clean = opened.loaded.clean;
    if clean && !trace.stops.iter().any(|s| s.begun <= step && step <= s.over) {
        return Err("the stop is called clean, and was not".into());
    }
    // All that is under way or was lately, and some of the others.
    let is_looked_at =
        |(i, h): &(usize, &History)| step < h.gone && (h.is_lively(step) || (step + i).is_multiple_of(8));
    for (_, history) in trace.files.iter().enumerate().filter(is_looked_at) {
        file(root, &opened, trace, history, step).map_err(|why| {
            format!("{why}; file {:x}, to which was done: {}clean: {clean}", history.ino.0, history.told)
        })?;
    }
    for miss in trace.misses.iter().filter(|m| m.from <= step && step < m.until) {
        let is_there = |(x, ino, regions): &(_, Ino, std::ops::Range<u64>)| {
            (*x, *ino) == (miss.brick, miss.ino) && regions.contains(&miss.region)
        };
        if !opened.loaded.missed.iter().any(is_there) {
            return Err(format!(
                "[W5] region {} of {:x}, missed by another brick, is forgotten",
                miss.region, miss.ino.0
            ));
        }
    }
    let before: Vec<_> = trace.files.iter().map(|h| number_of(root, h.ino)).collect();
    names(root, &opened, row.set, row.volume, &trace.names)?;
    for (history, before) in trace.files.iter().zip(before) {
        if before.is_some() && number_of(root, history.ino) != before {
            return Err(format!("the tree was mended, and the object of {:x} is another", history.ino.0));
        }
    }
    Ok(())
}

/// The state directory of a server that remembers of its bricks what it did at a step.
fn server_at(trace: &Trace, step: usize) -> std::io::Result<tempfile::TempDir> {
    let server = tempfile::tempdir()?;
    let dir = server.path().join(WITNESSES);
    std::fs::create_dir(&dir)?;
    let seen = trace.seen.iter().rfind(|(at, _)| *at <= step);
    for (name, text) in seen.iter().flat_map(|(_, seen)| seen) {
        std::fs::write(dir.join(name), text)?;
    }
    Ok(server)
}

/// The number that XFS gave an object.
fn number_of(root: &Path, ino: Ino) -> Option<u64> {
    std::fs::metadata(&object(root, ino)[0]).ok().map(|m| m.ino())
}

/// The blocks of a file that are not zeroes, and its size.
fn read(path: &Path) -> std::io::Result<Content> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Content::default()),
        Err(e) => return Err(e),
    };
    let mut content = Content { size: file.metadata()?.len(), blocks: BTreeMap::new() };
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start))?;
        for number in start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let mut block = [0; BLOCK];
            let length = (content.size - number * BLOCK_BYTES).min(BLOCK_BYTES) as usize;
            file.read_exact_at(&mut block[..length], number * BLOCK_BYTES)?;
            if block.iter().any(|b| *b != 0) {
                content.blocks.insert(number, Arc::new(block));
            }
        }
        at = end;
    }
    Ok(content)
}

/// A file is what was promised, or, where its intents say so, what it was on its way to; and its checksums match.
fn file(root: &Path, opened: &Opened, trace: &Trace, history: &History, step: usize) -> Result<(), String> {
    let (promised, begun) = history.between(step);
    let mut possible: Vec<&Content> = history.states[promised..=begun].iter().map(|s| &s.content).collect();
    let mut settled = trace.settled(history, step);
    // [W7] What was recorded; after a clean stop all is promised, and nothing is made anew.
    let mut intents: BTreeSet<u64> =
        opened.loaded.intents.iter().filter(|(ino, _)| *ino == history.ino).map(|(_, extent)| *extent).collect();
    if opened.loaded.clean {
        possible = possible.split_off(possible.len() - 1);
        settled.clone_from(&possible);
        intents.clear();
    }
    let found = read(&object(root, history.ino)[0]).map_err(|e| format!("the object cannot be read: {e}"))?;
    let sizes = possible.iter().map(|c| c.size);
    let (least, most) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
    if found.size < least || found.size > most {
        return Err(format!("[I7] it has {} bytes, and should have {least} to {most}", found.size));
    }
    if intents.is_empty() && !settled.iter().any(|c| c.size == found.size) {
        let was = possible[0].size;
        return Err(format!("[W7] it has {} bytes instead of {was}, and no intent says so", found.size));
    }
    let mut extents: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for number in possible.iter().copied().chain([&found]).flat_map(|c| c.blocks.keys().copied()) {
        extents.entry(number * BLOCK_BYTES / EXTENT_BYTES).or_default().insert(number);
    }
    for (extent, blocks) in &extents {
        let is_settled = |c: &&Content| blocks.iter().all(|number| found.block(*number) == c.block(*number));
        if !intents.contains(extent) && !settled.iter().any(is_settled) {
            let differs = blocks.iter().find(|number| found.block(**number) != possible[0].block(**number));
            return Err(format!("[W7] block {differs:?} has changed or is torn, and no intent says so"));
        }
        blocks.iter().try_for_each(|number| bytes(*number, &found, &possible))?;
    }
    sums(opened, history.ino, &found)
}

/// Each byte is what it was, or what it was on its way to. Not each sector: a page that is being written to the disk may be
/// changed meanwhile, for no file system without checksums of its own has it wait, and a disk takes a sector as it finds it.
fn bytes(number: u64, found: &Content, possible: &[&Content]) -> Result<(), String> {
    for (i, byte) in found.block(number).iter().enumerate() {
        if !possible.iter().any(|content| content.block(number)[i] == *byte) {
            return Err(format!("[I7] byte {i} of block {number} is neither what it was nor what it was to be"));
        }
    }
    Ok(())
}

/// [S3] After the start every block matches its checksum, and past the end there are none.
fn sums(opened: &Opened, ino: Ino, found: &Content) -> Result<(), String> {
    let blocks = found.size.div_ceil(BLOCK_BYTES) + 16;
    let range = ByteRange { start: 0, end: blocks * BLOCK_BYTES };
    let (sums, _) = opened.objects.sums(ino, range).map_err(|e| e.to_string())?;
    for (number, sum) in sums.chunks_exact(8).enumerate() {
        let sum = u64::from_le_bytes(sum.try_into().map_err(|_| "half a checksum")?);
        if number as u64 >= found.size.div_ceil(BLOCK_BYTES) && sum != checksum::HOLE {
            return Err(format!(
                "block {number}, past the end, has a checksum: what it becomes later will not match it"
            ));
        }
        let is_hole = sum == checksum::HOLE && !found.blocks.contains_key(&(number as u64));
        if !is_hole && !checksum::matches(found.block(number as u64), sum) {
            return Err(format!("[R5] block {number} does not match its checksum"));
        }
    }
    if !opened.objects.cut_off(ino).map_err(|e| e.to_string())?.is_empty() {
        return Err("[R5] it counts as cut off".into());
    }
    Ok(())
}

/// The tree of names is mended: each file's name leads to its object, and nothing else is there.
fn names(root: &Path, opened: &Opened, set: SetId, volume: VolumeId, names: &State) -> Result<(), String> {
    let mut tree = Tree::new(root, set, Arc::clone(&opened.objects));
    tree.mend(volume, names).map_err(|e| format!("the tree cannot be mended: {e}"))?;
    let top = names.volumes.get(&volume).ok_or("no volume")?.root;
    let Some(Node::Directory(directory)) = names.inodes.get(&top).map(|i| &i.node) else {
        return Err("the volume has no directory".into());
    };
    for (name, (ino, _)) in &directory.entries {
        let path = root.join(String::from_utf8_lossy(name).as_ref());
        let there = path.symlink_metadata().map_err(|e| format!("{}: {e}", path.display()))?;
        let Some(Node::File { .. }) = names.inodes.get(ino).map(|i| &i.node) else { continue };
        let object = std::fs::metadata(&object(root, *ino)[0]).map_err(|e| format!("the object of a name: {e}"))?;
        if object.ino() != there.ino() {
            return Err(format!("{} leads to another file", path.display()));
        }
    }
    for entry in std::fs::read_dir(root).map_err(|e| e.to_string())? {
        let name = entry.map_err(|e| e.to_string())?.file_name();
        let known = directory.entries.contains_key(std::os::unix::ffi::OsStrExt::as_bytes(name.as_os_str()));
        if !known && name != ".mortar" {
            return Err(format!("the name {} is there, and nobody made it", name.display()));
        }
    }
    Ok(())
}
