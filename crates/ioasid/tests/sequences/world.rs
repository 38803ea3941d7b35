//! The real thing and the model beside it, and what each step does to both.
//!
//! Every step works out what has to come of it before it is done. Where something goes wrong that the caller could not
//! know (a call of an IOMMU that fails, no memory for tables), an error of the right kind is the one thing expected, and that
//! nothing has changed; and so where a table cannot do everything while devices use it.

use crate::double::{Double, WIDE, is_wanted};
use crate::plain::{Lead, Levels, PlainSpace, Registration, Registrations, numbers};
use crate::steps::{
    ACCOUNTS, BEGINNINGS, COUNTED, DEVICES, END, GIANT, GIB, LATE, LOW, MEMORIES, MOST, Manner, OBJECT_PAGES,
    OF_THE_MACHINE, PAGE, Pages, RIGID, SMALL_LEAVES, SPACES, Step, Trouble, WHOLE, What, permissions,
};
use ioasid::pagetable::{HeapTables, Native};
use ioasid::{
    Account, AliasError, AttachError, Backing, Bus, Device, Iova, IovaRange, LateBound, MapError,
    MappingPolicy, Memory, MemoryGone, PageSize, ProtectError, RegisterError, ReleaseError, RemapError,
    ReservationOwner, Residency, Rid, Snapshot, Space, Table, TableClass, TableError, UnmapError,
};
use rangemap::RangeSet;
use std::fmt::Debug;
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

/// Of what kind an error of a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    OutOfTables,
    /// The double was told to fail.
    Refused,
    /// The format cannot do it while devices use the table.
    Rigid,
    DoesNotFit,
    /// The table cannot lead to the memory.
    OutOfReach,
}

impl Kind {
    fn of(error: &TableError) -> Kind {
        match error {
            TableError::OutOfTables => Kind::OutOfTables,
            TableError::Refused(_) if is_wanted(error) => Kind::Refused,
            TableError::Refused(_) => Kind::OutOfReach,
            TableError::NeedsBreak { .. } | TableError::CannotCut { .. } => Kind::Rigid,
            TableError::DoesNotFit { .. } => Kind::DoesNotFit,
        }
    }

    fn of_map(error: &MapError) -> Option<Kind> {
        match error {
            MapError::OutOfTables => Some(Kind::OutOfTables),
            MapError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    fn of_unmap(error: &UnmapError) -> Option<Kind> {
        match error {
            UnmapError::OutOfTables => Some(Kind::OutOfTables),
            UnmapError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    fn of_protect(error: &ProtectError) -> Option<Kind> {
        match error {
            ProtectError::OutOfTables => Some(Kind::OutOfTables),
            ProtectError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    fn of_remap(error: &RemapError) -> Option<Kind> {
        match error {
            RemapError::OutOfTables => Some(Kind::OutOfTables),
            RemapError::Table(error) => Some(Kind::of(error)),
            _ => None,
        }
    }

    fn of_alias(error: &AliasError) -> Option<Kind> {
        if let AliasError::Target(error) = error { Kind::of_map(error) } else { None }
    }

    fn of_attach(error: &AttachError) -> Option<Kind> {
        if let AttachError::Table(error) = error { Some(Kind::of(error)) } else { None }
    }
}

/// That the result is this error, or none.
#[track_caller]
fn expect<T: Debug, E: Debug>(result: Result<T, E>, expected: Option<&str>) -> Option<T> {
    match (result, expected) {
        (Ok(value), None) => Some(value),
        (Err(error), Some(expected)) if format!("{error:?}").starts_with(expected) => None,
        (result, expected) => panic!("{result:?}, but expected was {expected:?}"),
    }
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
            Step::Split { device, pages, power } => self.split(device, pages, power),
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

    /// Nothing is different afterwards but the leaves of one table.
    fn split(&mut self, device: usize, pages: Pages, power: u8) {
        let (Some(range), Some(table)) = (pages.range(), self.devices[device].table()) else { return };
        let largest = PageSize::from_log2(12 + u32::from(power)).unwrap();
        match self.call(|_| table.split(range, largest)) {
            Ok(()) => self.check_split(device, range, largest),
            Err(error) => {
                let rigid = RIGID.contains(&DEVICES[device]);
                assert!(self.is_explained(rigid, Some(Kind::of(&error))), "{error:?}");
            }
        }
    }

    // Memory.

    fn register(&mut self, slot: usize, kind: usize, pages: Pages, account: usize, populated: bool) {
        self.drop_memory(slot);
        let object = self.current[kind];
        let first = BEGINNINGS[kind] + pages.first;
        // Not all of a GiB is brought in for a test.
        let count = if populated { pages.count.min(64) } else { pages.count };
        let residency = if populated { Residency::Populated } else { Residency::OnDemand };
        let result = Memory::register_resident(
            &self.objects[object].backing,
            first * PAGE,
            count * PAGE,
            &self.accounts[account],
            residency,
        );
        if count == 0 {
            expect(result, Some("Empty"));
            return;
        }
        if kind != LATE && pages.first + count > OBJECT_PAGES[kind] {
            expect(result, Some("OutOfBounds"));
            return;
        }
        let held: RangeSet<u64> = std::iter::once(first..first + count).collect();
        let mut after = self.registrations.clone();
        after[slot] = Some(Registration { object, first, length: count, held, account });
        match (self.levels.change(&self.registrations, &after, account), result) {
            (Some(expected), Err(RegisterError::OverLimit(error))) => assert_eq!(error, expected),
            (None, Err(RegisterError::Residency(_))) if populated && kind == LATE => {}
            (None, Ok(memory)) if !(populated && kind == LATE) => {
                self.memories[slot] = Some(memory);
                self.registrations = after;
            }
            (expected, result) => panic!("{result:?}, but expected was {expected:?}"),
        }
    }

    /// These pages of an object are registered no more; those that nobody holds are unmapped.
    fn let_go(&mut self, object: usize, gone: &RangeSet<u64>) {
        for space in 0..SPACES {
            let plain = &self.plain[space];
            let leading = plain.pieces(0..END).into_iter().filter(|(_, lead)| lead.object == object);
            let going: Vec<Range<u64>> = leading
                .flat_map(|(piece, lead)| {
                    let outputs = lead.page(piece.start)..lead.page(piece.end);
                    let gone = gone.overlapping(&outputs).map(move |run| {
                        let first = run.start.max(outputs.start) - outputs.start;
                        let last = run.end.min(outputs.end) - outputs.start;
                        piece.start + first..piece.start + last
                    });
                    gone.collect::<Vec<_>>()
                })
                .collect();
            going.into_iter().for_each(|run| self.plain[space].unmap(run));
            if self.is_rigid(space) || self.trouble != Trouble::None {
                self.adopt_what_went(space);
            }
        }
    }

    /// Where a table cannot be cut, more has to go than what leads to memory that goes; never less.
    fn adopt_what_went(&mut self, space: usize) {
        let leaves = self.spaces[space].leaves(IovaRange::ALL);
        let there: RangeSet<u64> = leaves.iter().map(|leaf| numbers(leaf.range())).collect();
        for (piece, _) in self.plain[space].pieces(0..END) {
            for gap in there.gaps(&piece) {
                self.plain[space].unmap(gap);
            }
        }
    }

    /// What of these pages of an object no registration holds.
    fn held_by_nobody(&self, object: usize, mut pages: RangeSet<u64>) -> RangeSet<u64> {
        for other in self.registrations.iter().flatten().filter(|other| other.object == object) {
            other.held.iter().for_each(|run| pages.remove(run.clone()));
        }
        pages
    }

    pub(crate) fn drop_memory(&mut self, slot: usize) {
        let memory = self.memories[slot].take();
        assert!(memory.as_ref().is_none_or(|memory| Arc::strong_count(memory) == 1));
        self.call(|_| drop(memory));
        let Some(gone) = self.registrations[slot].take() else { return };
        let free = self.held_by_nobody(gone.object, gone.held);
        self.let_go(gone.object, &free);
    }

    fn grow(&mut self, slot: usize, pages: u64) {
        let Some(memory) = self.memories[slot].clone() else { return };
        let Some(mut held) = self.registrations[slot].clone() else { return };
        let object = &self.objects[held.object];
        let (kind, revoked) = (object.kind, object.revoked);
        let result = memory.grow(pages * PAGE);
        let behind = held.first + held.length;
        if pages == 0 {
            expect(result, Some("Empty"));
            return;
        }
        if kind != LATE && behind + pages > BEGINNINGS[kind] + OBJECT_PAGES[kind] {
            expect(result, Some("OutOfBounds"));
            return;
        }
        if revoked {
            expect(result, Some("Revoked"));
            return;
        }
        held.length += pages;
        held.held.insert(behind..behind + pages);
        let account = held.account;
        let mut after = self.registrations.clone();
        after[slot] = Some(held);
        match (self.levels.change(&self.registrations, &after, account), result) {
            (Some(expected), Err(RegisterError::OverLimit(error))) => assert_eq!(error, expected),
            (None, Ok(())) => self.registrations = after,
            (expected, result) => panic!("{result:?}, but expected was {expected:?}"),
        }
    }

    fn release(&mut self, slot: usize, part: Pages) {
        let Some(memory) = self.memories[slot].clone() else { return };
        let Some(mut held) = self.registrations[slot].clone() else { return };
        let result = self.call(|_| memory.release(part.first * PAGE, part.count * PAGE));
        if !held.has(part) {
            expect(result, Some("NotRegistered"));
            return;
        }
        let pages = held.object_pages(part);
        let rigid = (0..SPACES).any(|space| self.is_rigid(space));
        if let Err(error) = &result {
            let ReleaseError::Unmap(unmap) = error else { panic!("{error:?}") };
            assert!(self.is_explained(rigid, Kind::of_unmap(unmap)), "{error:?}");
            // Other mappings of it may be unmapped already, and nothing else.
            self.adopt_what_went_of(held.object, &pages);
            self.hit = false;
            return;
        }
        expect(result, None);
        held.held.remove(pages.clone());
        if part.first + part.count == held.length {
            held.length = held.held.iter().next_back().map_or(0, |run| run.end - held.first);
        }
        let object = held.object;
        self.registrations[slot] = Some(held);
        let free = self.held_by_nobody(object, std::iter::once(pages).collect());
        self.let_go(object, &free);
    }

    /// Takes over what of these pages was unmapped.
    fn adopt_what_went_of(&mut self, object: usize, pages: &Range<u64>) {
        for space in 0..SPACES {
            let before = self.plain[space].clone();
            self.adopt_what_went(space);
            for (piece, lead) in before.pieces(0..END) {
                for gap in self.plain[space].mapped.gaps(&piece) {
                    let outputs = lead.page(gap.start)..lead.page(gap.end);
                    let only =
                        lead.object == object && pages.start <= outputs.start && outputs.end <= pages.end;
                    assert!(only, "pages {gap:?} of space {space} are gone");
                }
            }
        }
    }

    fn revoke(&mut self, kind: usize) {
        // What is revoked goes with the world; address space is not without end either.
        if kind == GIB && self.objects.iter().filter(|object| object.kind == kind).count() > 1 {
            return;
        }
        let object = self.current[kind];
        let backing = self.objects[object].backing.clone();
        self.call(|_| backing.revoke());
        self.objects[object].revoked = true;
        let everything: RangeSet<u64> = std::iter::once(0..END).collect();
        self.let_go(object, &everything);
        self.make_object(kind);
    }

    fn transfer(&mut self, slots: &[usize], to: usize) {
        let memories: Vec<Arc<Memory>> =
            slots.iter().filter_map(|slot| self.memories[*slot].clone()).collect();
        let memories: Vec<&Memory> = memories.iter().map(|memory| &**memory).collect();
        let result = Memory::transfer_all(&memories, &self.accounts[to]);
        let mut after = self.registrations.clone();
        for slot in slots {
            if let Some(held) = &mut after[*slot] {
                held.account = to;
            }
        }
        let expected = self.levels.change(&self.registrations, &after, to);
        assert_eq!(result.err(), expected);
        if expected.is_none() {
            self.registrations = after;
        }
    }

    // Mapping.

    /// The memory that is to be mapped, the part of it, cut to what would take too long, and where it leads.
    fn wanted(&self, space: usize, what: What) -> Option<(Arc<Memory>, Pages, usize, u64)> {
        let memory = self.memories[what.slot].clone()?;
        let held = self.registrations[what.slot].as_ref()?;
        let (first, mut count) = (what.part.first, what.part.count);
        // As much as there is, mostly.
        if count % 7 != 3 {
            count = count.min(held.length.saturating_sub(first).max(1));
        }
        if count > LARGE && (space == SMALL_LEAVES || (held.first + first) % 512 != 0) {
            count = 600;
        }
        Some((memory, Pages { first, count }, held.object, held.first + first))
    }

    /// Why memory cannot be mapped: what is asked first, and what is asked in the operation.
    fn unavailable(&self, what: What, part: Pages) -> (Option<&'static str>, Option<&'static str>) {
        let Some(held) = &self.registrations[what.slot] else { return (None, None) };
        let revoked = self.objects[held.object].revoked;
        let gone = if revoked { "Revoked" } else { "BeyondMemory" };
        let beyond = part.first + part.count > held.length;
        let gone = Some(gone).filter(|_| revoked || !held.has(part));
        (gone.filter(|_| beyond), gone)
    }

    /// How many mappings more a space may have.
    fn may_have(&self, space: usize) -> u64 {
        let count = self.plain[space].begins.len() as u64;
        if space == COUNTED { MOST.saturating_sub(count) } else { u64::MAX }
    }

    /// Maps at an address, or anywhere.
    fn map(&mut self, space: usize, at: Option<u64>, what: What) {
        let Some((memory, mut part, object, first)) = self.wanted(space, what) else { return };
        let at = match at {
            Some(at) if part.count > LARGE => {
                part.count = part.count.min(GIANT.end);
                Some(at & !((1 << 18) - 1))
            }
            Some(at) => {
                part.count = part.count.min(END - at);
                Some(at)
            }
            // What waits for a flush is free at a moment that nobody knows.
            None => {
                self.flush(space);
                None
            }
        };
        let allowed = permissions(what.permissions);
        let (early, late) = self.unavailable(what, part);
        let (offset, length) = (part.first * PAGE, part.count * PAGE);
        let real = self.spaces[space].clone();
        let result = self.call(|_| match at {
            Some(at) => real.map(Iova::new(at * PAGE), &memory, offset, length, allowed).map(|()| at),
            None => real.map_anywhere(&memory, offset, length, allowed).map(|iova| iova.get() / PAGE),
        });
        let kind = result.as_ref().err().and_then(Kind::of_map);
        if part.count == 0 {
            expect(result, Some("NoRange"));
            return;
        }
        if early.is_some() {
            expect(result, early);
            return;
        }
        let place = match at {
            Some(at) => Some(at),
            None => self.plain[space].hole(part.count),
        };
        if self.is_explained(false, kind) {
            return;
        }
        let Some(place) = place else {
            // A place that is not known to be taken is tried, and then the memory is looked at first.
            let tried =
                late.filter(|gone| result.as_ref().is_err_and(|error| format!("{error:?}") == **gone));
            expect(result, tried.or(Some("NoHole")));
            return;
        };
        let plain = &self.plain[space];
        let pages = place..place + part.count;
        let range = Pages { first: place, count: part.count }.range().unwrap();
        let taken = plain.first_mapped(pages.clone());
        let refusal = if plain.reserved_in(range) {
            Some("Reserved".to_owned())
        } else if let Some(gone) = late {
            Some(gone.to_owned())
        } else if self.may_have(space) == 0 {
            Some("TooManyMappings".to_owned())
        } else {
            taken.map(|page| format!("AlreadyMapped {{ at: {} }}", page * PAGE))
        };
        if refusal.is_none() && self.is_too_much(space, &pages, object, kind) {
            self.refused = true;
            return;
        }
        if let Some(there) = expect(result, refusal.as_deref()) {
            assert_eq!(there, place, "mapped at another place");
            let lead = Lead { object, shift: first.wrapping_sub(place), permissions: allowed };
            self.plain[space].map(pages, lead);
        }
    }

    fn unmap(&mut self, space: usize, pages: Pages, manner: Manner) {
        let Some(range) = pages.range() else { return };
        let real = self.spaces[space].clone();
        let result = self.call(|_| match manner {
            Manner::Strict => real.unmap(range),
            Manner::Deferred => real.unmap_deferred(range),
        });
        self.deferred[space] |= manner == Manner::Deferred;
        self.unmapped(space, pages, result);
    }

    /// What has to come of an unmap.
    fn unmapped(&mut self, space: usize, pages: Pages, result: Result<ioasid::Unmapped, UnmapError>) {
        let plain = &self.plain[space];
        let cut = plain.cut_by(&pages.numbers()).filter(|_| space == WHOLE);
        let runs: Vec<Range<u64>> = plain.runs(pages.numbers()).into_iter().collect();
        let kind = result.as_ref().err().and_then(Kind::of_unmap);
        let rigid = self.is_rigid(space);
        if self.is_explained(rigid, kind) {
            return;
        }
        if let Some(cut) = cut {
            let Err(UnmapError::CutsMapping { mapping }) = result else {
                panic!("{result:?}, and pages {cut:?} would be cut")
            };
            return assert_eq!(numbers(mapping), cut);
        }
        let unmapped = expect(result, None).unwrap();
        assert_eq!(unmapped.runs().map(numbers).collect::<Vec<_>>(), runs);
        runs.into_iter().for_each(|run| self.plain[space].unmap(run));
    }

    fn batch(&mut self, space: usize, ranges: &[Pages]) {
        let real = self.spaces[space].clone();
        let mut batch = real.batch();
        for pages in ranges {
            let Some(range) = pages.range() else { continue };
            let result = self.call(|_| batch.unmap(range));
            self.unmapped(space, *pages, result);
        }
        batch.finish();
        self.deferred[space] = false;
    }

    fn flush(&mut self, space: usize) {
        self.spaces[space].flush();
        self.deferred[space] = false;
    }

    fn protect(&mut self, space: usize, pages: Pages, bits: u8) {
        let Some(range) = pages.range() else { return };
        let real = self.spaces[space].clone();
        let result = self.call(|_| real.protect(range, permissions(bits)));
        let rigid = self.is_rigid(space);
        if self.is_explained(rigid, result.as_ref().err().and_then(Kind::of_protect)) {
            return;
        }
        let plain = &mut self.plain[space];
        assert_eq!(expect(result, None), Some(plain.count(pages.numbers()) * PAGE));
        for (piece, lead) in plain.pieces(pages.numbers()) {
            plain.mapped.insert(piece, Lead { permissions: permissions(bits), ..lead });
        }
    }

    fn remap(&mut self, space: usize, at: u64, what: What) {
        let Some((memory, mut part, object, first)) = self.wanted(space, what) else { return };
        part.count = part.count.min(LOW).min(END - at);
        let plain = &self.plain[space];
        // As much as is mapped from there on, mostly.
        let mapped = plain.runs(at..at + part.count).into_iter().next().filter(|run| run.start == at);
        let mapped = mapped.map_or(0, |run| run.end - at);
        if what.part.first % 5 != 0 {
            part.count = part.count.min(mapped);
        }
        let allowed = permissions(what.permissions);
        let (early, late) = self.unavailable(what, part);
        let real = self.spaces[space].clone();
        let (offset, length) = (part.first * PAGE, part.count * PAGE);
        let result = self.call(|_| real.remap(Iova::new(at * PAGE), &memory, offset, length, allowed));
        let rigid = self.is_rigid(space);
        if part.count == 0 {
            expect(result, Some("Request(NoRange"));
            return;
        }
        let asked = |error: &str| format!("Request({error}");
        if let Some(error) = early {
            expect(result, Some(&asked(error)));
            return;
        }
        if self.is_explained(rigid, result.as_ref().err().and_then(Kind::of_remap)) {
            return;
        }
        let hole = (mapped < part.count).then(|| format!("NotMapped {{ at: {} }}", (at + mapped) * PAGE));
        let refusal = late.map(asked).or(hole);
        if expect(result, refusal.as_deref()).is_some() {
            let lead = Lead { object, shift: first.wrapping_sub(at), permissions: allowed };
            self.plain[space].mapped.insert(at..at + part.count, lead);
        }
    }

    fn alias(&mut self, space: usize, mut pages: Pages, target: usize, at: u64, bits: u8) {
        let large = self.plain[space].count(pages.numbers()) > LARGE;
        if large && (target == SMALL_LEAVES || (at ^ pages.first) & ((1 << 18) - 1) != 0) {
            pages.count = pages.count.min(600);
        }
        pages.count = pages.count.min(END - at.max(pages.first)).min(END - 1);
        let Some(source) = pages.range() else { return };
        let (from, to) = (self.spaces[space].clone(), self.spaces[target].clone());
        let result = self.call(|_| from.alias(source, &to, Iova::new(at * PAGE), permissions(bits)));
        if self.is_explained(false, result.as_ref().err().and_then(Kind::of_alias)) {
            return;
        }
        let wanted = permissions(bits);
        let copied = self.plain[space].pieces(pages.numbers());
        let moved = |page: u64| page - pages.first + at;
        let allowed = |lead: &Lead| match lead.permissions {
            all if all.contains(wanted) => Some(wanted),
            all if wanted.contains(all) => Some(all),
            _ => None,
        };
        if let Some((piece, _)) = copied.iter().find(|(_, lead)| allowed(lead).is_none()) {
            let Err(AliasError::NoPermission { at }) = result else { panic!("{result:?}") };
            return assert!(at <= piece.start * PAGE, "{at:#x} allows it");
        }
        let copies: Vec<(Range<u64>, Lead)> = copied
            .into_iter()
            .filter_map(|(piece, lead)| {
                let there = moved(piece.start)..moved(piece.end);
                let shift = lead.page(piece.start).wrapping_sub(there.start);
                Some((there, Lead { shift, permissions: allowed(&lead)?, ..lead }))
            })
            .collect();
        let runs: RangeSet<u64> = copies.iter().map(|(piece, _)| piece.clone()).collect();
        let bytes = runs.iter().map(|run| run.end - run.start).sum::<u64>() * PAGE;
        let plain = &self.plain[target];
        let range = Pages { first: at, count: pages.count }.range().unwrap();
        let taken = runs.iter().find_map(|run| plain.first_mapped(run.clone()));
        let refusal = if copies.is_empty() {
            Some("NotMapped".to_owned())
        } else if plain.reserved_in(range) {
            Some("Target(Reserved".to_owned())
        } else if runs.iter().count() as u64 > self.may_have(target) {
            Some("Target(TooManyMappings".to_owned())
        } else {
            taken.map(|page| format!("Target(AlreadyMapped {{ at: {} }}", page * PAGE))
        };
        let kind = result.as_ref().err().and_then(Kind::of_alias);
        let too_much =
            |(piece, lead): &(Range<u64>, Lead)| self.is_too_much(target, piece, lead.object, kind);
        if refusal.is_none() && copies.iter().any(too_much) {
            self.refused = true;
            return;
        }
        if let Some(mapped) = expect(result, refusal.as_deref()) {
            assert_eq!(mapped, bytes);
            let plain = &mut self.plain[target];
            copies.into_iter().for_each(|(piece, lead)| plain.mapped.insert(piece, lead));
            plain.begins.extend(runs.iter().map(|run| run.start));
        }
    }

    // Layout.

    fn refuse_reservation(&self, space: usize, ranges: &[IovaRange]) -> Option<&'static str> {
        let plain = &self.plain[space];
        let allowed = |range: &IovaRange| plain.allowed.iter().any(|allowed| allowed.overlaps(range));
        let mapped = |range: &IovaRange| plain.first_mapped(numbers(*range)).is_some();
        if ranges.iter().any(allowed) {
            Some("Allowed")
        } else {
            ranges.iter().any(mapped).then_some("Mapped")
        }
    }

    fn reserve(&mut self, space: usize, pages: Pages, owner: u64) {
        let Some(range) = pages.range() else { return };
        let owner = ReservationOwner::User(owner);
        let result = self.spaces[space].reserve(range, owner);
        if expect(result, self.refuse_reservation(space, &[range])).is_some() {
            self.plain[space].reserved.push((range, owner));
        }
    }

    fn allow(&mut self, space: usize, ranges: &[Pages]) {
        let mut sorted: Vec<IovaRange> = ranges.iter().filter_map(|pages| pages.range()).collect();
        let result = self.spaces[space].set_allowed(&sorted);
        sorted.sort_unstable();
        let plain = &mut self.plain[space];
        let refusal = if sorted.windows(2).any(|pair| pair[0].overlaps(&pair[1])) {
            Some("Overlapping")
        } else {
            sorted.iter().any(|range| plain.reserved_in(*range)).then_some("Reserved")
        };
        if expect(result, refusal).is_some() {
            plain.allowed = sorted;
        }
    }

    /// What a table of the device's kind cannot translate.
    fn outside(&self, device: usize) -> Vec<IovaRange> {
        let aperture = self.devices[device].requirements().aperture;
        let above = aperture.last().checked_add(1).and_then(|first| IovaRange::new(first, u64::MAX));
        above.into_iter().collect()
    }

    /// Why a device cannot be attached.
    fn refuse_attachment(&self, device: usize, space: usize, own: bool) -> Option<&'static str> {
        let class = self.devices[device].requirements().class;
        let shared = Attached { space, class, own: None };
        if own || !self.attached.contains(&Some(shared)) {
            let outside = self.outside(device);
            if let Some(refusal) = self.refuse_reservation(space, &outside) {
                return Some(refusal);
            }
            let mapped = self.plain[space].runs(0..END);
            if DEVICES[device] == WIDE && mapped.iter().any(|run| run.end > 1 << 36) {
                return Some("Table(DoesNotFit");
            }
            let leads = self.plain[space].pieces(0..END);
            let late = leads.iter().any(|(_, lead)| self.objects[lead.object].kind == LATE);
            if late && OF_THE_MACHINE.contains(&DEVICES[device]) {
                return Some("Table(Refused");
            }
        }
        if self.attached[device].is_some_and(|attached| attached.space == space) {
            return None;
        }
        self.refuse_reservation(space, &self.devices[device].requirements().reserved)
    }

    fn attach(&mut self, device: usize, space: usize, own: bool) {
        let class = self.devices[device].requirements().class;
        let refusal = self.refuse_attachment(device, space, own);
        let real = self.spaces[space].clone();
        let result = self.call(|world| {
            let device = &world.devices[device];
            let table = if own { Table::new(&real, device) } else { Table::for_device(&real, device) };
            device.attach(&table?)
        });
        if self.is_explained(false, result.as_ref().err().and_then(Kind::of_attach)) {
            return;
        }
        if expect(result, refusal).is_some() {
            self.own_tables += 1;
            let own = own.then_some(self.own_tables);
            self.attached[device] = Some(Attached { space, class, own });
            self.reservations_of_tables();
        }
    }

    /// The tables that there are, with a device that is attached to each.
    pub(crate) fn tables(&self) -> Vec<(Attached, usize)> {
        let mut tables: Vec<(Attached, usize)> = Vec::new();
        for (device, attached) in self.attached.iter().enumerate() {
            let Some(attached) = attached else { continue };
            if tables.iter().all(|(table, _)| table != attached) {
                tables.push((*attached, device));
            }
        }
        tables
    }

    /// What tables and devices reserve follows from what is attached.
    fn reservations_of_tables(&mut self) {
        for plain in &mut self.plain {
            plain.reserved.retain(|(_, owner)| matches!(owner, ReservationOwner::User(_)));
        }
        for (table, device) in self.tables() {
            for range in self.outside(device) {
                self.plain[table.space].reserved.push((range, ReservationOwner::Table(0)));
            }
        }
        for (device, attached) in self.attached.iter().enumerate() {
            let Some(attached) = attached else { continue };
            for range in &self.devices[device].requirements().reserved {
                self.plain[attached.space].reserved.push((*range, ReservationOwner::Device(0)));
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
