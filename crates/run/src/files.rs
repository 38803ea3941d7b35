//! The open files of the clients: from `open` to the last close, wherever their descriptors travel.
//!
//! Each open file of the server is given to the client as an open file of a memfd made for it alone. So the kernel
//! does what it always does with descriptors (dup, fork, exec, passing over sockets, closing at a violent death), and
//! we recognise ours by their inode, whatever number they have in whichever process.
//!
//! The memfd itself never leaves: what the client gets is the same inode opened anew. What we keep is one more open
//! file of it, the *sentinel*. An inotify watch tells that some open file of the inode was closed; whether it was the
//! last one the sentinel answers exactly (see [`crate::sys::lease`]), so nothing has to be counted, and events that
//! the kernel merges or drops do no harm. Counting opens instead would go wrong when two equal events are merged.
//!
//! The event of a close is in the queue before `close` returns, and the kernel has forgotten the open file before the
//! closing thread can make its next call. So [`OpenFiles::drain`] before each request sees every close that came
//! before it, and a client that closes a device and opens it again never finds it busy with itself. A close by a
//! client that calls nothing afterwards is seen by the supervisor's own loop; there the event can be a moment early,
//! so such a file stays suspected and is asked about again.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use ioasid_server::File;
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::fs::{AtFlags, MemfdFlags, Mode, OFlags, SealFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::sys::lease;

/// Which inode a descriptor refers to: device (major and minor number) and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Inode {
    device: (u32, u32),
    number: u64,
}

impl From<&Statx> for Inode {
    fn from(status: &Statx) -> Self {
        Self { device: (status.stx_dev_major, status.stx_dev_minor), number: status.stx_ino }
    }
}

/// How a client opened a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    ReadWrite,
}

impl Access {
    fn flags(self) -> OFlags {
        match self {
            Self::Read => OFlags::RDONLY,
            Self::Write => OFlags::WRONLY,
            Self::ReadWrite => OFlags::RDWR,
        }
    }

    pub(crate) fn reads(self) -> bool {
        self != Self::Write
    }

    pub(crate) fn writes(self) -> bool {
        self != Self::Read
    }
}

/// One open file of the server and what stands for it in the clients.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) file: Arc<File>,
    pub(crate) access: Access,
    watch: i32,
    sentinel: OwnedFd,
}

/// A file of which an open file was closed, and that was still open elsewhere when we asked.
#[derive(Debug)]
struct Suspect {
    inode: Inode,
    since: Instant,
}

/// What `drain` works on; its lock makes closes happen one after the other, and before the requests that follow.
#[derive(Debug, Default)]
struct Closing {
    by_watch: HashMap<i32, Inode>,
    suspects: Vec<Suspect>,
}

/// All open files.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    inotify: OwnedFd,
    by_inode: RwLock<HashMap<Inode, Arc<OpenFile>>>,
    closing: Mutex<Closing>,
    /// How many there are, so that a request from a program that has none open costs nothing.
    count: AtomicUsize,
    /// Whether somebody is at work on closes, or one of them has still to be asked about. Set before any event is
    /// taken from the queue.
    settling: AtomicBool,
}

/// For how long a suspect is asked about at every request; a thread inside `close` is through with it long before, also where many
/// others want the processor. Few suspects get so old: their open files were opened anew through `/proc`.
const FRESH: Duration = Duration::from_secs(10);

/// For how long the requests that follow a close wait for it.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

impl OpenFiles {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            inotify: inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?,
            by_inode: RwLock::default(),
            closing: Mutex::default(),
            count: AtomicUsize::new(0),
            settling: AtomicBool::new(false),
        })
    }

    /// Readable when something was closed.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Makes the descriptor that stands for `file` in a client. Once no open file of it is left anywhere (the
    /// returned descriptor counts), `file` is dropped.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOSPC` (inotify watches) or `ENOMEM`; `file` is dropped.
    pub(crate) fn insert(
        &self,
        file: File,
        name: &str,
        access: Access,
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        let original = memfd(name)?;
        // Nothing can be stored in it: the server answers reads and writes of regions, the rest has no content.
        rustix::fs::fcntl_add_seals(
            &original,
            SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
        )?;
        let sentinel = reopen(original.as_fd(), OFlags::RDONLY)?;
        drop(original);
        lease::prepare(sentinel.as_fd())?;
        let watch = inotify::add_watch(
            &self.inotify,
            descriptor_path(sentinel.as_fd()),
            WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE,
        )?;
        let opened = reopen(sentinel.as_fd(), access.flags() | flags).and_then(|client| {
            let wanted = StatxFlags::INO;
            let inode = Inode::from(&rustix::fs::statx(&client, c"", AtFlags::EMPTY_PATH, wanted)?);
            Ok((client, inode))
        });
        let (client, inode) = match opened {
            Ok(opened) => opened,
            Err(errno) => {
                self.remove_watch(watch);
                return Err(errno);
            }
        };
        // From here on a close of `client` by anybody is noticed.
        let open_file = Arc::new(OpenFile { file: Arc::new(file), access, watch, sentinel });
        let mut closing = self.closing();
        closing.by_watch.insert(watch, inode);
        self.by_inode.write().unwrap_or_else(PoisonError::into_inner).insert(inode, open_file);
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(client)
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    /// The open file that `inode` stands for, if it is one of ours.
    pub(crate) fn get(&self, inode: Inode) -> Option<Arc<OpenFile>> {
        if self.is_empty() {
            return None;
        }
        self.by_inode.read().unwrap_or_else(PoisonError::into_inner).get(&inode).cloned()
    }

    /// Drops the files whose last close has happened. After it returns, every close that happened before the call in
    /// a thread that has gone on to another system call has had its effect.
    pub(crate) fn drain(&self) {
        if self.is_empty() {
            return;
        }
        // First the queue, then the flag: an event that is not in the queue any more was taken by somebody who had set
        // the flag. So requests without a close before them take no lock.
        let nothing_new = rustix::io::ioctl_fionread(&self.inotify) == Ok(0);
        if nothing_new && !self.settling.load(Ordering::SeqCst) {
            return;
        }
        self.work_on_closes(false);
    }

    /// The same for the supervisor's loop; also asks about old suspects. Returns when to call again if nothing
    /// happens before: `None` if there is no need.
    pub(crate) fn drain_all(&self) -> Option<Duration> {
        self.work_on_closes(true)
    }

    /// Takes the events and asks about suspects, fresh ones or all. Returns when somebody should ask again.
    fn work_on_closes(&self, all: bool) -> Option<Duration> {
        let mut closing = self.closing();
        self.settling.store(true, Ordering::SeqCst);
        let now = Instant::now();
        self.read_events(&mut closing, now);
        self.settle(&mut closing, |suspect| all || now.duration_since(suspect.since) < FRESH);
        let youngest = closing.suspects.iter().map(|suspect| now.duration_since(suspect.since)).min();
        self.settling.store(youngest.is_some_and(|age| age < FRESH), Ordering::SeqCst);
        // The older, the less often.
        youngest.map(|age| age.clamp(Duration::from_millis(2), Duration::from_secs(1)))
    }

    /// Drops every file: no client is left that could use one.
    pub(crate) fn clear(&self) {
        let mut closing = self.closing();
        closing.suspects.clear();
        let inodes: Vec<Inode> = closing.by_watch.values().copied().collect();
        for inode in inodes {
            self.remove(&mut closing, inode);
        }
    }

    fn closing(&self) -> MutexGuard<'_, Closing> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_events(&self, closing: &mut Closing, now: Instant) {
        let mut buffer = [const { std::mem::MaybeUninit::uninit() }; 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        // The queue is bounded, and only clients that close files refill it; still, one round reads no more than this.
        for _ in 0..1 << 16 {
            let event = match events.next() {
                Ok(event) => event,
                Err(Errno::INTR) => continue,
                Err(_) => break,
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                tracing::debug!("inotify lost events; asking about every open file");
                let Closing { by_watch, suspects } = closing;
                suspects.clear();
                suspects.extend(by_watch.values().map(|inode| Suspect { inode: *inode, since: now }));
            } else if event.events().intersects(ReadFlags::CLOSE_WRITE | ReadFlags::CLOSE_NOWRITE) {
                // A watch that is unknown belongs to a file that has gone already.
                if let Some(inode) = closing.by_watch.get(&event.wd()).copied() {
                    closing.suspects.retain(|suspect| suspect.inode != inode);
                    closing.suspects.push(Suspect { inode, since: now });
                }
            }
        }
    }

    /// Asks about the chosen suspects and drops those that nobody has open.
    fn settle(&self, closing: &mut Closing, choose: impl Fn(&Suspect) -> bool) {
        let mut at = 0;
        while at < closing.suspects.len() {
            let suspect = &closing.suspects[at];
            let inode = suspect.inode;
            if choose(suspect) && self.is_closed(inode) {
                closing.suspects.swap_remove(at);
                self.remove(closing, inode);
            } else {
                at += 1;
            }
        }
    }

    fn is_closed(&self, inode: Inode) -> bool {
        let Some(open_file) = self.get(inode) else { return true };
        match lease::is_only_one_open(open_file.sentinel.as_fd()) {
            Ok(only) => only,
            Err(errno) => {
                tracing::warn!(%errno, "cannot tell whether a file was closed for the last time; assuming so");
                true
            }
        }
    }

    fn remove(&self, closing: &mut Closing, inode: Inode) {
        let removed = self.by_inode.write().unwrap_or_else(PoisonError::into_inner).remove(&inode);
        if let Some(open_file) = removed {
            closing.by_watch.remove(&open_file.watch);
            self.remove_watch(open_file.watch);
            // Under the lock of `closing`, so that the requests that follow wait.
            let_go(open_file);
            // Only now may a request pass by without looking.
            self.count.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn remove_watch(&self, watch: i32) {
        if let Err(errno) = inotify::remove_watch(&self.inotify, watch) {
            tracing::debug!(%errno, "an inotify watch was gone already");
        }
    }
}

/// Lets the server close a file, and waits until it has, but not for ever.
///
/// A close stops the device's DMA, and that may be waiting for memory whose owner makes it wait (userfaultfd, a FUSE
/// file). Such a client shall not hold up the others, so after a moment its file closes in the background.
fn let_go(open_file: Arc<OpenFile>) {
    let (progress, wait) = std::sync::mpsc::sync_channel(2);
    let close = move || {
        let _ = progress.send(());
        drop(open_file);
        // Nobody waits any more if it took too long.
        let _ = progress.send(());
    };
    match std::thread::Builder::new().name("ioasid-close".to_owned()).spawn(close) {
        Ok(_) => {
            // When the thread gets its first turn is up to no client, and may be late where many want the processor.
            let _ = wait.recv();
            if wait.recv_timeout(CLOSE_PATIENCE).is_err() {
                tracing::warn!(
                    "a file takes long to close: a device waits for memory of a client, or much is unmapped"
                );
            }
        }
        // The closure, and with it the file, was dropped here.
        Err(error) => tracing::debug!(%error, "no thread for a close"),
    }
}

/// A descriptor with which a client reads `text` and nothing else.
///
/// # Errors
/// `EMFILE`, `ENFILE` or `ENOMEM`.
pub(crate) fn text(name: &str, text: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let original = memfd(name)?;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&original, rest))?;
        rest = &rest[written.min(rest.len())..];
    }
    rustix::fs::fcntl_add_seals(
        &original,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )?;
    reopen(original.as_fd(), OFlags::RDONLY | flags)
}

/// Tries whether the last close of a file can be told.
///
/// # Errors
/// What keeps the kernel from telling.
pub(crate) fn check_leases() -> Result<(), Errno> {
    let original = memfd("ioasid-check")?;
    let sentinel = reopen(original.as_fd(), OFlags::RDONLY)?;
    drop(original);
    lease::prepare(sentinel.as_fd())?;
    let other = reopen(sentinel.as_fd(), OFlags::RDWR)?;
    let open = lease::is_only_one_open(sentinel.as_fd())?;
    drop(other);
    let closed = lease::is_only_one_open(sentinel.as_fd())?;
    if !open && closed { Ok(()) } else { Err(Errno::NOTSUP) }
}

fn memfd(name: &str) -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Linux 6.3 wants to hear whether it may be executed; earlier kernels do not know the flag.
    match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    }
}

fn reopen(descriptor: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(descriptor_path(descriptor), flags | OFlags::CLOEXEC, Mode::empty())
}

fn descriptor_path(descriptor: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}
