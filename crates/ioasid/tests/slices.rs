//! Borrowed slices: what a device model may rely on, and what an unmap may.

mod double;

use double::search::{CERTAINTY, Search};
use double::{DERIVED, Double, NATIVE, Stop};
use ioasid::{
    Account, Backing, BorrowError, BorrowedSlice, Bus, Iova, IovaRange, LateBound, Memory, MemoryGone,
    Permissions, ProtectError, RemapError, SLICE_PATIENCE, SliceHandle, Space, StillBorrowed, UnmapError,
};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const RW: Permissions = Permissions::READ_WRITE;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

struct Scene {
    backing: Arc<Backing>,
    ram: Arc<Memory>,
    space: Arc<Space>,
}

impl Scene {
    /// 4 MiB of memory, mapped from address 0.
    fn new() -> Scene {
        let bus = Bus::new();
        let backing = Backing::anonymous(&bus, 2 * M2).unwrap();
        let ram = Memory::register(&backing, 0, 2 * M2, &Account::new("test", None)).unwrap();
        let space = Space::new(&bus);
        space.map(Iova::new(0), &ram, 0, 2 * M2, RW).unwrap();
        Scene { backing, ram, space }
    }

    /// A slice whose holder does nothing when it is asked, and how often that was.
    fn stubborn(
        &self,
        iova: u64,
        length: u64,
        permissions: Permissions,
    ) -> (BorrowedSlice, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let let_go = move |_: IovaRange| {
            count.fetch_add(1, Ordering::SeqCst);
        };
        (self.space.borrow(Iova::new(iova), length, permissions, Arc::new(let_go)).unwrap(), asked)
    }
}

/// A holder that lets go when it is asked.
#[derive(Default)]
struct Polite(Arc<Mutex<Option<BorrowedSlice>>>);

impl Polite {
    fn borrow(space: &Arc<Space>, iova: u64, length: u64) -> Result<Polite, BorrowError> {
        let polite = Polite::default();
        let held = Arc::downgrade(&polite.0);
        let let_go = move |_: IovaRange| drop(held.upgrade().and_then(|held| held.lock().unwrap().take()));
        let slice = space.borrow(Iova::new(iova), length, RW, Arc::new(let_go))?;
        *polite.0.lock().unwrap() = Some(slice);
        Ok(polite)
    }

    fn holds(&self) -> bool {
        self.0.lock().unwrap().is_some()
    }
}

#[test]
fn a_slice_is_the_memory_itself() {
    let scene = Scene::new();
    // Over a border between leaves that lead to distant memory.
    scene.space.unmap(range(M2, M2)).unwrap();
    scene.space.map(Iova::new(M2), &scene.ram, K4, K4, RW).unwrap();
    let (slice, _) = scene.stubborn(M2 - 8, 24, RW);
    slice.write(2, b"over the border").unwrap();
    let mut bytes = [0; 8];
    scene.backing.read(M2 - 6, &mut bytes[..6]).unwrap();
    assert_eq!(&bytes[..6], b"over t");
    scene.backing.read(K4, &mut bytes).unwrap();
    assert_eq!(&bytes, b"he borde");
    scene.backing.write(K4 + 8, &7u64.to_ne_bytes()).unwrap();
    assert_eq!(slice.atomic_u64(16).unwrap().fetch_add(1, Ordering::SeqCst), 7);
    scene.backing.read(K4 + 8, &mut bytes).unwrap();
    assert_eq!(bytes, 8u64.to_ne_bytes());
    let mut back = [0; 15];
    slice.read(2, &mut back).unwrap();
    assert_eq!(&back[..14], b"over the borde");
    assert_eq!(slice.pieces().map(|(_, length)| length).collect::<Vec<_>>(), [8, 16]);
    // Nothing outside of it, nothing unaligned, nothing that is in two pieces.
    assert!(slice.read(10, &mut [0; 15]).is_err() && slice.write(u64::MAX, &[1]).is_err());
    assert!(
        slice.atomic_u64(17).is_none() && slice.atomic_u64(24).is_none() && slice.atomic_u32(6).is_none()
    );
    let (reader, _) = scene.stubborn(0, 16, Permissions::READ);
    assert!(reader.write(0, &[1]).is_err() && reader.atomic_u32(0).is_none());
    reader.read(0, &mut [0; 16]).unwrap();
}

#[derive(Debug)]
struct Nothing;

impl LateBound for Nothing {
    fn read(&self, offset: u64, _buffer: &mut [u8]) -> Result<(), MemoryGone> {
        Err(MemoryGone { offset })
    }

    fn write(&self, offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        Err(MemoryGone { offset })
    }
}

#[test]
fn what_cannot_be_borrowed_is_named_and_leaves_nothing_behind() {
    let scene = Scene::new();
    let space = &scene.space;
    let ask = |iova, length, permissions| {
        let refused = space.borrow(Iova::new(iova), length, permissions, Arc::new(|_| {})).map(drop);
        refused.unwrap_err()
    };
    assert_eq!(ask(2 * M2 - 1, 2, RW), BorrowError::NotMapped { at: Iova::new(2 * M2) });
    assert_eq!(ask(1, 0, RW), BorrowError::NoRange { iova: Iova::new(1), length: 0 });
    assert_eq!(ask(u64::MAX, 2, RW), BorrowError::NoRange { iova: Iova::new(u64::MAX), length: 2 });
    let last = u64::MAX - (K4 - 1);
    space.map(Iova::new(last), &scene.ram, 0, K4, Permissions::READ).unwrap();
    assert_eq!(ask(last + 1, K4 - 1, RW), BorrowError::NoPermission { at: Iova::new(last + 1) });
    let late = Backing::late_bound(scene.backing.bus(), Arc::new(Nothing));
    let late = Memory::register(&late, 0, K4, &Account::new("test", None)).unwrap();
    space.map(Iova::new(4 * M2), &late, 0, K4, RW).unwrap();
    assert_eq!(ask(4 * M2, 1, RW), BorrowError::NotHere { at: Iova::new(4 * M2) });
    drop(space.borrow(Iova::new(last), K4, Permissions::READ, Arc::new(|_| {})).unwrap());
    // Nothing of all that is in the way of an unmap.
    space.unmap(IovaRange::ALL).unwrap();
}

#[test]
fn an_unmap_that_gets_no_slice_back_fails_and_changes_nothing() {
    let (scene, double) = (Scene::new(), Double::new());
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &scene.space));
    let before = scene.space.leaves(IovaRange::ALL);
    let (slice, asked) = scene.stubborn(5 * K4 + 100, 8, Permissions::READ);
    let borrowed = range(5 * K4 + 100, 8);
    for (first, length) in [(5 * K4, K4), (0, 2 * M2), (4 * K4, 3 * K4)] {
        for deferred in [false, true] {
            let count = asked.load(Ordering::SeqCst);
            let unmapped = match deferred {
                false => scene.space.unmap(range(first, length)),
                true => scene.space.unmap_deferred(range(first, length)),
            };
            let Err(UnmapError::Borrowed(error)) = unmapped else { panic!("{unmapped:?}") };
            assert_eq!(error, StillBorrowed { range: borrowed });
            assert_eq!(asked.load(Ordering::SeqCst), count + 1, "asked once for each attempt");
        }
    }
    assert_eq!(scene.space.leaves(IovaRange::ALL), before);
    assert!(!slice.is_wanted());
    // Its neighbours are nobody's business, whether they share a leaf with it or not.
    scene.space.unmap(range(6 * K4, K4)).unwrap();
    scene.space.unmap(range(M2, M2)).unwrap();
    scene.space.unmap(range(0, 5 * K4)).unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 6);
    drop(slice);
    scene.space.unmap(range(5 * K4, K4)).unwrap();
}

#[test]
fn holders_that_let_go_are_asked_and_waited_for() {
    let scene = Scene::new();
    let double = Double::new();
    let _device = double.attached(NATIVE, &scene.space);
    // In the callback itself, several at once; one elsewhere, a moment later.
    let polite = [0, K4 - 8, 3 * K4].map(|iova| Polite::borrow(&scene.space, iova, 16).unwrap());
    let wanted = Arc::new(AtomicBool::new(false));
    let seen = wanted.clone();
    let let_go = move |_: IovaRange| seen.store(true, Ordering::SeqCst);
    let elsewhere = scene.space.borrow(Iova::new(2 * K4), K4, RW, Arc::new(let_go)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let began = Instant::now();
            while !wanted.load(Ordering::SeqCst) && began.elapsed() < CERTAINTY {
                std::thread::yield_now();
            }
            assert!(elsewhere.is_wanted());
            elsewhere.write(0, b"last words").unwrap();
            drop(elsewhere);
        });
        let bytes = loop {
            let began = Instant::now();
            match scene.space.unmap(range(0, 3 * K4)) {
                Ok(unmapped) => break unmapped.bytes(),
                // Where many want the processor, that moment may be long.
                Err(refused) => assert!(began.elapsed() >= SLICE_PATIENCE, "{refused}"),
            }
        };
        assert_eq!(bytes, 3 * K4);
    });
    assert_eq!(polite.map(|polite| polite.holds()), [false, false, true]);
}

#[test]
fn nobody_new_can_borrow_while_an_unmap_asks() {
    let scene = Scene::new();
    let space = scene.space.clone();
    let refused = Arc::new(Mutex::new(None));
    let result = refused.clone();
    let let_go = move |wanted: IovaRange| {
        let again = space.borrow(Iova::new(wanted.first()), 1, RW, Arc::new(|_| {})).map(drop);
        // Nothing is decided yet: devices still reach the memory.
        assert!(space.walk(Iova::new(wanted.first())).is_some());
        let beside = space.borrow(Iova::new(wanted.last() + 1), 1, RW, Arc::new(|_| {})).map(drop);
        *result.lock().unwrap() = Some((again, beside));
    };
    let slice = scene.space.borrow(Iova::new(0), 1, RW, Arc::new(let_go)).unwrap();
    assert!(scene.space.unmap(range(0, K4)).is_err());
    let (again, beside) = refused.lock().unwrap().take().unwrap();
    assert_eq!(again, Err(BorrowError::BeingUnmapped { range: range(0, 1) }));
    assert_eq!(beside, Ok(()));
    // Afterwards everything is as before.
    drop(scene.space.borrow(Iova::new(0), 1, RW, Arc::new(|_| {})).unwrap());
    drop(slice);
}

#[test]
fn a_thread_that_waits_for_itself_gets_an_error() {
    let scene = Scene::new();
    let (slice, _) = scene.stubborn(0, 1, RW);
    assert!(matches!(scene.space.unmap(range(0, K4)), Err(UnmapError::Borrowed(_))));
    // One that unmaps from the callback, too.
    let (space, inner) = (scene.space.clone(), Arc::new(Mutex::new(None)));
    let result = inner.clone();
    let let_go = move |wanted| *result.lock().unwrap() = Some(space.unmap(wanted).is_err());
    let other = scene.space.borrow(Iova::new(K4), 1, RW, Arc::new(let_go)).unwrap();
    assert!(scene.space.unmap(range(K4, K4)).is_err());
    assert_eq!(*inner.lock().unwrap(), Some(true));
    drop((slice, other));
    scene.space.unmap(IovaRange::ALL).unwrap();
}

#[test]
fn memory_that_is_dropped_goes_from_the_devices_but_not_from_the_slice() {
    let Scene { backing, ram, space } = Scene::new();
    let double = Double::new();
    let _device = double.attached(DERIVED, &space);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let let_go = move |_: IovaRange| {
        count.fetch_add(1, Ordering::SeqCst);
    };
    let slice = space.borrow(Iova::new(K4), K4, RW, Arc::new(let_go)).unwrap();
    slice.write(0, b"stays").unwrap();
    drop((ram, backing));
    assert!(asked.load(Ordering::SeqCst) > 0);
    assert!(space.leaves(IovaRange::ALL).is_empty());
    let mut bytes = [0; 5];
    slice.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"stays");
    // What comes to the same addresses is not what the slice is about.
    let other = Backing::anonymous(space.bus(), 2 * M2).unwrap();
    let other = Memory::register(&other, 0, 2 * M2, &Account::new("test", None)).unwrap();
    space.map(Iova::new(0), &other, 0, 2 * M2, RW).unwrap();
    slice.write(0, b"alone").unwrap();
    other.backing().read(K4, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 5]);
}

#[test]
fn handles_get_slices_back_and_keep_nothing() {
    let scene = Scene::new();
    let polite = Polite::borrow(&scene.space, 0, K4).unwrap();
    let (stubborn, _) = scene.stubborn(M2, K4, RW);
    let handles = [polite.0.lock().unwrap().as_ref().unwrap().handle(), stubborn.handle()];
    assert!(handles.iter().all(SliceHandle::is_held));
    let refused = SliceHandle::recall_all(&handles).unwrap_err();
    assert_eq!(refused, StillBorrowed { range: range(M2, K4) });
    assert!(!polite.holds() && !handles[0].is_held() && handles[1].is_held());
    drop(stubborn);
    SliceHandle::recall_all(&handles).unwrap();
}

#[test]
fn an_unmap_and_a_borrower_never_miss_each_other() {
    // The number in each page says who owns it: the test while it is unmapped, devices' models otherwise.
    const PAGES: u64 = 8;
    let (scene, double) = (Scene::new(), Double::new());
    let _device = double.attached(NATIVE, &scene.space);
    let stop = AtomicBool::new(false);
    let borrowed = AtomicU64::new(0);
    let (space, ram) = (&scene.space, &scene.ram);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&borrowed]);
        for thread in 0..2u64 {
            let (stop, borrowed) = (&stop, &borrowed);
            scope.spawn(move || {
                for step in thread.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let Ok(polite) = Polite::borrow(space, step * 3 % PAGES * K4, K4) else { continue };
                    // As long as the slice is held here, nobody owns the page.
                    if let Some(slice) = &*polite.0.lock().unwrap() {
                        borrowed.fetch_add(1, Ordering::Relaxed);
                        for _ in 0..5 {
                            let word = slice.atomic_u64(0).unwrap();
                            assert_eq!(word.load(Ordering::SeqCst), 0, "borrowed although it is unmapped");
                        }
                    };
                }
            });
        }
        for round in search {
            let (first, length) = (round % PAGES * K4, K4);
            // It may fail: a borrower that lost its CPU while it held its own lock.
            let unmapped = match round % 3 {
                0 => space.unmap_deferred(range(first, length)).map(|_| space.flush()),
                _ => space.unmap(range(first, length)).map(drop),
            };
            if unmapped.is_err() {
                continue;
            }
            scene.backing.write(first, &1u64.to_ne_bytes()).unwrap();
            std::thread::yield_now();
            scene.backing.write(first, &0u64.to_ne_bytes()).unwrap();
            space.map(Iova::new(first), ram, first, length, RW).unwrap();
        }
    });
    assert!(borrowed.load(Ordering::Relaxed) > 0, "nothing was ever borrowed");
}

#[test]
fn rights_that_are_borrowed_are_not_taken_away() {
    let (scene, double) = (Scene::new(), Double::new());
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &scene.space));
    let space = &scene.space;
    let (reader, _) = scene.stubborn(0, K4, Permissions::READ);
    let (writer, asked) = scene.stubborn(M2, K4, Permissions::WRITE);
    let before = space.leaves(IovaRange::ALL);
    // What the slices do not need can go.
    space.protect(range(0, K4), Permissions::READ).unwrap();
    space.protect(range(0, K4), RW).unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    let refused = space.protect(range(0, 2 * M2), Permissions::READ);
    assert!(
        matches!(refused, Err(ProtectError::Borrowed(error)) if error.range == range(M2, K4)),
        "{refused:?}"
    );
    for iova in [0, M2] {
        let refused = space.remap(Iova::new(iova), &scene.ram, 4 * K4, K4, RW);
        assert!(
            matches!(refused, Err(RemapError::Borrowed(error)) if error.range == range(iova, K4)),
            "{refused:?}"
        );
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    let joined = |space: &Space| double::mappings(space);
    assert_eq!(joined(space).len(), 1, "{before:?}");
    drop((reader, writer));
    space.remap(Iova::new(M2), &scene.ram, 4 * K4, K4, Permissions::READ).unwrap();
}

#[test]
fn a_change_in_place_and_a_borrower_never_miss_each_other() {
    let (scene, double) = (Scene::new(), Double::new());
    let _device = double.attached(DERIVED, &scene.space);
    let stop = AtomicBool::new(false);
    let (written, space) = (AtomicU64::new(0), &scene.space);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&written]);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let Ok(polite) = Polite::borrow(space, 0, K4) else { continue };
                if let Some(slice) = &*polite.0.lock().unwrap() {
                    slice.write(0, &[1; 8]).unwrap();
                    written.fetch_add(1, Ordering::Relaxed);
                };
            }
        });
        for round in search {
            let place = [0, 8 * K4];
            // Either way nobody writes there any more through what was borrowed before.
            let gone = match round % 2 {
                0 => space.protect(range(0, K4), Permissions::READ).is_ok(),
                _ => space.remap(Iova::new(0), &scene.ram, place[1], K4, RW).is_ok(),
            };
            if gone {
                let mut bytes = [0; 8];
                scene.backing.write(0, &[0; 8]).unwrap();
                std::thread::yield_now();
                scene.backing.read(0, &mut bytes).unwrap();
                assert_eq!(bytes, [0; 8], "written although it was taken away, round {round}");
            }
            // Back to the beginning; who has borrowed the other page meanwhile is asked.
            while space.remap(Iova::new(0), &scene.ram, place[0], K4, RW).is_err() {}
        }
    });
    assert!(written.load(Ordering::Relaxed) > 0, "nothing was ever borrowed");
}

/// A holder is asked in the middle of a remap, behind its first look at the new memory: what becomes of that memory meanwhile
/// counts.
#[test]
fn memory_that_goes_while_a_remap_asks_for_a_slice_is_led_to_by_nothing() {
    type Goes = fn(&Memory);
    let ways: [(&str, Goes); 3] = [
        ("released in the middle", |new| new.release(K4, K4).unwrap()),
        ("released at the end", |new| new.release(3 * K4, K4).unwrap()),
        ("revoked", |new| new.backing().revoke()),
    ];
    for (way, goes) in ways {
        let bus = Bus::new();
        let space = Space::new(&bus);
        let account = Account::new("test", None);
        let register =
            || Memory::register(&Backing::anonymous(&bus, 4 * K4).unwrap(), 0, 4 * K4, &account).unwrap();
        let (old, new) = (register(), register());
        space.map(Iova::new(0), &old, 0, 4 * K4, RW).unwrap();
        let slot: Arc<Mutex<Option<BorrowedSlice>>> = Arc::default();
        let (held, going) = (slot.clone(), new.clone());
        let let_go = move |_: IovaRange| {
            goes(&going);
            drop(held.lock().unwrap().take());
        };
        *slot.lock().unwrap() = Some(space.borrow(Iova::new(0), 8, RW, Arc::new(let_go)).unwrap());
        let refused = space.remap(Iova::new(0), &new, 0, 4 * K4, RW);
        assert!(slot.lock().unwrap().is_none(), "{way}: nobody was asked");
        assert!(matches!(refused, Err(RemapError::Request(_))), "{way}: {refused:?}");
        let leaf = space.walk(Iova::new(0)).unwrap();
        assert!(Arc::ptr_eq(&space.object_at(leaf.oa).unwrap().0, old.backing()), "{way}");
        assert_eq!(space.statistics().busy_bytes, 0, "{way}");
    }
}

/// Nobody had borrowed anything when the unmap began, and somebody has when the leaf is taken back.
#[test]
fn who_borrows_behind_the_first_look_of_an_unmap_is_seen_at_the_second() {
    let (scene, double) = (Scene::new(), Double::new());
    let _device = double.attached(DERIVED, &scene.space);
    double.switches.close_gate(Stop::Cuts);
    std::thread::scope(|scope| {
        let unmapper = scope.spawn(|| scene.space.unmap(range(0, K4)));
        double.switches.wait_for_call();
        let slice = scene.space.borrow(Iova::new(0), 8, RW, Arc::new(|_: IovaRange| {}));
        double.switches.open_gate();
        let refused = unmapper.join().unwrap();
        assert!(matches!(refused, Err(UnmapError::Borrowed(_))), "{refused:?}");
        assert!(slice.is_ok() && scene.space.walk(Iova::new(0)).is_some());
    });
    assert_eq!(scene.space.unmap(range(0, K4)).unwrap().bytes(), K4);
}
