//! The model: leaves in a sorted map, and what each operation does to them.

use crate::specification::Specification;
use ioasid_pagetable::{Attributes, CutError, IovaRange, MapError, Oa, PageSize};
use std::collections::BTreeMap;

/// Operations that would leave more leaves than this are left out, to keep the tests short.
const MAX_LEAVES: usize = 6000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModelLeaf {
    pub(crate) last: u64,
    pub(crate) oa: u64,
    pub(crate) attributes: Attributes,
    pub(crate) present: bool,
    pub(crate) busy: bool,
    /// A claimed mapping begins here.
    pub(crate) first: bool,
}

/// The leaves of a mapping to be made: first address, last address, output.
pub(crate) type Plan = Vec<(u64, u64, u64)>;

/// Leaves by first address.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) leaves: BTreeMap<u64, ModelLeaf>,
    /// What hardware has added to one entry, by the first address of the entry, where a leaf has several.
    pub(crate) marks: BTreeMap<u64, Attributes>,
    pub(crate) specification: Specification,
    /// The level of the top table, which is only as high as the addresses have asked for; 0 as long as there is none.
    pub(crate) top: u8,
}

/// The size of a leaf.
pub(crate) fn log2(first: u64, last: u64) -> u32 {
    (last - first + 1).trailing_zeros()
}

pub(crate) fn page_size(first: u64, last: u64) -> PageSize {
    PageSize::from_log2(log2(first, last)).unwrap()
}

impl Model {
    pub(crate) fn new(specification: Specification) -> Model {
        Model { leaves: BTreeMap::new(), marks: BTreeMap::new(), specification, top: 0 }
    }

    pub(crate) fn granule(&self) -> u64 {
        self.specification.granule()
    }

    /// First addresses of the leaves that have an address in the range.
    pub(crate) fn firsts(&self, range: IovaRange) -> Vec<u64> {
        let before = self.leaves.range(..range.first()).next_back();
        let before = before.filter(|(_, leaf)| leaf.last >= range.first()).map(|(&first, _)| first);
        let inside = self.leaves.range(range.first()..=range.last()).map(|(&first, _)| first);
        before.into_iter().chain(inside).collect()
    }

    pub(crate) fn at(&self, iova: u64) -> Option<(u64, ModelLeaf)> {
        let (&first, &leaf) = self.leaves.range(..=iova).next_back()?;
        (leaf.last >= iova).then_some((first, leaf))
    }

    /// Why a mapping is refused before anything is looked at.
    pub(crate) fn refuses(&self, range: IovaRange, oa: u64, attributes: Attributes) -> Option<MapError> {
        let last_output = oa.checked_add(range.last() - range.first());
        let memory_type = attributes.memory_type();
        if !self.specification.accepts(range) {
            Some(MapError::OutOfRange { range })
        } else if last_output.is_none_or(|last| last >> self.specification.output_bits != 0) {
            Some(MapError::OutputOutOfRange { oa: Oa::new(oa) })
        } else if memory_type as u8 != 0 && !self.specification.memory_types.contains(&memory_type) {
            Some(MapError::NoMemoryType { range, memory_type })
        } else {
            None
        }
    }

    /// The top table grows until it covers the range.
    pub(crate) fn grow(&mut self, range: IovaRange) {
        self.top = self.top.max(self.specification.top_for(range.last()));
    }

    /// The leaves that a mapping consists of, or the first address in the way. With `equal`, leaves to the same
    /// output are not in the way. `None`: more leaves than a test can afford.
    pub(crate) fn plan(&self, range: IovaRange, oa: u64, equal: bool) -> Option<Result<Plan, u64>> {
        let levels = self.specification.levels.iter().take(usize::from(self.top));
        let sizes = levels.fold(0, |all, level| all | level.sizes);
        let mut plan = Vec::new();
        let mut at = range.first();
        loop {
            let output = oa + (at - range.first());
            let last = match self.at(at) {
                Some((first, leaf)) => {
                    if !equal || leaf.oa + (at - first) != output {
                        return Some(Err(at));
                    }
                    leaf.last.min(range.last())
                }
                None => {
                    let fits = |&size: &u32| {
                        let low = (1u64 << size) - 1;
                        sizes >> size & 1 != 0
                            && (at | output) & low == 0
                            && at | low <= range.last()
                            && self.leaves.range(at..=at | low).next().is_none()
                    };
                    let size = (0..64).rev().find(fits)?;
                    let last = at | ((1 << size) - 1);
                    plan.push((at, last, output));
                    if self.leaves.len() + plan.len() > MAX_LEAVES {
                        return None;
                    }
                    last
                }
            };
            if last >= range.last() {
                return Some(Ok(plan));
            }
            at = last + 1;
        }
    }

    /// A plan in which leaves that allow something else are in the way as well.
    pub(crate) fn plan_fill(
        &self,
        range: IovaRange,
        oa: u64,
        attributes: Attributes,
    ) -> Option<Result<Plan, u64>> {
        let said = self.said(attributes);
        let differs =
            |first: &u64| !(self.leaves[first].attributes ^ said).difference(Attributes::USED).is_empty();
        let other =
            self.firsts(range).into_iter().filter(differs).map(|first| first.max(range.first())).next();
        let plan = self.plan(range, oa, true)?;
        Some(match (plan, other) {
            (Ok(_), Some(at)) => Err(at),
            (Err(at), Some(other)) => Err(at.min(other)),
            (plan, None) => plan,
        })
    }

    /// What a leaf with these attributes says.
    pub(crate) fn said(&self, attributes: Attributes) -> Attributes {
        (self.specification.says)(attributes).with_memory_type(attributes.memory_type())
    }

    pub(crate) fn insert(&mut self, plan: Plan, attributes: Attributes, present: bool, busy: bool) {
        let attributes = self.said(attributes);
        for (number, (at, last, oa)) in plan.into_iter().enumerate() {
            let leaf = ModelLeaf { last, oa, attributes, present, busy, first: busy && number == 0 };
            self.leaves.insert(at, leaf);
        }
    }

    /// Takes a leaf away.
    pub(crate) fn remove(&mut self, first: u64) -> ModelLeaf {
        let leaf = self.leaves.remove(&first).unwrap();
        self.marks.retain(|&entry, _| entry < first || entry > leaf.last);
        leaf
    }

    /// The first address of the entry, of those of a leaf, that an address in the leaf leads to.
    pub(crate) fn entry_at(&self, iova: u64, first: u64, last: u64) -> u64 {
        let entry = self.specification.level(self.specification.level_of(log2(first, last))).entry;
        iova >> entry << entry
    }

    /// What the entry says that an address in a leaf leads to.
    pub(crate) fn entry_attributes(&self, iova: u64, first: u64, leaf: &ModelLeaf) -> Attributes {
        let marks = self.marks.get(&self.entry_at(iova, first, leaf.last));
        leaf.attributes | marks.copied().unwrap_or(Attributes::empty())
    }

    /// What all entries of a leaf together say.
    pub(crate) fn all_attributes(&self, first: u64, leaf: &ModelLeaf) -> Attributes {
        self.marks.range(first..=leaf.last).fold(leaf.attributes, |all, (_, &marks)| all | marks)
    }

    /// How many neighbouring entries a leaf has.
    pub(crate) fn entries_of(&self, first: u64, last: u64) -> u64 {
        let log2 = log2(first, last);
        1 << (log2 - self.specification.level(self.specification.level_of(log2)).entry)
    }

    /// Cuts until a leaf begins at `at`; fails at a busy leaf, and at one that cannot be cut.
    pub(crate) fn cut(&mut self, at: u64) -> Result<(), CutError> {
        while let Some((first, leaf)) = self.at(at).filter(|&(first, _)| first != at) {
            if leaf.busy {
                return Err(CutError::Contended { at });
            }
            self.cut_once(first, leaf)?;
        }
        Ok(())
    }

    /// Makes leaves of the next lower level of one.
    pub(crate) fn cut_once(&mut self, first: u64, leaf: ModelLeaf) -> Result<(), CutError> {
        let size = log2(first, leaf.last);
        let level = self.specification.level_of(size);
        // A leaf of one entry becomes a table of leaves of one entry, or nothing.
        let smaller = level.checked_sub(1).filter(|&level| level > 0);
        let smaller = smaller.map(|level| self.specification.level(level));
        let smaller = smaller.filter(|level| {
            self.specification.live_sizes
                && self.entries_of(first, leaf.last) == 1
                && level.sizes >> level.entry & 1 != 0
        });
        let Some(smaller) = smaller.map(|level| level.entry) else {
            return Err(CutError::NeedsBreak { at: first, size: page_size(first, leaf.last) });
        };
        for piece in 0..1u64 << (size - smaller) {
            let offset = piece << smaller;
            let last = (first + offset) | ((1 << smaller) - 1);
            let piece = ModelLeaf { last, oa: leaf.oa + offset, first: leaf.first && piece == 0, ..leaf };
            self.leaves.insert(first + offset, piece);
        }
        Ok(())
    }

    /// Cuts both ends, the first one first.
    pub(crate) fn cut_ends(&mut self, range: IovaRange) -> Result<(), CutError> {
        self.cut(range.first())?;
        range.last().checked_add(1).map_or(Ok(()), |end| self.cut(end))
    }

    /// Cuts both ends, the last one first.
    pub(crate) fn cut_ends_backwards(&mut self, range: IovaRange) -> Result<(), CutError> {
        range.last().checked_add(1).map_or(Ok(()), |end| self.cut(end))?;
        self.cut(range.first())
    }

    /// Whether cutting the ends of the range stays within what a test can afford.
    pub(crate) fn may_cut(&self) -> bool {
        self.leaves.len() + 2 * 6 * 512 <= 2 * MAX_LEAVES
    }

    /// How many tables the leaves stand in and under, the top one included.
    pub(crate) fn tables(&self) -> u64 {
        let mut tables = u64::from(self.top != 0);
        let mut before: Option<(u8, u64)> = None;
        for (&first, leaf) in &self.leaves {
            let level = self.specification.level_of(log2(first, leaf.last));
            for level in level..self.top {
                let width = self.specification.width(level);
                // The table is counted with its first leaf. Nothing between two leaves of a table is larger than it.
                let shared =
                    before.is_some_and(|(other, before)| other <= level && before >> width == first >> width);
                tables += u64::from(!shared);
            }
            before = Some((level, first));
        }
        tables
    }
}

/// What a gather should report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) runs: Vec<(u64, u64)>,
    pub(crate) leaves: u64,
    pub(crate) sizes: u64,
}

impl Report {
    pub(crate) fn leaf(&mut self, first: u64, last: u64) {
        self.leaves += 1;
        self.sizes |= last - first + 1;
        match self.runs.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
            _ => self.runs.push((first, last)),
        }
    }
}
