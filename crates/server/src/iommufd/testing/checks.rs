//! What the test may look at: which page a table leads to, and how often pages are held.
//!
//! A page is known by its output address, which is the same whoever registers it, so that "the page under this IOVA is the
//! page under that address" compares two numbers. The page under an address of the caller is registered for the length of
//! the comparison, charged to nobody.

use ioasid::epoch;
use ioasid::{IovaRange, RadixTable, Table};
use ioasid_uapi::iommufd_test as uapi;
use rustix::io::Errno;

use super::super::Call;
use super::mock::MockFormat;
use crate::memory::PAGE_SIZE;

/// The longest range that is looked at by one call, in bytes.
const LONGEST_CHECK: u64 = 1 << 30;

/// The largest bitmap of pages to mark, in bits.
const MOST_DIRTY_BITS: u64 = 8 * (16 << 20);

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
        let pages = self.context.memory.identify(&self.client.process()?, check.uptr, check.length)?;
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

    /// Marks pages of a mock table as a device that writes would, those whose bits are set in a bitmap of the caller;
    /// returns how many bits that were.
    pub(super) fn mark_dirty(&self, id: u32, asked: &uapi::Dirty) -> Result<u64, Errno> {
        let page_size = asked.page_size;
        let aligned = |value: u64| value.checked_rem(page_size) == Some(0);
        if asked.length == 0 || !aligned(asked.iova) || !aligned(asked.length) || asked.uptr == 0 {
            return Err(Errno::INVAL);
        }
        let bits = asked.length / page_size;
        if bits > MOST_DIRTY_BITS || asked.iova.checked_add(asked.length - 1).is_none() {
            return Err(Errno::OVERFLOW);
        }
        let hwpt = self.context.objects.hold_hwpt(id)?;
        let table = hwpt.recording_table().map_err(|_| Errno::INVAL)?;
        drop(hwpt);
        mock_radix(&table).ok_or(Errno::INVAL)?;
        let mut buffer = [0; 4096];
        let mut marked = 0;
        let bytes = bits.div_ceil(8);
        for at in (0..bytes).step_by(buffer.len()) {
            let part = &mut buffer[..usize::try_from(bytes - at).unwrap_or(4096).min(4096)];
            self.client.read(asked.uptr.checked_add(at).ok_or(Errno::FAULT)?, part)?;
            for (byte, value) in (at..).zip(&*part) {
                for bit in (0..8).filter(|bit| value >> bit & 1 == 1) {
                    let page = byte * 8 + bit;
                    if page < bits {
                        // A device writes a byte of it; where nothing is mapped there is nothing to mark.
                        let iova = asked.iova + page * page_size;
                        let written = IovaRange::new(iova, iova).ok_or(Errno::INVAL)?;
                        table.mark_written(written).map_err(|_| Errno::INVAL)?;
                        marked += 1;
                    }
                }
            }
        }
        Ok(marked)
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
        let held = self.context.memory.holds(&self.client.process()?, check.uptr, check.length)?;
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
