//! Arbitrary sequences of system calls against the in-process server.
//!
//! Two programs, of which the second starts as a fork of the first and so shares its files, open and close files,
//! perform commands and let the edu device do DMA. Commands are mostly well-formed, with values that are near each
//! other or at an edge, so that they meet; some are raw bytes. At the end everything is closed, and whatever happened,
//! nothing may be left: no context, no charge.
//!
//! `cargo +nightly fuzz run server -- -max_total_time=60`

#![no_main]

use std::path::Path;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use ioasid_server::{DeviceOptions, InProcess, Opened, Server, ServerOptions, TableKind};
use ioasid_uapi::{Command, iommufd, iommufd_test, vfio};
use libfuzzer_sys::fuzz_target;
use zerocopy::{FromZeros, IntoBytes};

const PAGE: u64 = 4096;
/// Memory of the first program: small, where most addresses point, and large, for large leaves.
const BUFFER: u64 = 0x10_0000;
const BUFFER_SIZE: u64 = 32 * PAGE;
const LARGE: u64 = 0x10_0000_0000;
const LARGE_SIZE: u64 = 4 << 30;
/// How many pages the second program may lock.
const LIMIT: u64 = 24;
const FILE_SIZE: u64 = 8 * PAGE;

#[derive(Arbitrary, Debug)]
enum Call {
    OpenIommu,
    OpenDevice(u8),
    Close(Fd),
    Protect {
        page: u8,
        pages: u8,
        writable: bool,
    },
    Raw {
        fd: Fd,
        number: Number,
        bytes: Vec<u8>,
    },
    Pointer {
        fd: Fd,
        number: Number,
        address: Address,
    },
    Destroy {
        fd: Fd,
        id: Id,
    },
    IoasAlloc {
        fd: Fd,
    },
    Map {
        fd: Fd,
        ioas: Id,
        flags: Flags,
        address: Address,
        length: Length,
        iova: Address,
    },
    MapFile {
        fd: Fd,
        ioas: Id,
        flags: Flags,
        file: Fd,
        start: Address,
        length: Length,
        iova: Address,
    },
    Copy {
        fd: Fd,
        from: Id,
        to: Id,
        flags: Flags,
        source: Address,
        length: Length,
        destination: Address,
    },
    Unmap {
        fd: Fd,
        ioas: Id,
        iova: Address,
        length: Length,
    },
    UnmapAll {
        fd: Fd,
        ioas: Id,
    },
    Ranges {
        fd: Fd,
        ioas: Id,
        room: u8,
        array: Address,
    },
    Allow {
        fd: Fd,
        ioas: Id,
        ranges: Vec<(Address, Length)>,
    },
    Option {
        fd: Fd,
        option: u8,
        op: u8,
        object: Id,
        value: u8,
    },
    HwptAlloc {
        fd: Fd,
        device: Id,
        parent: Id,
        flags: u8,
    },
    ChangeProcess {
        fd: Fd,
    },
    VfioIoas {
        fd: Fd,
        op: u8,
        ioas: Id,
    },
    /// CHECK_EXTENSION and SET_IOMMU.
    VfioNumber {
        fd: Fd,
        set: bool,
        value: u8,
    },
    VfioInfo {
        fd: Fd,
        room: u8,
        address: Address,
    },
    VfioMap {
        fd: Fd,
        flags: u8,
        address: Address,
        length: Length,
        iova: Address,
    },
    VfioUnmap {
        fd: Fd,
        flags: u8,
        iova: Address,
        length: Length,
    },
    TrackWrites {
        fd: Fd,
        table: Id,
        flags: u8,
    },
    Written {
        fd: Fd,
        table: Id,
        flags: u8,
        iova: Address,
        length: Length,
        page: u8,
        bitmap: Address,
    },
    HwInfo {
        fd: Fd,
        device: Id,
        room: u16,
        address: Address,
    },
    AddReserved {
        fd: Fd,
        ioas: Id,
        start: Address,
        length: Length,
    },
    CheckRefs {
        fd: Fd,
        address: Address,
        pages: u8,
        refs: u8,
    },
    Test {
        fd: Fd,
        op: u8,
        id: u8,
        payload: [Word; 6],
    },
    Bind {
        fd: Fd,
        iommu: Fd,
    },
    Attach {
        fd: Fd,
        table: Id,
    },
    Detach {
        fd: Fd,
    },
    AttachPasid {
        fd: Fd,
        pasid: Number20,
        table: Id,
    },
    DetachPasid {
        fd: Fd,
        pasid: Number20,
    },
    /// Chooses the PASID of a device's transfers.
    UsePasid {
        fd: Fd,
        pasid: Option<Number20>,
    },
    /// The PASID operations of the test-only command, and a device for them.
    MockDevice {
        fd: Fd,
        table: Id,
        flags: u8,
    },
    MockPasid {
        fd: Fd,
        op: u8,
        device: Id,
        pasid: Number20,
        table: Id,
    },
    Reset {
        fd: Fd,
    },
    Read {
        fd: Fd,
        index: u8,
        offset: u32,
        length: u8,
    },
    Write {
        fd: Fd,
        index: u8,
        offset: u32,
        bytes: Vec<u8>,
    },
    Dma {
        fd: Fd,
        iova: Address,
        length: u16,
        to_memory: bool,
        wait: bool,
    },
    Truncate(u8),
    Status,
}

/// A word of what an operation of the test-only command reads in its own way: two small numbers, or one of the others.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Word {
    Pair(u8, u8),
    Address(Address),
    Length(Length),
}

impl Word {
    fn get(self) -> u64 {
        match self {
            Word::Pair(low, high) => u64::from(low) | u64::from(high) << 32,
            Word::Address(address) => address.get(),
            Word::Length(length) => length.get(),
        }
    }
}

/// A descriptor: one of those that are likely open.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Fd(u8);

impl Fd {
    fn get(self) -> i32 {
        match self.0 {
            0xff => -1,
            number => 3 + i32::from(number % 10),
        }
    }
}

/// An object number.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Id(u8);

impl Id {
    fn get(self) -> u32 {
        u32::from(self.0 % 12)
    }
}

/// A PASID: one of a few, the largest, the one that the mock hardware treats in its own way, or none that exists.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Number20(u8);

impl Number20 {
    fn get(self) -> u32 {
        match self.0 {
            0xff => u32::MAX,
            0xfe => 1 << 20,
            0xfd => (1 << 20) - 1,
            0xf0..=0xfc => iommufd_test::PASID_RESERVED,
            number => u32::from(number % 4),
        }
    }
}

/// A command number, mostly one that exists.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Number {
    Iommufd(u8),
    Device(u8),
    Container(u8),
    Any(u32),
}

impl Number {
    fn get(self) -> u32 {
        match self {
            Self::Iommufd(index) => iommufd::COMMANDS[usize::from(index) % iommufd::COMMANDS.len()].number,
            Self::Device(index) => vfio::DEVICE_COMMANDS[usize::from(index) % vfio::DEVICE_COMMANDS.len()].0,
            Self::Container(index) => {
                vfio::CONTAINER_COMMANDS[usize::from(index) % vfio::CONTAINER_COMMANDS.len()].0
            }
            Self::Any(number) => number,
        }
    }
}

/// Flags of a mapping, mostly good ones.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Flags(u8);

impl Flags {
    fn get(self) -> u32 {
        if self.0 < 0xf0 { u32::from(self.0 % 8) } else { u32::from(self.0) }
    }
}

/// An address, an IOVA or an offset: in the memory that exists, small, at the end, or anything.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Address {
    Page(u8),
    Buffer { page: u8, byte: u16 },
    Large(u16),
    Small(u16),
    End(u16),
    Window(u8),
    Any(u64),
}

impl Address {
    fn get(self) -> u64 {
        match self {
            Self::Page(page) => u64::from(page) * PAGE,
            Self::Buffer { page, byte } => BUFFER + u64::from(page % 40) * PAGE + u64::from(byte % 4096),
            Self::Large(mebibytes) => LARGE + (u64::from(mebibytes % 4200) << 20),
            Self::Small(bytes) => u64::from(bytes),
            Self::End(bytes) => u64::MAX - u64::from(bytes),
            Self::Window(page) => 0xfee0_0000 - 8 * PAGE + u64::from(page) * PAGE,
            Self::Any(address) => address,
        }
    }
}

/// A length in bytes.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Length {
    Pages(u8),
    Bytes(u16),
    Mebibytes(u16),
    Any(u64),
}

impl Length {
    fn get(self) -> u64 {
        match self {
            Self::Pages(pages) => u64::from(pages % 40) * PAGE,
            Self::Bytes(bytes) => u64::from(bytes),
            Self::Mebibytes(mebibytes) => u64::from(mebibytes % 4200) << 20,
            Self::Any(length) => length,
        }
    }
}

/// The size word in front, and the call.
fn run<T: Command>(client: &InProcess, fd: Fd, mut command: T) {
    let size = (T::SIZE as u32).to_ne_bytes();
    command.as_mut_bytes()[..4].copy_from_slice(&size);
    let _ = client.call(fd.get(), T::NUMBER, command.as_mut_bytes());
}

fn test<T: iommufd_test::Operation>(client: &InProcess, fd: Fd, id: u32, operation: &T) {
    let mut command = iommufd_test::TestCommand { op: T::OP, id, ..FromZeros::new_zeroed() };
    command.set_payload(operation);
    run(client, fd, command);
}

fn region(index: u8, offset: u64) -> u64 {
    ioasid_server::REGION_MAGIC | u64::from(index) << 40 | offset
}

fn open(server: &Arc<Server>, client: &InProcess, path: &str) {
    match server.open(client, Path::new(path)) {
        Some(Ok(Opened::File(file))) => {
            client.insert(file);
        }
        Some(Ok(Opened::Text(_)) | Err(_)) => {}
        None => panic!("{path} is ours"),
    }
}

fn dma(client: &InProcess, fd: i32, iova: u64, length: u16, to_memory: bool, wait: bool) {
    const BUFFER_IN_DEVICE: u64 = 0x40000;
    let _ = client.pwrite(fd, region(7, 4), &[6, 0]);
    let (source, destination) = if to_memory { (BUFFER_IN_DEVICE, iova) } else { (iova, BUFFER_IN_DEVICE) };
    let command = if to_memory { 3 } else { 1 };
    let registers: Vec<u8> =
        [source, destination, length.into(), command].into_iter().flat_map(u64::to_le_bytes).collect();
    if client.pwrite(fd, region(0, 0x80), &registers).is_ok() && wait {
        while client.pread(fd, region(0, 0x98), 8).is_ok_and(|command| command[0] & 1 != 0) {
            std::thread::yield_now();
        }
    }
}

/// Brings the first program some way into a session, so that short inputs reach far: descriptor 4 is an iommufd, 5 a
/// device.
fn prepare(client: &InProcess, steps: u8) {
    let (iommu, device) = (Fd(1), Fd(2));
    if steps & 1 != 0 {
        run(client, iommu, iommufd::IoasAlloc::default());
        run(client, device, vfio::DeviceBindIommufd { iommufd: iommu.get(), ..Default::default() });
    }
    if steps & 2 != 0 {
        run(client, device, vfio::DeviceAttachIommufdPt { pt_id: 1, ..Default::default() });
    }
    if steps & 4 != 0 {
        for (user_va, length) in [(BUFFER, BUFFER_SIZE), (LARGE, LARGE_SIZE)] {
            let (ioas_id, iova) = (1, user_va);
            run(
                client,
                iommu,
                iommufd::IoasMap { flags: 7, ioas_id, user_va, length, iova, ..Default::default() },
            );
        }
    }
}

fn perform(server: &Arc<Server>, client: &InProcess, file: &rustix::fd::OwnedFd, call: Call) {
    match call {
        Call::OpenIommu => open(server, client, "/dev/iommu"),
        Call::OpenDevice(number) => open(server, client, &format!("/dev/vfio/devices/vfio{}", number % 3)),
        Call::Close(fd) => drop(client.close(fd.get())),
        Call::Protect { page, pages, writable } => {
            client.protect(BUFFER + u64::from(page) * PAGE, u64::from(pages) * PAGE, writable);
        }
        Call::Raw { fd, number, mut bytes } => drop(client.call(fd.get(), number.get(), &mut bytes)),
        Call::Pointer { fd, number, address } => drop(client.ioctl(fd.get(), number.get(), address.get())),
        Call::Destroy { fd, id } => run(client, fd, iommufd::Destroy { size: 0, id: id.get() }),
        Call::IoasAlloc { fd } => run(client, fd, iommufd::IoasAlloc::default()),
        Call::Map { fd, ioas, flags, address, length, iova } => run(
            client,
            fd,
            iommufd::IoasMap {
                flags: flags.get(),
                ioas_id: ioas.get(),
                user_va: address.get(),
                length: length.get(),
                iova: iova.get(),
                ..Default::default()
            },
        ),
        Call::MapFile { fd, ioas, flags, file, start, length, iova } => run(
            client,
            fd,
            iommufd::IoasMapFile {
                flags: flags.get(),
                ioas_id: ioas.get(),
                fd: file.get(),
                start: start.get(),
                length: length.get(),
                iova: iova.get(),
                ..Default::default()
            },
        ),
        Call::Copy { fd, from, to, flags, source, length, destination } => run(
            client,
            fd,
            iommufd::IoasCopy {
                flags: flags.get(),
                dst_ioas_id: to.get(),
                src_ioas_id: from.get(),
                length: length.get(),
                dst_iova: destination.get(),
                src_iova: source.get(),
                ..Default::default()
            },
        ),
        Call::Unmap { fd, ioas, iova, length } => {
            let (iova, length) = (iova.get(), length.get());
            run(client, fd, iommufd::IoasUnmap { ioas_id: ioas.get(), iova, length, ..Default::default() });
        }
        Call::UnmapAll { fd, ioas } => {
            run(
                client,
                fd,
                iommufd::IoasUnmap { ioas_id: ioas.get(), length: u64::MAX, ..Default::default() },
            );
        }
        Call::Ranges { fd, ioas, room, array } => run(
            client,
            fd,
            iommufd::IoasIovaRanges {
                ioas_id: ioas.get(),
                num_iovas: room.into(),
                allowed_iovas: array.get(),
                ..Default::default()
            },
        ),
        Call::Allow { fd, ioas, ranges } => {
            let entries: Vec<u8> = ranges
                .iter()
                .take(64)
                .flat_map(|(first, length)| {
                    let first = first.get();
                    [first, first.wrapping_add(length.get())]
                })
                .flat_map(u64::to_ne_bytes)
                .collect();
            let _ = client.put(BUFFER, &entries);
            run(
                client,
                fd,
                iommufd::IoasAllowIovas {
                    ioas_id: ioas.get(),
                    num_iovas: (entries.len() / 16) as u32,
                    allowed_iovas: BUFFER,
                    ..Default::default()
                },
            );
        }
        Call::Option { fd, option, op, object, value } => run(
            client,
            fd,
            iommufd::SetOption {
                option_id: (option % 3).into(),
                op: (op % 3).into(),
                object_id: object.get(),
                val64: (value % 3).into(),
                ..Default::default()
            },
        ),
        Call::HwptAlloc { fd, device, parent, flags } => {
            let (flags, dev_id, pt_id) = (u32::from(flags) & 10, device.get(), parent.get());
            run(client, fd, iommufd::HwptAlloc { flags, dev_id, pt_id, ..Default::default() });
        }
        Call::ChangeProcess { fd } => run(client, fd, iommufd::IoasChangeProcess::default()),
        Call::VfioIoas { fd, op, ioas } => {
            let (op, ioas_id) = (u16::from(op % 4), ioas.get());
            run(client, fd, iommufd::VfioIoas { op, ioas_id, ..Default::default() });
        }
        Call::VfioNumber { fd, set, value } => {
            let number = if set { vfio::SET_IOMMU } else { vfio::CHECK_EXTENSION };
            let _ = client.ioctl(fd.get(), number, u64::from(value % 12));
        }
        Call::VfioInfo { fd, room, address } => {
            let _ = client.put(address.get(), &u32::from(room).to_ne_bytes());
            let _ = client.ioctl(fd.get(), vfio::IOMMU_GET_INFO, address.get());
        }
        Call::VfioMap { fd, flags, address, length, iova } => {
            let (flags, vaddr) = (Flags(flags).get() % 8, address.get());
            let (iova, size) = (iova.get(), length.get());
            run(client, fd, vfio::Type1DmaMap { flags, vaddr, iova, size, ..Default::default() });
        }
        Call::VfioUnmap { fd, flags, iova, length } => {
            let flags = if flags < 0xf0 { 0 } else { u32::from(flags % 4) };
            let (iova, size) = if flags == 2 { (0, 0) } else { (iova.get(), length.get()) };
            run(client, fd, vfio::Type1DmaUnmap { flags, iova, size, ..Default::default() });
        }
        Call::TrackWrites { fd, table, flags } => {
            let (flags, hwpt_id) = (u32::from(flags % 3), table.get());
            run(client, fd, iommufd::HwptSetDirtyTracking { flags, hwpt_id, ..Default::default() });
        }
        Call::Written { fd, table, flags, iova, length, page, bitmap } => run(
            client,
            fd,
            iommufd::HwptGetDirtyBitmap {
                hwpt_id: table.get(),
                flags: u32::from(flags % 3),
                iova: iova.get(),
                length: length.get(),
                page_size: if page < 0xf0 { PAGE << (page % 12) } else { page.into() },
                data: bitmap.get(),
                ..Default::default()
            },
        ),
        Call::HwInfo { fd, device, room, address } => run(
            client,
            fd,
            iommufd::GetHwInfo {
                dev_id: device.get(),
                data_len: room.into(),
                data_uptr: address.get(),
                ..Default::default()
            },
        ),
        Call::AddReserved { fd, ioas, start, length } => {
            let operation = iommufd_test::AddReserved { start: start.get(), length: length.get() };
            test(client, fd, ioas.get(), &operation);
        }
        Call::CheckRefs { fd, address, pages, refs } => {
            let (length, refs) = (u64::from(pages) * PAGE, refs.into());
            test(
                client,
                fd,
                0,
                &iommufd_test::CheckRefs { length, uptr: address.get() & !(PAGE - 1), refs, padding: 0 },
            );
        }
        Call::Test { fd, op, id, payload } => {
            let payload = payload.map(Word::get);
            run(
                client,
                fd,
                iommufd_test::TestCommand {
                    op: u32::from(op % 26),
                    id: id.into(),
                    payload,
                    ..Default::default()
                },
            );
        }
        Call::Bind { fd, iommu } => {
            run(client, fd, vfio::DeviceBindIommufd { iommufd: iommu.get(), ..Default::default() });
        }
        Call::Attach { fd, table } => {
            run(client, fd, vfio::DeviceAttachIommufdPt { pt_id: table.get(), ..Default::default() });
        }
        Call::Detach { fd } => run(client, fd, vfio::DeviceDetachIommufdPt::default()),
        Call::AttachPasid { fd, pasid, table } => {
            let (pasid, pt_id) = (pasid.get(), table.get());
            run(client, fd, vfio::DeviceAttachIommufdPt { flags: 1, pasid, pt_id, ..Default::default() });
        }
        Call::DetachPasid { fd, pasid } => {
            let pasid = pasid.get();
            run(client, fd, vfio::DeviceDetachIommufdPt { flags: 1, pasid, ..Default::default() });
        }
        Call::UsePasid { fd, pasid } => {
            let value = pasid.map_or(0, |pasid| u64::from(pasid.get()) | 1 << 31);
            let _ = client.pwrite(fd.get(), region(0, 0xa0), &value.to_le_bytes());
        }
        Call::MockDevice { fd, table, flags } => {
            let dev_flags = u32::from(flags) & 5;
            test(client, fd, table.get(), &iommufd_test::MockDomainFlags { dev_flags, ..Default::default() });
        }
        Call::MockPasid { fd, op, device, pasid, table } => {
            let op = iommufd_test::OP_PASID_ATTACH + u32::from(op % 4);
            let payload = [u64::from(pasid.get()) | u64::from(table.get()) << 32, 0, 0, 0, 0, 0];
            run(
                client,
                fd,
                iommufd_test::TestCommand { op, id: device.get(), payload, ..Default::default() },
            );
        }
        Call::Reset { fd } => drop(client.ioctl(fd.get(), vfio::DEVICE_RESET, 0)),
        Call::Read { fd, index, offset, length } => {
            let _ = client.pread(fd.get(), region(index, offset.into()), length.into());
        }
        Call::Write { fd, index, offset, bytes } => {
            let _ = client.pwrite(fd.get(), region(index, offset.into()), &bytes);
        }
        Call::Dma { fd, iova, length, to_memory, wait } => {
            dma(client, fd.get(), iova.get(), length, to_memory, wait);
        }
        Call::Truncate(pages) => {
            let _ = rustix::fs::ftruncate(file, u64::from(pages % 16) * PAGE);
        }
        Call::Status => drop(server.status().to_json()),
    }
}

fuzz_target!(|input: &[u8]| {
    let devices = [TableKind::Native, TableKind::VtdSecondStage]
        .map(|table| DeviceOptions { table, ..DeviceOptions::default() })
        .to_vec();
    let options = ServerOptions { devices, test_devices: true, ..Default::default() };
    let server = Server::new(options).expect("a machine of two devices");
    let first = InProcess::new(1000);
    first.map_memory(BUFFER, BUFFER_SIZE);
    first.map_memory(LARGE, LARGE_SIZE);
    let file = rustix::fs::memfd_create("ioasid-fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&file, FILE_SIZE).expect("a length");
    first.insert_foreign(file.try_clone().expect("a duplicate"));
    open(&server, &first, "/dev/iommu");
    open(&server, &first, "/dev/vfio/devices/vfio0");
    let second = first.second_process();
    second.set_memory_lock_limit(Some(LIMIT * PAGE));
    second.set_may_change_resource_mode(true);
    let mut second = Some(second);

    let mut input = Unstructured::new(input);
    prepare(&first, u8::arbitrary(&mut input).unwrap_or(0));
    while !input.is_empty() {
        let Ok(who) = u8::arbitrary(&mut input) else { break };
        let Ok(call) = Call::arbitrary(&mut input) else { break };
        match &second {
            // The second program ends once, in the middle of whatever the first does.
            Some(_) if who == 0xff => second = None,
            Some(second) if who % 2 == 1 => perform(&server, second, &file, call),
            _ => perform(&server, &first, &file, call),
        }
    }

    drop(second);
    drop(first);
    let status = server.status();
    assert!(status.contexts.is_empty(), "{status:?}");
    assert!(status.accounts.iter().all(|account| account.charged_pages == 0), "{status:?}");
    assert!(
        status
            .accounts
            .iter()
            .all(|account| account.limit_pages.is_none_or(|limit| account.peak_pages <= limit))
    );
});
