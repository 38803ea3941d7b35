//! `ioasid run`: a program with software devices.
//!
//! The program is a child of this process, which serves it until it and all its descendants have ended. Its exit status
//! becomes ours, so that `ioasid run` can stand in front of any command of a script.

mod summary;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};

use anyhow::Context;
use clap::Args;
use ioasid_run::{Options, RunError};
use ioasid_server::{DeviceOptions, Server, ServerOptions, TableKind};

use crate::probe;
use crate::quantity::Bytes;

/// `run` itself failed; the program may not have been started.
pub(crate) const OWN_FAILURE: u8 = 125;
/// The program is there, but cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// There is no such program.
const NOT_FOUND: u8 = 127;
/// A program that a signal has ended: this and the signal's number.
const SIGNALLED: i32 = 128;

/// Run a program with a working /dev/iommu and /dev/vfio
///
/// PROGRAM and all processes that it starts see /dev/iommu (Linux's iommufd interface), /dev/vfio/devices/vfioN (software
/// PCI devices behind a software IOMMU) and /dev/ioasid (what is mapped and charged, as JSON). Nothing else about them is
/// different, and nobody else on the machine notices. Static or dynamic programs, forking or not; no root is needed.
///
/// Without PROGRAM the built-in probe runs, which tries all of it step by step.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// A software device; the first is vfio0, the next vfio1, and so on [default: edu, and edu:table=vtd]
    ///
    /// SPEC is a model with settings, as in edu:table=vtd,dma-mask=40. The model is edu, after QEMU's device of that name.
    /// Settings: table=KIND is the page table that the device's IOMMU walks: native (default), vtd, amdv1, x86-64, riscv, or
    /// with other levels vtd39, vtd57, x86-64-la57, sv39, sv57; dma-mask=BITS (12 to 64, default 28) is how many address bits the device drives.
    #[arg(long = "device", value_name = "SPEC")]
    devices: Vec<DeviceOptions>,

    /// How much memory the page tables of all devices together may take [default: a quarter of the machine's]
    ///
    /// A map or attach that would need more gets ENOMEM. A mapping takes a 512th of its size where no large page fits.
    #[arg(long, value_name = "BYTES")]
    table_memory: Option<Bytes>,

    /// Have the test-only command of kernels built for their own iommufd self-test, with mock devices
    ///
    /// Then devices can have no tables but native ones [default: edu alone].
    #[arg(long)]
    test_devices: bool,

    /// At the end, print to standard error how often each call was made and how long it took
    #[arg(long)]
    summary: bool,

    /// At the end, write the same as JSON to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// The program, looked up in PATH, and its arguments
    #[arg(trailing_var_arg = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

const AFTER_HELP: &str = "\
Examples:
  ioasid run                                       the built-in probe
  ioasid run -- cat /dev/ioasid                    what is mapped now: nothing
  ioasid run --device edu:dma-mask=64 -- ./client  one device, that reaches all addresses
  ioasid run --summary -- python3 client.py        with a table of the calls at the end

Exit status:
  that of PROGRAM, or 128+N if signal N has killed it
  125  ioasid itself failed: bad usage, or this machine lacks something (see `ioasid doctor`)
  126  PROGRAM cannot be executed
  127  PROGRAM was not found";

/// Whether the command line is one of `run`, though it may be wrong.
pub(crate) fn is_asked_for(command_line: impl IntoIterator<Item = OsString>) -> bool {
    let mut words = command_line.into_iter().skip(1);
    words.find(|word| !word.as_encoded_bytes().starts_with(b"-")).is_some_and(|word| word == "run")
}

/// Runs it.
///
/// # Errors
/// This process could not do its part; the program may or may not have run.
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let test_devices = arguments.test_devices;
    let devices = match arguments.devices {
        none if none.is_empty() && test_devices => ServerOptions::default().devices,
        none if none.is_empty() => default_devices(),
        devices => devices,
    };
    let table_memory = arguments.table_memory.map_or_else(quarter_of_memory, |bytes| bytes.0);
    ioasid::pagetable::HeapTables::set_limit(table_memory);
    let server = Server::new(ServerOptions { devices, test_devices })
        .context("the machine cannot be made; ask for other devices (--device)")?;
    let (program, program_arguments) = match arguments.program.split_first() {
        Some((program, rest)) => (program.clone(), rest.to_vec()),
        None => own_probe()?,
    };
    tracing::info!(?program, "starting");
    let outcome = match ioasid_run::run(&program, &program_arguments, &Options::default(), server) {
        Ok(outcome) => outcome,
        Err(RunError::Execute { source, .. }) => return Ok(cannot_execute(&program, &source)),
        Err(error) => return Err(error).context("cannot run programs here; `ioasid doctor` says more"),
    };
    let status = exit_status(outcome.status);
    tracing::info!(status, "the program has ended");
    if arguments.summary {
        eprint!("{}", summary::table(&outcome.statistics));
    }
    if let Some(path) = arguments.json {
        let text = summary::json(status, &outcome.statistics);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::from(status))
}

/// A quarter of the machine's memory, in bytes.
fn quarter_of_memory() -> u64 {
    let machine = rustix::system::sysinfo();
    (machine.totalram as u64).saturating_mul(machine.mem_unit.into()) / 4
}

/// A device on the space's own table and one on a table of another format, so that a space can have both.
fn default_devices() -> Vec<DeviceOptions> {
    let native = DeviceOptions::default();
    let vtd = DeviceOptions { table: TableKind::VtdSecondStage, ..native.clone() };
    vec![native, vtd]
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

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(words: &[&str]) -> Result<Arguments, clap::Error> {
        Line::try_parse_from([&["run"], words].concat()).map(|line| line.arguments)
    }

    #[test]
    fn options_end_where_the_program_begins() {
        let arguments = parse(&["--summary", "ls", "--summary", "-l"]).unwrap();
        assert!(arguments.summary);
        assert_eq!(arguments.program, ["ls", "--summary", "-l"]);
        let arguments = parse(&["--", "--json", "x"]).unwrap();
        assert_eq!((arguments.json, arguments.program), (None, vec!["--json".into(), "x".into()]));
        assert!(parse(&[]).unwrap().program.is_empty());
        assert!(parse(&["--sumary", "ls"]).is_err(), "a misspelt option is no program");
    }

    #[test]
    fn devices_are_parsed_and_bad_ones_explained() {
        let arguments = parse(&["--device", "edu", "--device", "edu:table=vtd"]).unwrap();
        assert_eq!(arguments.devices, default_devices());
        let refused = parse(&["--device", "edu:table=arm"]).unwrap_err().to_string();
        assert!(refused.contains("arm"), "{refused}");
    }

    #[test]
    fn the_command_is_found_behind_options() {
        let asked = |words: &[&str]| is_asked_for(words.iter().map(OsString::from));
        assert!(asked(&["ioasid", "run", "--nonsense"]));
        assert!(asked(&["ioasid", "-v", "run"]));
        assert!(!asked(&["ioasid", "probe", "run"]));
        assert!(!asked(&["ioasid"]));
    }

    #[test]
    fn ends_become_exit_statuses() {
        assert_eq!(exit_status(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_status(ExitStatus::from_raw(9)), 137);
        assert_eq!(exit_status(ExitStatus::from_raw(0)), 0);
    }
}
