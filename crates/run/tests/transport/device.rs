//! An edu device behind `/dev/vfio`, as a user-space driver handles it.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::calls::{allocate, ioctl, open, open_iommu};

const IOAS_MAP: u32 = 0x3b85;
const IOAS_UNMAP: u32 = 0x3b86;
const IOAS_MAP_FILE: u32 = 0x3b8f;
const GET_REGION_INFO: u32 = 0x3b6c;
const BIND: u32 = 0x3b76;
const ATTACH: u32 = 0x3b77;
const DETACH: u32 = 0x3b78;
const HWPT_ALLOC: u32 = 0x3b89;

const CONFIG: u32 = 7;
const BAR_0: u32 = 0;

/// The name of the device's buffer in its own address space, and its length.
const BUFFER: u64 = 0x4_0000;
pub(crate) const BUFFER_LENGTH: u64 = 4096;

/// An address space and a device that does DMA through it.
pub(crate) struct Machine {
    /// The device's number in the iommufd; 0 if it was bound elsewhere.
    pub(crate) device_id: u32,
    pub(crate) iommu: OwnedFd,
    pub(crate) device: File,
    pub(crate) space: u32,
    pub(crate) config: u64,
    pub(crate) registers: u64,
}

fn ioctl_words(fd: i32, command: u32, words: &mut [u32]) -> Result<i32, Errno> {
    ioctl(fd, command, words.as_mut_ptr().addr() as u64)
}

fn ioctl_longs(fd: i32, command: u32, longs: &mut [u64]) -> Result<i32, Errno> {
    ioctl(fd, command, longs.as_mut_ptr().addr() as u64)
}

/// Two 32-bit fields in one word of the native byte order.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Machine {
    /// Opens, binds and attaches everything.
    pub(crate) fn new() -> Self {
        let iommu = open_iommu();
        let space = allocate(&iommu).unwrap();
        let device = open("/dev/vfio/devices/vfio0", OFlags::RDWR | OFlags::CLOEXEC).unwrap();
        let device_id = Self::bind(&iommu, &device).unwrap();
        ioctl_words(device.as_raw_fd(), ATTACH, &mut [12, 0, space]).unwrap();
        let (config, registers) = (Self::region(&device, CONFIG), Self::region(&device, BAR_0));
        let machine = Self { device_id, iommu, device: File::from(device), space, config, registers };
        // Memory decode and bus master.
        machine.device.write_all_at(&6u16.to_le_bytes(), config + 4).unwrap();
        machine
    }

    /// What [`Machine::new`] made, in another program that has inherited it.
    pub(crate) fn inherited(iommu: OwnedFd, device: OwnedFd, space: u32) -> Self {
        let (config, registers) = (Self::region(&device, CONFIG), Self::region(&device, BAR_0));
        Self { device_id: 0, iommu, device: device.into(), space, config, registers }
    }

    /// Binds; returns the device's number in the iommufd.
    pub(crate) fn bind(iommu: &OwnedFd, device: &OwnedFd) -> Result<u32, Errno> {
        let mut command = [16, 0, iommu.as_raw_fd() as u32, 0];
        ioctl_words(device.as_raw_fd(), BIND, &mut command)?;
        Ok(command[3])
    }

    /// Makes a page table of an address space that can be attached with PASIDs.
    pub(crate) fn table_for_pasids(&self, space: u32) -> Result<u32, Errno> {
        let mut command = [0; 12];
        command[..4].copy_from_slice(&[48, 8, self.device_id, space]);
        ioctl_words(self.iommu.as_raw_fd(), HWPT_ALLOC, &mut command)?;
        Ok(command[4])
    }

    /// Sends the device's requests without a PASID through a page table.
    pub(crate) fn attach(&self, table: u32) -> Result<(), Errno> {
        ioctl_words(self.device.as_raw_fd(), ATTACH, &mut [12, 0, table]).map(drop)
    }

    /// Sends the device's requests with a PASID through a page table.
    pub(crate) fn attach_pasid(&self, pasid: u32, table: u32) -> Result<(), Errno> {
        ioctl_words(self.device.as_raw_fd(), ATTACH, &mut [16, 1, table, pasid]).map(drop)
    }

    /// Blocks the device's requests with a PASID.
    pub(crate) fn detach_pasid(&self, pasid: u32) -> Result<(), Errno> {
        ioctl_words(self.device.as_raw_fd(), DETACH, &mut [12, 1, pasid]).map(drop)
    }

    /// Chooses the PASID of the device's requests.
    pub(crate) fn use_pasid(&self, pasid: Option<u32>) {
        let value = pasid.map_or(0, |pasid| u64::from(pasid) | 1 << 31);
        self.device.write_all_at(&value.to_le_bytes(), self.registers + 0xa0).unwrap();
    }

    fn region(device: &OwnedFd, index: u32) -> u64 {
        let mut information = [pair(32, 0), pair(index, 0), 0, 0];
        ioctl_longs(device.as_raw_fd(), GET_REGION_INFO, &mut information).unwrap();
        information[3]
    }

    /// Maps memory of this process, readable and writable for the device.
    pub(crate) fn map(&self, address: u64, length: u64, iova: u64) -> Result<(), Errno> {
        self.map_in(self.space, address, length, iova)
    }

    /// The same in any address space.
    pub(crate) fn map_in(&self, space: u32, address: u64, length: u64, iova: u64) -> Result<(), Errno> {
        let mut command = [pair(40, 7), pair(space, 0), address, length, iova];
        ioctl_longs(self.iommu.as_raw_fd(), IOAS_MAP, &mut command).map(drop)
    }

    /// Maps memory that the device may only read.
    pub(crate) fn map_read_only(&self, address: u64, length: u64, iova: u64) -> Result<(), Errno> {
        let mut command = [pair(40, 5), pair(self.space, 0), address, length, iova];
        ioctl_longs(self.iommu.as_raw_fd(), IOAS_MAP, &mut command).map(drop)
    }

    pub(crate) fn map_file(&self, fd: i32, start: u64, length: u64, iova: u64) -> Result<(), Errno> {
        let mut command = [pair(40, 7), pair(self.space, fd as u32), start, length, iova];
        ioctl_longs(self.iommu.as_raw_fd(), IOAS_MAP_FILE, &mut command).map(drop)
    }

    pub(crate) fn unmap(&self, iova: u64, length: u64) -> Result<(), Errno> {
        ioctl_longs(self.iommu.as_raw_fd(), IOAS_UNMAP, &mut [pair(24, self.space), iova, length]).map(drop)
    }

    /// Has the device fetch up to 4096 bytes into its buffer.
    pub(crate) fn fetch(&self, iova: u64, length: u64) {
        self.transfer(iova, BUFFER, length, 1);
    }

    /// Has the device write its buffer to memory.
    pub(crate) fn store(&self, iova: u64, length: u64) {
        self.transfer(BUFFER, iova, length, 3);
    }

    /// Has the device begin to fetch a page.
    pub(crate) fn begin_to_fetch(&self, iova: u64) {
        self.begin(iova, BUFFER, BUFFER_LENGTH, 1);
    }

    fn begin(&self, source: u64, destination: u64, length: u64, command: u64) {
        for (register, value) in [(0x80, source), (0x88, destination), (0x90, length), (0x98, command)] {
            self.device.write_all_at(&value.to_le_bytes(), self.registers + register).unwrap();
        }
    }

    fn transfer(&self, source: u64, destination: u64, length: u64, command: u64) {
        self.begin(source, destination, length, command);
        let start = Instant::now();
        let mut state = [0; 8];
        loop {
            self.device.read_exact_at(&mut state, self.registers + 0x98).unwrap();
            if state[0] & 1 == 0 {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60));
        }
    }
}
