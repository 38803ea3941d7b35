//! Taking a lock whose last holder may have panicked.
//!
//! Nothing in the server panics by design. Should a defect make one call panic all the same, the other clients go on:
//! every structure is changed by steps that each leave it consistent, so the poison mark is not worth ending the
//! server for.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes `mutex`, poisoned or not.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
