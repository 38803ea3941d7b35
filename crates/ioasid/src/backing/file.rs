//! Files whose pages are memory: memfds, files of tmpfs and hugetlbfs, and any other file that can be mapped shared.
//!
//! A file is known by its inode. Whoever makes a backing from a descriptor of the same file, on the same bus, gets the
//! same [`Backing`], so that the same page is recognised and charged once wherever it is registered from.
//!
//! # Whom a plain copy trusts
//!
//! A mapped file is the fastest memory there is, until somebody makes the file shorter: then a copy to or from a page
//! behind the new end raises SIGBUS and ends this process. So a file is copied plainly only if nobody can do
//! that: it is sealed against shrinking (`F_SEAL_SHRINK`, which memfds can be and other files cannot). Any other file is
//! copied by system calls, process_vm_readv and process_vm_writev on our own mapping: where the page is gone they say
//! so, and the DMA faults. That costs a system call for each access, but no process. pread and pwrite would do for most files, but
//! hugetlbfs has no pwrite, and a pwrite to a file that is just made shorter makes it longer again.
//!
//! A hugetlb file is not copied plainly even when it is sealed: somebody may punch a hole into it, which no seal forbids
//! that still lets us map it for writing, and if the pool of huge pages is empty by the time of the next access, that is
//! SIGBUS as well.
//!
//! Who has the file for himself can say so ([`Backing::trusted_file`]).
//!
//! # Growing
//!
//! Addresses of this process are reserved for a whole window at a time, and the file is mapped as far as it goes. When a
//! registration asks for bytes behind the known end, the size is looked up again, and what has come is mapped behind what
//! was there. Nothing moves, so DMA to the rest does not notice.

use super::{Backing, Bytes, LateBound, MemoryGone, PAGE_BITS, Source, window_bits};
use crate::bus::{Bus, Identity};
use crate::host_memory::HostMemory;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, PoisonError};
use rustix::fs::{FileType, OFlags, SealFlags};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Why there is no backing for a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is a directory, a socket, a device.
    #[error("only regular files have memory that can be shared")]
    NotRegular,
    /// The descriptor does not allow what devices may be allowed.
    #[error("the file must be open for reading and writing")]
    NotWritable,
    /// The file can become shorter, and this process may not use the calls that survive that.
    #[error(
        "the file can be made shorter by others, and process_vm_readv is not permitted here: seal it with \
         F_SEAL_SHRINK, or have the system call permitted"
    )]
    NoSafeCopies,
    /// A system call failed.
    #[error("the file cannot be examined")]
    System(#[from] io::Error),
}

impl From<rustix::io::Errno> for FileError {
    fn from(error: rustix::io::Errno) -> FileError {
        FileError::System(error.into())
    }
}

/// A file and its mappings.
#[derive(Debug)]
pub(super) struct MappedFile {
    file: OwnedFd,
    page_size: u64,
    window_bits: u32,
    /// Bytes below the known size stay.
    cannot_shrink: bool,
    size: AtomicU64,
    /// The mapped windows by their numbers. They stay until the file is let go.
    windows: Mutex<BTreeMap<u64, Arc<Source>>>,
}

/// A file that is copied by calls.
#[derive(Debug)]
struct Calls(Arc<MappedFile>);

impl Backing {
    /// A file's memory, by a descriptor that is open for reading and writing. The descriptor is duplicated.
    ///
    /// Nothing that others do to the file can harm this process. Devices copy a memfd directly if it is sealed with
    /// `F_SEAL_SHRINK`; other files by system calls, which is slower ([`is_direct`](Self::is_direct) tells).
    ///
    /// There is one backing for each file on a bus, for as long as anybody has it: if there is one, it is returned as
    /// it is.
    ///
    /// ```
    /// use ioasid::{Account, Backing, Bus, Memory};
    /// use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    ///
    /// let memfd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    /// ftruncate(&memfd, 2 << 20)?;
    /// fcntl_add_seals(&memfd, SealFlags::SHRINK)?;
    /// let bus = Bus::new();
    /// let backing = Backing::file(&bus, &memfd)?;
    /// assert!(backing.is_direct());
    /// let memory = Memory::register(&backing, 0, 2 << 20, &Account::new("guest", None))?;
    /// // It may grow:
    /// ftruncate(&memfd, 4 << 20)?;
    /// memory.grow(2 << 20)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`FileError`]: not a regular file, not open for writing, or no way to copy safely.
    pub fn file(bus: &Arc<Bus>, file: impl AsFd) -> Result<Arc<Backing>, FileError> {
        Backing::open(bus, file, false)
    }

    /// The same for a file that nobody makes shorter or punches holes into; devices copy it directly. If somebody does
    /// it after all, the next access may end this process with SIGBUS.
    ///
    /// # Errors
    ///
    /// [`FileError`]: not a regular file, or not open for writing.
    pub fn trusted_file(bus: &Arc<Bus>, file: impl AsFd) -> Result<Arc<Backing>, FileError> {
        Backing::open(bus, file, true)
    }

    fn open(bus: &Arc<Bus>, file: impl AsFd, trusted: bool) -> Result<Arc<Backing>, FileError> {
        let status = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(FileError::NotRegular);
        }
        if rustix::fs::fcntl_getfl(&file)? & OFlags::ACCMODE != OFlags::RDWR {
            return Err(FileError::NotWritable);
        }
        let identity = Identity::File { device: status.st_dev, inode: status.st_ino };
        bus.find_or_make(identity, || {
            let file = MappedFile::new(file.as_fd().try_clone_to_owned()?)?;
            let plain = trusted || (file.cannot_shrink && file.page_size <= 1 << PAGE_BITS);
            let file = Arc::new(file);
            let calls = match plain {
                true => None,
                false if !calls_work() => return Err(FileError::NoSafeCopies),
                false => Some(Arc::new(Source::Late(Arc::new(Calls(file.clone()))))),
            };
            Ok(Backing::new(bus, Bytes::File { file, calls }, Some(identity)))
        })
    }
}

/// Whether this process may copy its own memory by system calls.
fn calls_work() -> bool {
    let mut byte = [0];
    HostMemory::anonymous(1).is_ok_and(|memory| memory.read_by_call(0, &mut byte).is_some())
}

impl MappedFile {
    fn new(file: OwnedFd) -> Result<MappedFile, FileError> {
        /// The file system of hugetlb files, as its magic number says.
        const HUGETLBFS: i64 = 0x9584_58f6;
        let system = rustix::fs::fstatfs(&file)?;
        let page_size = match system.f_type & 0xffff_ffff == HUGETLBFS {
            true => system.f_bsize as u64,
            false => 1 << PAGE_BITS,
        };
        // What has no seals may do anything.
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        let size = u64::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        let fixed = seals.contains(SealFlags::SHRINK | SealFlags::GROW).then_some(size);
        Ok(MappedFile {
            file,
            page_size,
            window_bits: window_bits(fixed),
            cannot_shrink: seals.contains(SealFlags::SHRINK),
            size: AtomicU64::new(size),
            windows: Mutex::default(),
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn page_size(&self) -> u64 {
        self.page_size
    }

    pub(super) fn window_bits(&self) -> u32 {
        self.window_bits
    }

    fn windows(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Source>>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What can be mapped is a multiple of this.
    fn unit(&self) -> u64 {
        self.page_size.max(rustix::param::page_size() as u64)
    }

    /// Whether the file has this byte, if need be after another look at its size.
    pub(super) fn reaches(&self, last: u64) -> io::Result<bool> {
        if self.cannot_shrink && last < self.size() {
            return Ok(true);
        }
        let windows = self.windows();
        let size = u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0);
        for (number, source) in windows.iter() {
            self.map(*number, source, size)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(last < size)
    }

    /// The memory of a window, mapped now if it was not before.
    pub(super) fn window(&self, number: u64) -> io::Result<Arc<Source>> {
        let mut windows = self.windows();
        if let Some(source) = windows.get(&number) {
            return Ok(source.clone());
        }
        let source = Arc::new(Source::Host(HostMemory::reserve(self.window_bits)?));
        self.map(number, &source, self.size())?;
        windows.insert(number, source.clone());
        Ok(source)
    }

    /// Maps as much of the file as has come into a window.
    fn map(&self, number: u64, source: &Source, size: u64) -> io::Result<()> {
        let Source::Host(memory) = source else { return Ok(()) };
        let first = number << self.window_bits;
        let length = size.saturating_sub(first).min(1 << self.window_bits);
        if length <= memory.length() {
            return Ok(());
        }
        memory.map_file(self.file.as_fd(), first, length, self.unit())
    }

    /// Does something to bytes of the file, window by window, with their place in the window's memory and in the whole.
    pub(super) fn in_windows(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(&HostMemory, u64, std::ops::Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let at = offset.checked_add(done).ok_or(io::ErrorKind::InvalidInput)?;
            let within = at & ((1 << self.window_bits) - 1);
            let count = (length - done).min((1 << self.window_bits) - within);
            let window = self.window(at >> self.window_bits)?;
            let Source::Host(memory) = &*window else { return Err(io::ErrorKind::InvalidInput.into()) };
            each(memory, within, done..done + count)?;
            done += count;
        }
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8], by_call: bool) -> Result<(), MemoryGone> {
        self.transfer(offset, buffer.len(), |memory, within, part| {
            let buffer = &mut buffer[part];
            if by_call { memory.read_by_call(within, buffer) } else { memory.read(within, buffer) }
        })
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8], by_call: bool) -> Result<(), MemoryGone> {
        self.transfer(offset, bytes.len(), |memory, within, part| {
            let bytes = &bytes[part];
            if by_call { memory.write_by_call(within, bytes) } else { memory.write(within, bytes) }
        })
    }

    fn transfer(
        &self,
        offset: u64,
        length: usize,
        mut copy: impl FnMut(&HostMemory, u64, std::ops::Range<usize>) -> Option<()>,
    ) -> Result<(), MemoryGone> {
        let gone = MemoryGone { offset };
        let Some(last) = (length as u64).checked_sub(1).and_then(|rest| offset.checked_add(rest)) else {
            return if length == 0 { Ok(()) } else { Err(gone) };
        };
        // Not even a window is mapped for what the file does not have.
        if last >= self.size() && !self.reaches(last).unwrap_or(false) {
            return Err(gone);
        }
        let result = self.in_windows(offset, length as u64, |memory, within, part| {
            copy(memory, within, part.start as usize..part.end as usize)
                .ok_or(io::ErrorKind::UnexpectedEof.into())
        });
        result.map_err(|_| gone)
    }
}

impl AsFd for MappedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl LateBound for Calls {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        self.0.read(offset, buffer, true)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone> {
        self.0.write(offset, bytes, true)
    }
}
