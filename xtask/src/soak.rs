//! Traces of real drivers, replayed again and again while everything else happens beside them.
//!
//! A round is one replay of one trace by the library's example `disturbed`, on a table, in a mode and with threads drawn from the
//! round's seed, with the [disturbances](../../../crates/replay/src/player/disturbance.rs) of the same seed: devices of other
//! formats come and go, memory is cut, revoked and dropped, all bytes of all DMA are checked, and at the end everything counts to
//! zero. Each round is a process of its own, so that one that hangs or dies is a round that has failed, and so that what is left of
//! page tables can be told.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::workspace;

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
    /// How long to go on; the round that is running then is finished
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    minutes: u64,

    /// The seed of the first round; each round has the next one [default: of the moment]
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,

    /// Run so many rounds, however long they take
    #[arg(long, value_name = "NUMBER", conflicts_with = "minutes")]
    rounds: Option<u64>,

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

    fn start(&self, program: &Path, log: &Path) -> Result<Child> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(program);
        command.arg(&self.trace).args([self.table, self.mode]);
        command.args([self.threads, self.seed, self.disturbers].map(|number| number.to_string()));
        command.env("RUST_BACKTRACE", "1").stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        command.spawn().with_context(|| format!("cannot run {}", program.display()))
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
    let program = build()?;
    let log = workspace::target_directory()?.join("soak.log");
    let moment = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let first = arguments.seed.unwrap_or_else(moment);
    let (began, time) = (Instant::now(), Duration::from_secs(arguments.minutes * 60));
    let bar = match arguments.rounds {
        Some(rounds) => ProgressBar::new(rounds).with_style(style("{bar:24} {pos}/{len} rounds  {msg}")?),
        None => ProgressBar::new(time.as_secs()).with_style(style("{bar:24} {pos}/{len} s  {msg}")?),
    };
    let mut rounds = 0;
    let mut done = [("events", 0u64), ("episodes", 0), ("cuts", 0), ("revocations", 0), ("attachments", 0)];
    loop {
        let ended = match arguments.rounds {
            Some(wanted) => rounds >= wanted,
            None => began.elapsed() >= time,
        };
        if ended {
            break;
        }
        let round = Round::new(first.wrapping_add(rounds), &traces)?;
        bar.set_message(round.described());
        let mut child = round.start(&program, &log)?;
        let right = wait(&mut child, || match arguments.rounds {
            Some(_) => bar.set_position(rounds),
            None => bar.set_position(began.elapsed().min(time).as_secs()),
        });
        let again = || {
            let trace = round.trace.display();
            // With one trace the seed chooses it, and everything else as it did.
            format!("cargo xtask soak --seed {} --rounds 1 {trace}", round.seed)
        };
        match right {
            Ok(true) => {
                rounds += 1;
                let report = fs::read_to_string(&log).context("the round has left no report")?;
                let report: Value = serde_json::from_str(&report).context("the report is not JSON")?;
                for (what, count) in &mut done {
                    let found = report[*what].as_u64().or_else(|| report["disturbed"][*what].as_u64());
                    *count = count.saturating_add(found.unwrap_or(0));
                }
            }
            Ok(false) => {
                bar.finish_and_clear();
                print!("{}", fs::read_to_string(&log).context("the round has left no output")?);
                bail!("round {} was not right ({}); again: {}", rounds + 1, round.described(), again());
            }
            Err(error) => {
                bar.finish_and_clear();
                let round = format!("round {} ({}); again: {}", rounds + 1, round.described(), again());
                return Err(error.context(round));
            }
        }
    }
    bar.finish_and_clear();
    let last = first.wrapping_add(rounds.saturating_sub(1));
    let done: Vec<String> = done.iter().map(|(what, count)| format!("{count} {what}")).collect();
    println!(
        "{rounds} rounds, seeds {first} to {last}, in {} s: all right ({})",
        began.elapsed().as_secs(),
        done.join(", ")
    );
    Ok(())
}

fn style(template: &str) -> Result<ProgressStyle> {
    ProgressStyle::with_template(template).context("the progress bar's template")
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

/// Builds the example that a round is, with optimisation.
fn build() -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--release", "--locked", "-p", "ioasid-replay", "--example", "disturbed"]);
    cargo.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the example that replays does not build");
    }
    let messages = String::from_utf8(output.stdout).context("cargo printed something that is no text")?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of_example = |message: &Value| message["target"]["name"] == "disturbed";
    let mut programs =
        messages.filter(of_example).filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    programs.next().context("cargo names no program")
}

/// Whether the round was right.
fn wait(child: &mut Child, mut tick: impl FnMut()) -> Result<bool> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if began.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            bail!("a round did not end in {} s", PATIENCE.as_secs());
        }
        tick();
        thread::sleep(Duration::from_millis(100));
    }
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
