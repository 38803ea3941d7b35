//! The lines that benchmarks print, and what several rounds of them come to.
//!
//! A row is `format,op,ns_per_call,ns_per_page`. Lines with `#` in front say other things: of those we read
//! `#allocated` (ours) and `#stat` with `tables_per_call` (the peers') for table pages, and `#two_threads` (ours).

use anyhow::{Context, Result, bail};

/// One measured value: nanoseconds per call, or table pages per call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) format: String,
    pub(crate) op: String,
    pub(crate) value: f64,
    /// What a call comes to for each page that it maps; for times alone.
    pub(crate) pages: f64,
}

/// Two threads, each with half of the calls, in calls per microsecond of both together.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub(crate) struct TwoThreads {
    pub(crate) format: String,
    pub(crate) op: String,
    pub(crate) one_table: f64,
    pub(crate) two_tables: f64,
    /// One thread by itself.
    pub(crate) alone: f64,
    /// One table to two: the median over pairs of samples.
    pub(crate) ratio: f64,
}

impl TwoThreads {
    /// What one table is to give, of what two give.
    pub(crate) const LEAST: f64 = 0.90;

    pub(crate) fn held(&self) -> bool {
        self.ratio >= TwoThreads::LEAST
    }
}

/// The line before rows of times.
pub(crate) const TIMES_HEADER: &str = "format,op,ns_per_call,ns_per_page";

/// The rows of a benchmark's output.
pub(crate) fn times(output: &str) -> Result<Vec<Row>> {
    let lines = output.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut rows = Vec::new();
    for line in lines.filter(|line| *line != TIMES_HEADER) {
        let fields: Vec<_> = line.split(',').collect();
        let [format, op, per_call, per_page] = fields[..] else { bail!("{line:?} is no row") };
        let [value, per_page] = [number(per_call, line)?, number(per_page, line)?];
        // To the nearest: both are rounded, and many rows are of one page.
        let pages = if per_page > 0.0 { (value / per_page).round().max(1.0) } else { 1.0 };
        rows.push(Row { format: format.to_owned(), op: op.to_owned(), value, pages });
    }
    Ok(rows)
}

/// Table pages per call, as we print them.
pub(crate) fn our_tables(output: &str) -> Result<Vec<Row>> {
    let lines = output.lines().filter_map(|line| Some((line, line.strip_prefix("#allocated,")?)));
    lines
        .map(|(line, fields)| {
            let fields: Vec<_> = fields.split(',').collect();
            let [format, op, tables] = fields[..] else { bail!("{line:?} says nothing of table pages") };
            table_row(format, op, tables, line)
        })
        .collect()
}

/// Table pages per call, as the peers print them.
pub(crate) fn peer_tables(output: &str) -> Result<Vec<Row>> {
    let lines = output.lines().filter_map(|line| Some((line, line.strip_prefix("#stat,")?)));
    lines
        .map(|(line, fields)| {
            let mut fields = fields.split(',');
            let (Some(format), Some(op)) = (fields.next(), fields.next()) else {
                bail!("{line:?} names no row")
            };
            let tables = fields
                .find_map(|field| field.strip_prefix("tables_per_call="))
                .with_context(|| format!("{line:?} says nothing of table pages"))?;
            table_row(format, op, tables, line)
        })
        .collect()
}

/// The comparisons of two threads.
pub(crate) fn two_threads(output: &str) -> Result<Vec<TwoThreads>> {
    let lines = output.lines().filter_map(|line| Some((line, line.strip_prefix("#two_threads,")?)));
    lines
        .map(|(line, fields)| {
            let fields: Vec<_> = fields.split(',').collect();
            let [format, op, one, two, alone, ratio] = fields[..] else {
                bail!("{line:?} does not compare threads")
            };
            let (format, op) = (format.to_owned(), op.to_owned());
            let [one_table, two_tables, alone, ratio] =
                [one, two, alone, ratio].map(|field| number(field, line));
            Ok(TwoThreads {
                format,
                op,
                one_table: one_table?,
                two_tables: two_tables?,
                alone: alone?,
                ratio: ratio?,
            })
        })
        .collect()
}

fn table_row(format: &str, op: &str, tables: &str, line: &str) -> Result<Row> {
    Ok(Row { format: format.to_owned(), op: op.to_owned(), value: number(tables, line)?, pages: 1.0 })
}

fn number(text: &str, line: &str) -> Result<f64> {
    match text.parse() {
        Ok(number) if f64::is_finite(number) => Ok(number),
        _ => bail!("{text:?} is no number, in {line:?}"),
    }
}

/// What one program measured, over all rounds; in the order in which it was first told.
#[derive(Debug, Default)]
pub(crate) struct Measurements(Vec<(Row, Vec<f64>)>);

impl Measurements {
    /// Adds a round.
    pub(crate) fn add(&mut self, rows: Vec<Row>) {
        for row in rows {
            match self.0.iter_mut().find(|(known, _)| known.format == row.format && known.op == row.op) {
                Some((_, values)) => values.push(row.value),
                None => {
                    let values = vec![row.value];
                    self.0.push((row, values));
                }
            }
        }
    }

    pub(crate) fn has_format(&self, format: &str) -> bool {
        self.0.iter().any(|(row, _)| row.format == format)
    }

    /// Each row with its summary.
    pub(crate) fn summaries(&self) -> impl Iterator<Item = (&Row, Summary)> {
        self.0.iter().map(|(row, values)| (row, Summary::of(values, row.pages)))
    }

    pub(crate) fn summary(&self, format: &str, op: &str) -> Option<Summary> {
        self.summaries().find(|(row, _)| row.format == format && row.op == op).map(|(_, summary)| summary)
    }
}

/// What the rounds of one row come to.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
    /// The median for each page that a call maps.
    pub(crate) per_page: f64,
}

impl Summary {
    /// Of at least one value.
    fn of(values: &[f64], pages: f64) -> Summary {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Summary { median, lowest: sorted[0], highest: sorted[sorted.len() - 1], per_page: median / pages }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_other_lines_passed_over() {
        let output = "#check,all formats pass\nformat,op,ns_per_call,ns_per_page\n\
                      vtdss,map_256x4K,512.00,2.000\n#total,freed=3\n";
        let row = Row { format: "vtdss".into(), op: "map_256x4K".into(), value: 512.0, pages: 256.0 };
        assert_eq!(times(output).unwrap(), [row]);
        assert!(times("vtdss,map_1x4K,fast,1").is_err());
        assert!(times("vtdss,map_1x4K,inf,1").is_err());
        assert!(times("Segmentation fault").is_err());
    }

    #[test]
    fn table_pages_are_read_from_either_side() {
        let stat =
            "#stat,amdv1,map_1G_as_4K,fastest_pass=1.0,rounds=1,tables_per_call=513.0000,syncs_per_call=0.00";
        assert_eq!(peer_tables(stat).unwrap(), our_tables("#allocated,amdv1,map_1G_as_4K,513.0000").unwrap());
        assert!(peer_tables("#stat,amdv1,map_1G_as_4K,rounds=1").is_err());
    }

    #[test]
    fn rounds_come_to_their_median() {
        let mut measurements = Measurements::default();
        for value in [9.0, 1.0, 2.0, 100.0] {
            measurements.add(vec![Row { format: "f".into(), op: "o".into(), value, pages: 2.0 }]);
        }
        let summary = measurements.summary("f", "o").unwrap();
        assert_eq!(summary, Summary { median: 5.5, lowest: 1.0, highest: 100.0, per_page: 2.75 });
        assert!(measurements.has_format("f") && measurements.summary("f", "other").is_none());
    }

    #[test]
    fn threads_are_compared_by_their_throughput() {
        let pairs = two_threads("#two_threads,native,mapunmap_1x4K,45.00,50.00,26.00,0.900").unwrap();
        assert!(pairs[0].held());
        assert!(!two_threads("#two_threads,native,mapunmap_1x4K,44.00,50.00,26.00,0.880").unwrap()[0].held());
    }
}
