//! The configuration of a replica set: which brick is in which state, under which number.
//!
//! Only the metadata log changes it, one entry per change, each making `n + 1`.

use crate::types::{BootId, BrickId, ConfigNo, Incarnation, REPLICAS};

/// A brick's place in its replica set, `0..REPLICAS`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Slot(pub u8);

impl Slot {
    /// All places of a set.
    pub const ALL: [Self; REPLICAS] = [Self(0), Self(1), Self(2)];

    /// The place as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A set of places.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Slots(pub u8);

impl Slots {
    /// No place.
    pub const NONE: Self = Self(0);

    /// True when `slot` is in it.
    #[must_use]
    pub const fn has(self, slot: Slot) -> bool {
        self.0 >> slot.0 & 1 == 1
    }
    /// Puts `slot` in.
    pub const fn insert(&mut self, slot: Slot) {
        self.0 |= 1 << slot.0;
    }
    /// Takes `slot` out.
    pub const fn remove(&mut self, slot: Slot) {
        self.0 &= !(1 << slot.0);
    }
    /// With `slot`.
    #[must_use]
    pub const fn with(self, slot: Slot) -> Self {
        Self(self.0 | 1 << slot.0)
    }
    /// Without `slot`.
    #[must_use]
    pub const fn without(self, slot: Slot) -> Self {
        Self(self.0 & !(1 << slot.0))
    }
    /// Those in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    /// Those in either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// Those in this one only.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    /// True when every one of `other` is in it.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// How many.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.0.count_ones()
    }
    /// True when there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// Its places, in order.
    pub fn iter(self) -> impl Iterator<Item = Slot> {
        Slot::ALL.into_iter().filter(move |s| self.has(*s))
    }
}

impl core::fmt::Debug for Slots {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_set().entries(self.iter().map(|s| s.0)).finish()
    }
}

impl FromIterator<Slot> for Slots {
    fn from_iter<I: IntoIterator<Item = Slot>>(iter: I) -> Self {
        iter.into_iter().fold(Self::NONE, Self::with)
    }
}

/// What a brick may do in its replica set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub enum BrickState {
    /// Holds everything acknowledged; serves reads `[R1]`.
    InSync,
    /// Takes every mutation, and is being repaired; serves no reads `[R2]`.
    Syncing,
    /// Takes nothing; what it misses is recorded by the others `[W5]`.
    Out,
}

/// One brick of a replica set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Member {
    /// Which brick.
    pub brick: BrickId,
    /// Its state.
    pub state: BrickState,
    /// The incarnation it registered last `[E5]`; 0: it never registered.
    pub incarnation: Incarnation,
    /// The boot id it registered last.
    pub boot: BootId,
    /// When `Syncing`: the configuration in which it became so, and whether its last shutdown was clean `[S1]`.
    pub syncing_since: ConfigNo,
    /// True when its last registration told of a clean shutdown.
    pub clean: bool,
    /// All that the set has is to be compared when it is `Syncing`, whatever the lists say `[S1]`: it is new in its place, or
    /// others lost what it may have, or the administrator wants it. Until it is promoted.
    pub full: bool,
}

/// A replica set's bricks and their states, under one number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Configuration {
    /// Its number.
    pub n: ConfigNo,
    /// Its bricks by [`Slot`].
    pub members: [Member; REPLICAS],
    /// The last configuration that a cold start made whose source had lost what it had not flushed; 0: none. What was
    /// acknowledged before it and never flushed may be gone `[E7]`.
    pub unflushed_lost: ConfigNo,
}

impl Configuration {
    /// The bricks in `state`.
    #[must_use]
    pub fn in_state(&self, state: BrickState) -> Slots {
        Slot::ALL.into_iter().filter(|s| self.members[s.index()].state == state).collect()
    }
    /// The bricks that serve reads.
    #[must_use]
    pub fn in_sync(&self) -> Slots {
        self.in_state(BrickState::InSync)
    }
    /// The bricks under repair.
    #[must_use]
    pub fn syncing(&self) -> Slots {
        self.in_state(BrickState::Syncing)
    }
    /// The bricks that are out.
    #[must_use]
    pub fn out(&self) -> Slots {
        self.in_state(BrickState::Out)
    }
    /// The bricks that take mutations `[W3]`: `InSync` and `Syncing`.
    #[must_use]
    pub fn writable(&self) -> Slots {
        self.in_sync().or(self.syncing())
    }
    /// The state of the brick in `slot`.
    #[must_use]
    pub fn state(&self, slot: Slot) -> BrickState {
        self.members[slot.index()].state
    }
    /// The place of `brick`, if it is one of them.
    #[must_use]
    pub fn slot_of(&self, brick: BrickId) -> Option<Slot> {
        Slot::ALL.into_iter().find(|s| self.members[s.index()].brick == brick)
    }
}
