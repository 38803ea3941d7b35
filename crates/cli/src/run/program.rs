//! The program of a command line: started, served to its end, and its end as an exit status.

use std::ffi::{OsStr, OsString};
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;

use anyhow::Context;
use ioasid_run::{Options, RunError};
use ioasid_server::Server;

use crate::probe;

/// The command itself failed; the program may not have been started.
pub(crate) const OWN_FAILURE: u8 = 125;
/// The program is there, but cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// There is no such program.
const NOT_FOUND: u8 = 127;
/// A program that a signal has ended: this and the signal's number.
const SIGNALLED: i32 = 128;

/// How a program came to its end.
pub(crate) enum Ended {
    /// By itself, with this exit status.
    Run(u8),
    /// It cannot be executed, as has been said.
    NotExecuted(ExitCode),
}

/// Runs the program and arguments of a command line, or without any the built-in probe.
///
/// # Errors
/// Programs cannot be run here.
pub(crate) fn run_program(
    command_line: &[OsString],
    options: &Options,
    server: Arc<Server>,
) -> anyhow::Result<Ended> {
    let (program, arguments) = match command_line.split_first() {
        Some((program, rest)) => (program.clone(), rest.to_vec()),
        None => own_probe()?,
    };
    tracing::info!(?program, "starting");
    let outcome = match ioasid_run::run(&program, &arguments, options, server) {
        Ok(outcome) => outcome,
        Err(RunError::Execute { source, .. }) => {
            return Ok(Ended::NotExecuted(cannot_execute(&program, &source)));
        }
        Err(error) => return Err(error).context("cannot run programs here; `ioasid doctor` says more"),
    };
    let status = exit_status(outcome.status);
    tracing::info!(status, "the program has ended");
    Ok(Ended::Run(status))
}

/// This very program as the client.
fn own_probe() -> anyhow::Result<(OsString, Vec<OsString>)> {
    let own = std::env::current_exe().context("cannot find this program's own file to run the probe")?;
    Ok((own.into_os_string(), vec![probe::NAME.into()]))
}

fn cannot_execute(program: &OsStr, source: &std::io::Error) -> ExitCode {
    let (status, advice) = match source.kind() {
        std::io::ErrorKind::NotFound => {
            (NOT_FOUND, "check the name, PATH, and the interpreter that a script names in its first line")
        }
        _ => (NOT_EXECUTABLE, "check that it is a program and that you may execute it (chmod +x)"),
    };
    eprintln!("ioasid: cannot execute {program:?}: {source}; {advice}");
    ExitCode::from(status)
}

/// The program's end as a shell would tell it.
fn exit_status(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let number = status.code().or(status.signal().map(|signal| SIGNALLED + signal));
    number.and_then(|number| u8::try_from(number).ok()).unwrap_or(OWN_FAILURE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn ends_become_exit_statuses() {
        assert_eq!(exit_status(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_status(ExitStatus::from_raw(9)), 137);
        assert_eq!(exit_status(ExitStatus::from_raw(0)), 0);
    }
}
