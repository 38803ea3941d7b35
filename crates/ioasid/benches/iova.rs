//! What an address costs: `cargo bench -p ioasid --bench iova`.
//!
//! The space is fragmented: a million pages are allocated, and every other page between them is free. Two threads are
//! measured as one is: each does all of the iterations, and the time is that of the slower one.

#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ioasid::iova::{Allocator, Holes, Options, Policy};
use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, PageSize, Permissions, Space};
use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

const K4: u64 = 4 << 10;
const LIVE: u64 = 1_000_000;
/// Room for the live pages, as many holes between them, and 64 GiB besides.
const WINDOW: u64 = (2 * LIVE + (16 << 20)) * K4;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// An allocator with a million live pages, none next to another.
fn fragmented(policy: Policy) -> Allocator {
    let allocator = Allocator::new(&[range(K4, WINDOW)], Options { policy, ..Options::default() });
    let mut pages: Vec<u64> = (0..2 * LIVE).map(|_| allocator.allocate(K4, K4).unwrap().get()).collect();
    pages.sort_unstable();
    for page in pages.iter().step_by(2) {
        allocator.free(range(*page, K4)).unwrap();
    }
    allocator
}

/// Lets so many threads run the same, and takes the time of the last one to end.
fn threads(count: usize, iterations: u64, work: impl Fn() + Sync) -> Duration {
    let start = Barrier::new(count);
    std::thread::scope(|scope| {
        let run = || {
            start.wait();
            let begin = Instant::now();
            (0..iterations).for_each(|_| work());
            begin.elapsed()
        };
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap_or_default()
    })
}

fn allocations(criterion: &mut Criterion) {
    for policy in [Policy::BottomUp, Policy::TopDown] {
        let mut group = criterion.benchmark_group(format!("allocate and free, 1M live, {policy:?}"));
        let allocator = fragmented(policy);
        let pair = |length: u64, alignment: u64| {
            let iova = allocator.allocate(black_box(length), alignment).unwrap();
            allocator.free(range(iova.get(), length)).unwrap();
        };
        for count in [1, 2] {
            for (name, length, alignment) in [
                ("4 KiB", K4, K4),
                ("36 KiB, without magazines", 9 * K4, K4),
                ("36 KiB at 2 MiB, without magazines", 9 * K4, 2 << 20),
            ] {
                group.bench_function(BenchmarkId::new(name, format!("{count} threads")), |bencher| {
                    bencher.iter_custom(|iterations| threads(count, iterations, || pair(length, alignment)));
                });
            }
        }
        // More than the magazines hold: 256 pages at a time.
        group.bench_function("4 KiB, 256 allocated and then freed, each", |bencher| {
            let mut taken = Vec::with_capacity(256);
            bencher.iter_custom(|iterations| {
                let begin = Instant::now();
                for _ in 0..iterations.div_ceil(256) {
                    taken.extend((0..256).map(|_| allocator.allocate(K4, K4).unwrap().get()));
                    taken.drain(..).for_each(|iova| allocator.free(range(iova, K4)).unwrap());
                }
                begin.elapsed()
            });
        });
        group.finish();
    }
}

fn holes(criterion: &mut Criterion) {
    let mut holes = Holes::new(PageSize::SIZE_4K);
    holes.prepare(PageSize::SIZE_1G);
    for page in 0..LIVE {
        holes.free(range(2 * page * K4, K4)).unwrap();
    }
    let mut random = 1u64;
    criterion.bench_function("holes: a random one of 1M taken and freed", |bencher| {
        bencher.iter(|| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let page = range(2 * ((random >> 33) % LIVE) * K4, K4);
            holes.take(black_box(page)).unwrap();
            holes.free(page).unwrap();
        });
    });
}

fn map_anywhere(criterion: &mut Criterion) {
    let bus = Bus::new();
    let backing = Backing::anonymous(&bus, K4).unwrap();
    let memory = Memory::register(&backing, 0, K4, &Account::new("bench", None)).unwrap();
    let mut group = criterion.benchmark_group("map and unmap 4 KiB");
    for live in [0, LIVE] {
        let space = Space::new(&bus);
        for page in 1..=live {
            space.map(Iova::new(page * K4), &memory, 0, K4, Permissions::READ).unwrap();
        }
        let place = (live + 1) * K4;
        group.bench_function(format!("at an address, {live} below"), |bencher| {
            bencher.iter(|| {
                space.map(Iova::new(place), &memory, 0, K4, Permissions::READ).unwrap();
                space.unmap(range(place, K4)).unwrap();
            });
        });
        group.bench_function(format!("anywhere, {live} below"), |bencher| {
            bencher.iter(|| {
                let iova = space.map_anywhere(&memory, 0, K4, Permissions::READ).unwrap();
                space.unmap(range(iova.get(), K4)).unwrap();
            });
        });
        group.bench_function(
            format!("at an address, {live} below, in a space that has been asked"),
            |bencher| {
                bencher.iter(|| {
                    space.map(Iova::new(place), &memory, 0, K4, Permissions::READ).unwrap();
                    space.unmap(range(place, K4)).unwrap();
                });
            },
        );
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1000))
        .sample_size(20)
        .without_plots();
    targets = allocations, holes, map_anywhere
}
criterion_main!(benches);
