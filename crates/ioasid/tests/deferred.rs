//! Deferred unmaps and batches: what may still happen before the flush, and what may not after it.

mod double;

use double::search::{CERTAINTY, Search};
use double::{DERIVED, Double, DoubleTable, NATIVE};
use ioasid::{
    Account, Backing, Bus, CachedWalk, DEFERRED_RANGES, Iova, IovaRange, LateBound, MapError, Memory,
    MemoryGone, Permissions, ReservationOwner, Rid, Space, Table, Translated, epoch,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const RW: Permissions = Permissions::READ_WRITE;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

fn memory(bus: &Arc<Bus>, length: u64) -> Arc<Memory> {
    let backing = Backing::anonymous(bus, length).unwrap();
    Memory::register(&backing, 0, length, &Account::new("test", None)).unwrap()
}

/// A DMA of a device on the native table that takes as long as the test likes, between two channels.
struct SlowDma {
    end: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl SlowDma {
    /// Returns when the DMA has found its memory.
    fn begin(space: &Arc<Space>, iova: u64, byte: u8) -> SlowDma {
        let (found, is_found) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let space = space.clone();
        let thread = std::thread::spawn(move || {
            let section = epoch::dma();
            let leaf = space.walk_for_dma(&section, iova, &mut CachedWalk::new()).unwrap();
            let Ok(Translated::Here(here)) = space.memory_at(&section, leaf.output(iova)) else {
                panic!("no memory of this process")
            };
            found.send(()).unwrap();
            let () = ended.recv().unwrap();
            here.write(&[byte]).unwrap();
        });
        is_found.recv().unwrap();
        SlowDma { end, thread }
    }

    fn end(self) {
        self.end.send(()).unwrap();
        self.thread.join().unwrap();
    }
}

#[test]
fn a_deferred_unmap_waits_for_nobody_and_the_flush_does() {
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    let _device = double.attached(NATIVE, &space);
    space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
    let dma = SlowDma::begin(&space, 2 * K4, 9);
    let unmapped = space.unmap_deferred(range(K4, 2 * K4)).unwrap();
    assert_eq!((unmapped.bytes(), unmapped.leaves()), (2 * K4, 2));
    // New DMA faults at once; the rest is untouched.
    assert!(space.walk(Iova::new(2 * K4)).is_none() && space.walk(Iova::new(3 * K4)).is_some());
    let flushed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flusher = scope.spawn(|| {
            space.flush();
            flushed.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!flushed.load(Ordering::SeqCst), "flushed under a running DMA");
        dma.end();
        flusher.join().unwrap();
    });
    let mut byte = [0];
    ram.backing().read(2 * K4, &mut byte).unwrap();
    assert_eq!(byte, [9]);
    space.flush();
    assert_eq!(space.deferred_ranges(), 0);
}

#[test]
fn whoever_wants_the_addresses_flushes() {
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    let wants: [(&str, &dyn Fn()); 5] = [
        ("map", &|| space.map(Iova::new(4 * K4), &ram, 0, K4, RW).unwrap()),
        ("unmap", &|| assert_eq!(space.unmap(range(0, 16 * K4)).unwrap().bytes(), 15 * K4)),
        ("reserve", &|| {
            space.reserve(range(4 * K4, K4), ReservationOwner::User(1)).unwrap();
            space.unreserve(ReservationOwner::User(1));
        }),
        ("map anywhere", &|| {
            space.set_allowed(&[range(K4, 15 * K4)]).unwrap();
            let place = space.map_anywhere(&ram, 0, K4, RW).unwrap();
            assert_eq!(place, Iova::new(4 * K4));
            let none = space.map_anywhere(&ram, 0, K4, RW);
            assert!(matches!(none, Err(MapError::NoHole { .. })), "{none:?}");
            space.set_allowed(&[]).unwrap();
        }),
        ("a batch's end", &|| space.batch().finish()),
    ];
    for (name, want) in wants {
        space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
        space.unmap_deferred(range(4 * K4, K4)).unwrap();
        want();
        assert_eq!(space.deferred_ranges(), 0, "{name}");
        space.unmap(IovaRange::ALL).unwrap();
        assert!(!double.tables()[0].is_stale() && double.tables()[0].mappings().is_empty(), "{name}");
    }
}

#[test]
fn no_more_ranges_wait_than_there_is_room_for() {
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 8 * M2));
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    space.map(Iova::new(0), &ram, 0, 8 * M2, RW).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let space = &space;
            scope.spawn(move || {
                for page in (0..8 * M2 / K4).filter(|page| page % 4 == thread) {
                    space.unmap_deferred(range(page * K4, K4)).unwrap();
                    assert!(space.deferred_ranges() <= DEFERRED_RANGES);
                }
            });
        }
    });
    // Many runs in one unmap, more than there is room for at all.
    for page in (0..8 * M2 / K4).step_by(2) {
        space.map(Iova::new(page * K4), &ram, 0, K4, RW).unwrap();
    }
    assert_eq!(space.unmap_deferred(range(0, 8 * M2)).unwrap().bytes(), 4 * M2);
    assert!(space.deferred_ranges() <= DEFERRED_RANGES);
    space.map(Iova::new(0), &ram, 0, 8 * M2, RW).unwrap();
}

#[test]
fn time_passes_also_when_nobody_calls() {
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    let _devices = [NATIVE, DERIVED].map(|rid| double.attached(rid, &space));
    space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
    for round in 0..3 {
        space.unmap_deferred(range(round * K4, K4)).unwrap();
        let deadline = Instant::now() + CERTAINTY;
        // Neither call flushes.
        while space.deferred_ranges() > 0 || double.tables()[0].is_stale() {
            assert!(Instant::now() < deadline, "never flushed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // A space that goes meanwhile is nobody's concern.
    let other = Space::new(&bus);
    let device = Double::new().attached(NATIVE, &other);
    other.map(Iova::new(0), &ram, 0, K4, RW).unwrap();
    other.unmap_deferred(range(0, K4)).unwrap();
    drop(device);
    drop(other);
    std::thread::sleep(Duration::from_millis(30));
}

#[test]
fn iommus_are_invalidated_once_for_many_and_before_the_addresses_are_used_again() {
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 64 * K4));
    let _device = double.attached(DERIVED, &space);
    space.map(Iova::new(0), &ram, 0, 64 * K4, RW).unwrap();
    let table = double.tables().remove(0);
    let before = table.invalidations();
    let mut batch = space.batch();
    for page in [7, 3, 5, 4, 60] {
        batch.unmap(range(page * K4, K4)).unwrap();
    }
    batch.finish();
    assert!(!table.is_stale());
    // The flusher may have come first, if this thread has lost its CPU for long.
    let invalidations = table.invalidations() - before;
    assert!((1..5).contains(&invalidations), "{invalidations} for five unmaps");
}

#[test]
fn dropped_memory_waits_for_what_was_deferred() {
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    let _device = double.attached(NATIVE, &space);
    space.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
    let dma = SlowDma::begin(&space, 0, 1);
    space.unmap_deferred(range(0, 16 * K4)).unwrap();
    let dropped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dropper = scope.spawn(|| {
            drop(ram);
            dropped.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!dropped.load(Ordering::SeqCst), "the memory has gone under a running DMA");
        dma.end();
        dropper.join().unwrap();
    });
}

/// Memory behind calls that block until they are let go.
#[derive(Debug, Default)]
struct Blocking {
    state: Mutex<(usize, bool)>,
    moved: Condvar,
}

impl Blocking {
    fn call(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.moved.notify_all();
        drop(self.moved.wait_while(state, |state| !state.1).unwrap());
    }
}

/// What a device does that reads from address 0, behind which is memory behind calls.
fn copy_late(space: &Space) {
    let section = epoch::dma();
    let leaf = space.walk_for_dma(&section, 0, &mut CachedWalk::new()).unwrap();
    let Ok(Translated::Late(memory)) = space.memory_at(&section, leaf.output(0)) else {
        panic!("memory of this process")
    };
    drop(section);
    memory.read(&mut [0; 8]).unwrap();
}

/// Lets the calls go at the latest when a test ends, whichever way.
struct LetGo<'a>(&'a Blocking);

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().1 = true;
        self.0.moved.notify_all();
    }
}

impl LateBound for Blocking {
    fn read(&self, _offset: u64, _buffer: &mut [u8]) -> Result<(), MemoryGone> {
        self.call();
        Ok(())
    }

    fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        self.call();
        Ok(())
    }
}

#[test]
fn a_copy_that_blocks_keeps_the_flusher_from_nobody_elses_space() {
    let (bus, double, others) = (Bus::new(), Double::new(), Double::new());
    let blocking = Arc::new(Blocking::default());
    let late = Backing::late_bound(&bus, blocking.clone());
    let late = Memory::register(&late, 0, K4, &Account::new("test", None)).unwrap();
    let (space, other, ram) = (Space::new(&bus), Space::new(&bus), memory(&bus, 16 * K4));
    let _devices = (double.attached(NATIVE, &space), others.attached(NATIVE, &other));
    space.map(Iova::new(0), &late, 0, K4, RW).unwrap();
    std::thread::scope(|scope| {
        let let_go = LetGo(&blocking);
        scope.spawn(|| copy_late(&space));
        drop(blocking.moved.wait_while(blocking.state.lock().unwrap(), |state| state.0 == 0).unwrap());
        space.unmap_deferred(range(0, K4)).unwrap();
        std::thread::sleep(Duration::from_millis(25));
        // The other space's ranges are flushed in time.
        other.map(Iova::new(0), &ram, 0, 16 * K4, RW).unwrap();
        other.unmap_deferred(range(0, K4)).unwrap();
        let deadline = Instant::now() + CERTAINTY;
        while other.deferred_ranges() > 0 {
            assert!(Instant::now() < deadline, "the flusher waits for somebody else's memory");
            std::thread::sleep(Duration::from_millis(1));
        }
        let flushed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                space.flush();
                flushed.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!flushed.load(Ordering::SeqCst), "flushed under a running copy");
            drop(let_go);
        });
    });
    space.map(Iova::new(0), &ram, 0, K4, RW).unwrap();
}

/// Nobody calls any more: what the flusher could not release behind a copy it releases afterwards.
#[test]
fn what_a_copy_has_kept_is_released_when_it_ends() {
    let (bus, double) = (Bus::new(), Double::new());
    let blocking = Arc::new(Blocking::default());
    let late = Backing::late_bound(&bus, blocking.clone());
    let late = Memory::register(&late, 0, K4, &Account::new("test", None)).unwrap();
    let space = Space::new(&bus);
    let _device = double.attached(NATIVE, &space);
    space.map(Iova::new(0), &late, 0, K4, RW).unwrap();
    let deadline = Instant::now() + CERTAINTY;
    let until = |what: &str, is_so: &dyn Fn() -> bool| {
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    std::thread::scope(|scope| {
        let let_go = LetGo(&blocking);
        scope.spawn(|| copy_late(&space));
        drop(blocking.moved.wait_while(blocking.state.lock().unwrap(), |state| state.0 == 0).unwrap());
        space.unmap_deferred(range(0, K4)).unwrap();
        until("the flusher does not come", &|| space.deferred_ranges() == 0);
        // It looks again and again.
        std::thread::sleep(2 * ioasid::DEFERRED_TIME);
        assert_eq!(space.statistics().busy_bytes, K4, "released under a running copy");
        drop(let_go);
        until("the flusher has forgotten what it had taken", &|| space.statistics().busy_bytes == 0);
    });
}

#[test]
fn what_waited_for_a_flush_is_proposed_again() {
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    let _device = double.attached(NATIVE, &space);
    space.set_allowed(&[range(K4, 2 * K4)]).unwrap();
    let anywhere = || space.map_anywhere(&ram, 0, K4, RW).map(Iova::get);
    assert_eq!((anywhere().unwrap(), anywhere().unwrap()), (K4, 2 * K4));
    assert!(matches!(anywhere(), Err(MapError::NoHole { .. })));
    // Released by whoever flushes.
    space.unmap_deferred(range(2 * K4, K4)).unwrap();
    space.flush();
    assert_eq!(anywhere().unwrap(), 2 * K4);
    // And by the flusher.
    space.unmap_deferred(range(K4, K4)).unwrap();
    let deadline = Instant::now() + CERTAINTY;
    while space.statistics().busy_bytes > 0 {
        assert!(Instant::now() < deadline, "the flusher does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(anywhere().unwrap(), K4);
}

/// A device's way to memory, one for each thread.
struct Port {
    table: Arc<Table>,
    cache: CachedWalk<AtomicU64>,
}

impl Port {
    fn new(double: &Double, rid: Rid) -> Port {
        Port { table: double.table_of(rid).unwrap(), cache: CachedWalk::new() }
    }

    fn write(&mut self, iova: u64, bytes: &[u8]) -> bool {
        let section = epoch::dma();
        let space = self.table.space();
        let leaf = match self.table.derived() {
            None => space.walk_for_dma(&section, iova, &mut self.cache),
            Some(derived) => {
                let derived = derived.as_any().downcast_ref::<DoubleTable>().unwrap();
                derived.radix().walk_cached(iova, &mut self.cache)
            }
        };
        let Ok(leaf) = leaf else { return false };
        // What translates is there: nothing that is deferred may have gone meanwhile.
        let Ok(Translated::Here(here)) = space.memory_at(&section, leaf.output(iova)) else {
            panic!("no memory of this process")
        };
        here.write(bytes).unwrap();
        true
    }
}

#[test]
fn after_a_flush_memory_is_the_programs_own_and_neighbours_never_fault() {
    const FROM_DEVICE: [u8; K4 as usize] = [0xdd; K4 as usize];
    let (bus, double) = (Bus::new(), Double::new());
    let (space, ram) = (Space::new(&bus), memory(&bus, 2 * M2));
    let backing = ram.backing();
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
                    let place = (step * 7919) % (M2 / K4) * K4;
                    written.fetch_add(u64::from(port.write(place, &FROM_DEVICE)), Ordering::Relaxed);
                    assert!(port.write(M2 + place, &FROM_DEVICE[..64]), "a neighbour has faulted");
                }
            });
        }
        // Somebody who unmaps strictly and maps again beside all that, in the third MiB.
        let other = &space;
        for round in search {
            let pages: Vec<u64> = (0..1 + round % 40).map(|n| (round * 5 + n * 13) % (M2 / K4)).collect();
            let mut unmapped = Vec::new();
            let mut batch = other.batch();
            for page in &pages {
                if batch.unmap(range(page * K4, K4)).unwrap().bytes() > 0 {
                    unmapped.push(*page);
                }
            }
            if round % 3 == 0 {
                // Mapped again before the end of the batch: whoever maps flushes what is in the way.
                let page = unmapped.pop().unwrap();
                other.map(Iova::new(page * K4), &ram, page * K4, K4, RW).unwrap();
            }
            batch.finish();
            for page in &unmapped {
                backing.write(page * K4, &[round as u8 & 0x7f; K4 as usize]).unwrap();
            }
            std::thread::yield_now();
            let mut seen = [0; K4 as usize];
            for page in &unmapped {
                backing.read(page * K4, &mut seen).unwrap();
                assert!(seen == [round as u8 & 0x7f; K4 as usize], "a device has written after the flush");
                other.map(Iova::new(page * K4), &ram, page * K4, K4, RW).unwrap();
            }
        }
    });
    for written in &written {
        assert!(written.load(Ordering::Relaxed) > 0, "no device has ever reached the memory");
    }
}
