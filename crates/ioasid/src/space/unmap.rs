//! Unmapping: exactly the range, whatever leaves it was mapped with.
//!
//! 0. Device models that have borrowed some of the range are asked to let go (`slice.rs`). Nearly always nobody has.
//! 1. The ends of the range are made boundaries between leaves, in the native and in every derived table. All that
//!    can fail happens here, and nothing has changed for anybody.
//! 2. The native leaves are retracted, present to busy. They translate no more, and nobody can map there yet. The
//!    ends of the derived tables are looked at once more: until now somebody else could have mapped across them.
//! 3. The derived tables are emptied and invalidated.
//! 4. Whatever DMA had begun before is waited for. That may take as long as the owner of late-bound memory likes,
//!    so it happens outside of the section that changes of any space's layout have to wait for; the busy entries
//!    are enough to keep everybody else away.
//! 5. The native entries are released, busy to absent.
//!
//! When that is done no device reaches the memory, and its owner may do with it what it likes.
//!
//! # Meeting another operation
//!
//! An unmap that meets a busy leaf has to leave its section and wait. What it has retracted by then would be
//! missing in a table that is attached meanwhile, if it had to be given back later. So the first time it gives
//! back at once; then it shuts out changes of the layout, starts again, and keeps what it gets, so that it ends
//! even if others never stop mapping and unmapping small pieces of a large range.

use super::Space;
use super::layout::Layout;
use crate::epoch;
use crate::iommu::{Change, TableError};
use crate::memory::Piece;
use crate::slice::{Recalled, SLICE_PATIENCE, StillBorrowed};
use crate::sync::Instant;
use ioasid_pagetable::{
    Attributes, CutError, Gather, HeapTables, IovaRange, Leaf, PageSize, RetractError, Runs,
};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;

/// What an unmap took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unmapped {
    runs: Runs,
    leaves: u64,
}

impl Unmapped {
    /// The ranges that were mapped, ascending, neighbours joined.
    pub fn runs(&self) -> impl Iterator<Item = IovaRange> + '_ {
        self.runs.iter()
    }

    /// How many bytes were mapped; saturates at 2^64 - 1.
    pub fn bytes(&self) -> u64 {
        self.runs.bytes()
    }

    /// How many leaves of the native table that took.
    pub fn leaves(&self) -> u64 {
        self.leaves
    }
}

/// Why nothing was unmapped.
#[derive(Debug, thiserror::Error)]
pub enum UnmapError {
    /// An end of the range is not on a multiple of the granule.
    #[error("{range} does not begin and end on multiples of {granule}")]
    Misaligned {
        /// The range asked for.
        range: IovaRange,
        /// The granule of the space.
        granule: PageSize,
    },
    /// The space keeps [mappings whole](super::MappingPolicy), and an end of the range lies in one.
    #[error("{mapping} is a mapping that would be cut, and is unmapped whole or not at all")]
    CutsMapping {
        /// The mapping.
        mapping: IovaRange,
    },
    /// No memory for the tables that a cut needs.
    #[error("no memory for another table page")]
    OutOfTables,
    /// A derived table refused to be cut.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A device model has borrowed some of it and does not let go.
    #[error(transparent)]
    Borrowed(#[from] StillBorrowed),
}

/// Who waits for the DMA that had begun before, and for device models that have borrowed the range.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// The unmap itself; it fails if a slice is not given back.
    Strict,
    /// The next flush waits for DMA.
    Deferred,
    /// As strict; but what is not given back in time is unmapped all the same, because the memory goes.
    AtAnyPrice,
}

/// Whether nobody is at work at a place, so that what is found there is no step of something else.
pub(super) struct Settled(pub(super) bool);

/// What an unmap takes away.
pub(super) const ALL_RIGHTS: Attributes = Attributes::READ.union(Attributes::WRITE);

/// Why a step has to be tried again or given up.
enum Step {
    /// Another operation was at work in the range.
    Contended,
    /// Something was mapped in a hole of the range after it had been passed.
    Overtaken,
    Failed(UnmapError),
}

impl From<CutError> for Step {
    fn from(error: CutError) -> Step {
        match error {
            CutError::Contended { .. } => Step::Contended,
            CutError::OutOfTables(_) => Step::Failed(UnmapError::OutOfTables),
            CutError::NeedsBreak { at, .. } | CutError::Misaligned { at } => {
                Step::Failed(TableError::CannotCut { at }.into())
            }
        }
    }
}

impl From<RetractError> for Step {
    fn from(error: RetractError) -> Step {
        match error {
            RetractError::Contended { .. } => Step::Contended,
            RetractError::Cut(error) => error.into(),
        }
    }
}

impl Space {
    /// Unmaps exactly the range. Where nothing is mapped nothing happens, and what was mapped is reported.
    ///
    /// When it returns, no device reaches the memory that was mapped there.
    pub fn unmap(&self, range: IovaRange) -> Result<Unmapped, UnmapError> {
        self.unmap_wanted(range, None, Manner::Strict)
    }

    /// The same without waiting for devices: DMA that had begun before may reach the memory until the next
    /// [`flush`](Self::flush), which comes by itself after at most [`DEFERRED_TIME`](super::DEFERRED_TIME), and when
    /// [`DEFERRED_RANGES`](super::DEFERRED_RANGES) are waiting for it.
    ///
    /// Until then nothing else gets the addresses, and dropping the [`Memory`](crate::Memory) waits; but memory that stays
    /// registered must not be given to anybody else before the flush.
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, Space};
    /// # let bus = Bus::new();
    /// # let memory = Memory::register(&Backing::anonymous(&bus, 1 << 20)?, 0, 1 << 20, &Account::new("guest", None))?;
    /// # let space = Space::new(&bus);
    /// space.map(Iova::new(0), &memory, 0, 0x2000, Permissions::READ_WRITE)?;
    /// space.unmap_deferred(IovaRange::with_length(0x1000, 0x1000).unwrap())?;
    /// assert!(space.walk(Iova::new(0x1000)).is_none());
    /// space.flush();
    /// // Now no device can be using the second page any more.
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unmap_deferred(&self, range: IovaRange) -> Result<Unmapped, UnmapError> {
        self.unmap_wanted(range, None, Manner::Deferred)
    }

    /// The same, for the leaves alone that `wanted` says yes to.
    fn unmap_wanted(
        &self,
        range: IovaRange,
        wanted: Option<&dyn Fn(&Leaf) -> bool>,
        manner: Manner,
    ) -> Result<Unmapped, UnmapError> {
        if !range.is_aligned(self.granule()) {
            return Err(UnmapError::Misaligned { range, granule: self.granule() });
        }
        let mut gather = Gather::new();
        let mut rest = range;
        let mut tries = 0;
        let mut unchanging = None;
        // Asked before anything is retracted, so that devices notice nothing of an unmap that fails.
        let mut recalled = self.recall(range, ALL_RIGHTS, manner)?;
        loop {
            let layout = self.layout.read();
            match self.cut_and_retract(range, wanted, &mut rest, &layout, &mut gather) {
                Ok(()) if recalled.is_none() && self.slices.any(range, ALL_RIGHTS) => {
                    self.give_back(&mut gather);
                    rest = range;
                    drop(layout);
                    drop(unchanging.take());
                    recalled = self.recall(range, ALL_RIGHTS, manner)?;
                }
                Ok(()) => {
                    drop(unchanging);
                    self.settle(layout, &mut gather, manner);
                    return Ok(Unmapped { runs: gather.runs, leaves: gather.leaves });
                }
                Err(Step::Contended) => {
                    let keep = unchanging.is_some();
                    let lock = !keep && !gather.runs.is_empty();
                    if lock {
                        self.give_back(&mut gather);
                        rest = range;
                    }
                    drop(layout);
                    self.step_aside(&mut tries);
                    if lock {
                        unchanging = Some(self.changing());
                    }
                }
                Err(Step::Overtaken) => {
                    self.give_back(&mut gather);
                    rest = range;
                }
                Err(Step::Failed(error)) => {
                    self.give_back(&mut gather);
                    return Err(error);
                }
            }
        }
    }

    /// Gets back what is borrowed of these rights in the range, and lets nobody borrow them meanwhile; `None`: there was
    /// nothing. Outside of all sections.
    pub(super) fn recall(
        &self,
        range: IovaRange,
        rights: Attributes,
        manner: Manner,
    ) -> Result<Option<Recalled<'_>>, StillBorrowed> {
        if !self.slices.any(range, rights) {
            return Ok(None);
        }
        match self.slices.recall(range, rights, Instant::now() + SLICE_PATIENCE) {
            Ok(recalled) => Ok(Some(recalled)),
            Err((recalled, _)) if manner == Manner::AtAnyPrice => Ok(Some(recalled)),
            Err((_, error)) => Err(error),
        }
    }

    /// Steps 1 and 2, for what is left of the range. What was retracted is in the gather.
    fn cut_and_retract(
        &self,
        range: IovaRange,
        wanted: Option<&dyn Fn(&Leaf) -> bool>,
        rest: &mut IovaRange,
        layout: &Layout,
        gather: &mut Gather<HeapTables, AtomicU64>,
    ) -> Result<(), Step> {
        let whole = wanted.is_none() && self.policy.whole_only;
        if gather.runs.is_empty() {
            self.refuse_to_cut(whole, range)?;
            // What one table cannot do is known before another one is cut for it.
            self.check_tables(layout, range, Change::Unmap)?;
            self.native.cut_claimed(range)?;
            self.cut_unowned(range, layout)?;
        }
        let retracted = match wanted {
            None => self.native.retract(*rest, gather),
            Some(wanted) => self.native.retract_if(*rest, wanted, gather),
        };
        match retracted {
            Ok(()) => {}
            Err(RetractError::Contended { at }) => {
                *rest = IovaRange::new(at.max(rest.first()), rest.last()).unwrap_or(*rest);
                return Err(Step::Contended);
            }
            Err(RetractError::Cut(error)) => return Err(error.into()),
        }
        if wanted.is_none() && self.came_behind_us(range, &gather.runs) {
            return Err(Step::Overtaken);
        }
        // What stood at the ends may be another mapping by now; from here on it stays. To name it takes another look.
        if whole && self.cut_by(range).is_some() {
            return Err(Step::Overtaken);
        }
        // The tables may have changed since, and what was a hole may not be one any more. The outermost ends of what was
        // retracted are all that a leaf can reach over, and they are ours.
        let ends = (gather.runs.iter().next(), gather.runs.iter().next_back());
        if let (Some(head), Some(tail)) = ends {
            for at in core::iter::once(head.first()).chain(tail.last().checked_add(1)) {
                Self::cut_derived(at, layout)?;
            }
        }
        Ok(())
    }

    /// Refuses to cut a mapping in a space that keeps them whole.
    fn refuse_to_cut(&self, whole: bool, range: IovaRange) -> Result<(), Step> {
        let Some(mapping) = whole.then(|| self.cut_by(range)).flatten() else { return Ok(()) };
        // What another unmap has retracted is no mapping any more, unless it has to give it back.
        let places = [mapping.first(), mapping.last(), range.first(), range.last()];
        if places.into_iter().all(|at| self.is_settled(at)) {
            return Err(Step::Failed(UnmapError::CutsMapping { mapping }));
        }
        Err(Step::Contended)
    }

    /// Whether nobody is at work at an address. Inside an operation.
    fn is_settled(&self, at: u64) -> bool {
        let mut settled = true;
        if let Some(page) = IovaRange::new(at, at) {
            self.native.settled(page, |_, leaf| {
                settled = leaf.is_some();
                ControlFlow::Break(())
            });
        }
        settled
    }

    /// Asks all derived tables whether they can do that.
    fn check_tables(&self, layout: &Layout, range: IovaRange, change: Change) -> Result<(), Step> {
        match self.refused_by(layout, range, change) {
            Some((_, Settled(false))) => Err(Step::Contended),
            Some((error, _)) => Err(Step::Failed(error.into())),
            None => Ok(()),
        }
    }

    /// Why a derived table cannot make a change, if one cannot, and whether nobody is at work where that is.
    pub(super) fn refused_by(
        &self,
        layout: &Layout,
        range: IovaRange,
        change: Change,
    ) -> Option<(TableError, Settled)> {
        let error = layout.derived().find_map(|table| table.check(range, change).err())?;
        let at = match error {
            TableError::CannotCut { at } | TableError::NeedsBreak { at } => at,
            _ => range.first(),
        };
        let sides = [Some(at), at.checked_sub(1)];
        let settled = sides.into_iter().flatten().all(|side| self.is_settled(side));
        Some((error, Settled(settled)))
    }

    /// Cuts the derived tables at the ends of a range before anything is retracted, so that an unmap which cannot be
    /// carried out has disturbed nobody. Whoever cuts must have a page on one side of the cut: it is held meanwhile,
    /// and goes on translating.
    fn cut_unowned(&self, range: IovaRange, layout: &Layout) -> Result<(), Step> {
        let inside_and_outside = [
            (range.first(), Some(range.first()), range.first().checked_sub(1)),
            (range.last().wrapping_add(1), Some(range.last()), range.last().checked_add(1)),
        ];
        for (at, inside, outside) in inside_and_outside {
            // No leaf reaches over the end of everything.
            if at == 0 || !layout.derived().any(|table| table.reaches_over(at)) {
                continue;
            }
            for page in inside.into_iter().chain(outside).filter_map(|page| IovaRange::new(page, page)) {
                let Some(leaf) = self.native.hold(page)? else { continue };
                let result = Self::cut_derived(at, layout);
                self.native.let_go(&leaf);
                result?;
                break;
            }
        }
        Ok(())
    }

    /// Cuts the derived tables at one place, of which the caller has the page on either side.
    fn cut_derived(at: u64, layout: &Layout) -> Result<(), Step> {
        for table in layout.derived().filter(|table| table.reaches_over(at)) {
            table.cut(at).map_err(|error| Step::Failed(error.into()))?;
        }
        Ok(())
    }

    /// Whether a mapping has come into a hole of the range. A part of the same mapping may have been retracted
    /// further on, and then only starting again makes it go as a whole.
    fn came_behind_us(&self, range: IovaRange, retracted: &Runs) -> bool {
        if range.length() == Some(retracted.bytes()) {
            return false;
        }
        let mut came = false;
        self.native.leaves(range, |_| {
            came = true;
            ControlFlow::Break(())
        });
        came
    }

    /// What was retracted translates again, as if nothing had been.
    fn give_back(&self, gather: &mut Gather<HeapTables, AtomicU64>) {
        for run in std::mem::take(&mut gather.runs).iter() {
            self.native.publish(run);
        }
        gather.leaves = 0;
    }

    /// Steps 3 to 5.
    fn settle(
        &self,
        layout: epoch::Reading<'_, Layout>,
        gather: &mut Gather<HeapTables, AtomicU64>,
        manner: Manner,
    ) {
        if !gather.runs.is_empty() {
            for table in layout.derived() {
                for run in gather.runs.iter() {
                    table.unmap(run);
                }
                if manner != Manner::Deferred {
                    table.invalidate(&gather.runs);
                }
            }
            self.count_out_runs(&gather.runs);
            let waits = layout.table_count() > 0;
            drop(layout);
            if waits {
                if manner == Manner::Deferred {
                    if self.defer(&gather.runs) {
                        epoch::retire(std::mem::take(&mut gather.retired));
                        self.begin_behind_runs(&gather.runs);
                        return;
                    }
                    self.invalidate(&gather.runs);
                }
                epoch::wait_for_dma();
                self.sleeping.wait();
            }
        }
        let operation = epoch::operation();
        let runs = gather.runs.clone();
        for run in runs.iter() {
            self.native.release(run, gather);
            self.propose_again(run);
        }
        epoch::retire(std::mem::take(&mut gather.retired));
        drop(operation);
        self.begin_behind_runs(&runs);
    }

    /// Unmaps every leaf within `hull` that leads to one of the pieces of memory, which are about to go. The
    /// pieces are in ascending order of their output addresses. `false`: a deadline has passed, and whoever is at work there
    /// may still lead to them.
    pub(crate) fn unmap_outputs(&self, hull: IovaRange, pieces: &[Piece], deadline: Option<Instant>) -> bool {
        let unmapped = self.unmap_found(hull, pieces, deadline, |range| {
            self.unmap_at_any_price(range, pieces);
            Ok(())
        });
        matches!(unmapped, Ok(true))
    }

    /// The same, but nothing else. On an error some of the leaves may have been unmapped.
    pub(crate) fn unmap_outputs_exactly(&self, hull: IovaRange, pieces: &[Piece]) -> Result<(), UnmapError> {
        let wanted = |leaf: &Leaf| pieces_under(leaf, pieces).next().is_some();
        self.unmap_found(hull, pieces, None, |range| {
            self.unmap_wanted(range, Some(&wanted), Manner::Strict).map(drop)
        })
        .map(drop)
    }

    /// Has every range unmapped that leads to one of the pieces, until there is none, or a deadline has passed; whether
    /// there is none.
    fn unmap_found(
        &self,
        hull: IovaRange,
        pieces: &[Piece],
        deadline: Option<Instant>,
        mut unmap: impl FnMut(IovaRange) -> Result<(), UnmapError>,
    ) -> Result<bool, UnmapError> {
        // Devices may still reach what was unmapped without waiting for them.
        self.flush();
        let mut unknown = vec![hull];
        let mut tries = 0;
        while !unknown.is_empty() {
            let (found, busy) = self.leading_to(&unknown, pieces);
            for range in found.iter() {
                unmap(range)?;
            }
            // Another unmap may be about to end, or to give its leaves back. The memory may only go when that is
            // decided, and when the DMA that the other one waits for has ended.
            unknown = busy;
            if !unknown.is_empty() {
                let is_over =
                    |deadline: Instant| deadline.saturating_duration_since(Instant::now()).is_zero();
                if deadline.is_some_and(is_over) {
                    return Ok(false);
                }
                self.step_aside(&mut tries);
            }
        }
        Ok(true)
    }

    /// Whether something in the range leads, or may lead in a moment, to one of the pieces of memory.
    pub(crate) fn may_lead_to(&self, hull: IovaRange, pieces: &[Piece]) -> bool {
        let (found, busy) = self.leading_to(&[hull], pieces);
        !found.is_empty() || !busy.is_empty()
    }

    /// Where leaves in these ranges lead to the pieces, and where another operation is at work, so that nobody can
    /// say yet.
    fn leading_to(&self, ranges: &[IovaRange], pieces: &[Piece]) -> (Runs, Vec<IovaRange>) {
        let (mut found, mut busy) = (Runs::default(), Vec::new());
        let _operation = epoch::operation();
        for range in ranges {
            self.native.settled(*range, |occupied, leaf| {
                // A leaf that somebody owns may lead elsewhere in a moment, or have led elsewhere a moment ago, so that
                // devices still go there.
                let Some(leaf) = leaf else {
                    busy.push(occupied);
                    return ControlFlow::Continue(());
                };
                for piece in pieces_under(&leaf, pieces) {
                    // The part of the leaf that leads into the piece.
                    let part = |oa: u64| leaf.iova + (oa - leaf.oa.get());
                    let first = piece.oa.get().max(leaf.oa.get());
                    let last = piece.last().min(leaf.oa.get() + (leaf.size.bytes() - 1));
                    if let Some(range) = IovaRange::new(part(first), part(last)) {
                        found.push(range);
                    }
                }
                ControlFlow::Continue(())
            });
        }
        (found, busy)
    }

    /// Unmaps what in the range leads to the pieces, and more of what is around it if there is no other way. The
    /// memory must not stay reachable; without memory for a cut, or with a table that cannot be cut, whole leaves
    /// have to go.
    fn unmap_at_any_price(&self, range: IovaRange, pieces: &[Piece]) {
        let granule = self.granule().bytes() - 1;
        let (mut first, mut last) = (range.first() & !granule, range.last() | granule);
        let Some(exact) = IovaRange::new(first, last) else { return };
        // Something else may be mapped there by now, and is none of our business.
        if self
            .unmap_wanted(exact, Some(&|leaf| pieces_under(leaf, pieces).next().is_some()), Manner::Strict)
            .is_ok()
        {
            return;
        }
        while self.may_lead_to(exact, pieces) {
            // The next larger power of two around it. Leaves are powers of two, so one of them ends where leaves
            // end; and the last of them is everything.
            let block = u64::MAX >> (first ^ last).leading_zeros().min(63);
            let block = if first & block == 0 && last & block == block { block << 1 | 1 } else { block };
            (first, last) = (first & !block, last | block);
            // Whatever the space's policy is.
            let all = Some::<&dyn Fn(&Leaf) -> bool>(&|_| true);
            if IovaRange::new(first, last)
                .is_none_or(|range| self.unmap_wanted(range, all, Manner::AtAnyPrice).is_ok())
            {
                return;
            }
        }
    }
}

/// Those of the pieces, which are in ascending order of their output addresses, that a leaf leads to.
fn pieces_under<'a>(leaf: &Leaf, pieces: &'a [Piece]) -> impl Iterator<Item = &'a Piece> + use<'a> {
    let (first, last) = (leaf.oa.get(), leaf.oa.get() + (leaf.size.bytes() - 1));
    let from = pieces.partition_point(|piece| piece.last() < first);
    pieces[from..].iter().take_while(move |piece| piece.oa.get() <= last)
}
