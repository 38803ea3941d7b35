//! The standard library's, and others that are as good.

pub(crate) use arc_swap::ArcSwapOption;
pub(crate) use ioasid_pagetable::fence::{can_fence_everywhere, heavy as fence_everywhere};
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, compiler_fence, fence,
};
pub(crate) use std::sync::{
    Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError,
};
pub(crate) use std::thread::{Builder, LocalKey};
pub(crate) use std::time::Instant;

use std::time::Duration;

/// How many sections of a thread are fenced before they are plain. A fence costs some 8 ns, an interrupt of all
/// threads some microseconds, which a thread has paid by fences when it becomes plain.
pub(crate) const CALM: u32 = 1024;

/// A pause between two looks at something that is not over yet.
pub(crate) fn wait_a_little(tries: u32) {
    match tries {
        0..64 => std::hint::spin_loop(),
        64..256 => std::thread::yield_now(),
        _ => std::thread::sleep(Duration::from_micros(50)),
    }
}

/// Waits for a notification of `notified`, which belongs to `lock`, or for some time. May return earlier.
pub(crate) fn wait_for_some_time<'a, T>(
    _lock: &'a Mutex<T>,
    notified: &Condvar,
    guard: MutexGuard<'a, T>,
    time: Duration,
) -> MutexGuard<'a, T> {
    notified.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0
}
