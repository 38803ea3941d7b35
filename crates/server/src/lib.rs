//! What `/dev/iommu` and `/dev/vfio` of one imaginary machine answer, as an in-process API that knows no transport.
//!
//! (skeleton: the architecture goes here)

#![forbid(unsafe_code)]

mod client;
mod in_process;
mod options;
mod status;

use std::path::Path;
use std::sync::Arc;

pub use client::{Client, Descriptor, Process};
pub use in_process::InProcess;
pub use options::{DeviceOptions, OptionsError, ServerOptions, TableKind};
pub use rustix::io::Errno;
pub use status::Status;

/// Stand-ins until the engine has these.
mod stand_in {
    /// Memory that is not mapped in this process and is reached by copying calls.
    pub trait LateBound: Send + Sync + std::fmt::Debug {
        /// Fills `buffer` from `offset`.
        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone>;
        /// Writes `bytes` at `offset`.
        fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone>;
    }
    /// The memory cannot be reached (any more).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct MemoryGone {
        /// The first offset that could not be reached.
        pub offset: u64,
    }
}
pub use stand_in::{LateBound, MemoryGone};

/// High bits of the offset of every device region, so that a transport's filter can recognise `pread`/`pwrite` on
/// our devices by offset alone: `offset = REGION_MAGIC | index << 40`, which is below 2^63.
pub const REGION_MAGIC: u64 = 0x10a5_0000_0000_0000;

/// Which bits of an offset [`REGION_MAGIC`] fixes.
pub const REGION_MAGIC_MASK: u64 = 0xffff_0000_0000_0000;

/// The devices and open files of one imaginary machine.
#[derive(Debug)]
pub struct Server {
    options: ServerOptions,
}

/// Why a server could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// More devices than one PCI bus has room for.
    #[error("{0} devices are more than the {1} that fit on the bus")]
    TooManyDevices(usize, usize),
}

/// The result of a successful open.
#[derive(Debug)]
pub enum Opened {
    /// An open file of this server.
    File(File),
    /// The content of a read-only text file.
    Text(String),
}

/// One open file; dropping it is the last close.
#[derive(Debug)]
pub struct File;

impl Server {
    /// Makes a machine.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn new(options: ServerOptions) -> Result<Arc<Self>, ServerError> {
        Ok(Arc::new(Self { options }))
    }

    /// Opens `path` for `client`. `None`: not a path of ours; the client's own kernel should open it.
    pub fn open(self: &Arc<Self>, _client: &dyn Client, path: &Path) -> Option<Result<Opened, Errno>> {
        let path = path.to_str()?;
        if path == "/dev/iommu" {
            return Some(Ok(Opened::File(File)));
        }
        if let Some(number) = path.strip_prefix("/dev/vfio/devices/vfio") {
            let known = number.parse::<usize>().is_ok_and(|number| number < self.options.devices.len());
            return Some(if known { Ok(Opened::File(File)) } else { Err(Errno::NOENT) });
        }
        if path == "/dev/ioasid" {
            return Some(Ok(Opened::Text(self.status().to_json())));
        }
        (path == "/dev/vfio" || path.starts_with("/dev/vfio/")).then_some(Err(Errno::NOENT))
    }

    /// A snapshot of what is mapped, attached and charged.
    pub fn status(&self) -> Status {
        Status::default()
    }
}

impl File {
    /// Performs one `ioctl`.
    ///
    /// # Errors
    /// The `errno` that the client shall see.
    pub fn ioctl(&self, _client: &dyn Client, _command: u32, _argument: u64) -> Result<u32, Errno> {
        Err(Errno::NOTTY)
    }

    /// Performs one `pread`; returns the count of bytes.
    ///
    /// # Errors
    /// The `errno` that the client shall see; `EINVAL` for an iommufd.
    pub fn read_at(&self, _offset: u64, _buffer: &mut [u8]) -> Result<usize, Errno> {
        Err(Errno::INVAL)
    }

    /// Performs one `pwrite`; returns the count of bytes.
    ///
    /// # Errors
    /// The `errno` that the client shall see; `EINVAL` for an iommufd.
    pub fn write_at(&self, _offset: u64, _bytes: &[u8]) -> Result<usize, Errno> {
        Err(Errno::INVAL)
    }
}
