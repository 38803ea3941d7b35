//! An open `/dev/iommu`.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use ioasid_uapi::iommufd::{Destroy, IoasAlloc, IoasMap, IoasMapFlags, IoasUnmap, IovaRange};
use rustix::io::Errno;

use super::{DmaMemory, sys};

/// What devices may do with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// The ranges of IOVAs that an address space has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// In ascending order.
    pub(crate) allowed: Vec<IovaRange>,
    /// What IOVAs and lengths of mappings are multiples of.
    pub(crate) alignment: u64,
}

/// An open file of `/dev/iommu`. Numbers of address spaces are its own.
#[derive(Debug)]
pub(crate) struct Iommufd(File);

impl Iommufd {
    pub(crate) const PATH: &str = "/dev/iommu";

    pub(crate) fn open() -> std::io::Result<Self> {
        File::options().read(true).write(true).open(Self::PATH).map(Self)
    }

    /// Makes an I/O address space; returns its number.
    pub(crate) fn alloc(&self) -> Result<u32, Errno> {
        let mut command = IoasAlloc::default();
        sys::ioctl(&self.0, &mut command)?;
        Ok(command.out_ioas_id)
    }

    pub(crate) fn destroy(&self, id: u32) -> Result<(), Errno> {
        sys::ioctl(&self.0, &mut Destroy { id, ..Destroy::default() })
    }

    /// The IOVAs that can be mapped.
    pub(crate) fn ranges(&self, ioas: u32) -> Result<Ranges, Errno> {
        // The first answer says how many there are. A device may come in between, hence the bounded repetition.
        let mut room = 8;
        for _ in 0..4 {
            let mut allowed = vec![IovaRange::default(); room];
            let (result, command) = sys::iova_ranges(&self.0, ioas, &mut allowed);
            match result {
                Ok(()) => {
                    allowed.truncate(command.num_iovas as usize);
                    return Ok(Ranges { allowed, alignment: command.out_iova_alignment });
                }
                Err(Errno::MSGSIZE) => room = (command.num_iovas as usize).clamp(room, 1 << 16),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::MSGSIZE)
    }

    /// Maps `length` bytes from `offset` of `memory` on at `iova`.
    pub(crate) fn map(
        &self,
        ioas: u32,
        memory: &DmaMemory,
        offset: usize,
        length: u64,
        iova: u64,
        access: Access,
    ) -> Result<(), Errno> {
        let rights = match access {
            Access::Read => IoasMapFlags::READABLE,
            Access::ReadWrite => IoasMapFlags::READABLE | IoasMapFlags::WRITEABLE,
        };
        let flags = (IoasMapFlags::FIXED_IOVA | rights).bits();
        let mut command = IoasMap { flags, ioas_id: ioas, length, iova, ..IoasMap::default() };
        sys::map(&self.0, memory, offset, &mut command)
    }

    /// Unmaps; returns how many bytes were.
    pub(crate) fn unmap(&self, ioas: u32, iova: u64, length: u64) -> Result<u64, Errno> {
        let mut command = IoasUnmap { ioas_id: ioas, iova, length, ..IoasUnmap::default() };
        sys::ioctl(&self.0, &mut command)?;
        Ok(command.length)
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
