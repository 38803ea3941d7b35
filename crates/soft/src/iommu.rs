//! The software IOMMU.
//!
//! [`SoftIommu`] implements the engine's [`Iommu`]: it knows a set of devices by their requester IDs and, for
//! each, the table that its DMA goes through. A device walks either the space's native table or a derived one in
//! a hardware format, as it was declared (`iommu/kind.rs`); devices of all kinds may stand side by side on one space, as
//! incompatible devices do on a real machine.
//!
//! The way of a DMA is in `iommu/port.rs`: it reads from top to bottom. What makes it quick is in `iommu/iotlb.rs`.
//!
//! Devices that its [`Topology`] has behind a bridge which speaks for them share one route, as the IOMMU sees one requester ID.
//!
//! A device may also be attached to a table of a guest's over a space (`iommu/port/nested.rs`).
//!
//! Moving a device from one table to another is one atomic exchange of a pointer; then the DMA that went through
//! the old one is waited for.

use ioasid::epoch::{self, Protected};
use ioasid::pasid::Pasid;
use ioasid::{
    AttachError, Bus, DerivedTable, FirstStage, Iommu, PageSize, Requirements, Rid, SliceHandle, Space,
    Table, TableClass,
};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod faults;
mod iotlb;
mod kind;
mod port;
mod topology;

pub use faults::{FAULT_LOG_RECORDS, FaultLog, FaultRecord};
use kind::Kinds;
pub use kind::{TableKind, UnknownTableKind};
pub use port::{
    AtomicOperation, DmaSegment, PartialTransfer, Port, PortBorrowError, PortStatistics, Snooping,
    Translation,
};
pub use topology::{Bridge, Topology, TopologyError};

static IOMMUS: AtomicU64 = AtomicU64::new(0);

/// A software IOMMU and its devices.
#[derive(Debug)]
pub struct SoftIommu {
    id: u64,
    topology: Topology,
    devices: Mutex<HashMap<Rid, Routes>>,
}

/// The routes of a device.
#[derive(Debug)]
struct Routes {
    /// That of requests without a PASID. Devices whose requests have the same requester ID share it.
    plain: Arc<Attachment>,
    /// Those that lead to a table, or that a device model has a port for.
    pasids: HashMap<Pasid, Arc<Attachment>>,
    /// How many there may be before those that nobody uses any more are looked for.
    limit: usize,
}

impl Routes {
    fn pasid(&mut self, pasid: Pasid) -> Arc<Attachment> {
        if let Some(attachment) = self.pasids.get(&pasid) {
            return attachment.clone();
        }
        if self.pasids.len() >= self.limit {
            // Under the lock nobody else can begin to use one.
            self.pasids.retain(|_, attachment| Arc::strong_count(attachment) > 1 || attachment.is_attached());
            self.limit = (2 * self.pasids.len()).max(64);
        }
        let Attachment { kind, no_snoop, ref cookie, .. } = *self.plain;
        let attachment = Arc::new(Attachment::new(kind, no_snoop, cookie.clone()));
        self.pasids.insert(pasid, attachment.clone());
        attachment
    }
}

/// Where one route leads.
#[derive(Debug)]
struct Attachment {
    kind: TableKind,
    /// Whether requests can ask not to snoop.
    no_snoop: bool,
    /// What the device's user calls it; all routes of a device share it. Read where a fault is found, within its section: a device is
    /// blocked before another user has it, so the fault says the cookie of the one whose request it was.
    cookie: Arc<Protected<u64>>,
    /// None: all DMA is refused.
    table: Protected<Table>,
    /// What the device model has borrowed, and perhaps given back.
    slices: Mutex<Slices>,
}

#[derive(Debug, Default)]
struct Slices {
    handles: Vec<SliceHandle>,
    /// How many there may be before those that were given back are looked for.
    limit: usize,
}

impl Attachment {
    fn new(kind: TableKind, no_snoop: bool, cookie: Arc<Protected<u64>>) -> Attachment {
        Attachment { kind, no_snoop, cookie, table: Protected::default(), slices: Mutex::default() }
    }

    fn is_attached(&self) -> bool {
        self.table.load(&epoch::dma()).is_some()
    }

    /// Exchanges the table and waits until nothing goes through the old one.
    fn replace(&self, table: Option<Arc<Table>>) {
        // Through a guest's table nothing is borrowed.
        let plain = table.as_ref().filter(|table| table.nesting().is_none());
        let space = plain.map(|table| table.space().clone());
        if let Some(old) = self.table.replace(table).after_dma() {
            // Copies of memory behind calls leave their sections, and are counted with the space.
            old.wait_for_dma();
            if !space.is_some_and(|space| Arc::ptr_eq(&space, old.space())) {
                let handles = self.take_slices_of(old.space());
                if let Err(error) = SliceHandle::recall_all(&handles) {
                    tracing::warn!(%error, "a device is taken from its space, but its model does not let go");
                }
            }
            // The last reference may go here.
        }
    }

    fn slices(&self) -> MutexGuard<'_, Slices> {
        self.slices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_slices_of(&self, space: &Arc<Space>) -> Vec<SliceHandle> {
        let mut slices = self.slices();
        let (taken, others) = std::mem::take(&mut slices.handles)
            .into_iter()
            .partition(|slice: &SliceHandle| slice.is_of(space));
        slices.handles = others;
        taken
    }

    /// Notes what the device model has borrowed.
    fn note_slice(&self, handle: SliceHandle) {
        let mut slices = self.slices();
        if slices.handles.len() >= slices.limit {
            slices.handles.retain(SliceHandle::is_held);
            slices.limit = (2 * slices.handles.len()).max(64);
        }
        slices.handles.push(handle);
    }
}

/// A device was not plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlugError {
    /// There is one with this requester ID.
    #[error("there is a device {0} already")]
    RidTaken(Rid),
    /// Its requests cannot be told from those of another one, which walks tables of another kind.
    #[error("device {device} cannot walk other tables than {other} does: both make requests as {requester}")]
    SharedRequester {
        /// The device.
        device: Rid,
        /// The other one.
        other: Rid,
        /// The requester ID of both.
        requester: Rid,
    },
}

impl SoftIommu {
    /// An IOMMU without devices, which it will be able to keep apart.
    pub fn new() -> Arc<SoftIommu> {
        SoftIommu::with_topology(Topology::new())
    }

    /// An IOMMU without devices, which will be connected like this.
    pub fn with_topology(topology: Topology) -> Arc<SoftIommu> {
        let id = IOMMUS.fetch_add(1, Ordering::Relaxed);
        Arc::new(SoftIommu { id, topology, devices: Mutex::new(HashMap::new()) })
    }

    fn devices(&self) -> MutexGuard<'_, HashMap<Rid, Routes>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self, rid: Rid) -> Option<Arc<Attachment>> {
        self.devices().get(&rid).map(|routes| routes.plain.clone())
    }

    fn device_with_pasid(&self, rid: Rid, pasid: Pasid) -> Option<Arc<Attachment>> {
        let mut devices = self.devices();
        let routes = devices.get_mut(&rid).filter(|_| !self.topology.is_conventional(rid));
        routes.map(|routes| routes.pasid(pasid))
    }

    /// Plugs a device in; its DMA goes through the port, and is refused until the device is attached.
    pub fn add_device(&self, rid: Rid, kind: TableKind) -> Result<Arc<Port>, PlugError> {
        self.plug(rid, kind, false)
    }

    /// The same with a device whose requests can ask [not to snoop](Port::read_without_snooping) the CPU's caches. On
    /// conventional PCI there is no way to say that, so behind a bridge to it this makes no difference.
    pub fn add_no_snoop_device(&self, rid: Rid, kind: TableKind) -> Result<Arc<Port>, PlugError> {
        self.plug(rid, kind, !self.topology.is_conventional(rid))
    }

    fn plug(&self, rid: Rid, kind: TableKind, no_snoop: bool) -> Result<Arc<Port>, PlugError> {
        let mut devices = self.devices();
        if devices.contains_key(&rid) {
            return Err(PlugError::RidTaken(rid));
        }
        let requester = self.topology.requester(rid);
        let same = devices.iter().find(|(other, _)| self.topology.requester(**other) == requester);
        let plain = match same {
            None => Arc::new(Attachment::new(kind, no_snoop, Arc::default())),
            Some((_, routes)) if routes.plain.kind == kind => routes.plain.clone(),
            Some((other, _)) => {
                return Err(PlugError::SharedRequester { device: rid, other: *other, requester });
            }
        };
        devices.insert(rid, Routes { plain: plain.clone(), pasids: HashMap::new(), limit: 64 });
        Ok(Arc::new(Port::new(requester, None, plain)))
    }

    /// The way of a device's requests with a PASID; they are refused until the device is
    /// [attached with it](ioasid::Device::attach_pasid). `None`: there is no such device, or it is on conventional PCI, where no
    /// request has a PASID.
    pub fn port_with_pasid(&self, rid: Rid, pasid: Pasid) -> Option<Arc<Port>> {
        let attachment = self.device_with_pasid(rid, pasid)?;
        Some(Arc::new(Port::new(rid, Some(pasid), attachment)))
    }

    fn replace(
        &self,
        attachment: Option<Arc<Attachment>>,
        device: Rid,
        table: &Arc<Table>,
    ) -> Result<(), AttachError> {
        let attachment = attachment.ok_or(AttachError::NoDevice(device))?;
        let Kinds { class, snooping_class } = attachment.kind.classes(self.id);
        let nested = match table.class() {
            TableClass::Nested(first_stage) => attachment.kind.first_stages().contains(&first_stage),
            TableClass::Native | TableClass::Derived { .. } => false,
        };
        if !nested && table.class() != class && Some(table.class()) != snooping_class {
            return Err(AttachError::Incompatible);
        }
        attachment.replace(Some(table.clone()));
        Ok(())
    }
}

impl Iommu for SoftIommu {
    fn requirements(&self, device: Rid) -> Option<Requirements> {
        let attachment = self.device(device)?;
        let kind = attachment.kind;
        let Kinds { class, snooping_class } = kind.classes(self.id);
        Some(Requirements {
            class,
            snooping_class,
            aperture: kind.aperture()?,
            reserved: kind.reserved(),
            no_snoop: attachment.no_snoop,
        })
    }

    fn requester(&self, device: Rid) -> Rid {
        self.topology.requester(device)
    }

    fn group(&self, device: Rid) -> Vec<Rid> {
        let devices = self.devices();
        let others = devices.keys().copied().filter(|other| *other != device);
        let mut group: Vec<Rid> =
            others.filter(|other| self.topology.same_group(device, *other)).chain([device]).collect();
        group.sort_unstable();
        group
    }

    fn records_writes(&self, device: Rid) -> bool {
        self.device(device).is_some_and(|attachment| attachment.kind.records_writes())
    }

    fn first_stages(&self, device: Rid) -> &'static [FirstStage] {
        self.device(device).map_or(&[], |attachment| attachment.kind.first_stages())
    }

    fn new_table(
        &self,
        class: TableClass,
        largest_leaf: PageSize,
        _: &Arc<Bus>,
    ) -> Result<Arc<dyn DerivedTable>, AttachError> {
        let table = TableKind::ALL.into_iter().find_map(|kind| {
            let Kinds { class: plain, snooping_class } = kind.classes(self.id);
            let snooping = snooping_class == Some(class);
            (plain == class || snooping).then(|| kind.new_table(largest_leaf, snooping))
        });
        table.flatten().ok_or(AttachError::Incompatible)
    }

    fn attach(&self, device: Rid, table: &Arc<Table>) -> Result<(), AttachError> {
        self.replace(self.device(device), device, table)
    }

    fn set_cookie(&self, device: Rid, cookie: Option<u64>) {
        if let Some(attachment) = self.device(device) {
            drop(attachment.cookie.replace(cookie.map(Arc::new)));
        }
    }

    fn block(&self, device: Rid) {
        if let Some(attachment) = self.device(device) {
            attachment.replace(None);
        }
    }

    fn attach_pasid(&self, device: Rid, pasid: Pasid, table: &Arc<Table>) -> Result<(), AttachError> {
        if self.topology.is_conventional(device) {
            return Err(AttachError::NoPasids(device));
        }
        self.replace(self.device_with_pasid(device, pasid), device, table)
    }

    fn block_pasid(&self, device: Rid, pasid: Pasid) {
        if let Some(attachment) = self.device_with_pasid(device, pasid) {
            attachment.replace(None);
        }
    }
}
