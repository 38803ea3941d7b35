//! I/O address spaces: one map, many tables, memory charged once.
//!
//! # The objects
//!
//! - A [`Space`] is an address space for devices: I/O virtual addresses (IOVA), mapped to output addresses on a
//!   [`Bus`]. Its native page table *is* its map; there is no second record of what is mapped.
//! - A [`Memory`] is registered memory of a [`Backing`]: charged to an [`Account`] once however often it is mapped,
//!   and always at the same output address.
//! - A [`Table`] is a page table of a space as one class of devices sees it: the native table itself, or one
//!   *derived* from it in another format, filled when it is made and kept in step afterwards.
//! - A [`Device`] is attached to one table at a time. An [`Iommu`] carries that out. Devices that it cannot keep apart are a
//!   *group*, and have one [owner](DeviceOwner).
//!
//! # What holds
//!
//! - Any granule-aligned part of what is mapped can be unmapped; leaves are cut as needed, and nothing else
//!   changes.
//! - An operation happens whole or not at all.
//! - When an unmap has returned, no device reaches the memory.
//! - Operations on disjoint ranges share no lock; operations that overlap are decided by the table's entries.
//!
//! ```
//! use ioasid::{Account, Backing, Bus, Iova, IovaRange, Memory, Permissions, Space};
//!
//! let bus = Bus::new();
//! let account = Account::new("guest", None);
//! let ram = Memory::register(&Backing::anonymous(&bus, 1 << 30)?, 0, 1 << 30, &account)?;
//! assert_eq!(account.charged_pages(), 1 << 18);
//!
//! let space = Space::new(&bus);
//! space.map(Iova::new(0x4000_0000), &ram, 0, 1 << 30, Permissions::READ | Permissions::WRITE)?;
//! // One leaf of a GiB. Unplug 2 MiB in the middle of it:
//! let block = IovaRange::with_length(0x5000_0000, 2 << 20).unwrap();
//! assert_eq!(space.unmap(block)?.bytes(), 2 << 20);
//! assert!(space.walk(Iova::new(0x5000_0000)).is_none());
//! assert!(space.walk(Iova::new(0x4fff_ffff)).is_some());
//! // The same memory in a second space is charged to the account no second time.
//! let other = Space::new(&bus);
//! other.map(Iova::new(0), &ram, 0, 1 << 30, Permissions::READ)?;
//! assert_eq!(account.charged_pages(), 1 << 18);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "takes memory that its caller vouches for")]
mod backing;
mod bus;
mod derived;
mod device;
mod dma;
#[allow(unsafe_code, reason = "frees what nobody can be using any more, and calls membarrier")]
pub mod epoch;
mod flusher;
mod group;
#[cfg(feature = "vm-memory")]
mod guest;
#[allow(unsafe_code, reason = "copies from and to memory that devices share")]
mod host_memory;
mod iommu;
pub mod iova;
mod ledger;
mod mapped_in;
mod memory;
mod nesting;
pub mod pasid;
mod place;
mod route;
mod sleeping;
mod slice;
pub mod snapshot;
mod space;
mod sync;
mod table;

#[cfg(feature = "vm-memory")]
pub use backing::RegionError;
pub use backing::{Backing, BackingFile, FileError, LateBound, MemoryGone, Residency, ResidencyError};
pub use bus::{Bus, BusFull};
pub use derived::RadixTable;
pub use device::{Device, DeviceError};
pub use dma::{DmaError, Here, Late, Translated};
pub use group::{DeviceOwner, DriverClaim, InTheWay};
#[cfg(feature = "vm-memory")]
pub use guest::{GuestRam, PlugError, SpaceIommu, Translation};
pub use ioasid_pagetable::{
    Attributes, CachedWalk, Iova, IovaRange, Leaf, Oa, PageSize, Runs, SharedWalk, WalkFault,
};
pub use iommu::{
    AttachError, Change, Coherency, DerivedTable, Iommu, Requirements, Rid, TableClass, TableError,
};
pub use ledger::{Account, OverLimit, Usage};
pub use memory::{Memory, PANIC_PATIENCE, RegisterError, ReleaseError};
pub use nesting::{FirstStage, Nesting, NestingFault, SHADOW_BYTES};
pub use place::{BusObserver, HostBytes, HostPlace};
pub use slice::{
    BorrowError, BorrowedSlice, SLICE_PATIENCE, SliceError, SliceHandle, SliceHolder, StillBorrowed,
};
pub use snapshot::Snapshot;
pub use space::{
    ALIAS_PATIENCE, AliasError, DEFERRED_RANGES, DEFERRED_TIME, Extent, Extents, MapError, Mapped,
    MappingPolicy, Permissions, ProtectError, RemapError, ReservationOwner, ReserveError, Space, SpaceId,
    SpaceStatistics, UnmapBatch, UnmapError, Unmapped,
};
pub use table::{NoRecord, Table};

/// The page-table formats that derived tables can have.
pub use ioasid_pagetable as pagetable;
