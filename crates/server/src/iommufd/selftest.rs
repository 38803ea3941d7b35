//! The test-only command of the kernel's own iommufd self-test.
//!
//! The self-test builds everything on one ioctl that production kernels lack. Served here is what its tests without a
//! mock device need; the other operations look up the object they name, as the kernel does first, and are refused.

use ioasid::IovaRange;
use ioasid_uapi::iommufd_test as uapi;
use rustix::io::Errno;

use super::Call;
use crate::memory::PAGE_SIZE;

/// What the kernel's limit for its own temporary memory must at least be, in bytes.
const LEAST_MEMORY_LIMIT: u32 = 12;

/// The longest range whose pins are counted by one call, in bytes.
const LONGEST_CHECK: u64 = 1 << 30;

impl Call<'_> {
    pub(super) fn selftest(&self) -> Result<(), Errno> {
        let command: uapi::TestCommand = self.receive()?;
        match command.op {
            uapi::OP_ADD_RESERVED => self.add_reserved(command.id, command.payload()),
            uapi::OP_MD_CHECK_REFS => self.check_refs(command.payload()),
            uapi::OP_SET_TEMP_MEMORY_LIMIT => {
                // Makes the kernel work in smaller batches. There are none here; the value is only checked.
                let limit = command.payload::<uapi::SetTempMemoryLimit>().limit;
                if limit < LEAST_MEMORY_LIMIT { Err(Errno::INVAL) } else { Ok(()) }
            }
            uapi::OP_MOCK_DOMAIN | uapi::OP_MOCK_DOMAIN_FLAGS
                if self.context.objects.contains(command.id) =>
            {
                Err(Errno::OPNOTSUPP)
            }
            // A space or table that does not exist, or a mock device, of which there are none.
            uapi::OP_MOCK_DOMAIN
            | uapi::OP_MOCK_DOMAIN_FLAGS
            | uapi::OP_MOCK_DOMAIN_REPLACE
            | uapi::OP_PASID_ATTACH
            | uapi::OP_PASID_REPLACE
            | uapi::OP_PASID_DETACH
            | uapi::OP_PASID_CHECK_HWPT => Err(Errno::NOENT),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn add_reserved(&self, ioas: u32, range: uapi::AddReserved) -> Result<(), Errno> {
        if range.length == 0 {
            return Err(Errno::INVAL);
        }
        let range = IovaRange::with_length(range.start, range.length).ok_or(Errno::OVERFLOW)?;
        self.context.objects.hold_ioas(ioas)?.reserve_for_test(range)
    }

    /// Compares how many times pages of the caller are held with what it expects.
    fn check_refs(&self, check: uapi::CheckRefs) -> Result<(), Errno> {
        let aligned = check.length % PAGE_SIZE == 0 && check.uptr % PAGE_SIZE == 0;
        if !aligned || check.uptr.checked_add(check.length).is_none() || check.length > LONGEST_CHECK {
            return Err(Errno::INVAL);
        }
        if check.length == 0 {
            return Ok(());
        }
        let process = self.client.process()?;
        process.check_access(check.uptr, check.length, false)?;
        let backing = self.context.memory.backing_of_process(process.identity());
        let held = backing.map_or(0..=0, |backing| backing.holds(check.uptr, check.length));
        let expected = u64::from(check.refs);
        if held == (expected..=expected) { Ok(()) } else { Err(Errno::IO) }
    }
}
