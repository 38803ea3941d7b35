//! Devices of one group that are attached to one table leave it together, all or none.

mod double;

use double::connected::Connected;
use double::{Call, DERIVED, DERIVED_TOO, Double, NATIVE, PARTICULAR, SMALL, also_reserved, interrupts};
use ioasid::{
    Account, AttachError, Backing, Bus, Device, DeviceOwner, Iova, IovaRange, Memory, Permissions, Rid,
    Space, Table,
};
use std::sync::Arc;

const PAGE: u64 = 4096;
/// They walk tables of one kind. The first two have one requester ID; the third takes fewer addresses.
const TOGETHER: [Rid; 3] = [DERIVED, DERIVED_TOO, PARTICULAR];

/// A group, and two spaces for it.
struct World {
    bus: Arc<Bus>,
    iommu: Arc<Connected>,
    spaces: [Arc<Space>; 2],
}

impl World {
    fn new() -> World {
        let bus = Bus::new();
        let members = [&TOGETHER[..], &[NATIVE, SMALL]].concat();
        let iommu = Connected::new(Double::new(), &members, || {});
        let spaces = [Space::new(&bus), Space::new(&bus)];
        World { bus, iommu, spaces }
    }

    fn bind(&self, rid: Rid, owner: &DeviceOwner) -> Device {
        Device::bind(self.iommu.clone(), rid, owner).unwrap()
    }

    /// The three that can go together, attached to one table of the first space.
    fn attached(&self, owner: &DeviceOwner) -> ([Device; 3], Arc<Table>) {
        let devices = TOGETHER.map(|rid| self.bind(rid, owner));
        let table = Table::for_device(&self.spaces[0], &devices[0]).unwrap();
        devices.iter().for_each(|device| device.attach(&table).unwrap());
        (devices, table)
    }

    /// Whether the engine and the IOMMU say that the device is there, or at none.
    fn is_at(&self, device: &Device, table: Option<&Arc<Table>>) -> bool {
        let both = [device.table(), self.iommu.table_of(device.rid())];
        both.iter().all(|there| there.as_ref().map(Arc::as_ptr) == table.map(Arc::as_ptr))
    }

    fn reserved(&self) -> [Vec<IovaRange>; 2] {
        self.spaces.each_ref().map(|space| {
            let mut ranges = space.reserved_ranges();
            ranges.dedup();
            ranges
        })
    }
}

fn guest() -> DeviceOwner {
    DeviceOwner::new("the guest")
}

#[test]
fn whoever_is_moved_takes_the_others_along() {
    let world = World::new();
    let (devices, mut table) = world.attached(&guest());
    let reserved = world.reserved();
    assert!(reserved[0].contains(&also_reserved()) && !reserved[1].contains(&also_reserved()));
    for (round, moved) in devices.iter().enumerate() {
        let space = &world.spaces[(round + 1) % 2];
        let next = Table::for_device(space, moved).unwrap();
        moved.attach(&next).unwrap();
        assert!(devices.iter().all(|device| world.is_at(device, Some(&next))));
        // Nobody but the devices has held the table that they have left.
        assert_eq!(Arc::strong_count(&table), 1);
        table = next;
        let [here, there] = world.reserved();
        let (here, there) = if round % 2 == 0 { (there, here) } else { (here, there) };
        assert_eq!([&here, &there], [&reserved[0], &reserved[1]]);
    }
    // Where it is already it moves nobody.
    let switches = &world.iommu.double.switches;
    switches.fail(Call::Attach, 2);
    devices[1].attach(&table).unwrap();
    assert!(!switches.has_failed(Call::Attach));
    // To another table of the same space, too; and what was taken along is detached for itself.
    let another = Table::new(table.space(), &devices[0]).unwrap();
    devices[0].attach(&another).unwrap();
    assert!(devices.iter().all(|device| world.is_at(device, Some(&another))));
    devices[0].detach();
    assert!(devices[0].table().is_none() && world.is_at(&devices[1], Some(&another)));
    devices[1].detach();
    assert!(world.is_at(&devices[0], None) && world.is_at(&devices[2], Some(&another)));
    drop((devices, table, another));
    assert_eq!(world.reserved(), [const { Vec::new() }; 2]);
}

#[test]
fn all_move_or_none() {
    let world = World::new();
    let (devices, table) = world.attached(&guest());
    let elsewhere = Table::for_device(&world.spaces[1], &devices[0]).unwrap();
    let reserved = world.reserved();
    let stayed = |why: &str| {
        assert!(devices.iter().all(|device| world.is_at(device, Some(&table))), "{why}");
        assert_eq!(world.reserved(), reserved, "{why}");
    };
    let switches = &world.iommu.double.switches;
    for moved in &devices {
        for number in 1..=3 {
            switches.fail(Call::Attach, number);
            assert!(matches!(moved.attach(&elsewhere), Err(AttachError::Table(_))));
            assert!(switches.has_failed(Call::Attach));
            stayed(&format!("call {number} has failed"));
        }
    }
    // One of them cannot have a mapping that is there.
    let backing = Backing::anonymous(&world.bus, PAGE).unwrap();
    let memory = Memory::register(&backing, 0, PAGE, &Account::new("guest", None)).unwrap();
    let at = Iova::new(also_reserved().first());
    world.spaces[1].map(at, &memory, 0, PAGE, Permissions::READ).unwrap();
    assert!(matches!(devices[0].attach(&elsewhere), Err(AttachError::Mapped { .. })));
    stayed("one has no place there");
    world.spaces[1].unmap(IovaRange::with_length(at.get(), PAGE).unwrap()).unwrap();
    devices[0].attach(&elsewhere).unwrap();
    assert!(devices.iter().all(|device| world.is_at(device, Some(&elsewhere))));
}

/// The IOMMU moves the first, refuses the second, and refuses to have the first back: that one is nowhere, and known to be.
#[test]
fn what_cannot_be_sent_back_is_blocked() {
    let world = World::new();
    for (moved, blocked) in [(0, [true, true, false]), (2, [false, false, true])] {
        let (devices, table) = world.attached(&guest());
        let elsewhere = Table::for_device(&world.spaces[1], &devices[0]).unwrap();
        let switches = &world.iommu.double.switches;
        switches.fail(Call::Attach, 2);
        switches.fail_any(2);
        assert!(matches!(devices[moved].attach(&elsewhere), Err(AttachError::Table(_))));
        assert!(switches.has_failed(Call::Attach) && switches.any_has_failed());
        for (device, blocked) in devices.iter().zip(blocked) {
            assert!(world.is_at(device, (!blocked).then_some(&table)), "{device:?}");
        }
        // They can be attached again where the rest of the group is.
        devices.iter().for_each(|device| device.attach(&table).unwrap());
        assert!(devices.iter().all(|device| world.is_at(device, Some(&table))));
    }
    assert!(world.reserved().iter().all(|reserved| !reserved.contains(&interrupts())));
}

/// Who accepts that devices are in different spaces moves one at a time, but for those that make requests with one ID.
#[test]
fn an_owner_who_accepts_peers_moves_only_what_cannot_be_apart() {
    let world = World::new();
    let (devices, table) = world.attached(&DeviceOwner::accepting_peers("the daring guest"));
    let elsewhere = Table::for_device(&world.spaces[1], &devices[0]).unwrap();
    devices[2].attach(&elsewhere).unwrap();
    assert!(world.is_at(&devices[2], Some(&elsewhere)));
    assert!(devices[..2].iter().all(|device| world.is_at(device, Some(&table))));
    devices[2].attach(&table).unwrap();
    devices[1].attach(&elsewhere).unwrap();
    assert!(devices[..2].iter().all(|device| world.is_at(device, Some(&elsewhere))));
    assert!(world.is_at(&devices[2], Some(&table)));
}

/// A device on a table of another kind cannot follow: it is named, and everything stays where it is.
#[test]
fn a_device_on_another_table_stays_and_is_in_the_way_of_another_space() {
    let world = World::new();
    let owner = guest();
    let (devices, table) = world.attached(&owner);
    let other = world.bind(NATIVE, &owner);
    let native = Table::for_device(&world.spaces[0], &other).unwrap();
    other.attach(&native).unwrap();
    let elsewhere = Table::for_device(&world.spaces[1], &devices[0]).unwrap();
    for device in &devices {
        let refused = device.attach(&elsewhere).unwrap_err();
        assert!(matches!(refused, AttachError::NotIsolated { other: NATIVE, .. }), "{refused}");
    }
    assert!(devices.iter().all(|device| world.is_at(device, Some(&table))));
    // Within the space they may go.
    let another = Table::new(&world.spaces[0], &devices[0]).unwrap();
    devices[1].attach(&another).unwrap();
    assert!(devices.iter().all(|device| world.is_at(device, Some(&another))));
    assert!(world.is_at(&other, Some(&native)));
    other.detach();
    devices[2].attach(&elsewhere).unwrap();
    assert!(devices.iter().all(|device| world.is_at(device, Some(&elsewhere))));
}

/// A device that was attached to nothing moves nobody: it comes to where the others are, or not at all.
#[test]
fn who_joins_moves_nobody() {
    let world = World::new();
    let owner = guest();
    let [one, two] = [DERIVED, DERIVED_TOO].map(|rid| world.bind(rid, &owner));
    let [here, there] = world.spaces.each_ref().map(|space| Table::for_device(space, &one).unwrap());
    one.attach(&here).unwrap();
    let refused = two.attach(&there).unwrap_err();
    assert!(matches!(refused, AttachError::SharedRequester { device: DERIVED_TOO, other: DERIVED, .. }));
    assert!(two.table().is_none() && world.is_at(&one, Some(&here)));
    // What is not attached is taken nowhere, and what is unbound knows no table.
    one.attach(&there).unwrap();
    assert!(two.table().is_none());
    two.attach(&there).unwrap();
    one.unbind();
    assert!(one.table().is_none() && world.is_at(&two, Some(&there)));
}
