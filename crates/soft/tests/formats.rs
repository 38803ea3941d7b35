//! Devices on tables of every format: what is mapped is reached in that format, and what a format cannot do while devices
//! use it is refused as a whole.

use ioasid::pagetable::Native;
use ioasid::{
    Account, Backing, Bus, Device, Iova, IovaRange, MapError, Memory, PageSize, Permissions, ProtectError,
    RemapError, Rid, Space, Table, TableError, UnmapError,
};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use std::sync::Arc;

const K4: u64 = 4 << 10;
const K64: u64 = 64 << 10;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const RW: Permissions = Permissions::READ_WRITE;

/// A machine with one device of each kind of table, and some memory.
struct Machine {
    bus: Arc<Bus>,
    iommu: Arc<SoftIommu>,
    memory: Arc<Memory>,
}

impl Machine {
    fn new() -> Machine {
        let bus = Bus::new();
        let backing = Backing::anonymous(&bus, G1).unwrap();
        let memory = Memory::register(&backing, 0, G1, &Account::new("test", None)).unwrap();
        Machine { bus, iommu: SoftIommu::new(), memory }
    }

    fn attach(&self, kind: TableKind, space: &Arc<Space>) -> Attached {
        let rid = Rid(8 * TableKind::ALL.iter().position(|other| *other == kind).unwrap() as u16);
        let port = self.iommu.add_device(rid, kind).unwrap();
        let device = Device::new(self.iommu.clone(), rid).unwrap();
        let table = Table::for_device(space, &device).unwrap();
        device.attach(&table).unwrap();
        Attached { kind, port, table, device }
    }

    fn byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.memory.backing().read(offset, &mut byte).unwrap();
        byte[0]
    }
}

/// A device on a table of its kind.
struct Attached {
    kind: TableKind,
    port: Arc<Port>,
    table: Arc<Table>,
    device: Device,
}

impl Attached {
    /// Writes a byte there, reads it back, and looks for it in memory.
    fn reaches(&self, machine: &Machine, iova: u64, offset: u64) {
        let wanted = machine.byte(offset).wrapping_add(1);
        self.port.write(iova, &[wanted]).unwrap_or_else(|fault| panic!("{}: {fault}", self.kind));
        let mut byte = [0];
        self.port.read(iova, &mut byte).unwrap_or_else(|fault| panic!("{}: {fault}", self.kind));
        assert_eq!((byte[0], machine.byte(offset)), (wanted, wanted), "{} at {iova:#x}", self.kind);
    }

    fn read_fails(&self, iova: u64) -> DmaFaultReason {
        self.port.read(iova, &mut [0]).expect_err(self.kind.name()).reason
    }

    fn write_fails(&self, iova: u64) -> DmaFaultReason {
        self.port.write(iova, &[0xee]).expect_err(self.kind.name()).reason
    }

    fn sizes(&self) -> Vec<(u64, u64)> {
        let leaves = self.table.leaves_by_size().unwrap();
        leaves.into_iter().map(|(size, count)| (size.bytes(), count)).collect()
    }
}

/// What a format is known for, as its specification has it.
#[derive(Clone, Copy)]
struct Facts {
    last: u64,
    /// Leaves of 2 MiB and more can be cut and joined while devices use them.
    resizes: bool,
    /// Permissions and outputs of leaves of one entry can be changed while devices use them.
    changes: bool,
    /// What may be written may be read.
    write_is_read: bool,
    /// The leaves that 4 MiB and 64 KiB of memory make, as aligned as can be.
    leaves: &'static [(u64, u64)],
}

fn facts(kind: TableKind) -> Facts {
    let plain =
        Facts { last: 0, resizes: true, changes: true, write_is_read: false, leaves: &[(K4, 16), (M2, 2)] };
    let risc_v = Facts { changes: false, write_is_read: true, leaves: &[(K64, 1), (M2, 2)], ..plain };
    match kind {
        TableKind::Native => Facts { last: u64::MAX, ..plain },
        TableKind::VtdSecondStage39 => Facts { last: (1 << 39) - 1, ..plain },
        TableKind::VtdSecondStage => Facts { last: (1 << 48) - 1, ..plain },
        TableKind::VtdSecondStage57 => Facts { last: (1 << 57) - 1, ..plain },
        TableKind::AmdV1 => {
            Facts { last: u64::MAX, resizes: false, leaves: &[(K64, 1), (2 * M2, 1)], ..plain }
        }
        TableKind::X86_64 => Facts { last: (1 << 47) - 1, write_is_read: true, ..plain },
        TableKind::X86_64La57 => Facts { last: (1 << 56) - 1, write_is_read: true, ..plain },
        TableKind::Sv39 => Facts { last: (1 << 38) - 1, ..risc_v },
        TableKind::Sv48 => Facts { last: (1 << 47) - 1, ..risc_v },
        TableKind::Sv57 => Facts { last: (1 << 56) - 1, ..risc_v },
    }
}

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// Where the tests map: 4 MiB and 64 KiB, each aligned to its size.
const LARGE: u64 = 4 * G1;
const SMALL: u64 = LARGE + 8 * M2;

#[test]
fn a_device_of_every_kind_reaches_what_is_mapped_by_its_own_table() {
    for kind in TableKind::ALL {
        let (machine, facts) = (Machine::new(), facts(kind));
        let space = Space::new(&machine.bus);
        let attached = machine.attach(kind, &space);
        let aperture = attached.device.requirements().aperture;
        assert_eq!((aperture.first(), aperture.last()), (0, facts.last), "{kind}");

        assert_eq!(attached.read_fails(LARGE), DmaFaultReason::NotMapped);
        space.map(Iova::new(LARGE), &machine.memory, 0, 2 * M2, RW).unwrap();
        space.map(Iova::new(SMALL), &machine.memory, 4 * M2, K64, RW).unwrap();
        assert_eq!(attached.sizes(), facts.leaves, "{kind}");
        for offset in [0, K4, M2 - 1, M2, 2 * M2 - 1] {
            attached.reaches(&machine, LARGE + offset, offset);
        }
        for offset in [0, K4 + 5, K64 - 1] {
            attached.reaches(&machine, SMALL + offset, 4 * M2 + offset);
        }
        assert_eq!(attached.read_fails(LARGE + 2 * M2), DmaFaultReason::NotMapped);
        assert_eq!(attached.write_fails(SMALL + K64), DmaFaultReason::NotMapped);

        // The last page that it can translate, and the one behind it.
        let last_page = facts.last - (K4 - 1);
        space.map(Iova::new(last_page), &machine.memory, 8 * M2, K4, RW).unwrap();
        attached.reaches(&machine, facts.last, 8 * M2 + K4 - 1);
        if let Some(beyond) = facts.last.checked_add(1) {
            let refused = space.map(Iova::new(beyond), &machine.memory, 0, K4, RW);
            assert!(matches!(refused, Err(MapError::Reserved { .. })), "{kind}: {refused:?}");
            assert_eq!(attached.read_fails(beyond), DmaFaultReason::OutOfRange, "{kind}");
        }

        // What another table says is nothing to it: here its own says less than the space's.
        if let Some(derived) = attached.table.derived() {
            derived.unmap(range(SMALL, K64));
            assert!(space.walk(Iova::new(SMALL)).is_some());
            assert_eq!(attached.read_fails(SMALL), DmaFaultReason::NotMapped);
        }
        let unmapped = space.unmap(IovaRange::ALL).unwrap();
        assert_eq!(unmapped.bytes(), 2 * M2 + K64 + K4);
        assert_eq!(attached.sizes(), []);
        for iova in [LARGE, SMALL, facts.last] {
            assert_eq!(attached.read_fails(iova), DmaFaultReason::NotMapped, "{kind}");
        }
        let faults = attached.port.take_faults().records;
        assert_eq!(attached.port.statistics().faults, faults.len() as u64);
    }
}

#[test]
fn permissions_are_those_that_the_format_can_say() {
    for kind in TableKind::ALL {
        let (machine, facts) = (Machine::new(), facts(kind));
        let space = Space::new(&machine.bus);
        let attached = machine.attach(kind, &space);
        space.map(Iova::new(LARGE), &machine.memory, 0, 2 * M2, Permissions::READ).unwrap();
        space.map(Iova::new(SMALL), &machine.memory, 0, 2 * M2, Permissions::WRITE).unwrap();
        attached.port.read(LARGE, &mut [0]).unwrap();
        attached.port.write(SMALL, &[1]).unwrap();
        assert_eq!(attached.write_fails(LARGE), DmaFaultReason::NoPermission);
        assert_eq!(machine.byte(0), 1);
        if facts.write_is_read {
            attached.port.read(SMALL, &mut [0]).unwrap();
        } else {
            assert_eq!(attached.read_fails(SMALL), DmaFaultReason::NoPermission);
        }

        // A right that is taken from a whole mapping.
        let protected = space.protect(range(SMALL, 2 * M2), Permissions::READ);
        if facts.changes {
            assert_eq!(protected.unwrap(), 2 * M2);
            attached.port.read(SMALL, &mut [0]).unwrap();
            assert_eq!(attached.write_fails(SMALL), DmaFaultReason::NoPermission);
        } else {
            assert!(matches!(protected, Err(ProtectError::Table(TableError::NeedsBreak { .. }))), "{kind}");
            attached.port.write(SMALL, &[2]).unwrap();
            assert_eq!(space.walk(Iova::new(SMALL)).unwrap().attributes, Permissions::WRITE.attributes());
            // The break, by the caller.
            space.unmap(range(SMALL, 2 * M2)).unwrap();
            space.map(Iova::new(SMALL), &machine.memory, 0, 2 * M2, Permissions::READ).unwrap();
            assert_eq!(attached.write_fails(SMALL), DmaFaultReason::NoPermission);
        }
    }
}

#[test]
fn a_piece_is_cut_out_and_merged_again_where_the_format_allows_it() {
    for kind in TableKind::ALL {
        let (machine, facts) = (Machine::new(), facts(kind));
        let space = Space::new(&machine.bus);
        let attached = machine.attach(kind, &space);
        space.map(Iova::new(LARGE), &machine.memory, 0, 2 * M2, RW).unwrap();
        let (hole, whole) = (LARGE + M2 - K4, attached.sizes());
        let unmapped = space.unmap(range(hole, 2 * K4));
        if facts.resizes {
            assert_eq!(unmapped.unwrap().bytes(), 2 * K4);
            for offset in [0, M2 - K4 - 1, M2 + K4, 2 * M2 - 1] {
                attached.reaches(&machine, LARGE + offset, offset);
            }
            for iova in [hole, hole + 2 * K4 - 1] {
                assert_eq!(attached.read_fails(iova), DmaFaultReason::NotMapped);
            }
            // A DMA over the hole moves nothing.
            let before = machine.byte(M2 - K4 - 1);
            let fault = attached.port.write(hole - 1, &[before.wrapping_add(7); 2]).unwrap_err();
            assert_eq!((fault.iova, fault.reason), (hole, DmaFaultReason::NotMapped));
            assert_eq!(machine.byte(M2 - K4 - 1), before);
            assert_eq!(attached.sizes(), [(K4, 1022)], "{kind}");
            space.map(Iova::new(hole), &machine.memory, M2 - K4, 2 * K4, RW).unwrap();
            assert!(space.merge(range(LARGE, 2 * M2)) > 0);
            assert_eq!(attached.sizes(), whole);
        } else {
            // Refused as a whole, natively too, and nobody was disturbed. That the native leaves are smaller now is
            // all that it leaves behind.
            assert!(matches!(unmapped, Err(UnmapError::Table(TableError::CannotCut { .. }))), "{kind}");
            assert_eq!(space.statistics().mapped_bytes, 2 * M2);
            assert_eq!(attached.sizes(), whole);
        }
        for offset in [0, M2 - K4, M2, 2 * M2 - 1] {
            attached.reaches(&machine, LARGE + offset, offset);
        }
    }
}

#[test]
fn a_space_with_a_cut_granule_can_be_cut_there_whatever_the_format() {
    for (kind, granule) in TableKind::ALL.iter().flat_map(|kind| [(*kind, K4), (*kind, M2)]) {
        let machine = Machine::new();
        let largest = PageSize::from_log2(granule.trailing_zeros()).unwrap();
        let space = Space::with_format(&machine.bus, Native::new().with_largest_leaf(largest));
        let attached = machine.attach(kind, &space);
        // In one call, and in pieces that would make other large leaves.
        space.map(Iova::new(LARGE), &machine.memory, 0, 2 * M2, RW).unwrap();
        space.map(Iova::new(LARGE + 2 * M2), &machine.memory, 2 * M2, 4 * M2, RW).unwrap();
        for hole in [LARGE + granule, LARGE + 3 * M2] {
            assert_eq!(space.unmap(range(hole, granule)).unwrap().bytes(), granule, "{kind}");
            assert_eq!(attached.read_fails(hole), DmaFaultReason::NotMapped);
            attached.reaches(&machine, hole - 1, hole - LARGE - 1);
            attached.reaches(&machine, hole + granule, hole - LARGE + granule);
        }
    }
}

#[test]
fn a_leaf_of_several_entries_is_never_changed_in_place() {
    for kind in [TableKind::AmdV1, TableKind::Sv39, TableKind::Sv48, TableKind::Sv57] {
        let machine = Machine::new();
        let space = Space::new(&machine.bus);
        let attached = machine.attach(kind, &space);
        space.map(Iova::new(SMALL), &machine.memory, 0, K64, RW).unwrap();
        assert_eq!(attached.sizes(), [(K64, 1)], "{kind}");
        let remapped = space.remap(Iova::new(SMALL), &machine.memory, M2, K64, RW);
        assert!(matches!(remapped, Err(RemapError::Table(TableError::NeedsBreak { .. }))), "{remapped:?}");
        let unmapped = space.unmap(range(SMALL + K4, K4));
        assert!(matches!(unmapped, Err(UnmapError::Table(TableError::CannotCut { .. }))), "{unmapped:?}");
        assert_eq!(attached.sizes(), [(K64, 1)], "{kind}");
        attached.reaches(&machine, SMALL + K4, K4);
    }
}

#[test]
fn memory_is_exchanged_below_a_device_or_the_format_says_that_it_cannot() {
    for kind in TableKind::ALL {
        let (machine, facts) = (Machine::new(), facts(kind));
        let space = Space::new(&machine.bus);
        let attached = machine.attach(kind, &space);
        // A leaf of one entry in every format.
        space.map(Iova::new(LARGE), &machine.memory, 0, M2, RW).unwrap();
        let remapped = space.remap(Iova::new(LARGE), &machine.memory, 4 * M2, M2, RW);
        if facts.changes {
            remapped.unwrap();
            attached.reaches(&machine, LARGE + K4, 4 * M2 + K4);
            assert_eq!(machine.byte(K4), 0);
        } else {
            assert!(matches!(remapped, Err(RemapError::Table(TableError::NeedsBreak { .. }))), "{kind}");
            attached.reaches(&machine, LARGE + K4, K4);
        }
    }
}

#[test]
fn devices_of_every_kind_share_a_space() {
    let machine = Machine::new();
    let space = Space::new(&machine.bus);
    space.map(Iova::new(LARGE), &machine.memory, 0, 2 * M2, RW).unwrap();
    let all = TableKind::ALL.map(|kind| machine.attach(kind, &space));
    assert_eq!(space.statistics().tables, all.len());
    space.map(Iova::new(SMALL), &machine.memory, 4 * M2, K64, RW).unwrap();
    for attached in &all {
        attached.reaches(&machine, LARGE + M2, M2);
        attached.reaches(&machine, SMALL + K4, 4 * M2 + K4);
    }
    // One that cannot be cut is enough for a refusal, and then all translate as before.
    let refused = space.unmap(range(LARGE + M2, K4));
    assert!(matches!(refused, Err(UnmapError::Table(TableError::CannotCut { at })) if at == LARGE + M2 + K4));
    for attached in &all {
        attached.reaches(&machine, LARGE + M2, M2);
    }
    assert_eq!(space.unmap(range(LARGE, 2 * M2)).unwrap().bytes(), 2 * M2);
    for attached in &all {
        assert_eq!(attached.read_fails(LARGE), DmaFaultReason::NotMapped);
        attached.reaches(&machine, SMALL, 4 * M2);
        attached.device.detach();
        assert_eq!(attached.read_fails(SMALL), DmaFaultReason::Blocked);
    }
}

#[test]
fn kinds_are_read_by_the_names_they_are_shown_by() {
    for kind in TableKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    assert_eq!("riscv".parse(), Ok(TableKind::Sv48));
    for wrong in ["", "VTD", "vtd48", "arm"] {
        let error = wrong.parse::<TableKind>().unwrap_err().to_string();
        assert!(TableKind::ALL.iter().all(|kind| error.contains(kind.name())), "{error}");
    }
}
