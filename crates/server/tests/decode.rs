//! Calls in words: each command, as it was asked and answered.

mod program;

use ioasid_server::{Errno, File, InProcess, Opened};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test::{AddReserved, MockDeviceFlags, MockDomainFlags, PasidAttach, TestCommand};
use ioasid_uapi::vfio;
use program::{BUFFER, BUFFER_SIZE, IsCommand, PAGE, server};
use std::path::Path;
use zerocopy::IntoBytes;

/// Where arguments are.
const ARGUMENT: u64 = BUFFER + BUFFER_SIZE - PAGE;

struct Machine {
    client: InProcess,
    iommu: File,
    device: File,
    iommufd: i32,
}

fn open(server: &std::sync::Arc<ioasid_server::Server>, client: &InProcess, path: &str) -> File {
    match server.open(client, Path::new(path)) {
        Some(Ok(Opened::File(file))) => file,
        other => panic!("{other:?}"),
    }
}

fn machine() -> Machine {
    let (server, client) = (server(), InProcess::new(1000));
    client.map_memory(BUFFER, BUFFER_SIZE);
    let iommu = open(&server, &client, "/dev/iommu");
    let device = open(&server, &client, "/dev/vfio/devices/vfio0");
    let iommufd = client.insert(open(&server, &client, "/dev/iommu"));
    Machine { client, iommu, device, iommufd }
}

impl Machine {
    fn line<T: Command>(&self, file: &File, command: T) -> String {
        self.client.put(ARGUMENT, command.sized().as_bytes()).unwrap();
        file.ioctl_captured(&self.client, T::NUMBER, ARGUMENT).to_string()
    }

    #[track_caller]
    fn iommu<T: Command>(&self, command: T, expected: &str) {
        assert_eq!(self.line(&self.iommu, command), expected);
    }

    #[track_caller]
    fn device<T: Command>(&self, command: T, expected: &str) {
        assert_eq!(self.line(&self.device, command), expected);
    }
}

const NO_ENTRY: &str = "-> -1 ENOENT (No such file or directory)";

#[test]
fn what_maps_and_unmaps_say() {
    let m = machine();
    m.iommu(uapi::IoasAlloc::default(), "IOAS_ALLOC -> 0 ioas=1");
    m.iommu(
        uapi::IoasAlloc { flags: 5, ..Default::default() },
        "IOAS_ALLOC flags=0x5 -> -1 EOPNOTSUPP (Operation not supported)",
    );
    let map = uapi::IoasMap {
        flags: 7,
        ioas_id: 1,
        user_va: BUFFER,
        length: PAGE,
        iova: 0x10000,
        ..Default::default()
    };
    m.iommu(map, "IOAS_MAP ioas=1 iova=0x10000 len=0x1000 rw va=0x7f1234600000 -> 0");
    m.iommu(map, "IOAS_MAP ioas=1 iova=0x10000 len=0x1000 rw va=0x7f1234600000 -> -1 EEXIST (File exists)");
    let anywhere = uapi::IoasMap { flags: 4, ..map };
    m.iommu(anywhere, "IOAS_MAP ioas=1 iova=any len=0x1000 r va=0x7f1234600000 -> 0 iova=0x1000");
    m.iommu(
        uapi::IoasMapFile { flags: 2, ioas_id: 1, fd: 99, start: 0x2000, length: PAGE, ..Default::default() },
        "IOAS_MAP_FILE ioas=1 iova=any len=0x1000 w fd=99 offset=0x2000 -> -1 EBADF (Bad file descriptor)",
    );
    m.iommu(
        uapi::IoasCopy {
            flags: 4,
            dst_ioas_id: 1,
            src_ioas_id: 1,
            length: PAGE,
            src_iova: 0x10000,
            ..Default::default()
        },
        "IOAS_COPY from=ioas 1 iova=0x10000 len=0x1000 to=ioas 1 iova=any r -> 0 iova=0x2000",
    );
    let unmap = uapi::IoasUnmap { ioas_id: 1, iova: 0x10000, length: 0x800, ..Default::default() };
    m.iommu(unmap, &format!("IOAS_UNMAP ioas=1 iova=0x10000 len=0x800 {NO_ENTRY}"));
    m.iommu(
        uapi::IoasUnmap { ioas_id: 1, length: u64::MAX, ..Default::default() },
        "IOAS_UNMAP ioas=1 all -> 0 len=0x3000",
    );
    m.iommu(uapi::Destroy { id: 7, ..Default::default() }, &format!("DESTROY id=7 {NO_ENTRY}"));
    m.iommu(
        uapi::SetOption { option_id: 1, op: 1, object_id: 1, ..Default::default() },
        "OPTION HUGE_PAGES id=1 get -> 0 value=1",
    );
    let add = AddReserved { start: 0x100000, length: 0x1000 };
    let mut test = TestCommand { op: 1, id: 1, ..Default::default() };
    test.set_payload(&add);
    m.iommu(test, "TEST_CMD ADD_RESERVED id=1 [0x100000 0x1000] -> 0");
    m.iommu(
        uapi::HwptAlloc { flags: 9, dev_id: 7, pt_id: 1, ..Default::default() },
        &format!("HWPT_ALLOC dev=7 pt=1 nest-parent pasid {NO_ENTRY}"),
    );
    let mut test = TestCommand { op: 12, id: 1, ..Default::default() };
    let dev_flags = MockDeviceFlags::PASID.bits();
    test.set_payload(&MockDomainFlags { dev_flags, ..Default::default() });
    m.iommu(test, "TEST_CMD MOCK_DOMAIN_FLAGS id=1 [0x0 0x400000000] -> 0");
    m.iommu(
        uapi::GetHwInfo { dev_id: 3, ..Default::default() },
        "GET_HW_INFO dev=3 room=0 -> 0 type=4276993775 len=8 capabilities=0x9 pasid-bits=20",
    );
    for (op, words) in [
        (18, "PASID_ATTACH id=7 pasid=5 pt=3"),
        (19, "PASID_REPLACE id=7 pasid=5 pt=3"),
        (20, "PASID_DETACH id=7 pasid=5"),
        (21, "PASID_CHECK_HWPT id=7 pasid=5 hwpt=3"),
    ] {
        let mut test = TestCommand { op, id: 7, ..Default::default() };
        test.set_payload(&PasidAttach { pasid: 5, pt_id: 3 });
        m.iommu(test, &format!("TEST_CMD {words} {NO_ENTRY}"));
    }
}

#[test]
fn what_devices_say() {
    let m = machine();
    m.device(
        vfio::DeviceBindIommufd { iommufd: m.iommufd, ..Default::default() },
        &format!("VFIO_DEVICE_BIND_IOMMUFD iommufd={} -> 0 dev=1", m.iommufd),
    );
    m.device(
        vfio::DeviceAttachIommufdPt { pt_id: 9, ..Default::default() },
        &format!("VFIO_DEVICE_ATTACH_IOMMUFD_PT pt=9 {NO_ENTRY}"),
    );
    m.device(
        vfio::DeviceAttachIommufdPt { flags: 1, pasid: 5, pt_id: 9, ..Default::default() },
        &format!("VFIO_DEVICE_ATTACH_IOMMUFD_PT pt=9 pasid=5 {NO_ENTRY}"),
    );
    m.device(vfio::DeviceDetachIommufdPt::default(), "VFIO_DEVICE_DETACH_IOMMUFD_PT -> 0");
    m.device(
        vfio::DeviceDetachIommufdPt { flags: 1, pasid: 5, ..Default::default() },
        "VFIO_DEVICE_DETACH_IOMMUFD_PT pasid=5 -> 0",
    );
    m.device(vfio::DeviceInfo::default(), "VFIO_DEVICE_GET_INFO -> 0 flags=0x3 regions=9 irqs=5");
    let region = m.line(&m.device, vfio::RegionInfo { index: 7, ..Default::default() });
    assert!(region.starts_with("VFIO_DEVICE_GET_REGION_INFO index=7 -> 0 size=0x"), "{region}");
    m.device(
        vfio::IrqSet { flags: 0b10_0001, index: 1, count: 1, ..Default::default() },
        "VFIO_DEVICE_SET_IRQS index=1 start=0 count=1 none trigger -> -1 EINVAL (Invalid argument)",
    );
    m.device(
        vfio::DeviceFeature { flags: 1 << 16 | 3, ..Default::default() },
        "VFIO_DEVICE_FEATURE feature=3 get -> -1 ENOTTY (Inappropriate ioctl for device)",
    );
    let reset = m.device.ioctl_captured(&m.client, vfio::DEVICE_RESET, 0).to_string();
    assert_eq!(reset, "VFIO_DEVICE_RESET -> 0");
}

/// Every command of which there is a layout is decoded, whatever the server answers.
#[test]
fn every_command_has_words() {
    let m = machine();
    for info in uapi::COMMANDS {
        let mut bytes = vec![0; info.size];
        bytes[..4].copy_from_slice(&(info.size as u32).to_ne_bytes());
        m.client.put(ARGUMENT, &bytes).unwrap();
        let line = m.iommu.ioctl_captured(&m.client, info.number, ARGUMENT).to_string();
        assert!(!line.contains("arg=") && line.starts_with(info.name.trim_start_matches("IOMMU_")), "{line}");
    }
    let extension = m.iommu.ioctl_captured(&m.client, vfio::CHECK_EXTENSION, 3).to_string();
    assert!(extension.starts_with("VFIO_CHECK_EXTENSION TYPE1v2 -> "), "{extension}");
}

#[test]
fn type1_commands_are_shown_with_their_arguments() {
    let m = machine();
    let shown = |command: u32, bytes: &[u8]| {
        m.client.put(ARGUMENT, bytes).unwrap();
        m.iommu.ioctl_captured(&m.client, command, ARGUMENT).to_string()
    };
    // No address space is set: the server reads, and refuses.
    let map = vfio::Type1DmaMap { argsz: 32, flags: 1, vaddr: 0x7000, iova: 0x10_0000, size: 0x2000 };
    let line = shown(vfio::Type1DmaMap::NUMBER, map.as_bytes());
    assert!(line.starts_with("VFIO_IOMMU_MAP_DMA iova=0x100000 len=0x2000 r va=0x7000 -> -1 "), "{line}");
    let unmap = vfio::Type1DmaUnmap { argsz: 24, flags: 2, iova: 0, size: 0 };
    let line = shown(vfio::Type1DmaUnmap::NUMBER, unmap.as_bytes());
    assert!(line.starts_with("VFIO_IOMMU_UNMAP_DMA iova=0x0 len=0x0 all -> -1 "), "{line}");
    let info = vfio::Type1Info { argsz: 16, ..Default::default() };
    let line = shown(vfio::Type1Info::NUMBER, info.as_bytes());
    assert!(line.starts_with("VFIO_IOMMU_GET_INFO room=16 -> -1 "), "{line}");
}

#[test]
fn what_was_not_read_is_not_shown() {
    let m = machine();
    let unknown = m.iommu.ioctl_captured(&m.client, 0x3bff, ARGUMENT).to_string();
    assert!(unknown.starts_with(&format!("ioctl 0x3bff arg={ARGUMENT:#x} -> -1 ENOTTY")), "{unknown}");
    let nowhere = m.iommu.ioctl_captured(&m.client, uapi::IoasMap::NUMBER, 0x1000).to_string();
    assert_eq!(nowhere, "IOAS_MAP arg=0x1000 -> -1 EFAULT (Bad address)");
    // Too short: only its size was read.
    m.client.put(ARGUMENT, &12_u32.to_ne_bytes()).unwrap();
    let short = m.iommu.ioctl_captured(&m.client, uapi::IoasMap::NUMBER, ARGUMENT);
    assert_eq!((short.result(), short.input::<uapi::IoasMap>()), (Err(Errno::INVAL), None));
    // At the last address.
    let last = m.iommu.ioctl_captured(&m.client, uapi::IoasMap::NUMBER, u64::MAX).to_string();
    assert_eq!(last, "IOAS_MAP arg=0xffffffffffffffff -> -1 EFAULT (Bad address)");
}

/// A client whose memory changes with every look at it.
struct Fickle(std::cell::Cell<u32>);

impl ioasid_server::Client for Fickle {
    fn read(&self, _address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.0.set(self.0.get() + 1);
        let command = uapi::Destroy { size: 8, id: self.0.get() };
        buffer.copy_from_slice(&command.as_bytes()[..buffer.len()]);
        Ok(())
    }

    fn write(&self, _address: u64, _bytes: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn descriptor(&self, _fd: i32) -> Result<ioasid_server::Descriptor, Errno> {
        Err(Errno::BADF)
    }

    fn process(&self) -> Result<std::sync::Arc<dyn ioasid_server::Process>, Errno> {
        Err(Errno::SRCH)
    }

    fn give_descriptor(&self, _file: File, _close_on_exec: bool) -> Result<i32, Errno> {
        Err(Errno::MFILE)
    }
}

#[test]
fn what_is_shown_is_what_the_server_decided_on() {
    let m = machine();
    m.iommu(uapi::IoasAlloc::default(), "IOAS_ALLOC -> 0 ioas=1");
    m.iommu(uapi::IoasAlloc::default(), "IOAS_ALLOC -> 0 ioas=2");
    let fickle = Fickle(std::cell::Cell::new(0));
    // The size came with the first look, the rest with the second, and nobody looks a third time.
    let line = m.iommu.ioctl_captured(&fickle, uapi::Destroy::NUMBER, 0x1000).to_string();
    assert_eq!((line.as_str(), fickle.0.get()), ("DESTROY id=2 -> 0", 2));
    assert_eq!(
        m.line(&m.iommu, uapi::Destroy { id: 2, ..Default::default() }),
        format!("DESTROY id=2 {NO_ENTRY}")
    );
}
