//! A page table in memory: the one walker under all formats.
//!
//! # How it is built
//!
//! The root word holds the address of the top table and its level, so that a table can grow on top with one
//! compare-exchange and an empty one costs nothing. Below it every entry is absent, a link, or a leaf. Links are
//! installed by compare-exchange, so any number of operations may build tables at once.
//!
//! Every operation is a *visitor* that [`Radix::visit`] carries over the entries of a range, in ascending order;
//! what differs between mapping, removing, cutting and looking is only what the visitor does at an entry that is
//! not a link. The visitors are in the modules below this one.
//!
//! # Live counts, and how an empty table goes away
//!
//! Beside every table stands a count of its entries that are not absent. Whoever is about to fill an entry
//! adds one *first*; whoever has emptied an entry subtracts one. A table whose count is 0 may be retired: first
//! the count is replaced by `DEAD` with a compare-exchange, from which there is no way back, and then the link in
//! the parent is taken away with another one. Whoever succeeds in that retires the table. It need not be the one
//! who wrote `DEAD`: an operation that adds to a dead count has come through a link that is going away, and
//! takes it away itself rather than wait for somebody who may be asleep.
//!
//! Not every empty table is retired at once, or a single page mapped and unmapped again and again would
//! allocate a table each time. A few are kept, marked `KEPT`; a removal that covers the table's whole span, or
//! finds the allowance used up, retires it.
//!
//! # When memory goes
//!
//! A retired table is handed to the caller in its [`Gather`]. It stays readable, and empty, until the caller frees
//! it, which is allowed only when all operations and walks that might have seen it are over. This is why
//! everything here can be a safe function on `&self`.

use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
#[cfg(feature = "std")]
use crate::format::Native;
use crate::format::{Entry, Format};
use crate::gather::Gather;
#[cfg(feature = "std")]
use crate::memory::HeapTables;
use crate::memory::{OutOfTables, TableMemory};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

mod claim;
mod cut;
mod map;
mod retire;
mod unmap;
mod walk;

pub use claim::{ClaimError, RetractError};
pub use cut::CutError;
pub use map::MapError;
pub use unmap::UnmapError;
pub use walk::{CachedWalk, Leaf, WalkFault};

/// The table is retired or about to be; nobody may add to it.
const DEAD: u64 = 1 << 63;
/// The table was empty once and is one of those that may stay.
const KEPT: u64 = 1 << 62;
/// How many entries are not absent.
const COUNT: u64 = (1 << 32) - 1;
/// How many empty tables may stay linked in one radix.
const KEPT_LIMIT: u64 = 64;
/// The part of the root word that holds the level; addresses of tables are multiples of 64.
const ROOT_LEVEL: u64 = 0x3f;

/// Gives every retirement in the process a number of its own, so that a [`CachedWalk`] of one table can never be
/// taken for one of another.
static GENERATIONS: AtomicU64 = AtomicU64::new(1);

/// A page table of format `F`, with table pages from `M`.
///
/// See the [crate's documentation](crate) for an example.
#[cfg(feature = "std")]
pub struct Radix<F: Format, M: TableMemory<A> = HeapTables, A: AtomicEntry = AtomicU64> {
    format: F,
    memory: M,
    /// Address and level of the top table; 0 as long as there is none.
    root: A,
    /// Changes whenever a table is retired.
    generation: A,
    /// How many table pages are linked. Touched only when one comes or goes. Like `kept` and `GENERATIONS` it is
    /// not an `A`: it orders nothing, and no decision that could go wrong depends on it.
    tables: AtomicU64,
    /// How many tables carry the mark `KEPT`.
    kept: AtomicU64,
}

/// A page table of format `F`, with table pages from `M`.
#[cfg(not(feature = "std"))]
pub struct Radix<F: Format, M: TableMemory<A>, A: AtomicEntry = AtomicU64> {
    format: F,
    memory: M,
    root: A,
    generation: A,
    tables: AtomicU64,
    kept: AtomicU64,
}

/// A table that this operation reached.
struct Node<A> {
    table: NonNull<A>,
    level: u8,
}

impl<A> Clone for Node<A> {
    fn clone(&self) -> Node<A> {
        *self
    }
}

impl<A> Copy for Node<A> {}

/// An entry that a visitor is shown.
struct Slot<'a, A> {
    node: Node<A>,
    entry: &'a A,
    /// What the entry held when it was read.
    value: u64,
    /// What that means.
    decoded: Entry,
    /// The first address of the visited range that the entry covers.
    first: u64,
    /// The last one.
    last: u64,
}

/// Neighbouring entries of one table, each covered by the visited range as a whole.
struct Stretch<'a, A> {
    node: Node<A>,
    entries: &'a [A],
    /// The first address that the first of them covers.
    first: u64,
}

/// Where the visit goes on.
enum Next {
    /// Behind this address.
    After(u64),
    /// The entry changed: read it again.
    Again,
}

/// Why a visit ends early.
enum Stop<E> {
    /// The table is retired or about to be: go on above it, at this address.
    Stale(u64),
    /// The operation is refused.
    Error(E),
}

/// What an operation does at the entries of its range.
trait Visitor<M, A: AtomicEntry> {
    type Error;

    /// At an entry that is no link.
    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<Self::Error>>;

    /// At a stretch of entries, before they are shown one by one: how many of them, from the first on, it dealt
    /// with. This is where the work on small pages is done.
    fn stretch(&mut self, _stretch: Stretch<'_, A>) -> Result<usize, Stop<Self::Error>> {
        Ok(0)
    }

    /// At a link that the range covers as a whole, before the table below is entered. `Some` if it was dealt with.
    fn link(&mut self, _slot: &Slot<'_, A>, _child: Node<A>) -> Option<Next> {
        None
    }

    /// Whether tables that are found empty behind the visitor shall go.
    fn prunes(&self) -> bool {
        false
    }

    /// Where retired tables go. Visitors that prune, or that add entries, have one.
    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        None
    }
}

#[cfg(feature = "std")]
impl Radix<Native> {
    /// A native table with pages from the heap.
    pub fn native(format: Native) -> Radix<Native> {
        Radix::new(format, HeapTables)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// An empty table. It takes memory when something is mapped.
    pub fn new(format: F, memory: M) -> Radix<F, M, A> {
        Radix {
            format,
            memory,
            root: A::new(0),
            generation: A::new(GENERATIONS.fetch_add(1, Ordering::Relaxed)),
            tables: AtomicU64::new(0),
            kept: AtomicU64::new(0),
        }
    }

    /// The format's facts.
    pub fn format(&self) -> &F {
        &self.format
    }

    /// How many table pages are in use.
    pub fn table_count(&self) -> u64 {
        self.tables.load(Ordering::Relaxed)
    }

    /// The bytes of those table pages.
    pub fn table_bytes(&self) -> u64 {
        // Only a root can have another size, and there is one.
        let top = self.root().map_or(0, |root| self.format.table_layout(root.level).entries as u64 * 8);
        let rest = self.format.table_layout(1).entries as u64 * 8;
        top + rest * self.table_count().saturating_sub(1)
    }

    /// Address of the top table and its level, for whoever programs hardware with it; `None` as long as nothing
    /// was ever mapped. A format that [grows](Format::top_levels) changes both.
    pub fn top(&self) -> Option<(u64, u8)> {
        self.root().map(|root| (self.memory.address(root.table), root.level))
    }

    fn root(&self) -> Option<Node<A>> {
        self.decode_root(self.root.load())
    }

    fn decode_root(&self, word: u64) -> Option<Node<A>> {
        (word != 0).then(|| Node {
            table: self.memory.pointer(word & !ROOT_LEVEL),
            level: (word & ROOT_LEVEL) as u8,
        })
    }

    /// The last address that a top table at `level` covers.
    fn top_last(&self, level: u8) -> u64 {
        let bits = self.format.shift(level) + self.format.index_bits(level);
        if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
    }

    /// The root, made or grown until it covers `last`.
    fn root_covering(&self, last: u64) -> Result<Node<A>, OutOfTables> {
        match self.root() {
            Some(node) if self.top_last(node.level) >= last => Ok(node),
            _ => self.grow_to(last),
        }
    }

    #[cold]
    fn grow_to(&self, last: u64) -> Result<Node<A>, OutOfTables> {
        let levels = self.format.top_levels();
        loop {
            let word = self.root.load();
            let old = self.decode_root(word);
            let level = match old {
                Some(node) if self.top_last(node.level) >= last || node.level == *levels.end() => {
                    return Ok(node);
                }
                Some(node) => node.level + 1,
                None => levels.clone().find(|&level| self.top_last(level) >= last).unwrap_or(*levels.end()),
            };
            let new = self.allocate(level)?;
            if let Some(old) = old {
                self.entry(new, 0).store(self.format.table_entry(level, self.memory.address(old.table)));
                self.live(new).store(1);
            }
            if self.root.compare_exchange(word, self.memory.address(new.table) | u64::from(level)).is_err() {
                // SAFETY: never published.
                unsafe { self.discard(new) };
            }
        }
    }

    fn allocate(&self, level: u8) -> Result<Node<A>, OutOfTables> {
        let layout = self.format.table_layout(level);
        let table = self.memory.allocate(layout)?;
        if self.memory.address(table) >> self.format.output_bits().min(63) != 0 {
            // No entry can hold the address: as good as no memory at all.
            // SAFETY: just allocated with this layout, and nobody has seen it.
            unsafe { self.memory.free(table, layout) };
            return Err(OutOfTables);
        }
        self.tables.fetch_add(1, Ordering::Relaxed);
        Ok(Node { table, level })
    }

    /// Gives back a table that was never linked.
    ///
    /// # Safety
    ///
    /// Nobody else has seen `node`.
    unsafe fn discard(&self, node: Node<A>) {
        self.tables.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: allocated with this layout; the caller vouches that nobody uses it.
        unsafe { self.memory.free(node.table, self.format.table_layout(node.level)) };
    }

    #[inline(always)]
    fn index(&self, level: u8, iova: u64) -> usize {
        (iova >> self.format.shift(level)) as usize & ((1 << self.format.index_bits(level)) - 1)
    }

    #[inline(always)]
    fn entry<'a>(&self, node: Node<A>, index: usize) -> &'a A {
        debug_assert!(index < 1 << self.format.index_bits(node.level));
        // SAFETY: `node` was reached through a link by an operation that is still running, or is not published
        // yet. A linked table has one entry for every index of its level, and it is freed only when every
        // operation that could have reached it has ended (the contract of `RetiredTable::free`).
        unsafe { node.table.add(index).as_ref() }
    }

    /// The `count` entries of a table from `index` on.
    #[inline(always)]
    fn entries<'a>(&self, node: Node<A>, index: usize, count: usize) -> &'a [A] {
        debug_assert!(index + count <= 1 << self.format.index_bits(node.level));
        // SAFETY: as for `entry`, of which these are neighbours in the same table.
        unsafe { core::slice::from_raw_parts(node.table.add(index).as_ptr(), count) }
    }

    #[inline(always)]
    fn live<'a>(&self, node: Node<A>) -> &'a A {
        // SAFETY: as for `entry`; the count lives as long as its table.
        unsafe { self.memory.live(node.table, self.format.table_layout(node.level)) }
    }

    #[inline(always)]
    fn child(&self, node: Node<A>, address: u64) -> Node<A> {
        Node { table: self.memory.pointer(address), level: node.level - 1 }
    }

    /// Announces that an entry of `node` is about to be filled; `false` if the table is going away.
    #[inline(always)]
    fn add_live(&self, node: Node<A>, count: u64) -> bool {
        // Adding to a dead count does no harm: nobody reads it any more.
        self.live(node).fetch_add(count) & DEAD == 0
    }

    #[inline(always)]
    fn subtract_live(&self, node: Node<A>, count: u64) {
        self.live(node).fetch_sub(count);
    }

    /// The entries for a range that lies within one table of the lowest level, without filling it. This is the short
    /// way of operations on a few small pages; everything else goes the long way of [`run`](Self::run).
    #[inline(always)]
    fn small_pages<'a>(&self, range: IovaRange) -> Option<Stretch<'a, A>> {
        let (first, last) = (range.first(), range.last());
        let span = self.format.shift(1) + self.format.index_bits(1);
        let low = (1u64 << span) - 1;
        if first & !low != last & !low || last - first == low {
            return None;
        }
        let mut node = self.root()?;
        if last > self.top_last(node.level) {
            return None;
        }
        while node.level > 1 {
            let entry = self.entry(node, self.index(node.level, first)).load();
            let Entry::Table(address) = self.format.decode(node.level, entry) else { return None };
            node = self.child(node, address);
        }
        let (begin, end) = (self.index(1, first), self.index(1, last));
        Some(Stretch { node, entries: self.entries(node, begin, end - begin + 1), first })
    }

    /// Carries a visitor over those addresses of the range that the table covers today.
    #[inline]
    fn run<V: Visitor<M, A>>(&self, visitor: &mut V, range: IovaRange) -> Result<(), V::Error> {
        match self.run_small(visitor, range)? {
            None => Ok(()),
            Some(first) => self.run_from(visitor, first, range),
        }
    }

    /// The short way: `None` if it led to the end, otherwise the address from which the long way has to be gone.
    #[inline(always)]
    fn run_small<V: Visitor<M, A>>(
        &self,
        visitor: &mut V,
        range: IovaRange,
    ) -> Result<Option<u64>, V::Error> {
        let Some(stretch) = self.small_pages(range) else { return Ok(Some(range.first())) };
        let (node, count) = (stretch.node, stretch.entries.len());
        match visitor.stretch(stretch) {
            Ok(done) if done == count => {
                if visitor.prunes() && self.live(node).load() & (COUNT | KEPT | DEAD) == 0 {
                    if let Some(gather) = visitor.gather() {
                        self.sweep_path(range.first(), gather);
                    }
                }
                Ok(None)
            }
            Ok(done) => Ok(Some(range.first() + ((done as u64) << self.format.shift(1)))),
            Err(Stop::Stale(at)) => Ok(Some(at)),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    #[inline(never)]
    fn run_from<V: Visitor<M, A>>(
        &self,
        visitor: &mut V,
        mut first: u64,
        range: IovaRange,
    ) -> Result<(), V::Error> {
        loop {
            let Some(root) = self.root() else { return Ok(()) };
            let last = range.last().min(self.top_last(root.level));
            if first > last {
                return Ok(());
            }
            match self.visit(visitor, root, first, last) {
                Ok(()) => return Ok(()),
                Err(Stop::Stale(at)) => first = at,
                Err(Stop::Error(error)) => return Err(error),
            }
        }
    }

    fn visit<V: Visitor<M, A>>(
        &self,
        visitor: &mut V,
        node: Node<A>,
        first: u64,
        last: u64,
    ) -> Result<(), Stop<V::Error>> {
        let shift = self.format.shift(node.level);
        let low = (1u64 << shift) - 1;
        let mut at = first;
        loop {
            let index = self.index(node.level, at);
            if at & low == 0 {
                // Entries that end in the range; the last one of the table may be the last one of all.
                let whole = (last - at) >> shift;
                let whole = whole + u64::from(last & low == low);
                if whole > 0 {
                    let entries = self.entries(node, index, whole as usize);
                    let done = visitor.stretch(Stretch { node, entries, first: at })? as u64;
                    if done > 0 {
                        let done = at + ((done << shift) - 1);
                        if done >= last {
                            return Ok(());
                        }
                        at = done + 1;
                        continue;
                    }
                }
            }
            let entry = self.entry(node, index);
            let value = entry.load();
            let decoded = self.format.decode(node.level, value);
            let slot = Slot { node, entry, value, decoded, first: at, last: (at | low).min(last) };
            let next = match decoded {
                Entry::Table(address) if node.level > 1 => {
                    let child = self.child(node, address);
                    let whole = slot.first & low == 0 && slot.last & low == low;
                    let dealt_with = if whole { visitor.link(&slot, child) } else { None };
                    match dealt_with {
                        Some(next) => next,
                        None => match self.visit(visitor, child, slot.first, slot.last) {
                            Ok(()) => {
                                if visitor.prunes() {
                                    if let Some(gather) = visitor.gather() {
                                        self.prune(gather, &slot, child, whole);
                                    }
                                }
                                Next::After(slot.last)
                            }
                            Err(Stop::Stale(stale)) => {
                                if let Some(gather) = visitor.gather() {
                                    self.unlink(gather, &slot, child);
                                }
                                at = stale;
                                continue;
                            }
                            error => return error,
                        },
                    }
                }
                _ => visitor.slot(slot)?,
            };
            if let Next::After(done) = next {
                if done >= last {
                    return Ok(());
                }
                at = done + 1;
            }
        }
    }

    /// Frees `node` and all below.
    ///
    /// # Safety
    ///
    /// Nobody else uses the table.
    unsafe fn free_tree(&self, node: Node<A>) {
        if node.level > 1 {
            for index in 0..1 << self.format.index_bits(node.level) {
                if let Entry::Table(address) = self.format.decode(node.level, self.entry(node, index).load())
                {
                    // SAFETY: passed on; a table is linked from one place only.
                    unsafe { self.free_tree(self.child(node, address)) };
                }
            }
        }
        // SAFETY: allocated with this layout; nobody uses it.
        unsafe { self.memory.free(node.table, self.format.table_layout(node.level)) };
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Drop for Radix<F, M, A> {
    fn drop(&mut self) {
        if let Some(root) = self.root() {
            // SAFETY: `&mut self`: no operation runs, and retired tables are not linked.
            unsafe { self.free_tree(root) };
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> core::fmt::Debug for Radix<F, M, A> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Radix").field("format", &self.format).field("tables", &self.table_count()).finish()
    }
}

/// A leaf's first and last address, given any address in it.
fn leaf_span(iova: u64, size: PageSize) -> (u64, u64) {
    let low = size.bytes() - 1;
    (iova & !low, iova | low)
}
