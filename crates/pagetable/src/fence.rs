//! An asymmetric fence: cheap for the many, dear for the few.
//!
//! Two threads write, each to its own word, and then look at the other's. That at least one of them sees what the
//! other wrote takes a fence on both sides, some twenty cycles for each, unless the system can make all running threads
//! of the process fence at once. Linux can (membarrier, private expedited): then the frequent side only has to keep
//! the compiler from changing the order, and the rare side pays for both with a system call.
//!
//! Where the system cannot, both sides fence. The choice is made once for the process, so that both always agree.

use core::sync::atomic::{AtomicU8, Ordering, compiler_fence, fence};

const UNKNOWN: u8 = 0;
const MEMBARRIER: u8 = 1;
const FENCES: u8 = 2;
static KIND: AtomicU8 = AtomicU8::new(UNKNOWN);

#[cfg(target_os = "linux")]
mod system {
    //! The system call. Both commands are in Linux since 4.14.

    fn membarrier(command: libc::c_int) -> bool {
        // SAFETY: the call takes integers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }

    pub(super) fn register() -> bool {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    }

    pub(super) fn all_threads() {
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn register() -> bool {
        false
    }

    pub(super) fn all_threads() {}
}

#[cold]
fn choose() -> u8 {
    let kind = if system::register() { MEMBARRIER } else { FENCES };
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

/// Whether [`heavy`] makes other threads fence, so that [`light`] does not.
#[inline(always)]
pub fn can_fence_everywhere() -> bool {
    kind() == MEMBARRIER
}

/// The cheap half: what the caller stored before is seen before what it loads afterwards was loaded, as far as
/// a caller of [`heavy`] can tell.
#[inline(always)]
pub fn light() {
    if can_fence_everywhere() {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// The dear half: every thread is made to fence. A system call, of some microseconds where other threads are running.
pub fn heavy() {
    fence(Ordering::SeqCst);
    if can_fence_everywhere() {
        system::all_threads();
    }
}
