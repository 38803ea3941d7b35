//! The IOTLB: remembered ways to leaf tables.
//!
//! A hardware IOTLB holds translations and must be told of every one that goes. This one holds the address of the
//! *table* in which the last leaf was found and reads the leaf again each time. An unmap searches nothing here,
//! a translation can never be stale, and one entry serves all the pages of a leaf table, 2 MiB of 4 KiB pages. Only
//! the retirement of a table makes an entry useless, and the table's generation says so without a search either.
//!
//! The price is one load more per translation, which is in the cache as often as the translation is hot.

use ioasid::CachedWalk;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard};

/// How many entries there are.
const ENTRIES: usize = 64;
/// Addresses that differ above this share a leaf table of 4 KiB pages, and so an entry.
const SPAN_BITS: u32 = 21;

/// The IOTLB of one device.
#[derive(Debug)]
pub(super) struct Iotlb {
    entries: [Mutex<CachedWalk<AtomicU64>>; ENTRIES],
}

impl Iotlb {
    pub(super) fn new() -> Iotlb {
        Iotlb { entries: [const { Mutex::new(CachedWalk::new()) }; ENTRIES] }
    }

    /// The entry in which the way to `iova` may be remembered, unless another thread of the device is using it.
    pub(super) fn entry(&self, iova: u64) -> Option<MutexGuard<'_, CachedWalk<AtomicU64>>> {
        let span = iova >> SPAN_BITS;
        // Buffers are often spaced by powers of two: fold the upper bits in.
        let index = (span ^ (span >> 6) ^ (span >> 15)) as usize % ENTRIES;
        self.entries[index].try_lock().ok()
    }
}
