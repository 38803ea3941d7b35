//! IOAS_COPY.

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;

use crate::ladder::{Fault, ladder};
use crate::program::{BUFFER, FIXED, PAGE, READ, WRITE};
use crate::{LAST_PAGE, Machine, NOBODY, NOWHERE, RESERVED, TAKEN};

/// Where the source has three pages of two areas, a gap behind them,
const SOURCE: u64 = 0x5000_0000;
/// two pages that cannot be written, of memory that begins within a page,
const READ_ONLY: u64 = SOURCE + 8 * PAGE;
/// and memory that is not there.
const NOT_THERE: u64 = SOURCE + 16 * PAGE;

/// The destination, where a device is attached, and the number of the source, which has no table.
fn two_spaces() -> (Machine, u32, crate::BoundDevice) {
    let (m, device) = Machine::attached();
    let source = m.program.ioas(m.iommu);
    let map = |flags, address, length, iova| {
        m.program.map_flags(m.iommu, source, FIXED | flags, address, length, iova).unwrap()
    };
    map(READ | WRITE, BUFFER, PAGE, SOURCE);
    map(READ | WRITE, BUFFER + 4 * PAGE, 2 * PAGE, SOURCE + PAGE);
    map(READ, BUFFER + 0x800, 2 * PAGE, READ_ONLY);
    map(READ | WRITE, NOWHERE, 4 * PAGE, NOT_THERE);
    (m, source, device)
}

const FAULTS: &[Fault<'_, uapi::IoasCopy>] = &[
    ("an unknown flag", Errno::OPNOTSUPP, &|c| c.flags |= 8),
    ("a length of 2^64 - 1", Errno::OVERFLOW, &|c| c.length = u64::MAX),
    ("a source at 2^64 - 1", Errno::OVERFLOW, &|c| c.src_iova = u64::MAX),
    ("a destination at 2^64 - 1", Errno::OVERFLOW, &|c| c.dst_iova = u64::MAX),
    ("neither read nor write", Errno::INVAL, &|c| c.flags &= !(READ | WRITE)),
    ("no such source", Errno::NOENT, &|c| c.src_ioas_id = NOBODY),
    ("a length of 0", Errno::INVAL, &|c| c.length = 0),
    ("a source that ends behind 2^64", Errno::OVERFLOW, &|c| (c.src_iova, c.length) = (LAST_PAGE, 2 * PAGE)),
    ("a source with a gap", Errno::NOENT, &|c| (c.src_iova, c.length) = (SOURCE + 2 * PAGE, 2 * PAGE)),
    ("a source with a gap in front", Errno::NOENT, &|c| c.src_iova = SOURCE - 1),
    ("no such destination", Errno::NOENT, &|c| c.dst_ioas_id = NOBODY),
    ("a length that is no multiple of pages", Errno::INVAL, &|c| c.length |= 0x800),
    ("a destination that is none", Errno::INVAL, &|c| c.dst_iova |= 0x800),
    ("a destination that ends behind 2^64", Errno::OVERFLOW, &|c| {
        (c.dst_iova, c.length) = (LAST_PAGE, 2 * PAGE);
    }),
    ("a reserved range", Errno::INVAL, &|c| (c.dst_iova, c.length) = (RESERVED, 2 * PAGE)),
    ("something is mapped there", Errno::EXIST, &|c| c.dst_iova = TAKEN),
    ("writing what may be read only", Errno::PERM, &|c| (c.src_iova, c.flags) = (READ_ONLY, c.flags | WRITE)),
    ("memory that begins within a page", Errno::INVAL, &|c| c.src_iova = READ_ONLY),
    ("memory that is not there", Errno::FAULT, &|c| c.src_iova = NOT_THERE),
];

#[test]
fn between_two_spaces() {
    let (m, source, _device) = two_spaces();
    let good = uapi::IoasCopy {
        flags: FIXED | READ,
        dst_ioas_id: m.ioas,
        src_ioas_id: source,
        length: PAGE,
        src_iova: SOURCE,
        dst_iova: 0x10_0000,
        ..Default::default()
    };
    ladder(&m.program, m.iommu, good, FAULTS);
    assert_eq!(m.program.run(m.iommu, good).map(|c| c.dst_iova), Ok(0x10_0000));
}

#[test]
fn within_one_space() {
    let m = Machine::new();
    let copy = |flags, src_iova, dst_iova, length| {
        let (dst_ioas_id, src_ioas_id) = (m.ioas, m.ioas);
        let command = uapi::IoasCopy {
            flags,
            dst_ioas_id,
            src_ioas_id,
            length,
            src_iova,
            dst_iova,
            ..Default::default()
        };
        m.program.run(m.iommu, command).map(|c| c.dst_iova)
    };
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, SOURCE).unwrap();
    m.program.map_flags(m.iommu, m.ioas, FIXED | READ, BUFFER + PAGE, PAGE, SOURCE + PAGE).unwrap();
    m.program.map_flags(m.iommu, m.ioas, FIXED | WRITE, BUFFER + 2 * PAGE, PAGE, SOURCE + 2 * PAGE).unwrap();
    let all = 3 * PAGE;
    for (rule, flags, src_iova, dst_iova, length, answer) in [
        ("onto itself", READ, SOURCE, SOURCE, PAGE, Err(Errno::EXIST)),
        ("onto a part of itself", READ, SOURCE, SOURCE - 1, PAGE, Err(Errno::EXIST)),
        ("several areas, one read-only, for writing", WRITE, SOURCE, 0, all, Err(Errno::PERM)),
        ("several areas, for reading, the write-only too", READ, SOURCE, 0, all, Ok(0)),
        ("what a copy may only read but the map may write", WRITE, 0, 0x10_0000, PAGE, Ok(0x10_0000)),
        (
            "from the middle of one to the middle of another",
            READ,
            SOURCE + 9,
            0x20_0000,
            all - 99,
            Ok(0x20_0000),
        ),
        ("up to the last byte of all", READ, SOURCE, u64::MAX - 4, 5, Ok(u64::MAX - 4)),
        ("from there", READ, u64::MAX - 4, 0x30_0000, 5, Ok(0x30_0000)),
    ] {
        assert_eq!(copy(FIXED | flags, src_iova, dst_iova, length), answer, "{rule}");
    }
    let placed = copy(READ, SOURCE + 0x123, 0, PAGE).unwrap();
    assert_eq!(placed % PAGE, 0x123, "where there is room, by the first area's memory");
    // Each piece is an area of its own.
    assert_eq!(m.program.unmap(m.iommu, m.ioas, 0, PAGE), Ok(PAGE));
    assert_eq!(m.program.unmap(m.iommu, m.ioas, PAGE, 2 * PAGE), Ok(2 * PAGE));
}

#[test]
fn what_is_copied_outlives_where_it_came_from() {
    let (m, source, _device) = two_spaces();
    let command = uapi::IoasCopy {
        flags: FIXED | READ,
        dst_ioas_id: m.ioas,
        src_ioas_id: source,
        length: 2 * PAGE,
        src_iova: SOURCE,
        dst_iova: 0x10_0000,
        ..Default::default()
    };
    m.program.run(m.iommu, command).unwrap();
    m.program.destroy(m.iommu, source).unwrap();
    let again = uapi::IoasCopy { src_ioas_id: m.ioas, src_iova: 0x10_0000, dst_iova: 0x20_0000, ..command };
    assert_eq!(m.program.run(m.iommu, again).map(|c| c.dst_iova), Ok(0x20_0000));
    assert_eq!(m.program.charged(), 2, "two pages, however often they are mapped");
}
