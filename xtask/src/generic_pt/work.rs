//! Running many sequences, on all processors, and catching what goes wrong in them: differences, panics, and what never
//! ends.

use std::{
    cell::RefCell,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    comparison::{Counts, Difference},
    minimise,
    operations::{self, Operation, Random},
    peer::Peer,
    report::again,
    tables::Table,
};

/// A sequence that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) number: usize,
    pub(crate) operations: Vec<Operation>,
    pub(crate) difference: Difference,
}

/// What is known of one table.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) counts: Counts,
    pub(crate) failure: Option<Failure>,
}

thread_local! {
    /// What the last panic of the thread said, and where.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// A sequence takes some milliseconds. One that takes so long will not end.
const PATIENCE: Duration = Duration::from_secs(60);

/// All that has to be run, shared by the threads that do.
pub(crate) struct Work {
    pub(crate) seed: u64,
    pub(crate) tables: Vec<Box<dyn Table>>,
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
    pub(crate) fn new(seed: u64, numbers: Vec<usize>, tables: Vec<Box<dyn Table>>) -> Work {
        let outcomes = tables.iter().map(|_| Mutex::default()).collect();
        let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let running = (0..threads).map(|_| Mutex::default()).collect();
        Work { seed, tables, outcomes, numbers, next, stopped, running }
    }

    fn total(&self) -> usize {
        self.tables.len() * self.numbers.len()
    }

    /// Runs everything, and returns how long it took in seconds.
    pub(crate) fn run(&self, driver: &Path) -> Result<f64> {
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

    pub(crate) fn outcome(&self, table: usize) -> MutexGuard<'_, Outcome> {
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
