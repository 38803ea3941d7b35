//! Tables as they are in memory: entries, and what they say.
//!
//! Entries are compared in [`Run`]s, as the kernel's side counts them: neighbours in one table, each more than the one
//! before by the same number. A gigabyte in small pages is then 512 runs instead of 262144 entries, and two tables have
//! the same runs if and only if they have the same entries.

use ioasid_pagetable::{Attributes, Entry, Format};

use super::peer::EntryLine;

/// Neighbouring entries of one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) level: u8,
    pub(crate) iova: u64,
    pub(crate) entry: u64,
    pub(crate) step: u64,
    pub(crate) count: u64,
}

/// Collects entries, which come one by one and ascending, into runs.
#[derive(Debug)]
pub(crate) struct Runs<'a, F> {
    format: &'a F,
    runs: Vec<Run>,
}

impl<'a, F: Format> Runs<'a, F> {
    pub(crate) fn new(format: &'a F) -> Runs<'a, F> {
        Runs { format, runs: Vec::new() }
    }

    pub(crate) fn push(&mut self, level: u8, iova: u64, entry: u64) {
        let shift = self.format.shift(level);
        let in_table = (1u64 << self.format.index_bits(level)) - 1;
        if let Some(last) = self.runs.last_mut() {
            let next = last.level == level
                && last.iova.wrapping_add(last.count << shift) == iova
                && (iova >> shift) & in_table != 0;
            let step = entry.wrapping_sub(last.entry.wrapping_add(last.step.wrapping_mul(last.count - 1)));
            if next && (last.count == 1 || last.step == step) {
                last.step = step;
                last.count += 1;
                return;
            }
        }
        self.runs.push(Run { level, iova, entry, step: 0, count: 1 });
    }

    pub(crate) fn finish(self) -> Vec<Run> {
        self.runs
    }
}

/// The runs of the kernel's table. Its links are looked at on the way: each must be what our format writes for a table
/// at the address that our format reads from it.
pub(crate) fn kernel_runs<F: Format>(format: &F, lines: &[EntryLine]) -> Result<Vec<Run>, String> {
    let mut runs = Vec::new();
    for line in lines {
        match *line {
            EntryLine::Leaves { level, iova, entry, step, count } => {
                runs.push(Run { level, iova, entry, step, count });
            }
            EntryLine::Table { level, iova, entry } => {
                let read = format.decode(level, entry);
                let ours = match read {
                    Entry::Table(address) => Some(format.table_entry(level, address)),
                    _ => None,
                };
                if ours != Some(entry) {
                    return Err(format!(
                        "the kernel's entry {entry:#x} at level {level} for {iova:#x} leads to a table; we read it \
                         as {read:x?} and would write {ours:x?}"
                    ));
                }
            }
        }
    }
    Ok(runs)
}

/// What differs first, if anything does.
pub(crate) fn difference(ours: &[Run], kernels: &[Run]) -> Option<String> {
    let at = ours.iter().zip(kernels).position(|(our, kernel)| our != kernel);
    let at = at.or_else(|| (ours.len() != kernels.len()).then(|| ours.len().min(kernels.len())))?;
    let shown = |runs: &[Run]| match runs.get(at) {
        Some(Run { level, iova, entry, step, count }) => {
            format!("{count} entries of level {level} from {iova:#x} on: {entry:#x}, step {step:#x}")
        }
        None => "nothing more".to_owned(),
    };
    Some(format!("we wrote {}; the kernel wrote {}", shown(ours), shown(kernels)))
}

/// A stretch of addresses with one translation. Whether it was used is not part of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) output: u64,
    pub(crate) attributes: Attributes,
}

/// Collects translations, ascending; what continues its neighbour is one with it, whatever the leaves are.
#[derive(Debug, Default)]
pub(crate) struct Extents(Vec<Extent>);

impl Extents {
    pub(crate) fn push(&mut self, extent: Extent) {
        let extent = Extent { attributes: extent.attributes.difference(Attributes::USED), ..extent };
        match self.0.last_mut() {
            Some(last)
                if last.last.checked_add(1) == Some(extent.first)
                    && last.output.wrapping_add(extent.first - last.first) == extent.output
                    && last.attributes == extent.attributes =>
            {
                last.last = extent.last;
            }
            _ => self.0.push(extent),
        }
    }

    pub(crate) fn finish(self) -> Vec<Extent> {
        self.0
    }
}

/// What the entries translate, read by our format. An error names an entry that does not stand where it says.
pub(crate) fn extents<F: Format>(format: &F, runs: &[Run]) -> Result<Vec<Extent>, String> {
    let mut extents = Extents::default();
    // Hardware marks any of the entries of a leaf.
    let marks = format.dirty_bit();
    // Of a leaf of several entries: its value, and how many more have to follow, and where.
    let mut rest: Option<(u64, u64, u64)> = None;
    for run in runs {
        let shift = format.shift(run.level);
        for number in 0..run.count {
            let iova = run.iova + (number << shift);
            let entry = run.entry.wrapping_add(run.step.wrapping_mul(number));
            let complaint =
                |what: &str| format!("entry {entry:#x} at level {} for {iova:#x} {what}", run.level);
            let Entry::Leaf { oa, size, attributes } = format.decode(run.level, entry) else {
                return Err(complaint("is no leaf"));
            };
            if let Some((value, left, next)) = rest.take() {
                if (value ^ entry) & !marks != 0 || next != iova {
                    return Err(complaint("stands where a larger leaf goes on"));
                }
                rest = (left > 1).then(|| (value, left - 1, next.wrapping_add(1 << shift)));
                continue;
            }
            if iova & (size.bytes() - 1) != 0 {
                return Err(complaint("begins a leaf in its middle"));
            }
            let entries = size.bytes() >> shift;
            rest = (entries > 1).then(|| (entry, entries - 1, iova.wrapping_add(1 << shift)));
            extents.push(Extent { first: iova, last: iova | (size.bytes() - 1), output: oa, attributes });
        }
    }
    match rest {
        Some((entry, left, next)) => Err(format!("{left} entries {entry:#x} are missing from {next:#x} on")),
        None => Ok(extents.finish()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioasid_pagetable::{AmdV1, VtdSecondStage};

    #[test]
    fn runs_end_with_their_table() {
        let format = VtdSecondStage::new(4).unwrap();
        let mut runs = Runs::new(&format);
        for page in 510..514u64 {
            runs.push(1, page << 12, page << 12 | 3);
        }
        runs.push(1, 600 << 12, 3);
        let run = |first: u64, count| Run {
            level: 1,
            iova: first << 12,
            entry: first << 12 | 3,
            step: 0x1000,
            count,
        };
        let last = Run { level: 1, iova: 600 << 12, entry: 3, step: 0, count: 1 };
        assert_eq!(runs.finish(), [run(510, 2), run(512, 2), last]);
    }

    #[test]
    fn neighbours_with_one_translation_are_one_extent() {
        let format = VtdSecondStage::new(4).unwrap();
        let pages = Run { level: 1, iova: 0x1f_e000, entry: 0x3f_e003, step: 0x1000, count: 2 };
        let large = Run { level: 2, iova: 0x20_0000, entry: 0x40_0083, step: 0, count: 1 };
        let both = extents(&format, &[pages, large]).unwrap();
        let attributes = Attributes::READ | Attributes::WRITE;
        assert_eq!(both, [Extent { first: 0x1f_e000, last: 0x3f_ffff, output: 0x3f_e000, attributes }]);
    }

    #[test]
    fn a_leaf_of_several_entries_needs_all_of_them() {
        let format = AmdV1::new();
        // 8 KiB at 0xfff5_2000.
        let both = Run { level: 1, iova: 0x2000, entry: 0x7000_0000_fff5_2e01, step: 0, count: 2 };
        assert_eq!(extents(&format, &[both]).unwrap().len(), 1);
        let written = Run { step: 0x40, ..both };
        assert_eq!(extents(&format, &[written]).unwrap().len(), 1, "through the second of its pages");
        for broken in [Run { count: 1, ..both }, Run { iova: 0x1000, ..both }, Run { count: 3, ..both }] {
            assert!(extents(&format, &[broken]).is_err(), "{broken:x?}");
        }
    }

    #[test]
    fn the_first_difference_is_shown() {
        let run = Run { level: 1, iova: 0x1000, entry: 0x5003, step: 0, count: 1 };
        assert_eq!(difference(&[run], &[run]), None);
        assert!(difference(&[run], &[]).unwrap().contains("the kernel wrote nothing more"));
    }
}
