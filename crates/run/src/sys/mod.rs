//! The kernel interfaces that neither the standard library nor rustix offers, each as a small safe function.
//!
//! This is the only part of the crate with unsafe code. [`seccomp`] installs filters and speaks to their listener,
//! [`memory`] copies from and to another process and asks about its mappings, [`credentials`] what it may do, [`lease`] tells whether an inode is
//! open anywhere else, and [`child`] holds what happens between fork and exec, and signals.

#![allow(unsafe_code)] // The rest of the crate denies it; here is the one place where system calls are made by hand.

pub(crate) mod child;
pub(crate) mod credentials;
pub(crate) mod lease;
pub(crate) mod memory;
pub(crate) mod seccomp;

use rustix::io::Errno;

/// The result of a call that reports failure as -1 with the reason in `errno`.
fn checked(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result == -1 {
        // A failed libc call has always set errno.
        return Err(std::io::Error::last_os_error()
            .raw_os_error()
            .map_or(Errno::IO, Errno::from_raw_os_error));
    }
    Ok(result)
}
