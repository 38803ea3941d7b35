//! `ioasid replay`: what real drivers once asked of an IOMMU, asked of ours.
//!
//! The work is done by the library `ioasid-replay`. Here are the arguments, the files, the progress, and what is printed.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ioasid_replay::trace::Trace;
use ioasid_replay::{Mode, Options, Peer, Report, Speed, play};
use ioasid_soft::iommu::TableKind;
use serde::Serialize;

use crate::quantity::Bytes;
use crate::terminal::Palette;

mod text;

/// Carry out a recorded trace of DMA maps and unmaps, check every byte, and say how long it took
///
/// A trace is what the drivers of a running kernel asked of an IOMMU: which pages were mapped for which device, when, and when
/// they were unmapped again. Each device of the trace gets an address space and does one DMA through every mapping, just
/// before it is unmapped. `traces/` in the project has some traces, and its README the format.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Traces, compressed with zstd or not; `-` is standard input
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,

    /// What the devices walk: native, vtd, amdv1, x86-64, riscv and others; once for each table to be tried
    #[arg(long = "table", value_name = "KIND", default_value = "native")]
    tables: Vec<TableKind>,

    /// The same once more with what programs use in place of a space: btree, vm-memory; repeatable. Always strict
    #[arg(long, value_name = "PEER")]
    against: Vec<Peer>,

    /// strict: an unmap returns when no device uses the memory any more; deferred: a flush waits for many
    #[arg(long, value_name = "MODE", default_value = "strict")]
    mode: Mode,

    /// How many threads do it; the events of one processor stay on one thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=256))]
    threads: usize,

    /// max: as fast as possible; recorded: nothing before its time in the trace (pauses over 10 s are cut short)
    #[arg(long, value_name = "SPEED", default_value = "max")]
    speed: Speed,

    /// How much memory stands for the guest's; physical addresses beyond begin again at 0
    #[arg(long, value_name = "BYTES", default_value = "8G")]
    memory: Bytes,

    /// Stop at the first line that is no event, or does not fit what came before it
    #[arg(long)]
    strict_input: bool,

    /// Print JSON: a list with an object for each trace and each table or peer
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
What is printed:
  events/s        with reading the file, DMA and checking; `map and unmap alone` is what the space itself does
  p50, p99, p99.9 of each map, unmap and DMA, with two readings of the clock (some 50 ns)
  live mappings   the most there were at any time, the most bytes, and what was left at the end of the trace
  leaves, tables  what the devices' page tables look like when the most is mapped
  IOTLB           how much of the DMA found its way remembered, and did not begin at the root of the table

With --against, a peer keeps the mappings in place of our spaces: a BTreeMap behind a readers-writer lock, or the IOTLB of rust-vmm's
vm-memory behind one. It maps, unmaps and moves the same, on as many threads, with the same bytes checked. A peer has no tables, and
does not defer its unmaps.

Lines that are no events, unmaps of what is not mapped and maps of what is: these are named, counted and left out.

Examples:
  ioasid replay traces/boot-ext4-lazy.csv.zst
  ioasid replay --table native --table vtd --table amdv1 --mode deferred --threads 2 traces/*.zst
  ioasid replay --against btree --against vm-memory --threads 2 traces/nvme-rand4k-strict.csv.zst
  zstdcat my-vmm.csv.zst | ioasid replay --strict-input -
  ioasid replay --json traces/*.zst | jq -r '.[] | [.trace, .map.p99_nanoseconds] | @tsv'

Exit status:
  0  everything that the traces ask for was done, and every byte was right
  1  something was wrong, as it says: with a DMA, a map or unmap, or a file; with --strict-input, with a line
  2  bad usage";

/// What carries a trace out.
#[derive(Debug, Clone, Copy)]
enum Carrier {
    Table(TableKind),
    Peer(Peer),
}

impl Arguments {
    /// Everything that each trace is replayed on.
    fn carriers(&self) -> Vec<Carrier> {
        let tables = self.tables.iter().copied().map(Carrier::Table);
        tables.chain(self.against.iter().copied().map(Carrier::Peer)).collect()
    }

    fn options(&self, carrier: Carrier) -> Options {
        let (table, peer, mode) = match carrier {
            Carrier::Table(table) => (table, None, self.mode),
            Carrier::Peer(peer) => (TableKind::default(), Some(peer), Mode::Strict),
        };
        Options {
            table,
            peer,
            mode,
            threads: self.threads,
            speed: self.speed,
            strict_input: self.strict_input,
            memory: self.memory.0,
        }
    }
}

/// What one replay gave.
#[derive(Debug, Serialize)]
struct Replayed {
    trace: String,
    #[serde(flatten)]
    report: Report,
}

/// Replays and prints.
///
/// # Errors
/// A file cannot be opened or is no trace, or standard output cannot be written.
pub(crate) fn replay(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let from_input = arguments.traces.iter().filter(|trace| is_standard_input(trace)).count();
    let carriers = arguments.carriers();
    if from_input > 1 || from_input == 1 && carriers.len() > 1 {
        eprintln!("ioasid: standard input can be read once; name a file, or one table and no peer");
        return Ok(ExitCode::from(crate::USAGE));
    }
    let mut output = io::stdout();
    let mut all = Vec::new();
    for trace in &arguments.traces {
        for carrier in &carriers {
            let report =
                replay_one(trace, *carrier, arguments).with_context(|| trace.display().to_string())?;
            let replayed = Replayed { trace: trace.display().to_string(), report };
            if !arguments.json {
                let separator = if all.is_empty() { "" } else { "\n" };
                let text = text::describe(&replayed.trace, &replayed.report, Palette::of(&output));
                output.write_all(format!("{separator}{text}").as_bytes()).context(CANNOT_PRINT)?;
            }
            all.push(replayed);
        }
    }
    if arguments.json {
        writeln!(output, "{}", serde_json::to_string_pretty(&all)?).context(CANNOT_PRINT)?;
    }
    let right = all.iter().all(|replayed| replayed.report.is_right());
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::from(crate::FAILURE) })
}

const CANNOT_PRINT: &str = "cannot write to standard output";

fn is_standard_input(trace: &Path) -> bool {
    trace.as_os_str() == "-"
}

fn replay_one(trace: &Path, carrier: Carrier, arguments: &Arguments) -> anyhow::Result<Report> {
    let options = arguments.options(carrier);
    let (source, length): (Box<dyn Read>, Option<u64>) = if is_standard_input(trace) {
        (Box::new(io::stdin().lock()), None)
    } else {
        let file = File::open(trace).context("cannot open it")?;
        let length = file.metadata().ok().filter(|metadata| metadata.is_file()).map(|file| file.len());
        (Box::new(file), length)
    };
    let bar = progress(length)?.with_message(options.peer.map_or(options.table.name(), Peer::name));
    let trace = Trace::new(bar.wrap_read(source))?;
    let report = play(trace, &options, &mut |events| bar.set_prefix(events.to_string()));
    bar.finish_and_clear();
    Ok(report?)
}

/// A bar over the bytes of the file as it is stored; drawn on a terminal only.
fn progress(length: Option<u64>) -> anyhow::Result<ProgressBar> {
    if !io::stderr().is_terminal() {
        return Ok(ProgressBar::hidden());
    }
    let (bar, style) = match length {
        Some(length) => {
            let style = "{bar:24} {bytes} of {total_bytes}  {prefix} events  {msg}  {eta} left";
            (ProgressBar::new(length), style)
        }
        None => (ProgressBar::new_spinner(), "{spinner} {bytes}  {prefix} events  {msg}  {elapsed}"),
    };
    Ok(bar.with_style(ProgressStyle::with_template(style)?))
}
