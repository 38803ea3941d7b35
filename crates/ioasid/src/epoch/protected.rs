//! A value that DMA reads and others exchange.
//!
//! What a DMA looks up on its way (the table that its device is attached to, the window that an output address lies in)
//! changes rarely and is read by every transfer. A reference count would be a line that all devices fight for. In
//! a DMA section none is needed: whoever exchanges the value waits, before he lets go of the old one, until
//! every section that may have found it has ended. Reading is one load.

use super::{DmaSection, wait_for_dma};
use crate::sync::{AtomicPtr, Ordering};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// A shared value, or none, that is read within DMA sections.
pub struct Protected<T> {
    /// From [`Arc::into_raw`], or null.
    value: AtomicPtr<T>,
    owns: PhantomData<Arc<T>>,
}

/// A value that was taken out of a [`Protected`] and that DMA may still be using. Dropping it waits until no DMA does;
/// that must not happen inside a DMA section, which would wait for itself.
#[derive(Debug)]
#[must_use = "dropping it waits for DMA"]
pub struct Replaced<T>(Option<Arc<T>>);

impl<T> Protected<T> {
    /// With a value or without.
    pub fn new(value: Option<Arc<T>>) -> Protected<T> {
        Protected { value: AtomicPtr::new(into_raw(value)), owns: PhantomData }
    }

    /// The value, which stays as long as the section is open.
    #[inline]
    pub fn load<'section>(&'section self, _section: &'section DmaSection) -> Option<&'section T> {
        // SAFETY: the pointer is null or of an `Arc` that was put here. Whoever takes it out holds the `Arc` until
        // every DMA section has ended that had begun by then, and this one had if it found the pointer.
        unsafe { self.value.load(Ordering::Acquire).as_ref() }
    }

    /// Puts another value in its place. DMA that begins afterwards finds the new one.
    pub fn replace(&self, value: Option<Arc<T>>) -> Replaced<T> {
        let old = self.value.swap(into_raw(value), Ordering::SeqCst);
        // SAFETY: null or from `Arc::into_raw` in this type; the swap has made us the only ones to have it.
        Replaced((!old.is_null()).then(|| unsafe { Arc::from_raw(old) }))
    }
}

fn into_raw<T>(value: Option<Arc<T>>) -> *mut T {
    value.map_or(std::ptr::null_mut(), |value| Arc::into_raw(value).cast_mut())
}

impl<T> Replaced<T> {
    /// Whether there was a value.
    pub fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// The value, when no DMA uses it any more.
    pub fn after_dma(mut self) -> Option<Arc<T>> {
        let value = self.0.take()?;
        wait_for_dma();
        Some(value)
    }

    /// Lets go of many, with one wait for all of them.
    pub fn drop_all(replaced: Vec<Replaced<T>>) {
        if replaced.is_empty() {
            return;
        }
        let values: Vec<Arc<T>> = replaced.into_iter().filter_map(|mut replaced| replaced.0.take()).collect();
        if !values.is_empty() {
            wait_for_dma();
        }
    }
}

impl<T> Drop for Replaced<T> {
    fn drop(&mut self) {
        if self.0.is_some() {
            wait_for_dma();
        }
    }
}

impl<T> Drop for Protected<T> {
    fn drop(&mut self) {
        // A reference from `load` borrows us, so none is left.
        let value = *self.value.get_mut();
        if !value.is_null() {
            // SAFETY: from `Arc::into_raw`, and in nobody else's hands.
            drop(unsafe { Arc::from_raw(value) });
        }
    }
}

// SAFETY: it owns an `Arc<T>` and gives out `&T`, so what holds for `Arc` holds here.
unsafe impl<T: Send + Sync> Send for Protected<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Protected<T> {}

impl<T> Default for Protected<T> {
    fn default() -> Protected<T> {
        Protected::new(None)
    }
}

impl<T: fmt::Debug> fmt::Debug for Protected<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Protected").field(&self.load(&super::dma())).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    /// A value that notices when it is used after its end.
    struct Guarded(AtomicU64);

    const ALIVE: u64 = 0x600d;

    impl Drop for Guarded {
        fn drop(&mut self) {
            self.0.store(0, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_value_outlives_every_section_that_has_found_it() {
        let place = Protected::new(Some(Arc::new(Guarded(AtomicU64::new(ALIVE)))));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let section = crate::epoch::dma();
                        if let Some(value) = place.load(&section) {
                            for _ in 0..50 {
                                assert_eq!(value.0.load(Ordering::Relaxed), ALIVE);
                            }
                        }
                    }
                });
            }
            for round in 0..2_000 {
                let new = (round % 3 != 0).then(|| Arc::new(Guarded(AtomicU64::new(ALIVE))));
                match round % 2 {
                    0 => drop(place.replace(new)),
                    _ => drop(place.replace(new).after_dma()),
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        let last = Arc::new(Guarded(AtomicU64::new(ALIVE)));
        Replaced::drop_all(vec![place.replace(Some(last.clone())), place.replace(None)]);
        assert_eq!(Arc::strong_count(&last), 1);
    }
}
