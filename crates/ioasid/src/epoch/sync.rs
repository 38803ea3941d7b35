//! What [`super::domain`] is made of: atomics, fences, and a way to wait.

pub(super) use ioasid_pagetable::fence::{can_fence_everywhere, heavy as fence_everywhere};
pub(super) use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence, fence,
};

/// How many sections of a thread are fenced before they are plain. A fence costs some 8 ns, an interrupt of all
/// threads some microseconds, which a thread has paid by fences when it becomes plain.
pub(super) const CALM: u32 = 1024;

/// A pause between two looks at something that is not over yet.
pub(super) fn wait_a_little(tries: u32) {
    match tries {
        0..64 => std::hint::spin_loop(),
        64..256 => std::thread::yield_now(),
        _ => std::thread::sleep(std::time::Duration::from_micros(50)),
    }
}
