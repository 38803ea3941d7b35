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
    cell::RefCell,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
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

thread_local! {
    /// What the last panic of the thread said, and where.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A sequence takes some milliseconds. One that takes so long will not end.
const PATIENCE: Duration = Duration::from_secs(60);

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
    /// For each thread the sequence that it runs, as `next` counts them, and since when.
    running: Vec<Mutex<Option<(usize, Instant)>>>,
}

impl Work {
    fn new(arguments: &Arguments, tables: Vec<Box<dyn Table>>) -> Work {
        let numbers = match arguments.only {
            Some(number) => vec![number],
            None => (0..arguments.sequences.div_ceil(tables.len().max(1))).collect(),
        };
        let outcomes = tables.iter().map(|_| Mutex::default()).collect();
        let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let running = (0..threads).map(|_| Mutex::default()).collect();
        Work { seed: arguments.seed, tables, outcomes, numbers, next, stopped, running }
    }

    fn total(&self) -> usize {
        self.tables.len() * self.numbers.len()
    }

    /// Runs everything, and returns how long it took in seconds.
    fn run(&self, driver: &Path) -> Result<f64> {
        let began = Instant::now();
        // A panic of ours is a difference like any other, and is reported with what led to it.
        let hook = panic::take_hook();
        panic::set_hook(Box::new(|panic| PANIC.set(panic.to_string())));
        let results = thread::scope(|scope| {
            let start = |running| scope.spawn(move || self.work(driver, running));
            let threads: Vec<_> = self.running.iter().map(start).collect();
            self.show_progress(|| threads.iter().all(thread::ScopedJoinHandle::is_finished));
            threads.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
        });
        panic::set_hook(hook);
        for result in results {
            result.unwrap_or_else(|_| bail!("the comparison itself panicked"))?;
        }
        Ok(began.elapsed().as_secs_f64())
    }

    /// What each thread does, with a `gpdrive` of its own.
    fn work(&self, driver: &Path, running: &Mutex<Option<(usize, Instant)>>) -> Result<()> {
        let mut peer = Peer::start(driver)?;
        while !self.stopped.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.total() {
                break;
            }
            let (table, number) = self.place(index);
            *lock(running) = Some((index, Instant::now()));
            if self.outcome(table).failure.is_some() {
                continue;
            }
            if let Err(error) = self.sequence(table, number, driver, &mut peer) {
                self.stopped.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        *lock(running) = None;
        Ok(())
    }

    /// Which sequence of which table is the `index`th. Tables take turns, so that none is left for the end.
    fn place(&self, index: usize) -> (usize, usize) {
        (index % self.tables.len(), self.numbers[index / self.tables.len()])
    }

    /// Runs one sequence of one table. An error is one of the comparison itself.
    fn sequence(&self, index: usize, number: usize, driver: &Path, peer: &mut Peer) -> Result<()> {
        let table = self.tables[index].as_ref();
        let mut random = self.random(table, number);
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
    fn random(&self, table: &dyn Table, number: usize) -> Random {
        let next = |seed, value| Random::new(seed ^ value).next();
        let of_table = table.name().bytes().fold(self.seed, |seed, byte| next(seed, u64::from(byte)));
        Random::new(next(of_table, number as u64))
    }

    fn outcome(&self, table: usize) -> MutexGuard<'_, Outcome> {
        lock(&self.outcomes[table])
    }

    /// A bar on the terminal, if there is one, until everything has been run. Ends the program if something will never
    /// end.
    fn show_progress(&self, finished: impl Fn() -> bool) {
        let bar = ProgressBar::new(self.total() as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} sequences  (about {eta} left)")
        {
            bar.set_style(style);
        }
        while !finished() {
            thread::sleep(Duration::from_millis(100));
            bar.set_position(self.next.load(Ordering::Relaxed).min(self.total()) as u64);
            let endless = self.running.iter().find_map(|running| {
                lock(running).filter(|(_, since)| since.elapsed() > PATIENCE).map(|(index, _)| index)
            });
            if let Some((table, number)) = endless.map(|index| self.place(index)) {
                bar.finish_and_clear();
                // The thread cannot be ended, and nothing would be printed if we waited for it.
                let table = self.tables[table].as_ref();
                eprintln!("sequence {number} of {} does not end:", table.name());
                let operations = operations::sequence(&table.facts(), &mut self.random(table, number));
                operations.iter().for_each(|operation| eprintln!("  {operation}"));
                eprintln!("{}", again(self.seed, table.name(), number));
                std::process::exit(1);
            }
        }
        bar.finish_and_clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is consistent at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One run of a sequence; a panic of ours is a difference.
fn attempt(
    table: &dyn Table,
    operations: &[Operation],
    random: &Random,
    peer: &mut Peer,
) -> Result<Counts, Difference> {
    let run = AssertUnwindSafe(|| table.compare(operations, random.clone(), peer));
    panic::catch_unwind(run).unwrap_or_else(|_| {
        let what = format!("our side {}", PANIC.take().replace('\n', " "));
        Err(Difference { after: usize::MAX, what })
    })
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
    println!("  {}", again(arguments.seed, name, failure.number));
}

/// How to run a sequence again.
fn again(seed: u64, table: &str, number: usize) -> String {
    format!("again: cargo xtask generic-pt --seed {seed} --table {table} --only {number}")
}
