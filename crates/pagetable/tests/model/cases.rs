//! Single cases, each with a point of its own.

use crate::accounting::{Accounting, inspect};
use crate::pair::{Gathered, KEPT_LIMIT};
use crate::specification::READ_WRITE;
use crate::{native, vtd};
use ioasid_pagetable::{
    AmdV1, Attributes, CachedWalk, CutError, Gather, IovaRange, MapError, Oa, OutOfTables, PageSize,
    ProtectError, Radix, RemapError, RetractError, RiscV, WalkFault,
};

fn with_length(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

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

/// A leaf of two entries, of which the second is used, of a level that has no leaves of one entry: its first half has to
/// go into a table, and that table must not make room for the leaf again.
#[test]
fn a_leaf_that_is_in_the_way_of_one_of_several_entries() {
    let memory = Accounting::default();
    let radix = Radix::new(AmdV1::new(), memory.clone());
    let mut gather = Gather::new();
    let half = 1 << 39;
    radix.map(with_length(half, 0x1000), Oa::new(0x1000), READ_WRITE, &mut gather).unwrap();
    memory.fail_after(Some(100));
    let result = radix.map(with_length(0, 2 * half), Oa::new(0), READ_WRITE, &mut gather);
    assert_eq!(result, Err(MapError::Occupied { at: half }));
    memory.fail_after(None);
    assert_eq!(radix.walk(half - 1), Err(WalkFault::NotMapped(half - 1)));
    assert_eq!(radix.walk(half).unwrap().oa, Oa::new(0x1000));
    memory.free_retired(&mut gather);
}

/// Tables that were kept and are gone do not use up what may be kept.
#[test]
fn the_allowance_of_empty_tables_is_given_back() {
    let memory = Accounting::default();
    let radix = Radix::new(vtd(4), memory.clone());
    let mut gather = Gather::new();
    let (page, large) = (with_length(0x5000, 0x1000), with_length(0, 0x20_0000));
    for _ in 0..2 * KEPT_LIMIT {
        radix.map(page, Oa::new(0), READ_WRITE, &mut gather).unwrap();
        radix.unmap(page, &mut gather).unwrap();
        assert_eq!(radix.table_count(), 4, "the table of the page is kept");
        // Two ways on which it goes.
        radix.map(large, Oa::new(0), READ_WRITE, &mut gather).unwrap();
        radix.unmap(large, &mut gather).unwrap();
        assert_eq!(radix.table_count(), 3);
        radix.map(page, Oa::new(0), READ_WRITE, &mut gather).unwrap();
        radix.unmap(page, &mut gather).unwrap();
        assert_eq!(radix.table_count(), 4, "the table of the page is kept");
        radix.unmap(large, &mut gather).unwrap();
        assert_eq!(radix.table_count(), 3);
    }
    memory.free_retired(&mut gather);
}

/// The table of the highest level serves both halves of a sign-extended table. In the gap between them every bit that
/// indexes it has a meaning, and none of the addresses has.
#[test]
fn a_remembered_way_does_not_lead_into_the_gap() {
    let radix = Radix::new(RiscV::new(3).unwrap(), Accounting::default());
    let mut gather = Gather::new();
    let upper = 0xffff_ffc0_0000_0000;
    for first in [0, upper] {
        radix.map(with_length(first, 1 << 30), Oa::new(0), READ_WRITE, &mut gather).unwrap();
    }
    let mut cache = CachedWalk::new();
    for (first, gap) in
        [(0, upper & 0x7f_ffff_ffff), (upper, upper ^ 1 << 63), (upper, 0xffff_ff80_0000_0000)]
    {
        assert!(radix.walk_cached(first, &mut cache).is_ok());
        assert_eq!(radix.walk_cached(gap, &mut cache), Err(WalkFault::OutOfRange(gap)));
    }
}

#[test]
fn permissions_that_no_leaf_can_have_are_refused() {
    let radix = Radix::new(vtd(4), Accounting::default());
    let mut gather = Gather::new();
    let pages = with_length(0x1000, 0x2000);
    radix.map(pages, Oa::new(0), READ_WRITE, &mut gather).unwrap();
    let no_access = Err(ProtectError::NoAccess { range: pages });
    assert_eq!(radix.protect(pages, Attributes::EXECUTE, &mut gather), no_access);
    for (first, last, at) in [(0x1800, 0x2fff, 0x1800), (0x1000, 0x27ff, 0x27ff)] {
        let range = IovaRange::new(first, last).unwrap();
        let misaligned = Err(ProtectError::Cut(CutError::Misaligned { at }));
        assert_eq!(radix.protect(range, Attributes::READ, &mut gather), misaligned);
    }
    assert_eq!(radix.walk(0x1000).unwrap().attributes, READ_WRITE);
    // Where nothing is mapped, nothing is wrong.
    radix.protect(IovaRange::new(1 << 48, u64::MAX).unwrap(), Attributes::READ, &mut gather).unwrap();
    assert!(gather.runs.is_empty());
}

#[test]
fn leaves_are_cut_as_small_as_a_new_output_asks_for() {
    let radix = Radix::new(vtd(4), Accounting::default());
    let mut gather = Gather::new();
    let gigabyte = with_length(1 << 30, 1 << 30);
    radix.map(gigabyte, Oa::new(1 << 30), READ_WRITE, &mut gather).unwrap();
    for (oa, size) in [
        (5 << 30, PageSize::SIZE_1G),
        ((1 << 30) + (6 << 20), PageSize::SIZE_2M),
        ((3 << 30) + 0x5000, PageSize::SIZE_4K),
        // Going back needs nothing, and merges nothing.
        (1 << 30, PageSize::SIZE_4K),
    ] {
        radix.remap(gigabyte, Oa::new(oa), Attributes::READ, &mut gather).unwrap();
        for offset in [0, 0x1000, 0x20_0000, 0x1234_5000, (1 << 30) - 0x1000] {
            let leaf = radix.walk(gigabyte.first() + offset).unwrap();
            let found = (leaf.output(gigabyte.first() + offset).get(), leaf.size, leaf.attributes);
            assert_eq!(found, (oa + offset, size, Attributes::READ), "{offset:#x} to {oa:#x}");
        }
    }
    let all = gather.retired.len();
    assert_eq!(all, 0, "a remap takes no table away");
}

#[test]
fn what_needs_a_break_is_not_remapped() {
    let mut gather = Gather::new();
    let range = with_length(0x1_0000, 0x1_0000);
    let amd = Radix::new(AmdV1::new(), Accounting::default());
    amd.map(range, Oa::new(0x1_0000), READ_WRITE, &mut gather).unwrap();
    let size = PageSize::from_log2(16).unwrap();
    let needs_break = Err(RemapError::NeedsBreak { at: 0x1_0000, size });
    assert_eq!(amd.remap(range, Oa::new(0x5_0000), READ_WRITE, &mut gather), needs_break);
    // Where nothing would change, nothing has to.
    assert_eq!(amd.remap(range, Oa::new(0x1_0000), READ_WRITE, &mut gather), Ok(()));
    let risc_v = Radix::new(RiscV::new(4).unwrap(), Accounting::default());
    let page = with_length(0x1000, 0x1000);
    risc_v.map(page, Oa::new(0x1000), READ_WRITE, &mut gather).unwrap();
    let needs_break = Err(RemapError::NeedsBreak { at: 0x1000, size: PageSize::SIZE_4K });
    assert_eq!(risc_v.remap(page, Oa::new(0x2000), READ_WRITE, &mut gather), needs_break);
    assert_eq!(risc_v.walk(0x1000).unwrap().oa, Oa::new(0x1000));
}

#[test]
fn who_holds_leaves_has_them_alone_and_as_small_as_he_wants_them() {
    let radix = Radix::new(native(12, None), Accounting::default());
    let mut gather = Gather::new();
    let block = with_length(1 << 21, 1 << 22);
    radix.claim(block, Oa::new(1 << 21), READ_WRITE, &mut gather).unwrap();
    radix.publish(block);
    let mut held = Gather::new();
    let first = with_length(1 << 21, 1 << 21);
    radix.hold_exactly(first, PageSize::SIZE_4K, &mut held).unwrap();
    assert_eq!((held.leaves, held.leaf_sizes), (512, 0x1000));
    assert_eq!(held.runs.iter().collect::<Vec<_>>(), [first]);
    // In a table of pages and from above.
    let mut others: Gathered = Gather::new();
    for range in [with_length((1 << 21) + 0x3000, 0x2000), block] {
        let contended = Err(RetractError::Contended { at: range.first() });
        assert_eq!(radix.hold_all(range, &mut others), contended);
        assert_eq!(radix.hold_exactly(range, PageSize::SIZE_4K, &mut others), contended);
        assert_eq!(radix.retract(range, &mut others), contended);
        assert!(others.runs.is_empty());
    }
    radix.remap_held(first, Oa::new(0x7000), Attributes::READ);
    radix.let_go_all(first);
    let page = radix.walk((1 << 21) + 0x3000).unwrap();
    assert_eq!((page.oa, page.attributes), (Oa::new(0xa000), Attributes::READ));
    // The other half is as it was, and can be had.
    assert_eq!(radix.walk(2 << 21).unwrap().size, PageSize::SIZE_2M);
    radix.hold_all(block, &mut others).unwrap();
    assert_eq!(others.leaves, 513);
    radix.let_go_all(block);
    radix.retract(block, &mut held).unwrap();
    radix.release(block, &mut held);
}
