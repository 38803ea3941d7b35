//! What the models are made of: threads, mappings, what is found in the end, and what must be left.

use crate::table::*;
use ioasid_pagetable::{
    Attributes, CachedWalk, ClaimError, Entry, Format, Gather, IovaRange, MapError, Oa, Radix, TableMemory,
    WalkFault,
};
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::ops::ControlFlow;
use std::ptr::NonNull;
use std::sync::Arc;

pub(crate) type Table = Radix<Tiny, Pages, AtomicU64>;
pub(crate) type Gathered = Gather<Pages, AtomicU64>;

pub(crate) const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
/// Outputs of different mappings, such that a large leaf fits, and such that none does.
pub(crate) const LOW: u64 = 0x100_0000;
pub(crate) const HIGH: u64 = 0x200_0000;
pub(crate) const MISALIGNED: u64 = 0x300_1000;

pub(crate) fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::with_length(first << 12, count << 12).unwrap()
}

pub(crate) fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

pub(crate) fn table(highest: u8) -> (Arc<Table>, Pages) {
    let memory = Pages::default();
    (Arc::new(Radix::new(Tiny { highest }, memory.clone())), memory)
}

pub(crate) fn spawn<T: 'static>(
    radix: &Arc<Table>,
    work: impl FnOnce(&Table) -> T + 'static,
) -> thread::JoinHandle<T> {
    let radix = Arc::clone(radix);
    thread::spawn(move || work(&radix))
}

/// Maps in exclusive mode, with nothing to retire.
pub(crate) fn map(radix: &Table, range: IovaRange, oa: u64) {
    let mut gather = Gather::new();
    radix.map(range, Oa::new(oa), READ_WRITE, &mut gather).unwrap();
    assert!(gather.retired.is_empty());
}

/// Maps in exclusive mode, where tables may be dying.
pub(crate) fn map_gathered(radix: &Table, range: IovaRange, oa: u64) -> Gathered {
    let mut gather = Gather::new();
    radix.map(range, Oa::new(oa), READ_WRITE, &mut gather).unwrap();
    gather
}

pub(crate) fn unmap(radix: &Table, range: IovaRange) -> Gathered {
    let mut gather = Gather::new();
    radix.unmap(range, &mut gather).unwrap();
    gather
}

/// Frees what was retired. All threads that could have seen it have ended.
pub(crate) fn free(gather: Gathered) {
    for retired in gather.retired {
        // SAFETY: the models call this after joining their threads.
        unsafe { retired.free() };
    }
}

pub(crate) fn claim(radix: &Table, range: IovaRange, oa: u64, gather: &mut Gathered) -> bool {
    match radix.claim(range, Oa::new(oa), READ_WRITE, gather) {
        Ok(()) => true,
        Err(ClaimError::Contended { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A whole mapping; `false` if it met another one, published or not.
pub(crate) fn claim_and_publish(radix: &Table, range: IovaRange, oa: u64, gather: &mut Gathered) -> bool {
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
pub(crate) fn output(radix: &Table, page: u64) -> Option<u64> {
    match radix.walk(page << 12) {
        Ok(leaf) => {
            assert_eq!(leaf.attributes.difference(Attributes::USED), READ_WRITE);
            Some(leaf.output(page << 12).get())
        }
        Err(WalkFault::NotMapped(_)) => None,
        Err(fault) => panic!("{fault}"),
    }
}

pub(crate) fn output_cached(radix: &Table, page: u64, cache: &mut CachedWalk<AtomicU64>) -> Option<u64> {
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
pub(crate) fn leaves(radix: &Table) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    radix.occupied(IovaRange::ALL, |range| {
        found.push((range.first() >> 12, (range.last() - range.first() + 1) >> 12));
        ControlFlow::Continue(())
    });
    found
}

/// Counts the linked tables. None of them is dead, and no link is tentative any more.
pub(crate) fn linked(radix: &Table, memory: &Pages) -> u64 {
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
pub(crate) fn finish(radix: Arc<Table>, memory: &Pages, gathers: impl IntoIterator<Item = Gathered>) {
    gathers.into_iter().for_each(free);
    assert_eq!(memory.tables(), linked(&radix, memory), "tables that are neither linked nor freed");
    assert_eq!(memory.tables(), radix.table_count());
    drop(Arc::into_inner(radix).unwrap());
    assert_eq!(memory.tables(), 0);
}

/// Somebody has used up how many empty tables may stay, so that from now on whoever empties one retires it.
pub(crate) fn without_allowance(highest: u8) -> (Arc<Table>, Pages) {
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
