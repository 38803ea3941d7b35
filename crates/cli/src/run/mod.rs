//! `ioasid run`: a program with software devices.
//!
//! The program is a child of this process, which serves it until it and all its descendants have ended. Its exit status
//! becomes ours, so that `ioasid run` can stand in front of any command of a script.

mod hints;
pub(crate) mod machine;
pub(crate) mod program;
mod summary;
mod watch;

use std::ffi::OsString;
use std::fs;
use std::io::{self, LineWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use ioasid_run::Options;
use ioasid_server::Server;

use self::machine::{CANNOT_BE_MADE, Machine};
pub(crate) use self::program::OWN_FAILURE;
use self::program::{Ended, run_program};
use self::watch::Watch;

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
    #[command(flatten)]
    machine: Machine,

    /// Print each call as it is answered, in words, with its time: to standard error, or to FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    verbose: Option<PathBuf>,

    /// Have the test-only command of kernels built for their own iommufd self-test, with mock devices
    #[arg(long)]
    test_devices: bool,

    /// At the end, print to standard error the calls with their times, what was left mapped, and hints
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
  ioasid run --verbose -- ./client                 each call as a line: IOAS_MAP ioas=1 iova=any len=0x1000 rw ...
  ioasid run --verbose=calls.txt -- ./client       the same, to a file
  ioasid run --summary -- python3 client.py        at the end: calls, what was left mapped, and what could be done better
  ioasid run --json calls.json -- ./client         the same for programs

Exit status:
  that of PROGRAM, or 128+N if signal N has killed it
  125  ioasid itself failed: bad usage, or this machine lacks something (see `ioasid doctor`)
  126  PROGRAM cannot be executed
  127  PROGRAM was not found";

/// Whether the command line is one of `run` or `record`, though it may be wrong.
pub(crate) fn is_asked_for(command_line: impl IntoIterator<Item = OsString>) -> bool {
    let mut words = command_line.into_iter().skip(1);
    words
        .find(|word| !word.as_encoded_bytes().starts_with(b"-"))
        .is_some_and(|word| word == "run" || word == "record")
}

/// Runs it.
///
/// # Errors
/// This process could not do its part; the program may or may not have run.
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let machine = arguments.machine.prepare(arguments.test_devices);
    let collect = arguments.summary || arguments.json.is_some();
    let lines = arguments.verbose.as_deref().map(lines).transpose()?;
    let watched = lines.is_some() || collect;
    let watch = Arc::new(Watch::new(lines, collect));
    let mut options = Options::default();
    if watched {
        options.watcher = Some(Arc::clone(&watch) as _);
    }
    let server = match collect {
        true => Server::with_observer(machine, Arc::clone(&watch) as _),
        false => Server::new(machine),
    }
    .context(CANNOT_BE_MADE)?;
    let status = match run_program(&arguments.program, &options, server)? {
        Ended::Run(status) => status,
        Ended::NotExecuted(code) => return Ok(code),
    };
    watch.finish_lines().context("not every call could be written down (--verbose)")?;
    let collected = watch.take_collected();
    if arguments.summary {
        eprint!("{}", summary::text(&collected));
    }
    if let Some(path) = arguments.json {
        let text = summary::json(status, &collected);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::from(status))
}

/// Where the lines of `--verbose` go.
fn lines(path: &Path) -> anyhow::Result<Box<dyn Write + Send>> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(io::stderr()));
    }
    let file = fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    // Line by line, so that one can follow it while the program runs.
    Ok(Box::new(LineWriter::new(file)))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::machine::default_devices;
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
        let arguments = parse(&["--verbose", "ls"]).unwrap();
        assert_eq!((arguments.verbose, arguments.program), (Some("-".into()), vec!["ls".into()]));
        assert_eq!(parse(&["--verbose=calls", "ls"]).unwrap().verbose, Some("calls".into()));
        assert!(parse(&["--sumary", "ls"]).is_err(), "a misspelt option is no program");
    }

    #[test]
    fn devices_are_parsed_and_bad_ones_explained() {
        let arguments = parse(&["--device", "edu", "--device", "edu:table=vtd"]).unwrap();
        assert_eq!(arguments.machine.devices, default_devices());
        let refused = parse(&["--device", "edu:table=arm"]).unwrap_err().to_string();
        assert!(refused.contains("arm"), "{refused}");
    }

    #[test]
    fn the_command_is_found_behind_options() {
        let asked = |words: &[&str]| is_asked_for(words.iter().map(OsString::from));
        assert!(asked(&["ioasid", "run", "--nonsense"]));
        assert!(asked(&["ioasid", "-v", "run"]));
        assert!(asked(&["ioasid", "record", "-o", "x"]));
        assert!(!asked(&["ioasid", "probe", "run"]));
        assert!(!asked(&["ioasid"]));
    }
}
