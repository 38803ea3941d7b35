//! Watching what devices can reach, and what they do: the seam for whoever records it.
//!
//! An [`Observer`] is given to the server when it is made ([`Server::with_observer`](crate::Server::with_observer)) and hears
//! of each change to what a device reaches, and of each DMA. A space without devices is nobody's business: when a device is
//! attached, what is mapped already is told as mapped for it, and when it leaves, as unmapped.
//!
//! # Order
//!
//! Events of one [`Requester`] are told in an order in which they can have happened: a DMA that was let through comes after the map
//! that let it through and before the unmap that ended it, and one that was refused stands where it was refused. The lock of
//! an address space orders maps and unmaps. DMA takes no lock of the server, so each has a *gate*: DMA goes
//! through it side by side, changes go through it side by side, but never both at once, and each tells its event before
//! it leaves. Nobody waits at a gate for longer than [`PATIENCE`]: a device may be copying memory whose owner does not answer, and then
//! the program shall run on as it would unwatched, and the order of that one DMA is a guess.
//!
//! Without an observer devices have no gate, and their DMA does not come by here.

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use ioasid::pasid::Pasid;
use ioasid::{IovaRange, Permissions, Rid};
use ioasid_soft::dma::DmaFault;

use crate::poison::lock;
use crate::status::{AccountStatus, ContextStatus};

/// For how long changes and DMA wait for each other, for the sake of the order of events.
const PATIENCE: Duration = Duration::from_secs(1);

/// Hears what happens to the devices of a server.
///
/// Called by the thread that does it, with locks of the server held: an implementation must not call the server, and
/// whoever waits in it makes the client wait. It must not panic.
pub trait Observer: Send + Sync + Debug {
    /// Something has happened.
    fn happened(&self, event: &Event<'_>);
}

/// Whose DMA it is: a device's requests without a PASID, or those with a certain one. What the one reaches has nothing to do with
/// what the other does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requester {
    /// The device.
    pub device: Rid,
    /// The PASID of the requests, if they have one.
    pub pasid: Option<Pasid>,
}

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.device)?;
        self.pasid.map_or(Ok(()), |pasid| write!(f, " with PASID {pasid}"))
    }
}

/// What has happened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device's DMA goes through an address space from now on; if it went through another one before, what was mapped
    /// there has been told as unmapped. What is mapped follows.
    Attached {
        /// Whose DMA.
        requester: Requester,
    },
    /// The device reaches memory.
    Mapped {
        /// Whose DMA.
        requester: Requester,
        /// At these addresses.
        range: IovaRange,
        /// What it reaches at the first of them.
        memory: MemoryAt,
        /// What it may do.
        permissions: Permissions,
    },
    /// The device reaches it no more. One event may end several maps that follow each other and had the same permissions.
    Unmapped {
        /// Whose DMA.
        requester: Requester,
        /// At these addresses.
        range: IovaRange,
        /// What it was allowed to do.
        permissions: Permissions,
    },
    /// The device's DMA is blocked from now on.
    Detached {
        /// Whose DMA.
        requester: Requester,
    },
    /// The device has read or written memory, or tried to.
    Dma {
        /// Whose DMA.
        requester: Requester,
        /// First address.
        iova: u64,
        /// Bytes, at least 1.
        length: u64,
        /// Whether it was a write to memory.
        write: bool,
        /// What became of it.
        result: Result<(), DmaFault>,
    },
    /// A file is about to be closed for the last time: this is what its context holds until then.
    Closing {
        /// The device whose file it is, as N of `vfioN`; `None`: the `/dev/iommu` itself, after all of its devices.
        device: Option<usize>,
        /// The context.
        context: &'a ContextStatus,
        /// Who is charged at this moment.
        accounts: &'a [AccountStatus],
    },
}

/// A byte of memory: the same byte is always the same value, whoever maps it and however often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemoryAt {
    /// What it belongs to.
    pub owner: MemoryOwner,
    /// The virtual address, or the offset in the file.
    pub offset: u64,
}

/// What memory belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryOwner {
    /// The address space of a process, by its [identity](crate::Process::identity).
    Process(u64),
    /// A file, by device and inode number. (A file that has gone may leave its number to another.)
    File(u64, u64),
    /// A file without pages, which no device reaches, or a buffer of the test-only command.
    Nothing,
}

/// A device's requests, with one PASID or without, that are watched.
#[derive(Debug)]
pub(crate) struct Watched {
    requester: Requester,
    observer: Arc<dyn Observer>,
    inside: Mutex<Inside>,
    left: Condvar,
}

/// A DMA that is to be done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) iova: u64,
    /// In bytes.
    pub(crate) length: usize,
    /// Whether memory is written.
    pub(crate) write: bool,
}

/// Who is inside of the gate.
#[derive(Debug, Default)]
struct Inside {
    dma: usize,
    changes: usize,
}

/// A change to what a device reaches is under way.
#[derive(Debug)]
pub(crate) struct Changing<'a>(&'a Watched);

impl Watched {
    fn new(requester: Requester, observer: Arc<dyn Observer>) -> Arc<Self> {
        Arc::new(Self { requester, observer, inside: Mutex::default(), left: Condvar::new() })
    }

    /// Keeps the device's DMA away until the change is told. Changes do not keep each other away.
    pub(crate) fn changing(&self) -> Changing<'_> {
        let inside = lock(&self.inside);
        let waited = self.left.wait_timeout_while(inside, PATIENCE, |inside| inside.dma > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.changes += 1;
        Changing(self)
    }

    fn leave(&self, forget: impl FnOnce(&mut Inside)) {
        forget(&mut lock(&self.inside));
        self.left.notify_all();
    }

    pub(crate) fn attached(&self) {
        self.observer.happened(&Event::Attached { requester: self.requester });
    }

    pub(crate) fn detached(&self) {
        self.observer.happened(&Event::Detached { requester: self.requester });
    }

    pub(crate) fn mapped(&self, range: IovaRange, memory: MemoryAt, permissions: Permissions) {
        self.observer.happened(&Event::Mapped { requester: self.requester, range, memory, permissions });
    }

    /// Tells that areas have gone, in the order of their addresses: those that follow each other at once.
    pub(crate) fn unmapped(&self, areas: impl Iterator<Item = (IovaRange, Permissions)>) {
        let tell = |(range, permissions)| {
            self.observer.happened(&Event::Unmapped { requester: self.requester, range, permissions });
        };
        let mut run: Option<(IovaRange, Permissions)> = None;
        for (range, permissions) in areas {
            let joined = run.and_then(|(before, same)| {
                let follows = before.last().checked_add(1) == Some(range.first()) && same == permissions;
                // A range of all 2^64 bytes has no length, which a trace cannot say.
                let both =
                    IovaRange::new(before.first(), range.last()).filter(|both| both.length().is_some());
                both.filter(|_| follows)
            });
            match joined {
                Some(both) => run = Some((both, permissions)),
                None => run.replace((range, permissions)).into_iter().for_each(tell),
            }
        }
        run.into_iter().for_each(tell);
    }

    /// Does a DMA and tells of it.
    pub(crate) fn dma(
        &self,
        transfer: Transfer,
        carry_out: impl FnOnce() -> Result<(), DmaFault>,
    ) -> Result<(), DmaFault> {
        let Transfer { iova, length, write } = transfer;
        if length == 0 {
            return carry_out();
        }
        let inside = lock(&self.inside);
        let waited = self.left.wait_timeout_while(inside, PATIENCE, |inside| inside.changes > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.dma += 1;
        let result = carry_out();
        let (requester, length) = (self.requester, length as u64);
        self.observer.happened(&Event::Dma { requester, iova, length, write, result });
        self.leave(|inside| inside.dma -= 1);
        result
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.leave(|inside| inside.changes -= 1);
    }
}

/// Who watches a device: its requests with a PASID and those without are watched one by one.
#[derive(Debug)]
pub(crate) struct WatchedDevice {
    plain: Arc<Watched>,
    /// Those that are attached, or that the device has a port for.
    pasids: Mutex<HashMap<Pasid, Weak<Watched>>>,
}

impl WatchedDevice {
    pub(crate) fn new(device: Rid, observer: &Arc<dyn Observer>) -> Self {
        let plain = Watched::new(Requester { device, pasid: None }, Arc::clone(observer));
        Self { plain, pasids: Mutex::default() }
    }

    /// The requests without a PASID.
    pub(crate) fn plain(&self) -> &Arc<Watched> {
        &self.plain
    }

    /// The requests with a PASID. It is the same for all who have it at the same time.
    pub(crate) fn pasid(&self, pasid: Pasid) -> Arc<Watched> {
        let mut pasids = lock(&self.pasids);
        if let Some(known) = pasids.get(&pasid).and_then(Weak::upgrade) {
            return known;
        }
        // A sweep at a power of two is rare, and leaves no more than are in use.
        if pasids.len().is_power_of_two() {
            pasids.retain(|_, watched| watched.strong_count() > 0);
        }
        let requester = Requester { device: self.plain.requester.device, pasid: Some(pasid) };
        let watched = Watched::new(requester, Arc::clone(&self.plain.observer));
        pasids.insert(pasid, Arc::downgrade(&watched));
        watched
    }
}
