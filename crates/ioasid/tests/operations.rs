//! Operations on what is mapped, in spaces with derived tables of every format, against a model: a map of pages.
//!
//! Four spaces: one that allows everything, one whose mappings are counted, one that keeps them whole, one with leaves of
//! a page alone. Each has up to three derived tables of different formats. After each step every table is compared with
//! the model, page by page and leaf by leaf, and so is what queries and iterations say.

mod double;

use double::{
    AMD, AMD_ALL_SIZES, Call, DERIVED, Double, DoubleTable, NATIVE, OWN_NATIVE, RISC_V, WIDE, X86, mappings,
};
use ioasid::pagetable::Native;
use ioasid::{
    Account, AliasError, Backing, Bus, Device, Extent, Iova, IovaRange, MapError, Mapped, MappingPolicy,
    Memory, PageSize, Permissions, ProtectError, RemapError, Rid, Space, Table, TableError, UnmapError,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: u64 = 4096;
/// Mappings are made below this page; two leaves of 2 MiB fit.
const PAGES: u64 = 1536;
const SPACES: usize = 4;
const COUNTED: usize = 1;
const WHOLE: usize = 2;
const SMALL_LEAVES: usize = 3;
const MOST: u64 = 6;
const MEMORIES: usize = 4;
/// The last object's pages are in two windows.
const BEGINNINGS: [u64; 3] = [0, 0, (1 << 18) - 40];
const OBJECT_PAGES: [u64; 3] = [64, 1200, 100];
const DEVICES: [Rid; 8] = [NATIVE, DERIVED, WIDE, AMD, AMD_ALL_SIZES, X86, RISC_V, OWN_NATIVE];
/// Those whose tables cannot do everything while devices use them.
const RIGID: [Rid; 3] = [AMD, AMD_ALL_SIZES, RISC_V];

/// Some pages, from the first on; maybe none.
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

/// What is to be mapped: memory, a part of it, permissions.
#[derive(Clone, Copy, Debug)]
struct What {
    slot: usize,
    part: Pages,
    permissions: u8,
}

#[derive(Clone, Debug)]
enum Step {
    Register { slot: usize, object: usize, pages: Pages },
    Drop { slot: usize },
    Map { space: usize, at: u64, what: What, fail: i64 },
    Unmap { space: usize, pages: Pages, fail: i64 },
    Protect { space: usize, pages: Pages, permissions: u8, fail: i64 },
    Remap { space: usize, at: u64, what: What, fail: i64 },
    Alias { space: usize, pages: Pages, target: usize, at: u64, permissions: u8, fail: i64 },
    Merge { space: usize, pages: Pages },
    Attach { device: usize, space: usize },
    Detach { device: usize },
}

fn place() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..40u64, 2 => 500..560u64, 1 => Just(512u64), 1 => Just(1024u64)]
}

fn count() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..12u64, 2 => 12..40u64, 2 => Just(512u64)]
}

fn pages() -> impl Strategy<Value = Pages> {
    prop_oneof![
        8 => (place(), count()).prop_map(|(first, count)| Pages { first, count: count.min(PAGES - first) }),
        1 => Just(Pages { first: 0, count: PAGES }),
    ]
}

fn what() -> impl Strategy<Value = What> {
    let part = prop_oneof![
        3 => (0..20u64, count()).prop_map(|(first, count)| Pages { first, count }),
        1 => (0..2u64).prop_map(|half| Pages { first: half * 512, count: 512 }),
    ];
    (0..MEMORIES, part, 1..4u8).prop_map(|(slot, part, permissions)| What { slot, part, permissions })
}

fn fail() -> impl Strategy<Value = i64> {
    prop_oneof![4 => Just(0), 1 => 1..4i64]
}

fn step() -> impl Strategy<Value = Step> {
    let space = 0..SPACES;
    let object_pages = prop_oneof![
        2 => (0..20u64, 1..60u64).prop_map(|(first, count)| Pages { first, count }),
        3 => Just(Pages { first: 0, count: 1200 }),
    ];
    prop_oneof![
        3 => (0..MEMORIES, 0..BEGINNINGS.len(), object_pages)
            .prop_map(|(slot, object, pages)| Step::Register { slot, object, pages }),
        1 => (0..MEMORIES).prop_map(|slot| Step::Drop { slot }),
        8 => (space.clone(), place(), what(), fail())
            .prop_map(|(space, at, what, fail)| Step::Map { space, at, what, fail }),
        4 => (space.clone(), pages(), fail()).prop_map(|(space, pages, fail)| Step::Unmap { space, pages, fail }),
        5 => (space.clone(), pages(), 1..4u8, fail())
            .prop_map(|(space, pages, permissions, fail)| Step::Protect { space, pages, permissions, fail }),
        5 => (space.clone(), place(), what(), fail())
            .prop_map(|(space, at, what, fail)| Step::Remap { space, at, what, fail }),
        4 => (space.clone(), pages(), space.clone(), place(), 1..4u8, fail()).prop_map(
            |(space, pages, target, at, permissions, fail)| Step::Alias {
                space, pages, target, at, permissions, fail
            }
        ),
        3 => (space.clone(), pages()).prop_map(|(space, pages)| Step::Merge { space, pages }),
        3 => (0..DEVICES.len(), space).prop_map(|(device, space)| Step::Attach { device, space }),
        1 => (0..DEVICES.len()).prop_map(|device| Step::Detach { device }),
    ]
}

fn permissions(bits: u8) -> Permissions {
    [Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE][usize::from(bits) - 1]
}

/// What a page is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    object: usize,
    page: u64,
    permissions: Permissions,
    /// A mapping begins here.
    begins: bool,
}

type Model = BTreeMap<u64, Target>;

struct World {
    backings: Vec<Arc<Backing>>,
    account: Account,
    spaces: Vec<Arc<Space>>,
    double: Arc<Double>,
    devices: Vec<Device>,
    memories: Vec<Option<Arc<Memory>>>,
    /// The object and its pages.
    registrations: Vec<Option<(usize, Pages)>>,
    models: Vec<Model>,
    attached: Vec<Option<usize>>,
}

/// Unmaps pages in a model; what is left behind them begins a mapping.
fn remove(model: &mut Model, gone: &[u64]) {
    for page in gone {
        model.remove(page);
    }
    for page in gone {
        if let Some(next) = model.get_mut(&(page + 1)) {
            next.begins = true;
        }
    }
}

/// Whether a table that cannot do everything may have refused.
fn is_refusal(error: &TableError) -> bool {
    matches!(error, TableError::NeedsBreak { .. } | TableError::CannotCut { .. })
}

impl World {
    fn new() -> World {
        let bus = Bus::new();
        let backings: Vec<Arc<Backing>> = BEGINNINGS
            .iter()
            .zip(OBJECT_PAGES)
            .map(|(first, pages)| Backing::anonymous(&bus, (first + pages) * PAGE).unwrap())
            .collect();
        let double = Double::new();
        let policy =
            |most, whole_only| Space::with_policy(&bus, Native::new(), MappingPolicy { most, whole_only });
        World {
            backings,
            account: Account::new("test", None),
            spaces: vec![
                Space::new(&bus),
                policy(Some(MOST), false),
                policy(None, true),
                Space::with_format(&bus, Native::new().with_largest_leaf(PageSize::SIZE_4K)),
            ],
            devices: DEVICES.iter().map(|rid| double.device(*rid)).collect(),
            double,
            memories: vec![None; MEMORIES],
            registrations: vec![None; MEMORIES],
            models: vec![Model::new(); SPACES],
            attached: vec![None; DEVICES.len()],
        }
    }

    fn is_rigid(&self, space: usize) -> bool {
        let attached = DEVICES.iter().zip(&self.attached).filter(|(_, of)| **of == Some(space));
        attached.into_iter().any(|(rid, _)| RIGID.contains(rid))
    }

    fn holds(&self, object: usize, page: u64) -> bool {
        self.registrations
            .iter()
            .flatten()
            .any(|(of, pages)| *of == object && pages.numbers().contains(&page))
    }

    fn drop_memory(&mut self, slot: usize) {
        let aliased = self.memories[slot].take();
        assert!(aliased.as_ref().is_none_or(|memory| Arc::strong_count(memory) == 1));
        drop(aliased);
        let Some((object, pages)) = self.registrations[slot].take() else { return };
        let free: Vec<u64> = pages.numbers().filter(|page| !self.holds(object, *page)).collect();
        for space in 0..SPACES {
            let gone = |target: &Target| target.object == object && free.contains(&target.page);
            let mut pages: Vec<u64> =
                self.models[space].iter().filter(|(_, target)| gone(target)).map(|(page, _)| *page).collect();
            if self.is_rigid(space) {
                // Where a table cannot be cut more has to go; never less.
                let real = &self.spaces[space];
                let unmapped =
                    self.models[space].keys().filter(|page| real.walk(Iova::new(**page * PAGE)).is_none());
                let unmapped: Vec<u64> = unmapped.copied().collect();
                assert!(pages.iter().all(|page| unmapped.contains(page)));
                pages = unmapped;
            }
            remove(&mut self.models[space], &pages);
        }
    }

    fn register(&mut self, slot: usize, object: usize, pages: Pages) {
        self.drop_memory(slot);
        let first = pages.first.min(OBJECT_PAGES[object] - 1);
        let count = pages.count.min(OBJECT_PAGES[object] - first);
        let pages = Pages { first: BEGINNINGS[object] + first, count };
        let memory =
            Memory::register(&self.backings[object], pages.first * PAGE, count * PAGE, &self.account)
                .unwrap();
        self.memories[slot] = Some(memory);
        self.registrations[slot] = Some((object, pages));
    }

    /// The targets of a part of registered memory, and the part, cut to what is registered.
    fn targets(&self, what: What) -> Option<(Arc<Memory>, u64, Vec<Target>)> {
        let (object, held) = self.registrations[what.slot]?;
        let first = what.part.first.min(held.count - 1);
        let count = what.part.count.min(held.count - first).min(PAGES);
        let permissions = permissions(what.permissions);
        let target = |page| Target { object, page: held.first + page, permissions, begins: page == first };
        let memory = self.memories[what.slot].clone().unwrap();
        Some((memory, first, (first..first + count).map(target).collect()))
    }

    /// How many mappings more a space may have.
    fn may_have(&self, space: usize) -> u64 {
        let count = self.models[space].values().filter(|target| target.begins).count() as u64;
        if space == COUNTED { MOST.saturating_sub(count) } else { u64::MAX }
    }

    fn has_failed(&self, call: Call, fail: i64) -> bool {
        self.double.switches.has_failed(call) && fail > 0
    }

    fn map(&mut self, space: usize, at: u64, what: What, fail: i64) {
        let Some((memory, first, targets)) = self.targets(what) else { return };
        let count = (targets.len() as u64).min(PAGES - at);
        let targets = &targets[..count as usize];
        self.double.switches.fail(Call::Map, fail);
        let result = self.spaces[space].map(
            Iova::new(at * PAGE),
            &memory,
            first * PAGE,
            count * PAGE,
            permissions(what.permissions),
        );
        let failed = self.has_failed(Call::Map, fail);
        if count == 0 {
            return assert!(matches!(result, Err(MapError::NoRange { .. })));
        }
        if self.may_have(space) == 0 {
            return assert!(matches!(result, Err(MapError::TooManyMappings { most: MOST })), "{result:?}");
        }
        let model = &mut self.models[space];
        if let Some((page, _)) = model.range(at..at + count).next() {
            return assert!(matches!(result, Err(MapError::AlreadyMapped { at }) if at == page * PAGE));
        }
        if failed {
            return assert!(matches!(result, Err(MapError::Table(_))), "{result:?}");
        }
        result.unwrap();
        model.extend((at..).zip(targets.iter().copied()));
    }

    /// Whether a mapping lies on both sides of a boundary.
    fn cuts(&self, space: usize, page: u64) -> bool {
        self.models[space].get(&page).is_some_and(|target| !target.begins)
    }

    fn unmap(&mut self, space: usize, pages: Pages, fail: i64) {
        let Some(range) = pages.range() else { return };
        self.double.switches.fail(Call::Cut, fail);
        let result = self.spaces[space].unmap(range);
        let failed = self.has_failed(Call::Cut, fail);
        if space == WHOLE {
            let ends = [pages.first, pages.first + pages.count];
            if let Some(cut) = ends.into_iter().find(|page| self.cuts(space, *page)) {
                let Err(UnmapError::CutsMapping { mapping }) = result else {
                    panic!("{cut} is cut: {result:?}")
                };
                let model = &self.models[space];
                let first = model.range(..cut).rev().find(|(_, target)| target.begins).unwrap().0;
                let last =
                    (cut..).find(|page| model.get(&(page + 1)).is_none_or(|next| next.begins)).unwrap();
                assert_eq!((mapping.first(), mapping.last()), (first * PAGE, last * PAGE + (PAGE - 1)));
                return;
            }
        }
        if failed {
            return assert!(matches!(result, Err(UnmapError::Table(_))), "{result:?}");
        }
        let gone: Vec<u64> = self.models[space].range(pages.numbers()).map(|(page, _)| *page).collect();
        match result {
            Ok(unmapped) => {
                assert_eq!(unmapped.bytes(), gone.len() as u64 * PAGE);
                remove(&mut self.models[space], &gone);
            }
            Err(UnmapError::Table(error)) if self.is_rigid(space) && is_refusal(&error) => {}
            Err(error) => panic!("{error:?}"),
        }
    }

    fn protect(&mut self, space: usize, pages: Pages, bits: u8, fail: i64) {
        let Some(range) = pages.range() else { return };
        self.double.switches.fail(Call::Protect, fail);
        let result = self.spaces[space].protect(range, permissions(bits));
        let failed = self.has_failed(Call::Protect, fail);
        match result {
            Ok(bytes) => {
                assert!(!failed, "a call has failed, and nobody noticed");
                let model = &mut self.models[space];
                assert_eq!(bytes, model.range(pages.numbers()).count() as u64 * PAGE);
                for (_, target) in model.range_mut(pages.numbers()) {
                    target.permissions = permissions(bits);
                }
            }
            Err(ProtectError::Table(error)) if self.is_rigid(space) && is_refusal(&error) => {}
            Err(ProtectError::Table(TableError::Refused(_))) if failed => {}
            Err(error) => panic!("{error:?}"),
        }
    }

    fn remap(&mut self, space: usize, at: u64, what: What, fail: i64) {
        let Some((memory, first, targets)) = self.targets(what) else { return };
        // As much as is mapped from there on, mostly.
        let mapped = (at..PAGES).take_while(|page| self.models[space].contains_key(page)).count() as u64;
        let count = (targets.len() as u64).min(PAGES - at);
        let count = if what.part.first % 5 == 0 { count } else { count.min(mapped) };
        self.double.switches.fail(Call::Remap, fail);
        let result = self.spaces[space].remap(
            Iova::new(at * PAGE),
            &memory,
            first * PAGE,
            count * PAGE,
            permissions(what.permissions),
        );
        let failed = self.has_failed(Call::Remap, fail);
        match result {
            Ok(()) => {
                assert!(count > 0 && count <= mapped && !failed);
                for (page, target) in (at..).zip(&targets[..count as usize]) {
                    let old = self.models[space].get_mut(&page).unwrap();
                    *old = Target { begins: old.begins, ..*target };
                }
            }
            Err(RemapError::Request(error)) => {
                assert!(matches!(error, MapError::NoRange { .. }) && count == 0);
            }
            Err(RemapError::NotMapped { at: hole }) => {
                assert_eq!(hole, (at + mapped) * PAGE);
                assert!(mapped < count);
            }
            Err(RemapError::Table(error)) if self.is_rigid(space) && is_refusal(&error) => {}
            Err(RemapError::Table(TableError::Refused(_))) if failed => {}
            Err(error) => panic!("{error:?}"),
        }
    }

    fn alias(&mut self, space: usize, pages: Pages, target: usize, at: u64, bits: u8, fail: i64) {
        let Some(source) = pages.range() else { return };
        self.double.switches.fail(Call::Map, fail);
        let result =
            self.spaces[space].alias(source, &self.spaces[target], Iova::new(at * PAGE), permissions(bits));
        let failed = self.has_failed(Call::Map, fail);
        let copied: Vec<(u64, Target)> = self.models[space]
            .range(pages.numbers())
            .map(|(page, of)| (page - pages.first + at, *of))
            .collect();
        if copied.is_empty() {
            return assert!(matches!(result, Err(AliasError::NotMapped { .. })), "{result:?}");
        }
        let mut allowed = Vec::new();
        for (page, of) in &copied {
            let both = match (of.permissions, permissions(bits)) {
                (all, wanted) if all.contains(wanted) => wanted,
                (all, wanted) if wanted.contains(all) => all,
                _ => {
                    let first = (page + pages.first - at) * PAGE;
                    return assert!(
                        matches!(result, Err(AliasError::NoPermission { at }) if at <= first),
                        "{result:?}"
                    );
                }
            };
            let begins = !copied.iter().any(|(before, _)| before + 1 == *page);
            allowed.push((*page, Target { permissions: both, begins, ..*of }));
        }
        let more = allowed.iter().filter(|(_, target)| target.begins).count() as u64;
        if more > self.may_have(target) {
            let many = matches!(result, Err(AliasError::Target(MapError::TooManyMappings { most: MOST })));
            return assert!(many, "{result:?}");
        }
        let model = &mut self.models[target];
        if let Some((page, _)) = allowed.iter().find(|(page, _)| model.contains_key(page)) {
            return assert!(
                matches!(result, Err(AliasError::Target(MapError::AlreadyMapped { at })) if at == page * PAGE),
                "{result:?}"
            );
        }
        if failed {
            return assert!(matches!(result, Err(AliasError::Target(MapError::Table(_)))), "{result:?}");
        }
        assert_eq!(result.unwrap(), allowed.len() as u64 * PAGE);
        model.extend(allowed);
    }

    fn attach(&mut self, device: usize, space: usize) {
        let others = self.attached.iter().filter(|of| **of == Some(space)).count();
        if self.attached[device].is_some() || others >= 4 {
            return;
        }
        let table = Table::for_device(&self.spaces[space], &self.devices[device]).unwrap();
        self.devices[device].attach(&table).unwrap();
        self.attached[device] = Some(space);
    }

    fn take(&mut self, step: &Step) {
        match step.clone() {
            Step::Register { slot, object, pages } => self.register(slot, object, pages),
            Step::Drop { slot } => self.drop_memory(slot),
            Step::Map { space, at, what, fail } => self.map(space, at, what, fail),
            Step::Unmap { space, pages, fail } => self.unmap(space, pages, fail),
            Step::Protect { space, pages, permissions, fail } => {
                self.protect(space, pages, permissions, fail);
            }
            Step::Remap { space, at, what, fail } => self.remap(space, at, what, fail),
            Step::Alias { space, pages, target, at, permissions, fail } => {
                self.alias(space, pages, target, at, permissions, fail);
            }
            Step::Merge { space, pages } => {
                if let Some(range) = pages.range() {
                    self.spaces[space].merge(range);
                    self.check_merged(space, pages);
                }
            }
            Step::Attach { device, space } => self.attach(device, space),
            Step::Detach { device } => {
                self.devices[device].detach();
                self.attached[device] = None;
            }
        }
    }

    /// Every block of 2 MiB in the pages that can be one leaf is one.
    fn check_merged(&self, space: usize, pages: Pages) {
        let model = &self.models[space];
        let whole = |block: u64| pages.first <= block && block + 512 <= pages.first + pages.count;
        for block in (0..PAGES).step_by(512).filter(|block| whole(*block)) {
            let Some(head) = model.get(&block) else { continue };
            let continues = (1..512).all(|number| {
                model.get(&(block + number)).is_some_and(|target| {
                    let apart = matches!(space, COUNTED | WHOLE) && target.begins;
                    !apart
                        && (target.object, target.permissions) == (head.object, head.permissions)
                        && target.page == head.page + number
                })
            });
            // The objects begin with windows, the last one of them at a GiB.
            let aligned = head.page % 512 == 0;
            if continues && aligned && space != SMALL_LEAVES {
                let leaf = self.spaces[space].walk(Iova::new(block * PAGE)).unwrap();
                assert_eq!(leaf.size, PageSize::SIZE_2M, "page {block} of space {space}");
            }
        }
    }

    /// Compares everything that can be seen of a space with the model.
    fn compare(&self, space: usize) {
        let (model, real) = (&self.models[space], &self.spaces[space]);
        for page in 0..PAGES {
            let found = real.query(Iova::new(page * PAGE)).map(|mapped| {
                let oa = mapped.oa.get() + (page * PAGE - mapped.range.first());
                let (backing, offset) = real.object_at(ioasid::Oa::new(oa)).unwrap();
                let object = self.backings.iter().position(|known| Arc::ptr_eq(known, &backing)).unwrap();
                (object, offset / PAGE, mapped.permissions)
            });
            let expected = model.get(&page).map(|target| (target.object, target.page, target.permissions));
            assert_eq!(found, expected, "page {page} of space {space}");
        }
        assert_eq!(real.statistics().mapped_bytes, model.len() as u64 * PAGE);
        for (rid, attached) in DEVICES.iter().zip(&self.attached) {
            if *attached != Some(space) {
                continue;
            }
            let table = self.double.table_of(*rid).unwrap();
            let Some(derived) = table.derived() else { continue };
            let derived = derived.as_any().downcast_ref::<DoubleTable>().unwrap();
            assert_eq!(derived.mappings(), derived.expected(real), "{rid} in space {space}");
            assert!(derived.is_invalidated(), "{rid} in space {space}");
        }
        if matches!(space, COUNTED | WHOLE) {
            let count = model.values().filter(|target| target.begins).count() as u64;
            assert_eq!(real.mapping_count(), count, "mappings of space {space}");
        }
        self.compare_extents(space, IovaRange::ALL);
        self.compare_extents(space, IovaRange::new(7 * PAGE, 600 * PAGE - 1).unwrap());
    }

    fn compare_extents(&self, space: usize, range: IovaRange) {
        let (model, real) = (&self.models[space], &self.spaces[space]);
        let mut next = Some(range.first());
        let mut pages = 0;
        let mut before: Option<Mapped> = None;
        let mut extents = real.extents(range);
        while let Some(rest) = extents.rest() {
            assert_eq!((Some(rest.first()), rest.last()), (next, range.last()));
            let (extent, mapped) = match extents.next().unwrap() {
                Extent::Hole(hole) => {
                    assert_eq!(model.range(hole.first() / PAGE..=hole.last() / PAGE).next(), None);
                    (hole, None)
                }
                Extent::Mapped(mapped) => {
                    let numbers = mapped.range.first() / PAGE..=mapped.range.last() / PAGE;
                    pages += model.range(numbers.clone()).count();
                    assert!(numbers.clone().all(|page| model[&page].permissions == mapped.permissions));
                    if matches!(space, COUNTED | WHOLE) {
                        // Cut where mappings begin, and nowhere else.
                        assert!(numbers.skip(1).all(|page| !model[&page].begins));
                    }
                    (mapped.range, Some(mapped))
                }
            };
            assert_eq!(Some(extent.first()), next);
            if let (Some(before), Some(mapped)) = (before, mapped) {
                let page = mapped.range.first() / PAGE;
                let apart = mapped.oa.get()
                    != before.oa.get() + (mapped.range.first() - before.range.first())
                    || mapped.permissions != before.permissions
                    || space == 0
                    || space == SMALL_LEAVES
                    || model[&page].begins;
                assert!(apart, "{before:?} and {mapped:?} could be one");
            }
            assert!(
                mapped.is_some() || before.is_some() || next == Some(range.first()),
                "two holes in a row"
            );
            before = mapped;
            next = extent.last().checked_add(1);
        }
        assert!(extents.next().is_none());
        assert_eq!(next, range.last().checked_add(1));
        assert_eq!(pages, model.range(range.first() / PAGE..=range.last() / PAGE).count());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_does_what_the_model_does(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        // Something to work with.
        world.register(0, 1, Pages { first: 0, count: 1200 });
        world.register(1, 2, Pages { first: 0, count: 100 });
        for step in &steps {
            world.take(step);
            for space in 0..SPACES {
                world.compare(space);
            }
        }
        for slot in 0..MEMORIES {
            world.drop_memory(slot);
        }
        for space in 0..SPACES {
            world.compare(space);
            prop_assert_eq!(mappings(&world.spaces[space]), []);
        }
        drop(world.devices);
        prop_assert!(world.double.tables().is_empty());
        prop_assert_eq!(world.account.charged_pages(), 0);
    }
}
