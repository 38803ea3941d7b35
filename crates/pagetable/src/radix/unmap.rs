//! Unmapping in exclusive mode: emptying entries, and cutting leaves that reach over the ends.

use super::cut::SoftwareBits;
use super::{CutError, Next, Radix, Slot, Stop, Visitor, leaf_span};
use crate::address::IovaRange;
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

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Remove<'_, F, M, A> {
    type Error = CutError;

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
            self.gather.removed(leaf, size);
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
        self.cut_ends(range, SoftwareBits::NONE)?;
        self.run(&mut Remove { radix: self, range, gather }, range)
    }
}
