//! Making small leaves of large ones, on request: the way back from a [merge](super::merge).
//!
//! It is for one table, because who wants small leaves wants them for what devices mark in them, and pays for table pages. Of the
//! native table the leaves are held and cut by the same step. Of a derived one the native leaves are held as they are:
//! whoever holds them has the range to himself in every table. Both go block by block, so that others never wait for long. A
//! leaf is replaced by a table that says the same in one step, so no device finds anything missing.

use super::Space;
use super::held::Portion;
use crate::derived::cut_error;
use crate::iommu::{DerivedTable, TableError};
use ioasid_pagetable::{IovaRange, PageSize};

/// What is held at once: some thousands of pages.
const BLOCK: u64 = 32 << 20;

impl Space {
    /// Cuts the leaves of one table, the native one if `derived` is none.
    pub(crate) fn split(
        &self,
        derived: Option<&dyn DerivedTable>,
        range: IovaRange,
        largest: PageSize,
    ) -> Result<(), TableError> {
        let low = self.granule().bytes() - 1;
        let mut next = Some(range.first() & !low);
        let last = range.last() | low;
        while let Some(rest) = next.and_then(|first| IovaRange::new(first, last)) {
            // No need to stop where nothing is mapped.
            let Some(first) = self.next_mapped(rest) else { break };
            let Some(block) = IovaRange::new(first, (first | (BLOCK - 1)).min(last)) else { break };
            let largest_held = derived.is_none().then_some(largest);
            let portion = Portion { range: block, largest: largest_held };
            let held = self.hold(block, || std::iter::once(portion)).map_err(cut_error)?;
            for run in held.runs().iter().filter_map(|run| run.intersection(&block)) {
                let Some(table) = derived else { break };
                match table.split(run, largest) {
                    Ok(false) => {}
                    changed => {
                        held.invalidate_in(table, run);
                        changed?;
                    }
                }
            }
            next = block.last().checked_add(1);
        }
        Ok(())
    }

    /// The first address in the range that is mapped, or may be in a moment.
    fn next_mapped(&self, range: IovaRange) -> Option<u64> {
        let _layout = self.layout.read();
        Some(self.occupied_in(range)?.first().max(range.first()))
    }
}
