//! A virtio device behind an I/O address space, with rust-vmm's own queue.
//!
//! The device below is written as any device of rust-vmm is: against `GuestMemory`, knowing nothing of address spaces. It
//! answers each request with the same text in capitals. What it is given for memory is an `IommuMemory` on a `Space`, so
//! all addresses that the driver hands it, of the queue as well as of the buffers, are I/O virtual addresses, and it reaches what the
//! driver has mapped and nothing else.
//!
//! `cargo run -p ioasid --features vm-memory --example virtio_queue`

use ioasid::{Account, Bus, GuestRam, Iova, IovaRange, Memory, Permissions, Space, SpaceIommu};
use std::error::Error;
use std::io::{Read, Write};
use std::sync::Arc;
use virtio_queue::{Queue, QueueT};
use vm_memory::iommu::IommuMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap};

const PAGE: u64 = 4096;
const QUEUE_SIZE: u16 = 8;

/// Where the driver keeps things, in guest addresses, one page each.
const RINGS: u64 = 0x4000;
const REQUEST: u64 = 0x9000;
const ANSWER: u64 = 0x2000;
/// Where the device finds them. That they are in another order makes no difference to anybody.
const RINGS_IOVA: u64 = 0xffff_0000_0000;
const REQUEST_IOVA: u64 = 0x10_0000;
const ANSWER_IOVA: u64 = 0x10_1000;

/// Where in their page the three parts of the queue are.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;

/// The device: answers every request that is waiting. It counts those that it could not carry out.
fn device(memory: &impl GuestMemory, queue: &mut Queue) -> Result<u32, Box<dyn Error>> {
    let mut refused = 0;
    while let Some(chain) = queue.pop_descriptor_chain(memory) {
        let head = chain.head_index();
        let answer = || -> Result<u32, Box<dyn Error>> {
            let mut text = String::new();
            chain.clone().reader(memory)?.read_to_string(&mut text)?;
            let mut writer = chain.writer(memory)?;
            writer.write_all(text.to_uppercase().as_bytes())?;
            Ok(u32::try_from(writer.bytes_written())?)
        };
        let written = answer().unwrap_or_else(|error| {
            println!("device: cannot do that: {error}");
            refused += 1;
            0
        });
        queue.add_used(memory, head, written)?;
    }
    Ok(refused)
}

/// The driver in the guest: it knows guest addresses and, for what it tells the device, I/O addresses.
struct Driver {
    guest: GuestMemoryMmap,
    sent: u16,
}

impl Driver {
    fn send(&mut self, request: &str) -> Result<(), Box<dyn Error>> {
        self.guest.write_slice(request.as_bytes(), GuestAddress(REQUEST))?;
        self.guest.write_slice(&[0; 64], GuestAddress(ANSWER))?;
        self.describe(0, REQUEST_IOVA, u32::try_from(request.len())?, NEXT, 1)?;
        self.describe(1, ANSWER_IOVA, 64, DEVICE_WRITES, 0)?;
        let ring = RINGS + AVAILABLE;
        self.guest.write_obj(0u16, GuestAddress(ring + 4 + 2 * u64::from(self.sent % QUEUE_SIZE)))?;
        self.sent += 1;
        self.guest.write_obj(self.sent, GuestAddress(ring + 2))?;
        Ok(())
    }

    fn describe(
        &self,
        index: u64,
        iova: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) -> Result<(), Box<dyn Error>> {
        let at = RINGS + DESCRIPTORS + 16 * index;
        self.guest.write_obj(iova, GuestAddress(at))?;
        self.guest.write_obj(length, GuestAddress(at + 8))?;
        self.guest.write_obj(flags, GuestAddress(at + 12))?;
        self.guest.write_obj(next, GuestAddress(at + 14))?;
        Ok(())
    }

    /// The answer, as long as the device says it is.
    fn receive(&self) -> Result<String, Box<dyn Error>> {
        let used = RINGS + USED;
        let number: u16 = self.guest.read_obj(GuestAddress(used + 2))?;
        let element = used + 4 + 8 * u64::from(number.wrapping_sub(1) % QUEUE_SIZE);
        let length: u32 = self.guest.read_obj(GuestAddress(element + 4))?;
        let mut text = vec![0; length as usize];
        self.guest.read_slice(&mut text, GuestAddress(ANSWER))?;
        Ok(String::from_utf8(text)?)
    }
}

fn map(space: &Arc<Space>, iova: u64, ram: &Arc<Memory>, guest: u64, permissions: Permissions) {
    // The memory is one region from guest address 0 on, so offsets are guest addresses.
    space.map(Iova::new(iova), ram, guest, PAGE, permissions).expect("the place is free");
}

fn main() -> Result<(), Box<dyn Error>> {
    // The virtual machine: memory, and an I/O address space for the device.
    let guest: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let bus = Bus::new();
    let ram = GuestRam::new(&bus);
    let region = guest.find_region(GuestAddress(0)).ok_or("the guest has memory")?;
    let memory = ram.plug(region, &Account::new("guest", None))?;
    let space = Space::new(&bus);
    let seen = IommuMemory::new(guest.clone(), SpaceIommu::new(&space, &ram), true, ());

    // The driver maps the queue and its buffers, and tells the device where the queue is.
    map(&space, RINGS_IOVA, &memory, RINGS, Permissions::READ_WRITE);
    map(&space, REQUEST_IOVA, &memory, REQUEST, Permissions::READ);
    map(&space, ANSWER_IOVA, &memory, ANSWER, Permissions::WRITE);
    let mut queue = Queue::new(QUEUE_SIZE)?;
    queue.try_set_desc_table_address(GuestAddress(RINGS_IOVA + DESCRIPTORS))?;
    queue.try_set_avail_ring_address(GuestAddress(RINGS_IOVA + AVAILABLE))?;
    queue.try_set_used_ring_address(GuestAddress(RINGS_IOVA + USED))?;
    queue.set_ready(true);
    assert!(queue.is_valid(&seen));

    let mut driver = Driver { guest, sent: 0 };
    driver.send("hello, device")?;
    assert_eq!(device(&seen, &mut queue)?, 0);
    println!("driver: {:?}", driver.receive()?);
    assert_eq!(driver.receive()?, "HELLO, DEVICE");

    // The driver takes the answer's page back. The device has the address still, and gets nowhere with it.
    space.unmap(IovaRange::with_length(ANSWER_IOVA, PAGE).ok_or("a range")?)?;
    driver.send("and now?")?;
    assert_eq!(device(&seen, &mut queue)?, 1);
    assert_eq!(driver.receive()?, "");
    let mut page = [0; 64];
    driver.guest.read_slice(&mut page, GuestAddress(ANSWER))?;
    assert_eq!(page, [0; 64], "nothing was written");

    // The request's page may be read, not written, whatever a descriptor says.
    assert!(seen.write_obj(0u8, GuestAddress(REQUEST_IOVA)).is_err());
    Ok(())
}
