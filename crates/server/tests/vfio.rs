//! A device file as a program sees it: each command with its error codes, and the regions.

mod program;

use ioasid_server::{Errno, REGION_MAGIC, REGION_MAGIC_MASK};
use ioasid_uapi::Command;
use ioasid_uapi::iommufd;
use ioasid_uapi::vfio as uapi;
use program::{BUFFER, BoundDevice, IsCommand, PAGE, Program, memfd, region};
use zerocopy::IntoBytes;

const DEVICE: &str = "/dev/vfio/devices/vfio0";

fn bound() -> (Program, i32, BoundDevice) {
    let program = Program::new();
    let iommu = program.iommu();
    let device = program.bind(iommu);
    (program, iommu, device)
}

#[test]
fn only_the_machines_devices_can_be_opened() {
    let program = Program::new();
    let open = |path: &str| program::open(&program.server, &program.client, path);
    for path in ["vfio1", "vfio", "vfio00", "vfio+0", "vfio0/", "vfio99999999999999999999"] {
        assert_eq!(open(&format!("/dev/vfio/devices/{path}")), Err(Errno::NOENT), "{path}");
    }
    for path in ["/dev/vfio", "/dev/vfio/vfio", "/dev/vfio/1"] {
        assert_eq!(open(path), Err(Errno::NOENT));
    }
    let other = std::path::Path::new("/dev/null");
    assert!(program.server.open(&program.client, other).is_none());
    assert!(open(DEVICE).is_ok() && open(DEVICE).is_ok(), "opening gives nothing yet, so anybody may");
}

#[test]
fn an_unbound_file_answers_nothing_but_bind() {
    let program = Program::new();
    let fd = program.open(DEVICE);
    for (number, name) in uapi::DEVICE_COMMANDS {
        if *number != uapi::DEVICE_BIND_IOMMUFD {
            assert_eq!(program.ioctl(fd, *number, BUFFER), Err(Errno::INVAL), "{name}");
        }
    }
    assert_eq!(program.ioctl(fd, 0x3bff, 0), Err(Errno::INVAL));
    assert_eq!(program.pread(fd, region(7), 4), Err(Errno::INVAL));
    assert_eq!(program.pwrite(fd, region(7), &[0]), Err(Errno::INVAL));
}

#[test]
fn bind_checks_its_argument_and_is_exclusive() {
    let program = Program::new();
    let iommu = program.iommu();
    let fd = program.open(DEVICE);
    let bind = |command: uapi::DeviceBindIommufd| program.run(fd, command).map(|command| command.out_devid);
    let base = uapi::DeviceBindIommufd { iommufd: iommu, ..Default::default() };
    let mut short = base.sized();
    short.argsz = 15;
    assert_eq!(program.call(fd, uapi::DEVICE_BIND_IOMMUFD, short.as_mut_bytes()), Err(Errno::INVAL));
    let mut long = base.sized();
    long.argsz = 25;
    let mut bytes = [long.as_bytes(), &[1]].concat();
    assert_eq!(program.call(fd, uapi::DEVICE_BIND_IOMMUFD, &mut bytes), Err(Errno::TOOBIG));
    assert_eq!(program.ioctl(fd, uapi::DEVICE_BIND_IOMMUFD, 0), Err(Errno::FAULT));
    assert_eq!(bind(uapi::DeviceBindIommufd { flags: 2, ..base }), Err(Errno::INVAL));
    assert_eq!(
        bind(uapi::DeviceBindIommufd { flags: 1, ..base }),
        Err(Errno::INVAL),
        "no device asks for a token"
    );
    assert_eq!(bind(uapi::DeviceBindIommufd { iommufd: -1, ..base }), Err(Errno::INVAL));
    assert_eq!(bind(uapi::DeviceBindIommufd { iommufd: 99, ..base }), Err(Errno::BADF));
    assert_eq!(bind(uapi::DeviceBindIommufd { iommufd: fd, ..base }), Err(Errno::BADFD));
    let file = program.insert_foreign(memfd(1));
    assert_eq!(bind(uapi::DeviceBindIommufd { iommufd: file, ..base }), Err(Errno::BADFD));
    let ioas = program.ioas(iommu);
    assert_eq!(bind(base), Ok(ioas + 1), "a number of the context");
    assert_eq!(bind(base), Err(Errno::INVAL), "bound already");

    let second = program.open(DEVICE);
    assert_eq!(program.bind_at(second, iommu), Err(Errno::INVAL), "bound through another file");
    assert_eq!(program.destroy(iommu, ioas + 1), Err(Errno::BUSY));
    program.close(fd).unwrap();
    assert_eq!(program.destroy(iommu, ioas + 1), Err(Errno::NOENT), "closing unbinds");
    assert_eq!(program.bind_at(second, iommu), Ok(ioas + 1));
}

#[test]
fn a_number_that_cannot_be_delivered_undoes_the_bind() {
    let program = Program::new();
    let iommu = program.iommu();
    let fd = program.open(DEVICE);
    program.map_memory(0x1000, PAGE);
    let command = uapi::DeviceBindIommufd { iommufd: iommu, ..Default::default() }.sized();
    program.put(0x1000, command.as_bytes()).unwrap();
    program.protect(0x1000, PAGE, false);
    assert_eq!(program.ioctl(fd, uapi::DEVICE_BIND_IOMMUFD, 0x1000), Err(Errno::FAULT));
    assert!(program.server.status().contexts[0].devices.is_empty());
    assert_eq!(program.bind_at(fd, iommu), Ok(1));
}

#[test]
fn the_device_is_described() {
    let (program, _, device) = bound();
    let info = program.run(device.fd, uapi::DeviceInfo::default()).unwrap();
    assert_eq!((info.flags, info.num_regions, info.num_irqs, info.cap_offset), (3, 9, 5, 0));
    let mut old = [16_u32, 0, 0, 0].map(u32::to_ne_bytes).concat();
    program.call(device.fd, uapi::DeviceInfo::NUMBER, &mut old).unwrap();
    assert_eq!(old, [16_u32, 3, 9, 5].map(u32::to_ne_bytes).concat());
    let mut short = [15_u32, 0, 0, 0].map(u32::to_ne_bytes).concat();
    assert_eq!(program.call(device.fd, uapi::DeviceInfo::NUMBER, &mut short), Err(Errno::INVAL));
    assert_eq!(program.ioctl(device.fd, uapi::DeviceInfo::NUMBER, 0), Err(Errno::FAULT));

    for index in 0..9 {
        let info = program.run(device.fd, uapi::RegionInfo { index, ..Default::default() });
        let expected = match index {
            0 => Some((1 << 20, 3)),
            7 => Some((256, 3)),
            8 => None,
            _ => Some((0, 0)),
        };
        match expected {
            None => assert_eq!(info, Err(Errno::INVAL)),
            Some(expected) => {
                let info = info.unwrap();
                assert_eq!((info.size, info.flags), expected, "region {index}");
                assert_eq!(info.offset, region(index.into()));
                assert_eq!(info.offset & REGION_MAGIC_MASK, REGION_MAGIC);
                assert!(info.offset < 1 << 63);
            }
        }
    }
    assert_eq!(
        program.run(device.fd, uapi::RegionInfo { index: u32::MAX, ..Default::default() }),
        Err(Errno::INVAL)
    );

    for index in 0..5 {
        let info = program.run(device.fd, uapi::IrqInfo { index, count: 7, ..Default::default() }).unwrap();
        assert_eq!(info.count, 0, "no interrupts yet");
    }
    assert_eq!(program.run(device.fd, uapi::IrqInfo { index: 5, ..Default::default() }), Err(Errno::INVAL));
}

#[test]
fn what_the_devices_lack_is_refused_as_linux_does() {
    let (program, _, device) = bound();
    let irqs = uapi::IrqSet { flags: 1 | 32, ..Default::default() };
    assert_eq!(program.run(device.fd, irqs), Err(Errno::INVAL), "no index has a vector");
    let reset_info = program.ioctl(device.fd, uapi::DEVICE_GET_PCI_HOT_RESET_INFO, BUFFER);
    assert_eq!(reset_info, Err(Errno::NODEV));
    let feature =
        |flags| program.run(device.fd, uapi::DeviceFeature { flags, ..Default::default() }).map(drop);
    assert_eq!(feature(1 | 1 << 16), Err(Errno::NOTTY));
    assert_eq!(feature(1 | 1 << 19), Err(Errno::INVAL));
    assert_eq!(feature(1 | 1 << 16 | 1 << 17), Err(Errno::INVAL));
    assert_eq!(feature(1 | 1 << 16 | 1 << 17 | 1 << 18), Err(Errno::NOTTY));
    for number in [0x3b64, 0x3bff, 0x3b80, 0] {
        assert_eq!(program.ioctl(device.fd, number, BUFFER), Err(Errno::NOTTY), "{number:#x}");
    }
}

#[test]
fn regions_are_read_and_written_by_offset() {
    let (program, _, device) = bound();
    let config = region(7);
    assert_eq!(program.pread(device.fd, config, 4).unwrap(), [0x34, 0x12, 0xe8, 0x11]);
    assert_eq!(program.pread(device.fd, config, 256).unwrap().len(), 256);
    assert_eq!(program.pread(device.fd, config + 1, 256), Err(Errno::FAULT));
    assert_eq!(program.pread(device.fd, config + 256, 1), Err(Errno::FAULT));
    assert_eq!(program.pwrite(device.fd, config + 254, &[0; 3]), Err(Errno::FAULT));

    assert_eq!(program.pread(device.fd, region(0), 4).unwrap(), [0xed, 0, 0, 1]);
    assert_eq!(program.pwrite(device.fd, region(0) + 4, &[1, 2, 3, 4]), Ok(4));
    assert_eq!(program.pread(device.fd, region(0) + 4, 4).unwrap(), [!1, !2, !3, !4]);
    assert_eq!(program.pread(device.fd, region(0) + (1 << 20) - 4, 16).unwrap().len(), 4, "cut at the end");
    assert_eq!(program.pread(device.fd, region(0) + (1 << 20), 1), Err(Errno::INVAL));
    assert_eq!(program.pread(device.fd, region(1), 1), Err(Errno::INVAL), "an absent BAR");
    assert_eq!(program.pwrite(device.fd, region(6), &[0]), Err(Errno::INVAL), "the ROM");
    assert_eq!(program.pread(device.fd, region(9), 1), Err(Errno::INVAL));
    assert_eq!(program.pread(device.fd, region(255), 1), Err(Errno::INVAL));
    assert_eq!(program.pread(device.fd, 0, 4), Err(Errno::INVAL), "without the mark");
    assert_eq!(program.pread(device.fd, u64::MAX, 4), Err(Errno::INVAL));

    program.pwrite(device.fd, config + 4, &[0, 0]).unwrap();
    assert_eq!(program.pread(device.fd, region(0), 4), Err(Errno::IO), "memory decode is off");
    assert_eq!(program.pwrite(device.fd, region(0), &[0; 4]), Err(Errno::IO));
}

#[test]
fn reset_and_the_last_close_forget_the_devices_state() {
    let (program, iommu, device) = bound();
    let liveness = |fd| program.pread(fd, region(0) + 4, 4).unwrap();
    program.pwrite(device.fd, region(0) + 4, &[1, 2, 3, 4]).unwrap();
    program.ioctl(device.fd, uapi::DEVICE_RESET, 0).unwrap();
    assert_eq!(liveness(device.fd), [0; 4]);
    program.pwrite(device.fd, region(0) + 4, &[1, 2, 3, 4]).unwrap();
    program.close(device.fd).unwrap();
    let fd = program.open(DEVICE);
    program.bind_at(fd, iommu).unwrap();
    assert_eq!(program.pread(fd, region(7) + 4, 2).unwrap(), [2, 0], "memory decode on, bus master off");
    assert_eq!(liveness(fd), [0; 4]);
}

#[test]
fn attach_takes_a_space_or_a_table_and_answers_with_the_table() {
    let (program, iommu, device) = bound();
    let ioas = program.ioas(iommu);
    let run =
        |command: uapi::DeviceAttachIommufdPt| program.run(device.fd, command).map(|command| command.pt_id);
    let base = uapi::DeviceAttachIommufdPt { pt_id: ioas, ..Default::default() };
    assert_eq!(run(uapi::DeviceAttachIommufdPt { flags: 2, ..base }), Err(Errno::INVAL));
    assert_eq!(run(uapi::DeviceAttachIommufdPt { pt_id: 99, ..base }), Err(Errno::NOENT));
    assert_eq!(run(uapi::DeviceAttachIommufdPt { pt_id: 0, ..base }), Err(Errno::NOENT));
    assert_eq!(run(uapi::DeviceAttachIommufdPt { pt_id: device.id, ..base }), Err(Errno::INVAL));
    let mut short = base.sized();
    short.argsz = 11;
    assert_eq!(
        program.call(device.fd, uapi::DEVICE_ATTACH_IOMMUFD_PT, short.as_mut_bytes()),
        Err(Errno::INVAL)
    );
    assert_eq!(program.ioctl(device.fd, uapi::DEVICE_ATTACH_IOMMUFD_PT, 0), Err(Errno::FAULT));

    assert_eq!(program.detach(&device), Ok(()), "not attached, and that is no error");
    let table = run(base).unwrap();
    assert_eq!(table, 3, "the space, the device, the table");
    assert_eq!(run(base), Ok(table), "again: the same");
    assert_eq!(program.server.status().contexts[0].devices[0].attached_to, Some(table));
    assert_eq!(program.destroy(iommu, table), Err(Errno::BUSY));
    assert_eq!(program.destroy(iommu, ioas), Err(Errno::BUSY));

    let own = program.hwpt(iommu, device.id, ioas).unwrap();
    assert_ne!(own, table);
    assert_eq!(program.destroy(iommu, own), Ok(()), "a table that nothing is attached to");
    let own = program.hwpt(iommu, device.id, ioas).unwrap();
    assert_eq!(program.attach(&device, own), Ok(own), "replaced");
    assert_eq!(program.destroy(iommu, table), Err(Errno::NOENT), "the shared one went with its last device");
    assert_eq!(program.destroy(iommu, own), Err(Errno::BUSY));
    assert_eq!(program.attach(&device, ioas), Ok(table), "back, with a new one under the free number");
    assert_eq!(program.destroy(iommu, own), Ok(()), "one that was asked for stays until it is destroyed");
    assert_eq!(program.detach(&device), Ok(()));
    assert_eq!(program.destroy(iommu, table), Err(Errno::NOENT));
    assert_eq!(program.destroy(iommu, ioas), Ok(()));

    let detach =
        |flags| program.run(device.fd, uapi::DeviceDetachIommufdPt { flags, ..Default::default() }).map(drop);
    assert_eq!(detach(2), Err(Errno::INVAL));
    let other = program.iommu();
    let foreign = (0..9).map(|_| program.ioas(other)).max().unwrap();
    assert_eq!(
        program.attach(&device, foreign),
        Err(Errno::NOENT),
        "a number of another context means nothing"
    );
}

#[test]
fn a_table_number_that_cannot_be_delivered_detaches() {
    let (program, iommu, device) = bound();
    let ioas = program.ioas(iommu);
    program.map_memory(0x1000, PAGE);
    let command = uapi::DeviceAttachIommufdPt { pt_id: ioas, ..Default::default() }.sized();
    program.put(0x1000, command.as_bytes()).unwrap();
    program.protect(0x1000, PAGE, false);
    assert_eq!(program.ioctl(device.fd, uapi::DEVICE_ATTACH_IOMMUFD_PT, 0x1000), Err(Errno::FAULT));
    assert_eq!(program.server.status().contexts[0].devices[0].attached_to, None);
    assert_eq!(program.destroy(iommu, ioas), Ok(()));
}

#[test]
fn tables_and_hardware_information_of_a_bound_device() {
    let (program, iommu, device) = bound();
    let ioas = program.ioas(iommu);
    let base = iommufd::HwptAlloc { dev_id: device.id, pt_id: ioas, ..Default::default() };
    let run = |command: iommufd::HwptAlloc| program.run(iommu, command).map(|command| command.out_hwpt_id);
    for flags in [1, 2, 4, 9, 10, 16, 1 << 31] {
        assert_eq!(run(iommufd::HwptAlloc { flags, ..base }), Err(Errno::OPNOTSUPP), "capabilities we lack");
    }
    assert_eq!(run(iommufd::HwptAlloc { data_type: 1, data_len: 24, ..base }), Err(Errno::OPNOTSUPP));
    assert_eq!(run(iommufd::HwptAlloc { pt_id: 99, ..base }), Err(Errno::INVAL));
    assert_eq!(run(iommufd::HwptAlloc { pt_id: device.id, ..base }), Err(Errno::INVAL));
    assert_eq!(run(iommufd::HwptAlloc { dev_id: 99, ..base }), Err(Errno::NOENT));
    let table = run(base).unwrap();
    let nested = iommufd::HwptAlloc { pt_id: table, ..base };
    assert_eq!(run(nested), Err(Errno::OPNOTSUPP));
    assert_eq!(run(iommufd::HwptAlloc { data_type: 1, data_len: 24, ..nested }), Err(Errno::OPNOTSUPP));

    program.put(BUFFER, &[0xff; 64]).unwrap();
    let command =
        iommufd::GetHwInfo { dev_id: device.id, data_len: 32, data_uptr: BUFFER, ..Default::default() };
    let info = program.run(iommu, command).unwrap();
    assert_eq!(
        (info.data_type, info.data_len, info.out_max_pasid_log2, info.out_capabilities),
        (0, 0, 20, 8)
    );
    assert_eq!(
        program.get(BUFFER, 33).unwrap(),
        [vec![0; 32], vec![0xff]].concat(),
        "the room is zeroed, no more"
    );
    let bad = iommufd::GetHwInfo { data_uptr: 16, ..command };
    assert_eq!(program.run(iommu, bad).map(drop), Err(Errno::FAULT));
    assert_eq!(
        program.run(iommu, iommufd::GetHwInfo { data_len: u32::MAX, ..command }).map(drop),
        Err(Errno::TOOBIG)
    );
    let none = iommufd::GetHwInfo { data_len: 0, data_uptr: 0, ..command };
    assert!(program.run(iommu, none).is_ok());
}
