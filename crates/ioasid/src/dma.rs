//! The last step of a DMA: from an output address to the bytes.
//!
//! An IOMMU that works in this process translates a device's address inside a DMA section ([`epoch::dma`]) and
//! then asks the space for the memory behind the output address. Memory of this process is copied there and
//! then. Memory that is reached by calls may block, so the copy leaves the section first; it stays counted with
//! the space, and an unmap waits for it all the same.

use crate::backing::{LateBound, Source};
use crate::epoch::DmaSection;
use crate::host_memory::HostMemory;
use crate::sleeping::SleepingCopy;
use crate::space::Space;
use ioasid_pagetable::{CachedWalk, Leaf, Oa, WalkFault};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Why translated bytes could not be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// No memory stands at the output address.
    #[error("no memory stands at the output address {0}")]
    NoMemory(Oa),
    /// The memory is there no more, or is shorter.
    #[error("the memory at the output address {0} is gone")]
    Gone(Oa),
}

/// Memory that an output address leads to.
#[derive(Debug)]
pub enum Translated<'section> {
    /// Memory of this process: to be copied before the section ends.
    Here(Here<'section>),
    /// Memory that is reached by calls: to be copied after the section has ended.
    Late(Late),
}

/// Memory of this process at an output address. It borrows the section, without which the memory could be freed under
/// it.
#[derive(Clone, Copy, Debug)]
pub struct Here<'section> {
    memory: &'section HostMemory,
    offset: u64,
    /// Bytes to the end of the window.
    length: u64,
    oa: Oa,
}

/// Memory behind calls at an output address. As long as this lives, unmaps of the space wait.
#[derive(Debug)]
pub struct Late {
    access: Arc<dyn LateBound>,
    offset: u64,
    /// Bytes to the end of the window.
    length: u64,
    oa: Oa,
    _copy: SleepingCopy,
}

impl Here<'_> {
    /// How many bytes of the same object there are from here on.
    #[inline(always)]
    pub fn length(&self) -> u64 {
        self.length.min(self.memory.length().saturating_sub(self.offset))
    }

    /// Copies out of the memory. An aligned read of 1, 2, 4 or 8 bytes happens at once.
    #[inline]
    pub fn read(&self, buffer: &mut [u8]) -> Result<(), DmaError> {
        self.memory.read(self.offset, buffer).ok_or(DmaError::Gone(self.oa))
    }

    /// Copies into the memory. An aligned write of 1, 2, 4 or 8 bytes happens at once.
    #[inline]
    pub fn write(&self, bytes: &[u8]) -> Result<(), DmaError> {
        self.memory.write(self.offset, bytes).ok_or(DmaError::Gone(self.oa))
    }

    /// Copies `length` bytes from other memory, which may overlap this.
    #[inline]
    pub fn copy_from(&self, source: &Here<'_>, length: usize) -> Result<(), DmaError> {
        let source_end = source.offset.checked_add(length as u64);
        if source_end.is_none_or(|end| end > source.memory.length()) {
            return Err(DmaError::Gone(source.oa));
        }
        self.memory
            .copy_from(self.offset, source.memory, source.offset, length)
            .ok_or(DmaError::Gone(self.oa))
    }

    /// The 4 bytes there as an atomic of the CPU; `None` if they are not aligned, or not all there.
    pub fn atomic_u32(&self) -> Option<&AtomicU32> {
        self.memory.atomic_u32(self.offset)
    }

    /// The 8 bytes there as an atomic of the CPU; `None` if they are not aligned, or not all there.
    pub fn atomic_u64(&self) -> Option<&AtomicU64> {
        self.memory.atomic_u64(self.offset)
    }
}

impl Late {
    /// How many bytes of one object there are from here on, as far as the bus knows.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Copies out of the memory; may block.
    pub fn read(&self, buffer: &mut [u8]) -> Result<(), DmaError> {
        self.access.read(self.offset, buffer).map_err(|_| DmaError::Gone(self.oa))
    }

    /// Copies into the memory; may block.
    pub fn write(&self, bytes: &[u8]) -> Result<(), DmaError> {
        self.access.write(self.offset, bytes).map_err(|_| DmaError::Gone(self.oa))
    }
}

impl Space {
    /// Walks the native table for a device, within a DMA section. `cache` may have served any table before.
    #[inline]
    pub fn walk_for_dma(
        &self,
        _section: &DmaSection,
        iova: u64,
        cache: &mut CachedWalk<AtomicU64>,
    ) -> Result<Leaf, WalkFault> {
        self.native().walk_cached(iova, cache)
    }

    /// The memory at an output address that one of the space's tables has just given, in the same DMA section.
    #[inline(always)]
    pub fn memory_at<'section>(
        &'section self,
        section: &'section DmaSection,
        oa: Oa,
    ) -> Result<Translated<'section>, DmaError> {
        let (window, within, length) = self.bus().find(section, oa.get()).ok_or(DmaError::NoMemory(oa))?;
        let offset = window.offset + within;
        Ok(match &*window.source {
            Source::Host(memory) => Translated::Here(Here { memory, offset, length, oa }),
            Source::Late(access) => Translated::Late(Late {
                access: access.clone(),
                offset,
                length,
                oa,
                _copy: self.sleeping().begin(),
            }),
        })
    }
}
