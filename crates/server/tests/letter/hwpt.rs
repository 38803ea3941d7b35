//! HWPT_ALLOC and GET_HW_INFO.

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd::{HwCapabilities, HwptAllocFlags};

use crate::ladder::{Fault, ladder};
use crate::program::{BUFFER, PAGE};
use crate::{Machine, NOBODY, NOWHERE};

/// Where x86 devices send their interrupts.
const INTERRUPTS: u64 = 0xfee0_0000;

const OF_THE_CALL: &[Fault<'_, uapi::HwptAlloc>] = &[
    ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
    ("data of no type", Errno::INVAL, &|c| (c.data_type, c.data_len) = (uapi::HWPT_DATA_NONE, 8)),
    ("a type without data", Errno::INVAL, &|c| (c.data_type, c.data_len) = (1, 0)),
    ("no such device", Errno::NOENT, &|c| c.dev_id = NOBODY),
    ("a device that is a space", Errno::NOENT, &|c| c.dev_id = 1),
    ("no such parent", Errno::INVAL, &|c| c.pt_id = NOBODY),
    ("a parent that is a device", Errno::INVAL, &|c| c.pt_id = c.dev_id),
    ("an unknown flag", Errno::OPNOTSUPP, &|c| c.flags |= 1 << 31),
    ("data that the hardware does not know", Errno::OPNOTSUPP, &|c| {
        (c.data_type, c.data_len, c.data_uptr) = (1, 8, NOWHERE);
    }),
];

#[test]
fn tables_of_a_device() {
    let m = Machine::with("edu");
    assert_eq!(m.ioas, 1);
    let device = m.program.bind(m.iommu);
    let good = uapi::HwptAlloc { dev_id: device.id, pt_id: m.ioas, ..Default::default() };
    let no_writes: &[Fault<'_, uapi::HwptAlloc>] =
        &[("recording writes, which the native table cannot", Errno::OPNOTSUPP, &|c| {
            c.flags |= HwptAllocFlags::DIRTY_TRACKING.bits();
        })];
    ladder(&m.program, m.iommu, good, &[OF_THE_CALL, no_writes].concat());
    let table = m.program.run(m.iommu, good).unwrap().out_hwpt_id;
    ladder(
        &m.program,
        m.iommu,
        uapi::HwptAlloc { pt_id: table, ..good },
        &[("a table over a table, which the hardware cannot", Errno::OPNOTSUPP, &|_| ())],
    );
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, 0).unwrap();
    m.program.destroy(m.iommu, table).unwrap();
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, 100, PAGE).unwrap();
    let first = |rule, errno| [OF_THE_CALL, no_writes, &[(rule, errno, &|_| ())]].concat();
    ladder(&m.program, m.iommu, good, &first("an area that is no multiple of pages", Errno::ADDRINUSE));
    m.program.unmap(m.iommu, m.ioas, PAGE, 100).unwrap();
    m.program.map_fixed(m.iommu, m.ioas, NOWHERE, PAGE, PAGE).unwrap();
    ladder(&m.program, m.iommu, good, &first("an area whose memory is not there", Errno::FAULT));
    m.program.unmap(m.iommu, m.ioas, PAGE, PAGE).unwrap();
    assert!(m.program.run(m.iommu, good).is_ok());
}

/// What the hardware cannot translate is in the way of its tables; what a device reserves is in the way of attaching it.
#[test]
fn what_is_reserved_and_what_cannot_be_translated() {
    let m = Machine::with("edu:table=vtd");
    let device = m.program.bind(m.iommu);
    let good = uapi::HwptAlloc { dev_id: device.id, pt_id: m.ioas, ..Default::default() };
    let in_the_way: &[Fault<'_, uapi::HwptAlloc>] =
        &[("something where it cannot translate", Errno::ADDRINUSE, &|_| ())];
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, 1 << 60).unwrap();
    ladder(&m.program, m.iommu, good, in_the_way);
    m.program.unmap(m.iommu, m.ioas, 1 << 60, PAGE).unwrap();
    m.program.allow(m.iommu, m.ioas, &[(1 << 60, (1 << 60) + 1)]).unwrap();
    ladder(&m.program, m.iommu, good, in_the_way);
    m.program.allow(m.iommu, m.ioas, &[(INTERRUPTS, INTERRUPTS + 1)]).unwrap();
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, INTERRUPTS + PAGE).unwrap();
    let table = m.program.run(m.iommu, good).unwrap().out_hwpt_id;
    assert_eq!(m.program.attach(&device, table), Err(Errno::ADDRINUSE), "an area, and what is allowed");
    m.program.allow(m.iommu, m.ioas, &[]).unwrap();
    assert_eq!(m.program.attach(&device, table), Err(Errno::ADDRINUSE), "an area");
    m.program.unmap(m.iommu, m.ioas, INTERRUPTS + PAGE, PAGE).unwrap();
    assert_eq!(m.program.attach(&device, table), Ok(table));
    assert_eq!(m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, INTERRUPTS), Err(Errno::INVAL));
}

#[test]
fn tables_over_tables_of_mock_devices() {
    let m = Machine::new();
    let mock = ioasid_uapi::iommufd_test::MockDomain::default();
    let mock = m.program.test(m.iommu, m.ioas, &mock).unwrap();
    let good = uapi::HwptAlloc { dev_id: mock.out_idev_id, pt_id: mock.out_hwpt_id, ..Default::default() };
    let data = |c: &mut uapi::HwptAlloc| (c.data_type, c.data_len, c.data_uptr) = (0xdead, 8, BUFFER);
    ladder(&m.program, m.iommu, good, &[("without data", Errno::OPNOTSUPP, &|_| ())]);
    ladder(&m.program, m.iommu, good, &[("over one that is no parent", Errno::INVAL, &data)]);
}

#[test]
fn hardware_information() {
    let m = Machine::with("edu:table=vtd");
    let device = m.program.bind(m.iommu);
    let good = uapi::GetHwInfo { dev_id: device.id, data_len: 8, data_uptr: BUFFER, ..Default::default() };
    ladder(
        &m.program,
        m.iommu,
        good,
        &[
            ("an unknown flag", Errno::OPNOTSUPP, &|c| c.flags = 2),
            ("the first reserved byte", Errno::OPNOTSUPP, &|c| c.reserved[0] = 1),
            ("the last reserved byte", Errno::OPNOTSUPP, &|c| c.reserved[2] = 1),
            ("no such device", Errno::NOENT, &|c| c.dev_id = NOBODY),
            ("a space", Errno::NOENT, &|c| c.dev_id = m.ioas),
            ("room that cannot be written", Errno::FAULT, &|c| c.data_uptr = NOWHERE),
        ],
    );
    m.program.put(BUFFER, &[0xaa; 16]).unwrap();
    let told = m.program.run(m.iommu, good).unwrap();
    assert_eq!((told.data_type, told.data_len), (uapi::HW_INFO_TYPE_NONE, 0), "there is none");
    let expected = HwCapabilities::DIRTY_TRACKING | HwCapabilities::ATS_NOT_SUPPORTED;
    assert_eq!(told.out_capabilities & expected.bits(), expected.bits());
    let room = m.program.get(BUFFER, 16).unwrap();
    assert_eq!((&room[..8], &room[8..]), (&[0; 8][..], &[0xaa; 8][..]), "the room is zeroed, and no more");
    let no_room = uapi::GetHwInfo { data_len: 0, data_uptr: NOWHERE, ..good };
    assert!(m.program.run(m.iommu, no_room).is_ok(), "without room the address does not matter");
    let any_type = uapi::GetHwInfo { flags: 1, data_type: 0x1234, ..good };
    assert_eq!(m.program.run(m.iommu, any_type).map(|c| c.data_type), Ok(uapi::HW_INFO_TYPE_NONE));
}

#[test]
fn hardware_information_of_mock_devices() {
    let m = Machine::new();
    let mock = ioasid_uapi::iommufd_test::MockDomain::default();
    let mock = m.program.test(m.iommu, m.ioas, &mock).unwrap();
    let good = uapi::GetHwInfo {
        flags: 1,
        dev_id: mock.out_idev_id,
        data_len: 4,
        data_uptr: BUFFER,
        data_type: 0xfeed_beef,
        ..Default::default()
    };
    let unknown: Fault<'_, uapi::GetHwInfo> =
        ("a type that the hardware has not", Errno::OPNOTSUPP, &|c| c.data_type = 5);
    let nowhere: Fault<'_, uapi::GetHwInfo> =
        ("room that cannot be written", Errno::FAULT, &|c| c.data_uptr = NOWHERE);
    ladder(&m.program, m.iommu, good, &[unknown, nowhere]);
    m.program.put(BUFFER, &[0xaa; 16]).unwrap();
    assert_eq!(
        m.program.run(m.iommu, good).map(|c| c.data_len),
        Ok(8),
        "how much there is, not how much fits"
    );
    assert_eq!(m.program.get(BUFFER + 4, 4).unwrap(), [0xaa; 4], "what has no room is not written");
}
