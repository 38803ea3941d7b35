//! Promises with a bound: how many ranges wait for a flush and how long, what is free is found, a slice is given back or not.

use crate::double::{DERIVED, NATIVE};
use crate::fixture::{PAGE, Seen, World, check, iova, others_may_run, page, pages, random};
use ioasid::{
    BorrowedSlice, DEFERRED_RANGES, IovaRange, MapError, Permissions, SliceHolder, Space, UnmapError,
};
use shuttle::sync::Mutex;
use shuttle::thread;
use std::sync::Arc;

const AT: u64 = 0x200;

/// Returns when the flusher has done its work. If it never does, the model has too many steps.
fn until_nothing_waits(space: &Space) {
    while space.deferred_ranges() > 0 {
        thread::yield_now();
    }
}

#[test]
fn nothing_waits_for_ever_even_if_nobody_calls_any_more() {
    check(1500, || {
        let world = World::new();
        let memory = world.register(&world.object(0..8), 8);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        world.lent.lend(0..8);
        world.space.map(iova(AT), &memory, 0, 8 * PAGE, Permissions::READ).unwrap();
        let dma = {
            let world = world.clone();
            thread::spawn(move || world.dma_often(DERIVED, AT..AT + 8, 2))
        };
        let unmaps = [0, 1].map(|number| {
            let world = world.clone();
            thread::spawn(move || {
                for round in 0..2 {
                    world.space.unmap_deferred(page(AT + 2 * round + number)).unwrap();
                    // Sometimes the flusher is there in between, and sometimes it is not.
                    (0..random(4)).for_each(|_| others_may_run());
                }
            })
        });
        unmaps.into_iter().chain([dma]).for_each(|thread| thread.join().unwrap());
        until_nothing_waits(&world.space);
        // What was taken from the queues is released as well: it is owned by nobody for long.
        world.space.map(iova(AT), &memory, 0, 4 * PAGE, Permissions::READ).unwrap();
        drop(devices);
        world.finish();
    });
}

#[test]
fn a_copy_that_blocks_delays_its_own_ranges_and_no_others() {
    check(800, || {
        let world = World::new();
        let other = Space::new(&world.bus);
        let memory = world.register(&world.object_behind_calls(0), 2);
        let plain = world.register(&world.object(8..10), 2);
        let devices = [NATIVE, DERIVED].map(|rid| world.double.attached(rid, &world.space));
        let native = world.double.attached(crate::double::NATIVE_TOO, &other);
        world.lent.lend(0..2);
        world.lent.lend(8..10);
        world.space.map(iova(AT), &memory, 0, 2 * PAGE, Permissions::READ).unwrap();
        other.map(iova(AT), &plain, 0, 2 * PAGE, Permissions::READ).unwrap();
        let dma = [NATIVE, DERIVED].map(|rid| {
            let world = world.clone();
            thread::spawn(move || world.dma_often(rid, AT..AT + 2, 2))
        });
        let unmaps = {
            let world = world.clone();
            thread::spawn(move || {
                world.space.unmap_deferred(page(AT)).unwrap();
                world.space.unmap_deferred(page(AT + 1)).unwrap();
                until_nothing_waits(&world.space);
                // Taken from the queues is not yet flushed.
                world.space.flush();
                world.lent.take_back(0..2);
            })
        };
        other.unmap_deferred(pages(AT, 2)).unwrap();
        until_nothing_waits(&other);
        dma.into_iter().chain([unmaps]).for_each(|thread| thread.join().unwrap());
        drop((devices, native));
        world.finish();
    });
}

#[test]
fn no_more_wait_than_there_may_be() {
    check(4, || {
        let world = World::new();
        let device = world.double.attached(NATIVE, &world.space);
        let count = DEFERRED_RANGES as u64 / 8 + 4;
        let memory = world.register(&world.object(0..1), 2 * count);
        world.lent.lend(0..1);
        let threads = [0, 1].map(|number| {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                for round in 0..count {
                    let at = AT + 4 * round + 2 * number;
                    world.space.map(iova(at), &memory, 0, PAGE, Permissions::READ).unwrap();
                    world.space.unmap_deferred(page(at)).unwrap();
                    assert!(world.space.deferred_ranges() <= DEFERRED_RANGES / 4);
                }
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        until_nothing_waits(&world.space);
        drop(device);
        world.finish();
    });
}

#[test]
fn what_is_free_is_proposed_whoever_frees_it_and_whoever_asks_first() {
    check(2000, || {
        let world = World::new();
        let memory = world.register(&world.object(0..4), 4);
        // Nothing but these two pages.
        world.space.set_allowed(&[pages(AT, 2)]).unwrap();
        world.lent.lend(0..4);
        world.space.map(iova(AT), &memory, 0, 2 * PAGE, Permissions::READ).unwrap();
        let unmaps = [0, 1].map(|number| {
            let world = world.clone();
            thread::spawn(move || drop(world.space.unmap(page(AT + number)).unwrap()))
        });
        let asks = [0, 1].map(|number| {
            let (world, memory) = (world.clone(), memory.clone());
            thread::spawn(move || {
                match world.space.map_anywhere(&memory, number * PAGE, PAGE, Permissions::READ) {
                    Ok(at) => Some(at.get() / PAGE),
                    Err(MapError::NoHole { .. }) => None,
                    Err(error) => panic!("{error}"),
                }
            })
        });
        unmaps.into_iter().for_each(|thread| thread.join().unwrap());
        let mut places: Vec<u64> = asks.into_iter().filter_map(|thread| thread.join().unwrap()).collect();
        // What they did not get is there for others.
        for _ in places.len()..2 {
            let place = world.space.map_anywhere(&memory, 0, PAGE, Permissions::READ);
            places.push(place.expect("a free page is found").get() / PAGE);
        }
        places.sort_unstable();
        assert_eq!(places, [AT, AT + 1]);
        let full = world.space.map_anywhere(&memory, 0, PAGE, Permissions::READ);
        assert!(matches!(full, Err(MapError::NoHole { .. })));
        world.finish();
    });
}

/// A device model that gives its slice back when it is asked, if it is told to.
#[derive(Default)]
struct Model {
    slice: Mutex<Option<BorrowedSlice>>,
    gives_back: bool,
}

impl SliceHolder for Model {
    fn let_go(&self, _wanted: IovaRange) {
        if self.gives_back {
            let slice = self.slice.lock().unwrap().take();
            drop(slice);
        }
    }
}

#[test]
fn a_borrowed_page_is_given_back_before_it_is_unmapped_or_stays_mapped() {
    check(1000, || {
        let world = World::new();
        let memory = world.register(&world.object(0..1), 1);
        let device = world.double.attached(DERIVED, &world.space);
        world.lent.lend([0]);
        world.space.map(iova(AT), &memory, 0, PAGE, Permissions::READ_WRITE).unwrap();
        let borrower = {
            let world = world.clone();
            thread::spawn(move || {
                let model = Arc::new(Model { gives_back: random(2) == 0, ..Model::default() });
                if let Ok(slice) = world.space.borrow(iova(AT), 8, Permissions::READ, model.clone()) {
                    let mut number = [0; 8];
                    slice.read(0, &mut number).unwrap();
                    *model.slice.lock().unwrap() = Some(slice);
                }
                others_may_run();
                // As long as it has the slice the page is mapped.
                if let Some(slice) = model.slice.lock().unwrap().as_ref() {
                    assert_eq!(slice.range().first(), AT * PAGE);
                    assert!(matches!(world.dma(DERIVED, AT), Seen::Page(0) | Seen::Fault));
                }
                let slice = model.slice.lock().unwrap().take();
                drop(slice);
            })
        };
        match world.space.unmap(page(AT)) {
            Ok(unmapped) => {
                assert_eq!(unmapped.bytes(), PAGE);
                world.lent.take_back([0]);
            }
            Err(UnmapError::Borrowed(_)) => assert_eq!(world.dma(DERIVED, AT), Seen::Page(0)),
            Err(error) => panic!("{error}"),
        }
        borrower.join().unwrap();
        drop(device);
        world.finish();
    });
}
