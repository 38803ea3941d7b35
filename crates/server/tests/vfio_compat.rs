//! VFIO's type 1 commands on an open `/dev/iommu`, and which address space they mean.

mod program;

use ioasid_server::Errno;
use ioasid_uapi::Command;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::vfio::{self, Type1DmaMap, Type1DmaUnmap, Type1Info};
use program::{BUFFER, BUFFER_SIZE, BoundDevice, FIXED, IsCommand, PAGE, Program, READ, server_with};
use zerocopy::{FromBytes, IntoBytes};

const READ_WRITE: u32 = 3;
const ALL: u32 = 2;

struct Container {
    program: Program,
    iommu: i32,
    ioas: u32,
}

/// An address space that VFIO's commands mean, of version 1 or 2.
fn container(device: &str, kind: u32) -> Container {
    let program = Program::of(&server_with(device));
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let container = Container { program, iommu, ioas };
    container.choose(uapi::VFIO_IOAS_SET, ioas).unwrap();
    assert_eq!(container.program.ioctl(iommu, vfio::SET_IOMMU, kind.into()), Ok(0));
    container
}

impl Container {
    fn choose(&self, op: u16, ioas_id: u32) -> Result<u32, Errno> {
        let command = uapi::VfioIoas { op, ioas_id, ..Default::default() };
        self.program.run(self.iommu, command).map(|command| command.ioas_id)
    }

    fn number(&self, command: u32, argument: u32) -> Result<u32, Errno> {
        self.program.ioctl(self.iommu, command, argument.into())
    }

    fn map(&self, flags: u32, vaddr: u64, size: u64, iova: u64) -> Result<(), Errno> {
        let command = Type1DmaMap { flags, vaddr, iova, size, ..Default::default() };
        self.program.run(self.iommu, command).map(drop)
    }

    /// The result, and the size that is written back.
    fn unmap_flags(&self, flags: u32, iova: u64, size: u64) -> (Result<(), Errno>, u64) {
        let mut command = Type1DmaUnmap { flags, iova, size, ..Default::default() }.sized();
        let result = self.program.call(self.iommu, Type1DmaUnmap::NUMBER, command.as_mut_bytes());
        (result.map(drop), command.size)
    }

    fn unmap(&self, iova: u64, size: u64) -> (Result<(), Errno>, u64) {
        self.unmap_flags(0, iova, size)
    }

    fn attached(&self) -> BoundDevice {
        let device = self.program.bind(self.iommu);
        self.program.attach(&device, self.ioas).unwrap();
        device
    }

    /// First and last IOVA of every area.
    fn areas(&self) -> Vec<(u64, u64)> {
        let number = |text: &str| u64::from_str_radix(&text[2..], 16).unwrap();
        let status = self.program.server.status();
        let areas = &status.contexts[0].address_spaces[0].areas;
        areas.iter().map(|area| (number(&area.first), number(&area.last))).collect()
    }
}

#[test]
fn without_an_address_space_there_is_no_device() {
    let program = Program::new();
    let iommu = program.iommu();
    let c = Container { program, iommu, ioas: 0 };
    assert_eq!(c.number(vfio::GET_API_VERSION, 0), Ok(0));
    for extension in [vfio::TYPE1_IOMMU, vfio::TYPE1V2_IOMMU, vfio::UNMAP_ALL] {
        assert_eq!(c.number(vfio::CHECK_EXTENSION, extension), Ok(1));
    }
    for extension in [0, 2, vfio::UPDATE_VADDR, u32::MAX] {
        assert_eq!(c.number(vfio::CHECK_EXTENSION, extension), Ok(0));
    }
    assert_eq!(c.number(vfio::CHECK_EXTENSION, vfio::DMA_CC_IOMMU), Err(Errno::NODEV));
    assert_eq!(c.number(vfio::SET_IOMMU, vfio::TYPE1_IOMMU), Err(Errno::NODEV));
    assert_eq!(c.number(vfio::SET_IOMMU, vfio::TYPE1V2_IOMMU), Err(Errno::NODEV));
    assert_eq!(c.number(vfio::SET_IOMMU, 2), Err(Errno::INVAL));
    assert_eq!(c.program.ioctl(iommu, vfio::SET_IOMMU, 1 << 32 | 1), Err(Errno::INVAL));
    assert_eq!(c.program.run(iommu, Type1Info::default()), Err(Errno::NODEV));
    assert_eq!(c.map(READ_WRITE, BUFFER, PAGE, 0), Err(Errno::NODEV));
    assert_eq!(c.unmap(0, PAGE), (Err(Errno::NODEV), PAGE));
    // What is wrong with the argument itself comes first.
    assert_eq!(c.map(8, BUFFER, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(c.map(4, BUFFER, PAGE, 0), Err(Errno::INVAL), "no other address for what is mapped");
    assert_eq!(c.unmap_flags(1, 0, PAGE).0, Err(Errno::INVAL), "no dirty bitmap");
    for number in [vfio::IOMMU_ENABLE, vfio::IOMMU_DISABLE, vfio::IOMMU_DIRTY_PAGES, 0x3b7f, 0x3bff] {
        assert_eq!(c.number(number, 0), Err(Errno::NOTTY), "{number:#x}");
    }
}

#[test]
fn arguments_that_are_short_or_unreadable() {
    let c = container("edu", vfio::TYPE1V2_IOMMU);
    let short = |number, least: usize| {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&(least as u32 - 1).to_ne_bytes());
        c.program.call(c.iommu, number, &mut bytes)
    };
    for (number, least) in [
        (Type1Info::NUMBER, Type1Info::MIN_SIZE),
        (Type1DmaMap::NUMBER, Type1DmaMap::MIN_SIZE),
        (Type1DmaUnmap::NUMBER, Type1DmaUnmap::MIN_SIZE),
    ] {
        assert_eq!(short(number, least), Err(Errno::INVAL));
        assert_eq!(c.program.ioctl(c.iommu, number, 0), Err(Errno::FAULT));
        assert_eq!(c.program.call(c.iommu, number, &mut vec![0xff; least - 1]), Err(Errno::FAULT));
    }
}

#[test]
fn the_address_space_is_chosen_told_and_forgotten() {
    let program = Program::new();
    let iommu = program.iommu();
    let c = Container { program, iommu, ioas: 0 };
    assert_eq!(c.choose(uapi::VFIO_IOAS_GET, 0), Err(Errno::NODEV));
    assert_eq!(c.choose(uapi::VFIO_IOAS_SET, 1), Err(Errno::NOENT));
    let (one, two) = (c.program.ioas(iommu), c.program.ioas(iommu));
    c.choose(uapi::VFIO_IOAS_SET, one).unwrap();
    assert_eq!(c.choose(uapi::VFIO_IOAS_GET, 77), Ok(one));
    c.choose(uapi::VFIO_IOAS_SET, two).unwrap();
    assert_eq!(c.choose(uapi::VFIO_IOAS_SET, 9), Err(Errno::NOENT));
    assert_eq!(c.choose(uapi::VFIO_IOAS_GET, 0), Ok(two), "a refused choice changes nothing");
    assert_eq!(c.choose(3, one), Err(Errno::OPNOTSUPP));
    let reserved = uapi::VfioIoas { op: uapi::VFIO_IOAS_CLEAR, reserved: 1, ..Default::default() };
    assert_eq!(c.program.run(iommu, reserved), Err(Errno::OPNOTSUPP));
    // An address space that is gone is none, and neither is another of the same number.
    c.program.destroy(iommu, two).unwrap();
    assert_eq!(c.choose(uapi::VFIO_IOAS_GET, 0), Err(Errno::NODEV));
    assert_eq!(c.program.ioas(iommu), two);
    assert_eq!(c.map(READ_WRITE, BUFFER, PAGE, 0), Err(Errno::NODEV));
    c.choose(uapi::VFIO_IOAS_SET, one).unwrap();
    c.choose(uapi::VFIO_IOAS_CLEAR, 0).unwrap();
    assert_eq!(c.choose(uapi::VFIO_IOAS_GET, 0), Err(Errno::NODEV));
    c.choose(uapi::VFIO_IOAS_CLEAR, 0).unwrap();
}

#[test]
fn version_1_forbids_large_pages_and_version_2_changes_nothing() {
    let option = |c: &Container| c.program.option(c.iommu, uapi::OPTION_HUGE_PAGES, 1, c.ioas, 3).unwrap();
    let c = container("edu", vfio::TYPE1V2_IOMMU);
    assert_eq!(option(&c), 1);
    let c = container("edu", vfio::TYPE1_IOMMU);
    assert_eq!(option(&c), 0);
    assert_eq!(c.number(vfio::SET_IOMMU, vfio::TYPE1V2_IOMMU), Ok(0));
    assert_eq!(option(&c), 0);

    let c = container("edu", vfio::TYPE1V2_IOMMU);
    c.map(READ_WRITE, BUFFER, 100, 0).unwrap();
    assert_eq!(c.number(vfio::SET_IOMMU, vfio::TYPE1_IOMMU), Err(Errno::ADDRINUSE));
    c.unmap_flags(ALL, 0, 0).0.unwrap();
    c.map(READ_WRITE, BUFFER, PAGE, 0).unwrap();
    let _device = c.attached();
    assert_eq!(c.number(vfio::SET_IOMMU, vfio::TYPE1_IOMMU), Err(Errno::INVAL), "too late");
    assert_eq!(option(&c), 1);
}

#[test]
fn what_is_mapped_is_what_ioas_map_maps() {
    let c = container("edu", vfio::TYPE1V2_IOMMU);
    let device = c.attached();
    c.map(READ_WRITE, BUFFER, 2 * PAGE, 0x10_0000).unwrap();
    c.program.put(BUFFER, b"type1").unwrap();
    c.program.device_copies(&device, 0x10_0000, 0x10_0000 + PAGE, 5);
    assert_eq!(c.program.get(BUFFER + PAGE, 5).unwrap(), b"type1");
    assert_eq!(c.areas(), [(0x10_0000, 0x10_1fff)]);

    assert_eq!(c.map(READ_WRITE, BUFFER, PAGE, 0x10_0000), Err(Errno::EXIST));
    assert_eq!(c.map(READ_WRITE, BUFFER, 0, 0), Err(Errno::INVAL));
    assert_eq!(c.map(0, BUFFER, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(c.map(READ_WRITE, BUFFER + 1, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(c.map(READ_WRITE, BUFFER, PAGE, 0xfee0_0000), Err(Errno::INVAL), "reserved");
    assert_eq!(c.map(READ_WRITE, BUFFER, PAGE, u64::MAX - PAGE + 1), Ok(()), "the last page");
    assert_eq!(c.map(READ_WRITE, BUFFER, 2 * PAGE, u64::MAX - PAGE + 1), Err(Errno::OVERFLOW));
    assert_eq!(c.map(READ_WRITE, u64::MAX, 2, 0), Err(Errno::OVERFLOW));
    assert_eq!(c.map(READ_WRITE, BUFFER + BUFFER_SIZE, PAGE, 0), Err(Errno::FAULT));
    // Only reading, only writing.
    c.map(1, BUFFER, PAGE, 0x20_0000).unwrap();
    c.map(2, BUFFER + 2 * PAGE, PAGE, 0x20_1000).unwrap();
    c.program.device_copies(&device, 0x20_0000, 0x20_1000, 5);
    assert_eq!(c.program.get(BUFFER + 2 * PAGE, 5).unwrap(), b"type1");
    c.program.device_copies(&device, 0x10_0800, 0x20_0000, 5);
    assert_eq!(c.program.get(BUFFER, 5).unwrap(), b"type1", "no write to what is mapped for reading");
}

#[test]
fn version_2_unmaps_whole_mappings() {
    let c = container("edu", vfio::TYPE1V2_IOMMU);
    let _device = c.attached();
    c.map(READ_WRITE, BUFFER, 4 * PAGE, 0x10_0000).unwrap();
    c.map(READ_WRITE, BUFFER, PAGE, 0x20_0000).unwrap();
    for (iova, size) in [(0x10_0000, PAGE), (0x10_1000, PAGE), (0x10_3000, PAGE), (0xf_f000, 2 * PAGE)] {
        assert_eq!(c.unmap(iova, size), (Err(Errno::NOENT), 0), "{iova:#x}");
    }
    assert_eq!(c.areas().len(), 2);
    assert_eq!(c.unmap(0, 0x1000_0000), (Ok(()), 5 * PAGE));
    assert_eq!(c.unmap(0, 0x1000_0000), (Ok(()), 0), "to find nothing is no error");
    assert_eq!(c.unmap(0, 0), (Err(Errno::INVAL), 0));
    assert_eq!(c.unmap(PAGE, u64::MAX), (Err(Errno::OVERFLOW), 0));
    assert_eq!(c.program.charged(), 0);

    c.map(READ_WRITE, BUFFER, 4 * PAGE, 0x10_0000).unwrap();
    assert_eq!(c.unmap_flags(ALL, 0, PAGE), (Err(Errno::INVAL), PAGE));
    assert_eq!(c.unmap_flags(ALL, PAGE, 0), (Err(Errno::INVAL), 0));
    assert_eq!(c.unmap_flags(ALL, 0, 0), (Ok(()), 4 * PAGE));
    assert_eq!(c.unmap_flags(ALL, 0, 0), (Ok(()), 0));
}

fn version_1_unmaps_any_pages(device: &str) {
    let c = container(device, vfio::TYPE1_IOMMU);
    let device = c.attached();
    c.map(READ_WRITE, BUFFER, 8 * PAGE, 0x10_0000).unwrap();
    c.map(READ_WRITE, BUFFER + 8 * PAGE, 2 * PAGE, 0x10_8000).unwrap();
    // Out of the middle: two areas are left of one.
    assert_eq!(c.unmap(0x10_2000, PAGE), (Ok(()), PAGE));
    assert_eq!(c.areas(), [(0x10_0000, 0x10_1fff), (0x10_3000, 0x10_7fff), (0x10_8000, 0x10_9fff)]);
    assert_eq!(c.program.charged(), 9);
    let copies = |from: u64, to: u64| {
        let place = |iova: u64| BUFFER + (iova - 0x10_0000);
        c.program.put(place(from), b"left").unwrap();
        c.program.put(place(to), b"....").unwrap();
        c.program.device_copies(&device, from, to, 4);
        c.program.get(place(to), 4).unwrap() == b"left"
    };
    assert!(copies(0x10_1000, 0x10_3000) && copies(0x10_7000, 0x10_0000));
    assert!(!copies(0x10_1000, 0x10_2000), "it is gone");
    // Over a boundary of areas, of each a part.
    assert_eq!(c.unmap(0x10_7000, 2 * PAGE), (Ok(()), 2 * PAGE));
    assert_eq!(c.areas(), [(0x10_0000, 0x10_1fff), (0x10_3000, 0x10_6fff), (0x10_9000, 0x10_9fff)]);
    assert!(copies(0x10_9000, 0x10_6000) && !copies(0x10_9000, 0x10_8000) && !copies(0x10_9000, 0x10_7000));
    assert_eq!(c.program.charged(), 7);
    // Not within a page.
    assert_eq!(c.unmap(0x10_3000, 100).0, Err(Errno::INVAL));
    assert_eq!(c.unmap(0x10_3800, PAGE).0, Err(Errno::INVAL));
    assert_eq!(c.unmap(0x10_3000, 1), (Err(Errno::NOENT), 0));
    assert_eq!(c.unmap(0x10_2001, PAGE).0, Err(Errno::NOENT));
    assert_eq!(c.unmap(0x10_2000, 0).0, Err(Errno::INVAL));
    assert_eq!(c.unmap(0x10_2000, PAGE), (Ok(()), 0));
    assert_eq!(c.program.charged(), 7);
    // A range larger than everything, with holes, from the part of an area on; and what was mapped can be again.
    assert_eq!(c.unmap(0x10_1000, 1 << 30), (Ok(()), 6 * PAGE));
    assert_eq!((c.areas(), c.program.charged()), (vec![(0x10_0000, 0x10_0fff)], 1));
    c.map(READ_WRITE, BUFFER + PAGE, 7 * PAGE, 0x10_1000).unwrap();
    assert!(copies(0x10_0000, 0x10_7000));
    assert_eq!(c.unmap(0, 1 << 30), (Ok(()), 8 * PAGE));
    assert_eq!(c.program.charged(), 0);
}

#[test]
fn version_1_unmaps_any_pages_of_a_native_table() {
    version_1_unmaps_any_pages("edu");
}

#[test]
fn version_1_unmaps_any_pages_of_a_vtd_table() {
    version_1_unmaps_any_pages("edu:table=vtd");
}

#[test]
fn parts_of_an_area_outlive_tables_and_are_registered_anew() {
    let c = container("edu", vfio::TYPE1_IOMMU);
    let device = c.attached();
    c.map(READ_WRITE, BUFFER, 8 * PAGE, 0).unwrap();
    assert_eq!(c.unmap(2 * PAGE, 4 * PAGE), (Ok(()), 4 * PAGE));
    c.program.detach(&device).unwrap();
    assert_eq!((c.program.charged(), c.areas().len()), (0, 2));
    // Without a table the areas alone are cut.
    assert_eq!(c.unmap(7 * PAGE, PAGE), (Ok(()), PAGE));
    assert_eq!(c.areas(), [(0, 0x1fff), (0x6000, 0x6fff)]);
    c.program.attach(&device, c.ioas).unwrap();
    assert_eq!(c.program.charged(), 3);
    c.program.put(BUFFER, b"again").unwrap();
    c.program.device_copies(&device, 0, 6 * PAGE, 5);
    assert_eq!(c.program.get(BUFFER + 6 * PAGE, 5).unwrap(), b"again");
    // The parts are areas, which IOAS_UNMAP can end too.
    assert_eq!(c.program.unmap(c.iommu, c.ioas, 6 * PAGE, PAGE), Ok(PAGE));
    assert_eq!(c.program.charged(), 2);
    assert_eq!(c.program.unmap(c.iommu, c.ioas, 0, u64::MAX), Ok(2 * PAGE));
    assert_eq!(c.program.charged(), 0);
}

#[test]
fn pages_that_another_area_has_stay_charged() {
    let c = container("edu", vfio::TYPE1_IOMMU);
    let _device = c.attached();
    c.map(READ_WRITE, BUFFER, 4 * PAGE, 0).unwrap();
    c.program.map_flags(c.iommu, c.ioas, FIXED | READ, BUFFER + PAGE, PAGE, 1 << 20).unwrap();
    assert_eq!(c.unmap(PAGE, 2 * PAGE), (Ok(()), 2 * PAGE));
    assert_eq!(c.program.charged(), 3);
    assert_eq!(c.areas(), [(0, 0xfff), (0x3000, 0x3fff), (1 << 20, (1 << 20) + 0xfff)]);
}

#[test]
fn ranges_and_page_sizes_are_told_in_the_room_there_is() {
    let c = container("edu", vfio::TYPE1V2_IOMMU);
    let ask = |room: u32| {
        let mut bytes = vec![0xaa; 200];
        bytes[..16].fill(0);
        bytes[..4].copy_from_slice(&room.to_ne_bytes());
        c.program.call(c.iommu, Type1Info::NUMBER, &mut bytes).unwrap();
        assert!(bytes[room as usize..].iter().all(|byte| *byte == 0xaa), "only the room is written");
        bytes
    };
    let whole = 24 + 16 + 16 + 16;
    for room in 16..whole {
        let bytes = ask(room);
        let (info, _) = Type1Info::read_from_prefix(&bytes).unwrap();
        assert_eq!((info.argsz, info.flags), (whole, 3));
        assert_eq!(info.iova_pgsizes, !0xfff);
        assert!(room < 24 || info.cap_offset == 0);
    }
    let capabilities = |room: u32| {
        let bytes = ask(room);
        let (info, _) = Type1Info::read_from_prefix(&bytes).unwrap();
        let mut at = info.cap_offset as usize;
        let mut ranges = Vec::new();
        let mut seen = Vec::new();
        while at != 0 {
            let (header, _) = vfio::InfoCapHeader::read_from_prefix(&bytes[at..]).unwrap();
            assert_eq!(header.version, 1);
            seen.push(header.id);
            match header.id {
                vfio::TYPE1_INFO_DMA_AVAIL => {
                    let (avail, _) = vfio::Type1InfoDmaAvail::read_from_prefix(&bytes[at..]).unwrap();
                    assert_eq!(avail.avail, u32::MAX);
                }
                _ => {
                    let (cap, rest) = vfio::Type1InfoCapIovaRange::read_from_prefix(&bytes[at..]).unwrap();
                    for entry in rest.chunks(16).take(cap.nr_iovas as usize) {
                        let range = vfio::Type1IovaRange::read_from_bytes(entry).unwrap();
                        ranges.push((range.start, range.end));
                    }
                }
            }
            at = header.next as usize;
        }
        (seen, ranges)
    };
    let both = vec![vfio::TYPE1_INFO_DMA_AVAIL, vfio::TYPE1_INFO_CAP_IOVA_RANGE];
    assert_eq!(capabilities(whole), (both.clone(), vec![(0, u64::MAX)]));
    let _device = c.attached();
    let around_interrupts = vec![(0, 0xfedf_ffff), (0xfef0_0000, u64::MAX)];
    assert_eq!(capabilities(150), (both, around_interrupts));
    // The answer has to arrive.
    c.program.map_memory(0x1000, PAGE);
    c.program.put(0x1000, Type1Info::default().sized().as_bytes()).unwrap();
    c.program.protect(0x1000, PAGE, false);
    assert_eq!(c.program.ioctl(c.iommu, Type1Info::NUMBER, 0x1000), Err(Errno::FAULT));
}
