//! The index of areas: which piece of the I/O address space comes from where.
//!
//! Linux's interface speaks of *areas*, not of pages: what one call maps is one area, of any length in bytes, and
//! only whole areas can be unmapped. This index keeps them in a map ordered by first IOVA. Areas never overlap, so
//! the one that contains an address is the last one that starts at or below it, and every question costs
//! O(log areas) plus the answer.
//!
//! What is between areas is known too, from the first time on that somebody wants to be placed automatically. Clients
//! that choose their addresses themselves do not pay for that.
//!
//! The index knows nothing of memory: what an area refers to is its payload. It is a value; the lock is its owner's.

use std::collections::BTreeMap;

use ioasid::iova::Holes;
use ioasid::{IovaRange, PageSize};

/// Areas begin and end anywhere.
const BYTE: PageSize = PageSize::from_log2(0).unwrap();

/// Areas by IOVA.
#[derive(Debug)]
pub(crate) struct Areas<P> {
    by_first: BTreeMap<u64, Slot<P>>,
    mapped: u128,
    /// What no area covers, by the byte, once somebody has asked.
    holes: Option<Holes>,
}

#[derive(Debug)]
struct Slot<P> {
    last: u64,
    payload: P,
}

/// A part of one area, as [`Areas::pieces`] finds it.
#[derive(Debug)]
pub(crate) struct Piece<'a, P> {
    /// What the area refers to.
    pub(crate) payload: &'a P,
    /// Where in the area the piece begins, in bytes.
    pub(crate) offset: u64,
    /// The part of the I/O address space that the piece covers.
    pub(crate) range: IovaRange,
}

/// Why a range cannot be unmapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CutRefused {
    /// An area begins before the range or ends behind it.
    PartOfArea,
}

fn range_of(first: u64, last: u64) -> IovaRange {
    IovaRange::new(first, last).unwrap_or(IovaRange::ALL)
}

impl<P> Areas<P> {
    pub(crate) fn new() -> Self {
        Self { by_first: BTreeMap::new(), mapped: 0, holes: None }
    }

    /// How many areas there are.
    pub(crate) fn len(&self) -> usize {
        self.by_first.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_first.is_empty()
    }

    /// How many bytes the areas cover.
    pub(crate) fn mapped_bytes(&self) -> u128 {
        self.mapped
    }

    /// The last of the areas that have a byte in `range`.
    pub(crate) fn last_overlap(&self, range: IovaRange) -> Option<IovaRange> {
        let (&first, slot) = self.by_first.range(..=range.last()).next_back()?;
        (slot.last >= range.first()).then(|| range_of(first, slot.last))
    }

    /// Whether any area has a byte in `range`.
    pub(crate) fn overlaps(&self, range: IovaRange) -> bool {
        self.last_overlap(range).is_some()
    }

    /// The area that has the byte at `iova`.
    pub(crate) fn at(&self, iova: u64) -> Option<(IovaRange, &P)> {
        let (&first, slot) = self.by_first.range(..=iova).next_back()?;
        (slot.last >= iova).then(|| (range_of(first, slot.last), &slot.payload))
    }

    /// From the first byte in `range` that an area has to the last.
    pub(crate) fn hull_in(&self, range: IovaRange) -> Option<IovaRange> {
        let last = self.last_overlap(range)?.last().min(range.last());
        let first = match self.at(range.first()) {
            Some(_) => range.first(),
            None => *self.by_first.range(range.first()..=range.last()).next()?.0,
        };
        IovaRange::new(first, last)
    }

    /// Makes two areas of the one that has `at` and does not begin there; `parts` says what they refer to, given the
    /// length of the first in bytes.
    pub(crate) fn divide(&mut self, at: u64, parts: impl FnOnce(P, u64) -> (P, P)) {
        let Some((area, _)) = self.at(at).filter(|(area, _)| area.first() < at) else { return };
        let Some(slot) = self.by_first.remove(&area.first()) else { return };
        let (before, behind) = parts(slot.payload, at - area.first());
        self.by_first.insert(area.first(), Slot { last: at - 1, payload: before });
        self.by_first.insert(at, Slot { last: slot.last, payload: behind });
    }

    /// Adds an area.
    ///
    /// # Errors
    /// Gives the payload back if an area overlaps `range`; nothing has changed then.
    pub(crate) fn insert(&mut self, range: IovaRange, payload: P) -> Result<(), P> {
        if self.overlaps(range) {
            return Err(payload);
        }
        self.mapped += length_of(range);
        if let Some(holes) = &mut self.holes {
            let taken = holes.take(range);
            debug_assert!(taken.is_ok(), "no area is in a hole");
        }
        self.by_first.insert(range.first(), Slot { last: range.last(), payload });
        Ok(())
    }

    /// Removes the area that covers exactly `range`.
    pub(crate) fn remove(&mut self, range: IovaRange) -> Option<P> {
        if self.by_first.get(&range.first())?.last != range.last() {
            return None;
        }
        let slot = self.by_first.remove(&range.first())?;
        self.mapped -= length_of(range);
        if let Some(holes) = &mut self.holes {
            let freed = holes.free(range);
            debug_assert!(freed.is_ok(), "no hole is in an area");
        }
        Some(slot.payload)
    }

    /// What no area covers, by the byte. The first time costs a step for each area.
    pub(crate) fn holes(&mut self) -> &mut Holes {
        let Self { by_first, holes, .. } = self;
        holes.get_or_insert_with(|| {
            let mut holes = Holes::new(BYTE);
            let mut done = holes.free(IovaRange::ALL);
            for (&first, slot) in by_first {
                done = done.and(holes.take(range_of(first, slot.last)));
            }
            debug_assert!(done.is_ok(), "areas do not overlap");
            holes
        })
    }

    /// The ranges of all areas that have a byte in `range`, in order, provided that each lies in it completely.
    ///
    /// # Errors
    /// [`CutRefused`] if one of them sticks out.
    pub(crate) fn whole_areas_in(&self, range: IovaRange) -> Result<Vec<IovaRange>, CutRefused> {
        if let Some((first, slot)) = self.by_first.range(..range.first()).next_back() {
            debug_assert!(*first < range.first());
            if slot.last >= range.first() {
                return Err(CutRefused::PartOfArea);
            }
        }
        let mut found = Vec::new();
        for (&first, slot) in self.by_first.range(range.first()..=range.last()) {
            if slot.last > range.last() {
                return Err(CutRefused::PartOfArea);
            }
            found.push(range_of(first, slot.last));
        }
        Ok(found)
    }

    /// The parts of areas that make up `range`, in order; `None` if some byte of it belongs to no area.
    pub(crate) fn pieces(&self, range: IovaRange) -> Option<Vec<Piece<'_, P>>> {
        let (&start, _) = self.by_first.range(..=range.first()).next_back()?;
        let mut found = Vec::new();
        let mut next = range.first();
        for (&first, slot) in self.by_first.range(start..=range.last()) {
            if first > next || slot.last < next {
                return None;
            }
            let last = slot.last.min(range.last());
            found.push(Piece { payload: &slot.payload, offset: next - first, range: range_of(next, last) });
            if last == range.last() {
                return Some(found);
            }
            next = last + 1;
        }
        None
    }

    /// All areas in order of IOVA.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (IovaRange, &P)> {
        self.by_first.iter().map(|(&first, slot)| (range_of(first, slot.last), &slot.payload))
    }

    /// All areas in order of IOVA, to change what they refer to.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (IovaRange, &mut P)> {
        self.by_first.iter_mut().map(|(&first, slot)| (range_of(first, slot.last), &mut slot.payload))
    }
}

fn length_of(range: IovaRange) -> u128 {
    u128::from(range.last() - range.first()) + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The I/O address space of the model: small, so that random ranges meet, once at the bottom and once at the
    /// very top of 2^64, where arithmetic overflows if it can.
    const MODEL_BYTES: u64 = 96;

    #[derive(Debug, Clone)]
    enum Step {
        Map { first: u64, length: u64 },
        Unmap { first: u64, length: u64 },
        Copy { from: u64, length: u64, to: u64 },
        Divide { at: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let bounds = || (0..MODEL_BYTES, 1..24_u64);
        let step = prop_oneof![
            3 => bounds().prop_map(|(first, length)| Step::Map { first, length }),
            2 => bounds().prop_map(|(first, length)| Step::Unmap { first, length }),
            2 => (bounds(), 0..MODEL_BYTES).prop_map(|((from, length), to)| Step::Copy { from, length, to }),
            1 => (0..MODEL_BYTES).prop_map(|at| Step::Divide { at }),
        ];
        proptest::collection::vec(step, 1..80)
    }

    /// What the plain model knows of each byte: which area it belongs to and which byte of which source it shows.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct ModelByte {
        area: u32,
        source: u32,
        offset: u64,
    }

    /// What an area refers to in the test: a source and where in it the area starts.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Payload {
        area: u32,
        source: u32,
        start: u64,
    }

    fn content(areas: &Areas<Payload>, base: u64) -> Vec<Option<ModelByte>> {
        let mut bytes = vec![None; usize::try_from(MODEL_BYTES).unwrap()];
        for (range, payload) in areas.iter() {
            for iova in range.first()..=range.last() {
                let byte = &mut bytes[usize::try_from(iova - base).unwrap()];
                assert!(byte.is_none(), "two areas hold {iova:#x}");
                *byte = Some(ModelByte {
                    area: payload.area,
                    source: payload.source,
                    offset: payload.start + (iova - range.first()),
                });
            }
        }
        bytes
    }

    fn run(base: u64, steps: &[Step], asked_after: usize) {
        let mut areas = Areas::<Payload>::new();
        let mut model: Vec<Option<ModelByte>> = vec![None; usize::try_from(MODEL_BYTES).unwrap()];
        let mut next_area = 0;
        let clip = |first: u64, length: u64| {
            let last = (first + length - 1).min(MODEL_BYTES - 1);
            (IovaRange::new(base + first, base + last).unwrap(), first as usize..=last as usize)
        };
        for (number, step) in steps.iter().enumerate() {
            if number >= asked_after {
                let model = |byte: u64| model[usize::try_from(byte - base).unwrap()];
                let all = (base..=base + (MODEL_BYTES - 1)).filter(|byte| model(*byte).is_none());
                let holes = areas.holes();
                let byte = |byte| IovaRange::new(byte, byte).unwrap();
                let free =
                    (base..=base + (MODEL_BYTES - 1)).filter(|at| holes.overlapping(byte(*at)).is_some());
                assert!(all.eq(free));
            }
            match *step {
                Step::Map { first, length } => {
                    let (range, bytes) = clip(first, length);
                    let payload = Payload { area: next_area, source: next_area, start: 1000 };
                    let free = model[bytes.clone()].iter().all(Option::is_none);
                    assert_eq!(areas.insert(range, payload).is_ok(), free);
                    if free {
                        for (number, byte) in model[bytes].iter_mut().enumerate() {
                            *byte = Some(ModelByte {
                                area: next_area,
                                source: next_area,
                                offset: 1000 + number as u64,
                            });
                        }
                    }
                    next_area += 1;
                }
                Step::Unmap { first, length } => {
                    let (range, bytes) = clip(first, length);
                    let mut inside: Vec<u32> =
                        model[bytes.clone()].iter().flatten().map(|b| b.area).collect();
                    inside.dedup();
                    let cut = inside.iter().any(|area| {
                        model.iter().enumerate().any(|(number, byte)| {
                            byte.is_some_and(|byte| byte.area == *area) && !bytes.contains(&number)
                        })
                    });
                    match areas.whole_areas_in(range) {
                        Err(CutRefused::PartOfArea) => assert!(cut),
                        Ok(found) => {
                            assert!(!cut);
                            assert_eq!(found.len(), inside.len());
                            for (range, area) in found.into_iter().zip(&inside) {
                                assert_eq!(areas.remove(range).unwrap().area, *area);
                            }
                            model[bytes].fill(None);
                        }
                    }
                }
                Step::Divide { at } => {
                    let before = at.checked_sub(1).and_then(|before| model[before as usize]);
                    let divided =
                        model[at as usize].filter(|byte| before.is_some_and(|b| b.area == byte.area));
                    areas.divide(base + at, |payload, length| {
                        let behind = Payload { area: next_area, start: payload.start + length, ..payload };
                        (payload, behind)
                    });
                    if let Some(ModelByte { area, .. }) = divided {
                        let same = |byte: &&mut ModelByte| byte.area == area;
                        model[at as usize..]
                            .iter_mut()
                            .flatten()
                            .filter(same)
                            .for_each(|byte| byte.area = next_area);
                    }
                    next_area += 1;
                }
                Step::Copy { from, length, to } => {
                    let (source, source_bytes) = clip(from, length);
                    let whole = model[source_bytes.clone()].iter().all(Option::is_some);
                    let pieces = areas.pieces(source).map(|pieces| {
                        pieces
                            .into_iter()
                            .map(|piece| {
                                let payload =
                                    Payload { start: piece.payload.start + piece.offset, ..*piece.payload };
                                (length_of(piece.range) as u64, payload)
                            })
                            .collect::<Vec<_>>()
                    });
                    assert_eq!(pieces.is_some(), whole);
                    let count = source_bytes.end() - source_bytes.start() + 1;
                    let Some(pieces) = pieces.filter(|_| to as usize + count <= model.len()) else {
                        continue;
                    };
                    let (target, target_bytes) = clip(to, count as u64);
                    let copied: Vec<ModelByte> =
                        model[source_bytes].iter().map(|byte| byte.unwrap()).collect();
                    let free = model[target_bytes.clone()].iter().all(Option::is_none);
                    assert_eq!(areas.overlaps(target), !free);
                    if !free {
                        continue;
                    }
                    let mut first = target.first();
                    let mut areas_of_bytes = Vec::new();
                    for (length, payload) in pieces {
                        let range = IovaRange::with_length(first, length).unwrap();
                        areas.insert(range, Payload { area: next_area, ..payload }).unwrap();
                        areas_of_bytes.extend(std::iter::repeat_n(next_area, length as usize));
                        next_area += 1;
                        first = first.wrapping_add(length);
                    }
                    for ((byte, copied), area) in
                        model[target_bytes].iter_mut().zip(copied).zip(areas_of_bytes)
                    {
                        *byte = Some(ModelByte { area, ..copied });
                    }
                }
            }
            for byte in 0..MODEL_BYTES {
                let (all, upward) = (&model, &model[byte as usize..]);
                let found =
                    areas.at(base + byte).map(|(range, payload)| (range.contains(base + byte), payload.area));
                assert_eq!(found, all[byte as usize].map(|byte| (true, byte.area)));
                let mapped =
                    || (0..).zip(upward).filter(|(_, byte)| byte.is_some()).map(|(at, _)| base + byte + at);
                let hull = mapped().next().zip(mapped().last());
                let range = IovaRange::new(base + byte, base + (MODEL_BYTES - 1)).unwrap();
                assert_eq!(areas.hull_in(range).map(|hull| (hull.first(), hull.last())), hull);
            }
            assert_eq!(content(&areas, base), model);
            assert_eq!(areas.mapped_bytes(), model.iter().flatten().count() as u128);
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_byte_model(steps in steps(), asked_after in 0..80_usize) {
            run(0, &steps, asked_after);
            run(u64::MAX - (MODEL_BYTES - 1), &steps, asked_after);
        }
    }

    #[test]
    fn the_whole_space_can_be_one_area() {
        let mut areas = Areas::new();
        areas.insert(IovaRange::ALL, 1).unwrap();
        assert!(areas.overlaps(IovaRange::new(u64::MAX, u64::MAX).unwrap()));
        assert_eq!(areas.mapped_bytes(), 1 << 64);
        assert_eq!(areas.pieces(IovaRange::new(7, u64::MAX).unwrap()).unwrap()[0].offset, 7);
        assert_eq!(areas.whole_areas_in(IovaRange::ALL).unwrap(), [IovaRange::ALL]);
        assert_eq!(areas.remove(IovaRange::ALL), Some(1));
        assert!(areas.is_empty());
    }
}
