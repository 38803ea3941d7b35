//! Unmaps, strict and deferred, against DMA and against maps of the same place.

use crate::double::{DERIVED, NATIVE};
use crate::fixture::{PAGE, World, check, iova, page, pages, random};
use ioasid::{IovaRange, MapError, Permissions, UnmapError};
use shuttle::thread;

/// Where things are mapped.
const AT: u64 = 0x200;

#[test]
fn what_was_unmapped_is_reached_by_no_device() {
    check(400, || {
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
                world.lent.take_back([2 * round]);
            } else {
                world.space.unmap(page(AT)).unwrap();
                world.lent.take_back([2 * round]);
                world.space.unmap(page(AT + 1)).unwrap();
            }
            world.lent.take_back([2 * round + 1]);
        }
        dma.into_iter().for_each(|thread| thread.join().unwrap());
        drop(devices);
        world.finish();
    });
}
