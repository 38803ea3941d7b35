//! What an operation leaves for its caller to finish.
//!
//! Removing a translation is not over when the entry is clear: IOTLBs may still hold it, a walker may still be
//! reading a table that was unlinked, and pages may only be unpinned afterwards. So an operation writes down what
//! it took away, and the caller invalidates once for a whole batch, waits, and only then frees the tables.

use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::TableLayout;
use crate::memory::TableMemory;
use alloc::vec::Vec;
use core::ptr::NonNull;

/// Ranges in ascending order, neighbours joined.
///
/// Nearly every operation produces one run, so the last one is kept in place and only earlier ones cost memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    earlier: Vec<IovaRange>,
    last: Option<IovaRange>,
}

impl Runs {
    /// Adds a range behind all others.
    #[inline]
    pub fn push(&mut self, range: IovaRange) {
        match self.last {
            Some(last) if last.last().checked_add(1) == Some(range.first()) => {
                self.last = IovaRange::new(last.first(), range.last());
            }
            Some(last) => {
                self.earlier.push(last);
                self.last = Some(range);
            }
            None => self.last = Some(range),
        }
    }

    /// Adds a range that is behind all others or covers the last of them, which it takes the place of.
    pub(crate) fn push_covering(&mut self, range: IovaRange) {
        while self.last.is_some_and(|last| range.covers(&last)) {
            self.last = self.earlier.pop();
        }
        match self.last {
            // Neighbours were joined before.
            Some(last) if last.overlaps(&range) => {
                self.last = IovaRange::new(last.first(), last.last().max(range.last()));
            }
            _ => self.push(range),
        }
    }

    /// Adds a range behind all others, if there is one.
    pub(crate) fn extend(&mut self, range: Option<IovaRange>) {
        if let Some(range) = range {
            self.push(range);
        }
    }

    /// The runs, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = IovaRange> + '_ {
        self.earlier.iter().copied().chain(self.last)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.last.is_none()
    }

    /// All bytes together; saturates at 2^64 - 1.
    #[inline]
    pub fn bytes(&self) -> u64 {
        let length = |run: IovaRange| run.length().unwrap_or(u64::MAX);
        let last = self.last.map_or(0, length);
        self.earlier.iter().fold(last, |sum, &run| length(run).saturating_add(sum))
    }
}

/// Collects what operations took away or changed: which ranges, leaves of which sizes, which tables.
#[derive(Debug)]
pub struct Gather<M, A> {
    /// Ranges whose translation is gone or another, and has to be invalidated. An unmap writes down exactly what it
    /// unmapped.
    pub runs: Runs,
    /// How many leaves that were.
    pub leaves: u64,
    /// Bit n: a leaf of 2^n bytes was among them.
    pub leaf_sizes: u64,
    /// Whether entries that lead to tables came or went in the place of others, so that caches of those have to be
    /// invalidated too. (VT-d: no IH hint. AMD: PDE=1. RISC-V: AV=0 or NL=1.)
    pub tables_changed: bool,
    /// Tables that are linked nowhere any more.
    pub retired: Vec<RetiredTable<M, A>>,
}

impl<M, A> Gather<M, A> {
    /// Nothing gathered yet.
    pub const fn new() -> Gather<M, A> {
        Gather {
            runs: Runs { earlier: Vec::new(), last: None },
            leaves: 0,
            leaf_sizes: 0,
            tables_changed: false,
            retired: Vec::new(),
        }
    }

    /// Writes down `leaves` neighbouring leaves of one size that together cover the range.
    #[inline(always)]
    pub(crate) fn removed(&mut self, range: IovaRange, size: PageSize, leaves: u64) {
        self.runs.push(range);
        self.leaves += leaves;
        self.leaf_sizes |= size.bytes();
    }
}

impl<M, A> Default for Gather<M, A> {
    fn default() -> Gather<M, A> {
        Gather::new()
    }
}

/// A table page that nothing leads to any more, though walkers and hardware may still be in it.
///
/// Dropping it leaks the page, which is always sound; [`free`](Self::free) gives it back.
#[derive(Debug)]
#[must_use = "a retired table that is not freed after the flush leaks"]
pub struct RetiredTable<M, A> {
    pub(crate) table: NonNull<A>,
    pub(crate) layout: TableLayout,
    /// All of its entries are 0.
    pub(crate) empty: bool,
    pub(crate) memory: M,
}

// SAFETY: the page is reachable through this value alone, apart from readers that only load atomics.
unsafe impl<M: Send, A: Send + Sync> Send for RetiredTable<M, A> {}

impl<M: TableMemory<A>, A: AtomicEntry> RetiredTable<M, A> {
    /// Returns the page to its allocator.
    ///
    /// # Safety
    ///
    /// Every operation and every walk of the table that began before this one was retired has ended, cached
    /// walks included, and hardware that walks the table has been invalidated.
    pub unsafe fn free(self) {
        // SAFETY: the page came from this allocator with this layout; the caller vouches for the rest.
        unsafe { self.memory.free(self.table, self.layout, self.empty) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_takes_the_place_of_those_that_it_covers() {
        let mut runs = Runs::default();
        let range = |first, last| IovaRange::new(first, last).unwrap();
        for run in [range(0, 0xfff), range(0x4000, 0x4fff), range(0x6000, 0x6fff)] {
            runs.push(run);
        }
        runs.push_covering(range(0x4000, 0x7fff));
        runs.push_covering(range(0x6000, 0x8fff));
        assert_eq!(runs.iter().collect::<Vec<_>>(), [range(0, 0xfff), range(0x4000, 0x8fff)]);
    }

    #[test]
    fn neighbours_join_up_to_the_last_page() {
        let mut runs = Runs::default();
        let range = |first, last| IovaRange::new(first, last).unwrap();
        runs.push(range(0, 0xfff));
        runs.push(range(0x1000, 0x2fff));
        runs.push(range(0x4000, 0x4fff));
        runs.push(range(u64::MAX - 0xfff, u64::MAX));
        let all: Vec<_> = runs.iter().collect();
        assert_eq!(all, [range(0, 0x2fff), range(0x4000, 0x4fff), range(u64::MAX - 0xfff, u64::MAX)]);
        assert_eq!(runs.bytes(), 0x5000);
    }
}
