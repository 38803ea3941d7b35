//! A space, its devices, and memory that knows whether it is lent.

use crate::double::{Double, DoubleTable};
use ioasid::epoch;
use ioasid::pagetable::Native;
use ioasid::{
    Account, Attributes, Backing, Bus, CachedWalk, Iova, IovaRange, LateBound, Memory, MemoryGone, Oa, Rid,
    Space, Table, Translated,
};
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub(crate) const PAGE: u64 = 0x1000;
/// How many pages of memory a world has to lend.
const PAGES: u64 = 128;
/// The size of an object: that of a window, so that the bus need not be cut into many small ones.
pub(crate) const OBJECT: u64 = 1 << 30;

/// Runs the model under so many schedules of each kind.
pub(crate) fn check(schedules: usize, model: impl Fn() + Send + Sync + 'static) {
    let factor = std::env::var("SHUTTLE_ITERATIONS").map_or(1, |factor| factor.parse().unwrap());
    let model = Arc::new(model);
    let mut config = Config::new();
    // All accesses are sequentially consistent here, and that is known.
    config.silence_warnings = true;
    config.stack_size = 0x8_0000;
    let schedules = schedules * factor;
    let run = Arc::clone(&model);
    Runner::new(RandomScheduler::new(schedules), config.clone()).run(move || run());
    for depth in [2, 4] {
        let run = Arc::clone(&model);
        Runner::new(PctScheduler::new(depth, schedules.div_ceil(2)), config.clone()).run(move || run());
    }
}

pub(crate) fn random(below: u64) -> u64 {
    thread_rng().gen_range(0..below)
}

/// A place at which threads may change places.
pub(crate) fn others_may_run() {
    shuttle::thread::sleep(Duration::ZERO);
}

pub(crate) fn page(number: u64) -> IovaRange {
    pages(number, 1)
}

pub(crate) fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::with_length(first * PAGE, count * PAGE).unwrap()
}

pub(crate) fn iova(page: u64) -> Iova {
    Iova::new(page * PAGE)
}

/// What a device's access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It is attached to nothing.
    Blocked,
    /// Nothing is mapped there, or not with the right to read.
    Fault,
    /// No memory stands where the table leads.
    Gone,
    /// This page of memory.
    Page(u64),
}

/// Which pages of memory are lent. Read and written in no time, so that it is exact.
#[derive(Debug)]
pub(crate) struct Lent(Vec<AtomicBool>);

impl Lent {
    /// From now on devices may reach these pages.
    pub(crate) fn lend(&self, pages: impl IntoIterator<Item = u64>) {
        pages.into_iter().for_each(|page| self.0[page as usize].store(true, Ordering::SeqCst));
    }

    /// From now on no device may.
    pub(crate) fn take_back(&self, pages: impl IntoIterator<Item = u64>) {
        pages.into_iter().for_each(|page| self.0[page as usize].store(false, Ordering::SeqCst));
    }

    /// Fails if the page is not lent.
    pub(crate) fn use_page(&self, page: u64) {
        for _ in 0..2 {
            assert!(self.0[page as usize].load(Ordering::SeqCst), "page {page} is not lent any more");
            others_may_run();
        }
    }
}

/// Memory behind calls. What the first `u64` of each page says is its number, as everywhere here.
#[derive(Debug)]
struct Calls {
    first: u64,
    lent: Arc<Lent>,
}

impl LateBound for Calls {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        let page = self.first + offset / PAGE;
        others_may_run();
        self.lent.use_page(page);
        buffer.copy_from_slice(&page.to_ne_bytes()[..buffer.len()]);
        Ok(())
    }

    fn write(&self, _offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        Ok(())
    }
}

/// A space, the devices of an IOMMU, and pages to lend.
pub(crate) struct World {
    pub(crate) bus: Arc<Bus>,
    pub(crate) account: Account,
    pub(crate) space: Arc<Space>,
    pub(crate) double: Arc<Double>,
    pub(crate) lent: Arc<Lent>,
}

impl World {
    pub(crate) fn new() -> Arc<World> {
        World::with_format(Native::new())
    }

    pub(crate) fn with_format(format: Native) -> Arc<World> {
        let bus = Bus::new();
        Arc::new(World {
            account: Account::new("model", None),
            space: Space::with_format(&bus, format),
            double: Double::new(),
            lent: Arc::new(Lent((0..PAGES).map(|_| AtomicBool::new(false)).collect())),
            bus,
        })
    }

    /// An object whose pages are these.
    pub(crate) fn object(&self, pages: std::ops::Range<u64>) -> Arc<Backing> {
        let object = Backing::anonymous(&self.bus, OBJECT).unwrap();
        for page in pages.clone() {
            object.write((page - pages.start) * PAGE, &page.to_ne_bytes()).unwrap();
        }
        object
    }

    /// An object behind calls whose pages are numbered from `first` on.
    pub(crate) fn object_behind_calls(&self, first: u64) -> Arc<Backing> {
        Backing::late_bound(&self.bus, Arc::new(Calls { first, lent: self.lent.clone() }))
    }

    /// Memory of so many pages from the beginning of an object on.
    pub(crate) fn register(&self, object: &Arc<Backing>, pages: u64) -> Arc<Memory> {
        Memory::register(object, 0, pages * PAGE, &self.account).unwrap()
    }

    /// A device reads a page's number through the table that it is attached to.
    pub(crate) fn dma(&self, device: Rid, page: u64) -> Seen {
        // Dropped behind the section.
        let table;
        let section = epoch::dma();
        others_may_run();
        table = self.double.table_of(device);
        let Some(table) = &table else { return Seen::Blocked };
        let found = translate(table, &section, page * PAGE);
        let Some((oa, _)) = found.filter(|(_, attributes)| attributes.contains(Attributes::READ)) else {
            return Seen::Fault;
        };
        others_may_run();
        let mut number = [0; 8];
        match table.space().memory_at(&section, oa) {
            Err(_) => return Seen::Gone,
            Ok(Translated::Here(here)) => {
                others_may_run();
                here.read(&mut number).unwrap();
                self.lent.use_page(u64::from_ne_bytes(number));
            }
            Ok(Translated::Late(late)) => {
                drop(section);
                late.read(&mut number).unwrap();
            }
        }
        Seen::Page(u64::from_ne_bytes(number))
    }

    /// Reads so often, one of the pages at a time.
    pub(crate) fn dma_often(&self, device: Rid, pages: std::ops::Range<u64>, times: u64) {
        for _ in 0..times {
            self.dma(device, pages.start + random(pages.end - pages.start));
        }
    }

    /// Nobody is at work any more: every table says what the native one does, and nobody owns a leaf.
    pub(crate) fn finish(&self) {
        self.space.flush();
        assert_eq!(self.space.statistics().busy_bytes, 0, "somebody has left leaves that he owned");
        for table in self.double.tables() {
            assert_eq!(table.mappings(), table.expected(&self.space));
            assert!(table.is_invalidated() && !table.is_stale(), "a device was not told");
        }
        self.space.unmap(IovaRange::ALL).unwrap();
        assert_eq!(self.space.leaves(IovaRange::ALL), []);
    }
}

/// Where a device finds an address by the table it is attached to, and what it may do there.
pub(crate) fn translate(table: &Table, section: &epoch::DmaSection, iova: u64) -> Option<(Oa, Attributes)> {
    match table.derived().filter(|_| table.nesting().is_none()) {
        Some(derived) => {
            let derived = derived.as_any().downcast_ref::<DoubleTable>().unwrap();
            derived.walk(iova).map(|(oa, attributes)| (Oa::new(oa), attributes))
        }
        None => {
            let leaf = table.native(section).walk_cached(iova, &mut CachedWalk::new()).ok()?;
            Some((leaf.output(iova), leaf.attributes))
        }
    }
}
