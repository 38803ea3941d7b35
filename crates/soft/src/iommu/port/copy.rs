//! Copies from one place of a device's address space to another, by the device.

use super::{Access, Misses, PIECE, Port, Reached, Refused, Transfer};
use crate::dma::{DmaFault, DmaFaultReason};
use ioasid::epoch;

impl Port {
    /// Copies `length` bytes from `source` to `destination`, both addresses of the device.
    ///
    /// As with a read or a write, both ranges are translated whole before the first byte moves, and a fault, which is the
    /// source's if both have one, has moved nothing; unless the memory goes or is unmapped meanwhile. Bytes go
    /// directly from memory to memory where this process has both of them. Where the two overlap in memory, which bytes
    /// end up there is not specified.
    pub fn copy(&self, source: u64, destination: u64, length: u64) -> Result<(), DmaFault> {
        self.noted(self.try_copy(source, destination, length))
    }

    fn try_copy(&self, source: u64, destination: u64, length: u64) -> Result<(), Refused> {
        self.check(source, length, Access::READ)?;
        self.check(destination, length, Access::WRITE)?;
        let (mut done, mut misses) = (0, Misses::default());
        let mut bounce = Vec::new();
        while done < length {
            let wanted = (length - done).min(PIECE);
            match self.copy_piece(source + done, destination + done, wanted, &mut bounce) {
                Ok(count) => done += count,
                Err(refused) => {
                    let access = Access::of(&refused.fault);
                    self.resolve_missed(refused, access, &mut misses)?;
                }
            }
        }
        Ok(())
    }

    /// Copies what lies in one piece on both sides.
    fn copy_piece(
        &self,
        source: u64,
        destination: u64,
        wanted: u64,
        bounce: &mut Vec<u8>,
    ) -> Result<u64, Refused> {
        {
            let section = epoch::dma();
            let table = self.table(&section, source, Access::READ)?;
            let from = self.reach(&section, table, source, wanted, Access::READ);
            if let Reached::Here(from, available) = self.out_of(&section, table, from)? {
                let to = self.reach(&section, table, destination, available, Access::WRITE);
                if let Reached::Here(to, count) = self.out_of(&section, table, to)? {
                    let gone = |_| Access::WRITE.fault(destination, DmaFaultReason::MemoryGone);
                    let copied = to.copy_from(&from, count as usize).map_err(gone);
                    self.out_of(&section, table, copied)?;
                    return Ok(count);
                }
            }
        }
        // One of them is behind calls: by way of a buffer, outside of the section.
        bounce.resize(wanted as usize, 0);
        let mut moved = 0;
        while moved < wanted {
            moved += self.piece(source + moved, &mut Transfer::Read(bounce), moved)?;
        }
        moved = 0;
        while moved < wanted {
            moved += self.piece(destination + moved, &mut Transfer::Write(bounce), moved)?;
        }
        Ok(wanted)
    }
}
