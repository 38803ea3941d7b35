//! Looking at what is mapped.
//!
//! An iteration holds nothing between two steps: no lock, no section, no snapshot. Each refill reads a bounded number of
//! leaves in a section of its own and remembers the address at which to go on, so that a space of any size can be looked
//! through at leisure while it changes. What changes meanwhile may or may not be seen.

use super::{Permissions, Space};
use crate::epoch;
use ioasid_pagetable::{IovaRange, Leaf, Oa};
use std::collections::VecDeque;
use std::ops::ControlFlow;

/// How many leaves are read in one section.
const LEAVES: usize = 256;

/// Something mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The addresses.
    pub range: IovaRange,
    /// Where the first of them leads; the others follow. [`Space::object_at`] says which object that is.
    pub oa: Oa,
    /// What devices may do.
    pub permissions: Permissions,
}

impl Mapped {
    pub(super) fn of(leaf: &Leaf) -> Mapped {
        Mapped { range: leaf.range(), oa: leaf.oa, permissions: Permissions::of(leaf.attributes) }
    }

    /// The part of a leaf that lies in a range.
    fn within(leaf: &Leaf, range: IovaRange) -> Option<Mapped> {
        let range = leaf.range().intersection(&range)?;
        Some(Mapped { range, oa: leaf.output(range.first()), permissions: Permissions::of(leaf.attributes) })
    }

    /// Whether the other begins where this one ends, and is the same memory's continuation.
    fn continues_in(&self, next: &Mapped) -> bool {
        self.range.last().checked_add(1) == Some(next.range.first())
            && self.oa.get().wrapping_add(next.range.first() - self.range.first()) == next.oa.get()
            && self.permissions == next.permissions
    }
}

/// A piece of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A mapping, or what is in the range of it: consecutive addresses that lead to consecutive ones and allow the same.
    Mapped(Mapped),
    /// Nothing is mapped here.
    Hole(IovaRange),
}

/// The extents of a range, ascending. See [`Space::extents`].
#[derive(Debug)]
pub struct Extents<'a> {
    space: &'a Space,
    /// What was not looked at yet.
    rest: Option<IovaRange>,
    ready: VecDeque<Extent>,
}

impl Space {
    /// What the range holds: mappings and the holes between them, from end to end.
    ///
    /// A mapping that was made in several pieces of memory, or protected or remapped in part, is shown in pieces. Two
    /// mappings that continue each other are shown as two, as long as both begin where they were made to begin.
    pub fn extents(&self, range: IovaRange) -> Extents<'_> {
        Extents { space: self, rest: Some(range), ready: VecDeque::new() }
    }
}

impl Extents<'_> {
    /// Where the iteration will go on: what is left of the range, for whoever wants to continue with another
    /// [`Space::extents`] later. `None`: nothing is left.
    pub fn rest(&self) -> Option<IovaRange> {
        let first = self.ready.front().map(|extent| match extent {
            Extent::Mapped(mapped) => mapped.range.first(),
            Extent::Hole(hole) => hole.first(),
        });
        let last = match (self.rest, self.ready.back()) {
            (Some(rest), _) => rest.last(),
            (None, Some(Extent::Mapped(mapped))) => mapped.range.last(),
            (None, Some(Extent::Hole(hole))) => hole.last(),
            (None, None) => return None,
        };
        IovaRange::new(first.or(self.rest.map(|rest| rest.first()))?, last)
    }

    /// Reads a few leaves more.
    fn refill(&mut self, rest: IovaRange) {
        let _operation = epoch::operation();
        let ready = &mut self.ready;
        let (mut next, mut seen) = (Some(rest.first()), 0);
        self.space.native.mapped(rest, |leaf, begins| {
            let Some(mapped) = Mapped::within(&leaf, rest) else { return ControlFlow::Continue(()) };
            if let Some(hole) =
                next.and_then(|next| IovaRange::new(next, mapped.range.first().checked_sub(1)?))
            {
                ready.push_back(Extent::Hole(hole));
            }
            let begins = begins && leaf.iova == mapped.range.first();
            match ready.back_mut() {
                Some(Extent::Mapped(last)) if !begins && last.continues_in(&mapped) => {
                    last.range =
                        IovaRange::new(last.range.first(), mapped.range.last()).unwrap_or(last.range);
                }
                _ => ready.push_back(Extent::Mapped(mapped)),
            }
            next = mapped.range.last().checked_add(1);
            seen += 1;
            if seen == LEAVES { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let left = next.and_then(|next| IovaRange::new(next, rest.last()));
        if seen < LEAVES {
            ready.extend(left.map(Extent::Hole));
            self.rest = None;
        } else {
            self.rest = left;
        }
    }
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        // The last one may go on in what was not read yet.
        while self.ready.len() < 2 {
            let Some(rest) = self.rest else { break };
            self.refill(rest);
        }
        self.ready.pop_front()
    }
}
