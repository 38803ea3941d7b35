//! Bisecting: what an unmap in the middle of a mapping means, and what it says.
//!
//! Who asks: whoever emulates an IOMMU for a guest. The guest unmaps what it likes, and the emulation has to know what became
//! of it.
//!
//! - VFIO type1 version 1 unmaps whatever the hidden superpages force and returns a size, which may be more or less than was
//!   asked for, or 0; the caller cannot know beforehand. Version 2 refuses every unmap that would cut a mapping.
//! - iommufd removes whole areas only: anything else is `ENOENT`.
//! - Here the result is the range that was asked for, whatever leaves it had, and the call says which ranges went. Whoever wants
//!   version 2's rule has a space that keeps it, and is told which mapping was in the way.

use crate::machine::{Function, K4, M2, Machine, RW, number_pages, range};
use ioasid::pagetable::Native;
use ioasid::{Account, Iova, IovaRange, MappingPolicy, Memory, Space, UnmapError};
use ioasid_soft::dma::DmaFaultReason;
use ioasid_soft::iommu::TableKind;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const AT: u64 = 1 << 30;
const KINDS: [TableKind; 3] = [TableKind::Native, TableKind::VtdSecondStage, TableKind::X86_64];

/// Which page of memory each page from [`AT`] on has to lead to.
type Plain = BTreeMap<u64, u64>;

/// That the devices reach these pages, and no others of the first `count`.
fn reach(functions: &[Function], plain: &Plain, count: u64) {
    for function in functions {
        for page in 0..count {
            let expected = plain.get(&page).copied().ok_or(DmaFaultReason::NotMapped);
            assert_eq!(function.read(AT + page * K4), expected, "{} at page {page}", function.kind);
        }
    }
}

fn runs(ranges: &[IovaRange]) -> Vec<(u64, u64)> {
    ranges.iter().map(|range| ((range.first() - AT) / K4, (range.last() - AT) / K4)).collect()
}

fn guest(machine: &Machine, pages: u64) -> Arc<Memory> {
    let memory = machine.memory(pages * K4, &Account::new("guest", None));
    number_pages(&memory, 0..pages, |page| page);
    memory
}

#[test]
fn the_middle_an_edge_and_what_spans_two_mappings() {
    let machine = Machine::new();
    let memory = guest(&machine, 2048);
    let space = Space::new(&machine.bus);
    let functions = KINDS.map(|kind| machine.attached(kind, &space));
    // Two mappings that touch: leaves of 2 MiB, and nothing in them says where one ends, unless the table does.
    space.map(Iova::new(AT), &memory, 0, M2, RW).unwrap();
    space.map(Iova::new(AT + M2), &memory, M2, 2 * M2, RW).unwrap();
    let mut plain: Plain = (0..1536).map(|page| (page, page)).collect();
    let mut unmap = |first: u64, count: u64, expected: &[(u64, u64)]| {
        let unmapped = space.unmap(range(AT + first * K4, count * K4)).unwrap();
        assert_eq!(runs(&unmapped.runs().collect::<Vec<_>>()), expected);
        assert_eq!(
            unmapped.bytes(),
            expected.iter().map(|(first, last)| (last - first + 1) * K4).sum::<u64>()
        );
        plain.retain(|page, _| !(first..first + count).contains(page));
        reach(&functions, &plain, 1600);
    };
    // The middle: one page of a leaf of 2 MiB.
    unmap(100, 1, &[(100, 100)]);
    // The edges.
    unmap(0, 3, &[(0, 2)]);
    unmap(1530, 6, &[(1530, 1535)]);
    // The end of one mapping and the beginning of the next one.
    unmap(500, 24, &[(500, 523)]);
    // Over holes: what was there, and nothing else, is what it says.
    unmap(98, 5, &[(98, 99), (101, 102)]);
    unmap(98, 5, &[]);
    unmap(1000, 600, &[(1000, 1529)]);

    // Half a page is refused, and nothing has happened.
    let half = space.unmap(range(AT + 300 * K4, K4 / 2));
    assert!(matches!(half, Err(UnmapError::Misaligned { .. })), "{half:?}");
    reach(&functions, &plain, 1600);
}

/// Type1 version 2's rule, for programs that count on it.
#[test]
fn a_space_may_keep_its_mappings_whole_and_says_which_was_in_the_way() {
    let machine = Machine::new();
    let memory = guest(&machine, 1024);
    let policy = MappingPolicy { most: None, whole_only: true };
    let space = Space::with_policy(&machine.bus, Native::new(), policy);
    let functions = KINDS.map(|kind| machine.attached(kind, &space));
    space.map(Iova::new(AT), &memory, 0, M2, RW).unwrap();
    space.map(Iova::new(AT + M2), &memory, M2, M2, RW).unwrap();
    let plain: Plain = (0..1024).map(|page| (page, page)).collect();
    for (first, count, in_the_way) in [(100, 1, 0), (0, 3, 0), (1020, 4, M2), (500, 24, 0), (0, 513, M2)] {
        match space.unmap(range(AT + first * K4, count * K4)) {
            Err(UnmapError::CutsMapping { mapping }) => assert_eq!(mapping, range(AT + in_the_way, M2)),
            other => panic!("{other:?}"),
        }
        reach(&functions, &plain, 1030);
    }
    // Both together are whole.
    assert_eq!(space.unmap(range(AT, 2 * M2)).unwrap().bytes(), 2 * M2);
    reach(&functions, &Plain::new(), 1030);
}

/// Any maps and unmaps: what an unmap says is what a plain map of pages says, and devices reach what is left.
#[test]
fn whatever_was_mapped_an_unmap_takes_exactly_its_range() {
    const PAGES: u64 = 1024;
    let pages = || prop_oneof![(0..PAGES, 1..40u64), (0..PAGES / 512).prop_map(|block| (block * 512, 512))];
    let steps = vec((any::<bool>(), pages()), 1..30);
    proptest!(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() }, |(steps in steps)| {
        let machine = Machine::new();
        let memory = guest(&machine, PAGES);
        let space = Space::new(&machine.bus);
        let functions = KINDS.map(|kind| machine.attached(kind, &space));
        let mut plain = Plain::new();
        for (map, (first, count)) in steps {
            let pages = first..(first + count).min(PAGES);
            let there: Vec<u64> = plain.range(pages.clone()).map(|(page, _)| *page).collect();
            let length = (pages.end - first) * K4;
            if map {
                let mapped = space.map(Iova::new(AT + first * K4), &memory, first * K4, length, RW);
                prop_assert_eq!(mapped.is_ok(), there.is_empty());
                if mapped.is_ok() {
                    plain.extend(pages.map(|page| (page, page)));
                }
            } else {
                let unmapped = space.unmap(range(AT + first * K4, length)).unwrap();
                prop_assert_eq!(unmapped.bytes(), there.len() as u64 * K4);
                let gone: Vec<u64> =
                    runs(&unmapped.runs().collect::<Vec<_>>()).into_iter().flat_map(|(first, last)| first..=last).collect();
                prop_assert_eq!(gone, there);
                plain.retain(|page, _| !pages.contains(page));
            }
        }
        reach(&functions, &plain, PAGES);
    });
}
