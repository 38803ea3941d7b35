//! What PASIDs cost while a million are live: `cargo bench -p ioasid --bench pasids`.

#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use criterion::{Criterion, criterion_group, criterion_main};
use ioasid::pasid::{Limit, MOST_PASIDS, Owner, Pasid, PasidSet, PasidSystem, Priority, Spid};
use std::hint::black_box;
use std::time::Instant;

const LIVE: u32 = 1_000_000;
const ANY: std::ops::RangeInclusive<u32> = 0..=u32::MAX;

/// A thousand sets of a thousand IDs, each ID with a private one, under three levels of limits.
fn million() -> Vec<PasidSet> {
    let system = PasidSystem::new(MOST_PASIDS).expect("a system");
    let host = Limit::new(&system, "host", Some(MOST_PASIDS)).child("machines", None);
    let set = |number| {
        let limit = host.child(format!("machine {number}"), Some(2000));
        let set = system.create_set(Owner::Machine(number), 1010, &limit).expect("a set");
        for spid in 0..1000 {
            let pasid = set.allocate(ANY, number).expect("an ID");
            set.set_spid(pasid, Spid::new(spid)).expect("a private ID");
        }
        set
    };
    (0..u64::from(LIVE) / 1000).map(set).collect()
}

/// Numbers that a cache cannot foresee.
fn random() -> impl FnMut(usize) -> usize {
    let mut state = 1u64;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % below as u64) as usize
    }
}

fn pasids(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a million PASIDs");
    group.sample_size(10);
    group.bench_function("allocate all, each", |bencher| {
        bencher.iter_custom(|rounds| {
            let mut total = std::time::Duration::ZERO;
            for _ in 0..rounds.div_ceil(u64::from(LIVE)) {
                let system = PasidSystem::new(MOST_PASIDS).expect("a system");
                let limit = Limit::new(&system, "all", None);
                let set = system.create_set(Owner::Machine(1), LIVE, &limit).expect("a set");
                let start = Instant::now();
                for _ in 0..LIVE {
                    black_box(set.allocate(ANY, 0)).expect("an ID");
                }
                total += start.elapsed();
            }
            total.mul_f64(rounds as f64 / (rounds.div_ceil(u64::from(LIVE)) * u64::from(LIVE)) as f64)
        });
    });
    group.sample_size(50);
    let sets = million();
    let mut random = random();
    group.bench_function("allocate and free in a set anywhere", |bencher| {
        bencher.iter(|| {
            let set = &sets[random(sets.len())];
            let pasid = set.allocate(ANY, 0).expect("an ID");
            set.free(pasid).expect("is there");
        });
    });
    group.bench_function("give a private ID and take it away, in a set anywhere", |bencher| {
        let pasids: Vec<Pasid> = sets.iter().map(|set| set.allocate(ANY, 0).expect("an ID")).collect();
        bencher.iter(|| {
            let number = random(sets.len());
            sets[number].set_spid(pasids[number], Spid::new(5000)).expect("is free");
            sets[number].set_spid(pasids[number], None).expect("is there");
        });
        sets.iter().zip(pasids).for_each(|(set, pasid)| drop(set.free(pasid)));
    });
    group.bench_function("find by the private ID", |bencher| {
        bencher.iter(|| {
            let set = &sets[random(sets.len())];
            black_box(set.find(Spid::new(random(1000) as u32).expect("small")))
        });
    });
    group.bench_function("bind and unbind", |bencher| {
        let set = &sets[0];
        let pasid: Pasid = set.list()[0].pasid;
        bencher.iter(|| black_box(set.bind(pasid)).expect("is there"));
    });
    group.bench_function("bind and unbind, ten listeners that read nothing", |bencher| {
        let set = &sets[0];
        let listeners: Vec<_> = (0..10).map(|_| set.subscribe(Priority::Device, 1000)).collect();
        let pasid: Pasid = set.list()[0].pasid;
        bencher.iter(|| black_box(set.bind(pasid)).expect("is there"));
        drop(listeners);
    });
    group.finish();
}

criterion_group!(benches, pasids);
criterion_main!(benches);
