//! IOAS_UNMAP.

use ioasid_server::Errno;
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use zerocopy::IntoBytes;

use crate::ladder::{Fault, ladder};
use crate::program::{BUFFER, IsCommand, PAGE};
use crate::{LAST_PAGE, Machine, NOBODY};

const AREA: u64 = 0x10_0000;

const FAULTS: &[Fault<'_, uapi::IoasUnmap>] = &[
    ("no such space", Errno::NOENT, &|c| c.ioas_id = NOBODY),
    ("from 2^64 - 1 on", Errno::OVERFLOW, &|c| c.iova = u64::MAX),
    ("2^64 - 1 bytes, but not from 0 on", Errno::OVERFLOW, &|c| (c.iova, c.length) = (1, u64::MAX)),
    ("a length of 0", Errno::INVAL, &|c| c.length = 0),
    ("an end behind 2^64", Errno::OVERFLOW, &|c| (c.iova, c.length) = (LAST_PAGE, 2 * PAGE)),
    ("the front of an area", Errno::NOENT, &|c| c.length = 2 * PAGE - 1),
    ("the end of an area", Errno::NOENT, &|c| (c.iova, c.length) = (AREA + 1, 2 * PAGE - 1)),
    ("the middle of an area", Errno::NOENT, &|c| (c.iova, c.length) = (AREA + 1, 1)),
    ("an area, and a part of the next", Errno::NOENT, &|c| c.length = 3 * PAGE),
    ("nothing is mapped there", Errno::NOENT, &|c| (c.iova, c.length) = (0, AREA)),
];

fn good(m: &Machine) -> uapi::IoasUnmap {
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, 2 * PAGE, AREA).unwrap();
    m.program.map_fixed(m.iommu, m.ioas, BUFFER + 2 * PAGE, 2 * PAGE, AREA + 2 * PAGE).unwrap();
    uapi::IoasUnmap { ioas_id: m.ioas, iova: AREA, length: 2 * PAGE, ..Default::default() }
}

#[test]
fn without_a_table() {
    let m = Machine::new();
    let good = good(&m);
    ladder(&m.program, m.iommu, good, FAULTS);
    assert_eq!(m.program.run(m.iommu, good).map(|c| c.length), Ok(2 * PAGE));
}

#[test]
fn with_a_table() {
    let (m, _device) = Machine::attached();
    let good = good(&m);
    ladder(&m.program, m.iommu, good, FAULTS);
    assert_eq!(m.program.run(m.iommu, good).map(|c| c.length), Ok(2 * PAGE));
}

#[test]
fn everything_is_from_0_on_with_a_length_of_all_ones() {
    for m in [Machine::new(), Machine::attached().0] {
        let all = || m.program.unmap(m.iommu, m.ioas, 0, u64::MAX);
        let _ = all();
        assert_eq!(all(), Ok(0), "of nothing, which is no error");
        m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, 0).unwrap();
        m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, LAST_PAGE).unwrap();
        assert_eq!(all(), Ok(2 * PAGE), "the first byte and the last");
        assert_eq!(m.areas(), []);
    }
}

#[test]
fn a_range_may_be_larger_than_what_is_mapped_in_it() {
    let m = Machine::new();
    good(&m);
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, 5, AREA + 9 * PAGE + 7).unwrap();
    assert_eq!(m.program.unmap(m.iommu, m.ioas, AREA - 1, 100 * PAGE), Ok(4 * PAGE + 5), "with the holes");
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, 1, u64::MAX - 1).unwrap();
    assert_eq!(m.program.unmap(m.iommu, m.ioas, 1, u64::MAX - 1), Ok(1), "all but the last byte");
}

#[test]
fn an_answer_that_cannot_be_delivered_leaves_it_unmapped() {
    let m = Machine::new();
    const ARGUMENT: u64 = 0x1000;
    let good = good(&m);
    m.program.map_memory(ARGUMENT, PAGE);
    m.program.put(ARGUMENT, good.sized().as_bytes()).unwrap();
    m.program.protect(ARGUMENT, PAGE, false);
    assert_eq!(m.program.ioctl(m.iommu, uapi::IoasUnmap::NUMBER, ARGUMENT), Err(Errno::FAULT));
    assert_eq!(m.program.run(m.iommu, good).map(drop), Err(Errno::NOENT));
}
