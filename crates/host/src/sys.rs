//! Linux: the one place with unsafe code, for ioctls.
//!
//! Nobody outside of the crate gets at a [`LinuxFile`], because an ioctl is as safe as its argument: the kernel writes to
//! addresses that are in it, and devices will write to memory that it names. The arguments are made in `calls`; the memory
//! is what the engine's callers have registered, which they vouch for until it is dropped.

#![allow(unsafe_code, reason = "ioctls")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

use crate::kernel::{Kernel, KernelFile};

/// The kernel that this process runs on.
#[derive(Debug)]
pub(crate) struct Linux;

#[derive(Debug)]
struct LinuxFile(File);

impl Kernel for Linux {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn KernelFile>> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Arc::new(LinuxFile(file)))
    }

    fn group(&self, _path: &Path, file: &dyn KernelFile) -> Option<u32> {
        let device = fstat(file.as_fd()).ok()?.st_rdev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let group = std::fs::read_link(format!("/sys/dev/char/{major}:{minor}/device/iommu_group")).ok()?;
        group.file_name()?.to_str()?.parse().ok()
    }
}

impl AsFd for LinuxFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl KernelFile for LinuxFile {
    fn ioctl(&self, number: u32, argument: &mut [u8]) -> Result<(), Errno> {
        let call = Call { number, argument: argument.as_mut_ptr().cast() };
        // SAFETY: the argument says its size itself, which is that of the slice, and what addresses in it may be used for
        // is said above.
        unsafe { ioctl(&self.0, call) }
    }
}

/// An ioctl of iommufd or VFIO: what it has to say stands in the argument.
struct Call {
    number: u32,
    argument: *mut c_void,
}

// SAFETY: number and pointer are those of the call; nothing is made of the result.
unsafe impl Ioctl for Call {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.number as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    /// Writes to an address in an argument, as the kernel would.
    pub(crate) fn put(address: u64, bytes: &[u8]) {
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
        // SAFETY: the array that the argument of IOAS_IOVA_RANGES leads to, which is borrowed and has room.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), pointer, bytes.len()) };
    }
}
