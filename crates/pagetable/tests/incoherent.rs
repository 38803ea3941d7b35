//! Walkers that do not snoop: what is in memory, as far as it was written back, always says the same as the table.
//!
//! The table memory here keeps a second copy of every page: what a walker would read that sees only lines that were
//! cleaned. A fresh page's copy is full of present entries that lead to nowhere, so that a page linked before it is
//! clean is found out. After each operation the copy is walked, by the bits of the format alone, and has to give what
//! [`Radix::walk`] gives.

use ioasid_pagetable::{
    AmdV1, Attributes, Entry, Format, Gather, HeapTables, IovaRange, Oa, OutOfTables, Radix, RiscV,
    TableLayout, TableMemory, VtdSecondStage, X86_64,
};
use proptest::prelude::*;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Entries by their place in memory, as they were when they were last cleaned.
#[derive(Clone, Default)]
struct WrittenBack(Arc<Mutex<HashMap<usize, u64>>>, Arc<Mutex<Meanwhile>>);

/// What somebody else does while an operation cleans one entry, before it is clean.
#[derive(Default)]
struct Meanwhile {
    /// How many single entries are cleaned before.
    after: usize,
    act: Option<Box<dyn FnOnce() + Send>>,
}

impl WrittenBack {
    fn entry(&self, table: u64, index: usize) -> u64 {
        self.0.lock().unwrap()[&(table as usize + 8 * index)]
    }

    /// What a walker finds at an address: the output, and the leaf's attributes.
    fn walk<F: Format>(&self, radix: &Radix<F, WrittenBack>, iova: u64) -> Option<(u64, Attributes)> {
        let format = radix.format();
        let (mut table, mut level) = radix.top()?;
        loop {
            let index = (iova >> format.shift(level)) as usize & ((1 << format.index_bits(level)) - 1);
            match format.decode(level, self.entry(table, index)) {
                Entry::Table(address) => (table, level) = (address, level - 1),
                Entry::Leaf { oa, size, attributes } => {
                    return Some((oa + (iova & (size.bytes() - 1)), attributes));
                }
                Entry::Absent => return None,
                Entry::Malformed => panic!("an entry on the way to {iova:#x} was never written back"),
            }
        }
    }
}

// SAFETY: all of it is done by `HeapTables`; the copies only watch.
unsafe impl TableMemory<AtomicU64> for WrittenBack {
    const COHERENT: bool = false;

    fn clean(&self, entries: &[AtomicU64]) {
        if entries.len() == 1 {
            let mut meanwhile = self.1.lock().unwrap();
            let act = if meanwhile.after == 0 { meanwhile.act.take() } else { None };
            meanwhile.after = meanwhile.after.saturating_sub(1);
            drop(meanwhile);
            if let Some(act) = act {
                act();
            }
        }
        let mut copies = self.0.lock().unwrap();
        // Lines are cleaned as a whole.
        let begin = entries.as_ptr() as usize & !63;
        let end = (entries.as_ptr_range().end as usize).next_multiple_of(64);
        for place in (begin..end).step_by(8) {
            // SAFETY: tables consist of whole lines.
            let entry = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(place) };
            copies.insert(place, entry.load(Ordering::Acquire));
        }
    }

    fn allocate(&self, layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        let table = HeapTables.allocate(layout)?;
        let address = HeapTables.address(table) as usize;
        self.0.lock().unwrap().extend((0..layout.entries).map(|index| (address + 8 * index, u64::MAX)));
        Ok(table)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, layout: TableLayout, empty: bool) {
        let address = HeapTables.address(table) as usize;
        self.0.lock().unwrap().extend((0..layout.entries).map(|index| (address + 8 * index, u64::MAX)));
        // SAFETY: passed on.
        unsafe { HeapTables.free(table, layout, empty) };
    }

    unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, layout: TableLayout) -> &'a AtomicU64 {
        // SAFETY: passed on.
        unsafe { HeapTables.state(table, layout) }
    }

    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        HeapTables.address(table)
    }

    unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
        // SAFETY: passed on.
        unsafe { HeapTables.pointer(address) }
    }
}

const PAGE: u64 = 4096;
const SPAN: u64 = 2 << 30;

#[derive(Clone, Debug)]
enum Operation {
    Map(IovaRange, u64),
    Unmap(IovaRange),
    Cut(u64),
    Protect(IovaRange, bool),
    Merge,
    CleanDirty(IovaRange),
}

fn ranges() -> impl Strategy<Value = IovaRange> {
    let size = prop_oneof![Just(PAGE), Just(9 * PAGE), Just(2 << 20), Just((2 << 20) + PAGE)];
    let grain = prop_oneof![Just(PAGE), Just(2 << 20), Just(1 << 30)];
    // Around one boundary of a gigabyte, so that they meet.
    ((1 << 30) - (4 << 20)..(1u64 << 30) + (4 << 20), grain, size).prop_map(|(first, grain, size)| {
        IovaRange::with_length((first & !(grain - 1)).min(SPAN - size), size).unwrap()
    })
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let output = prop_oneof![Just(0), Just(1 << 40), Just((1 << 40) + PAGE)];
    let operation = prop_oneof![
        4 => (ranges(), output).prop_map(|(range, oa)| Operation::Map(range, oa)),
        3 => ranges().prop_map(Operation::Unmap),
        1 => ranges().prop_map(|range| Operation::Cut(range.first())),
        1 => (ranges(), any::<bool>()).prop_map(|(range, write)| Operation::Protect(range, write)),
        1 => Just(Operation::Merge),
        1 => ranges().prop_map(Operation::CleanDirty),
    ];
    proptest::collection::vec(operation, 1..24)
}

fn run<F: Format>(format: F, operations: &[Operation]) {
    let copies = WrittenBack::default();
    let radix = Radix::new(format, copies.clone());
    let everything = IovaRange::with_length(0, SPAN).unwrap();
    let mut gather = Gather::new();
    let mut seen = vec![0, SPAN - 1];
    for operation in operations {
        let touched = match *operation {
            Operation::Map(range, oa) => {
                let oa = Oa::new(oa + range.first());
                let _ = radix.map(range, oa, Attributes::READ | Attributes::WRITE, &mut gather);
                range
            }
            Operation::Unmap(range) => {
                let _ = radix.unmap(range, &mut gather);
                range
            }
            Operation::Cut(at) => {
                let _ = radix.cut(at, &mut gather);
                IovaRange::with_length(at, PAGE).unwrap()
            }
            Operation::Protect(range, write) => {
                let write = if write { Attributes::WRITE } else { Attributes::empty() };
                let _ = radix.protect(range, Attributes::READ | write, &mut gather);
                range
            }
            Operation::Merge => {
                let _ = radix.merge(everything, &mut gather);
                everything
            }
            Operation::CleanDirty(range) => {
                radix.read_and_clear_dirty(range, |_| {});
                range
            }
        };
        for at in [touched.first(), touched.last()] {
            seen.extend([at, at.saturating_sub(1), (at + 1).min(SPAN - 1), at ^ (1 << 21), at ^ (1 << 30)]);
        }
        for table in std::mem::take(&mut gather).retired {
            // SAFETY: nobody is in the table.
            unsafe { table.free() };
        }
        for &iova in seen.iter().filter(|&&iova| iova < SPAN) {
            let expected = radix.walk(iova).ok().map(|leaf| (leaf.output(iova).get(), leaf.attributes));
            assert_eq!(copies.walk(&radix, iova), expected, "{iova:#x} after {operation:?}");
        }
    }
}

/// Two operations in one table: the second comes through a link that the first has made and not yet cleaned. Its own work
/// must be seen all the same when it returns.
fn second_through_an_uncleaned_link(
    first: impl Fn(&Radix<VtdSecondStage, WrittenBack>),
    second: impl Fn(&Radix<VtdSecondStage, WrittenBack>) + Send + Copy + 'static,
    before: impl Fn(&Radix<VtdSecondStage, WrittenBack>),
    iova: u64,
) {
    let mut met = 0;
    for after in 0..8 {
        let copies = WrittenBack::default();
        let radix = Arc::new(Radix::new(VtdSecondStage::new(4).unwrap(), copies.clone()));
        before(&radix);
        let (other, copies_of_it) = (Arc::clone(&radix), copies.clone());
        let act = move || {
            second(&other);
            let expected = other.walk(iova).ok().map(|leaf| (leaf.output(iova).get(), leaf.attributes));
            assert_eq!(copies_of_it.walk(&other, iova), expected);
        };
        *copies.1.lock().unwrap() = Meanwhile { after, act: Some(Box::new(act)) };
        first(&radix);
        met += usize::from(copies.1.lock().unwrap().act.take().is_none());
    }
    assert!(met > 0, "nothing was cleaned");
}

#[test]
fn who_comes_through_an_uncleaned_link_cleans_it() {
    let read_write = Attributes::READ | Attributes::WRITE;
    let page = |number: u64| IovaRange::with_length(number * PAGE, PAGE).unwrap();
    let map = move |radix: &Radix<VtdSecondStage, WrittenBack>, number: u64| {
        radix.map(page(number), Oa::new(number * PAGE), read_write, &mut Gather::new()).unwrap();
    };
    // A page beside one for which the table is being made.
    second_through_an_uncleaned_link(|radix| map(radix, 1), move |radix| map(radix, 2), |_| {}, 2 * PAGE);
    // The other half of a leaf that is being cut.
    let block = IovaRange::with_length(0, 2 << 20).unwrap();
    let large = move |radix: &Radix<VtdSecondStage, WrittenBack>| {
        radix.map(block, Oa::new(0), read_write, &mut Gather::new()).unwrap();
    };
    let cut = |radix: &Radix<VtdSecondStage, WrittenBack>| radix.cut(1 << 20, &mut Gather::new()).unwrap();
    let second_half = IovaRange::with_length(1 << 20, 1 << 20).unwrap();
    second_through_an_uncleaned_link(
        cut,
        move |radix| radix.unmap(second_half, &mut Gather::new()).unwrap(),
        large,
        1 << 20,
    );
    second_through_an_uncleaned_link(
        cut,
        move |radix| radix.protect(second_half, Attributes::READ, &mut Gather::new()).unwrap(),
        large,
        1 << 20,
    );
}

/// A large leaf that is cut down to pages, from which some go and come back.
#[test]
fn cuts_and_merges_are_written_back() {
    let gigabyte = IovaRange::with_length(1 << 30, 1 << 30).unwrap();
    let page = IovaRange::with_length((1 << 30) + (6 << 20) + PAGE, PAGE).unwrap();
    let operations = [
        Operation::Map(gigabyte, 1 << 40),
        Operation::Cut(page.first()),
        Operation::Unmap(page),
        Operation::Map(page, 1 << 40),
        Operation::Protect(page, false),
        Operation::Protect(page, true),
        Operation::Merge,
        Operation::Unmap(gigabyte),
    ];
    run(VtdSecondStage::new(4).unwrap(), &operations);
    run(X86_64::new(4).unwrap(), &operations);
}

/// More tables that hold nothing than may stay, and a table that grows on top.
#[test]
fn tables_that_come_and_go_are_written_back() {
    let pages: Vec<_> = (0..80).map(|table| IovaRange::with_length(table << 21, PAGE).unwrap()).collect();
    let maps = pages.iter().map(|&page| Operation::Map(page, 0));
    let unmaps = pages.iter().map(|&page| Operation::Unmap(page));
    run(VtdSecondStage::new(4).unwrap(), &maps.chain(unmaps).collect::<Vec<_>>());

    let copies = WrittenBack::default();
    let radix = Radix::new(AmdV1::new(), copies.clone());
    for iova in [0, 1 << 40, 1 << 50, u64::MAX - (PAGE - 1)] {
        let page = IovaRange::with_length(iova, PAGE).unwrap();
        radix.map(page, Oa::new(iova % (1 << 50)), Attributes::READ, &mut Gather::new()).unwrap();
        assert_eq!(copies.walk(&radix, 0), Some((0, Attributes::READ)), "after {iova:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_was_written_back_is_what_is_mapped(operations in operations()) {
        run(VtdSecondStage::new(4).unwrap(), &operations);
        run(X86_64::new(4).unwrap(), &operations);
        run(AmdV1::new(), &operations);
        run(RiscV::new(3).unwrap(), &operations);
    }
}
