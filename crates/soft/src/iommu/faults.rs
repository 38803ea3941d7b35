//! What an IOMMU writes down when it refuses a DMA.
//!
//! A device can fault as often as it likes, and nobody may ever read what is written down. So the log of a device has
//! room for a fixed number of records; further ones are dropped and counted, the earliest stay, as in the fault
//! recording registers of hardware: what came first is what explains the rest.

use crate::dma::DmaFault;
use ioasid::Rid;
use ioasid::pasid::Pasid;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many faults of a device are kept until somebody takes them.
pub const FAULT_LOG_RECORDS: usize = 256;

/// A DMA that was refused or cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device}{}: {fault}", pasid.map(|pasid| format!(" with PASID {pasid}")).unwrap_or_default())]
pub struct FaultRecord {
    /// Whose DMA it was.
    pub device: Rid,
    /// The PASID of the request, if it had one.
    pub pasid: Option<Pasid>,
    /// Where, in which direction, and why.
    pub fault: DmaFault,
}

/// What was written down since the log was taken last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultLog {
    /// The faults, oldest first; at most [`FAULT_LOG_RECORDS`].
    pub records: Vec<FaultRecord>,
    /// How many later ones found no room.
    pub dropped: u64,
}

/// The faults of one device.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    log: FaultLog,
    total: u64,
    latest: Option<DmaFault>,
}

impl Faults {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cold]
    pub(super) fn record(&self, record: FaultRecord) {
        tracing::debug!(device = %record.device, fault = %record.fault, "DMA fault");
        let mut state = self.lock();
        state.total = state.total.saturating_add(1);
        state.latest = Some(record.fault);
        if state.log.records.len() < FAULT_LOG_RECORDS {
            state.log.records.push(record);
        } else {
            state.log.dropped = state.log.dropped.saturating_add(1);
        }
    }

    pub(super) fn take(&self) -> FaultLog {
        std::mem::take(&mut self.lock().log)
    }

    /// How many there ever were, and the latest.
    pub(super) fn total_and_latest(&self) -> (u64, Option<DmaFault>) {
        let state = self.lock();
        (state.total, state.latest)
    }
}
