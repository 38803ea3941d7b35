//! IOAS_MAP.

use ioasid_server::Errno;
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use zerocopy::IntoBytes;

use crate::ladder::{Fault, ladder};
use crate::program::{BUFFER, FIXED, IsCommand, PAGE, READ, WRITE};
use crate::{LAST_PAGE, Machine, NOBODY, NOWHERE, RESERVED, TAKEN};

fn good(m: &Machine) -> uapi::IoasMap {
    uapi::IoasMap {
        flags: FIXED | READ | WRITE,
        ioas_id: m.ioas,
        user_va: BUFFER,
        length: PAGE,
        iova: 0x10_0000,
        ..Default::default()
    }
}

/// What is looked at before the address space is.
const OF_THE_CALL: &[Fault<'_, uapi::IoasMap>] = &[
    ("an unknown flag", Errno::OPNOTSUPP, &|c| c.flags |= 8),
    ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
    ("an IOVA of 2^64 - 1", Errno::OVERFLOW, &|c| c.iova = u64::MAX),
    ("a length of 2^64 - 1", Errno::OVERFLOW, &|c| c.length = u64::MAX),
    ("neither read nor write", Errno::INVAL, &|c| c.flags &= !(READ | WRITE)),
    ("no such space", Errno::NOENT, &|c| c.ioas_id = NOBODY),
    ("memory that reaches the end of 2^64", Errno::OVERFLOW, &|c| (c.user_va, c.length) = (LAST_PAGE, PAGE)),
    ("a length of 0", Errno::INVAL, &|c| c.length = 0),
    ("a length whose pages cannot be counted", Errno::INVAL, &|c| {
        (c.user_va, c.length) = (0, u64::MAX - PAGE + 1);
    }),
];

const AT_A_FIXED_PLACE: &[Fault<'_, uapi::IoasMap>] = &[
    ("a length that is no multiple of pages", Errno::INVAL, &|c| c.length |= 0x800),
    ("an IOVA that is none", Errno::INVAL, &|c| c.iova |= 0x800),
    ("an end behind 2^64", Errno::OVERFLOW, &|c| (c.iova, c.length) = (LAST_PAGE, 2 * PAGE)),
    ("a reserved range", Errno::INVAL, &|c| (c.iova, c.length) = (RESERVED, 2 * PAGE)),
    ("something is mapped there", Errno::EXIST, &|c| c.iova = TAKEN),
    ("memory that begins within a page", Errno::INVAL, &|c| c.user_va |= 0x800),
    ("memory that is not there", Errno::FAULT, &|c| c.user_va = NOWHERE),
    ("more than the process may lock", Errno::NOMEM, &|c| c.length = 8 * PAGE),
];

#[test]
fn with_a_table_at_a_fixed_place() {
    let (m, _device) = Machine::attached();
    m.program.set_memory_lock_limit(Some(4 * PAGE));
    ladder(&m.program, m.iommu, good(&m), &[OF_THE_CALL, AT_A_FIXED_PLACE].concat());
    assert_eq!(m.program.run(m.iommu, good(&m)).map(|c| c.iova), Ok(0x10_0000));
}

#[test]
fn with_a_table_where_there_is_room() {
    let (m, _device) = Machine::attached();
    m.program.allow(m.iommu, m.ioas, &[(0x20_0000, 0x20_3fff)]).unwrap();
    let good = uapi::IoasMap { flags: READ, iova: 77, ..good(&m) };
    let placing: &[Fault<'_, uapi::IoasMap>] = &[
        ("a length that is no multiple of pages", Errno::INVAL, &|c| c.length |= 0x800),
        ("half of the space", Errno::OVERFLOW, &|c| (c.user_va, c.length) = (c.user_va & 0xfff, 1 << 63)),
        ("memory that begins within a page", Errno::INVAL, &|c| c.user_va |= 0x800),
        ("no room", Errno::NOSPC, &|c| c.length = 5 * PAGE),
        ("memory that is not there", Errno::FAULT, &|c| c.user_va = NOWHERE),
    ];
    ladder(&m.program, m.iommu, good, &[OF_THE_CALL, placing].concat());
    assert_eq!(
        m.program.run(m.iommu, good).map(|c| c.iova),
        Ok(0x20_0000),
        "the IOVA that was given is not looked at"
    );
}

/// Without a table there is no unit, and nobody looks at memory.
#[test]
fn without_a_table() {
    let m = Machine::new();
    m.reserve(RESERVED, PAGE);
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, TAKEN).unwrap();
    let placed: &[Fault<'_, uapi::IoasMap>] = &[
        ("an end behind 2^64", Errno::OVERFLOW, &|c| (c.iova, c.length) = (u64::MAX - 1, 3)),
        ("a byte of a reserved range", Errno::INVAL, &|c| (c.iova, c.length) = (RESERVED - 1, PAGE + 2)),
        ("a byte that is mapped", Errno::EXIST, &|c| (c.iova, c.length) = (TAKEN + PAGE - 1, 2)),
    ];
    ladder(&m.program, m.iommu, good(&m), &[OF_THE_CALL, placed].concat());
    for (rule, user_va, length, iova) in [
        ("any alignment", BUFFER + 3, 5, 0x10_0007),
        ("a single byte", BUFFER, 1, 0),
        ("memory that is not there", NOWHERE, PAGE, 0x20_0000),
        ("up to the last byte of a hole", BUFFER, RESERVED - 0x30_0000, 0x30_0000),
        ("up to the last byte of all", BUFFER, 2, u64::MAX - 1),
    ] {
        let command = uapi::IoasMap { user_va, length, iova, ..good(&m) };
        assert_eq!(m.program.run(m.iommu, command).map(|c| c.iova), Ok(iova), "{rule}");
    }
}

#[test]
fn what_is_allowed_binds_automatic_placement_only() {
    let (m, _device) = Machine::attached();
    m.program.allow(m.iommu, m.ioas, &[(0x20_0000, 0x20_0fff)]).unwrap();
    assert_eq!(m.program.map(m.iommu, m.ioas, BUFFER, PAGE), Ok(0x20_0000));
    assert_eq!(m.program.map(m.iommu, m.ioas, BUFFER, PAGE), Err(Errno::NOSPC));
    assert_eq!(m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, 0x20_1000), Ok(()));
}

#[test]
fn an_answer_that_cannot_be_delivered_leaves_the_mapping() {
    let m = Machine::new();
    const ARGUMENT: u64 = 0x1000;
    m.program.map_memory(ARGUMENT, PAGE);
    m.program.put(ARGUMENT, good(&m).sized().as_bytes()).unwrap();
    m.program.protect(ARGUMENT, PAGE, false);
    assert_eq!(m.program.ioctl(m.iommu, uapi::IoasMap::NUMBER, ARGUMENT), Err(Errno::FAULT));
    assert_eq!(m.program.unmap(m.iommu, m.ioas, 0x10_0000, PAGE), Ok(PAGE));
}
