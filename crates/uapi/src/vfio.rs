//! VFIO: the device side (`/dev/vfio/devices/vfioN`, and the same calls on a device file from a group), the type 1
//! commands of a container, and the names of all other commands.
//!
//! The same type byte as iommufd's, numbers 0x3b64 and up. Numbers from 0x3b70 on mean different things on a device, a
//! container and a migration file, so the kind of file has to be known before a number can be read: hence a table for
//! each kind. The first `u32` of an argument is `argsz`, the caller's size in bytes; below the least size EINVAL, and
//! what lies beyond the known size is ignored, except by BIND.
//!
//! GET_INFO and GET_REGION_INFO can have a chain of capabilities behind the structure ([`InfoCapHeader`]). If the
//! caller's room is too small for them the call succeeds, sets the CAPS flag, leaves `cap_offset` 0 and writes into
//! `argsz` the size to come back with.
//!
//! Regions of a device are ranges of its file. A client reads and writes them at the `offset` that GET_REGION_INFO
//! reports, with pread and pwrite, or maps them there if the region allows it.

mod container;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use self::container::*;
use crate::{command, ioctl_number};

/// BIND_IOMMUFD: the first call on a device file; ties the device to an iommufd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceBindIommufd {
    /// Size of this structure in bytes.
    pub argsz: u32,
    /// [`BindFlags`].
    pub flags: u32,
    /// The iommufd, as a descriptor of the caller.
    pub iommufd: i32,
    /// Out: the device's id in the iommufd. The first version of the command ended here.
    pub out_devid: u32,
    /// Client address of a 16-byte UUID, with [`BindFlags::TOKEN`].
    pub token_uuid_ptr: u64,
}

/// ATTACH_IOMMUFD_PT: the device's DMA goes through an address space or page table from now on. A device that is
/// attached already changes over in one step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceAttachIommufdPt {
    /// Size of this structure in bytes.
    pub argsz: u32,
    /// [`AttachFlags`].
    pub flags: u32,
    /// In: a space or page table of the iommufd. Out: the page table that is now used.
    pub pt_id: u32,
    /// The PASID, with [`AttachFlags::PASID`]. The least size ends before it.
    pub pasid: u32,
}

/// DETACH_IOMMUFD_PT: the device's DMA is blocked from now on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceDetachIommufdPt {
    /// Size of this structure in bytes.
    pub argsz: u32,
    /// [`DetachFlags`].
    pub flags: u32,
    /// The PASID, with [`DetachFlags::PASID`]. The least size ends before it.
    pub pasid: u32,
}

/// GET_INFO: what kind of device it is, and how many regions and interrupts it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfo {
    /// Size of this structure in bytes; out: the size needed for all capabilities.
    pub argsz: u32,
    /// Out: [`DeviceFlags`].
    pub flags: u32,
    /// Out: regions; [`PCI_NUM_REGIONS`] for a PCI device without regions of its own kind.
    pub num_regions: u32,
    /// Out: interrupt indexes; [`PCI_NUM_IRQS`] for a PCI device. The first version of the command ended here.
    pub num_irqs: u32,
    /// Out: where the first capability is, in bytes from the start of this structure; 0 if none.
    pub cap_offset: u32,
    /// Zero.
    pub pad: u32,
}

/// GET_REGION_INFO: size, place and permissions of one region.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionInfo {
    /// Size of this structure in bytes; out: the size needed for all capabilities.
    pub argsz: u32,
    /// Out: [`RegionFlags`].
    pub flags: u32,
    /// In: the region, such as [`PCI_CONFIG_REGION_INDEX`]. Out of range: EINVAL.
    pub index: u32,
    /// Out: where the first capability is, in bytes from the start of this structure; 0 if none.
    pub cap_offset: u32,
    /// Out: bytes of the region; 0 if the device has no such region.
    pub size: u64,
    /// Out: where the region begins in the device file, in bytes.
    pub offset: u64,
}

/// GET_IRQ_INFO: how many vectors one interrupt index has, and how they behave.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IrqInfo {
    /// Size of this structure in bytes.
    pub argsz: u32,
    /// Out: [`IrqFlags`].
    pub flags: u32,
    /// In: the index, such as [`PCI_MSI_IRQ_INDEX`]. Out of range: EINVAL.
    pub index: u32,
    /// Out: vectors; 0 if the device has none of this kind.
    pub count: u32,
}

/// SET_IRQS: what precedes the array of vectors' data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IrqSet {
    /// Size of this structure and its array in bytes.
    pub argsz: u32,
    /// [`IrqSetFlags`]: exactly one kind of data and exactly one action.
    pub flags: u32,
    /// The interrupt index.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Vectors.
    pub count: u32,
}

/// DEVICE_FEATURE: what precedes the feature's own data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceFeature {
    /// Size of this structure and its data in bytes.
    pub argsz: u32,
    /// The feature's number in bits 15:0 ([`DEVICE_FEATURE_MASK`]) and [`DeviceFeatureFlags`].
    pub flags: u32,
}

/// What each capability behind GET_INFO, GET_REGION_INFO and the container's GET_INFO begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InfoCapHeader {
    /// What it is; the numbers are separate for each command.
    pub id: u16,
    /// Version of its layout.
    pub version: u16,
    /// Where the next one is, in bytes from the start of the command's structure; 0 in the last.
    pub next: u32,
}

/// Region capability [`REGION_INFO_CAP_SPARSE_MMAP`]: only the areas that follow can be mapped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionInfoCapSparseMmap {
    /// Header.
    pub header: InfoCapHeader,
    /// Number of [`RegionSparseMmapArea`] that follow.
    pub nr_areas: u32,
    /// Zero.
    pub reserved: u32,
}

/// One area of [`RegionInfoCapSparseMmap`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionSparseMmapArea {
    /// First byte, from the start of the region.
    pub offset: u64,
    /// Bytes; may be 0.
    pub size: u64,
}

/// Region capability [`REGION_INFO_CAP_TYPE`]: what a region beyond the PCI ones is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionInfoCapType {
    /// Header.
    pub header: InfoCapHeader,
    /// Type.
    pub region_type: u32,
    /// Subtype.
    pub subtype: u32,
}

/// Device capability [`DEVICE_INFO_CAP_PCI_ATOMIC_COMP`]: atomic operations that the root complex completes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfoCapPciAtomicComp {
    /// Header.
    pub header: InfoCapHeader,
    /// Widths: 1 for 32 bits, 2 for 64, 4 for 128.
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

command!(DeviceInfo, "VFIO_DEVICE_GET_INFO", 0x6b, through num_irqs);
command!(RegionInfo, "VFIO_DEVICE_GET_REGION_INFO", 0x6c, through offset);
command!(IrqInfo, "VFIO_DEVICE_GET_IRQ_INFO", 0x6d, through count);
command!(IrqSet, "VFIO_DEVICE_SET_IRQS", 0x6e, through count);
command!(DeviceFeature, "VFIO_DEVICE_FEATURE", 0x75, through flags);
command!(DeviceBindIommufd, "VFIO_DEVICE_BIND_IOMMUFD", 0x76, through out_devid);
command!(DeviceAttachIommufdPt, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", 0x77, through pt_id);
command!(DeviceDetachIommufdPt, "VFIO_DEVICE_DETACH_IOMMUFD_PT", 0x78, through flags);

/// Constants for ioctl numbers, and a table with their names for one kind of file.
macro_rules! numbers {
    ($(#[$attribute:meta])* $table:ident: $($name:ident = $number:literal, $kernel_name:literal;)*) => {
        $(
            #[doc = concat!("The ioctl number of `", $kernel_name, "`.")]
            pub const $name: u32 = ioctl_number($number);
        )*
        $(#[$attribute])*
        pub const $table: &[(u32, &str)] = &[$(($name, $kernel_name),)*];
    };
}

numbers! {
    /// Number and name of every command of a device file.
    DEVICE_COMMANDS:
    DEVICE_GET_INFO = 0x6b, "VFIO_DEVICE_GET_INFO";
    DEVICE_GET_REGION_INFO = 0x6c, "VFIO_DEVICE_GET_REGION_INFO";
    DEVICE_GET_IRQ_INFO = 0x6d, "VFIO_DEVICE_GET_IRQ_INFO";
    DEVICE_SET_IRQS = 0x6e, "VFIO_DEVICE_SET_IRQS";
    DEVICE_RESET = 0x6f, "VFIO_DEVICE_RESET";
    DEVICE_GET_PCI_HOT_RESET_INFO = 0x70, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO";
    DEVICE_PCI_HOT_RESET = 0x71, "VFIO_DEVICE_PCI_HOT_RESET";
    DEVICE_QUERY_GFX_PLANE = 0x72, "VFIO_DEVICE_QUERY_GFX_PLANE";
    DEVICE_GET_GFX_DMABUF = 0x73, "VFIO_DEVICE_GET_GFX_DMABUF";
    DEVICE_IOEVENTFD = 0x74, "VFIO_DEVICE_IOEVENTFD";
    DEVICE_FEATURE = 0x75, "VFIO_DEVICE_FEATURE";
    DEVICE_BIND_IOMMUFD = 0x76, "VFIO_DEVICE_BIND_IOMMUFD";
    DEVICE_ATTACH_IOMMUFD_PT = 0x77, "VFIO_DEVICE_ATTACH_IOMMUFD_PT";
    DEVICE_DETACH_IOMMUFD_PT = 0x78, "VFIO_DEVICE_DETACH_IOMMUFD_PT";
}

numbers! {
    /// Number and name of every command of a group file.
    GROUP_COMMANDS:
    GROUP_GET_STATUS = 0x67, "VFIO_GROUP_GET_STATUS";
    GROUP_SET_CONTAINER = 0x68, "VFIO_GROUP_SET_CONTAINER";
    GROUP_UNSET_CONTAINER = 0x69, "VFIO_GROUP_UNSET_CONTAINER";
    GROUP_GET_DEVICE_FD = 0x6a, "VFIO_GROUP_GET_DEVICE_FD";
}

numbers! {
    /// Number and name of every type 1 command of a container file, `/dev/vfio/vfio` or an iommufd.
    CONTAINER_COMMANDS:
    GET_API_VERSION = 0x64, "VFIO_GET_API_VERSION";
    CHECK_EXTENSION = 0x65, "VFIO_CHECK_EXTENSION";
    SET_IOMMU = 0x66, "VFIO_SET_IOMMU";
    IOMMU_GET_INFO = 0x70, "VFIO_IOMMU_GET_INFO";
    IOMMU_MAP_DMA = 0x71, "VFIO_IOMMU_MAP_DMA";
    IOMMU_UNMAP_DMA = 0x72, "VFIO_IOMMU_UNMAP_DMA";
    IOMMU_ENABLE = 0x73, "VFIO_IOMMU_ENABLE";
    IOMMU_DISABLE = 0x74, "VFIO_IOMMU_DISABLE";
    IOMMU_DIRTY_PAGES = 0x75, "VFIO_IOMMU_DIRTY_PAGES";
}

numbers! {
    /// Number and name of every command of a migration data file.
    MIGRATION_COMMANDS:
    MIG_GET_PRECOPY_INFO = 0x79, "VFIO_MIG_GET_PRECOPY_INFO";
}

bitflags::bitflags! {
    /// [`DeviceBindIommufd::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct BindFlags: u32 {
        /// `token_uuid_ptr` points to a token that a virtual function asks for.
        const TOKEN = 1;
    }

    /// [`DeviceAttachIommufdPt::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct AttachFlags: u32 {
        /// Attach `pasid`, not the device's plain DMA.
        const PASID = 1;
    }

    /// [`DeviceDetachIommufdPt::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct DetachFlags: u32 {
        /// Detach `pasid`, not the device's plain DMA.
        const PASID = 1;
    }

    /// [`DeviceInfo::flags`]: reset, capabilities, and exactly one kind of device.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct DeviceFlags: u32 {
        /// DEVICE_RESET works.
        const RESET = 1 << 0;
        /// A PCI device.
        const PCI = 1 << 1;
        /// A platform device.
        const PLATFORM = 1 << 2;
        /// An AMBA device.
        const AMBA = 1 << 3;
        /// A channel I/O device.
        const CCW = 1 << 4;
        /// A crypto adjunct processor.
        const AP = 1 << 5;
        /// A device of Freescale's management complex bus.
        const FSL_MC = 1 << 6;
        /// There are capabilities.
        const CAPS = 1 << 7;
        /// A device of AMD's CDX bus.
        const CDX = 1 << 8;
    }

    /// [`RegionInfo::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// pread works.
        const READ = 1;
        /// pwrite works.
        const WRITE = 2;
        /// mmap works.
        const MMAP = 4;
        /// There are capabilities.
        const CAPS = 8;
    }

    /// [`IrqInfo::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct IrqFlags: u32 {
        /// Vectors can be delivered through eventfds.
        const EVENTFD = 1;
        /// Vectors can be masked and unmasked.
        const MASKABLE = 2;
        /// A vector masks itself when it fires.
        const AUTOMASKED = 4;
        /// All vectors have to be set up at once.
        const NORESIZE = 8;
    }

    /// [`IrqSet::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct IrqSetFlags: u32 {
        /// No array: the action concerns all vectors of the range.
        const DATA_NONE = 1 << 0;
        /// An array of bytes: the action concerns vectors whose byte is not zero.
        const DATA_BOOL = 1 << 1;
        /// An array of eventfds, `i32` each; -1 for none.
        const DATA_EVENTFD = 1 << 2;
        /// Mask.
        const ACTION_MASK = 1 << 3;
        /// Unmask.
        const ACTION_UNMASK = 1 << 4;
        /// Fire, or say what firing signals.
        const ACTION_TRIGGER = 1 << 5;
    }

    /// [`DeviceFeature::flags`] beside the number.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct DeviceFeatureFlags: u32 {
        /// Read the feature.
        const GET = 1 << 16;
        /// Write the feature.
        const SET = 1 << 17;
        /// Only ask whether GET and SET, as given, are supported.
        const PROBE = 1 << 18;
    }
}

/// The bits of [`DeviceFeature::flags`] that hold the feature's number.
pub const DEVICE_FEATURE_MASK: u32 = 0xffff;

/// Answer of GET_API_VERSION.
pub const API_VERSION: u32 = 0;
/// Argument of CHECK_EXTENSION and SET_IOMMU: type 1, the x86 and Arm way to map.
pub const TYPE1_IOMMU: u32 = 1;
/// Argument of CHECK_EXTENSION and SET_IOMMU: type 1 whose unmap does not cut mappings.
pub const TYPE1V2_IOMMU: u32 = 3;
/// Argument of CHECK_EXTENSION: DMA is coherent whatever the device asks for.
pub const DMA_CC_IOMMU: u32 = 4;
/// Argument of CHECK_EXTENSION: everything can be unmapped at once.
pub const UNMAP_ALL: u32 = 9;
/// Argument of CHECK_EXTENSION: virtual addresses of mappings can be changed.
pub const UPDATE_VADDR: u32 = 10;

/// Region index of BAR 0; BAR n is this plus n.
pub const PCI_BAR0_REGION_INDEX: u32 = 0;
/// Region index of BAR 5, the last.
pub const PCI_BAR5_REGION_INDEX: u32 = 5;
/// Region index of the expansion ROM.
pub const PCI_ROM_REGION_INDEX: u32 = 6;
/// Region index of configuration space.
pub const PCI_CONFIG_REGION_INDEX: u32 = 7;
/// Region index of the VGA ranges; EINVAL unless the device has them.
pub const PCI_VGA_REGION_INDEX: u32 = 8;
/// Regions that every PCI device has, present or not.
pub const PCI_NUM_REGIONS: u32 = 9;

/// Interrupt index of the interrupt pin.
pub const PCI_INTX_IRQ_INDEX: u32 = 0;
/// Interrupt index of MSI.
pub const PCI_MSI_IRQ_INDEX: u32 = 1;
/// Interrupt index of MSI-X.
pub const PCI_MSIX_IRQ_INDEX: u32 = 2;
/// Interrupt index of PCIe error reports.
pub const PCI_ERR_IRQ_INDEX: u32 = 3;
/// Interrupt index of requests to give the device back.
pub const PCI_REQ_IRQ_INDEX: u32 = 4;
/// Interrupt indexes that every PCI device has, present or not.
pub const PCI_NUM_IRQS: u32 = 5;

/// Device capability id of [`DeviceInfoCapPciAtomicComp`].
pub const DEVICE_INFO_CAP_PCI_ATOMIC_COMP: u16 = 5;
/// Region capability id of [`RegionInfoCapSparseMmap`].
pub const REGION_INFO_CAP_SPARSE_MMAP: u16 = 1;
/// Region capability id of [`RegionInfoCapType`].
pub const REGION_INFO_CAP_TYPE: u16 = 2;
/// Region capability id, a header alone: the pages of the MSI-X table can be mapped with the rest.
pub const REGION_INFO_CAP_MSIX_MAPPABLE: u16 = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Command;

    #[test]
    fn structures_and_tables_agree() {
        for info in [
            DeviceInfo::INFO,
            RegionInfo::INFO,
            IrqInfo::INFO,
            IrqSet::INFO,
            DeviceFeature::INFO,
            DeviceBindIommufd::INFO,
            DeviceAttachIommufdPt::INFO,
            DeviceDetachIommufdPt::INFO,
        ] {
            assert!(DEVICE_COMMANDS.contains(&(info.number, info.name)), "{info:?}");
        }
    }

    #[test]
    fn least_and_full_sizes() {
        assert_eq!((DeviceInfo::MIN_SIZE, DeviceInfo::SIZE), (16, 24));
        assert_eq!((RegionInfo::MIN_SIZE, RegionInfo::SIZE), (32, 32));
        assert_eq!((IrqSet::MIN_SIZE, IrqSet::SIZE), (20, 20));
        assert_eq!((DeviceBindIommufd::MIN_SIZE, DeviceBindIommufd::SIZE), (16, 24));
        assert_eq!((DeviceAttachIommufdPt::MIN_SIZE, DeviceAttachIommufdPt::SIZE), (12, 16));
        assert_eq!((DeviceDetachIommufdPt::MIN_SIZE, DeviceDetachIommufdPt::SIZE), (8, 12));
    }
}
