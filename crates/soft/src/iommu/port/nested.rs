//! Devices whose table a guest writes.
//!
//! Such a device walks the shadow of the guest's table, in the native format whatever its kind. What it does not find there has to be
//! looked up in both stages, for which the guest's memory is read, and that may block. So a miss is a fault to the section in which
//! it happens, [`NotResolved`](DmaFaultReason::NotResolved): the section ends, the address is looked up, and the transfer
//! tries again. Only what the look-up says is a fault to the device.

use super::{Access, DmaFault, DmaFaultReason, Port, Refused, Translation, translation};
use ioasid::epoch::{self, DmaSection};
use ioasid::{Attributes, NestingFault, Permissions, Table};
use std::sync::Arc;

/// How often in a row one address is looked up. What was looked up may be forgotten before it is used, but not for ever.
const TRIES: u32 = 64;

/// What a transfer had to have looked up.
#[derive(Debug, Default)]
pub(super) struct Misses {
    /// The latest address.
    iova: u64,
    /// How often in a row.
    tries: u32,
}

impl Port {
    /// Has an address looked up that a guest's table translates, so that [`translate`](Self::translate) finds it. Nothing happens
    /// where the device's table is no guest's.
    ///
    /// May block as long as the guest's memory does: not to be called in a section.
    ///
    /// # Errors
    /// What a transfer would be told.
    pub fn resolve(&self, iova: u64, wanted: Permissions) -> Result<(), DmaFault> {
        self.noted(self.look_up(iova, Access(wanted.attributes())))
    }

    /// Has looked up what a transfer has missed, so that it can go on; any other fault ends it.
    #[cold]
    #[inline(never)]
    pub(super) fn resolve_missed(
        &self,
        refused: Refused,
        access: Access,
        misses: &mut Misses,
    ) -> Result<(), Refused> {
        if !refused.is_missed() {
            return Err(refused);
        }
        let iova = refused.fault.iova;
        misses.tries = if misses.iova == iova { misses.tries + 1 } else { 0 };
        misses.iova = iova;
        if misses.tries == TRIES {
            return Err(refused);
        }
        self.look_up(iova, access)
    }

    fn look_up(&self, iova: u64, access: Access) -> Result<(), Refused> {
        let (nesting, missed) = {
            let section = epoch::dma();
            let table = self.table(&section, iova, access)?;
            let missed = self.refused(&section, access.fault(iova, DmaFaultReason::NotResolved));
            (table.nesting().cloned(), missed)
        };
        // By now it may be attached to another table.
        let Some(nesting) = nesting else { return Ok(()) };
        let in_force = |section: &DmaSection| {
            let now = self.attachment.table.load(section).and_then(Table::nesting);
            now.is_some_and(|now| Arc::ptr_eq(now, &nesting))
        };
        let reason = match nesting.resolve(iova, access.permissions(), in_force) {
            Ok(()) | Err(NestingFault::Detached) => return Ok(()),
            Err(NestingFault::NotMapped) => DmaFaultReason::NotMapped,
            Err(NestingFault::NoPermission) => DmaFaultReason::NoPermission,
            Err(NestingFault::OutOfRange) => DmaFaultReason::OutOfRange,
            Err(NestingFault::SecondStage { address }) => DmaFaultReason::SecondStage { address },
            Err(NestingFault::MemoryGone { .. }) => DmaFaultReason::MemoryGone,
            Err(NestingFault::NotAtomic { .. }) => DmaFaultReason::NotAtomic,
            Err(NestingFault::Unsettled) => DmaFaultReason::NotResolved,
        };
        Err(missed.because(reason))
    }

    /// Finds an address in the shadow.
    pub(super) fn translate_nested(
        &self,
        section: &DmaSection,
        table: &Table,
        iova: u64,
        wanted: u64,
        access: Access,
    ) -> Result<Translation, DmaFault> {
        let shadow = table.native(section);
        if let Some((oa, length)) = self.iotlb.translate(shadow, iova, wanted, access.0) {
            return Ok(Translation { oa, length });
        }
        match self.iotlb.walk(iova, shadow) {
            Ok(leaf) if leaf.attributes.contains(access.0) => Ok(translation(&leaf, iova)),
            _ => Err(access.fault(iova, DmaFaultReason::NotResolved)),
        }
    }
}

impl Access {
    /// What a fault was about.
    pub(super) fn of(fault: &DmaFault) -> Access {
        if fault.write { Access::WRITE } else { Access::READ }
    }

    fn permissions(self) -> Permissions {
        match (self.0.contains(Attributes::READ), self.0.contains(Attributes::WRITE)) {
            (true, true) => Permissions::READ_WRITE,
            (false, true) => Permissions::WRITE,
            (_, false) => Permissions::READ,
        }
    }
}
