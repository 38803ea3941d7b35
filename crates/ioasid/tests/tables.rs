//! Derived tables follow their space: when they come, while they are there, when something fails, and when they
//! go. A table is compared with the native one by what it translates; leaves may differ.

mod double;

use double::{
    AMD, AMD_ALL_SIZES, Call, DERIVED, DERIVED_TOO, Double, DoubleTable, Mapping, NATIVE, NATIVE_TOO,
    OWN_NATIVE, RISC_V, SMALL, Stop, WIDE, X86, interrupts, mappings,
};
use ioasid::{
    Account, AliasError, AttachError, Backing, Bus, Device, Iova, IovaRange, MapError, Memory, PageSize,
    Permissions, ProtectError, RemapError, ReservationOwner, Space, Table, TableError, UnmapError,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const RW: Permissions = Permissions::READ_WRITE;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// A bus, an object of four windows registered whole, and its payer.
struct World {
    bus: Arc<Bus>,
    backing: Arc<Backing>,
    account: Account,
    ram: Arc<Memory>,
}

impl World {
    fn new() -> World {
        let bus = Bus::new();
        let account = Account::new("test", None);
        let backing = Backing::anonymous(&bus, 4 * G1).unwrap();
        // The windows are no neighbours on the bus: mappings over their boundaries have several parts.
        let backwards =
            [3, 2, 1].map(|window| Memory::register(&backing, window * G1, K4, &account).unwrap());
        let ram = Memory::register(&backing, 0, 4 * G1, &account).unwrap();
        drop(backwards);
        World { bus, backing, account, ram }
    }

    /// A space with mappings of several sizes, a cut one among them.
    fn space(&self) -> Arc<Space> {
        let space = Space::new(&self.bus);
        space.map(Iova::new(K4), &self.ram, 0, 3 * K4, RW).unwrap();
        space.map(Iova::new(2 * G1), &self.ram, 0, G1, RW).unwrap();
        space.map(Iova::new(8 * G1 - M2), &self.ram, G1 - M2, 2 * M2, Permissions::READ).unwrap();
        space.unmap(range(2 * G1 + 3 * M2, K4)).unwrap();
        space
    }

    fn state(&self, space: &Space, double: &Double) -> State {
        State {
            mappings: mappings(space),
            busy: space.statistics().busy_bytes,
            derived: double.tables().iter().map(|table| (table.mappings(), table.is_invalidated())).collect(),
            tables: space.statistics().tables,
            reserved: space.reserved_ranges(),
            attached: [NATIVE, NATIVE_TOO, DERIVED, DERIVED_TOO, SMALL]
                .map(|rid| double.table_of(rid).map(|table| Arc::as_ptr(&table) as usize)),
            charged: self.account.charged_pages(),
            holds: self.backing.holds(0, 4 * G1),
        }
    }
}

/// All that must be as before when something has failed.
#[derive(Debug, PartialEq)]
struct State {
    mappings: Vec<Mapping>,
    /// Bytes at which an operation is at work.
    busy: u64,
    /// And whether devices have been told of all that has changed.
    derived: Vec<(Vec<Mapping>, bool)>,
    tables: usize,
    reserved: Vec<IovaRange>,
    /// By address, which is only compared.
    attached: [Option<usize>; 5],
    charged: u64,
    holds: std::ops::RangeInclusive<u64>,
}

#[track_caller]
fn assert_in_step(space: &Space, double: &Double) {
    for table in double.tables() {
        assert_eq!(table.mappings(), table.expected(space));
        assert!(table.is_invalidated());
    }
}

#[test]
fn a_table_holds_what_is_mapped_and_follows_from_then_on() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let _devices = [DERIVED, SMALL, NATIVE].map(|rid| double.attached(rid, &space));
    assert_eq!(double.tables().len(), 2);
    assert_eq!(space.statistics().tables, 3);
    assert_in_step(&space, &double);

    space.map(Iova::new(16 * G1), &world.ram, M2, 2 * G1, RW).unwrap();
    assert_in_step(&space, &double);
    // Over the boundary of two windows, cutting leaves of different sizes in each table.
    space.unmap(range(17 * G1 - 5 * K4, 10 * K4)).unwrap();
    assert_in_step(&space, &double);
    space.map(Iova::new(17 * G1 - 5 * K4), &world.ram, 0, 10 * K4, Permissions::WRITE).unwrap();
    assert_in_step(&space, &double);
    assert!(space.map(Iova::new(16 * G1), &world.ram, 0, K4, RW).is_err());
    assert_in_step(&space, &double);
    drop(world.ram);
    assert_eq!(mappings(&space), []);
    assert_in_step(&space, &double);
}

#[test]
fn devices_of_a_class_share_a_table_unless_they_want_their_own() {
    let (world, double) = (World::new(), Double::new());
    let (space, other) = (world.space(), world.space());
    let devices = [DERIVED, DERIVED_TOO, SMALL, NATIVE, NATIVE_TOO].map(|rid| double.device(rid));
    let tables: Vec<_> = devices.iter().map(|device| Table::for_device(&space, device).unwrap()).collect();
    assert!(Arc::ptr_eq(&tables[0], &tables[1]));
    assert!(!Arc::ptr_eq(&tables[0], &tables[2]));
    assert!(Arc::ptr_eq(&tables[3], &tables[4]));
    assert!(!Arc::ptr_eq(&tables[0], &Table::for_device(&other, &devices[0]).unwrap()));
    let own = Table::new(&space, &devices[0]).unwrap();
    assert!(!Arc::ptr_eq(&own, &tables[0]));
    assert!(Arc::ptr_eq(&tables[0], &Table::for_device(&space, &devices[1]).unwrap()));
    assert!(matches!(devices[2].attach(&own), Err(AttachError::Incompatible)));
    assert!(matches!(devices[3].attach(&own), Err(AttachError::Incompatible)));
    assert!(devices[1].attach(&own).is_ok());
}

#[test]
fn devices_that_come_at_the_same_time_share_and_leave_nothing() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let before = space.statistics();
    for _ in 0..50 {
        let barrier = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for rid in [DERIVED, DERIVED_TOO] {
                let (space, double, barrier) = (&space, &double, &barrier);
                scope.spawn(move || {
                    let device = double.attached(rid, space);
                    barrier.wait();
                    assert_eq!(double.tables().len(), 1);
                    assert_eq!(space.statistics().tables, 1);
                    barrier.wait();
                    // One goes while the other goes, or comes again and finds a table that is going.
                    device.detach();
                    device.attach(&Table::for_device(space, &device).unwrap()).unwrap();
                    barrier.wait();
                    assert_eq!(space.statistics().tables, 1);
                    barrier.wait();
                });
            }
        });
        assert_eq!(space.statistics(), before);
        assert_eq!(space.usable_ranges(), [IovaRange::ALL]);
        assert!(double.tables().is_empty());
    }
}

#[test]
fn the_last_user_takes_the_table_along_and_the_space_is_as_if_it_had_never_been() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let before = (space.leaves(IovaRange::ALL), space.statistics());
    let (one, two) = (double.attached(DERIVED, &space), double.attached(DERIVED_TOO, &space));
    assert_eq!(space.usable_ranges().len(), 2);
    drop(one);
    assert_eq!((double.tables().len(), space.statistics().tables), (1, 1));
    assert!(space.map(Iova::new(0xfee0_0000), &world.ram, 0, K4, RW).is_err());
    two.detach();
    assert!(double.tables().is_empty());
    assert_eq!((space.leaves(IovaRange::ALL), space.statistics()), before);
    assert_eq!(space.usable_ranges(), [IovaRange::ALL]);
    space.map(Iova::new(0xfee0_0000), &world.ram, 0, K4, RW).unwrap();
    space.map(Iova::new(1 << 60), &world.ram, 0, K4, RW).unwrap();
    // To detach once more is nothing.
    two.detach();
}

#[test]
fn a_table_is_filled_beside_operations_that_run() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    double.switches.sleep_micros.store(20, Ordering::Relaxed);
    for round in 0..3u64 {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for worker in 0..3u64 {
                let (space, world, stop) = (&space, &world, &stop);
                scope.spawn(move || {
                    // Each in a GiB of its own, in which it knows what is there; cuts reach into large leaves.
                    let base = (16 + worker) * G1;
                    let mut step = round.wrapping_mul(0x9e37_79b9) + worker;
                    while !stop.load(Ordering::Relaxed) {
                        step = step.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let at = base + (step >> 33) % 8 * M2;
                        match (step >> 60) % 4 {
                            0 => drop(space.map(Iova::new(at), &world.ram, 5 * K4, 4 * K4, RW)),
                            1 => drop(space.map(
                                Iova::new(at),
                                &world.ram,
                                at - base,
                                2 * M2,
                                Permissions::READ,
                            )),
                            2 => drop(space.unmap(range(at + 3 * K4, 7 * K4)).unwrap()),
                            _ => drop(space.unmap(range(at, 3 * M2)).unwrap()),
                        }
                    }
                    space.unmap(range(base + 5 * M2, 6 * K4)).unwrap();
                });
            }
            let devices: Vec<Device> =
                [DERIVED, SMALL, DERIVED_TOO].iter().map(|rid| double.attached(*rid, &space)).collect();
            stop.store(true, Ordering::Relaxed);
            devices
        });
        // The devices are gone with the scope's value; attach for the comparison while all is quiet.
        let devices = [DERIVED, SMALL].map(|rid| double.attached(rid, &space));
        assert_in_step(&space, &double);
        drop(devices);
    }
}

#[test]
fn a_table_that_came_while_operations_ran_is_in_step_when_they_end() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    for round in 0..20u64 {
        let devices = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..2u64)
                .map(|worker| {
                    let (space, world) = (&space, &world);
                    scope.spawn(move || {
                        // Both in the same place, so that they also meet each other.
                        for step in 0..60u64 {
                            let at = 32 * G1 + (step * 7 + worker * 3 + round) % 16 * (M2 / 2);
                            if step % 3 == worker {
                                space.unmap(range(at, M2 + K4)).unwrap();
                            } else {
                                let _ = space.map(Iova::new(at), &world.ram, step * K4, M2, RW);
                            }
                        }
                    })
                })
                .collect();
            let devices = [DERIVED, SMALL].map(|rid| double.attached(rid, &space));
            workers.into_iter().for_each(|worker| worker.join().unwrap());
            devices
        });
        assert_eq!(double.tables().len(), 2);
        assert_in_step(&space, &double);
        drop(devices);
    }
}

/// Carries out an operation again and again, each time with another call failing, until it comes through, and then
/// undoes it; checks that nothing is left of the times it failed. Returns how often that was.
fn fail_everywhere<T, E: std::fmt::Debug>(
    world: &World,
    space: &Space,
    double: &Double,
    mut operation: impl FnMut() -> Result<T, E>,
    mut undo: impl FnMut(T),
) -> usize {
    let before = world.state(space, double);
    let mut failures = 0;
    for late in [false, true] {
        double.switches.late.store(late, Ordering::SeqCst);
        for call in Call::ALL {
            let mut number = 0;
            loop {
                number += 1;
                double.switches.fail(call, number);
                let result = operation();
                if !double.switches.has_failed(call) {
                    // There are fewer such calls in the whole operation.
                    undo(result.unwrap_or_else(|error| panic!("no call has failed, and yet: {error:?}")));
                    assert_eq!(world.state(space, double), before, "undone");
                    break;
                }
                assert!(result.is_err(), "{call:?} number {number} has failed, and nobody noticed");
                assert_eq!(world.state(space, double), before, "{call:?} number {number}, late: {late}");
                failures += 1;
            }
        }
    }
    failures
}

#[test]
fn a_map_that_fails_anywhere_has_not_happened() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let _devices = [NATIVE, DERIVED, SMALL].map(|rid| double.attached(rid, &space));
    let length = 2 * M2 + 8 * K4;
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        // Three windows, so three parts in each of two tables.
        || space.map(Iova::new(33 * G1 - K4), &world.ram, G1 - K4, G1 + 2 * K4, RW).map(|()| 33 * G1 - K4),
        |iova| assert_eq!(space.unmap(range(iova, G1 + 2 * K4)).unwrap().bytes(), G1 + 2 * K4),
    );
    assert_eq!(failures, 2 * 6);
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        || space.map_anywhere(&world.ram, 0, length, RW),
        |iova| assert_eq!(space.unmap(range(iova.get(), length)).unwrap().bytes(), length),
    );
    assert_eq!(failures, 2 * 2);
}

#[test]
fn an_unmap_that_fails_anywhere_has_not_happened() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let _devices = [NATIVE, DERIVED, SMALL].map(|rid| double.attached(rid, &space));
    let middle = range(2 * G1 + 4 * M2 + K4, M2);
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        || space.unmap(middle),
        |unmapped| {
            assert_eq!(unmapped.bytes(), M2);
            space.map(Iova::new(middle.first()), &world.ram, 4 * M2 + K4, M2, RW).unwrap();
        },
    );
    // In each table, at each end, before and after the leaves are taken.
    assert_eq!(failures, 2 * 8);
}

#[test]
fn a_protect_that_fails_anywhere_has_not_happened() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let _devices = [NATIVE, DERIVED, SMALL, AMD, X86, OWN_NATIVE].map(|rid| double.attached(rid, &space));
    // Two mappings and what is between them; a part of a large leaf, cut at both ends.
    space.map(Iova::new(2 * G1 + 3 * M2), &world.ram, 9 * K4, K4, Permissions::READ).unwrap();
    let middle = range(2 * G1 + 3 * M2, K4);
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        || space.protect(middle, RW),
        |bytes| {
            assert_eq!(bytes, K4);
            assert_eq!(space.protect(middle, Permissions::READ).unwrap(), K4);
        },
    );
    assert_eq!(failures, 2 * 5);
    // Several runs, whose rights differ.
    let wide = range(K4, 3 * G1 - K4);
    space.protect(range(2 * K4, K4), Permissions::WRITE).unwrap();
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        || space.protect(wide, Permissions::READ),
        |bytes| {
            assert_eq!(bytes, 3 * K4 + G1);
            space.protect(wide, RW).unwrap();
            space.protect(range(2 * K4, K4), Permissions::WRITE).unwrap();
            space.protect(middle, Permissions::READ).unwrap();
        },
    );
    // And before that each table is cut where rights change, which is at four places.
    assert_eq!(failures, 2 * (2 + 4) * 5);
}

#[test]
fn a_remap_that_fails_anywhere_has_not_happened() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let _devices = [NATIVE, DERIVED, SMALL, X86, OWN_NATIVE].map(|rid| double.attached(rid, &space));
    // Over two mappings in a row, of other rights; to memory in two pieces, for which leaves have to be cut.
    space.map(Iova::new(3 * G1), &world.ram, 8 * M2, 4 * K4, Permissions::READ).unwrap();
    let (first, length) = (3 * G1 - M2, M2 + 4 * K4);
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        || space.remap(Iova::new(first), &world.ram, G1 - 3 * K4, length, Permissions::WRITE),
        |()| {
            space.remap(Iova::new(first), &world.ram, G1 - M2, M2, RW).unwrap();
            space.remap(Iova::new(3 * G1), &world.ram, 8 * M2, 4 * K4, Permissions::READ).unwrap();
        },
    );
    assert_eq!(failures, 2 * (2 + 1) * 4);
    // Not all of it is mapped.
    let before = world.state(&space, &double);
    let error = space.remap(Iova::new(first), &world.ram, 0, length + K4, RW);
    assert!(matches!(error, Err(RemapError::NotMapped { at }) if at == first + length), "{error:?}");
    let error = space.remap(Iova::new(5 * G1), &world.ram, 0, K4, RW);
    assert!(matches!(error, Err(RemapError::NotMapped { at }) if at == 5 * G1), "{error:?}");
    assert_eq!(world.state(&space, &double), before);
}

#[test]
fn an_alias_that_fails_anywhere_has_not_happened() {
    let (world, double) = (World::new(), Double::new());
    let (space, other) = (world.space(), Space::new(&world.bus));
    let _devices = [NATIVE, DERIVED, SMALL].map(|rid| double.attached(rid, &other));
    let there = mappings(&space);
    // Holes are copied as holes: five pieces, of which two are neighbours.
    let source = range(0, 16 * G1);
    let failures = fail_everywhere(
        &world,
        &other,
        &double,
        || space.alias(source, &other, Iova::new(64 * G1), RW),
        |bytes| {
            assert_eq!(bytes, 3 * K4 + G1 - K4 + 2 * M2);
            let moved: Vec<Mapping> = there
                .iter()
                .map(|&(iova, length, oa, rights)| (iova + 64 * G1, length, oa, rights))
                .collect();
            assert_eq!(mappings(&other), moved);
            assert_eq!(other.unmap(range(64 * G1, 16 * G1)).unwrap().bytes(), bytes);
        },
    );
    assert_eq!(failures, 2 * 2 * 5);
    assert_eq!(mappings(&space), there);
}

#[test]
fn formats_that_need_a_break_say_so_and_everything_stays() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    space.map(Iova::new(0), &world.ram, 0, 16 * M2, RW).unwrap();
    let _devices = [DERIVED, RISC_V].map(|rid| double.attached(rid, &space));
    let before = world.state(&space, &double);
    // VT-d comes first, and has to go back.
    let error = space.protect(range(M2, 3 * M2), Permissions::READ);
    let needs_break =
        |error: &TableError| matches!(error, TableError::NeedsBreak { at } if *at == M2 || *at == 2 * M2);
    assert!(matches!(error, Err(ProtectError::Table(error)) if needs_break(&error)));
    assert_eq!(world.state(&space, &double), before);
    let error = space.remap(Iova::new(2 * M2), &world.ram, 4 * M2, 2 * M2, RW);
    assert!(matches!(error, Err(RemapError::Table(error)) if needs_break(&error)));
    assert_eq!(world.state(&space, &double), before);

    // A leaf of AMD's that has several entries, or that would have to be cut.
    let (space, double) = (Space::new(&world.bus), Double::new());
    let _device = double.attached(AMD_ALL_SIZES, &space);
    space.map(Iova::new(0), &world.ram, 0, 16 * M2, RW).unwrap();
    let before = world.state(&space, &double);
    assert!(matches!(
        space.remap(Iova::new(0), &world.ram, 16 * M2, 16 * M2, RW),
        Err(RemapError::Table(TableError::NeedsBreak { .. }))
    ));
    assert!(matches!(
        space.protect(range(K4, K4), Permissions::READ),
        Err(ProtectError::Table(TableError::CannotCut { .. }))
    ));
    assert_eq!(world.state(&space, &double), before);
    // As a whole its permissions can change, and a break does the rest.
    assert_eq!(space.protect(range(0, 16 * M2), Permissions::READ).unwrap(), 16 * M2);
    assert_in_step(&space, &double);
}

#[test]
fn blocks_plugged_one_by_one_and_merged_are_large_leaves_again() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let rids = [DERIVED, X86, OWN_NATIVE, SMALL, AMD];
    let _devices = rids.map(|rid| double.attached(rid, &space));
    let plug = |block: u64| space.map(Iova::new(4 * G1 + block * M2), &world.ram, block * M2, M2, RW);
    // Every other block first; one of them is mapped page by page.
    for block in (0..512).step_by(2).chain((1..512).step_by(2)) {
        if block == 77 {
            for page in 0..512 {
                let offset = block * M2 + page * K4;
                space.map(Iova::new(4 * G1 + offset), &world.ram, offset, K4, RW).unwrap();
            }
        } else {
            plug(block).unwrap();
        }
    }
    assert_eq!(space.statistics().leaves.len(), 2);
    assert!(space.merge(range(4 * G1, G1)) > 0);
    assert_eq!(space.statistics().leaves, [(PageSize::SIZE_1G, 1)]);
    let sizes: Vec<Vec<(u64, usize)>> =
        double.tables().iter().map(|table| table.leaf_sizes().into_iter().collect()).collect();
    let one = vec![(G1, 1)];
    // Without leaves of a GiB, and without live changes of size.
    let (small, amd) = (vec![(M2, 512)], vec![(K4, 512), (M2, 511)]);
    assert_eq!(sizes, [one.clone(), one.clone(), one, small, amd]);
    assert_in_step(&space, &double);
    // There is nothing left to merge, and nobody is told anything.
    assert_eq!(space.merge(IovaRange::ALL), 0);
    assert_in_step(&space, &double);
}

/// One table is split and no other one, as far as wanted and no further, and is as before when it is merged.
#[test]
fn a_table_that_is_split_says_the_same_in_small_leaves() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let devices = [NATIVE, DERIVED, X86, AMD].map(|rid| double.attached(rid, &space));
    space.map(Iova::new(4 * G1), &world.ram, 0, G1, RW).unwrap();
    let native = |leaves: &[(PageSize, u64)]| assert_eq!(space.statistics().leaves, leaves);
    let sizes = |number: usize| {
        let table = devices[number].table().unwrap();
        let derived = table.derived().unwrap().as_any().downcast_ref::<DoubleTable>().unwrap();
        derived.leaf_sizes().into_iter().collect::<Vec<_>>()
    };
    let split = |number: usize, range, size| devices[number].table().unwrap().split(range, size);

    split(1, range(4 * G1, G1), PageSize::SIZE_2M).unwrap();
    assert_eq!((sizes(1), sizes(2)), (vec![(M2, 512)], vec![(G1, 1)]));
    // A page of it, and what has to be cut around it.
    split(2, range(4 * G1 + 5 * M2 + 0x123, 1), PageSize::SIZE_4K).unwrap();
    assert_eq!(sizes(2), vec![(K4, 512), (M2, 511)]);
    native(&[(PageSize::SIZE_1G, 1)]);
    // The native table, from a page on to behind the end.
    split(0, range(5 * G1 - K4, 2 * G1), PageSize::SIZE_4K).unwrap();
    native(&[(PageSize::SIZE_4K, 512), (PageSize::SIZE_2M, 511)]);
    // A format that cannot says so, and where.
    let refused = split(3, IovaRange::ALL, PageSize::SIZE_4K);
    assert!(matches!(refused, Err(TableError::CannotCut { at }) if at == 4 * G1), "{refused:?}");
    assert_in_step(&space, &double);

    // Half-way it fails.
    double.switches.fail(Call::Split, 16);
    let refused = split(1, range(4 * G1, G1), PageSize::SIZE_4K);
    assert!(matches!(refused, Err(TableError::Refused(_))), "{refused:?}");
    assert_in_step(&space, &double);

    space.merge(IovaRange::ALL);
    assert_eq!((sizes(1), sizes(2)), (vec![(G1, 1)], vec![(G1, 1)]));
    native(&[(PageSize::SIZE_1G, 1)]);
    assert_in_step(&space, &double);
}

#[test]
fn an_attach_that_fails_anywhere_has_not_happened() {
    let (world, double) = (World::new(), Double::new());
    // Few leaves, because each is a call that can fail.
    let space = Space::new(&world.bus);
    space.map(Iova::new(K4), &world.ram, 0, 3 * K4, RW).unwrap();
    space.map(Iova::new(7 * G1), &world.ram, 0, G1, Permissions::READ).unwrap();
    space.map(Iova::new(16 * G1), &world.ram, G1 - M2, 2 * M2, RW).unwrap();
    let _first = double.attached(SMALL, &space);
    let device = double.device(DERIVED);
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        || device.attach(&Table::for_device(&space, &device)?),
        |()| device.detach(),
    );
    // A new table, its attachment, and a call for every leaf.
    assert_eq!(failures, 2 * (2 + space.leaves(IovaRange::ALL).len()));
    assert!(device.table().is_none());
}

#[test]
fn a_replacement_that_fails_leaves_the_device_where_it_was() {
    let (world, double) = (World::new(), Double::new());
    let (space, target) = (world.space(), Space::new(&world.bus));
    target.map(Iova::new(32 * G1), &world.ram, 0, 2 * M2, RW).unwrap();
    let device = double.attached(DERIVED, &space);
    let home = device.table().unwrap();
    let there = world.state(&target, &double);
    let failures = fail_everywhere(
        &world,
        &space,
        &double,
        || {
            let result = Table::for_device(&target, &device).and_then(|table| device.attach(&table));
            if result.is_err() {
                assert_eq!(world.state(&target, &double), there);
                assert!(Arc::ptr_eq(&device.table().unwrap(), &home));
            }
            result
        },
        |()| {
            assert_eq!(target.reserved_ranges().len(), 2);
            assert_eq!(
                space.reserved_ranges().len(),
                1,
                "the device's own reservation must have gone with it"
            );
            device.attach(&home).unwrap();
        },
    );
    assert!(failures > 4);
}

#[test]
fn a_device_moves_between_tables_in_one_step() {
    let (world, double) = (World::new(), Double::new());
    let (space, other) = (world.space(), world.space());
    let device = double.attached(DERIVED, &space);
    let reserved = space.reserved_ranges();

    // To a table of its own in the same space: what it has reserved stays.
    let own = Table::new(&space, &device).unwrap();
    device.attach(&own).unwrap();
    assert!(Arc::ptr_eq(&double.table_of(DERIVED).unwrap(), &own));
    assert_eq!((double.tables().len(), space.statistics().tables), (1, 1));
    assert_eq!(space.reserved_ranges(), reserved);

    // To where it already is.
    device.attach(&own).unwrap();
    assert_eq!(space.reserved_ranges(), reserved);

    // To another space: the first is as if it had never been there.
    drop(own);
    device.attach(&Table::for_device(&other, &device).unwrap()).unwrap();
    assert_eq!((space.reserved_ranges().len(), space.statistics().tables), (0, 0));
    assert_eq!((other.reserved_ranges(), other.statistics().tables), (reserved, 1));
    assert_eq!(double.tables().len(), 1);
    drop(device);
    assert!(double.tables().is_empty() && double.table_of(DERIVED).is_none());
}

#[test]
fn a_refused_attachment_names_the_addresses() {
    let (world, double) = (World::new(), Double::new());
    let device = double.device(DERIVED);
    let attach =
        |space: &Arc<Space>| Table::for_device(space, &device).and_then(|table| device.attach(&table));
    let beyond = IovaRange::new(1 << 48, u64::MAX).unwrap();

    let space = world.space();
    space.map(Iova::new(0xfee0_0000 + 8 * K4), &world.ram, 0, K4, RW).unwrap();
    assert!(matches!(attach(&space), Err(AttachError::Mapped { range }) if range == interrupts()));
    let space = world.space();
    space.map(Iova::new(1 << 48), &world.ram, 0, K4, RW).unwrap();
    assert!(matches!(attach(&space), Err(AttachError::Mapped { range }) if range == beyond));
    let space = world.space();
    space.set_allowed(&[range(0xfee0_0000, K4)]).unwrap();
    assert!(matches!(attach(&space), Err(AttachError::Allowed { range }) if range == interrupts()));
    let space = world.space();
    space.set_allowed(&[IovaRange::ALL]).unwrap();
    assert!(matches!(attach(&space), Err(AttachError::Allowed { range }) if range == beyond));
    assert!(double.tables().is_empty() && device.table().is_none());
    assert_eq!(space.usable_ranges(), [IovaRange::ALL]);

    // What the user has reserved for himself is in nobody's way.
    let space = world.space();
    space.reserve(range(0xfee0_0000, M2), ReservationOwner::User(7)).unwrap();
    attach(&space).unwrap();
    assert!(matches!(
        space.map(Iova::new(1 << 48), &world.ram, 0, K4, RW),
        Err(MapError::Reserved { range }) if range == beyond
    ));
}

#[test]
fn a_table_that_cannot_be_cut_refuses_and_keeps_everything() {
    let (world, double) = (World::new(), Double::new());
    let space = world.space();
    let _device = double.attached(DERIVED, &space);
    double.switches.uncuttable.store(true, Ordering::SeqCst);
    let before = world.state(&space, &double);
    let at = 2 * G1 + 8 * M2 + K4;
    let refused = space.unmap(range(at, K4));
    assert!(matches!(refused, Err(UnmapError::Table(TableError::CannotCut { at: cut })) if cut == at));
    // One end that is a boundary is not enough.
    assert!(space.unmap(range(2 * G1 + 8 * M2, K4)).is_err());
    assert!(space.unmap(range(2 * G1, 8 * M2 + K4)).is_err());
    assert_eq!(world.state(&space, &double), before);
    // Whole leaves can go, of course: the GiB was cut once, so these are 2 MiB.
    assert_eq!(space.unmap(range(2 * G1 + 8 * M2, M2)).unwrap().bytes(), M2);
    assert_in_step(&space, &double);
}

#[test]
fn dropped_memory_leaves_even_a_table_that_cannot_be_cut() {
    let (world, double) = (World::new(), Double::new());
    // Natively in small pages, in the table in a large one: whole native leaves are not enough.
    let space = double::space_of_leaves(&world.bus, 12);
    let _device = double.attached(DERIVED, &space);
    double.switches.uncuttable.store(true, Ordering::SeqCst);
    let page = Memory::register(&world.backing, 7 * K4, K4, &world.account).unwrap();
    space.map(Iova::new(4 * M2), &world.ram, 0, 4 * M2, RW).unwrap();
    space.map(Iova::new(64 * M2), &page, 0, K4, RW).unwrap();
    assert!(space.unmap(range(4 * M2, K4)).is_err());

    let kept = Memory::register(&world.backing, 8 * K4, G1, &world.account).unwrap();
    drop(world.ram);
    // Seven pages of the first large page had to go; that took the whole of it, but not its neighbour.
    assert_eq!(space.walk(Iova::new(4 * M2)), None);
    assert!(space.walk(Iova::new(6 * M2)).is_some());
    assert!(space.walk(Iova::new(64 * M2)).is_some());
    assert_in_step(&space, &double);
    drop((kept, page));
    assert_eq!(mappings(&space), []);
    assert_in_step(&space, &double);
}

#[test]
fn dropped_memory_goes_although_cuts_fail() {
    for number in 1..4 {
        let (world, double) = (World::new(), Double::new());
        let space = world.space();
        let _device = double.attached(DERIVED, &space);
        let kept = Memory::register(&world.backing, 4 * M2, 4 * M2, &world.account).unwrap();
        double.switches.fail(Call::Cut, number);
        drop(world.ram);
        for (iova, length, ..) in mappings(&space) {
            assert!(range(2 * G1 + 4 * M2, 4 * M2).covers(&range(iova, length)), "{iova:#x}, {length:#x}");
        }
        assert_in_step(&space, &double);
        drop(kept);
        assert_eq!(mappings(&space), []);
    }
}

#[test]
fn who_sleeps_in_an_iommu_keeps_only_overlapping_operations_waiting() {
    let (world, double, still) = (World::new(), Double::new(), Double::new());
    let (space, other) = (world.space(), world.space());
    let (_device, _other) = (double.attached(DERIVED, &space), still.attached(DERIVED, &other));
    let release = OpenGate(&double);
    double.switches.close_gate(Stop::Calls);
    std::thread::scope(|scope| {
        let mapper = scope.spawn(|| space.map(Iova::new(16 * G1), &world.ram, 0, M2, RW));
        double.switches.wait_for_call();
        // The claimed range neither translates yet nor is free.
        assert_eq!(space.walk(Iova::new(16 * G1)), None);
        // Another space is not concerned.
        other.map(Iova::new(16 * G1), &world.ram, 0, M2, RW).unwrap();
        other.unmap(range(16 * G1, M2)).unwrap();
        // Who wants the same range gets it afterwards.
        let unmapper = scope.spawn(|| space.unmap(range(16 * G1, K4)));
        assert!(!mapper.is_finished());
        drop(release);
        mapper.join().unwrap().unwrap();
        // Either order is right: all or nothing of the page was unmapped.
        let bytes = unmapper.join().unwrap().unwrap().bytes();
        assert!(bytes == 0 || bytes == K4);
        assert_eq!(space.walk(Iova::new(16 * G1)).is_none(), bytes == K4);
    });
    assert_in_step(&space, &double);
}

/// Opens the gate also when a test fails, or its threads would stand there for ever.
struct OpenGate<'a>(&'a Double);

impl Drop for OpenGate<'_> {
    fn drop(&mut self) {
        self.0.switches.open_gate();
    }
}

#[test]
fn a_mapping_that_comes_while_a_protect_waits_is_protected_whole_or_not_at_all() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let _device = double.attached(DERIVED, &space);
    for _ in 0..20 {
        // A hole in the middle, and behind it a page that is being unmapped.
        space.map(Iova::new(0), &world.ram, 0, K4, RW).unwrap();
        space.map(Iova::new(3 * K4), &world.ram, 3 * K4, K4, RW).unwrap();
        let release = OpenGate(&double);
        double.switches.close_gate(Stop::Unmaps);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                space.unmap(range(3 * K4, K4)).unwrap();
                // The hole was passed by now, and the page was not.
                space.map(Iova::new(K4), &world.ram, K4, 3 * K4, RW).unwrap();
            });
            double.switches.wait_for_call();
            let protector = scope.spawn(|| space.protect(range(0, 4 * K4), Permissions::READ).unwrap());
            // It has the first page and waits for the last. (If it does not yet, the test shows less.)
            std::thread::sleep(std::time::Duration::from_millis(4));
            drop(release);
            let bytes = protector.join().unwrap();
            assert!(bytes == K4 || bytes == 4 * K4, "{bytes:#x}");
        });
        let rights = [1, 2, 3].map(|page| space.query(Iova::new(page * K4)).unwrap().permissions);
        assert!(rights == [Permissions::READ; 3] || rights == [RW; 3], "{rights:?}");
        assert_in_step(&space, &double);
        assert_eq!(space.unmap(IovaRange::ALL).unwrap().bytes(), 4 * K4);
    }
}

#[test]
fn an_alias_of_what_never_rests_gives_up_and_leaves_nothing() {
    let (world, double) = (World::new(), Double::new());
    let (space, other) = (Space::new(&world.bus), Space::new(&world.bus));
    let _device = double.attached(DERIVED, &space);
    space.map(Iova::new(0), &world.ram, 0, 4 * K4, RW).unwrap();
    let release = OpenGate(&double);
    double.switches.close_gate(Stop::Unmaps);
    std::thread::scope(|scope| {
        scope.spawn(|| space.unmap(range(K4, K4)).unwrap());
        double.switches.wait_for_call();
        let alias = space.alias(range(0, 4 * K4), &other, Iova::new(0), RW);
        assert!(matches!(alias, Err(AliasError::Busy)), "{alias:?}");
        assert_eq!(mappings(&other), []);
        drop(release);
    });
    assert_eq!(space.alias(range(0, 4 * K4), &other, Iova::new(0), RW).unwrap(), 3 * K4);
}

#[test]
fn an_unmap_that_began_before_a_table_leaves_nothing_in_it() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let _device = double.attached(DERIVED, &space);
    let release = OpenGate(&double);
    double.switches.close_gate(Stop::Cuts);
    std::thread::scope(|scope| {
        let unmapper = scope.spawn(|| space.unmap(range(M2, M2)));
        double.switches.wait_for_call();
        // The unmap does not know this table, which waits for the unmap.
        let attacher = scope.spawn(|| double.attached(WIDE, &space));
        std::thread::sleep(std::time::Duration::from_millis(50));
        // This mapping begins when the table is known; the unmap, which began before, takes it away.
        space.map(Iova::new(M2), &world.ram, 0, M2, RW).unwrap();
        drop(release);
        assert_eq!(unmapper.join().unwrap().unwrap().bytes(), M2);
        let _device = attacher.join().unwrap();
        assert_eq!(mappings(&space), []);
        assert_in_step(&space, &double);
    });
}

#[test]
fn memory_is_not_given_back_while_another_unmap_of_it_is_under_way() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let _device = double.attached(DERIVED, &space);
    let ram = Memory::register(&world.backing, 0, M2, &Account::new("dropper", None)).unwrap();
    let holds_before = world.backing.holds(0, M2);
    drop(world.ram);
    assert_eq!((holds_before, world.backing.holds(0, M2)), (2..=2, 1..=1));
    space.map(Iova::new(M2), &ram, 0, M2, RW).unwrap();
    let release = OpenGate(&double);
    double.switches.close_gate(Stop::Unmaps);
    let dropped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let unmapper = scope.spawn(|| space.unmap(range(M2, M2)));
        double.switches.wait_for_call();
        // The native leaf translates no more, but the derived one does.
        assert_eq!((space.walk(Iova::new(M2)), double.tables()[0].mappings().len()), (None, 1));
        let dropper = scope.spawn(|| {
            drop(ram);
            dropped.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!dropped.load(Ordering::SeqCst), "dropped while a device could still reach it");
        drop(release);
        assert_eq!(unmapper.join().unwrap().unwrap().bytes(), M2);
        dropper.join().unwrap();
    });
    assert_eq!(mappings(&space), []);
    assert_in_step(&space, &double);
}

/// A search for room looks at the table while a map is under way that will fail: what it has seen claimed is free
/// afterwards, and is found again.
#[test]
fn what_a_map_claimed_that_failed_is_proposed_again() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let _device = double.attached(DERIVED, &space);
    let place = 16 * G1;
    space.set_allowed(&[range(place, 2 * K4)]).unwrap();
    let two_pages = || space.map_anywhere(&world.ram, 0, 2 * K4, RW).map(Iova::get);
    assert_eq!(two_pages().unwrap(), place);
    space.unmap(range(place, 2 * K4)).unwrap();
    space.map(Iova::new(place), &world.ram, 0, K4, RW).unwrap();
    let release = OpenGate(&double);
    double.switches.close_gate(Stop::Calls);
    double.switches.fail(Call::Map, 1);
    std::thread::scope(|scope| {
        let mapper = scope.spawn(|| space.map(Iova::new(place + K4), &world.ram, 0, K4, RW));
        double.switches.wait_for_call();
        assert!(matches!(two_pages(), Err(MapError::NoHole { .. })));
        drop(release);
        assert!(matches!(mapper.join().unwrap(), Err(MapError::Table(_))));
    });
    assert!(matches!(two_pages(), Err(MapError::NoHole { .. })));
    space.unmap(range(place, K4)).unwrap();
    assert_eq!(two_pages().unwrap(), place);
}

/// What one of the tables cannot do is known before anything is cut for it, natively or in another table.
#[test]
fn a_change_that_a_table_cannot_make_cuts_nothing() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let _devices = [DERIVED, AMD_ALL_SIZES].map(|rid| double.attached(rid, &space));
    space.map(Iova::new(0), &world.ram, 0, 16 * M2, RW).unwrap();
    let leaves = || {
        let sizes: Vec<_> = double.tables().iter().map(|table| table.leaf_sizes()).collect();
        (space.leaves(IovaRange::ALL), sizes)
    };
    let before = leaves();
    let refused = space.unmap(range(K4, K4));
    assert!(matches!(refused, Err(UnmapError::Table(TableError::CannotCut { at: K4 }))), "{refused:?}");
    assert_eq!(leaves(), before, "unmap");
    let refused = space.unmap_deferred(range(0, M2 + K4));
    assert!(matches!(refused, Err(UnmapError::Table(TableError::CannotCut { .. }))), "{refused:?}");
    assert_eq!(leaves(), before, "deferred unmap");
    let refused = space.protect(range(K4, K4), Permissions::READ);
    assert!(matches!(refused, Err(ProtectError::Table(TableError::CannotCut { .. }))), "{refused:?}");
    assert_eq!(leaves(), before, "protect");
    let refused = space.remap(Iova::new(K4), &world.ram, 9 * K4, K4, RW);
    assert!(matches!(refused, Err(RemapError::Table(_))), "{refused:?}");
    assert_eq!(leaves(), before, "remap");
    assert_in_step(&space, &double);
}

/// Nobody can say what the table of an IOMMU says whose driver has panicked.
#[test]
fn memory_below_a_panic_is_never_given_back_and_nobody_waits_for_that() {
    let (world, double) = (World::new(), Double::new());
    let space = Space::new(&world.bus);
    let _device = double.attached(DERIVED, &space);
    let (account, object) = (Account::new("panic", None), Backing::anonymous(&world.bus, 16 * K4).unwrap());
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let ram = Memory::register(&object, 0, 16 * K4, &account).unwrap();
        space.map(Iova::new(0), &ram, 0, K4, RW).unwrap();
        double.switches.fail(Call::Map, 1);
        double.switches.panics.store(true, Ordering::SeqCst);
        let _ = space.map(Iova::new(4 * K4), &ram, 4 * K4, 4 * K4, RW);
    }));
    assert!(panic.is_err());
    assert_eq!(space.statistics().busy_bytes, 4 * K4);
    // What was mapped as a whole is gone; all is held.
    assert_eq!(mappings(&space), []);
    assert_eq!((account.charged_pages(), object.holds(0, 16 * K4)), (16, 1..=1));
    // Others are not concerned.
    space.map(Iova::new(0), &world.ram, 0, 4 * K4, RW).unwrap();
    assert_eq!(space.unmap(range(0, 4 * K4)).unwrap().bytes(), 4 * K4);
    let kept = Memory::register(&object, 0, K4, &account).unwrap();
    drop(kept);
    assert_eq!(account.charged_pages(), 16);
}
