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
use super::{Permissions, Space};
use crate::epoch;
use crate::iommu::TableError;
use crate::memory::{Memory, Unavailable};
use ioasid_pagetable::{
    Attributes, ClaimError, Gather, HeapTables, Iova, IovaRange, MapError as EntryError, Oa, PageSize, Runs,
};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

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
    /// The memory was taken back from everybody.
    #[error("the memory was revoked")]
    Revoked,
    /// The memory is shorter than that, or was given back there.
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
    /// The space has as many mappings as its [policy](super::MappingPolicy) allows.
    #[error("the space may not have more than {most} mappings")]
    TooManyMappings {
        /// How many are allowed.
        most: u64,
    },
    /// No memory for a table.
    #[error("no memory for another table page")]
    OutOfTables,
    /// A derived table refused.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What one try came to.
pub(super) enum Try {
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
pub(super) struct Part {
    pub(super) range: IovaRange,
    pub(super) oa: Oa,
    pub(super) attributes: Attributes,
}

/// What shall be mapped: parts that ascend within a range, the same each time they are asked for.
pub(super) trait Parts {
    /// The parts follow each other without holes.
    const WHOLE: bool;

    fn range(&self) -> IovaRange;

    fn parts(&self) -> impl Iterator<Item = Part>;

    /// The only part, where that is known at once. Asked in the operation in which it becomes visible, after the check.
    #[inline(always)]
    fn only(&self) -> Option<Part> {
        None
    }

    /// Asked in the operation in which the parts become visible: whether they still may. If so they stay the same until
    /// the operation ends, and whoever takes the memory away meanwhile waits for that and finds them.
    fn check(&self) -> Result<(), MapError>;
}

/// A mapping as it was asked for, checked.
pub(super) struct Request<'a> {
    pub(super) range: IovaRange,
    memory: &'a Memory,
    offset: u64,
    length: u64,
    attributes: Attributes,
}

impl<'a> Request<'a> {
    /// Checks what can be known before anything is tried.
    pub(super) fn new(
        space: &Space,
        iova: Iova,
        memory: &'a Memory,
        offset: u64,
        length: u64,
        permissions: Permissions,
    ) -> Result<Request<'a>, MapError> {
        let range = IovaRange::with_length(iova.get(), length).ok_or(MapError::NoRange { iova, length })?;
        space.check(memory, offset, length, permissions)?;
        if !range.is_aligned(space.granule()) {
            return Err(MapError::Misaligned { granule: space.granule() });
        }
        Ok(Request { range, memory, offset, length, attributes: permissions.attributes() })
    }
}

impl Parts for Request<'_> {
    const WHOLE: bool = true;

    fn range(&self) -> IovaRange {
        self.range
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        let mut first = self.range.first();
        let pieces = self.memory.pieces(self.offset, self.length).into_iter().flatten();
        pieces.filter_map(move |piece| {
            let range = IovaRange::with_length(first, piece.length)?;
            first = first.wrapping_add(piece.length);
            Some(Part { range, oa: piece.oa, attributes: self.attributes })
        })
    }

    #[inline(always)]
    fn only(&self) -> Option<Part> {
        let oa = self.memory.only_output(self.offset, self.length)?;
        Some(Part { range: self.range, oa, attributes: self.attributes })
    }

    fn check(&self) -> Result<(), MapError> {
        available(self.memory, self.offset, self.length)
    }
}

/// Whether these bytes of the memory can be mapped now.
fn available(memory: &Memory, offset: u64, length: u64) -> Result<(), MapError> {
    memory.check(offset, length).map_err(|error| match error {
        Unavailable::Revoked => MapError::Revoked,
        Unavailable::NotRegistered => MapError::BeyondMemory { offset, length },
    })
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
        let request = Request::new(self, iova, memory, offset, length, permissions)?;
        memory.note_mapped(self, request.range);
        let mut tries = 0;
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
            let Some(place) = self.propose(length, &[alignment, granule]) else {
                // Addresses that were unmapped and not flushed yet are free in a moment.
                if self.flush_any() {
                    continue;
                }
                return Err(MapError::NoHole { length });
            };
            let iova = Iova::new(place.first());
            match self.map(iova, memory, offset, length, permissions) {
                Ok(()) => return Ok(iova),
                // Somebody else has mapped there; there are other places.
                Err(MapError::AlreadyMapped { .. } | MapError::Reserved { .. }) => self.learn(place),
                Err(error) => {
                    self.propose_again(place);
                    return Err(error);
                }
            }
        }
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
        let Some(oa) = memory.first_output(offset, length) else {
            available(memory, offset, length)?;
            return Err(MapError::BeyondMemory { offset, length });
        };
        if length % self.granule().bytes() != 0 || !oa.is_aligned(self.granule()) {
            return Err(MapError::Misaligned { granule: self.granule() });
        }
        Ok(())
    }

    /// Maps all parts, or none. Everything that must not go meanwhile is the caller's to keep.
    #[inline]
    pub(super) fn try_map<P: Parts>(&self, request: &P) -> Result<(), Try> {
        let layout = self.layout.read();
        let range = request.range();
        if let Some(range) = layout.reserved_in(range) {
            return Err(Try::Failed(MapError::Reserved { range }));
        }
        if layout.is_undecided(range) {
            return Err(Try::Contended);
        }
        request.check().map_err(Try::Failed)?;
        let only = request.only();
        let counted = self.count_in(request)?;
        let mut gather = Gather::new();
        let mut result = match only {
            Some(Part { range, oa, attributes }) => {
                self.native.claim(range, oa, attributes, &mut gather).map_err(Try::from)
            }
            None => self.claim_parts(request, &mut gather),
        };
        if result.is_ok() {
            match self.fill_followers(request, only, &layout) {
                Ok(()) if P::WHOLE => self.native.publish(range),
                Ok(()) => request.parts().for_each(|part| self.native.publish(part.range)),
                Err(error) => {
                    drop(layout);
                    // Devices behind these tables may have used what is gone now. The entries stay claimed until
                    // they have ended, but no layout change of any space has to wait for that.
                    epoch::wait_for_dma();
                    self.sleeping.wait();
                    let _operation = epoch::operation();
                    // The parts are the same still: whoever takes the memory away waits for these entries first.
                    request.parts().for_each(|part| self.native.release(part.range, &mut gather));
                    result = Err(Try::Failed(error.into()));
                }
            }
        }
        if result.is_err() {
            self.mappings.count_out(counted);
        }
        epoch::retire(gather.retired);
        if result.is_err() {
            self.propose_again(request.range());
        }
        result
    }

    /// Counts the mappings that are about to be made, if the space counts them.
    #[inline]
    fn count_in(&self, request: &impl Parts) -> Result<u64, Try> {
        let Some(most) = self.policy.most else { return Ok(0) };
        let mut end = None;
        let begin = |part: &Part| end.replace(part.range.last().wrapping_add(1)) != Some(part.range.first());
        let count = request.parts().filter(begin).count() as u64;
        if self.mappings.count_in(count, most) {
            Ok(count)
        } else {
            Err(Try::Failed(MapError::TooManyMappings { most }))
        }
    }

    /// Claims the native entries of all parts, or of none.
    fn claim_parts(
        &self,
        request: &impl Parts,
        gather: &mut Gather<HeapTables, AtomicU64>,
    ) -> Result<(), Try> {
        let mut end = None;
        for (number, part) in request.parts().enumerate() {
            let Part { range, oa, attributes } = part;
            if let Err(error) = self.native.claim(range, oa, attributes, gather) {
                request.parts().take(number).for_each(|part| self.native.release(part.range, gather));
                return Err(error.into());
            }
            if end == Some(range.first()) {
                // Memory in several pieces is one mapping all the same.
                self.native.set_beginning(range.first(), false);
            }
            end = range.last().checked_add(1);
        }
        Ok(())
    }

    /// Maps the claimed range in every derived table, or in none; then DMA that has used it may still be running.
    #[inline(always)]
    fn fill_followers(
        &self,
        request: &impl Parts,
        only: Option<Part>,
        layout: &Layout,
    ) -> Result<(), TableError> {
        for (position, table) in layout.filling().enumerate() {
            let filled = match only {
                Some(Part { range, oa, attributes }) => {
                    table.map(range, oa, attributes).map_err(|error| (0, error))
                }
                None => request.parts().enumerate().try_for_each(|(number, part)| {
                    table.map(part.range, part.oa, part.attributes).map_err(|error| (number, error))
                }),
            };
            if let Err((number, error)) = filled {
                Self::empty_followers(request, layout, position, number);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes back what was mapped in the first tables, and in the one at `position` of the first parts.
    #[cold]
    fn empty_followers(request: &impl Parts, layout: &Layout, position: usize, parts: usize) {
        let mut visible = Runs::default();
        request.parts().for_each(|part| visible.push(part.range));
        for (number, table) in layout.filling().take(position + 1).enumerate() {
            let parts = if number == position { parts } else { usize::MAX };
            request.parts().take(parts).for_each(|part| table.unmap(part.range));
            table.invalidate(&visible);
        }
    }
}
