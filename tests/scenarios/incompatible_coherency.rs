//! Incompatible coherency: two devices in one address space, one of which can bypass the CPU's caches.
//!
//! Who asks: whoever gives a guest a graphics card, whose requests may say "no snoop", and a network card beside it. If the IOMMU
//! can override that, the guest need not know; if it cannot, KVM has to let the guest flush its caches. And it must not depend
//! on which of the two was plugged first.
//!
//! - VFIO type1 makes a second domain for a device whose IOMMU cannot enforce what the first one does, and tells KVM when any
//!   of them does not; the thread found that "an IOASID" was no single page table then.
//! - iommufd: enforcing is decided for each page table when its first device is attached; `IOMMU_HWPT_ALLOC` makes another table
//!   where devices do not go together.
//! - Here the promise is the table's, fixed when it is made. A device whose needs differ gets a second table of the same space; a
//!   table that would break its promise refuses, with a reason.

use crate::machine::{Function, K4, M2, Machine, RW, beside, number_at, number_pages, range};
use ioasid::{Account, AttachError, Coherency, Device, Iova, Memory, Rid, Space, Table};
use ioasid_soft::iommu::{Snooping, TableKind};
use std::sync::Arc;

const AT: u64 = 1 << 32;

/// The graphics card: its requests can ask not to snoop.
fn graphics(machine: &Machine, kind: TableKind) -> Function {
    let rid = Rid(0x700);
    let port = machine.iommu.add_no_snoop_device(rid, kind).unwrap();
    Function { kind, device: Device::new(machine.iommu.clone(), rid).unwrap(), port }
}

fn guest(machine: &Machine) -> (Arc<Memory>, Arc<Space>) {
    let memory = machine.memory(4 * M2, &Account::new("guest", None));
    number_pages(&memory, 0..4 * M2 / K4, |page| page);
    let space = Space::new(&machine.bus);
    space.map(Iova::new(AT), &memory, 0, 2 * M2, RW).unwrap();
    (memory, space)
}

/// What becomes of a request that asks not to snoop.
fn asks(function: &Function, iova: u64) -> Snooping {
    let mut bytes = [0; 8];
    let snooping = function.port.read_without_snooping(iova, &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), (iova - AT) / K4, "{}", function.kind);
    snooping
}

/// Where the IOMMU can, it enforces; both devices find the same memory, whatever is mapped or unmapped, in one space and two
/// tables.
#[test]
fn where_it_can_be_enforced_the_guest_need_not_know() {
    for kind in [TableKind::VtdSecondStage, TableKind::AmdV1] {
        let machine = Machine::new();
        let (memory, space) = guest(&machine);
        let (network, graphics) = (machine.attached(kind, &space), graphics(&machine, kind));
        graphics.attach(&space);
        assert_eq!(
            (graphics.table().coherency(), space.statistics().tables),
            (Coherency::Enforced, 2),
            "{kind}"
        );
        assert_eq!(network.leaves(), graphics.leaves(), "{kind}");
        let works = |round: u64| {
            let page = round % 512;
            assert_eq!(network.read(AT + page * K4), Ok(page), "{kind}");
            assert_eq!(asks(&graphics, AT + page * K4), Snooping::Enforced, "{kind}");
        };
        beside(&[&works], || {
            for _ in 0..50 {
                // What comes later is enforced, too.
                space.map(Iova::new(AT + 2 * M2), &memory, 2 * M2, 2 * M2, RW).unwrap();
                assert_eq!(asks(&graphics, AT + 3 * M2), Snooping::Enforced, "{kind}");
                assert_eq!(network.read(AT + 3 * M2), Ok(3 * M2 / K4), "{kind}");
                space.unmap(range(AT + 2 * M2, 2 * M2)).unwrap();
                assert!(graphics.read(AT + 3 * M2).is_err() && network.read(AT + 3 * M2).is_err());
            }
        });
        // One memory: what the one writes the other reads, and its owner.
        assert_eq!(
            graphics.port.write_without_snooping(AT + 8, &7u64.to_le_bytes()).unwrap(),
            Snooping::Enforced
        );
        assert_eq!((network.read(AT + 8), number_at(&memory, 8)), (Ok(7), 7), "{kind}");
    }
}

/// Where it cannot, that is said before anything has happened; who accepts it knows, and the others keep their promise.
#[test]
fn where_it_cannot_be_enforced_it_is_said() {
    for kind in [TableKind::X86_64, TableKind::Sv48] {
        let machine = Machine::new();
        let (_memory, space) = guest(&machine);
        let (network, graphics) = (machine.attached(kind, &space), graphics(&machine, kind));
        let promised = network.table();
        assert_eq!(promised.coherency(), Coherency::Enforced, "{kind}");
        let refused = graphics.device.attach(&promised).unwrap_err();
        assert!(matches!(refused, AttachError::Incoherent(rid) if rid == graphics.device.rid()), "{refused}");
        let refused = Table::with_coherency(&space, &graphics.device, Coherency::Enforced).unwrap_err();
        assert!(matches!(refused, AttachError::Incoherent(_)), "{refused}");
        assert_eq!((space.statistics().tables, graphics.device.table().is_none()), (1, true), "{kind}");
        // As requested: this is what a VMM tells KVM.
        graphics.attach(&space);
        assert_eq!(graphics.table().coherency(), Coherency::AsRequested);
        assert_eq!(asks(&graphics, AT), Snooping::Bypassed, "{kind}");
        assert!(Arc::ptr_eq(&promised, &network.table()), "{kind}: the other one stays where it is");
        assert_eq!(network.faults(), 0);
    }
}

/// The graphics card first, the network card first, the graphics card gone again: what the network card has is the same.
#[test]
fn whoever_came_first_makes_no_difference() {
    for kind in
        [TableKind::VtdSecondStage, TableKind::AmdV1, TableKind::X86_64, TableKind::Sv48, TableKind::Native]
    {
        let has = |first: bool, there: bool, stays: bool| {
            let machine = Machine::new();
            let (_memory, space) = guest(&machine);
            let graphics = there.then(|| graphics(&machine, kind));
            let network = machine.device(kind);
            let attach = |function: Option<&Function>| {
                function.map(|function| function.attach(&space));
            };
            if first {
                attach(graphics.as_ref());
                attach(Some(&network));
            } else {
                attach(Some(&network));
                attach(graphics.as_ref());
            }
            let graphics = graphics.filter(|_| stays);
            let bytes = graphics.is_none().then(|| space.statistics().derived_table_bytes);
            (network.leaves(), network.table().coherency(), network.read(AT + 5 * K4), bytes)
        };
        let alone = has(false, false, false);
        for (first, stays) in [(true, false), (false, false)] {
            assert_eq!(has(first, true, stays), alone, "{kind}");
        }
        let (leaves, coherency, read, _) = alone;
        for first in [true, false] {
            let (with_leaves, with_coherency, with_read, _) = has(first, true, true);
            assert_eq!((with_leaves, with_coherency, with_read), (leaves.clone(), coherency, read), "{kind}");
        }
    }
}
