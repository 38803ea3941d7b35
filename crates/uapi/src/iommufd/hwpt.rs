//! Devices and their page tables (HWPT): what the IOMMU in front of a device can do, tables of its format, dirty
//! tracking, invalidation of what nested tables cached, and the faults that devices report.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::command;

/// HWPT_ALLOC: makes a page table for the IOMMU of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptAlloc {
    /// Size of this structure in bytes.
    pub size: u32,
    /// [`HwptAllocFlags`].
    pub flags: u32,
    /// The device whose IOMMU decides the format.
    pub dev_id: u32,
    /// The space, nest-parent table or virtual IOMMU that the table translates for.
    pub pt_id: u32,
    /// Out: the id of the new table.
    pub out_hwpt_id: u32,
    /// Zero. The first version of the command ended here.
    pub reserved: u32,
    /// What `data_uptr` points to: [`HWPT_DATA_NONE`] or one of its neighbours.
    pub data_type: u32,
    /// Bytes at `data_uptr`.
    pub data_len: u32,
    /// Client address of the data of the IOMMU's format, such as [`HwptVtdS1`].
    pub data_uptr: u64,
    /// The fault queue, with [`HwptAllocFlags::FAULT_ID_VALID`].
    pub fault_id: u32,
    /// Zero.
    pub reserved2: u32,
}

/// Data of a VT-d stage-1 table ([`HWPT_DATA_VTD_S1`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptVtdS1 {
    /// [`VtdS1Flags`].
    pub flags: u64,
    /// Guest-physical address of the top table.
    pub pgtbl_addr: u64,
    /// Width of the addresses that the table translates, in bits.
    pub addr_width: u32,
    /// Zero.
    pub reserved: u32,
}

/// Data of an SMMUv3 stage-1 table ([`HWPT_DATA_ARM_SMMUV3`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptArmSmmuv3 {
    /// The first two double words of the guest's stream table entry, little-endian.
    pub ste: [u64; 2],
}

/// Data of an AMD guest table ([`HWPT_DATA_AMD_GUEST`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptAmdGuest {
    /// The guest's device table entry.
    pub dte: [u64; 4],
}

/// GET_HW_INFO: what the IOMMU in front of a device is and can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GetHwInfo {
    /// Size of this structure in bytes.
    pub size: u32,
    /// [`HwInfoFlags`].
    pub flags: u32,
    /// The device.
    pub dev_id: u32,
    /// In: room at `data_uptr` in bytes. Out: bytes that there are; more room than that has been zeroed.
    pub data_len: u32,
    /// Client address for the data, such as [`HwInfoVtd`].
    pub data_uptr: u64,
    /// In, with [`HwInfoFlags::INPUT_TYPE`]: the type of data wanted. Out: the type of the data,
    /// [`HW_INFO_TYPE_NONE`] or one of its neighbours. (The header has a union of `in_data_type` and
    /// `out_data_type` here.)
    pub data_type: u32,
    /// Out: log2 of how many PASIDs the device can use; 0 if none.
    pub out_max_pasid_log2: u8,
    /// Zero. The first version of the command ended here.
    pub reserved: [u8; 3],
    /// Out: [`HwCapabilities`].
    pub out_capabilities: u64,
}

/// What a VT-d unit says ([`HW_INFO_TYPE_INTEL_VTD`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwInfoVtd {
    /// [`HwInfoVtdFlags`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// The Capability register.
    pub cap_reg: u64,
    /// The Extended Capability register.
    pub ecap_reg: u64,
}

/// What an SMMUv3 says ([`HW_INFO_TYPE_ARM_SMMUV3`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwInfoArmSmmuv3 {
    /// [`HwInfoArmSmmuv3Flags`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// The ID registers IDR0 to IDR5.
    pub idr: [u32; 6],
    /// The implementation register.
    pub iidr: u32,
    /// The architecture version register.
    pub aidr: u32,
}

/// What the command-queue unit of a Tegra 241 says ([`HW_INFO_TYPE_TEGRA241_CMDQV`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwInfoTegra241Cmdqv {
    /// No flag is defined: zero.
    pub flags: u32,
    /// Version of the unit.
    pub version: u8,
    /// log2 of the queues of one virtual interface.
    pub log2vcmdqs: u8,
    /// log2 of its virtual stream ids.
    pub log2vsids: u8,
    /// Zero.
    pub reserved: u8,
}

/// What an AMD IOMMU says ([`HW_INFO_TYPE_AMD`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwInfoAmd {
    /// The Extended Feature register.
    pub efr: u64,
    /// The Extended Feature 2 register.
    pub efr2: u64,
}

/// HWPT_SET_DIRTY_TRACKING: begins or ends recording which pages devices write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptSetDirtyTracking {
    /// Size of this structure in bytes.
    pub size: u32,
    /// [`DirtyTrackingFlags`]; without ENABLE recording ends.
    pub flags: u32,
    /// The table.
    pub hwpt_id: u32,
    /// Zero.
    pub reserved: u32,
}

/// HWPT_GET_DIRTY_BITMAP: reads (and clears) which pages have been written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptGetDirtyBitmap {
    /// Size of this structure in bytes.
    pub size: u32,
    /// The table.
    pub hwpt_id: u32,
    /// [`GetDirtyBitmapFlags`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// First IOVA of the range, a multiple of `page_size`.
    pub iova: u64,
    /// Length of the range in bytes.
    pub length: u64,
    /// Bytes that one bit of the bitmap stands for.
    pub page_size: u64,
    /// Client address of the bitmap: bit n of its 64-bit words is the page at `iova` + n * `page_size`. Bits are
    /// only ever set.
    pub data: u64,
}

/// HWPT_INVALIDATE: what an IOMMU may have cached of a nested table (or of a virtual IOMMU's) is no longer true.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptInvalidate {
    /// Size of this structure in bytes.
    pub size: u32,
    /// The nested table or the virtual IOMMU.
    pub hwpt_id: u32,
    /// Client address of the array of requests.
    pub data_uptr: u64,
    /// What the entries are: [`HWPT_INVALIDATE_DATA_VTD_S1`] or [`VIOMMU_INVALIDATE_DATA_ARM_SMMUV3`].
    pub data_type: u32,
    /// Bytes of one entry.
    pub entry_len: u32,
    /// In: entries. Out: entries that were handled, also after an error.
    pub entry_num: u32,
    /// Zero.
    pub reserved: u32,
}

/// One invalidation of a VT-d stage-1 table ([`HWPT_INVALIDATE_DATA_VTD_S1`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptVtdS1Invalidate {
    /// First address, a multiple of 4 KiB.
    pub addr: u64,
    /// Pages of 4 KiB; `u64::MAX` with address 0 means everything.
    pub npages: u64,
    /// [`VtdInvalidateFlags`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// One command of a guest's SMMUv3 queue ([`VIOMMU_INVALIDATE_DATA_ARM_SMMUV3`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ViommuArmSmmuv3Invalidate {
    /// The 128-bit command, little-endian.
    pub cmd: [u64; 2],
}

/// FAULT_QUEUE_ALLOC: makes a queue (a file) through which page faults of devices are read and answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FaultQueueAlloc {
    /// Size of this structure in bytes.
    pub size: u32,
    /// No flag is defined: zero.
    pub flags: u32,
    /// Out: the id of the queue.
    pub out_fault_id: u32,
    /// Out: the file, as a descriptor of the caller. Reads give [`HwptPgfault`], writes take
    /// [`HwptPageResponse`].
    pub out_fault_fd: u32,
}

/// A page fault of a device, as read from a fault queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptPgfault {
    /// [`PageFaultFlags`].
    pub flags: u32,
    /// The device.
    pub dev_id: u32,
    /// The PASID, if [`PageFaultFlags::PASID_VALID`].
    pub pasid: u32,
    /// The page request group that the fault belongs to.
    pub grpid: u32,
    /// [`PageFaultPermissions`] that the device asks for.
    pub perm: u32,
    /// Zero.
    pub reserved: u32,
    /// The address that faulted.
    pub addr: u64,
    /// Bytes that the device would like to reach; a hint, 0 if unknown.
    pub length: u32,
    /// Names the group in the response.
    pub cookie: u32,
}

/// The answer to all faults of one group, as written to a fault queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HwptPageResponse {
    /// The group's cookie.
    pub cookie: u32,
    /// [`PAGE_RESPONSE_SUCCESS`] or [`PAGE_RESPONSE_INVALID`].
    pub code: u32,
}

command!(HwptAlloc, "IOMMU_HWPT_ALLOC", 0x89, through reserved);
command!(GetHwInfo, "IOMMU_GET_HW_INFO", 0x8a, through reserved);
command!(HwptSetDirtyTracking, "IOMMU_HWPT_SET_DIRTY_TRACKING", 0x8b, through reserved);
command!(HwptGetDirtyBitmap, "IOMMU_HWPT_GET_DIRTY_BITMAP", 0x8c, through data);
command!(HwptInvalidate, "IOMMU_HWPT_INVALIDATE", 0x8d, through reserved);
command!(FaultQueueAlloc, "IOMMU_FAULT_QUEUE_ALLOC", 0x8e, through out_fault_fd);

bitflags::bitflags! {
    /// Flags of HWPT_ALLOC.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HwptAllocFlags: u32 {
        /// Nested tables will be put on top of this one.
        const NEST_PARENT = 1;
        /// Only devices that can record writes may attach.
        const DIRTY_TRACKING = 2;
        /// `fault_id` is a fault queue.
        const FAULT_ID_VALID = 4;
        /// The table can be attached to PASIDs.
        const PASID = 8;
    }

    /// [`HwptVtdS1::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct VtdS1Flags: u64 {
        /// Supervisor requests are honoured.
        const SRE = 1;
        /// Extended access flag is used.
        const EAFE = 2;
        /// Write protection holds for supervisor requests too.
        const WPE = 4;
    }

    /// [`GetHwInfo::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HwInfoFlags: u32 {
        /// `data_type` says which data the caller wants.
        const INPUT_TYPE = 1;
    }

    /// [`GetHwInfo::out_capabilities`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HwCapabilities: u64 {
        /// Tables with dirty tracking can be made for the device.
        const DIRTY_TRACKING = 1;
        /// The device's PASIDs can ask for execute permission.
        const PASID_EXECUTE = 2;
        /// The device's PASIDs can ask for privileged mode.
        const PASID_PRIVILEGED = 4;
        /// Address translation services cannot be used by the device.
        const ATS_NOT_SUPPORTED = 8;
    }

    /// [`HwInfoVtd::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HwInfoVtdFlags: u32 {
        /// Erratum 772415: no read-only mapping may be in a nest parent.
        const ERRATA_772415_SPR17 = 1;
    }

    /// [`HwInfoArmSmmuv3::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HwInfoArmSmmuv3Flags: u32 {
        /// TLB and configuration invalidations have to be issued twice.
        const ERRATA_REPEAT_TLBI_CFGI = 1;
    }

    /// [`HwptSetDirtyTracking::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct DirtyTrackingFlags: u32 {
        /// Clear what was recorded, and record.
        const ENABLE = 1;
    }

    /// [`HwptGetDirtyBitmap::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct GetDirtyBitmapFlags: u32 {
        /// Leave the record as it is (cheaper if the range is unmapped next).
        const NO_CLEAR = 1;
    }

    /// [`HwptVtdS1Invalidate::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct VtdInvalidateFlags: u32 {
        /// Only leaf entries have changed.
        const LEAF = 1;
    }

    /// [`HwptPgfault::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PageFaultFlags: u32 {
        /// `pasid` is a PASID.
        const PASID_VALID = 1;
        /// The last fault of its group.
        const LAST_PAGE = 2;
    }

    /// [`HwptPgfault::perm`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PageFaultPermissions: u32 {
        /// The device wants to read.
        const READ = 1;
        /// The device wants to write.
        const WRITE = 2;
        /// The device wants to execute.
        const EXECUTE = 4;
        /// The device asks in privileged mode.
        const PRIVILEGED = 8;
    }
}

/// [`HwptAlloc::data_type`]: a table that the server fills; no data.
pub const HWPT_DATA_NONE: u32 = 0;
/// [`HwptAlloc::data_type`]: [`HwptVtdS1`].
pub const HWPT_DATA_VTD_S1: u32 = 1;
/// [`HwptAlloc::data_type`]: [`HwptArmSmmuv3`].
pub const HWPT_DATA_ARM_SMMUV3: u32 = 2;
/// [`HwptAlloc::data_type`]: [`HwptAmdGuest`].
pub const HWPT_DATA_AMD_GUEST: u32 = 3;

/// [`GetHwInfo::data_type`]: no data (out), or whatever the IOMMU has by default (in).
pub const HW_INFO_TYPE_NONE: u32 = 0;
/// [`GetHwInfo::data_type`]: [`HwInfoVtd`].
pub const HW_INFO_TYPE_INTEL_VTD: u32 = 1;
/// [`GetHwInfo::data_type`]: [`HwInfoArmSmmuv3`].
pub const HW_INFO_TYPE_ARM_SMMUV3: u32 = 2;
/// [`GetHwInfo::data_type`]: [`HwInfoTegra241Cmdqv`].
pub const HW_INFO_TYPE_TEGRA241_CMDQV: u32 = 3;
/// [`GetHwInfo::data_type`]: [`HwInfoAmd`].
pub const HW_INFO_TYPE_AMD: u32 = 4;

/// [`HwptInvalidate::data_type`]: [`HwptVtdS1Invalidate`].
pub const HWPT_INVALIDATE_DATA_VTD_S1: u32 = 0;
/// [`HwptInvalidate::data_type`]: [`ViommuArmSmmuv3Invalidate`], on a virtual IOMMU.
pub const VIOMMU_INVALIDATE_DATA_ARM_SMMUV3: u32 = 1;

/// [`HwptPageResponse::code`]: the pages are there, the device may try again.
pub const PAGE_RESPONSE_SUCCESS: u32 = 0;
/// [`HwptPageResponse::code`]: the access is refused for good.
pub const PAGE_RESPONSE_INVALID: u32 = 1;
