//! Devices behind tables of guests: what is remembered, marked, refused and bounded. That a shadow translates as a walk of both stages
//! does is `tests/scenarios/nesting_equivalence.rs`.

mod remote;

use ioasid::pasid::{Limit, Owner, PasidSystem, Spid};
use ioasid::{
    Account, AttachError, Backing, Bus, Coherency, Device, FirstStage, Iova, IovaRange, Memory, NoRecord,
    Permissions, Rid, SHADOW_BYTES, SliceHolder, Space, Table, epoch,
};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{
    AtomicOperation, DmaSegment, Port, PortBorrowError, Snooping, SoftIommu, TableKind,
};
use remote::Remote;
use std::sync::{Arc, Mutex};

const PAGE: u64 = 4096;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const RW: Permissions = Permissions::READ_WRITE;
/// Where the guest has its tables, and where the device has its addresses.
const TABLES: u64 = 0x8000_0000;
const AT: u64 = 0x12_3456_7000;
/// P, R/W and U/S of x86-64; A and D; PS.
const ENTRY: u64 = 7;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const LARGE: u64 = 0x80;

/// A guest with a GiB of memory from 0 on, and tables of its own in other memory.
struct Guest {
    bus: Arc<Bus>,
    iommu: Arc<SoftIommu>,
    space: Arc<Space>,
    ram: Arc<Memory>,
    tables: Arc<Memory>,
    next: u64,
}

impl Guest {
    fn new() -> Guest {
        let bus = Bus::new();
        let tables = Backing::anonymous(&bus, 256 * M2).unwrap();
        Guest::with_tables(bus, &tables, 0)
    }

    fn with_tables(bus: Arc<Bus>, tables: &Arc<Backing>, marks: u64) -> Guest {
        let account = Account::new("guest", None);
        let ram = Memory::register(&Backing::anonymous(&bus, G1).unwrap(), 0, G1, &account).unwrap();
        let length = tables.length().unwrap_or(64 * PAGE);
        let tables = Memory::register(tables, 0, length, &account).unwrap();
        let space = Space::new(&bus);
        space.map(Iova::new(0), &ram, 0, G1, RW).unwrap();
        space.map(Iova::new(TABLES), &tables, 0, length, RW).unwrap();
        let mut guest = Guest { bus, iommu: SoftIommu::new(), space, ram, tables, next: PAGE };
        guest.map(AT, 1, 5 * PAGE, marks);
        guest
    }

    fn word(&self, place: u64) -> u64 {
        let mut bytes = [0; 8];
        self.tables.backing().read(place, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn set(&self, place: u64, word: u64) {
        self.tables.backing().write(place, &word.to_le_bytes()).unwrap();
    }

    /// Writes the entry of a level, and those on the way to it; its place.
    fn map(&mut self, iova: u64, level: u32, to: u64, marks: u64) -> u64 {
        let mut table = 0;
        for at in (level..=4).rev() {
            let place = table + (iova >> (12 + 9 * (at - 1)) & 511) * 8;
            if at == level {
                let large = if level > 1 { LARGE } else { 0 };
                self.set(place, to | ENTRY | large | marks);
                return place;
            }
            if self.word(place) == 0 {
                self.set(place, (TABLES + self.next) | ENTRY | marks);
                self.next += PAGE;
            }
            table = (self.word(place) & !0xfff) - TABLES;
        }
        unreachable!("levels are 1 to 4")
    }

    fn device(&self, rid: u16, kind: TableKind) -> (Device, Arc<Port>) {
        let port = self.iommu.add_device(Rid(rid), kind).unwrap();
        (Device::new(self.iommu.clone(), Rid(rid)).unwrap(), port)
    }

    fn table(&self, device: &Device) -> Arc<Table> {
        Table::nested(&self.space, device, FirstStage::X86_64, Iova::new(TABLES)).unwrap()
    }

    fn attached(&self, rid: u16, kind: TableKind) -> (Device, Arc<Port>, Arc<Table>) {
        let (device, port) = self.device(rid, kind);
        let table = self.table(&device);
        device.attach(&table).unwrap();
        (device, port, table)
    }
}

fn reason(result: Result<(), ioasid_soft::dma::DmaFault>) -> Option<DmaFaultReason> {
    result.err().map(|fault| fault.reason)
}

#[test]
fn every_kind_of_transfer_goes_on_after_misses() {
    const PAGES: u64 = 40;
    for kind in [TableKind::Native, TableKind::VtdSecondStage, TableKind::AmdV1] {
        let mut guest = Guest::new();
        // In an order that lets no two be joined.
        for page in 0..PAGES {
            guest.map(AT + page * PAGE, 1, (page ^ 1) * PAGE, 0);
        }
        let (_device, port, table) = guest.attached(8, kind);
        let forget = || table.nesting().unwrap().invalidate(IovaRange::ALL);
        let length = (PAGES * PAGE) as usize;
        let bytes: Vec<u8> = (0..length).map(|n| (n * 7 / 3) as u8).collect();
        let mut back = vec![0; length];
        port.write(AT, &bytes).unwrap();
        forget();
        port.read(AT, &mut back).unwrap();
        assert_eq!(back, bytes);

        forget();
        let half = (PAGES / 2) * PAGE;
        port.copy(AT, AT + half, half).unwrap();
        forget();
        let list: Vec<_> =
            (0..PAGES).rev().map(|page| DmaSegment { iova: AT + page * PAGE, length: PAGE }).collect();
        assert_eq!(port.read_list(&list, &mut back).unwrap(), length as u64);
        let expected: Vec<u8> = (0..PAGES as usize)
            .rev()
            .flat_map(|page| bytes[page % (PAGES as usize / 2) * PAGE as usize..][..PAGE as usize].to_vec())
            .collect();
        assert!(back == expected, "{kind}");

        forget();
        let before = port.atomic_u64(AT + 8, AtomicOperation::Swap(9)).unwrap();
        assert_eq!(before.to_le_bytes(), bytes[8..16]);
        assert_eq!(port.statistics().faults, 0, "misses are no faults");
    }
}

#[test]
fn a_block_is_as_large_as_both_stages_allow() {
    for (first_level, second, block) in
        [(1, G1, PAGE), (2, G1, M2), (3, G1, G1), (3, M2, M2), (3, PAGE, PAGE), (2, PAGE, PAGE)]
    {
        let mut guest = Guest::new();
        guest.map(G1 * 7, first_level, 0, 0);
        guest.space.unmap(IovaRange::with_length(0, G1).unwrap()).unwrap();
        for at in (0..G1.min(4 * second)).step_by(second as usize) {
            guest.space.map(Iova::new(at), &guest.ram, at, second, RW).unwrap();
        }
        let (_device, port, table) = guest.attached(8, TableKind::VtdSecondStage);
        port.write(G1 * 7 + 17, &[1]).unwrap();
        let leaves = table.leaves_by_size().unwrap();
        assert_eq!(
            leaves.iter().map(|(size, count)| (size.bytes(), *count)).collect::<Vec<_>>(),
            [(block, 1)]
        );
        assert_eq!(table.nesting().unwrap().remembered(), 1);
        // One byte below goes, and all of the block with it.
        guest.space.unmap(IovaRange::with_length(0, PAGE).unwrap()).unwrap();
        assert_eq!(table.nesting().unwrap().remembered(), 0);
        let gone = port.read(G1 * 7 + 17, &mut [0]).unwrap_err().reason;
        assert_eq!(gone, DmaFaultReason::SecondStage { address: 17 });
    }
}

#[test]
fn entries_say_what_was_used() {
    let mut guest = Guest::new();
    let place = guest.map(AT, 1, 5 * PAGE, 0);
    let (_device, port, table) = guest.attached(8, TableKind::Native);
    port.read(AT, &mut [0]).unwrap();
    assert_eq!(guest.word(place), (5 * PAGE) | ENTRY | ACCESSED);
    port.write(AT, &[1]).unwrap();
    assert_eq!(guest.word(place), (5 * PAGE) | ENTRY | ACCESSED | DIRTY);
    // The guest has written the page back.
    guest.set(place, (5 * PAGE) | ENTRY | ACCESSED);
    table.nesting().unwrap().invalidate(IovaRange::with_length(AT, PAGE).unwrap());
    port.read(AT, &mut [0]).unwrap();
    assert_eq!(guest.word(place) & DIRTY, 0);
    port.write(AT, &[1]).unwrap();
    assert_eq!(guest.word(place) & DIRTY, DIRTY);

    // What is refused leaves no mark, by either stage.
    let read_only = guest.map(AT + PAGE, 1, 6 * PAGE, 0);
    guest.set(read_only, (6 * PAGE) | ENTRY & !2);
    assert_eq!(reason(port.write(AT + PAGE, &[1])), Some(DmaFaultReason::NoPermission));
    assert_eq!(guest.word(read_only) & ACCESSED, 0);
    // Tables that may only be read take no marks.
    guest.map(AT + PAGE, 1, 6 * PAGE, 0);
    let page = IovaRange::with_length((TABLES + read_only) & !0xfff, PAGE).unwrap();
    guest.space.protect(page, Permissions::READ).unwrap();
    let address = TABLES + read_only;
    assert_eq!(reason(port.read(AT + PAGE, &mut [0])), Some(DmaFaultReason::SecondStage { address }));
    guest.set(read_only, (6 * PAGE) | ENTRY | ACCESSED);
    port.read(AT + PAGE, &mut [0]).unwrap();
    assert_eq!(reason(port.write(AT + PAGE, &[0])), Some(DmaFaultReason::SecondStage { address }));
}

#[test]
fn tables_behind_calls_are_read_and_not_marked() {
    for (marks, found) in [(ACCESSED | DIRTY, None), (0, Some(DmaFaultReason::NotAtomic))] {
        let bus = Bus::new();
        let tables = Backing::late_bound(&bus, Arc::new(Remote(Mutex::new(vec![0; 64 * PAGE as usize]))));
        let guest = Guest::with_tables(bus, &tables, marks);
        let (_device, port, _table) = guest.attached(8, TableKind::VtdSecondStage);
        assert_eq!(reason(port.write(AT, &[1])), found);
        // The memory goes, with all that was translated by it.
        tables.revoke();
        assert!(port.write(AT, &[1]).is_err());
    }
}

#[test]
fn a_shadow_is_bounded() {
    const STEP: u64 = G1 + M2;
    const TOUCHED: u64 = 6000;
    let mut guest = Guest::new();
    let places: Vec<u64> = (0..TOUCHED).map(|number| number * STEP).collect();
    for (number, place) in places.iter().enumerate() {
        guest.map(*place, 1, number as u64 * PAGE, 0);
    }
    let (_device, port, table) = guest.attached(8, TableKind::Native);
    let mut most = 0;
    for (number, place) in places.iter().enumerate() {
        port.write(*place, &[number as u8]).unwrap();
        if number % 64 == 0 {
            most = most.max(guest.space.statistics().derived_table_bytes);
        }
    }
    assert!(most > SHADOW_BYTES / 2 && most <= SHADOW_BYTES, "{most}");
    assert!(table.nesting().unwrap().remembered() < places.len());
    for (number, place) in places.iter().enumerate() {
        let mut byte = [0];
        port.read(*place, &mut byte).unwrap();
        assert_eq!(byte, [number as u8]);
    }
}

#[derive(Debug)]
struct Holder;

impl SliceHolder for Holder {
    fn let_go(&self, _range: IovaRange) {}
}

#[test]
fn nothing_is_lent_through_a_guests_table() {
    let guest = Guest::new();
    let (device, port) = guest.device(8, TableKind::Native);
    device.attach(&Table::for_device(&guest.space, &device).unwrap()).unwrap();
    let slice = port.borrow(0, PAGE, RW, Arc::new(Holder)).unwrap();
    drop(slice);
    device.attach(&guest.table(&device)).unwrap();
    let refused = port.borrow(AT, PAGE, RW, Arc::new(Holder)).unwrap_err();
    assert_eq!(refused, PortBorrowError::Nested);
    assert_eq!(device.table().unwrap().record_writes(true), Err(NoRecord));
}

#[test]
fn a_model_looks_up_before_it_translates() {
    let guest = Guest::new();
    let (_device, port, _table) = guest.attached(8, TableKind::AmdV1);
    let translate = || port.translate(&epoch::dma(), AT + 3, RW).map_err(|fault| fault.reason);
    assert_eq!(translate(), Err(DmaFaultReason::NotResolved));
    port.resolve(AT + 3, RW).unwrap();
    assert_eq!(translate().unwrap().length, PAGE - 3);
    let missing = port.resolve(AT + PAGE, RW).unwrap_err().reason;
    assert_eq!(missing, DmaFaultReason::NotMapped);
}

#[test]
fn interrupts_are_not_looked_up() {
    let mut guest = Guest::new();
    guest.map(0xfee0_0000, 1, 0, 0);
    guest.map(0xfef0_0000, 1, 0, 0);
    let (_device, port, _table) = guest.attached(8, TableKind::VtdSecondStage);
    assert_eq!(reason(port.write(0xfee0_0000, &[0; 4])), Some(DmaFaultReason::NotMapped));
    port.write(0xfef0_0000, &[0; 4]).unwrap();
    // An address in the gap between the halves of a table.
    assert_eq!(reason(port.read(1 << 47, &mut [0])), Some(DmaFaultReason::OutOfRange));
}

#[test]
fn who_may_be_attached() {
    let guest = Guest::new();
    let (of_risc_v, _) = guest.device(8, TableKind::Sv48);
    let root = Iova::new(TABLES);
    let refused = Table::nested(&guest.space, &of_risc_v, FirstStage::X86_64, root).unwrap_err();
    assert!(matches!(refused, AttachError::Incompatible), "{refused}");
    let (device, _) = guest.device(16, TableKind::VtdSecondStage);
    let refused =
        Table::nested(&guest.space, &device, FirstStage::X86_64, Iova::new(TABLES + 8)).unwrap_err();
    assert!(refused.to_string().contains("0x80000008"), "{refused}");
    let table = guest.table(&device);
    assert!(matches!(of_risc_v.attach(&table), Err(AttachError::Incompatible)));
    // A root in nowhere is the guest's affair.
    let (device, port) = guest.device(24, TableKind::Native);
    let nowhere = Table::nested(&guest.space, &device, FirstStage::X86_64, Iova::new(1 << 45)).unwrap();
    device.attach(&nowhere).unwrap();
    let address = 1 << 45;
    assert_eq!(reason(port.read(AT, &mut [0])), Some(DmaFaultReason::SecondStage { address }));
    device.attach(&table).unwrap();
    port.read(AT, &mut [0]).unwrap();
}

#[test]
fn a_process_of_the_guests_is_a_pasid_beside_its_kernel() {
    let guest = Guest::new();
    let system = PasidSystem::new(1 << 10).unwrap();
    let limit = Limit::new(&system, "guests", None);
    let set = system.create_set(Owner::Machine(1), 4, &limit).unwrap();
    let (device, port) = guest.device(8, TableKind::VtdSecondStage);
    device.attach(&Table::for_device(&guest.space, &device).unwrap()).unwrap();
    let pasid = set.allocate(1..=u32::MAX, 0).unwrap();
    let number = Spid::new(3).unwrap();
    device.attach_pasid(number, set.bind(pasid).unwrap(), &guest.table(&device)).unwrap();
    let of_process = guest.iommu.port_with_pasid(Rid(8), pasid).unwrap();
    of_process.write(AT, b"process").unwrap();
    let mut bytes = [0; 7];
    port.read(5 * PAGE, &mut bytes).unwrap();
    assert_eq!(&bytes, b"process");
    assert_eq!(reason(of_process.read(5 * PAGE, &mut bytes)), Some(DmaFaultReason::NotMapped));
    device.detach_pasid(number);
    assert_eq!(reason(of_process.read(AT, &mut bytes)), Some(DmaFaultReason::Blocked));
}

#[test]
fn coherency_is_the_second_stages() {
    let guest = Guest::new();
    let port = guest.iommu.add_no_snoop_device(Rid(8), TableKind::VtdSecondStage).unwrap();
    let device = Device::new(guest.iommu.clone(), Rid(8)).unwrap();
    device.attach(&guest.table(&device)).unwrap();
    assert_eq!(port.read_without_snooping(AT, &mut [0; 8]).unwrap(), Snooping::Enforced);
    // RISC-V's cannot, and does not promise it.
    guest.iommu.add_no_snoop_device(Rid(16), TableKind::Sv48).unwrap();
    let device = Device::new(guest.iommu.clone(), Rid(16)).unwrap();
    let table = Table::nested(&guest.space, &device, FirstStage::Sv48, Iova::new(TABLES)).unwrap();
    assert_eq!(table.coherency(), Coherency::AsRequested);
}

#[test]
fn nothing_is_left() {
    let guest = Guest::new();
    let bus = Arc::downgrade(&guest.bus);
    let (device, port, table) = guest.attached(8, TableKind::Native);
    port.write(AT, &[1]).unwrap();
    assert_eq!(guest.space.statistics().tables, 1);
    drop((device, table));
    assert_eq!(guest.space.statistics().tables, 0);
    drop((port, guest));
    assert_eq!(bus.strong_count(), 0, "somebody has the bus");
}
