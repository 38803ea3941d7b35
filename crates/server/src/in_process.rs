//! A client that lives in this process: for unit tests and fuzzers, ours and those of programs that use an iommufd.
//!
//! An [`InProcess`] stands for one process: it has memory, descriptors and a user. Its memory is one of two:
//!
//! - **pretended** ([`InProcess::new`]): a sparse address space that has what the test puts there. Addresses are made up,
//!   and what happens at the edges of memory can be tried: [`InProcess::unmap_memory`], [`InProcess::protect`].
//! - **this process's own** ([`InProcess::with_own_memory`]): addresses are real ones, so code that passes pointers to
//!   `ioctl` and maps its guest's memory runs as it is. `examples/unit_test.rs` shows how it is plugged in.
//!
//! Commands are typed ([`InProcess::run`]), bytes ([`InProcess::call`]), or an address in its memory
//! ([`InProcess::ioctl`]). It ends when it is dropped; what was mapped of its memory is gone then, as after an exit.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ioasid::{IovaRange, LateBound, MemoryGone};
use ioasid_uapi::Command;
use rustix::io::Errno;

use crate::iommufd::areas::Areas;
use crate::memory::PAGE_SIZE;
use crate::poison::lock;
use crate::{Client, Descriptor, File, Opened, Process, Server};

/// Where a command's bytes appear in the client's memory during [`InProcess::call`].
const ARGUMENT_ADDRESS: u64 = 0x7fff_0000_0000;

/// Distinguishes the pretend processes of this program.
static NEXT_IDENTITY: AtomicU64 = AtomicU64::new(1);

/// A pretend client program.
///
/// ```
/// use ioasid_server::{Errno, InProcess, Server, ServerOptions};
/// use ioasid_uapi::iommufd::{Destroy, IoasAlloc, IoasMap, IoasMapFlags};
///
/// let server = Server::new(ServerOptions::default())?;
/// let client = InProcess::new(1000);
/// let iommu = client.open(&server, "/dev/iommu")?;
///
/// let ioas_id = client.run(iommu, IoasAlloc::default())?.out_ioas_id;
/// client.map_memory(0x10_0000, 0x2000);
/// let map = IoasMap {
///     flags: (IoasMapFlags::READABLE | IoasMapFlags::FIXED_IOVA).bits(),
///     ioas_id,
///     user_va: 0x10_0000,
///     length: 0x2000,
///     iova: 0x8000_0000,
///     ..Default::default()
/// };
/// client.run(iommu, map)?;
/// assert_eq!(client.run(iommu, map), Err(Errno::EXIST));
/// client.run(iommu, Destroy { id: ioas_id, ..Default::default() })?;
/// assert_eq!(client.run(iommu, map), Err(Errno::NOENT));
///
/// // The client's memory has what it is given, and nothing else.
/// client.put(0x10_0ff0, b"across a page boundary")?;
/// assert_eq!(client.get(0x10_0ff0, 22)?, b"across a page boundary");
/// assert_eq!(client.get(0x20_0000, 1), Err(Errno::FAULT));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct InProcess {
    process: Arc<PretendProcess>,
    descriptors: Mutex<BTreeMap<i32, Held>>,
}

#[derive(Debug)]
enum Held {
    Ours(Arc<File>),
    Foreign(OwnedFd),
}

/// The address space and the rights of a pretend program.
struct PretendProcess {
    identity: u64,
    user: u32,
    /// `/proc/self/mem`, if its memory is that of the real process.
    own: Option<std::fs::File>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What is mapped, and whether it may be written. `None`: the process has ended.
    mapped: Option<Areas<bool>>,
    /// Pages that have been written; all others read as zeroes.
    pages: HashMap<u64, Box<[u8]>>,
    memory_lock_limit: Option<u64>,
    may_change_resource_mode: bool,
}

impl fmt::Debug for PretendProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PretendProcess").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl InProcess {
    /// A program of the user `user` with no memory, no descriptors, no limit and no privilege.
    pub fn new(user: u32) -> Self {
        Self { process: PretendProcess::new(user, None, State::new()), descriptors: Mutex::default() }
    }

    /// The same, but its memory is that of the process that calls: addresses are its own. Nothing pretended is added to
    /// it, so that [`InProcess::map_memory`], [`InProcess::unmap_memory`] and [`InProcess::protect`] do nothing.
    ///
    /// Devices then read and write this memory behind the compiler's back, as real ones do. What is mapped should be
    /// memory that the program itself reaches by raw pointers only (`mmap`, vm-memory), or that it looks at by
    /// [`InProcess::get`]; and it must not be given back to an allocator while it is mapped.
    ///
    /// # Errors
    /// `/proc/self/mem` cannot be opened.
    pub fn with_own_memory(user: u32) -> Result<Self, Errno> {
        let own = std::fs::File::options().read(true).write(true).open("/proc/self/mem");
        let own = own.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(Self {
            process: PretendProcess::new(user, Some(own), State::new()),
            descriptors: Mutex::default(),
        })
    }

    /// A second process as `fork` makes it: the same open files under the same descriptors, and a copy of the memory.
    /// Foreign files that cannot be duplicated are missing.
    pub fn second_process(&self) -> Self {
        let state = {
            let state = lock(&self.process.state);
            let mut mapped = Areas::new();
            for (range, writable) in state.mapped.iter().flat_map(Areas::iter) {
                let inserted = mapped.insert(range, *writable);
                debug_assert!(inserted.is_ok());
            }
            State { mapped: Some(mapped), pages: state.pages.clone(), ..*state }
        };
        let descriptors = lock(&self.descriptors)
            .iter()
            .filter_map(|(&fd, held)| {
                let held = match held {
                    Held::Ours(file) => Held::Ours(Arc::clone(file)),
                    Held::Foreign(foreign) => Held::Foreign(foreign.try_clone().ok()?),
                };
                Some((fd, held))
            })
            .collect();
        let own = self.process.own.as_ref().and_then(|own| own.try_clone().ok());
        let process = PretendProcess::new(self.process.user, own, state);
        Self { process, descriptors: Mutex::new(descriptors) }
    }

    /// Maps zeroed memory, readable and writable, at the pages that `length` bytes at `address` touch. Pages that are
    /// mapped already stay as they are.
    pub fn map_memory(&self, address: u64, length: u64) {
        let Some(range) = IovaRange::with_length(address, length) else { return };
        let last_page = range.last() / PAGE_SIZE;
        let mut state = lock(&self.process.state);
        let Some(mapped) = &mut state.mapped else { return };
        // Runs of pages that are free become one mapping each.
        let mut page = range.first() / PAGE_SIZE;
        while page <= last_page {
            let free = |last: u64| {
                IovaRange::new(page * PAGE_SIZE, last * PAGE_SIZE + (PAGE_SIZE - 1))
                    .filter(|run| !mapped.overlaps(*run))
            };
            match free(last_page) {
                Some(run) => {
                    let inserted = mapped.insert(run, true);
                    debug_assert!(inserted.is_ok());
                    break;
                }
                None => {
                    if let Some(single) = free(page) {
                        let inserted = mapped.insert(single, true);
                        debug_assert!(inserted.is_ok());
                    }
                    page += 1;
                }
            }
        }
    }

    /// Makes every mapping that lies in the `length` bytes at `address` completely writable or not, as `mprotect` does.
    pub fn protect(&self, address: u64, length: u64, writable: bool) {
        let Some(range) = IovaRange::with_length(address, length) else { return };
        let mut state = lock(&self.process.state);
        for (run, now) in state.mapped.iter_mut().flat_map(Areas::iter_mut) {
            if range.covers(&run) {
                *now = writable;
            }
        }
    }

    /// Takes away every mapping of this memory that lies in the `length` bytes at `address` completely.
    pub fn unmap_memory(&self, address: u64, length: u64) {
        let Some(range) = IovaRange::with_length(address, length) else { return };
        let mut state = lock(&self.process.state);
        let State { mapped: Some(mapped), pages, .. } = &mut *state else { return };
        for run in mapped.whole_areas_in(range).unwrap_or_default() {
            mapped.remove(run);
            pages.retain(|page, _| !run.contains(page * PAGE_SIZE));
        }
    }

    /// Writes to the program's memory, as the program itself would.
    ///
    /// # Errors
    /// `EFAULT` if it is not mapped or not writable.
    pub fn put(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.process.copy_in(address, bytes).map_err(|_| Errno::FAULT)
    }

    /// Reads the program's memory.
    ///
    /// # Errors
    /// `EFAULT` if it is not mapped.
    pub fn get(&self, address: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; length];
        self.process.copy_out(address, &mut bytes).map_err(|_| Errno::FAULT)?;
        Ok(bytes)
    }

    /// Sets `RLIMIT_MEMLOCK` in bytes; `None` is what `CAP_IPC_LOCK` gives.
    pub fn set_memory_lock_limit(&self, bytes: Option<u64>) {
        lock(&self.process.state).memory_lock_limit = bytes;
    }

    /// Gives or takes `CAP_SYS_RESOURCE`.
    pub fn set_may_change_resource_mode(&self, may: bool) {
        lock(&self.process.state).may_change_resource_mode = may;
    }

    /// Opens a file of the server, such as `/dev/iommu` or `/dev/vfio/devices/vfio0`; returns its descriptor.
    ///
    /// # Errors
    /// `ENOENT` for a path that is not of the server's files (its text files are not opened this way: see
    /// [`Server::status`]), and what [`Server::open`] answers.
    pub fn open(&self, server: &Arc<Server>, path: impl AsRef<Path>) -> Result<i32, Errno> {
        match server.open(self, path.as_ref()).ok_or(Errno::NOENT)?? {
            Opened::File(file) => Ok(self.insert(file)),
            Opened::Text(_) => Err(Errno::NOENT),
        }
    }

    /// Performs a command of [`ioasid_uapi`] and returns its argument as the server leaves it. The size in front is
    /// filled in.
    ///
    /// # Errors
    /// As [`InProcess::call`].
    pub fn run<T: Command>(&self, fd: i32, mut command: T) -> Result<T, Errno> {
        let size = u32::try_from(T::SIZE).map_err(|_| Errno::INVAL)?;
        let bytes = command.as_mut_bytes();
        bytes.get_mut(..4).ok_or(Errno::INVAL)?.copy_from_slice(&size.to_ne_bytes());
        self.call(fd, T::NUMBER, bytes)?;
        Ok(command)
    }

    /// Gives the program a descriptor of `file`: the lowest free number, from 3 on.
    pub fn insert(&self, file: File) -> i32 {
        self.insert_held(Held::Ours(Arc::new(file)))
    }

    /// Gives the program a descriptor of a file that is not the server's, such as a memfd.
    pub fn insert_foreign(&self, file: OwnedFd) -> i32 {
        self.insert_held(Held::Foreign(file))
    }

    fn insert_held(&self, held: Held) -> i32 {
        let mut descriptors = lock(&self.descriptors);
        let mut fd = 3;
        for taken in descriptors.range(3..).map(|(&taken, _)| taken) {
            if taken != fd {
                break;
            }
            fd += 1;
        }
        descriptors.insert(fd, held);
        fd
    }

    /// Closes a descriptor; the file is closed when its last descriptor is.
    ///
    /// # Errors
    /// `EBADF` if it is not open.
    pub fn close(&self, fd: i32) -> Result<(), Errno> {
        let held = lock(&self.descriptors).remove(&fd);
        held.map(drop).ok_or(Errno::BADF)
    }

    fn file(&self, fd: i32) -> Result<Arc<File>, Errno> {
        match lock(&self.descriptors).get(&fd) {
            Some(Held::Ours(file)) => Ok(Arc::clone(file)),
            Some(Held::Foreign(_)) => Err(Errno::NOTTY),
            None => Err(Errno::BADF),
        }
    }

    /// Performs an ioctl whose argument is `argument`, which comes back as the server leaves it.
    ///
    /// # Errors
    /// `EBADF`, `ENOTTY` for a foreign file, and what [`File::ioctl`] answers.
    pub fn call(&self, fd: i32, command: u32, argument: &mut [u8]) -> Result<u32, Errno> {
        let client = Call { program: self, argument: Mutex::new(argument) };
        self.file(fd)?.ioctl(&client, command, ARGUMENT_ADDRESS)
    }

    /// Performs an ioctl whose argument is an address in the program's memory, or a plain number.
    ///
    /// # Errors
    /// As [`InProcess::call`].
    pub fn ioctl(&self, fd: i32, command: u32, argument: u64) -> Result<u32, Errno> {
        self.file(fd)?.ioctl(self, command, argument)
    }

    /// Performs a `pread` of `length` bytes.
    ///
    /// # Errors
    /// `EBADF`, and what [`File::read_at`] answers.
    pub fn pread(&self, fd: i32, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; length];
        let count = self.file(fd)?.read_at(offset, &mut bytes)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    /// Performs a `pwrite`.
    ///
    /// # Errors
    /// `EBADF`, and what [`File::write_at`] answers.
    pub fn pwrite(&self, fd: i32, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
        self.file(fd)?.write_at(offset, bytes)
    }
}

impl Drop for InProcess {
    /// The program exits: its memory is gone and its descriptors are closed.
    fn drop(&mut self) {
        let mut state = lock(&self.process.state);
        state.mapped = None;
        state.pages.clear();
    }
}

impl Client for InProcess {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.process.copy_out(address, buffer).map_err(|_| Errno::FAULT)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.put(address, bytes)
    }

    fn descriptor(&self, fd: i32) -> Result<Descriptor, Errno> {
        match lock(&self.descriptors).get(&fd) {
            Some(Held::Ours(file)) => Ok(Descriptor::Ours(Arc::clone(file))),
            Some(Held::Foreign(file)) => file.try_clone().map(Descriptor::Foreign).map_err(|_| Errno::MFILE),
            None => Err(Errno::BADF),
        }
    }

    fn give_descriptor(&self, file: File, _close_on_exec: bool) -> Result<i32, Errno> {
        Ok(self.insert(file))
    }

    fn process(&self) -> Result<Arc<dyn Process>, Errno> {
        Ok(Arc::clone(&self.process) as Arc<dyn Process>)
    }
}

/// The program during one [`InProcess::call`]: the argument's bytes appear in its memory.
struct Call<'a, 'b> {
    program: &'a InProcess,
    argument: Mutex<&'b mut [u8]>,
}

impl Call<'_, '_> {
    /// Which bytes of the argument an access names; `None` if it lies elsewhere.
    fn within(
        length_of_argument: usize,
        address: u64,
        length: usize,
    ) -> Option<Result<std::ops::Range<usize>, Errno>> {
        let start = usize::try_from(address.checked_sub(ARGUMENT_ADDRESS)?).ok()?;
        if start > length_of_argument {
            return None;
        }
        let end = start.checked_add(length).filter(|end| *end <= length_of_argument);
        Some(end.map(|end| start..end).ok_or(Errno::FAULT))
    }
}

impl Client for Call<'_, '_> {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let argument = lock(&self.argument);
        match Self::within(argument.len(), address, buffer.len()) {
            Some(range) => buffer.copy_from_slice(&argument[range?]),
            None => self.program.read(address, buffer)?,
        }
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut argument = lock(&self.argument);
        match Self::within(argument.len(), address, bytes.len()) {
            Some(range) => argument[range?].copy_from_slice(bytes),
            None => self.program.write(address, bytes)?,
        }
        Ok(())
    }

    fn descriptor(&self, fd: i32) -> Result<Descriptor, Errno> {
        self.program.descriptor(fd)
    }

    fn give_descriptor(&self, file: File, close_on_exec: bool) -> Result<i32, Errno> {
        self.program.give_descriptor(file, close_on_exec)
    }

    fn process(&self) -> Result<Arc<dyn Process>, Errno> {
        self.program.process()
    }
}

impl PretendProcess {
    fn new(user: u32, own: Option<std::fs::File>, state: State) -> Arc<Self> {
        let identity = NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { identity, user, own, state: Mutex::new(state) })
    }

    /// The memory of the real process, if it is that and has not ended.
    fn own(&self, state: &State) -> Option<&std::fs::File> {
        self.own.as_ref().filter(|_| state.mapped.is_some())
    }

    fn copy_out(&self, address: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        let state = lock(&self.state);
        if let Some(own) = self.own(&state) {
            return own.read_exact_at(buffer, address).map_err(|_| MemoryGone { offset: address });
        }
        state.check(address, buffer.len() as u64, false)?;
        for (page, within, part) in page_parts(address, buffer.len()) {
            match state.pages.get(&page) {
                Some(bytes) => buffer[part.clone()].copy_from_slice(&bytes[within..within + part.len()]),
                None => buffer[part].fill(0),
            }
        }
        Ok(())
    }

    fn copy_in(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        let mut state = lock(&self.state);
        if let Some(own) = self.own(&state) {
            // This way in does not look at permissions.
            check_own(address, bytes.len() as u64, true)?;
            return own.write_all_at(bytes, address).map_err(|_| MemoryGone { offset: address });
        }
        state.check(address, bytes.len() as u64, true)?;
        for (page, within, part) in page_parts(address, bytes.len()) {
            let target = state.pages.entry(page).or_insert_with(|| vec![0; PAGE_SIZE as usize].into());
            target[within..within + part.len()].copy_from_slice(&bytes[part]);
        }
        Ok(())
    }
}

/// Cuts an access at pages: page number, offset in the page, and the part of the buffer.
fn page_parts(address: u64, length: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done >= length {
            return None;
        }
        let at = address + done as u64;
        let within = (at % PAGE_SIZE) as usize;
        let count = (PAGE_SIZE as usize - within).min(length - done);
        done += count;
        Some((at / PAGE_SIZE, within, done - count..done))
    })
}

impl State {
    fn new() -> Self {
        Self {
            mapped: Some(Areas::new()),
            pages: HashMap::new(),
            memory_lock_limit: None,
            may_change_resource_mode: false,
        }
    }

    fn check(&self, address: u64, length: u64, write: bool) -> Result<(), MemoryGone> {
        if length == 0 {
            return Ok(());
        }
        let pieces =
            IovaRange::with_length(address, length).and_then(|range| self.mapped.as_ref()?.pieces(range));
        match pieces {
            Some(pieces) if !write || pieces.iter().all(|piece| *piece.payload) => Ok(()),
            _ => Err(MemoryGone { offset: address }),
        }
    }
}

impl LateBound for PretendProcess {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        self.copy_out(offset, buffer)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        self.copy_in(offset, bytes)
    }
}

impl Process for PretendProcess {
    fn identity(&self) -> u64 {
        self.identity
    }

    fn id(&self) -> u32 {
        u32::try_from(self.identity).unwrap_or(u32::MAX)
    }

    fn user(&self) -> u32 {
        self.user
    }

    fn memory_lock_limit(&self) -> Option<u64> {
        lock(&self.state).memory_lock_limit
    }

    fn may_change_resource_mode(&self) -> bool {
        lock(&self.state).may_change_resource_mode
    }

    fn check_access(&self, address: u64, length: u64, write: bool) -> Result<(), Errno> {
        let state = lock(&self.state);
        match self.own(&state) {
            Some(_) => check_own(address, length, write),
            None => state.check(address, length, write),
        }
        .map_err(|_| Errno::FAULT)
    }
}

/// Whether this process has memory there that may be read, and written if `write`.
fn check_own(address: u64, length: u64, write: bool) -> Result<(), MemoryGone> {
    let gone = MemoryGone { offset: address };
    let mut next = address;
    let end = address.checked_add(length).ok_or(gone)?;
    let maps = std::fs::File::open("/proc/self/maps").map_err(|_| gone)?;
    for line in BufReader::new(maps).lines() {
        if next >= end {
            return Ok(());
        }
        let line = line.map_err(|_| gone)?;
        // `7f0c8000-7f0ca000 rw-p 00000000 00:00 0 name`
        let mut words = line.split(['-', ' ']);
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (start, behind) = number().zip(number()).ok_or(gone)?;
        let permissions = words.next().ok_or(gone)?;
        if start <= next && next < behind {
            if !permissions.starts_with(if write { "rw" } else { "r" }) {
                return Err(gone);
            }
            next = behind;
        }
    }
    if next >= end { Ok(()) } else { Err(gone) }
}
