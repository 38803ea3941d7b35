//! x86-64 paging as IOMMUs walk it: Intel VT-d first stage and AMD's guest ("v2") tables.
//!
//! Intel Virtualization Technology for Directed I/O: translation 3.6, accessed and dirty flags 3.6.2, entries 9.7.
//! Intel Software Developer's Manual, volume 3: 4-level and 5-level paging. AMD I/O Virtualization Technology:
//! guest tables 2.2.6, accessed and dirty bits 2.2.7.4.
//!
//! | bits     | table entry   | leaf at level 3 (1G) and 2 (2M) | leaf at level 1 |
//! |----------|---------------|---------------------------------|-----------------|
//! | 0        | P, present    | P                               | P               |
//! | 1        | R/W           | R/W, may be written             | R/W             |
//! | 2        | U/S           | U/S, for user requests          | U/S             |
//! | 3        | PWT           | PWT, bit 0 of the memory type   | PWT             |
//! | 4        | PCD           | PCD, bit 1 of the memory type   | PCD             |
//! | 5        | A             | A                               | A               |
//! | 6        | ignored       | D                               | D               |
//! | 7        | 0             | 1 (page size)                   | PAT             |
//! | 8        | ignored       | G, global                       | G               |
//! | 9, 11    | software      | software                        | software        |
//! | 10       | EA            | EA, extended access             | EA              |
//! | 12       | next table    | PAT, bit 2 of the memory type   | page            |
//! | HAW-1:13 | next table    | page (low bits reserved)        | page            |
//! | 51:HAW   | reserved      | reserved                        | reserved        |
//! | 62:52    | software      | software                        | software        |
//! | 63       | XD            | XD, no instruction fetches      | XD              |
//!
//! At levels 4 and 5 bit 7 is reserved: there are no leaves. PAT is bit 7 in a 4 KiB leaf, where it looks like the
//! page size, and bit 12, where it looks like an address, in the larger ones.
//!
//! - *Permissions.* R/W, U/S and XD are those of all entries on the way together. Table entries get R/W and U, and
//!   never XD, so that the leaf alone decides. There is no bit for reading: whatever is present may be read, so
//!   writing and executing imply it. Devices make user requests, for which an entry without U is closed: that is
//!   what a leaf without any permission is.
//! - *Accessed and dirty.* Hardware sets both, at any time, and no bit turns that off. Nobody gains from the
//!   updates of a leaf that is written once and then used, so, as Linux does, tables begin with A, and leaves with
//!   A and, if they may be written, with D, whatever the attributes say. Hardware whose walks are not coherent
//!   relies on that. To track dirty pages, clear D first.
//! - *Memory type.* The three bits are an index into a table of eight types (PAT), of which index 0 is
//!   [`MemoryType::Inherit`], whatever the table holds there. See
//!   [`with_page_attribute_table`](X86_64::with_page_attribute_table).
//! - *Ignored.* G is neither written nor looked at: it only spares entries from invalidations. EA is hardware's
//!   where the PASID entry says so (EAFE), so it is not a software bit.
//! - *XD* is effective in some modes and reserved in others; see
//!   [`with_execute_disable`](X86_64::with_execute_disable).
//! - *Memory encryption* (AMD's C-bit, one bit inside the address) is not spoken here.
//!
//! The tables are sign-extended like a CPU's. AMD's PASID 0 with GIOV, and other translators that decode all 48 or
//! 57 bits, are [not](X86_64::with_sign_extension). A table that both kinds walk is one without sign extension in
//! which nothing is mapped at bit 47 or 56.
//!
//! By the rules for CPUs a leaf may be replaced by a table of smaller ones with the same translation without being
//! absent in between; caches may hold both until the invalidation, and both are right.

use super::{Attributes, Entry, Format, LiveChanges, MemoryType, Pattern};
use crate::address::PageSize;
use crate::foreign::FirstStageFormat;
use core::ops::RangeInclusive;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// PWT and PCD: the lower bits of the index of the memory type.
const TYPE_LOW_SHIFT: u32 = 3;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
/// Where PAT, the highest bit of the index of the memory type, is in leaves of 4 KiB and in larger ones.
const PAT_SMALL_SHIFT: u32 = 7;
const PAT_LARGE_SHIFT: u32 = 12;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const EXECUTE_DISABLE: u64 = 1 << 63;
/// Bits 9, 11 and 52 to 62 are ignored in all entries.
const SOFTWARE: u64 = 1 << 9 | 1 << 11 | 0x7ff << 52;

/// x86-64 paging as one IOMMU offers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct X86_64 {
    levels: u8,
    sign_extended: bool,
    host_address_width: u32,
    /// The address bits below the host address width; kept because every entry on the way is held against it.
    address_mask: u64,
    large_pages: u64,
    execute_disable: bool,
    /// The [`MemoryType`] of each of the eight indexes, four bits each.
    types: u32,
    /// The index for each `MemoryType`, four bits each; 0 for those that the table does not have.
    indexes: u32,
}

impl X86_64 {
    /// The page attribute table that processors begin with. Its "UC-", uncached unless the memory type ranges of
    /// the machine say write combining, is uncached here.
    pub const POWER_ON_PAGE_ATTRIBUTE_TABLE: [MemoryType; 8] = [
        MemoryType::WriteBack,
        MemoryType::WriteThrough,
        MemoryType::Uncached,
        MemoryType::Uncached,
        MemoryType::WriteBack,
        MemoryType::WriteThrough,
        MemoryType::Uncached,
        MemoryType::Uncached,
    ];

    /// A table of 4 or 5 levels (48 or 57 bits of IOVA, the highest of them repeated above); `None` for another
    /// number. Host addresses of 52 bits, 2 MiB and 1 GiB pages, no XD, the page attribute table of power-on.
    pub const fn new(levels: u8) -> Option<X86_64> {
        if levels != 4 && levels != 5 {
            return None;
        }
        let format = X86_64 {
            levels,
            sign_extended: true,
            host_address_width: 52,
            address_mask: ADDRESS,
            large_pages: PageSize::SIZE_2M.bytes() | PageSize::SIZE_1G.bytes(),
            execute_disable: false,
            types: 0,
            indexes: 0,
        };
        Some(format.with_page_attribute_table(X86_64::POWER_ON_PAGE_ATTRIBUTE_TABLE))
    }

    /// Whether the bits above the table's width repeat the highest one within it. Without, the table translates
    /// the lowest 2^48 or 2^57 addresses: AMD's PASID 0 with GIOV.
    pub const fn with_sign_extension(self, sign_extended: bool) -> X86_64 {
        X86_64 { sign_extended, ..self }
    }

    /// The large pages that the unit reports (VT-d: always 2 MiB; 1 GiB with CAP.FL1GP): bit 21 for 2 MiB, bit 30
    /// for 1 GiB.
    pub const fn with_large_pages(self, sizes: u64) -> X86_64 {
        let both = PageSize::SIZE_2M.bytes() | PageSize::SIZE_1G.bytes();
        X86_64 { large_pages: sizes & both, ..self }
    }

    /// The width of host addresses, 32 to 52 bits; outside, `None`.
    pub const fn with_host_address_width(self, bits: u32) -> Option<X86_64> {
        if bits < 32 || bits > 52 {
            return None;
        }
        Some(X86_64 { host_address_width: bits, address_mask: ADDRESS & ((1 << bits) - 1), ..self })
    }

    /// Whether leaves forbid instruction fetches (VT-d: NXE in the PASID entry; AMD: EFR.NXSup). Without it bit 63
    /// is taken for reserved and never written, and fetching is not told from reading.
    pub const fn with_execute_disable(self, execute_disable: bool) -> X86_64 {
        X86_64 { execute_disable, ..self }
    }

    /// The memory type of each index (PWT + 2 PCD + 4 PAT): the machine's IA32_PAT, or PAT in the PASID entry.
    ///
    /// Index 0 always reads as [`MemoryType::Inherit`], so that a leaf that asks for nothing says nothing. A type
    /// that several indexes have is written with the one that comes first in 3, 2, 1, 7, 6, 5, 4: where power-on
    /// has both kinds of uncached, the strong kind; and 0 only if no other has it.
    pub const fn with_page_attribute_table(self, table: [MemoryType; 8]) -> X86_64 {
        let (mut types, mut indexes) = (table[0] as u32, 0);
        let mut rank = 0;
        // The least wanted index first: a better one overwrites it.
        let order = [4, 5, 6, 7, 1, 2, 3];
        while rank < order.len() {
            let index = order[rank];
            let memory_type = table[index] as u32;
            types |= memory_type << (4 * index);
            indexes = indexes & !(0xf << (4 * memory_type)) | (index as u32) << (4 * memory_type);
            rank += 1;
        }
        // Whatever the table says, inheriting is index 0.
        indexes &= !0xf;
        X86_64 { types, indexes, ..self }
    }

    /// What is reserved in every entry.
    #[inline(always)]
    const fn reserved(&self) -> u64 {
        let beyond = ADDRESS & !self.address_mask;
        if self.execute_disable { beyond } else { beyond | EXECUTE_DISABLE }
    }

    /// Where PAT is in leaves of `level`.
    #[inline(always)]
    const fn pat_shift(level: u8) -> u32 {
        if level == 1 { PAT_SMALL_SHIFT } else { PAT_LARGE_SHIFT }
    }

    /// The bits of the address that are 0 in leaves of `level`; in the larger ones the lowest of them is PAT.
    #[inline(always)]
    fn misaligned(&self, level: u8) -> u64 {
        if level == 1 { 0 } else { ((1 << self.shift(level)) - 1) & ADDRESS & !(1 << PAT_LARGE_SHIFT) }
    }
}

// The attributes stand in the order of the format's own bits.
const _: () = {
    assert!(Attributes::WRITE.bits() as u64 == WRITE && WRITE << 5 == DIRTY);
    assert!((Attributes::DIRTY.bits() as u64) << 2 == DIRTY);
};

impl Format for X86_64 {
    const NAME: &'static str = "x86_64";
    const TENTATIVE: u64 = 1 << 11;

    #[inline(always)]
    fn top_levels(&self) -> RangeInclusive<u8> {
        self.levels..=self.levels
    }

    #[inline(always)]
    fn shift(&self, level: u8) -> u32 {
        12 + 9 * (u32::from(level) - 1)
    }

    #[inline(always)]
    fn index_bits(&self, _level: u8) -> u32 {
        9
    }

    #[inline(always)]
    fn leaf_sizes(&self, level: u8) -> u64 {
        match level {
            1 => PageSize::SIZE_4K.bytes(),
            2 | 3 => self.large_pages & (1 << self.shift(level)),
            _ => 0,
        }
    }

    #[inline(always)]
    fn sign_extended(&self) -> bool {
        self.sign_extended
    }

    #[inline(always)]
    fn output_bits(&self) -> u32 {
        self.host_address_width
    }

    fn has_memory_type(&self, memory_type: MemoryType) -> bool {
        memory_type == MemoryType::Inherit
            || (0..8).any(|index| (self.types >> (4 * index)) & 0xf == memory_type as u32)
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::all()
    }

    #[inline(always)]
    fn dirty_bit(&self) -> u64 {
        DIRTY
    }

    fn hardware_marks(&self) -> bool {
        true
    }

    fn software_bits(&self, _level: u8) -> u64 {
        SOFTWARE
    }

    #[inline(always)]
    fn table_pattern(&self, _level: u8) -> Pattern {
        let absent = PAGE_SIZE | EXECUTE_DISABLE | Self::TENTATIVE | self.reserved();
        Pattern::new(PRESENT | WRITE | USER, absent)
    }

    #[inline(always)]
    fn leaf_pattern(&self, level: u8) -> Pattern {
        match level {
            1 => Pattern::new(PRESENT, self.reserved()),
            _ if self.leaf_sizes(level) != 0 => {
                Pattern::new(PRESENT | PAGE_SIZE, self.reserved() | self.misaligned(level))
            }
            _ => Pattern::NEVER,
        }
    }

    #[inline(always)]
    fn table_address(&self, entry: u64) -> u64 {
        entry & ADDRESS
    }

    #[inline(always)]
    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Absent;
        }
        if level > 1 && entry & PAGE_SIZE == 0 {
            return if entry & self.reserved() != 0 {
                Entry::Malformed
            } else {
                Entry::Table(entry & self.address_mask)
            };
        }
        let misaligned = self.misaligned(level);
        if entry & (self.reserved() | misaligned) != 0 || (level > 1 && self.leaf_sizes(level) == 0) {
            return Entry::Malformed;
        }
        let mut attributes = Attributes::empty();
        let user = entry & USER != 0;
        attributes.set(Attributes::READ, user);
        attributes.set(Attributes::WRITE, user && entry & WRITE != 0);
        attributes.set(Attributes::EXECUTE, user && self.execute_disable && entry & EXECUTE_DISABLE == 0);
        attributes.set(Attributes::ACCESSED, entry & ACCESSED != 0);
        attributes.set(Attributes::DIRTY, entry & DIRTY != 0);
        let pat_shift = X86_64::pat_shift(level);
        let index = (entry >> TYPE_LOW_SHIFT) & 3 | ((entry >> pat_shift) & 1) << 2;
        if index != 0 {
            attributes |= Attributes::from_bits_retain(((self.types >> (4 * index)) & 0xf) << 8);
        }
        let low = (1 << self.shift(level)) - 1;
        Entry::Leaf {
            oa: entry & self.address_mask & !low,
            size: PageSize(self.shift(level) as u8),
            attributes,
        }
    }

    #[inline(always)]
    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        address | PRESENT | WRITE | USER | ACCESSED
    }

    #[inline(always)]
    fn leaf_entry(&self, level: u8, _size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let mut entry = oa | PRESENT | ACCESSED;
        if level > 1 {
            entry |= PAGE_SIZE;
        }
        if attributes.intersects(Attributes::PERMISSIONS) {
            entry |= USER;
        }
        // Moving bits is cheaper than asking for each; what may be written begins dirty.
        let bits = u64::from(attributes.bits());
        entry |= bits & WRITE | (bits & WRITE) << 5 | (bits & u64::from(Attributes::DIRTY.bits())) << 2;
        if self.execute_disable && !attributes.contains(Attributes::EXECUTE) {
            entry |= EXECUTE_DISABLE;
        }
        if attributes.memory_type() == MemoryType::Inherit {
            return entry;
        }
        let index = u64::from((self.indexes >> (4 * attributes.memory_type() as u32)) & 7);
        entry | (index & 3) << TYPE_LOW_SHIFT | (index >> 2) << X86_64::pat_shift(level)
    }
}

impl FirstStageFormat for X86_64 {
    fn lets_through(&self, entry: u64) -> Attributes {
        let mut attributes = Attributes::empty();
        let user = entry & USER != 0;
        attributes.set(Attributes::READ, user);
        attributes.set(Attributes::WRITE, user && entry & WRITE != 0);
        attributes.set(Attributes::EXECUTE, user && entry & EXECUTE_DISABLE == 0);
        attributes
    }

    fn accessed_bit(&self, _leaf: bool) -> u64 {
        ACCESSED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::IovaRange;

    const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
    const PAGE: u64 = 0xa_bcde_1000;

    fn four_levels() -> X86_64 {
        X86_64::new(4).unwrap()
    }

    fn leaf(format: &X86_64, level: u8, entry: u64) -> (u64, PageSize, Attributes) {
        match format.decode(level, entry) {
            Entry::Leaf { oa, size, attributes } => (oa, size, attributes),
            other => panic!("{entry:#x} at level {level} is {other:?}"),
        }
    }

    /// Worked out from the bit table of VT-d section 9.7.
    #[test]
    fn golden_entries() {
        let format = four_levels();
        assert_eq!(format.table_entry(4, 0x1_0000_8000), 0x1_0000_8027);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, PAGE, READ_WRITE), 0xa_bcde_1067);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, PAGE, Attributes::READ), 0xa_bcde_1025);
        assert_eq!(format.leaf_entry(2, PageSize::SIZE_2M, 0x1_2340_0000, READ_WRITE), 0x1_2340_00e7);
        assert_eq!(format.leaf_entry(2, PageSize::SIZE_2M, 0x1_2340_0000, Attributes::READ), 0x1_2340_00a5);
        assert_eq!(format.leaf_entry(3, PageSize::SIZE_1G, 0x1_c000_0000, READ_WRITE), 0x1_c000_00e7);
        // A table with software bit 9.
        assert_eq!(format.decode(4, 0x1_0000_8227), Entry::Table(0x1_0000_8000));
        // PAT alone, index 4, which power-on has as write-back: bit 7 in a small leaf, bit 12 in a large one.
        let write_back = READ_WRITE.with_memory_type(MemoryType::WriteBack);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, PAGE, write_back), 0xa_bcde_10e7);
        let format = format.with_execute_disable(true);
        assert_eq!(format.leaf_entry(2, PageSize::SIZE_2M, 0x1_2340_0000, write_back), 0x8000_0001_2340_10e7);
    }

    #[test]
    fn page_attributes_are_where_they_belong() {
        let format = four_levels();
        let used = READ_WRITE | Attributes::USED;
        let write_back = used.with_memory_type(MemoryType::WriteBack);
        assert_eq!(leaf(&format, 1, 0xa_bcde_10e7), (PAGE, PageSize::SIZE_4K, write_back));
        assert_eq!(leaf(&format, 2, 0x1_2340_10e7), (0x1_2340_0000, PageSize::SIZE_2M, write_back));
        // In a small page bit 12 is the address.
        assert_eq!(leaf(&format, 1, 0x1_2340_1067), (0x1_2340_1000, PageSize::SIZE_4K, used));
        // PCD and PWT: uncached, the strong kind.
        let uncached = READ_WRITE.with_memory_type(MemoryType::Uncached);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, PAGE, uncached), 0xa_bcde_107f);
        assert_eq!(leaf(&format, 1, 0xa_bcde_1077).2.memory_type(), MemoryType::Uncached, "UC-");
        assert_eq!(leaf(&format, 1, 0xa_bcde_106f).2.memory_type(), MemoryType::WriteThrough);
    }

    #[test]
    fn the_page_attribute_table_says_which_types_there_are() {
        let format = four_levels();
        for (memory_type, there) in [
            (MemoryType::Inherit, true),
            (MemoryType::Uncached, true),
            (MemoryType::WriteCombining, false),
            (MemoryType::WriteThrough, true),
            (MemoryType::WriteProtected, false),
            (MemoryType::WriteBack, true),
        ] {
            assert_eq!(format.has_memory_type(memory_type), there, "{memory_type:?}");
        }
        // What Linux sets up for CPUs: WB, WC, UC-, UC, WB, WP, UC-, WT.
        let format = format.with_page_attribute_table([
            MemoryType::WriteBack,
            MemoryType::WriteCombining,
            MemoryType::Uncached,
            MemoryType::Uncached,
            MemoryType::WriteBack,
            MemoryType::WriteProtected,
            MemoryType::Uncached,
            MemoryType::WriteThrough,
        ]);
        for (memory_type, bits) in [
            (MemoryType::Inherit, 0x00),
            (MemoryType::WriteCombining, 0x08),
            (MemoryType::Uncached, 0x18),
            (MemoryType::WriteBack, 0x80),
            (MemoryType::WriteProtected, 0x88),
            (MemoryType::WriteThrough, 0x98),
        ] {
            assert!(format.has_memory_type(memory_type));
            let attributes = Attributes::READ.with_memory_type(memory_type);
            let entry = format.leaf_entry(1, PageSize::SIZE_4K, PAGE, attributes);
            assert_eq!(entry, 0xa_bcde_1025 | bits, "{memory_type:?}");
            assert_eq!(leaf(&format, 1, entry).2, attributes | Attributes::ACCESSED);
        }
        // A type that only index 0 has is index 0.
        let format = format.with_page_attribute_table([
            MemoryType::WriteProtected,
            MemoryType::Inherit,
            MemoryType::Inherit,
            MemoryType::Inherit,
            MemoryType::Inherit,
            MemoryType::Inherit,
            MemoryType::Inherit,
            MemoryType::Inherit,
        ]);
        assert!(format.has_memory_type(MemoryType::WriteProtected));
        let protected = Attributes::READ.with_memory_type(MemoryType::WriteProtected);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, PAGE, protected), 0xa_bcde_1025);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, PAGE, Attributes::READ), 0xa_bcde_1025);
    }

    #[test]
    fn writing_and_executing_imply_reading() {
        let format = four_levels().with_execute_disable(true);
        let entry = format.leaf_entry(1, PageSize::SIZE_4K, PAGE, Attributes::WRITE);
        assert_eq!(leaf(&format, 1, entry).2, READ_WRITE | Attributes::USED);
        let entry = format.leaf_entry(1, PageSize::SIZE_4K, PAGE, Attributes::EXECUTE);
        let executable = Attributes::READ | Attributes::EXECUTE;
        assert_eq!(leaf(&format, 1, entry).2, executable | Attributes::ACCESSED);
        assert_eq!(entry, 0xa_bcde_1025);
    }

    #[test]
    fn user_requests_get_nothing_without_user() {
        let format = four_levels();
        assert_eq!(leaf(&format, 1, 0xa_bcde_1003).2, Attributes::empty());
        let closed = format.leaf_entry(1, PageSize::SIZE_4K, PAGE, Attributes::empty());
        assert_eq!(leaf(&format, 1, closed).2, Attributes::ACCESSED);
        assert!(!format.table_pattern(2).matches(0x1_0000_8023), "a table without U is looked at closely");
    }

    #[test]
    fn execute_disable_is_an_option() {
        let plain = four_levels();
        assert_eq!(plain.decode(1, 1 << 63 | 0xa_bcde_1067), Entry::Malformed);
        assert_eq!(plain.decode(2, 1 << 63 | 0x1_0000_8027), Entry::Malformed);
        assert!(!leaf(&plain, 1, 0xa_bcde_1067).2.contains(Attributes::EXECUTE), "not told from reading");
        let format = plain.with_execute_disable(true);
        assert_eq!(leaf(&format, 1, 1 << 63 | 0xa_bcde_1067).2, READ_WRITE | Attributes::USED);
        assert_eq!(leaf(&format, 1, 0xa_bcde_1067).2, READ_WRITE | Attributes::EXECUTE | Attributes::USED);
        assert_eq!(format.table_entry(2, 0x1_0000_8000), 0x1_0000_8027, "never in tables");
    }

    #[test]
    fn reserved_bits_are_refused() {
        let format = four_levels().with_host_address_width(46).unwrap();
        for bit in (46..=51).chain([63]) {
            assert_eq!(format.decode(1, 1 << bit | 0xa_bcde_1067), Entry::Malformed, "page, bit {bit}");
            assert_eq!(format.decode(2, 1 << bit | 0x1_2340_00e7), Entry::Malformed, "2M, bit {bit}");
            assert_eq!(format.decode(2, 1 << bit | 0x1_0000_8027), Entry::Malformed, "table, bit {bit}");
        }
        for bit in 13..=20 {
            assert_eq!(format.decode(2, 1 << bit | 0x1_2340_00e7), Entry::Malformed, "2M, bit {bit}");
        }
        for bit in 13..=29 {
            assert_eq!(format.decode(3, 1 << bit | 0x1_c000_00e7), Entry::Malformed, "1G, bit {bit}");
        }
        assert_eq!(format.decode(4, 0x1_0000_80a7), Entry::Malformed, "no leaves at level 4");
        assert_eq!(format.decode(5, 0x1_0000_80a7), Entry::Malformed, "no leaves at level 5");
        let small = format.with_large_pages(PageSize::SIZE_2M.bytes());
        assert_eq!(small.decode(3, 0x1_c000_00e7), Entry::Malformed, "1 GiB pages not offered");
        assert!(matches!(small.decode(2, 0x1_2340_00e7), Entry::Leaf { .. }));
    }

    #[test]
    fn ignored_bits_are_ignored() {
        let format = four_levels();
        // G, EA and software's.
        for bit in [8, 9, 10, 11].into_iter().chain(52..=62) {
            assert_eq!(format.decode(1, 1 << bit | 0xa_bcde_1067), format.decode(1, 0xa_bcde_1067));
            assert_eq!(format.decode(2, 1 << bit | 0x1_0000_8027), Entry::Table(0x1_0000_8000));
            let software = format.software_bits(1) & (1 << bit) != 0;
            assert_eq!(software, !matches!(bit, 8 | 10), "bit {bit}");
        }
    }

    #[test]
    fn widths_and_the_gap() {
        for (levels, bits) in [(4, 48), (5, 57)] {
            let format = X86_64::new(levels).unwrap();
            let sign = 1 << (bits - 1);
            for (first, last, accepted) in [
                (0, sign - 1, true),
                (0, sign, false),
                (sign, sign, false),
                (!sign, !sign, false),
                (!sign + 1, !0, true),
                (!sign, !0, false),
                (0, !0, false),
            ] {
                let range = IovaRange::new(first, last).unwrap();
                assert_eq!(format.accepts(&range), accepted, "{range}");
            }
            let flat = format.with_sign_extension(false);
            assert!(flat.accepts(&IovaRange::new(0, (1 << bits) - 1).unwrap()));
            assert!(!flat.accepts(&IovaRange::new(0, 1 << bits).unwrap()));
            assert!(!flat.accepts(&IovaRange::new(!0, !0).unwrap()));
        }
        assert!(X86_64::new(3).is_none() && X86_64::new(6).is_none());
        // VT-d section 3.6: the last 2 GiB begin at index 511 of level 4 and 510 of level 3.
        let format = four_levels();
        let index = |level: u8| 0xffff_ffff_8000_0000u64 >> format.shift(level) & 511;
        assert_eq!((index(4), index(3)), (511, 510));
    }
}
