//! Where mapped memory comes from, and who is charged for it.
//!
//! A mapping names memory of the calling process by address, or a file by descriptor. Both become [`Pages`]: a range of
//! bytes of a *backing*, the engine's word for an object whose pages have an identity. One address space is one
//! backing (offset = virtual address), one file is one backing (offset = file offset), whoever maps it and however
//! often; so the same page is recognised as the same page, and charged once. The [`MemoryRegistry`] of a server finds
//! the backing that exists already; it holds none alive itself.
//!
//! Nothing is touched when `Pages` are made. [`Pages::register`] is what a page table needs: it checks that the memory
//! is there and permits the access, and then charges and registers it.
//!
//! # Why files are not mapped into the server
//!
//! The bytes of a file are reached by `pread` and `pwrite` on our own duplicate of the client's descriptor. A mapping
//! would be faster, but the client keeps the file: it may truncate it at any time, and touching a mapped page beyond
//! the new end raises SIGBUS, in us. A server must not be at a client's mercy, and a copying call says `MemoryGone`
//! instead. Files of hugetlbfs can only be read this way; the kernel has no `write` for them. They are written through the
//! engine's backing of such a file, which maps it after all, but copies by system calls (docs/decisions/0003).

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};

use ioasid::{Account, Backing, Bus, IovaRange, LateBound, Memory, MemoryGone, RegisterError};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::iommufd::testing::{DmaBuf, DmaBufs};
use crate::observer::MemoryOwner;
use crate::poison::lock;
use crate::{AccountStatus, Process};

/// The page size of clients, in bytes.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// A range of bytes of one backing object, as one map call named it. Areas that were copied from one another share it.
#[derive(Debug)]
pub(crate) struct Pages {
    source: Source,
    /// The first byte: a virtual address, or an offset in the file.
    start: u64,
    /// Whether devices may be given write access.
    writable: bool,
    /// Changed only while the areas of all address spaces that share the pages are locked.
    charge: Mutex<Charge>,
}

/// What the bytes belong to.
#[derive(Debug)]
enum Source {
    Process {
        process: Arc<dyn Process>,
        backing: Arc<Backing>,
        files: Arc<Files>,
    },
    File(FileBacking),
    /// A dma-buf as it was when it was mapped: revoking it ends this memory for good.
    DmaBuf {
        /// Counts as long as its memory is there.
        _buffer: Arc<DmaBuf>,
        backing: Arc<Backing>,
    },
    /// A file that has no memory pages. Mapping it is accepted, as long as nothing needs the pages.
    NotMemory,
}

/// Who pays, and up to how much; decided when the mapping is made, or when another process takes it over.
#[derive(Debug, Clone)]
pub(crate) struct Charge {
    account: Arc<ChargedAccount>,
    limit_pages: Option<u64>,
    /// The process that mapped the memory, or took it over, by its identity; 0 for none.
    process: u64,
    /// Whether it pays itself, not its user.
    pays_itself: bool,
}

/// An account together with the lock that makes "set my limit, then charge" one step: processes of one user share
/// the account, but each has a limit of its own.
#[derive(Debug)]
pub(crate) struct ChargedAccount {
    account: Account,
    /// Held while charging.
    charging: Mutex<()>,
}

impl Charge {
    /// Makes the account pay for all of `memories` in place of those that do: all or none.
    ///
    /// # Errors
    /// `ENOMEM`: over the limit.
    pub(crate) fn take_over(&self, memories: &[&Memory]) -> Result<(), Errno> {
        let _charging = lock(&self.account.charging);
        self.account.account.set_limit(self.limit_pages);
        Memory::transfer_all(memories, &self.account.account).map_err(|_| Errno::NOMEM)
    }
}

impl ChargedAccount {
    fn new(name: String, limit_pages: Option<u64>) -> Arc<Self> {
        Arc::new(Self { account: Account::new(name, limit_pages), charging: Mutex::new(()) })
    }

    /// What is charged, for the status.
    pub(crate) fn status(&self) -> AccountStatus {
        AccountStatus {
            name: self.account.name().to_owned(),
            charged_pages: self.account.charged_pages(),
            peak_pages: self.account.peak_pages(),
            limit_pages: self.account.limit_pages(),
            refused: self.account.failures(),
        }
    }
}

/// A file with its backing.
#[derive(Debug)]
struct FileBacking {
    key: FileKey,
    file: Arc<MappedFile>,
    backing: Arc<Backing>,
}

/// A file that clients have mapped.
#[derive(Debug)]
struct MappedFile {
    /// Our duplicate, open for writing if it could be had.
    fd: OwnedFd,
    /// What writes to it, if it is of hugetlbfs and can be written.
    huge: Option<Arc<Backing>>,
    /// The backing that reaches its bytes here, and holds it.
    backing: Mutex<Weak<Backing>>,
}

/// What identifies a file: device and inode number. Both stay true for as long as we hold a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FileKey(u64, u64);

/// The memory of a process as the engine sees it.
#[derive(Debug)]
struct ProcessMemory(Arc<dyn Process>);

impl LateBound for ProcessMemory {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        self.0.read(offset, buffer)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        self.0.write(offset, bytes)
    }
}

impl LateBound for MappedFile {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.saturating_add(done as u64);
            match rustix::io::pread(&self.fd, &mut buffer[done..], at) {
                Ok(0) => return Err(MemoryGone { offset: at }),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) => return Err(MemoryGone { offset: at }),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        // Writing behind the end would make the file longer again after its owner has cut it.
        let gone = |offset| MemoryGone { offset };
        let size = self.size().map_err(|_| gone(offset))?;
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > size) {
            return Err(gone(size.max(offset)));
        }
        if let Some(huge) = &self.huge {
            return huge.write(offset, bytes);
        }
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            match rustix::io::pwrite(&self.fd, &bytes[done..], at) {
                Ok(0) => return Err(gone(at)),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) => return Err(gone(at)),
            }
        }
        Ok(())
    }
}

impl MappedFile {
    fn size(&self) -> Result<u64, Errno> {
        u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).map_err(|_| Errno::INVAL)
    }
}

/// Turns the client's descriptor into one that can be written, if the file allows: the first client to map a file may
/// have opened it for reading only, and the backing that we make of it serves later ones too.
fn writable(fd: OwnedFd) -> OwnedFd {
    let access = rustix::fs::fcntl_getfl(&fd).map(|flags| flags & OFlags::ACCMODE);
    if access == Ok(OFlags::RDWR) {
        return fd;
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap_or(fd)
}

/// The same file as the engine maps it, if it is made of huge pages and others can bear that: the descriptor can write, and the
/// kernel lets us copy by calls.
fn of_huge_pages(bus: &Arc<Bus>, fd: &OwnedFd) -> Option<Arc<Backing>> {
    /// What hugetlbfs says that it is.
    const HUGETLBFS: u32 = 0x9584_58f6;
    // It is a file of memory, so that this asks nobody who could keep us waiting either.
    let system = rustix::fs::fstatfs(fd).ok()?;
    if system.f_type as u32 != HUGETLBFS {
        return None;
    }
    let huge = Backing::file(bus, fd);
    if let Err(error) = &huge {
        tracing::warn!(%error, "devices cannot write to a file of huge pages");
    }
    huge.ok()
}

/// Whether the file's pages are memory: what Linux accepts are files of tmpfs (memfds) and of hugetlbfs, and only they
/// can have seals. Unlike `fstat` or `fstatfs` this asks nobody who could keep us waiting, such as the FUSE server
/// behind the client's file.
fn is_memory(fd: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok()
}

impl Pages {
    /// The first byte: a virtual address, or an offset in the file.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Whether devices may be given write access.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// Whether a file was mapped, and not memory of a process.
    pub(crate) fn is_file(&self) -> bool {
        matches!(self.source, Source::File(_) | Source::NotMemory)
    }

    /// Whether there is a limit for who pays.
    pub(crate) fn is_limited(&self) -> bool {
        lock(&self.charge).limit_pages.is_some()
    }

    /// Whether the process of this identity pins what is registered, and if so, whether it pays itself.
    pub(crate) fn is_pinned_by(&self, process: u64) -> Option<bool> {
        let charge = lock(&self.charge);
        (charge.process == process).then_some(charge.pays_itself)
    }

    /// Says who pays for what is registered from now on.
    pub(crate) fn set_charge(&self, charge: &Charge) {
        *lock(&self.charge) = charge.clone();
    }

    /// Checks that `length` bytes from byte `offset` on are there and permit the access, and registers them.
    ///
    /// # Errors
    /// - `EFAULT`: the process has no such memory (any more), or does not permit the access.
    /// - `EINVAL`: the file ends before, or is not made of memory pages.
    /// - `ENOMEM`: over the limit of the account.
    pub(crate) fn register(&self, offset: u64, length: u64) -> Result<Arc<Memory>, Errno> {
        let start = self.start.checked_add(offset).ok_or(Errno::OVERFLOW)?;
        let range = IovaRange::with_length(start, length).ok_or(Errno::INVAL)?;
        let (backing, start) = match &self.source {
            Source::Process { process, backing, files } => {
                process.check_access(start, length, self.writable)?;
                files.behind(&**process, backing, start, length)?
            }
            Source::File(mapped) => {
                // Whole pages are held: a page that the file ends in is none of it.
                if range.last() | (PAGE_SIZE - 1) >= mapped.file.size()? {
                    return Err(Errno::INVAL);
                }
                (Arc::clone(&mapped.backing), start)
            }
            Source::DmaBuf { backing, .. } => (Arc::clone(backing), start),
            Source::NotMemory => return Err(Errno::INVAL),
        };
        let charge = lock(&self.charge).clone();
        let _charging = lock(&charge.account.charging);
        charge.account.account.set_limit(charge.limit_pages);
        Memory::register(&backing, start, length, &charge.account.account)
            .map_err(|error| register_errno(&error))
    }

    /// Whether it was taken back for good, so that nothing can be registered of it any more.
    pub(crate) fn is_revoked(&self) -> bool {
        matches!(&self.source, Source::DmaBuf { backing, .. } if backing.is_revoked())
    }

    /// Whether software may copy to and from it: a dma-buf belongs to a driver.
    pub(crate) fn is_accessible(&self) -> bool {
        !matches!(self.source, Source::DmaBuf { .. })
    }

    /// What the bytes belong to.
    pub(crate) fn owner(&self) -> MemoryOwner {
        match &self.source {
            Source::Process { process, .. } => MemoryOwner::Process(process.identity()),
            Source::File(file) => MemoryOwner::File(file.key.0, file.key.1),
            Source::NotMemory | Source::DmaBuf { .. } => MemoryOwner::Nothing,
        }
    }

    /// Where the bytes come from, for people.
    pub(crate) fn describe(&self) -> String {
        match &self.source {
            Source::Process { process, .. } => format!("memory of process {}", process.id()),
            Source::File(_) => "file".to_owned(),
            Source::DmaBuf { .. } => "dma-buf".to_owned(),
            Source::NotMemory => "file without memory pages".to_owned(),
        }
    }
}

/// `length` bytes of a dma-buf from the offset `start` on.
///
/// # Errors
/// `EINVAL`: it ends before. `ENODEV`: it is taken back now.
pub(crate) fn dma_buf_pages(buffer: &Arc<DmaBuf>, start: u64, length: u64) -> Result<Pages, Errno> {
    if start.checked_add(length).is_none_or(|end| end > buffer.length()) {
        return Err(Errno::INVAL);
    }
    let source = Source::DmaBuf { backing: buffer.backing()?, _buffer: Arc::clone(buffer) };
    // The memory is not the client's, so nobody pays.
    let account = ChargedAccount::new("dma-buf".to_owned(), None);
    let nobody = Charge { account, limit_pages: None, process: 0, pays_itself: false };
    Ok(Pages { source, start, writable: true, charge: Mutex::new(nobody) })
}

fn register_errno(error: &RegisterError) -> Errno {
    match error {
        RegisterError::OverLimit { .. } | RegisterError::BusFull => Errno::NOMEM,
        RegisterError::OutOfBounds { .. }
        | RegisterError::Revoked
        | RegisterError::Residency(_)
        | RegisterError::Unreachable(_) => Errno::FAULT,
        RegisterError::Empty => Errno::INVAL,
    }
}

/// The files that are mapped, and how they are found.
struct Files {
    bus: Arc<Bus>,
    by_key: WeakMap<FileKey, MappedFile>,
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Files").finish_non_exhaustive()
    }
}

impl Files {
    /// The backing of a file, the one that exists or a new one.
    fn backing(&self, fd: OwnedFd) -> Result<FileBacking, Errno> {
        let status = rustix::fs::fstat(&fd)?;
        let key = FileKey(status.st_dev, status.st_ino);
        let make = || {
            let fd = writable(fd);
            Arc::new(MappedFile { huge: of_huge_pages(&self.bus, &fd), fd, backing: Mutex::default() })
        };
        let file = self.by_key.get_or_insert(key, make);
        let backing = {
            let mut known = lock(&file.backing);
            known.upgrade().unwrap_or_else(|| {
                let backing = Backing::late_bound(&self.bus, Arc::clone(&file) as Arc<dyn LateBound>);
                *known = Arc::downgrade(&backing);
                backing
            })
        };
        Ok(FileBacking { key, file, backing })
    }

    /// What the bytes at an address of a process are now: those of a file that others can map too, or the process's own.
    /// Returns the backing, and where in it they begin.
    ///
    /// # Errors
    /// `EFAULT`: the file behind the mapping has become shorter. Those of `fstat`.
    fn behind(
        &self,
        process: &dyn Process,
        private: &Arc<Backing>,
        start: u64,
        length: u64,
    ) -> Result<(Arc<Backing>, u64), Errno> {
        let Some((fd, offset)) = process.shared_file(start, length) else {
            return Ok((Arc::clone(private), start));
        };
        let mapped = self.backing(fd)?;
        let end = offset.checked_add(length).ok_or(Errno::FAULT)?;
        if end > mapped.file.size()?.next_multiple_of(PAGE_SIZE) {
            return Err(Errno::FAULT);
        }
        Ok((mapped.backing, offset))
    }
}

/// Who is charged, when accounts are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum AccountKey {
    /// All limited processes of one user.
    User(u32),
    /// All processes of one user that may lock memory without limit. They must not use up the others' limit.
    UnlimitedUser(u32),
    /// One address space, for contexts that charge processes.
    Process(u64),
}

/// The backings and accounts that are in use.
pub(crate) struct MemoryRegistry {
    bus: Arc<Bus>,
    processes: WeakMap<u64, Backing>,
    files: Arc<Files>,
    dma_bufs: Arc<DmaBufs>,
    accounts: WeakMap<AccountKey, ChargedAccount>,
    /// Accounts of users stay, so that their peaks can be read after everything was unmapped. Every map asks for one, and
    /// nearly always it is there.
    users: RwLock<HashMap<AccountKey, Arc<ChargedAccount>>>,
}

impl fmt::Debug for MemoryRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegistry").finish_non_exhaustive()
    }
}

impl MemoryRegistry {
    pub(crate) fn new(bus: Arc<Bus>) -> Self {
        let files = Arc::new(Files { bus: Arc::clone(&bus), by_key: WeakMap::default() });
        Self {
            bus,
            processes: WeakMap::default(),
            files,
            dma_bufs: Arc::default(),
            accounts: WeakMap::default(),
            users: RwLock::default(),
        }
    }

    /// The bus address space that all of this memory is in.
    pub(crate) fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// How many dma-bufs there are.
    pub(crate) fn dma_bufs(&self) -> &Arc<DmaBufs> {
        &self.dma_bufs
    }

    /// Who pays for what `process` maps.
    pub(crate) fn charge(&self, process: &dyn Process, per_process: bool) -> Charge {
        let (user, limit) = process.user_and_memory_lock_limit();
        let Some(limit) = limit else { return self.unlimited(process, user) };
        let limit_pages = Some(limit / PAGE_SIZE);
        let account = if per_process {
            let make =
                || ChargedAccount::new(format!("process {} of user {user}", process.id()), limit_pages);
            self.accounts.get_or_insert(AccountKey::Process(process.identity()), make)
        } else {
            self.user_account(AccountKey::User(user), || format!("user {user}"), limit_pages)
        };
        Charge { account, limit_pages, process: process.identity(), pays_itself: per_process }
    }

    /// Who pays for what `process` maps if it may lock memory without limit.
    pub(crate) fn charge_without_limit(&self, process: &dyn Process) -> Charge {
        self.unlimited(process, process.user())
    }

    fn unlimited(&self, process: &dyn Process, user: u32) -> Charge {
        let name = || format!("user {user} without limit");
        let account = self.user_account(AccountKey::UnlimitedUser(user), name, None);
        Charge { account, limit_pages: None, process: process.identity(), pays_itself: false }
    }

    fn user_account(
        &self,
        key: AccountKey,
        name: impl FnOnce() -> String,
        limit_pages: Option<u64>,
    ) -> Arc<ChargedAccount> {
        if let Some(known) = self.users.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Arc::clone(known);
        }
        let mut users = self.users.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(users.entry(key).or_insert_with(|| ChargedAccount::new(name(), limit_pages)))
    }

    /// Memory of a process from the address `start` on.
    pub(crate) fn process_pages(
        &self,
        process: Arc<dyn Process>,
        start: u64,
        writable: bool,
        charge: Charge,
    ) -> Pages {
        let backing = self.private_backing(&process);
        let files = Arc::clone(&self.files);
        Pages {
            source: Source::Process { process, backing, files },
            start,
            writable,
            charge: Mutex::new(charge),
        }
    }

    fn private_backing(&self, process: &Arc<dyn Process>) -> Arc<Backing> {
        let make = || Backing::late_bound(&self.bus, Arc::new(ProcessMemory(Arc::clone(process))));
        self.processes.get_or_insert(process.identity(), make)
    }

    /// A file from the offset `start` on. `None`: a file that is surely not made of memory.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub(crate) fn file_pages(
        &self,
        fd: Option<OwnedFd>,
        start: u64,
        writable_by_device: bool,
        charge: Charge,
    ) -> Result<Pages, Errno> {
        let source = match fd.filter(is_memory) {
            None => Source::NotMemory,
            Some(fd) => Source::File(self.files.backing(fd)?),
        };
        Ok(Pages { source, start, writable: writable_by_device, charge: Mutex::new(charge) })
    }

    /// Registers memory of a process for a moment, charged to nobody, to learn which pages it is made of.
    ///
    /// # Errors
    /// `EFAULT`: the process has no such memory, or may not read it.
    pub(crate) fn identify(
        &self,
        process: &Arc<dyn Process>,
        start: u64,
        length: u64,
    ) -> Result<Arc<Memory>, Errno> {
        process.check_access(start, length, false)?;
        let private = self.private_backing(process);
        let (backing, start) = self.files.behind(&**process, &private, start, length)?;
        let nobody = Account::new("nobody", None);
        Memory::register(&backing, start, length, &nobody).map_err(|error| register_errno(&error))
    }

    /// The fewest and the most registrations that hold a page of a process's memory.
    ///
    /// # Errors
    /// As [`MemoryRegistry::identify`].
    pub(crate) fn holds(
        &self,
        process: &Arc<dyn Process>,
        start: u64,
        length: u64,
    ) -> Result<RangeInclusive<u64>, Errno> {
        process.check_access(start, length, false)?;
        let private = self.private_backing(process);
        let (backing, start) = self.files.behind(&**process, &private, start, length)?;
        Ok(backing.holds(start, length))
    }

    /// All accounts that are known.
    pub(crate) fn accounts(&self) -> Vec<Arc<ChargedAccount>> {
        let users = self.users.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = users.values().cloned().collect();
        drop(users);
        all.extend(self.accounts.values());
        all.sort_by(|a, b| a.account.name().cmp(b.account.name()));
        all
    }
}

/// Shared values by key, held alive by their users only. Whoever looks for one that is there keeps nobody waiting.
#[derive(Debug)]
struct WeakMap<K, V> {
    inner: RwLock<(HashMap<K, Weak<V>>, usize)>,
}

impl<K, V> Default for WeakMap<K, V> {
    fn default() -> Self {
        Self { inner: RwLock::new((HashMap::new(), 16)) }
    }
}

impl<K: Eq + Hash, V> WeakMap<K, V> {
    fn get_or_insert(&self, key: K, make: impl FnOnce() -> Arc<V>) -> Arc<V> {
        if let Some(value) = self.read().0.get(&key).and_then(Weak::upgrade) {
            return value;
        }
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let (map, sweep_at) = &mut *inner;
        // Another thread may have been faster.
        if let Some(value) = map.get(&key).and_then(Weak::upgrade) {
            return value;
        }
        let value = make();
        map.insert(key, Arc::downgrade(&value));
        // Sweeping when the map has doubled keeps it in proportion to what lives, at constant cost per insertion.
        if map.len() >= *sweep_at {
            map.retain(|_, value| value.strong_count() > 0);
            *sweep_at = (map.len() * 2).max(16);
        }
        value
    }

    fn values(&self) -> Vec<Arc<V>> {
        self.read().0.values().filter_map(Weak::upgrade).collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, (HashMap<K, Weak<V>>, usize)> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }
}
