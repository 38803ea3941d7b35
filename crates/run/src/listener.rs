//! The supervisor's end of the filter: requests come in, answers go out.
//!
//! Receiving is arranged so that no thread blocks in the receive call itself, which older kernels do not end when the
//! last client goes: a thread waits in epoll, and takes the receive lock for the instant of "is one there? then take
//! it" (in the kernel, receiving takes a lock of the listener's own anyway). Asking is a system call, and is left out
//! where the answer is known: when nobody has received anything since before the wait that found a request.
//!
//! The waits are exclusive, so that one request wakes one thread, and always the first that is idle: a client that
//! calls once at a time is served by one thread whose caches are warm. Blocking in the receive call would save the
//! wait, but the kernel wakes all who are blocked there for each request, and then the second costs more than it saves.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::sys::seccomp;
pub(crate) use crate::sys::seccomp::{Answer, Notification};

/// The listener of one filter. Kept in this process only: whoever holds it decides about the clients' system calls.
#[derive(Debug)]
pub(crate) struct Listener {
    descriptor: OwnedFd,
    receiving: Mutex<()>,
    /// How often the kernel was asked for a request.
    received: AtomicU64,
}

/// The state of the listener before a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received(u64);

impl Listener {
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self { descriptor, receiving: Mutex::new(()), received: AtomicU64::new(0) }
    }

    /// Has client and server wake each other on the CPU they are on, which is several times faster. False if this
    /// kernel cannot.
    pub(crate) fn wake_synchronously(&self) -> bool {
        seccomp::set_sync_wake_up(self.descriptor.as_fd()).is_ok()
    }

    /// To be asked before a wait, and passed to [`Listener::receive`] after it.
    pub(crate) fn received(&self) -> Received {
        Received(self.received.load(Ordering::Acquire))
    }

    /// Takes a request if one is waiting, as a wait that began after `before` has found. A client that died meanwhile
    /// is no request.
    pub(crate) fn receive(&self, before: Received) -> Option<Notification> {
        let _receiving = self.receiving.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The kernel counts requests, and only receiving counts down: what the wait has found is there, or its client
        // has died, and then receiving fails and does not block.
        if self.received() != before && !is_ready(self.descriptor.as_fd()) {
            return None;
        }
        let notification = seccomp::receive(self.descriptor.as_fd()).ok();
        self.received.fetch_add(1, Ordering::Release);
        notification
    }

    /// Answers a request. False if the client has left, killed while it waited: nobody sees the answer.
    pub(crate) fn send(&self, id: u64, answer: Answer) -> bool {
        match seccomp::send(self.descriptor.as_fd(), id, answer) {
            Ok(()) => true,
            Err(Errno::NOENT) => false,
            Err(errno) => {
                tracing::error!(%errno, ?answer, "the kernel did not take an answer");
                false
            }
        }
    }

    /// Whether the client of the request still waits, and its thread id is therefore still its own.
    pub(crate) fn is_valid(&self, id: u64) -> bool {
        seccomp::is_valid(self.descriptor.as_fd(), id)
    }

    /// Gives the client a descriptor of its own for an open file; the request stays unanswered.
    pub(crate) fn add_descriptor(
        &self,
        id: u64,
        file: BorrowedFd<'_>,
        close_on_exec: bool,
    ) -> Result<i32, Errno> {
        seccomp::add_descriptor(self.descriptor.as_fd(), id, file, close_on_exec)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn is_ready(listener: BorrowedFd<'_>) -> bool {
    let mut descriptors = [PollFd::new(&listener, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut descriptors, Some(&now)).is_ok() && descriptors[0].revents().contains(PollFlags::IN)
}

/// What ended a worker's wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// A request may be there.
    Request,
    /// The work is over.
    Stop,
}

/// One worker's place to wait for requests.
#[derive(Debug)]
pub(crate) struct Waiter {
    epoll: OwnedFd,
}

impl Waiter {
    const REQUEST: u64 = 0;
    const STOP: u64 = 1;

    /// Waits on `listener` together with others, and on `stop` (an eventfd that stays readable) by itself.
    pub(crate) fn new(listener: &Listener, stop: BorrowedFd<'_>) -> Result<Self, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            listener,
            EventData::new_u64(Self::REQUEST),
            EventFlags::IN | EventFlags::EXCLUSIVE,
        )?;
        epoll::add(&epoll, stop, EventData::new_u64(Self::STOP), EventFlags::IN)?;
        Ok(Self { epoll })
    }

    pub(crate) fn wait(&self) -> Woken {
        let mut events: [epoll::Event; 2] =
            [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 2];
        loop {
            match epoll::wait(&self.epoll, &mut events[..], None) {
                Ok(count) => {
                    let events = &events[..count];
                    // A hang-up without a request is the end as well; the supervisor sees it too.
                    let over = |event: &epoll::Event| {
                        event.data.u64() == Self::STOP || !{ event.flags }.contains(EventFlags::IN)
                    };
                    return if events.iter().any(over) { Woken::Stop } else { Woken::Request };
                }
                Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "waiting for requests failed");
                    return Woken::Stop;
                }
            }
        }
    }
}
