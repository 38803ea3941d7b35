//! Memory of this process that devices reach by plain copies.
//!
//! A device may write to memory at any moment, also while the program reads it, exactly as real DMA does. So the
//! memory is never seen through a reference, only copied from and to; the contents of a copy that races with
//! another are unspecified, but nothing else is.

use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// A piece of this process's address space.
#[derive(Debug)]
pub(crate) struct HostMemory {
    pointer: NonNull<u8>,
    /// How many bytes can be used. It only grows.
    length: AtomicU64,
    owner: Owner,
}

/// Who takes care that the memory stays.
#[derive(Debug)]
enum Owner {
    /// Whoever lent it.
    Lender,
    /// We, who have mapped so many bytes.
    Mapping(usize),
    /// A value that is kept alive for it.
    Kept { _value: Arc<dyn Any + Send + Sync> },
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
        HostMemory { pointer, length: AtomicU64::new(length), owner: Owner::Lender }
    }

    /// Memory that stays valid as long as `keeper` lives.
    ///
    /// # Safety
    ///
    /// As for [`new`](Self::new), with the life of `keeper` in place of that of the value.
    #[cfg_attr(not(feature = "vm-memory"), expect(dead_code, reason = "for guest memory of vm-memory"))]
    pub(crate) unsafe fn kept(
        pointer: NonNull<u8>,
        length: u64,
        keeper: Arc<dyn Any + Send + Sync>,
    ) -> HostMemory {
        HostMemory { pointer, length: AtomicU64::new(length), owner: Owner::Kept { _value: keeper } }
    }

    /// Fresh zeroed memory; the pages come when they are touched.
    pub(crate) fn anonymous(length: u64) -> io::Result<HostMemory> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let memory = HostMemory::mapping(length, ProtFlags::READ | ProtFlags::WRITE, flags)?;
        memory.length.store(length, Ordering::Release);
        Ok(memory)
    }

    /// Addresses for 2^`bits` bytes, on a multiple of that. There is nothing behind them yet.
    pub(crate) fn reserve(bits: u32) -> io::Result<HostMemory> {
        let size = 1u64 << bits;
        let unit = rustix::param::page_size() as u64;
        // Twice as much has a multiple in it; what is around it goes back.
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let mut memory = HostMemory::mapping(size.max(unit) * 2, ProtFlags::empty(), flags)?;
        let Owner::Mapping(whole) = memory.owner else { return Ok(memory) };
        let kept = size.max(unit) as usize;
        let before = memory.pointer.as_ptr().addr().wrapping_neg() & (kept - 1);
        let behind = whole - before - kept;
        // SAFETY: all three pieces are parts of the mapping just made, which nobody knows. What is cut off its ends is
        // not used any more, and if it cannot be given back, it stays: no harm but addresses that are lost.
        unsafe {
            let first = memory.pointer.as_ptr();
            let aligned = first.add(before);
            for (pointer, length) in [(first, before), (aligned.add(kept), behind)] {
                if length > 0 {
                    let _ = rustix::mm::munmap(pointer.cast(), length);
                }
            }
            memory.pointer = NonNull::new_unchecked(aligned);
        }
        memory.owner = Owner::Mapping(kept);
        Ok(memory)
    }

    /// A mapping of ours at an address of the kernel's choice. No byte of it counts as usable yet.
    fn mapping(length: u64, protection: ProtFlags, flags: MapFlags) -> io::Result<HostMemory> {
        let size = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let pointer = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), size, protection, flags) }?;
        let pointer = NonNull::new(pointer.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(HostMemory { pointer, length: AtomicU64::new(0), owner: Owner::Mapping(size) })
    }

    /// Puts bytes of a file behind addresses that were [reserved](Self::reserve), so that `length` of them can be used;
    /// the first stands for the byte at `offset`. What can be used already stays untouched. `unit`: the size of the
    /// file's pages, which `offset` and the reservation are multiples of.
    pub(crate) fn map_file(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        unit: u64,
    ) -> io::Result<()> {
        let Owner::Mapping(reserved) = self.owner else { return Err(io::ErrorKind::InvalidInput.into()) };
        let end = length.checked_next_multiple_of(unit).filter(|end| *end <= reserved as u64);
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        let mapped = self.length().next_multiple_of(unit);
        if mapped < end {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: inside of what was reserved, and behind what can be used, so that nobody looks there.
            unsafe {
                let at = self.pointer.as_ptr().add(mapped as usize);
                rustix::mm::mmap(
                    at.cast(),
                    (end - mapped) as usize,
                    protection,
                    flags,
                    file,
                    offset + mapped,
                )?;
            }
        }
        self.length.fetch_max(length, Ordering::Release);
        Ok(())
    }

    /// The address of its first byte, for a kernel that will read and write there.
    pub(crate) fn address(&self) -> u64 {
        self.pointer.as_ptr().expose_provenance() as u64
    }

    /// How many bytes can be used.
    #[inline]
    pub(crate) fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    /// The pages that bytes lie in, for calls about pages; `None` if the bytes are not all inside.
    fn page_span(&self, offset: u64, length: u64) -> io::Result<(*mut std::ffi::c_void, usize)> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let offset = self.check(offset, length).ok_or(io::ErrorKind::InvalidInput)?;
        let address = self.pointer.as_ptr().addr() + offset;
        let below = address & (rustix::param::page_size() - 1);
        // SAFETY: inside the memory, or on the page that its first byte lies on; nothing is accessed.
        let first = unsafe { self.pointer.as_ptr().offset(offset as isize - below as isize) };
        Ok((first.cast(), length + below))
    }

    /// Brings the pages in, ready to be written.
    pub(crate) fn populate(&self, offset: u64, length: u64) -> io::Result<()> {
        let (first, length) = self.page_span(offset, length)?;
        // SAFETY: memory that is there stays as it is; only pages that were not there come.
        Ok(unsafe { rustix::mm::madvise(first, length, Advice::LinuxPopulateWrite) }?)
    }

    /// Keeps the pages from being swapped out, until [`unlock`](Self::unlock).
    pub(crate) fn lock(&self, offset: u64, length: u64) -> io::Result<()> {
        let (first, length) = self.page_span(offset, length)?;
        // SAFETY: changes nothing that a program can see of its memory.
        Ok(unsafe { rustix::mm::mlock(first, length) }?)
    }

    /// Undoes [`lock`](Self::lock).
    pub(crate) fn unlock(&self, offset: u64, length: u64) {
        if let Ok((first, length)) = self.page_span(offset, length) {
            // SAFETY: changes nothing that a program can see of its memory.
            let result = unsafe { rustix::mm::munlock(first, length) };
            debug_assert!(result.is_ok());
        }
    }

    /// Copies out by a system call, which fails where a plain copy would raise SIGBUS: the pages may be taken away at
    /// any time. `None` if that is not all inside or not all there.
    pub(crate) fn read_by_call(&self, offset: u64, buffer: &mut [u8]) -> Option<()> {
        let at = self.check(offset, buffer.len())?;
        let mut done = 0;
        while done < buffer.len() {
            let length = buffer.len() - done;
            // SAFETY: the call writes to `buffer`, which is exclusive, and reads addresses that it checks itself.
            let count = unsafe {
                let local = libc::iovec { iov_base: buffer.as_mut_ptr().add(done).cast(), iov_len: length };
                let remote =
                    libc::iovec { iov_base: self.pointer.as_ptr().add(at + done).cast(), iov_len: length };
                libc::process_vm_readv(this_thread(), &local, 1, &remote, 1, 0)
            };
            done += usize::try_from(count).ok().filter(|count| *count > 0)?;
        }
        Some(())
    }

    /// Copies in by a system call, as [`read_by_call`](Self::read_by_call) copies out. On an error some bytes may have
    /// been written.
    pub(crate) fn write_by_call(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let at = self.check(offset, bytes.len())?;
        let mut done = 0;
        while done < bytes.len() {
            let length = bytes.len() - done;
            // SAFETY: the call reads `bytes`, for which the pointer need not be mutable, and writes to memory of ours
            // that nobody may hold a reference to.
            let count = unsafe {
                let local =
                    libc::iovec { iov_base: bytes.as_ptr().add(done).cast_mut().cast(), iov_len: length };
                let remote =
                    libc::iovec { iov_base: self.pointer.as_ptr().add(at + done).cast(), iov_len: length };
                libc::process_vm_writev(this_thread(), &local, 1, &remote, 1, 0)
            };
            done += usize::try_from(count).ok().filter(|count| *count > 0)?;
        }
        Some(())
    }

    fn check(&self, offset: u64, length: usize) -> Option<usize> {
        let end = offset.checked_add(length as u64)?;
        (end <= self.length()).then_some(offset as usize)
    }

    /// Where the byte at `offset` is, if the memory has so many more from there on.
    #[inline(always)]
    pub(crate) fn at(&self, offset: u64, length: usize) -> Option<NonNull<u8>> {
        let end = offset.checked_add(length as u64)?;
        // SAFETY: at most the end of the memory.
        (end <= self.length()).then(|| unsafe { self.pointer.add(offset as usize) })
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

/// Whose memory the copying calls mean: that of the calling thread, which is the one of the process. The process's own
/// number would not do once its first thread has ended.
fn this_thread() -> libc::pid_t {
    rustix::thread::gettid().as_raw_nonzero().get()
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if let Owner::Mapping(size) = self.owner {
            // SAFETY: mapped in `mapping`, of this size by now, and nobody uses it any more.
            let result = unsafe { rustix::mm::munmap(self.pointer.as_ptr().cast(), size) };
            debug_assert!(result.is_ok());
        }
    }
}
