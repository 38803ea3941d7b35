//! A client program for tests: typed commands on top of `InProcess`.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioasid_server::{Errno, InProcess, Opened, Server, ServerOptions};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test::{CheckRefs, Operation, TestCommand};
use ioasid_uapi::vfio::{DeviceAttachIommufdPt, DeviceBindIommufd, DeviceDetachIommufdPt};
use zerocopy::IntoBytes;

pub(crate) const PAGE: u64 = 4096;
/// Where a program's first memory is mapped.
pub(crate) const BUFFER: u64 = 0x7f12_3460_0000;
pub(crate) const BUFFER_SIZE: u64 = 16 * PAGE;

pub(crate) const FIXED: u32 = 1;
pub(crate) const WRITE: u32 = 2;
pub(crate) const READ: u32 = 4;

/// A program with some memory.
pub(crate) struct Program {
    pub(crate) server: Arc<Server>,
    pub(crate) client: InProcess,
}

impl Deref for Program {
    type Target = InProcess;
    fn deref(&self) -> &InProcess {
        &self.client
    }
}

pub(crate) fn server() -> Arc<Server> {
    server_with("edu")
}

/// A machine with one device that these options describe, and test devices.
pub(crate) fn server_with(device: &str) -> Arc<Server> {
    let devices = vec![device.parse().unwrap()];
    Server::new(ServerOptions { devices, test_devices: true, ..Default::default() }).unwrap()
}

pub(crate) fn open(server: &Arc<Server>, client: &InProcess, path: &str) -> Result<i32, Errno> {
    match server.open(client, Path::new(path)).expect("one of our paths")? {
        Opened::File(file) => Ok(client.insert(file)),
        Opened::Text(_) => panic!("{path} is a text"),
    }
}

/// A memfd of `length` bytes.
pub(crate) fn memfd(length: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("ioasid-server-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, length).unwrap();
    fd
}

pub(crate) trait IsCommand: Command {
    /// Writes the size word, which every argument begins with.
    fn sized(mut self) -> Self {
        let size = (Self::SIZE as u32).to_ne_bytes();
        self.as_mut_bytes()[..4].copy_from_slice(&size);
        self
    }
}
impl<T: Command> IsCommand for T {}

/// Result, count, alignment, and the entries of the array.
pub(crate) type IovaRanges = (Result<(), Errno>, u32, u64, Vec<(u64, u64)>);

impl Program {
    pub(crate) fn new() -> Self {
        Self::of(&server())
    }

    pub(crate) fn of(server: &Arc<Server>) -> Self {
        let client = InProcess::new(1000);
        client.map_memory(BUFFER, BUFFER_SIZE);
        Self { server: Arc::clone(server), client }
    }

    pub(crate) fn forked(&self) -> Self {
        Self { server: Arc::clone(&self.server), client: self.client.second_process() }
    }

    pub(crate) fn open(&self, path: &str) -> i32 {
        open(&self.server, &self.client, path).unwrap()
    }

    pub(crate) fn iommu(&self) -> i32 {
        self.open("/dev/iommu")
    }

    pub(crate) fn ioas(&self, fd: i32) -> u32 {
        self.run(fd, uapi::IoasAlloc::default()).unwrap().out_ioas_id
    }

    pub(crate) fn destroy(&self, fd: i32, id: u32) -> Result<(), Errno> {
        self.run(fd, uapi::Destroy { id, ..Default::default() }).map(drop)
    }

    pub(crate) fn map_flags(
        &self,
        fd: i32,
        ioas_id: u32,
        flags: u32,
        user_va: u64,
        length: u64,
        iova: u64,
    ) -> Result<u64, Errno> {
        let command = uapi::IoasMap { flags, ioas_id, user_va, length, iova, ..Default::default() };
        self.run(fd, command).map(|command| command.iova)
    }

    /// Maps for reading and writing where there is room.
    pub(crate) fn map(&self, fd: i32, ioas: u32, address: u64, length: u64) -> Result<u64, Errno> {
        self.map_flags(fd, ioas, READ | WRITE, address, length, 0)
    }

    pub(crate) fn map_fixed(
        &self,
        fd: i32,
        ioas: u32,
        address: u64,
        length: u64,
        iova: u64,
    ) -> Result<(), Errno> {
        let at = self.map_flags(fd, ioas, FIXED | READ | WRITE, address, length, iova)?;
        assert_eq!(at, iova);
        Ok(())
    }

    pub(crate) fn map_file(
        &self,
        fd: i32,
        ioas_id: u32,
        file: i32,
        start: u64,
        length: u64,
    ) -> Result<u64, Errno> {
        let command =
            uapi::IoasMapFile { flags: READ | WRITE, ioas_id, fd: file, start, length, ..Default::default() };
        self.run(fd, command).map(|command| command.iova)
    }

    pub(crate) fn unmap(&self, fd: i32, ioas_id: u32, iova: u64, length: u64) -> Result<u64, Errno> {
        let command = uapi::IoasUnmap { ioas_id, iova, length, ..Default::default() };
        self.run(fd, command).map(|command| command.length)
    }

    pub(crate) fn option(
        &self,
        fd: i32,
        option_id: u32,
        op: u16,
        object_id: u32,
        val64: u64,
    ) -> Result<u64, Errno> {
        let command = uapi::SetOption { option_id, op, object_id, val64, ..Default::default() };
        self.run(fd, command).map(|command| command.val64)
    }

    /// Performs an operation of the self-test's command.
    pub(crate) fn test<T: Operation>(&self, fd: i32, id: u32, operation: &T) -> Result<T, Errno> {
        let mut command = TestCommand { op: T::OP, id, ..Default::default() };
        command.set_payload(operation);
        self.run(fd, command).map(|command| command.payload())
    }

    /// How the IOVA ranges come back into `room` entries: the result, how many there are, the alignment, the entries.
    pub(crate) fn iova_ranges(&self, fd: i32, ioas_id: u32, room: u32) -> IovaRanges {
        const ARRAY: u64 = BUFFER + BUFFER_SIZE - 2 * PAGE;
        let length = room as usize * 16;
        self.put(ARRAY, &vec![0; length + 16]).unwrap();
        let mut command =
            uapi::IoasIovaRanges { ioas_id, num_iovas: room, allowed_iovas: ARRAY, ..Default::default() }
                .sized();
        let result = self.client.call(fd, uapi::IoasIovaRanges::NUMBER, command.as_mut_bytes()).map(drop);
        let bytes = self.get(ARRAY, length).unwrap();
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let ranges = (0..room as usize).map(|entry| (word(entry * 16), word(entry * 16 + 8))).collect();
        assert_eq!(
            self.get(ARRAY + length as u64, 16).unwrap(),
            [0; 16],
            "nothing is written behind the array"
        );
        (result, command.num_iovas, command.out_iova_alignment, ranges)
    }

    pub(crate) fn allow(&self, fd: i32, ioas_id: u32, ranges: &[(u64, u64)]) -> Result<(), Errno> {
        const ARRAY: u64 = BUFFER + BUFFER_SIZE - 2 * PAGE;
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(start, last)| [start.to_ne_bytes(), last.to_ne_bytes()])
            .flatten()
            .collect();
        self.put(ARRAY, &bytes).unwrap();
        let num_iovas = ranges.len() as u32;
        let command = uapi::IoasAllowIovas { ioas_id, num_iovas, allowed_iovas: ARRAY, ..Default::default() };
        self.run(fd, command).map(drop)
    }
}

/// A device that is bound to an open `/dev/iommu`.
pub(crate) struct BoundDevice {
    pub(crate) fd: i32,
    pub(crate) id: u32,
}

/// Where region `index` begins in a device file.
pub(crate) fn region(index: u64) -> u64 {
    ioasid_server::REGION_MAGIC | index << 40
}

/// Registers and addresses of the edu device.
pub(crate) const EDU_BUFFER: u64 = 0x40000;
const DMA_SOURCE: u64 = 0x80;
const DMA_COMMAND: u64 = 0x98;
const DMA_PASID: u64 = 0xa0;
const CONFIG: u64 = 7;

impl Program {
    pub(crate) fn bind_at(&self, fd: i32, iommu: i32) -> Result<u32, Errno> {
        let command = DeviceBindIommufd { iommufd: iommu, ..Default::default() };
        self.run(fd, command).map(|command| command.out_devid)
    }

    /// Opens device 0 and binds it, with memory decode and bus mastering on.
    pub(crate) fn bind(&self, iommu: i32) -> BoundDevice {
        self.bind_device(iommu, 0)
    }

    pub(crate) fn bind_device(&self, iommu: i32, number: u32) -> BoundDevice {
        let fd = self.open(&format!("/dev/vfio/devices/vfio{number}"));
        let id = self.bind_at(fd, iommu).unwrap();
        self.pwrite(fd, region(CONFIG) + 4, &[6, 0]).unwrap();
        BoundDevice { fd, id }
    }

    pub(crate) fn attach(&self, device: &BoundDevice, pt_id: u32) -> Result<u32, Errno> {
        let command = DeviceAttachIommufdPt { pt_id, ..Default::default() };
        self.run(device.fd, command).map(|command| command.pt_id)
    }

    pub(crate) fn detach(&self, device: &BoundDevice) -> Result<(), Errno> {
        self.run(device.fd, DeviceDetachIommufdPt::default()).map(drop)
    }

    pub(crate) fn hwpt(&self, iommu: i32, dev_id: u32, pt_id: u32) -> Result<u32, Errno> {
        let command = uapi::HwptAlloc { dev_id, pt_id, ..Default::default() };
        self.run(iommu, command).map(|command| command.out_hwpt_id)
    }

    /// Makes a page table that can be attached with PASIDs, and beside them.
    pub(crate) fn hwpt_for_pasids(&self, iommu: i32, dev_id: u32, pt_id: u32) -> Result<u32, Errno> {
        let flags = uapi::HwptAllocFlags::PASID.bits();
        let command = uapi::HwptAlloc { flags, dev_id, pt_id, ..Default::default() };
        self.run(iommu, command).map(|command| command.out_hwpt_id)
    }

    pub(crate) fn attach_pasid(&self, device: &BoundDevice, pasid: u32, pt_id: u32) -> Result<u32, Errno> {
        let command = DeviceAttachIommufdPt { flags: 1, pasid, pt_id, ..Default::default() };
        self.run(device.fd, command).map(|command| command.pt_id)
    }

    pub(crate) fn detach_pasid(&self, device: &BoundDevice, pasid: u32) -> Result<(), Errno> {
        let command = DeviceDetachIommufdPt { flags: 1, pasid, ..Default::default() };
        self.run(device.fd, command).map(drop)
    }

    /// Chooses the PASID of the device's requests from now on.
    pub(crate) fn use_pasid(&self, device: &BoundDevice, pasid: Option<u32>) {
        let value = pasid.map_or(0, |pasid| u64::from(pasid) | 1 << 31);
        self.pwrite(device.fd, region(0) + DMA_PASID, &value.to_le_bytes()).unwrap();
    }

    fn dma(&self, device: &BoundDevice, source: u64, destination: u64, length: u64, command: u64) {
        let registers: Vec<u8> =
            [source, destination, length, command].into_iter().flat_map(u64::to_le_bytes).collect();
        self.pwrite(device.fd, region(0) + DMA_SOURCE, &registers).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.pread(device.fd, region(0) + DMA_COMMAND, 8).unwrap()[0] & 1 != 0 {
            assert!(Instant::now() < deadline, "the device does not finish");
            std::thread::yield_now();
        }
    }

    /// Lets the device copy `length` bytes from one IOVA to another, through its buffer. Where it cannot read, what it
    /// read before arrives; where it cannot write, nothing changes.
    pub(crate) fn device_copies(&self, device: &BoundDevice, from: u64, to: u64, length: u64) {
        self.dma(device, from, EDU_BUFFER, length, 1);
        self.dma(device, EDU_BUFFER, to, length, 3);
    }

    /// What all users are charged together, in pages.
    pub(crate) fn charged(&self) -> u64 {
        self.server.status().accounts.iter().map(|account| account.charged_pages).sum()
    }

    /// Whether every page of the program's buffer is held exactly `count` times.
    pub(crate) fn held(&self, count: u32) -> bool {
        let iommu = self.iommu();
        let refs = CheckRefs { uptr: BUFFER, length: BUFFER_SIZE, refs: count, padding: 0 };
        let result = self.test(iommu, 0, &refs);
        self.close(iommu).unwrap();
        match result {
            Ok(_) => true,
            Err(Errno::IO) => false,
            Err(error) => panic!("{error}"),
        }
    }
}
