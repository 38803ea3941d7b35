//! Users of an address space that are no devices: they pin what is mapped, or have it copied.
//!
//! Neither needs a table. A pin registers memory and keeps it until the user lets go, which an unmap asks it to; a copy is waited for.

use std::sync::{Arc, PoisonError, RwLockReadGuard};

use ioasid::{IovaRange, Memory};
use rustix::io::Errno;

use super::super::testing::{Access, PinnedPiece};
use super::{Ioas, Slice};
use crate::limits::Taken;
use crate::memory::{PAGE_SIZE, Pages};
use crate::poison::lock;

/// A piece of an area that software is going to copy.
#[derive(Debug)]
pub(crate) struct PieceToCopy {
    source: Slice,
    /// The area's memory, if it is registered, and where the piece is in it.
    registered: Option<(Arc<Memory>, u64)>,
}

impl PieceToCopy {
    pub(crate) fn length(&self) -> u64 {
        self.source.length
    }

    /// Memory that holds the piece: the area's, or for as long as the caller keeps it.
    ///
    /// # Errors
    /// See [`Pages::register`].
    pub(crate) fn memory(&self) -> Result<Arc<Memory>, Errno> {
        match &self.registered {
            Some((memory, _)) => Ok(Arc::clone(memory)),
            None => self.source.pages.register(self.source.offset, self.source.length),
        }
    }

    /// Where in [`PieceToCopy::memory`] the piece begins.
    pub(crate) fn offset(&self) -> u64 {
        self.registered.as_ref().map_or(0, |(_, offset)| *offset)
    }
}

fn may_access(pages: &Pages, write: bool) -> Result<(), Errno> {
    if !pages.is_accessible() {
        Err(Errno::INVAL)
    } else if write && !pages.writable() {
        Err(Errno::PERM)
    } else {
        Ok(())
    }
}

impl Ioas {
    /// Lets an access use the space.
    ///
    /// # Errors
    /// `EADDRINUSE`: it pins pages, and an area is not aligned to pages.
    pub(crate) fn add_access(&self, access: &Arc<Access>) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        if access.pins_pages() && !state.all_aligned(PAGE_SIZE) {
            return Err(Errno::ADDRINUSE);
        }
        state.accesses.push(Arc::clone(access));
        Ok(())
    }

    /// Ends an access's use of the space, and what it has pinned.
    pub(crate) fn remove_access(&self, access: &Arc<Access>) {
        let mut state = lock(&self.state);
        access.let_go(IovaRange::ALL);
        state.accesses.retain(|other| !Arc::ptr_eq(other, access));
    }

    /// Registers what is mapped in `range` for `access`; returns the number of the pin and what it holds, in order.
    ///
    /// # Errors
    /// `ENOENT`: a byte of it belongs to no area. `EPERM`: the memory may not be written. `EINVAL`: it is a dma-buf's.
    /// `ENOMEM`: too many pins, or over the account's limit. `EFAULT`: the memory is not there.
    pub(crate) fn pin(
        &self,
        access: &Access,
        range: IovaRange,
        write: bool,
    ) -> Result<(u32, Vec<PinnedPiece>), Errno> {
        let state = lock(&self.state);
        let pieces = state.areas.pieces(range).ok_or(Errno::NOENT)?;
        let share = Taken::some(&self.budget, pieces.len())?;
        let mut pinned = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let Slice { pages, offset, .. } = &piece.payload.source;
            may_access(pages, write)?;
            let length = piece.range.length().ok_or(Errno::INVAL)?;
            let source = Slice { pages: Arc::clone(pages), offset: offset + piece.offset, length };
            let memory = pages.register(source.offset, length)?;
            pinned.push(PinnedPiece { source, memory });
        }
        let id = access.enter_pin(range, pinned.clone(), share)?;
        Ok((id, pinned))
    }

    /// Held while software copies what [`Ioas::pieces_to_copy`] finds.
    pub(crate) fn begin_copies(&self) -> RwLockReadGuard<'_, ()> {
        self.copies.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no copy is running that began before.
    pub(super) fn wait_for_copies(&self) {
        drop(self.copies.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// The memory under `range`, to be copied between [`Ioas::begin_copies`] and the end of that.
    ///
    /// # Errors
    /// `ENOENT`: a byte of it belongs to no area. `EPERM`: it may not be written. `EINVAL`: it is a dma-buf's.
    pub(crate) fn pieces_to_copy(&self, range: IovaRange, write: bool) -> Result<Vec<PieceToCopy>, Errno> {
        let state = lock(&self.state);
        let pieces = state.areas.pieces(range).ok_or(Errno::NOENT)?;
        pieces
            .into_iter()
            .map(|piece| {
                let area = piece.payload;
                may_access(&area.source.pages, write)?;
                let length = piece.range.length().ok_or(Errno::INVAL)?;
                let offset = area.source.offset + piece.offset;
                let source = Slice { pages: Arc::clone(&area.source.pages), offset, length };
                let registered = area.memory.as_ref();
                let registered =
                    registered.map(|part| (Arc::clone(&part.memory), part.offset + piece.offset));
                Ok(PieceToCopy { source, registered })
            })
            .collect()
    }
}
