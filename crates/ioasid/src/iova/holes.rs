//! The free addresses, in order.
//!
//! # Aligned holes
//!
//! To find the lowest hole that is large enough, a tree of holes that knows the largest hole under each node is all it
//! takes. An alignment breaks that: a hole of 4 MiB may have no 2 MiB that begin at a multiple of 2 MiB, and a search
//! that only knows sizes looks at one disappointing hole after the other. So holes are entered once for each
//! alignment: the tree for 2^k has, for every hole with a multiple of 2^k in it, the first such address, and how much of
//! the hole there is from there on. A request fits a hole if and only if it fits at that address, whatever the size;
//! so the search in the tree for its alignment goes straight to the lowest, or the highest, place there is.
//!
//! # What it costs
//!
//! With *n* holes, a search visits O(log n) nodes of one tree. Making a hole larger or smaller changes an entry in
//! each tree in which it has one: two on average for a hole of one granule, whose address is odd half of the time; the
//! logarithm of its size more for a larger one; and at most one for each alignment there is, which is 52 with a
//! granule of 4 KiB. That makes O(log n) with a constant that is mostly small.
//!
//! The hole for which it is largest is the one that is changed most, the large rest that has not been used yet. So one
//! hole is *open*: it is in no tree, and is looked at by itself. It is the largest of those that were changed since it
//! was opened, and to change it costs nothing.
//!
//! A tree is made when its alignment is first asked for, which costs a step for each hole there is by then. Who cannot
//! have that, [prepares](Holes::prepare) the alignments while there are few holes.
//!
//! Bitmaps in a radix tree of fixed depth were weighed, with the longest run beside each node as Go's page allocator
//! has it: they cost a granule's worth of memory for each hole's surroundings in a sparse space, and alignments above
//! the granule need the same additional summaries. Buddy lists find aligned powers of two in constant time, but no
//! three pages across the boundary of two blocks, and not the lowest place.

use super::tree::Tree;
use ioasid_pagetable::{IovaRange, PageSize};

/// A set of free addresses, in which the lowest or highest place for a size and an alignment is found in O(log n).
///
/// It is a plain value without locks or memory of who has what. [`Allocator`](super::Allocator) is made of it.
///
/// ```
/// use ioasid::{IovaRange, PageSize, iova::Holes};
/// let range = |first, last| IovaRange::new(first, last).unwrap();
/// let mut holes = Holes::new(PageSize::SIZE_4K);
/// holes.free(range(0x1000, 0x4fff))?;
/// holes.free(range(0x20_0000, 0x7f_ffff))?;
///
/// assert_eq!(holes.lowest(IovaRange::ALL, 0x3000, 0x1000), Some(range(0x1000, 0x3fff)));
/// assert_eq!(holes.lowest(IovaRange::ALL, 0x3000, 0x2000), Some(range(0x2000, 0x4fff)));
/// assert_eq!(holes.highest(IovaRange::ALL, 0x3000, 0x20_0000), Some(range(0x60_0000, 0x60_2fff)));
/// holes.take(range(0x60_0000, 0x60_2fff))?;
/// assert_eq!(holes.highest(IovaRange::ALL, 0x3000, 0x20_0000), Some(range(0x40_0000, 0x40_2fff)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Holes {
    granule: PageSize,
    /// Which alignments have a tree, as a sum of them. The granule always has.
    prepared: u64,
    /// For each alignment from the granule on: where in each hole the first aligned address is, and the number of
    /// further addresses in the hole.
    trees: Vec<Tree>,
    /// A hole that is not in the trees.
    open: Option<IovaRange>,
    free: u128,
}

/// Why addresses were not freed or taken. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HoleError {
    /// Some of the addresses are free.
    #[error("{range} is not all in use")]
    Free {
        /// The range asked for.
        range: IovaRange,
    },
    /// Some of the addresses are not free.
    #[error("{range} is not all free")]
    Taken {
        /// The range asked for.
        range: IovaRange,
    },
    /// An end of the range is not on a multiple of the granule.
    #[error("{range} does not begin and end on multiples of {granule}")]
    Misaligned {
        /// The range asked for.
        range: IovaRange,
        /// The granule.
        granule: PageSize,
    },
}

impl Holes {
    /// Nothing is free. Ranges will begin and end on multiples of `granule`.
    pub fn new(granule: PageSize) -> Holes {
        let count = u64::BITS - granule.log2();
        let trees = (0..count).map(|_| Tree::default()).collect();
        Holes { granule, prepared: granule.bytes(), trees, open: None, free: 0 }
    }

    /// What ranges begin and end on.
    pub fn granule(&self) -> PageSize {
        self.granule
    }

    /// Enters the holes for all alignments up to this one, so that no search has to do it.
    pub fn prepare(&mut self, up_to: PageSize) {
        for bits in self.granule.log2()..=up_to.log2() {
            self.prepare_one(bits);
        }
    }

    fn prepare_one(&mut self, bits: u32) {
        if self.prepared & (1 << bits) != 0 {
            return;
        }
        let mut tree = Tree::default();
        self.whole().for_each(|first, span| {
            if let Some((first, span)) = entry(hole(first, span), bits) {
                tree.insert(first, span);
            }
        });
        *self.tree_mut(bits) = tree;
        self.prepared |= 1 << bits;
    }

    fn tree(&self, bits: u32) -> &Tree {
        &self.trees[(bits - self.granule.log2()) as usize]
    }

    fn tree_mut(&mut self, bits: u32) -> &mut Tree {
        &mut self.trees[(bits - self.granule.log2()) as usize]
    }

    /// All holes but the open one.
    fn whole(&self) -> &Tree {
        &self.trees[0]
    }

    /// How many bytes are free; saturates at 2^64 - 1.
    pub fn free_bytes(&self) -> u64 {
        u64::try_from(self.free).unwrap_or(u64::MAX)
    }

    /// The length of the largest hole; saturates at 2^64 - 1.
    pub fn largest(&self) -> u64 {
        let open = self.open.map(|open| open.last() - open.first());
        self.whole().largest().max(open).map_or(0, |span| span.saturating_add(1))
    }

    /// Calls `visit` for every hole, ascending.
    pub fn for_each(&self, mut visit: impl FnMut(IovaRange)) {
        let mut open = self.open;
        self.whole().for_each(|first, span| {
            open.take_if(|open| open.first() < first).into_iter().for_each(&mut visit);
            visit(hole(first, span));
        });
        open.into_iter().for_each(visit);
    }

    /// The lowest `length` bytes within `window` that are free and begin at a multiple of `alignment`, which is rounded
    /// up to the granule. `None` if there are none, or if length or alignment make no sense.
    pub fn lowest(&mut self, window: IovaRange, length: u64, alignment: u64) -> Option<IovaRange> {
        let (bits, span) = self.request(length, alignment)?;
        // A hole that the window begins in may have an aligned address before the window and another one in it.
        let begins_in = self.at_or_below(window.first()).and_then(|hole| hole.intersection(&window));
        if let Some(place) = begins_in.and_then(|hole| lowest_in(hole, bits, span)) {
            return Some(place);
        }
        let last = window.last().checked_sub(span)?;
        let found = self.tree(bits).first(window.first(), last, span);
        let found = found.and_then(|(first, _)| IovaRange::new(first, first + span));
        let open = self.open.and_then(|open| lowest_in(open.intersection(&window)?, bits, span));
        found.into_iter().chain(open).min()
    }

    /// The highest `length` bytes within `window` that are free and begin at a multiple of `alignment`, which is rounded
    /// up to the granule. `None` if there are none, or if length or alignment make no sense.
    pub fn highest(&mut self, window: IovaRange, length: u64, alignment: u64) -> Option<IovaRange> {
        let (bits, span) = self.request(length, alignment)?;
        let mut last = window.last().checked_sub(span)?;
        // Of a hole that the window ends in only a part is there.
        if let Some(ends_in) = self.at_or_below(window.last()) {
            let inside = ends_in.intersection(&window);
            if let Some(place) = inside.and_then(|hole| highest_in(hole, bits, span)) {
                return Some(place);
            }
            last = last.min(ends_in.first().checked_sub(1)?);
        }
        let found = self.tree(bits).last(window.first(), last, span);
        let found = found.and_then(|(first, rest)| highest_in(hole(first, rest), bits, span));
        let part = |hole: IovaRange| highest_in(hole.intersection(&window)?, bits, span);
        let open = self.open.and_then(part);
        found.into_iter().chain(open).max().or_else(|| part(self.at_or_below(window.first())?))
    }

    /// The exponent of the alignment, whose tree exists then, and the length less one.
    fn request(&mut self, length: u64, alignment: u64) -> Option<(u32, u64)> {
        let length = length.checked_next_multiple_of(self.granule.bytes())?;
        let span = length.checked_sub(1)?;
        if !alignment.is_power_of_two() {
            return None;
        }
        let bits = alignment.trailing_zeros().max(self.granule.log2());
        self.prepare_one(bits);
        Some((bits, span))
    }

    /// The last hole that begins at or before an address.
    fn at_or_below(&self, address: u64) -> Option<IovaRange> {
        let entered = self.whole().last(0, address, 0).map(|(first, span)| hole(first, span));
        let open = self.open.filter(|open| open.first() <= address);
        entered.into_iter().chain(open).max()
    }

    /// Some free addresses in the range, the highest hole of which.
    pub fn overlapping(&self, range: IovaRange) -> Option<IovaRange> {
        self.at_or_below(range.last()).filter(|hole| hole.last() >= range.first())
    }

    /// Frees addresses of which none is free.
    pub fn free(&mut self, range: IovaRange) -> Result<(), HoleError> {
        self.check(range)?;
        if self.overlapping(range).is_some() {
            return Err(HoleError::Free { range });
        }
        self.set_free(range);
        Ok(())
    }

    /// Takes addresses that are all free.
    pub fn take(&mut self, range: IovaRange) -> Result<(), HoleError> {
        self.check(range)?;
        match self.at_or_below(range.first()) {
            Some(hole) if hole.covers(&range) => {
                self.take_from(hole, range);
                Ok(())
            }
            _ => Err(HoleError::Taken { range }),
        }
    }

    fn check(&self, range: IovaRange) -> Result<(), HoleError> {
        match range.is_aligned(self.granule) {
            true => Ok(()),
            false => Err(HoleError::Misaligned { range, granule: self.granule }),
        }
    }

    /// Makes all of a range free that begins and ends on multiples of the granule, whatever is free of it already. Takes
    /// a step for each hole that becomes a part of a larger one.
    pub(crate) fn set_free(&mut self, range: IovaRange) {
        if self.overlapping(range).is_some_and(|hole| hole.covers(&range)) {
            return;
        }
        let mut old: [Option<IovaRange>; 2] = [None, None];
        let mut from = Some(range.last().saturating_add(1));
        let touches = |hole: &IovaRange| hole.last() >= range.first().saturating_sub(1);
        while let Some(hole) = from.and_then(|from| self.at_or_below(from)).filter(touches) {
            from = hole.first().checked_sub(1);
            if old[0].is_none() {
                old[0] = Some(hole);
            } else if let Some(between) = old[1].replace(hole) {
                self.replace([Some(between), None], [None, None]);
            }
        }
        let all = || old.iter().flatten().chain([&range]);
        let first = all().map(IovaRange::first).min();
        let last = all().map(IovaRange::last).max();
        let joined = first.zip(last).and_then(|(first, last)| IovaRange::new(first, last));
        self.replace(old, [joined, None]);
    }

    /// Makes nothing of a range free that begins and ends on multiples of the granule. Takes a step for each hole in it.
    pub(crate) fn set_taken(&mut self, range: IovaRange) {
        while let Some(hole) = self.overlapping(range) {
            let Some(part) = hole.intersection(&range) else { break };
            self.take_from(hole, part);
        }
    }

    fn take_from(&mut self, hole: IovaRange, part: IovaRange) {
        let below = part.first().checked_sub(1).and_then(|last| IovaRange::new(hole.first(), last));
        let above = part.last().checked_add(1).and_then(|first| IovaRange::new(first, hole.last()));
        self.replace([Some(hole), None], [below, above]);
    }

    /// Changes holes to others.
    fn replace(&mut self, old: [Option<IovaRange>; 2], new: [Option<IovaRange>; 2]) {
        let span = |hole: &IovaRange| hole.last() - hole.first();
        for hole in old.into_iter().flatten() {
            self.free -= u128::from(span(&hole)) + 1;
            match self.open.take_if(|open| *open == hole) {
                Some(_) => {}
                None => self.withdraw(hole),
            }
        }
        for hole in new.into_iter().flatten() {
            self.free += u128::from(span(&hole)) + 1;
            let larger = self.open.is_none_or(|open| span(&open) < span(&hole));
            let closed = if larger { self.open.replace(hole) } else { Some(hole) };
            closed.into_iter().for_each(|hole| self.enter(hole));
        }
    }

    fn enter(&mut self, hole: IovaRange) {
        for bits in self.prepared_bits() {
            // What has no multiple of this alignment has none of a larger one.
            let Some((first, span)) = entry(hole, bits) else { break };
            self.tree_mut(bits).insert(first, span);
        }
    }

    fn withdraw(&mut self, hole: IovaRange) {
        for bits in self.prepared_bits() {
            let Some((first, _)) = entry(hole, bits) else { break };
            self.tree_mut(bits).remove(first);
        }
    }

    /// The exponents of the alignments that have a tree, ascending.
    fn prepared_bits(&self) -> impl Iterator<Item = u32> + use<> {
        let mut rest = self.prepared;
        std::iter::from_fn(move || {
            let bits = (rest != 0).then(|| rest.trailing_zeros());
            rest &= rest.wrapping_sub(1);
            bits
        })
    }
}

fn hole(first: u64, span: u64) -> IovaRange {
    IovaRange::new(first, first.saturating_add(span)).unwrap_or(IovaRange::ALL)
}

/// The first multiple of 2^`bits` in a hole, and how many addresses follow.
fn entry(hole: IovaRange, bits: u32) -> Option<(u64, u64)> {
    let below = (1u64 << bits) - 1;
    let first = hole.first().checked_add(below)? & !below;
    Some((first, hole.last().checked_sub(first)?))
}

/// The lowest place in a hole for an address and `span` more.
fn lowest_in(hole: IovaRange, bits: u32, span: u64) -> Option<IovaRange> {
    let (first, rest) = entry(hole, bits)?;
    if rest >= span { IovaRange::new(first, first + span) } else { None }
}

/// The highest place in a hole for an address and `span` more.
fn highest_in(hole: IovaRange, bits: u32, span: u64) -> Option<IovaRange> {
    let first = hole.last().checked_sub(span)? & !((1u64 << bits) - 1);
    if first >= hole.first() { IovaRange::new(first, first + span) } else { None }
}

#[cfg(test)]
mod tests {
    use super::super::tree::steps;
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 1 << 12;
    const PAGES: u64 = 96;

    fn pages(base: u64, first: u64, count: u64) -> IovaRange {
        IovaRange::with_length(base + first * PAGE, count * PAGE).unwrap()
    }

    #[derive(Clone, Debug)]
    enum Step {
        SetFree(u64, u64),
        SetTaken(u64, u64),
        Free(u64, u64),
        Take(u64, u64),
        Find { window: (u64, u64), count: u64, bits: u32 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let part = || (0..PAGES, 1..20_u64).prop_map(|(first, count)| (first, count.min(PAGES - first)));
        prop_oneof![
            1 => part().prop_map(|(first, count)| Step::SetFree(first, count)),
            2 => part().prop_map(|(first, count)| Step::SetTaken(first, count)),
            1 => part().prop_map(|(first, count)| Step::Free(first, count)),
            1 => part().prop_map(|(first, count)| Step::Take(first, count)),
            4 => ((0..PAGES, 0..PAGES), 0..24_u64, 0..19_u32)
                .prop_map(|(window, count, bits)| Step::Find { window, count, bits }),
        ]
    }

    /// Runs the steps on the pages from `base` on, beside a model that knows of each page whether it is free.
    fn run(base: u64, steps: &[Step], prepare: bool) {
        let mut holes = Holes::new(PageSize::SIZE_4K);
        if prepare {
            holes.prepare(PageSize::from_log2(63).unwrap());
        }
        let mut model = [false; PAGES as usize];
        let all = |model: &[bool], first: u64, count: u64, free: bool| {
            (first..first + count).all(|page| model[page as usize] == free)
        };
        for step in steps {
            let mut set = |first: u64, count: u64, free| {
                model[first as usize..(first + count) as usize].fill(free);
            };
            match *step {
                Step::SetFree(first, count) => {
                    holes.set_free(pages(base, first, count));
                    set(first, count, true);
                }
                Step::SetTaken(first, count) => {
                    holes.set_taken(pages(base, first, count));
                    set(first, count, false);
                }
                Step::Free(first, count) => {
                    let result = holes.free(pages(base, first, count));
                    assert_eq!(result.is_ok(), all(&model, first, count, false));
                    if result.is_ok() {
                        model[first as usize..(first + count) as usize].fill(true);
                    }
                }
                Step::Take(first, count) => {
                    let result = holes.take(pages(base, first, count));
                    assert_eq!(result.is_ok(), all(&model, first, count, true));
                    if result.is_ok() {
                        model[first as usize..(first + count) as usize].fill(false);
                    }
                }
                Step::Find { window, count, bits } => {
                    let (low, high) = (window.0.min(window.1), window.0.max(window.1));
                    let in_window = pages(base, low, high - low + 1);
                    let mut places = (low..=high)
                        .filter(|first| count > 0 && first + count <= high + 1)
                        .filter(|first| (base + first * PAGE) % (1 << bits) == 0)
                        .filter(|first| all(&model, *first, count, true))
                        .map(|first| pages(base, first, count));
                    let lowest = places.next();
                    let highest = places.next_back().or(lowest);
                    assert_eq!(holes.lowest(in_window, count * PAGE, 1 << bits), lowest);
                    assert_eq!(holes.highest(in_window, count * PAGE, 1 << bits), highest);
                }
            }
            let mut from_holes = [false; PAGES as usize];
            let mut before: Option<IovaRange> = None;
            holes.for_each(|hole| {
                assert!(
                    before.is_none_or(|before| before.last() + 1 < hole.first()),
                    "neighbours not joined"
                );
                before = Some(hole);
                let (first, last) = ((hole.first() - base) / PAGE, (hole.last() - base) / PAGE);
                from_holes[first as usize..=last as usize].fill(true);
            });
            assert_eq!(from_holes, model);
            let free = model.iter().filter(|free| **free).count() as u64;
            assert_eq!(holes.free_bytes(), free * PAGE);
            let runs = model.split(|free| !free).map(<[bool]>::len);
            assert_eq!(holes.largest(), runs.max().unwrap_or(0) as u64 * PAGE);
        }
    }

    proptest! {
        /// At the bottom, in the middle of a large aligned block, and at the very top, where sums overflow.
        #[test]
        fn agrees_with_a_bitmap(
            steps in proptest::collection::vec(step(), 1..80),
            base in prop_oneof![Just(0), Just((1 << 30) - 40 * PAGE), Just(0u64.wrapping_sub(PAGES * PAGE))],
            prepare in any::<bool>(),
        ) {
            run(base, &steps, prepare);
        }
    }

    #[test]
    fn all_of_the_address_space_is_one_hole() {
        let mut holes = Holes::new(PageSize::SIZE_4K);
        holes.free(IovaRange::ALL).unwrap();
        assert_eq!((holes.free_bytes(), holes.largest()), (u64::MAX, u64::MAX));
        let last_page = IovaRange::new(u64::MAX - 0xfff, u64::MAX).unwrap();
        assert_eq!(holes.highest(IovaRange::ALL, 1, 1), Some(last_page));
        assert_eq!(holes.lowest(last_page, PAGE, PAGE), Some(last_page));
        assert_eq!(holes.lowest(last_page, PAGE, 2 * PAGE), None);
        let half = IovaRange::new(1 << 63, u64::MAX).unwrap();
        assert_eq!(holes.highest(IovaRange::ALL, 1 << 63, 1 << 63), Some(half));
        holes.take(last_page).unwrap();
        assert_eq!(holes.highest(IovaRange::ALL, 1 << 63, 1 << 63), IovaRange::new(0, (1 << 63) - 1));
        assert_eq!(
            holes.highest(IovaRange::ALL, PAGE, PAGE).map(|place| place.last()),
            Some(u64::MAX - PAGE)
        );
        holes.free(last_page).unwrap();
        holes.take(IovaRange::ALL).unwrap();
        assert_eq!((holes.free_bytes(), holes.largest()), (0, 0));
    }

    #[test]
    fn nonsense_is_no_place() {
        let mut holes = Holes::new(PageSize::SIZE_4K);
        holes.free(IovaRange::ALL).unwrap();
        assert_eq!(holes.lowest(IovaRange::ALL, 0, PAGE), None);
        assert_eq!(holes.lowest(IovaRange::ALL, u64::MAX, PAGE), None);
        assert_eq!(holes.highest(IovaRange::ALL, PAGE, 3), None);
        assert_eq!(holes.highest(IovaRange::ALL, PAGE, 0), None);
        let crooked = IovaRange::new(1, PAGE).unwrap();
        assert!(matches!(holes.take(crooked), Err(HoleError::Misaligned { .. })));
        assert!(matches!(holes.free(crooked), Err(HoleError::Misaligned { .. })));
    }

    /// The case that makes a search by size alone look at every hole: all holes are large enough, and all but the
    /// last have no aligned place for the request. A tree of holes that does not know alignments visits them all.
    #[test]
    fn no_operation_takes_more_than_a_few_steps_for_each_level() {
        const HOLES: u64 = 1 << 17;
        let mut holes = Holes::new(PageSize::SIZE_4K);
        holes.prepare(PageSize::SIZE_1G);
        for number in 0..HOLES {
            // Three pages in every four, two of them on either side of a boundary of two pages only at the end.
            holes.free(pages(0, number * 8 + 1, 6)).unwrap();
        }
        holes.free(pages(0, HOLES * 8, 8)).unwrap();
        // Every node but the root has at least 8 slots in use.
        let levels = u64::from((HOLES * 2).ilog2() / 3 + 2);
        let alignments = u64::from(PageSize::SIZE_1G.log2() - PageSize::SIZE_4K.log2() + 1);
        for (count, alignment) in [(5, 8), (6, 2), (1, 8), (8, 8), (3, 4), (1, 1), (6, 1), (7, 1)] {
            for highest in [false, true] {
                let (found, steps) = steps::of(|| match highest {
                    false => holes.lowest(IovaRange::ALL, count * PAGE, alignment * PAGE),
                    true => holes.highest(IovaRange::ALL, count * PAGE, alignment * PAGE),
                });
                assert!(found.is_some());
                assert!(steps <= 6 * levels, "{steps} steps to find {count} at {alignment}, {levels} levels");
            }
        }
        for page in [4, 8 * (HOLES / 2) + 2, 8 * (HOLES - 1) + 6] {
            let ((), taking) = steps::of(|| holes.take(pages(0, page, 1)).unwrap());
            let ((), freeing) = steps::of(|| holes.free(pages(0, page, 1)).unwrap());
            let most = 6 * levels * alignments;
            assert!(taking <= most && freeing <= most, "{taking} and {freeing} steps, {levels} levels");
        }
        // On average, an entry or two are all that changes.
        let ((), sum) = steps::of(|| {
            for number in 0..HOLES {
                holes.take(pages(0, number * 8 + 3, 1)).unwrap();
            }
        });
        assert!(sum <= 8 * levels * HOLES, "{} steps each", sum / HOLES);
    }
}
