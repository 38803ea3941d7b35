//! Changing where what is mapped leads, in place.
//!
//! 1. The leaves of the range are [held](super::held); all of it has to be mapped. Leaves that are too large for the new
//!    memory's alignment are cut.
//! 2. Every derived table changes its leaves, and the native table's follow, each with one store: a device reaches the old
//!    memory or the new one, at no moment neither.
//! 3. What devices remember is invalidated, and the DMA that had begun is waited for. Until then the leaves are held, so
//!    that the old memory's owner, who looks whether it is still mapped somewhere, waits too.
//!
//! If a table refuses, those before it go back to what the native table still says, and the DMA that has reached the new
//! memory meanwhile is waited for.

use super::held::Portion;
use super::map::{MapError, Part, Parts, Request};
use super::protect::NativeCut;
use super::unmap::ALL_RIGHTS;
use super::{Permissions, Space};
use crate::iommu::{Change, TableError};
use crate::memory::Memory;
use crate::slice::StillBorrowed;
use ioasid_pagetable::{Iova, IovaRange, PageSize};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Why the range leads where it led before.
#[derive(Debug, thiserror::Error)]
pub enum RemapError {
    /// The memory could not be mapped there either.
    #[error(transparent)]
    Request(MapError),
    /// Something of the range is not mapped.
    #[error("nothing is mapped at {at:#x}")]
    NotMapped {
        /// The first such address.
        at: u64,
    },
    /// No memory for the tables that a cut needs.
    #[error("no memory for another table page")]
    OutOfTables,
    /// A derived table refused. [`TableError::NeedsBreak`]: what is mapped there has to be unmapped and mapped again.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A device model has borrowed some of it and does not let go.
    #[error(transparent)]
    Borrowed(#[from] StillBorrowed),
}

/// The largest leaf that can begin at both addresses at once, wherever their common offset lets one begin.
fn largest_leaf(part: &Part) -> PageSize {
    let apart = part.range.first() ^ part.oa.get();
    PageSize::from_log2(apart.trailing_zeros().min(63)).unwrap_or(PageSize::SIZE_4K)
}

impl Space {
    /// Lets `length` bytes at `iova`, all of them mapped, lead to other memory, from `offset` in it, with these
    /// permissions.
    ///
    /// Each leaf changes in one step: devices that use the range meanwhile reach the old memory or the new. When it
    /// returns no device reaches the old memory here, as after an unmap. On an error everything is as before, and the
    /// new memory is reached no more.
    ///
    /// ```
    /// use ioasid::{Account, Backing, Bus, Iova, Memory, Permissions, Space};
    ///
    /// let (bus, account) = (Bus::new(), Account::new("guest", None));
    /// let old = Memory::register(&Backing::anonymous(&bus, 2 << 20)?, 0, 2 << 20, &account)?;
    /// let new = Memory::register(&Backing::anonymous(&bus, 2 << 20)?, 0, 2 << 20, &account)?;
    /// let space = Space::new(&bus);
    /// space.map(Iova::new(0), &old, 0, 2 << 20, Permissions::READ_WRITE)?;
    /// // A page of it moves, while devices read and write all of it.
    /// space.remap(Iova::new(0x3000), &new, 0, 0x1000, Permissions::READ_WRITE)?;
    /// let page = space.query(Iova::new(0x3000)).unwrap();
    /// assert!(std::sync::Arc::ptr_eq(&space.object_at(page.oa).unwrap().0, new.backing()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn remap(
        self: &Arc<Self>,
        iova: Iova,
        memory: &Arc<Memory>,
        offset: u64,
        length: u64,
        permissions: Permissions,
    ) -> Result<(), RemapError> {
        let request =
            Request::new(self, iova, memory, offset, length, permissions).map_err(RemapError::Request)?;
        let range = request.range;
        for part in request.parts() {
            self.check_change(part.range, Change::Remap(part.oa, part.attributes))?;
        }
        memory.note_mapped(self, range);
        let portions = || {
            let portion = |part: Part| Portion { range: part.range, largest: Some(largest_leaf(&part)) };
            let mut portions = request.parts().map(portion).peekable();
            // Memory that has gone meanwhile has no parts. That is found out when what is mapped is held.
            let gone = portions.peek().is_none().then_some(Portion { range, largest: None });
            portions.chain(gone)
        };
        let (mut held, _recalled) = loop {
            let held = self.hold_unborrowed(range, ALL_RIGHTS, portions);
            let held = held.map_err(|error| match error {
                NativeCut::Borrowed(error) => error.into(),
                NativeCut::OutOfTables => RemapError::OutOfTables,
                NativeCut::Table(error) => RemapError::from(error),
            })?;
            // What is held is held within an operation, so from here on the memory stays where it is.
            request.check().map_err(RemapError::Request)?;
            // If it was given back and grown again while this waited, it may stand elsewhere by now.
            if self.all_fit(&request) {
                break held;
            }
        };
        let begins = held.runs().iter().next().filter(|run| run.first() == range.first());
        match begins {
            Some(run) if run == range => {}
            Some(run) => return Err(RemapError::NotMapped { at: run.last().wrapping_add(1) }),
            None => return Err(RemapError::NotMapped { at: range.first() }),
        }
        held.change_followers(
            |table| {
                let mut done = None;
                for part in request.parts() {
                    table.remap(part.range, part.oa, part.attributes).map_err(|error| (error, done))?;
                    done = IovaRange::new(range.first(), part.range.last());
                }
                Ok(())
            },
            |table, stretch| table.remap(stretch.range, stretch.oa, stretch.attributes),
        )?;
        for part in request.parts() {
            self.native.remap_held(part.range, part.oa, part.attributes);
        }
        held.invalidate();
        held.wait_for_dma();
        Ok(())
    }

    /// Whether every leaf of the range can lead to the memory's output addresses as it is.
    fn all_fit(&self, request: &Request<'_>) -> bool {
        request.parts().all(|part| {
            let mut fit = true;
            self.native.leaves(part.range, |leaf| {
                fit = part.range.covers(&leaf.range()) && leaf.size <= largest_leaf(&part);
                if fit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            fit
        })
    }
}
