//! A table beside its model, and everything that can be compared between them.

use crate::accounting::{Accounting, inspect_by};
use crate::plain::{Model, ModelLeaf, Report, log2, page_size};
use crate::specification::{Reading, Specification};
use ioasid_pagetable::{Attributes, CachedWalk, Format, Gather, IovaRange, Leaf, Oa, Radix, Span, WalkFault};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;

pub(crate) type Gathered = Gather<Accounting, AtomicU64>;

/// As many empty tables may stay linked, besides the tables above them.
pub(crate) const KEPT_LIMIT: u64 = 64;

/// A table, its model and its memory.
pub(crate) struct Pair<F: Format> {
    pub(crate) radix: Radix<F, Accounting>,
    pub(crate) memory: Accounting,
    pub(crate) model: Model,
    /// Serves through the whole test: retired tables are freed and used again under it.
    cache: CachedWalk<AtomicU64>,
}

pub(crate) fn report_of(gather: &Gathered) -> Report {
    let runs = gather.runs.iter().map(|run| (run.first(), run.last())).collect();
    Report { runs, leaves: gather.leaves, sizes: gather.leaf_sizes }
}

impl<F: Format> Pair<F> {
    pub(crate) fn new(format: F, specification: Specification) -> Pair<F> {
        let memory = Accounting::default();
        let radix = Radix::new(format, memory.clone());
        Pair { radix, memory, model: Model::new(specification), cache: CachedWalk::new() }
    }

    /// Nothing runs between two operations of a test, so the tables can go at once.
    pub(crate) fn settle(&mut self, gather: &mut Gathered) {
        assert!(gather.retired.is_empty() || gather.tables_changed, "tables went and nobody was told");
        self.memory.free_retired(gather);
    }

    /// The leaf that should be found at an address in it.
    ///
    /// Hardware may mark any one of a leaf's entries, and whoever looks at one of them need not see it, so of such marks
    /// those of `found` will do.
    pub(crate) fn expected(&self, first: u64, leaf: &ModelLeaf, found: Option<Attributes>) -> Leaf {
        let least = leaf.attributes;
        let most = self.model.all_attributes(first, leaf);
        let attributes = found.filter(|&found| most.contains(found) && found.contains(least)).unwrap_or(most);
        let size = page_size(first, leaf.last);
        Leaf { iova: first, oa: Oa::new(leaf.oa), size, attributes }
    }

    fn check_address(&mut self, iova: u64) {
        let walked = self.radix.walk(iova);
        let cached = self.radix.walk_cached(iova, &mut self.cache);
        let specification = &self.model.specification;
        let by_specification = self.radix.top().and_then(|top| specification.walk(top, iova));
        if let Some((first, leaf)) = self.model.at(iova).filter(|(_, leaf)| leaf.present) {
            for found in [walked, cached] {
                let attributes = found.ok().map(|leaf| leaf.attributes);
                assert_eq!(found, Ok(self.expected(first, &leaf, attributes)), "at {iova:#x}");
            }
            let expected = (leaf.oa + (iova - first), self.model.entry_attributes(iova, first, &leaf));
            assert_eq!(by_specification, Some(expected), "by the specification, at {iova:#x}");
            assert_eq!(walked.unwrap().output(iova), Oa::new(expected.0));
        } else {
            let reachable = specification.canonical(iova) == iova;
            let fault = if reachable { WalkFault::NotMapped(iova) } else { WalkFault::OutOfRange(iova) };
            assert_eq!((walked, cached), (Err(fault), Err(fault)));
            assert_eq!(by_specification, None, "by the specification, at {iova:#x}");
        }
    }

    /// Compares a cursor's spans with leaves and what is between them.
    fn check_cursor(&self, range: IovaRange) {
        let mut spans = self.radix.cursor(range);
        let mut at = Some(range.first());
        for first in self.model.firsts(range) {
            let leaf = self.model.leaves[&first];
            if !leaf.present {
                continue;
            }
            if let Some(hole) = at.filter(|&at| at < first) {
                let hole = IovaRange::new(hole, first - 1).unwrap();
                assert_eq!(spans.next(), Some(Span::Hole(hole)), "in {range}");
            }
            let found = spans.next();
            let attributes = match found {
                Some(Span::Leaf(leaf)) => Some(leaf.attributes),
                _ => None,
            };
            assert_eq!(found, Some(Span::Leaf(self.expected(first, &leaf, attributes))), "in {range}");
            at = leaf.last.checked_add(1);
        }
        if let Some(hole) = at.and_then(|at| IovaRange::new(at, range.last())) {
            assert_eq!(spans.next(), Some(Span::Hole(hole)), "at the end of {range}");
        }
        assert_eq!(spans.next(), None);
    }

    /// Compares everything that can be seen of the whole table.
    pub(crate) fn check(&mut self) {
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
            assert_eq!(found, self.expected(first, leaf, Some(found.attributes)));
            assert_eq!(found.range().last(), leaf.last);
            ControlFlow::Continue(())
        });
        assert_eq!(leaves.next(), None, "fewer leaves than the model has");
        self.check_cursor(IovaRange::ALL);
        assert_eq!(self.radix.top().map_or(0, |(_, level)| level), self.model.top, "the top table");
        self.check_memory();
    }

    /// Reads the tables' memory, entry by entry.
    fn check_memory(&self) {
        let specification = &self.model.specification;
        let inspection = inspect_by(&self.radix, |level, value| match specification.read(level, value) {
            Reading::Table(address) => Some(address),
            _ => None,
        });
        assert_eq!(inspection.tables, self.radix.table_count());
        assert_eq!(inspection.tables, self.memory.tables(), "tables that are neither linked nor freed");
        assert_eq!(inspection.bytes, self.radix.table_bytes());
        assert!(inspection.empty <= KEPT_LIMIT, "{} empty tables are linked", inspection.empty);
        assert_eq!(inspection.tables - inspection.idle, self.model.tables(), "tables that are in use");
        let mut entries = inspection
            .entries
            .iter()
            .filter(|entry| specification.read(entry.level, entry.value) != Reading::Absent);
        self.radix.raw_leaves(IovaRange::ALL, |level, first, value| {
            let entry = entries.next().expect("more raw leaves than the table has");
            assert_eq!((level, first, value), (entry.level, entry.first, entry.value));
            ControlFlow::Continue(())
        });
        assert_eq!(entries.next(), None, "fewer raw leaves than the table has");
        let mut entries = inspection.entries.iter();
        for (&first, leaf) in &self.model.leaves {
            let log2 = log2(first, leaf.last);
            let level = specification.level_of(log2);
            let size = 1 << specification.level(level).entry;
            for number in 0..self.model.entries_of(first, leaf.last) {
                let entry = entries.next().expect("more entries than the table has");
                assert_eq!((entry.first, entry.level), (first + number * size, level), "{entry:x?}");
                let expected = if leaf.present {
                    let attributes = self.model.entry_attributes(entry.first, first, leaf);
                    Reading::Leaf { oa: leaf.oa, log2, attributes }
                } else {
                    Reading::Absent
                };
                assert_eq!(specification.read(level, entry.value), expected, "{entry:x?}");
            }
        }
        assert_eq!(entries.next(), None, "fewer entries than the table has");
    }

    /// Compares translations around both ends of a range, and what lies in it.
    pub(crate) fn check_ends(&mut self, range: IovaRange) {
        for end in [range.first(), range.last()] {
            for iova in [end.wrapping_sub(1), end, end.wrapping_add(1)] {
                self.check_address(iova);
            }
            // What differs in the bits that no table is indexed by is something else.
            let width = self.model.specification.width(self.model.specification.highest());
            if width < 64 {
                let lowest = self.model.leaves.keys().next().copied().unwrap_or(0);
                for other in [end ^ 1 << width, end ^ 1 << 63, end & ((1 << width) - 1)] {
                    // A cached walk may remember the way to this.
                    self.check_address(lowest);
                    self.check_address(other);
                }
            }
        }
        let firsts = self.model.firsts(range);
        let mut found = Vec::new();
        self.radix.occupied(range, |span| {
            found.push(span.first());
            ControlFlow::Continue(())
        });
        assert_eq!(found, firsts, "occupied in {range}");
        let first_present = firsts.into_iter().find(|first| self.model.leaves[first].present);
        let mut found = None;
        self.radix.leaves(range, |leaf| {
            assert_eq!(found.replace(leaf.iova), None, "the callback had enough");
            ControlFlow::Break(())
        });
        assert_eq!(found, first_present, "the first leaf in {range}");
        self.check_cursor(range);
    }

    /// Takes everything away, and the table too: no page may stay behind.
    pub(crate) fn finish(mut self) {
        let mut gather = Gather::new();
        let mut expected = Report::default();
        for (&first, leaf) in &self.model.leaves {
            expected.leaf(first, leaf.last);
        }
        self.radix.unmap(IovaRange::ALL, &mut gather).unwrap();
        assert_eq!(report_of(&gather), expected);
        self.settle(&mut gather);
        self.model.leaves.clear();
        self.model.marks.clear();
        self.check();
        assert!(self.memory.tables() <= 1, "only the top table may stay after the whole was unmapped");
        let mut nothing = Gather::new();
        self.radix.unmap(IovaRange::ALL, &mut nothing).unwrap();
        assert_eq!(report_of(&nothing), Report::default());
        drop(self.radix);
        assert_eq!(self.memory.tables(), 0);
    }
}
