//! The way from a device to memory.
//!
//! A device holds one [`DmaPort`] for its life and gives it I/O virtual addresses. Whatever is behind
//! the port (an IOMMU that translates, or, in [`FlatMemory`], nothing at all) answers for the whole
//! transfer with one result. The fault carries the address and the reason because a real IOMMU records
//! both; devices such as [`edu`](crate::edu) have no register to report them and count them instead.

use ioasid::pasid::Pasid;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// The port through which one device reads and writes memory.
///
/// Called from a device's own threads, with no lock of the device held, so an implementation may wait.
/// It must not panic.
///
/// After `Ok` all bytes have been moved. After a fault with any reason but
/// [`MemoryGone`](DmaFaultReason::MemoryGone) none have: an implementation translates the whole range
/// before it moves the first byte. Memory that disappears is noticed only while it is being copied, so
/// there a prefix may have been moved. An empty transfer succeeds and touches nothing.
pub trait DmaPort: Send + Sync {
    /// Fills `buffer` from memory at `iova` (a device read).
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault>;

    /// Stores `bytes` to memory at `iova` (a device write).
    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault>;
}

/// The ways of one device's requests that have a PASID.
///
/// Called with locks of the device held, so an implementation must not wait. It must not panic.
///
/// ```
/// use ioasid::Rid;
/// use ioasid::pasid::Pasid;
/// use ioasid_soft::dma::{DmaPort, PasidPorts};
/// use ioasid_soft::edu::{Edu, EduOptions};
/// use ioasid_soft::iommu::{SoftIommu, TableKind};
/// use std::sync::Arc;
///
/// /// A device behind a software IOMMU, with PASIDs of 8 bits.
/// struct Pasids(Arc<SoftIommu>, Rid);
///
/// impl PasidPorts for Pasids {
///     fn port(&self, pasid: Pasid) -> Option<Arc<dyn DmaPort>> {
///         let port = if pasid.get() < 256 { self.0.port_with_pasid(self.1, pasid)? } else { return None };
///         Some(port)
///     }
/// }
///
/// let iommu = SoftIommu::new();
/// let port = iommu.add_device(Rid(8), TableKind::Native)?;
/// let edu = Edu::with_pasids(port, Arc::new(Pasids(iommu, Rid(8))), EduOptions::default())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait PasidPorts: Send + Sync {
    /// The way of requests with this PASID; `None`: the device cannot make such requests. That a PASID leads nowhere is
    /// nothing to know here: then the port refuses what comes.
    fn port(&self, pasid: Pasid) -> Option<Arc<dyn DmaPort>>;
}

/// Why a transfer did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("device {} at IOVA {iova:#x} refused: {reason}", if *.write { "write" } else { "read" })]
pub struct DmaFault {
    /// The first address that could not be accessed.
    pub iova: u64,
    /// Whether the device meant to write to memory.
    pub write: bool,
    /// What stood in the way.
    pub reason: DmaFaultReason,
}

/// What stood in the way of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DmaFaultReason {
    /// The address translates to nothing.
    NotMapped,
    /// The address is mapped, but not for this direction.
    NoPermission,
    /// The device is attached to no address space.
    Blocked,
    /// The address is mapped, but the memory behind it no longer exists.
    MemoryGone,
    /// The transfer runs past the last address that can be translated.
    OutOfRange,
    /// The address of an atomic operation is no multiple of its size.
    Misaligned,
    /// The memory is there, but takes no atomic operations.
    NotAtomic,
    /// A guest's table leads to an address at which the space below has nothing, or not for this direction.
    SecondStage {
        /// The address in the space.
        address: u64,
    },
    /// The address is one of a guest's table, and has to be [looked up](crate::iommu::Port::resolve) before it can be
    /// translated in a section; or the table does not keep still.
    NotResolved,
}

impl fmt::Display for DmaFaultReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::SecondStage { address } => {
                return write!(
                    formatter,
                    "the guest's table leads to {address:#x}, where its address space has nothing for it"
                );
            }
            Self::NotResolved => "the guest's table has to be looked up first, or does not keep still",
            Self::NotMapped => "nothing is mapped there",
            Self::NoPermission => "the mapping does not permit it",
            Self::Blocked => "the device is attached to no address space",
            Self::MemoryGone => "the memory behind the mapping is gone",
            Self::OutOfRange => "the transfer runs past the end of the address space",
            Self::Misaligned => "an atomic operation needs an address that is a multiple of its size",
            Self::NotAtomic => "the memory takes no atomic operations",
        })
    }
}

/// A run of plain memory that a device reaches without any translation.
///
/// It stands in for an IOMMU where the device alone is of interest. Addresses outside of the run fault
/// as not mapped.
///
/// ```
/// use ioasid_soft::dma::{DmaFaultReason, DmaPort, FlatMemory};
///
/// let memory = FlatMemory::new(0x1000, 16);
/// memory.write(0x1004, b"data")?;
/// let mut bytes = [0; 4];
/// memory.read(0x1004, &mut bytes)?;
/// assert_eq!(&bytes, b"data");
/// assert_eq!(memory.read(0x100d, &mut bytes).unwrap_err().reason, DmaFaultReason::NotMapped);
/// # Ok::<(), ioasid_soft::dma::DmaFault>(())
/// ```
#[derive(Debug)]
pub struct FlatMemory {
    base: u64,
    bytes: Mutex<Vec<u8>>,
}

impl FlatMemory {
    /// Zeroed memory of `length` bytes whose first byte has the address `base`.
    pub fn new(base: u64, length: usize) -> Self {
        Self { base, bytes: Mutex::new(vec![0; length]) }
    }

    /// Runs `copy` on the bytes that the transfer names, if all of them exist.
    fn transfer(
        &self,
        iova: u64,
        length: usize,
        write: bool,
        copy: impl FnOnce(&mut [u8]),
    ) -> Result<(), DmaFault> {
        let Some(last_byte) = length.checked_sub(1) else { return Ok(()) };
        let fault = |iova, reason| DmaFault { iova, write, reason };
        if u64::try_from(last_byte).ok().and_then(|last| iova.checked_add(last)).is_none() {
            return Err(fault(iova, DmaFaultReason::OutOfRange));
        }
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let first = iova.checked_sub(self.base).and_then(|first| usize::try_from(first).ok());
        let available = first.and_then(|first| bytes.get_mut(first..)).unwrap_or_default();
        match available.get_mut(..length) {
            Some(range) => {
                copy(range);
                Ok(())
            }
            // No overflow: what is available is less than the length, whose end was checked above.
            None => Err(fault(iova + available.len() as u64, DmaFaultReason::NotMapped)),
        }
    }
}

impl DmaPort for FlatMemory {
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.transfer(iova, buffer.len(), false, |range| buffer.copy_from_slice(range))
    }

    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        self.transfer(iova, bytes.len(), true, |range| range.copy_from_slice(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_of_the_address_space_can_be_memory() {
        let memory = FlatMemory::new(u64::MAX - 7, 8);
        memory.write(u64::MAX - 3, &[1, 2, 3, 4]).unwrap();
        let mut bytes = [0; 8];
        memory.read(u64::MAX - 7, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 1, 2, 3, 4]);
        let fault = memory.write(u64::MAX - 3, &[0; 5]).unwrap_err();
        assert_eq!(fault, DmaFault { iova: u64::MAX - 3, write: true, reason: DmaFaultReason::OutOfRange });
    }

    #[test]
    fn a_fault_names_the_first_missing_byte_and_moves_nothing() {
        let memory = FlatMemory::new(0x1000, 0x10);
        let fault = memory.write(0x1008, &[0xff; 9]).unwrap_err();
        assert_eq!(fault, DmaFault { iova: 0x1010, write: true, reason: DmaFaultReason::NotMapped });
        assert_eq!(fault.to_string(), "device write at IOVA 0x1010 refused: nothing is mapped there");
        let mut bytes = [0xee; 0x10];
        memory.read(0x1000, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 0x10]);
        let fault = memory.read(0xfff, &mut bytes[..1]).unwrap_err();
        assert_eq!(fault, DmaFault { iova: 0xfff, write: false, reason: DmaFaultReason::NotMapped });
        memory.read(0, &mut []).unwrap();
    }
}
