//! Memory of this process that devices reach by plain copies.
//!
//! A device may write to memory at any moment, also while the program reads it, exactly as real DMA does. So the
//! memory is never seen through a reference, only copied from and to; the contents of a copy that races with
//! another are unspecified, but nothing else is.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

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

    /// How many bytes there are.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Where the byte at `offset` is, if the memory has so many more from there on.
    #[inline(always)]
    pub(crate) fn at(&self, offset: u64, length: usize) -> Option<NonNull<u8>> {
        let end = offset.checked_add(length as u64)?;
        // SAFETY: at most the end of the memory.
        (end <= self.length).then(|| unsafe { self.pointer.add(offset as usize) })
    }

    /// Copies out; `None`, and nothing done, if that is not all inside.
    ///
    /// What fits a register and is aligned is read at once: devices and drivers tell each other with single words how
    /// far they are.
    #[inline]
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Option<()> {
        let from = self.at(offset, buffer.len())?;
        if let (8, true) = (buffer.len(), from.cast::<u64>().is_aligned()) {
            // SAFETY: inside the memory and aligned, and what others do to it is not a Rust reference's business.
            let word = unsafe { from.cast::<AtomicU64>().as_ref() };
            buffer.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
            return Some(());
        }
        if let (4, true) = (buffer.len(), from.cast::<u32>().is_aligned()) {
            // SAFETY: as above.
            let word = unsafe { from.cast::<AtomicU32>().as_ref() };
            buffer.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
            return Some(());
        }
        if let (2, true) = (buffer.len(), from.cast::<u16>().is_aligned()) {
            // SAFETY: as above.
            let word = unsafe { from.cast::<AtomicU16>().as_ref() };
            buffer.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
            return Some(());
        }
        // SAFETY: inside the memory, which is valid for reads; `buffer` is exclusive, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), buffer.as_mut_ptr(), buffer.len()) };
        Some(())
    }

    /// Copies in; `None`, and nothing done, if that is not all inside. Small aligned writes happen at once.
    #[inline]
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let to = self.at(offset, bytes.len())?;
        if let (Ok(bytes), true) = (bytes.try_into(), to.cast::<u64>().is_aligned()) {
            // SAFETY: inside the memory and aligned, and what others do to it is not a Rust reference's business.
            let word = unsafe { to.cast::<AtomicU64>().as_ref() };
            word.store(u64::from_ne_bytes(bytes), Ordering::Release);
            return Some(());
        }
        if let (Ok(bytes), true) = (bytes.try_into(), to.cast::<u32>().is_aligned()) {
            // SAFETY: as above.
            let word = unsafe { to.cast::<AtomicU32>().as_ref() };
            word.store(u32::from_ne_bytes(bytes), Ordering::Release);
            return Some(());
        }
        if let (Ok(bytes), true) = (bytes.try_into(), to.cast::<u16>().is_aligned()) {
            // SAFETY: as above.
            let word = unsafe { to.cast::<AtomicU16>().as_ref() };
            word.store(u16::from_ne_bytes(bytes), Ordering::Release);
            return Some(());
        }
        // SAFETY: inside the memory, which is valid for writes; nobody may hold a reference to it, so `bytes` lies
        // elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Some(())
    }

    /// Copies from memory that may be the same; `None`, and nothing done, if that is not all inside of both.
    #[inline]
    pub(crate) fn copy_from(
        &self,
        offset: u64,
        source: &HostMemory,
        source_offset: u64,
        length: usize,
    ) -> Option<()> {
        let (to, from) = (self.at(offset, length)?, source.at(source_offset, length)?);
        // SAFETY: inside of both memories, which are valid; they may overlap.
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), length) };
        Some(())
    }

    /// Four aligned bytes.
    pub(crate) fn atomic_u32(&self, offset: u64) -> Option<&AtomicU32> {
        let word = self.at(offset, 4)?.cast::<AtomicU32>();
        if !word.is_aligned() {
            return None;
        }
        // SAFETY: inside the memory, which lives as long as `self`, and aligned.
        Some(unsafe { word.as_ref() })
    }

    /// Eight aligned bytes.
    pub(crate) fn atomic_u64(&self, offset: u64) -> Option<&AtomicU64> {
        let word = self.at(offset, 8)?.cast::<AtomicU64>();
        if !word.is_aligned() {
            return None;
        }
        // SAFETY: as above.
        Some(unsafe { word.as_ref() })
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
