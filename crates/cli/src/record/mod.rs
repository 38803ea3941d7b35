//! `ioasid record`: `ioasid run`, and what the program's devices reach and do is written down as a trace.
//!
//! The trace is for [`replay`](crate::replay). What is heard of it, and in which order, is the server's business
//! (`ioasid_server::Observer`); `recorder` makes lines of it. Whatever happens to the file, the program runs on as it would
//! have: a recording that fails ends, and says so.

mod recorder;
#[cfg(test)]
mod sequences;

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use ioasid_run::Options;
use ioasid_server::Server;

use self::recorder::Recorder;
use crate::run::machine::{CANNOT_BE_MADE, Machine};
use crate::run::program::{Ended, OWN_FAILURE, run_program};

/// Run a program as `ioasid run` does, and record what it maps and what its devices do, for `ioasid replay`
///
/// The trace has a line for each map and unmap that a device can notice, each attach and detach, and each DMA: which addresses,
/// when, and whether it was refused. Its format is in traces/README.md.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Where the trace goes; a name that ends in .zst is compressed
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    #[command(flatten)]
    machine: Machine,

    /// The program, looked up in PATH, and its arguments [default: the built-in probe]
    #[arg(trailing_var_arg = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

const AFTER_HELP: &str = "\
Examples:
  ioasid record -o probe.csv.zst                     the built-in probe
  ioasid record -o vmm.csv.zst -- ./my-vmm --vfio    any program
  ioasid replay --table vtd --table amdv1 vmm.csv.zst
  ioasid record -o /dev/fd/3 -- ./client 3>&1 | grep unmap
                                                     to a pipe; standard output is the program's own

What is written is flushed every second: of a recording that was killed, the rest can be replayed. If the file cannot be
written any further (a full disk), this is said at once and at the end, and the program runs on without being recorded.

Exit status:
  that of PROGRAM, or 128+N if signal N has killed it
  125  ioasid itself failed: bad usage, the trace is not complete, or this machine lacks something (see `ioasid doctor`)
  126  PROGRAM cannot be executed
  127  PROGRAM was not found";

/// Records.
///
/// # Errors
/// This process could not do its part; the program may or may not have run.
pub(crate) fn record(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let path = arguments.output;
    if path.as_os_str() == "-" {
        bail!(
            "standard output is the program's own; for a pipe say `-o /dev/fd/3`, as in `ioasid record --help`"
        );
    }
    let server_options = arguments.machine.prepare(false);
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let compressed = path.extension().is_some_and(|extension| extension == "zst");
    let (recorder, writing) = Recorder::start(file, compressed).context("cannot begin to record")?;
    let server = Server::with_observer(server_options, Arc::new(recorder)).context(CANNOT_BE_MADE)?;
    let ended = run_program(&arguments.program, &Options::default(), server);
    let written = writing.finish();
    let status = match ended? {
        Ended::Run(status) => status,
        Ended::NotExecuted(code) => return Ok(code),
    };
    match written {
        Ok(events) => {
            let events = match events {
                1 => "1 event".to_owned(),
                events => format!("{events} events"),
            };
            eprintln!("ioasid: {events} recorded to {}", path.display());
            Ok(ExitCode::from(status))
        }
        Err(error) => {
            eprintln!(
                "ioasid: {} is not complete: {error}; the program ran on and ended with status {status}",
                path.display()
            );
            Ok(ExitCode::from(OWN_FAILURE))
        }
    }
}
