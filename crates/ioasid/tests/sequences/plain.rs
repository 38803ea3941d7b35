//! The model: what a caller has to know, and nothing of how it is done.
//!
//! What is mapped is a map of ranges of pages, each of which leads to consecutive pages of one object. Registrations are
//! sets of pages; what an account pays for follows from them.

use crate::steps::{ACCOUNTS, END, PAGE, Pages};
use ioasid::{IovaRange, OverLimit, Permissions, ReservationOwner};
use rangemap::{RangeMap, RangeSet};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Where a range of pages leads. Equal neighbours continue each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lead {
    /// The object, by the number that it was made with.
    pub(crate) object: usize,
    /// The page of the object, less the page of the space.
    pub(crate) shift: u64,
    pub(crate) permissions: Permissions,
}

impl Lead {
    /// The page of the object that a page of the space leads to.
    pub(crate) fn page(&self, page: u64) -> u64 {
        page.wrapping_add(self.shift)
    }
}

/// A piece of what is mapped.
pub(crate) type Piece = (Range<u64>, Lead);

/// A space.
#[derive(Clone, Debug, Default)]
pub(crate) struct PlainSpace {
    pub(crate) mapped: RangeMap<u64, Lead>,
    /// The pages with which mappings begin.
    pub(crate) begins: BTreeSet<u64>,
    pub(crate) reserved: Vec<(IovaRange, ReservationOwner)>,
    pub(crate) allowed: Vec<IovaRange>,
}

pub(crate) fn numbers(range: IovaRange) -> Range<u64> {
    range.first() / PAGE..range.last() / PAGE + 1
}

fn clipped(piece: &Range<u64>, within: &Range<u64>) -> Range<u64> {
    piece.start.max(within.start)..piece.end.min(within.end)
}

impl PlainSpace {
    /// What is mapped in a range, cut to it.
    pub(crate) fn pieces(&self, within: Range<u64>) -> Vec<Piece> {
        if within.is_empty() {
            return Vec::new();
        }
        let pieces = self.mapped.overlapping(within.clone());
        pieces.map(|(piece, lead)| (clipped(piece, &within), *lead)).collect()
    }

    pub(crate) fn first_mapped(&self, within: Range<u64>) -> Option<u64> {
        self.pieces(within).first().map(|(piece, _)| piece.start)
    }

    /// How many pages of a range are mapped.
    pub(crate) fn count(&self, within: Range<u64>) -> u64 {
        self.pieces(within).iter().map(|(piece, _)| piece.end - piece.start).sum()
    }

    /// The runs of pages of a range that are mapped, whatever to.
    pub(crate) fn runs(&self, within: Range<u64>) -> RangeSet<u64> {
        self.pieces(within).into_iter().map(|(piece, _)| piece).collect()
    }

    /// A new mapping.
    pub(crate) fn map(&mut self, pages: Range<u64>, lead: Lead) {
        self.begins.insert(pages.start);
        self.mapped.insert(pages, lead);
    }

    /// What is left behind a run that goes begins a mapping.
    pub(crate) fn unmap(&mut self, run: Range<u64>) {
        self.mapped.remove(run.clone());
        let gone: Vec<u64> = self.begins.range(run.clone()).copied().collect();
        gone.iter().for_each(|page| {
            self.begins.remove(page);
        });
        if self.mapped.contains_key(&run.end) {
            self.begins.insert(run.end);
        }
    }

    /// Whether a mapping lies on both sides of a boundary.
    fn is_inside(&self, page: u64) -> bool {
        self.mapped.contains_key(&page) && !self.begins.contains(&page)
    }

    /// The mapping that an unmap of these pages would cut.
    pub(crate) fn cut_by(&self, pages: &Range<u64>) -> Option<Range<u64>> {
        let page = [pages.start, pages.end].into_iter().find(|page| self.is_inside(*page))?;
        let start = *self.begins.range(..page).next_back()?;
        let hole = self.mapped.gaps(&(page..END)).next().map_or(END, |gap| gap.start);
        let end = self.begins.range(page..).next().map_or(hole, |next| hole.min(*next));
        Some(start..end)
    }

    pub(crate) fn reserved_in(&self, range: IovaRange) -> bool {
        self.reserved.iter().any(|(reserved, _)| reserved.overlaps(&range))
    }

    /// Where so many pages have to be placed.
    pub(crate) fn hole(&self, count: u64) -> Option<u64> {
        let everywhere = [IovaRange::ALL];
        let windows = if self.allowed.is_empty() { &everywhere[..] } else { &self.allowed };
        let mut taken: RangeSet<u64> = self.runs(0..END);
        self.reserved.iter().for_each(|(range, _)| taken.insert(numbers(*range)));
        let alignments = [count.next_power_of_two().min(1 << 18), 1];
        alignments.into_iter().find_map(|alignment| {
            windows.iter().find_map(|window| {
                taken.gaps(&numbers(*window)).find_map(|gap| {
                    let start = gap.start.max(1).next_multiple_of(alignment);
                    (start.checked_add(count)? <= gap.end).then_some(start)
                })
            })
        })
    }
}

/// Registered memory.
#[derive(Clone, Debug)]
pub(crate) struct Registration {
    pub(crate) object: usize,
    pub(crate) first: u64,
    /// How many pages long, holes included.
    pub(crate) length: u64,
    /// Pages of the object.
    pub(crate) held: RangeSet<u64>,
    pub(crate) account: usize,
}

impl Registration {
    /// Whether a part of it is all there.
    pub(crate) fn has(&self, part: Pages) -> bool {
        part.count > 0
            && part.first + part.count <= self.length
            && self.held.gaps(&self.object_pages(part)).next().is_none()
    }

    pub(crate) fn object_pages(&self, part: Pages) -> Range<u64> {
        self.first + part.first..self.first + part.first + part.count
    }
}

pub(crate) type Registrations = Vec<Option<Registration>>;

/// Where so many registrations hold pages of an object: the pages, and how often.
pub(crate) fn holds(registrations: &Registrations, object: usize, page: u64) -> u64 {
    let held = registrations.iter().flatten().filter(|held| held.object == object);
    held.filter(|held| held.held.contains(&page)).count() as u64
}

/// An account.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Level {
    pub(crate) limit: Option<u64>,
    pub(crate) peak: u64,
    pub(crate) failures: u64,
}

/// All accounts.
#[derive(Clone, Debug)]
pub(crate) struct Levels(pub(crate) Vec<Level>);

impl Levels {
    pub(crate) fn new() -> Levels {
        Levels(ACCOUNTS.iter().map(|(_, limit)| Level { limit: *limit, peak: 0, failures: 0 }).collect())
    }

    fn path(account: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(account), |account| ACCOUNTS[*account].0)
    }

    /// How many pages each is charged.
    pub(crate) fn charged(registrations: &Registrations) -> Vec<u64> {
        let mut pages: BTreeMap<(usize, usize), RangeSet<u64>> = BTreeMap::new();
        for held in registrations.iter().flatten() {
            for level in Levels::path(held.account) {
                pages.entry((level, held.object)).or_default().extend(held.held.iter().cloned());
            }
        }
        let mut charged = vec![0; ACCOUNTS.len()];
        for ((level, _), pages) in pages {
            charged[level] += pages.iter().map(|run| run.end - run.start).sum::<u64>();
        }
        charged
    }

    /// Whether the registrations can become these, on behalf of an account; the peaks and refusals with it.
    pub(crate) fn change(
        &mut self,
        before: &Registrations,
        after: &Registrations,
        account: usize,
    ) -> Option<OverLimit> {
        let (before, after) = (Levels::charged(before), Levels::charged(after));
        for level in Levels::path(account) {
            let (old, new) = (before[level], after[level]);
            if let Some(limit) = self.0[level].limit.filter(|limit| new > old && new > *limit) {
                self.0[level].failures += 1;
                let account = format!("account {level}");
                return Some(OverLimit { account, pages: new - old, charged: old, limit });
            }
        }
        for (level, charged) in self.0.iter_mut().zip(after) {
            level.peak = level.peak.max(charged);
        }
        None
    }
}
