//! Changes in place against each other, against unmaps and against DMA: at no moment a device finds neither the old nor
//! the new.

use crate::double::{DERIVED, NATIVE};
use crate::fixture::{PAGE, Seen, World, check, iova, page, pages, random, translate};
use ioasid::{AliasError, Attributes, IovaRange, PageSize, Permissions, RemapError, Rid, epoch};
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Aligned to a leaf of 2 MiB, so that it can be merged.
const AT: u64 = 0x200;

/// A device that finds something at each of the pages, whenever it looks.
fn always_finds(world: &Arc<World>, rid: Rid, numbers: std::ops::Range<u64>) -> thread::JoinHandle<()> {
    let world = world.clone();
    thread::spawn(move || {
        for _ in 0..4 {
            let number = numbers.start + random(numbers.end - numbers.start);
            let seen = world.dma(rid, AT + number);
            assert!(matches!(seen, Seen::Page(_)), "{seen:?} at {number}");
        }
    })
}

#[test]
fn what_is_remapped_leads_to_the_old_or_to_the_new() {
    check(1500, || {
        let world = World::new();
        let memory = world.register(&world.object(0..16), 16);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..4);
        world.space.map(iova(AT), &memory, 0, 4 * PAGE, Permissions::READ).unwrap();
        let dma = [NATIVE, DERIVED].map(|rid| always_finds(&world, rid, 0..4));
        // Two that overlap, with pages of their own, and one whose pages nobody else changes.
        let remaps = [(1, 4), (2, 8)].map(|(number, first)| {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                world.lent.lend(first..first + 2);
                let at = iova(AT + number);
                world.space.remap(at, &memory, first * PAGE, 2 * PAGE, Permissions::READ_WRITE).unwrap();
            })
        });
        let alone = {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                for number in [12, 13] {
                    world.lent.lend([number]);
                    world.space.remap(iova(AT), &memory, number * PAGE, PAGE, Permissions::READ).unwrap();
                    world.lent.take_back([if number == 12 { 0 } else { number - 1 }]);
                }
            })
        };
        dma.into_iter().chain(remaps).chain([alone]).for_each(|thread| thread.join().unwrap());
        // One of the two was first.
        let outputs: Vec<u64> = (0..4)
            .map(|number| match world.dma(NATIVE, AT + number) {
                Seen::Page(page) => page,
                seen => panic!("{seen:?}"),
            })
            .collect();
        assert!(outputs == [13, 4, 8, 9] || outputs == [13, 4, 5, 9], "{outputs:?}");
        drop(devices);
        world.finish();
    });
}

#[test]
fn a_right_that_was_taken_away_is_used_by_no_device() {
    check(1000, || {
        let world = World::new();
        let memory = world.register(&world.object(0..2), 2);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..2);
        world.space.map(iova(AT), &memory, 0, 2 * PAGE, Permissions::READ_WRITE).unwrap();
        let writable = Arc::new(AtomicBool::new(true));
        let writers = [NATIVE, DERIVED].map(|rid| {
            let (world, writable) = (world.clone(), writable.clone());
            thread::spawn(move || {
                for _ in 0..3 {
                    let table = world.double.table_of(rid).unwrap();
                    let section = epoch::dma();
                    let (_, attributes) = translate(&table, &section, AT * PAGE).expect("a leaf stays");
                    crate::fixture::others_may_run();
                    if attributes.contains(Attributes::WRITE) {
                        assert!(writable.load(Ordering::SeqCst), "written without the right to");
                    }
                    drop(section);
                }
            })
        });
        let others = {
            let world = world.clone();
            thread::spawn(move || {
                // The neighbour, and both, to what they are or were.
                world.space.protect(page(AT + 1), Permissions::READ).unwrap();
                world.space.merge(IovaRange::ALL);
            })
        };
        world.space.protect(pages(AT, 1 + random(2)), Permissions::READ).unwrap();
        writable.store(false, Ordering::SeqCst);
        writers.into_iter().chain([others]).for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}

#[test]
fn leaves_are_cut_and_merged_while_devices_use_them() {
    check(200, || {
        let world = World::new();
        let memory = world.register(&world.object(0..8), 512);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..8);
        world.space.map(iova(AT), &memory, 0, 512 * PAGE, Permissions::READ).unwrap();
        let dma = [NATIVE, DERIVED].map(|rid| always_finds(&world, rid, 0..3));
        let protector = {
            let world = world.clone();
            thread::spawn(move || {
                world.space.protect(page(AT + 1), Permissions::READ_WRITE).unwrap();
                world.space.protect(page(AT + 1), Permissions::READ).unwrap();
            })
        };
        let unmapper = {
            let world = world.clone();
            thread::spawn(move || {
                assert_eq!(world.space.unmap(page(AT + 5)).unwrap().bytes(), PAGE);
                world.lent.take_back([5]);
            })
        };
        let merger = {
            let world = world.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    world.space.merge(pages(AT, 512));
                }
            })
        };
        let splitter = {
            let tables = devices.each_ref().map(|device| device.table().unwrap());
            thread::spawn(move || {
                for table in tables {
                    table.split(pages(AT, 512), PageSize::SIZE_4K).unwrap();
                }
            })
        };
        let threads = dma.into_iter().chain([protector, unmapper, merger, splitter]);
        threads.for_each(|thread| thread.join().unwrap());
        assert_eq!(world.dma(NATIVE, AT + 5), Seen::Fault);
        drop(devices);
        world.finish();
    });
}

#[test]
fn changes_of_all_kinds_in_one_place_end_and_agree() {
    check(1000, || {
        let world = World::new();
        let memory = world.register(&world.object(0..16), 16);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..16);
        world.space.map(iova(AT), &memory, 0, 4 * PAGE, Permissions::READ).unwrap();
        let threads = [0u64, 1, 2].map(|thread| {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    let at = AT + random(3);
                    match random(6) {
                        0 => drop(world.space.unmap(pages(at, 2)).unwrap()),
                        1 => drop(world.space.protect(pages(at, 2), Permissions::READ_WRITE).unwrap()),
                        2 => {
                            let offset = (4 + 2 * thread) * PAGE;
                            match world.space.remap(iova(at), &memory, offset, 2 * PAGE, Permissions::READ) {
                                Ok(()) | Err(RemapError::NotMapped { .. }) => {}
                                Err(error) => panic!("{error}"),
                            }
                        }
                        3 => {
                            let to = iova(AT + 16 + 8 * thread + random(4));
                            match world.space.alias(pages(at, 2), &world.space, to, Permissions::READ) {
                                Ok(_) | Err(AliasError::NotMapped { .. } | AliasError::Target(_)) => {}
                                Err(error) => panic!("{error}"),
                            }
                        }
                        4 => drop(world.space.merge(IovaRange::ALL)),
                        _ => drop(world.space.unmap_deferred(page(at)).unwrap()),
                    }
                }
            })
        });
        let dma = {
            let world = world.clone();
            thread::spawn(move || world.dma_often(DERIVED, AT..AT + 4, 3))
        };
        threads.into_iter().chain([dma]).for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}

#[test]
fn memory_that_was_remapped_away_is_waited_for_when_it_goes() {
    check(800, || {
        let world = World::new();
        let (old, new) = (world.register(&world.object(0..1), 1), world.register(&world.object(8..9), 1));
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend([0, 8]);
        world.space.map(iova(AT), &old, 0, PAGE, Permissions::READ).unwrap();
        let dma = [NATIVE, DERIVED].map(|rid| {
            let world = world.clone();
            thread::spawn(move || world.dma_often(rid, AT..AT + 1, 3))
        });
        let remap = {
            let world = world.clone();
            thread::spawn(move || {
                match world.space.remap(iova(AT), &new, 0, PAGE, Permissions::READ) {
                    Ok(()) | Err(RemapError::NotMapped { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
                new
            })
        };
        // While the other leads elsewhere.
        drop(old);
        world.lent.take_back([0]);
        let new = remap.join().unwrap();
        dma.into_iter().for_each(|thread| thread.join().unwrap());
        drop((devices, new));
        world.finish();
    });
}
