//! Arbitrary sequences of operations on a page table of any format.
//!
//! The table is compared with the plainest of models: which output and which permissions each mapped stretch of
//! addresses has, without leaves or levels. Whatever an operation answers, it must have happened as a whole or not at
//! all. Addresses are near each other, at the ends of the address space and around the sign-extension gap, or anything;
//! there are only so many table pages, so that running out of them happens often, and so that no sequence takes long.
//! Entries of any bits are decoded besides.
//!
//! `cargo +nightly fuzz run pagetable -- -max_total_time=60`

#![no_main]

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::Arbitrary;
use ioasid_pagetable::{
    AmdV1, Attributes, CachedWalk, DirtyBitmap, Entry, Format, Gather, HeapTables, IovaRange, Native, Oa,
    OutOfTables, PageSize, Radix, RiscV, Span, TableLayout, TableMemory, VtdSecondStage, X86_64,
};
use libfuzzer_sys::fuzz_target;

/// How many table pages one table may have.
const TABLES: u64 = 48;
const PERMISSIONS: Attributes = Attributes::READ.union(Attributes::WRITE);

/// Table pages from the heap, up to a number.
#[derive(Clone, Default)]
struct Few(Arc<AtomicU64>);

// SAFETY: all of it is done by `HeapTables`.
unsafe impl TableMemory<AtomicU64> for Few {
    fn allocate(&self, layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        if self.0.fetch_add(1, Ordering::Relaxed) >= TABLES {
            self.0.fetch_sub(1, Ordering::Relaxed);
            return Err(OutOfTables);
        }
        HeapTables.allocate(layout)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, layout: TableLayout, empty: bool) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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

#[derive(Arbitrary, Debug)]
enum Kind {
    Native(u8),
    Vtd(u8),
    X86 { levels: u8, sign_extended: bool },
    Amd { lowest: u8, highest: u8, sizes: Option<u64> },
    AmdFiner,
    RiscV { levels: u8, napot: bool },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    /// So many pages of 2^(12 + 9n) from an edge.
    Near {
        edge: u8,
        level: u8,
        pages: i8,
        small: i8,
    },
    Any(u64),
}

impl Address {
    fn value(self) -> u64 {
        match self {
            Address::Near { edge, level, pages, small } => {
                let edges = [
                    0,
                    1 << 30,
                    1 << 38,
                    1 << 47,
                    1 << 48,
                    1 << 56,
                    u64::MAX << 38,
                    u64::MAX << 47,
                    u64::MAX << 56,
                ];
                let page = 1i64 << (12 + 9 * (level % 4));
                edges[usize::from(edge) % edges.len()]
                    .wrapping_add_signed(i64::from(pages) * page)
                    .wrapping_add_signed(i64::from(small) << 12)
            }
            Address::Any(value) => value,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Length {
    Pages { level: u8, pages: u8, small: u8 },
    Any(u64),
}

impl Length {
    fn value(self) -> u64 {
        match self {
            Length::Pages { level, pages, small } => {
                (u64::from(pages) << (12 + 9 * (level % 4))) + (u64::from(small) << 12)
            }
            Length::Any(value) => value,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Operation {
    Map { first: Address, length: Length, output: Address, write: bool, fill: bool },
    Claim { first: Address, length: Length, output: Address, write: bool, publish: bool },
    Unmap { first: Address, length: Length },
    Retract { first: Address, length: Length, release: bool },
    Cut(Address),
    Protect { first: Address, length: Length, write: bool },
    Merge { first: Address, length: Length },
    Mark { iova: Address, dirty: bool },
    ReadAndClearDirty { first: Address, length: Length },
    Look { first: Address, length: Length },
    Decode { level: u8, entry: u64 },
    Flush,
}

#[derive(Arbitrary, Debug)]
struct Input {
    kind: Kind,
    operations: Vec<Operation>,
}

fn range(first: Address, length: Length) -> Option<IovaRange> {
    IovaRange::with_length(first.value(), length.value())
}

/// What is mapped: by the first address the last one, the output of the first, and the permissions.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model(BTreeMap<u64, (u64, u64, Attributes)>);

impl Model {
    fn at(&self, iova: u64) -> Option<(u64, Attributes)> {
        let (&first, &(last, oa, attributes)) = self.0.range(..=iova).next_back()?;
        (iova <= last).then(|| (oa + (iova - first), attributes))
    }

    /// Makes the address one at which a stretch begins.
    fn split(&mut self, at: u64) {
        let Some((&first, &(last, oa, attributes))) = self.0.range(..at).next_back() else { return };
        if last >= at {
            self.0.insert(first, (at - 1, oa, attributes));
            self.0.insert(at, (last, oa + (at - first), attributes));
        }
    }

    /// The stretches of a range, which end where it does.
    fn inside(&mut self, range: IovaRange) -> Vec<u64> {
        self.split(range.first());
        if let Some(end) = range.last().checked_add(1) {
            self.split(end);
        }
        self.0.range(range.first()..=range.last()).map(|(&first, _)| first).collect()
    }

    fn is_free(&mut self, range: IovaRange) -> bool {
        self.inside(range).is_empty()
    }

    /// Removes a range; how many bytes that were, 2^64 - 1 at most.
    fn remove(&mut self, range: IovaRange) -> u64 {
        let firsts = self.inside(range);
        let removed = firsts.into_iter().filter_map(|first| Some((first, self.0.remove(&first)?)));
        removed.fold(0, |sum, (first, (last, ..))| (last - first).saturating_add(1).saturating_add(sum))
    }
}

struct Subject<F: Format> {
    radix: Radix<F, Few>,
    model: Model,
    gather: Gather<Few, AtomicU64>,
    cache: CachedWalk<AtomicU64>,
}

impl<F: Format> Subject<F> {
    fn new(format: F) -> Subject<F> {
        Subject {
            radix: Radix::new(format, Few::default()),
            model: Model::default(),
            gather: Gather::new(),
            cache: CachedWalk::new(),
        }
    }

    /// The permissions that a leaf has which was asked for with these.
    fn says(&self, permissions: Attributes) -> Attributes {
        let format = self.radix.format();
        let size = PageSize::from_log2(format.shift(1)).unwrap();
        match format.decode(1, format.leaf_entry(1, size, 0, permissions)) {
            Entry::Leaf { attributes, .. } => attributes & PERMISSIONS,
            entry => panic!("a leaf reads as {entry:?}"),
        }
    }

    fn check(&mut self, iova: u64) {
        let expected = self.model.at(iova);
        let found = self.radix.walk(iova);
        assert_eq!(
            found.ok().map(|leaf| (leaf.output(iova).get(), leaf.attributes & PERMISSIONS)),
            expected,
            "{iova:#x}"
        );
        assert_eq!(self.radix.walk_cached(iova, &mut self.cache), found);
    }

    fn check_ends(&mut self, range: IovaRange) {
        for at in [range.first(), range.last()] {
            for iova in [at, at.wrapping_sub(1), at.wrapping_add(1), at ^ (1 << 21), at ^ (1 << 30)] {
                self.check(iova);
            }
        }
    }

    /// What an operation that removes has told since `before`.
    fn check_gathered(&mut self, removed: u64) {
        assert_eq!(self.gather.runs.bytes(), removed);
        self.gather.runs = Default::default();
    }

    fn run(&mut self, operation: &Operation) {
        match *operation {
            Operation::Map { first, length, output, write, fill } => {
                let Some(range) = range(first, length) else { return };
                let permissions = if write { PERMISSIONS } else { Attributes::READ };
                let oa = Oa::new(output.value());
                let before = self.model.clone();
                let result = if fill {
                    self.radix.fill(range, oa, permissions, &mut self.gather)
                } else {
                    self.radix.map(range, oa, permissions, &mut self.gather)
                };
                self.gather.runs = Default::default();
                if result.is_ok() {
                    let permissions = self.says(permissions);
                    if fill {
                        // What stood there already must have been the same.
                        for (first, (last, oa_before, like)) in
                            self.model.inside(range).iter().map(|first| (*first, self.model.0[first]))
                        {
                            assert_eq!(
                                (oa_before, like),
                                (oa.get() + (first - range.first()), permissions),
                                "{first:#x}-{last:#x}"
                            );
                        }
                        self.model.remove(range);
                    }
                    assert!(self.model.is_free(range), "{range} was mapped twice");
                    self.model.0.insert(range.first(), (range.last(), oa.get(), permissions));
                } else {
                    self.model = before;
                }
                self.check_ends(range);
            }
            Operation::Unmap { first, length } => {
                let Some(range) = range(first, length) else { return };
                match self.radix.unmap(range, &mut self.gather) {
                    Ok(()) => {
                        let removed = self.model.remove(range);
                        self.check_gathered(removed);
                    }
                    Err(_) => self.gather.runs = Default::default(),
                }
                self.check_ends(range);
            }
            Operation::Cut(at) => {
                let at = at.value();
                let cut = self.radix.cut(at, &mut self.gather);
                self.gather.runs = Default::default();
                if let (Ok(()), Ok(leaf)) = (cut, self.radix.walk(at)) {
                    assert_eq!(leaf.iova, at, "not cut");
                }
                self.check(at);
                self.check(at.wrapping_sub(1));
            }
            Operation::Protect { first, length, write } => {
                let Some(range) = range(first, length) else { return };
                let permissions = if write { PERMISSIONS } else { Attributes::READ };
                if self.radix.protect(range, permissions, &mut self.gather).is_ok() {
                    let permissions = self.says(permissions);
                    for first in self.model.inside(range) {
                        self.model.0.entry(first).and_modify(|(_, _, attributes)| *attributes = permissions);
                    }
                }
                self.gather.runs = Default::default();
                self.check_ends(range);
            }
            Operation::Merge { first, length } => {
                let Some(range) = range(first, length) else { return };
                let _ = self.radix.merge(range, &mut self.gather);
                self.gather.runs = Default::default();
                self.check_ends(range);
            }
            Operation::Mark { iova, dirty } => {
                let used = if dirty { Attributes::USED } else { Attributes::ACCESSED };
                let marked = self.radix.mark(iova.value(), used);
                assert_eq!(marked.is_ok(), self.model.at(iova.value()).is_some());
                let (Ok(leaf), true) = (self.radix.walk(iova.value()), self.radix.format().dirty_bit() != 0)
                else {
                    return;
                };
                let mut found = !dirty;
                self.radix.dirty(leaf.range(), |range| found |= range.contains(iova.value()));
                assert!(found, "marked, but not dirty");
            }
            Operation::ReadAndClearDirty { first, length } => {
                let Some(range) = range(first, length) else { return };
                let mut words = [0; 16];
                let mut bitmap = DirtyBitmap::new(&mut words, range.first(), PageSize::SIZE_4K);
                let mut last = None;
                self.radix.read_and_clear_dirty(range, |dirty| {
                    assert!(range.covers(&dirty) && last.is_none_or(|last| last < dirty.first()));
                    last = Some(dirty.last());
                    bitmap.set(dirty);
                });
                self.check_ends(range);
            }
            Operation::Look { first, length } => {
                let Some(range) = range(first, length) else { return };
                let mut next = Some(range.first());
                let mut leaves = Vec::new();
                let spans: Vec<Span> = self.radix.cursor(range).collect();
                for span in spans {
                    let span = match span {
                        Span::Leaf(leaf) => {
                            leaves.push(leaf);
                            leaf.range().intersection(&range).unwrap()
                        }
                        Span::Hole(hole) => {
                            assert!(self.model.is_free(hole), "{hole} is no hole");
                            hole
                        }
                    };
                    assert_eq!(Some(span.first()), next);
                    next = span.last().checked_add(1);
                    self.check(span.first());
                    self.check(span.last());
                }
                assert_eq!(next, range.last().checked_add(1));
                self.radix.leaves(range, |leaf| {
                    assert_eq!(leaves.first(), Some(&leaf));
                    leaves.remove(0);
                    std::ops::ControlFlow::Continue(())
                });
                assert!(leaves.is_empty());
            }
            Operation::Decode { level, entry } => {
                let format = self.radix.format();
                let level = 1 + level % *format.top_levels().end();
                let decoded = format.decode(level, entry);
                // The native format believes what it reads: nobody else writes it.
                if F::NAME == Native::NAME {
                    return;
                }
                if let Entry::Leaf { oa, size, attributes } = decoded {
                    assert_eq!(oa & (size.bytes() - 1), 0);
                    let again = format.decode(level, format.leaf_entry(level, size, oa, attributes));
                    assert!(
                        matches!(again, Entry::Leaf { oa: found, size: like, .. } if (found, like) == (oa, size))
                    );
                }
            }
            Operation::Flush => self.flush(),
            // The claiming mode is for the native format.
            Operation::Claim { .. } | Operation::Retract { .. } => {}
        }
    }

    fn flush(&mut self) {
        for table in std::mem::take(&mut self.gather).retired {
            // SAFETY: no operation and no walk is running, and the remembered way is checked against the generation.
            unsafe { table.free() };
        }
    }

    /// At the end nothing may be left.
    fn finish(mut self) {
        let firsts: Vec<u64> = self.model.0.keys().copied().collect();
        firsts.into_iter().for_each(|first| self.check(first));
        let everything = IovaRange::ALL;
        // Nothing reaches over the ends of everything.
        if self.radix.format().accepts(&everything) || self.radix.unmap(everything, &mut self.gather).is_ok()
        {
            let _ = self.radix.unmap(everything, &mut self.gather);
            self.radix.leaves(everything, |leaf| panic!("{leaf:?} is left"));
        }
        let memory = self.radix.table_count();
        assert!(memory <= TABLES);
        self.flush();
    }
}

impl Subject<Native> {
    fn run_claiming(&mut self, operation: &Operation) {
        match *operation {
            Operation::Claim { first, length, output, write, publish } => {
                let Some(range) = range(first, length) else { return };
                let permissions = if write { PERMISSIONS } else { Attributes::READ };
                let oa = Oa::new(output.value());
                if self.radix.claim(range, oa, permissions, &mut self.gather).is_ok() {
                    assert!(self.model.is_free(range), "{range} was claimed twice");
                    self.check_ends(range);
                    if publish {
                        self.radix.publish(range);
                        self.model.0.insert(range.first(), (range.last(), oa.get(), permissions));
                    } else {
                        self.radix.release(range, &mut self.gather);
                    }
                }
                self.check_ends(range);
            }
            Operation::Retract { first, length, release } => {
                let Some(range) = range(first, length) else { return };
                let granule = self.radix.format().granule();
                if !range.is_aligned(granule) || self.radix.cut_claimed(range).is_err() {
                    return;
                }
                self.gather.runs = Default::default();
                self.radix.retract(range, &mut self.gather).unwrap();
                let runs = std::mem::take(&mut self.gather.runs);
                let removed = self.model.clone().remove(range);
                assert_eq!(runs.bytes(), removed);
                for run in runs.iter() {
                    assert!(self.radix.walk(run.first()).is_err());
                    if release {
                        self.radix.release(run, &mut self.gather);
                        self.model.remove(run);
                    } else {
                        self.radix.publish(run);
                    }
                }
                self.check_ends(range);
            }
            _ => self.run(operation),
        }
    }
}

fn run<F: Format>(format: F, operations: &[Operation]) {
    let mut subject = Subject::new(format);
    operations.iter().for_each(|operation| subject.run(operation));
    subject.finish();
}

fuzz_target!(|input: Input| {
    let operations = &input.operations;
    match input.kind {
        Kind::Native(granule) => {
            let granule = PageSize::from_log2(11 + u32::from(granule % 6)).unwrap();
            let mut subject = Subject::new(Native::new().with_granule(granule).unwrap());
            operations.iter().for_each(|operation| subject.run_claiming(operation));
            subject.finish();
        }
        Kind::Vtd(levels) => run(VtdSecondStage::new(3 + levels % 3).unwrap(), operations),
        Kind::X86 { levels, sign_extended } => {
            run(X86_64::new(4 + levels % 2).unwrap().with_sign_extension(sign_extended), operations);
        }
        Kind::Amd { lowest, highest, sizes } => {
            let lowest = 1 + lowest % 6;
            let highest = lowest + highest % (7 - lowest);
            let format = AmdV1::new().with_top_levels(lowest..=highest).unwrap();
            run(format.with_leaf_sizes(sizes.unwrap_or(u64::MAX)), operations);
        }
        Kind::AmdFiner => run(AmdV1::new().with_granule_2k(), operations),
        Kind::RiscV { levels, napot } => {
            run(RiscV::new(3 + levels % 3).unwrap().with_napot(napot), operations);
        }
    }
});
