//! Unmapping in exclusive mode: emptying entries, and cutting leaves that reach over the ends.
//!
//! As with mapping there is a short way for what is most frequent: leaves of one size, neighbours in one table. And
//! there is a shortcut on the long way: a table that the range covers as a whole is not emptied entry by entry, it is
//! unlinked with all that is in it. Nobody else has business there, because nobody else has a page of it.
//!
//! For the same reason leaves are removed by plain stores. Somebody else may cut a leaf only if he has a part of it,
//! and then it does not lie in our range as a whole.

use super::cut::SoftwareBits;
use super::retire::Filling;
use super::{CutError, Next, Node, Radix, Slot, Stop, Stretch, Visitor, leaf_span, leaves_span};
use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Entry, Format};
use crate::gather::Gather;
use crate::memory::TableMemory;

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

/// Empties entries.
#[inline(always)]
fn empty<A: AtomicEntry>(entries: &[A]) {
    entries.iter().for_each(|entry| entry.store(0));
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Remove<'_, F, M, A> {
    /// Writes down the runs of leaves among neighbouring entries, of which `leaves` says which hold one.
    fn gather_runs(&mut self, first: u64, size: PageSize, leaves: impl Iterator<Item = bool>) {
        let mut run = None;
        let mut end = 0;
        for is_leaf in leaves {
            if is_leaf {
                run.get_or_insert(end);
            } else if let Some(began) = run.take() {
                self.removed(first, began, end, size);
            }
            end += 1;
        }
        if let Some(began) = run {
            self.removed(first, began, end, size);
        }
    }

    /// Writes down all leaves in and below a table that begins at `first` and that nobody else can change any more.
    fn gather_leaves(&mut self, node: Node<A>, first: u64) {
        let format = &self.radix.format;
        let entries = self.radix.all_entries(node);
        let size = PageSize(format.shift(node.level) as u8);
        if all_plain_leaves(format, node.level, entries) {
            return self.removed(first, 0, entries.len(), size);
        }
        let mut index = 0;
        while let Some(entry) = entries.get(index) {
            let at = first + ((index as u64) << size.log2());
            index += match format.decode(node.level, entry.load()) {
                Entry::Leaf { size: found, .. } => {
                    let (first, last) = leaf_span(at, found);
                    if let Some(leaf) = IovaRange::new(first, last) {
                        self.gather.removed(leaf, found, 1);
                    }
                    ((found.bytes() >> size.log2()) as usize).max(1)
                }
                Entry::Table(address) if node.level > 1 => {
                    self.gather_leaves(self.radix.child(node, address), at);
                    1
                }
                _ => 1,
            };
        }
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
            empty(entries);
            self.radix.clean(entries);
            self.removed(first, 0, entries.len(), size);
            return Ok(entries.len());
        }
        let mut done = 0;
        let leaves = entries.iter().map_while(|entry| {
            let value = entry.load();
            let is_leaf = match format.decode(node.level, value) {
                Entry::Leaf { size: found, .. } if found == size => true,
                Entry::Absent => false,
                _ => return None,
            };
            if is_leaf {
                entry.store(0);
            }
            done += 1;
            Some(is_leaf)
        });
        self.gather_runs(first, size, leaves);
        self.radix.clean(entries.split_at(done).0);
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
        empty(entries);
        self.radix.clean(entries);
        if let Some(leaf) = IovaRange::new(first, last) {
            self.gather.removed(leaf, size, 1);
        }
        Ok(Next::After(last))
    }

    fn link(&mut self, slot: &Slot<'_, A>, child: Node<A>) -> Option<Next> {
        if slot.value & F::TENTATIVE != 0 {
            return None;
        }
        slot.entry.compare_exchange(slot.value, 0).ok()?;
        self.radix.clean(core::slice::from_ref(slot.entry));
        self.gather_leaves(child, slot.first);
        self.radix.retire_with_contents(self.gather, child);
        Some(Next::After(slot.last))
    }

    fn left(&mut self, slot: &Slot<'_, A>, child: Node<A>, whole: bool) -> Result<(), CutError> {
        let filling = if whole { Filling::Nobody } else { Filling::Store };
        self.radix.prune(self.gather, slot, child, whole, filling);
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
        let unmapped = self.unmap_in_one_table(range, gather);
        let result = if unmapped { Ok(()) } else { self.unmap_piecewise(range, gather) };
        self.clean_ways(range);
        result
    }

    /// The short way: unmaps leaves that are neighbours in one table and end where the range does. `false`: it is not
    /// like that, and nothing was unmapped.
    #[inline(always)]
    fn unmap_in_one_table(&self, range: IovaRange, gather: &mut Gather<M, A>) -> bool {
        // One of the smallest pages, most of all.
        if range.last() - range.first() == (1 << self.format.shift(1)) - 1 {
            let Some(root) = self.root_over_range(range) else { return false };
            let Some(node) = self.descend(root, 1, range.first()) else { return false };
            return self.unmap_leaf(node, range, gather);
        }
        let Some(node) = self.parting(range) else { return false };
        let size = PageSize(self.format.shift(node.level) as u8);
        let low = size.bytes() - 1;
        if (range.first() | !range.last()) & low != 0 {
            return false;
        }
        if range.last() - range.first() == low {
            return self.unmap_leaf(node, range, gather);
        }
        let index = self.index(node.level, range.first());
        let count = self.index(node.level, range.last()) - index + 1;
        let entries = self.entries(node, index, count);
        // A table that is emptied as a whole goes: that is for the long way.
        let whole = count == 1 << self.format.index_bits(node.level);
        if whole || !all_plain_leaves(&self.format, node.level, entries) {
            return false;
        }
        empty(entries);
        self.clean(entries);
        gather.removed(range, size, count as u64);
        if self.is_idle(node, index, count) {
            self.sweep(range, gather, Filling::Store);
        }
        true
    }

    /// Unmaps a range that is one entry of `node`, if it is a leaf.
    #[inline(always)]
    fn unmap_leaf(&self, node: Node<A>, range: IovaRange, gather: &mut Gather<M, A>) -> bool {
        let index = self.index(node.level, range.first());
        let entry = self.entry(node, index);
        if !self.format.leaf_pattern(node.level).matches(entry.load()) {
            return false;
        }
        entry.store(0);
        self.clean(core::slice::from_ref(entry));
        gather.removed(range, PageSize(self.format.shift(node.level) as u8), 1);
        if self.is_idle(node, index, 1) {
            self.sweep(range, gather, Filling::Store);
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
