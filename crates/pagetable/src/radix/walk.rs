//! Looking: one address, with or without a cache, and all leaves of a range.

use super::{HIGHEST_LEVEL, Next, Node, Radix, Slot, Stop, Visitor, leaf_span};
use crate::address::{IovaRange, Oa, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format};
use crate::memory::TableMemory;
use core::ops::ControlFlow;
use core::ptr::NonNull;

mod shared;

pub use shared::SharedWalk;

/// A leaf that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The first address that it maps.
    pub iova: u64,
    /// What that is mapped to.
    pub oa: Oa,
    /// How much it maps.
    pub size: PageSize,
    /// What it allows, as the entry says that was read. Where a leaf has several entries hardware may have marked any
    /// of them as used: [`Radix::dirty`] asks all.
    pub attributes: Attributes,
}

impl Leaf {
    /// What an address in the leaf is mapped to.
    #[inline(always)]
    pub fn output(&self, iova: u64) -> Oa {
        Oa::new(self.oa.get() + (iova & (self.size.bytes() - 1)))
    }

    /// The addresses that it maps.
    pub fn range(&self) -> IovaRange {
        let (first, last) = leaf_span(self.iova, self.size);
        IovaRange::new(first, last).unwrap_or(IovaRange::ALL)
    }
}

/// Why an address does not translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkFault {
    /// Nothing is mapped there.
    #[error("nothing is mapped at {0:#x}")]
    NotMapped(u64),
    /// The table cannot hold such an address.
    #[error("{0:#x} lies outside what the table can translate")]
    OutOfRange(u64),
    /// An entry on the way has reserved bits set.
    #[error("an entry on the way to {0:#x} is malformed")]
    Malformed(u64),
}

/// A remembered way to one leaf table.
///
/// It holds no translation, only the address of the table in which the last one was found; the leaf itself is read
/// again each time. So unmapping a page need not find and clear any cache. Only the retirement of a table makes
/// the remembered address useless, and the table's generation tells.
#[derive(Debug)]
pub struct CachedWalk<A> {
    generation: u64,
    /// The addresses below the table, without the bits that index it.
    tag: u64,
    node: Option<Node<A>>,
}

// SAFETY: the table behind the address is only reached through a `Radix` that confirms that it is still linked,
// and then only its atomics are loaded.
unsafe impl<A: Send + Sync> Send for CachedWalk<A> {}
// SAFETY: as above; shared references allow no change.
unsafe impl<A: Send + Sync> Sync for CachedWalk<A> {}

impl<A> CachedWalk<A> {
    /// Nothing remembered yet.
    pub const fn new() -> CachedWalk<A> {
        CachedWalk { generation: 0, tag: 0, node: None }
    }
}

impl<A> Default for CachedWalk<A> {
    fn default() -> CachedWalk<A> {
        CachedWalk::new()
    }
}

impl<A> core::fmt::Debug for Node<A> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let table: NonNull<A> = self.table;
        write!(f, "level {} at {table:p}", self.level)
    }
}

/// The leaf around an address that an entry has told of.
#[inline(always)]
fn leaf(iova: u64, oa: u64, size: PageSize, attributes: Attributes) -> Leaf {
    Leaf { iova: leaf_span(iova, size).0, oa: Oa::new(oa), size, attributes }
}

/// Calls back for every entry that is not empty.
struct Look<C> {
    callback: C,
    /// A leaf of several entries is shown for each of them.
    every_entry: bool,
}

impl<M, A: AtomicEntry, C: FnMut(&Slot<'_, A>) -> ControlFlow<()>> Visitor<M, A> for Look<C> {
    type Error = ();

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<()>> {
        let last = match slot.decoded {
            Entry::Leaf { size, .. } if !self.every_entry => leaf_span(slot.first, size).1.max(slot.last),
            _ => slot.last,
        };
        match (self.callback)(&slot) {
            ControlFlow::Continue(()) => Ok(Next::After(last)),
            ControlFlow::Break(()) => Err(Stop::Error(())),
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Translates one address.
    #[inline(always)]
    pub fn walk(&self, iova: u64) -> Result<Leaf, WalkFault> {
        let root = self.root_over(iova)?;
        self.walk_below(root, iova).0
    }

    /// The root, if the table has one that covers `iova` today.
    #[inline(always)]
    fn root_over(&self, iova: u64) -> Result<Node<A>, WalkFault> {
        match self.root() {
            Some(root) if self.reaches(root.level, iova) => Ok(root),
            // A table that could grow just has not been asked to; one that cannot will never translate this.
            _ if self.reaches(*self.format.top_levels().end(), iova) => Err(WalkFault::NotMapped(iova)),
            _ => Err(WalkFault::OutOfRange(iova)),
        }
    }

    /// Translates one address and remembers the way in `cache`, which may have served other tables before.
    #[inline]
    pub fn walk_cached(&self, iova: u64, cache: &mut CachedWalk<A>) -> Result<Leaf, WalkFault> {
        let generation = self.generation.load();
        if let Some(node) = cache.node {
            if cache.generation == generation
                && cache.tag == self.tag(node.level, iova)
                && !self.outside(iova)
            {
                let value = self.entry(node, self.index(node.level, iova)).load();
                if let Entry::Leaf { oa, size, attributes } = self.format.decode(node.level, value) {
                    return Ok(leaf(iova, oa, size, attributes));
                }
                // Absent there: the table may have been retired a moment ago and another one be in its place.
                // Only the walk from the root can say that nothing is mapped.
            }
        }
        let root = self.root_over(iova)?;
        let (leaf, node) = self.walk_below(root, iova);
        if leaf.is_ok() {
            // The generation was read before the walk: a table retired since then is not taken for a linked one.
            *cache = CachedWalk { generation, tag: self.tag(node.level, iova), node: Some(node) };
        }
        leaf
    }

    /// Whether the address lies in the gap of a sign-extended table: below the sign the gap looks like what is mapped.
    #[inline(always)]
    fn outside(&self, iova: u64) -> bool {
        self.format.sign_extended() && !self.reaches(*self.format.top_levels().end(), iova)
    }

    #[inline(always)]
    fn tag(&self, level: u8, iova: u64) -> u64 {
        let bits = self.format.shift(level) + self.format.index_bits(level);
        // The level takes part: tables of two levels may span the same address.
        if bits >= 64 { u64::from(level) } else { (iova >> bits << bits) | u64::from(level) }
    }

    #[inline(always)]
    fn walk_below(&self, root: Node<A>, iova: u64) -> (Result<Leaf, WalkFault>, Node<A>) {
        let mut node = root;
        // Unrolled, so that what a level has is a constant.
        for at in (1..=HIGHEST_LEVEL).rev() {
            if at > root.level {
                continue;
            }
            node.level = at;
            let value = self.entry(node, self.index(at, iova)).load();
            if at > 1 && self.format.table_pattern(at).matches(value) {
                node = self.child(node, self.format.table_address(value));
                continue;
            }
            match self.format.decode(at, value) {
                Entry::Table(address) if at > 1 => node = self.child(node, address),
                Entry::Leaf { oa, size, attributes } => return (Ok(leaf(iova, oa, size, attributes)), node),
                Entry::Absent => return (Err(WalkFault::NotMapped(iova)), node),
                Entry::Table(_) | Entry::Malformed => break,
            }
        }
        (Err(WalkFault::Malformed(iova)), node)
    }

    /// The entry to which the way to `iova` leads, and the table in which it stands.
    pub(super) fn walk_entry(&self, iova: u64) -> Result<(Node<A>, u64), WalkFault> {
        let mut node = self.root_over(iova)?;
        loop {
            let value = self.entry(node, self.index(node.level, iova)).load();
            match self.format.decode(node.level, value) {
                Entry::Table(address) if node.level > 1 => node = self.child(node, address),
                Entry::Absent => return Err(WalkFault::NotMapped(iova)),
                Entry::Leaf { .. } => return Ok((node, value)),
                Entry::Table(_) | Entry::Malformed => return Err(WalkFault::Malformed(iova)),
            }
        }
    }

    /// Shows the leaves that have an address in `range`, ascending, until the callback breaks. What other
    /// operations change meanwhile may or may not be seen.
    pub fn leaves(&self, range: IovaRange, mut callback: impl FnMut(Leaf) -> ControlFlow<()>) {
        let mut look = Look {
            callback: |slot: &Slot<'_, A>| match slot.decoded {
                Entry::Leaf { oa, size, attributes } => {
                    callback(Leaf { iova: leaf_span(slot.first, size).0, oa: Oa::new(oa), size, attributes })
                }
                _ => ControlFlow::Continue(()),
            },
            every_entry: false,
        };
        // The only error is the callback's wish to end.
        let _ = self.run(&mut look, range);
    }

    /// Shows what is not free to be mapped in `range`, ascending: leaves, and leaves to be that an operation owns,
    /// each with its whole span.
    pub fn occupied(&self, range: IovaRange, mut callback: impl FnMut(IovaRange) -> ControlFlow<()>) {
        let mut look = Look {
            callback: |slot: &Slot<'_, A>| {
                if slot.value == 0 {
                    return ControlFlow::Continue(());
                }
                let size = match slot.decoded {
                    Entry::Leaf { size, .. } => size,
                    _ => PageSize(self.format.shift(slot.node.level) as u8),
                };
                let (first, last) = leaf_span(slot.first, size);
                IovaRange::new(first, last).map_or(ControlFlow::Continue(()), &mut callback)
            },
            every_entry: false,
        };
        let _ = self.run(&mut look, range);
    }

    /// Shows the entries in memory that lie in `range` and are neither absent nor links, ascending: level, first
    /// address of the range behind it, and value. A leaf of several entries is shown for each of them.
    ///
    /// This is for tests, dumps and debugging: whoever wants to know what is mapped asks for the
    /// [`leaves`](Self::leaves).
    pub fn raw_leaves(&self, range: IovaRange, mut callback: impl FnMut(u8, u64, u64) -> ControlFlow<()>) {
        let mut look = Look {
            callback: |slot: &Slot<'_, A>| match slot.decoded {
                Entry::Absent => ControlFlow::Continue(()),
                _ => callback(slot.node.level, slot.first, slot.value),
            },
            every_entry: true,
        };
        let _ = self.run(&mut look, range);
    }
}
