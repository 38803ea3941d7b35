//! Spaces that are taken apart into bytes and built again in another place.

use ioasid::pagetable::Native;
use ioasid::snapshot::{BadSnapshot, RestoreError, SnapshotError};
use ioasid::{
    Account, Backing, Bus, Iova, IovaRange, MapError, MappingPolicy, Memory, PageSize, Permissions,
    ReservationOwner, Snapshot, Space,
};
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::Arc;

const K4: u64 = 4 << 10;
const M2: u64 = 2 << 20;
const RW: Permissions = Permissions::READ_WRITE;

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

/// A bus with three memories: two that overlap in one object, and one of another.
struct Host {
    bus: Arc<Bus>,
    memories: [Arc<Memory>; 3],
}

impl Host {
    /// What a process has registered before shifts where everything stands on the bus.
    fn new(others: u64) -> Host {
        let bus = Bus::new();
        let account = Account::new("test", None);
        for _ in 0..others {
            let other = Backing::anonymous(&bus, 3 * M2).unwrap();
            std::mem::forget(Memory::register(&other, 0, 3 * M2, &account).unwrap());
        }
        let (one, two) =
            (Backing::anonymous(&bus, 16 * M2).unwrap(), Backing::anonymous(&bus, 4 * M2).unwrap());
        let register = |backing, offset, length| Memory::register(backing, offset, length, &account).unwrap();
        let memories =
            [register(&one, 0, 8 * M2), register(&one, 6 * M2, 10 * M2), register(&two, 0, 4 * M2)];
        Host { bus, memories }
    }

    fn named(&self) -> impl Iterator<Item = (u64, &Arc<Memory>)> {
        [10, 20, 30].into_iter().zip(&self.memories)
    }

    fn memory(&self, name: u64) -> Option<Arc<Memory>> {
        self.named().find(|(known, _)| *known == name).map(|(_, memory)| memory.clone())
    }

    /// The leaves, by what can be known of them in another process: the memory as object and offset in it.
    fn leaves(&self, space: &Space) -> Vec<(u64, PageSize, usize, u64, Permissions)> {
        let objects = [self.memories[0].backing(), self.memories[2].backing()];
        let leaves = space.leaves(IovaRange::ALL).into_iter().map(|leaf| {
            let (object, offset) = space.object_at(leaf.oa).unwrap();
            let object = objects.iter().position(|known| Arc::ptr_eq(known, &object)).unwrap();
            let read = leaf.attributes.contains(ioasid::Attributes::READ);
            let write = leaf.attributes.contains(ioasid::Attributes::WRITE);
            let permissions = match (read, write) {
                (true, true) => RW,
                (true, false) => Permissions::READ,
                (false, _) => Permissions::WRITE,
            };
            (leaf.iova, leaf.size, object, offset, permissions)
        });
        leaves.collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Map { first: u64, memory: usize, offset: u64, pages: u64, permissions: u8 },
    Unmap { first: u64, pages: u64 },
    Protect { first: u64, pages: u64, permissions: u8 },
    Reserve { first: u64, pages: u64, owner: u64 },
    Allow(Vec<(u64, u64)>),
    Merge,
}

/// Around these addresses, so that large leaves are possible and ends of everything are met.
const BASES: [u64; 3] = [0, (1 << 30) - 4 * M2, 0u64.wrapping_sub(8 * M2)];
/// Pages of one of them.
const PAGES: u64 = 8 * M2 / K4;

fn step() -> impl Strategy<Value = Step> {
    let page = || (0..3_usize, prop_oneof![1 => 0..PAGES, 1 => (0..8_u64).prop_map(|block| block * 512)]);
    let first = move || page().prop_map(|(base, page)| BASES[base] + page * K4);
    let pages = || prop_oneof![2 => 1..6_u64, 1 => Just(512), 1 => 500..1600_u64];
    let offset = || prop_oneof![0..2048_u64, (0..4_u64).prop_map(|block| block * 512)];
    prop_oneof![
        8 => (first(), 0..3_usize, offset(), pages(), 1..4_u8).prop_map(
            |(first, memory, offset, pages, permissions)| Step::Map { first, memory, offset, pages, permissions }
        ),
        4 => (first(), pages()).prop_map(|(first, pages)| Step::Unmap { first, pages }),
        2 => (first(), pages(), 1..4_u8)
            .prop_map(|(first, pages, permissions)| Step::Protect { first, pages, permissions }),
        1 => (first(), pages(), 0..3_u64).prop_map(|(first, pages, owner)| Step::Reserve { first, pages, owner }),
        1 => vec((first(), pages()), 0..4).prop_map(Step::Allow),
        1 => Just(Step::Merge),
    ]
}

fn permissions(bits: u8) -> Permissions {
    [RW, Permissions::READ, Permissions::WRITE, RW][usize::from(bits)]
}

/// Some of the steps are refused; that is not what is tested here.
fn run(host: &Host, space: &Arc<Space>, steps: &[Step]) {
    let part = |first: u64, pages: u64| {
        IovaRange::with_length(first, pages * K4).or_else(|| IovaRange::new(first, u64::MAX)).unwrap()
    };
    for step in steps {
        match step {
            Step::Map { first, memory, offset, pages, permissions: bits } => {
                let memory = &host.memories[*memory];
                let _ = space.map(Iova::new(*first), memory, offset * K4, pages * K4, permissions(*bits));
            }
            Step::Unmap { first, pages } => drop(space.unmap(part(*first, *pages))),
            Step::Protect { first, pages, permissions: bits } => {
                let _ = space.protect(part(*first, *pages), permissions(*bits));
            }
            Step::Reserve { first, pages, owner } => {
                let _ = space.reserve(part(*first, *pages), ReservationOwner::User(*owner));
            }
            Step::Allow(ranges) => {
                let ranges: Vec<IovaRange> =
                    ranges.iter().map(|(first, pages)| part(*first, *pages)).collect();
                let _ = space.set_allowed(&ranges);
            }
            Step::Merge => drop(space.merge(IovaRange::ALL)),
        }
    }
}

fn policies() -> impl Strategy<Value = MappingPolicy> {
    let most = prop_oneof![Just(None), (3..9_u64).prop_map(Some)];
    (most, any::<bool>()).prop_map(|(most, whole_only)| MappingPolicy { most, whole_only })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_space_comes_back_as_it_was(
        steps in vec(step(), 1..40),
        policy in policies(),
        largest in prop_oneof![Just(30_u32), Just(12), Just(21), Just(55)],
        others in 0..3_u64,
    ) {
        let old = Host::new(0);
        let format = Native::new().with_largest_leaf(PageSize::from_log2(largest).unwrap());
        let space = Space::with_policy(&old.bus, format, policy);
        run(&old, &space, &steps);
        let snapshot = space.snapshot(old.named()).unwrap();
        let bytes = snapshot.to_bytes();
        let read = Snapshot::from_bytes(&bytes).unwrap();
        prop_assert_eq!(&read, &snapshot);
        prop_assert_eq!(read.to_bytes(), bytes);
        let leaves = old.leaves(&space);
        prop_assert_eq!(read.leaves(), leaves.len() as u64);

        let new = Host::new(others);
        let restored = read.restore(&new.bus, |name| new.memory(name)).unwrap();
        prop_assert_eq!(new.leaves(&restored), leaves);
        prop_assert_eq!(restored.allowed_ranges(), space.allowed_ranges());
        prop_assert_eq!(restored.reserved_ranges(), space.reserved_ranges());
        prop_assert_eq!(restored.policy(), policy);
        if policy.most.is_some() || policy.whole_only {
            prop_assert_eq!(restored.mapping_count(), space.mapping_count());
        }
        // Once more, it is the same.
        prop_assert_eq!(restored.snapshot(new.named()).unwrap(), snapshot);
        for owner in 0..3 {
            restored.unreserve(ReservationOwner::User(owner));
            space.unreserve(ReservationOwner::User(owner));
        }
        prop_assert!(restored.reserved_ranges().is_empty());
        // From now on both do the same.
        run(&old, &space, &steps[..steps.len() / 2]);
        run(&new, &restored, &steps[..steps.len() / 2]);
        prop_assert_eq!(new.leaves(&restored), old.leaves(&space));
    }

    /// Whatever is done to the bytes, they are refused with a reason, or they are a snapshot that says what they say.
    #[test]
    fn damaged_bytes_are_refused(
        steps in vec(step(), 0..20),
        damages in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        mend in any::<bool>(),
    ) {
        let host = Host::new(0);
        let space = Space::new(&host.bus);
        run(&host, &space, &steps);
        let bytes = space.snapshot(host.named()).unwrap().to_bytes();
        let result = Snapshot::from_bytes(&bytes[..cut.index(bytes.len())]);
        prop_assert!(result.is_err());

        let mut damaged = bytes.clone();
        for (at, value) in damages {
            let at = at.index(damaged.len());
            damaged[at] = value;
        }
        if mend {
            damaged = mended(damaged);
        } else if damaged != bytes {
            let error = Snapshot::from_bytes(&damaged).unwrap_err();
            let expected =
                matches!(error, BadSnapshot::Magic | BadSnapshot::Version { .. } | BadSnapshot::Checksum);
            prop_assert!(expected, "{error}");
        }
        if let Ok(snapshot) = Snapshot::from_bytes(&damaged) {
            prop_assert_eq!(&snapshot.to_bytes(), &damaged);
            if let Ok(restored) = snapshot.restore(&host.bus, |name| host.memory(name)) {
                // Leaves of a size that there is none of come back as smaller ones.
                let again = restored.snapshot(host.named()).unwrap();
                prop_assert!(again.leaves() >= snapshot.leaves());
                prop_assert_eq!(restored.allowed_ranges(), allowed(&damaged));
            }
        }
    }

    #[test]
    fn garbage_is_refused(bytes in vec(any::<u8>(), 0..200)) {
        prop_assert!(Snapshot::from_bytes(&bytes).is_err());
    }
}

/// The allowed ranges, read from the bytes as the format has them.
fn allowed(bytes: &[u8]) -> Vec<IovaRange> {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let begin = 48 + 24 * number(24) as usize;
    let range = |index: u64| begin + 16 * index as usize;
    (0..number(32))
        .map(|index| IovaRange::new(number(range(index)), number(range(index) + 8)).unwrap())
        .collect()
}

/// Writes the checksum anew.
fn mended(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 4;
    let checksum = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A space with a reserved range, an allowed one and two runs: at 2 MiB one of two leaves, and at 8 MiB one of one.
fn small() -> (Host, Vec<u8>) {
    let host = Host::new(0);
    let space = Space::new(&host.bus);
    space.map(Iova::new(M2), &host.memories[0], 0, 2 * M2, RW).unwrap();
    space.map(Iova::new(4 * M2), &host.memories[2], M2, K4, Permissions::READ).unwrap();
    space.reserve(range(16 * M2, M2), ReservationOwner::User(7)).unwrap();
    space.set_allowed(&[range(0, 16 * M2)]).unwrap();
    let bytes = space.snapshot(host.named()).unwrap().to_bytes();
    (host, bytes)
}

#[test]
fn every_single_flipped_bit_is_noticed() {
    let (_, bytes) = small();
    assert_eq!(bytes.len(), 52 + 24 + 16 + 2 * 40);
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Snapshot::from_bytes(&flipped).is_err(), "bit {bit}");
    }
    for length in 0..bytes.len() {
        let expected = (8..52).contains(&length).then_some(BadSnapshot::Length);
        let error = Snapshot::from_bytes(&bytes[..length]).unwrap_err();
        assert!(expected.is_none_or(|expected| expected == error), "{length} bytes: {error}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert_eq!(Snapshot::from_bytes(&longer), Err(BadSnapshot::Checksum));
    assert_eq!(Snapshot::from_bytes(&mended([&bytes[..], &[0; 8]].concat())), Err(BadSnapshot::Length));
}

/// With a right checksum, as if a program with a mistake, or without good will, had written it.
#[test]
fn what_cannot_be_a_space_is_refused_with_its_place() {
    let (host, bytes) = small();
    let with = |at: usize, value: u64| {
        let mut changed = bytes.clone();
        changed[at..at + 8].copy_from_slice(&value.to_le_bytes());
        Snapshot::from_bytes(&mended(changed))
    };
    let (reserved, allowed, first, second) = (48, 48 + 24, 48 + 24 + 16, 48 + 24 + 16 + 40);
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let content = |at: u64| Err(BadSnapshot::Content { at });
    assert!(with(first, number(first)).is_ok());
    // The header.
    assert_eq!(with(0, 0x1234), Err(BadSnapshot::Magic));
    let shown = |version: u64| with(8, number(8) & !0xffff_ffff | version);
    assert_eq!(shown(2), Err(BadSnapshot::Version { version: 2 }));
    assert_eq!(shown(0), Err(BadSnapshot::Version { version: 0 }));
    let granule = |log2: u64| with(8, number(8) & !(0xff << 32) | log2 << 32);
    assert_eq!(granule(10), Err(BadSnapshot::Header { field: "granule" }));
    assert_eq!(granule(200), Err(BadSnapshot::Header { field: "granule" }));
    assert_eq!(granule(16), content(4 * M2), "a leaf of 4 KiB");
    let largest = |log2: u64| with(8, number(8) & !(0xff << 40) | log2 << 40);
    assert_eq!(largest(64), Err(BadSnapshot::Header { field: "largest leaf" }));
    assert_eq!(largest(20), content(M2), "a leaf of 2 MiB");
    assert_eq!(with(8, number(8) | 4 << 48), Err(BadSnapshot::Header { field: "flags" }));
    assert_eq!(with(16, 1), Err(BadSnapshot::Header { field: "flags" }));
    // Counts that nobody has bytes for.
    for at in [24, 32, 40] {
        for count in [0, 1000, 1 << 32, 1 << 60, u64::MAX] {
            if count != number(at) {
                assert_eq!(with(at, count), Err(BadSnapshot::Length), "{count}");
            }
        }
    }
    // Ranges.
    assert_eq!(with(reserved + 8, 0), content(16 * M2), "ends before it begins");
    assert_eq!(with(reserved, M2), content(0), "reserved and allowed");
    assert_eq!(with(allowed, 16 * M2), content(16 * M2), "ends before it begins");
    assert_eq!(with(allowed + 8, 16 * M2), content(0), "reserved and allowed");
    assert_eq!(with(first, 4 * M2), content(4 * M2), "two runs overlap");
    assert_eq!(with(first, 8 * M2), content(4 * M2), "not sorted");
    assert_eq!(with(second, 16 * M2), content(16 * M2), "reserved");
    assert_eq!(with(first, M2 + K4), content(M2 + K4), "not aligned");
    assert_eq!(with(first, 0u64.wrapping_sub(M2)), content(0u64.wrapping_sub(M2)), "beyond the last address");
    assert_eq!(with(first + 8, 0), content(M2), "no leaves");
    assert_eq!(with(first + 8, 1 << 50), content(M2), "more than there are addresses");
    assert_eq!(with(first + 24, 0u64.wrapping_sub(M2)), content(M2), "beyond all memories");
    let last = |byte: u32, value: u64| {
        with(second + 32, number(second + 32) & !(0xff << (8 * byte)) | value << (8 * byte))
    };
    assert_eq!(last(0, 64), content(4 * M2), "no size");
    assert_eq!(last(1, 0), content(4 * M2), "no permissions");
    assert_eq!(last(1, 4), content(4 * M2), "unknown permissions");
    assert_eq!(last(2, 3), content(4 * M2), "unknown beginnings");
    assert_eq!(last(2, 2), content(4 * M2), "each of one");
    assert_eq!(last(2, 0), content(4 * M2), "goes on, but behind a hole");
    assert_eq!(last(7, 1), content(4 * M2), "a byte that means nothing");
    assert_eq!(with(second + 8, 1 << 27), content(4 * M2), "reaches into what is reserved");
    let high = 1u64 << 50;
    let mut many = bytes.clone();
    many[second..second + 8].copy_from_slice(&high.to_le_bytes());
    many[second + 8..second + 16].copy_from_slice(&((1u64 << 28) - 1).to_le_bytes());
    assert_eq!(Snapshot::from_bytes(&mended(many.clone())), Err(BadSnapshot::TooManyLeaves));
    // With one less it is a snapshot; but no memory is that long, and nothing is left of the try.
    many[second + 8..second + 16].copy_from_slice(&((1u64 << 28) - 2).to_le_bytes());
    let snapshot = Snapshot::from_bytes(&mended(many)).unwrap();
    assert_eq!(snapshot.leaves(), 1 << 28);
    let refused = snapshot.restore(&host.bus, |name| host.memory(name));
    assert!(matches!(
        refused,
        Err(RestoreError::Map { name: 30, source: MapError::BeyondMemory { .. }, .. })
    ));
}

#[test]
fn what_is_missing_is_named() {
    let (host, bytes) = small();
    let space = Space::new(&host.bus);
    space.map(Iova::new(M2), &host.memories[0], 0, M2, RW).unwrap();
    space.map(Iova::new(8 * M2), &host.memories[2], 0, K4, RW).unwrap();
    let without = space.snapshot(host.named().take(2));
    assert_eq!(without, Err(SnapshotError::UnknownMemory { range: range(8 * M2, K4) }));
    let twice = [(1, &host.memories[0]), (1, &host.memories[2])];
    assert_eq!(space.snapshot(twice), Err(SnapshotError::NamedTwice { name: 1 }));

    let snapshot = Snapshot::from_bytes(&bytes).unwrap();
    assert_eq!(snapshot.memories().into_iter().collect::<Vec<_>>(), [(10, 2 * M2), (30, M2 + K4)]);
    let refused = snapshot.restore(&host.bus, |name| host.memory(name).filter(|_| name != 30));
    assert!(matches!(refused, Err(RestoreError::NoMemory { name: 30 })));
    // Another memory than the snapshot speaks of: too short, or of another bus.
    let short = Memory::register(host.memories[2].backing(), 0, M2, &Account::new("short", None)).unwrap();
    let refused =
        snapshot.restore(&host.bus, |name| if name == 30 { Some(short.clone()) } else { host.memory(name) });
    assert!(matches!(
        refused,
        Err(RestoreError::Map { name: 30, source: MapError::BeyondMemory { .. }, range: at }) if at == range(4 * M2, K4)
    ));
    let refused = snapshot.restore(&Bus::new(), |name| host.memory(name));
    assert!(matches!(refused, Err(RestoreError::Map { name: 10, source: MapError::OtherBus, .. })));
}

#[test]
fn a_leaf_of_several_memories_comes_back_in_pieces() {
    let bus = Bus::new();
    let backing = Backing::anonymous(&bus, M2).unwrap();
    let account = Account::new("test", None);
    let halves = [0, M2 / 2].map(|at| Memory::register(&backing, at, M2 / 2, &account).unwrap());
    let space = Space::new(&bus);
    for (half, at) in halves.iter().zip([0, M2 / 2]) {
        space.map(Iova::new(at), half, 0, M2 / 2, RW).unwrap();
    }
    space.merge(IovaRange::ALL);
    assert_eq!(space.statistics().leaves, [(PageSize::SIZE_2M, 1)]);
    let snapshot = space.snapshot([(0, &halves[0]), (1, &halves[1])]).unwrap();
    assert_eq!(snapshot.memories().into_iter().collect::<Vec<_>>(), [(0, M2 / 2), (1, M2 / 2)]);
    let restored = snapshot.restore(&bus, |name| halves.get(name as usize).cloned()).unwrap();
    for at in (0..M2).step_by(K4 as usize) {
        let output = |space: &Space| space.walk(Iova::new(at)).map(|leaf| leaf.output(at));
        assert_eq!(output(&restored), output(&space));
    }
    // Two memories of the same pages: either name will do.
    let whole = Memory::register(&backing, 0, M2, &account).unwrap();
    let snapshot = space.snapshot([(0, &halves[0]), (5, &whole)]).unwrap();
    assert_eq!(snapshot.memories().into_iter().collect::<Vec<_>>(), [(5, M2)]);
}

#[test]
fn memory_that_moved_in_its_object_comes_back_in_smaller_leaves() {
    let (host, bytes) = small();
    let account = Account::new("test", None);
    let moved = Memory::register(host.memories[0].backing(), K4, 8 * M2, &account).unwrap();
    let snapshot = Snapshot::from_bytes(&bytes).unwrap();
    let name = |name| if name == 10 { Some(moved.clone()) } else { host.memory(name) };
    let restored = snapshot.restore(&host.bus, name).unwrap();
    assert_eq!(restored.statistics().leaves, [(PageSize::SIZE_4K, 1025)]);
    assert_eq!(
        restored.snapshot([(10, &moved), (30, &host.memories[2])]).unwrap().memories(),
        snapshot.memories()
    );
}

#[test]
fn more_mappings_than_allowed_are_brought_back_and_no_more_are_allowed() {
    let host = Host::new(0);
    let policy = MappingPolicy { most: Some(2), whole_only: false };
    let space = Space::with_policy(&host.bus, Native::new(), policy);
    space.map(Iova::new(0), &host.memories[0], 0, 8 * K4, RW).unwrap();
    for page in [1, 3, 5] {
        space.unmap(range(page * K4, K4)).unwrap();
    }
    assert_eq!(space.mapping_count(), 4);
    let bytes = space.snapshot(host.named()).unwrap().to_bytes();
    let restored =
        Snapshot::from_bytes(&bytes).unwrap().restore(&host.bus, |name| host.memory(name)).unwrap();
    assert_eq!(restored.mapping_count(), 4);
    let another = || restored.map(Iova::new(M2), &host.memories[0], 0, K4, RW);
    assert!(matches!(another(), Err(MapError::TooManyMappings { most: 2 })));
    restored.unmap(range(0, 5 * K4)).unwrap();
    another().unwrap();
    assert_eq!(restored.mapping_count(), 2);
}
