//! The machine's IOMMU with the devices that were handed over.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use ioasid::{
    AttachError, Bus, DerivedTable, Iommu, IovaRange, PageSize, Requirements, Rid, Table, TableClass,
    TableError,
};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;

use crate::calls::{Cdev, Iommufd, Ranges};
use crate::kernel::{Kernel, KernelFile};
use crate::registered::{Mapping, Registered};
use crate::sys::Linux;
use crate::table::HostTable;
use crate::{CallError, HostError, OpenError};

static HOSTS: AtomicU64 = AtomicU64::new(0);

/// What can be chosen about a [`Host`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostOptions {
    /// How mappings are made.
    pub mapping: Mapping,
    /// How many areas a table may have, each of which takes the kernel some 400 bytes; a map that needs more is refused.
    pub most_areas: u64,
}

impl Default for HostOptions {
    fn default() -> HostOptions {
        HostOptions { mapping: Mapping::default(), most_areas: 1 << 22 }
    }
}

/// The machine's IOMMU, by way of an open `/dev/iommu`.
///
/// Devices are added by the paths of their VFIO files; then they are the engine's devices like others. What was made in
/// the kernel goes when the tables and the host are dropped.
#[derive(Debug)]
pub struct Host(Arc<Machine>);

/// What tables keep alive: dropped with the last of them, devices first.
#[derive(Debug)]
pub(crate) struct Machine {
    devices: RwLock<HashMap<Rid, Arc<HostDevice>>>,
    /// The apertures of devices that there are. Devices that have the same one share tables.
    apertures: Mutex<Vec<IovaRange>>,
    /// What tables on each bus share.
    registered: Mutex<Vec<(Weak<Bus>, Weak<Registered>)>>,
    iommufd: Arc<Iommufd>,
    kernel: Arc<dyn Kernel>,
    id: u64,
    options: HostOptions,
}

/// A device that was handed over.
#[derive(Debug)]
struct HostDevice {
    cdev: Cdev,
    requirements: Requirements,
    /// What the mappings of its tables must be multiples of.
    alignment: u64,
    /// The address space that it is attached to.
    attached: Mutex<Option<u32>>,
}

impl HostDevice {
    fn attached(&self) -> MutexGuard<'_, Option<u32>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses its DMA.
    fn block(&self, attached: &mut Option<u32>) {
        if attached.take().is_some() {
            // Of a bound device Linux can refuse nothing but arguments that make no sense.
            let detached = self.cdev.detach();
            debug_assert!(detached.is_ok(), "{detached:?}");
        }
    }
}

/// An open device, for whoever drives it: a view of its file, which must not outlive the [`Host`] if the device is to be
/// let go with it.
#[derive(Clone, Debug)]
pub struct DeviceFile(Arc<dyn KernelFile>);

impl DeviceFile {
    /// Reads from a region of the device, at an offset in the file that [`region_offset`](Self::region_offset) leads to;
    /// returns the count of bytes.
    ///
    /// # Errors
    /// That of `pread`.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::retry_on_intr(|| rustix::io::pread(self, &mut *buffer, offset))
    }

    /// Writes likewise.
    ///
    /// # Errors
    /// That of `pwrite`.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::io::retry_on_intr(|| rustix::io::pwrite(self, bytes, offset))
    }

    /// Where a region of the device begins in the file, in bytes.
    ///
    /// # Errors
    /// `EINVAL`: there is no such region.
    pub fn region_offset(&self, index: u32) -> Result<u64, CallError> {
        crate::calls::region_offset(&*self.0, index)
    }
}

impl AsFd for DeviceFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The open `/dev/iommu`, for calls that are not made here. Objects that others make in it are theirs to destroy.
impl AsFd for Host {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.iommufd.as_fd()
    }
}

impl Host {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// [`OpenError`]: there is no such file, or it may not be opened.
    pub fn open(options: HostOptions) -> Result<Arc<Host>, OpenError> {
        Host::over(Arc::new(Linux), options)
    }

    /// The same with somebody in the place of Linux.
    pub(crate) fn over(kernel: Arc<dyn Kernel>, options: HostOptions) -> Result<Arc<Host>, OpenError> {
        let iommufd = Arc::new(Iommufd::open(&*kernel)?);
        Ok(Arc::new(Host(Arc::new(Machine {
            devices: RwLock::default(),
            apertures: Mutex::default(),
            registered: Mutex::default(),
            iommufd,
            kernel,
            id: HOSTS.fetch_add(1, Ordering::Relaxed),
            options,
        }))))
    }

    /// Takes over the device behind a VFIO file, such as `/dev/vfio/devices/vfio0`, which is this host's alone until the host
    /// is gone. From now on its DMA is refused until it is attached.
    ///
    /// Linux attaches devices that it cannot tell apart (of one IOMMU group) to the same table only.
    ///
    /// # Errors
    /// [`OpenError`]: the requester ID is taken, the file cannot be opened, or somebody else has the device.
    pub fn add_device(&self, rid: Rid, path: impl AsRef<Path>) -> Result<DeviceFile, OpenError> {
        let machine = &self.0;
        let mut devices = machine.devices.write().unwrap_or_else(PoisonError::into_inner);
        if devices.contains_key(&rid) {
            return Err(OpenError::RidTaken(rid));
        }
        let cdev = Cdev::open(&*machine.kernel, path.as_ref())?;
        cdev.bind(&machine.iommufd)?;
        let Ranges { usable, alignment } = machine.ranges_of(&cdev)?;
        let requirements = machine.requirements_of(&usable).ok_or(OpenError::NoAddresses)?;
        let file = DeviceFile(cdev.0.clone());
        let device = HostDevice { cdev, requirements, alignment, attached: Mutex::new(None) };
        devices.insert(rid, Arc::new(device));
        Ok(file)
    }
}

impl Machine {
    pub(crate) fn iommufd(&self) -> &Iommufd {
        &self.iommufd
    }

    pub(crate) fn options(&self) -> &HostOptions {
        &self.options
    }

    /// What all tables on a bus share.
    pub(crate) fn registered(&self, bus: &Arc<Bus>) -> Result<Arc<Registered>, CallError> {
        let mut all = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, registered)| registered.strong_count() > 0);
        let of_bus = |(known, registered): &(Weak<Bus>, Weak<Registered>)| {
            registered.upgrade().filter(|_| std::ptr::eq(known.as_ptr(), Arc::as_ptr(bus)))
        };
        if let Some(registered) = all.iter().find_map(of_bus) {
            return Ok(registered);
        }
        let registered = Registered::new(self.iommufd.clone(), bus, self.options.mapping)?;
        all.push((Arc::downgrade(bus), Arc::downgrade(&registered)));
        Ok(registered)
    }

    fn device(&self, rid: Rid) -> Option<Arc<HostDevice>> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).get(&rid).cloned()
    }

    /// What can be mapped for a device. Linux says so of an address space that the device is attached to; an empty one is.
    fn ranges_of(&self, cdev: &Cdev) -> Result<Ranges, CallError> {
        let ioas = self.iommufd.alloc()?;
        let ranges = cdev.attach(ioas).and_then(|()| {
            let ranges = self.iommufd.ranges(ioas);
            cdev.detach().and(ranges)
        });
        let destroyed = self.iommufd.destroy(ioas);
        ranges.and_then(|ranges| destroyed.map(|()| ranges))
    }

    /// What the engine has to know of a device with these usable addresses; `None` if there are none.
    fn requirements_of(&self, usable: &[IovaRange]) -> Option<Requirements> {
        let aperture = IovaRange::new(usable.first()?.first(), usable.last()?.last())?;
        let holes = usable.windows(2).filter_map(|pair| {
            IovaRange::new(pair[0].last().checked_add(1)?, pair[1].first().checked_sub(1)?)
        });
        let mut apertures = self.apertures.lock().unwrap_or_else(PoisonError::into_inner);
        let variant = apertures.iter().position(|known| *known == aperture).unwrap_or_else(|| {
            apertures.push(aperture);
            apertures.len() - 1
        });
        Some(Requirements {
            class: TableClass::Derived { iommu: self.id, format: FORMAT, variant: variant as u64 },
            aperture,
            reserved: holes.collect(),
            // VFIO has devices snoop where the platform can tell them to, and Linux does not say where it cannot.
            snooping_class: None,
            no_snoop: false,
        })
    }

    /// Detaches every device that is attached to an address space.
    pub(crate) fn detach_all_from(&self, ioas: u32) {
        let devices: Vec<_> =
            self.devices.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for device in devices {
            let mut attached = device.attached();
            if *attached == Some(ioas) {
                device.block(&mut attached);
            }
        }
    }
}

/// The name of what Linux makes of an address space, whatever that is.
const FORMAT: &str = "iommufd";

impl Iommu for Host {
    fn requirements(&self, device: Rid) -> Option<Requirements> {
        Some(self.0.device(device)?.requirements.clone())
    }

    fn new_table(
        &self,
        class: TableClass,
        largest_leaf: PageSize,
        bus: &Arc<Bus>,
    ) -> Result<Arc<dyn DerivedTable>, AttachError> {
        match class {
            TableClass::Derived { iommu, format: FORMAT, .. } if iommu == self.0.id => {
                let table = HostTable::new(self.0.clone(), largest_leaf, bus).map_err(refused)?;
                Ok(Arc::new(table))
            }
            _ => Err(AttachError::Incompatible),
        }
    }

    fn attach(&self, rid: Rid, table: &Arc<Table>) -> Result<(), AttachError> {
        let device = self.0.device(rid).ok_or(AttachError::NoDevice(rid))?;
        let derived = table.derived().and_then(|derived| derived.as_any().downcast_ref::<HostTable>());
        let derived = derived.filter(|derived| derived.is_of(&self.0)).ok_or(AttachError::Incompatible)?;
        if table.space().granule().bytes() < device.alignment {
            return Err(AttachError::Incompatible);
        }
        let mut attached = device.attached();
        derived.usable().map_err(refused)?;
        // If Linux refuses, the device stays where it was.
        device.cdev.attach(derived.ioas()).map_err(|error| match error.errno {
            Errno::INVAL => AttachError::Incompatible,
            _ => refused(error),
        })?;
        *attached = Some(derived.ioas());
        Ok(())
    }

    fn block(&self, rid: Rid) {
        if let Some(device) = self.0.device(rid) {
            device.block(&mut device.attached());
        }
    }
}

fn refused(error: impl Into<HostError>) -> AttachError {
    AttachError::Table(TableError::Refused(Box::new(error.into())))
}
