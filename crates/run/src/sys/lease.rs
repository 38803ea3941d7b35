//! Is a file open anywhere else? The kernel knows, and tells when asked for a write lease.
//!
//! A write lease is granted only if the asking open file is the inode's only one: descriptors in any process,
//! descriptors in flight over a socket and mappings all count, `O_PATH` descriptors do not. The asking file must
//! itself be one that counts, so it has to come from an `open` (the descriptor that `memfd_create` returns does not).

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::checked;

/// Readies `file` for [`is_only_one_open`].
///
/// While a lease is held (an instant), an `open` elsewhere would signal the holder, by default with a deadly `SIGIO`;
/// a signal that is ignored by default is chosen instead.
pub(crate) fn prepare(file: BorrowedFd<'_>) -> Result<(), Errno> {
    const F_SETSIG: libc::c_int = 10;
    // SAFETY: the argument is a plain number.
    unsafe { checked(libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGWINCH).into())? };
    Ok(())
}

/// Whether `file` is the only open file of its inode.
///
/// # Errors
/// Whatever keeps the kernel from answering: `EINVAL` where leases are switched off.
pub(crate) fn is_only_one_open(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // SAFETY: the arguments are plain numbers.
    let result = unsafe { checked(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK).into()) };
    match result {
        Ok(_) => {
            // SAFETY: the arguments are plain numbers.
            unsafe { checked(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK).into())? };
            Ok(true)
        }
        Err(Errno::AGAIN) => Ok(false),
        Err(errno) => Err(errno),
    }
}
