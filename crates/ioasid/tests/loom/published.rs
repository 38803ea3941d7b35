//! A value that operations read while somebody replaces it, over the epochs themselves.

use crate::epoch::domain::Section;
use crate::model;
use crate::operations::{operation, wait_for_operations};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use value::Published;

#[path = "../../src/epoch/published.rs"]
#[allow(
    unreachable_pub,
    dead_code,
    reason = "the file is a module of the engine and not all of it is used here"
)]
mod value;

/// Loom fails the test when it is dropped before every read of it.
struct Value(UnsafeCell<u64>);

impl Value {
    fn new(value: u64) -> Value {
        Value(UnsafeCell::new(value))
    }

    fn get(&self) -> u64 {
        // SAFETY: what the model checks: it is written only when it goes.
        self.0.with(|value| unsafe { *value })
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        // SAFETY: as above.
        self.0.with_mut(|value| unsafe { *value = 0 });
    }
}

// SAFETY: what the model checks.
unsafe impl Sync for Value {}

/// One whose value has been replaced before: the first one stays as long as it does itself, and so is never freed too early.
fn replaced_once() -> Arc<Published<Value>> {
    let published = Published::new(Value::new(0));
    published.replace(Value::new(1));
    Arc::new(published)
}

#[test]
fn a_reader_has_one_value_or_the_other_as_long_as_it_reads() {
    model(3, || {
        let published = replaced_once();
        let reader = published.clone();
        let thread = thread::spawn(move || {
            let reading = reader.read();
            let value = reading.get();
            assert!(value == 1 || value == 2);
            assert_eq!(reading.get(), value);
        });
        published.replace(Value::new(2));
        thread.join().unwrap();
        assert_eq!(published.read().get(), 2);
    });
}

#[test]
fn what_was_replaced_twice_went_twice() {
    model(2, || {
        let published = Arc::new(Published::new(Value::new(1)));
        let reader = published.clone();
        let thread = thread::spawn(move || {
            let first = reader.read().get();
            let second = reader.read().get();
            // Nobody goes back to what was before.
            assert!(first >= 1 && second >= first, "{first} and then {second}");
        });
        published.replace(Value::new(2));
        published.replace(Value::new(3));
        thread.join().unwrap();
    });
}

#[test]
fn what_is_seen_replaced_is_not_seen_within_operations_that_begin_later() {
    model(3, || {
        let published = replaced_once();
        let reader = published.clone();
        // A map that looks at the memory's extent, inside a longer operation of its own.
        let thread = thread::spawn(move || {
            let outer = operation();
            let reading = reader.read();
            let value = reading.get();
            drop(outer);
            assert_eq!(reading.get(), value);
        });
        published.replace(Value::new(2));
        thread.join().unwrap();
    });
}
