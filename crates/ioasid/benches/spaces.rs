//! What mapping costs: `cargo bench -p ioasid`.
//!
//! No device is doing DMA, so an unmap that has to wait for DMA pays for the asymmetric fence and for nothing else.
//! Memory is registered beforehand, as a program does that maps often.

#![allow(missing_docs, reason = "criterion's macro makes a public function")]

use criterion::{Criterion, criterion_group, criterion_main};
use ioasid::pagetable::VtdSecondStage;
use ioasid::{
    Account, AttachError, Backing, Bus, DerivedTable, Device, Iommu, Iova, IovaRange, Memory, PageSize,
    Permissions, RadixTable, Requirements, Rid, Space, Table, TableClass,
};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const RW: Permissions = Permissions::READ_WRITE;

/// The least that an IOMMU can be: device 0 walks the native table, every other one a VT-d table of its own.
#[derive(Debug)]
struct Bench;

impl Iommu for Bench {
    fn requirements(&self, device: Rid) -> Option<Requirements> {
        let class = match device {
            Rid(0) => TableClass::NATIVE,
            Rid(number) => TableClass::Derived { iommu: 0, format: "vtdss", variant: number.into() },
        };
        let aperture = IovaRange::with_length(0, 1 << 48)?;
        Some(Requirements { class, aperture, reserved: Vec::new(), snooping_class: None, no_snoop: false })
    }

    fn new_table(
        &self,
        _: TableClass,
        _: PageSize,
        _: &Arc<Bus>,
    ) -> Result<Arc<dyn DerivedTable>, AttachError> {
        let format = VtdSecondStage::new(4).ok_or(AttachError::Incompatible)?;
        Ok(Arc::new(RadixTable::new(format)))
    }

    fn attach(&self, _device: Rid, _table: &Arc<Table>) -> Result<(), AttachError> {
        Ok(())
    }

    fn block(&self, _device: Rid) {}
}

/// Two GiB of registered memory and an empty space with some tables.
struct Scene {
    space: Arc<Space>,
    ram: Arc<Memory>,
    _devices: Vec<Device>,
}

impl Scene {
    fn new(devices: std::ops::Range<u16>) -> Scene {
        let bus = Bus::new();
        let backing = Backing::anonymous(&bus, 2 * G1).unwrap();
        let ram = Memory::register(&backing, 0, 2 * G1, &Account::new("bench", None)).unwrap();
        let space = Space::new(&bus);
        let attach = |rid| {
            let device = Device::new(Arc::new(Bench), Rid(rid)).unwrap();
            device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
            device
        };
        let _devices = devices.map(attach).collect();
        Scene { space, ram, _devices }
    }

    fn map(&self, offset: u64, length: u64) {
        self.space.map(Iova::new(G1), black_box(&self.ram), offset, length, RW).unwrap();
    }

    fn unmap(&self, offset: u64, length: u64) {
        let range = IovaRange::with_length(G1 + offset, length).unwrap();
        assert_eq!(black_box(self.space.unmap(range)).unwrap().bytes(), length);
    }
}

fn pairs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("map and unmap 4 KiB");
    for (name, devices) in [
        ("no table", 0..0),
        ("native table", 0..1),
        ("native and 1 derived table", 0..2),
        ("native and 2 derived tables", 0..3),
    ] {
        let scene = Scene::new(devices);
        // The table page that holds the leaf is not made and retired each time.
        scene.space.map(Iova::new(G1 + M2 - K4), &scene.ram, 0, K4, RW).unwrap();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                scene.map(0, K4);
                scene.unmap(0, K4);
            });
        });
    }
    group.finish();

    // The waiting for DMA by itself, to be taken from the figures above.
    criterion.bench_function("wait for no DMA", |bencher| bencher.iter(ioasid::epoch::wait_for_dma));
}

/// Times one half of a pair.
fn half(timed: impl Fn(), other: impl Fn(), timed_first: bool) -> impl FnMut(u64) -> Duration {
    move |iterations| {
        let mut sum = Duration::ZERO;
        for _ in 0..iterations {
            if !timed_first {
                other();
            }
            let start = Instant::now();
            timed();
            sum += start.elapsed();
            if timed_first {
                other();
            }
        }
        sum
    }
}

fn gibibytes(criterion: &mut Criterion) {
    for (memory, offset) in [("1 GiB in one leaf", 0), ("1 GiB in pages of 4 KiB", K4)] {
        for (tables, devices) in [("no table", 0..0), ("native and 1 derived table", 0..2)] {
            let mut group = criterion.benchmark_group(memory);
            group.sample_size(10);
            let scene = Scene::new(devices);
            let (map, unmap) = (|| scene.map(offset, G1), || scene.unmap(0, G1));
            group.bench_function(format!("map, {tables}"), |bencher| {
                bencher.iter_custom(half(map, unmap, true));
            });
            group.bench_function(format!("unmap, {tables}"), |bencher| {
                bencher.iter_custom(half(unmap, map, false));
            });
            group.finish();
        }
    }
}

fn cuts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cut out of 1 GiB in one leaf");
    for (tables, devices) in [("no table", 0..0), ("native and 1 derived table", 0..2)] {
        let scene = Scene::new(devices);
        for (name, length) in [("2 MiB", M2), ("4 KiB", K4)] {
            group.bench_function(format!("{name}, {tables}"), |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut sum = Duration::ZERO;
                    for _ in 0..iterations {
                        scene.map(0, G1);
                        let start = Instant::now();
                        scene.unmap(G1 / 2, length);
                        sum += start.elapsed();
                        scene.space.unmap(IovaRange::ALL).unwrap();
                    }
                    sum
                });
            });
        }
    }
    group.finish();
}

fn registrations(criterion: &mut Criterion) {
    let bus = Bus::new();
    let account = Account::new("bench", None);
    let backing = Backing::anonymous(&bus, G1).unwrap();
    criterion.bench_function("register and release 1 GiB", |bencher| {
        bencher.iter(|| Memory::register(&backing, 0, G1, &account).unwrap());
    });
    let _held = Memory::register(&backing, 0, G1, &account).unwrap();
    criterion.bench_function("register and release 1 GiB once more", |bencher| {
        bencher.iter(|| Memory::register(&backing, 0, G1, &account).unwrap());
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .sample_size(30)
        .without_plots();
    targets = pairs, gibibytes, cuts, registrations
}
criterion_main!(benches);
