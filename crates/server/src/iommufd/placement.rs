//! Choosing an IOVA when the client does not.
//!
//! Linux's rules: the lowest place that has room, in what is allowed and not reserved. The place keeps the memory's
//! offset in its page and, up to a huge page, the alignment that the memory and the length have, so that large leaves
//! become possible. It is never 0, which programs take for failure, and the last page is left alone too.
//!
//! The areas know the holes between them, so the search costs O(log n) in the areas. Only where the memory does not begin at
//! a page, holes that are less than a page larger than the length are tried one by one.

use ioasid::iova::Holes;
use ioasid::{IovaRange, Space};
use rustix::io::Errno;

use super::areas::Areas;
use crate::memory::PAGE_SIZE;

/// The largest alignment that is kept: that of a huge page.
const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// The place for `length` bytes, not 0, of memory that begins at `start` (an address or file offset). `alignment` is
/// what the space's tables need.
///
/// # Errors
/// - `EOVERFLOW`: longer than half of the space. `EINVAL`: memory or length is not aligned as the tables need.
/// - `ENOSPC`: there is no room.
pub(super) fn find_room<P>(
    space: &Space,
    areas: &mut Areas<P>,
    start: u64,
    length: u64,
    alignment: u64,
) -> Result<u64, Errno> {
    if length >= u64::MAX / 2 {
        return Err(Errno::OVERFLOW);
    }
    let of_memory = if start == 0 { HUGE_PAGE_SIZE } else { 1 << start.trailing_zeros() };
    let wanted = length.next_power_of_two().min(of_memory).min(HUGE_PAGE_SIZE);
    if wanted < alignment {
        return Err(Errno::INVAL);
    }
    let holes = areas.holes();
    let offset = start % PAGE_SIZE;
    let mut windows = windows(space).into_iter();
    match offset {
        0 => windows
            .find_map(|window| holes.lowest(window, length, wanted))
            .map(|place| place.first())
            .ok_or(Errno::NOSPC),
        _ => windows.find_map(|window| at_offset(holes, window, length, offset)).ok_or(Errno::NOSPC),
    }
}

/// The lowest place that has this offset in its page.
fn at_offset(holes: &mut Holes, window: IovaRange, length: u64, offset: u64) -> Option<u64> {
    let mut from = window.first();
    loop {
        let room = holes.lowest(IovaRange::new(from, window.last())?, length, 1)?;
        let first = room.first().checked_add(offset.wrapping_sub(room.first()) % PAGE_SIZE)?;
        let place = IovaRange::with_length(first, length).filter(|place| window.covers(place))?;
        if holes.lowest(place, length, 1).is_some() {
            return Some(first);
        }
        // The hole ends within the place, so it has no room from here on.
        from = first;
    }
}

/// Where automatic placement may put something, ascending: what is allowed and not reserved, but for the first
/// and the last page.
fn windows(space: &Space) -> Vec<IovaRange> {
    let Some(limits) = IovaRange::new(PAGE_SIZE, u64::MAX - PAGE_SIZE) else { return Vec::new() };
    let allowed = match space.allowed_ranges() {
        ranges if ranges.is_empty() => vec![limits],
        ranges => joined(ranges),
    };
    let usable = space.usable_ranges();
    let (mut a, mut b) = (allowed.iter().peekable(), usable.iter().peekable());
    let mut windows = Vec::new();
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        windows.extend(x.intersection(y).and_then(|both| both.intersection(&limits)));
        if x.last() < y.last() {
            a.next()
        } else {
            b.next()
        };
    }
    windows
}

/// Ascending ranges with those that touch made one.
fn joined(ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    let mut joined: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(before) if before.last().checked_add(1) == Some(range.first()) => {
                *before = IovaRange::new(before.first(), range.last()).unwrap_or(range);
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioasid::{Bus, ReservationOwner};
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Ranges in units of half a page, within the first 32 pages.
    fn ranges() -> impl Strategy<Value = Vec<IovaRange>> {
        let range = (0..64_u64, 1..9_u64).prop_map(|(first, length)| {
            IovaRange::with_length(first * (PAGE_SIZE / 2), length * (PAGE_SIZE / 2)).unwrap()
        });
        vec(range, 0..6)
    }

    /// Tries every address.
    fn model(
        taken: &[IovaRange],
        allowed: &[IovaRange],
        length: u64,
        alignment: u64,
        offset: u64,
        end: u64,
    ) -> Option<u64> {
        let whole_byte_free = |byte: u64| {
            taken.iter().all(|range| !range.contains(byte))
                && (allowed.is_empty() || allowed.iter().any(|range| range.contains(byte)))
        };
        let mut iova = PAGE_SIZE.next_multiple_of(alignment) + offset;
        while iova + length <= end {
            // All ranges begin and end at multiples of half a page.
            let halves = (iova..iova + length).step_by(PAGE_SIZE as usize / 2).chain([iova + length - 1]);
            if halves.into_iter().all(whole_byte_free) {
                return Some(iova);
            }
            iova += alignment;
        }
        None
    }

    proptest! {
        #[test]
        fn finds_what_trying_every_place_finds(
            areas in ranges(),
            reserved in ranges(),
            allowed in ranges(),
            half_pages in 1..12_u64,
            start in prop_oneof![Just(0), (1..64_u64).prop_map(|page| page * PAGE_SIZE), 1..(64 * PAGE_SIZE)],
        ) {
            let space = Space::new(&Bus::new());
            let mut index = Areas::new();
            let mut taken = Vec::new();
            for area in areas {
                if index.insert(area, ()).is_ok() {
                    taken.push(area);
                }
            }
            // Ranges that exclude each other are refused; what was accepted is what counts.
            let allowed = if space.set_allowed(&allowed).is_ok() { allowed } else { Vec::new() };
            for range in reserved {
                if space.reserve(range, ReservationOwner::User(1)).is_ok() {
                    taken.push(range);
                }
            }
            let length = half_pages * (PAGE_SIZE / 2);
            let offset = start % PAGE_SIZE;
            let natural = if start == 0 { length.next_power_of_two() } else {
                length.next_power_of_two().min(1 << start.trailing_zeros())
            };
            let alignment = if offset == 0 { natural } else { PAGE_SIZE };
            let found = find_room(&space, &mut index, start, length, 1);
            let expected = model(&taken, &allowed, length, alignment, offset, 128 * PAGE_SIZE);
            prop_assert_eq!(found.ok(), expected);
        }
    }
}
