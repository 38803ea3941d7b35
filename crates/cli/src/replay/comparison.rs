//! Several replays of a trace side by side, for people: a row for each.

use std::fmt::Write;
use std::time::Duration;

use ioasid_replay::{Latency, Report};

use super::text::counted;
use crate::quantity::{about, rate, time};
use crate::terminal::{Palette, Tone};

/// What is compared: a report, and what it is of.
#[derive(Debug, Clone)]
pub(super) struct Row<'a> {
    /// The trace. Only rows of the same one say anything about each other.
    pub(super) trace: &'a str,
    /// What was chosen, as short as it can be: a table and a mode, for example.
    pub(super) label: String,
    pub(super) report: &'a Report,
}

/// A table with a row for each, of one trace.
pub(super) fn describe(rows: &[Row<'_>], palette: Palette) -> String {
    let mut text = String::new();
    let Some(Row { trace, report, .. }) = rows.first() else { return text };
    let threads = counted(report.threads as u64, "thread");
    let width = rows.iter().map(|row| row.label.chars().count()).max().unwrap_or(0).max(16);
    // Writing to a string does not fail.
    let _ = writeln!(text, "{trace}: {} events, {threads}", report.events);
    let columns = format!(
        "  {:width$}{:>9}{:>9}  {:>19}  {:>19}  {:>19}{:>12}",
        "", "events/s", "calls/s", "map p50       p99", "unmap p50       p99", "DMA p50       p99", "tables"
    );
    let _ = writeln!(text, "{}", palette.paint(Tone::Faint, &columns, 0));
    for Row { label, report, .. } in rows {
        let _ = writeln!(
            text,
            "  {label:width$}{:>9}{:>9}{}{}{}{:>12}{}",
            rate(report.events_per_second),
            rate(report.calls_per_second),
            percentiles(&report.map),
            percentiles(&report.unmap),
            percentiles(&report.dma),
            report.table_bytes.map_or("-".to_owned(), about),
            if report.is_right() { String::new() } else { palette.paint(Tone::Bad, "  WRONG", 0) },
        );
    }
    text
}

fn percentiles(latency: &Latency) -> String {
    let shown = |nanoseconds| time(Duration::from_nanos(nanoseconds));
    match latency.count {
        0 => format!("  {:>9} {:>9}", "-", "-"),
        _ => format!("  {:>9} {:>9}", shown(latency.p50_nanoseconds), shown(latency.p99_nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_below_their_columns() {
        let latency = |p50_nanoseconds, p99_nanoseconds| Latency {
            count: 2,
            p50_nanoseconds,
            p99_nanoseconds,
            ..Latency::default()
        };
        let good = Report {
            threads: 2,
            events: 70,
            events_per_second: 481_000.0,
            calls_per_second: 2_104_000.0,
            map: latency(301, 12_300),
            unmap: latency(702, 1_000_000),
            dma: Latency::default(),
            table_bytes: Some(84 << 10),
            ..Report::default()
        };
        let bad = Report { faults: Some(1), ..good.clone() };
        let row = |label: &str, report| Row { trace: "a.csv", label: label.to_owned(), report };
        let text =
            describe(&[row("native strict", &good), row("a name that is longer", &bad)], Palette::NONE);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "a.csv: 70 events, 2 threads");
        assert_eq!(
            lines[2].split_whitespace().collect::<Vec<_>>().join(" "),
            "native strict 481.0 k 2.10 M 301 ns 12.3 us 702 ns 1.0 ms - - 84.0 KiB"
        );
        let ends = |line: &str, words: &str| {
            line.find(words).map(|start| line[..start + words.len()].chars().count())
        };
        for (column, value) in [("events/s", "481.0 k"), ("calls/s", "2.10 M"), ("tables", "84.0 KiB")] {
            assert_eq!(ends(lines[1], column), ends(lines[2], value), "{text}");
        }
        assert!(lines[3].ends_with("WRONG") && !lines[2].contains("WRONG"), "{text}");
        assert_eq!(describe(&[], Palette::NONE), "");
    }
}
