//! Mapping: filling absent entries with the largest leaves that fit.
//!
//! Most mappings are a run of leaves of one size within one table: a page, a few pages, a large page. For them there
//! is a short way ([`Radix::install_in_one_table`]): down to that table, look whether all entries are absent,
//! store, and look whether the table stays. It does everything or nothing; whatever is not that simple goes the
//! [long way](Install), which also finds out what is in the way and takes back what it had done.

use super::retire::{Filling, all_absent};
use super::{HIGHEST_LEVEL, Node, Radix, Slot, Stop};
use crate::address::{IovaRange, Oa, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, Entry, Format, MemoryType};
use crate::gather::{Gather, Runs};
use crate::memory::{OutOfTables, TableMemory};

mod install;

pub(super) use install::{Install, InstallError};

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

/// Whether [`check_mapping`] has nothing to say, apart from the addresses' width.
#[inline(always)]
fn is_in_order<F: Format>(format: &F, range: IovaRange, oa: Oa, attributes: Attributes) -> bool {
    let low = (1u64 << format.shift(1)) - 1;
    let last = oa.get().checked_add(range.last() - range.first());
    (range.first() | !range.last() | oa.get()) & low == 0
        && last.is_some_and(|last| last >> format.output_bits() == 0)
        && attributes.intersects(Attributes::READ | Attributes::WRITE)
        && format.has_memory_type(attributes.memory_type())
}

/// Whether some leaf of the format can hold each part of a mapping.
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
    if last >> format.output_bits() != 0 {
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

    /// What of it lies in a range that it covers.
    fn part(&self, range: IovaRange) -> Mapping {
        Mapping::new(range, Oa::new(self.output(range.first())), self.attributes)
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

/// The software bits of a claimed, not yet published leaf.
#[derive(Clone, Copy)]
pub(super) struct ClaimBits {
    pub(super) present: u64,
    pub(super) busy: u64,
    pub(super) first: u64,
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
        let installed = self.install_in_one_table(range, oa, attributes, None, gather);
        let result = if installed {
            Ok(())
        } else {
            self.install_slowly(Mapping::new(range, oa, attributes), accept_equal, gather)
        };
        self.clean_ways(range);
        result
    }

    /// What the short way was not for, or not yet.
    #[inline(never)]
    fn install_slowly(
        &self,
        mapping: Mapping,
        accept_equal: bool,
        gather: &mut Gather<M, A>,
    ) -> Result<(), MapError> {
        if self.make_way(&mapping, None, gather)? {
            return Ok(());
        }
        self.install_piecewise(mapping, accept_equal, gather)
    }

    /// Checks a mapping and, if it goes into one table, makes what is missing on the way there. The last of the tables is
    /// filled before anybody can see it; if it was there already, the mapping is installed in it. `false`: that is not
    /// how it can be installed.
    pub(super) fn make_way(
        &self,
        mapping: &Mapping,
        claim: Option<ClaimBits>,
        gather: &mut Gather<M, A>,
    ) -> Result<bool, MapError> {
        let range = mapping.range;
        check_mapping(&self.format, range, Oa::new(mapping.oa), mapping.attributes)?;
        let mut node = self.root_covering(range.last())?;
        let Some(level) = self.leaf_level(node.level, mapping) else { return Ok(false) };
        if (range.first() ^ range.last()) >> self.format.width(level).min(63) != 0 {
            return Ok(false);
        }
        let root = node;
        // Unrolled as in `descend`.
        for at in (2..=HIGHEST_LEVEL).rev() {
            while at <= root.level && at > level && node.level == at {
                let entry = self.entry(node, self.index(at, range.first()));
                let value = entry.load();
                if self.format.table_pattern(at).matches(value) {
                    node = self.child(node, self.format.table_address(value));
                    continue;
                }
                // Whatever is in the way, the long way will say it.
                if value != 0 {
                    return Ok(false);
                }
                let decoded = Entry::Absent;
                let slot = Slot { node, entry, value, decoded, first: range.first(), last: range.last() };
                let made = if at - 1 == level {
                    self.link_filled_table(&slot, mapping, claim, gather)
                } else {
                    self.link_table(&slot, gather).map(|()| false)
                };
                match made {
                    Ok(true) => return Ok(true),
                    // Empty, or somebody else's.
                    Ok(false) => {}
                    Err(_) => return Ok(false),
                }
            }
        }
        Ok(self.install_in(node, mapping, claim, gather))
    }

    /// The short way: installs a mapping whose leaves are all of one size and stand in one table. `false`: nothing was
    /// installed, because the mapping is not like that, or something was in the way.
    #[inline(always)]
    pub(super) fn install_in_one_table(
        &self,
        range: IovaRange,
        oa: Oa,
        attributes: Attributes,
        claim: Option<ClaimBits>,
        gather: &mut Gather<M, A>,
    ) -> bool {
        if !is_in_order(&self.format, range, oa, attributes) {
            return false;
        }
        let Some(root) = self.root_over_range(range) else { return false };
        // One of the smallest pages, most of all; there is nothing to choose then, and the way down is a straight line.
        if range.last() - range.first() == (1 << self.format.shift(1)) - 1 {
            let Some(node) = self.descend(root, 1, range.first()) else { return false };
            return self.install_leaf(node, range, oa, attributes, claim, gather);
        }
        let mapping = Mapping::new(range, oa, attributes);
        let Some(level) = self.leaf_level(root.level, &mapping) else { return false };
        // Not in one table.
        if (range.first() ^ range.last()) >> self.format.width(level).min(63) != 0 {
            return false;
        }
        let Some(node) = self.descend(root, level, range.first()) else { return false };
        self.install_in(node, &mapping, claim, gather)
    }

    /// Installs a mapping whose leaves stand in `node`, all of one entry. `false`: as above.
    #[inline(always)]
    pub(super) fn install_in(
        &self,
        node: Node<A>,
        mapping: &Mapping,
        claim: Option<ClaimBits>,
        gather: &mut Gather<M, A>,
    ) -> bool {
        let Mapping { range, oa, attributes, .. } = *mapping;
        let (level, oa) = (node.level, Oa::new(oa));
        let shift = self.format.shift(level);
        let apart = range.first() ^ range.last();
        // Not from one end of an entry to another.
        let low = (1u64 << shift) - 1;
        if (range.first() | !range.last()) & low != 0 {
            return false;
        }
        if apart <= low {
            return self.install_leaf(node, range, oa, attributes, claim, gather);
        }
        let Some(entries) = self.covered_entries(node, range) else { return false };
        let leaf = self.format.leaf_entry(level, PageSize(shift as u8), oa.get(), attributes);
        let step = self.format.leaf_step(level);
        match claim {
            // Nobody else fills entries of ours. If one is taken the long way will find it again.
            None if !all_absent(entries) => return false,
            None => {
                store_leaves(entries, leaf, step);
                self.clean(entries);
            }
            Some(bits) => {
                if let Err(done) = claim_leaves(entries, leaf, step, bits, true) {
                    // Nobody has translated through them, so nobody has to be told.
                    entries.iter().take(done).for_each(|entry| entry.store(0));
                    return false;
                }
            }
        }
        self.fence_filled(claim);
        self.stays(node) || self.take_all_back(node, range, claim, gather)
    }

    /// Installs a mapping that is one leaf of one entry in `node`.
    #[inline(always)]
    fn install_leaf(
        &self,
        node: Node<A>,
        range: IovaRange,
        oa: Oa,
        attributes: Attributes,
        claim: Option<ClaimBits>,
        gather: &mut Gather<M, A>,
    ) -> bool {
        let entry = self.entry(node, self.index(node.level, range.first()));
        let size = PageSize(self.format.shift(node.level) as u8);
        let leaf = self.format.leaf_entry(node.level, size, oa.get(), attributes);
        match claim {
            // As above.
            None if entry.load() != 0 => return false,
            None => {
                entry.store(leaf);
                self.clean(core::slice::from_ref(entry));
            }
            Some(bits) => {
                if entry.compare_exchange(0, (leaf & !bits.present) | bits.busy | bits.first).is_err() {
                    return false;
                }
            }
        }
        self.fence_filled(claim);
        self.stays(node) || self.take_all_back(node, range, claim, gather)
    }

    /// Takes the leaves of a mapping back that were put into a table that is going away.
    #[cold]
    fn take_all_back(
        &self,
        node: Node<A>,
        range: IovaRange,
        claim: Option<ClaimBits>,
        gather: &mut Gather<M, A>,
    ) -> bool {
        if let Some(entries) = self.covered_entries(node, range) {
            self.take_back(node, entries, gather);
            if claim.is_none() {
                // They will be mapped again; if not, this is how the caller gets to know that they have been visible.
                gather.removed(range, PageSize(self.format.shift(node.level) as u8), entries.len() as u64);
            }
        }
        false
    }

    /// After entries were filled, so that [`stays`](Self::stays) can be asked.
    #[inline(always)]
    fn fence_filled(&self, claim: Option<ClaimBits>) {
        if claim.is_none() {
            self.memory.light_fence();
        }
    }

    /// Empties entries of a dead table again that this operation has filled a moment ago. The same leaves will be
    /// installed elsewhere.
    #[cold]
    fn take_back(&self, node: Node<A>, entries: &[A], gather: &mut Gather<M, A>) {
        for entry in entries {
            // Somebody may have cut a leaf that was exclusive and there for a moment.
            if let Entry::Table(address) = self.format.decode(node.level, entry.swap(0)) {
                if node.level > 1 {
                    self.retire_with_contents(gather, self.child(node, address));
                }
            }
        }
        self.clean(entries);
    }

    /// The level, from `top` down, at which all leaves of a mapping stand that has leaves of one size and of one entry.
    #[inline(always)]
    fn leaf_level(&self, top: u8, mapping: &Mapping) -> Option<u8> {
        // Nothing but the smallest page fits anywhere: every format has that, as a leaf of one entry.
        if mapping.possible >> self.format.shift(1) == 1 {
            return Some(1);
        }
        let mut level = top;
        loop {
            let sizes = self.format.leaf_sizes(level) & mapping.possible;
            if sizes != 0 {
                return (sizes == 1 << self.format.shift(level)).then_some(level);
            }
            level = level.checked_sub(1).filter(|&level| level > 0)?;
        }
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
        self.sweep_path(at, gather, Filling::Store);
        Err(match error {
            InstallError::Map(error) => error,
            InstallError::Contended(at) => MapError::Occupied { at },
        })
    }

    /// Puts an empty table into an absent entry, or finds that somebody else did.
    #[cold]
    fn link_table(&self, slot: &Slot<'_, A>, gather: &mut Gather<M, A>) -> Result<(), Stop<OutOfTables>> {
        let child = self.allocate(slot.node.level - 1).map_err(Stop::Error)?;
        self.link(slot, child, gather).map(drop)
    }

    /// Puts a table with a mapping in it into an absent entry. `false`: somebody else has put one there.
    #[cold]
    fn link_filled_table(
        &self,
        slot: &Slot<'_, A>,
        mapping: &Mapping,
        claim: Option<ClaimBits>,
        gather: &mut Gather<M, A>,
    ) -> Result<bool, Stop<OutOfTables>> {
        let child = self.allocate(slot.node.level - 1).map_err(Stop::Error)?;
        if let Some(entries) = self.covered_entries(child, mapping.range) {
            let size = PageSize(self.format.shift(child.level) as u8);
            let leaf = self.format.leaf_entry(child.level, size, mapping.oa, mapping.attributes);
            let step = if entries.len() > 1 { self.format.leaf_step(child.level) } else { 0 };
            match claim {
                None => store_leaves(entries, leaf, step),
                Some(bits) => {
                    store_leaves(entries, (leaf & !bits.present) | bits.busy, step);
                    if let Some(entry) = entries.first() {
                        entry.store((leaf & !bits.present) | bits.busy | bits.first);
                    }
                }
            }
            let linked = self.link(slot, child, gather);
            if linked.is_err() && claim.is_none() {
                // They will be mapped again; if not, this is how the caller gets to know that they have been visible.
                gather.removed(mapping.range, size, entries.len() as u64);
            }
            return linked;
        }
        // It does not begin or end with an entry. The long way takes the table as it is.
        self.link(slot, child, gather).map(|_| false)
    }

    /// Puts a table that nobody has seen into an absent entry, or gives it back if somebody else has put one there.
    fn link(
        &self,
        slot: &Slot<'_, A>,
        child: Node<A>,
        gather: &mut Gather<M, A>,
    ) -> Result<bool, Stop<OutOfTables>> {
        let link = self.format.table_entry(slot.node.level, self.memory.address(child.table));
        self.clean(self.all_entries(child));
        if slot.entry.compare_exchange(slot.value, link | F::TENTATIVE).is_err() {
            // SAFETY: never linked.
            unsafe { self.discard(child) };
            return Ok(false);
        }
        self.clean(core::slice::from_ref(slot.entry));
        if self.stays(slot.node) {
            // Until now nobody else has changed the link.
            slot.entry.store(link);
            return Ok(true);
        }
        // Nor has anybody filled an entry behind it: the table in which it stands has been empty ever since it died.
        slot.entry.store(0);
        self.clean(core::slice::from_ref(slot.entry));
        self.retire_with_contents(gather, child);
        Err(Stop::Stale(slot.first))
    }
}
