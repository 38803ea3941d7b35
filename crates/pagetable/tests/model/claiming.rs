//! The claiming mode, which only the native format has: operations that own leaves between their steps.

use crate::accounting::inspect;
use crate::changes::joined;
use crate::operations::{Extent, Output, Place, attributes, extent, output, place};
use crate::pair::{Pair, report_of};
use crate::plain::{Report, log2};
use crate::specification::Specification;
use ioasid_pagetable::{
    Attributes, ClaimError, ClaimFormat, Gather, IovaRange, Leaf, MapError, Native, Oa, PageSize,
    RetractError,
};
use proptest::prelude::*;
use std::ops::ControlFlow;

#[derive(Clone, Debug)]
pub(crate) enum ClaimOperation {
    Claim(Place, Extent, Output, Attributes),
    Publish(usize),
    Release(usize),
    Retract(Place, Extent),
    /// Of the leaves only those whose output lies in one of the two windows.
    RetractIf(Place, Extent),
    CutClaimed(Place, Extent),
    Hold(Place, Extent),
    LetGo(usize),
    Merge(Place, Extent),
    MergeAll,
    /// Mappings that continue each other become one.
    MergeJoining(Place, Extent),
    /// Leaves as they are.
    HoldAll(Place, Extent),
    /// Exactly the range, in leaves that fit this output; then what is held gets these permissions, and if all of the
    /// range is, this output and these attributes.
    Change(Place, Extent, Output, Attributes, Attributes),
    LetGoAll(usize),
    /// Says that a mapping begins with a leaf that is held, or does not.
    Begin(usize, bool),
    /// Maps an entry of a level in one piece or in two that continue each other, cuts it, and merges, with a leaf held
    /// meanwhile or not.
    Regroup(Place, u8, Option<u64>, u64, bool),
}

pub(crate) fn operation() -> impl Strategy<Value = ClaimOperation> {
    prop_oneof![
        6 => (place(), extent(), output(), attributes()).prop_map(|(place, extent, output, attributes)| {
            ClaimOperation::Claim(place, extent, output, attributes)
        }),
        4 => any::<usize>().prop_map(ClaimOperation::Publish),
        2 => any::<usize>().prop_map(ClaimOperation::Release),
        4 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::Retract(place, extent)),
        1 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::RetractIf(place, extent)),
        2 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::CutClaimed(place, extent)),
        3 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::Merge(place, extent)),
        1 => Just(ClaimOperation::MergeAll),
        4 => (place(), 2..4u8, any::<Option<u64>>(), any::<u64>(), any::<bool>())
            .prop_map(|(place, level, split, cut, held)| ClaimOperation::Regroup(place, level, split, cut, held)),
        2 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::MergeJoining(place, extent)),
        2 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::HoldAll(place, extent)),
        5 => (place(), extent(), output(), attributes(), attributes()).prop_map(
            |(place, extent, output, attributes, permissions)| {
                ClaimOperation::Change(place, extent, output, attributes, permissions)
            }
        ),
        3 => any::<usize>().prop_map(ClaimOperation::LetGoAll),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(run, begins)| ClaimOperation::Begin(run, begins)),
        2 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::Hold(place, extent)),
        2 => any::<usize>().prop_map(ClaimOperation::LetGo),
    ]
}

/// What operations own: ranges to be published or released, and leaves that are held.
#[derive(Default)]
pub(crate) struct Owned {
    ranges: Vec<IovaRange>,
    held: Vec<Leaf>,
    /// Leaves that are held range by range.
    runs: Vec<IovaRange>,
}

fn take<T>(from: &mut Vec<T>, number: usize) -> Option<T> {
    let number = number.checked_rem(from.len())?;
    Some(from.swap_remove(number))
}

impl Pair<Native> {
    fn claim(&mut self, range: IovaRange, oa: u64, attributes: Attributes, owned: &mut Owned) {
        if self.model.refuses(range, oa, attributes).is_some() {
            return;
        }
        self.model.grow(range);
        let Some(plan) = self.model.plan(range, oa, false) else {
            self.forget_growth();
            return;
        };
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
                self.model.remove(first);
            }
        }
    }

    fn retract(&mut self, range: IovaRange, wanted: Option<&dyn Fn(&Leaf) -> bool>, owned: &mut Owned) {
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
            if wanted.is_none_or(|wanted| wanted(&self.expected(first, &leaf, None))) {
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
                expected.leaf(first, leaf.last);
            }
            match leaf.last.checked_add(1) {
                Some(next) => at = next,
                None => break,
            }
        }
        let mut gather = Gather::new();
        let result = match wanted {
            Some(wanted) => self.radix.retract_if(range, wanted, &mut gather),
            None => self.radix.retract(range, &mut gather),
        };
        assert_eq!(result, contended.map_or(Ok(()), |at| Err(RetractError::Contended { at })));
        assert_eq!(report_of(&gather), expected, "retracting {range}");
        assert!(gather.retired.is_empty());
        owned.ranges.extend(gather.runs.iter());
    }

    /// Holds all leaves of a range, or exactly those parts of them that lie in it and are no larger than `largest`.
    fn hold_range(&mut self, range: IovaRange, largest: Option<u32>, owned: &mut Owned) {
        let mut expected = Report::default();
        let mut result = Ok(());
        let mut at = Some(range.first());
        let next = |model: &crate::plain::Model, at: u64| {
            model.firsts(range).into_iter().find(|&first| model.leaves[&first].last >= at)
        };
        while let Some(first) = at.and_then(|at| next(&self.model, at)) {
            let leaf = self.model.leaves[&first];
            if leaf.busy {
                result = Err(RetractError::Contended { at: first.max(range.first()) });
                break;
            }
            let outside = first < range.first() || leaf.last > range.last();
            if largest.is_some_and(|largest| outside || log2(first, leaf.last) > largest) {
                self.model.cut_once(first, leaf).unwrap();
                continue;
            }
            self.model.leaves.get_mut(&first).unwrap().busy = true;
            expected.leaf(first, leaf.last);
            at = leaf.last.checked_add(1);
        }
        let mut gather = Gather::new();
        let held = match largest {
            Some(largest) => {
                self.radix.hold_exactly(range, PageSize::from_log2(largest).unwrap(), &mut gather)
            }
            None => self.radix.hold_all(range, &mut gather),
        };
        assert_eq!(held, result, "holding {range}");
        assert_eq!(report_of(&gather), expected, "holding {range}");
        assert!(gather.retired.is_empty());
        owned.runs.extend(gather.runs.iter());
    }

    fn change(
        &mut self,
        range: IovaRange,
        oa: u64,
        attributes: Attributes,
        permissions: Attributes,
        owned: &mut Owned,
    ) {
        if self.model.refuses(range, oa, attributes).is_some() {
            return;
        }
        // As small as the output asks for, but not smaller than the test can afford.
        let largest = (range.first() ^ oa).trailing_zeros().min(63);
        let leaves = range.length().map_or(u64::MAX, |length| length >> largest);
        let mut ours = Owned::default();
        self.hold_range(range, Some(if leaves > 2000 { 63 } else { largest }), &mut ours);
        for run in &ours.runs {
            self.radix.protect_held(*run, permissions);
            for first in self.model.firsts(*run) {
                let leaf = self.model.leaves[&first];
                let attributes = leaf.attributes.difference(Attributes::PERMISSIONS)
                    | permissions & Attributes::PERMISSIONS;
                self.model.leaves.get_mut(&first).unwrap().attributes = self.model.said(attributes);
            }
        }
        if ours.runs == [range] && leaves <= 2000 {
            self.radix.remap_held(range, Oa::new(oa), attributes);
            for first in self.model.firsts(range) {
                let said = self.model.said(attributes);
                let leaf = self.model.leaves.get_mut(&first).unwrap();
                (leaf.oa, leaf.attributes) = (oa + (first - range.first()), said);
            }
        }
        owned.runs.extend(ours.runs);
    }

    fn let_go_all(&mut self, run: IovaRange) {
        self.radix.let_go_all(run);
        for first in self.model.firsts(run) {
            self.model.leaves.get_mut(&first).unwrap().busy = false;
        }
    }

    /// What can be asked about owners and about where mappings begin.
    fn check_owners(&self, range: IovaRange) {
        let leaves: Vec<_> =
            self.model.firsts(range).into_iter().map(|at| (at, self.model.leaves[&at])).collect();
        let mut shown = leaves.iter();
        self.radix.settled(range, |span, leaf| {
            let (first, expected) = shown.next().expect("more than the model has");
            let whole = IovaRange::new(*first, expected.last).unwrap();
            assert_eq!(span, whole);
            assert_eq!(leaf.map(|leaf| leaf.iova), (!expected.busy).then_some(*first));
            ControlFlow::Continue(())
        });
        assert!(shown.next().is_none());
        let mut present = leaves.iter().filter(|(_, leaf)| leaf.present);
        self.radix.mapped(range, |leaf, begins| {
            let (first, expected) = present.next().expect("more than the model has");
            assert_eq!((leaf.iova, begins), (*first, expected.first));
            ControlFlow::Continue(())
        });
        assert!(present.next().is_none());
        let begin = leaves.iter().filter(|(first, leaf)| leaf.first && range.contains(*first)).count();
        assert_eq!(self.radix.beginnings(range), begin as u64);
        for at in [range.first(), range.last() & !(self.model.granule() - 1)] {
            let leaf = self.model.at(at);
            let continues = leaf.is_some_and(|(first, leaf)| first != at || !leaf.first);
            assert_eq!(self.radix.continues(at), continues, "at {at:#x}");
        }
    }

    fn merge_claimed(&mut self, range: IovaRange) {
        self.merge_mappings(range, false);
    }

    fn merge_mappings(&mut self, range: IovaRange, join: bool) {
        let expected = self.model.merge_mappings(range, join).unwrap();
        let mut gather = Gather::new();
        let merged = match join {
            true => self.radix.merge_joining(range, &mut gather),
            false => self.radix.merge_claimed(range, &mut gather),
        };
        assert_eq!(merged, expected.tables, "merging {range}");
        assert_eq!(joined(report_of(&gather).runs), expected.runs, "merging {range}");
        assert_eq!(gather.retired.len() as u64, expected.tables);
        self.settle(&mut gather);
    }

    fn regroup_claimed(&mut self, range: IovaRange, split: Option<u64>, cut: u64, held: bool) {
        let at = split.and_then(|split| self.boundary(range, split));
        let parts = match at {
            Some(at) => [IovaRange::new(range.first(), at - 1), IovaRange::new(at, range.last())],
            None => [Some(range), None],
        };
        let mut owned = Owned::default();
        for part in parts.into_iter().flatten() {
            let output = self.output(Output::Congruent(true), part.first());
            self.claim(part, output, Attributes::READ, &mut owned);
        }
        for part in owned.ranges.split_off(0) {
            self.end(part, true);
        }
        let Some(part) = self.boundary(range, cut).and_then(|at| IovaRange::new(at, range.last())) else {
            return;
        };
        assert_eq!(self.radix.cut_claimed(part), self.model.cut_ends(part));
        if held {
            self.hold(part, &mut owned);
        }
        self.merge_claimed(range);
        self.check_claims();
        for held in owned.held {
            self.let_go(&held);
        }
        self.merge_claimed(range);
    }

    fn let_go(&mut self, held: &Leaf) {
        self.radix.let_go(held);
        self.model.leaves.get_mut(&held.iova).unwrap().busy = false;
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

    pub(crate) fn run_claiming(&mut self, operation: &ClaimOperation, owned: &mut Owned) -> IovaRange {
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
                    self.retract(range, None, owned);
                }
                range
            }
            ClaimOperation::RetractIf(place, extent) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    self.retract(range, Some(&|leaf| leaf.oa.get() >> 42 & 1 != 0), owned);
                }
                range
            }
            ClaimOperation::Merge(place, extent) => {
                let range = self.range(place, extent);
                self.merge_claimed(range);
                range
            }
            ClaimOperation::Regroup(place, level, split, cut, held) => {
                let range = self.range(place, Extent::Aligned(level, 1));
                if self.model.may_cut() {
                    self.regroup_claimed(range, split, cut, held);
                }
                range
            }
            ClaimOperation::MergeAll => {
                self.merge_claimed(IovaRange::ALL);
                IovaRange::ALL
            }
            ClaimOperation::MergeJoining(place, extent) => {
                let range = self.range(place, extent);
                self.merge_mappings(range, true);
                range
            }
            ClaimOperation::HoldAll(place, extent) => {
                let range = self.range(place, extent);
                self.hold_range(range, None, owned);
                range
            }
            ClaimOperation::Change(place, extent, output, attributes, permissions) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    let oa = self.output(output, range.first());
                    self.change(range, oa, attributes, permissions, owned);
                }
                range
            }
            ClaimOperation::LetGoAll(number) => {
                let Some(run) = take(&mut owned.runs, number) else { return IovaRange::ALL };
                self.let_go_all(run);
                run
            }
            ClaimOperation::Begin(number, begins) => {
                let Some(number) = number.checked_rem(owned.runs.len()) else { return IovaRange::ALL };
                let run = owned.runs[number];
                self.radix.set_beginning(run.last(), begins);
                let (first, _) = self.model.at(run.last()).unwrap();
                self.model.leaves.get_mut(&first).unwrap().first = begins;
                run
            }
            ClaimOperation::CutClaimed(place, extent) => {
                let range = self.range(place, extent);
                if self.model.may_cut() {
                    let expected = self.model.cut_ends(range);
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
                self.let_go(&held);
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

pub(crate) fn agree(format: Native, specification: Specification, operations: &[ClaimOperation]) {
    let mut pair = Pair::new(format, specification);
    let mut owned = Owned::default();
    for operation in operations {
        let range = pair.run_claiming(operation, &mut owned);
        pair.check_ends(range);
        pair.check();
        pair.check_claims();
        pair.check_owners(range);
    }
    for held in owned.held {
        pair.let_go(&held);
    }
    for run in owned.runs {
        pair.let_go_all(run);
    }
    for range in owned.ranges {
        pair.end(range, true);
    }
    pair.check();
    let mut all = Owned::default();
    pair.retract(IovaRange::ALL, None, &mut all);
    pair.check();
    for range in all.ranges {
        pair.end(range, false);
    }
    pair.finish();
}
