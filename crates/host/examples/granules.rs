//! Maps a GiB for a device at several cut granules, and prints how long the calls took:
//! `ioasid run -- target/release/examples/granules /dev/vfio/devices/vfio0`
//!
//! The first time memory is mapped in blocks of a granule it is cut into such blocks, with a call for each; after that a map
//! is one call, and an unmap always.

use std::error::Error;
use std::time::Instant;

use ioasid::pagetable::Native;
use ioasid::{
    Account, Backing, Bus, Device, Iova, IovaRange, Memory, PageSize, Permissions, Rid, Space, Table,
};
use ioasid_host::{Host, HostOptions};

const LENGTH: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("which device? such as /dev/vfio/devices/vfio0")?;
    let host = Host::open(HostOptions::default())?;
    let rid = Rid(0x0100);
    let _registers = host.add_device(rid, &path)?;
    let device = Device::new(host, rid)?;
    let (bus, account) = (Bus::new(), Account::new("example", None));
    let memory = Memory::register(&Backing::anonymous(&bus, LENGTH)?, 0, LENGTH, &account)?;
    let range = IovaRange::with_length(LENGTH, LENGTH).ok_or("no range")?;
    println!("granule   first map   next map   unmap   (ms)");
    for (log2, name) in [(12, " 4 KiB"), (16, "64 KiB"), (21, " 2 MiB")] {
        let granule = PageSize::from_log2(log2).ok_or("no such size")?;
        let space = Space::with_format(&bus, Native::new().with_largest_leaf(granule));
        device.attach(&Table::for_device(&space, &device)?)?;
        let mut maps = Vec::new();
        let mut unmaps = Vec::new();
        for _ in 0..6 {
            let start = Instant::now();
            space.map(Iova::new(range.first()), &memory, 0, LENGTH, Permissions::READ_WRITE)?;
            maps.push(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            space.unmap(range)?;
            unmaps.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let first = maps.remove(0);
        maps.sort_by(f64::total_cmp);
        unmaps.sort_by(f64::total_cmp);
        println!("{name}   {first:9.1}   {:8.1}   {:5.1}", maps[2], unmaps[3]);
    }
    Ok(())
}
