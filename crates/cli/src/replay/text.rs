//! A report, for people.

use std::fmt::Write;
use std::time::Duration;

use ioasid_replay::{Latency, Noted, Report};

use crate::quantity::{Bytes, about, rate, time};
use crate::terminal::{Palette, Tone};

/// A table of what came of it, and what was not as it should be.
pub(super) fn describe(trace: &str, report: &Report, palette: Palette) -> String {
    let mut text = String::new();
    line(&mut text, &format!("{trace}: {}", setting(report)));
    line(
        &mut text,
        &format!(
            "  {} in {:.2} s: {} events/s; map and unmap alone: {} calls/s",
            counted(report.events, "event"),
            report.elapsed_seconds,
            rate(report.events_per_second),
            rate(report.calls_per_second)
        ),
    );
    let header =
        format!("  {:<8}{:>10}{:>11}{:>11}{:>11}{:>11}", "", "calls", "p50", "p99", "p99.9", "longest");
    line(&mut text, &palette.paint(Tone::Faint, &header, 0));
    for (name, latency) in [("map", &report.map), ("unmap", &report.unmap), ("DMA", &report.dma)] {
        line(&mut text, &latencies(name, latency));
    }
    let moved = match report.wrong_dma.count {
        0 => format!("{} moved, every byte right", about(report.dma_bytes)),
        _ => format!("{} moved, not all of it right", about(report.dma_bytes)),
    };
    row(&mut text, "DMA", &moved);
    let peak = format!(
        "{} at most ({} at most), {} at the end",
        report.peak.mappings,
        about(report.peak.bytes),
        report.live_at_end.mappings
    );
    row(&mut text, "live mappings", &peak);
    if let (Some(leaves), Some(bytes)) = (&report.leaves, report.table_bytes) {
        let leaves: Vec<String> =
            leaves.iter().map(|leaves| format!("{} of {}", leaves.count, Bytes(leaves.leaf_bytes))).collect();
        row(&mut text, "leaves", &if leaves.is_empty() { "none".to_owned() } else { leaves.join(", ") });
        row(&mut text, "tables", &about(bytes));
    }
    if let (Some(rate), Some(walks)) = (report.iotlb_hit_rate, report.iotlb_walks) {
        let walks = counted(walks, "walk");
        row(&mut text, "IOTLB", &format!("{} of the DMA hit, {walks} from the root", percent(rate)));
    }
    findings(&mut text, report, palette);
    text
}

/// What it was replayed on, and how.
pub(super) fn setting(report: &Report) -> String {
    let Report { table, peer, mode, threads, devices, .. } = report;
    let what = if *peer { "in place of a space" } else { "table" };
    let (threads, devices) = (counted(*threads as u64, "thread"), counted(*devices as u64, "device"));
    format!("{table} {what}, {mode}, {threads}, {devices}")
}

/// What the lines were like, and what went wrong.
fn findings(text: &mut String, report: &Report, palette: Palette) {
    if report.malformed.count + report.misfits.count == 0 {
        row(text, "input", "every line is an event that fits");
    }
    let left_out = |what: &str, noted: &Noted, text: &mut String| {
        if noted.count > 0 {
            row(text, "input", &format!("{} {what}", counted(noted.count, "line")));
            notes(text, noted);
        }
    };
    left_out("left out: no events", &report.malformed, text);
    let kinds: Vec<String> =
        report.misfits_by_kind.iter().map(|(kind, count)| format!("{kind}: {count}")).collect();
    left_out(&format!("not fitting those before ({})", kinds.join(", ")), &report.misfits, text);
    if report.is_right() {
        row(text, "verdict", &palette.paint(Tone::Good, "all right; no faults, and nothing is left", 0));
        return;
    }
    for (what, noted) in [
        ("maps or unmaps refused", &report.refused),
        ("DMA wrong", &report.wrong_dma),
        ("unmaps wrong", &report.wrong_unmaps),
    ] {
        if noted.count > 0 {
            row(text, "WRONG", &palette.paint(Tone::Bad, &format!("{what}: {}", noted.count), 0));
            notes(text, noted);
        }
    }
    let mut wrong = |what: &str| row(text, "WRONG", &palette.paint(Tone::Bad, what, 0));
    if let Some(faults) = report.faults.filter(|faults| *faults > 0) {
        wrong(&counted(faults, "fault"));
    }
    if report.left_charged_pages > 0 {
        wrong(&format!("{} still charged at the end", counted(report.left_charged_pages, "page")));
    }
    if let Some(reason) = &report.unreadable {
        wrong(&format!("what could be read was replayed; {reason}"));
    }
}

fn latencies(name: &str, latency: &Latency) -> String {
    let shown = |nanoseconds| time(Duration::from_nanos(nanoseconds));
    let Latency { count, p50_nanoseconds, p99_nanoseconds, p999_nanoseconds, longest_nanoseconds, .. } =
        *latency;
    let times = [p50_nanoseconds, p99_nanoseconds, p999_nanoseconds, longest_nanoseconds];
    let times: String = match count {
        0 => String::new(),
        _ => times.into_iter().map(|time| format!("{:>11}", shown(time))).collect(),
    };
    format!("  {name:<8}{count:>10}{times}")
}

fn notes(text: &mut String, noted: &Noted) {
    for note in &noted.first {
        match note.line {
            0 => line(text, &format!("    {}", note.what)),
            number => line(text, &format!("    line {number}: {}", note.what)),
        }
    }
    let others = noted.count.saturating_sub(noted.first.len() as u64);
    if others > 0 {
        line(text, &format!("    and {others} more"));
    }
}

fn row(text: &mut String, name: &str, value: &str) {
    line(text, &format!("  {name:<15}{value}"));
}

fn line(text: &mut String, line: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{}", line.trim_end());
}

/// A part of all, never rounded up to all of it.
fn percent(part: f64) -> String {
    format!("{:.2} %", (part * 10_000.0).floor() / 100.0)
}

/// `1 thread`, `2 threads`.
pub(super) fn counted(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioasid_replay::{Options, play, trace::Trace};

    fn described(lines: &str) -> String {
        let trace = format!("t_ns,cpu,dev,op,iova,phys,bytes,dir\n{lines}");
        let report = play(Trace::new(trace.as_bytes()).unwrap(), &Options::default(), &mut |_| ()).unwrap();
        describe("small.csv", &report, Palette::NONE)
    }

    #[test]
    fn a_good_replay_says_so() {
        let text = described(
            "0,0,00:03.0,map,fffe0000,10000,65536,TO_DEVICE\n0,0,00:03.0,unmap,fffe0000,-,65536,TO_DEVICE\n",
        );
        assert!(
            text.starts_with("small.csv: native table, strict, 1 thread, 1 device\n  2 events in "),
            "{text}"
        );
        for words in [
            "64.0 KiB moved, every byte right",
            "1 at most (64.0 KiB at most), 0 at the end",
            "every line is an event that fits",
            "all right; no faults",
            "0.00 % of the DMA hit, 1 walk from the root",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let text = described("0,0,00:03.0,unmap,1000,-,4096,TO_DEVICE\nnonsense\n");
        assert!(text.contains("1 line left out: no events\n    line 3: 1 fields where"), "{text}");
        assert!(text.contains("nothing mapped: 1"), "{text}");
        assert!(text.contains("line 2: an unmap of "), "{text}");
        assert!(text.contains("all right"), "{text}");
    }
}
