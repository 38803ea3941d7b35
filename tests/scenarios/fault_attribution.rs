//! Fault attribution: whose DMA was it, where, with what PASID, and what was it about to do?
//!
//! Who asks: whoever has to tell a guest about its device's fault, and gets "DMAR: fault addr 0x0" in the host's log instead.
//!
//! - VFIO type1: the host's kernel prints a line. The user learns nothing.
//! - iommufd: a fault object reports recoverable faults (PRI) with the device's number and the PASID; others go to the host's log.
//! - Here the log is the device's own: each record has the requester ID, the PASID if there was one, the first address that could
//!   not be reached, the direction and the reason. A device that floods its log fills no other one, and what came first stays.
//!
//! The RFC has raw {rid, pasid, addr} become {space, cookie, addr}. Each record has these as well: the *cookie* that the user gave
//! to the device when it was bound, and the space that the request went through. What the user gave when a PASID was allocated is
//! found by the record's PASID.

use crate::machine::{Function, K4, Machine, RW, beside, range};
use ioasid::pasid::{Limit, Owner, Pasid, PasidSystem, Spid};
use ioasid::{Account, Device, DeviceOwner, Iova, Permissions, Space};
use ioasid_soft::dma::{DmaFault, DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{DmaSegment, FAULT_LOG_RECORDS, FaultRecord, Port, TableKind};
use std::sync::Arc;

const AT: u64 = 0x10_0000;

/// One record, and no other.
fn only(port: &Port) -> FaultRecord {
    let log = port.take_faults();
    assert_eq!((log.records.len(), log.dropped), (1, 0), "{log:?}");
    log.records[0]
}

fn fault(iova: u64, write: bool, reason: DmaFaultReason) -> DmaFault {
    DmaFault { iova, write, reason }
}

#[test]
fn every_record_says_who_where_and_why() {
    for kind in TableKind::ALL {
        let machine = Machine::new();
        let memory = machine.memory(4 * K4, &Account::new("guest", None));
        let space = Space::new(&machine.bus);
        let devices = [0xc0, 0xc1].map(|cookie| {
            let function = machine.device(kind);
            let function = Function { device: function.device.with_cookie(cookie), ..function };
            function.attach(&space);
            function
        });
        space.map(Iova::new(AT), &memory, 0, K4, RW).unwrap();
        space.map(Iova::new(AT + K4), &memory, K4, K4, Permissions::READ).unwrap();
        let [one, two] = &devices;
        let record = |function: &Function, fault: DmaFault| {
            let attached = fault.reason != DmaFaultReason::Blocked;
            let record = FaultRecord {
                device: function.device.rid(),
                pasid: None,
                cookie: function.device.cookie(),
                space: attached.then(|| space.id()),
                fault,
            };
            assert_eq!(only(&function.port), record, "{kind}");
        };
        // The first address that is missing, not the one that the transfer began with; and nothing has moved.
        one.port.write(AT + K4 - 4, &[0xff; 8]).unwrap_err();
        record(one, fault(AT + K4, true, DmaFaultReason::NoPermission));
        assert_eq!(one.read(AT + K4 - 8), Ok(0));
        two.port.read(AT + 2 * K4 - 4, &mut [0; 8]).unwrap_err();
        record(two, fault(AT + 2 * K4, false, DmaFaultReason::NotMapped));
        // It was mapped, and is not any more.
        space.unmap(range(AT, K4)).unwrap();
        one.port.read(AT + 0x123, &mut [0]).unwrap_err();
        record(one, fault(AT + 0x123, false, DmaFaultReason::NotMapped));
        // Attached to nothing.
        two.device.detach();
        two.port.write(AT + K4, &[1]).unwrap_err();
        record(two, fault(AT + K4, true, DmaFaultReason::Blocked));
        // Nobody was told of somebody else's.
        assert_eq!(devices.each_ref().map(Function::faults), [2, 2]);
        assert!(devices.iter().all(|function| function.port.take_faults().records.is_empty()));
    }
}

/// Two processes of a guest on one device: the PASID says whose it was, and leads to the cookie.
#[test]
fn a_pasid_leads_back_to_whoever_it_was_given_to() {
    let machine = Machine::new();
    let system = PasidSystem::new(1 << 20).unwrap();
    let guest = system.create_set(Owner::Machine(7), 100, &Limit::new(&system, "guests", None)).unwrap();
    let Function { device, .. } = machine.device(TableKind::VtdSecondStage);
    let port = machine.iommu.port_with_pasid(device.rid(), guest.allocate(1..=u32::MAX, 0).unwrap()).unwrap();
    // What the guest calls its device is said whatever the PASID, also by ports that were there before.
    let device = device.with_cookie(0x18);
    port.write(AT, &[1]).unwrap_err();
    assert_eq!(only(&port).cookie, Some(0x18));
    let processes: Vec<(Pasid, u64, Arc<Space>, Arc<Port>)> = (0..3u32)
        .map(|process| {
            let cookie = 0xc00c_1e00 + u64::from(process);
            let pasid = guest.allocate(1..=u32::MAX, cookie).unwrap();
            let space = Space::new(&machine.bus);
            let table = ioasid::Table::for_device(&space, &device).unwrap();
            let number = Spid::new(100 + process).unwrap();
            guest.set_spid(pasid, Some(number)).unwrap();
            device.attach_pasid(number, guest.bind(pasid).unwrap(), &table).unwrap();
            (pasid, cookie, space, machine.iommu.port_with_pasid(device.rid(), pasid).unwrap())
        })
        .collect();
    for (process, (pasid, cookie, space, port)) in (0..).zip(&processes) {
        let at = AT + process * K4;
        port.write(at, &[1]).unwrap_err();
        let record = only(port);
        assert_eq!((record.device, record.pasid), (device.rid(), Some(*pasid)));
        assert_eq!((record.cookie, record.space), (Some(0x18), Some(space.id())));
        assert_eq!(record.fault, fault(at, true, DmaFaultReason::NotMapped));
        // What the user is told: its own cookie, its own number, its own machine.
        let status = system.lookup(record.pasid.unwrap()).unwrap();
        assert_eq!((status.data, status.owner), (*cookie, Owner::Machine(7)));
        assert_eq!(status.spid, Spid::new(100 + process as u32));
        let said = format!(" with PASID {pasid}, cookie 24, in space {}: ", space.id());
        assert!(record.to_string().contains(&said), "{record}");
    }
}

/// A device goes from one guest to another and back, and does not stop. Each guest has a page that the other one has not, so a
/// fault there is the other one's.
#[test]
fn a_fault_is_that_of_the_guest_whose_request_it_was() {
    let machine = Machine::new();
    let memory = machine.memory(K4, &Account::new("guests", None));
    let spaces = [0, 1].map(|guest| {
        let space = Space::new(&machine.bus);
        space.map(Iova::new(AT + guest * K4), &memory, 0, K4, RW).unwrap();
        space
    });
    let Function { kind, device, port } = machine.device(TableKind::X86_64);
    let rid = device.rid();
    drop(device);
    let request = |number: u64| {
        let at = AT + number % 2 * K4;
        match number % 3 {
            0 => drop(port.read(at, &mut [0])),
            1 => drop(port.copy(at, at + 8, 8)),
            _ => drop(port.write_list(&[DmaSegment { iova: at, length: 4 }], &[1; 4])),
        }
        for record in port.take_faults().records {
            let (guest, cookie) = match record.fault.reason {
                DmaFaultReason::Blocked => {
                    assert!(record.space.is_none() && record.cookie.is_none_or(|cookie| cookie < 2));
                    continue;
                }
                _ if record.fault.iova < AT + K4 => (&spaces[1], 1),
                _ => (&spaces[0], 0),
            };
            assert_eq!((record.cookie, record.space), (Some(cookie), Some(guest.id())), "{record}");
        }
    };
    beside(&[&request], || {
        for round in 0..2000 {
            let guest = round % 2;
            let owner = DeviceOwner::new("guest");
            let device = Device::bind(machine.iommu.clone(), rid, &owner).unwrap().with_cookie(guest as u64);
            let table = ioasid::Table::for_device(&spaces[guest], &device).unwrap();
            device.attach(&table).unwrap();
            std::thread::yield_now();
        }
    });
    assert!(port.statistics().faults > 0, "{kind}");
}

#[test]
fn a_flood_of_faults_drowns_nobody_else_and_keeps_its_beginning() {
    let machine = Machine::new();
    let space = Space::new(&machine.bus);
    let (noisy, quiet) =
        (machine.attached(TableKind::X86_64, &space), machine.attached(TableKind::X86_64, &space));
    let flood = FAULT_LOG_RECORDS as u64 + 1000;
    for number in 0..flood {
        noisy.read(AT + number * K4).unwrap_err();
    }
    quiet.write(0x42_0000, 1).unwrap_err();
    assert_eq!(only(&quiet.port).fault, fault(0x42_0000, true, DmaFaultReason::NotMapped));
    let log = noisy.port.take_faults();
    assert_eq!((log.records.len() as u64 + log.dropped, noisy.faults()), (flood, flood));
    for (number, record) in (0..).zip(&log.records) {
        assert_eq!(record.fault.iova, AT + number * K4);
    }
    // What was taken has made room.
    noisy.read(AT).unwrap_err();
    assert_eq!(only(&noisy.port).fault.iova, AT);
}
