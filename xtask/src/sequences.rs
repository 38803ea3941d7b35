//! Sequences of calls of the engine against its model, for as long as one likes.
//!
//! The sequences are tests of the engine (`crates/ioasid/tests/sequences`), of which `cargo test` runs a moment's worth. Here
//! they are built with optimisation and run round by round, each with a seed of its own, so that a night is worth more
//! than the same sequences over again. A failure has been shrunk by the time it is printed.

use std::{process::Command, time::Duration};

use anyhow::Result;

use crate::rounds::{self, Round, Span};

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
    #[command(flatten)]
    span: Span,

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
    let program = rounds::build(&["test", "-p", "ioasid", "--test", "sequences", "--no-run"], "sequences")?;
    let Arguments { span, only, cases } = arguments;
    let round = |seed: u64| {
        let mut command = Command::new(&program);
        command.env("IOASID_SEQUENCES_SEED", seed.to_string()).env("RUST_BACKTRACE", "0");
        command.env("IOASID_SEQUENCES_CASES", cases.to_string());
        match only {
            Some(only) => command.env("IOASID_SEQUENCES_ONLY", only),
            None => command.env_remove("IOASID_SEQUENCES_ONLY"),
        };
        let only = only.as_ref().map_or_else(String::new, |only| format!(" --only {only}"));
        let again = format!("cargo xtask sequences --seed {seed} --rounds 1 --cases {cases}{only}");
        Ok(Round { command, described: format!("seed {seed}"), again })
    };
    let done = rounds::run(span, "sequences", PATIENCE, round, |_| Ok(()))?;
    println!("{done}: everything held");
    Ok(())
}
