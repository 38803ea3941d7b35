//! The table against a plain model of it: a sorted map of leaves.
//!
//! Every operation of the exclusive mode and of the claiming mode is run on a table and on the model, with addresses
//! from both ends of the address space, around the boundaries of all leaf sizes, on both sides of the gap that
//! sign-extended tables have, and inside large leaves. After each one, everything that can be asked of the table must
//! have the model's answer, down to which leaf sizes were used, what the gather reports, which address an error names,
//! and how many tables are in use. What the formats are the model takes from nobody: leaf sizes, widths and the bits
//! of entries are written down here once more ([`specification`]), and the tables' memory is read by them word by
//! word.
//!
//! A long run: `PROPTEST_CASES=5000 cargo test --release -p ioasid-pagetable --test model`.

#[path = "../accounting/mod.rs"]
mod accounting;
mod cases;
mod changes;
mod claiming;
mod failures;
mod operations;
mod pair;
mod plain;
mod specification;

use ioasid_pagetable::{AmdV1, Format, IovaRange, Native, PageSize, RiscV, VtdSecondStage, X86_64};
use operations::{Operation, cases, operations};
use pair::Pair;
use proptest::prelude::*;
use specification::Specification;

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

fn agree<F: Format>(format: F, specification: Specification, operations: &[Operation]) {
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

/// One test for each format: operations at random, table and model agree.
macro_rules! every_format {
    ($($name:ident: $format:expr, $specification:expr;)*) => {
        proptest! {
            #![proptest_config(cases(8))]
            $(
                #[test]
                fn $name(operations in operations(24)) {
                    agree($format, $specification, &operations);
                }
            )*
        }
    };
}

const LARGE: u64 = 1 << 21 | 1 << 30;
/// What a unit may leave of AMD's sizes: some of one entry, some of several.
const SOME_SIZES: u64 = 1 << 12 | 1 << 14 | 1 << 16 | 1 << 20 | 1 << 21 | 1 << 25 | 1 << 36;
/// What Linux' self-test allows: 2 KiB to 64 GiB.
const SELF_TEST_SIZES: u64 = 0x1f_ffff_f800;

every_format! {
    native_2k: native(11, None), specification::native(11, 55);
    native_2k_only_smallest_leaves: native(11, Some(11)), specification::native(11, 11);
    native_4k: native(12, None), specification::native(12, 55);
    native_4k_up_to_2m: native(12, Some(21)), specification::native(12, 21);
    native_64k: native(16, None), specification::native(16, 55);
    vtd_3_levels: vtd(3), specification::vtd_second_stage(3, LARGE, false);
    vtd_4_levels:
        vtd(4).with_accessed_dirty(true), specification::vtd_second_stage(4, LARGE, false).marked_by_hardware();
    vtd_5_levels: vtd(5).with_memory_types(true), specification::vtd_second_stage(5, LARGE, true);
    vtd_without_gigabyte_pages: vtd(4).with_large_pages(1 << 21), specification::vtd_second_stage(4, 1 << 21, false);
    vtd_with_gigabyte_pages_alone: vtd(4).with_large_pages(1 << 30), specification::vtd_second_stage(4, 1 << 30, false);
    x86_64_4_levels: X86_64::new(4).unwrap(), specification::x86_64(4, true, false);
    x86_64_5_levels: X86_64::new(5).unwrap(), specification::x86_64(5, true, false);
    x86_64_4_levels_not_sign_extended:
        X86_64::new(4).unwrap().with_sign_extension(false), specification::x86_64(4, false, false);
    x86_64_5_levels_not_sign_extended:
        X86_64::new(5).unwrap().with_sign_extension(false).with_execute_disable(true),
        specification::x86_64(5, false, true);
    amd_v1_dynamic_top: AmdV1::new(), specification::amd_v1(12, 3..=6, u64::MAX);
    amd_v1_4_levels: AmdV1::new().with_top_levels(4..=4).unwrap(), specification::amd_v1(12, 4..=4, u64::MAX);
    amd_v1_some_sizes: AmdV1::new().with_leaf_sizes(SOME_SIZES), specification::amd_v1(12, 3..=6, SOME_SIZES);
    amd_v1_2k:
        AmdV1::new().with_granule_2k().with_accessed_dirty(true),
        specification::amd_v1(11, 3..=5, u64::MAX).marked_by_hardware();
    amd_v1_2k_self_test:
        AmdV1::new().with_granule_2k().with_leaf_sizes(SELF_TEST_SIZES).with_top_levels(3..=3).unwrap(),
        specification::amd_v1(11, 3..=3, SELF_TEST_SIZES);
    risc_v_sv39:
        RiscV::new(3).unwrap().with_memory_types(true).with_accessed_dirty(true),
        specification::risc_v(3, true).marked_by_hardware();
    risc_v_sv48: RiscV::new(4).unwrap().with_memory_types(true), specification::risc_v(4, true);
    risc_v_sv57: RiscV::new(5).unwrap().with_memory_types(true), specification::risc_v(5, true);
    risc_v_sv39_without_napot:
        RiscV::new(3).unwrap().with_memory_types(true).with_napot(false), specification::risc_v(3, false);
    risc_v_sv57_without_napot:
        RiscV::new(5).unwrap().with_memory_types(true).with_napot(false), specification::risc_v(5, false);
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn native_4k_claiming(operations in prop::collection::vec(claiming::operation(), 1..30)) {
        claiming::agree(native(12, None), specification::native(12, 55), &operations);
    }

    #[test]
    fn native_2k_claiming(operations in prop::collection::vec(claiming::operation(), 1..30)) {
        claiming::agree(native(11, None), specification::native(11, 55), &operations);
    }

    #[test]
    fn native_without_memory(operations in operations(16)) {
        failures::survive(native(12, None), specification::native(12, 55), &operations);
    }

    #[test]
    fn vtd_without_memory(operations in operations(16)) {
        failures::survive(vtd(5), specification::vtd_second_stage(5, LARGE, false), &operations);
    }

    #[test]
    fn amd_v1_without_memory(operations in operations(16)) {
        failures::survive(AmdV1::new(), specification::amd_v1(12, 3..=6, u64::MAX), &operations);
    }

    #[test]
    fn risc_v_without_memory(operations in operations(16)) {
        let format = RiscV::new(5).unwrap().with_memory_types(true);
        failures::survive(format, specification::risc_v(5, true), &operations);
    }
}
