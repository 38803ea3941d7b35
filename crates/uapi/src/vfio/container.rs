//! Type 1 commands of a container file: an I/O address space without a number, which an iommufd answers too.
//!
//! GET_API_VERSION, CHECK_EXTENSION and SET_IOMMU take a plain number. The others point to one of the structures here,
//! whose `argsz` is checked against the least size and otherwise only says how much room there is for an answer.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::InfoCapHeader;
use crate::command;

/// IOMMU_GET_INFO: page sizes, and a chain of capabilities behind the structure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Type1Info {
    /// In: room in bytes. Out: bytes that the structure and all capabilities need.
    pub argsz: u32,
    /// Out: [`Type1InfoFlags`].
    pub flags: u32,
    /// Out: page sizes in bytes, one bit for each. The first version of the command ended here.
    pub iova_pgsizes: u64,
    /// Out: where the first capability is, in bytes from the start of this structure; 0 if none, or if there is too
    /// little room for all of them.
    pub cap_offset: u32,
    /// Zero.
    pub pad: u32,
}

/// Capability [`TYPE1_INFO_CAP_IOVA_RANGE`]: where mappings are possible. [`Type1IovaRange`]s follow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Type1InfoCapIovaRange {
    /// Header.
    pub header: InfoCapHeader,
    /// Number of [`Type1IovaRange`] that follow.
    pub nr_iovas: u32,
    /// Zero.
    pub reserved: u32,
}

/// One range of [`Type1InfoCapIovaRange`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Type1IovaRange {
    /// First IOVA.
    pub start: u64,
    /// Last IOVA, inclusive.
    pub end: u64,
}

/// Capability [`TYPE1_INFO_DMA_AVAIL`]: how many more mappings are possible.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Type1InfoDmaAvail {
    /// Header.
    pub header: InfoCapHeader,
    /// Mappings.
    pub avail: u32,
}

/// IOMMU_MAP_DMA: maps memory of the calling process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Type1DmaMap {
    /// Size of this structure in bytes.
    pub argsz: u32,
    /// [`Type1DmaMapFlags`].
    pub flags: u32,
    /// Client address of the memory.
    pub vaddr: u64,
    /// Where to map.
    pub iova: u64,
    /// Bytes to map.
    pub size: u64,
}

/// IOMMU_UNMAP_DMA: removes mappings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Type1DmaUnmap {
    /// Size of this structure in bytes.
    pub argsz: u32,
    /// [`Type1DmaUnmapFlags`].
    pub flags: u32,
    /// First IOVA; 0 with [`Type1DmaUnmapFlags::ALL`].
    pub iova: u64,
    /// In: bytes; 0 with [`Type1DmaUnmapFlags::ALL`]. Out: bytes that were unmapped.
    pub size: u64,
}

command!(Type1Info, "VFIO_IOMMU_GET_INFO", 0x70, through iova_pgsizes);
command!(Type1DmaMap, "VFIO_IOMMU_MAP_DMA", 0x71, through size);
command!(Type1DmaUnmap, "VFIO_IOMMU_UNMAP_DMA", 0x72, through size);

bitflags::bitflags! {
    /// [`Type1Info::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Type1InfoFlags: u32 {
        /// `iova_pgsizes` is there.
        const PGSIZES = 1;
        /// There are capabilities.
        const CAPS = 2;
    }

    /// [`Type1DmaMap::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Type1DmaMapFlags: u32 {
        /// Devices may read the memory.
        const READ = 1;
        /// Devices may write the memory.
        const WRITE = 2;
        /// Only another address of memory that is mapped.
        const VADDR = 4;
    }

    /// [`Type1DmaUnmap::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Type1DmaUnmapFlags: u32 {
        /// Also read what was written there.
        const GET_DIRTY_BITMAP = 1;
        /// Everything.
        const ALL = 2;
        /// Only forget the address.
        const VADDR = 4;
    }
}

/// Capability id of [`Type1InfoCapIovaRange`].
pub const TYPE1_INFO_CAP_IOVA_RANGE: u16 = 1;
/// Capability id of [`Type1InfoDmaAvail`].
pub const TYPE1_INFO_DMA_AVAIL: u16 = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Command;
    use crate::vfio::CONTAINER_COMMANDS;

    #[test]
    fn structures_and_table_agree() {
        for info in [Type1Info::INFO, Type1DmaMap::INFO, Type1DmaUnmap::INFO] {
            assert!(CONTAINER_COMMANDS.contains(&(info.number, info.name)), "{info:?}");
        }
    }

    #[test]
    fn least_and_full_sizes() {
        assert_eq!((Type1Info::MIN_SIZE, Type1Info::SIZE), (16, 24));
        assert_eq!((Type1DmaMap::MIN_SIZE, Type1DmaMap::SIZE), (32, 32));
        assert_eq!((Type1DmaUnmap::MIN_SIZE, Type1DmaUnmap::SIZE), (24, 24));
        assert_eq!(size_of::<Type1InfoDmaAvail>(), 12);
    }
}
