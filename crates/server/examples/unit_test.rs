//! How a VMM's own iommufd code is tested without an IOMMU, without root and without a process of its own.
//!
//! The code under test (`Passthrough`) reaches the kernel through a small trait, as such code usually does for the sake of
//! its tests. In production the trait makes system calls. In tests it is a `Machine`: the in-process server, whose client
//! has this very process's memory, so that pointers mean what they say. Devices are there and do DMA; failures that a
//! real machine shows once a year are ordered.
//!
//! `cargo run -p ioasid-server --example unit_test`

use std::cell::Cell;
use std::ptr::from_mut;
use std::sync::Arc;

use ioasid_server::{Errno, InProcess, Server, ServerOptions};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd::{Destroy, IoasAlloc, IoasMap, IoasMapFlags, IoasUnmap};
use ioasid_uapi::vfio::{DeviceAttachIommufdPt, DeviceBindIommufd, RegionInfo};

// ---- The VMM -------------------------------------------------------------------------------------------------------

/// What the VMM wants of its kernel.
trait Kernel {
    fn open(&self, path: &str) -> Result<i32, Errno>;
    /// The third argument is a pointer, as a number.
    fn ioctl(&self, fd: i32, command: u32, argument: usize) -> Result<u32, Errno>;
    fn pread(&self, fd: i32, buffer: &mut [u8], offset: u64) -> Result<usize, Errno>;
    fn pwrite(&self, fd: i32, bytes: &[u8], offset: u64) -> Result<usize, Errno>;
}

/// A device that a guest owns, and the guest's memory as the device sees it.
struct Passthrough<K> {
    kernel: K,
    iommu: i32,
    device: i32,
    ioas_id: u32,
}

impl<K: Kernel> Passthrough<K> {
    fn new(kernel: K, path: &str) -> Result<Self, Errno> {
        let iommu = kernel.open("/dev/iommu")?;
        let device = kernel.open(path)?;
        let mut this = Self { kernel, iommu, device, ioas_id: 0 };
        this.call(this.device, DeviceBindIommufd { iommufd: iommu, ..Default::default() })?;
        this.ioas_id = this.call(iommu, IoasAlloc::default())?.out_ioas_id;
        let attach = DeviceAttachIommufdPt { pt_id: this.ioas_id, ..Default::default() };
        if let Err(errno) = this.call(this.device, attach) {
            this.call(iommu, Destroy { id: this.ioas_id, ..Default::default() })?;
            return Err(errno);
        }
        Ok(this)
    }

    fn call<T: Command>(&self, fd: i32, mut command: T) -> Result<T, Errno> {
        command.as_mut_bytes()[..4].copy_from_slice(&(T::SIZE as u32).to_ne_bytes());
        self.kernel.ioctl(fd, T::NUMBER, from_mut(&mut command).addr())?;
        Ok(command)
    }

    /// Gives the device guest memory, all pieces of it or none.
    fn add_memory(&self, pieces: &[(u64, usize, u64)]) -> Result<(), Errno> {
        let flags = IoasMapFlags::READABLE | IoasMapFlags::WRITEABLE | IoasMapFlags::FIXED_IOVA;
        for (done, &(iova, address, length)) in pieces.iter().enumerate() {
            let map = IoasMap {
                flags: flags.bits(),
                ioas_id: self.ioas_id,
                user_va: address as u64,
                length,
                iova,
                ..Default::default()
            };
            if let Err(errno) = self.call(self.iommu, map) {
                for &(iova, _, length) in &pieces[..done] {
                    self.remove_memory(iova, length)?;
                }
                return Err(errno);
            }
        }
        Ok(())
    }

    fn remove_memory(&self, iova: u64, length: u64) -> Result<(), Errno> {
        let unmap = IoasUnmap { ioas_id: self.ioas_id, iova, length, ..Default::default() };
        self.call(self.iommu, unmap).map(drop)
    }

    /// Where a region of the device is in its file.
    fn region(&self, index: u32) -> Result<u64, Errno> {
        Ok(self.call(self.device, RegionInfo { index, ..Default::default() })?.offset)
    }

    fn close(self) -> K {
        self.kernel
    }
}

// ---- Its tests -----------------------------------------------------------------------------------------------------

/// The machine of a test.
struct Machine {
    server: Arc<Server>,
    client: InProcess,
    /// After so many more ioctls one fails.
    fails_after: Cell<Option<(u32, Errno)>>,
}

impl Machine {
    fn new() -> Self {
        let server = Server::new(ServerOptions::default()).expect("a machine with one edu device");
        let client = InProcess::with_own_memory(1000).expect("our own memory");
        Self { server, client, fails_after: Cell::new(None) }
    }

    /// What the machine says is mapped, in all of its address spaces.
    fn areas(&self) -> usize {
        let spaces = self.server.status().contexts.into_iter().flat_map(|context| context.address_spaces);
        spaces.map(|space| space.area_count).sum()
    }

    fn dma_faults(&self) -> u64 {
        let devices = self.server.status().contexts.into_iter().flat_map(|context| context.devices);
        devices.map(|device| device.dma_faults).sum()
    }
}

impl Kernel for &Machine {
    fn open(&self, path: &str) -> Result<i32, Errno> {
        self.client.open(&self.server, path)
    }

    fn ioctl(&self, fd: i32, command: u32, argument: usize) -> Result<u32, Errno> {
        match self.fails_after.get() {
            Some((0, errno)) => {
                self.fails_after.set(None);
                return Err(errno);
            }
            Some((left, errno)) => self.fails_after.set(Some((left - 1, errno))),
            None => {}
        }
        self.client.ioctl(fd, command, argument as u64)
    }

    fn pread(&self, fd: i32, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let bytes = self.client.pread(fd, offset, buffer.len())?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn pwrite(&self, fd: i32, bytes: &[u8], offset: u64) -> Result<usize, Errno> {
        self.client.pwrite(fd, offset, bytes)
    }
}

const PAGE: u64 = 4096;
const EDU: &str = "/dev/vfio/devices/vfio0";

/// Pages of this process that stand for the guest's. A VMM has its own; they are looked at through the client only.
struct Guest(Vec<u8>);

impl Guest {
    fn new(pages: u64) -> Self {
        Self(vec![0; ((pages + 1) * PAGE) as usize])
    }

    fn address(&mut self) -> usize {
        self.0.as_mut_ptr().addr().next_multiple_of(PAGE as usize)
    }
}

/// Lets the edu device copy between memory and its buffer.
fn dma(vmm: &Passthrough<&Machine>, source: u64, destination: u64, count: u64, command: u64) {
    let (registers, config) = (vmm.region(0).unwrap(), vmm.region(7).unwrap());
    // Memory decode and bus mastering.
    vmm.kernel.pwrite(vmm.device, &[6, 0], config + 4).unwrap();
    let words = [source, destination, count, command].map(u64::to_le_bytes).concat();
    vmm.kernel.pwrite(vmm.device, &words, registers + 0x80).unwrap();
    let mut running = [1; 8];
    while running[0] & 1 != 0 {
        vmm.kernel.pread(vmm.device, &mut running, registers + 0x98).unwrap();
    }
}

const EDU_BUFFER: u64 = 0x40000;

fn the_device_sees_the_guests_memory() {
    let machine = Machine::new();
    let mut guest = Guest::new(2);
    let address = guest.address();
    let vmm = Passthrough::new(&machine, EDU).unwrap();
    vmm.add_memory(&[(0x10_0000, address, 2 * PAGE)]).unwrap();
    machine.client.put(address as u64, b"from the guest").unwrap();
    dma(&vmm, 0x10_0000, EDU_BUFFER, 14, 1);
    dma(&vmm, EDU_BUFFER, 0x10_1000, 14, 3);
    assert_eq!(machine.client.get(address as u64 + PAGE, 14).unwrap(), b"from the guest");
    assert_eq!(machine.dma_faults(), 0);

    vmm.remove_memory(0x10_0000, 2 * PAGE).unwrap();
    dma(&vmm, 0x10_0000, EDU_BUFFER, 14, 1);
    assert_eq!(machine.dma_faults(), 1, "what was taken away is out of the device's reach");
    vmm.close();
}

fn errors_are_the_kernels() {
    let machine = Machine::new();
    let mut guest = Guest::new(2);
    let address = guest.address();
    let vmm = Passthrough::new(&machine, EDU).unwrap();
    vmm.add_memory(&[(0x10_0000, address, PAGE)]).unwrap();
    assert_eq!(vmm.add_memory(&[(0x10_0000, address, PAGE)]), Err(Errno::EXIST));
    assert_eq!(vmm.add_memory(&[(0x20_0001, address, PAGE)]), Err(Errno::INVAL));
    assert_eq!(vmm.add_memory(&[(0x20_0000, 0, PAGE)]), Err(Errno::FAULT), "nothing is at address 0");
    assert_eq!(vmm.remove_memory(0x20_0000, PAGE), Err(Errno::NOENT));
    // Nobody else can have the device meanwhile.
    assert_eq!(Passthrough::new(&machine, EDU).err(), Some(Errno::INVAL));
    assert!(machine.client.open(&machine.server, "/dev/vfio/devices/vfio7").is_err());
}

fn a_full_account_leaves_nothing_behind() {
    let machine = Machine::new();
    machine.client.set_memory_lock_limit(Some(3 * PAGE));
    let mut guest = Guest::new(4);
    let address = guest.address();
    let vmm = Passthrough::new(&machine, EDU).unwrap();
    let second = address + 2 * PAGE as usize;
    let refused = vmm.add_memory(&[(0x10_0000, address, 2 * PAGE), (0x20_0000, second, 2 * PAGE)]);
    assert_eq!(refused, Err(Errno::NOMEM));
    assert_eq!(machine.areas(), 0, "the first piece was taken back");
}

fn every_ioctl_may_fail() {
    for number in 0.. {
        let machine = Machine::new();
        machine.fails_after.set(Some((number, Errno::NOMEM)));
        let mut guest = Guest::new(2);
        let address = guest.address();
        let started = Passthrough::new(&machine, EDU).and_then(|vmm| {
            let pieces = [(0x10_0000, address, PAGE), (0x20_0000, address + PAGE as usize, PAGE)];
            vmm.add_memory(&pieces)
        });
        match started {
            Err(errno) => assert_eq!((errno, machine.areas()), (Errno::NOMEM, 0)),
            // No ioctl was left that could fail.
            Ok(()) => {
                assert_eq!((number, machine.areas()), (5, 2));
                return;
            }
        }
    }
}

fn main() {
    let tests: [(&str, fn()); 4] = [
        ("the device sees the guest's memory", the_device_sees_the_guests_memory),
        ("errors are the kernel's", errors_are_the_kernels),
        ("a full account leaves nothing behind", a_full_account_leaves_nothing_behind),
        ("every ioctl may fail", every_ioctl_may_fail),
    ];
    for (name, test) in tests {
        test();
        println!("ok: {name}");
    }
}
