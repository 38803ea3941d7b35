//! IOAS_MAP_FILE.

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use rustix::fs::{Mode, OFlags};

use crate::ladder::{Fault, ladder};
use crate::program::{FIXED, PAGE, READ, WRITE, memfd};
use crate::{LAST_PAGE, Machine, NOBODY, RESERVED, TAKEN};

const OF_THE_CALL: &[Fault<'_, uapi::IoasMapFile>] = &[
    ("an unknown flag", Errno::OPNOTSUPP, &|c| c.flags |= 8),
    ("an IOVA of 2^64 - 1", Errno::OVERFLOW, &|c| c.iova = u64::MAX),
    ("a length of 2^64 - 1", Errno::OVERFLOW, &|c| c.length = u64::MAX),
    ("neither read nor write", Errno::INVAL, &|c| c.flags &= !(READ | WRITE)),
    ("no such space", Errno::NOENT, &|c| c.ioas_id = NOBODY),
    ("a length of 0", Errno::INVAL, &|c| c.length = 0),
    ("offsets that reach over 2^64", Errno::OVERFLOW, &|c| (c.start, c.length) = (u64::MAX, 2 * PAGE)),
    ("no open file", Errno::BADF, &|c| c.fd = 1000),
    ("a number that no file can have", Errno::BADF, &|c| c.fd = -1),
];

const PLACED: &[Fault<'_, uapi::IoasMapFile>] = &[
    ("a length whose pages cannot be counted", Errno::INVAL, &|c| {
        (c.start, c.length) = (0, u64::MAX - PAGE + 1);
    }),
    ("a length that is no multiple of pages", Errno::INVAL, &|c| c.length |= 0x800),
    ("an IOVA that is none", Errno::INVAL, &|c| c.iova |= 0x800),
    ("an end behind 2^64", Errno::OVERFLOW, &|c| (c.iova, c.length) = (LAST_PAGE, 2 * PAGE)),
    ("a reserved range", Errno::INVAL, &|c| (c.iova, c.length) = (RESERVED, 2 * PAGE)),
    ("something is mapped there", Errno::EXIST, &|c| c.iova = TAKEN),
    ("an offset within a page", Errno::INVAL, &|c| c.start |= 0x800),
    ("behind the end of the file", Errno::INVAL, &|c| c.start = 16 * PAGE),
    ("offsets that no file has", Errno::INVAL, &|c| c.start = 1 << 63),
    ("more than the process may lock", Errno::NOMEM, &|c| c.length = 8 * PAGE),
];

#[test]
fn with_a_table() {
    let (m, _device) = Machine::attached();
    m.program.set_memory_lock_limit(Some(4 * PAGE));
    let fd = m.program.insert_foreign(memfd(16 * PAGE));
    let good = uapi::IoasMapFile {
        flags: FIXED | READ | WRITE,
        ioas_id: m.ioas,
        fd,
        start: PAGE,
        length: PAGE,
        iova: 0x10_0000,
        ..Default::default()
    };
    let named = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let named = m.program.insert_foreign(named);
    let null = m.program.insert_foreign(std::fs::File::open("/dev/null").unwrap().into());
    let files: &[Fault<'_, uapi::IoasMapFile>] =
        &[("a descriptor that only names a file", Errno::BADF, &|c| c.fd = named)];
    let contents: &[Fault<'_, uapi::IoasMapFile>] = &[
        ("a file that has no memory", Errno::INVAL, &|c| c.fd = null),
        ("/dev/iommu itself", Errno::INVAL, &|c| c.fd = m.iommu),
    ];
    ladder(&m.program, m.iommu, good, &[OF_THE_CALL, files, PLACED].concat());
    ladder(&m.program, m.iommu, good, contents);
    assert_eq!(m.program.run(m.iommu, good).map(|c| c.iova), Ok(0x10_0000));
}

/// Without a table nobody looks at the file.
#[test]
fn without_a_table() {
    let m = Machine::new();
    m.program.map_fixed(m.iommu, m.ioas, 0, PAGE, TAKEN).unwrap();
    m.reserve(RESERVED, PAGE);
    let fd = m.program.insert_foreign(memfd(PAGE));
    let good = uapi::IoasMapFile {
        flags: FIXED | READ,
        ioas_id: m.ioas,
        fd,
        length: 100,
        iova: 3,
        start: 5,
        ..Default::default()
    };
    ladder(&m.program, m.iommu, good, OF_THE_CALL);
    assert_eq!(m.program.run(m.iommu, good).map(|c| c.iova), Ok(3), "any alignment");
    let behind = uapi::IoasMapFile { start: 1 << 40, iova: 0x1000, ..good };
    assert_eq!(m.program.run(m.iommu, behind).map(|c| c.iova), Ok(0x1000), "behind the end of the file");
    let placed = uapi::IoasMapFile { flags: READ, start: 0x123, length: 4 << 20, ..good };
    assert_eq!(
        m.program.run(m.iommu, placed).map(|c| c.iova % PAGE),
        Ok(0x123),
        "the offset in the page is kept"
    );
}

/// Pages are held as wholes, so the page that a file ends in cannot be, although a table with a smaller unit could map the part.
#[test]
fn a_page_that_the_file_ends_in_is_none_of_it() {
    let m = Machine::new();
    let mock = ioasid_uapi::iommufd_test::MockDomain::default();
    m.program.test(m.iommu, m.ioas, &mock).unwrap();
    let fd = m.program.insert_foreign(memfd(PAGE + 2048));
    assert!(m.program.map_file(m.iommu, m.ioas, fd, 2048, 2048).is_ok());
    assert_eq!(m.program.map_file(m.iommu, m.ioas, fd, PAGE, 2048), Err(Errno::INVAL));
}
