//! What one client can use up, and that others do not notice; and that the server's memory stays below what is promised.
//!
//! The bytes are those of the whole test process; what the other tests take beside it is little.

mod program;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioasid::pagetable::HeapTables;
use ioasid_server::{DeviceOptions, Errno, InProcess, Limit, Limits, Server, ServerOptions};
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test as test;
use ioasid_uapi::{Command, vfio};
use program::{BUFFER, FIXED, PAGE, Program, READ, WRITE, open};

fn server_with(limits: Limits) -> Arc<Server> {
    let devices = vec![DeviceOptions::default()];
    Server::new(ServerOptions { devices, limits, test_devices: true }).unwrap()
}

fn small() -> Limits {
    Limits {
        files: Limit { per_client: 4, total: 10 },
        objects: Limit { per_client: 8, total: 16 },
        areas: Limit { per_client: 16, total: 32 },
    }
}

#[test]
fn files_are_counted_for_who_opened_them_until_the_last_close() {
    let server = server_with(small());
    let (first, second) = (Program::of(&server), Program::of(&server));
    let opened: Vec<i32> = (0..4).map(|_| first.iommu()).collect();
    assert_eq!(open(&server, &first, "/dev/iommu"), Err(Errno::MFILE));
    assert_eq!(open(&server, &first, "/dev/vfio/devices/vfio0"), Err(Errno::MFILE));
    second.iommu();
    second.iommu();
    second.open("/dev/vfio/devices/vfio0");
    assert_eq!(open(&server, &second, "/dev/iommu"), Err(Errno::NFILE), "3 are left, and it has as many");
    // A fork has the files too, so they stay open.
    let fork = first.forked();
    first.close(opened[0]).unwrap();
    assert_eq!(open(&server, &first, "/dev/iommu"), Err(Errno::MFILE));
    fork.close(opened[0]).unwrap();
    first.iommu();
}

#[test]
fn objects_are_counted_over_all_files_of_a_client() {
    let server = server_with(small());
    let (first, second) = (Program::of(&server), Program::of(&server));
    let files = [first.iommu(), first.iommu()];
    for number in 0..8 {
        first.ioas(files[number % 2]);
    }
    assert_eq!(first.run(files[0], uapi::IoasAlloc::default()).map(drop), Err(Errno::NOMEM));
    let other = second.iommu();
    for _ in 0..4 {
        second.ioas(other);
    }
    assert_eq!(second.run(other, uapi::IoasAlloc::default()).map(drop), Err(Errno::NOMEM));
    first.destroy(files[0], 1).unwrap();
    second.ioas(other);
    // What a context had comes back with its last close.
    first.close(files[1]).unwrap();
    for _ in 0..2 {
        second.ioas(other);
    }
}

#[test]
fn areas_and_allowed_ranges_are_counted_together() {
    let server = server_with(small());
    let (first, second) = (Program::of(&server), Program::of(&server));
    let iommu = first.iommu();
    let spaces = [first.ioas(iommu), first.ioas(iommu)];
    let ranges: Vec<u8> =
        (0..6_u64).flat_map(|n| [n << 30, (n << 30) + 0xffff]).flat_map(u64::to_ne_bytes).collect();
    first.put(BUFFER, &ranges).unwrap();
    let allow = |program: &Program, iommu, ioas_id, num_iovas| {
        let command =
            uapi::IoasAllowIovas { ioas_id, num_iovas, allowed_iovas: BUFFER, ..Default::default() };
        program.run(iommu, command).map(drop)
    };
    allow(&first, iommu, spaces[0], 6).unwrap();
    for number in 0..10 {
        first.map_fixed(iommu, spaces[1], BUFFER, PAGE, number * PAGE).unwrap();
    }
    assert_eq!(first.map_fixed(iommu, spaces[1], BUFFER, PAGE, 10 * PAGE), Err(Errno::NOMEM));
    assert_eq!(allow(&first, iommu, spaces[1], 1), Err(Errno::NOMEM));
    allow(&first, iommu, spaces[0], 0).unwrap();
    for number in 10..16 {
        first.map_fixed(iommu, spaces[1], BUFFER, PAGE, number * PAGE).unwrap();
    }
    // The other client has what is left of the whole.
    let other = second.iommu();
    let space = second.ioas(other);
    for number in 0..8 {
        second.map_fixed(other, space, BUFFER, PAGE, number * PAGE).unwrap();
    }
    assert_eq!(second.map_fixed(other, space, BUFFER, PAGE, 8 * PAGE), Err(Errno::NOMEM));
    first.destroy(iommu, spaces[1]).unwrap();
    second.map_fixed(other, space, BUFFER, PAGE, 8 * PAGE).unwrap();
}

/// Bytes of this process that are in memory, without those of page tables.
fn bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kibibytes: usize = line.split_whitespace().next().unwrap().parse().unwrap();
    (kibibytes << 10).saturating_sub(HeapTables::bytes_in_use() as usize)
}

/// One client at all of its limits, beside one that works all the while and checks what it gets.
#[test]
fn memory_at_the_limits_is_below_the_promise() {
    const SPACES: usize = 10_000;
    const AREAS: usize = 200_000;
    const FILES: usize = 500;
    let of = |per_client, more| Limit { per_client, total: per_client + more };
    let promised = Limits { files: of(FILES, 8), objects: of(SPACES, 8), areas: of(AREAS, 64) }.bytes();
    // Who shall have so much has to leave as much.
    let limits =
        Limits { files: of(FILES, 2 * FILES), objects: of(SPACES, 2 * SPACES), areas: of(AREAS, 2 * AREAS) };
    let server = server_with(limits);
    let before = bytes();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let well_behaved = scope.spawn(|| {
            let program = Program::of(&server);
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) || rounds == 0 {
                let iommu = program.iommu();
                let space = program.ioas(iommu);
                for number in 0..32 {
                    program.map_fixed(iommu, space, BUFFER, PAGE, number * PAGE).unwrap();
                }
                assert_eq!(program.unmap(iommu, space, 0, 32 * PAGE), Ok(32 * PAGE));
                program.close(iommu).unwrap();
                rounds += 1;
            }
        });
        let hostile = Program::of(&server);
        hostile.map_memory(1 << 40, 1 << 40);
        exhaust(&hostile, &server, limits);
        let used = bytes().saturating_sub(before);
        println!("{} KiB of {} KiB promised", used >> 10, promised >> 10);
        assert!(used < promised, "{used} bytes are more than {promised}");
        over.store(true, Ordering::Relaxed);
        well_behaved.join().unwrap();
        drop(hostile);
    });
    assert!(server.status().contexts.is_empty());
}

fn exhaust(hostile: &Program, server: &Arc<Server>, limits: Limits) {
    let iommu = hostile.iommu();
    let device = hostile.bind(iommu);
    while open(server, hostile, "/dev/iommu").is_ok() {}
    // The first space is attached, so that its areas are registered; neither they nor their memory touch each other.
    let first = hostile.ioas(iommu);
    hostile.attach(&device, first).unwrap();
    let map = |space, number: u64, flags| {
        let address = (1 << 40) + 2 * number * PAGE;
        hostile.map_flags(iommu, space, flags, address, PAGE, 2 * number * PAGE)
    };
    let mut mapped = 0;
    while mapped < limits.areas.per_client as u64 / 2 {
        map(first, mapped, FIXED | READ | WRITE).unwrap();
        mapped += 1;
    }
    // The others are not, and where their areas lie is ours to find.
    let mut refused = Errno::NOENT;
    while refused == Errno::NOENT {
        match hostile.run(iommu, uapi::IoasAlloc::default()) {
            Ok(made) => drop(map(made.out_ioas_id, mapped, READ).unwrap()),
            Err(errno) => refused = errno,
        }
    }
    assert_eq!(refused, Errno::NOMEM);
    let last = first + 2;
    let mut refused = Ok(0);
    while refused.is_ok() {
        mapped += 1;
        refused = map(last, mapped, FIXED | READ).map(|_| 0);
    }
    assert_eq!(refused, Err(Errno::NOMEM));
}

#[test]
fn a_client_without_end_of_forks_is_bounded_by_the_whole() {
    let server = server_with(Limits { files: Limit { per_client: 4, total: 100 }, ..Limits::default() });
    let mut forks: Vec<InProcess> = Vec::new();
    let refused = loop {
        let fork = InProcess::new(1000);
        match open(&server, &fork, "/dev/iommu") {
            Ok(_) => forks.push(fork),
            Err(errno) => break errno,
        }
    };
    assert_eq!((forks.len(), refused), (100, Errno::NFILE));
    forks.pop();
    open(&server, &InProcess::new(1000), "/dev/iommu").unwrap();
}

/// The result of a command of type 1 on an open `/dev/iommu`.
fn type1<T: Command>(program: &Program, iommu: i32, command: T) -> Result<(), Errno> {
    program.run(iommu, command).map(drop)
}

#[test]
fn what_is_left_of_a_cut_area_is_an_area() {
    let server = server_with(small());
    let program = Program::of(&server);
    let iommu = program.iommu();
    let ioas_id = program.ioas(iommu);
    program.run(iommu, uapi::VfioIoas { op: uapi::VFIO_IOAS_SET, ioas_id, ..Default::default() }).unwrap();
    program.ioctl(iommu, vfio::SET_IOMMU, vfio::TYPE1_IOMMU.into()).unwrap();
    let device = program.bind(iommu);
    program.attach(&device, ioas_id).unwrap();
    program.map_memory(1 << 40, 64 * PAGE);
    let size = 64 * PAGE;
    let map = vfio::Type1DmaMap { flags: 3, vaddr: 1 << 40, size, ..Default::default() };
    type1(&program, iommu, map).unwrap();
    let cut = |page: u64| {
        let unmap = vfio::Type1DmaUnmap { iova: page * PAGE, size: PAGE, ..Default::default() };
        type1(&program, iommu, unmap)
    };
    for number in 1..16 {
        cut(2 * number).unwrap();
    }
    assert_eq!(cut(40), Err(Errno::NOMEM), "16 are left of it");
    assert_eq!(cut(63), Ok(()), "no more than before");
    assert_eq!(cut(3), Ok(()), "one less, since it goes completely");
    assert_eq!(cut(40), Ok(()));
    assert_eq!(program.unmap(iommu, ioas_id, 0, u64::MAX).map(drop), Ok(()));
    for number in 0..16 {
        program.map_fixed(iommu, ioas_id, BUFFER, PAGE, number * PAGE).unwrap();
    }
    assert_eq!(program.map_fixed(iommu, ioas_id, BUFFER, PAGE, 16 * PAGE), Err(Errno::NOMEM));
}

#[test]
fn very_long_memory_counts_more_while_it_is_registered() {
    let server = server_with(small());
    let program = Program::of(&server);
    let iommu = program.iommu();
    let space = program.ioas(iommu);
    let device = program.bind(iommu);
    program.map_memory(1 << 40, 1 << 42);
    let map = |length: u64| program.map_fixed(iommu, space, 1 << 40, length, 1 << 41);
    map(1 << 42).unwrap();
    assert_eq!(program.attach(&device, space), Err(Errno::NOMEM), "it would count 65");
    program.unmap(iommu, space, 0, u64::MAX).unwrap();
    map(15 << 36).unwrap();
    program.attach(&device, space).unwrap();
    assert_eq!(program.map_fixed(iommu, space, BUFFER, PAGE, 0), Err(Errno::NOMEM), "16 of 16");
    program.detach(&device).unwrap();
    program.map_fixed(iommu, space, BUFFER, PAGE, 0).unwrap();
}

#[test]
fn what_test_devices_add_is_counted() {
    let server = server_with(small());
    let program = Program::of(&server);
    let iommu = program.iommu();
    let space = program.ioas(iommu);
    let access = || {
        let flags = test::CreateAccessFlags::NEEDS_PIN_PAGES.bits();
        let create = test::CreateAccess { flags, ..Default::default() };
        program.test(iommu, space, &create).map(|created| created.out_access_fd)
    };
    let first = access().unwrap();
    let second = access().unwrap();
    let mut get = test::TestCommand { size: 0, op: test::OP_DMABUF_GET, ..Default::default() };
    get.set_payload(&test::DmabufGet { length: PAGE as u32, open_flags: 0 });
    let get = || program.run(iommu, get).map(drop);
    get().unwrap();
    assert_eq!((get(), access()), (Err(Errno::MFILE), Err(Errno::MFILE)), "4 files");
    program.close(second as i32).unwrap();
    get().unwrap();

    program.map_fixed(iommu, space, BUFFER, PAGE, 0).unwrap();
    program.map_fixed(iommu, space, BUFFER, PAGE, PAGE).unwrap();
    let reserve = |number: u64| {
        let range = test::AddReserved { start: (number + 1) << 30, length: PAGE };
        program.test(iommu, space, &range).map(drop)
    };
    (0..10).for_each(|number| reserve(number).unwrap());
    let pin = || {
        let pages = test::AccessPages { iova: 0, length: 2 * PAGE, ..Default::default() };
        program.test(iommu, first, &pages).map(|pages| pages.out_access_pages_id)
    };
    let pinned = pin().unwrap();
    pin().unwrap();
    assert_eq!((pin(), reserve(10)), (Err(Errno::NOMEM), Err(Errno::NOMEM)), "16 areas");
    program.test(iommu, first, &test::DestroyAccessPages { access_pages_id: pinned }).unwrap();
    (10..12).for_each(|number| reserve(number).unwrap());
    assert_eq!(reserve(12), Err(Errno::NOMEM));
    program.close(first as i32).unwrap();
    reserve(12).unwrap();
    // All of it comes back.
    program.destroy(iommu, space).unwrap();
    let space = program.ioas(iommu);
    for number in 0..16 {
        program.map_fixed(iommu, space, BUFFER, PAGE, number * PAGE).unwrap();
    }
}

#[test]
fn the_text_of_the_status_is_bounded_and_hides_only_who_has_much() {
    const SPACES: usize = 9000;
    let server = server_with(Limits::default());
    let (greedy, modest) = (Program::of(&server), Program::of(&server));
    let iommu = greedy.iommu();
    let spaces: Vec<u32> = (0..SPACES).map(|_| greedy.ioas(iommu)).collect();
    for ioas in &spaces[..100] {
        for page in 0..65 {
            greedy.map_fixed(iommu, *ioas, BUFFER, PAGE, page * PAGE).unwrap();
        }
    }
    let device = greedy.bind(iommu);
    let tables: Vec<u32> =
        spaces[SPACES - 2000..].iter().map(|ioas| greedy.hwpt(iommu, device.id, *ioas).unwrap()).collect();
    let quiet = modest.iommu();
    let ioas = modest.ioas(quiet);
    modest.map_fixed(quiet, ioas, BUFFER, PAGE, 0).unwrap();

    let status = server.status();
    let count = |context: &ioasid_server::ContextStatus| {
        let of_space = |space: &ioasid_server::AddressSpaceStatus| 1 + space.areas.len() + space.tables.len();
        1 + context.devices.len() + context.address_spaces.iter().map(of_space).sum::<usize>()
    };
    let listed = status.contexts.iter().map(count).sum::<usize>() + status.accounts.len();
    assert!(listed <= ioasid_server::Status::LISTED_AT_MOST, "{listed}");
    assert!(status.to_json().len() <= 10 << 20);
    // Of all that there is, each thing is listed or counted, and what there is little of is all there.
    let [first, second] = &status.contexts[..] else { panic!("two contexts") };
    let shown: usize = first.address_spaces.iter().map(|space| 1 + space.tables.len()).sum();
    assert_eq!(status.not_listed + shown + first.devices.len(), SPACES + tables.len() + 1);
    assert!(status.not_listed > 0 && shown > 3000, "{shown}");
    assert_eq!((second.address_spaces.len(), second.address_spaces[0].areas.len()), (1, 1));
    assert_eq!(status.accounts.len(), 1);

    greedy.close(device.fd).unwrap();
    greedy.close(iommu).unwrap();
    let status = server.status();
    assert_eq!((status.contexts.len(), status.not_listed), (1, 0));
}
