//! A table beside its model, and everything that can be compared between them.

use crate::accounting::{Accounting, inspect_by};
use crate::plain::{Model, Report, log2, page_size};
use crate::specification::{Reading, Specification};
use ioasid_pagetable::{Attributes, CachedWalk, Format, Gather, IovaRange, Leaf, Oa, Radix, WalkFault};
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

    fn check_address(&mut self, iova: u64) {
        let specification = &self.model.specification;
        let expected = match self.model.at(iova) {
            Some((first, leaf)) if leaf.present => Ok(Leaf {
                iova: first,
                oa: Oa::new(leaf.oa),
                size: page_size(first, leaf.last),
                attributes: leaf.attributes,
            }),
            _ if specification.canonical(iova) != iova => Err(WalkFault::OutOfRange(iova)),
            _ => Err(WalkFault::NotMapped(iova)),
        };
        assert_eq!(self.radix.walk(iova), expected);
        assert_eq!(self.radix.walk_cached(iova, &mut self.cache), expected, "cached");
        if let Some(top) = self.radix.top() {
            let found = specification.walk(top, iova);
            let expected = expected.ok().map(|leaf| (leaf.output(iova).get(), leaf.attributes));
            assert_eq!(found, expected, "by the specification, at {iova:#x}");
        }
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
            let expected = (first, leaf.last, Oa::new(leaf.oa), leaf.attributes);
            assert_eq!((found.iova, found.range().last(), found.oa, found.attributes), expected);
            ControlFlow::Continue(())
        });
        assert_eq!(leaves.next(), None, "fewer leaves than the model has");
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
        let mut entries = inspection.entries.iter();
        for (&first, leaf) in &self.model.leaves {
            let log2 = log2(first, leaf.last);
            let level = specification.level_of(log2);
            let size = 1 << specification.level(level).entry;
            for number in 0..self.model.entries_of(first, leaf.last) {
                let entry = entries.next().expect("more entries than the table has");
                assert_eq!((entry.first, entry.level), (first + number * size, level), "{entry:x?}");
                let expected = if leaf.present {
                    Reading::Leaf { oa: leaf.oa, log2, attributes: leaf.attributes }
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
        self.check();
        assert!(self.memory.tables() <= 1, "only the top table may stay after the whole was unmapped");
        let mut nothing = Gather::new();
        self.radix.unmap(IovaRange::ALL, &mut nothing).unwrap();
        assert_eq!(report_of(&nothing), Report::default());
        drop(self.radix);
        assert_eq!(self.memory.tables(), 0);
    }
}

/// What nobody has asked for is not there: the attributes that the tests map with.
pub(crate) const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
