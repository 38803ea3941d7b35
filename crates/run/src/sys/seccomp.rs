//! seccomp: a filter with a listener is installed in the child, its requests are received and answered here.

use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::checked;

/// One instruction of a classic BPF program.
pub(crate) type Instruction = libc::sock_filter;

/// A request of a client, as the kernel delivers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Notification {
    /// Names the request until it is answered or the client has left.
    pub(crate) id: u64,
    /// Thread id of the client in our pid namespace; 0 if it is not visible there.
    pub(crate) thread: u32,
    /// System call number.
    pub(crate) number: i32,
    /// The system call's arguments.
    pub(crate) arguments: [u64; 6],
}

/// The kernel fills as many bytes as its own structure has; the rest makes room for later kernels'.
#[repr(C)]
struct NotificationBuffer {
    notification: libc::seccomp_notif,
    room: [u64; 22],
}

/// The kernel reads as many bytes as its own structure has.
#[repr(C)]
struct ResponseBuffer {
    response: libc::seccomp_notif_resp,
    room: [u64; 13],
}

/// Whether this kernel's structures fit into our buffers.
///
/// # Errors
/// `ENOSYS` without seccomp, `EINVAL` before Linux 5.0, `E2BIG` if the structures have outgrown us.
pub(crate) fn check_sizes() -> Result<(), Errno> {
    let mut sizes = MaybeUninit::<libc::seccomp_notif_sizes>::zeroed();
    // SAFETY: the kernel writes the six bytes of the structure, which lives until after the call.
    let sizes = unsafe {
        checked(libc::syscall(
            libc::SYS_seccomp,
            libc::c_ulong::from(libc::SECCOMP_GET_NOTIF_SIZES),
            0 as libc::c_ulong,
            sizes.as_mut_ptr(),
        ))?;
        sizes.assume_init()
    };
    let fits = usize::from(sizes.seccomp_notif) <= mem::size_of::<NotificationBuffer>()
        && usize::from(sizes.seccomp_notif_resp) <= mem::size_of::<ResponseBuffer>()
        && usize::from(sizes.seccomp_data) <= mem::size_of::<libc::seccomp_data>();
    if fits { Ok(()) } else { Err(Errno::TOOBIG) }
}

/// Puts `program` before every later system call of this thread and its descendants; returns its listener.
/// Async-signal-safe.
///
/// # Errors
/// `EACCES` with neither no_new_privs nor `CAP_SYS_ADMIN`, `EBUSY` if a filter with a listener is there already,
/// `EINVAL` before Linux 5.19.
pub(crate) fn install(program: &[Instruction]) -> Result<OwnedFd, Errno> {
    let length = program.len().try_into().map_err(|_| Errno::INVAL)?;
    // The kernel takes a mutable pointer but only reads.
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the program's pointer and length describe a live slice; the kernel copies it.
    let listener = unsafe {
        checked(libc::syscall(
            libc::SYS_seccomp,
            libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER),
            flags,
            &raw const program,
        ))?
    };
    // SAFETY: the call returned a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as i32) })
}

/// Gives up gaining privileges by exec, for good. Async-signal-safe.
pub(crate) fn set_no_new_privileges() -> Result<(), Errno> {
    // SAFETY: the call takes plain numbers and changes only this flag of the calling thread.
    unsafe { checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())? };
    Ok(())
}

/// Waits for a request.
///
/// # Errors
/// `ENOENT` if its client died meanwhile or no client is left, `EINTR`.
pub(crate) fn receive(listener: BorrowedFd<'_>) -> Result<Notification, Errno> {
    let mut buffer = MaybeUninit::<NotificationBuffer>::zeroed();
    // SAFETY: the buffer is zero, as the kernel demands, and at least as large as what it writes (`check_sizes`).
    // Every bit pattern is a valid value of its fields.
    let buffer = unsafe {
        checked(
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV as _, buffer.as_mut_ptr())
                .into(),
        )?;
        buffer.assume_init()
    };
    let notification = buffer.notification;
    Ok(Notification {
        id: notification.id,
        thread: notification.pid,
        number: notification.data.nr,
        arguments: notification.data.args,
    })
}

/// How a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The client's system call returns this.
    Value(i64),
    /// The client's system call fails.
    Error(Errno),
    /// The client's system call is executed by its kernel.
    Continue,
}

/// Answers a request.
///
/// # Errors
/// `ENOENT` if the client has left.
pub(crate) fn send(listener: BorrowedFd<'_>, id: u64, answer: Answer) -> Result<(), Errno> {
    let (val, error, flags) = match answer {
        Answer::Value(value) => (value, 0, 0),
        Answer::Error(errno) => (0, -errno.raw_os_error(), 0),
        Answer::Continue => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
    };
    let mut buffer =
        ResponseBuffer { response: libc::seccomp_notif_resp { id, val, error, flags }, room: [0; 13] };
    // SAFETY: the buffer is at least as large as what the kernel reads and writes (`check_sizes`).
    unsafe {
        checked(
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut buffer).into(),
        )?;
    }
    Ok(())
}

/// Whether the client still waits for the answer to `id`. While it does, its thread id cannot be another's.
pub(crate) fn is_valid(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the kernel reads the eight bytes of `id`.
    let result =
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID as _, &raw const id) };
    result == 0
}

/// Gives the client a descriptor for the open file behind `file`, without ending the request; returns its number.
///
/// # Errors
/// `ENOENT` if the client has left, `EMFILE` if it has too many.
pub(crate) fn add_descriptor(
    listener: BorrowedFd<'_>,
    id: u64,
    file: BorrowedFd<'_>,
    close_on_exec: bool,
) -> Result<i32, Errno> {
    let request = libc::seccomp_notif_addfd {
        id,
        flags: 0,
        srcfd: file.as_raw_fd() as u32,
        newfd: 0,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    // SAFETY: the ioctl's number carries the structure's size, which the kernel copies.
    let number = unsafe {
        checked(
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD as _, &raw const request)
                .into(),
        )?
    };
    Ok(number as i32)
}

/// Has client and server wake each other on the CPU they are on.
///
/// # Errors
/// `EINVAL` before Linux 6.6.
pub(crate) fn set_sync_wake_up(listener: BorrowedFd<'_>) -> Result<(), Errno> {
    const SYNC_WAKE_UP: libc::c_ulong = 1;
    // SAFETY: the argument is a plain number.
    unsafe {
        checked(
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS as _, SYNC_WAKE_UP).into(),
        )?;
    }
    Ok(())
}
