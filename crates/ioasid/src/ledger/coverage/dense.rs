//! Blocks in which the count changes at every few pages.
//!
//! A [`Dense`] block has a counter for each of its pages, in binary and stood on end: the first *plane* has the lowest
//! bit of every counter, the next plane the next bit. Adding one to all counters of a range is then a carry from plane
//! to plane, 64 pages at a time, and pages that are held never or once, as most are, take two bits at the most.

use super::{Change, Step};
use std::ops::Range;

/// How many words a plane has.
const WORDS: usize = if cfg!(test) { 1 } else { 64 };
/// How many pages a block can have.
pub(super) const PAGES: u64 = WORDS as u64 * 64;

type Plane = [u64; WORDS];

/// A block of not more than [`PAGES`] pages. Pages are counted from its first.
#[derive(Clone, Debug)]
pub(super) struct Dense {
    /// How many pages there are.
    length: usize,
    /// How many pages have another count than the one before; the first page is one of them.
    steps: usize,
    /// The bits of the counts, the lowest first. Behind the last page they are 0.
    planes: Vec<Plane>,
}

impl Dense {
    /// A block with these steps, from the first page up to, not including, `end`.
    pub(super) fn new(steps: &[Step], end: u64) -> Dense {
        let first = steps.first().map_or(end, |step| step.page);
        let largest = steps.iter().map(|step| step.count).max().unwrap_or(0);
        let planes = vec![[0; WORDS]; (u64::BITS - largest.leading_zeros()) as usize];
        let mut dense = Dense { length: (end - first) as usize, steps: steps.len(), planes };
        let ends = steps.iter().skip(1).map(|step| step.page).chain([end]);
        for (step, end) in steps.iter().zip(ends) {
            for (bit, plane) in dense.planes.iter_mut().enumerate() {
                if step.count >> bit & 1 != 0 {
                    for (word, mask) in words((step.page - first) as usize..(end - first) as usize) {
                        plane[word] |= mask;
                    }
                }
            }
        }
        dense
    }

    /// How many steps it has.
    pub(super) fn step_count(&self) -> usize {
        self.steps
    }

    /// Changes the count of pages. Returns how many became held or unheld by it.
    pub(super) fn change(&mut self, pages: Range<usize>, change: Change) -> u64 {
        // Only at the two ends a step can come or go.
        let before = self.steps_at(&pages);
        let mut crossed = 0;
        for (word, mask) in words(pages.clone()) {
            crossed += self.change_word(word, mask, change);
        }
        self.steps = self.steps + self.steps_at(&pages) - before;
        crossed
    }

    /// Changes the count of those of 64 pages that are in the mask. Returns how many became held or unheld by it.
    #[inline]
    fn change_word(&mut self, word: usize, mask: u64, change: Change) -> u64 {
        // To add one, those bits turn over that are reached by a carry, which goes on where the bit was set; to
        // subtract one, the same with bits that were not.
        let mut carry = mask;
        let mut held = 0;
        for plane in &mut self.planes {
            let bits = plane[word];
            let flipped = carry;
            carry &= match change {
                Change::Hold => bits,
                Change::Release => !bits,
            };
            plane[word] = bits ^ flipped;
            held |= match change {
                Change::Hold => bits,
                Change::Release => bits ^ flipped,
            };
        }
        if carry != 0 && change == Change::Hold {
            let mut plane = [0; WORDS];
            plane[word] = carry;
            self.planes.push(plane);
        }
        match mask & !held {
            0 => 0,
            // Counting takes a while, and mostly it is one page.
            crossed if crossed.is_power_of_two() => 1,
            crossed => u64::from(crossed.count_ones()),
        }
    }

    /// The steps from a page on, which is the first of them.
    pub(super) fn steps_from(&self, page: usize) -> impl Iterator<Item = (usize, u64)> + '_ {
        let mut word = page / 64;
        let bit = page % 64;
        let mut found = (self.changes_in(word) | 1 << bit) & u64::MAX << bit;
        std::iter::from_fn(move || {
            while found == 0 {
                word += 1;
                if word * 64 >= self.length {
                    return None;
                }
                found = self.changes_in(word);
            }
            let page = word * 64 + found.trailing_zeros() as usize;
            found &= found - 1;
            Some((page, self.count(page)))
        })
    }

    fn count(&self, page: usize) -> u64 {
        let bits = self.planes.iter().enumerate();
        bits.fold(0, |count, (bit, plane)| count | (plane[page / 64] >> (page % 64) & 1) << bit)
    }

    /// How many of the range's ends are steps.
    #[inline]
    fn steps_at(&self, pages: &Range<usize>) -> usize {
        let changes = self.changes_in(pages.start / 64);
        let at_end = match pages.end / 64 {
            // Mostly.
            word if word == pages.start / 64 => changes,
            word if pages.end < self.length => self.changes_in(word),
            _ => 0,
        };
        (changes >> (pages.start % 64) & 1) as usize + (at_end >> (pages.end % 64) & 1) as usize
    }

    /// Which of 64 pages have another count than the one before.
    #[inline]
    fn changes_in(&self, word: usize) -> u64 {
        let changes = self.planes.iter().map(|plane| {
            let before = if word == 0 { plane[0] & 1 } else { plane[word - 1] >> 63 };
            plane[word] ^ (plane[word] << 1 | before)
        });
        let behind = if word == self.length / 64 { u64::MAX << (self.length % 64) } else { 0 };
        changes.fold(0, |all, changes| all | changes) & !behind
    }
}

/// The words in which the bits of a range are, and which of their bits those are.
fn words(pages: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let first = pages.start / 64;
    (first..pages.end.div_ceil(64)).map(move |word| {
        let from = pages.start.saturating_sub(word * 64);
        let to = (pages.end - word * 64).min(64);
        (word, u64::MAX << from & u64::MAX >> (64 - to))
    })
}
