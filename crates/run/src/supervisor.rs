//! The life of a run: start the program, serve its calls and those of all its descendants, and end with the last one.
//!
//! The calling thread watches: the listener's hang-up (no process uses the filter any more), the main program's end,
//! closes by programs that call nothing afterwards, and signals. Workers serve the requests. One worker serves a
//! program that calls once at a time; whenever the last idle one becomes busy, another is started, so that a client
//! that makes one wait (its memory may be slow: a FUSE file, userfaultfd) stops no other. Their number is bounded, and
//! nobody has all of them (`turns`).

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use ioasid_server::Server;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, pidfd_open, pidfd_send_signal, setrlimit,
};

use crate::files::OpenFiles;
use crate::filter::Architecture;
use crate::launch::{ChildSetup, RunError, end, launch};
use crate::listener::{Listener, Waiter, Woken};
use crate::process::Processes;
use crate::serve::Service;
use crate::statistics::Statistics;
use crate::sys::child::{Signals, reap_orphans};
use crate::turns::Turns;
use crate::watcher::Watcher;

/// How a program is run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Behave like a command at a terminal that runs another: leave SIGINT, SIGQUIT and SIGHUP to the program, pass
    /// SIGTERM on to it, become the reaper of orphaned descendants (so that they stay reachable under Yama's
    /// restricted ptrace), and raise this process's soft limit on open files to the hard one. All of it is undone at
    /// the end, but it changes the whole process meanwhile: a library in a program with children of its own says
    /// `false`. Default: `true`.
    pub foreground: bool,
    /// The most requests that are served at the same time. A request that waits for its client's own memory counts
    /// as long as it waits. A process with its descendants has at most half of them, and in general no more than it leaves to others;
    /// what it asks beyond that waits until some of its requests have ended. Default: 1024.
    pub workers: usize,
    /// Who hears of each call. Default: nobody.
    pub watcher: Option<Arc<dyn Watcher>>,
}

impl Default for Options {
    fn default() -> Self {
        Self { foreground: true, workers: 1024, watcher: None }
    }
}

/// How a run went.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// The program's own exit status, or the signal that ended it.
    pub status: ExitStatus,
    /// The calls that were served, of the program and its descendants.
    pub statistics: Statistics,
}

/// Runs `program` (looked up in `PATH`) with `arguments` and gives it and its descendants the files of `server`.
/// Returns when the last of them has ended. Its standard input, output and error are ours.
///
/// The program is killed if the calling thread dies before it.
///
/// # Errors
/// The program was not run; see [`RunError`].
pub fn run<I, S>(
    program: impl AsRef<OsStr>,
    arguments: I,
    options: &Options,
    server: Arc<Server>,
) -> Result<Outcome, RunError>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let architecture = Architecture::native().ok_or(RunError::Architecture)?;
    let files = OpenFiles::new()?;
    let foreground = if options.foreground { Some(Foreground::enter()?) } else { None };
    let setup = foreground.as_ref().map(Foreground::child_setup).unwrap_or_default();
    let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;

    let (child, listener) = launch(program.as_ref(), arguments, setup)?;
    let listener = Listener::new(listener);
    if !listener.wake_synchronously() {
        tracing::warn!(
            "this kernel cannot wake client and server on one CPU (Linux 6.6 can): calls are slower"
        );
    }
    let service = Service {
        architecture,
        server,
        listener,
        files,
        processes: Processes::new(child.id()),
        link_lookups: AtomicUsize::new(0),
        watcher: options.watcher.clone(),
    };
    let crew = Crew::new(&service, stop, options.workers.max(1));
    let program = Program::new(child)?;
    let status = std::thread::scope(|scope| {
        let status = match crew.start_worker(scope) {
            Ok(()) => program.watch(&service, foreground.as_ref()),
            Err(errno) => {
                program.abandon();
                Err(errno.into())
            }
        };
        crew.dismiss();
        status
    })?;
    Ok(Outcome { status, statistics: crew.statistics() })
}

/// The workers.
#[derive(Debug)]
struct Crew<'service> {
    service: &'service Service,
    /// Readable for ever when the work is over.
    stop: OwnedFd,
    most: usize,
    /// How many there are, and how many of them wait for a request.
    started: AtomicUsize,
    idle: AtomicUsize,
    turns: Turns,
    statistics: Mutex<Statistics>,
}

impl<'service> Crew<'service> {
    fn new(service: &'service Service, stop: OwnedFd, most: usize) -> Self {
        Self {
            service,
            stop,
            most,
            started: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
            turns: Turns::new(most),
            statistics: Mutex::default(),
        }
    }

    /// Starts one more worker, unless there are enough.
    fn start_worker<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> Result<(), Errno> {
        let count = |count| (count < self.most).then_some(count + 1);
        if self.started.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count).is_err() {
            return Ok(());
        }
        let waiter = Waiter::new(&self.service.listener, self.stop.as_fd());
        self.idle.fetch_add(1, Ordering::SeqCst);
        let started = waiter.and_then(|waiter| {
            Builder::new()
                .name("ioasid-worker".to_owned())
                .spawn_scoped(scope, move || self.work(scope, &waiter))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
        });
        if let Err(errno) = started {
            self.idle.fetch_sub(1, Ordering::SeqCst);
            self.started.fetch_sub(1, Ordering::SeqCst);
            return Err(errno);
        }
        Ok(())
    }

    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, waiter: &Waiter) {
        let mut statistics = Statistics::default();
        let Service { listener, processes, .. } = self.service;
        let place = self.turns.place();
        loop {
            let before = listener.received();
            if waiter.wait() == Woken::Stop {
                break;
            }
            let Some(notification) = listener.receive(before) else { continue };
            if self.idle.fetch_sub(1, Ordering::SeqCst) == 1 {
                if let Err(errno) = self.start_worker(scope) {
                    tracing::warn!(%errno, "cannot start another worker; requests may have to wait");
                }
            }
            let mut turn = if self.turns.begins(&place, notification, listener, processes) {
                Some(notification)
            } else {
                self.turns.next(&place, listener, processes)
            };
            while let Some(notification) = turn {
                self.service.handle(notification, &mut statistics);
                self.turns.ended(&place);
                turn = self.turns.next(&place, listener, processes);
            }
            self.idle.fetch_add(1, Ordering::SeqCst);
        }
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner).merge(&statistics);
    }

    /// Tells the workers that no more requests will come.
    fn dismiss(&self) {
        // An eventfd that was zero takes a one.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    fn statistics(&self) -> Statistics {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The main program.
#[derive(Debug)]
struct Program {
    child: Child,
    pidfd: OwnedFd,
}

impl Program {
    fn new(mut child: Child) -> Result<Self, RunError> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH);
        match pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Ok(pidfd) => Ok(Self { child, pidfd }),
            Err(errno) => {
                end(&mut child);
                Err(RunError::Supervisor(errno))
            }
        }
    }

    /// Ends the program, because it cannot be served.
    fn abandon(mut self) {
        end(&mut self.child);
    }

    /// Looks after the run until no process uses the filter any more; returns the program's exit status.
    fn watch(mut self, service: &Service, foreground: Option<&Foreground>) -> Result<ExitStatus, RunError> {
        let mut status = None;
        let mut again: Option<Duration> = None;
        loop {
            let nothing = PollFlags::empty();
            let mut sources = vec![
                PollFd::new(&service.listener, nothing),
                PollFd::from_borrowed_fd(service.files.events(), PollFlags::IN),
            ];
            let main = status.is_none().then(|| {
                sources.push(PollFd::new(&self.pidfd, PollFlags::IN));
                sources.len() - 1
            });
            let signals = foreground.map(|foreground| {
                sources.push(PollFd::new(&foreground.signals, PollFlags::IN));
                sources.len() - 1
            });
            let timeout = again.map(|again| Timespec {
                tv_sec: again.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: again.subsec_nanos().into(),
            });
            match poll(&mut sources, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    // The scope would wait for the workers, so the clients must not live on.
                    self.abandon();
                    return Err(errno.into());
                }
            }
            let happened = |at: usize| !sources[at].revents().is_empty();
            let (over, ended) = (happened(0), main.is_some_and(happened));
            let signalled = signals.is_some_and(happened);
            drop(sources);

            again = service.files.drain_all();
            if ended {
                status = self
                    .child
                    .try_wait()
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::CHILD))?;
                service.processes.forget_dead();
            }
            if let Some(foreground) = foreground {
                if signalled && foreground.terminate_requested() && status.is_none() {
                    // It may have ended this very moment.
                    let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
                }
                if signalled || ended {
                    reap_orphans(if status.is_none() { self.child.id() } else { 0 });
                }
            }
            if over {
                break;
            }
        }
        service.files.clear();
        let status = match status {
            Some(status) => status,
            None => {
                self.child.wait().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::CHILD))?
            }
        };
        if foreground.is_some() {
            // A process leaves the filter a moment before it can be reaped.
            let patience = Instant::now() + Duration::from_secs(2);
            while reap_orphans(0) && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(status)
    }
}

/// What a foreground run changes in this process, until it is dropped.
#[derive(Debug)]
struct Foreground {
    /// The reading end of the signal pipe.
    signals: OwnedFd,
    taken: Signals,
    subreaper_before: Option<Pid>,
    descriptors_before: Rlimit,
}

static FOREGROUND: AtomicBool = AtomicBool::new(false);

impl Foreground {
    fn enter() -> Result<Self, RunError> {
        if FOREGROUND.swap(true, Ordering::SeqCst) {
            return Err(RunError::ForegroundInUse);
        }
        let entered = (|| {
            let (reading, writing) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            let taken = Signals::take_over(writing)?;
            let subreaper_before = rustix::process::child_subreaper()?;
            rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
            let descriptors_before = getrlimit(Resource::Nofile);
            let raised = Rlimit { current: descriptors_before.maximum, ..descriptors_before };
            if let Err(errno) = setrlimit(Resource::Nofile, raised) {
                tracing::debug!(%errno, "the limit on open files stays as it is");
            }
            Ok(Self { signals: reading, taken, subreaper_before, descriptors_before })
        })();
        if entered.is_err() {
            FOREGROUND.store(false, Ordering::SeqCst);
        }
        entered.map_err(RunError::Supervisor)
    }

    /// What the child must undo for itself.
    fn child_setup(&self) -> ChildSetup {
        ChildSetup {
            signals: self.taken.inherited_by_child(),
            descriptor_limit: Some(self.descriptors_before.current),
        }
    }

    /// Empties the signal pipe; true if a SIGTERM was in it.
    fn terminate_requested(&self) -> bool {
        let mut terminate = false;
        let mut numbers = [0; 64];
        while let Ok(count @ 1..) = rustix::io::read(&self.signals, &mut numbers) {
            terminate |= numbers[..count].contains(&(libc::SIGTERM as u8));
        }
        terminate
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the process goes on with what it has.
        let _ = rustix::process::set_child_subreaper(self.subreaper_before);
        let _ = setrlimit(Resource::Nofile, self.descriptors_before);
        FOREGROUND.store(false, Ordering::SeqCst);
    }
}
