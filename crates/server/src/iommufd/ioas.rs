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
//!                              (2 KiB for mock devices)
//! ```
//!
//! The engine's space also keeps which IOVAs are reserved and where automatic placement is allowed; areas are looked at
//! here, since the space may not know them.
//!
//! One lock guards the areas together with the number of tables. It is held while memory is registered and the engine
//! maps, so that an area is mapped in all tables or in none; it is never held while a call reads or writes its client's
//! memory.

mod accesses;
pub(crate) mod change_process;
mod cut;
mod tables;

use std::sync::{Arc, Mutex, RwLock, Weak};

use ioasid::{Bus, IovaRange, Memory, PageSize, Permissions, ReservationOwner, Space};
use ioasid_uapi::iommufd_test::MOCK_PAGE_SIZE;
use rustix::io::Errno;

use super::areas::{Areas, Piece};
use super::errno::{reserve_errno, unmap_errno};
use super::hwpt::Hwpt;
use super::objects::{Counted, Users};
use super::placement;
use super::testing::Access;
use crate::PinnedMemory;
use crate::limits::{Budget, Taken};
use crate::memory::{PAGE_SIZE, Pages};
use crate::observer::{MemoryAt, Watched};
use crate::poison::lock;
use crate::status::{AddressSpaceStatus, AreaStatus, LeafStatus, Listing};
use tables::populate;

pub(crate) use tables::TableUse;

/// How many ranges a client may allow, and how many it may reserve for tests, in one address space.
pub(crate) const RANGES_PER_IOAS: usize = 1 << 12;

/// Who reserved the ranges that the self-test's command adds.
const SELFTEST_OWNER: ReservationOwner = ReservationOwner::User(0);

/// An I/O address space.
#[derive(Debug)]
pub(crate) struct Ioas {
    users: Users,
    budget: Arc<Budget>,
    state: Mutex<State>,
    /// Held for reading while software copies what it has found in the areas. Whoever has unmapped something waits for
    /// the copies that may have found it.
    copies: RwLock<()>,
}

#[derive(Debug)]
struct State {
    /// Another one may take its place while there is no table.
    space: Arc<Space>,
    areas: Areas<Area>,
    /// Tables over this space; while there is one, every area is registered and in the engine's space.
    tables: usize,
    /// How many of them have pages of 4 KiB; the others have smaller ones.
    coarse_tables: usize,
    /// Tables that attaching to the space itself made, for other devices of their class to share.
    shared: Vec<Weak<Hwpt>>,
    large_pages: bool,
    /// What was reserved for tests; each is taken from the budget for areas.
    test_reservations: Vec<IovaRange>,
    /// How many ranges are allowed, of the budget for areas.
    allowed: usize,
    /// Devices that are attached, if somebody watches: every change to the areas is told.
    watched: Vec<Arc<Watched>>,
    /// Users of the space beside devices.
    accesses: Vec<Arc<Access>>,
}

/// What one area refers to.
#[derive(Debug)]
struct Area {
    source: Slice,
    permissions: Permissions,
    /// Where its bytes are registered, while there is a table.
    memory: Option<Registered>,
}

/// The part of registered memory that belongs to one area, from the byte at `offset` on. It is less than the whole if
/// the area was cut.
#[derive(Debug, Clone)]
struct Registered {
    memory: Arc<Memory>,
    offset: u64,
    /// What very long memory counts beside its areas, until the last of those that share it has gone.
    _counted: Option<Arc<Taken>>,
}

/// A piece of mapped memory: the bytes of `pages` from `offset` on.
#[derive(Debug, Clone)]
pub(crate) struct Slice {
    pub(crate) pages: Arc<Pages>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Area {
    fn tell_mapped(&self, range: IovaRange, watched: &Watched) {
        let memory = MemoryAt { owner: self.source.pages.owner(), offset: self.source.start() };
        watched.mapped(range, memory, self.permissions);
    }
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
}

/// Ends an area that the engine has unmapped. Its memory goes with it, unless it was registered together with that of
/// other areas, from which this one was cut off: then its part of the registration ends.
fn give_back(area: Area) {
    let Area { source, memory: Some(Registered { memory, offset, .. }), .. } = area else { return };
    if (offset, memory.length()) == (0, source.length) {
        return;
    }
    if let Err(error) = memory.release(offset, source.length) {
        tracing::error!(?error, "the memory of an area that was unmapped is still held");
    }
}

fn is_aligned(range: IovaRange, source: &Slice, alignment: u64) -> bool {
    [range.first(), source.length, source.start()].iter().all(|value| value % alignment == 0)
}

impl Ioas {
    pub(crate) fn new(bus: &Arc<Bus>, budget: Arc<Budget>) -> Self {
        Self {
            users: Users::default(),
            budget,
            state: Mutex::new(State {
                space: Space::new(bus),
                areas: Areas::new(),
                tables: 0,
                coarse_tables: 0,
                shared: Vec::new(),
                large_pages: true,
                test_reservations: Vec::new(),
                allowed: 0,
                watched: Vec::new(),
                accesses: Vec::new(),
            }),
            copies: RwLock::new(()),
        }
    }

    /// Maps one slice, as [`Ioas::map_all`] does.
    ///
    /// # Errors
    /// As there, and `ENOMEM`: too many areas.
    pub(crate) fn map(
        &self,
        slice: Slice,
        placement: Placement,
        permissions: Permissions,
    ) -> Result<u64, Errno> {
        let counted = Taken::some(&self.budget, 1)?;
        self.map_all(vec![slice], counted, placement, permissions)
    }

    /// Maps `slices`, which have been counted as areas, one behind the other, all of them or none; returns the IOVA of the
    /// first.
    ///
    /// # Errors
    /// - `EINVAL`: length, IOVA or memory is not aligned as the tables need; the IOVA is reserved; the file ends before.
    /// - `EOVERFLOW`: past 2^64. `EEXIST`: something is mapped there. `ENOSPC`: there is no room.
    /// - `EPERM`: write access to memory that was mapped without.
    /// - `EFAULT`: the memory is not there. `ENOMEM`: over the account's limit.
    pub(crate) fn map_all(
        &self,
        slices: Vec<Slice>,
        counted: Taken,
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
                let State { space, areas, .. } = &mut *state;
                placement::find_room(space, areas, start, length, alignment)?
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

        let watched = state.watched.clone();
        let _changing: Vec<_> = watched.iter().map(|watched| watched.changing()).collect();
        if state.tables > 0 {
            populate(&state.space, &self.budget, planned.iter_mut().map(|(range, area)| (*range, area)))?;
        }
        counted.keep();
        for (range, area) in planned {
            watched.iter().for_each(|watched| area.tell_mapped(range, watched));
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
        if !state.space.usable_ranges().iter().any(|usable| usable.covers(&range)) {
            return Err(Errno::INVAL);
        }
        if state.areas.overlaps(range) {
            return Err(Errno::EXIST);
        }
        Ok(iova)
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
        let watched = state.watched.clone();
        let changing: Vec<_> = watched.iter().map(|watched| watched.changing()).collect();
        if state.tables > 0 {
            state.space.unmap(hull).map_err(unmap_errno)?;
        }
        for access in &state.accesses {
            access.let_go(hull);
        }
        self.budget.give_back(found.len());
        let mut bytes = 0_u64;
        let mut gone = Vec::new();
        for range in found {
            bytes = bytes.saturating_add(range.length().unwrap_or(u64::MAX));
            if let Some(area) = state.areas.remove(range) {
                if !watched.is_empty() {
                    gone.push((range, area.permissions));
                }
                give_back(area);
            }
        }
        watched.iter().for_each(|watched| watched.unmapped(gone.iter().copied()));
        drop(changing);
        drop(state);
        self.wait_for_copies();
        Ok(bytes)
    }

    /// A watched device has been attached: what is mapped is told, and all changes from now on.
    pub(crate) fn add_watched(&self, watched: &Arc<Watched>) {
        let mut state = lock(&self.state);
        state.areas.iter().for_each(|(range, area)| area.tell_mapped(range, watched));
        state.watched.push(Arc::clone(watched));
    }

    /// A watched device has left: for it, everything is unmapped.
    pub(crate) fn forget_watched(&self, watched: &Arc<Watched>) {
        let mut state = lock(&self.state);
        state.watched.retain(|other| !Arc::ptr_eq(other, watched));
        watched.unmapped(state.areas.iter().map(|(range, area)| (range, area.permissions)));
    }

    /// The memory under `range`, counted as areas already: what many calls at once have in hand is bounded too.
    ///
    /// # Errors
    /// `ENOENT` if a byte of it belongs to no area; `ENOMEM`: too many areas.
    pub(crate) fn slices(&self, range: IovaRange) -> Result<(Vec<Slice>, Taken), Errno> {
        let state = lock(&self.state);
        let pieces = state.areas.pieces(range).ok_or(Errno::NOENT)?;
        let counted = Taken::some(&self.budget, pieces.len())?;
        let slice = |piece: Piece<'_, Area>| Slice {
            pages: Arc::clone(&piece.payload.source.pages),
            offset: piece.payload.source.offset + piece.offset,
            length: piece.range.length().unwrap_or(u64::MAX),
        };
        Ok((pieces.into_iter().map(slice).collect(), counted))
    }

    /// The IOVAs that nobody reserves, and the alignment of mappings in bytes.
    pub(crate) fn usable(&self) -> (Vec<IovaRange>, u64) {
        let state = lock(&self.state);
        (state.space.usable_ranges(), state.alignment())
    }

    /// Replaces where automatic placement is allowed.
    ///
    /// # Errors
    /// `EADDRINUSE` if a range is reserved; `ENOMEM` beyond the limit.
    pub(crate) fn set_allowed(&self, ranges: &[IovaRange]) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        self.budget.take(ranges.len())?;
        if let Err(error) = state.space.set_allowed(ranges) {
            self.budget.give_back(ranges.len());
            return Err(reserve_errno(error));
        }
        let before = std::mem::replace(&mut state.allowed, ranges.len());
        self.budget.give_back(before);
        Ok(())
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
        if state.test_reservations.len() >= RANGES_PER_IOAS {
            return Err(Errno::NOMEM);
        }
        self.budget.take(1)?;
        if let Err(error) = state.space.reserve(range, SELFTEST_OWNER) {
            self.budget.give_back(1);
            return Err(reserve_errno(error));
        }
        state.test_reservations.push(range);
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

    /// Unmaps everything, for good.
    pub(crate) fn clear(&self) {
        let mut state = lock(&self.state);
        self.depopulate(&mut state);
        let ranges = std::mem::take(&mut state.allowed) + std::mem::take(&mut state.test_reservations).len();
        self.budget.give_back(state.areas.len() + ranges);
        state.areas = Areas::new();
        state.space.unreserve(SELFTEST_OWNER);
    }

    /// Adds what the process of this identity has pinned here, in tables and by accesses. Areas that were copied from one another
    /// share their pages, of which each counts once.
    pub(crate) fn add_pinned(&self, process: u64, pinned: &mut PinnedMemory) {
        let state = lock(&self.state);
        let by_accesses: Vec<_> = state.accesses.iter().flat_map(|access| access.pinned()).collect();
        let in_tables = state.areas.iter().filter(|(_, area)| area.memory.is_some());
        let sources =
            in_tables.map(|(_, area)| &area.source).chain(by_accesses.iter().map(|piece| &piece.source));
        let mut runs: Vec<_> = sources
            .filter_map(|source| {
                let pays_itself = source.pages.is_pinned_by(process)?;
                let end = source.start().saturating_add(source.length).div_ceil(PAGE_SIZE);
                Some((Arc::as_ptr(&source.pages), source.start() / PAGE_SIZE, end, pays_itself))
            })
            .collect();
        runs.sort_unstable();
        let mut counted = None;
        for (pages, start, end, pays_itself) in runs {
            // Runs of the same pages ascend; what an earlier one has counted ends at its highest page.
            let done = counted.filter(|(of, _)| *of == pages).map_or(0, |(_, done)| done);
            let more = end.saturating_sub(start.max(done));
            counted = Some((pages, done.max(end)));
            pinned.pages += more;
            pinned.locked_pages += if pays_itself { more } else { 0 };
        }
    }

    /// What the address space holds, but for its number and its page table objects.
    pub(crate) fn status(&self, listing: &mut Listing) -> AddressSpaceStatus {
        let state = lock(&self.state);
        let shown = listing.take(state.areas.len().min(AddressSpaceStatus::AREAS_SHOWN));
        let areas = state.areas.iter().take(shown).map(|(range, area)| AreaStatus {
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
        let statistics = state.space.statistics();
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
