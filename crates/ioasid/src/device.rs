//! Devices, and where their DMA goes.

use crate::iommu::{AttachError, Iommu, Requirements, Rid};
use crate::space::ReservationOwner;
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::table::Table;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

static DEVICES: AtomicU64 = AtomicU64::new(0);

/// A device behind an IOMMU. Blocked until it is attached, and again when this is dropped.
#[derive(Debug)]
pub struct Device {
    id: u64,
    iommu: Arc<dyn Iommu>,
    rid: Rid,
    requirements: Requirements,
    attached: Mutex<Option<Arc<Table>>>,
}

impl Device {
    /// The device with this requester ID, blocked; `None` if the IOMMU has no such device.
    pub fn new(iommu: Arc<dyn Iommu>, rid: Rid) -> Option<Device> {
        let requirements = iommu.requirements(rid)?;
        iommu.block(rid);
        let id = DEVICES.fetch_add(1, Ordering::Relaxed);
        Some(Device { id, iommu, rid, requirements, attached: Mutex::new(None) })
    }

    /// Its requester ID.
    pub fn rid(&self) -> Rid {
        self.rid
    }

    /// What it asks of a space.
    pub fn requirements(&self) -> &Requirements {
        &self.requirements
    }

    /// Whether its tables can [record what it writes](Table::record_writes).
    pub fn records_writes(&self) -> bool {
        self.iommu.records_writes(self.rid)
    }

    pub(crate) fn iommu(&self) -> &Arc<dyn Iommu> {
        &self.iommu
    }

    fn attached(&self) -> MutexGuard<'_, Option<Arc<Table>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches the device to a table, or moves it there in one step from the one it is attached to. On an error
    /// it stays where it was.
    pub fn attach(&self, table: &Arc<Table>) -> Result<(), AttachError> {
        if table.class() != self.requirements.class {
            return Err(AttachError::Incompatible);
        }
        let mut attached = self.attached();
        let owner = ReservationOwner::Device(self.id);
        let stays = attached.as_ref().is_some_and(|old| Arc::ptr_eq(old.space(), table.space()));
        if !stays {
            table.space().reserve_all(&self.requirements.reserved, owner)?;
        }
        if let Err(error) = self.iommu.attach(self.rid, table) {
            if !stays {
                table.space().unreserve(owner);
            }
            return Err(error);
        }
        if let Some(old) = attached.replace(table.clone()) {
            if !stays {
                old.space().unreserve(owner);
            }
        }
        Ok(())
    }

    /// Blocks the device's DMA; when this returns, none is running. Nothing happens if it is not attached.
    pub fn detach(&self) {
        if let Some(old) = self.attached().take() {
            self.iommu.block(self.rid);
            old.space().unreserve(ReservationOwner::Device(self.id));
        }
    }

    /// The table it is attached to.
    pub fn table(&self) -> Option<Arc<Table>> {
        self.attached().clone()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.detach();
    }
}
