//! Our page tables against the kernel's own code: the same operations on both, and then the same question as ever, what
//! differs?
//!
//! ```text
//! kernel_source ─► build (peers/generic_pt) ─► gpdrive ◄── peer ◄─┐
//!                                                                 ├─ comparison ─► minimise ─► the report
//!                     operations ─► tables ─► ioasid-pagetable ◄──┘   entries
//! ```
//!
//! `peers/generic_pt` builds Linux' drivers/iommu/generic_pt as an ordinary program. That is the kernel's code, under
//! the kernel's licence, so it stays a program of its own: the comparison talks to it over pipes.

mod build;
mod comparison;
mod entries;
mod minimise;
mod operations;
mod peer;
mod tables;

use std::{
    any::Any,
    io::{IsTerminal, Write},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use self::{
    build::Flavour,
    comparison::{Counts, Difference},
    operations::{Operation, Random},
    peer::Peer,
    tables::Table,
};
use crate::kernel_source;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    kernel: kernel_source::Arguments,

    /// Build the programs of peers/generic_pt, print where they are, and compare nothing
    #[arg(long)]
    build: bool,

    /// What to build [default: all]
    #[arg(long, value_enum, requires = "build")]
    flavour: Vec<Flavour>,

    /// How many sequences to run, of all tables together
    #[arg(long, value_name = "NUMBER", default_value = "10000")]
    sequences: usize,

    /// Where the random numbers begin: the same seed gives the same sequences
    #[arg(long, value_name = "NUMBER", default_value = "1")]
    seed: u64,

    /// Compare only this table, as a report names it; repeatable
    #[arg(long = "table", value_name = "NAME")]
    tables: Vec<String>,

    /// Run only the sequence of this number, for each table
    #[arg(long, value_name = "NUMBER")]
    only: Option<usize>,

    /// Use this gpdrive instead of building one
    #[arg(long, value_name = "PROGRAM", conflicts_with = "build")]
    driver: Option<PathBuf>,

    /// Print the results as JSON
    #[arg(long, conflicts_with = "build")]
    json: bool,
}

/// The chore.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let tables = chosen(arguments)?;
    let driver = match &arguments.driver {
        Some(driver) => driver.clone(),
        None => {
            let kernel = kernel_source::fetch(&arguments.kernel, kernel_source::PREPARING)?;
            let all = [Flavour::Kernel, Flavour::User, Flavour::Check];
            let flavours = match (arguments.build, arguments.flavour.as_slice()) {
                (false, _) => &[Flavour::Check],
                (true, []) => &all[..],
                (true, some) => some,
            };
            let programs = build::programs(&kernel, flavours)?;
            if arguments.build {
                programs.iter().for_each(|program| println!("{}", program.display()));
                return Ok(());
            }
            programs.into_iter().next().context("nothing was built")?
        }
    };
    let offered = peer::formats(&mut Peer::start(&driver)?)?;
    if let Some(missing) = tables.iter().find(|table| !offered.iter().any(|name| name == table.name())) {
        bail!("{} has no {}", driver.display(), missing.name());
    }
    let work = Work::new(arguments, tables);
    let seconds = work.run(&driver)?;
    report(arguments, &work, seconds)
}

/// The tables that the arguments name.
fn chosen(arguments: &Arguments) -> Result<Vec<Box<dyn Table>>> {
    let mut tables = tables::all()?;
    for name in &arguments.tables {
        if !tables.iter().any(|table| table.name() == name) {
            let all: Vec<_> = tables.iter().map(|table| table.name()).collect();
            bail!("there is no table {name}, but there are {}", all.join(", "));
        }
    }
    if !arguments.tables.is_empty() {
        tables.retain(|table| arguments.tables.iter().any(|name| name == table.name()));
    }
    Ok(tables)
}

/// A sequence that failed.
#[derive(Debug)]
struct Failure {
    number: usize,
    operations: Vec<Operation>,
    difference: Difference,
}

/// What is known of one table.
#[derive(Debug, Default)]
struct Outcome {
    counts: Counts,
    failure: Option<Failure>,
}

/// All that has to be run, shared by the threads that do.
struct Work {
    seed: u64,
    tables: Vec<Box<dyn Table>>,
    /// One for each table. After a failure nothing more is run of the table.
    outcomes: Vec<Mutex<Outcome>>,
    /// Numbers of the sequences of each table.
    numbers: Vec<usize>,
    next: AtomicUsize,
    stopped: AtomicBool,
}

impl Work {
    fn new(arguments: &Arguments, tables: Vec<Box<dyn Table>>) -> Work {
        let numbers = match arguments.only {
            Some(number) => vec![number],
            None => (0..arguments.sequences.div_ceil(tables.len().max(1))).collect(),
        };
        let outcomes = tables.iter().map(|_| Mutex::default()).collect();
        let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
        Work { seed: arguments.seed, tables, outcomes, numbers, next, stopped }
    }

    fn total(&self) -> usize {
        self.tables.len() * self.numbers.len()
    }

    /// Runs everything, and returns how long it took in seconds.
    fn run(&self, driver: &Path) -> Result<f64> {
        let began = Instant::now();
        // A panic of ours is a difference like any other, and is reported with what led to it.
        let hook = panic::take_hook();
        panic::set_hook(Box::new(|_| {}));
        let results = thread::scope(|scope| {
            let count = thread::available_parallelism().map_or(1, usize::from);
            let threads: Vec<_> = (0..count).map(|_| scope.spawn(|| self.work(driver))).collect();
            self.show_progress(|| threads.iter().all(thread::ScopedJoinHandle::is_finished));
            threads.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
        });
        panic::set_hook(hook);
        for result in results {
            result.unwrap_or_else(|panic| bail!("a thread panicked: {}", message(panic.as_ref())))?;
        }
        Ok(began.elapsed().as_secs_f64())
    }

    /// What each thread does, with a `gpdrive` of its own.
    fn work(&self, driver: &Path) -> Result<()> {
        let mut peer = Peer::start(driver)?;
        while !self.stopped.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.total() {
                break;
            }
            // Tables take turns, so that none is left for the end.
            let (table, number) = (index % self.tables.len(), self.numbers[index / self.tables.len()]);
            if self.outcome(table).failure.is_some() {
                continue;
            }
            if let Err(error) = self.sequence(table, number, driver, &mut peer) {
                self.stopped.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Runs one sequence of one table. An error is one of the comparison itself.
    fn sequence(&self, index: usize, number: usize, driver: &Path, peer: &mut Peer) -> Result<()> {
        let table = self.tables[index].as_ref();
        let mut random = Random::new(self.seed_of(table, number));
        let operations = operations::sequence(&table.facts(), &mut random);
        let difference = match attempt(table, &operations, &random, peer) {
            Ok(counts) => {
                self.outcome(index).counts.add(&counts);
                return Ok(());
            }
            Err(difference) => difference,
        };
        if self.outcome(index).failure.is_some() {
            return Ok(());
        }
        // After a difference nobody knows what the kernel's side is at.
        *peer = Peer::start(driver)?;
        let mut trouble = None;
        let (operations, difference) = minimise::minimise(operations, difference, |fewer| {
            let difference = attempt(table, fewer, &random, peer).err()?;
            match Peer::start(driver) {
                Ok(fresh) => *peer = fresh,
                Err(error) => trouble = Some(error),
            }
            Some(difference)
        });
        if let Some(error) = trouble {
            return Err(error);
        }
        let mut outcome = self.outcome(index);
        if outcome.failure.as_ref().is_none_or(|failure| failure.number > number) {
            outcome.failure = Some(Failure { number, operations, difference });
        }
        Ok(())
    }

    /// A sequence depends on the seed, the table and the number, and on nothing that ran before.
    fn seed_of(&self, table: &dyn Table, number: usize) -> u64 {
        let name =
            table.name().bytes().fold(self.seed, |seed, byte| Random::new(seed ^ u64::from(byte)).next());
        Random::new(name ^ number as u64).next()
    }

    fn outcome(&self, table: usize) -> std::sync::MutexGuard<'_, Outcome> {
        self.outcomes[table].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line on the terminal, if there is one, until everything has been run.
    fn show_progress(&self, finished: impl Fn() -> bool) {
        const WIDTH: usize = 40;
        let mut stderr = std::io::stderr();
        let shows = stderr.is_terminal();
        while !finished() {
            thread::sleep(Duration::from_millis(100));
            if shows {
                let (done, total) = (self.next.load(Ordering::Relaxed).min(self.total()), self.total());
                let filled = done * WIDTH / total.max(1);
                let bar = "#".repeat(filled) + &".".repeat(WIDTH - filled);
                // Whoever does not see it misses nothing.
                let _ = write!(stderr, "\r[{bar}] {done} of {total} sequences");
                let _ = stderr.flush();
            }
        }
        if shows {
            let _ = write!(stderr, "\r{:WIDTH$}{:40}\r", "", "");
        }
    }
}

/// One run of a sequence; a panic of ours is a difference.
fn attempt(
    table: &dyn Table,
    operations: &[Operation],
    random: &Random,
    peer: &mut Peer,
) -> Result<Counts, Difference> {
    let run = AssertUnwindSafe(|| table.compare(operations, random.clone(), peer));
    panic::catch_unwind(run).unwrap_or_else(|panic| {
        let what = format!("our side panicked: {}", message(panic.as_ref()));
        Err(Difference { after: usize::MAX, what })
    })
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a word")
}

fn report(arguments: &Arguments, work: &Work, seconds: f64) -> Result<()> {
    let mut sum = Counts::default();
    let mut rows = Vec::new();
    let mut failed = 0;
    for (index, table) in work.tables.iter().enumerate() {
        let outcome = work.outcome(index);
        let counts = outcome.counts;
        sum.add(&counts);
        failed += usize::from(outcome.failure.is_some());
        if arguments.json {
            let failure = outcome.failure.as_ref().map(|failure| {
                let operations: Vec<_> = failure.operations.iter().map(Operation::to_string).collect();
                json!({ "number": failure.number, "operations": operations, "what": failure.difference.what })
            });
            rows.push(json!({ "table": table.name(), "counts": counts, "failure": failure }));
            continue;
        }
        println!("{:<14} {}", table.name(), line(&counts));
        if let Some(failure) = &outcome.failure {
            show_failure(arguments, table.name(), failure);
        }
    }
    if arguments.json {
        let all = json!({ "seed": arguments.seed, "seconds": seconds, "tables": rows, "sum": sum });
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        println!("{:<14} {}; {seconds:.1} s", "all", line(&sum));
    }
    if failed > 0 {
        bail!("{failed} tables differ from the kernel's");
    }
    Ok(())
}

fn line(counts: &Counts) -> String {
    format!(
        "{:>6} sequences, {:>6} operations ({} refused, {} of them by us alone; {} breaks), {:>7} walks; {:>5} alike in \
         {:>8} entries, {} and {} table pages",
        counts.sequences,
        counts.operations,
        counts.refused,
        counts.overlooked,
        counts.breaks,
        counts.walks,
        counts.alike,
        counts.entries,
        counts.our_tables,
        counts.kernel_tables,
    )
}

fn show_failure(arguments: &Arguments, name: &str, failure: &Failure) {
    println!("  sequence {} differs; what is left of it:", failure.number);
    for (number, operation) in failure.operations.iter().enumerate() {
        println!("    {:>2}. {operation}", number + 1);
    }
    match failure.difference.after {
        usize::MAX => println!("  {}", failure.difference.what),
        after => println!("  after {after}: {}", failure.difference.what),
    }
    println!(
        "  again: cargo xtask generic-pt --seed {} --table {name} --only {}",
        arguments.seed, failure.number
    );
}
