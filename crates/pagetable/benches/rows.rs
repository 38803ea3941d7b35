//! The rows in which page-table libraries are compared: one line per format and operation.
//!
//! ```text
//! cargo bench -p ioasid-pagetable --bench rows -- --format vtdss
//! ```
//!
//! `cargo xtask bench pagetable --peer PROGRAM` runs this program and others that print the same lines, in turn, and
//! shows the ratios. A row means the same workload everywhere: the same addresses, in the same order, as many times,
//! with the same pauses of the clock. So what is here follows a definition and is not tuned to this crate; what each
//! operation does stands at [`Subject::measure`].
//!
//! Every operation is a call of its own that is not inlined into the loop, as it would be from a program that picks
//! the format at run time. All answers are checked, and a wrong one ends the program. Maps share a [`Gather`], in
//! which they must leave nothing; an unmap has one of its own and frees, in the measured time, the tables that it
//! retired.
//!
//! Table pages come from an [`Arena`], unless `--memory heap` asks for [`HeapTables`]: what an allocator costs is another
//! question. The arena's pages have been touched before, and lie in large pages as far as the system gives them.
//!
//! A row's time is the median over its passes, and the lowest of these over the rounds. The formats that claim
//! ([`Claiming`]) have rows of their own, so that the price of arbitration can be seen.
//!
//! Without `--bench`, as `cargo test --benches` calls it, everything runs once, for the checks alone.

use ioasid_pagetable::{
    AmdV1, Attributes, ClaimFormat, DirtyBitmap, Format, Gather, HeapTables, IovaRange, Native, Oa,
    OutOfTables, PageSize, Radix, RiscV, TableLayout, TableMemory, VtdSecondStage, X86_64,
};
use std::alloc::{Layout, alloc};
use std::cell::RefCell;
use std::fmt::Display;
use std::hint::{black_box, spin_loop};
use std::marker::PhantomData;
use std::process::exit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::thread;
use std::time::Instant;

const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
const SIZE_4K: u64 = 1 << 12;
const SIZE_2M: u64 = 1 << 21;
const SIZE_1G: u64 = 1 << 30;
/// Where every workload begins.
const IOVA: u64 = 0x10_0000_0000;
/// What that is mapped to, plus the skew that keeps larger leaves from fitting.
const OA: u64 = 0x80_0000_0000;

const USAGE: &str = "\
What mapping, unmapping and looking up cost, one line per format and operation.

Usage: cargo bench -p ioasid-pagetable --bench rows -- [OPTIONS]

Options:
      --format NAME  Only this format (may be given several times)
      --op PART      Only operations whose name contains PART
      --rounds N     Repeat everything N times and print each row's best round [default: 5]
      --memory KIND  Table pages from `arena` (touched before, no lock) or `heap` (HeapTables) [default: arena]
      --tables       Print table pages in place of times: `#tables,FORMAT,OP,PAGES` (the most in use at once,
                     the root included) and `#allocated,FORMAT,OP,PAGES_PER_CALL`
      --threads      Compare two threads on one table with two threads on a table each, and with one thread alone:
                     `#two_threads,FORMAT,OP,ONE_TABLE,TWO_TABLES,ALONE,RATIO` (calls per microsecond, and
                     the median ratio of one table's to two tables')
      --list         Print the names of formats and operations
      --help         Print this
";

/// How an operation arbitrates with others: the two modes of the crate.
trait Mode<F: Format>: 'static {
    fn map<M: TableMemory<AtomicU64>>(
        radix: &Radix<F, M>,
        range: IovaRange,
        oa: Oa,
        gather: &mut Gather<M, AtomicU64>,
    ) -> bool;

    /// `true` if all of the range was mapped.
    fn unmap<M: TableMemory<AtomicU64>>(
        radix: &Radix<F, M>,
        range: IovaRange,
        gather: &mut Gather<M, AtomicU64>,
    ) -> bool;
}

/// The caller has the range to himself.
struct Exclusive;

impl<F: Format> Mode<F> for Exclusive {
    fn map<M: TableMemory<AtomicU64>>(
        radix: &Radix<F, M>,
        range: IovaRange,
        oa: Oa,
        gather: &mut Gather<M, AtomicU64>,
    ) -> bool {
        radix.map(range, oa, READ_WRITE, gather).is_ok()
    }

    fn unmap<M: TableMemory<AtomicU64>>(
        radix: &Radix<F, M>,
        range: IovaRange,
        gather: &mut Gather<M, AtomicU64>,
    ) -> bool {
        radix.unmap(range, gather).is_ok() && Some(gather.runs.bytes()) == range.length()
    }
}

/// Each entry is claimed before it is changed. There is nothing to be done between the two steps here.
struct Claiming;

impl<F: ClaimFormat> Mode<F> for Claiming {
    fn map<M: TableMemory<AtomicU64>>(
        radix: &Radix<F, M>,
        range: IovaRange,
        oa: Oa,
        gather: &mut Gather<M, AtomicU64>,
    ) -> bool {
        let claimed = radix.claim(range, oa, READ_WRITE, gather).is_ok();
        if claimed {
            radix.publish(range);
        }
        claimed
    }

    fn unmap<M: TableMemory<AtomicU64>>(
        radix: &Radix<F, M>,
        range: IovaRange,
        gather: &mut Gather<M, AtomicU64>,
    ) -> bool {
        let retracted = radix.retract(range, gather).is_ok();
        let runs = std::mem::take(&mut gather.runs);
        for run in runs.iter() {
            radix.release(run, gather);
        }
        retracted && Some(runs.bytes()) == range.length()
    }
}

/// Frees what an operation retired.
///
/// # Safety
///
/// No other operation is in the table, nor a walk.
unsafe fn free_retired<M: TableMemory<AtomicU64>>(gather: Gather<M, AtomicU64>) {
    for table in gather.retired {
        // SAFETY: nobody is in the table.
        unsafe { table.free() };
    }
}

/// `length` bytes from `first` on. All of the workloads lie below 2^40.
#[inline(always)]
fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap_or(IovaRange::ALL)
}

#[inline(never)]
fn map_one<F: Format, D: Mode<F>, M: TableMemory<AtomicU64>>(
    radix: &Radix<F, M>,
    first: u64,
    oa: u64,
    length: u64,
    gather: &mut Gather<M, AtomicU64>,
) -> bool {
    D::map(radix, range(first, length), Oa::new(oa), gather)
}

#[inline(never)]
fn unmap_one<F: Format, D: Mode<F>, M: TableMemory<AtomicU64>>(
    radix: &Radix<F, M>,
    first: u64,
    length: u64,
) -> bool {
    let mut gather = Gather::new();
    let unmapped = D::unmap(radix, range(first, length), &mut gather);
    if !gather.retired.is_empty() {
        // SAFETY: one thread at a time uses the tables that this function unmaps in.
        unsafe { free_retired(gather) };
    }
    unmapped
}

/// What an address is mapped to; 0 if it is not.
#[inline(never)]
fn look_up<F: Format, M: TableMemory<AtomicU64>>(radix: &Radix<F, M>, iova: u64) -> u64 {
    radix.walk(iova).map_or(0, |leaf| leaf.output(iova).get())
}

/// Calls at ascending addresses; how many failed. So do the functions that follow.
#[inline(never)]
fn map_many<F: Format, D: Mode<F>, M: TableMemory<AtomicU64>>(
    radix: &Radix<F, M>,
    mut first: u64,
    mut oa: u64,
    length: u64,
    calls: u64,
) -> u64 {
    let (mut failed, mut gather) = (0, Gather::new());
    for _ in 0..calls {
        failed += u64::from(!map_one::<F, D, M>(radix, first, oa, length, &mut gather));
        first += length;
        oa += length;
    }
    failed + gather.retired.len() as u64
}

#[inline(never)]
fn unmap_many<F: Format, D: Mode<F>, M: TableMemory<AtomicU64>>(
    radix: &Radix<F, M>,
    mut first: u64,
    length: u64,
    calls: u64,
) -> u64 {
    let mut failed = 0;
    for _ in 0..calls {
        failed += u64::from(!unmap_one::<F, D, M>(radix, first, length));
        first += length;
    }
    failed
}

/// The same page mapped and unmapped again and again.
#[inline(never)]
fn pair_many<F: Format, D: Mode<F>, M: TableMemory<AtomicU64>>(radix: &Radix<F, M>, calls: u64) -> u64 {
    let (mut failed, mut gather) = (0, Gather::new());
    for _ in 0..calls {
        failed += u64::from(!map_one::<F, D, M>(radix, IOVA, OA, SIZE_4K, &mut gather));
        failed += u64::from(!unmap_one::<F, D, M>(radix, IOVA, SIZE_4K));
    }
    failed + gather.retired.len() as u64
}

/// One page in each 2 MiB.
#[inline(never)]
fn new_table_many<F: Format, D: Mode<F>, M: TableMemory<AtomicU64>>(radix: &Radix<F, M>, calls: u64) -> u64 {
    let (mut failed, mut gather) = (0, Gather::new());
    for call in 0..calls {
        let page = OA + call * SIZE_4K;
        failed += u64::from(!map_one::<F, D, M>(radix, IOVA + call * SIZE_2M, page, SIZE_4K, &mut gather));
    }
    failed + gather.retired.len() as u64
}

/// An address in each of `1 << bits` leaves of `1 << shift` bytes comes from the top bits of a linear congruential
/// generator, and may or may not depend on the answer before: what look-ups cost that can, or cannot, overlap.
#[inline(never)]
fn look_up_many<F: Format, M: TableMemory<AtomicU64>>(
    radix: &Radix<F, M>,
    shift: u32,
    bits: u32,
    dependent: bool,
    skew: u64,
) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let (mut failed, mut answer) = (0, 0);
    for _ in 0..LOOK_UPS {
        state =
            (state ^ answer).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let iova = IOVA + ((state >> (64 - bits)) << shift) + 0x128;
        let oa = look_up(radix, iova);
        failed += u64::from(oa != iova + (OA + skew - IOVA));
        if dependent {
            answer = oa;
        }
    }
    failed
}

const LOOK_UPS: u64 = 1 << 20;

/// A pair of rows of one workload: `calls` ascending mappings of `pages` leaves each, then as many unmappings, on a
/// table that stays.
struct Workload {
    name: &'static str,
    page: u64,
    pages: u64,
    calls: u64,
    /// Added to the output address so that nothing larger than `page` fits.
    skew: u64,
    passes: i32,
}

const fn workload(name: &'static str, page: u64, pages: u64, calls: u64, skew: u64, passes: i32) -> Workload {
    Workload { name, page, pages, calls, skew, passes }
}

const WORKLOADS: [Workload; 6] = [
    workload("1x4K", SIZE_4K, 1, 4096, 0, 41),
    workload("256x4K", SIZE_4K, 256, 64, SIZE_4K, 101),
    workload("1x2M", SIZE_2M, 1, 4096, 0, 41),
    workload("256x2M", SIZE_2M, 256, 16, SIZE_2M, 101),
    workload("1x1G", SIZE_1G, 1, 256, 0, 101),
    workload("1G_as_4K", SIZE_4K, 262_144, 1, SIZE_4K, 11),
];

/// Rows of reading and clearing dirty pages: whether any are dirty, and whether they go into a bitmap.
const DIRTY_ROWS: [(&str, bool, bool); 3] = [
    ("dirty_scan_clean_1G_4K", false, false),
    ("dirty_rc_all_1G_4K_count", true, false),
    ("dirty_rc_all_1G_4K_bitmap", true, true),
];

/// The look-ups: name, leaf size and number of leaves as logarithms.
const LOOK_UP_ROWS: [(&str, u32, u32); 2] =
    [("iova_to_phys_rand_1Mx4K", 12, 20), ("iova_to_phys_rand_4096x2M", 21, 12)];

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Times,
    Tables,
    Threads,
}

/// Where table pages come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    Arena,
    Heap,
}

struct Arguments {
    what: What,
    memory: Memory,
    formats: Vec<String>,
    op: String,
    rounds: usize,
    list: bool,
    /// Run everything once, for the checks alone.
    once: bool,
}

/// The times of one row's passes, and what they allocated.
#[derive(Default)]
struct Series {
    nanoseconds: Vec<f64>,
    allocated: u64,
    calls: u64,
}

struct Row {
    format: &'static str,
    op: String,
    pages_per_call: u64,
    /// Of each round, per call.
    medians: Vec<f64>,
    tables: u64,
    allocated_per_call: f64,
}

/// Measures passes and keeps the rows.
struct Bench {
    arguments: Arguments,
    clock_cost: f64,
    rows: Vec<Row>,
}

impl Bench {
    fn wants(&self, op: &str) -> bool {
        op.contains(&self.arguments.op)
    }

    /// The numbers of a workload's passes; negative ones warm up and do not count.
    fn passes(&self, warm_up: i32, passes: i32) -> std::ops::Range<i32> {
        match self.arguments {
            Arguments { once: true, .. } => 0..1,
            Arguments { what: What::Tables, .. } => -1..1,
            _ => -warm_up..passes,
        }
    }

    /// Times one pass, which returns how many of its calls failed.
    fn pass(&self, series: &mut Series, pass: i32, calls: u64, run: impl FnOnce() -> u64) {
        let allocated = ALLOCATED.load(Relaxed);
        let start = Instant::now();
        let failed = run();
        let nanoseconds = start.elapsed().as_nanos() as f64 - self.clock_cost;
        if failed > 0 {
            fail(format_args!("{failed} of {calls} calls gave a wrong answer"));
        }
        if pass >= 0 {
            series.nanoseconds.push(nanoseconds);
            series.allocated += ALLOCATED.load(Relaxed) - allocated;
            series.calls += calls;
        }
    }

    /// Adds a round to a row.
    fn row(&mut self, format: &'static str, op: &str, mut series: Series, calls: u64, pages_per_call: u64) {
        if series.nanoseconds.is_empty() || !self.wants(op) {
            return;
        }
        let median = median(&mut series.nanoseconds) / calls as f64;
        let tables = MOST.load(Relaxed);
        let allocated_per_call = series.allocated as f64 / series.calls as f64;
        match self.rows.iter_mut().find(|row| row.format == format && row.op == op) {
            Some(row) => row.medians.push(median),
            None => self.rows.push(Row {
                format,
                op: op.to_owned(),
                pages_per_call,
                medians: vec![median],
                tables,
                allocated_per_call,
            }),
        }
    }

    fn print(&self) {
        match self.arguments.what {
            What::Times => {
                println!("format,op,ns_per_call,ns_per_page");
                for row in &self.rows {
                    let best = row.medians.iter().copied().fold(f64::INFINITY, f64::min);
                    println!("{},{},{best:.2},{:.3}", row.format, row.op, best / row.pages_per_call as f64);
                }
            }
            What::Tables => {
                for Row { format, op, tables, allocated_per_call, .. } in &self.rows {
                    println!("#tables,{format},{op},{tables}");
                    println!("#allocated,{format},{op},{allocated_per_call:.4}");
                }
            }
            What::Threads => {}
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn fail(message: impl Display) -> ! {
    eprintln!("rows: {message}");
    exit(1);
}

/// A format in a mode, whichever it is.
trait Subject {
    fn name(&self) -> &'static str;

    /// All rows, once: one round.
    ///
    /// | operation | a pass |
    /// |-----------|--------|
    /// | `map_`, `unmap_` and what a call maps | [`WORKLOADS`] at ascending addresses; the tables are there already, but for `1G_as_4K`, which makes and frees 513 of them |
    /// | `mapunmap_1x4K_hot` | 4096 pairs at one address |
    /// | `map_1x4K_newtable` | 2048 calls, 2 MiB apart in an empty table: each makes a table |
    /// | `iova_to_phys_rand_` and the leaves | 2^20 look-ups; `_dep`: each address depends on the last answer |
    fn measure(&self, bench: &mut Bench);

    /// Two threads on one table beside two threads on a table each.
    fn two_threads(&self, bench: &Bench);
}

struct Candidate<F, D> {
    name: &'static str,
    format: F,
    mode: PhantomData<D>,
    /// Whether hardware that walks the tables would snoop.
    coherent: bool,
}

/// A format as a subject of measurements.
fn subject<F: Format, D: Mode<F>>(name: &'static str, _mode: D, format: Option<F>) -> Box<dyn Subject> {
    match format {
        Some(format) => {
            Box::new(Candidate::<F, D> { name, format, mode: PhantomData, coherent: !name.ends_with("_nc") })
        }
        None => fail(format_args!("there is no format {name} of these dimensions")),
    }
}

/// Every format, by the name it has in all programs that print these rows. All have 48 bits of IOVA and four levels, but
/// for `amdv1_3l`, which begins with three, and the native one, which has 64 bits and begins with four levels.
fn subjects() -> Vec<Box<dyn Subject>> {
    vec![
        subject("vtdss", Exclusive, VtdSecondStage::new(4)),
        subject("amdv1", Exclusive, AmdV1::new().with_top_levels(4..=4)),
        subject("x86_64", Exclusive, X86_64::new(4)),
        subject("riscv64", Exclusive, RiscV::new(4)),
        subject("amdv1_3l", Exclusive, AmdV1::new().with_top_levels(3..=4)),
        #[cfg(target_arch = "x86_64")]
        subject("vtdss_nc", Exclusive, VtdSecondStage::new(4)),
        #[cfg(target_arch = "x86_64")]
        subject("x86_64_nc", Exclusive, X86_64::new(4)),
        subject("native", Exclusive, Some(Native::new())),
        subject("native_claimed", Claiming, Some(Native::new())),
    ]
}

impl<F: Format, D: Mode<F>> Subject for Candidate<F, D> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn measure(&self, bench: &mut Bench) {
        match bench.arguments.memory {
            #[cfg(target_arch = "x86_64")]
            _ if !self.coherent => self.measure_with::<IncoherentArena>(bench),
            Memory::Arena => self.measure_with::<Arena>(bench),
            Memory::Heap => self.measure_with::<HeapTables>(bench),
        }
    }

    fn two_threads(&self, bench: &Bench) {
        if !self.coherent {
            return;
        }
        for (op, length, calls, repetitions) in
            [("mapunmap_1x4K", SIZE_4K, 512, 32), ("mapunmap_256x4K", 256 * SIZE_4K, 8, 32)]
        {
            if bench.wants(op) {
                self.compare_threads(bench, op, Pairs { length, calls, repetitions });
            }
        }
    }
}

impl<F: Format, D: Mode<F>> Candidate<F, D> {
    fn measure_with<M: TableMemory<AtomicU64> + Default>(&self, bench: &mut Bench) {
        for workload in &WORKLOADS {
            self.map_and_unmap::<M>(bench, workload);
        }
        self.pairs::<M>(bench);
        self.new_tables::<M>(bench);
        for (op, shift, bits) in LOOK_UP_ROWS {
            self.look_ups::<M>(bench, op, shift, bits);
        }
        self.dirty_pages::<M>(bench);
    }

    /// An empty table, from which the count of table pages starts anew.
    fn fresh<M: TableMemory<AtomicU64> + Default>(&self) -> Radix<F, M> {
        MOST.store(0, Relaxed);
        Radix::new(self.format.clone(), M::default())
    }

    /// A table in which one range is mapped in leaves of `page` bytes.
    fn filled<M: TableMemory<AtomicU64> + Default>(&self, length: u64, page: u64) -> Radix<F, M> {
        let radix = self.fresh::<M>();
        if map_many::<F, D, M>(&radix, IOVA, OA + page, length, 1) != 0
            || radix.walk(IOVA).map(|leaf| leaf.size.bytes()) != Ok(page)
        {
            fail(format_args!("{}: {length:#x} bytes cannot be mapped in leaves of {page:#x}", self.name));
        }
        radix
    }

    fn map_and_unmap<M: TableMemory<AtomicU64> + Default>(&self, bench: &mut Bench, workload: &Workload) {
        let &Workload { name, page, pages, calls, skew, passes } = workload;
        let (map, unmap) = (format!("map_{name}"), format!("unmap_{name}"));
        if !bench.wants(&map) && !bench.wants(&unmap) {
            return;
        }
        let length = page * pages;
        let radix = self.fresh::<M>();
        let (mut mapping, mut unmapping) = (Series::default(), Series::default());
        for pass in bench.passes(5, passes) {
            bench.pass(&mut mapping, pass, calls, || {
                map_many::<F, D, M>(&radix, IOVA, OA + skew, length, calls)
            });
            bench.pass(&mut unmapping, pass, calls, || unmap_many::<F, D, M>(&radix, IOVA, length, calls));
        }
        drop(radix);
        bench.row(self.name, &map, mapping, calls, pages);
        bench.row(self.name, &unmap, unmapping, calls, pages);
    }

    fn pairs<M: TableMemory<AtomicU64> + Default>(&self, bench: &mut Bench) {
        const CALLS: u64 = 4096;
        let op = "mapunmap_1x4K_hot";
        if !bench.wants(op) {
            return;
        }
        let radix = self.fresh::<M>();
        let mut series = Series::default();
        for pass in bench.passes(5, 41) {
            bench.pass(&mut series, pass, CALLS, || pair_many::<F, D, M>(&radix, CALLS));
        }
        bench.row(self.name, op, series, CALLS, 1);
    }

    fn new_tables<M: TableMemory<AtomicU64> + Default>(&self, bench: &mut Bench) {
        const CALLS: u64 = 2048;
        let op = "map_1x4K_newtable";
        if !bench.wants(op) {
            return;
        }
        let mut series = Series::default();
        for pass in bench.passes(3, 7) {
            let radix = self.fresh::<M>();
            bench.pass(&mut series, pass, CALLS, || new_table_many::<F, D, M>(&radix, CALLS));
            // Others make the root with the table, we with the first mapping.
            series.allocated = series.allocated.saturating_sub(1);
        }
        bench.row(self.name, op, series, CALLS, 1);
    }

    fn look_ups<M: TableMemory<AtomicU64> + Default>(
        &self,
        bench: &mut Bench,
        op: &str,
        shift: u32,
        bits: u32,
    ) {
        let dependent_op = format!("{op}_dep");
        if !bench.wants(&dependent_op) {
            return;
        }
        let page = 1 << shift;
        let radix = self.filled::<M>(page << bits, page);
        for (op, dependent) in [(op, false), (dependent_op.as_str(), true)] {
            if !bench.wants(op) {
                continue;
            }
            let mut series = Series::default();
            for pass in bench.passes(1, 3) {
                bench
                    .pass(&mut series, pass, LOOK_UPS, || look_up_many(&radix, shift, bits, dependent, page));
            }
            bench.row(self.name, op, series, LOOK_UPS, 1);
        }
    }

    /// Dirty pages of 1 GiB read and cleared: none are, all are and are counted, all are and go into a bitmap.
    fn dirty_pages<M: TableMemory<AtomicU64> + Default>(&self, bench: &mut Bench) {
        const PAGES: u64 = SIZE_1G / SIZE_4K;
        if self.format.dirty_bit() == 0
            || !self.coherent
            || !DIRTY_ROWS.iter().any(|(op, ..)| bench.wants(op))
        {
            return;
        }
        let radix = self.filled::<M>(SIZE_1G, SIZE_4K);
        let all = range(IOVA, SIZE_1G);
        radix.read_and_clear_dirty(all, |_| {});
        let mut words = vec![0; (PAGES / 64) as usize];
        for (op, dirty, into_bitmap) in DIRTY_ROWS {
            if !bench.wants(op) {
                continue;
            }
            let mut series = Series::default();
            for pass in bench.passes(2, 5) {
                for page in 0..if dirty { PAGES } else { 0 } {
                    let _ = radix.mark(IOVA + page * SIZE_4K, Attributes::USED);
                }
                words.fill(0);
                let mut count = 0;
                bench.pass(&mut series, pass, 1, || {
                    let mut bitmap = DirtyBitmap::new(&mut words, IOVA, PageSize::SIZE_4K);
                    if into_bitmap {
                        radix.read_and_clear_dirty(all, |dirty| bitmap.set(dirty));
                    } else {
                        radix.read_and_clear_dirty(all, |dirty| {
                            count += dirty.length().unwrap_or(0) / SIZE_4K;
                        });
                    }
                    0
                });
                let marked = words.iter().map(|word: &u64| u64::from(word.count_ones())).sum::<u64>() + count;
                if marked != if dirty { PAGES } else { 0 } {
                    fail(format_args!("{},{op}: {marked} pages were dirty", self.name));
                }
            }
            bench.row(self.name, op, series, 1, PAGES);
        }
    }

    fn compare_threads(&self, bench: &Bench, op: &str, pairs: Pairs) {
        // Which lines of the caches the tables share is a matter of luck, so there are many sets of tables, and all the
        // earlier ones stay where they are.
        let (sets, samples) = if bench.arguments.once { (1, 1) } else { (8 * bench.arguments.rounds, 10) };
        let (mut rates, mut ratios) = ([const { Vec::new() }; 3], Vec::new());
        let mut earlier = Vec::new();
        for set in 0..sets {
            let mut tables = [(); 3].map(|()| self.fresh::<HeapTables>());
            // Or else each set would be laid out like the one before.
            for place in 0..set as u64 % 8 {
                map_one::<F, D, _>(
                    &tables[0],
                    IOVA + 64 * SIZE_1G + place * SIZE_2M,
                    OA,
                    SIZE_4K,
                    &mut Gather::new(),
                );
            }
            if set % 2 == 1 {
                tables.reverse();
            }
            for sample in 0..samples + 1 {
                let sampled = sample_threads::<F, D>(&tables, sample % 2 == 0, pairs);
                // The first one makes the tables.
                if sample > 0 {
                    rates.iter_mut().zip(sampled).for_each(|(rates, rate)| rates.push(rate));
                    ratios.push(sampled[0] / sampled[1]);
                }
            }
            earlier.push(tables);
        }
        let ([together, apart, alone], ratio) =
            (rates.map(|mut rates| median(&mut rates)), median(&mut ratios));
        println!("#two_threads,{},{op},{together:.2},{apart:.2},{alone:.2},{ratio:.3}", self.name);
    }
}

/// The rates of two threads on the first table, of two on the others, and of one by itself. One after the other, and in
/// either order, so that whatever else the machine does meets all of them.
fn sample_threads<F: Format, D: Mode<F>>(tables: &[Radix<F>; 3], in_order: bool, pairs: Pairs) -> [f64; 3] {
    // Each in a gigabyte of its own, so that the threads share the upper tables and no leaf table.
    let places = [IOVA, IOVA + 4 * SIZE_1G];
    let [one, other, another] = tables;
    let together = || in_threads::<F, D>(&[(one, places[0]), (one, places[1])], pairs);
    let apart = || in_threads::<F, D>(&[(other, places[0]), (another, places[1])], pairs);
    let (together, apart) = if in_order {
        let together = together();
        (together, apart())
    } else {
        let apart = apart();
        (together(), apart)
    };
    [together, apart, in_threads::<F, D>(&[(one, places[0])], pairs)]
}

/// What each thread does: as often as `repetitions` say, `calls` ascending mappings and then unmappings of
/// `length` bytes each.
#[derive(Clone, Copy)]
struct Pairs {
    length: u64,
    calls: u64,
    repetitions: u64,
}

/// Runs the pairs in a thread for each table, in which it has the place to itself; calls (a map or an unmap) per
/// microsecond of all threads together.
fn in_threads<F: Format, D: Mode<F>>(tables: &[(&Radix<F>, u64)], pairs: Pairs) -> f64 {
    let ready = AtomicUsize::new(0);
    let nanoseconds: Vec<_> = thread::scope(|scope| {
        let begin = |&(radix, place): &(_, u64)| {
            let ready = &ready;
            scope.spawn(move || {
                let mut retired = Gather::new();
                ready.fetch_add(1, SeqCst);
                while ready.load(SeqCst) < tables.len() {
                    spin_loop();
                }
                let start = Instant::now();
                let failed = pairs.run::<F, D>(radix, place, &mut retired);
                (start.elapsed().as_nanos() as f64, failed, retired)
            })
        };
        let threads: Vec<_> = tables.iter().map(begin).collect();
        let end = |thread: thread::ScopedJoinHandle<'_, _>| match thread.join() {
            Ok((nanoseconds, 0, retired)) => (nanoseconds, retired),
            _ => fail("a call of one of the threads gave a wrong answer"),
        };
        threads.into_iter().map(end).collect()
    });
    let calls = (2 * pairs.calls * pairs.repetitions) as f64;
    let rates = nanoseconds.into_iter().map(|(nanoseconds, retired)| {
        // SAFETY: all threads have ended.
        unsafe { free_retired(retired) };
        calls * 1000.0 / nanoseconds
    });
    rates.sum()
}

impl Pairs {
    /// How many calls failed. What they retire stays until the other thread has ended, too.
    #[inline(never)]
    fn run<F: Format, D: Mode<F>>(
        self,
        radix: &Radix<F>,
        place: u64,
        retired: &mut Gather<HeapTables, AtomicU64>,
    ) -> u64 {
        let mut failed = 0;
        for _ in 0..self.repetitions {
            for call in 0..self.calls {
                let piece = range(place + call * self.length, self.length);
                let oa = Oa::new(OA + SIZE_4K + call * self.length);
                failed += u64::from(!D::map(black_box(radix), piece, oa, retired));
            }
            for call in 0..self.calls {
                let piece = range(place + call * self.length, self.length);
                let mut gather = Gather::new();
                failed += u64::from(!D::unmap(black_box(radix), piece, &mut gather));
                retired.retired.append(&mut gather.retired);
            }
        }
        failed
    }
}

/// Whether the [`Arena`] counts pages: those handed out so far, those in use, and the most of them at once.
static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATED: AtomicU64 = AtomicU64::new(0);
static IN_USE: AtomicU64 = AtomicU64::new(0);
static MOST: AtomicU64 = AtomicU64::new(0);

/// Table pages that were touched when the program began. A thread has its own stack of free ones and takes no lock, as
/// an allocator with a cache for each processor would have it.
///
/// A page that does not come back empty is cleared for its next user, not for its last one as in `HeapTables`: whole
/// tables are dropped outside the measured time, and clearing is a part of what a fresh table costs.
///
/// Live counts stand as in [`HeapTables`]: 64 pages are aligned to their size, and the first holds the counts of
/// the others.
#[derive(Clone, Copy, Debug, Default)]
struct Arena;

/// A multiple of the size of a slab, and several times what the largest workload takes.
const ARENA: Layout = match Layout::from_size_align(64 << 20, 2 << 20) {
    Ok(layout) => layout,
    Err(_) => panic!("both are powers of two"),
};
const PAGE: usize = 4096;
const SLAB: usize = 64 * PAGE;

thread_local! {
    /// Free pages, and whether they are clear.
    static FREE: RefCell<Vec<(NonNull<AtomicU64>, bool)>> = const { RefCell::new(Vec::new()) };
}

impl Arena {
    /// Takes the memory, for this thread to use, until the program ends.
    fn fill() {
        // SAFETY: the size is not zero.
        let Some(memory) = NonNull::new(unsafe { alloc(ARENA) }) else { fail("no memory for the arena") };
        #[cfg(target_os = "linux")]
        // Before anything is touched, or it would lie in small pages already.
        // SAFETY: advice changes no contents. Whether the system follows it does not matter.
        let _ = unsafe {
            rustix::mm::madvise(memory.as_ptr().cast(), ARENA.size(), rustix::mm::Advice::LinuxHugepage)
        };
        // SAFETY: all of it was allocated just now. Something else before the zeroes, lest the compiler leaves them out.
        unsafe {
            memory.write_bytes(0xff, ARENA.size());
            black_box(memory).write_bytes(0, ARENA.size());
        }
        let pages = (0..ARENA.size() / PAGE).rev().filter(|page| page % 64 != 0);
        // SAFETY: below the arena's size.
        let pages = pages.map(|page| unsafe { (memory.add(page * PAGE).cast(), true) });
        FREE.with_borrow_mut(|free| free.extend(pages));
    }
}

// SAFETY: a page is on one thread's stack or in use; unless it is known to be clear it is zeroed when it is handed out.
// Its state is zeroed when it comes back, and is in the cache line of its number in its slab, whose first page is
// never handed out. Addresses are exposed pointers, which are below 2^56 in programs on 64-bit machines.
unsafe impl TableMemory<AtomicU64> for Arena {
    fn allocate(&self, layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        if layout.entries * 8 > PAGE || layout.alignment > PAGE {
            return Err(OutOfTables);
        }
        let (table, clear) = FREE.with_borrow_mut(Vec::pop).ok_or(OutOfTables)?;
        if !clear {
            // SAFETY: the page is ours alone until it is returned.
            unsafe { table.cast::<u8>().write_bytes(0, PAGE) };
        }
        if COUNTING.load(Relaxed) {
            ALLOCATED.fetch_add(1, Relaxed);
            MOST.fetch_max(IN_USE.fetch_add(1, Relaxed) + 1, Relaxed);
        }
        Ok(table)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, layout: TableLayout, empty: bool) {
        if COUNTING.load(Relaxed) {
            IN_USE.fetch_sub(1, Relaxed);
        }
        // SAFETY: the page's state is nobody else's any more.
        unsafe { self.state(table, layout).store(0, Relaxed) };
        FREE.with_borrow_mut(|free| free.push((table, empty)));
    }

    #[inline(always)]
    unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, _layout: TableLayout) -> &'a AtomicU64 {
        let offset = table.as_ptr().addr() & (SLAB - 1);
        // SAFETY: `offset` is how far the page stands in its slab, and the count's place is in the slab's first page.
        unsafe { table.cast::<u8>().sub(offset).add(offset / PAGE * 64).cast::<AtomicU64>().as_ref() }
    }

    #[inline(always)]
    fn light_fence(&self) {
        ioasid_pagetable::fence::light();
    }

    fn heavy_fence(&self) {
        ioasid_pagetable::fence::heavy();
    }

    #[inline(always)]
    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        table.as_ptr().expose_provenance() as u64
    }

    #[inline(always)]
    unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
        // SAFETY: the address of a table is not null.
        unsafe { NonNull::new_unchecked(std::ptr::with_exposed_provenance_mut(address as usize)) }
    }
}

/// The same for hardware that does not snoop when it walks the tables: what is written is flushed to memory.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, Default)]
struct IncoherentArena;

// SAFETY: all but the flushing is done by the arena.
#[cfg(target_arch = "x86_64")]
unsafe impl TableMemory<AtomicU64> for IncoherentArena {
    const COHERENT: bool = false;

    fn clean(&self, entries: &[AtomicU64]) {
        let lines = entries.as_ptr_range();
        let mut line = lines.start as usize & !63;
        // SAFETY: flushing a line changes no contents; the instructions are there (`main` has looked), and the
        // lines are the table's.
        unsafe {
            core::arch::asm!("mfence", options(nostack, preserves_flags));
            while line < lines.end as usize {
                core::arch::asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags));
                line += 64;
            }
            core::arch::asm!("mfence", options(nostack, preserves_flags));
        }
    }

    fn allocate(&self, layout: TableLayout) -> Result<NonNull<AtomicU64>, OutOfTables> {
        Arena.allocate(layout)
    }

    unsafe fn free(&self, table: NonNull<AtomicU64>, layout: TableLayout, empty: bool) {
        // SAFETY: passed on.
        unsafe { Arena.free(table, layout, empty) };
    }

    #[inline(always)]
    unsafe fn state<'a>(&self, table: NonNull<AtomicU64>, layout: TableLayout) -> &'a AtomicU64 {
        // SAFETY: passed on.
        unsafe { Arena.state(table, layout) }
    }

    #[inline(always)]
    fn light_fence(&self) {
        ioasid_pagetable::fence::light();
    }

    fn heavy_fence(&self) {
        ioasid_pagetable::fence::heavy();
    }

    #[inline(always)]
    fn address(&self, table: NonNull<AtomicU64>) -> u64 {
        Arena.address(table)
    }

    #[inline(always)]
    unsafe fn pointer(&self, address: u64) -> NonNull<AtomicU64> {
        // SAFETY: passed on.
        unsafe { Arena.pointer(address) }
    }
}

/// Whether the processor has `clflushopt`.
#[cfg(target_arch = "x86_64")]
fn can_flush() -> bool {
    std::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 23 != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn can_flush() -> bool {
    false
}

/// What the machine does without any page-table code: a table page taken, zeroed and given back.
fn table_pages<M: TableMemory<AtomicU64> + Default>(bench: &mut Bench) {
    const CALLS: u64 = 1024;
    let layout = TableLayout { entries: 512, alignment: 4096 };
    let memory = M::default();
    let mut series = Series::default();
    for pass in bench.passes(5, 101) {
        bench.pass(&mut series, pass, CALLS, || {
            let mut failed = 0;
            for _ in 0..CALLS {
                match memory.allocate(layout) {
                    // SAFETY: just allocated with this layout, and used by nobody.
                    Ok(table) => unsafe { memory.free(black_box(table), layout, false) },
                    Err(_) => failed += 1,
                }
            }
            failed
        });
    }
    bench.row("machine", "table_alloc_zero_free", series, CALLS, 1);
}

/// What reading the clock adds to a measurement.
fn clock_cost() -> f64 {
    let between = (0..1000).map(|_| {
        let start = Instant::now();
        start.elapsed().as_nanos() as f64
    });
    between.fold(f64::INFINITY, f64::min)
}

fn arguments() -> Arguments {
    let mut arguments = Arguments {
        what: What::Times,
        memory: Memory::Arena,
        formats: Vec::new(),
        op: String::new(),
        rounds: 5,
        list: false,
        once: true,
    };
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        let mut value = || given.next().unwrap_or_else(|| fail(format_args!("{argument} needs a value")));
        match argument.as_str() {
            "--bench" => arguments.once = false,
            "--format" => arguments.formats.push(value()),
            "--op" => arguments.op = value(),
            "--rounds" => match value().parse() {
                Ok(rounds @ 1..=1000) => arguments.rounds = rounds,
                _ => fail("--rounds needs a number from 1 to 1000"),
            },
            "--memory" => match value().as_str() {
                "arena" => arguments.memory = Memory::Arena,
                "heap" => arguments.memory = Memory::Heap,
                _ => fail("--memory is arena or heap"),
            },
            "--tables" => arguments.what = What::Tables,
            "--threads" => arguments.what = What::Threads,
            "--list" => arguments.list = true,
            "--help" | "-h" => {
                print!("{USAGE}");
                exit(0);
            }
            _ => fail(format_args!("{argument} means nothing here\n\n{USAGE}")),
        }
    }
    if arguments.once || arguments.what == What::Tables {
        arguments.rounds = 1;
    }
    arguments
}

fn main() {
    let arguments = arguments();
    let mut subjects = subjects();
    subjects.retain(|subject| can_flush() || !subject.name().ends_with("_nc"));
    if let Some(unknown) = arguments.formats.iter().find(|name| subjects.iter().all(|s| s.name() != **name)) {
        let known: Vec<_> = subjects.iter().map(|subject| subject.name()).collect();
        fail(format_args!("there is no format {unknown}; there are {}", known.join(", ")));
    }
    subjects.retain(|subject| {
        arguments.formats.is_empty() || arguments.formats.iter().any(|name| name == subject.name())
    });
    if arguments.list {
        list(&subjects);
        return;
    }
    if arguments.memory == Memory::Arena {
        Arena::fill();
        COUNTING.store(arguments.what == What::Tables, Relaxed);
    } else if arguments.what == What::Tables {
        fail("only the arena counts table pages");
    }
    let mut bench = Bench { arguments, clock_cost: clock_cost(), rows: Vec::new() };
    if bench.arguments.what == What::Threads {
        for subject in &subjects {
            subject.two_threads(&bench);
        }
        return;
    }
    for _ in 0..bench.arguments.rounds {
        if bench.wants("table_alloc_zero_free") && bench.arguments.what == What::Times {
            match bench.arguments.memory {
                Memory::Arena => table_pages::<Arena>(&mut bench),
                Memory::Heap => table_pages::<HeapTables>(&mut bench),
            }
        }
        for subject in &subjects {
            subject.measure(&mut bench);
        }
    }
    bench.print();
}

fn list(subjects: &[Box<dyn Subject>]) {
    let names: Vec<_> = subjects.iter().map(|subject| subject.name()).collect();
    println!("formats: {}", names.join(" "));
    println!("operations:");
    for Workload { name, .. } in &WORKLOADS {
        println!("  map_{name}\n  unmap_{name}");
    }
    println!("  mapunmap_1x4K_hot\n  map_1x4K_newtable");
    for (name, ..) in LOOK_UP_ROWS {
        println!("  {name}\n  {name}_dep");
    }
}
