//! What files of the engine find in its module of epochs: the domain of operations, and each thread's part in it.

use crate::epoch::domain::{Domain, FIRST_REQUEST, Local, Section};
use crate::sync::{AtomicPtr, AtomicU64};

loom::lazy_static! {
    static ref OPERATIONS: &'static Domain =
        Box::leak(Box::new(Domain::new(AtomicU64::new(FIRST_REQUEST), AtomicPtr::new(std::ptr::null_mut()))));
}
loom::thread_local! {
    static LOCAL: Local = Local::new(*OPERATIONS);
}

pub(crate) fn operation() -> Section {
    LOCAL.with(Local::enter)
}

pub(crate) fn wait_for_operations() {
    OPERATIONS.synchronize(LOCAL.with(Local::participant));
}
