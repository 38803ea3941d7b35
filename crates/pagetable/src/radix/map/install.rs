//! The long way of a mapping: a visitor that fills whatever entries the range has, with the best leaf for each place.
//!
//! It serves both modes. A claiming operation takes each entry with a compare-exchange from 0 and leaves the leaf busy
//! and not yet present; an exclusive one stores the finished leaf. Where a smaller table stands in the place of a large
//! leaf but is empty, it is retired and the leaf put in its place, so that a range which was once in small pages can be
//! mapped with large ones again.

use super::{ClaimBits, MapError, Mapping, claim_leaves, store_leaves};
use crate::address::{IovaRange, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format};
use crate::gather::{Gather, Runs};
use crate::memory::{OutOfTables, TableMemory};
use crate::radix::retire::{Filling, Sweep, all_absent};
use crate::radix::{Next, Node, Radix, Slot, Stop, Stretch, Visitor, leaf_span, leaves_span};

/// What a claiming mapper may meet besides.
pub(in crate::radix) enum InstallError {
    Map(MapError),
    /// Another operation owns the entry.
    Contended(u64),
}

impl From<MapError> for InstallError {
    fn from(error: MapError) -> InstallError {
        InstallError::Map(error)
    }
}

/// Fills the entries of a mapping.
pub(in crate::radix) struct Install<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    pub(in crate::radix) radix: &'a Radix<F, M, A>,
    pub(in crate::radix) mapping: Mapping,
    /// Claiming mode: added to the first leaf, to the others, and removed from both until they are published.
    pub(in crate::radix) claim: Option<ClaimBits>,
    /// A leaf with the same translation is what we came for, not something in the way.
    pub(in crate::radix) accept_equal: bool,
    /// The leaves installed so far. An operation that fails takes back these and no others.
    pub(in crate::radix) installed: Runs,
    /// Where the operation is.
    pub(in crate::radix) at: u64,
    /// Takes the empty tables that made room for large leaves.
    pub(in crate::radix) gather: &'a mut Gather<M, A>,
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Install<'_, F, M, A> {
    fn leaf(&self, level: u8, size: PageSize, iova: u64) -> u64 {
        let leaf =
            self.radix.format.leaf_entry(level, size, self.mapping.output(iova), self.mapping.attributes);
        match self.claim {
            Some(bits) if iova == self.mapping.range.first() => {
                (leaf & !bits.present) | bits.busy | bits.first
            }
            Some(bits) => (leaf & !bits.present) | bits.busy,
            None => leaf,
        }
    }

    /// Writes the leaf into its entries. `None`: lost a race.
    fn install(&self, slot: &Slot<'_, A>, size: PageSize, entries: &[A]) -> Option<()> {
        let leaf = self.leaf(slot.node.level, size, slot.first);
        if self.claim.is_some() {
            return slot.entry.compare_exchange(slot.value, leaf).ok();
        }
        entries.iter().for_each(|entry| entry.store(leaf));
        self.radix.clean(entries);
        Some(())
    }

    /// Empties entries of a dead table again that were filled a moment ago.
    fn take_back(&mut self, node: Node<A>, first: u64, entries: &[A]) {
        let size = PageSize(self.radix.format.shift(node.level) as u8);
        self.radix.take_back(node, entries, self.gather);
        // They will be mapped again; if not, this is how the caller gets to know that they have been visible.
        let last = first + ((entries.len() as u64 - 1) << size.log2()) + (size.bytes() - 1);
        if let (Some(range), None) = (IovaRange::new(first, last), self.claim) {
            self.gather.removed(range, size, entries.len() as u64);
        }
    }

    /// Whether a leaf that was found allows what one of this operation would: what the format cannot express does
    /// not count, and neither does what hardware adds.
    fn is_as_asked(&self, level: u8, size: PageSize, found: Attributes) -> bool {
        let format = &self.radix.format;
        let used = Attributes::ACCESSED | Attributes::DIRTY;
        match format.decode(level, format.leaf_entry(level, size, 0, self.mapping.attributes)) {
            Entry::Leaf { attributes, .. } => (attributes ^ found).difference(used).is_empty(),
            _ => false,
        }
    }

    /// The largest leaf that can begin in an absent entry: one of several entries only where all of them are free.
    fn size_that_fits(&mut self, slot: &Slot<'_, A>) -> Option<PageSize> {
        let mut sizes = self.radix.format.leaf_sizes(slot.node.level);
        loop {
            let size = self.mapping.best_size(sizes, slot.first)?;
            if size.log2() <= self.radix.format.shift(slot.node.level) || self.is_free(slot, size) {
                return Some(size);
            }
            sizes &= size.bytes() - 1;
        }
    }

    /// Whether nothing is in the entries of a leaf to be. Tables that hold nothing go, if that makes all of them free.
    fn is_free(&mut self, slot: &Slot<'_, A>, size: PageSize) -> bool {
        let (radix, node) = (self.radix, slot.node);
        let entries = radix.leaf_entries(node, slot.first, size);
        // First a look, so that a table which has to be made again is not taken away.
        let is_unused = |entry: &A| match (entry.load(), radix.format.decode(node.level, entry.load())) {
            (0, _) => true,
            (value, Entry::Table(address)) => {
                value & F::TENTATIVE == 0 && node.level > 1 && radix.is_unused(radix.child(node, address))
            }
            _ => false,
        };
        if !entries.iter().all(is_unused) {
            return false;
        }
        let entry_size = 1u64 << radix.format.shift(node.level);
        let mut first = slot.first;
        for entry in entries {
            let (value, last) = (entry.load(), first + (entry_size - 1));
            let decoded = radix.format.decode(node.level, value);
            if let Entry::Table(address) = decoded {
                let child = radix.child(node, address);
                if value & F::TENTATIVE != 0 || !self.bury_unused(child, first, last) {
                    return false;
                }
                radix.unlink(self.gather, &Slot { node, entry, value, decoded, first, last }, child);
            }
            first = last.wrapping_add(1);
        }
        true
    }

    /// Declares a table dead that the mapping covers as a whole, together with all that it leads to. `false`: it is in
    /// use.
    fn bury_unused(&mut self, child: Node<A>, first: u64, last: u64) -> bool {
        let radix = self.radix;
        // Nobody else has business below an entry that an exclusive mapping covers as a whole.
        let filling = if self.claim.is_some() { Filling::Exchange } else { Filling::Nobody };
        if !all_absent(radix.all_entries(child)) {
            // All that it leads to may be empty too.
            let mut sweep = Sweep { radix, gather: &mut *self.gather, filling, until_used: true };
            let _ = radix.visit(&mut sweep, child, first, last);
        }
        radix.bury(child, filling)
    }

    /// Puts a table into an absent entry. If all leaves of the mapping that go through it stand in it, they are there
    /// before anybody can see it, and need not be installed one by one.
    fn link_table(&mut self, slot: &Slot<'_, A>) -> Result<Next, Stop<OutOfTables>> {
        let radix = self.radix;
        let part = IovaRange::new(slot.first, slot.last).map(|range| self.mapping.part(range));
        let level = slot.node.level - 1;
        let Some(part) = part.filter(|part| radix.leaf_level(level + 1, part) == Some(level)) else {
            return radix.link_table(slot, self.gather).map(|()| Next::Again);
        };
        let begins = slot.first == self.mapping.range.first();
        let claim = self.claim.map(|bits| if begins { bits } else { ClaimBits { first: 0, ..bits } });
        Ok(if radix.link_filled_table(slot, &part, claim, self.gather)? {
            self.installed.push(part.range);
            Next::After(slot.last)
        } else {
            Next::Again
        })
    }

    /// Writes down what was installed.
    fn installed_leaf(&mut self, first: u64, size: PageSize) -> Next {
        let (first, last) = leaf_span(first, size);
        if let Some(leaf) = IovaRange::new(first, last) {
            self.installed.push(leaf);
        }
        Next::After(last)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Install<'_, F, M, A> {
    type Error = InstallError;

    /// Fills entries with leaves of their own size as long as they are absent.
    #[inline]
    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<InstallError>> {
        let Stretch { node, entries, first } = stretch;
        let radix = self.radix;
        let size = PageSize(radix.format.shift(node.level) as u8);
        let output = self.mapping.output(first);
        // Where larger leaves could be meant, entries are looked at one by one.
        if radix.format.leaf_sizes(node.level) & self.mapping.possible != size.bytes()
            || output & (size.bytes() - 1) != 0
        {
            return Ok(0);
        }
        self.at = first;
        let mut leaf = radix.format.leaf_entry(node.level, size, output, self.mapping.attributes);
        let step = radix.format.leaf_step(node.level);
        let taken = match self.claim {
            None if all_absent(entries) => {
                store_leaves(entries, leaf, step);
                None
            }
            None => entries.iter().position(|entry| {
                let taken = entry.load() != 0;
                if !taken {
                    entry.store(leaf);
                    leaf = leaf.wrapping_add(step);
                }
                taken
            }),
            Some(bits) => claim_leaves(entries, leaf, step, bits, first == self.mapping.range.first()).err(),
        };
        let done = taken.unwrap_or(entries.len());
        self.radix.clean(entries.split_at(done).0);
        self.radix.fence_filled(self.claim);
        if done > 0 && !radix.stays(node) {
            self.take_back(node, first, entries.split_at(done).0);
            return Err(Stop::Stale(first));
        }
        self.installed.extend(leaves_span(first, 0, done, size));
        Ok(done)
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<InstallError>> {
        self.at = slot.first;
        match slot.decoded {
            Entry::Absent if self.claim.is_none() || slot.value == 0 => {}
            Entry::Absent => return Err(Stop::Error(InstallError::Contended(slot.first))),
            Entry::Leaf { oa, size, attributes } if self.accept_equal => {
                let (leaf_first, leaf_last) = leaf_span(slot.first, size);
                let equal = oa.checked_add(slot.first - leaf_first) == Some(self.mapping.output(slot.first))
                    && self.is_as_asked(slot.node.level, size, attributes);
                if !equal {
                    return Err(Stop::Error(MapError::Occupied { at: slot.first }.into()));
                }
                return Ok(Next::After(leaf_last.min(self.mapping.range.last())));
            }
            _ => return Err(Stop::Error(MapError::Occupied { at: slot.first }.into())),
        }
        let radix = self.radix;
        let Some(size) = self.size_that_fits(&slot) else {
            if slot.node.level == 1 {
                // Alignment was checked, so this is a format whose facts contradict each other.
                let range = self.mapping.range;
                return Err(Stop::Error(MapError::OutOfRange { range }.into()));
            }
            return match self.link_table(&slot) {
                Ok(next) => Ok(next),
                Err(Stop::Stale(at)) => Err(Stop::Stale(at)),
                Err(Stop::Error(error)) => Err(Stop::Error(MapError::from(error).into())),
            };
        };
        let entries = radix.leaf_entries(slot.node, slot.first, size);
        if self.install(&slot, size, entries).is_none() {
            return Ok(Next::Again);
        }
        radix.fence_filled(self.claim);
        if !radix.stays(slot.node) {
            self.take_back(slot.node, slot.first, entries);
            return Err(Stop::Stale(slot.first));
        }
        Ok(self.installed_leaf(slot.first, size))
    }

    fn link(&mut self, slot: &Slot<'_, A>, child: Node<A>) -> Option<Next> {
        let radix = self.radix;
        let shift = radix.format.shift(slot.node.level);
        let mut sizes = radix.format.leaf_sizes(slot.node.level);
        let size = loop {
            let size = self.mapping.best_size(sizes, slot.first).filter(|size| size.log2() >= shift)?;
            if size.log2() == shift {
                break size;
            }
            if self.is_free(slot, size) {
                return Some(Next::Again);
            }
            sizes &= size.bytes() - 1;
        };
        if slot.value & F::TENTATIVE != 0 || !self.bury_unused(child, slot.first, slot.last) {
            return None;
        }
        let leaf = self.leaf(slot.node.level, size, slot.first);
        if slot.entry.compare_exchange(slot.value, leaf).is_err() {
            // Somebody took the dead table's link away.
            return Some(Next::Again);
        }
        radix.clean(core::slice::from_ref(slot.entry));
        radix.retire(self.gather, child);
        Some(self.installed_leaf(slot.first, size))
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}
