//! The IOTLB: remembered ways to leaf tables.
//!
//! A hardware IOTLB holds translations and must be told of every one that goes. This one holds the address of the
//! *table* in which a leaf was found and reads the leaf again each time. An unmap searches nothing here, a
//! translation can never be stale, and one entry serves all the pages of a leaf table, 2 MiB of 4 KiB pages. Only the
//! retirement of a table makes an entry useless, and the table's generation says so without a search either.
//!
//! The price is one load more per translation, which is in the cache as often as the translation is hot.
//!
//! # Two arrays
//!
//! Which level a leaf stands at is known only when it is found. Tables of small pages are many, so they have the large
//! array, 64 sets of 4 ways, indexed by the 2 MiB that such a table spans: 512 MiB of 4 KiB pages are remembered at
//! once. The tables above them span a GiB and more, and 4 of those have an array without an index that is asked when the
//! first has nothing. Within a set the oldest way is replaced. All of it is 8.5 KiB a device.
//!
//! Threads of one device share it without a lock (see [`SharedWalk`]).

use ioasid::epoch::DmaSection;
use ioasid::pagetable::{Format, Radix};
use ioasid::{Attributes, CachedWalk, Leaf, Oa, SharedWalk, Space, WalkFault};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How many sets there are for tables of small pages.
const SETS: usize = 64;
/// How many tables whose addresses fall into one set are remembered.
const WAYS: usize = 4;
/// Addresses that differ above this share a leaf table of 4 KiB pages, and so an entry.
const SPAN_BITS: u32 = 21;

pub(super) type Ways = [SharedWalk<AtomicU64>; WAYS];

/// A table that a device walks, within a DMA section.
pub(super) trait WalkedTable {
    /// See [`Radix::translate_remembered`].
    fn translate(&self, iova: u64, wanted: u64, needed: Attributes, ways: &Ways) -> Option<(Oa, u64)>;

    /// See [`Radix::walk_cached`].
    fn walk(&self, iova: u64, walk: &mut CachedWalk<AtomicU64>) -> Result<Leaf, WalkFault>;

    /// See [`Radix::remember`].
    fn remember(&self, walk: &CachedWalk<AtomicU64>, way: &SharedWalk<AtomicU64>);
}

impl<F: Format> WalkedTable for Radix<F> {
    #[inline(always)]
    fn translate(&self, iova: u64, wanted: u64, needed: Attributes, ways: &Ways) -> Option<(Oa, u64)> {
        self.translate_remembered(iova, wanted, needed, ways)
    }

    fn walk(&self, iova: u64, walk: &mut CachedWalk<AtomicU64>) -> Result<Leaf, WalkFault> {
        self.walk_cached(iova, walk)
    }

    fn remember(&self, walk: &CachedWalk<AtomicU64>, way: &SharedWalk<AtomicU64>) {
        Radix::remember(self, walk, way);
    }
}

/// The native table of a space.
pub(super) struct NativeTable<'a> {
    pub(super) space: &'a Space,
    pub(super) section: &'a DmaSection,
}

impl WalkedTable for NativeTable<'_> {
    #[inline(always)]
    fn translate(&self, iova: u64, wanted: u64, needed: Attributes, ways: &Ways) -> Option<(Oa, u64)> {
        self.space.translate_remembered(self.section, iova, wanted, needed, ways)
    }

    fn walk(&self, iova: u64, walk: &mut CachedWalk<AtomicU64>) -> Result<Leaf, WalkFault> {
        self.space.walk_for_dma(self.section, iova, walk)
    }

    fn remember(&self, walk: &CachedWalk<AtomicU64>, way: &SharedWalk<AtomicU64>) {
        self.space.remember(walk, way);
    }
}

/// The IOTLB of one device.
#[derive(Debug)]
pub(super) struct Iotlb {
    small: Box<[Ways; SETS]>,
    large: Ways,
    /// Counts what was replaced; its low bits say which way is next.
    replaced: AtomicUsize,
}

impl Iotlb {
    pub(super) fn new() -> Iotlb {
        Iotlb {
            small: Box::new([const { [const { SharedWalk::new() }; WAYS] }; SETS]),
            large: [const { SharedWalk::new() }; WAYS],
            replaced: AtomicUsize::new(0),
        }
    }

    #[inline(always)]
    fn set(&self, iova: u64) -> &Ways {
        let span = iova >> SPAN_BITS;
        // Buffers are often spaced by powers of two: fold the upper bits in.
        &self.small[(span ^ (span >> 6) ^ (span >> 15)) as usize % SETS]
    }

    /// Translates an address by one of the remembered ways, as [`Radix::translate_remembered`] does.
    #[inline(always)]
    pub(super) fn translate(
        &self,
        table: &impl WalkedTable,
        iova: u64,
        wanted: u64,
        needed: Attributes,
    ) -> Option<(Oa, u64)> {
        match table.translate(iova, wanted, needed, self.set(iova)) {
            Some(found) => Some(found),
            None => table.translate(iova, wanted, needed, &self.large),
        }
    }

    /// Translates an address from the root, and remembers the way.
    pub(super) fn walk(&self, iova: u64, table: &impl WalkedTable) -> Result<Leaf, WalkFault> {
        let mut walk = CachedWalk::new();
        let leaf = table.walk(iova, &mut walk)?;
        // Two threads may come to the same number: then one of them finds its way a second time later.
        let turn = self.replaced.load(Ordering::Relaxed);
        self.replaced.store(turn.wrapping_add(1), Ordering::Relaxed);
        let ways = if walk.level() == Some(1) { self.set(iova) } else { &self.large };
        table.remember(&walk, &ways[turn % WAYS]);
        Ok(leaf)
    }
}
