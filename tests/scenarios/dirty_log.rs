//! A dirty log at 4 KiB over superpages of 1 GiB, which are restored afterwards.
//!
//! Who asks: whoever migrates a guest with a passed-through device. With one bit for a gibibyte every round copies everything, and
//! the migration never ends; but with pages of 4 KiB from the beginning the device is slow for a year, for the sake of one minute.
//!
//! - VFIO type1: the log is of all that is pinned, or of what a device's driver says; tables stay as they are.
//! - iommufd: the log is as fine as the leaves are. The RFC of 2021 that split and merged large leaves for it was not merged; what
//!   went in leaves the choice of sizes to whoever maps.
//! - Here leaves are split on request and merged again, in place: no device finds an address missing at any moment.

use crate::machine::{Function, G1, K4, M2, Machine, RW, beside, number_at};
use ioasid::{Account, Iova, IovaRange, Memory, PageSize, Space, TableError};
use ioasid_soft::iommu::TableKind;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const GUEST: u64 = 4 * G1;
const WHOLE: (u64, u64) = (GUEST, G1);
/// Those whose leaves can be cut while devices use them.
const KINDS: [TableKind; 3] = [TableKind::VtdSecondStage, TableKind::X86_64, TableKind::Sv48];

fn guest() -> IovaRange {
    crate::machine::range(WHOLE.0, WHOLE.1)
}

/// The numbers of the guest's pages that the log names, which it forgets.
fn take(function: &Function) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let report =
        |written: IovaRange| pages.extend((written.first() - GUEST) / K4..=(written.last() - GUEST) / K4);
    function.table().take_written(guest(), report).unwrap();
    pages
}

#[test]
fn the_log_names_each_page_that_was_written_and_no_other_one() {
    for kind in KINDS {
        let machine = Machine::new();
        let ram = machine.memory(G1, &Account::new("guest", None));
        let space = Space::new(&machine.bus);
        let function = machine.attached(kind, &space);
        // A device on another kind of table beside it, whose leaves nobody touches.
        let other = machine.attached(TableKind::Native, &space);
        space.map(Iova::new(GUEST), &ram, 0, G1, RW).unwrap();
        assert_eq!((function.leaves(), other.leaves()), (vec![(G1, 1)], vec![(G1, 1)]), "{kind}");

        // As it is, one byte makes a gibibyte dirty.
        function.table().record_writes(true).unwrap();
        function.write(GUEST + 5 * K4, 1).unwrap();
        assert_eq!(take(&function).len() as u64, G1 / K4, "{kind}");
        function.table().record_writes(false).unwrap();

        function.table().split(guest(), PageSize::SIZE_4K).unwrap();
        assert_eq!((function.leaves(), other.leaves()), (vec![(K4, G1 / K4)], vec![(G1, 1)]), "{kind}");
        function.table().record_writes(true).unwrap();
        assert_eq!(take(&function), BTreeSet::new(), "{kind}");
        let written = [0, 1, 511, 512, 77_777, G1 / K4 - 1];
        for page in written {
            function.write(GUEST + page * K4 + 8 * (page % 500), page).unwrap();
            // To read is not to write.
            function.read(GUEST + (page ^ 2) * K4).unwrap();
        }
        assert_eq!(take(&function), BTreeSet::from(written), "{kind}");
        assert_eq!(take(&function), BTreeSet::new(), "{kind}: it is told once");
        // Over a boundary.
        function.write(GUEST + 700 * K4 - 4, u64::MAX).unwrap();
        assert_eq!(take(&function), BTreeSet::from([699, 700]), "{kind}");
        function.table().record_writes(false).unwrap();

        assert!(space.merge(guest()) >= 512);
        assert_eq!((function.leaves(), other.leaves()), (vec![(G1, 1)], vec![(G1, 1)]), "{kind}");
        assert_eq!((function.faults(), other.faults()), (0, 0));
    }
}

/// Where the devices of the migration write: pages all over the guest.
const PLACES: u64 = 512;

fn place(number: u64) -> u64 {
    number % PLACES * M2 + number % 97 * K4
}

/// Copies pages, as the migration does.
fn copy(source: &Arc<Memory>, target: &mut [u64], pages: &BTreeSet<u64>) {
    for number in 0..PLACES {
        if pages.contains(&(place(number) / K4)) {
            target[number as usize] = number_at(source, place(number));
        }
    }
}

/// A whole migration while devices write: split, rounds of copying, the devices stop, the last round, merge. What was copied is
/// what is there, and not one DMA has faulted.
#[test]
fn a_guest_is_migrated_below_its_devices() {
    for kind in KINDS {
        let machine = Machine::new();
        let ram = machine.memory(G1, &Account::new("guest", None));
        let space = Space::new(&machine.bus);
        let functions = [0, 1].map(|_| machine.attached(kind, &space));
        space.map(Iova::new(GUEST), &ram, 0, G1, RW).unwrap();
        let table = functions[0].table();
        let mut copied = vec![0; PLACES as usize];
        let writes = AtomicU64::new(0);
        let work = |function: &Function, first: u64, round: u64| {
            let number = 2 * (round * 31 % (PLACES / 2)) + first;
            function.write(GUEST + place(number), round + 1).unwrap();
            assert_eq!(function.read(GUEST + place(number)), Ok(round + 1), "{kind}");
            writes.fetch_add(1, Ordering::Relaxed);
        };
        let (one, two) = (&functions[0], &functions[1]);
        let begun = |at_least: u64| {
            let until = writes.load(Ordering::Relaxed) + at_least;
            let start = Instant::now();
            while writes.load(Ordering::Relaxed) < until {
                assert!(start.elapsed() < Duration::from_secs(60), "the devices do not work");
                std::thread::yield_now();
            }
        };
        let one_works = |round| work(one, 0, round);
        let two_works = |round| work(two, 1, round);
        beside(&[&one_works, &two_works], || {
            begun(100);
            table.split(guest(), PageSize::SIZE_4K).unwrap();
            table.record_writes(true).unwrap();
            // The first round is everything.
            copy(&ram, &mut copied, &(0..G1 / K4).collect());
            for _ in 0..10 {
                let before = writes.load(Ordering::Relaxed);
                begun(50);
                let dirty = take(one);
                // No more pages than were written, one for each device being under way.
                let since = writes.load(Ordering::Relaxed) - before;
                assert!(!dirty.is_empty() && dirty.len() as u64 <= PLACES.min(since + 50 + PLACES), "{kind}");
                assert!(
                    dirty.iter().all(|page| (0..PLACES).any(|number| place(number) / K4 == *page)),
                    "{kind}"
                );
                copy(&ram, &mut copied, &dirty);
            }
        });
        copy(&ram, &mut copied, &take(one));
        table.record_writes(false).unwrap();
        let there: Vec<u64> = (0..PLACES).map(|number| number_at(&ram, place(number))).collect();
        assert_eq!(copied, there, "{kind}: a write was lost");

        // It goes on at the source, say. The superpages come back below the devices.
        beside(&[&one_works, &two_works], || space.merge(guest()));
        assert_eq!(one.leaves(), [(G1, 1)], "{kind}");
        assert_eq!(functions.each_ref().map(Function::faults), [0, 0], "{kind}");
    }
}

/// AMD's format does not allow it while devices use the table. It says so before anything has changed; a space that is going to be
/// migrated has small leaves there from the beginning.
#[test]
fn a_table_that_cannot_be_split_says_so() {
    let machine = Machine::new();
    let ram = machine.memory(G1, &Account::new("guest", None));
    let space = Space::new(&machine.bus);
    let function = machine.attached(TableKind::AmdV1, &space);
    space.map(Iova::new(GUEST), &ram, 0, G1, RW).unwrap();
    let refused = function.table().split(guest(), PageSize::SIZE_4K);
    assert!(matches!(refused, Err(TableError::CannotCut { at: GUEST })), "{refused:?}");
    assert_eq!(function.leaves(), [(G1, 1)]);
}
