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
//! Of a store loom asks only who was the last to access the word before. A thread that loads a word and then exchanges
//! it is last there itself, and hides others that only look. So those who only look are spawned last, and with that run
//! after the others in the first execution: their loads are then followed back to every store.
//!
//! Freed tables are not returned to the heap but filled with leaves of nonsense, as if another table used them:
//! whoever follows a stale way is found out.

#![cfg(loom)]

use ioasid_pagetable::{
    Attributes, CachedWalk, ClaimError, ClaimFormat, Entry, Format, Gather, IovaRange, LiveChanges, MapError,
    Oa, OutOfTables, PageSize, Pattern, Radix, RetractError, SharedWalk, Span, TableLayout, TableMemory,
    WalkFault,
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
const ACCESSED: u64 = 1 << 56;
const DIRTY: u64 = 1 << 57;

impl Format for Tiny {
    const NAME: &'static str = "tiny";
    const TENTATIVE: u64 = 1 << 58;

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

    fn output_bits(&self) -> u32 {
        56
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::SIZE | LiveChanges::PERMISSIONS
    }

    fn dirty_bit(&self) -> u64 {
        DIRTY
    }

    fn hardware_marks(&self) -> bool {
        true
    }

    fn software_bits(&self, _level: u8) -> u64 {
        0
    }

    fn table_pattern(&self, _level: u8) -> Pattern {
        Pattern::new(Self::PRESENT | TABLE, Self::TENTATIVE)
    }

    fn leaf_pattern(&self, _level: u8) -> Pattern {
        Pattern::new(Self::PRESENT, TABLE | Self::BUSY)
    }

    fn table_address(&self, entry: u64) -> u64 {
        entry & ADDRESS
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
        attributes.set(Attributes::ACCESSED, entry & ACCESSED != 0);
        attributes.set(Attributes::DIRTY, entry & DIRTY != 0);
        let size = PageSize::from_log2(self.shift(level)).unwrap();
        Entry::Leaf { oa: entry & ADDRESS, size, attributes }
    }

    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        address | TABLE | Self::PRESENT
    }

    fn leaf_entry(&self, _level: u8, _size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let bits = [
            (Attributes::READ, READ),
            (Attributes::WRITE, WRITE),
            (Attributes::ACCESSED, ACCESSED),
            (Attributes::DIRTY, DIRTY),
        ];
        let set = bits.iter().filter(|(attribute, _)| attributes.contains(*attribute));
        set.fold(oa | Self::PRESENT, |entry, (_, bit)| entry | bit)
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
    state: AtomicU64,
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
        let page = Box::new(Page { entries: [(); 4].map(|()| AtomicU64::new(0)), state: AtomicU64::new(0) });
        let table = NonNull::from(&*page).cast();
        self.0.lock().unwrap().insert(self.address(table), Owned { page, freed: false });
        Ok(table)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, _layout: TableLayout, empty: bool) {
        // The lock must be free again where loom may change threads.
        let freed = |owned: &mut Owned| std::mem::replace(&mut owned.freed, true);
        let twice = self.0.lock().unwrap().get_mut(&self.address(table)).is_none_or(freed);
        assert!(!twice, "freed twice");
        for index in 0..4 {
            let nonsense = Tiny::PRESENT | READ | ADDRESS & !0xfff;
            // SAFETY: the page stays allocated.
            let entry = unsafe { table.add(index).as_ref() };
            assert!(!empty || entry.load(Ordering::Relaxed) == 0, "not as empty as it was said to be");
            entry.store(nonsense, Ordering::Relaxed);
        }
    }

    unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, _layout: TableLayout) -> &'a AtomicU64 {
        // SAFETY: the entries are a page's first field.
        unsafe { &(*table.cast::<Page>().as_ptr()).state }
    }

    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        table.as_ptr().expose_provenance() as u64
    }

    unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
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

/// Maps in exclusive mode, where tables may be dying.
fn map_gathered(radix: &Table, range: IovaRange, oa: u64) -> Gathered {
    let mut gather = Gather::new();
    radix.map(range, Oa::new(oa), READ_WRITE, &mut gather).unwrap();
    gather
}

fn unmap(radix: &Table, range: IovaRange) -> Gathered {
    let mut gather = Gather::new();
    radix.unmap(range, &mut gather).unwrap();
    gather
}

/// Frees what was retired. All threads that could have seen it have ended.
fn free(gather: Gathered) {
    for retired in gather.retired {
        // SAFETY: the models call this after joining their threads.
        unsafe { retired.free() };
    }
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
            assert_eq!(leaf.attributes.difference(Attributes::USED), READ_WRITE);
            Some(leaf.output(page << 12).get())
        }
        Err(WalkFault::NotMapped(_)) => None,
        Err(fault) => panic!("{fault}"),
    }
}

fn output_cached(radix: &Table, page: u64, cache: &mut CachedWalk<AtomicU64>) -> Option<u64> {
    match radix.walk_cached(page << 12, cache) {
        Ok(leaf) => {
            assert_eq!(leaf.attributes.difference(Attributes::USED), READ_WRITE);
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

/// Counts the linked tables. None of them is dead, and no link is tentative any more.
fn linked(radix: &Table, memory: &Pages) -> u64 {
    fn below(format: &Tiny, memory: &Pages, table: NonNull<AtomicU64>, level: u8) -> u64 {
        let mut tables = 1;
        for index in 0..4 {
            // SAFETY: all threads of the model have ended.
            let value = unsafe { table.add(index).as_ref() }.load(Ordering::Acquire);
            if let Entry::Table(address) = format.decode(level, value) {
                assert_eq!(
                    value & Tiny::TENTATIVE,
                    0,
                    "the link in a table at level {level} stayed tentative"
                );
                // SAFETY: the address stands in a link.
                let table = unsafe { memory.pointer(address) };
                tables += below(format, memory, table, level - 1);
            }
        }
        // SAFETY: as above.
        let state = unsafe { memory.state(table, format.table_layout(level)) }.load(Ordering::Acquire);
        assert_eq!(state >> 63, 0, "a dead table is linked");
        tables
    }
    // SAFETY: the address is the root's.
    let below_top = |address, level| below(radix.format(), memory, unsafe { memory.pointer(address) }, level);
    radix.top().map_or(0, |(address, level)| below_top(address, level))
}

/// All threads are done: frees what they retired, and looks for leaks.
fn finish(radix: Arc<Table>, memory: &Pages, gathers: impl IntoIterator<Item = Gathered>) {
    gathers.into_iter().for_each(free);
    assert_eq!(memory.tables(), linked(&radix, memory), "tables that are neither linked nor freed");
    assert_eq!(memory.tables(), radix.table_count());
    drop(Arc::into_inner(radix).unwrap());
    assert_eq!(memory.tables(), 0);
}

/// Somebody has used up how many empty tables may stay, so that from now on whoever empties one retires it.
fn without_allowance(highest: u8) -> (Arc<Table>, Pages) {
    let (radix, memory) = table(highest);
    map(&radix, pages(0, 1), LOW);
    // The table says of itself that it is one of those that stay, and was never counted. When it goes, one less than none
    // is counted, which is more than may stay.
    let (root, level) = radix.top().unwrap();
    // SAFETY: the address is the root's, and its first entry leads to the only table below.
    let link = unsafe { memory.pointer(root).as_ref() }.load(Ordering::Acquire);
    // SAFETY: linked, and nobody else is here yet.
    let state =
        unsafe { memory.state(memory.pointer(link & ADDRESS), radix.format().table_layout(level - 1)) };
    state.store(1 << 61, Ordering::Release);
    let mut gather = Gather::new();
    radix.unmap(pages(0, 4), &mut gather).unwrap();
    assert_eq!(gather.retired.len(), 1);
    free(gather);
    (radix, memory)
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

/// Somebody who has the second half of a leaf may cut it while the first half is unmapped.
#[test]
fn cut_against_unmap() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            radix.cut(2 << 12, &mut Gather::new()).unwrap();
            radix.cut(3 << 12, &mut Gather::new()).unwrap();
        });
        let mut gather = Gather::new();
        radix.unmap(pages(0, 2), &mut gather).unwrap();
        other.join().unwrap();
        assert_eq!(leaves(&radix), [(2, 1), (3, 1)]);
        assert_eq!(gather.runs.iter().collect::<Vec<_>>(), [pages(0, 2)]);
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

/// By the shared way if it leads there, and otherwise from the root; then the way is remembered.
fn output_shared(radix: &Table, page: u64, way: &SharedWalk<AtomicU64>) -> Option<u64> {
    let needed = READ_WRITE;
    if let Some((oa, _)) = radix.translate_remembered(page << 12, 1, needed, std::slice::from_ref(way)) {
        return Some(oa.get());
    }
    let mut walk = CachedWalk::new();
    let seen = output_cached(radix, page, &mut walk);
    radix.remember(page << 12, &walk, way);
    seen
}

/// Three threads use one remembered way for two tables. Nobody takes the address of one for the other.
#[test]
fn shared_walk_of_two_tables() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        map(&radix, pages(4, 1), HIGH);
        let way = Arc::new(SharedWalk::new());
        assert_eq!(output_shared(&radix, 0, &way), Some(LOW));
        let other = {
            let way = Arc::clone(&way);
            spawn(&radix, move |radix| assert_eq!(output_shared(radix, 4, &way), Some(HIGH)))
        };
        let walker = {
            let way = Arc::clone(&way);
            spawn(&radix, move |radix| {
                assert_eq!(output_shared(radix, 0, &way), Some(LOW));
            })
        };
        other.join().unwrap();
        walker.join().unwrap();
        assert_eq!(output_shared(&radix, 4, &way), Some(HIGH));
        finish(radix, &memory, []);
    });
}

/// As `cached_walk_against_retirement`, by a way that both threads know.
#[test]
fn shared_walk_against_retirement() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        let way = Arc::new(SharedWalk::new());
        assert_eq!(output_shared(&radix, 0, &way), Some(LOW));
        let mapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let (way, mapped) = (Arc::clone(&way), Arc::clone(&mapped));
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_shared(radix, 0, &way);
                assert!(seen == Some(HIGH) || !mapped && seen.is_none_or(|oa| oa == LOW));
            })
        };
        let mut gather = Gather::new();
        radix.unmap(pages(0, 4), &mut gather).unwrap();
        map(&radix, pages(0, 1), HIGH);
        mapped.store(true, Ordering::Release);
        walker.join().unwrap();
        for retired in gather.retired.drain(..) {
            // SAFETY: the only walk beside has ended.
            unsafe { retired.free() };
        }
        assert_eq!(output_shared(&radix, 0, &way), Some(HIGH));
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

// ------------------------------------------------------------------------------------- models of retirement

/// The mapper of a page is told to come again if its table dies under it; what it mapped is there in the end, wherever
/// the neighbour was in retiring the table. A walker who saw the page and then not will be told by the gather.
#[test]
fn map_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let walker = spawn(&radix, |radix| (output(radix, 1), output(radix, 1)));
        let gather = map_gathered(&radix, pages(1, 1), HIGH);
        assert_eq!(output(&radix, 1), Some(HIGH));
        let other = unmapper.join().unwrap();
        let (first, second) = walker.join().unwrap();
        assert!([first, second].iter().all(|seen| seen.is_none_or(|oa| oa == HIGH)));
        assert!(first.is_none() || second.is_some() || !gather.runs.is_empty(), "nobody is told");
        assert_eq!((output(&radix, 0), output(&radix, 1)), (None, Some(HIGH)));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same with several pages, and on the long way, which begins in the next table.
#[test]
fn long_map_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(4, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(4, 1)));
        let gather = map_gathered(&radix, pages(5, 4), MISALIGNED);
        let other = unmapper.join().unwrap();
        assert_eq!(leaves(&radix), [(5, 1), (6, 1), (7, 1), (8, 1)]);
        assert!((0..4).all(|page| output(&radix, 5 + page) == Some(MISALIGNED + (page << 12))));
        finish(radix, &memory, [gather, other]);
    });
}

/// A cached walker has the table that dies, and is told of the page that is mapped in the next one.
#[test]
fn cached_walk_against_map_and_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 0, &mut cache), Some(LOW));
        let mapped = Arc::new(AtomicBool::new(false));
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let walker = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_cached(radix, 1, &mut cache);
                assert!(!mapped || seen == Some(HIGH));
                assert!(seen.is_none_or(|oa| oa == HIGH));
                cache
            })
        };
        let gather = map_gathered(&radix, pages(1, 1), HIGH);
        mapped.store(true, Ordering::Release);
        let other = unmapper.join().unwrap();
        let mut cache = walker.join().unwrap();
        free(gather);
        free(other);
        assert_eq!(output_cached(&radix, 0, &mut cache), None);
        assert_eq!(output_cached(&radix, 1, &mut cache), Some(HIGH));
        finish(radix, &memory, []);
    });
}

/// A release empties a table that nobody may keep, and another claims in it.
#[test]
fn claim_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        radix.retract(pages(0, 1), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim(radix, pages(1, 2), MISALIGNED, &mut gather));
            radix.publish(pages(1, 2));
            gather
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 1), &mut gather);
        let other = other.join().unwrap();
        assert_eq!(leaves(&radix), [(1, 1), (2, 1)]);
        assert_eq!((output(&radix, 0), output(&radix, 1)), (None, Some(MISALIGNED)));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same where the range begins in one table and ends in the next.
#[test]
fn claim_against_long_release() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(3, 2), MISALIGNED);
        radix.retract(pages(3, 2), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim_and_publish(radix, pages(2, 1), HIGH, &mut gather));
            gather
        });
        let mut gather = Gather::new();
        radix.release(pages(3, 2), &mut gather);
        let other = other.join().unwrap();
        assert_eq!(leaves(&radix), [(2, 1)]);
        finish(radix, &memory, [gather, other]);
    });
}

/// A table that dies as the last but one of two levels, while another is about to link a table in the upper one.
#[test]
fn link_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let gather = map_gathered(&radix, pages(20, 1), HIGH);
        assert_eq!(output(&radix, 20), Some(HIGH));
        let other = unmapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1)]);
        assert_eq!(output(&radix, 20), Some(HIGH));
        finish(radix, &memory, [gather, other]);
    });
}

/// The same in claiming mode.
#[test]
fn claiming_link_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        radix.retract(pages(16, 1), &mut Gather::new()).unwrap();
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim(radix, pages(20, 1), HIGH, &mut gather));
            radix.publish(pages(20, 1));
            gather
        });
        let mut gather = Gather::new();
        radix.release(pages(16, 1), &mut gather);
        let other = other.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1)]);
        assert_eq!(output(&radix, 20), Some(HIGH));
        finish(radix, &memory, [gather, other]);
    });
}

/// Two link tables in one that a third wants to retire.
#[test]
fn two_links_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let mapper = spawn(&radix, |radix| map_gathered(radix, pages(24, 1), LOW));
        let gather = map_gathered(&radix, pages(20, 1), HIGH);
        let other = unmapper.join().unwrap();
        let third = mapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1), (24, 1)]);
        assert_eq!((output(&radix, 20), output(&radix, 24)), (Some(HIGH), Some(LOW)));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// Two fill one new table, of which the link may have to be taken back because a third retires the table above.
#[test]
fn two_behind_one_link_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let mapper = spawn(&radix, |radix| map_gathered(radix, pages(21, 1), LOW));
        let gather = map_gathered(&radix, pages(20, 1), HIGH);
        let other = unmapper.join().unwrap();
        let third = mapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1), (21, 1)]);
        assert_eq!((output(&radix, 20), output(&radix, 21)), (Some(HIGH), Some(LOW)));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// A table that somebody has linked a moment ago, and not filled yet, is empty again because of another.
#[test]
fn unmap_behind_a_tentative_link() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(48, 1), LOW);
        let mapper = spawn(&radix, |radix| map_gathered(radix, pages(20, 1), HIGH));
        let gather = map_gathered(&radix, pages(24, 1), LOW);
        let other = unmap(&radix, pages(24, 1));
        let third = mapper.join().unwrap();
        assert_eq!(leaves(&radix), [(20, 1), (48, 1)]);
        assert_eq!(output(&radix, 20), Some(HIGH));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// A large leaf takes the place of a table that somebody has linked a moment ago, or that is merged into one.
#[test]
fn large_claim_and_merge_over_a_tentative_link() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(48, 1), LOW);
        let small = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(20, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        let large_won = claim_and_publish(&radix, pages(16, 16), LOW, &mut gather);
        radix.merge_claimed(pages(16, 16), &mut gather);
        let (small_won, other) = small.join().unwrap();
        assert!(!(large_won && small_won));
        let expected = |page: u64| if large_won { Some(LOW + ((page - 16) << 12)) } else { None };
        let found: Vec<_> = [16, 21, 31].map(|page| output(&radix, page)).into();
        assert_eq!(found, [16, 21, 31].map(expected));
        assert_eq!(output(&radix, 20), if small_won { Some(HIGH) } else { expected(20) });
        finish(radix, &memory, [gather, other]);
    });
}

/// A large leaf goes into an entry of a table that dies because its last table has gone.
#[test]
fn large_map_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(20, 1), HIGH);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(20, 1)));
        let walker = spawn(&radix, |radix| output(radix, 17));
        let gather = map_gathered(&radix, pages(16, 4), LOW);
        let other = unmapper.join().unwrap();
        assert!(walker.join().unwrap().is_none_or(|oa| oa == LOW + 0x1000));
        assert_eq!(leaves(&radix), [(16, 4)]);
        assert_eq!(output(&radix, 17), Some(LOW + 0x1000));
        finish(radix, &memory, [gather, other]);
    });
}

/// A large leaf takes the place of a tree of empty tables, while others work beside it and walkers are below.
#[test]
fn large_map_over_empty_tables() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 1), HIGH);
        map(&radix, pages(20, 1), HIGH);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 20, &mut cache), Some(HIGH));
        assert!(
            unmap(&radix, pages(16, 1)).retired.is_empty() && unmap(&radix, pages(20, 1)).retired.is_empty()
        );
        let neighbour = spawn(&radix, |radix| map_gathered(radix, pages(0, 1), HIGH));
        let mapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let mapped = Arc::clone(&mapped);
            spawn(&radix, move |radix| {
                let mapped = mapped.load(Ordering::Acquire);
                let seen = output_cached(radix, 20, &mut cache);
                assert!(!mapped || seen.is_some());
                assert!(seen.is_none_or(|oa| oa == LOW + 0x4000));
                cache
            })
        };
        let gather = map_gathered(&radix, pages(16, 16), LOW);
        mapped.store(true, Ordering::Release);
        assert_eq!(gather.retired.len(), 3);
        let other = neighbour.join().unwrap();
        let mut cache = walker.join().unwrap();
        free(gather);
        assert_eq!(leaves(&radix), [(0, 1), (16, 16)]);
        assert_eq!(output_cached(&radix, 20, &mut cache), Some(LOW + 0x4000));
        finish(radix, &memory, [other]);
    });
}

/// One wants to put a large leaf in the place of an empty table, and has looked whether it is empty. Another claims a page
/// in it, by which the table stays, and then wants the same himself. The first must not take his mark for its own.
#[test]
fn the_mark_of_another() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        unmap(&radix, pages(0, 1));
        let large = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(0, 4), LOW, &mut gather), gather)
        });
        let small = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            let won = claim_and_publish(radix, pages(2, 1), MISALIGNED, &mut gather);
            let all = claim_and_publish(radix, pages(0, 4), HIGH, &mut gather);
            assert!(!all || !won);
            (won, all, gather)
        });
        let (first, gather) = large.join().unwrap();
        let (won, all, other) = small.join().unwrap();
        let expected = match (first, won, all) {
            (true, false, false) => LOW + 0x2000,
            (false, true, false) => MISALIGNED,
            (false, false, true) => HIGH + 0x2000,
            won => panic!("{won:?}"),
        };
        assert_eq!(output(&radix, 2), Some(expected));
        finish(radix, &memory, [gather, other]);
    });
}

/// Two empty the last two pages of a table, and each may take the other's for filled. Whoever maps there next finds
/// the table as good as ever, or another one.
#[test]
fn two_removals_at_once() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        map(&radix, pages(16, 1), LOW);
        map(&radix, pages(17, 1), HIGH);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 16, &mut cache), Some(LOW));
        let other = spawn(&radix, |radix| unmap(radix, pages(16, 1)));
        let walker = spawn(&radix, move |radix| {
            assert!(output_cached(radix, 17, &mut cache).is_none_or(|oa| oa == HIGH));
            cache
        });
        let gather = unmap(&radix, pages(17, 1));
        assert_eq!(output(&radix, 17), None);
        let other = other.join().unwrap();
        let mut cache = walker.join().unwrap();
        assert!(matches!(gather.retired.len() + other.retired.len(), 0 | 2));
        free(gather);
        free(other);
        assert_eq!(output_cached(&radix, 16, &mut cache), None);
        let gather = map_gathered(&radix, pages(18, 1), LOW);
        assert_eq!(output_cached(&radix, 18, &mut cache), Some(LOW));
        assert_eq!(leaves(&radix), [(18, 1)]);
        finish(radix, &memory, [gather]);
    });
}

/// Two empty a table and a third fills it.
#[test]
fn two_removals_against_map() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 1), LOW);
        map(&radix, pages(1, 1), HIGH);
        let first = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let second = spawn(&radix, |radix| unmap(radix, pages(1, 1)));
        let gather = map_gathered(&radix, pages(2, 1), LOW);
        let gathers = [gather, first.join().unwrap(), second.join().unwrap()];
        assert_eq!(leaves(&radix), [(2, 1)]);
        assert_eq!(output(&radix, 2), Some(LOW));
        finish(radix, &memory, gathers);
    });
}

/// Two halves of one leaf are unmapped, by which it is cut, emptied and retired; a third page's owner looks on.
#[test]
fn halves_of_a_leaf_go_with_their_table() {
    check(|| {
        let (radix, memory) = without_allowance(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| unmap(radix, pages(0, 2)));
        let walker = spawn(&radix, |radix| (output(radix, 3), output(radix, 3)));
        let gather = unmap(&radix, pages(2, 2));
        let other = other.join().unwrap();
        let (first, second) = walker.join().unwrap();
        assert!([first, second].iter().all(|seen| seen.is_none_or(|oa| oa == LOW + 0x3000)));
        assert!(first.is_some() || second.is_none(), "once gone, it stays so");
        assert_eq!(leaves(&radix), []);
        assert_eq!(gather.runs.iter().collect::<Vec<_>>(), [pages(2, 2)]);
        assert_eq!(other.runs.iter().collect::<Vec<_>>(), [pages(0, 2)]);
        finish(radix, &memory, [gather, other]);
    });
}

/// A tree of tables is unlinked with all that is in it, under walkers, while the neighbours of the topmost come and go.
#[test]
fn unmap_of_whole_tables() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 1), LOW);
        map(&radix, pages(20, 1), HIGH);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 20, &mut cache), Some(HIGH));
        let unmapped = Arc::new(AtomicBool::new(false));
        let walker = {
            let unmapped = Arc::clone(&unmapped);
            spawn(&radix, move |radix| {
                let unmapped = unmapped.load(Ordering::Acquire);
                let seen = (output(radix, 16), output_cached(radix, 20, &mut cache));
                assert!(!unmapped || seen == (None, None));
                assert!(seen.0.is_none_or(|oa| oa == LOW) && seen.1.is_none_or(|oa| oa == HIGH));
                cache
            })
        };
        let neighbour = spawn(&radix, |radix| map_gathered(radix, pages(32, 1), LOW));
        let gather = unmap(&radix, pages(16, 16));
        unmapped.store(true, Ordering::Release);
        assert_eq!(gather.retired.len(), 3);
        let other = neighbour.join().unwrap();
        let mut cache = walker.join().unwrap();
        free(gather);
        assert_eq!(output_cached(&radix, 20, &mut cache), None);
        assert_eq!(leaves(&radix), [(32, 1)]);
        finish(radix, &memory, [other]);
    });
}

/// One is about to keep an empty table, another puts a large leaf in its place, a third fills it.
#[test]
fn keep_against_large_claim() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 1), LOW);
        radix.retract(pages(0, 1), &mut Gather::new()).unwrap();
        let large = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(0, 4), LOW, &mut gather), gather)
        });
        let small = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (claim_and_publish(radix, pages(3, 1), HIGH, &mut gather), gather)
        });
        let mut gather = Gather::new();
        radix.release(pages(0, 1), &mut gather);
        let (large, other) = large.join().unwrap();
        let (small, third) = small.join().unwrap();
        assert!(!(large && small));
        let expected = if small { Some(HIGH) } else { large.then_some(LOW + 0x3000) };
        assert_eq!(output(&radix, 3), expected);
        finish(radix, &memory, [gather, other, third]);
    });
}

/// The root grows over a table that loses its last table below, while somebody links another one there.
#[test]
fn root_growth_against_retirement() {
    check(|| {
        let (radix, memory) = without_allowance(3);
        let top = || radix.top().unwrap().1;
        assert_eq!(top(), 2);
        map(&radix, pages(0, 1), LOW);
        let unmapper = spawn(&radix, |radix| unmap(radix, pages(0, 1)));
        let grower = spawn(&radix, |radix| map_gathered(radix, pages(16, 1), LOW));
        let gather = map_gathered(&radix, pages(4, 1), HIGH);
        let gathers = [gather, unmapper.join().unwrap(), grower.join().unwrap()];
        assert_eq!(top(), 3);
        assert_eq!(leaves(&radix), [(4, 1), (16, 1)]);
        assert_eq!((output(&radix, 4), output(&radix, 16)), (Some(HIGH), Some(LOW)));
        finish(radix, &memory, gathers);
    });
}

// ------------------------------------------------------------------------- models of what changes mapped leaves

/// Four pages that are one leaf, cut.
fn four_pages(highest: u8) -> (Arc<Table>, Pages) {
    let (radix, memory) = table(highest);
    map(&radix, pages(0, 4), LOW);
    radix.cut(1 << 12, &mut Gather::new()).unwrap();
    assert_eq!(leaves(&radix).len(), 4);
    (radix, memory)
}

fn is_dirty(radix: &Table, page: u64) -> bool {
    radix.walk(page << 12).unwrap().attributes.contains(Attributes::DIRTY)
}

/// Walkers see the table or the leaf in its place, remembered ways included, and a neighbour is not in the way.
#[test]
fn merge_against_walkers() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 1, &mut cache), Some(LOW + 0x1000));
        let walker = spawn(&radix, move |radix| {
            assert_eq!(output(radix, 2), Some(LOW + 0x2000));
            assert_eq!(output_cached(radix, 1, &mut cache), Some(LOW + 0x1000));
        });
        let neighbour = spawn(&radix, |radix| map_gathered(radix, pages(4, 1), HIGH));
        let mut gather = Gather::new();
        assert_eq!(radix.merge(pages(0, 4), &mut gather), Ok(1));
        walker.join().unwrap();
        let other = neighbour.join().unwrap();
        assert_eq!(leaves(&radix), [(0, 4), (4, 1)]);
        finish(radix, &memory, [gather, other]);
    });
}

/// The leaf that has come of a merge is unmapped. Whoever is told of that finds nothing there, also if he remembers the
/// way to the table that was merged, in which the old leaves stand.
#[test]
fn claiming_merge_against_retract() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let mut cache = CachedWalk::new();
        assert_eq!(output_cached(&radix, 1, &mut cache), Some(LOW + 0x1000));
        let unmapped = Arc::new(AtomicBool::new(false));
        let other = {
            let unmapped = Arc::clone(&unmapped);
            spawn(&radix, move |radix| {
                let mut gather = Gather::new();
                let retracted = radix.retract(pages(0, 4), &mut gather);
                if retracted.is_ok() {
                    radix.release(pages(0, 4), &mut gather);
                    unmapped.store(true, Ordering::Release);
                }
                (retracted, gather)
            })
        };
        let walker = spawn(&radix, move |radix| {
            let unmapped = unmapped.load(Ordering::Acquire);
            let seen = output_cached(radix, 1, &mut cache);
            assert!(!unmapped || seen.is_none(), "translated after the unmap");
            assert!(seen.is_none_or(|oa| oa == LOW + 0x1000));
        });
        let mut gather = Gather::new();
        let merged = radix.merge_claimed(pages(0, 4), &mut gather);
        let (retracted, other) = other.join().unwrap();
        walker.join().unwrap();
        match (merged, retracted) {
            (0 | 1, Ok(())) => assert_eq!(leaves(&radix), []),
            (1, Err(RetractError::Contended { .. })) => assert_eq!(leaves(&radix), [(0, 4)]),
            // The one met the other in the middle.
            (0, Err(RetractError::Contended { .. })) => assert_eq!(leaves(&radix).len(), 4),
            results => panic!("{results:?}"),
        }
        finish(radix, &memory, [gather, other]);
    });
}

/// A page is taken out of a table that is being merged: out of the table, out of the leaf, or not now.
#[test]
fn claiming_merge_against_partial_retract() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.retract(pages(2, 1), &mut gather), gather)
        });
        let mut gather = Gather::new();
        let merged = radix.merge_claimed(pages(0, 4), &mut gather);
        let (retracted, other) = other.join().unwrap();
        assert_eq!(output(&radix, 2).is_none(), retracted.is_ok());
        assert!([0, 1, 3].into_iter().all(|page| output(&radix, page) == Some(LOW + (page << 12))));
        if retracted.is_ok() {
            assert_eq!(other.runs.iter().collect::<Vec<_>>(), [pages(2, 1)]);
        } else {
            assert_eq!(merged, 1);
        }
        finish(radix, &memory, [gather, other]);
    });
}

/// A page is mapped to something else after the merge has looked, and before it owns the page.
#[test]
fn claiming_merge_against_remapping() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            let retracted = radix.retract(pages(2, 1), &mut gather).is_ok();
            if retracted {
                radix.release(pages(2, 1), &mut gather);
                assert!(claim_and_publish(radix, pages(2, 1), HIGH, &mut gather));
            }
            (retracted, gather)
        });
        let merger = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.merge_claimed(pages(0, 4), &mut gather), gather)
        });
        let (remapped, other) = other.join().unwrap();
        let (merged, gather) = merger.join().unwrap();
        assert!(merged == 1 || remapped);
        let expected = [LOW, LOW + 0x1000, if remapped { HIGH } else { LOW + 0x2000 }, LOW + 0x3000];
        assert!((0..4).all(|page| output(&radix, page) == Some(expected[page as usize])));
        finish(radix, &memory, [gather, other]);
    });
}

/// A leaf that is held for copying is not merged meanwhile, and letting it go changes nothing else.
#[test]
fn claiming_merge_against_hold() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| {
            let held = radix.hold(pages(2, 2));
            if let Ok(Some(leaf)) = held {
                assert_eq!(output(radix, 2), Some(LOW + 0x2000));
                radix.let_go(&leaf);
            }
            held
        });
        let mut gather = Gather::new();
        let merged = radix.merge_claimed(pages(0, 4), &mut gather);
        let held = other.join().unwrap();
        assert!(merged == 1 || matches!(held, Ok(Some(_))), "{held:?}");
        assert_eq!(leaves(&radix).len(), if merged == 1 { 1 } else { 4 });
        // Nobody owns anything any more.
        radix.retract(pages(0, 4), &mut Gather::new()).unwrap();
        finish(radix, &memory, [gather]);
    });
}

/// Mappings are claimed where leaves are being merged, and beside them.
#[test]
fn claiming_merge_against_claims() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let inside = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            (radix.claim(pages(3, 1), Oa::new(HIGH), READ_WRITE, &mut gather), gather)
        });
        let beside = spawn(&radix, |radix| {
            let mut gather = Gather::new();
            assert!(claim_and_publish(radix, pages(4, 1), HIGH, &mut gather));
            gather
        });
        let mut gather = Gather::new();
        assert_eq!(radix.merge_claimed(pages(0, 4), &mut gather), 1);
        let (refused, other) = inside.join().unwrap();
        assert!(refused.is_err());
        let third = beside.join().unwrap();
        assert_eq!(leaves(&radix), [(0, 4), (4, 1)]);
        assert_eq!(output(&radix, 3), Some(LOW + 0x3000));
        finish(radix, &memory, [gather, other, third]);
    });
}

/// Two merges of the same tables at two levels: each table goes once.
#[test]
fn merges_at_two_levels() {
    check(|| {
        let (radix, memory) = table(3);
        map(&radix, pages(16, 16), LOW);
        radix.cut(17 << 12, &mut Gather::new()).unwrap();
        let merge = |range| {
            move |radix: &Table| {
                let mut gather = Gather::new();
                (radix.merge_claimed(range, &mut gather), gather)
            }
        };
        let other = spawn(&radix, merge(pages(16, 4)));
        let walker = spawn(&radix, |radix| output(radix, 18));
        let (upper, gather) = merge(pages(16, 16))(&radix);
        let (lower, other) = other.join().unwrap();
        assert_eq!(walker.join().unwrap(), Some(LOW + 0x2000));
        // Whoever meets the other in the middle leaves it to him.
        assert!(lower + upper <= 2);
        assert_eq!(leaves(&radix).len() as u64, 7 - 3 * (lower + upper));
        assert!((0..16).all(|page| output(&radix, 16 + page) == Some(LOW + (page << 12))));
        radix.retract(pages(16, 16), &mut Gather::new()).unwrap();
        finish(radix, &memory, [gather, other]);
    });
}

/// A page is written through while its leaf is cut: its piece is dirty.
#[test]
fn mark_against_cut() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        let other = spawn(&radix, |radix| {
            let before = radix.mark(1 << 12, Attributes::USED).unwrap();
            assert!(!before.attributes.contains(Attributes::DIRTY));
        });
        radix.cut(2 << 12, &mut Gather::new()).unwrap();
        other.join().unwrap();
        assert!(is_dirty(&radix, 1));
        finish(radix, &memory, []);
    });
}

/// The same while leaves are merged.
#[test]
fn mark_against_merge() {
    check(|| {
        let (radix, memory) = four_pages(2);
        let other = spawn(&radix, |radix| radix.mark(1 << 12, Attributes::USED).map(|_| ()));
        let mut gather = Gather::new();
        radix.merge(pages(0, 4), &mut gather).unwrap();
        other.join().unwrap().unwrap();
        assert!(is_dirty(&radix, 1));
        finish(radix, &memory, [gather]);
    });
}

/// The same while it is made read-only: what was written stays dirty.
#[test]
fn mark_against_protect() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 2), MISALIGNED);
        let other = spawn(&radix, |radix| {
            radix.mark(0, Attributes::ACCESSED).unwrap();
            radix.mark(1 << 12, Attributes::DIRTY).unwrap();
        });
        radix.protect(pages(0, 2), Attributes::READ, &mut Gather::new()).unwrap();
        other.join().unwrap();
        let attributes = |page: u64| radix.walk(page << 12).unwrap().attributes;
        assert_eq!(attributes(0), Attributes::READ | Attributes::ACCESSED);
        assert_eq!(attributes(1), Attributes::READ | Attributes::DIRTY);
        finish(radix, &memory, []);
    });
}

/// The same while dirty leaves are read and cleaned: it is reported or it is dirty still.
#[test]
fn mark_against_read_and_clear() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 2), MISALIGNED);
        radix.mark(0, Attributes::USED).unwrap();
        let other = spawn(&radix, |radix| {
            radix.mark(0, Attributes::USED).unwrap();
            radix.mark(1 << 12, Attributes::USED).unwrap();
        });
        let reader = spawn(&radix, |radix| {
            let mut reported = Vec::new();
            radix.read_and_clear_dirty(pages(0, 4), |dirty| reported.push(dirty));
            reported
        });
        other.join().unwrap();
        let reported = reader.join().unwrap();
        let reported = |page: u64| reported.iter().any(|dirty| dirty.contains(page << 12));
        assert!(reported(0));
        assert!(reported(1) || is_dirty(&radix, 1));
        finish(radix, &memory, []);
    });
}

/// A neighbour cuts the leaf that is dirty: the part of it is reported all the same.
#[test]
fn read_and_clear_against_cut() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 4), LOW);
        radix.mark(0, Attributes::USED).unwrap();
        let other = spawn(&radix, |radix| unmap(radix, pages(2, 2)));
        let reader = spawn(&radix, |radix| {
            let mut reported = Vec::new();
            radix.read_and_clear_dirty(pages(0, 2), |dirty| reported.push(dirty));
            reported
        });
        let other = other.join().unwrap();
        let reported = reader.join().unwrap();
        let pages: u64 = reported.iter().map(|dirty| dirty.length().unwrap() >> 12).sum();
        assert_eq!(pages, 2, "{reported:?}");
        finish(radix, &memory, [other]);
    });
}

/// A cursor is in a table that goes with all that is in it. What it shows was there when it began.
#[test]
fn cursor_against_unmap_of_its_table() {
    check(|| {
        let (radix, memory) = table(2);
        map(&radix, pages(0, 2), MISALIGNED);
        map(&radix, pages(4, 1), HIGH);
        let other = spawn(&radix, |radix| {
            let mut at = 0;
            for span in radix.cursor(pages(0, 8)) {
                let range = match span {
                    Span::Leaf(leaf) => {
                        assert_eq!(
                            leaf.oa.get(),
                            if leaf.iova >> 12 == 4 { HIGH } else { MISALIGNED + leaf.iova }
                        );
                        leaf.range()
                    }
                    Span::Hole(hole) => hole,
                };
                assert_eq!(range.first(), at);
                at = range.last() + 1;
            }
            assert_eq!(at, 8 << 12);
        });
        let gather = unmap(&radix, pages(0, 4));
        other.join().unwrap();
        finish(radix, &memory, [gather]);
    });
}
