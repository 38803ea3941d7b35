//! What is mapped in one device's space, in the order of the trace.
//!
//! Events of different processors run on different threads, and only their order in the file says what belongs together:
//! which mappings an unmap removes, whether a map meets another. So one thread decides all that, event by event, before anything
//! is carried out, and no matter how quickly the threads get on, the answers are the same every time.
//!
//! The same thread knows who must wait for whom. Each worker carries out its steps in order and says how many it has
//! done; a *step* is a worker and a number of that worker's. An unmap has to come after the maps of what it removes; a
//! map after the unmaps of what was there before. The first is written with each mapping, the second in a list of ranges
//! that were unmapped and not mapped again, which is [cut back](Live::forget) to what is not done yet.

use crate::trace::Direction;
use ioasid::IovaRange;
use std::collections::BTreeMap;

/// A step of a worker: it is done when the worker has done so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) worker: usize,
    pub(crate) number: u64,
}

/// A mapping that is live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// The line of its map: no other mapping has the same.
    pub(crate) line: u64,
    /// Whole pages of addresses.
    pub(crate) pages: IovaRange,
    /// Where in the memory the first of these pages lies.
    pub(crate) memory: u64,
    /// The bytes that the driver asked for, within the pages.
    pub(crate) iova: u64,
    pub(crate) bytes: u64,
    pub(crate) direction: Direction,
    /// The step that makes it.
    pub(crate) step: Step,
}

impl Mapping {
    /// How many bytes its pages have. (A mapping of all 2^64 fits into no memory.)
    pub(crate) fn page_bytes(&self) -> u64 {
        self.pages.length().unwrap_or(u64::MAX)
    }
}

/// Why an event does not fit what came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// A map where something is mapped. It is left out.
    #[error("a map of {pages}, where line {line} has mapped already: left out")]
    MappedAlready {
        /// The pages of the map.
        pages: IovaRange,
        /// The line of the mapping in the way.
        line: u64,
    },
    /// An unmap where nothing is mapped. It is left out.
    #[error("an unmap of {pages}, where nothing is mapped: left out")]
    NothingMapped {
        /// The pages of the unmap.
        pages: IovaRange,
    },
    /// An unmap that covers one or more mappings and pages that are not mapped. It is carried out.
    #[error("an unmap of {pages}, of which not all is mapped: carried out")]
    Hole {
        /// The pages of the unmap.
        pages: IovaRange,
    },
    /// An unmap of a part of a mapping. It is left out.
    #[error("an unmap of {pages}, which is not all of the mapping of line {line}: left out")]
    Part {
        /// The pages of the unmap.
        pages: IovaRange,
        /// The line of the mapping.
        line: u64,
    },
    /// A map that is longer than the memory that stands for the guest's. It is left out.
    #[error("a map of {bytes} bytes, more than there is memory: left out")]
    LongerThanMemory {
        /// Its length.
        bytes: u64,
    },
    /// Addresses that not every kind of table has, in a replay that is [disturbed](crate::Disturbance). The event is left out.
    #[error("{pages}, which is not for a trace that is disturbed: left out")]
    NotForAll {
        /// The pages of the event.
        pages: IovaRange,
    },
    /// An attach, detach or DMA of a device whose first line was a map or unmap: its DMA is not the recording's. It is left out.
    #[error("an attach, detach or DMA of a device that began with a map or unmap: left out")]
    NotRecorded,
    /// A DMA that was let through when it was recorded, where it cannot be. It is left out.
    #[error("a DMA of {range} that was let through, where not all is mapped for it: left out")]
    DmaNotMapped {
        /// The addresses of the DMA.
        range: IovaRange,
    },
    /// A DMA that was refused when it was recorded, where everything is mapped for it. It is left out.
    #[error("a DMA of {range} that was refused, where all is mapped for it: left out")]
    DmaMapped {
        /// The addresses of the DMA.
        range: IovaRange,
    },
    /// More mappings at the same time than a replay has room for. The map is left out.
    #[error("more than {most} mappings at the same time: left out")]
    TooManyMappings {
        /// How many there is room for.
        most: u64,
    },
    /// More devices than a replay has room for. The event is left out.
    #[error("more than {most} devices: left out")]
    TooManyDevices {
        /// How many there is room for.
        most: usize,
    },
}

impl Misfit {
    /// What is the same in all misfits of the kind, as reports call it.
    pub fn kind(&self) -> &'static str {
        match self {
            Misfit::MappedAlready { .. } => "mapped already",
            Misfit::NothingMapped { .. } => "nothing mapped",
            Misfit::Hole { .. } => "unmap over a hole",
            Misfit::Part { .. } => "unmap of a part",
            Misfit::LongerThanMemory { .. } => "longer than memory",
            Misfit::NotForAll { .. } => "not for all tables",
            Misfit::NotRecorded => "DMA not recorded from the start",
            Misfit::DmaNotMapped { .. } => "DMA let through unmapped",
            Misfit::DmaMapped { .. } => "DMA refused though mapped",
            Misfit::TooManyMappings { .. } => "too many mappings",
            Misfit::TooManyDevices { .. } => "too many devices",
        }
    }
}

/// What a DMA meets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Meets {
    /// All of it is mapped for it, to these pieces of memory: offset and length.
    Memory(Vec<(u64, u64)>),
    /// All of it is mapped, but somewhere for the other direction only.
    OtherDirection,
    /// Something of it is not mapped.
    Nothing,
}

/// The latest step of each worker that did something of a kind.
#[derive(Debug, Default)]
pub(crate) struct Latest(Vec<Step>);

impl Latest {
    pub(crate) fn note(&mut self, step: Step) {
        match self.0.iter_mut().find(|known| known.worker == step.worker) {
            Some(known) => *known = step,
            None => self.0.push(step),
        }
    }

    /// Adds them to what a step of `own` comes after.
    pub(crate) fn add_to(&self, after: &mut Vec<Step>, own: usize) {
        self.0.iter().for_each(|step| add(after, *step, own));
    }
}

/// An unmap that is going to be carried out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Removed {
    /// Ascending.
    pub(crate) mappings: Vec<Mapping>,
    /// The range covers more than the mappings.
    pub(crate) hole: bool,
    pub(crate) after: Vec<Step>,
}

/// The mappings of one device.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// By first address. No two overlap.
    mappings: BTreeMap<u64, Mapping>,
    /// Ranges that were unmapped, by first address, with their last and the step. No two overlap, and none is mapped.
    unmapped: BTreeMap<u64, (u64, Step)>,
}

impl Live {
    pub(crate) fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    /// How many unmapped ranges are remembered.
    pub(crate) fn remembered(&self) -> usize {
        self.unmapped.len()
    }

    /// Notes a mapping, and says after which steps it is to be made.
    pub(crate) fn map(&mut self, mapping: Mapping) -> Result<Vec<Step>, Misfit> {
        let pages = mapping.pages;
        let below = self.mappings.range(..=pages.last()).next_back().map(|(_, mapping)| mapping);
        if let Some(other) = below.filter(|other| other.pages.last() >= pages.first()) {
            return Err(Misfit::MappedAlready { pages, line: other.line });
        }
        self.mappings.insert(pages.first(), mapping);
        Ok(self.take_unmapped(pages, mapping.step.worker))
    }

    /// Removes all mappings within a range, which `step` is going to unmap.
    pub(crate) fn unmap(&mut self, pages: IovaRange, step: Step) -> Result<Removed, Misfit> {
        // What lies across the first address, and what lies across the last.
        let at_first = self.mappings.range(..pages.first()).next_back().map(|(_, mapping)| mapping);
        let at_last = self.mappings.range(..=pages.last()).next_back().map(|(_, mapping)| mapping);
        let cut = [
            at_first.filter(|mapping| mapping.pages.last() >= pages.first()),
            at_last.filter(|mapping| mapping.pages.last() > pages.last()),
        ];
        if let Some(mapping) = cut.into_iter().flatten().next() {
            return Err(Misfit::Part { pages, line: mapping.line });
        }
        let mappings: Vec<Mapping> =
            self.mappings.range(pages.first()..=pages.last()).map(|(_, mapping)| *mapping).collect();
        if mappings.is_empty() {
            return Err(Misfit::NothingMapped { pages });
        }
        let mut after = self.take_unmapped(pages, step.worker);
        let mut bytes = 0u64;
        for mapping in &mappings {
            self.mappings.remove(&mapping.pages.first());
            add(&mut after, mapping.step, step.worker);
            bytes = bytes.saturating_add(mapping.page_bytes());
        }
        self.unmapped.insert(pages.first(), (pages.last(), step));
        Ok(Removed { mappings, hole: pages.length() != Some(bytes), after })
    }

    /// What a DMA to these addresses meets.
    pub(crate) fn meets(&self, range: IovaRange, write: bool) -> Meets {
        let mut pieces = Vec::new();
        let (mut next, mut allowed) = (range.first(), true);
        loop {
            let mapping = self.mappings.range(..=next).next_back().map(|(_, mapping)| mapping);
            let Some(mapping) = mapping.filter(|mapping| mapping.pages.last() >= next) else {
                return Meets::Nothing;
            };
            allowed &= mapping.direction != if write { Direction::ToDevice } else { Direction::FromDevice };
            let last = mapping.pages.last().min(range.last());
            pieces.push((mapping.memory + (next - mapping.pages.first()), last - next + 1));
            match last.checked_add(1).filter(|_| last < range.last()) {
                Some(after) => next = after,
                None if allowed => return Meets::Memory(pieces),
                None => return Meets::OtherDirection,
            }
        }
    }

    /// Forgets the unmaps that are done: nobody has to wait for them any more.
    pub(crate) fn forget(&mut self, done: impl Fn(Step) -> bool) {
        self.unmapped.retain(|_, (_, step)| !done(*step));
    }

    /// Takes what overlaps the range out of the unmapped ranges, and says after which steps of other workers that is free.
    fn take_unmapped(&mut self, pages: IovaRange, worker: usize) -> Vec<Step> {
        let mut after = Vec::new();
        while let Some((&first, &(last, step))) = self.unmapped.range(..=pages.last()).next_back() {
            if last < pages.first() {
                break;
            }
            self.unmapped.remove(&first);
            if let Some(above) = pages.last().checked_add(1).filter(|above| *above <= last) {
                self.unmapped.insert(above, (last, step));
            }
            if let Some(below) = pages.first().checked_sub(1).filter(|below| *below >= first) {
                self.unmapped.insert(first, (below, step));
            }
            add(&mut after, step, worker);
        }
        after
    }
}

/// Adds a step to those to be waited for: only the latest of each worker matters, and `own` comes in order anyway.
fn add(after: &mut Vec<Step>, step: Step, own: usize) {
    if step.worker == own {
        return;
    }
    match after.iter_mut().find(|known| known.worker == step.worker) {
        Some(known) => known.number = known.number.max(step.number),
        None => after.push(step),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const PAGE: u64 = crate::trace::PAGE;

    fn pages(first: u64, count: u64) -> IovaRange {
        IovaRange::with_length(first * PAGE, count * PAGE).unwrap()
    }

    fn mapping(pages: IovaRange, step: Step) -> Mapping {
        let bytes = pages.length().unwrap();
        let (line, direction) = (step.number, Direction::ToDevice);
        Mapping { line, pages, memory: 0, iova: pages.first(), bytes, direction, step }
    }

    /// Who did the latest to each page, by the plainest of means.
    #[derive(Clone, Copy, Default)]
    struct Page {
        mapping: Option<u64>,
        latest: Option<Step>,
    }

    proptest! {
        /// An event is let through if and only if the plain model says so; and whatever has been done to any of its pages before,
        /// by another worker, is waited for, at once or through what is waited for.
        #[test]
        fn every_event_waits_for_those_before_it(events in vec((0u64..24, 1u64..6, any::<bool>(), 0usize..3), 1..60)) {
            let mut live = Live::default();
            let mut model = [Page::default(); 32];
            let mut numbers = [0; 3];
            // For each step: the steps that are done when it begins.
            let mut before: BTreeMap<(usize, u64), Vec<u64>> = BTreeMap::new();
            for (line, (first, count, map, worker)) in events.into_iter().enumerate() {
                let step = Step { worker, number: numbers[worker] + 1 };
                let at = first as usize..(first + count) as usize;
                let lines: Vec<_> = model[at.clone()].iter().map(|page| page.mapping).collect();
                let whole = |line: &Option<u64>| {
                    let all = model.iter().filter(|page| page.mapping == *line).count();
                    lines.iter().filter(|known| *known == line).count() == all
                };
                let expected = match map {
                    true => lines.iter().all(Option::is_none),
                    false => lines.iter().any(Option::is_some) && lines.iter().flatten().all(|line| whole(&Some(*line))),
                };
                let after = if map {
                    live.map(Mapping { line: line as u64, ..mapping(pages(first, count), step) })
                } else {
                    live.unmap(pages(first, count), step).map(|removed| {
                        assert_eq!(removed.hole, lines.iter().any(Option::is_none));
                        removed.after
                    })
                };
                prop_assert_eq!(after.is_ok(), expected);
                let Ok(after) = after else { continue };
                numbers[worker] += 1;
                let mut known = vec![0; 3];
                known[worker] = step.number - 1;
                for earlier in after.iter().copied().chain([Step { worker, number: step.number - 1 }]) {
                    prop_assert!(earlier.worker != worker || earlier.number < step.number);
                    known[earlier.worker] = known[earlier.worker].max(earlier.number);
                    if let Some(its) = before.get(&(earlier.worker, earlier.number)) {
                        known.iter_mut().zip(its).for_each(|(known, its)| *known = (*known).max(*its));
                    }
                }
                for page in &mut model[at] {
                    if let Some(latest) = page.latest {
                        prop_assert!(known[latest.worker] >= latest.number, "{latest:?} is not waited for");
                    }
                    *page = Page { mapping: map.then_some(line as u64), latest: Some(step) };
                }
                before.insert((worker, step.number), known);
            }
        }
    }

    #[test]
    fn the_last_page_can_be_mapped_and_unmapped() {
        let mut live = Live::default();
        let last = IovaRange::new(u64::MAX - 4095, u64::MAX).unwrap();
        let step = |number| Step { worker: 0, number };
        assert_eq!(live.map(mapping(last, step(1))), Ok(vec![]));
        let refused = live.map(mapping(last, step(2)));
        assert_eq!(refused, Err(Misfit::MappedAlready { pages: last, line: 1 }));
        assert_eq!(live.unmap(last, step(2)).map(|removed| removed.hole), Ok(false));
        let other = Step { worker: 1, number: 1 };
        assert_eq!(live.map(mapping(last, other)), Ok(vec![step(2)]));
        assert_eq!(live.remembered(), 0);
    }

    #[test]
    fn what_is_done_is_forgotten() {
        let mut live = Live::default();
        let step = |number| Step { worker: 0, number };
        for (number, page) in [(1, 0), (3, 7)] {
            live.map(mapping(pages(page, 1), step(number))).unwrap();
            live.unmap(pages(page, 1), step(number + 1)).unwrap();
        }
        live.forget(|step| step.number <= 2);
        assert_eq!(live.remembered(), 1);
        assert_eq!(live.map(mapping(pages(0, 8), Step { worker: 1, number: 1 })), Ok(vec![step(4)]));
    }
}
