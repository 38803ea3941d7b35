//! RISC-V first-stage tables: Sv39, Sv48 and Sv57, with Svnapot and Svpbmt.
//!
//! RISC-V Privileged Architecture: Sv39, Sv48 and Sv57, Svnapot, Svpbmt. RISC-V IOMMU: walk 2.3, accessed and dirty
//! bits 2.4, changes of page size 6.3.6, invalid entries 6.3.8.
//!
//! | bits  | name | leaf                                   | table          |
//! |-------|------|----------------------------------------|----------------|
//! | 0     | V    | 1                                      | 1              |
//! | 1     | R    | may be read                            | 0              |
//! | 2     | W    | may be written; only with R            | 0              |
//! | 3     | X    | may be executed                        | 0              |
//! | 4     | U    | for user requests                      | reserved       |
//! | 5     | G    | global                                 | global         |
//! | 6     | A    | accessed                               | reserved       |
//! | 7     | D    | dirty                                  | reserved       |
//! | 9:8   | RSW  | software                               | software       |
//! | 53:10 | PPN  | bits 55:12 of the page's address       | of the table's |
//! | 60:54 |      | reserved                               | reserved       |
//! | 62:61 | PBMT | memory type with Svpbmt, else reserved | reserved       |
//! | 63    | N    | one of 16 equal entries (Svnapot)      | reserved       |
//!
//! A leaf may stand at any level, the top included: 4 KiB, 2 MiB, 1 GiB, 512 GiB and 256 TiB from level 1 on. Its low
//! address bits are 0. At level 1 a leaf with N is one of 64 KiB, in all of its 16 entries, and says so with 1000 in
//! the lowest four bits of PPN; any other value, and N at any other level, is reserved.
//!
//! - *Permissions.* R, W and X are the leaf's alone; a present entry with none of them is a table. W without R is
//!   reserved, so writing implies reading. Devices make user requests, for which a leaf without U is closed. A leaf
//!   without any permission cannot be said directly; it is written as one that only a supervisor could execute.
//! - *Accessed and dirty.* Hardware sets the two bits if it is told to (SADE in the translation context), and
//!   otherwise faults where they are 0. Leaves begin with A and, if they may be written, with D, whatever the
//!   attributes say, so that neither happens. To track dirty pages, clear D first. In a leaf of 64 KiB hardware may
//!   set either bit in any one of the entries.
//! - *Memory type.* PBMT says 0 for whatever the platform has at the address, 1 for not cached and weakly ordered
//!   ([`MemoryType::WriteCombining`]), 2 for devices ([`MemoryType::Uncached`]); 3 is reserved.
//! - *Ignored.* G is neither written nor looked at: it only spares entries from invalidations. Bits 60:59 can be
//!   software's (Svrsw60t59b); we have no use for more, and take them for reserved.
//!
//! What may change live is the size of a page, with the same translation, permissions and memory type: until the
//! invalidation hardware uses the old or the new. Any other change of a valid entry is the implementation's to
//! define, so permissions are not among them, and neither are leaves of 64 KiB, whose entries cannot be replaced all
//! at once.
//!
//! The second stage (Sv39x4 and so on) has the same entries under a root of four pages, 2048 entries aligned to
//! 16 KiB, and addresses that are not sign-extended; it would be an option here that changes
//! [`index_bits`](Format::index_bits) and [`table_layout`](Format::table_layout) at the top level.

use super::{Attributes, Entry, Format, LiveChanges, MemoryType, Pattern};
use crate::address::PageSize;
use crate::foreign::FirstStageFormat;
use core::ops::RangeInclusive;

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const SOFTWARE: u64 = 3 << 8;
/// Bits 55 to 12 of an address are bits 53 to 10 of an entry.
const ADDRESS_SHIFT: u32 = 2;
const ADDRESS: u64 = 0x003f_ffff_ffff_fc00;
const RESERVED: u64 = 0x7f << 54;
const MEMORY_TYPE_SHIFT: u32 = 61;
const MEMORY_TYPE: u64 = 3 << MEMORY_TYPE_SHIFT;
const NAPOT: u64 = 1 << 63;
/// The lowest four bits of the page number, and what they are in a leaf of 16 pages.
const NAPOT_CODE: u64 = 0xf << 10;
const NAPOT_64K: u64 = 0x8 << 10;
const SIZE_64K: PageSize = PageSize(16);

/// RISC-V first stage as one IOMMU offers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RiscV {
    levels: u8,
    napot: bool,
    memory_types: bool,
    marks: bool,
}

impl RiscV {
    /// A table of 3, 4 or 5 levels (Sv39, Sv48, Sv57; the highest bit of IOVA is repeated above); `None` for
    /// another number. Leaves of 64 KiB, which every IOMMU has, no memory types, and no updates of accessed and
    /// dirty bits.
    pub const fn new(levels: u8) -> Option<RiscV> {
        if levels < 3 || levels > 5 {
            return None;
        }
        Some(RiscV { levels, napot: true, memory_types: false, marks: false })
    }

    /// Whether there are leaves of 64 KiB (Svnapot). Without them bit 63 is reserved.
    pub const fn with_napot(self, napot: bool) -> RiscV {
        RiscV { napot, ..self }
    }

    /// Whether leaves say the memory type (capabilities.Svpbmt). Without it its bits are reserved and no leaf has
    /// one.
    pub const fn with_memory_types(self, memory_types: bool) -> RiscV {
        RiscV { memory_types, ..self }
    }

    /// Whether hardware sets accessed and dirty bits (capabilities.AMO_HWAD, and SADE in the translation context).
    /// Otherwise it faults where they are 0.
    pub const fn with_accessed_dirty(self, marks: bool) -> RiscV {
        RiscV { marks, ..self }
    }

    /// The bits of PPN that are 0 in a leaf of one entry at `level`.
    #[inline(always)]
    fn misaligned(&self, level: u8) -> u64 {
        ((1 << self.shift(level)) - 1) >> ADDRESS_SHIFT & ADDRESS
    }
}

impl Format for RiscV {
    const NAME: &'static str = "riscv64";
    const TENTATIVE: u64 = 1 << 8;

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
            1 if self.napot => PageSize::SIZE_4K.bytes() | SIZE_64K.bytes(),
            _ if level <= self.levels => 1 << self.shift(level),
            _ => 0,
        }
    }

    #[inline(always)]
    fn sign_extended(&self) -> bool {
        true
    }

    #[inline(always)]
    fn output_bits(&self) -> u32 {
        56
    }

    fn has_memory_type(&self, memory_type: MemoryType) -> bool {
        match memory_type {
            MemoryType::Inherit => true,
            MemoryType::Uncached | MemoryType::WriteCombining => self.memory_types,
            _ => false,
        }
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::SIZE
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
    fn table_pattern(&self, _level: u8) -> Pattern {
        let leaf = READ | WRITE | EXECUTE;
        let reserved = USER | ACCESSED | DIRTY | RESERVED | MEMORY_TYPE | NAPOT;
        Pattern::new(VALID, leaf | reserved | Self::TENTATIVE)
    }

    #[inline(always)]
    fn leaf_pattern(&self, level: u8) -> Pattern {
        if level > self.levels {
            return Pattern::NEVER;
        }
        // With memory types one of four is reserved, which no mask can say: what has one is decoded.
        Pattern::new(VALID | READ, RESERVED | MEMORY_TYPE | NAPOT | self.misaligned(level))
    }

    #[inline(always)]
    fn table_address(&self, entry: u64) -> u64 {
        (entry & ADDRESS) << ADDRESS_SHIFT
    }

    #[inline(always)]
    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & VALID == 0 {
            return Entry::Absent;
        }
        if entry & (READ | WRITE | EXECUTE) == 0 {
            let reserved = USER | ACCESSED | DIRTY | RESERVED | MEMORY_TYPE | NAPOT;
            return if level == 1 || entry & reserved != 0 {
                Entry::Malformed
            } else {
                Entry::Table(self.table_address(entry))
            };
        }
        let memory_type = match (entry & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT {
            0 => MemoryType::Inherit,
            1 if self.memory_types => MemoryType::WriteCombining,
            2 if self.memory_types => MemoryType::Uncached,
            _ => return Entry::Malformed,
        };
        let (address, size) = if entry & NAPOT == 0 {
            (entry & ADDRESS, PageSize(self.shift(level) as u8))
        } else if level == 1 && self.napot && entry & NAPOT_CODE == NAPOT_64K {
            (entry & ADDRESS & !NAPOT_CODE, SIZE_64K)
        } else {
            return Entry::Malformed;
        };
        let reserved = RESERVED | self.misaligned(level);
        if entry & reserved != 0 || entry & (READ | WRITE) == WRITE || level > self.levels {
            return Entry::Malformed;
        }
        let mut attributes = Attributes::empty();
        let user = entry & USER != 0;
        attributes.set(Attributes::READ, user && entry & READ != 0);
        attributes.set(Attributes::WRITE, user && entry & WRITE != 0);
        attributes.set(Attributes::EXECUTE, user && entry & EXECUTE != 0);
        attributes.set(Attributes::ACCESSED, entry & ACCESSED != 0);
        attributes.set(Attributes::DIRTY, entry & DIRTY != 0);
        let attributes = attributes.with_memory_type(memory_type);
        Entry::Leaf { oa: address << ADDRESS_SHIFT, size, attributes }
    }

    #[inline(always)]
    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        address >> ADDRESS_SHIFT | VALID
    }

    #[inline(always)]
    fn leaf_entry(&self, level: u8, size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let mut entry = oa >> ADDRESS_SHIFT | VALID | ACCESSED;
        for (attribute, bits) in [
            (Attributes::READ, USER | READ),
            (Attributes::WRITE, USER | READ | WRITE | DIRTY),
            (Attributes::EXECUTE, USER | EXECUTE),
            (Attributes::DIRTY, DIRTY),
        ] {
            if attributes.contains(attribute) {
                entry |= bits;
            }
        }
        if !attributes.intersects(Attributes::PERMISSIONS) {
            // A leaf, not a table.
            entry |= EXECUTE;
        }
        if size.log2() > self.shift(level) {
            entry |= NAPOT | NAPOT_64K;
        }
        if self.memory_types {
            entry |= match attributes.memory_type() {
                MemoryType::WriteCombining => 1 << MEMORY_TYPE_SHIFT,
                MemoryType::Uncached => 2 << MEMORY_TYPE_SHIFT,
                _ => 0,
            };
        }
        entry
    }
}

impl FirstStageFormat for RiscV {
    fn lets_through(&self, _entry: u64) -> Attributes {
        // The leaf alone decides.
        Attributes::PERMISSIONS
    }

    fn accessed_bit(&self, leaf: bool) -> u64 {
        if leaf { ACCESSED } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::IovaRange;

    const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
    const ALL: Attributes = READ_WRITE.union(Attributes::EXECUTE);
    const PAGE: u64 = 0xa_bcde_1000;
    const SIZE_512G: PageSize = PageSize(39);
    const SIZE_256T: PageSize = PageSize(48);

    fn sv48() -> RiscV {
        RiscV::new(4).unwrap()
    }

    /// Worked out from the bit tables of Sv39 to Sv57, Svnapot and Svpbmt.
    #[test]
    fn golden_entries() {
        let format = RiscV::new(5).unwrap();
        assert_eq!(format.table_entry(4, 0x1_0000_3000), 0x4000_0c01);
        assert_eq!(format.decode(4, 0x4000_0c01), Entry::Table(0x1_0000_3000));
        let read_execute = Attributes::READ | Attributes::EXECUTE;
        let typed = format.clone().with_memory_types(true);
        let device = READ_WRITE.with_memory_type(MemoryType::Uncached);
        let weak = READ_WRITE.with_memory_type(MemoryType::WriteCombining);
        for (format, level, size, oa, attributes, entry) in [
            (&format, 1, PageSize::SIZE_4K, PAGE, ALL, 0x2_af37_84df),
            (&format, 1, PageSize::SIZE_4K, PAGE, READ_WRITE, 0x2_af37_84d7),
            (&format, 1, PageSize::SIZE_4K, PAGE, read_execute, 0x2_af37_845b),
            (&format, 1, PageSize::SIZE_4K, PAGE, Attributes::READ, 0x2_af37_8453),
            (&format, 1, SIZE_64K, 0xfff5_0000, ALL, 0x8000_0000_3ffd_60df),
            (&format, 2, PageSize::SIZE_2M, 0x1_2340_0000, ALL, 0x48d0_00df),
            (&format, 3, PageSize::SIZE_1G, 0x1_c000_0000, ALL, 0x7000_00df),
            (&format, 4, SIZE_512G, 0x80_0000_0000, READ_WRITE, 0x20_0000_00d7),
            (&format, 5, SIZE_256T, 0x1_0000_0000_0000, READ_WRITE, 0x4000_0000_00d7),
            (&typed, 1, PageSize::SIZE_4K, 0xfee0_0000, device, 0x4000_0000_3fb8_00d7),
            (&typed, 1, PageSize::SIZE_4K, 0xfee0_0000, weak, 0x2000_0000_3fb8_00d7),
        ] {
            assert_eq!(format.leaf_entry(level, size, oa, attributes), entry, "{size} at {oa:#x}");
            let used =
                if attributes.contains(Attributes::WRITE) { Attributes::USED } else { Attributes::ACCESSED };
            let expected = Entry::Leaf { oa, size, attributes: attributes | used };
            assert_eq!(format.decode(level, entry), expected, "{entry:#x}");
        }
    }

    #[test]
    fn sixteen_pages_or_one() {
        let format = sv48();
        assert_eq!(format.leaf_sizes(1), 1 << 12 | 1 << 16);
        for code in 0..16u64 {
            let entry = 0x8000_0000_3ffd_40df | code << 10;
            assert_eq!(format.decode(1, entry) == Entry::Malformed, code != 8, "PPN ends in {code:#x}");
        }
        assert_eq!(format.decode(2, 1 << 63 | 0x48d0_00df), Entry::Malformed, "N at level 2");
        let single = format.with_napot(false);
        assert_eq!(single.leaf_sizes(1), 1 << 12);
        assert_eq!(single.decode(1, 0x8000_0000_3ffd_60df), Entry::Malformed);
    }

    #[test]
    fn writing_implies_reading() {
        let format = sv48();
        let entry = format.leaf_entry(1, PageSize::SIZE_4K, PAGE, Attributes::WRITE);
        assert_eq!(entry, 0x2_af37_84d7);
        for bits in [0b0101, 0b1101] {
            assert_eq!(format.decode(1, 0x2_af37_84d0 | bits), Entry::Malformed, "W without R");
        }
    }

    #[test]
    fn user_requests_get_nothing_without_user() {
        let format = sv48();
        let closed = |entry| {
            assert_eq!(
                format.decode(1, entry),
                Entry::Leaf { oa: PAGE, size: PageSize::SIZE_4K, attributes: Attributes::ACCESSED }
            );
        };
        closed(0x2_af37_844f);
        // A leaf without permissions is not a table.
        closed(format.leaf_entry(1, PageSize::SIZE_4K, PAGE, Attributes::empty()));
        assert!(matches!(format.decode(1, 0x2_af37_84d9), Entry::Leaf { attributes, .. }
            if attributes == Attributes::EXECUTE | Attributes::USED));
    }

    #[test]
    fn reserved_bits_are_refused() {
        let format = sv48();
        // U, A, D, the reserved ones, PBMT and N.
        for bit in [4, 6, 7].into_iter().chain(54..=63) {
            assert_eq!(format.decode(2, 1 << bit | 0x4000_0c01), Entry::Malformed, "table, bit {bit}");
        }
        for bit in 54..=62 {
            assert_eq!(format.decode(1, 1 << bit | 0x2_af37_84df), Entry::Malformed, "leaf, bit {bit}");
        }
        for bit in 10..=18 {
            assert_eq!(format.decode(2, 1 << bit | 0x48d0_00df), Entry::Malformed, "2M, bit {bit}");
        }
        for bit in 10..=27 {
            assert_eq!(format.decode(3, 1 << bit | 0x7000_00df), Entry::Malformed, "1G, bit {bit}");
        }
        assert_eq!(format.decode(1, 0x4000_0c01), Entry::Malformed, "a table at level 1");
        let typed = format.with_memory_types(true);
        assert_eq!(typed.decode(1, 3 << 61 | 0x2_af37_84df), Entry::Malformed, "memory type 3");
        for bit in [61, 62] {
            assert_eq!(typed.decode(2, 1 << bit | 0x4000_0c01), Entry::Malformed, "table, bit {bit}");
        }
    }

    #[test]
    fn ignored_bits_are_ignored() {
        let format = sv48();
        for bit in [5, 8, 9] {
            assert_eq!(format.decode(1, 1 << bit | 0x2_af37_84df), format.decode(1, 0x2_af37_84df));
            assert_eq!(format.decode(2, 1 << bit | 0x4000_0c01), Entry::Table(0x1_0000_3000));
        }
        assert_eq!(format.software_bits(1), 0x300);
    }

    #[test]
    fn memory_types_are_an_option() {
        let plain = sv48();
        let device = READ_WRITE.with_memory_type(MemoryType::Uncached);
        assert!(!plain.has_memory_type(MemoryType::Uncached));
        assert_eq!(plain.leaf_entry(1, PageSize::SIZE_4K, PAGE, device), 0x2_af37_84d7);
        let typed = plain.with_memory_types(true);
        for (memory_type, there) in [
            (MemoryType::Inherit, true),
            (MemoryType::Uncached, true),
            (MemoryType::WriteCombining, true),
            (MemoryType::WriteThrough, false),
            (MemoryType::WriteProtected, false),
            (MemoryType::WriteBack, false),
        ] {
            assert_eq!(typed.has_memory_type(memory_type), there, "{memory_type:?}");
        }
    }

    #[test]
    fn widths_and_the_gap() {
        for (levels, bits) in [(3, 39), (4, 48), (5, 57)] {
            let format = RiscV::new(levels).unwrap();
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
        }
        assert!(RiscV::new(2).is_none() && RiscV::new(6).is_none());
    }
}
