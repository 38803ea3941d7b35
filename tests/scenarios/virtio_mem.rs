//! virtio-mem: 2 MiB are unplugged out of a gibibyte that was mapped with one call.
//!
//! Who asks: whoever gives a guest memory that can shrink. The guest's memory is mapped for its devices in one call, and has the
//! largest leaf there is; later the guest gives a block of 2 MiB back, while its devices work on everything else.
//!
//! - VFIO type1: version 1 says it has unmapped nothing, or the whole gibibyte if it likes; version 2 refuses. So QEMU maps
//!   512 pieces of 2 MiB from the beginning, and type1's `dma_entry_limit` of 65,535 is 128 GiB then.
//! - iommufd: `IOMMU_IOAS_UNMAP` of a part of an area is `ENOENT`.
//! - Here: exactly the block goes. What is left has the largest leaves that are legal, and not one DMA beside it faults.
//!
//! `crates/soft/tests/virtio_mem` does it a million times.

use crate::machine::{Function, G1, K4, M2, Machine, RW, beside, number_at, number_pages, range};
use ioasid::pagetable::Native;
use ioasid::{Account, Iova, PageSize, Space};
use ioasid_soft::dma::DmaFaultReason;
use ioasid_soft::iommu::TableKind;

/// Where the guest has its memory, and where the block is in it.
const GUEST: u64 = 4 * G1;
const BLOCK: u64 = 200 * M2;
/// The pages on both sides of the block.
const BEFORE: u64 = BLOCK - K4;
const BEHIND: u64 = BLOCK + M2;

fn name(page: u64) -> u64 {
    0x5ca1_ab1e_0000_0000 | page
}

/// Reads what the neighbours say and writes to them, too.
fn works_beside_the_block(function: &Function, round: u64) {
    for offset in [BEFORE, BEHIND, 0, G1 - K4, BEFORE - round % 64 * K4, BEHIND + round % 64 * K4] {
        assert_eq!(function.read(GUEST + offset), Ok(name(offset / K4)), "{} at {offset:#x}", function.kind);
        // A place for each device.
        let place = GUEST + offset + 8 * u64::from(function.device.rid().0);
        assert_eq!(function.write(place, round), Ok(()), "{} at {offset:#x}", function.kind);
        assert_eq!(function.read(place), Ok(round), "{} at {offset:#x}", function.kind);
    }
}

/// Maps, unplugs a block and then a page of another, plugs all in again, and merges; with the leaves that each device has to
/// have at these four moments.
fn unplug(kinds: &[TableKind], largest_leaf: PageSize, leaves: [&[(u64, u64)]; 4], page_too: bool) {
    let machine = Machine::new();
    let account = Account::new("guest", None);
    let ram = machine.memory(G1, &account);
    number_pages(&ram, (0..64).chain([G1 / K4 - 1]), name);
    number_pages(&ram, BEFORE / K4 - 64..BEHIND / K4 + 64, name);
    let space = Space::with_format(&machine.bus, Native::new().with_largest_leaf(largest_leaf));
    let functions: Vec<Function> = kinds.iter().map(|kind| machine.attached(*kind, &space)).collect();
    let have = |leaves: &[(u64, u64)]| {
        functions.iter().for_each(|function| assert_eq!(function.leaves(), leaves, "{}", function.kind));
    };

    // One call.
    space.map(Iova::new(GUEST), &ram, 0, G1, RW).unwrap();
    have(leaves[0]);
    let dma: Vec<_> =
        functions.iter().map(|function| |round| works_beside_the_block(function, round)).collect();
    let dma: Vec<&(dyn Fn(u64) + Sync)> = dma.iter().map(|dma| dma as _).collect();
    let page = range(GUEST + 300 * M2 + 7 * K4, K4);
    beside(&dma, || {
        let unmapped = space.unmap(range(GUEST + BLOCK, M2)).unwrap();
        assert_eq!(unmapped.runs().collect::<Vec<_>>(), [range(GUEST + BLOCK, M2)]);
        have(leaves[1]);
        if page_too {
            assert_eq!(space.unmap(page).unwrap().bytes(), K4);
            have(leaves[2]);
        }
    });
    assert!(functions.iter().all(|function| function.faults() == 0), "neighbours have faulted");

    // The block is out of reach, from end to end, and nothing of it is written.
    for (function, offset) in functions.iter().zip([0, M2 - 8, K4].into_iter().cycle()) {
        assert_eq!(function.write(GUEST + BLOCK + offset, 1), Err(DmaFaultReason::NotMapped));
        assert_eq!(function.read(GUEST + BLOCK + offset), Err(DmaFaultReason::NotMapped));
        assert_eq!(function.faults(), 2);
    }
    assert_eq!(number_at(&ram, BLOCK), name(BLOCK / K4));
    // The block's memory goes back to the host, and is charged no more.
    assert_eq!(account.charged_pages(), G1 / K4);
    ram.release(BLOCK, M2).unwrap();
    assert_eq!(account.charged_pages(), (G1 - M2) / K4);

    // It is plugged in again.
    let again = ioasid::Memory::register(ram.backing(), BLOCK, M2, &account).unwrap();
    beside(&dma, || {
        space.map(Iova::new(GUEST + BLOCK), &again, 0, M2, RW).unwrap();
        if page_too {
            space.map(Iova::new(page.first()), &ram, page.first() - GUEST, K4, RW).unwrap();
        }
        space.merge(range(GUEST, G1));
        have(leaves[3]);
    });
    for function in &functions {
        assert_eq!(function.read(GUEST + BLOCK), Ok(name(BLOCK / K4)));
        assert_eq!(function.faults(), 2, "{}", function.kind);
    }
}

#[test]
fn a_block_goes_and_nobody_beside_it_notices() {
    let whole = [(G1, 1)];
    let hole = [(M2, 511)];
    let holes = [(K4, 511), (M2, 510)];
    unplug(
        &[TableKind::VtdSecondStage, TableKind::X86_64, TableKind::Sv48, TableKind::Native],
        PageSize::SIZE_1G,
        [&whole, &hole, &holes, &whole],
        true,
    );
}

/// AMD's format may not be cut while devices use it. A space that says how finely it will be cut has leaves of that size from
/// the beginning, with one call all the same.
#[test]
fn a_table_that_cannot_be_cut_has_blocks_from_the_beginning() {
    let (whole, hole) = ([(M2, 512)], [(M2, 511)]);
    let leaves: [&[(u64, u64)]; 4] = [&whole, &hole, &hole, &whole];
    unplug(&[TableKind::AmdV1], PageSize::SIZE_2M, leaves, false);
}
