//! The calls of iommufd and VFIO that are needed, with types.

use std::path::Path;
use std::sync::Arc;

use ioasid::{Attributes, BackingFile, IovaRange};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd::{
    self, Destroy, IoasAlloc, IoasCopy, IoasIovaRanges, IoasMap, IoasMapFile, IoasMapFlags, IoasUnmap,
};
use ioasid_uapi::vfio::{DeviceAttachIommufdPt, DeviceBindIommufd, DeviceDetachIommufdPt, RegionInfo};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::Errno;

use crate::kernel::{Kernel, KernelFile};
use crate::{CallError, OpenError};

/// Tries for an answer whose length is not known; a device may come in between.
const RANGE_TRIES: u32 = 4;
/// More ranges than any machine has.
const MOST_RANGES: usize = 1 << 16;

/// Performs the ioctl of `command`, which begins with its size: all of these commands do.
fn call<C: Command>(file: &dyn KernelFile, command: &mut C) -> Result<(), CallError> {
    let size = u32::try_from(C::SIZE).unwrap_or(u32::MAX);
    let bytes = command.as_mut_bytes();
    bytes[..4].copy_from_slice(&size.to_ne_bytes());
    file.ioctl(C::NUMBER, bytes).map_err(|errno| CallError { call: C::NAME, errno })
}

fn open(kernel: &dyn Kernel, path: &Path) -> Result<Arc<dyn KernelFile>, OpenError> {
    kernel.open(path).map_err(|source| OpenError::File { path: path.to_owned(), source })
}

/// Which I/O virtual addresses can be mapped.
#[derive(Debug)]
pub(crate) struct Ranges {
    /// In ascending order; at least one.
    pub(crate) usable: Vec<IovaRange>,
    /// What addresses and lengths of mappings are multiples of.
    pub(crate) alignment: u64,
}

/// An open `/dev/iommu`.
#[derive(Debug)]
pub(crate) struct Iommufd(Arc<dyn KernelFile>);

fn map_flags(attributes: Attributes) -> u32 {
    let mut flags = IoasMapFlags::FIXED_IOVA;
    flags.set(IoasMapFlags::READABLE, attributes.contains(Attributes::READ));
    flags.set(IoasMapFlags::WRITEABLE, attributes.contains(Attributes::WRITE));
    flags.bits()
}

impl Iommufd {
    pub(crate) fn open(kernel: &dyn Kernel) -> Result<Iommufd, OpenError> {
        open(kernel, Path::new("/dev/iommu")).map(Iommufd)
    }

    /// Makes an empty I/O address space; returns its number.
    pub(crate) fn alloc(&self) -> Result<u32, CallError> {
        let mut command = IoasAlloc::default();
        call(&*self.0, &mut command)?;
        Ok(command.out_ioas_id)
    }

    pub(crate) fn destroy(&self, id: u32) -> Result<(), CallError> {
        call(&*self.0, &mut Destroy { id, ..Destroy::default() })
    }

    /// The addresses of a space that no attached device reserves.
    pub(crate) fn ranges(&self, ioas_id: u32) -> Result<Ranges, CallError> {
        let too_many = CallError { call: IoasIovaRanges::NAME, errno: Errno::MSGSIZE };
        let mut room = 8;
        for _ in 0..RANGE_TRIES {
            let mut found = vec![iommufd::IovaRange::default(); room];
            let mut command = IoasIovaRanges {
                ioas_id,
                num_iovas: room as u32,
                allowed_iovas: found.as_mut_ptr().expose_provenance() as u64,
                ..IoasIovaRanges::default()
            };
            match call(&*self.0, &mut command) {
                Ok(()) => {
                    found.truncate(command.num_iovas as usize);
                    let usable = found.iter().filter_map(|range| IovaRange::new(range.start, range.last));
                    return Ok(Ranges { usable: usable.collect(), alignment: command.out_iova_alignment });
                }
                Err(error) if error.errno == Errno::MSGSIZE => {
                    room = (command.num_iovas as usize).clamp(room, MOST_RANGES);
                }
                Err(error) => return Err(error),
            }
        }
        Err(too_many)
    }

    /// Maps memory of this process.
    pub(crate) fn map(
        &self,
        ioas_id: u32,
        iova: u64,
        user_va: u64,
        length: u64,
        attributes: Attributes,
    ) -> Result<(), CallError> {
        let flags = map_flags(attributes);
        call(&*self.0, &mut IoasMap { flags, ioas_id, user_va, length, iova, ..IoasMap::default() })
    }

    /// Maps a part of a file.
    pub(crate) fn map_file(
        &self,
        ioas_id: u32,
        iova: u64,
        (file, start): (&BackingFile, u64),
        length: u64,
        attributes: Attributes,
    ) -> Result<(), CallError> {
        let (flags, fd) = (map_flags(attributes), file.as_fd().as_raw_fd());
        call(&*self.0, &mut IoasMapFile { flags, ioas_id, fd, start, length, iova, ..IoasMapFile::default() })
    }

    /// Maps what is mapped in another space.
    pub(crate) fn copy(
        &self,
        (dst_ioas_id, dst_iova): (u32, u64),
        (src_ioas_id, src_iova): (u32, u64),
        length: u64,
        attributes: Attributes,
    ) -> Result<(), CallError> {
        let flags = map_flags(attributes);
        let mut command =
            IoasCopy { flags, dst_ioas_id, src_ioas_id, length, dst_iova, src_iova, ..IoasCopy::default() };
        call(&*self.0, &mut command)
    }

    /// Unmaps all areas in a range, none of which may reach over its ends. `ENOENT`: there is none, or one does.
    pub(crate) fn unmap(&self, ioas_id: u32, range: IovaRange) -> Result<(), CallError> {
        // Of 2^64 bytes the interface says so by this.
        let length = range.length().unwrap_or(u64::MAX);
        call(&*self.0, &mut IoasUnmap { ioas_id, iova: range.first(), length, ..IoasUnmap::default() })
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An open `/dev/vfio/devices/vfioN`.
#[derive(Debug)]
pub(crate) struct Cdev(pub(crate) Arc<dyn KernelFile>);

impl Cdev {
    pub(crate) fn open(kernel: &dyn Kernel, path: &Path) -> Result<Cdev, OpenError> {
        open(kernel, path).map(Cdev)
    }

    /// Ties the device to an iommufd, until the file is closed.
    pub(crate) fn bind(&self, iommufd: &Iommufd) -> Result<(), CallError> {
        let iommufd = iommufd.as_fd().as_raw_fd();
        call(&*self.0, &mut DeviceBindIommufd { iommufd, ..DeviceBindIommufd::default() })
    }

    /// Sends the device's DMA through an address space, in one step from wherever it went before.
    pub(crate) fn attach(&self, ioas: u32) -> Result<(), CallError> {
        call(&*self.0, &mut DeviceAttachIommufdPt { pt_id: ioas, ..DeviceAttachIommufdPt::default() })
    }

    pub(crate) fn detach(&self) -> Result<(), CallError> {
        call(&*self.0, &mut DeviceDetachIommufdPt::default())
    }
}

/// Where a region of a device begins in the device's file.
pub(crate) fn region_offset(file: &dyn KernelFile, index: u32) -> Result<u64, CallError> {
    let mut command = RegionInfo { index, ..RegionInfo::default() };
    call(file, &mut command)?;
    Ok(command.offset)
}
