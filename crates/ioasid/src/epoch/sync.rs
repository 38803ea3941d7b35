//! What [`super::domain`] is made of: atomics, the two halves of the asymmetric fence, and a way to wait.

pub(super) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

pub(super) use ioasid_pagetable::fence::{heavy as heavy_fence, light as light_fence};

/// A pause between two looks at something that is not over yet.
pub(super) fn wait_a_little(tries: u32) {
    match tries {
        0..64 => std::hint::spin_loop(),
        64..256 => std::thread::yield_now(),
        _ => std::thread::sleep(std::time::Duration::from_micros(50)),
    }
}
