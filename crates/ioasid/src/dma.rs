//! The last step of a DMA: from an output address to the bytes.
//!
//! An IOMMU that works in this process translates a device's address inside a DMA section ([`epoch::dma`]) and
//! then asks the space for the memory behind the output address. Memory of this process is copied there and
//! then. Memory that is reached by calls may block, so the copy leaves the section first; it stays counted with
//! the space, and an unmap waits for it all the same.

use crate::backing::{LateBound, Source};
use crate::bus::Window;
use crate::epoch::Section;
use crate::sleeping::SleepingCopy;
use crate::space::Space;
use ioasid_pagetable::{CachedWalk, Leaf, Oa, WalkFault};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

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
pub enum Translated<'a> {
    /// Memory of this process: to be copied before the section ends.
    Here(Here),
    /// Memory that is reached by calls: to be copied after the section has ended.
    Late(Late<'a>),
}

/// Memory of this process at an output address. It keeps the section open, however long it lives: without that
/// the memory could be freed under it.
#[derive(Debug)]
pub struct Here {
    _section: Section,
    window: arc_swap::Guard<Option<Arc<Window>>>,
    offset: u64,
    oa: Oa,
}

/// Memory behind calls at an output address. As long as this lives, unmaps of the space wait.
#[derive(Debug)]
pub struct Late<'a> {
    access: Arc<dyn LateBound>,
    offset: u64,
    oa: Oa,
    _copy: SleepingCopy<'a>,
}

impl Here {
    fn memory(&self) -> Result<(&crate::host_memory::HostMemory, u64), DmaError> {
        match self.window.as_ref().map(|window| (&*window.source, window.offset)) {
            Some((Source::Host(memory), base)) => Ok((memory, base + self.offset)),
            _ => Err(DmaError::NoMemory(self.oa)),
        }
    }

    /// Copies out of the memory.
    #[inline]
    pub fn read(&self, buffer: &mut [u8]) -> Result<(), DmaError> {
        let (memory, offset) = self.memory()?;
        memory.read(offset, buffer).ok_or(DmaError::Gone(self.oa))
    }

    /// Copies into the memory.
    #[inline]
    pub fn write(&self, bytes: &[u8]) -> Result<(), DmaError> {
        let (memory, offset) = self.memory()?;
        memory.write(offset, bytes).ok_or(DmaError::Gone(self.oa))
    }
}

impl Late<'_> {
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
        _section: &Section,
        iova: u64,
        cache: &mut CachedWalk<AtomicU64>,
    ) -> Result<Leaf, WalkFault> {
        self.native().walk_cached(iova, cache)
    }

    /// The memory at an output address that one of the space's tables has just given, in the same DMA section.
    #[inline]
    pub fn memory_at(&self, section: &Section, oa: Oa) -> Result<Translated<'_>, DmaError> {
        let (window, offset) = self.bus().find(oa.get()).ok_or(DmaError::NoMemory(oa))?;
        let late = match window.as_ref().map(|window| (&*window.source, window.offset)) {
            Some((Source::Late(access), base)) => Some((access.clone(), base)),
            _ => None,
        };
        Ok(match late {
            None => Translated::Here(Here { _section: section.nested(), window, offset, oa }),
            Some((access, base)) => {
                Translated::Late(Late { access, offset: base + offset, oa, _copy: self.sleeping().begin() })
            }
        })
    }
}
