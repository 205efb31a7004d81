//! Identifiers, sizes and ranges. One type per meaning, so that an epoch is never taken for a sequence number.

use core::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(/// A cluster, drawn at random when its first server starts.
    ClusterId(u128));
number!(/// A server (one `mortar-brickd`), drawn at random at its first start; also its id in the metadata log's quorum.
    ServerId(u64));
number!(/// A volume, numbered by the metadata log, never reused.
    VolumeId(u64));
number!(/// A brick, numbered by the metadata log, never reused.
    BrickId(u64));
number!(/// A replica set, numbered by the metadata log, never reused.
    SetId(u64));
number!(/// A file, directory or link, numbered by the metadata log across all volumes, never reused.
    Ino(u64));
number!(/// A mounted client or the janitor, numbered by the metadata log, never reused. 0 is nobody.
    SessionId(u64));
number!(/// The number of a configuration of a replica set; each change makes `n + 1`.
    ConfigNo(u64));
number!(/// The number of a file's lease; each grant makes `e + 1`. 0: never granted.
    Epoch(u64));
number!(/// What the holder of a lease numbers mutations, pulls and copies with, from 1 in each epoch.
    Seq(u64));
number!(/// Drawn at random by a brickd at each start.
    Incarnation(u64));
number!(/// The kernel's boot id, new at each reboot.
    BootId(u128));
number!(/// An index in the metadata log.
    LogIndex(u64));

impl ConfigNo {
    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
impl Epoch {
    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
impl Seq {
    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Bytes in a block: the unit of checksums.
pub const BLOCK_BYTES: u64 = 4 << 10;
/// Bytes in a region: the unit of "missed" and of repair.
pub const REGION_BYTES: u64 = 1 << 20;
/// Bytes in an intent extent: the unit of write intent.
pub const EXTENT_BYTES: u64 = 16 << 20;
/// Bytes that one read or write carries at most.
pub const MAX_IO_BYTES: u64 = 1 << 20;
/// The largest offset at which a file may end, in bytes: what XFS can hold.
pub const MAX_FILE_BYTES: u64 = i64::MAX as u64;
/// Bricks in a replica set.
pub const REPLICAS: usize = 3;
/// The region number that stands for a file's size, beyond every region a file can have. A mutation that changes the
/// size touches it, and repairing it makes the sizes equal.
pub const SIZE_REGION: u64 = 1 << 44;

/// A block's checksum.
pub type Sum = u64;
/// The sum that stands for a hole.
pub const HOLE: Sum = 0;

/// A range of bytes of a file, never wrapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default, PartialOrd, Ord)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// The byte after the last one.
    pub end: u64,
}

impl ByteRange {
    /// Everything a file can have.
    pub const ALL: Self = Self { start: 0, end: u64::MAX };

    /// `len` bytes from `offset`; saturates at the end of the number range.
    #[must_use]
    pub const fn at(offset: u64, len: u64) -> Self {
        Self { start: offset, end: offset.saturating_add(len) }
    }
    /// Its length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
    /// True when it has no byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.end <= self.start
    }
    /// True when both have a byte in common.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
    /// Rounded out to whole blocks, as the busy table wants it `[W3]`.
    #[must_use]
    pub const fn to_blocks(&self) -> Self {
        Self {
            start: self.start / BLOCK_BYTES * BLOCK_BYTES,
            end: match self.end.checked_next_multiple_of(BLOCK_BYTES) {
                Some(end) => end,
                None => u64::MAX,
            },
        }
    }
    /// The numbers of the units of `unit` bytes that it touches, as a half-open range.
    #[must_use]
    pub const fn units(&self, unit: u64) -> core::ops::Range<u64> {
        if self.is_empty() {
            let at = self.start / unit;
            return at..at;
        }
        self.start / unit..(self.end - 1) / unit + 1
    }
}
