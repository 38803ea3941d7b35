//! What `/dev/iommu` and `/dev/vfio` of one imaginary machine answer, as an in-process API that knows no transport.
//!
//! A [`Server`] has software devices behind a software IOMMU. Programs reach it through a transport, which turns their
//! system calls into calls of [`Server::open`], [`File::ioctl`], [`File::read_at`] and [`File::write_at`], and which
//! implements [`Client`] and [`Process`] so that the server can reach back into the calling program. [`InProcess`] is a
//! client without a program, for tests and fuzzers.
//!
//! The interface is Linux's: numbers, layouts (in `ioasid-uapi`), error codes and the order of checks are those that a
//! kernel has, so that programs cannot tell, except that some capabilities are absent.
//!
//! ```text
//!   transport ──► Server::open ──► File ┬─ iommufd: Context ─ objects: IOAS, HWPT, device
//!                                       └─ vfio:    DeviceFile ─ Binding ──┘        │
//!                                                        │                          ▼
//!                                       ioasid-soft: device model, IOMMU      ioasid: Space, Table, Memory
//! ```
//!
//! A `File` is one open file (not one descriptor: those that `dup` and `fork` make share it). Dropping it is the last
//! close. Nothing else ends anything: a client that is killed closes its files, and that is all the server notices.
//!
//! # Example
//!
//! ```
//! use ioasid_server::{InProcess, Server, ServerOptions};
//! use ioasid_uapi::iommufd::IoasAlloc;
//!
//! let server = Server::new(ServerOptions::default())?;
//! let client = InProcess::new(1000);
//! let iommu = client.open(&server, "/dev/iommu")?;
//! assert_eq!(client.run(iommu, IoasAlloc::default())?.out_ioas_id, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/unit_test.rs` tests a VMM's own code against it: its `open`, `ioctl`, `pread` and `pwrite` go to an
//! [`InProcess`] whose memory is the test's, devices do DMA, and calls are made to fail.
//!
//! # Where it differs from Linux
//!
//! - Private memory of a client is reached through its process, not pinned (shared memory is its file's, if that can be
//!   opened): when the process ends or unmaps it, the device's access is a fault. Files are reached by reading and writing, see the `memory` module; a device's
//!   access to a huge page that is not there yet, and that the pool has none for, is a fault too.
//! - Every page is charged once for all that one user maps of it, however often and through however many opens.
//! - Unmapping over several areas happens whole or not at all.
//! - A dirty bitmap that cannot be written is an error, and what was to be reported stays dirty. It has at most 1 GiB,
//!   and pages of a power of two; holes in the range are passed over. See docs/conformance.md.
//! - VFIO's MAP_DMA with neither READ nor WRITE is `EINVAL`, as in VFIO's own container.
//! - A client cannot grow the server without bound: files, objects and areas are limited for each client and for all
//!   together ([`Limits`], which also says how much memory that is), and arguments to 64 KiB. Beyond that, `EMFILE`,
//!   `ENFILE`, `ENOMEM` or `E2BIG`.
//! - Absent so far: interrupts, mapping of device regions, groups and containers, nesting and fault queues.
//!   Their commands are known, and refused with the error of a kernel without the capability. Dirty tracking has the
//!   precision of leaves, and is absent from the native kind of table.
//!
//! # Threads and locks
//!
//! Everything may be called from several threads. Locks are taken in this order, and none is held while client memory
//! is read or written for a call: a device file's state and attachment, the space of an access, an address space's areas,
//! what an access has pinned, a page table object, a context's table of objects, the registry of memory, an account, the PASIDs.
//! The engine's own locks are innermost. Of several address spaces, which only IOAS_CHANGE_PROCESS locks together, the
//! lower number comes first.
//!
//! Unmapping and detaching wait until the running copies of devices and accesses have ended, as they must; a client whose memory
//! answers slowly thereby delays those who share an address space or a device with it, and nobody else.

#![forbid(unsafe_code)]

mod argument;
mod client;
pub mod decode;
mod dma;
mod in_process;
mod iommufd;
mod limits;
mod machine;
mod memory;
mod observer;
mod options;
mod poison;
mod status;
mod vfio;

use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use ioasid::Bus;
use ioasid_soft::edu::EduError;
use ioasid_soft::iommu::{PlugError, TopologyError};

use crate::iommufd::Context;
use crate::iommufd::pasids::Pasids;
use crate::iommufd::testing::{AccessFile, DmaBuf};
use crate::limits::{Allowance, Allowances, Taken};
use crate::memory::MemoryRegistry;
use crate::poison::lock;
use crate::status::Listing;
use crate::vfio::{DeviceFile, MachineDevice};

pub use client::{Client, Descriptor, Process};
pub use in_process::InProcess;
pub use ioasid::{LateBound, MemoryGone};
pub use ioasid_soft::iommu::{TableKind, UnknownTableKind};
pub use observer::{Event, MemoryAt, MemoryOwner, Observer, Requester};
pub use options::{DeviceOptions, Limit, Limits, OptionsError, ServerOptions};
pub use rustix::io::Errno;
pub use status::{
    AccountStatus, AddressSpaceStatus, AreaStatus, ContextStatus, DeviceStatus, LeafStatus, PasidStatus,
    Status, TableStatus,
};

/// High bits of the offset of every device region, so that a transport's filter can recognise `pread`/`pwrite` on
/// our devices by offset alone: `offset = REGION_MAGIC | index << 40`, which is below 2^63.
pub const REGION_MAGIC: u64 = 0x10a5_0000_0000_0000;

/// Which bits of an offset [`REGION_MAGIC`] fixes.
pub const REGION_MAGIC_MASK: u64 = 0xffff_0000_0000_0000;

/// The devices and open files of one imaginary machine.
#[derive(Debug)]
pub struct Server {
    memory: Arc<MemoryRegistry>,
    pasids: Arc<Pasids>,
    devices: Vec<Arc<MachineDevice>>,
    contexts: Mutex<Contexts>,
    allowances: Allowances,
    observer: Option<Arc<dyn Observer>>,
    test_devices: bool,
}

#[derive(Debug, Default)]
struct Contexts {
    opened: u64,
    living: Vec<Weak<Context>>,
}

/// Why a server could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// More devices than one PCI bus has room for.
    #[error("{asked} devices are more than the {most} that fit on the bus")]
    TooManyDevices {
        /// How many the options have.
        asked: usize,
        /// How many fit.
        most: usize,
    },
    /// The options of a device are impossible.
    #[error("a device cannot be made")]
    Device(#[from] EduError),
    /// The IOMMU has a device in that place.
    #[error("a device cannot be plugged in")]
    Place(#[from] PlugError),
    /// The machine has no place for a bridge that the options ask for.
    #[error("a bridge cannot be made")]
    Bridge(#[from] TopologyError),
}

/// How much memory a process has pinned by mapping it, in pages of 4 KiB. Every map call counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PinnedMemory {
    /// All of it: `VmPin`.
    pub pages: u64,
    /// What it pays for itself, not its user: part of `VmLck`.
    pub locked_pages: u64,
}

/// The result of a successful open.
#[derive(Debug)]
pub enum Opened {
    /// An open file of this server.
    File(File),
    /// The content of a read-only text file.
    Text(String),
}

/// One open file; dropping it is the last close: a device is reset, unbound and blocked, address spaces go, and what
/// was charged for them is given back.
#[derive(Debug)]
pub struct File {
    kind: FileKind,
    _counted: Taken,
    /// Whose file it is; remembered as long as anything is his.
    _allowance: Arc<Allowance>,
}

#[derive(Debug)]
pub(crate) enum FileKind {
    Iommufd(Arc<Context>),
    Device(DeviceFile),
    /// A user of pages that the test-only command made.
    Access(AccessFile),
    /// Memory of an imagined driver, likewise.
    DmaBuf(Arc<DmaBuf>),
}

impl Server {
    /// Makes a machine.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn new(options: ServerOptions) -> Result<Arc<Self>, ServerError> {
        Self::make(options, None)
    }

    /// Makes a machine whose devices are watched.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn with_observer(
        options: ServerOptions,
        observer: Arc<dyn Observer>,
    ) -> Result<Arc<Self>, ServerError> {
        Self::make(options, Some(observer))
    }

    fn make(options: ServerOptions, observer: Option<Arc<dyn Observer>>) -> Result<Arc<Self>, ServerError> {
        let devices = machine::devices(options.devices, observer.as_ref())?;
        let memory = Arc::new(MemoryRegistry::new(Bus::new()));
        let allowances = Allowances::new(options.limits);
        let test_devices = options.test_devices;
        let (pasids, contexts) = (Arc::default(), Mutex::default());
        Ok(Arc::new(Self { memory, pasids, devices, contexts, allowances, observer, test_devices }))
    }

    /// Opens `path` for `client`. `None`: not a path of ours; the client's own kernel should open it.
    ///
    /// Ours are `/dev/iommu`, `/dev/vfio/devices/vfioN`, and `/dev/ioasid`, a read-only text: [`Server::status`] as
    /// JSON. Everything else beneath `/dev/vfio` is answered with `ENOENT`.
    ///
    /// Too many open files are `EMFILE` or `ENFILE`, see [`Limits`].
    pub fn open(self: &Arc<Self>, client: &dyn Client, path: &Path) -> Option<Result<Opened, Errno>> {
        let file = |make: &dyn Fn(&Arc<Allowance>) -> FileKind| {
            let file = client.process().and_then(|process| {
                let allowance = self.allowances.of(process.identity(), &process.lineage());
                File::new(&allowance, || make(&allowance))
            });
            Some(file.map(Opened::File))
        };
        let path = path.to_str()?;
        if path == "/dev/iommu" {
            return file(&|allowance| FileKind::Iommufd(self.new_context(allowance)));
        }
        if path == "/dev/ioasid" {
            return Some(Ok(Opened::Text(self.status().to_json())));
        }
        if path != "/dev/vfio" && !path.starts_with("/dev/vfio/") {
            return None;
        }
        let number = path
            .strip_prefix("/dev/vfio/devices/vfio")
            .filter(|number| !number.starts_with(['+', '0']) || *number == "0");
        let device = number.and_then(|number| self.devices.get(number.parse::<usize>().ok()?));
        match device {
            Some(device) => file(&|_| FileKind::Device(DeviceFile::new(Arc::clone(device)))),
            None => Some(Err(Errno::NOENT)),
        }
    }

    fn new_context(&self, allowance: &Arc<Allowance>) -> Arc<Context> {
        let mut contexts = lock(&self.contexts);
        contexts.opened += 1;
        let memory = Arc::clone(&self.memory);
        let allowance = Arc::clone(allowance);
        let observer = self.observer.clone();
        let pasids = Arc::clone(&self.pasids);
        let number = contexts.opened;
        let context = Arc::new(Context::new(number, memory, pasids, allowance, self.test_devices, observer));
        contexts.living.retain(|context| context.strong_count() > 0);
        contexts.living.push(Arc::downgrade(&context));
        context
    }

    /// What the process of this [identity](Process::identity) has pinned, if a transport shall tell the process so in its
    /// `/proc/PID/status`, as a kernel would: on a server with [test devices](ServerOptions::test_devices), since only tests
    /// look.
    pub fn pinned_memory(&self, process: u64) -> Option<PinnedMemory> {
        let mut pinned = self.test_devices.then(PinnedMemory::default)?;
        let contexts: Vec<_> = lock(&self.contexts).living.iter().filter_map(Weak::upgrade).collect();
        for context in contexts {
            context.add_pinned(process, &mut pinned);
        }
        Some(pinned)
    }

    /// A snapshot of what is mapped, attached and charged: [`Status::LISTED_AT_MOST`] things of it, and how many more there are.
    pub fn status(&self) -> Status {
        let contexts: Vec<_> = lock(&self.contexts).living.iter().filter_map(Weak::upgrade).collect();
        let mut listing = Listing::new(Status::LISTED_AT_MOST);
        let mut status = Status::default();
        for (number, context) in contexts.iter().enumerate() {
            // Those behind it, and the accounts.
            let parts = contexts.len() - number + 1;
            status.contexts.extend(
                listing.list_part(parts, |listing| listing.take_one().then(|| context.status(listing))),
            );
        }
        let accounts = self.memory.accounts();
        let listed = accounts.iter().filter(|_| listing.take_one());
        status.accounts = listed.map(|account| account.status()).collect();
        status.not_listed = listing.not_listed();
        status
    }
}

impl File {
    /// A file that is counted for whose `allowance` it is.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`: too many.
    pub(crate) fn new(allowance: &Arc<Allowance>, kind: impl FnOnce() -> FileKind) -> Result<Self, Errno> {
        let counted = Taken::some(&allowance.files, 1)?;
        Ok(Self { kind: kind(), _counted: counted, _allowance: Arc::clone(allowance) })
    }

    /// Performs one `ioctl`. `command` is the system call's second argument, of which only the low 32 bits exist, and
    /// `argument` its third.
    ///
    /// # Errors
    /// The `errno` that the client shall see.
    pub fn ioctl(&self, client: &dyn Client, command: u32, argument: u64) -> Result<u32, Errno> {
        match &self.kind {
            FileKind::Iommufd(context) => context.ioctl(client, command, argument),
            FileKind::Device(device) => device.ioctl(client, command, argument),
            FileKind::Access(_) | FileKind::DmaBuf(_) => Err(Errno::NOTTY),
        }
    }

    /// Performs one `ioctl` as [`File::ioctl`] does, and keeps what there is to say about it.
    pub fn ioctl_captured(&self, client: &dyn Client, command: u32, argument: u64) -> decode::CapturedCall {
        let capture = decode::Capture::new(client, argument);
        let result = self.ioctl(&capture, command, argument);
        capture.call(self.name(), command, result)
    }

    /// What people call it.
    pub fn name(&self) -> decode::FileName {
        match &self.kind {
            FileKind::Iommufd(context) => decode::FileName::Iommufd(context.number()),
            FileKind::Device(device) => decode::FileName::Device(device.number()),
            FileKind::Access(_) | FileKind::DmaBuf(_) => decode::FileName::Test,
        }
    }

    /// Performs one `pread` on a device region; returns the count of bytes.
    ///
    /// # Errors
    /// The `errno` that the client shall see; `EINVAL` for an iommufd.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        match &self.kind {
            FileKind::Iommufd(_) | FileKind::Access(_) | FileKind::DmaBuf(_) => Err(Errno::INVAL),
            FileKind::Device(device) => device.read_at(offset, buffer),
        }
    }

    /// Performs one `pwrite` on a device region; returns the count of bytes.
    ///
    /// # Errors
    /// The `errno` that the client shall see; `EINVAL` for an iommufd.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
        match &self.kind {
            FileKind::Iommufd(_) | FileKind::Access(_) | FileKind::DmaBuf(_) => Err(Errno::INVAL),
            FileKind::Device(device) => device.write_at(offset, bytes),
        }
    }

    /// Why a program cannot map it. `shared`: with `MAP_SHARED` and open for writing, without which such a mapping is a private one;
    /// `executable`: with `PROT_EXEC`.
    ///
    /// Of `/dev/iommu` a kernel maps nothing but hardware queues, of a device what its regions offer, and there are none of either. What
    /// it refuses for every file (a length of zero, an open file without read access) is the transport's to know.
    pub fn mmap(&self, shared: bool, executable: bool) -> Errno {
        match &self.kind {
            FileKind::Iommufd(_) if !shared => Errno::INVAL,
            FileKind::Iommufd(_) if executable => Errno::PERM,
            FileKind::Iommufd(_) => Errno::NXIO,
            FileKind::Device(_) | FileKind::DmaBuf(_) => Errno::INVAL,
            FileKind::Access(_) => Errno::NODEV,
        }
    }

    /// The context, if this is an open `/dev/iommu`.
    pub(crate) fn context(&self) -> Option<Arc<Context>> {
        match &self.kind {
            FileKind::Iommufd(context) => Some(Arc::clone(context)),
            FileKind::Device(_) | FileKind::Access(_) | FileKind::DmaBuf(_) => None,
        }
    }

    /// The access, if this is one's file.
    pub(crate) fn access(&self) -> Option<&AccessFile> {
        match &self.kind {
            FileKind::Access(access) => Some(access),
            _ => None,
        }
    }

    /// The dma-buf, if this is one.
    pub(crate) fn dma_buf(&self) -> Option<&Arc<DmaBuf>> {
        match &self.kind {
            FileKind::DmaBuf(buffer) => Some(buffer),
            _ => None,
        }
    }
}
