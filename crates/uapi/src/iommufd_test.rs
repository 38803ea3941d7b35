//! The ioctl of iommufd's own self-test, number 0xa0 of `/dev/iommu`, present in kernels that are built for it.
//!
//! The kernel's test program drives everything that needs a device through this one command: it makes mock devices,
//! lets an imagined in-kernel user pin and access pages, injects reserved ranges and memory limits, and asks how many
//! times pages are pinned. The argument ([`TestCommand`]) is a header, an operation with the [id](TestCommand::id) it
//! acts on, and 48 bytes that each operation reads in its own way. Each such reading is a structure here, which names
//! its operation through [`Operation`]; [`TestCommand::payload`] and [`TestCommand::set_payload`] convert.
//!
//! The layouts come from the kernel's `drivers/iommu/iommufd/iommufd_test.h`, which is not a stable interface: it is
//! compared with the version whose self-test is run.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::command;

/// Bytes that each operation reads in its own way.
pub const PAYLOAD_SIZE: usize = 48;

/// TEST_CMD: header and payload of every test operation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TestCommand {
    /// Size of this structure in bytes.
    pub size: u32,
    /// Which operation, one of the `OP_` numbers; others EOPNOTSUPP.
    pub op: u32,
    /// The object that the operation acts on; what kind of object depends on the operation.
    pub id: u32,
    /// Zero.
    pub reserved: u32,
    /// What [`payload`](Self::payload) reads.
    pub payload: [u64; PAYLOAD_SIZE / 8],
    /// Marks the end; the least size reaches through it.
    pub last: u32,
    /// The compiler's padding at the end.
    pub padding: u32,
}

command!(TestCommand, "IOMMU_TEST_CMD", 0xa0, through last);

/// How one operation reads the payload of a [`TestCommand`].
pub trait Operation: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {
    /// The operation's number in [`TestCommand::op`].
    const OP: u32;
    /// Proof that the reading fits into the payload.
    const FITS: () = assert!(size_of::<Self>() <= PAYLOAD_SIZE);
}

impl TestCommand {
    /// The payload as operation `T` reads it. Whether `op` is that operation is for the caller to know.
    pub fn payload<T: Operation>(&self) -> T {
        let () = T::FITS;
        let mut value = T::new_zeroed();
        let length = size_of::<T>();
        value.as_mut_bytes().copy_from_slice(&self.payload.as_bytes()[..length]);
        value
    }

    /// Replaces the beginning of the payload by `value`; the rest stays.
    pub fn set_payload<T: Operation>(&mut self, value: &T) {
        let () = T::FITS;
        let length = size_of::<T>();
        self.payload.as_mut_bytes()[..length].copy_from_slice(value.as_bytes());
    }
}

/// The operations: number, and the structure that reads the payload.
macro_rules! operations {
    ($($constant:ident = $number:literal, $structure:ident;)*) => {
        $(
            #[doc = concat!("[`TestCommand::op`]: see [`", stringify!($structure), "`].")]
            pub const $constant: u32 = $number;
            impl Operation for $structure {
                const OP: u32 = $number;
            }
        )*
        /// Number and name of every operation, in the order of the numbers.
        pub const OPERATIONS: &[(u32, &str)] = &[$(($number, stringify!($constant)),)*];
    };
}

operations! {
    OP_ADD_RESERVED = 1, AddReserved;
    OP_MOCK_DOMAIN = 2, MockDomain;
    OP_MD_CHECK_MAP = 3, CheckMap;
    OP_MD_CHECK_REFS = 4, CheckRefs;
    OP_CREATE_ACCESS = 5, CreateAccess;
    OP_DESTROY_ACCESS_PAGES = 6, DestroyAccessPages;
    OP_ACCESS_PAGES = 7, AccessPages;
    OP_ACCESS_RW = 8, AccessRw;
    OP_SET_TEMP_MEMORY_LIMIT = 9, SetTempMemoryLimit;
    OP_MOCK_DOMAIN_REPLACE = 10, MockDomainReplace;
    OP_ACCESS_REPLACE_IOAS = 11, AccessReplaceIoas;
    OP_MOCK_DOMAIN_FLAGS = 12, MockDomainFlags;
    OP_DIRTY = 13, Dirty;
    OP_MD_CHECK_IOTLB = 14, CheckIotlb;
    OP_TRIGGER_IOPF = 15, TriggerIopf;
    OP_DEV_CHECK_CACHE = 16, CheckDevCache;
    OP_TRIGGER_VEVENT = 17, TriggerVevent;
    OP_PASID_ATTACH = 18, PasidAttach;
    OP_PASID_REPLACE = 19, PasidReplace;
    OP_PASID_DETACH = 20, PasidDetach;
    OP_PASID_CHECK_HWPT = 21, PasidCheckHwpt;
    OP_DMABUF_GET = 22, DmabufGet;
    OP_DMABUF_REVOKE = 23, DmabufRevoke;
}

/// Reserves a range in the space `id`, as a device's reserved regions would.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AddReserved {
    /// First IOVA.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// Makes a mock device and attaches it to the space or page table `id`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MockDomain {
    /// Out: the object that stands for the test's device; destroying it detaches and ends the device.
    pub out_stdev_id: u32,
    /// Out: the page table that it is attached to.
    pub out_hwpt_id: u32,
    /// Out: the bound device, as VFIO's BIND would return it.
    pub out_idev_id: u32,
}

/// Checks that the pages under a range of page table `id` are the pages under a range of the caller's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CheckMap {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Client address.
    pub uptr: u64,
}

/// Checks that each page of a range of the caller's memory is pinned exactly `refs` times, else EIO. No id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CheckRefs {
    /// Bytes.
    pub length: u64,
    /// Client address.
    pub uptr: u64,
    /// Expected pins of each page.
    pub refs: u32,
    /// The compiler's padding.
    pub padding: u32,
}

/// Makes a user of space `id` that pins and accesses pages by software, as a mediated device would.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CreateAccess {
    /// Out: a file, as a descriptor of the caller. "Access" in the other operations means this number.
    pub out_access_fd: u32,
    /// [`CreateAccessFlags`].
    pub flags: u32,
}

/// Unpins pages of the access `id`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DestroyAccessPages {
    /// What [`AccessPages`] returned.
    pub access_pages_id: u32,
}

/// Pins a range through the access `id` and checks that it is the caller's memory at `uptr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AccessPages {
    /// [`AccessPagesFlags`].
    pub flags: u32,
    /// Out: names this pin.
    pub out_access_pages_id: u32,
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Client address.
    pub uptr: u64,
}

/// Copies through the access `id`, between a range and the caller's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AccessRw {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Client address.
    pub uptr: u64,
    /// [`AccessRwFlags`].
    pub flags: u32,
    /// The compiler's padding.
    pub padding: u32,
}

/// Limits how much memory one step of an operation may use for its own book-keeping. No id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetTempMemoryLimit {
    /// Bytes; below 12 EINVAL.
    pub limit: u32,
}

/// Attaches the test device `id` to another space or page table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MockDomainReplace {
    /// The space or page table.
    pub pt_id: u32,
}

/// Moves the access `id` to another space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AccessReplaceIoas {
    /// The space.
    pub ioas_id: u32,
}

/// As [`MockDomain`], with a choice of what the device can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MockDomainFlags {
    /// Out: the object that stands for the test's device.
    pub out_stdev_id: u32,
    /// Out: the page table that it is attached to.
    pub out_hwpt_id: u32,
    /// Out: the bound device.
    pub out_idev_id: u32,
    /// [`MockDeviceFlags`].
    pub dev_flags: u32,
}

/// Marks pages of page table `id` as written by a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Dirty {
    /// No flag is defined: zero.
    pub flags: u32,
    /// The compiler's padding.
    pub padding: u32,
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes that one bit of the bitmap stands for.
    pub page_size: u64,
    /// Client address of the bitmap of pages to mark.
    pub uptr: u64,
    /// Out: pages that were marked.
    pub out_nr_dirty: u64,
}

/// Checks an entry of the pretended IOTLB of nested page table `id`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CheckIotlb {
    /// Entry, 0 to [`MOCK_NESTED_DOMAIN_IOTLB_ID_MAX`]; the header's `id`.
    pub id: u32,
    /// Expected value.
    pub iotlb: u32,
}

/// Lets a device report a page fault. No id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TriggerIopf {
    /// The bound device.
    pub dev_id: u32,
    /// The PASID that faults.
    pub pasid: u32,
    /// Page request group.
    pub grpid: u32,
    /// Permissions asked for.
    pub perm: u32,
    /// The address that faults.
    pub addr: u64,
}

/// Checks an entry of the pretended cache of the bound device `id`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CheckDevCache {
    /// Entry, 0 to [`MOCK_DEV_CACHE_ID_MAX`].
    pub id: u32,
    /// Expected value.
    pub cache: u32,
}

/// Lets a virtual device report an event. No id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TriggerVevent {
    /// The bound device.
    pub dev_id: u32,
}

/// Attaches a PASID of the test device `id`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PasidAttach {
    /// The PASID.
    pub pasid: u32,
    /// The space or page table.
    pub pt_id: u32,
}

/// Attaches a PASID of the test device `id` to another table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PasidReplace {
    /// The PASID.
    pub pasid: u32,
    /// The space or page table.
    pub pt_id: u32,
}

/// Detaches a PASID of the test device `id`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PasidDetach {
    /// The PASID.
    pub pasid: u32,
}

/// Checks which page table a PASID of the test device `id` is attached to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PasidCheckHwpt {
    /// The PASID.
    pub pasid: u32,
    /// Expected page table; 0 for none.
    pub hwpt_id: u32,
}

/// Makes a dma-buf; its descriptor is the ioctl's result. No id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmabufGet {
    /// Bytes.
    pub length: u32,
    /// Flags of the open file, such as O_CLOEXEC.
    pub open_flags: u32,
}

/// Takes the memory of a dma-buf away, or gives it back. No id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmabufRevoke {
    /// The dma-buf, as a descriptor of the caller.
    pub dmabuf_fd: i32,
    /// 1 to take it away, 0 to give it back.
    pub revoked: u32,
}

bitflags::bitflags! {
    /// [`CreateAccess::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct CreateAccessFlags: u32 {
        /// The access will pin pages, not only copy.
        const NEEDS_PIN_PAGES = 1;
    }

    /// [`AccessPages::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct AccessPagesFlags: u32 {
        /// The pages will be written.
        const WRITE = 1;
        /// The caller is a fuzzer: do not check that the pages are those at `uptr`.
        const FUZZER = 1 << 16;
    }

    /// [`AccessRw::flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct AccessRwFlags: u32 {
        /// Copy from the caller's memory to the IOVA, not from the IOVA.
        const WRITE = 1;
        /// Take the way that pins page by page.
        const SLOW_PATH = 4;
    }

    /// [`MockDomainFlags::dev_flags`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct MockDeviceFlags: u32 {
        /// The device's IOMMU cannot record writes.
        const NO_DIRTY = 1;
        /// The device has PASIDs.
        const PASID = 4;
    }
}

/// First IOVA that the mock IOMMU's default page table translates.
pub const MOCK_APERTURE_START: u64 = 1 << 24;
/// Last IOVA that it translates.
pub const MOCK_APERTURE_LAST: u64 = (1 << 31) - 1;
/// Its smallest page in bytes.
pub const MOCK_PAGE_SIZE: u64 = 2048;
/// Its large page in bytes.
pub const MOCK_HUGE_PAGE_SIZE: u64 = 1 << 20;
/// Width of the mock device's PASIDs in bits.
pub const MOCK_PASID_WIDTH: u32 = 20;
/// A PASID that the kernel's test keeps for a special case.
pub const PASID_RESERVED: u32 = 1024;
/// Largest entry of the pretended IOTLB.
pub const MOCK_NESTED_DOMAIN_IOTLB_ID_MAX: u32 = 3;
/// Largest entry of the pretended device cache.
pub const MOCK_DEV_CACHE_ID_MAX: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_read_where_they_were_written() {
        let mut command = TestCommand { op: CheckRefs::OP, ..TestCommand::default() };
        command.set_payload(&CheckRefs { length: 0x1000, uptr: 0x7f00_0000_0000, refs: 3, padding: 0 });
        assert_eq!(command.payload[..2], [0x1000, 0x7f00_0000_0000]);
        assert_eq!(command.payload::<CheckRefs>().refs, 3);
        command.set_payload(&Dirty { out_nr_dirty: 9, ..Dirty::default() });
        assert_eq!(command.payload[5], 9, "the longest operation fills the payload");
    }

    #[test]
    fn operations_are_numbered_without_gaps() {
        assert!(OPERATIONS.iter().map(|(number, _)| *number).eq(1..=23));
    }
}
