//! The test-only command of the kernel's own iommufd self-test.
//!
//! Kernels that are built for it have one more ioctl, on which the self-test builds all that it cannot do without a device
//! or a driver: mock devices, imagined users of pages inside the kernel, dma-bufs, and looks at what the kernel did. It is
//! served only by servers whose options say so ([`ServerOptions::test_devices`](crate::ServerOptions::test_devices));
//! others answer as a production kernel does, ENOTTY.
//!
//! - [`mock`]: the mock devices and their tables;
//! - [`accesses`]: users of pages in the kernel;
//! - [`dma_buf`]: memory of an imagined driver;
//! - `pasids`: PASIDs of mock devices;
//! - `checks`: what a table says, how often pages are held.

mod accesses;
mod checks;
mod dma_buf;
pub(super) mod mock;
mod pasids;

use ioasid::IovaRange;
use ioasid_uapi::iommufd_test as uapi;
use rustix::io::Errno;

use super::Call;

pub(crate) use accesses::{Access, AccessFile, PinnedPiece};
pub(crate) use dma_buf::{DmaBuf, DmaBufs};
pub(crate) use mock::{MockDevice, TestDevice};

/// What the kernel's limit for its own temporary memory must at least be, in bytes.
const LEAST_MEMORY_LIMIT: u32 = 12;

impl Call<'_> {
    pub(super) fn test(&self) -> Result<u32, Errno> {
        let mut command: uapi::TestCommand = self.receive()?;
        let id = command.id;
        match command.op {
            uapi::OP_ADD_RESERVED => self.add_reserved(id, command.payload()),
            uapi::OP_MOCK_DOMAIN | uapi::OP_MOCK_DOMAIN_FLAGS => {
                let mut mock: uapi::MockDomainFlags = command.payload();
                let flags = if command.op == uapi::OP_MOCK_DOMAIN { 0 } else { mock.dev_flags };
                self.new_mock_device(id, flags, |numbers| {
                    mock.out_stdev_id = numbers.test_device;
                    mock.out_hwpt_id = numbers.table;
                    mock.out_idev_id = numbers.device;
                    command.set_payload(&mock);
                    self.respond(&command)
                })
            }
            uapi::OP_MOCK_DOMAIN_REPLACE => {
                let asked: uapi::MockDomainReplace = command.payload();
                let pt_id = self.replace_mock_table(id, asked.pt_id)?;
                command.set_payload(&uapi::MockDomainReplace { pt_id });
                self.respond(&command)
            }
            uapi::OP_MD_CHECK_MAP => self.check_map(id, command.payload()),
            uapi::OP_MD_CHECK_REFS => self.check_refs(command.payload()),
            uapi::OP_CREATE_ACCESS => self.create_access(command),
            uapi::OP_ACCESS_REPLACE_IOAS => self.replace_access_space(id, command.payload()),
            uapi::OP_ACCESS_PAGES => self.pin_pages(command),
            uapi::OP_DESTROY_ACCESS_PAGES => self.unpin_pages(id, command.payload()),
            uapi::OP_ACCESS_RW => self.access_memory(id, command.payload()),
            uapi::OP_DMABUF_GET => return self.get_dma_buf(command.payload()),
            uapi::OP_DMABUF_REVOKE => self.revoke_dma_buf(command.payload()),
            uapi::OP_DIRTY => {
                let mut dirty: uapi::Dirty = command.payload();
                dirty.out_nr_dirty = self.mark_dirty(id, &dirty)?;
                command.set_payload(&dirty);
                self.respond(&command)
            }
            uapi::OP_DEV_CHECK_CACHE => self.check_device_cache(id, command.payload()),
            uapi::OP_SET_TEMP_MEMORY_LIMIT => {
                // Makes the kernel work in smaller batches. There are none here; the value is only checked.
                let limit = command.payload::<uapi::SetTempMemoryLimit>().limit;
                if limit < LEAST_MEMORY_LIMIT { Err(Errno::INVAL) } else { Ok(()) }
            }
            uapi::OP_PASID_ATTACH => self.attach_mock_pasid(command),
            uapi::OP_PASID_REPLACE => self.replace_mock_pasid(command),
            uapi::OP_PASID_DETACH => self.detach_mock_pasid(id, command.payload()),
            uapi::OP_PASID_CHECK_HWPT => self.check_mock_pasid(id, command.payload()),
            _ => Err(Errno::OPNOTSUPP),
        }
        .map(|()| 0)
    }

    fn add_reserved(&self, ioas: u32, range: uapi::AddReserved) -> Result<(), Errno> {
        if range.length == 0 {
            return Err(Errno::INVAL);
        }
        let range = IovaRange::with_length(range.start, range.length).ok_or(Errno::OVERFLOW)?;
        self.context.objects.hold_ioas(ioas)?.reserve_for_test(range)
    }
}
