//! A value that operations read and that is seldom replaced.
//!
//! Every map looks at the memory's extent, and hardly ever does anybody change it. A lock or a reference count would be
//! one cache line that all mappers of the same memory fight for; here a reader does a plain load inside of an
//! operation, and whoever replaces the value waits for the operations that may have read the old one. When
//! [`replace`](Published::replace) returns, the old value is used by nobody.
//!
//! Most values are never replaced, so the first one has its place in here and takes no allocation. It stays as long as
//! the [`Published`] does.

use super::{Section, operation, wait_for_operations};
use crate::sync::{AtomicPtr, Ordering};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr;

/// A value that is read within operations.
pub(crate) struct Published<T> {
    first: T,
    /// What has replaced it, from a `Box`; null: nothing has.
    value: AtomicPtr<T>,
    owned: PhantomData<Box<T>>,
}

// SAFETY: it hands out shared references to all threads, and drops the value on whichever replaces it.
unsafe impl<T: Send + Sync> Send for Published<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

/// The value as it was when reading began. It keeps an operation open.
pub(crate) struct Reading<'a, T> {
    value: &'a T,
    _operation: Section,
}

impl<T> Published<T> {
    pub(crate) fn new(first: T) -> Published<T> {
        Published { first, value: AtomicPtr::new(ptr::null_mut()), owned: PhantomData }
    }

    /// Reads the value, in an operation of its own or within the thread's present one.
    #[inline]
    pub(crate) fn read(&self) -> Reading<'_, T> {
        let operation = operation();
        // SAFETY: null or from a `Box`, and not freed before the operations that began before its replacement have
        // ended; this one began before the load, and lasts as long as the reference.
        let replacement = unsafe { self.value.load(Ordering::Acquire).as_ref() };
        Reading { value: replacement.unwrap_or(&self.first), _operation: operation }
    }

    /// Replaces the value. When this returns, no operation uses the old one. Not to be called inside an operation,
    /// and by one thread at a time.
    pub(crate) fn replace(&self, value: T) {
        let old = self.value.swap(Box::into_raw(Box::new(value)), Ordering::AcqRel);
        wait_for_operations();
        // SAFETY: null or from a `Box`, found by nobody any more since the swap, and used by nobody any more since the
        // wait.
        unsafe { drop_box(old) };
    }
}

/// Drops what a `Box` was made into, if it is not null.
///
/// # Safety
///
/// From a `Box` or null, and used by nobody any more.
unsafe fn drop_box<T>(value: *mut T) {
    if !value.is_null() {
        // SAFETY: promised by the caller.
        drop(unsafe { Box::from_raw(value) });
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        // SAFETY: null or from a `Box`; a reader borrows `self`, so there is none.
        unsafe { drop_box(self.value.load(Ordering::Relaxed)) };
    }
}

impl<T> Deref for Reading<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for Published<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read().fmt(f)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    /// Notices when it is read after its end.
    struct Canary(Box<u64>);

    impl Drop for Canary {
        fn drop(&mut self) {
            *self.0 = 0;
        }
    }

    #[test]
    fn a_reader_never_sees_a_value_that_is_gone() {
        let published = Published::new(Canary(Box::new(1)));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let reading = published.read();
                        let first = *reading.0;
                        assert_ne!(first, 0);
                        std::thread::yield_now();
                        assert_eq!(*reading.0, first);
                    }
                });
            }
            for number in 2..500 {
                published.replace(Canary(Box::new(number)));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(*published.read().0, 499);
    }
}
