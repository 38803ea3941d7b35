//! The I/O address space.
//!
//! A [`Space`] is its native page table, plus a *layout*: which ranges are reserved or allowed, and which tables
//! follow the native one. The layout changes rarely and is read by every operation, so it is an immutable value
//! behind one pointer. Whoever changes it publishes a new value, waits until the operations that may have
//! read the old one have ended, and then looks whether the change agrees with what is mapped. Mapping and
//! unmapping never take a lock for it.
//!
//! The operations themselves are in the modules below: [`map`] and [`unmap`] follow the protocol of the native
//! table's entries step by step, [`protect`], [`remap`], [`alias`], [`merge`] and [`split`] own leaves while they translate
//! ([`held`]), [`query`] only looks, [`policy`] is what a space may forbid, and [`layout`] is all that goes with reserved
//! ranges and tables.

use crate::bus::Bus;
use crate::derived::leaves_by_size;
use crate::epoch::{self, Announced};
use crate::sleeping::SleepingCopies;
use crate::slice::Slices;
use crate::sync::{Mutex, MutexGuard, Ordering, PoisonError, wait_a_little};
use ioasid_pagetable::{
    Attributes, ClaimFormat, Entry, Format, Iova, IovaRange, Leaf, Native, Oa, PageSize, Radix,
};
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64 as Number;
use std::sync::{Arc, Weak};

mod alias;
mod deferred;
mod held;
mod layout;
mod map;
mod merge;
mod placement;
mod policy;
mod protect;
mod query;
mod remap;
mod snapshot;
mod split;
mod unmap;
mod written;

pub use alias::{ALIAS_PATIENCE, AliasError};
use deferred::Deferred;
pub use deferred::{DEFERRED_RANGES, DEFERRED_TIME, UnmapBatch};
use layout::Layout;
pub use layout::{ReservationOwner, ReserveError};
pub use map::MapError;
use placement::Placement;
use policy::MappingCount;
pub use policy::MappingPolicy;
pub use protect::ProtectError;
pub use query::{Extent, Extents, Mapped};
pub use remap::RemapError;
pub use unmap::{UnmapError, Unmapped};

static SPACES: Number = Number::new(0);

/// The number of a space: no two spaces of a process ever have the same, so that one can be told from another after it has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(u64);

impl std::fmt::Display for SpaceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What devices may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permissions(Attributes);

impl Permissions {
    /// Devices may read.
    pub const READ: Permissions = Permissions(Attributes::READ);
    /// Devices may write.
    pub const WRITE: Permissions = Permissions(Attributes::WRITE);
    /// Devices may read and write.
    pub const READ_WRITE: Permissions = Permissions(Attributes::READ.union(Attributes::WRITE));

    /// Whether all of `other` is allowed.
    pub fn contains(self, other: Permissions) -> bool {
        self.0.contains(other.0)
    }

    pub(crate) fn of(attributes: Attributes) -> Permissions {
        Permissions(attributes & (Attributes::READ | Attributes::WRITE))
    }

    /// What a page table calls it.
    pub fn attributes(self) -> Attributes {
        self.0
    }
}

impl std::ops::BitOr for Permissions {
    type Output = Permissions;

    fn bitor(self, other: Permissions) -> Permissions {
        Permissions(self.0 | other.0)
    }
}

/// An I/O address space.
///
/// See the [crate's documentation](crate) for an example.
pub struct Space {
    id: u64,
    bus: Arc<Bus>,
    native: Radix<Native>,
    policy: MappingPolicy,
    mappings: MappingCount,
    layout: epoch::Published<Layout>,
    /// Held by whoever looks for a table to share and makes one if there is none. Taken before `changing`.
    sharing: Mutex<()>,
    /// Held by whoever changes the layout, or must not see it change.
    changing: Mutex<()>,
    /// Copies to and from late-bound memory that went through this space.
    sleeping: Arc<SleepingCopies>,
    /// What was unmapped and not waited for yet.
    deferred: Deferred,
    /// What device models have borrowed.
    slices: Slices,
    this: Weak<Space>,
    /// Where to look for room, from the first time on that somebody wants it.
    placement: Announced<Placement>,
}

/// Figures about a space, for people and tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceStatistics {
    /// How many leaves of each size the native table has, smallest first.
    pub leaves: Vec<(PageSize, u64)>,
    /// Mapped bytes; saturates at 2^64 - 1.
    pub mapped_bytes: u64,
    /// Bytes of addresses at which an operation is at work, or that were unmapped and wait for a
    /// [flush](Space::flush); saturates at 2^64 - 1.
    pub busy_bytes: u64,
    /// Bytes of the native table's pages.
    pub native_table_bytes: u64,
    /// Bytes of the derived tables' pages, as far as they are known.
    pub derived_table_bytes: u64,
    /// How many tables devices may be attached to, the native one included if any is.
    pub tables: usize,
}

impl Space {
    /// An empty space with a granule of 4 KiB. It takes no memory for tables until something is mapped.
    pub fn new(bus: &Arc<Bus>) -> Arc<Space> {
        Space::with_format(bus, Native::new())
    }

    /// An empty space with another granule, or with a limit to the size of leaves: the *cut granule*. Tables that
    /// cannot be cut are filled with leaves that need not be.
    pub fn with_format(bus: &Arc<Bus>, format: Native) -> Arc<Space> {
        Space::with_policy(bus, format, MappingPolicy::default())
    }

    /// An empty space that does not allow everything.
    pub fn with_policy(bus: &Arc<Bus>, format: Native, policy: MappingPolicy) -> Arc<Space> {
        Arc::new_cyclic(|this| Space {
            id: SPACES.fetch_add(1, Ordering::Relaxed),
            bus: bus.clone(),
            native: Radix::native(format),
            policy,
            mappings: MappingCount::default(),
            layout: epoch::Published::new(Layout::default()),
            sharing: Mutex::new(()),
            changing: Mutex::new(()),
            sleeping: Arc::default(),
            deferred: Deferred::default(),
            slices: Slices::new(),
            this: this.clone(),
            placement: Announced::new(),
        })
    }

    /// The bus on which its output addresses lie.
    pub fn bus(&self) -> &Arc<Bus> {
        &self.bus
    }

    /// The smallest page that can be mapped.
    pub fn granule(&self) -> PageSize {
        self.native.format().granule()
    }

    /// Which space it is: what an IOMMU's faults call it.
    pub fn id(&self) -> SpaceId {
        SpaceId(self.id)
    }

    /// Its number, which no other space of the process ever has; below 2^63.
    pub(crate) fn number(&self) -> u64 {
        self.id
    }

    pub(crate) fn weak(&self) -> Weak<Space> {
        self.this.clone()
    }

    pub(crate) fn native(&self) -> &Radix<Native> {
        &self.native
    }

    pub(crate) fn sharing(&self) -> MutexGuard<'_, ()> {
        self.sharing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As long as this is held, no table comes or goes and no reservation is made.
    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sleeping(&self) -> &Arc<SleepingCopies> {
        &self.sleeping
    }

    pub(crate) fn slices(&self) -> &Slices {
        &self.slices
    }

    /// The leaf that translates `iova`.
    pub fn walk(&self, iova: Iova) -> Option<Leaf> {
        let _operation = epoch::operation();
        self.native.walk(iova.get()).ok()
    }

    /// The leaf that translates an address and that no operation owns. `None`: an operation is at work there; `Some(None)`:
    /// nothing is mapped. Inside a section of either kind.
    pub(crate) fn settled_leaf(&self, iova: u64) -> Option<Option<Leaf>> {
        let mut found = Some(None);
        self.native.raw_leaves(IovaRange::new(iova, iova)?, |level, _, value| {
            found = match self.native.format().decode(level, value) {
                _ if value & Native::BUSY != 0 => None,
                Entry::Leaf { oa, size, attributes } => {
                    let first = iova & !(size.bytes() - 1);
                    Some(Some(Leaf { iova: first, oa: Oa::new(oa), size, attributes }))
                }
                _ => Some(None),
            };
            ControlFlow::Break(())
        });
        found
    }

    /// The leaves that have an address in the range, ascending.
    pub fn leaves(&self, range: IovaRange) -> Vec<Leaf> {
        let _operation = epoch::operation();
        let mut leaves = Vec::new();
        self.native.leaves(range, |leaf| {
            leaves.push(leaf);
            ControlFlow::Continue(())
        });
        leaves
    }

    /// Counts what there is.
    pub fn statistics(&self) -> SpaceStatistics {
        let layout = self.layout.read();
        let leaves = leaves_by_size(&self.native);
        let bytes = leaves.iter().map(|(size, count)| size.bytes().saturating_mul(*count));
        let mapped_bytes = bytes.fold(0, u64::saturating_add);
        let mut busy_bytes = 0u64;
        self.native.settled(IovaRange::ALL, |occupied, leaf| {
            if leaf.is_none() {
                busy_bytes = busy_bytes.saturating_add(occupied.length().unwrap_or(u64::MAX));
            }
            ControlFlow::Continue(())
        });
        SpaceStatistics {
            leaves,
            mapped_bytes,
            busy_bytes,
            native_table_bytes: self.native.table_bytes(),
            derived_table_bytes: layout.derived().filter_map(|table| table.table_bytes()).sum(),
            tables: layout.table_count(),
        }
    }
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space")
            .field("id", &self.id)
            .field("layout", &*self.layout.read())
            .finish_non_exhaustive()
    }
}

impl Space {
    /// After an operation has met a busy entry, outside of any section: gets the entry's owner on, or gives it time. What
    /// was [deferred](deferred) stays busy until somebody flushes.
    pub(crate) fn step_aside(&self, tries: &mut u32) {
        if self.flush_any() {
            return;
        }
        *tries = tries.saturating_add(1);
        wait_a_little(*tries);
    }
}
