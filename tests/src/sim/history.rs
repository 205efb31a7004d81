//! What was asked, what was acknowledged, and what any copy must therefore hold at least.
//!
//! Every mutation of a file has one place in its order, the `(epoch, seq)` it was last sent under. A block must never be
//! older than the newest mutation of it that was acknowledged, unless a cold start lost it and [E7] tells so.

use std::collections::BTreeMap;

use mortar_proto::config::{Slot, Slots};
use mortar_proto::coordinator::OpId;
use mortar_proto::types::{ConfigNo, Epoch, Ino, Seq};

use super::disk::{BLOCKS, Content, Disk, Geometry, Torn};

/// The place of a mutation in its file's order.
pub type Key = (Epoch, Seq);

/// What a mutation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Writes blocks.
    Write {
        /// The first.
        first: usize,
        /// How many.
        count: usize,
    },
    /// Makes holes of blocks.
    Zero {
        /// The first.
        first: usize,
        /// How many.
        count: usize,
        /// And grows the file to their end.
        grows: bool,
    },
    /// Sets the size.
    Truncate {
        /// To this.
        size: u64,
    },
}

impl Kind {
    /// The blocks to whose end it grows the file.
    fn grown(self) -> Option<(usize, usize)> {
        match self {
            Self::Write { first, count } | Self::Zero { first, count, grows: true } => Some((first, count)),
            _ => None,
        }
    }
}

#[derive(Clone, Debug)]
struct Written {
    client: u64,
    ino: Ino,
    kind: Kind,
    key: Option<Key>,
    /// Bricks that answered that they have it.
    held_by: Slots,
    acknowledged: bool,
    /// The application was told that it failed.
    refused: bool,
    flushed: bool,
    /// Blocks that a cold start lost, and under which configuration.
    lost: [bool; BLOCKS],
    lost_under: ConfigNo,
    /// Its client was told that the file lost writes, so this one is nobody's surprise any more.
    told: bool,
}

/// The least that a block must hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    write: Key,
    any: Key,
}

/// What a file must hold, block by block.
pub type Needs = [Need; BLOCKS];

/// All mutations of a run.
#[derive(Clone, Debug)]
pub struct History {
    geometry: Geometry,
    ops: BTreeMap<OpId, Written>,
    needs: BTreeMap<Ino, Needs>,
    flushed_needs: BTreeMap<Ino, Needs>,
    /// A cold start has lost something, so sizes are not judged any more.
    lossy: bool,
    /// Clients that have to be told that a file of theirs lost what was acknowledged `[E7]`, and since which configuration.
    owed: BTreeMap<(u64, Ino), ConfigNo>,
    /// The newest that each brick has shown of each block while it was `InSync`: which operation, and its place.
    seen: BTreeMap<(Slot, Ino, usize), (OpId, Key)>,
    /// What is mixed in torn blocks, and whether a cold start has left it so for good.
    torn: BTreeMap<u64, (Vec<u64>, bool)>,
}

/// What a file's size must be at least, as far as was acknowledged.
#[derive(Clone, Copy, Debug, Default)]
pub struct SizeNeed {
    /// The newest truncate that was acknowledged, and its size.
    truncate: Key,
    size: u64,
    /// The furthest end of what was written since.
    least: u64,
}

impl History {
    /// An empty history.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            ops: BTreeMap::new(),
            needs: BTreeMap::new(),
            flushed_needs: BTreeMap::new(),
            lossy: false,
            owed: BTreeMap::new(),
            seen: BTreeMap::new(),
            torn: BTreeMap::new(),
        }
    }
    /// A power cut has left a mixture of sectors; `is_left` if it is the content from now on, as a cold start found it.
    pub fn torn(&mut self, torn: Torn, is_left: bool) {
        self.torn.insert(torn.value, (torn.parts, is_left));
    }
    fn covers(&self, kind: Kind, block: usize) -> bool {
        match kind {
            Kind::Write { first, count } | Kind::Zero { first, count, .. } => (first..first + count).contains(&block),
            Kind::Truncate { size } => self.geometry.offset(block) >= size,
        }
    }
    /// A mutation was asked for.
    pub fn submitted(&mut self, op: OpId, client: u64, ino: Ino, kind: Kind) {
        let written = Written {
            client,
            ino,
            kind,
            key: None,
            held_by: Slots::NONE,
            acknowledged: false,
            refused: false,
            flushed: false,
            lost: [false; BLOCKS],
            lost_under: ConfigNo(0),
            told: false,
        };
        self.ops.insert(op, written);
    }
    /// What a mutation does.
    #[must_use]
    pub fn kind(&self, op: OpId) -> Option<Kind> {
        self.ops.get(&op).map(|o| o.kind)
    }
    /// It was sent to a brick.
    pub fn sent(&mut self, op: OpId, key: Key, n: ConfigNo) {
        if let Some(o) = self.ops.get_mut(&op) {
            o.key = o.key.max(Some(key));
            if n >= o.lost_under {
                o.lost = [false; BLOCKS];
            }
        }
    }
    /// A brick answers that it has it.
    pub fn held(&mut self, op: OpId, by: Slot) {
        if let Some(o) = self.ops.get_mut(&op) {
            o.held_by.insert(by);
        }
    }
    /// Something that covers the block was sent and is not acknowledged: it may be on some bricks only.
    #[must_use]
    pub fn is_unsettled(&self, ino: Ino, block: usize) -> bool {
        self.ops.values().any(|o| o.ino == ino && o.key.is_some() && !o.acknowledged && self.covers(o.kind, block))
    }
    /// The application was told that it is done.
    ///
    /// # Errors
    /// Fewer than two bricks said that they have it.
    pub fn acknowledged(&mut self, op: OpId) -> Result<(), String> {
        let mut held_by = Slots::NONE;
        if let Some(o) = self.ops.get_mut(&op) {
            o.acknowledged = true;
            held_by = o.held_by;
        }
        self.recompute();
        if held_by.count() < 2 {
            return Err(format!("{} is acknowledged, but only {held_by:?} said that they have it", op.0));
        }
        Ok(())
    }
    /// The application was told that it failed: it may be there, or in parts, or not.
    pub fn refused(&mut self, op: OpId) {
        if let Some(o) = self.ops.get_mut(&op) {
            o.refused = true;
        }
    }
    /// A brick shows a block to a reader.
    pub fn seen(&mut self, by: Slot, ino: Ino, block: usize, value: u64) {
        let Some(key) = self.ops.get(&OpId(value)).and_then(|o| o.key) else { return };
        let newest = self.seen.entry((by, ino, block)).or_insert((OpId(value), key));
        if newest.1 < key {
            *newest = (OpId(value), key);
        }
    }
    /// A brick has lost what it has shown, or may have: of one block, or of all.
    pub fn forget_seen(&mut self, by: Slot, of: Option<(Ino, usize)>) {
        self.seen.retain(|(s, ino, block), _| *s != by || of.is_some_and(|of| of != (*ino, *block)));
    }
    /// Is what bricks have shown, and have not lost, still there, or something newer?
    ///
    /// # Errors
    /// A sentence that says what is gone.
    pub fn check_seen(&self, ino: Ino, content: &Content) -> Result<(), String> {
        let of_file = self.seen.iter().filter(|((_, of, _), _)| *of == ino);
        for ((_, _, block), (op, key)) in of_file {
            if self.ops.get(op).is_some_and(|o| !o.refused && !o.lost[*block]) {
                self.check(ino, *block, content.blocks[*block], Need { write: *key, any: *key })?;
            }
        }
        Ok(())
    }
    /// The mutations that an fsync which begins now covers.
    #[must_use]
    pub fn to_flush(&self, client: u64, ino: Ino) -> Vec<OpId> {
        self.ops
            .iter()
            .filter(|(_, o)| o.client == client && o.ino == ino && o.acknowledged)
            .map(|(op, _)| *op)
            .collect()
    }
    /// An fsync that covers these was acknowledged.
    pub fn flushed(&mut self, ops: &[OpId]) {
        for op in ops {
            if let Some(o) = self.ops.get_mut(op) {
                o.flushed = true;
            }
        }
        self.recompute();
    }
    /// A cold start took as source a brick that has lost power, with this disk: what was not flushed may be gone.
    pub fn cold_start(&mut self, n: ConfigNo, source: &Disk) {
        self.lose(n, source, false);
    }
    /// A brick that was not `InSync` is the source: whatever it lacks is gone.
    pub fn went_back(&mut self, n: ConfigNo, source: &Disk) {
        self.lose(n, source, true);
    }
    fn lose(&mut self, n: ConfigNo, source: &Disk, flushed_too: bool) {
        self.lossy = true;
        // The doubts of a source that cold starts are settled by now; those of another one may still be when it starts.
        let is_left = |ino, block| match flushed_too {
            true => source.may_be(ino, block),
            false => vec![source.block(ino, block)],
        };
        // What the source has is the content from now on, torn or not: nobody has more.
        let all = source.files().into_iter().flat_map(|ino| (0..BLOCKS).map(move |block| (ino, block)));
        for value in all.flat_map(|(ino, block)| is_left(ino, block)).collect::<Vec<u64>>() {
            if let Some(torn) = self.torn.get_mut(&value) {
                torn.1 = true;
            }
        }
        let mut lost = Vec::new();
        for (op, o) in &self.ops {
            let Some(key) = o.key else { continue };
            for block in (0..BLOCKS).filter(|b| self.covers(o.kind, *b)) {
                let need = match o.kind {
                    Kind::Write { .. } => Need { write: key, any: key },
                    _ => Need { write: (Epoch(0), Seq(0)), any: key },
                };
                let is_gone = is_left(o.ino, block).iter().any(|v| self.check(o.ino, block, *v, need).is_err());
                if is_gone && (flushed_too || !o.flushed) {
                    lost.push((*op, block));
                }
            }
        }
        for (op, block) in lost {
            if let Some(o) = self.ops.get_mut(&op) {
                o.lost[block] = true;
                o.lost_under = n;
                if o.acknowledged && !o.told {
                    self.owed.insert((o.client, o.ino), n);
                }
            }
        }
        self.recompute();
    }
    /// A client that knows configuration `n` must not be told of any success in this file any more `[E7]`.
    #[must_use]
    pub fn is_owed_a_failure(&self, client: u64, ino: Ino, n: ConfigNo) -> bool {
        self.owed.get(&(client, ino)).is_some_and(|since| n >= *since)
    }
    /// The client knows.
    pub fn told_of_loss(&mut self, client: u64, ino: Ino) -> bool {
        for o in self.ops.values_mut().filter(|o| o.client == client && o.ino == ino) {
            o.told = true;
        }
        self.owed.remove(&(client, ino)).is_some()
    }
    fn recompute(&mut self) {
        self.needs.clear();
        self.flushed_needs.clear();
        for o in self.ops.values() {
            let (true, Some(key)) = (o.acknowledged, o.key) else { continue };
            for block in 0..BLOCKS {
                if !self.covers(o.kind, block) || o.lost[block] {
                    continue;
                }
                let raise = |need: &mut Need| {
                    need.any = need.any.max(key);
                    if matches!(o.kind, Kind::Write { .. }) {
                        need.write = need.write.max(key);
                    }
                };
                raise(&mut self.needs.entry(o.ino).or_default()[block]);
                if o.flushed {
                    raise(&mut self.flushed_needs.entry(o.ino).or_default()[block]);
                }
            }
        }
    }
    /// What a read that begins now must see at least.
    #[must_use]
    pub fn needs(&self, ino: Ino) -> Needs {
        self.needs.get(&ino).copied().unwrap_or_default()
    }
    /// What a disk must have made durable.
    #[must_use]
    pub fn flushed_needs(&self, ino: Ino) -> Needs {
        self.flushed_needs.get(&ino).copied().unwrap_or_default()
    }
    /// Is this content of a block new enough, and was it ever written?
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn check(&self, ino: Ino, block: usize, value: u64, need: Need) -> Result<(), String> {
        if self.torn.get(&value).is_some_and(|(_, is_left)| !is_left) {
            return Err(format!("block {block} of {ino:?} is torn, and no cold start has left it so"));
        }
        self.check_durable(ino, block, value, need)
    }
    /// As [`History::check`], of what is on a disk: it may be torn, where each part of it is new enough.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn check_durable(&self, ino: Ino, block: usize, value: u64, need: Need) -> Result<(), String> {
        if let Some((parts, _)) = self.torn.get(&value) {
            return parts.iter().try_for_each(|part| self.check_durable(ino, block, *part, need));
        }
        if value == 0 {
            let holes = self.ops.values().filter(|o| o.ino == ino && !matches!(o.kind, Kind::Write { .. }));
            let newest = holes.filter(|o| self.covers(o.kind, block)).filter_map(|o| o.key).max().unwrap_or_default();
            if newest < need.write {
                return Err(format!("block {block} of {ino:?} is a hole, but {:?} wrote it", need.write));
            }
            return Ok(());
        }
        let written = self.ops.get(&OpId(value)).filter(|o| o.ino == ino && self.covers(o.kind, block));
        let Some(key) = written.and_then(|o| o.key) else {
            return Err(format!("block {block} of {ino:?} holds {value}, which nobody wrote there"));
        };
        if key < need.any {
            return Err(format!("block {block} of {ino:?} holds {value} of {key:?}, older than {:?}", need.any));
        }
        Ok(())
    }
    /// What the size must be at least, for a question that is asked now.
    #[must_use]
    pub fn size_need(&self, ino: Ino) -> SizeNeed {
        let mut need = SizeNeed::default();
        for o in self.ops.values().filter(|o| o.ino == ino && o.acknowledged) {
            if let (Kind::Truncate { size }, Some(key)) = (o.kind, o.key)
                && key > need.truncate
            {
                need = SizeNeed { truncate: key, size, least: size };
            }
        }
        for o in self.ops.values().filter(|o| o.ino == ino && o.acknowledged && o.key > Some(need.truncate)) {
            if let Some((first, count)) = o.kind.grown() {
                need.least = need.least.max(self.geometry.range(first + count - 1).end);
            }
        }
        need
    }
    /// Is this size possible?
    ///
    /// # Errors
    /// A sentence that says why not.
    pub fn check_size(&self, ino: Ino, size: u64, need: &SizeNeed) -> Result<(), String> {
        if self.lossy {
            return Ok(());
        }
        let (mut least, mut most) = (need.least, need.size);
        for o in self.ops.values().filter(|o| o.ino == ino && o.key > Some(need.truncate)) {
            if let Some((first, count)) = o.kind.grown() {
                most = most.max(self.geometry.range(first + count - 1).end);
            }
            if let Kind::Truncate { size } = o.kind {
                least = least.min(size);
                most = most.max(size);
            }
        }
        if (least..=most).contains(&size) {
            return Ok(());
        }
        Err(format!("{ino:?} has {size} bytes, which should be {least}..={most}"))
    }
    /// Checks a whole content.
    ///
    /// # Errors
    /// See [`History::check`].
    pub fn check_all(&self, ino: Ino, content: &Content, needs: &Needs) -> Result<(), String> {
        (0..BLOCKS).try_for_each(|b| self.check(ino, b, content.blocks[b], needs[b]))
    }
}

impl Need {
    /// The lesser of two.
    #[must_use]
    pub fn at_most(self, other: Self) -> Self {
        Self { write: self.write.min(other.write), any: self.any.min(other.any) }
    }
}
