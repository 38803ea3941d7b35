//! HWPT_SET_DIRTY_TRACKING and HWPT_GET_DIRTY_BITMAP.

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd::HwptAllocFlags;

use crate::ladder::ladder;
use crate::program::{BUFFER, PAGE};
use crate::{LAST_PAGE, Machine, NOBODY, NOWHERE};

#[test]
fn tracking_and_its_bitmap() {
    let m = Machine::with("edu:table=vtd");
    let device = m.program.bind(m.iommu);
    let plain = m.program.hwpt(m.iommu, device.id, m.ioas).unwrap();
    let flags = HwptAllocFlags::DIRTY_TRACKING.bits();
    let alloc = uapi::HwptAlloc { flags, dev_id: device.id, pt_id: m.ioas, ..Default::default() };
    let hwpt_id = m.program.run(m.iommu, alloc).unwrap().out_hwpt_id;

    let set = uapi::HwptSetDirtyTracking { hwpt_id, flags: 1, ..Default::default() };
    ladder(
        &m.program,
        m.iommu,
        set,
        &[
            ("an unknown flag", Errno::OPNOTSUPP, &|c| c.flags = 2),
            ("no such table", Errno::NOENT, &|c| c.hwpt_id = NOBODY),
            ("a space", Errno::NOENT, &|c| c.hwpt_id = m.ioas),
            ("a table that was not made for it", Errno::OPNOTSUPP, &|c| c.hwpt_id = plain),
        ],
    );
    for (rule, command) in [
        ("on", set),
        ("on again", set),
        ("off", uapi::HwptSetDirtyTracking { flags: 0, ..set }),
        ("off again", uapi::HwptSetDirtyTracking { flags: 0, ..set }),
        ("the reserved field is not looked at", uapi::HwptSetDirtyTracking { reserved: 1, ..set }),
    ] {
        assert!(m.program.run(m.iommu, command).is_ok(), "{rule}");
    }

    let get = uapi::HwptGetDirtyBitmap {
        hwpt_id,
        iova: 0x10_0000,
        length: 2 * PAGE,
        page_size: PAGE,
        data: BUFFER,
        ..Default::default()
    };
    ladder(
        &m.program,
        m.iommu,
        get,
        &[
            ("an unknown flag", Errno::OPNOTSUPP, &|c| c.flags = 2),
            ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
            ("no such table", Errno::NOENT, &|c| c.hwpt_id = NOBODY),
            ("a length of 0", Errno::INVAL, &|c| c.length = 0),
            ("an end behind 2^64", Errno::OVERFLOW, &|c| (c.iova, c.length) = (LAST_PAGE, 2 * PAGE)),
            ("an IOVA within a page", Errno::INVAL, &|c| c.iova |= 0x800),
            ("an end within a page", Errno::INVAL, &|c| c.length |= 0x800),
            ("pages of no size", Errno::INVAL, &|c| c.page_size = 0),
            ("larger pages than the range", Errno::INVAL, &|c| c.page_size = 4 * PAGE),
            ("a table that was not made for it", Errno::OPNOTSUPP, &|c| c.hwpt_id = plain),
            ("a bitmap that is not there", Errno::FAULT, &|c| c.data = NOWHERE),
        ],
    );
    let last = uapi::HwptGetDirtyBitmap { iova: LAST_PAGE, length: PAGE, ..get };
    for (rule, command) in [
        ("where nothing is mapped", get),
        ("bits for less than a page", uapi::HwptGetDirtyBitmap { page_size: 1024, ..get }),
        ("the last page of all", last),
    ] {
        assert!(m.program.run(m.iommu, command).is_ok(), "{rule}");
    }
}
