//! From bypass to gIOVA: a guest's driver turns its IOMMU on while the device works.
//!
//! Who asks: whoever runs a guest with an emulated IOMMU. Firmware and boot loader use the device in bypass: its addresses are
//! guest-physical ones. Then the guest's kernel puts the device into a domain of its own, with 4 KiB mappings. The RFC calls
//! these two address spaces without nesting, between which a device moves.
//!
//! - VFIO type1: one container is one address space. QEMU unmaps all of the guest's memory and maps the new addresses one by
//!   one, and unpins and pins the memory on the way; a device that works meanwhile faults.
//! - iommufd: `VFIO_DEVICE_ATTACH_IOMMUFD_PT` again replaces the page table, where the driver can; both spaces pin by themselves
//!   unless one is a copy of the other.
//! - Here replacing is one step for every format: every DMA goes through the one space or the other. The memory is charged once.

use crate::machine::{Function, G1, K4, Machine, RW, beside, number_pages, range};
use ioasid::{Account, Iova, Space};
use ioasid_soft::dma::DmaFaultReason;
use ioasid_soft::iommu::TableKind;
use std::sync::Arc;

/// An address in both spaces: the page of the guest at it, and another one.
const SHARED: u64 = 0x10_0000;
const ELSEWHERE: u64 = 0x20_0000;
const ROUNDS: u64 = 300;

fn page_at(function: &Function, iova: u64) -> Result<u64, DmaFaultReason> {
    function.read(iova)
}

#[test]
fn a_device_moves_between_spaces_while_it_works() {
    let kinds =
        [TableKind::Native, TableKind::VtdSecondStage, TableKind::AmdV1, TableKind::X86_64, TableKind::Sv48];
    for kind in kinds {
        let machine = Machine::new();
        let account = Account::new("guest", Some(G1 / K4));
        let ram = machine.memory(G1, &account);
        number_pages(&ram, 0..2048, |page| page);
        // Guest-physical addresses, in one leaf where there is one; the interrupt window is far above.
        let physical = Space::new(&machine.bus);
        physical.map(Iova::new(0), &ram, 0, G1, RW).unwrap();
        let virtual_: Arc<Space> = Space::new(&machine.bus);
        virtual_.map(Iova::new(SHARED), &ram, ELSEWHERE, K4, RW).unwrap();
        // Both need no more than was charged for one.
        assert_eq!(account.charged_pages(), G1 / K4);

        let moving = machine.attached(kind, &physical);
        let staying = machine.attached(kind, &physical);
        let (mover, stayer) = (&moving, &staying);
        let works = |_| {
            let page = page_at(mover, SHARED);
            assert!(page == Ok(SHARED / K4) || page == Ok(ELSEWHERE / K4), "{kind}: {page:?}");
        };
        let stays = |round| {
            let page = round % 2048;
            assert_eq!(page_at(stayer, page * K4), Ok(page), "{kind}");
        };
        beside(&[&works, &stays], || {
            for _ in 0..ROUNDS {
                moving.attach(&virtual_);
                // From now on nothing but what the guest has mapped is in reach.
                assert_eq!(page_at(&moving, SHARED), Ok(ELSEWHERE / K4), "{kind}");
                // The guest's driver maps and unmaps meanwhile.
                let at = 0x40_0000;
                virtual_.map(Iova::new(at), &ram, 5 * K4, K4, RW).unwrap();
                assert_eq!(page_at(&moving, at), Ok(5), "{kind}");
                assert_eq!(virtual_.unmap(range(at, K4)).unwrap().bytes(), K4);
                moving.attach(&physical);
                assert_eq!(page_at(&moving, SHARED), Ok(SHARED / K4), "{kind}");
            }
            moving.attach(&virtual_);
        });
        assert_eq!((moving.faults(), staying.faults()), (0, 0), "{kind}");
        assert_eq!(
            page_at(&moving, ELSEWHERE),
            Err(DmaFaultReason::NotMapped),
            "{kind}: the rest of the guest"
        );
        // The table of a space goes with its last device: the other one's is still there.
        assert_eq!((physical.statistics().tables, virtual_.statistics().tables), (1, 1));
        assert_eq!((account.charged_pages(), account.peak_pages()), (G1 / K4, G1 / K4));
        drop(moving);
        assert_eq!(virtual_.statistics().tables, 0);
    }
}
