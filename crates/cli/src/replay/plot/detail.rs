//! One replay: three panels that share what they can of their axes.

use std::ops::Range;

use ioasid_replay::{BriefLatency, HistogramBin, LatencyStep, Report};
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;

use super::page::{
    Area, Axis, BELOW, BESIDE, BLUE, Drawn, HEADING, Kind, Sample, VERMILION, axes, dashed, figure, heading,
    light, line, named, text,
};
use super::scale::{Unit, bytes_unit, count, decades, nanoseconds, number, time_unit};
use crate::quantity::rate;
use crate::replay::text::{counted, setting};

/// The heights of the panels, with what is above and below them.
const LIVE: u32 = 550;
const LATENCIES: u32 = 640;
const HISTOGRAM: u32 = 600;
/// The axis of live mappings goes so far at least, so that its ticks are whole numbers.
const FEWEST: u64 = 5;
/// That of bytes goes so far at least.
const PAGE: u64 = 4096;
/// Of the line below the title.
const SETTING: u32 = 62;

/// Draws what came of the replay of a trace.
///
/// # Errors
/// The library refuses to draw, which it has no reason to.
pub(crate) fn draw(trace: &str, report: &Report) -> anyhow::Result<String> {
    figure(trace, SETTING + LIVE + LATENCIES + HISTOGRAM, |page| {
        let (top, rest) = page.split_vertically(SETTING);
        let summary = format!(
            "{}; {}, {} events/s",
            setting(report),
            counted(report.events, "event"),
            rate(report.events_per_second)
        );
        top.draw_text(&summary, &text(), (0, 0))?;
        let (panel, rest) = rest.split_vertically(LIVE);
        live(&panel, report)?;
        let (panel, rest) = rest.split_vertically(LATENCIES);
        latencies(&panel, report)?;
        histogram(&rest, &report.histogram)
    })
}

/// The time of the recording: its unit, and from where to where it goes in that.
fn recorded(report: &Report) -> (Unit, Range<f64>) {
    let course = &report.course;
    // What a single moment was needs some width.
    let step = course.live_step_nanoseconds.min(course.latency_step_nanoseconds).max(1);
    let longest = course.recorded_nanoseconds.max(step);
    let unit = time_unit(longest);
    (unit, 0.0..longest as f64 / unit.size)
}

/// What was live over time.
pub(super) fn live(area: &Area<'_>, report: &Report) -> Drawn {
    let (unit, times) = recorded(report);
    let course = &report.course;
    let most = course.live.iter().map(|step| step.most_mappings).max().unwrap_or(0).max(FEWEST) as f64;
    let most_bytes = course.live.iter().map(|step| step.most_bytes).max().unwrap_or(0).max(PAGE);
    let bytes = bytes_unit(most_bytes);
    let mappings_line = line(BLUE, 5);
    let bytes_line = line(VERMILION, 5);
    let legend = [
        (Sample::Area(mappings_line, light(BLUE)), "mappings, most and least"),
        (Sample::Dashed(bytes_line), "bytes, most"),
    ];
    heading(area, "Live mappings", &legend)?;

    let mut chart = ChartBuilder::on(area)
        .margin_top(HEADING)
        .x_label_area_size(BELOW)
        .y_label_area_size(BESIDE)
        .right_y_label_area_size(BESIDE)
        .margin_right(8)
        .build_cartesian_2d(times.clone(), 0.0..most * 1.06)?
        .set_secondary_coord(times.clone(), 0.0..most_bytes as f64 / bytes.size * 1.06);
    let means = format!("time in the recording ({})", unit.name);
    let x = Axis { labels: 11, label: &|value| number(*value), means: &means };
    axes(&mut chart, &x, &Axis { labels: 6, label: &|value| count(*value), means: "mappings" })?;
    chart
        .configure_secondary_axes()
        .y_labels(6)
        .y_label_formatter(&|value| number(*value))
        .y_desc(format!("bytes ({})", bytes.name))
        .label_style(text())
        .axis_desc_style(text())
        .axis_style(line(RGBColor(60, 60, 60), 3))
        .set_all_tick_mark_size(10)
        .draw()?;

    // A step holds from its beginning to the next one's, the last to the end.
    let along = |value: &dyn Fn(usize) -> f64| {
        let ends = course.live.iter().skip(1).map(|step| step.begin_nanoseconds as f64 / unit.size);
        let ends = ends.chain([times.end]);
        let begins = course.live.iter().map(|step| step.begin_nanoseconds as f64 / unit.size);
        begins
            .zip(ends)
            .enumerate()
            .flat_map(|(index, (begin, end))| {
                let value = value(index);
                [(begin.min(times.end), value), (end.min(times.end), value)]
            })
            .collect::<Vec<_>>()
    };
    let upper = along(&|index| course.live[index].most_mappings as f64);
    let lower = along(&|index| course.live[index].least_mappings as f64);
    let around: Vec<_> = upper.iter().copied().chain(lower.into_iter().rev()).collect();
    chart.draw_series([Polygon::new(around, light(BLUE))])?;
    chart.draw_series([PathElement::new(upper, mappings_line)])?;
    let moved = along(&|index| course.live[index].most_bytes as f64 / bytes.size);
    chart.draw_secondary_series(DashedLineSeries::new(moved, 16, 11, bytes_line))?;
    Ok(())
}

/// How long calls took over time: a panel for each kind, with one scale.
fn latencies(area: &Area<'_>, report: &Report) -> Drawn {
    let legend = [(Sample::Line(line(BLACK, 7)), "p50"), (Sample::Area(line(BLACK, 3), light(BLACK)), "p99")];
    heading(area, "Latency", &legend)?;
    let (unit, times) = recorded(report);
    let course = &report.course;
    let briefs = course.latency.iter().flat_map(|step| [step.map, step.unmap, step.dma]);
    let (low, high) = decades(briefs.flat_map(|brief| [brief.p50_nanoseconds, brief.p99_nanoseconds]));
    let (_, area) = area.split_vertically(HEADING);
    let (across, _) = area.dim_in_pixel();
    let each = (across - BESIDE) / 3;
    let mut rest = area;
    for (index, kind) in Kind::ALL.into_iter().enumerate() {
        let color = kind.color();
        let labels = if index == 0 { BESIDE } else { 0 };
        let (panel, others) = rest.split_horizontally(each + labels);
        rest = others;
        let panel = named(&panel, kind.name(), labels)?;
        let mut chart = ChartBuilder::on(&panel)
            .margin_right(66)
            .x_label_area_size(BELOW)
            .y_label_area_size(labels)
            .build_cartesian_2d(times.clone(), (low..high).log_scale())?;
        let means = format!("time in the recording ({})", unit.name);
        let x = Axis { labels: 5, label: &|value| number(*value), means: &means };
        axes(
            &mut chart,
            &x,
            &Axis { labels: 6, label: &|value| nanoseconds(*value), means: "time for one" },
        )?;
        for run in runs(&course.latency, course.latency_step_nanoseconds, kind) {
            let along = |value: fn(BriefLatency) -> u64| {
                let ends = run.iter().flat_map(|&(begin, brief)| {
                    let end = begin.saturating_add(course.latency_step_nanoseconds);
                    [begin, end]
                        .map(|at| ((at as f64 / unit.size).min(times.end), (value(brief) as f64).max(low)))
                });
                ends.collect::<Vec<_>>()
            };
            let (p50, p99) = (along(|brief| brief.p50_nanoseconds), along(|brief| brief.p99_nanoseconds));
            let around: Vec<_> = p99.iter().copied().chain(p50.iter().rev().copied()).collect();
            chart.draw_series([Polygon::new(around, light(color))])?;
            chart.draw_series([PathElement::new(p99, line(color, 3))])?;
            chart.draw_series([PathElement::new(p50, line(color, 7))])?;
        }
    }
    Ok(())
}

/// The steps in which there were calls of a kind, in runs without gaps: when each begins, and how long its calls took.
fn runs(steps: &[LatencyStep], length: u64, kind: Kind) -> Vec<Vec<(u64, BriefLatency)>> {
    let mut runs: Vec<Vec<(u64, BriefLatency)>> = Vec::new();
    let known = steps.iter().map(|step| (step.begin_nanoseconds, kind.of(step.map, step.unmap, step.dma)));
    for (begin, brief) in known.filter(|(_, brief)| brief.count > 0) {
        match runs.last_mut() {
            Some(run) if run.last().is_some_and(|(last, _)| last.saturating_add(length) == begin) => {
                run.push((begin, brief));
            }
            _ => runs.push(vec![(begin, brief)]),
        }
    }
    runs
}

/// How many calls took how long.
fn histogram(area: &Area<'_>, bins: &[HistogramBin]) -> Drawn {
    let style = |kind: Kind| line(kind.color(), kind.of(5, 5, 4));
    let count_of = |kind: Kind, bin: &HistogramBin| kind.of(bin.maps, bin.unmaps, bin.dma);
    let sample = |kind: Kind| Sample::Marked(style(kind), kind.is_dashed(), kind.marker());
    let legend = Kind::ALL.map(|kind| (sample(kind), kind.name()));
    heading(area, "Latency histogram", &legend)?;
    let (low, high) = decades(bins.iter().flat_map(|bin| [bin.from_nanoseconds, bin.below_nanoseconds]));
    let most = bins.iter().flat_map(|bin| [bin.maps, bin.unmaps, bin.dma]).max().unwrap_or(0).max(1);
    // Below one call there is nothing, and a logarithmic axis has no zero.
    let (_, top) = decades([most]);
    let none = 0.6;
    let mut chart = ChartBuilder::on(area)
        .margin_top(HEADING)
        .margin_right(60)
        .x_label_area_size(BELOW)
        .y_label_area_size(BESIDE)
        .build_cartesian_2d((low..high).log_scale(), (none..top).log_scale())?;
    let x = Axis { labels: 9, label: &|value| nanoseconds(*value), means: "time for one" };
    axes(&mut chart, &x, &Axis { labels: 8, label: &|value| count(*value), means: "calls" })?;
    // Charts and areas count from their own corners, but `map_coordinate` from the figure's.
    let paper = area.use_screen_coord();
    for kind in Kind::ALL {
        let (style, count_of) = (style(kind), |bin: &HistogramBin| count_of(kind, bin));
        let middle = |bin: &HistogramBin| (bin.from_nanoseconds as f64 * bin.below_nanoseconds as f64).sqrt();
        let point = |bin: &HistogramBin| {
            let point = (middle(bin), (count_of(bin) as f64).max(none));
            chart.plotting_area().map_coordinate(&point)
        };
        // Where there are several bins without calls, there is no line.
        let is_near = |index: &usize| {
            let near = &bins[index.saturating_sub(1)..bins.len().min(index + 2)];
            near.iter().any(|bin| count_of(bin) > 0)
        };
        let near: Vec<usize> = (0..bins.len()).filter(is_near).collect();
        for run in near.chunk_by(|one, next| one + 1 == *next) {
            let line: Vec<_> = run.iter().map(|index| point(&bins[*index])).collect();
            if kind.is_dashed() {
                dashed(&paper, &line, style)?;
            } else {
                paper.draw(&PathElement::new(line, style))?;
            }
        }
        for bin in bins.iter().filter(|bin| count_of(bin) > 0) {
            kind.marker().draw(&paper, point(bin), style)?;
        }
    }
    Ok(())
}
