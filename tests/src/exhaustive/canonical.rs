//! When two worlds are the same: when they look alike after numbers that are only compared with each other were replaced by
//! their rank, and clocks, by nothing where they have all run out, and otherwise by whether they have.
//!
//! It reads what the machines show of themselves for debugging, so that they need nothing that only a test wants, and
//! nothing that they are ever given is left out by mistake.

use std::collections::hash_map::DefaultHasher;
use std::fmt::{Debug, Write as _};
use std::hash::{Hash as _, Hasher as _};

use super::leader::BEGIN_MS;
use super::world::{EPOCH_MS, World};

/// Numbers that only their order matters of: how they are shown, and to which base.
const RANKED: [(&str, u32); 12] = [
    ("ConfigNo(", 16),
    ("Epoch(", 16),
    ("LogIndex(", 16),
    ("SessionId(", 16),
    ("Incarnation(", 16),
    ("BootId(", 16),
    ("OpId(", 10),
    // The numbers of requests, flushes, tickets and connections are given by counters of their own.
    ("RequestId(", 10),
    ("Flush(", 10),
    ("next_request: ", 10),
    ("number: ", 10),
    ("icket: ", 10),
];
/// In [`RANKED`], those from here on share their ranks.
const SHARED: usize = 7;
/// Shown before a number that nothing depends on here: every wait of [E8] has length 0.
const IDLE: &str = "failures: ";

/// The hash of what the world is, however it came to be so; and of that and what may still happen.
#[must_use]
pub fn hashes(world: &World) -> (u64, u64) {
    let leader = &world.leader;
    let sessions: Vec<bool> = world.clients.iter().map(|c| leader.has_session(c.session)).collect();
    let ahead: Vec<_> = world.bricks.iter().map(|b| &leader.entries[b.applied..]).collect();
    let rest = Picture::new(&(leader.configuration(), leader.lease(), sessions, leader.last(), &world.strays, ahead));
    let mut pictures = vec![&rest, leader.monitor.picture(), world.history.picture()];
    pictures.extend(world.bricks.iter().map(|b| b.picture()));
    pictures.extend(world.clients.iter().map(|c| c.picture()));
    pictures.extend(world.pipes.iter().flatten().map(|p| p.picture()));
    let is = together(&pictures, leader.now_ms);
    let mut hasher = DefaultHasher::new();
    (is, &world.allowed, world.faults).hash(&mut hasher);
    (is, hasher.finish())
}

/// A number in a picture, after everything that stands between it and the one before.
#[derive(Clone, Copy, Debug)]
struct Number {
    before: u64,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// Its rank in its class counts.
    Ranked(usize, u128),
    /// A time by the leader's clock.
    Time(u64),
    /// It does not count.
    Nothing,
}

/// What a part of a world looks like.
#[derive(Clone, Debug)]
pub struct Picture {
    numbers: Vec<Number>,
    end: u64,
}

fn hash_of(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(text.as_bytes());
    hasher.finish()
}

/// What becomes of a number that has no class; `None`: it counts as it is.
fn plain(before: &[u8], value: u128) -> Option<What> {
    let (clients, leader) = (u128::from(EPOCH_MS), u128::from(BEGIN_MS));
    if before.ends_with(IDLE.as_bytes()) || (clients..2 * clients).contains(&value) {
        return Some(What::Nothing);
    }
    u64::try_from(value).ok().filter(|_| (leader..2 * leader).contains(&value)).map(What::Time)
}

impl Picture {
    /// Of what shows itself so.
    #[must_use]
    pub fn new(shown: &impl Debug) -> Self {
        let mut text = String::with_capacity(4 << 10);
        // A String takes everything.
        let _ = write!(text, "{shown:?}");
        let bytes = text.as_bytes();
        let (mut numbers, mut from, mut at) = (Vec::new(), 0, 0);
        while at < bytes.len() {
            if !bytes[at].is_ascii_hexdigit() {
                at += 1;
                continue;
            }
            let may_be_named = at > 0 && matches!(bytes[at - 1], b'(' | b' ');
            let class = |(name, _): &(&str, u32)| bytes[..at].ends_with(name.as_bytes());
            let named = if may_be_named { RANKED.iter().position(class) } else { None };
            let base = named.map_or(10, |class| RANKED[class].1);
            let length = bytes[at..].iter().take_while(|b| (**b as char).is_digit(base)).count();
            let end = at + length.max(1);
            if let Some(value) = text.get(at..at + length).and_then(|digits| u128::from_str_radix(digits, base).ok()) {
                let what = match named {
                    Some(class) => Some(What::Ranked(class.min(SHARED), value)),
                    None => plain(&bytes[..at], value),
                };
                if let Some(what) = what {
                    numbers.push(Number { before: hash_of(&text[from..at]), what });
                    from = end;
                }
            }
            at = end;
        }
        Self { numbers, end: hash_of(&text[from..]) }
    }
}

fn together(pictures: &[&Picture], now_ms: u64) -> u64 {
    let mut values: [Vec<u128>; SHARED + 1] = Default::default();
    for number in pictures.iter().flat_map(|p| &p.numbers) {
        if let What::Ranked(class, value) = number.what {
            values[class].push(value);
        }
    }
    for class in &mut values {
        // 0 is nobody, nowhere, never.
        class.push(0);
        class.sort_unstable();
        class.dedup();
    }
    let mut hasher = DefaultHasher::new();
    for picture in pictures {
        for number in &picture.numbers {
            hasher.write_u64(number.before);
            match number.what {
                What::Ranked(class, value) => {
                    hasher.write_usize(values[class].binary_search(&value).unwrap_or(usize::MAX));
                }
                // The leader's clock moves by more than whatever it waits for.
                What::Time(at) => hasher.write_u8(at.cmp(&now_ms) as u8),
                What::Nothing => {}
            }
        }
        hasher.write_u64(picture.end);
    }
    hasher.finish()
}
