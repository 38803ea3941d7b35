//! Changing permissions in place.
//!
//! 1. The leaves of the range are [held](super::held), cut exactly at its ends.
//! 2. Every derived table changes its leaves, and the native table's follow. A device sees a leaf's old permissions or
//!    the new, never a hole.
//! 3. What devices remember is invalidated, and if a right was taken away, the DMA that had begun with it is waited for.
//!
//! If a table refuses, those before it go back to what the native table still says.

use super::held::{Held, Portion};
use super::unmap::{ALL_RIGHTS, Settled};
use super::{Permissions, Space};
use crate::iommu::{Change, DerivedTable, TableError};
use crate::slice::StillBorrowed;
use ioasid_pagetable::{Attributes, CutError, Iova, IovaRange, Leaf, Oa, PageSize, Runs, Span};
use std::sync::Arc;

/// Why no permission was changed.
#[derive(Debug, thiserror::Error)]
pub enum ProtectError {
    /// An end of the range is not on a multiple of the granule.
    #[error("{range} does not begin and end on multiples of {granule}")]
    Misaligned {
        /// The range asked for.
        range: IovaRange,
        /// The granule of the space.
        granule: PageSize,
    },
    /// Nobody could use what is mapped.
    #[error("a mapping must be readable or writable")]
    NoPermission,
    /// No memory for the tables that a cut needs.
    #[error("no memory for another table page")]
    OutOfTables,
    /// A derived table refused. [`TableError::NeedsBreak`]: what is mapped there has to be unmapped and mapped again.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A device model has borrowed some of it for what would be taken away, and does not let go.
    #[error(transparent)]
    Borrowed(#[from] StillBorrowed),
}

/// What holding leaves, and cutting the native table for it, can fail of.
pub(super) enum NativeCut {
    Borrowed(StillBorrowed),
    OutOfTables,
    Table(TableError),
}

impl From<StillBorrowed> for NativeCut {
    fn from(error: StillBorrowed) -> NativeCut {
        NativeCut::Borrowed(error)
    }
}

impl From<CutError> for NativeCut {
    fn from(error: CutError) -> NativeCut {
        match error {
            CutError::OutOfTables(_) => NativeCut::OutOfTables,
            CutError::NeedsBreak { at, .. } | CutError::Contended { at } | CutError::Misaligned { at } => {
                NativeCut::Table(TableError::CannotCut { at })
            }
        }
    }
}

/// No leaf is larger.
const ANY_SIZE: Option<PageSize> = PageSize::from_log2(63);

/// Leaves that follow each other in every respect.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub(super) range: IovaRange,
    pub(super) oa: Oa,
    pub(super) attributes: Attributes,
}

impl Stretch {
    /// The part of a leaf that lies in a range.
    fn of(leaf: &Leaf, within: IovaRange) -> Option<Stretch> {
        let range = leaf.range().intersection(&within)?;
        Some(Stretch { range, oa: leaf.output(range.first()), attributes: leaf.attributes })
    }

    /// Both as one.
    pub(super) fn joined(self, next: Stretch) -> Option<Stretch> {
        let follows = self.range.last().checked_add(1) == Some(next.range.first())
            && self.oa.checked_add(self.range.last() - self.range.first()).and_then(|oa| oa.checked_add(1))
                == Some(next.oa)
            && self.attributes == next.attributes;
        let range = IovaRange::new(self.range.first(), next.range.last()).filter(|_| follows)?;
        Some(Stretch { range, ..self })
    }
}

impl Held<'_> {
    /// What the native table says of the held leaves within a range, in as few pieces as possible.
    pub(super) fn stretches(&self, within: IovaRange) -> impl Iterator<Item = Stretch> + '_ {
        let runs = self.runs().iter().filter_map(move |run| run.intersection(&within));
        let spans = runs.flat_map(move |run| self.native().cursor(run).map(move |span| (run, span)));
        let mut leaves = spans
            .filter_map(|(run, span)| match span {
                Span::Leaf(leaf) => Stretch::of(&leaf, run),
                Span::Hole(_) => None,
            })
            .peekable();
        std::iter::from_fn(move || {
            let mut stretch = leaves.next()?;
            while let Some(joined) = leaves.peek().and_then(|next| stretch.joined(*next)) {
                stretch = joined;
                leaves.next();
            }
            Some(stretch)
        })
    }

    /// Carries out a change of the held leaves in every derived table or in none: then it is undone, stretch by stretch of
    /// what the native table says, and what devices may have used meanwhile is over when this returns.
    pub(super) fn change_followers(
        &mut self,
        change: impl Fn(&dyn DerivedTable) -> Result<(), (TableError, Option<IovaRange>)>,
        undo: impl Fn(&dyn DerivedTable, Stretch) -> Result<(), TableError>,
    ) -> Result<(), TableError> {
        let Some(layout) = self.layout() else { return Ok(()) };
        let tables: Vec<_> = layout.derived().cloned().collect();
        self.make_way_back(&tables)?;
        for (position, table) in tables.iter().enumerate() {
            let Err((error, done)) = change(&**table) else { continue };
            let all = self.runs().iter().next().zip(self.runs().iter().next_back());
            let all = all.and_then(|(first, last)| IovaRange::new(first.first(), last.last()));
            let earlier = tables.iter().take(position).map(|table| (table, all));
            for (table, changed) in earlier.chain([(table, done)]) {
                for stretch in changed.into_iter().flat_map(|changed| self.stretches(changed)) {
                    // It held this before, so it can again.
                    let undone = undo(&**table, stretch);
                    debug_assert!(undone.is_ok(), "{undone:?}");
                }
                // The one that failed may have begun.
                table.invalidate(self.runs());
            }
            self.wait_for_dma();
            return Err(error);
        }
        Ok(())
    }

    /// Cuts the derived tables wherever what the native table says changes from one page to the next: a format that cannot
    /// tell two permissions apart may have one leaf for both, and to go back to two after a change would take memory.
    fn make_way_back(&self, tables: &[Arc<dyn DerivedTable>]) -> Result<(), TableError> {
        if tables.is_empty() {
            return Ok(());
        }
        let mut before: Option<Stretch> = None;
        for stretch in self.stretches(IovaRange::ALL) {
            let at = stretch.range.first();
            let changes = before.replace(stretch).is_some_and(|before| {
                before.range.last().checked_add(1) == Some(at) && before.attributes != stretch.attributes
            });
            for table in tables.iter().filter(|table| changes && table.reaches_over(at)) {
                table.cut(at)?;
            }
        }
        Ok(())
    }

    /// Tells the devices behind every derived table that the held leaves have changed.
    pub(super) fn invalidate(&self) {
        for table in self.layout().into_iter().flat_map(|layout| layout.derived()) {
            table.invalidate(self.runs());
        }
    }

    /// Tells the devices behind one table that the held leaves in the range have changed.
    pub(super) fn invalidate_in(&self, table: &dyn DerivedTable, within: IovaRange) {
        let mut runs = Runs::default();
        self.runs().iter().filter_map(|run| run.intersection(&within)).for_each(|run| runs.push(run));
        if !runs.is_empty() {
            table.invalidate(&runs);
        }
    }
}

impl Space {
    /// Gives all that is mapped in the range these permissions, in place; where nothing is mapped nothing happens. How
    /// many bytes were mapped there (saturates at 2^64 - 1).
    ///
    /// At no moment a device finds nothing. When it returns, no device uses a right that was taken away: what devices
    /// remembered is invalidated, and DMA that had begun has ended.
    pub fn protect(&self, range: IovaRange, permissions: Permissions) -> Result<u64, ProtectError> {
        if !range.is_aligned(self.granule()) {
            return Err(ProtectError::Misaligned { range, granule: self.granule() });
        }
        if permissions == Permissions::of(Attributes::empty()) {
            return Err(ProtectError::NoPermission);
        }
        let portion = Portion { range, largest: ANY_SIZE };
        let attributes = permissions.attributes();
        self.check_change(range, Change::Protect(attributes))?;
        let taken = ALL_RIGHTS.difference(attributes);
        let held = self.hold_unborrowed(range, taken, || std::iter::once(portion));
        let (mut held, _recalled) = held.map_err(|error| match error {
            NativeCut::Borrowed(error) => error.into(),
            NativeCut::OutOfTables => ProtectError::OutOfTables,
            NativeCut::Table(error) => error.into(),
        })?;
        let runs = held.runs().clone();
        held.change_followers(
            |table| {
                let mut done = None;
                for run in runs.iter() {
                    table.protect(run, attributes).map_err(|error| (error, done))?;
                    done = IovaRange::new(range.first(), run.last());
                }
                Ok(())
            },
            |table, stretch| table.protect(stretch.range, stretch.attributes),
        )?;
        let narrower =
            held.stretches(range).any(|old| !permissions.contains(Permissions::of(old.attributes)));
        for run in runs.iter() {
            self.native.protect_held(run, attributes);
        }
        if !runs.is_empty() {
            held.invalidate();
        }
        if narrower {
            held.wait_for_dma();
        }
        Ok(runs.bytes())
    }

    /// Asks all derived tables whether they can make a change, before anything is cut for it. Where somebody is at work, that
    /// is found out in time.
    pub(super) fn check_change(&self, range: IovaRange, change: Change) -> Result<(), TableError> {
        match self.refused_by(&self.layout.read(), range, change) {
            Some((error, Settled(true))) => Err(error),
            _ => Ok(()),
        }
    }

    /// What is mapped at an address: the whole leaf that translates it.
    pub fn query(&self, iova: Iova) -> Option<super::Mapped> {
        self.walk(iova).map(|leaf| super::Mapped::of(&leaf))
    }
}
