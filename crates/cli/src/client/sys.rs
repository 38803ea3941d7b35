//! The two things that need unsafe code: ioctls, and memory that somebody else writes.
//!
//! Both are safe to call. An argument whose fields the kernel takes as addresses to write to is filled here, from
//! memory that stays; one without such fields may come from anywhere. Memory for DMA is never given back while the
//! process lives, so no device can write what has become something else.

#![allow(unsafe_code)] // The rest of the program denies it.

use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use ioasid_uapi::iommufd::{IoasIovaRanges, IoasMap, IovaRange};
use ioasid_uapi::{Command, iommufd, vfio};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of a page.
const PAGE_SIZE: usize = 4096;

/// A command in which the other side finds no address that it would write to.
pub(super) trait PlainCommand: Command {}
impl PlainCommand for iommufd::Destroy {}
impl PlainCommand for iommufd::IoasAlloc {}
impl PlainCommand for iommufd::IoasUnmap {}
impl PlainCommand for vfio::DeviceBindIommufd {}
impl PlainCommand for vfio::DeviceAttachIommufdPt {}
impl PlainCommand for vfio::DeviceDetachIommufdPt {}
impl PlainCommand for vfio::DeviceInfo {}
impl PlainCommand for vfio::RegionInfo {}

/// Performs the ioctl of `command`, which begins with its size: all of these commands do.
pub(super) fn ioctl<C: PlainCommand>(file: impl AsFd, command: &mut C) -> Result<(), Errno> {
    set_size(command);
    // SAFETY: the argument is one structure of the size it states, and it is plain.
    unsafe { raw_ioctl(file, command) }
}

/// Asks for the ranges of IOVAs that can be mapped. Returns how many there are, which may be more than there is room
/// for (`EMSGSIZE`, with the count in the error's place), and their alignment.
pub(super) fn iova_ranges(
    file: impl AsFd,
    ioas_id: u32,
    ranges: &mut [IovaRange],
) -> (Result<(), Errno>, IoasIovaRanges) {
    let mut command = IoasIovaRanges {
        ioas_id,
        num_iovas: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
        allowed_iovas: ranges.as_mut_ptr().expose_provenance() as u64,
        ..IoasIovaRanges::default()
    };
    set_size(&mut command);
    // SAFETY: no more than `num_iovas` entries are written to the array, which is borrowed until this returns.
    let result = unsafe { raw_ioctl(file, &mut command) };
    (result, command)
}

/// Maps memory for devices, from byte `offset` of `memory` on.
pub(super) fn map(
    file: impl AsFd,
    memory: &DmaMemory,
    offset: usize,
    command: &mut IoasMap,
) -> Result<(), Errno> {
    let length = usize::try_from(command.length).map_err(|_| Errno::INVAL)?;
    memory.check(offset, length)?;
    command.user_va = memory.address(offset);
    set_size(command);
    // SAFETY: devices may from now on write a range of `memory`, which is made for that and lives for ever.
    unsafe { raw_ioctl(file, command) }
}

fn set_size<C: Command>(command: &mut C) {
    let size = u32::try_from(C::SIZE).unwrap_or(u32::MAX);
    command.as_mut_bytes()[..4].copy_from_slice(&size.to_ne_bytes());
}

/// # Safety
/// The first four bytes of `command` are its size or less, and every address in it that the kernel writes to, now or
/// later, is of memory that may be written so.
unsafe fn raw_ioctl<C: Command>(file: impl AsFd, command: &mut C) -> Result<(), Errno> {
    let file = file.as_fd().as_raw_fd();
    // The type of the number differs between C libraries, but numbers of this interface have only 16 bits.
    let number = libc::Ioctl::from(C::NUMBER as u16);
    // SAFETY: the descriptor is open; the caller answers for the argument.
    let result = unsafe { libc::ioctl(file, number, std::ptr::from_mut(command)) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

/// Private anonymous memory that devices may read and write at any time, zero at first and not there until touched.
///
/// It is copied from and to, never borrowed. It is never unmapped.
#[derive(Debug)]
pub(crate) struct DmaMemory {
    start: NonNull<u8>,
    length: usize,
}

impl DmaMemory {
    /// Reserves `length` bytes, whose address is a multiple of `alignment`, a power of two of a page or more.
    pub(crate) fn reserve(length: usize, alignment: usize) -> Result<Self, Errno> {
        debug_assert!(alignment.is_power_of_two() && alignment >= PAGE_SIZE);
        let with_slack = length.checked_add(alignment).ok_or(Errno::NOMEM)?;
        // Most of it will never be touched, so it need not be there.
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping where the kernel finds room.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                with_slack,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )?
        };
        let start = start.cast::<u8>();
        let slack = start.addr().wrapping_neg() & (alignment - 1);
        // SAFETY: the slack is less than `alignment`, which the mapping has in addition to `length`.
        let start = NonNull::new(unsafe { start.add(slack) }).ok_or(Errno::NOMEM)?;
        Ok(Self { start, length })
    }

    /// The address of byte `offset`.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        (self.start.as_ptr().expose_provenance() + offset) as u64
    }

    fn check(&self, offset: usize, length: usize) -> Result<(), Errno> {
        let end = offset.checked_add(length).ok_or(Errno::FAULT)?;
        if end > self.length { Err(Errno::FAULT) } else { Ok(()) }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// `EFAULT` if they do not fit; then nothing is written.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        self.check(offset, bytes.len())?;
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: within the mapping. Volatile, because devices write there too.
            unsafe { self.start.as_ptr().add(offset + index).write_volatile(*byte) };
        }
        Ok(())
    }

    /// Copies `length` bytes from `offset`.
    ///
    /// # Errors
    /// `EFAULT` if there are not so many.
    pub(crate) fn read(&self, offset: usize, length: usize) -> Result<Vec<u8>, Errno> {
        self.check(offset, length)?;
        // SAFETY: within the mapping. Volatile, because devices write there too.
        let byte = |index| unsafe { self.start.as_ptr().add(offset + index).read_volatile() };
        Ok((0..length).map(byte).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_zero_and_bounded() {
        let memory = DmaMemory::reserve(3 * PAGE_SIZE, 2 << 20).unwrap();
        assert_eq!(memory.address(0) % (2 << 20), 0);
        assert_eq!(memory.address(5), memory.address(0) + 5);
        memory.write(3 * PAGE_SIZE - 2, b"ab").unwrap();
        assert_eq!(memory.read(3 * PAGE_SIZE - 3, 3).unwrap(), b"\0ab");
        assert_eq!(memory.write(3 * PAGE_SIZE - 1, b"ab"), Err(Errno::FAULT));
        assert_eq!(memory.read(usize::MAX, 2), Err(Errno::FAULT));
        assert_eq!(DmaMemory::reserve(usize::MAX, 4096).map(drop), Err(Errno::NOMEM));
    }

    #[test]
    fn the_size_is_always_stated() {
        let mut command = iommufd::Destroy { size: 0, id: 7 };
        set_size(&mut command);
        assert_eq!(command.size, 8);
    }
}
