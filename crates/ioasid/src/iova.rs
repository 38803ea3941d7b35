//! Finding a free place for a mapping.
//!
//! The search knows nothing of tables or areas: it asks what stands in the way of a candidate and goes on behind
//! that. So the same function serves a space, whose native table is the only record of what is mapped, and a
//! front end that keeps an index of its own. What is found is a proposal; the claim in the table decides.

use ioasid_pagetable::IovaRange;

/// The lowest multiple of `alignment` in `window` from which `length` bytes are free.
///
/// `conflict` is asked for some occupied range that overlaps the candidate; the further its end, the faster the
/// search. `None` if no place is left, or if `length` is 0 or `alignment` no power of two.
///
/// ```
/// use ioasid::{IovaRange, iova::find_hole};
/// let taken = [IovaRange::new(0x1000, 0x1fff).unwrap(), IovaRange::new(0x4000, 0x7fff).unwrap()];
/// let conflict = |range: IovaRange| taken.iter().rev().find(|taken| taken.overlaps(&range)).copied();
/// assert_eq!(find_hole(IovaRange::new(0x1000, 0xffff).unwrap(), 0x2000, 0x1000, conflict), Some(0x2000));
/// assert_eq!(find_hole(IovaRange::new(0x1000, 0xffff).unwrap(), 0x3000, 0x1000, conflict), Some(0x8000));
/// ```
pub fn find_hole(
    window: IovaRange,
    length: u64,
    alignment: u64,
    mut conflict: impl FnMut(IovaRange) -> Option<IovaRange>,
) -> Option<u64> {
    if !alignment.is_power_of_two() {
        return None;
    }
    let align = |address: u64| Some(address.checked_add(alignment - 1)? & !(alignment - 1));
    let mut first = align(window.first())?;
    loop {
        let candidate = IovaRange::with_length(first, length)?;
        if candidate.last() > window.last() {
            return None;
        }
        match conflict(candidate) {
            None => return Some(first),
            // A conflict that does not overlap would make the search go backwards or stand still.
            Some(taken) => first = align(taken.last().max(first).checked_add(1)?)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(first, last).unwrap()
    }

    #[test]
    fn the_last_page_can_be_found_and_nothing_beyond() {
        let taken = range(0, u64::MAX - 0x1000);
        let conflict = |candidate: IovaRange| taken.overlaps(&candidate).then_some(taken);
        assert_eq!(find_hole(IovaRange::ALL, 0x1000, 0x1000, conflict), Some(u64::MAX - 0xfff));
        assert_eq!(find_hole(IovaRange::ALL, 0x2000, 0x1000, conflict), None);
        assert_eq!(find_hole(IovaRange::ALL, 0x1000, 0x2000, conflict), None);
        assert_eq!(find_hole(IovaRange::ALL, 0x1000, 0x1000, |_| Some(IovaRange::ALL)), None);
    }

    #[test]
    fn nonsense_is_no_place() {
        assert_eq!(find_hole(IovaRange::ALL, 0, 1, |_| None), None);
        assert_eq!(find_hole(IovaRange::ALL, 1, 3, |_| None), None);
        assert_eq!(find_hole(range(0, 10), 12, 1, |_| None), None);
    }
}
