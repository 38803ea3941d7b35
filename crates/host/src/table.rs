//! A space's mappings as Linux has them: one I/O address space (IOAS) of an iommufd.
//!
//! # Areas
//!
//! A mapping has an area for each block of the size of the space's *cut granule* that it has a part in. Linux unmaps whole
//! areas only. So whatever begins and ends on multiples of the granule, or where a mapping did, can be unmapped exactly,
//! and a change that would have to cut an area is refused before anything happens. A range of any number of areas is
//! mapped by one call, if the memory was cut before (`cut` in the source says when it is), and unmapped by one call.
//!
//! # When Linux fails
//!
//! - **A map** that Linux refuses, early or late (no memory for page tables, the limit on locked memory), is taken back:
//!   what it had mapped of the range goes before the error is returned.
//! - **An unmap** must not fail: what calls it is about to give the memory away. Linux may be busy, so it is tried again
//!   for a while. If it still fails, nobody can say any more what the table says, and the devices on it are detached: they
//!   reach nothing at all, and the memory stays pinned by the kernel as long as it has the area. From then on the table
//!   is [broken](HostTable::broken): it refuses maps and devices. Everybody else goes on.
//!
//! # What is left to Linux
//!
//! Invalidation: an unmap returns when no device can use the translation any more. So the engine's `invalidate` has nothing
//! to do, and a deferred unmap is no cheaper than a strict one.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

use ioasid::{Attributes, Bus, Change, DerivedTable, IovaRange, Oa, PageSize, Runs, TableError};
use rustix::io::Errno;

use crate::areas::{Area, Areas};
use crate::host::Machine;
use crate::registered::{Registered, unmap_patiently};
use crate::{CallError, HostError};

const RIGHTS: Attributes = Attributes::READ.union(Attributes::WRITE);

/// A table of a space in the kernel.
pub struct HostTable {
    registered: Arc<Registered>,
    machine: Arc<Machine>,
    ioas: u32,
    areas: Areas,
    broken: OnceLock<CallError>,
}

impl fmt::Debug for HostTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostTable")
            .field("ioas", &self.ioas)
            .field("areas", &self.areas.count())
            .field("broken", &self.broken.get())
            .finish_non_exhaustive()
    }
}

/// What Linux unmaps as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedArea {
    /// Where it is mapped.
    pub range: IovaRange,
    /// The output address of its first byte.
    pub oa: Oa,
    /// What devices may do.
    pub attributes: Attributes,
}

impl HostTable {
    pub(crate) fn new(
        machine: Arc<Machine>,
        block: PageSize,
        bus: &Arc<Bus>,
    ) -> Result<HostTable, CallError> {
        let registered = machine.registered(bus)?;
        let ioas = machine.iommufd().alloc()?;
        let areas = Areas::new(block, machine.options().most_areas);
        Ok(HostTable { registered, machine, ioas, areas, broken: OnceLock::new() })
    }

    pub(crate) fn is_of(&self, machine: &Arc<Machine>) -> bool {
        Arc::ptr_eq(&self.machine, machine)
    }

    /// The number of the I/O address space in the iommufd.
    pub fn ioas(&self) -> u32 {
        self.ioas
    }

    /// Why the table is out of use, if it is: an unmap that Linux did not do. Its devices are detached.
    pub fn broken(&self) -> Option<CallError> {
        self.broken.get().copied()
    }

    /// How many areas there are.
    pub fn area_count(&self) -> u64 {
        self.areas.count()
    }

    /// What is mapped, area by area, in ascending order.
    pub fn areas(&self) -> Vec<MappedArea> {
        let mapped =
            |area: Area| MappedArea { range: area.range, oa: Oa::new(area.oa), attributes: area.rights };
        self.areas.all().into_iter().map(mapped).collect()
    }

    /// That the table can be used.
    pub(crate) fn usable(&self) -> Result<(), HostError> {
        self.broken().map_or(Ok(()), |error| Err(HostError::Broken(error)))
    }

    /// Maps a range that is free, in areas of a block each, or nothing.
    fn map_free(&self, range: IovaRange, oa: u64, rights: Attributes) -> Result<(), TableError> {
        let refused = |error: HostError| TableError::Refused(Box::new(error));
        self.usable().map_err(refused)?;
        let Some(areas) = self.areas.count_in(range) else {
            return Err(refused(HostError::TooManyAreas { most: self.machine.options().most_areas }));
        };
        let entered = self.registered.enter(self.ioas, range, Oa::new(oa), rights, self.areas.block());
        if let Err(error) = entered {
            self.areas.count_out(areas);
            self.take_away(range, true);
            return Err(refused(error));
        }
        let whole = Area { range, oa, rights };
        for part in self.areas.in_blocks(range) {
            self.areas.insert(Area { range: part, oa: whole.output(part.first()), rights });
        }
        Ok(())
    }

    /// Unmaps all areas in a range. `unsure`: maybe Linux has none.
    fn take_away(&self, range: IovaRange, unsure: bool) {
        let result = unmap_patiently(self.machine.iommufd(), self.ioas, range);
        self.areas.remove(range);
        match result {
            Ok(()) => {}
            Err(error) if unsure && error.errno == Errno::NOENT => {}
            Err(error) => self.fail(error),
        }
    }

    /// Nobody knows what devices reach by this table: they shall reach nothing.
    #[cold]
    fn fail(&self, error: CallError) {
        // Who attaches a device from now on sees it, and who was faster is seen below.
        let _ = self.broken.set(error);
        self.machine.detach_all_from(self.ioas);
    }
}

impl DerivedTable for HostTable {
    fn map(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        self.map_free(range, oa.get(), attributes & RIGHTS)
    }

    fn fill(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        let rights = attributes & RIGHTS;
        let whole = Area { range, oa: oa.get(), rights };
        for block in self.areas.in_blocks(range) {
            let mut free = Some(block.first());
            let mut gaps: Vec<IovaRange> = Vec::new();
            for area in self.areas.in_block(block) {
                let at = area.range.first().max(block.first());
                if area.rights != rights || area.output(at) != whole.output(at) {
                    return Err(TableError::DoesNotFit { range: area.range });
                }
                gaps.extend(free.and_then(|free| IovaRange::new(free, at.checked_sub(1)?)));
                free = area.range.last().checked_add(1);
            }
            gaps.extend(free.and_then(|free| IovaRange::new(free, block.last())));
            for gap in gaps {
                self.map_free(gap, whole.output(gap.first()), rights)?;
            }
        }
        Ok(())
    }

    fn check(&self, range: IovaRange, change: Change) -> Result<(), TableError> {
        for at in std::iter::once(range.first()).chain(range.last().checked_add(1)) {
            self.cut(at)?;
        }
        let differs = |area: &Area| match change {
            Change::Unmap => false,
            Change::Protect(permissions) => area.rights != permissions & RIGHTS,
            Change::Remap(oa, attributes) => {
                let wanted = Area { range, oa: oa.get(), rights: attributes & RIGHTS };
                area.rights != wanted.rights || area.oa != wanted.output(area.range.first())
            }
        };
        if change == Change::Unmap {
            return Ok(());
        }
        match self.areas.find(range, differs) {
            Some(area) => Err(TableError::NeedsBreak { at: area.range.first() }),
            None => Ok(()),
        }
    }

    fn reaches_over(&self, at: u64) -> bool {
        self.areas.across(at).is_some()
    }

    fn cut(&self, at: u64) -> Result<(), TableError> {
        if self.reaches_over(at) { Err(TableError::CannotCut { at }) } else { Ok(()) }
    }

    fn unmap(&self, range: IovaRange) {
        if self.areas.any(range) {
            self.take_away(range, false);
        }
    }

    fn protect(&self, range: IovaRange, permissions: Attributes) -> Result<(), TableError> {
        // What is as it shall be can stay.
        self.check(range, Change::Protect(permissions))
    }

    fn remap(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError> {
        self.check(range, Change::Remap(oa, attributes))
    }

    fn invalidate(&self, _runs: &Runs) {
        // Linux has done so before an unmap returned.
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for HostTable {
    fn drop(&mut self) {
        // No device is attached any more, and what is mapped goes with the address space.
        let destroyed = self.machine.iommufd().destroy(self.ioas);
        debug_assert!(destroyed.is_ok() || self.broken.get().is_some(), "{destroyed:?}");
    }
}
