//! What a software PCI device is to the server.
//!
//! Regions are numbered as VFIO numbers them (`PCI_*_REGION_INDEX` in [`ioasid_uapi::vfio`]): 0 to 5 the
//! BARs, 6 the ROM, 7 configuration space, 8 the legacy VGA ranges. The rules for accesses are those that Linux keeps for a program that reads or
//! writes a VFIO device file, so that a server has only to turn an [`AccessError`] into a number.

use super::config::ConfigSpaceSize;
use super::header::{Bar, Type0Header};
use ioasid_uapi::pci::BAR_COUNT;
use ioasid_uapi::vfio::{PCI_CONFIG_REGION_INDEX, PCI_ROM_REGION_INDEX, RegionFlags};

/// One region of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Size in bytes; 0 if the device does not have it.
    pub size: u64,
    /// What a program may do with it; none if the device does not have it.
    pub flags: RegionFlags,
}

/// The regions of a device, as its header states them.
#[derive(Clone, Debug)]
pub struct RegionTable {
    bars: [Bar; BAR_COUNT],
    config: ConfigSpaceSize,
}

impl RegionTable {
    /// The regions of a device with this header and this much configuration space.
    pub fn new(size: ConfigSpaceSize, header: &Type0Header) -> Self {
        Self { bars: header.bars, config: size }
    }

    /// The region with this VFIO index. An absent BAR or ROM has size 0; an index that names nothing at
    /// all, or the VGA ranges, is refused.
    pub fn get(&self, index: u32) -> Result<Region, AccessError> {
        let size = match index {
            PCI_ROM_REGION_INDEX => 0,
            PCI_CONFIG_REGION_INDEX => self.config.bytes() as u64,
            bar => self.bars.get(bar as usize).ok_or(AccessError::NoSuchRegion { index })?.size(),
        };
        let flags = if size == 0 { RegionFlags::empty() } else { RegionFlags::READ | RegionFlags::WRITE };
        Ok(Region { size, flags })
    }

    /// How many of `length` bytes at `offset` an access to a BAR covers: it is cut at the end, and refused
    /// if it starts there.
    pub fn cut_bar_access(&self, bar: u32, offset: u64, length: usize) -> Result<usize, AccessError> {
        let size = self.bars.get(bar as usize).ok_or(AccessError::NoSuchRegion { index: bar })?.size();
        let available = size.checked_sub(offset).filter(|available| *available > 0);
        let available = available.ok_or(AccessError::BeyondRegion { index: bar, offset, size })?;
        Ok(usize::try_from(available).map_or(length, |available| available.min(length)))
    }
}

/// Why an access to a region was refused. Each says which error Linux returns for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AccessError {
    /// No such region (EINVAL).
    #[error("the device has no region {index}")]
    NoSuchRegion {
        /// The VFIO index.
        index: u32,
    },
    /// The access starts at or past the end of the region; an absent one ends at 0 (EINVAL).
    #[error("offset {offset:#x} is past the end of region {index}, which has {size:#x} bytes")]
    BeyondRegion {
        /// The VFIO index.
        index: u32,
        /// Where the access starts, in bytes.
        offset: u64,
        /// Size of the region in bytes.
        size: u64,
    },
    /// The access ends past the end of configuration space (EFAULT).
    #[error("{length} bytes at offset {offset:#x} do not fit configuration space of {size} bytes")]
    BeyondConfigSpace {
        /// Where the access starts, in bytes.
        offset: u64,
        /// Its length in bytes.
        length: usize,
        /// Size of the space in bytes.
        size: usize,
    },
    /// The region cannot be written (EINVAL).
    #[error("region {index} cannot be written")]
    ReadOnly {
        /// The VFIO index.
        index: u32,
    },
    /// A BAR was accessed while COMMAND does not enable it (EIO).
    #[error("memory decode is off: set bit 1 of the COMMAND register first")]
    MemoryDecodeOff,
}

/// A software PCI device, as its server sees it.
///
/// A device is *closed* after it was made and after [`close`](Self::close), and *open* after
/// [`open`](Self::open). Any call may come at any time from any thread; a device answers accesses while it
/// is closed too, but does no DMA, since bus mastering is off then and only a configuration write turns
/// it on.
///
/// No call panics on any input, waits without bound, or holds a lock while it waits for DMA. Where a call
/// waits for a transfer to end, it gives up after a second if memory does not answer; the transfer is then
/// as good as cancelled for the device, and keeping it from memory is the IOMMU's task.
pub trait PciDevice: std::fmt::Debug + Send + Sync {
    /// The regions; the same for the device's whole life.
    fn regions(&self) -> &RegionTable;

    /// Reads configuration space: any offset, any length, all or nothing.
    fn read_config(&self, offset: u64, buffer: &mut [u8]) -> Result<(), AccessError>;

    /// Writes configuration space: any offset, any length, all or nothing. A write that turns bus
    /// mastering off waits for the transfer that is running.
    fn write_config(&self, offset: u64, bytes: &[u8]) -> Result<(), AccessError>;

    /// Reads a BAR. Returns how many bytes were read: fewer than asked for at the end of the BAR. Refused
    /// while COMMAND has memory decode off.
    fn read_bar(&self, bar: u32, offset: u64, buffer: &mut [u8]) -> Result<usize, AccessError>;

    /// Writes a BAR. Returns how many bytes were written: fewer than asked for at the end of the BAR.
    /// Refused while COMMAND has memory decode off.
    fn write_bar(&self, bar: u32, offset: u64, bytes: &[u8]) -> Result<usize, AccessError>;

    /// Takes the device into use: it is reset, its configuration space has reset values but for memory
    /// decode, which is on. Bus mastering is off.
    fn open(&self);

    /// Ends the use of the device: bus mastering and memory decode go off, DMA ends as with
    /// [`reset`](Self::reset), nothing that was stored in the device remains.
    fn close(&self);

    /// A function-level reset as Linux performs it: the device's own state is lost, configuration space
    /// stays as it was. A transfer that was commanded before has either ended or is cancelled; a
    /// cancelled one changes nothing in the device any more.
    fn reset(&self);

    /// Reads from the region with a VFIO index. An empty read does nothing, wherever it is.
    fn read_region(&self, index: u32, offset: u64, buffer: &mut [u8]) -> Result<usize, AccessError> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let region = self.regions().get(index)?;
        match index {
            PCI_CONFIG_REGION_INDEX => self.read_config(offset, buffer).map(|()| buffer.len()),
            PCI_ROM_REGION_INDEX => Err(AccessError::BeyondRegion { index, offset, size: region.size }),
            bar => self.read_bar(bar, offset, buffer),
        }
    }

    /// Writes to the region with a VFIO index. An empty write does nothing, wherever it is.
    fn write_region(&self, index: u32, offset: u64, bytes: &[u8]) -> Result<usize, AccessError> {
        if bytes.is_empty() {
            return Ok(0);
        }
        self.regions().get(index)?;
        match index {
            PCI_CONFIG_REGION_INDEX => self.write_config(offset, bytes).map(|()| bytes.len()),
            PCI_ROM_REGION_INDEX => Err(AccessError::ReadOnly { index }),
            bar => self.write_bar(bar, offset, bytes),
        }
    }
}
