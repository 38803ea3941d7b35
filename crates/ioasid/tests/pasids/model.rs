//! Any sequence of calls, against a model that keeps lists.

use super::{events, system};
use ioasid::pasid::{
    AllocateError, Freed, Limit, Owner, Pasid, PasidBinding, PasidReference, PasidSet, PasidState, Priority,
    Spid, Transition,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

const CAPACITY: u32 = 24;

#[derive(Clone, Debug)]
enum Step {
    Create { owner: usize, quota: u32, limit: usize },
    End { owner: usize },
    Drop { owner: usize },
    Allocate { owner: usize, first: u32, length: u32 },
    Free { owner: usize, id: u32 },
    Hold { owner: usize, id: u32 },
    Bind { owner: usize, id: u32 },
    LetGo { which: prop::sample::Index },
    Spid { owner: usize, id: u32, spid: Option<u32> },
    Quota { owner: usize, quota: u32 },
    Move { owner: usize, limit: usize },
    Max { limit: usize, max: Option<u32> },
}

fn step() -> impl Strategy<Value = Step> {
    let owner = 0..3usize;
    let id = 0..CAPACITY;
    prop_oneof![
        1 => (owner.clone(), 0..16u32, 0..3usize).prop_map(|(owner, quota, limit)| Step::Create { owner, quota, limit }),
        1 => owner.clone().prop_map(|owner| Step::End { owner }),
        1 => owner.clone().prop_map(|owner| Step::Drop { owner }),
        6 => (owner.clone(), 0..CAPACITY + 2, 0..CAPACITY).prop_map(|(owner, first, length)| Step::Allocate {
            owner, first, length
        }),
        3 => (owner.clone(), id.clone()).prop_map(|(owner, id)| Step::Free { owner, id }),
        2 => (owner.clone(), id.clone()).prop_map(|(owner, id)| Step::Hold { owner, id }),
        2 => (owner.clone(), id.clone()).prop_map(|(owner, id)| Step::Bind { owner, id }),
        3 => any::<prop::sample::Index>().prop_map(|which| Step::LetGo { which }),
        3 => (owner.clone(), id, prop::option::of(0..4u32))
            .prop_map(|(owner, id, spid)| Step::Spid { owner, id, spid }),
        1 => (owner.clone(), 0..16u32).prop_map(|(owner, quota)| Step::Quota { owner, quota }),
        1 => (owner, 0..3usize).prop_map(|(owner, limit)| Step::Move { owner, limit }),
        1 => (0..3usize, prop::option::of(0..20u32)).prop_map(|(limit, max)| Step::Max { limit, max }),
    ]
}

/// What holds an ID.
enum Held {
    Reference(PasidReference),
    Binding(PasidBinding),
}

impl Held {
    fn pasid(&self) -> Pasid {
        match self {
            Held::Reference(reference) => reference.pasid(),
            Held::Binding(binding) => binding.pasid(),
        }
    }
}

/// An ID, as the model has it.
#[derive(Clone, Debug)]
struct Id {
    /// Numbers the sets as they were made.
    set: usize,
    spid: Option<u32>,
    references: u32,
    bindings: u32,
    pending: bool,
}

#[derive(Clone, Debug)]
struct Set {
    quota: u32,
    limit: usize,
    owned: bool,
}

/// Levels: 0 is above 1, and 2 stands alone.
const ABOVE: [&[usize]; 3] = [&[0], &[1, 0], &[2]];

#[derive(Default)]
struct Model {
    ids: BTreeMap<u32, Id>,
    sets: Vec<Set>,
    maxima: [Option<u32>; 3],
    refused: [u64; 3],
    events: Vec<(Transition, u32, Option<u32>)>,
}

impl Model {
    fn used(&self, set: usize) -> u32 {
        self.ids.values().filter(|id| id.set == set).count() as u32
    }

    fn current(&self, limit: usize) -> u32 {
        let below = |id: &&Id| ABOVE[self.sets[id.set].limit].contains(&limit);
        self.ids.values().filter(below).count() as u32
    }

    fn reserved(&self) -> u32 {
        let of = |(number, set): (usize, &Set)| if set.owned { set.quota } else { self.used(number) };
        self.sets.iter().enumerate().map(of).sum()
    }

    fn allocate(&mut self, set: usize, first: u32, last: u32) -> Result<u32, &'static str> {
        if self.used(set) >= self.sets[set].quota {
            return Err("quota");
        }
        let id = (first..=last.min(CAPACITY - 1)).find(|id| !self.ids.contains_key(id)).ok_or("range")?;
        for limit in ABOVE[self.sets[set].limit] {
            if self.maxima[*limit].is_some_and(|max| self.current(*limit) >= max) {
                self.refused[*limit] += 1;
                return Err("limit");
            }
        }
        self.ids.insert(id, Id { set, spid: None, references: 0, bindings: 0, pending: false });
        self.events.push((Transition::Allocate, id, None));
        Ok(id)
    }

    fn usable(&mut self, set: usize, id: u32) -> Option<&mut Id> {
        self.ids.get_mut(&id).filter(|id| id.set == set && !id.pending)
    }

    fn free(&mut self, set: usize, number: u32) -> Option<Freed> {
        let id = self.usable(set, number)?;
        id.pending = true;
        let (spid, held) = (id.spid.take(), id.references > 0);
        self.events.push((Transition::Free, number, spid));
        if held {
            return Some(Freed::Pending);
        }
        self.ids.remove(&number);
        Some(Freed::Now)
    }

    fn abandon(&mut self, set: usize) {
        // The youngest first would need their order; the test sorts what comes of one step.
        let all: Vec<u32> = self.ids.keys().copied().collect();
        for id in all {
            self.free(set, id);
        }
        self.sets[set].owned = false;
    }

    fn let_go(&mut self, number: u32, bound: bool) {
        let Some(id) = self.ids.get_mut(&number) else { panic!("{number} is held and unknown") };
        id.references -= 1;
        let (gone, spid) = (id.pending && id.references == 0, id.spid);
        if bound {
            id.bindings -= 1;
            if id.bindings == 0 {
                self.events.push((Transition::Unbind, number, spid));
            }
        }
        if gone {
            self.ids.remove(&number);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_sequence_of_calls(steps in prop::collection::vec(step(), 1..120)) {
        let (system, _all) = system(CAPACITY);
        let told = system.subscribe(Priority::Iommu, 10_000);
        let host = Limit::new(&system, "0", None);
        let limits = [host.clone(), host.child("1", None), Limit::new(&system, "2", None)];
        drop(host);
        let mut model = Model::default();
        // Of each owner: the set, and its number.
        let mut sets: [Option<(PasidSet, usize)>; 3] = [None, None, None];
        let mut held: Vec<Held> = Vec::new();

        for step in steps {
            match step {
                Step::Create { owner, quota, limit } => {
                    let made = system.create_set(Owner::Machine(owner as u64), quota, &limits[limit]);
                    let fits = sets[owner].is_none() && model.reserved() + quota <= CAPACITY;
                    prop_assert_eq!(made.is_ok(), fits);
                    if let Ok(set) = made {
                        sets[owner] = Some((set, model.sets.len()));
                        model.sets.push(Set { quota, limit, owned: true });
                    }
                }
                Step::End { owner } => if let Some((set, number)) = sets[owner].take() {
                    match set.end() {
                        Ok(()) => {
                            prop_assert_eq!(model.used(number), 0);
                            model.abandon(number);
                        }
                        Err(not_empty) => {
                            prop_assert_eq!(not_empty.used, model.used(number));
                            sets[owner] = Some((not_empty.set, number));
                        }
                    }
                },
                Step::Drop { owner } => if let Some((set, number)) = sets[owner].take() {
                    drop(set);
                    model.abandon(number);
                },
                Step::Allocate { owner, first, length } => if let Some((set, number)) = &sets[owner] {
                    let allocated = set.allocate(first..=first + length, u64::from(first)).map(Pasid::get);
                    let allocated = allocated.map_err(|error| match error {
                        AllocateError::QuotaUsedUp { .. } => "quota",
                        AllocateError::NoneFree { .. } => "range",
                        AllocateError::Limit(_) => "limit",
                    });
                    prop_assert_eq!(allocated, model.allocate(*number, first, first + length));
                },
                Step::Free { owner, id } => if let Some((set, number)) = &sets[owner] {
                    let freed = set.free(Pasid::new(id).unwrap()).ok();
                    prop_assert_eq!(freed, model.free(*number, id));
                },
                Step::Hold { owner, id } => if let Some((set, number)) = &sets[owner] {
                    let reference = set.hold(Pasid::new(id).unwrap());
                    let usable = model.usable(*number, id).map(|id| id.references += 1);
                    prop_assert_eq!(reference.is_ok(), usable.is_some());
                    held.extend(reference.map(Held::Reference));
                },
                Step::Bind { owner, id } => if let Some((set, number)) = &sets[owner] {
                    let binding = set.bind(Pasid::new(id).unwrap());
                    let first = model.usable(*number, id).map(|id| {
                        id.references += 1;
                        id.bindings += 1;
                        (id.bindings == 1, id.spid)
                    });
                    prop_assert_eq!(binding.is_ok(), first.is_some());
                    if let Some((true, spid)) = first {
                        model.events.push((Transition::Bind, id, spid));
                    }
                    held.extend(binding.map(Held::Binding));
                },
                Step::LetGo { which } => if !held.is_empty() {
                    let one = held.swap_remove(which.index(held.len()));
                    model.let_go(one.pasid().get(), matches!(one, Held::Binding(_)));
                    drop(one);
                },
                Step::Spid { owner, id, spid } => if let Some((set, number)) = &sets[owner] {
                    let result = set.set_spid(Pasid::new(id).unwrap(), spid.and_then(Spid::new));
                    let has = |(other, it): (&u32, &Id)| {
                        *other != id && it.set == *number && spid.is_some() && it.spid == spid
                    };
                    let taken = model.ids.iter().any(has);
                    let usable = model.usable(*number, id);
                    prop_assert_eq!(result.is_ok(), usable.is_some() && !taken);
                    if let Some(it) = usable.filter(|_| !taken) {
                        it.spid = spid;
                    }
                },
                Step::Quota { owner, quota } => if let Some((set, number)) = &sets[owner] {
                    let before = model.sets[*number].quota;
                    let fits = quota >= model.used(*number) && model.reserved() - before + quota <= CAPACITY;
                    prop_assert_eq!(set.set_quota(quota).is_ok(), fits);
                    if fits {
                        model.sets[*number].quota = quota;
                    }
                },
                Step::Move { owner, limit } => if let Some((set, number)) = &sets[owner] {
                    set.charge_to(&limits[limit]);
                    model.sets[*number].limit = limit;
                },
                Step::Max { limit, max } => {
                    limits[limit].set_max(max);
                    model.maxima[limit] = max;
                }
            }

            // Everything is as the model says.
            let by_number = |event: &(Transition, u32, Option<u32>)| (event.1, event.0 == Transition::Free);
            let mut seen: Vec<_> =
                events(&told).iter().map(|it| (it.transition, it.pasid.get(), it.spid.map(Spid::get))).collect();
            let mut expected = std::mem::take(&mut model.events);
            seen.sort_by_key(by_number);
            expected.sort_by_key(by_number);
            prop_assert_eq!(seen, expected);
            for (number, limit) in limits.iter().enumerate() {
                let usage = limit.usage();
                prop_assert_eq!((usage.current, usage.events), (model.current(number), model.refused[number]));
                prop_assert!(usage.peak >= usage.current);
            }
            let status = system.status();
            let living = |(number, set): (usize, &Set)| set.owned || model.used(number) > 0;
            let sets_there = model.sets.iter().enumerate().filter(|set| living(*set)).count();
            prop_assert_eq!(
                (status.reserved, status.used, status.sets),
                (model.reserved(), model.ids.len() as u32, sets_there)
            );
            for number in 0..CAPACITY {
                let found = system.lookup(Pasid::new(number).unwrap());
                let expected = model.ids.get(&number);
                prop_assert_eq!(found.is_some(), expected.is_some());
                if let (Some(found), Some(id)) = (found, expected) {
                    let state = match id {
                        Id { pending: true, .. } => PasidState::FreePending,
                        Id { bindings: 0, .. } => PasidState::Idle,
                        _ => PasidState::Active,
                    };
                    prop_assert_eq!(
                        (found.state, found.spid.map(Spid::get), found.references, found.bindings),
                        (state, id.spid, id.references, id.bindings)
                    );
                }
            }
            for (set, number) in sets.iter().flatten() {
                let of_set = |(id, it): (&u32, &Id)| (it.set == *number).then_some(*id);
                let mut listed: Vec<u32> = set.list().iter().map(|status| status.pasid.get()).collect();
                listed.sort_unstable();
                prop_assert_eq!(listed, model.ids.iter().filter_map(of_set).collect::<Vec<_>>());
                for spid in 0..4 {
                    let has = |(_, it): &(&u32, &Id)| it.set == *number && it.spid == Some(spid);
                    let expected = model.ids.iter().find(has).map(|(id, _)| *id);
                    prop_assert_eq!(set.find(Spid::new(spid).unwrap()).map(Pasid::get), expected);
                }
            }
        }
        drop((held, sets));
        super::assert_nothing_left(&system);
        prop_assert!(limits.iter().all(|limit| limit.usage().current == 0));
    }
}
