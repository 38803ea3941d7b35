//! Protecting: other permissions for what is mapped.
//!
//! Leaves keep their place, their output and their memory type; each changes with one compare-exchange, because
//! hardware may set a bit in it at any moment. A walker sees the old permissions or the new, per leaf; the caller
//! invalidates what the gather names before it relies on the new ones, whichever way they went: hardware may fault on
//! a narrower translation that it remembers.

use super::cut::SoftwareBits;
use super::{CutError, Next, Radix, Slot, Stop, Visitor, leaf_span};
use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format, LiveChanges};
use crate::gather::Gather;
use crate::memory::TableMemory;

/// Why no permission was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtectError {
    /// A leaf at an end of the range could not be cut, or an end is not a page's.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// The format does not allow it while walkers run: the leaf has to be unmapped, invalidated, and mapped again.
    #[error("the leaf of {size} at {at:#x} must be absent before its permissions can change")]
    NeedsBreak {
        /// Where the leaf begins.
        at: u64,
        /// Its size.
        size: PageSize,
    },
    /// Neither reading nor writing would be allowed. Formats without a present bit have no such leaf.
    #[error("permissions for {range} that allow neither reads nor writes")]
    NoAccess {
        /// The range asked for.
        range: IovaRange,
    },
}

struct Protect<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    permissions: Attributes,
    gather: &'a mut Gather<M, A>,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Protect<'_, F, M, A> {
    /// What the entry becomes.
    fn protected(&self, level: u8, value: u64) -> Option<u64> {
        let format = &self.radix.format;
        let Entry::Leaf { oa, size, attributes } = format.decode(level, value) else { return None };
        let wanted = attributes.difference(Attributes::PERMISSIONS) | self.permissions;
        // What could not be written begins as a new leaf would, dirty where the format has it so.
        let leaf = if wanted.contains(Attributes::WRITE) && !attributes.contains(Attributes::WRITE) {
            format.leaf_entry(level, size, oa, wanted)
        } else {
            self.radix.leaf_like(level, size, oa, wanted)
        };
        Some(leaf | (value & format.software_bits(level)))
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Protect<'_, F, M, A> {
    type Error = ProtectError;

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<ProtectError>> {
        let Entry::Leaf { size, .. } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let level = slot.node.level;
        let (first, last) = leaf_span(slot.first, size);
        if self.protected(level, slot.value) == Some(slot.value) {
            return Ok(Next::After(last));
        }
        if !self.radix.format.live_changes().contains(LiveChanges::PERMISSIONS) {
            return Err(Stop::Error(ProtectError::NeedsBreak { at: first, size }));
        }
        for entry in self.radix.leaf_entries(slot.node, slot.first, size) {
            let mut value = entry.load();
            while let Some(protected) = self.protected(level, value) {
                match entry.compare_exchange(value, protected) {
                    Ok(()) => break,
                    Err(marked) => value = marked,
                }
            }
        }
        self.radix.clean(self.radix.leaf_entries(slot.node, slot.first, size));
        if let Some(leaf) = IovaRange::new(first, last) {
            self.gather.removed(leaf, size, 1);
        }
        Ok(Next::After(last))
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Gives everything that is mapped in the range these [permissions](Attributes::PERMISSIONS); other attributes play
    /// no part. A leaf that reaches over an end is cut.
    ///
    /// Exclusive mode: nobody else changes the range meanwhile. `gather` says which leaves have changed. On an error no
    /// permission has.
    pub fn protect(
        &self,
        range: IovaRange,
        permissions: Attributes,
        gather: &mut Gather<M, A>,
    ) -> Result<(), ProtectError> {
        if !permissions.intersects(Attributes::READ | Attributes::WRITE) {
            return Err(ProtectError::NoAccess { range });
        }
        if range.last() & ((1 << self.format.shift(1)) - 1) != (1 << self.format.shift(1)) - 1 {
            return Err(CutError::Misaligned { at: range.last() }.into());
        }
        self.cut_ends(range, SoftwareBits::NONE, gather)?;
        let permissions = permissions & Attributes::PERMISSIONS;
        let result = self.run(&mut Protect { radix: self, permissions, gather }, range);
        self.clean_ways(range);
        result
    }
}
