//! Transfers of a list of ranges: scatter and gather.
//!
//! Network and storage devices name many small buffers at once. Their bytes go to or from one buffer of the device in
//! the order of the list. The list is not translated beforehand: a fault ends the transfer where it stands, and says how
//! many bytes have moved before it, exactly, which is what such devices report to their drivers.
//!
//! Segments share DMA sections: one for every 64 KiB, or for every 256 segments if they are that small.

use super::{Misses, PIECE, Port, Refused, Step, Transfer};
use crate::dma::{DmaFault, DmaFaultReason};
use ioasid::epoch;

/// How many segments are looked at within one section.
const SEGMENTS: u32 = 256;

/// A range of a device's addresses, one of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DmaSegment {
    /// The first address.
    pub iova: u64,
    /// How many bytes.
    pub length: u64,
}

/// A list was transferred in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("after {moved} bytes: {fault}")]
pub struct PartialTransfer {
    /// How many bytes of the list have moved: all before the fault, and none behind it. Memory that disappears while it
    /// is copied ([`MemoryGone`](DmaFaultReason::MemoryGone)) may have been written a little further.
    pub moved: u64,
    /// What ended it.
    #[source]
    pub fault: DmaFault,
}

/// Where in a list a transfer stands.
struct Position<'a> {
    segments: &'a [DmaSegment],
    /// How many bytes of the first of them have moved.
    offset: u64,
}

impl Position<'_> {
    /// The next address, and how many bytes the segment has from there on. Empty segments are passed over, `budget` of
    /// them at most.
    fn next(&mut self, budget: &mut u32) -> Option<(u64, u64)> {
        while let Some((segment, rest)) = self.segments.split_first() {
            let left = segment.length - self.offset;
            if left > 0 {
                return Some((segment.iova.wrapping_add(self.offset), left));
            }
            *budget = budget.checked_sub(1)?;
            (self.segments, self.offset) = (rest, 0);
        }
        None
    }
}

impl Port {
    /// Fills `buffer` from the segments, one after the other (the device gathers). The shorter of the two ends it, and
    /// how many bytes that were is returned.
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Device, Iova, Memory, Permissions, Rid, Space, Table};
    /// # use ioasid_soft::iommu::{DmaSegment, SoftIommu, TableKind};
    /// # let bus = Bus::new();
    /// # let memory = Memory::register(&Backing::anonymous(&bus, 4096)?, 0, 4096, &Account::new("guest", None))?;
    /// # let space = Space::new(&bus);
    /// # let iommu = SoftIommu::new();
    /// # let port = iommu.add_device(Rid(8), TableKind::Native)?;
    /// # let device = Device::new(iommu.clone(), Rid(8)).unwrap();
    /// # device.attach(&Table::for_device(&space, &device)?)?;
    /// space.map(Iova::new(0x1000), &memory, 0, 4096, Permissions::READ_WRITE)?;
    /// let list = [DmaSegment { iova: 0x1800, length: 3 }, DmaSegment { iova: 0x1fff, length: 2 }];
    /// // The second segment reaches over the end of what is mapped.
    /// let partial = port.write_list(&list, b"words").unwrap_err();
    /// assert_eq!((partial.moved, partial.fault.iova), (4, 0x2000));
    /// let mut back = [0; 3];
    /// assert_eq!(port.read_list(&list, &mut back)?, 3);
    /// assert_eq!(&back, b"wor");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read_list(&self, segments: &[DmaSegment], buffer: &mut [u8]) -> Result<u64, PartialTransfer> {
        self.transfer_list(segments, Transfer::Read(buffer))
    }

    /// Stores `bytes` to the segments, one after the other (the device scatters). The shorter of the two ends it, and
    /// how many bytes that were is returned.
    pub fn write_list(&self, segments: &[DmaSegment], bytes: &[u8]) -> Result<u64, PartialTransfer> {
        self.transfer_list(segments, Transfer::Write(bytes))
    }

    fn transfer_list(
        &self,
        segments: &[DmaSegment],
        mut transfer: Transfer<'_>,
    ) -> Result<u64, PartialTransfer> {
        let mut position = Position { segments, offset: 0 };
        let (mut moved, mut misses) = (0, Misses::default());
        while !position.segments.is_empty() && moved < transfer.length() {
            let result = match self.list_piece(&mut position, &mut transfer, &mut moved) {
                Err(refused) => self.resolve_missed(refused, transfer.access(), &mut misses),
                Ok(()) => Ok(()),
            };
            self.noted(result).map_err(|fault| PartialTransfer { moved, fault })?;
        }
        Ok(moved)
    }

    /// Copies what one section allows.
    fn list_piece(
        &self,
        position: &mut Position<'_>,
        transfer: &mut Transfer<'_>,
        moved: &mut u64,
    ) -> Result<(), Refused> {
        let access = transfer.access();
        let end = transfer.length().min(*moved + PIECE);
        let mut budget = SEGMENTS;
        let section = epoch::dma();
        while *moved < end {
            let Some((iova, left)) = position.next(&mut budget) else { break };
            let wanted = left.min(end - *moved);
            if iova.checked_add(left.min(transfer.length() - *moved) - 1).is_none() {
                return Err(self.refused(&section, access.fault(iova, DmaFaultReason::OutOfRange)));
            }
            let table = self.table(&section, iova, access)?;
            let step = self.step(&section, table, iova, transfer, *moved, wanted);
            let count = match self.out_of(&section, table, step)? {
                Step::Moved(count) => count,
                Step::Late(memory, count) => {
                    let gone =
                        self.out_of(&section, table, Err(access.fault(iova, DmaFaultReason::MemoryGone)));
                    drop(section);
                    Self::move_late(&memory, transfer, *moved, count).or(gone)?;
                    position.offset += count;
                    *moved += count;
                    return Ok(());
                }
            };
            position.offset += count;
            *moved += count;
        }
        Ok(())
    }
}
