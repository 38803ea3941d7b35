//! One request, as the server's [`Client`]: the memory, descriptors and address space of the thread that waits.
//!
//! Memory is copied by `process_vm_readv` and `process_vm_writev`, which respect page protections as a system call
//! of the client's own would. They name the thread by its id, so the request is checked to be still waiting: before a
//! write, because the id must not have become a stranger's, and after a read, because what was read must be the
//! client's. Neither can be left out: the request may have lasted long in between.
//!
//! An argument is read in pieces (its size, then the rest), and copying from another process is most of what a call
//! costs. So a small read takes along what follows in the page, and what comes next is answered from that; a client that
//! changes its argument between two reads changes nothing. For a call that will ask which address space the thread runs
//! in, the bytes that tell are read in the same step.

use std::cell::{Cell, RefCell, RefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ioasid_server::{Client, Descriptor, File, Process};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use crate::files::{Access, Inode, OpenFile, OpenFiles};
use crate::listener::{Listener, Notification};
use crate::process::{Processes, Thread};
use crate::sys::memory;
use crate::watcher::What;

/// A request and what is needed to look into its client.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) notification: Notification,
    listener: &'a Listener,
    processes: &'a Processes,
    files: &'a OpenFiles,
    thread: RefCell<Option<Arc<Thread>>>,
    /// Whether a lookup through the thread's directory has succeeded since the request came: it is the right thread.
    confirmed: Cell<bool>,
    /// What was read last.
    ahead: RefCell<ReadAhead>,
    /// What the thread has at [`Thread::random_address`].
    random: Cell<Option<[u8; 16]>>,
    /// What there is to say about the call, if somebody looks on.
    pub(crate) what: RefCell<Option<What>>,
}

/// The pages of clients are not smaller.
const PAGE_SIZE: u64 = 4096;

/// As long as any argument.
const READ_AHEAD: usize = 128;

/// A copy of some bytes of the client.
#[derive(Debug)]
struct ReadAhead {
    address: u64,
    length: usize,
    bytes: [u8; READ_AHEAD],
}

impl ReadAhead {
    const NOTHING: Self = Self { address: 0, length: 0, bytes: [0; READ_AHEAD] };

    /// The bytes from `address` on, if all are there.
    fn get(&self, address: u64, length: usize) -> Option<&[u8]> {
        let start = usize::try_from(address.checked_sub(self.address)?).ok()?;
        self.bytes[..self.length].get(start..start.checked_add(length)?)
    }
}

/// What a descriptor number of the client refers to.
#[derive(Debug)]
pub(crate) enum Resolved {
    Ours(Arc<OpenFile>),
    /// Another file, of this type.
    Foreign(FileType),
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        notification: Notification,
        listener: &'a Listener,
        processes: &'a Processes,
        files: &'a OpenFiles,
    ) -> Self {
        Self {
            notification,
            listener,
            processes,
            files,
            thread: RefCell::new(None),
            confirmed: Cell::new(false),
            ahead: RefCell::new(ReadAhead::NOTHING),
            random: Cell::new(None),
            what: RefCell::new(None),
        }
    }

    /// The thread that waits, as it is remembered: lookups through it fail if it is another that had the same id.
    pub(crate) fn thread(&self) -> Result<Arc<Thread>, Errno> {
        if let Some(thread) = self.thread.borrow().as_ref() {
            return Ok(Arc::clone(thread));
        }
        let thread = self.processes.thread(self.listener, self.notification.id, self.notification.thread)?;
        Ok(Arc::clone(self.thread.borrow_mut().insert(thread)))
    }

    /// The thread that waits, certainly.
    pub(crate) fn current_thread(&self) -> Result<Arc<Thread>, Errno> {
        let thread = self.thread()?;
        if self.confirmed.get() || thread.directory.is_alive() { Ok(thread) } else { self.renewed_thread() }
    }

    fn renewed_thread(&self) -> Result<Arc<Thread>, Errno> {
        let thread = self.processes.renew(self.listener, self.notification.id, self.notification.thread)?;
        self.confirmed.set(true);
        Ok(Arc::clone(self.thread.borrow_mut().insert(thread)))
    }

    /// What descriptor `fd` of the client is.
    ///
    /// # Errors
    /// `EBADF` if it is not open, `EFAULT` if the client may not be looked into, `ESRCH` if it has gone.
    pub(crate) fn resolve(&self, fd: i32) -> Result<Resolved, Errno> {
        if fd < 0 {
            return Err(Errno::BADF);
        }
        let status = match self.thread()?.directory.descriptor_status(fd) {
            // No such descriptor; or what was remembered under this thread id is a thread that has died.
            Err(Errno::NOENT | Errno::SRCH) => self.renewed_thread()?.directory.descriptor_status(fd),
            other => other,
        };
        match status {
            Ok(status) => {
                self.confirmed.set(true);
                Ok(match self.files.get(Inode::from(&status)) {
                    Some(open_file) => Resolved::Ours(open_file),
                    None => Resolved::Foreign(FileType::from_raw_mode(status.stx_mode.into())),
                })
            }
            Err(Errno::NOENT) => Err(Errno::BADF),
            Err(errno) => Err(self.unreachable("descriptors", errno)),
        }
    }

    /// The errno for a client that cannot be looked into, with a line in the log the first time.
    fn unreachable(&self, what: &str, errno: Errno) -> Errno {
        if matches!(errno, Errno::PERM | Errno::ACCESS) {
            let first = match self.thread() {
                Ok(thread) => !thread.complained.swap(true, Ordering::Relaxed),
                Err(_) => true,
            };
            if first {
                tracing::warn!(
                    thread = self.notification.thread,
                    %errno,
                    "cannot reach the {what} of a client: it is not dumpable (prctl PR_SET_DUMPABLE, or a program \
                     file that may not be read), or ptrace is restricted; its calls fail with EFAULT"
                );
            }
        }
        Errno::FAULT
    }

    /// A duplicate of descriptor `fd`, which is not ours and of this type.
    fn duplicate(&self, fd: i32, kind: FileType) -> Result<OwnedFd, Errno> {
        match self.duplicate_by_pidfd(fd) {
            Ok(duplicate) => return Ok(duplicate),
            Err(Errno::BADF) => return Err(Errno::BADF),
            // Containers often deny it.
            Err(_) => {}
        }
        // Opening anew instead is harmless for files; for a FIFO or a device it might not be.
        if kind != FileType::RegularFile {
            return Err(self.unreachable("descriptors", Errno::PERM));
        }
        let thread = self.thread()?;
        let directory = &thread.directory;
        let name = format!("fd/{fd}");
        directory
            .file(&name, OFlags::RDWR)
            .or_else(|_| directory.file(&name, OFlags::RDONLY))
            .map_err(|errno| self.unreachable("descriptors", errno))
    }

    /// The second argument, which tells ioctls apart.
    fn command(&self) -> u32 {
        self.notification.arguments[1] as u32
    }

    /// Reads `length` bytes, which lie in one page, and whatever else the call will need.
    fn read_ahead(&self, address: u64, length: usize) -> Result<RefMut<'_, ReadAhead>, Errno> {
        let mut ahead = self.ahead.borrow_mut();
        ahead.length = 0;
        let thread = self.notification.thread;
        // Confirmed: what is remembered is of this thread, and not of one that had its id before.
        let remembered = self.thread.borrow();
        let will_be_asked = remembered.as_ref().filter(|thread| {
            self.confirmed.get() && thread.asked_by.load(Ordering::Relaxed) == self.command()
        });
        let count = match will_be_asked.and_then(|thread| thread.random_address()) {
            Some(random_address) if self.random.get().is_none() => {
                let mut random = [0; 16];
                let first = (address, &mut ahead.bytes[..length]);
                let count = memory::read_two(thread, first, (random_address, &mut random))?;
                if count == length + random.len() {
                    self.random.set(Some(random));
                }
                count.min(length)
            }
            _ => memory::read(thread, address, &mut ahead.bytes[..length])?,
        };
        // A page is there as a whole or not at all.
        if count < length {
            return Err(Errno::FAULT);
        }
        (ahead.address, ahead.length) = (address, length);
        Ok(ahead)
    }

    fn duplicate_by_pidfd(&self, fd: i32) -> Result<OwnedFd, Errno> {
        /// A pidfd for a thread that is not the first of its process.
        const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
        let open = |id: u32, flags| {
            let id = i32::try_from(id).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
            rustix::process::pidfd_open(id, flags)
        };
        let pidfd = match open(self.notification.thread, PIDFD_THREAD) {
            // Before Linux 6.9 only for whole processes, whose threads share their descriptors as a rule.
            Err(Errno::INVAL) => open(self.thread()?.process_id()?, PidfdFlags::empty()),
            other => other,
        }?;
        if !self.listener.is_valid(self.notification.id) {
            return Err(Errno::SRCH);
        }
        rustix::process::pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty())
    }
}

impl Client for Call<'_> {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        if buffer.is_empty() {
            return Ok(());
        }
        if let Some(bytes) = self.ahead.borrow().get(address, buffer.len()) {
            buffer.copy_from_slice(bytes);
            return Ok(());
        }
        // Beyond the page there may be nothing, or something that makes us wait.
        let in_page = (PAGE_SIZE - address % PAGE_SIZE).min(READ_AHEAD as u64) as usize;
        let read = if buffer.len() <= in_page {
            self.read_ahead(address, in_page).map(|ahead| {
                buffer.copy_from_slice(&ahead.bytes[..buffer.len()]);
                buffer.len()
            })
        } else {
            memory::read(self.notification.thread, address, buffer)
        };
        match read {
            Ok(count) if count == buffer.len() => {}
            Ok(_) => return Err(Errno::FAULT),
            Err(errno) => return Err(self.unreachable("memory", errno)),
        }
        if self.listener.is_valid(self.notification.id) {
            return Ok(());
        }
        // It may be a stranger's.
        self.ahead.borrow_mut().length = 0;
        self.random.set(None);
        Err(Errno::FAULT)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.is_empty() {
            return Ok(());
        }
        if !self.listener.is_valid(self.notification.id) {
            return Err(Errno::FAULT);
        }
        self.ahead.borrow_mut().length = 0;
        match memory::write(self.notification.thread, address, bytes) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(Errno::FAULT),
            Err(errno) => Err(self.unreachable("memory", errno)),
        }
    }

    fn descriptor(&self, fd: i32) -> Result<Descriptor, Errno> {
        match self.resolve(fd)? {
            Resolved::Ours(open_file) => Ok(Descriptor::Ours(Arc::clone(&open_file.file))),
            Resolved::Foreign(kind) => self.duplicate(fd, kind).map(Descriptor::Foreign),
        }
    }

    fn give_descriptor(&self, file: File, close_on_exec: bool) -> Result<i32, Errno> {
        let file = self.files.insert(file, "ioasid", Access::ReadWrite, OFlags::empty())?;
        // Ours is closed when this returns, so that the client's close can be the last one.
        self.listener.add_descriptor(self.notification.id, file.as_fd(), close_on_exec)
    }

    fn process(&self) -> Result<Arc<dyn Process>, Errno> {
        let thread = self.current_thread()?;
        thread.asked_by.store(self.command(), Ordering::Relaxed);
        let seen = self.random.get();
        match self.processes.address_space(self.listener, self.notification.id, &thread, seen) {
            Ok(space) => Ok(space),
            Err(Errno::SRCH) => Err(Errno::SRCH),
            Err(errno) => Err(self.unreachable("memory", errno)),
        }
    }
}
