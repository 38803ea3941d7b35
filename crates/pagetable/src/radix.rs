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
//! # How an empty table goes away
//!
//! Counting the entries of each table would cost an atomic addition with every map and another with every unmap,
//! which is as much as everything else that they do for a small page together. So nothing is counted. Whoever has
//! emptied an entry looks at its neighbours, and only if all of the table seems empty, which is seldom, it goes to
//! work. Beside every table stands a *state* for this:
//!
//! 1. The remover marks the state `DYING`, with a number that no one used before.
//! 2. It looks at all entries again. If there is something, it takes the mark away.
//! 3. Otherwise it changes exactly that `DYING` to `DEAD`, from which there is no way back, and takes the link in the
//!    parent away.
//!
//! Whoever fills an entry looks at the state *afterwards*: if it is `DYING`, he takes the mark away and 3 fails; if
//! it is `DEAD`, he takes his entry back, takes the link away himself rather than wait for somebody who may be asleep,
//! and goes again from above. Either the filler sees the mark, or step 2 sees the entry: that takes an exchange
//! followed by an ordered load on both sides (claiming mode, which exchanges anyway), or an asymmetric fence
//! (exclusive mode, which only stores).
//!
//! A link is filled in the same way, but could not be taken back once others have filled something behind it. So it is
//! *tentative* at first, by a bit that no hardware looks at. Whoever meets such a link on the way to fill or empty
//! something makes sure himself that the table in which it stands is not going away; if it is, he goes again from above.
//! Nobody but the one who put it there changes a tentative link, so that a store makes it a plain one.
//!
//! Two removals that empty the last two entries at the same moment may each take the other's for filled still. Then
//! the empty table stays until the next removal there, which is harmless.
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
mod cursor;
mod cut;
mod dirty;
mod held;
mod map;
mod merge;
mod protect;
mod remap;
mod retire;
mod unmap;
mod walk;

pub use claim::{ClaimError, RetractError};
pub use cursor::{Cursor, Span};
pub use cut::CutError;
pub use map::MapError;
pub use protect::ProtectError;
pub use remap::RemapError;
pub use unmap::UnmapError;
pub use walk::{CachedWalk, Leaf, SharedWalk, WalkFault};

/// The table is retired or about to be; nobody may add to it.
const DEAD: u64 = 1 << 63;
/// Somebody is looking whether the table is empty, in order to retire it.
const DYING: u64 = 1 << 62;
/// The table was empty once and is one of those that may stay.
const KEPT: u64 = 1 << 61;
/// The numbers of deaths, below the marks; they wrap.
const DEATHS: u64 = KEPT - 1;
/// How many empty tables may stay linked in one radix.
const KEPT_LIMIT: u64 = 64;
/// No format has more levels; ways down are unrolled up to here.
const HIGHEST_LEVEL: u8 = 6;
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
    /// How many tables carry the mark `KEPT`. Like `GENERATIONS` it is not an `A`: it orders nothing, and no decision
    /// that could go wrong depends on it.
    kept: AtomicU64,
}

/// A page table of format `F`, with table pages from `M`.
#[cfg(not(feature = "std"))]
pub struct Radix<F: Format, M: TableMemory<A>, A: AtomicEntry = AtomicU64> {
    format: F,
    memory: M,
    root: A,
    generation: A,
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

    /// Behind a table that was visited from one end of the range to the other. `whole`: the range covers all of it.
    fn left(&mut self, _slot: &Slot<'_, A>, _child: Node<A>, _whole: bool) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Where retired tables go. Visitors that retire tables, or that add entries, have one.
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
            kept: AtomicU64::new(0),
        }
    }

    /// The format's facts.
    pub fn format(&self) -> &F {
        &self.format
    }

    /// How many table pages are linked. They are counted now, by looking at every entry above the lowest level: a number
    /// kept up to date would cost every new table an atomic addition more.
    pub fn table_count(&self) -> u64 {
        self.root().map_or(0, |root| self.count_tables(root))
    }

    fn count_tables(&self, node: Node<A>) -> u64 {
        let below = |entry: &A| match self.format.decode(node.level, entry.load()) {
            Entry::Table(_) if node.level == 2 => 1,
            Entry::Table(address) => self.count_tables(self.child(node, address)),
            _ => 0,
        };
        1 + if node.level > 1 { self.all_entries(node).iter().map(below).sum::<u64>() } else { 0 }
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

    #[inline(always)]
    fn root(&self) -> Option<Node<A>> {
        self.decode_root(self.root.load())
    }

    #[inline(always)]
    fn decode_root(&self, word: u64) -> Option<Node<A>> {
        (word != 0).then(|| Node {
            // SAFETY: the root word was made of the address of a table.
            table: unsafe { self.memory.pointer(word & !ROOT_LEVEL) },
            level: (word & ROOT_LEVEL) as u8,
        })
    }

    /// Whether a top table at `level` covers the address.
    #[inline(always)]
    fn reaches(&self, level: u8, iova: u64) -> bool {
        // Two shifts, because together they may be 64.
        let (shift, bits) = (self.format.shift(level), self.format.index_bits(level));
        if self.format.sign_extended() {
            matches!((iova as i64) >> shift >> (bits - 1), 0 | -1)
        } else {
            iova >> shift >> bits == 0
        }
    }

    /// The next piece, from `first` on, of what a range has in common with the addresses that a top table at `level`
    /// covers. There are two pieces at most: the lower and the upper half of a sign-extended table.
    fn covered(&self, level: u8, first: u64, last: u64) -> Option<IovaRange> {
        let width = self.format.width(level);
        if width >= 64 {
            return IovaRange::new(first, last);
        }
        if !self.format.sign_extended() {
            return IovaRange::new(first, last.min((1 << width) - 1));
        }
        let half = 1u64 << (width - 1);
        IovaRange::new(first, last.min(half - 1))
            .or_else(|| IovaRange::new(first.max(half.wrapping_neg()), last))
    }

    /// The root, made or grown until it covers `last`.
    #[inline(always)]
    fn root_covering(&self, last: u64) -> Result<Node<A>, OutOfTables> {
        match self.root() {
            Some(node) if self.reaches(node.level, last) => Ok(node),
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
                Some(node) if self.reaches(node.level, last) || node.level == *levels.end() => {
                    return Ok(node);
                }
                Some(node) => node.level + 1,
                None => levels.clone().find(|&level| self.reaches(level, last)).unwrap_or(*levels.end()),
            };
            let new = self.allocate(level)?;
            if let Some(old) = old {
                self.entry(new, 0).store(self.format.table_entry(level, self.memory.address(old.table)));
            }
            self.clean(self.all_entries(new));
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
            unsafe { self.memory.free(table, layout, true) };
            return Err(OutOfTables);
        }
        Ok(Node { table, level })
    }

    /// Gives back a table that was never linked, and is perhaps not empty any more.
    ///
    /// # Safety
    ///
    /// Nobody else has seen `node`.
    unsafe fn discard(&self, node: Node<A>) {
        // SAFETY: allocated with this layout; the caller vouches that nobody uses it.
        unsafe { self.memory.free(node.table, self.format.table_layout(node.level), false) };
    }

    #[inline(always)]
    fn index(&self, level: u8, iova: u64) -> usize {
        self.format.index(level, iova)
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

    /// All entries of the leaf of `size` that stands in `node` and maps `iova`.
    fn leaf_entries<'a>(&self, node: Node<A>, iova: u64, size: PageSize) -> &'a [A] {
        let count = (size.bytes() >> self.format.shift(node.level)).max(1) as usize;
        self.entries(node, self.index(node.level, leaf_span(iova, size).0), count)
    }

    #[inline(always)]
    fn state<'a>(&self, node: Node<A>) -> &'a A {
        // SAFETY: as for `entry`; the state lives as long as its table.
        unsafe { self.memory.state(node.table, self.format.table_layout(node.level)) }
    }

    /// After entries were written: makes walkers see it that do not snoop.
    #[inline(always)]
    fn clean(&self, entries: &[A]) {
        if !M::COHERENT {
            self.memory.clean(entries);
        }
    }

    /// At the end of an operation: makes sure that walkers which do not snoop see the links on the ways to both ends of its
    /// range. Only those can be others' work, and a link is tentative until it can be seen.
    #[inline(always)]
    fn clean_ways(&self, range: IovaRange) {
        if !M::COHERENT {
            self.clean_way(range.first());
            self.clean_way(range.last());
        }
    }

    fn clean_way(&self, iova: u64) {
        let Some(mut node) = self.root().filter(|root| self.reaches(root.level, iova)) else { return };
        while node.level > 1 {
            let entry = self.entry(node, self.index(node.level, iova));
            let value = entry.load();
            let Entry::Table(address) = self.format.decode(node.level, value) else { return };
            if value & F::TENTATIVE != 0 {
                self.clean(core::slice::from_ref(entry));
            }
            node = self.child(node, address);
        }
    }

    /// All entries of a table.
    #[inline(always)]
    fn all_entries<'a>(&self, node: Node<A>) -> &'a [A] {
        self.entries(node, 0, 1 << self.format.index_bits(node.level))
    }

    #[inline(always)]
    fn child(&self, node: Node<A>, address: u64) -> Node<A> {
        // SAFETY: links are made of addresses of tables, and by us alone.
        Node { table: unsafe { self.memory.pointer(address) }, level: node.level - 1 }
    }

    /// The root, if it covers the range, which lies in one half of a sign-extended table then.
    #[inline(always)]
    fn root_over_range(&self, range: IovaRange) -> Option<Node<A>> {
        let root = self.root()?;
        let one_half = |root: Node<A>| {
            let apart = range.first() ^ range.last();
            apart >> self.format.shift(root.level) >> (self.format.index_bits(root.level) - 1) == 0
        };
        let covers =
            self.reaches(root.level, range.last()) && (!self.format.sign_extended() || one_half(root));
        covers.then_some(root)
    }

    /// The table of `level` on the way to `iova`, if links lead there.
    #[inline(always)]
    fn descend(&self, root: Node<A>, level: u8, iova: u64) -> Option<Node<A>> {
        let mut table = root.table;
        // Unrolled, so that each level's shift is a constant.
        for at in (2..=HIGHEST_LEVEL).rev() {
            if at <= root.level && at > level {
                let value = self.entry(Node { table, level: at }, self.index(at, iova)).load();
                if !self.format.table_pattern(at).matches(value) {
                    return None;
                }
                table = self.child(Node { table, level: at }, self.format.table_address(value)).table;
            }
        }
        Some(Node { table, level })
    }

    /// The table and the level in which the ends of a range part, and the first address's way to it: the way is
    /// followed through links alone, as long as one entry covers the range. `None`: it leads nowhere.
    #[inline(always)]
    fn parting(&self, range: IovaRange) -> Option<Node<A>> {
        let root = self.root_over_range(range)?;
        let apart = range.first() ^ range.last();
        let mut table = root.table;
        for at in (2..=HIGHEST_LEVEL).rev() {
            if at <= root.level {
                let node = Node { table, level: at };
                if apart >> self.format.shift(at) != 0 {
                    return Some(node);
                }
                let value = self.entry(node, self.index(at, range.first())).load();
                if !self.format.table_pattern(at).matches(value) {
                    return Some(node);
                }
                table = self.child(node, self.format.table_address(value)).table;
            }
        }
        Some(Node { table, level: 1 })
    }

    /// The entries of `node` that the range, which lies within the table, covers. `None` if it covers one in part.
    #[inline(always)]
    fn covered_entries<'a>(&self, node: Node<A>, range: IovaRange) -> Option<&'a [A]> {
        let low = (1u64 << self.format.shift(node.level)) - 1;
        if (range.first() | !range.last()) & low != 0 {
            return None;
        }
        let first = self.index(node.level, range.first());
        let last = self.index(node.level, range.last());
        Some(self.entries(node, first, last - first + 1))
    }

    /// The entries that make up a range, if they are neighbours in one table.
    #[inline(always)]
    fn in_one_table<'a>(&self, range: IovaRange) -> Option<Stretch<'a, A>> {
        let node = self.parting(range)?;
        Some(Stretch { node, entries: self.covered_entries(node, range)?, first: range.first() })
    }

    /// Carries a visitor over those addresses of the range that the table covers today.
    fn run<V: Visitor<M, A>>(&self, visitor: &mut V, range: IovaRange) -> Result<(), V::Error> {
        self.run_from(visitor, range.first(), range)
    }

    fn run_from<V: Visitor<M, A>>(
        &self,
        visitor: &mut V,
        mut first: u64,
        range: IovaRange,
    ) -> Result<(), V::Error> {
        loop {
            let Some(root) = self.root() else { return Ok(()) };
            let Some(piece) = self.covered(root.level, first, range.last()) else { return Ok(()) };
            match self.visit(visitor, root, piece.first(), piece.last()) {
                Ok(()) if piece.last() < range.last() => first = piece.last() + 1,
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
                        // All of the highest table may be all of the 2^64 addresses.
                        let done = at + (((done - 1) << shift) | low);
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
                Entry::Table(_)
                    if value & F::TENTATIVE != 0 && visitor.gather().is_some() && !self.confirm(node) =>
                {
                    return Err(Stop::Stale(at));
                }
                Entry::Table(address) if node.level > 1 => {
                    let child = self.child(node, address);
                    let whole = slot.first & low == 0 && slot.last & low == low;
                    let dealt_with = if whole { visitor.link(&slot, child) } else { None };
                    match dealt_with {
                        Some(next) => next,
                        None => match self.visit(visitor, child, slot.first, slot.last) {
                            Ok(()) => {
                                visitor.left(&slot, child, whole).map_err(Stop::Error)?;
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
        unsafe { self.memory.free(node.table, self.format.table_layout(node.level), false) };
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
        f.debug_struct("Radix").field("format", &self.format).field("top", &self.top()).finish()
    }
}

/// A leaf's first and last address, given any address in it.
#[inline(always)]
fn leaf_span(iova: u64, size: PageSize) -> (u64, u64) {
    let low = size.bytes() - 1;
    (iova & !low, iova | low)
}

/// The addresses of neighbouring leaves, from number `began` to before number `end` of those that begin at `first`.
#[inline(always)]
fn leaves_span(first: u64, began: usize, end: usize, size: PageSize) -> Option<IovaRange> {
    let last = first + ((end as u64).checked_sub(1)? << size.log2()) + (size.bytes() - 1);
    IovaRange::new(first + ((began as u64) << size.log2()), last)
}
