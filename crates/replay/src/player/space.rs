//! A space of ours with a software device on it, as the scene of a replay.

use super::Mode;
use super::scene::{Counts, GuestMemory, Scene, Tables};
use crate::live::Mapping;
use crate::statistics::LeafCount;
use ioasid::{AttachError, Device, Iova, IovaRange, Permissions, Rid, Space, Table, epoch};
use ioasid_soft::dma::{DmaFault, DmaPort};
use ioasid_soft::iommu::{Port, SoftIommu, TableKind};
use std::sync::Arc;

/// A device and its space.
#[derive(Debug)]
pub(super) struct SpaceScene {
    // First the device is detached, then its table goes, then the space.
    device: Device,
    table: Arc<Table>,
    space: Arc<Space>,
    port: Arc<Port>,
    memory: Arc<GuestMemory>,
}

impl SpaceScene {
    pub(super) fn new(
        memory: &Arc<GuestMemory>,
        rid: Rid,
        kind: TableKind,
    ) -> Result<SpaceScene, AttachError> {
        let space = Space::new(&memory.bus);
        // An IOMMU of its own, so that no two devices can be taken for each other.
        let iommu = SoftIommu::new();
        let no_device = || AttachError::NoDevice(rid);
        let port = iommu.add_device(rid, kind).map_err(|_| no_device())?;
        let device = Device::new(iommu, rid).map_err(|_| no_device())?;
        let table = Table::for_device(&space, &device)?;
        device.attach(&table)?;
        Ok(SpaceScene { device, table, space, port, memory: memory.clone() })
    }
}

impl DmaPort for SpaceScene {
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.port.read(iova, buffer)
    }

    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        self.port.write(iova, bytes)
    }
}

impl Scene for SpaceScene {
    fn space(&self) -> Option<&Arc<Space>> {
        Some(&self.space)
    }

    fn attach(&self) -> Result<(), String> {
        self.device.attach(&self.table).map_err(|error| error.to_string())
    }

    fn detach(&self) {
        self.device.detach();
    }

    fn map(&self, mapping: &Mapping) -> Result<(), String> {
        let (iova, bytes) = (Iova::new(mapping.pages.first()), mapping.page_bytes());
        let permissions = mapping.direction.permissions();
        let mapped = self.space.map(iova, &self.memory.registered, mapping.memory, bytes, permissions);
        mapped.map_err(|error| error.to_string())
    }

    fn unmap(&self, pages: IovaRange, mode: Mode) -> Result<Option<u64>, String> {
        let unmapped = match mode {
            Mode::Strict => self.space.unmap(pages),
            Mode::Deferred => self.space.unmap_deferred(pages),
        };
        unmapped.map(|unmapped| Some(unmapped.bytes())).map_err(|error| error.to_string())
    }

    fn reaches(&self, iova: u64) -> bool {
        let section = epoch::dma();
        [Permissions::READ, Permissions::WRITE]
            .into_iter()
            .any(|wanted| self.port.translate(&section, iova, wanted).is_ok())
    }

    fn tables(&self) -> Option<Tables> {
        let leaves = self.table.leaves_by_size()?.into_iter();
        let leaves = leaves.map(|(size, count)| LeafCount { leaf_bytes: size.bytes(), count }).collect();
        let statistics = self.space.statistics();
        let bytes = statistics.native_table_bytes.saturating_add(statistics.derived_table_bytes);
        Some(Tables { leaves, bytes })
    }

    fn counts(&self) -> Option<Counts> {
        let statistics = self.port.statistics();
        Some(Counts { faults: statistics.faults, walks: statistics.walks })
    }

    fn clear(&self) -> Result<Option<u64>, String> {
        self.device.detach();
        let unmapped = self.space.unmap(IovaRange::ALL).map_err(|error| error.to_string())?;
        self.space.flush();
        let left = self.space.statistics();
        // The table that the trace's device had is held by this scene; others have gone with their devices.
        if left.mapped_bytes != 0 || left.busy_bytes != 0 || left.tables > 1 {
            let (mapped, busy, tables) = (left.mapped_bytes, left.busy_bytes, left.tables);
            return Err(format!(
                "all was unmapped, and there are {mapped} bytes mapped, {busy} busy, and {tables} tables"
            ));
        }
        Ok(Some(unmapped.bytes()))
    }
}
