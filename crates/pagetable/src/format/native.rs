//! The native format: ours, for tables that only software walks.
//!
//! | bits  | name    | table | leaf |
//! |-------|---------|-------|------|
//! | 0     | PRESENT | 1     | the leaf translates |
//! | 1     | BUSY    | 0     | an operation owns the entry |
//! | 2     | FIRST   | 0     | a mapping begins here |
//! | 3     | READ    | 0     | devices may read |
//! | 4     | WRITE   | 0     | devices may write |
//! | 5     | SNOOP   | 0     | accesses are forced to snoop |
//! | 6     | TABLE   | 1     | 0 |
//! | 7     | NEW     | for a moment | 0 |
//! | 10:8  | zero    | 0     | 0 |
//! | 55:11 | address | table | output address |
//! | 63:56 | zero    | 0     | 0 |
//!
//! - All 64 bits of an IOVA are translated. A table begins with as many levels as its first address needs, four
//!   at least, and grows on top.
//! - Bit 11 belongs to the address because a space may have a granule of 2 KiB (the Linux self-test's mock has).
//! - One leaf is one entry: sizes are the granule times a power of 512. Software gains nothing from runs of
//!   equal entries that a hardware TLB would merge.
//! - There are no accessed and dirty bits: software that walks the table knows what it writes, and can say so
//!   finer than a leaf does.
//! - A claimed leaf that is not present already holds its final address and permissions, so that publishing it is
//!   one store.

use super::{Attributes, ClaimFormat, Entry, Format, LiveChanges, Pattern};
use crate::address::PageSize;
use core::ops::RangeInclusive;

const READ: u64 = 1 << 3;
const WRITE: u64 = 1 << 4;
const SNOOP: u64 = 1 << 5;
const TABLE: u64 = 1 << 6;
const ADDRESS: u64 = 0x00ff_ffff_ffff_f800;
const INDEX_BITS: u32 = 9;

/// The native format with a granule and a largest leaf of one's choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Native {
    granule: PageSize,
    largest_leaf: PageSize,
}

impl Native {
    /// 4 KiB granule and leaves of every size that the output address allows.
    pub const fn new() -> Native {
        Native { granule: PageSize::SIZE_4K, largest_leaf: PageSize(55) }
    }

    /// The smallest page, 2 KiB to 64 KiB; `None` outside.
    pub fn with_granule(self, granule: PageSize) -> Option<Native> {
        (11..=16).contains(&granule.log2()).then_some(Native { granule, ..self })
    }

    /// No leaf is larger than this. A space that also has tables which cannot be cut is filled at its cut granule
    /// from the start.
    pub const fn with_largest_leaf(self, largest_leaf: PageSize) -> Native {
        Native { largest_leaf, ..self }
    }

    /// The smallest page.
    pub const fn granule(&self) -> PageSize {
        self.granule
    }

    /// No leaf is larger, unless the granule is.
    pub const fn largest_leaf(&self) -> PageSize {
        self.largest_leaf
    }
}

impl Default for Native {
    fn default() -> Native {
        Native::new()
    }
}

impl Format for Native {
    const NAME: &'static str = "native";
    const TENTATIVE: u64 = 1 << 7;

    #[inline(always)]
    fn top_levels(&self) -> RangeInclusive<u8> {
        4..=6
    }

    #[inline(always)]
    fn shift(&self, level: u8) -> u32 {
        self.granule.log2() + INDEX_BITS * (u32::from(level) - 1)
    }

    #[inline(always)]
    fn index_bits(&self, level: u8) -> u32 {
        // The top level of a 64-bit address has what is left.
        INDEX_BITS.min(64 - self.shift(level))
    }

    #[inline(always)]
    fn index(&self, level: u8, iova: u64) -> usize {
        // Where the top level has fewer bits, so has what is left of the address.
        (iova >> self.shift(level)) as usize & ((1 << INDEX_BITS) - 1)
    }

    #[inline(always)]
    fn leaf_sizes(&self, level: u8) -> u64 {
        let shift = self.shift(level);
        if shift <= self.largest_leaf.log2() || level == 1 { 1 << shift } else { 0 }
    }

    #[inline(always)]
    fn output_bits(&self) -> u32 {
        56
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::all()
    }

    #[inline(always)]
    fn dirty_bit(&self) -> u64 {
        0
    }

    fn hardware_marks(&self) -> bool {
        false
    }

    fn software_bits(&self, _level: u8) -> u64 {
        // The claiming mode looks after its own.
        0
    }

    #[inline(always)]
    fn table_pattern(&self, _level: u8) -> Pattern {
        Pattern::new(Self::PRESENT | TABLE, Self::TENTATIVE)
    }

    #[inline(always)]
    fn leaf_pattern(&self, level: u8) -> Pattern {
        if self.leaf_sizes(level) == 0 {
            return Pattern::NEVER;
        }
        Pattern::new(Self::PRESENT, TABLE)
    }

    #[inline(always)]
    fn table_address(&self, entry: u64) -> u64 {
        entry & ADDRESS
    }

    #[inline(always)]
    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & Self::PRESENT == 0 {
            return Entry::Absent;
        }
        if entry & TABLE != 0 {
            return Entry::Table(entry & ADDRESS);
        }
        let mut attributes = Attributes::empty();
        attributes.set(Attributes::READ, entry & READ != 0);
        attributes.set(Attributes::WRITE, entry & WRITE != 0);
        attributes.set(Attributes::FORCE_SNOOP, entry & SNOOP != 0);
        Entry::Leaf { oa: entry & ADDRESS, size: PageSize(self.shift(level) as u8), attributes }
    }

    #[inline(always)]
    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        Self::PRESENT | TABLE | address
    }

    #[inline(always)]
    fn leaf_entry(&self, _level: u8, _size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let mut entry = Self::PRESENT | oa;
        if attributes.contains(Attributes::READ) {
            entry |= READ;
        }
        if attributes.contains(Attributes::WRITE) {
            entry |= WRITE;
        }
        if attributes.contains(Attributes::FORCE_SNOOP) {
            entry |= SNOOP;
        }
        entry
    }
}

impl ClaimFormat for Native {
    const PRESENT: u64 = 1 << 0;
    const BUSY: u64 = 1 << 1;
    const FIRST: u64 = 1 << 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_as_documented() {
        let format = Native::new();
        let read_write = Attributes::READ | Attributes::WRITE;
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, 0xa_bcde_1000, read_write), 0xa_bcde_1019);
        assert_eq!(format.table_entry(2, 0x1_0000_1000), 0x1_0000_1041);
        assert_eq!(format.decode(2, 0x1_0000_1041), Entry::Table(0x1_0000_1000));
        assert_eq!(
            format.decode(2, 0x1_2340_0009),
            Entry::Leaf { oa: 0x1_2340_0000, size: PageSize::SIZE_2M, attributes: Attributes::READ }
        );
        // Claimed and not present: translates nothing, whatever else it holds.
        assert_eq!(format.decode(1, 0xa_bcde_101a), Entry::Absent);
    }

    #[test]
    fn six_levels_cover_64_bits_for_every_granule() {
        for granule in 11..=16 {
            let format = Native::new().with_granule(PageSize(granule)).unwrap();
            let top = (4..=6).find(|&level| format.shift(level) + format.index_bits(level) == 64).unwrap();
            assert!(format.index_bits(top) > 0);
            // No address leads beyond the last entry of a table, and the top level has fewer.
            for level in 1..=top {
                let last = (1 << format.index_bits(level)) - 1;
                assert_eq!(
                    (format.index(level, 0), format.index(level, u64::MAX)),
                    (0, last),
                    "level {level}"
                );
                assert_eq!(format.index(level, 1 << format.shift(level)), 1);
            }
        }
        assert!(Native::new().with_granule(PageSize(10)).is_none());
    }
}
