//! Objects that are reached by calls.

use super::{Backing, Source};
use crate::bus::Bus;
use std::fmt;
use std::sync::Arc;

/// The memory is not there (any more): the process has ended, the file was truncated, the object was revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory at offset {offset:#x} of its object is gone")]
pub struct MemoryGone {
    /// Where in the object, in bytes.
    pub offset: u64,
}

/// Memory that is not mapped in this process and is reached by copying calls, which may block.
///
/// After an unmap has returned, no call for the unmapped bytes is running.
pub trait LateBound: Send + Sync + fmt::Debug {
    /// Copies `buffer.len()` bytes from `offset` on; all of them, or it is an error.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryGone>;

    /// Copies `bytes` to `offset`. On an error some of them may have been written.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryGone>;
}

impl Backing {
    /// An object that is reached by calls; it has no end.
    pub fn late_bound(bus: &Arc<Bus>, access: Arc<dyn LateBound>) -> Arc<Backing> {
        Backing::whole(bus, Source::Late(access), None)
    }
}
