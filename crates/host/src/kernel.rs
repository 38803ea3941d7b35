//! Who answers the system calls: Linux, or in the tests of this crate something that fails when it is told to.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fd::AsFd;
use rustix::io::Errno;

/// Whoever opens `/dev/iommu` and the files of devices.
pub(crate) trait Kernel: Send + Sync + fmt::Debug {
    /// Opens a file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn KernelFile>>;

    /// The number of the IOMMU group of a device that was opened by this path, if anybody knows.
    fn group(&self, path: &Path, file: &dyn KernelFile) -> Option<u32>;
}

/// An open file. Dropping the last reference closes it.
pub(crate) trait KernelFile: AsFd + Send + Sync + fmt::Debug {
    /// Performs an ioctl with an argument that begins with its own size. Addresses in it are of memory of this process.
    fn ioctl(&self, number: u32, argument: &mut [u8]) -> Result<(), Errno>;
}
