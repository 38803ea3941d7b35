//! Mapping: filling absent entries with the largest leaves that fit.
//!
//! Most mappings are a run of leaves of one size within one table: a page, a few pages, a large page. For them there
//! is a short way ([`Radix::install_in_one_table`]): down to that table, look whether all entries are absent, count,
//! store. It does everything or nothing; whatever is not that simple goes the long way of a visitor, which also
//! finds out what is in the way and takes back what it had done.
//!
//! One visitor serves both modes. A claiming operation takes each entry with a compare-exchange from 0 and leaves
//! the leaf busy and not yet present; an exclusive one stores the finished leaf. Where a smaller table stands in
//! the place of a large leaf but is empty, it is retired and the leaf put in its place, so that a range which was
//! once in small pages can be mapped with large ones again.

use super::retire::Sweep;
use super::{COUNT, Next, Node, Radix, Slot, Stop, Stretch, Visitor, leaf_span};
use crate::address::{IovaRange, Oa, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format, MemoryType};
use crate::gather::{Gather, Runs};
use crate::memory::{OutOfTables, TableMemory};

/// Why nothing was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Something else is mapped there.
    #[error("something is mapped at {at:#x} already")]
    Occupied {
        /// The first address in the way.
        at: u64,
    },
    /// The format cannot look these addresses up.
    #[error("{range} lies outside what the table can translate")]
    OutOfRange {
        /// The range asked for.
        range: IovaRange,
    },
    /// Neither reading nor writing would be allowed. Formats without a present bit have no such leaf.
    #[error("a mapping of {range} that allows neither reads nor writes")]
    NoAccess {
        /// The range asked for.
        range: IovaRange,
    },
    /// The format's leaves cannot say this memory type.
    #[error("the table cannot give {range} the memory type {memory_type:?}")]
    NoMemoryType {
        /// The range asked for.
        range: IovaRange,
        /// The memory type asked for.
        memory_type: MemoryType,
    },
    /// The output would need more address bits than the format has.
    #[error("the output addresses from {oa} on do not fit the table's entries")]
    OutputOutOfRange {
        /// The first output address.
        oa: Oa,
    },
    /// An end of the range or the output address is not a multiple of the smallest page.
    #[error("{range} to {oa} is not a whole number of {granule} pages")]
    Misaligned {
        /// The range asked for.
        range: IovaRange,
        /// The output address asked for.
        oa: Oa,
        /// The smallest page.
        granule: PageSize,
    },
    /// No memory for a table.
    #[error(transparent)]
    OutOfTables(#[from] OutOfTables),
}

/// Whether some leaf of the format can hold each part of a mapping.
#[inline(always)]
pub(super) fn check_mapping<F: Format>(
    format: &F,
    range: IovaRange,
    oa: Oa,
    attributes: Attributes,
) -> Result<(), MapError> {
    let granule = PageSize::from_log2(format.shift(1)).ok_or(MapError::OutOfRange { range })?;
    if !range.is_aligned(granule) || !oa.is_aligned(granule) {
        return Err(MapError::Misaligned { range, oa, granule });
    }
    if !format.accepts(&range) {
        return Err(MapError::OutOfRange { range });
    }
    let last = oa.get().checked_add(range.last() - range.first()).ok_or(MapError::OutputOutOfRange { oa })?;
    if last >> format.output_bits().min(63) != 0 {
        return Err(MapError::OutputOutOfRange { oa });
    }
    if !attributes.intersects(Attributes::READ | Attributes::WRITE) {
        return Err(MapError::NoAccess { range });
    }
    let memory_type = attributes.memory_type();
    if !format.has_memory_type(memory_type) {
        return Err(MapError::NoMemoryType { range, memory_type });
    }
    Ok(())
}

/// A mapping to be made, and the best leaf for a place in it.
#[derive(Clone, Copy)]
pub(super) struct Mapping {
    pub(super) range: IovaRange,
    pub(super) oa: u64,
    pub(super) attributes: Attributes,
    /// The leaf sizes that can occur anywhere in it: no larger than the range, and such that the address and its
    /// output can both be multiples.
    possible: u64,
}

impl Mapping {
    #[inline(always)]
    pub(super) fn new(range: IovaRange, oa: Oa, attributes: Attributes) -> Mapping {
        let apart = oa.get().wrapping_sub(range.first());
        let aligned = if apart == 0 { u64::MAX } else { apart ^ (apart - 1) };
        // All sizes up to the length; for all 2^64 bytes every size.
        let fits =
            (range.last() - range.first()).checked_add(1).map_or(u64::MAX, |n| u64::MAX >> n.leading_zeros());
        Mapping { range, oa: oa.get(), attributes, possible: aligned & fits }
    }

    #[inline(always)]
    fn output(&self, iova: u64) -> u64 {
        self.oa + (iova - self.range.first())
    }

    /// The largest leaf of the `sizes` that can begin at `iova`: the address, its output and what is left of the
    /// range must all be multiples of it.
    #[inline(always)]
    fn best_size(&self, sizes: u64, iova: u64) -> Option<PageSize> {
        let alignment = iova | self.output(iova);
        let aligned = if alignment == 0 { u64::MAX } else { alignment ^ (alignment - 1) };
        let left = self.range.last() - iova;
        // Sizes up to `left + 1`; for the whole 2^64 every size fits.
        let fits = match left.checked_add(1) {
            Some(bytes) => u64::MAX >> bytes.leading_zeros(),
            None => u64::MAX,
        };
        let usable = sizes & aligned & fits;
        (usable != 0).then(|| PageSize(63 - usable.leading_zeros() as u8))
    }
}

/// What a claiming mapper may meet besides.
pub(super) enum InstallError {
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
pub(super) struct Install<'a, F: Format, M: TableMemory<A>, A: AtomicEntry> {
    pub(super) radix: &'a Radix<F, M, A>,
    pub(super) mapping: Mapping,
    /// Claiming mode: added to the first leaf, to the others, and removed from both until they are published.
    pub(super) claim: Option<ClaimBits>,
    /// A leaf with the same translation is what we came for, not something in the way.
    pub(super) accept_equal: bool,
    /// The leaves installed so far. An operation that fails takes back these and no others.
    pub(super) installed: Runs,
    /// Where the operation is.
    pub(super) at: u64,
    /// Takes the empty tables that made room for large leaves.
    pub(super) gather: &'a mut Gather<M, A>,
}

/// The software bits of a claimed, not yet published leaf.
#[derive(Clone, Copy)]
pub(super) struct ClaimBits {
    pub(super) present: u64,
    pub(super) busy: u64,
    pub(super) first: u64,
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
    fn install(&self, slot: &Slot<'_, A>, size: PageSize, count: u64) -> Option<()> {
        let leaf = self.leaf(slot.node.level, size, slot.first);
        if self.claim.is_some() {
            return slot.entry.compare_exchange(slot.value, leaf).ok();
        }
        slot.entry.store(leaf);
        let index = self.radix.index(slot.node.level, slot.first);
        for replica in 1..count as usize {
            self.radix.entry(slot.node, index + replica).store(leaf);
        }
        Some(())
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

    /// Writes down what was installed.
    fn installed_leaf(&mut self, first: u64, size: PageSize) -> Next {
        let (first, last) = leaf_span(first, size);
        if let Some(leaf) = IovaRange::new(first, last) {
            self.installed.push(leaf);
        }
        Next::After(last)
    }
}

/// Whether nothing is in the entries.
#[inline(always)]
fn all_absent<A: AtomicEntry>(entries: &[A]) -> bool {
    let (groups, rest) = entries.split_at(entries.len() & !7);
    // Eight at a time, which is a cache line: one branch for all of them.
    groups.chunks_exact(8).all(|group| group.iter().fold(0, |any, entry| any | entry.load()) == 0)
        && rest.iter().all(|entry| entry.load() == 0)
}

/// Fills entries with leaves that follow each other.
#[inline(always)]
pub(super) fn store_leaves<A: AtomicEntry>(entries: &[A], mut leaf: u64, step: u64) {
    let (groups, rest) = entries.split_at(entries.len() & !7);
    for group in groups.chunks_exact(8) {
        let mut next = leaf;
        for entry in group {
            entry.store(next);
            next = next.wrapping_add(step);
        }
        leaf = leaf.wrapping_add(step.wrapping_mul(8));
    }
    for entry in rest {
        entry.store(leaf);
        leaf = leaf.wrapping_add(step);
    }
}

/// Takes absent entries for leaves that follow each other. An error says how many were taken before the first that was
/// not absent.
#[inline(always)]
fn claim_leaves<A: AtomicEntry>(
    entries: &[A],
    leaf: u64,
    step: u64,
    bits: ClaimBits,
    begins: bool,
) -> Result<(), usize> {
    let mut leaf = (leaf & !bits.present) | bits.busy;
    let mut mark = if begins { bits.first } else { 0 };
    let taken = entries.iter().position(|entry| {
        let taken = entry.compare_exchange(0, leaf | mark).is_err();
        mark = 0;
        leaf = leaf.wrapping_add(step);
        taken
    });
    taken.map_or(Ok(()), Err)
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
        let count = entries.len() as u64;
        if !radix.add_live(node, count) {
            return Err(Stop::Stale(first));
        }
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
        if done < entries.len() {
            radix.subtract_live(node, count - done as u64);
        }
        if let Some(last) = (done as u64).checked_sub(1).map(|last| first + (last << size.log2())) {
            self.installed.extend(IovaRange::new(first, leaf_span(last, size).1));
        }
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
        let Some(size) = self.mapping.best_size(radix.format.leaf_sizes(slot.node.level), slot.first) else {
            if slot.node.level == 1 {
                // Alignment was checked, so this is a format whose facts contradict each other.
                let range = self.mapping.range;
                return Err(Stop::Error(MapError::OutOfRange { range }.into()));
            }
            return match radix.link_table(&slot) {
                Ok(()) => Ok(Next::Again),
                Err(Stop::Stale(at)) => Err(Stop::Stale(at)),
                Err(Stop::Error(error)) => Err(Stop::Error(MapError::from(error).into())),
            };
        };
        let count = size.bytes() >> radix.format.shift(slot.node.level);
        if !radix.add_live(slot.node, count) {
            return Err(Stop::Stale(slot.first));
        }
        if self.install(&slot, size, count).is_none() {
            radix.subtract_live(slot.node, count);
            return Ok(Next::Again);
        }
        Ok(self.installed_leaf(slot.first, size))
    }

    fn link(&mut self, slot: &Slot<'_, A>, child: Node<A>) -> Option<Next> {
        let radix = self.radix;
        let size = self.mapping.best_size(radix.format.leaf_sizes(slot.node.level), slot.first)?;
        if size.log2() != radix.format.shift(slot.node.level) {
            return None;
        }
        let mut word = radix.live(child).load();
        if word & COUNT != 0 {
            // All that it leads to may be empty too.
            let mut sweep = Sweep { radix, gather: &mut *self.gather, until_used: true };
            let _ = radix.visit(&mut sweep, child, slot.first, slot.last);
            word = radix.live(child).load();
        }
        if !radix.bury(child, word) {
            return None;
        }
        // One entry for another: the parent's count stays.
        let leaf = self.leaf(slot.node.level, size, slot.first);
        if slot.entry.compare_exchange(slot.value, leaf).is_err() {
            // Somebody took the dead table's link away.
            return Some(Next::Again);
        }
        radix.retire(self.gather, child, true);
        Some(self.installed_leaf(slot.first, size))
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

impl<F: Format, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Maps `range` to the output addresses from `oa` on, with the largest leaves that fit.
    ///
    /// Exclusive mode: nobody else changes the range meanwhile. Other ranges may be changed and everything may be
    /// walked at the same time.
    ///
    /// `gather` takes the empty tables that made room for large leaves. On an error nothing is mapped, and it
    /// also holds what had become visible and was taken back.
    pub fn map(
        &self,
        range: IovaRange,
        oa: Oa,
        attributes: Attributes,
        gather: &mut Gather<M, A>,
    ) -> Result<(), MapError> {
        self.install(range, oa, attributes, false, gather)
    }

    /// Like [`map`](Self::map), but leaves that translate the same way already may stand in the range and stay.
    ///
    /// This is how a new table is filled beside running operations, which may have been there first.
    pub fn fill(
        &self,
        range: IovaRange,
        oa: Oa,
        attributes: Attributes,
        gather: &mut Gather<M, A>,
    ) -> Result<(), MapError> {
        self.install(range, oa, attributes, true, gather)
    }

    #[inline(always)]
    fn install(
        &self,
        range: IovaRange,
        oa: Oa,
        attributes: Attributes,
        accept_equal: bool,
        gather: &mut Gather<M, A>,
    ) -> Result<(), MapError> {
        check_mapping(&self.format, range, oa, attributes)?;
        let mapping = Mapping::new(range, oa, attributes);
        let root = self.root_covering(range.last())?;
        if self.install_in_one_table(root, &mapping, None) {
            return Ok(());
        }
        self.install_piecewise(mapping, accept_equal, gather)
    }

    /// The short way: installs a mapping whose leaves are all of one size and stand in one table. `false`: nothing was
    /// installed, because the mapping is not like that, or something was in the way.
    #[inline(always)]
    pub(super) fn install_in_one_table(
        &self,
        root: Node<A>,
        mapping: &Mapping,
        claim: Option<ClaimBits>,
    ) -> bool {
        let range = mapping.range;
        let apart = range.first() ^ range.last();
        let mut node = root;
        let size = loop {
            let sizes = self.format.leaf_sizes(node.level) & mapping.possible;
            let shift = self.format.shift(node.level);
            if sizes != 0 {
                if sizes != 1 << shift {
                    return false;
                }
                break PageSize(shift as u8);
            }
            // The way parts: this is not for one table.
            if node.level == 1 || apart >> shift != 0 {
                return false;
            }
            let entry = self.entry(node, self.index(node.level, range.first()));
            let value = entry.load();
            if self.format.table_pattern(node.level).matches(value) {
                node = self.child(node, self.format.table_address(value));
            } else {
                let decoded = Entry::Absent;
                let slot = Slot { node, entry, value, decoded, first: range.first(), last: range.last() };
                if value != 0 || self.link_table(&slot).is_err() {
                    return false;
                }
            }
        };
        if apart >> self.format.width(node.level).min(63) != 0 {
            return false;
        }
        let Some(entries) = self.covered_entries(node, range) else { return false };
        let count = entries.len() as u64;
        // Nobody else fills entries of ours. One that is taken is found in the same way by the long way.
        if claim.is_none() && !all_absent(entries) || !self.add_live(node, count) {
            return false;
        }
        let leaf = self.format.leaf_entry(node.level, size, mapping.oa, mapping.attributes);
        let step = if count > 1 { self.format.leaf_step(node.level) } else { 0 };
        match claim {
            None => store_leaves(entries, leaf, step),
            Some(bits) => {
                if let Err(done) = claim_leaves(entries, leaf, step, bits, true) {
                    // Nobody has translated through them, so nobody has to be told.
                    entries.iter().take(done).for_each(|entry| entry.store(0));
                    self.subtract_live(node, count);
                    return false;
                }
            }
        }
        true
    }

    /// The long way of [`install`](Self::install).
    #[inline(never)]
    fn install_piecewise(
        &self,
        mapping: Mapping,
        accept_equal: bool,
        gather: &mut Gather<M, A>,
    ) -> Result<(), MapError> {
        let range = mapping.range;
        let mut install = Install {
            radix: self,
            mapping,
            claim: None,
            accept_equal,
            installed: Runs::default(),
            at: range.first(),
            gather,
        };
        let Err(error) = self.run(&mut install, range) else { return Ok(()) };
        let Install { installed, at, .. } = install;
        for run in installed.iter() {
            // Nothing has to be cut for it: a run ends with a leaf of this operation.
            let _ = self.unmap(run, gather);
        }
        self.sweep_path(at, gather);
        Err(match error {
            InstallError::Map(error) => error,
            InstallError::Contended(at) => MapError::Occupied { at },
        })
    }

    /// Puts an empty table into an absent entry, or finds that somebody else did.
    #[cold]
    fn link_table(&self, slot: &Slot<'_, A>) -> Result<(), Stop<OutOfTables>> {
        let child = self.allocate(slot.node.level - 1).map_err(Stop::Error)?;
        let link = self.format.table_entry(slot.node.level, self.memory.address(child.table));
        if !self.add_live(slot.node, 1) {
            // SAFETY: never linked.
            unsafe { self.discard(child) };
            return Err(Stop::Stale(slot.first));
        }
        if slot.entry.compare_exchange(slot.value, link).is_err() {
            self.subtract_live(slot.node, 1);
            // SAFETY: never linked.
            unsafe { self.discard(child) };
        }
        Ok(())
    }
}
