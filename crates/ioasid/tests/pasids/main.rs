//! PASIDs in sets: against a plain model, and each slip of the series of 2021 that this design could have made too.

mod model;
mod slips;

use ioasid::pasid::{Event, Limit, Owner, PasidSystem, Received, Subscription, Transition};
use std::sync::Arc;

/// A system and a limit that refuses nothing.
fn system(capacity: u32) -> (Arc<PasidSystem>, Limit) {
    let system = PasidSystem::new(capacity).unwrap();
    let limit = Limit::new(&system, "all", None);
    (system, limit)
}

/// All events that are there.
fn events(subscription: &Subscription) -> Vec<Event> {
    let event = |received| match received {
        Received::Event(event) => event,
        Received::Lost(count) => panic!("{count} events lost"),
    };
    std::iter::from_fn(|| subscription.next()).map(event).collect()
}

/// What happened, of those events.
fn transitions(subscription: &Subscription) -> Vec<Transition> {
    events(subscription).iter().map(|event| event.transition).collect()
}

/// Nothing is left of anything.
fn assert_nothing_left(system: &PasidSystem) {
    let status = system.status();
    assert_eq!((status.reserved, status.used, status.sets), (0, 0, 0));
}

/// Many sets, allocating and freeing at once; the sums are right at the end, and no ID has two owners meanwhile.
#[test]
fn threads_share_a_system() {
    let (system, limit) = system(512);
    let owned: Vec<_> = (0..512).map(|_| std::sync::atomic::AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for thread in 1..=4 {
            let (system, limit, owned) = (&system, &limit, &owned);
            scope.spawn(move || {
                use std::sync::atomic::Ordering::SeqCst;
                for round in 0..50 {
                    let set = system.create_set(Owner::Machine(thread), 100, limit).unwrap();
                    let ids: Vec<_> = (0..100).map(|data| set.allocate(0..=511, data).unwrap()).collect();
                    let held: Vec<_> = ids.iter().step_by(3).map(|id| set.bind(*id).unwrap()).collect();
                    for id in &ids {
                        assert_eq!(owned[id.get() as usize].swap(thread, SeqCst), 0, "{id} had an owner");
                    }
                    for id in &ids {
                        owned[id.get() as usize].store(0, SeqCst);
                        if round % 2 == 0 {
                            set.free(*id).unwrap();
                        }
                    }
                    drop(set);
                    // What is bound outlives the set.
                    assert!(held.iter().all(|binding| system.lookup(binding.pasid()).is_some()));
                }
            });
        }
    });
    assert_nothing_left(&system);
    assert_eq!(limit.usage().current, 0);
}
