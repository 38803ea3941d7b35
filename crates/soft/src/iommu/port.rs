//! The way of a DMA.
//!
//! 1. A DMA section begins. What is found in it stays valid until it ends, and an unmap that wants to be sure
//!    waits for that end.
//! 2. The device's table is looked up. There is none: blocked.
//! 3. The IOVA is translated by the table's own format, through the IOTLB.
//! 4. The leaf's permissions are checked against the direction.
//! 5. The output address leads to memory. Memory of this process is copied there and then, at most 64 KiB, and the
//!    section ends. Memory behind calls may block: the section ends first, and the copy is made while the space
//!    counts it.
//!
//! A transfer of several pieces is translated whole before the first byte moves, so that it faults without having
//! moved anything. If it is unmapped half-way, it ends half-way: that is what a device sees on a real machine too.

use super::iotlb::Iotlb;
use super::{Attachment, TableKind};
use crate::dma::{DmaFault, DmaFaultReason, DmaPort};
use ioasid::pagetable::VtdSecondStage;
use ioasid::{Attributes, CachedWalk, Leaf, RadixTable, Rid, Table, Translated, WalkFault, epoch};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What is copied within one DMA section.
const PIECE: u64 = 64 * 1024;

/// A device's way to memory.
#[derive(Debug)]
pub struct Port {
    rid: Rid,
    attachment: Arc<Attachment>,
    iotlb: Iotlb,
    faults: AtomicU64,
    last_fault: Mutex<Option<DmaFault>>,
}

/// What became of a device's DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortStatistics {
    /// Transfers that were refused or cut short.
    pub faults: u64,
    /// The latest of them.
    pub last_fault: Option<DmaFault>,
}

/// Which way the bytes go.
enum Transfer<'a> {
    /// From memory to the device.
    Read(&'a mut [u8]),
    /// From the device to memory.
    Write(&'a [u8]),
}

impl Transfer<'_> {
    fn length(&self) -> u64 {
        match self {
            Transfer::Read(buffer) => buffer.len() as u64,
            Transfer::Write(bytes) => bytes.len() as u64,
        }
    }

    fn is_write(&self) -> bool {
        matches!(self, Transfer::Write(_))
    }
}

impl Port {
    pub(super) fn new(rid: Rid, attachment: Arc<Attachment>) -> Port {
        let faults = AtomicU64::new(0);
        Port { rid, attachment, iotlb: Iotlb::new(), faults, last_fault: Mutex::new(None) }
    }

    /// The device's requester ID.
    pub fn rid(&self) -> Rid {
        self.rid
    }

    /// What became of its DMA so far.
    pub fn statistics(&self) -> PortStatistics {
        let last_fault = *self.last_fault.lock().unwrap_or_else(PoisonError::into_inner);
        PortStatistics { faults: self.faults.load(Ordering::Relaxed), last_fault }
    }

    fn transfer(&self, iova: u64, transfer: Transfer<'_>) -> Result<(), DmaFault> {
        self.try_transfer(iova, transfer).inspect_err(|fault| {
            tracing::debug!(device = %self.rid, %fault, "DMA fault");
            self.faults.fetch_add(1, Ordering::Relaxed);
            *self.last_fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(*fault);
        })
    }

    fn try_transfer(&self, iova: u64, mut transfer: Transfer<'_>) -> Result<(), DmaFault> {
        let length = transfer.length();
        let write = transfer.is_write();
        let Some(last_byte) = length.checked_sub(1) else { return Ok(()) };
        if iova.checked_add(last_byte).is_none() {
            return Err(DmaFault { iova, write, reason: DmaFaultReason::OutOfRange });
        }
        let mut done = self.copy_piece(iova, &mut transfer, 0, true)?;
        while done < length {
            done += self.copy_piece(iova, &mut transfer, done, false)?;
        }
        Ok(())
    }

    /// Copies as much of the transfer, from `done` on, as one leaf and one section allow. `first`: nothing has
    /// moved yet, so all of the rest is translated before anything does.
    fn copy_piece(
        &self,
        iova: u64,
        transfer: &mut Transfer<'_>,
        done: u64,
        first: bool,
    ) -> Result<u64, DmaFault> {
        let write = transfer.is_write();
        let at = iova + done;
        let left = transfer.length() - done;
        let fault = |iova, reason| DmaFault { iova, write, reason };
        let section = epoch::dma();
        let attached = self.attachment.table.load();
        let Some(table) = attached.as_ref() else { return Err(fault(at, DmaFaultReason::Blocked)) };
        let leaf = self.translate(&section, table, at, write)?;
        let in_leaf = leaf.range().last() - at;
        if first && in_leaf < left - 1 {
            self.check_rest(&section, table, at + in_leaf, at + (left - 1), write)?;
        }
        let count = left.min(in_leaf.saturating_add(1)).min(PIECE);
        let bytes = done as usize..(done + count) as usize;
        let gone = |_| fault(at, DmaFaultReason::MemoryGone);
        match table.space().memory_at(&section, leaf.output(at)).map_err(gone)? {
            Translated::Here(memory) => match transfer {
                Transfer::Read(buffer) => memory.read(&mut buffer[bytes]).map_err(gone)?,
                Transfer::Write(source) => memory.write(&source[bytes]).map_err(gone)?,
            },
            Translated::Late(memory) => {
                drop(section);
                match transfer {
                    Transfer::Read(buffer) => memory.read(&mut buffer[bytes]).map_err(gone)?,
                    Transfer::Write(source) => memory.write(&source[bytes]).map_err(gone)?,
                }
            }
        }
        Ok(count)
    }

    /// Translates everything behind `done`, the last address of a leaf, up to `last`.
    fn check_rest(
        &self,
        section: &epoch::Section,
        table: &Table,
        mut done: u64,
        last: u64,
        write: bool,
    ) -> Result<(), DmaFault> {
        while done < last {
            done = self.translate(section, table, done + 1, write)?.range().last();
        }
        Ok(())
    }

    /// Finds the leaf for an address and checks that it allows the direction.
    fn translate(
        &self,
        section: &epoch::Section,
        table: &Table,
        iova: u64,
        write: bool,
    ) -> Result<Leaf, DmaFault> {
        let walked = match self.iotlb.entry(iova) {
            Some(mut cache) => self.walk(section, table, iova, &mut cache),
            None => self.walk(section, table, iova, &mut CachedWalk::new()),
        };
        let leaf = walked.map_err(|error| {
            let reason = match error {
                WalkFault::OutOfRange(_) => DmaFaultReason::OutOfRange,
                WalkFault::NotMapped(_) | WalkFault::Malformed(_) => DmaFaultReason::NotMapped,
            };
            DmaFault { iova, write, reason }
        })?;
        let needed = if write { Attributes::WRITE } else { Attributes::READ };
        if leaf.attributes.contains(needed) {
            Ok(leaf)
        } else {
            Err(DmaFault { iova, write, reason: DmaFaultReason::NoPermission })
        }
    }

    fn walk(
        &self,
        section: &epoch::Section,
        table: &Table,
        iova: u64,
        cache: &mut CachedWalk<AtomicU64>,
    ) -> Result<Leaf, WalkFault> {
        match self.attachment.kind {
            TableKind::Native => table.space().walk_for_dma(section, iova, cache),
            TableKind::VtdSecondStage => {
                let derived = table.derived().and_then(|derived| derived.as_any().downcast_ref());
                let derived: &RadixTable<VtdSecondStage> = derived.ok_or(WalkFault::NotMapped(iova))?;
                derived.radix().walk_cached(iova, cache)
            }
        }
    }
}

impl DmaPort for Port {
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.transfer(iova, Transfer::Read(buffer))
    }

    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        self.transfer(iova, Transfer::Write(bytes))
    }
}
