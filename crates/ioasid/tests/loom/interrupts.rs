//! The kernel's interrupt of all threads, built of loom's parts.
//!
//! loom knows no membarrier. So here a thread that is asked fences and answers at its next step, and the one who asks waits for
//! the answers. Threads that are plain do not fence otherwise. An interrupt comes between two steps of the thread where the
//! model says so ([`answer`]), which is at every place where it makes a difference. That the kernel's interrupt
//! does the same is taken for granted.
//!
//! A model that does not [`begin`] with threads to be interrupted is one of a kernel without membarrier.

use loom::sync::atomic::{AtomicUsize, Ordering, fence};
use loom::sync::{Condvar, Mutex};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

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
    let Some(interrupts) = interrupts() else { return };
    // A thread that is ending has lost it, and answers no more.
    let Ok(Some((number, answered))) = SELF.try_with(Cell::get) else { return };
    let asked = interrupts.asked.load(Ordering::Relaxed);
    if asked != answered {
        fence(Ordering::SeqCst);
        SELF.with(|own| own.set(Some((number, asked))));
        interrupts.note(number, asked);
    }
}

/// Returns when somebody wants threads to fence, without an answer.
pub(crate) fn wait_until_asked() {
    while interrupts().is_some_and(|interrupts| interrupts.asked.load(Ordering::Relaxed) == 0) {
        loom::thread::yield_now();
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
