//! Sequences of calls against a model: a map of pages, a list of registrations, lists of ranges.
//!
//! Two spaces, three objects, two accounts, derived tables that fail now and then. After every step all that can
//! be seen is compared: the translation of every page in every table and the bytes behind it, charges, holds,
//! ranges, tables.

mod double;

use double::{Call, DERIVED, DERIVED_TOO, Double, NATIVE, SMALL, also_reserved, interrupts};
use ioasid::{
    Account, AttachError, Attributes, Backing, Bus, CachedWalk, Device, Iova, IovaRange, LateBound, MapError,
    Memory, MemoryGone, Permissions, RegisterError, ReservationOwner, ReserveError, Rid, Space, Table,
    Translated, UnmapError, epoch,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: u64 = 4096;
/// The number of the page behind the last.
const END: u64 = 1 << 52;
/// Pages from 0 on that are looked at one by one. Everything is mapped here or in the last few.
const LOW: u64 = 200;
const LAST: u64 = 8;

const SPACES: usize = 2;
const MEMORIES: usize = 5;
const DEVICES: [Rid; 4] = [NATIVE, DERIVED, DERIVED_TOO, SMALL];
/// Which of them share a table.
const CLASSES: [usize; 4] = [0, 1, 1, 2];
const LIMITS: [Option<u64>; 2] = [None, Some(24)];
/// The page from which on each object's pages are used; the last object's are in two windows.
const BEGINNINGS: [u64; 3] = [0, 0, (1 << 18) - 8];
const OBJECT_PAGES: u64 = 20;

/// Some pages, from the first on; maybe none, maybe more than there are.
#[derive(Clone, Copy, Debug)]
struct Pages {
    first: u64,
    count: u64,
}

impl Pages {
    fn range(self) -> Option<IovaRange> {
        IovaRange::with_length(self.first * PAGE, self.count * PAGE)
    }

    fn numbers(self) -> std::ops::Range<u64> {
        self.first..self.first + self.count
    }
}

#[derive(Clone, Debug)]
enum Step {
    Register { slot: usize, object: usize, pages: Pages, account: usize },
    Drop { slot: usize },
    Map { space: usize, at: u64, slot: usize, part: Pages, permissions: u8, fail: i64 },
    MapAnywhere { space: usize, slot: usize, part: Pages, permissions: u8, fail: i64 },
    Unmap { space: usize, pages: Pages, fail: i64 },
    UnmapAll { space: usize },
    Reserve { space: usize, pages: Pages, owner: u64 },
    Unreserve { space: usize, owner: u64 },
    Allow { space: usize, ranges: Vec<Pages> },
    Attach { device: usize, space: usize, fail: i64, call: usize },
    Detach { device: usize },
}

fn place() -> impl Strategy<Value = u64> {
    prop_oneof![9 => 0..120u64, 1 => END - LAST..END]
}

fn pages() -> impl Strategy<Value = Pages> {
    (place(), 0..24u64).prop_map(|(first, count)| Pages { first, count: count.min(END + 1 - first) })
}

fn part() -> impl Strategy<Value = Pages> {
    prop_oneof![
        3 => Just(Pages { first: 0, count: 4 }),
        7 => (0..6u64, 0..10u64).prop_map(|(first, count)| Pages { first, count }),
    ]
}

/// Mostly no failure.
fn fail() -> impl Strategy<Value = i64> {
    prop_oneof![4 => Just(0), 1 => 1..4i64]
}

fn step() -> impl Strategy<Value = Step> {
    // Most of it happens in one, so that it comes to meetings.
    let space = prop_oneof![3 => Just(0), 1 => 1..SPACES];
    let slot = 0..MEMORIES;
    let object_pages = (0..OBJECT_PAGES, 0..12u64).prop_map(|(first, count)| Pages { first, count });
    prop_oneof![
        4 => (slot.clone(), 0..BEGINNINGS.len(), object_pages, 0..LIMITS.len())
            .prop_map(|(slot, object, pages, account)| Step::Register { slot, object, pages, account }),
        1 => slot.clone().prop_map(|slot| Step::Drop { slot }),
        6 => (space.clone(), place(), slot.clone(), part(), 1..4u8, fail())
            .prop_map(|(space, at, slot, part, permissions, fail)| Step::Map { space, at, slot, part, permissions, fail }),
        3 => (space.clone(), slot, part(), 1..4u8, fail())
            .prop_map(|(space, slot, part, permissions, fail)| Step::MapAnywhere { space, slot, part, permissions, fail }),
        3 => (space.clone(), pages(), fail()).prop_map(|(space, pages, fail)| Step::Unmap { space, pages, fail }),
        1 => space.clone().prop_map(|space| Step::UnmapAll { space }),
        1 => (space.clone(), pages(), 0..2u64).prop_map(|(space, pages, owner)| Step::Reserve { space, pages, owner }),
        1 => (space.clone(), 0..2u64).prop_map(|(space, owner)| Step::Unreserve { space, owner }),
        1 => (space.clone(), prop::collection::vec(pages(), 0..3)).prop_map(|(space, ranges)| Step::Allow { space, ranges }),
        3 => (0..DEVICES.len(), space, fail(), 0..Call::ALL.len())
            .prop_map(|(device, space, fail, call)| Step::Attach { device, space, fail, call }),
        1 => (0..DEVICES.len()).prop_map(|device| Step::Detach { device }),
    ]
}

fn permissions(bits: u8) -> Permissions {
    [Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE][usize::from(bits) - 1]
}

/// Memory in which every page begins with its object's and its own number.
#[derive(Debug)]
struct Numbered;

impl LateBound for Numbered {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        buffer.copy_from_slice(&tag(2, offset / PAGE)[..buffer.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        Err(MemoryGone { offset })
    }
}

fn tag(object: usize, page: u64) -> [u8; 8] {
    ((object as u64) << 32 | page).to_le_bytes()
}

/// What a page is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    object: usize,
    page: u64,
    attributes: Attributes,
}

#[derive(Clone, Copy, Debug)]
struct Registration {
    object: usize,
    /// Of the object.
    pages: Pages,
    account: usize,
}

#[derive(Debug, Default)]
struct SpaceModel {
    mapped: BTreeMap<u64, Target>,
    reserved: Vec<(IovaRange, ReservationOwner)>,
    allowed: Vec<IovaRange>,
}

impl SpaceModel {
    fn reserved_in(&self, range: IovaRange) -> bool {
        self.reserved.iter().any(|(reserved, _)| reserved.overlaps(&range))
    }

    fn mapped_in(&self, range: IovaRange) -> impl Iterator<Item = u64> + '_ {
        self.mapped.range(range.first() / PAGE..=range.last() / PAGE).map(|(page, _)| *page)
    }

    /// Where `count` pages have to be placed.
    fn hole(&self, count: u64) -> Option<u64> {
        let everywhere = [IovaRange::ALL];
        let windows = if self.allowed.is_empty() { &everywhere[..] } else { &self.allowed };
        let free = |page: u64| {
            let range = Pages { first: page, count }.range();
            range.is_some_and(|range| !self.reserved_in(range) && self.mapped_in(range).next().is_none())
        };
        [count.next_power_of_two(), 1].into_iter().find_map(|alignment| {
            windows.iter().find_map(|window| {
                let last = window.last() / PAGE;
                // What is beyond the low pages is only a place if a window begins there.
                let first = (window.first() / PAGE).max(1);
                (first..=last.min(first + LOW))
                    .filter(|page| page % alignment == 0 && page + count - 1 <= last)
                    .find(|page| free(*page))
            })
        })
    }
}

/// The model and the real thing.
struct World {
    backings: Vec<Arc<Backing>>,
    accounts: Vec<Account>,
    spaces: Vec<Arc<Space>>,
    double: Arc<Double>,
    devices: Vec<Device>,
    memories: Vec<Option<Arc<Memory>>>,

    registrations: Vec<Option<Registration>>,
    models: Vec<SpaceModel>,
    attached: Vec<Option<usize>>,
}

impl World {
    fn new() -> World {
        let bus = Bus::new();
        let mut backings: Vec<Arc<Backing>> =
            (0..2).map(|_| Backing::anonymous(&bus, OBJECT_PAGES * PAGE).unwrap()).collect();
        for (object, backing) in backings.iter().enumerate() {
            for page in 0..OBJECT_PAGES {
                backing.write(page * PAGE, &tag(object, page)).unwrap();
            }
        }
        backings.push(Backing::late_bound(&bus, Arc::new(Numbered)));
        let double = Double::new();
        World {
            backings,
            accounts: LIMITS.iter().map(|limit| Account::new("test", *limit)).collect(),
            spaces: (0..SPACES).map(|_| Space::new(&bus)).collect(),
            devices: DEVICES.iter().map(|rid| double.device(*rid)).collect(),
            double,
            memories: vec![None; MEMORIES],
            registrations: vec![None; MEMORIES],
            models: (0..SPACES).map(|_| SpaceModel::default()).collect(),
            attached: vec![None; DEVICES.len()],
        }
    }

    fn holds(&self, object: usize, page: u64) -> usize {
        let all = self.registrations.iter().flatten();
        all.filter(|held| held.object == object && held.pages.numbers().contains(&page)).count()
    }

    fn charged(&self, account: usize) -> u64 {
        let mut pages: Vec<(usize, u64)> = Vec::new();
        for held in self.registrations.iter().flatten().filter(|held| held.account == account) {
            pages.extend(held.pages.numbers().map(|page| (held.object, page)));
        }
        pages.sort_unstable();
        pages.dedup();
        pages.len() as u64
    }

    fn drop_memory(&mut self, slot: usize) {
        self.memories[slot] = None;
        let Some(gone) = self.registrations[slot].take() else { return };
        let free: Vec<u64> =
            gone.pages.numbers().filter(|page| self.holds(gone.object, *page) == 0).collect();
        for model in &mut self.models {
            model.mapped.retain(|_, target| target.object != gone.object || !free.contains(&target.page));
        }
    }

    fn register(&mut self, slot: usize, object: usize, pages: Pages, account: usize) {
        self.drop_memory(slot);
        let bounded = self.backings[object].length().is_some();
        let pages = Pages { first: BEGINNINGS[object] + pages.first, count: pages.count };
        let result = Memory::register(
            &self.backings[object],
            pages.first * PAGE,
            pages.count * PAGE,
            &self.accounts[account],
        );
        if pages.count == 0 {
            return assert!(matches!(result, Err(RegisterError::Empty)));
        }
        if bounded && pages.first + pages.count > OBJECT_PAGES {
            return assert!(matches!(result, Err(RegisterError::OutOfBounds { .. })));
        }
        let before = self.charged(account);
        self.registrations[slot] = Some(Registration { object, pages, account });
        let after = self.charged(account);
        if after > before && LIMITS[account].is_some_and(|limit| after > limit) {
            self.registrations[slot] = None;
            let Err(RegisterError::OverLimit(error)) = result else { panic!("over the limit: {result:?}") };
            return assert_eq!((error.pages, error.charged), (after - before, before));
        }
        self.memories[slot] = Some(result.unwrap());
    }

    /// The targets of a part of registered memory, if all of it is registered.
    fn targets(&self, slot: usize, part: Pages, permissions: Permissions) -> Option<Vec<Target>> {
        let held = self.registrations[slot]?;
        let mut attributes = Attributes::empty();
        attributes.set(Attributes::READ, permissions.contains(Permissions::READ));
        attributes.set(Attributes::WRITE, permissions.contains(Permissions::WRITE));
        let target = |page| Target { object: held.object, page: held.pages.first + page, attributes };
        (part.first + part.count <= held.pages.count).then(|| part.numbers().map(target).collect())
    }

    fn map(&mut self, space: usize, at: u64, slot: usize, part: Pages, bits: u8, fail: i64) {
        let Some(memory) = &self.memories[slot] else { return };
        let permissions = permissions(bits);
        self.double.switches.fail(Call::Map, fail);
        let (offset, length) = (part.first * PAGE, part.count * PAGE);
        let result = self.spaces[space].map(Iova::new(at * PAGE), memory, offset, length, permissions);
        let failed = self.double.switches.has_failed(Call::Map) && fail > 0;
        let Some(range) = Pages { first: at, count: part.count }.range() else {
            return assert!(matches!(result, Err(MapError::NoRange { .. })), "{result:?}");
        };
        let Some(targets) = self.targets(slot, part, permissions) else {
            return assert!(matches!(result, Err(MapError::BeyondMemory { .. })), "{result:?}");
        };
        let model = &mut self.models[space];
        if model.reserved_in(range) {
            return assert!(matches!(result, Err(MapError::Reserved { range: reserved })
                if reserved.overlaps(&range) && model.reserved.iter().any(|(known, _)| *known == reserved)));
        }
        if let Some(page) = model.mapped_in(range).next() {
            return assert!(
                matches!(result, Err(MapError::AlreadyMapped { at }) if at == page * PAGE),
                "{result:?}"
            );
        }
        if failed {
            return assert!(matches!(result, Err(MapError::Table(_))), "{result:?}");
        }
        result.unwrap();
        model.mapped.extend((at..).zip(targets));
    }

    fn map_anywhere(&mut self, space: usize, slot: usize, part: Pages, bits: u8, fail: i64) {
        let Some(memory) = &self.memories[slot] else { return };
        let permissions = permissions(bits);
        self.double.switches.fail(Call::Map, fail);
        let result =
            self.spaces[space].map_anywhere(memory, part.first * PAGE, part.count * PAGE, permissions);
        let failed = self.double.switches.has_failed(Call::Map) && fail > 0;
        if part.count == 0 {
            return assert!(matches!(result, Err(MapError::NoRange { .. })), "{result:?}");
        }
        let Some(targets) = self.targets(slot, part, permissions) else {
            return assert!(matches!(result, Err(MapError::BeyondMemory { .. })), "{result:?}");
        };
        let model = &mut self.models[space];
        let Some(place) = model.hole(part.count) else {
            return assert!(matches!(result, Err(MapError::NoHole { .. })), "{result:?}");
        };
        if failed {
            return assert!(matches!(result, Err(MapError::Table(_))), "{result:?}");
        }
        assert_eq!(result.unwrap().get(), place * PAGE);
        model.mapped.extend((place..).zip(targets));
    }

    fn unmap(&mut self, space: usize, pages: Pages, fail: i64) {
        let Some(range) = pages.range() else { return };
        self.double.switches.fail(Call::Cut, fail);
        let result = self.spaces[space].unmap(range);
        if self.double.switches.has_failed(Call::Cut) && fail > 0 {
            return assert!(matches!(result, Err(UnmapError::Table(_))), "{result:?}");
        }
        let unmapped = result.unwrap();
        let model = &mut self.models[space];
        let gone: Vec<u64> = model.mapped_in(range).collect();
        let mut runs: Vec<IovaRange> = Vec::new();
        for page in &gone {
            model.mapped.remove(page);
            let first = page * PAGE;
            let joined = runs.last().filter(|run| run.last().checked_add(1) == Some(first)).copied();
            match joined {
                Some(run) => {
                    runs.pop();
                    runs.extend(IovaRange::new(run.first(), first + (PAGE - 1)));
                }
                None => runs.extend(IovaRange::with_length(first, PAGE)),
            }
        }
        assert_eq!(unmapped.bytes(), gone.len() as u64 * PAGE);
        assert_eq!(unmapped.runs().collect::<Vec<_>>(), runs);
    }

    fn reserve(&mut self, space: usize, pages: Pages, owner: u64) {
        let Some(range) = pages.range() else { return };
        let owner = ReservationOwner::User(owner);
        let result = self.spaces[space].reserve(range, owner);
        let expected = self.may_reserve(space, range);
        assert_eq!(result, expected);
        if expected.is_ok() {
            self.models[space].reserved.push((range, owner));
        }
    }

    fn may_reserve(&self, space: usize, range: IovaRange) -> Result<(), ReserveError> {
        let model = &self.models[space];
        if model.allowed.iter().any(|allowed| allowed.overlaps(&range)) {
            return Err(ReserveError::Allowed { range });
        }
        match model.mapped_in(range).next() {
            Some(_) => Err(ReserveError::Mapped { range }),
            None => Ok(()),
        }
    }

    fn allow(&mut self, space: usize, ranges: &[Pages]) {
        let mut sorted: Vec<IovaRange> = ranges.iter().filter_map(|pages| pages.range()).collect();
        let result = self.spaces[space].set_allowed(&sorted);
        sorted.sort_unstable();
        let model = &mut self.models[space];
        if sorted.windows(2).any(|pair| pair[0].overlaps(&pair[1])) {
            return assert!(matches!(result, Err(ReserveError::Overlapping { .. })));
        }
        if let Some(range) = sorted.iter().find(|range| model.reserved_in(**range)) {
            return assert_eq!(result, Err(ReserveError::Reserved { range: *range }));
        }
        result.unwrap();
        model.allowed = sorted;
    }

    /// What a device of the class makes reserved in the space it is attached to.
    fn of_device(device: usize) -> Vec<IovaRange> {
        match CLASSES[device] {
            0 => Vec::new(),
            1 => vec![interrupts()],
            _ => vec![interrupts(), also_reserved()],
        }
    }

    fn has_table(&self, class: usize, space: usize) -> bool {
        (0..DEVICES.len()).any(|other| CLASSES[other] == class && self.attached[other] == Some(space))
    }

    fn attach(&mut self, device: usize, space: usize, fail: i64, call: usize) {
        let class = CLASSES[device];
        let outside = IovaRange::new(1 << 48, u64::MAX).unwrap();
        let mut needed: Vec<IovaRange> = Vec::new();
        if class != 0 && !self.has_table(class, space) {
            needed.push(outside);
        }
        if self.attached[device] != Some(space) {
            needed.extend(World::of_device(device));
        }
        let in_the_way = needed.iter().find_map(|range| self.may_reserve(space, *range).err());

        let call = Call::ALL[call];
        self.double.switches.fail(call, fail);
        let result = Table::for_device(&self.spaces[space], &self.devices[device])
            .and_then(|table| self.devices[device].attach(&table));
        if self.double.switches.has_failed(call) && fail > 0 {
            return assert!(matches!(result, Err(AttachError::Table(_))), "{result:?}");
        }
        match in_the_way {
            Some(ReserveError::Allowed { .. }) => {
                return assert!(matches!(result, Err(AttachError::Allowed { .. })), "{result:?}");
            }
            Some(_) => return assert!(matches!(result, Err(AttachError::Mapped { .. })), "{result:?}"),
            None => {}
        }
        result.unwrap();
        self.attached[device] = Some(space);
        self.reservations_of_tables();
    }

    /// What tables and devices reserve follows from what is attached.
    fn reservations_of_tables(&mut self) {
        let outside = IovaRange::new(1 << 48, u64::MAX).unwrap();
        for space in 0..SPACES {
            let mut reserved = Vec::new();
            for class in 1..3 {
                if self.has_table(class, space) {
                    reserved.push((outside, ReservationOwner::Table(class as u64)));
                }
            }
            for device in 0..DEVICES.len() {
                if self.attached[device] == Some(space) {
                    let owner = ReservationOwner::Device(device as u64);
                    reserved.extend(World::of_device(device).into_iter().map(|range| (range, owner)));
                }
            }
            let model = &mut self.models[space];
            model.reserved.retain(|(_, owner)| matches!(owner, ReservationOwner::User(_)));
            model.reserved.extend(reserved);
        }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Register { slot, object, pages, account } => {
                self.register(*slot, *object, *pages, *account);
            }
            Step::Drop { slot } => self.drop_memory(*slot),
            Step::Map { space, at, slot, part, permissions, fail } => {
                self.map(*space, *at, *slot, *part, *permissions, *fail);
            }
            Step::MapAnywhere { space, slot, part, permissions, fail } => {
                self.map_anywhere(*space, *slot, *part, *permissions, *fail);
            }
            Step::Unmap { space, pages, fail } => self.unmap(*space, *pages, *fail),
            Step::UnmapAll { space } => {
                let pages = self.models[*space].mapped.len() as u64;
                assert_eq!(self.spaces[*space].unmap(IovaRange::ALL).unwrap().bytes(), pages * PAGE);
                self.models[*space].mapped.clear();
            }
            Step::Reserve { space, pages, owner } => self.reserve(*space, *pages, *owner),
            Step::Unreserve { space, owner } => {
                let owner = ReservationOwner::User(*owner);
                self.spaces[*space].unreserve(owner);
                self.models[*space].reserved.retain(|(_, of)| *of != owner);
            }
            Step::Allow { space, ranges } => self.allow(*space, ranges),
            Step::Attach { device, space, fail, call } => self.attach(*device, *space, *fail, *call),
            Step::Detach { device } => {
                self.devices[*device].detach();
                self.attached[*device] = None;
                self.reservations_of_tables();
            }
        }
    }

    fn compare(&self) {
        for account in 0..LIMITS.len() {
            assert_eq!(self.accounts[account].charged_pages(), self.charged(account), "account {account}");
        }
        for (object, backing) in self.backings.iter().enumerate() {
            for page in BEGINNINGS[object]..BEGINNINGS[object] + OBJECT_PAGES {
                let holds = self.holds(object, page) as u64;
                assert_eq!(backing.holds(page * PAGE, PAGE), holds..=holds, "page {page} of object {object}");
            }
        }
        for space in 0..SPACES {
            self.compare_space(space);
        }
        let mut classes = Vec::new();
        for device in 0..DEVICES.len() {
            let table = self.double.table_of(DEVICES[device]);
            let there = table.as_ref().map(|table| Arc::as_ptr(table.space()));
            assert_eq!(there, self.attached[device].map(|space| Arc::as_ptr(&self.spaces[space])));
            classes.extend(self.attached[device].map(|space| (space, CLASSES[device])));
        }
        classes.sort_unstable();
        classes.dedup();
        assert_eq!(self.double.tables().len(), classes.iter().filter(|(_, class)| *class != 0).count());
        for space in 0..SPACES {
            let tables = classes.iter().filter(|(of, _)| *of == space).count();
            assert_eq!(self.spaces[space].statistics().tables, tables);
        }
    }

    fn compare_space(&self, space: usize) {
        let (model, real) = (&self.models[space], &self.spaces[space]);
        assert_eq!(real.statistics().mapped_bytes, model.mapped.len() as u64 * PAGE);
        assert_eq!(real.allowed_ranges(), model.allowed);
        let mut reserved: Vec<IovaRange> = model.reserved.iter().map(|(range, _)| *range).collect();
        let mut really = real.reserved_ranges();
        reserved.sort_unstable();
        really.sort_unstable();
        assert_eq!(really, reserved);

        let tables: Vec<Arc<Table>> = (0..DEVICES.len())
            .filter(|device| self.attached[*device] == Some(space))
            .filter_map(|device| self.double.table_of(DEVICES[device]))
            .collect();
        let section = epoch::dma();
        let mut cache = CachedWalk::new();
        for page in (0..LOW).chain(END - LAST..END) {
            let iova = page * PAGE;
            let target = model.mapped.get(&page);
            let leaf = real.walk(Iova::new(iova));
            assert_eq!(leaf.is_some(), target.is_some(), "page {page} of space {space}");
            assert_eq!(real.walk_for_dma(&section, iova + 8, &mut cache).ok(), leaf);
            let native = leaf.map(|leaf| (leaf.output(iova).get(), leaf.attributes));
            for table in &tables {
                let Some(derived) = table.derived() else { continue };
                let derived = derived.as_any().downcast_ref::<double::DoubleTable>().unwrap();
                assert_eq!(derived.walk(iova), native, "page {page} of space {space}");
            }
            if let (Some(leaf), Some(target)) = (leaf, target) {
                assert_eq!(leaf.attributes, target.attributes);
                let mut bytes = [0; 8];
                match real.memory_at(&section, leaf.output(iova)).unwrap() {
                    Translated::Here(here) => here.read(&mut bytes).unwrap(),
                    Translated::Late(late) => late.read(&mut bytes).unwrap(),
                }
                assert_eq!(bytes, tag(target.object, target.page), "page {page} of space {space}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_of_calls_does_what_the_model_does(steps in prop::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in &steps {
            world.take(step);
            world.compare();
        }
        // And nothing is left when all is gone.
        let World { spaces, double, accounts, backings, devices, memories, .. } = world;
        drop(devices);
        prop_assert!(double.tables().is_empty());
        drop(memories);
        for space in spaces {
            prop_assert!(space.leaves(IovaRange::ALL).is_empty());
        }
        prop_assert!(accounts.iter().all(|account| account.charged_pages() == 0));
        for (backing, first) in backings.iter().zip(BEGINNINGS) {
            prop_assert_eq!(backing.holds(first * PAGE, OBJECT_PAGES * PAGE), 0..=0);
        }
    }
}
