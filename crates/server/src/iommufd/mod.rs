//! `/dev/iommu`: one [`Context`] for each open.
//!
//! - [`objects`]: the numbered objects, and who uses them;
//! - [`areas`], [`ioas`], `placement`: address spaces;
//! - [`hwpt`]: page tables;
//! - [`errno`]: the error numbers for what the engine refuses;
//! - [`device`]: the devices that are bound;
//! - `commands`: what each command does, one function each;
//! - [`testing`]: the test-only command of the kernel's self-test.
//!
//! A context lives as long as its file is open or a device is bound to it, whichever is longer.

pub(crate) mod areas;
mod commands;
pub(crate) mod device;
pub(crate) mod errno;
pub(crate) mod hwpt;
pub(crate) mod ioas;
pub(crate) mod objects;
mod placement;
pub(crate) mod testing;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use ioasid::PageSize;
use ioasid::pagetable::Native;
use ioasid_uapi::iommufd::{self as uapi, COMMANDS};
use ioasid_uapi::iommufd_test::{MOCK_PAGE_SIZE, TestCommand};
use ioasid_uapi::{Command, IOCTL_TYPE};
use rustix::io::Errno;

use self::hwpt::Hwpt;
use self::ioas::AreaBudget;
use self::objects::{Held, Object, Objects};
use crate::Client;
use crate::argument;
use crate::memory::MemoryRegistry;
use crate::status::{AddressSpaceStatus, ContextStatus, TableStatus};

/// One open of `/dev/iommu`.
#[derive(Debug)]
pub(crate) struct Context {
    number: u64,
    memory: Arc<MemoryRegistry>,
    objects: Objects,
    budget: Arc<AreaBudget>,
    /// Whether memory is charged to the process that maps it, not to its user.
    charge_processes: AtomicBool,
    /// Whether the test-only command is there.
    test_devices: bool,
}

impl Context {
    pub(crate) fn new(number: u64, memory: Arc<MemoryRegistry>, test_devices: bool) -> Self {
        Self {
            number,
            memory,
            test_devices,
            objects: Objects::default(),
            budget: Arc::new(AreaBudget::new()),
            charge_processes: AtomicBool::new(false),
        }
    }

    pub(crate) fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Performs one ioctl.
    ///
    /// # Errors
    /// - `ENOTTY`: no such command. VFIO's container commands, which Linux answers here too, are not served.
    /// - `EFAULT`: the argument cannot be read. `EINVAL`: it is too short. `E2BIG`: it has more than is known.
    /// - `EOPNOTSUPP`: a known command that is not served. Those of the command.
    pub(crate) fn ioctl(
        self: &Arc<Self>,
        client: &dyn Client,
        number: u32,
        argument: u64,
    ) -> Result<u32, Errno> {
        // The kernel finds its table's row by the low byte, then reads the size, then compares the whole number.
        let numbers =
            COMMANDS.first().map_or(0, |row| row.number)..=COMMANDS.last().map_or(0, |row| row.number);
        if !numbers.contains(&(IOCTL_TYPE | (number & 0xff))) {
            return Err(Errno::NOTTY);
        }
        // A kernel that is not built for the self-test has no row for its command.
        if number & 0xff == TestCommand::NUMBER & 0xff && !self.test_devices {
            return Err(Errno::NOTTY);
        }
        let user_size = argument::read_u32(client, argument)?;
        let info = uapi::command(number).ok_or(Errno::NOTTY)?;
        if (user_size as usize) < info.min_size {
            return Err(Errno::INVAL);
        }
        let call = Call { context: self, client, argument, user_size };
        match number {
            uapi::Destroy::NUMBER => call.destroy(),
            uapi::IoasAlloc::NUMBER => call.ioas_alloc(),
            uapi::IoasIovaRanges::NUMBER => call.ioas_iova_ranges(),
            uapi::IoasAllowIovas::NUMBER => call.ioas_allow_iovas(),
            uapi::IoasMap::NUMBER => call.ioas_map(),
            uapi::IoasMapFile::NUMBER => call.ioas_map_file(),
            uapi::IoasCopy::NUMBER => call.ioas_copy(),
            uapi::IoasUnmap::NUMBER => call.ioas_unmap(),
            uapi::SetOption::NUMBER => call.option(),
            uapi::HwptAlloc::NUMBER => call.hwpt_alloc(),
            uapi::GetHwInfo::NUMBER => call.get_hw_info(),
            TestCommand::NUMBER => return call.test(),
            _ => {
                argument::check_sized(client, argument, user_size, info.size)?;
                Err(Errno::OPNOTSUPP)
            }
        }
        .map(|()| 0)
    }

    /// The format of address spaces: mock hardware has smaller pages than any other.
    fn space_format(&self) -> Native {
        let small = PageSize::from_log2(MOCK_PAGE_SIZE.ilog2()).filter(|_| self.test_devices);
        small.and_then(|granule| Native::new().with_granule(granule)).unwrap_or_default()
    }

    /// Ends one use of a page table; an automatic one goes with its last use.
    pub(crate) fn put_hwpt(&self, used: Held<Hwpt>) {
        let hwpt = Arc::clone(used.arc());
        drop(used);
        if hwpt.is_automatic() && self.objects.retire_exactly(hwpt.id(), &Object::Hwpt(Arc::clone(&hwpt))) {
            hwpt.destroy();
        }
    }
}

impl Drop for Context {
    /// Nothing refers to the context any more: no file, no device, no call. What uses others goes first.
    fn drop(&mut self) {
        let objects = self.objects.snapshot();
        for (_, object) in &objects {
            if let Object::TestDevice(device) = object {
                device.end(self);
            }
        }
        let objects = self.objects.snapshot();
        for (_, object) in &objects {
            if let Object::Hwpt(hwpt) = object {
                hwpt.destroy();
            }
        }
        for (_, object) in &objects {
            if let Object::Ioas(ioas) = object {
                ioas.clear();
            }
        }
    }
}

/// One call of a command, with its argument still at the client.
struct Call<'a> {
    context: &'a Arc<Context>,
    client: &'a dyn Client,
    argument: u64,
    user_size: u32,
}

impl Call<'_> {
    fn receive<T: Command>(&self) -> Result<T, Errno> {
        argument::receive_sized(self.client, self.argument, self.user_size)
    }

    fn respond<T: Command>(&self, answer: &T) -> Result<(), Errno> {
        argument::respond(self.client, self.argument, self.user_size, answer)
    }
}

impl Context {
    /// What the context holds, for the status.
    pub(crate) fn status(&self) -> ContextStatus {
        let objects = self.objects.snapshot();
        let mut status = ContextStatus { number: self.number, ..ContextStatus::default() };
        for (id, object) in &objects {
            match object {
                Object::Ioas(ioas) => {
                    let tables = objects.iter().filter_map(|(id, object)| match object {
                        Object::Hwpt(hwpt) if hwpt.belongs_to(ioas) => {
                            Some(TableStatus { id: *id, automatic: hwpt.is_automatic() })
                        }
                        _ => None,
                    });
                    let tables = tables.collect();
                    status.address_spaces.push(AddressSpaceStatus { id: *id, tables, ..ioas.status() });
                }
                Object::Device(device) => status.devices.push(device.status(*id)),
                Object::Hwpt(_) | Object::TestDevice(_) | Object::Access(_) => {}
            }
        }
        status
    }
}
