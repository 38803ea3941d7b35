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
//! use ioasid_server::{InProcess, Opened, Server, ServerOptions};
//! use std::path::Path;
//!
//! let server = Server::new(ServerOptions::default())?;
//! let client = InProcess::new(1000);
//! let Some(Ok(Opened::File(iommu))) = server.open(&client, Path::new("/dev/iommu")) else { panic!() };
//! let iommu = client.insert(iommu);
//!
//! // IOMMU_IOAS_ALLOC: size, flags, and out comes the number of an address space.
//! let mut command = [12_u32, 0, 0].map(u32::to_ne_bytes).concat();
//! client.call(iommu, 0x3b81, &mut command)?;
//! assert_eq!(command[8..], 1_u32.to_ne_bytes());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where it differs from Linux
//!
//! - Private memory of a client is reached through its process, not pinned: when the process ends or unmaps it, the
//!   device's access is a fault. Files are reached by reading and writing, see the `memory` module; a device's write to
//!   a file of hugetlbfs is a fault.
//! - Every page is charged once for all that one user maps of it, however often and through however many opens.
//! - Unmapping over several areas happens whole or not at all.
//! - A client cannot grow the server without bound: 4,096 objects and 2^20 areas for each open, 2^12 allowed ranges for
//!   each address space, arguments of 64 KiB; beyond that, `ENOMEM` or `E2BIG`.
//! - Absent so far: interrupts, mapping of device regions, groups and type 1 containers, nesting, PASIDs, fault queues
//!   and dirty tracking. Their commands are known, and refused with the error of a kernel without the capability.
//!
//! # Threads and locks
//!
//! Everything may be called from several threads. Locks are taken in this order, and none is held while client memory
//! is read or written for a call: a device file's state and attachment, an address space's areas, a page table
//! object, a context's table of objects, the registry of memory, an account. The engine's own locks are innermost.
//!
//! Unmapping and detaching wait until the device's running copies have ended, as they must; a client whose memory
//! answers slowly thereby delays those who share an address space or a device with it, and nobody else.

#![forbid(unsafe_code)]

mod argument;
mod client;
mod in_process;
mod iommufd;
mod machine;
mod memory;
mod options;
mod poison;
mod status;
mod vfio;

use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use ioasid::Bus;
use ioasid_soft::edu::EduError;
use ioasid_soft::iommu::RidTaken;

use crate::iommufd::Context;
use crate::iommufd::testing::{AccessFile, DmaBuf};
use crate::memory::MemoryRegistry;
use crate::poison::lock;
use crate::vfio::{DeviceFile, MachineDevice};

pub use client::{Client, Descriptor, Process};
pub use in_process::InProcess;
pub use ioasid::{LateBound, MemoryGone};
pub use ioasid_soft::iommu::{TableKind, UnknownTableKind};
pub use options::{DeviceOptions, OptionsError, ServerOptions};
pub use rustix::io::Errno;
pub use status::{
    AccountStatus, AddressSpaceStatus, AreaStatus, ContextStatus, DeviceStatus, LeafStatus, Status,
    TableStatus,
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
    devices: Vec<Arc<MachineDevice>>,
    contexts: Mutex<Contexts>,
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
    Place(#[from] RidTaken),
    /// Test devices need a granule of 2 KiB, and the tables of a device cannot have that.
    #[error("a device with table={table} cannot be in one machine with test devices; only table=native can")]
    TableTooCoarse {
        /// The kind of the device's table.
        table: TableKind,
    },
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
}

#[derive(Debug)]
enum FileKind {
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
        let mut tables = options.devices.iter().map(|device| device.table);
        if let Some(table) = tables.find(|table| options.test_devices && *table != TableKind::Native) {
            return Err(ServerError::TableTooCoarse { table });
        }
        let devices = machine::devices(options.devices)?;
        let memory = Arc::new(MemoryRegistry::new(Bus::new()));
        let test_devices = options.test_devices;
        Ok(Arc::new(Self { memory, devices, contexts: Mutex::default(), test_devices }))
    }

    /// Opens `path` for `client`. `None`: not a path of ours; the client's own kernel should open it.
    ///
    /// Ours are `/dev/iommu`, `/dev/vfio/devices/vfioN`, and `/dev/ioasid`, a read-only text: [`Server::status`] as
    /// JSON. Everything else beneath `/dev/vfio` is answered with `ENOENT`.
    pub fn open(self: &Arc<Self>, _client: &dyn Client, path: &Path) -> Option<Result<Opened, Errno>> {
        let file = |kind| Some(Ok(Opened::File(File { kind })));
        let path = path.to_str()?;
        if path == "/dev/iommu" {
            return file(FileKind::Iommufd(self.new_context()));
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
            Some(device) => file(FileKind::Device(DeviceFile::new(Arc::clone(device)))),
            None => Some(Err(Errno::NOENT)),
        }
    }

    fn new_context(&self) -> Arc<Context> {
        let mut contexts = lock(&self.contexts);
        contexts.opened += 1;
        let context = Arc::new(Context::new(contexts.opened, Arc::clone(&self.memory), self.test_devices));
        contexts.living.retain(|context| context.strong_count() > 0);
        contexts.living.push(Arc::downgrade(&context));
        context
    }

    /// A snapshot of what is mapped, attached and charged.
    pub fn status(&self) -> Status {
        let contexts: Vec<_> = lock(&self.contexts).living.iter().filter_map(Weak::upgrade).collect();
        Status {
            contexts: contexts.iter().map(|context| context.status()).collect(),
            accounts: self.memory.accounts().iter().map(|account| account.status()).collect(),
        }
    }
}

impl File {
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

    /// The context, if this is an open `/dev/iommu`.
    pub(crate) fn context(&self) -> Option<Arc<Context>> {
        match &self.kind {
            FileKind::Iommufd(context) => Some(Arc::clone(context)),
            FileKind::Device(_) | FileKind::Access(_) | FileKind::DmaBuf(_) => None,
        }
    }

    pub(crate) fn of_access(access: AccessFile) -> Self {
        Self { kind: FileKind::Access(access) }
    }

    pub(crate) fn of_dma_buf(buffer: Arc<DmaBuf>) -> Self {
        Self { kind: FileKind::DmaBuf(buffer) }
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
