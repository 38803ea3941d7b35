//! The epochs under the `loom` model checker, which tries every order of the threads' steps and every value that the
//! memory model lets a load return:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release -p ioasid --test loom_epoch
//! ```
//!
//! It runs the engine's own file, with loom's atomics in place of the standard library's.
//!
//! What this shows and what it does not: loom knows no membarrier, so there are two kinds of models. Those made by [`model`]
//! are of a kernel without: both sides fence. Those made by [`model_with_interrupts`] have an interrupt built of loom's parts:
//! a thread that is asked fences and answers at its next step, the one who asks waits for the answers, and threads that are
//! plain do not fence otherwise. An interrupt comes between two steps of the thread where the model says so
//! ([`sync::answer`]), which is at every place where it makes a difference. That the kernel's interrupt is one is taken
//! for granted. Loom also takes sequentially consistent loads and stores for acquiring and
//! releasing ones; it may find orders that cannot happen, but misses none of those that can.

#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::thread;

#[path = "../src/epoch/domain.rs"]
#[allow(
    unreachable_pub,
    dead_code,
    reason = "the file is a module of the engine and not all of it is used here"
)]
mod domain;

/// What the engine's module of this name offers, by loom.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

    use loom::sync::atomic::AtomicUsize;
    use loom::sync::{Condvar, Mutex};
    use std::cell::{Cell, RefCell};
    use std::sync::Arc;

    /// Threads become plain in their first section.
    pub(crate) const CALM: u32 = 0;

    /// More than any model has.
    const THREADS: usize = 4;

    /// How often threads were asked to fence, and how often each of them has; `usize::MAX`: it has ended.
    struct Interrupts {
        asked: AtomicUsize,
        answered: Mutex<[usize; THREADS]>,
        more: Condvar,
        threads: usize,
    }

    impl Interrupts {
        fn note(&self, number: usize, answered: usize) {
            self.answered.lock().unwrap()[number] = answered;
            self.more.notify_all();
        }
    }

    // Loom runs all threads of a model on one of the system's.
    std::thread_local! {
        static INTERRUPTS: RefCell<Option<Arc<Interrupts>>> = const { RefCell::new(None) };
    }

    loom::thread_local! {
        /// The number of a thread that can be interrupted, and how often it has been.
        static SELF: Cell<Option<(usize, usize)>> = Cell::new(None);
    }

    fn interrupts() -> Option<Arc<Interrupts>> {
        INTERRUPTS.with_borrow(Option::clone)
    }

    /// From here on so many threads can be interrupted, or none.
    pub(crate) fn begin(threads: usize) {
        let interrupts = Interrupts {
            asked: AtomicUsize::new(0),
            answered: Mutex::new([0; THREADS]),
            more: Condvar::new(),
            threads,
        };
        INTERRUPTS.set((threads > 0).then(|| Arc::new(interrupts)));
    }

    /// What a thread does that can be interrupted, and of which somebody waits for the answer until it ends.
    pub(crate) fn interruptible(number: usize, work: impl FnOnce()) {
        SELF.with(|own| own.set(Some((number, 0))));
        work();
        SELF.with(|own| own.set(None));
        if let Some(interrupts) = interrupts() {
            interrupts.note(number, usize::MAX);
        }
    }

    /// A place where an interrupt may come.
    pub(crate) fn answer() {
        let (Some(interrupts), Some((number, answered))) = (interrupts(), SELF.with(Cell::get)) else {
            return;
        };
        let asked = interrupts.asked.load(Ordering::Relaxed);
        if asked != answered {
            fence(Ordering::SeqCst);
            SELF.with(|own| own.set(Some((number, asked))));
            interrupts.note(number, asked);
        }
    }

    pub(crate) fn can_fence_everywhere() -> bool {
        interrupts().is_some()
    }

    /// For threads that cannot be interrupted themselves.
    pub(crate) fn fence_everywhere() {
        let Some(interrupts) = interrupts() else { return };
        fence(Ordering::SeqCst);
        let asked = interrupts.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut answered = interrupts.answered.lock().unwrap();
        while answered[..interrupts.threads].iter().any(|answered| *answered < asked) {
            answered = interrupts.more.wait(answered).unwrap();
        }
        drop(answered);
        fence(Ordering::SeqCst);
    }

    /// The processor may change the order all the same.
    pub(crate) fn compiler_fence(_order: Ordering) {
        answer();
    }

    pub(crate) fn wait_a_little(_tries: u32) {
        loom::thread::yield_now();
    }
}

use domain::{Domain, Local, Section};
use sync::{AtomicPtr, AtomicU64, Ordering};

const ALIVE: u64 = 1;
const FREED: u64 = 2;

/// Something that is replaced: two places, of which one is the current one.
struct Replaced {
    domain: &'static Domain,
    current: AtomicUsize,
    /// Loom fails the test when a write is not ordered after every read.
    places: [UnsafeCell<u64>; 2],
}

fn new_domain() -> &'static Domain {
    let domain = Domain::new(AtomicU64::new(domain::FIRST_REQUEST), AtomicPtr::new(std::ptr::null_mut()));
    Box::leak(Box::new(domain))
}

impl Replaced {
    fn new() -> Arc<Replaced> {
        Replaced::of(new_domain())
    }

    fn of(domain: &'static Domain) -> Arc<Replaced> {
        Arc::new(Replaced {
            domain,
            current: AtomicUsize::new(0),
            places: [UnsafeCell::new(ALIVE), UnsafeCell::new(ALIVE)],
        })
    }

    /// Reads what is current, as a walker does.
    fn read(&self, _section: &Section) -> usize {
        sync::answer();
        let place = self.current.load(Ordering::Acquire);
        // SAFETY: what the model checks: nobody writes the place while a section is open that has found it.
        let value = self.places[place].with(|value| unsafe { *value });
        assert_eq!(value, ALIVE);
        place
    }

    /// Reads what was found before, in the same section.
    fn read_again(&self, _section: &Section, place: usize) {
        // SAFETY: as above.
        assert_eq!(self.places[place].with(|value| unsafe { *value }), ALIVE);
    }

    /// Replaces the first place, waits, and frees it.
    fn replace(&self) {
        self.current.store(1, Ordering::Release);
        self.domain.synchronize(None);
        // SAFETY: what the model checks: every section that may have found the place has ended.
        self.places[0].with_mut(|value| unsafe { *value = FREED });
    }
}

/// Every order with at most this many involuntary switches between threads, without interrupts.
fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    model_with_interrupts(preemptions, 0, test);
}

/// The same with so many threads that can be [interrupted](sync::interruptible).
fn model_with_interrupts(preemptions: usize, threads: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    builder.check(move || {
        sync::begin(threads);
        test();
    });
}

#[test]
fn a_section_never_sees_what_was_freed() {
    model(4, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            let section = local.enter();
            let place = reader.read(&section);
            reader.read_again(&section, place);
        });
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn the_end_of_a_section_is_seen_with_the_next_one() {
    model(4, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            for _ in 0..2 {
                reader.read(&local.enter());
            }
        });
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn a_word_is_taken_over_by_another_thread() {
    model(2, || {
        let replaced = Replaced::new();
        let readers = [(); 2].map(|()| {
            let reader = replaced.clone();
            thread::spawn(move || {
                // Comes, reads and goes; the second may find the word that the first has left, or bring its own.
                let local = Local::new(reader.domain);
                reader.read(&local.enter());
            })
        });
        replaced.replace();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn inner_sections_end_without_ending_the_outer_one() {
    model(3, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            let outer = local.enter();
            let place = reader.read(&outer);
            drop(local.enter());
            reader.read_again(&outer, place);
            // One that begins later and ends later.
            let kept = local.enter();
            drop(outer);
            reader.read_again(&kept, place);
        });
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn a_section_outlives_its_threads_local() {
    model(3, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let section = Local::new(reader.domain).enter();
            let place = reader.read(&section);
            drop(Local::new(reader.domain).enter());
            reader.read_again(&section, place);
            drop(section);
            // Now the word may be taken over.
            reader.read(&Local::new(reader.domain).enter());
        });
        // The word must not be given to this one, whose end would look like the other's.
        drop(Local::new(replaced.domain).enter());
        replaced.replace();
        thread.join().unwrap();
    });
}

#[test]
fn a_ticket_is_passed_when_what_began_before_has_ended() {
    model(3, || {
        let replaced = Replaced::new();
        let reader = replaced.clone();
        let thread = thread::spawn(move || {
            let local = Local::new(reader.domain);
            reader.read(&local.enter());
        });
        replaced.current.store(1, Ordering::Release);
        let ticket = replaced.domain.ticket(None);
        // Who does not wait but asks, and frees only on a yes.
        if ticket.passed() {
            // SAFETY: what the model checks.
            replaced.places[0].with_mut(|value| unsafe { *value = FREED });
        }
        thread.join().unwrap();
        assert!(ticket.passed());
    });
}

/// A thread that is plain already.
fn plain(domain: &'static Domain) -> Local {
    let local = Local::new(domain);
    drop(local.enter());
    local
}

/// Reads all of them in each of several sections.
fn read_in_sections(local: &Local, sections: usize, replaced: &[Arc<Replaced>]) {
    for _ in 0..sections {
        sync::answer();
        let section = local.enter();
        for replaced in replaced {
            let place = replaced.read(&section);
            replaced.read_again(&section, place);
        }
    }
}

// Here the first thread reads, because it runs first without an involuntary switch.

#[test]
fn a_plain_thread_is_interrupted() {
    model_with_interrupts(3, 1, || {
        let replaced = Replaced::new();
        let local = plain(replaced.domain);
        let waiter = replaced.clone();
        let waiter = thread::spawn(move || waiter.replace());
        sync::interruptible(0, || read_in_sections(&local, 2, &[replaced]));
        drop(local);
        waiter.join().unwrap();
    });
}

#[test]
fn whoever_finds_a_thread_fenced_need_not_interrupt_it() {
    model_with_interrupts(3, 1, || {
        let domain = new_domain();
        let replaced = [(); 2].map(|()| Replaced::of(domain));
        let local = plain(domain);
        let waiter = replaced.clone();
        // The first time it is made fenced, the second it may be found so, or plain again.
        let waiter = thread::spawn(move || waiter.iter().for_each(|replaced| replaced.replace()));
        sync::interruptible(0, || read_in_sections(&local, 2, &replaced));
        drop(local);
        waiter.join().unwrap();
    });
}

#[test]
fn two_who_wait_do_not_mistake_each_others_requests() {
    model_with_interrupts(2, 1, || {
        let domain = new_domain();
        let replaced = [(); 3].map(|()| Replaced::of(domain));
        let local = plain(domain);
        let [first, other, second] = replaced.clone();
        let waiters = [
            thread::spawn(move || {
                first.replace();
                second.replace();
            }),
            thread::spawn(move || other.replace()),
        ];
        sync::interruptible(0, || read_in_sections(&local, 2, &replaced[2..]));
        drop(local);
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

#[test]
fn a_word_that_a_plain_thread_left_is_fenced() {
    model_with_interrupts(2, 2, || {
        let replaced = Replaced::new();
        let readers = [0, 1].map(|number| {
            let replaced = replaced.clone();
            thread::spawn(move || {
                sync::interruptible(number, || {
                    read_in_sections(&plain(replaced.domain), 1, &[replaced.clone()])
                });
            })
        });
        replaced.replace();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}
