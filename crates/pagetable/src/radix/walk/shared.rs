//! A remembered way that several threads use at the same time.
//!
//! A [`CachedWalk`] has one owner. An IOTLB is asked by every thread of its device, and a lock around each entry would
//! cost more than the walk that it saves. So an entry is a *sequence lock*: who writes makes the number odd, writes,
//! and makes it even again; who reads looks at the number before and after, and takes what is in between for nothing
//! if the two differ or are odd. Readers write nothing, so that they do not take the line from each other, and nobody
//! waits: a writer that meets another one leaves the entry to it.

use super::{CachedWalk, Leaf, Node, Radix};
use crate::atomic::AtomicEntry;
use crate::format::{Entry, Format};
use crate::memory::TableMemory;
use core::ptr::NonNull;

#[cfg(not(loom))]
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence};
#[cfg(loom)]
use loom::sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence};

/// The bits of a tag that hold the level; the table's span is larger.
const LEVEL: u64 = 7;

/// A remembered way to one leaf table, for any number of threads.
///
/// Like a [`CachedWalk`] it holds no translation, may have served other tables before, and needs not be told of an
/// unmap.
#[derive(Debug)]
pub struct SharedWalk<A> {
    /// Odd: being written.
    sequence: AtomicU64,
    generation: AtomicU64,
    tag: AtomicU64,
    table: AtomicPtr<A>,
}

impl<A> SharedWalk<A> {
    /// Nothing remembered yet.
    #[cfg(not(loom))]
    pub const fn new() -> SharedWalk<A> {
        SharedWalk {
            sequence: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            tag: AtomicU64::new(0),
            table: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    /// Nothing remembered yet.
    #[cfg(loom)]
    pub fn new() -> SharedWalk<A> {
        SharedWalk {
            sequence: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            tag: AtomicU64::new(0),
            table: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    /// Takes over what the walk has remembered. Without effect while another thread is doing the same.
    pub fn store(&self, walk: &CachedWalk<A>) {
        let Some(node) = walk.node else { return };
        let sequence = self.sequence.load(Ordering::Relaxed);
        let even = sequence & !1;
        if self
            .sequence
            .compare_exchange(even, even.wrapping_add(1), Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            return;
        }
        // Whoever reads one of these values also sees that the number is odd, or another one.
        fence(Ordering::Release);
        self.generation.store(walk.generation, Ordering::Relaxed);
        self.tag.store(walk.tag, Ordering::Relaxed);
        self.table.store(node.table.as_ptr(), Ordering::Relaxed);
        self.sequence.store(even.wrapping_add(2), Ordering::Release);
    }

    /// The table, if it is the one of this generation with this tag.
    #[inline(always)]
    fn table(&self, generation: u64, tag: u64) -> Option<NonNull<A>> {
        let before = self.sequence.load(Ordering::Acquire);
        let remembered = (
            self.generation.load(Ordering::Relaxed),
            self.tag.load(Ordering::Relaxed),
            self.table.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        let after = self.sequence.load(Ordering::Relaxed);
        let whole = before == after && before & 1 == 0;
        if whole && remembered.0 == generation && remembered.1 == tag {
            NonNull::new(remembered.2)
        } else {
            None
        }
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
    /// Translates an address by one of the remembered ways, if one of them leads to it. `None` says nothing about the
    /// address: that takes a [`walk_cached`](Radix::walk_cached), whose way can be [stored](SharedWalk::store) then.
    #[inline(always)]
    pub fn walk_remembered(&self, iova: u64, ways: &[SharedWalk<A>]) -> Option<Leaf> {
        let generation = self.generation.load();
        for way in ways {
            // Only a hint that says which tag to ask for.
            let level = (way.tag.load(Ordering::Relaxed) & LEVEL) as u8;
            if level == 0 || level > *self.format.top_levels().end() {
                continue;
            }
            let Some(table) = way.table(generation, self.tag(level, iova)) else { continue };
            if self.outside(iova) {
                return None;
            }
            let node = Node { table, level };
            let value = self.entry(node, self.index(level, iova)).load();
            // Where nothing is mapped the table may have been retired a moment ago. Only the walk from the root can tell.
            let Entry::Leaf { oa, size, attributes } = self.format.decode(level, value) else { return None };
            return Some(super::leaf(iova, oa, size, attributes));
        }
        None
    }
}
