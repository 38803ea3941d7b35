//! One device, many address spaces: requests with and without PASIDs, each on its own way.

use ioasid::pasid::{Limit, Owner, Pasid, PasidSet, PasidState, PasidSystem, Spid};
use ioasid::{
    Account, AttachError, Backing, Bus, Device, DeviceError, Iova, IovaRange, Memory, Permissions, Rid,
    Space, Table,
};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const AT: u64 = 0x1000_0000;
const PAGE: u64 = 4096;
const KINDS: [TableKind; 2] = [TableKind::Native, TableKind::VtdSecondStage];

/// A device that a guest drives, and the guest's PASIDs.
struct Machine {
    bus: Arc<Bus>,
    iommu: Arc<SoftIommu>,
    guest: PasidSet,
    /// What is mapped is so as long as it is registered.
    memories: Mutex<Vec<Arc<Memory>>>,
}

impl Machine {
    fn new() -> Machine {
        let system = PasidSystem::new(1 << 20).unwrap();
        let limit = Limit::new(&system, "guests", None);
        let guest = system.create_set(Owner::Machine(1), 1000, &limit).unwrap();
        Machine { bus: Bus::new(), iommu: SoftIommu::new(), guest, memories: Mutex::default() }
    }

    fn device(&self, rid: u16, kind: TableKind) -> (Device, Arc<Port>) {
        let port = self.iommu.add_device(Rid(rid), kind).unwrap();
        (Device::new(self.iommu.clone(), Rid(rid)).unwrap(), port)
    }

    /// A space with one page, which says `number` in its first byte.
    fn space(&self, number: u8) -> Arc<Space> {
        let backing = Backing::anonymous(&self.bus, PAGE).unwrap();
        let memory = Memory::register(&backing, 0, PAGE, &Account::new("guest", None)).unwrap();
        let space = Space::new(&self.bus);
        space.map(Iova::new(AT), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let port = self.iommu.add_device(Rid(0xff00 + u16::from(number)), TableKind::Native).unwrap();
        let writer = Device::new(self.iommu.clone(), port.rid()).unwrap();
        writer.attach(&Table::for_device(&space, &writer).unwrap()).unwrap();
        port.write(AT, &[number]).unwrap();
        self.memories.lock().unwrap().push(memory);
        space
    }

    fn pasid(&self) -> Pasid {
        self.guest.allocate(1..=u32::MAX, 0).unwrap()
    }

    fn port(&self, device: &Device, pasid: Pasid) -> Arc<Port> {
        self.iommu.port_with_pasid(device.rid(), pasid).unwrap()
    }
}

fn number(number: u32) -> Spid {
    Spid::new(number).unwrap()
}

fn table(space: &Arc<Space>, device: &Device) -> Arc<Table> {
    Table::for_device(space, device).unwrap()
}

/// What a request finds.
fn seen(port: &Port) -> Result<u8, DmaFaultReason> {
    let mut byte = [0];
    port.read(AT, &mut byte).map(|()| byte[0]).map_err(|fault| fault.reason)
}

const BLOCKED: Result<u8, DmaFaultReason> = Err(DmaFaultReason::Blocked);

#[test]
fn each_route_leads_to_its_own_space() {
    for kind in KINDS {
        let machine = Machine::new();
        let (device, plain) = machine.device(8, kind);
        let (other_device, _) = machine.device(9, kind);
        let (one, two) = (machine.pasid(), machine.pasid());
        let [port_one, port_two] = [one, two].map(|pasid| machine.port(&device, pasid));
        let spaces = [1, 2, 3].map(|number| machine.space(number));
        assert_eq!([&plain, &port_one, &port_two].map(|port| seen(port)), [BLOCKED; 3]);

        device.attach(&table(&spaces[0], &device)).unwrap();
        device
            .attach_pasid(number(5), machine.guest.bind(one).unwrap(), &table(&spaces[1], &device))
            .unwrap();
        assert_eq!([&plain, &port_one, &port_two].map(|port| seen(port)), [Ok(1), Ok(2), BLOCKED]);
        // The same number of another device's user is another PASID.
        let binding = machine.guest.bind(two).unwrap();
        other_device.attach_pasid(number(5), binding, &table(&spaces[2], &other_device)).unwrap();
        assert_eq!((device.pasid(number(5)), other_device.pasid(number(5))), (Some(one), Some(two)));
        assert_eq!((seen(&port_two), seen(&machine.port(&other_device, two))), (BLOCKED, Ok(3)));
        assert_eq!(seen(&machine.port(&other_device, one)), BLOCKED);

        // What is written down about a refusal names the device and the PASID.
        let log = port_two.take_faults();
        let last = log.records.last().unwrap();
        assert_eq!((last.device, last.pasid, last.cookie, last.space), (Rid(8), Some(two), None, None));
        assert!(last.to_string().starts_with("device 00:01.0 with PASID 2: "), "{last}");
        assert!(plain.take_faults().records.iter().all(|record| record.pasid.is_none()));

        // Routes end one by one.
        device.detach();
        assert_eq!([&plain, &port_one].map(|port| seen(port)), [BLOCKED, Ok(2)]);
        assert!(device.detach_pasid(number(5)) && !device.detach_pasid(number(5)));
        assert_eq!(seen(&port_one), BLOCKED);
        assert_eq!((device.pasid(number(5)), device.table_of_pasid(number(5)).is_none()), (None, true));
    }
}

#[test]
fn no_route_has_two_owners() {
    let machine = Machine::new();
    let (device, _) = machine.device(8, TableKind::VtdSecondStage);
    let (one, two) = (machine.pasid(), machine.pasid());
    let spaces = [1, 2].map(|number| machine.space(number));
    let tables = spaces.each_ref().map(|space| table(space, &device));
    let bind = |pasid| machine.guest.bind(pasid).unwrap();
    device.attach_pasid(number(5), bind(one), &tables[0]).unwrap();
    let port = machine.port(&device, one);

    // Neither the number nor the PASID can be used a second time; the binding that came goes again.
    for (wanted, pasid) in [(5, two), (6, one), (5, one)] {
        let refused = device.attach_pasid(number(wanted), bind(pasid), &tables[1]);
        assert!(matches!(refused, Err(AttachError::PasidTaken { pasid, .. }) if pasid == one), "{refused:?}");
        assert_eq!((seen(&port), machine.guest.lookup(one).unwrap().bindings), (Ok(1), 1));
    }
    assert_eq!(machine.guest.lookup(two).unwrap().state, PasidState::Idle);
    assert!(matches!(
        device.replace_pasid(number(6), &tables[1]),
        Err(AttachError::NoSuchPasid { number, .. }) if number == self::number(6)
    ));
    // A table of another kind of device is none for it.
    let (native, _) = machine.device(9, TableKind::Native);
    let foreign = table(&spaces[1], &native);
    assert!(matches!(device.replace_pasid(number(5), &foreign), Err(AttachError::Incompatible)));
    assert!(matches!(device.attach_pasid(number(6), bind(two), &foreign), Err(AttachError::Incompatible)));
    assert_eq!(seen(&port), Ok(1));

    // Nor has a device.
    let again = || Device::new(machine.iommu.clone(), Rid(8));
    assert_eq!(again().err(), Some(DeviceError::Taken(Rid(8))));
    assert_eq!(Device::new(machine.iommu.clone(), Rid(77)).err(), Some(DeviceError::Unknown(Rid(77))));
    assert_eq!(seen(&port), Ok(1));
    drop(device);
    assert_eq!(seen(&port), BLOCKED);
    assert!(again().is_ok());
}

/// Something is done with one of few numbers, a PASID and a space.
#[derive(Clone, Copy, Debug)]
enum Step {
    Attach(usize, usize, usize),
    Replace(usize, usize),
    Detach(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..4_usize, 0..4_usize, 0..3_usize).prop_map(|(name, pasid, space)| Step::Attach(name, pasid, space)),
        1 => (0..4_usize, 0..3_usize).prop_map(|(name, space)| Step::Replace(name, space)),
        2 => (0..4_usize).prop_map(Step::Detach),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// A PASID has one number and a number one PASID, and both are free again as soon as their route has gone.
    #[test]
    fn numbers_and_pasids_are_what_a_list_of_them_says(steps in proptest::collection::vec(step(), 1..60)) {
        let machine = Machine::new();
        let (device, _) = machine.device(8, TableKind::VtdSecondStage);
        let pasids = [(); 4].map(|()| machine.pasid());
        let tables = [1, 2, 3].map(|number| table(&machine.space(number), &device));
        let mut model: Vec<(usize, usize, usize)> = Vec::new();
        for step in steps {
            match step {
                Step::Attach(name, pasid, space) => {
                    let binding = machine.guest.bind(pasids[pasid]).unwrap();
                    let attached = device.attach_pasid(number(name as u32), binding, &tables[space]);
                    let mut taken = model.iter().filter(|route| route.0 == name || route.1 == pasid);
                    match attached {
                        Ok(()) => {
                            prop_assert!(taken.next().is_none());
                            model.push((name, pasid, space));
                        }
                        Err(AttachError::PasidTaken { pasid, number, .. }) => {
                            let named = |route: &(usize, usize, usize)| {
                                pasids[route.1] == pasid && route.0 as u32 == number.get()
                            };
                            prop_assert!(taken.any(named));
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                Step::Replace(name, space) => {
                    let replaced = device.replace_pasid(number(name as u32), &tables[space]).is_ok();
                    let route = model.iter_mut().find(|route| route.0 == name);
                    prop_assert_eq!(replaced, route.is_some());
                    route.into_iter().for_each(|route| route.2 = space);
                }
                Step::Detach(name) => {
                    let before = model.len();
                    model.retain(|route| route.0 != name);
                    prop_assert_eq!(device.detach_pasid(number(name as u32)), model.len() < before);
                }
            }
            for name in 0..4 {
                let route = model.iter().find(|route| route.0 == name);
                let named = number(name as u32);
                prop_assert_eq!(device.pasid(named), route.map(|route| pasids[route.1]));
                let leads_to = device.table_of_pasid(named);
                let space = route.map(|route| tables[route.2].space().id());
                prop_assert_eq!(leads_to.map(|table| table.space().id()), space);
            }
            for (index, pasid) in pasids.iter().enumerate() {
                let bindings = machine.guest.lookup(*pasid).unwrap().bindings;
                prop_assert_eq!(bindings as usize, model.iter().filter(|route| route.1 == index).count());
            }
        }
    }
}

/// However many ways a device has into a space, the space keeps the device's addresses free once, and until the last has gone.
#[test]
fn many_routes_into_a_space_reserve_what_one_does() {
    let machine = Machine::new();
    let (device, _) = machine.device(8, TableKind::Native);
    let (space, other) = (machine.space(1), machine.space(2));
    let (first, second) = (table(&space, &device), table(&other, &device));
    let free = other.reserved_ranges().len();
    let reserved = || [&space, &other].map(|space| space.reserved_ranges().len() - free);
    // The other device of the space has its own.
    let before = reserved();
    device.attach(&first).unwrap();
    let attached = reserved();
    assert!(attached[0] > before[0]);
    for name in 1..=100 {
        let binding = machine.guest.bind(machine.pasid()).unwrap();
        device.attach_pasid(number(name), binding, &first).unwrap();
    }
    assert_eq!(reserved(), attached);
    device.detach();
    assert_eq!(reserved(), attached);
    device.replace_pasid(number(1), &second).unwrap();
    assert_eq!(reserved()[1], attached[0] - before[0]);
    (2..100).for_each(|name| assert!(device.detach_pasid(number(name))));
    assert_eq!(reserved()[0], attached[0]);
    device.replace_pasid(number(100), &second).unwrap();
    assert_eq!(reserved(), [before[0], attached[0] - before[0]]);
    device.unbind();
    assert_eq!(reserved(), before);
}

/// The guest's process changes its page tables' root while the device works for it: every request finds one or the other.
#[test]
fn a_route_is_replaced_in_one_step_with_dma_running() {
    for kind in KINDS {
        let machine = Machine::new();
        let (device, _) = machine.device(8, kind);
        let pasid = machine.pasid();
        let spaces = [1, 2].map(|number| machine.space(number));
        let tables = spaces.each_ref().map(|space| table(space, &device));
        device.attach_pasid(number(5), machine.guest.bind(pasid).unwrap(), &tables[0]).unwrap();
        let port = machine.port(&device, pasid);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let seen = seen(&port);
                        assert!(matches!(seen, Ok(1 | 2)), "{seen:?}");
                    }
                });
            }
            for round in 1..2000 {
                let to = round % 2;
                device.replace_pasid(number(5), &tables[to]).unwrap();
                // From now on the old one is seen by nobody.
                assert_eq!(seen(&port), Ok(to as u8 + 1));
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(port.statistics().faults, 0);
        assert!(Arc::ptr_eq(&device.table_of_pasid(number(5)).unwrap(), &tables[1]));
    }
}

/// The interrupt window of a space stays reserved as long as any of the device's routes leads there.
#[test]
fn what_a_device_reserves_is_reserved_for_each_route() {
    let machine = Machine::new();
    let (device, _) = machine.device(8, TableKind::VtdSecondStage);
    let spaces = [1, 2].map(|number| machine.space(number));
    let reserved = device.requirements().reserved[0];
    let memory =
        Memory::register(&Backing::anonymous(&machine.bus, PAGE).unwrap(), 0, PAGE, &Account::new("x", None))
            .unwrap();
    let is_reserved = |space: &Arc<Space>| {
        let mapped = space.map(Iova::new(reserved.first()), &memory, 0, PAGE, Permissions::READ).is_ok();
        if mapped {
            space.unmap(IovaRange::with_length(reserved.first(), PAGE).unwrap()).unwrap();
        }
        !mapped
    };
    device.attach(&table(&spaces[0], &device)).unwrap();
    let binding = machine.guest.bind(machine.pasid()).unwrap();
    device.attach_pasid(number(1), binding, &table(&spaces[0], &device)).unwrap();
    assert_eq!(spaces.each_ref().map(is_reserved), [true, false]);
    device.detach();
    assert_eq!(spaces.each_ref().map(is_reserved), [true, false]);
    device.replace_pasid(number(1), &table(&spaces[1], &device)).unwrap();
    assert_eq!(spaces.each_ref().map(is_reserved), [false, true]);
    // To a table of its own in the same space, and away.
    device.replace_pasid(number(1), &Table::new(&spaces[1], &device).unwrap()).unwrap();
    assert_eq!(spaces.each_ref().map(is_reserved), [false, true]);
    drop(device);
    assert_eq!(spaces.each_ref().map(is_reserved), [false, false]);
}

/// A guest dies: its set goes, its PASIDs stay out of use until the device has gone, and are not those of the next guest.
#[test]
fn pasids_are_not_given_out_anew_while_a_device_has_them() {
    let machine = Machine::new();
    let (device, _) = machine.device(8, TableKind::Native);
    let space = machine.space(1);
    let Machine { iommu, guest, memories: _memories, .. } = machine;
    let pasids: Vec<Pasid> = (0..100).map(|_| guest.allocate(1..=u32::MAX, 0).unwrap()).collect();
    for (call, pasid) in (0..).zip(&pasids) {
        let binding = guest.bind(*pasid).unwrap();
        device.attach_pasid(number(call), binding, &table(&space, &device)).unwrap();
        assert_eq!(guest.lookup(*pasid).unwrap().state, PasidState::Active);
    }
    guest.free(pasids[0]).unwrap();
    assert_eq!(guest.lookup(pasids[0]).unwrap().state, PasidState::FreePending);
    assert_eq!(guest.allocate(1..=u32::MAX, 0).unwrap().get(), 101);
    // It is still the device's, until it lets go.
    let port = iommu.port_with_pasid(Rid(8), pasids[0]).unwrap();
    assert_eq!(seen(&port), Ok(1));
    device.detach_pasid(number(0));
    assert_eq!((seen(&port), guest.allocate(1..=u32::MAX, 0).unwrap()), (BLOCKED, pasids[0]));
    drop(device);
    assert!(pasids[1..].iter().all(|pasid| guest.lookup(*pasid).unwrap().state == PasidState::Idle));
}
