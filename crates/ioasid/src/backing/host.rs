//! Memory of this process that its owner lends.
//!
//! The backing is the memory's identity: whoever registers the same memory from several places shares the backing. Two
//! backings of the same memory are two objects, with output addresses and charges of their own.

use super::{Backing, Source};
use crate::bus::Bus;
use crate::host_memory::HostMemory;
use std::ptr::NonNull;
use std::sync::Arc;

impl Backing {
    /// `length` bytes of this process's memory that belong to the caller.
    ///
    /// # Safety
    ///
    /// The memory stays valid for reads and writes until the backing, all that was registered of it and every
    /// [`BorrowedSlice`](crate::BorrowedSlice) that leads to it are dropped. As long as a device can reach it, nobody holds a Rust reference to it.
    pub unsafe fn host(bus: &Arc<Bus>, pointer: NonNull<u8>, length: u64) -> Arc<Backing> {
        // SAFETY: passed on to the caller.
        let memory = unsafe { HostMemory::new(pointer, length) };
        Backing::whole(bus, Source::Host(memory), Some(length))
    }
}
