//! Claiming mode: operations that arbitrate between each other, entry by entry.
//!
//! The native table is the one truth about a space, and its entries are the only locks there are. An operation
//! owns a leaf while it holds the busy bit:
//!
//! | operation | steps |
//! |-----------|-------|
//! | map       | [`claim`](Radix::claim): absent to busy. Derived tables are filled. [`publish`](Radix::publish): busy to present. |
//! | map fails | [`release`](Radix::release): busy to absent. Nobody ever translated through it. |
//! | unmap     | [`retract`](Radix::retract): present to busy. Derived tables are emptied, everything is invalidated. [`release`](Radix::release). |
//! | unmap fails | [`publish`](Radix::publish): busy to present again. |
//! | change  | [`hold_exactly`](Radix::hold_exactly): present to present and busy. Derived tables are changed. [`remap_held`](Radix::remap_held) or [`protect_held`](Radix::protect_held): one store for each leaf. [`let_go_all`](Radix::let_go_all). |
//! | fill a new table | [`hold`](Radix::hold): present to present and busy. The leaf is copied. [`let_go`](Radix::let_go). |
//!
//! Nothing here ever waits. An operation that meets a busy leaf says so (*contended*), and the caller decides:
//! it must not wait inside a section that the owner may be waiting for. Operations take leaves in ascending order
//! and a mapper gives everything back before it tries again, so no two can wait for each other.

use super::cut::SoftwareBits;
use super::map::{ClaimBits, Install, InstallError, MapError, Mapping};
use super::retire::Filling;
use super::{CutError, Leaf, Next, Node, Radix, Slot, Stop, Stretch, Visitor, leaf_span, leaves_span};
use crate::address::{IovaRange, Oa, PageSize};
use crate::atomic::AtomicEntry;
use crate::format::{Attributes, ClaimFormat, Entry};
use crate::gather::{Gather, Runs};
use crate::memory::TableMemory;

/// Why a range was not claimed. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Another operation is at work there; try again when it is done.
    #[error("another operation is at work at {at:#x}")]
    Contended {
        /// Where it was met.
        at: u64,
    },
    /// It cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Why a range was retracted only in part. What was retracted before is in the gather, and still busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RetractError {
    /// Another operation owns the leaf here; go on from this address when it is done.
    #[error("another operation is at work at {at:#x}")]
    Contended {
        /// Where it was met.
        at: u64,
    },
    /// A leaf that came to lie over an end of the range could not be cut.
    #[error(transparent)]
    Cut(CutError),
}

impl From<CutError> for RetractError {
    fn from(error: CutError) -> RetractError {
        match error {
            CutError::Contended { at } => RetractError::Contended { at },
            error => RetractError::Cut(error),
        }
    }
}

/// What becomes of the busy leaves of an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Present,
    Absent,
}

struct Settle<'a, F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    outcome: Outcome,
    gather: &'a mut Gather<M, A>,
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Settle<'_, F, M, A> {
    type Error = core::convert::Infallible;

    #[inline]
    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<Self::Error>> {
        let mut done = 0;
        for entry in stretch.entries {
            let value = entry.load();
            if value & (F::BUSY | F::PRESENT) == F::BUSY {
                // The entry is ours: a store is enough.
                match self.outcome {
                    Outcome::Present => entry.store((value & !F::BUSY) | F::PRESENT),
                    Outcome::Absent => entry.store(0),
                }
            } else if value & F::PRESENT != 0 {
                // A leaf of somebody else's, or a link, which is for the walker.
                break;
            }
            done += 1;
        }
        Ok(done)
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<Self::Error>> {
        if slot.value & F::BUSY == 0 || slot.value & F::PRESENT != 0 {
            return Ok(Next::After(slot.last));
        }
        // The entry is ours: a store is enough.
        match self.outcome {
            Outcome::Present => slot.entry.store((slot.value & !F::BUSY) | F::PRESENT),
            Outcome::Absent => slot.entry.store(0),
        }
        Ok(Next::After(slot.last))
    }

    fn left(&mut self, slot: &Slot<'_, A>, child: Node<A>, whole: bool) -> Result<(), Self::Error> {
        if self.outcome == Outcome::Absent {
            self.radix.prune(self.gather, slot, child, whole, Filling::Exchange);
        }
        Ok(())
    }

    fn gather(&mut self) -> Option<&mut Gather<M, A>> {
        Some(self.gather)
    }
}

struct Retract<'a, F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> {
    radix: &'a Radix<F, M, A>,
    range: IovaRange,
    /// Which leaves to take; `None`: all.
    wanted: Option<&'a dyn Fn(&Leaf) -> bool>,
    gather: &'a mut Gather<M, A>,
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Retract<'_, F, M, A> {
    type Error = RetractError;

    /// Takes leaves of the entries' own size back as long as they are present and nobody else's.
    #[inline]
    fn stretch(&mut self, stretch: Stretch<'_, A>) -> Result<usize, Stop<RetractError>> {
        if self.wanted.is_some() {
            return Ok(0);
        }
        let Stretch { node, entries, first } = stretch;
        let format = &self.radix.format;
        let size = PageSize(format.shift(node.level) as u8);
        let taken = entries.iter().position(|entry| {
            let value = entry.load();
            let ours = value & F::BUSY == 0
                && matches!(format.decode(node.level, value), Entry::Leaf { size: found, .. } if found == size);
            !ours || entry.compare_exchange(value, (value & !F::PRESENT) | F::BUSY).is_err()
        });
        let done = taken.unwrap_or(entries.len());
        if let Some(range) = leaves_span(first, 0, done, size) {
            self.gather.removed(range, size, done as u64);
        }
        Ok(done)
    }

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<RetractError>> {
        if slot.value & F::BUSY != 0 {
            return Err(Stop::Error(RetractError::Contended { at: slot.first }));
        }
        let Entry::Leaf { oa, size, attributes } = slot.decoded else { return Ok(Next::After(slot.last)) };
        let (first, last) = leaf_span(slot.first, size);
        let leaf = Leaf { iova: first, oa: Oa::new(oa), size, attributes };
        if self.wanted.is_some_and(|wanted| !wanted(&leaf)) {
            return Ok(Next::After(last));
        }
        if first < self.range.first() || last > self.range.last() {
            let software = software_bits::<F>();
            self.radix.cut_leaf(&slot, software, self.gather).map_err(|error| Stop::Error(error.into()))?;
            return Ok(Next::Again);
        }
        if slot.entry.compare_exchange(slot.value, (slot.value & !F::PRESENT) | F::BUSY).is_err() {
            return Ok(Next::Again);
        }
        if let Some(leaf) = IovaRange::new(first, last) {
            self.gather.removed(leaf, size, 1);
        }
        Ok(Next::After(last))
    }
}

struct Hold<F> {
    held: Option<Leaf>,
    format: core::marker::PhantomData<F>,
}

/// Why a visit for [`Radix::hold`] ended before the end of its range.
enum HoldEnd {
    Contended(u64),
    Found,
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for Hold<F> {
    type Error = HoldEnd;

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<HoldEnd>> {
        // A busy leaf that is not present belongs to an operation that takes care of every table itself.
        let Entry::Leaf { oa, size, attributes } = slot.decoded else { return Ok(Next::After(slot.last)) };
        if slot.value & F::BUSY != 0 {
            return Err(Stop::Error(HoldEnd::Contended(slot.first)));
        }
        if slot.entry.compare_exchange(slot.value, slot.value | F::BUSY).is_err() {
            return Ok(Next::Again);
        }
        self.held = Some(Leaf { iova: leaf_span(slot.first, size).0, oa: Oa::new(oa), size, attributes });
        Err(Stop::Error(HoldEnd::Found))
    }
}

struct LetGo<F>(core::marker::PhantomData<F>);

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Visitor<M, A> for LetGo<F> {
    type Error = core::convert::Infallible;

    fn slot(&mut self, slot: Slot<'_, A>) -> Result<Next, Stop<Self::Error>> {
        slot.entry.store(slot.value & !F::BUSY);
        Ok(Next::After(slot.last))
    }
}

pub(super) fn software_bits<F: ClaimFormat>() -> SoftwareBits {
    SoftwareBits { busy: F::BUSY, first: F::FIRST }
}

impl<F: ClaimFormat, M: TableMemory<A>, A: AtomicEntry> Radix<F, M, A> {
    /// Takes the absent range for a mapping to come: the final leaves are in place, busy and not yet present.
    ///
    /// Exactly one of several overlapping claims succeeds. Ends in [`publish`](Self::publish) or
    /// [`release`](Self::release) of the same range.
    pub fn claim(
        &self,
        range: IovaRange,
        oa: Oa,
        attributes: Attributes,
        gather: &mut Gather<M, A>,
    ) -> Result<(), ClaimError> {
        let claim = Some(ClaimBits { present: F::PRESENT, busy: F::BUSY, first: F::FIRST });
        if self.install_in_one_table(range, oa, attributes, claim, gather) {
            return Ok(());
        }
        self.claim_slowly(Mapping::new(range, oa, attributes), claim, gather)
    }

    /// What the short way was not for, or not yet.
    #[inline(never)]
    fn claim_slowly(
        &self,
        mapping: Mapping,
        claim: Option<ClaimBits>,
        gather: &mut Gather<M, A>,
    ) -> Result<(), ClaimError> {
        if self.make_way(&mapping, claim, gather)? {
            return Ok(());
        }
        let range = mapping.range;
        let mut install = Install {
            radix: self,
            mapping,
            claim,
            accept_equal: false,
            installed: Runs::default(),
            at: range.first(),
            gather,
        };
        let Err(error) = self.run(&mut install, range) else { return Ok(()) };
        let Install { installed, at, .. } = install;
        for run in installed.iter() {
            self.release(run, gather);
        }
        self.sweep_path(at, gather, Filling::Exchange);
        Err(match error {
            InstallError::Contended(at) => ClaimError::Contended { at },
            InstallError::Map(error) => error.into(),
        })
    }

    /// Makes the busy leaves of a range present. All that are not present in the range must be the caller's.
    pub fn publish(&self, range: IovaRange) {
        self.settle(range, Outcome::Present, &mut Gather::new());
    }

    /// Makes the busy leaves of a range absent. All that are not present in the range must be the caller's.
    pub fn release(&self, range: IovaRange, gather: &mut Gather<M, A>) {
        self.settle(range, Outcome::Absent, gather);
    }

    #[inline(always)]
    fn settle(&self, range: IovaRange, outcome: Outcome, gather: &mut Gather<M, A>) {
        let mut settle = Settle { radix: self, outcome, gather };
        if let Some(stretch) = self.in_one_table(range) {
            let (node, count) = (stretch.node, stretch.entries.len());
            let Ok(done) = settle.stretch(stretch) else { return };
            if done == count {
                let index = self.index(node.level, range.first());
                if outcome == Outcome::Absent && self.is_idle(node, index, count) {
                    self.sweep(range, gather, Filling::Exchange);
                }
                return;
            }
        }
        // What is settled already is passed over.
        let Ok(()) = self.run(&mut settle, range);
    }

    /// Makes both ends of `range` boundaries between leaves, so that a following [`retract`](Self::retract) needs
    /// no memory. Changes no translation.
    pub fn cut_claimed(&self, range: IovaRange) -> Result<(), CutError> {
        self.cut_ends(range, software_bits::<F>(), &mut Gather::new())
    }

    /// Takes the present leaves of `range` back: they stop translating and are the caller's. The gather's runs
    /// name them; each run ends in [`release`](Self::release) or, if it shall stay after all,
    /// [`publish`](Self::publish).
    pub fn retract(&self, range: IovaRange, gather: &mut Gather<M, A>) -> Result<(), RetractError> {
        let mut retract = Retract { radix: self, range, wanted: None, gather };
        let mut first = range.first();
        if let Some(stretch) = self.in_one_table(range) {
            let (level, count) = (stretch.node.level, stretch.entries.len());
            match retract.stretch(stretch) {
                Ok(done) if done == count => return Ok(()),
                Ok(done) => first += (done as u64) << self.format.shift(level),
                Err(Stop::Stale(at)) => first = at,
                Err(Stop::Error(error)) => return Err(error),
            }
        }
        self.run_from(&mut retract, first, range)
    }

    /// Like [`retract`](Self::retract), for those leaves alone that `wanted` says yes to. It is asked again for each
    /// part of a leaf that has to be cut, and what it was shown is what is taken.
    pub fn retract_if(
        &self,
        range: IovaRange,
        wanted: &dyn Fn(&Leaf) -> bool,
        gather: &mut Gather<M, A>,
    ) -> Result<(), RetractError> {
        self.run(&mut Retract { radix: self, range, wanted: Some(wanted), gather }, range)
    }

    /// Finds the next present leaf of the range and keeps it as it is until [`let_go`](Self::let_go). `None`:
    /// there is none. Leaves that another operation is mapping or unmapping are passed over.
    pub fn hold(&self, range: IovaRange) -> Result<Option<Leaf>, RetractError> {
        let mut hold = Hold::<F> { held: None, format: core::marker::PhantomData };
        match self.run(&mut hold, range) {
            Err(HoldEnd::Contended(at)) => Err(RetractError::Contended { at }),
            Ok(()) | Err(HoldEnd::Found) => Ok(hold.held),
        }
    }

    /// Ends [`hold`](Self::hold).
    pub fn let_go(&self, leaf: &Leaf) {
        if let Some(range) = IovaRange::new(leaf.iova, leaf.iova) {
            let Ok(()) = self.run(&mut LetGo::<F>(core::marker::PhantomData), range);
        }
    }
}
