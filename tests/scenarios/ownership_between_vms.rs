//! Ownership between VMs: a guest that says another guest's numbers gets nowhere.
//!
//! Who asks: whoever runs guests of different customers on one host, and lets them name PASIDs and address spaces.
//!
//! - The series of patches had one space of IOASIDs for the host and gave a lookup an "owner" to compare, which callers could
//!   leave out. A guest could free or bind what it could name.
//! - VFIO type1: a container's file is all there is; PASIDs are the driver's business.
//! - iommufd: numbers are local to an open `/dev/iommu`. PASIDs are numbers of the device.
//! - Here numbers are local, too: whoever holds a set may use what is in it, and no others, and is not told whose a number is.
//!   There is one holder of a device, and one owner of each of its routes.

use crate::machine::{K4, Machine, RW, number_pages};
use crate::program::{BUFFER, PAGE, Program};
use ioasid::pasid::{Limit, Owner, PasidSet, PasidState, PasidSystem, Spid, UnknownPasid, UseError};
use ioasid::{Account, AttachError, Device, DeviceError, Iova, Space, Table};
use ioasid_server::{Errno, InProcess, Server, ServerOptions};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::TableKind;
use std::sync::Arc;

const AT: u64 = 0x10_0000;

fn number(number: u32) -> Spid {
    Spid::new(number).unwrap()
}

/// A guest's set, and a space in which its name stands at [`AT`].
fn guest(
    machine: &Machine,
    system: &Arc<PasidSystem>,
    name: u64,
) -> (PasidSet, Arc<Space>, Arc<ioasid::Memory>) {
    let set = system.create_set(Owner::Machine(name), 100, &Limit::new(system, "guests", None)).unwrap();
    let memory = machine.memory(K4, &Account::new("guest", None));
    number_pages(&memory, [0], |_| name);
    let space = Space::new(&machine.bus);
    space.map(Iova::new(AT), &memory, 0, K4, RW).unwrap();
    (set, space, memory)
}

#[test]
fn pasids_of_another_guest_are_unknown() {
    let machine = Machine::new();
    let system = PasidSystem::new(1 << 20).unwrap();
    let (set_a, space_a, _memory_a) = guest(&machine, &system, 0xa);
    let (set_b, space_b, _memory_b) = guest(&machine, &system, 0xb);
    // Both call theirs 5, which is nobody's business.
    let a = set_a.allocate(1..=u32::MAX, 0).unwrap();
    let b = set_b.allocate(1..=u32::MAX, 0).unwrap();
    set_a.set_spid(a, Some(number(5))).unwrap();
    set_b.set_spid(b, Some(number(5))).unwrap();
    assert_eq!((set_a.find(number(5)), set_b.find(number(5))), (Some(a), Some(b)));
    let device_a = machine.device(TableKind::VtdSecondStage);
    let table_a = Table::for_device(&space_a, &device_a.device).unwrap();
    device_a.device.attach_pasid(number(5), set_a.bind(a).unwrap(), &table_a).unwrap();

    // B tries whatever there is, with A's number and with one that nobody has.
    let nobodys = ioasid::pasid::Pasid::new(4711).unwrap();
    for pasid in [a, nobodys] {
        let unknown = UnknownPasid { pasid };
        assert_eq!(set_b.lookup(pasid), Err(unknown.clone()));
        assert_eq!(set_b.free(pasid), Err(UseError::Unknown(unknown.clone())));
        assert_eq!(set_b.hold(pasid).unwrap_err(), UseError::Unknown(unknown.clone()));
        assert_eq!(set_b.bind(pasid).unwrap_err(), UseError::Unknown(unknown.clone()));
        assert!(set_b.set_spid(pasid, Some(number(6))).is_err());
    }
    assert!(set_b.list().iter().all(|status| status.pasid == b));
    let status = set_a.lookup(a).unwrap();
    assert_eq!((status.state, status.references, status.spid), (PasidState::Active, 1, Some(number(5))));

    // Nor does B get the device, nor its route.
    assert_eq!(
        Device::new(machine.iommu.clone(), device_a.device.rid()).err(),
        Some(DeviceError::Taken(device_a.device.rid()))
    );
    let table_b = Table::for_device(&space_b, &device_a.device).unwrap();
    let taken = device_a.device.attach_pasid(number(5), set_b.bind(b).unwrap(), &table_b);
    assert!(matches!(taken, Err(AttachError::PasidTaken { pasid, .. }) if pasid == a), "{taken:?}");
    let port = machine.iommu.port_with_pasid(device_a.device.rid(), a).unwrap();
    let mut name = [0; 8];
    port.read(AT, &mut name).unwrap();
    assert_eq!(u64::from_le_bytes(name), 0xa);

    // A dies while its device goes on. B never gets A's number, however many it asks for.
    drop(set_a);
    let others: Vec<_> = (0..50).map(|_| set_b.allocate(1..=u32::MAX, 0).unwrap()).collect();
    assert!(!others.contains(&a));
    drop(device_a);
    assert_eq!(port.read(AT, &mut name).unwrap_err().reason, DmaFaultReason::Blocked);
    assert_eq!(set_b.allocate(1..=u32::MAX, 0).unwrap(), a);
}

/// The same between two programs at `/dev/iommu`.
#[test]
fn numbers_of_another_program_are_unknown() {
    let devices = ["edu:table=vtd", "edu:table=vtd"].map(|device| device.parse().unwrap()).to_vec();
    let server = Server::new(ServerOptions { devices, ..Default::default() }).unwrap();
    let programs = [1001, 1002].map(|user| {
        let client = InProcess::new(user);
        client.map_memory(BUFFER, 16 * PAGE);
        Program { server: server.clone(), client }
    });
    let [a, b] = &programs;
    let (iommu_a, iommu_b) = (a.iommu(), b.iommu());
    // A's numbers run ahead of B's.
    let ioas_a = [a.ioas(iommu_a), a.ioas(iommu_a), a.ioas(iommu_a)];
    let device_a = a.bind_device(iommu_a, 0);
    a.attach(&device_a, ioas_a[2]).unwrap();
    a.map_fixed(iommu_a, ioas_a[2], BUFFER, PAGE, AT).unwrap();
    a.put(BUFFER, b"A's own bytes").unwrap();
    let ioas_b = b.ioas(iommu_b);
    let device_b = b.bind_device(iommu_b, 1);

    for id in [ioas_a[2], device_a.id] {
        assert_eq!(b.map_fixed(iommu_b, id, BUFFER, PAGE, AT), Err(Errno::NOENT));
        assert_eq!(b.unmap(iommu_b, id, AT, PAGE), Err(Errno::NOENT));
        assert_eq!(b.attach(&device_b, id), Err(Errno::NOENT));
        assert_eq!(b.destroy(iommu_b, id), Err(Errno::NOENT));
    }
    // A's device has an owner. B may open it, and can do nothing with it.
    let file = b.open("/dev/vfio/devices/vfio0");
    assert_eq!(b.bind_at(file, iommu_b), Err(Errno::INVAL));
    // At the same address B's device finds B's memory.
    b.attach(&device_b, ioas_b).unwrap();
    b.map_fixed(iommu_b, ioas_b, BUFFER, 2 * PAGE, AT).unwrap();
    b.put(BUFFER, b"what B has wr").unwrap();
    b.device_copies(&device_b, AT, AT + PAGE, 13);
    assert_eq!(b.get(BUFFER + PAGE, 13).unwrap(), b"what B has wr");
    assert_eq!(a.get(BUFFER, 13).unwrap(), b"A's own bytes");
}
