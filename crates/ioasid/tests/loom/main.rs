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
//! What this shows and what it does not: [`model`] is of a kernel without membarrier, where both sides of the asymmetric fence
//! are full fences; in [`model_with_interrupts`] threads that are plain do not fence, but are [interrupted](interrupts).
//! Loom also takes sequentially consistent loads and stores for acquiring and releasing ones; it may find
//! orders that cannot happen, but misses none of those that can.

#![cfg(loom)]

mod announced;
mod epoch;
mod interrupts;
mod operations;
mod published;
mod slices;

/// What the engine's module of this name offers, by loom.
mod sync {
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
    pub(crate) use std::sync::PoisonError;

    pub(crate) use crate::interrupts::{can_fence_everywhere, fence_everywhere};

    /// A thread becomes plain in its second section, where it can; so there are some in which it is fenced after it was plain.
    pub(crate) const CALM: u32 = 1;

    /// The processor may change the order all the same, and an interrupt may come.
    pub(crate) fn compiler_fence(_order: Ordering) {
        crate::interrupts::answer();
    }

    pub(crate) fn wait_a_little(_tries: u32) {
        loom::thread::yield_now();
    }

    /// Loom's, with an interrupt before a store, which is where one matters to what was read before.
    #[derive(Debug)]
    pub(crate) struct AtomicU64(loom::sync::atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> AtomicU64 {
            AtomicU64(loom::sync::atomic::AtomicU64::new(value))
        }

        pub(crate) fn store(&self, value: u64, order: Ordering) {
            crate::interrupts::answer();
            self.0.store(value, order);
        }
    }

    impl std::ops::Deref for AtomicU64 {
        type Target = loom::sync::atomic::AtomicU64;

        fn deref(&self) -> &Self::Target {
            &self.0
        }
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

/// Every order with at most this many involuntary switches between threads, without interrupts.
fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    model_with_interrupts(preemptions, 0, test);
}

/// The same with so many threads that can be [interrupted](interrupts::interruptible).
fn model_with_interrupts(preemptions: usize, threads: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    builder.check(move || {
        interrupts::begin(threads);
        test();
    });
}
