//! Making large leaves of small ones, on request.
//!
//! The native table merges beside other operations: leaves that somebody owns are left as they are. A derived table is
//! merged block by block, each held meanwhile, because whoever holds a block natively has it to himself in every table.
//! No translation changes, and no device notices.

use super::Space;
use super::held::Portion;
use crate::epoch;
use ioasid_pagetable::{Gather, IovaRange};

/// Derived tables are merged in blocks of so many bytes: the largest leaves that they are likely to have, and little
/// enough for others to wait for.
const BLOCK: u64 = 1 << 30;

impl Space {
    /// Makes the largest leaves possible of what is mapped in the range, in every table that can do so while devices use
    /// it. How many table pages that saved.
    ///
    /// What other operations are at work on, and pages at the ends that do not make a whole leaf within the range, stay as
    /// they are. Mappings that continue each other become one, unless the space [counts its mappings or keeps them
    /// whole](super::MappingPolicy).
    pub fn merge(&self, range: IovaRange) -> u64 {
        let mut gather = Gather::new();
        let mut saved = {
            let _operation = epoch::operation();
            let saved = if self.policy.knows_mappings() {
                self.native.merge_claimed(range, &mut gather)
            } else {
                self.native.merge_joining(range, &mut gather)
            };
            epoch::retire(gather.retired);
            saved
        };
        let mut next = Some(range.first());
        while let Some(first) = next {
            let Some(rest) = IovaRange::new(first, range.last()) else { break };
            // No need to stop where nothing is mapped, or where nobody follows.
            let Some(first) = self.next_followed(rest) else { break };
            let Some(block) = IovaRange::new(first, (first | (BLOCK - 1)).min(range.last())) else { break };
            let portion = Portion { range: block, largest: None };
            // Nothing is cut, so nothing can fail.
            let Ok(held) = self.hold(block, || std::iter::once(portion)) else { break };
            let mut end = block.last();
            for run in held.runs().iter().filter_map(|run| run.intersection(&range)) {
                end = end.max(run.last());
                for table in held.layout().into_iter().flat_map(|layout| layout.derived()) {
                    let merged = table.merge(run);
                    saved += merged;
                    if merged > 0 {
                        held.invalidate_in(&**table, run);
                    }
                }
            }
            next = end.checked_add(1);
        }
        saved
    }

    /// The first address in the range that is mapped, or may be in a moment, if a derived table follows.
    fn next_followed(&self, range: IovaRange) -> Option<u64> {
        let layout = self.layout.read();
        layout.derived().next()?;
        Some(self.occupied_in(range)?.first().max(range.first()))
    }
}
