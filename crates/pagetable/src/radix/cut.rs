//! Cutting: a leaf becomes a table of smaller leaves with the same translation.
//!
//! The table is filled before anybody can see it and then published with one compare-exchange against the leaf as
//! it was read. Walkers see the old leaf or the new table, which say the same. If hardware sets a dirty bit in
//! between, or another operation cuts the same leaf, the compare-exchange fails and the loser looks again.
//!
//! A leaf of several entries is not cut: its entries cannot be replaced in one step, and no format of today says that
//! walkers may meet half of it.

use super::map::store_leaves;
use super::{Next, Node, Radix, Slot, Stop, Stretch, Visitor, leaf_span};
use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format, LiveChanges};
use crate::gather::Gather;
use crate::memory::{OutOfTables, TableMemory};

/// Why a leaf was not cut. No translation was changed; a leaf may have been cut less far than it was to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CutError {
    /// The format does not allow it while walkers run: the leaf has to be unmapped whole, invalidated, and mapped
    /// again in parts.
    #[error("the leaf of {size} at {at:#x} must be absent before it can be cut")]
    NeedsBreak {
        /// Where the leaf begins.
        at: u64,
        /// Its size.
        size: PageSize,
    },
    /// Another operation owns the leaf.
    #[error("another operation owns the leaf at {at:#x}")]
    Contended {
        /// An address in the leaf.
        at: u64,
    },
    /// The cut is not on a boundary of the smallest page.
    #[error("{at:#x} is not a boundary between pages")]
    Misaligned {
        /// Where to cut.
        at: u64,
    },
    /// No memory for a table.
    #[error(transparent)]
    OutOfTables(#[from] OutOfTables),
}

/// Cuts whatever leaf has `at` inside, until a leaf begins there.
struct CutAt<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    at: u64,
    software: SoftwareBits,
    gather: &'a mut Gather<M, A>,
}

/// Cuts the leaves that have an address in a range until none is larger than `largest`.
struct CutAll<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    largest: PageSize,
    gather: &'a mut Gather<M, A>,
}

/// Bits of a leaf that the format's own facts do not know.
#[derive(Clone, Copy)]
pub(super) struct SoftwareBits {
    /// A leaf with one of these may not be cut.
    pub(super) busy: u64,
    /// Only the first of the pieces inherits these.
    pub(super) first: u64,
}

impl SoftwareBits {
    /// In exclusive mode there are none.
    pub(super) const NONE: SoftwareBits = SoftwareBits { busy: 0, first: 0 };
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for CutAt<'_, F, M, A> {
    type Error = CutError;

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<CutError>> {
        match slot.decoded {
            Entry::Leaf { size, .. } if leaf_span(self.at, size).0 != self.at => {
                self.radix.cut_leaf(&slot, self.software, self.gather).map_err(Stop::Error)?;
                Ok(Next::Again)
            }
            // Claimed and not present: it may be published any time, and then it has to be cut after all.
            Entry::Absent if slot.value & self.software.busy != 0 => {
                let low = (1 << self.radix.format.shift(slot.node.level)) - 1;
                if self.at & low == 0 {
                    Ok(Next::After(slot.last))
                } else {
                    Err(Stop::Error(CutError::Contended { at: self.at }))
                }
            }
            _ => Ok(Next::After(slot.last)),
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for CutAll<'_, F, M, A> {
    type Error = CutError;

    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<CutError>> {
        // Nothing is smaller than an entry of the lowest level that is a leaf of its own.
        let smallest = stretch.node.level == 1 && self.radix.format.leaf_sizes(1).is_power_of_two();
        Ok(if smallest { stretch.entries.len() } else { 0 })
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<CutError>> {
        match slot.decoded {
            Entry::Leaf { size, .. } if size > self.largest => {
                self.radix.cut_leaf(&slot, SoftwareBits::NONE, self.gather).map_err(Stop::Error)?;
                let (first, last) = leaf_span(slot.first, size);
                if let Some(leaf) = IovaRange::new(first, last) {
                    // Its pieces may be cut in their turn.
                    self.gather.runs.push_covering(leaf);
                    self.gather.leaf_sizes |= size.bytes();
                }
                Ok(Next::Again)
            }
            _ => Ok(Next::After(slot.last)),
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Makes leaves of at most `largest` of every larger one that has an address in the range, as far as the levels below
    /// allow; what reaches over an end is cut as well, no further than the pieces inside need. Changes no translation.
    ///
    /// Exclusive mode, as for [`cut`](Self::cut), of every leaf in the range. `gather` takes the ranges of the leaves that were
    /// cut. After an error those before it stay cut.
    pub fn split(
        &self,
        range: IovaRange,
        largest: PageSize,
        gather: &mut Gather<M, A>,
    ) -> Result<(), CutError> {
        let largest = largest.max(PageSize(self.format.shift(1) as u8));
        let result = self.run(&mut CutAll { radix: self, largest, gather }, range);
        self.clean_ways(range);
        result
    }

    /// Makes `at` a boundary between leaves. Changes no translation.
    ///
    /// Exclusive mode: the caller has the page before `at` or the one behind it to himself. So nobody can be unmapping
    /// the leaf as a whole; but others may be cutting it too.
    ///
    /// `gather` takes the range of the largest leaf that was cut. Until it is invalidated, caches may hold the old leaf,
    /// which says the same.
    pub fn cut(&self, at: u64, gather: &mut Gather<M, A>) -> Result<(), CutError> {
        let before = self.walk(at);
        self.cut_at(at, SoftwareBits::NONE, gather)?;
        if let Some(ends) = IovaRange::new(at.saturating_sub(1), at) {
            self.clean_ways(ends);
        }
        if let Ok(leaf) = before {
            if leaf.iova != at {
                gather.removed(leaf.range(), leaf.size, 1);
            }
        }
        Ok(())
    }

    pub(super) fn cut_at(
        &self,
        at: u64,
        software: SoftwareBits,
        gather: &mut Gather<M, A>,
    ) -> Result<(), CutError> {
        if at & ((1 << self.format.shift(1)) - 1) != 0 {
            return Err(CutError::Misaligned { at });
        }
        let Some(range) = IovaRange::new(at, at) else { return Ok(()) };
        if self.parting(range).is_some_and(|node| node.level == 1)
            && self.format.leaf_sizes(1).is_power_of_two()
        {
            // Every entry down there is a page of its own.
            return Ok(());
        }
        self.run(&mut CutAt { radix: self, at, software, gather }, range)
    }

    /// Makes both ends of `range` boundaries between leaves.
    pub(super) fn cut_ends(
        &self,
        range: IovaRange,
        software: SoftwareBits,
        gather: &mut Gather<M, A>,
    ) -> Result<(), CutError> {
        self.cut_at(range.first(), software, gather)?;
        match range.last().checked_add(1) {
            Some(end) => self.cut_at(end, software, gather),
            None => Ok(()),
        }
    }

    /// Replaces the leaf in `slot` by a table one level down, unless somebody else changes the entry first.
    pub(super) fn cut_leaf(
        &self,
        slot: &Slot<'_, A>,
        software: SoftwareBits,
        gather: &mut Gather<M, A>,
    ) -> Result<(), CutError> {
        let Entry::Leaf { oa, size, attributes } = slot.decoded else { return Ok(()) };
        let level = slot.node.level;
        if slot.value & software.busy != 0 {
            return Err(CutError::Contended { at: slot.first });
        }
        let needs_break = CutError::NeedsBreak { at: leaf_span(slot.first, size).0, size };
        let live = self.format.live_changes().contains(LiveChanges::SIZE);
        if !live || level == 1 || size.log2() != self.format.shift(level) {
            return Err(needs_break);
        }
        let piece = PageSize(self.format.shift(level - 1) as u8);
        if self.format.leaf_sizes(level - 1) & piece.bytes() == 0 {
            return Err(needs_break);
        }
        let child: Node<A> = self.allocate(level - 1)?;
        let entries = self.all_entries(child);
        // What the entry holds beyond the format's own bits goes on with the pieces.
        let kept = slot.value & self.format.software_bits(level) & self.format.software_bits(level - 1);
        let first = self.leaf_like(level - 1, piece, oa, attributes) | kept;
        store_leaves(entries, first, self.format.leaf_step(level - 1));
        if let Some(entry) = entries.first() {
            entry.store(first | (slot.value & software.first));
        }
        let link = self.format.table_entry(level, self.memory.address(child.table));
        self.clean(entries);
        // A table with a leaf in it does not go away; but others would take the link for one that walkers see.
        let tentative = if M::COHERENT { 0 } else { F::TENTATIVE };
        if slot.entry.compare_exchange(slot.value, link | tentative).is_err() {
            // SAFETY: never linked.
            unsafe { self.discard(child) };
            return Ok(());
        }
        self.clean(core::slice::from_ref(slot.entry));
        gather.tables_changed = true;
        if tentative != 0 {
            // It fails if the leaf was one that had to be taken back.
            let _ = slot.entry.compare_exchange(link | tentative, link);
        }
        Ok(())
    }

    /// The entry of a leaf that takes another's place and was used as that was.
    pub(super) fn leaf_like(&self, level: u8, size: PageSize, oa: u64, attributes: Attributes) -> u64 {
        let entry = self.format.leaf_entry(level, size, oa, attributes);
        // Some formats begin with a leaf that is dirty already.
        if attributes.contains(Attributes::DIRTY) { entry } else { entry & !self.format.dirty_bit() }
    }
}
