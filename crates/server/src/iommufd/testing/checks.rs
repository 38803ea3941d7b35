//! What the test may look at: which page a table leads to, and how often pages are held.
//!
//! A page is known by its output address, which is the same whoever registers it, so that "the page under this IOVA is the
//! page under that address" compares two numbers. The page under an address of the caller is registered for the length of
//! the comparison, charged to nobody.

use ioasid::epoch;
use ioasid::{RadixTable, Table};
use ioasid_uapi::iommufd_test as uapi;
use rustix::io::Errno;

use super::super::Call;
use super::mock::MockFormat;
use crate::memory::PAGE_SIZE;

/// The longest range that is looked at by one call, in bytes.
const LONGEST_CHECK: u64 = 1 << 30;

/// What all entries of a mock device's imagined cache hold until something invalidates them.
const CACHE_DEFAULT: u32 = 0x00ba_ddad;

impl Call<'_> {
    /// Compares the pages that a mock table leads to with pages of the caller.
    pub(super) fn check_map(&self, id: u32, check: uapi::CheckMap) -> Result<(), Errno> {
        let hwpt = self.context.objects.hold_hwpt(id)?;
        let table = hwpt.table().ok_or(Errno::NOENT)?;
        let radix = mock_radix(&table).ok_or(Errno::INVAL)?;
        let page_size = super::mock::alignment(table.class());
        let aligned = [check.iova, check.length, check.uptr].iter().all(|value| value % page_size == 0);
        let ends = check.uptr.checked_add(check.length).and(check.iova.checked_add(check.length));
        if !aligned || ends.is_none() || check.length > LONGEST_CHECK {
            return Err(Errno::INVAL);
        }
        if check.length == 0 {
            return Ok(());
        }
        let pages = self.context.memory.identify(self.client.process()?, check.uptr, check.length)?;
        for offset in (0..check.length).step_by(page_size as usize) {
            let found = {
                let _section = epoch::dma();
                radix.radix().walk(check.iova + offset).ok().map(|leaf| leaf.output(check.iova + offset))
            };
            if found.is_none() || found != pages.output(offset) {
                return Err(Errno::INVAL);
            }
        }
        Ok(())
    }

    /// Compares how many times pages of the caller are held with what it expects.
    pub(super) fn check_refs(&self, check: uapi::CheckRefs) -> Result<(), Errno> {
        let aligned = check.length % PAGE_SIZE == 0 && check.uptr % PAGE_SIZE == 0;
        if !aligned || check.uptr.checked_add(check.length).is_none() || check.length > LONGEST_CHECK {
            return Err(Errno::INVAL);
        }
        if check.length == 0 {
            return Ok(());
        }
        let held = self.context.memory.holds(self.client.process()?, check.uptr, check.length)?;
        let expected = u64::from(check.refs);
        if held == (expected..=expected) { Ok(()) } else { Err(Errno::IO) }
    }

    /// Compares an entry of a mock device's imagined cache. Nothing invalidates it without nesting.
    pub(super) fn check_device_cache(&self, id: u32, check: uapi::CheckDevCache) -> Result<(), Errno> {
        let device = self.context.objects.hold_device(id)?;
        let fits = device.mock().is_some() && check.id <= uapi::MOCK_DEV_CACHE_ID_MAX;
        if fits && check.cache == CACHE_DEFAULT { Ok(()) } else { Err(Errno::INVAL) }
    }
}

/// The mock hardware's table, if it is one.
fn mock_radix(table: &Table) -> Option<&RadixTable<MockFormat>> {
    table.derived()?.as_any().downcast_ref()
}
