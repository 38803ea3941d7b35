//! Devices that an IOMMU cannot keep apart: who may have them, and where their DMA goes.

mod coherency;
mod topology;

use ioasid::{
    Account, AttachError, Backing, Bus, Device, DeviceError, DeviceOwner, DriverClaim, InTheWay, Iommu, Iova,
    Memory, Permissions, Rid, Space, Table,
};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{Bridge, PlugError, Port, SoftIommu, TableKind, Topology};
use std::sync::{Arc, Mutex};

const AT: u64 = 0x1000_0000;
const PAGE: u64 = 4096;

/// The bus behind a bridge to conventional PCI, and two devices there.
const CONVENTIONAL: u8 = 2;
const SOUND: Rid = Rid(0x0208);
const MODEM: Rid = Rid(0x0210);
/// Two functions of a device that does not keep them apart.
const DISK: Rid = Rid(0x0310);
const NETWORK: Rid = Rid(0x0311);
/// A device of its own.
const GRAPHICS: Rid = Rid(0x0400);

fn topology() -> Topology {
    let port = Bridge::Port { acs: true };
    Topology::new()
        .bridge(Rid(0x00e0), 1, port)
        .and_then(|topology| topology.bridge(Rid(0x0100), CONVENTIONAL, Bridge::ToConventional))
        .and_then(|topology| topology.bridge(Rid(0x00e1), 3, port))
        .and_then(|topology| topology.bridge(Rid(0x00e2), 4, port))
        .unwrap()
        .shared_functions(NETWORK)
}

struct Machine {
    bus: Arc<Bus>,
    iommu: Arc<SoftIommu>,
    /// What is mapped is so as long as it is registered.
    memories: Mutex<Vec<Arc<Memory>>>,
}

impl Machine {
    fn new() -> Machine {
        Machine { bus: Bus::new(), iommu: SoftIommu::with_topology(topology()), memories: Mutex::default() }
    }

    fn plug(&self, rid: Rid) -> Arc<Port> {
        self.iommu.add_device(rid, TableKind::VtdSecondStage).unwrap()
    }

    fn plug_all(&self) -> [Arc<Port>; 5] {
        [SOUND, MODEM, DISK, NETWORK, GRAPHICS].map(|rid| self.plug(rid))
    }

    fn bind(&self, rid: Rid, owner: &DeviceOwner) -> Result<Device, DeviceError> {
        Device::bind(self.iommu.clone(), rid, owner)
    }

    /// A space with one page.
    fn space(&self) -> Arc<Space> {
        let backing = Backing::anonymous(&self.bus, PAGE).unwrap();
        let memory = Memory::register(&backing, 0, PAGE, &Account::new("guest", None)).unwrap();
        let space = Space::new(&self.bus);
        space.map(Iova::new(AT), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        self.memories.lock().unwrap().push(memory);
        space
    }
}

fn table(space: &Arc<Space>, device: &Device) -> Arc<Table> {
    Table::for_device(space, device).unwrap()
}

fn attach(device: &Device, space: &Arc<Space>) -> Result<(), AttachError> {
    device.attach(&table(space, device))
}

/// Writes a byte, and says why not.
fn write(port: &Port, byte: u8) -> Result<(), DmaFaultReason> {
    port.write(AT, &[byte]).map_err(|fault| fault.reason)
}

fn read(port: &Port) -> Result<u8, DmaFaultReason> {
    let mut byte = [0];
    port.read(AT, &mut byte).map(|()| byte[0]).map_err(|fault| fault.reason)
}

const BLOCKED: Result<(), DmaFaultReason> = Err(DmaFaultReason::Blocked);

#[test]
fn a_device_of_its_own_is_a_group_of_one() {
    let machine = Machine::new();
    let [.., graphics] = machine.plug_all();
    let device = Device::new(machine.iommu.clone(), GRAPHICS).unwrap();
    assert_eq!(device.group(), [GRAPHICS]);
    attach(&device, &machine.space()).unwrap();
    assert_eq!(write(&graphics, 1), Ok(()));
    // Nobody else is concerned.
    let other = machine.bind(DISK, &DeviceOwner::new("somebody else")).unwrap();
    drop(device);
    assert_eq!(write(&graphics, 1), BLOCKED);
    assert_eq!(other.group(), [DISK, NETWORK]);
}

#[test]
fn a_group_has_one_owner_until_its_last_device_is_unbound() {
    let machine = Machine::new();
    machine.plug_all();
    let (guest, other) = (DeviceOwner::new("the guest"), DeviceOwner::new("the other guest"));
    let disk = machine.bind(DISK, &guest).unwrap();
    let network = machine.bind(NETWORK, &guest).unwrap();
    assert_eq!(machine.bind(DISK, &guest).unwrap_err(), DeviceError::Taken(DISK));
    drop(disk);
    let refused = machine.bind(DISK, &other).unwrap_err();
    let because = InTheWay::Bound { owner: "the guest".to_owned() };
    assert_eq!(refused, DeviceError::NotViable { device: DISK, member: NETWORK, because });
    assert_eq!(
        refused.to_string(),
        "device 03:02.0 cannot be had: 03:02.1, in its group, is bound by the guest; unbind it there, or bind all \
         devices of the group with one owner"
    );
    // An owner is itself, whatever it is called.
    assert!(machine.bind(DISK, &DeviceOwner::new("the guest")).is_err());
    drop(network);
    machine.bind(DISK, &other).unwrap();
}

#[test]
fn what_is_unbound_is_free_although_somebody_still_looks_at_it() {
    let machine = Machine::new();
    let [.., graphics] = machine.plug_all();
    let (guest, other) = (DeviceOwner::new("the guest"), DeviceOwner::new("the other guest"));
    let space = machine.space();
    let device = machine.bind(GRAPHICS, &guest).unwrap();
    attach(&device, &space).unwrap();
    device.unbind();
    assert_eq!(write(&graphics, 1), BLOCKED);
    assert!(device.table().is_none());
    assert!(matches!(attach(&device, &space), Err(AttachError::Unbound(GRAPHICS))));
    let next = machine.bind(GRAPHICS, &other).unwrap();
    attach(&next, &space).unwrap();
    // That the first owner lets go for good, and more than once, is nothing to the next one.
    device.unbind();
    drop(device);
    assert_eq!(write(&graphics, 1), Ok(()));
    assert_eq!(machine.bind(GRAPHICS, &guest).unwrap_err(), DeviceError::Taken(GRAPHICS));
}

#[test]
fn a_driver_that_does_dma_is_in_the_way_of_its_neighbours_owner_and_the_other_way_round() {
    let machine = Machine::new();
    machine.plug_all();
    let guest = DeviceOwner::new("the guest");
    let driver = DriverClaim::new(machine.iommu.clone(), DISK, "nvme").unwrap();
    // Drivers of the machine are among themselves.
    drop(DriverClaim::new(machine.iommu.clone(), NETWORK, "e1000e").unwrap());
    for wanted in [DISK, NETWORK] {
        let because = InTheWay::Driven { driver: "nvme".to_owned() };
        let refused = machine.bind(wanted, &guest).unwrap_err();
        assert_eq!(refused, DeviceError::NotViable { device: wanted, member: DISK, because });
        assert!(refused.to_string().ends_with("is driven by nvme; take it from that driver first"));
    }
    drop(driver);
    let stub = DriverClaim::without_dma(machine.iommu.clone(), DISK, "pci-stub").unwrap();
    let network = machine.bind(NETWORK, &guest).unwrap();
    drop(stub);
    assert!(matches!(
        DriverClaim::new(machine.iommu.clone(), DISK, "nvme").unwrap_err(),
        DeviceError::NotViable { device: DISK, member: NETWORK, because: InTheWay::Bound { .. } }
    ));
    drop(network);
    drop(DriverClaim::new(machine.iommu.clone(), DISK, "nvme").unwrap());
    assert_eq!(
        DriverClaim::new(machine.iommu.clone(), Rid(0x0918), "nvme").unwrap_err(),
        DeviceError::Unknown(Rid(0x0918))
    );
}

#[test]
fn each_device_of_a_group_is_blocked_until_its_own_attach() {
    let machine = Machine::new();
    let [_, _, disk_port, network_port, _] = machine.plug_all();
    let guest = DeviceOwner::new("the guest");
    let space = machine.space();
    let disk = machine.bind(DISK, &guest).unwrap();
    attach(&disk, &space).unwrap();
    assert_eq!((write(&disk_port, 5), write(&network_port, 6)), (Ok(()), BLOCKED));
    // A bind of the second changes nothing for the first.
    let network = machine.bind(NETWORK, &guest).unwrap();
    assert_eq!((write(&disk_port, 7), write(&network_port, 8)), (Ok(()), BLOCKED));
    attach(&network, &space).unwrap();
    assert_eq!((read(&network_port), write(&network_port, 9)), (Ok(7), Ok(())));
    disk.detach();
    assert_eq!((write(&disk_port, 1), read(&network_port)), (BLOCKED, Ok(9)));
    drop(network);
    assert_eq!(write(&network_port, 1), BLOCKED);
}

#[test]
fn a_bind_blocks_what_somebody_has_left_open() {
    let machine = Machine::new();
    let [_, _, _, network_port, graphics_port] = machine.plug_all();
    let space = machine.space();
    // Past the engine, as a machine may find its devices when it starts.
    let device = machine.bind(GRAPHICS, &DeviceOwner::new("nobody")).unwrap();
    let shared = table(&space, &device);
    for rid in [NETWORK, GRAPHICS] {
        machine.iommu.attach(rid, &shared).unwrap();
    }
    assert_eq!((write(&network_port, 1), write(&graphics_port, 1)), (Ok(()), Ok(())));
    let disk = machine.bind(DISK, &DeviceOwner::new("the guest")).unwrap();
    assert_eq!((write(&network_port, 1), write(&graphics_port, 1)), (BLOCKED, Ok(())));
    drop(disk);
}

#[test]
fn devices_that_reach_each_other_share_a_space_unless_their_owner_accepts_otherwise() {
    let machine = Machine::new();
    let [_, _, disk_port, network_port, _] = machine.plug_all();
    let spaces = [machine.space(), machine.space()];
    let guest = DeviceOwner::new("the guest");
    {
        let (disk, network) = (machine.bind(DISK, &guest).unwrap(), machine.bind(NETWORK, &guest).unwrap());
        attach(&disk, &spaces[0]).unwrap();
        let refused = attach(&network, &spaces[1]).unwrap_err();
        assert!(matches!(refused, AttachError::NotIsolated { device: NETWORK, other: DISK }));
        assert!(refused.to_string().contains("reach each other past the IOMMU"));
        // Another table of the same space is no other space, and a device alone may move.
        network.attach(&Table::new(&spaces[0], &network).unwrap()).unwrap();
        // It is no other one's way, either, so that neither takes the other along.
        assert!(matches!(attach(&disk, &spaces[1]), Err(AttachError::NotIsolated { .. })));
        assert!(Arc::ptr_eq(disk.table().unwrap().space(), &spaces[0]));
        network.detach();
        attach(&disk, &spaces[1]).unwrap();
        attach(&network, &spaces[1]).unwrap();
        // On one table they move together.
        attach(&disk, &spaces[0]).unwrap();
        assert!(Arc::ptr_eq(network.table().unwrap().space(), &spaces[0]));
        assert_eq!((write(&disk_port, 5), read(&network_port)), (Ok(()), Ok(5)));
    }
    let guest = DeviceOwner::accepting_peers("the daring guest");
    let (disk, network) = (machine.bind(DISK, &guest).unwrap(), machine.bind(NETWORK, &guest).unwrap());
    attach(&disk, &spaces[0]).unwrap();
    attach(&network, &spaces[1]).unwrap();
    assert_eq!((write(&disk_port, 3), write(&network_port, 4)), (Ok(()), Ok(())));
    assert_eq!((read(&disk_port), read(&network_port)), (Ok(3), Ok(4)));
}

#[test]
fn behind_a_bridge_the_first_attach_is_everybodys() {
    let machine = Machine::new();
    let [sound_port, modem_port, ..] = machine.plug_all();
    // Even who accepts peers cannot have what the IOMMU cannot tell apart in two places.
    let guest = DeviceOwner::accepting_peers("the guest");
    let spaces = [machine.space(), machine.space()];
    let sound = machine.bind(SOUND, &guest).unwrap();
    let modem = machine.bind(MODEM, &guest).unwrap();
    assert_eq!(sound.group(), [SOUND, MODEM]);
    assert_eq!(write(&modem_port, 1), BLOCKED);

    // The modem's requests come with the bridge's ID, as do those of the sound card.
    assert_eq!(modem_port.take_faults().records[0].device, Rid(0x0200));
    attach(&sound, &spaces[0]).unwrap();
    assert_eq!((write(&modem_port, 7), read(&sound_port)), (Ok(()), Ok(7)));

    // The modem goes nowhere else, not even to another table of the space, until the sound card has left.
    let refused = attach(&modem, &spaces[1]).unwrap_err();
    let bridge = Rid(0x0200);
    assert!(matches!(
        refused,
        AttachError::SharedRequester { device: MODEM, other: SOUND, requester } if requester == bridge
    ));
    assert_eq!(
        refused.to_string(),
        "device 02:02.0 cannot be attached apart from 02:01.0: both make requests as 02:00.0"
    );
    let own = Table::new(&spaces[0], &modem).unwrap();
    assert!(matches!(modem.attach(&own), Err(AttachError::SharedRequester { .. })));
    assert!(modem.table().is_none());

    // Alone, the sound card takes everybody along.
    attach(&sound, &spaces[1]).unwrap();
    assert_eq!((read(&modem_port), read(&sound_port)), (Ok(0), Ok(0)));
    attach(&modem, &spaces[1]).unwrap();
    // And so does each of them when both are attached.
    attach(&sound, &spaces[0]).unwrap();
    assert_eq!((read(&modem_port), read(&sound_port)), (Ok(7), Ok(7)));
    attach(&modem, &spaces[1]).unwrap();
    assert!(Arc::ptr_eq(sound.table().unwrap().space(), &spaces[1]));

    // The route stays until the last has left it.
    sound.detach();
    assert_eq!((write(&modem_port, 2), read(&sound_port)), (Ok(()), Ok(2)));
    drop(modem);
    assert_eq!((write(&modem_port, 3), write(&sound_port, 3)), (BLOCKED, BLOCKED));
    assert_eq!(spaces.each_ref().map(|space| space.statistics().tables), [1, 0]);
}

/// Nobody can tell whose request it was, so a cookie is said only if it is that of all who may have made it.
#[test]
fn behind_a_bridge_a_fault_says_a_cookie_that_all_have() {
    let machine = Machine::new();
    let [sound_port, modem_port, disk_port, ..] = machine.plug_all();
    let cookie = |port: &Port| {
        assert_eq!(write(port, 1), BLOCKED);
        port.take_faults().records.pop().unwrap().cookie
    };
    let guest = DeviceOwner::new("the guest");
    assert_eq!(cookie(&sound_port), None);
    let sound = machine.bind(SOUND, &guest).unwrap().with_cookie(7);
    assert_eq!([&sound_port, &modem_port].map(|port| cookie(port)), [Some(7); 2]);
    // It has none yet, then the same, then another one.
    let modem = machine.bind(MODEM, &guest).unwrap();
    assert_eq!(cookie(&sound_port), None);
    let modem = modem.with_cookie(7);
    assert_eq!([&sound_port, &modem_port].map(|port| cookie(port)), [Some(7); 2]);
    let modem = modem.with_cookie(8);
    assert_eq!([&sound_port, &modem_port].map(|port| cookie(port)), [None; 2]);
    assert_eq!((sound.cookie(), modem.cookie()), (Some(7), Some(8)));
    // Who is left can be told, and who comes next has no part in it.
    drop(sound);
    assert_eq!(cookie(&sound_port), Some(8));
    drop(modem);
    let next = machine.bind(SOUND, &DeviceOwner::new("the next guest")).unwrap();
    assert_eq!(cookie(&modem_port), None);
    drop(next);
    // Functions that have an ID each are told apart, and what is not bound has no cookie.
    let disk = machine.bind(DISK, &guest).unwrap().with_cookie(1);
    let network = machine.bind(NETWORK, &guest).unwrap().with_cookie(2);
    assert_eq!(cookie(&disk_port), Some(1));
    disk.unbind();
    assert_eq!(cookie(&disk_port), None);
    drop(network);
}

#[test]
fn behind_a_bridge_all_walk_tables_of_one_kind() {
    let machine = Machine::new();
    machine.plug(SOUND);
    let refused = machine.iommu.add_device(MODEM, TableKind::Native).unwrap_err();
    assert_eq!(refused, PlugError::SharedRequester { device: MODEM, other: SOUND, requester: Rid(0x0200) });
    assert_eq!(machine.iommu.add_device(SOUND, TableKind::Native).unwrap_err(), PlugError::RidTaken(SOUND));
    machine.plug(MODEM);
}

#[test]
fn pasids_are_for_devices_that_are_isolated() {
    use ioasid::pasid::{Limit, Owner, PasidSystem, Spid};
    let machine = Machine::new();
    machine.plug_all();
    let system = PasidSystem::new(1 << 20).unwrap();
    let limit = Limit::new(&system, "guests", None);
    let set = system.create_set(Owner::Machine(1), 10, &limit).unwrap();
    let pasid = set.allocate(1..=u32::MAX, 0).unwrap();
    let space = machine.space();
    let number = Spid::new(1).unwrap();
    let attach =
        |device: &Device| device.attach_pasid(number, set.bind(pasid).unwrap(), &table(&space, device));
    let (careful, daring) = (DeviceOwner::new("careful"), DeviceOwner::accepting_peers("daring"));
    attach(&machine.bind(GRAPHICS, &careful).unwrap()).unwrap();
    let refused = attach(&machine.bind(NETWORK, &careful).unwrap());
    assert!(matches!(refused, Err(AttachError::NotIsolated { device: NETWORK, other: DISK })));
    attach(&machine.bind(NETWORK, &daring).unwrap()).unwrap();
    // There is no way to say a PASID on conventional PCI.
    let refused = attach(&machine.bind(SOUND, &daring).unwrap());
    assert!(matches!(refused, Err(AttachError::NoPasids(SOUND))));
    assert!(machine.iommu.port_with_pasid(SOUND, pasid).is_none());
}
