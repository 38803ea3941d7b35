//! A remembered way that several threads use at the same time.
//!
//! It leads to the table above the smallest pages' where it can: that spans 512 times as much as they do, so that a few
//! ways are enough for everything a device does, and the link below it is read anew with the leaf.
//!
//! A [`CachedWalk`] has one owner. An IOTLB is asked by every thread of its device, and a lock around each entry would
//! cost more than the walk that it saves. So an entry is a *sequence lock*: who writes makes the number odd, writes,
//! and makes it even again; who reads looks at the number before and after, and takes what is in between for nothing
//! if the two differ or are odd. Readers write nothing, so that they do not take the line from each other, and nobody
//! waits: a writer that meets another one leaves the entry to it.

use super::{CachedWalk, Node, Radix};
use crate::address::Oa;
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format};
use crate::memory::TableMemory;
use core::ptr::NonNull;

#[cfg(not(loom))]
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence};
#[cfg(loom)]
use loom::sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence};

/// How many bits the level takes beside a generation.
const LEVEL_BITS: u32 = 3;
/// The bits of `span` that hold the logarithm of what the table spans, which is more than that.
const SPAN_BITS: u64 = 63;

/// A remembered way to a table with leaves, or with links to such tables, for any number of threads.
///
/// Like a [`CachedWalk`] it holds no translation, may have served other tables before, and needs not be told of an
/// unmap.
#[derive(Debug)]
pub struct SharedWalk<A> {
    /// Odd: being written.
    sequence: AtomicU64,
    /// The generation, and the level of the table.
    generation: AtomicU64,
    /// The first address below the table, and the logarithm of how many there are.
    span: AtomicU64,
    table: AtomicPtr<A>,
}

impl<A> SharedWalk<A> {
    /// Nothing remembered yet.
    #[cfg(not(loom))]
    pub const fn new() -> SharedWalk<A> {
        SharedWalk {
            sequence: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            span: AtomicU64::new(0),
            table: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    /// Nothing remembered yet.
    #[cfg(loom)]
    pub fn new() -> SharedWalk<A> {
        SharedWalk {
            sequence: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            span: AtomicU64::new(0),
            table: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    /// Writes all three, unless another thread is doing the same.
    fn store(&self, generation: u64, span: u64, table: NonNull<A>) {
        let even = self.sequence.load(Ordering::Relaxed) & !1;
        let odd = even.wrapping_add(1);
        if self.sequence.compare_exchange(even, odd, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return;
        }
        // Whoever reads one of these values also sees that the number is odd, or another one.
        fence(Ordering::Release);
        self.generation.store(generation, Ordering::Relaxed);
        self.span.store(span, Ordering::Relaxed);
        self.table.store(table.as_ptr(), Ordering::Relaxed);
        self.sequence.store(even.wrapping_add(2), Ordering::Release);
    }

    /// The table, if it is one above the address, of this generation, and of this level.
    #[inline(always)]
    fn find(&self, generation: u64, level: Option<u8>, iova: u64) -> Option<Node<A>> {
        let before = self.sequence.load(Ordering::Acquire);
        let of = self.generation.load(Ordering::Relaxed);
        let span = self.span.load(Ordering::Relaxed);
        let table = self.table.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let after = self.sequence.load(Ordering::Relaxed);
        // One question for all four: most look-ups find what they look for in the first way that they ask.
        let elsewhere = (iova ^ span) >> (span & SPAN_BITS);
        let other = match level {
            Some(level) => of ^ (generation << LEVEL_BITS | u64::from(level)),
            None => (of >> LEVEL_BITS) ^ generation,
        };
        if elsewhere | other | (before ^ after) | (before & 1) != 0 {
            return None;
        }
        let level = level.unwrap_or((of & ((1 << LEVEL_BITS) - 1)) as u8);
        Some(Node { table: NonNull::new(table)?, level })
    }
}

impl<A> Default for SharedWalk<A> {
    fn default() -> SharedWalk<A> {
        SharedWalk::new()
    }
}

impl<A> CachedWalk<A> {
    /// The level of the table that it remembers.
    pub fn level(&self) -> Option<u8> {
        self.node.map(|node| node.level)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Keeps what a walk of this table to `iova` has remembered for all who ask the way.
    pub fn remember(&self, iova: u64, walk: &CachedWalk<A>, way: &SharedWalk<A>) {
        let Some(found) = walk.node else { return };
        // What is linked there now is newer than the generation, and holds as long as that does.
        let root = self.root_over(iova).ok().filter(|root| found.level == 1 && root.level > 1);
        let node = root.and_then(|root| self.descend(root, 2, iova)).unwrap_or(found);
        let bits = self.span_bits(node);
        // The top table of 64 bits spans everything: no shift can say that, and so it is not remembered.
        if bits < 64 {
            let span = (iova >> bits << bits) | u64::from(bits);
            way.store(walk.generation << LEVEL_BITS | u64::from(node.level), span, node.table);
        }
    }

    #[inline(always)]
    fn span_bits(&self, node: Node<A>) -> u32 {
        self.format.shift(node.level) + self.format.index_bits(node.level)
    }

    /// Translates an address by one of the remembered ways, if one of them leads to it, and if its leaf allows what is
    /// `needed`: the output address, and how many bytes follow it without a gap. At least that is the rest of the leaf; if
    /// more are wanted, it is as many of them as are consecutive within what the way spans.
    ///
    /// `level`: only ways to tables of this level are asked. Where it is a constant, so is much of what follows.
    ///
    /// `None` says nothing about the address: that takes a [`walk_cached`](Radix::walk_cached), whose way can be
    /// [kept](Self::remember) then.
    #[inline(always)]
    pub fn translate_remembered(
        &self,
        iova: u64,
        wanted: u64,
        needed: Attributes,
        level: Option<u8>,
        ways: &[SharedWalk<A>],
    ) -> Option<(Oa, u64)> {
        let generation = self.generation.load();
        let node = ways.iter().find_map(|way| way.find(generation, level, iova))?;
        if self.outside(iova) {
            return None;
        }
        // Where nothing is mapped the table may have been retired a moment ago. Only the walk from the root can tell.
        let (oa, size) = self.leaf_in(node, iova, needed)?;
        let within = iova & (size - 1);
        let (oa, mut length) = (oa + within, size - within);
        // What is asked first is known where this is compiled, for a byte.
        if wanted > 1 && length < wanted {
            length = self.consecutive(node, iova, oa, length, wanted, needed);
        }
        Some((Oa::new(oa), length))
    }

    /// How far the leaves behind one lead on where it ends, within what a table spans.
    #[inline(never)]
    fn consecutive(
        &self,
        node: Node<A>,
        iova: u64,
        oa: u64,
        mut length: u64,
        wanted: u64,
        needed: Attributes,
    ) -> u64 {
        while length < wanted {
            let next = iova.checked_add(length).filter(|next| (next ^ iova) >> self.span_bits(node) == 0);
            match next.and_then(|next| self.leaf_in(node, next, needed)) {
                Some((behind, size)) if behind == oa + length => length += size,
                _ => break,
            }
        }
        length
    }

    /// Where the leaf of an address leads, and its size, if it stands in a table or, where that is of the second level, in
    /// one below.
    #[inline(always)]
    fn leaf_in(&self, node: Node<A>, iova: u64, needed: Attributes) -> Option<(u64, u64)> {
        let decoded = if node.level == 2 {
            let value = self.entry(node, self.index(2, iova)).load();
            if self.format.table_pattern(2).matches(value) {
                let below = self.child(node, self.format.table_address(value));
                self.format.decode(1, self.entry(below, self.index(1, iova)).load())
            } else {
                self.format.decode(2, value)
            }
        } else {
            self.format.decode(node.level, self.entry(node, self.index(node.level, iova)).load())
        };
        match decoded {
            Entry::Leaf { oa, size, attributes } if attributes.contains(needed) => Some((oa, size.bytes())),
            _ => None,
        }
    }

    /// Whether a way is of no use any more, or has never been.
    pub fn is_forgotten(&self, way: &SharedWalk<A>) -> bool {
        way.generation.load(Ordering::Relaxed) >> LEVEL_BITS != self.generation.load()
    }
}
