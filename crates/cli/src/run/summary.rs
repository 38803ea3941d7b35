//! The calls of a run, as a table and as JSON.

use std::fmt::Write;

use ioasid_run::{CallKind, Statistics};
use ioasid_uapi::{iommufd, vfio};
use serde::Serialize;

use crate::quantity::time;

/// One kind of call.
#[derive(Debug, Serialize)]
struct Row {
    call: String,
    calls: u64,
    failed: u64,
    total_nanoseconds: u128,
    mean_nanoseconds: u128,
    longest_nanoseconds: u128,
}

/// All that is known of a run at its end.
#[derive(Debug, Serialize)]
struct Ended {
    exit_status: u8,
    calls: Vec<Row>,
}

fn rows(statistics: &Statistics) -> Vec<Row> {
    let row = |(kind, totals): (CallKind, ioasid_run::CallTotals)| {
        let total = totals.total.as_nanos();
        Row {
            call: name(kind),
            calls: totals.calls,
            failed: totals.failures,
            total_nanoseconds: total,
            mean_nanoseconds: total / u128::from(totals.calls.max(1)),
            longest_nanoseconds: totals.longest.as_nanos(),
        }
    };
    statistics.iter().map(row).collect()
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
pub(super) fn table(statistics: &Statistics) -> String {
    let mut text = format!(
        "{:<34}{:>10}{:>8}{:>12}{:>12}{:>12}\n",
        "call (times in the server)", "calls", "failed", "total", "mean", "longest"
    );
    for row in rows(statistics) {
        let shown = |nanoseconds: u128| {
            time(std::time::Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<34}{:>10}{:>8}{:>12}{:>12}{:>12}",
            row.call,
            row.calls,
            row.failed,
            shown(row.total_nanoseconds),
            shown(row.mean_nanoseconds),
            shown(row.longest_nanoseconds),
        );
    }
    text
}

/// For programs.
pub(super) fn json(exit_status: u8, statistics: &Statistics) -> String {
    let ended = Ended { exit_status, calls: rows(statistics) };
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
        assert_eq!(table(&Statistics::default()).lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&json(7, &Statistics::default())).unwrap();
        assert_eq!(json["exit_status"], 7);
        assert_eq!(json["calls"], serde_json::json!([]));
    }
}
