//! From the bus to the machine: where the memory behind an output address is for a kernel.
//!
//! The engine itself copies through its windows and needs none of this. An IOMMU of the machine does: the kernel knows no
//! bus of ours, and wants to be told memory by an address of this process, or by a file and an offset. It also keeps a
//! record of its own of what it was told ([`BusObserver`] says when that record is out of date).

use crate::backing::BackingFile;
use crate::bus::Bus;
use ioasid_pagetable::Oa;
use std::sync::Weak;

/// A piece of the bus whose bytes follow each other in memory as they do on the bus.
#[derive(Clone, Debug)]
pub struct HostPlace {
    /// Its first output address.
    pub first: Oa,
    /// How many bytes of memory there are from there on. More may come behind them, where a file grows.
    pub length: u64,
    /// Where the first of them is.
    pub memory: HostBytes,
}

/// How the machine's kernel can be told of memory.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum HostBytes {
    /// It is memory of this process, from this address on.
    Address(u64),
    /// It is in a file, from this offset in bytes on.
    File(BackingFile, u64),
    /// It is reached by calls alone; no kernel can pin it.
    Calls,
}

/// Who keeps a record of what stands on a bus.
pub trait BusObserver: Send + Sync {
    /// No memory is registered any more between `first` and `length` bytes on, and nothing is mapped that leads there.
    /// When this returns, the addresses may be given to other memory.
    ///
    /// Called by whoever drops or releases the memory, one piece at a time for any one address. It may sleep, but must
    /// neither register memory nor drop any.
    fn vacated(&self, first: Oa, length: u64);
}

impl Bus {
    /// Where the memory behind an output address is, with as much around it as is in one place; `None` if nothing is
    /// registered there.
    ///
    /// The answer holds for as long as the memory is registered, which the caller has to know: it is while a mapping that
    /// leads there is being made, and as long as there is one. Whether the memory was revoked makes no difference.
    ///
    /// ```
    /// use ioasid::{Account, Backing, Bus, HostBytes, Iova, Memory, Oa, Permissions, Space};
    ///
    /// let bus = Bus::new();
    /// let memory = Memory::register(&Backing::anonymous(&bus, 1 << 20)?, 0, 1 << 20, &Account::new("guest", None))?;
    /// let space = Space::new(&bus);
    /// space.map(Iova::new(0), &memory, 0, 1 << 20, Permissions::READ)?;
    /// let place = bus.locate(space.walk(Iova::new(0)).unwrap().oa).unwrap();
    /// assert_eq!(place.length, 1 << 20);
    /// assert!(matches!(place.memory, HostBytes::Address(_)));
    /// assert!(bus.locate(Oa::new(0)).is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn locate(&self, oa: Oa) -> Option<HostPlace> {
        let (backing, first, start, size) = self.window_of(oa)?;
        let length = backing.length().map_or(size, |length| length.saturating_sub(start).min(size));
        Some(HostPlace { first, length, memory: backing.host_bytes(start) })
    }

    /// Tells the observer from now on when memory leaves the bus, as long as it lives.
    pub fn observe(&self, observer: Weak<dyn BusObserver>) {
        self.add_observer(observer);
    }
}
