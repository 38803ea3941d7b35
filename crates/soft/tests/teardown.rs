//! Everything goes, in any order, while everybody is at work.
//!
//! A machine with devices that do DMA on several threads, by requester ID and by PASID; a thread that maps, unmaps, protects, splits
//! and merges; a thread that attaches and replaces, also to tables of the guest's over a space; one that takes PASIDs for another
//! guest. Beside them what they work with is
//! closed: spaces, memory, devices, sets of PASIDs, accounts, in an order that is drawn at random. Whoever has something in
//! his hands keeps it until he is through, so the last one to let go may be anybody.
//!
//! - Memory that has gone is filled with a byte that no device ever writes. No device reads it, and nothing else is found there.
//! - A PASID that is given out leads nowhere, at any device.
//! - When all threads have ended, everything counts to zero.

use ioasid::pagetable::HeapTables;
use ioasid::pasid::{Limit, Owner, Pasid, PasidSet, PasidSystem, Spid};
use ioasid::{
    Account, Backing, Bus, Device, FirstStage, Iova, IovaRange, Memory, PageSize, Permissions, Rid, Space,
    Table, epoch,
};
use ioasid_soft::dma::{DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const M2: u64 = 2 << 20;
/// Pages of each memory.
const PAGES: u64 = 1024;
const AT: u64 = 1 << 30;
/// Where the guest has its tables, in both spaces, and how many pages they take.
const TABLES: u64 = 2 << 30;
const TABLE_PAGES: u64 = 5;
const CHARGED: u64 = 2 * PAGES + TABLE_PAGES;
/// How many transfers there are before anything goes.
const BEFORE: u64 = 20;
/// By then they have been made, however busy the machine is.
const CERTAINTY: Duration = Duration::from_secs(60);
/// Stands where memory has gone.
const GONE: u8 = 0xdd;
const KINDS: [TableKind; 3] = [TableKind::Native, TableKind::VtdSecondStage, TableKind::X86_64];
/// The guest's numbers of its address spaces.
const NUMBERS: std::ops::Range<u32> = 1..4;

/// What can be closed.
#[derive(Clone, Copy, Debug)]
enum Thing {
    Space(usize),
    Memory(usize),
    Device(usize),
    Guest,
    Account,
}

const THINGS: [Thing; 10] = [
    Thing::Space(0),
    Thing::Space(1),
    Thing::Memory(0),
    Thing::Memory(1),
    Thing::Memory(2),
    Thing::Device(0),
    Thing::Device(1),
    Thing::Device(2),
    Thing::Guest,
    Thing::Account,
];

/// Writes a table by which the same addresses lead to the same addresses of a space, for all pages from [`AT`] on.
fn write_tables(backing: &Backing) {
    // P, R/W, U/S of x86-64; what is used is marked by whoever uses it.
    const ENTRY: u64 = 7;
    let set = |page: u64, index: u64, entry: u64| {
        backing.write(page * PAGE + index * 8, &(entry | ENTRY).to_le_bytes()).unwrap();
    };
    set(0, 0, TABLES + PAGE);
    set(1, AT >> 30, TABLES + 2 * PAGE);
    for page in 0..PAGES {
        set(2, page / 512, TABLES + (3 + page / 512) * PAGE);
        set(3 + page / 512, page % 512, AT + page * PAGE);
    }
}

/// Registered memory, which is filled with [`GONE`] by whoever lets go last.
struct Lent {
    memory: Option<Arc<Memory>>,
    backing: Arc<Backing>,
}

impl Lent {
    fn memory(&self) -> &Arc<Memory> {
        self.memory.as_ref().unwrap()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let pages = self.memory().length() / PAGE;
        self.memory = None;
        for page in 0..pages {
            self.backing.write(page * PAGE, &[GONE; 64]).unwrap();
        }
    }
}

/// Something that many use, until it is closed.
struct Slot<T>(Mutex<Option<Arc<T>>>);

impl<T> Slot<T> {
    fn new(thing: T) -> Slot<T> {
        Slot::of(Arc::new(thing))
    }

    fn of(thing: Arc<T>) -> Slot<T> {
        Slot(Mutex::new(Some(thing)))
    }

    fn get(&self) -> Option<Arc<T>> {
        self.0.lock().unwrap().clone()
    }

    /// What others have in their hands goes when they are through.
    fn close(&self) {
        let thing = self.0.lock().unwrap().take();
        drop(thing);
    }
}

struct Machine {
    iommu: Arc<SoftIommu>,
    system: Arc<PasidSystem>,
    limit: Limit,
    spaces: [Slot<Space>; 2],
    /// The last one has the guest's tables.
    memories: [Slot<Lent>; 3],
    devices: [Slot<Device>; 3],
    guest: Slot<PasidSet>,
    account: Slot<Account>,
    /// The ways of the devices, which the device models keep whatever becomes of the rest.
    ports: Vec<Arc<Port>>,
    over: AtomicBool,
    moved: AtomicU64,
}

/// Small random numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn of<'a, T>(&mut self, things: &'a [T]) -> &'a T {
        &things[self.below(things.len() as u64) as usize]
    }
}

fn some_pages(random: &mut Random) -> IovaRange {
    let first = random.below(PAGES);
    let most = if random.below(4) == 0 { PAGES } else { 8 };
    let count = 1 + random.below(most);
    IovaRange::with_length(AT + first * PAGE, count * PAGE).unwrap()
}

impl Machine {
    fn new(backings: &[Arc<Backing>; 3], account: Account, system: &Arc<PasidSystem>) -> Machine {
        let bus = backings[0].bus();
        let iommu = SoftIommu::new();
        let spaces = [0, 1].map(|_| Space::new(bus));
        let memories = backings.each_ref().map(|backing| {
            let memory = Memory::register(backing, 0, backing.length().unwrap(), &account).unwrap();
            if backing.length() == Some(TABLE_PAGES * PAGE) {
                write_tables(backing);
                for space in &spaces {
                    let (at, length) = (Iova::new(TABLES), TABLE_PAGES * PAGE);
                    space.map(at, &memory, 0, length, Permissions::READ_WRITE).unwrap();
                }
            }
            Slot::new(Lent { memory: Some(memory), backing: backing.clone() })
        });
        let rid = |number: usize| Rid(8 * (1 + number as u16));
        let mut ports: Vec<_> =
            (0..3).map(|number| iommu.add_device(rid(number), KINDS[number]).unwrap()).collect();
        let limit = Limit::new(system, "guests", None);
        let guest = system.create_set(Owner::Machine(1), 16, &limit).unwrap();
        for number in NUMBERS {
            let pasid = guest.allocate(1..=u32::MAX, 0).unwrap();
            guest.set_spid(pasid, Spid::new(number)).unwrap();
            ports.extend((0..3).map(|device| iommu.port_with_pasid(rid(device), pasid).unwrap()));
        }
        Machine {
            spaces: spaces.map(Slot::of),
            devices: [0, 1, 2].map(|number| Slot::new(Device::new(iommu.clone(), rid(number)).unwrap())),
            memories,
            guest: Slot::new(guest),
            account: Slot::new(account),
            limit,
            system: system.clone(),
            iommu,
            ports,
            over: AtomicBool::new(false),
            moved: AtomicU64::new(0),
        }
    }

    fn close(&self, thing: Thing) {
        match thing {
            Thing::Space(number) => self.spaces[number].close(),
            Thing::Memory(number) => self.memories[number].close(),
            Thing::Device(number) => self.devices[number].close(),
            Thing::Guest => self.guest.close(),
            Thing::Account => self.account.close(),
        }
    }

    fn is_over(&self) -> bool {
        std::thread::yield_now();
        self.over.load(Ordering::SeqCst)
    }

    /// A device model: reads and writes wherever its port leads.
    fn dma(&self, mut random: Random) {
        let mut buffer = vec![0; 16 * PAGE as usize];
        while !self.is_over() {
            let port = random.of(&self.ports);
            // A word or two, or as much as is copied in one piece: that takes long enough for others to come in between.
            let (offset, length) =
                if random.below(2) == 0 { (random.below(PAGE - 64), 64) } else { (0, 16 * PAGE) };
            let iova = AT + random.below(PAGES) * PAGE + offset;
            let bytes = &mut buffer[..length as usize];
            let reads = random.below(2) == 0;
            bytes.fill(0x11);
            let result = if reads { port.read(iova, bytes) } else { port.write(iova, bytes) };
            match result {
                Ok(()) => {
                    assert!(!bytes.contains(&GONE), "a device has read memory that has gone");
                    self.moved.fetch_add(1, Ordering::Relaxed);
                }
                Err(fault) => assert!(
                    matches!(
                        fault.reason,
                        DmaFaultReason::NotMapped
                            | DmaFaultReason::Blocked
                            | DmaFaultReason::NoPermission
                            | DmaFaultReason::SecondStage { .. }
                    ),
                    "{fault}"
                ),
            }
        }
    }

    /// Changes what is mapped.
    fn map(&self, mut random: Random) {
        while !self.is_over() {
            let Some(space) = random.of(&self.spaces).get() else { continue };
            let pages = some_pages(&mut random);
            // Others are at the same places, and memory may not be there any more: what comes of it, the devices see.
            match random.below(8) {
                0..3 => {
                    let Some(lent) = random.of(&self.memories[..2]).get() else { continue };
                    let (iova, offset, length) = match random.below(3) {
                        0 => (AT, 0, 2 * M2),
                        _ => (pages.first(), random.below(PAGES - 8) * PAGE, PAGE * (1 + random.below(8))),
                    };
                    let _ =
                        space.map(Iova::new(iova), lent.memory(), offset, length, Permissions::READ_WRITE);
                }
                3 => drop(space.unmap(pages).unwrap()),
                4 => drop(space.unmap_deferred(pages).unwrap()),
                5 => drop(space.protect(pages, Permissions::READ).unwrap()),
                6 => drop(space.merge(pages)),
                _ => {
                    let Some(device) = random.of(&self.devices).get() else { continue };
                    let Some(table) = device.table() else { continue };
                    match table.nesting() {
                        Some(nesting) => nesting.invalidate(pages),
                        None => table.split(pages, PageSize::SIZE_4K).unwrap(),
                    }
                }
            }
        }
    }

    /// Attaches devices, replaces and detaches, with and without PASIDs.
    fn attach(&self, mut random: Random) {
        while !self.is_over() {
            let Some(device) = random.of(&self.devices).get() else { continue };
            let Some(space) = random.of(&self.spaces).get() else { continue };
            // Of the three devices one has tables that are a first stage themselves.
            let nested = Table::nested(&space, &device, FirstStage::X86_64, Iova::new(TABLES));
            let table = match nested {
                Ok(table) if random.below(2) == 0 => table,
                _ => Table::for_device(&space, &device).unwrap(),
            };
            let number = Spid::new(NUMBERS.start + random.below(NUMBERS.len() as u64) as u32).unwrap();
            match random.below(8) {
                0..3 => device.attach(&table).unwrap(),
                3..6 => {
                    let Some(guest) = self.guest.get() else { continue };
                    let Some(binding) = guest.find(number).map(|pasid| guest.bind(pasid).unwrap()) else {
                        continue;
                    };
                    // It may be attached; then it is replaced.
                    if device.attach_pasid(number, binding, &table).is_err() {
                        let _ = device.replace_pasid(number, &table);
                    }
                }
                6 => drop(device.detach_pasid(number)),
                _ => device.detach(),
            }
        }
    }

    /// Another guest, which takes whatever PASIDs are free.
    fn take_pasids(&self, other: u64) {
        while !self.is_over() {
            let set = self.system.create_set(Owner::Machine(other), 8, &self.limit).unwrap();
            let pasids: Vec<Pasid> = (0..8).map(|_| set.allocate(1..=u32::MAX, 0).unwrap()).collect();
            for port in &self.ports {
                if port.pasid().is_some_and(|pasid| pasids.contains(&pasid)) {
                    let reason = port.read(AT, &mut [0]).map_err(|fault| fault.reason);
                    assert_eq!(reason, Err(DmaFaultReason::Blocked), "a PASID with an old meaning");
                }
            }
        }
    }
}

/// A guest's life, and its end in this order.
fn tear_down(order: &[Thing], seed: u64, pause: u64) -> u64 {
    let bus = Bus::new();
    let lengths = [PAGES, PAGES, TABLE_PAGES];
    let backings = lengths.map(|pages| Backing::anonymous(&bus, pages * PAGE).unwrap());
    let system = PasidSystem::new(1 << 12).unwrap();
    let user = Account::new("user", Some(CHARGED));
    let machine = Machine::new(&backings, user.child("guest", None), &system);
    assert_eq!(user.charged_pages(), CHARGED);
    let random = |number: u64| Random(seed.wrapping_mul(31).wrapping_add(number));
    let works: [Box<dyn FnOnce() + Send + '_>; 5] = [
        Box::new(|| machine.dma(random(0))),
        Box::new(|| machine.dma(random(1))),
        Box::new(|| machine.map(random(2))),
        Box::new(|| machine.attach(random(3))),
        Box::new(|| machine.take_pasids(2)),
    ];
    std::thread::scope(|scope| {
        /// Whoever fails, all come to an end.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        for work in works {
            let over = &machine.over;
            scope.spawn(move || {
                let _end = End(over);
                work();
            });
        }
        let _end = End(&machine.over);
        let ended = || machine.over.load(Ordering::SeqCst);
        // Something is going on when the first one goes, however long that takes on a busy machine, and the others follow soon.
        let begun = Instant::now();
        while machine.moved.load(Ordering::Relaxed) < BEFORE && !ended() && begun.elapsed() < CERTAINTY {
            std::thread::yield_now();
        }
        let mut seen = machine.moved.load(Ordering::Relaxed);
        let mut wait = |more: u64| {
            let mut turns = 0u64;
            while machine.moved.load(Ordering::Relaxed) < seen + more && turns < 200 * more {
                std::thread::yield_now();
                turns += 1;
                if ended() {
                    break;
                }
            }
            seen = machine.moved.load(Ordering::Relaxed);
        };
        for thing in order {
            machine.close(*thing);
            wait(pause);
        }
    });
    let moved = machine.moved.load(Ordering::Relaxed);

    // The ports are still there, and lead nowhere.
    for port in &machine.ports {
        assert_eq!(port.read(AT, &mut [0]).unwrap_err().reason, DmaFaultReason::Blocked);
    }
    let Machine { iommu, ports, limit, .. } = machine;
    assert_eq!((user.charged_pages(), user.peak_pages()), (0, CHARGED));
    for backing in &backings {
        assert_eq!(backing.holds(0, backing.length().unwrap()), 0..=0);
        for page in 0..backing.length().unwrap() / PAGE {
            let mut bytes = [0; 64];
            backing.read(page * PAGE, &mut bytes).unwrap();
            assert_eq!(bytes, [GONE; 64], "a device has written to memory that has gone");
        }
    }
    let status = system.status();
    assert_eq!((status.used, status.sets, status.reserved), (0, 0, 0), "{status:?}");
    assert_eq!((limit.usage().current, status.limits), (0, 1));
    // Devices can be had again, and so can all of the bus: nothing else holds it.
    for port in &ports[..3] {
        drop(Device::new(iommu.clone(), port.rid()).unwrap());
    }
    drop((iommu, ports));
    let bus_of = Arc::downgrade(&bus);
    drop((backings, bus));
    assert_eq!(bus_of.strong_count(), 0, "somebody has the bus");
    moved
}

#[test]
fn everything_goes_in_any_order_and_nothing_is_left() {
    let before = {
        epoch::free_retired();
        HeapTables::bytes_in_use()
    };
    let cases = if cfg!(debug_assertions) { 16 } else { 400 };
    let config =
        ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 20, ..Default::default() };
    let moved = AtomicU64::new(0);
    let order = Just(THINGS.to_vec()).prop_shuffle();
    proptest!(config, |(order in order, seed in any::<u64>(), pause in 0..6u64)| {
        moved.fetch_add(tear_down(&order, seed, pause), Ordering::Relaxed);
        epoch::free_retired();
        let left = HeapTables::bytes_in_use();
        prop_assert!(left <= before, "{} bytes of tables are left, before it were {}", left, before);
    });
    let moved = moved.load(Ordering::Relaxed);
    assert!(moved >= u64::from(cases) * BEFORE, "devices were idle: {moved} transfers");
}
