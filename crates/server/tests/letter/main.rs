//! The commands of `/dev/iommu` to the letter: every rule of Linux that a single call can break, in words, with its errno.
//!
//! A command's rules are a [`ladder`]: what is wrong with a call, in the order in which Linux looks. Each pair of faults is
//! tried in one call, which has to be answered with the error of the earlier one, leave its argument as it was, and change
//! nothing. So a rule that is missing, has another errno, or comes too early or too late fails a test that names it.
//! What takes more than one call to see is told beside the ladders.
//!
//! Sizes and tails of arguments are tried for all commands at once in `tests/iommufd.rs`.

#[path = "../program/mod.rs"]
mod program;

mod copy;
mod dirty;
mod hwpt;
mod ladder;
mod map;
mod map_file;
mod option;
mod ranges;
mod type1;
mod unmap;

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd_test as test;
use ladder::ladder;
use program::{BUFFER, BoundDevice, PAGE, Program, READ, server_with};

/// A range that is reserved; the page behind it is mapped.
const RESERVED: u64 = 0x4000_0000;
/// A page that is mapped.
const TAKEN: u64 = RESERVED + PAGE;
/// Memory that no program has.
const NOWHERE: u64 = 0x10_0000_0000;
/// The last page of 2^64.
const LAST_PAGE: u64 = u64::MAX - PAGE + 1;
/// A number that no object has.
const NOBODY: u32 = 99;

/// A program with an address space.
struct Machine {
    program: Program,
    iommu: i32,
    ioas: u32,
}

impl Machine {
    fn new() -> Self {
        Self::with("edu")
    }

    fn with(device: &str) -> Self {
        let program = Program::of(&server_with(device));
        let iommu = program.iommu();
        let ioas = program.ioas(iommu);
        Self { program, iommu, ioas }
    }

    /// One in whose address space a range is reserved and the page behind it is mapped, and a device is attached: pages are
    /// the unit, and memory is looked at.
    fn attached() -> (Self, BoundDevice) {
        let m = Self::new();
        m.reserve(RESERVED, PAGE);
        m.program.map_flags(m.iommu, m.ioas, program::FIXED | READ, BUFFER, PAGE, TAKEN).unwrap();
        let device = m.program.bind(m.iommu);
        m.program.attach(&device, m.ioas).unwrap();
        (m, device)
    }

    fn reserve(&self, start: u64, length: u64) {
        self.program.test(self.iommu, self.ioas, &test::AddReserved { start, length }).unwrap();
    }

    /// First and last IOVA of each area of the address space.
    fn areas(&self) -> Vec<(String, String)> {
        let status = self.program.server.status();
        let spaces = &status.contexts[0].address_spaces;
        let space = spaces.iter().find(|space| space.id == self.ioas).unwrap();
        space.areas.iter().map(|area| (area.first.clone(), area.last.clone())).collect()
    }
}

#[test]
fn ioas_alloc() {
    let m = Machine::new();
    ladder(&m.program, m.iommu, uapi::IoasAlloc::default(), &[("flags", Errno::OPNOTSUPP, &|c| c.flags = 1)]);
    let second = m.program.run(m.iommu, uapi::IoasAlloc { out_ioas_id: 77, ..Default::default() }).unwrap();
    assert_eq!(second.out_ioas_id, 2, "what was refused has used up no number, and none is asked for");
}

#[test]
fn destroy() {
    let (m, device) = Machine::attached();
    let destroy = |id| m.program.destroy(m.iommu, id);
    let table = m.program.hwpt(m.iommu, device.id, m.ioas).unwrap();
    for (rule, id, answer) in [
        ("0 is no object", 0, Err(Errno::NOENT)),
        ("nor is what was never given out", NOBODY, Err(Errno::NOENT)),
        ("a bound device is its file's", device.id, Err(Errno::BUSY)),
        ("a space with tables is in use", m.ioas, Err(Errno::BUSY)),
        ("a table that nobody is attached to is not", table, Ok(())),
        ("and is gone then", table, Err(Errno::NOENT)),
    ] {
        assert_eq!(destroy(id), answer, "{rule}");
    }
}

#[test]
fn change_process() {
    let (m, _device) = Machine::attached();
    let good = uapi::IoasChangeProcess::default();
    // Something of the process's own memory is mapped.
    ladder(
        &m.program,
        m.iommu,
        good,
        &[
            ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
            ("memory that is not a file's", Errno::INVAL, &|_| ()),
        ],
    );
    m.program.unmap(m.iommu, m.ioas, TAKEN, PAGE).unwrap();
    assert!(m.program.run(m.iommu, good).is_ok(), "nothing is mapped, so nothing is in the way");
}

#[test]
fn vfio_ioas() {
    let m = Machine::new();
    let run = |op, ioas_id| {
        m.program.run(m.iommu, uapi::VfioIoas { op, ioas_id, ..Default::default() }).map(|c| c.ioas_id)
    };
    ladder(
        &m.program,
        m.iommu,
        uapi::VfioIoas { op: uapi::VFIO_IOAS_SET, ioas_id: m.ioas, ..Default::default() },
        &[
            ("the reserved field", Errno::OPNOTSUPP, &|c| c.reserved = 1),
            ("an unknown operation", Errno::OPNOTSUPP, &|c| c.op = 3),
            ("no such space", Errno::NOENT, &|c| c.ioas_id = NOBODY),
        ],
    );
    assert_eq!(run(uapi::VFIO_IOAS_GET, 0), Err(Errno::NODEV), "none is chosen");
    assert_eq!(run(uapi::VFIO_IOAS_CLEAR, NOBODY), Ok(NOBODY), "clearing needs none, and names none");
    assert_eq!(run(uapi::VFIO_IOAS_SET, m.ioas), Ok(m.ioas));
    assert_eq!(run(uapi::VFIO_IOAS_GET, NOBODY), Ok(m.ioas));
    m.program.destroy(m.iommu, m.ioas).unwrap();
    assert_eq!(
        run(uapi::VFIO_IOAS_GET, 0),
        Err(Errno::NODEV),
        "a space that is destroyed is no choice any more"
    );
    assert_eq!(m.program.ioas(m.iommu), m.ioas, "the number is given out again");
    assert_eq!(run(uapi::VFIO_IOAS_GET, 0), Err(Errno::NODEV), "but means another space");
}

/// The table of a kernel ends before the self-test's command, which only kernels built for it have.
#[test]
fn numbers_behind_the_last_command_are_not_even_read() {
    let production = ioasid_server::Server::new(ioasid_server::ServerOptions::default()).unwrap();
    let program = Program::of(&production);
    let iommu = program.iommu();
    let unreadable = 1;
    for (number, answer) in [
        (0x3b7f, Errno::NOTTY),
        (0x3b80, Errno::FAULT),
        (0x3b95, Errno::FAULT),
        (0x3b96, Errno::NOTTY),
        (0x3ba0, Errno::NOTTY),
        (0x3bff, Errno::NOTTY),
    ] {
        assert_eq!(program.ioctl(iommu, number, unreadable), Err(answer), "{number:#x}");
    }
    let of_tests = Machine::new();
    assert_eq!(of_tests.program.ioctl(of_tests.iommu, 0x3b96, unreadable), Err(Errno::FAULT), "a gap");
}
