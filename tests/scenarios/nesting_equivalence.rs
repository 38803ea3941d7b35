//! Nesting equivalence: a shadow is a walk of two stages that somebody remembers.
//!
//! Who asks: whoever runs a guest with an IOMMU of its own. Its table lies in its memory and leads to its physical addresses.
//! Hardware that nests walks it and ours; where there is none, the VMM keeps a shadow of both. On the list: software nesting has to
//! give the same results, and a guest that forgets to invalidate must not see more than it was given.
//!
//! - VFIO type1: the VMM walks the guest's table at each invalidation and maps what it finds, so an unmap of guest memory has to be
//!   followed by hand in every shadow. Nothing keeps them in step.
//! - iommufd: `IOMMU_HWPT_ALLOC` with a parent, where the hardware nests; otherwise as with type1, with a space for each shadow.
//! - Here a shadow is one of the tables of the space below it. It remembers what a device has asked for, and the space's
//!   operations take from it what they change, in the same step as from any other table.

use crate::machine::{Function, G1, K4, M2, Machine, RW, beside, number_at, number_pages, range};
use ioasid::{Account, FirstStage, Iova, IovaRange, Memory, Permissions, Space, Table};
use ioasid_soft::dma::DmaFaultReason;
use ioasid_soft::iommu::TableKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The guest's memory, which begins at its address 0. Data lies in the lower part, tables in the upper.
const RAM: u64 = 64 * M2;
const TABLES: u64 = 60 * M2;
/// The guest's table has its root there.
const ROOT: u64 = TABLES;
/// Addresses of the device that the guest uses, from here on and from another GiB on.
const AREAS: [u64; 2] = [0x40_0000_0000, 0x7fff_c000_0000];
/// So few blocks of 2 MiB, and so few pages of each, are used on either side that all meet each other again and again.
const BLOCKS: u64 = 3;
const PAGES: u64 = 16;
const STEPS: u32 = 1500;

/// Where a page of the device's leads: an offset of the guest's memory object.
type Walked = Result<u64, DmaFaultReason>;

/// Numbers at random, the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// How entries of a guest's table look, by the specification.
#[derive(Clone, Copy)]
struct Bits {
    first_stage: FirstStage,
    /// An entry that leads to a table, and one of a page that may be read, without the address.
    table: u64,
    page: u64,
    /// What a page larger than 4 KiB has besides, and one that may be written.
    large: u64,
    write: u64,
    accessed: u64,
    dirty: u64,
    /// Whether entries that lead to tables are marked as accessed.
    marks_tables: bool,
    /// How far an address is shifted to the right in an entry.
    shift: u32,
}

/// Intel SDM volume 3, 4-level paging: P, R/W, U/S, A (bit 5), D (6), PS (7).
const X86: Bits = Bits {
    first_stage: FirstStage::X86_64,
    table: 0x7,
    page: 0x5,
    large: 0x80,
    write: 0x2,
    accessed: 0x20,
    dirty: 0x40,
    marks_tables: true,
    shift: 0,
};
/// RISC-V privileged architecture, Sv48: V, R, W, U (bit 4), A (6), D (7); the page number from bit 10 on.
const RISC_V: Bits = Bits {
    first_stage: FirstStage::Sv48,
    table: 0x1,
    page: 0x13,
    large: 0,
    write: 0x4,
    accessed: 0x40,
    dirty: 0x80,
    marks_tables: false,
    shift: 2,
};

/// A guest: memory, the space of its physical addresses, and a table that it writes as its processor would.
struct Guest {
    bits: Bits,
    ram: Arc<Memory>,
    /// The output address of the memory's first byte.
    base: u64,
    physical: Arc<Space>,
    /// The next page for a table.
    next: u64,
}

impl Guest {
    fn new(machine: &Machine, bits: Bits) -> Guest {
        let ram = machine.memory(RAM, &Account::new("guest", None));
        number_pages(&ram, 0..TABLES / K4, |page| page);
        let physical = Space::new(&machine.bus);
        physical.map(Iova::new(0), &ram, 0, RAM, RW).unwrap();
        let base = physical.walk(Iova::new(0)).unwrap().oa.get();
        Guest { bits, ram, base, physical, next: ROOT + K4 }
    }

    fn entry(&self, address: u64) -> u64 {
        number_at(&self.ram, address)
    }

    fn set(&self, address: u64, entry: u64) {
        self.ram.backing().write(self.ram.offset() + address, &entry.to_le_bytes()).unwrap();
    }

    /// The place of the entry of `level` (1: pages of 4 KiB) for an address, and the highest level at which an entry on the
    /// way had to be written: tables are made where there are none.
    fn place(&mut self, iova: u64, level: u32) -> (u64, u32) {
        let (mut table, mut at, mut written) = (ROOT, 4, level);
        loop {
            let place = table + (iova >> (12 + 9 * (at - 1)) & 511) * 8;
            if at == level {
                return (place, written);
            }
            let entry = self.entry(place);
            // A larger page leads to data.
            if entry & 1 == 0 || self.address(entry) < TABLES {
                self.set(place, self.next >> self.bits.shift | self.bits.table);
                self.next += K4;
                assert!(self.next < RAM, "room for tables");
                written = written.max(at);
            }
            table = self.address(self.entry(place));
            at -= 1;
        }
    }

    fn address(&self, entry: u64) -> u64 {
        if self.bits.shift == 0 { entry & 0xf_ffff_ffff_f000 } else { (entry & !0x3ff) << self.bits.shift }
    }

    /// Maps a page of 4 KiB or 2 MiB to one of its physical addresses, or (`None`) maps nothing there any more. Where it has changed
    /// anything by that.
    fn write_page(&mut self, iova: u64, level: u32, to: Option<(u64, bool)>) -> IovaRange {
        let (place, written) = self.place(iova, level);
        let large = if level > 1 { self.bits.large } else { 0 };
        let write = |writable| if writable { self.bits.write } else { 0 };
        let entry =
            to.map_or(0, |(to, writable)| to >> self.bits.shift | self.bits.page | large | write(writable));
        self.set(place, entry);
        let size = K4 << (9 * (written - 1));
        range(iova & !(size - 1), size)
    }

    /// The second stage: where a physical address of the guest's leads, and whether it may be written.
    fn second(&self, address: u64, write: bool) -> Walked {
        let leaf = self.physical.walk(Iova::new(address));
        let wanted = if write { Permissions::WRITE } else { Permissions::READ };
        let leaf = leaf.filter(|leaf| leaf.attributes.contains(wanted.attributes()));
        leaf.map(|leaf| leaf.output(address).get() - self.base).ok_or(DmaFaultReason::SecondStage { address })
    }

    /// Both stages, walked by hand.
    fn two_stages(&self, iova: u64, write: bool) -> Walked {
        let Bits { accessed, dirty, .. } = self.bits;
        let mut marks = Vec::new();
        let mut table = ROOT;
        for level in (1..=4).rev() {
            let place = table + (iova >> (12 + 9 * (level - 1)) & 511) * 8;
            let entry = number_at(&self.ram, self.second(place, false)?);
            if entry & 1 == 0 {
                return Err(DmaFaultReason::NotMapped);
            }
            let is_table = match self.bits.shift {
                0 => level > 1 && entry & self.bits.large == 0,
                _ => entry & 0xe == 0,
            };
            if is_table {
                if self.bits.marks_tables && entry & accessed == 0 {
                    marks.push(place);
                }
                table = self.address(entry);
                continue;
            }
            if write && entry & self.bits.write == 0 {
                return Err(DmaFaultReason::NoPermission);
            }
            let used = if write { accessed | dirty } else { accessed };
            if entry & used != used {
                marks.push(place);
            }
            // Hardware writes its marks as a device writes.
            for place in marks {
                self.second(place, true)?;
            }
            let within = (K4 << (9 * (level - 1))) - 1;
            return self.second(self.address(entry) & !within | iova & within, write);
        }
        unreachable!("entries of level 1 are pages")
    }

    /// Something in the space changes: memory leaves and comes back, elsewhere perhaps, or is not to be written.
    fn change_second_stage(&self, random: &mut Random) {
        let length = if random.below(2) == 0 { K4 } else { M2 };
        let at = some_address(random) & !(length - 1);
        let from = some_address(random) & !(length - 1);
        match random.below(6) {
            0 => drop(self.physical.unmap(range(at, length)).unwrap()),
            1 => drop(self.physical.unmap_deferred(range(at, length)).unwrap()),
            // In one step, if all of it is mapped.
            2 => drop(self.physical.remap(Iova::new(at), &self.ram, from, length, RW)),
            3 => {
                self.physical.unmap(range(at, length)).unwrap();
                self.physical.map(Iova::new(at), &self.ram, from, length, RW).unwrap();
            }
            4 => {
                let permissions = if random.below(2) == 0 { Permissions::READ } else { RW };
                self.physical.protect(range(at, length), permissions).unwrap();
            }
            _ => {
                // A page of tables: away and back, or read-only for a time.
                let page = ROOT + random.below((self.next - ROOT) / K4) * K4;
                let here = range(page, K4);
                self.physical.unmap(here).unwrap();
                let permissions = match random.below(4) {
                    0 => return,
                    1 => Permissions::READ,
                    _ => RW,
                };
                self.physical.map(Iova::new(page), &self.ram, page, K4, permissions).unwrap();
            }
        }
    }

    /// Has all of its tables again.
    fn restore_tables(&self) {
        self.physical.unmap(range(TABLES, RAM - TABLES)).unwrap();
        self.physical.map(Iova::new(TABLES), &self.ram, TABLES, RAM - TABLES, RW).unwrap();
    }

    /// The guest's driver changes something. What it has to invalidate.
    fn change_first_stage(&mut self, random: &mut Random) -> IovaRange {
        let iova = any_page(random);
        match random.below(8) {
            0 => self.write_page(iova, 2, None),
            1 => {
                let to = some_address(random) & !(M2 - 1);
                self.write_page(iova, 2, Some((to, random.below(3) > 0)))
            }
            2 => self.write_page(iova, 1, None),
            // Outside of what it has been given, too.
            _ => {
                let to = if random.below(20) == 0 { 1 << 40 } else { some_address(random) };
                self.write_page(iova, 1, Some((to, random.below(3) > 0)))
            }
        }
    }
}

/// One of the guest's physical addresses.
fn some_address(random: &mut Random) -> u64 {
    random.below(BLOCKS) * M2 + random.below(PAGES) * K4
}

/// One of the device's.
fn any_page(random: &mut Random) -> u64 {
    AREAS[random.below(2) as usize] + some_address(random)
}

fn nested(machine: &Machine, kind: TableKind, guest: &Guest) -> (Function, Arc<Table>) {
    let function = machine.device(kind);
    let first_stage = guest.bits.first_stage;
    let table = Table::nested(&guest.physical, &function.device, first_stage, Iova::new(ROOT)).unwrap();
    function.device.attach(&table).unwrap();
    (function, table)
}

/// Reads the number of a page, or writes it again.
fn access(function: &Function, iova: u64, write: Option<u64>) -> Result<Option<u64>, DmaFaultReason> {
    match write {
        Some(number) => function.write(iova, number).map(|()| None),
        None => function.read(iova).map(Some),
    }
}

const KINDS: [(TableKind, Bits); 4] = [
    (TableKind::Native, X86),
    (TableKind::VtdSecondStage, X86),
    (TableKind::AmdV1, X86),
    (TableKind::Sv48, RISC_V),
];

#[test]
fn a_shadow_equals_a_walk_of_two_stages() {
    for (kind, bits) in KINDS {
        let machine = Machine::new();
        let mut guest = Guest::new(&machine, bits);
        let (function, table) = nested(&machine, kind, &guest);
        let mut random = Random(7);
        let (mut reached, mut refused) = (0, 0);
        for step in 0..STEPS {
            if guest.next + 64 * K4 > RAM || step % 50 == 49 {
                guest.restore_tables();
            }
            if step % 3 == 0 {
                guest.change_second_stage(&mut random);
            } else if guest.next + 64 * K4 < RAM {
                let changed = guest.change_first_stage(&mut random);
                table.nesting().unwrap().invalidate(changed);
            }
            for look in 0..12 {
                let iova = any_page(&mut random) + 8;
                let write = look % 3 == 0;
                let expected = guest.two_stages(iova, write);
                // Behind the page's number there is room for another one.
                let found = access(&function, iova, write.then_some(u64::from(step)));
                match expected {
                    Ok(offset) => {
                        reached += 1;
                        let there = number_at(&guest.ram, offset);
                        let expected = if write { Ok(None) } else { Ok(Some(there)) };
                        assert_eq!(found, expected, "{kind} {iova:#x} in step {step}");
                        assert!(!write || there == u64::from(step), "{kind}: not written at {iova:#x}");
                        let number = function.read(iova & !0xfff);
                        assert_eq!(
                            number,
                            Ok(offset / K4),
                            "{kind}: another page at {iova:#x} in step {step}"
                        );
                    }
                    Err(reason) => {
                        refused += 1;
                        assert_eq!(found, Err(reason), "{kind} {iova:#x} in step {step}, write {write}");
                    }
                }
            }
        }
        assert!(reached > 1000 && refused > 1000, "{kind}: {reached} {refused}");
    }
}

/// The guest never says that it has changed something. Its device may go on by what stood there, in memory that the guest has, and in
/// no other.
#[test]
fn a_forgotten_invalidation_shows_nothing_outside_the_parent() {
    const GONE: u64 = 0xdead;
    for (kind, bits) in KINDS {
        let machine = Machine::new();
        let mut guest = Guest::new(&machine, bits);
        let (function, _table) = nested(&machine, kind, &guest);
        let mut random = Random(11);
        let mut stale = 0;
        for step in 0..STEPS {
            if guest.next + 64 * K4 < RAM {
                guest.change_first_stage(&mut random);
            }
            for _ in 0..6 {
                let iova = any_page(&mut random);
                let expected = guest.two_stages(iova, false).ok();
                let Ok(number) = function.read(iova) else { continue };
                stale += u32::from(expected != Some(number * K4));
                // Wherever it leads, the guest has it.
                let here = range(number * K4, K4);
                assert_eq!(number_at(&guest.ram, here.first()), number);
                assert!(guest.physical.walk(Iova::new(here.first())).is_some(), "{kind} {iova:#x}: {number}");
                if step % 4 == 0 && number_at(&guest.ram, here.first() + 16) == 0 {
                    // It is taken away, and somebody else's before the device is asked again. What the guest's table says now may
                    // lead elsewhere.
                    guest.physical.unmap(here).unwrap();
                    number_pages(&guest.ram, [number], |_| GONE);
                    assert_ne!(function.read(iova), Ok(GONE), "{kind} {iova:#x}");
                    let _ = function.write(iova + 16, u64::from(step));
                    assert_eq!(number_at(&guest.ram, here.first() + 16), 0, "{kind} {iova:#x}");
                    number_pages(&guest.ram, [number], |page| page);
                    guest.physical.map(Iova::new(here.first()), &guest.ram, here.first(), K4, RW).unwrap();
                }
            }
        }
        assert!(stale > 0, "{kind}: nothing was remembered, so nothing was shown");
    }
}

/// Memory leaves the parent while a device works through a shadow of it: when the unmap returns, no byte arrives any more.
#[test]
fn memory_leaves_below_a_device_that_works() {
    let machine = Machine::new();
    let mut guest = Guest::new(&machine, X86);
    let iova = |page: u64| AREAS[0] + page * K4;
    for page in 0..PAGES {
        guest.write_page(iova(page), 1, Some((page * K4, true)));
    }
    let (one, table) = nested(&machine, TableKind::VtdSecondStage, &guest);
    let two = machine.device(TableKind::Native);
    two.device.attach(&table).unwrap();
    let written = AtomicU64::new(0);
    let works = |device: &Function, round: u64| {
        let page = (round * 7) % PAGES;
        if device.write(iova(page) + 16, round | 1).is_ok() {
            written.fetch_add(1, Ordering::Relaxed);
        }
        // Others never fault.
        assert_eq!(device.read(iova(PAGES / 2)), Ok(PAGES / 2));
    };
    beside(&[&|round| works(&one, round), &|round| works(&two, round)], || {
        for round in 0..2000 {
            let page = round % (PAGES / 2);
            let here = range(page * K4, K4);
            guest.physical.unmap(here).unwrap();
            let place = here.first() + 16;
            guest.ram.backing().write(guest.ram.offset() + place, &0u64.to_le_bytes()).unwrap();
            if round % 16 == 0 {
                table.nesting().unwrap().invalidate(range(iova(page), K4));
            }
            std::thread::yield_now();
            assert_eq!(number_at(&guest.ram, place), 0, "a byte came after the unmap of page {page}");
            guest.physical.map(Iova::new(here.first()), &guest.ram, here.first(), K4, RW).unwrap();
        }
    });
    assert!(written.load(Ordering::Relaxed) > 0);
    // The shadow is nobody's business but the parent's: it goes with its table.
    drop((one, two));
    assert_eq!(guest.physical.statistics().tables, 1);
    drop(table);
    assert_eq!(guest.physical.statistics().tables, 0);
    assert_eq!(guest.physical.walk(Iova::new(0)).unwrap().size.bytes().min(G1), K4);
}
