//! Merging: a table full of leaves that continue each other becomes one leaf.
//!
//! This is the way back from a cut. It never happens by itself, because whoever plugs and unplugs blocks of memory
//! would pay for it again and again; it happens where a caller asks for it. From the lowest level upwards every table
//! that lies in the range as a whole is looked at, so that 512 times 512 pages become one gigabyte in one call.
//!
//! Walkers see the table or the leaf, which say the same. What hardware writes into the old entries after they have
//! been read is lost, so where hardware marks leaves, a merged one that can be written counts as dirty.

use super::{CutError, Next, Node, Radix, Slot, Stop, Stretch, Visitor};
use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, ClaimFormat, Entry, Format, LiveChanges};
use crate::gather::Gather;
use crate::memory::TableMemory;

/// Merges tables on the way back up.
struct Merge<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    /// Claiming mode.
    claim: Option<ClaimBits>,
    merged: u64,
    gather: &'a mut Gather<M, A>,
}

/// The software bits of a format in which operations own entries.
#[derive(Clone, Copy)]
struct ClaimBits {
    busy: u64,
    first: u64,
    /// Mappings that continue each other become one.
    join: bool,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Merge<'_, F, M, A> {
    /// Owns all leaves of a table, or none.
    fn hold_all(&self, child: Node<A>, bits: ClaimBits) -> bool {
        let entries = self.radix.all_entries(child);
        let contended = entries.iter().position(|entry| {
            let value = entry.load();
            let leaf = matches!(self.radix.format.decode(child.level, value), Entry::Leaf { .. });
            !leaf || value & bits.busy != 0 || entry.compare_exchange(value, value | bits.busy).is_err()
        });
        if let Some(count) = contended {
            self.let_go(entries.split_at(count).0, bits);
        }
        contended.is_none()
    }

    fn let_go(&self, entries: &[A], bits: ClaimBits) {
        // They are ours, so a store is enough.
        entries.iter().for_each(|entry| entry.store(entry.load() & !bits.busy));
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Merge<'_, F, M, A> {
    type Error = CutError;

    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<CutError>> {
        // There is nothing below the lowest level.
        Ok(if stretch.node.level == 1 { stretch.entries.len() } else { 0 })
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<CutError>> {
        Ok(Next::After(slot.last))
    }

    fn left(&mut self, slot: &Slot<'_, A>, child: Node<A>, whole: bool) -> Result<(), CutError> {
        let radix = self.radix;
        let tentative = slot.value & F::TENTATIVE != 0;
        if !whole || tentative || radix.merged_leaf(slot, child, self.claim).is_none() {
            return Ok(());
        }
        let piece = PageSize(radix.format.shift(child.level) as u8);
        if !radix.format.live_changes().contains(LiveChanges::SIZE) {
            return Err(CutError::NeedsBreak { at: slot.first, size: piece });
        }
        if self.claim.is_some_and(|bits| !self.hold_all(child, bits)) {
            return Ok(());
        }
        // Now that nobody else can change the leaves: once more.
        // The leaf stays ours until no remembered way leads to the table any more: there the old leaves stand, and
        // whoever took the new one away would have them translate still.
        let busy = self.claim.map_or(0, |bits| bits.busy);
        let leaf = radix.merged_leaf(slot, child, self.claim);
        let installed = leaf.filter(|leaf| slot.entry.compare_exchange(slot.value, leaf | busy).is_ok());
        let Some(leaf) = installed else {
            if let Some(bits) = self.claim {
                self.let_go(radix.all_entries(child), bits);
            }
            return Ok(());
        };
        radix.clean(core::slice::from_ref(slot.entry));
        self.merged += 1;
        if let Some(range) = IovaRange::new(slot.first, slot.last) {
            // Tables may have been merged in this range a moment ago, which was then one of those merged now.
            self.gather.runs.push_covering(range);
            self.gather.leaves += radix.all_entries(child).len() as u64;
            self.gather.leaf_sizes |= piece.bytes();
        }
        radix.retire_with_contents(self.gather, child);
        if self.claim.is_some() {
            slot.entry.store(leaf);
        }
        Ok(())
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Makes large leaves of small ones where, within the range, a table is full of leaves that continue each other
    /// and allow the same. How many tables went. No translation changes.
    ///
    /// Exclusive mode: nobody else changes the range meanwhile. `gather` takes the ranges of the new leaves and the
    /// tables, which hold what they held and may be in use by walkers until the invalidation.
    ///
    /// [`CutError::NeedsBreak`]: a table of entries of that size could be merged there, but the format does not allow it
    /// while walkers run; unmap, invalidate, and map again.
    pub fn merge(&self, range: IovaRange, gather: &mut Gather<M, A>) -> Result<u64, CutError> {
        let mut merge = Merge { radix: self, claim: None, merged: 0, gather };
        self.run(&mut merge, range)?;
        let merged = merge.merged;
        self.clean_ways(range);
        Ok(merged)
    }

    /// The entry of the leaf that could stand in `slot` in place of the table `child`.
    fn merged_leaf(&self, slot: &Slot<'_, A>, child: Node<A>, claim: Option<ClaimBits>) -> Option<u64> {
        let (format, level) = (&self.format, slot.node.level);
        let size = PageSize(format.shift(level) as u8);
        if format.leaf_sizes(level) & size.bytes() == 0 {
            return None;
        }
        let shift = format.shift(child.level);
        let mut entries = self.all_entries(child).iter().map(A::load);
        let head = entries.next()?;
        let Entry::Leaf { oa, attributes, .. } = format.decode(child.level, head) else { return None };
        if oa & (size.bytes() - 1) != 0 {
            return None;
        }
        let kept = head & format.software_bits(child.level);
        let mut used = attributes & Attributes::USED;
        let mut index = 0u64;
        let continues = entries.all(|value| {
            index += 1;
            let Entry::Leaf { oa: found, size, attributes: like } = format.decode(child.level, value) else {
                return false;
            };
            used |= like & Attributes::USED;
            let within = (index << shift) & (size.bytes() - 1);
            found + within == oa + (index << shift)
                && (like ^ attributes).difference(Attributes::USED).is_empty()
                && value & format.software_bits(child.level) == kept
                // A mapping that begins inside stays a mapping of its own.
                && claim.is_none_or(|bits| bits.join || value & bits.first == 0)
        });
        if !continues {
            return None;
        }
        if format.hardware_marks() && attributes.contains(Attributes::WRITE) {
            used = Attributes::USED;
        }
        let leaf = self.leaf_like(level, size, oa, attributes | used) | (kept & format.software_bits(level));
        Some(leaf | claim.map_or(0, |bits| head & bits.first))
    }
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// The same beside other operations, in claiming mode: leaves that somebody else owns are left as they are, and so
    /// are mappings, of which one begins where another ends. How many tables went.
    pub fn merge_claimed(&self, range: IovaRange, gather: &mut Gather<M, A>) -> u64 {
        self.merge_as(range, false, gather)
    }

    /// The same, but mappings that continue each other and allow the same become one on the way: nobody can tell any more
    /// where the second began.
    pub fn merge_joining(&self, range: IovaRange, gather: &mut Gather<M, A>) -> u64 {
        self.merge_as(range, true, gather)
    }

    fn merge_as(&self, range: IovaRange, join: bool, gather: &mut Gather<M, A>) -> u64 {
        let claim = Some(ClaimBits { busy: F::BUSY, first: F::FIRST, join });
        let mut merge = Merge { radix: self, claim, merged: 0, gather };
        // Of the native kind all may be merged.
        let _ = self.run(&mut merge, range);
        merge.merged
    }
}
