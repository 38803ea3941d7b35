//! shuttle's, and stand-ins for what shuttle does not have.
//!
//! What a model does not cover because of them:
//!
//! - **Memory order.** shuttle takes every access for a sequentially consistent one, so fences do nothing: both halves of the
//!   asymmetric fence hold by themselves. Whether they are where they have to be is loom's question (`tests/loom`).
//! - **The inside of `arc-swap`.** A pointer that is loaded and stored in one step takes its place, which is what that
//!   crate promises.
//! - **Time** passes by being looked at: each look is [`LOOK`] later than the one before. So what waits until a deadline looks a
//!   bounded number of times, and others may do anything, or nothing, meanwhile. A wait with a timeout returns after one
//!   look, as any such wait may.

pub(crate) use shuttle::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, compiler_fence, fence,
};
pub(crate) use shuttle::sync::{
    Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError,
};
pub(crate) use shuttle::thread::{Builder, LocalKey};

use std::cell::Cell;
use std::ops::{Add, Deref, Sub};
use std::sync::Arc;
use std::time::Duration;

/// How much time passes between two looks at the clock.
const LOOK: Duration = Duration::from_millis(5);

/// After so many fenced sections a thread's sections are plain: soon, so that a model has threads of both kinds.
pub(crate) const CALM: u32 = 1;

pub(crate) fn can_fence_everywhere() -> bool {
    true
}

pub(crate) fn fence_everywhere() {
    fence(Ordering::SeqCst);
}

/// A pause between two looks at something that is not over yet: others come first.
pub(crate) fn wait_a_little(_tries: u32) {
    shuttle::thread::yield_now();
}

thread_local! {
    /// All threads of a model are on one of the system's.
    static CLOCK: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// A moment, by a clock that goes on when it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(Duration);

impl Instant {
    pub(crate) fn now() -> Instant {
        CLOCK.with(|clock| {
            clock.set(clock.get() + LOOK);
            Instant(clock.get())
        })
    }

    pub(crate) fn saturating_duration_since(&self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, time: Duration) -> Instant {
        Instant(self.0 + time)
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Instant) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

/// Waits for a notification, or for some time, which here is as short as it can be: others may go on before this does.
pub(crate) fn wait_for_some_time<'a, T>(
    lock: &'a Mutex<T>,
    _notified: &Condvar,
    guard: MutexGuard<'a, T>,
    _time: Duration,
) -> MutexGuard<'a, T> {
    drop(guard);
    shuttle::thread::yield_now();
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value that is made by whoever needs it first; others wait for him as shuttle has them wait.
#[derive(Debug)]
pub(crate) struct OnceLock<T> {
    made: AtomicBool,
    making: Mutex<()>,
    value: std::sync::OnceLock<T>,
}

impl<T> OnceLock<T> {
    pub(crate) const fn new() -> OnceLock<T> {
        OnceLock { made: AtomicBool::new(false), making: Mutex::new(()), value: std::sync::OnceLock::new() }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        if self.made.load(Ordering::SeqCst) { self.value.get() } else { None }
    }

    pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.get() {
            return value;
        }
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        match self.value.get() {
            Some(value) => value,
            None => {
                let value = make();
                let value = self.value.get_or_init(|| value);
                self.made.store(true, Ordering::SeqCst);
                value
            }
        }
    }
}

impl<T> Default for OnceLock<T> {
    fn default() -> OnceLock<T> {
        OnceLock::new()
    }
}

/// A pointer that is loaded and replaced in one step.
#[derive(Debug, Default)]
pub(crate) struct ArcSwapAny<P>(Mutex<P>);

pub(crate) type ArcSwapOption<T> = ArcSwapAny<Option<Arc<T>>>;

/// What was loaded.
#[derive(Debug)]
pub(crate) struct Guard<P>(P);

impl<P> Deref for Guard<P> {
    type Target = P;

    fn deref(&self) -> &P {
        &self.0
    }
}

impl<P: Clone> ArcSwapAny<P> {
    fn lock(&self) -> MutexGuard<'_, P> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn load(&self) -> Guard<P> {
        Guard(self.load_full())
    }

    pub(crate) fn load_full(&self) -> P {
        let value = self.lock().clone();
        // What is done by the value may come later.
        shuttle::thread::sleep(Duration::ZERO);
        value
    }

    /// Replaces the value by what is made of it.
    pub(crate) fn rcu(&self, mut make: impl FnMut(&P) -> P) {
        let mut value = self.lock();
        let new = make(&value);
        let _before = std::mem::replace(&mut *value, new);
        drop(value);
    }
}
