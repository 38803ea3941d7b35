//! The test-only command: mock devices, users of pages, dma-bufs, and that none of it is there unless asked for.

mod program;

use ioasid_server::{Errno, Server, ServerOptions};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test as test;
use ioasid_uapi::iommufd_test::{MOCK_APERTURE_LAST, MOCK_APERTURE_START, MOCK_PAGE_SIZE, TestCommand};
use program::*;
use zerocopy::IntoBytes;

const APERTURE: u64 = MOCK_APERTURE_START;

struct Fixture {
    program: Program,
    fd: i32,
    ioas: u32,
}

impl Fixture {
    fn new() -> Self {
        let program = Program::new();
        let fd = program.iommu();
        let ioas = program.ioas(fd);
        Self { program, fd, ioas }
    }

    fn mock(&self, table: u32) -> Result<test::MockDomain, Errno> {
        self.program.test(self.fd, table, &test::MockDomain::default())
    }

    fn check_map(&self, table: u32, iova: u64, uptr: u64, length: u64) -> Result<(), Errno> {
        self.program.test(self.fd, table, &test::CheckMap { iova, length, uptr }).map(drop)
    }

    fn refs(&self, uptr: u64, length: u64, refs: u32) -> Result<(), Errno> {
        self.program.test(self.fd, 0, &test::CheckRefs { uptr, length, refs, padding: 0 }).map(drop)
    }

    fn access(&self, flags: u32) -> Result<u32, Errno> {
        let create = test::CreateAccess { flags, ..Default::default() };
        self.program.test(self.fd, self.ioas, &create).map(|access| access.out_access_fd)
    }

    fn pin(&self, access: u32, iova: u64, length: u64, uptr: u64) -> Result<u32, Errno> {
        let pages = test::AccessPages { iova, length, uptr, ..Default::default() };
        self.program.test(self.fd, access, &pages).map(|pages| pages.out_access_pages_id)
    }

    fn unpin(&self, access: u32, access_pages_id: u32) -> Result<(), Errno> {
        self.program.test(self.fd, access, &test::DestroyAccessPages { access_pages_id }).map(drop)
    }

    fn copy(&self, access: u32, iova: u64, length: u64, uptr: u64, flags: u32) -> Result<(), Errno> {
        let copy = test::AccessRw { iova, length, uptr, flags, padding: 0 };
        self.program.test(self.fd, access, &copy).map(drop)
    }

    /// A dma-buf's descriptor, which is the ioctl's result.
    fn dma_buf(&self, length: u32) -> Result<i32, Errno> {
        let mut command = TestCommand { size: 0, op: test::OP_DMABUF_GET, ..TestCommand::default() }.sized();
        command.set_payload(&test::DmabufGet { length, open_flags: 0 });
        self.program.client.call(self.fd, TestCommand::NUMBER, command.as_mut_bytes()).map(|fd| fd as i32)
    }

    fn revoke(&self, dmabuf_fd: i32, revoked: u32) -> Result<(), Errno> {
        self.program.test(self.fd, 0, &test::DmabufRevoke { dmabuf_fd, revoked }).map(drop)
    }
}

const NEEDS_PIN: u32 = test::CreateAccessFlags::NEEDS_PIN_PAGES.bits();
const WRITE: u32 = test::AccessRwFlags::WRITE.bits();

#[test]
fn a_production_kernel_has_no_such_command() {
    let server = Server::new(ServerOptions::default()).unwrap();
    let program = Program::of(&server);
    let fd = program.iommu();
    let ioas = program.ioas(fd);
    assert_eq!(program.test(fd, ioas, &test::MockDomain::default()).map(drop), Err(Errno::NOTTY));
    assert_eq!(program.client.ioctl(fd, TestCommand::NUMBER, 1), Err(Errno::NOTTY), "not even read");
}

#[test]
fn a_mock_device_has_an_aperture_and_pages_of_2_kib() {
    let f = Fixture::new();
    f.program.map_fixed(f.fd, f.ioas, BUFFER, PAGE, APERTURE + 1).unwrap();
    assert_eq!(f.mock(f.ioas).map(drop), Err(Errno::ADDRINUSE), "an area that its table cannot hold");
    f.program.unmap(f.fd, f.ioas, 0, u64::MAX).unwrap();
    f.program.map_fixed(f.fd, f.ioas, BUFFER + MOCK_PAGE_SIZE, PAGE, APERTURE).unwrap();
    let mock = f.mock(f.ioas).unwrap();
    let (result, count, alignment, ranges) = f.program.iova_ranges(f.fd, f.ioas, 1);
    assert_eq!((result, count, alignment), (Ok(()), 1, MOCK_PAGE_SIZE));
    assert_eq!(ranges, [(APERTURE, MOCK_APERTURE_LAST)]);
    assert_eq!(f.check_map(mock.out_hwpt_id, APERTURE, BUFFER + MOCK_PAGE_SIZE, PAGE), Ok(()));
    assert_eq!(f.check_map(mock.out_hwpt_id, APERTURE, BUFFER, PAGE), Err(Errno::INVAL), "other pages");
    let beyond = APERTURE + PAGE;
    assert_eq!(f.check_map(mock.out_hwpt_id, beyond, BUFFER, PAGE), Err(Errno::INVAL), "not mapped");
    assert_eq!(f.refs(BUFFER, 2 * PAGE, 1), Ok(()), "both pages are held, once");

    assert_eq!(f.program.destroy(f.fd, f.ioas), Err(Errno::BUSY));
    assert_eq!(f.program.destroy(f.fd, mock.out_idev_id), Err(Errno::BUSY), "the test's object uses it");
    assert_eq!(f.program.destroy(f.fd, mock.out_stdev_id), Ok(()));
    assert_eq!(f.refs(BUFFER, 2 * PAGE, 0), Ok(()));
    assert_eq!(f.program.destroy(f.fd, mock.out_hwpt_id), Err(Errno::NOENT), "it went with its device");
    assert_eq!(f.program.destroy(f.fd, f.ioas), Ok(()));
}

#[test]
fn mock_devices_on_one_space_share_its_table_and_can_move() {
    let f = Fixture::new();
    let (first, second) = (f.mock(f.ioas).unwrap(), f.mock(f.ioas).unwrap());
    assert_eq!(first.out_hwpt_id, second.out_hwpt_id);
    let other = f.program.ioas(f.fd);
    let replace = |device, pt_id| {
        let moved = f.program.test(f.fd, device, &test::MockDomainReplace { pt_id });
        moved.map(|moved| moved.pt_id)
    };
    let table = replace(first.out_stdev_id, other).unwrap();
    assert_ne!(table, second.out_hwpt_id);
    assert_eq!(replace(first.out_stdev_id, 99), Err(Errno::NOENT));
    assert_eq!(replace(first.out_stdev_id, first.out_idev_id), Err(Errno::INVAL), "no table");
    assert_eq!(replace(other, f.ioas), Err(Errno::NOENT), "no test device");
    assert_eq!(replace(first.out_stdev_id, second.out_hwpt_id), Ok(second.out_hwpt_id));
    assert_eq!(f.program.destroy(f.fd, other), Ok(()), "nobody is there any more");
    f.program.close(f.fd).unwrap();
    assert!(f.program.server.status().contexts.is_empty());
}

#[test]
fn wrong_mock_devices_are_refused_and_leave_nothing() {
    let f = Fixture::new();
    let flags = |dev_flags| {
        let mock = test::MockDomainFlags { dev_flags, ..Default::default() };
        f.program.test(f.fd, f.ioas, &mock).map(drop)
    };
    assert_eq!(flags(2), Err(Errno::INVAL));
    assert_eq!(f.mock(0).map(drop), Err(Errno::NOENT));
    assert!(f.program.server.status().contexts[0].devices.is_empty());
    // Each has two objects; the limit of objects is the limit of devices.
    let mut made = 0;
    let refused = loop {
        match f.mock(f.ioas) {
            Ok(_) => made += 1,
            Err(error) => break error,
        }
    };
    let most = ioasid_server::Limits::default().objects.per_client;
    assert_eq!((refused, made), (Errno::NOMEM, (most - 2) / 2));
}

#[test]
fn a_real_device_and_a_mock_device_need_the_same_granule() {
    let f = Fixture::new();
    f.program.map_fixed(f.fd, f.ioas, BUFFER, PAGE, APERTURE).unwrap();
    let device = f.program.bind(f.fd);
    f.program.attach(&device, f.ioas).unwrap();
    assert_eq!(f.mock(f.ioas).map(drop), Err(Errno::INVAL), "the space has pages of 4 KiB now");
    f.program.detach(&device).unwrap();
    let mock = f.mock(f.ioas).unwrap();
    f.program.attach(&device, f.ioas).unwrap();
    let (_, _, alignment, _) = f.program.iova_ranges(f.fd, f.ioas, 4);
    assert_eq!(alignment, PAGE);
    assert_eq!(f.check_map(mock.out_hwpt_id, APERTURE, BUFFER, PAGE), Ok(()));
}

#[test]
fn reservations_and_allowed_ranges_outlive_a_change_of_the_granule() {
    let f = Fixture::new();
    f.program.test(f.fd, f.ioas, &test::AddReserved { start: APERTURE, length: PAGE }).unwrap();
    f.program.allow(f.fd, f.ioas, &[(APERTURE + PAGE, APERTURE + 3 * PAGE - 1)]).unwrap();
    f.mock(f.ioas).unwrap();
    assert_eq!(f.program.map_fixed(f.fd, f.ioas, BUFFER, PAGE, APERTURE), Err(Errno::INVAL));
    let placed = [(); 3].map(|()| f.program.map(f.fd, f.ioas, BUFFER, PAGE));
    assert_eq!(placed, [Ok(APERTURE + PAGE), Ok(APERTURE + 2 * PAGE), Err(Errno::NOSPC)]);
}

#[test]
fn pins_hold_pages_without_a_table_until_they_are_given_back() {
    let f = Fixture::new();
    f.program.map_fixed(f.fd, f.ioas, BUFFER, 4 * PAGE, 0).unwrap();
    let plain = f.access(0).unwrap();
    assert_eq!(f.pin(plain, 0, PAGE, 0), Err(Errno::OPNOTSUPP), "it did not say that it would");
    let access = f.access(NEEDS_PIN).unwrap();
    let pin = f.pin(access, PAGE - 1, 2, BUFFER + PAGE - 1).unwrap();
    assert_eq!(f.refs(BUFFER, 2 * PAGE, 1), Ok(()), "one byte of each");
    assert_eq!(f.refs(BUFFER + 2 * PAGE, PAGE, 0), Ok(()));
    assert_eq!(f.program.charged(), 2);
    assert_eq!(f.pin(access, 0, PAGE, BUFFER + PAGE), Err(Errno::BADE), "not those pages");
    assert_eq!(f.pin(access, 3 * PAGE, 2 * PAGE, 0), Err(Errno::NOENT));
    assert_eq!(f.pin(access, 0, 0, 0), Err(Errno::INVAL));
    assert_eq!(f.pin(access, u64::MAX, 2, 0), Err(Errno::OVERFLOW));
    assert_eq!(f.pin(access, 0, u64::MAX, 0), Err(Errno::NOMEM));
    assert_eq!(f.pin(f.fd as u32, 0, PAGE, 0), Err(Errno::BADFD));
    assert_eq!(f.pin(99, 0, PAGE, 0), Err(Errno::BADFD));
    assert_eq!(f.refs(BUFFER, PAGE, 1), Ok(()), "what was refused holds nothing");
    assert_eq!(f.unpin(access, pin + 1), Err(Errno::NOENT));
    assert_eq!(f.unpin(access, pin), Ok(()));
    assert_eq!(f.unpin(access, pin), Err(Errno::NOENT));
    assert_eq!((f.refs(BUFFER, PAGE, 0), f.program.charged()), (Ok(()), 0));
}

#[test]
fn an_access_is_asked_to_let_go_of_what_is_unmapped_and_of_nothing_else() {
    let f = Fixture::new();
    for page in 0..3 {
        f.program.map_fixed(f.fd, f.ioas, BUFFER + page * PAGE, PAGE, page * PAGE).unwrap();
    }
    let access = f.access(NEEDS_PIN).unwrap();
    let both = f.pin(access, 0, 2 * PAGE, 0).unwrap();
    let third = f.pin(access, 2 * PAGE, PAGE, 0).unwrap();
    assert_eq!(f.program.unmap(f.fd, f.ioas, PAGE, PAGE), Ok(PAGE));
    assert_eq!(f.unpin(access, both), Err(Errno::NOENT), "the pin reached into what is gone");
    assert_eq!(f.refs(BUFFER, 2 * PAGE, 0), Ok(()));
    assert_eq!(f.refs(BUFFER + 2 * PAGE, PAGE, 1), Ok(()));
    assert_eq!(f.unpin(access, third), Ok(()));
}

#[test]
fn an_access_keeps_its_space_and_ends_with_its_last_descriptor() {
    let f = Fixture::new();
    f.program.map_fixed(f.fd, f.ioas, BUFFER, PAGE, 0).unwrap();
    let access = f.access(NEEDS_PIN).unwrap();
    f.pin(access, 0, PAGE, 0).unwrap();
    assert_eq!(f.program.destroy(f.fd, f.ioas), Err(Errno::BUSY));
    let other = f.program.ioas(f.fd);
    let moved = f.program.test(f.fd, access, &test::AccessReplaceIoas { ioas_id: other });
    assert!(moved.is_ok());
    assert_eq!(f.refs(BUFFER, PAGE, 0), Ok(()), "what it had pinned there is gone");
    assert_eq!(f.program.destroy(f.fd, f.ioas), Ok(()));
    // The number of the access itself is an object that nobody can destroy.
    let all = (1..10).map(|id| f.program.destroy(f.fd, id)).filter(|result| *result == Err(Errno::BUSY));
    assert_eq!(all.count(), 2, "the access and its space");
    let child = f.program.forked();
    f.program.close(access as i32).unwrap();
    f.program.close(f.fd).unwrap();
    assert_eq!(f.program.server.status().contexts.len(), 1, "the child has both");
    drop(child);
    assert!(f.program.server.status().contexts.is_empty());
}

#[test]
fn pinning_accesses_want_whole_pages() {
    let f = Fixture::new();
    f.program.map_fixed(f.fd, f.ioas, BUFFER + 1, PAGE, 1).unwrap();
    assert_eq!(f.access(NEEDS_PIN), Err(Errno::ADDRINUSE));
    assert_eq!(f.access(2), Err(Errno::OPNOTSUPP));
    f.program.unmap(f.fd, f.ioas, 0, u64::MAX).unwrap();
    let access = f.access(NEEDS_PIN).unwrap();
    assert_eq!(f.program.map_fixed(f.fd, f.ioas, BUFFER + 1, PAGE, 1), Err(Errno::INVAL));
    f.program.close(access as i32).unwrap();
    f.program.map_fixed(f.fd, f.ioas, BUFFER + 1, PAGE, 1).unwrap();
}

#[test]
fn an_access_copies_by_iova_over_areas_with_and_without_a_table() {
    let f = Fixture::new();
    const OTHER: u64 = BUFFER + 8 * PAGE;
    for _ in 0..2 {
        // Two areas whose memory is in the other order.
        f.program.map_fixed(f.fd, f.ioas, BUFFER + PAGE, PAGE, APERTURE).unwrap();
        f.program.map_fixed(f.fd, f.ioas, BUFFER, PAGE, APERTURE + PAGE).unwrap();
        let access = f.access(0).unwrap();
        f.program.put(OTHER, b"across").unwrap();
        f.copy(access, APERTURE + PAGE - 3, 6, OTHER, WRITE).unwrap();
        assert_eq!(f.program.get(BUFFER + 2 * PAGE - 3, 3).unwrap(), b"acr");
        assert_eq!(f.program.get(BUFFER, 3).unwrap(), b"oss");
        f.copy(access, APERTURE + PAGE - 1, 3, OTHER + 100, 0).unwrap();
        assert_eq!(f.program.get(OTHER + 100, 3).unwrap(), b"ros");
        assert_eq!(f.copy(access, APERTURE - 1, 2, OTHER, 0), Err(Errno::NOENT));
        assert_eq!(f.copy(access, APERTURE, 2, 8, 0), Err(Errno::FAULT));
        assert_eq!(f.copy(access, APERTURE, 2, OTHER, 2), Err(Errno::OPNOTSUPP));
        assert_eq!(f.copy(access, APERTURE, u64::MAX, OTHER, 0), Err(Errno::NOMEM));
        assert_eq!(f.copy(access, u64::MAX, 2, OTHER, 0), Err(Errno::OVERFLOW));
        f.program.client.protect(BUFFER, BUFFER_SIZE, true);
        f.program.close(access as i32).unwrap();
        f.program.unmap(f.fd, f.ioas, 0, u64::MAX).unwrap();
        assert_eq!(f.program.charged(), 0, "copies hold nothing afterwards");
        f.mock(f.ioas).unwrap();
    }
}

#[test]
fn a_revoked_dma_buf_is_gone_where_it_is_mapped_and_can_be_had_again() {
    let f = Fixture::new();
    assert_eq!(f.dma_buf(0), Err(Errno::INVAL));
    assert_eq!(f.dma_buf((2 << 20) + 1), Err(Errno::INVAL));
    let buffer = f.dma_buf(4 * PAGE as u32).unwrap();
    let map = |start, length| f.program.map_file(f.fd, f.ioas, buffer, start, length);
    assert_eq!(map(0, 4 * PAGE + 1), Err(Errno::INVAL));
    assert_eq!(map(4 * PAGE, PAGE), Err(Errno::INVAL));
    let first = map(0, 4 * PAGE).unwrap();
    let access = f.access(NEEDS_PIN).unwrap();
    assert_eq!(f.pin(access, first, PAGE, 0), Err(Errno::INVAL), "its pages are a driver's");
    assert_eq!(f.copy(access, first, 1, BUFFER, 0), Err(Errno::INVAL));

    assert_eq!(f.revoke(buffer, 1), Ok(()));
    assert_eq!(map(0, PAGE), Err(Errno::NODEV));
    let mock = f.mock(f.ioas);
    assert_eq!(mock.map(drop), Err(Errno::ADDRINUSE), "it lies in front of the aperture");
    f.program.unmap(f.fd, f.ioas, first, 4 * PAGE).unwrap();
    f.mock(f.ioas).unwrap();
    assert_eq!(f.revoke(buffer, 0), Ok(()));
    let leaves = || f.program.server.status().contexts[0].address_spaces[0].leaves.len();
    let mapped = map(0, 4 * PAGE).unwrap();
    assert_eq!((leaves(), f.program.charged()), (1, 0), "nobody is charged");
    assert_eq!(f.revoke(buffer, 1), Ok(()));
    assert_eq!(leaves(), 0, "no device reaches it any more");
    let table = f.mock(f.ioas);
    assert!(table.is_ok(), "what is gone is in nobody's way");
    assert_eq!(f.revoke(buffer, 0), Ok(()));
    assert_eq!(leaves(), 0, "what was mapped stays empty");
    assert_eq!(f.program.unmap(f.fd, f.ioas, mapped, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(f.revoke(f.fd, 1), Err(Errno::INVAL));
    assert_eq!(f.revoke(99, 1), Err(Errno::BADF));
}

#[test]
fn hardware_information_of_a_mock_device() {
    let f = Fixture::new();
    let mock = f.mock(f.ioas).unwrap();
    let ask = |data_type: u32, flags: u32, data_len: u32| {
        f.program.put(BUFFER, &[0xff; 16]).unwrap();
        let dev_id = mock.out_idev_id;
        let info =
            uapi::GetHwInfo { dev_id, data_type, flags, data_len, data_uptr: BUFFER, ..Default::default() };
        f.program.run(f.fd, info).map(|info| (info.data_len, f.program.get(BUFFER, 16).unwrap()))
    };
    let data = [[0; 4], 0xdead_beef_u32.to_ne_bytes()].concat();
    assert_eq!(ask(0, 0, 12), Ok((8, [&data[..], &[0; 4], &[0xff; 4]].concat())), "the rest is zeroed");
    assert_eq!(ask(0xfeed_beef, 1, 4), Ok((8, [&data[..4], &[0xff; 12]].concat())), "as much as fits");
    assert_eq!(ask(7, 1, 12).map(drop), Err(Errno::OPNOTSUPP));
}
