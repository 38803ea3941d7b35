//! DMA against unmap and against changes of what is mapped, with threads.
//!
//! What a program relies on: when an unmap has returned, no device touches the memory, so that it may be
//! overwritten or freed; and whoever is next to what is unmapped notices nothing. The same holds for memory that was
//! mapped before a remap, for rights that a protect has taken away, and for aliases of memory that is released; and
//! none of these makes a device fault. The devices here are threads that
//! translate and copy as an IOMMU in software does, through the native table or a derived one.

mod double;

use double::search::{CERTAINTY, Search};
use double::{DERIVED, Double, DoubleTable, NATIVE, OWN_NATIVE, SMALL, X86};
use ioasid::pagetable::Native;
use ioasid::{
    Account, Attributes, Backing, Bus, CachedWalk, Extent, Iova, IovaRange, LateBound, MappingPolicy, Memory,
    MemoryGone, Permissions, Rid, Space, Table, Translated, WalkFault, epoch,
};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const RW: Permissions = Permissions::READ_WRITE;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// A device's way to memory, one for each thread.
struct Port {
    table: Arc<Table>,
    cache: CachedWalk<AtomicU64>,
}

enum Transfer<'a> {
    FromMemory(&'a mut [u8]),
    ToMemory(&'a [u8]),
}

impl Port {
    fn new(double: &Double, rid: Rid) -> Port {
        Port { table: double.table_of(rid).unwrap(), cache: CachedWalk::new() }
    }

    /// One transfer within a page. `Ok(false)`: the memory was there, but its owner does not give it, or the leaf does not
    /// allow it.
    fn transfer(&mut self, iova: u64, transfer: Transfer<'_>) -> Result<bool, WalkFault> {
        let section = epoch::dma();
        let space = self.table.space();
        let leaf = match self.table.derived() {
            None => space.walk_for_dma(&section, iova, &mut self.cache)?,
            Some(derived) => {
                let derived = derived.as_any().downcast_ref::<DoubleTable>().unwrap();
                derived.radix().walk_cached(iova, &mut self.cache)?
            }
        };
        let needed = match transfer {
            Transfer::FromMemory(_) => Attributes::READ,
            Transfer::ToMemory(_) => Attributes::WRITE,
        };
        if !leaf.attributes.contains(needed) {
            return Ok(false);
        }
        // Memory that goes while it is mapped is unmapped first; so what was translated is there.
        match space.memory_at(&section, leaf.output(iova)).unwrap() {
            Translated::Here(here) => match transfer {
                Transfer::FromMemory(buffer) => here.read(buffer).unwrap(),
                Transfer::ToMemory(bytes) => here.write(bytes).unwrap(),
            },
            Translated::Late(late) => {
                drop(section);
                let result = match transfer {
                    Transfer::FromMemory(buffer) => late.read(buffer),
                    Transfer::ToMemory(bytes) => late.write(bytes),
                };
                return Ok(result.is_ok());
            }
        }
        Ok(true)
    }

    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<bool, WalkFault> {
        self.transfer(iova, Transfer::ToMemory(bytes))
    }

    fn read(&mut self, iova: u64, buffer: &mut [u8]) -> Result<bool, WalkFault> {
        self.transfer(iova, Transfer::FromMemory(buffer))
    }
}

/// What devices write.
const FROM_DEVICE: [u8; K4 as usize] = [0xdd; K4 as usize];

#[test]
fn unmapped_memory_is_the_programs_own_and_neighbours_never_fault() {
    let (bus, double) = (Bus::new(), Double::new());
    let account = Account::new("test", None);
    let backing = Backing::anonymous(&bus, 2 * M2).unwrap();
    let ram = Memory::register(&backing, 0, 2 * M2, &account).unwrap();
    let space = Space::new(&bus);
    space.map(Iova::new(0), &ram, 0, 2 * M2, RW).unwrap();
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    let stop = AtomicBool::new(false);
    let written = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&written[0], &written[1]]);
        for (rid, written) in [NATIVE, DERIVED].into_iter().zip(&written) {
            let (mut port, stop) = (Port::new(&double, rid), &stop);
            scope.spawn(move || {
                for step in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    // The victim may be there or not.
                    let place = (step * 7919) % (M2 / K4) * K4;
                    if port.write(place, &FROM_DEVICE).is_ok() {
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                    // The other half is nobody's business, nor is the page behind the victim's place.
                    port.write(M2 + place, &FROM_DEVICE[..64]).expect("a neighbour has faulted");
                    port.write(2 * M2 - 64, &FROM_DEVICE[..64]).expect("a neighbour has faulted");
                }
            });
        }
        let mut buffer = vec![0; M2 as usize];
        for round in search {
            // From one page to all of the first half, with cuts and without.
            let length = K4 << (round % 10);
            let first = if length == M2 { 0 } else { (round * K4 * 3) % (M2 - length) };
            let (mine, length) = (vec![round as u8 & 0x7f; length as usize], length);
            assert_eq!(space.unmap(range(first, length)).unwrap().bytes(), length);
            backing.write(first, &mine).unwrap();
            if round % 4 == 0 {
                std::thread::yield_now();
            }
            let seen = &mut buffer[..length as usize];
            backing.read(first, seen).unwrap();
            assert!(*seen == *mine, "a device has written after the unmap, round {round}");
            space.map(Iova::new(first), &ram, first, length, RW).unwrap();
        }
    });
    for written in &written {
        assert!(written.load(Ordering::Relaxed) > 0, "no device has ever reached the memory");
    }
}

/// Pages of this process that are unmapped from it at the end: whoever touches them afterwards crashes.
struct Pages(NonNull<u8>, usize);

impl Pages {
    fn new(length: u64) -> Pages {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let length = length as usize;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let pointer = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        Pages(NonNull::new(pointer.unwrap().cast()).unwrap(), length)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`. That nobody uses it any more is what the tests are about.
        unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), self.1) }.unwrap();
    }
}

#[test]
fn memory_is_freed_under_the_eyes_of_devices() {
    let (bus, double) = (Bus::new(), Double::new());
    let account = Account::new("test", None);
    let space = Space::new(&bus);
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    let stop = AtomicBool::new(false);
    let copied = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&copied]);
        for rid in [NATIVE, DERIVED] {
            let (mut port, stop, copied) = (Port::new(&double, rid), &stop, &copied);
            scope.spawn(move || {
                let mut buffer = [0; K4 as usize];
                for step in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let place = step % 16 * K4;
                    let done = if step % 2 == 0 {
                        port.write(place, &FROM_DEVICE)
                    } else {
                        port.read(place, &mut buffer)
                    };
                    copied.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
                }
            });
        }
        for round in search {
            let pages = Pages::new(16 * K4);
            // SAFETY: the pages live longer than the backing and what is registered of it: see the drops below.
            let backing = unsafe { Backing::host(&bus, pages.0, 16 * K4) };
            let ram = Memory::register(&backing, 0, 16 * K4, &account).unwrap();
            space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
            let before = copied.load(Ordering::Relaxed);
            let deadline = Instant::now() + Duration::from_millis(5);
            while copied.load(Ordering::Relaxed) < before + 3 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            // Unmapped by hand, or only by the drop.
            if round % 2 == 0 {
                space.unmap(range(0, 16 * K4)).unwrap();
            }
            drop((ram, backing));
            drop(pages);
        }
    });
    assert!(copied.load(Ordering::Relaxed) > 0, "no device has ever reached the memory");
}

#[test]
fn a_device_sees_one_memory_or_the_other_and_never_the_former_again() {
    let (bus, double) = (Bus::new(), Double::new());
    let space = Space::new(&bus);
    let _device = double.attached(NATIVE, &space);
    let stop = AtomicBool::new(false);
    // The number of the last memory that was certainly in place.
    let mapped = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, []);
        for _ in 0..2 {
            let (mut port, stop, mapped) = (Port::new(&double, NATIVE), &stop, &mapped);
            scope.spawn(move || {
                let mut words = [0; 512];
                while !stop.load(Ordering::Relaxed) {
                    let least = mapped.load(Ordering::SeqCst);
                    if port.read(0, &mut words).is_ok() {
                        let number = u64::from_le_bytes(words[..8].try_into().unwrap());
                        assert!(words.chunks(8).all(|word| word == number.to_le_bytes()), "a mixture");
                        assert!(number >= least, "{number} is gone, {least} was there already");
                    }
                }
            });
        }
        let mut before: Option<Arc<Memory>> = None;
        for number in search.map(|round| round + 1) {
            let backing = Backing::anonymous(&bus, K4).unwrap();
            backing.write(0, &number.to_le_bytes().repeat(512)).unwrap();
            let ram = Memory::register(&backing, 0, K4, &Account::new("test", None)).unwrap();
            if number % 2 == 0 {
                space.unmap(range(0, K4)).unwrap();
            }
            // Windows are used again and again.
            drop(before.replace(ram.clone()));
            space.map(Iova::new(0), &ram, 0, K4, RW).unwrap();
            mapped.store(number, Ordering::SeqCst);
        }
    });
}

/// What memory holds that was mapped once.
const GONE: u64 = u64::MAX;

#[test]
fn a_remapped_range_leads_to_the_old_memory_or_the_new_and_never_to_the_old_again() {
    let (bus, double) = (Bus::new(), Double::new());
    let space = Space::new(&bus);
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    let account = Account::new("test", None);
    let backings: Vec<_> = (0..3).map(|_| Backing::anonymous(&bus, M2 + 4 * K4).unwrap()).collect();
    let memories: Vec<_> =
        backings.iter().map(|backing| Memory::register(backing, 0, M2 + 4 * K4, &account).unwrap()).collect();
    let fill = |backing: &Backing, number: u64| {
        backing.write(0, &number.to_le_bytes().repeat((M2 + 4 * K4) as usize / 8)).unwrap();
    };
    fill(&backings[0], 0);
    space.map(Iova::new(0), &memories[0], 0, M2, RW).unwrap();
    let stop = AtomicBool::new(false);
    let (remapped, read) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&read]);
        for rid in [NATIVE, DERIVED] {
            let (mut port, stop, remapped, read) = (Port::new(&double, rid), &stop, &remapped, &read);
            scope.spawn(move || {
                let mut words = [0; 512];
                for step in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let least = remapped.load(Ordering::SeqCst);
                    let done = port.read(step * 7919 % (M2 / K4) * K4, &mut words);
                    assert!(done.expect("a device has faulted"));
                    let number = u64::from_le_bytes(words[..8].try_into().unwrap());
                    assert_ne!(number, GONE, "a device has reached memory that was mapped once");
                    assert!(words.chunks(8).all(|word| word == number.to_le_bytes()), "a mixture");
                    assert!(number >= least, "{number} is gone, {least} was there already");
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for number in search.map(|round| round + 1) {
            let (old, new) = ((number - 1) as usize % 3, number as usize % 3);
            fill(&backings[new], number);
            // In one leaf where it has become one, or cut to pages; as a whole or in two parts.
            let offset = number / 2 % 3 * K4;
            if number % 5 == 0 {
                let half = M2 / 2 + K4;
                space.remap(Iova::new(0), &memories[new], offset, half, RW).unwrap();
                space.remap(Iova::new(half), &memories[new], offset + half, M2 - half, RW).unwrap();
            } else {
                space.remap(Iova::new(0), &memories[new], offset, M2, RW).unwrap();
            }
            remapped.store(number, Ordering::SeqCst);
            fill(&backings[old], GONE);
            if offset == 0 && number % 3 == 0 {
                space.merge(range(0, M2));
            }
        }
    });
    assert!(read.load(Ordering::Relaxed) > 0, "no device has ever reached the memory");
    assert!(double.tables().iter().all(|table| table.is_invalidated()));
}

#[test]
fn what_was_made_read_only_is_not_written_and_nobody_finds_nothing() {
    let (bus, double) = (Bus::new(), Double::new());
    let backing = Backing::anonymous(&bus, M2).unwrap();
    let ram = Memory::register(&backing, 0, M2, &Account::new("test", None)).unwrap();
    let space = Space::new(&bus);
    space.map(Iova::new(0), &ram, 0, M2, RW).unwrap();
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&written]);
        for rid in [NATIVE, DERIVED] {
            let (mut port, stop, written) = (Port::new(&double, rid), &stop, &written);
            scope.spawn(move || {
                let mut buffer = [0; 64];
                for step in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let place = step * 7919 % (M2 / K4) * K4;
                    let done = port.write(place, &FROM_DEVICE).expect("a device has faulted");
                    written.fetch_add(u64::from(done), Ordering::Relaxed);
                    assert!(port.read(place, &mut buffer).expect("a device has faulted"), "never forbidden");
                }
            });
        }
        let mut buffer = vec![0; M2 as usize];
        for round in search {
            let length = K4 << (round % 10);
            let first = if length == M2 { 0 } else { round * K4 * 3 % (M2 - length) };
            let mine = vec![round as u8 & 0x7f; length as usize];
            assert_eq!(space.protect(range(first, length), Permissions::READ).unwrap(), length);
            backing.write(first, &mine).unwrap();
            std::thread::yield_now();
            let seen = &mut buffer[..length as usize];
            backing.read(first, seen).unwrap();
            assert!(*seen == *mine, "a device has written after the protect, round {round}");
            assert_eq!(space.protect(range(0, M2), RW).unwrap(), M2);
            if round % 8 == 0 {
                space.merge(range(0, M2));
            }
        }
    });
    assert!(written.load(Ordering::Relaxed) > 0, "no device has ever reached the memory");
    space.merge(IovaRange::ALL);
    assert_eq!(space.leaves(IovaRange::ALL).len(), 1);
    assert!(double.tables().iter().all(|table| table.is_invalidated()));
}

/// Devices that read the first pages of a space for as long as the scope lives, and do not mind faults.
fn read_along<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    mut port: Port,
    stop: &'scope AtomicBool,
    copied: &'scope AtomicU64,
) {
    scope.spawn(move || {
        let mut buffer = [0; K4 as usize];
        for step in 0u64.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let done = port.read(step % 16 * K4, &mut buffer);
            copied.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
        }
    });
}

#[test]
fn an_alias_goes_with_the_memory_also_if_it_is_just_being_made() {
    let (bus, double) = (Bus::new(), Double::new());
    let account = Account::new("test", None);
    let (space, other) = (Space::new(&bus), Space::new(&bus));
    let _devices = [double.attached(NATIVE, &space), double.attached(DERIVED, &other)];
    let stop = AtomicBool::new(false);
    let (copied, aliased) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&aliased, &copied]);
        for rid in [NATIVE, DERIVED] {
            read_along(scope, Port::new(&double, rid), &stop, &copied);
        }
        let (source, target, stop, aliased) = (&space, &other, &stop, &aliased);
        scope.spawn(move || {
            for round in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                // Nothing there, or something in the way: both happen.
                let done = source.alias(range(0, 16 * K4), target, Iova::new(round % 3 * K4), RW);
                aliased.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
                if round % 2 == 0 {
                    target.unmap(range(0, 17 * K4)).unwrap();
                }
            }
        });
        for round in search {
            let pages = Pages::new(16 * K4);
            // SAFETY: the pages live longer than the backing and what is registered of it: see the drops below.
            let backing = unsafe { Backing::host(&bus, pages.0, 16 * K4) };
            let ram = Memory::register(&backing, 0, 16 * K4, &account).unwrap();
            space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
            let before = aliased.load(Ordering::Relaxed);
            let deadline = Instant::now() + Duration::from_millis(2);
            while aliased.load(Ordering::Relaxed) <= before + round % 2 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            if round % 3 == 0 {
                // Only the alias is left of it.
                space.unmap(range(0, 16 * K4)).unwrap();
            }
            drop((ram, backing));
            // Nobody else maps anything, so there is nothing to copy any more.
            assert_eq!(space.leaves(IovaRange::ALL), []);
            assert_eq!(other.leaves(IovaRange::ALL), []);
            assert_eq!(double.tables()[0].mappings(), []);
            drop(pages);
        }
    });
    assert!(aliased.load(Ordering::Relaxed) > 0 && copied.load(Ordering::Relaxed) > 0);
}

#[test]
fn an_alias_of_an_alias_goes_with_the_memory_whatever_is_looked_at_first() {
    let (bus, account) = (Bus::new(), Account::new("test", None));
    // Mapped here, with aliases noted first for the one and then for the other.
    let (origin, target, source) = (Space::new(&bus), Space::new(&bus), Space::new(&bus));
    let stop = AtomicBool::new(false);
    let aliased = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&aliased]);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let done = source.alias(range(0, 4 * K4), &target, Iova::new(0), RW);
                aliased.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
                target.unmap(range(0, 4 * K4)).unwrap();
            }
        });
        for round in search {
            let backing = Backing::anonymous(&bus, 4 * K4).unwrap();
            let ram = Memory::register(&backing, 0, 4 * K4, &account).unwrap();
            origin.map(Iova::new(0), &ram, 0, 4 * K4, RW).unwrap();
            origin.alias(range(0, 4 * K4), &target, Iova::new(8 * K4), RW).unwrap();
            target.unmap(range(8 * K4, 4 * K4)).unwrap();
            origin.alias(range(0, 4 * K4), &source, Iova::new(0), RW).unwrap();
            origin.unmap(range(0, 4 * K4)).unwrap();
            for _ in 0..round % 64 * 8 {
                std::hint::spin_loop();
            }
            drop(ram);
            for space in [&origin, &target, &source] {
                assert_eq!(space.leaves(IovaRange::ALL), []);
            }
        }
    });
    assert!(aliased.load(Ordering::Relaxed) > 0);
}

#[test]
fn an_alias_of_memory_that_has_just_come_goes_with_that_memory() {
    let (bus, account) = (Bus::new(), Account::new("test", None));
    let (space, other) = (Space::new(&bus), Space::new(&bus));
    let fresh = || {
        let backing = Backing::anonymous(&bus, K4).unwrap();
        Memory::register(&backing, 0, K4, &account).unwrap()
    };
    let mut before = fresh();
    space.map(Iova::new(0), &before, 0, K4, RW).unwrap();
    let stop = AtomicBool::new(false);
    let aliased = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&aliased]);
        scope.spawn(|| {
            for round in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let done = space.alias(range(0, K4), &other, Iova::new(round % 64 * K4), RW);
                aliased.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
                if round % 64 == 0 {
                    other.unmap(IovaRange::ALL).unwrap();
                }
            }
        });
        for _ in search {
            // What was looked up a moment ago is another object now.
            let now = fresh();
            space.remap(Iova::new(0), &now, 0, K4, RW).unwrap();
            drop(std::mem::replace(&mut before, now));
            for leaf in other.leaves(IovaRange::ALL) {
                let (object, _) = other.object_at(leaf.oa).expect("the memory is gone and the alias is not");
                assert!(Arc::ptr_eq(&object, before.backing()));
            }
        }
    });
    assert!(aliased.load(Ordering::Relaxed) > 0);
}

#[test]
fn memory_that_is_just_being_remapped_away_is_not_freed_too_early() {
    let (bus, double) = (Bus::new(), Double::new());
    let account = Account::new("test", None);
    let space = Space::new(&bus);
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    let stays = Backing::anonymous(&bus, 16 * K4).unwrap();
    let stays = Memory::register(&stays, 0, 16 * K4, &account).unwrap();
    let stop = AtomicBool::new(false);
    let (copied, remapped) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&remapped, &copied]);
        for rid in [NATIVE, DERIVED] {
            read_along(scope, Port::new(&double, rid), &stop, &copied);
        }
        let (space, stays, stop, remapped) = (&space, &stays, &stop, &remapped);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let done = space.remap(Iova::new(0), stays, 0, 16 * K4, RW);
                remapped.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
            }
        });
        for _ in search {
            let pages = Pages::new(16 * K4);
            // SAFETY: the pages live longer than the backing and what is registered of it: see the drops below.
            let backing = unsafe { Backing::host(&bus, pages.0, 16 * K4) };
            let ram = Memory::register(&backing, 0, 16 * K4, &account).unwrap();
            space.unmap(range(0, 16 * K4)).unwrap();
            space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
            std::thread::yield_now();
            drop((ram, backing));
            drop(pages);
        }
    });
    assert!(remapped.load(Ordering::Relaxed) > 0 && copied.load(Ordering::Relaxed) > 0);
}

#[test]
fn all_operations_at_once_leave_every_table_in_step() {
    let (bus, double) = (Bus::new(), Double::new());
    let policy = MappingPolicy { most: Some(1000), whole_only: false };
    let spaces = [Space::new(&bus), Space::with_policy(&bus, Native::new(), policy)];
    let account = Account::new("test", None);
    let backing = Backing::anonymous(&bus, 8 * M2).unwrap();
    let ram = Memory::register(&backing, 0, 8 * M2, &account).unwrap();
    let rids = [[DERIVED, OWN_NATIVE], [X86, SMALL]];
    let _devices: Vec<_> =
        (0..2).flat_map(|space| rids[space].map(|rid| double.attached(rid, &spaces[space]))).collect();
    for round in 0..8u64 {
        std::thread::scope(|scope| {
            for worker in 0..3u64 {
                let (spaces, ram, backing, account) = (&spaces, &ram, &backing, &account);
                scope.spawn(move || {
                    let mut state = round * 3 + worker + 1;
                    for _ in 0..150 {
                        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let number = |shift: u32, below: u64| (state >> shift) % below;
                        let (here, there) =
                            (&spaces[number(60, 2) as usize], &spaces[number(61, 2) as usize]);
                        let first = number(20, 4) * M2 + number(24, 3) * K4;
                        let length = [K4, 3 * K4, M2, M2 + 2 * K4][number(30, 4) as usize];
                        let (at, part) = (Iova::new(first), range(first, length));
                        // What is there or in the way is a matter of luck; what happens happens whole.
                        match number(40, 9) {
                            0 | 1 => drop(here.map(at, ram, first, length, RW)),
                            2 => drop(here.unmap(part).unwrap()),
                            3 => drop(here.protect(part, Permissions::READ).unwrap()),
                            4 => drop(here.protect(part, RW).unwrap()),
                            5 => drop(here.remap(at, ram, first, length, RW)),
                            6 => drop(here.remap(at, ram, K4, length, RW)),
                            7 => drop(here.alias(part, there, Iova::new(number(50, 4) * M2), RW)),
                            _ => drop(here.merge(range(0, 8 * M2))),
                        }
                        if number(45, 16) == 0 {
                            let also = Memory::register(backing, first, length, account).unwrap();
                            drop(here.map(Iova::new(8 * M2 + first), &also, 0, length, RW));
                        }
                    }
                });
            }
        });
        for space in &spaces {
            for rid in rids.as_flattened() {
                let table = double.table_of(*rid).unwrap();
                if Arc::ptr_eq(table.space(), space) {
                    let table = table.derived().unwrap().as_any().downcast_ref::<DoubleTable>().unwrap();
                    assert_eq!(table.mappings(), table.expected(space), "round {round}");
                    assert!(table.is_invalidated());
                }
            }
        }
        let begin = spaces[1].leaves(IovaRange::ALL).len() as u64;
        assert!(spaces[1].mapping_count() <= begin);
        let extents = spaces[1].extents(IovaRange::ALL).filter(|extent| matches!(extent, Extent::Mapped(_)));
        assert!(spaces[1].mapping_count() <= extents.count() as u64);
        if round % 2 == 1 {
            spaces.iter().for_each(|space| drop(space.unmap(IovaRange::ALL).unwrap()));
            assert_eq!(spaces[1].mapping_count(), 0);
        }
    }
    drop(ram);
    assert!(spaces.iter().all(|space| space.leaves(IovaRange::ALL).is_empty()));
    assert_eq!(spaces[1].mapping_count(), 0);
}

/// Memory behind calls that knows which of them are running, and lets those for one page wait.
#[derive(Debug, Default)]
struct Recorder {
    calls: AtomicU64,
    state: Mutex<Recorded>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Recorded {
    running: Vec<(u64, u64)>,
    blocked_page: Option<u64>,
    waiting: usize,
}

impl Recorder {
    fn call(&self, offset: u64, length: usize) {
        let call = (offset, offset + length as u64);
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock().unwrap();
        state.running.push(call);
        state.waiting += 1;
        self.moved.notify_all();
        state = self.moved.wait_while(state, |state| state.blocked_page == Some(offset / K4)).unwrap();
        state.waiting -= 1;
        drop(state);
        // The copy itself takes its time.
        std::thread::yield_now();
        let mut state = self.state.lock().unwrap();
        let index = state.running.iter().position(|running| *running == call).unwrap();
        state.running.swap_remove(index);
    }

    fn block(&self, page: Option<u64>) {
        self.state.lock().unwrap().blocked_page = page;
        self.moved.notify_all();
    }

    fn wait_for_blocked_call(&self) {
        let state = self.state.lock().unwrap();
        let (state, timeout) =
            self.moved.wait_timeout_while(state, CERTAINTY, |state| state.waiting == 0).unwrap();
        drop(state);
        assert!(!timeout.timed_out());
    }

    #[track_caller]
    fn assert_nothing_runs_in(&self, first: u64, length: u64) {
        let state = self.state.lock().unwrap();
        let running = state.running.iter().find(|call| call.0 < first + length && first < call.1);
        assert!(running.is_none(), "{running:x?} is running although {first:#x}+{length:#x} was unmapped");
    }
}

impl LateBound for Recorder {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        self.call(offset, buffer.len());
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        self.call(offset, bytes.len());
        if offset / K4 == 13 { Err(MemoryGone { offset }) } else { Ok(()) }
    }
}

#[test]
fn no_call_for_late_bound_memory_runs_when_its_unmap_has_returned() {
    const PAGES: u64 = 32;
    let (bus, double) = (Bus::new(), Double::new());
    let recorder = Arc::new(Recorder::default());
    let backing = Backing::late_bound(&bus, recorder.clone());
    let ram = Memory::register(&backing, 0, PAGES * K4, &Account::new("test", None)).unwrap();
    let space = Space::new(&bus);
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    // IOVA and offset are the same, so that a call says what it is for.
    space.map(Iova::new(0), &ram, 0, PAGES * K4, RW).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let search = Search::new(&stop, [&recorder.calls]);
        for (thread, rid) in [NATIVE, DERIVED, NATIVE].into_iter().enumerate() {
            let (mut port, stop) = (Port::new(&double, rid), &stop);
            scope.spawn(move || {
                let mut buffer = [0; 256];
                let mut step = thread as u64;
                while !stop.load(Ordering::Relaxed) {
                    step += 3;
                    let place = step * 5 % PAGES * K4;
                    let _ = if step % 2 == 0 {
                        port.read(place, &mut buffer)
                    } else {
                        port.write(place, &[1; 8])
                    };
                }
            });
        }
        for round in search {
            let (first, length) = (round % (PAGES - 4) * K4, (1 + round % 4) * K4);
            space.unmap(range(first, length)).unwrap();
            recorder.assert_nothing_runs_in(first, length);
            space.map(Iova::new(first), &ram, first, length, RW).unwrap();
        }
        drop(ram);
        recorder.assert_nothing_runs_in(0, PAGES * K4);
    });
    assert!(recorder.calls.load(Ordering::Relaxed) > 0, "no device has ever reached the memory");
}

/// Opens what is blocked also when a test fails, or its threads would stand there for ever.
struct Unblock<'a>(&'a Recorder);

impl Drop for Unblock<'_> {
    fn drop(&mut self) {
        self.0.block(None);
    }
}

#[test]
fn a_remap_and_a_protect_wait_for_calls_that_block_and_others_do_not_wait_for_them() {
    let (bus, double, others) = (Bus::new(), Double::new(), Double::new());
    let account = Account::new("test", None);
    let own = Backing::anonymous(&bus, 4 * K4).unwrap();
    let own = Memory::register(&own, 0, 4 * K4, &account).unwrap();
    for change in ["remap", "protect", "widen"] {
        let recorder = Arc::new(Recorder::default());
        let late = Backing::late_bound(&bus, recorder.clone());
        let ram = Memory::register(&late, 0, 4 * K4, &account).unwrap();
        let (space, other) = (Space::new(&bus), Space::new(&bus));
        let _device = double.attached(NATIVE, &space);
        let permissions = if change == "widen" { Permissions::READ } else { RW };
        space.map(Iova::new(0), &ram, 0, 4 * K4, permissions).unwrap();
        recorder.block(Some(1));
        std::thread::scope(|scope| {
            let unblock = Unblock(&recorder);
            let mut port = Port::new(&double, NATIVE);
            let reader = scope.spawn(move || port.read(K4, &mut [0; 16]));
            recorder.wait_for_blocked_call();
            if change == "widen" {
                // Nobody has to give up what he may do already.
                assert_eq!(space.protect(range(0, 4 * K4), RW).unwrap(), 4 * K4);
            }
            let (returned, changed) = mpsc::channel();
            let (space, own) = (&space, &own);
            scope.spawn(move || {
                if change == "remap" {
                    space.remap(Iova::new(K4), own, K4, K4, RW).unwrap();
                } else {
                    space.protect(range(K4, K4), Permissions::READ).unwrap();
                }
                returned.send(()).unwrap();
            });
            // It has begun when the leaf says so; and then it says nothing else any more.
            let is_changed = || {
                let mapped = space.query(Iova::new(K4)).expect("a hole");
                let (object, _) = space.object_at(mapped.oa).unwrap();
                Arc::ptr_eq(&object, own.backing()) || mapped.permissions == Permissions::READ
            };
            let deadline = Instant::now() + CERTAINTY;
            while !is_changed() {
                assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
            // Layouts change meanwhile, here and elsewhere.
            drop(others.attached(DERIVED, &other));
            space.reserve(range(64 * K4, K4), ioasid::ReservationOwner::User(1)).unwrap();
            assert!(
                matches!(changed.try_recv(), Err(mpsc::TryRecvError::Empty)),
                "{change} has returned under a running call"
            );
            drop(unblock);
            assert_eq!(reader.join().unwrap(), Ok(true));
            changed.recv_timeout(CERTAINTY).unwrap();
        });
    }
}

#[test]
fn who_blocks_his_own_memory_delays_only_his_own_space() {
    let (bus, double, others) = (Bus::new(), Double::new(), Double::new());
    let account = Account::new("test", None);
    let recorder = Arc::new(Recorder::default());
    let late = Backing::late_bound(&bus, recorder.clone());
    let ram = Memory::register(&late, 0, 16 * K4, &account).unwrap();
    let (space, other) = (Space::new(&bus), Space::new(&bus));
    let _device = double.attached(NATIVE, &space);
    space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
    let shared = Memory::register(&late, 0, 16 * K4, &account).unwrap();
    let own = Backing::anonymous(&bus, 16 * K4).unwrap();
    let own = Memory::register(&own, 0, 16 * K4, &account).unwrap();

    recorder.block(Some(5));
    std::thread::scope(|scope| {
        let unblock = Unblock(&recorder);
        let mut port = Port::new(&double, NATIVE);
        let reader = scope.spawn(move || port.read(5 * K4, &mut [0; 16]));
        recorder.wait_for_blocked_call();
        let (returned, unmapped) = mpsc::channel();
        let unmapping = &space;
        scope.spawn(move || {
            let bytes = unmapping.unmap(range(4 * K4, 4 * K4)).unwrap().bytes();
            returned.send(bytes).unwrap();
        });
        // The unmap has begun when the page translates no more.
        let deadline = Instant::now() + CERTAINTY;
        while space.walk(Iova::new(5 * K4)).is_some() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }

        // Whatever another space does, with that very memory or its own, ends while the call is blocked. So do the
        // rest of the first one and its devices that do not touch the memory in question.
        let (finished, all) = mpsc::channel();
        let (space, other, others, shared, own, late, account) =
            (&space, &other, &others, &shared, &own, &late, &account);
        let double = &double;
        scope.spawn(move || {
            for round in 0..20 {
                let device = others.attached(if round % 2 == 0 { DERIVED } else { NATIVE }, other);
                other.map(Iova::new(0), shared, 0, 16 * K4, RW).unwrap();
                other.map_anywhere(own, 0, 16 * K4, RW).unwrap();
                other.unmap(range(4 * K4, K4)).unwrap();
                other.reserve(range(4 * K4, K4), ioasid::ReservationOwner::User(round)).unwrap();
                other.unreserve(ioasid::ReservationOwner::User(round));
                let once_more = Memory::register(late, 64 * K4, K4, account).unwrap();
                other.map(Iova::new(M2), &once_more, 0, K4, RW).unwrap();
                drop(once_more);
                other.unmap(IovaRange::ALL).unwrap();
                drop(device);
                // The space's own unmaps wait, but it can be used.
                let place = M2 + round * 16 * K4;
                space.map(Iova::new(place), own, 0, 16 * K4, RW).unwrap();
                assert_eq!(Port::new(double, NATIVE).read(place, &mut [0; 8]), Ok(true));
                assert_eq!(Port::new(double, NATIVE).read(0, &mut [0; 8]), Ok(true));
            }
            finished.send(()).unwrap();
        });
        all.recv_timeout(CERTAINTY).expect("another space was kept waiting");
        assert!(
            matches!(unmapped.try_recv(), Err(mpsc::TryRecvError::Empty)),
            "unmapped under a running call"
        );

        drop(unblock);
        assert_eq!(unmapped.recv_timeout(CERTAINTY).unwrap(), 4 * K4);
        recorder.assert_nothing_runs_in(4 * K4, 4 * K4);
        assert_eq!(reader.join().unwrap(), Ok(true));
    });
}

#[test]
fn a_replaced_table_is_free_of_dma_when_the_replacement_returns() {
    let (bus, double) = (Bus::new(), Double::new());
    let account = Account::new("test", None);
    let recorder = Arc::new(Recorder::default());
    let late = Backing::late_bound(&bus, recorder.clone());
    let ram = Memory::register(&late, 0, 4 * K4, &account).unwrap();
    let (space, other) = (Space::new(&bus), Space::new(&bus));
    let device = double.attached(NATIVE, &space);
    space.map(Iova::new(0), &ram, 0, 4 * K4, RW).unwrap();
    recorder.block(Some(1));
    std::thread::scope(|scope| {
        let unblock = Unblock(&recorder);
        let mut port = Port::new(&double, NATIVE);
        scope.spawn(move || port.read(K4, &mut [0; 16]));
        recorder.wait_for_blocked_call();
        let moved = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                device.attach(&Table::for_device(&other, &device).unwrap()).unwrap();
                moved.store(true, Ordering::SeqCst);
                recorder.assert_nothing_runs_in(0, 4 * K4);
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!moved.load(Ordering::SeqCst), "replaced while DMA through the former table was running");
            drop(unblock);
            mover.join().unwrap();
        });
    });
    assert!(Arc::ptr_eq(device.table().unwrap().space(), &other));
}

#[test]
fn a_thread_that_ends_can_still_drop_what_it_kept() {
    // Thread-locals go in an order nobody promises, and dropping memory unmaps it.
    thread_local! {
        static KEPT: std::cell::RefCell<Vec<Arc<Memory>>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    let bus = Bus::new();
    let space = Space::new(&bus);
    let backing = Backing::anonymous(&bus, 16 * K4).unwrap();
    for order in 0..4u64 {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Registered for destruction before the engine's own locals, or after them.
                if order % 2 == 0 {
                    KEPT.with_borrow_mut(Vec::clear);
                }
                let ram = Memory::register(&backing, 0, 16 * K4, &Account::new("test", None)).unwrap();
                space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
                drop(epoch::dma());
                KEPT.with_borrow_mut(|kept| kept.push(ram));
            });
            // A scope does not wait for thread-locals, a join does.
            thread.join().unwrap();
        });
        assert!(space.leaves(IovaRange::ALL).is_empty());
        assert_eq!(backing.holds(0, 16 * K4), 0..=0);
    }
    // And nobody who waits afterwards waits for them.
    epoch::wait_for_dma();
}
