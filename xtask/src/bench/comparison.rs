//! Our rows beside those of the peers, and whether the goals hold.

use super::rows::{self, Measurements, Summary};

/// The goals, as ratios of ours to the fastest peer's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// What is measured, with its unit.
    pub(crate) unit: &'static str,
    /// The first line before rows of ours alone.
    pub(crate) header: &'static str,
    each_row: f64,
    mean: Option<f64>,
}

impl Limits {
    pub(crate) const TIMES: Limits =
        Limits { unit: "ns per call", header: rows::TIMES_HEADER, each_row: 1.05, mean: Some(0.50) };
    /// Never more; the small excess is what rounding may add.
    pub(crate) const TABLES: Limits = Limits {
        unit: "table pages per call",
        header: "format,op,table_pages_per_call",
        each_row: 1.0001,
        mean: None,
    };
}

/// A row of everybody who has it.
#[derive(Debug, serde::Serialize)]
pub(crate) struct ComparedRow {
    pub(crate) format: String,
    pub(crate) op: String,
    pub(crate) ours: Summary,
    /// In the order of the peers' names.
    pub(crate) peers: Vec<Option<Summary>>,
    /// Which peer is the fastest.
    pub(crate) fastest: Option<usize>,
    /// Ours to that one's. None: no peer has the row.
    pub(crate) ratio: Option<f64>,
}

impl ComparedRow {
    /// Some rows tell how the programs find the machine, and are nobody's achievement.
    fn is_judged(&self) -> bool {
        self.format != "machine"
    }

    /// Look-ups wait for memory, and tables of which each change has to be flushed for the CPU's caches: too alike
    /// everywhere to be part of a mean.
    fn is_in_mean(&self) -> bool {
        self.is_judged() && !self.op.starts_with("iova_to_phys_rand_") && !self.format.ends_with("_nc")
    }
}

/// Whether a goal was reached.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Goal {
    pub(crate) what: &'static str,
    pub(crate) limit: f64,
    /// Of the worst row, or the mean.
    pub(crate) value: f64,
    /// How many rows there are.
    pub(crate) rows: usize,
    /// How many of them are beyond the limit, where it is one for each.
    pub(crate) missed_by: Option<usize>,
    pub(crate) held: bool,
}

/// All rows.
#[derive(Debug)]
pub(crate) struct Comparison {
    pub(crate) limits: Limits,
    pub(crate) peers: Vec<String>,
    pub(crate) rows: Vec<ComparedRow>,
    /// `format,op` of the rows that a peer has and we do not.
    pub(crate) without_us: Vec<String>,
}

impl Comparison {
    pub(crate) fn new(ours: &Measurements, theirs: &[(String, Measurements)], limits: Limits) -> Comparison {
        let mut without_us = Vec::new();
        for (_, measurements) in theirs {
            for (row, _) in measurements.summaries().filter(|(row, _)| row.format != "machine") {
                let name = format!("{},{}", row.format, row.op);
                if ours.summary(&row.format, &row.op).is_none() && !without_us.contains(&name) {
                    without_us.push(name);
                }
            }
        }
        let rows = ours.summaries().map(|(row, ours)| {
            let peers: Vec<_> =
                theirs.iter().map(|(_, measurements)| measurements.summary(&row.format, &row.op)).collect();
            let times =
                peers.iter().enumerate().filter_map(|(peer, summary)| Some((peer, summary.as_ref()?.median)));
            let fastest = times.min_by(|(_, one), (_, other)| one.total_cmp(other));
            // Nothing of either is as good as equal; something over nothing is infinitely worse.
            let ratio =
                fastest.map(|(_, theirs)| if ours.median == theirs { 1.0 } else { ours.median / theirs });
            ComparedRow {
                format: row.format.clone(),
                op: row.op.clone(),
                ours,
                peers,
                fastest: fastest.map(|(peer, _)| peer),
                ratio,
            }
        });
        let rows = rows.collect();
        Comparison { limits, peers: theirs.iter().map(|(name, _)| name.clone()).collect(), rows, without_us }
    }

    /// Ratios that count, with their rows.
    fn judged(&self) -> impl Iterator<Item = (&ComparedRow, f64)> {
        self.rows.iter().filter(|row| row.is_judged()).filter_map(|row| Some((row, row.ratio?)))
    }

    /// Whether a row is beyond the limit for each.
    pub(crate) fn is_beyond(&self, row: &ComparedRow) -> bool {
        row.is_judged() && row.ratio.is_some_and(|ratio| ratio > self.limits.each_row)
    }

    /// The row in which we do worst.
    pub(crate) fn worst(&self) -> Option<&ComparedRow> {
        self.judged().max_by(|(_, one), (_, other)| one.total_cmp(other)).map(|(row, _)| row)
    }

    /// The goals that these rows can tell something about.
    pub(crate) fn goals(&self) -> Vec<Goal> {
        let mut goals = Vec::new();
        if let Some(value) = self.worst().and_then(|row| row.ratio) {
            let rows = self.judged().count();
            let missed_by = self.judged().filter(|(row, _)| self.is_beyond(row)).count();
            let (limit, held) = (self.limits.each_row, missed_by == 0);
            goals.push(Goal { what: "each row", limit, value, rows, missed_by: Some(missed_by), held });
        }
        let logarithms: Vec<_> =
            self.judged().filter(|(row, _)| row.is_in_mean()).map(|(_, ratio)| ratio.ln()).collect();
        if let (Some(limit), false) = (self.limits.mean, logarithms.is_empty()) {
            let rows = logarithms.len();
            let value = (logarithms.iter().sum::<f64>() / rows as f64).exp();
            let held = value <= limit;
            goals.push(Goal { what: "geometric mean", limit, value, rows, missed_by: None, held });
        }
        goals
    }

    /// Claiming mode beside the exclusive one, for operations of the native format: name, times, ratio.
    pub(crate) fn claiming(&self) -> Vec<(&str, f64, f64)> {
        let find = |format: &str, op: &str| self.rows.iter().find(|row| row.format == format && row.op == op);
        let claimed = self.rows.iter().filter(|row| row.format == "native_claimed" && row.is_in_mean());
        claimed
            .filter_map(|row| Some((row.op.as_str(), find("native", &row.op)?.ours.median, row.ours.median)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::Row;
    use super::*;

    fn measurements(rows: &[(&str, &str, f64)]) -> Measurements {
        let mut measurements = Measurements::default();
        let rows = rows.iter().map(|&(format, op, value)| Row {
            format: format.to_owned(),
            op: op.to_owned(),
            value,
            pages: 1.0,
        });
        measurements.add(rows.collect());
        measurements
    }

    #[test]
    fn the_faster_peer_counts() {
        let slow = measurements(&[("vtdss", "map_1x4K", 20.0), ("vtdss", "dirty", 1.0)]);
        let fast = measurements(&[("vtdss", "map_1x4K", 10.0)]);
        let ours = measurements(&[("vtdss", "map_1x4K", 10.6), ("native", "map_1x4K", 5.0)]);
        let comparison = Comparison::new(&ours, &[("a".into(), slow), ("b".into(), fast)], Limits::TIMES);
        assert_eq!(comparison.rows[0].fastest, Some(1));
        assert!(comparison.is_beyond(&comparison.rows[0]));
        assert_eq!(comparison.rows[1].ratio, None);
        assert_eq!(comparison.without_us, ["vtdss,dirty"]);
        assert_eq!(comparison.worst().map(|row| row.format.as_str()), Some("vtdss"));
    }

    #[test]
    fn goals_leave_out_what_they_should() {
        let rows = |values: [f64; 5]| {
            let names = [
                ("vtdss", "map_1x4K"),
                ("vtdss", "unmap_1x4K"),
                ("vtdss", "iova_to_phys_rand_1Mx4K"),
                ("vtdss_nc", "map_1x4K"),
                ("machine", "table_alloc_zero_free"),
            ];
            let rows: Vec<_> =
                names.iter().zip(values).map(|(&(format, op), value)| (format, op, value)).collect();
            measurements(&rows)
        };
        let peer = || vec![("peer".to_owned(), rows([1.0; 5]))];
        let goals = Comparison::new(&rows([0.25, 1.0, 1.0, 1.0, 9.0]), &peer(), Limits::TIMES).goals();
        assert!(goals.iter().all(|goal| goal.held));
        assert_eq!((goals[1].value, goals[1].rows), (0.5, 2));
        // A look-up counts where it is alone.
        let goals = Comparison::new(&rows([0.1, 0.1, 1.1, 1.0, 1.0]), &peer(), Limits::TIMES).goals();
        assert_eq!((goals[0].held, goals[0].missed_by, goals[0].rows), (false, Some(1), 4));
        assert!(goals[1].held);
    }

    #[test]
    fn no_table_pages_are_as_good_as_none() {
        let peer = || vec![("peer".to_owned(), measurements(&[("vtdss", "a", 0.0), ("vtdss", "b", 513.0)]))];
        let same = measurements(&[("vtdss", "a", 0.0), ("vtdss", "b", 513.0)]);
        assert!(Comparison::new(&same, &peer(), Limits::TABLES).goals().iter().all(|goal| goal.held));
        let more = measurements(&[("vtdss", "a", 0.25), ("vtdss", "b", 513.0)]);
        assert!(!Comparison::new(&more, &peer(), Limits::TABLES).goals()[0].held);
    }
}
