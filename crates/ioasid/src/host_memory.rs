//! Memory of this process that devices reach by plain copies.
//!
//! A device may write to memory at any moment, also while the program reads it, exactly as real DMA does. So the
//! memory is never seen through a reference, only copied from and to; the contents of a copy that races with
//! another are unspecified, but nothing else is.

use std::io;
use std::ptr::NonNull;

/// A piece of this process's address space.
#[derive(Debug)]
pub(crate) struct HostMemory {
    pointer: NonNull<u8>,
    length: u64,
    /// The memory is an anonymous mapping of ours.
    owned: bool,
}

// SAFETY: the memory is only copied from and to, which is as sound from one thread as from another; see `new`.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Memory that belongs to somebody else.
    ///
    /// # Safety
    ///
    /// `pointer` is valid for reads and writes of `length` bytes until the value is dropped, and nobody holds a
    /// Rust reference to memory while devices may write it, other than through interior mutability.
    pub(crate) unsafe fn new(pointer: NonNull<u8>, length: u64) -> HostMemory {
        HostMemory { pointer, length, owned: false }
    }

    /// Fresh zeroed memory; the pages come when they are touched.
    pub(crate) fn anonymous(length: u64) -> io::Result<HostMemory> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let size = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let pointer =
            unsafe { mmap_anonymous(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        let pointer = NonNull::new(pointer.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(HostMemory { pointer, length, owned: true })
    }

    /// Whether the memory belongs to somebody else.
    pub(crate) fn is_borrowed(&self) -> bool {
        !self.owned
    }

    fn check(&self, offset: u64, length: usize) -> Option<usize> {
        let end = offset.checked_add(length as u64)?;
        (end <= self.length).then_some(offset as usize)
    }

    /// Copies out; `None`, and nothing done, if that is not all inside.
    #[inline]
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Option<()> {
        let offset = self.check(offset, buffer.len())?;
        // SAFETY: inside the memory, which is valid for reads; `buffer` is exclusive, so they do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.pointer.as_ptr().add(offset),
                buffer.as_mut_ptr(),
                buffer.len(),
            );
        }
        Some(())
    }

    /// Copies in; `None`, and nothing done, if that is not all inside.
    #[inline]
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let offset = self.check(offset, bytes.len())?;
        // SAFETY: inside the memory, which is valid for writes; nobody may hold a reference to it, so `bytes` lies
        // elsewhere.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer.as_ptr().add(offset), bytes.len());
        };
        Some(())
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: mapped in `anonymous` with this size, and nobody uses it any more.
            let result = unsafe { rustix::mm::munmap(self.pointer.as_ptr().cast(), self.length as usize) };
            debug_assert!(result.is_ok());
        }
    }
}
