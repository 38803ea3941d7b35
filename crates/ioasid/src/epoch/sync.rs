//! What [`super::domain`] is made of: atomics, the two halves of the asymmetric fence, and a way to wait.

pub(super) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use std::sync::atomic::{AtomicU8, compiler_fence, fence};

const UNKNOWN: u8 = 0;
const MEMBARRIER: u8 = 1;
const FENCES: u8 = 2;
static KIND: AtomicU8 = AtomicU8::new(UNKNOWN);

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: the call takes integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

#[cold]
fn choose() -> u8 {
    let kind = if membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) { MEMBARRIER } else { FENCES };
    // The first choice stands: both sides must always agree.
    match KIND.compare_exchange(UNKNOWN, kind, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => kind,
        Err(chosen) => chosen,
    }
}

#[inline(always)]
fn kind() -> u8 {
    match KIND.load(Ordering::Relaxed) {
        UNKNOWN => choose(),
        kind => kind,
    }
}

/// The cheap half: what the caller stored before is seen before what it loads afterwards was loaded, as far as
/// a caller of [`heavy_fence`] can tell.
#[inline(always)]
pub(super) fn light_fence() {
    if kind() == MEMBARRIER {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// The expensive half: every thread is made to fence.
pub(super) fn heavy_fence() {
    fence(Ordering::SeqCst);
    if kind() == MEMBARRIER {
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
    }
}

/// A pause between two looks at something that is not over yet.
pub(super) fn wait_a_little(tries: u32) {
    match tries {
        0..64 => std::hint::spin_loop(),
        64..256 => std::thread::yield_now(),
        _ => std::thread::sleep(std::time::Duration::from_micros(50)),
    }
}
