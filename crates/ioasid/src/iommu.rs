//! What an IOMMU is to the engine.
//!
//! The engine owns spaces and decides who may map what; an IOMMU moves devices between tables and, if it cannot
//! walk the native table, keeps a derived one. Everything the engine knows of it is in the two traits here. They
//! have to bear very different implementations: a software IOMMU that walks memory of this process, a test
//! double, and the kernel's, whose calls sleep, whose tables cannot be cut, and which finds out late that it is out
//! of memory.

use crate::bus::Bus;
use crate::nesting::FirstStage;
use crate::pasid::{Pasid, Spid};
use crate::table::Table;
use ioasid_pagetable::{Attributes, Iova, IovaRange, Oa, PageSize, Runs};
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// A PCI requester ID: bus, device and function of a device, as it stands on every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rid(pub u16);

impl fmt::Display for Rid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.0 >> 8, (self.0 >> 3) & 0x1f, self.0 & 7)
    }
}

/// Which devices can share a table: those whose class is equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableClass {
    /// The space's own table.
    Native,
    /// A table of its own kind.
    Derived {
        /// The IOMMU that walks it, by a number that differs between IOMMUs that cannot share tables.
        iommu: u64,
        /// The name of the format.
        format: &'static str,
        /// Whatever else makes tables of the format differ: levels, page sizes, coherency.
        variant: u64,
    },
    /// A table of a guest's over the space, in this format: for devices whose IOMMU [walks](Iommu::first_stages) it.
    Nested(FirstStage),
}

impl TableClass {
    /// The space's own table.
    pub const NATIVE: TableClass = TableClass::Native;
}

/// What a table promises of the accesses that go through it. Fixed when the table is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coherency {
    /// All of them see what the CPU's caches hold, whatever a request asks for.
    Enforced,
    /// Those that ask not to snoop the caches do not: the owner of the memory has to write them back.
    AsRequested,
}

/// What a device asks of a space before it can be attached. Devices that share a requester ID ask the same.
#[derive(Clone, Debug)]
pub struct Requirements {
    /// The kind of table it is served by.
    pub class: TableClass,
    /// The kind of table that serves it as well, and has all its accesses snoop the CPU's caches; the same as `class` if that one
    /// does. `None`: the IOMMU cannot enforce it.
    pub snooping_class: Option<TableClass>,
    /// The addresses that the table can translate.
    pub aperture: IovaRange,
    /// Addresses that nothing may be mapped at while the device is attached, such as the interrupt window.
    pub reserved: Vec<IovaRange>,
    /// Whether a request of the device can ask not to snoop the CPU's caches (the No Snoop attribute of PCI Express).
    pub no_snoop: bool,
}

impl Requirements {
    /// Whether a table serves a device of the IOMMU that has these requirements, as far as that depends on the kinds of both.
    pub(crate) fn are_met_by(
        &self,
        table: &Table,
        device: Rid,
        iommu: &dyn Iommu,
    ) -> Result<(), AttachError> {
        let class = Some(table.class());
        let nested = match table.class() {
            TableClass::Nested(first_stage) => iommu.first_stages(device).contains(&first_stage),
            TableClass::Native | TableClass::Derived { .. } => false,
        };
        if !nested && class != Some(self.class) && class != self.snooping_class {
            return Err(AttachError::Incompatible);
        }
        // Over a second stage that has accesses snoop, they do whatever the first stage says.
        let snoops = class == self.snooping_class || nested && self.snooping_class.is_some();
        if self.no_snoop && table.coherency() == Coherency::Enforced && !snoops {
            return Err(AttachError::Incoherent(device));
        }
        Ok(())
    }
}

/// Why a device was not attached, or a table not made. Everything is as before.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The IOMMU does not know the device.
    #[error("the IOMMU has no device {0}")]
    NoDevice(Rid),
    /// The device was given back.
    #[error("device {0} is not bound any more; bind it anew")]
    Unbound(Rid),
    /// The device cannot use that table.
    #[error("the table is of a kind that the device cannot use")]
    Incompatible,
    /// The root of a guest's table cannot be there: it has to be a multiple of 4 KiB.
    #[error("a guest's table cannot begin at {root}: that is no multiple of 4 KiB")]
    NoRoot {
        /// Where it was said to be.
        root: Iova,
    },
    /// Something is mapped where the device or its table cannot have a mapping.
    #[error("{range} is mapped, but the device cannot have a mapping there")]
    Mapped {
        /// The addresses in question.
        range: IovaRange,
    },
    /// The addresses are set aside as allowed for mappings.
    #[error("{range} must stay free for the device, but is among the allowed addresses")]
    Allowed {
        /// The addresses in question.
        range: IovaRange,
    },
    /// The device, or the IOMMU, cannot tell address spaces of one device apart.
    #[error("device {0} has no PASIDs")]
    NoPasids(Rid),
    /// The device uses that PASID for something else. To move it to another table is another call.
    #[error("device {device} uses PASID {pasid} already, which it calls {number}")]
    PasidTaken {
        /// The device.
        device: Rid,
        /// The PASID.
        pasid: Pasid,
        /// What the device's user calls it.
        number: Spid,
    },
    /// The device does not use a PASID of this number.
    #[error("device {device} has no address space that it calls {number}")]
    NoSuchPasid {
        /// The device.
        device: Rid,
        /// The number, of the device's user.
        number: Spid,
    },
    /// The table promises that all accesses are coherent, and those of the device might not be. A table
    /// [for the device](Table::for_device) keeps the promise, if its IOMMU can.
    #[error(
        "requests of device {0} can bypass the CPU's caches, and the table does not prevent it although it has to"
    )]
    Incoherent(Rid),
    /// Requests of the device cannot be told from those of another one, which is attached to another table. It has to be
    /// attached to the same first, and can be moved from there, which takes the other one along.
    #[error("device {device} cannot be attached apart from {other}: both make requests as {requester}")]
    SharedRequester {
        /// The device.
        device: Rid,
        /// The one that is attached.
        other: Rid,
        /// The requester ID of both.
        requester: Rid,
    },
    /// The device and another one reach each other past their tables, so that they cannot be in different address spaces,
    /// unless their owner [accepts](crate::DeviceOwner::accepting_peers) that.
    #[error(
        "device {device} cannot be in an address space apart from {other}: they reach each other past the IOMMU, \
         which their owner does not accept"
    )]
    NotIsolated {
        /// The device.
        device: Rid,
        /// The other device of its group.
        other: Rid,
    },
    /// The table could not be filled.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// Why a derived table did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// No memory for table pages.
    #[error("no memory for another table page")]
    OutOfTables,
    /// The table cannot cut its leaf there.
    #[error("a device's table cannot be cut at {at:#x}")]
    CannotCut {
        /// Where.
        at: u64,
    },
    /// The table cannot change its leaf there while devices use it: it has to be unmapped first, and mapped again.
    #[error("a device's table cannot change its leaf at {at:#x} while devices use it")]
    NeedsBreak {
        /// An address in the leaf.
        at: u64,
    },
    /// The mapping does not fit the table.
    #[error("{range} does not fit a device's table")]
    DoesNotFit {
        /// The range.
        range: IovaRange,
    },
    /// The machine's IOMMU refused.
    #[error("the machine's IOMMU refused")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What is going to happen to a range; see [`DerivedTable::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing will be mapped.
    Unmap,
    /// All that is mapped will allow this.
    Protect(Attributes),
    /// All that is mapped will lead to the output addresses from here on, with these attributes.
    Remap(Oa, Attributes),
}

/// A table that follows the native one, for devices that cannot walk that.
///
/// The engine calls from many threads. For any one address it makes no two calls at the same time, except that
/// [`cut`](Self::cut) is called by whoever has the page on either side of the boundary. Every call may sleep, but none may use the space, or drop
/// memory or tables of it: it would wait for itself.
pub trait DerivedTable: Send + Sync + fmt::Debug {
    /// Maps a range that nothing is mapped in. All or nothing.
    fn map(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError>;

    /// Maps a range in which the very same translation may stand already, wholly or in part: the table is being
    /// filled while operations run, and they may have been there first. On an error anything may be mapped; the
    /// table is thrown away.
    fn fill(&self, range: IovaRange, oa: Oa, attributes: Attributes) -> Result<(), TableError>;

    /// Whether the table would refuse a change for what it is and not for want of memory: because it cannot cut its leaf at
    /// an end of the range, or cannot change a leaf while devices use it. Asked before anything is done, in any table, so that
    /// what one table cannot do leaves no leaf cut in another. A table that does not know says nothing, as this does, and
    /// refuses when it comes to it.
    ///
    /// Changes nothing. Others may be at work in the range meanwhile.
    fn check(&self, _range: IovaRange, _change: Change) -> Result<(), TableError> {
        Ok(())
    }

    /// Whether a leaf would have to be cut to make `at` a boundary. A table that does not know says yes.
    fn reaches_over(&self, _at: u64) -> bool {
        true
    }

    /// Makes `at` a boundary between leaves, so that unmapping from there or up to there will need no memory and
    /// cannot fail. Changes no translation.
    fn cut(&self, at: u64) -> Result<(), TableError>;

    /// Unmaps exactly the range, whose ends were cut before. Parts may not be mapped.
    ///
    /// Until an [`invalidate`](Self::invalidate) that covers it, nothing is mapped there. After a deferred unmap that
    /// comes later, for many ranges at once and from any thread; what the table has to free has to wait for it.
    fn unmap(&self, range: IovaRange);

    /// Gives all that is mapped in the range these permissions (reading and writing; nothing else in `permissions`
    /// counts), leaf by leaf, without a moment in which a leaf allows neither what it did nor what it will. Parts may not
    /// be mapped, and leaves may reach over the ends. All or nothing; and to go back to what was allowed before, with
    /// every part that it was allowed for, cannot fail: the table was [cut](Self::cut) between these parts.
    ///
    /// A table that cannot do so says [`NeedsBreak`](TableError::NeedsBreak), as this does unless it is implemented.
    fn protect(&self, range: IovaRange, _permissions: Attributes) -> Result<(), TableError> {
        Err(TableError::NeedsBreak { at: range.first() })
    }

    /// Lets all that is mapped in the range lead to the output addresses from `oa` on, with these attributes, leaf by
    /// leaf, without a moment in which a leaf leads neither where it did nor where it will. Parts may not be mapped and
    /// stay so, and leaves may reach over the ends. All or nothing; and to go back to where it led before, with every part
    /// whose outputs were consecutive, cannot fail.
    ///
    /// A table that cannot do so says [`NeedsBreak`](TableError::NeedsBreak), as this does unless it is implemented.
    fn remap(&self, range: IovaRange, _oa: Oa, _attributes: Attributes) -> Result<(), TableError> {
        Err(TableError::NeedsBreak { at: range.first() })
    }

    /// Makes large leaves of small ones where it can, within the range, and changes no translation. How many table pages
    /// that saved. A table that cannot, or not while devices use it, leaves everything as it is, as this does.
    fn merge(&self, _range: IovaRange) -> u64 {
        0
    }

    /// Makes leaves of at most `largest` of all larger ones that have an address in the range, and changes no translation. Whether
    /// any was cut; on an error some may have been. A table that does not know its leaves refuses, as this does.
    fn split(&self, range: IovaRange, _largest: PageSize) -> Result<bool, TableError> {
        Err(TableError::CannotCut { at: range.first() })
    }

    /// Returns when no translation of these ranges is cached anywhere any more that the table does not hold now.
    fn invalidate(&self, runs: &Runs);

    /// Whether it can say which leaves were written through.
    fn records_writes(&self) -> bool {
        false
    }

    /// Reports what was written through leaves in the range since their marks were last cleared, in ascending order, and
    /// with `clear` clears them; a leaf that reaches over an end keeps its mark. When marks are cleared nothing else
    /// changes the range meanwhile, but devices use it.
    fn written(&self, _range: IovaRange, _clear: bool, _report: &mut dyn FnMut(IovaRange)) {}

    /// Marks the leaves in the range as written through. May run beside anything else.
    fn mark_written(&self, _range: IovaRange) {}

    /// How many bytes of table pages it has, if anybody knows.
    fn table_bytes(&self) -> Option<u64> {
        None
    }

    /// How many leaves of each size it has, smallest first, if anybody knows.
    fn leaves_by_size(&self) -> Option<Vec<(PageSize, u64)>> {
        None
    }

    /// The implementation itself, for the IOMMU that made it.
    fn as_any(&self) -> &dyn Any;
}

/// An IOMMU: a set of devices and where their DMA goes.
pub trait Iommu: Send + Sync + fmt::Debug {
    /// What the device asks for; `None` if there is no such device.
    fn requirements(&self, device: Rid) -> Option<Requirements>;

    /// The requester ID that the device's requests have when they arrive: its own, unless a bridge on their way speaks for
    /// all that is behind it.
    ///
    /// As long as anybody has a device, neither this nor its [`group`](Self::group) changes, except that devices may be plugged
    /// in.
    fn requester(&self, device: Rid) -> Rid {
        device
    }

    /// The devices that the IOMMU cannot tell apart from this one, or that reach it, or are reached by it, without passing the
    /// IOMMU, and so on from each of them; itself included, and the same for each. A device is alone unless this is
    /// implemented.
    fn group(&self, device: Rid) -> Vec<Rid> {
        vec![device]
    }

    /// Whether the tables of the device can [record writes](DerivedTable::records_writes). No, unless this is implemented.
    fn records_writes(&self, _device: Rid) -> bool {
        false
    }

    /// The formats of tables that a guest may write for the device, over a space. None, unless this is implemented.
    ///
    /// An IOMMU that names some walks what is [remembered](crate::Nesting) of such a table, asks for what is not there to be
    /// looked up, and no more.
    fn first_stages(&self, _device: Rid) -> &'static [FirstStage] {
        &[]
    }

    /// A fresh, empty table of a class that [`requirements`](Self::requirements) has named in either place, other than the
    /// native one, for a space whose own leaves are no larger than `largest_leaf`.
    ///
    /// That is the space's *cut granule*: if the table cannot cut leaves while devices use it, it shall have no larger
    /// ones either, so that wherever the space can be unmapped the table can too. A table that can need not care.
    ///
    /// Output addresses are those of `bus`, which a table needs that has to find the memory behind them
    /// ([`Bus::locate`]); the others need not care.
    fn new_table(
        &self,
        class: TableClass,
        largest_leaf: PageSize,
        bus: &Arc<Bus>,
    ) -> Result<Arc<dyn DerivedTable>, AttachError>;

    /// Sends the device's DMA through `table`, in one step: there is no moment at which it goes nowhere or through
    /// two tables. When it returns, no DMA that went through the former table is running. On an error the device
    /// stays where it was.
    ///
    /// Requests of all devices with the same [requester](Self::requester) ID go the same way.
    ///
    /// The engine makes no two calls for one device, or for devices of one group, at the same time. Devices that are moved together
    /// are moved one by one, each with a call of its own. If one of these fails, the others are sent back by the same means, which should
    /// succeed: the device was there a moment ago, and nothing has changed about the table. What cannot even be sent back is
    /// blocked.
    fn attach(&self, device: Rid, table: &Arc<Table>) -> Result<(), AttachError>;

    /// From now on, what the IOMMU reports of the device's requests, with PASIDs too, says this cookie of its user's; `None`: none.
    /// What it reports of requests that ran before the device was blocked last still says the one of that time.
    ///
    /// Requests of all devices with the same [requester](Self::requester) ID have the same. An IOMMU that reports nothing need not
    /// implement it.
    fn set_cookie(&self, _device: Rid, _cookie: Option<u64>) {}

    /// Refuses all DMA of the device that has no PASID. When it returns, none is running.
    fn block(&self, device: Rid);

    /// Sends the device's requests with this PASID through `table`, in one step, as [`attach`](Self::attach) does with those
    /// that have none.
    ///
    /// An IOMMU without PASIDs need not implement it.
    fn attach_pasid(&self, device: Rid, _pasid: Pasid, _table: &Arc<Table>) -> Result<(), AttachError> {
        Err(AttachError::NoPasids(device))
    }

    /// Refuses all DMA of the device that has this PASID. When it returns, none is running.
    fn block_pasid(&self, _device: Rid, _pasid: Pasid) {}
}
