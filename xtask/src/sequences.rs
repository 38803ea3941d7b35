//! Sequences of calls of the engine against its model, for as long as one likes.
//!
//! The sequences are tests of the engine (`crates/ioasid/tests/sequences`), of which `cargo test` runs a moment's worth. Here
//! they are built with optimisation and run round by round, each with a seed of its own, so that a night is worth more
//! than the same sequences over again. A failure has been shrunk by the time it is printed.

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
Properties:
  calls             every call does to spaces, tables, accounts and memory what the model says
  failures          each call of an IOMMU, each table page, each limit fails in turn, and then nothing has happened
  history           a device that came and went has left every leaf as if it had never been
  threads_apart     threads with parts of their own notice nothing of each other, nor devices that read meanwhile
  threads_together  threads in each other's way lose no page and leave none

Examples:
  cargo xtask sequences --minutes 480
  cargo xtask sequences --seed 17 --rounds 1 --only history

The exit status is 0 if every round held. If one did not, the shrunk sequence is printed, and the command that brings it \
back. Threads meet differently each time; a seed brings back what they do, not when.";

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

    /// Only this property
    #[arg(long, value_name = "PROPERTY", value_parser = ["calls", "failures", "history", "threads_apart", "threads_together"])]
    only: Option<String>,

    /// How many cases a round has, in percent of what `cargo test` runs
    #[arg(long, value_name = "PERCENT", default_value_t = 500)]
    cases: u64,
}

/// A round takes seconds, shrinking a failure some minutes. What takes so long will not end.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// The chore.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let program = build()?;
    let log = workspace::target_directory()?.join("sequences.log");
    let moment = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let first = arguments.seed.unwrap_or_else(moment);
    let (began, time) = (Instant::now(), Duration::from_secs(arguments.minutes * 60));
    let bar = match arguments.rounds {
        Some(rounds) => ProgressBar::new(rounds).with_style(style("{bar:24} {pos}/{len} rounds  {msg}")?),
        None => ProgressBar::new(time.as_secs()).with_style(style("{bar:24} {pos}/{len} s  {msg}")?),
    };
    let mut rounds = 0;
    loop {
        let ended = match arguments.rounds {
            Some(wanted) => rounds >= wanted,
            None => began.elapsed() >= time,
        };
        if ended {
            break;
        }
        let seed = first.wrapping_add(rounds);
        bar.set_message(format!("seed {seed}"));
        let mut child = start(&program, &log, seed, arguments)?;
        let held = wait(&mut child, || match arguments.rounds {
            Some(_) => bar.set_position(rounds),
            None => bar.set_position(began.elapsed().min(time).as_secs()),
        });
        match held {
            Ok(true) => rounds += 1,
            Ok(false) => {
                bar.finish_and_clear();
                print!("{}", fs::read_to_string(&log).context("the round has left no output")?);
                bail!("a sequence of seed {seed} has failed; again: {}", again(arguments, seed));
            }
            Err(error) => {
                bar.finish_and_clear();
                return Err(error.context(format!("seed {seed}; again: {}", again(arguments, seed))));
            }
        }
    }
    bar.finish_and_clear();
    let last = first.wrapping_add(rounds.saturating_sub(1));
    println!("{rounds} rounds, seeds {first} to {last}: everything held, in {} s", began.elapsed().as_secs());
    Ok(())
}

fn style(template: &str) -> Result<ProgressStyle> {
    ProgressStyle::with_template(template).context("the progress bar's template")
}

fn again(arguments: &Arguments, seed: u64) -> String {
    let only = arguments.only.as_ref().map_or_else(String::new, |only| format!(" --only {only}"));
    format!("cargo xtask sequences --seed {seed} --rounds 1 --cases {}{only}", arguments.cases)
}

/// Builds the test program, with optimisation.
fn build() -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--release", "--locked", "-p", "ioasid", "--test", "sequences", "--no-run"]);
    cargo.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the sequences do not build");
    }
    let messages = String::from_utf8(output.stdout).context("cargo printed something that is no text")?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of_test = |message: &Value| message["target"]["name"] == "sequences";
    let mut programs =
        messages.filter(of_test).filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    programs.next().context("cargo names no program")
}

fn start(program: &Path, log: &Path, seed: u64, arguments: &Arguments) -> Result<Child> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(program);
    command.env("IOASID_SEQUENCES_SEED", seed.to_string()).env("RUST_BACKTRACE", "0");
    command.env("IOASID_SEQUENCES_CASES", arguments.cases.to_string());
    match &arguments.only {
        Some(only) => command.env("IOASID_SEQUENCES_ONLY", only),
        None => command.env_remove("IOASID_SEQUENCES_ONLY"),
    };
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    command.spawn().with_context(|| format!("cannot run {}", program.display()))
}

/// Whether the round held.
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
