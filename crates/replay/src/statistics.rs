//! What came of a replay.

use crate::player::{Disturbed, Options};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

pub use course::{BriefLatency, Course, HistogramBin, LatencyStep, LiveStep};
pub(crate) use course::{Call, LatencyCourse, LiveCourse, histogram};

mod course;
mod timeline;

/// How many of each kind of finding are written down; the others are counted.
const NOTES: usize = 10;
/// Longer than any call should take; what takes longer is counted as this.
const LONGEST: u64 = 3_600_000_000_000;

/// How long calls took, in nanoseconds. Percentiles are right to one part in a thousand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// How many calls there were. With none, everything else is 0.
    pub count: u64,
    /// The mean.
    pub mean_nanoseconds: f64,
    /// Half of the calls took no longer.
    pub p50_nanoseconds: u64,
    /// 99 of 100 took no longer.
    pub p99_nanoseconds: u64,
    /// 999 of 1000 took no longer.
    pub p999_nanoseconds: u64,
    /// None took longer.
    pub longest_nanoseconds: u64,
    /// All calls together, of all threads.
    pub total_seconds: f64,
}

/// The times of calls of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Times(Histogram<u64>);

impl Times {
    pub(crate) fn new() -> Times {
        // The bounds are constants: from a nanosecond on, with three digits.
        Times(Histogram::new_with_bounds(1, LONGEST, 3).expect("these bounds are allowed"))
    }

    pub(crate) fn record(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn add(&mut self, other: &Times) {
        self.0.add(&other.0).expect("all have the same bounds");
    }

    /// The times, to three digits, each with how many calls took it.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value()))
    }

    pub(crate) fn summary(&self) -> Latency {
        let times = &self.0;
        if times.is_empty() {
            return Latency::default();
        }
        Latency {
            count: times.len(),
            mean_nanoseconds: times.mean(),
            p50_nanoseconds: times.value_at_quantile(0.5),
            p99_nanoseconds: times.value_at_quantile(0.99),
            p999_nanoseconds: times.value_at_quantile(0.999),
            longest_nanoseconds: times.max(),
            total_seconds: times.mean() * times.len() as f64 / 1e9,
        }
    }
}

/// Something worth saying about a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    /// The line's number, the first being 1.
    pub line: u64,
    /// What there is to say.
    pub what: String,
}

/// Findings of one sort: all of them counted, the first ten in words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Noted {
    /// How many there were.
    pub count: u64,
    /// The first of them, in the order of their lines.
    pub first: Vec<Note>,
}

impl Noted {
    pub(crate) fn note(&mut self, line: u64, what: impl FnOnce() -> String) {
        self.count = self.count.saturating_add(1);
        if self.first.len() < NOTES {
            self.first.push(Note { line, what: what() });
        }
    }

    pub(crate) fn add(&mut self, other: Noted) {
        self.count = self.count.saturating_add(other.count);
        self.first.extend(other.first);
        self.first.sort_by_key(|note| note.line);
        self.first.truncate(NOTES);
    }
}

/// Mappings that are live at some moment of the trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Live {
    /// How many there are.
    pub mappings: u64,
    /// Their bytes, in whole pages.
    pub bytes: u64,
}

/// How many leaves of one size page tables have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LeafCount {
    /// Bytes that one leaf maps.
    pub leaf_bytes: u64,
    /// How many there are.
    pub count: u64,
}

/// What came of a replay.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The table that the devices walked, or the peer that did it all.
    pub table: &'static str,
    /// Whether it was a peer. Then what it does not have is `None` below.
    pub peer: bool,
    /// `strict` or `deferred`.
    pub mode: &'static str,
    /// How many threads did the work.
    pub threads: usize,
    /// Devices, each with a space of its own.
    pub devices: usize,

    /// Events that were carried out.
    pub events: u64,
    /// Maps among them.
    pub maps: u64,
    /// Unmaps among them; each may have removed several mappings.
    pub unmaps: u64,
    /// Attaches and detaches among them.
    pub attaches: u64,
    /// DMA that was recorded, among them.
    pub recorded_dma: u64,
    /// From the first event to the last, with reading, DMA and checking.
    pub elapsed_seconds: f64,
    /// Events in each of these seconds.
    pub events_per_second: f64,
    /// Maps and unmaps in each second that was spent in them and nothing else, on one thread.
    pub calls_per_second: f64,

    /// How long maps took.
    pub map: Latency,
    /// How long unmaps took.
    pub unmap: Latency,
    /// How long DMA took: one transfer for each mapping and direction, or what was recorded.
    pub dma: Latency,
    /// Bytes that DMA moved, all of them checked.
    pub dma_bytes: u64,

    /// The most mappings that were live at the same time, and the most bytes, which may have been at another time.
    pub peak: Live,
    /// What was live when the trace ended.
    pub live_at_end: Live,
    /// The leaves in the devices' tables when there were the most mappings, or nearly (8 of 9 at least).
    pub leaves: Option<Vec<LeafCount>>,
    /// The bytes of all page tables at the same moment, of the native ones and those derived from them.
    pub table_bytes: Option<u64>,
    /// Misses of the IOTLBs: translations for DMA that began at the root of a table.
    pub iotlb_walks: Option<u64>,
    /// What part of the DMA transfers found its way remembered, 0 to 1. A transfer may miss twice, where it goes over the border
    /// between two tables.
    pub iotlb_hit_rate: Option<f64>,

    /// What was live and how long calls took, over the time of the recording.
    pub course: Course,
    /// How many calls took how long, from the shortest to the longest.
    pub histogram: Vec<HistogramBin>,

    /// Lines that are no events.
    pub malformed: Noted,
    /// Events that do not fit those before them.
    pub misfits: Noted,
    /// How many misfits of each kind there were.
    pub misfits_by_kind: BTreeMap<&'static str, u64>,
    /// Maps and unmaps that the space refused.
    pub refused: Noted,
    /// DMA that was refused, or moved other bytes than it should.
    pub wrong_dma: Noted,
    /// Unmaps after which the device still reached the memory, or that removed something else than was mapped.
    pub wrong_unmaps: Noted,
    /// DMA that was refused as it had been when it was recorded.
    pub faults_as_recorded: u64,
    /// Faults that the IOMMU wrote down, other than these.
    pub faults: Option<u64>,
    /// Pages still charged after everything was unmapped and released.
    pub left_charged_pages: u64,
    /// What was thrown in, if [anything was to be](crate::Options::disturbance).
    pub disturbed: Option<Disturbed>,
    /// Why the rest of the trace could not be read, if so.
    pub unreadable: Option<String>,
}

impl Report {
    pub(crate) fn new(options: &Options) -> Report {
        let Options { table, peer, mode, threads, .. } = options;
        let name = peer.map_or(table.name(), |peer| peer.name());
        Report {
            table: name,
            peer: peer.is_some(),
            mode: mode.name(),
            threads: *threads,
            ..Report::default()
        }
    }

    /// Whether the trace was read to its end, and everything that could be carried out went as it should. Malformed lines and
    /// misfits are the trace's own.
    pub fn is_right(&self) -> bool {
        self.refused.count == 0
            && self.wrong_dma.count == 0
            && self.wrong_unmaps.count == 0
            && self.faults.is_none_or(|faults| faults == 0)
            && self.left_charged_pages == 0
            && self.unreadable.is_none()
            && self.disturbed.as_ref().is_none_or(|disturbed| disturbed.wrong.count == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_times() {
        let (mut times, mut others) = (Times::new(), Times::new());
        for nanoseconds in 1..=1000 {
            let which = if nanoseconds % 2 == 0 { &mut times } else { &mut others };
            which.record(Duration::from_nanos(nanoseconds * 1000));
        }
        times.add(&others);
        let summary = times.summary();
        let near = |value: u64, expected: u64| value.abs_diff(expected) * 1000 <= expected;
        assert_eq!(summary.count, 1000);
        assert!(near(summary.p50_nanoseconds, 500_000), "{summary:?}");
        assert!(near(summary.p99_nanoseconds, 990_000), "{summary:?}");
        assert!(near(summary.p999_nanoseconds, 999_000), "{summary:?}");
        assert!(near(summary.longest_nanoseconds, 1_000_000), "{summary:?}");
        assert!((summary.total_seconds - 0.5005).abs() < 0.001, "{summary:?}");
    }

    #[test]
    fn no_time_is_too_long_and_none_is_no_division_by_zero() {
        assert_eq!(Times::new().summary(), Latency::default());
        let mut times = Times::new();
        times.record(Duration::MAX);
        assert_eq!(times.summary().count, 1);
        assert!(times.summary().longest_nanoseconds >= LONGEST);
    }

    #[test]
    fn the_first_notes_are_kept_and_all_are_counted() {
        let mut noted = Noted::default();
        (20..40).for_each(|line| noted.note(line, || line.to_string()));
        let mut other = Noted::default();
        other.note(7, || "seven".to_owned());
        noted.add(other);
        assert_eq!((noted.count, noted.first.len()), (21, NOTES));
        assert_eq!((noted.first[0].line, noted.first[9].line), (7, 28));
    }
}
