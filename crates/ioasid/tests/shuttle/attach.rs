//! A table that joins, or leaves, while operations go on.

use crate::double::{Call, DERIVED, DoubleTable, NATIVE, SMALL};
use crate::fixture::{PAGE, Seen, World, check, iova, page, pages, random};
use ioasid::{MapError, Memory, Permissions, Table};
use shuttle::thread;
use std::sync::Arc;

const AT: u64 = 0x200;

/// One thread's changes to two pages that nobody else changes. Which page of memory stands at each of them at the end.
fn change(world: &World, memory: &Arc<Memory>, first: u64, at: u64, steps: u64) -> [Option<u64>; 2] {
    let mut stands: [Option<u64>; 2] = [None; 2];
    for step in 0..steps {
        let (index, number) = (random(2) as usize, 2 * step);
        let place = at + index as u64;
        match (random(5), stands) {
            (0, [None, None]) => {
                world.lent.lend([first + number, first + number + 1]);
                world.space.map(iova(at), memory, number * PAGE, 2 * PAGE, Permissions::READ_WRITE).unwrap();
                stands = [Some(first + number), Some(first + number + 1)];
            }
            (1, [Some(_), Some(_)]) => {
                world.lent.lend([first + number, first + number + 1]);
                world.space.remap(iova(at), memory, number * PAGE, 2 * PAGE, Permissions::READ).unwrap();
                world.lent.take_back(stands.into_iter().flatten());
                stands = [Some(first + number), Some(first + number + 1)];
            }
            (2, _) => {
                world.space.protect(pages(at, 2), Permissions::READ).unwrap();
            }
            (3, _) => {
                world.space.unmap(pages(at, 2)).unwrap();
                world.lent.take_back(stands.into_iter().flatten());
                stands = [None; 2];
            }
            _ if stands[index].is_some() => {
                world.space.unmap(page(place)).unwrap();
                world.lent.take_back(stands[index].take());
            }
            _ => {
                world.lent.lend([first + number]);
                world.space.map(iova(place), memory, number * PAGE, PAGE, Permissions::READ).unwrap();
                stands[index] = Some(first + number);
            }
        }
    }
    stands
}

#[test]
fn a_table_that_joins_misses_nothing_and_keeps_nothing() {
    check(1000, || {
        let world = World::new();
        let changers = [0, 1].map(|number| {
            let world = world.clone();
            thread::spawn(move || {
                let first = 16 * number;
                let memory = world.register(&world.object(first..first + 16), 16);
                let at = AT + 2 * number;
                let stands = change(&world, &memory, first, at, 4);
                // Whoever is attached sees just that.
                for rid in [DERIVED, NATIVE] {
                    for (index, stands) in (0..).zip(stands) {
                        match world.dma(rid, at + index) {
                            Seen::Blocked => {}
                            seen => assert_eq!(seen, stands.map_or(Seen::Fault, Seen::Page)),
                        }
                    }
                }
                (memory, stands, at)
            })
        });
        let device = {
            let world = world.clone();
            thread::spawn(move || {
                let device = world.double.attached(DERIVED, &world.space);
                world.dma_often(DERIVED, AT..AT + 4, 2);
                device
            })
        };
        let native = {
            let world = world.clone();
            thread::spawn(move || {
                let device = world.double.attached(NATIVE, &world.space);
                world.dma_often(NATIVE, AT..AT + 4, 1);
                device
            })
        };
        let ends = changers.map(|thread| thread.join().unwrap());
        let devices = [device, native].map(|thread| thread.join().unwrap());
        for (_, stands, at) in &ends {
            for (index, stands) in (0..).zip(stands) {
                assert_eq!(world.dma(DERIVED, at + index), stands.map_or(Seen::Fault, Seen::Page));
            }
        }
        world.finish();
        drop(devices);
    });
}

#[test]
fn who_maps_and_who_unmaps_know_of_a_new_table_alike() {
    check(3000, || {
        let world = World::new();
        let memory = world.register(&world.object(0..1), 1);
        world.lent.lend([0]);
        let mapper = {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    match world.space.map(iova(AT), &memory, 0, PAGE, Permissions::READ) {
                        Ok(()) | Err(MapError::AlreadyMapped { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        };
        let unmapper = {
            let world = world.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    match random(3) {
                        0 => drop(world.space.unmap_deferred(page(AT)).unwrap()),
                        _ => drop(world.space.unmap(pages(AT, 2)).unwrap()),
                    }
                }
            })
        };
        let device = world.double.attached(DERIVED, &world.space);
        [mapper, unmapper].into_iter().for_each(|thread| thread.join().unwrap());
        world.finish();
        drop(device);
    });
}

#[test]
fn a_device_that_leaves_reaches_nothing_and_its_table_goes() {
    check(600, || {
        let world = World::new();
        let memory = world.register(&world.object(0..16), 16);
        let device = world.double.attached(DERIVED, &world.space);
        let dma = {
            let world = world.clone();
            thread::spawn(move || world.dma_often(DERIVED, AT..AT + 2, 3))
        };
        let changer = {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || change(&world, &memory, 0, AT, 4))
        };
        // Comes back now and then, to a table of its own or to another one.
        for round in 0..2 {
            device.detach();
            assert!(device.table().is_none());
            if round == 0 {
                let table = if random(2) == 0 {
                    Table::new(&world.space, &device)
                } else {
                    Table::for_device(&world.space, &device)
                };
                device.attach(&table.unwrap()).unwrap();
            }
        }
        changer.join().unwrap();
        dma.join().unwrap();
        // Nobody has the tables any more.
        assert_eq!(world.double.tables().len(), 0);
        world.finish();
    });
}

#[test]
fn a_detached_device_is_not_at_work_any_more() {
    check(800, || {
        let world = World::new();
        let memory = world.register(&world.object(0..1), 1);
        world.lent.lend([0]);
        world.space.map(iova(AT), &memory, 0, PAGE, Permissions::READ).unwrap();
        let rid = if random(2) == 0 { DERIVED } else { NATIVE };
        let device = world.double.attached(rid, &world.space);
        let dma = {
            let world = world.clone();
            thread::spawn(move || world.dma_often(rid, AT..AT + 1, 3))
        };
        device.detach();
        world.lent.take_back([0]);
        dma.join().unwrap();
        world.finish();
    });
}

#[test]
fn a_table_that_cannot_be_filled_leaves_nothing_behind() {
    check(500, || {
        let world = World::new();
        let memory = world.register(&world.object(0..16), 16);
        world.double.switches.fail(Call::Fill, 1);
        let changer = {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                world.lent.lend([15]);
                world.space.map(iova(AT + 8), &memory, 15 * PAGE, PAGE, Permissions::READ).unwrap();
                change(&world, &memory, 0, AT, 3)
            })
        };
        let device = world.double.device(DERIVED);
        let table = Table::for_device(&world.space, &device);
        assert_eq!(table.is_err(), world.double.switches.has_failed(Call::Fill));
        drop(table);
        changer.join().unwrap();
        assert_eq!(world.double.tables().len(), 0);
        world.finish();
    });
}

#[test]
fn two_devices_of_a_class_get_one_table() {
    check(600, || {
        let world = World::new();
        let memory = world.register(&world.object(0..1), 1);
        world.lent.lend([0]);
        world.space.map(iova(AT), &memory, 0, PAGE, Permissions::READ).unwrap();
        let devices = [crate::double::DERIVED, crate::double::DERIVED_TOO, SMALL].map(|rid| {
            let world = world.clone();
            thread::spawn(move || {
                let device = world.double.attached(rid, &world.space);
                assert_eq!(world.dma(rid, AT), Seen::Page(0));
                device
            })
        });
        let devices = devices.map(|thread| thread.join().unwrap());
        let tables: Vec<Arc<DoubleTable>> = world.double.tables();
        assert_eq!(tables.len(), 2);
        drop(devices);
        drop(tables);
        assert_eq!(world.double.tables().len(), 0);
        world.finish();
    });
}
