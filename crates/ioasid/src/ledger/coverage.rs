//! How often each page of an object is held.
//!
//! A count for every page would cost memory in proportion to the object. A registration holds an interval, so the
//! counts are a step function, and it is the steps that are kept: a terabyte registered once is two of them, and
//! whatever is held, no more than two for each registration.
//!
//! # Blocks
//!
//! One more hold changes the function at two pages, the ends of the interval; in between every step goes up by one
//! and no two become equal. A tree with an entry for each step would be searched several times for that, and each
//! of its nodes is a cache miss once there are many. So steps are kept sorted in *blocks* of some dozens, each of
//! which stands for the pages up to the next block, and the tree leads to blocks. Usually both ends lie in one block:
//! a change is one search in a small tree, one in an array, and a move of a few hundred bytes.
//!
//! Where steps are close to one another, as when a device driver maps single pages of a buffer in any order, a
//! block becomes [`Dense`]: bits for each page, which take less than the steps did.
//!
//! A block begins with a step even if nothing changes there, so that a change never has to look at the block before.
//! No two neighbours are both nearly empty, so what is kept stays in proportion to the steps that there are.

use std::collections::BTreeMap;
use std::ops::Range;

mod dense;

use dense::Dense;

/// A block with more steps than this is split. Small in unit tests, so that few steps fill many blocks.
const BLOCK: usize = if cfg!(test) { 6 } else { 62 };
/// A block of no more than this is joined with a neighbour if both are half a block at most.
const SPARSE: usize = BLOCK / 4;

/// A step function over page numbers, 0 almost everywhere.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    /// By their first page. The first block begins at page 0, the last ends behind all pages. None: 0 everywhere.
    blocks: BTreeMap<u64, Block>,
    /// The block that was changed last, unless it was divided or joined: who registers piece after piece goes on there.
    recent: Range<u64>,
}

/// What the function is between two pages.
#[derive(Clone, Debug)]
struct Block {
    /// The first page behind it.
    end: u64,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    /// Never empty; the first is at the block's first page. No two neighbours have the same count.
    Steps(Vec<Step>),
    Dense(Dense),
}

/// From this page on, up to the next step, every page is held this often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Step {
    page: u64,
    count: u64,
}

/// One hold more, or one less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Hold,
    Release,
}

impl Change {
    fn of(self, count: u64) -> u64 {
        match self {
            Change::Hold => count.saturating_add(1),
            Change::Release => count.saturating_sub(1),
        }
    }

    /// Whether a page that was held so often becomes held, or is held no more.
    fn crosses(self, count: u64) -> bool {
        count
            == match self {
                Change::Hold => 0,
                Change::Release => 1,
            }
    }
}

impl Coverage {
    /// Adds one hold of every page. Returns how many pages were not held before.
    pub(crate) fn hold(&mut self, pages: Range<u64>) -> u64 {
        if self.blocks.is_empty() && !pages.is_empty() {
            let steps = vec![Step { page: 0, count: 0 }];
            self.blocks.insert(0, Block { end: u64::MAX, content: Content::Steps(steps) });
        }
        self.change(pages, Change::Hold)
    }

    /// Takes one hold of every page back. Returns how many pages are not held any more.
    pub(crate) fn release(&mut self, pages: Range<u64>) -> u64 {
        let released = self.change(pages, Change::Release);
        if let (1, Some((_, only))) = (self.blocks.len(), self.blocks.first_key_value()) {
            if only.step_count() == 1 && only.parts(0, 0).all(|(_, count)| count == 0) {
                self.blocks.clear();
                self.recent = 0..0;
            }
        }
        released
    }

    /// Cuts the range into the parts that are held exactly so often and the others.
    pub(crate) fn divide(&self, pages: Range<u64>, times: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let (mut exactly, mut others) = (Vec::<Range<u64>>::new(), Vec::<Range<u64>>::new());
        for (part, count) in self.parts(pages) {
            let parts = if count == times { &mut exactly } else { &mut others };
            match parts.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ => parts.push(part),
            }
        }
        (exactly, others)
    }

    /// Whether nothing is held in the range.
    pub(crate) fn is_free(&self, pages: Range<u64>) -> bool {
        self.parts(pages).all(|(_, count)| count == 0)
    }

    /// The fewest and the most holds of a page in the range; 0 for an empty one.
    pub(crate) fn least_and_most(&self, pages: Range<u64>) -> (u64, u64) {
        let counts = self.parts(pages).map(|(_, count)| (count, count));
        counts.reduce(|(least, most), (count, _)| (least.min(count), most.max(count))).unwrap_or((0, 0))
    }

    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The range, cut where the count changes; a count that goes on in the next block is reported for each block.
    fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        let nothing = (self.blocks.is_empty() && !pages.is_empty()).then(|| (pages.clone(), 0));
        let first = self.blocks.range(..=pages.start).next_back().map_or(0, |(first, _)| *first);
        let blocks = self.blocks.range(first..pages.end.max(first));
        let (start, end) = (pages.start, pages.end);
        let parts = blocks.flat_map(move |(&first, block)| block.parts(first, start.max(first)));
        let parts = parts.take_while(move |(part, _)| part.start < end);
        nothing.into_iter().chain(parts.map(move |(part, count)| (part.start..part.end.min(end), count)))
    }

    fn change(&mut self, pages: Range<u64>, change: Change) -> u64 {
        let mut crossed = 0;
        let mut at = pages.start;
        while at < pages.end {
            let Some((first, block)) = self.block_at(at) else { break };
            let end = block.end.min(pages.end);
            crossed += block.change(first, at..end, change);
            let count = block.step_count();
            if count <= SPARSE {
                block.thin_out(first);
                self.recent = 0..0;
                if self.blocks.len() > 1 {
                    self.join_around(first);
                }
            } else if count > BLOCK {
                if let Some((page, rest)) = block.divide() {
                    self.recent = 0..0;
                    self.blocks.insert(page, rest);
                    self.join_next(page);
                }
            }
            at = end;
        }
        crossed
    }

    /// The block that a page lies in, with its first page.
    fn block_at(&mut self, page: u64) -> Option<(u64, &mut Block)> {
        if self.recent.contains(&page) {
            let first = self.recent.start;
            return self.blocks.get_mut(&first).map(|block| (first, block));
        }
        let (&first, block) = self.blocks.range_mut(..=page).next_back()?;
        self.recent = first..block.end;
        Some((first, block))
    }

    /// Joins a block that has become small with its neighbours, as long as the result is not large.
    fn join_around(&mut self, first: u64) {
        let before = self.blocks.range(..first).next_back().map(|(before, _)| *before);
        self.join_next(first);
        if let Some(before) = before {
            self.join_next(before);
        }
    }

    /// Joins a block with the next one, if there is one and both fit well into one.
    fn join_next(&mut self, first: u64) {
        let Some(Block { end, content: Content::Steps(steps) }) = self.blocks.get(&first) else { return };
        let end = *end;
        match self.blocks.get(&end) {
            Some(Block { content: Content::Steps(next), .. }) if steps.len() + next.len() <= BLOCK / 2 => {}
            _ => return,
        }
        if let (Some(next), Some(block)) = (self.blocks.remove(&end), self.blocks.get_mut(&first)) {
            block.append(&next);
        }
    }
}

impl Block {
    /// How many steps it has.
    fn step_count(&self) -> usize {
        match &self.content {
            Content::Steps(steps) => steps.len(),
            Content::Dense(dense) => dense.step_count(),
        }
    }

    /// Changes the count of pages that all lie in this block, which begins at `first`. Returns how many became held or
    /// unheld by it.
    fn change(&mut self, first: u64, pages: Range<u64>, change: Change) -> u64 {
        match &mut self.content {
            Content::Steps(steps) => change_steps(steps, self.end, pages, change),
            Content::Dense(dense) => {
                dense.change((pages.start - first) as usize..(pages.end - first) as usize, change)
            }
        }
    }

    /// The parts of equal counts from page `from` on, which lies in the block.
    fn parts(&self, first: u64, from: u64) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        let (steps, dense) = match &self.content {
            Content::Steps(steps) => (&steps[steps.partition_point(|step| step.page <= from) - 1..], None),
            Content::Dense(dense) => (&[][..], Some(dense)),
        };
        let sparse = steps.iter().map(move |step| (step.page.max(from), step.count));
        let dense = dense.map(|dense| dense.steps_from((from - first) as usize)).into_iter().flatten();
        let mut steps = sparse.chain(dense.map(move |(page, count)| (first + page as u64, count))).peekable();
        std::iter::from_fn(move || {
            let (page, count) = steps.next()?;
            let end = steps.peek().map_or(self.end, |next| next.0);
            Some((page..end, count))
        })
    }

    /// Makes one of two or, where the steps are close to one another, a dense one. What was split off is returned with
    /// its first page.
    fn divide(&mut self) -> Option<(u64, Block)> {
        let Content::Steps(steps) = &mut self.content else { return None };
        let (first, last) = (*steps.first()?, *steps.last()?);
        let end = first.page.saturating_add(dense::PAGES).min(self.end);
        let (page, rest) = if last.page < end {
            self.content = Content::Dense(Dense::new(steps, end));
            (end, vec![Step { page: end, count: last.count }])
        } else {
            // Pages often come in ascending order, so the last block is filled up before.
            let middle = if self.end == u64::MAX { steps.len() - 2 } else { steps.len() / 2 };
            let mut rest = Vec::with_capacity(BLOCK + 2);
            rest.extend_from_slice(&steps[middle..]);
            steps.truncate(middle);
            (rest[0].page, rest)
        };
        let rest = Block { end: self.end, content: Content::Steps(rest) };
        self.end = page;
        (page < rest.end).then_some((page, rest))
    }

    /// Turns a dense block back into steps.
    fn thin_out(&mut self, first: u64) {
        if let Content::Dense(dense) = &self.content {
            let steps = dense.steps_from(0).map(|(page, count)| Step { page: first + page as u64, count });
            self.content = Content::Steps(steps.collect());
        }
    }

    /// Adds the block behind this one. Both have steps.
    fn append(&mut self, next: &Block) {
        let (Content::Steps(steps), Content::Steps(more)) = (&mut self.content, &next.content) else {
            return;
        };
        let same = steps.last().map(|step| step.count) == more.first().map(|step| step.count);
        steps.extend_from_slice(&more[usize::from(same)..]);
        self.end = next.end;
    }
}

/// Changes the count of pages in a block of steps that ends at `block_end`.
fn change_steps(steps: &mut Vec<Step>, block_end: u64, pages: Range<u64>, change: Change) -> u64 {
    // The step that the first page stands on, and the first one that is not changed any more.
    let first = steps.partition_point(|step| step.page <= pages.start).saturating_sub(1);
    let mut behind = first;
    let mut crossed = 0;
    let mut last = 0;
    while let Some(step) = steps.get(behind).copied().filter(|step| step.page < pages.end) {
        let end = steps.get(behind + 1).map_or(block_end, |next| next.page);
        if change.crosses(step.count) {
            crossed += end.min(pages.end) - step.page.max(pages.start);
        }
        last = step.count;
        behind += 1;
    }
    // In between all counts change alike. What is left are the two ends; each is a step if the counts before
    // and behind it are different.
    for step in &mut steps[first + 1..behind] {
        step.count = change.of(step.count);
    }
    let old = steps[first];
    let (mut head, mut tail) = (Few::default(), Few::default());
    if old.page < pages.start {
        head.push(old);
    }
    if head.length > 0 || first == 0 || steps[first - 1].count != change.of(old.count) {
        head.push(Step { page: pages.start, count: change.of(old.count) });
    }
    let at_end = steps.get(behind).filter(|step| step.page == pages.end);
    let replaced = behind..behind + usize::from(at_end.is_some());
    let count = at_end.map_or(last, |step| step.count);
    // The next block has a step at its beginning in any case.
    if pages.end < block_end && count != change.of(last) {
        tail.push(Step { page: pages.end, count });
    }
    if first + 1 == behind {
        // In one move.
        tail.steps[..tail.length].iter().for_each(|step| head.push(*step));
        replace(steps, first..replaced.end, &head.steps[..head.length]);
    } else {
        replace(steps, replaced, &tail.steps[..tail.length]);
        replace(steps, first..first + 1, &head.steps[..head.length]);
    }
    crossed
}

/// Steps that take the place of others.
#[derive(Default)]
struct Few {
    steps: [Step; 3],
    length: usize,
}

impl Few {
    fn push(&mut self, step: Step) {
        self.steps[self.length] = step;
        self.length += 1;
    }
}

/// Puts a few steps in the place of others. `Vec::splice` does the same, and takes three times as long for so few.
fn replace(steps: &mut Vec<Step>, old: Range<usize>, new: &[Step]) {
    let length = steps.len();
    let behind = old.start + new.len();
    if behind > old.end {
        steps.resize(length + (behind - old.end), Step::default());
    }
    steps.copy_within(old.end..length, behind);
    steps[old.start..behind].copy_from_slice(new);
    steps.truncate(length + behind - old.end);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Coverage {
        /// How many intervals of equal counts are kept.
        pub(crate) fn intervals(&self) -> usize {
            self.blocks.values().map(Block::step_count).sum()
        }

        fn at(&self, page: u64) -> u64 {
            self.least_and_most(page..page + 1).0
        }

        /// What the module says that it keeps.
        fn check(&self) {
            let mut next = 0;
            for (&first, block) in &self.blocks {
                let parts: Vec<(Range<u64>, u64)> = block.parts(first, first).collect();
                assert_eq!((first, parts[0].0.start), (next, next));
                assert_eq!(parts.len(), block.step_count());
                for pair in parts.windows(2) {
                    assert!(pair[0].0.end == pair[1].0.start && pair[0].1 != pair[1].1, "{pair:?}");
                }
                assert!(parts.iter().all(|(part, _)| !part.is_empty()));
                assert_eq!(parts.last().unwrap().0.end, block.end);
                match block.content {
                    Content::Steps(_) => assert!(parts.len() <= BLOCK),
                    Content::Dense(_) => assert!(parts.len() > SPARSE && block.end - first <= dense::PAGES),
                }
                next = block.end;
            }
            assert_eq!(next, if self.blocks.is_empty() { 0 } else { u64::MAX });
            let lengths: Vec<usize> = self.blocks.values().map(Block::step_count).collect();
            for pair in lengths.windows(2) {
                assert!(pair.iter().any(|length| *length > SPARSE), "{lengths:?}");
            }
        }
    }

    const PAGES: u64 = 400;

    proptest! {
        #[test]
        fn agrees_with_a_count_for_every_page(
            changes in prop::collection::vec((0u64..PAGES, 0u64..PAGES, 0u8..3, 0usize..64), 1..200),
            query in (0u64..PAGES, 0u64..PAGES),
            short in any::<bool>(),
        ) {
            let mut coverage = Coverage::default();
            let mut plain = [0u64; PAGES as usize + 2];
            let mut held: Vec<Range<u64>> = Vec::new();
            for (a, b, kind, which) in changes {
                let pages = if short { a..a + b % 4 } else { a.min(b)..a.max(b) };
                let pages = pages.start..pages.end.min(PAGES);
                let slice = |pages: &Range<u64>| pages.start as usize..pages.end.max(pages.start) as usize;
                if kind == 0 && !held.is_empty() {
                    let pages = held.swap_remove(which % held.len());
                    let counts = &mut plain[slice(&pages)];
                    let released = counts.iter().filter(|count| **count == 1).count() as u64;
                    counts.iter_mut().for_each(|count| *count -= 1);
                    prop_assert_eq!(coverage.release(pages), released);
                } else {
                    held.push(pages.clone());
                    let counts = &mut plain[slice(&pages)];
                    let new = counts.iter().filter(|count| **count == 0).count() as u64;
                    counts.iter_mut().for_each(|count| *count += 1);
                    prop_assert_eq!(coverage.hold(pages), new);
                }
                coverage.check();
                let counts: Vec<u64> = coverage
                    .parts(0..PAGES)
                    .flat_map(|(part, count)| part.map(move |_| count))
                    .collect();
                prop_assert_eq!(&counts[..], &plain[..PAGES as usize]);
            }
            let query = query.0.min(query.1)..query.0.max(query.1) + 1;
            let slice = &plain[query.start as usize..query.end as usize];
            let extremes = (*slice.iter().min().unwrap(), *slice.iter().max().unwrap());
            prop_assert_eq!(coverage.least_and_most(query.clone()), extremes);
            prop_assert_eq!(coverage.is_free(query.clone()), slice.iter().all(|count| *count == 0));
            let (once, others) = coverage.divide(query.clone(), 1);
            for page in query {
                let within = |parts: &[Range<u64>]| parts.iter().filter(|part| part.contains(&page)).count();
                let expected = if plain[page as usize] == 1 { (1, 0) } else { (0, 1) };
                prop_assert_eq!((within(&once), within(&others)), expected);
            }
            prop_assert!(once.windows(2).chain(others.windows(2)).all(|pair| pair[0].end < pair[1].start));
            for pages in held {
                coverage.release(pages);
                coverage.check();
            }
            prop_assert!(coverage.is_empty());
        }
    }

    #[test]
    fn what_is_kept_depends_on_registrations_and_not_on_pages() {
        let mut coverage = Coverage::default();
        assert_eq!(coverage.hold(0..1 << 52), 1 << 52);
        assert_eq!(coverage.intervals(), 2);
        assert_eq!(coverage.release(0..1 << 52), 1 << 52);
        assert!(coverage.is_empty());

        // Every other page, several times, is the worst that can be done with pages.
        const PIECES: u64 = 1000;
        for round in 0..3 {
            for piece in 0..PIECES {
                assert_eq!(coverage.hold(2 * piece..2 * piece + 1), u64::from(round == 0));
            }
            coverage.check();
            assert!(coverage.intervals() as u64 <= 2 * PIECES + 1 + coverage.blocks.len() as u64);
        }
        // Without the gaps it is one piece.
        for piece in 0..PIECES {
            for _ in 0..3 {
                coverage.hold(2 * piece + 1..2 * piece + 2);
            }
        }
        coverage.check();
        assert!(coverage.intervals() <= 2 + coverage.blocks.len());
        for piece in (0..2 * PIECES).rev() {
            for _ in 0..3 {
                coverage.release(piece..piece + 1);
            }
        }
        assert!(coverage.is_empty());
    }

    #[test]
    fn nested_intervals_keep_two_steps_each() {
        let mut coverage = Coverage::default();
        for depth in 0..500 {
            coverage.hold(depth..1000 - depth);
        }
        coverage.check();
        assert_eq!((coverage.at(499), coverage.at(500), coverage.at(1000)), (500, 500, 0));
        assert!(coverage.intervals() <= 1000 + coverage.blocks.len());
        // In another order than they came.
        for depth in 0..500 {
            coverage.release(depth..1000 - depth);
        }
        assert!(coverage.is_empty());
    }
}
