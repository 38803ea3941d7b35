//! How much memory is asked for by those who register, map and release one piece after the other, and how much a million
//! PASIDs have.

use ioasid::pasid::{Limit, MOST_PASIDS, Owner, PasidSystem, Spid};
use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, Space};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

/// Counts the allocations of each thread, and its bytes.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

// SAFETY: all work is done by the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
        let _ = BYTES.try_with(|bytes| bytes.set(bytes.get() + layout.size() as i64));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let _ = BYTES.try_with(|bytes| bytes.set(bytes.get() - layout.size() as i64));
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn a_piece_is_registered_with_one_allocation_and_mapped_with_none() {
    const PAGE: u64 = 4096;
    const PIECES: u64 = 20_000;
    let (bus, account) = (Bus::new(), Account::new("user", Some(PIECES)).child("process", None));
    let backing = Backing::anonymous(&bus, 2 * PIECES * PAGE).unwrap();
    let space = Space::new(&bus);
    let table = |piece: u64| piece % 512 == 0;
    let mut memories: Vec<Arc<Memory>> = Vec::with_capacity(PIECES as usize);
    let registering = allocations(|| {
        for piece in 0..PIECES {
            memories.push(Memory::register(&backing, 2 * piece * PAGE, PAGE, &account).unwrap());
        }
    });
    // The books grow, in large blocks.
    assert!((PIECES..PIECES + PIECES / 50).contains(&registering), "{registering}");
    for piece in 0..PIECES {
        let mapping = allocations(|| {
            let memory = &memories[piece as usize];
            space.map(Iova::new(piece * PAGE), memory, 0, PAGE, Permissions::READ).unwrap();
        });
        assert!(mapping == 0 || table(piece), "{mapping} at {piece}");
    }
    space.unmap(IovaRange::with_length(0, PIECES * PAGE).unwrap()).unwrap();
    // What it looks for, where it was mapped.
    let releasing = allocations(|| memories.drain(..).for_each(drop));
    assert!(releasing <= 3 * PIECES, "{releasing}");
    assert_eq!(account.charged_pages(), 0);
}

#[test]
fn a_pasid_has_at_most_64_bytes_in_a_million() {
    const LIVE: u32 = 1_000_000;
    let before = BYTES.get();
    let system = PasidSystem::new(MOST_PASIDS).unwrap();
    let limit = Limit::new(&system, "all", None);
    // One set with all of them, the worst case: its table of private IDs has doubled just before.
    let set = system.create_set(Owner::Machine(1), LIVE, &limit).unwrap();
    for number in 0..LIVE {
        let pasid = set.allocate(0..=u32::MAX, 0).unwrap();
        set.set_spid(pasid, Spid::new(LIVE - number)).unwrap();
    }
    let bytes = BYTES.get() - before;
    assert!(bytes <= 64 * i64::from(LIVE), "{bytes}");
    // With none of them it is no more than when it began to have them.
    drop(set);
    let status = system.status();
    drop((limit, system));
    assert_eq!((BYTES.get() - before, status.used), (0, 0));
}
