//! Intel VT-d second-stage tables.
//!
//! Intel Virtualization Technology for Directed I/O: translation 3.7, entries 9.8, accessed and dirty flags 3.7.2.
//!
//! | bits     | table entry | leaf at level 3 (1G) and 2 (2M) | leaf at level 1 |
//! |----------|-------------|---------------------------------|-----------------|
//! | 0        | R           | R                               | R               |
//! | 1        | W           | W                               | W               |
//! | 5:3      | ignored     | EMT, memory type                | EMT             |
//! | 6        | ignored     | IPAT, ignore the guest's type   | IPAT            |
//! | 7        | 0           | 1 (page size)                   | ignored         |
//! | 8        | A           | A                               | A               |
//! | 9        | ignored     | D                               | D               |
//! | 11       | reserved    | SNP, force snoop                | SNP             |
//! | HAW-1:12 | next table  | page (low bits reserved)        | page            |
//! | 51:HAW   | reserved    | reserved                        | reserved        |
//! | 62       | reserved    | reserved                        | reserved        |
//!
//! There is no present bit: an entry is present if R or W is set, and every other bit is free when neither is.
//! Table entries always get R and W, so that the leaf alone decides.
//!
//! Hardware sets A and D only where the PASID entry says so (SSADE); a mapping begins with both clear. It looks at
//! EMT and IPAT only where the PASID entry says so (EMTE); see
//! [`with_memory_types`](VtdSecondStage::with_memory_types).
//!
//! The specification's text on cutting a leaf in place was not at hand; the translation is the same before and
//! after, so either answer of a cache is right until the invalidation, and we take the format as one in which
//! [sizes change live](LiveChanges::SIZE).

use super::{Attributes, Entry, Format, LiveChanges, MemoryType, Pattern};
use crate::address::PageSize;
use core::ops::RangeInclusive;

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const MEMORY_TYPE: u64 = 7 << 3;
const IGNORE_PAT: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const SNOOP: u64 = 1 << 11;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const RESERVED: u64 = 1 << 62;
/// Bits 10, 52 to 61 and 63 are ignored in leaves.
const SOFTWARE: u64 = 1 << 10 | 0x3ff << 52 | 1 << 63;

// The attributes stand in the order of the format's own bits.
const _: () = {
    assert!(Attributes::READ.bits() as u64 == READ && Attributes::WRITE.bits() as u64 == WRITE);
    assert!((Attributes::ACCESSED.bits() as u64) << 5 == ACCESSED);
    assert!((Attributes::DIRTY.bits() as u64) << 5 == DIRTY);
    assert!((Attributes::FORCE_SNOOP.bits() as u64) << 9 == SNOOP);
};

/// VT-d second stage as one IOMMU unit offers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VtdSecondStage {
    levels: u8,
    host_address_width: u32,
    /// The address bits below the host address width; kept because every entry on the way is held against it.
    address_mask: u64,
    large_pages: u64,
    snoop_control: bool,
    memory_types: bool,
    marks: bool,
}

impl VtdSecondStage {
    /// A table of `levels` levels (3, 4 or 5: 39, 48 or 57 bits of IOVA); `None` for another number. Host
    /// addresses of 52 bits, 2 MiB and 1 GiB pages, snoop control.
    pub const fn new(levels: u8) -> Option<VtdSecondStage> {
        if levels < 3 || levels > 5 {
            return None;
        }
        Some(VtdSecondStage {
            levels,
            host_address_width: 52,
            address_mask: ADDRESS,
            large_pages: PageSize::SIZE_2M.bytes() | PageSize::SIZE_1G.bytes(),
            snoop_control: true,
            memory_types: false,
            marks: false,
        })
    }

    /// The large pages that the unit reports (CAP.SSLPS): bit 21 for 2 MiB, bit 30 for 1 GiB.
    pub const fn with_large_pages(self, sizes: u64) -> VtdSecondStage {
        let both = PageSize::SIZE_2M.bytes() | PageSize::SIZE_1G.bytes();
        VtdSecondStage { large_pages: sizes & both, ..self }
    }

    /// The width of host addresses, 32 to 52 bits; outside, `None`.
    pub const fn with_host_address_width(self, bits: u32) -> Option<VtdSecondStage> {
        if bits < 32 || bits > 52 {
            return None;
        }
        Some(VtdSecondStage { host_address_width: bits, address_mask: ADDRESS & ((1 << bits) - 1), ..self })
    }

    /// Whether the unit has snoop control (ECAP.SC). Without it the bit is reserved and never written.
    pub const fn with_snoop_control(self, snoop_control: bool) -> VtdSecondStage {
        VtdSecondStage { snoop_control, ..self }
    }

    /// Whether leaves say the memory type (ECAP.MTS, and EMTE in the PASID entry). Without it no leaf has one.
    pub const fn with_memory_types(self, memory_types: bool) -> VtdSecondStage {
        VtdSecondStage { memory_types, ..self }
    }

    /// Whether hardware sets accessed and dirty flags (ECAP.SSADS, and SSADE in the PASID entry).
    pub const fn with_accessed_dirty(self, marks: bool) -> VtdSecondStage {
        VtdSecondStage { marks, ..self }
    }
}

impl Format for VtdSecondStage {
    const NAME: &'static str = "vtdss";
    const TENTATIVE: u64 = 1 << 52;

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
    fn output_bits(&self) -> u32 {
        self.host_address_width
    }

    fn has_memory_type(&self, memory_type: MemoryType) -> bool {
        memory_type == MemoryType::Inherit || self.memory_types
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::all()
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
        let reserved = SNOOP | RESERVED | (ADDRESS & !self.address_mask);
        Pattern::new(READ | WRITE, PAGE_SIZE | reserved | Self::TENTATIVE)
    }

    #[inline(always)]
    fn leaf_pattern(&self, level: u8) -> Pattern {
        let reserved = RESERVED | (ADDRESS & !self.address_mask);
        match level {
            1 => Pattern::new(READ, reserved | if self.snoop_control { 0 } else { SNOOP }),
            2 | 3 if self.leaf_sizes(level) != 0 => {
                let low = ((1 << self.shift(level)) - 1) & ADDRESS;
                Pattern::new(READ | PAGE_SIZE, reserved | low | if self.snoop_control { 0 } else { SNOOP })
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
        if entry & (READ | WRITE) == 0 {
            return Entry::Absent;
        }
        let leaf = level == 1 || entry & PAGE_SIZE != 0;
        let mut reserved = RESERVED | (ADDRESS & !self.address_mask);
        if !leaf {
            // Bit 11 is reserved in tables, and in leaves where there is no snoop control.
            return if entry & (reserved | SNOOP) != 0 {
                Entry::Malformed
            } else {
                Entry::Table(entry & self.address_mask)
            };
        }
        let shift = self.shift(level);
        if !self.snoop_control {
            reserved |= SNOOP;
        }
        if level > 1 {
            reserved |= ((1 << shift) - 1) & ADDRESS;
        }
        if entry & reserved != 0 || (level > 1 && self.leaf_sizes(level) == 0) {
            return Entry::Malformed;
        }
        let mut attributes = Attributes::empty();
        attributes.set(Attributes::READ, entry & READ != 0);
        attributes.set(Attributes::WRITE, entry & WRITE != 0);
        attributes.set(Attributes::FORCE_SNOOP, entry & SNOOP != 0);
        attributes.set(Attributes::ACCESSED, entry & ACCESSED != 0);
        attributes.set(Attributes::DIRTY, entry & DIRTY != 0);
        if self.memory_types && entry & IGNORE_PAT != 0 {
            // Codes 2, 3 and 7 are reserved; hardware takes them for uncached.
            attributes = attributes.with_memory_type(match (entry & MEMORY_TYPE) >> 3 {
                1 => MemoryType::WriteCombining,
                4 => MemoryType::WriteThrough,
                5 => MemoryType::WriteProtected,
                6 => MemoryType::WriteBack,
                _ => MemoryType::Uncached,
            });
        }
        Entry::Leaf { oa: entry & self.address_mask, size: PageSize(shift as u8), attributes }
    }

    #[inline(always)]
    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        address | READ | WRITE
    }

    #[inline(always)]
    fn leaf_entry(&self, level: u8, _size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let mut entry = oa;
        if level > 1 {
            entry |= PAGE_SIZE;
        }
        // Moving bits is cheaper than asking for each.
        let bits = u64::from(attributes.bits());
        entry |= bits & (READ | WRITE);
        entry |= (bits & u64::from(Attributes::USED.bits())) << 5;
        if self.snoop_control {
            entry |= (bits & u64::from(Attributes::FORCE_SNOOP.bits())) << 9;
        }
        if self.memory_types {
            entry |= match attributes.memory_type() {
                // Cached unless a guest's own type says otherwise.
                MemoryType::Inherit => 6 << 3,
                MemoryType::Uncached => IGNORE_PAT,
                MemoryType::WriteCombining => IGNORE_PAT | 1 << 3,
                MemoryType::WriteThrough => IGNORE_PAT | 4 << 3,
                MemoryType::WriteProtected => IGNORE_PAT | 5 << 3,
                MemoryType::WriteBack => IGNORE_PAT | 6 << 3,
            };
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::IovaRange;

    const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);

    /// Worked out from the bit table of section 9.8.
    #[test]
    fn golden_entries() {
        let format = VtdSecondStage::new(4).unwrap();
        let page = 0xa_bcde_1000;
        assert_eq!(format.table_entry(4, 0x1_0000_1000), 0x1_0000_1003);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, page, READ_WRITE), 0xa_bcde_1003);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, page, Attributes::READ), 0xa_bcde_1001);
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, page, Attributes::WRITE), 0xa_bcde_1002);
        let snoop = READ_WRITE | Attributes::FORCE_SNOOP;
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, page, snoop), 0xa_bcde_1803);
        assert_eq!(
            format.leaf_entry(1, PageSize::SIZE_4K, page, READ_WRITE | Attributes::DIRTY),
            0xa_bcde_1203
        );
        let used = READ_WRITE | Attributes::ACCESSED | Attributes::DIRTY;
        assert_eq!(format.leaf_entry(1, PageSize::SIZE_4K, page, used), 0xa_bcde_1303);
        assert_eq!(format.leaf_entry(2, PageSize::SIZE_2M, 0x1_2340_0000, READ_WRITE), 0x1_2340_0083);
        assert_eq!(format.leaf_entry(2, PageSize::SIZE_2M, 0x1_2340_0000, Attributes::READ), 0x1_2340_0081);
        assert_eq!(format.leaf_entry(2, PageSize::SIZE_2M, 0x1_2340_0000, snoop), 0x1_2340_0883);
        assert_eq!(format.leaf_entry(3, PageSize::SIZE_1G, 0x1_c000_0000, READ_WRITE), 0x1_c000_0083);
        let typed = format.with_memory_types(true);
        let write_back = snoop.with_memory_type(MemoryType::WriteBack);
        assert_eq!(typed.leaf_entry(2, PageSize::SIZE_2M, 0x1_2340_0000, write_back), 0x1_2340_08f3);
    }

    #[test]
    fn present_means_read_or_write() {
        let format = VtdSecondStage::new(4).unwrap();
        assert_eq!(format.decode(1, 0x000f_ffff_ffff_fffc), Entry::Absent);
        assert_eq!(
            format.decode(1, 0xa_bcde_1002),
            Entry::Leaf { oa: 0xa_bcde_1000, size: PageSize::SIZE_4K, attributes: Attributes::WRITE }
        );
    }

    #[test]
    fn reserved_bits_are_refused() {
        let format = VtdSecondStage::new(4).unwrap();
        assert_eq!(format.decode(4, 0x1_0000_1803), Entry::Malformed, "snoop bit in a table");
        assert_eq!(format.decode(4, 0x1_0000_0083), Entry::Malformed, "no leaves at level 4");
        assert_eq!(format.decode(2, 0x1_2340_1083), Entry::Malformed, "misaligned 2M leaf");
        assert_eq!(format.decode(1, 1 << 62 | 0x1003), Entry::Malformed, "bit 62");
        let narrow = format.clone().with_host_address_width(39).unwrap();
        assert_eq!(narrow.decode(1, (1 << 39) | 3), Entry::Malformed, "beyond the host address width");
        let plain = format.with_snoop_control(false);
        assert_eq!(plain.decode(1, 0xa_bcde_1803), Entry::Malformed, "snoop bit without snoop control");
    }

    #[test]
    fn widths() {
        for (levels, bits) in [(3, 39), (4, 48), (5, 57)] {
            let format = VtdSecondStage::new(levels).unwrap();
            assert!(format.accepts(&IovaRange::new(0, (1 << bits) - 1).unwrap()));
            assert!(!format.accepts(&IovaRange::new(0, 1 << bits).unwrap()));
        }
        assert!(VtdSecondStage::new(2).is_none() && VtdSecondStage::new(6).is_none());
    }
}
