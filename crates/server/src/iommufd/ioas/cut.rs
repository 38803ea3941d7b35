//! Unmapping what type 1 allows to be unmapped: any range of pages, whatever areas it cuts.
//!
//! The engine's space cuts its leaves wherever it is asked to, so only the areas have to follow: what is left of one on
//! either side of the range becomes an area of its own. The parts go on sharing the one registration of the memory;
//! it gives back what goes ([`give_back`]), so that it is neither charged nor held any longer.

use ioasid::IovaRange;
use rustix::io::Errno;

use super::super::errno::unmap_errno;
use super::{Area, Ioas, Registered, Slice, give_back};
use crate::memory::PAGE_SIZE;
use crate::poison::lock;

impl Area {
    /// The first `length` bytes, and the rest.
    fn divided(self, length: u64) -> (Self, Self) {
        let Self { source: Slice { pages, offset, length: whole }, permissions, memory } = self;
        let part = |from: u64, length| Self {
            source: Slice { pages: pages.clone(), offset: offset + from, length },
            permissions,
            memory: memory.clone().map(|memory| Registered { offset: memory.offset + from, ..memory }),
        };
        (part(0, length), part(length, whole - length))
    }
}

impl Ioas {
    /// Unmaps what is mapped in `range`, of areas that reach over an end only the part inside; returns how many bytes
    /// that were. An area is cut between its pages, and not behind its first byte or in front of its last.
    ///
    /// # Errors
    /// `EINVAL`: an area would be cut within a page, or an access has pinned pages of it. `EOPNOTSUPP`: it is a dma-buf's. `ENOENT`: an area reaches over an end by all but one byte.
    /// `ENOMEM`: an area too many, or no memory for page tables. Nothing has changed.
    pub(crate) fn unmap_cutting(&self, range: IovaRange) -> Result<u64, Errno> {
        let mut state = lock(&self.state);
        let (before, behind) = (range.first().checked_sub(1), range.last().checked_add(1));
        let cut_behind = |at: u64| match state.areas.at(at) {
            Some((area, _)) if at == area.first() && area.first() != area.last() => Err(Errno::NOENT),
            Some((area, _)) if at == area.last() => Ok(None),
            Some((_, area)) if !area.source.pages.is_accessible() => Err(Errno::OPNOTSUPP),
            Some(_) if at % PAGE_SIZE != PAGE_SIZE - 1 => Err(Errno::INVAL),
            Some((area, _)) if state.accesses.iter().any(|access| access.has_pinned(area)) => {
                Err(Errno::INVAL)
            }
            found => Ok(found.map(|(area, _)| area)),
        };
        let sticks_out_behind = cut_behind(range.last())?;
        let sticks_out_before = before.map_or(Ok(None), cut_behind)?;
        let Some(hull) = state.areas.hull_in(range) else { return Ok(0) };
        let counted = state.areas.len();
        let divides_one = sticks_out_before.is_some() && sticks_out_before == sticks_out_behind;
        if divides_one {
            self.budget.take(1)?;
        }
        let watched = state.watched.clone();
        let changing: Vec<_> = watched.iter().map(|watched| watched.changing()).collect();
        if state.tables > 0 {
            if let Err(error) = state.space.unmap(hull) {
                self.budget.give_back(usize::from(divides_one));
                return Err(unmap_errno(error));
            }
        }
        for access in &state.accesses {
            access.let_go(hull);
        }
        if !watched.is_empty() {
            // Who watches knows of no cuts: whole areas go, and what is left of them comes anew.
            let touched = |at: Option<u64>| at.and_then(|at| state.areas.at(at)).map(|(area, _)| area);
            let inside = state.areas.iter().map(|(area, _)| area).filter(|area| range.covers(area));
            let mut gone: Vec<IovaRange> = inside
                .chain([touched(Some(range.first())), touched(Some(range.last()))].into_iter().flatten())
                .collect();
            gone.sort_unstable_by_key(IovaRange::first);
            gone.dedup();
            let with_permissions =
                gone.iter().filter_map(|gone| Some((*gone, state.areas.at(gone.first())?.1.permissions)));
            watched.iter().for_each(|watched| watched.unmapped(with_permissions.clone()));
        }
        let ends = [sticks_out_before.map(|_| range.first()), sticks_out_behind.and(behind)];
        for end in ends.into_iter().flatten() {
            state.areas.divide(end, Area::divided);
        }
        let found = state.areas.whole_areas_in(range).unwrap_or_default();
        let mut bytes = 0_u64;
        for range in found {
            bytes = bytes.saturating_add(range.length().unwrap_or(u64::MAX));
            if let Some(area) = state.areas.remove(range) {
                give_back(area);
            }
        }
        for left in
            [before.filter(|_| sticks_out_before.is_some()), behind.filter(|_| sticks_out_behind.is_some())]
        {
            if let Some((area, left)) = left.and_then(|at| state.areas.at(at)) {
                watched.iter().for_each(|watched| left.tell_mapped(area, watched));
            }
        }
        drop(changing);
        self.budget.give_back(counted + usize::from(divides_one) - state.areas.len());
        drop(state);
        self.wait_for_copies();
        Ok(bytes)
    }
}
