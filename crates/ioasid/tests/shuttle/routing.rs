//! Routes of a device, fought over.

use crate::double::{DERIVED, NATIVE};
use crate::fixture::{World, check, others_may_run, random};
use ioasid::pasid::{Limit, Owner, PasidState, PasidSystem, Spid};
use ioasid::{AttachError, Device, Space, Table};
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Threads attach the same number, or the same PASID, each to a table of its own. Who succeeds has the route to himself, in the
/// engine and in the IOMMU, until he lets go.
#[test]
fn a_route_has_one_owner() {
    check(1000, || {
        let world = World::new();
        let system = PasidSystem::new(8).unwrap();
        let set =
            Arc::new(system.create_set(Owner::Machine(1), 8, &Limit::new(&system, "all", None)).unwrap());
        let pasids = [set.allocate(0..=7, 0).unwrap(), set.allocate(0..=7, 0).unwrap()];
        let device = Arc::new(world.double.device(NATIVE));
        // Of each number, and of each PASID.
        let owned: Arc<[[AtomicBool; 2]; 2]> = Arc::default();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (world, device, set, owned) = (world.clone(), device.clone(), set.clone(), owned.clone());
                thread::spawn(move || {
                    let space = Space::new(&world.bus);
                    let table = Table::for_device(&space, &device).unwrap();
                    for _ in 0..2 {
                        let chosen = [random(2) as usize, random(2) as usize];
                        let (number, pasid) = (Spid::new(chosen[0] as u32).unwrap(), pasids[chosen[1]]);
                        match device.attach_pasid(number, set.bind(pasid).unwrap(), &table) {
                            Ok(()) => {}
                            Err(AttachError::PasidTaken { .. }) => continue,
                            Err(error) => panic!("{error}"),
                        }
                        let mine = owned.iter().zip(chosen).map(|(owned, chosen)| &owned[chosen]);
                        mine.clone().for_each(|owned| assert!(!owned.swap(true, Ordering::SeqCst)));
                        for _ in 0..2 {
                            others_may_run();
                            let theirs = world.double.table_of_pasid(NATIVE, pasid).unwrap();
                            assert!(Arc::ptr_eq(&theirs, &table));
                            assert!(Arc::ptr_eq(&device.table_of_pasid(number).unwrap(), &table));
                            assert_eq!(set.lookup(pasid).unwrap().state, PasidState::Active);
                        }
                        mine.for_each(|owned| owned.store(false, Ordering::SeqCst));
                        assert!(device.detach_pasid(number));
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for pasid in pasids {
            assert!(world.double.table_of_pasid(NATIVE, pasid).is_none());
            assert_eq!(set.lookup(pasid).unwrap().state, PasidState::Idle);
        }
        world.finish();
    });
}

/// Threads want the same device. One at a time has it, and while it has, nobody blocks it.
#[test]
fn a_device_has_one_owner() {
    check(500, || {
        let world = World::new();
        let owned = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (world, owned) = (world.clone(), owned.clone());
                thread::spawn(move || {
                    for _ in 0..2 {
                        let Ok(device) = Device::new(world.double.clone(), DERIVED) else { continue };
                        assert!(!owned.swap(true, Ordering::SeqCst));
                        let table = Table::for_device(&world.space, &device).unwrap();
                        device.attach(&table).unwrap();
                        others_may_run();
                        assert!(Arc::ptr_eq(&world.double.table_of(DERIVED).unwrap(), &table));
                        owned.store(false, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(world.double.table_of(DERIVED).is_none());
        world.finish();
    });
}
