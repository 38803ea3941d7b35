//! How long tests with threads go on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long such a test tries to find something.
const PATIENCE: Duration = Duration::from_millis(700);
/// What must happen happens within this time, however busy the machine is.
pub(crate) const CERTAINTY: Duration = Duration::from_secs(60);

/// The rounds of a test beside threads that go on until they are told to stop: for a while, and where others get all the time of the
/// machine, until each counter has counted something, or the test would show nothing. The threads are told when this is
/// dropped, also by a test that fails.
pub(crate) struct Search<'a, const N: usize> {
    stop: &'a AtomicBool,
    counters: [&'a AtomicU64; N],
    began: Instant,
    round: u64,
}

impl<'a, const N: usize> Search<'a, N> {
    pub(crate) fn new(stop: &'a AtomicBool, counters: [&'a AtomicU64; N]) -> Search<'a, N> {
        Search { stop, counters, began: Instant::now(), round: 0 }
    }
}

impl<const N: usize> Iterator for Search<'_, N> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let all = self.counters.iter().all(|counter| counter.load(Ordering::Relaxed) > 0);
        let enough = if all { PATIENCE } else { CERTAINTY };
        let round = self.round;
        self.round += 1;
        (self.began.elapsed() < enough).then_some(round)
    }
}

impl<const N: usize> Drop for Search<'_, N> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
