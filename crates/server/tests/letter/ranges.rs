//! IOAS_IOVA_RANGES and IOAS_ALLOW_IOVAS.

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;

use crate::ladder::ladder;
use crate::program::{BUFFER, BUFFER_SIZE, PAGE};
use crate::{LAST_PAGE, Machine, NOBODY, NOWHERE, RESERVED};

#[test]
fn iova_ranges() {
    let m = Machine::new();
    m.reserve(RESERVED, PAGE);
    let good = uapi::IoasIovaRanges {
        ioas_id: m.ioas,
        num_iovas: 2,
        allowed_iovas: BUFFER,
        out_iova_alignment: 99,
        ..Default::default()
    };
    ladder(
        &m.program,
        m.iommu,
        good,
        &[
            ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
            ("no such space", Errno::NOENT, &|c| c.ioas_id = NOBODY),
            ("an array that cannot be written", Errno::FAULT, &|c| c.allowed_iovas = NOWHERE),
            ("an array that ends too early", Errno::FAULT, &|c| c.allowed_iovas = BUFFER + BUFFER_SIZE - 16),
        ],
    );
    let told = m.program.run(m.iommu, good).unwrap();
    assert_eq!((told.num_iovas, told.out_iova_alignment), (2, 1));
    let huge = uapi::IoasIovaRanges { num_iovas: u32::MAX, ..good };
    assert_eq!(m.program.run(m.iommu, huge).map(|c| c.num_iovas), Ok(2), "more room than there is memory");
}

/// The count and the alignment are told although the answer is an error, and as many ranges as there is room for.
#[test]
fn an_array_that_is_too_short_is_filled_and_the_count_is_told() {
    let m = Machine::new();
    let ranges = |room| m.program.iova_ranges(m.iommu, m.ioas, room);
    m.reserve(PAGE, PAGE);
    m.reserve(3 * PAGE, 1);
    m.reserve(3 * PAGE + 1, 1);
    let holes = [(0, PAGE - 1), (2 * PAGE, 3 * PAGE - 1), (3 * PAGE + 2, u64::MAX)];
    for room in 0..3 {
        let some = holes[..room].to_vec();
        assert_eq!(ranges(room as u32), (Err(Errno::MSGSIZE), 3, 1, some), "room for {room}");
    }
    assert_eq!(ranges(3), (Ok(()), 3, 1, holes.to_vec()), "reserved ranges that touch leave no hole");
    // Room for none is no address to write to.
    let nowhere = uapi::IoasIovaRanges { ioas_id: m.ioas, allowed_iovas: NOWHERE, ..Default::default() };
    assert_eq!(m.program.run(m.iommu, nowhere).map(drop), Err(Errno::MSGSIZE));

    let m = Machine::new();
    m.reserve(0, u64::MAX - 1);
    m.reserve(u64::MAX - 1, 2);
    assert_eq!(m.program.iova_ranges(m.iommu, m.ioas, 0), (Ok(()), 0, 1, vec![]), "no hole fits in no room");
}

#[test]
fn allow_iovas() {
    let m = Machine::new();
    m.reserve(RESERVED, PAGE);
    let list = |at: u64, ranges: &[(u64, u64)]| {
        let words = ranges.iter().flat_map(|(first, last)| [first.to_ne_bytes(), last.to_ne_bytes()]);
        m.program.put(at, &words.flatten().collect::<Vec<u8>>()).unwrap();
        at
    };
    let end = BUFFER + BUFFER_SIZE;
    let good = uapi::IoasAllowIovas {
        ioas_id: m.ioas,
        num_iovas: 2,
        allowed_iovas: list(BUFFER, &[(5 * PAGE, 5 * PAGE + 1), (0, 1)]),
        ..Default::default()
    };
    let backwards = list(BUFFER + 100, &[(RESERVED + 1, RESERVED), (0, 0)]);
    let empty = list(BUFFER + 200, &[(RESERVED, RESERVED), (0, 1)]);
    let overlapping = list(BUFFER + 300, &[(RESERVED, RESERVED + 9), (RESERVED + 9, RESERVED + 10)]);
    let reserved = list(BUFFER + 400, &[(0, 1), (RESERVED - 1, RESERVED)]);
    let good_then_cut = list(end - 16, &[(0, 1)]);
    let faults: &[crate::ladder::Fault<'_, uapi::IoasAllowIovas>] = &[
        ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
        ("no such space", Errno::NOENT, &|c| c.ioas_id = NOBODY),
        ("a list that cannot be read", Errno::FAULT, &|c| c.allowed_iovas = NOWHERE),
        ("a list that ends too early", Errno::FAULT, &|c| c.allowed_iovas = good_then_cut),
        ("the longest list, which ends too early", Errno::FAULT, &|c| {
            (c.allowed_iovas, c.num_iovas) = (good_then_cut, u32::MAX);
        }),
        ("a range that ends before it begins", Errno::INVAL, &|c| c.allowed_iovas = backwards),
        ("a range of one byte", Errno::INVAL, &|c| c.allowed_iovas = empty),
        ("ranges that share a byte", Errno::INVAL, &|c| c.allowed_iovas = overlapping),
        ("a reserved byte", Errno::ADDRINUSE, &|c| c.allowed_iovas = reserved),
    ];
    ladder(&m.program, m.iommu, good, faults);
    m.program.run(m.iommu, good).unwrap();
    list(end - 16, &[(1, 0)]);
    let bad_then_cut = uapi::IoasAllowIovas { allowed_iovas: end - 16, ..good };
    assert_eq!(
        m.program.run(m.iommu, bad_then_cut).map(drop),
        Err(Errno::INVAL),
        "entries are looked at one by one"
    );
}

#[test]
fn a_list_replaces_the_former_as_a_whole_or_not_at_all() {
    let m = Machine::new();
    let allow = |ranges: &[(u64, u64)]| m.program.allow(m.iommu, m.ioas, ranges);
    let place = || m.program.map(m.iommu, m.ioas, BUFFER, PAGE);
    allow(&[(0x10_0000, 0x10_1fff)]).unwrap();
    assert_eq!(place(), Ok(0x10_0000));
    assert_eq!(allow(&[(0x20_0000, 0x20_0fff), (1, 1)]), Err(Errno::INVAL));
    assert_eq!(place(), Ok(0x10_1000), "a list that is refused changes nothing");
    assert_eq!(place(), Err(Errno::NOSPC));
    assert_eq!(allow(&[(0x20_0000, 0x20_0fff)]), Ok(()), "what is mapped outside stays");
    assert_eq!(place(), Ok(0x20_0000));
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, LAST_PAGE).unwrap();
    // Without entries the address does not matter.
    let none = uapi::IoasAllowIovas { ioas_id: m.ioas, allowed_iovas: NOWHERE, ..Default::default() };
    m.program.run(m.iommu, none).unwrap();
    assert!(place().is_ok_and(|iova| iova < 0x10_0000), "none allowed is all allowed");
}
