//! Mapping.
//!
//! A map goes through these steps; whichever fails, those before it are undone in reverse, and what devices may
//! have seen meanwhile is invalidated.
//!
//! 1. The layout is read: the range must not be reserved.
//! 2. The native entries are claimed, absent to busy. From here on nobody else can map there, in any table.
//! 3. The derived tables are filled.
//! 4. The native entries are published, busy to present.
//!
//! A mapping that meets another operation at work gives everything back, waits outside of all sections, and
//! starts again.

use super::layout::Layout;
use super::{Patience, Permissions, Space};
use crate::epoch;
use crate::iommu::TableError;
use crate::iova::find_hole;
use crate::memory::Memory;
use ioasid_pagetable::{
    Attributes, ClaimError, Gather, Iova, IovaRange, MapError as EntryError, Oa, PageSize, Runs,
};
use std::sync::Arc;

/// Why nothing was mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Something is mapped there.
    #[error("something is mapped at {at:#x} already")]
    AlreadyMapped {
        /// The first address in the way.
        at: u64,
    },
    /// The addresses are reserved.
    #[error("{range} is reserved")]
    Reserved {
        /// The reserved range.
        range: IovaRange,
    },
    /// The range is empty or reaches past the last address.
    #[error("{length:#x} bytes at {iova} are no range of addresses")]
    NoRange {
        /// The first address.
        iova: Iova,
        /// The length asked for.
        length: u64,
    },
    /// The memory is shorter than that.
    #[error("{length:#x} bytes at {offset:#x} reach beyond the registered memory")]
    BeyondMemory {
        /// The first byte of the memory.
        offset: u64,
        /// The length asked for.
        length: u64,
    },
    /// Address, memory or length is not a multiple of the granule.
    #[error("address, memory and length must be multiples of {granule}")]
    Misaligned {
        /// The granule of the space.
        granule: PageSize,
    },
    /// Nobody could use the mapping.
    #[error("a mapping must be readable or writable")]
    NoPermission,
    /// No free place is large enough.
    #[error("no free place for {length:#x} bytes")]
    NoHole {
        /// The length asked for.
        length: u64,
    },
    /// The memory stands on another bus than the space.
    #[error("memory and space belong to different buses")]
    OtherBus,
    /// No memory for a table.
    #[error("no memory for another table page")]
    OutOfTables,
    /// A derived table refused.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What one try came to.
enum Try {
    Failed(MapError),
    /// Another operation was at work in the range.
    Contended,
}

impl From<ClaimError> for Try {
    fn from(error: ClaimError) -> Try {
        match error {
            ClaimError::Contended { .. } => Try::Contended,
            ClaimError::Map(EntryError::Occupied { at }) => Try::Failed(MapError::AlreadyMapped { at }),
            ClaimError::Map(EntryError::OutOfTables(_)) => Try::Failed(MapError::OutOfTables),
            // Range, alignment and output address were checked, and the native format takes all of them.
            ClaimError::Map(
                EntryError::OutOfRange { range }
                | EntryError::Misaligned { range, .. }
                | EntryError::NoMemoryType { range, .. },
            ) => Try::Failed(TableError::DoesNotFit { range }.into()),
            ClaimError::Map(EntryError::NoAccess { .. }) => Try::Failed(MapError::NoPermission),
            ClaimError::Map(EntryError::OutputOutOfRange { .. }) => {
                Try::Failed(TableError::DoesNotFit { range: IovaRange::ALL }.into())
            }
        }
    }
}

/// Memory of consecutive output addresses, and where it shall be mapped.
#[derive(Clone, Copy)]
struct Part {
    range: IovaRange,
    oa: Oa,
}

/// A mapping as it was asked for, checked.
struct Request<'a> {
    range: IovaRange,
    memory: &'a Memory,
    offset: u64,
    length: u64,
    attributes: Attributes,
}

impl Request<'_> {
    fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        let mut first = self.range.first();
        let pieces = self.memory.pieces(self.offset, self.length).into_iter().flatten();
        pieces.filter_map(move |piece| {
            let range = IovaRange::with_length(first, piece.length)?;
            first = first.wrapping_add(piece.length);
            Some(Part { range, oa: piece.oa })
        })
    }
}

impl Space {
    /// Maps `length` bytes of registered memory, from `offset` in it, at `iova`.
    ///
    /// Takes no lock, does no system call and charges nothing: all that was done when the memory was registered.
    /// The largest leaves that fit are used.
    pub fn map(
        self: &Arc<Self>,
        iova: Iova,
        memory: &Arc<Memory>,
        offset: u64,
        length: u64,
        permissions: Permissions,
    ) -> Result<(), MapError> {
        let range = IovaRange::with_length(iova.get(), length).ok_or(MapError::NoRange { iova, length })?;
        self.check(memory, offset, length, permissions)?;
        if !range.is_aligned(self.granule()) {
            return Err(MapError::Misaligned { granule: self.granule() });
        }
        memory.note_mapped(self, range);
        let request = Request { range, memory, offset, length, attributes: permissions.attributes() };
        let mut tries = Patience::default();
        loop {
            match self.try_map(&request) {
                Ok(()) => return Ok(()),
                Err(Try::Failed(error)) => return Err(error),
                Err(Try::Contended) => self.step_aside(&mut tries),
            }
        }
    }

    /// Maps the memory at the lowest free place among the allowed addresses, and returns it. Never 0.
    ///
    /// The place is aligned so that the largest leaves are possible, unless there is none left.
    pub fn map_anywhere(
        self: &Arc<Self>,
        memory: &Arc<Memory>,
        offset: u64,
        length: u64,
        permissions: Permissions,
    ) -> Result<Iova, MapError> {
        if length == 0 {
            return Err(MapError::NoRange { iova: Iova::new(0), length });
        }
        self.check(memory, offset, length, permissions)?;
        let largest = PageSize::SIZE_1G.bytes();
        let granule = self.granule().bytes();
        let alignment = length.checked_next_power_of_two().unwrap_or(largest).clamp(granule, largest);
        loop {
            let aligned = self.find_free(length, alignment);
            let found = aligned.or_else(|| self.find_free(length, granule));
            let Some(iova) = found else {
                // Addresses that were unmapped and not flushed yet are free in a moment.
                if self.flush_any() {
                    continue;
                }
                return Err(MapError::NoHole { length });
            };
            match self.map(iova, memory, offset, length, permissions) {
                Ok(()) => return Ok(iova),
                // Somebody else was faster; there are other places.
                Err(MapError::AlreadyMapped { .. } | MapError::Reserved { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn find_free(&self, length: u64, alignment: u64) -> Option<Iova> {
        let _operation = epoch::operation();
        let layout = self.layout.load();
        let conflict = |candidate| layout.reserved_in(candidate).or_else(|| self.occupied_run(candidate));
        let above_zero = IovaRange::new(1, u64::MAX)?;
        let windows = layout.windows().iter().filter_map(|window| window.intersection(&above_zero));
        windows.filter_map(|window| find_hole(window, length, alignment, conflict)).map(Iova::new).next()
    }

    fn check(
        &self,
        memory: &Memory,
        offset: u64,
        length: u64,
        permissions: Permissions,
    ) -> Result<(), MapError> {
        let none = Permissions::of(Attributes::empty());
        if permissions == none {
            return Err(MapError::NoPermission);
        }
        if !Arc::ptr_eq(memory.backing().bus(), self.bus()) {
            return Err(MapError::OtherBus);
        }
        let mut pieces = memory.pieces(offset, length).ok_or(MapError::BeyondMemory { offset, length })?;
        if length % self.granule().bytes() != 0
            || pieces.next().is_some_and(|piece| !piece.oa.is_aligned(self.granule()))
        {
            return Err(MapError::Misaligned { granule: self.granule() });
        }
        Ok(())
    }

    fn try_map(&self, request: &Request<'_>) -> Result<(), Try> {
        let operation = epoch::operation();
        let layout = self.layout.load();
        if let Some(range) = layout.reserved_in(request.range) {
            return Err(Try::Failed(MapError::Reserved { range }));
        }
        if layout.is_undecided(request.range) {
            return Err(Try::Contended);
        }
        let mut gather = Gather::new();
        let mut result = self.claim_parts(request, &mut gather);
        if result.is_ok() {
            match self.fill_followers(request, &layout) {
                Ok(()) => self.native.publish(request.range),
                Err(error) => {
                    drop(layout);
                    drop(operation);
                    // Devices behind these tables may have used what is gone now. The entries stay claimed until
                    // they have ended, but no layout change of any space has to wait for that.
                    epoch::wait_for_dma();
                    self.sleeping.wait();
                    let _operation = epoch::operation();
                    self.native.release(request.range, &mut gather);
                    result = Err(Try::Failed(error.into()));
                }
            }
        }
        epoch::retire(gather.retired);
        result
    }

    /// Claims the native entries of all parts, or of none.
    fn claim_parts(
        &self,
        request: &Request<'_>,
        gather: &mut Gather<ioasid_pagetable::HeapTables, std::sync::atomic::AtomicU64>,
    ) -> Result<(), Try> {
        for part in request.parts() {
            if let Err(error) = self.native.claim(part.range, part.oa, request.attributes, gather) {
                let claimed = part.range.first().checked_sub(1);
                if let Some(range) = claimed.and_then(|last| IovaRange::new(request.range.first(), last)) {
                    self.native.release(range, gather);
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Maps the claimed range in every derived table, or in none; then DMA that has used it may still be running.
    fn fill_followers(&self, request: &Request<'_>, layout: &Layout) -> Result<(), TableError> {
        for (position, table) in layout.filling().enumerate() {
            for part in request.parts() {
                let Err(error) = table.map(part.range, part.oa, request.attributes) else { continue };
                let mapped = part.range.first().checked_sub(1);
                let here = mapped.and_then(|last| IovaRange::new(request.range.first(), last));
                let mut visible = Runs::default();
                visible.push(request.range);
                if let Some(range) = here {
                    table.unmap(range);
                }
                table.invalidate(&visible);
                for earlier in layout.filling().take(position) {
                    earlier.unmap(request.range);
                    earlier.invalidate(&visible);
                }
                return Err(error);
            }
        }
        Ok(())
    }
}
