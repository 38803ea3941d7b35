//! A device's requests with PASIDs: where each leads, what stands in the way, and that nothing is left behind.

mod program;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioasid_server::{Errno, Server, ServerOptions};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd;
use ioasid_uapi::iommufd_test as test;
use ioasid_uapi::vfio as uapi;
use program::*;
use proptest::prelude::*;
use zerocopy::IntoBytes;

const SOURCE: u64 = 0x10_0000;
const TARGET: u64 = 0x20_0000;

/// A device, and some address spaces with tables for PASIDs.
struct Machine {
    program: Program,
    iommu: i32,
    device: BoundDevice,
    mapped: u64,
}

impl Machine {
    fn new(device: &str) -> Machine {
        let program = Program::of(&server_with(device));
        let iommu = program.iommu();
        let device = program.bind(iommu);
        Machine { program, iommu, device, mapped: 0 }
    }

    /// An address space in which each of the two addresses is a page of its own, with `mark` in the first: its table, and
    /// where the second is.
    fn space(&mut self, mark: u8) -> (u32, u64) {
        let program = &self.program;
        let (source, target) = (BUFFER + self.mapped, BUFFER + self.mapped + PAGE);
        self.mapped += 2 * PAGE;
        program.put(source, &[mark; 16]).unwrap();
        let ioas = program.ioas(self.iommu);
        program.map_fixed(self.iommu, ioas, source, PAGE, SOURCE).unwrap();
        program.map_fixed(self.iommu, ioas, target, PAGE, TARGET).unwrap();
        (program.hwpt_for_pasids(self.iommu, self.device.id, ioas).unwrap(), target)
    }

    fn copy(&self, pasid: Option<u32>) {
        self.program.use_pasid(&self.device, pasid);
        self.program.device_copies(&self.device, SOURCE, TARGET, 16);
    }

    fn device_status(&self) -> ioasid_server::DeviceStatus {
        self.program.server.status().contexts[0].devices[0].clone()
    }

    fn attach(&self, pasid: u32, table: u32) -> Result<u32, Errno> {
        self.program.attach_pasid(&self.device, pasid, table)
    }
}

/// What a place of the program's memory begins with.
fn at(m: &Machine, address: u64) -> u8 {
    m.program.get(address, 1).unwrap()[0]
}

#[test]
fn each_pasid_leads_to_its_own_space() {
    for kind in ["edu", "edu:table=vtd"] {
        let mut m = Machine::new(kind);
        let (plain, in_plain) = m.space(1);
        let (five, in_five) = m.space(2);
        let (last, in_last) = m.space(3);
        assert_eq!(m.program.attach(&m.device, plain), Ok(plain));
        assert_eq!(m.attach(5, five), Ok(five));
        assert_eq!(m.attach(0xf_ffff, last), Ok(last));
        for pasid in [None, Some(5), Some(0xf_ffff)] {
            m.copy(pasid);
        }
        assert_eq!([in_plain, in_five, in_last].map(|address| at(&m, address)), [1, 2, 3], "{kind}");
        assert_eq!(m.device_status().dma_faults, 0);

        // Without a PASID it is the device it always was, and its PASIDs do not need it to be attached.
        m.program.detach(&m.device).unwrap();
        m.copy(Some(5));
        assert_eq!(m.device_status().dma_faults, 0);
        m.copy(None);
        let status = m.device_status();
        assert_eq!(status.dma_faults, 2);
        assert!(!status.last_dma_fault.unwrap().contains("PASID"));
    }
}

#[test]
fn a_pasid_that_leads_nowhere_faults_and_the_fault_says_which() {
    let mut m = Machine::new("edu");
    let (plain, _) = m.space(1);
    let (five, in_five) = m.space(2);
    m.program.attach(&m.device, plain).unwrap();
    m.copy(Some(5));
    let status = m.device_status();
    assert_eq!((status.dma_faults, status.pasid_count), (2, 0));
    let said = status.last_dma_fault.unwrap();
    assert_eq!(
        said,
        "device write at IOVA 0x200000 refused: the device is attached to no address space (PASID 5)"
    );
    m.attach(5, five).unwrap();
    m.copy(Some(5));
    assert_eq!((m.device_status().dma_faults, at(&m, in_five)), (2, 2));
    assert_eq!(m.program.detach_pasid(&m.device, 5), Ok(()));
    m.program.put(in_five, &[0]).unwrap();
    m.copy(Some(5));
    assert_eq!((m.device_status().dma_faults, at(&m, in_five)), (4, 0), "detached: blocked");
    assert_eq!(m.program.detach_pasid(&m.device, 5), Ok(()), "as Linux, which does not mind");
    assert_eq!(m.program.detach_pasid(&m.device, u32::MAX), Ok(()));
    m.copy(None);
    assert_eq!(m.device_status().dma_faults, 4, "the others are nothing to the plain requests");
}

/// The device copies without pause while its PASID is moved to and fro: every copy is whole, in the one space or the other.
#[test]
fn a_pasid_is_replaced_in_one_step() {
    let mut m = Machine::new("edu");
    let (one, in_one) = m.space(1);
    let (other, in_other) = m.space(2);
    m.attach(9, one).unwrap();
    m.program.use_pasid(&m.device, Some(9));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                m.attach(9, other).unwrap();
                m.attach(9, one).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            m.program.device_copies(&m.device, SOURCE, TARGET, 16);
        }
    });
    assert_eq!(m.device_status().dma_faults, 0, "there is no moment of neither");
    // Reading and writing are two transfers, so one may have been read here and written there.
    for address in [in_one, in_other] {
        let bytes = m.program.get(address, 16).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{bytes:?}");
    }
    m.program.device_copies(&m.device, SOURCE, TARGET, 16);
    assert_eq!(at(&m, in_one), 1);
}

#[test]
fn tables_are_for_pasids_or_not() {
    let mut m = Machine::new("edu");
    let (table, _) = m.space(1);
    let (other, _) = m.space(2);
    let ioas = m.program.ioas(m.iommu);
    let plain = m.program.hwpt(m.iommu, m.device.id, ioas).unwrap();
    assert_eq!(m.attach(5, plain), Err(Errno::INVAL), "not made for PASIDs");
    assert_eq!(m.attach(5, ioas), Err(Errno::INVAL), "what an address space makes is not either");
    assert_eq!(m.attach(5, m.device.id), Err(Errno::INVAL));
    assert_eq!(m.attach(5, 99), Err(Errno::NOENT));

    // Requests without a PASID are on a table for PASIDs too, or on none.
    for unfit in [plain, ioas] {
        m.program.attach(&m.device, unfit).unwrap();
        assert_eq!(m.attach(5, table), Err(Errno::INVAL));
    }
    m.program.attach(&m.device, other).unwrap();
    assert_eq!(m.attach(5, table), Ok(table));
    assert_eq!(m.attach(5, table), Ok(table), "again");
    for unfit in [plain, ioas] {
        assert_eq!(m.program.attach(&m.device, unfit), Err(Errno::INVAL));
        assert_eq!(m.attach(5, unfit), Err(Errno::INVAL));
    }
    assert_eq!(m.program.attach(&m.device, table), Ok(table), "the same one will do");
    let status = m.device_status();
    assert_eq!((status.attached_to, status.pasid_count), (Some(table), 1));
    assert_eq!((status.pasids[0].pasid, status.pasids[0].attached_to), (5, table));
    m.program.detach_pasid(&m.device, 5).unwrap();
    assert!(m.program.attach(&m.device, ioas).is_ok());
    assert_eq!(m.program.destroy(m.iommu, table), Ok(()));
}

#[test]
fn numbers_are_those_that_the_device_has() {
    let mut m = Machine::new("edu:pasids=4");
    let (table, in_table) = m.space(1);
    let info = iommufd::GetHwInfo { dev_id: m.device.id, ..Default::default() };
    assert_eq!(m.program.run(m.iommu, info).unwrap().out_max_pasid_log2, 4);
    for (pasid, expected) in [
        (0, Err(Errno::INVAL)),
        (1, Ok(table)),
        (15, Ok(table)),
        (16, Err(Errno::INVAL)),
        (1 << 20, Err(Errno::INVAL)),
        (i32::MAX as u32, Err(Errno::INVAL)),
        (1 << 31, Err(Errno::NOSPC)),
        (u32::MAX, Err(Errno::NOSPC)),
    ] {
        assert_eq!(m.attach(pasid, table), expected, "{pasid}");
    }
    m.copy(Some(15));
    assert_eq!(at(&m, in_table), 1);
    m.copy(Some(16));
    assert_eq!(m.device_status().dma_faults, 0, "the device does not make such a request");

    let m = Machine::new("edu:pasids=0");
    let ioas = m.program.ioas(m.iommu);
    let table = m.program.hwpt_for_pasids(m.iommu, m.device.id, ioas).unwrap();
    assert_eq!(m.attach(1, table), Err(Errno::INVAL), "no PASIDs at all");
    let info = iommufd::GetHwInfo { dev_id: m.device.id, ..Default::default() };
    assert_eq!(m.program.run(m.iommu, info).unwrap().out_max_pasid_log2, 0);
}

#[test]
fn a_pasid_needs_the_longer_argument() {
    let mut m = Machine::new("edu");
    let (table, _) = m.space(1);
    let attach = uapi::DeviceAttachIommufdPt { flags: 1, pasid: 5, pt_id: table, ..Default::default() };
    let detach = uapi::DeviceDetachIommufdPt { flags: 1, pasid: 5, ..Default::default() };
    let short = |number, mut bytes: Vec<u8>| {
        let length = bytes.len() as u32 - 1;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        m.program.call(m.device.fd, number, &mut bytes)
    };
    assert_eq!(short(uapi::DEVICE_ATTACH_IOMMUFD_PT, attach.as_bytes().to_vec()), Err(Errno::INVAL));
    assert_eq!(short(uapi::DEVICE_DETACH_IOMMUFD_PT, detach.as_bytes().to_vec()), Err(Errno::INVAL));

    // What ends where memory ends cannot be read; what cannot be written back leaves the PASID detached.
    m.program.map_memory(0x1000, PAGE);
    let end = 0x2000 - uapi::DeviceAttachIommufdPt::MIN_SIZE as u64;
    m.program.put(end, &attach.sized().as_bytes()[..12]).unwrap();
    assert_eq!(m.program.ioctl(m.device.fd, uapi::DEVICE_ATTACH_IOMMUFD_PT, end), Err(Errno::FAULT));
    m.program.put(0x1000, attach.sized().as_bytes()).unwrap();
    m.program.protect(0x1000, PAGE, false);
    assert_eq!(m.program.ioctl(m.device.fd, uapi::DEVICE_ATTACH_IOMMUFD_PT, 0x1000), Err(Errno::FAULT));
    assert_eq!(m.device_status().pasid_count, 0);
    assert_eq!(m.program.destroy(m.iommu, table), Ok(()));
}

#[test]
fn files_are_closed_in_any_order_and_nothing_is_left() {
    for device_first in [true, false] {
        let mut m = Machine::new("edu");
        let (table, _) = m.space(1);
        m.program.attach(&m.device, table).unwrap();
        for pasid in [1, 2, 0xf_ffff] {
            m.attach(pasid, table).unwrap();
        }
        m.copy(Some(2));
        assert_eq!(m.program.destroy(m.iommu, table), Err(Errno::BUSY));
        let (first, second) = match device_first {
            true => (m.device.fd, m.iommu),
            false => (m.iommu, m.device.fd),
        };
        m.program.close(first).unwrap();
        if device_first {
            assert_eq!(m.program.destroy(m.iommu, table), Ok(()), "nothing is attached any more");
        }
        m.program.close(second).unwrap();
        assert!(m.program.server.status().contexts.is_empty());
        assert_eq!(m.program.charged(), 0);
        assert!(m.program.held(0));

        // The next owner finds a device without PASIDs, and can use all of them.
        m.iommu = m.program.iommu();
        m.device = m.program.bind(m.iommu);
        m.mapped = 0;
        let (table, in_table) = m.space(7);
        m.copy(None);
        assert_eq!(m.device_status().pasid_count, 0);
        m.attach(2, table).unwrap();
        m.copy(Some(2));
        assert_eq!(at(&m, in_table), 7);
    }
}

/// Two devices, two owners: the same number is two address spaces.
#[test]
fn a_number_is_a_devices_own() {
    let devices = vec!["edu".parse().unwrap(), "edu".parse().unwrap()];
    let server = Server::new(ServerOptions { devices, ..Default::default() }).unwrap();
    let owner = |number| {
        let program = Program::of(&server);
        let iommu = program.iommu();
        let device = program.bind_device(iommu, number);
        let mut m = Machine { program, iommu, device, mapped: 0 };
        let (table, target) = m.space(10 + number as u8);
        m.attach(5, table).unwrap();
        (m, target)
    };
    let ((one, in_one), (other, in_other)) = (owner(0), owner(1));
    one.copy(Some(5));
    other.copy(Some(5));
    assert_eq!((at(&one, in_one), at(&other, in_other)), (10, 11));
    one.program.detach_pasid(&one.device, 5).unwrap();
    other.copy(Some(5));
    assert_eq!(server.status().contexts[1].devices[0].dma_faults, 0);
}

#[test]
fn pasids_are_counted_as_objects() {
    let limits = "objects=20".parse().unwrap();
    let server = Server::new(ServerOptions { limits, ..Default::default() }).unwrap();
    let program = Program::of(&server);
    let iommu = program.iommu();
    let device = program.bind(iommu);
    let ioas = program.ioas(iommu);
    let table = program.hwpt_for_pasids(iommu, device.id, ioas).unwrap();
    let attached = (1..100).take_while(|pasid| program.attach_pasid(&device, *pasid, table).is_ok()).count();
    assert_eq!(attached, 17);
    assert_eq!(program.attach_pasid(&device, 99, table), Err(Errno::NOMEM));
    assert_eq!(program.attach_pasid(&device, 5, table), Ok(table), "that one is there already");
    program.detach_pasid(&device, 5).unwrap();
    assert_eq!(program.attach_pasid(&device, 99, table), Ok(table));
}

/// A device of the test-only command, with PASIDs or without.
struct Mock {
    program: Arc<Program>,
    iommu: i32,
    test_device: u32,
    device: u32,
}

impl Mock {
    fn new(program: &Arc<Program>, iommu: i32, table: u32, dev_flags: u32) -> Mock {
        let made = test::MockDomainFlags { dev_flags, ..Default::default() };
        let made = program.test(iommu, table, &made).unwrap();
        let (test_device, device) = (made.out_stdev_id, made.out_idev_id);
        Mock { program: Arc::clone(program), iommu, test_device, device }
    }

    fn attach(&self, pasid: u32, pt_id: u32) -> Result<u32, Errno> {
        let asked = test::PasidAttach { pasid, pt_id };
        self.program.test(self.iommu, self.test_device, &asked).map(|answer| answer.pt_id)
    }

    fn replace(&self, pasid: u32, pt_id: u32) -> Result<u32, Errno> {
        let asked = test::PasidReplace { pasid, pt_id };
        self.program.test(self.iommu, self.test_device, &asked).map(|answer| answer.pt_id)
    }

    fn detach(&self, pasid: u32) -> Result<(), Errno> {
        self.program.test(self.iommu, self.test_device, &test::PasidDetach { pasid }).map(drop)
    }

    fn is_on(&self, pasid: u32, hwpt_id: u32) -> Result<(), Errno> {
        let asked = test::PasidCheckHwpt { pasid, hwpt_id };
        self.program.test(self.iommu, self.test_device, &asked).map(drop)
    }

    fn replace_plain(&self, pt_id: u32) -> Result<u32, Errno> {
        let asked = test::MockDomainReplace { pt_id };
        self.program.test(self.iommu, self.test_device, &asked).map(|answer| answer.pt_id)
    }
}

const HAS_PASIDS: u32 = test::MockDeviceFlags::PASID.bits();

/// What the kernel's own test of PASIDs does, but for nested tables.
#[test]
fn mock_devices_keep_the_rules_of_the_kernels_test() {
    let program = Arc::new(Program::new());
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let mock = Mock::new(&program, iommu, ioas, HAS_PASIDS);
    let unfit = program.hwpt(iommu, mock.device, ioas).unwrap();
    let table = program.hwpt_for_pasids(iommu, mock.device, ioas).unwrap();
    let second = program.hwpt_for_pasids(iommu, mock.device, ioas).unwrap();
    assert_eq!(mock.detach(100), Ok(()));

    mock.replace_plain(unfit).unwrap();
    assert_eq!(mock.attach(100, table), Err(Errno::INVAL));
    mock.replace_plain(table).unwrap();
    assert_eq!(mock.attach(100, second), Ok(second));
    for plain in [unfit, ioas] {
        assert_eq!(mock.replace_plain(plain), Err(Errno::INVAL));
    }
    assert_eq!(mock.is_on(100, second), Ok(()));
    assert_eq!(mock.is_on(100, table), Err(Errno::INVAL));
    assert_eq!(mock.is_on(100, 0), Err(Errno::INVAL));
    assert_eq!(mock.is_on(100, 99), Err(Errno::NOENT));
    assert_eq!(mock.is_on(0, table), Ok(()), "those without a PASID");
    for taken in [table, second, ioas, unfit] {
        assert_eq!(mock.attach(100, taken), Err(Errno::BUSY), "replacing is another operation");
    }
    mock.detach(100).unwrap();
    assert_eq!(mock.is_on(100, 0), Ok(()));

    assert_eq!(mock.replace(200, table), Err(Errno::INVAL), "there is nothing to replace");
    mock.attach(200, table).unwrap();
    assert_eq!(mock.replace(200, ioas), Err(Errno::INVAL));
    assert_eq!(mock.is_on(200, table), Ok(()));
    assert_eq!(mock.replace(200, second), Ok(second));
    assert_eq!(mock.is_on(200, second), Ok(()));

    // A replacement that the imagined hardware refuses.
    mock.attach(test::PASID_RESERVED, table).unwrap();
    assert_eq!(mock.replace(test::PASID_RESERVED, second), Err(Errno::NOMEM));
    assert_eq!(mock.is_on(test::PASID_RESERVED, table), Ok(()));
    assert_eq!(mock.replace(test::PASID_RESERVED, second), Ok(second));
    mock.detach(test::PASID_RESERVED).unwrap();
    mock.attach(test::PASID_RESERVED, table).unwrap();

    let without = Mock::new(&program, iommu, table, 0);
    for any in [unfit, table] {
        assert_eq!(without.attach(100, any), Err(Errno::INVAL));
    }
    // Destroying the test's device ends all of it.
    program.destroy(iommu, without.test_device).unwrap();
    assert_eq!(program.destroy(iommu, second), Err(Errno::BUSY));
    program.destroy(iommu, mock.test_device).unwrap();
    for gone in [second, table, unfit, ioas] {
        assert_eq!(program.destroy(iommu, gone), Ok(()));
    }
}

/// A table of another kind of the same mock hardware takes over, and back.
#[test]
fn a_pasid_moves_between_kinds_of_tables() {
    let program = Arc::new(Program::new());
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let nowhere = program.ioas(iommu);
    let on_nowhere = Mock::new(&program, iommu, nowhere, HAS_PASIDS);
    let table = program.hwpt_for_pasids(iommu, on_nowhere.device, ioas).unwrap();
    let mock = Mock::new(&program, iommu, table, HAS_PASIDS);
    program.put(BUFFER, &[[0; 4], 1_u32.to_ne_bytes()].concat()).unwrap();
    let huge = iommufd::HwptAlloc {
        flags: iommufd::HwptAllocFlags::PASID.bits(),
        dev_id: mock.device,
        pt_id: ioas,
        data_type: 0xdead,
        data_len: 8,
        data_uptr: BUFFER,
        ..Default::default()
    };
    let huge = program.run(iommu, huge).unwrap().out_hwpt_id;
    mock.attach(7, table).unwrap();
    for next in [huge, table, huge] {
        assert_eq!(mock.replace(7, next), Ok(next));
        assert_eq!(mock.is_on(7, next), Ok(()));
    }
    mock.detach(7).unwrap();
    assert_eq!(mock.attach(7, table), Ok(table), "nothing of it is left at the other kind");
}

#[test]
fn a_table_that_records_writes_needs_a_device_that_can() {
    let program = Arc::new(Program::new());
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let able = Mock::new(&program, iommu, ioas, HAS_PASIDS);
    let flags = (iommufd::HwptAllocFlags::PASID | iommufd::HwptAllocFlags::DIRTY_TRACKING).bits();
    let command = iommufd::HwptAlloc { flags, dev_id: able.device, pt_id: ioas, ..Default::default() };
    let recording = program.run(iommu, command).unwrap().out_hwpt_id;
    let beside = program.hwpt_for_pasids(iommu, able.device, ioas).unwrap();
    able.replace_plain(beside).unwrap();
    assert_eq!(able.attach(100, recording), Ok(recording));
    let unable = HAS_PASIDS | test::MockDeviceFlags::NO_DIRTY.bits();
    let unable = Mock::new(&program, iommu, beside, unable);
    assert_eq!(unable.attach(100, recording), Err(Errno::INVAL));
    assert_eq!(unable.attach(100, beside), Ok(beside));
}

/// Writes with a PASID are writes of the table's.
#[test]
fn writes_with_a_pasid_are_recorded() {
    let mut m = Machine::new("edu:table=vtd");
    let (other, _) = m.space(1);
    let ioas = m.program.ioas(m.iommu);
    m.program.map_fixed(m.iommu, ioas, BUFFER + m.mapped, 2 * PAGE, SOURCE).unwrap();
    let flags = (iommufd::HwptAllocFlags::PASID | iommufd::HwptAllocFlags::DIRTY_TRACKING).bits();
    let command = iommufd::HwptAlloc { flags, dev_id: m.device.id, pt_id: ioas, ..Default::default() };
    let table = m.program.run(m.iommu, command).unwrap().out_hwpt_id;
    m.program.attach(&m.device, other).unwrap();
    m.attach(5, table).unwrap();
    let track = iommufd::HwptSetDirtyTracking { flags: 1, hwpt_id: table, ..Default::default() };
    m.program.run(m.iommu, track).unwrap();
    let written = || {
        let bitmap = BUFFER + BUFFER_SIZE - PAGE;
        m.program.put(bitmap, &[0; 8]).unwrap();
        let get = iommufd::HwptGetDirtyBitmap {
            hwpt_id: table,
            iova: SOURCE,
            length: 2 * PAGE,
            page_size: PAGE,
            data: bitmap,
            ..Default::default()
        };
        m.program.run(m.iommu, get).unwrap();
        m.program.get(bitmap, 1).unwrap()[0]
    };
    m.program.device_copies(&m.device, SOURCE, TARGET, 16);
    assert_eq!(written(), 0, "requests without the PASID are on another table");
    m.program.use_pasid(&m.device, Some(5));
    m.program.device_copies(&m.device, SOURCE, SOURCE + PAGE, 16);
    assert_eq!(written(), 2);
    assert_eq!(written(), 0);
}

/// What may be attached: an address space, a table of it that is not for PASIDs, and tables of two spaces that are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Space,
    Plain,
    First,
    Second,
}

impl Table {
    const ALL: [Table; 4] = [Table::Space, Table::Plain, Table::First, Table::Second];

    fn is_for_pasids(self) -> bool {
        matches!(self, Table::First | Table::Second)
    }

    /// The mark of the space that it leads to.
    fn mark(self) -> u8 {
        if self == Table::Second { 2 } else { 1 }
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Requests with this PASID; 0: without one.
    Attach(u32, Table),
    Detach(u32),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let attach = (0..3_u32, 0..4_usize).prop_map(|(pasid, table)| Step::Attach(pasid, Table::ALL[table]));
    let step = prop_oneof![6 => attach, 2 => (0..3_u32).prop_map(Step::Detach), 1 => Just(Step::Reset)];
    prop::collection::vec(step, 1..30)
}

/// The rules, as plainly as they can be said.
fn allowed(attached: &[Option<Table>; 3], pasid: u32, table: Table) -> bool {
    match pasid {
        0 => table.is_for_pasids() || attached[1..].iter().all(Option::is_none),
        _ => table.is_for_pasids() && attached[0].is_none_or(Table::is_for_pasids),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever is attached and detached in whatever order: each call answers by the rules, and each request goes where the
    /// latest call that succeeded has sent it.
    #[test]
    fn every_request_goes_where_it_was_sent(steps in steps()) {
        let mut m = Machine::new("edu");
        let (first, _) = m.space(1);
        let (second, _) = m.space(2);
        // The address space has the number before its table's.
        let space = first - 1;
        let plain = m.program.hwpt(m.iommu, m.device.id, space).unwrap();
        let number = |table| match table {
            Table::Space => space,
            Table::Plain => plain,
            Table::First => first,
            Table::Second => second,
        };
        let mut attached = [None; 3];
        for step in steps {
            match step {
                Step::Attach(pasid, table) => {
                    let result = match pasid {
                        0 => m.program.attach(&m.device, number(table)),
                        _ => m.attach(pasid, number(table)),
                    };
                    let expected = allowed(&attached, pasid, table);
                    prop_assert_eq!(result.map(drop), if expected { Ok(()) } else { Err(Errno::INVAL) });
                    if expected {
                        attached[pasid as usize] = Some(table);
                    }
                }
                Step::Detach(pasid) => {
                    let result = match pasid {
                        0 => m.program.detach(&m.device),
                        _ => m.program.detach_pasid(&m.device, pasid),
                    };
                    prop_assert_eq!(result, Ok(()));
                    attached[pasid as usize] = None;
                }
                Step::Reset => {
                    m.program.ioctl(m.device.fd, uapi::DEVICE_RESET, 0).unwrap();
                }
            }
            for (pasid, table) in (0..3).zip(attached) {
                m.program.use_pasid(&m.device, Some(pasid).filter(|pasid| *pasid != 0));
                let faults = m.device_status().dma_faults;
                m.program.device_copies(&m.device, SOURCE, TARGET, 1);
                let faults = m.device_status().dma_faults - faults;
                prop_assert_eq!(faults, if table.is_some() { 0 } else { 2 });
                if let Some(table) = table {
                    let target = BUFFER + 2 * PAGE * u64::from(table.mark() - 1) + PAGE;
                    prop_assert_eq!(at(&m, target), table.mark());
                    m.program.put(target, &[0]).unwrap();
                }
            }
            let status = m.device_status();
            prop_assert_eq!(status.pasid_count, attached[1..].iter().flatten().count());
        }
    }
}
