//! Each format once more, as its specification has it: which leaves there are, and what the bits of an entry say.
//!
//! None of this asks the crate. A reader here is slow and trusts nothing: a bit that should be 0 and is not ends the
//! test, whether hardware would ignore it or refuse it.

use ioasid_pagetable::{Attributes, IovaRange, MemoryType};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    Absent,
    Table(u64),
    Leaf { oa: u64, log2: u32, attributes: Attributes },
}

/// One level of a format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Level {
    /// Logarithm of the bytes of an entry.
    pub(crate) entry: u32,
    /// Leaves: bit n for 2^n bytes.
    pub(crate) sizes: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Specification {
    /// The level of the smallest pages comes first.
    pub(crate) levels: Vec<Level>,
    pub(crate) tops: RangeInclusive<u8>,
    pub(crate) sign_extended: bool,
    pub(crate) output_bits: u32,
    /// A leaf of one entry can be replaced by a table and back while walkers run.
    pub(crate) live_sizes: bool,
    /// A leaf can get other permissions while walkers run.
    pub(crate) live_permissions: bool,
    /// A leaf of one entry can lead elsewhere while walkers run.
    pub(crate) live_outputs: bool,
    /// Hardware sets accessed and dirty bits in this table.
    pub(crate) hardware_marks: bool,
    /// What a leaf that is written with these attributes says, but for the memory type.
    pub(crate) says: fn(Attributes) -> Attributes,
    /// Besides [`MemoryType::Inherit`].
    pub(crate) memory_types: &'static [MemoryType],
    /// Reads an entry, given its level and the logarithm of its bytes.
    read: fn(u8, u32, u64) -> Reading,
}

fn word(table: u64, index: u64) -> u64 {
    let pointer: *const AtomicU64 = std::ptr::with_exposed_provenance((table + index * 8) as usize);
    // SAFETY: the tests read linked tables only, while nobody else works on them.
    unsafe { &*pointer }.load(Ordering::Acquire)
}

impl Specification {
    /// The same where hardware was told to set accessed and dirty bits.
    pub(crate) fn marked_by_hardware(self) -> Specification {
        Specification { hardware_marks: true, ..self }
    }

    /// The accessed and dirty bits that a leaf can have.
    pub(crate) fn marks(&self) -> Attributes {
        (self.says)(READ_WRITE | Attributes::USED) & Attributes::USED
    }

    pub(crate) fn level(&self, level: u8) -> Level {
        self.levels[usize::from(level) - 1]
    }

    pub(crate) fn granule(&self) -> u64 {
        1 << self.levels[0].entry
    }

    /// Logarithm of the addresses below a table with its top here.
    pub(crate) fn width(&self, level: u8) -> u32 {
        (self.level(level).entry + 9).min(64)
    }

    pub(crate) fn highest(&self) -> u8 {
        *self.tops.end()
    }

    /// The level that has leaves of this size.
    pub(crate) fn level_of(&self, log2: u32) -> u8 {
        let level = self.levels.iter().position(|level| level.sizes >> log2 & 1 != 0);
        level.expect("a leaf of a size that no level has") as u8 + 1
    }

    /// The level that the top must have for this address.
    pub(crate) fn top_for(&self, iova: u64) -> u8 {
        let covers = |&level: &u8| self.width(level) == 64 || iova >> self.width(level) == 0;
        self.tops.clone().find(covers).unwrap_or(self.highest())
    }

    /// Makes an address one that can be looked up, by its lower bits.
    pub(crate) fn canonical(&self, iova: u64) -> u64 {
        let beyond = 64 - self.width(self.highest());
        if self.sign_extended { ((iova << beyond) as i64 >> beyond) as u64 } else { iova << beyond >> beyond }
    }

    /// The last address that can be looked up and lies in one piece with this one.
    pub(crate) fn end_of_piece(&self, iova: u64) -> u64 {
        let width = self.width(self.highest());
        match (self.sign_extended, iova >> 63) {
            (true, 0) => (1 << (width - 1)) - 1,
            (true, _) => u64::MAX,
            (false, _) => u64::MAX >> (64 - width),
        }
    }

    pub(crate) fn accepts(&self, range: IovaRange) -> bool {
        let first = range.first();
        self.canonical(first) == first && range.last() <= self.end_of_piece(first)
    }

    pub(crate) fn read(&self, level: u8, value: u64) -> Reading {
        let reading = (self.read)(level, self.level(level).entry, value);
        if let Reading::Leaf { oa, log2, .. } = reading {
            assert!(
                self.level(level).sizes >> log2 & 1 != 0,
                "a leaf of 2^{log2} at level {level}: {value:#x}"
            );
            assert_eq!(oa & ((1 << log2) - 1), 0, "a misaligned leaf at level {level}: {value:#x}");
            assert_eq!(oa >> self.output_bits, 0, "an output address that is too wide: {value:#x}");
        }
        reading
    }

    /// Translates an address from the table's memory alone: output address and attributes.
    pub(crate) fn walk(&self, top: (u64, u8), iova: u64) -> Option<(u64, Attributes)> {
        let (mut table, mut level) = top;
        if self.sign_extended {
            if self.canonical(iova) != iova {
                return None;
            }
        } else if self.width(level) < 64 && iova >> self.width(level) != 0 {
            return None;
        }
        loop {
            let value = word(table, iova >> self.level(level).entry & 0x1ff);
            match self.read(level, value) {
                Reading::Absent => return None,
                Reading::Table(address) => (table, level) = (address, level - 1),
                Reading::Leaf { oa, log2, attributes } => {
                    return Some((oa | (iova & ((1 << log2) - 1)), attributes));
                }
            }
        }
    }
}

pub(crate) const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);

/// Levels of nine bits each above a granule, with these leaves besides those of the lowest.
fn nine_bits_each(granule: u32, levels: u8, large: u64) -> Vec<Level> {
    let level = |level: u8| {
        let entry = granule + 9 * (u32::from(level) - 1);
        Level { entry, sizes: (large | 1 << granule) & (1 << entry) }
    };
    (1..=levels).map(level).collect()
}

fn flags(value: u64, bits: &[(u32, Attributes)]) -> Attributes {
    bits.iter()
        .filter(|(bit, _)| value >> bit & 1 != 0)
        .fold(Attributes::empty(), |all, &(_, flag)| all | flag)
}

/// The native format: the table at the top of its module.
pub(crate) fn native(granule: u32, largest: u32) -> Specification {
    fn read(_level: u8, entry: u32, value: u64) -> Reading {
        assert_eq!(value >> 56 | value >> 7 & 0xf, 0, "bits that are 0: {value:#x}");
        let address = value & 0x00ff_ffff_ffff_f800;
        match (value & 1, value & 0x40) {
            (0, _) => Reading::Absent,
            (_, 0) => {
                let bits = [(3, Attributes::READ), (4, Attributes::WRITE), (5, Attributes::FORCE_SNOOP)];
                Reading::Leaf { oa: address, log2: entry, attributes: flags(value, &bits) }
            }
            _ => {
                assert_eq!(value & 0x7f, 0x41, "a link: {value:#x}");
                Reading::Table(address)
            }
        }
    }
    Specification {
        levels: nine_bits_each(granule, 6, (2u64 << largest) - 1),
        tops: 4..=6,
        sign_extended: false,
        output_bits: 56,
        live_sizes: true,
        live_permissions: true,
        live_outputs: true,
        hardware_marks: false,
        says: |attributes| attributes & (READ_WRITE | Attributes::FORCE_SNOOP),
        memory_types: &[],
        read,
    }
}

/// VT-d 3.7 and 9.8; `types`: leaves say the memory type.
pub(crate) fn vtd_second_stage(levels: u8, large: u64, types: bool) -> Specification {
    fn read(level: u8, entry: u32, value: u64) -> Reading {
        if value & 3 == 0 {
            assert_eq!(value, 0, "an absent entry");
            return Reading::Absent;
        }
        assert_eq!(value >> 52, 0, "ignored and reserved bits: {value:#x}");
        let address = value & 0x000f_ffff_ffff_f000;
        if level == 1 || value & 0x80 != 0 {
            assert_eq!(value & 0x478, 0, "ignored bits and the memory type: {value:#x}");
            assert!(level > 1 || value & 0x80 == 0, "an ignored bit: {value:#x}");
            let bits = [
                (0, Attributes::READ),
                (1, Attributes::WRITE),
                (8, Attributes::ACCESSED),
                (9, Attributes::DIRTY),
                (11, Attributes::FORCE_SNOOP),
            ];
            return Reading::Leaf { oa: address, log2: entry, attributes: flags(value, &bits) };
        }
        assert_eq!(value & 0xfff, 3, "a link: {value:#x}");
        Reading::Table(address)
    }
    /// Without the bit that ignores the guest's type ours is only what that is combined with.
    fn read_typed(level: u8, entry: u32, value: u64) -> Reading {
        let memory_type = match (value >> 6 & 1, value >> 3 & 7) {
            (0, 6) => MemoryType::Inherit,
            (1, 0) => MemoryType::Uncached,
            (1, 1) => MemoryType::WriteCombining,
            (1, 4) => MemoryType::WriteThrough,
            (1, 5) => MemoryType::WriteProtected,
            (1, 6) => MemoryType::WriteBack,
            _ => return read(level, entry, value),
        };
        match read(level, entry, value & !0x78) {
            Reading::Leaf { oa, log2, attributes } => {
                Reading::Leaf { oa, log2, attributes: attributes.with_memory_type(memory_type) }
            }
            reading => panic!("a memory type in {reading:?}: {value:#x}"),
        }
    }
    Specification {
        levels: nine_bits_each(12, levels, large),
        tops: levels..=levels,
        sign_extended: false,
        output_bits: 52,
        live_sizes: true,
        live_permissions: true,
        live_outputs: true,
        hardware_marks: false,
        says: |attributes| attributes & (READ_WRITE | Attributes::FORCE_SNOOP | Attributes::USED),
        memory_types: if types {
            &[MemoryType::Uncached, MemoryType::WriteCombining, MemoryType::WriteBack]
        } else {
            &[]
        },
        read: if types { read_typed } else { read },
    }
}

/// Leaves begin accessed and, if they can be written, dirty; what can be written can be read.
fn preset(attributes: Attributes) -> Attributes {
    let said = attributes & (Attributes::PERMISSIONS | Attributes::DIRTY) | Attributes::ACCESSED;
    if said.contains(Attributes::WRITE) { said | Attributes::READ | Attributes::DIRTY } else { said }
}

/// VT-d 3.6 and 9.7, SDM volume 3; the page attribute table of power-on. `execute`: bit 63 forbids it.
pub(crate) fn x86_64(levels: u8, sign_extended: bool, execute: bool) -> Specification {
    fn read(level: u8, entry: u32, value: u64) -> Reading {
        if value & 1 == 0 {
            assert_eq!(value, 0, "an absent entry");
            return Reading::Absent;
        }
        assert_eq!(value >> 52 & 0x7ff, 0, "software's and reserved bits: {value:#x}");
        assert_eq!(value & 0xf00, 0, "global, extended access and software's bits: {value:#x}");
        assert_eq!(value & 0x24, 0x24, "for user requests, and accessed: {value:#x}");
        if level > 1 && value & 0x80 == 0 {
            assert_eq!((value >> 63, value & 0xfff), (0, 0x27), "a link: {value:#x}");
            return Reading::Table(value & 0x000f_ffff_ffff_f000);
        }
        let pat = if level == 1 { 7 } else { 12 };
        let index = value >> 3 & 3 | (value >> pat & 1) << 2;
        let memory_type = match index {
            0 => MemoryType::Inherit,
            1 | 5 => MemoryType::WriteThrough,
            4 => MemoryType::WriteBack,
            _ => MemoryType::Uncached,
        };
        let pat_in_address = if level == 1 { 0 } else { 1 << 12 };
        Reading::Leaf {
            oa: value & 0x000f_ffff_ffff_f000 & !pat_in_address,
            log2: entry,
            attributes: (flags(value, &[(1, Attributes::WRITE), (6, Attributes::DIRTY)])
                | Attributes::READ
                | Attributes::ACCESSED)
                .with_memory_type(memory_type),
        }
    }
    fn read_plain(level: u8, entry: u32, value: u64) -> Reading {
        assert_eq!(value >> 63, 0, "reserved: {value:#x}");
        read(level, entry, value)
    }
    fn read_execute(level: u8, entry: u32, value: u64) -> Reading {
        match read(level, entry, value) {
            Reading::Leaf { oa, log2, attributes } if value >> 63 == 0 => {
                Reading::Leaf { oa, log2, attributes: attributes | Attributes::EXECUTE }
            }
            reading => reading,
        }
    }
    Specification {
        levels: nine_bits_each(12, levels, 1 << 21 | 1 << 30),
        tops: levels..=levels,
        sign_extended,
        output_bits: 52,
        live_sizes: true,
        live_permissions: true,
        live_outputs: true,
        hardware_marks: true,
        // What is present can be read.
        says: if execute {
            |attributes| preset(attributes) | Attributes::READ
        } else {
            |attributes| (preset(attributes) | Attributes::READ) - Attributes::EXECUTE
        },
        memory_types: &[MemoryType::WriteThrough, MemoryType::WriteBack, MemoryType::Uncached],
        read: if execute { read_execute } else { read_plain },
    }
}

/// AMD 2.2.3 with its tables 14 and 15; a granule of 2 KiB as the Linux self-test has it.
pub(crate) fn amd_v1(granule: u32, tops: RangeInclusive<u8>, sizes: u64) -> Specification {
    fn read(level: u8, entry: u32, value: u64) -> Reading {
        if value & 1 == 0 {
            assert_eq!(value, 0, "an absent entry");
            return Reading::Absent;
        }
        assert_eq!(value & 0x87f0_0000_0000_019e, 0, "ignored and reserved bits: {value:#x}");
        let granule = entry - 9 * (u32::from(level) - 1);
        let pages = value >> 12 & 0xff_ffff_ffff;
        let bits = [
            (5, Attributes::ACCESSED),
            (6, Attributes::DIRTY),
            (60, Attributes::FORCE_SNOOP),
            (61, Attributes::READ),
            (62, Attributes::WRITE),
        ];
        let attributes = flags(value, &bits);
        match value >> 9 & 7 {
            0 => Reading::Leaf { oa: pages << granule, log2: entry, attributes },
            7 => {
                let code = pages.trailing_ones() + 1;
                assert!(granule + code > entry, "a size that needs no code: {value:#x}");
                Reading::Leaf { oa: pages >> code << code << granule, log2: granule + code, attributes }
            }
            next => {
                assert_eq!(next, u64::from(level) - 1, "levels are not skipped: {value:#x}");
                assert_eq!(attributes, READ_WRITE, "a link: {value:#x}");
                Reading::Table(pages << granule)
            }
        }
    }
    let highest = if granule == 12 { 6 } else { 5 };
    let level = |level: u8| {
        let entry = granule + 9 * (u32::from(level) - 1);
        // From one entry to half a table, but never 512 GiB, nor more than 2 PiB.
        let own = (entry..entry + 9).filter(|&log2| log2 != 39 && log2 <= 51 && level < highest);
        Level { entry, sizes: own.fold(0, |all, log2| all | 1 << log2) & (sizes | 1 << granule) }
    };
    Specification {
        levels: (1..=highest).map(level).collect(),
        tops,
        sign_extended: false,
        output_bits: 40 + granule,
        live_sizes: false,
        live_permissions: true,
        live_outputs: true,
        hardware_marks: false,
        says: |attributes| attributes & (READ_WRITE | Attributes::FORCE_SNOOP | Attributes::USED),
        memory_types: &[],
        read,
    }
}

/// RISC-V Sv39, Sv48 and Sv57, with Svpbmt; `napot`: Svnapot.
pub(crate) fn risc_v(levels: u8, napot: bool) -> Specification {
    fn read(level: u8, entry: u32, value: u64) -> Reading {
        if value & 1 == 0 {
            assert_eq!(value, 0, "an absent entry");
            return Reading::Absent;
        }
        assert_eq!(value >> 54 & 0x7f, 0, "reserved: {value:#x}");
        assert_eq!(value & 0x320, 0, "global and software's bits: {value:#x}");
        let pages = value >> 10 & 0xfff_ffff_ffff;
        if value & 0xe == 0 {
            assert_eq!((value >> 54, value & 0x3ff), (0, 1), "a link: {value:#x}");
            return Reading::Table(pages << 12);
        }
        assert_ne!(value & 6, 4, "writing without reading: {value:#x}");
        assert_eq!(value & 0x50, 0x50, "for user requests, and accessed: {value:#x}");
        let memory_type = match value >> 61 & 3 {
            0 => MemoryType::Inherit,
            1 => MemoryType::WriteCombining,
            2 => MemoryType::Uncached,
            _ => panic!("a reserved memory type: {value:#x}"),
        };
        let bits = [
            (1, Attributes::READ),
            (2, Attributes::WRITE),
            (3, Attributes::EXECUTE),
            (6, Attributes::ACCESSED),
            (7, Attributes::DIRTY),
        ];
        let attributes = flags(value, &bits).with_memory_type(memory_type);
        if value >> 63 == 0 {
            return Reading::Leaf { oa: pages << 12, log2: entry, attributes };
        }
        assert_eq!((level, pages & 0xf), (1, 8), "N: {value:#x}");
        Reading::Leaf { oa: (pages & !0xf) << 12, log2: 16, attributes }
    }
    let mut of_levels = nine_bits_each(12, levels, u64::MAX);
    of_levels[0].sizes |= u64::from(napot) << 16;
    Specification {
        levels: of_levels,
        tops: levels..=levels,
        sign_extended: true,
        output_bits: 56,
        live_sizes: true,
        live_permissions: false,
        live_outputs: false,
        hardware_marks: false,
        says: preset,
        memory_types: &[MemoryType::Uncached, MemoryType::WriteCombining],
        read,
    }
}
