//! The real thing and the model beside it, and what each step does to both.
//!
//! Every step works out what has to come of it before it is done. Where something goes wrong that the caller could not
//! know (a call of an IOMMU that fails, no memory for tables), an error of the right kind is the one thing expected, and that
//! nothing has changed; and so where a table cannot do everything while devices use it.
//!
//! - [`memory`]: what memory there is. [`mapping`]: what is mapped. [`layout`]: where nothing may be, and what is attached.
//! - [`errors`]: errors by what they have in common.

mod errors;
mod layout;
mod mapping;
mod memory;

use self::errors::Kind;
use crate::double::{Double, WIDE};
use crate::plain::{Levels, PlainSpace, Registrations};
use crate::steps::{
    ACCOUNTS, BEGINNINGS, COUNTED, DEVICES, LATE, MEMORIES, MOST, OBJECT_PAGES, OF_THE_MACHINE, PAGE, RIGID,
    SPACES, Step, Trouble, WHOLE,
};
use ioasid::pagetable::{HeapTables, Native};
use ioasid::{
    Account, Backing, Bus, Device, LateBound, MappingPolicy, Memory, MemoryGone, PageSize, ReservationOwner,
    Rid, Snapshot, Space, TableClass,
};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// So many pages of each object begin with their own number.
pub(crate) const TAGGED: u64 = 48;
/// What is larger is mapped where it fits in leaves of a GiB.
const LARGE: u64 = 4096;

/// Memory in which every page begins with its object's and its own number.
#[derive(Debug)]
struct Numbered(usize);

impl LateBound for Numbered {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone> {
        let tag = tag(self.0, offset / PAGE);
        buffer.iter_mut().zip(tag).for_each(|(byte, tag)| *byte = tag);
        Ok(())
    }

    fn write(&self, offset: u64, _bytes: &[u8]) -> Result<(), MemoryGone> {
        Err(MemoryGone { offset })
    }
}

pub(crate) fn tag(object: usize, page: u64) -> [u8; 8] {
    ((object as u64) << 32 | page).to_le_bytes()
}

/// An object. When it is revoked another one takes its place.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) backing: Arc<Backing>,
    pub(crate) kind: usize,
    revoked: bool,
}

/// Where a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) space: usize,
    pub(crate) class: TableClass,
    /// The number of a table that is not shared.
    own: Option<u64>,
}

pub(crate) struct World {
    bus: Arc<Bus>,
    pub(crate) objects: Vec<Object>,
    /// Which object is the one of each kind now.
    current: Vec<usize>,
    pub(crate) accounts: Vec<Account>,
    pub(crate) spaces: Vec<Arc<Space>>,
    pub(crate) double: Arc<Double>,
    pub(crate) devices: Vec<Device>,
    pub(crate) memories: Vec<Option<Arc<Memory>>>,

    pub(crate) registrations: Registrations,
    pub(crate) levels: Levels,
    pub(crate) plain: Vec<PlainSpace>,
    pub(crate) attached: Vec<Option<Attached>>,
    /// Something was unmapped and not flushed.
    pub(crate) deferred: Vec<bool>,
    own_tables: u64,
    /// Bytes of table pages when it began.
    pub(crate) tables_before: u64,

    trouble: Trouble,
    /// A call of an IOMMU has failed.
    failed: bool,
    /// The step has met its trouble.
    hit: bool,
    /// The step was refused for reasons of tables, and has not happened.
    refused: bool,
}

impl World {
    pub(crate) fn new() -> World {
        let bus = Bus::new();
        let policy =
            |most, whole_only| Space::with_policy(&bus, Native::new(), MappingPolicy { most, whole_only });
        let mut accounts: Vec<Account> = Vec::new();
        for (number, (parent, limit)) in ACCOUNTS.into_iter().enumerate() {
            let name = format!("account {number}");
            accounts.push(match parent {
                None => Account::new(name, limit),
                Some(parent) => accounts[parent].child(name, limit),
            });
        }
        let double = Double::new();
        let mut world = World {
            objects: Vec::new(),
            current: vec![0; BEGINNINGS.len()],
            accounts,
            spaces: vec![
                Space::new(&bus),
                policy(Some(MOST), false),
                policy(None, true),
                Space::with_format(&bus, Native::new().with_largest_leaf(PageSize::SIZE_4K)),
            ],
            bus,
            devices: DEVICES.iter().map(|rid| double.device(*rid)).collect(),
            double,
            memories: vec![None; MEMORIES],
            registrations: vec![None; MEMORIES],
            levels: Levels::new(),
            plain: vec![PlainSpace::default(); SPACES],
            attached: vec![None; DEVICES.len()],
            deferred: vec![false; SPACES],
            own_tables: 0,
            tables_before: HeapTables::bytes_in_use(),
            trouble: Trouble::None,
            failed: false,
            hit: false,
            refused: false,
        };
        for kind in 0..BEGINNINGS.len() {
            world.make_object(kind);
        }
        world
    }

    fn make_object(&mut self, kind: usize) {
        let number = self.objects.len();
        let first = BEGINNINGS[kind];
        let backing = if kind == LATE {
            Backing::late_bound(&self.bus, Arc::new(Numbered(number)))
        } else {
            let backing = Backing::anonymous(&self.bus, (first + OBJECT_PAGES[kind]) * PAGE).unwrap();
            for page in first..first + TAGGED {
                backing.write(page * PAGE, &tag(number, page)).unwrap();
            }
            backing
        };
        self.current[kind] = number;
        self.objects.push(Object { backing, kind, revoked: false });
    }

    /// Does a step with this trouble. Whether it met the trouble, so that it has not happened.
    pub(crate) fn take(&mut self, step: &Step, trouble: Trouble) -> bool {
        (self.trouble, self.hit, self.refused) = (trouble, false, false);
        match step.clone() {
            Step::Register { slot, object, pages, account, populated } => {
                self.register(slot, object, pages, account, populated);
            }
            Step::Drop { slot } => self.drop_memory(slot),
            Step::Grow { slot, pages } => self.grow(slot, pages),
            Step::Release { slot, part } => self.release(slot, part),
            Step::Revoke { object } => self.revoke(object),
            Step::Transfer { slots, to } => self.transfer(&slots, to),
            Step::Limit { account, limit } => {
                self.accounts[account].set_limit(limit);
                self.levels.0[account].limit = limit;
            }
            Step::Map { space, at, what } => self.map(space, Some(at), what),
            Step::MapAnywhere { space, what } => self.map(space, None, what),
            Step::Unmap { space, pages, manner } => self.unmap(space, pages, manner),
            Step::Batch { space, ranges } => {
                self.batch(space, &ranges);
            }
            Step::Flush { space } => self.flush(space),
            Step::Protect { space, pages, permissions } => self.protect(space, pages, permissions),
            Step::Remap { space, at, what } => self.remap(space, at, what),
            Step::Alias { space, pages, target, at, permissions } => {
                self.alias(space, pages, target, at, permissions);
            }
            Step::Merge { space, pages } => {
                if let Some(range) = pages.range() {
                    self.spaces[space].merge(range);
                    self.check_merged(space, pages);
                }
            }
            Step::Reserve { space, pages, owner } => self.reserve(space, pages, owner),
            Step::Unreserve { space, owner } => {
                let owner = ReservationOwner::User(owner);
                self.spaces[space].unreserve(owner);
                self.plain[space].reserved.retain(|(_, of)| *of != owner);
            }
            Step::Allow { space, ranges } => self.allow(space, &ranges),
            Step::Attach { device, space, own } => self.attach(device, space, own),
            Step::Detach { device } => {
                self.devices[device].detach();
                self.attached[device] = None;
                self.reservations_of_tables();
            }
            Step::Restore { space } => self.restore(space),
        }
        self.hit
    }

    /// Whether the last step was refused for reasons of tables, and has not happened.
    pub(crate) fn was_refused(&self) -> bool {
        self.refused
    }

    /// Calls the engine, with the step's trouble.
    fn call<T>(&mut self, call: impl FnOnce(&World) -> T) -> T {
        let switches = self.double.switches.clone();
        match self.trouble {
            Trouble::None => {}
            Trouble::Call { number, late } => {
                switches.late.store(late, Ordering::SeqCst);
                switches.fail_any(number);
            }
            Trouble::Tables(pages) => {
                HeapTables::set_limit(HeapTables::bytes_in_use().saturating_add(pages * PAGE));
            }
        }
        let result = call(self);
        HeapTables::set_limit(u64::MAX);
        switches.late.store(false, Ordering::SeqCst);
        self.failed = switches.any_has_failed();
        result
    }

    /// Whether tables or the step's trouble explain that the call has failed. Then nothing has changed.
    #[track_caller]
    fn is_explained(&mut self, rigid: bool, kind: Option<Kind>) -> bool {
        let hit = match self.trouble {
            Trouble::Call { .. } if self.failed => {
                // Late is after the table itself had its say.
                let told = match kind {
                    Some(Kind::Refused | Kind::OutOfTables | Kind::DoesNotFit | Kind::OutOfReach) => true,
                    Some(Kind::Rigid) | None => false,
                };
                assert!(told, "a call of an IOMMU has failed, and what came of it is {kind:?}");
                true
            }
            // Or a call fails besides, if the double was told so.
            Trouble::Tables(_) => matches!(kind, Some(Kind::OutOfTables | Kind::Refused)),
            _ => false,
        };
        self.hit |= hit;
        self.refused |= hit || (rigid && kind == Some(Kind::Rigid));
        hit || (rigid && kind == Some(Kind::Rigid))
    }

    fn is_attached(&self, space: usize, rids: &[Rid]) -> bool {
        let attached = DEVICES.iter().zip(&self.attached);
        attached.into_iter().any(|(rid, of)| of.is_some_and(|of| of.space == space) && rids.contains(rid))
    }

    pub(crate) fn is_rigid(&self, space: usize) -> bool {
        self.is_attached(space, &RIGID)
    }

    /// Whether what is mapped there is too much for one of the tables.
    fn does_not_fit(&self, space: usize, pages: &Range<u64>) -> bool {
        pages.end > 1 << 36 && self.is_attached(space, &[WIDE])
    }

    /// Whether one of the tables cannot lead to the object.
    fn is_out_of_reach(&self, space: usize, object: usize) -> bool {
        self.objects[object].kind == LATE && self.is_attached(space, OF_THE_MACHINE)
    }

    /// Whether an error of this kind is what tables have to say of pages and an object that one of them cannot take.
    fn is_too_much(&self, space: usize, pages: &Range<u64>, object: usize, kind: Option<Kind>) -> bool {
        match (self.does_not_fit(space, pages), self.is_out_of_reach(space, object)) {
            (false, false) => false,
            (too_far, out_of_reach) => {
                let told = (too_far && kind == Some(Kind::DoesNotFit))
                    || (out_of_reach && kind == Some(Kind::OutOfReach));
                assert!(told, "{kind:?}, but a table cannot take pages {pages:?} of object {object}");
                true
            }
        }
    }

    /// A space is taken apart and built again, and leads where it led. (Leaves may be others: where several memories have the
    /// same pages, a piece of a leaf may be named by one and the rest by another.)
    fn restore(&mut self, space: usize) {
        self.flush(space);
        let real = &self.spaces[space];
        let slots = self.memories.iter().enumerate();
        let named: Vec<(u64, &Arc<Memory>)> =
            slots.filter_map(|(slot, memory)| Some((slot as u64, memory.as_ref()?))).collect();
        let bytes = real.snapshot(named).unwrap().to_bytes();
        let memory = |name: u64| self.memories[usize::try_from(name).unwrap()].clone();
        let again = Snapshot::from_bytes(&bytes).unwrap().restore(&self.bus, memory).unwrap();
        self.compare_leaves(space, &again);
        assert_eq!(again.policy(), real.policy());
        assert_eq!(again.allowed_ranges(), real.allowed_ranges());
        if space == COUNTED || space == WHOLE {
            assert_eq!(again.mapping_count(), real.mapping_count());
        }
    }
}
