//! The list of instances that do not pass, docs/conformance.md: read from its Markdown tables, and compared with what
//! happened.
//!
//! A table counts if its header is `| instance | expected | reason |`. `expected` is `fail` or `skip`; an instance that
//! is not listed is expected to pass. The list has to stay true in both directions, so an instance that is listed and
//! passes is as much a deviation as one that is not listed and fails. Only what was not run deviates from nothing.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, bail};

use super::{Outcome, Verdict};

/// What the document lists.
#[derive(Debug, Default)]
pub(crate) struct List {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// [`Verdict::Fail`] or [`Verdict::Skip`].
    pub(crate) expected: Verdict,
    pub(crate) reason: String,
}

/// An instance that did not end as the list says.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Deviation {
    pub(crate) instance: String,
    pub(crate) kind: DeviationKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DeviationKind {
    /// It should pass and does not.
    Regression,
    /// It is listed and passes: the list has to be changed.
    NowPasses,
    /// It is listed as failing and was skipped, or the other way round.
    OtherThanListed,
}

/// Reads the document. Instances that the self-test does not have are an error: a list that names them is out of date.
pub(crate) fn read(path: &Path, all: &[String]) -> Result<List> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let list = parse(&text).with_context(|| format!("{} is malformed", path.display()))?;
    if let Some(unknown) = list.entries.keys().find(|instance| !all.contains(instance)) {
        bail!("{} lists {unknown}, which the self-test does not have", path.display());
    }
    Ok(list)
}

impl List {
    /// What is said of an instance; `None`: it has to pass.
    pub(crate) fn entry(&self, instance: &str) -> Option<&Entry> {
        self.entries.get(instance)
    }

    /// All deviations, in the order of the outcomes.
    pub(crate) fn compare(&self, outcomes: &[Outcome]) -> Vec<Deviation> {
        let deviation = |outcome: &Outcome| {
            let listed = self.entry(&outcome.instance).map(|entry| entry.expected);
            let kind = match (outcome.verdict, listed) {
                (Verdict::NotRun, _) | (Verdict::Pass, None) => return None,
                (verdict, Some(expected)) if verdict == expected => return None,
                (Verdict::Pass, Some(_)) => DeviationKind::NowPasses,
                (_, None) => DeviationKind::Regression,
                (_, Some(_)) => DeviationKind::OtherThanListed,
            };
            Some(Deviation { instance: outcome.instance.clone(), kind })
        };
        outcomes.iter().filter_map(deviation).collect()
    }
}

fn parse(text: &str) -> Result<List> {
    let mut list = List::default();
    let mut in_table = false;
    for (number, line) in (1..).zip(text.lines()) {
        let Some(cells) = cells(line) else {
            in_table = false;
            continue;
        };
        if !in_table {
            in_table = cells == ["instance", "expected", "reason"];
            continue;
        }
        if cells.iter().all(|cell| cell.chars().all(|c| matches!(c, '-' | ':'))) {
            continue;
        }
        let [instance, expected, reason] = &*cells else {
            bail!("line {number} has {} cells, not 3", cells.len());
        };
        let instance = instance.trim_matches('`').to_owned();
        let expected = match &**expected {
            "fail" => Verdict::Fail,
            "skip" => Verdict::Skip,
            other => bail!("line {number} expects {other:?}, which is neither fail nor skip"),
        };
        if reason.is_empty() {
            bail!("line {number} gives no reason for {instance}");
        }
        let entry = Entry { expected, reason: reason.clone() };
        if list.entries.insert(instance.clone(), entry).is_some() {
            bail!("line {number} lists {instance} a second time");
        }
    }
    Ok(list)
}

/// The cells of a table's row; `None` if the line is none. `\|` is a bar inside a cell.
fn cells(line: &str) -> Option<Vec<String>> {
    let row = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    let row = row.replace("\\|", "\0");
    Some(row.split('|').map(|cell| cell.trim().replace('\0', "|")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "# Conformance\n\ntext | with a bar\n\n| instance | expected | reason |\n|---|:-:|---|\n\
        | `iommufd.cmd_length` | fail | rows of commands \\| that wait |\n| iommufd.vfio_ioas | skip | later |\n\n\
        | word | meaning |\n|---|---|\n| fail | not |\n";

    fn outcome(instance: &str, verdict: Verdict) -> Outcome {
        Outcome { instance: instance.to_owned(), verdict, note: String::new(), seconds: 0.0 }
    }

    #[test]
    fn tables_with_the_right_header_count() {
        let list = parse(DOCUMENT).unwrap();
        assert_eq!(list.entries.len(), 2);
        let entry = list.entry("iommufd.cmd_length").unwrap();
        assert_eq!(
            entry,
            &Entry { expected: Verdict::Fail, reason: "rows of commands | that wait".to_owned() }
        );
        assert_eq!(list.entry("iommufd.vfio_ioas").unwrap().expected, Verdict::Skip);
    }

    #[test]
    fn malformed_rows_are_errors() {
        let table = |row: &str| format!("| instance | expected | reason |\n|---|---|---|\n{row}\n");
        for row in
            ["| a | pass | b |", "| a | fail | |", "| a | fail |", "| a | fail | b |\n| `a` | skip | c |"]
        {
            assert!(parse(&table(row)).is_err(), "{row}");
        }
    }

    #[test]
    fn deviations_in_both_directions() {
        let list = parse(DOCUMENT).unwrap();
        let outcomes = [
            outcome("unlisted.passes", Verdict::Pass),
            outcome("unlisted.fails", Verdict::Fail),
            outcome("unlisted.skips", Verdict::Skip),
            outcome("unlisted.not_run", Verdict::NotRun),
            outcome("iommufd.cmd_length", Verdict::Pass),
            outcome("iommufd.vfio_ioas", Verdict::Fail),
        ];
        let deviations: Vec<_> = list.compare(&outcomes).into_iter().map(|d| (d.instance, d.kind)).collect();
        let expected = [
            ("unlisted.fails", DeviationKind::Regression),
            ("unlisted.skips", DeviationKind::Regression),
            ("iommufd.cmd_length", DeviationKind::NowPasses),
            ("iommufd.vfio_ioas", DeviationKind::OtherThanListed),
        ];
        assert_eq!(deviations, expected.map(|(instance, kind)| (instance.to_owned(), kind)));
        let as_listed =
            [outcome("iommufd.cmd_length", Verdict::Fail), outcome("iommufd.vfio_ioas", Verdict::NotRun)];
        assert_eq!(list.compare(&as_listed), []);
    }
}
