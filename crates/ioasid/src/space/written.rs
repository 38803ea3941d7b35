//! What devices have written, as far as a table records it.
//!
//! A leaf is marked by the device's access, beside all other operations. To read the marks and clear them in one step
//! takes ownership of the leaves, or an unmap could meet the store that clears. So they are held, as for a change in
//! place; devices notice nothing.
//!
//! Who is told that a page was written will copy it, and counts on being told again about later writes. Writes that were
//! translated before the mark was cleared have to have ended by then, so clearing waits for them.

use super::Space;
use super::held::Portion;
use crate::epoch;
use crate::iommu::DerivedTable;
use ioasid_pagetable::{IovaRange, Runs};

impl Space {
    /// Reports what was written through leaves of a derived table in the range, and clears the marks. Says whether there
    /// was anything.
    pub(crate) fn take_written(
        &self,
        table: &dyn DerivedTable,
        range: IovaRange,
        mut report: impl FnMut(IovaRange),
    ) -> bool {
        let portion = Portion { range, largest: None };
        // Nothing is cut, so nothing can fail.
        let Ok(held) = self.hold(range, || std::iter::once(portion)) else { return false };
        let mut written = Runs::default();
        for run in held.runs().iter().filter_map(|run| run.intersection(&range)) {
            table.written(run, true, &mut |range| {
                written.push(range);
                report(range);
            });
        }
        if written.is_empty() {
            return false;
        }
        table.invalidate(&written);
        drop(held);
        epoch::wait_for_dma();
        self.sleeping().wait();
        true
    }
}
