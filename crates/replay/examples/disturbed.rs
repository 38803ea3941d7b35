//! Replays a trace while other devices come and go, and memory is cut, revoked and dropped beside it; prints the report as JSON.
//!
//! `cargo run --release -p ioasid-replay --example disturbed -- TRACE TABLE MODE THREADS SEED DISTURBERS`
//!
//! The exit status is 0 if everything was right, everything counts to zero at the end, and no page of a table is left. `cargo xtask soak` runs this again and again.

use ioasid::epoch;
use ioasid::pagetable::HeapTables;
use ioasid_replay::trace::Trace;
use ioasid_replay::{Disturbance, Options, play};
use std::error::Error;
use std::fs::File;
use std::process::ExitCode;

const USAGE: &str = "usage: disturbed TRACE TABLE MODE THREADS SEED DISTURBERS";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [trace, table, mode, threads, seed, disturbers] = arguments.as_slice() else {
        return Err(USAGE.into());
    };
    let disturbance = Disturbance { seed: seed.parse()?, threads: disturbers.parse()? };
    let options = Options {
        table: table.parse()?,
        mode: mode.parse()?,
        threads: threads.parse()?,
        disturbance: Some(disturbance),
        ..Options::default()
    };
    let before = HeapTables::bytes_in_use();
    let report = play(Trace::new(File::open(trace)?)?, &options, &mut |_| ())?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    epoch::free_retired();
    let left = HeapTables::bytes_in_use().saturating_sub(before);
    if left > 0 {
        eprintln!("{left} bytes of table pages are left");
    }
    Ok(if report.is_right() && left == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
