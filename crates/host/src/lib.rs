//! The machine's own IOMMU for I/O address spaces: the engine's [`Iommu`](ioasid::Iommu) over Linux iommufd and VFIO.
//!
//! A [`Host`] is an open `/dev/iommu`. Devices are added to it by the paths of their VFIO files; a
//! [`Device`](ioasid::Device) is then made and attached as any other, and the space's mappings stand in a table of the
//! kernel. Software devices and the machine's can be attached to the same space.
//!
//! ```no_run
//! use ioasid::{Account, Backing, Bus, Device, Iova, Memory, Permissions, Rid, Space, Table};
//! use ioasid_host::{Host, HostOptions};
//!
//! let bus = Bus::new();
//! let host = Host::open(HostOptions::default())?;
//! let rid = Rid(0x0100);
//! let file = host.add_device(rid, "/dev/vfio/devices/vfio0")?;
//!
//! let space = Space::new(&bus);
//! let ram = Memory::register(&Backing::anonymous(&bus, 1 << 30)?, 0, 1 << 30, &Account::new("guest", None))?;
//! space.map(Iova::new(0x4000_0000), &ram, 0, 1 << 30, Permissions::READ_WRITE)?;
//! let device = Device::new(host, rid)?;
//! device.attach(&Table::for_device(&space, &device)?)?;
//! // `file` has the device's registers; its DMA reaches `ram` now.
//! # drop(file);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it maps on Linux
//!
//! | here | there |
//! |---|---|
//! | a [`Host`] | an open `/dev/iommu`, and one I/O address space in which registered memory is mapped once |
//! | a [`Table`](ioasid::Table) | an I/O address space (IOAS); which hardware tables that takes is Linux's to decide |
//! | attach, replace | VFIO ATTACH_PT; a second one replaces the first in one step |
//! | block | VFIO DETACH_PT: Linux refuses the device's DMA |
//! | map | IOAS_COPY, one for any number of blocks of the cut granule; and one to cut each block when it is first mapped together with others |
//! | unmap | IOAS_UNMAP, one for each range whatever the number of areas |
//!
//! # What Linux cannot do
//!
//! - **Cut.** An area is unmapped whole. Tables have areas no larger than the space's largest leaf, which is its cut
//!   granule; an unmap that would have to cut one is refused, whole, with [`TableError::CannotCut`](ioasid::TableError). A space
//!   that is to be unmapped page by page needs a native format whose largest leaf is a page, and pays with an area for
//!   each. A `Space::new` has leaves of 1 GiB and can be unmapped in such blocks, and as it was mapped.
//! - **Change in place.** Protect and remap are [`NeedsBreak`](ioasid::TableError), unless nothing would change; merge does
//!   nothing.
//! - **Memory that is reached by calls**, such as another process's: the kernel cannot be told of it, and so such a space is
//!   refused ([`HostError::ReachedByCalls`]). Files have to be of memory (memfd, tmpfs, hugetlbfs) and need Linux 6.13.
//! - **Tell devices of one IOMMU group apart.** They are attached to the same table or not at all, and while one of them is
//!   attached a blocked one may reach what that one does.
//! - **Be late with invalidations.** A deferred unmap is as strict as any.
//!
//! [`HostTable`] says what happens when Linux fails late, and `registered` in the source what is pinned and charged when.
//!
//! # Tests
//!
//! `tests/engine.rs` runs the engine's own test programs with a host as one of the IOMMUs, over the project's server in
//! the same process; `tests/under_run` runs this crate's real system calls under the project's transport. Neither needs
//! hardware or root.

#![deny(unsafe_code)]

mod areas;
mod calls;
mod cut;
mod host;
mod kernel;
mod registered;
mod sys;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use ioasid::{Oa, Rid};

pub use host::{DeviceFile, Host, HostOptions};
pub use registered::Mapping;
pub use rustix::io::Errno;
pub use table::{HostTable, MappedArea};

/// A call that Linux has refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {errno}{}", hint(.call, *.errno))]
pub struct CallError {
    /// The call's name in the kernel's headers.
    pub call: &'static str,
    /// Its answer.
    pub errno: Errno,
}

/// What a person can do about it, where that is known.
fn hint(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        (
            "IOMMU_IOAS_COPY" | "IOMMU_IOAS_MAP" | "IOMMU_IOAS_MAP_FILE" | "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
            Errno::NOMEM,
        ) => " (pinned memory counts against RLIMIT_MEMLOCK: raise it with `ulimit -l` or LimitMEMLOCK=)",
        ("IOMMU_IOAS_MAP_FILE", Errno::NOTTY) => " (mapping files needs Linux 6.13)",
        ("VFIO_DEVICE_BIND_IOMMUFD", Errno::BUSY | Errno::INVAL) => {
            " (maybe somebody else has the device open, or a driver has another one of its IOMMU group)"
        }
        _ => "",
    }
}

/// Why a host's IOMMU or a device could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file could not be opened.
    #[error("{} cannot be opened", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is a device with this requester ID already.
    #[error("there is a device {0} already")]
    RidTaken(Rid),
    /// Another device of the IOMMU group is attached. What can be mapped for a device is found out with the group detached, so
    /// all devices of a group are added before one is attached.
    #[error("device {device}, which is in the same IOMMU group {group}, is attached")]
    GroupAttached {
        /// The group's number, which is its name.
        group: u32,
        /// The other device.
        device: Rid,
    },
    /// Nothing could be mapped for the device.
    #[error("the device has no usable I/O virtual addresses")]
    NoAddresses,
    /// A call was refused.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Why a device was not given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveError {
    /// There is no such device.
    #[error("there is no device {0}")]
    NoDevice(Rid),
    /// It is attached to a table.
    #[error("device {0} is attached")]
    Attached(Rid),
    /// Somebody has its [`DeviceFile`].
    #[error("the file of device {0} is in use")]
    FileInUse(Rid),
}

/// Why something was not mapped in a table of the machine's IOMMU, or a device not attached to one: the source of
/// [`TableError::Refused`](ioasid::TableError::Refused).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The kernel cannot be told of the memory.
    #[error("memory that is reached by calls cannot be mapped for a device of the machine")]
    ReachedByCalls,
    /// No memory is registered there, or not to the end.
    #[error("there is no memory at output address {oa}")]
    NotThere {
        /// Where.
        oa: Oa,
    },
    /// The table has as many areas as it [may](HostOptions::most_areas).
    #[error("the table may not have more than {most} areas")]
    TooManyAreas {
        /// How many are allowed.
        most: u64,
    },
    /// Linux cannot tell a device's DMA from that of another one, which is attached to another table.
    #[error(
        "device {device} is attached to another table, and is in the same IOMMU group {group}: detach it first"
    )]
    Group {
        /// The group's number, which is its name.
        group: u32,
        /// The other device.
        device: Rid,
    },
    /// The table is out of use.
    #[error("the table is out of use since an unmap failed: {0}")]
    Broken(CallError),
    /// A call was refused.
    #[error(transparent)]
    Call(#[from] CallError),
}
