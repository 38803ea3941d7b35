//! An open `/dev/vfio/devices/vfioN`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use ioasid_uapi::pci;
use ioasid_uapi::vfio::{
    DeviceAttachIommufdPt, DeviceBindIommufd, DeviceDetachIommufdPt, DeviceInfo, PCI_CONFIG_REGION_INDEX,
    RegionInfo,
};
use rustix::io::Errno;

use super::{Iommufd, sys};

/// An open device file. Before [`bind`](Self::bind) nothing else works.
#[derive(Debug)]
pub(crate) struct VfioDevice(File);

impl VfioDevice {
    pub(crate) fn open(path: &Path) -> std::io::Result<Self> {
        File::options().read(true).write(true).open(path).map(Self)
    }

    /// Ties the device to an open `/dev/iommu`; returns its number there.
    pub(crate) fn bind(&self, iommufd: &Iommufd) -> Result<u32, Errno> {
        let iommufd = iommufd.as_fd().as_raw_fd();
        let mut command = DeviceBindIommufd { iommufd, ..DeviceBindIommufd::default() };
        sys::ioctl(&self.0, &mut command)?;
        Ok(command.out_devid)
    }

    pub(crate) fn info(&self) -> Result<DeviceInfo, Errno> {
        let mut command = DeviceInfo::default();
        sys::ioctl(&self.0, &mut command)?;
        Ok(command)
    }

    pub(crate) fn region(&self, index: u32) -> Result<RegionInfo, Errno> {
        let mut command = RegionInfo { index, ..RegionInfo::default() };
        sys::ioctl(&self.0, &mut command)?;
        Ok(command)
    }

    /// Sends the device's DMA through an address space; returns the number of the page table that is used.
    pub(crate) fn attach(&self, ioas: u32) -> Result<u32, Errno> {
        let mut command = DeviceAttachIommufdPt { pt_id: ioas, ..DeviceAttachIommufdPt::default() };
        sys::ioctl(&self.0, &mut command)?;
        Ok(command.pt_id)
    }

    pub(crate) fn detach(&self) -> Result<(), Errno> {
        sys::ioctl(&self.0, &mut DeviceDetachIommufdPt::default())
    }

    /// Vendor and device id, from configuration space.
    pub(crate) fn pci_ids(&self) -> Result<(u16, u16), Errno> {
        let mut ids = [0; 4];
        self.read(
            self.region(PCI_CONFIG_REGION_INDEX)?.offset.saturating_add(pci::VENDOR_ID as u64),
            &mut ids,
        )?;
        let [vendor_low, vendor_high, device_low, device_high] = ids;
        Ok((u16::from_le_bytes([vendor_low, vendor_high]), u16::from_le_bytes([device_low, device_high])))
    }

    /// Lets the device answer at its BARs and do DMA; returns the command register as it is afterwards.
    pub(crate) fn enable_bus_master(&self) -> Result<pci::Command, Errno> {
        let register = self.region(PCI_CONFIG_REGION_INDEX)?.offset.saturating_add(pci::COMMAND as u64);
        let mut bytes = [0; 2];
        self.read(register, &mut bytes)?;
        let wanted =
            u16::from_le_bytes(bytes) | (pci::Command::BUS_MASTER | pci::Command::MEMORY_SPACE).bits();
        self.write(register, &wanted.to_le_bytes())?;
        self.read(register, &mut bytes)?;
        Ok(pci::Command::from_bits_retain(u16::from_le_bytes(bytes)))
    }

    /// Reads from the device file at an offset that [`region`](Self::region) has led to.
    ///
    /// # Errors
    /// That of `pread`; `EIO` if it gave less than was asked for.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let whole = buffer.len();
        let count = rustix::io::retry_on_intr(|| rustix::io::pread(&self.0, &mut *buffer, offset))?;
        if count == whole { Ok(()) } else { Err(Errno::IO) }
    }

    /// Writes likewise.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let count = rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.0, bytes, offset))?;
        if count == bytes.len() { Ok(()) } else { Err(Errno::IO) }
    }
}
