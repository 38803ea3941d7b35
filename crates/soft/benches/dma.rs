//! What DMA costs: `cargo bench -p ioasid-soft`.
//!
//! Everything is hot: a device that does the same small transfer again and again, and one that moves a MiB, next to a
//! plain copy of the same bytes.

#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ioasid::{
    Account, Backing, Bus, Device, FirstStage, Iova, IovaRange, Memory, Permissions, Rid, Space, Table, epoch,
};
use ioasid_soft::dma::DmaPort;
use ioasid_soft::iommu::{AtomicOperation, DmaSegment, Port, SoftIommu, TableKind};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const K4: u64 = 4 << 10;
const M1: u64 = 1 << 20;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const RW: Permissions = Permissions::READ_WRITE;

/// A device on a table of its kind, and some memory.
struct Scene {
    space: Arc<Space>,
    ram: Arc<Memory>,
    port: Arc<Port>,
    device: Device,
}

impl Scene {
    fn new(kind: TableKind) -> Scene {
        let bus = Bus::new();
        let backing = Backing::anonymous(&bus, G1).unwrap();
        // Touched, so that no page of it is missing when it is measured.
        for place in (0..2 * M2).step_by(K4 as usize) {
            backing.write(place, &[1]).unwrap();
        }
        let ram = Memory::register(&backing, 0, G1, &Account::new("bench", None)).unwrap();
        let space = Space::new(&bus);
        let iommu = SoftIommu::new();
        let port = iommu.add_device(Rid(8), kind).unwrap();
        let device = Device::new(iommu, Rid(8)).unwrap();
        device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
        Scene { space, ram, port, device }
    }

    fn map(&self, iova: u64, offset: u64, length: u64) {
        self.space.map(Iova::new(iova), &self.ram, offset, length, RW).unwrap();
    }
}

fn small(criterion: &mut Criterion) {
    criterion.bench_function("an empty section", |bencher| bencher.iter(epoch::dma));
    for (name, kind) in [("native", TableKind::Native), ("VT-d", TableKind::VtdSecondStage)] {
        let scene = Scene::new(kind);
        scene.map(G1 + K4, 0, M2);
        let mut group = criterion.benchmark_group(format!("small, {name}"));
        let mut at = 0;
        // From page to page, so that more than one leaf is read.
        let mut next = || {
            at = (at + K4) % M1;
            G1 + K4 + at
        };
        group.bench_function("translate", |bencher| {
            bencher.iter(|| {
                let section = epoch::dma();
                scene.port.translate(&section, next(), RW).unwrap().oa
            });
        });
        let mut bytes = [0; 64];
        group.bench_function("read 64", |bencher| {
            bencher.iter(|| scene.port.read(next(), black_box(&mut bytes)).unwrap());
        });
        group.bench_function("write 64", |bencher| {
            bencher.iter(|| scene.port.write(next(), black_box(&bytes)).unwrap());
        });
        group.bench_function("write 8", |bencher| {
            bencher.iter(|| scene.port.write(next(), black_box(&bytes[..8])).unwrap());
        });
        group.bench_function("fetch and add", |bencher| {
            bencher.iter(|| scene.port.atomic_u64(next(), AtomicOperation::FetchAdd(1)).unwrap());
        });
        let list: Vec<DmaSegment> =
            (0..16).map(|index| DmaSegment { iova: G1 + K4 + index * K4, length: 64 }).collect();
        let mut bytes = [0; 1024];
        group.bench_function("read 16 segments of 64", |bencher| {
            bencher.iter(|| scene.port.read_list(black_box(&list), black_box(&mut bytes)).unwrap());
        });
        group.finish();
    }
}

/// A guest's table over the space: 512 pages of the device's from `first` on lead to the first ones of the guest, which has all of
/// its memory at 0.
fn guest_table(scene: &Scene, first: u64) -> Arc<Table> {
    // P, R/W, U/S, and the marks that a walk would leave.
    const ENTRY: u64 = 0x67;
    const TABLES: u64 = G1 / 2;
    let set = |place: u64, entry: u64| scene.ram.backing().write(place, &entry.to_le_bytes()).unwrap();
    for level in 0..3 {
        let table = TABLES + level * K4;
        set(table + (first >> (39 - 9 * level) & 511) * 8, (table + K4) | ENTRY);
    }
    (0..512).for_each(|page| set(TABLES + 3 * K4 + page * 8, (page * K4) | ENTRY));
    scene.map(0, 0, G1);
    Table::nested(&scene.space, &scene.device, FirstStage::X86_64, Iova::new(TABLES)).unwrap()
}

/// What is remembered of both stages, and what it takes to look a page up in them.
fn nested(criterion: &mut Criterion) {
    const FIRST: u64 = 0x40_0000_0000;
    for (name, kind) in [("native", TableKind::Native), ("VT-d", TableKind::VtdSecondStage)] {
        let scene = Scene::new(kind);
        let table = guest_table(&scene, FIRST);
        scene.device.attach(&table).unwrap();
        let mut group = criterion.benchmark_group(format!("nested, {name}"));
        let mut at = 0;
        let mut bytes = [0; 64];
        group.bench_function("read 64, remembered", |bencher| {
            bencher.iter(|| {
                at = (at + K4) % M1;
                scene.port.read(FIRST + at, black_box(&mut bytes)).unwrap();
            });
        });
        group.bench_function("look a page up", |bencher| {
            bencher.iter_custom(|iterations| {
                let mut time = Duration::ZERO;
                let mut left = iterations;
                while left > 0 {
                    let count = left.min(512);
                    table.nesting().unwrap().invalidate(IovaRange::ALL);
                    let start = Instant::now();
                    (0..count).for_each(|page| scene.port.resolve(FIRST + page * K4, RW).unwrap());
                    time += start.elapsed();
                    left -= count;
                }
                time
            });
        });
        group.bench_function("look a page up, read 64, and invalidate", |bencher| {
            let page = IovaRange::with_length(FIRST, K4).unwrap();
            bencher.iter(|| {
                scene.port.read(FIRST, black_box(&mut bytes)).unwrap();
                table.nesting().unwrap().invalidate(page);
            });
        });
        group.finish();
    }
}

fn large(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("1 MiB");
    group.throughput(Throughput::Bytes(M1));
    let mut to = vec![1u8; M1 as usize];
    let from = vec![2u8; M1 as usize];
    group.bench_function("memcpy", |bencher| {
        bencher.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
    });
    for (name, kind) in [("native", TableKind::Native), ("VT-d", TableKind::VtdSecondStage)] {
        let scene = Scene::new(kind);
        // Leaves of 2 MiB, leaves of 4 KiB one behind the other in memory, and in an order that lets none be joined.
        scene.map(G1, 0, M2);
        scene.map(2 * G1 + K4, 0, M2);
        for page in 0..M2 / K4 {
            scene.map(3 * G1 + page * K4, (page ^ 1) * K4, K4);
        }
        for (leaves, iova) in
            [("a 2 MiB leaf", G1), ("4 KiB leaves", 2 * G1 + K4), ("4 KiB leaves, scattered", 3 * G1)]
        {
            group.bench_function(BenchmarkId::new(format!("read, {name}"), leaves), |bencher| {
                bencher.iter(|| scene.port.read(iova, black_box(&mut to)).unwrap());
            });
            group.bench_function(BenchmarkId::new(format!("write, {name}"), leaves), |bencher| {
                bencher.iter(|| scene.port.write(iova, black_box(&from)).unwrap());
            });
        }
        scene.space.unmap(IovaRange::ALL).unwrap();
    }
    group.finish();
}

/// Keeps a device busy with copies of a MiB until it is dropped.
struct Busy {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn new(port: &Arc<Port>, iova: u64) -> Busy {
        let stop = Arc::new(AtomicBool::new(false));
        let (port, stopped) = (port.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; M1 as usize];
            while !stopped.load(Ordering::Relaxed) {
                port.read(iova, &mut buffer).unwrap();
            }
        });
        Busy { stop, thread: Some(thread) }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// How long an operation takes, by the median of many: on a machine with other work a device's thread may lose its CPU in
/// the middle of a copy, and then an unmap waits for the scheduler.
fn median(count: u64, mut operation: impl FnMut()) -> impl FnMut(u64) -> Duration {
    move |iterations| {
        let mut times: Vec<Duration> = (0..iterations.div_ceil(count))
            .map(|_| {
                let start = Instant::now();
                operation();
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[times.len() / 2].mul_f64(iterations as f64 / count as f64)
    }
}

/// One map and unmap of 4 KiB while a device is busy, with the wait for its DMA after each, after 64, or left to a flush.
fn unmaps(criterion: &mut Criterion) {
    const BATCH: u64 = 64;
    for (name, kind) in [("native", TableKind::Native), ("VT-d", TableKind::VtdSecondStage)] {
        let scene = Scene::new(kind);
        scene.map(G1, 0, M2);
        // The table page that holds the leaves is not made and retired each time.
        scene.map(2 * G1 + M2 - K4, 0, K4);
        let place = |index: u64| 2 * G1 + index % BATCH * K4;
        let range = |index: u64| IovaRange::with_length(place(index), K4).unwrap();
        let mut group = criterion.benchmark_group(format!("map and unmap 4 KiB under DMA, {name}"));
        group.throughput(Throughput::Elements(1));
        let _busy = Busy::new(&scene.port, G1);
        group.bench_function("strict", |bencher| {
            bencher.iter_custom(median(1, || {
                scene.map(place(0), 0, K4);
                scene.space.unmap(range(0)).unwrap();
            }));
        });
        group.bench_function("strict, in batches of 64", |bencher| {
            bencher.iter_custom(median(BATCH, || {
                (0..BATCH).for_each(|index| scene.map(place(index), index * K4, K4));
                let mut batch = scene.space.batch();
                for index in 0..BATCH {
                    batch.unmap(range(index)).unwrap();
                }
                batch.finish();
            }));
        });
        let mut index = 0;
        group.bench_function("deferred", |bencher| {
            bencher.iter_custom(median(BATCH, || {
                for _ in 0..BATCH {
                    index += 1;
                    scene.map(place(index), 0, K4);
                    scene.space.unmap_deferred(range(index)).unwrap();
                }
            }));
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1000))
        .sample_size(30)
        .without_plots();
    targets = small, nested, large, unmaps
}
criterion_main!(benches);
