//! Unmapping: exactly the range, whatever leaves it was mapped with.
//!
//! 1. The ends of the range are made boundaries between leaves, in the native and in every derived table. All that
//!    can fail happens here, and nothing has changed for anybody.
//! 2. The native leaves are retracted, present to busy. They translate no more, and nobody can map there yet.
//! 3. The derived tables are emptied and invalidated.
//! 4. Whatever DMA had begun before is waited for.
//! 5. The native entries are released, busy to absent.
//!
//! When that is done no device reaches the memory, and its owner may do with it what it likes.

use super::layout::Layout;
use super::{Space, step_aside};
use crate::epoch;
use crate::iommu::TableError;
use crate::memory::Piece;
use ioasid_pagetable::{CutError, Gather, HeapTables, IovaRange, PageSize, RetractError, Runs};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;

/// What an unmap took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    runs: Runs,
    leaves: u64,
}

impl Unmapped {
    /// The ranges that were mapped, ascending, neighbours joined.
    pub fn runs(&self) -> impl Iterator<Item = IovaRange> + '_ {
        self.runs.iter()
    }

    /// How many bytes were mapped; saturates at 2^64 - 1.
    pub fn bytes(&self) -> u64 {
        self.runs.bytes()
    }

    /// How many leaves of the native table that took.
    pub fn leaves(&self) -> u64 {
        self.leaves
    }
}

/// Why nothing was unmapped.
#[derive(Debug, thiserror::Error)]
pub enum UnmapError {
    /// An end of the range is not on a multiple of the granule.
    #[error("{range} does not begin and end on multiples of {granule}")]
    Misaligned {
        /// The range asked for.
        range: IovaRange,
        /// The granule of the space.
        granule: PageSize,
    },
    /// No memory for the tables that a cut needs.
    #[error("no memory for another table page")]
    OutOfTables,
    /// A derived table refused to be cut.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// Why a step has to be tried again or given up.
enum Step {
    /// Another operation was at work in the range.
    Contended,
    Failed(UnmapError),
}

impl From<CutError> for Step {
    fn from(error: CutError) -> Step {
        match error {
            CutError::Contended { .. } => Step::Contended,
            CutError::OutOfTables(_) => Step::Failed(UnmapError::OutOfTables),
            CutError::NeedsBreak { at, .. } | CutError::Misaligned { at } => {
                Step::Failed(TableError::CannotCut { at }.into())
            }
        }
    }
}

impl Space {
    /// Unmaps exactly the range. Where nothing is mapped nothing happens, and what was mapped is reported.
    ///
    /// When it returns, no device reaches the memory that was mapped there.
    pub fn unmap(&self, range: IovaRange) -> Result<Unmapped, UnmapError> {
        if !range.is_aligned(self.granule()) {
            return Err(UnmapError::Misaligned { range, granule: self.granule() });
        }
        let mut gather = Gather::new();
        let mut rest = range;
        let mut tries = 0;
        loop {
            let operation = epoch::operation();
            let layout = self.layout.load();
            match self.cut_and_retract(range, &mut rest, &layout, &mut gather) {
                Ok(()) => {
                    self.settle(&layout, &mut gather);
                    return Ok(Unmapped { runs: gather.runs, leaves: gather.leaves });
                }
                Err(Step::Contended) => {
                    drop(layout);
                    drop(operation);
                    step_aside(&mut tries);
                }
                Err(Step::Failed(error)) => {
                    // What was retracted goes back to where it was.
                    for run in gather.runs.iter() {
                        self.native.publish(run);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Steps 1 and 2, for what is left of the range. What was retracted is in the gather.
    fn cut_and_retract(
        &self,
        range: IovaRange,
        rest: &mut IovaRange,
        layout: &Layout,
        gather: &mut Gather<HeapTables, AtomicU64>,
    ) -> Result<(), Step> {
        if rest.first() == range.first() && gather.runs.is_empty() {
            self.native.cut_claimed(range)?;
        }
        for table in layout.derived() {
            table.cut(range).map_err(|error| Step::Failed(error.into()))?;
        }
        match self.native.retract(*rest, gather) {
            Ok(()) => Ok(()),
            Err(RetractError::Contended { at }) => {
                *rest = IovaRange::new(at.max(rest.first()), rest.last()).unwrap_or(*rest);
                Err(Step::Contended)
            }
            Err(RetractError::Cut(error)) => Err(error.into()),
        }
    }

    /// Steps 3 to 5.
    fn settle(&self, layout: &Layout, gather: &mut Gather<HeapTables, AtomicU64>) {
        for table in layout.derived() {
            for run in gather.runs.iter() {
                table.unmap(run);
            }
            table.invalidate(&gather.runs);
        }
        if layout.table_count() > 0 && !gather.runs.is_empty() {
            epoch::wait_for_dma();
            self.sleeping.wait();
        }
        let runs = gather.runs.clone();
        for run in runs.iter() {
            self.native.release(run, gather);
        }
        epoch::retire(std::mem::take(&mut gather.retired));
    }

    /// Unmaps every leaf within `hull` that leads to one of the pieces of memory, which are about to go.
    pub(crate) fn unmap_outputs(&self, hull: IovaRange, pieces: &[Piece]) {
        let mut found: Vec<IovaRange> = Vec::new();
        {
            let _operation = epoch::operation();
            self.native.leaves(hull, |leaf| {
                for piece in pieces {
                    // The part of the leaf that leads into the piece.
                    let (leaf_first, piece_first) = (leaf.oa.get(), piece.oa.get());
                    let first = leaf_first.max(piece_first);
                    let last = (leaf_first + (leaf.size.bytes() - 1)).min(piece_first + (piece.length - 1));
                    let part = |oa: u64| leaf.iova + (oa - leaf_first);
                    if first <= last {
                        found.extend(IovaRange::new(part(first), part(last)));
                    }
                }
                ControlFlow::Continue(())
            });
        }
        let granule = self.granule().bytes() - 1;
        for run in found {
            let Some(range) = IovaRange::new(run.first() & !granule, run.last() | granule) else { continue };
            let mut tries = 0;
            // The memory must not stay reachable. Without memory for a cut, or with a table that cannot be cut,
            // whole leaves go instead: more than was asked, but never less.
            while let Err(error) = self.unmap(range) {
                match error {
                    UnmapError::OutOfTables | UnmapError::Table(_) if tries < 3 => step_aside(&mut tries),
                    _ => {
                        self.unmap_whole_leaves(range);
                        break;
                    }
                }
            }
        }
    }

    /// Unmaps every leaf that has an address in the range.
    fn unmap_whole_leaves(&self, range: IovaRange) {
        for leaf in self.leaves(range) {
            // Its ends are boundaries already, so nothing has to be cut.
            let _ = self.unmap(leaf.range());
        }
    }
}
