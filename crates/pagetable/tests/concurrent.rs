//! The table under real threads.
//!
//! The model checker (`loom.rs`) sees every interleaving of a few steps; here are many steps, real tables and real
//! memory that is freed and used again. Each test ends after a number of rounds, and none looks at a clock.
//!
//! Retired tables are freed under [`Grace`], the plainest grace period there is: operations and walks share a lock,
//! and whoever frees takes it alone. Their pages go straight to the next table, so a walk that follows a stale way
//! ends in somebody else's entries.
//!
//! Fewer rounds, but with every data race found (some minutes):
//! `MIRIFLAGS="-Zmiri-permissive-provenance" cargo +nightly miri test -p ioasid-pagetable --test concurrent`.

mod accounting;

use accounting::{Accounting, inspect};
use ioasid_pagetable::{
    AmdV1, Attributes, CachedWalk, ClaimError, Format, Gather, IovaRange, Leaf, LiveChanges, MapError,
    Native, Oa, Radix, RetractError, RiscV, VtdSecondStage,
};
use proptest::test_runner::{RngAlgorithm, TestRng};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard};
use std::thread;

type Gathered = Gather<Accounting, AtomicU64>;

const READ_WRITE: Attributes = Attributes::READ.union(Attributes::WRITE);
const PAGE: u64 = 0x1000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Operations and walks run under shared access, frees under exclusive access.
#[derive(Default)]
struct Grace(RwLock<()>);

impl Grace {
    fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.0.read().unwrap()
    }

    fn free(&self, memory: &Accounting, gather: &mut Gathered) {
        if !gather.retired.is_empty() {
            let _alone = self.0.write().unwrap();
            memory.free_retired(gather);
        }
    }
}

/// How often a test repeats itself. Miri needs thousands of times as long for each.
const fn rounds(rounds: u64) -> u64 {
    if cfg!(miri) { 2 } else { rounds }
}

/// Ends the walkers when the operations are done, even if one of them fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn range(first: u64, length: u64) -> IovaRange {
    IovaRange::with_length(first, length).unwrap()
}

fn random(seed: u8) -> impl FnMut(u64) -> u64 {
    use proptest::prelude::RngCore;
    let mut source = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
    move |below| source.next_u64() % below
}

/// Nothing may be left: neither translations nor tables.
fn finish<F: Format>(radix: Radix<F, Accounting>, memory: &Accounting) {
    let mut gather = Gather::new();
    assert_eq!(inspect(&radix).tables, memory.tables());
    assert_eq!(radix.table_count(), memory.tables());
    radix.unmap(IovaRange::ALL, &mut gather).unwrap();
    memory.free_retired(&mut gather);
    assert!(memory.tables() <= 1);
    drop(radix);
    assert_eq!(memory.tables(), 0);
}

/// Threads work on stripes of the same leaves and tables, in exclusive mode; between the stripes lie pages that
/// nobody unmaps. Those never vanish or change, whoever cuts the leaves or retires the tables around them.
///
/// Where not every leaf can be cut, the stripes are mapped one by one, so that leaves end where they do.
fn neighbours_stay<F: Format>(format: F) {
    const WORKERS: u64 = 3;
    const ROUNDS: u64 = rounds(60);
    // One gigabyte leaf, or 2 MiB ones; the first megabyte of each 4 MiB stays.
    const STRIPE: u64 = 4 * MIB;
    const STRIPES: u64 = 24;
    let base = GIB;
    let output = |iova: u64| Oa::new(iova + 4 * GIB);
    let cuts = format.live_changes().contains(LiveChanges::SIZE) && format.leaf_sizes(1).is_power_of_two();
    let memory = Accounting::default();
    let grace = Grace::default();
    let done = AtomicBool::new(false);
    let radix = Radix::new(format, memory.clone());
    let map = |part: IovaRange| {
        radix.map(part, output(part.first()), READ_WRITE, &mut Gather::new()).unwrap();
    };
    if cuts {
        map(range(base, GIB));
    } else {
        for stripe in 0..GIB / STRIPE {
            map(range(base + stripe * STRIPE, MIB));
            map(range(base + stripe * STRIPE + MIB, STRIPE - MIB));
        }
    }
    thread::scope(|scope| {
        for walker in 0..2 {
            let (radix, grace, done) = (&radix, &grace, &done);
            scope.spawn(move || {
                let mut random = random(walker);
                let mut cache = CachedWalk::new();
                while !done.load(Ordering::Acquire) {
                    let _inside = grace.enter();
                    for _ in 0..64 {
                        let iova = base + random(STRIPES) * STRIPE + random(MIB);
                        let found =
                            if walker == 0 { radix.walk(iova) } else { radix.walk_cached(iova, &mut cache) };
                        assert_eq!(found.map(|leaf| leaf.output(iova)), Ok(output(iova)));
                    }
                    let mut at = base;
                    radix.leaves(range(base, MIB), |leaf: Leaf| {
                        assert!(leaf.iova <= at, "a gap at {at:#x}");
                        at = leaf.range().last() + 1;
                        ControlFlow::Continue(())
                    });
                    assert!(at >= base + MIB, "a gap at {at:#x}");
                }
            });
        }
        let _done = Done(&done);
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (radix, memory, grace) = (&radix, &memory, &grace);
                scope.spawn(move || {
                    let mut random = random(100 + worker as u8);
                    let mut gather = Gather::new();
                    for _ in 0..ROUNDS {
                        let stripe = random(STRIPES / WORKERS) * WORKERS + worker;
                        let own = range(base + stripe * STRIPE + MIB, STRIPE - MIB);
                        let part = MIB / PAGE;
                        let first = own.first() + random(part) * PAGE;
                        let part = range(first, (1 + random(part)) * PAGE);
                        {
                            let _inside = grace.enter();
                            if cuts {
                                radix.unmap(part, &mut gather).unwrap();
                                assert!(radix.walk(part.first()).is_err());
                                assert!(radix.walk(part.last()).is_err());
                            }
                            radix.unmap(own, &mut gather).unwrap();
                            radix.occupied(own, |found| panic!("{found} after unmapping {own}"));
                            // Once in pages, for which no larger leaf fits, and once as it was.
                            radix.map(own, Oa::new(PAGE), READ_WRITE, &mut gather).unwrap();
                            assert_eq!(radix.walk(own.first()).unwrap().oa, Oa::new(PAGE));
                            radix.unmap(own, &mut gather).unwrap();
                            radix.map(own, output(own.first()), READ_WRITE, &mut gather).unwrap();
                        }
                        grace.free(memory, &mut gather);
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
    for page in (0..GIB / PAGE).step_by(if cfg!(miri) { 4099 } else { 1 }) {
        let iova = base + page * PAGE;
        assert_eq!(radix.walk(iova).map(|leaf| leaf.output(iova)), Ok(output(iova)));
    }
    finish(radix, &memory);
}

#[test]
fn neighbours_stay_native() {
    neighbours_stay(Native::new());
}

#[test]
fn neighbours_stay_vtd() {
    neighbours_stay(VtdSecondStage::new(4).unwrap());
}

#[test]
fn neighbours_stay_amd_v1() {
    neighbours_stay(AmdV1::new());
}

#[test]
fn neighbours_stay_risc_v() {
    neighbours_stay(RiscV::new(4).unwrap());
    neighbours_stay(RiscV::new(4).unwrap().with_napot(false));
}

/// Threads map and unmap pages of their own in tables that they share, in exclusive mode. No more tables may stay than
/// stay already, so that whoever empties one retires it, while his neighbours are about to fill it. Nobody loses a page.
fn shared_tables<F: Format>(format: F) {
    const THREADS: u64 = 3;
    const ROUNDS: u64 = rounds(3000);
    /// So many empty tables stay.
    const KEPT: u64 = 64;
    const TABLE: u64 = 2 * MIB;
    const SHARED: u64 = 3;
    let memory = Accounting::default();
    let grace = Grace::default();
    let (retired, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let radix = Radix::new(format, memory.clone());
    let mut gather = Gather::new();
    for table in 0..=KEPT {
        let page = range(GIB + table * TABLE, PAGE);
        radix.map(page, Oa::new(PAGE), READ_WRITE, &mut gather).unwrap();
        radix.unmap(page, &mut gather).unwrap();
    }
    assert_eq!(gather.retired.len(), 1, "the allowance is used up");
    memory.free_retired(&mut gather);
    // A thread's page in a shared table; for no two of them a larger leaf would do.
    let page = |table: u64, thread: u64| range(table * TABLE + (17 * thread + 1) * PAGE, PAGE);
    let output = |page: IovaRange| Oa::new(4 * GIB + page.first() + PAGE);
    thread::scope(|scope| {
        let (radix, memory, grace, retired, done) = (&radix, &memory, &grace, &retired, &done);
        scope.spawn(move || {
            let mut random = random(0);
            let mut cache = CachedWalk::new();
            while !done.load(Ordering::Acquire) {
                let _inside = grace.enter();
                for _ in 0..64 {
                    let page = page(random(SHARED), random(THREADS));
                    if let Ok(leaf) = radix.walk_cached(page.first(), &mut cache) {
                        assert_eq!((leaf.range(), leaf.oa), (page, output(page)));
                    }
                }
            }
        });
        let _done = Done(done);
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    let mut random = random(1 + thread as u8);
                    let mut gather = Gather::new();
                    let mut mapped = [false; SHARED as usize];
                    for _ in 0..ROUNDS {
                        let inside = grace.enter();
                        for _ in 0..8 {
                            let table = random(SHARED);
                            let page = page(table, thread);
                            let mapped = &mut mapped[table as usize];
                            let found = radix.walk(page.first()).ok().map(|leaf| leaf.oa);
                            assert_eq!(found, mapped.then(|| output(page)), "{page} is lost");
                            if *mapped {
                                radix.unmap(page, &mut gather).unwrap();
                            } else {
                                radix.map(page, output(page), READ_WRITE, &mut gather).unwrap();
                            }
                            *mapped = !*mapped;
                            gather.runs = Default::default();
                        }
                        drop(inside);
                        retired.fetch_add(gather.retired.len() as u64, Ordering::Relaxed);
                        grace.free(memory, &mut gather);
                    }
                    mapped
                })
            })
            .collect();
        for (thread, worker) in (0..).zip(workers) {
            for (table, mapped) in (0..).zip(worker.join().unwrap()) {
                let page = page(table, thread);
                let found = radix.walk(page.first()).ok().map(|leaf| leaf.oa);
                assert_eq!(found, mapped.then(|| output(page)), "{page} is lost");
            }
        }
    });
    assert!(retired.into_inner() > 0, "no table was ever retired");
    finish(radix, &memory);
}

#[test]
fn shared_tables_native() {
    shared_tables(Native::new());
}

#[test]
fn shared_tables_vtd() {
    shared_tables(VtdSecondStage::new(4).unwrap());
}

#[test]
fn shared_tables_amd_v1() {
    shared_tables(AmdV1::new());
}

#[test]
fn shared_tables_risc_v() {
    shared_tables(RiscV::new(4).unwrap());
}

/// All threads claim overlapping ranges. Each page has an owner word beside it: whoever holds a claim must find
/// all of them free, and everybody's translation goes where he said.
#[test]
fn one_claim_wins() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = rounds(400);
    const PAGES: u64 = 2048;
    let memory = Accounting::default();
    let grace = Grace::default();
    let radix = Radix::new(Native::new(), memory.clone());
    let owners: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    thread::scope(|scope| {
        for thread in 1..=THREADS {
            let (radix, memory, grace, owners) = (&radix, &memory, &grace, &owners);
            scope.spawn(move || {
                let mut random = random(thread as u8);
                let mut gather = Gather::new();
                let (mut won, mut tries) = (0, 0);
                while won < ROUNDS && tries < 200 * ROUNDS {
                    tries += 1;
                    // Sometimes two megabytes in one leaf, where others have tables.
                    let (first, count) = match random(4) {
                        0 => (random(PAGES / 512) * 512, 512),
                        _ => (random(PAGES - 8), 1 + random(8)),
                    };
                    let claimed = range(first * PAGE, count * PAGE);
                    let oa = Oa::new(thread * GIB + claimed.first());
                    let inside = grace.enter();
                    match radix.claim(claimed, oa, READ_WRITE, &mut gather) {
                        Err(ClaimError::Contended { at } | ClaimError::Map(MapError::Occupied { at })) => {
                            assert!(claimed.contains(at));
                        }
                        Err(error) => panic!("{error}"),
                        Ok(()) => {
                            won += 1;
                            let own = &owners[first as usize..(first + count) as usize];
                            assert!(own.iter().all(|owner| owner.swap(thread, Ordering::AcqRel) == 0));
                            assert!(radix.walk(claimed.last()).is_err(), "not published yet");
                            radix.publish(claimed);
                            for page in 0..count {
                                let iova = claimed.first() + page * PAGE;
                                let found = radix.walk(iova).map(|leaf| leaf.output(iova));
                                assert_eq!(found, Ok(Oa::new(thread * GIB + iova)));
                            }
                            gather.runs = Default::default();
                            radix.retract(claimed, &mut gather).unwrap();
                            assert_eq!(gather.runs.iter().collect::<Vec<_>>(), [claimed]);
                            assert!(own.iter().all(|owner| owner.swap(0, Ordering::AcqRel) == thread));
                            radix.release(claimed, &mut gather);
                        }
                    }
                    drop(inside);
                    grace.free(memory, &mut gather);
                }
                assert!(won > 0, "somebody has to win, also this thread");
            });
        }
    });
    radix.occupied(IovaRange::ALL, |left| panic!("{left} is left over"));
    finish(radix, &memory);
}

/// Threads unmap parts of the same large leaves in claiming mode. Every page is taken by exactly one of them.
#[test]
fn every_page_is_retracted_once() {
    const THREADS: u64 = 4;
    const LENGTH: u64 = 8 * MIB;
    const ROUNDS: u64 = rounds(8);
    let memory = Accounting::default();
    let radix = Radix::new(Native::new(), memory.clone());
    for round in 0..ROUNDS {
        let mut gather = Gather::new();
        let all = range(0, LENGTH);
        radix.claim(all, Oa::new(GIB), READ_WRITE, &mut gather).unwrap();
        radix.publish(all);
        let taken = AtomicU64::new(0);
        let gathers: Vec<Gathered> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (radix, taken) = (&radix, &taken);
                    scope.spawn(move || {
                        let mut random = random((round * THREADS + thread) as u8);
                        let mut all = Gather::new();
                        // Far more than it takes; without an end a failing thread would keep the others here.
                        for _ in 0..50_000 {
                            if taken.load(Ordering::Acquire) >= LENGTH {
                                break;
                            }
                            let first = random(LENGTH / PAGE) * PAGE;
                            let part = range(first, ((1 + random(300)) * PAGE).min(LENGTH - first));
                            let mut gather = Gather::new();
                            match radix.retract(part, &mut gather) {
                                Ok(()) | Err(RetractError::Contended { .. }) => {}
                                Err(error) => panic!("{error}"),
                            }
                            for run in gather.runs.iter() {
                                assert!(part.covers(&run));
                                taken.fetch_add(run.length().unwrap(), Ordering::AcqRel);
                                radix.release(run, &mut all);
                            }
                        }
                        all
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.into_inner(), LENGTH, "a page was taken twice");
        radix.occupied(all, |left| panic!("{left} is left over"));
        for mut gather in gathers.into_iter().chain([gather]) {
            memory.free_retired(&mut gather);
        }
        assert_eq!(radix.table_count(), memory.tables());
    }
    finish(radix, &memory);
}

/// All threads cut the same leaf everywhere at once.
#[test]
fn cut_against_cut() {
    for round in 0..rounds(8) as u8 {
        let memory = Accounting::default();
        let radix = Radix::new(VtdSecondStage::new(3).unwrap(), memory.clone());
        radix.map(range(GIB, GIB), Oa::new(0), READ_WRITE, &mut Gather::new()).unwrap();
        thread::scope(|scope| {
            for thread in 0..4 {
                let radix = &radix;
                scope.spawn(move || {
                    // The same addresses in all threads, a little apart in time.
                    let mut random = random(round);
                    for _ in 0..40 {
                        let at = GIB + (random(8) << 21) + random(512) * PAGE;
                        radix.cut(at, &mut Gather::new()).unwrap();
                        assert_eq!(radix.walk(at).unwrap().iova, at, "thread {thread}");
                        assert_eq!(radix.walk(at - 1).ok().map(|leaf| leaf.output(at - 1).get() + 1), {
                            (at > GIB).then_some(at - GIB)
                        });
                    }
                });
            }
        });
        finish(radix, &memory);
    }
}

/// One remembers the way to a table that others retire again and again, and put another one in its place. What he
/// finds is the mapping of some round, never older than what he was told of, and never another table's leaf.
#[test]
fn cached_walks_survive_retirement() {
    const ROUNDS: u64 = rounds(3000);
    let memory = Accounting::default();
    let grace = Grace::default();
    let radix = Radix::new(Native::new(), memory.clone());
    let (published, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let span = range(0, 2 * MIB);
    let page = range(0x5000, PAGE);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut cache = CachedWalk::new();
                while !done.load(Ordering::Acquire) {
                    let _inside = grace.enter();
                    let told = published.load(Ordering::Acquire);
                    if let Ok(leaf) = radix.walk_cached(page.first(), &mut cache) {
                        let round = leaf.oa.get() / PAGE;
                        assert!(leaf.iova == page.first() && round >= told, "round {round} after {told}");
                        assert!(round <= ROUNDS, "a leaf of another table");
                    } else {
                        // It goes before the next one is published.
                        let now = published.load(Ordering::Acquire);
                        let again = radix.walk_cached(page.first(), &mut cache);
                        assert!(again.is_ok() || now < ROUNDS);
                    }
                }
            });
        }
        let _done = Done(&done);
        let mut gather = Gather::new();
        // A neighbour takes the pages that become free, full of leaves of its own.
        let neighbour = Radix::new(Native::new(), memory.clone());
        for round in 1..=ROUNDS {
            {
                let _inside = grace.enter();
                radix.unmap(span, &mut gather).unwrap();
                radix.map(page, Oa::new(round * PAGE), READ_WRITE, &mut gather).unwrap();
                published.store(round, Ordering::Release);
                assert_eq!(gather.retired.len(), usize::from(round > 1));
            }
            grace.free(&memory, &mut gather);
            if round % 16 == 0 {
                neighbour.unmap(IovaRange::ALL, &mut gather).unwrap();
                memory.free_retired(&mut gather);
                neighbour.map(span, Oa::new((1 << 50) + PAGE), READ_WRITE, &mut gather).unwrap();
            }
        }
        drop(neighbour);
    });
    finish(radix, &memory);
}

/// Pages far apart in one table that is empty most of the time, so that it is kept, filled and retired all the time.
#[test]
fn retire_against_claim() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = rounds(1500);
    let memory = Accounting::default();
    let grace = Grace::default();
    let radix = Radix::new(Native::new(), memory.clone());
    let large = range(0, 2 * MIB);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (radix, memory, grace) = (&radix, &memory, &grace);
            scope.spawn(move || {
                let mut gather = Gather::new();
                let page = range(thread * 100 * PAGE, PAGE);
                for _ in 0..ROUNDS {
                    // The first thread wants it all in one leaf, and makes the table go.
                    let wanted = if thread == 0 { large } else { page };
                    let oa = Oa::new(thread * GIB);
                    let inside = grace.enter();
                    if radix.claim(wanted, oa, READ_WRITE, &mut gather).is_ok() {
                        radix.publish(wanted);
                        // In pages it is when somebody was still in the table, which is as good.
                        for iova in [wanted.first(), wanted.last()] {
                            let expected = Ok(Oa::new(oa.get() + (iova - wanted.first())));
                            assert_eq!(radix.walk(iova).map(|leaf| leaf.output(iova)), expected);
                        }
                        radix.retract(wanted, &mut gather).unwrap();
                        radix.release(wanted, &mut gather);
                    }
                    drop(inside);
                    grace.free(memory, &mut gather);
                }
            });
        }
    });
    radix.occupied(IovaRange::ALL, |left| panic!("{left} is left over"));
    finish(radix, &memory);
}
