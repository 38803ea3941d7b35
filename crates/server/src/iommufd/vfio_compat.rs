//! VFIO's type 1 commands on an open `/dev/iommu`, for programs that know VFIO's containers only.
//!
//! They have no number of an address space in them. Which one they mean, the *compatibility* address space, is set by
//! VFIO_IOAS; without one there is no device, and they say so. It is an address space like any other, and the commands
//! come down to what the context's own do.
//!
//! What differs is unmapping. Type 1 version 2 unmaps whole mappings as IOAS_UNMAP does, but to find none is no error.
//! Version 1 unmaps any range of pages: the areas it cuts are divided. A program that chooses version 1 cannot have
//! large pages, as far as it sees; that is also how its address space is known to be of version 1, whoever forbids them.
//!
//! The dirty log of VFIO's type 1 is not part of this interface, here as in Linux: HWPT_GET_DIRTY_BITMAP is.

use std::sync::{Arc, Weak};

use ioasid::{Coherency, IovaRange, Permissions};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::vfio::{self, Type1DmaMapFlags, Type1DmaUnmapFlags, Type1InfoFlags};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::ioas::{Ioas, Placement};
use super::objects::{Held, Object};
use super::{Call, Context};
use crate::memory::PAGE_SIZE;
use crate::poison::lock;
use crate::{Client, argument};

/// Linux has no bound on mappings and says so. Ours is far beyond what a program of type 1 expects, which is 65,535.
const MAPPINGS_AVAILABLE: u32 = u32::MAX;

/// Capabilities begin at multiples of so many bytes.
const CAPABILITY_ALIGNMENT: usize = 8;

/// The address space that VFIO's commands mean.
#[derive(Debug)]
pub(super) struct CompatIoas {
    id: u32,
    ioas: Weak<Ioas>,
}

impl Context {
    /// The compatibility address space and its number.
    ///
    /// # Errors
    /// `ENODEV` if there is none, or it has been destroyed.
    fn compat_ioas(&self) -> Result<(u32, Held<Ioas>), Errno> {
        let compat = lock(&self.compat);
        let CompatIoas { id, ioas } = compat.as_ref().ok_or(Errno::NODEV)?;
        let held = ioas.upgrade().and_then(|ioas| Held::new(&ioas));
        held.map(|ioas| (*id, ioas)).ok_or(Errno::NODEV)
    }

    /// Performs one of VFIO's commands.
    ///
    /// # Errors
    /// - `ENOTTY`: no such command, or one of those that Linux does not answer here.
    /// - `EFAULT`: the argument cannot be read. `EINVAL`: it is too short, or has unknown flags.
    /// - `ENODEV`: there is no compatibility address space. Those of the command.
    pub(super) fn vfio_ioctl(&self, client: &dyn Client, number: u32, argument: u64) -> Result<u32, Errno> {
        match number {
            vfio::GET_API_VERSION => Ok(vfio::API_VERSION),
            vfio::CHECK_EXTENSION => self.vfio_check_extension(argument),
            vfio::SET_IOMMU => self.vfio_set_iommu(argument).map(|()| 0),
            vfio::IOMMU_GET_INFO => self.vfio_get_info(client, argument).map(|()| 0),
            vfio::IOMMU_MAP_DMA => self.vfio_map_dma(client, argument).map(|()| 0),
            vfio::IOMMU_UNMAP_DMA => self.vfio_unmap_dma(client, argument).map(|()| 0),
            _ => Err(Errno::NOTTY),
        }
    }

    fn vfio_check_extension(&self, extension: u64) -> Result<u32, Errno> {
        match u32::try_from(extension) {
            Ok(vfio::TYPE1_IOMMU | vfio::TYPE1V2_IOMMU | vfio::UNMAP_ALL) => Ok(1),
            Ok(vfio::DMA_CC_IOMMU) => {
                let (_, ioas) = self.compat_ioas()?;
                Ok(self.is_coherent(ioas.arc()).into())
            }
            _ => Ok(0),
        }
    }

    /// Whether no DMA through any table of the address space can bypass the CPU's caches.
    fn is_coherent(&self, ioas: &Arc<Ioas>) -> bool {
        let mut tables = self.objects.snapshot().into_iter().filter_map(|(_, object)| match object {
            Object::Hwpt(hwpt) if hwpt.ioas().is_some_and(|its| Arc::ptr_eq(&its, ioas)) => hwpt.table(),
            _ => None,
        });
        tables.all(|table| table.coherency() == Coherency::Enforced)
    }

    fn vfio_set_iommu(&self, kind: u64) -> Result<(), Errno> {
        let large_pages = match u32::try_from(kind) {
            Ok(vfio::TYPE1_IOMMU) => false,
            Ok(vfio::TYPE1V2_IOMMU) => true,
            _ => return Err(Errno::INVAL),
        };
        let (_, ioas) = self.compat_ioas()?;
        // Version 2 leaves the option as it is.
        if large_pages { Ok(()) } else { ioas.set_large_pages(false) }
    }

    fn vfio_get_info(&self, client: &dyn Client, address: u64) -> Result<(), Errno> {
        let mut info: vfio::Type1Info = argument::receive_argsz(client, address)?;
        let room = argument::argsz(&info);
        let (ranges, _) = self.compat_ioas()?.1.usable();
        let capabilities = capabilities(&ranges)?;
        let needed = vfio::Type1Info::SIZE + capabilities.len();
        info.flags = (Type1InfoFlags::PGSIZES | Type1InfoFlags::CAPS).bits();
        // The engine combines pages as it likes: a mapping can have any size.
        info.iova_pgsizes = !(PAGE_SIZE - 1);
        info.cap_offset = 0;
        info.argsz = u32::try_from(needed).map_err(|_| Errno::OVERFLOW)?;
        if room >= needed {
            info.cap_offset = vfio::Type1Info::SIZE as u32;
            let behind = address.checked_add(vfio::Type1Info::SIZE as u64).ok_or(Errno::FAULT)?;
            client.write(behind, &capabilities)?;
        }
        client.write(address, &info.as_bytes()[..room.min(vfio::Type1Info::SIZE)])
    }

    fn vfio_map_dma(&self, client: &dyn Client, address: u64) -> Result<(), Errno> {
        let command: vfio::Type1DmaMap = argument::receive_argsz(client, address)?;
        let permissions = match Type1DmaMapFlags::from_bits(command.flags) {
            None => return Err(Errno::INVAL),
            Some(flags) if flags.contains(Type1DmaMapFlags::VADDR) => return Err(Errno::INVAL),
            Some(flags) if flags == Type1DmaMapFlags::READ => Some(Permissions::READ),
            Some(flags) if flags == Type1DmaMapFlags::WRITE => Some(Permissions::WRITE),
            Some(flags) if flags.is_empty() => None,
            Some(_) => Some(Permissions::READ_WRITE),
        };
        let (_, ioas) = self.compat_ioas()?;
        let permissions = permissions.ok_or(Errno::INVAL)?;
        let memory = (command.vaddr, command.size);
        self.map_memory(client, &ioas, memory, Placement::Fixed(command.iova), permissions).map(drop)
    }

    fn vfio_unmap_dma(&self, client: &dyn Client, address: u64) -> Result<(), Errno> {
        let mut command: vfio::Type1DmaUnmap = argument::receive_argsz(client, address)?;
        let flags = Type1DmaUnmapFlags::from_bits(command.flags)
            .filter(|flags| Type1DmaUnmapFlags::ALL.contains(*flags))
            .ok_or(Errno::INVAL)?;
        let (_, ioas) = self.compat_ioas()?;
        let unmapped = if flags.contains(Type1DmaUnmapFlags::ALL) {
            if command.iova != 0 || command.size != 0 {
                return Err(Errno::INVAL);
            }
            ioas.unmap(IovaRange::ALL)
        } else if command.size == 0 {
            Err(Errno::INVAL)
        } else {
            match IovaRange::with_length(command.iova, command.size) {
                None => Err(Errno::OVERFLOW),
                Some(range) if ioas.large_pages() => ioas.unmap(range),
                Some(range) => match ioas.unmap_cutting(range) {
                    // An area that cannot be cut is found out before anything is unmapped.
                    Err(error @ (Errno::INVAL | Errno::OPNOTSUPP | Errno::NOMEM)) => return Err(error),
                    unmapped => unmapped,
                },
            }
        };
        drop(ioas);
        // How much it was is told after an error too.
        command.size = *unmapped.as_ref().unwrap_or(&0);
        client.write(address, command.as_bytes())?;
        unmapped.map(drop)
    }
}

/// The capabilities of GET_INFO as they follow its structure.
fn capabilities(usable: &[IovaRange]) -> Result<Vec<u8>, Errno> {
    let header = |id, next| vfio::InfoCapHeader { id, version: 1, next };
    let available =
        vfio::Type1InfoDmaAvail { header: header(vfio::TYPE1_INFO_DMA_AVAIL, 0), avail: MAPPINGS_AVAILABLE };
    let second = vfio::Type1Info::SIZE + size_of_val(&available).next_multiple_of(CAPABILITY_ALIGNMENT);
    let available =
        vfio::Type1InfoDmaAvail { header: header(vfio::TYPE1_INFO_DMA_AVAIL, second as u32), ..available };
    let ranges = vfio::Type1InfoCapIovaRange {
        header: header(vfio::TYPE1_INFO_CAP_IOVA_RANGE, 0),
        nr_iovas: u32::try_from(usable.len()).map_err(|_| Errno::OVERFLOW)?,
        reserved: 0,
    };
    let mut bytes = available.as_bytes().to_vec();
    bytes.resize(bytes.len().next_multiple_of(CAPABILITY_ALIGNMENT), 0);
    bytes.extend_from_slice(ranges.as_bytes());
    for range in usable {
        let range = vfio::Type1IovaRange { start: range.first(), end: range.last() };
        bytes.extend_from_slice(range.as_bytes());
    }
    Ok(bytes)
}

impl Call<'_> {
    /// VFIO_IOAS: says which address space VFIO's commands mean, changes it, or forgets it.
    pub(super) fn vfio_ioas(&self) -> Result<(), Errno> {
        let mut command: uapi::VfioIoas = self.receive()?;
        if command.reserved != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        match command.op {
            uapi::VFIO_IOAS_GET => {
                let (id, ioas) = self.context.compat_ioas()?;
                drop(ioas);
                command.ioas_id = id;
                self.respond(&command)
            }
            uapi::VFIO_IOAS_SET => {
                let ioas = self.context.objects.hold_ioas(command.ioas_id)?;
                let compat = CompatIoas { id: command.ioas_id, ioas: Arc::downgrade(ioas.arc()) };
                *lock(&self.context.compat) = Some(compat);
                Ok(())
            }
            uapi::VFIO_IOAS_CLEAR => {
                *lock(&self.context.compat) = None;
                Ok(())
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }
}
