//! Benchmarks whose results are judged: against other programs, and against goals.
//!
//! ```text
//! programs ─► rows ─► comparison ─► report
//! (build, pin, run)  (parse, medians)  (ratios, goals)  (people, JSON)
//! ```
//!
//! The page table's benchmark (`crates/pagetable/benches/rows.rs`) and the programs that it is compared with are
//! processes that print the same kind of lines. That keeps other people's code, and its licence, out of ours, and lets
//! each be built by its own compiler. What one run gives depends on where its memory happens to lie and on what else
//! the machine does, so every program is started anew for each round and format, in turn, and medians are compared.

mod comparison;
mod engine;
mod programs;
mod report;
mod rows;

use std::path::PathBuf;

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use comparison::{Comparison, Limits};
use programs::{OurRows, Peer};
use rows::{Measurements, Row};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Page tables: map, unmap, look up; alone or beside other programs
    ///
    /// Prints `format,op,ns_per_call,ns_per_page` lines, each the median over the rounds, or, with --peer, a table of
    /// ratios: our time over that of the fastest peer, row by row. `native_claimed` is the native format in claiming
    /// mode; it stands beside `native`.
    ///
    /// All programs run on one core, which nothing else should use meanwhile. Compare only rows of one run.
    #[command(after_long_help = GUIDE)]
    Pagetable(PageTable),
    /// The engine: translate, map, register, copy, and what it all weighs; beside what programs use today
    ///
    /// Prints a table of medians over the runs, and each goal with what came of it.
    #[command(after_long_help = engine::GUIDE)]
    Engine(engine::Engine),
}

const GUIDE: &str = "\
The peer is any program that, called as `GP_CPU=<core> PROGRAM -q -r 1 -f FORMAT`, prints the same lines for the same \
workloads. One is Linux's own code (drivers/iommu/generic_pt), built as an ordinary program; `cargo xtask --help` names \
the chore that builds it. Its compiler and flags matter, so give it in each of its flavours: the faster counts.

Examples:
  cargo xtask bench pagetable
  cargo xtask bench pagetable --peer gpbench-user --peer gpbench-kernel --format vtdss
  cargo xtask bench pagetable --peer gpbench-user --peer gpbench-kernel --check --json
  cargo xtask bench pagetable --peer gpbench-user --tables
  cargo xtask bench pagetable --two-threads

The goals, which --check insists on: no row takes more than 1.05 of the fastest peer's time; the geometric mean over all \
rows but the random look-ups and the formats whose walks are not coherent (`_nc`) is at most 0.50; no row takes more \
table pages than a peer; two threads on one table do at least 0.90 of what they do on a table each.";

#[derive(Debug, clap::Args)]
struct PageTable {
    /// A program to compare with; repeatable
    #[arg(long = "peer", value_name = "PROGRAM")]
    peers: Vec<PathBuf>,

    /// Only this format; repeatable [default: all that we have]
    #[arg(long = "format", value_name = "FORMAT")]
    formats: Vec<String>,

    /// Only operations whose name contains this
    #[arg(long, value_name = "PART", default_value = "")]
    op: String,

    /// How often each program is run
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,

    /// The core to run on [default: the last one that this process may use]
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,

    /// Where our table pages come from; the peers have something like the arena
    #[arg(long, value_name = "KIND", default_value = "arena", value_parser = ["arena", "heap"])]
    memory: String,

    /// Compare table pages allocated per call, in place of times
    #[arg(long)]
    tables: bool,

    /// Compare two threads on one table with two threads on a table each, in place of times
    #[arg(long, conflicts_with_all = ["tables", "peers", "cpu"])]
    two_threads: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Fail if a goal is missed
    #[arg(long)]
    check: bool,
}

/// The chore.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let arguments = match &arguments.what {
        What::Pagetable(arguments) => arguments,
        What::Engine(arguments) => return engine::run(arguments),
    };
    if arguments.check && arguments.peers.is_empty() && !arguments.two_threads {
        bail!("without --peer or --two-threads there is no goal to check");
    }
    let peers = arguments.peers.iter().map(|path| Peer::new(path)).collect::<Result<Vec<_>>>()?;
    let ours = OurRows::build(&arguments.op, &arguments.memory)?;
    let formats = if arguments.formats.is_empty() { ours.formats()? } else { arguments.formats.clone() };
    let held = if arguments.two_threads {
        two_threads(arguments, &ours, &formats)?
    } else {
        rows(arguments, &ours, &peers, &formats)?
    };
    if arguments.check && !held {
        bail!("a goal was missed");
    }
    Ok(())
}

/// Runs everybody in turn, and tells; whether all goals held.
fn rows(arguments: &PageTable, ours: &OurRows, peers: &[Peer], formats: &[String]) -> Result<bool> {
    let cpu = programs::pin(arguments.cpu)?;
    let rounds = if arguments.tables { 1 } else { arguments.rounds };
    let mut our_rows = Measurements::default();
    let mut their_rows: Vec<_> = peers.iter().map(|_| Measurements::default()).collect();
    let progress = progress(u64::from(rounds) * formats.len() as u64 * (1 + peers.len()) as u64);
    for round in 0..rounds {
        for format in formats {
            let told =
                |who: &str| progress.set_message(format!("round {} of {rounds}: {format}, {who}", round + 1));
            told("ours");
            our_rows.add(if arguments.tables { ours.tables(format)? } else { ours.times(format)? });
            progress.inc(1);
            for (peer, rows) in peers.iter().zip(&mut their_rows) {
                told(peer.name());
                // A peer without the format says so in the first round.
                if round == 0 || rows.has_format(format) {
                    let found =
                        if arguments.tables { peer.tables(format, cpu)? } else { peer.times(format, cpu)? };
                    let wanted = |row: &Row| row.op.contains(&arguments.op);
                    rows.add(found.into_iter().filter(wanted).collect());
                }
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    let limits = if arguments.tables { Limits::TABLES } else { Limits::TIMES };
    let names = peers.iter().map(|peer| peer.name().to_owned());
    let comparison = Comparison::new(&our_rows, &names.zip(their_rows).collect::<Vec<_>>(), limits);
    if arguments.json {
        report::json(&comparison, rounds, cpu)?;
    } else if peers.is_empty() {
        report::lines(&comparison);
    } else {
        report::table(&comparison);
    }
    Ok(comparison.goals().iter().all(|goal| goal.held))
}

/// Two threads; whether they did well enough everywhere.
fn two_threads(arguments: &PageTable, ours: &OurRows, formats: &[String]) -> Result<bool> {
    let progress = progress(formats.len() as u64);
    let mut pairs = Vec::new();
    for format in formats {
        progress.set_message(format.clone());
        pairs.extend(ours.two_threads(format, arguments.rounds)?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    report::two_threads(&pairs, arguments.json)?;
    Ok(pairs.iter().all(rows::TwoThreads::held))
}

/// Progress on standard error, if that is a terminal.
fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  (about {eta} left)") {
        bar.set_style(style);
    }
    bar
}
