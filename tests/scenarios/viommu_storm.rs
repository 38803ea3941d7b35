//! A storm: a guest with an IOMMU of its own maps and unmaps 4 KiB for each network packet.
//!
//! Who asks: whoever runs a guest whose kernel has `iommu.strict=1`. Mappings live for microseconds, and there are a million of
//! them in a second.
//!
//! - VFIO type1: each map pins its pages, walks the process's page tables, charges `RLIMIT_MEMLOCK` and takes a node of a
//!   red-black tree below one mutex; each unmap gives all of it back. And 65,535 at a time is all there are.
//! - iommufd: a map of 4 KiB pins as well, unless the VMM keeps a second address space with everything in it and uses
//!   `IOMMU_IOAS_COPY`; an unmap of exactly what was copied is all that it does then.
//! - Here the guest's memory is registered once. A map is a claim in a table: it pins nothing, charges nothing, and two devices
//!   do not meet.

use crate::machine::{G1, K4, M2, Machine, RW, number_pages, range};
use ioasid::pagetable::HeapTables;
use ioasid::{Account, Iova, Space};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::TableKind;
use std::sync::Barrier;

/// How many packets each queue sends.
const PACKETS: u64 = if cfg!(debug_assertions) { 20_000 } else { 500_000 };
/// How many of them are under way at a time.
const RING: u64 = 64;
/// What one queue has of the addresses.
const PART: u64 = 16 * M2;

#[test]
fn short_lived_mappings_pin_and_charge_nothing() {
    let machine = Machine::new();
    let account = Account::new("guest", Some(G1 / K4));
    // All that the guest has is what the limit allows: nothing could be charged a second time.
    let ram = machine.memory(G1, &account);
    number_pages(&ram, 0..4096, |page| page);
    let space = Space::new(&machine.bus);
    let queues = [TableKind::VtdSecondStage, TableKind::VtdSecondStage, TableKind::X86_64];
    let queues = queues.map(|kind| machine.attached(kind, &space));
    let tables_before = HeapTables::bytes_in_use();
    let start = Barrier::new(queues.len());
    std::thread::scope(|scope| {
        for (number, queue) in (0..).zip(&queues) {
            let (space, ram, start) = (&space, &ram, &start);
            scope.spawn(move || {
                start.wait();
                let base = G1 + number * PART;
                let place = |packet: u64| base + packet % (2 * RING) * K4;
                let page = |packet: u64| (packet * 7 + number) % 4096;
                for packet in 0..PACKETS + RING {
                    if packet >= RING {
                        // What was sent is taken back, and is out of the device's reach at once.
                        let sent = packet - RING;
                        assert_eq!(space.unmap(range(place(sent), K4)).unwrap().bytes(), K4);
                        if sent % 64 == 0 {
                            assert_eq!(queue.read(place(sent)), Err(DmaFaultReason::NotMapped));
                        }
                    }
                    if packet < PACKETS {
                        space.map(Iova::new(place(packet)), ram, page(packet) * K4, K4, RW).unwrap();
                        let mut header = [0; 8];
                        queue.port.read(place(packet), &mut header).unwrap();
                        assert_eq!(u64::from_le_bytes(header), page(packet), "{}", queue.kind);
                    }
                }
            });
        }
    });
    for queue in &queues {
        assert_eq!(queue.faults(), PACKETS.div_ceil(64), "{}: others than those that had to be", queue.kind);
    }
    // Nothing was pinned or charged on the way, and nothing is left.
    assert_eq!((account.charged_pages(), account.peak_pages(), account.failures()), (G1 / K4, G1 / K4, 0));
    assert_eq!(ram.backing().holds(0, G1), 1..=1);
    assert_eq!((space.statistics().mapped_bytes, space.statistics().busy_bytes), (0, 0));
    ioasid::epoch::free_retired();
    // The way to the leaves may stay. Other scenarios of this process have tables, too; a page for each packet would be more.
    let left = HeapTables::bytes_in_use().saturating_sub(tables_before);
    assert!(left < PACKETS * K4, "{left} bytes of tables are left");
}
