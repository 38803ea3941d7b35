//! The `ioasid` command.
//!
//! One module per subcommand: [`run`] starts a program with the software devices, [`probe`] is an ordinary program that
//! tries what such a machine offers, [`measure`] times a few of its calls, [`doctor`] says whether `run` can work here,
//! [`replay`] carries out what real drivers once asked of an IOMMU, [`pasid`] gives out PASIDs.
//! `probe` and `measure` are clients like any other; they reach `/dev/iommu` through [`client`], which knows nothing of
//! the rest of the project but the layouts of the interface.

#![deny(unsafe_code)]

mod client;
mod doctor;
mod logging;
mod measure;
mod pasid;
mod probe;
mod quantity;
mod replay;
mod run;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// I/O address spaces for programs: a working /dev/iommu and /dev/vfio without hardware, kernel module or root.
#[derive(Debug, Parser)]
#[command(name = "ioasid", version, propagate_version = true, after_help = AFTER_HELP)]
struct Arguments {
    #[command(flatten)]
    logging: logging::Verbosity,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  ioasid run                     try everything: the built-in probe on software devices
  ioasid run -- ./my-vmm --vfio  run any program with a working /dev/iommu and /dev/vfio
  ioasid doctor                  what this machine lacks for that, and what to do
  ioasid replay TRACE            carry out what real drivers asked of an IOMMU, and time it
  ioasid pasid storm             many machines allocate and free PASIDs at once

Environment:
  IOASID_LOG   what is logged to standard error, as in `info` or `ioasid_run=debug`; wins over -v
  NO_COLOR     no colours, even on a terminal

`ioasid COMMAND --help` says more, with the exit statuses of each command.";

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Arguments),
    Replay(replay::Arguments),
    Pasid(pasid::Arguments),
    Probe(probe::Arguments),
    Measure(measure::Arguments),
    Doctor(doctor::Arguments),
}

/// A usage error, for all commands but `run`.
const USAGE: u8 = 2;
/// A command could not do its work, and printed why.
const FAILURE: u8 = 1;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nothing is left to be done if the terminal is gone.
            let _ = error.print();
            let misuse = if run::is_asked_for(std::env::args_os()) { run::OWN_FAILURE } else { USAGE };
            return ExitCode::from(if error.use_stderr() { misuse } else { 0 });
        }
    };
    let (result, failure) = match (arguments.logging.start(), arguments.command) {
        (Err(error), _) => (Err(error), USAGE),
        (Ok(()), Command::Run(arguments)) => (run::run(arguments), run::OWN_FAILURE),
        (Ok(()), Command::Replay(arguments)) => (replay::replay(&arguments), FAILURE),
        (Ok(()), Command::Pasid(arguments)) => (pasid::pasid(&arguments), FAILURE),
        (Ok(()), Command::Probe(arguments)) => (probe::probe(&arguments), FAILURE),
        (Ok(()), Command::Measure(arguments)) => (measure::measure(&arguments), FAILURE),
        (Ok(()), Command::Doctor(arguments)) => (doctor::doctor(&arguments), FAILURE),
    };
    result.unwrap_or_else(|error| {
        eprintln!("ioasid: {error:#}");
        ExitCode::from(failure)
    })
}
