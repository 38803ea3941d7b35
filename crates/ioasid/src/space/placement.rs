//! Where to map what may be anywhere.
//!
//! The native table is the only record of what is mapped, and to find room in it takes a look at every mapping below the
//! room. So a space in which somebody has asked for that remembers where it might be free: [`Holes`], in which the
//! lowest place is found in O(log n). These are proposals, and the claim in the table decides. What makes them good is
//! one promise: **nothing is left out that is free**, but for what an operation that is just running is about to use or
//! to give back. What is used may well be among them:
//!
//! - A map at an address of the caller's choice says nothing here, and pays nothing. If its place is proposed to
//!   somebody later, that map fails, and what is mapped there is learned from the table. Each such mapping is met once,
//!   so that it costs O(log n) after all, paid by those who ask for places.
//! - Whoever makes native entries absent says so here afterwards: an unmap, and a map that failed. In a space that was
//!   never asked for a place this is the check of a pointer; else it takes the lock that those who ask take.
//!
//! # Why nothing is lost
//!
//! What is learned from the table is read under the lock. An unmap makes its entries absent, and then takes the
//! lock to say so. If it came first, the entries are seen absent; if it comes later, it corrects what was learned.
//! There remain the operations that began when the space had no proposals yet, and do not know whom to tell. Therefore
//! nothing is learned before they have ended ([`Announced`](crate::epoch::Announced)).
//!
//! The lowest place is one decision that all who ask share, and so is the lock. Who maps at a rate where that
//! matters, takes addresses from an [`Allocator`](crate::iova::Allocator), whose magazines are not shared, and maps there.

use super::Space;
use crate::epoch;
use crate::iova::Holes;
use crate::sync::{Mutex, MutexGuard, PoisonError};
use ioasid_pagetable::{IovaRange, PageSize};
use std::ops::ControlFlow;

/// Where a space may have room.
pub(super) struct Placement {
    /// But for the first page, which is proposed to nobody.
    holes: Mutex<Holes>,
}

impl Placement {
    /// As far as anybody knows all is free.
    fn new(granule: PageSize) -> Placement {
        let mut holes = Holes::new(granule);
        holes.prepare(PageSize::SIZE_1G);
        Placement::set_free(&mut holes, IovaRange::ALL);
        Placement { holes: Mutex::new(holes) }
    }

    /// Proposes it.
    fn set_free(holes: &mut Holes, range: IovaRange) {
        let above_zero = IovaRange::new(holes.granule().bytes(), u64::MAX);
        if let Some(range) = above_zero.and_then(|above_zero| range.intersection(&above_zero)) {
            holes.set_free(range);
        }
    }

    fn holes(&self) -> MutexGuard<'_, Holes> {
        self.holes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Space {
    /// The proposals of this space, made if there are none yet.
    fn placement(&self) -> &Placement {
        self.placement.get_or_make(|| Placement::new(self.granule()))
    }

    /// The lowest place for `length` bytes among the allowed addresses, never 0, with the first of these alignments
    /// for which there is one. It is proposed to nobody else until [`learn`](Self::learn) or
    /// [`propose_again`](Self::propose_again), or until what is mapped there is unmapped.
    pub(super) fn propose(&self, length: u64, alignments: &[u64]) -> Option<IovaRange> {
        let placement = self.placement();
        let layout = self.layout.read();
        let mut holes = placement.holes();
        let place = alignments
            .iter()
            .find_map(|alignment| layout.find_place(|window| holes.lowest(window, length, *alignment)))?;
        holes.set_taken(place);
        Some(place)
    }

    /// Takes back a proposal where something was found, and learns from the table what is mapped there, with what
    /// follows it without a gap.
    pub(super) fn learn(&self, place: IovaRange) {
        let Some(placement) = self.placement.get() else { return };
        let _operation = epoch::operation();
        let mut holes = placement.holes();
        Placement::set_free(&mut holes, place);
        let Some(all) = IovaRange::new(place.first(), u64::MAX) else { return };
        let mut run: Option<IovaRange> = None;
        self.native.occupied(all, |occupied| {
            match run {
                Some(before) if occupied.first() <= before.last().saturating_add(1) => {
                    run = IovaRange::new(before.first(), occupied.last());
                }
                _ if occupied.first() > place.last() => return ControlFlow::Break(()),
                before => {
                    before.into_iter().for_each(|before| holes.set_taken(before));
                    run = Some(occupied);
                }
            }
            ControlFlow::Continue(())
        });
        run.into_iter().for_each(|run| holes.set_taken(run));
    }

    /// A range of native entries is absent, or part of it is.
    pub(super) fn propose_again(&self, range: IovaRange) {
        if let Some(placement) = self.placement.get() {
            Placement::set_free(&mut placement.holes(), range);
        }
    }
}
