//! Remapping: another output for what is mapped, with no moment at which there is none.
//!
//! Leaves that are too large for the new output's alignment are cut first, which changes no translation and is all that
//! needs memory. Then every leaf is replaced by one store. A walker sees the old leaf or the new one; until the
//! invalidation caches hold the old. The same leaves fit the former output too, so that going back needs nothing and
//! cannot fail.
//!
//! A leaf of several entries is not remapped: no store replaces all of them.

use super::cut::SoftwareBits;
use super::map::check_mapping;
use super::{CutError, MapError, Next, Radix, Slot, Stop, Visitor, leaf_span};
use crate::address::{IovaRange, Oa, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format, LiveChanges};
use crate::gather::Gather;
use crate::memory::TableMemory;

/// Why no output was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemapError {
    /// No leaf of the format can hold it.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A leaf at an end of the range, or one that is too large for the new output, could not be cut.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// The format does not allow it while walkers run: the leaf has to be unmapped, invalidated, and mapped again.
    #[error("the leaf of {size} at {at:#x} must be absent before its output can change")]
    NeedsBreak {
        /// Where the leaf begins.
        at: u64,
        /// Its size.
        size: PageSize,
    },
}

struct Remap<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    range: IovaRange,
    oa: u64,
    attributes: Attributes,
    /// First everything is made to fit and nothing changed, then everything is changed.
    change: bool,
    gather: &'a mut Gather<M, A>,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Remap<'_, F, M, A> {
    type Error = RemapError;

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<RemapError>> {
        let Entry::Leaf { oa, size, attributes } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let (radix, level) = (self.radix, slot.node.level);
        let (first, last) = leaf_span(slot.first, size);
        let output = self.oa.wrapping_add(first.wrapping_sub(self.range.first()));
        let fits = output & (size.bytes() - 1) == 0;
        if fits && oa == output {
            let wanted = radix.format.leaf_entry(level, size, output, self.attributes);
            let said = match radix.format.decode(level, wanted) {
                Entry::Leaf { attributes, .. } => attributes,
                _ => self.attributes,
            };
            if (said ^ attributes).difference(Attributes::USED).is_empty() {
                return Ok(Next::After(last));
            }
        }
        let several = size.log2() != radix.format.shift(level);
        if several || !radix.format.live_changes().contains(LiveChanges::OUTPUT) {
            return Err(Stop::Error(RemapError::NeedsBreak { at: first, size }));
        }
        if !fits {
            radix
                .cut_leaf(&slot, SoftwareBits::NONE, self.gather)
                .map_err(|error| Stop::Error(error.into()))?;
            return Ok(Next::Again);
        }
        if self.change {
            let kept = slot.value & radix.format.software_bits(level);
            slot.entry.store(radix.format.leaf_entry(level, size, output, self.attributes) | kept);
            radix.clean(core::slice::from_ref(slot.entry));
            if let Some(leaf) = IovaRange::new(first, last) {
                self.gather.removed(leaf, size, 1);
            }
        }
        Ok(Next::After(last))
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Lets all that is mapped in the range lead to the output addresses from `oa` on, with these attributes; what is
    /// not mapped stays so. A leaf that reaches over an end is cut. Nothing is merged.
    ///
    /// Exclusive mode: nobody else changes the range meanwhile. `gather` says which leaves have changed. What hardware
    /// has marked in them is lost: whoever tracks dirt reads it before. On an error no translation has changed.
    pub fn remap(
        &self,
        range: IovaRange,
        oa: Oa,
        attributes: Attributes,
        gather: &mut Gather<M, A>,
    ) -> Result<(), RemapError> {
        check_mapping(&self.format, range, oa, attributes)?;
        self.cut_ends(range, SoftwareBits::NONE, gather)?;
        let oa = oa.get();
        for change in [false, true] {
            self.run(&mut Remap { radix: self, range, oa, attributes, change, gather }, range)?;
        }
        self.clean_ways(range);
        Ok(())
    }
}
