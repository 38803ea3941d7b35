//! What another process may do: its capabilities and limits, by one quick call each.

use std::mem::MaybeUninit;

use rustix::io::Errno;

use super::checked;

/// The effective capabilities of process `process`, bit by number, as seen from its own user namespace.
///
/// # Errors
/// `ESRCH` if it has gone.
pub(crate) fn effective_capabilities(process: u32) -> Result<u64, Errno> {
    /// The version of the interface with 64 capabilities.
    const VERSION_3: u32 = 0x2008_0522;
    /// Effective, permitted and inheritable: the lower and the upper 32 of each.
    type Sets = [[u32; 3]; 2];
    let mut header = [VERSION_3, process];
    let mut sets: Sets = Default::default();
    // SAFETY: the header is a version and a process id, and version 3 fills two structures of three words.
    unsafe { checked(libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()))? };
    Ok(u64::from(sets[1][0]) << 32 | u64::from(sets[0][0]))
}

/// How many bytes process `process` may lock in memory; `None` without limit.
///
/// # Errors
/// `ESRCH` if it has gone, `EPERM` if it is of another user.
pub(crate) fn locked_memory_limit(process: u32) -> Result<Option<u64>, Errno> {
    let mut limit = MaybeUninit::<libc::rlimit64>::zeroed();
    // SAFETY: no new limit is passed, and the kernel fills the structure with the old one.
    let limit = unsafe {
        checked(libc::syscall(
            libc::SYS_prlimit64,
            process as libc::pid_t,
            libc::RLIMIT_MEMLOCK,
            std::ptr::null::<libc::rlimit64>(),
            limit.as_mut_ptr(),
        ))?;
        limit.assume_init()
    };
    Ok((limit.rlim_cur != libc::RLIM64_INFINITY).then_some(limit.rlim_cur))
}
