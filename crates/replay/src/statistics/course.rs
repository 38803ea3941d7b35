//! How a replay went, from its beginning to its end, and how its latencies are distributed: what a picture of it shows.
//!
//! All times here are of the recording: when the event happened that a call belongs to, counted from the first event. They are the
//! same in every replay of a trace, whatever the table, the mode and the machine, so that replays can be laid on top of each other.

use super::timeline::{Content, Timeline};
use super::{Live, Times};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// How many pieces there are at most for latencies, in each of which every kind of call has a histogram of 2 KiB.
const PIECES_OF_LATENCIES: usize = 128;
/// How many there are at most for live mappings, which are a few numbers each.
const PIECES_OF_LIVE: usize = 256;
/// Longer calls of a piece are counted as this, half a minute.
const LONGEST: u64 = 1 << 35;
/// How many bins of a histogram have the width of a factor of ten.
const BINS_PER_DECADE: i32 = 20;

/// The kinds of calls that are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Map,
    Unmap,
    Dma,
}

/// How a replay went over the time of the recording. Whatever the length of the trace, there are at most 256 entries for what was
/// live and 128 for latencies.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Course {
    /// From the first event to the last, as it was recorded.
    pub recorded_nanoseconds: u64,
    /// How much of this an entry of `live` stands for.
    pub live_step_nanoseconds: u64,
    /// What was live, without gaps. Empty if nothing was carried out.
    pub live: Vec<LiveStep>,
    /// How much an entry of `latency` stands for.
    pub latency_step_nanoseconds: u64,
    /// How long calls took, without the entries in which there were none.
    pub latency: Vec<LatencyStep>,
}

/// What was live in a piece of the recording.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LiveStep {
    /// When the piece begins.
    pub begin_nanoseconds: u64,
    /// The fewest mappings after any event in it.
    pub least_mappings: u64,
    /// The most.
    pub most_mappings: u64,
    /// The most bytes.
    pub most_bytes: u64,
}

/// How long the calls took that belong to a piece of the recording.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencyStep {
    /// When the piece begins.
    pub begin_nanoseconds: u64,
    /// Maps.
    pub map: BriefLatency,
    /// Unmaps.
    pub unmap: BriefLatency,
    /// DMA.
    pub dma: BriefLatency,
}

/// How long a few calls took, in nanoseconds: right to one part in thirty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BriefLatency {
    /// How many calls there were. With none, everything else is 0.
    pub count: u64,
    /// Half of the calls took no longer.
    pub p50_nanoseconds: u64,
    /// 99 of 100 took no longer.
    pub p99_nanoseconds: u64,
}

/// How many calls took a time between two bounds, of which there are 20 to a factor of ten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HistogramBin {
    /// The calls took so long, or longer,
    pub from_nanoseconds: u64,
    /// and less than this.
    pub below_nanoseconds: u64,
    /// How many maps.
    pub maps: u64,
    /// How many unmaps.
    pub unmaps: u64,
    /// How many DMA.
    pub dma: u64,
}

/// The latencies of one kind of call in a piece, as far as there are any.
#[derive(Clone, Debug, Default)]
struct Brief(Option<Histogram<u32>>);

impl Brief {
    fn record(&mut self, time: Duration) {
        let histogram = self.0.get_or_insert_with(|| {
            // The bounds are constants, and one digit is the least that there is.
            Histogram::new_with_bounds(1, LONGEST, 1).expect("these bounds are allowed")
        });
        histogram.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    fn add(&mut self, other: Brief) {
        match (&mut self.0, other.0) {
            (Some(histogram), Some(other)) => histogram.add(&other).expect("all have the same bounds"),
            (none @ None, other) => *none = other,
            (Some(_), None) => {}
        }
    }

    fn summary(&self) -> BriefLatency {
        let Some(times) = &self.0 else { return BriefLatency::default() };
        // Of the values that are not told apart, the one in the middle.
        let quantile = |quantile| times.median_equivalent(times.value_at_quantile(quantile));
        BriefLatency { count: times.len(), p50_nanoseconds: quantile(0.5), p99_nanoseconds: quantile(0.99) }
    }
}

/// The calls of a piece.
#[derive(Clone, Debug, Default)]
struct Calls {
    map: Brief,
    unmap: Brief,
    dma: Brief,
}

impl Content for Calls {
    fn add(&mut self, later: Calls) {
        self.map.add(later.map);
        self.unmap.add(later.unmap);
        self.dma.add(later.dma);
    }
}

/// Latencies over time, as one worker has seen them.
#[derive(Clone, Debug)]
pub(crate) struct LatencyCourse(Timeline<Calls>);

impl LatencyCourse {
    pub(crate) fn new() -> LatencyCourse {
        LatencyCourse(Timeline::new(PIECES_OF_LATENCIES))
    }

    /// A call took so long, for an event of this time.
    pub(crate) fn record(&mut self, call: Call, at: u64, time: Duration) {
        let calls = self.0.at(at);
        let brief = match call {
            Call::Map => &mut calls.map,
            Call::Unmap => &mut calls.unmap,
            Call::Dma => &mut calls.dma,
        };
        brief.record(time);
    }

    pub(crate) fn add(&mut self, other: LatencyCourse) {
        self.0.add(other.0);
    }

    pub(crate) fn report(&self, course: &mut Course) {
        let steps = self.0.pieces().map(|(begin_nanoseconds, calls)| LatencyStep {
            begin_nanoseconds,
            map: calls.map.summary(),
            unmap: calls.unmap.summary(),
            dma: calls.dma.summary(),
        });
        course.latency =
            steps.filter(|step| step.map.count + step.unmap.count + step.dma.count > 0).collect();
        course.latency_step_nanoseconds = self.0.piece_nanoseconds();
    }
}

/// What was live after the events of a piece.
#[derive(Clone, Copy, Debug)]
struct Seen {
    least: Live,
    most: Live,
    last: Live,
}

impl Content for Option<Seen> {
    fn add(&mut self, later: Option<Seen>) {
        let (Some(seen), Some(later)) = (self.as_mut(), later) else {
            *self = self.or(later);
            return;
        };
        seen.least.mappings = seen.least.mappings.min(later.least.mappings);
        seen.most.mappings = seen.most.mappings.max(later.most.mappings);
        seen.most.bytes = seen.most.bytes.max(later.most.bytes);
        seen.last = later.last;
    }
}

/// What was live over time. Only the thread that orders the trace knows it.
#[derive(Debug)]
pub(crate) struct LiveCourse {
    timeline: Timeline<Option<Seen>>,
    /// The time of the last event.
    last: u64,
}

impl LiveCourse {
    pub(crate) fn new() -> LiveCourse {
        LiveCourse { timeline: Timeline::new(PIECES_OF_LIVE), last: 0 }
    }

    /// After an event of this time so much is live. Time does not go back.
    pub(crate) fn record(&mut self, at: u64, live: Live) {
        self.last = at;
        self.timeline.at(at).add(Some(Seen { least: live, most: live, last: live }));
    }

    pub(crate) fn report(&self, course: &mut Course) {
        let mut before = Live::default();
        let steps = self.timeline.pieces().map(|(begin_nanoseconds, seen)| {
            // Where nothing happened, what was live stayed so.
            let seen = seen.unwrap_or(Seen { least: before, most: before, last: before });
            before = seen.last;
            LiveStep {
                begin_nanoseconds,
                least_mappings: seen.least.mappings,
                most_mappings: seen.most.mappings,
                most_bytes: seen.most.bytes,
            }
        });
        course.live = steps.collect();
        course.live_step_nanoseconds = self.timeline.piece_nanoseconds();
        course.recorded_nanoseconds = self.last;
    }
}

/// Sorts times into bins that look equally wide on a logarithmic axis: from the first to the last bin that has any, with those
/// between.
pub(crate) fn histogram(maps: &Times, unmaps: &Times, dma: &Times) -> Vec<HistogramBin> {
    let mut bins = Vec::<HistogramBin>::new();
    // Bounds are whole nanoseconds. Below ten of them, several would be the same.
    let bounds = (0..).map(|step| 10f64.powf(f64::from(step) / f64::from(BINS_PER_DECADE)).round() as u64);
    let mut bounds = bounds.take_while(|bound| *bound <= 100 * super::LONGEST).peekable();
    while let Some(from_nanoseconds) = bounds.next() {
        let Some(&below_nanoseconds) = bounds.peek() else { break };
        if below_nanoseconds > from_nanoseconds {
            bins.push(HistogramBin { from_nanoseconds, below_nanoseconds, ..HistogramBin::default() });
        }
    }
    let mut sort = |times: &Times, count_of: fn(&mut HistogramBin) -> &mut u64| {
        for (nanoseconds, times) in times.counts() {
            let after = bins.partition_point(|bin| bin.from_nanoseconds <= nanoseconds);
            // What takes no time at all is with what takes the least.
            if let Some(bin) = bins.get_mut(after.saturating_sub(1)) {
                let count = count_of(bin);
                *count = count.saturating_add(times);
            }
        }
    };
    sort(maps, |bin| &mut bin.maps);
    sort(unmaps, |bin| &mut bin.unmaps);
    sort(dma, |bin| &mut bin.dma);
    let is_used = |bin: &HistogramBin| bin.maps > 0 || bin.unmaps > 0 || bin.dma > 0;
    let Some(first) = bins.iter().position(is_used) else { return Vec::new() };
    let last = bins.iter().rposition(is_used).unwrap_or(first);
    bins.drain(first..=last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn live(mappings: u64) -> Live {
        Live { mappings, bytes: mappings * 4096 }
    }

    proptest! {
        /// Latencies sorted into steps are those that a list of all calls gives, to one part in thirty.
        #[test]
        fn steps_have_the_percentiles_of_their_calls(
            calls in vec((0u64..1 << 34, 20u64..1 << 30, 0usize..3, 0usize..3), 1..300),
        ) {
            let mut workers = vec![LatencyCourse::new(); 3];
            for &(at, nanoseconds, call, worker) in &calls {
                let call = [Call::Map, Call::Unmap, Call::Dma][call];
                workers[worker].record(call, at, Duration::from_nanos(nanoseconds));
            }
            let mut whole = LatencyCourse::new();
            workers.into_iter().for_each(|worker| whole.add(worker));
            let mut course = Course::default();
            whole.report(&mut course);

            let step = course.latency_step_nanoseconds;
            prop_assert!(course.latency.len() <= PIECES_OF_LATENCIES);
            let mut counted = 0;
            for entry in &course.latency {
                for (call, found) in [entry.map, entry.unmap, entry.dma].into_iter().enumerate() {
                    let begin = entry.begin_nanoseconds;
                    let mut times: Vec<_> = calls
                        .iter()
                        .filter(|(at, _, known, _)| *known == call && at / step * step == begin)
                        .map(|(_, nanoseconds, ..)| *nanoseconds)
                        .collect();
                    times.sort_unstable();
                    prop_assert_eq!(found.count, times.len() as u64);
                    counted += times.len();
                    let is_right = |found: u64, quantile: f64| {
                        let rank = (times.len() as f64 * quantile).ceil().max(1.0) as usize;
                        times.get(rank - 1).is_none_or(|time| time.abs_diff(found) * 30 <= *time)
                    };
                    prop_assert!(is_right(found.p50_nanoseconds, 0.5), "{found:?} of {times:?}");
                    prop_assert!(is_right(found.p99_nanoseconds, 0.99), "{found:?} of {times:?}");
                }
            }
            prop_assert_eq!(counted, calls.len());
        }

        /// The least and the most after the events of a step; what was last where there is none.
        #[test]
        fn what_is_live_is_known_at_every_time(
            events in vec((0u64..1 << 20, 0u64..50), 1..120),
        ) {
            let (mut recorded, mut at, mut all) = (LiveCourse::new(), 0, Vec::new());
            for (pause, mappings) in events {
                at += pause;
                recorded.record(at, live(mappings));
                all.push((at, mappings));
            }
            let mut course = Course::default();
            recorded.report(&mut course);
            prop_assert_eq!(course.recorded_nanoseconds, at);
            let step = course.live_step_nanoseconds;
            prop_assert_eq!(course.live.len() as u64, at / step + 1);
            prop_assert!(course.live.len() <= PIECES_OF_LIVE);
            for (index, entry) in (0..).zip(&course.live) {
                prop_assert_eq!(entry.begin_nanoseconds, index * step);
                let mut within: Vec<_> = all.iter().filter(|(at, _)| at / step == index).map(|(_, live)| *live).collect();
                if within.is_empty() {
                    let before = all.iter().rev().find(|(at, _)| at / step < index);
                    within.push(before.map_or(0, |(_, mappings)| *mappings));
                }
                let (least, most) = (within.iter().min(), within.iter().max());
                prop_assert_eq!((Some(&entry.least_mappings), Some(&entry.most_mappings)), (least, most));
                prop_assert_eq!(entry.most_bytes, entry.most_mappings * 4096);
            }
        }

        #[test]
        fn every_call_is_in_the_bin_of_its_time(
            calls in vec((0u32..42, any::<u64>(), 0usize..3), 1..200),
        ) {
            let mut times = [Times::new(), Times::new(), Times::new()];
            for &(bits, nanoseconds, call) in &calls {
                times[call].record(Duration::from_nanos((nanoseconds | 1 << 63) >> (63 - bits)));
            }
            let [maps, unmaps, dma] = &times;
            let bins = histogram(maps, unmaps, dma);
            for pair in bins.windows(2) {
                prop_assert_eq!(pair[0].below_nanoseconds, pair[1].from_nanoseconds);
            }
            let count = |call| calls.iter().filter(|(_, _, known)| *known == call).count() as u64;
            let total = |count_of: fn(&HistogramBin) -> u64| bins.iter().map(count_of).sum::<u64>();
            prop_assert_eq!(total(|bin| bin.maps), count(0));
            prop_assert_eq!(total(|bin| bin.unmaps), count(1));
            prop_assert_eq!(total(|bin| bin.dma), count(2));
            // As exact as they were kept. To go through them all takes a while, so it is done once.
            let maps: Vec<_> = times[0].counts().collect();
            for bin in &bins {
                let within = maps.iter().filter(|(time, _)| (bin.from_nanoseconds..bin.below_nanoseconds).contains(time));
                prop_assert_eq!(bin.maps, within.map(|(_, count)| count).sum::<u64>());
            }
        }
    }

    #[test]
    fn bins_begin_at_round_numbers() {
        let mut times = Times::new();
        for nanoseconds in [1, 10, 100, 1000, 1_000_000] {
            times.record(Duration::from_nanos(nanoseconds));
        }
        let bins = histogram(&times, &Times::new(), &Times::new());
        let used: Vec<_> = bins.iter().filter(|bin| bin.maps == 1).map(|bin| bin.from_nanoseconds).collect();
        assert_eq!(used, [1, 10, 100, 1000, 1_000_000]);
        assert_eq!(histogram(&Times::new(), &Times::new(), &Times::new()), []);
    }
}
