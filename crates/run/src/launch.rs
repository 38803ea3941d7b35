//! Starting a program under the filter, and getting hold of its listener.
//!
//! The child installs the filter on itself between fork and exec and sends the listener's descriptor back over a
//! socket pair. It sends a report either way, because all that the standard library would tell us about a failure
//! there is one errno that could as well be exec's.

use std::ffi::{OsStr, OsString};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::filter::{self, Architecture};
use crate::sys::child::{ChildSignal, before_exec};
use crate::sys::seccomp::{self, Instruction};

/// Why a program could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The filter is written for the system calls of x86-64 and of 64-bit little-endian Arm.
    #[error("system calls of this architecture are not known; x86-64 and aarch64 are")]
    Architecture,
    /// A filter with a listener is in place already.
    #[error(
        "this process already runs under a seccomp filter with a listener (an outer `ioasid run`, or a container \
         manager that uses one, such as LXD), and the kernel allows only one; start the program outside of it"
    )]
    ListenerInUse,
    /// The kernel lacks user notification or the flag that makes it safe.
    #[error(
        "this kernel does not offer seccomp user notification with WAIT_KILLABLE_RECV ({0}); Linux 5.19 or later \
         with CONFIG_SECCOMP_FILTER does"
    )]
    KernelTooOld(Errno),
    /// The sandbox around us forbids to install filters.
    #[error(
        "installing a seccomp filter is not permitted here ({0}); allow the seccomp system call and no_new_privs in \
         the container's or sandbox's profile"
    )]
    NotPermitted(Errno),
    /// Something else failed while the child was being prepared.
    #[error("could not prepare the program's process: {0}")]
    Prepare(Errno),
    /// The program could not be executed.
    #[error("cannot execute {program:?}: {source}")]
    Execute {
        /// The program, as it was given.
        program: OsString,
        /// What the system said.
        source: std::io::Error,
    },
    /// This process cannot get what it needs to serve.
    #[error("cannot set up the supervisor: {0}")]
    Supervisor(#[from] Errno),
    /// Another run in this process has taken the signals over.
    #[error("another foreground run is active in this process; signals can be handled for only one")]
    ForegroundInUse,
}

/// What the child shall be like.
#[derive(Debug, Default)]
pub(crate) struct ChildSetup {
    /// What signals do in the child, where it is something else in us.
    pub(crate) signals: Vec<ChildSignal>,
    /// The soft limit on open files, where ours is another.
    pub(crate) descriptor_limit: Option<Option<u64>>,
}

/// Where preparing the child had come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Surroundings = 1,
    Filter = 2,
    Done = 3,
}

impl Step {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Surroundings, Self::Filter, Self::Done].into_iter().find(|step| *step as u8 == byte)
    }
}

/// The length of a report: the step in the first byte, the errno in the next four.
const REPORT: usize = 5;

/// What the child said before its exec.
#[derive(Debug)]
enum Report {
    /// The filter is in place; here is its listener.
    Ready(OwnedFd),
    /// The kernel refused the filter.
    NoFilter(Errno),
    /// Something before that failed.
    NotPrepared(Errno),
}

/// Starts `program` under the filter; returns it and its listener.
pub(crate) fn launch<I, S>(
    program: &OsStr,
    arguments: I,
    setup: ChildSetup,
) -> Result<(Child, OwnedFd), RunError>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let architecture = Architecture::native().ok_or(RunError::Architecture)?;
    let filter = filter::program(&architecture);
    seccomp::check_sizes().map_err(RunError::KernelTooOld)?;
    let (ours, theirs) = reporting_channel()?;
    let parent = rustix::process::getpid();

    let mut command = Command::new(program);
    command.args(arguments);
    before_exec(&mut command, move || {
        let (step, result) = prepare(parent, &setup, &filter);
        match result {
            Ok(listener) => report(theirs.as_fd(), Step::Done, 0, Some(listener.as_fd())),
            Err(errno) => {
                report(theirs.as_fd(), step, errno.raw_os_error(), None)?;
                Err(errno)
            }
        }
    });
    let spawned = command.spawn();
    // The closure holds the child's end; without it, our end hears when the child is through.
    drop(command);

    match (receive_report(ours.as_fd()), spawned) {
        (Ok(Report::Ready(listener)), Ok(child)) => Ok((child, listener)),
        // Without a report the standard library failed before our part came.
        (Ok(Report::Ready(_)) | Err(_), Err(source)) => {
            Err(RunError::Execute { program: program.to_owned(), source })
        }
        (Ok(Report::NoFilter(errno)), _) => Err(refused_filter(errno)),
        (Ok(Report::NotPrepared(errno)), _) => Err(RunError::Prepare(errno)),
        (Err(errno), Ok(mut child)) => {
            end(&mut child);
            Err(RunError::Prepare(errno))
        }
    }
}

/// What it means that the kernel did not take the filter.
pub(crate) fn refused_filter(errno: Errno) -> RunError {
    match errno {
        Errno::BUSY => RunError::ListenerInUse,
        Errno::INVAL | Errno::NOSYS => RunError::KernelTooOld(errno),
        Errno::PERM | Errno::ACCESS => RunError::NotPermitted(errno),
        other => RunError::Prepare(other),
    }
}

/// Our and the child's end of a channel that keeps messages apart.
pub(crate) fn reporting_channel() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// In the child: async-signal-safe.
fn prepare(parent: Pid, setup: &ChildSetup, filter: &[Instruction]) -> (Step, Result<OwnedFd, Errno>) {
    let surroundings = || {
        // Without us its opens would fail for ever. The parent may have died before this was said.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            return Err(Errno::SRCH);
        }
        for signal in &setup.signals {
            signal.reset()?;
        }
        if let Some(current) = setup.descriptor_limit {
            let maximum = getrlimit(Resource::Nofile).maximum;
            setrlimit(Resource::Nofile, Rlimit { current, maximum })?;
        }
        Ok(())
    };
    if let Err(errno) = surroundings() {
        return (Step::Surroundings, Err(errno));
    }
    (Step::Filter, install(filter))
}

/// Installs the filter with whatever privilege there is. Async-signal-safe.
pub(crate) fn install(filter: &[Instruction]) -> Result<OwnedFd, Errno> {
    match seccomp::install(filter) {
        // Who may not filter programs of more privilege promises that there will be none.
        Err(Errno::ACCESS) => {
            seccomp::set_no_new_privileges()?;
            seccomp::install(filter)
        }
        other => other,
    }
}

/// Async-signal-safe.
fn report(
    channel: BorrowedFd<'_>,
    step: Step,
    errno: i32,
    listener: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut bytes = [step as u8; REPORT];
    bytes[1..].copy_from_slice(&errno.to_ne_bytes());
    send_with_descriptor(channel, &bytes, listener)
}

/// Sends a message and perhaps a descriptor. Async-signal-safe.
pub(crate) fn send_with_descriptor(
    channel: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(channel, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message and perhaps a descriptor; returns how long it was. 0: nobody is left who could send.
pub(crate) fn receive_with_descriptor(
    channel: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(channel, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((received.bytes, descriptor))
}

fn receive_report(channel: BorrowedFd<'_>) -> Result<Report, Errno> {
    let mut bytes = [0; REPORT];
    let (length, listener) = receive_with_descriptor(channel, &mut bytes)?;
    let [step, errno @ ..] = bytes;
    let errno = i32::from_ne_bytes(errno);
    match (length, Step::from_byte(step), listener) {
        (REPORT, Some(Step::Done), Some(listener)) => Ok(Report::Ready(listener)),
        (REPORT, Some(step), None) if (1..4096).contains(&errno) => {
            let errno = Errno::from_raw_os_error(errno);
            Ok(if step == Step::Filter { Report::NoFilter(errno) } else { Report::NotPrepared(errno) })
        }
        _ => Err(Errno::PROTO),
    }
}

/// Ends a child that cannot be served.
pub(crate) fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}
