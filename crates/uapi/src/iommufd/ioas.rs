//! I/O address spaces: making them, mapping and unmapping memory, and what concerns the whole file (DESTROY, options,
//! which space VFIO's old interface means).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::command;

/// DESTROY: ends an object of any kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Destroy {
    /// Size of this structure in bytes.
    pub size: u32,
    /// The object. ENOENT if there is none, EBUSY while another object uses it.
    pub id: u32,
}

/// IOAS_ALLOC: makes an empty I/O address space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasAlloc {
    /// Size of this structure in bytes.
    pub size: u32,
    /// No flag is defined: zero.
    pub flags: u32,
    /// Out: the id of the new space.
    pub out_ioas_id: u32,
}

/// A range of IOVAs in an array that a command points to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IovaRange {
    /// First IOVA.
    pub start: u64,
    /// Last IOVA, inclusive.
    pub last: u64,
}

/// IOAS_IOVA_RANGES: which IOVAs may be mapped, that is all that no attached device reserves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasIovaRanges {
    /// Size of this structure in bytes.
    pub size: u32,
    /// The space.
    pub ioas_id: u32,
    /// In: entries that the array has room for. Out: entries that there are. EMSGSIZE if more than room.
    pub num_iovas: u32,
    /// Zero.
    pub reserved: u32,
    /// Client address of an array of [`IovaRange`], filled in ascending order.
    pub allowed_iovas: u64,
    /// Out: what IOVAs and lengths of mappings have to be multiples of, in bytes.
    pub out_iova_alignment: u64,
}

/// IOAS_ALLOW_IOVAS: where automatic allocation may place mappings, and which IOVAs no device may reserve later.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasAllowIovas {
    /// Size of this structure in bytes.
    pub size: u32,
    /// The space.
    pub ioas_id: u32,
    /// Entries of the array. Zero lifts the restriction.
    pub num_iovas: u32,
    /// Zero.
    pub reserved: u32,
    /// Client address of an array of [`IovaRange`], none of which may overlap another.
    pub allowed_iovas: u64,
}

/// IOAS_MAP: maps memory of the calling process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasMap {
    /// Size of this structure in bytes.
    pub size: u32,
    /// [`IoasMapFlags`].
    pub flags: u32,
    /// The space.
    pub ioas_id: u32,
    /// Zero.
    pub reserved: u32,
    /// Client address of the memory.
    pub user_va: u64,
    /// Bytes to map.
    pub length: u64,
    /// In, with FIXED_IOVA: where to map. Out: where it has been mapped.
    pub iova: u64,
}

/// IOAS_MAP_FILE: maps a range of a file (a memfd, a dma-buf), whoever has it mapped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasMapFile {
    /// Size of this structure in bytes.
    pub size: u32,
    /// [`IoasMapFlags`].
    pub flags: u32,
    /// The space.
    pub ioas_id: u32,
    /// The file, as a descriptor of the caller.
    pub fd: i32,
    /// Offset in the file in bytes.
    pub start: u64,
    /// Bytes to map.
    pub length: u64,
    /// In, with FIXED_IOVA: where to map. Out: where it has been mapped.
    pub iova: u64,
}

/// IOAS_COPY: maps the memory under a range of one space in another (or the same) space too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasCopy {
    /// Size of this structure in bytes.
    pub size: u32,
    /// [`IoasMapFlags`].
    pub flags: u32,
    /// The space in which the memory is mapped anew.
    pub dst_ioas_id: u32,
    /// The space in which it is mapped already.
    pub src_ioas_id: u32,
    /// Bytes to map.
    pub length: u64,
    /// In, with FIXED_IOVA: where to map. Out: where it has been mapped.
    pub dst_iova: u64,
    /// Where the memory is mapped in the source.
    pub src_iova: u64,
}

/// IOAS_UNMAP: removes whole mappings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasUnmap {
    /// Size of this structure in bytes.
    pub size: u32,
    /// The space.
    pub ioas_id: u32,
    /// First IOVA.
    pub iova: u64,
    /// In: bytes; `u64::MAX` together with IOVA 0 means everything. Out: bytes that were unmapped.
    pub length: u64,
}

/// IOAS_CHANGE_PROCESS: from now on the calling process is charged for the file mappings of this open file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasChangeProcess {
    /// Size of this structure in bytes.
    pub size: u32,
    /// Zero.
    pub reserved: u32,
}

/// IOAS_NOIOMMU_GET_PA: the physical address under an IOVA, for devices that run without an IOMMU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoasNoiommuGetPa {
    /// Size of this structure in bytes.
    pub size: u32,
    /// No flag is defined: zero.
    pub flags: u32,
    /// The space.
    pub ioas_id: u32,
    /// Zero.
    pub reserved: u32,
    /// The IOVA.
    pub iova: u64,
    /// In: bytes of interest. Out: bytes that are contiguous in physical memory from there.
    pub length: u64,
    /// Out: the physical address.
    pub out_phys: u64,
}

/// OPTION: reads or sets a value of the file or of one object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetOption {
    /// Size of this structure in bytes.
    pub size: u32,
    /// Which option: [`OPTION_RLIMIT_MODE`] or [`OPTION_HUGE_PAGES`]; others EOPNOTSUPP.
    pub option_id: u32,
    /// [`OPTION_OP_SET`] or [`OPTION_OP_GET`].
    pub op: u16,
    /// Zero.
    pub reserved: u16,
    /// The object that the option belongs to; zero for an option of the file.
    pub object_id: u32,
    /// In (set) or out (get): the value.
    pub val64: u64,
}

/// VFIO_IOAS: which space the VFIO container commands on this file act on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VfioIoas {
    /// Size of this structure in bytes.
    pub size: u32,
    /// In (set) or out (get): the space.
    pub ioas_id: u32,
    /// [`VFIO_IOAS_GET`], [`VFIO_IOAS_SET`] or [`VFIO_IOAS_CLEAR`].
    pub op: u16,
    /// Zero.
    pub reserved: u16,
}

command!(Destroy, "IOMMU_DESTROY", 0x80, through id);
command!(IoasAlloc, "IOMMU_IOAS_ALLOC", 0x81, through out_ioas_id);
command!(IoasAllowIovas, "IOMMU_IOAS_ALLOW_IOVAS", 0x82, through allowed_iovas);
command!(IoasCopy, "IOMMU_IOAS_COPY", 0x83, through src_iova);
command!(IoasIovaRanges, "IOMMU_IOAS_IOVA_RANGES", 0x84, through out_iova_alignment);
command!(IoasMap, "IOMMU_IOAS_MAP", 0x85, through iova);
command!(IoasUnmap, "IOMMU_IOAS_UNMAP", 0x86, through length);
command!(SetOption, "IOMMU_OPTION", 0x87, through val64);
command!(VfioIoas, "IOMMU_VFIO_IOAS", 0x88, through reserved);
command!(IoasMapFile, "IOMMU_IOAS_MAP_FILE", 0x8f, through iova);
command!(IoasChangeProcess, "IOMMU_IOAS_CHANGE_PROCESS", 0x92, through reserved);
command!(IoasNoiommuGetPa, "IOMMU_IOAS_NOIOMMU_GET_PA", 0x95, through out_phys);

bitflags::bitflags! {
    /// Flags of IOAS_MAP, IOAS_MAP_FILE and IOAS_COPY.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct IoasMapFlags: u32 {
        /// Map at the IOVA that the caller gives. Otherwise one is chosen.
        const FIXED_IOVA = 1;
        /// Devices may write the memory.
        const WRITEABLE = 2;
        /// Devices may read the memory.
        const READABLE = 4;
    }
}

/// [`SetOption::option_id`]: pinned memory is charged to the user (0, the default) or to the process (1). Object 0.
pub const OPTION_RLIMIT_MODE: u32 = 0;
/// [`SetOption::option_id`]: pages may be combined to larger ones in the page tables (1, the default) or not (0). The
/// object is a space.
pub const OPTION_HUGE_PAGES: u32 = 1;

/// [`SetOption::op`]: set the option to `val64`.
pub const OPTION_OP_SET: u16 = 0;
/// [`SetOption::op`]: return the option in `val64`.
pub const OPTION_OP_GET: u16 = 1;

/// [`VfioIoas::op`]: return the space in `ioas_id`; ENODEV if there is none.
pub const VFIO_IOAS_GET: u16 = 0;
/// [`VfioIoas::op`]: from now on it is the space `ioas_id`.
pub const VFIO_IOAS_SET: u16 = 1;
/// [`VfioIoas::op`]: from now on there is none.
pub const VFIO_IOAS_CLEAR: u16 = 2;
