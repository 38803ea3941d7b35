//! A value that is made while operations run: none of them keeps to itself what the maker does not see.
//!
//! The table is one leaf, and the value is what is known to be free, as a space's placement has it.

use crate::model;
use crate::operations::{operation, wait_for_operations};
use crate::sync::Mutex;
use late::Announced;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

#[path = "../../src/epoch/announced.rs"]
#[allow(
    unreachable_pub,
    dead_code,
    reason = "the file is a module of the engine and not all of it is used here"
)]
mod late;

const ABSENT: u64 = 0;
const BUSY: u64 = 1;

struct Space {
    leaf: AtomicU64,
    /// Whether the leaf's place is free.
    placement: Announced<Mutex<bool>>,
}

impl Space {
    /// The last steps of an unmap.
    fn release(&self) {
        let _operation = operation();
        self.leaf.store(ABSENT, Ordering::Release);
        if let Some(free) = self.placement.get() {
            *free.lock().unwrap() = true;
        }
    }

    /// Learns from the table whether the place is free.
    fn learn(&self) {
        let placement = self.placement.get_or_make(|| Mutex::new(true));
        let _operation = operation();
        let mut free = placement.lock().unwrap();
        *free = self.leaf.load(Ordering::Acquire) == ABSENT;
    }
}

fn space() -> Arc<Space> {
    Arc::new(Space { leaf: AtomicU64::new(BUSY), placement: Announced::new() })
}

#[test]
fn nothing_that_is_free_is_left_out() {
    model(3, || {
        let space = space();
        let unmap = {
            let space = space.clone();
            thread::spawn(move || space.release())
        };
        space.learn();
        unmap.join().unwrap();
        assert!(*space.placement.get().unwrap().lock().unwrap(), "the leaf is free and nobody knows");
    });
}

#[test]
fn whoever_asks_second_waits_as_well() {
    model(2, || {
        let space = space();
        let threads = [Space::release as fn(&Space), Space::learn].map(|work| {
            let space = space.clone();
            thread::spawn(move || work(&space))
        });
        space.learn();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(*space.placement.get().unwrap().lock().unwrap(), "the leaf is free and nobody knows");
    });
}
