//! What an IOMMU writes down when it refuses a DMA.
//!
//! A device can fault as often as it likes, and nobody may ever read what is written down. So the log of a device has
//! room for a fixed number of records; further ones are dropped and counted, the earliest stay, as in the fault
//! recording registers of hardware: what came first is what explains the rest.
//!
//! Whose a request was, and through which space it went, only the DMA section knows in which it was refused: a moment later
//! the device may have moved, or be somebody else's. So a fault takes that along when it leaves the section ([`Refused`]),
//! and is written down afterwards, since writing down may take a lock, and whoever listens to it as long as he likes.

use super::Attachment;
use crate::dma::{DmaFault, DmaFaultReason};
use ioasid::epoch::DmaSection;
use ioasid::pasid::Pasid;
use ioasid::{Rid, SpaceId, Table};
use std::fmt::Display;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many faults of a device are kept until somebody takes them.
pub const FAULT_LOG_RECORDS: usize = 256;

/// A DMA that was refused or cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device}{}{}{}: {fault}", said(" with PASID ", *pasid), said(", cookie ", *cookie), said(", in space ", *space))]
pub struct FaultRecord {
    /// Whose DMA it was.
    pub device: Rid,
    /// The PASID of the request, if it had one.
    pub pasid: Option<Pasid>,
    /// What the device's user [calls the device](ioasid::Device::with_cookie), if anything. Of devices that share a requester ID: what
    /// all that are bound are called.
    pub cookie: Option<u64>,
    /// The [space](ioasid::Space::id) that the request went through. `None`: it was attached to none.
    pub space: Option<SpaceId>,
    /// Where, in which direction, and why.
    pub fault: DmaFault,
}

fn said(words: &str, value: Option<impl Display>) -> String {
    value.map(|value| format!("{words}{value}")).unwrap_or_default()
}

/// A fault on its way out of the section in which it came up.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) fault: DmaFault,
    cookie: Option<u64>,
    space: Option<SpaceId>,
}

impl Refused {
    #[cold]
    #[inline(never)]
    pub(super) fn new(
        section: &DmaSection,
        attachment: &Attachment,
        table: Option<&Table>,
        fault: DmaFault,
    ) -> Refused {
        let cookie = attachment.cookie.load(section).copied();
        Refused { fault, cookie, space: table.map(|table| table.space().id()) }
    }

    /// Whether the address has only to be looked up in a guest's table.
    pub(super) fn is_missed(&self) -> bool {
        self.fault.reason == DmaFaultReason::NotResolved
    }

    /// The same, as it is known outside of the section.
    pub(super) fn because(self, reason: DmaFaultReason) -> Refused {
        Refused { fault: DmaFault { reason, ..self.fault }, ..self }
    }

    pub(super) fn by(self, device: Rid, pasid: Option<Pasid>) -> FaultRecord {
        let Refused { fault, cookie, space } = self;
        FaultRecord { device, pasid, cookie, space, fault }
    }
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
        tracing::debug!(%record, "DMA fault");
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
