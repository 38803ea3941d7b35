//! Address spaces with a page table: memory is looked at, charged, held and reachable for the device, and given back.

mod program;

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test as test;
use program::{
    BUFFER, BUFFER_SIZE, BoundDevice, FIXED, PAGE, Program, READ, WRITE, memfd, server, server_with,
};

struct Machine {
    program: Program,
    iommu: i32,
    ioas: u32,
    device: BoundDevice,
}

fn machine(device: &str) -> Machine {
    let program = Program::of(&server_with(device));
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let device = program.bind(iommu);
    Machine { program, iommu, ioas, device }
}

/// Each of these tests holds whatever kind of table the device walks.
macro_rules! for_every_kind_of_table {
    ($($name:ident)*) => {
        mod native_table {
            $(#[test] fn $name() { super::$name(&super::machine("edu")); })*
        }
        mod vtd_table {
            $(#[test] fn $name() { super::$name(&super::machine("edu:table=vtd")); })*
        }
    };
}

for_every_kind_of_table! {
    the_device_moves_the_programs_bytes
    the_interrupt_window_is_reserved_while_a_device_is_attached
    what_was_mapped_before_attaching_is_reachable_after
    unmapping_one_area_leaves_its_neighbours
    permissions_are_kept
    detaching_blocks_the_device_and_gives_the_memory_back
    replacing_moves_the_device_between_spaces
    a_table_makes_pages_the_unit
    memory_that_is_not_there_is_found_out_with_a_table
    a_forked_programs_memory_goes_with_it
    a_program_that_ends_while_attached_leaves_faults_only
    files_are_one_object_whoever_maps_them
    a_file_that_was_cut_gives_faults_and_does_not_grow_again
    files_of_huge_pages_are_read_and_written
    a_file_opened_for_reading_only_can_be_written_by_later_mappers
    charges_obey_the_limit_of_the_user
    a_context_can_charge_processes_instead
    copied_memory_is_charged_once_and_outlives_its_source
    two_tables_of_one_space_share_its_memory
    large_memory_gets_large_leaves
    the_status_tells_what_is_there
    a_bound_device_keeps_the_context_after_its_file_was_closed
    reservations_and_devices_live_together
}

impl Machine {
    fn attach(&self) -> Result<u32, Errno> {
        self.program.attach(&self.device, self.ioas)
    }

    fn map_fixed(&self, address: u64, length: u64, iova: u64) -> Result<(), Errno> {
        self.program.map_fixed(self.iommu, self.ioas, address, length, iova)
    }

    fn unmap(&self, iova: u64, length: u64) -> Result<u64, Errno> {
        self.program.unmap(self.iommu, self.ioas, iova, length)
    }

    fn copies(&self, from: u64, to: u64, length: u64) {
        self.program.device_copies(&self.device, from, to, length);
    }
}

fn the_device_moves_the_programs_bytes(m: &Machine) {
    m.attach().unwrap();
    m.map_fixed(BUFFER, 8 * PAGE, 0x10_0000).unwrap();
    let bytes: Vec<u8> = (0..4096_u32).map(|number| (number * 7) as u8).collect();
    m.program.put(BUFFER + 100, &bytes).unwrap();
    m.copies(0x10_0000 + 100, 0x10_0000 + 5 * PAGE - 9, 4096);
    assert_eq!(m.program.get(BUFFER + 5 * PAGE - 9, 4096).unwrap(), bytes);
}

fn what_was_mapped_before_attaching_is_reachable_after(m: &Machine) {
    m.map_fixed(BUFFER, PAGE, 0).unwrap();
    m.map_fixed(BUFFER + PAGE, PAGE, 0x20_0000).unwrap();
    assert_eq!((m.program.charged(), m.program.held(0)), (0, true));
    m.attach().unwrap();
    assert_eq!(m.program.charged(), 2);
    m.program.put(BUFFER, b"hello").unwrap();
    m.copies(0, 0x20_0000, 5);
    assert_eq!(m.program.get(BUFFER + PAGE, 5).unwrap(), b"hello");
}

fn unmapping_one_area_leaves_its_neighbours(m: &Machine) {
    m.attach().unwrap();
    for area in 0..3 {
        m.map_fixed(BUFFER + area * PAGE, PAGE, area * PAGE).unwrap();
    }
    m.program.put(BUFFER, b"neighbour").unwrap();
    assert_eq!(m.unmap(PAGE, PAGE), Ok(PAGE));
    m.copies(0, 2 * PAGE, 9);
    assert_eq!(m.program.get(BUFFER + 2 * PAGE, 9).unwrap(), b"neighbour");
    m.copies(0, PAGE, 9);
    assert_eq!(m.program.get(BUFFER + PAGE, 9).unwrap(), [0; 9], "the write faulted");
    assert_eq!(m.program.charged(), 2);
}

fn permissions_are_kept(m: &Machine) {
    m.attach().unwrap();
    let map = |flags, address, iova| {
        m.program.map_flags(m.iommu, m.ioas, FIXED | flags, address, PAGE, iova).unwrap()
    };
    map(READ, BUFFER, 0);
    map(WRITE, BUFFER + PAGE, PAGE);
    m.program.put(BUFFER, b"read").unwrap();
    m.copies(0, PAGE, 4);
    assert_eq!(m.program.get(BUFFER + PAGE, 4).unwrap(), b"read");
    m.program.put(BUFFER, b"stay").unwrap();
    m.copies(PAGE, 0, 4);
    assert_eq!(m.program.get(BUFFER, 4).unwrap(), b"stay", "no write to what is mapped for reading");
}

fn detaching_blocks_the_device_and_gives_the_memory_back(m: &Machine) {
    m.map_fixed(BUFFER, BUFFER_SIZE, 0).unwrap();
    m.attach().unwrap();
    assert_eq!((m.program.charged(), m.program.held(1)), (16, true));
    m.program.put(BUFFER, b"x").unwrap();
    m.copies(0, PAGE, 1);
    assert_eq!(m.program.get(BUFFER + PAGE, 1).unwrap(), b"x");
    m.program.detach(&m.device).unwrap();
    assert_eq!((m.program.charged(), m.program.held(0)), (0, true));
    m.copies(0, 2 * PAGE, 1);
    assert_eq!(m.program.get(BUFFER + 2 * PAGE, 1).unwrap(), [0]);
    m.attach().unwrap();
    m.copies(0, 2 * PAGE, 1);
    assert_eq!(m.program.get(BUFFER + 2 * PAGE, 1).unwrap(), b"x", "the areas were remembered");
}

fn replacing_moves_the_device_between_spaces(m: &Machine) {
    let other = m.program.ioas(m.iommu);
    m.map_fixed(BUFFER, PAGE, 0).unwrap();
    m.program.map_fixed(m.iommu, other, BUFFER + PAGE, PAGE, 0).unwrap();
    m.program.put(BUFFER, b"one").unwrap();
    m.program.put(BUFFER + PAGE, b"two").unwrap();
    m.attach().unwrap();
    m.copies(0, 16, 3);
    m.program.attach(&m.device, other).unwrap();
    m.copies(0, 16, 3);
    assert_eq!(m.program.get(BUFFER + 16, 3).unwrap(), b"one");
    assert_eq!(m.program.get(BUFFER + PAGE + 16, 3).unwrap(), b"two");
    assert_eq!(m.program.charged(), 1, "only the space with a table holds memory");
}

fn a_table_makes_pages_the_unit(m: &Machine) {
    m.attach().unwrap();
    assert_eq!(m.program.iova_ranges(m.iommu, m.ioas, 4).2, PAGE);
    assert_eq!(m.map_fixed(BUFFER, PAGE, 0x800), Err(Errno::INVAL));
    assert_eq!(m.map_fixed(BUFFER, 0x800, 0), Err(Errno::INVAL));
    assert_eq!(m.map_fixed(BUFFER + 0x800, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(m.program.map(m.iommu, m.ioas, BUFFER + 0x800, PAGE), Err(Errno::INVAL));
    m.program.detach(&m.device).unwrap();
    assert_eq!(m.map_fixed(BUFFER + 0x800, 0x801, 0x1801), Ok(()));
    assert_eq!(m.attach(), Err(Errno::ADDRINUSE));
    assert_eq!(m.program.iova_ranges(m.iommu, m.ioas, 4).2, 1, "nothing has changed");
    assert_eq!(m.unmap(0x1801, 0x801), Ok(0x801));
    assert!(m.attach().is_ok());
    let huge = |value| {
        m.program.option(m.iommu, uapi::OPTION_HUGE_PAGES, uapi::OPTION_OP_SET, m.ioas, value).map(drop)
    };
    assert_eq!(huge(0), Ok(()), "no area yet");
    assert_eq!(huge(1), Ok(()));
    m.map_fixed(BUFFER, PAGE, 0).unwrap();
    assert_eq!(huge(0), Err(Errno::INVAL));
}

fn the_interrupt_window_is_reserved_while_a_device_is_attached(m: &Machine) {
    const WINDOW: u64 = 0xfee0_0000;
    m.map_fixed(BUFFER, PAGE, WINDOW).unwrap();
    assert_eq!(m.attach(), Err(Errno::ADDRINUSE));
    assert_eq!(m.program.charged(), 0);
    m.unmap(WINDOW, PAGE).unwrap();
    m.program.allow(m.iommu, m.ioas, &[(WINDOW, WINDOW + 1)]).unwrap();
    assert_eq!(m.attach(), Err(Errno::ADDRINUSE));
    m.program.allow(m.iommu, m.ioas, &[]).unwrap();
    m.attach().unwrap();
    assert_eq!(m.map_fixed(BUFFER, PAGE, WINDOW), Err(Errno::INVAL));
    let ranges = m.program.iova_ranges(m.iommu, m.ioas, 8).3;
    assert!(ranges.contains(&(0, WINDOW - 1)));
    m.program.detach(&m.device).unwrap();
    assert_eq!(m.map_fixed(BUFFER, PAGE, WINDOW), Ok(()));
}

fn memory_that_is_not_there_is_found_out_with_a_table(m: &Machine) {
    assert_eq!(m.map_fixed(BUFFER + BUFFER_SIZE, PAGE, 0), Ok(()), "lazy");
    m.map_fixed(BUFFER, 2 * PAGE, 0x10_0000).unwrap();
    assert_eq!(m.attach(), Err(Errno::FAULT));
    assert_eq!((m.program.charged(), m.program.held(0)), (0, true), "all or nothing");
    assert_eq!(m.program.server.status().contexts[0].address_spaces[0].leaves, []);
    m.unmap(0, PAGE).unwrap();
    m.attach().unwrap();
    assert_eq!(m.map_fixed(BUFFER + BUFFER_SIZE - PAGE, 2 * PAGE, 0), Err(Errno::FAULT), "its second page");
    assert_eq!(m.unmap(0, 2 * PAGE), Err(Errno::NOENT), "nothing is left of it");
    m.program.map_memory(0x5000_0000, PAGE);
    m.program.protect(0x5000_0000, PAGE, false);
    assert_eq!(m.map_fixed(0x5000_0000, PAGE, 0), Err(Errno::FAULT), "it cannot be written");
    let read = m.program.map_flags(m.iommu, m.ioas, FIXED | READ, 0x5000_0000, PAGE, 0);
    assert_eq!(read, Ok(0));
    assert_eq!(m.program.charged(), 3);
}

fn a_forked_programs_memory_goes_with_it(m: &Machine) {
    let child = m.program.forked();
    child.map_fixed(m.iommu, m.ioas, BUFFER, BUFFER_SIZE, 0).unwrap();
    child.put(BUFFER, b"child").unwrap();
    m.attach().unwrap();
    m.map_fixed(BUFFER, PAGE, 0x10_0000).unwrap();
    m.copies(0, 0x10_0000, 5);
    assert_eq!(m.program.get(BUFFER, 5).unwrap(), b"child", "memory of another process");
    m.program.detach(&m.device).unwrap();
    drop(child);
    assert_eq!(m.attach(), Err(Errno::FAULT), "no such process any more");
    assert_eq!(m.unmap(0, u64::MAX), Ok(BUFFER_SIZE + PAGE));
    assert!(m.attach().is_ok());
}

fn a_program_that_ends_while_attached_leaves_faults_only(m: &Machine) {
    m.attach().unwrap();
    let child = m.program.forked();
    child.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, 0).unwrap();
    m.map_fixed(BUFFER, PAGE, PAGE).unwrap();
    m.program.put(BUFFER, b"parent").unwrap();
    drop(child);
    m.copies(0, PAGE + 64, 6);
    m.copies(PAGE, PAGE + 16, 6);
    assert_eq!(m.program.get(BUFFER + 16, 6).unwrap(), b"parent");
    assert_eq!(m.unmap(0, PAGE), Ok(PAGE));
}

fn files_are_one_object_whoever_maps_them(m: &Machine) {
    m.attach().unwrap();
    let file = memfd(4 * PAGE);
    rustix::io::pwrite(&file, b"file", PAGE).unwrap();
    let again = m.program.insert_foreign(file.try_clone().unwrap());
    let fd = m.program.insert_foreign(file.try_clone().unwrap());
    let map = |fd, start, length| m.program.map_file(m.iommu, m.ioas, fd, start, length);
    let first = map(fd, 0, 4 * PAGE).unwrap();
    let second = map(again, 0, 4 * PAGE).unwrap();
    assert_ne!(first, second);
    assert_eq!(m.program.charged(), 4, "the same pages, charged once");
    m.copies(first + PAGE, second + 2 * PAGE, 4);
    let mut bytes = [0; 4];
    rustix::io::pread(&file, &mut bytes, 2 * PAGE).unwrap();
    assert_eq!(&bytes, b"file");

    assert_eq!(map(fd, 4 * PAGE, PAGE), Err(Errno::INVAL), "past the end");
    assert_eq!(map(fd, 3 * PAGE, 2 * PAGE), Err(Errno::INVAL));
    assert_eq!(map(m.iommu, 0, PAGE), Err(Errno::INVAL), "no memory");
    let null = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(map(m.program.insert_foreign(null.into()), 0, PAGE), Err(Errno::INVAL));
    let (pipe, _) = rustix::pipe::pipe().unwrap();
    assert_eq!(map(m.program.insert_foreign(pipe), 0, PAGE), Err(Errno::INVAL));
}

fn a_file_that_was_cut_gives_faults_and_does_not_grow_again(m: &Machine) {
    m.attach().unwrap();
    let file = memfd(2 * PAGE);
    let fd = m.program.insert_foreign(file.try_clone().unwrap());
    let iova = m.program.map_file(m.iommu, m.ioas, fd, 0, 2 * PAGE).unwrap();
    rustix::io::pwrite(&file, b"data", 0).unwrap();
    rustix::fs::ftruncate(&file, PAGE).unwrap();
    m.copies(iova, iova + PAGE, 4);
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_size as u64, PAGE);
    m.copies(iova, iova + PAGE - 4, 4);
    let mut bytes = [0; 4];
    rustix::io::pread(&file, &mut bytes, PAGE - 4).unwrap();
    assert_eq!(&bytes, b"data");
    m.copies(iova, iova + PAGE - 2, 4);
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_size as u64, PAGE);
}

fn files_of_huge_pages_are_read_and_written(m: &Machine) {
    use rustix::fs::MemfdFlags;
    const HUGE: u64 = 2 << 20;
    // The last page and the first of the next, which is a hole until a device writes there.
    const EDGE: u64 = HUGE - 4;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(file) = rustix::fs::memfd_create("huge", flags) else {
        println!("not run: the kernel has no huge pages of 2 MiB");
        return;
    };
    rustix::fs::ftruncate(&file, 2 * HUGE).unwrap();
    if let Err(error) = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, HUGE) {
        println!("not run: no huge pages are set aside on this machine ({error})");
        return;
    }
    m.attach().unwrap();
    let content = |offset| {
        let mut bytes = [0; 8];
        rustix::io::pread(&file, &mut bytes, offset).unwrap();
        bytes
    };
    let fd = m.program.insert_foreign(file.try_clone().unwrap());
    let iova = m.program.map_file(m.iommu, m.ioas, fd, 0, 2 * HUGE).unwrap();
    m.map_fixed(BUFFER, PAGE, 0x800_0000).unwrap();
    m.program.put(BUFFER, b"hugepage").unwrap();
    m.copies(0x800_0000, iova + 8, 8);
    assert_eq!(&content(8), b"hugepage");
    m.copies(iova + 8, 0x800_0000 + 64, 8);
    assert_eq!(m.program.get(BUFFER + 64, 8).unwrap(), b"hugepage", "and reads it");
    // Mapping it again is the same memory.
    let again = m.program.map_file(m.iommu, m.ioas, fd, HUGE, HUGE).unwrap();
    assert_eq!(m.program.charged(), 1 + 2 * 512);
    if rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), HUGE, HUGE).is_ok() {
        m.copies(iova + 8, iova + EDGE, 8);
        assert_eq!(&content(EDGE), b"hugepage", "over the boundary of two pages");
        m.copies(again, 0x800_0000 + 128, 4);
        assert_eq!(m.program.get(BUFFER + 128, 4).unwrap(), b"page");
    } else {
        println!("not run in part: there is one huge page only");
    }
    // Made shorter, it gives faults, here as for other files, and does not grow again.
    rustix::fs::ftruncate(&file, HUGE).unwrap();
    m.copies(iova + 8, iova + HUGE, 8);
    m.copies(iova + 8, iova + EDGE, 8);
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_size as u64, HUGE);
    m.copies(iova + 8, iova + 24, 8);
    assert_eq!(&content(24), b"hugepage");
}

fn a_file_opened_for_reading_only_can_be_written_by_later_mappers(m: &Machine) {
    m.attach().unwrap();
    let file = memfd(PAGE);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = std::fs::File::open(path).unwrap();
    let fd = m.program.insert_foreign(read_only.into());
    m.program.map_file(m.iommu, m.ioas, fd, 0, PAGE).unwrap();
    let fd = m.program.insert_foreign(file.try_clone().unwrap());
    let iova = m.program.map_file(m.iommu, m.ioas, fd, 0, PAGE).unwrap();
    m.map_fixed(BUFFER, PAGE, 0x100_0000).unwrap();
    m.program.put(BUFFER, b"late").unwrap();
    m.copies(0x100_0000, iova, 4);
    let mut bytes = [0; 4];
    rustix::io::pread(&file, &mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"late");
}

fn charges_obey_the_limit_of_the_user(m: &Machine) {
    m.attach().unwrap();
    m.program.set_memory_lock_limit(Some(4 * PAGE));
    assert_eq!(m.map_fixed(BUFFER, 5 * PAGE, 0), Err(Errno::NOMEM));
    assert_eq!(m.program.charged(), 0);
    assert_eq!(m.map_fixed(BUFFER, 4 * PAGE, 0), Ok(()));
    assert_eq!(m.map_fixed(BUFFER, PAGE, 0x10_0000), Ok(()), "these pages are paid for");
    assert_eq!(m.map_fixed(BUFFER + 4 * PAGE, PAGE, 0x20_0000), Err(Errno::NOMEM));
    assert_eq!(m.unmap(0, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(m.program.charged(), 1, "the page that is mapped twice");

    // Another process of the same user shares the account, another user does not.
    let child = m.program.forked();
    assert_eq!(child.map_fixed(m.iommu, m.ioas, BUFFER, 4 * PAGE, 0x30_0000), Err(Errno::NOMEM));
    assert_eq!(child.map_fixed(m.iommu, m.ioas, BUFFER, 3 * PAGE, 0x30_0000), Ok(()));
    child.set_memory_lock_limit(None);
    assert_eq!(child.map_fixed(m.iommu, m.ioas, BUFFER, 16 * PAGE, 0x40_0000), Ok(()), "privileged");
    let accounts = m.program.server.status().accounts;
    let of = |name: &str| accounts.iter().find(|account| account.name == name).unwrap();
    assert_eq!((of("user 1000").charged_pages, of("user 1000").limit_pages), (4, Some(4)));
    assert_eq!((of("user 1000").peak_pages, of("user 1000").refused), (4, 3));
    assert_eq!(
        (of("user 1000 without limit").charged_pages, of("user 1000 without limit").limit_pages),
        (16, None)
    );
}

fn a_context_can_charge_processes_instead(m: &Machine) {
    let program = Program::of(&m.program.server);
    program.set_may_change_resource_mode(true);
    program.set_memory_lock_limit(Some(2 * PAGE));
    let iommu = program.iommu();
    program.option(iommu, uapi::OPTION_RLIMIT_MODE, uapi::OPTION_OP_SET, 0, 1).unwrap();
    program.close(m.device.fd).unwrap_err();
    m.program.close(m.device.fd).unwrap();
    let device = program.bind(iommu);
    let ioas = program.ioas(iommu);
    program.attach(&device, ioas).unwrap();
    program.map_fixed(iommu, ioas, BUFFER, 2 * PAGE, 0).unwrap();
    let child = program.forked();
    child.map_fixed(iommu, ioas, BUFFER, 2 * PAGE, 0x10_0000).unwrap();
    assert_eq!(child.map_fixed(iommu, ioas, BUFFER + 2 * PAGE, PAGE, 0x20_0000), Err(Errno::NOMEM));
    assert_eq!(program.charged(), 4, "each process has its own limit");
}

fn copied_memory_is_charged_once_and_outlives_its_source(m: &Machine) {
    m.attach().unwrap();
    m.map_fixed(BUFFER, 8 * PAGE, 0).unwrap();
    let copy = uapi::IoasCopy {
        flags: FIXED | READ | WRITE,
        src_ioas_id: m.ioas,
        dst_ioas_id: m.ioas,
        src_iova: 2 * PAGE,
        dst_iova: 0x10_0000,
        length: PAGE,
        ..Default::default()
    };
    m.program.run(m.iommu, copy).unwrap();
    assert_eq!(m.program.charged(), 8);
    assert_eq!(m.unmap(0, 8 * PAGE), Ok(8 * PAGE));
    assert_eq!(m.program.charged(), 1, "no more than what is still mapped");
    m.program.put(BUFFER + 2 * PAGE, b"copied").unwrap();
    m.copies(0x10_0000, 0x10_0000 + 64, 6);
    assert_eq!(m.program.get(BUFFER + 2 * PAGE + 64, 6).unwrap(), b"copied");
    let misaligned = uapi::IoasCopy { src_iova: 0x10_0000 + 8, length: PAGE - 8, ..copy };
    assert_eq!(m.program.run(m.iommu, misaligned).map(drop), Err(Errno::INVAL));
}

fn two_tables_of_one_space_share_its_memory(m: &Machine) {
    m.map_fixed(BUFFER, BUFFER_SIZE, 0).unwrap();
    let own = m.program.hwpt(m.iommu, m.device.id, m.ioas).unwrap();
    assert_eq!((m.program.charged(), m.program.held(1)), (16, true), "a table alone is enough");
    m.attach().unwrap();
    assert_eq!((m.program.charged(), m.program.held(1)), (16, true));
    m.program.destroy(m.iommu, own).unwrap();
    assert_eq!(m.program.charged(), 16);
    m.program.detach(&m.device).unwrap();
    assert_eq!(m.program.charged(), 0);
}

fn large_memory_gets_large_leaves(m: &Machine) {
    m.attach().unwrap();
    m.program.map_memory(0x40_0000_0000, 2 << 30);
    let iova = m.program.map(m.iommu, m.ioas, 0x40_0000_0000, 1 << 30).unwrap();
    assert_eq!(iova % (2 << 20), 0);
    m.map_fixed(0x40_0000_0000, 1 << 30, 0x100_0000_0000).unwrap();
    let leaves = &m.program.server.status().contexts[0].address_spaces[0].leaves;
    assert!(leaves.iter().any(|leaf| leaf.size_bytes == 1 << 30), "{leaves:?}");
    assert!(leaves.iter().all(|leaf| leaf.size_bytes >= 2 << 20), "{leaves:?}");
}

fn the_status_tells_what_is_there(m: &Machine) {
    let table = m.attach().unwrap();
    m.map_fixed(BUFFER, 2 * PAGE, 0x1_0000).unwrap();
    let client = &m.program.client;
    let opened = m.program.server.open(client, std::path::Path::new("/dev/ioasid")).unwrap().unwrap();
    let ioasid_server::Opened::Text(text) = opened else { panic!() };
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let space = &json["contexts"][0]["address_spaces"][0];
    assert_eq!(space["mapped_bytes"], 2 * PAGE);
    assert_eq!(space["areas"][0]["first"], "0x10000");
    assert_eq!(space["areas"][0]["last"], "0x11fff");
    assert_eq!(space["areas"][0]["permissions"], "rw");
    assert_eq!(space["areas"][0]["source_offset"], format!("{BUFFER:#x}"));
    assert_eq!(space["tables"][0]["id"], table);
    assert_eq!(json["contexts"][0]["devices"][0]["path"], "/dev/vfio/devices/vfio0");
    assert_eq!(json["contexts"][0]["devices"][0]["attached_to"], table);
    assert_eq!(json["accounts"][0]["charged_pages"], 2);
}

/// Everything that a machine held, dropped in every order of its three files and its program.
#[test]
fn everything_is_given_back_in_any_order_of_closing() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for order in orders {
        for own_table in [false, true] {
            let server = server();
            let program = Program::of(&server);
            let iommu = program.iommu();
            let ioas = program.ioas(iommu);
            let device = program.bind(iommu);
            let child = program.forked();
            child.close(iommu).unwrap();
            child.close(device.fd).unwrap();
            child.insert_foreign(memfd(PAGE));
            program.map_fixed(iommu, ioas, BUFFER, BUFFER_SIZE, 0).unwrap();
            let file = program.insert_foreign(memfd(4 * PAGE));
            program.map_file(iommu, ioas, file, 0, 4 * PAGE).unwrap();
            let table = if own_table { program.hwpt(iommu, device.id, ioas).unwrap() } else { ioas };
            program.attach(&device, table).unwrap();
            assert_eq!(program.charged(), 20);

            let Program { server, client } = program;
            let mut client = Some(client);
            for step in order {
                match (step, &client) {
                    (0, Some(client)) => client.close(iommu).unwrap(),
                    (1, Some(client)) => client.close(device.fd).unwrap(),
                    (2, Some(_)) => client = None,
                    _ => {}
                }
            }
            drop(client);
            let status = server.status();
            assert!(status.contexts.is_empty(), "{order:?}");
            assert!(status.accounts.iter().all(|account| account.charged_pages == 0), "{order:?}");
            assert!(status.accounts.iter().any(|account| account.peak_pages == 20), "{order:?}");
            // The device is free for the next one.
            let next = Program::of(&server);
            let iommu = next.iommu();
            next.bind(iommu);
            drop(child);
        }
    }
}

fn a_bound_device_keeps_the_context_after_its_file_was_closed(m: &Machine) {
    m.map_fixed(BUFFER, PAGE, 0).unwrap();
    m.program.close(m.iommu).unwrap();
    assert!(m.attach().is_ok(), "numbers still mean the context's objects");
    m.program.put(BUFFER, b"alive").unwrap();
    m.copies(0, 100, 5);
    assert_eq!(m.program.get(BUFFER + 100, 5).unwrap(), b"alive");
    m.program.close(m.device.fd).unwrap();
    assert!(m.program.server.status().contexts.is_empty());
    assert_eq!((m.program.charged(), m.program.held(0)), (0, true));
}

fn reservations_and_devices_live_together(m: &Machine) {
    m.attach().unwrap();
    m.program.test(m.iommu, m.ioas, &test::AddReserved { start: 0x1000, length: 0x1000 }).unwrap();
    assert_eq!(m.map_fixed(BUFFER, 2 * PAGE, 0), Err(Errno::INVAL));
    m.program.detach(&m.device).unwrap();
    assert_eq!(m.map_fixed(BUFFER, 2 * PAGE, 0), Err(Errno::INVAL), "it stays without the device");
    m.attach().unwrap();
    m.map_fixed(BUFFER, PAGE, 0x8000).unwrap();
    let over = test::AddReserved { start: 0x8800, length: 1 };
    assert_eq!(m.program.test(m.iommu, m.ioas, &over).map(drop), Err(Errno::ADDRINUSE));
}

#[test]
fn the_tables_aperture_limits_the_space() {
    const END: u64 = 1 << 48;
    let m = machine("edu:table=vtd");
    m.map_fixed(BUFFER, PAGE, END).unwrap();
    assert_eq!(m.attach(), Err(Errno::ADDRINUSE));
    m.unmap(END, PAGE).unwrap();
    m.attach().unwrap();
    let ranges = m.program.iova_ranges(m.iommu, m.ioas, 4);
    assert_eq!(ranges.3[1], (0xfef0_0000, END - 1));
    assert_eq!(ranges.1, 2);
    assert_eq!(m.map_fixed(BUFFER, PAGE, END), Err(Errno::INVAL));
    m.map_fixed(BUFFER, PAGE, END - PAGE).unwrap();
    m.program.detach(&m.device).unwrap();
    m.map_fixed(BUFFER, PAGE, END).unwrap();
}

#[test]
fn devices_with_different_tables_share_a_space() {
    let devices = ["edu", "edu:table=vtd", "edu:table=vtd"].map(|device| device.parse().unwrap()).to_vec();
    let program = Program::of(
        &ioasid_server::Server::new(ioasid_server::ServerOptions { devices, ..Default::default() }).unwrap(),
    );
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let devices = [0, 1, 2].map(|number| program.bind_device(iommu, number));
    program.map_fixed(iommu, ioas, BUFFER, PAGE, 0).unwrap();
    let tables = devices.each_ref().map(|device| program.attach(device, ioas).unwrap());
    assert_ne!(tables[0], tables[1]);
    assert_eq!(tables[1], tables[2], "devices of one kind share a table");
    assert_eq!(program.attach(&devices[0], tables[1]), Err(Errno::INVAL), "not a table that it can walk");
    assert_eq!(program.charged(), 1);

    program.map_fixed(iommu, ioas, BUFFER + PAGE, PAGE, PAGE).unwrap();
    program.put(BUFFER, b"shared").unwrap();
    for (number, device) in devices.iter().enumerate() {
        let to = PAGE + 64 * number as u64;
        program.device_copies(device, 0, to, 6);
        assert_eq!(program.get(BUFFER + to, 6).unwrap(), b"shared");
    }
    assert_eq!(program.destroy(iommu, tables[1]), Err(Errno::BUSY));
    program.close(devices[1].fd).unwrap();
    assert_eq!(program.destroy(iommu, tables[1]), Err(Errno::BUSY), "the other device still uses it");
    program.close(devices[2].fd).unwrap();
    assert_eq!(program.destroy(iommu, tables[1]), Err(Errno::NOENT));
    assert_eq!(program.charged(), 2, "the space still has a table");
    program.unmap(iommu, ioas, 0, PAGE).unwrap();
    let faults = || program.server.status().contexts[0].devices[0].dma_faults;
    let before = faults();
    program.device_copies(&devices[0], 0, PAGE, 6);
    assert_eq!(faults(), before + 1, "the read, not the write");
    program.detach(&devices[0]).unwrap();
    assert_eq!(program.charged(), 0);
}
