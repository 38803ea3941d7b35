//! Memory that runs out: every operation fails at each of its allocations in turn before it succeeds.

use crate::operations::Operation;
use crate::pair::{Pair, report_of};
use crate::plain::{Plan, Report};
use crate::specification::Specification;
use ioasid_pagetable::{
    Attributes, CutError, Format, Gather, IovaRange, MapError, Oa, OutOfTables, ProtectError, RemapError,
};
use std::ops::ControlFlow;

pub(crate) fn survive<F: Format>(format: F, specification: Specification, operations: &[Operation]) {
    let mut pair = Pair::new(format, specification);
    for operation in operations {
        match *operation {
            Operation::Map(place, extent, output, attributes) => {
                let range = pair.range(place, extent);
                let oa = pair.output(output, range.first());
                pair.map_at_last(range, oa, attributes, false);
            }
            Operation::Fill(place, extent, output, attributes) => {
                let range = pair.range(place, extent);
                let oa = pair.output(output, range.first());
                pair.map_at_last(range, oa, attributes, true);
            }
            Operation::Unmap(place, extent) if pair.model.may_cut() => {
                let range = pair.range(place, extent);
                pair.unmap_at_last(range);
            }
            Operation::Protect(place, extent, permissions) if pair.model.may_cut() => {
                let range = pair.range(place, extent);
                pair.protect_at_last(range, permissions);
            }
            Operation::Remap(place, extent, output, attributes) if pair.model.may_cut() => {
                let range = pair.range(place, extent);
                pair.remap_at_last(range, pair.output(output, range.first()), attributes);
            }
            Operation::Cut(place) if pair.model.may_cut() => {
                let at = pair.address(place);
                pair.cut_at_last(at);
            }
            // The others need no memory.
            Operation::Merge(..) | Operation::MergeAll | Operation::UnmapLeaves(..) | Operation::Mark(..) => {
                pair.memory.fail_after(Some(0));
                pair.run(operation);
                pair.memory.fail_after(None);
            }
            _ => {}
        }
    }
    pair.finish();
}

impl<F: Format> Pair<F> {
    /// What a mapping will consist of, if it is not in anybody's way and not too much.
    fn plan(&mut self, range: IovaRange, oa: u64, attributes: Attributes, fill: bool) -> Option<Plan> {
        if self.model.refuses(range, oa, attributes).is_some() {
            return None;
        }
        self.model.grow(range);
        let plan = if fill {
            self.model.plan_fill(range, oa, attributes)
        } else {
            self.model.plan(range, oa, false)
        };
        self.forget_growth();
        plan?.ok()
    }

    fn map_at_last(&mut self, range: IovaRange, oa: u64, attributes: Attributes, fill: bool) {
        let Some(plan) = self.plan(range, oa, attributes, fill) else { return };
        for allocations in 0.. {
            let mut gather = Gather::new();
            self.memory.fail_after(Some(allocations));
            let result = if fill {
                self.radix.fill(range, Oa::new(oa), attributes, &mut gather)
            } else {
                self.radix.map(range, Oa::new(oa), attributes, &mut gather)
            };
            self.memory.fail_after(None);
            self.settle(&mut gather);
            // The top table may have grown before memory ran out.
            self.forget_growth();
            if result == Ok(()) {
                self.model.insert(plan, attributes, true, false);
                return self.check();
            }
            assert_eq!(result, Err(MapError::OutOfTables(OutOfTables)));
            self.check();
        }
    }

    fn unmap_at_last(&mut self, range: IovaRange) {
        for allocations in 0.. {
            let mut gather = Gather::new();
            self.memory.fail_after(Some(allocations));
            let result = self.radix.unmap(range, &mut gather);
            self.memory.fail_after(None);
            self.settle(&mut gather);
            if result != Err(CutError::OutOfTables(OutOfTables)) {
                assert_eq!(result, self.model.cut_ends_backwards(range));
                if result.is_ok() {
                    for first in self.model.firsts(range) {
                        self.model.remove(first);
                    }
                }
                return self.check();
            }
            assert!(gather.runs.is_empty(), "a failed unmap reports {:?}", gather.runs);
            // An end may be cut by now, or cut in part, which changes no translation.
            self.adopt_cuts();
            self.check();
        }
    }

    fn protect_at_last(&mut self, range: IovaRange, permissions: Attributes) {
        for allocations in 0.. {
            let mut gather = Gather::new();
            let mut model = self.model.clone();
            let expected = model.protect(range, permissions);
            self.memory.fail_after(Some(allocations));
            let result = self.radix.protect(range, permissions, &mut gather);
            self.memory.fail_after(None);
            let report = report_of(&gather);
            self.settle(&mut gather);
            if result != Err(ProtectError::Cut(CutError::OutOfTables(OutOfTables))) {
                assert_eq!(result, expected.clone().map(|_| ()));
                assert_eq!(report, expected.unwrap_or_default());
                self.model = model;
                return self.check();
            }
            assert_eq!(report, Report::default());
            self.adopt_cuts();
            self.check();
        }
    }

    fn remap_at_last(&mut self, range: IovaRange, oa: u64, attributes: Attributes) {
        for allocations in 0.. {
            let mut gather = Gather::new();
            let mut model = self.model.clone();
            let Some(expected) = model.remap(range, oa, attributes) else { return };
            // Of so many tables not each one's failure is tried.
            let allocations =
                if model.leaves.len() > self.model.leaves.len() + 1500 { 100 } else { allocations };
            self.memory.fail_after(Some(allocations));
            let result = self.radix.remap(range, Oa::new(oa), attributes, &mut gather);
            self.memory.fail_after(None);
            let report = report_of(&gather);
            self.settle(&mut gather);
            if result != Err(RemapError::Cut(CutError::OutOfTables(OutOfTables))) {
                assert_eq!(result, expected.clone().map(|_| ()));
                assert_eq!(report, expected.unwrap_or_default());
                self.model = model;
                return self.check();
            }
            assert_eq!(report, Report::default());
            self.adopt_cuts();
            self.check();
        }
    }

    fn cut_at_last(&mut self, at: u64) {
        for allocations in 0.. {
            let mut gather = Gather::new();
            self.memory.fail_after(Some(allocations));
            let result = self.radix.cut(at, &mut gather);
            self.memory.fail_after(None);
            self.settle(&mut gather);
            if result != Err(CutError::OutOfTables(OutOfTables)) {
                assert_eq!(result, self.model.cut(at));
                return self.check();
            }
            self.adopt_cuts();
            self.check();
        }
    }

    /// Cuts the model's leaves as the table's are cut.
    fn adopt_cuts(&mut self) {
        let mut begins = Vec::new();
        self.radix.leaves(IovaRange::ALL, |leaf| {
            begins.push(leaf.iova);
            ControlFlow::Continue(())
        });
        for at in begins {
            // Only ever makes the model finer at a place where the table is finer already; `check` sees the rest.
            self.model.cut(at).unwrap();
        }
    }
}
