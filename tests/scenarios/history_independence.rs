//! History independence: a device that came and went has left no trace.
//!
//! Who asks: whoever plugs devices. "Attach A, attach B, remove B" has to give A the tables, the page sizes and the address
//! ranges that it has alone; otherwise the speed of A depends on what was plugged last week.
//!
//! - VFIO type1: the page sizes of a container are those that all its domains have had in common when a mapping was made; the
//!   ranges that a device takes out of a container are computed anew when it goes, but mappings stay as they were made.
//! - iommufd: each page table is filled for itself, so its leaves depend on its own devices only; but what was mapped while a
//!   device with larger pages was there keeps that alignment.
//! - Here the map is the native table, which knows no device, and every other table is its translation. A device that joins takes
//!   nothing away but addresses, and gives them back.
//!
//! `crates/ioasid/tests/sequences/history.rs` does it with every operation there is.

use crate::machine::{Function, K4, M2, Machine, RW, number_pages, range};
use ioasid::pagetable::Native;
use ioasid::{Account, Iova, IovaRange, Leaf, PageSize, Permissions, Space};
use ioasid_soft::iommu::TableKind;
use std::sync::Arc;

const AT: u64 = 1 << 32;
/// The interrupt window of x86, which its devices take out of the space.
const INTERRUPTS: u64 = 0xfee0_0000;

/// All that can be seen of a space and of its device A.
#[derive(Debug, PartialEq)]
struct Seen {
    native: Vec<Leaf>,
    leaves_of_a: Vec<(u64, u64)>,
    usable: Vec<IovaRange>,
    bytes: (u64, u64),
    reads: Vec<Option<u64>>,
}

fn seen(space: &Arc<Space>, a: &Function) -> Seen {
    let statistics = space.statistics();
    Seen {
        native: space.leaves(IovaRange::ALL),
        leaves_of_a: a.leaves(),
        usable: space.usable_ranges(),
        bytes: (statistics.native_table_bytes, statistics.derived_table_bytes),
        reads: (0..64).map(|page| a.read(AT + page * 37 * K4).ok()).collect(),
    }
}

/// What happens in the space between B's coming and its going.
fn live(space: &Arc<Space>, memory: &Arc<ioasid::Memory>) {
    space.map(Iova::new(AT), memory, 0, 4 * M2, RW).unwrap();
    space.unmap(range(AT + M2, M2)).unwrap();
    space.map(Iova::new(AT + M2), memory, 5 * M2, M2, Permissions::READ).unwrap();
    space.map(Iova::new(AT + 8 * M2), memory, 0, K4, RW).unwrap();
    space.map(Iova::new(AT + 8 * M2 + K4), memory, K4, 2 * K4, RW).unwrap();
    space.unmap(range(AT + 8 * M2, K4)).unwrap();
}

/// The space after a life with device A, and with B for a while if there is one.
fn after(a: TableKind, b: Option<TableKind>) -> Seen {
    let machine = Machine::new();
    let memory = machine.memory(8 * M2, &Account::new("guest", None));
    number_pages(&memory, 0..8 * 512, |page| page);
    // All formats can follow a space that is cut at 2 MiB.
    let space = Space::with_format(&machine.bus, Native::new().with_largest_leaf(PageSize::SIZE_2M));
    // Before, so that B's table is filled, too.
    space.map(Iova::new(AT + 16 * M2), &memory, M2, 2 * M2, RW).unwrap();
    let a = machine.attached(a, &space);
    let b = b.map(|kind| machine.attached(kind, &space));
    live(&space, &memory);
    if let Some(b) = &b {
        for page in 0..64 {
            assert_eq!(
                b.read(AT + page * 37 * K4),
                a.read(AT + page * 37 * K4),
                "{} beside {}",
                b.kind,
                a.kind
            );
        }
    }
    drop(b);
    seen(&space, &a)
}

#[test]
fn b_has_come_and_gone_and_a_is_as_if_it_were_alone() {
    for a in TableKind::ALL {
        let alone = after(a, None);
        assert!(alone.reads.iter().any(Option::is_some));
        for b in TableKind::ALL {
            let beside = after(a, Some(b));
            // Object by object, because output addresses are the machine's own.
            let shape = |seen: &Seen| {
                let leaf = |leaf: &Leaf| (leaf.iova, leaf.size, leaf.attributes);
                (
                    seen.native.iter().map(leaf).collect::<Vec<_>>(),
                    seen.leaves_of_a.clone(),
                    seen.usable.clone(),
                )
            };
            assert_eq!(shape(&beside), shape(&alone), "{a}, after {b}");
            assert_eq!((beside.bytes, &beside.reads), (alone.bytes, &alone.reads), "{a}, after {b}");
        }
    }
}

/// What a device takes out of the space is there again.
#[test]
fn addresses_that_b_has_reserved_come_back() {
    let machine = Machine::new();
    let memory = machine.memory(M2, &Account::new("guest", None));
    let space = Space::new(&machine.bus);
    let _a = machine.attached(TableKind::Sv57, &space);
    let usable = space.usable_ranges();
    let b = machine.attached(TableKind::VtdSecondStage39, &space);
    assert_ne!(space.usable_ranges(), usable);
    for at in [INTERRUPTS, 1 << 40] {
        assert!(space.map(Iova::new(at), &memory, 0, K4, RW).is_err());
    }
    drop(b);
    assert_eq!(space.usable_ranges(), usable);
    for at in [INTERRUPTS, 1 << 40] {
        space.map(Iova::new(at), &memory, 0, K4, RW).unwrap();
    }
}
