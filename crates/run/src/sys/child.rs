//! Between fork and exec, signals, and orphans.
//!
//! What runs in the child after the fork of a process with several threads may only use async-signal-safe calls: no
//! allocation, no locks. Everything it needs is built before.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::io::Errno;

use super::checked;

/// Has `command` run `prepare` in the child, after the fork and before the exec; an error ends the child.
///
/// # Safety contract of the argument
/// `prepare` must be async-signal-safe; every closure that this crate gives is a sequence of system calls on memory
/// that was allocated before.
pub(crate) fn before_exec<F>(command: &mut Command, mut prepare: F)
where
    F: FnMut() -> Result<(), Errno> + Send + Sync + 'static,
{
    // SAFETY: see the contract above; the callers are all in this crate.
    unsafe {
        command.pre_exec(move || prepare().map_err(io::Error::from));
    }
}

/// The write end of the pipe that [`note_signal`] reports to, or -1.
static REPORT: AtomicI32 = AtomicI32::new(-1);

/// Signals that the program at the terminal decides about: they reach it by itself, so we let them pass.
const LEFT_TO_THE_PROGRAM: [libc::c_int; 3] = [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];
/// Signals that are reported through the pipe.
const REPORTED: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGCHLD];

/// How this process treated signals before; set back when dropped.
pub(crate) struct Signals {
    before: Vec<(libc::c_int, libc::sigaction)>,
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let signals = self.before.iter().map(|(signal, _)| signal);
        formatter.debug_list().entries(signals).finish()
    }
}

impl Signals {
    /// Ignores the signals that are the program's to decide about, and writes the number of each reported one
    /// (SIGTERM, SIGCHLD) as one byte to `pipe`, which should not block. Once in a process at a time.
    pub(crate) fn take_over(pipe: OwnedFd) -> Result<Self, Errno> {
        REPORT.store(pipe.into_raw_fd(), Ordering::SeqCst);
        let mut taken = Self { before: Vec::new() };
        for signal in LEFT_TO_THE_PROGRAM {
            taken.set(signal, libc::SIG_IGN)?;
        }
        for signal in REPORTED {
            taken.set(signal, note_signal as extern "C" fn(libc::c_int) as libc::sighandler_t)?;
        }
        Ok(taken)
    }

    fn set(&mut self, signal: libc::c_int, handler: libc::sighandler_t) -> Result<(), Errno> {
        let mut before = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: the action is fully initialised: an all-zero sigaction is valid, the handler is SIG_IGN or
        // `note_signal`, which is async-signal-safe.
        let before = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler;
            action.sa_flags = libc::SA_RESTART | libc::SA_NOCLDSTOP;
            checked(libc::sigaction(signal, &raw const action, before.as_mut_ptr()).into())?;
            before.assume_init()
        };
        self.before.push((signal, before));
        Ok(())
    }

    /// What a child must set back before it execs: exec keeps what is ignored, and ends what is handled.
    pub(crate) fn inherited_by_child(&self) -> Vec<ChildSignal> {
        self.before
            .iter()
            .map(|(signal, before)| ChildSignal {
                signal: *signal,
                ignored: before.sa_sigaction == libc::SIG_IGN,
            })
            .collect()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, before) in &self.before {
            // SAFETY: `before` is what the kernel gave us for this signal.
            unsafe { libc::sigaction(*signal, before, ptr::null_mut()) };
        }
        let pipe = REPORT.swap(-1, Ordering::SeqCst);
        if pipe >= 0 {
            // SAFETY: `take_over` put this descriptor here and nobody else closes it. The handlers are gone.
            unsafe { libc::close(pipe) };
        }
    }
}

/// What a signal shall do in a child.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChildSignal {
    signal: libc::c_int,
    /// Ignored, as it was in us; otherwise its default.
    ignored: bool,
}

impl ChildSignal {
    /// Async-signal-safe.
    pub(crate) fn reset(self) -> Result<(), Errno> {
        // SAFETY: an all-zero sigaction is valid, and SIG_DFL and SIG_IGN need no handler.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = if self.ignored { libc::SIG_IGN } else { libc::SIG_DFL };
            checked(libc::sigaction(self.signal, &raw const action, ptr::null_mut()).into())?;
        }
        Ok(())
    }
}

/// The handler: one byte with the signal's number. A full pipe loses nothing that matters, since each byte only says
/// "look again" or repeats a SIGTERM that is still unread.
extern "C" fn note_signal(signal: libc::c_int) {
    let pipe = REPORT.load(Ordering::SeqCst);
    if pipe < 0 {
        return;
    }
    let byte = signal as u8;
    // SAFETY: write is async-signal-safe; errno is saved for the code that was interrupted.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        libc::write(pipe, (&raw const byte).cast(), 1);
        *errno = saved;
    }
}

/// Reaps every dead child but `main`, whose exit status belongs to its own waiter. True if children are left.
pub(crate) fn reap_orphans(main: u32) -> bool {
    loop {
        let mut information = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: the kernel fills the structure, and all zeros (no child) is a valid value of it.
        let (result, child) = unsafe {
            let result = libc::waitid(
                libc::P_ALL,
                0,
                information.as_mut_ptr(),
                libc::WEXITED | libc::WNOHANG | libc::WNOWAIT,
            );
            (result, information.assume_init().si_pid())
        };
        // When it is the main child, its waiter comes next and the following SIGCHLD or round looks again.
        if result != 0 {
            return false;
        }
        if child == 0 || child as u32 == main {
            return true;
        }
        // SAFETY: without a place for the status, waitpid only takes numbers.
        unsafe { libc::waitpid(child, ptr::null_mut(), libc::WNOHANG) };
    }
}

/// An ioctl with a plain number as its argument, whatever the descriptor. Async-signal-safe.
#[allow(clippy::cast_lossless)] // The command's type differs between C libraries.
pub(crate) fn ioctl(descriptor: BorrowedFd<'_>, command: u32, argument: u64) -> Result<i32, Errno> {
    // SAFETY: the callers use it for commands that only their own listener answers, without touching memory.
    let value = unsafe { checked(libc::ioctl(descriptor.as_raw_fd(), command as _, argument).into())? };
    Ok(value as i32)
}
