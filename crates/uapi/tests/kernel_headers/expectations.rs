//! What this crate says, each value beside the C expression that has to have it.
//!
//! The macros make omissions hard: a structure is taken apart by a pattern without `..`, so a field that is not listed
//! does not compile, and the flags listed of a type have to be all that the type has.

use ioasid_uapi::{Command, iommufd, iommufd_test, pci, vfio};

/// One value: a C expression, and what Rust has for it.
pub(crate) struct Expectation {
    pub(crate) expression: String,
    pub(crate) value: u64,
    /// Width in which the two are compared.
    pub(crate) bits: u32,
}

/// The list as it grows.
#[derive(Default)]
struct List(Vec<Expectation>);

impl List {
    fn size_or_offset(&mut self, expression: String, value: usize) {
        self.0.push(Expectation { expression, value: value as u64, bits: 64 });
    }

    fn value<T: Into<u64>>(&mut self, expression: &str, value: T) {
        let bits = 8 * size_of::<T>() as u32;
        self.0.push(Expectation { expression: expression.to_owned(), value: value.into(), bits });
    }
}

fn field_size<Structure, Field>(_select: fn(&Structure) -> &Field) -> usize {
    size_of::<Field>()
}

/// A structure: the C type, then the fields (with the C name where it is another), then fields that are the compiler's
/// padding in C.
macro_rules! structure {
    ($list:ident, $c:literal, $structure:path { $($field:ident $(as $name:literal)?),* $(; padding $($padding:ident),*)? }) => {{
        type Structure = $structure;
        let _ = |structure: Structure| {
            let $structure { $($field: _,)* $($($padding: _,)*)? } = structure;
        };
        $list.size_or_offset(concat!("sizeof(", $c, ")").to_owned(), size_of::<Structure>());
        $({
            let name = [$($name,)? stringify!($field)][0];
            $list.size_or_offset(
                format!("offsetof({}, {name})", $c),
                core::mem::offset_of!(Structure, $field),
            );
            $list.size_or_offset(
                format!("sizeof((({} *)0)->{name})", $c),
                field_size(|structure: &Structure| &structure.$field),
            );
        })*
    }};
}

/// One operation of the self-test: the member of the union, then as in `structure`. The offsets are counted from the
/// start of the command.
macro_rules! operation {
    ($list:ident, $number:literal, $member:literal, $structure:path { $($field:ident),* $(; padding $($padding:ident),*)? }) => {{
        type Structure = $structure;
        let _ = |structure: Structure| {
            let $structure { $($field: _,)* $($($padding: _,)*)? } = structure;
        };
        let payload = core::mem::offset_of!(iommufd_test::TestCommand, payload);
        $list.value($number, <Structure as iommufd_test::Operation>::OP);
        $list.size_or_offset(
            concat!("sizeof(((struct iommu_test_cmd *)0)->", $member, ")").to_owned(),
            size_of::<Structure>(),
        );
        $({
            let name = concat!($member, ".", stringify!($field));
            $list.size_or_offset(
                format!("offsetof(struct iommu_test_cmd, {name})"),
                payload + core::mem::offset_of!(Structure, $field),
            );
            $list.size_or_offset(
                format!("sizeof(((struct iommu_test_cmd *)0)->{name})"),
                field_size(|structure: &Structure| &structure.$field),
            );
        })*
    }};
}

/// All flags of one type.
macro_rules! flags {
    ($list:ident, $flags:path { $($flag:ident = $name:literal),* $(,)? }) => {{
        type Flags = $flags;
        $($list.value($name, Flags::$flag.bits());)*
        let listed = [$(Flags::$flag),*].into_iter().fold(Flags::empty(), |all, flag| all | flag);
        assert!(listed == Flags::all(), "not all of {} are listed", stringify!($flags));
    }};
}

/// Constants of one module.
macro_rules! values {
    ($list:ident, $module:ident { $($constant:ident = $name:literal),* $(,)? }) => {
        $($list.value($name, $module::$constant);)*
    };
}

/// Everything.
pub(crate) fn all() -> Vec<Expectation> {
    let mut list = List::default();
    iommufd_commands(&mut list);
    iommufd_data(&mut list);
    iommufd_values(&mut list);
    self_test(&mut list);
    vfio_structures(&mut list);
    vfio_values(&mut list);
    configuration_space(&mut list);
    list.0
}

fn iommufd_commands(list: &mut List) {
    for command in iommufd::COMMANDS {
        list.value(command.name, command.number);
    }
    structure!(list, "struct iommu_destroy", iommufd::Destroy { size, id });
    structure!(list, "struct iommu_ioas_alloc", iommufd::IoasAlloc { size, flags, out_ioas_id });
    structure!(list, "struct iommu_ioas_iova_ranges", iommufd::IoasIovaRanges {
        size, ioas_id, num_iovas, reserved as "__reserved", allowed_iovas, out_iova_alignment
    });
    structure!(list, "struct iommu_ioas_allow_iovas", iommufd::IoasAllowIovas {
        size, ioas_id, num_iovas, reserved as "__reserved", allowed_iovas
    });
    structure!(list, "struct iommu_ioas_map", iommufd::IoasMap {
        size, flags, ioas_id, reserved as "__reserved", user_va, length, iova
    });
    structure!(
        list,
        "struct iommu_ioas_map_file",
        iommufd::IoasMapFile { size, flags, ioas_id, fd, start, length, iova }
    );
    structure!(
        list,
        "struct iommu_ioas_copy",
        iommufd::IoasCopy { size, flags, dst_ioas_id, src_ioas_id, length, dst_iova, src_iova }
    );
    structure!(list, "struct iommu_ioas_unmap", iommufd::IoasUnmap { size, ioas_id, iova, length });
    structure!(list, "struct iommu_ioas_change_process", iommufd::IoasChangeProcess {
        size, reserved as "__reserved"
    });
    structure!(list, "struct iommu_ioas_noiommu_get_pa", iommufd::IoasNoiommuGetPa {
        size, flags, ioas_id, reserved as "__reserved", iova, length, out_phys
    });
    structure!(list, "struct iommu_option", iommufd::SetOption {
        size, option_id, op, reserved as "__reserved", object_id, val64
    });
    structure!(list, "struct iommu_vfio_ioas", iommufd::VfioIoas {
        size, ioas_id, op, reserved as "__reserved"
    });
    structure!(list, "struct iommu_hwpt_alloc", iommufd::HwptAlloc {
        size, flags, dev_id, pt_id, out_hwpt_id, reserved as "__reserved", data_type, data_len, data_uptr,
        fault_id, reserved2 as "__reserved2"
    });
    structure!(list, "struct iommu_hw_info", iommufd::GetHwInfo {
        size, flags, dev_id, data_len, data_uptr, data_type as "out_data_type", out_max_pasid_log2,
        reserved as "__reserved", out_capabilities
    });
    list.size_or_offset(
        "offsetof(struct iommu_hw_info, in_data_type)".to_owned(),
        core::mem::offset_of!(iommufd::GetHwInfo, data_type),
    );
    structure!(list, "struct iommu_hwpt_set_dirty_tracking", iommufd::HwptSetDirtyTracking {
        size, flags, hwpt_id, reserved as "__reserved"
    });
    structure!(list, "struct iommu_hwpt_get_dirty_bitmap", iommufd::HwptGetDirtyBitmap {
        size, hwpt_id, flags, reserved as "__reserved", iova, length, page_size, data
    });
    structure!(list, "struct iommu_hwpt_invalidate", iommufd::HwptInvalidate {
        size, hwpt_id, data_uptr, data_type, entry_len, entry_num, reserved as "__reserved"
    });
    structure!(
        list,
        "struct iommu_fault_alloc",
        iommufd::FaultQueueAlloc { size, flags, out_fault_id, out_fault_fd }
    );
    structure!(list, "struct iommu_viommu_alloc", iommufd::ViommuAlloc {
        size, flags, viommu_type as "type", dev_id, hwpt_id, out_viommu_id, data_len,
        reserved as "__reserved", data_uptr
    });
    structure!(
        list,
        "struct iommu_vdevice_alloc",
        iommufd::VdeviceAlloc { size, viommu_id, dev_id, out_vdevice_id, virt_id }
    );
    structure!(list, "struct iommu_veventq_alloc", iommufd::VeventqAlloc {
        size, flags, viommu_id, event_type as "type", veventq_depth, out_veventq_id, out_veventq_fd,
        reserved as "__reserved"
    });
    structure!(list, "struct iommu_hw_queue_alloc", iommufd::HwQueueAlloc {
        size, flags, viommu_id, queue_type as "type", index, out_hw_queue_id, nesting_parent_iova, length
    });
}

/// Structures that commands point to, or that queues carry.
fn iommufd_data(list: &mut List) {
    structure!(list, "struct iommu_iova_range", iommufd::IovaRange { start, last });
    structure!(list, "struct iommu_hwpt_vtd_s1", iommufd::HwptVtdS1 {
        flags, pgtbl_addr, addr_width, reserved as "__reserved"
    });
    structure!(list, "struct iommu_hwpt_arm_smmuv3", iommufd::HwptArmSmmuv3 { ste });
    structure!(list, "struct iommu_hwpt_amd_guest", iommufd::HwptAmdGuest { dte });
    structure!(list, "struct iommu_hw_info_vtd", iommufd::HwInfoVtd {
        flags, reserved as "__reserved", cap_reg, ecap_reg
    });
    structure!(list, "struct iommu_hw_info_arm_smmuv3", iommufd::HwInfoArmSmmuv3 {
        flags, reserved as "__reserved", idr, iidr, aidr
    });
    structure!(list, "struct iommu_hw_info_tegra241_cmdqv", iommufd::HwInfoTegra241Cmdqv {
        flags, version, log2vcmdqs, log2vsids, reserved as "__reserved"
    });
    structure!(list, "struct iommu_hw_info_amd", iommufd::HwInfoAmd { efr, efr2 });
    structure!(list, "struct iommu_hwpt_vtd_s1_invalidate", iommufd::HwptVtdS1Invalidate {
        addr, npages, flags, reserved as "__reserved"
    });
    structure!(list, "struct iommu_viommu_arm_smmuv3_invalidate", iommufd::ViommuArmSmmuv3Invalidate { cmd });
    structure!(list, "struct iommu_hwpt_pgfault", iommufd::HwptPgfault {
        flags, dev_id, pasid, grpid, perm, reserved as "__reserved", addr, length, cookie
    });
    structure!(list, "struct iommu_hwpt_page_response", iommufd::HwptPageResponse { cookie, code });
    structure!(
        list,
        "struct iommu_viommu_tegra241_cmdqv",
        iommufd::ViommuTegra241Cmdqv { out_vintf_mmap_offset, out_vintf_mmap_length }
    );
    structure!(list, "struct iommufd_vevent_header", iommufd::VeventHeader { flags, sequence });
    structure!(list, "struct iommu_vevent_arm_smmuv3", iommufd::VeventArmSmmuv3 { evt });
    structure!(list, "struct iommu_vevent_tegra241_cmdqv", iommufd::VeventTegra241Cmdqv { lvcmdq_err_map });
}

fn iommufd_values(list: &mut List) {
    flags!(list, iommufd::IoasMapFlags {
        FIXED_IOVA = "IOMMU_IOAS_MAP_FIXED_IOVA",
        WRITEABLE = "IOMMU_IOAS_MAP_WRITEABLE",
        READABLE = "IOMMU_IOAS_MAP_READABLE",
    });
    flags!(list, iommufd::HwptAllocFlags {
        NEST_PARENT = "IOMMU_HWPT_ALLOC_NEST_PARENT",
        DIRTY_TRACKING = "IOMMU_HWPT_ALLOC_DIRTY_TRACKING",
        FAULT_ID_VALID = "IOMMU_HWPT_FAULT_ID_VALID",
        PASID = "IOMMU_HWPT_ALLOC_PASID",
    });
    flags!(list, iommufd::VtdS1Flags {
        SRE = "IOMMU_VTD_S1_SRE",
        EAFE = "IOMMU_VTD_S1_EAFE",
        WPE = "IOMMU_VTD_S1_WPE",
    });
    flags!(list, iommufd::HwInfoFlags { INPUT_TYPE = "IOMMU_HW_INFO_FLAG_INPUT_TYPE" });
    flags!(list, iommufd::HwCapabilities {
        DIRTY_TRACKING = "IOMMU_HW_CAP_DIRTY_TRACKING",
        PASID_EXECUTE = "IOMMU_HW_CAP_PCI_PASID_EXEC",
        PASID_PRIVILEGED = "IOMMU_HW_CAP_PCI_PASID_PRIV",
        ATS_NOT_SUPPORTED = "IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED",
    });
    flags!(list, iommufd::HwInfoVtdFlags { ERRATA_772415_SPR17 = "IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17" });
    flags!(list, iommufd::HwInfoArmSmmuv3Flags {
        ERRATA_REPEAT_TLBI_CFGI = "IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI",
    });
    flags!(list, iommufd::DirtyTrackingFlags { ENABLE = "IOMMU_HWPT_DIRTY_TRACKING_ENABLE" });
    flags!(list, iommufd::GetDirtyBitmapFlags { NO_CLEAR = "IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR" });
    flags!(list, iommufd::VtdInvalidateFlags { LEAF = "IOMMU_VTD_INV_FLAGS_LEAF" });
    flags!(list, iommufd::PageFaultFlags {
        PASID_VALID = "IOMMU_PGFAULT_FLAGS_PASID_VALID",
        LAST_PAGE = "IOMMU_PGFAULT_FLAGS_LAST_PAGE",
    });
    flags!(list, iommufd::PageFaultPermissions {
        READ = "IOMMU_PGFAULT_PERM_READ",
        WRITE = "IOMMU_PGFAULT_PERM_WRITE",
        EXECUTE = "IOMMU_PGFAULT_PERM_EXEC",
        PRIVILEGED = "IOMMU_PGFAULT_PERM_PRIV",
    });
    flags!(list, iommufd::VeventFlags { LOST_EVENTS = "IOMMU_VEVENTQ_FLAG_LOST_EVENTS" });
    values!(list, iommufd {
        OPTION_RLIMIT_MODE = "IOMMU_OPTION_RLIMIT_MODE",
        OPTION_HUGE_PAGES = "IOMMU_OPTION_HUGE_PAGES",
        OPTION_OP_SET = "IOMMU_OPTION_OP_SET",
        OPTION_OP_GET = "IOMMU_OPTION_OP_GET",
        VFIO_IOAS_GET = "IOMMU_VFIO_IOAS_GET",
        VFIO_IOAS_SET = "IOMMU_VFIO_IOAS_SET",
        VFIO_IOAS_CLEAR = "IOMMU_VFIO_IOAS_CLEAR",
        HWPT_DATA_NONE = "IOMMU_HWPT_DATA_NONE",
        HWPT_DATA_VTD_S1 = "IOMMU_HWPT_DATA_VTD_S1",
        HWPT_DATA_ARM_SMMUV3 = "IOMMU_HWPT_DATA_ARM_SMMUV3",
        HWPT_DATA_AMD_GUEST = "IOMMU_HWPT_DATA_AMD_GUEST",
        HW_INFO_TYPE_NONE = "IOMMU_HW_INFO_TYPE_NONE",
        HW_INFO_TYPE_INTEL_VTD = "IOMMU_HW_INFO_TYPE_INTEL_VTD",
        HW_INFO_TYPE_ARM_SMMUV3 = "IOMMU_HW_INFO_TYPE_ARM_SMMUV3",
        HW_INFO_TYPE_TEGRA241_CMDQV = "IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV",
        HW_INFO_TYPE_AMD = "IOMMU_HW_INFO_TYPE_AMD",
        HWPT_INVALIDATE_DATA_VTD_S1 = "IOMMU_HWPT_INVALIDATE_DATA_VTD_S1",
        VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = "IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3",
        PAGE_RESPONSE_SUCCESS = "IOMMUFD_PAGE_RESP_SUCCESS",
        PAGE_RESPONSE_INVALID = "IOMMUFD_PAGE_RESP_INVALID",
        VIOMMU_TYPE_DEFAULT = "IOMMU_VIOMMU_TYPE_DEFAULT",
        VIOMMU_TYPE_ARM_SMMUV3 = "IOMMU_VIOMMU_TYPE_ARM_SMMUV3",
        VIOMMU_TYPE_TEGRA241_CMDQV = "IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV",
        VEVENTQ_TYPE_DEFAULT = "IOMMU_VEVENTQ_TYPE_DEFAULT",
        VEVENTQ_TYPE_ARM_SMMUV3 = "IOMMU_VEVENTQ_TYPE_ARM_SMMUV3",
        VEVENTQ_TYPE_TEGRA241_CMDQV = "IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV",
        HW_QUEUE_TYPE_DEFAULT = "IOMMU_HW_QUEUE_TYPE_DEFAULT",
        HW_QUEUE_TYPE_TEGRA241_CMDQV = "IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV",
    });
}

fn self_test(list: &mut List) {
    use iommufd_test as test;
    structure!(list, "struct iommu_test_cmd", test::TestCommand {
        size, op, id, reserved as "__reserved", last; padding payload, padding
    });
    list.size_or_offset(
        "offsetof(struct iommu_test_cmd, add_reserved)".to_owned(),
        core::mem::offset_of!(test::TestCommand, payload),
    );
    list.size_or_offset(
        "offsetof(struct iommu_test_cmd, last) - offsetof(struct iommu_test_cmd, add_reserved)".to_owned(),
        test::PAYLOAD_SIZE,
    );
    for (number, name) in test::OPERATIONS {
        list.value(&format!("IOMMU_TEST_{name}"), *number);
    }
    operation!(list, "IOMMU_TEST_OP_ADD_RESERVED", "add_reserved", test::AddReserved { start, length });
    operation!(
        list,
        "IOMMU_TEST_OP_MOCK_DOMAIN",
        "mock_domain",
        test::MockDomain { out_stdev_id, out_hwpt_id, out_idev_id }
    );
    operation!(list, "IOMMU_TEST_OP_MD_CHECK_MAP", "check_map", test::CheckMap { iova, length, uptr });
    operation!(list, "IOMMU_TEST_OP_MD_CHECK_REFS", "check_refs", test::CheckRefs {
        length, uptr, refs; padding padding
    });
    operation!(
        list,
        "IOMMU_TEST_OP_CREATE_ACCESS",
        "create_access",
        test::CreateAccess { out_access_fd, flags }
    );
    operation!(
        list,
        "IOMMU_TEST_OP_DESTROY_ACCESS_PAGES",
        "destroy_access_pages",
        test::DestroyAccessPages { access_pages_id }
    );
    operation!(
        list,
        "IOMMU_TEST_OP_ACCESS_PAGES",
        "access_pages",
        test::AccessPages { flags, out_access_pages_id, iova, length, uptr }
    );
    operation!(list, "IOMMU_TEST_OP_ACCESS_RW", "access_rw", test::AccessRw {
        iova, length, uptr, flags; padding padding
    });
    operation!(
        list,
        "IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT",
        "memory_limit",
        test::SetTempMemoryLimit { limit }
    );
    operation!(
        list,
        "IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE",
        "mock_domain_replace",
        test::MockDomainReplace { pt_id }
    );
    operation!(
        list,
        "IOMMU_TEST_OP_ACCESS_REPLACE_IOAS",
        "access_replace_ioas",
        test::AccessReplaceIoas { ioas_id }
    );
    operation!(
        list,
        "IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS",
        "mock_domain_flags",
        test::MockDomainFlags { out_stdev_id, out_hwpt_id, out_idev_id, dev_flags }
    );
    operation!(list, "IOMMU_TEST_OP_DIRTY", "dirty", test::Dirty {
        flags, iova, length, page_size, uptr, out_nr_dirty; padding padding
    });
    operation!(list, "IOMMU_TEST_OP_MD_CHECK_IOTLB", "check_iotlb", test::CheckIotlb { id, iotlb });
    operation!(
        list,
        "IOMMU_TEST_OP_TRIGGER_IOPF",
        "trigger_iopf",
        test::TriggerIopf { dev_id, pasid, grpid, perm, addr }
    );
    operation!(list, "IOMMU_TEST_OP_DEV_CHECK_CACHE", "check_dev_cache", test::CheckDevCache { id, cache });
    operation!(list, "IOMMU_TEST_OP_TRIGGER_VEVENT", "trigger_vevent", test::TriggerVevent { dev_id });
    operation!(list, "IOMMU_TEST_OP_PASID_ATTACH", "pasid_attach", test::PasidAttach { pasid, pt_id });
    operation!(list, "IOMMU_TEST_OP_PASID_REPLACE", "pasid_replace", test::PasidReplace { pasid, pt_id });
    operation!(list, "IOMMU_TEST_OP_PASID_DETACH", "pasid_detach", test::PasidDetach { pasid });
    operation!(
        list,
        "IOMMU_TEST_OP_PASID_CHECK_HWPT",
        "pasid_check",
        test::PasidCheckHwpt { pasid, hwpt_id }
    );
    operation!(list, "IOMMU_TEST_OP_DMABUF_GET", "dmabuf_get", test::DmabufGet { length, open_flags });
    operation!(
        list,
        "IOMMU_TEST_OP_DMABUF_REVOKE",
        "dmabuf_revoke",
        test::DmabufRevoke { dmabuf_fd, revoked }
    );

    flags!(list, test::CreateAccessFlags { NEEDS_PIN_PAGES = "MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES" });
    flags!(list, test::AccessPagesFlags {
        WRITE = "MOCK_FLAGS_ACCESS_WRITE",
        FUZZER = "MOCK_FLAGS_ACCESS_SYZ",
    });
    flags!(list, test::AccessRwFlags {
        WRITE = "MOCK_ACCESS_RW_WRITE",
        SLOW_PATH = "MOCK_ACCESS_RW_SLOW_PATH",
    });
    flags!(list, test::MockDeviceFlags {
        NO_DIRTY = "MOCK_FLAGS_DEVICE_NO_DIRTY",
        PASID = "MOCK_FLAGS_DEVICE_PASID",
    });
    values!(list, test {
        MOCK_APERTURE_START = "MOCK_APERTURE_START",
        MOCK_APERTURE_LAST = "MOCK_APERTURE_LAST",
        MOCK_PAGE_SIZE = "MOCK_PAGE_SIZE",
        MOCK_HUGE_PAGE_SIZE = "MOCK_HUGE_PAGE_SIZE",
        MOCK_PASID_WIDTH = "MOCK_PASID_WIDTH",
        PASID_RESERVED = "IOMMU_TEST_PASID_RESERVED",
        MOCK_NESTED_DOMAIN_IOTLB_ID_MAX = "MOCK_NESTED_DOMAIN_IOTLB_ID_MAX",
        MOCK_DEV_CACHE_ID_MAX = "MOCK_DEV_CACHE_ID_MAX",
    });
}

fn vfio_structures(list: &mut List) {
    structure!(
        list,
        "struct vfio_device_bind_iommufd",
        vfio::DeviceBindIommufd { argsz, flags, iommufd, out_devid, token_uuid_ptr }
    );
    structure!(
        list,
        "struct vfio_device_attach_iommufd_pt",
        vfio::DeviceAttachIommufdPt { argsz, flags, pt_id, pasid }
    );
    structure!(
        list,
        "struct vfio_device_detach_iommufd_pt",
        vfio::DeviceDetachIommufdPt { argsz, flags, pasid }
    );
    structure!(
        list,
        "struct vfio_device_info",
        vfio::DeviceInfo { argsz, flags, num_regions, num_irqs, cap_offset, pad }
    );
    structure!(
        list,
        "struct vfio_region_info",
        vfio::RegionInfo { argsz, flags, index, cap_offset, size, offset }
    );
    structure!(list, "struct vfio_irq_info", vfio::IrqInfo { argsz, flags, index, count });
    structure!(list, "struct vfio_irq_set", vfio::IrqSet { argsz, flags, index, start, count });
    structure!(list, "struct vfio_device_feature", vfio::DeviceFeature { argsz, flags });
    structure!(list, "struct vfio_info_cap_header", vfio::InfoCapHeader { id, version, next });
    structure!(
        list,
        "struct vfio_region_info_cap_sparse_mmap",
        vfio::RegionInfoCapSparseMmap { header, nr_areas, reserved }
    );
    structure!(list, "struct vfio_region_sparse_mmap_area", vfio::RegionSparseMmapArea { offset, size });
    structure!(list, "struct vfio_region_info_cap_type", vfio::RegionInfoCapType {
        header, region_type as "type", subtype
    });
    structure!(
        list,
        "struct vfio_device_info_cap_pci_atomic_comp",
        vfio::DeviceInfoCapPciAtomicComp { header, flags, reserved }
    );
    structure!(
        list,
        "struct vfio_iommu_type1_info",
        vfio::Type1Info { argsz, flags, iova_pgsizes, cap_offset, pad }
    );
    structure!(
        list,
        "struct vfio_iommu_type1_info_cap_iova_range",
        vfio::Type1InfoCapIovaRange { header, nr_iovas, reserved }
    );
    structure!(list, "struct vfio_iova_range", vfio::Type1IovaRange { start, end });
    structure!(list, "struct vfio_iommu_type1_info_dma_avail", vfio::Type1InfoDmaAvail { header, avail });
    structure!(
        list,
        "struct vfio_iommu_type1_dma_map",
        vfio::Type1DmaMap { argsz, flags, vaddr, iova, size }
    );
    structure!(list, "struct vfio_iommu_type1_dma_unmap", vfio::Type1DmaUnmap { argsz, flags, iova, size });
}

fn vfio_values(list: &mut List) {
    for table in
        [vfio::DEVICE_COMMANDS, vfio::GROUP_COMMANDS, vfio::CONTAINER_COMMANDS, vfio::MIGRATION_COMMANDS]
    {
        for (number, name) in table {
            list.value(name, *number);
        }
    }
    list.value("VFIO_DEVICE_BIND_IOMMUFD", vfio::DeviceBindIommufd::NUMBER);
    flags!(list, vfio::BindFlags { TOKEN = "VFIO_DEVICE_BIND_FLAG_TOKEN" });
    flags!(list, vfio::AttachFlags { PASID = "VFIO_DEVICE_ATTACH_PASID" });
    flags!(list, vfio::DetachFlags { PASID = "VFIO_DEVICE_DETACH_PASID" });
    flags!(list, vfio::Type1InfoFlags {
        PGSIZES = "VFIO_IOMMU_INFO_PGSIZES",
        CAPS = "VFIO_IOMMU_INFO_CAPS",
    });
    flags!(list, vfio::Type1DmaMapFlags {
        READ = "VFIO_DMA_MAP_FLAG_READ",
        WRITE = "VFIO_DMA_MAP_FLAG_WRITE",
        VADDR = "VFIO_DMA_MAP_FLAG_VADDR",
    });
    flags!(list, vfio::Type1DmaUnmapFlags {
        GET_DIRTY_BITMAP = "VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP",
        ALL = "VFIO_DMA_UNMAP_FLAG_ALL",
        VADDR = "VFIO_DMA_UNMAP_FLAG_VADDR",
    });
    flags!(list, vfio::DeviceFlags {
        RESET = "VFIO_DEVICE_FLAGS_RESET",
        PCI = "VFIO_DEVICE_FLAGS_PCI",
        PLATFORM = "VFIO_DEVICE_FLAGS_PLATFORM",
        AMBA = "VFIO_DEVICE_FLAGS_AMBA",
        CCW = "VFIO_DEVICE_FLAGS_CCW",
        AP = "VFIO_DEVICE_FLAGS_AP",
        FSL_MC = "VFIO_DEVICE_FLAGS_FSL_MC",
        CAPS = "VFIO_DEVICE_FLAGS_CAPS",
        CDX = "VFIO_DEVICE_FLAGS_CDX",
    });
    flags!(list, vfio::RegionFlags {
        READ = "VFIO_REGION_INFO_FLAG_READ",
        WRITE = "VFIO_REGION_INFO_FLAG_WRITE",
        MMAP = "VFIO_REGION_INFO_FLAG_MMAP",
        CAPS = "VFIO_REGION_INFO_FLAG_CAPS",
    });
    flags!(list, vfio::IrqFlags {
        EVENTFD = "VFIO_IRQ_INFO_EVENTFD",
        MASKABLE = "VFIO_IRQ_INFO_MASKABLE",
        AUTOMASKED = "VFIO_IRQ_INFO_AUTOMASKED",
        NORESIZE = "VFIO_IRQ_INFO_NORESIZE",
    });
    flags!(list, vfio::IrqSetFlags {
        DATA_NONE = "VFIO_IRQ_SET_DATA_NONE",
        DATA_BOOL = "VFIO_IRQ_SET_DATA_BOOL",
        DATA_EVENTFD = "VFIO_IRQ_SET_DATA_EVENTFD",
        ACTION_MASK = "VFIO_IRQ_SET_ACTION_MASK",
        ACTION_UNMASK = "VFIO_IRQ_SET_ACTION_UNMASK",
        ACTION_TRIGGER = "VFIO_IRQ_SET_ACTION_TRIGGER",
    });
    flags!(list, vfio::DeviceFeatureFlags {
        GET = "VFIO_DEVICE_FEATURE_GET",
        SET = "VFIO_DEVICE_FEATURE_SET",
        PROBE = "VFIO_DEVICE_FEATURE_PROBE",
    });
    values!(list, vfio {
        DEVICE_FEATURE_MASK = "VFIO_DEVICE_FEATURE_MASK",
        API_VERSION = "VFIO_API_VERSION",
        TYPE1_IOMMU = "VFIO_TYPE1_IOMMU",
        TYPE1V2_IOMMU = "VFIO_TYPE1v2_IOMMU",
        DMA_CC_IOMMU = "VFIO_DMA_CC_IOMMU",
        UNMAP_ALL = "VFIO_UNMAP_ALL",
        UPDATE_VADDR = "VFIO_UPDATE_VADDR",
        PCI_BAR0_REGION_INDEX = "VFIO_PCI_BAR0_REGION_INDEX",
        PCI_BAR5_REGION_INDEX = "VFIO_PCI_BAR5_REGION_INDEX",
        PCI_ROM_REGION_INDEX = "VFIO_PCI_ROM_REGION_INDEX",
        PCI_CONFIG_REGION_INDEX = "VFIO_PCI_CONFIG_REGION_INDEX",
        PCI_VGA_REGION_INDEX = "VFIO_PCI_VGA_REGION_INDEX",
        PCI_NUM_REGIONS = "VFIO_PCI_NUM_REGIONS",
        PCI_INTX_IRQ_INDEX = "VFIO_PCI_INTX_IRQ_INDEX",
        PCI_MSI_IRQ_INDEX = "VFIO_PCI_MSI_IRQ_INDEX",
        PCI_MSIX_IRQ_INDEX = "VFIO_PCI_MSIX_IRQ_INDEX",
        PCI_ERR_IRQ_INDEX = "VFIO_PCI_ERR_IRQ_INDEX",
        PCI_REQ_IRQ_INDEX = "VFIO_PCI_REQ_IRQ_INDEX",
        PCI_NUM_IRQS = "VFIO_PCI_NUM_IRQS",
        DEVICE_INFO_CAP_PCI_ATOMIC_COMP = "VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP",
        REGION_INFO_CAP_SPARSE_MMAP = "VFIO_REGION_INFO_CAP_SPARSE_MMAP",
        REGION_INFO_CAP_TYPE = "VFIO_REGION_INFO_CAP_TYPE",
        REGION_INFO_CAP_MSIX_MAPPABLE = "VFIO_REGION_INFO_CAP_MSIX_MAPPABLE",
        TYPE1_INFO_CAP_IOVA_RANGE = "VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE",
        TYPE1_INFO_DMA_AVAIL = "VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL",
    });
}

fn configuration_space(list: &mut List) {
    for (name, value) in [
        ("PCI_CFG_SPACE_SIZE", pci::CONFIG_SPACE_SIZE),
        ("PCI_CFG_SPACE_EXP_SIZE", pci::EXPRESS_CONFIG_SPACE_SIZE),
        ("PCI_VENDOR_ID", pci::VENDOR_ID),
        ("PCI_DEVICE_ID", pci::DEVICE_ID),
        ("PCI_COMMAND", pci::COMMAND),
        ("PCI_STATUS", pci::STATUS),
        ("PCI_REVISION_ID", pci::REVISION_ID),
        ("PCI_CLASS_PROG", pci::CLASS_CODE),
        ("PCI_CACHE_LINE_SIZE", pci::CACHE_LINE_SIZE),
        ("PCI_LATENCY_TIMER", pci::LATENCY_TIMER),
        ("PCI_HEADER_TYPE", pci::HEADER_TYPE),
        ("PCI_BIST", pci::BIST),
        ("PCI_BASE_ADDRESS_0", pci::BAR0),
        ("PCI_STD_NUM_BARS", pci::BAR_COUNT),
        ("PCI_SUBSYSTEM_VENDOR_ID", pci::SUBSYSTEM_VENDOR_ID),
        ("PCI_SUBSYSTEM_ID", pci::SUBSYSTEM_ID),
        ("PCI_ROM_ADDRESS", pci::ROM_ADDRESS),
        ("PCI_CAPABILITY_LIST", pci::CAPABILITIES_POINTER),
        ("PCI_INTERRUPT_LINE", pci::INTERRUPT_LINE),
        ("PCI_INTERRUPT_PIN", pci::INTERRUPT_PIN),
        ("PCI_STD_HEADER_SIZEOF", pci::HEADER_END),
        ("PCI_CFG_SPACE_SIZE", pci::EXTENDED_CAPABILITIES),
        ("PCI_CAP_LIST_ID", pci::CAPABILITY_ID),
        ("PCI_CAP_LIST_NEXT", pci::CAPABILITY_NEXT),
        ("PCI_MSI_FLAGS", pci::MSI_CONTROL),
        ("PCI_MSI_ADDRESS_LO", pci::MSI_ADDRESS),
        ("PCI_MSI_ADDRESS_HI", pci::MSI_UPPER_ADDRESS),
        ("PCI_MSI_DATA_32", pci::MSI_DATA_32),
        ("PCI_MSI_DATA_64", pci::MSI_DATA_64),
    ] {
        list.size_or_offset(name.to_owned(), value);
    }
    flags!(list, pci::Command {
        IO_SPACE = "PCI_COMMAND_IO",
        MEMORY_SPACE = "PCI_COMMAND_MEMORY",
        BUS_MASTER = "PCI_COMMAND_MASTER",
        PARITY_ERROR_RESPONSE = "PCI_COMMAND_PARITY",
        SERR_ENABLE = "PCI_COMMAND_SERR",
        INTX_DISABLE = "PCI_COMMAND_INTX_DISABLE",
    });
    flags!(list, pci::Status {
        INTERRUPT = "PCI_STATUS_INTERRUPT",
        CAPABILITIES_LIST = "PCI_STATUS_CAP_LIST",
        MASTER_DATA_PARITY_ERROR = "PCI_STATUS_PARITY",
        SIGNALED_TARGET_ABORT = "PCI_STATUS_SIG_TARGET_ABORT",
        RECEIVED_TARGET_ABORT = "PCI_STATUS_REC_TARGET_ABORT",
        RECEIVED_MASTER_ABORT = "PCI_STATUS_REC_MASTER_ABORT",
        SIGNALED_SYSTEM_ERROR = "PCI_STATUS_SIG_SYSTEM_ERROR",
        DETECTED_PARITY_ERROR = "PCI_STATUS_DETECTED_PARITY",
    });
    flags!(list, pci::MsiControl {
        ENABLE = "PCI_MSI_FLAGS_ENABLE",
        ADDRESS_64 = "PCI_MSI_FLAGS_64BIT",
        PER_VECTOR_MASKING = "PCI_MSI_FLAGS_MASKBIT",
    });
    values!(list, pci {
        BAR_IO = "PCI_BASE_ADDRESS_SPACE_IO",
        BAR_MEMORY_32 = "PCI_BASE_ADDRESS_MEM_TYPE_32",
        BAR_MEMORY_64 = "PCI_BASE_ADDRESS_MEM_TYPE_64",
        BAR_PREFETCHABLE = "PCI_BASE_ADDRESS_MEM_PREFETCH",
        ROM_ENABLE = "PCI_ROM_ADDRESS_ENABLE",
        CAPABILITY_POWER_MANAGEMENT = "PCI_CAP_ID_PM",
        CAPABILITY_MSI = "PCI_CAP_ID_MSI",
        CAPABILITY_EXPRESS = "PCI_CAP_ID_EXP",
        CAPABILITY_MSIX = "PCI_CAP_ID_MSIX",
    });
}
