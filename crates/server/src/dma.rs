//! The way of a device's DMA from its model to the IOMMU: past those who count its faults and those who watch.

use std::sync::{Arc, Mutex};

use ioasid::Rid;
use ioasid::pasid::Pasid;
use ioasid_soft::dma::{DmaFault, DmaPort, PasidPorts};
use ioasid_soft::iommu::{Port, SoftIommu};

use crate::observer::{Transfer, Watched, WatchedDevice};
use crate::poison::lock;

/// What became of a device's DMA, whatever PASID it had. A port counts for itself only, and those of PASIDs come and go.
#[derive(Debug, Default)]
pub(crate) struct DmaFaults(Mutex<Faults>);

#[derive(Debug, Default)]
struct Faults {
    count: u64,
    last: Option<(Option<Pasid>, DmaFault)>,
}

impl DmaFaults {
    fn record(&self, pasid: Option<Pasid>, fault: DmaFault) {
        let mut faults = lock(&self.0);
        faults.count = faults.count.saturating_add(1);
        faults.last = Some((pasid, fault));
    }

    /// How many transfers were refused or cut short, and the latest in words.
    pub(crate) fn told(&self) -> (u64, Option<String>) {
        let faults = lock(&self.0);
        let words = faults.last.map(|(pasid, fault)| match pasid {
            None => fault.to_string(),
            Some(pasid) => format!("{fault} (PASID {pasid})"),
        });
        (faults.count, words)
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
        transfer: Transfer,
        carry_out: impl FnOnce() -> Result<(), DmaFault>,
    ) -> Result<(), DmaFault> {
        let result = match &self.watched {
            Some(watched) => watched.dma(transfer, carry_out),
            None => carry_out(),
        };
        result.inspect_err(|fault| self.faults.record(self.port.pasid(), *fault))
    }
}

impl DmaPort for DevicePort {
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        let transfer = Transfer { iova, length: buffer.len(), write: false };
        self.through(transfer, || self.port.read(iova, buffer))
    }

    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        let transfer = Transfer { iova, length: bytes.len(), write: true };
        self.through(transfer, || self.port.write(iova, bytes))
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
