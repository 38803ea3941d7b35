//! Results for people and for programs.

use anyhow::Result;
use serde_json::{Map, json};

use super::comparison::{ComparedRow, Comparison};
use super::rows::{TIMES_HEADER, TwoThreads};

/// Our rows alone; times as the benchmark itself prints them.
pub(crate) fn lines(comparison: &Comparison) {
    println!("{}", comparison.limits.header);
    for ComparedRow { format, op, ours, .. } in &comparison.rows {
        if comparison.limits.header == TIMES_HEADER {
            println!("{format},{op},{:.2},{:.3}", ours.median, ours.per_page);
        } else {
            println!("{format},{op},{:.4}", ours.median);
        }
    }
}

/// Everybody's rows, and what they come to.
pub(crate) fn table(comparison: &Comparison) {
    let width = |name: &str| name.len().max(11);
    print!("{:<10} {:<30} {:>11}", "format", "operation", "ours");
    for name in &comparison.peers {
        print!("  {name:>width$}", width = width(name));
    }
    println!("  {:>6}", "ratio");
    let compared = comparison.rows.iter().filter(|row| row.fastest.is_some());
    for row in compared {
        print!("{:<10} {:<30} {:>11.2}", row.format, row.op, row.ours.median);
        for (name, peer) in comparison.peers.iter().zip(&row.peers) {
            let value = peer.map_or("-".to_owned(), |summary| format!("{:.2}", summary.median));
            print!("  {value:>width$}", width = width(name));
        }
        let ratio = row.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!("  {ratio:>6}{}", if comparison.is_beyond(row) { "  over" } else { "" });
    }
    println!("({}; ratio: ours to the least of the others)", comparison.limits.unit);
    alone(comparison);
    claiming(comparison);
    conclusion(comparison);
}

/// The rows that no peer has, of which claiming ones have a table of their own.
fn alone(comparison: &Comparison) {
    let rows: Vec<_> = comparison
        .rows
        .iter()
        .filter(|row| row.fastest.is_none() && row.format != "native_claimed")
        .collect();
    if !rows.is_empty() {
        println!("\nno peer has these:");
    }
    for row in rows {
        println!("{:<10} {:<30} {:>11.2}", row.format, row.op, row.ours.median);
    }
}

fn claiming(comparison: &Comparison) {
    let rows = comparison.claiming();
    if rows.is_empty() {
        return;
    }
    println!("\n{:<41} {:>11}  {:>11}  {:>6}", "claiming mode, native", "exclusive", "claiming", "ratio");
    for (op, exclusive, claiming) in rows {
        println!("{op:<41} {exclusive:>11.2}  {claiming:>11.2}  {:>6.2}", claiming / exclusive);
    }
}

fn conclusion(comparison: &Comparison) {
    println!();
    if !comparison.without_us.is_empty() {
        println!("rows of the peers that we have not: {}", comparison.without_us.join(" "));
    }
    if let Some(row) = comparison.worst() {
        let peer = row.fastest.and_then(|peer| comparison.peers.get(peer)).map_or("", String::as_str);
        println!("worst row: {} {}, {:.2} times {peer}", row.format, row.op, row.ratio.unwrap_or_default());
    }
    for goal in comparison.goals() {
        let outcome = if goal.held { "held" } else { "missed" };
        print!("goal: {} at most {:.2}: {outcome}", goal.what, goal.limit);
        match goal.missed_by {
            Some(rows) => println!(", by {rows} of {}", goal.rows),
            None => println!(", with {:.3} over {} rows", goal.value, goal.rows),
        }
    }
}

/// All of it as one JSON object.
pub(crate) fn json(comparison: &Comparison, rounds: u32, cpu: usize) -> Result<()> {
    let rows: Vec<_> = comparison
        .rows
        .iter()
        .map(|row| {
            let peers = comparison.peers.iter().zip(&row.peers);
            let peers: Map<_, _> = peers.map(|(name, summary)| (name.clone(), json!(summary))).collect();
            json!({
                "format": row.format,
                "op": row.op,
                "ours": row.ours,
                "peers": peers,
                "fastest_peer": row.fastest.and_then(|peer| comparison.peers.get(peer)),
                "ratio": row.ratio,
            })
        })
        .collect();
    let object = json!({
        "unit": comparison.limits.unit,
        "rounds": rounds,
        "cpu": cpu,
        "rows": rows,
        "rows_of_peers_only": comparison.without_us,
        "goals": comparison.goals(),
    });
    println!("{}", serde_json::to_string_pretty(&object)?);
    Ok(())
}

/// Two threads on one table and on two.
pub(crate) fn two_threads(pairs: &[TwoThreads], json: bool) -> Result<()> {
    if json {
        let object =
            json!({ "unit": "calls per us", "least_ratio": TwoThreads::LEAST, "two_threads": pairs });
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    println!(
        "{:<15} {:<20} {:>10} {:>10} {:>10}  {:>6}",
        "format", "operation", "one thread", "one table", "two tables", "ratio"
    );
    for pair in pairs {
        let TwoThreads { format, op, one_table, two_tables, alone, ratio } = pair;
        let verdict = if pair.held() { "" } else { "  too little" };
        println!(
            "{format:<15} {op:<20} {alone:>10.2} {one_table:>10.2} {two_tables:>10.2}  {ratio:>6.3}{verdict}"
        );
    }
    let missed = pairs.iter().filter(|pair| !pair.held()).count();
    let outcome = if missed == 0 { "held" } else { "missed" };
    println!("(calls per microsecond, of all threads together; ratio: one table to two)\n");
    println!(
        "goal: one table at least {:.2} of two: {outcome} ({missed} of {} below it)",
        TwoThreads::LEAST,
        pairs.len()
    );
    Ok(())
}
