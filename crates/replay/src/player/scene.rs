//! What a trace is replayed on: memory that stands for the guest's, and for each device something that keeps its mappings and does
//! its DMA.
//!
//! That is a [`Scene`]. [Ours](super::space) is a space with a software device on it; [others](super::peer) are what ours is compared
//! with. The player knows no more of them than stands here, so that all are asked the same, in the same order, with the same
//! bytes.

use super::{Mode, PlayError};
use crate::live::Mapping;
use crate::statistics::LeafCount;
use crate::trace::PAGE;
use ioasid::{Account, Backing, Bus, IovaRange, Memory, Space};
use ioasid_soft::dma::DmaPort;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Parts of the memory have a lock each, in turn.
const LOCKS: usize = 64;
/// Bytes of a part, as a power of two.
const PART_BITS: u32 = 21;

/// The memory of all devices, registered once. Its pages come when DMA touches them.
#[derive(Debug)]
pub(super) struct GuestMemory {
    pub(super) bus: Arc<Bus>,
    pub(super) backing: Arc<Backing>,
    pub(super) registered: Arc<Memory>,
    length: u64,
    /// Several mappings may lead to the same memory. Whoever writes bytes and looks for them holds the locks of the parts they
    /// lie in.
    parts: Box<[Mutex<()>; LOCKS]>,
}

impl GuestMemory {
    pub(super) fn new(bytes: u64, account: &Account) -> Result<GuestMemory, PlayError> {
        let bus = Bus::new();
        let backing =
            Backing::anonymous(&bus, bytes).map_err(|error| PlayError::NoMemory { bytes, error })?;
        let registered = Memory::register(&backing, 0, bytes, account)?;
        let parts = Box::new(std::array::from_fn(|_| Mutex::new(())));
        Ok(GuestMemory { bus, backing, registered, length: bytes, parts })
    }

    /// Where the memory for these pages lies, which begin at the page of a physical address. Addresses beyond the end begin
    /// again at the start, and a piece that would be cut in two by that lies before the end. `None`: there is not so much.
    pub(super) fn place(&self, physical: u64, pages: &IovaRange) -> Option<u64> {
        let latest = self.length.checked_sub(pages.length()?)?;
        let first = (physical & !(PAGE - 1)) % self.length;
        Some(first.min(latest))
    }

    /// Keeps others away from all of these pieces of memory: offsets and lengths.
    pub(super) fn lock_all(&self, pieces: &[(u64, u64)]) -> Vec<MutexGuard<'_, ()>> {
        let of_piece = |&(offset, bytes): &(u64, u64)| {
            let last = offset + bytes.saturating_sub(1);
            (offset >> PART_BITS..=last >> PART_BITS).take(LOCKS).map(|part| part as usize % LOCKS)
        };
        // In ascending order, so that nobody waits in a circle.
        let parts: BTreeSet<usize> = pieces.iter().flat_map(of_piece).collect();
        parts
            .into_iter()
            .map(|part| self.parts[part].lock().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }

    /// Keeps others away from these bytes, at most a part's worth of them.
    pub(super) fn lock(&self, offset: u64, bytes: u64) -> (MutexGuard<'_, ()>, Option<MutexGuard<'_, ()>>) {
        let part = |offset: u64| (offset >> PART_BITS) as usize % LOCKS;
        let (first, last) = (part(offset), part(offset + bytes.saturating_sub(1)));
        let lock = |part: usize| self.parts[part].lock().unwrap_or_else(PoisonError::into_inner);
        // The lower one first, so that nobody waits in a circle.
        let lower = lock(first.min(last));
        let upper = if first == last { None } else { Some(lock(first.max(last))) };
        (lower, upper)
    }
}

/// What a device's tables look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tables {
    /// The leaves that the device finds.
    pub(super) leaves: Vec<LeafCount>,
    /// Bytes of all tables.
    pub(super) bytes: u64,
}

/// What an IOMMU has counted of a device's DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) faults: u64,
    /// Translations that no remembered way led to.
    pub(super) walks: u64,
}

/// What keeps the mappings of one device of the trace, and does its DMA: all of a transfer or, with a fault, nothing.
///
/// The device is attached from the start. Several threads use it at the same time; what they map and unmap does not overlap.
/// Whatever else than DMA is refused is said in words, for the report.
pub(super) trait Scene: DmaPort + fmt::Debug {
    /// The space, if it is one of ours.
    fn space(&self) -> Option<&Arc<Space>>;

    /// Lets the device's DMA through to what is mapped.
    fn attach(&self) -> Result<(), String>;

    /// Blocks the device's DMA: when it returns the device reaches nothing.
    fn detach(&self);

    /// Makes a mapping.
    fn map(&self, mapping: &Mapping) -> Result<(), String>;

    /// Removes the mappings that lie in a range. How many bytes went, if that is known. When it returns the device reaches none
    /// of them.
    fn unmap(&self, pages: IovaRange, mode: Mode) -> Result<Option<u64>, String>;

    /// Whether the device is let through to an address, to read or to write.
    fn reaches(&self, iova: u64) -> bool;

    /// What its tables look like now, if it has any.
    fn tables(&self) -> Option<Tables>;

    /// What was counted so far, if anybody counts.
    fn counts(&self) -> Option<Counts>;

    /// Takes the device away and unmaps whatever there is. How many bytes that were, if that is known; or what is left that
    /// should not be.
    fn clear(&self) -> Result<Option<u64>, String>;
}
