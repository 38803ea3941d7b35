//! Runs a program with the files of one imaginary machine and prints what it called:
//! `cargo run -p ioasid-run --example run_program -- PROGRAM ARGUMENTS`

use std::error::Error;

use ioasid_run::{Options, run};
use ioasid_server::{Server, ServerOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let program = arguments.next().ok_or("which program?")?;
    let server = Server::new(ServerOptions::default())?;
    let outcome = run(program, arguments, &Options::default(), server)?;
    for (kind, totals) in outcome.statistics.iter() {
        let mean = totals.total / u32::try_from(totals.calls.max(1)).unwrap_or(u32::MAX);
        eprintln!(
            "{kind:?}: {} calls, {} failed, {mean:?} each, longest {:?}",
            totals.calls, totals.failures, totals.longest
        );
    }
    eprintln!("{}", outcome.status);
    Ok(())
}
