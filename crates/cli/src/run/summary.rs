//! A run at its end: its calls, what was left, and hints; as text and as JSON.

use std::fmt::Write;
use std::time::Duration;

use ioasid_run::CallKind;
use ioasid_uapi::{iommufd, vfio};
use serde::Serialize;

use super::hints::Hint;
use super::watch::{Collected, Left, Times};
use crate::quantity::time;

/// One kind of call.
#[derive(Debug, Serialize)]
struct Row {
    call: String,
    calls: u64,
    failed: u64,
    total_nanoseconds: u128,
    mean_nanoseconds: u128,
    p50_nanoseconds: u64,
    p99_nanoseconds: u64,
    longest_nanoseconds: u64,
}

/// All that is known of a run at its end.
#[derive(Debug, Serialize)]
struct Ended<'a> {
    exit_status: u8,
    calls: Vec<Row>,
    left: &'a [Left],
    /// Further closes that left something.
    more_left: u64,
    hints: Vec<Hint>,
}

fn rows(collected: &Collected) -> Vec<Row> {
    let row = |(kind, times): (&CallKind, &Times)| {
        let (total, calls) = (times.total.as_nanos(), times.times.len());
        Row {
            call: name(*kind),
            calls,
            failed: times.failed,
            total_nanoseconds: total,
            mean_nanoseconds: total / u128::from(calls.max(1)),
            p50_nanoseconds: times.times.value_at_quantile(0.5),
            p99_nanoseconds: times.times.value_at_quantile(0.99),
            longest_nanoseconds: times.times.max(),
        }
    };
    collected.kinds.iter().map(row).collect()
}

/// A call's name in Linux's headers, or what else it is.
fn name(kind: CallKind) -> String {
    match kind {
        CallKind::Open => "open".to_owned(),
        CallKind::OpenElsewhere => "open of other files".to_owned(),
        CallKind::Ioctl(number) => {
            let of_vfio = || vfio::DEVICE_COMMANDS.iter().chain(vfio::CONTAINER_COMMANDS);
            let known = iommufd::command(number).map(|command| command.name);
            let known =
                known.or_else(|| of_vfio().find(|(known, _)| *known == number).map(|(_, name)| *name));
            known.map_or_else(|| format!("ioctl {number:#06x}"), str::to_owned)
        }
        CallKind::IoctlElsewhere => "ioctl on other files".to_owned(),
        CallKind::Read => "pread of a device region".to_owned(),
        CallKind::Write => "pwrite of a device region".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// For people. Times are the server's: from the receipt of a call to its answer.
pub(super) fn text(collected: &Collected) -> String {
    let mut text = format!(
        "{:<34}{:>10}{:>8}{:>12}{:>11}{:>11}{:>11}\n",
        "call (times in the server)", "calls", "failed", "total", "p50", "p99", "longest"
    );
    let shown = |nanoseconds: u64| time(Duration::from_nanos(nanoseconds));
    for row in rows(collected) {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<34}{:>10}{:>8}{:>12}{:>11}{:>11}{:>11}",
            row.call,
            row.calls,
            row.failed,
            shown(u64::try_from(row.total_nanoseconds).unwrap_or(u64::MAX)),
            shown(row.p50_nanoseconds),
            shown(row.p99_nanoseconds),
            shown(row.longest_nanoseconds),
        );
    }
    for left in &collected.left {
        let _ = writeln!(text, "left at a last close: {}", left.describe());
    }
    if collected.more_left > 0 {
        let _ = writeln!(text, "left at a last close: something, {} times more", collected.more_left);
    }
    for hint in collected.hints.hints() {
        let _ = writeln!(text, "hint: {}", hint.text);
    }
    text
}

/// For programs.
pub(super) fn json(exit_status: u8, collected: &Collected) -> String {
    let ended = Ended {
        exit_status,
        calls: rows(collected),
        left: &collected.left,
        more_left: collected.more_left,
        hints: collected.hints.hints(),
    };
    let mut text = serde_json::to_string_pretty(&ended).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_the_names_of_the_headers() {
        assert_eq!(name(CallKind::Ioctl(0x3b85)), "IOMMU_IOAS_MAP");
        assert_eq!(name(CallKind::Ioctl(0x3b76)), "VFIO_DEVICE_BIND_IOMMUFD");
        assert_eq!(name(CallKind::Ioctl(0x3b64)), "VFIO_GET_API_VERSION");
        assert_eq!(name(CallKind::Ioctl(0x3bff)), "ioctl 0x3bff");
    }

    #[test]
    fn a_run_without_calls_is_a_heading() {
        assert_eq!(text(&Collected::default()).lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&json(7, &Collected::default())).unwrap();
        assert_eq!(json["exit_status"], 7);
        assert_eq!(json["calls"], serde_json::json!([]));
    }

    #[test]
    fn times_are_percentiles_and_what_was_left_is_said() {
        let mut collected = Collected::default();
        let times = collected.kinds.entry(CallKind::Ioctl(0x3b85)).or_default();
        (1..=100).for_each(|number| times.times.record(number * 1000).unwrap());
        collected.left.push(Left {
            file: "vfio0".to_owned(),
            attached_to: Some(3),
            pasids: 2,
            mapped: Vec::new(),
            charged: vec![("user 0".to_owned(), 256)],
        });
        let text = text(&collected);
        assert!(
            text.contains(
                "vfio0: attached to page table 3; 2 PASIDs attached; 1 MiB pinned and charged to user 0"
            ),
            "{text}"
        );
        let json: serde_json::Value = serde_json::from_str(&json(0, &collected)).unwrap();
        let p50 = json["calls"][0]["p50_nanoseconds"].as_u64().unwrap();
        let p99 = json["calls"][0]["p99_nanoseconds"].as_u64().unwrap();
        assert!(p50.abs_diff(50_000) <= 500 && p99.abs_diff(99_000) <= 990, "{p50} {p99}");
        assert_eq!(json["left"][0]["attached_to"], 3);
    }
}
