//! The engine beside what else one might use: `cargo xtask bench engine` builds, repeats and judges this.
//!
//! Prints a line `op,who,value` for each thing measured: nanoseconds, unless the operation's name says otherwise.
//! `ioasid` is ours. The others stand for what programs use today:
//!
//! - `vm-memory` and `btree`: the peers of [`ioasid_peers`], behind a readers-writer lock where their users share them;
//! - `array`: a two-level array of output addresses without permissions, the shape of SPDK's memory map.
//!
//! Nobody's memory is touched except where a copy is measured: the cost of the books is all there is.

use ioasid::pagetable::{Attributes, Gather, HeapTables, Native, Oa, Radix, VtdSecondStage};
use ioasid::{Account, Backing, Bus, Device, Iova, IovaRange, Memory, Permissions, Rid, Space, Table, epoch};
use ioasid_peers::{BTree, Books, Mapping, VmMemory};
use ioasid_soft::dma::DmaPort;
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const RW: Permissions = Permissions::READ_WRITE;
/// Where mappings begin.
const BASE: u64 = 64 * GIB;
/// How many pages the translations choose from.
const PAGES_BITS: u32 = 20;
const PAGES: u64 = 1 << PAGES_BITS;
/// How many translations are timed together.
const LOOK_UPS: u64 = 1 << 20;

// ------------------------------------------------------------------------------------------------- measuring

/// Counts what a thread allocates, so that the size of everything can be told. Each thread for itself: one count would be a
/// part of what is measured.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

fn count(change: impl FnOnce(u64) -> u64) {
    // A thread that is ending may have lost its count.
    let _ = ALLOCATED.try_with(|allocated| allocated.set(change(allocated.get())));
}

// SAFETY: all work is done by the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|allocated| allocated.wrapping_add(layout.size() as u64));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(|allocated| allocated.wrapping_add(layout.size() as u64));
        // SAFETY: passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(|allocated| allocated.wrapping_sub(layout.size() as u64));
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Has the allocator hold memory in huge pages that is there already, and take everything from it: else what is measured is
/// how fast the system brings in pages, and how many translations the processor itself remembers, for whoever is unlucky.
fn back_with_huge_pages() {
    const HELD: usize = 1 << 30;
    // SAFETY: no allocation is in progress; the two ranges are parts of what was just allocated, and nobody else's.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        let memory = libc::malloc(HELD);
        assert!(!memory.is_null(), "no GiB of memory to measure with");
        let first = memory.byte_add(memory.align_offset(2 << 20));
        let length = HELD - (2 << 20);
        let huge = libc::madvise(first, length, libc::MADV_HUGEPAGE);
        let there = libc::madvise(first, length, libc::MADV_POPULATE_WRITE);
        if (huge, there) != (0, 0) {
            eprintln!("no huge pages to measure with: the times have page faults in them");
        }
        libc::free(memory);
    }
}

/// The median of some passes, in nanoseconds for each of `calls`.
fn median(passes: usize, calls: u64, mut pass: impl FnMut() -> Duration) -> f64 {
    pass();
    let mut times: Vec<f64> = (0..passes).map(|_| pass().as_nanos() as f64 / calls as f64).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn row(op: &str, who: &str, value: f64) {
    println!("{op},{who},{value:.3}");
}

/// Pseudo-random numbers, of which the upper bits are good.
fn next(state: u64) -> u64 {
    state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}

// ------------------------------------------------------------------------------------------------- scenes

/// A space with devices, and memory for it.
struct Scene {
    space: Arc<Space>,
    memory: Arc<Memory>,
    ports: Vec<Arc<Port>>,
    _devices: Vec<Device>,
}

impl Scene {
    fn new(bytes: u64, kinds: &[TableKind]) -> Scene {
        let bus = Bus::new();
        Scene::of(&bus, &Backing::anonymous(&bus, bytes).unwrap(), bytes, kinds)
    }

    /// The same with memory that is backed as the bench's own is.
    fn with_own_memory(bytes: u64, kinds: &[TableKind]) -> Scene {
        let bus = Bus::new();
        let memory = vec![0u8; bytes as usize].leak();
        // SAFETY: leaked, so it stays, and referred to by nobody else.
        let backing = unsafe { Backing::host(&bus, NonNull::from(memory).cast(), bytes) };
        Scene::of(&bus, &backing, bytes, kinds)
    }

    fn of(bus: &Arc<Bus>, backing: &Arc<Backing>, bytes: u64, kinds: &[TableKind]) -> Scene {
        let memory = Memory::register(backing, 0, bytes, &Account::new("bench", None)).unwrap();
        let space = Space::new(bus);
        let iommu = SoftIommu::new();
        let (mut ports, mut devices) = (Vec::new(), Vec::new());
        for (number, &kind) in kinds.iter().enumerate() {
            let rid = Rid(number as u16 + 1);
            ports.push(iommu.add_device(rid, kind).unwrap());
            let device = Device::new(iommu.clone(), rid).unwrap();
            device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
            devices.push(device);
        }
        Scene { space, memory, ports, _devices: devices }
    }

    fn map(&self, iova: u64, offset: u64, length: u64) {
        self.space.map(Iova::new(iova), &self.memory, offset, length, RW).unwrap();
    }

    fn unmap(&self, iova: u64, length: u64) {
        black_box(self.space.unmap(IovaRange::with_length(iova, length).unwrap()).unwrap());
    }
}

/// The page of memory behind each page of addresses: no two neighbours continue each other, so that nobody can make
/// one mapping of them.
fn behind(page: u64) -> u64 {
    page ^ 1
}

/// A page as a peer writes it down.
fn page_to(output: u64) -> Mapping {
    Mapping { length: PAGE, output, read: true, write: true }
}

// ------------------------------------------------------------------------------------------------- translating

/// Translates random addresses among the mapped pages. What comes out goes into the next address, or does not: which of the
/// two must be known when this is compiled, or a conditional move makes every address wait for the last answer.
#[inline(never)]
fn translations<const DEPENDENT: bool>(bits: u32, mut translate: impl FnMut(u64) -> u64) -> Duration {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let (mut answer, mut sum) = (0, 0u64);
    timed(|| {
        for _ in 0..LOOK_UPS {
            state = next(state ^ answer);
            let output = translate(BASE + ((state >> (64 - bits)) * PAGE) + 0x128);
            sum = sum.wrapping_add(output);
            if DEPENDENT {
                answer = output;
            }
        }
        black_box(sum);
    })
}

fn translate_rows(who: &str, mut translate: impl FnMut(u64) -> u64) {
    let random = median(5, LOOK_UPS, || translations::<false>(PAGES_BITS, &mut translate));
    row("translate_random_1M", who, random);
    let dependent = median(5, LOOK_UPS, || translations::<true>(PAGES_BITS, &mut translate));
    row("translate_random_1M_dependent", who, dependent);
    row("translate_hot", who, median(5, LOOK_UPS, || translations::<false>(3, &mut translate)));
}

fn translate_by<B: Books>() {
    let mut books = B::default();
    for page in 0..PAGES {
        books.map(BASE + page * PAGE, page_to(behind(page) * PAGE)).unwrap();
    }
    let books = RwLock::new(books);
    translate_rows(B::NAME, |iova| {
        books.read().unwrap().translate(iova, 8, true).map_or(0, |piece| piece.output)
    });
}

fn translating() {
    {
        let scene = Scene::new(PAGES * PAGE, &[TableKind::Native]);
        for page in 0..PAGES {
            scene.map(BASE + page * PAGE, behind(page) * PAGE, PAGE);
        }
        let port = &scene.ports[0];
        translate_rows("ioasid", |iova| {
            let section = epoch::dma();
            port.translate(&section, iova, RW).map_or(0, |found| found.oa.get())
        });
    }
    translate_by::<VmMemory>();
    translate_by::<BTree>();
    {
        // 1 GiB for each entry of the first level.
        let mut array: Vec<Option<Box<[u64]>>> = (0..1 << 18).map(|_| None).collect();
        for page in 0..PAGES {
            let iova = BASE + page * PAGE;
            let second = array[(iova >> 30) as usize].get_or_insert_with(|| vec![0; 1 << 18].into());
            second[((iova >> 12) & 0x3_ffff) as usize] = behind(page) * PAGE;
        }
        translate_rows("array", |iova| match &array[((iova >> 30) & 0x3_ffff) as usize] {
            Some(second) => second[((iova >> 12) & 0x3_ffff) as usize] + (iova & (PAGE - 1)),
            None => 0,
        });
    }
}

// ------------------------------------------------------------------------------------------------- mapping

const PAIRS: u64 = 4096;

/// One page mapped and unmapped again and again.
fn pairs(scene: &Scene, iova: u64, calls: u64) {
    for call in 0..calls {
        let at = iova + (call % 64) * PAGE;
        scene.map(at, (call % 64) * PAGE, PAGE);
        scene.unmap(at, PAGE);
    }
}

/// The same without waiting for DMA each time.
fn deferred_pairs(scene: &Scene, iova: u64, calls: u64) {
    for call in 0..calls {
        let at = iova + (call % 64) * PAGE;
        scene.map(at, (call % 64) * PAGE, PAGE);
        black_box(scene.space.unmap_deferred(IovaRange::with_length(at, PAGE).unwrap()).unwrap());
    }
}

/// Pages mapped, and then unmapped together.
fn batches(scene: &Scene, iova: u64, calls: u64) {
    for _ in 0..calls / 64 {
        for page in 0..64 {
            scene.map(iova + page * PAGE, page * PAGE, PAGE);
        }
        let mut batch = scene.space.batch();
        for page in 0..64 {
            black_box(batch.unmap(IovaRange::with_length(iova + page * PAGE, PAGE).unwrap()).unwrap());
        }
        batch.finish();
    }
}

/// What the page tables alone take for a pair: the native one, which is claimed, and a derived one.
fn table_pairs(calls: u64) -> Duration {
    let native = Radix::native(Native::new());
    let derived = Radix::new(VtdSecondStage::new(4).unwrap(), HeapTables);
    let mut gather = Gather::new();
    let range = |page| IovaRange::with_length(BASE + page * PAGE, PAGE).unwrap();
    let attributes = Attributes::READ | Attributes::WRITE;
    // So that the tables stay.
    native.claim(range(64), Oa::new(PAGE), attributes, &mut gather).unwrap();
    native.publish(range(64));
    derived.map(range(64), Oa::new(PAGE), attributes, &mut gather).unwrap();
    timed(|| {
        for call in 0..calls {
            let (range, oa) = (range(call % 64), Oa::new((call % 64) * PAGE));
            native.claim(range, oa, attributes, &mut gather).unwrap();
            derived.map(range, oa, attributes, &mut gather).unwrap();
            native.publish(range);
            let mut gather = Gather::new();
            native.retract(range, &mut gather).unwrap();
            derived.unmap(range, &mut gather).unwrap();
            native.release(range, &mut gather);
            black_box(gather.leaves);
        }
    })
}

/// Calls `work` while a device does copies of 1 MiB.
fn beside_copies<T>(port: &Arc<Port>, iova: u64, work: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = vec![0; MIB as usize];
            while !stop.load(Relaxed) {
                port.read(iova, &mut buffer).unwrap();
                begun.store(true, Relaxed);
            }
        });
        while !begun.load(Relaxed) {
            std::thread::yield_now();
        }
        let result = work();
        stop.store(true, Relaxed);
        result
    })
}

fn mapping() {
    for (op, kinds) in [
        ("map_unmap_4K_no_table", &[][..]),
        ("map_unmap_4K_native_table", &[TableKind::Native][..]),
        ("map_unmap_4K_one_derived", &[TableKind::VtdSecondStage][..]),
    ] {
        let scene = Scene::new(64 * MIB, kinds);
        row(op, "ioasid", median(21, PAIRS, || timed(|| pairs(&scene, BASE, PAIRS))));
    }
    {
        let op = "map_unmap_4K_deferred_one_derived";
        let scene = Scene::new(64 * MIB, &[TableKind::VtdSecondStage]);
        row(op, "ioasid", median(21, PAIRS, || timed(|| deferred_pairs(&scene, BASE, PAIRS))));
        row(op, "page tables", median(21, PAIRS, || table_pairs(PAIRS)));
    }
    {
        let scene = Scene::new(64 * MIB, &[TableKind::VtdSecondStage]);
        scene.map(BASE - MIB, 32 * MIB, MIB);
        for (op, work) in
            [("map_unmap_4K_strict_busy", pairs as Pairs), ("map_unmap_4K_strict_busy_batch_64", batches)]
        {
            let time = beside_copies(&scene.ports[0], BASE - MIB, || {
                median(9, PAIRS, || timed(|| work(&scene, BASE, PAIRS)))
            });
            row(op, "ioasid", time);
        }
    }
    {
        let scene = Scene::new(TIB, &[]);
        let times = median(21, 1, || {
            let time = timed(|| scene.map(TIB, 0, TIB));
            scene.unmap(TIB, TIB);
            time
        });
        row("map_1T_as_1G", "ioasid", times);
    }
}

/// Separate pages, each registered and mapped by itself; and, unmapped all at once, released one by one.
fn registering() {
    let in_order: Vec<u64> = (0..PAGES).collect();
    let mut random = in_order.clone();
    let mut state = 1;
    for index in (1..random.len()).rev() {
        state = next(state);
        random.swap(index, ((u128::from(state) * (index as u128 + 1)) >> 64) as usize);
    }
    for (op, release, order) in [
        ("register_map_1M_in_order", "release_1M_in_order", &in_order),
        ("register_map_1M_random", "release_1M_random", &random),
    ] {
        let bus = Bus::new();
        // Every other page, so that no piece continues another.
        let backing = Backing::anonymous(&bus, 2 * PAGES * PAGE).unwrap();
        let account = Account::new("bench", None);
        let space = Space::new(&bus);
        let mut held = Vec::with_capacity(order.len());
        let time = timed(|| {
            for &page in order {
                let memory = Memory::register(&backing, 2 * page * PAGE, PAGE, &account).unwrap();
                space.map(Iova::new(BASE + page * PAGE), &memory, 0, PAGE, RW).unwrap();
                held.push(memory);
            }
        });
        row(op, "ioasid", time.as_nanos() as f64 / PAGES as f64);
        let mut books = BTree::default();
        let time = timed(|| {
            for &page in order {
                books.map(BASE + page * PAGE, page_to(2 * page * PAGE)).unwrap();
            }
        });
        row(op, "btree", time.as_nanos() as f64 / PAGES as f64);
        space.unmap(IovaRange::with_length(BASE, PAGES * PAGE).unwrap()).unwrap();
        let time = timed(|| held.into_iter().for_each(drop));
        row(release, "ioasid", time.as_nanos() as f64 / PAGES as f64);
        let time = timed(|| {
            for &page in order {
                let iova = BASE + page * PAGE;
                black_box(books.unmap(iova, iova + (PAGE - 1)));
            }
        });
        row(release, "btree", time.as_nanos() as f64 / PAGES as f64);
    }
}

// ------------------------------------------------------------------------------------------------- two threads

/// Maps and unmaps pages of a scene: from an address on, so many times.
type Pairs = fn(&Scene, u64, u64);

/// Pairs per microsecond of two threads, each with a scene and a base of its own.
fn two_threads(scenes: [&Scene; 2], pairs: Pairs) -> f64 {
    const CALLS: u64 = 100_000;
    let barrier = std::sync::Barrier::new(2);
    let work = |scene: &Scene, iova: u64| {
        barrier.wait();
        timed(|| pairs(scene, iova, CALLS))
    };
    let work = &work;
    let [one, other] = std::thread::scope(|scope| {
        let one = scope.spawn(move || work(scenes[0], BASE));
        let other = scope.spawn(move || work(scenes[1], BASE + GIB));
        [one.join().unwrap(), other.join().unwrap()]
    });
    2.0 * CALLS as f64 / (one.max(other).as_nanos() as f64 / 1000.0)
}

fn middle(mut ratios: Vec<f64>) -> f64 {
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

fn threads() {
    let kinds = [TableKind::Native, TableKind::VtdSecondStage];
    for (op, kinds, pairs) in [
        ("one_space_to_two_no_table_ratio", &kinds[..0], pairs as Pairs),
        ("one_space_to_two_with_tables_ratio", &kinds[..], pairs),
        ("one_space_to_two_deferred_ratio", &kinds[..], deferred_pairs),
    ] {
        let scenes = [Scene::new(64 * MIB, kinds), Scene::new(64 * MIB, kinds)];
        let ratio =
            |_| two_threads([&scenes[0], &scenes[0]], pairs) / two_threads([&scenes[0], &scenes[1]], pairs);
        row(op, "ioasid", middle((0..9).map(ratio).collect()));
    }
    for (op, pairs) in [
        ("dma_beside_mapping_to_alone_ratio", pairs as Pairs),
        ("dma_beside_deferred_mapping_to_alone_ratio", deferred_pairs),
    ] {
        row(op, "ioasid", middle((0..9).map(|_| dma_beside_mapping(pairs)).collect()));
    }
}

/// What a device still does while somebody maps and unmaps, of what it does alone.
fn dma_beside_mapping(pairs: Pairs) -> f64 {
    let scene = Scene::new(64 * MIB, &[TableKind::Native]);
    scene.map(BASE - MIB, 32 * MIB, MIB);
    let copies = |count: u64| {
        let mut buffer = vec![0; 64 * 1024];
        timed(|| {
            for _ in 0..count {
                scene.ports[0].read(BASE - MIB, &mut buffer).unwrap();
            }
        })
    };
    let alone = copies(4000);
    let stop = AtomicBool::new(false);
    let beside = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                pairs(&scene, BASE, 64);
            }
        });
        let beside = copies(4000);
        stop.store(true, Relaxed);
        beside
    });
    alone.as_nanos() as f64 / beside.as_nanos() as f64
}

// ------------------------------------------------------------------------------------------------- copying

fn copying() {
    let scene = Scene::with_own_memory(64 * MIB, &[TableKind::Native]);
    scene.map(BASE, 0, 64 * MIB);
    let port = &scene.ports[0];
    let mut small = [0u8; 64];
    let time = median(21, 10_000, || {
        timed(|| {
            for call in 0..10_000u64 {
                port.read(BASE + (call % 512) * 64, black_box(&mut small)).unwrap();
            }
        })
    });
    row("dma_64B_hot", "ioasid", time);
    let mut large = vec![0u8; MIB as usize];
    let memory = vec![1u8; MIB as usize];
    port.write(BASE, &memory).unwrap();
    let ours = median(101, 1, || timed(|| port.read(BASE, black_box(&mut large)).unwrap()));
    row("dma_1M", "ioasid", ours);
    row("dma_1M", "memcpy", median(101, 1, || timed(|| large.copy_from_slice(black_box(&memory)))));
}

// ------------------------------------------------------------------------------------------------- memory

/// How much more is allocated after `work` than before; its result stays until then.
fn growth<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let before = ALLOCATED.get();
    let result = work();
    (ALLOCATED.get().wrapping_sub(before) as f64, result)
}

fn sizes() {
    for (op, kinds) in [
        ("dense_1M_native_bytes", &[TableKind::Native][..]),
        ("dense_1M_one_derived_bytes", &[TableKind::VtdSecondStage][..]),
    ] {
        let scene = Scene::new(PAGES * PAGE, kinds);
        let (bytes, ()) = growth(|| {
            for page in 0..PAGES {
                scene.map(BASE + page * PAGE, behind(page) * PAGE, PAGE);
            }
        });
        row(op, "ioasid", bytes / PAGES as f64);
    }
    {
        const TABLES: u64 = 16384;
        let scene = Scene::new(64 * MIB, &[TableKind::Native]);
        let (bytes, ()) = growth(|| {
            for table in 0..TABLES {
                scene.map(BASE + table * 2 * MIB, PAGE, PAGE);
            }
        });
        row("one_page_per_2M_bytes", "ioasid", bytes / TABLES as f64);
    }
    {
        const SPACES: usize = 1 << 20;
        let bus = Bus::new();
        let (bytes, spaces) = growth(|| (0..SPACES).map(|_| Space::new(&bus)).collect::<Vec<_>>());
        row("empty_space_bytes", "ioasid", bytes / SPACES as f64);
        drop(spaces);
    }
}

const GROUPS: [(&str, fn()); 6] = [
    // First: table pages that others have given back would be taken for nothing.
    ("memory", sizes),
    ("translate", translating),
    ("map", mapping),
    ("register", registering),
    ("threads", threads),
    ("copy", copying),
];

fn main() {
    // `cargo bench` says so; `cargo test` only wants to see whether it starts.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    back_with_huge_pages();
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    for (name, group) in GROUPS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            group();
        }
    }
}
