//! The engine's benchmark (`crates/soft/benches/engine.rs`): what it measures in several runs, and the goals.
//!
//! Ours and the peers are measured by one program, one after the other, so every run gives ratios of its own; what is
//! judged is the median over the runs.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{programs, progress};
use crate::command;

#[derive(Debug, clap::Args)]
pub(crate) struct Engine {
    /// Only this group of measurements; repeatable [default: all]
    #[arg(long = "group", value_name = "GROUP", value_parser = ["translate", "map", "register", "threads", "copy", "memory"])]
    groups: Vec<String>,

    /// How often the program is run
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,

    /// Print one JSON object
    #[arg(long, conflicts_with = "markdown")]
    json: bool,

    /// Print the goals as a Markdown table: ours, the peer's, the ratio
    #[arg(long)]
    markdown: bool,

    /// Fail if a goal is missed
    #[arg(long)]
    check: bool,
}

pub(crate) const GUIDE: &str = "\
The peers are what programs use today: vm-memory's IOTLB, a BTreeMap behind a readers-writer lock, a two-level array \
without permissions. A goal is a limit to our value, or to a ratio of ours and a peer's.

Examples:
  cargo xtask bench engine
  cargo xtask bench engine --group translate --rounds 5
  cargo xtask bench engine --markdown
  cargo xtask bench engine --check --json";

/// What is to be reached.
#[derive(Debug, Clone, Copy)]
enum Goal {
    /// Our value is at most this.
    AtMost(f64),
    /// Our value is at least this.
    AtLeast(f64),
    /// Our value is at most this many of the peer's.
    TimesPeer(&'static str, f64),
    /// The peer's value is at least this many of ours.
    Faster(&'static str, f64),
}

const GOALS: &[(&str, Goal)] = &[
    ("translate_random_1M", Goal::Faster("vm-memory", 10.0)),
    ("translate_random_1M", Goal::Faster("btree", 5.0)),
    ("translate_random_1M", Goal::TimesPeer("array", 2.5)),
    ("translate_random_1M_dependent", Goal::Faster("vm-memory", 10.0)),
    ("translate_random_1M_dependent", Goal::Faster("btree", 5.0)),
    ("translate_random_1M_dependent", Goal::TimesPeer("array", 1.2)),
    ("translate_hot", Goal::AtMost(8.0)),
    ("map_unmap_4K_deferred_one_derived", Goal::TimesPeer("page tables", 3.0)),
    ("map_unmap_4K_strict_busy_batch_64", Goal::AtMost(2000.0)),
    ("map_1T_as_1G", Goal::AtMost(5000.0)),
    ("register_map_1M_in_order", Goal::AtMost(200.0)),
    ("register_map_1M_random", Goal::TimesPeer("btree", 1.3)),
    ("one_space_to_two_no_table_ratio", Goal::AtLeast(0.9)),
    ("one_space_to_two_with_tables_ratio", Goal::AtLeast(0.9)),
    ("one_space_to_two_deferred_ratio", Goal::AtLeast(0.9)),
    ("dma_beside_mapping_to_alone_ratio", Goal::AtLeast(0.9)),
    ("dma_beside_deferred_mapping_to_alone_ratio", Goal::AtLeast(0.9)),
    ("dma_64B_hot", Goal::AtMost(25.0)),
    ("dma_1M", Goal::TimesPeer("memcpy", 1.0 / 0.95)),
    ("dense_1M_native_bytes", Goal::AtMost(8.3)),
    ("dense_1M_one_derived_bytes", Goal::AtMost(16.6)),
    ("one_page_per_2M_bytes", Goal::AtMost(4.3 * 1024.0)),
    ("empty_space_bytes", Goal::AtMost(1024.0)),
];

/// A goal and what came of it.
#[derive(Debug, serde::Serialize)]
struct Outcome {
    op: &'static str,
    /// What we measured, and the peer that the goal names with what it did.
    ours: f64,
    peer: Option<(&'static str, f64)>,
    what: String,
    value: f64,
    held: bool,
}

/// Who measured what: the median over the runs, by operation in the order of the program, and by name.
#[derive(Debug, Default)]
struct Measured {
    operations: Vec<String>,
    values: BTreeMap<(String, String), Vec<f64>>,
}

impl Measured {
    fn add(&mut self, output: &str) -> Result<()> {
        for line in output.lines() {
            let fields: Vec<_> = line.split(',').collect();
            let [op, who, value] = fields[..] else { bail!("{line:?} is no row") };
            let value: f64 = value.parse().with_context(|| format!("{line:?} has no value"))?;
            if !self.operations.iter().any(|known| known == op) {
                self.operations.push(op.to_owned());
            }
            self.values.entry((op.to_owned(), who.to_owned())).or_default().push(value);
        }
        Ok(())
    }

    fn value(&self, op: &str, who: &str) -> Option<f64> {
        let mut values = self.values.get(&(op.to_owned(), who.to_owned()))?.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    fn peers<'a>(&'a self, op: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        let names = self.values.keys().filter(move |(known, who)| known == op && who != "ioasid");
        names.filter_map(move |(_, who)| Some((who.as_str(), self.value(op, who)?)))
    }

    /// The goals that something is known about.
    fn outcomes(&self) -> Vec<Outcome> {
        let outcome = |&(op, goal): &(&'static str, Goal)| {
            let ours = self.value(op, "ioasid")?;
            let peer = |who: &str| self.value(op, who);
            let (peer, what, value, held) = match goal {
                Goal::AtMost(limit) => (None, format!("at most {limit}"), ours, ours <= limit),
                Goal::AtLeast(limit) => (None, format!("at least {limit}"), ours, ours >= limit),
                Goal::TimesPeer(who, limit) => {
                    let (peer, ratio) = (peer(who)?, ours / peer(who)?);
                    (Some((who, peer)), format!("at most {limit:.2} of {who}"), ratio, ratio <= limit)
                }
                Goal::Faster(who, limit) => {
                    let (peer, ratio) = (peer(who)?, peer(who)? / ours);
                    (Some((who, peer)), format!("{who} at least {limit} times"), ratio, ratio >= limit)
                }
            };
            Some(Outcome { op, ours, peer, what, value, held })
        };
        GOALS.iter().filter_map(outcome).collect()
    }
}

pub(crate) fn run(arguments: &Engine) -> Result<()> {
    let program = programs::build("ioasid-soft", "engine")?;
    let groups =
        if arguments.groups.is_empty() { vec![None] } else { arguments.groups.iter().map(Some).collect() };
    let bar = progress(u64::from(arguments.rounds) * groups.len() as u64);
    let mut measured = Measured::default();
    for _ in 0..arguments.rounds {
        for group in &groups {
            bar.set_message(group.map_or("all groups".to_owned(), Clone::clone));
            let mut command = std::process::Command::new(&program);
            measured.add(&command::output(command.arg("--bench").args(*group))?)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let outcomes = measured.outcomes();
    if arguments.json {
        json(&measured, &outcomes, arguments.rounds)?;
    } else if arguments.markdown {
        print!("{}", markdown(&outcomes));
    } else {
        table(&measured, &outcomes);
    }
    if arguments.check && outcomes.iter().any(|outcome| !outcome.held) {
        bail!("a goal was missed");
    }
    Ok(())
}

fn table(measured: &Measured, outcomes: &[Outcome]) {
    println!("{:<38} {:>12}  others", "operation", "ioasid");
    for op in &measured.operations {
        let ours = measured.value(op, "ioasid").map_or("-".to_owned(), |value| format!("{value:.2}"));
        print!("{op:<38} {ours:>12} ");
        for (who, value) in measured.peers(op) {
            print!(" {who} {value:.2}");
        }
        println!();
    }
    println!("(nanoseconds where the name says nothing else)\n");
    for Outcome { op, what, value, held, .. } in outcomes {
        println!("{}  {op}: {what}, is {value:.2}", if *held { "held  " } else { "missed" });
    }
}

/// The goals, for a document.
fn markdown(outcomes: &[Outcome]) -> String {
    let mut text = "| operation | ioasid | beside | ratio | goal | |\n|---|---|---|---|---|---|\n".to_owned();
    for Outcome { op, ours, peer, what, value, held } in outcomes {
        let (peer, ratio) = match peer {
            Some((who, peer)) => (format!("{who} {peer:.2}"), format!("{value:.2}")),
            None => (String::new(), String::new()),
        };
        let held = if *held { "held" } else { "**missed**" };
        text += &format!("| `{op}` | {ours:.2} | {peer} | {ratio} | {what} | {held} |\n");
    }
    text
}

fn json(measured: &Measured, outcomes: &[Outcome], rounds: u32) -> Result<()> {
    let rows: Vec<_> = measured
        .operations
        .iter()
        .map(|op| {
            let peers: BTreeMap<_, _> = measured.peers(op).collect();
            json!({ "op": op, "ioasid": measured.value(op, "ioasid"), "peers": peers })
        })
        .collect();
    println!(
        "{}",
        serde_json::to_string_pretty(&json!({ "rounds": rounds, "rows": rows, "goals": outcomes }))?
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the README shows of a table is in docs/benchmarks.md, word for word.
    #[test]
    fn the_readme_has_rows_of_the_benchmarks() {
        let rows = |text: &'static str| text.lines().filter(|line| line.starts_with('|')).collect::<Vec<_>>();
        let known = rows(include_str!("../../../docs/benchmarks.md"));
        let shown = rows(include_str!("../../../README.md"));
        assert!(shown.len() >= 5, "{shown:?}");
        for row in shown {
            assert!(known.contains(&row), "not in docs/benchmarks.md: {row}");
        }
    }

    #[test]
    fn goals_are_judged_by_medians() {
        let mut measured = Measured::default();
        for ours in ["10", "1000", "11"] {
            measured
                .add(&format!("translate_random_1M,ioasid,{ours}\ntranslate_random_1M,btree,56\n"))
                .unwrap();
        }
        measured.add("dma_64B_hot,ioasid,26").unwrap();
        let outcomes = measured.outcomes();
        let held: Vec<_> = outcomes.iter().map(|outcome| (outcome.op, outcome.held)).collect();
        assert_eq!(held, [("translate_random_1M", true), ("dma_64B_hot", false)]);
        assert!((outcomes[0].value - 56.0 / 11.0).abs() < 1e-9);
        let table = markdown(&outcomes);
        let rows: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| `translate_random_1M` | 11.00 | btree 56.00 | 5.09 | btree at least 5 times | held |",
                "| `dma_64B_hot` | 26.00 |  |  | at most 25 | **missed** |",
            ]
        );
        assert!(measured.add("nonsense").is_err() && measured.add("a,b,c").is_err());
    }
}
