//! Several replays side by side: for each trace what was live, which all of them have in common, and below it a row for each.

use std::collections::HashSet;

use ioasid_replay::Latency;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::detail;
use super::page::{
    Area, Axis, BELOW, Drawn, GREY, HEADING, Kind, Marker, NAME, Sample, axes, bold, figure, fitting,
    heading, line, named, text,
};
use super::scale::{around, count, nanoseconds};
use crate::replay::comparison::Row;

/// How high a row is.
const ROW: u32 = 56;
/// How high the panel of what is live is, with its heading and its axis.
const LIVE: u32 = 460;
/// How wide the names of the rows are: so many letters at most.
const NAMES: u32 = 290;
const LETTERS: usize = 17;
/// The line that names a trace.
const TRACE: u32 = 60;
/// Below a trace.
const GAP: u32 = 50;
/// At the left and the right of a column, so that the labels of two axes do not meet.
const LEFT: u32 = 36;
const RIGHT: u32 = 58;

/// Draws rows, which are together if they are of the same trace.
///
/// # Errors
/// The library refuses to draw, which it has no reason to.
pub(crate) fn draw(title: &str, rows: &[Row<'_>]) -> anyhow::Result<String> {
    let mut seen = HashSet::new();
    let traces: Vec<&str> = rows.iter().map(|row| row.trace).filter(|trace| seen.insert(*trace)).collect();
    let sections: Vec<(&str, Vec<&Row<'_>>)> = traces
        .into_iter()
        .map(|trace| (trace, rows.iter().filter(|row| row.trace == trace).collect()))
        .collect();
    let height_of = |rows: usize| {
        let rows = ROW.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX));
        (TRACE + LIVE + HEADING + NAME + BELOW + GAP).saturating_add(rows)
    };
    let height = sections.iter().map(|(_, rows)| height_of(rows.len())).fold(0, u32::saturating_add);
    figure(title, height, |page| {
        let mut rest = page.clone();
        for (trace, rows) in &sections {
            let (area, below) = rest.split_vertically(height_of(rows.len()));
            section(&area, trace, rows)?;
            rest = below;
        }
        Ok(())
    })
}

fn section(area: &Area<'_>, trace: &str, rows: &[&Row<'_>]) -> Drawn {
    area.draw_text(&fitting(trace, 95), &bold(), (0, 0))?;
    let (_, rest) = area.split_vertically(TRACE);
    let (panel, rest) = rest.split_vertically(LIVE);
    if let Some(row) = rows.first() {
        detail::live(&panel, row.report)?;
    }
    let (across, down) = rest.dim_in_pixel();
    let (rest, _) = rest.split_vertically(down - GAP);
    let legend = [
        (Sample::Marker(line(BLACK, 5), Marker::Disc), "p50"),
        (Sample::Marker(line(BLACK, 5), Marker::Tick), "p99"),
        (Sample::Marker(line(BLACK, 5), Marker::Circle), "p99.9"),
        (Sample::Bar(line(BLACK, 3), BLACK.mix(0.45).filled()), "map, unmap"),
        (Sample::Bar(line(BLACK, 3), WHITE.filled()), "events"),
    ];
    heading(&rest, "Latency and throughput", &legend)?;
    let (_, rest) = rest.split_vertically(HEADING);
    let (names, rest) = rest.split_horizontally(NAMES);
    for (index, row) in (0..).zip(rows) {
        let middle = NAME as i32 + index * ROW as i32 + ROW as i32 / 2;
        let style = text().pos(Pos::new(HPos::Left, VPos::Center));
        names.draw_text(&fitting(&row.label, LETTERS), &style, (0, middle))?;
    }
    let each = (across - NAMES) / 4;
    let mut rest = rest;
    for kind in Kind::ALL {
        let (column, others) = rest.split_horizontally(each);
        let rows = rows.iter().map(|row| kind.of(row.report.map, row.report.unmap, row.report.dma));
        latencies(&column, kind, &rows.collect::<Vec<_>>())?;
        rest = others;
    }
    throughput(&rest, rows)
}

/// The middle of a row on an axis that goes down.
fn middle(index: usize) -> f64 {
    index as f64 + 0.5
}

/// Every other row is grey, so that the eye finds its way to the name.
fn stripes(rows: usize, low: f64, high: f64) -> impl Iterator<Item = Rectangle<(f64, f64)>> {
    let odd = (0..rows).filter(|index| index % 2 == 0);
    odd.map(move |index| {
        Rectangle::new([(low, index as f64), (high, index as f64 + 1.0)], GREY.mix(0.6).filled())
    })
}

fn latencies(area: &Area<'_>, kind: Kind, rows: &[Latency]) -> Drawn {
    let color = kind.color();
    let area = named(area, kind.name(), LEFT)?;
    let values =
        |latency: &Latency| [latency.p50_nanoseconds, latency.p99_nanoseconds, latency.p999_nanoseconds];
    let (low, high) = around(rows.iter().flat_map(values));
    let mut chart = ChartBuilder::on(&area)
        .margin_left(LEFT)
        .margin_right(RIGHT)
        .x_label_area_size(BELOW)
        .build_cartesian_2d((low..high).log_scale(), rows.len() as f64..0.0)?;
    chart.draw_series(stripes(rows.len(), low, high))?;
    let x = Axis { labels: 2, label: &|value| nanoseconds(*value), means: "time for one" };
    axes(&mut chart, &x, &Axis { labels: 0, label: &|_| String::new(), means: "" })?;
    let paper = area.use_screen_coord();
    for (index, latency) in rows.iter().enumerate().filter(|(_, latency)| latency.count > 0) {
        let at = values(latency)
            .map(|value| chart.plotting_area().map_coordinate(&((value as f64).max(low), middle(index))));
        let [p50, p99, p999] = at;
        paper.draw(&PathElement::new([p50, p999], line(color, 3)))?;
        paper.draw(&PathElement::new([p50, p99], line(color, 9)))?;
        Marker::Circle.draw(&paper, p999, line(color, 4))?;
        Marker::Tick.draw(&paper, p99, line(color, 6))?;
        Marker::Disc.draw(&paper, p50, line(color, 4))?;
    }
    Ok(())
}

fn throughput(area: &Area<'_>, rows: &[&Row<'_>]) -> Drawn {
    let area = named(area, "throughput", LEFT)?;
    let rates = rows.iter().flat_map(|row| [row.report.calls_per_second, row.report.events_per_second]);
    // No machine does more, and ticks are counted with so many.
    let most = rates.fold(1.0, f64::max).min(1e15) * 1.06;
    let mut chart = ChartBuilder::on(&area)
        .margin_left(LEFT)
        .margin_right(RIGHT)
        .x_label_area_size(BELOW)
        .build_cartesian_2d(0.0..most, rows.len() as f64..0.0)?;
    chart.draw_series(stripes(rows.len(), 0.0, most))?;
    let x = Axis { labels: 3, label: &|value| count(*value), means: "per second" };
    axes(&mut chart, &x, &Axis { labels: 0, label: &|_| String::new(), means: "" })?;
    for (index, row) in rows.iter().enumerate() {
        let bar = |up: f64, down: f64, rate: f64, fill: ShapeStyle| {
            let corners = [(0.0, index as f64 + up), (rate.min(most), index as f64 + down)];
            [Rectangle::new(corners, fill), Rectangle::new(corners, line(BLACK, 3))]
        };
        chart.draw_series(bar(0.14, 0.5, row.report.calls_per_second, BLACK.mix(0.45).filled()))?;
        chart.draw_series(bar(0.5, 0.86, row.report.events_per_second, WHITE.filled()))?;
    }
    Ok(())
}
