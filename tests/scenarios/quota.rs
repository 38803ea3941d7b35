//! Quota: a guest at its limit, and ten thousand guests one after the other.
//!
//! Who asks: whoever runs a host for months. In the series of patches a set's quota was not given back when the set was freed, a
//! charge stayed when the allocation failed after it, and the limit's events were never counted: after some hundred restarts
//! of guests there were no IOASIDs left.
//!
//! - VFIO type1 and iommufd have no quota of PASIDs: a device's are whoever's it is.
//! - Here a quota is taken from the machine's capacity when a set is made and given back when the set goes, as a whole; limits
//!   above it are in levels, as cgroups have them.

use crate::machine::{Machine, range};
use ioasid::pasid::{
    AllocateError, CreateSetError, Freed, Limit, Owner, Pasid, PasidSet, PasidState, PasidSystem, Spid,
};
use ioasid::{Space, Table};
use ioasid_soft::iommu::TableKind;
use std::sync::Arc;

const CAPACITY: u32 = 1000;
const QUOTA: u32 = 400;
const GUESTS: u64 = 10_000;

fn allocate(set: &PasidSet) -> Result<Pasid, AllocateError> {
    set.allocate(1..=u32::MAX, 0)
}

#[test]
fn a_set_at_its_quota_is_refused_and_nobody_else() {
    let system = PasidSystem::new(CAPACITY).unwrap();
    let host = Limit::new(&system, "host", Some(600));
    let sets = [1, 2].map(|guest| {
        system.create_set(Owner::Machine(guest), QUOTA, &host.child(format!("guest {guest}"), None)).unwrap()
    });
    // Each owner has one set, and no more is promised than there is.
    let again = system.create_set(Owner::Machine(1), 1, &host);
    assert!(matches!(again, Err(CreateSetError::OwnerHasOne(Owner::Machine(1)))), "{again:?}");
    let third = system.create_set(Owner::Machine(3), CAPACITY - 2 * QUOTA + 1, &host);
    assert!(matches!(third, Err(CreateSetError::Capacity(_))), "{third:?}");

    let first: Vec<Pasid> = (0..QUOTA).map(|_| allocate(&sets[0]).unwrap()).collect();
    assert_eq!(allocate(&sets[0]), Err(AllocateError::QuotaUsedUp { quota: QUOTA }));
    // The other one has what it was promised, as far as the host's limit goes; and it is the host's that says no.
    for _ in QUOTA..600 {
        allocate(&sets[1]).unwrap();
    }
    for refusals in 1..=3 {
        match allocate(&sets[1]) {
            Err(AllocateError::Limit(over)) => assert_eq!((over.limit.as_str(), over.current), ("host", 600)),
            other => panic!("{other:?}"),
        }
        assert_eq!((host.usage().events, host.usage().current), (refusals, 600));
    }
    // One goes, one comes.
    assert_eq!(sets[0].free(first[7]), Ok(Freed::Now));
    assert_eq!(allocate(&sets[1]), Ok(first[7]));
}

/// A guest with devices and PASIDs: it is made, is used up to its quota, and goes, tidily or not.
fn lives(guest: u64, machine: &Machine, system: &Arc<PasidSystem>, host: &Limit, attached: bool) {
    let set = system.create_set(Owner::Machine(guest % 3), QUOTA, host).unwrap();
    let few = if guest % 100 == 0 { QUOTA } else { 5 };
    let pasids: Vec<Pasid> = (0..few).map(|_| allocate(&set).unwrap()).collect();
    if few == QUOTA {
        assert!(allocate(&set).is_err());
    }
    set.set_spid(pasids[0], Spid::new(1)).unwrap();
    assert!(set.set_spid(pasids[1], Spid::new(1)).is_err());
    if attached {
        let function = machine.device(TableKind::Native);
        let table = Table::for_device(&Space::new(&machine.bus), &function.device).unwrap();
        let binding = set.bind(pasids[0]).unwrap();
        function.device.attach_pasid(Spid::new(1).unwrap(), binding, &table).unwrap();
        // The guest is killed; its device's last DMA is not over.
        drop(set);
        let parked = system.lookup(pasids[0]).unwrap();
        // That one, and the neighbour's.
        assert_eq!((parked.state, system.status().used), (PasidState::FreePending, 2));
        assert!(table.space().unmap(range(0, 4096)).is_ok());
    } else if guest % 2 == 0 {
        for pasid in pasids {
            set.free(pasid).unwrap();
        }
        set.end().unwrap();
    }
}

#[test]
fn ten_thousand_guests_leave_the_machine_as_it_was() {
    let machine = Machine::new();
    let system = PasidSystem::new(CAPACITY).unwrap();
    let host = Limit::new(&system, "host", Some(CAPACITY));
    // A neighbour that stays.
    let neighbour = system.create_set(Owner::Process(1), 100, &host.child("neighbour", None)).unwrap();
    let own = allocate(&neighbour).unwrap();
    // The tables of IDs grow once.
    lives(0, &machine, &system, &host, false);
    let before = system.status();
    for guest in 1..=GUESTS {
        lives(guest, &machine, &system, &host.child("guest", Some(QUOTA)), guest % 1000 == 1);
        assert_eq!(host.usage().current, 1, "guest {guest} has left a charge");
    }
    assert_eq!(system.status(), before);
    assert_eq!((system.sets().len(), host.usage().events), (1, 0));
    assert_eq!(neighbour.lookup(own).unwrap().state, PasidState::Idle);
    // All that is not the neighbour's can be had.
    let all = system.create_set(Owner::Machine(0), CAPACITY - 100, &host).unwrap();
    for _ in 0..CAPACITY - 100 {
        allocate(&all).unwrap();
    }
    assert!(matches!(allocate(&all), Err(AllocateError::QuotaUsedUp { .. })));
}
