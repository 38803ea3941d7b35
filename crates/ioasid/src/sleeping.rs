//! Waiting for copies that may block.
//!
//! Memory of another process is copied by system calls, and such a call can sleep for as long as that process
//! likes: it may have put a fault handler of its own under the page. A DMA section must never sleep, so such a
//! copy leaves its section and counts itself here instead. The counts belong to one space, so that a program that
//! blocks its own memory makes only its own unmaps wait.

use crate::sync::{AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, PoisonError};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Knows the blocking copies that are running; a waiter waits for those that began before it did.
#[derive(Debug, Default)]
pub(crate) struct SleepingCopies {
    /// How many are running, for those who only want to know that there are none. Written under the lock.
    count: AtomicUsize,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The number of the next copy.
    next: u64,
    running: BTreeSet<u64>,
}

/// A point in time, by the number of the next copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(u64);

impl State {
    fn passed(&self, mark: Mark) -> bool {
        self.running.first().is_none_or(|&oldest| oldest >= mark.0)
    }
}

impl SleepingCopies {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a copy.
    pub(crate) fn begin(self: &Arc<Self>) -> SleepingCopy {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.running.insert(number);
        self.count.store(state.running.len(), Ordering::Release);
        SleepingCopy { copies: self.clone(), number }
    }

    /// Whether a copy is running, among those whose beginning the caller has seen: a copy begins in a DMA section, so that
    /// whoever has waited for these has seen it. Without a lock, because every strict unmap asks.
    pub(crate) fn any(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// Returns when every copy that had begun has ended. Copies that begin meanwhile are not waited for.
    pub(crate) fn wait(&self) {
        if self.any() {
            self.wait_for(self.mark());
        }
    }

    /// The copies that have begun until now.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.lock().next)
    }

    /// Returns when every copy that had begun at the mark has ended.
    pub(crate) fn wait_for(&self, mark: Mark) {
        let mut state = self.lock();
        while !state.passed(mark) {
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether every copy that had begun at the mark has ended.
    pub(crate) fn passed(&self, mark: Mark) -> bool {
        self.lock().passed(mark)
    }
}

/// A copy that is running. It may outlive the space, whose table a device may leave meanwhile.
#[derive(Debug)]
pub(crate) struct SleepingCopy {
    copies: Arc<SleepingCopies>,
    number: u64,
}

impl Drop for SleepingCopy {
    fn drop(&mut self) {
        let mut state = self.copies.lock();
        state.running.remove(&self.number);
        self.copies.count.store(state.running.len(), Ordering::Release);
        drop(state);
        self.copies.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    #[test]
    fn waits_for_what_began_before_and_for_nothing_else() {
        let copies = Arc::new(SleepingCopies::default());
        copies.wait();
        let old = copies.begin();
        let waited = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                copies.wait();
                waited.store(true, Ordering::SeqCst);
            });
            // Whether it has begun to wait or not: it must not have returned.
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waited.load(Ordering::SeqCst));
            // Begun after the waiter (or else the test shows less, but does not fail).
            let young = copies.begin();
            drop(old);
            waiter.join().unwrap();
            drop(young);
        });
        copies.wait();
    }
}
