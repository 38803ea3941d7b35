//! Unmapping in exclusive mode: emptying entries, and cutting leaves that reach over the ends.

use super::cut::SoftwareBits;
use super::{CutError, Next, Radix, Slot, Stop, Stretch, Visitor, leaf_span};
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

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Remove<'_, F, M, A> {
    /// Writes down the leaves from number `began` to before number `end` of a stretch that begins at `first`.
    fn removed(&mut self, first: u64, began: u64, end: u64, size: PageSize) {
        let last = first + ((end - 1) << size.log2()) + (size.bytes() - 1);
        if let Some(range) = IovaRange::new(first + (began << size.log2()), last) {
            self.gather.removed(range, size, end - began);
        }
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Remove<'_, F, M, A> {
    type Error = CutError;

    /// Empties entries as long as they are absent or leaves of their own size.
    #[inline]
    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<CutError>> {
        let Stretch { node, entries, first } = stretch;
        let format = &self.radix.format;
        let size = PageSize(format.shift(node.level) as u8);
        let mut removed = 0u64;
        // Where the leaves began that have been removed without a hole.
        let mut run = None;
        let mut done = 0;
        for entry in entries {
            let value = entry.load();
            match format.decode(node.level, value) {
                Entry::Leaf { size: found, .. } if found == size => {
                    // Above the lowest level somebody may cut it right now, and the table that came in its place
                    // must not be lost.
                    if node.level == 1 {
                        entry.store(0);
                    } else if entry.compare_exchange(value, 0).is_err() {
                        break;
                    }
                    removed += 1;
                    run.get_or_insert(done);
                }
                Entry::Absent => {
                    if let Some(began) = run.take() {
                        self.removed(first, began, done, size);
                    }
                }
                _ => break,
            }
            done += 1;
        }
        if let Some(began) = run {
            self.removed(first, began, done, size);
        }
        if removed > 0 {
            self.radix.subtract_live(node, removed);
        }
        Ok(done as usize)
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<CutError>> {
        let Entry::Leaf { size, .. } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let (first, last) = leaf_span(slot.first, size);
        if first < self.range.first() || last > self.range.last() {
            // The ends were cut before; this is a caller who does not have the range to himself.
            self.radix.cut_leaf(&slot, SoftwareBits::NONE).map_err(Stop::Error)?;
            return Ok(Next::Again);
        }
        let index = self.radix.index(slot.node.level, first);
        let count = size.bytes() >> self.radix.format.shift(slot.node.level);
        if count == 1 && slot.node.level > 1 {
            // Somebody may cut it right now, and the table that came in its place must not be lost.
            if slot.entry.compare_exchange(slot.value, 0).is_err() {
                return Ok(Next::Again);
            }
        } else {
            for replica in 0..count as usize {
                self.radix.entry(slot.node, index + replica).store(0);
            }
        }
        self.radix.subtract_live(slot.node, count);
        if let Some(leaf) = IovaRange::new(first, last) {
            self.gather.removed(leaf, size, 1);
        }
        Ok(Next::After(last))
    }

    fn prunes(&self) -> bool {
        true
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
    pub fn unmap(&self, range: IovaRange, gather: &mut Gather<M, A>) -> Result<(), UnmapError> {
        let low = (1 << self.format.shift(1)) - 1;
        if range.first() & low != 0 || range.last() & low != low {
            let at = if range.first() & low != 0 { range.first() } else { range.last() };
            return Err(CutError::Misaligned { at });
        }
        let mut remove = Remove { radix: self, range, gather };
        let mut first = range.first();
        // Small pages of one size end wherever the range does.
        if self.format.leaf_sizes(1).is_power_of_two() {
            match self.run_small(&mut remove, range)? {
                Some(at) => first = at,
                None => return Ok(()),
            }
        }
        // What reaches over the first end is met, and cut, before anything is removed. The other end has to be seen
        // to in advance.
        if let Some(end) = self.end_inside_leaf(range) {
            self.cut_at(end, SoftwareBits::NONE)?;
        }
        self.run_from(&mut remove, first, range)
    }

    /// The address behind the range, if a leaf stands over it.
    #[inline]
    fn end_inside_leaf(&self, range: IovaRange) -> Option<u64> {
        let leaf = self.walk(range.last()).ok()?;
        (leaf.range().last() > range.last()).then(|| range.last() + 1)
    }
}
