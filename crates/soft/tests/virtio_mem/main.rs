//! virtio-mem: a guest's memory grows and shrinks in small blocks, while devices do DMA to it.
//!
//! The complaint was this. A gibibyte of guest memory is mapped for devices in one call, and gets one large leaf. Later the
//! guest gives 2 MiB of it back. VFIO's type1 cannot take them out: version 1 reports success and has unmapped nothing,
//! version 2 refuses, and iommufd finds no mapping that ends there. So programs map in small blocks from the beginning, for
//! the sake of what may be removed one day, and have neither the one call nor the large leaf.
//!
//! Here the gibibyte is mapped in one call. A thread then plugs and unplugs blocks of 2 MiB and of 4 KiB at random, a million
//! times, and gives what it has unplugged back to the host, as a VMM does. All the while every device, on a table of its own
//! format and on a thread of its own, reads and writes all over the region. In between, and in the end, everything is plugged
//! in again and merged on request. What has to hold:
//!
//! - not one wrong byte (`region.rs` says how one would be known),
//! - not one spurious fault: what is plugged is always reached, whatever happens to its neighbours,
//! - every DMA to what is unplugged faults, and moves nothing,
//! - then every table has the leaves that it had in the beginning, in as few table pages, and nobody was ever charged for
//!   more than one gibibyte.
//!
//! Nothing here takes a lock. A page's *phase*, in `region.rs`, is what a device goes by.
//!
//! Without optimisation there are fewer steps; the million is
//! `cargo test --release -p ioasid-soft --test virtio_mem -- --nocapture`, which also shows the leaves and what the devices
//! have done.

mod device;
mod random;
mod region;

use device::{Done, VirtualDevice};
use ioasid::pagetable::Native;
use ioasid::{IovaRange, PageSize, Space};
use ioasid_soft::iommu::{SoftIommu, TableKind};
use random::Random;
use region::{BASE, BLOCKS, PAGE, PAGES_PER_BLOCK, REGION, Region};
use std::sync::atomic::{AtomicBool, Ordering};

/// How many steps the scenario has that the complaint was about.
const STEPS: u64 = if cfg!(debug_assertions) { 20_000 } else { 1_000_000 };
/// How many there are in others, which are there for their formats.
const FEWER_STEPS: u64 = STEPS / 10;
/// How often all is plugged in again and merged, after equally many steps.
const ROUNDS: u64 = 4;
/// How many DMAs a device does at least, however quick the steps are.
const LEAST_DMAS: u64 = 2_000;

/// Devices, how their space is made, and what is plugged and unplugged.
struct Scenario {
    kinds: &'static [TableKind],
    /// The largest leaf of the space: the cut granule, where a table cannot be cut while devices use it.
    largest_leaf: PageSize,
    /// Whether there are blocks of 4 KiB beside those of 2 MiB.
    pages_too: bool,
    steps: u64,
}

/// How many leaves of each size a table has.
type Leaves = Vec<(PageSize, u64)>;

/// The leaves of every table, the native one first, and the bytes of all of them together.
fn tables(space: &Space, devices: &[VirtualDevice]) -> (Vec<(&'static str, Leaves)>, u64) {
    let statistics = space.statistics();
    let derived = devices.iter().filter(|device| device.table().derived().is_some());
    let derived = derived.map(|device| (device.name(), device.table().leaves_by_size().unwrap()));
    let leaves = std::iter::once(("the space", statistics.leaves)).chain(derived).collect();
    (leaves, statistics.native_table_bytes + statistics.derived_table_bytes)
}

fn report(moment: &str, space: &Space, devices: &[VirtualDevice]) {
    let (tables, bytes) = tables(space, devices);
    println!("{moment}: {bytes} bytes of tables");
    for (name, leaves) in tables {
        let leaves: Vec<String> = leaves.iter().map(|(size, count)| format!("{count} of {size}")).collect();
        println!("    {name:12} {}", leaves.join(", "));
    }
}

/// One step of the plugging thread: a block of 2 MiB, or a page of it, the other way round.
fn step(region: &Region, plugged: &mut [bool], pages_too: bool, random: &mut Random) {
    let block = region.next_block(random.below(BLOCKS));
    let first = block * PAGES_PER_BLOCK;
    let pages = if !pages_too || random.below(2) == 0 {
        first..first + PAGES_PER_BLOCK
    } else {
        // Half of them among those that devices look at.
        let page = first + random.below(PAGES_PER_BLOCK);
        let page = if random.below(2) == 0 { page } else { region.near_watched(page) };
        page..page + 1
    };
    let there = pages.clone().filter(|page| plugged[*page as usize]).count() as u64;
    let whole = pages.end - pages.start;
    if there == whole || (there > 0 && random.below(2) == 0) {
        // Exactly what is there, also where a part of the block was unplugged before.
        region.unplug(pages.clone(), |page| plugged[page as usize]);
        pages.for_each(|page| plugged[page as usize] = false);
    } else {
        plug_all(region, plugged, pages);
    }
}

/// Plugs what is missing of these pages, with a call for each stretch.
fn plug_all(region: &Region, plugged: &mut [bool], pages: std::ops::Range<u64>) {
    let mut next = pages.start;
    while let Some(first) = (next..pages.end).find(|page| !plugged[*page as usize]) {
        next = (first..pages.end).find(|page| plugged[*page as usize]).unwrap_or(pages.end);
        region.plug(first..next);
        (first..next).for_each(|page| plugged[page as usize] = true);
    }
}

fn run(scenario: &Scenario) {
    let bus = ioasid::Bus::new();
    let format = Native::new().with_largest_leaf(scenario.largest_leaf);
    let space = Space::with_format(&bus, format);
    let iommu = SoftIommu::new();
    let mut devices: Vec<VirtualDevice> =
        scenario.kinds.iter().map(|kind| VirtualDevice::attach(*kind, &iommu, &space)).collect();

    let whole = IovaRange::with_length(BASE, REGION).unwrap();

    // One call.
    let region = Region::map(&space);
    let beginning = tables(&space, &devices);
    report("mapped in one call", &space, &devices);

    let mut plugged = vec![true; (REGION / PAGE) as usize];
    let ended = AtomicBool::new(false);
    let done: Vec<Done> = std::thread::scope(|scope| {
        let threads: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|(number, device)| {
                let (region, ended) = (&region, &ended);
                scope.spawn(move || {
                    let _end = EndOnDrop(ended);
                    device.work(number, region, LEAST_DMAS, ended)
                })
            })
            .collect();
        // Whoever fails, all come to an end.
        let _end = EndOnDrop(&ended);
        let mut random = Random::new(1);
        for round in 1..=ROUNDS {
            let show = |moment| {
                if round == ROUNDS {
                    report(moment, &space, &devices);
                }
            };
            for number in 0..scenario.steps / ROUNDS {
                if ended.load(Ordering::SeqCst) {
                    // A device has found a mistake.
                    break;
                }
                step(&region, &mut plugged, scenario.pages_too, &mut random);
                if number == scenario.steps / ROUNDS / 2 {
                    show("in the middle");
                    // Nothing is lost or won by a merge while something is missing.
                    space.merge(whole);
                    let there = plugged.iter().filter(|plugged| **plugged).count() as u64;
                    assert_eq!(space.statistics().mapped_bytes, there * PAGE);
                    assert_eq!(region.charged_pages(), REGION / PAGE);
                }
            }
            plug_all(&region, &mut plugged, 0..REGION / PAGE);
            show("plugged in again");
            space.merge(whole);
            // Devices are still at it.
            assert_eq!(tables(&space, &devices), beginning);
        }
        ended.store(true, Ordering::SeqCst);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    report("merged", &space, &devices);
    for (device, done) in devices.iter().zip(&done) {
        println!("    {:12} {done}", device.name());
        assert_eq!(device.faults(), done.faults, "{}: faults that nobody has seen", device.name());
    }
    assert_eq!((region.charged_pages(), region.peak_pages()), (REGION / PAGE, REGION / PAGE));

    // And away.
    devices.iter_mut().for_each(VirtualDevice::detach);
    devices.clear();
    let statistics = space.statistics();
    assert_eq!((statistics.tables, statistics.derived_table_bytes), (0, 0));
    assert_eq!(space.unmap(IovaRange::ALL).unwrap().bytes(), REGION);
    assert_eq!(space.statistics().leaves, []);
    assert_eq!(region.release(), 0);
}

/// Tells all threads to end.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn blocks_come_and_go_below_devices_and_the_gibibyte_is_one_leaf_again() {
    let scenario = Scenario {
        kinds: &[TableKind::VtdSecondStage, TableKind::X86_64, TableKind::Native],
        largest_leaf: PageSize::SIZE_1G,
        pages_too: true,
        steps: STEPS,
    };
    run(&scenario);
}

/// AMD v1 may not cut a leaf while devices use it, and RISC-V not one of 64 KiB. A space that says from the beginning how
/// finely it will be cut can have them all the same.
#[test]
fn tables_that_cannot_be_cut_follow_a_space_with_a_cut_granule() {
    for (largest_leaf, pages_too) in [(PageSize::SIZE_2M, false), (PageSize::SIZE_4K, true)] {
        run(&Scenario {
            kinds: &[TableKind::AmdV1, TableKind::Sv48],
            largest_leaf,
            pages_too,
            steps: FEWER_STEPS,
        });
    }
}
