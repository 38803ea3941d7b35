//! The atomic word that a table is made of.
//!
//! Hardware reads and writes entries as 64-bit words, and so do we. The walker is generic over the word so that
//! the very same code runs under the `loom` model checker, whose atomics record every access: a protocol that is
//! checked in a copy of the code is a protocol that is not checked.
//!
//! Only the orders that the protocol needs are offered. A load acquires and a store releases, because an entry is
//! how a table page and its contents are published; everything that must not lose a race is a compare-exchange.

/// A 64-bit atomic word.
pub trait AtomicEntry: Send + Sync + Sized + 'static {
    /// A word with this value.
    fn new(value: u64) -> Self;
    /// Reads, acquiring what was published with the value.
    fn load(&self) -> u64;
    /// Writes, publishing all that was written before.
    fn store(&self, value: u64);
    /// Replaces `current` by `new`; otherwise tells what stands there.
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64>;
    /// Writes, acquires what was published with the former value and returns it.
    fn swap(&self, value: u64) -> u64;
    /// Adds and returns the former value; wraps.
    fn fetch_add(&self, value: u64) -> u64;
    /// Subtracts and returns the former value; wraps.
    fn fetch_sub(&self, value: u64) -> u64;
}

macro_rules! atomic_entry {
    ($atomic:ty, $ordering:path) => {
        impl AtomicEntry for $atomic {
            #[inline(always)]
            fn new(value: u64) -> Self {
                <$atomic>::new(value)
            }
            #[inline(always)]
            fn load(&self) -> u64 {
                use $ordering as Ordering;
                <$atomic>::load(self, Ordering::Acquire)
            }
            #[inline(always)]
            fn store(&self, value: u64) {
                use $ordering as Ordering;
                <$atomic>::store(self, value, Ordering::Release);
            }
            #[inline(always)]
            fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
                use $ordering as Ordering;
                <$atomic>::compare_exchange(self, current, new, Ordering::AcqRel, Ordering::Acquire)
                    .map(|_| ())
            }
            #[inline(always)]
            fn swap(&self, value: u64) -> u64 {
                use $ordering as Ordering;
                <$atomic>::swap(self, value, Ordering::AcqRel)
            }
            #[inline(always)]
            fn fetch_add(&self, value: u64) -> u64 {
                use $ordering as Ordering;
                <$atomic>::fetch_add(self, value, Ordering::AcqRel)
            }
            #[inline(always)]
            fn fetch_sub(&self, value: u64) -> u64 {
                use $ordering as Ordering;
                <$atomic>::fetch_sub(self, value, Ordering::AcqRel)
            }
        }
    };
}

atomic_entry!(core::sync::atomic::AtomicU64, core::sync::atomic::Ordering);
#[cfg(loom)]
atomic_entry!(loom::sync::atomic::AtomicU64, loom::sync::atomic::Ordering);
