//! Results for people and for programs.

use anyhow::{Result, bail};
use serde_json::json;

use super::{
    comparison::Counts,
    operations::Operation,
    work::{Failure, Work},
};

/// Prints what was compared and what differs. An error if anything does.
pub(crate) fn print(work: &Work, seconds: f64, as_json: bool) -> Result<()> {
    if !as_json {
        println!("{HEADINGS}");
    }
    let mut sum = Counts::default();
    let mut rows = Vec::new();
    let mut failed = 0;
    for (index, table) in work.tables.iter().enumerate() {
        let outcome = work.outcome(index);
        sum.add(&outcome.counts);
        failed += usize::from(outcome.failure.is_some());
        if as_json {
            let failure = outcome.failure.as_ref().map(|failure| {
                let operations: Vec<_> = failure.operations.iter().map(Operation::to_string).collect();
                json!({ "number": failure.number, "operations": operations, "what": failure.difference.what })
            });
            rows.push(json!({ "table": table.name(), "counts": outcome.counts, "failure": failure }));
            continue;
        }
        println!("{}", line(table.name(), &outcome.counts));
        if let Some(failure) = &outcome.failure {
            show_failure(work.seed, table.name(), failure);
        }
    }
    if as_json {
        let all = json!({ "seed": work.seed, "seconds": seconds, "tables": rows, "sum": sum });
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        println!("{}", line("all", &sum));
        println!("{EXPLANATION}");
        println!("{seconds:.1} s");
    }
    if failed > 0 {
        bail!("{failed} tables differ from the kernel's");
    }
    Ok(())
}

const HEADINGS: &str = "\
table          sequences operations  refused overlooked  breaks    walks harvests    alike    entries  tables    theirs";

const EXPLANATION: &str = "\
refused: mappings that neither side made; overlooked: of those, the ones that the kernel would have made, wrongly
breaks: leaves that had to be absent to be cut; alike: sequences after which the entries were the same, bit for bit";

fn line(name: &str, counts: &Counts) -> String {
    format!(
        "{name:<14} {:>9} {:>10} {:>8} {:>10} {:>7} {:>8} {:>8} {:>8} {:>10} {:>7} {:>9}",
        counts.sequences,
        counts.operations,
        counts.refused,
        counts.overlooked,
        counts.breaks,
        counts.walks,
        counts.harvested,
        counts.alike,
        counts.entries,
        counts.our_tables,
        counts.kernel_tables,
    )
}

fn show_failure(seed: u64, name: &str, failure: &Failure) {
    println!("  sequence {} differs; what is left of it:", failure.number);
    for (number, operation) in failure.operations.iter().enumerate() {
        println!("    {:>2}. {operation}", number + 1);
    }
    match failure.difference.after {
        usize::MAX => println!("  {}", failure.difference.what),
        after => println!("  after {after}: {}", failure.difference.what),
    }
    println!("  {}", again(seed, name, failure.number));
}

/// How to run a sequence again.
pub(crate) fn again(seed: u64, table: &str, number: usize) -> String {
    format!("again: cargo xtask generic-pt --seed {seed} --table {table} --only {number}")
}
