//! The least that any server behind seccomp user notification does for an ioctl with an argument of 40 bytes: one
//! notification round trip, one look at what the descriptor is, one read and one write of the client's memory.
//!
//! Nothing is decided and nothing can go wrong here, so this is a floor and no server.

use std::error::Error;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

/// The size of the argument: IOAS_MAP's.
pub(crate) const ARGUMENT: usize = 40;

/// Where the client leaves its listener for us to take.
const LISTENER: RawFd = 200;

/// Starts `command` under a filter that stops ioctls of type `;`, and returns it with the listener.
pub(crate) fn spawn(command: &mut Command) -> Result<(Child, OwnedFd), Box<dyn Error>> {
    // SAFETY: `install` makes system calls only.
    unsafe { command.pre_exec(install) };
    let child = command.spawn()?;
    let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let listener = rustix::process::pidfd_getfd(&pidfd, LISTENER, PidfdGetfdFlags::empty())?;
    // SAFETY: the argument is a plain number. Kernels before 6.6 refuse it, and the table says what follows.
    let synchronous =
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS as _, 1_u64) };
    if synchronous != 0 {
        println!("(client and server are not woken on one CPU: Linux before 6.6)");
    }
    Ok((child, listener))
}

/// In the child. Async-signal-safe.
fn install() -> io::Result<()> {
    let step = |code: u16, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let (load, and, equal, verdict) = (0x20, 0x54, 0x15, 0x06);
    let program = [
        step(load, 0, 0, 0),
        step(equal, 0, 4, libc::SYS_ioctl as u32),
        step(load, 0, 0, 24),
        step(and, 0, 0, 0xffff_ff00),
        step(equal, 0, 1, 0x3b00),
        step(verdict, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        step(verdict, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: plain numbers, and a program that lives until after the call.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mode = libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER);
        let listener = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
        if listener < 0 || libc::dup2(listener as RawFd, LISTENER) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What the client does first: the listener shall be ours alone.
pub(crate) fn leave_listener() {
    // SAFETY: nobody in this process uses the number.
    unsafe { libc::close(LISTENER) };
}

/// Serves until no client is left.
pub(crate) fn serve(listener: &OwnedFd) {
    // Of each thread of the client, its directory.
    let mut threads: Vec<(u32, OwnedFd)> = Vec::new();
    loop {
        let mut notification = MaybeUninit::<libc::seccomp_notif>::zeroed();
        // SAFETY: the structure is zero, and the kernel fills it.
        let notification = unsafe {
            let receive = libc::SECCOMP_IOCTL_NOTIF_RECV as _;
            if libc::ioctl(listener.as_raw_fd(), receive, notification.as_mut_ptr()) != 0 {
                if io::Error::last_os_error().raw_os_error() == Some(libc::ENOENT) {
                    return;
                }
                continue;
            }
            notification.assume_init()
        };
        let thread = notification.pid;
        let known = threads.iter().position(|(id, _)| *id == thread).unwrap_or_else(|| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(format!("/proc/{thread}"), flags, Mode::empty());
            threads.push((thread, directory.expect("the client waits")));
            threads.len() - 1
        });
        let name = format!("fd/{}", notification.data.args[0]);
        let status = rustix::fs::statat(&threads[known].1, name, AtFlags::empty());
        std::hint::black_box(status.expect("the descriptor is open"));
        let mut bytes = [0_u8; ARGUMENT];
        let ours = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: ARGUMENT };
        let theirs = libc::iovec { iov_base: notification.data.args[2] as *mut _, iov_len: ARGUMENT };
        let mut response = libc::seccomp_notif_resp { id: notification.id, val: 0, error: 0, flags: 0 };
        // SAFETY: `ours` describes `bytes`, `theirs` is another process's; the response lives until after the call.
        unsafe {
            let id = thread as libc::pid_t;
            let read = libc::process_vm_readv(id, &raw const ours, 1, &raw const theirs, 1, 0);
            let written = libc::process_vm_writev(id, &raw const ours, 1, &raw const theirs, 1, 0);
            assert_eq!((read, written), (ARGUMENT as isize, ARGUMENT as isize));
            libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut response);
        }
    }
}
