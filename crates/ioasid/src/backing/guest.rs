//! Guest memory as vm-memory keeps it: regions that are mapped in this process.
//!
//! A region that is a shared mapping of a file is a part of that file, so its pages are the same pages wherever the file is
//! registered from. Any other region is an object by itself, which the backing keeps mapped.

use super::{Backing, Bytes, FileError, Source};
use crate::bus::{Bus, Identity};
use crate::host_memory::HostMemory;
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestRegionMmap, MmapRegion};

/// Why a region of guest memory is no object.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The region is mapped so that this process cannot read and write it.
    #[error("the region is not mapped for reading and writing")]
    NotWritable,
    /// The region's file cannot be used.
    #[error("the file of the region cannot be used")]
    File(#[from] FileError),
}

impl Backing {
    /// The object that a region of guest memory belongs to, and where in the object the region begins, in bytes.
    ///
    /// vm-memory copies to and from its mappings plainly, and so do devices here: whoever makes the region's file shorter
    /// ends this process, with or without us. So the file counts as a [trusted](Self::trusted_file) one.
    ///
    /// # Errors
    ///
    /// [`RegionError`]: not mapped for reading and writing, or a file that is not.
    pub fn guest_region<B>(
        bus: &Arc<Bus>,
        region: &GuestRegionMmap<B>,
    ) -> Result<(Arc<Backing>, u64), RegionError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mapping: Arc<MmapRegion<B>> = region.get_mmap();
        let both = libc::PROT_READ | libc::PROT_WRITE;
        if mapping.prot() & both != both {
            return Err(RegionError::NotWritable);
        }
        if let Some(part) = mapping.file_offset().filter(|_| mapping.flags() & libc::MAP_SHARED != 0) {
            return Ok((Backing::trusted_file(bus, part.file())?, part.start()));
        }
        let pointer = NonNull::new(mapping.as_ptr()).ok_or(RegionError::NotWritable)?;
        let length = mapping.size() as u64;
        let identity = Identity::Region(Arc::as_ptr(&mapping).addr());
        let backing = bus.find_or_make(identity, || {
            let keeper: Arc<dyn Any + Send + Sync> = mapping;
            // SAFETY: the mapping is of this size and allows both, as long as the region lives. vm-memory makes no
            // references to it, only volatile accesses.
            let memory = unsafe { HostMemory::kept(pointer, length, keeper) };
            let bytes = Bytes::Whole { source: Arc::new(Source::Host(memory)), length: Some(length) };
            Ok::<_, RegionError>(Backing::new(bus, bytes, Some(identity)))
        })?;
        Ok((backing, 0))
    }
}
