//! Tables over an address space: the first brings all areas into the engine's space, the last takes them out again.
//!
//! What an area needs for that is registered memory, which is charged and held, and a granule of the engine's space that the table
//! can follow. All areas are there with a table, or the table is not made.

use std::sync::{Arc, Weak};

use ioasid::pagetable::Native;
use ioasid::{Device, Iova, IovaRange, Requirements, Space, Table, TableClass};
use rustix::io::Errno;

use super::super::areas::Areas;
use super::super::errno::{attach_errno, map_errno, reserve_errno};
use super::super::hwpt::Hwpt;
use super::super::objects::Held;
use super::super::testing;
use super::{Area, Ioas, Registered, SELFTEST_OWNER, State};
use crate::limits::{Budget, Taken};
use crate::memory::PAGE_SIZE;
use crate::poison::lock;

/// Registered memory remembers where each GiB of it is. Beyond the first few, so many bytes of it count as an area.
const BYTES_COUNTED_AS_AREA: u64 = 64 << 30;

/// What a table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TableUse {
    /// Every device of the class that attaches to the space.
    Shared,
    /// Whoever names it.
    Own,
}

impl State {
    /// Makes the engine's space have a granule that a table of this class can follow. Native tables follow any.
    ///
    /// # Errors
    /// `EINVAL`: there are tables that could not. `EADDRINUSE`, never: what was reserved and allowed goes together.
    fn set_granule(&mut self, class: TableClass) -> Result<(), Errno> {
        let wanted = testing::mock::granule(class);
        if self.space.granule() == wanted {
            return Ok(());
        }
        if self.tables > 0 {
            return if class == TableClass::NATIVE { Ok(()) } else { Err(Errno::INVAL) };
        }
        let format = Native::new().with_granule(wanted).ok_or(Errno::INVAL)?;
        let space = Space::with_format(self.space.bus(), format);
        space.set_allowed(&self.space.allowed_ranges()).map_err(reserve_errno)?;
        for range in &self.test_reservations {
            space.reserve(*range, SELFTEST_OWNER).map_err(reserve_errno)?;
        }
        self.space = space;
        Ok(())
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

/// Whether no area lies where the table cannot have one, and if it is made for attaching the device, where that cannot. The
/// engine finds out too, but only when all of the memory is registered and mapped.
fn fits(areas: &Areas<Area>, requirements: &Requirements, table_use: TableUse) -> bool {
    let aperture = requirements.aperture;
    let below = aperture.first().checked_sub(1).and_then(|last| IovaRange::new(0, last));
    let above = aperture.last().checked_add(1).and_then(|first| IovaRange::new(first, u64::MAX));
    let reserved = requirements.reserved.iter().copied().filter(|_| table_use == TableUse::Shared);
    let mut forbidden = reserved.chain(below).chain(above);
    !forbidden.any(|range| areas.overlaps(range))
}

/// Registers areas and maps them in the engine's space: all, or none.
pub(super) fn populate<'a>(
    space: &Arc<Space>,
    budget: &Arc<Budget>,
    areas: impl Iterator<Item = (IovaRange, &'a mut Area)>,
) -> Result<(), Errno> {
    let mut done: Vec<(IovaRange, &mut Area)> = Vec::new();
    let mut result = Ok(());
    for (range, area) in areas {
        match populate_one(space, budget, range, area) {
            Ok(()) => done.push((range, area)),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    if result.is_err() {
        for (range, area) in done {
            forget_memory(space, range, area);
        }
    }
    result
}

fn populate_one(
    space: &Arc<Space>,
    budget: &Arc<Budget>,
    range: IovaRange,
    area: &mut Area,
) -> Result<(), Errno> {
    let source = &area.source;
    if source.pages.is_revoked() {
        return Ok(());
    }
    let counted = match usize::try_from(source.length / BYTES_COUNTED_AS_AREA).unwrap_or(usize::MAX) {
        0 => None,
        count => Some(Arc::new(Taken::some(budget, count)?)),
    };
    let memory = source.pages.register(source.offset, source.length)?;
    space.map(Iova::new(range.first()), &memory, 0, source.length, area.permissions).map_err(map_errno)?;
    area.memory = Some(Registered { memory, offset: 0, _counted: counted });
    Ok(())
}

fn forget_memory(space: &Arc<Space>, range: IovaRange, area: &mut Area) {
    if let Err(error) = space.unmap(range) {
        tracing::error!(%range, ?error, "the engine did not unmap an area");
    }
    area.memory = None;
}

impl Ioas {
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
        state.set_granule(device.requirements().class)?;
        let alignment = testing::mock::alignment(device.requirements().class);
        if alignment > state.alignment() && !state.all_aligned(alignment) {
            return Err(Errno::ADDRINUSE);
        }
        if first {
            if !fits(&state.areas, device.requirements(), table_use) {
                return Err(Errno::ADDRINUSE);
            }
            let State { space, areas, .. } = &mut *state;
            populate(space, &self.budget, areas.iter_mut())?;
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
            TableUse::Shared => Table::for_device(&state.space, device),
            TableUse::Own => Table::new(&state.space, device),
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

    pub(super) fn depopulate(&self, state: &mut State) {
        if state.areas.is_empty() {
            return;
        }
        if let Err(error) = state.space.unmap(IovaRange::ALL) {
            tracing::error!(?error, "the engine did not unmap an address space without tables");
        }
        for (_, area) in state.areas.iter_mut() {
            area.memory = None;
        }
    }
}
