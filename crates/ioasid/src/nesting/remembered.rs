//! What a shadow holds, by where it came from.
//!
//! A block is a piece of a guest's address space that leads to one piece of the space below. Both are as large and as aligned
//! as the block is: the smaller of the two leaves that it was made of. The shadow's table finds a block by the guest's address
//! alone; here it is also found by the space's, since that is what the space's operations name, and with it the pages of
//! the guest's tables that were read for any of them.

use ioasid_pagetable::{IovaRange, PageSize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

/// How many bytes of bookkeeping a block is reckoned at: an entry in each of two trees.
const BLOCK_BYTES: u64 = 128;
/// The same for a page of tables.
const TABLE_BYTES: u64 = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    size: PageSize,
    /// The address in the space below.
    source: u64,
}

/// The blocks of a shadow. None of them overlaps another one.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// By the guest's address.
    blocks: BTreeMap<u64, Block>,
    /// By size, by the space's address, and by the guest's.
    sources: BTreeSet<(PageSize, u64, u64)>,
    /// Pages of 4 KiB that tables were read from.
    tables: BTreeSet<u64>,
}

fn block_range(first: u64, size: PageSize) -> Option<IovaRange> {
    IovaRange::new(first, first | (size.bytes() - 1))
}

impl Remembered {
    /// Notes a block. Nothing that overlaps it is there.
    pub(super) fn insert(&mut self, iova: u64, source: u64, size: PageSize) {
        self.blocks.insert(iova, Block { size, source });
        self.sources.insert((size, source, iova));
    }

    /// Notes pages that were read on the way to what is remembered.
    pub(super) fn insert_tables(&mut self, pages: impl Iterator<Item = u64>) {
        self.tables.extend(pages);
    }

    /// Takes out the blocks that have one of the guest's addresses in the range: where they were.
    pub(super) fn take_at(&mut self, range: IovaRange) -> Vec<IovaRange> {
        let reaching = self.blocks.range(..range.first()).next_back();
        let first = match reaching.and_then(|(iova, block)| block_range(*iova, block.size)) {
            Some(block) if block.overlaps(&range) => block.first(),
            _ => range.first(),
        };
        let taken: Vec<u64> = self.blocks.range(first..=range.last()).map(|(iova, _)| *iova).collect();
        taken.into_iter().filter_map(|iova| self.take(iova)).collect()
    }

    /// Takes out the blocks that lead to one of the space's addresses in the range.
    pub(super) fn take_from(&mut self, range: IovaRange) -> Vec<IovaRange> {
        let mut taken = Vec::new();
        let mut next = self.sources.first().map(|(size, ..)| *size);
        // There are few sizes, and each is a range of its own.
        while let Some(size) = next {
            let first = range.first() & !(size.bytes() - 1);
            let found = self.sources.range((size, first, 0)..=(size, range.last(), u64::MAX));
            taken.extend(found.map(|(.., iova)| *iova));
            let larger = (Bound::Excluded((size, u64::MAX, u64::MAX)), Bound::Unbounded);
            next = self.sources.range(larger).next().map(|(size, ..)| *size);
        }
        taken.into_iter().filter_map(|iova| self.take(iova)).collect()
    }

    fn take(&mut self, iova: u64) -> Option<IovaRange> {
        let Block { size, source } = self.blocks.remove(&iova)?;
        self.sources.remove(&(size, source, iova));
        block_range(iova, size)
    }

    /// Whether a table was read from one of the space's addresses in the range.
    pub(super) fn has_read(&self, range: IovaRange) -> bool {
        self.tables.range(range.first() & !0xfff..=range.last()).next().is_some()
    }

    /// Takes out everything.
    pub(super) fn clear(&mut self) {
        *self = Remembered::default();
    }

    /// How many blocks there are.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// About how much memory this takes.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK_BYTES + self.tables.len() as u64 * TABLE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(first, last).unwrap()
    }

    #[test]
    fn the_last_page_has_a_place() {
        let mut remembered = Remembered::default();
        remembered.insert(!0xfff, !0xfff, PageSize::SIZE_4K);
        remembered.insert_tables([!0xfff].into_iter());
        assert!(remembered.has_read(range(u64::MAX, u64::MAX)));
        assert_eq!(remembered.take_from(range(u64::MAX, u64::MAX)), [range(!0xfff, u64::MAX)]);
        remembered.insert(!0xfff, 0, PageSize::SIZE_4K);
        assert_eq!(remembered.take_at(range(u64::MAX, u64::MAX)), [range(!0xfff, u64::MAX)]);
        assert_eq!(remembered.bytes(), TABLE_BYTES);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert { iova: u64, source: u64, size: u32 },
        TakeAt(u64, u64),
        TakeFrom(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let page = || 0u64..4096;
        let step = prop_oneof![
            3 => (page(), page(), prop_oneof![Just(12u32), Just(16), Just(21)])
                .prop_map(|(iova, source, size)| Step::Insert { iova, source, size }),
            1 => (page(), 0u64..600).prop_map(|(first, more)| Step::TakeAt(first, first + more)),
            1 => (page(), 0u64..600).prop_map(|(first, more)| Step::TakeFrom(first, first + more)),
        ];
        proptest::collection::vec(step, 1..60)
    }

    proptest! {
        #[test]
        fn blocks_are_found_from_both_sides(steps in steps()) {
            let mut remembered = Remembered::default();
            let mut model: Vec<(IovaRange, IovaRange)> = Vec::new();
            let pages = |first: u64, last: u64| range(first << 12, last << 12 | 0xfff);
            for step in steps {
                let (mut taken, mut expected) = match step {
                    Step::Insert { iova, source, size } => {
                        let size = PageSize::from_log2(size).unwrap();
                        let block = |page: u64| {
                            block_range(page << 12 & !(size.bytes() - 1), size).unwrap()
                        };
                        let (at, from) = (block(iova), block(source));
                        let taken = remembered.take_at(at);
                        let expected = model.extract(|(other, _)| other.overlaps(&at));
                        remembered.insert(at.first(), from.first(), size);
                        model.push((at, from));
                        (taken, expected)
                    }
                    Step::TakeAt(first, last) => {
                        let range = pages(first, last);
                        (remembered.take_at(range), model.extract(|(at, _)| at.overlaps(&range)))
                    }
                    Step::TakeFrom(first, last) => {
                        let range = pages(first, last);
                        (remembered.take_from(range), model.extract(|(_, from)| from.overlaps(&range)))
                    }
                };
                taken.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(taken, expected);
                prop_assert_eq!(remembered.len(), model.len());
            }
        }
    }

    trait Extract {
        /// Takes out the blocks of which this is true: where they were.
        fn extract(&mut self, wanted: impl Fn(&(IovaRange, IovaRange)) -> bool) -> Vec<IovaRange>;
    }

    impl Extract for Vec<(IovaRange, IovaRange)> {
        fn extract(&mut self, wanted: impl Fn(&(IovaRange, IovaRange)) -> bool) -> Vec<IovaRange> {
            let (taken, left) = std::mem::take(self).into_iter().partition(wanted);
            *self = left;
            let taken: Vec<(IovaRange, IovaRange)> = taken;
            taken.into_iter().map(|(at, _)| at).collect()
        }
    }
}
