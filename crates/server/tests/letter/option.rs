//! OPTION: who pays, and large pages.

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;

use crate::ladder::ladder;
use crate::program::{BUFFER, PAGE};
use crate::{Machine, NOBODY};

const GET: u16 = uapi::OPTION_OP_GET;
const SET: u16 = uapi::OPTION_OP_SET;

#[test]
fn who_pays() {
    let m = Machine::new();
    let mode = |op, val64| m.program.option(m.iommu, uapi::OPTION_RLIMIT_MODE, op, 0, val64);
    let good = uapi::SetOption { option_id: uapi::OPTION_RLIMIT_MODE, op: SET, ..Default::default() };
    let of_the_call: &[crate::ladder::Fault<'_, uapi::SetOption>] = &[
        ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
        ("an unknown option", Errno::OPNOTSUPP, &|c| c.option_id = 2),
        ("of an object", Errno::OPNOTSUPP, &|c| c.object_id = m.ioas),
        ("an unknown operation", Errno::OPNOTSUPP, &|c| c.op = 2),
    ];
    let and = |rule, errno| [of_the_call, &[(rule, errno, &|c| c.val64 = 2)]].concat();
    ladder(&m.program, m.iommu, good, &and("no privilege, before objects and the value", Errno::PERM));
    m.program.set_may_change_resource_mode(true);
    ladder(&m.program, m.iommu, good, &and("there are objects, before the value", Errno::BUSY));
    assert_eq!(mode(GET, 7), Ok(0), "asking needs neither, and no value");
    m.program.destroy(m.iommu, m.ioas).unwrap();
    ladder(&m.program, m.iommu, good, &and("neither 0 nor 1", Errno::INVAL));
    assert_eq!((mode(SET, 1), mode(GET, 7)), (Ok(1), Ok(1)));
    m.program.set_may_change_resource_mode(false);
    assert_eq!((mode(SET, 0), mode(GET, 7)), (Err(Errno::PERM), Ok(1)));
}

#[test]
fn large_pages() {
    let m = Machine::new();
    let option = |op, val64| m.program.option(m.iommu, uapi::OPTION_HUGE_PAGES, op, m.ioas, val64);
    let good = uapi::SetOption {
        option_id: uapi::OPTION_HUGE_PAGES,
        op: SET,
        object_id: m.ioas,
        val64: 1,
        ..Default::default()
    };
    let of_the_call: &[crate::ladder::Fault<'_, uapi::SetOption>] = &[
        ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
        ("an unknown option", Errno::OPNOTSUPP, &|c| c.option_id = u32::MAX),
        ("no such space", Errno::NOENT, &|c| c.object_id = NOBODY),
        ("no space at all", Errno::NOENT, &|c| c.object_id = 0),
        ("an unknown operation", Errno::OPNOTSUPP, &|c| c.op = u16::MAX),
        ("neither 0 nor 1", Errno::INVAL, &|c| c.val64 = u64::MAX),
    ];
    ladder(&m.program, m.iommu, good, of_the_call);
    let without = |rule, errno| [of_the_call, &[(rule, errno, &|c| c.val64 = 0)]].concat();
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, 100, 0).unwrap();
    ladder(&m.program, m.iommu, good, &without("an area that is no multiple of pages", Errno::ADDRINUSE));
    assert_eq!(option(SET, 1), Ok(1), "what is so already stays so");
    m.program.unmap(m.iommu, m.ioas, 0, 100).unwrap();
    m.program.map_fixed(m.iommu, m.ioas, BUFFER, PAGE, 0).unwrap();
    let device = m.program.bind(m.iommu);
    m.program.attach(&device, m.ioas).unwrap();
    ladder(&m.program, m.iommu, good, &without("a table with areas", Errno::INVAL));
    m.program.detach(&device).unwrap();
    assert_eq!((option(SET, 0), option(GET, 9)), (Ok(0), Ok(0)), "without a table");
    assert_eq!(m.program.iova_ranges(m.iommu, m.ioas, 1).2, PAGE, "pages are the unit now");
    m.program.attach(&device, m.ioas).unwrap();
    assert_eq!(option(SET, 0), Ok(0), "what is so already is not in the way of tables with areas");
    assert_eq!((option(SET, 1), option(GET, 9)), (Ok(1), Ok(1)), "allowing is never in anybody's way");
}
