//! A bitmap of dirty pages, in memory of the caller's.
//!
//! This is the form in which VMMs pass dirty pages on: one bit for each page from some address on, in words of 64 bits,
//! the lowest bit first.

use crate::address::{IovaRange, PageSize};

/// One bit for each page of `granule` from an address on.
///
/// ```
/// use ioasid_pagetable::{DirtyBitmap, IovaRange, PageSize};
///
/// let mut words = [0; 2];
/// let mut bitmap = DirtyBitmap::new(&mut words, 0x10_0000, PageSize::SIZE_4K);
/// bitmap.set(IovaRange::with_length(0x10_1000, 0x2000).unwrap());
/// assert_eq!(words, [0b110, 0]);
/// ```
#[derive(Debug)]
pub struct DirtyBitmap<'a> {
    words: &'a mut [u64],
    first: u64,
    granule: PageSize,
}

impl<'a> DirtyBitmap<'a> {
    /// A bitmap whose first bit stands for the page at `first`.
    pub fn new(words: &'a mut [u64], first: u64, granule: PageSize) -> DirtyBitmap<'a> {
        DirtyBitmap { words, first, granule }
    }

    /// Sets the bit of every page that the range touches. Pages that the bitmap has no bit for are left out.
    pub fn set(&mut self, range: IovaRange) {
        let bits = (self.words.len() as u64).saturating_mul(64);
        if range.last() < self.first || bits == 0 {
            return;
        }
        let begin = range.first().saturating_sub(self.first) >> self.granule.log2();
        let end = ((range.last() - self.first) >> self.granule.log2()).min(bits - 1);
        if begin > end {
            return;
        }
        // From bit `begin` of its word on, and up to bit `end` of its own.
        let head = u64::MAX << (begin % 64);
        let tail = u64::MAX >> (63 - end % 64);
        let (begin, end) = ((begin / 64) as usize, (end / 64) as usize);
        for (index, word) in self.words.iter_mut().enumerate().take(end + 1).skip(begin) {
            let from = if index == begin { head } else { u64::MAX };
            let to = if index == end { tail } else { u64::MAX };
            *word |= from & to;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_pages_touched_are_set() {
        const PAGES: u64 = 192;
        let base = u64::MAX - PAGES * 4096 + 1;
        for (first, last) in [(0, 0), (0, 63), (1, 64), (63, 64), (5, 191), (0, 191), (128, 128)] {
            let mut words = [0; 3];
            let range = IovaRange::new(base + first * 4096 + 4095, base + last * 4096 + 4095).unwrap();
            DirtyBitmap::new(&mut words, base, PageSize::SIZE_4K).set(range);
            for page in 0..PAGES {
                let bit = words[(page / 64) as usize] >> (page % 64) & 1;
                assert_eq!(bit == 1, (first..=last).contains(&page), "page {page} of {first}..={last}");
            }
        }
    }

    #[test]
    fn what_lies_outside_is_left_out() {
        let mut words = [0];
        let mut bitmap = DirtyBitmap::new(&mut words, 0x10_0000, PageSize::SIZE_4K);
        bitmap.set(IovaRange::new(0, 0xf_ffff).unwrap());
        bitmap.set(IovaRange::new(0x14_0000, u64::MAX).unwrap());
        assert_eq!(words, [0]);
        DirtyBitmap::new(&mut words, 0x10_0000, PageSize::SIZE_4K).set(IovaRange::ALL);
        assert_eq!(words, [u64::MAX]);
        DirtyBitmap::new(&mut [], 0, PageSize::SIZE_4K).set(IovaRange::ALL);
    }
}
