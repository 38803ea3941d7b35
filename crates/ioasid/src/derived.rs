//! A derived table in the memory of this process, in any format of `ioasid-pagetable`.
//!
//! This is what an IOMMU that is modelled or programmed here hands to the engine: the format's entries are exactly
//! what hardware of that kind would read.

use crate::epoch;
use crate::iommu::{Change, DerivedTable, TableError};
use ioasid_pagetable::{
    Attributes, CutError, Entry, Format, Gather, IovaRange, Leaf, LiveChanges, MapError, Oa, PageSize,
    ProtectError, Radix, RemapError, Runs,
};
use std::any::Any;
use std::ops::ControlFlow;

/// A radix table that follows a space's native one.
#[derive(Debug)]
pub struct RadixTable<F: Format> {
    radix: Radix<F>,
    /// What each leaf says besides what the native one does.
    always: Attributes,
}

impl<F: Format> RadixTable<F> {
    /// An empty table.
    pub fn new(format: F) -> RadixTable<F> {
        RadixTable { radix: Radix::new(format, ioasid_pagetable::HeapTables), always: Attributes::empty() }
    }

    /// An empty table through which all accesses snoop the CPU's caches, whatever a request asks for; `None` if the leaves of
    /// the format cannot say that.
    pub fn snooping(format: F) -> Option<RadixTable<F>> {
        let always = Attributes::FORCE_SNOOP;
        let table = RadixTable { always, ..RadixTable::new(format) };
        let format = table.radix.format();
        let size = PageSize::from_log2(format.shift(1))?;
        let entry = format.leaf_entry(1, size, 0, Attributes::READ | Attributes::WRITE | always);
        match format.decode(1, entry) {
            Entry::Leaf { attributes, .. } if attributes.contains(always) => Some(table),
            _ => None,
        }
    }

    /// The table itself, for walkers.
    pub fn radix(&self) -> &Radix<F> {
        &self.radix
    }
}

impl<F: Format> RadixTable<F> {
    fn levels(&self) -> std::ops::RangeInclusive<u8> {
        1..=*self.radix.format().top_levels().end()
    }

    /// Whether walkers can meet any change of any leaf.
    fn is_flexible(&self) -> bool {
        let format = self.radix.format();
        format.live_changes() == LiveChanges::all()
            && self.levels().all(|level| format.leaf_sizes(level).count_ones() <= 1)
    }

    /// Whether a leaf of this size is one entry.
    fn is_one_entry(&self, size: PageSize) -> bool {
        self.levels().any(|level| self.radix.format().shift(level) == size.log2())
    }

    /// Whether a leaf of this size can be cut while walkers use it.
    fn can_cut(&self, size: PageSize) -> bool {
        let format = self.radix.format();
        let pieces = |level: u8| format.leaf_sizes(level - 1) & (1 << format.shift(level - 1)) != 0;
        format.live_changes().contains(LiveChanges::SIZE)
            && self.levels().skip(1).any(|level| format.shift(level) == size.log2() && pieces(level))
    }

    /// What a leaf of the table says that was made with these attributes.
    fn said(&self, leaf: &Leaf, attributes: Attributes) -> Attributes {
        let format = self.radix.format();
        let level = self.levels().find(|level| format.leaf_sizes(*level) & leaf.size.bytes() != 0);
        let entry =
            |level| format.decode(level, format.leaf_entry(level, leaf.size, leaf.oa.get(), attributes));
        match level.map(entry) {
            Some(Entry::Leaf { attributes, .. }) => attributes,
            _ => attributes,
        }
    }

    /// Why a leaf cannot be changed while walkers use it.
    fn refuses(&self, leaf: &Leaf, range: IovaRange, change: Change) -> Option<TableError> {
        let live = self.radix.format().live_changes();
        let needs_break = TableError::NeedsBreak { at: leaf.iova };
        match change {
            Change::Unmap => None,
            Change::Protect(permissions) => {
                let permissions = permissions & Attributes::PERMISSIONS;
                let wanted = leaf.attributes.difference(Attributes::PERMISSIONS) | permissions;
                let changes = (self.said(leaf, wanted) ^ leaf.attributes).intersects(Attributes::PERMISSIONS);
                (changes && !live.contains(LiveChanges::PERMISSIONS)).then_some(needs_break)
            }
            Change::Remap(oa, attributes) => {
                let output = oa.get().wrapping_add(leaf.iova.wrapping_sub(range.first()));
                let fits = range.covers(&leaf.range()) && output & (leaf.size.bytes() - 1) == 0;
                let changes = (self.said(leaf, attributes | self.always) ^ leaf.attributes)
                    .difference(Attributes::USED);
                if fits && output == leaf.oa.get() && changes.is_empty() {
                    return None;
                }
                let live = live.contains(LiveChanges::OUTPUT) && self.is_one_entry(leaf.size);
                (!live || !(fits || self.can_cut(leaf.size))).then_some(needs_break)
            }
        }
    }
}

/// How many leaves of each size a table has, smallest first. Inside an operation.
pub(crate) fn leaves_by_size<F: Format>(radix: &Radix<F>) -> Vec<(PageSize, u64)> {
    let mut leaves: Vec<(PageSize, u64)> = Vec::new();
    radix.leaves(IovaRange::ALL, |leaf| {
        match leaves.binary_search_by_key(&leaf.size, |(size, _)| *size) {
            Ok(index) => leaves[index].1 += 1,
            Err(index) => leaves.insert(index, (leaf.size, 1)),
        }
        ControlFlow::Continue(())
    });
    leaves
}

fn map_error(error: MapError, range: IovaRange) -> TableError {
    match error {
        MapError::OutOfTables(_) => TableError::OutOfTables,
        _ => TableError::DoesNotFit { range },
    }
}

/// What a table says when it was not cut.
pub(crate) fn cut_error(error: CutError) -> TableError {
    match error {
        CutError::OutOfTables(_) => TableError::OutOfTables,
        CutError::NeedsBreak { at, .. } | CutError::Contended { at } | CutError::Misaligned { at } => {
            TableError::CannotCut { at }
        }
    }
}

impl<F: Format> DerivedTable for RadixTable<F> {
    fn map(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        let mut gather = Gather::new();
        let result = self.radix.map(range, oa, attributes | self.always, &mut gather);
        epoch::retire(gather.retired);
        result.map_err(|error| map_error(error, range))
    }

    fn fill(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        let mut gather = Gather::new();
        let result = self.radix.fill(range, oa, attributes | self.always, &mut gather);
        epoch::retire(gather.retired);
        result.map_err(|error| map_error(error, range))
    }

    fn check(&self, range: IovaRange, change: Change) -> Result<(), TableError> {
        if self.is_flexible() {
            return Ok(());
        }
        for at in std::iter::once(range.first()).chain(range.last().checked_add(1)) {
            let Ok(leaf) = self.radix.walk(at) else { continue };
            if leaf.iova != at && !self.can_cut(leaf.size) {
                return Err(TableError::CannotCut { at });
            }
        }
        let mut refused = None;
        if change != Change::Unmap {
            self.radix.leaves(range, |leaf| {
                refused = self.refuses(&leaf, range, change);
                if refused.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
        }
        refused.map_or(Ok(()), Err)
    }

    fn reaches_over(&self, at: u64) -> bool {
        self.radix.walk(at).is_ok_and(|leaf| leaf.iova != at)
    }

    fn cut(&self, at: u64) -> Result<(), TableError> {
        // Walkers in software remember no leaves, so nobody has to be told.
        self.radix.cut(at, &mut Gather::new()).map_err(|error| match error {
            CutError::OutOfTables(_) => TableError::OutOfTables,
            _ => TableError::CannotCut { at },
        })
    }

    fn unmap(&self, range: IovaRange) {
        let mut gather = Gather::new();
        // The ends were cut, so there is nothing left that could fail.
        let result = self.radix.unmap(range, &mut gather);
        debug_assert!(result.is_ok());
        epoch::retire(gather.retired);
    }

    fn protect(&self, range: IovaRange, permissions: Attributes) -> Result<(), TableError> {
        let mut gather = Gather::new();
        let result = self.radix.protect(range, permissions, &mut gather);
        epoch::retire(gather.retired);
        result.map_err(|error| match error {
            ProtectError::Cut(error) => cut_error(error),
            ProtectError::NeedsBreak { at, .. } => TableError::NeedsBreak { at },
            ProtectError::NoAccess { range } => TableError::DoesNotFit { range },
        })
    }

    fn remap(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        let mut gather = Gather::new();
        let result = self.radix.remap(range, oa, attributes | self.always, &mut gather);
        epoch::retire(gather.retired);
        result.map_err(|error| match error {
            RemapError::Map(error) => map_error(error, range),
            RemapError::Cut(CutError::OutOfTables(_)) => TableError::OutOfTables,
            RemapError::Cut(CutError::NeedsBreak { at, .. }) | RemapError::NeedsBreak { at, .. } => {
                TableError::NeedsBreak { at }
            }
            RemapError::Cut(CutError::Contended { at } | CutError::Misaligned { at }) => {
                TableError::CannotCut { at }
            }
        })
    }

    fn merge(&self, range: IovaRange) -> u64 {
        let mut gather = Gather::new();
        // A format that cannot merge while walkers run says so at the first table that could be; that one stays.
        let merged = self.radix.merge(range, &mut gather).unwrap_or(0);
        epoch::retire(gather.retired);
        merged
    }

    fn split(&self, range: IovaRange, largest: PageSize) -> Result<bool, TableError> {
        let mut gather = Gather::new();
        self.radix.split(range, largest, &mut gather).map_err(cut_error)?;
        Ok(gather.tables_changed)
    }

    fn invalidate(&self, _runs: &Runs) {
        // Walkers in software read the leaves anew each time, and the engine waits for the DMA that is running.
    }

    fn records_writes(&self) -> bool {
        self.radix.format().dirty_bit() != 0 && self.radix.format().hardware_marks()
    }

    fn written(&self, range: IovaRange, clear: bool, report: &mut dyn FnMut(IovaRange)) {
        if clear {
            self.radix.read_and_clear_dirty(range, report);
        } else {
            self.radix.dirty(range, report);
        }
    }

    fn mark_written(&self, range: IovaRange) {
        let page = 1 << self.radix.format().shift(1);
        self.radix.leaves(range, |leaf| {
            // The leaf may have been cut since, and some of it unmapped, which needs no mark.
            let end = leaf.range().last().min(range.last());
            let mut next = Some(leaf.iova.max(range.first()));
            while let Some(at) = next.filter(|at| *at <= end) {
                let marked = self.radix.mark(at, Attributes::USED);
                let last = marked.map_or(at | (page - 1), |leaf| leaf.range().last());
                next = last.checked_add(1);
            }
            ControlFlow::Continue(())
        });
    }

    fn table_bytes(&self) -> Option<u64> {
        Some(self.radix.table_bytes())
    }

    fn leaves_by_size(&self) -> Option<Vec<(PageSize, u64)>> {
        let _operation = epoch::operation();
        Some(leaves_by_size(&self.radix))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
