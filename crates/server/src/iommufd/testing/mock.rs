//! Mock devices: devices that do nothing but be attached, behind an IOMMU that keeps tables and walks none.
//!
//! The hardware that the kernel's self-test imagines has AMD's table format with a granule of 2 KiB and translates 16 MiB
//! to 2 GiB; a program may ask for a table of large pages instead, which translates everything. All mock devices share one
//! IOMMU, so devices on one address space share its table. There is no DMA: what a table says is looked at by MD_CHECK_MAP.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioasid::pagetable::AmdV1;
use ioasid::pasid::Pasid;
use ioasid::{
    AttachError, Bus, DerivedTable, Device, Iommu, IovaRange, PageSize, RadixTable, Requirements, Rid, Table,
    TableClass, TableError,
};
use ioasid_uapi::iommufd::{HW_INFO_TYPE_NONE, HWPT_DATA_NONE, HwCapabilities, HwptAlloc, HwptAllocFlags};
use ioasid_uapi::iommufd_test::{
    MOCK_APERTURE_LAST, MOCK_APERTURE_START, MOCK_HUGE_PAGE_SIZE, MOCK_PAGE_SIZE, MOCK_PASID_WIDTH,
    MockDeviceFlags, PASID_RESERVED,
};
use rustix::io::Errno;

use super::super::commands::HwInfo;
use super::super::device::BoundDevice;
use super::super::objects::{Counted, Held, Object, Users};
use super::super::{Call, Context};
use crate::argument;
use crate::memory::PAGE_SIZE;

/// The type of a mock device's hardware information, and the register that is all of it.
const HW_INFO_TYPE: u32 = 0xfeed_beef;
const HW_INFO_REGISTER: u32 = 0xdead_beef;

/// The type of the data for a mock table.
const HWPT_DATA: u32 = 0xdead;

/// The format of the mock hardware's tables.
pub(crate) type MockFormat = AmdV1<1>;

/// The format's name in table classes.
const FORMAT: &str = "mock";

/// The kinds of table that a mock device can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MockTable {
    /// Pages of 2 KiB and 4 KiB, and an aperture. The format cannot cut a larger page while devices use it, and a program
    /// may turn to type 1's rules, which cut everything, after the table has been made.
    Default,
    /// Pages of 4 KiB and 1 MiB, no aperture.
    Huge,
}

impl MockTable {
    const ALL: [MockTable; 2] = [MockTable::Default, MockTable::Huge];

    fn class(self) -> TableClass {
        // No software IOMMU has this number.
        TableClass::Derived { iommu: u64::MAX, format: FORMAT, variant: self as u64 }
    }

    fn aperture(self) -> IovaRange {
        match self {
            MockTable::Default => {
                IovaRange::new(MOCK_APERTURE_START, MOCK_APERTURE_LAST).unwrap_or(IovaRange::ALL)
            }
            // What five levels translate.
            MockTable::Huge => IovaRange::new(0, (1 << 56) - 1).unwrap_or(IovaRange::ALL),
        }
    }

    fn leaf_sizes(self) -> u64 {
        match self {
            MockTable::Default => PAGE_SIZE,
            MockTable::Huge => PAGE_SIZE | MOCK_HUGE_PAGE_SIZE,
        }
    }
}

/// What IOVAs have to be multiples of in a table of this class, in bytes.
pub(crate) fn alignment(class: TableClass) -> u64 {
    match class {
        TableClass::Derived { format: FORMAT, variant, .. } if variant != MockTable::Huge as u64 => {
            MOCK_PAGE_SIZE
        }
        _ => PAGE_SIZE,
    }
}

/// The granule of address spaces that a table of this class can follow.
pub(crate) fn granule(class: TableClass) -> PageSize {
    let mock = matches!(class, TableClass::Derived { format: FORMAT, .. });
    PageSize::from_log2(MOCK_PAGE_SIZE.ilog2()).filter(|_| mock).unwrap_or(PageSize::SIZE_4K)
}

/// The imagined IOMMU of one device, as it is for tables of one kind.
#[derive(Debug)]
struct MockIommu {
    table: MockTable,
    /// Whether the next attachment of [`PASID_RESERVED`] fails. The test has that number so that it can see a replacement fail: every
    /// second attachment does, until the PASID is detached.
    fails_next: Arc<AtomicBool>,
}

impl Iommu for MockIommu {
    fn requirements(&self, _device: Rid) -> Option<Requirements> {
        Some(Requirements {
            class: self.table.class(),
            aperture: self.table.aperture(),
            reserved: Vec::new(),
            coherent: true,
        })
    }

    fn records_writes(&self, _device: Rid) -> bool {
        true
    }

    fn new_table(
        &self,
        class: TableClass,
        largest_leaf: PageSize,
        _: &Arc<Bus>,
    ) -> Result<Arc<dyn DerivedTable>, AttachError> {
        if class != self.table.class() {
            return Err(AttachError::Incompatible);
        }
        let no_larger = largest_leaf.bytes() | (largest_leaf.bytes() - 1);
        let format = AmdV1::new().with_granule_2k().with_accessed_dirty(true);
        Ok(Arc::new(RadixTable::new(format.with_leaf_sizes(self.table.leaf_sizes() & no_larger))))
    }

    fn attach(&self, _device: Rid, _table: &Arc<Table>) -> Result<(), AttachError> {
        Ok(())
    }

    fn block(&self, _device: Rid) {}

    fn attach_pasid(&self, _device: Rid, pasid: Pasid, _table: &Arc<Table>) -> Result<(), AttachError> {
        if pasid.get() == PASID_RESERVED && self.fails_next.fetch_xor(true, Ordering::Relaxed) {
            return Err(AttachError::Table(TableError::OutOfTables));
        }
        Ok(())
    }

    fn block_pasid(&self, _device: Rid, pasid: Pasid) {
        if pasid.get() == PASID_RESERVED {
            self.fails_next.store(false, Ordering::Relaxed);
        }
    }
}

/// A mock device.
#[derive(Debug)]
pub(crate) struct MockDevice {
    flags: MockDeviceFlags,
    /// One for each of [`MockTable::ALL`], in this order.
    engines: Vec<Device>,
}

impl MockDevice {
    fn new(flags: MockDeviceFlags) -> Self {
        let fails_next = Arc::new(AtomicBool::new(false));
        let iommu = |table| Arc::new(MockIommu { table, fails_next: Arc::clone(&fails_next) });
        let engine = |table| Device::new(iommu(table), Rid(0));
        Self { flags, engines: MockTable::ALL.into_iter().filter_map(|table| engine(table).ok()).collect() }
    }

    /// What GET_HW_INFO says of it, if data of the type `wanted` is asked for.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: there is no such data.
    pub(crate) fn hw_info(&self, wanted: u32) -> Result<HwInfo, Errno> {
        if wanted != HW_INFO_TYPE_NONE && wanted != HW_INFO_TYPE {
            return Err(Errno::OPNOTSUPP);
        }
        let mut capabilities = HwCapabilities::ATS_NOT_SUPPORTED;
        capabilities.set(HwCapabilities::DIRTY_TRACKING, self.records_writes());
        Ok(HwInfo {
            // Flags, of which none is defined, and a register.
            data: [0, HW_INFO_REGISTER].map(u32::to_ne_bytes).concat(),
            data_type: HW_INFO_TYPE,
            capabilities,
            max_pasid_log2: self.pasid_bits() as u8,
        })
    }

    /// How many bits its PASIDs have; 0: it has none.
    pub(crate) fn pasid_bits(&self) -> u32 {
        if self.flags.contains(MockDeviceFlags::PASID) { MOCK_PASID_WIDTH } else { 0 }
    }

    /// Whether its IOMMU can record what it writes.
    pub(crate) fn records_writes(&self) -> bool {
        !self.flags.contains(MockDeviceFlags::NO_DIRTY)
    }

    /// The device as the engine sees it, once for each kind of table.
    pub(crate) fn engines(&self) -> &[Device] {
        &self.engines
    }

    /// The same, for one kind.
    pub(crate) fn engine(&self, table: MockTable) -> &Device {
        &self.engines[table as usize]
    }
}

/// The object that stands for a mock device in the test: destroying it ends the device.
#[derive(Debug)]
pub(crate) struct TestDevice {
    users: Users,
    id: u32,
    device: Arc<BoundDevice>,
}

impl Counted for TestDevice {
    fn users(&self) -> &Users {
        &self.users
    }
}

impl TestDevice {
    /// The bound device.
    pub(crate) fn device(&self) -> &BoundDevice {
        &self.device
    }

    /// Detaches the device and takes it away.
    pub(crate) fn end(&self, context: &Context) {
        self.device.end(context);
        self.device.users().release();
        context.objects().remove(self.id, &Object::Device(Arc::clone(&self.device)));
    }
}

/// The numbers of the objects that MOCK_DOMAIN has made.
#[derive(Debug, Clone, Copy)]
pub(super) struct MockNumbers {
    pub(super) test_device: u32,
    pub(super) table: u32,
    pub(super) device: u32,
}

impl Call<'_> {
    /// Makes a mock device and attaches it to the object `id`; `tell` tells the client, and if that fails the device goes.
    pub(super) fn new_mock_device(
        &self,
        id: u32,
        flags: u32,
        tell: impl FnOnce(MockNumbers) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let objects = self.context.objects();
        let of_test = objects.reserve()?;
        let flags = MockDeviceFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let device = Arc::new(BoundDevice::of_test(MockDevice::new(flags)));
        // The test's object is a user of the device, so that DESTROY cannot take it away.
        device.users().acquire();
        let of_device = objects.reserve()?;
        let device_id = of_device.id();
        let table = device.attach(self.context, id)?;
        of_device.install(Object::Device(Arc::clone(&device)));
        let test_device = Arc::new(TestDevice { users: Users::default(), id: device_id, device });
        let numbers = MockNumbers { test_device: of_test.id(), table, device: device_id };
        match tell(numbers) {
            Ok(()) => of_test.install(Object::TestDevice(test_device)),
            Err(error) => {
                test_device.end(self.context);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Which kind of table HWPT_ALLOC shall make for a mock device.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: flags or data that the mock hardware does not have. `EINVAL`, `EFAULT`, `E2BIG`: the data are wrong.
    pub(in super::super) fn mock_table(
        &self,
        mock: &MockDevice,
        command: &HwptAlloc,
    ) -> Result<MockTable, Errno> {
        let mut possible =
            HwptAllocFlags::NEST_PARENT | HwptAllocFlags::DIRTY_TRACKING | HwptAllocFlags::PASID;
        possible.set(HwptAllocFlags::DIRTY_TRACKING, mock.records_writes());
        if command.flags & !possible.bits() != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        match command.data_type {
            HWPT_DATA_NONE => return Ok(MockTable::Default),
            HWPT_DATA => {}
            _ => return Err(Errno::OPNOTSUPP),
        }
        // What a nested table's IOTLB begins with, which the first version of the structure ended with, and the kind.
        if command.data_len < 4 {
            return Err(Errno::INVAL);
        }
        let mut data = [0; 8];
        let known = data.len().min(command.data_len as usize);
        self.client.read(command.data_uptr, &mut data[..known])?;
        argument::check_tail(self.client, command.data_uptr, command.data_len, data.len())?;
        match u32::from_ne_bytes([data[4], data[5], data[6], data[7]]) {
            0 => Ok(MockTable::Default),
            1 => Ok(MockTable::Huge),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// Attaches the mock device `id` to another object; returns the number of its table.
    pub(super) fn replace_mock_table(&self, id: u32, table: u32) -> Result<u32, Errno> {
        let device: Held<TestDevice> = self.context.objects().hold_test_device(id)?;
        device.device().attach(self.context, table)
    }
}
