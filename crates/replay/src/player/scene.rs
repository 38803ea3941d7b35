//! What a trace is replayed on: memory that stands for the guest's, and for each device a space, a table and a port.

use super::PlayError;
use crate::live::Mapping;
use crate::trace::PAGE;
use ioasid::{
    Account, AttachError, Backing, Bus, Device, Iova, IovaRange, MapError, Memory, PageSize, Permissions,
    Rid, Space, Table, UnmapError, Unmapped, epoch,
};
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use std::collections::BTreeSet;
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
    registered: Arc<Memory>,
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

/// A device and its space.
#[derive(Debug)]
pub(super) struct Scene {
    // First the device is detached, then its table goes, then the space.
    device: Device,
    table: Arc<Table>,
    space: Arc<Space>,
    pub(super) port: Arc<Port>,
    pub(super) memory: Arc<GuestMemory>,
}

impl Scene {
    pub(super) fn new(memory: &Arc<GuestMemory>, rid: Rid, kind: TableKind) -> Result<Scene, AttachError> {
        let space = Space::new(&memory.bus);
        // An IOMMU of its own, so that no two devices can be taken for each other.
        let iommu = SoftIommu::new();
        let no_device = || AttachError::NoDevice(rid);
        let port = iommu.add_device(rid, kind).map_err(|_| no_device())?;
        let device = Device::new(iommu, rid).ok_or_else(no_device)?;
        let table = Table::for_device(&space, &device)?;
        device.attach(&table)?;
        Ok(Scene { device, table, space, port, memory: memory.clone() })
    }

    /// Lets the device's DMA go through the space. It does so from the start.
    pub(super) fn attach(&self) -> Result<(), AttachError> {
        self.device.attach(&self.table)
    }

    /// Blocks the device's DMA.
    pub(super) fn detach(&self) {
        self.device.detach();
    }

    pub(super) fn map(&self, mapping: &Mapping) -> Result<(), MapError> {
        let (iova, bytes) = (Iova::new(mapping.pages.first()), mapping.page_bytes());
        let permissions = mapping.direction.permissions();
        self.space.map(iova, &self.memory.registered, mapping.memory, bytes, permissions)
    }

    pub(super) fn unmap(&self, pages: IovaRange) -> Result<Unmapped, UnmapError> {
        self.space.unmap(pages)
    }

    pub(super) fn unmap_deferred(&self, pages: IovaRange) -> Result<Unmapped, UnmapError> {
        self.space.unmap_deferred(pages)
    }

    /// Whether the device is let through to an address, to read or to write.
    pub(super) fn reaches(&self, iova: u64) -> bool {
        let section = epoch::dma();
        [Permissions::READ, Permissions::WRITE]
            .into_iter()
            .any(|wanted| self.port.translate(&section, iova, wanted).is_ok())
    }

    /// The leaves that the device finds.
    pub(super) fn leaves_by_size(&self) -> Vec<(PageSize, u64)> {
        self.table.leaves_by_size().unwrap_or_default()
    }

    /// Bytes of all tables of the space.
    pub(super) fn table_bytes(&self) -> u64 {
        let statistics = self.space.statistics();
        statistics.native_table_bytes.saturating_add(statistics.derived_table_bytes)
    }

    pub(super) fn faults(&self) -> u64 {
        self.port.statistics().faults
    }

    /// Unmaps whatever there is, and says how many bytes that were.
    pub(super) fn unmap_all(&self) -> Result<u64, String> {
        self.device.detach();
        let unmapped = self.space.unmap(IovaRange::ALL).map_err(|error| error.to_string())?;
        Ok(unmapped.bytes())
    }
}
