//! Transfers of every kind against a plain model: an array of the device's addresses, each with its byte and what is
//! allowed there.

mod remote;

use ioasid::{Account, Backing, Bus, Device, Iova, Memory, Permissions, Rid, Space, Table};
use ioasid_soft::dma::{DmaFault, DmaFaultReason, DmaPort};
use ioasid_soft::iommu::{AtomicOperation, DmaSegment, FAULT_LOG_RECORDS, Port, SoftIommu, TableKind};
use proptest::prelude::*;
use remote::Remote;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const K4: u64 = 4 << 10;
/// Where the device's addresses of the tests begin, so that they lie on both sides of a leaf table's border.
const BASE: u64 = (2 << 20) - 16 * K4;
/// How many pages of addresses, and of each of the two objects, there are.
const PAGES: u64 = 48;

/// What a page of addresses is: which page of which object, and what is allowed.
#[derive(Clone, Copy, Debug)]
struct Page {
    late: bool,
    number: u64,
    permissions: Permissions,
}

struct Model {
    pages: BTreeMap<u64, Page>,
    /// The bytes of the objects, this process's and the late-bound one.
    bytes: [Vec<u8>; 2],
}

impl Model {
    fn byte(&mut self, iova: u64, wanted: Permissions) -> Result<&mut u8, DmaFault> {
        let write = wanted.contains(Permissions::WRITE);
        let fault = |reason| DmaFault { iova, write, reason };
        let page = self.pages.get(&(iova / K4)).ok_or(fault(DmaFaultReason::NotMapped))?;
        if !page.permissions.contains(wanted) {
            return Err(fault(DmaFaultReason::NoPermission));
        }
        Ok(&mut self.bytes[usize::from(page.late)][(page.number * K4 + iova % K4) as usize])
    }

    fn first_fault(&mut self, iova: u64, length: u64, wanted: Permissions) -> Option<DmaFault> {
        (0..length).find_map(|n| self.byte(iova + n, wanted).err())
    }
}

struct Scene {
    model: Model,
    port: Arc<Port>,
    host: Arc<Memory>,
    remote: Arc<Remote>,
    _late: Arc<Memory>,
    _device: Device,
}

fn pattern(seed: u64) -> Vec<u8> {
    (0..PAGES * K4).map(|n| (n.wrapping_mul(0x9e37_79b9).wrapping_add(seed * 77) >> 7) as u8).collect()
}

impl Scene {
    fn new(kind: TableKind, pages: &[Option<Page>]) -> Scene {
        let bus = Bus::new();
        let account = Account::new("test", None);
        let (ours, theirs) = (pattern(1), pattern(2));
        let backing = Backing::anonymous(&bus, PAGES * K4).unwrap();
        backing.write(0, &ours).unwrap();
        let host = Memory::register(&backing, 0, PAGES * K4, &account).unwrap();
        let remote = Arc::new(Remote(Mutex::new(theirs.clone())));
        let late =
            Memory::register(&Backing::late_bound(&bus, remote.clone()), 0, PAGES * K4, &account).unwrap();
        let space = Space::new(&bus);
        let iommu = SoftIommu::new();
        let port = iommu.add_device(Rid(8), kind).unwrap();
        let device = Device::new(iommu, Rid(8)).unwrap();
        device.attach(&Table::for_device(&space, &device).unwrap()).unwrap();
        let mut model = Model { pages: BTreeMap::new(), bytes: [ours, theirs] };
        for (index, page) in pages.iter().enumerate() {
            let Some(page) = page else { continue };
            let iova = BASE + index as u64 * K4;
            let memory = if page.late { &late } else { &host };
            space.map(Iova::new(iova), memory, page.number * K4, K4, page.permissions).unwrap();
            model.pages.insert(iova / K4, *page);
        }
        Scene { model, port, host, remote, _late: late, _device: device }
    }

    fn assert_same_bytes(&self) {
        let mut ours = vec![0; (PAGES * K4) as usize];
        self.host.backing().read(0, &mut ours).unwrap();
        assert!(ours == self.model.bytes[0], "memory of this process differs");
        assert!(*self.remote.0.lock().unwrap() == self.model.bytes[1], "memory behind calls differs");
    }
}

fn page() -> impl Strategy<Value = Option<Page>> {
    let permissions = prop_oneof![
        8 => Just(Permissions::READ_WRITE),
        1 => Just(Permissions::READ),
        1 => Just(Permissions::WRITE)
    ];
    let page = (prop::bool::weighted(0.15), 0..PAGES, permissions);
    prop_oneof![
        1 => Just(None),
        12 => page.prop_map(|(late, number, permissions)| Some(Page { late, number, permissions })),
    ]
}

/// Each page of memory at one address at most, mostly in order, so that pieces are joined; a transfer then never
/// meets what it has written itself.
fn pages() -> impl Strategy<Value = Vec<Option<Page>>> {
    (prop::collection::vec(page(), PAGES as usize), prop::collection::vec((0..PAGES, 0..PAGES), 0..6))
        .prop_map(|(mut pages, exchanges)| {
            let mut numbers: Vec<u64> = (0..PAGES).collect();
            exchanges.iter().for_each(|(a, b)| numbers.swap(*a as usize, *b as usize));
            for (page, number) in pages.iter_mut().zip(numbers) {
                page.iter_mut().for_each(|page| page.number = number);
            }
            pages
        })
}

/// A range of addresses, now and then beyond what is mapped.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let length = prop_oneof![0u64..9, 0u64..300, 0u64..3 * K4, 0u64..24 * K4];
    (0..(PAGES + 1) * K4, length).prop_map(|(offset, length)| (BASE + offset, length))
}

#[derive(Clone, Debug)]
enum Call {
    Read(u64, u64),
    Write(u64, u64),
    Copy(u64, u64, u64),
    ReadList(Vec<(u64, u64)>, u64),
    WriteList(Vec<(u64, u64)>, u64),
    Atomic(u64, bool, u8, u64, u64),
}

fn call() -> impl Strategy<Value = Call> {
    let list = || prop::collection::vec(range(), 0..9);
    prop_oneof![
        range().prop_map(|(iova, length)| Call::Read(iova, length)),
        range().prop_map(|(iova, length)| Call::Write(iova, length)),
        (range(), 0..(PAGES + 1) * K4).prop_map(|((from, length), to)| Call::Copy(from, BASE + to, length)),
        (list(), 0..40 * K4).prop_map(|(list, length)| Call::ReadList(list, length)),
        (list(), 0..40 * K4).prop_map(|(list, length)| Call::WriteList(list, length)),
        (range(), any::<bool>(), 0u8..3, any::<u64>(), any::<u64>())
            .prop_map(|((iova, _), wide, kind, a, b)| Call::Atomic(iova, wide, kind, a, b)),
    ]
}

fn segments(list: &[(u64, u64)]) -> Vec<DmaSegment> {
    list.iter().map(|&(iova, length)| DmaSegment { iova, length }).collect()
}

/// The addresses of a list's bytes, as many as a buffer of `length` has.
fn addresses(list: &[(u64, u64)], length: u64) -> Vec<u64> {
    list.iter().flat_map(|&(iova, length)| iova..iova + length).take(length as usize).collect()
}

fn carry_out(scene: &mut Scene, call: &Call, step: usize) {
    let (read, write) = (Permissions::READ, Permissions::WRITE);
    let Scene { model, port, .. } = scene;
    let source =
        |length: u64| -> Vec<u8> { (0..length).map(|n| (n as usize * 31 + step * 5) as u8).collect() };
    match call {
        &Call::Read(iova, length) => {
            let mut buffer = vec![0; length as usize];
            let fault = model.first_fault(iova, length, read);
            assert_eq!(port.read(iova, &mut buffer).err(), fault);
            if fault.is_none() {
                let expected: Vec<u8> = (0..length).map(|n| *model.byte(iova + n, read).unwrap()).collect();
                assert!(buffer == expected);
            }
        }
        &Call::Write(iova, length) => {
            let bytes = source(length);
            let fault = model.first_fault(iova, length, write);
            assert_eq!(port.write(iova, &bytes).err(), fault);
            if fault.is_none() {
                for (n, byte) in bytes.iter().enumerate() {
                    *model.byte(iova + n as u64, write).unwrap() = *byte;
                }
            }
        }
        &Call::Copy(from, to, length) => {
            // What an overlapping copy leaves is not specified.
            if from < to + length && to < from + length {
                return;
            }
            let fault =
                model.first_fault(from, length, read).or_else(|| model.first_fault(to, length, write));
            assert_eq!(port.copy(from, to, length).err(), fault);
            if fault.is_none() {
                for n in 0..length {
                    let byte = *model.byte(from + n, read).unwrap();
                    *model.byte(to + n, write).unwrap() = byte;
                }
            }
        }
        Call::ReadList(list, length) => {
            let mut buffer = vec![0; *length as usize];
            let mut expected = buffer.clone();
            let mut result = Ok(0);
            for (n, iova) in addresses(list, *length).into_iter().enumerate() {
                match model.byte(iova, read) {
                    Ok(byte) => expected[n] = *byte,
                    Err(fault) => {
                        result = Err((n as u64, fault));
                        break;
                    }
                }
                result = Ok(n as u64 + 1);
            }
            let got = port.read_list(&segments(list), &mut buffer);
            assert_eq!(got.map_err(|partial| (partial.moved, partial.fault)), result);
            assert!(buffer == expected);
        }
        Call::WriteList(list, length) => {
            let bytes = source(*length);
            let mut result = Ok(0);
            for (n, iova) in addresses(list, *length).into_iter().enumerate() {
                match model.byte(iova, write) {
                    Ok(byte) => *byte = bytes[n],
                    Err(fault) => {
                        result = Err((n as u64, fault));
                        break;
                    }
                }
                result = Ok(n as u64 + 1);
            }
            let got = port.write_list(&segments(list), &bytes);
            assert_eq!(got.map_err(|partial| (partial.moved, partial.fault)), result);
        }
        &Call::Atomic(iova, wide, kind, a, b) => {
            let size = if wide { 8 } else { 4 };
            let iova = if step % 5 == 0 { iova } else { iova / size * size };
            let fault = if iova % size != 0 {
                Some(DmaFault { iova, write: true, reason: DmaFaultReason::Misaligned })
            } else if let Err(fault) = model.byte(iova, Permissions::READ_WRITE) {
                Some(fault)
            } else if model.pages[&(iova / K4)].late {
                Some(DmaFault { iova, write: true, reason: DmaFaultReason::NotAtomic })
            } else {
                None
            };
            let mut old = 0u64;
            if fault.is_none() {
                for n in (0..size).rev() {
                    old = old << 8 | u64::from(*model.byte(iova + n, read).unwrap());
                }
            }
            // Half of the comparisons succeed.
            let expected = if b % 2 == 0 { old } else { b };
            let equal = if wide { old == expected } else { old == u64::from(expected as u32) };
            let new = match kind {
                0 => old.wrapping_add(a),
                1 => a,
                _ if equal => a,
                _ => old,
            };
            let got = if wide {
                port.atomic_u64(
                    iova,
                    match kind {
                        0 => AtomicOperation::FetchAdd(a),
                        1 => AtomicOperation::Swap(a),
                        _ => AtomicOperation::CompareAndSwap { expected, new: a },
                    },
                )
            } else {
                let (a, narrow) = (a as u32, expected as u32);
                let got = port.atomic_u32(
                    iova,
                    match kind {
                        0 => AtomicOperation::FetchAdd(a),
                        1 => AtomicOperation::Swap(a),
                        _ => AtomicOperation::CompareAndSwap { expected: narrow, new: a },
                    },
                );
                got.map(u64::from)
            };
            assert_eq!(got, fault.map_or(Ok(old), Err));
            if fault.is_none() {
                for n in 0..size {
                    *model.byte(iova + n, write).unwrap() = (new >> (8 * n)) as u8;
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_transfer_moves_what_a_plain_copy_would_have_moved(
        pages in pages(),
        calls in prop::collection::vec(call(), 1..25),
        vtd in any::<bool>(),
    ) {
        let kind = if vtd { TableKind::VtdSecondStage } else { TableKind::Native };
        let mut scene = Scene::new(kind, &pages);
        for (step, call) in calls.iter().enumerate() {
            carry_out(&mut scene, call, step);
        }
        scene.assert_same_bytes();
    }
}

fn all_mapped() -> Vec<Option<Page>> {
    (0..PAGES)
        .map(|number| Some(Page { late: false, number, permissions: Permissions::READ_WRITE }))
        .collect()
}

#[test]
fn the_last_address_can_be_transferred_and_nothing_wraps() {
    let scene = Scene::new(TableKind::Native, &all_mapped());
    let space = scene._device.table().unwrap().space().clone();
    space.map(Iova::new(u64::MAX - K4 + 1), &scene.host, 0, K4, Permissions::READ_WRITE).unwrap();
    space.map(Iova::new(0), &scene.host, K4, K4, Permissions::READ_WRITE).unwrap();
    let list = [DmaSegment { iova: u64::MAX - 1, length: 2 }, DmaSegment { iova: 0, length: 2 }];
    assert_eq!(scene.port.write_list(&list, b"last").unwrap(), 4);
    assert_eq!(scene.port.read_list(&list, &mut [0; 4]).unwrap(), 4);
    let over = [DmaSegment { iova: 0, length: 2 }, DmaSegment { iova: u64::MAX - 1, length: 3 }];
    let partial = scene.port.write_list(&over, b"over!").unwrap_err();
    assert_eq!((partial.moved, partial.fault.reason), (2, DmaFaultReason::OutOfRange));
    // As long as it is not wanted, what a segment names does not matter.
    assert_eq!(scene.port.write_list(&[DmaSegment { iova: u64::MAX, length: u64::MAX }], b"x").unwrap(), 1);
    assert_eq!(scene.port.copy(u64::MAX - 1, 0, 3).unwrap_err().reason, DmaFaultReason::OutOfRange);
    scene.port.copy(u64::MAX - 1, BASE, 2).unwrap();
    scene.port.copy(0, u64::MAX, 1).unwrap();
    scene.port.copy(u64::MAX, u64::MAX, 0).unwrap();
    assert_eq!(scene.port.atomic_u64(u64::MAX - 7, AtomicOperation::Swap(3)).unwrap() >> 56, u64::from(b'o'));
}

#[test]
fn many_empty_segments_are_passed_over() {
    let scene = Scene::new(TableKind::Native, &all_mapped());
    let mut list = vec![DmaSegment { iova: 1, length: 0 }; 5_000];
    list.push(DmaSegment { iova: BASE, length: 8 });
    list.extend_from_within(..3_000);
    assert_eq!(scene.port.write_list(&list, &[7; 16]).unwrap(), 8);
    assert_eq!(scene.port.read_list(&list[..5_000], &mut [0; 1]).unwrap(), 0);
}

#[test]
fn faults_are_written_down_until_there_is_no_room_and_counted_then() {
    let scene = Scene::new(TableKind::Native, &[]);
    let room = FAULT_LOG_RECORDS as u64;
    for n in 0..room + 10 {
        assert!(scene.port.write(BASE + n, &[0]).is_err());
    }
    let log = scene.port.take_faults();
    assert_eq!((log.records.len() as u64, log.dropped), (room, 10));
    assert_eq!(log.records[3].device, Rid(8));
    let expected = DmaFault { iova: BASE + 3, write: true, reason: DmaFaultReason::NotMapped };
    assert_eq!(log.records[3].fault, expected);
    assert_eq!(scene.port.statistics().faults, room + 10);
    assert_eq!(scene.port.statistics().last_fault.unwrap().iova, BASE + room + 9);
    // Each kind of transfer writes one record.
    assert!(scene.port.read(BASE, &mut [0]).is_err());
    assert!(scene.port.copy(BASE, BASE, 1).is_err());
    assert!(scene.port.read_list(&[DmaSegment { iova: BASE, length: 1 }], &mut [0]).is_err());
    assert!(scene.port.atomic_u32(BASE, AtomicOperation::Swap(0)).is_err());
    let log = scene.port.take_faults();
    assert_eq!((log.records.len(), log.dropped), (4, 0));
    assert_eq!(
        log.records.iter().map(|record| record.fault.write).collect::<Vec<_>>(),
        [false, false, false, true]
    );
}

#[test]
fn atomic_operations_of_devices_and_drivers_lose_nothing() {
    let scene = Scene::new(TableKind::VtdSecondStage, &all_mapped());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    scene.port.atomic_u64(BASE, AtomicOperation::FetchAdd(1)).unwrap();
                    loop {
                        let old = scene.port.atomic_u32(BASE + 8, AtomicOperation::FetchAdd(0)).unwrap();
                        let swap =
                            AtomicOperation::CompareAndSwap { expected: old, new: old.wrapping_add(3) };
                        if scene.port.atomic_u32(BASE + 8, swap).unwrap() == old {
                            break;
                        }
                    }
                }
            });
        }
    });
    let first = u64::from_le_bytes(pattern(1)[..8].try_into().unwrap());
    let second = u32::from_le_bytes(pattern(1)[8..12].try_into().unwrap());
    assert_eq!(scene.port.atomic_u64(BASE, AtomicOperation::Swap(0)).unwrap(), first.wrapping_add(15_000));
    assert_eq!(
        scene.port.atomic_u32(BASE + 8, AtomicOperation::Swap(0)).unwrap(),
        second.wrapping_add(45_000)
    );
}

#[test]
fn words_are_never_seen_half_written() {
    let scene = Scene::new(TableKind::Native, &all_mapped());
    let stop = std::sync::atomic::AtomicBool::new(false);
    scene.port.write(BASE, &[0; 8]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..200_000u64 {
                scene.port.write(BASE, &[n as u8; 8]).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            let mut word = [0; 8];
            scene.port.read(BASE, &mut word).unwrap();
            assert!(word.iter().all(|byte| *byte == word[0]), "{word:x?}");
        }
    });
}
