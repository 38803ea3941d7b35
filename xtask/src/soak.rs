//! Traces of real drivers, replayed again and again while everything else happens beside them.
//!
//! A round is one replay of one trace by the library's example `disturbed`, on a table, in a mode and with threads drawn from the
//! round's seed, with the [disturbances](../../../crates/replay/src/player/disturbance.rs) of the same seed: devices of other
//! formats come and go, memory is cut, revoked and dropped, all bytes of all DMA are checked, and at the end everything counts to
//! zero. Each round is a process of its own, so that one that hangs or dies is a round that has failed, and so that what is left of
//! page tables can be told.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    rounds::{self, Span},
    workspace,
};

const GUIDE: &str = "\
Examples:
  cargo xtask soak --minutes 480
  cargo xtask soak --minutes 10 traces/boot-ext4-lazy.csv.zst my-recordings/
  cargo xtask soak --seed 17 --rounds 1 traces/nvme-rand4k-strict.csv.zst

The exit status is 0 if every round was right. If one was not, what it found is printed, and the command that brings it back: the \
same trace, table, mode and threads, and the same disturbances. When they happen is different each time.";

#[derive(Debug, clap::Args)]
#[command(after_long_help = GUIDE)]
pub(crate) struct Arguments {
    #[command(flatten)]
    span: Span,

    /// Traces, or directories of them (*.csv, *.csv.zst), in turn [default: traces/]
    #[arg(value_name = "TRACE")]
    traces: Vec<PathBuf>,
}

/// A round takes seconds. What takes so long will not end.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
/// What the devices of a trace walk.
const TABLES: [&str; 10] =
    ["native", "vtd39", "vtd", "vtd57", "amdv1", "x86-64", "x86-64-la57", "sv39", "sv48", "sv57"];

/// What a round does.
#[derive(Debug)]
struct Round {
    seed: u64,
    trace: PathBuf,
    table: &'static str,
    mode: &'static str,
    threads: u64,
    disturbers: u64,
}

impl Round {
    /// The same for the same seed and traces.
    fn new(seed: u64, traces: &[PathBuf]) -> Result<Round> {
        // Seeds in a row go through the traces; what else there is comes from the bits of a product.
        let trace = traces.get((seed % traces.len().max(1) as u64) as usize).context("no traces")?;
        let mixed = (seed ^ seed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 32).wrapping_mul(0x94d0_49bb_1331_11eb);
        Ok(Round {
            seed,
            trace: trace.clone(),
            table: TABLES[(mixed >> 32) as usize % TABLES.len()],
            mode: if mixed >> 63 == 0 { "strict" } else { "deferred" },
            threads: 1 + (mixed >> 24) % 4,
            disturbers: 1 + (mixed >> 16) % 3,
        })
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg(&self.trace).args([self.table, self.mode]);
        command.args([self.threads, self.seed, self.disturbers].map(|number| number.to_string()));
        command.env("RUST_BACKTRACE", "1");
        command
    }

    fn described(&self) -> String {
        let Round { seed, trace, table, mode, threads, disturbers } = self;
        let name = trace.file_name().map_or(trace.as_os_str(), |name| name);
        format!(
            "seed {seed}: {}, {table}, {mode}, {threads} threads, {disturbers} that disturb",
            name.to_string_lossy()
        )
    }
}

/// The chore.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let traces = traces(&arguments.traces)?;
    let program = rounds::build(&["build", "-p", "ioasid-replay", "--example", "disturbed"], "disturbed")?;
    let round = |seed| {
        let round = Round::new(seed, &traces)?;
        // With one trace the seed chooses it, and everything else as it did.
        let again = format!("cargo xtask soak --seed {seed} --rounds 1 {}", round.trace.display());
        Ok(rounds::Round { command: round.command(&program), described: round.described(), again })
    };
    let mut counted =
        [("events", 0u64), ("episodes", 0), ("cuts", 0), ("revocations", 0), ("attachments", 0)];
    let count = |report: &str| {
        let report: Value = serde_json::from_str(report).context("the report is not JSON")?;
        for (what, count) in &mut counted {
            let found = report[*what].as_u64().or_else(|| report["disturbed"][*what].as_u64());
            *count = count.saturating_add(found.unwrap_or(0));
        }
        Ok(())
    };
    let done = rounds::run(&arguments.span, "soak", PATIENCE, round, count)?;
    let counted: Vec<String> = counted.iter().map(|(what, count)| format!("{count} {what}")).collect();
    println!("{done}: all right ({})", counted.join(", "));
    Ok(())
}

/// The files that are named, and the traces in the directories that are, in an order that does not change.
fn traces(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let ours = [workspace::root().join("traces")];
    let named = if named.is_empty() { &ours } else { named };
    let is_trace = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        name.ends_with(".csv") || name.ends_with(".csv.zst")
    };
    let mut traces = Vec::new();
    for path in named {
        let cannot_read = || format!("cannot read {}", path.display());
        if !fs::metadata(path).with_context(cannot_read)?.is_dir() {
            traces.push(path.clone());
            continue;
        }
        let entries = fs::read_dir(path).with_context(cannot_read)?;
        let files = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>();
        let mut files = files.with_context(cannot_read)?;
        files.retain(is_trace);
        files.sort();
        traces.append(&mut files);
    }
    if traces.is_empty() {
        bail!("there are no traces (*.csv, *.csv.zst)");
    }
    Ok(traces)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The command that is printed brings the same round back, with one trace alone.
    #[test]
    fn a_seed_brings_a_round_back() {
        let traces: Vec<PathBuf> = ["a", "b", "c"].map(PathBuf::from).into();
        for seed in 1_790_000_000..1_790_000_100 {
            let round = Round::new(seed, &traces).unwrap();
            let again = Round::new(seed, std::slice::from_ref(&round.trace)).unwrap();
            assert_eq!(round.described(), again.described());
        }
    }

    #[test]
    fn seeds_in_a_row_try_everything() {
        let traces: Vec<PathBuf> = ["a", "b", "c"].map(PathBuf::from).into();
        let rounds: Vec<Round> = (7..307).map(|seed| Round::new(seed, &traces).unwrap()).collect();
        for table in TABLES {
            for mode in ["strict", "deferred"] {
                assert!(
                    rounds.iter().any(|round| round.table == table && round.mode == mode),
                    "{table} {mode}"
                );
            }
        }
        assert!((1..=4).all(|threads| rounds.iter().any(|round| round.threads == threads)));
    }
}
