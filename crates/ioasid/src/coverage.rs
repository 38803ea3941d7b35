//! How often each page of an object is held.
//!
//! A count for every page would cost memory in proportion to the object. A registration holds an interval, so
//! the counts are a step function, and it is the steps that are kept: a terabyte registered once is two of them.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

/// A step function over page numbers, 0 almost everywhere.
#[derive(Debug, Default)]
pub(crate) struct Coverage {
    /// From this page on, up to the next key, every page is held this often. No two neighbours are equal, and
    /// what stands before the first key is 0.
    steps: BTreeMap<u64, u32>,
}

impl Coverage {
    /// Adds one hold of every page.
    pub(crate) fn hold(&mut self, pages: Range<u64>) {
        self.change(pages, |count| count.saturating_add(1));
    }

    /// Takes one hold of every page back.
    pub(crate) fn release(&mut self, pages: Range<u64>) {
        self.change(pages, |count| count.saturating_sub(1));
    }

    /// Those parts of the range that are held exactly `count` times.
    pub(crate) fn held_exactly(
        &self,
        pages: Range<u64>,
        count: u32,
    ) -> impl Iterator<Item = Range<u64>> + '_ {
        self.steps(pages).filter(move |(_, held)| *held == count).map(|(part, _)| part)
    }

    /// The fewest and the most holds in the range; 0 for an empty one.
    pub(crate) fn least_and_most(&self, pages: Range<u64>) -> RangeInclusive<u32> {
        let mut all = self.steps(pages).map(|(_, count)| count);
        let first = all.next().unwrap_or(0);
        let (least, most) =
            all.fold((first, first), |(least, most), count| (least.min(count), most.max(count)));
        least..=most
    }

    /// Whether nothing is held in the range, which is not empty.
    pub(crate) fn is_free(&self, pages: Range<u64>) -> bool {
        // Where nothing is held at first, any step would be one up.
        self.at(pages.start) == 0 && self.steps.range(pages.start + 1..pages.end).next().is_none()
    }

    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    fn at(&self, page: u64) -> u32 {
        self.steps.range(..=page).next_back().map_or(0, |(_, &count)| count)
    }

    /// The range, cut where the count changes.
    fn steps(&self, pages: Range<u64>) -> impl Iterator<Item = (Range<u64>, u32)> + '_ {
        let mut at = pages.start;
        std::iter::from_fn(move || {
            if at >= pages.end {
                return None;
            }
            let count = self.at(at);
            let end = self.steps.range(at + 1..).next().map_or(pages.end, |(&next, _)| next.min(pages.end));
            let part = at..end;
            at = end;
            Some((part, count))
        })
    }

    fn change(&mut self, pages: Range<u64>, change: impl Fn(u32) -> u32) {
        if pages.is_empty() {
            return;
        }
        // Steps at both ends, then every step in between, then no two equal neighbours.
        for edge in [pages.start, pages.end] {
            let count = self.at(edge);
            self.steps.insert(edge, count);
        }
        for count in self.steps.range_mut(pages.clone()).map(|(_, count)| count) {
            *count = change(*count);
        }
        let mut before = self.steps.range(..pages.start).next_back().map_or(0, |(_, &count)| count);
        let edges: Vec<(u64, u32)> =
            self.steps.range(pages.start..=pages.end).map(|(&at, &count)| (at, count)).collect();
        for (at, count) in edges {
            if count == before {
                self.steps.remove(&at);
            }
            before = count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_count_for_every_page(
            changes in prop::collection::vec((0u64..40, 0u64..40), 1..40),
            query in (0u64..45, 0u64..45),
        ) {
            let mut coverage = Coverage::default();
            let mut plain = [0u32; 64];
            let mut held = Vec::new();
            for (a, b) in changes {
                let pages = a.min(b)..a.max(b);
                // Release what is held already now and then; otherwise hold.
                let release = (a + b) % 3 == 0 && !held.is_empty();
                let pages = if release { held.remove(0) } else { pages };
                for page in pages.clone() {
                    plain[page as usize] = if release { plain[page as usize] - 1 } else { plain[page as usize] + 1 };
                }
                if release { coverage.release(pages) } else { held.push(pages.clone()); coverage.hold(pages) }
                for (page, &count) in plain.iter().enumerate() {
                    prop_assert_eq!(coverage.at(page as u64), count);
                }
            }
            let query = query.0.min(query.1)..query.0.max(query.1) + 1;
            let slice = &plain[query.start as usize..query.end as usize];
            prop_assert_eq!(coverage.least_and_most(query.clone()), *slice.iter().min().unwrap()..=*slice.iter().max().unwrap());
            let zero: u64 = coverage.held_exactly(query.clone(), 0).map(|part| part.end - part.start).sum();
            let free = coverage.is_free(query.clone());
            prop_assert_eq!(free, slice.iter().all(|count| *count == 0));
            prop_assert_eq!(zero, slice.iter().filter(|count| **count == 0).count() as u64);
            for pages in held {
                coverage.release(pages);
            }
            prop_assert!(coverage.is_empty());
        }
    }
}
