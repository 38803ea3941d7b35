//! Programs that mean harm, each beside one that works all the while and checks every result.
//!
//! The hostile program is a child in a process group of its own, which is killed by its id when it is through. The other
//! one goes on until then, and once more after it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ioasid_server::Limits;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::calls::*;
use crate::device::Machine;

const PAGE: u64 = 4096;
const IOAS_MAP: u32 = 0x3b85;
const IOAS_UNMAP: u32 = 0x3b86;

/// Two 32-bit fields in one word of the native byte order.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn map(iommu: impl AsFd, space: u32, address: u64, iova: u64) -> Result<(), Errno> {
    let command = [pair(40, 7), pair(space, 0), address, PAGE, iova];
    ioctl(iommu.as_fd().as_raw_fd(), IOAS_MAP, (&raw const command).addr() as u64).map(drop)
}

/// How many bytes there were.
fn unmap_iova(iommu: impl AsFd, space: u32, iova: u64, length: u64) -> Result<u64, Errno> {
    let mut command = [pair(24, space), iova, length];
    ioctl(iommu.as_fd().as_raw_fd(), IOAS_UNMAP, (&raw mut command).addr() as u64)?;
    Ok(command[2])
}

/// One round of a program that behaves, from open to close.
fn work(memory: u64) {
    let iommu = open_iommu();
    let space = allocate(&iommu).unwrap();
    assert_eq!(space, 1, "nobody else is in this file");
    for number in 0..4 {
        map(&iommu, space, memory, number * PAGE).unwrap();
        assert_eq!(map(&iommu, space, memory, number * PAGE), Err(Errno::EXIST));
    }
    assert_eq!(unmap_iova(&iommu, space, 0, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(unmap_iova(&iommu, space, 0, PAGE), Err(Errno::NOENT));
}

/// Works while `hostile` runs in a program of its own.
fn beside(hostile: impl FnOnce()) {
    let memory = pages(PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
    let family = Family::fork(hostile);
    let mut status = None;
    while status.is_none() {
        work(memory);
        let options = rustix::process::WaitOptions::NOHANG;
        status = rustix::process::waitpid(Some(family.0), options).unwrap().map(|(_, status)| status);
    }
    // Whoever it has left behind goes too.
    drop(family);
    assert_eq!(status.and_then(|status| status.exit_status()), Some(0));
    work(memory);
    expect_files_in_server(0);
}

pub(super) fn arguments_that_change() {
    beside(|| {
        let iommu = open_iommu();
        let space = allocate(&iommu).unwrap();
        let memory = pages(PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
        // Size and flags of a map, which another thread keeps changing.
        let command: [AtomicU32; 10] = Default::default();
        let set = |word: usize, value: u64| {
            command[2 * word].store(value as u32, Ordering::Relaxed);
            command[2 * word + 1].store((value >> 32) as u32, Ordering::Relaxed);
        };
        for (word, value) in [pair(40, 7), pair(space, 0), memory, PAGE, 0x10_0000].into_iter().enumerate() {
            set(word, value);
        }
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 0_u32;
                while !over.load(Ordering::Relaxed) {
                    number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let size = [40, 4, 0, 4096, u32::MAX, 24, 40, 40][number as usize >> 8 & 7];
                    command[0].store(size, Ordering::Relaxed);
                    command[1].store(number >> 28, Ordering::Relaxed);
                    set(3, [PAGE, 0, u64::MAX, 1][number as usize >> 16 & 3]);
                    set(4, u64::from(number) << 12);
                }
            });
            let address = (&raw const command).addr() as u64;
            for _ in 0..2000 {
                // Each is one of the arguments that were there, or refused.
                let _ = ioctl(iommu.as_raw_fd(), IOAS_MAP, address);
            }
            over.store(true, Ordering::Relaxed);
        });
        let _ = unmap_iova(&iommu, space, 0, u64::MAX);
        map(&iommu, space, memory, 0x10_0000).unwrap();
    });
}

pub(super) fn memory_that_goes_under_dma() {
    beside(|| {
        let machine = Machine::new();
        for _ in 0..50 {
            let memory = pages(PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
            machine.map(memory, PAGE, 0x10_0000).unwrap();
            machine.begin_to_fetch(0x10_0000);
            unmap(memory, PAGE as usize);
            assert_eq!(map(&machine.iommu, machine.space, memory, 0x20_0000), Err(Errno::FAULT));
            machine.fetch(0x10_0000, PAGE);
            machine.unmap(0x10_0000, PAGE).unwrap();
        }
    });
}

pub(super) fn descriptors_of_other_kinds() {
    beside(|| {
        let machine = Machine::new();
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        let directory = rustix::fs::open("/", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let path = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let memfd = rustix::fs::memfd_create("hostile", MemfdFlags::CLOEXEC).unwrap();
        let numbers: Vec<i32> = [&reading, &writing, &directory, &path, &eventfd, &epoll, &memfd]
            .into_iter()
            .map(AsRawFd::as_raw_fd)
            .chain([machine.iommu.as_raw_fd(), machine.device.as_raw_fd(), -1, i32::MIN, i32::MAX, 999])
            .collect();
        for number in numbers {
            assert!(machine.map_file(number, 0, PAGE, 0x10_0000).is_err(), "{number}");
            // What is bound is bound, and what is no iommufd cannot be bound to.
            let mut bind = [16, 0, number as u32, 0_u32];
            let bound = ioctl(machine.device.as_raw_fd(), 0x3b76, bind.as_mut_ptr().addr() as u64);
            assert_eq!(bound, Err(Errno::INVAL));
        }
    });
}

/// The most memory that the server has had, in bytes.
fn peak_of_server() -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", supervisor())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kibibytes: usize = line.split_whitespace().next().unwrap().parse().unwrap();
    kibibytes << 10
}

/// How many areas are made where nothing else is said.
const AREAS: u64 = 20_000;

pub(super) fn everything_is_used_up() {
    // A million of them take a while, so they are for whoever asks: see `.ci/run`.
    let asked = std::env::var("IOASID_TEST_AREAS").ok();
    let areas = asked.map_or(AREAS, |areas| areas.parse().unwrap());
    let limits = Limits::default();
    let before = peak_of_server();
    beside(|| {
        let mut files: Vec<OwnedFd> = Vec::new();
        let refused = loop {
            match open("/dev/iommu", OFlags::RDWR | OFlags::CLOEXEC) {
                Ok(file) => files.push(file),
                Err(errno) => break errno,
            }
        };
        assert_eq!(refused, Errno::MFILE);
        let iommu = &files[0];
        let refused = loop {
            if let Err(errno) = allocate(iommu) {
                break errno;
            }
        };
        assert_eq!(refused, Errno::NOMEM);
        let began = Instant::now();
        let memory = pages(PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
        for number in 0..areas {
            map(iommu, 1, memory, 2 * number * PAGE).unwrap();
        }
        println!("{:?} for each", began.elapsed() / areas as u32);
    });
    let promised = limits.files.per_client * Limits::FILE_BYTES
        + limits.objects.per_client * Limits::OBJECT_BYTES
        + areas as usize * Limits::AREA_BYTES;
    let used = peak_of_server() - before;
    println!("{areas} areas: {} of {} MiB promised", used >> 20, promised >> 20);
    assert!(used < promised, "{used} bytes of {promised}");
}

/// Each process of the storm takes what it gets, and there are more than it takes to use everything up: of files, which run out
/// first.
pub(super) fn forks_that_take_everything() {
    const FORKS: usize = 12;
    let limits = Limits::default();
    assert!(FORKS * limits.files.per_client > limits.files.total);
    beside(|| {
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        let children: Vec<Pid> = (0..FORKS)
            .map(|number| {
                fork(|| {
                    // Every second one is an orphan, whose parents cannot be told.
                    if number % 2 == 1 && fork_plainly() {
                        return;
                    }
                    let mut files = Vec::new();
                    let refused = loop {
                        match open("/dev/iommu", OFlags::RDWR | OFlags::CLOEXEC) {
                            Ok(file) => files.push(file),
                            Err(errno) => break errno,
                        }
                    };
                    assert!(matches!(refused, Errno::MFILE | Errno::NFILE), "{refused}");
                    rustix::io::write(&writing, &[0]).unwrap();
                    thread::sleep(Duration::from_secs(3600));
                })
            })
            .collect();
        for _ in 0..FORKS {
            assert_eq!(rustix::io::read(&reading, &mut [0]), Ok(1));
        }
        // Long enough for the other one to see it.
        thread::sleep(Duration::from_millis(200));
        for child in children {
            let _ = rustix::process::kill_process(child, Signal::KILL);
            wait(child);
        }
    });
}

/// True in the parent.
fn fork_plainly() -> bool {
    // SAFETY: the process has one thread.
    let pid = unsafe { libc::fork() };
    assert_ne!(pid, -1);
    pid != 0
}

pub(super) fn forks_without_end() {
    const FORKS: usize = 60;
    beside(|| {
        let iommu = open_iommu();
        let children: Vec<Pid> = (0..FORKS)
            .map(|_| {
                fork(|| {
                    loop {
                        let own = open_iommu();
                        let _ = (allocate(&own), allocate(&iommu));
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(500));
        for child in children {
            rustix::process::kill_process(child, Signal::KILL).unwrap();
            wait(child);
        }
    });
}
