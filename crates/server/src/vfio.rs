//! `/dev/vfio/devices/vfioN`: a device file.
//!
//! Opening the file gives nothing yet. BIND ties the device to an open `/dev/iommu`, exclusively: one file at a time,
//! until that file is closed. Only then do the other calls work. ATTACH points the device's DMA at an address space or
//! a page table of that context; attaching again replaces it in one step; DETACH blocks it. Devices that cannot be told apart go
//! one way, and what is done to one of them is done to all. With a PASID, both mean the device's requests that have this PASID,
//! which go their own way.
//!
//! The context is the device's owner: devices of one group can only be bound to the same, and EPERM comes with a line in the log
//! that names the one in the way.
//!
//! ```text
//!   DeviceFile ──► Binding ──► Context            kept alive by the binding
//!      │             └──────► BoundDevice ──► PlainRoute ──► Held<Hwpt>    what the device is attached to
//!      └──► MachineDevice     (also in the context's table of objects)
//! ```
//!
//! The device model answers for its regions; this module turns its refusals into error numbers.
//!
//! # Locks
//! A file's `state`, a device's `pasids` and then its `plain` route are outermost: ATTACH holds the latter two while it takes the
//! address space's lock, and that in turn the object table's. None is held while client memory is accessed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ioasid::{Device, DeviceError, Iommu, Rid};
use ioasid_soft::pci::{AccessError, PciDevice};
use ioasid_uapi::Command;
use ioasid_uapi::vfio as uapi;
use ioasid_uapi::vfio::{
    AttachFlags, BindFlags, DetachFlags, DeviceFeatureFlags, DeviceFlags, IrqFlags, RegionFlags,
};
use rustix::io::Errno;

use crate::argument;
use crate::dma::DmaFaults;
use crate::iommufd::Context;
use crate::iommufd::device::{BoundDevice, PasidAttach, PlainRoute};
use crate::iommufd::objects::{Counted, Object};
use crate::observer::WatchedDevice;
use crate::poison::lock;
use crate::status::DeviceStatus;
use crate::{Client, Descriptor, REGION_MAGIC, REGION_MAGIC_MASK};

/// How far a region's index is shifted in the file offset.
const REGION_SHIFT: u32 = 40;

/// Numbers above are not even remembered by Linux, which says so with an error of its own.
const LARGEST_PASID: u32 = i32::MAX as u32;

/// A device of the machine, bound or not.
#[derive(Debug)]
pub(crate) struct MachineDevice {
    pub(crate) number: usize,
    pub(crate) rid: Rid,
    pub(crate) model: Arc<dyn PciDevice>,
    pub(crate) faults: Arc<DmaFaults>,
    pub(crate) iommu: Arc<dyn Iommu>,
    /// How many bits its PASIDs have; 0: it has none.
    pub(crate) pasid_bits: u32,
    pub(crate) bound: AtomicBool,
    /// Where its requests without a PASID go, and those of all devices with the same requester ID.
    pub(crate) plain: Arc<PlainRoute>,
    /// Whether it was said why it is not bound; once is enough.
    pub(crate) complained: AtomicBool,
    /// Who watches it, if anybody does.
    pub(crate) watched: Option<Arc<WatchedDevice>>,
}

impl MachineDevice {
    fn path(&self) -> String {
        format!("/dev/vfio/devices/vfio{}", self.number)
    }

    /// Its file and how its DMA fared, for the status.
    pub(crate) fn status(&self) -> DeviceStatus {
        let (dma_faults, last_dma_fault) = self.faults.told();
        DeviceStatus { path: self.path(), dma_faults, last_dma_fault, ..DeviceStatus::default() }
    }
}

/// One open of a device file.
#[derive(Debug)]
pub(crate) struct DeviceFile {
    device: Arc<MachineDevice>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Unbound,
    /// BIND is telling the client the number; other calls still see an unbound file.
    Binding,
    Bound(Arc<Binding>),
}

/// What BIND made.
#[derive(Debug)]
struct Binding {
    context: Arc<Context>,
    id: u32,
    machine: Arc<MachineDevice>,
    bound: Arc<BoundDevice>,
}

impl Drop for Binding {
    /// The last close: the device is quiet before its tables go and before anybody else can bind it.
    fn drop(&mut self) {
        let machine = &self.machine;
        self.context.tell_closing(Some(machine.number));
        machine.model.close();
        self.bound.end(&self.context);
        self.context.objects().remove(self.id, &Object::Device(Arc::clone(&self.bound)));
        machine.bound.store(false, Ordering::Release);
    }
}

impl DeviceFile {
    pub(crate) fn new(device: Arc<MachineDevice>) -> Self {
        Self { device, state: Mutex::new(State::Unbound) }
    }

    /// N of `vfioN`.
    pub(crate) fn number(&self) -> usize {
        self.device.number
    }

    fn binding(&self) -> Result<Arc<Binding>, Errno> {
        match &*lock(&self.state) {
            State::Bound(binding) => Ok(Arc::clone(binding)),
            State::Unbound | State::Binding => Err(Errno::INVAL),
        }
    }

    /// Performs one ioctl.
    ///
    /// # Errors
    /// - `EINVAL`: before BIND. `ENOTTY`: no such command, or one that needs what these devices do not have.
    /// - Those of the command.
    pub(crate) fn ioctl(&self, client: &dyn Client, number: u32, argument: u64) -> Result<u32, Errno> {
        if number == uapi::DEVICE_BIND_IOMMUFD {
            return self.bind(client, argument).map(|()| 0);
        }
        let binding = self.binding()?;
        match number {
            uapi::DEVICE_ATTACH_IOMMUFD_PT => binding.attach(client, argument),
            uapi::DEVICE_DETACH_IOMMUFD_PT => binding.detach(client, argument),
            uapi::DEVICE_GET_INFO => get_info(client, argument),
            uapi::DEVICE_GET_REGION_INFO => self.get_region_info(client, argument),
            uapi::DEVICE_GET_IRQ_INFO => get_irq_info(client, argument),
            uapi::DEVICE_SET_IRQS => {
                // Every index has a count of 0, so that every `start` is past the end.
                argument::receive_argsz::<uapi::IrqSet>(client, argument)?;
                Err(Errno::INVAL)
            }
            uapi::DEVICE_RESET => {
                self.device.model.reset();
                Ok(())
            }
            uapi::DEVICE_GET_PCI_HOT_RESET_INFO | uapi::DEVICE_PCI_HOT_RESET => Err(Errno::NODEV),
            uapi::DEVICE_FEATURE => feature(client, argument),
            _ => Err(Errno::NOTTY),
        }
        .map(|()| 0)
    }

    fn bind(&self, client: &dyn Client, address: u64) -> Result<(), Errno> {
        let user_size = argument::read_u32(client, address)?;
        if (user_size as usize) < uapi::DeviceBindIommufd::MIN_SIZE {
            return Err(Errno::INVAL);
        }
        let command: uapi::DeviceBindIommufd = argument::receive_sized(client, address, user_size)?;
        let flags = BindFlags::from_bits(command.flags).ok_or(Errno::INVAL)?;
        if command.iommufd < 0 {
            return Err(Errno::INVAL);
        }
        {
            let mut state = lock(&self.state);
            if !matches!(*state, State::Unbound) {
                return Err(Errno::INVAL);
            }
            *state = State::Binding;
        }
        let result = self.bind_to(client, address, &command, flags);
        *lock(&self.state) = match &result {
            Ok(binding) => State::Bound(Arc::clone(binding)),
            Err(_) => State::Unbound,
        };
        result.map(drop)
    }

    fn bind_to(
        &self,
        client: &dyn Client,
        address: u64,
        command: &uapi::DeviceBindIommufd,
        flags: BindFlags,
    ) -> Result<Arc<Binding>, Errno> {
        // Tokens are for virtual functions, and no device is one.
        if flags.contains(BindFlags::TOKEN) {
            return Err(Errno::INVAL);
        }
        let context = match client.descriptor(command.iommufd)? {
            Descriptor::Ours(file) => file.context().ok_or(Errno::BADFD)?,
            Descriptor::Foreign(_) => return Err(Errno::BADFD),
        };
        let machine = &self.device;
        if machine.bound.swap(true, Ordering::AcqRel) {
            return Err(Errno::INVAL);
        }
        let binding = match make_binding(machine, context) {
            Ok(binding) => binding,
            Err(error) => {
                machine.bound.store(false, Ordering::Release);
                return Err(error);
            }
        };
        machine.model.open();
        let out = address.checked_add(std::mem::offset_of!(uapi::DeviceBindIommufd, out_devid) as u64);
        client.write(out.ok_or(Errno::FAULT)?, &binding.id.to_ne_bytes())?;
        Ok(binding)
    }

    fn get_region_info(&self, client: &dyn Client, address: u64) -> Result<(), Errno> {
        let mut info: uapi::RegionInfo = argument::receive_argsz(client, address)?;
        let region = self.device.model.regions().get(info.index).map_err(access_errno)?;
        info.flags = RegionFlags::from_bits_truncate(region.flags.bits()).bits();
        info.cap_offset = 0;
        info.size = region.size;
        info.offset = REGION_MAGIC | u64::from(info.index) << REGION_SHIFT;
        argument::respond(client, address, uapi::RegionInfo::MIN_SIZE as u32, &info)
    }

    /// Reads from a region.
    ///
    /// # Errors
    /// `EINVAL`: before BIND, or no region is there. Those of the region, see [`access_errno`].
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        let _binding = self.binding()?;
        let (index, offset) = region_of(offset)?;
        self.device.model.read_region(index, offset, buffer).map_err(access_errno)
    }

    /// Writes to a region; errors as for reading.
    pub(crate) fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
        let _binding = self.binding()?;
        let (index, offset) = region_of(offset)?;
        self.device.model.write_region(index, offset, bytes).map_err(access_errno)
    }
}

fn make_binding(machine: &Arc<MachineDevice>, context: Arc<Context>) -> Result<Arc<Binding>, Errno> {
    let owner = context.device_owner();
    let engine = Device::bind(Arc::clone(&machine.iommu), machine.rid, owner).map_err(|error| {
        // A client may try for ever, and the log is not to grow with that.
        match machine.complained.swap(true, Ordering::Relaxed) {
            false => tracing::warn!(%error, file = machine.path(), "a device is not bound"),
            true => tracing::debug!(%error, file = machine.path(), "a device is not bound"),
        }
        bind_errno(&error)
    })?;
    let reservation = context.objects().reserve()?;
    let id = reservation.id();
    // What the program calls the device is what is said of its faults.
    let engine = engine.with_cookie(id.into());
    let bound = Arc::new(BoundDevice::of_machine(Arc::clone(machine), engine));
    // The file is a user of the object, so that DESTROY cannot take it away.
    bound.users().acquire();
    reservation.install(Object::Device(Arc::clone(&bound)));
    Ok(Arc::new(Binding { context, id, machine: Arc::clone(machine), bound }))
}

impl Binding {
    fn attach(&self, client: &dyn Client, address: u64) -> Result<(), Errno> {
        let mut command: uapi::DeviceAttachIommufdPt = argument::receive_argsz(client, address)?;
        let flags = AttachFlags::from_bits(command.flags).ok_or(Errno::INVAL)?;
        let has_pasid = flags.contains(AttachFlags::PASID);
        let table = if has_pasid {
            argument::receive_rest(client, address, &mut command)?;
            if command.pasid > LARGEST_PASID {
                return Err(Errno::NOSPC);
            }
            self.bound.attach_pasid(&self.context, command.pasid, command.pt_id, PasidAttach::Either)?
        } else {
            self.bound.attach(&self.context, command.pt_id)?
        };
        let out = address.checked_add(std::mem::offset_of!(uapi::DeviceAttachIommufdPt, pt_id) as u64);
        let written = out.ok_or(Errno::FAULT).and_then(|out| client.write(out, &table.to_ne_bytes()));
        match written {
            Err(_) if has_pasid => self.bound.detach_pasid(command.pasid),
            Err(_) => self.bound.detach(&self.context),
            Ok(()) => {}
        }
        written
    }

    fn detach(&self, client: &dyn Client, address: u64) -> Result<(), Errno> {
        let mut command: uapi::DeviceDetachIommufdPt = argument::receive_argsz(client, address)?;
        let flags = DetachFlags::from_bits(command.flags).ok_or(Errno::INVAL)?;
        if flags.contains(DetachFlags::PASID) {
            argument::receive_rest(client, address, &mut command)?;
            self.bound.detach_pasid(command.pasid);
        } else {
            self.bound.detach(&self.context);
        }
        Ok(())
    }
}

fn get_info(client: &dyn Client, address: u64) -> Result<(), Errno> {
    let mut info: uapi::DeviceInfo = argument::receive_argsz(client, address)?;
    info.flags = (DeviceFlags::PCI | DeviceFlags::RESET).bits();
    info.num_regions = uapi::PCI_NUM_REGIONS;
    info.num_irqs = uapi::PCI_NUM_IRQS;
    argument::respond(client, address, info.argsz, &info)
}

fn get_irq_info(client: &dyn Client, address: u64) -> Result<(), Errno> {
    let mut info: uapi::IrqInfo = argument::receive_argsz(client, address)?;
    // No interrupt can be delivered yet, so no device has any, whatever its configuration space says.
    info.flags = match info.index {
        uapi::PCI_INTX_IRQ_INDEX => IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED,
        index if index < uapi::PCI_NUM_IRQS => IrqFlags::EVENTFD | IrqFlags::NORESIZE,
        _ => return Err(Errno::INVAL),
    }
    .bits();
    info.count = 0;
    argument::respond(client, address, uapi::IrqInfo::MIN_SIZE as u32, &info)
}

/// No feature is supported; what is wrong with the question itself comes first.
fn feature(client: &dyn Client, address: u64) -> Result<(), Errno> {
    let command: uapi::DeviceFeature = argument::receive_argsz(client, address)?;
    let flags =
        DeviceFeatureFlags::from_bits(command.flags & !uapi::DEVICE_FEATURE_MASK).ok_or(Errno::INVAL)?;
    let both = DeviceFeatureFlags::GET | DeviceFeatureFlags::SET;
    if flags.contains(both) && !flags.contains(DeviceFeatureFlags::PROBE) {
        return Err(Errno::INVAL);
    }
    Err(Errno::NOTTY)
}

/// Which region a file offset is in, and where.
fn region_of(offset: u64) -> Result<(u32, u64), Errno> {
    if offset & REGION_MAGIC_MASK != REGION_MAGIC {
        return Err(Errno::INVAL);
    }
    let inside = offset & !REGION_MAGIC_MASK;
    let index = u32::try_from(inside >> REGION_SHIFT).map_err(|_| Errno::INVAL)?;
    Ok((index, inside & ((1 << REGION_SHIFT) - 1)))
}

/// The error numbers that Linux has for devices that an owner cannot have.
fn bind_errno(error: &DeviceError) -> Errno {
    match error {
        DeviceError::Unknown(_) => Errno::NODEV,
        DeviceError::Taken(_) => Errno::BUSY,
        DeviceError::NotViable { .. } => Errno::PERM,
    }
}

/// The error numbers that Linux has for refused accesses.
fn access_errno(error: AccessError) -> Errno {
    match error {
        AccessError::NoSuchRegion { .. }
        | AccessError::BeyondRegion { .. }
        | AccessError::ReadOnly { .. } => Errno::INVAL,
        AccessError::BeyondConfigSpace { .. } => Errno::FAULT,
        AccessError::MemoryDecodeOff => Errno::IO,
    }
}
