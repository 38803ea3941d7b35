//! Guest memory of vm-memory: its regions as memory, and a space as its IOMMU.

use ioasid::{
    Account, Backing, Bus, GuestRam, Iova, IovaRange, Memory, Permissions, PlugError, RegionError, Space,
    SpaceIommu,
};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use vm_memory::iommu::{Error, IommuMemory};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestRegionMmap, MmapRegion, VolatileMemory,
};

const PAGE: u64 = 4096;
const RW: Permissions = Permissions::READ_WRITE;

fn account() -> Account {
    Account::new("guest", None)
}

fn region(base: u64, length: u64) -> GuestRegionMmap {
    GuestRegionMmap::from_range(GuestAddress(base), length as usize, None).unwrap()
}

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// The address and the length at which an access faults.
fn fault<T: std::fmt::Debug>(result: Result<T, GuestMemoryError>) -> (u64, usize) {
    match result {
        Err(GuestMemoryError::IommuError(Error::CannotResolve { iova_range, .. })) => {
            (iova_range.base.0, iova_range.length)
        }
        other => panic!("no fault: {other:?}"),
    }
}

#[test]
fn a_region_is_the_same_object_however_often_it_is_brought() {
    let bus = Bus::new();
    let account = account();
    let anonymous = region(0, 4 * PAGE);
    let (first, offset) = Backing::guest_region(&bus, &anonymous).unwrap();
    // The same mapping at another guest address.
    let moved = GuestRegionMmap::with_arc(anonymous.get_mmap(), GuestAddress(1 << 30)).unwrap();
    let (second, _) = Backing::guest_region(&bus, &moved).unwrap();
    assert!(Arc::ptr_eq(&first, &second) && offset == 0);
    let memory = Memory::register(&first, 0, 4 * PAGE, &account).unwrap();
    // The backing keeps the memory, and it is the region's own.
    let raw = anonymous.get_mmap();
    drop((anonymous, moved, second));
    first.write(PAGE, b"here").unwrap();
    let mut bytes = [0; 4];
    raw.as_volatile_slice().read(&mut bytes, PAGE as usize).unwrap();
    assert_eq!(&bytes, b"here");
    drop(memory);

    // A part of a file is a part of that file.
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, 8 * PAGE).unwrap();
    let part = FileOffset::new(file.try_clone().unwrap(), 2 * PAGE);
    let shared = GuestRegionMmap::<()>::from_range(GuestAddress(0), 4 * PAGE as usize, Some(part)).unwrap();
    let whole = Backing::trusted_file(&bus, &file).unwrap();
    let (backing, offset) = Backing::guest_region(&bus, &shared).unwrap();
    assert!(Arc::ptr_eq(&whole, &backing) && offset == 2 * PAGE);

    let mapping =
        MmapRegion::build(None, PAGE as usize, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let read_only = GuestRegionMmap::<()>::new(mapping.unwrap(), GuestAddress(0)).unwrap();
    assert!(matches!(Backing::guest_region(&bus, &read_only), Err(RegionError::NotWritable)));
}

#[test]
fn a_device_sees_what_is_mapped_and_faults_at_the_first_address_that_is_not() {
    let guest: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 * 4096), (GuestAddress(1 << 32), 4 * 4096)])
            .unwrap();
    let bus = Bus::new();
    let account = account();
    let ram = GuestRam::new(&bus);
    let low = ram.plug(guest.find_region(GuestAddress(0)).unwrap(), &account).unwrap();
    let high = ram.plug(guest.find_region(GuestAddress(1 << 32)).unwrap(), &account).unwrap();
    assert_eq!(account.charged_pages(), 12);
    let space = Space::new(&bus);
    let seen = IommuMemory::new(guest.clone(), SpaceIommu::new(&space, &ram), true, ());
    // Over the border between two regions and back.
    space.map(Iova::new(0x10_0000), &high, 2 * PAGE, 2 * PAGE, RW).unwrap();
    space.map(Iova::new(0x10_2000), &low, 0, 2 * PAGE, RW).unwrap();
    space.map(Iova::new(0x10_4000), &high, 2 * PAGE, PAGE, Permissions::READ).unwrap();
    let text: Vec<u8> = (0..3 * PAGE).map(|n| n as u8).collect();
    seen.write_slice(&text, GuestAddress(0x10_0800)).unwrap();
    let mut back = vec![0; text.len()];
    guest.read_slice(&mut back[..0x1800], GuestAddress((1 << 32) + 0x2800)).unwrap();
    guest.read_slice(&mut back[0x1800..], GuestAddress(0)).unwrap();
    assert_eq!(back, text);
    let mut word = [0; 4];
    seen.read_slice(&mut word, GuestAddress(0x10_4800)).unwrap();
    assert_eq!(word, text[..4]);

    // Nothing of a transfer happens whose end is missing.
    guest.write_slice(&[0; 16], GuestAddress(0x1ff0)).unwrap();
    assert_eq!(fault(seen.write_slice(&[1; 32], GuestAddress(0x10_3ff0))), (0x10_4000, 16));
    assert_eq!(guest.read_obj::<u128>(GuestAddress(0x1ff0)).unwrap(), 0);
    assert_eq!(fault(seen.read_slice(&mut back[..0x2000], GuestAddress(0x10_4000))), (0x10_5000, 0x1000));
    assert_eq!(fault(seen.read_obj::<u8>(GuestAddress(0))), (0, 1));
    assert_eq!(fault(seen.read_obj::<u64>(GuestAddress(u64::MAX - 3))), (u64::MAX - 3, 8));
    for access in [vm_memory::Permissions::No, vm_memory::Permissions::Read] {
        assert!(seen.check_range(GuestAddress(0x10_0000), 0x5000, access));
        assert!(!seen.check_range(GuestAddress(0x10_0000), 0x5001, access));
    }
    assert!(!seen.check_range(GuestAddress(0x10_0000), 0x5000, vm_memory::Permissions::Write));
    assert!(!seen.check_range(GuestAddress(0x10_0000), usize::MAX, vm_memory::Permissions::Read));
    // No bytes are nowhere, which is no fault.
    assert!(seen.check_range(GuestAddress(0x9000_0000), 0, vm_memory::Permissions::ReadWrite));

    // Unmapped, unplugged, revoked: gone at once, without anybody having been told.
    space.unmap(range(0x10_1000, PAGE)).unwrap();
    assert_eq!(fault(seen.read_slice(&mut back[..0x2000], GuestAddress(0x10_0000))), (0x10_1000, 0x1000));
    assert!(ram.unplug(GuestAddress(0)) && !ram.unplug(GuestAddress(0)));
    assert_eq!(fault(seen.read_obj::<u8>(GuestAddress(0x10_2000))), (0x10_2000, 1));
    assert_eq!(account.charged_pages(), 12);
    drop(low);
    assert_eq!(account.charged_pages(), 4);
    assert!(space.walk(Iova::new(0x10_2000)).is_none());
    high.backing().revoke();
    assert_eq!(fault(seen.read_obj::<u8>(GuestAddress(0x10_0000))), (0x10_0000, 1));
}

#[test]
fn a_region_is_hot_plugged_once() {
    let bus = Bus::new();
    let account = account();
    let ram = GuestRam::new(&bus);
    let plugged = region(0, 4 * PAGE);
    let memory = ram.plug(&plugged, &account).unwrap();
    let moved = GuestRegionMmap::with_arc(plugged.get_mmap(), GuestAddress(1 << 30)).unwrap();
    assert!(matches!(ram.plug(&moved, &account), Err(PlugError::AlreadyPlugged)));
    // Other memory, where a guest has memory already.
    assert!(matches!(ram.plug(&region(3 * PAGE, PAGE), &account), Err(PlugError::AlreadyPlugged)));
    assert_eq!(account.charged_pages(), 4);
    // Giving a part back does not move what is left, nor what others are plugged in at.
    memory.release(0, 4 * PAGE).unwrap();
    assert!(ram.unplug(GuestAddress(0)));
    assert_eq!(account.charged_pages(), 0);
    ram.plug(&moved, &account).unwrap();
    // Memory that another limit refuses is not half there.
    let poor = Account::new("poor", Some(3));
    assert!(matches!(ram.plug(&region(1 << 31, 4 * PAGE), &poor), Err(PlugError::Register(_))));
    assert!(!ram.unplug(GuestAddress(1 << 31)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Reads through vm-memory against a map of pages.
    #[test]
    fn every_access_goes_where_a_map_of_pages_says(
        steps in prop::collection::vec((0..32u64, 0..16u64, 1..5u64, 0..3usize), 1..40),
        accesses in prop::collection::vec((0..33 * PAGE, 0..3 * PAGE), 20),
    ) {
        let guest: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x8000), 16 * 4096)]).unwrap();
        let bytes: Vec<u8> = (0..16 * PAGE).map(|n| (n / 256 * 7 + n) as u8).collect();
        guest.write_slice(&bytes, GuestAddress(0x8000)).unwrap();
        let bus = Bus::new();
        let ram = GuestRam::new(&bus);
        let memory = ram.plug(guest.find_region(GuestAddress(0x8000)).unwrap(), &account()).unwrap();
        let space = Space::new(&bus);
        let seen = IommuMemory::new(guest, SpaceIommu::new(&space, &ram), true, ());
        let mut model: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
        for (at, page, count, what) in steps {
            if what == 0 {
                space.unmap(range(at * PAGE, count * PAGE)).unwrap();
                model.retain(|page, _| !(at..at + count).contains(page));
            } else {
                let permissions = if what == 1 { RW } else { Permissions::READ };
                let result = space.map(Iova::new(at * PAGE), &memory, page * PAGE, count * PAGE, permissions);
                if result.is_ok() {
                    model.extend((0..count).map(|n| (at + n, (page + n, what == 1))));
                }
            }
        }
        for (first, length) in accesses {
            let mapped: Option<Vec<(u64, bool)>> =
                (first..first + length).map(|at| {
                    let (page, writable) = model.get(&(at / PAGE))?;
                    Some((page * PAGE + at % PAGE, *writable))
                }).collect();
            let mut buffer = vec![0; length as usize];
            let result = seen.read_slice(&mut buffer, GuestAddress(first));
            prop_assert_eq!(result.is_ok(), mapped.is_some());
            let writable = seen.check_range(GuestAddress(first), length as usize, vm_memory::Permissions::Write);
            prop_assert_eq!(writable, mapped.as_ref().is_some_and(|bytes| bytes.iter().all(|(_, writable)| *writable)));
            for (byte, (at, _)) in buffer.iter().zip(mapped.into_iter().flatten()) {
                prop_assert_eq!(*byte, bytes[at as usize]);
            }
        }
    }
}
