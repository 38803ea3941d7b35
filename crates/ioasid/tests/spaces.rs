//! What a user of spaces, memory and accounts relies on, one promise for each test.

use ioasid::{
    Account, Backing, Bus, Iova, IovaRange, MapError, Memory, PageSize, Permissions, RegisterError,
    ReservationOwner, ReserveError, Space, UnmapError, pagetable::Native,
};
use std::sync::Arc;

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const G1: u64 = 1 << 30;
const RW: Permissions = Permissions::READ_WRITE;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// Registered memory of an object of its own, for an account of its own.
fn memory(bus: &Arc<Bus>, length: u64) -> Arc<Memory> {
    let backing = Backing::anonymous(bus, length).unwrap();
    Memory::register(&backing, 0, length, &Account::new("test", None)).unwrap()
}

/// The output address that a space gives for an address.
fn output(space: &Space, iova: u64) -> Option<u64> {
    space.walk(Iova::new(iova)).map(|leaf| leaf.output(iova).get())
}

/// The leaves of a space as (first address, bytes, output address).
fn leaves(space: &Space) -> Vec<(u64, u64, u64)> {
    let leaves = space.leaves(IovaRange::ALL);
    leaves.iter().map(|leaf| (leaf.iova, leaf.size.bytes(), leaf.oa.get())).collect()
}

/// What is mapped where, whatever the leaves are: neighbours joined.
fn mappings(space: &Space) -> Vec<(u64, u64, u64)> {
    let mut joined: Vec<(u64, u64, u64)> = Vec::new();
    for (iova, bytes, oa) in leaves(space) {
        match joined.last_mut() {
            Some((first, length, first_oa))
                if *first + *length == iova && *first_oa + *length == oa && iova != 0 =>
            {
                *length += bytes;
            }
            _ => joined.push((iova, bytes, oa)),
        }
    }
    joined
}

#[test]
fn a_mapping_translates_from_its_first_to_its_last_byte_and_nowhere_else() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    space.map(Iova::new(0x7000), &ram, 2 * K4, 3 * K4, Permissions::READ).unwrap();
    let first = output(&space, 0x7000).unwrap();
    assert_eq!(output(&space, 0x6fff), None);
    assert_eq!(output(&space, 0x9fff), Some(first + 3 * K4 - 1));
    assert_eq!(output(&space, 0xa000), None);
    let leaf = space.walk(Iova::new(0x8123)).unwrap();
    assert_eq!(leaf.attributes, ioasid::Attributes::READ);

    // The offset is where the mapping begins in the memory.
    space.map(Iova::new(0x10_0000), &ram, 0, 16 * K4, RW).unwrap();
    assert_eq!(output(&space, 0x10_0000 + 2 * K4), Some(first));

    let unmapped = space.unmap(range(0x7000, 3 * K4)).unwrap();
    assert_eq!((unmapped.bytes(), unmapped.leaves()), (3 * K4, 3));
    assert_eq!(unmapped.runs().collect::<Vec<_>>(), [range(0x7000, 3 * K4)]);
    assert_eq!(output(&space, 0x7000), None);
    assert_eq!(output(&space, 0x10_0000 + 2 * K4), Some(first));
}

#[test]
fn unmapping_the_middle_and_the_edges_of_a_gibibyte_leaves_the_rest() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, G1));
    let base = 4 * G1;
    space.map(Iova::new(base), &ram, 0, G1, RW).unwrap();
    assert_eq!(space.statistics().leaves, [(PageSize::SIZE_1G, 1)]);
    let oa = output(&space, base).unwrap();

    // The middle, on no boundary of a large page.
    assert_eq!(space.unmap(range(base + M2 + K4, 5 * K4)).unwrap().bytes(), 5 * K4);
    // The first page and the last.
    assert_eq!(space.unmap(range(base, K4)).unwrap().bytes(), K4);
    assert_eq!(space.unmap(range(base + G1 - K4, K4)).unwrap().bytes(), K4);
    assert_eq!(
        mappings(&space),
        [(base + K4, M2, oa + K4), (base + M2 + 6 * K4, G1 - M2 - 7 * K4, oa + M2 + 6 * K4)]
    );
    assert_eq!(space.statistics().mapped_bytes, G1 - 7 * K4);

    assert_eq!(space.unmap(IovaRange::ALL).unwrap().bytes(), G1 - 7 * K4);
    assert_eq!(leaves(&space), []);
    // Where it was cut, a whole leaf fits again.
    space.map(Iova::new(base), &ram, 0, G1, RW).unwrap();
    assert_eq!(space.statistics().leaves, [(PageSize::SIZE_1G, 1)]);
}

#[test]
fn one_unmap_spans_mappings_and_holes() {
    let bus = Bus::new();
    let (space, ram, other) = (Space::new(&bus), memory(&bus, 8 * M2), memory(&bus, 8 * M2));
    space.map(Iova::new(8 * M2), &ram, 0, 2 * M2, RW).unwrap();
    space.map(Iova::new(12 * M2), &other, 0, 2 * M2, Permissions::READ).unwrap();
    let (kept_low, kept_high) = (output(&space, 8 * M2).unwrap(), output(&space, 12 * M2 + M2).unwrap());
    // From the middle of the first, over the hole between them, to the middle of the second.
    let unmapped = space.unmap(range(9 * M2, 4 * M2)).unwrap();
    assert_eq!(unmapped.runs().collect::<Vec<_>>(), [range(9 * M2, M2), range(12 * M2, M2)]);
    assert_eq!(mappings(&space), [(8 * M2, M2, kept_low), (13 * M2, M2, kept_high)]);

    // Where nothing is mapped nothing happens, and that is no error.
    let nothing = space.unmap(range(9 * M2, 4 * M2)).unwrap();
    assert_eq!((nothing.bytes(), nothing.leaves(), nothing.runs().count()), (0, 0, 0));
    assert_eq!(space.unmap(IovaRange::ALL).unwrap().runs().count(), 2);
}

#[test]
fn overlaps_are_refused_and_change_nothing() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 4 * G1));
    space.map(Iova::new(4 * M2), &ram, 0, 2 * M2, RW).unwrap();
    let before = leaves(&space);
    let tables = space.statistics().native_table_bytes;
    for (first, length, in_the_way) in [
        (4 * M2, 2 * M2, 4 * M2),       // the same
        (4 * M2, K4, 4 * M2),           // its first page
        (6 * M2 - K4, K4, 6 * M2 - K4), // its last page
        (3 * M2, 2 * M2, 4 * M2),       // over its beginning
        (5 * M2, 2 * M2, 5 * M2),       // over its end
        (0, 2 * G1, 4 * M2),            // all around it
        (4 * M2 - K4, 2 * K4, 4 * M2),  // one page of it, from below
    ] {
        let refused = space.map(Iova::new(first), &ram, 0, length, RW);
        assert!(
            matches!(refused, Err(MapError::AlreadyMapped { at }) if at == in_the_way),
            "{length:#x} at {first:#x}: {refused:?}"
        );
        assert_eq!(leaves(&space), before);
    }
    // The neighbours are free.
    space.map(Iova::new(3 * M2), &ram, 0, M2, RW).unwrap();
    space.map(Iova::new(6 * M2), &ram, 0, M2, RW).unwrap();
    space.unmap(IovaRange::ALL).unwrap();
    assert!(space.statistics().native_table_bytes <= tables, "refused maps left tables behind");
}

#[test]
fn the_last_page_of_all_addresses_is_like_any_other() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, G1));
    let last = 0u64.wrapping_sub(K4);
    space.map(Iova::new(last), &ram, 0, K4, RW).unwrap();
    assert!(output(&space, u64::MAX).is_some());
    assert!(matches!(space.map(Iova::new(last), &ram, 0, 2 * K4, RW), Err(MapError::NoRange { .. })));
    assert_eq!(space.unmap(IovaRange::new(last, u64::MAX).unwrap()).unwrap().bytes(), K4);
    assert_eq!(output(&space, u64::MAX), None);

    // The last GiB as one leaf, and its last page cut off.
    let gibibyte = 0u64.wrapping_sub(G1);
    space.map(Iova::new(gibibyte), &ram, 0, G1, RW).unwrap();
    assert_eq!(space.statistics().leaves, [(PageSize::SIZE_1G, 1)]);
    space.unmap(IovaRange::new(last, u64::MAX).unwrap()).unwrap();
    assert_eq!(output(&space, last), None);
    assert!(output(&space, last - 1).is_some());
    space.unmap(IovaRange::ALL).unwrap();

    // Reserved and allowed ranges reach there too.
    space.reserve(IovaRange::new(last, u64::MAX).unwrap(), ReservationOwner::User(0)).unwrap();
    assert!(matches!(space.map(Iova::new(last), &ram, 0, K4, RW), Err(MapError::Reserved { .. })));
    space.unreserve(ReservationOwner::User(0));
    space.set_allowed(&[IovaRange::new(last, u64::MAX).unwrap()]).unwrap();
    assert_eq!(space.map_anywhere(&ram, 0, K4, RW).unwrap(), Iova::new(last));
    assert!(matches!(space.map_anywhere(&ram, 0, K4, RW), Err(MapError::NoHole { .. })));
    drop(ram);
    assert_eq!(leaves(&space), []);
}

#[test]
fn nonsense_is_refused_with_its_reason() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 4 * K4));
    let map = |iova: u64, offset, length| space.map(Iova::new(iova), &ram, offset, length, RW);
    assert!(matches!(map(0, 0, 0), Err(MapError::NoRange { .. })));
    assert!(matches!(map(u64::MAX, 0, 2), Err(MapError::NoRange { .. })));
    assert!(matches!(map(0, 0, 5 * K4), Err(MapError::BeyondMemory { .. })));
    assert!(matches!(map(0, 4 * K4, K4), Err(MapError::BeyondMemory { .. })));
    assert!(matches!(map(0, u64::MAX, K4), Err(MapError::BeyondMemory { .. })));
    assert!(matches!(map(0, 1, K4), Err(MapError::Misaligned { .. })));
    assert!(matches!(map(1, 0, K4), Err(MapError::Misaligned { .. })));
    assert!(matches!(map(0, 0, 1), Err(MapError::Misaligned { .. })));
    assert!(matches!(space.map_anywhere(&ram, 0, 0, RW), Err(MapError::NoRange { .. })));
    assert!(matches!(space.map_anywhere(&ram, 1, 0, RW), Err(MapError::NoRange { .. })));
    assert!(matches!(space.map_anywhere(&ram, 0, u64::MAX, RW), Err(MapError::BeyondMemory { .. })));
    let stranger = memory(&Bus::new(), K4);
    assert!(matches!(space.map(Iova::new(0), &stranger, 0, K4, RW), Err(MapError::OtherBus)));
    for (first, last) in [(0, 0), (1, K4), (0, K4), (0x800, 0xfff)] {
        let refused = space.unmap(IovaRange::new(first, last).unwrap());
        assert!(matches!(refused, Err(UnmapError::Misaligned { .. })), "{first:#x}-{last:#x}: {refused:?}");
    }
    assert_eq!(leaves(&space), []);
}

#[test]
fn registering_refuses_what_the_object_does_not_have() {
    let bus = Bus::new();
    let account = Account::new("test", None);
    let backing = Backing::anonymous(&bus, 10 * K4).unwrap();
    let register = |offset, length| Memory::register(&backing, offset, length, &account);
    assert!(matches!(register(0, 0), Err(RegisterError::Empty)));
    assert!(matches!(register(0, 10 * K4 + 1), Err(RegisterError::OutOfBounds { .. })));
    assert!(matches!(register(10 * K4, 1), Err(RegisterError::OutOfBounds { .. })));
    assert!(matches!(register(u64::MAX, 1), Err(RegisterError::OutOfBounds { .. })));
    assert!(matches!(register(1, u64::MAX), Err(RegisterError::OutOfBounds { .. })));
    assert!(matches!(register(2, u64::MAX), Err(RegisterError::OutOfBounds { .. })));
    assert_eq!((account.charged_pages(), account.peak_pages()), (0, 0));
    assert!(register(10 * K4 - 1, 1).is_ok());
    assert_eq!((account.charged_pages(), account.peak_pages()), (0, 1));
}

#[test]
fn map_anywhere_takes_the_lowest_place_that_is_allowed_and_not_reserved() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 64 * K4));
    let place = |length| space.map_anywhere(&ram, 0, length, RW).map(Iova::get);
    // Never 0, though nothing is there.
    assert_eq!(place(K4).unwrap(), K4);
    space.reserve(range(2 * K4, 2 * K4), ReservationOwner::User(1)).unwrap();
    assert_eq!(place(K4).unwrap(), 4 * K4);
    // Aligned to its own size, so that the largest leaves are possible.
    assert_eq!(place(4 * K4).unwrap(), 8 * K4);
    assert_eq!(place(2 * K4).unwrap(), 6 * K4);
    // A place freed is used again.
    space.unmap(range(4 * K4, K4)).unwrap();
    assert_eq!(place(K4).unwrap(), 4 * K4);

    // Only in the allowed ranges, lowest first, whatever their order.
    space.set_allowed(&[range(64 * K4, 2 * K4), range(32 * K4, K4)]).unwrap();
    assert_eq!(place(K4).unwrap(), 32 * K4);
    assert_eq!(place(2 * K4).unwrap(), 64 * K4);
    assert!(matches!(place(K4), Err(MapError::NoHole { length }) if length == K4));
    // An address of one's own choice may be elsewhere.
    space.map(Iova::new(48 * K4), &ram, 0, K4, RW).unwrap();
    space.set_allowed(&[]).unwrap();
    assert_eq!(place(K4).unwrap(), 5 * K4);
}

#[test]
fn map_anywhere_gives_up_alignment_before_it_gives_up() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 64 * K4));
    space.set_allowed(&[range(K4, 4 * K4)]).unwrap();
    assert_eq!(space.map_anywhere(&ram, 0, 4 * K4, RW).unwrap(), Iova::new(K4));
}

#[test]
fn reservations_and_mappings_exclude_each_other_in_both_orders() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    let (one, two) = (ReservationOwner::User(1), ReservationOwner::User(2));
    space.reserve(range(4 * K4, 4 * K4), one).unwrap();
    for (first, length) in [(4 * K4, 4 * K4), (0, 5 * K4), (7 * K4, 2 * K4), (0, 16 * K4), (5 * K4, K4)] {
        let refused = space.map(Iova::new(first), &ram, 0, length, RW);
        assert!(
            matches!(refused, Err(MapError::Reserved { range: reserved }) if reserved == range(4 * K4, 4 * K4))
        );
    }
    assert_eq!(leaves(&space), []);
    space.map(Iova::new(8 * K4), &ram, 0, K4, RW).unwrap();
    space.map(Iova::new(3 * K4), &ram, 0, K4, RW).unwrap();

    // A reservation over a mapping fails, names what was asked for, and changes nothing.
    let asked = range(8 * K4, 4 * K4);
    assert_eq!(space.reserve(asked, two), Err(ReserveError::Mapped { range: asked }));
    assert_eq!(space.reserved_ranges(), [range(4 * K4, 4 * K4)]);
    space.map(Iova::new(9 * K4), &ram, 0, K4, RW).unwrap();

    // Two owners may reserve the same; it is free when both are gone.
    space.reserve(range(5 * K4, K4), two).unwrap();
    space.unreserve(one);
    space.map(Iova::new(4 * K4), &ram, 0, K4, RW).unwrap();
    assert!(matches!(space.map(Iova::new(5 * K4), &ram, 0, K4, RW), Err(MapError::Reserved { .. })));
    space.unreserve(two);
    space.map(Iova::new(5 * K4), &ram, 0, K4, RW).unwrap();
    assert_eq!(space.usable_ranges(), [IovaRange::ALL]);
}

#[test]
fn a_reservation_that_fails_keeps_nobody_from_mapping() {
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 16 * K4));
    space.map(Iova::new(15 * K4), &ram, 0, K4, RW).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reserver = scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let refused = space.reserve(range(0, 16 * K4), ReservationOwner::User(1));
                assert!(matches!(refused, Err(ReserveError::Mapped { .. })));
            }
        });
        for round in 0..2000u64 {
            let place = round % 15 * K4;
            if let Err(error) = space.map(Iova::new(place), &ram, 0, K4, RW) {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                panic!("round {round}: {error}");
            }
            space.unmap(range(place, K4)).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        reserver.join().unwrap();
    });
    assert_eq!(space.reserved_ranges(), []);
}

#[test]
fn a_page_is_charged_once_to_an_account_however_often_it_is_held() {
    let bus = Bus::new();
    let (payer, other) = (Account::new("payer", Some(16)), Account::new("other", Some(4)));
    let backing = Backing::anonymous(&bus, 64 * K4).unwrap();
    let pages = |first: u64, count: u64, account| Memory::register(&backing, first * K4, count * K4, account);

    let low = pages(0, 8, &payer).unwrap();
    assert_eq!(payer.charged_pages(), 8);
    // The same again, and a part of it twice: free of charge.
    let alias = pages(0, 8, &payer).unwrap();
    let inside = pages(2, 3, &payer).unwrap();
    assert_eq!(payer.charged_pages(), 8);
    // Half new.
    let over = pages(4, 8, &payer).unwrap();
    assert_eq!(payer.charged_pages(), 12);
    // Bytes of a page are a page, and it may be held already.
    let bytes = Memory::register(&backing, 12 * K4 - 1, 2, &payer).unwrap();
    assert_eq!(payer.charged_pages(), 13);
    assert_eq!(backing.holds(0, 64 * K4), 0..=4);
    assert_eq!(backing.holds(2 * K4, 2 * K4), 3..=3);

    // The limit is exact, in both directions.
    let refused = pages(13, 4, &payer).unwrap_err();
    assert!(matches!(refused, RegisterError::OverLimit(ref over) if over.pages == 4 && over.charged == 13));
    assert_eq!((payer.charged_pages(), payer.failures()), (13, 1));
    assert_eq!(backing.holds(13 * K4, 51 * K4), 0..=0);
    let exactly = pages(13, 3, &payer).unwrap();
    assert_eq!((payer.charged_pages(), payer.peak_pages()), (16, 16));
    // Another account pays for itself, even for the same pages.
    let theirs = pages(0, 4, &other).unwrap();
    assert_eq!((payer.charged_pages(), other.charged_pages()), (16, 4));
    assert!(pages(4, 1, &other).is_err());

    // What is mapped does not matter to the account, only what is registered.
    let spaces = [Space::new(&bus), Space::new(&bus)];
    for space in &spaces {
        space.map(Iova::new(0), &low, 0, 8 * K4, RW).unwrap();
        space.map(Iova::new(G1), &low, 0, 8 * K4, RW).unwrap();
        space.map(Iova::new(2 * G1), &alias, 0, 8 * K4, RW).unwrap();
    }
    assert_eq!((payer.charged_pages(), other.charged_pages()), (16, 4));

    // Released with the last registration of each page, and not before.
    drop(low);
    drop(exactly);
    assert_eq!(payer.charged_pages(), 13);
    drop(alias);
    // Pages 0 and 1 had only those two (of this account); 2 and 3 are inside; 4 to 12 in the others.
    assert_eq!(payer.charged_pages(), 11);
    drop(inside);
    assert_eq!(payer.charged_pages(), 9);
    drop((over, bytes));
    assert_eq!((payer.charged_pages(), payer.peak_pages()), (0, 16));
    assert_eq!(other.charged_pages(), 4);
    drop(theirs);
    assert_eq!(other.charged_pages(), 0);
    assert_eq!(backing.holds(0, 64 * K4), 0..=0);
    for space in &spaces {
        assert_eq!(leaves(space), []);
    }
}

#[test]
fn a_raised_limit_lets_in_exactly_what_fits() {
    let bus = Bus::new();
    let account = Account::new("test", Some(0));
    let backing = Backing::anonymous(&bus, 8 * K4).unwrap();
    assert!(Memory::register(&backing, 0, 1, &account).is_err());
    account.set_limit(Some(3));
    let three = Memory::register(&backing, 0, 3 * K4, &account).unwrap();
    account.set_limit(Some(1));
    // A limit below what is charged takes nothing away and gives nothing more, but what is paid is paid.
    assert!(Memory::register(&backing, 2 * K4, 2 * K4, &account).is_err());
    let alias = Memory::register(&backing, K4, 2 * K4, &account).unwrap();
    drop(three);
    assert_eq!(account.charged_pages(), 2);
    drop(alias);
    assert_eq!(account.charged_pages(), 0);
}

#[test]
fn dropped_memory_is_unmapped_everywhere_but_where_another_registration_holds_it() {
    let bus = Bus::new();
    let account = Account::new("test", None);
    let backing = Backing::anonymous(&bus, 4 * G1).unwrap();
    let whole = Memory::register(&backing, 0, G1, &account).unwrap();
    let middle = Memory::register(&backing, M2, M2, &account).unwrap();
    let elsewhere = memory(&bus, 4 * K4);
    let spaces = [Space::new(&bus), Space::new(&bus), Space::new(&bus)];
    for (number, space) in spaces.iter().enumerate() {
        space.map(Iova::new(G1 + number as u64 * G1), &whole, 0, G1, RW).unwrap();
        space.map(Iova::new(K4), &elsewhere, 0, 4 * K4, RW).unwrap();
    }
    spaces[0].map(Iova::new(8 * G1), &whole, 5 * K4, K4, RW).unwrap();
    spaces[1].map(Iova::new(8 * G1), &middle, 0, M2, RW).unwrap();
    let outputs: Vec<u64> = spaces.iter().map(|space| output(space, K4).unwrap()).collect();
    let oa = output(&spaces[0], G1).unwrap();

    drop(whole);
    for (number, space) in spaces.iter().enumerate() {
        let first = G1 + number as u64 * G1;
        let mut expected = vec![(K4, 4 * K4, outputs[number]), (first + M2, M2, oa + M2)];
        if number == 1 {
            expected.push((8 * G1, M2, oa + M2));
        }
        assert_eq!(mappings(space), expected);
    }
    // The last registration takes away what the first had mapped, too.
    drop(middle);
    for (number, space) in spaces.iter().enumerate() {
        assert_eq!(mappings(space), [(K4, 4 * K4, outputs[number])]);
    }
    assert_eq!(account.charged_pages(), 0);
}

#[test]
fn dropped_memory_goes_from_a_space_of_large_granules_too() {
    let bus = Bus::new();
    let granule = PageSize::from_log2(16).unwrap();
    let space = Space::with_format(&bus, Native::new().with_granule(granule).unwrap());
    let account = Account::new("test", None);
    let backing = Backing::anonymous(&bus, 1 << 20).unwrap();
    let whole = Memory::register(&backing, 0, 1 << 20, &account).unwrap();
    let kept = Memory::register(&backing, 0, 8 << 16, &account).unwrap();
    space.map(Iova::new(1 << 20), &whole, 0, 1 << 20, RW).unwrap();
    assert!(matches!(space.map(Iova::new(0), &whole, K4, 1 << 16, RW), Err(MapError::Misaligned { .. })));
    drop(whole);
    assert_eq!(space.statistics().mapped_bytes, 8 << 16);
    drop(kept);
    assert_eq!(leaves(&space), []);
}

#[test]
fn a_granule_of_two_kibibytes_maps_and_unmaps_half_pages() {
    let bus = Bus::new();
    let granule = PageSize::from_log2(11).unwrap();
    let space = Space::with_format(&bus, Native::new().with_granule(granule).unwrap());
    let ram = memory(&bus, 4 * K4);
    space.map(Iova::new(0x800), &ram, 0x800, 0x1000, RW).unwrap();
    assert_eq!(space.unmap(range(0x800, 0x800)).unwrap().bytes(), 0x800);
    assert_eq!(output(&space, 0x800), None);
    assert!(output(&space, 0x1000).is_some());
    drop(ram);
    assert_eq!(leaves(&space), []);
}

#[test]
fn a_window_that_is_used_again_shows_nothing_of_the_object_before() {
    let bus = Bus::new();
    let space = Space::new(&bus);
    let mut seen = std::collections::HashSet::new();
    for round in 0..50u64 {
        // Two sizes take turns, and one object stays while the next comes.
        let length = if round % 2 == 0 { 4 * K4 } else { 16 * K4 };
        let backing = Backing::anonymous(&bus, length).unwrap();
        backing.write(0, &[round as u8 + 1; 64]).unwrap();
        let ram = Memory::register(&backing, 0, length, &Account::new("test", None)).unwrap();
        space.map(Iova::new(0), &ram, 0, length, RW).unwrap();
        let oa = output(&space, 0).unwrap();
        seen.insert(oa);
        let section = ioasid::epoch::dma();
        let leaf = space.walk_for_dma(&section, 0, &mut ioasid::CachedWalk::new()).unwrap();
        let Ok(ioasid::Translated::Here(here)) = space.memory_at(&section, leaf.output(0)) else {
            panic!("no memory of this process at {:?}", leaf.oa)
        };
        let mut bytes = [0; 64];
        here.read(&mut bytes).unwrap();
        assert_eq!(bytes, [round as u8 + 1; 64]);
        // Nothing stands behind the object's end, though its window may be larger.
        assert!(space.memory_at(&section, ioasid::Oa::new(oa + length)).is_err() || length.is_power_of_two());
        drop(section);
        drop(ram);
        assert_eq!(leaves(&space), [], "dropped memory is still mapped");
        let section = ioasid::epoch::dma();
        assert!(
            matches!(space.memory_at(&section, ioasid::Oa::new(oa)), Err(ioasid::DmaError::NoMemory(_))),
            "memory that is registered no more still stands at its address"
        );
    }
    assert!(seen.len() < 50, "no window was ever used again, so this test shows nothing");
}

#[test]
fn memory_of_many_windows_is_one_mapping() {
    let bus = Bus::new();
    let account = Account::new("test", None);
    let backing = Backing::anonymous(&bus, 6 * G1).unwrap();
    // Something else gets the place in between, so that the windows are not neighbours on the bus.
    let late = Memory::register(&backing, 4 * G1, K4, &account).unwrap();
    let elsewhere = memory(&bus, 2 * G1);
    let ram = Memory::register(&backing, G1 / 2, 5 * G1, &account).unwrap();
    assert_eq!(account.charged_pages(), 5 * G1 / K4);
    let space = Space::new(&bus);
    space.map(Iova::new(G1 / 2), &ram, 0, 5 * G1, RW).unwrap();
    // Half a GiB in large pages, four whole leaves, half a GiB.
    assert_eq!(space.statistics().leaves, [(PageSize::SIZE_2M, G1 / M2), (PageSize::SIZE_1G, 4)]);
    assert!(mappings(&space).len() > 1, "the windows are neighbours, so this test shows nothing");

    // Each GiB is the object's own: what the CPU writes, a device reads.
    for gibibyte in 0..6u64 {
        let offset = gibibyte * G1 + G1 / 2 - if gibibyte == 5 { 8 } else { 0 };
        backing.write(offset, &gibibyte.to_le_bytes()).unwrap();
        let section = ioasid::epoch::dma();
        let leaf = space.walk_for_dma(&section, offset, &mut ioasid::CachedWalk::new()).unwrap();
        let Ok(ioasid::Translated::Here(here)) = space.memory_at(&section, leaf.output(offset)) else {
            panic!("no memory at {offset:#x}")
        };
        let mut bytes = [0; 8];
        here.read(&mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), gibibyte);
    }

    // A mapping whose ends lie in the windows' middles, unmapped over their boundary.
    assert_eq!(space.unmap(range(2 * G1 - M2, 2 * M2)).unwrap().bytes(), 2 * M2);
    assert_eq!(space.statistics().mapped_bytes, 5 * G1 - 2 * M2);
    drop(ram);
    // The one page that is held by another registration stays.
    assert_eq!(leaves(&space).iter().map(|leaf| (leaf.0, leaf.1)).collect::<Vec<_>>(), [(4 * G1, K4)]);
    drop(late);
    assert_eq!(leaves(&space), []);
    drop(elsewhere);
}

#[test]
fn threads_that_map_and_drop_in_one_space_do_not_disturb_each_other() {
    let bus = Bus::new();
    let space = Space::new(&bus);
    // Where no thread maps at addresses of its choice.
    space.set_allowed(&[range(G1, 15 * 4 * K4)]).unwrap();
    let account = Account::new("test", None);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (bus, space, account) = (&bus, &space, &account);
            scope.spawn(move || {
                let backing = Backing::anonymous(bus, 64 * K4).unwrap();
                for round in 0..200u64 {
                    let ram = Memory::register(&backing, 0, 64 * K4, account).unwrap();
                    let place = (round % 8) * 256 * K4 + thread * 64 * K4;
                    space.map(Iova::new(place), &ram, 0, 64 * K4, RW).unwrap();
                    let anywhere = space.map_anywhere(&ram, 0, 4 * K4, RW).unwrap();
                    assert!(output(space, place + 64 * K4 - 1).is_some());
                    if round % 3 == 0 {
                        assert_eq!(space.unmap(range(place + 8 * K4, 8 * K4)).unwrap().bytes(), 8 * K4);
                        assert_eq!(space.unmap(range(anywhere.get(), 4 * K4)).unwrap().bytes(), 4 * K4);
                    }
                    drop(ram);
                    assert_eq!(output(space, place), None);
                    // The place may be another thread's by now, but with memory of its own.
                    let _ = output(space, anywhere.get());
                }
            });
        }
    });
    assert_eq!(leaves(&space), []);
    assert_eq!(account.charged_pages(), 0);
}

#[test]
fn dropped_memory_takes_nothing_along_that_came_in_its_place() {
    let bus = Bus::new();
    let (space, other) = (Space::new(&bus), memory(&bus, 8 * K4));
    let backing = Backing::anonymous(&bus, 8 * K4).unwrap();
    let account = Account::new("test", None);
    for round in 0..3000u64 {
        let ram = Memory::register(&backing, 0, 8 * K4, &account).unwrap();
        space.map(Iova::new(0), &ram, 0, 8 * K4, RW).unwrap();
        let barrier = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                drop(ram);
            });
            barrier.wait();
            for page in (0..8u64).rev() {
                space.unmap(range(page * K4, K4)).unwrap();
                space.map(Iova::new(page * K4), &other, page * K4, K4, RW).unwrap();
            }
        });
        assert_eq!(space.unmap(range(0, 8 * K4)).unwrap().bytes(), 8 * K4, "round {round}");
    }
}

/// Threads that ask for places, map at places of their own choice, and unmap, all in the same few pages: whatever they
/// meet on the way, no place is forgotten, and none is given out twice.
#[test]
fn no_place_is_forgotten_however_many_look_for_one() {
    const PAGES: u64 = 64;
    let bus = Bus::new();
    let (space, ram) = (Space::new(&bus), memory(&bus, 8 * K4));
    space.set_allowed(&[range(K4, PAGES * K4)]).unwrap();
    for round in 0..20 {
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (space, ram) = (&space, &ram);
                scope.spawn(move || {
                    let mut random: u64 = round * 3 + thread + 1;
                    let mut mine = Vec::new();
                    for _ in 0..300 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let (choice, page, pages) =
                            (random >> 60, 1 + (random >> 40) % PAGES, 1 + (random >> 50) % 4);
                        match choice {
                            0..6 => match space.map_anywhere(ram, 0, pages * K4, RW) {
                                Ok(iova) => mine.push(range(iova.get(), pages * K4)),
                                Err(error) => assert!(matches!(error, MapError::NoHole { .. }), "{error}"),
                            },
                            6..10 => match space.map(Iova::new(page * K4), ram, 0, pages * K4, RW) {
                                Ok(()) => mine.push(range(page * K4, pages * K4)),
                                Err(error) => {
                                    assert!(matches!(error, MapError::AlreadyMapped { .. }), "{error}");
                                }
                            },
                            _ => {
                                if let Some(place) = mine.pop() {
                                    assert_eq!(space.unmap(place).unwrap().bytes(), place.length().unwrap());
                                }
                            }
                        }
                    }
                    for place in mine {
                        assert_eq!(space.unmap(place).unwrap().bytes(), place.length().unwrap());
                    }
                });
            }
        });
        assert_eq!(leaves(&space), []);
        for page in 1..=PAGES {
            assert_eq!(space.map_anywhere(&ram, 0, K4, RW).unwrap(), Iova::new(page * K4));
        }
        assert!(matches!(space.map_anywhere(&ram, 0, K4, RW), Err(MapError::NoHole { .. })));
        space.unmap(range(K4, PAGES * K4)).unwrap();
    }
}
