//! The way of a device's DMA from its model to the IOMMU: past those who count its faults and those who watch.

use std::sync::{Arc, Mutex};

use ioasid::Rid;
use ioasid::pasid::Pasid;
use ioasid_soft::dma::{DmaFault, DmaPort, PasidPorts};
use ioasid_soft::iommu::{FaultRecord, Port, SoftIommu};

use crate::observer::{Watched, WatchedDevice};
use crate::poison::lock;

/// What became of a device's DMA, whatever PASID it had. A port counts for itself only, and those of PASIDs come and go.
#[derive(Debug, Default)]
pub(crate) struct DmaFaults(Mutex<(u64, Option<FaultRecord>)>);

impl DmaFaults {
    fn record(&self, record: FaultRecord) {
        let mut faults = lock(&self.0);
        *faults = (faults.0.saturating_add(1), Some(record));
    }

    /// How many transfers were refused or cut short, and the latest in words.
    pub(crate) fn told(&self) -> (u64, Option<String>) {
        let (count, last) = *lock(&self.0);
        let words = last.map(|FaultRecord { pasid, fault, .. }| match pasid {
            None => fault.to_string(),
            Some(pasid) => format!("{fault} (PASID {pasid})"),
        });
        (count, words)
    }
}

/// A device's port.
#[derive(Debug)]
pub(crate) struct DevicePort {
    pub(crate) port: Arc<Port>,
    pub(crate) faults: Arc<DmaFaults>,
    pub(crate) watched: Option<Arc<Watched>>,
}

impl DevicePort {
    fn through(
        &self,
        iova: u64,
        length: usize,
        write: bool,
        transfer: impl FnOnce() -> Result<(), DmaFault>,
    ) -> Result<(), DmaFault> {
        let result = match &self.watched {
            Some(watched) => watched.dma(iova, length, write, transfer),
            None => transfer(),
        };
        result.inspect_err(|fault| {
            let (device, pasid) = (self.port.rid(), self.port.pasid());
            self.faults.record(FaultRecord { device, pasid, fault: *fault });
        })
    }
}

impl DmaPort for DevicePort {
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.through(iova, buffer.len(), false, || self.port.read(iova, buffer))
    }

    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        self.through(iova, bytes.len(), true, || self.port.write(iova, bytes))
    }
}

/// The ports of a device's PASIDs.
#[derive(Debug)]
pub(crate) struct DevicePasids {
    pub(crate) iommu: Arc<SoftIommu>,
    pub(crate) device: Rid,
    /// How many bits they have.
    pub(crate) bits: u32,
    pub(crate) faults: Arc<DmaFaults>,
    pub(crate) watched: Option<Arc<WatchedDevice>>,
}

impl PasidPorts for DevicePasids {
    fn port(&self, pasid: Pasid) -> Option<Arc<dyn DmaPort>> {
        if pasid.get() >= 1 << self.bits {
            return None;
        }
        let port = self.iommu.port_with_pasid(self.device, pasid)?;
        let watched = self.watched.as_ref().map(|watched| watched.pasid(pasid));
        Some(Arc::new(DevicePort { port, faults: Arc::clone(&self.faults), watched }))
    }
}
