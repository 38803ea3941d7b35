//! What happens to a table: operations in no format's own terms, and each run on the table and on the model.

use crate::pair::{Pair, report_of};
use crate::plain::Report;
use crate::specification::READ_WRITE;
use ioasid_pagetable::{Attributes, Format, Gather, IovaRange, MapError, MemoryType, Oa};
use proptest::prelude::*;

/// Where something happens.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// This many granules from the n-th landmark of the format.
    Near(usize, i64),
    /// This far into the n-th leaf, modulo what there is.
    InLeaf(usize, u64),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Extent {
    Granules(u64),
    /// So many entries of this level, from a multiple of one on.
    Aligned(u8, u64),
    /// So many entries of this level and so many granules.
    Mixed(u8, u64, u64),
    /// Two to this power of granules, at a multiple of it.
    Power(u32),
    To(Place),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Output {
    /// Congruent to the address, so that large leaves fit; in one of two windows.
    Congruent(bool),
    /// The address itself, as far as the output goes.
    Same,
    /// So many granules beside a congruent one.
    Beside(u64),
}

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Map(Place, Extent, Output, Attributes),
    Fill(Place, Extent, Output, Attributes),
    Unmap(Place, Extent),
    /// From the n-th leaf on so many.
    UnmapLeaves(usize, usize),
    Cut(Place),
    /// To leaves of two to this power of granules.
    Split(Place, Extent, u32),
    Protect(Place, Extent, Attributes),
    Remap(Place, Extent, Output, Attributes),
    /// The n-th leaf and some behind it.
    RemapLeaves(usize, usize, Output, Attributes),
    Merge(Place, Extent),
    MergeAll,
    /// Cuts the n-th leaf at a place in it, does something to a part, and merges.
    Regroup(usize, u64, Tampering),
    /// Maps an entry of a level in two pieces that continue each other, and merges.
    Assemble(Place, u8, u64, Attributes),
    Mark(Place, Attributes),
    Dirty(Place, Extent),
    ReadAndClearDirty(Place, Extent),
}

/// What happens to one of the pieces that are to be merged.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tampering {
    Nothing,
    Mark(Attributes),
    Protect(Attributes),
    Unmap,
    Move,
    Clean,
}

fn in_leaf() -> impl Strategy<Value = Place> {
    (any::<usize>(), any::<u64>()).prop_map(|(leaf, offset)| Place::InLeaf(leaf, offset))
}

pub(crate) fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => (any::<usize>(), -1100..1100i64).prop_map(|(landmark, offset)| Place::Near(landmark, offset)),
        3 => (any::<usize>(), -2..3i64).prop_map(|(landmark, offset)| Place::Near(landmark, offset)),
        2 => in_leaf(),
    ]
}

pub(crate) fn extent() -> impl Strategy<Value = Extent> {
    prop_oneof![
        3 => (1..40u64).prop_map(Extent::Granules),
        1 => (1..1100u64).prop_map(Extent::Granules),
        4 => (2..5u8, 1..3u64).prop_map(|(level, count)| Extent::Aligned(level, count)),
        2 => (2..4u8, 1..3u64, 0..600u64)
            .prop_map(|(level, count, granules)| Extent::Mixed(level, count, granules)),
        3 => (0..41u32).prop_map(Extent::Power),
        2 => place().prop_map(Extent::To),
    ]
}

pub(crate) fn output() -> impl Strategy<Value = Output> {
    prop_oneof![
        6 => any::<bool>().prop_map(Output::Congruent),
        3 => Just(Output::Same),
        1 => (1..600u64).prop_map(Output::Beside),
    ]
}

pub(crate) fn attributes() -> impl Strategy<Value = Attributes> {
    prop_oneof![
        8 => Just(READ_WRITE),
        1 => Just(Attributes::READ),
        1 => Just(Attributes::WRITE),
        1 => Just(READ_WRITE | Attributes::FORCE_SNOOP),
        1 => Just(Attributes::READ | Attributes::EXECUTE),
        1 => Just(READ_WRITE.with_memory_type(MemoryType::Uncached)),
        1 => Just(Attributes::READ.with_memory_type(MemoryType::WriteCombining)),
        1 => Just(READ_WRITE.with_memory_type(MemoryType::WriteBack)),
    ]
}

fn permissions() -> impl Strategy<Value = Attributes> {
    prop_oneof![
        3 => Just(READ_WRITE),
        2 => Just(Attributes::READ),
        1 => Just(Attributes::WRITE),
        1 => Just(Attributes::READ | Attributes::EXECUTE),
        // What is no permission plays no part.
        1 => Just(READ_WRITE | Attributes::FORCE_SNOOP | Attributes::USED),
    ]
}

fn used() -> impl Strategy<Value = Attributes> {
    prop_oneof![
        3 => Just(Attributes::USED),
        1 => Just(Attributes::ACCESSED),
        1 => Just(Attributes::DIRTY),
        1 => Just(Attributes::DIRTY | Attributes::WRITE),
    ]
}

fn tampering() -> impl Strategy<Value = Tampering> {
    prop_oneof![
        2 => Just(Tampering::Nothing),
        2 => used().prop_map(Tampering::Mark),
        2 => permissions().prop_map(Tampering::Protect),
        1 => Just(Tampering::Unmap),
        1 => Just(Tampering::Move),
        1 => Just(Tampering::Clean),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let mapping = || (place(), extent(), output(), attributes());
    prop_oneof![
        6 => mapping().prop_map(|(place, extent, output, attributes)| {
            Operation::Map(place, extent, output, attributes)
        }),
        2 => mapping().prop_map(|(place, extent, output, attributes)| {
            Operation::Fill(place, extent, output, attributes)
        }),
        3 => (place(), extent()).prop_map(|(place, extent)| Operation::Unmap(place, extent)),
        2 => (any::<usize>(), 1..4usize).prop_map(|(leaf, count)| Operation::UnmapLeaves(leaf, count)),
        2 => place().prop_map(Operation::Cut),
        3 => (place(), extent(), 0..20u32)
            .prop_map(|(place, extent, power)| Operation::Split(place, extent, power)),
        3 => (place(), extent(), permissions())
            .prop_map(|(place, extent, permissions)| Operation::Protect(place, extent, permissions)),
        3 => mapping().prop_map(|(place, extent, output, attributes)| {
            Operation::Remap(place, extent, output, attributes)
        }),
        3 => (any::<usize>(), 1..4usize, output(), attributes()).prop_map(|(leaf, count, output, attributes)| {
            Operation::RemapLeaves(leaf, count, output, attributes)
        }),
        3 => (place(), extent()).prop_map(|(place, extent)| Operation::Merge(place, extent)),
        1 => Just(Operation::MergeAll),
        4 => (any::<usize>(), any::<u64>(), tampering())
            .prop_map(|(leaf, offset, tampering)| Operation::Regroup(leaf, offset, tampering)),
        2 => (place(), 2..5u8, any::<u64>(), attributes())
            .prop_map(|(place, level, offset, attributes)| Operation::Assemble(place, level, offset, attributes)),
        3 => (in_leaf(), used()).prop_map(|(place, used)| Operation::Mark(place, used)),
        1 => (place(), used()).prop_map(|(place, used)| Operation::Mark(place, used)),
        1 => (place(), extent()).prop_map(|(place, extent)| Operation::Dirty(place, extent)),
        2 => (place(), extent()).prop_map(|(place, extent)| Operation::ReadAndClearDirty(place, extent)),
    ]
}

pub(crate) fn operations(count: usize) -> impl Strategy<Value = Vec<Operation>> {
    prop::collection::vec(operation(), 1..count)
}

impl<F: Format> Pair<F> {
    /// Logarithm of an entry's bytes, also of levels that the format lacks.
    fn entry(&self, level: u8) -> u32 {
        self.model.specification.levels[0].entry + 9 * (u32::from(level) - 1)
    }

    pub(crate) fn address(&self, place: Place) -> u64 {
        let specification = &self.model.specification;
        let granule = self.model.granule();
        let address = match place {
            Place::Near(landmark, offset) => {
                let top = specification.highest();
                // Around 0 lies the end of the address space too, and around the highest bit the gap.
                let landmark = match landmark % (usize::from(top) + 4) {
                    0 | 1 => 0,
                    2 => 3 << self.entry(3),
                    3 => 1 << (specification.width(top) - 1),
                    4 => 5 << self.entry(2),
                    level => 1 << self.entry(level as u8 - 3),
                };
                u64::wrapping_add_signed(landmark, offset * granule as i64)
            }
            Place::InLeaf(number, offset) if !self.model.leaves.is_empty() => {
                let (&first, leaf) = self.model.leaves.iter().nth(number % self.model.leaves.len()).unwrap();
                first + offset % (leaf.last - first + 1)
            }
            Place::InLeaf(..) => 0,
        };
        specification.canonical(address) & !(granule - 1)
    }

    pub(crate) fn range(&self, place: Place, extent: Extent) -> IovaRange {
        let granule = self.model.granule();
        let first = self.address(place);
        let (first, length) = match extent {
            Extent::Granules(count) => (first, count * granule),
            Extent::Aligned(level, count) => {
                (first >> self.entry(level) << self.entry(level), count << self.entry(level))
            }
            Extent::Mixed(level, count, granules) => {
                (first, (count << self.entry(level)) + granules * granule)
            }
            Extent::Power(power) => {
                let size = granule << power;
                (first & !(size - 1), size)
            }
            Extent::To(other) => {
                let other = self.address(other);
                return IovaRange::new(first.min(other), first.max(other) + (granule - 1)).unwrap();
            }
        };
        let last = first.saturating_add(length - 1);
        // Every other range that leaves the table's addresses stays as it is.
        let end = self.model.specification.end_of_piece(first);
        let clipped = if first & granule == 0 { last.min(end) } else { last };
        IovaRange::new(first, clipped.max(first + (granule - 1))).unwrap()
    }

    pub(crate) fn output(&self, output: Output, iova: u64) -> u64 {
        let low = iova & ((1 << 41) - 1);
        match output {
            Output::Congruent(window) => low + (u64::from(window) << 42),
            Output::Same => iova & ((1 << self.model.specification.output_bits) - 1),
            Output::Beside(granules) => low + granules * self.model.granule(),
        }
    }

    fn map(&mut self, range: IovaRange, oa: u64, attributes: Attributes, fill: bool) {
        let refused = self.model.refuses(range, oa, attributes);
        let plan = if let Some(error) = refused {
            Err(error)
        } else {
            self.model.grow(range);
            let plan = if fill {
                self.model.plan_fill(range, oa, attributes)
            } else {
                self.model.plan(range, oa, false)
            };
            let Some(plan) = plan else {
                self.forget_growth();
                return;
            };
            plan.map_err(|at| MapError::Occupied { at })
        };
        let mut gather = Gather::new();
        let result = if fill {
            self.radix.fill(range, Oa::new(oa), attributes, &mut gather)
        } else {
            self.radix.map(range, Oa::new(oa), attributes, &mut gather)
        };
        self.settle(&mut gather);
        match plan {
            Ok(plan) => {
                assert_eq!(result, Ok(()), "mapping {range} to {oa:#x}");
                assert!(gather.runs.is_empty());
                self.model.insert(plan, attributes, true, false);
            }
            Err(error) => {
                assert_eq!(result, Err(error), "mapping {range} to {oa:#x}");
                for run in gather.runs.iter() {
                    let before = matches!(error, MapError::Occupied { at } if run.last() < at);
                    assert!(range.covers(&run) && before, "{run} was taken back");
                }
            }
        }
    }

    /// What was not mapped after all has not made the table grow.
    pub(crate) fn forget_growth(&mut self) {
        self.model.top = self.radix.top().map_or(0, |(_, level)| level);
    }

    fn unmap(&mut self, range: IovaRange) {
        let before = self.model.leaves.len();
        let result = self.model.cut_ends_backwards(range);
        let cut = self.model.leaves.len() != before;
        let mut expected = Report::default();
        if result.is_ok() {
            for first in self.model.firsts(range) {
                expected.leaf(first, self.model.remove(first).last);
            }
        }
        let mut gather = Gather::new();
        assert_eq!(self.radix.unmap(range, &mut gather), result, "unmapping {range}");
        assert_eq!(report_of(&gather), expected, "unmapping {range}");
        assert!(gather.tables_changed || !cut, "a leaf became a table and nobody was told");
        let bytes = expected.runs.iter().fold(0u64, |sum, run| sum.saturating_add(run.1 - run.0 + 1));
        assert_eq!(gather.runs.bytes(), bytes);
        self.settle(&mut gather);
    }

    fn cut(&mut self, at: u64) {
        let mut expected = Report::default();
        let before = self.model.at(at).filter(|&(first, _)| first != at);
        let result = self.model.cut(at);
        if let (Some((first, leaf)), Ok(())) = (before, result) {
            expected.leaf(first, leaf.last);
        }
        let mut gather = Gather::new();
        assert_eq!(self.radix.cut(at, &mut gather), result, "cutting at {at:#x}");
        assert_eq!(report_of(&gather), expected, "cutting at {at:#x}");
        assert_eq!(gather.tables_changed, expected.leaves != 0);
        self.settle(&mut gather);
    }

    /// The boundary between pages that lies this far into a range, but not before its second page.
    pub(crate) fn boundary(&self, range: IovaRange, offset: u64) -> Option<u64> {
        let pages = (range.last() - range.first()) >> self.model.granule().trailing_zeros();
        Some(range.first() + (offset.checked_rem(pages)? + 1) * self.model.granule())
    }

    fn regroup(&mut self, range: IovaRange, offset: u64, tampering: Tampering) {
        let Some(at) = self.boundary(range, offset) else { return };
        self.cut(at);
        let (first, leaf) = self.model.at(at).unwrap();
        let piece = IovaRange::new(first, leaf.last).unwrap();
        match tampering {
            Tampering::Nothing => {}
            Tampering::Mark(used) => self.mark(at, used),
            Tampering::Protect(permissions) => self.protect(piece, permissions),
            Tampering::Unmap => self.unmap(piece),
            Tampering::Move => {
                self.unmap(piece);
                self.map(piece, leaf.oa ^ self.model.granule(), READ_WRITE, false);
            }
            Tampering::Clean => self.read_and_clear_dirty(piece),
        }
        // What has an end in the middle of a table leaves that table alone.
        if let Some(part) = IovaRange::new(at, range.last()) {
            self.merge(part);
        }
        self.merge(range);
    }

    fn assemble(&mut self, range: IovaRange, offset: u64, attributes: Attributes) {
        let Some(at) = self.boundary(range, offset) else { return };
        let parts = [IovaRange::new(range.first(), at - 1), IovaRange::new(at, range.last())];
        for part in parts.into_iter().flatten() {
            self.map(part, self.output(Output::Congruent(true), part.first()), attributes, false);
        }
        self.merge(range);
    }

    /// Runs an operation on both; the range it was about.
    pub(crate) fn run(&mut self, operation: &Operation) -> IovaRange {
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
            Operation::UnmapLeaves(number, count) => {
                let Some(number) = number.checked_rem(self.model.leaves.len()) else {
                    return IovaRange::ALL;
                };
                let mut leaves = self.model.leaves.iter().skip(number).take(count);
                let (&first, leaf) = leaves.next().unwrap();
                let last = leaves.next_back().map_or(leaf.last, |(_, leaf)| leaf.last);
                let range = IovaRange::new(first, last).unwrap();
                self.unmap(range);
                range
            }
            Operation::Cut(place) => {
                let at = self.address(place);
                if self.model.may_cut() {
                    self.cut(at);
                }
                IovaRange::new(at, at).unwrap()
            }
            Operation::Split(place, extent, power) => {
                let range = self.range(place, extent);
                self.split(range, power);
                range
            }
            Operation::Protect(place, extent, permissions) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    self.protect(range, permissions);
                }
                range
            }
            Operation::Remap(place, extent, output, attributes) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    self.remap(range, self.output(output, range.first()), attributes);
                }
                range
            }
            Operation::RemapLeaves(number, count, output, attributes) => {
                let Some(number) = number.checked_rem(self.model.leaves.len()) else {
                    return IovaRange::ALL;
                };
                let mut leaves = self.model.leaves.iter().skip(number).take(count);
                let (&first, leaf) = leaves.next().unwrap();
                let last = leaves.next_back().map_or(leaf.last, |(_, leaf)| leaf.last);
                // Not over the gap of a table that has one.
                let last = last.min(self.model.specification.end_of_piece(first));
                let range = IovaRange::new(first, last).unwrap();
                if self.model.may_cut() {
                    self.remap(range, self.output(output, range.first()), attributes);
                }
                range
            }
            Operation::Merge(place, extent) => {
                let range = self.range(place, extent);
                self.merge(range);
                range
            }
            Operation::MergeAll => {
                self.merge(IovaRange::ALL);
                IovaRange::ALL
            }
            Operation::Regroup(number, offset, tampering) => {
                let Some(number) = number.checked_rem(self.model.leaves.len()) else {
                    return IovaRange::ALL;
                };
                let (&first, leaf) = self.model.leaves.iter().nth(number).unwrap();
                let range = IovaRange::new(first, leaf.last).unwrap();
                if self.model.may_cut() {
                    self.regroup(range, offset, tampering);
                }
                range
            }
            Operation::Assemble(place, level, offset, attributes) => {
                let range = self.range(place, Extent::Aligned(level, 1));
                self.assemble(range, offset, attributes);
                range
            }
            Operation::Mark(place, used) => {
                let at = self.address(place);
                self.mark(at, used);
                IovaRange::new(at, at).unwrap()
            }
            Operation::Dirty(place, extent) => {
                let range = self.range(place, extent);
                self.check_dirty(range);
                range
            }
            Operation::ReadAndClearDirty(place, extent) => {
                let range = self.range(place, extent);
                self.read_and_clear_dirty(range);
                range
            }
        }
    }
}

/// Few by default, so that the tests stay short in a debug build; `PROPTEST_CASES` says otherwise.
pub(crate) fn cases(default: u32) -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = default;
    }
    config
}
