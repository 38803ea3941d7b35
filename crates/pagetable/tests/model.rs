//! The table against a plain model of it: a sorted map of leaves.
//!
//! Every operation of the exclusive mode and of the claiming mode is run on a table and on the model, with
//! addresses from both ends of the address space, around the boundaries of all leaf sizes and inside large
//! leaves. After each one, everything that can be asked of the table must have the model's answer, down to which
//! leaf sizes were used, what the gather reports, and which address an error names. The tables themselves are read
//! word by word too (`accounting`), by a reader that knows the bits from the formats' specifications alone.
//!
//! A long run: `PROPTEST_CASES=5000 cargo test --release -p ioasid-pagetable --test model`.

mod accounting;

use accounting::{Accounting, inspect};
use ioasid_pagetable::{
    Attributes, CachedWalk, ClaimError, ClaimFormat, CutError, Format, Gather, IovaRange, Leaf, MapError,
    Native, Oa, OutOfTables, PageSize, Radix, RetractError, VtdSecondStage, WalkFault,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};

type Gathered = Gather<Accounting, AtomicU64>;

/// As many empty tables may stay linked, besides the tables above them.
const KEPT_LIMIT: u64 = 64;
/// Operations that would leave more leaves than this are left out, to keep the tests short.
const MAX_LEAVES: usize = 6000;

// ---------------------------------------------------------------------------------------------- the model

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ModelLeaf {
    last: u64,
    oa: u64,
    attributes: Attributes,
    present: bool,
    busy: bool,
    /// A claimed mapping begins here.
    first: bool,
}

/// The leaves of a mapping to be made: first address, last address, output.
type Plan = Vec<(u64, u64, u64)>;

/// Leaves by first address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    leaves: BTreeMap<u64, ModelLeaf>,
    /// Allowed sizes, ascending, as logarithms.
    sizes: Vec<u32>,
    /// No leaf is larger than an entry of the top table, which is only as high as the addresses ask for.
    largest: u32,
}

fn log2(first: u64, last: u64) -> u32 {
    (last - first + 1).trailing_zeros()
}

impl Model {
    fn new<F: Format>(format: &F) -> Model {
        let sizes = (1..=*format.top_levels().end())
            .flat_map(|level| (0..64).filter(move |&log2| format.leaf_sizes(level) >> log2 & 1 != 0))
            .collect();
        Model { leaves: BTreeMap::new(), sizes, largest: 0 }
    }

    fn granule(&self) -> u64 {
        1 << self.sizes[0]
    }

    /// First addresses of the leaves that have an address in the range.
    fn firsts(&self, range: IovaRange) -> Vec<u64> {
        let before = self.leaves.range(..range.first()).next_back();
        let before = before.filter(|(_, leaf)| leaf.last >= range.first()).map(|(&first, _)| first);
        let inside = self.leaves.range(range.first()..=range.last()).map(|(&first, _)| first);
        before.into_iter().chain(inside).collect()
    }

    fn at(&self, iova: u64) -> Option<(u64, ModelLeaf)> {
        let (&first, &leaf) = self.leaves.range(..=iova).next_back()?;
        (leaf.last >= iova).then_some((first, leaf))
    }

    /// The leaves that a mapping consists of, or the first address in the way. With `equal`, leaves to the same
    /// output are not in the way. `None`: more leaves than a test can afford.
    fn plan(&self, range: IovaRange, oa: u64, equal: bool) -> Option<Result<Plan, u64>> {
        let mut plan = Vec::new();
        let mut at = range.first();
        loop {
            let output = oa + (at - range.first());
            let last = match self.at(at) {
                Some((first, leaf)) => {
                    if !equal || leaf.oa + (at - first) != output {
                        return Some(Err(at));
                    }
                    leaf.last.min(range.last())
                }
                None => {
                    let fits = |&&size: &&u32| {
                        let low = (1u64 << size) - 1;
                        size <= self.largest
                            && (at | output) & low == 0
                            && at | low <= range.last()
                            && self.leaves.range(at..=at | low).next().is_none()
                    };
                    let size = *self.sizes.iter().rev().find(fits)?;
                    let last = at | ((1 << size) - 1);
                    plan.push((at, last, output));
                    if self.leaves.len() + plan.len() > MAX_LEAVES {
                        return None;
                    }
                    last
                }
            };
            if last >= range.last() {
                return Some(Ok(plan));
            }
            at = last + 1;
        }
    }

    fn insert(&mut self, plan: Plan, attributes: Attributes, present: bool, busy: bool) {
        for (number, (at, last, oa)) in plan.into_iter().enumerate() {
            let leaf = ModelLeaf { last, oa, attributes, present, busy, first: busy && number == 0 };
            self.leaves.insert(at, leaf);
        }
    }

    /// Cuts until a leaf begins at `at`, or fails at the busy leaf there.
    fn cut(&mut self, at: u64) -> Result<(), u64> {
        while let Some((first, leaf)) = self.at(at).filter(|&(first, _)| first != at) {
            if leaf.busy {
                return Err(at);
            }
            let size = log2(first, leaf.last);
            let smaller = *self.sizes.iter().rev().find(|&&smaller| smaller < size).unwrap();
            for piece in 0..1u64 << (size - smaller) {
                let offset = piece << smaller;
                let last = (first + offset) | ((1 << smaller) - 1);
                let piece = ModelLeaf { last, oa: leaf.oa + offset, first: leaf.first && piece == 0, ..leaf };
                self.leaves.insert(first + offset, piece);
            }
        }
        Ok(())
    }

    fn cut_ends(&mut self, range: IovaRange) -> Result<(), u64> {
        self.cut(range.first())?;
        range.last().checked_add(1).map_or(Ok(()), |end| self.cut(end))
    }

    /// Whether cutting the ends of the range stays within what a test can afford.
    fn may_cut(&self) -> bool {
        self.leaves.len() + 2 * 6 * 512 <= 2 * MAX_LEAVES
    }
}

/// What a gather should report.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    runs: Vec<(u64, u64)>,
    leaves: u64,
    sizes: u64,
}

impl Report {
    fn removed(&mut self, first: u64, last: u64) {
        self.leaves += 1;
        self.sizes |= last - first + 1;
        match self.runs.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
            _ => self.runs.push((first, last)),
        }
    }

    fn of(gather: &Gathered) -> Report {
        let runs = gather.runs.iter().map(|run| (run.first(), run.last())).collect();
        Report { runs, leaves: gather.leaves, sizes: gather.leaf_sizes }
    }
}

// --------------------------------------------------------------------------- readers from the specification

/// Translates an address from the table's memory alone: output address, readable, writable.
type SpecificationWalk = fn(top: (u64, u8), granule: u32, iova: u64) -> Option<(u64, bool, bool)>;

fn word(table: u64, index: u64) -> u64 {
    let pointer: *const AtomicU64 = std::ptr::with_exposed_provenance((table + index * 8) as usize);
    // SAFETY: the tests read linked tables only, while nobody else works on them.
    unsafe { &*pointer }.load(Ordering::Acquire)
}

/// The table at the top of the native format's module.
fn walk_native_bits((mut table, mut level): (u64, u8), granule: u32, iova: u64) -> Option<(u64, bool, bool)> {
    let width = granule + 9 * u32::from(level);
    if width < 64 && iova >> width != 0 {
        return None;
    }
    loop {
        let shift = granule + 9 * (u32::from(level) - 1);
        let entry = word(table, (iova >> shift) & 0x1ff);
        let address = entry & 0x00ff_ffff_ffff_f800;
        match (entry & 1, entry & 0x40) {
            (0, _) => return None,
            (_, 0) => {
                assert_eq!(address & ((1 << shift) - 1), 0, "a misaligned leaf");
                let low = iova & ((1 << shift) - 1);
                return Some((address | low, entry & 8 != 0, entry & 0x10 != 0));
            }
            _ => (table, level) = (address, level - 1),
        }
    }
}

/// VT-d 3.7 and 9.8, without accessed and dirty flags.
fn walk_vtd_bits((mut table, mut level): (u64, u8), _granule: u32, iova: u64) -> Option<(u64, bool, bool)> {
    if iova >> (12 + 9 * u32::from(level)) != 0 {
        return None;
    }
    let (mut read, mut write) = (true, true);
    loop {
        let shift = 12 + 9 * (u32::from(level) - 1);
        let entry = word(table, (iova >> shift) & 0x1ff);
        if entry & 3 == 0 {
            return None;
        }
        assert_eq!(entry >> 52, 0, "ignored and reserved bits stay 0");
        let address = entry & 0x000f_ffff_ffff_f000;
        (read, write) = (read && entry & 1 != 0, write && entry & 2 != 0);
        if level == 1 || entry & 0x80 != 0 {
            assert!(level <= 3, "no leaves above 1 GiB");
            assert_eq!(address & ((1 << shift) - 1), 0, "reserved address bits of a large leaf");
            return Some((address | (iova & ((1 << shift) - 1)), read, write));
        }
        assert_eq!(entry & 0xf80, 0, "reserved bits of a table entry");
        (table, level) = (address, level - 1);
    }
}

// ---------------------------------------------------------------------------------------- table and model

/// A table, its model and its memory.
struct Pair<F: Format> {
    radix: Radix<F, Accounting>,
    memory: Accounting,
    model: Model,
    /// Serves through the whole test: retired tables are freed and used again under it.
    cache: CachedWalk<AtomicU64>,
    /// The last address that the format can look up.
    limit: u64,
    specification: SpecificationWalk,
}

impl<F: Format> Pair<F> {
    fn new(format: F, specification: SpecificationWalk) -> Pair<F> {
        let top = *format.top_levels().end();
        let bits = format.shift(top) + format.index_bits(top);
        let limit = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
        let memory = Accounting::default();
        let model = Model::new(&format);
        let radix = Radix::new(format, memory.clone());
        Pair { radix, memory, model, cache: CachedWalk::new(), limit, specification }
    }

    /// Tells the model how high the top table will be when `range` is mapped.
    fn grow(&mut self, range: IovaRange) {
        let format = self.radix.format();
        let covers = |&level: &u8| {
            let bits = format.shift(level) + format.index_bits(level);
            bits >= 64 || range.last() >> bits == 0
        };
        let needed = format.top_levels().find(covers).unwrap();
        let level = self.radix.top().map_or(needed, |(_, level)| level.max(needed));
        self.model.largest = format.shift(level);
    }

    /// Nothing runs between two operations of a test, so the tables can go at once.
    fn settle(&mut self, gather: &mut Gathered) {
        self.memory.free_retired(gather);
    }

    fn check_address(&mut self, iova: u64) {
        let expected = match self.model.at(iova) {
            Some((first, leaf)) if leaf.present => Ok(Leaf {
                iova: first,
                oa: Oa::new(leaf.oa),
                size: PageSize::from_log2(log2(first, leaf.last)).unwrap(),
                attributes: leaf.attributes,
            }),
            _ if iova > self.limit => Err(WalkFault::OutOfRange(iova)),
            _ => Err(WalkFault::NotMapped(iova)),
        };
        assert_eq!(self.radix.walk(iova), expected);
        assert_eq!(self.radix.walk_cached(iova, &mut self.cache), expected, "cached");
        if let Some(top) = self.radix.top() {
            let found = (self.specification)(top, self.model.sizes[0], iova);
            let expected = expected.ok().map(|leaf| {
                let read = leaf.attributes.contains(Attributes::READ);
                let write = leaf.attributes.contains(Attributes::WRITE);
                (leaf.output(iova).get(), read, write)
            });
            assert_eq!(found, expected, "by the specification, at {iova:#x}");
        }
    }

    /// Compares everything that can be seen of the whole table.
    fn check(&mut self) {
        let mut leaves = self.model.leaves.iter();
        self.radix.occupied(IovaRange::ALL, |range| {
            let (&first, leaf) = leaves.next().expect("more is occupied than the model knows");
            assert_eq!((range.first(), range.last()), (first, leaf.last));
            ControlFlow::Continue(())
        });
        assert_eq!(leaves.next(), None, "less is occupied than the model knows");
        let mut leaves = self.model.leaves.iter().filter(|(_, leaf)| leaf.present);
        self.radix.leaves(IovaRange::ALL, |found| {
            let (&first, leaf) = leaves.next().expect("more leaves than the model has");
            let expected = (first, leaf.last, Oa::new(leaf.oa), leaf.attributes);
            assert_eq!((found.iova, found.range().last(), found.oa, found.attributes), expected);
            ControlFlow::Continue(())
        });
        assert_eq!(leaves.next(), None, "fewer leaves than the model has");
        let inspection = inspect(&self.radix);
        assert_eq!(inspection.tables, self.radix.table_count());
        assert_eq!(inspection.tables, self.memory.tables(), "tables that are neither linked nor freed");
        assert_eq!(inspection.entries.len(), self.model.leaves.len());
        assert!(inspection.empty <= KEPT_LIMIT, "{} empty tables are linked", inspection.empty);
        assert_eq!(inspection.bytes, self.radix.table_bytes());
    }

    /// Compares translations around both ends of a range.
    fn check_ends(&mut self, range: IovaRange) {
        for end in [range.first(), range.last()] {
            for iova in [end.wrapping_sub(1), end, end.wrapping_add(1)] {
                self.check_address(iova);
            }
        }
        let mut found = Vec::new();
        self.radix.occupied(range, |span| {
            found.push(span.first());
            ControlFlow::Continue(())
        });
        assert_eq!(found, self.model.firsts(range), "occupied in {range}");
        let first_present =
            self.model.firsts(range).into_iter().find(|first| self.model.leaves[first].present);
        let mut found = None;
        self.radix.leaves(range, |leaf| {
            assert_eq!(found.replace(leaf.iova), None, "the callback had enough");
            ControlFlow::Break(())
        });
        assert_eq!(found, first_present, "the first leaf in {range}");
    }

    /// Takes everything away, and the table too: no page may stay behind.
    fn finish(mut self) {
        let mut gather = Gather::new();
        let mut expected = Report::default();
        for (&first, leaf) in &self.model.leaves {
            expected.removed(first, leaf.last);
        }
        self.radix.unmap(IovaRange::ALL, &mut gather).unwrap();
        assert_eq!(Report::of(&gather), expected);
        self.settle(&mut gather);
        self.model.leaves.clear();
        self.check();
        assert!(self.memory.tables() <= 1, "only the top table may stay after the whole was unmapped");
        drop(self.radix);
        assert_eq!(self.memory.tables(), 0);
    }
}

// ------------------------------------------------------------------------------------------------- inputs

/// Where something happens, in no format's own terms.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// This many granules from the n-th landmark of the format.
    Near(usize, i64),
    /// This far into the n-th leaf, modulo what there is.
    InLeaf(usize, u64),
}

#[derive(Clone, Copy, Debug)]
enum Extent {
    Granules(u64),
    /// So many entries of this level, from a multiple of one on.
    Aligned(u8, u64),
    /// So many entries of this level and so many granules.
    Mixed(u8, u64, u64),
    To(Place),
}

#[derive(Clone, Copy, Debug)]
enum Output {
    /// Congruent to the address, so that large leaves fit; in one of two windows.
    Congruent(bool),
    /// So many granules beside that.
    Beside(u64),
}

#[derive(Clone, Debug)]
enum Operation {
    Map(Place, Extent, Output, Attributes),
    Fill(Place, Extent, Output, Attributes),
    Unmap(Place, Extent),
    UnmapLeaf(usize),
    Cut(Place),
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => (any::<usize>(), -1100..1100i64).prop_map(|(landmark, offset)| Place::Near(landmark, offset)),
        3 => (any::<usize>(), -2..3i64).prop_map(|(landmark, offset)| Place::Near(landmark, offset)),
        2 => (any::<usize>(), any::<u64>()).prop_map(|(leaf, offset)| Place::InLeaf(leaf, offset)),
    ]
}

fn extent() -> impl Strategy<Value = Extent> {
    prop_oneof![
        3 => (1..40u64).prop_map(Extent::Granules),
        1 => (1..1100u64).prop_map(Extent::Granules),
        4 => (2..5u8, 1..3u64).prop_map(|(level, count)| Extent::Aligned(level, count)),
        2 => (2..4u8, 1..3u64, 0..600u64)
            .prop_map(|(level, count, granules)| Extent::Mixed(level, count, granules)),
        2 => place().prop_map(Extent::To),
    ]
}

fn output() -> impl Strategy<Value = Output> {
    prop_oneof![
        6 => any::<bool>().prop_map(Output::Congruent),
        1 => (1..600u64).prop_map(Output::Beside),
    ]
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let read_write = Attributes::READ | Attributes::WRITE;
    prop_oneof![
        6 => Just(read_write),
        1 => Just(Attributes::READ),
        1 => Just(Attributes::WRITE),
        1 => Just(read_write | Attributes::FORCE_SNOOP),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let mapping = || (place(), extent(), output(), attributes());
    prop_oneof![
        5 => mapping().prop_map(|(place, extent, output, attributes)| {
            Operation::Map(place, extent, output, attributes)
        }),
        2 => mapping().prop_map(|(place, extent, output, attributes)| {
            Operation::Fill(place, extent, output, attributes)
        }),
        3 => (place(), extent()).prop_map(|(place, extent)| Operation::Unmap(place, extent)),
        2 => any::<usize>().prop_map(Operation::UnmapLeaf),
        1 => place().prop_map(Operation::Cut),
    ]
}

impl<F: Format> Pair<F> {
    fn address(&self, place: Place) -> u64 {
        let format = self.radix.format();
        let granule = self.model.granule();
        let address = match place {
            Place::Near(landmark, offset) => {
                // Around 0 lies the end of the address space too.
                let top = *format.top_levels().end();
                let landmark = match landmark % (usize::from(top) + 2) {
                    0 | 1 => 0,
                    2 => 3 << format.shift(3),
                    level => 1 << format.shift(level as u8 - 1),
                };
                u64::wrapping_add_signed(landmark, offset * granule as i64)
            }
            Place::InLeaf(number, offset) if !self.model.leaves.is_empty() => {
                let (&first, leaf) = self.model.leaves.iter().nth(number % self.model.leaves.len()).unwrap();
                first + offset % (leaf.last - first + 1)
            }
            Place::InLeaf(..) => 0,
        };
        address & self.limit & !(granule - 1)
    }

    fn range(&self, place: Place, extent: Extent) -> IovaRange {
        let granule = self.model.granule();
        let first = self.address(place);
        let size = |level: u8| 1u64 << self.radix.format().shift(level);
        let (first, length) = match extent {
            Extent::Granules(count) => (first, count * granule),
            Extent::Aligned(level, count) => (first & !(size(level) - 1), count * size(level)),
            Extent::Mixed(level, count, granules) => (first, count * size(level) + granules * granule),
            Extent::To(other) => {
                let other = self.address(other);
                return IovaRange::new(first.min(other), first.max(other) + (granule - 1)).unwrap();
            }
        };
        IovaRange::new(first, first.saturating_add(length - 1).min(self.limit)).unwrap()
    }

    fn output(&self, output: Output, iova: u64) -> u64 {
        let low = iova & ((1 << 41) - 1);
        match output {
            Output::Congruent(window) => low + (u64::from(window) << 42),
            Output::Beside(granules) => low + granules * self.model.granule(),
        }
    }

    fn map(&mut self, range: IovaRange, oa: u64, attributes: Attributes, fill: bool) {
        let last_output = oa.checked_add(range.last() - range.first());
        if last_output.is_none_or(|last| last >> self.radix.format().output_bits() != 0) {
            let mut gather = Gather::new();
            let result = self.radix.map(range, Oa::new(oa), attributes, &mut gather);
            assert_eq!(result, Err(MapError::OutputOutOfRange { oa: Oa::new(oa) }));
            return;
        }
        self.grow(range);
        let plan =
            if fill { self.plan_fill(range, oa, attributes) } else { self.model.plan(range, oa, false) };
        let Some(plan) = plan else { return };
        let mut gather = Gather::new();
        let result = if fill {
            self.radix.fill(range, Oa::new(oa), attributes, &mut gather)
        } else {
            self.radix.map(range, Oa::new(oa), attributes, &mut gather)
        };
        self.settle(&mut gather);
        match plan {
            Ok(plan) => {
                assert_eq!(result, Ok(()));
                assert!(gather.runs.is_empty());
                self.model.insert(plan, attributes, true, false);
            }
            Err(at) => {
                assert_eq!(result, Err(MapError::Occupied { at }));
                for run in gather.runs.iter() {
                    assert!(range.covers(&run) && run.first() < at, "{run} was taken back");
                }
            }
        }
    }

    /// A plan in which leaves with other attributes are in the way as well.
    fn plan_fill(&self, range: IovaRange, oa: u64, attributes: Attributes) -> Option<Result<Plan, u64>> {
        let other = self.model.firsts(range).into_iter();
        let other = other.filter(|first| self.model.leaves[first].attributes != attributes);
        let other = other.map(|first| first.max(range.first())).next();
        let plan = self.model.plan(range, oa, true)?;
        Some(match (plan, other) {
            (Ok(_), Some(at)) => Err(at),
            (Err(at), Some(other)) => Err(at.min(other)),
            (plan, None) => plan,
        })
    }

    fn unmap(&mut self, range: IovaRange) {
        let mut model = self.model.clone();
        model.cut_ends(range).unwrap();
        let mut expected = Report::default();
        for first in model.firsts(range) {
            expected.removed(first, model.leaves.remove(&first).unwrap().last);
        }
        let mut gather = Gather::new();
        self.radix.unmap(range, &mut gather).unwrap();
        assert_eq!(Report::of(&gather), expected, "unmapping {range}");
        let bytes = expected.runs.iter().fold(0u64, |sum, run| sum.saturating_add(run.1 - run.0 + 1));
        assert_eq!(gather.runs.bytes(), bytes);
        self.settle(&mut gather);
        self.model = model;
    }

    /// Runs an operation on both; the range it was about.
    fn run(&mut self, operation: &Operation) -> IovaRange {
        match *operation {
            Operation::Map(place, extent, output, attributes) => {
                let range = self.range(place, extent);
                self.map(range, self.output(output, range.first()), attributes, false);
                range
            }
            Operation::Fill(place, extent, output, attributes) => {
                let range = self.range(place, extent);
                self.map(range, self.output(output, range.first()), attributes, true);
                range
            }
            Operation::Unmap(place, extent) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    self.unmap(range);
                }
                range
            }
            Operation::UnmapLeaf(number) => {
                let number = number.checked_rem(self.model.leaves.len());
                let Some((&first, leaf)) = number.and_then(|number| self.model.leaves.iter().nth(number))
                else {
                    return IovaRange::ALL;
                };
                let range = IovaRange::new(first, leaf.last).unwrap();
                self.unmap(range);
                range
            }
            Operation::Cut(place) => {
                let at = self.address(place);
                if self.model.may_cut() {
                    self.radix.cut(at, &mut Gather::new()).unwrap();
                    self.model.cut(at).unwrap();
                }
                IovaRange::new(at, at).unwrap()
            }
        }
    }
}

// ----------------------------------------------------------------------------------------- claiming mode

#[derive(Clone, Debug)]
enum ClaimOperation {
    Claim(Place, Extent, Output, Attributes),
    Publish(usize),
    Release(usize),
    Retract(Place, Extent),
    CutClaimed(Place, Extent),
    Hold(Place, Extent),
    LetGo(usize),
}

fn claim_operation() -> impl Strategy<Value = ClaimOperation> {
    prop_oneof![
        6 => (place(), extent(), output(), attributes()).prop_map(|(place, extent, output, attributes)| {
            ClaimOperation::Claim(place, extent, output, attributes)
        }),
        4 => any::<usize>().prop_map(ClaimOperation::Publish),
        2 => any::<usize>().prop_map(ClaimOperation::Release),
        4 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::Retract(place, extent)),
        1 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::CutClaimed(place, extent)),
        2 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::Hold(place, extent)),
        2 => any::<usize>().prop_map(ClaimOperation::LetGo),
    ]
}

/// What operations own: ranges to be published or released, and leaves that are held.
#[derive(Default)]
struct Owned {
    ranges: Vec<IovaRange>,
    held: Vec<Leaf>,
}

fn take<T>(from: &mut Vec<T>, number: usize) -> Option<T> {
    let number = number.checked_rem(from.len())?;
    Some(from.swap_remove(number))
}

impl Pair<Native> {
    fn claim(&mut self, range: IovaRange, oa: u64, attributes: Attributes, owned: &mut Owned) {
        if (range.last() - range.first()).checked_add(oa).is_none_or(|last| last >> 56 != 0) {
            return;
        }
        self.grow(range);
        let Some(plan) = self.model.plan(range, oa, false) else { return };
        let mut gather = Gather::new();
        let result = self.radix.claim(range, Oa::new(oa), attributes, &mut gather);
        assert!(gather.runs.is_empty(), "what was never present is not reported");
        self.settle(&mut gather);
        match plan {
            Ok(plan) => {
                assert_eq!(result, Ok(()));
                self.model.insert(plan, attributes, false, true);
                owned.ranges.push(range);
            }
            Err(at) => {
                let present = self.model.at(at).unwrap().1.present;
                let expected =
                    if present { MapError::Occupied { at }.into() } else { ClaimError::Contended { at } };
                assert_eq!(result, Err(expected));
            }
        }
    }

    /// Ends what an operation owned.
    fn end(&mut self, range: IovaRange, publish: bool) {
        let mut gather = Gather::new();
        if publish {
            self.radix.publish(range);
        } else {
            self.radix.release(range, &mut gather);
        }
        assert!(gather.runs.is_empty(), "what is released was reported before or never present");
        self.settle(&mut gather);
        for first in self.model.firsts(range) {
            let leaf = self.model.leaves.get_mut(&first).unwrap();
            if leaf.present {
                continue;
            }
            assert!(leaf.busy);
            if publish {
                (leaf.present, leaf.busy) = (true, false);
            } else {
                self.model.leaves.remove(&first);
            }
        }
    }

    fn retract(&mut self, range: IovaRange, owned: &mut Owned) {
        let mut expected = Report::default();
        let mut contended = None;
        let mut at = range.first();
        while let Some(first) =
            self.model.firsts(range).into_iter().find(|&first| first.max(range.first()) >= at)
        {
            let leaf = self.model.leaves[&first];
            if leaf.busy {
                contended = Some(first.max(range.first()));
                break;
            }
            if first < range.first() {
                self.model.cut(range.first()).unwrap();
                continue;
            }
            if leaf.last > range.last() {
                self.model.cut(range.last() + 1).unwrap();
                continue;
            }
            let leaf = self.model.leaves.get_mut(&first).unwrap();
            (leaf.present, leaf.busy) = (false, true);
            expected.removed(first, leaf.last);
            match leaf.last.checked_add(1) {
                Some(next) => at = next,
                None => break,
            }
        }
        let mut gather = Gather::new();
        let result = self.radix.retract(range, &mut gather);
        assert_eq!(result, contended.map_or(Ok(()), |at| Err(RetractError::Contended { at })));
        assert_eq!(Report::of(&gather), expected, "retracting {range}");
        assert!(gather.retired.is_empty());
        owned.ranges.extend(gather.runs.iter());
    }

    fn hold(&mut self, range: IovaRange, owned: &mut Owned) {
        let firsts = self.model.firsts(range).into_iter();
        let found = firsts.map(|first| (first, self.model.leaves[&first])).find(|(_, leaf)| leaf.present);
        let result = self.radix.hold(range);
        match found {
            None => assert_eq!(result, Ok(None)),
            Some((first, leaf)) if leaf.busy => {
                assert_eq!(result, Err(RetractError::Contended { at: first.max(range.first()) }));
            }
            Some((first, leaf)) => {
                let held = result.unwrap().unwrap();
                let expected = (first, leaf.last, Oa::new(leaf.oa), leaf.attributes);
                assert_eq!((held.iova, held.range().last(), held.oa, held.attributes), expected);
                self.model.leaves.get_mut(&first).unwrap().busy = true;
                owned.held.push(held);
            }
        }
    }

    fn run_claiming(&mut self, operation: &ClaimOperation, owned: &mut Owned) -> IovaRange {
        match *operation {
            ClaimOperation::Claim(place, extent, output, attributes) => {
                let range = self.range(place, extent);
                self.claim(range, self.output(output, range.first()), attributes, owned);
                range
            }
            ClaimOperation::Publish(number) | ClaimOperation::Release(number) => {
                let Some(range) = take(&mut owned.ranges, number) else { return IovaRange::ALL };
                self.end(range, matches!(operation, ClaimOperation::Publish(_)));
                range
            }
            ClaimOperation::Retract(place, extent) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    self.retract(range, owned);
                }
                range
            }
            ClaimOperation::CutClaimed(place, extent) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    let expected = self.model.cut_ends(range).map_err(|at| CutError::Contended { at });
                    assert_eq!(self.radix.cut_claimed(range), expected);
                }
                range
            }
            ClaimOperation::Hold(place, extent) => {
                let range = self.range(place, extent);
                self.hold(range, owned);
                range
            }
            ClaimOperation::LetGo(number) => {
                let Some(held) = take(&mut owned.held, number) else { return IovaRange::ALL };
                self.radix.let_go(&held);
                self.model.leaves.get_mut(&held.iova).unwrap().busy = false;
                held.range()
            }
        }
    }

    /// The three bits of the claiming protocol, in every entry of the table.
    fn check_claims(&self) {
        for entry in inspect(&self.radix).entries {
            let leaf = self.model.leaves[&entry.first];
            let bits = [Native::PRESENT, Native::BUSY, Native::FIRST].map(|bit| entry.value & bit != 0);
            assert_eq!(bits, [leaf.present, leaf.busy, leaf.first], "{entry:x?}");
        }
    }
}

fn agree_claiming(format: Native, operations: &[ClaimOperation]) {
    let mut pair = Pair::new(format, walk_native_bits);
    let mut owned = Owned::default();
    for operation in operations {
        let range = pair.run_claiming(operation, &mut owned);
        pair.check_ends(range);
        pair.check();
        pair.check_claims();
    }
    for held in owned.held {
        pair.radix.let_go(&held);
        pair.model.leaves.get_mut(&held.iova).unwrap().busy = false;
    }
    for range in owned.ranges {
        pair.end(range, true);
    }
    pair.check();
    let mut all = Owned::default();
    pair.retract(IovaRange::ALL, &mut all);
    pair.check();
    for range in all.ranges {
        pair.end(range, false);
    }
    pair.finish();
}

// -------------------------------------------------------------------------------------------------- tests

fn agree<F: Format>(format: F, specification: SpecificationWalk, operations: &[Operation]) {
    let mut pair = Pair::new(format, specification);
    for operation in operations {
        let range = pair.run(operation);
        pair.check_ends(range);
        pair.check();
    }
    let edges: Vec<_> = pair.model.leaves.iter().map(|(&first, leaf)| (first, leaf.last)).collect();
    for (first, last) in edges.into_iter().step_by(7) {
        pair.check_ends(IovaRange::new(first, last).unwrap());
    }
    pair.finish();
}

/// Lets every operation fail at each of its allocations in turn before it succeeds.
fn survive_failures<F: Format>(format: F, specification: SpecificationWalk, operations: &[Operation]) {
    let mut pair = Pair::new(format, specification);
    for operation in operations {
        let (place, extent) = match *operation {
            Operation::Map(place, extent, ..) | Operation::Fill(place, extent, ..) => (place, extent),
            Operation::Unmap(place, extent) if pair.model.may_cut() => (place, extent),
            _ => continue,
        };
        let range = pair.range(place, extent);
        pair.grow(range);
        for allocations in 0.. {
            let mut gather = Gather::new();
            pair.memory.fail_after(Some(allocations));
            let result = match *operation {
                Operation::Map(.., output, attributes) => {
                    let oa = pair.output(output, range.first());
                    if pair.model.plan(range, oa, false).is_none() {
                        break;
                    }
                    pair.radix.map(range, Oa::new(oa), attributes, &mut gather)
                }
                Operation::Fill(.., output, attributes) => {
                    let oa = pair.output(output, range.first());
                    if pair.model.plan(range, oa, true).is_none() {
                        break;
                    }
                    pair.radix.fill(range, Oa::new(oa), attributes, &mut gather)
                }
                _ => pair.radix.unmap(range, &mut gather).map_err(|error| match error {
                    CutError::OutOfTables(error) => MapError::OutOfTables(error),
                    error => panic!("unmapping {range}: {error}"),
                }),
            };
            pair.memory.fail_after(None);
            pair.settle(&mut gather);
            let failed = result == Err(MapError::OutOfTables(OutOfTables));
            if failed && matches!(operation, Operation::Unmap(..)) {
                // One of the ends may be cut, which changes no translation.
                assert!(gather.runs.is_empty(), "a failed unmap reports {:?}", gather.runs);
                let mut first_cut = pair.model.clone();
                first_cut.cut(range.first()).unwrap();
                if pair.radix.walk(range.first()).map(|leaf| leaf.iova) == Ok(range.first()) {
                    pair.model = first_cut;
                }
                adopt_cuts(&mut pair);
            }
            if !failed {
                // It has succeeded by now, or there never was a chance. The model catches up.
                if result.is_ok() {
                    let oa = |output| pair.output(output, range.first());
                    match *operation {
                        Operation::Map(.., output, attributes) => {
                            let plan = pair.model.plan(range, oa(output), false).unwrap().unwrap();
                            pair.model.insert(plan, attributes, true, false);
                        }
                        Operation::Fill(.., output, attributes) => {
                            let plan = pair.model.plan(range, oa(output), true).unwrap().unwrap();
                            pair.model.insert(plan, attributes, true, false);
                        }
                        _ => {
                            pair.model.cut_ends(range).unwrap();
                            for first in pair.model.firsts(range) {
                                pair.model.leaves.remove(&first);
                            }
                        }
                    }
                }
                pair.check();
                break;
            }
            pair.check();
        }
    }
    pair.finish();
}

/// Cuts the model's leaves as the table's are cut: after a failure some are, and all translate as before.
fn adopt_cuts<F: Format>(pair: &mut Pair<F>) {
    let mut begins = Vec::new();
    pair.radix.leaves(IovaRange::ALL, |leaf| {
        begins.push(leaf.iova);
        ControlFlow::Continue(())
    });
    for at in begins {
        // Only ever makes the model finer at a place where the table is finer already; `check` sees the rest.
        pair.model.cut(at).unwrap();
    }
}

fn native(granule: u32, largest: Option<u32>) -> Native {
    let format = Native::new().with_granule(PageSize::from_log2(granule).unwrap()).unwrap();
    match largest {
        Some(largest) => format.with_largest_leaf(PageSize::from_log2(largest).unwrap()),
        None => format,
    }
}

fn vtd(levels: u8) -> VtdSecondStage {
    VtdSecondStage::new(levels).unwrap()
}

fn operations(count: usize) -> impl Strategy<Value = Vec<Operation>> {
    prop::collection::vec(operation(), 1..count)
}

/// Few by default, so that the test stays short in a debug build; `PROPTEST_CASES` says otherwise.
fn cases(default: u32) -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = default;
    }
    config
}

proptest! {
    #![proptest_config(cases(20))]

    #[test]
    fn native_4k(operations in operations(24)) {
        agree(native(12, None), walk_native_bits, &operations);
    }

    #[test]
    fn native_4k_up_to_2m(operations in operations(24)) {
        agree(native(12, Some(21)), walk_native_bits, &operations);
    }

    #[test]
    fn native_2k(operations in operations(24)) {
        agree(native(11, None), walk_native_bits, &operations);
    }

    #[test]
    fn native_2k_only_smallest_leaves(operations in operations(24)) {
        agree(native(11, Some(11)), walk_native_bits, &operations);
    }

    #[test]
    fn vtd_3_levels(operations in operations(24)) {
        agree(vtd(3), walk_vtd_bits, &operations);
    }

    #[test]
    fn vtd_4_levels(operations in operations(24)) {
        agree(vtd(4), walk_vtd_bits, &operations);
    }

    #[test]
    fn vtd_5_levels(operations in operations(24)) {
        agree(vtd(5), walk_vtd_bits, &operations);
    }

    #[test]
    fn vtd_without_gigabyte_pages(operations in operations(24)) {
        agree(vtd(4).with_large_pages(1 << 21), walk_vtd_bits, &operations);
    }

    #[test]
    fn native_4k_claiming(operations in prop::collection::vec(claim_operation(), 1..30)) {
        agree_claiming(native(12, None), &operations);
    }

    #[test]
    fn native_2k_claiming(operations in prop::collection::vec(claim_operation(), 1..30)) {
        agree_claiming(native(11, None), &operations);
    }

    #[test]
    fn native_without_memory(operations in operations(16)) {
        survive_failures(native(12, None), walk_native_bits, &operations);
    }

    #[test]
    fn vtd_without_memory(operations in operations(16)) {
        survive_failures(vtd(5), walk_vtd_bits, &operations);
    }
}

fn with_length(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);

#[test]
fn what_no_leaf_can_hold_is_refused() {
    let mut gather = Gather::new();
    let page = with_length(0x1000, 0x1000);
    let radix = Radix::new(vtd(3), Accounting::default());
    let map =
        |range, oa, attributes, gather: &mut Gathered| radix.map(range, Oa::new(oa), attributes, gather);
    let beyond = with_length((1 << 39) - 0x1000, 0x2000);
    assert_eq!(map(beyond, 0, READ_WRITE, &mut gather), Err(MapError::OutOfRange { range: beyond }));
    let no_access = Err(MapError::NoAccess { range: page });
    assert_eq!(map(page, 0x5000, Attributes::FORCE_SNOOP, &mut gather), no_access);
    for (first, length, oa) in [(0x800, 0x1000, 0), (0x1000, 0x800, 0), (0x1000, 0x1000, 0x800)] {
        let (range, oa) = (with_length(first, length), Oa::new(oa));
        let granule = PageSize::SIZE_4K;
        let misaligned = Err(MapError::Misaligned { range, oa, granule });
        assert_eq!(map(range, oa.get(), READ_WRITE, &mut gather), misaligned);
        assert_eq!(radix.walk(first), Err(WalkFault::NotMapped(first)));
    }
    for oa in [u64::MAX - 0xfff, 1 << 52, (1 << 52) - 0x1000] {
        let range = with_length(0x1000, 0x2000);
        let oa = Oa::new(oa);
        assert_eq!(
            map(range, oa.get(), READ_WRITE, &mut gather),
            Err(MapError::OutputOutOfRange { oa }),
            "two pages do not fit from {oa} on"
        );
    }
    assert_eq!(radix.walk(1 << 39), Err(WalkFault::OutOfRange(1 << 39)));
    assert_eq!(radix.unmap(with_length(0x800, 0x800), &mut gather), Err(CutError::Misaligned { at: 0x800 }));
    assert_eq!(radix.cut(0x801, &mut Gather::new()), Err(CutError::Misaligned { at: 0x801 }));
    radix.unmap(IovaRange::ALL, &mut gather).unwrap();
    assert_eq!((radix.top(), radix.table_count(), gather.leaves), (None, 0, 0));
    map(page, (1 << 52) - 0x1000, READ_WRITE, &mut gather).unwrap();
    assert_eq!(radix.walk(0x1fff).unwrap().output(0x1fff), Oa::new((1 << 52) - 1));
}

/// A unit whose host addresses are narrower than the addresses of our tables cannot be given one.
#[test]
fn a_table_that_no_entry_can_name_is_no_table() {
    let memory = Accounting::far_away();
    let radix = Radix::new(vtd(4).with_host_address_width(50).unwrap(), memory.clone());
    let mut gather = Gather::new();
    let result = radix.map(with_length(0, 0x1000), Oa::new(0), READ_WRITE, &mut gather);
    assert_eq!(result, Err(MapError::OutOfTables(OutOfTables)));
    assert_eq!((radix.table_count(), memory.tables()), (0, 0));
}

/// A format that lacks an attribute must still know its own leaves again.
#[test]
fn filling_twice_is_filling_once() {
    let radix = Radix::new(vtd(4).with_snoop_control(false), Accounting::default());
    let mut gather = Gather::new();
    let range = with_length(0x20_0000, 0x40_3000);
    for _ in 0..2 {
        radix.fill(range, Oa::new(0), READ_WRITE | Attributes::FORCE_SNOOP, &mut gather).unwrap();
    }
    assert!(gather.runs.is_empty());
}

/// What a fill finds in place belongs to somebody else, and stays when the fill fails further on.
#[test]
fn a_failed_fill_takes_back_only_its_own_leaves() {
    let radix = Radix::new(vtd(4), Accounting::default());
    let mut gather = Gather::new();
    radix.map(with_length(0x1000, 0x1000), Oa::new(0x1000), READ_WRITE, &mut gather).unwrap();
    radix.map(with_length(0x3000, 0x1000), Oa::new(0x9000), READ_WRITE, &mut gather).unwrap();
    let result = radix.fill(with_length(0, 0x8000), Oa::new(0), READ_WRITE, &mut gather);
    assert_eq!(result, Err(MapError::Occupied { at: 0x3000 }));
    assert_eq!(gather.runs.iter().collect::<Vec<_>>(), [with_length(0, 0x1000), with_length(0x2000, 0x1000)]);
    let mapped: Vec<_> = (0..8).map(|page| radix.walk(page << 12).is_ok()).collect();
    assert_eq!(mapped, [false, true, false, true, false, false, false, false]);
}

/// Small pages come and go; afterwards the largest leaf fits again, over several levels of kept empty tables.
#[test]
fn large_leaves_return_after_small_ones() {
    let memory = Accounting::default();
    let radix = Radix::new(native(12, None), memory.clone());
    let mut gather = Gather::new();
    for page in [0x1000, 0x4000_1000, 0x40_4000_1000] {
        let range = with_length(page, 0x1000);
        radix.map(range, Oa::new(page), READ_WRITE, &mut gather).unwrap();
        radix.unmap(range, &mut gather).unwrap();
    }
    let size = 1 << 39;
    let mut cache = CachedWalk::new();
    radix.map(with_length(0, size), Oa::new(0), READ_WRITE, &mut gather).unwrap();
    assert_eq!(radix.walk_cached(0x1000, &mut cache).unwrap().size.bytes(), size);
    assert_eq!(inspect(&radix).tables, radix.table_count());
    assert_eq!(memory.tables(), radix.table_count() + gather.retired.len() as u64);
    memory.free_retired(&mut gather);
}

/// One page mapped and unmapped over and over must not cost a table each time.
#[test]
fn an_empty_table_is_kept_for_the_next_page() {
    let memory = Accounting::default();
    let radix = Radix::new(native(12, None), memory.clone());
    let mut gather = Gather::new();
    let page = with_length(0xffff_ffff_ffff_f000, 0x1000);
    radix.map(page, Oa::new(0), READ_WRITE, &mut gather).unwrap();
    memory.fail_after(Some(0));
    for _ in 0..100 {
        radix.unmap(page, &mut gather).unwrap();
        radix.map(page, Oa::new(0), READ_WRITE, &mut gather).unwrap();
        radix.unmap(page, &mut gather).unwrap();
        radix.claim(page, Oa::new(0), READ_WRITE, &mut gather).unwrap();
        radix.publish(page);
        radix.retract(page, &mut gather).unwrap();
        radix.publish(page);
    }
    assert!(gather.retired.is_empty());
}

/// Many tables that each lost their last page: all but an allowance go, without a removal of their whole span.
#[test]
fn empty_tables_are_kept_within_an_allowance() {
    let memory = Accounting::default();
    let radix = Radix::new(vtd(4), memory.clone());
    let mut gather = Gather::new();
    let page = |number: u64| with_length((number << 21) + 0x5000, 0x1000);
    for number in 0..1000 {
        radix.map(page(number), Oa::new(0), READ_WRITE, &mut gather).unwrap();
    }
    let all = radix.table_count();
    for number in 0..1000 {
        radix.unmap(page(number), &mut gather).unwrap();
    }
    let inspection = inspect(&radix);
    assert!(inspection.entries.is_empty());
    assert_eq!(inspection.empty, KEPT_LIMIT);
    assert_eq!(gather.retired.len() as u64, all - radix.table_count());
    memory.free_retired(&mut gather);
    assert_eq!(memory.tables(), radix.table_count());
    radix.unmap(with_length(0, 1 << 48), &mut gather).unwrap();
    memory.free_retired(&mut gather);
    assert_eq!(memory.tables(), 1);
}

/// Requests that fail for want of memory leave no more empty tables behind than requests that succeed.
#[test]
fn failing_again_and_again_leaves_nothing() {
    let memory = Accounting::default();
    let radix = Radix::new(vtd(5), memory.clone());
    let mut gather = Gather::new();
    for number in 0..300 {
        memory.fail_after(Some(3));
        let range = with_length(number << 48, 0x1000);
        let result = radix.map(range, Oa::new(0), READ_WRITE, &mut gather);
        assert_eq!(result, Err(MapError::OutOfTables(OutOfTables)));
        memory.free_retired(&mut gather);
    }
    assert!(inspect(&radix).empty <= KEPT_LIMIT);
    assert!(memory.tables() <= 1 + 4 * KEPT_LIMIT, "{} tables", memory.tables());
}
