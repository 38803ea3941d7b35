//! The series of 2021 made some slips, which reviewers found or nobody did. Each has a test here that would have.

use super::{assert_nothing_left, events, system, transitions};
use ioasid::pasid::{
    AllocateError, CreateSetError, Freed, Limit, MOST_PASIDS, Owner, PasidState, PasidSystem, Priority,
    QuotaError, Received, Spid, SpidError, Transition, UseError,
};
use std::time::Duration;

const ANY: std::ops::RangeInclusive<u32> = 0..=u32::MAX;

/// Freeing a set did not give its quota back, so a machine ran out of PASIDs after some guests.
#[test]
fn quota_returns_with_the_set() {
    let (system, limit) = system(1000);
    for round in 0..10_000 {
        let set = system.create_set(Owner::Machine(round), 1000, &limit).unwrap();
        let id = set.allocate(ANY, round).unwrap();
        if round % 2 == 0 {
            set.free(id).unwrap();
            set.end().unwrap();
        }
    }
    assert_nothing_left(&system);
    assert_eq!((limit.usage().current, system.status().limits), (0, 1));
    // The first set's ID was the lowest, and so was the last's: nothing has crept upwards.
    let set = system.create_set(Owner::Nobody, 1, &limit).unwrap();
    assert_eq!(set.allocate(ANY, 0).unwrap().get(), 0);
}

/// ACTIVE was a state that nothing ever entered.
#[test]
fn what_is_bound_is_active() {
    let (system, limit) = system(16);
    let set = system.create_set(Owner::Process(1), 16, &limit).unwrap();
    let id = set.allocate(ANY, 0).unwrap();
    let state = || set.lookup(id).unwrap().state;
    assert_eq!(state(), PasidState::Idle);
    let (one, other) = (set.bind(id).unwrap(), set.bind(id).unwrap());
    assert_eq!(state(), PasidState::Active);
    drop(one);
    assert_eq!(state(), PasidState::Active);
    drop(other);
    assert_eq!(state(), PasidState::Idle);
}

/// The counter of refusals never counted.
#[test]
fn refusals_are_counted_where_they_happen() {
    let (system, _) = system(16);
    let host = Limit::new(&system, "host", Some(3));
    let (one, other) = (host.child("one", Some(1)), host.child("other", None));
    let (a, b) = (
        system.create_set(Owner::Machine(1), 8, &one).unwrap(),
        system.create_set(Owner::Machine(2), 8, &other).unwrap(),
    );
    a.allocate(ANY, 0).unwrap();
    let refused = a.allocate(ANY, 0).unwrap_err();
    assert!(refused.to_string().contains("\"one\""), "{refused}");
    b.allocate(ANY, 0).unwrap();
    b.allocate(ANY, 0).unwrap();
    let refused = b.allocate(ANY, 0).unwrap_err();
    assert!(refused.to_string().contains("\"host\""), "{refused}");
    let numbers = |limit: &Limit| (limit.usage().current, limit.usage().events);
    assert_eq!((numbers(&host), numbers(&one), numbers(&other)), ((3, 1), (1, 1), (2, 0)));
}

/// An allocation that failed after it was charged stayed charged.
#[test]
fn a_failed_allocation_is_not_charged() {
    let (system, limit) = system(4);
    let set = system.create_set(Owner::Machine(1), 3, &limit).unwrap();
    set.allocate(2..=2, 0).unwrap();
    assert_eq!(set.allocate(2..=2, 0), Err(AllocateError::NoneFree { first: 2, last: 2 }));
    assert_eq!(set.allocate(4..=u32::MAX, 0), Err(AllocateError::NoneFree { first: 4, last: u32::MAX }));
    #[expect(clippy::reversed_empty_ranges, reason = "what a guest may ask for")]
    let empty = 3..=1;
    assert!(set.allocate(empty, 0).is_err());
    assert_eq!((limit.usage().current, set.status().used, system.status().used), (1, 1, 1));
    // And what a limit refuses takes no ID.
    limit.set_max(Some(1));
    assert!(matches!(set.allocate(0..=0, 0), Err(AllocateError::Limit(_))));
    limit.set_max(None);
    assert_eq!(set.allocate(0..=0, 0).unwrap().get(), 0);
}

/// A guest's PASID was looked for by going through all IDs of the set, and could be given twice.
#[test]
fn private_ids_are_unique_in_their_set() {
    let (system, limit) = system(64);
    let set = |number| system.create_set(Owner::Machine(number), 8, &limit).unwrap();
    let (one, other) = (set(1), set(2));
    let (a, b, c) =
        (one.allocate(ANY, 0).unwrap(), one.allocate(ANY, 0).unwrap(), other.allocate(ANY, 0).unwrap());
    let spid = |number| Spid::new(number).unwrap();
    one.set_spid(a, Some(spid(5))).unwrap();
    assert_eq!(one.set_spid(b, Some(spid(5))), Err(SpidError::Taken { spid: spid(5), by: a }));
    one.set_spid(a, Some(spid(5))).unwrap();
    other.set_spid(c, Some(spid(5))).unwrap();
    assert_eq!((one.find(spid(5)), other.find(spid(5)), one.find(spid(6))), (Some(a), Some(c), None));
    // Another one, in one step; the old one is free.
    one.set_spid(a, Some(spid(6))).unwrap();
    one.set_spid(b, Some(spid(5))).unwrap();
    assert_eq!((one.find(spid(5)), one.lookup(a).unwrap().spid), (Some(b), Some(spid(6))));
    // A parked ID has none any more, so the guest can use its number at once.
    let held = one.hold(a).unwrap();
    assert_eq!(one.free(a), Ok(Freed::Pending));
    assert_eq!((one.find(spid(6)), one.set_spid(b, Some(spid(6)))), (None, Ok(())));
    drop(held);
    assert_eq!(one.find(spid(6)), Some(b));
}

/// The last put freed an ID that was freed already, and an ID could be freed twice.
#[test]
fn an_id_is_freed_once() {
    let (system, limit) = system(2);
    let set = system.create_set(Owner::Machine(1), 2, &limit).unwrap();
    let told = system.subscribe(Priority::Iommu, 100);
    let id = set.allocate(ANY, 77).unwrap();
    let (reference, binding) = (set.hold(id).unwrap(), set.bind(id).unwrap());
    assert_eq!(set.free(id), Ok(Freed::Pending));
    assert_eq!(set.free(id), Err(UseError::FreePending { pasid: id }));
    assert!(matches!(set.hold(id), Err(UseError::FreePending { .. })));
    assert!(matches!(set.bind(id), Err(UseError::FreePending { .. })));
    drop(binding);
    assert_eq!(set.lookup(id).unwrap().state, PasidState::FreePending);
    drop(reference);
    assert!(set.lookup(id).is_err() && set.free(id).is_err());
    use Transition::{Allocate, Bind, Free, Unbind};
    let seen = events(&told);
    assert!(seen.iter().all(|event| (event.pasid, event.data) == (id, 77)));
    assert_eq!(seen.iter().map(|event| event.transition).collect::<Vec<_>>(), [Allocate, Bind, Free, Unbind]);
    // A process that dies with its IDs bound frees them all the same.
    let id = set.allocate(ANY, 0).unwrap();
    let binding = set.bind(id).unwrap();
    drop(set);
    assert_eq!((system.status().sets, system.status().used, system.status().reserved), (1, 1, 1));
    drop(binding);
    assert_nothing_left(&system);
    assert_eq!(transitions(&told), [Allocate, Bind, Free, Unbind]);
}

/// Anybody could look up, bind and free anybody's IDs by guessing numbers.
#[test]
fn others_ids_are_unknown() {
    let (system, limit) = system(16);
    let set = |owner| system.create_set(owner, 8, &limit).unwrap();
    let (one, other) = (set(Owner::Machine(1)), set(Owner::Machine(2)));
    let id = one.allocate(ANY, 0).unwrap();
    assert!(other.lookup(id).is_err() && other.hold(id).is_err() && other.bind(id).is_err());
    assert!(matches!(other.free(id), Err(UseError::Unknown(_))));
    assert!(other.set_spid(id, Spid::new(1)).is_err());
    // It cannot even be told from one that is free.
    let free = one.allocate(ANY, 0).unwrap();
    one.free(free).unwrap();
    let say = |id| other.free(id).unwrap_err().to_string().replace(&id.to_string(), "N");
    assert_eq!(say(id), say(free));
    assert_eq!(
        system.create_set(Owner::Machine(1), 0, &limit).err(),
        Some(CreateSetError::OwnerHasOne(Owner::Machine(1)))
    );
    assert!(one.lookup(id).is_ok());
}

/// More could be given back than was reserved.
#[test]
fn only_what_was_reserved_is_given_back() {
    let (system, limit) = system(100);
    let mut reservation = system.reserve(60).unwrap();
    assert_eq!(system.reserve(41).unwrap_err().left, 40);
    reservation.give_back(u32::MAX);
    reservation.give_back(1);
    drop(reservation);
    assert_nothing_left(&system);
    let set = system.create_set(Owner::Nobody, 100, &limit).unwrap();
    let id = set.allocate(ANY, 0).unwrap();
    assert_eq!(set.set_quota(0), Err(QuotaError::InUse { used: 1 }));
    assert!(matches!(set.set_quota(101), Err(QuotaError::Capacity(_))));
    set.set_quota(1).unwrap();
    assert_eq!(system.status().reserved, 1);
    assert_eq!(set.allocate(ANY, 0), Err(AllocateError::QuotaUsedUp { quota: 1 }));
    let not_empty = set.end().unwrap_err();
    not_empty.set.free(id).unwrap();
    not_empty.set.end().unwrap();
    assert_nothing_left(&system);
    assert!(PasidSystem::new(0).is_err() && PasidSystem::new(MOST_PASIDS + 1).is_err());
}

/// Moving a holder never fails; what it goes over then blocks what comes next, and only that.
#[test]
fn a_set_moves_even_over_a_maximum() {
    let (system, _) = system(100);
    let (small, large) = (Limit::new(&system, "small", Some(2)), Limit::new(&system, "large", Some(50)));
    let below = small.child("below", None);
    let set = system.create_set(Owner::Machine(1), 20, &large).unwrap();
    let ids: Vec<_> = (0..5).map(|_| set.allocate(ANY, 0).unwrap()).collect();
    set.charge_to(&below);
    let current = |limit: &Limit| limit.usage().current;
    assert_eq!((current(&large), current(&below), current(&small)), (0, 5, 5));
    assert_eq!(set.status().limit, "below");
    for id in &ids[..3] {
        assert!(set.allocate(ANY, 0).is_err());
        set.free(*id).unwrap();
    }
    assert!(set.allocate(ANY, 0).is_err());
    set.free(ids[3]).unwrap();
    set.allocate(ANY, 0).unwrap();
    assert_eq!((current(&small), small.usage().events), (2, 4));
    // A limit is there as long as somebody is below it.
    drop((small, below));
    assert_eq!(system.status().limits, 3);
    drop(set);
    assert_eq!(system.status().limits, 1);
    // Another system's changes nothing.
    let (other, elsewhere) = super::system(10);
    let set = other.create_set(Owner::Nobody, 1, &elsewhere).unwrap();
    set.charge_to(&large);
    assert_eq!(set.status().limit, "all");
    assert_eq!(other.create_set(Owner::Nobody, 1, &large).err(), Some(CreateSetError::OtherSystem));
}

/// A listener that is slow learns what it lost, and holds up nobody.
#[test]
fn a_slow_listener_learns_what_it_lost() {
    let (system, limit) = system(100);
    let set = system.create_set(Owner::Machine(1), 100, &limit).unwrap();
    let (slow, none, fast) = (
        system.subscribe(Priority::Device, 2),
        set.subscribe(Priority::Cpu, 0),
        set.subscribe(Priority::Cpu, 100),
    );
    let other = system.create_set(Owner::Machine(2), 0, &limit).unwrap();
    let elsewhere = other.subscribe(Priority::Cpu, 100);
    let allocate = || set.allocate(ANY, 0).unwrap();
    for _ in 0..5 {
        allocate();
    }
    let number = |received| match received {
        Some(Received::Event(event)) => event.pasid.get(),
        other => panic!("{other:?}"),
    };
    assert_eq!(number(slow.next()), 0);
    allocate();
    // The place in the order where something is missing is known.
    assert_eq!(number(slow.next()), 1);
    assert_eq!((slow.next(), number(slow.next()), slow.next()), (Some(Received::Lost(3)), 5, None));
    assert_eq!((none.next(), none.next()), (Some(Received::Lost(6)), None));
    assert_eq!(events(&fast).iter().map(|event| event.sequence).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert_eq!((elsewhere.next(), elsewhere.is_over()), (None, false));
    drop(other);
    assert!(elsewhere.is_over());
    assert_eq!(elsewhere.wait(Duration::MAX), None);
    // One that waits is woken.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| number(fast.wait(Duration::MAX)));
        allocate();
        assert_eq!(waiting.join().unwrap(), 6);
    });
    assert_eq!(fast.wait(Duration::from_millis(1)), None);
}
