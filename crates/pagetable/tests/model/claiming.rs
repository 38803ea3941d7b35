//! The claiming mode, which only the native format has: operations that own leaves between their steps.

use crate::accounting::inspect;
use crate::changes::joined;
use crate::operations::{Extent, Output, Place, attributes, extent, output, place};
use crate::pair::{Pair, report_of};
use crate::plain::Report;
use crate::specification::Specification;
use ioasid_pagetable::{
    Attributes, ClaimError, ClaimFormat, Gather, IovaRange, Leaf, MapError, Native, Oa, RetractError,
};
use proptest::prelude::*;

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
        2 => (place(), extent()).prop_map(|(place, extent)| ClaimOperation::Hold(place, extent)),
        2 => any::<usize>().prop_map(ClaimOperation::LetGo),
    ]
}

/// What operations own: ranges to be published or released, and leaves that are held.
#[derive(Default)]
pub(crate) struct Owned {
    ranges: Vec<IovaRange>,
    held: Vec<Leaf>,
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

    fn merge_claimed(&mut self, range: IovaRange) {
        let expected = self.model.merge(range).unwrap();
        let mut gather = Gather::new();
        assert_eq!(self.radix.merge_claimed(range, &mut gather), expected.tables, "merging {range}");
        assert_eq!(joined(report_of(&gather).runs), expected.runs, "merging {range}");
        assert_eq!(gather.retired.len() as u64, expected.tables);
        self.settle(&mut gather);
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
            ClaimOperation::MergeAll => {
                self.merge_claimed(IovaRange::ALL);
                IovaRange::ALL
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

pub(crate) fn agree(format: Native, specification: Specification, operations: &[ClaimOperation]) {
    let mut pair = Pair::new(format, specification);
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
    pair.retract(IovaRange::ALL, None, &mut all);
    pair.check();
    for range in all.ranges {
        pair.end(range, false);
    }
    pair.finish();
}
