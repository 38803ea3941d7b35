//! Devices and the memory of the programs that drive them.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

use super::this_program;
use crate::calls::*;
use crate::device::{BUFFER_LENGTH, Machine};

pub(super) fn device_regions() {
    let machine = Machine::new();
    let Machine { device, config, registers, .. } = &machine;
    let mut ids = [0; 4];
    device.read_exact_at(&mut ids, *config).unwrap();
    assert_eq!(ids, [0x34, 0x12, 0xe8, 0x11]);
    device.write_all_at(&0x1234_5678u32.to_le_bytes(), registers + 4).unwrap();
    let mut inverted = [0; 4];
    device.read_exact_at(&mut inverted, registers + 4).unwrap();
    assert_eq!(u32::from_le_bytes(inverted), !0x1234_5678);

    // The same in pieces.
    let (mut vendor, mut rest) = ([0; 2], [0; 2]);
    let mut pieces = [IoSliceMut::new(&mut vendor), IoSliceMut::new(&mut rest)];
    assert_eq!(rustix::io::preadv(device, &mut pieces, *config).unwrap(), 4);
    assert_eq!((vendor, rest), ([0x34, 0x12], [0xe8, 0x11]));
    let value = 0x9abc_def0u32.to_le_bytes();
    let pieces = [IoSlice::new(&value[..1]), IoSlice::new(&[]), IoSlice::new(&value[1..])];
    assert_eq!(rustix::io::pwritev(device, &pieces, registers + 4).unwrap(), 4);
    device.read_exact_at(&mut inverted, registers + 4).unwrap();
    assert_eq!(u32::from_le_bytes(inverted), !0x9abc_def0);

    let read = |address: u64, length: u64, offset: u64| {
        system_call(libc::SYS_pread64, [device.as_raw_fd() as u64, address, length, offset])
    };
    assert_eq!(read(8, 4, *config), Err(Errno::FAULT));
    assert_eq!(read(8, 0, *config), Ok(0));
    let memory = pages(4096, libc::PROT_READ);
    assert_eq!(read(memory, 4, *config), Err(Errno::FAULT), "it cannot be written");

    // The same offsets mean nothing to other files.
    let null = File::open("/dev/null").unwrap();
    assert_eq!(null.read_at(&mut ids, *config).unwrap(), 0);
    let closed = system_call(libc::SYS_pread64, [900, memory, 4, *config]);
    assert_eq!(closed, Err(Errno::BADF));

    let read_only = open("/dev/vfio/devices/vfio0", OFlags::RDONLY).unwrap();
    assert_eq!(rustix::io::pwrite(&read_only, b"x", *config), Err(Errno::BADF));
}

/// Fills memory from [`pages`] with bytes that tell their place.
fn fill(address: u64, length: u64, seed: u32) {
    let words: Vec<u32> =
        (0..length as u32 / 4).map(|number| number.wrapping_mul(0x9e37_79b9) ^ seed).collect();
    poke(address, &words);
}

fn same(left: u64, right: u64, length: u64) -> bool {
    (0..length).all(|offset| peek(left + offset) == peek(right + offset))
}

const PAGE: u64 = 4096;
/// Where the tests map things for devices.
const IOVA: u64 = 0x10_0000;

/// One device, two address spaces: its requests go to the one or the other by their PASID, while that is moved under way.
pub(super) fn each_pasid_has_its_own_memory() {
    const PASID: u32 = 5;
    let machine = Machine::new();
    let memory = pages(4 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    let second = allocate(&machine.iommu).unwrap();
    for (space, page, seed) in [(machine.space, 0, 1), (second, 2, 2)] {
        machine.map_in(space, memory + page * PAGE, 2 * PAGE, IOVA).unwrap();
        fill(memory + page * PAGE, PAGE, seed);
    }
    let [plain, other] = [machine.space, second].map(|space| machine.table_for_pasids(space).unwrap());
    let copy = || {
        machine.fetch(IOVA, BUFFER_LENGTH);
        machine.store(IOVA + PAGE, BUFFER_LENGTH);
    };
    let copied = |page| same(memory + page * PAGE, memory + (page + 1) * PAGE, PAGE);

    assert_eq!(
        machine.attach_pasid(PASID, other),
        Err(Errno::INVAL),
        "beside a table that is not for PASIDs"
    );
    machine.attach(plain).unwrap();
    machine.attach_pasid(PASID, other).unwrap();
    machine.use_pasid(Some(PASID));
    copy();
    assert!(copied(2) && !copied(0));
    machine.use_pasid(None);
    copy();
    assert!(copied(0));

    // Moved while the device copies: it never finds neither.
    machine.use_pasid(Some(PASID));
    fill(memory, PAGE, 3);
    fill(memory + 2 * PAGE, PAGE, 4);
    thread::scope(|scope| {
        let copying = scope.spawn(|| (0..200).for_each(|_| copy()));
        while !copying.is_finished() {
            machine.attach_pasid(PASID, plain).unwrap();
            machine.attach_pasid(PASID, other).unwrap();
        }
    });
    let state = || std::fs::read_to_string("/dev/ioasid").unwrap();
    assert!(state().contains("\"dma_faults\": 0"), "{}", state());
    copy();
    assert!(copied(2));

    machine.detach_pasid(PASID).unwrap();
    fill(memory + 3 * PAGE, PAGE, 5);
    copy();
    assert!(!copied(2), "detached: nothing is copied any more");
    assert!(state().contains("(PASID 5)"), "{}", state());
    assert_eq!(machine.detach_pasid(PASID), Ok(()));
}

pub(super) fn a_device_copies_private_memory() {
    let machine = Machine::new();
    let memory = pages(4 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    machine.map(memory, 4 * PAGE, IOVA).unwrap();
    fill(memory, PAGE, 1);
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(IOVA + 2 * PAGE, BUFFER_LENGTH);
    assert!(same(memory, memory + 2 * PAGE, PAGE));
    assert!(!same(memory, memory + PAGE, PAGE));
    // From a place that straddles two pages.
    fill(memory + PAGE, PAGE, 2);
    machine.fetch(IOVA + PAGE / 2, BUFFER_LENGTH);
    machine.store(IOVA + 2 * PAGE + 8, BUFFER_LENGTH);
    assert!(same(memory + PAGE / 2, memory + 2 * PAGE + 8, PAGE));
    // The program's other threads have the same memory.
    thread::scope(|scope| {
        scope.spawn(|| {
            machine.unmap(IOVA, 4 * PAGE).unwrap();
            machine.map(memory + PAGE, PAGE, IOVA).unwrap();
            machine.fetch(IOVA, BUFFER_LENGTH);
            machine.map(memory, PAGE, 2 * IOVA).unwrap();
            machine.store(2 * IOVA, BUFFER_LENGTH);
        });
    });
    assert!(same(memory, memory + PAGE, PAGE));
    machine.unmap(IOVA, PAGE).unwrap();
    fill(memory, PAGE, 3);
    machine.store(IOVA, BUFFER_LENGTH);
    assert!(!same(memory, memory + PAGE, PAGE), "what is unmapped is not written");
}

pub(super) fn a_device_copies_a_memory_file() {
    let machine = Machine::new();
    let file = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4 * PAGE).unwrap();
    machine.map_file(file.as_raw_fd(), PAGE, 2 * PAGE, IOVA).unwrap();
    let bytes: Vec<u8> = (0..PAGE).map(|number| (number % 251) as u8).collect();
    rustix::io::pwrite(&file, &bytes, PAGE).unwrap();
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(IOVA + PAGE, BUFFER_LENGTH);
    let mut copied = vec![0; PAGE as usize];
    rustix::io::pread(&file, &mut copied, 2 * PAGE).unwrap();
    assert_eq!(copied, bytes);
    // It stays reachable when the program has closed it.
    let keep = rustix::io::dup(&file).unwrap();
    drop(file);
    rustix::io::pwrite(&keep, &bytes[1..], PAGE).unwrap();
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(IOVA + PAGE, BUFFER_LENGTH);
    rustix::io::pread(&keep, &mut copied, 2 * PAGE).unwrap();
    assert_eq!(copied[..PAGE as usize - 1], bytes[1..]);

    assert_eq!(machine.map_file(900, 0, PAGE, 2 * IOVA), Err(Errno::BADF));
    let null = File::open("/dev/null").unwrap();
    assert!(machine.map_file(null.as_raw_fd(), 0, PAGE, 2 * IOVA).is_err());
    assert!(machine.map_file(machine.iommu.as_raw_fd(), 0, PAGE, 2 * IOVA).is_err());
}

pub(super) fn a_device_is_free_after_its_close() {
    for round in 0..100 {
        let machine = Machine::new();
        let second = open("/dev/vfio/devices/vfio0", OFlags::RDWR).unwrap();
        assert!(
            Machine::bind(&machine.iommu, &second).is_err(),
            "round {round}: it is bound through another file"
        );
        let Machine { device, iommu, .. } = machine;
        // In either order.
        if round % 2 == 0 {
            drop((device, iommu));
        } else {
            drop((iommu, device));
        }
        let iommu = open_iommu();
        Machine::bind(&iommu, &second).unwrap();
    }
}

pub(super) fn mapped_memory_must_be_there() {
    let machine = Machine::new();
    let memory = pages(8 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    unmap(memory + PAGE, PAGE as usize);
    protect(memory + 3 * PAGE, PAGE as usize, libc::PROT_READ);
    protect(memory + 5 * PAGE, PAGE as usize, libc::PROT_NONE);
    machine.map(memory, PAGE, IOVA).unwrap();
    assert_eq!(machine.map(memory, 2 * PAGE, 2 * IOVA), Err(Errno::FAULT), "a hole at the end");
    assert_eq!(machine.map(memory + PAGE, 2 * PAGE, 2 * IOVA), Err(Errno::FAULT), "a hole at the start");
    assert_eq!(machine.map(memory + 2 * PAGE, 2 * PAGE, 2 * IOVA), Err(Errno::FAULT), "not writable");
    machine.map_read_only(memory + 2 * PAGE, 3 * PAGE, 2 * IOVA).unwrap();
    assert_eq!(
        machine.map_read_only(memory + 4 * PAGE, 2 * PAGE, 3 * IOVA),
        Err(Errno::FAULT),
        "not readable"
    );
    assert_eq!(machine.map(0, PAGE, 3 * IOVA), Err(Errno::FAULT));
    assert_eq!(machine.map(0u64.wrapping_sub(PAGE), PAGE, 3 * IOVA).map_err(|_| ()), Err(()));
    machine.map(memory + 6 * PAGE, 2 * PAGE, 3 * IOVA).unwrap();
}

pub(super) fn a_child_has_memory_of_its_own() {
    let machine = Machine::new();
    let memory = pages(2 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    fill(memory, PAGE, 1);
    let child = fork(|| {
        fill(memory, PAGE, 2);
        // The address space now maps the child's page at one place...
        machine.map(memory, PAGE, IOVA).unwrap();
    });
    expect_success(child);
    // ...which has gone with the child, and the parent's at another.
    machine.map(memory, 2 * PAGE, 2 * IOVA).unwrap();
    machine.fetch(2 * IOVA, BUFFER_LENGTH);
    machine.fetch(IOVA, BUFFER_LENGTH);
    machine.store(2 * IOVA + PAGE, BUFFER_LENGTH);
    assert!(same(memory, memory + PAGE, PAGE));
}

pub(super) fn memory_goes_with_its_program() {
    let machine = Machine::new();
    let memory = pages(PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    fill(memory, PAGE, 1);
    machine.map(memory, PAGE, IOVA).unwrap();
    machine.fetch(IOVA, BUFFER_LENGTH);
    let (iommu, device) = (machine.iommu, machine.device);
    rustix::io::fcntl_setfd(&iommu, rustix::io::FdFlags::empty()).unwrap();
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::empty()).unwrap();
    let numbers =
        [iommu.as_raw_fd(), device.as_raw_fd(), machine.space as i32].map(|number| number.to_string());
    panic!("{}", this_program("after_exec_with_device").args(numbers).arg(memory.to_string()).exec());
}

pub(super) fn after_exec_with_device() {
    let numbers: Vec<u64> = std::env::args().skip(3).map(|number| number.parse().unwrap()).collect();
    // SAFETY: the program before this one left these descriptors to us.
    let [iommu, device] =
        [numbers[0], numbers[1]].map(|number| unsafe { OwnedFd::from_raw_fd(number as i32) });
    let machine = Machine::inherited(iommu, device, numbers[2] as u32);
    // Something of ours where the other program had its page.
    // SAFETY: nothing is there, or the call fails.
    let same_place = unsafe {
        libc::mmap(
            numbers[3] as *mut libc::c_void,
            PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if same_place == libc::MAP_FAILED {
        println!("the place is taken, which is as good a target");
    } else {
        fill(numbers[3], PAGE, 7);
    }
    let memory = pages(2 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    fill(memory, PAGE, 7);
    // The device still holds what it fetched before, and cannot write it into the new program's memory.
    machine.store(IOVA, BUFFER_LENGTH);
    if same_place != libc::MAP_FAILED {
        assert!(same(memory, numbers[3], PAGE));
    }
    // What the new program maps is its own.
    machine.map(memory, 2 * PAGE, 2 * IOVA).unwrap();
    machine.fetch(2 * IOVA, BUFFER_LENGTH);
    machine.store(2 * IOVA + PAGE, BUFFER_LENGTH);
    assert!(same(memory, memory + PAGE, PAGE));
    drop(machine);
    assert_eq!(files_in_server(), 0);
}

pub(super) fn killed_while_a_device_works() {
    for round in 0..20 {
        let child = fork(|| {
            let machine = Machine::new();
            let memory = pages(2 * PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
            loop {
                machine.map(memory, 2 * PAGE, IOVA).unwrap();
                machine.fetch(IOVA, BUFFER_LENGTH);
                machine.store(IOVA + PAGE, BUFFER_LENGTH);
                machine.unmap(IOVA, 2 * PAGE).unwrap();
            }
        });
        thread::sleep(Duration::from_micros(2000 + 700 * round));
        kill_process(child, Signal::KILL).unwrap();
        assert_eq!(wait(child).terminating_signal(), Some(libc::SIGKILL));
        expect_files_in_server(0);
        // The device is free for the next.
        drop(Machine::new());
    }
}
