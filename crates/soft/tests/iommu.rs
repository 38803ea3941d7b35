//! Devices on both kinds of table, attached to the same space.

mod remote;

use ioasid::{Account, Backing, Bus, Device, Iova, IovaRange, Memory, Permissions, Rid, Space, Table};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{Port, PortBorrowError, SoftIommu, TableKind};
use remote::Remote;
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;

struct Machine {
    bus: Arc<Bus>,
    account: Account,
    iommu: Arc<SoftIommu>,
}

impl Machine {
    fn new() -> Machine {
        Machine { bus: Bus::new(), account: Account::new("test", None), iommu: SoftIommu::new() }
    }

    fn device(&self, rid: u16, kind: TableKind) -> (Device, Arc<Port>) {
        let port = self.iommu.add_device(Rid(rid), kind).unwrap();
        (Device::new(self.iommu.clone(), Rid(rid)).unwrap(), port)
    }

    fn memory(&self, length: u64) -> Arc<Memory> {
        Memory::register(&Backing::anonymous(&self.bus, length).unwrap(), 0, length, &self.account).unwrap()
    }
}

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

#[test]
fn two_devices_on_different_tables_see_the_same_memory() {
    let machine = Machine::new();
    let space = Space::new(&machine.bus);
    let memory = machine.memory(4 * MIB);
    // One mapping made before the second table exists, one after.
    space.map(Iova::new(0x4000_0000), &memory, 0, 2 * MIB, Permissions::READ_WRITE).unwrap();
    let (native, native_port) = machine.device(0x8, TableKind::Native);
    let (vtd, vtd_port) = machine.device(0x10, TableKind::VtdSecondStage);
    for device in [&native, &vtd] {
        device.attach(&Table::for_device(&space, device).unwrap()).unwrap();
    }
    space.map(Iova::new(0x4020_0000), &memory, 2 * MIB, 2 * MIB, Permissions::READ_WRITE).unwrap();

    // Over the border between the two mappings.
    let text: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    native_port.write(0x401f_0000, &text).unwrap();
    let mut back = vec![0; text.len()];
    vtd_port.read(0x401f_0000, &mut back).unwrap();
    assert_eq!(back, text);

    space.unmap(range(0x4010_0000, MIB)).unwrap();
    for port in [&native_port, &vtd_port] {
        let mut byte = [0];
        assert_eq!(port.read(0x401f_ffff, &mut byte).unwrap_err().reason, DmaFaultReason::NotMapped);
        port.read(0x4020_0000, &mut byte).unwrap();
        port.read(0x400f_ffff, &mut byte).unwrap();
        // A transfer that faults at its end moves nothing at all.
        let fault = port.write(0x400f_f000, &[0xee; 0x1001]).unwrap_err();
        assert_eq!((fault.iova, fault.reason), (0x4010_0000, DmaFaultReason::NotMapped));
        let mut page = [0xff; 16];
        memory.backing().read(0xf_f000, &mut page).unwrap();
        assert_eq!(page, [0; 16]);
        assert_eq!(port.statistics().faults, 2);
    }
}

#[test]
fn permissions_blocking_and_the_ends_of_the_address_space() {
    let machine = Machine::new();
    let space = Space::new(&machine.bus);
    let memory = machine.memory(MIB);
    let (device, port) = machine.device(0x8, TableKind::Native);
    let mut byte = [0];
    assert_eq!(port.read(0, &mut byte).unwrap_err().reason, DmaFaultReason::Blocked);
    device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();

    space.map(Iova::new(0x1000), &memory, 0, 0x1000, Permissions::READ).unwrap();
    space.map(Iova::new(0x2000), &memory, 0, 0x1000, Permissions::WRITE).unwrap();
    assert_eq!(port.write(0x1000, &[1]).unwrap_err().reason, DmaFaultReason::NoPermission);
    assert_eq!(port.read(0x2000, &mut byte).unwrap_err().reason, DmaFaultReason::NoPermission);
    port.write(0x2000, &[7]).unwrap();
    port.read(0x1000, &mut byte).unwrap();
    assert_eq!(byte, [7]);

    space.map(Iova::new(u64::MAX - 0xfff), &memory, 0, 0x1000, Permissions::READ_WRITE).unwrap();
    port.write(u64::MAX, &[9]).unwrap();
    assert_eq!(port.write(u64::MAX, &[9, 9]).unwrap_err().reason, DmaFaultReason::OutOfRange);

    device.detach();
    assert_eq!(port.read(0x1000, &mut byte).unwrap_err().reason, DmaFaultReason::Blocked);
}

/// The IOTLB remembers the way to a GiB, on every kind of table, and a fault is no miss.
#[test]
fn walks_from_the_root_are_counted() {
    const GIB: u64 = 1 << 30;
    for kind in TableKind::ALL {
        let machine = Machine::new();
        let space = Space::new(&machine.bus);
        let memory = machine.memory(MIB);
        let (device, port) = machine.device(0x8, kind);
        device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
        for gib in 1..=3 {
            space.map(Iova::new(gib * GIB), &memory, 0, 0x3000, Permissions::READ_WRITE).unwrap();
        }
        for _ in 0..10 {
            for (gib, page) in [(1, 0), (1, 1), (2, 0), (3, 2), (3, 0)] {
                port.write(gib * GIB + page * 0x1000, &[1; 100]).unwrap();
            }
            assert!(port.write(4 * GIB, &[1]).is_err());
        }
        let statistics = port.statistics();
        assert_eq!((statistics.walks, statistics.faults), (3, 10), "{kind}");
    }
}

#[test]
fn the_interrupt_window_and_the_width_of_the_table_are_reserved() {
    let machine = Machine::new();
    let space = Space::new(&machine.bus);
    let memory = machine.memory(MIB);
    let (device, _) = machine.device(0x8, TableKind::VtdSecondStage);
    space.map(Iova::new(0xfee0_0000), &memory, 0, MIB, Permissions::READ_WRITE).unwrap();
    let table = Table::for_device(&space, &device).unwrap();
    let refused = device.attach(&table).unwrap_err();
    assert!(refused.to_string().contains("0xfee00000-0xfeefffff"), "{refused}");
    space.unmap(range(0xfee0_0000, MIB)).unwrap();
    device.attach(&table).unwrap();
    assert!(space.map(Iova::new(0xfeef_f000), &memory, 0, 0x1000, Permissions::READ).is_err());
    assert!(space.map(Iova::new(1 << 48), &memory, 0, 0x1000, Permissions::READ).is_err());
    let usable = [range(0, 0xfee0_0000), IovaRange::new(0xfef0_0000, (1 << 48) - 1).unwrap()];
    assert_eq!(space.usable_ranges(), usable);
    device.detach();
    drop(table);
    assert_eq!(space.usable_ranges(), [IovaRange::ALL]);
}

#[test]
fn late_bound_memory_is_reached_and_may_be_gone() {
    let machine = Machine::new();
    let space = Space::new(&machine.bus);
    let remote = Arc::new(Remote(Mutex::new(vec![0; 0x3000])));
    let backing = Backing::late_bound(&machine.bus, remote.clone());
    let memory = Memory::register(&backing, 0x1000, 0x4000, &machine.account).unwrap();
    let (device, port) = machine.device(0x8, TableKind::VtdSecondStage);
    device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
    let iova = space.map_anywhere(&memory, 0, 0x4000, Permissions::READ_WRITE).unwrap().get();

    port.write(iova + 0xffe, b"late").unwrap();
    assert_eq!(&remote.0.lock().unwrap()[0x1ffe..0x2002], b"late");
    let fault = port.write(iova + 0x2000, &[1]).unwrap_err();
    assert_eq!(fault.reason, DmaFaultReason::MemoryGone);
    // Dropping the memory takes its mapping along.
    drop(memory);
    assert_eq!(port.write(iova, &[1]).unwrap_err().reason, DmaFaultReason::NotMapped);
    assert_eq!(machine.account.charged_pages(), 0);
}

#[test]
fn replacing_a_table_moves_the_device_in_one_step() {
    let machine = Machine::new();
    let (first, second) = (Space::new(&machine.bus), Space::new(&machine.bus));
    let memory = machine.memory(2 * MIB);
    memory.backing().write(0, &[1]).unwrap();
    memory.backing().write(MIB, &[2]).unwrap();
    first.map(Iova::new(0x1000), &memory, 0, 0x1000, Permissions::READ).unwrap();
    second.map(Iova::new(0x1000), &memory, MIB, 0x1000, Permissions::READ).unwrap();
    let (device, port) = machine.device(0x8, TableKind::Native);
    let tables = [&first, &second].map(|space| Table::for_device(space, &device).unwrap());
    device.attach(&tables[0]).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = [0u32; 3];
            for _ in 0..20_000 {
                let mut byte = [0];
                port.read(0x1000, &mut byte).unwrap();
                seen[usize::from(byte[0])] += 1;
            }
            seen
        });
        for round in 0..200 {
            device.attach(&tables[round % 2]).unwrap();
        }
        let seen = reader.join().unwrap();
        assert_eq!(seen[0], 0);
    });
}

#[test]
fn a_device_that_is_taken_from_its_space_lets_go_of_what_it_has_borrowed() {
    let machine = Machine::new();
    let (first, second) = (Space::new(&machine.bus), Space::new(&machine.bus));
    let memory = machine.memory(2 * MIB);
    for space in [&first, &second] {
        space.map(Iova::new(0x1000), &memory, 0, 0x1000, Permissions::READ_WRITE).unwrap();
    }
    let (device, port) = machine.device(0x8, TableKind::VtdSecondStage);
    let borrow = || {
        let held = Arc::new(Mutex::new(None));
        let place = Arc::downgrade(&held);
        let let_go = move |_: IovaRange| drop(place.upgrade().and_then(|held| held.lock().unwrap().take()));
        let slice = port.borrow(0x1800, 16, Permissions::READ_WRITE, Arc::new(let_go))?;
        *held.lock().unwrap() = Some(slice);
        Ok::<_, PortBorrowError>(held)
    };
    assert_eq!(borrow().unwrap_err(), PortBorrowError::Blocked);
    let table = Table::for_device(&first, &device).unwrap();
    device.attach(&table).unwrap();
    let held = borrow().unwrap();
    held.lock().unwrap().as_ref().unwrap().write(0, b"from the device").unwrap();
    let mut bytes = [0; 15];
    port.read(0x1800, &mut bytes).unwrap();
    assert_eq!(&bytes, b"from the device");
    // Another table of the same space changes nothing of what is mapped.
    device.attach(&Table::new(&first, &device).unwrap()).unwrap();
    assert!(held.lock().unwrap().is_some());
    device.attach(&Table::for_device(&second, &device).unwrap()).unwrap();
    assert!(held.lock().unwrap().is_none());
    let held = borrow().unwrap();
    device.detach();
    assert!(held.lock().unwrap().is_none());
    // A model that does not let go keeps its memory pinned, and nothing else.
    device.attach(&table).unwrap();
    let stubborn = port.borrow(0x1800, 16, Permissions::READ, Arc::new(|_| {})).unwrap();
    device.detach();
    stubborn.read(0, &mut bytes).unwrap();
    assert!(first.unmap(range(0x1000, 0x1000)).is_err());
    second.unmap(range(0x1000, 0x1000)).unwrap();
    drop(stubborn);
    first.unmap(range(0x1000, 0x1000)).unwrap();
    let many: Vec<_> = (0..500).filter_map(|_| borrow().ok()).collect();
    assert!(many.is_empty());
}
