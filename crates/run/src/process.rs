//! Client threads and the address spaces they run in, told apart for as long as someone needs them.
//!
//! A request carries a thread id, a number that is reused once the thread has died. So the first request of a thread
//! opens its `/proc/TID` directory and then asks the kernel whether that request is still waiting: if so, the thread
//! had lived all along and the directory is its own. From then on the *directory* is the thread's identity: lookups
//! through it fail once this very thread is gone, whatever its number is used for later.
//!
//! An address space ([`AddressSpace`]) is found the same way, with a handle on `/proc/TID/mem`, which stays bound to
//! the memory it was opened on: after exec or exit it reads nothing, and never another program's memory. A thread of
//! a live process changes its memory only by exec, and exec gives every new image 16 fresh random bytes at a random
//! place (`AT_RANDOM`); as long as a thread sees the same bytes at the same place, it runs in the same image. That is
//! one small read per question instead of opening and comparing handles. (A program that overwrites these bytes
//! becomes a new address space to us once, and can only confuse itself.)
//!
//! Processes that share memory without being threads of each other (`vfork`, `CLONE_VM`) count as different address
//! spaces here, although both handles reach the same memory.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockWriteGuard, Weak};

use ioasid_server::{LateBound, MemoryGone, Process};
use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::lineage::lineage;
use crate::listener::Listener;
use crate::maps;
use crate::sys::{credentials, memory};

/// More threads than this are never remembered: they are looked up anew.
const REMEMBERED_THREADS: usize = 256;

/// How many descriptors we may open for each thread that is remembered. One takes up to four: its directory, and its
/// process's, memory and maps. The dead ones among them are noticed late, and must not use up what the living need.
const DESCRIPTORS_PER_THREAD: u64 = 16;

/// The capability to lock memory without limit.
pub(crate) const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_RESOURCE: u32 = 24;

/// The user that stands for one that cannot be told.
const NOBODY: u32 = 65_534;

/// `/proc/ID` of one certain task.
#[derive(Debug)]
pub(crate) struct TaskDirectory(OwnedFd);

impl TaskDirectory {
    /// Opens the directory of the task that has this id now.
    pub(crate) fn open(id: u32) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(format!("/proc/{id}"), flags, Mode::empty()).map(Self)
    }

    /// Opens a file of the task.
    pub(crate) fn file(&self, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::openat(&self.0, name, flags | OFlags::CLOEXEC, Mode::empty())
    }

    /// What the link `name` points to: `cwd`, `root` or `fd/N`, as text.
    pub(crate) fn link(&self, name: &str) -> Result<std::path::PathBuf, Errno> {
        use std::os::unix::ffi::OsStringExt;
        let target = rustix::fs::readlinkat(&self.0, name, Vec::new())?;
        Ok(std::ffi::OsString::from_vec(target.into_bytes()).into())
    }

    /// The status of the file behind descriptor `fd` of the task.
    ///
    /// As it is known: no file system is asked that may let us wait for it (FUSE).
    pub(crate) fn descriptor_status(&self, fd: i32) -> Result<Statx, Errno> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO;
        rustix::fs::statx(&self.0, format!("fd/{fd}"), AtFlags::STATX_DONT_SYNC, wanted)
    }

    /// Whether this very task still exists.
    pub(crate) fn is_alive(&self) -> bool {
        rustix::fs::statat(&self.0, "comm", AtFlags::empty()).is_ok()
    }

    /// Reads a small text file of the task.
    pub(crate) fn text(&self, name: &str) -> Result<String, Errno> {
        let mut text = String::new();
        let file = std::fs::File::from(self.file(name, OFlags::RDONLY)?);
        file.take(1 << 16)
            .read_to_string(&mut text)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(text)
    }

    /// The value of one `Name:` line of `status`.
    fn status_field(&self, name: &str) -> Result<String, Errno> {
        let status = self.text("status")?;
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map(|value| value.trim().to_owned()).ok_or(Errno::SRCH)
    }
}

/// One thread of a client.
#[derive(Debug)]
pub(crate) struct Thread {
    id: u32,
    pub(crate) directory: TaskDirectory,
    address_space: Mutex<Option<Arc<AddressSpace>>>,
    /// The latest ioctl for which the server asked in which address space the thread runs. The next of its kind will
    /// need the answer again.
    pub(crate) asked_by: AtomicU32,
    /// Whether it was said that this thread's memory cannot be reached; once is enough.
    pub(crate) complained: AtomicBool,
    lineage: OnceLock<Arc<[u64]>>,
}

impl Thread {
    /// Where to read 16 bytes that tell whether the thread still runs in the address space that is remembered for it;
    /// `None` if none is.
    pub(crate) fn random_address(&self) -> Option<u64> {
        let remembered = self.address_space.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.as_ref().map(|space| space.random_address)
    }

    /// The id of the process that it belongs to.
    pub(crate) fn process_id(&self) -> Result<u32, Errno> {
        self.directory.status_field("Tgid")?.parse().map_err(|_| Errno::SRCH)
    }
}

/// The threads and address spaces that are known.
#[derive(Debug)]
pub(crate) struct Processes {
    /// How many threads are remembered.
    remembered: usize,
    threads: RwLock<HashMap<u32, Arc<Thread>>>,
    /// By process id. The server keeps those alive whose memory it still needs.
    address_spaces: Mutex<HashMap<u32, Weak<AddressSpace>>>,
    identities: AtomicU64,
    /// Our own user namespace, where it can be told.
    user_namespace: Option<std::path::PathBuf>,
    /// The process that all others descend from.
    first: u32,
}

impl Processes {
    /// Nobody is known yet but the `first` process. How many will be remembered depends on how many descriptors this process
    /// may open now.
    pub(crate) fn new(first: u32) -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most = usize::try_from(descriptors / DESCRIPTORS_PER_THREAD).unwrap_or(usize::MAX);
        Self {
            remembered: most.clamp(4, REMEMBERED_THREADS),
            threads: RwLock::default(),
            address_spaces: Mutex::default(),
            identities: AtomicU64::new(0),
            user_namespace: std::fs::read_link("/proc/self/ns/user").ok(),
            first,
        }
    }

    /// The thread that waits for the answer to request `request`. What is remembered under its id may be a thread
    /// that has died since; then lookups through its directory fail, and [`Processes::renew`] finds the right one.
    pub(crate) fn thread(&self, listener: &Listener, request: u64, id: u32) -> Result<Arc<Thread>, Errno> {
        let known = self.threads.read().unwrap_or_else(PoisonError::into_inner).get(&id).map(Arc::clone);
        if let Some(thread) = known {
            return Ok(thread);
        }
        self.renew(listener, request, id)
    }

    /// The thread that waits for the answer to request `request`, looked up anew.
    ///
    /// # Errors
    /// `ESRCH` if it has gone, or is not visible in our pid namespace.
    pub(crate) fn renew(&self, listener: &Listener, request: u64, id: u32) -> Result<Arc<Thread>, Errno> {
        if id == 0 {
            return Err(Errno::SRCH);
        }
        let directory = match TaskDirectory::open(id) {
            Err(Errno::MFILE | Errno::NFILE) => {
                // What is remembered can be looked up again.
                self.threads().clear();
                TaskDirectory::open(id)
            }
            other => other,
        };
        let directory = directory.map_err(|_| Errno::SRCH)?;
        if !listener.is_valid(request) {
            return Err(Errno::SRCH);
        }
        let thread = Arc::new(Thread {
            id,
            directory,
            address_space: Mutex::new(None),
            asked_by: AtomicU32::new(0),
            complained: AtomicBool::new(false),
            lineage: OnceLock::new(),
        });
        let mut threads = self.threads();
        if threads.len() >= self.remembered {
            threads.retain(|_, thread| thread.directory.is_alive());
        }
        if threads.len() >= self.remembered {
            threads.clear();
        }
        threads.insert(id, Arc::clone(&thread));
        Ok(thread)
    }

    /// Which processes the process of `thread` descends from, see [`lineage`].
    pub(crate) fn lineage_of(&self, thread: &Thread) -> Arc<[u64]> {
        let find = || {
            let of_process = |id| Ok(lineage(&TaskDirectory::open(id)?, id, self.first));
            thread.process_id().and_then(of_process).unwrap_or_default().into()
        };
        Arc::clone(thread.lineage.get_or_init(find))
    }

    /// Forgets the threads that have died.
    pub(crate) fn forget_dead(&self) {
        self.threads().retain(|_, thread| thread.directory.is_alive());
        self.address_spaces().retain(|_, space| space.strong_count() != 0);
    }

    /// The address space that `thread` runs in, which waits for the answer to `request`. `seen`: what was read at
    /// [`Thread::random_address`] since the request came.
    ///
    /// # Errors
    /// `ESRCH` if the thread has gone, `EACCES` if its memory may not be reached.
    pub(crate) fn address_space(
        &self,
        listener: &Listener,
        request: u64,
        thread: &Thread,
        seen: Option<[u8; 16]>,
    ) -> Result<Arc<AddressSpace>, Errno> {
        let mut remembered = thread.address_space.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(space) = remembered.as_ref() {
            if seen == Some(space.random) || space.is_still_that_of(thread.id) {
                return Ok(Arc::clone(space));
            }
        }
        let group = thread.process_id()?;
        // One lock for finding and making, so that two threads of a process do not make two.
        let mut spaces = self.address_spaces();
        let space = match spaces.entry(group) {
            Entry::Occupied(mut entry) => match entry.get().upgrade() {
                Some(space) if space.group.is_alive() && space.is_that_of(thread.id) => space,
                _ => {
                    let space = self.open_address_space(listener, request, thread, group)?;
                    entry.insert(Arc::downgrade(&space));
                    space
                }
            },
            Entry::Vacant(entry) => {
                let space = self.open_address_space(listener, request, thread, group)?;
                entry.insert(Arc::downgrade(&space));
                space
            }
        };
        if spaces.len() > self.remembered {
            spaces.retain(|_, space| space.strong_count() != 0);
        }
        *remembered = Some(Arc::clone(&space));
        Ok(space)
    }

    fn open_address_space(
        &self,
        listener: &Listener,
        request: u64,
        thread: &Thread,
        group: u32,
    ) -> Result<Arc<AddressSpace>, Errno> {
        let directory = TaskDirectory::open(group)?;
        let memory = thread.directory.file("mem", OFlags::RDWR)?;
        let maps = thread.directory.file("maps", OFlags::RDONLY)?;
        let random_address = random_address(&thread.directory)?;
        let mut random = [0; 16];
        read_exactly(&memory, random_address, &mut random).map_err(|_| Errno::SRCH)?;
        let namespace = self.user_namespace.clone();
        // The request still waits, so the thread was alive and did not exec while these were opened.
        if !listener.is_valid(request) {
            return Err(Errno::SRCH);
        }
        Ok(Arc::new(AddressSpace {
            identity: self.identities.fetch_add(1, Ordering::Relaxed) + 1,
            group_id: group,
            group: directory,
            memory,
            maps: Mutex::new(maps.into()),
            random_address,
            random,
            our_user_namespace: namespace,
            first: self.first,
            lineage: OnceLock::new(),
            credentials: Mutex::default(),
        }))
    }

    /// The identity of the address space that the living process `id` maps memory of, if it ever did.
    pub(crate) fn identity_of(&self, id: u32) -> Option<u64> {
        let space = self.address_spaces().get(&id)?.upgrade()?;
        space.group.is_alive().then_some(space.identity)
    }

    /// The text of `/proc/ID/status`.
    pub(crate) fn status_text(&self, id: u32) -> Result<String, Errno> {
        TaskDirectory::open(id)?.text("status")
    }

    fn threads(&self) -> RwLockWriteGuard<'_, HashMap<u32, Arc<Thread>>> {
        self.threads.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn address_spaces(&self) -> MutexGuard<'_, HashMap<u32, Weak<AddressSpace>>> {
        self.address_spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where exec put the image's random bytes, by the auxiliary vector.
fn random_address(directory: &TaskDirectory) -> Result<u64, Errno> {
    const AT_RANDOM: u64 = 25;
    let mut vector = [0u8; 1024];
    let file = directory.file("auxv", OFlags::RDONLY)?;
    let length = rustix::io::pread(&file, &mut vector, 0)?;
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or(0);
    vector[..length]
        .chunks_exact(16)
        .find(|entry| word(&entry[..8]) == AT_RANDOM)
        .map(|entry| word(&entry[8..]))
        .ok_or(Errno::SRCH)
}

/// One address space of a client.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    identity: u64,
    group_id: u32,
    group: TaskDirectory,
    memory: OwnedFd,
    /// Bound to the address space like `memory`. Locked because reading it as text moves through it.
    maps: Mutex<std::fs::File>,
    random_address: u64,
    random: [u8; 16],
    our_user_namespace: Option<std::path::PathBuf>,
    first: u32,
    lineage: OnceLock<Vec<u64>>,
    credentials: Mutex<Option<Credentials>>,
}

/// Who a process runs as, and what was seen of it when that was looked up.
#[derive(Debug, Clone, Copy)]
struct Credentials {
    /// The owner of its directory.
    owner: u32,
    /// Its effective capabilities.
    capabilities: u64,
    /// Its real user id.
    real: u32,
    /// Whether its capabilities count outside of user namespaces of its own.
    in_our_user_namespace: bool,
}

impl AddressSpace {
    /// Whether a thread that has run in this address space, and waits for an answer now, still does.
    fn is_still_that_of(&self, thread: u32) -> bool {
        let mut random = [0; 16];
        memory::read(thread, self.random_address, &mut random) == Ok(random.len()) && random == self.random
    }

    /// Whether the waiting thread, whose process has the id that ours had, runs in this address space. That id may
    /// have been given again, to a fork even, which has the same bytes in the same place.
    fn is_that_of(&self, thread: u32) -> bool {
        self.is_still_that_of(thread) && self.group.is_alive()
    }

    /// The limit as text, which everybody may read.
    fn written_memory_lock_limit(&self) -> Option<u64> {
        let limits = self.group.text("limits").unwrap_or_default();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
        match line.and_then(|line| line.split_whitespace().next()) {
            Some("unlimited") => None,
            // A process that has gone may lock nothing.
            soft => Some(soft.and_then(|soft| soft.parse().ok()).unwrap_or(0)),
        }
    }

    /// Who the process runs as now.
    ///
    /// The real user id is only in a text that takes a while to make, and the namespace in the name of a link. A process
    /// that changes one of them changes its effective user id (the owner of its directory), or gains or loses
    /// capabilities, as well, and both are seen at once. Except one that had all capabilities before it entered a
    /// namespace of its own: it is taken for what it was.
    fn credentials(&self) -> Credentials {
        let owner = rustix::fs::fstat(&self.group.0).map_or(NOBODY, |status| status.st_uid);
        let capabilities = credentials::effective_capabilities(self.group_id).unwrap_or(0);
        let mut known = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.filter(|known| (known.owner, known.capabilities) == (owner, capabilities))
        {
            return known;
        }
        // Real, effective, saved and file system ids.
        let ids = self.group.status_field("Uid").unwrap_or_default();
        let real = ids.split_whitespace().next().and_then(|id| id.parse().ok()).unwrap_or(NOBODY);
        let theirs = self.group.link("ns/user").ok();
        let in_our_user_namespace = theirs.is_some() && theirs == self.our_user_namespace;
        let credentials = Credentials { owner, capabilities, real, in_our_user_namespace };
        *known = Some(credentials);
        credentials
    }

    fn limit_of(&self, credentials: &Credentials) -> Option<u64> {
        if credentials.has(CAP_IPC_LOCK) {
            return None;
        }
        credentials::locked_memory_limit(self.group_id).unwrap_or_else(|_| self.written_memory_lock_limit())
    }
}

impl Credentials {
    fn has(&self, capability: u32) -> bool {
        self.in_our_user_namespace && self.capabilities >> capability & 1 == 1
    }
}

fn read_exactly(memory: impl AsFd, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
    let mut done = 0;
    while done < buffer.len() {
        let at = offset.checked_add(done as u64).ok_or(MemoryGone { offset })?;
        match rustix::io::pread(&memory, &mut buffer[done..], at) {
            Ok(0) => return Err(MemoryGone { offset: at }),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(_) => return Err(MemoryGone { offset: at }),
        }
    }
    Ok(())
}

impl LateBound for AddressSpace {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        read_exactly(&self.memory, offset, buffer)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset.checked_add(done as u64).ok_or(MemoryGone { offset })?;
            match rustix::io::pwrite(&self.memory, &bytes[done..], at) {
                Ok(0) => return Err(MemoryGone { offset: at }),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) => return Err(MemoryGone { offset: at }),
            }
        }
        Ok(())
    }
}

impl Process for AddressSpace {
    fn identity(&self) -> u64 {
        self.identity
    }

    fn id(&self) -> u32 {
        self.group_id
    }

    fn lineage(&self) -> Vec<u64> {
        self.lineage.get_or_init(|| lineage(&self.group, self.group_id, self.first)).clone()
    }

    fn user(&self) -> u32 {
        self.credentials().real
    }

    fn memory_lock_limit(&self) -> Option<u64> {
        self.limit_of(&self.credentials())
    }

    fn user_and_memory_lock_limit(&self) -> (u32, Option<u64>) {
        let credentials = self.credentials();
        (credentials.real, self.limit_of(&credentials))
    }

    fn may_change_resource_mode(&self) -> bool {
        self.credentials().has(CAP_SYS_RESOURCE)
    }

    fn check_access(&self, address: u64, length: u64, write: bool) -> Result<(), Errno> {
        maps::check_access(&self.maps, address, length, write)
    }

    fn shared_file(&self, address: u64, length: u64) -> Option<(OwnedFd, u64)> {
        let mapping = maps::mapping_of(&self.maps, address).ok()?;
        let object = mapping.shared?;
        let last = address.checked_add(length.checked_sub(1)?)?;
        // Opening a file of another file system might ask a server that keeps us waiting (FUSE); those of tmpfs that memfds
        // and anonymous shared memory are in do not, and are one file system.
        if last >= mapping.end || Some(object.device) != tmpfs_of_memfds() {
            return None;
        }
        // Needs CAP_CHECKPOINT_RESTORE.
        let name = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
        let file =
            self.group.file(&name, OFlags::RDWR).or_else(|_| self.group.file(&name, OFlags::RDONLY)).ok()?;
        // The process may have replaced its address space or the mapping meanwhile.
        let status = rustix::fs::fstat(&file).ok()?;
        let same = (status.st_dev, status.st_ino) == (object.device, object.inode);
        same.then_some((file, object.offset.checked_add(address - mapping.start)?))
    }
}

/// The device number of the file system that memfds and anonymous shared memory are in.
fn tmpfs_of_memfds() -> Option<u64> {
    static DEVICE: OnceLock<Option<u64>> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        let memfd = rustix::fs::memfd_create("ioasid-device", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
        rustix::fs::fstat(&memfd).ok().map(|status| status.st_dev)
    })
}
