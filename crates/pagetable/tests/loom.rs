//! The walker under the `loom` model checker: every interleaving of two or three threads, with every value that
//! the memory model lets a load return, up to a number of preemptions.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p ioasid-pagetable --test loom
//! ```
//!
//! It is the crate's own code that runs, over a format with two index bits, so that a table has four entries.
//! Three preemptions are tried unless `LOOM_MAX_PREEMPTIONS` says otherwise. Counters that order nothing
//! (`GENERATIONS`, how many tables there are and how many are kept) are not loom's: their operations are no
//! points at which threads change places, and no assertion here depends on them.
//!
//! Freed tables are not returned to the heap but filled with leaves of nonsense, as if another table used them:
//! whoever follows a stale way is found out.

#![cfg(loom)]

use ioasid_pagetable::{
    Attributes, CachedWalk, ClaimError, ClaimFormat, Entry, Format, Gather, IovaRange, MapError, Oa,
    OutOfTables, PageSize, Radix, RetractError, Split, TableLayout, TableMemory, WalkFault,
};
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use std::collections::BTreeMap;
use std::ops::{ControlFlow, RangeInclusive};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

// ----------------------------------------------------------------------------------- format and table memory

/// Levels of four entries: 4 KiB, 16 KiB and 64 KiB leaves.
#[derive(Clone, Debug)]
struct Tiny {
    highest: u8,
}

const TABLE: u64 = 1 << 3;
const READ: u64 = 1 << 4;
const WRITE: u64 = 1 << 5;
const ADDRESS: u64 = 0x00ff_ffff_ffff_ffc0;

impl Format for Tiny {
    const NAME: &'static str = "tiny";

    fn top_levels(&self) -> RangeInclusive<u8> {
        2..=self.highest
    }

    fn shift(&self, level: u8) -> u32 {
        10 + 2 * u32::from(level)
    }

    fn index_bits(&self, _level: u8) -> u32 {
        2
    }

    fn leaf_sizes(&self, level: u8) -> u64 {
        1 << self.shift(level)
    }

    fn accepts(&self, range: &IovaRange) -> bool {
        range.last() >> (self.shift(self.highest) + 2) == 0
    }

    fn output_bits(&self) -> u32 {
        56
    }

    fn split(&self) -> Split {
        Split::Live
    }

    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & Self::PRESENT == 0 {
            return Entry::Absent;
        }
        if entry & TABLE != 0 {
            return Entry::Table(entry & ADDRESS);
        }
        let mut attributes = Attributes::empty();
        attributes.set(Attributes::READ, entry & READ != 0);
        attributes.set(Attributes::WRITE, entry & WRITE != 0);
        let size = PageSize::from_log2(self.shift(level)).unwrap();
        Entry::Leaf { oa: entry & ADDRESS, size, attributes }
    }

    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        address | TABLE | Self::PRESENT
    }

    fn leaf_entry(&self, _level: u8, _size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let mut entry = oa | Self::PRESENT;
        if attributes.contains(Attributes::READ) {
            entry |= READ;
        }
        if attributes.contains(Attributes::WRITE) {
            entry |= WRITE;
        }
        entry
    }

    fn table_layout(&self, _level: u8) -> TableLayout {
        TableLayout { entries: 4, alignment: 64 }
    }
}

impl ClaimFormat for Tiny {
    const PRESENT: u64 = 1 << 0;
    const BUSY: u64 = 1 << 1;
    const FIRST: u64 = 1 << 2;
}

#[repr(C, align(64))]
struct Page {
    entries: [AtomicU64; 4],
    live: AtomicU64,
}

/// Pages by address.
#[derive(Clone, Default)]
struct Pages(Arc<Mutex<BTreeMap<u64, Owned>>>);

struct Owned {
    /// Stays allocated as long as the memory does.
    #[expect(dead_code, reason = "only keeps the page alive")]
    page: Box<Page>,
    freed: bool,
}

impl Pages {
    fn tables(&self) -> u64 {
        self.0.lock().unwrap().values().filter(|owned| !owned.freed).count() as u64
    }
}

// SAFETY: pages are zero when handed out, never handed out twice, and live as long as the memory does.
unsafe impl TableMemory<AtomicU64> for Pages {
    fn allocate(&self, _layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        let page = Box::new(Page { entries: [(); 4].map(|()| AtomicU64::new(0)), live: AtomicU64::new(0) });
        let table = NonNull::from(&*page).cast();
        self.0.lock().unwrap().insert(self.address(table), Owned { page, freed: false });
        Ok(table)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, _layout: TableLayout, _empty: bool) {
        // The lock must be free again where loom may change threads.
        let freed = |owned: &mut Owned| std::mem::replace(&mut owned.freed, true);
        let twice = self.0.lock().unwrap().get_mut(&self.address(table)).is_none_or(freed);
        assert!(!twice, "freed twice");
        for index in 0..4 {
            let nonsense = Tiny::PRESENT | READ | ADDRESS & !0xfff;
            // SAFETY: the page stays allocated.
            unsafe { table.add(index).as_ref() }.store(nonsense, Ordering::Relaxed);
        }
    }

    unsafe fn live<'a>(&self, table: NonNull<AtomicU64>, _layout: TableLayout) -> &'a AtomicU64 {
        // SAFETY: the entries are a page's first field.
        unsafe { &(*table.cast::<Page>().as_ptr()).live }
    }

    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        table.as_ptr().expose_provenance() as u64
    }

    fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
        NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).unwrap()
    }
}

// --------------------------------------------------------------------------------------------------- fixture

type Table = Radix<Tiny, Pages, AtomicU64>;
type Gathered = Gather<Pages, AtomicU64>;

const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
/// Outputs of different mappings, such that a large leaf fits, and such that none does.
const LOW: u64 = 0x100_0000;
const HIGH: u64 = 0x200_0000;
const MISALIGNED: u64 = 0x300_1000;

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::with_length(first << 12, count << 12).unwrap()
}

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

fn table(highest: u8) -> (Arc<Table>, Pages) {
    let memory = Pages::default();
    (Arc::new(Radix::new(Tiny { highest }, memory.clone())), memory)
}

fn spawn<T: 'static>(radix: &Arc<Table>, work: impl FnOnce(&Table) -> T + 'static) -> thread::JoinHandle<T> {
    let radix = Arc::clone(radix);
    thread::spawn(move || work(&radix))
}

/// Maps in exclusive mode, with nothing to retire.
fn map(radix: &Table, range: IovaRange, oa: u64) {
    let mut gather = Gather::new();
    radix.map(range, Oa::new(oa), READ_WRITE, &mut gather).unwrap();
    assert!(gather.retired.is_empty());
}

fn claim(radix: &Table, range: IovaRange, oa: u64, gather: &mut Gathered) -> bool {
    match radix.claim(range, Oa::new(oa), READ_WRITE, gather) {
        Ok(()) => true,
        Err(ClaimError::Contended { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A whole mapping; `false` if it met another one, published or not.
fn claim_and_publish(radix: &Table, range: IovaRange, oa: u64, gather: &mut Gathered) -> bool {
    match radix.claim(range, Oa::new(oa), READ_WRITE, gather) {
        Ok(()) => {
            radix.publish(range);
            true
        }
        Err(ClaimError::Contended { .. } | ClaimError::Map(MapError::Occupied { .. })) => false,
        Err(error) => panic!("{error}"),
    }
}

/// The output of a page, with the attributes checked.
fn output(radix: &Table, page: u64) -> Option<u64> {
    match radix.walk(page << 12) {
        Ok(leaf) => {
            assert_eq!(leaf.attributes, READ_WRITE);
            Some(leaf.output(page << 12).get())
        }
        Err(WalkFault::NotMapped(_)) => None,
        Err(fault) => panic!("{fault}"),
    }
}

fn output_cached(radix: &Table, page: u64, cache: &mut CachedWalk<AtomicU64>) -> Option<u64> {
    match radix.walk_cached(page << 12, cache) {
        Ok(leaf) => {
            assert_eq!(leaf.attributes, READ_WRITE);
            Some(leaf.output(page << 12).get())
        }
        Err(WalkFault::NotMapped(_)) => None,
        Err(fault) => panic!("{fault}"),
    }
}

/// First page and number of pages of each leaf, claimed ones included.
fn leaves(radix: &Table) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    radix.occupied(IovaRange::ALL, |range| {
        found.push((range.first() >> 12, (range.last() - range.first() + 1) >> 12));
        ControlFlow::Continue(())
    });
    found
}

/// Counts the linked tables and holds the live counts against their entries.
fn linked(radix: &Table, memory: &Pages) -> u64 {
    fn below(format: &Tiny, memory: &Pages, table: NonNull<AtomicU64>, level: u8) -> u64 {
        let (mut tables, mut used) = (1, 0);
        for index in 0..4 {
            // SAFETY: all threads of the model have ended.
            let value = unsafe { table.add(index).as_ref() }.load(Ordering::Acquire);
            used += u64::from(value != 0);
            if let Entry::Table(address) = format.decode(level, value) {
                tables += below(format, memory, memory.pointer(address), level - 1);
            }
        }
        // SAFETY: as above.
        let live = unsafe { memory.live(table, format.table_layout(level)) }.load(Ordering::Acquire);
        assert_eq!(live & 0xffff_ffff, used, "live count at level {level}");
        assert_eq!(live >> 63, 0, "a dead table is linked");
        tables
    }
    radix.top().map_or(0, |(address, level)| below(radix.format(), memory, memory.pointer(address), level))
}

/// All threads are done: frees what they retired, and looks for leaks.
fn finish(radix: Arc<Table>, memory: &Pages, gathers: impl IntoIterator<Item = Gathered>) {
    for gather in gathers {
        for retired in gather.retired {
            // SAFETY: all threads of the model have ended.
            unsafe { retired.free() };
        }
    }
    assert_eq!(memory.tables(), linked(&radix, memory), "tables that are neither linked nor freed");
    assert_eq!(memory.tables(), radix.table_count());
    drop(Arc::into_inner(radix).unwrap());
    assert_eq!(memory.tables(), 0);
}

// ---------------------------------------------------------------------------------------------------- models

/// Of two overlapping claims exactly one wins, and the loser leaves nothing behind.
#[test]
fn overlapping_claims() {
    check(|| {
        let (radix, memory) = table(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim(radix, pages(1, 2), HIGH + 0x1000, &mut gather), gather)
        });
        let mut gather = Gather::new();
        let mine = claim(&radix, pages(0, 2), MISALIGNED, &mut gather);
        let (theirs, other) = other.join().unwrap();
        assert!(mine ^ theirs, "{mine} {theirs}");
        assert_eq!(leaves(&radix), if mine { [(0, 1), (1, 1)] } else { [(1, 1), (2, 1)] });
        finish(radix, &memory, [gather, other]);
    });
}

/// One wants a large leaf, the other a page of it.
#[test]
fn large_claim_against_small() {
    check(|| {
        let (radix, memory) = table(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim(radix, pages(2, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        let mine = claim(&radix, pages(0, 4), LOW, &mut gather);
        let (theirs, other) = other.join().unwrap();
        assert!(mine ^ theirs, "{mine} {theirs}");
        radix.publish(if mine { pages(0, 4) } else { pages(2, 1) });
        assert_eq!(output(&radix, 2), Some(if mine { LOW + 0x2000 } else { HIGH }));
        assert_eq!(output(&radix, 3), mine.then_some(LOW + 0x3000));
        finish(radix, &memory, [gather, other]);
    });
}

/// An empty table is in the way of a large leaf, and another claim is about to use it.
#[test]
fn large_claim_retires_what_another_claims_in() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        radix.unmap(pages(0, 1), &mut Gather::new()).unwrap();
        assert_eq!(memory.tables(), 2, "the empty table is kept");
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(1, 1), HIGH, &mut gather), gather)
        });
        let walker = spawn(&radix, |radix| output(radix, 1));
        let mut gather = Gather::new();
        let mine = claim_and_publish(&radix, pages(0, 4), LOW, &mut gather);
        let (theirs, other) = other.join().unwrap();
        let seen = walker.join().unwrap();
        assert!(mine ^ theirs, "{mine} {theirs}");
        let now = output(&radix, 1);
        assert_eq!(now, Some(if mine { LOW + 0x1000 } else { HIGH }));
        assert!(seen.is_none() || seen == now, "{seen:x?}");
        finish(radix, &memory, [gather, other]);
    });
}

/// A release empties a whole table and retires it, while another claims a page that has just come free.
#[test]
fn release_retires_what_another_claims_in() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), MISALIGNED);
        radix.retract(pages(0, 4), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(0, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 4), &mut gather);
        let seen = output(&radix, 0);
        let (theirs, other) = other.join().unwrap();
        assert_eq!(output(&radix, 0), theirs.then_some(HIGH));
        assert!(seen.is_none() || theirs && seen == Some(HIGH), "{seen:x?}");
        assert_eq!(leaves(&radix).len(), usize::from(theirs));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same in exclusive mode, with the ranges apart and a walker beside.
#[test]
fn neighbours_in_one_table() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let unmapper = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            radix.unmap(pages(0, 1), &mut gather).unwrap();
            gather
        });
        let walker = spawn(&radix, |radix| {
            let first = output(radix, 1);
            (first, output(radix, 1))
        });
        map(&radix, pages(1, 1), HIGH);
        assert_eq!(output(&radix, 1), Some(HIGH));
        let gather = unmapper.join().unwrap();
        let (first, second) = walker.join().unwrap();
        assert!([first, second].iter().all(|seen| seen.is_none_or(|oa| oa == HIGH)));
        assert!(first.is_none() || second.is_some(), "seen once, it stays");
        assert_eq!((output(&radix, 0), output(&radix, 1)), (None, Some(HIGH)));
        finish(radix, &memory, [gather]);
    });
}

/// Both cuts of one leaf get their boundary, and nothing else changes.
#[test]
fn cut_against_cut() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 16), LOW);
        assert_eq!(leaves(&radix), [(16, 16)]);
        let other = spawn(&radix, |radix| radix.cut(17 << 12, &mut Gather::new()).unwrap());
        let walker = spawn(&radix, |radix| output(radix, 21));
        radix.cut(24 << 12, &mut Gather::new()).unwrap();
        other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW + 0x5000));
        assert_eq!(leaves(&radix), [(16, 1), (17, 1), (18, 1), (19, 1), (20, 4), (24, 4), (28, 4)]);
        assert!((0..16).all(|page| output(&radix, 16 + page) == Some(LOW + (page << 12))));
        finish(radix, &memory, []);
    });
}

/// Two unmaps cut their parts out of one leaf; a walker between them sees no gap.
#[test]
fn unmaps_cut_the_same_leaf() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            radix.unmap(pages(0, 1), &mut gather).unwrap();
            gather
        });
        let walker = spawn(&radix, |radix| output(radix, 2));
        let mut gather = Gather::new();
        radix.unmap(pages(3, 1), &mut gather).unwrap();
        let other = other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW + 0x2000));
        assert_eq!(leaves(&radix), [(1, 1), (2, 1)]);
        assert_eq!((gather.runs.bytes(), other.runs.bytes()), (0x1000, 0x1000));
        finish(radix, &memory, [gather, other]);
    });
}

/// A cut may run beside any other operation, also beside the unmap of the very leaf.
#[test]
fn cut_against_unmap() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| radix.cut(2 << 12, &mut Gather::new()).unwrap());
        let mut gather = Gather::new();
        radix.unmap(pages(0, 4), &mut gather).unwrap();
        other.join().unwrap();
        assert_eq!(leaves(&radix), []);
        assert_eq!(gather.runs.iter().collect::<Vec<_>>(), [pages(0, 4)]);
        finish(radix, &memory, [gather]);
    });
}

/// In claiming mode the owner of a leaf is not cut under, and the other is told.
#[test]
fn retract_against_partial_retract() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.retract(pages(1, 1), &mut gather), gather)
        });
        let mut gather = Gather::new();
        let mine = radix.retract(pages(0, 4), &mut gather);
        let (theirs, other) = other.join().unwrap();
        match (mine, theirs) {
            (Ok(()), Err(RetractError::Contended { at: 0x1000 })) => {
                assert_eq!((gather.runs.bytes(), other.runs.bytes()), (0x4000, 0));
            }
            (Err(RetractError::Contended { at: 0x1000 }), Ok(())) => {
                assert_eq!((gather.runs.bytes(), other.runs.bytes()), (0x1000, 0x1000));
            }
            results => panic!("{results:?}"),
        }
        assert_eq!(output(&radix, 1), None);
        finish(radix, &memory, [gather, other]);
    });
}

/// A leaf is held for copying or it is unmapped, never both.
#[test]
fn hold_against_retract() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let other = spawn(&radix, |radix| {
            let held = radix.hold(pages(0, 4));
            if let Ok(Some(leaf)) = held {
                assert_eq!(output(radix, 0), Some(LOW), "a held leaf translates");
                radix.let_go(&leaf);
            }
            held
        });
        let mut gather = Gather::new();
        let retracted = radix.retract(pages(0, 1), &mut gather);
        let held = other.join().unwrap();
        match (held.unwrap(), retracted) {
            (Some(_), Err(RetractError::Contended { at: 0 })) => assert_eq!(output(&radix, 0), Some(LOW)),
            (Some(_) | None, Ok(())) => assert_eq!(output(&radix, 0), None),
            results => panic!("{results:?}"),
        }
        finish(radix, &memory, [gather]);
    });
}

/// A walker sees a claimed leaf not at all until it is published, and then whole.
#[test]
fn publish_against_walker() {
    check(|| {
        let (radix, memory) = table(2);
        let walker = spawn(&radix, |radix| {
            // `output` checks the permissions.
            let second = output(radix, 1);
            (output(radix, 0), second)
        });
        let mut gather = Gather::new();
        assert!(claim(&radix, pages(0, 2), MISALIGNED, &mut gather));
        radix.publish(pages(0, 2));
        let (first, second) = walker.join().unwrap();
        assert!(first.is_none_or(|oa| oa == MISALIGNED));
        assert!(second.is_none_or(|oa| oa == MISALIGNED + 0x1000));
        assert!(second.is_none() || first.is_some(), "leaves are published in ascending order");
        finish(radix, &memory, [gather]);
    });
}

/// What is rolled back was never seen.
#[test]
fn a_released_claim_is_never_seen() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(2, 1), LOW);
        let walker = spawn(&radix, |radix| (output(radix, 0), output(radix, 2)));
        let mut gather = Gather::new();
        assert!(radix.claim(pages(0, 3), Oa::new(MISALIGNED), READ_WRITE, &mut gather).is_err());
        assert!(claim(&radix, pages(0, 2), HIGH, &mut gather));
        radix.release(pages(0, 2), &mut gather);
        assert_eq!(walker.join().unwrap(), (None, Some(LOW)));
        assert_eq!(leaves(&radix), [(2, 1)]);
        finish(radix, &memory, [gather]);
    });
}

/// Two claims make the first root at different levels.
#[test]
fn root_growth_against_claim() {
    check(|| {
        let (radix, memory) = table(3);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim(radix, pages(20, 1), HIGH, &mut gather));
            radix.publish(pages(20, 1));
            gather
        });
        let mut gather = Gather::new();
        assert!(claim(&radix, pages(1, 1), LOW, &mut gather));
        radix.publish(pages(1, 1));
        assert_eq!(output(&radix, 1), Some(LOW));
        let other = other.join().unwrap();
        assert_eq!((output(&radix, 1), output(&radix, 20)), (Some(LOW), Some(HIGH)));
        finish(radix, &memory, [gather, other]);
    });
}

/// A root grows over a table in which others are at work.
#[test]
fn root_growth_over_running_operations() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(0, 1), LOW);
        let other = spawn(&radix, |radix| map(radix, pages(20, 1), HIGH));
        let walker = spawn(&radix, |radix| output(radix, 0));
        map(&radix, pages(1, 1), HIGH + 0x1000);
        other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW));
        assert_eq!(leaves(&radix), [(0, 1), (1, 1), (20, 1)]);
        finish(radix, &memory, []);
    });
}

/// A table is retired under a remembered walk. What is mapped afterwards is found, as soon as its mapper says so.
#[test]
fn cached_walk_against_retirement() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(LOW));
        let mapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_cached(radix, 0, &mut cache);
                if mapped {
                    assert_eq!(seen, Some(HIGH));
                }
                assert!(seen.is_none_or(|oa| oa == LOW || oa == HIGH));
                cache
            })
        };
        let mut gather = Gather::new();
        radix.unmap(pages(0, 4), &mut gather).unwrap();
        assert_eq!(gather.retired.len(), 1);
        map(&radix, pages(0, 1), HIGH);
        mapped.store(true, Ordering::Release);
        let mut cache = walker.join().unwrap();
        for retired in gather.retired.drain(..) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(HIGH));
        finish(radix, &memory, []);
    });
}

/// Two retirements at a time: the number of the one must not vouch for a table that the other one took.
#[test]
fn cached_walk_against_two_retirements() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        map(&radix, pages(4, 1), HIGH);
        let walker = spawn(&radix, |radix| {
            let mut cache = CachedWalk::new();
            let seen = output_cached(radix, 0, &mut cache);
            assert!(seen.is_none_or(|oa| oa == LOW));
            cache
        });
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            radix.unmap(pages(0, 4), &mut gather).unwrap();
            gather
        });
        let mut gather = Gather::new();
        radix.unmap(pages(4, 4), &mut gather).unwrap();
        let mut cache = walker.join().unwrap();
        for retired in gather.retired.drain(..).chain(other.join().unwrap().retired) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_cached(&radix, 0, &mut cache), None);
        finish(radix, &memory, []);
    });
}

/// A table is unlinked and has not changed the generation yet when somebody maps at its place. A walker who is told
/// of the mapping may still remember the old table, and must not believe its emptiness.
#[test]
fn cached_walk_between_unlinking_and_generation() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), MISALIGNED);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(MISALIGNED));
        radix.retract(pages(0, 4), &mut Gather::new()).unwrap();
        let mapped = Arc::new(AtomicBool::new(false));
        let mapper = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mut gather = Gather::new();
                let won = claim_and_publish(radix, pages(0, 1), HIGH, &mut gather);
                mapped.store(won, Ordering::Release);
                (won, gather)
            })
        };
        let walker = spawn(&radix, move |radix| {
            let mapped = mapped.load(Ordering::Acquire);
            let seen = output_cached(radix, 0, &mut cache);
            assert!(!mapped || seen == Some(HIGH));
            assert!(seen.is_none_or(|oa| oa == HIGH));
            cache
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 4), &mut gather);
        let (won, other) = mapper.join().unwrap();
        let mut cache = walker.join().unwrap();
        for retired in gather.retired.drain(..).chain(other.retired) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_cached(&radix, 0, &mut cache), won.then_some(HIGH));
        finish(radix, &memory, []);
    });
}
