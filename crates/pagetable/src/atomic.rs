//! The atomic word that a table is made of.
//!
//! Hardware reads and writes entries as 64-bit words, and so do we. The walker is generic over the word so that
//! the very same code runs under the `loom` and `shuttle` model checkers, whose atomics record every access: a protocol
//! that is checked in a copy of the code is a protocol that is not checked.
//!
//! Only the orders that the protocol needs are offered. A load acquires and a store releases, because an entry is
//! how a table page and its contents are published; everything that must not lose a race is a compare-exchange.
//!
//! One question needs more: *I have written here; has somebody written there?*, asked by two threads at once of each
//! other's words. At least one of them must get to know. After an exchange that is
//! [`load_after_exchange`](AtomicEntry::load_after_exchange), which costs nothing more; after a plain store a fence is
//! needed (see [`TableMemory`](crate::TableMemory) for cheaper ones).

/// A 64-bit atomic word.
pub trait AtomicEntry: Send + Sync + Sized + 'static {
    /// A word with this value.
    fn new(value: u64) -> Self;
    /// Reads, acquiring what was published with the value.
    fn load(&self) -> u64;
    /// Reads, behind every exchange that this thread has made, in one order with the exchanges and such reads of all
    /// threads.
    fn load_after_exchange(&self) -> u64;
    /// Orders all that this thread did before it against all that it does afterwards.
    fn fence();
    /// Writes, publishing all that was written before.
    fn store(&self, value: u64);
    /// Replaces `current` by `new`; otherwise tells what stands there.
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64>;
    /// Writes, acquires what was published with the former value and returns it.
    fn swap(&self, value: u64) -> u64;
    /// Adds and returns the former value; wraps.
    fn fetch_add(&self, value: u64) -> u64;
}

use core::sync::atomic::Ordering;

/// For atomics whose sequentially consistent accesses are what they are called.
mod as_called {
    #[inline(always)]
    pub(super) fn stored() {}
    #[inline(always)]
    pub(super) fn exchanged() {}
    #[inline(always)]
    pub(super) fn before_load() {}
}

/// loom takes sequentially consistent accesses for weaker ones, but knows the fence. It stands before a load that follows
/// an exchange, and not before one that follows a store, where the walker has to have put its own.
#[cfg(loom)]
mod as_in_loom {
    use core::cell::Cell;

    loom::thread_local! {
        static EXCHANGED: Cell<bool> = Cell::new(false);
    }

    pub(super) fn stored() {
        EXCHANGED.with(|exchanged| exchanged.set(false));
    }

    pub(super) fn exchanged() {
        EXCHANGED.with(|exchanged| exchanged.set(true));
    }

    pub(super) fn before_load() {
        if EXCHANGED.with(Cell::get) {
            loom::sync::atomic::fence(super::Ordering::SeqCst);
        }
    }
}

/// The words of an engine that runs under shuttle: the processor's own, so that tables are laid out as always, and all that
/// is written, and every look behind an exchange, is a point at which threads may change places. Looks alone are not: a walk
/// over a table would be hundreds of such points. The crate's own models use shuttle's words, where everything is one.
#[cfg(shuttle)]
mod as_written {
    fn may_change_places() {
        shuttle::thread::sleep(core::time::Duration::ZERO);
    }

    pub(super) fn stored() {
        may_change_places();
    }

    pub(super) fn exchanged() {
        may_change_places();
    }

    pub(super) fn before_load() {
        may_change_places();
    }
}

macro_rules! atomic_entry {
    ($atomic:ty, $fence:path, $order:ident) => {
        impl AtomicEntry for $atomic {
            #[inline(always)]
            fn new(value: u64) -> Self {
                <$atomic>::new(value)
            }
            #[inline(always)]
            fn load(&self) -> u64 {
                <$atomic>::load(self, Ordering::Acquire)
            }
            #[inline(always)]
            fn load_after_exchange(&self) -> u64 {
                $order::before_load();
                <$atomic>::load(self, Ordering::SeqCst)
            }
            #[inline(always)]
            fn fence() {
                $fence(Ordering::SeqCst);
            }
            #[inline(always)]
            fn store(&self, value: u64) {
                $order::stored();
                <$atomic>::store(self, value, Ordering::Release);
            }
            #[inline(always)]
            fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
                $order::exchanged();
                <$atomic>::compare_exchange(self, current, new, Ordering::SeqCst, Ordering::Acquire)
                    .map(|_| ())
            }
            #[inline(always)]
            fn swap(&self, value: u64) -> u64 {
                $order::exchanged();
                <$atomic>::swap(self, value, Ordering::AcqRel)
            }
            #[inline(always)]
            fn fetch_add(&self, value: u64) -> u64 {
                $order::exchanged();
                <$atomic>::fetch_add(self, value, Ordering::SeqCst)
            }
        }
    };
}

#[cfg(not(shuttle))]
atomic_entry!(core::sync::atomic::AtomicU64, core::sync::atomic::fence, as_called);
#[cfg(shuttle)]
atomic_entry!(core::sync::atomic::AtomicU64, core::sync::atomic::fence, as_written);
#[cfg(loom)]
atomic_entry!(loom::sync::atomic::AtomicU64, loom::sync::atomic::fence, as_in_loom);
// shuttle takes every access for a sequentially consistent one, so that fences do nothing there.
#[cfg(shuttle)]
atomic_entry!(shuttle::sync::atomic::AtomicU64, shuttle::sync::atomic::fence, as_called);
