//! What devices write: recorded by page tables that were made for it, read as bitmaps.

mod program;

use ioasid_server::Errno;
use ioasid_uapi::iommufd as uapi;
use ioasid_uapi::iommufd::{HwCapabilities, HwptAllocFlags};
use program::{BUFFER, BoundDevice, PAGE, Program, server_with};

/// Where the tests have their bitmaps, in front of other memory that must not change.
const BITMAP: u64 = 0x5000_0000;
const LARGE: u64 = 0x6000_0000;
const LARGE_SIZE: u64 = 4 << 20;
const NO_CLEAR: u32 = 1;

struct Tracked {
    program: Program,
    iommu: i32,
    device: BoundDevice,
    hwpt: u32,
}

fn alloc(program: &Program, iommu: i32, dev_id: u32, pt_id: u32, flags: u32) -> Result<u32, Errno> {
    let command = uapi::HwptAlloc { flags, dev_id, pt_id, ..Default::default() };
    program.run(iommu, command).map(|command| command.out_hwpt_id)
}

/// A device on a table that records, with the buffer's pages from IOVA 0 on and a large one at 1 GiB.
fn tracked(kind: &str) -> Tracked {
    let program = Program::of(&server_with(&format!("edu:table={kind},dma-mask=40")));
    program.map_memory(BITMAP, 4 * PAGE);
    program.map_memory(LARGE, LARGE_SIZE);
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let device = program.bind(iommu);
    let hwpt = alloc(&program, iommu, device.id, ioas, HwptAllocFlags::DIRTY_TRACKING.bits()).unwrap();
    program.attach(&device, hwpt).unwrap();
    // Neighbours are exchanged, so that no leaf is larger than a page.
    for page in 0..16 {
        program.map_fixed(iommu, ioas, BUFFER + (page ^ 1) * PAGE, PAGE, page * PAGE).unwrap();
    }
    program.map_fixed(iommu, ioas, LARGE, LARGE_SIZE, 1 << 30).unwrap();
    Tracked { program, iommu, device, hwpt }
}

impl Tracked {
    fn track(&self, flags: u32) -> Result<(), Errno> {
        let command = uapi::HwptSetDirtyTracking { flags, hwpt_id: self.hwpt, ..Default::default() };
        self.program.run(self.iommu, command).map(drop)
    }

    /// Lets the device write a byte.
    fn write(&self, iova: u64) {
        self.program.device_copies(&self.device, 0, iova, 1);
    }

    fn get(&self, flags: u32, iova: u64, length: u64, page_size: u64, data: u64) -> Result<(), Errno> {
        let hwpt_id = self.hwpt;
        let command =
            uapi::HwptGetDirtyBitmap { hwpt_id, flags, iova, length, page_size, data, ..Default::default() };
        self.program.run(self.iommu, command).map(drop)
    }

    /// Which bits of a bitmap that was empty are set.
    fn bits(&self, flags: u32, iova: u64, length: u64, page_size: u64) -> Vec<u64> {
        self.program.put(BITMAP, &[0; 4 * PAGE as usize]).unwrap();
        self.get(flags, iova, length, page_size, BITMAP).unwrap();
        let bytes = self.program.get(BITMAP, 4 * PAGE as usize).unwrap();
        (0..4 * PAGE * 8).filter(|bit| bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1).collect()
    }

    fn pages(&self) -> Vec<u64> {
        self.bits(0, 0, 16 * PAGE, PAGE)
    }
}

fn pages_are_reported_once_and_again_when_written_again(kind: &str) {
    let t = tracked(kind);
    t.write(PAGE);
    t.track(1).unwrap();
    assert_eq!(t.pages(), [0; 0], "what was written before does not count");
    for page in [2, 5, 6] {
        t.write(page * PAGE + 77);
    }
    assert_eq!(t.bits(NO_CLEAR, 0, 16 * PAGE, PAGE), [2, 5, 6]);
    assert_eq!(t.bits(0, 2 * PAGE, 4 * PAGE, PAGE), [0, 3]);
    assert_eq!(t.pages(), [6], "the others were cleared");
    assert_eq!(t.pages(), [0; 0]);
    t.write(6 * PAGE);
    assert_eq!(t.pages(), [6]);
    // Over the boundary of two pages; and a page that is only read.
    t.program.device_copies(&t.device, 9 * PAGE, 4 * PAGE - 8, 16);
    assert_eq!(t.pages(), [3, 4]);

    t.write(7 * PAGE);
    t.track(0).unwrap();
    t.write(8 * PAGE);
    assert_eq!(t.pages(), [7], "no longer recorded, but what was is there");
    t.write(7 * PAGE);
    t.track(1).unwrap();
    t.write(10 * PAGE);
    t.track(1).unwrap();
    assert_eq!(t.pages(), [0; 0], "to begin again forgets");
}

fn the_bitmap_has_the_clients_page_size(kind: &str) {
    let t = tracked(kind);
    t.track(1).unwrap();
    t.write(3 * PAGE);
    assert_eq!(t.bits(NO_CLEAR, 0, 16 * PAGE, PAGE / 2), [6, 7]);
    assert_eq!(t.bits(NO_CLEAR, 0, 16 * PAGE, 2 * PAGE), [1]);
    assert_eq!(t.bits(NO_CLEAR, 0, 16 * PAGE, 16 * PAGE), [0]);
    // A range with holes, up to the last address, in enormous pages.
    t.write((1 << 30) + 5);
    assert_eq!(t.bits(0, 0, 1 << 46, 1 << 30), [0, 1]);
    assert_eq!(t.bits(0, 0, 1 << 46, 1 << 30), [0; 0]);
    t.write(0);
    assert_eq!(t.bits(0, 1 << 63, 1 << 63, 1 << 63), [0; 0]);
    assert_eq!(t.pages(), [0]);
}

fn a_large_leaf_is_written_as_a_whole(kind: &str) {
    let t = tracked(kind);
    t.track(1).unwrap();
    t.write((1 << 30) + 0x5000);
    let bits = t.bits(NO_CLEAR, 1 << 30, LARGE_SIZE, PAGE);
    assert!(bits.contains(&5));
    // Asked for in small parts nothing is lost, although it cannot be cleared in parts.
    let mut all = Vec::new();
    for part in 0..LARGE_SIZE / (16 * PAGE) {
        let bits = t.bits(0, (1 << 30) + part * 16 * PAGE, 16 * PAGE, PAGE);
        all.extend(bits.into_iter().map(|bit| part * 16 + bit));
    }
    assert_eq!(all, bits);
    t.bits(0, 1 << 30, LARGE_SIZE, PAGE);
    assert_eq!(t.bits(0, 1 << 30, LARGE_SIZE, PAGE), [0; 0]);
}

fn a_bad_bitmap_loses_nothing(kind: &str) {
    let t = tracked(kind);
    t.track(1).unwrap();
    t.write(2 * PAGE);
    t.write(13 * PAGE);
    t.write(1 << 30);
    assert_eq!(t.get(0, 0, 16 * PAGE, PAGE, 0), Err(Errno::FAULT));
    assert_eq!(t.get(0, 0, 16 * PAGE, PAGE, u64::MAX - 3), Err(Errno::FAULT));
    t.program.protect(BITMAP, 4 * PAGE, false);
    assert_eq!(t.get(0, 0, 16 * PAGE, PAGE, BITMAP), Err(Errno::FAULT));
    t.program.protect(BITMAP, 4 * PAGE, true);
    assert_eq!(t.get(0, 0, 1 << 36, PAGE, BITMAP), Err(Errno::FAULT), "the bitmap ends before");
    assert_eq!(t.program.get(BITMAP, 2).unwrap(), [0, 0], "nothing of a portion that does not fit");
    assert_eq!(t.pages(), [2, 13]);
    assert_eq!(t.bits(0, 1 << 30, 1 << 30, 1 << 30), [0]);
    assert_eq!(t.pages(), [0; 0]);
}

macro_rules! for_kinds {
    ($($kind:ident $table:literal),*: $tests:tt) => { $(for_kinds! { @ $kind $table $tests })* };
    (@ $kind:ident $table:literal { $($name:ident)* }) => {
        mod $kind { $(#[test] fn $name() { super::$name($table); })* }
    };
}

for_kinds! {
    vtd "vtd", amd_v1 "amdv1", x86_64 "x86-64", risc_v "sv48": {
        pages_are_reported_once_and_again_when_written_again
        the_bitmap_has_the_clients_page_size
        a_large_leaf_is_written_as_a_whole
        a_bad_bitmap_loses_nothing
    }
}

#[test]
fn bits_are_only_set_and_only_those() {
    let t = tracked("vtd");
    t.track(1).unwrap();
    t.write(3 * PAGE);
    t.program.put(BITMAP, &[0x41; 24]).unwrap();
    t.get(0, 2 * PAGE, 8 * PAGE, PAGE, BITMAP + 8).unwrap();
    let mut expected = [0x41; 24];
    expected[8] |= 2;
    assert_eq!(t.program.get(BITMAP, 24).unwrap(), expected);
    // A bitmap at an odd address, of a range in which nothing was written, that is not writable.
    t.program.protect(BITMAP, 4 * PAGE, false);
    t.get(0, 0, 16 * PAGE, PAGE, BITMAP + 1).unwrap();
}

#[test]
fn arguments_are_checked() {
    let t = tracked("vtd");
    let get = |iova, length, page_size| t.get(0, iova, length, page_size, BITMAP);
    assert_eq!(t.get(2, 0, PAGE, PAGE, BITMAP), Err(Errno::OPNOTSUPP));
    assert_eq!(t.track(2), Err(Errno::OPNOTSUPP));
    let reserved = uapi::HwptGetDirtyBitmap { reserved: 1, hwpt_id: t.hwpt, ..Default::default() };
    assert_eq!(t.program.run(t.iommu, reserved), Err(Errno::OPNOTSUPP));
    assert_eq!(get(0, 0, PAGE), Err(Errno::INVAL));
    assert_eq!(get(0, PAGE, 0), Err(Errno::INVAL));
    assert_eq!(get(0, 6 * PAGE, 3 * PAGE), Err(Errno::INVAL), "no power of two");
    assert_eq!(get(PAGE, 2 * PAGE, 2 * PAGE), Err(Errno::INVAL));
    assert_eq!(get(0, 3 * PAGE, 2 * PAGE), Err(Errno::INVAL));
    assert_eq!(get(PAGE / 2, PAGE, PAGE / 2), Err(Errno::INVAL), "not aligned to mappings");
    assert_eq!(get(PAGE, 0_u64.wrapping_sub(PAGE) + 1, PAGE), Err(Errno::OVERFLOW));
    assert_eq!(get(0, 1 << 46, PAGE), Err(Errno::INVAL), "too long a bitmap");
    for hwpt_id in [0, 1, t.device.id, 99] {
        let command = uapi::HwptSetDirtyTracking { hwpt_id, ..Default::default() };
        assert_eq!(t.program.run(t.iommu, command), Err(Errno::NOENT));
        let command = uapi::HwptGetDirtyBitmap { hwpt_id, ..Default::default() };
        assert_eq!(t.program.run(t.iommu, command), Err(Errno::NOENT));
    }
}

#[test]
fn only_tables_that_were_made_for_it_record() {
    let program = Program::of(&server_with("edu:table=vtd"));
    let iommu = program.iommu();
    let ioas = program.ioas(iommu);
    let device = program.bind(iommu);
    let automatic = program.attach(&device, ioas).unwrap();
    let own = alloc(&program, iommu, device.id, ioas, 0).unwrap();
    for hwpt_id in [automatic, own] {
        let command = uapi::HwptSetDirtyTracking { flags: 1, hwpt_id, ..Default::default() };
        assert_eq!(program.run(iommu, command), Err(Errno::OPNOTSUPP));
        let (length, page_size) = (PAGE, PAGE);
        let command = uapi::HwptGetDirtyBitmap { hwpt_id, length, page_size, ..Default::default() };
        assert_eq!(program.run(iommu, command), Err(Errno::OPNOTSUPP));
    }
    for flags in [1, 3, 4, 16, 1 << 31] {
        assert_eq!(alloc(&program, iommu, device.id, ioas, flags), Err(Errno::OPNOTSUPP), "{flags}");
    }
}

#[test]
fn the_capability_is_reported_where_it_is_true() {
    for (kind, capable) in [("native", false), ("vtd", true), ("amdv1", true), ("sv39", true)] {
        let program = Program::of(&server_with(&format!("edu:table={kind}")));
        let iommu = program.iommu();
        let ioas = program.ioas(iommu);
        let device = program.bind(iommu);
        let info = program.run(iommu, uapi::GetHwInfo { dev_id: device.id, ..Default::default() }).unwrap();
        let capabilities = HwCapabilities::from_bits(info.out_capabilities).unwrap();
        assert_eq!(capabilities.contains(HwCapabilities::DIRTY_TRACKING), capable, "{kind}");
        let made = alloc(&program, iommu, device.id, ioas, HwptAllocFlags::DIRTY_TRACKING.bits());
        assert_eq!(made.is_ok(), capable, "{kind}");
    }
}
