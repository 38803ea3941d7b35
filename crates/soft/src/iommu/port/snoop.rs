//! Requests that ask not to snoop the CPU's caches.
//!
//! Such a request saves the time of asking the caches, and its device's driver takes care that they hold nothing of the
//! memory. Who does not trust the driver has the IOMMU override it: a leaf can say that accesses snoop whatever they ask.
//! All bytes here are copied by a CPU, so nobody ever finds stale ones; a request says instead what it would have done.

use super::{LOOKS, Port, Transfer, with_derived};
use crate::dma::DmaFault;
use ioasid::{Attributes, Coherency, epoch};

/// What became of a request that asked not to snoop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Snooping {
    /// It snooped: it is coherent with the CPU's caches.
    Enforced,
    /// Some of it did not: on hardware it would read or leave behind what caches know otherwise.
    Bypassed,
}

impl Port {
    /// [Reads](crate::dma::DmaPort::read) with a request that asks not to snoop.
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Coherency, Device, Iova, Memory, Permissions, Rid, Space, Table};
    /// # use ioasid_soft::iommu::{Snooping, SoftIommu, TableKind};
    /// # let bus = Bus::new();
    /// # let memory = Memory::register(&Backing::anonymous(&bus, 4096)?, 0, 4096, &Account::new("guest", None))?;
    /// # let space = Space::new(&bus);
    /// # space.map(Iova::new(0x1000), &memory, 0, 4096, Permissions::READ)?;
    /// let iommu = SoftIommu::new();
    /// let port = iommu.add_no_snoop_device(Rid(8), TableKind::VtdSecondStage)?;
    /// let device = Device::new(iommu.clone(), Rid(8))?;
    ///
    /// // The table that it gets unless something else is asked for overrides it.
    /// device.attach(&Table::for_device(&space, &device)?)?;
    /// assert_eq!(port.read_without_snooping(0x1000, &mut [0; 8])?, Snooping::Enforced);
    ///
    /// device.attach(&Table::with_coherency(&space, &device, Coherency::AsRequested)?)?;
    /// assert_eq!(port.read_without_snooping(0x1000, &mut [0; 8])?, Snooping::Bypassed);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As for reading.
    pub fn read_without_snooping(&self, iova: u64, buffer: &mut [u8]) -> Result<Snooping, DmaFault> {
        let snooping = self.snooping(iova, buffer.len() as u64);
        self.transfer(iova, Transfer::Read(buffer)).map(|()| snooping)
    }

    /// [Writes](crate::dma::DmaPort::write) with a request that asks not to snoop.
    ///
    /// # Errors
    /// As for writing.
    pub fn write_without_snooping(&self, iova: u64, bytes: &[u8]) -> Result<Snooping, DmaFault> {
        let snooping = self.snooping(iova, bytes.len() as u64);
        self.transfer(iova, Transfer::Write(bytes)).map(|()| snooping)
    }

    /// Whether all of a range is mapped by leaves that have accesses snoop. What is not mapped is the transfer's fault.
    fn snooping(&self, iova: u64, length: u64) -> Snooping {
        let last = length.checked_sub(1).and_then(|last| iova.checked_add(last));
        let mut next = last.map(|_| iova).filter(|_| self.attachment.no_snoop);
        while let Some(from) = next {
            let section = epoch::dma();
            let Some(table) = self.attachment.table.load(&section) else { break };
            next = None;
            if table.nesting().is_some() {
                // The second stage's leaves say so, if the table promises it.
                match table.coherency() {
                    Coherency::Enforced => break,
                    Coherency::AsRequested => return Snooping::Bypassed,
                }
            }
            let mut at = from;
            for _ in 0..LOOKS {
                // None: a native table.
                let Some(Ok(leaf)) = with_derived!(self.attachment.kind, table, radix => radix.walk(at))
                else {
                    return Snooping::Enforced;
                };
                if !leaf.attributes.contains(Attributes::FORCE_SNOOP) {
                    return Snooping::Bypassed;
                }
                next =
                    leaf.range().last().checked_add(1).filter(|next| last.is_some_and(|last| *next <= last));
                match next {
                    Some(next) => at = next,
                    None => break,
                }
            }
        }
        Snooping::Enforced
    }
}
