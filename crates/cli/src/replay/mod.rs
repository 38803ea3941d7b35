//! `ioasid replay`: what real drivers once asked of an IOMMU, asked of ours.
//!
//! The work is done by the library `ioasid-replay`. Here are the arguments, the files, the progress, what is printed, and what is
//! drawn ([`plot`]).

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

use comparison::Row;
use plot::{PlotFile, PlotPath};

mod comparison;
mod plot;
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

    /// What the devices walk: native, vtd, amdv1, x86-64, riscv and others; once for each table to be tried [default: native;
    /// with --compare, these five]
    #[arg(long = "table", value_name = "KIND")]
    tables: Vec<TableKind>,

    /// The same once more with what programs use in place of a space: btree, vm-memory; repeatable. Always strict
    #[arg(long, value_name = "PEER")]
    against: Vec<Peer>,

    /// strict: an unmap returns when no device uses the memory any more; deferred: a flush waits for many; once for each mode to
    /// be tried [default: strict; with --compare, both]
    #[arg(long = "mode", value_name = "MODE")]
    modes: Vec<Mode>,

    /// Replay each trace with every table in every mode, and print a table with a row for each
    #[arg(long)]
    compare: bool,

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

    /// Print JSON: a list with an object for each trace, table and mode, and peer
    #[arg(long)]
    json: bool,

    /// Draw it, as SVG for print: of one replay, what was live and how long calls took over the time of the recording, and a
    /// histogram; with --compare, all replays side by side
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PlotPath>,
}

/// What carries a trace out.
#[derive(Debug, Clone, Copy)]
enum Choice {
    Space(TableKind, Mode),
    Peer(Peer),
}

impl Arguments {
    /// Every table in every mode, and then the peers.
    fn choices(&self) -> Vec<Choice> {
        let or = |chosen: &[TableKind], others: &[TableKind]| {
            if chosen.is_empty() { others.to_vec() } else { chosen.to_vec() }
        };
        let tables = or(&self.tables, if self.compare { &COMPARED } else { &COMPARED[..1] });
        let modes = match (self.modes.as_slice(), self.compare) {
            ([], true) => &[Mode::Strict, Mode::Deferred],
            ([], false) => [Mode::Strict].as_slice(),
            (modes, _) => modes,
        };
        let spaces =
            tables.into_iter().flat_map(|table| modes.iter().map(move |mode| Choice::Space(table, *mode)));
        spaces.chain(self.against.iter().copied().map(Choice::Peer)).collect()
    }

    fn options(&self, choice: Choice) -> Options {
        let (table, peer, mode) = match choice {
            Choice::Space(table, mode) => (table, None, mode),
            Choice::Peer(peer) => (TableKind::default(), Some(peer), Mode::Strict),
        };
        Options {
            table,
            peer,
            mode,
            threads: self.threads,
            speed: self.speed,
            strict_input: self.strict_input,
            disturbance: None,
            memory: self.memory.0,
        }
    }
}

/// What is compared unless other tables are asked for: one of each kind, the default first.
const COMPARED: [TableKind; 5] =
    [TableKind::Native, TableKind::VtdSecondStage, TableKind::AmdV1, TableKind::X86_64, TableKind::Sv48];

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

What is drawn is as wide as the text of an A4 page and needs no colours. Times are those of the recording, which are the same in every
replay; a point is a piece of it, 1/64 or less.

Examples:
  ioasid replay traces/boot-ext4-lazy.csv.zst
  ioasid replay --plot boot.svg traces/boot-ext4-lazy.csv.zst
  ioasid replay --compare --plot tables.svg traces/*.zst
  ioasid replay --compare --table native --table vtd --mode strict traces/nvme-rand4k-strict.csv.zst
  ioasid replay --table native --table vtd --table amdv1 --mode deferred --threads 2 traces/*.zst
  ioasid replay --compare --table native --against btree --against vm-memory --threads 2 traces/*.zst
  zstdcat my-vmm.csv.zst | ioasid replay --strict-input -
  ioasid replay --json traces/*.zst | jq -r '.[] | [.trace, .map.p99_nanoseconds] | @tsv'

Exit status:
  0  everything that the traces ask for was done, and every byte was right
  1  something was wrong, as it says: with a DMA, a map or unmap, or a file; with --strict-input, with a line
  2  bad usage";

/// What one replay gave.
#[derive(Debug, Serialize)]
struct Replayed {
    trace: String,
    #[serde(flatten)]
    report: Report,
}

impl Replayed {
    fn row(&self) -> Row<'_> {
        let label = format!("{} {}", self.report.table, self.report.mode);
        Row { trace: &self.trace, label, report: &self.report }
    }
}

/// Replays, prints and draws.
///
/// # Errors
/// A file cannot be opened or is no trace, standard output cannot be written, or the picture cannot.
pub(crate) fn replay(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let choices = arguments.choices();
    let misuse = |what: &str| {
        eprintln!("ioasid: {what}");
        Ok(ExitCode::from(crate::USAGE))
    };
    let from_input = arguments.traces.iter().filter(|trace| is_standard_input(trace)).count();
    if from_input > 1 || from_input == 1 && choices.len() > 1 {
        return misuse("standard input can be read once; name a file, or one table and mode and no peer");
    }
    if arguments.plot.is_some() && !arguments.compare && choices.len() * arguments.traces.len() > 1 {
        return misuse(
            "--plot draws one replay: name one trace, table and mode and no peer, or add --compare",
        );
    }
    let plot = arguments.plot.as_ref().map(PlotFile::open).transpose()?;
    let mut output = io::stdout();
    let palette = Palette::of(&output);
    let mut separator = "";
    let mut print = |text: &str| {
        let printed = output.write_all(format!("{separator}{text}").as_bytes()).context(CANNOT_PRINT);
        separator = "\n";
        printed
    };
    let mut all: Vec<Replayed> = Vec::new();
    for trace in &arguments.traces {
        let first = all.len();
        for choice in &choices {
            let report =
                replay_one(trace, *choice, arguments).with_context(|| trace.display().to_string())?;
            let replayed = Replayed { trace: trace.display().to_string(), report };
            // Of what is compared, only what went wrong is told at length.
            let is_told = !arguments.compare || !replayed.report.is_right();
            if is_told && !arguments.json {
                print(&text::describe(&replayed.trace, &replayed.report, palette))?;
            }
            all.push(replayed);
        }
        if arguments.compare && !arguments.json {
            let rows: Vec<Row<'_>> = all[first..].iter().map(Replayed::row).collect();
            print(&comparison::describe(&rows, palette))?;
        }
    }
    if arguments.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&all)?))?;
    }
    if let Some(plot) = plot {
        plot.write(&picture(&all, arguments.compare)?)?;
    }
    let right = all.iter().all(|replayed| replayed.report.is_right());
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::from(crate::FAILURE) })
}

/// Draws what came of it.
fn picture(all: &[Replayed], compare: bool) -> anyhow::Result<String> {
    match all {
        [replayed] if !compare => plot::draw_detail(&replayed.trace, &replayed.report),
        _ => {
            let rows: Vec<Row<'_>> = all.iter().map(Replayed::row).collect();
            let threads = rows.first().map_or(0, |row| row.report.threads);
            plot::draw_sides(
                &format!("Replays side by side, {}", text::counted(threads as u64, "thread")),
                &rows,
            )
        }
    }
}

const CANNOT_PRINT: &str = "cannot write to standard output";

fn is_standard_input(trace: &Path) -> bool {
    trace.as_os_str() == "-"
}

fn replay_one(trace: &Path, choice: Choice, arguments: &Arguments) -> anyhow::Result<Report> {
    let options = arguments.options(choice);
    let (source, length): (Box<dyn Read>, Option<u64>) = if is_standard_input(trace) {
        (Box::new(io::stdin().lock()), None)
    } else {
        let file = File::open(trace).context("cannot open it")?;
        let length = file.metadata().ok().filter(|metadata| metadata.is_file()).map(|file| file.len());
        (Box::new(file), length)
    };
    let name = options.peer.map_or(options.table.name(), Peer::name);
    let bar = progress(length)?.with_message(format!("{name} {}", options.mode));
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
