//! The IOTLB: remembered ways to tables.
//!
//! A hardware IOTLB holds translations and must be told of every one that goes. This one holds the address of a
//! *table*, and reads the leaf again each time. An unmap searches nothing here, and a translation can never be stale.
//! Only the retirement of a table makes an entry useless, and the table's generation says so without a search either.
//!
//! Which table? Hardware has caches for the upper levels beside that for translations. Here the second level alone is enough:
//! its tables hold the leaves of 2 MiB and the links to those of 4 KiB pages, and each spans a GiB. So a few entries serve
//! all that a device does, and nothing has to be written down for each of the small tables on a random way. The price is
//! two loads per translation, which are in the cache as often as the translation is hot.
//!
//! # Two arrays
//!
//! Which level a leaf stands at is known only when it is found. The tables of the second level have the large array, 16 sets of
//! 4 ways, indexed by the GiB. Those above, with leaves of a GiB and more, have 4 ways without an index, which are asked
//! when the first array has nothing. A set is filled from its first way on, so that where there is no crowd the first is
//! always the right one; in a crowd they are replaced in turn. All of it is 2 KiB a device.
//!
//! Threads of one device share it without a lock (see [`SharedWalk`]). That is also why hits are not counted: it would be one
//! cache line, written at each DMA, for all of them. [Walks from the root](Iotlb::walks) are rare and slow, and are.

use ioasid::pagetable::{Format, Radix};
use ioasid::{Attributes, CachedWalk, Leaf, Oa, SharedWalk, WalkFault};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How many sets there are for tables of the second level.
const SETS: usize = 16;
/// 2^64 divided by the golden ratio, so that numbers in a row and numbers far apart fall into different sets.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
/// How many tables whose addresses fall into one set are remembered.
const WAYS: usize = 4;
/// Addresses that are the same above this share a table of the second level, where pages are 4 KiB.
const SPAN_BITS: u32 = 30;

pub(super) type Ways = [SharedWalk<AtomicU64>; WAYS];

/// A table that a device walks, within a DMA section.
pub(super) trait WalkedTable {
    /// See [`Radix::translate_remembered`].
    fn translate(
        &self,
        iova: u64,
        wanted: u64,
        needed: Attributes,
        level: Option<u8>,
        ways: &Ways,
    ) -> Option<(Oa, u64)>;

    /// See [`Radix::walk_cached`].
    fn walk(&self, iova: u64, walk: &mut CachedWalk<AtomicU64>) -> Result<Leaf, WalkFault>;

    /// See [`Radix::remember`].
    fn remember(&self, iova: u64, walk: &CachedWalk<AtomicU64>, way: &SharedWalk<AtomicU64>);

    /// See [`Radix::is_forgotten`].
    fn is_forgotten(&self, way: &SharedWalk<AtomicU64>) -> bool;
}

impl<F: Format> WalkedTable for Radix<F> {
    #[inline(always)]
    fn translate(
        &self,
        iova: u64,
        wanted: u64,
        needed: Attributes,
        level: Option<u8>,
        ways: &Ways,
    ) -> Option<(Oa, u64)> {
        self.translate_remembered(iova, wanted, needed, level, ways)
    }

    fn walk(&self, iova: u64, walk: &mut CachedWalk<AtomicU64>) -> Result<Leaf, WalkFault> {
        self.walk_cached(iova, walk)
    }

    fn remember(&self, iova: u64, walk: &CachedWalk<AtomicU64>, way: &SharedWalk<AtomicU64>) {
        Radix::remember(self, iova, walk, way);
    }

    fn is_forgotten(&self, way: &SharedWalk<AtomicU64>) -> bool {
        Radix::is_forgotten(self, way)
    }
}

/// The IOTLB of one device.
#[derive(Debug)]
pub(super) struct Iotlb {
    small: Box<[Ways; SETS]>,
    large: Ways,
    /// Counts what was replaced; its low bits say which way is next.
    replaced: AtomicUsize,
    /// Counts the walks that found something.
    walks: AtomicU64,
}

impl Iotlb {
    pub(super) fn new() -> Iotlb {
        Iotlb {
            small: Box::new([const { [const { SharedWalk::new() }; WAYS] }; SETS]),
            large: [const { SharedWalk::new() }; WAYS],
            replaced: AtomicUsize::new(0),
            walks: AtomicU64::new(0),
        }
    }

    #[inline(always)]
    fn set(&self, iova: u64) -> &Ways {
        // Buffers are often spaced by powers of two: a product has all bits of the GiB in its upper ones.
        let span = (iova >> SPAN_BITS).wrapping_mul(SPREAD);
        &self.small[(span >> (64 - SETS.trailing_zeros())) as usize]
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
        match table.translate(iova, wanted, needed, Some(2), self.set(iova)) {
            Some(found) => Some(found),
            None => table.translate(iova, wanted, needed, None, &self.large),
        }
    }

    /// How many translations there were to which no way was remembered, those at which nothing was mapped not counted.
    pub(super) fn walks(&self) -> u64 {
        self.walks.load(Ordering::Relaxed)
    }

    /// Translates an address from the root, and remembers the way.
    pub(super) fn walk(&self, iova: u64, table: &impl WalkedTable) -> Result<Leaf, WalkFault> {
        let mut walk = CachedWalk::new();
        let leaf = table.walk(iova, &mut walk)?;
        self.walks.fetch_add(1, Ordering::Relaxed);
        let ways = if walk.level().is_some_and(|level| level <= 2) { self.set(iova) } else { &self.large };
        let way = ways.iter().find(|way| table.is_forgotten(way)).unwrap_or_else(|| {
            // Two threads may come to the same number: then one of them finds its way a second time later.
            let turn = self.replaced.load(Ordering::Relaxed);
            self.replaced.store(turn.wrapping_add(1), Ordering::Relaxed);
            &ways[turn % WAYS]
        });
        table.remember(iova, &walk, way);
        Ok(leaf)
    }
}
