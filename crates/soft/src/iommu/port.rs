//! The way of a DMA.
//!
//! 1. A DMA section begins. What is found in it stays valid until it ends, and an unmap that wants to be sure
//!    waits for that end.
//! 2. The device's table is looked up. There is none: blocked.
//! 3. The IOVA is translated by the table's own format, through the IOTLB. If the table is a guest's, what is remembered of it is
//!    walked; a miss ends the section, is looked up in both stages, and the transfer goes on from there.
//! 4. The leaf's permissions are checked against the direction. If the table records writes and this is one, the leaf is
//!    marked, before anything is written. (A write that faults further on may have marked leaves in front of that.)
//! 5. The output address leads to memory. Memory of this process is copied there and then, at most 64 KiB, and the
//!    section ends. Memory behind calls may block: the section ends first, and the copy is made while the space
//!    counts it.
//!
//! A [`read`](DmaPort::read), [`write`](DmaPort::write) or [`copy`](Port::copy) is translated whole before the first byte
//! moves, so that it faults without having moved anything. If it is unmapped half-way, it ends half-way: that is what
//! a device sees on a real machine too. Lists of segments ([`list`]) are not, and say how far they came; atomic
//! operations ([`atomic`]) are one word.

use super::faults::{FaultLog, Faults, Refused};
use super::iotlb::Iotlb;
use super::kind::{radix, with_derived};
use super::{Attachment, TableKind};
use crate::dma::{DmaFault, DmaFaultReason, DmaPort};
use ioasid::epoch::{self, DmaSection};
use ioasid::pagetable::VtdSecondStage;
use ioasid::pasid::Pasid;
use ioasid::{
    Attributes, DmaError, Here, IovaRange, Late, Leaf, Oa, Permissions, Rid, Table, Translated, WalkFault,
};
use std::sync::Arc;

mod atomic;
mod borrow;
mod copy;
mod list;
mod nested;
mod snoop;

pub use atomic::AtomicOperation;
pub use borrow::PortBorrowError;
pub use list::{DmaSegment, PartialTransfer};
use nested::Misses;
pub use snoop::Snooping;

/// How many bytes are copied within one DMA section.
const PIECE: u64 = 64 * 1024;
/// How often a table is looked at within one DMA section when nothing is copied; each time that is one table's leaves at
/// most.
const LOOKS: u32 = 64;

/// A device's way to memory.
///
/// Any number of threads of the device may use it at the same time.
#[derive(Debug)]
pub struct Port {
    rid: Rid,
    pasid: Option<Pasid>,
    attachment: Arc<Attachment>,
    iotlb: Iotlb,
    faults: Faults,
}

/// What became of a device's DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortStatistics {
    /// Transfers that were refused or cut short.
    pub faults: u64,
    /// The latest of them.
    pub last_fault: Option<DmaFault>,
    /// Misses of the IOTLB: translations of mapped addresses that began at the root of the table. Hits are not counted, since
    /// all threads of the device would share the counter; who makes the DMA knows how many there were.
    pub walks: u64,
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

    fn access(&self) -> Access {
        match self {
            Transfer::Read(_) => Access::READ,
            Transfer::Write(_) => Access::WRITE,
        }
    }
}

/// What a device wants to do at an address.
#[derive(Clone, Copy)]
struct Access(Attributes);

impl Access {
    const READ: Access = Access(Attributes::READ);
    const WRITE: Access = Access(Attributes::WRITE);
    const READ_WRITE: Access = Access(Attributes::READ.union(Attributes::WRITE));

    #[inline(always)]
    fn fault(self, iova: u64, reason: DmaFaultReason) -> DmaFault {
        DmaFault { iova, write: self.0.contains(Attributes::WRITE), reason }
    }
}

/// Where an address of a device leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The output address.
    pub oa: Oa,
    /// How many bytes lead to consecutive addresses, this one included, as far as that is known: all in the same leaf at
    /// least.
    pub length: u64,
}

/// Memory behind an IOVA, and how many bytes of it are in one piece from there on: at most what was asked for.
enum Reached<'section> {
    Here(Here<'section>, u64),
    Late(Late, u64),
}

/// How a step within a section ended.
enum Step {
    /// So many bytes have moved.
    Moved(u64),
    /// The memory is behind calls, and so many of the bytes wanted are in one piece: the section has to end first.
    Late(Late, u64),
}

impl Port {
    pub(super) fn new(rid: Rid, pasid: Option<Pasid>, attachment: Arc<Attachment>) -> Port {
        Port { rid, pasid, attachment, iotlb: Iotlb::new(), faults: Faults::default() }
    }

    /// The requester ID that its requests arrive with: the device's, or that of a bridge.
    pub fn rid(&self) -> Rid {
        self.rid
    }

    /// The PASID that its requests have.
    pub fn pasid(&self) -> Option<Pasid> {
        self.pasid
    }

    /// What became of its DMA so far.
    pub fn statistics(&self) -> PortStatistics {
        let (faults, last_fault) = self.faults.total_and_latest();
        PortStatistics { faults, last_fault, walks: self.iotlb.walks() }
    }

    /// Takes the faults that were written down since this was called last.
    pub fn take_faults(&self) -> FaultLog {
        self.faults.take()
    }

    /// Where an address leads, for a device model that wants to know no more.
    ///
    /// What it says holds until the section ends. An address that does not translate is no fault of the device, and
    /// is not written down. One that a guest's table translates has to be [looked up](Self::resolve) before.
    ///
    /// ```
    /// # use ioasid::{Account, Backing, Bus, Device, Iova, Memory, Permissions, Rid, Space, Table, epoch};
    /// # use ioasid_soft::iommu::{SoftIommu, TableKind};
    /// # let bus = Bus::new();
    /// # let memory = Memory::register(&Backing::anonymous(&bus, 4096)?, 0, 4096, &Account::new("guest", None))?;
    /// # let space = Space::new(&bus);
    /// # let iommu = SoftIommu::new();
    /// let port = iommu.add_device(Rid(8), TableKind::Native)?;
    /// let device = Device::new(iommu.clone(), Rid(8)).unwrap();
    /// device.attach(&Table::for_device(&space, &device)?)?;
    /// space.map(Iova::new(0x1000), &memory, 0, 4096, Permissions::READ)?;
    ///
    /// let section = epoch::dma();
    /// let translation = port.translate(&section, 0x1234, Permissions::READ)?;
    /// assert_eq!((translation.oa.get() & 0xfff, translation.length), (0x234, 0xdcc));
    /// assert!(port.translate(&section, 0x1234, Permissions::WRITE).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn translate(
        &self,
        section: &DmaSection,
        iova: u64,
        wanted: Permissions,
    ) -> Result<Translation, DmaFault> {
        let access = Access(wanted.attributes());
        let table = self.table(section, iova, access).map_err(|refused| refused.fault)?;
        let translation = self.translation(section, table, iova, 1, access)?;
        if table.is_recording() && access.0.contains(Attributes::WRITE) {
            record(table, iova, translation.length);
        }
        Ok(translation)
    }

    /// Writes a fault down.
    #[inline(always)]
    fn noted<T>(&self, result: Result<T, Refused>) -> Result<T, DmaFault> {
        result.map_err(|refused| {
            let record = refused.by(self.rid, self.pasid);
            self.faults.record(record);
            record.fault
        })
    }

    /// Lets a fault leave its section.
    #[inline(always)]
    fn out_of<T>(
        &self,
        section: &DmaSection,
        table: &Table,
        result: Result<T, DmaFault>,
    ) -> Result<T, Refused> {
        result.map_err(|fault| Refused::new(section, &self.attachment, Some(table), fault))
    }

    /// A fault that has nothing to do with what is mapped.
    fn refused(&self, section: &DmaSection, fault: DmaFault) -> Refused {
        Refused::new(section, &self.attachment, self.attachment.table.load(section), fault)
    }

    /// The table that the device is attached to.
    #[inline(always)]
    fn table<'s>(&'s self, section: &'s DmaSection, iova: u64, access: Access) -> Result<&'s Table, Refused> {
        let blocked = || access.fault(iova, DmaFaultReason::Blocked);
        let table = self.attachment.table.load(section);
        table.ok_or_else(|| Refused::new(section, &self.attachment, None, blocked()))
    }

    #[inline(always)]
    fn transfer(&self, iova: u64, mut transfer: Transfer<'_>) -> Result<(), DmaFault> {
        let length = transfer.length();
        if length == 0 {
            return Ok(());
        }
        // What lies in one piece is done here: one section, no loop.
        let access = transfer.access();
        let result = self.first_step(iova, &mut transfer, access);
        self.noted(match result {
            Ok(true) => Ok(()),
            Ok(false) => self.transfer_slowly(iova, transfer),
            Err(refused) if refused.is_missed() => self.transfer_slowly(iova, transfer),
            Err(refused) => Err(refused),
        })
    }

    /// Copies all or nothing in one step; `Ok(false)`: nothing, because it takes more than that.
    #[inline(always)]
    fn first_step(&self, iova: u64, transfer: &mut Transfer<'_>, access: Access) -> Result<bool, Refused> {
        let section = epoch::dma();
        let table = self.table(&section, iova, access)?;
        self.out_of(&section, table, self.copy_at_once(&section, table, iova, transfer, access))
    }

    #[inline(always)]
    fn copy_at_once(
        &self,
        section: &DmaSection,
        table: &Table,
        iova: u64,
        transfer: &mut Transfer<'_>,
        access: Access,
    ) -> Result<bool, DmaFault> {
        let length = transfer.length();
        let translation = self.translation(section, table, iova, length.min(PIECE), access)?;
        if length > PIECE || length > translation.length {
            return Ok(false);
        }
        let gone = |_| access.fault(iova, DmaFaultReason::MemoryGone);
        match table.space().memory_at(section, translation.oa).map_err(gone)? {
            Translated::Here(memory) if memory.length() >= length => match transfer {
                Transfer::Read(buffer) => memory.read(buffer).map_err(gone)?,
                Transfer::Write(bytes) => memory.write(bytes).map_err(gone)?,
            },
            _ => return Ok(false),
        }
        Ok(true)
    }

    #[inline(never)]
    fn transfer_slowly(&self, iova: u64, mut transfer: Transfer<'_>) -> Result<(), Refused> {
        let (length, access) = (transfer.length(), transfer.access());
        self.check(iova, length, access)?;
        let (mut done, mut misses) = (0, Misses::default());
        while done < length {
            match self.piece(iova + done, &mut transfer, done) {
                Ok(count) => done += count,
                Err(refused) => self.resolve_missed(refused, access, &mut misses)?,
            }
        }
        Ok(())
    }

    /// Makes sure that all of a range translates at this moment.
    fn check(&self, iova: u64, length: u64, access: Access) -> Result<(), Refused> {
        let Some(last) = length.checked_sub(1).map(|last| iova.checked_add(last)) else { return Ok(()) };
        let out_of_range = || self.refused(&epoch::dma(), access.fault(iova, DmaFaultReason::OutOfRange));
        let last = last.ok_or_else(out_of_range)?;
        let (mut at, mut misses) = (Some(iova), Misses::default());
        while let Some(from) = at {
            match self.check_some(from, last, access) {
                Ok(next) => at = next,
                Err(refused) => {
                    // What is in front of it has been found.
                    at = Some(refused.fault.iova);
                    self.resolve_missed(refused, access, &mut misses)?;
                }
            }
        }
        Ok(())
    }

    /// Does what one section allows of that; where to go on.
    fn check_some(&self, mut at: u64, last: u64, access: Access) -> Result<Option<u64>, Refused> {
        let section = epoch::dma();
        let table = self.table(&section, at, access)?;
        for _ in 0..LOOKS {
            let translation = self.translation(&section, table, at, (last - at).saturating_add(1), access);
            let length = self.out_of(&section, table, translation)?.length;
            if last - at < length {
                return Ok(None);
            }
            at += length;
        }
        Ok(Some(at))
    }

    /// Copies what one section allows of a transfer, of which `done` bytes have moved and the next is for `iova`.
    fn piece(&self, iova: u64, transfer: &mut Transfer<'_>, done: u64) -> Result<u64, Refused> {
        let access = transfer.access();
        let wanted = (transfer.length() - done).min(PIECE);
        let section = epoch::dma();
        let table = self.table(&section, iova, access)?;
        let mut moved = 0;
        while moved < wanted {
            match self.step(&section, table, iova + moved, transfer, done + moved, wanted - moved) {
                Ok(Step::Moved(count)) => moved += count,
                // What has moved is a piece of its own: then comes the fault, or the memory behind calls.
                _ if moved > 0 => break,
                Ok(Step::Late(memory, count)) => {
                    let gone =
                        self.out_of(&section, table, Err(access.fault(iova, DmaFaultReason::MemoryGone)));
                    drop(section);
                    Self::move_late(&memory, transfer, done, count).or(gone)?;
                    return Ok(count);
                }
                Err(fault) => return self.out_of(&section, table, Err(fault)),
            }
        }
        Ok(moved)
    }

    /// Copies at most `wanted` bytes of a transfer, from byte `done` on, within a section.
    #[inline(always)]
    fn step(
        &self,
        section: &DmaSection,
        table: &Table,
        iova: u64,
        transfer: &mut Transfer<'_>,
        done: u64,
        wanted: u64,
    ) -> Result<Step, DmaFault> {
        let access = transfer.access();
        let (memory, count) = match self.reach(section, table, iova, wanted, access)? {
            Reached::Here(memory, count) => (memory, count),
            Reached::Late(memory, count) => return Ok(Step::Late(memory, count)),
        };
        let bytes = done as usize..(done + count) as usize;
        let gone = |_| access.fault(iova, DmaFaultReason::MemoryGone);
        match transfer {
            Transfer::Read(buffer) => memory.read(&mut buffer[bytes]).map_err(gone)?,
            Transfer::Write(source) => memory.write(&source[bytes]).map_err(gone)?,
        }
        Ok(Step::Moved(count))
    }

    /// Copies to or from memory behind calls, outside of all sections.
    fn move_late(memory: &Late, transfer: &mut Transfer<'_>, done: u64, count: u64) -> Result<(), DmaError> {
        let bytes = done as usize..(done + count) as usize;
        match transfer {
            Transfer::Read(buffer) => memory.read(&mut buffer[bytes]),
            Transfer::Write(source) => memory.write(&source[bytes]),
        }
    }

    /// Finds the memory behind an address, and how much of it, up to `wanted`, lies in one piece. Leaves whose output
    /// addresses follow each other are one piece of memory.
    #[inline(always)]
    fn reach<'s>(
        &self,
        section: &'s DmaSection,
        table: &'s Table,
        iova: u64,
        wanted: u64,
        access: Access,
    ) -> Result<Reached<'s>, DmaFault> {
        let Translation { oa, mut length } = self.translation(section, table, iova, wanted, access)?;
        while length < wanted {
            // What is not there will be a fault when its turn comes.
            let Ok(next) = self.translation(section, table, iova + length, wanted - length, access) else {
                break;
            };
            if next.oa.get() != oa.get() + length {
                break;
            }
            length += next.length;
        }
        let wanted = wanted.min(length);
        let gone = |_| access.fault(iova, DmaFaultReason::MemoryGone);
        Ok(match table.space().memory_at(section, oa).map_err(gone)? {
            Translated::Here(memory) => {
                // The pages behind each other may be the end of one object and the beginning of another.
                let count = memory.length().min(wanted);
                if count == 0 {
                    return Err(access.fault(iova, DmaFaultReason::MemoryGone));
                }
                Reached::Here(memory, count)
            }
            Translated::Late(memory) => {
                let count = memory.length().min(wanted);
                Reached::Late(memory, count)
            }
        })
    }

    /// Finds where an address leads and checks what is allowed there. How far that goes on is looked for up to `wanted`.
    #[inline(always)]
    fn translation(
        &self,
        section: &DmaSection,
        table: &Table,
        iova: u64,
        wanted: u64,
        access: Access,
    ) -> Result<Translation, DmaFault> {
        let remembered = match self.attachment.kind {
            TableKind::Native => self.iotlb.translate(table.native(section), iova, wanted, access.0),
            TableKind::VtdSecondStage39 | TableKind::VtdSecondStage | TableKind::VtdSecondStage57 => {
                match radix::<VtdSecondStage>(table) {
                    Some(radix) => self.iotlb.translate(radix, iova, wanted, access.0),
                    None => None,
                }
            }
            _ => self.translate_elsewhere(table, iova, wanted, access),
        };
        let translation = match remembered {
            Some((oa, length)) => Translation { oa, length },
            None => self.translate_from_root(section, table, iova, wanted, access)?,
        };
        if table.is_recording() && access.0.contains(Attributes::WRITE) {
            record(table, iova, translation.length.min(wanted));
        }
        Ok(translation)
    }

    /// The IOTLB's part of it for all other formats. The most frequent two stand at every place that translates; with the
    /// code of all of them there, those two would be slower.
    #[inline(never)]
    fn translate_elsewhere(
        &self,
        table: &Table,
        iova: u64,
        wanted: u64,
        access: Access,
    ) -> Option<(Oa, u64)> {
        let kind = self.attachment.kind;
        with_derived!(kind, table, radix => self.iotlb.translate(radix, iova, wanted, access.0)).flatten()
    }

    /// The same for an address that no way is remembered to, or at which something is wrong.
    #[cold]
    #[inline(never)]
    fn translate_from_root(
        &self,
        section: &DmaSection,
        table: &Table,
        iova: u64,
        wanted: u64,
        access: Access,
    ) -> Result<Translation, DmaFault> {
        if table.nesting().is_some() {
            return self.translate_nested(section, table, iova, wanted, access);
        }
        let walked = match self.attachment.kind {
            TableKind::Native => self.iotlb.walk(iova, table.native(section)),
            kind => with_derived!(kind, table, radix => self.iotlb.walk(iova, radix))
                .unwrap_or(Err(WalkFault::NotMapped(iova))),
        };
        match walked {
            Ok(leaf) if leaf.attributes.contains(access.0) => Ok(translation(&leaf, iova)),
            Ok(_) => Err(access.fault(iova, DmaFaultReason::NoPermission)),
            Err(WalkFault::OutOfRange(_)) => Err(access.fault(iova, DmaFaultReason::OutOfRange)),
            Err(WalkFault::NotMapped(_) | WalkFault::Malformed(_)) => {
                Err(access.fault(iova, DmaFaultReason::NotMapped))
            }
        }
    }
}

/// Marks the leaves of a range as written, before it is. Leaves may have been cut since the range was translated, so all of
/// them are looked for. One that has been unmapped needs no mark.
#[cold]
#[inline(never)]
fn record(table: &Table, iova: u64, length: u64) {
    if let Some((derived, range)) = table.derived().zip(IovaRange::with_length(iova, length)) {
        derived.mark_written(range);
    }
}

#[inline(always)]
fn translation(leaf: &Leaf, iova: u64) -> Translation {
    let size = leaf.size.bytes();
    Translation { oa: leaf.output(iova), length: size - (iova & (size - 1)) }
}

impl DmaPort for Port {
    #[inline]
    fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.transfer(iova, Transfer::Read(buffer))
    }

    #[inline]
    fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        self.transfer(iova, Transfer::Write(bytes))
    }
}
