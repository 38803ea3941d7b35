//! Charged once: the same memory through several containers and files, at the limit.
//!
//! Who asks: whoever gives one guest's memory to devices of several kinds: VFIO, vDPA, and an emulated IOMMU with a space for
//! each device. With 100 GiB of guest memory and three containers, `RLIMIT_MEMLOCK` had to be 300 GiB.
//!
//! - VFIO type1: every container pins and charges for itself.
//! - iommufd: every open `/dev/iommu` pins and charges for itself; within one, what `IOMMU_IOAS_COPY` has copied is charged once,
//!   what was mapped twice is charged twice.
//! - Here a page of one account is charged once, whoever has registered it how often and through what file. It is given back with
//!   the last one, whichever that is.

use crate::machine::{K4, Machine, RW};
use crate::program::{BUFFER, BoundDevice, PAGE, Program};
use ioasid::{Account, Backing, Iova, Memory, RegisterError, Space};
use ioasid_server::{Errno, Server, ServerOptions};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::ops::Range;

/// Two files of one program, each with two containers, as a program sees them: an address space and a device that is attached.
struct Containers {
    program: Program,
    containers: Vec<(i32, u32, BoundDevice)>,
}

impl Containers {
    fn new() -> Containers {
        let devices = ["edu", "edu:table=vtd", "edu:table=vtd", "edu:table=amdv1"];
        let devices = devices.map(|device| device.parse().unwrap()).to_vec();
        // With test devices there is a command that says how often a page is held.
        let options = ServerOptions { devices, test_devices: true, ..Default::default() };
        let program = Program::of(&Server::new(options).unwrap());
        let files = [program.iommu(), program.iommu()];
        let containers = (0..4u32).map(|number| {
            let iommu = files[number as usize / 2];
            let (ioas, device) = (program.ioas(iommu), program.bind_device(iommu, number));
            program.attach(&device, ioas).unwrap();
            (iommu, ioas, device)
        });
        Containers { containers: containers.collect(), program }
    }

    fn map(&self, container: usize, pages: &Range<u64>, iova: u64) -> Result<(), Errno> {
        let (iommu, ioas, _) = &self.containers[container];
        let length = (pages.end - pages.start) * PAGE;
        self.program.map_fixed(*iommu, *ioas, BUFFER + pages.start * PAGE, length, iova)
    }

    fn unmap(&self, container: usize, pages: &Range<u64>, iova: u64) {
        let (iommu, ioas, _) = &self.containers[container];
        let length = (pages.end - pages.start) * PAGE;
        assert_eq!(self.program.unmap(*iommu, *ioas, iova, length), Ok(length));
    }
}

/// Exactly at the limit: all of the memory in all containers, and not a page more.
#[test]
fn the_limit_is_what_there_is_and_not_what_is_mapped() {
    let containers = Containers::new();
    let program = &containers.program;
    program.set_memory_lock_limit(Some(8 * PAGE));
    for container in 0..4 {
        containers.map(container, &(0..8), 0x10_0000).unwrap();
        // And partly again.
        containers.map(container, &(4..8), 0x20_0000).unwrap();
    }
    assert_eq!(program.charged(), 8);
    for container in 0..4 {
        assert_eq!(containers.map(container, &(7..9), 0x30_0000), Err(Errno::NOMEM));
    }
    assert_eq!(program.charged(), 8, "what was refused is charged nowhere");
    // The devices of all four reach the same bytes.
    program.put(BUFFER + 5 * PAGE, b"one page").unwrap();
    for (number, (_, _, device)) in (0..).zip(&containers.containers) {
        let to = number * 16;
        program.device_copies(device, 0x10_0000 + 5 * PAGE, 0x10_0000 + 6 * PAGE + to, 8);
        assert_eq!(program.get(BUFFER + 6 * PAGE + to, 8).unwrap(), b"one page");
    }
    // A whole file goes, with a space that has it all: the other file's are charged as before.
    let (iommu, _, device) = &containers.containers[0];
    program.close(device.fd).unwrap();
    program.close(containers.containers[1].2.fd).unwrap();
    program.close(*iommu).unwrap();
    assert_eq!(program.charged(), 8);
    containers.unmap(2, &(0..8), 0x10_0000);
    containers.unmap(3, &(0..8), 0x10_0000);
    assert_eq!(program.charged(), 4);
    containers.unmap(3, &(4..8), 0x20_0000);
    containers.unmap(2, &(4..8), 0x20_0000);
    assert_eq!(program.charged(), 0);
}

/// Any overlapping mappings at any limit, and unmaps in any order: what is charged is the pages that somebody has mapped.
#[test]
fn whoever_unmaps_last_gives_the_page_back() {
    let mappings = vec((0..4usize, 0..16u64, 1..9u64, any::<u32>()), 1..24);
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() };
    proptest!(config, |(limit in 1..17u64, mappings in mappings)| {
        let containers = Containers::new();
        containers.program.set_memory_lock_limit(Some(limit * PAGE));
        let union = |mapped: &[(u32, usize, Range<u64>, u64)]| {
            mapped.iter().flat_map(|(_, _, pages, _)| pages.clone()).collect::<BTreeSet<u64>>().len() as u64
        };
        let mut mapped: Vec<(u32, usize, Range<u64>, u64)> = Vec::new();
        for (number, (container, first, count, order)) in (1..).zip(mappings) {
            let pages = first..(first + count).min(16);
            let iova = number * 0x10_0000;
            mapped.push((order, container, pages.clone(), iova));
            let fits = union(&mapped) <= limit;
            let result = containers.map(container, &pages, iova);
            prop_assert_eq!(result, if fits { Ok(()) } else { Err(Errno::NOMEM) });
            if !fits {
                mapped.pop();
            }
            prop_assert_eq!(containers.program.charged(), union(&mapped));
        }
        mapped.sort_unstable_by_key(|(order, ..)| *order);
        while let Some((_, container, pages, iova)) = mapped.pop() {
            containers.unmap(container, &pages, iova);
            prop_assert_eq!(containers.program.charged(), union(&mapped));
        }
        prop_assert!(containers.program.held(0));
    });
}

/// The same for who uses the library: containers may have accounts of their own below their user's.
#[test]
fn a_user_pays_once_for_what_each_container_pays_for() {
    let machine = Machine::new();
    let user = Account::new("user", Some(100));
    let (vfio, vdpa) = (user.child("vfio", None), user.child("vdpa", None));
    let guest = Backing::anonymous(&machine.bus, 200 * K4).unwrap();
    let register =
        |first: u64, count: u64, account| Memory::register(&guest, first * K4, count * K4, account);
    let one = register(0, 60, &vfio).unwrap();
    let two = register(20, 80, &vdpa).unwrap();
    let charged = || [&user, &vfio, &vdpa].map(Account::charged_pages);
    assert_eq!(charged(), [100, 60, 80]);
    // The user is at the limit: a page that nobody has is too much, one that somebody has is not.
    let refused = register(100, 1, &vfio);
    assert!(matches!(refused, Err(RegisterError::OverLimit(_))), "{refused:?}");
    let three = register(0, 100, &vfio).unwrap();
    assert_eq!(charged(), [100, 100, 80]);
    // Spaces cost nothing.
    let spaces = [0, 1, 2].map(|_| Space::new(&machine.bus));
    for space in &spaces {
        space.map(Iova::new(0), &three, 0, 100 * K4, RW).unwrap();
    }
    assert_eq!(charged(), [100, 100, 80]);
    drop(one);
    assert_eq!(charged(), [100, 100, 80]);
    drop(three);
    assert_eq!(charged(), [80, 0, 80]);
    drop(two);
    assert_eq!((charged(), user.failures()), ([0, 0, 0], 1));
}
