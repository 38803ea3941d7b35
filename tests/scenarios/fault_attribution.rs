//! Fault attribution: whose DMA was it, where, with what PASID, and what was it about to do?
//!
//! Who asks: whoever has to tell a guest about its device's fault, and gets "DMAR: fault addr 0x0" in the host's log instead.
//!
//! - VFIO type1: the host's kernel prints a line. The user learns nothing.
//! - iommufd: a fault object reports recoverable faults (PRI) with the device's number and the PASID; others go to the host's log.
//! - Here the log is the device's own: each record has the requester ID, the PASID if there was one, the first address that could
//!   not be reached, the direction and the reason. A device that floods its log fills no other one, and what came first stays.
//!
//! The *cookie* of the RFC is what the user gave when a PASID was allocated: the record's PASID leads to it.

use crate::machine::{Function, K4, Machine, RW, range};
use ioasid::pasid::{Limit, Owner, Pasid, PasidSystem, Spid};
use ioasid::{Account, Iova, Permissions, Space};
use ioasid_soft::dma::{DmaFault, DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{FAULT_LOG_RECORDS, FaultRecord, Port, TableKind};
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
        let devices = [0, 1].map(|_| machine.attached(kind, &space));
        space.map(Iova::new(AT), &memory, 0, K4, RW).unwrap();
        space.map(Iova::new(AT + K4), &memory, K4, K4, Permissions::READ).unwrap();
        let [one, two] = &devices;
        let record = |function: &Function, fault| {
            let record = FaultRecord { device: function.device.rid(), pasid: None, fault };
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
    let function = machine.device(TableKind::VtdSecondStage);
    let processes: Vec<(Pasid, u64, Arc<Port>)> = (0..3u32)
        .map(|process| {
            let cookie = 0xc00c_1e00 + u64::from(process);
            let pasid = guest.allocate(1..=u32::MAX, cookie).unwrap();
            let space = Space::new(&machine.bus);
            let table = ioasid::Table::for_device(&space, &function.device).unwrap();
            let number = Spid::new(100 + process).unwrap();
            guest.set_spid(pasid, Some(number)).unwrap();
            function.device.attach_pasid(number, guest.bind(pasid).unwrap(), &table).unwrap();
            (pasid, cookie, machine.iommu.port_with_pasid(function.device.rid(), pasid).unwrap())
        })
        .collect();
    for (process, (pasid, cookie, port)) in (0..).zip(&processes) {
        let at = AT + process * K4;
        port.write(at, &[1]).unwrap_err();
        let record = only(port);
        assert_eq!((record.device, record.pasid), (function.device.rid(), Some(*pasid)));
        assert_eq!(record.fault, fault(at, true, DmaFaultReason::NotMapped));
        // What the user is told: its own cookie, its own number, its own machine.
        let status = system.lookup(record.pasid.unwrap()).unwrap();
        assert_eq!((status.data, status.owner), (*cookie, Owner::Machine(7)));
        assert_eq!(status.spid, Spid::new(100 + process as u32));
        assert!(record.to_string().contains(&format!("PASID {pasid}")), "{record}");
    }
    // Requests without a PASID are somebody else's.
    function.port.read(AT, &mut [0]).unwrap_err();
    assert_eq!(only(&function.port).pasid, None);
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
