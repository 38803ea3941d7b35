//! Unmapping in exclusive mode: emptying entries, and cutting leaves that reach over the ends.
//!
//! As with mapping there is a short way for what is most frequent: leaves of one size, neighbours in one table. And
//! there is one shortcut on the long way: a table of pages that the range covers as a whole is not emptied entry by
//! entry, it is unlinked as it is. Nobody else has business in it, because nobody else has a page of it.

use super::cut::SoftwareBits;
use super::{COUNT, CutError, KEPT, Next, Node, Radix, Slot, Stop, Stretch, Visitor, leaf_span};
use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Entry, Format};
use crate::gather::Gather;
use crate::memory::TableMemory;
use core::sync::atomic::Ordering;

/// Why nothing was unmapped: a leaf at an end of the range could not be cut.
pub type UnmapError = CutError;

/// Empties all leaves of a range at whose ends leaves end too.
struct Remove<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    range: IovaRange,
    gather: &'a mut Gather<M, A>,
}

/// Whether all entries are plain leaves of their own size.
#[inline(always)]
pub(super) fn all_plain_leaves<F: Format, A: AtomicEntry>(format: &F, level: u8, entries: &[A]) -> bool {
    let (conjunction, disjunction) = entries.iter().fold((u64::MAX, 0), |(all, any), entry| {
        let value = entry.load();
        (all & value, any | value)
    });
    format.leaf_pattern(level).matches_all(conjunction, disjunction)
}

/// Empties entries that hold leaves. How many, up to the first that changed meanwhile.
#[inline(always)]
fn empty_leaves<A: AtomicEntry>(level: u8, entries: &[A]) -> usize {
    if level == 1 {
        entries.iter().for_each(|entry| entry.store(0));
        return entries.len();
    }
    // Above the lowest level somebody may cut a leaf right now, and the table that came in its place must not be lost.
    let changed = entries.iter().position(|entry| {
        let value = entry.load();
        value == 0 || entry.compare_exchange(value, 0).is_err()
    });
    changed.unwrap_or(entries.len())
}

/// The addresses of neighbouring leaves, from number `began` to before number `end` of those that begin at `first`.
#[inline(always)]
fn leaves_span(first: u64, began: usize, end: usize, size: PageSize) -> Option<IovaRange> {
    let last = first + ((end as u64 - 1) << size.log2()) + (size.bytes() - 1);
    IovaRange::new(first + ((began as u64) << size.log2()), last)
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Remove<'_, F, M, A> {
    /// Shows the runs of leaves among entries of the lowest level, each of its own size, that were just read as
    /// `is_leaf` says. How many leaves.
    fn gather_runs(&mut self, first: u64, size: PageSize, leaves: impl Iterator<Item = bool>) -> u64 {
        let mut count = 0;
        let mut run = None;
        let mut end = 0;
        for is_leaf in leaves {
            if is_leaf {
                count += 1;
                run.get_or_insert(end);
            } else if let Some(began) = run.take() {
                self.removed(first, began, end, size);
            }
            end += 1;
        }
        if let Some(began) = run {
            self.removed(first, began, end, size);
        }
        count
    }

    fn removed(&mut self, first: u64, began: usize, end: usize, size: PageSize) {
        if let Some(range) = leaves_span(first, began, end, size) {
            self.gather.removed(range, size, (end - began) as u64);
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Remove<'_, F, M, A> {
    type Error = CutError;

    /// Empties entries as long as they are absent or leaves of their own size.
    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<CutError>> {
        let Stretch { node, entries, first } = stretch;
        let format = &self.radix.format;
        let size = PageSize(format.shift(node.level) as u8);
        if all_plain_leaves(format, node.level, entries) {
            let done = empty_leaves(node.level, entries);
            if done > 0 {
                self.removed(first, 0, done, size);
                self.radix.subtract_live(node, done as u64);
            }
            return Ok(done);
        }
        let mut done = 0;
        let leaves = entries.iter().map_while(|entry| {
            let value = entry.load();
            let is_leaf = match format.decode(node.level, value) {
                Entry::Leaf { size: found, .. } if found == size => true,
                Entry::Absent => false,
                _ => return None,
            };
            if is_leaf && empty_leaves(node.level, core::slice::from_ref(entry)) == 0 {
                return None;
            }
            done += 1;
            Some(is_leaf)
        });
        let removed = self.gather_runs(first, size, leaves);
        if removed > 0 {
            self.radix.subtract_live(node, removed);
        }
        Ok(done)
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<CutError>> {
        let Entry::Leaf { size, .. } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let (first, last) = leaf_span(slot.first, size);
        if first < self.range.first() || last > self.range.last() {
            // The ends were cut before; this is a caller who does not have the range to himself.
            self.radix.cut_leaf(&slot, SoftwareBits::NONE, self.gather).map_err(Stop::Error)?;
            return Ok(Next::Again);
        }
        let entries = self.radix.leaf_entries(slot.node, slot.first, size);
        if entries.len() == 1 {
            if empty_leaves(slot.node.level, entries) == 0 {
                return Ok(Next::Again);
            }
        } else {
            // Leaves of several entries are never cut.
            entries.iter().for_each(|entry| entry.store(0));
        }
        self.radix.subtract_live(slot.node, entries.len() as u64);
        if let Some(leaf) = IovaRange::new(first, last) {
            self.gather.removed(leaf, size, 1);
        }
        Ok(Next::After(last))
    }

    fn link(&mut self, slot: &Slot<'_, A>, child: Node<A>) -> Option<Next> {
        if child.level != 1 {
            // Further up somebody may cut a leaf right now.
            return None;
        }
        let radix = self.radix;
        let size = PageSize(radix.format.shift(1) as u8);
        let entries = radix.entries(child, 0, 1 << radix.format.index_bits(1));
        let full = all_plain_leaves(&radix.format, 1, entries);
        let plain = |entry: &A| match radix.format.decode(1, entry.load()) {
            Entry::Leaf { size: found, .. } => found == size,
            Entry::Absent => true,
            _ => false,
        };
        if (!full && !entries.iter().all(plain)) || slot.entry.compare_exchange(slot.value, 0).is_err() {
            return None;
        }
        if full {
            self.removed(slot.first, 0, entries.len(), size);
        } else {
            let is_leaf = |entry: &A| radix.format.decode(1, entry.load()) != Entry::Absent;
            self.gather_runs(slot.first, size, entries.iter().map(is_leaf));
        }
        radix.subtract_live(slot.node, 1);
        let word = radix.live(child).load();
        if word & KEPT != 0 {
            radix.kept.fetch_sub(1, Ordering::Relaxed);
        }
        radix.retire(self.gather, child, word & COUNT == 0);
        Some(Next::After(slot.last))
    }

    fn left(&mut self, slot: &Slot<'_, A>, child: Node<A>, whole: bool) -> Result<(), CutError> {
        self.radix.prune(self.gather, slot, child, whole);
        Ok(())
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Unmaps exactly `range`; where nothing is mapped, nothing happens. A leaf that reaches over an end is cut.
    ///
    /// Exclusive mode: nobody else changes the range meanwhile. `gather` says what went: the caller invalidates it
    /// before the memory behind it or the retired tables are used for anything else.
    ///
    /// On an error nothing was unmapped. There is none if both ends have been [cut](Self::cut) before.
    #[inline]
    pub fn unmap(&self, range: IovaRange, gather: &mut Gather<M, A>) -> Result<(), UnmapError> {
        let low = (1 << self.format.shift(1)) - 1;
        if (range.first() | !range.last()) & low != 0 {
            let at = if range.first() & low != 0 { range.first() } else { range.last() };
            return Err(CutError::Misaligned { at });
        }
        if self.unmap_in_one_table(range, gather) { Ok(()) } else { self.unmap_piecewise(range, gather) }
    }

    /// The short way: unmaps leaves that are neighbours in one table and end where the range does. `false`: it is not
    /// like that, and nothing was unmapped.
    #[inline(always)]
    fn unmap_in_one_table(&self, range: IovaRange, gather: &mut Gather<M, A>) -> bool {
        let Some(Stretch { node, entries, .. }) = self.in_one_table(range) else { return false };
        if !all_plain_leaves(&self.format, node.level, entries) {
            return false;
        }
        let done = empty_leaves(node.level, entries);
        if done < entries.len() && done == 0 {
            return false;
        }
        let size = PageSize(self.format.shift(node.level) as u8);
        if let Some(removed) = leaves_span(range.first(), 0, done, size) {
            gather.removed(removed, size, done as u64);
        }
        let live = self.subtract_live(node, done as u64) - done as u64;
        if done < entries.len() {
            // Somebody cut a leaf that was not his to cut. The rest is there still.
            return IovaRange::new(range.first() + ((done as u64) << size.log2()), range.last())
                .is_none_or(|rest| self.unmap_piecewise(rest, gather).is_ok());
        }
        if self.is_idle(live, entries.len() == 1 << self.format.index_bits(node.level)) {
            self.sweep(range, gather);
        }
        true
    }

    /// The long way of [`unmap`](Self::unmap).
    #[inline(never)]
    fn unmap_piecewise(&self, range: IovaRange, gather: &mut Gather<M, A>) -> Result<(), UnmapError> {
        // What reaches over the first end is met, and cut, before anything is removed. The other end has to be seen
        // to in advance.
        if let Some(end) = self.end_inside_leaf(range) {
            self.cut_at(end, SoftwareBits::NONE, gather)?;
        }
        self.run(&mut Remove { radix: self, range, gather }, range)
    }

    /// The address behind the range, if a leaf stands over it.
    #[inline]
    fn end_inside_leaf(&self, range: IovaRange) -> Option<u64> {
        let leaf = self.walk(range.last()).ok()?;
        (leaf.range().last() > range.last()).then(|| range.last() + 1)
    }
}
