//! `/dev/iommu` as a program sees it, while no page table exists: each command with its error codes.

mod program;

use ioasid_server::Errno;
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test as test;
use program::{BUFFER, BUFFER_SIZE, FIXED, IsCommand, PAGE, Program, READ, WRITE, memfd};
use zerocopy::IntoBytes;

/// A program with one address space.
fn with_ioas() -> (Program, i32, u32) {
    let program = Program::new();
    let fd = program.iommu();
    let ioas = program.ioas(fd);
    (program, fd, ioas)
}

#[test]
fn numbers_sizes_and_tails_are_checked_for_every_command() {
    let program = Program::new();
    let fd = program.iommu();
    for info in uapi::COMMANDS {
        let name = info.name;
        let call = |bytes: &mut [u8]| program.call(fd, info.number, bytes);
        let with_size = |size: usize, length: usize| {
            let mut bytes = vec![0; length];
            bytes[..4].copy_from_slice(&(size as u32).to_ne_bytes());
            bytes
        };
        assert_eq!(call(&mut with_size(info.min_size - 1, info.size)), Err(Errno::INVAL), "{name}");
        let mut long = with_size(info.size + 1, info.size + 1);
        long[info.size] = 0xff;
        assert_eq!(call(&mut long), Err(Errno::TOOBIG), "{name}");
        let plain = call(&mut with_size(info.size, info.size));
        assert_ne!(plain, Err(Errno::NOTTY), "{name}");
        assert_eq!(
            call(&mut with_size(info.size + 9, info.size + 9)),
            plain,
            "{name}: zeroes behind it change nothing"
        );
        assert_eq!(program.ioctl(fd, info.number, 0), Err(Errno::FAULT), "{name}");
        assert_eq!(
            call(&mut with_size(info.size, info.size - 1)),
            Err(Errno::FAULT),
            "{name}: cut by the memory"
        );
        assert_eq!(
            program.call(fd, info.number | 0x10000, &mut with_size(info.size, info.size)),
            Err(Errno::NOTTY)
        );
        assert_eq!(program.ioctl(fd, info.number | 0x10000, 0), Err(Errno::FAULT), "the size is read first");
    }
    for number in [0x3b7f, 0x3ba1, 0x3bff, 0x3b00, 0x3b63, 0x3b75] {
        assert_eq!(program.ioctl(fd, number, 0), Err(Errno::NOTTY), "{number:#x}");
    }
    assert_eq!(
        program.call(fd, 0x3b96, &mut [8, 0, 0, 0]),
        Err(Errno::NOTTY),
        "a number inside the table, not in it"
    );
    assert_eq!(program.pread(fd, 0, 1), Err(Errno::INVAL));
    assert_eq!(program.pwrite(fd, 0, b"x"), Err(Errno::INVAL));
}

#[test]
fn an_older_and_a_newer_program_are_served() {
    let (program, fd, _) = with_ioas();
    // HWPT_ALLOC's first version had 24 bytes; what is missing counts as zero.
    let mut old = [24_u32, 0, 1, 1, 0, 0].map(u32::to_ne_bytes).concat();
    assert_eq!(program.call(fd, uapi::HwptAlloc::NUMBER, &mut old), Err(Errno::NOENT));
    // The answer to a longer structure stays within the known bytes.
    let mut new = [[20_u32, 0, 0, 0, 0].map(u32::to_ne_bytes).concat()].concat();
    program.call(fd, uapi::IoasAlloc::NUMBER, &mut new).unwrap();
    assert_eq!(new[8..], [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn commands_of_later_steps_are_known_but_refused() {
    let program = Program::new();
    let fd = program.iommu();
    assert_eq!(program.run(fd, uapi::HwptInvalidate::default()), Err(Errno::OPNOTSUPP));
    assert_eq!(program.run(fd, uapi::ViommuAlloc::default()), Err(Errno::OPNOTSUPP));
}

#[test]
fn objects_are_numbered_from_1_and_numbers_come_back_lowest_first() {
    let program = Program::new();
    let fd = program.iommu();
    assert_eq!((1..=3).map(|_| program.ioas(fd)).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(program.destroy(fd, 2), Ok(()));
    assert_eq!(program.destroy(fd, 2), Err(Errno::NOENT));
    assert_eq!(program.destroy(fd, 0), Err(Errno::NOENT));
    assert_eq!(program.destroy(fd, u32::MAX), Err(Errno::NOENT));
    assert_eq!(program.destroy(fd, 1), Ok(()));
    assert_eq!([program.ioas(fd), program.ioas(fd), program.ioas(fd)], [1, 2, 4]);

    let other = program.iommu();
    assert_eq!(program.ioas(other), 1, "each open has its own numbers");
    assert_eq!(program.destroy(other, 3), Err(Errno::NOENT));

    assert_eq!(program.run(fd, uapi::IoasAlloc { flags: 1, ..Default::default() }), Err(Errno::OPNOTSUPP));
    let mut bytes = uapi::IoasAlloc::default().sized();
    program.call(fd, uapi::IoasAlloc::NUMBER, bytes.as_mut_bytes()).unwrap();
    assert_eq!(bytes.out_ioas_id, 5, "a refused call uses up no number");
}

#[test]
fn an_answer_that_cannot_be_delivered_leaves_no_object() {
    let program = Program::new();
    let fd = program.iommu();
    program.map_memory(0x1000, PAGE);
    program.put(0x1000, uapi::IoasAlloc::default().sized().as_bytes()).unwrap();
    program.protect(0x1000, PAGE, false);
    assert_eq!(program.ioctl(fd, uapi::IoasAlloc::NUMBER, 0x1000), Err(Errno::FAULT));
    program.protect(0x1000, PAGE, true);
    assert_eq!(program.ioctl(fd, uapi::IoasAlloc::NUMBER, 0x1000), Ok(0));
    assert_eq!(program.get(0x1008, 4).unwrap(), 1_u32.to_ne_bytes());
}

#[test]
fn the_number_of_objects_is_limited() {
    let program = Program::new();
    let fd = program.iommu();
    let mut count = 0;
    let error = loop {
        match program.run(fd, uapi::IoasAlloc::default()) {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((count, error), (ioasid_server::Limits::default().objects.per_client, Errno::NOMEM));
    assert_eq!(program.destroy(fd, 77), Ok(()));
    assert_eq!(program.ioas(fd), 77);
}

#[test]
fn wrong_kinds_and_unknown_numbers_are_not_found() {
    let program = Program::new();
    let fd = program.iommu();
    assert_eq!(program.map(fd, 1, BUFFER, PAGE), Err(Errno::NOENT));
    assert_eq!(program.unmap(fd, 1, 0, u64::MAX), Err(Errno::NOENT));
    assert_eq!(program.iova_ranges(fd, 1, 1).0, Err(Errno::NOENT));
    assert_eq!(program.allow(fd, 1, &[]), Err(Errno::NOENT));
    let ioas = program.ioas(fd);
    let hwpt = uapi::HwptAlloc { dev_id: ioas, pt_id: ioas, ..Default::default() };
    assert_eq!(program.run(fd, hwpt), Err(Errno::NOENT), "a space is no device");
    let info = uapi::GetHwInfo { dev_id: ioas, ..Default::default() };
    assert_eq!(program.run(fd, info), Err(Errno::NOENT));
    assert_eq!(program.run(fd, uapi::GetHwInfo { flags: 2, ..info }), Err(Errno::OPNOTSUPP));
    assert_eq!(program.run(fd, uapi::GetHwInfo { reserved: [0, 1, 0], ..info }), Err(Errno::OPNOTSUPP));
    assert_eq!(program.run(fd, uapi::HwptAlloc { reserved: 1, ..hwpt }), Err(Errno::OPNOTSUPP));
    assert_eq!(program.run(fd, uapi::HwptAlloc { data_type: 1, ..hwpt }), Err(Errno::INVAL));
    assert_eq!(program.run(fd, uapi::HwptAlloc { data_len: 8, ..hwpt }), Err(Errno::INVAL));
}

#[test]
fn maps_and_unmaps_whole_areas() {
    let (program, fd, ioas) = with_ioas();
    let map = |iova, pages| program.map_fixed(fd, ioas, BUFFER, pages * PAGE, iova);
    let unmap = |iova, length| program.unmap(fd, ioas, iova, length);
    assert_eq!(unmap(0, PAGE), Err(Errno::NOENT), "nothing is mapped");
    for number in 0..10 {
        assert_eq!(map(number * PAGE, 1), Ok(()));
    }
    for number in 0..10 {
        assert_eq!(unmap(number * PAGE, PAGE), Ok(PAGE));
    }

    assert_eq!(map(16 * PAGE, 2), Ok(()));
    assert_eq!(unmap(16 * PAGE, PAGE), Err(Errno::NOENT), "a part at the front");
    assert_eq!(unmap(17 * PAGE, PAGE), Err(Errno::NOENT), "a part at the end");
    for (iova, pages) in [(16, 2), (16, 1), (17, 1), (15, 2), (15, 3)] {
        assert_eq!(map(iova * PAGE, pages), Err(Errno::EXIST));
    }
    assert_eq!(unmap(0, u64::MAX), Ok(2 * PAGE));
    assert_eq!(unmap(0, u64::MAX), Ok(0), "nothing left, and that is no error");

    for number in 0..4 {
        assert_eq!(map((4 + number * 16) * PAGE, 8), Ok(()));
    }
    assert_eq!(unmap(0, 8 * PAGE), Err(Errno::NOENT));
    assert_eq!(unmap((4 + 48 + 4) * PAGE, 8 * PAGE), Err(Errno::NOENT));
    assert_eq!(unmap(0, 64 * PAGE), Ok(32 * PAGE), "four areas and the holes around them");

    assert_eq!(unmap(0, 0), Err(Errno::INVAL));
    assert_eq!(unmap(PAGE, u64::MAX), Err(Errno::OVERFLOW));
    assert_eq!(unmap(u64::MAX, 1), Err(Errno::OVERFLOW));
    assert_eq!(unmap(u64::MAX - 1, 3), Err(Errno::OVERFLOW));
    assert_eq!(unmap(u64::MAX - 1, 2), Err(Errno::NOENT), "up to the last byte");
}

#[test]
fn unmapping_over_a_part_of_an_area_changes_nothing() {
    let (program, fd, ioas) = with_ioas();
    program.map_fixed(fd, ioas, BUFFER, PAGE, 0x10000).unwrap();
    program.map_fixed(fd, ioas, BUFFER, 2 * PAGE, 0x20000).unwrap();
    assert_eq!(program.unmap(fd, ioas, 0x10000, 0x11000), Err(Errno::NOENT));
    assert_eq!(program.unmap(fd, ioas, 0x10000, PAGE), Ok(PAGE), "still there");
}

#[test]
fn map_checks_its_arguments_in_order() {
    let (program, fd, ioas) = with_ioas();
    let base = uapi::IoasMap {
        flags: READ | FIXED,
        ioas_id: ioas,
        user_va: BUFFER,
        length: PAGE,
        iova: PAGE,
        ..Default::default()
    };
    let run = |command: uapi::IoasMap| program.run(fd, command).map(|command| command.iova);
    assert_eq!(run(uapi::IoasMap { flags: 8 | READ, ..base }), Err(Errno::OPNOTSUPP));
    assert_eq!(run(uapi::IoasMap { reserved: 1, ioas_id: 99, ..base }), Err(Errno::OPNOTSUPP));
    assert_eq!(run(uapi::IoasMap { iova: u64::MAX, flags: FIXED, ..base }), Err(Errno::OVERFLOW));
    assert_eq!(run(uapi::IoasMap { length: u64::MAX, ..base }), Err(Errno::OVERFLOW));
    assert_eq!(
        run(uapi::IoasMap { flags: FIXED, ioas_id: 99, ..base }),
        Err(Errno::INVAL),
        "neither read nor write"
    );
    assert_eq!(run(uapi::IoasMap { ioas_id: 99, length: 0, ..base }), Err(Errno::NOENT));
    assert_eq!(run(uapi::IoasMap { length: 0, ..base }), Err(Errno::INVAL));
    assert_eq!(run(uapi::IoasMap { user_va: u64::MAX - PAGE + 1, ..base }), Err(Errno::OVERFLOW));
    assert_eq!(run(uapi::IoasMap { length: u64::MAX - PAGE + 1, user_va: 0, ..base }), Err(Errno::INVAL));
    assert_eq!(
        run(uapi::IoasMap { length: u64::MAX - PAGE, user_va: 0, iova: PAGE + 2, ..base }),
        Err(Errno::OVERFLOW)
    );
    assert_eq!(run(uapi::IoasMap { length: 1 << 63, user_va: 0, flags: READ, ..base }), Err(Errno::OVERFLOW));
    assert_eq!(run(base), Ok(PAGE));
    assert_eq!(run(base), Err(Errno::EXIST));
    assert_eq!(
        run(uapi::IoasMap { user_va: 1, iova: 3, length: 5, ..base }),
        Ok(3),
        "bad memory, any alignment: lazy"
    );
    assert_eq!(
        run(uapi::IoasMap { user_va: 1 << 40, iova: u64::MAX - PAGE + 1, ..base }),
        Ok(u64::MAX - PAGE + 1)
    );
    assert_eq!(run(uapi::IoasMap { iova: u64::MAX - PAGE + 2, ..base }), Err(Errno::OVERFLOW));
}

#[test]
fn automatic_placement_keeps_alignment_and_avoids_what_is_reserved() {
    let (program, fd, ioas) = with_ioas();
    assert_eq!(BUFFER % (2 << 20), 0, "as the kernel's test has it");
    let map_ten = |address: u64| {
        let areas: Vec<(u64, u64)> = (1..=10)
            .map(|pages| (program.map(fd, ioas, address, pages * PAGE).unwrap(), pages * PAGE))
            .collect();
        for (iova, length) in &areas {
            assert_ne!(*iova, 0);
            assert_eq!(iova % (1 << length.trailing_zeros()), 0, "{iova:#x} for {length:#x}");
        }
        for (iova, length) in &areas {
            assert_eq!(program.unmap(fd, ioas, *iova, *length), Ok(*length));
        }
        areas
    };
    map_ten(1 << 31);
    assert_eq!(map_ten(BUFFER)[0].0, PAGE, "the first page that is not 0");
    let reserved = test::AddReserved { start: 4 * PAGE, length: 100 * PAGE };
    program.test(fd, ioas, &reserved).unwrap();
    for (iova, length) in map_ten(BUFFER) {
        assert!(iova + length <= reserved.start || iova >= reserved.start + reserved.length);
    }
    assert_eq!(program.allow(fd, ioas, &[(PAGE, 600 * PAGE)]), Err(Errno::ADDRINUSE));
    program.allow(fd, ioas, &[(200 * PAGE, 600 * PAGE - 1)]).unwrap();
    for (iova, length) in map_ten(BUFFER) {
        assert!(iova >= 200 * PAGE && iova + length <= 600 * PAGE);
    }
    assert_eq!(program.map(fd, ioas, BUFFER, 401 * PAGE), Err(Errno::NOSPC));
    assert_eq!(program.map_fixed(fd, ioas, BUFFER, PAGE, 700 * PAGE), Ok(()), "a fixed one may leave it");
    program.allow(fd, ioas, &[]).unwrap();
    assert!(program.map(fd, ioas, BUFFER, 401 * PAGE).is_ok());
}

#[test]
fn automatic_placement_keeps_the_offset_in_the_page_and_huge_alignment() {
    let (program, fd, ioas) = with_ioas();
    let first = program.map(fd, ioas, BUFFER + 0x123, 0x1000).unwrap();
    assert_eq!(first % PAGE, 0x123);
    let second = program.map(fd, ioas, BUFFER + 0x123, 0x1000).unwrap();
    assert_eq!(second % PAGE, 0x123);
    let huge = program.map(fd, ioas, BUFFER, 8 << 20).unwrap();
    assert_eq!(huge % (2 << 20), 0);
    for length in 1..PAGE * 2 {
        let iova = program.map(fd, ioas, BUFFER, length).unwrap();
        assert_eq!(program.unmap(fd, ioas, iova, length), Ok(length));
    }
}

#[test]
fn placement_survives_reservations_to_the_end_of_the_space() {
    let (program, fd, ioas) = with_ioas();
    program.test(fd, ioas, &test::AddReserved { start: 6, length: 0xffff_ffff_ffff_8001 }).unwrap();
    assert_eq!(program.map(fd, ioas, BUFFER, 0x5000), Err(Errno::NOSPC));
    let (program, fd, ioas) = with_ioas();
    program.test(fd, ioas, &test::AddReserved { start: 0x10000, length: u64::MAX - 0x10000 + 1 }).unwrap();
    assert_eq!(program.map(fd, ioas, BUFFER, 0x10000), Err(Errno::NOSPC));
    assert_eq!(program.map(fd, ioas, BUFFER, PAGE), Ok(PAGE));
    assert_eq!(program.map_fixed(fd, ioas, BUFFER, PAGE, 0xf000), Ok(()));
    assert_eq!(program.map_fixed(fd, ioas, BUFFER, PAGE, 0x10000), Err(Errno::INVAL));
    assert_eq!(program.map_fixed(fd, ioas, BUFFER, PAGE, u64::MAX - PAGE + 1), Err(Errno::INVAL));
}

#[test]
fn iova_ranges_are_the_holes_of_what_is_reserved() {
    let (program, fd, ioas) = with_ioas();
    assert_eq!(program.iova_ranges(fd, ioas, 4), (Ok(()), 1, 1, vec![(0, u64::MAX), (0, 0), (0, 0), (0, 0)]));
    assert_eq!(program.iova_ranges(fd, ioas, 0), (Err(Errno::MSGSIZE), 1, 1, vec![]));
    program.test(fd, ioas, &test::AddReserved { start: PAGE, length: PAGE }).unwrap();
    let both = vec![(0, PAGE - 1), (2 * PAGE, u64::MAX)];
    assert_eq!(program.iova_ranges(fd, ioas, 2), (Ok(()), 2, 1, both));
    assert_eq!(program.iova_ranges(fd, ioas, 1), (Err(Errno::MSGSIZE), 2, 1, vec![(0, PAGE - 1)]));
    // What is mapped or allowed does not matter.
    program.map_fixed(fd, ioas, BUFFER, PAGE, 0).unwrap();
    program.allow(fd, ioas, &[(PAGE * 2, PAGE * 3)]).unwrap();
    assert_eq!(program.iova_ranges(fd, ioas, 2).1, 2);
    program.test(fd, ioas, &test::AddReserved { start: u64::MAX - 1, length: 2 }).unwrap();
    assert_eq!(program.iova_ranges(fd, ioas, 2).3[1], (2 * PAGE, u64::MAX - 2));

    let bad = uapi::IoasIovaRanges { ioas_id: ioas, num_iovas: 2, allowed_iovas: 16, ..Default::default() };
    assert_eq!(program.run(fd, bad).map(drop), Err(Errno::FAULT));
    assert_eq!(program.run(fd, uapi::IoasIovaRanges { reserved: 1, ..bad }).map(drop), Err(Errno::OPNOTSUPP));
}

#[test]
fn allowed_ranges_are_checked_and_replaced_in_one_step() {
    let (program, fd, ioas) = with_ioas();
    let allow = |ranges: &[(u64, u64)]| program.allow(fd, ioas, ranges);
    assert_eq!(allow(&[(5, 5)]), Err(Errno::INVAL));
    assert_eq!(allow(&[(6, 5)]), Err(Errno::INVAL));
    assert_eq!(allow(&[(0, 100), (100, 200)]), Err(Errno::INVAL), "they share a byte");
    assert_eq!(allow(&[(0x100_0000, u64::MAX), (0, 0xfff)]), Ok(()), "any order");
    assert_eq!(allow(&[(0, 100), (100, 200)]), Err(Errno::INVAL));
    assert_eq!(program.map(fd, ioas, BUFFER, PAGE), Ok(0x100_0000), "a refused list changes nothing");
    let command =
        uapi::IoasAllowIovas { ioas_id: ioas, num_iovas: 1, allowed_iovas: 0x10, ..Default::default() };
    assert_eq!(program.run(fd, command).map(drop), Err(Errno::FAULT));
    assert_eq!(
        program.run(fd, uapi::IoasAllowIovas { reserved: 1, ..command }).map(drop),
        Err(Errno::OPNOTSUPP)
    );
    // The first entry is bad and the second unreadable: the first decides.
    let end = BUFFER + BUFFER_SIZE;
    program.put(end - 16, &[0; 16]).unwrap();
    let command =
        uapi::IoasAllowIovas { ioas_id: ioas, num_iovas: 2, allowed_iovas: end - 16, ..Default::default() };
    assert_eq!(program.run(fd, command).map(drop), Err(Errno::INVAL));
    program.put(end - 8, &[1; 8]).unwrap();
    assert_eq!(program.run(fd, command).map(drop), Err(Errno::FAULT));
    let endless = uapi::IoasAllowIovas {
        ioas_id: ioas,
        num_iovas: u32::MAX,
        allowed_iovas: end - 16,
        ..Default::default()
    };
    assert_eq!(program.run(fd, endless).map(drop), Err(Errno::FAULT));
}

#[test]
fn allowed_and_reserved_ranges_exclude_each_other() {
    let (program, fd, ioas) = with_ioas();
    let reserve = |start, length| program.test(fd, ioas, &test::AddReserved { start, length }).map(drop);
    program.allow(fd, ioas, &[(0, 600 * PAGE)]).unwrap();
    assert_eq!(reserve(PAGE, PAGE), Err(Errno::ADDRINUSE));
    program.allow(fd, ioas, &[]).unwrap();
    assert_eq!(reserve(PAGE, PAGE), Ok(()));
    assert_eq!(program.allow(fd, ioas, &[(0, 600 * PAGE)]), Err(Errno::ADDRINUSE));
    program.map_fixed(fd, ioas, BUFFER, PAGE, 4 * PAGE).unwrap();
    assert_eq!(reserve(4 * PAGE + 5, 1), Err(Errno::ADDRINUSE), "something is mapped there");
    assert_eq!(reserve(0, 0), Err(Errno::INVAL));
    assert_eq!(reserve(2, u64::MAX), Err(Errno::OVERFLOW));
    assert_eq!(program.test(fd, 99, &test::AddReserved { start: 0, length: 1 }).map(drop), Err(Errno::NOENT));
}

fn copy(program: &Program, fd: i32, command: uapi::IoasCopy) -> Result<u64, Errno> {
    program.run(fd, command).map(|command| command.dst_iova)
}

#[test]
fn copy_takes_any_part_of_what_is_mapped() {
    let (program, fd, ioas) = with_ioas();
    let other = program.ioas(fd);
    program.map_fixed(fd, ioas, BUFFER, PAGE, 0).unwrap();
    let base = uapi::IoasCopy {
        flags: FIXED | WRITE,
        dst_ioas_id: ioas,
        src_ioas_id: ioas,
        length: PAGE,
        dst_iova: PAGE,
        ..Default::default()
    };
    assert_eq!(copy(&program, fd, base), Ok(PAGE), "in one space");
    assert_eq!(copy(&program, fd, base), Err(Errno::EXIST));
    assert_eq!(
        copy(&program, fd, uapi::IoasCopy { dst_ioas_id: other, dst_iova: 0, ..base }),
        Ok(0),
        "to another"
    );
    let two =
        uapi::IoasCopy { dst_ioas_id: other, flags: READ, src_iova: 100, length: 2 * PAGE - 200, ..base };
    let iova = copy(&program, fd, two).unwrap();
    assert_eq!(iova % PAGE, 100, "across two areas, automatically placed");
    assert_eq!(program.unmap(fd, other, iova, 2 * PAGE - 200), Ok(2 * PAGE - 200));

    assert_eq!(copy(&program, fd, uapi::IoasCopy { flags: 8, ..base }), Err(Errno::OPNOTSUPP));
    assert_eq!(copy(&program, fd, uapi::IoasCopy { flags: FIXED, ..base }), Err(Errno::INVAL));
    assert_eq!(
        copy(&program, fd, uapi::IoasCopy { length: u64::MAX, flags: 0, ..base }),
        Err(Errno::OVERFLOW)
    );
    assert_eq!(copy(&program, fd, uapi::IoasCopy { src_iova: u64::MAX, ..base }), Err(Errno::OVERFLOW));
    assert_eq!(copy(&program, fd, uapi::IoasCopy { dst_iova: u64::MAX, ..base }), Err(Errno::OVERFLOW));
    assert_eq!(copy(&program, fd, uapi::IoasCopy { src_iova: u64::MAX - 1, ..base }), Err(Errno::OVERFLOW));
    assert_eq!(copy(&program, fd, uapi::IoasCopy { length: 0, ..base }), Err(Errno::INVAL));
    assert_eq!(copy(&program, fd, uapi::IoasCopy { src_ioas_id: 9, length: 0, ..base }), Err(Errno::NOENT));
    assert_eq!(copy(&program, fd, uapi::IoasCopy { dst_ioas_id: 9, ..base }), Err(Errno::NOENT));
    assert_eq!(copy(&program, fd, uapi::IoasCopy { src_iova: 8 * PAGE, ..base }), Err(Errno::NOENT));
}

#[test]
fn copy_at_every_offset_finds_the_gap() {
    const START: u64 = 1 << 24;
    let (program, fd, ioas) = with_ioas();
    let other = program.ioas(fd);
    let last = START + BUFFER_SIZE - 2;
    program.map_fixed(fd, ioas, BUFFER, last - START + 1, START).unwrap();
    for src_iova in (START - PAGE..=last).step_by(511) {
        let command = uapi::IoasCopy {
            flags: FIXED | WRITE,
            src_ioas_id: ioas,
            dst_ioas_id: other,
            dst_iova: START,
            length: 2048,
            src_iova,
            ..Default::default()
        };
        if src_iova < START || src_iova + 2047 > last {
            assert_eq!(copy(&program, fd, command), Err(Errno::NOENT), "{src_iova:#x}");
        } else {
            assert_eq!(copy(&program, fd, command), Ok(START), "{src_iova:#x}");
            assert_eq!(program.unmap(fd, other, START, 2048), Ok(2048));
        }
    }
    assert_eq!(program.destroy(fd, other), Ok(()));
}

#[test]
fn copy_gives_no_write_access_that_the_source_lacks() {
    let (program, fd, ioas) = with_ioas();
    program.map_flags(fd, ioas, FIXED | READ, BUFFER, PAGE, 0).unwrap();
    program.map_flags(fd, ioas, FIXED | WRITE, BUFFER, PAGE, PAGE).unwrap();
    let command = uapi::IoasCopy {
        src_ioas_id: ioas,
        dst_ioas_id: ioas,
        dst_iova: 8 * PAGE,
        length: PAGE,
        ..Default::default()
    };
    assert_eq!(
        copy(&program, fd, uapi::IoasCopy { flags: FIXED | WRITE | READ, ..command }),
        Err(Errno::PERM)
    );
    assert_eq!(copy(&program, fd, uapi::IoasCopy { flags: FIXED | READ, ..command }), Ok(8 * PAGE));
    let both = uapi::IoasCopy { flags: FIXED | WRITE, length: 2 * PAGE, dst_iova: 16 * PAGE, ..command };
    assert_eq!(copy(&program, fd, both), Err(Errno::PERM), "one of two areas");
    assert_eq!(program.unmap(fd, ioas, 16 * PAGE, 2 * PAGE), Err(Errno::NOENT), "nothing of it is mapped");
    let writable =
        uapi::IoasCopy { flags: FIXED | READ | WRITE, src_iova: PAGE, dst_iova: 16 * PAGE, ..command };
    assert_eq!(copy(&program, fd, writable), Ok(16 * PAGE));
}

#[test]
fn files_are_mapped_lazily() {
    let (program, fd, ioas) = with_ioas();
    let file = program.insert_foreign(memfd(4 * PAGE));
    let map = |file, start, length| program.map_file(fd, ioas, file, start, length);
    assert_eq!(map(file, 0, 4 * PAGE).map(|iova| iova % PAGE), Ok(0));
    assert_eq!(map(file, 100, PAGE).map(|iova| iova % PAGE), Ok(100));
    assert_eq!(map(file, 0, 0), Err(Errno::INVAL));
    assert_eq!(map(file, u64::MAX, 2), Err(Errno::OVERFLOW));
    assert_eq!(map(file, 0, u64::MAX), Err(Errno::OVERFLOW));
    assert_eq!(map(99, 0, PAGE), Err(Errno::BADF));
    assert_eq!(map(-1, 0, PAGE), Err(Errno::BADF));
    assert!(map(file, 8 * PAGE, PAGE).is_ok(), "past the end, but nothing looks");
    assert!(map(fd, 0, PAGE).is_ok(), "not memory, but nothing looks");
    let command = uapi::IoasMapFile { ioas_id: ioas, fd: file, length: PAGE, ..Default::default() };
    assert_eq!(program.run(fd, uapi::IoasMapFile { flags: 16, ..command }).map(drop), Err(Errno::OPNOTSUPP));
    assert_eq!(program.run(fd, command).map(drop), Err(Errno::INVAL));
    assert_eq!(
        program.run(fd, uapi::IoasMapFile { flags: READ, ioas_id: 7, ..command }).map(drop),
        Err(Errno::NOENT)
    );
}

#[test]
fn the_huge_page_option_changes_the_alignment() {
    const HUGE: u32 = uapi::OPTION_HUGE_PAGES;
    const START: u64 = 1 << 24;
    let (program, fd, ioas) = with_ioas();
    let set = |value| program.option(fd, HUGE, uapi::OPTION_OP_SET, ioas, value).map(drop);
    let get = || program.option(fd, HUGE, uapi::OPTION_OP_GET, ioas, 3);
    assert_eq!(get(), Ok(1));
    assert_eq!(set(2), Err(Errno::INVAL));
    program.map_fixed(fd, ioas, BUFFER, PAGE, START).unwrap();
    assert_eq!(set(0), Ok(()));
    assert_eq!(get(), Ok(0));
    assert_eq!(program.iova_ranges(fd, ioas, 1).2, PAGE);
    let misaligned = || program.map_fixed(fd, ioas, BUFFER + 2048, PAGE, START + PAGE);
    assert_eq!(misaligned(), Err(Errno::INVAL));
    assert_eq!(program.map(fd, ioas, BUFFER, 100), Err(Errno::INVAL));
    assert_eq!(program.map(fd, ioas, BUFFER + 2048, PAGE), Err(Errno::INVAL));
    assert_eq!(program.map_fixed(fd, ioas, BUFFER, PAGE, START + PAGE + 1), Err(Errno::INVAL));
    assert_eq!(set(0), Ok(()));
    assert_eq!(set(1), Ok(()));
    assert_eq!(misaligned(), Ok(()));
    assert_eq!(set(0), Err(Errno::ADDRINUSE));
    assert_eq!(get(), Ok(1));
    program.unmap(fd, ioas, START + PAGE, PAGE).unwrap();
    assert_eq!(set(0), Ok(()));

    assert_eq!(program.option(fd, HUGE, 2, ioas, 0), Err(Errno::OPNOTSUPP));
    assert_eq!(program.option(fd, HUGE, 0, 99, 0), Err(Errno::NOENT));
    assert_eq!(program.option(fd, 2, 0, ioas, 0), Err(Errno::OPNOTSUPP));
    let reserved = uapi::SetOption { option_id: HUGE, object_id: ioas, reserved: 1, ..Default::default() };
    assert_eq!(program.run(fd, reserved).map(drop), Err(Errno::OPNOTSUPP));
}

#[test]
fn the_resource_mode_needs_a_privilege_and_an_empty_context() {
    const MODE: u32 = uapi::OPTION_RLIMIT_MODE;
    let program = Program::new();
    let fd = program.iommu();
    let get = || program.option(fd, MODE, uapi::OPTION_OP_GET, 0, 1);
    let set = |value| program.option(fd, MODE, uapi::OPTION_OP_SET, 0, value).map(drop);
    assert_eq!(get(), Ok(0));
    assert_eq!(set(1), Err(Errno::PERM));
    program.set_may_change_resource_mode(true);
    assert_eq!(set(1), Ok(()));
    assert_eq!(set(2), Err(Errno::INVAL));
    assert_eq!(get(), Ok(1));
    assert_eq!(set(0), Ok(()));
    assert_eq!(program.option(fd, MODE, uapi::OPTION_OP_GET, 1, 0), Err(Errno::OPNOTSUPP));
    assert_eq!(program.option(fd, MODE, 7, 0, 0), Err(Errno::OPNOTSUPP));
    let ioas = program.ioas(fd);
    assert_eq!(set(1), Err(Errno::BUSY));
    program.destroy(fd, ioas).unwrap();
    assert_eq!(set(1), Ok(()));
}

#[test]
fn the_self_tests_command_serves_what_tests_without_devices_need() {
    let (program, fd, ioas) = with_ioas();
    let limit = |limit| program.test(fd, 0, &test::SetTempMemoryLimit { limit }).map(drop);
    assert_eq!(limit(11), Err(Errno::INVAL));
    assert_eq!(limit(65536), Ok(()));
    let refs = |uptr, length, refs| {
        program.test(fd, 0, &test::CheckRefs { uptr, length, refs, padding: 0 }).map(drop)
    };
    program.map(fd, ioas, BUFFER, PAGE).unwrap();
    assert_eq!(refs(BUFFER, BUFFER_SIZE, 0), Ok(()), "a mapping without a table holds nothing");
    assert_eq!(refs(BUFFER, BUFFER_SIZE, 1), Err(Errno::IO));
    assert_eq!(refs(BUFFER + 1, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(refs(BUFFER, PAGE + 1, 0), Err(Errno::INVAL));
    assert_eq!(refs(BUFFER, BUFFER_SIZE + PAGE, 0), Err(Errno::FAULT));
    assert_eq!(refs(BUFFER, 0, 7), Ok(()));
    assert_eq!(refs(u64::MAX - PAGE + 1, PAGE, 0), Err(Errno::INVAL));

    let unknown = test::TestCommand { op: 99, ..Default::default() };
    assert_eq!(program.run(fd, unknown).map(drop), Err(Errno::OPNOTSUPP));
}

#[test]
fn a_space_goes_with_its_areas_and_with_the_file() {
    let (program, fd, ioas) = with_ioas();
    for number in 0..10 {
        program.map_fixed(fd, ioas, BUFFER, PAGE, number * PAGE).unwrap();
    }
    assert_eq!(program.server.status().contexts[0].address_spaces[0].area_count, 10);
    assert_eq!(program.destroy(fd, ioas), Ok(()));
    let ioas = program.ioas(fd);
    program.map_fixed(fd, ioas, BUFFER, PAGE, 0).unwrap();
    let child = program.forked();
    program.close(fd).unwrap();
    assert_eq!(program.server.status().contexts.len(), 1, "the child still has the file open");
    assert_eq!(child.unmap(fd, ioas, 0, u64::MAX), Ok(PAGE));
    drop(child);
    assert!(program.server.status().contexts.is_empty());
}
