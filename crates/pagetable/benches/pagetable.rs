//! What mapping, unmapping, cutting and walking cost, without an engine around them.
//!
//! ```text
//! cargo bench -p ioasid-pagetable
//! ```
//!
//! One thread, everything in cache that fits. "Pages" are 4 KiB leaves forced by an output that is aligned no
//! better; otherwise the largest leaf that fits is used. Retired tables are freed at once, in the measured time.

#![expect(missing_docs, reason = "the group that criterion's macro defines is public")]

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use ioasid_pagetable::{
    Attributes, CachedWalk, ClaimFormat, Format, Gather, HeapTables, IovaRange, Native, Oa, PageSize, Radix,
    VtdSecondStage,
};
use std::hint::black_box;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

type Gathered = Gather<HeapTables, AtomicU64>;

const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// An output for which only the smallest leaves fit.
const ODD: Oa = Oa::new(GIB + PAGE);

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

fn vtd() -> VtdSecondStage {
    VtdSecondStage::new(4).unwrap()
}

/// Forgets what was gathered, as after an invalidation.
fn finish(gather: &mut Gathered) {
    for table in std::mem::take(gather).retired {
        // SAFETY: there is one thread, and it is in no table.
        unsafe { table.free() };
    }
}

/// A table with a neighbour mapped, so that the tables on the way stand.
fn table<F: Format>(format: F) -> Radix<F> {
    let radix = Radix::new(format, HeapTables);
    radix.map(range(8 * PAGE, PAGE), ODD, READ_WRITE, &mut Gather::new()).unwrap();
    radix
}

fn exclusive_pair<F: Format>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, format: F) {
    let radix = table(format);
    let page = range(0x5000, PAGE);
    let mut gather = Gather::new();
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            radix.map(black_box(page), Oa::new(0x7000), READ_WRITE, &mut gather).unwrap();
            radix.unmap(black_box(page), &mut gather).unwrap();
            finish(&mut gather);
        });
    });
}

fn claiming_pair<F: ClaimFormat>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, format: F) {
    let radix = table(format);
    let page = range(0x5000, PAGE);
    let mut gather = Gather::new();
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            radix.claim(black_box(page), Oa::new(0x7000), READ_WRITE, &mut gather).unwrap();
            radix.publish(black_box(page));
            radix.retract(black_box(page), &mut gather).unwrap();
            radix.release(black_box(page), &mut gather);
            finish(&mut gather);
        });
    });
}

fn pair_of_one_page(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("map and unmap 4K");
    exclusive_pair(&mut group, "native", Native::new());
    exclusive_pair(&mut group, "vtdss", vtd());
    claiming_pair(&mut group, "native, claimed", Native::new());
    group.finish();
}

fn one_gigabyte<F: Format>(group: &mut BenchmarkGroup<'_, WallTime>, format: &F) {
    for (leaves, oa) in [("one leaf", Oa::new(GIB)), ("pages", ODD)] {
        let radix = Radix::new(format.clone(), HeapTables);
        let gigabyte = range(GIB, GIB);
        // Both halves of the pair apart.
        let mut measure = |half: &str, map_counts: bool| {
            group.bench_function(format!("{half} {} in {leaves}", F::NAME), |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut gather = Gather::new();
                    let (mut mapping, mut unmapping) = (Duration::ZERO, Duration::ZERO);
                    for _ in 0..iterations {
                        let start = Instant::now();
                        radix.map(black_box(gigabyte), oa, READ_WRITE, &mut gather).unwrap();
                        mapping += start.elapsed();
                        let start = Instant::now();
                        radix.unmap(black_box(gigabyte), &mut gather).unwrap();
                        finish(&mut gather);
                        unmapping += start.elapsed();
                    }
                    if map_counts { mapping } else { unmapping }
                });
            });
        };
        measure("map", true);
        measure("unmap", false);
    }
}

fn gigabyte(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("1G");
    one_gigabyte(&mut group, &Native::new());
    one_gigabyte(&mut group, &vtd());
    group.finish();
}

fn cut<F: Format>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, format: F, offset: u64) {
    let radix = Radix::new(format, HeapTables);
    let gigabyte = range(GIB, GIB);
    let piece = range(GIB + offset, 2 << 20);
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let mut gather = Gather::new();
            let mut cutting = Duration::ZERO;
            for _ in 0..iterations {
                radix.map(gigabyte, Oa::new(GIB), READ_WRITE, &mut gather).unwrap();
                let start = Instant::now();
                radix.unmap(black_box(piece), &mut gather).unwrap();
                cutting += start.elapsed();
                radix.unmap(gigabyte, &mut gather).unwrap();
                finish(&mut gather);
            }
            cutting
        });
    });
}

fn cutting(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("unmap 2M of a 1G leaf");
    cut(&mut group, "native", Native::new(), 64 << 20);
    cut(&mut group, "vtdss", vtd(), 64 << 20);
    cut(&mut group, "native, at no multiple of 2M", Native::new(), (64 << 20) + PAGE);
    group.finish();
}

fn walks<F: Format>(group: &mut BenchmarkGroup<'_, WallTime>, format: F) {
    const PAGES: u64 = 1 << 20;
    let radix = Radix::new(format, HeapTables);
    radix.map(range(0, PAGES * PAGE), ODD, READ_WRITE, &mut Gather::new()).unwrap();
    assert_eq!(radix.walk(0).unwrap().size, PageSize::SIZE_4K);
    // A multiplicative generator of full period: cheap beside a walk, and every page is visited.
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) % PAGES * PAGE
    };
    group.bench_function(format!("{} walk, random", F::NAME), |bencher| {
        bencher.iter(|| radix.walk(black_box(random())).unwrap().oa);
    });
    let mut cache = CachedWalk::new();
    group.bench_function(format!("{} walk_cached, random", F::NAME), |bencher| {
        bencher.iter(|| radix.walk_cached(black_box(random()), &mut cache).unwrap().oa);
    });
    group.bench_function(format!("{} walk_cached, random in 2M", F::NAME), |bencher| {
        bencher.iter(|| radix.walk_cached(black_box(random() % (2 << 20)), &mut cache).unwrap().oa);
    });
}

fn walking(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("1M pages of 4K");
    group.throughput(Throughput::Elements(1));
    walks(&mut group, Native::new());
    walks(&mut group, vtd());
    group.finish();
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_millis(1200))
}

criterion_group! {
    name = benches;
    config = short();
    targets = pair_of_one_page, gigabyte, cutting, walking
}
criterion_main!(benches);
