//! Hands a device of the machine over to a space, and lets it reach some memory:
//! `cargo run -p ioasid-host --example attach -- /dev/vfio/devices/vfio0`
//!
//! The device has to be bound to VFIO's driver first, for example with `driverctl set-override 0000:01:00.0 vfio-pci`, and
//! the file has to be yours. Without hardware, below the software IOMMU:
//! `ioasid run -- target/debug/examples/attach /dev/vfio/devices/vfio0`

use std::error::Error;

use ioasid::{
    Account, Backing, Bus, Device, Iova, IovaRange, Memory, PageSize, Permissions, Rid, Space, Table,
};
use ioasid_host::{Host, HostOptions, HostTable};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("which device? such as /dev/vfio/devices/vfio0")?;
    let host = Host::open(HostOptions::default())?;
    // The requester ID is a name here: what the guest's own device has, for example.
    let rid = Rid(0x0100);
    let _registers = host.add_device(rid, &path)?;
    let device = Device::new(host, rid)?;
    let requirements = device.requirements();
    println!("{path}: {} can be mapped, but for {:x?}", requirements.aperture, requirements.reserved);

    // 64 MiB of memory, charged once. The space shall be unmapped in pieces of 2 MiB, so Linux gets it in such pieces.
    let (bus, account) = (Bus::new(), Account::new("example", None));
    let length = 64 << 20;
    let memory = Memory::register(&Backing::anonymous(&bus, length)?, 0, length, &account)?;
    let format = ioasid::pagetable::Native::new().with_largest_leaf(PageSize::SIZE_2M);
    let space = Space::with_format(&bus, format);
    device.attach(&Table::for_device(&space, &device)?)?;
    let first = 0x1000_0000;
    space.map(Iova::new(first), &memory, 0, length, Permissions::READ_WRITE)?;
    print(&device, "mapped");

    let block = IovaRange::with_length(first + (8 << 20), 2 << 20).ok_or("no range")?;
    space.unmap(block)?;
    print(&device, "2 MiB unmapped");
    Ok(())
}

fn print(device: &Device, what: &str) {
    let table = device.table();
    let derived = table.as_ref().and_then(|table| table.derived());
    if let Some(table) = derived.and_then(|derived| derived.as_any().downcast_ref::<HostTable>()) {
        println!("{what}: {} areas in I/O address space {}", table.area_count(), table.ioas());
    }
}
