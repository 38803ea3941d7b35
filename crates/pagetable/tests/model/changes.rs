//! Operations on what is mapped already: merging, protecting, remapping, and marks of use.

use crate::pair::{Pair, report_of};
use crate::plain::{Model, ModelLeaf, Report, log2, page_size};
use ioasid_pagetable::{
    Attributes, CutError, DirtyBitmap, Format, Gather, IovaRange, Oa, PageSize, ProtectError, RemapError,
    WalkFault,
};

/// A table that could be one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mergeable {
    first: u64,
    last: u64,
    leaf: ModelLeaf,
    /// How large and how many the leaves are, and how large an entry of their table.
    pieces: (u64, u64),
    entry: u32,
}

/// What merging changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Merged {
    pub(crate) tables: u64,
    /// Ranges of the new leaves, neighbours joined.
    pub(crate) runs: Vec<(u64, u64)>,
}

/// Ranges sorted, and joined where they touch or overlap.
pub(crate) fn joined(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (first, last) in ranges {
        match joined.last_mut() {
            Some((_, end)) if end.checked_add(1).is_none_or(|next| first <= next) => *end = last.max(*end),
            _ => joined.push((first, last)),
        }
    }
    joined
}

impl Model {
    /// The table under the entry of `level` at `first`, if all its leaves continue each other.
    fn mergeable(&self, level: u8, first: u64, join: bool) -> Option<Mergeable> {
        let entry = self.specification.level(level).entry;
        let last = first | ((1 << entry) - 1);
        let head = *self.leaves.get(&first)?;
        let mut used = Attributes::empty();
        let mut expected = Some(first);
        let mut count = 0;
        for (&at, leaf) in self.leaves.range(first..=last) {
            let size = log2(at, leaf.last);
            let like = (leaf.attributes ^ head.attributes).difference(Attributes::USED).is_empty();
            let follows = expected == Some(at) && leaf.oa.checked_sub(head.oa) == Some(at - first);
            if self.specification.level_of(size) != level - 1
                || !(like && follows && leaf.present && !leaf.busy)
                || leaf.first && at != first && !join
            {
                return None;
            }
            used |= self.all_attributes(at, leaf) & Attributes::USED;
            expected = leaf.last.checked_add(1);
            count += 1;
        }
        if expected != last.checked_add(1) || head.oa & (last - first) != 0 {
            return None;
        }
        if self.specification.hardware_marks && head.attributes.contains(Attributes::WRITE) {
            used = self.specification.marks();
        }
        let leaf = ModelLeaf { last, attributes: head.attributes | used, ..head };
        let entry = self.specification.level(level - 1).entry;
        Some(Mergeable { first, last, leaf, pieces: (head.last - first + 1, count), entry })
    }

    /// All that could be merged in a range at one level.
    fn all_mergeable(&self, range: IovaRange, level: u8, join: bool) -> Vec<Mergeable> {
        let entry = self.specification.level(level).entry;
        let low = (1u64 << entry) - 1;
        let sizes = self.specification.level(level).sizes;
        if sizes >> entry & 1 == 0 {
            return Vec::new();
        }
        let mut found = Vec::new();
        let mut at = range.first().checked_add(low).map(|first| first & !low);
        // From the first leaf of one table to that of the next.
        while let Some((&first, _)) = at.and_then(|at| self.leaves.range(at..).next()) {
            let first = first & !low;
            if first | low > range.last() {
                break;
            }
            found.extend(self.mergeable(level, first, join));
            at = (first | low).checked_add(1);
        }
        found
    }

    /// From the lowest level upwards.
    pub(crate) fn merge(&mut self, range: IovaRange) -> Result<Merged, CutError> {
        self.merge_mappings(range, false)
    }

    /// The same; mappings that continue each other become one or do not.
    pub(crate) fn merge_mappings(&mut self, range: IovaRange, join: bool) -> Result<Merged, CutError> {
        let mut merged = Merged::default();
        let mut refused: Option<Mergeable> = None;
        for level in 2..=self.top {
            for table in self.all_mergeable(range, level, join) {
                if !self.specification.live_sizes {
                    // The first one whose end comes by.
                    refused = refused.filter(|other| other.last <= table.last).or(Some(table));
                    continue;
                }
                for first in self.firsts(IovaRange::new(table.first, table.last).unwrap()) {
                    self.remove(first);
                }
                self.leaves.insert(table.first, table.leaf);
                merged.tables += 1;
                merged.runs.push((table.first, table.last));
            }
        }
        if let Some(Mergeable { first, entry, .. }) = refused {
            return Err(CutError::NeedsBreak { at: first, size: PageSize::from_log2(entry).unwrap() });
        }
        merged.runs = joined(merged.runs);
        Ok(merged)
    }

    /// What a leaf says under other permissions.
    fn protected(&self, leaf: &ModelLeaf, permissions: Attributes) -> Attributes {
        let wanted = (leaf.attributes - Attributes::PERMISSIONS) | (permissions & Attributes::PERMISSIONS);
        let said = self.said(wanted);
        let becomes_writable =
            permissions.contains(Attributes::WRITE) && !leaf.attributes.contains(Attributes::WRITE);
        if becomes_writable {
            return said;
        }
        (said - Attributes::DIRTY) | (leaf.attributes & Attributes::DIRTY)
    }

    pub(crate) fn protect(
        &mut self,
        range: IovaRange,
        permissions: Attributes,
    ) -> Result<Report, ProtectError> {
        self.cut_ends(range)?;
        let mut report = Report::default();
        for first in self.firsts(range) {
            let leaf = self.leaves[&first];
            let attributes = self.protected(&leaf, permissions);
            if attributes == leaf.attributes {
                continue;
            }
            if !self.specification.live_permissions {
                return Err(ProtectError::NeedsBreak { at: first, size: page_size(first, leaf.last) });
            }
            self.leaves.get_mut(&first).unwrap().attributes = attributes;
            report.leaf(first, leaf.last);
        }
        Ok(report)
    }

    /// Cuts leaves until none is larger, in ascending order, and says where. `None`: more leaves than a test can afford.
    fn split(&mut self, range: IovaRange, largest: u64) -> Option<Result<Vec<(u64, u64)>, CutError>> {
        let mut cut = Vec::new();
        let mut next = self.firsts(range).first().copied();
        while let Some(first) = next.filter(|first| *first <= range.last()) {
            let leaf = self.leaves[&first];
            if leaf.last - first < largest {
                next = self.leaves.range(first + 1..).next().map(|(first, _)| *first);
                continue;
            }
            if !self.may_cut() {
                return None;
            }
            if let Err(error) = self.cut_once(first, leaf) {
                return Some(Err(error));
            }
            cut.push((first, leaf.last));
            // Its pieces before the range stay as they are.
            next = self.firsts(range).into_iter().find(|at| *at >= first);
        }
        Some(Ok(joined(cut)))
    }

    /// Lets leaves lead elsewhere that are small enough, after those that are not were cut. `None`: more leaves than a test
    /// can afford.
    pub(crate) fn remap(
        &mut self,
        range: IovaRange,
        oa: u64,
        attributes: Attributes,
    ) -> Option<Result<Report, RemapError>> {
        if let Some(error) = self.refuses(range, oa, attributes) {
            return Some(Err(error.into()));
        }
        if let Err(error) = self.cut_ends(range) {
            return Some(Err(error.into()));
        }
        let said = self.said(attributes);
        let mut changed = Vec::new();
        let mut at = Some(range.first());
        while let Some(from) = at.filter(|at| *at <= range.last()) {
            let Some((&first, _)) = self.leaves.range(from..=range.last()).next() else { break };
            let leaf = self.leaves[&first];
            let output = oa + (first - range.first());
            let fits = output & (leaf.last - first) == 0;
            // Which of a leaf's entries hardware has marked does not make it another one.
            let differs =
                leaf.oa != output || !(leaf.attributes ^ said).difference(Attributes::USED).is_empty();
            at = leaf.last.checked_add(1);
            if !differs {
                continue;
            }
            if !self.specification.live_outputs || self.entries_of(first, leaf.last) != 1 {
                let size = page_size(first, leaf.last);
                return Some(Err(RemapError::NeedsBreak { at: first, size }));
            }
            if fits {
                changed.push((first, output));
                continue;
            }
            if let Err(error) = self.cut_once(first, leaf) {
                return Some(Err(error.into()));
            }
            if !self.may_cut() {
                return None;
            }
            at = Some(first);
        }
        let mut report = Report::default();
        for (first, output) in changed {
            let leaf = self.leaves.get_mut(&first).unwrap();
            (leaf.oa, leaf.attributes) = (output, said);
            report.leaf(first, leaf.last);
        }
        Some(Ok(report))
    }

    /// The dirty leaves that have an address in the range.
    fn dirty(&self, range: IovaRange) -> Vec<(u64, u64)> {
        let firsts = self.firsts(range).into_iter();
        let leaves = firsts.map(|first| (first, self.leaves[&first]));
        let dirty =
            leaves.filter(|(first, leaf)| self.all_attributes(*first, leaf).contains(Attributes::DIRTY));
        dirty.map(|(first, leaf)| (first, leaf.last)).collect()
    }
}

/// The ranges clipped to another, and joined.
fn clipped(ranges: &[(u64, u64)], range: IovaRange) -> Vec<(u64, u64)> {
    joined(ranges.iter().map(|&(first, last)| (first.max(range.first()), last.min(range.last()))).collect())
}

impl<F: Format> Pair<F> {
    pub(crate) fn merge(&mut self, range: IovaRange) {
        let expected = self.model.merge(range);
        let mut gather = Gather::new();
        let tables = self.radix.merge(range, &mut gather);
        assert_eq!(tables, expected.clone().map(|merged| merged.tables), "merging {range}");
        assert_eq!(
            joined(report_of(&gather).runs),
            expected.clone().unwrap_or_default().runs,
            "merging {range}"
        );
        assert_eq!(gather.retired.len() as u64, expected.map_or(0, |merged| merged.tables));
        self.settle(&mut gather);
    }

    pub(crate) fn split(&mut self, range: IovaRange, power: u32) {
        let largest = self.model.granule() << power;
        let (before, leaves) = (self.model.clone(), self.model.leaves.len());
        let Some(expected) = self.model.split(range, largest) else {
            self.model = before;
            return;
        };
        let mut gather = Gather::new();
        let result = self.radix.split(range, PageSize::from_log2(largest.ilog2()).unwrap(), &mut gather);
        assert_eq!(result, expected.clone().map(drop), "splitting {range} to {largest:#x}");
        if let Ok(cut) = expected {
            assert_eq!(joined(report_of(&gather).runs), cut, "splitting {range} to {largest:#x}");
        }
        assert_eq!(gather.tables_changed, self.model.leaves.len() != leaves, "tables, splitting {range}");
        self.settle(&mut gather);
    }

    pub(crate) fn protect(&mut self, range: IovaRange, permissions: Attributes) {
        let before = self.model.leaves.len();
        let expected = self.model.protect(range, permissions);
        let mut gather = Gather::new();
        let result = self.radix.protect(range, permissions, &mut gather);
        assert_eq!(result, expected.clone().map(|_| ()), "protecting {range} with {permissions:?}");
        assert_eq!(
            report_of(&gather),
            expected.unwrap_or_default(),
            "protecting {range} with {permissions:?}"
        );
        assert_eq!(gather.tables_changed, self.model.leaves.len() != before, "tables, protecting {range}");
        self.settle(&mut gather);
    }

    pub(crate) fn remap(&mut self, range: IovaRange, oa: u64, attributes: Attributes) {
        let before = self.model.clone();
        let Some(expected) = self.model.remap(range, oa, attributes) else {
            self.model = before;
            return;
        };
        let mut gather = Gather::new();
        let result = self.radix.remap(range, Oa::new(oa), attributes, &mut gather);
        assert_eq!(result, expected.clone().map(|_| ()), "remapping {range} to {oa:#x}");
        assert_eq!(report_of(&gather), expected.unwrap_or_default(), "remapping {range} to {oa:#x}");
        let cut = self.model.leaves.len() != before.leaves.len();
        assert_eq!(gather.tables_changed, cut, "tables, remapping {range}");
        self.settle(&mut gather);
    }

    pub(crate) fn mark(&mut self, iova: u64, used: Attributes) {
        let found = self.radix.mark(iova, used);
        let Some((first, leaf)) = self.model.at(iova) else {
            let reachable = self.model.specification.canonical(iova) == iova;
            let fault = if reachable { WalkFault::NotMapped(iova) } else { WalkFault::OutOfRange(iova) };
            assert_eq!(found, Err(fault));
            return;
        };
        let attributes = found.ok().map(|leaf| leaf.attributes);
        assert_eq!(found, Ok(self.expected(first, &leaf, attributes)), "marking {iova:#x}");
        let used = used & self.model.specification.marks();
        if self.model.entries_of(first, leaf.last) == 1 {
            self.model.leaves.get_mut(&first).unwrap().attributes |= used;
        } else {
            let entry = self.model.entry_at(iova, first, leaf.last);
            *self.model.marks.entry(entry).or_insert(Attributes::empty()) |= used;
        }
        // Whichever entry it is, the whole leaf is dirty.
        for page in [first, leaf.last] {
            let page = page & !(self.model.granule() - 1);
            self.check_dirty(IovaRange::with_length(page, self.model.granule()).unwrap());
        }
    }

    /// What dirty leaves report, which has to be ascending.
    fn collect(range: IovaRange, read: impl FnOnce(&mut dyn FnMut(IovaRange))) -> Vec<(u64, u64)> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        read(&mut |dirty| {
            assert!(range.covers(&dirty), "{dirty} is reported of {range}");
            assert!(found.last().is_none_or(|&(_, end)| end < dirty.first()), "{dirty} after {found:x?}");
            found.push((dirty.first(), dirty.last()));
        });
        joined(found)
    }

    pub(crate) fn check_dirty(&self, range: IovaRange) {
        let expected = self.model.dirty(range);
        let found = Self::collect(range, |report| self.radix.dirty(range, report));
        assert_eq!(found, clipped(&expected, range), "dirty in {range}");
        // The same in a bitmap that begins a little before the range, or where it does.
        let granule = self.model.granule();
        let before = range.first().saturating_sub(5 * granule);
        for first in [before, range.first()] {
            let mut words = [0u64; 3];
            let size = PageSize::from_log2(granule.trailing_zeros()).unwrap();
            let mut bitmap = DirtyBitmap::new(&mut words, first, size);
            self.radix.dirty(range, |dirty| bitmap.set(dirty));
            for page in 0..192 {
                let at = (page * granule).checked_add(first).filter(|&at| range.contains(at));
                let dirty = |at: u64| expected.iter().any(|&(first, last)| (first..=last).contains(&at));
                let bit = words[page as usize / 64] >> (page % 64) & 1;
                assert_eq!(bit == 1, at.is_some_and(dirty), "bit {page} from {first:#x} on of {range}");
            }
        }
    }

    pub(crate) fn read_and_clear_dirty(&mut self, range: IovaRange) {
        let dirty = self.model.dirty(range);
        let mut sizes = 0;
        let found = Self::collect(range, |report| sizes = self.radix.read_and_clear_dirty(range, report));
        assert_eq!(found, clipped(&dirty, range), "dirty in {range}");
        let mut expected = 0;
        for (first, last) in dirty {
            if range.first() <= first && last <= range.last() {
                expected |= last - first + 1;
                *self.model.leaves.get_mut(&first).map(|leaf| &mut leaf.attributes).unwrap() -=
                    Attributes::DIRTY;
                for (_, marks) in self.model.marks.range_mut(first..=last) {
                    *marks -= Attributes::DIRTY;
                }
            }
        }
        assert_eq!(sizes, expected, "sizes of what was cleared in {range}");
        self.check_dirty(range);
    }
}
