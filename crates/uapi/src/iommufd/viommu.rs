//! Virtual IOMMUs: the parts of a physical IOMMU that a VMM hands to one guest, the guest's names for devices on it, its
//! event queues and the queues that hardware reads directly.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::command;

/// VIOMMU_ALLOC: makes a virtual IOMMU on the IOMMU of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ViommuAlloc {
    /// Size of this structure in bytes.
    pub size: u32,
    /// No flag is defined: zero.
    pub flags: u32,
    /// [`VIOMMU_TYPE_ARM_SMMUV3`] or [`VIOMMU_TYPE_TEGRA241_CMDQV`]; the header's `type`.
    pub viommu_type: u32,
    /// A device whose IOMMU it is.
    pub dev_id: u32,
    /// The nest-parent table.
    pub hwpt_id: u32,
    /// Out: the id of the virtual IOMMU. The first version of the command ended here.
    pub out_viommu_id: u32,
    /// Bytes at `data_uptr`.
    pub data_len: u32,
    /// Zero.
    pub reserved: u32,
    /// Client address of data of the type, such as [`ViommuTegra241Cmdqv`].
    pub data_uptr: u64,
}

/// Data of [`VIOMMU_TYPE_TEGRA241_CMDQV`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ViommuTegra241Cmdqv {
    /// Out: offset at which the virtual interface's page can be mapped from the iommufd.
    pub out_vintf_mmap_offset: u64,
    /// Out: its length in bytes.
    pub out_vintf_mmap_length: u64,
}

/// VDEVICE_ALLOC: tells by what id the guest knows a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VdeviceAlloc {
    /// Size of this structure in bytes.
    pub size: u32,
    /// The virtual IOMMU.
    pub viommu_id: u32,
    /// The device. It can have one virtual device.
    pub dev_id: u32,
    /// Out: the id of the virtual device.
    pub out_vdevice_id: u32,
    /// The guest's id, such as a stream id or requester id. EEXIST if it is in use.
    pub virt_id: u64,
}

/// VEVENTQ_ALLOC: makes a queue (a file) of events for the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VeventqAlloc {
    /// Size of this structure in bytes.
    pub size: u32,
    /// No flag is defined: zero.
    pub flags: u32,
    /// The virtual IOMMU.
    pub viommu_id: u32,
    /// [`VEVENTQ_TYPE_ARM_SMMUV3`] or [`VEVENTQ_TYPE_TEGRA241_CMDQV`]; the header's `type`.
    pub event_type: u32,
    /// Events that the queue keeps before it loses some, 1 to 2^19.
    pub veventq_depth: u32,
    /// Out: the id of the queue.
    pub out_veventq_id: u32,
    /// Out: the file, as a descriptor of the caller. The first version of the command ended here.
    pub out_veventq_fd: u32,
    /// Zero.
    pub reserved: u32,
}

/// What precedes each event that is read from an event queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VeventHeader {
    /// [`VeventFlags`].
    pub flags: u32,
    /// Number of the event, 31 bits, which shows how many were lost.
    pub sequence: u32,
}

/// An event of an SMMUv3.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VeventArmSmmuv3 {
    /// The 256-bit record with the guest's stream id, little-endian.
    pub evt: [u64; 4],
}

/// An event of a Tegra 241's command-queue unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VeventTegra241Cmdqv {
    /// One bit for each queue that has failed, little-endian.
    pub lvcmdq_err_map: [u64; 2],
}

/// HW_QUEUE_ALLOC: gives a queue in guest memory to the hardware.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwQueueAlloc {
    /// Size of this structure in bytes.
    pub size: u32,
    /// No flag is defined: zero.
    pub flags: u32,
    /// The virtual IOMMU.
    pub viommu_id: u32,
    /// [`HW_QUEUE_TYPE_TEGRA241_CMDQV`]; the header's `type`.
    pub queue_type: u32,
    /// Which queue of the virtual IOMMU, counted from 0.
    pub index: u32,
    /// Out: the id of the queue.
    pub out_hw_queue_id: u32,
    /// Where the queue lies in the nest parent's address space; it has to be physically contiguous.
    pub nesting_parent_iova: u64,
    /// Length of the queue in bytes.
    pub length: u64,
}

command!(ViommuAlloc, "IOMMU_VIOMMU_ALLOC", 0x90, through out_viommu_id);
command!(VdeviceAlloc, "IOMMU_VDEVICE_ALLOC", 0x91, through virt_id);
command!(VeventqAlloc, "IOMMU_VEVENTQ_ALLOC", 0x93, through out_veventq_fd);
command!(HwQueueAlloc, "IOMMU_HW_QUEUE_ALLOC", 0x94, through length);

bitflags::bitflags! {
    /// [`VeventHeader::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct VeventFlags: u32 {
        /// Events were lost before this point; no event follows this header.
        const LOST_EVENTS = 1;
    }
}

/// [`ViommuAlloc::viommu_type`]: reserved.
pub const VIOMMU_TYPE_DEFAULT: u32 = 0;
/// [`ViommuAlloc::viommu_type`]: an SMMUv3.
pub const VIOMMU_TYPE_ARM_SMMUV3: u32 = 1;
/// [`ViommuAlloc::viommu_type`]: an SMMUv3 with Tegra 241's command-queue unit.
pub const VIOMMU_TYPE_TEGRA241_CMDQV: u32 = 2;

/// [`VeventqAlloc::event_type`]: reserved.
pub const VEVENTQ_TYPE_DEFAULT: u32 = 0;
/// [`VeventqAlloc::event_type`]: [`VeventArmSmmuv3`].
pub const VEVENTQ_TYPE_ARM_SMMUV3: u32 = 1;
/// [`VeventqAlloc::event_type`]: [`VeventTegra241Cmdqv`].
pub const VEVENTQ_TYPE_TEGRA241_CMDQV: u32 = 2;

/// [`HwQueueAlloc::queue_type`]: reserved.
pub const HW_QUEUE_TYPE_DEFAULT: u32 = 0;
/// [`HwQueueAlloc::queue_type`]: a command queue of a Tegra 241.
pub const HW_QUEUE_TYPE_TEGRA241_CMDQV: u32 = 1;
