//! The built command, as people and scripts use it.
//!
//! Every case starts the real `ioasid` with real programs, and has a deadline. As root, every case runs as an ordinary
//! user too. What this machine lacks for a case (a static C library, Python) is reported as ignored: not run.

mod cases;
mod harness;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use harness::{Installed, Who};

/// One case: its name, what it needs of the machine, and what it does.
struct Case {
    name: &'static str,
    runnable: fn(&Installed) -> bool,
    check: fn(&harness::Command<'_>) -> Result<(), String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let installed: &'static Installed = match Installed::new() {
        // The trials may run on threads of their own until the end.
        Ok(installed) => Box::leak(Box::new(installed)),
        Err(error) => {
            eprintln!("cannot install the command for the tests: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut trials = Vec::new();
    for who in Who::all().iter().copied() {
        for case in cases::ALL {
            let check = move || {
                (case.check)(&harness::Command::of(installed, who)).map_err(libtest_mimic::Failed::from)
            };
            let trial = Trial::test(format!("{}::{}", who.name(), case.name), check);
            trials.push(trial.with_ignored_flag(!(case.runnable)(installed)));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    installed.remove();
    conclusion.exit_code()
}
