//! Owning leaves while they go on translating.
//!
//! Changing what is mapped in place, copying it and regrouping it all begin alike: the leaves of a range become present
//! and busy in the native table. Devices use them as before, and nobody else can change them, in any table. [`Held`] is
//! that ownership; it ends when it is dropped.
//!
//! Who meets another operation has to leave its section and wait. As in [unmap](super::unmap) the first time all that is
//! held is let go; then changes of the layout are shut out and what has been got is kept, so that this ends even if
//! others never stop changing small pieces of a large range.

use super::Space;
use super::layout::Layout;
use super::protect::NativeCut;
use super::unmap::Manner;
use crate::epoch::{self, Reading};
use crate::slice::Recalled;
use crate::sync::MutexGuard;
use ioasid_pagetable::{
    Attributes, CutError, Gather, HeapTables, IovaRange, Native, PageSize, Radix, RetractError, Runs,
};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;

/// A range whose leaves are to be held.
#[derive(Clone, Copy, Debug)]
pub(super) struct Portion {
    pub(super) range: IovaRange,
    /// Leaves that are larger than this or reach over an end are cut. `None`: they are held as they are.
    pub(super) largest: Option<PageSize>,
}

/// Leaves that this operation owns while they translate.
pub(super) struct Held<'a> {
    space: &'a Space,
    /// The layout, and the section in which it is read. `None` while waiting, and after it was left.
    layout: Option<Reading<'a, Layout>>,
    gather: Gather<HeapTables, AtomicU64>,
}

impl<'a> Held<'a> {
    fn nothing(space: &'a Space) -> Held<'a> {
        Held { space, layout: Some(space.layout.read()), gather: Gather::new() }
    }

    /// The leaves, with all that they map: ascending, neighbours joined.
    pub(super) fn runs(&self) -> &Runs {
        &self.gather.runs
    }

    pub(super) fn native(&self) -> &Radix<Native> {
        &self.space.native
    }

    /// The layout that the operation goes by, as long as it is in its section.
    pub(super) fn layout(&self) -> Option<&Layout> {
        self.layout.as_deref()
    }

    /// Owns what is to be held from `from` on.
    fn take(&mut self, portions: impl Iterator<Item = Portion>, from: u64) -> Result<(), RetractError> {
        for Portion { range, largest } in portions {
            let Some(range) = IovaRange::new(range.first().max(from), range.last()) else { continue };
            match largest {
                Some(largest) => self.space.native.hold_exactly(range, largest, &mut self.gather)?,
                None => self.space.native.hold_all(range, &mut self.gather)?,
            }
        }
        Ok(())
    }

    /// Whether something in the range is mapped that was not when the range was passed.
    fn misses_something(&self, range: IovaRange) -> bool {
        let held: u64 = self
            .runs()
            .iter()
            .filter_map(|run| run.intersection(&range))
            .fold(0, |sum, run| sum.saturating_add(run.length().unwrap_or(u64::MAX)));
        if Some(held) == range.length() {
            return false;
        }
        let mut mapped = 0u64;
        self.space.native.leaves(range, |leaf| {
            let inside = leaf.range().intersection(&range).and_then(|inside| inside.length());
            mapped = mapped.saturating_add(inside.unwrap_or(u64::MAX));
            ControlFlow::Continue(())
        });
        mapped != held
    }

    /// Ends the section. The leaves stay held; what they are can be asked in a section of the caller's own.
    pub(super) fn leave(&mut self) {
        self.layout = None;
    }

    fn let_go(&mut self) {
        for run in std::mem::take(&mut self.gather.runs).iter() {
            self.space.native.let_go_all(run);
        }
        self.gather.leaves = 0;
    }

    /// Returns when all DMA that had begun has ended. The leaves are held all the while, but no change of any space's
    /// layout has to wait for that.
    pub(super) fn wait_for_dma(&mut self) {
        if self.layout().is_some_and(|layout| layout.table_count() > 0) {
            self.layout = None;
            epoch::wait_for_dma();
            self.space.sleeping.wait();
            self.layout = Some(self.space.layout.read());
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.layout.is_none() {
            self.layout = Some(self.space.layout.read());
        }
        self.let_go();
        epoch::retire(std::mem::take(&mut self.gather.retired));
    }
}

impl Space {
    /// Like [`hold`](Self::hold), for a change that takes rights away or leads elsewhere: with nobody who has borrowed them, and nobody who
    /// can until the second value is dropped.
    pub(super) fn hold_unborrowed<P: Iterator<Item = Portion>>(
        &self,
        range: IovaRange,
        rights: Attributes,
        portions: impl Fn() -> P,
    ) -> Result<(Held<'_>, Option<Recalled<'_>>), NativeCut> {
        let mut recalled = self.recall(range, rights, Manner::Strict)?;
        loop {
            let held = self.hold(range, &portions)?;
            // Who borrows from now on meets the held leaves, and waits.
            if recalled.is_some() || !self.slices.any(range, rights) {
                return Ok((held, recalled));
            }
            drop(held);
            recalled = self.recall(range, rights, Manner::Strict)?;
        }
    }

    /// Like [`hold`](Self::hold), but never waits. `None`: another operation is at work in the range.
    pub(super) fn try_hold<P: Iterator<Item = Portion>>(
        &self,
        range: IovaRange,
        portions: impl Fn() -> P,
    ) -> Result<Option<Held<'_>>, CutError> {
        let mut held = Held::nothing(self);
        match held.take(portions(), range.first()) {
            Ok(()) if held.misses_something(range) => Ok(None),
            Ok(()) => Ok(Some(held)),
            Err(RetractError::Contended { .. }) => Ok(None),
            Err(RetractError::Cut(error)) => Err(error),
        }
    }

    /// Owns all that is mapped in these portions, which ascend within `range`, at one moment. Fails only where a leaf
    /// has to be cut and cannot be.
    pub(super) fn hold<P: Iterator<Item = Portion>>(
        &self,
        range: IovaRange,
        portions: impl Fn() -> P,
    ) -> Result<Held<'_>, CutError> {
        let mut unchanging: Option<MutexGuard<'_, ()>> = None;
        let mut held = Held::nothing(self);
        let (mut from, mut tries) = (range.first(), 0);
        loop {
            match held.take(portions(), from) {
                Ok(()) if held.misses_something(range) => {
                    held.let_go();
                    from = range.first();
                }
                Ok(()) => return Ok(held),
                Err(RetractError::Contended { at }) => {
                    from = at.max(from);
                    let lock = unchanging.is_none() && !held.runs().is_empty();
                    if lock {
                        held.let_go();
                        from = range.first();
                    }
                    held.layout = None;
                    self.step_aside(&mut tries);
                    if lock {
                        unchanging = Some(self.changing());
                    }
                    held.layout = Some(self.layout.read());
                }
                Err(RetractError::Cut(error)) => return Err(error),
            }
        }
    }
}
