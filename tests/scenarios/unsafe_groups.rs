//! Unsafe groups: a device whose neighbour behind the same bridge is somebody else's.
//!
//! Who asks: whoever passes a device to a guest and reads "group 7 is not viable", without a word on which of its eleven devices it is.
//! And whoever would like to have only one function of a card, and wonders why that is not for him to decide.
//!
//! - VFIO type1: the group is opened first, and bound as a whole. "Group is not viable" is all that is said; which driver is in
//!   the way has to be found in sysfs.
//! - iommufd: binding a device claims its group's DMA ownership; a device of it with a driver makes that `EBUSY` or `EPERM`.
//!   Nothing else is said either.
//! - Here binding a device asks for the whole group in one step, and blocks it. What is refused names the device in the way and what it
//!   is doing. There is no object for a group that anybody has to open.

use crate::machine::{Function, K4, Machine, RW, beside, number_pages};
use crate::program::{BUFFER, FIXED, PAGE, Program, READ, WRITE};
use ioasid::{
    Account, AttachError, Bus, Device, DeviceError, DeviceOwner, DriverClaim, InTheWay, Iova, Rid, Space,
    Table,
};
use ioasid_server::{Errno, Server, ServerOptions};
use ioasid_soft::dma::DmaFaultReason;
use ioasid_soft::iommu::{Bridge, SoftIommu, TableKind, Topology};
use std::sync::Arc;

const AT: u64 = 0x10_0000;
/// Two devices on the conventional bus 2, whose bridge speaks for them.
const SOUND: Rid = Rid(0x0208);
const MODEM: Rid = Rid(0x0210);
/// Two functions of a card that does not keep them apart.
const DISK: Rid = Rid(0x0310);
const NETWORK: Rid = Rid(0x0311);
/// Below a port that sends everything up.
const GRAPHICS: Rid = Rid(0x0400);

fn machine() -> Machine {
    let port = Bridge::Port { acs: true };
    let topology = Topology::new()
        .bridge(Rid(0x00e0), 1, port)
        .and_then(|topology| topology.bridge(Rid(0x0100), 2, Bridge::ToConventional))
        .and_then(|topology| topology.bridge(Rid(0x00e1), 3, port))
        .and_then(|topology| topology.bridge(Rid(0x00e2), 4, port));
    let iommu = SoftIommu::with_topology(topology.unwrap().shared_functions(DISK));
    Machine::of(&Bus::new(), &iommu)
}

fn bind(machine: &Machine, rid: Rid, owner: &DeviceOwner) -> Result<Device, DeviceError> {
    Device::bind(machine.iommu.clone(), rid, owner)
}

/// A space whose page at [`AT`] has a number.
fn space(machine: &Machine, number: u64) -> (Arc<Space>, Arc<ioasid::Memory>) {
    let memory = machine.memory(K4, &Account::new("guest", None));
    number_pages(&memory, [0], |_| number);
    let space = Space::new(&machine.bus);
    space.map(Iova::new(AT), &memory, 0, K4, RW).unwrap();
    (space, memory)
}

#[test]
fn a_group_that_is_not_viable_says_who_is_in_the_way() {
    let machine = machine();
    for rid in [SOUND, MODEM, DISK, NETWORK, GRAPHICS] {
        machine.iommu.add_device(rid, TableKind::VtdSecondStage).unwrap();
    }
    let (guest, other) = (DeviceOwner::new("the guest"), DeviceOwner::new("another guest"));
    // The host's disk driver works on one function of the card.
    let driver = DriverClaim::new(machine.iommu.clone(), DISK, "nvme").unwrap();
    let refused = bind(&machine, NETWORK, &guest).unwrap_err();
    let because = InTheWay::Driven { driver: "nvme".to_owned() };
    assert_eq!(refused, DeviceError::NotViable { device: NETWORK, member: DISK, because });
    let said = refused.to_string();
    assert!(said.contains("03:02.1") && said.contains("03:02.0") && said.contains("nvme"), "{said}");
    // A driver that does no DMA is in nobody's way.
    drop(driver);
    let stub = DriverClaim::without_dma(machine.iommu.clone(), DISK, "pci-stub").unwrap();
    let network = bind(&machine, NETWORK, &guest).unwrap();
    drop(stub);
    // Nobody else gets a part of the card, driver or guest, until the guest has let go of all of it.
    let disk = bind(&machine, DISK, &guest).unwrap();
    drop(network);
    let refused = bind(&machine, NETWORK, &other).unwrap_err();
    let because = InTheWay::Bound { owner: "the guest".to_owned() };
    assert_eq!(refused, DeviceError::NotViable { device: NETWORK, member: DISK, because });
    assert!(DriverClaim::new(machine.iommu.clone(), NETWORK, "ixgbe").is_err());
    drop(disk);
    bind(&machine, NETWORK, &other).unwrap();
    // A device of its own was never concerned.
    assert_eq!(bind(&machine, GRAPHICS, &guest).unwrap().group(), [GRAPHICS]);
}

/// Behind the bridge there is one requester ID. Whoever has one device has both, and they go one way.
#[test]
fn what_cannot_be_told_apart_goes_one_way_or_is_blocked() {
    let machine = machine();
    let ports = [SOUND, MODEM].map(|rid| machine.iommu.add_device(rid, TableKind::VtdSecondStage).unwrap());
    let guest = DeviceOwner::new("the guest");
    let [sound, modem] = [0, 1].map(|number| {
        let device = bind(&machine, [SOUND, MODEM][number], &guest).unwrap();
        Function { kind: TableKind::VtdSecondStage, device, port: ports[number].clone() }
    });
    // Bound is not attached: neither reaches anything.
    assert_eq!([&sound, &modem].map(|function| function.read(AT)), [Err(DmaFaultReason::Blocked); 2]);
    let ((one, _one_memory), (two, _two_memory)) = (space(&machine, 1), space(&machine, 2));
    sound.attach(&one);
    // The bridge makes requests for both, so the other one is there too; elsewhere it cannot be.
    assert_eq!((sound.read(AT), modem.read(AT)), (Ok(1), Ok(1)));
    let refused = modem.device.attach(&Table::for_device(&two, &modem.device).unwrap()).unwrap_err();
    assert!(matches!(refused, AttachError::SharedRequester { device: MODEM, other: SOUND, .. }), "{refused}");
    assert_eq!(modem.read(AT), Ok(1));
    modem.attach(&one);
    // Once both are there, either takes the other along, and the other one's requests find the one space or the other.
    let neighbour = |_| assert!(matches!(modem.read(AT), Ok(1 | 2)));
    beside(&[&neighbour], || {
        for round in 0..200 {
            sound.attach([&two, &one][round % 2]);
        }
    });
    assert_eq!(modem.read(AT), Ok(1));
    sound.device.detach();
    assert_eq!(modem.read(AT), Ok(1), "it is attached itself");
    modem.device.detach();
    assert_eq!([&sound, &modem].map(|function| function.read(AT)), [Err(DmaFaultReason::Blocked); 2]);
    // What a device model does with the modem after its guest has gone reaches nothing.
    drop((sound, modem.device));
    assert!(modem.port.statistics().faults >= 2);
}

/// Functions that reach each other past the IOMMU are in one address space, unless their owner says that he knows.
#[test]
fn functions_that_reach_each_other_share_a_space() {
    let machine = machine();
    let ports = [DISK, NETWORK].map(|rid| machine.iommu.add_device(rid, TableKind::X86_64).unwrap());
    let ((one, _one_memory), (two, _two_memory)) = (space(&machine, 1), space(&machine, 2));
    for (owner, apart) in [(DeviceOwner::new("guest"), false), (DeviceOwner::accepting_peers("guest"), true)]
    {
        let devices = [DISK, NETWORK].map(|rid| bind(&machine, rid, &owner).unwrap());
        devices[0].attach(&Table::for_device(&one, &devices[0]).unwrap()).unwrap();
        let attached = devices[1].attach(&Table::for_device(&two, &devices[1]).unwrap());
        if apart {
            attached.unwrap();
        } else {
            let refused = attached.unwrap_err();
            assert!(
                matches!(refused, AttachError::NotIsolated { device: NETWORK, other: DISK }),
                "{refused}"
            );
        }
        let mut bytes = [0; 8];
        let seen = ports.each_ref().map(|port| {
            use ioasid_soft::dma::DmaPort;
            port.read(AT, &mut bytes).map(|()| u64::from_le_bytes(bytes)).map_err(|fault| fault.reason)
        });
        assert_eq!(seen, [Ok(1), if apart { Ok(2) } else { Err(DmaFaultReason::Blocked) }]);
    }
}

/// The same for two programs at `/dev/vfio` and `/dev/iommu`.
#[test]
fn a_group_is_bound_to_one_open_iommufd() {
    let devices = ["edu:bus=2", "edu:bus=2"].map(|device| device.parse().unwrap()).to_vec();
    let server = Server::new(ServerOptions { devices, ..Default::default() }).unwrap();
    let (one, other) = (Program::of(&server), Program::of(&server));
    let (iommu, others) = (one.iommu(), other.iommu());
    let device = one.bind_device(iommu, 0);
    let neighbour = other.open("/dev/vfio/devices/vfio1");
    assert_eq!(other.bind_at(neighbour, others), Err(Errno::PERM));
    let ioas = one.ioas(iommu);
    one.attach(&device, ioas).unwrap();
    one.map_flags(iommu, ioas, FIXED | READ | WRITE, BUFFER, PAGE, 0).unwrap();
    one.put(BUFFER, b"mine").unwrap();
    one.device_copies(&device, 0, 8, 4);
    assert_eq!(one.get(BUFFER + 8, 4).unwrap(), b"mine");
    one.close(device.fd).unwrap();
    assert!(other.bind_at(neighbour, others).is_ok());
}
