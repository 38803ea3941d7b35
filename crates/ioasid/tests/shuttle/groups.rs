//! Groups of devices, fought over.

use crate::double::connected::Connected;
use crate::double::{Call, DERIVED, DERIVED_TOO, NATIVE, PARTICULAR};
use crate::fixture::{World, check, others_may_run, random};
use ioasid::pasid::{Limit, Owner, PasidSystem, Spid};
use ioasid::{AttachError, Device, DeviceError, DeviceOwner, DriverClaim, Iommu, Rid, Space, Table};
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// All of them are one group, and the last two have one requester ID.
const MEMBERS: [Rid; 3] = [NATIVE, DERIVED, DERIVED_TOO];
/// One group, too; the first two have one requester ID.
const OF_ONE_KIND: [Rid; 3] = [DERIVED, DERIVED_TOO, PARTICULAR];

fn connected(world: &World, members: &[Rid]) -> Arc<Connected> {
    Connected::new(world.double.clone(), members, others_may_run)
}

/// Nobody has any device of the group, nor does one do DMA: somebody else can have all of them.
fn all_are_free(iommu: &Arc<Connected>) {
    for requester in [NATIVE, DERIVED] {
        assert!(iommu.table_of(requester).is_none(), "{requester} goes on");
    }
    let next = DeviceOwner::new("the next one");
    let devices = MEMBERS.map(|rid| Device::bind(iommu.clone(), rid, &next).unwrap());
    drop(devices);
}

/// What there is of each, as its users count it: from before they have it until after they have it no more, or for `held`
/// in between.
#[derive(Default)]
struct Counts {
    /// Devices that an owner holds.
    held: [AtomicUsize; 2],
    /// Devices of a driver that does DMA.
    driven: AtomicUsize,
    /// By member, devices that are being attached, are attached or are being detached.
    attached: [AtomicUsize; 3],
}

impl Counts {
    /// How many devices are on their way with this requester ID.
    fn routes(&self, iommu: &Connected, requester: Rid) -> usize {
        let same = MEMBERS.iter().zip(&self.attached).filter(|(rid, _)| iommu.requester(**rid) == requester);
        same.map(|(_, count)| count.load(Ordering::SeqCst)).sum()
    }

    /// Nothing goes where nobody attached it.
    fn check(&self, iommu: &Connected) {
        for requester in [NATIVE, DERIVED] {
            let open = iommu.table_of(requester).is_some();
            assert!(!open || self.routes(iommu, requester) > 0, "{requester} was not attached");
        }
    }
}

/// Threads of two owners, and a driver, want devices of one group. While an owner has one, no other owner has any and no driver
/// that does DMA; what an owner has not attached is blocked; what he has attached stays where it is until he is done.
#[test]
fn a_group_has_one_owner_and_no_dma_before_bind_and_attach() {
    check(1000, || {
        let world = World::new();
        let iommu = connected(&world, &MEMBERS);
        let owners = ["one", "other"].map(DeviceOwner::new);
        let counts = Arc::new(Counts::default());
        let threads: Vec<_> = (0..3)
            .map(|thread| {
                let (world, iommu, counts) = (world.clone(), iommu.clone(), counts.clone());
                let owners = owners.clone();
                thread::spawn(move || {
                    for _ in 0..2 {
                        let owner = if thread == 2 { random(2) as usize } else { 0 };
                        let member = random(3) as usize;
                        if thread == 2 && random(3) == 0 {
                            drive(&iommu, MEMBERS[member], &counts);
                        } else {
                            use_device(&world, &iommu, (owner, &owners[owner]), member, &counts);
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        all_are_free(&iommu);
        world.finish();
    });
}

fn drive(iommu: &Arc<Connected>, rid: Rid, counts: &Counts) {
    let Ok(claim) = DriverClaim::new(iommu.clone(), rid, "driver") else { return };
    counts.driven.fetch_add(1, Ordering::SeqCst);
    for _ in 0..2 {
        assert!(counts.held.iter().all(|held| held.load(Ordering::SeqCst) == 0));
        others_may_run();
    }
    counts.driven.fetch_sub(1, Ordering::SeqCst);
    drop(claim);
}

fn use_device(
    world: &World,
    iommu: &Arc<Connected>,
    (number, owner): (usize, &DeviceOwner),
    member: usize,
    counts: &Counts,
) {
    let device = match Device::bind(iommu.clone(), MEMBERS[member], owner) {
        Ok(device) => device,
        Err(DeviceError::Taken(_) | DeviceError::NotViable { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    counts.held[number].fetch_add(1, Ordering::SeqCst);
    counts.check(iommu);
    // Devices with one requester ID are attached at the same time if they go the same way.
    let space = if random(2) == 0 { world.space.clone() } else { Space::new(&world.bus) };
    let table = Table::for_device(&space, &device).unwrap();
    counts.attached[member].fetch_add(1, Ordering::SeqCst);
    let attached = device.attach(&table);
    match attached {
        Ok(()) => {}
        Err(AttachError::SharedRequester { .. } | AttachError::NotIsolated { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    for _ in 0..3 {
        assert_eq!(counts.held[1 - number].load(Ordering::SeqCst), 0, "two owners");
        assert_eq!(counts.driven.load(Ordering::SeqCst), 0, "an owner and a driver");
        counts.check(iommu);
        if device.table().is_some() {
            let theirs = world.double.table_of(iommu.requester(MEMBERS[member])).unwrap();
            assert!(Arc::ptr_eq(&theirs, &table), "moved by somebody else");
        }
        others_may_run();
    }
    if random(2) == 0 {
        device.detach();
    }
    counts.held[number].fetch_sub(1, Ordering::SeqCst);
    drop(device);
    counts.attached[member].fetch_sub(1, Ordering::SeqCst);
}

/// An owner gives a device back while others of his threads attach it, with a PASID and without, and a second owner is waiting
/// for it. Once the second one has it, it is blocked, goes where he attaches it, and stays there.
#[test]
fn a_device_that_is_given_back_is_attached_by_nobody_who_still_looks_at_it() {
    check(1000, || {
        let world = World::new();
        let iommu = connected(&world, &MEMBERS);
        let system = PasidSystem::new(8).unwrap();
        let set =
            Arc::new(system.create_set(Owner::Machine(1), 8, &Limit::new(&system, "all", None)).unwrap());
        let pasid = set.allocate(0..=7, 0).unwrap();
        let [first, second] = ["one", "other"].map(DeviceOwner::accepting_peers);
        let device = Arc::new(Device::bind(iommu.clone(), NATIVE, &first).unwrap());
        let attaching = [false, true].map(|with_pasid| {
            let (world, device, set) = (world.clone(), device.clone(), set.clone());
            thread::spawn(move || {
                let table = Table::for_device(&Space::new(&world.bus), &device).unwrap();
                for _ in 0..2 {
                    let attached = if with_pasid {
                        device.attach_pasid(Spid::new(1).unwrap(), set.bind(pasid).unwrap(), &table)
                    } else {
                        device.attach(&table)
                    };
                    match attached {
                        Ok(()) | Err(AttachError::Unbound(_) | AttachError::PasidTaken { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        });
        let taking = {
            let (world, iommu) = (world.clone(), iommu.clone());
            thread::spawn(move || {
                // It is given back at last.
                let device = loop {
                    match Device::bind(iommu.clone(), NATIVE, &second) {
                        Ok(device) => break device,
                        Err(DeviceError::Taken(_)) => thread::yield_now(),
                        Err(error) => panic!("{error}"),
                    }
                };
                for _ in 0..2 {
                    let plain = world.double.table_of(NATIVE);
                    assert!(plain.is_none(), "attached by who has it no more");
                    let with_pasid = world.double.table_of_pasid(NATIVE, pasid);
                    assert!(with_pasid.is_none(), "a PASID attached by who has the device no more");
                    others_may_run();
                }
                let table = Table::for_device(&Space::new(&world.bus), &device).unwrap();
                device.attach(&table).unwrap();
                for _ in 0..3 {
                    others_may_run();
                    let theirs = world.double.table_of(NATIVE).expect("blocked by who has it no more");
                    assert!(Arc::ptr_eq(&theirs, &table), "moved by who has it no more");
                }
            })
        };
        others_may_run();
        device.unbind();
        assert!(device.table().is_none());
        // Once more is nothing to whoever has it now.
        device.unbind();
        attaching.into_iter().chain([taking]).for_each(|thread| thread.join().unwrap());
        assert_eq!(set.free(pasid).map(drop), Ok(()), "the binding has stayed");
        drop(device);
        all_are_free(&iommu);
        world.finish();
    });
}

/// Two threads have a device each that cannot be told from the other one, and a third one has another of the group. Each moves its
/// own, and by that the others; one IOMMU call fails. All of the group is always in one space, whoever moved it, and none is ever
/// nowhere that has not been detached.
#[test]
fn a_group_moves_as_one() {
    check(1000, || {
        let world = World::new();
        let iommu = connected(&world, &OF_ONE_KIND);
        let owner = DeviceOwner::new("one");
        let devices = OF_ONE_KIND.map(|rid| Device::bind(iommu.clone(), rid, &owner).unwrap());
        let spaces = [world.space.clone(), Space::new(&world.bus)];
        let tables = spaces.each_ref().map(|space| Table::for_device(space, &devices[0]).unwrap());
        let before: Vec<usize> = spaces.iter().map(|space| space.reserved_ranges().len()).collect();
        devices.iter().for_each(|device| device.attach(&tables[0]).unwrap());
        world.double.switches.fail(Call::Attach, 1 + random(12) as i64);
        let threads = devices.map(|device| {
            let (iommu, tables) = (iommu.clone(), tables.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    match device.attach(&tables[random(2) as usize]) {
                        Ok(()) | Err(AttachError::Table(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                    others_may_run();
                    assert!(iommu.table_of(device.rid()).is_some(), "it is nowhere");
                }
                if random(3) == 0 {
                    device.detach();
                }
                device
            })
        });
        let devices = threads.map(|thread| thread.join().unwrap());
        let attached: Vec<_> = devices.iter().filter_map(|device| Some((device, device.table()?))).collect();
        for (device, table) in &attached {
            assert!(Arc::ptr_eq(table, &iommu.table_of(device.rid()).unwrap()), "the IOMMU has it elsewhere");
            assert!(Arc::ptr_eq(table, &attached[0].1), "it was left behind");
        }
        drop(attached);
        drop(devices);
        drop(tables);
        for (space, before) in spaces.iter().zip(before) {
            assert!(space.reserved_ranges().len() <= before, "what has gone has left something reserved");
        }
        drop(spaces);
        world.finish();
    });
}
