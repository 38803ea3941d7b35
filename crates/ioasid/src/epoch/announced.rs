//! A value that is made while operations run, and that they have to know.
//!
//! Some of what operations do is told to a value that most spaces never have. Whoever makes it looks, from then on, at what
//! operations have done *before they looked for the value*; what they do afterwards they tell. But an operation that is
//! running may have looked for the value and found none, while what it did is not to be seen yet: on a processor that writes
//! behind its reads, both miss each other. So the value is announced: made, and then the operations are waited for that may
//! not know it, once. Operations pay for it by the load of a pointer.

use super::wait_for_operations;
use crate::sync::OnceLock;

/// A value that is made late.
#[derive(Debug)]
pub(crate) struct Announced<T> {
    value: OnceLock<Box<T>>,
    /// Operations that do not know of it have ended.
    known: OnceLock<()>,
}

impl<T> Announced<T> {
    /// Nobody has needed it yet.
    pub(crate) fn new() -> Announced<T> {
        Announced { value: OnceLock::new(), known: OnceLock::new() }
    }

    /// The value, known to all operations. Not to be called inside one.
    pub(crate) fn get_or_make(&self, make: impl FnOnce() -> T) -> &T {
        let value = self.value.get_or_init(|| Box::new(make()));
        self.known.get_or_init(wait_for_operations);
        value
    }

    /// The value if there is one, for an operation that has done something and tells it.
    #[inline]
    pub(crate) fn get(&self) -> Option<&T> {
        self.value.get().map(|value| &**value)
    }
}
