//! An I/O address space (IOAS): the areas that clients mapped, in front of an engine space.
//!
//! Linux's rule is laziness: as long as no page table belongs to an address space, mapping only remembers. The memory
//! is looked at, charged and registered when the first table comes (then for all areas at once, or not at all) or when
//! an area is mapped while there is one. When the last table goes, all of it is given back. Here this means that the
//! engine's space is empty without a table, and holds every area with one:
//!
//! ```text
//!   IOAS_MAP ──► Areas (IOVA → Pages, by the byte)          always
//!                  │  register, map
//!                  ▼
//!                ioasid::Space (4 KiB granule) ──► tables   while there is a table
//!                              (2 KiB with test devices)
//! ```
//!
//! The engine's space also keeps which IOVAs are reserved and where automatic placement is allowed; areas are looked at
//! here, since the space may not know them.
//!
//! One lock guards the areas together with the number of tables. It is held while memory is registered and the engine
//! maps, so that an area is mapped in all tables or in none; it is never held while a call reads or writes its client's
//! memory.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};

use ioasid::{
    Device, Iova, IovaRange, Memory, PageSize, Permissions, Requirements, ReservationOwner, Space, Table,
    TableClass,
};
use ioasid_uapi::iommufd_test::MOCK_PAGE_SIZE;
use rustix::io::Errno;

use super::areas::Areas;
use super::errno::{attach_errno, map_errno, reserve_errno, unmap_errno};
use super::hwpt::Hwpt;
use super::objects::{Counted, Held, Users};
use super::placement;
use super::testing::{self, Access};
use crate::memory::{PAGE_SIZE, Pages};
use crate::poison::lock;
use crate::status::{AddressSpaceStatus, AreaStatus, LeafStatus};

/// How many areas all address spaces of one context may have together. A client that wants more gets `ENOMEM`.
pub(crate) const AREAS_PER_CONTEXT: usize = 1 << 20;

/// How many ranges a client may allow, and how many it may reserve for tests, in one address space.
pub(crate) const RANGES_PER_IOAS: usize = 1 << 12;

/// Who reserved the ranges that the self-test's command adds.
const SELFTEST_OWNER: ReservationOwner = ReservationOwner::User(0);

/// How many more areas a context may have.
#[derive(Debug)]
pub(crate) struct AreaBudget(AtomicUsize);

impl AreaBudget {
    pub(crate) fn new() -> Self {
        Self(AtomicUsize::new(AREAS_PER_CONTEXT))
    }

    fn take(&self, count: usize) -> Result<(), Errno> {
        let less = |left: usize| left.checked_sub(count);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).map(drop).map_err(|_| Errno::NOMEM)
    }

    fn give_back(&self, count: usize) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

/// Some of the areas that a context may have, used for what costs as much as areas do.
#[derive(Debug)]
pub(crate) struct BudgetShare {
    budget: Arc<AreaBudget>,
    count: usize,
}

impl Drop for BudgetShare {
    fn drop(&mut self) {
        self.budget.give_back(self.count);
    }
}

/// A piece of an area that software is going to copy.
#[derive(Debug)]
pub(crate) struct PieceToCopy {
    source: Slice,
    /// The area's memory, if it is registered, and where the piece is in it.
    registered: Option<(Arc<Memory>, u64)>,
}

impl PieceToCopy {
    pub(crate) fn length(&self) -> u64 {
        self.source.length
    }

    /// Memory that holds the piece: the area's, or for as long as the caller keeps it.
    ///
    /// # Errors
    /// See [`Pages::register`].
    pub(crate) fn memory(&self) -> Result<Arc<Memory>, Errno> {
        match &self.registered {
            Some((memory, _)) => Ok(Arc::clone(memory)),
            None => self.source.pages.register(self.source.offset, self.source.length),
        }
    }

    /// Where in [`PieceToCopy::memory`] the piece begins.
    pub(crate) fn offset(&self) -> u64 {
        self.registered.as_ref().map_or(0, |(_, offset)| *offset)
    }
}

/// An I/O address space.
#[derive(Debug)]
pub(crate) struct Ioas {
    users: Users,
    space: Arc<Space>,
    budget: Arc<AreaBudget>,
    state: Mutex<State>,
    /// Held for reading while software copies what it has found in the areas. Whoever has unmapped something waits for
    /// the copies that may have found it.
    copies: RwLock<()>,
}

#[derive(Debug)]
struct State {
    areas: Areas<Area>,
    /// Tables over this space; while there is one, every area is registered and in the engine's space.
    tables: usize,
    /// How many of them have pages of 4 KiB; the others have smaller ones.
    coarse_tables: usize,
    /// Tables that attaching to the space itself made, for other devices of their class to share.
    shared: Vec<Weak<Hwpt>>,
    large_pages: bool,
    test_reservations: usize,
    /// Users of the space beside devices.
    accesses: Vec<Arc<Access>>,
}

/// What one area refers to.
#[derive(Debug)]
struct Area {
    source: Slice,
    permissions: Permissions,
    memory: Option<Arc<Memory>>,
}

/// A piece of mapped memory: the bytes of `pages` from `offset` on.
#[derive(Debug, Clone)]
pub(crate) struct Slice {
    pub(crate) pages: Arc<Pages>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Slice {
    /// The virtual address or file offset of the first byte. Exists, since the end was checked when the pages were made.
    fn start(&self) -> u64 {
        self.pages.start().wrapping_add(self.offset)
    }
}

/// Where a mapping goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Placement {
    /// At this IOVA.
    Fixed(u64),
    /// Where there is room.
    Anywhere,
}

/// What a table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TableUse {
    /// Every device of the class that attaches to the space.
    Shared,
    /// Whoever names it.
    Own,
}

impl Counted for Ioas {
    fn users(&self) -> &Users {
        &self.users
    }
}

impl State {
    /// What IOVAs, lengths and page offsets have to be multiples of, in bytes.
    fn alignment(&self) -> u64 {
        let pins = self.accesses.iter().any(|access| access.pins_pages());
        if self.coarse_tables > 0 || pins || !self.large_pages {
            PAGE_SIZE
        } else if self.tables > 0 {
            MOCK_PAGE_SIZE
        } else {
            1
        }
    }

    /// Whether every area could be there if this were what mappings have to be aligned to.
    fn all_aligned(&self, alignment: u64) -> bool {
        self.areas.iter().all(|(range, area)| is_aligned(range, &area.source, alignment))
    }

    fn count_table(&mut self, class: TableClass) {
        self.tables += 1;
        self.coarse_tables += usize::from(testing::mock::alignment(class) == PAGE_SIZE);
    }

    fn discount_table(&mut self, class: TableClass) {
        self.tables -= 1;
        self.coarse_tables -= usize::from(testing::mock::alignment(class) == PAGE_SIZE);
    }
}

/// Whether no area lies where the device cannot have a mapping. The engine finds out too, but only when all of the
/// memory is registered and mapped.
fn fits(areas: &Areas<Area>, requirements: &Requirements) -> bool {
    let aperture = requirements.aperture;
    let below = aperture.first().checked_sub(1).and_then(|last| IovaRange::new(0, last));
    let above = aperture.last().checked_add(1).and_then(|first| IovaRange::new(first, u64::MAX));
    let mut forbidden = requirements.reserved.iter().copied().chain(below).chain(above);
    !forbidden.any(|range| areas.overlaps(range))
}

fn is_aligned(range: IovaRange, source: &Slice, alignment: u64) -> bool {
    [range.first(), source.length, source.start()].iter().all(|value| value % alignment == 0)
}

fn may_access(pages: &Pages, write: bool) -> Result<(), Errno> {
    if !pages.is_accessible() {
        Err(Errno::INVAL)
    } else if write && !pages.writable() {
        Err(Errno::PERM)
    } else {
        Ok(())
    }
}

impl Ioas {
    pub(crate) fn new(space: Arc<Space>, budget: Arc<AreaBudget>) -> Self {
        Self {
            users: Users::default(),
            space,
            budget,
            state: Mutex::new(State {
                areas: Areas::new(),
                tables: 0,
                coarse_tables: 0,
                shared: Vec::new(),
                large_pages: true,
                test_reservations: 0,
                accesses: Vec::new(),
            }),
            copies: RwLock::new(()),
        }
    }

    /// Maps `slices` one behind the other, all of them or none; returns the IOVA of the first.
    ///
    /// # Errors
    /// - `EINVAL`: length, IOVA or memory is not aligned as the tables need; the IOVA is reserved; the file ends before.
    /// - `EOVERFLOW`: past 2^64. `EEXIST`: something is mapped there. `ENOSPC`: there is no room.
    /// - `EPERM`: write access to memory that was mapped without.
    /// - `EFAULT`: the memory is not there. `ENOMEM`: over the account's limit, or too many areas.
    pub(crate) fn map(
        &self,
        slices: Vec<Slice>,
        placement: Placement,
        permissions: Permissions,
    ) -> Result<u64, Errno> {
        let length = slices
            .iter()
            .try_fold(0_u64, |sum, slice| sum.checked_add(slice.length))
            .ok_or(Errno::OVERFLOW)?;
        let mut state = lock(&self.state);
        let alignment = state.alignment();
        if length == 0 || length % alignment != 0 {
            return Err(Errno::INVAL);
        }
        let first = match placement {
            Placement::Fixed(iova) => self.check_fixed(&state, iova, length)?,
            Placement::Anywhere => {
                let start = slices.first().ok_or(Errno::INVAL)?.start();
                placement::find_room(&self.space, &mut state.areas, start, length, alignment)?
            }
        };

        let mut planned = Vec::with_capacity(slices.len());
        let mut next = first;
        for source in slices {
            let range = IovaRange::with_length(next, source.length).ok_or(Errno::OVERFLOW)?;
            if permissions.contains(Permissions::WRITE) && !source.pages.writable() {
                return Err(Errno::PERM);
            }
            if !is_aligned(range, &source, alignment) {
                return Err(Errno::INVAL);
            }
            next = next.wrapping_add(source.length);
            planned.push((range, Area { source, permissions, memory: None }));
        }

        self.budget.take(planned.len())?;
        if state.tables > 0 {
            if let Err(error) = self.populate(planned.iter_mut().map(|(range, area)| (*range, area))) {
                self.budget.give_back(planned.len());
                return Err(error);
            }
        }
        for (range, area) in planned {
            let inserted = state.areas.insert(range, area);
            debug_assert!(inserted.is_ok(), "the range was free when it was planned");
        }
        Ok(first)
    }

    /// Whether `length` bytes can be mapped at `iova`.
    fn check_fixed(&self, state: &State, iova: u64, length: u64) -> Result<u64, Errno> {
        if iova % state.alignment() != 0 {
            return Err(Errno::INVAL);
        }
        let range = IovaRange::with_length(iova, length).ok_or(Errno::OVERFLOW)?;
        if !self.space.usable_ranges().iter().any(|usable| usable.covers(&range)) {
            return Err(Errno::INVAL);
        }
        if state.areas.overlaps(range) {
            return Err(Errno::EXIST);
        }
        Ok(iova)
    }

    /// Registers areas and maps them in the engine's space: all, or none.
    fn populate<'a>(&self, areas: impl Iterator<Item = (IovaRange, &'a mut Area)>) -> Result<(), Errno> {
        let mut done: Vec<(IovaRange, &mut Area)> = Vec::new();
        let mut result = Ok(());
        for (range, area) in areas {
            match self.populate_one(range, area) {
                Ok(()) => done.push((range, area)),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if result.is_err() {
            for (range, area) in done {
                self.forget_memory(range, area);
            }
        }
        result
    }

    fn populate_one(&self, range: IovaRange, area: &mut Area) -> Result<(), Errno> {
        let source = &area.source;
        if source.pages.is_revoked() {
            return Ok(());
        }
        let memory = source.pages.register(source.offset, source.length)?;
        self.space
            .map(Iova::new(range.first()), &memory, 0, source.length, area.permissions)
            .map_err(map_errno)?;
        area.memory = Some(memory);
        Ok(())
    }

    fn forget_memory(&self, range: IovaRange, area: &mut Area) {
        if let Err(error) = self.space.unmap(range) {
            tracing::error!(%range, ?error, "the engine did not unmap an area");
        }
        area.memory = None;
    }

    /// Removes every area in `range`; returns how many bytes they had.
    ///
    /// # Errors
    /// `ENOENT`: an area sticks out of the range. `ENOMEM`, `EBUSY`: a table cannot be cut. Nothing has changed.
    pub(crate) fn unmap(&self, range: IovaRange) -> Result<u64, Errno> {
        let mut state = lock(&self.state);
        let found = state.areas.whole_areas_in(range).map_err(|_| Errno::NOENT)?;
        let (Some(first), Some(last)) = (found.first(), found.last()) else {
            return Ok(0);
        };
        let hull = IovaRange::new(first.first(), last.last()).ok_or(Errno::INVAL)?;
        if state.tables > 0 {
            self.space.unmap(hull).map_err(unmap_errno)?;
        }
        for access in &state.accesses {
            access.let_go(hull);
        }
        self.budget.give_back(found.len());
        let mut bytes = 0_u64;
        for range in found {
            bytes = bytes.saturating_add(range.length().unwrap_or(u64::MAX));
            state.areas.remove(range);
        }
        drop(state);
        self.wait_for_copies();
        Ok(bytes)
    }

    /// Lets an access use the space.
    ///
    /// # Errors
    /// `EADDRINUSE`: it pins pages, and an area is not aligned to pages.
    pub(crate) fn add_access(&self, access: &Arc<Access>) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        if access.pins_pages() && !state.all_aligned(PAGE_SIZE) {
            return Err(Errno::ADDRINUSE);
        }
        state.accesses.push(Arc::clone(access));
        Ok(())
    }

    /// Ends an access's use of the space, and what it has pinned.
    pub(crate) fn remove_access(&self, access: &Arc<Access>) {
        let mut state = lock(&self.state);
        access.let_go(IovaRange::ALL);
        state.accesses.retain(|other| !Arc::ptr_eq(other, access));
    }

    /// Registers what is mapped in `range` for `access`; returns the number of the pin and the memory, in order.
    ///
    /// # Errors
    /// `ENOENT`: a byte of it belongs to no area. `EPERM`: the memory may not be written. `EINVAL`: it is a dma-buf's.
    /// `ENOMEM`: too many pins, or over the account's limit. `EFAULT`: the memory is not there.
    pub(crate) fn pin(
        &self,
        access: &Access,
        range: IovaRange,
        write: bool,
    ) -> Result<(u32, Vec<Arc<Memory>>), Errno> {
        let state = lock(&self.state);
        let pieces = state.areas.pieces(range).ok_or(Errno::NOENT)?;
        self.budget.take(pieces.len())?;
        let share = BudgetShare { budget: Arc::clone(&self.budget), count: pieces.len() };
        let mut memory = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let source = &piece.payload.source;
            may_access(&source.pages, write)?;
            let length = piece.range.length().ok_or(Errno::INVAL)?;
            memory.push(source.pages.register(source.offset + piece.offset, length)?);
        }
        let id = access.enter_pin(range, memory.clone(), share)?;
        Ok((id, memory))
    }

    /// Held while software copies what [`Ioas::pieces_to_copy`] finds.
    pub(crate) fn begin_copies(&self) -> RwLockReadGuard<'_, ()> {
        self.copies.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no copy is running that began before.
    fn wait_for_copies(&self) {
        drop(self.copies.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// The memory under `range`, to be copied between [`Ioas::begin_copies`] and the end of that.
    ///
    /// # Errors
    /// `ENOENT`: a byte of it belongs to no area. `EPERM`: it may not be written. `EINVAL`: it is a dma-buf's.
    pub(crate) fn pieces_to_copy(&self, range: IovaRange, write: bool) -> Result<Vec<PieceToCopy>, Errno> {
        let state = lock(&self.state);
        let pieces = state.areas.pieces(range).ok_or(Errno::NOENT)?;
        pieces
            .into_iter()
            .map(|piece| {
                let area = piece.payload;
                may_access(&area.source.pages, write)?;
                let length = piece.range.length().ok_or(Errno::INVAL)?;
                let offset = area.source.offset + piece.offset;
                let source = Slice { pages: Arc::clone(&area.source.pages), offset, length };
                let registered = area.memory.as_ref().map(|memory| (Arc::clone(memory), piece.offset));
                Ok(PieceToCopy { source, registered })
            })
            .collect()
    }

    /// The memory under `range`.
    ///
    /// # Errors
    /// `ENOENT` if a byte of it belongs to no area.
    pub(crate) fn slices(&self, range: IovaRange) -> Result<Vec<Slice>, Errno> {
        let state = lock(&self.state);
        let pieces = state.areas.pieces(range).ok_or(Errno::NOENT)?;
        Ok(pieces
            .into_iter()
            .map(|piece| Slice {
                pages: Arc::clone(&piece.payload.source.pages),
                offset: piece.payload.source.offset + piece.offset,
                length: piece.range.length().unwrap_or(u64::MAX),
            })
            .collect())
    }

    /// The IOVAs that nobody reserves, and the alignment of mappings in bytes.
    pub(crate) fn usable(&self) -> (Vec<IovaRange>, u64) {
        let state = lock(&self.state);
        (self.space.usable_ranges(), state.alignment())
    }

    /// Replaces where automatic placement is allowed.
    ///
    /// # Errors
    /// `EADDRINUSE` if a range is reserved.
    pub(crate) fn set_allowed(&self, ranges: &[IovaRange]) -> Result<(), Errno> {
        let _state = lock(&self.state);
        self.space.set_allowed(ranges).map_err(reserve_errno)
    }

    /// Reserves a range, as a device would, until the space goes.
    ///
    /// # Errors
    /// `EADDRINUSE` if something is mapped or allowed there; `ENOMEM` beyond the limit.
    pub(crate) fn reserve_for_test(&self, range: IovaRange) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        if state.areas.overlaps(range) {
            return Err(Errno::ADDRINUSE);
        }
        if state.test_reservations >= RANGES_PER_IOAS {
            return Err(Errno::NOMEM);
        }
        self.space.reserve(range, SELFTEST_OWNER).map_err(reserve_errno)?;
        state.test_reservations += 1;
        Ok(())
    }

    /// Whether pages may be combined to larger ones.
    pub(crate) fn large_pages(&self) -> bool {
        lock(&self.state).large_pages
    }

    /// Allows or forbids combining pages. The engine cuts leaves of any size, so this changes only which alignment
    /// mappings must have.
    ///
    /// # Errors
    /// When forbidding: `EINVAL` if a table has areas already, `EADDRINUSE` if an area is not aligned to pages.
    pub(crate) fn set_large_pages(&self, large_pages: bool) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        if !large_pages && state.large_pages {
            if state.tables > 0 && !state.areas.is_empty() {
                return Err(Errno::INVAL);
            }
            if !state.all_aligned(PAGE_SIZE) {
                return Err(Errno::ADDRINUSE);
            }
        }
        state.large_pages = large_pages;
        Ok(())
    }

    /// Makes a table for `device` and lets `install` use it; the first table brings all areas into the engine's space.
    /// If that or `install` fails nothing has changed. With [`TableUse::Shared`] the `install` gets the table object
    /// of an earlier call if it is of the device's class.
    ///
    /// # Errors
    /// - `EADDRINUSE`: an area is not aligned to pages, or lies where the device cannot have it.
    /// - `EFAULT`, `EINVAL`, `ENOMEM`: an area's memory cannot be had, see [`Pages::register`].
    /// - `EINVAL`: the device has no such table. What `install` answers.
    pub(crate) fn with_table(
        &self,
        device: &Device,
        table_use: TableUse,
        install: impl FnOnce(Arc<Table>, Option<Held<Hwpt>>) -> Result<Arc<Hwpt>, Errno>,
    ) -> Result<Arc<Hwpt>, Errno> {
        let mut state = lock(&self.state);
        let first = state.tables == 0;
        let alignment = testing::mock::alignment(device.requirements().class);
        if alignment > state.alignment() && !state.all_aligned(alignment) {
            return Err(Errno::ADDRINUSE);
        }
        if first {
            if !fits(&state.areas, device.requirements()) {
                return Err(Errno::ADDRINUSE);
            }
            self.populate(state.areas.iter_mut())?;
        }
        let result = self.make_table(&mut state, device, table_use, install);
        if first && state.tables == 0 {
            self.depopulate(&mut state);
        }
        result
    }

    fn make_table(
        &self,
        state: &mut State,
        device: &Device,
        table_use: TableUse,
        install: impl FnOnce(Arc<Table>, Option<Held<Hwpt>>) -> Result<Arc<Hwpt>, Errno>,
    ) -> Result<Arc<Hwpt>, Errno> {
        let table = match table_use {
            TableUse::Shared => Table::for_device(&self.space, device),
            TableUse::Own => Table::new(&self.space, device),
        }
        .map_err(|error| attach_errno(&error))?;
        state.shared.retain(|hwpt| hwpt.strong_count() > 0);
        let existing = state
            .shared
            .iter()
            .filter(|_| table_use == TableUse::Shared)
            .filter_map(Weak::upgrade)
            .filter(|hwpt| hwpt.is_over(&table))
            .find_map(|hwpt| Held::new(&hwpt));
        let existed = existing.is_some();
        let hwpt = install(table, existing)?;
        if !existed {
            state.count_table(device.requirements().class);
            if table_use == TableUse::Shared {
                state.shared.push(Arc::downgrade(&hwpt));
            }
        }
        Ok(hwpt)
    }

    /// Drops a table that [`Ioas::with_table`] made. With the last one the areas' memory is given back.
    pub(crate) fn remove_table(&self, table: Arc<Table>) {
        let mut state = lock(&self.state);
        let class = table.class();
        drop(table);
        state.discount_table(class);
        if state.tables == 0 {
            self.depopulate(&mut state);
        }
    }

    fn depopulate(&self, state: &mut State) {
        if state.areas.is_empty() {
            return;
        }
        if let Err(error) = self.space.unmap(IovaRange::ALL) {
            tracing::error!(?error, "the engine did not unmap an address space without tables");
        }
        for (_, area) in state.areas.iter_mut() {
            area.memory = None;
        }
    }

    /// Unmaps everything, for good.
    pub(crate) fn clear(&self) {
        let mut state = lock(&self.state);
        self.depopulate(&mut state);
        self.budget.give_back(state.areas.len());
        state.areas = Areas::new();
        self.space.unreserve(SELFTEST_OWNER);
    }

    /// What the address space holds, but for its number and its page table objects.
    pub(crate) fn status(&self) -> AddressSpaceStatus {
        let state = lock(&self.state);
        let areas =
            state.areas.iter().take(AddressSpaceStatus::AREAS_SHOWN).map(|(range, area)| AreaStatus {
                first: format!("{:#x}", range.first()),
                last: format!("{:#x}", range.last()),
                permissions: match (
                    area.permissions.contains(Permissions::READ),
                    area.permissions.contains(Permissions::WRITE),
                ) {
                    (true, true) => "rw",
                    (true, false) => "r",
                    (false, _) => "w",
                },
                source: area.source.pages.describe(),
                source_offset: format!("{:#x}", area.source.start()),
                registered: area.memory.is_some(),
            });
        let statistics = self.space.statistics();
        let leaf = |&(size, count): &(PageSize, u64)| LeafStatus { size_bytes: size.bytes(), count };
        AddressSpaceStatus {
            area_count: state.areas.len(),
            mapped_bytes: state.areas.mapped_bytes(),
            areas: areas.collect(),
            leaves: statistics.leaves.iter().map(leaf).collect(),
            native_table_bytes: statistics.native_table_bytes,
            derived_table_bytes: statistics.derived_table_bytes,
            ..AddressSpaceStatus::default()
        }
    }
}
