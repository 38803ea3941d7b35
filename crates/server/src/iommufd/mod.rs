//! `/dev/iommu`: one [`Context`] for each open.
//!
//! - [`objects`]: the numbered objects, and who uses them;
//! - [`areas`], [`ioas`], `placement`: address spaces;
//! - [`hwpt`]: page tables;
//! - [`errno`]: the error numbers for what the engine refuses;
//! - [`device`]: the devices that are bound; [`pasids`]: the PASIDs that they use;
//! - `commands`: what each command does, one function each;
//! - `dirty`: what devices have written;
//! - `vfio_compat`: VFIO's type 1 commands, which this file answers too;
//! - [`testing`]: the test-only command of the kernel's self-test.
//!
//! A context lives as long as its file is open or a device is bound to it, whichever is longer.

pub(crate) mod areas;
mod commands;
pub(crate) mod device;
mod dirty;
pub(crate) mod errno;
pub(crate) mod hwpt;
pub(crate) mod ioas;
pub(crate) mod objects;
pub(crate) mod pasids;
mod placement;
pub(crate) mod testing;
mod vfio_compat;

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use ioasid::DeviceOwner;
use ioasid_uapi::iommufd::{self as uapi, COMMANDS};
use ioasid_uapi::iommufd_test::TestCommand;
use ioasid_uapi::{Command, IOCTL_TYPE};
use rustix::io::Errno;

use self::hwpt::Hwpt;
use self::objects::{Held, Object, Objects};
use self::pasids::Pasids;
use self::vfio_compat::CompatIoas;
use crate::Client;
use crate::PinnedMemory;
use crate::argument;
use crate::limits::Allowance;
use crate::memory::MemoryRegistry;
use crate::observer::{Event, Observer};
use crate::status::{AddressSpaceStatus, ContextStatus, Listing, Status, TableStatus};

/// One open of `/dev/iommu`.
#[derive(Debug)]
pub(crate) struct Context {
    number: u64,
    /// As what the context has devices.
    owner: DeviceOwner,
    memory: Arc<MemoryRegistry>,
    pasids: Arc<Pasids>,
    objects: Objects,
    allowance: Arc<Allowance>,
    /// Whether memory is charged to the process that maps it, not to its user.
    charge_processes: AtomicBool,
    /// The address space that VFIO's commands mean.
    compat: Mutex<Option<CompatIoas>>,
    observer: Option<Arc<dyn Observer>>,
    /// Whether the test-only command is there.
    test_devices: bool,
}

impl Context {
    /// What is made in it is taken from `allowance`.
    pub(crate) fn new(
        number: u64,
        memory: Arc<MemoryRegistry>,
        pasids: Arc<Pasids>,
        allowance: Arc<Allowance>,
        test_devices: bool,
        observer: Option<Arc<dyn Observer>>,
    ) -> Self {
        Self {
            number,
            owner: DeviceOwner::new(format!("the open /dev/iommu number {number}")),
            memory,
            pasids,
            test_devices,
            objects: Objects::new(Arc::clone(&allowance.objects)),
            allowance,
            charge_processes: AtomicBool::new(false),
            compat: Mutex::default(),
            observer,
        }
    }

    /// Which open it is, counted from 1.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// As what it has devices.
    pub(crate) fn device_owner(&self) -> &DeviceOwner {
        &self.owner
    }

    /// What is made in it is taken from this.
    pub(crate) fn allowance(&self) -> &Arc<Allowance> {
        &self.allowance
    }

    /// The PASIDs of the machine.
    pub(crate) fn pasids(&self) -> &Arc<Pasids> {
        &self.pasids
    }

    pub(crate) fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Performs one ioctl.
    ///
    /// # Errors
    /// - `ENOTTY`: no such command.
    /// - `EFAULT`: the argument cannot be read. `EINVAL`: it is too short. `E2BIG`: it has more than is known.
    /// - `EOPNOTSUPP`: a known command that is not served. Those of the command.
    pub(crate) fn ioctl(
        self: &Arc<Self>,
        client: &dyn Client,
        number: u32,
        argument: u64,
    ) -> Result<u32, Errno> {
        // The kernel finds its table's row by the low byte, then reads the size, then compares the whole number. The table
        // of a kernel that is not built for the self-test ends before its command, which is the last.
        let table = if self.test_devices { COMMANDS } else { &COMMANDS[..COMMANDS.len() - 1] };
        let numbers = table.first().map_or(0, |row| row.number)..=table.last().map_or(0, |row| row.number);
        if !numbers.contains(&(IOCTL_TYPE | (number & 0xff))) {
            return self.vfio_ioctl(client, number, argument);
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
            uapi::IoasChangeProcess::NUMBER => call.ioas_change_process(),
            uapi::VfioIoas::NUMBER => call.vfio_ioas(),
            uapi::HwptAlloc::NUMBER => call.hwpt_alloc(),
            uapi::HwptSetDirtyTracking::NUMBER => call.hwpt_set_dirty_tracking(),
            uapi::HwptGetDirtyBitmap::NUMBER => call.hwpt_get_dirty_bitmap(),
            uapi::GetHwInfo::NUMBER => call.get_hw_info(),
            TestCommand::NUMBER => return call.test(),
            _ => {
                argument::check_sized(client, argument, user_size, info.size)?;
                Err(Errno::OPNOTSUPP)
            }
        }
        .map(|()| 0)
    }

    /// Tells the observer, if there is one, what is here before a file is closed.
    pub(crate) fn tell_closing(&self, device: Option<usize>) {
        if let Some(observer) = &self.observer {
            let accounts: Vec<_> = self.memory.accounts().iter().map(|account| account.status()).collect();
            let mut listing = Listing::new(Status::LISTED_AT_MOST);
            observer.happened(&Event::Closing {
                device,
                context: &self.status(&mut listing),
                accounts: &accounts,
            });
        }
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
        self.tell_closing(None);
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
    pub(crate) fn status(&self, listing: &mut Listing) -> ContextStatus {
        let objects = self.objects.snapshot();
        let mut status = ContextStatus { number: self.number, ..ContextStatus::default() };
        // Of an address space that is listed, the tables and the areas come after all spaces and devices.
        let mut spaces = Vec::new();
        for (id, object) in &objects {
            match object {
                Object::Ioas(ioas) if listing.take_one() => spaces.push((*id, ioas)),
                Object::Device(device) if listing.take_one() => {
                    status.devices.push(device.status(*id, listing));
                }
                _ => {}
            }
        }
        let mut tables: HashMap<_, Vec<_>> =
            spaces.iter().map(|(_, ioas)| (Arc::as_ptr(ioas), Vec::new())).collect();
        for (id, object) in &objects {
            let Object::Hwpt(hwpt) = object else { continue };
            let Some(ioas) = hwpt.ioas() else { continue };
            match tables.get_mut(&Arc::as_ptr(&ioas)) {
                Some(of_space) if listing.take_one() => {
                    of_space.push(TableStatus { id: *id, automatic: hwpt.is_automatic() });
                }
                Some(_) => {}
                None => listing.leave_out(),
            }
        }
        for (id, ioas) in spaces {
            let tables = tables.remove(&Arc::as_ptr(ioas)).unwrap_or_default();
            status.address_spaces.push(AddressSpaceStatus { id, tables, ..ioas.status(listing) });
        }
        status
    }

    /// Adds what the process of this identity has pinned here.
    pub(crate) fn add_pinned(&self, process: u64, pinned: &mut PinnedMemory) {
        for (_, object) in self.objects.snapshot() {
            if let Object::Ioas(ioas) = object {
                ioas.add_pinned(process, pinned);
            }
        }
    }
}
