//! AMD's host tables ("v1"): every power-of-two page size, and a root that moves up.
//!
//! AMD I/O Virtualization Technology: device table entry 2.2.2, host tables 2.2.3 (level parameters in table 15,
//! page sizes in table 14), accessed and dirty bits 2.2.3.1 and 2.2.3.2.
//!
//! | bits   | name    | table                  | leaf                                                 |
//! |--------|---------|------------------------|------------------------------------------------------|
//! | 0      | PR      | present                | present                                              |
//! | 4:1    |         | ignored                | ignored                                              |
//! | 5      | A       | accessed               | accessed                                             |
//! | 6      | D       | ignored                | dirty                                                |
//! | 8:7    |         | ignored                | ignored                                              |
//! | 11:9   | NL      | level of the next table | 0: the level's own size; 7: the address says the size |
//! | 51:12  | address | next table             | page; with NL = 7 its low bits are the size          |
//! | 58:52  |         | reserved               | reserved                                             |
//! | 59     | U       | reserved               | answers to translation requests are marked           |
//! | 60     | FC      | reserved               | force coherent: accesses snoop                       |
//! | 61     | IR      | read                   | read                                                 |
//! | 62     | IW      | write                  | write                                                |
//! | 63     |         | ignored                | ignored                                              |
//!
//! | level | IOVA bits | NL = 0  | NL = 7            |
//! |-------|-----------|---------|-------------------|
//! | 1     | 20:12     | 4 KiB   | 8 KiB to 1 MiB    |
//! | 2     | 29:21     | 2 MiB   | 4 MiB to 512 MiB  |
//! | 3     | 38:30     | 1 GiB   | 2 GiB to 256 GiB  |
//! | 4     | 47:39     | none    | 1 TiB to 128 TiB  |
//! | 5     | 56:48     | 256 TiB | 512 TiB to 2 PiB  |
//! | 6     | 63:57     | none    | none              |
//!
//! A leaf of 512 GiB would be level 4's own, but hardware gets it wrong: two of 256 GiB take its place. The highest
//! level of the format holds no leaves, also when the root stands lower.
//!
//! - *Sizes.* A leaf of 2^s bytes with NL = 7 has, in its address, ones in bits s-2 to 12 and a zero in bit s-1, and
//!   stands, all alike, in all the entries that it covers. The code of the level's own size or less, or of more than
//!   half a table, is malformed here, and so are low address bits in a leaf with NL = 0.
//! - *Permissions.* IR and IW are those of the device table entry and of all entries on the way together; tables
//!   always get both, so that the leaf alone decides. A present leaf with neither is legal: it maps, and no access
//!   is allowed.
//! - *Strictness.* NL = 1 to 6 at level 1 would lead below the smallest pages; software that takes every entry of
//!   level 1 for a leaf never meets it, and it is malformed here. The specification lets a table *skip levels*
//!   (an NL of less than one level down, for an IOVA whose bits are 0 there). Nobody is known to write that, and
//!   it is malformed here too.
//! - *Dynamic top.* One store into the device table entry changes the root and its level together, so a table
//!   begins with few levels and grows when an address asks for it. Hardware may have fewer than six (EFR.HATS).
//! - *Accessed and dirty.* Hardware sets them where the device table entry says so (HAD), and D in any one or
//!   several of the entries of a leaf: reading means all of them together, and clearing means clearing all.
//! - *Memory encryption* (the C-bit, one bit inside the address) is not spoken here: where it is on, the addresses
//!   of tables and encrypted pages have to carry it, and this format takes it for a part of the address.
//!
//! The entries of a leaf cannot be replaced all at once, and the specification's text on replacing even one by a
//! table was not at hand; what changes size is made absent first. Permissions, and the output of a
//! leaf of one entry, may be stored, then invalidated.
//!
//! # With a granule of 2 KiB
//!
//! Linux tests its user interface against a device of its own that has these tables with half the page size, so
//! that the page size of the I/O is not that of the CPU; [`AmdV1::with_granule_2k`]. Tables are 4 KiB as before,
//! levels begin at IOVA bits 11, 20, 29, 38 and 47, five at most, and the address field holds the output address
//! times two. The size code of 2^s bytes is s-12 ones and a zero at the bottom of the field. Leaves of one entry
//! are 2 KiB, 1 MiB, 512 MiB and 256 GiB, level 5 holds none, and 512 GiB is left out here as well.

use super::{Attributes, Entry, Format, LiveChanges, Pattern};
use crate::address::PageSize;
use core::ops::RangeInclusive;

const PRESENT: u64 = 1 << 0;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NEXT_LEVEL_SHIFT: u32 = 9;
const NEXT_LEVEL: u64 = 7 << NEXT_LEVEL_SHIFT;
/// Next level of a leaf that says its size in its address.
const SIZE_IN_ADDRESS: u64 = 7 << NEXT_LEVEL_SHIFT;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const RESERVED_IN_LEAVES: u64 = 0x7f << 52;
const RESERVED_IN_TABLES: u64 = 0x1ff << 52;
const FORCE_COHERENT: u64 = 1 << 60;
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
/// Bits 1 to 4, 7, 8 and 63 are ignored in all entries.
const SOFTWARE: u64 = 0xf << 1 | 3 << 7 | 1 << 63;
const INDEX_BITS: u32 = 9;
/// The size that hardware gets wrong: 512 GiB.
const BROKEN_SIZE: u64 = 1 << 39;
/// A size code cannot say more: 2 PiB.
const LARGEST_SIZE: u32 = 51;

/// AMD's host tables as one IOMMU offers them.
///
/// `FINER` is by how much the granule is smaller than 4 KiB, as a logarithm, and so what the address field is shifted
/// by: 0 in hardware, 1 in [the variant of the self-test](AmdV1::with_granule_2k).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AmdV1<const FINER: u32 = 0> {
    lowest_top: u8,
    highest_top: u8,
    leaf_sizes: u64,
    marks: bool,
}

// The attributes stand in the order of the format's own bits.
const _: () = {
    assert!(
        (Attributes::READ.bits() as u64) << 61 == READ && (Attributes::WRITE.bits() as u64) << 61 == WRITE
    );
    assert!((Attributes::ACCESSED.bits() as u64) << 2 == ACCESSED);
    assert!((Attributes::DIRTY.bits() as u64) << 2 == DIRTY);
    assert!((Attributes::FORCE_SNOOP.bits() as u64) << 58 == FORCE_COHERENT);
};

impl AmdV1 {
    /// A table that begins with three levels (39 bits of IOVA) and grows to six (all 64), leaves of every size,
    /// and no accessed and dirty bits.
    pub const fn new() -> AmdV1 {
        AmdV1 { lowest_top: 3, highest_top: 6, leaf_sizes: !BROKEN_SIZE, marks: false }
    }

    /// The variant of Linux' self-test: a granule of 2 KiB, three to five levels (38 to 56 bits of IOVA) and
    /// output addresses of 51 bits. Any other number of levels is chosen after this.
    pub const fn with_granule_2k(self) -> AmdV1<1> {
        AmdV1 { lowest_top: 3, highest_top: 5, leaf_sizes: self.leaf_sizes, marks: self.marks }
    }
}

impl<const FINER: u32> AmdV1<FINER> {
    /// The number of levels to begin with and to grow to, 1 to 6 (EFR.HATS may allow fewer: 0 says 4, 1 says 5, 2
    /// says 6), with the granule of 2 KiB 1 to 5; `None` outside, or if there is none in between. A table of equal
    /// ends does not grow.
    pub const fn with_top_levels(self, levels: RangeInclusive<u8>) -> Option<AmdV1<FINER>> {
        let (lowest_top, highest_top) = (*levels.start(), *levels.end());
        if lowest_top < 1 || lowest_top > highest_top || highest_top > self.highest_level() {
            return None;
        }
        Some(AmdV1 { lowest_top, highest_top, ..self })
    }

    /// Leaves have only these sizes, bit n for 2^n bytes; others are malformed. The smallest page is always among
    /// them.
    pub const fn with_leaf_sizes(self, sizes: u64) -> AmdV1<FINER> {
        AmdV1 { leaf_sizes: sizes & !BROKEN_SIZE, ..self }
    }

    /// Whether hardware sets accessed and dirty bits (EFR.HASup and HDSup, and HAD in the device table entry).
    pub const fn with_accessed_dirty(self, marks: bool) -> AmdV1<FINER> {
        AmdV1 { marks, ..self }
    }

    /// The highest level that a root can stand at. It holds no leaves.
    const fn highest_level(&self) -> u8 {
        if FINER == 0 { 6 } else { 5 }
    }

    /// The bits of the address field that a leaf of one entry at `level` leaves 0.
    #[inline(always)]
    fn misaligned(&self, level: u8) -> u64 {
        ADDRESS & (((1 << self.shift(level)) - 1) << FINER)
    }

    /// What is reserved in tables. They are aligned to 4 KiB, so a finer address has low bits that are 0.
    #[inline(always)]
    fn reserved_in_tables(&self) -> u64 {
        RESERVED_IN_TABLES | (ADDRESS & (0xfff << FINER))
    }
}

impl Default for AmdV1 {
    fn default() -> AmdV1 {
        AmdV1::new()
    }
}

impl<const FINER: u32> Format for AmdV1<FINER> {
    const NAME: &'static str = "amdv1";
    const TENTATIVE: u64 = 1 << 1;

    #[inline(always)]
    fn top_levels(&self) -> RangeInclusive<u8> {
        self.lowest_top..=self.highest_top
    }

    #[inline(always)]
    fn shift(&self, level: u8) -> u32 {
        12 - FINER + INDEX_BITS * (u32::from(level) - 1)
    }

    #[inline(always)]
    fn index_bits(&self, level: u8) -> u32 {
        // Level 6 has the 7 bits that are left.
        INDEX_BITS.min(64 - self.shift(level))
    }

    #[inline(always)]
    fn leaf_sizes(&self, level: u8) -> u64 {
        if level >= self.highest_level() {
            return 0;
        }
        let smallest = self.shift(level);
        // Half a table at most: a code of a whole one would have to say a page of the next level.
        let largest = LARGEST_SIZE.min(smallest + INDEX_BITS - 1);
        let sizes = (2 << largest) - (1 << smallest);
        sizes & (self.leaf_sizes | 1 << (12 - FINER))
    }

    #[inline(always)]
    fn output_bits(&self) -> u32 {
        52 - FINER
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::PERMISSIONS | LiveChanges::OUTPUT
    }

    #[inline(always)]
    fn dirty_bit(&self) -> u64 {
        DIRTY
    }

    fn hardware_marks(&self) -> bool {
        self.marks
    }

    fn software_bits(&self, _level: u8) -> u64 {
        SOFTWARE
    }

    #[inline(always)]
    fn table_pattern(&self, level: u8) -> Pattern {
        let next_level = (u64::from(level) - 1) << NEXT_LEVEL_SHIFT;
        Pattern::new(
            PRESENT | READ | WRITE | next_level,
            (NEXT_LEVEL & !next_level) | Self::TENTATIVE | self.reserved_in_tables(),
        )
    }

    #[inline(always)]
    fn leaf_pattern(&self, level: u8) -> Pattern {
        // The smallest page is always allowed.
        if level > 1 && self.leaf_sizes(level) & (1 << self.shift(level)) == 0 {
            return Pattern::NEVER;
        }
        Pattern::new(PRESENT, NEXT_LEVEL | RESERVED_IN_LEAVES | self.misaligned(level))
    }

    #[inline(always)]
    fn table_address(&self, entry: u64) -> u64 {
        (entry & ADDRESS) >> FINER
    }

    #[inline(always)]
    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Absent;
        }
        let next_level = (entry & NEXT_LEVEL) >> NEXT_LEVEL_SHIFT;
        let address = entry & ADDRESS;
        let (field, log2) = match next_level {
            0 if entry & self.misaligned(level) == 0 => (address, self.shift(level)),
            7 => {
                // The lowest zero ends the code, and belongs to it.
                let code_end = (address | 0xfff).trailing_ones() + 1;
                (address >> code_end << code_end, code_end - FINER)
            }
            _ if level > 1
                && next_level == u64::from(level) - 1
                && entry & self.reserved_in_tables() == 0 =>
            {
                return Entry::Table(address >> FINER);
            }
            _ => return Entry::Malformed,
        };
        // A code that says one entry's worth or less says nothing that NL = 0 does not.
        let coded_small = next_level == 7 && log2 <= self.shift(level);
        if entry & RESERVED_IN_LEAVES != 0 || coded_small || self.leaf_sizes(level) & (1 << log2) == 0 {
            return Entry::Malformed;
        }
        let mut attributes = Attributes::empty();
        attributes.set(Attributes::READ, entry & READ != 0);
        attributes.set(Attributes::WRITE, entry & WRITE != 0);
        attributes.set(Attributes::FORCE_SNOOP, entry & FORCE_COHERENT != 0);
        attributes.set(Attributes::ACCESSED, entry & ACCESSED != 0);
        attributes.set(Attributes::DIRTY, entry & DIRTY != 0);
        Entry::Leaf { oa: field >> FINER, size: PageSize(log2 as u8), attributes }
    }

    #[inline(always)]
    fn table_entry(&self, level: u8, address: u64) -> u64 {
        let next_level = (u64::from(level) - 1) << NEXT_LEVEL_SHIFT;
        address << FINER | next_level | PRESENT | READ | WRITE
    }

    #[inline(always)]
    fn leaf_entry(&self, level: u8, size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let mut entry = oa << FINER | PRESENT;
        if size.log2() > self.shift(level) {
            entry |= SIZE_IN_ADDRESS | (((size.bytes() >> 1) - 1) << FINER & ADDRESS);
        }
        // Moving bits is cheaper than asking for each.
        let bits = u64::from(attributes.bits());
        entry |= (bits & u64::from(Attributes::READ.union(Attributes::WRITE).bits())) << 61;
        entry |= (bits & u64::from(Attributes::USED.bits())) << 2;
        entry |= (bits & u64::from(Attributes::FORCE_SNOOP.bits())) << 58;
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::IovaRange;

    const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
    /// What Linux writes.
    const COHERENT: Attributes = READ_WRITE.union(Attributes::FORCE_SNOOP);

    fn size(log2: u32) -> PageSize {
        PageSize::from_log2(log2).unwrap()
    }

    fn mock() -> AmdV1<1> {
        AmdV1::new().with_granule_2k()
    }

    /// Writes the leaf, compares it, and reads it back.
    fn golden<const FINER: u32>(
        format: &AmdV1<FINER>,
        level: u8,
        log2: u32,
        oa: u64,
        attributes: Attributes,
        entry: u64,
    ) {
        let size = size(log2);
        assert_eq!(format.leaf_entry(level, size, oa, attributes), entry, "{size} at {oa:#x}");
        assert_eq!(format.decode(level, entry), Entry::Leaf { oa, size, attributes }, "{entry:#x}");
    }

    /// Worked out from the bit table and the size codes (table 14) of section 2.2.3.
    #[test]
    fn golden_entries() {
        let format = AmdV1::new();
        assert_eq!(format.table_entry(2, 0x1_0000_3000), 0x6000_0001_0000_3201);
        for level in 2..=6 {
            let entry = 0x6000_0001_0000_3001 | (u64::from(level) - 1) << 9;
            assert_eq!(format.table_entry(level, 0x1_0000_3000), entry);
            assert_eq!(format.decode(level, entry), Entry::Table(0x1_0000_3000));
        }
        let snoop = Attributes::FORCE_SNOOP;
        golden(&format, 1, 12, 0xa_bcde_1000, COHERENT, 0x7000_000a_bcde_1001);
        golden(&format, 1, 12, 0xa_bcde_1000, Attributes::READ | snoop, 0x3000_000a_bcde_1001);
        golden(&format, 1, 12, 0xa_bcde_1000, Attributes::WRITE | snoop, 0x5000_000a_bcde_1001);
        golden(&format, 1, 12, 0xa_bcde_1000, READ_WRITE, 0x6000_000a_bcde_1001);
        golden(&format, 1, 12, 0xa_bcde_1000, COHERENT | Attributes::DIRTY, 0x7000_000a_bcde_1041);
        golden(&format, 1, 12, 0xa_bcde_1000, READ_WRITE | Attributes::ACCESSED, 0x6000_000a_bcde_1021);
        golden(&format, 2, 21, 0x1_2340_0000, COHERENT, 0x7000_0001_2340_0001);
        golden(&format, 3, 30, 0x1_c000_0000, COHERENT, 0x7000_0001_c000_0001);
        golden(&format, 1, 13, 0xfff5_2000, COHERENT, 0x7000_0000_fff5_2e01);
        golden(&format, 1, 16, 0xfff5_0000, COHERENT, 0x7000_0000_fff5_7e01);
        golden(&format, 2, 22, 0x0080_0000, COHERENT, 0x7000_0000_009f_fe01);
        golden(&format, 2, 28, 0x2_4000_0000, COHERENT, 0x7000_0002_47ff_fe01);
        // The first half of 512 GiB.
        golden(&format, 3, 38, 0x80_0000_0000, COHERENT, 0x7000_009f_ffff_fe01);
        golden(&format, 4, 40, 0x100_0000_0000, COHERENT, 0x7000_017f_ffff_fe01);
        // The largest that a code can say.
        golden(&format, 5, 51, 1 << 51, COHERENT, 0x700b_ffff_ffff_fe01);
    }

    /// Worked out from the same tables with the address field shifted by one.
    #[test]
    fn golden_entries_with_a_granule_of_2k() {
        let format = mock();
        assert_eq!(format.table_entry(2, 0x1_0000_a000), 0x6000_0002_0001_4201);
        assert_eq!(format.decode(2, 0x6000_0002_0001_4201), Entry::Table(0x1_0000_a000));
        golden(&format, 1, 11, 0x1234_5800, READ_WRITE, 0x6000_0000_2468_b001);
        golden(&format, 1, 11, 0x1234_5800, READ_WRITE | Attributes::DIRTY, 0x6000_0000_2468_b041);
        golden(&format, 1, 12, 0x7fff_f000, READ_WRITE, 0x6000_0000_ffff_ee01);
        golden(&format, 1, 12, 0xa_bcde_1000, Attributes::READ, 0x2000_0015_79bc_2e01);
        golden(&format, 1, 12, 0xa_bcde_1000, READ_WRITE, 0x6000_0015_79bc_2e01);
        golden(&format, 1, 15, 0x8_0000, READ_WRITE, 0x6000_0000_0010_7e01);
        golden(&format, 2, 20, 0x12_3400_0000, READ_WRITE, 0x6000_0024_6800_0001);
        golden(&format, 2, 21, 0x1_2340_0000, READ_WRITE, 0x6000_0002_469f_fe01);
        golden(&format, 2, 21, 0x1_2340_0000, Attributes::READ, 0x2000_0002_469f_fe01);
    }

    #[test]
    fn levels_hold_every_power_of_two_but_one() {
        let format = AmdV1::new();
        let sizes = |from: u32, to: u32| (from..=to).map(|log2| 1u64 << log2).sum::<u64>();
        assert_eq!(format.leaf_sizes(1), sizes(12, 20));
        assert_eq!(format.leaf_sizes(2), sizes(21, 29));
        assert_eq!(format.leaf_sizes(3), sizes(30, 38));
        assert_eq!(format.leaf_sizes(4), sizes(40, 47), "512 GiB is broken");
        assert_eq!(format.leaf_sizes(5), sizes(48, 51));
        assert_eq!(format.leaf_sizes(6), 0);
        assert_eq!(format.leaf_pattern(4), Pattern::NEVER);
        let format = mock();
        assert_eq!(format.leaf_sizes(1), sizes(11, 19));
        assert_eq!(format.leaf_sizes(3), sizes(29, 37));
        assert_eq!(format.leaf_sizes(4), 1 << 38 | sizes(40, 46));
        assert_eq!(format.leaf_sizes(5), 0);
        // The self-test's own choice: 2 KiB to 64 GiB.
        let format = format.with_leaf_sizes(0x1f_ffff_f800);
        assert_eq!(format.leaf_sizes(3), sizes(29, 36));
        assert_eq!(format.leaf_sizes(4), 0);
        // The smallest page stays.
        assert_eq!(AmdV1::new().with_leaf_sizes(0).leaf_sizes(1), 1 << 12);
    }

    fn every_size_reads_back_in<const FINER: u32>(format: &AmdV1<FINER>) {
        for level in 1..=5 {
            for log2 in (0..64).filter(|&log2| format.leaf_sizes(level) & (1 << log2) != 0) {
                for oa in [0, 1u64 << log2, (1 << format.output_bits()) - (1 << log2)] {
                    if oa < 1 << format.output_bits() {
                        let entry = format.leaf_entry(level, size(log2), oa, READ_WRITE);
                        golden(format, level, log2, oa, READ_WRITE, entry);
                    }
                }
            }
        }
    }

    #[test]
    fn every_size_reads_back() {
        every_size_reads_back_in(&AmdV1::new());
        every_size_reads_back_in(&mock());
    }

    #[test]
    fn a_leaf_without_access_is_a_leaf() {
        let format = AmdV1::new();
        golden(&format, 1, 12, 0xa_bcde_1000, Attributes::empty(), 0xa_bcde_1001);
        assert_eq!(format.decode(1, 0x7000_000a_bcde_1000), Entry::Absent);
    }

    #[test]
    fn the_next_level_must_be_the_next_level() {
        let format = AmdV1::new();
        for level in 1..=6u8 {
            for next_level in 1..=6u8 {
                let entry = 0x6000_0001_0000_3001 | u64::from(next_level) << 9;
                let expected =
                    if next_level + 1 == level { Entry::Table(0x1_0000_3000) } else { Entry::Malformed };
                assert_eq!(format.decode(level, entry), expected, "NL {next_level} at level {level}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_belong_are_refused() {
        let format = AmdV1::new();
        let coded = |log2: u32| ((1u64 << (log2 - 1)) - 1) & ADDRESS | 0x7000_0000_0000_0e01;
        for (level, log2) in [
            (1, 21),
            (2, 13),
            (2, 21),
            (2, 30),
            (3, 30),
            (3, 39),
            (4, 39),
            (4, 48),
            (5, 48),
            (5, 52),
            (6, 51),
        ] {
            assert_eq!(format.decode(level, coded(log2)), Entry::Malformed, "2^{log2} at level {level}");
        }
        assert_eq!(format.decode(5, 0x700f_ffff_ffff_fe01), Entry::Malformed, "all ones");
        assert_eq!(format.decode(4, 0x7000_0080_0000_0001), Entry::Malformed, "512 GiB");
        assert_eq!(format.decode(6, 0x7000_0000_0000_0001), Entry::Malformed, "a leaf at level 6");
        assert_eq!(format.decode(2, 0x7000_0001_2340_1001), Entry::Malformed, "misaligned 2M leaf");
        assert_eq!(
            mock().decode(4, coded(39) << 1 & ADDRESS | 0xe01),
            Entry::Malformed,
            "512 GiB in the mock"
        );
        assert_eq!(mock().decode(5, 0x6000_0000_0000_0001), Entry::Malformed, "a leaf at the mock's level 5");
        let few = format.with_leaf_sizes(1 << 12 | 1 << 21);
        assert_eq!(few.decode(1, 0x7000_0000_fff5_2e01), Entry::Malformed, "8K not among the sizes");
        assert_eq!(few.decode(3, 0x7000_0001_c000_0001), Entry::Malformed, "1G not among the sizes");
        assert_eq!(few.leaf_pattern(3), Pattern::NEVER);
    }

    #[test]
    fn reserved_bits_are_refused() {
        let format = AmdV1::new();
        for bit in 52..=58 {
            assert_eq!(format.decode(1, 1 << bit | 0x7000_000a_bcde_1001), Entry::Malformed, "bit {bit}");
            assert_eq!(format.decode(1, 1 << bit | 0x7000_0000_fff5_7e01), Entry::Malformed, "bit {bit}");
        }
        for bit in 52..=60 {
            assert_eq!(format.decode(2, 1 << bit | 0x6000_0001_0000_3201), Entry::Malformed, "bit {bit}");
        }
        // The mock's tables are aligned to 4 KiB all the same.
        assert_eq!(mock().decode(2, 0x6000_0002_0001_5201), Entry::Malformed);
    }

    #[test]
    fn ignored_bits_are_ignored() {
        let format = AmdV1::new();
        for bit in [1, 2, 3, 4, 7, 8, 63] {
            assert!(format.software_bits(1) & (1 << bit) != 0);
            assert_eq!(
                format.decode(1, 1 << bit | 0x7000_0000_fff5_7e01),
                format.decode(1, 0x7000_0000_fff5_7e01)
            );
            assert_eq!(format.decode(2, 1 << bit | 0x6000_0001_0000_3201), Entry::Table(0x1_0000_3000));
        }
        // A and D in tables; U in leaves.
        assert_eq!(format.decode(2, 0x6000_0001_0000_3261), Entry::Table(0x1_0000_3000));
        assert_eq!(format.decode(1, 0x7800_000a_bcde_1001), format.decode(1, 0x7000_000a_bcde_1001));
    }

    #[test]
    fn widths() {
        let format = AmdV1::new();
        assert!(format.accepts(&IovaRange::ALL));
        assert_eq!((format.width(3), format.width(5), format.width(6)), (39, 57, 64));
        assert_eq!((format.index_bits(5), format.index_bits(6)), (9, 7));
        for levels in 1..=5 {
            let format = AmdV1::new().with_top_levels(levels..=levels).unwrap();
            let bits = 12 + 9 * u32::from(levels);
            assert!(format.accepts(&IovaRange::new(0, (1 << bits) - 1).unwrap()));
            assert!(!format.accepts(&IovaRange::new(0, 1 << bits).unwrap()));
        }
        let format = mock();
        assert_eq!(format.width(5), 56);
        assert!(!format.accepts(&IovaRange::new(0, 1 << 56).unwrap()));
        assert!(format.clone().with_top_levels(5..=6).is_none());
        let fixed = format.with_top_levels(3..=3).unwrap();
        assert!(fixed.accepts(&IovaRange::new(0, (1 << 38) - 1).unwrap()));
        assert!(!fixed.accepts(&IovaRange::new(0, 1 << 38).unwrap()));
        for (first, last) in [(0, 3), (3, 7), (4, 3)] {
            assert!(AmdV1::new().with_top_levels(RangeInclusive::new(first, last)).is_none());
        }
    }
}
