//! The walker under the `shuttle` model checker: many steps of several threads, under schedules drawn at random.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" CARGO_TARGET_DIR=target/shuttle cargo test --release -p ioasid-pagetable --test shuttle
//! ```
//!
//! `loom` sees every interleaving of a few operations on tables of four entries. Here are the formats' own tables, and a
//! format in between; each thread performs a sequence of operations, drawn with the schedule. What is lost against loom
//! is that nothing is exhaustive and that only *sequentially consistent* executions occur: whether the loads and stores
//! are ordered enough is loom's question alone. Half of the schedules choose the next thread evenly at random at each
//! access, half change priorities at a few random places (PCT), which reaches states that need one thread to sleep for
//! long.
//!
//! What walkers may see is decided by a log of episodes ([`Log`]): each page of a mapping is seen for sure from the end
//! of its map to the beginning of its unmap, perhaps from the beginning of the one to the end of the other, and never
//! else. The log is written and read in no time, between the accesses.
//!
//! `SHUTTLE_ITERATIONS=100` runs a hundred times as many schedules as otherwise, which takes an hour. A failure prints its
//! schedule; `shuttle::replay` takes it.

#![cfg(shuttle)]

use ioasid_pagetable::{
    AmdV1, Attributes, CachedWalk, ClaimError, ClaimFormat, CutError, Entry, Format, Gather, IovaRange, Leaf,
    LiveChanges, MapError, Native, Oa, OutOfTables, PageSize, Pattern, ProtectError, Radix, RetractError,
    RiscV, TableLayout, TableMemory, VtdSecondStage, WalkFault, X86_64,
};
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::RwLock;
use shuttle::sync::atomic::AtomicU64;
use shuttle::{Config, Runner, thread};
use std::alloc::Layout;
use std::collections::{BTreeMap, HashMap};
use std::ops::{ControlFlow, RangeInclusive};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
const PAGE: u64 = 0x1000;
/// What stands in freed tables. No mapping has such an output.
const NONSENSE: u64 = 0xbad_0000_0000;

// ----------------------------------------------------------------------------------- format and table memory

/// Levels of sixteen entries: leaves of 4 KiB, 64 KiB, 1 MiB and 16 MiB, and a root that grows.
#[derive(Clone, Debug)]
struct Sixteen;

const TABLE: u64 = 1 << 3;
const ADDRESS: u64 = 0x00ff_ffff_ffff_f000;
const BITS: [(Attributes, u64); 4] = [
    (Attributes::READ, 1 << 4),
    (Attributes::WRITE, 1 << 5),
    (Attributes::ACCESSED, 1 << 6),
    (Attributes::DIRTY, 1 << 7),
];

impl Format for Sixteen {
    const NAME: &'static str = "sixteen";
    const TENTATIVE: u64 = 1 << 58;

    fn top_levels(&self) -> RangeInclusive<u8> {
        2..=4
    }

    fn shift(&self, level: u8) -> u32 {
        8 + 4 * u32::from(level)
    }

    fn index_bits(&self, _level: u8) -> u32 {
        4
    }

    fn leaf_sizes(&self, level: u8) -> u64 {
        1 << self.shift(level)
    }

    fn output_bits(&self) -> u32 {
        56
    }

    fn live_changes(&self) -> LiveChanges {
        LiveChanges::SIZE | LiveChanges::PERMISSIONS
    }

    fn dirty_bit(&self) -> u64 {
        1 << 7
    }

    fn hardware_marks(&self) -> bool {
        true
    }

    fn software_bits(&self, _level: u8) -> u64 {
        0
    }

    fn table_pattern(&self, _level: u8) -> Pattern {
        Pattern::new(Self::PRESENT | TABLE, Self::TENTATIVE)
    }

    fn leaf_pattern(&self, _level: u8) -> Pattern {
        Pattern::new(Self::PRESENT, TABLE | Self::BUSY)
    }

    fn table_address(&self, entry: u64) -> u64 {
        entry & ADDRESS
    }

    fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & Self::PRESENT == 0 {
            return Entry::Absent;
        }
        if entry & TABLE != 0 {
            return Entry::Table(entry & ADDRESS);
        }
        let set = BITS.iter().filter(|(_, bit)| entry & bit != 0);
        let attributes = set.fold(Attributes::empty(), |all, (attribute, _)| all | *attribute);
        Entry::Leaf { oa: entry & ADDRESS, size: PageSize::from_log2(self.shift(level)).unwrap(), attributes }
    }

    fn table_entry(&self, _level: u8, address: u64) -> u64 {
        address | TABLE | Self::PRESENT
    }

    fn leaf_entry(&self, _level: u8, _size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let set = BITS.iter().filter(|(attribute, _)| attributes.contains(*attribute));
        set.fold(oa | Self::PRESENT, |entry, (_, bit)| entry | bit)
    }
}

impl ClaimFormat for Sixteen {
    const PRESENT: u64 = 1 << 0;
    const BUSY: u64 = 1 << 1;
    const FIRST: u64 = 1 << 2;
}

/// Table pages with the state behind the entries. Freed ones are full of nonsense until they are used again.
#[derive(Clone)]
struct Pages(Arc<PageBooks>);

struct PageBooks {
    /// What stands in freed pages.
    nonsense: u64,
    pages: Mutex<HashMap<u64, (Layout, bool)>>,
}

impl Pages {
    fn new<F: Format>(format: &F) -> Pages {
        let size = PageSize::from_log2(format.shift(1)).unwrap();
        let nonsense = format.leaf_entry(1, size, NONSENSE, READ_WRITE);
        Pages(Arc::new(PageBooks { nonsense, pages: Mutex::default() }))
    }

    fn books(&self) -> MutexGuard<'_, HashMap<u64, (Layout, bool)>> {
        self.0.pages.lock().unwrap()
    }

    fn in_use(&self) -> u64 {
        self.books().values().filter(|(_, in_use)| *in_use).count() as u64
    }

    fn layout(entries: usize) -> Layout {
        Layout::array::<AtomicU64>(entries + 1).unwrap().align_to(4096).unwrap()
    }

    fn fill(table: NonNull<AtomicU64>, entries: usize, value: u64) {
        for index in 0..=entries {
            // SAFETY: a page has one word more than entries, and is nobody's just now. Words own no memory.
            unsafe { table.add(index).write(AtomicU64::new(if index < entries { value } else { 0 })) };
        }
    }
}

impl Drop for PageBooks {
    fn drop(&mut self) {
        for (&address, (layout, _)) in self.pages.lock().unwrap().iter() {
            // SAFETY: allocated with this layout; nobody has a handle any more.
            unsafe { std::alloc::dealloc(std::ptr::with_exposed_provenance_mut(address as usize), *layout) };
        }
    }
}

// SAFETY: pages are zero when handed out, used by one table at a time, and live as long as the memory does; the state
// is a word of its own behind the entries. Without weak memory there is nothing to fence.
unsafe impl TableMemory<AtomicU64> for Pages {
    fn allocate(&self, layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        let wanted = Pages::layout(layout.entries);
        let mut books = self.books();
        let free = books.iter_mut().find(|(_, page)| **page == (wanted, false));
        let table = match free {
            Some((&address, page)) => {
                page.1 = true;
                // SAFETY: the address of a page.
                unsafe { self.pointer(address) }
            }
            None => {
                // SAFETY: the size is not zero.
                let table = NonNull::new(unsafe { std::alloc::alloc(wanted) }).unwrap().cast();
                books.insert(self.address(table), (wanted, true));
                table
            }
        };
        Pages::fill(table, layout.entries, 0);
        Ok(table)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, layout: TableLayout, empty: bool) {
        for index in 0..if empty { layout.entries } else { 0 } {
            // SAFETY: still allocated.
            let entry = unsafe { table.add(index).as_ref().raw_load() };
            assert_eq!(entry, 0, "not as empty as it was said to be");
        }
        let mut books = self.books();
        let page = books.get_mut(&self.address(table)).unwrap();
        assert!(std::mem::replace(&mut page.1, false), "freed twice");
        Pages::fill(table, layout.entries, self.0.nonsense);
    }

    unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, layout: TableLayout) -> &'a AtomicU64 {
        // SAFETY: the word behind the entries.
        unsafe { table.add(layout.entries).as_ref() }
    }

    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        table.as_ptr().expose_provenance() as u64
    }

    unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
        NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).unwrap()
    }
}

type Gathered = Gather<Pages, AtomicU64>;

// ------------------------------------------------------------------------------------------------------- log

/// A page of a mapping.
#[derive(Debug)]
struct Episode {
    output: u64,
    /// When it may be seen first and last.
    may: (u64, u64),
    /// When it must be seen.
    must: (u64, u64),
    /// All leaves of its mapping are in place.
    mapped: bool,
}

/// When each page was mapped to what. Written between accesses, so that it is exact.
#[derive(Default)]
struct Log {
    now: u64,
    pages: BTreeMap<u64, Vec<Episode>>,
    /// How many are trying to unmap a page, whatever may be mapped there meanwhile.
    trying: BTreeMap<u64, u32>,
    /// Pages that were written through, and not reported since.
    written: BTreeMap<u64, u64>,
    mappings: u64,
}

impl Log {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// What is mapped, or being mapped or unmapped.
    fn open(&mut self, page: u64) -> Option<&mut Episode> {
        self.pages.get_mut(&page)?.last_mut().filter(|episode| episode.may.1 == u64::MAX)
    }

    /// Leaves may be in place from now on.
    fn maps(&mut self, pages: std::ops::Range<u64>, output: u64) {
        let now = self.tick();
        for page in pages.clone() {
            assert!(self.open(page).is_none(), "page {page:#x} is mapped twice");
            let output = output + (page - pages.start) * PAGE;
            let episode = Episode { output, may: (now, u64::MAX), must: (u64::MAX, 0), mapped: false };
            self.pages.entry(page).or_default().push(episode);
        }
    }

    /// All leaves are in place.
    fn mapped(&mut self, pages: std::ops::Range<u64>) {
        let now = self.tick();
        for page in pages {
            let trying = self.trying.contains_key(&page);
            if let Some(episode) = self.open(page) {
                episode.mapped = true;
                if !trying {
                    episode.must = (now, u64::MAX);
                }
            }
        }
    }

    /// The leaves, of which nobody can take one meanwhile, may lead elsewhere from now on; there is always one.
    fn remaps(&mut self, pages: std::ops::Range<u64>, output: u64) {
        let now = self.tick();
        for page in pages.clone() {
            let old = self.open(page).unwrap_or_else(|| panic!("page {page:#x} is held and not mapped"));
            let (must, mapped) = (old.must, old.mapped);
            let output = output + (page - pages.start) * PAGE;
            let episode = Episode { output, may: (now, u64::MAX), must, mapped };
            self.pages.entry(page).or_default().push(episode);
        }
    }

    /// They lead there no more where they did.
    fn remapped(&mut self, pages: std::ops::Range<u64>) {
        let now = self.tick();
        for page in pages {
            let episodes = self.pages.entry(page).or_default();
            let old = episodes.iter_mut().rev().nth(1).unwrap();
            old.may.1 = now;
            old.must.1 = old.must.1.min(now);
        }
    }

    /// Leaves may go from now on.
    fn unmaps(&mut self, pages: std::ops::Range<u64>) {
        let now = self.tick();
        for page in pages {
            *self.trying.entry(page).or_default() += 1;
            if let Some(episode) = self.open(page) {
                episode.must.1 = episode.must.1.min(now);
            }
        }
    }

    /// These leaves are gone.
    fn unmapped(&mut self, pages: std::ops::Range<u64>) {
        let now = self.tick();
        for page in pages {
            let episode = self.open(page).unwrap_or_else(|| panic!("page {page:#x} is unmapped twice"));
            episode.may.1 = now;
            self.written.remove(&page);
        }
    }

    /// One of those who tried has ended. What he has not taken stays.
    fn tried(&mut self, pages: std::ops::Range<u64>) {
        let now = self.tick();
        for page in pages {
            let trying = self.trying.remove(&page).filter(|&trying| trying > 1);
            self.trying.extend(trying.map(|trying| (page, trying - 1)));
            if let (None, Some(episode)) = (trying, self.open(page).filter(|episode| episode.mapped)) {
                episode.must = (now, u64::MAX);
            }
        }
    }

    /// Whether a walk that began and ended then may have seen this.
    fn check(&self, page: u64, output: Option<u64>, began: u64, ended: u64) {
        let episodes = self.pages.get(&page).map_or(&[][..], |episodes| episodes);
        let fits = match output {
            Some(output) => episodes
                .iter()
                .any(|seen| seen.output == output && seen.may.0 <= ended && seen.may.1 >= began),
            None => !episodes.iter().any(|seen| seen.must.0 <= began && seen.must.1 >= ended),
        };
        assert!(fits, "page {page:#x} to {output:x?} seen from {began} to {ended}: {episodes:x?}");
    }

    /// What everybody sees now, when nobody is at work.
    fn settled(&mut self, page: u64) -> Option<u64> {
        self.open(page).map(|episode| episode.output)
    }
}

// --------------------------------------------------------------------------------------------------- fixture

/// A table, and what is known about it.
struct World<F: Format> {
    radix: Radix<F, Pages, AtomicU64>,
    memory: Pages,
    log: Mutex<Log>,
    /// Operations and walks share it; whoever frees has it alone.
    grace: RwLock<()>,
    /// How many pages the threads are at work on.
    pages: u64,
}

fn range_of(pages: &std::ops::Range<u64>) -> IovaRange {
    IovaRange::new(pages.start * PAGE, pages.end * PAGE - 1).unwrap()
}

fn pages_of(range: IovaRange) -> std::ops::Range<u64> {
    range.first() / PAGE..range.last() / PAGE + 1
}

fn random(below: u64) -> u64 {
    thread_rng().gen_range(0..below)
}

impl<F: Format> World<F> {
    fn new(format: F, pages: u64) -> Arc<World<F>> {
        let memory = Pages::new(&format);
        let radix = Radix::new(format, memory.clone());
        let world = World { radix, memory, log: Mutex::default(), grace: RwLock::new(()), pages };
        if random(2) == 0 {
            world.use_up_allowance();
        }
        Arc::new(world)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    /// Lets no more empty tables stay, as if many did: one goes that is marked as staying and was never counted.
    fn use_up_allowance(&self) {
        let (format, mut gather) = (self.radix.format(), Gather::new());
        self.radix.map(range_of(&(0..1)), Oa::new(PAGE), READ_WRITE, &mut gather).unwrap();
        let (mut address, mut level) = self.radix.top().unwrap();
        while level > 1 {
            // SAFETY: nobody else is here yet, and the first entries lead to the one page.
            let link = unsafe { self.memory.pointer(address).as_ref().raw_load() };
            (address, level) = (format.table_address(link), level - 1);
        }
        // SAFETY: the address of a linked table.
        let table = unsafe { self.memory.pointer(address) };
        // SAFETY: the same.
        unsafe { self.memory.state(table, format.table_layout(1)) }
            .store(1 << 61, std::sync::atomic::Ordering::SeqCst);
        self.radix.unmap(range_of(&(0..1 << format.index_bits(1))), &mut gather).unwrap();
        self.free(&mut gather);
    }

    /// A whole operation or walk.
    fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        let _inside = self.grace.read().unwrap();
        work()
    }

    fn free(&self, gather: &mut Gathered) {
        gather.runs = Default::default();
        if !gather.retired.is_empty() {
            let _alone = self.grace.write().unwrap();
            for retired in gather.retired.drain(..) {
                // SAFETY: no operation and no walk is running.
                unsafe { retired.free() };
            }
        }
    }

    /// Looks at one page and holds what it sees against the log.
    fn look(&self, page: u64, cache: Option<&mut CachedWalk<AtomicU64>>) {
        let iova = page * PAGE + random(PAGE);
        let began = self.log().tick();
        let found = match cache {
            Some(cache) => self.radix.walk_cached(iova, cache),
            None => self.radix.walk(iova),
        };
        let output = match found {
            Ok(leaf) => Some(leaf.output(iova).get() & !(PAGE - 1)),
            Err(WalkFault::NotMapped(_)) => None,
            Err(fault) => panic!("{fault}"),
        };
        let mut log = self.log();
        let ended = log.tick();
        log.check(page, output, began, ended);
    }

    /// A device: looks, with and without a cache, and writes.
    fn device(&self, rounds: u64) {
        let mut cache = CachedWalk::new();
        for _ in 0..rounds {
            let page = random(self.pages);
            self.during(|| {
                self.look(page, None);
                for neighbour in 0..2 {
                    self.look((page + neighbour) % self.pages, Some(&mut cache));
                }
                self.write(page);
            });
        }
    }

    /// Marks a leaf as hardware does. What is mapped all the while is written from then on.
    fn write(&self, page: u64) {
        let output = |log: &mut Log| {
            log.open(page).filter(|episode| episode.must.1 == u64::MAX).map(|episode| episode.output)
        };
        let before = output(&mut self.log());
        let writable = |leaf: Leaf| leaf.attributes.contains(Attributes::WRITE);
        if !self.radix.walk(page * PAGE).is_ok_and(writable) {
            return;
        }
        let marked = self.radix.mark(page * PAGE, Attributes::USED);
        let mut log = self.log();
        let now = log.tick();
        if before.is_some() && before == output(&mut log) {
            assert!(marked.is_ok(), "page {page:#x}: {marked:?}");
            if self.radix.format().dirty_bit() != 0 {
                log.written.insert(page, now);
            }
        }
    }

    /// Nobody is at work any more: everything is as the log says, and nothing is lost.
    fn finish(self: Arc<World<F>>) {
        let world = Arc::into_inner(self).unwrap();
        let mut log = world.log.into_inner().unwrap();
        for page in 0..world.pages {
            let found = world.radix.walk(page * PAGE).ok().map(|leaf| leaf.output(page * PAGE).get());
            assert_eq!(found, log.settled(page), "page {page:#x}");
        }
        for &page in log.written.keys() {
            let leaf = world.radix.walk(page * PAGE).unwrap();
            assert!(leaf.attributes.contains(Attributes::DIRTY), "a write to page {page:#x} is lost");
        }
        world.radix.occupied(IovaRange::ALL, |range| {
            assert!(pages_of(range).all(|page| log.settled(page).is_some()), "{range} is owned by nobody");
            ControlFlow::Continue(())
        });
        assert_eq!(world.radix.table_count(), world.memory.in_use(), "a table is lost");
        drop(world.radix);
        assert_eq!(world.memory.in_use(), 0, "a table is not linked");
    }
}

fn check(iterations: usize, model: impl Fn() + Send + Sync + 'static) {
    let factor = std::env::var("SHUTTLE_ITERATIONS").map_or(1, |factor| factor.parse().unwrap());
    let model = Arc::new(model);
    let mut config = Config::new();
    // All accesses are sequentially consistent here, and that is known.
    config.silence_warnings = true;
    config.stack_size = 0x4_0000;
    let schedules = iterations * factor;
    let run = Arc::clone(&model);
    Runner::new(RandomScheduler::new(schedules), config.clone()).run(move || run());
    for depth in [2, 4] {
        let run = Arc::clone(&model);
        Runner::new(PctScheduler::new(depth, schedules / 2), config.clone()).run(move || run());
    }
}

// -------------------------------------------------------------------------------------------- exclusive mode

/// One thread's part of the addresses.
struct Owner<F: Format> {
    world: Arc<World<F>>,
    parts: Vec<std::ops::Range<u64>>,
    /// What its mapped pages allow.
    permissions: BTreeMap<u64, Attributes>,
    gather: Gathered,
    /// Permissions have changed, and writes may be on their way that were allowed before.
    changed: bool,
}

impl<F: Format> Owner<F> {
    /// Some pages of one of the parts, or a whole one.
    fn pages(&self) -> std::ops::Range<u64> {
        let part = self.parts[random(self.parts.len() as u64) as usize].clone();
        if random(4) == 0 {
            return part;
        }
        let first = part.start + random(part.end - part.start);
        first..first + 1 + random((part.end - first).min(20))
    }

    fn step(&mut self) {
        let world = Arc::clone(&self.world);
        let pages = self.pages();
        world.during(|| match random(9) {
            0..=2 => self.map(pages),
            3..=5 => self.unmap(pages),
            6 => self.cut_or_merge(pages),
            7 => self.protect(pages),
            _ => self.read_and_clear(pages),
        });
        world.free(&mut self.gather);
        if std::mem::take(&mut self.changed) {
            drop(world.grace.write().unwrap());
        }
    }

    fn map(&mut self, pages: std::ops::Range<u64>) {
        let world = &self.world;
        let output = {
            let mut log = world.log();
            log.mappings += 1;
            // Each mapping has outputs of its own: for large leaves, and for none.
            let output = log.mappings * world.pages.next_power_of_two() * PAGE;
            output + if random(2) == 0 { pages.start * PAGE } else { (pages.start ^ 1) * PAGE }
        };
        // What is free may be seen even if the mapping fails.
        let (taken, free): (Vec<u64>, Vec<u64>) =
            pages.clone().partition(|page| self.permissions.contains_key(page));
        for page in &free {
            world.log().maps(*page..page + 1, output + (page - pages.start) * PAGE);
        }
        let mapped = world.radix.map(range_of(&pages), Oa::new(output), READ_WRITE, &mut self.gather);
        match taken.first() {
            Some(page) => {
                assert_eq!(mapped, Err(MapError::Occupied { at: page * PAGE }));
                free.iter().for_each(|page| world.log().unmapped(*page..page + 1));
            }
            None => {
                mapped.unwrap();
                world.log().mapped(pages.clone());
                self.permissions.extend(pages.map(|page| (page, READ_WRITE)));
            }
        }
    }

    fn unmap(&mut self, pages: std::ops::Range<u64>) {
        let world = &self.world;
        world.log().unmaps(pages.clone());
        let mut gather = Gather::new();
        let unmapped = world.radix.unmap(range_of(&pages), &mut gather);
        let mut log = world.log();
        match unmapped {
            Ok(()) => {
                let gone: Vec<u64> = gather.runs.iter().flat_map(pages_of).collect();
                let expected: Vec<u64> =
                    self.permissions.range(pages.clone()).map(|(&page, _)| page).collect();
                assert_eq!(gone, expected);
                for page in gone {
                    log.unmapped(page..page + 1);
                    self.permissions.remove(&page);
                }
            }
            Err(CutError::NeedsBreak { .. }) => assert!(gather.runs.is_empty()),
            Err(error) => panic!("{error}"),
        }
        log.tried(pages);
        self.gather.retired.append(&mut gather.retired);
    }

    fn cut_or_merge(&mut self, pages: std::ops::Range<u64>) {
        let radix = &self.world.radix;
        let allowed = if random(2) == 0 {
            radix.cut(pages.start * PAGE, &mut self.gather)
        } else {
            radix.merge(range_of(&pages), &mut self.gather).map(|_| ())
        };
        assert!(matches!(allowed, Ok(()) | Err(CutError::NeedsBreak { .. })), "{allowed:?}");
    }

    fn protect(&mut self, pages: std::ops::Range<u64>) {
        let permissions = if random(2) == 0 { Attributes::READ } else { READ_WRITE };
        match self.world.radix.protect(range_of(&pages), permissions, &mut self.gather) {
            Ok(()) => {
                self.permissions.range_mut(pages.clone()).for_each(|(_, before)| *before = permissions);
                self.changed = true;
            }
            Err(ProtectError::NeedsBreak { .. } | ProtectError::Cut(CutError::NeedsBreak { .. })) => {}
            Err(error) => panic!("{error}"),
        }
        for (&page, permissions) in self.permissions.range(pages) {
            let leaf = self.world.radix.walk(page * PAGE).unwrap();
            assert_eq!(leaf.attributes & READ_WRITE, *permissions, "page {page:#x}");
        }
    }

    fn read_and_clear(&mut self, pages: std::ops::Range<u64>) {
        let world = &self.world;
        let began = world.log().tick();
        let mut reported = Vec::new();
        world.radix.read_and_clear_dirty(range_of(&pages), |dirty| reported.extend(pages_of(dirty)));
        let mut log = world.log();
        let written: Vec<_> = log.written.range(pages).map(|(&page, &when)| (page, when)).collect();
        for (page, when) in written {
            if reported.binary_search(&page).is_ok() {
                log.written.remove(&page);
            } else {
                assert!(when > began, "a write to page {page:#x} was not reported");
            }
        }
    }
}

/// Three owners with parts in the same tables and leaves, and a device.
fn owners<F: Format>(format: F, bounds: &[u64], steps: u64) {
    let pages = *bounds.last().unwrap();
    let world = World::new(format, pages);
    let mut owners: Vec<_> = (0..3)
        .map(|_| Owner {
            world: Arc::clone(&world),
            parts: Vec::new(),
            permissions: BTreeMap::new(),
            gather: Gather::new(),
            changed: false,
        })
        .collect();
    for (number, bound) in bounds.windows(2).enumerate() {
        owners[number % 3].parts.push(bound[0]..bound[1]);
    }
    if random(2) == 0 {
        // Large leaves over everything; the owners will have to cut them.
        let output = world.pages.next_power_of_two() * PAGE;
        world.log().mappings = 1;
        world.log().maps(0..pages, output);
        let mut gather = Gather::new();
        world.radix.map(range_of(&(0..pages)), Oa::new(output), READ_WRITE, &mut gather).unwrap();
        world.log().mapped(0..pages);
        world.free(&mut gather);
        for owner in &mut owners {
            let own = owner.parts.iter().cloned().flatten();
            owner.permissions = own.map(|page| (page, READ_WRITE)).collect();
        }
    }
    let device = {
        let world = Arc::clone(&world);
        thread::spawn(move || world.device(2 * steps))
    };
    let threads: Vec<_> = owners
        .into_iter()
        .map(|mut owner| thread::spawn(move || (0..steps).for_each(|_| owner.step())))
        .collect();
    threads.into_iter().chain([device]).for_each(|thread| thread.join().unwrap());
    world.finish();
}

/// Tables of sixteen entries, at three levels.
const SMALL: &[u64] = &[0, 5, 11, 16, 24, 40, 48, 64, 100, 144, 256, 300, 512, 530];
/// Tables of 512 entries, at two levels that are shared.
const LARGE: &[u64] = &[0, 5, 11, 200, 512, 600, 1024, 1030, 1536];

#[test]
fn owners_sixteen() {
    check(5000, || owners(Sixteen, SMALL, 8));
}

#[test]
fn owners_native() {
    check(150, || owners(Native::new(), LARGE, 6));
}

#[test]
fn owners_vtd() {
    check(150, || owners(VtdSecondStage::new(3).unwrap().with_accessed_dirty(true), LARGE, 6));
}

#[test]
fn owners_x86_64() {
    check(150, || owners(X86_64::new(4).unwrap(), LARGE, 6));
}

#[test]
fn owners_amd_v1() {
    check(150, || owners(AmdV1::new(), LARGE, 6));
}

#[test]
fn owners_risc_v() {
    check(150, || owners(RiscV::new(3).unwrap().with_accessed_dirty(true), LARGE, 6));
}

// --------------------------------------------------------------------------------------------- claiming mode

struct Claimer<F: ClaimFormat> {
    world: Arc<World<F>>,
    gather: Gathered,
}

impl<F: ClaimFormat> Claimer<F> {
    /// Few pages, or a whole table, so that all meet.
    fn pages(&self) -> std::ops::Range<u64> {
        let table = 1 << self.world.radix.format().index_bits(1);
        if random(3) == 0 {
            let first = random(self.world.pages / table) * table;
            return first..first + table;
        }
        // Places that matter, or any.
        let first = if random(2) == 0 { random(8) } else { random(self.world.pages) };
        first..(first + 1 + random(6)).min(self.world.pages)
    }

    fn step(&mut self) {
        let world = Arc::clone(&self.world);
        let pages = self.pages();
        world.during(|| match random(11) {
            0..=2 => self.claim(pages),
            3..=5 => self.retract(pages),
            6 => {
                world.radix.merge_claimed(range_of(&pages), &mut self.gather);
            }
            7 => {
                world.radix.merge_joining(range_of(&pages), &mut self.gather);
            }
            8 | 9 => self.change(pages),
            _ => self.hold(pages),
        });
        world.free(&mut self.gather);
        // Whoever has met somebody lets him go on.
        thread::yield_now();
    }

    fn claim(&mut self, pages: std::ops::Range<u64>) {
        let world = &self.world;
        let range = range_of(&pages);
        let output = {
            let mut log = world.log();
            log.mappings += 1;
            let output = log.mappings * world.pages.next_power_of_two() * PAGE;
            output + if random(2) == 0 { pages.start * PAGE } else { (pages.start ^ 1) * PAGE }
        };
        match world.radix.claim(range, Oa::new(output), READ_WRITE, &mut self.gather) {
            Err(ClaimError::Contended { at } | ClaimError::Map(MapError::Occupied { at })) => {
                assert!(range.contains(at));
            }
            Err(error) => panic!("{error}"),
            Ok(()) if random(4) == 0 => world.radix.release(range, &mut self.gather),
            Ok(()) => {
                world.log().maps(pages.clone(), output);
                world.radix.publish(range);
                world.log().mapped(pages);
            }
        }
    }

    fn retract(&mut self, pages: std::ops::Range<u64>) {
        let world = &self.world;
        let range = range_of(&pages);
        match world.radix.cut_claimed(range) {
            Ok(()) => {}
            Err(CutError::Contended { .. }) => return,
            Err(error) => panic!("{error}"),
        }
        world.log().unmaps(pages.clone());
        let mut gather = Gather::new();
        let retracted = world.radix.retract(range, &mut gather);
        assert!(matches!(retracted, Ok(()) | Err(RetractError::Contended { .. })), "{retracted:?}");
        let restored = random(4) == 0;
        for run in gather.runs.iter() {
            assert!(range.covers(&run), "{run} of {range}");
            if restored {
                world.radix.publish(run);
            } else {
                world.log().unmapped(pages_of(run));
                world.radix.release(run, &mut self.gather);
            }
        }
        world.log().tried(pages);
        self.gather.retired.append(&mut gather.retired);
    }

    /// Holds what is mapped; if that is all of the pages, it leads elsewhere afterwards.
    fn change(&mut self, pages: std::ops::Range<u64>) {
        let world = &self.world;
        let range = range_of(&pages);
        let output = {
            let mut log = world.log();
            log.mappings += 1;
            log.mappings * world.pages.next_power_of_two() * PAGE + (pages.start ^ random(2)) * PAGE
        };
        let mut gather = Gather::new();
        let exactly = random(4) > 0;
        let held = if exactly {
            let largest = PageSize::from_log2((range.first() ^ output).trailing_zeros()).unwrap();
            world.radix.hold_exactly(range, largest, &mut gather)
        } else {
            world.radix.hold_all(range, &mut gather)
        };
        assert!(matches!(held, Ok(()) | Err(RetractError::Contended { .. })), "{held:?}");
        let runs: Vec<IovaRange> = gather.runs.iter().collect();
        if exactly && runs == [range] {
            world.log().remaps(pages.clone(), output);
            world.radix.remap_held(range, Oa::new(output), READ_WRITE);
            world.log().remapped(pages.clone());
        } else {
            for run in &runs {
                world.radix.protect_held(*run, READ_WRITE);
            }
        }
        for run in &runs {
            for page in pages_of(*run) {
                assert!(world.radix.walk(page * PAGE).is_ok(), "a held leaf stays");
            }
            world.radix.let_go_all(*run);
        }
        self.gather.retired.append(&mut gather.retired);
    }

    fn hold(&mut self, pages: std::ops::Range<u64>) {
        let world = &self.world;
        match world.radix.hold(range_of(&pages)) {
            Ok(Some(leaf)) => {
                let page = leaf.iova / PAGE;
                let began = world.log().tick();
                let again = world.radix.walk(leaf.iova).map(|leaf| leaf.output(page * PAGE).get());
                assert_eq!(again, Ok(leaf.oa.get()), "a held leaf stays");
                world.log().check(page, Some(leaf.oa.get()), began, began);
                world.radix.let_go(&leaf);
            }
            Ok(None) | Err(RetractError::Contended { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Claimers whose ranges overlap, and a device.
fn claimers<F: ClaimFormat>(format: F, pages: u64, steps: u64) {
    let world = World::new(format, pages);
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let mut claimer = Claimer { world: Arc::clone(&world), gather: Gather::new() };
            thread::spawn(move || (0..steps).for_each(|_| claimer.step()))
        })
        .collect();
    let device = {
        let world = Arc::clone(&world);
        thread::spawn(move || world.device(2 * steps))
    };
    threads.into_iter().chain([device]).for_each(|thread| thread.join().unwrap());
    // What is mapped can be unmapped: nobody owns it any more.
    let mut last = Claimer { world: Arc::clone(&world), gather: Gather::new() };
    let mut gather = Gather::new();
    world.radix.retract(range_of(&(0..pages)), &mut gather).unwrap();
    for run in gather.runs.iter() {
        world.log().unmapped(pages_of(run));
        world.radix.release(run, &mut last.gather);
    }
    gather.retired.append(&mut last.gather.retired);
    drop(last);
    world.free(&mut gather);
    world.finish();
}

#[test]
fn claimers_sixteen() {
    check(5000, || claimers(Sixteen, 64, 8));
}

#[test]
fn claimers_native() {
    check(150, || claimers(Native::new(), 1024, 6));
}
