//! Unmaps, strict and deferred, against DMA and against maps of the same place.

use crate::double::{DERIVED, NATIVE, SMALL};
use crate::fixture::{PAGE, Seen, World, check, iova, page, pages, random};
use ioasid::{MapError, Permissions};
use shuttle::thread;
use std::sync::Arc;

/// Where things are mapped.
const AT: u64 = 0x200;

#[test]
fn what_was_unmapped_is_reached_by_no_device() {
    check(1500, || {
        let world = World::new();
        let memory = world.register(&world.object(0..8), 8);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        let dma = [NATIVE, DERIVED].map(|rid| {
            let world = world.clone();
            thread::spawn(move || world.dma_often(rid, AT..AT + 2, 3))
        });
        for round in 0..3 {
            world.lent.lend([2 * round, 2 * round + 1]);
            world.space.map(iova(AT), &memory, 2 * round * PAGE, 2 * PAGE, Permissions::READ_WRITE).unwrap();
            // In one piece or in two.
            if random(2) == 0 {
                assert_eq!(world.space.unmap(pages(AT, 2)).unwrap().bytes(), 2 * PAGE);
            } else {
                world.space.unmap(page(AT)).unwrap();
                world.lent.take_back([2 * round]);
                world.space.unmap(page(AT + 1)).unwrap();
            }
            world.lent.take_back([2 * round, 2 * round + 1]);
        }
        dma.into_iter().for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}

#[test]
fn copies_that_block_are_waited_for() {
    check(1500, || {
        let world = World::new();
        let memory = world.register(&world.object_behind_calls(0), 4);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        let dma = [NATIVE, DERIVED].map(|rid| {
            let world = world.clone();
            thread::spawn(move || world.dma_often(rid, AT..AT + 1, 2))
        });
        for round in 0..2 {
            world.lent.lend([round]);
            world.space.map(iova(AT), &memory, round * PAGE, PAGE, Permissions::READ).unwrap();
            if random(2) == 0 {
                world.space.unmap(page(AT)).unwrap();
            } else {
                world.space.unmap_deferred(page(AT)).unwrap();
                world.space.flush();
            }
            world.lent.take_back([round]);
        }
        dma.into_iter().for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}

#[test]
fn a_part_of_a_leaf_goes_and_the_rest_does_not_notice() {
    check(400, || {
        let world = World::new();
        // A leaf of 2 MiB in one table, and of less in the other.
        let memory = world.register(&world.object(0..8), 512);
        let devices = [NATIVE, SMALL].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..8);
        world.space.map(iova(AT), &memory, 0, 512 * PAGE, Permissions::READ).unwrap();
        let dma = [NATIVE, SMALL].map(|rid| {
            let world = world.clone();
            thread::spawn(move || {
                for _ in 0..3 {
                    let stays = 1 + 2 * random(4);
                    assert_eq!(world.dma(rid, AT + stays), Seen::Page(stays));
                    world.dma(rid, AT + 2 * random(4));
                }
            })
        });
        let unmaps = [[0, 4], [2, 6]].map(|numbers| {
            let world = world.clone();
            thread::spawn(move || {
                for number in numbers {
                    assert_eq!(world.space.unmap(page(AT + number)).unwrap().bytes(), PAGE);
                    world.lent.take_back([number]);
                }
            })
        });
        dma.into_iter().chain(unmaps).for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}

/// Unmaps pages without waiting, maps other memory there as soon as that is possible, and gives the former back then.
fn deferring(world: &Arc<World>, at: u64, first: u64, rounds: u64) {
    let memory = world.register(&world.object(first..first + rounds), rounds);
    for round in 0..rounds {
        world.lent.lend([first + round]);
        // Whoever may map there knows that nothing leads to the former memory any more.
        world.space.map(iova(at), &memory, round * PAGE, PAGE, Permissions::READ_WRITE).unwrap();
        if round > 0 {
            world.lent.take_back([first + round - 1]);
        }
        world.space.unmap_deferred(page(at)).unwrap();
        assert!(world.space.walk(iova(at)).is_none());
        match random(3) {
            0 => {
                world.space.flush();
                world.lent.take_back([first + round]);
            }
            1 => {
                let mut batch = world.space.batch();
                assert_eq!(batch.unmap(page(at)).unwrap().bytes(), 0);
                batch.finish();
                world.lent.take_back([first + round]);
            }
            _ => {}
        }
    }
    // Dropping the memory flushes.
    drop(memory);
    world.lent.take_back(first..first + rounds);
}

#[test]
fn what_was_unmapped_without_waiting_is_waited_for_before_anything_else_is_mapped_there() {
    check(1000, || {
        let world = World::new();
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        let dma = [NATIVE, DERIVED].map(|rid| {
            let world = world.clone();
            thread::spawn(move || world.dma_often(rid, AT..AT + 2, 3))
        });
        // Two of them, so that each flushes what the other has deferred.
        let unmaps = [0, 1].map(|number| {
            let world = world.clone();
            thread::spawn(move || deferring(&world, AT + number, 16 * number, 3))
        });
        dma.into_iter().chain(unmaps).for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}

#[test]
fn who_unmaps_and_maps_the_same_place_meets_nothing_halfway() {
    check(1000, || {
        let world = World::new();
        let memory = world.register(&world.object(0..8), 8);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        // One maps, always the whole of it and other memory, and by that knows that the former is reached no more.
        let mapper = {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                let mut mapped = None;
                for number in 0..3u64 {
                    world.lent.lend([2 * number, 2 * number + 1]);
                    let at = 2 * number * PAGE;
                    match world.space.map(iova(AT), &memory, at, 2 * PAGE, Permissions::READ) {
                        Ok(()) => {
                            world.lent.take_back(mapped.into_iter().flatten());
                            mapped = Some([2 * number, 2 * number + 1]);
                        }
                        Err(MapError::AlreadyMapped { .. }) => {
                            world.lent.take_back([2 * number, 2 * number + 1]);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        };
        let unmappers = [0, 1].map(|number| {
            let world = world.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    let range = if random(2) == 0 { pages(AT, 2) } else { page(AT + number) };
                    let unmapped = if random(2) == 0 {
                        world.space.unmap(range)
                    } else {
                        world.space.unmap_deferred(range)
                    };
                    // A mapping of both goes as a whole, or in halves.
                    assert!(unmapped.unwrap().runs().all(|run| range.covers(&run)));
                }
            })
        });
        let dma = [NATIVE, DERIVED].map(|rid| {
            let world = world.clone();
            thread::spawn(move || world.dma_often(rid, AT..AT + 2, 2))
        });
        unmappers.into_iter().chain(dma).chain([mapper]).for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}

#[test]
fn a_mapping_that_comes_meanwhile_is_changed_whole_or_not_at_all() {
    check(2500, || {
        let world = World::new();
        let memory = world.register(&world.object(0..3), 3);
        let device = world.double.attached(NATIVE, &world.space);
        world.lent.lend(0..3);
        world.space.map(iova(AT + 1), &memory, 2 * PAGE, PAGE, Permissions::READ).unwrap();
        // Whoever works in order meets this one, and waits there while the hole before it is filled.
        world.space.unmap_deferred(page(AT + 1)).unwrap();
        let mapper = {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                world.space.map(iova(AT), &memory, 0, 2 * PAGE, Permissions::READ).unwrap();
            })
        };
        let around = pages(AT - 1, 4);
        match random(3) {
            0 => drop(world.space.unmap(around).unwrap()),
            1 => drop(world.space.unmap_deferred(around).unwrap()),
            _ => drop(world.space.protect(around, Permissions::READ_WRITE).unwrap()),
        }
        mapper.join().unwrap();
        let of_page = |page| world.space.walk(iova(page)).map(|leaf| leaf.attributes);
        assert_eq!(of_page(AT), of_page(AT + 1), "half of a mapping");
        drop((device, memory));
        world.finish();
    });
}
