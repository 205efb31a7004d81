//! What applications ask for and what goes wrong, as values: a run draws its acts by chance and writes them down; given such
//! a script it plays that instead, to the letter with the same dice. So a failing run can be shrunk, and one can be written
//! by hand.

use core::fmt;

use mortar_proto::types::Ino;

use super::world::{Happening, Node, World};

/// What an application asks for, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Write these blocks.
    Write {
        /// The first.
        first: usize,
        /// How many.
        count: usize,
    },
    /// Make holes of these blocks, or zeroes.
    Zero {
        /// The first.
        first: usize,
        /// How many.
        count: usize,
        /// Grow the file to their end.
        grows: bool,
    },
    /// Cut or grow the file to so many blocks.
    Truncate {
        /// How many.
        blocks: usize,
    },
    /// Read these blocks.
    Read {
        /// The first.
        first: usize,
        /// How many.
        count: usize,
    },
    /// `fsync(2)`
    Flush,
    /// `stat(2)`
    Stat,
    /// Make a further file and remove it again.
    Name,
}

/// Something that is done to the world from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// An application asks for something.
    Ask(usize, Ino, Ask),
    /// An application closes a file that has failed.
    Close(usize, Ino),
    /// A client's process dies and comes back after so many milliseconds.
    Crash(usize, u64),
    /// A brick's process dies; with `power`, its server.
    Kill {
        /// Which.
        brick: usize,
        /// Its server loses power.
        power: bool,
        /// When it comes back.
        down_ms: u64,
    },
    /// A brick does nothing for so long.
    Pause(usize, u64),
    /// Messages one way are held up for so long.
    Cut(Node, Node, u64),
    /// A client's connection to a brick breaks.
    Break(usize, usize),
    /// A voter of the metadata log does nothing for so long.
    PauseVoter(usize, u64),
    /// A voter's process dies and comes back after so many milliseconds.
    KillVoter(usize, u64),
    /// Another leader is elected.
    Elect,
    /// From now on so many of a thousand requests come twice.
    Repeat(u64),
    /// A brick is asked to stop cleanly.
    Stop(usize),
    /// A brick fails its next flush.
    FailFlush(usize),
    /// A brick has no space left, or has some again.
    Full(usize, bool),
    /// A brick's next read fails.
    FailRead(usize),
    /// A brick's next write fails.
    FailWrite(usize),
    /// A brick's file system takes no writes until the brick starts again.
    ReadOnly(usize),
    /// A brick's disk is slow for so long.
    SlowDisk(usize, u64),
    /// A brick's disk does nothing for so long.
    HangDisk(usize, u64),
    /// A brick's clock jumps ahead, for the machine slept.
    Jump(usize, u64),
    /// For so long messages are lost, come twice, or break their connection in the middle.
    Flaky(u64),
    /// Everything from and to a node takes its time, for so long.
    Slow(Node, u64),
    /// A brick's disk dies and is exchanged for an empty one.
    LoseDisk(usize),
    /// A copy of a brick's disk is made.
    KeepCopy(usize),
    /// A brick's server loses power, and its disk is the copy then.
    OldCopy(usize),
    /// The administrator gives a brick another place.
    Replace(usize),
    /// The administrator has all bricks compared.
    Compare,
    /// A brick's disk changes a block by itself.
    Flip(usize, Ino, usize),
    /// A brick's disk has not written a block, though it said so.
    LoseWrite(usize, Ino, usize),
    /// A brick's disk has written a block in the place of another one.
    Misdirect(usize, (Ino, usize), (Ino, usize)),
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Ask(c, ino, Ask::Write { first, count: 1 }) => write!(f, "c{c} writes block {first} of {ino}"),
            Self::Ask(c, ino, Ask::Write { first, count }) => {
                write!(f, "c{c} writes blocks {first} to {} of {ino}", first + count - 1)
            }
            Self::Ask(c, ino, Ask::Zero { first, count, grows }) => {
                let how = if grows { "zeroes" } else { "punches" };
                write!(f, "c{c} {how} blocks {first} to {} of {ino}", first + count - 1)
            }
            Self::Ask(c, ino, Ask::Truncate { blocks }) => write!(f, "c{c} truncates {ino} to {blocks} blocks"),
            Self::Ask(c, ino, Ask::Read { first, count }) => {
                write!(f, "c{c} reads blocks {first} to {} of {ino}", first + count - 1)
            }
            Self::Ask(c, ino, Ask::Flush) => write!(f, "c{c} flushes {ino}"),
            Self::Ask(c, ino, Ask::Stat) => write!(f, "c{c} asks for the size of {ino}"),
            Self::Ask(c, _, Ask::Name) => write!(f, "c{c} makes a file and removes it"),
            Self::Close(c, ino) => write!(f, "c{c} closes {ino}, which has failed"),
            Self::Crash(c, down) => write!(f, "c{c} crashes, and starts again after {down} ms"),
            Self::Kill { brick, power: false, down_ms } => {
                write!(f, "b{brick} is killed, and starts after {down_ms} ms")
            }
            Self::Kill { brick, power: true, down_ms } => {
                write!(f, "b{brick} loses power, and starts after {down_ms} ms")
            }
            Self::Pause(s, for_ms) => write!(f, "b{s} stands still for {for_ms} ms"),
            Self::Cut(from, to, for_ms) => write!(f, "what {from} sends to {to} is held up for {for_ms} ms"),
            Self::Break(c, s) => write!(f, "the connection of c{c} to b{s} breaks"),
            Self::PauseVoter(v, for_ms) => write!(f, "v{v} stands still for {for_ms} ms"),
            Self::KillVoter(v, down_ms) => write!(f, "v{v} is killed, and starts after {down_ms} ms"),
            Self::Elect => write!(f, "another leader is elected"),
            Self::Repeat(permille) => write!(f, "{permille} of 1000 requests come twice from now on"),
            Self::Stop(s) => write!(f, "b{s} is asked to stop"),
            Self::FailFlush(s) => write!(f, "b{s} is going to fail its next flush"),
            Self::FailRead(s) => write!(f, "b{s} is going to fail its next read"),
            Self::FailWrite(s) => write!(f, "b{s} is going to fail its next write"),
            Self::ReadOnly(s) => write!(f, "b{s} takes no writes any more"),
            Self::SlowDisk(s, for_ms) => write!(f, "the disk of b{s} is slow for {for_ms} ms"),
            Self::HangDisk(s, for_ms) => write!(f, "the disk of b{s} hangs for {for_ms} ms"),
            Self::Jump(s, by_ms) => write!(f, "the clock of b{s} jumps ahead by {by_ms} ms"),
            Self::Flaky(for_ms) => write!(f, "the network loses, repeats and breaks off for {for_ms} ms"),
            Self::Slow(node, for_ms) => write!(f, "the network of {node} is slow for {for_ms} ms"),
            Self::Full(s, true) => write!(f, "b{s} has no space left"),
            Self::Full(s, false) => write!(f, "b{s} has space again"),
            Self::LoseDisk(s) => write!(f, "the disk of b{s} dies, and an empty one takes its place"),
            Self::KeepCopy(s) => write!(f, "the disk of b{s} is copied"),
            Self::OldCopy(s) => write!(f, "b{s} loses power, and its disk comes back as the copy"),
            Self::Replace(s) => write!(f, "the administrator gives b{s} another place"),
            Self::Compare => write!(f, "the administrator has all bricks compared"),
            Self::Flip(s, ino, block) => write!(f, "the disk of b{s} changes block {block} of {ino}"),
            Self::LoseWrite(s, ino, block) => {
                write!(f, "the disk of b{s} turns out not to have written block {block} of {ino}")
            }
            Self::Misdirect(s, (ino, block), (to, at)) => {
                write!(f, "the disk of b{s} turns out to have written block {block} of {ino} to block {at} of {to}")
            }
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(c) => write!(f, "c{c}"),
            Self::Brick(s) => write!(f, "b{s}"),
            Self::Voter(v) => write!(f, "v{v}"),
        }
    }
}

impl Act {
    /// It is a fault that ends with the time of faults.
    #[must_use]
    pub fn is_fault(&self) -> bool {
        !matches!(self, Self::Ask(..) | Self::Close(..) | Self::Flip(..) | Self::LoseWrite(..) | Self::Misdirect(..))
    }
}

/// Acts and when they are done, in milliseconds of the world's clock.
pub type Script = Vec<(u64, Act)>;

impl World {
    /// Does something to the world, now.
    pub(super) fn act(&mut self, act: Act) {
        if act.is_fault() && self.now >= self.faults.until_ms {
            return;
        }
        self.done.push((self.now, act));
        self.event(|| act.to_string());
        match act {
            Act::Ask(c, ino, ask) => self.ask(c, ino, ask),
            Act::Close(c, ino) => self.close_failed(c, ino),
            Act::Crash(c, down_ms) => {
                if self.clients[c].up {
                    self.count("client crash");
                    self.crash_client(c, down_ms);
                }
            }
            Act::Kill { brick, power, down_ms } => {
                self.count(if power { "power cut" } else { "kill" });
                self.stop_brick(brick, power, down_ms);
            }
            Act::Pause(s, for_ms) => self.pause(Node::Brick(s), for_ms),
            Act::Cut(from, to, for_ms) => self.cut(from, to, for_ms),
            Act::Break(c, s) => self.break_link(c, s),
            Act::PauseVoter(v, for_ms) => self.pause(Node::Voter(v), for_ms),
            Act::KillVoter(v, down_ms) if self.quorum.together => {
                self.stop_brick(v, false, down_ms);
            }
            Act::KillVoter(v, down_ms) => {
                self.count("kill of a voter");
                if self.quorum.voters[v].up {
                    self.stop_voter(v);
                    self.after(down_ms, Happening::VoterStart(v));
                }
            }
            Act::Elect => self.elect(),
            Act::Repeat(permille) => self.faults.repeat_permille = permille,
            Act::Stop(s) => {
                if self.bricks[s].is_up() && self.bricks[s].stopping.is_none() {
                    self.bricks[s].stopping = Some(self.now);
                }
            }
            Act::FailFlush(s) => self.bricks[s].flush_fails = true,
            Act::Full(s, full) => self.bricks[s].full = full,
            Act::FailRead(s) => self.bricks[s].read_fails = true,
            Act::FailWrite(s) => self.bricks[s].write_fails = true,
            Act::ReadOnly(s) => self.bricks[s].read_only = true,
            Act::SlowDisk(s, for_ms) => self.bricks[s].slow_until = self.now + for_ms,
            Act::HangDisk(s, for_ms) => self.bricks[s].hung_until = self.now + for_ms,
            Act::Jump(s, by_ms) => self.bricks[s].clock_offset += by_ms,
            Act::Flaky(for_ms) => self.flaky_until = self.now + for_ms,
            Act::Slow(node, for_ms) => self.slow = Some((node, self.now + for_ms)),
            Act::LoseDisk(s) => self.lose_disk(s),
            Act::KeepCopy(s) => self.keep_copy(s),
            Act::OldCopy(s) => self.bring_old_copy(s),
            Act::Replace(s) => self.replace(s),
            Act::Compare => self.compare(),
            Act::Flip(s, ino, block) => self.flip(s, ino, block),
            Act::LoseWrite(s, ino, block) => self.lose_write(s, ino, block),
            Act::Misdirect(s, from, to) => self.misdirect(s, from, to),
        }
    }
}
