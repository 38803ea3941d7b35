//! Which areas a table has.
//!
//! Linux forgets nothing of what it was asked to map: an *area* is unmapped as a whole or not at all. So what can be
//! unmapped of a table depends on how it was mapped, and that has to be known before anything is changed. An area never
//! reaches over a multiple of the table's block, which is the space's cut granule. So the areas at an address are found in
//! one of many small maps, by the number of the block, and those who work in other blocks mostly hold another lock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ioasid::{Attributes, IovaRange, PageSize};

/// How many maps there are; a power of two.
const SHARDS: usize = 64;

/// What is unmapped as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) range: IovaRange,
    /// The output address of its first byte.
    pub(crate) oa: u64,
    /// Reading and writing.
    pub(crate) rights: Attributes,
}

/// The parts of a range that lie in one block each, in ascending order.
pub(crate) fn in_blocks(range: IovaRange, block: PageSize) -> impl Iterator<Item = IovaRange> + use<> {
    let low = block.bytes() - 1;
    let mut next = Some(range.first());
    std::iter::from_fn(move || {
        let first = next.filter(|first| *first <= range.last())?;
        let last = (first | low).min(range.last());
        next = last.checked_add(1);
        IovaRange::new(first, last)
    })
}

impl Area {
    /// The output address of one of its bytes.
    pub(crate) fn output(&self, iova: u64) -> u64 {
        self.oa.wrapping_add(iova.wrapping_sub(self.range.first()))
    }
}

/// The areas of a table, by their first address.
#[derive(Debug)]
pub(crate) struct Areas {
    block: PageSize,
    shards: Box<[Mutex<BTreeMap<u64, Area>>]>,
    count: AtomicU64,
    most: u64,
}

impl Areas {
    pub(crate) fn new(block: PageSize, most: u64) -> Areas {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Areas { block, shards, count: AtomicU64::new(0), most }
    }

    fn shard_of(&self, iova: u64) -> usize {
        // Neighbours in different ones, and so are blocks at a power of two's distance.
        let block = iova >> self.block.log2();
        (block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SHARDS.trailing_zeros())) as usize
    }

    fn shard(&self, number: usize) -> MutexGuard<'_, BTreeMap<u64, Area>> {
        self.shards[number].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parts of a range that lie in one block each, in ascending order.
    pub(crate) fn in_blocks(&self, range: IovaRange) -> impl Iterator<Item = IovaRange> + use<> {
        in_blocks(range, self.block)
    }

    pub(crate) fn block(&self) -> PageSize {
        self.block
    }

    /// Makes room for one more area in each block that a range has a part in, if there may be so many; returns how many
    /// those are.
    pub(crate) fn count_in(&self, range: IovaRange) -> Option<u64> {
        let log2 = self.block.log2();
        let areas = (range.last() >> log2) - (range.first() >> log2) + 1;
        let more = |count: u64| count.checked_add(areas).filter(|count| *count <= self.most);
        self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| areas)
    }

    /// Takes that back.
    pub(crate) fn count_out(&self, areas: u64) {
        self.count.fetch_sub(areas, Ordering::Relaxed);
    }

    /// Enters an area that was counted in, within one block.
    pub(crate) fn insert(&self, area: Area) {
        let first = area.range.first();
        self.shard(self.shard_of(first)).insert(first, area);
    }

    /// The area that has the address in it.
    pub(crate) fn at(&self, iova: u64) -> Option<Area> {
        let shard = self.shard(self.shard_of(iova));
        let (_, area) = shard.range(..=iova).next_back()?;
        area.range.contains(iova).then_some(*area)
    }

    /// The area that begins before a place and does not end there.
    pub(crate) fn across(&self, at: u64) -> Option<Area> {
        self.at(at).filter(|area| area.range.first() < at)
    }

    /// Shows every area that has an address of the range in it, in no order, until one is enough.
    fn find_any<T>(&self, range: IovaRange, mut look: impl FnMut(&Area) -> Option<T>) -> Option<T> {
        // One that began before the range; the others begin in it.
        if let Some(found) = self.across(range.first()).and_then(|area| look(&area)) {
            return Some(found);
        }
        let inside = range.first()..=range.last();
        self.shards_of(range)
            .find_map(|number| self.shard(number).range(inside.clone()).find_map(|(_, area)| look(area)))
    }

    /// Those of the maps that areas in a range may be in.
    fn shards_of(&self, range: IovaRange) -> impl Iterator<Item = usize> + use<> {
        let few = self.in_blocks(range).take(SHARDS + 1).count() <= SHARDS;
        let mut numbers = [!few; SHARDS];
        if few {
            self.in_blocks(range).for_each(|part| numbers[self.shard_of(part.first())] = true);
        }
        (0..SHARDS).filter(move |number| numbers[*number])
    }

    /// Whether there is any in a range.
    pub(crate) fn any(&self, range: IovaRange) -> bool {
        self.find_any(range, |_| Some(())).is_some()
    }

    /// An area in a range that is not as it should be.
    pub(crate) fn find(&self, range: IovaRange, mut differs: impl FnMut(&Area) -> bool) -> Option<Area> {
        self.find_any(range, |area| differs(area).then_some(*area))
    }

    /// The areas that have an address of a part of one block in them, in ascending order.
    pub(crate) fn in_block(&self, part: IovaRange) -> Vec<Area> {
        let before = self.across(part.first());
        let shard = self.shard(self.shard_of(part.first()));
        before.into_iter().chain(shard.range(part.first()..=part.last()).map(|(_, area)| *area)).collect()
    }

    /// Forgets the areas that begin in a range.
    pub(crate) fn remove(&self, range: IovaRange) {
        let mut removed = 0;
        for number in self.shards_of(range) {
            let mut shard = self.shard(number);
            let inside = range.first()..=range.last();
            while let Some(first) = shard.range(inside.clone()).next().map(|(first, _)| *first) {
                shard.remove(&first);
                removed += 1;
            }
        }
        self.count_out(removed);
    }

    /// All of them, in ascending order.
    pub(crate) fn all(&self) -> Vec<Area> {
        let of_shard = |number| self.shard(number).values().copied().collect::<Vec<_>>();
        let mut all: Vec<Area> = (0..SHARDS).flat_map(of_shard).collect();
        all.sort_unstable_by_key(|area| area.range.first());
        all
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
