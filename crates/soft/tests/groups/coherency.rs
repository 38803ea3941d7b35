//! Devices whose requests can bypass the CPU's caches, and tables that do not let them.

use super::{AT, DISK, Machine, NETWORK, PAGE, SOUND, table};
use ioasid::pagetable::{AmdV1, Format, VtdSecondStage};
use ioasid::{
    Account, AttachError, Attributes, Backing, Coherency, Device, DeviceOwner, Iova, IovaRange, Leaf, Memory,
    Oa, Permissions, RadixTable, Rid, Space, Table,
};
use ioasid_soft::iommu::{Port, Snooping, SoftIommu, TableKind};
use proptest::prelude::*;
use std::ops::ControlFlow;
use std::sync::Arc;

const SNOOPS: Rid = Rid(0x0500);
const MAY_NOT: Rid = Rid(0x0600);

/// A device that always snoops, and one that may not.
fn devices(machine: &Machine, kind: TableKind) -> (Device, Device, Arc<Port>) {
    machine.iommu.add_device(SNOOPS, kind).unwrap();
    let port = machine.iommu.add_no_snoop_device(MAY_NOT, kind).unwrap();
    let device = |rid| Device::new(machine.iommu.clone(), rid).unwrap();
    (device(SNOOPS), device(MAY_NOT), port)
}

fn bypasses(port: &Port) -> [Snooping; 2] {
    [
        port.write_without_snooping(AT + 8, &[1]).unwrap(),
        port.read_without_snooping(AT, &mut [0; 16]).unwrap(),
    ]
}

fn leaves_of<F: Format>(table: &Table) -> Option<Vec<Leaf>> {
    let radix = table.derived()?.as_any().downcast_ref::<RadixTable<F>>()?;
    let mut leaves = Vec::new();
    radix.radix().leaves(IovaRange::ALL, |leaf| {
        leaves.push(leaf);
        ControlFlow::Continue(())
    });
    Some(leaves)
}

/// All leaves of a table, with their attributes.
fn leaves(table: &Table) -> Vec<Leaf> {
    leaves_of::<VtdSecondStage>(table).or_else(|| leaves_of::<AmdV1>(table)).unwrap()
}

/// What one device of a group can use need not be for those that would go along.
#[test]
fn a_group_does_not_move_where_one_of_it_would_be_incoherent() {
    let machine = Machine::new();
    machine.iommu.add_device(DISK, TableKind::VtdSecondStage).unwrap();
    let port = machine.iommu.add_no_snoop_device(NETWORK, TableKind::VtdSecondStage).unwrap();
    let guest = DeviceOwner::new("the guest");
    let [disk, network] = [DISK, NETWORK].map(|rid| machine.bind(rid, &guest).unwrap());
    let spaces = [machine.space(), machine.space()];
    let enforcing = table(&spaces[0], &network);
    [&disk, &network].iter().for_each(|device| device.attach(&enforcing).unwrap());
    // Requests of the disk snoop anyhow, so its own table need not have them do so.
    let refused = disk.attach(&table(&spaces[1], &disk)).unwrap_err();
    assert!(matches!(refused, AttachError::Incoherent(NETWORK)), "{refused}");
    assert!([&disk, &network].iter().all(|device| Arc::ptr_eq(&device.table().unwrap(), &enforcing)));
    disk.attach(&table(&spaces[1], &network)).unwrap();
    assert!(Arc::ptr_eq(network.table().unwrap().space(), &spaces[1]));
    assert_eq!(bypasses(&port), [Snooping::Enforced; 2]);
}

#[test]
fn a_table_that_enforces_snooping_overrides_what_requests_ask() {
    for kind in [TableKind::VtdSecondStage, TableKind::AmdV1] {
        let machine = Machine::new();
        let space = machine.space();
        let (snoops, may_not, port) = devices(&machine, kind);
        snoops.attach(&table(&space, &snoops)).unwrap();
        assert_eq!(may_not.coherency(), Coherency::Enforced);
        may_not.attach(&table(&space, &may_not)).unwrap();
        assert_eq!(bypasses(&port), [Snooping::Enforced; 2]);
        // Needs differ, so the space has grown a second table, with the same translations.
        assert_eq!(space.statistics().tables, 2);
        let (plain, enforcing) = (snoops.table().unwrap(), may_not.table().unwrap());
        let forced: Vec<Leaf> = leaves(&plain)
            .into_iter()
            .map(|leaf| Leaf { attributes: leaf.attributes | Attributes::FORCE_SNOOP, ..leaf })
            .collect();
        let unmarked = |leaves: Vec<Leaf>| -> Vec<Leaf> {
            let unmarked = |leaf: Leaf| Leaf { attributes: leaf.attributes - Attributes::USED, ..leaf };
            leaves.into_iter().map(unmarked).collect()
        };
        assert_eq!(unmarked(leaves(&enforcing)), unmarked(forced));

        // What is asked for is had.
        let as_requested = Table::with_coherency(&space, &may_not, Coherency::AsRequested).unwrap();
        may_not.attach(&as_requested).unwrap();
        assert_eq!(bypasses(&port), [Snooping::Bypassed; 2]);
        assert_eq!(as_requested.coherency(), Coherency::AsRequested);
    }
}

#[test]
fn a_table_keeps_its_promise_to_whoever_was_there_first() {
    let machine = Machine::new();
    let space = machine.space();
    let (snoops, may_not, port) = devices(&machine, TableKind::VtdSecondStage);
    let plain = table(&space, &snoops);
    snoops.attach(&plain).unwrap();
    let refused = may_not.attach(&plain).unwrap_err();
    assert!(matches!(refused, AttachError::Incoherent(MAY_NOT)));
    assert!(refused.to_string().contains("can bypass the CPU's caches"));
    assert!(may_not.table().is_none());
    assert!(port.read_without_snooping(AT, &mut [0]).is_err());
    // The other way round nothing is lost.
    snoops.attach(&table(&space, &may_not)).unwrap();
}

#[test]
fn what_cannot_be_enforced_is_refused_or_said() {
    for kind in [TableKind::X86_64, TableKind::Sv48] {
        let machine = Machine::new();
        let space = machine.space();
        let (snoops, may_not, port) = devices(&machine, kind);
        assert_eq!((snoops.coherency(), may_not.coherency()), (Coherency::Enforced, Coherency::AsRequested));
        let refused = Table::with_coherency(&space, &may_not, Coherency::Enforced).unwrap_err();
        assert!(matches!(refused, AttachError::Incoherent(MAY_NOT)));
        assert_eq!(space.statistics().tables, 0);
        may_not.attach(&table(&space, &may_not)).unwrap();
        assert_eq!(bypasses(&port), [Snooping::Bypassed; 2]);
        // Who is promised coherency does not get that table.
        assert!(!Arc::ptr_eq(&table(&space, &snoops), &may_not.table().unwrap()));
    }
}

#[test]
fn there_is_no_such_request_on_conventional_pci_and_none_past_caches_in_software() {
    let machine = Machine::new();
    let space = machine.space();
    let port = machine.iommu.add_no_snoop_device(SOUND, TableKind::X86_64).unwrap();
    let device = Device::new(machine.iommu.clone(), SOUND).unwrap();
    device.attach(&table(&space, &device)).unwrap();
    assert_eq!((device.coherency(), bypasses(&port)), (Coherency::Enforced, [Snooping::Enforced; 2]));

    let machine = Machine::new();
    let (_, may_not, port) = devices(&machine, TableKind::Native);
    may_not.attach(&table(&machine.space(), &may_not)).unwrap();
    assert_eq!((may_not.coherency(), bypasses(&port)), (Coherency::Enforced, [Snooping::Enforced; 2]));
}

#[test]
fn a_fault_is_a_fault_however_it_was_asked_for() {
    let machine = Machine::new();
    let (_, may_not, port) = devices(&machine, TableKind::VtdSecondStage);
    may_not.attach(&table(&machine.space(), &may_not)).unwrap();
    // Over the end of what is mapped, and over the end of everything.
    assert!(port.read_without_snooping(AT + PAGE - 1, &mut [0; 2]).is_err());
    assert!(port.write_without_snooping(u64::MAX, &[0; 2]).is_err());
    assert_eq!(port.read_without_snooping(AT, &mut []).unwrap(), Snooping::Enforced);
    assert_eq!(port.statistics().faults, 2);
}

#[derive(Clone, Debug)]
enum Step {
    /// The device comes, or goes.
    Other(bool),
    Map(u64, u64),
    Unmap(u64, u64),
    Protect(u64, u64, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0_u64..32, 1_u64..16);
    prop_oneof![
        2 => any::<bool>().prop_map(Step::Other),
        3 => place().prop_map(|(first, count)| Step::Map(first, count)),
        2 => place().prop_map(|(first, count)| Step::Unmap(first, count)),
        1 => (place(), any::<bool>()).prop_map(|((first, count), write)| Step::Protect(first, count, write)),
    ]
}

fn range(first: u64, count: u64) -> IovaRange {
    IovaRange::with_length(AT + first * PAGE, count * PAGE).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// One device stays, with a table of its needs. In one world a device with other needs comes and goes; in the other it
    /// never was. The leaves of the one that stays are the same, with all that they say; whatever changes meanwhile.
    #[test]
    fn what_another_device_needs_leaves_no_trace(
        steps in prop::collection::vec(step(), 1..30),
        stays_snooping in any::<bool>(),
        amd in any::<bool>(),
    ) {
        let kind = if amd { TableKind::AmdV1 } else { TableKind::VtdSecondStage };
        let worlds = [true, false].map(|visited| {
            let machine = Machine::new();
            let (snoops, may_not, _) = devices(&machine, kind);
            let (stays, visits) = if stays_snooping { (snoops, may_not) } else { (may_not, snoops) };
            let backing = Backing::anonymous(&machine.bus, 64 * PAGE).unwrap();
            let memory =
                Memory::register(&backing, 0, 64 * PAGE, &Account::new("guest", None)).unwrap();
            let space = Space::new(&machine.bus);
            let mut came_first = false;
            if let (true, Some(Step::Other(true))) = (visited, steps.first()) {
                visits.attach(&table(&space, &visits)).unwrap();
                came_first = true;
            }
            stays.attach(&table(&space, &stays)).unwrap();
            for step in steps.iter().skip(usize::from(came_first)) {
                match step {
                    Step::Other(true) if visited => visits.attach(&table(&space, &visits)).unwrap(),
                    Step::Other(false) if visited => visits.detach(),
                    Step::Other(_) => {}
                    Step::Map(first, count) => {
                        let (iova, length) = (range(*first, 1).first(), count * PAGE);
                        drop(space.map(Iova::new(iova), &memory, first * PAGE, length, Permissions::READ_WRITE));
                    }
                    Step::Unmap(first, count) => drop(space.unmap(range(*first, *count))),
                    Step::Protect(first, count, write) => {
                        let wanted = if *write { Permissions::READ_WRITE } else { Permissions::READ };
                        drop(space.protect(range(*first, *count), wanted));
                    }
                }
            }
            visits.detach();
            let table = stays.table().unwrap();
            let mut leaves = leaves(&table);
            // Buses place memory where they like.
            let place = leaves.first().map_or(0, |leaf| leaf.oa.get() - (leaf.iova - AT));
            for leaf in &mut leaves {
                leaf.oa = Oa::new(leaf.oa.get() - place);
            }
            (leaves, space.statistics().tables, table.coherency())
        });
        let [with, without] = &worlds;
        let forced = |leaf: &Leaf| leaf.attributes.contains(Attributes::FORCE_SNOOP) != stays_snooping;
        prop_assert!(with.0.iter().all(forced));
        prop_assert_eq!(with, without);
    }
}

/// An IOMMU's tables of both kinds are told apart from those of another IOMMU.
#[test]
fn tables_that_enforce_are_not_shared_between_iommus() {
    let machine = Machine::new();
    let space = machine.space();
    let other = SoftIommu::new();
    let (_, may_not, _) = devices(&machine, TableKind::VtdSecondStage);
    other.add_no_snoop_device(MAY_NOT, TableKind::VtdSecondStage).unwrap();
    let others = Device::new(other, MAY_NOT).unwrap();
    let shared = table(&space, &may_not);
    assert!(matches!(others.attach(&shared), Err(AttachError::Incompatible)));
    assert!(!Arc::ptr_eq(&table(&space, &others), &shared));
}
