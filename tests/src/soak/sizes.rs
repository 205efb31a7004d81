//! A program on two mounts at once: what it changes through one, in any unit of bytes, it finds exactly so through the other,
//! at once: contents, sizes, holes, names.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::pauses::What;
use super::workers::Hand;

const FOLDER: &str = "sizes";
/// The largest that a file becomes.
const MOST: u64 = 512 << 10;

#[derive(Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Truncate(u64),
    Punch(u64, u64),
    Rename(String),
}

/// Works until the run ends.
pub fn work(first: &mut Hand, mut second: Hand) {
    let made = first.attempt(What::Log, "making a directory", |mount, _| std::fs::create_dir(mount.join(FOLDER)));
    if made.is_none() {
        return;
    }
    let mut number = 0;
    while first.goes_on() {
        number += 1;
        live(first, &mut second, number);
    }
}

/// The life of one file, up to its end or to the moment when nobody knows what it holds.
fn live(first: &mut Hand, second: &mut Hand, number: u64) -> Option<()> {
    let mut name = format!("{FOLDER}/file-{number}");
    let mut content: Vec<u8> = Vec::new();
    let path = name.clone();
    first.attempt(What::Log, "making a file", |mount, _| {
        OpenOptions::new().write(true).create_new(true).open(mount.join(path)).map(drop)
    })?;
    let changes = first.rng.between(5, 60);
    for step in 0..changes {
        if !first.goes_on() {
            return None;
        }
        let change = draw(first, &name, content.len() as u64, step);
        let (by, other) = if first.rng.chance(500) { (&mut *first, &mut *second) } else { (&mut *second, &mut *first) };
        by.attempt(What::Log, &format!("changing {name}"), |mount, _| apply(&change, mount, &name))?;
        remember(&change, &mut content, &mut name);
        compare(other, &name, &content)?;
        first.count_other();
        first.rest(150);
    }
    first.attempt(What::Log, "removing a file", |mount, _| std::fs::remove_file(mount.join(&name)))?;
    let gone = second.attempt(What::Log, "looking for a file", |mount, _| mount.join(&name).try_exists())?;
    if gone {
        second.complain(&format!("{name} is still there after it was removed through the other mount"));
    }
    Some(())
}

fn draw(hand: &mut Hand, name: &str, size: u64, step: u64) -> Change {
    let rng = &mut hand.rng;
    match rng.below(10) {
        0 => Change::Truncate(rng.below(MOST)),
        1 if size > 0 => Change::Punch(rng.below(size), rng.between(1, MOST)),
        2 => Change::Rename(format!("{}-{step}", name.split('-').take(2).collect::<Vec<_>>().join("-"))),
        3 => Change::Write(size, bytes(rng)),
        _ => Change::Write(rng.below((size + 1).min(MOST)), bytes(rng)),
    }
}

fn bytes(rng: &mut crate::sim::rng::Rng) -> Vec<u8> {
    let length = if rng.chance(500) { rng.between(1, 600) } else { rng.between(1, 70_000) };
    (0..length).map(|_| rng.draw() as u8).collect()
}

fn apply(change: &Change, mount: &std::path::Path, name: &str) -> io::Result<()> {
    let path = mount.join(name);
    let open = || OpenOptions::new().write(true).open(&path);
    match change {
        Change::Write(at, data) => open()?.write_all_at(data, *at),
        Change::Truncate(size) => open()?.set_len(*size),
        Change::Punch(at, length) => {
            let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            Ok(rustix::fs::fallocate(open()?, mode, *at, *length)?)
        }
        Change::Rename(to) => std::fs::rename(&path, mount.join(to)),
    }
}

fn remember(change: &Change, content: &mut Vec<u8>, name: &mut String) {
    match change {
        Change::Write(at, data) => {
            let (at, end) = (*at as usize, *at as usize + data.len());
            if content.len() < end {
                content.resize(end, 0);
            }
            content[at..end].copy_from_slice(data);
        }
        Change::Truncate(size) => content.resize(*size as usize, 0),
        Change::Punch(at, length) => {
            let end = (at + length).min(content.len() as u64) as usize;
            content[*at as usize..end].fill(0);
        }
        Change::Rename(to) => name.clone_from(to),
    }
}

fn compare(hand: &mut Hand, name: &str, content: &[u8]) -> Option<()> {
    let (size, found) = hand.attempt(What::Log, &format!("reading {name}"), |mount, _| {
        let path = mount.join(name);
        Ok((std::fs::metadata(&path)?.len(), std::fs::read(&path)?))
    })?;
    if size != content.len() as u64 || found.len() != content.len() {
        hand.complain(&format!(
            "{name} has {size} bytes, of which {} can be read, instead of {}",
            found.len(),
            content.len()
        ));
    } else if let Some(at) = found.iter().zip(content).position(|(a, b)| a != b) {
        hand.complain(&format!("{name} holds {} instead of {} at {at} of {size}", found[at], content[at]));
    }
    Some(())
}
