//! A trial run without a program: a child installs the filter, makes one call that traps, and everything that serving
//! it would need is tried on it while it waits. The child never execs.

use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use crate::filter::{self, Architecture, SystemCall};
use crate::launch::{install, receive_with_descriptor, reporting_channel, send_with_descriptor};
use crate::listener::{Answer, Listener, Notification};
use crate::process::TaskDirectory;
use crate::sys::child::{before_exec, ioctl};
use crate::sys::{memory, seccomp};

/// What worked, each for itself.
#[derive(Debug)]
pub(crate) struct Findings {
    /// A call trapped and its answer arrived.
    pub(crate) round_trip: Result<(), Errno>,
    /// Client and server can be woken on one CPU.
    pub(crate) synchronous: bool,
    pub(crate) memory_read: Result<(), Errno>,
    pub(crate) memory_write: Result<(), Errno>,
    pub(crate) memory_handle: Result<(), Errno>,
    pub(crate) descriptor_status: Result<(), Errno>,
    pub(crate) descriptor_duplicate: Result<(), Errno>,
}

/// A command of the trapped type that no interface uses, and what the trial answers.
const COMMAND: u32 = 0x3bff;
const ANSWER: i32 = 42;

/// For what should take microseconds.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Runs the trial.
///
/// # Errors
/// What the kernel said to the filter, in particular `EBUSY`, `EINVAL`, `EPERM`; `ETIMEDOUT` if the child got stuck;
/// anything that kept the child from starting.
pub(crate) fn attempt() -> Result<Findings, Errno> {
    let architecture = Architecture::native().ok_or(Errno::NOSYS)?;
    seccomp::check_sizes()?;
    let program = filter::program(&architecture);
    let (ours, theirs) = reporting_channel()?;
    // The child is a copy of this process, so this is at the same address there. It is boxed so that nobody but the
    // trial knows it.
    let word: Box<u64> = Box::new(0x696f_6173_6964);
    let address = (&raw const *word).addr() as u64;
    let expected = *word;

    let mut command = Command::new("/");
    before_exec(&mut command, move || {
        let listener = match install(&program) {
            Ok(listener) => listener,
            Err(errno) => {
                send_with_descriptor(theirs.as_fd(), &errno.raw_os_error().to_ne_bytes(), None)?;
                return Err(errno);
            }
        };
        send_with_descriptor(theirs.as_fd(), &0i32.to_ne_bytes(), Some(listener.as_fd()))?;
        drop(listener);
        let answered = ioctl(theirs.as_fd(), COMMAND, address) == Ok(ANSWER);
        send_with_descriptor(theirs.as_fd(), &[u8::from(answered)], None)?;
        // The trial is over: no exec.
        Err(Errno::CANCELED)
    });
    std::thread::scope(|scope| {
        // Starting a child returns only when it has execed or given up.
        scope.spawn(move || {
            let started = command.spawn();
            drop(command);
            if let Ok(mut child) = started {
                crate::launch::end(&mut child);
            }
        });
        let mut message = [0; 4];
        await_readable(&ours)?;
        let listener = match receive_with_descriptor(ours.as_fd(), &mut message)? {
            (4, Some(listener)) => Listener::new(listener),
            (4, None) => {
                let errno = i32::from_ne_bytes(message);
                return Err(if (1..4096).contains(&errno) {
                    Errno::from_raw_os_error(errno)
                } else {
                    Errno::PROTO
                });
            }
            _ => return Err(Errno::CHILD),
        };
        let synchronous = listener.wake_synchronously();
        let before = listener.received();
        await_readable(&listener)?;
        let notification = listener.receive(before).ok_or(Errno::SRCH)?;
        let mut findings = look_into(&listener, &notification, expected);
        findings.synchronous = synchronous;
        findings.round_trip = (|| {
            if architecture.call(notification.number) != Some(SystemCall::Ioctl)
                || notification.arguments[1] as u32 != COMMAND
                || !listener.send(notification.id, Answer::Value(ANSWER.into()))
            {
                return Err(Errno::PROTO);
            }
            await_readable(&ours)?;
            let mut answered = [0];
            receive_with_descriptor(ours.as_fd(), &mut answered)?;
            if answered == [1] { Ok(()) } else { Err(Errno::PROTO) }
        })();
        // If the child still waits, it is let go with the listener.
        Ok(findings)
    })
}

fn await_readable(descriptor: impl AsFd) -> Result<(), Errno> {
    let mut descriptors = [PollFd::new(&descriptor, PollFlags::IN)];
    match rustix::io::retry_on_intr(|| poll(&mut descriptors, Some(&PATIENCE)))? {
        0 => Err(Errno::TIMEDOUT),
        _ => Ok(()),
    }
}

/// Tries on a waiting child what serving it needs.
fn look_into(listener: &Listener, notification: &Notification, expected: u64) -> Findings {
    let thread = notification.thread;
    let [descriptor, _, address, ..] = notification.arguments;
    let descriptor = descriptor as i32;
    let whole = |count| if count == 8 { Ok(()) } else { Err(Errno::FAULT) };
    let same = |word: [u8; 8]| if u64::from_ne_bytes(word) == expected { Ok(()) } else { Err(Errno::FAULT) };
    let directory = || {
        let directory = TaskDirectory::open(thread)?;
        if listener.is_valid(notification.id) { Ok(directory) } else { Err(Errno::SRCH) }
    };
    Findings {
        round_trip: Err(Errno::PROTO),
        synchronous: false,
        memory_read: (|| {
            let mut word = [0; 8];
            whole(memory::read(thread, address, &mut word)?)?;
            same(word)
        })(),
        memory_write: memory::write(thread, address, &expected.to_ne_bytes()).and_then(whole),
        memory_handle: (|| {
            let handle = directory()?.file("mem", OFlags::RDWR)?;
            let mut word = [0; 8];
            whole(rustix::io::pread(&handle, &mut word, address)?)?;
            same(word)
        })(),
        descriptor_status: directory()
            .and_then(|directory| directory.descriptor_status(descriptor).map(drop)),
        descriptor_duplicate: (|| {
            let pid = Pid::from_raw(thread as i32).ok_or(Errno::SRCH)?;
            let pidfd: OwnedFd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
            rustix::process::pidfd_getfd(&pidfd, descriptor, PidfdGetfdFlags::empty()).map(drop)
        })(),
    }
}
