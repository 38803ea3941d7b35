//! Another process's memory: copies that respect its page protections, and what is mapped where.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::checked;

/// Copies from the memory of thread `thread` at `address`; returns how many bytes came before the first page that
/// cannot be read.
///
/// # Errors
/// `EFAULT` if that is the first one, `EPERM` if the process may not be looked into, `ESRCH` if it has gone.
pub(crate) fn read(thread: u32, address: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the local vector describes `buffer`, which is exclusively ours; the remote one is only a number here.
    let count = unsafe {
        checked(
            libc::process_vm_readv(thread as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0) as _
        )?
    };
    Ok(count as usize)
}

/// Copies from two places at once; returns how many bytes came, of the first and then of the second.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_two(
    thread: u32,
    first: (u64, &mut [u8]),
    second: (u64, &mut [u8]),
) -> Result<usize, Errno> {
    let places = [first, second].map(|(address, buffer)| {
        let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        (local, libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() })
    });
    let local = places.map(|(local, _)| local);
    let remote = places.map(|(_, remote)| remote);
    // SAFETY: the local vectors describe the two buffers, which are exclusively ours; the remote ones are only numbers
    // here.
    let count = unsafe {
        checked(libc::process_vm_readv(thread as libc::pid_t, local.as_ptr(), 2, remote.as_ptr(), 2, 0) as _)?
    };
    Ok(count as usize)
}

/// Copies to the memory of thread `thread` at `address`; returns how many bytes went before the first page that
/// cannot be written.
///
/// # Errors
/// As [`read`].
pub(crate) fn write(thread: u32, address: u64, bytes: &[u8]) -> Result<usize, Errno> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: the local vector describes `bytes`, which the kernel only reads; the remote one is only a number here.
    let count = unsafe {
        checked(
            libc::process_vm_writev(thread as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0) as _
        )?
    };
    Ok(count as usize)
}

/// One mapping of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Address of its first byte.
    pub(crate) start: u64,
    /// Address after its last byte.
    pub(crate) end: u64,
    /// Whether it may be read.
    pub(crate) readable: bool,
    /// Whether it may be written.
    pub(crate) writable: bool,
    /// The memory object that others can map too, if it is a shared mapping.
    pub(crate) shared: Option<SharedObject>,
}

/// What a shared mapping shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SharedObject {
    /// Device and inode number of the file.
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Where in the file the mapping begins, in bytes.
    pub(crate) offset: u64,
}

/// The structure of the `PROCMAP_QUERY` ioctl.
#[repr(C)]
#[derive(Default)]
struct MappingQuery {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    mapping_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    device_major: u32,
    device_minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_address: u64,
    build_id_address: u64,
}

/// Finds the mapping that covers `address` with one call on an open `/proc/PID/maps`.
///
/// # Errors
/// `ENOENT` if nothing is mapped there, `ENOTTY` before Linux 6.11, `ESRCH` if the address space has gone.
pub(crate) fn query_mapping(maps: BorrowedFd<'_>, address: u64) -> Result<Mapping, Errno> {
    const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;
    const READABLE: u64 = 1;
    const WRITABLE: u64 = 2;
    const SHARED: u64 = 8;
    let mut query =
        MappingQuery { size: size_of::<MappingQuery>() as u64, address, ..MappingQuery::default() };
    // SAFETY: the structure has the size that both the ioctl's number and its first field carry.
    unsafe { checked(libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY as _, &raw mut query).into())? };
    Ok(Mapping {
        start: query.start,
        end: query.end,
        readable: query.mapping_flags & READABLE != 0,
        writable: query.mapping_flags & WRITABLE != 0,
        shared: (query.mapping_flags & SHARED != 0).then_some(SharedObject {
            device: rustix::fs::makedev(query.device_major, query.device_minor),
            inode: query.inode,
            offset: query.offset,
        }),
    })
}
