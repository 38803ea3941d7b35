//! The engine's small protocols under the `loom` model checker, which tries every order of the threads' steps and every
//! value that the memory model lets a load return:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p ioasid --test loom
//! ```
//!
//! It runs the engine's own files, with loom's atomics and locks in the place of the standard library's: each names what it
//! needs as `crate::sync`, and here that is the module below. What is too large for that runs under shuttle
//! (`tests/shuttle`).
//!
//! What this shows and what it does not: both halves of the asymmetric fence are full fences here, because loom
//! knows no membarrier. So it shows that the algorithm is right where both sides fence, which is what the engine
//! does where the kernel has no membarrier. With membarrier the fence of the reading side is a fence of the
//! compiler only; that the kernel's interrupt of every running thread makes up for it is an argument (in the header of
//! `src/epoch/domain.rs`) that no model here checks. Loom also takes sequentially consistent loads and stores for acquiring
//! and releasing ones; it may find orders that cannot happen, but misses none of those that can.

#![cfg(loom)]

mod announced;
mod epoch;
mod operations;
mod published;
mod slices;

/// What the engine's module of this name offers, by loom.
mod sync {
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
    pub(crate) use std::sync::PoisonError;

    /// A thread becomes plain at its second section.
    pub(crate) const CALM: u32 = 0;

    pub(crate) fn can_fence_everywhere() -> bool {
        true
    }

    pub(crate) fn fence_everywhere() {
        fence(Ordering::SeqCst);
    }

    /// What the kernel makes of a plain thread's fence, at the latest moment.
    pub(crate) fn compiler_fence(order: Ordering) {
        fence(order);
    }

    pub(crate) fn wait_a_little(_tries: u32) {
        loom::thread::yield_now();
    }

    /// The standard library's, with a flag of loom's that is ordered as its own is.
    #[derive(Debug)]
    pub(crate) struct OnceLock<T> {
        made: AtomicBool,
        making: Mutex<()>,
        value: std::sync::OnceLock<T>,
    }

    impl<T> OnceLock<T> {
        pub(crate) fn new() -> OnceLock<T> {
            let (made, making) = (AtomicBool::new(false), Mutex::new(()));
            OnceLock { made, making, value: std::sync::OnceLock::new() }
        }

        pub(crate) fn get(&self) -> Option<&T> {
            if self.made.load(Ordering::Acquire) { self.value.get() } else { None }
        }

        pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
            if let Some(value) = self.get() {
                return value;
            }
            let _making = self.making.lock().unwrap();
            if self.value.get().is_none() {
                let value = make();
                let _ = self.value.set(value);
                self.made.store(true, Ordering::Release);
            }
            self.value.get().unwrap()
        }
    }
}

/// Every order with at most this many involuntary switches between threads.
fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(test);
}
