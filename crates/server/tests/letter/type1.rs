//! VFIO's type 1 commands on an open `/dev/iommu`: what is wrong with a call, and how much was unmapped.

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test as test;
use ioasid_uapi::vfio::{self, Type1DmaMap, Type1DmaUnmap, Type1Info};
use ioasid_uapi::{Command, iommufd_test};
use zerocopy::IntoBytes;

use crate::ladder::{Fault, ladder};
use crate::program::{BUFFER, FIXED, IsCommand, PAGE, READ};
use crate::{LAST_PAGE, Machine, NOWHERE, RESERVED, TAKEN};

impl Machine {
    /// Makes VFIO's commands mean the machine's address space.
    fn is_vfios(&self) {
        let command = uapi::VfioIoas { op: uapi::VFIO_IOAS_SET, ioas_id: self.ioas, ..Default::default() };
        self.program.run(self.iommu, command).unwrap();
    }

    /// The result, and the size that the argument has afterwards.
    fn dma_unmap(&self, flags: u32, iova: u64, size: u64) -> (Result<u32, Errno>, u64) {
        let mut command = Type1DmaUnmap { flags, iova, size, ..Default::default() }.sized();
        (self.program.call(self.iommu, Type1DmaUnmap::NUMBER, command.as_mut_bytes()), command.size)
    }
}

const OF_THE_CALL: &[Fault<'_, Type1DmaMap>] = &[
    ("a size that is too small", Errno::INVAL, &|c| c.argsz = Type1DmaMap::MIN_SIZE as u32 - 1),
    ("another address for what is mapped", Errno::INVAL, &|c| c.flags |= 4),
    ("an unknown flag", Errno::INVAL, &|c| c.flags |= 1 << 31),
];

#[test]
fn map_dma() {
    let (m, _device) = Machine::attached();
    m.program.set_memory_lock_limit(Some(4 * PAGE));
    let good = Type1DmaMap { flags: 3, vaddr: BUFFER, iova: 0x10_0000, size: PAGE, ..Default::default() };
    let no_space: &[Fault<'_, Type1DmaMap>] = &[("no space is chosen", Errno::NODEV, &|_| ())];
    ladder(&m.program, m.iommu, good, &[OF_THE_CALL, no_space].concat());
    m.is_vfios();
    let mapping: &[Fault<'_, Type1DmaMap>] = &[
        ("memory that reaches the end of 2^64", Errno::OVERFLOW, &|c| (c.vaddr, c.size) = (LAST_PAGE, PAGE)),
        ("a size of 0", Errno::INVAL, &|c| c.size = 0),
        ("a size that is no multiple of pages", Errno::INVAL, &|c| c.size |= 0x800),
        ("an IOVA that is none", Errno::INVAL, &|c| c.iova |= 0x800),
        ("an end behind 2^64", Errno::OVERFLOW, &|c| (c.iova, c.size) = (LAST_PAGE, 2 * PAGE)),
        ("a reserved range", Errno::INVAL, &|c| (c.iova, c.size) = (RESERVED, 2 * PAGE)),
        ("something is mapped there", Errno::EXIST, &|c| c.iova = TAKEN),
        ("memory that begins within a page", Errno::INVAL, &|c| c.vaddr |= 0x800),
        ("memory that is not there", Errno::FAULT, &|c| c.vaddr = NOWHERE),
        ("more than the process may lock", Errno::NOMEM, &|c| c.size = 8 * PAGE),
    ];
    ladder(&m.program, m.iommu, good, &[OF_THE_CALL, mapping].concat());
    assert!(m.program.run(m.iommu, good).is_ok());
    let last = Type1DmaMap { iova: LAST_PAGE, ..good };
    assert!(m.program.run(m.iommu, last).is_ok(), "the last page of all");
}

/// Of what is found wrong before anything is looked for, the size stays; behind it, what was unmapped is told, which is nothing.
#[test]
fn unmap_dma() {
    const ALL: u32 = 2;
    let (m, _device) = Machine::attached();
    let size = |size| (Err(Errno::INVAL), size);
    for (rule, flags, iova, given, answer) in [
        ("a bitmap of dirty pages", 1, 0, PAGE, size(PAGE)),
        ("an unknown flag", 4, 0, PAGE, size(PAGE)),
        ("no space is chosen", 0, 0, 0, (Err(Errno::NODEV), 0)),
    ] {
        assert_eq!(m.dma_unmap(flags, iova, given), answer, "{rule}");
    }
    m.is_vfios();
    for (rule, flags, iova, given, answer) in [
        ("everything, from somewhere on", ALL, PAGE, 0, size(0)),
        ("everything, of a size", ALL, 0, PAGE, size(PAGE)),
        ("a size of 0", 0, TAKEN, 0, size(0)),
        ("an end behind 2^64", 0, LAST_PAGE, 2 * PAGE, (Err(Errno::OVERFLOW), 0)),
        ("a part of a mapping", 0, TAKEN, PAGE - 1, (Err(Errno::NOENT), 0)),
        ("nothing is there, which is no error", 0, 0, PAGE, (Ok(0), 0)),
        ("nothing is there up to the last byte", 0, LAST_PAGE, PAGE, (Ok(0), 0)),
        ("a mapping", 0, TAKEN - 1, PAGE + 2, (Ok(0), PAGE)),
        ("everything, which is nothing", ALL, 0, 0, (Ok(0), 0)),
    ] {
        assert_eq!(m.dma_unmap(flags, iova, given), answer, "{rule}");
    }
}

#[test]
fn unmap_dma_of_version_1_cuts_what_it_may() {
    let m = Machine::new();
    m.is_vfios();
    assert_eq!(m.program.ioctl(m.iommu, vfio::SET_IOMMU, vfio::TYPE1_IOMMU.into()), Ok(0));
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, 8 * PAGE, 0x10_0000).unwrap();
    let create =
        test::CreateAccess { flags: test::CreateAccessFlags::NEEDS_PIN_PAGES.bits(), ..Default::default() };
    let access = m.program.test(m.iommu, m.ioas, &create).unwrap().out_access_fd;
    let pages = test::AccessPages { iova: 0x10_7000, length: PAGE, ..Default::default() };
    let pin = m.program.test(m.iommu, access, &pages).unwrap().out_access_pages_id;
    let before = m.areas();
    for (rule, iova, size, answer) in [
        ("within a page", 0x10_0000, 100, (Err(Errno::INVAL), 100)),
        ("from within a page on", 0x10_0800, PAGE, (Err(Errno::INVAL), PAGE)),
        ("an area of which pages are pinned", 0x10_0000, PAGE, (Err(Errno::INVAL), PAGE)),
    ] {
        assert_eq!(m.dma_unmap(0, iova, size), answer, "{rule}: nothing is told");
        assert_eq!(m.areas(), before, "{rule}");
    }
    let unpin = iommufd_test::DestroyAccessPages { access_pages_id: pin };
    m.program.test(m.iommu, access, &unpin).unwrap();
    assert_eq!(m.dma_unmap(0, 0x10_2000, 2 * PAGE), (Ok(0), 2 * PAGE));
    assert_eq!(m.areas().len(), 2);
    let pinned = m.program.test(m.iommu, access, &pages).unwrap();
    assert_eq!(m.dma_unmap(0, 0x10_4000, 4 * PAGE), (Ok(0), 4 * PAGE), "a whole area: the access lets go");
    let gone = iommufd_test::DestroyAccessPages { access_pages_id: pinned.out_access_pages_id };
    assert_eq!(m.program.test(m.iommu, access, &gone).map(drop), Err(Errno::NOENT));

    let buffer = test::DmabufGet { length: 2 * PAGE as u32, open_flags: 0 };
    let mut command = test::TestCommand { op: test::OP_DMABUF_GET, ..Default::default() }.sized();
    command.set_payload(&buffer);
    let buffer = m.program.call(m.iommu, test::TestCommand::NUMBER, command.as_mut_bytes()).unwrap();
    let map = uapi::IoasMapFile {
        flags: FIXED | READ,
        ioas_id: m.ioas,
        fd: buffer as i32,
        length: 2 * PAGE,
        iova: 0x20_0000,
        ..Default::default()
    };
    m.program.run(m.iommu, map).unwrap();
    assert_eq!(m.dma_unmap(0, 0x20_0000, PAGE), (Err(Errno::OPNOTSUPP), PAGE), "a dma-buf is not cut");
    assert_eq!(m.dma_unmap(0, 0x20_0000, 2 * PAGE), (Ok(0), 2 * PAGE));
}

#[test]
fn get_info() {
    let m = Machine::new();
    let short: Fault<'_, Type1Info> =
        ("a size that is too small", Errno::INVAL, &|c| c.argsz = Type1Info::MIN_SIZE as u32 - 1);
    let none: Fault<'_, Type1Info> = ("no space is chosen", Errno::NODEV, &|_| ());
    ladder(&m.program, m.iommu, Type1Info::default(), &[short, none]);
    m.is_vfios();
    ladder(&m.program, m.iommu, Type1Info::default(), &[short]);
    assert!(m.program.run(m.iommu, Type1Info::default()).is_ok());
}
