//! A device that is bound to a context: an object of it, and what its DMA is attached to.
//!
//! What a bound device stands for is either a device of the machine, which its file binds and keeps ([`crate::vfio`]), or a
//! mock device that the test-only command has made ([`super::testing`]). Attaching is the same for both. A mock device
//! can use tables of several classes, and the engine knows it as one device for each; at most one of them is attached.
//!
//! Requests without a PASID may go the same way as those of other devices ([`plain`]). Requests with a PASID go their own ways
//! ([`pasid`]).

mod pasid;
mod plain;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ioasid::{Device, Rid, Table};
use rustix::io::Errno;

use self::pasid::PasidRoute;
use self::plain::{Open, Watchers};
use super::Context;
use super::errno::attach_errno;
use super::hwpt::Hwpt;
use super::ioas::{Ioas, TableUse};
use super::objects::{Counted, Held, HeldObject, Object, Users};
use super::testing::MockDevice;
use super::testing::mock::MockTable;
use crate::observer::Watched;
use crate::poison::lock;
use crate::status::{DeviceStatus, Listing, PasidStatus};
use crate::vfio::MachineDevice;

pub(crate) use self::pasid::PasidAttach;
pub(crate) use self::plain::PlainRoute;

/// A device that is bound to a context.
#[derive(Debug)]
pub(crate) struct BoundDevice {
    users: Users,
    behind: Behind,
    /// Where its requests go that have a PASID.
    pasids: Mutex<BTreeMap<u32, PasidRoute>>,
    /// Where those go that have none. Locked after the PASIDs.
    plain: Arc<PlainRoute>,
}

/// What a bound device is.
#[derive(Debug)]
enum Behind {
    Machine { machine: Arc<MachineDevice>, engine: Box<Device> },
    Mock(MockDevice),
}

impl Counted for BoundDevice {
    fn users(&self) -> &Users {
        &self.users
    }
}

impl BoundDevice {
    /// A device of the machine, as the engine sees it.
    pub(crate) fn of_machine(machine: Arc<MachineDevice>, engine: Device) -> Self {
        let plain = Arc::clone(&machine.plain);
        Self::new(Behind::Machine { machine, engine: Box::new(engine) }, plain)
    }

    /// A device that the test-only command has made.
    pub(crate) fn of_test(mock: MockDevice) -> Self {
        Self::new(Behind::Mock(mock), Arc::default())
    }

    fn new(behind: Behind, plain: Arc<PlainRoute>) -> Self {
        Self { users: Users::default(), behind, pasids: Mutex::default(), plain }
    }

    /// The mock device, if it is one.
    pub(crate) fn mock(&self) -> Option<&MockDevice> {
        match &self.behind {
            Behind::Machine { .. } => None,
            Behind::Mock(mock) => Some(mock),
        }
    }

    /// Who watches its requests without a PASID. Nobody watches mock devices: they do no DMA.
    fn watched(&self) -> Option<&Arc<Watched>> {
        match &self.behind {
            Behind::Machine { machine, .. } => machine.watched.as_ref().map(|watched| watched.plain()),
            Behind::Mock(_) => None,
        }
    }

    /// The engine's view of the device, for tables of the kind that it has by default.
    pub(crate) fn engine(&self) -> &Device {
        match &self.behind {
            Behind::Machine { engine, .. } => engine,
            Behind::Mock(mock) => mock.engine(MockTable::Default),
        }
    }

    fn rid(&self) -> Rid {
        self.engine().rid()
    }

    /// Whether tables for the device can record what it writes.
    pub(crate) fn records_writes(&self) -> bool {
        self.engines().iter().any(Device::records_writes)
    }

    fn engines(&self) -> &[Device] {
        match &self.behind {
            Behind::Machine { engine, .. } => std::slice::from_ref(&**engine),
            Behind::Mock(mock) => mock.engines(),
        }
    }

    /// What the device is attached to and how its DMA fared, for the status.
    pub(crate) fn status(&self, id: u32, listing: &mut Listing) -> DeviceStatus {
        let status = match &self.behind {
            Behind::Machine { machine, .. } => machine.status(),
            Behind::Mock(_) => DeviceStatus { path: "mock device".to_owned(), ..DeviceStatus::default() },
        };
        let pasids = lock(&self.pasids);
        let shown = listing.take(pasids.len().min(DeviceStatus::PASIDS_SHOWN));
        let pasid =
            |(&pasid, route): (&u32, &PasidRoute)| PasidStatus { pasid, attached_to: route.hwpt().id() };
        DeviceStatus {
            id,
            attached_to: self.plain.of(self.rid(), Hwpt::id),
            pasid_count: pasids.len(),
            pasids: pasids.iter().take(shown).map(pasid).collect(),
            ..status
        }
    }

    /// Whether the device's IOMMU can do with the table what it was made for.
    fn suits(&self, hwpt: &Hwpt) -> bool {
        !hwpt.tracks_writes() || self.mock().is_none_or(MockDevice::records_writes)
    }

    /// The engine's view of the device for which `table` is.
    fn engine_for(&self, table: &Arc<Table>) -> Result<&Device, Errno> {
        let usable = |engine: &&Device| engine.can_use(table).is_ok();
        self.engines().iter().find(usable).ok_or(Errno::INVAL)
    }

    /// Moves the device's DMA to `table`.
    fn attach_engine(&self, table: &Arc<Table>) -> Result<(), Errno> {
        let engine = self.engine_for(table)?;
        engine.attach(table).map_err(|error| {
            tracing::debug!(%error, "a device is not attached");
            attach_errno(&error)
        })?;
        // A mock device does no DMA, so that it is attached to two tables for a moment has no effect.
        for other in self.engines().iter().filter(|other| !std::ptr::eq(*other, engine)) {
            other.detach();
        }
        Ok(())
    }

    /// Attaches to the object `id` of `context`, or replaces what it, and with it all that has its requester ID, is attached to; returns
    /// the table's number.
    ///
    /// # Errors
    /// `ENOENT`: there is no such object. `EINVAL`: it is none to attach to, or a table that the device cannot use; another device
    /// that cannot be told from it is attached to another one; the device uses PASIDs, and the table is not for them. Those of
    /// [`Ioas::with_table`].
    pub(crate) fn attach(&self, context: &Context, id: u32) -> Result<u32, Errno> {
        let pasids = lock(&self.pasids);
        let uses_pasids = !pasids.is_empty();
        let mut route = self.plain.lock();
        let moving = match &*route {
            Some(open) if open.devices.contains_key(&self.rid()) => open.devices.clone(),
            _ => Watchers::from([(self.rid(), self.watched().cloned())]),
        };
        let joins = route.as_ref().filter(|open| !open.devices.contains_key(&self.rid()));
        let attach = |hwpt: &Arc<Hwpt>, table: &Arc<Table>| match joins {
            Some(open) if !Arc::ptr_eq(open.hwpt.arc(), hwpt) => Err(Errno::INVAL),
            _ => self.attach_engine(table),
        };
        // Until observers have heard of all that changes.
        let _changing: Vec<_> = moving.values().flatten().map(|watched| watched.changing()).collect();
        let hwpt = match context.objects().hold(id)? {
            HeldObject::Hwpt(hwpt) => {
                if !self.suits(&hwpt) || (uses_pasids && !hwpt.is_for_pasids()) {
                    return Err(Errno::INVAL);
                }
                let table = hwpt.table().ok_or(Errno::NOENT)?;
                attach(hwpt.arc(), &table)?;
                hwpt
            }
            // The tables that it makes by itself are not for PASIDs.
            HeldObject::Ioas(_) if uses_pasids => return Err(Errno::INVAL),
            HeldObject::Ioas(ioas) => {
                let mut used = None;
                ioas.with_table(self.engine(), TableUse::Shared, |table, existing| {
                    let (hwpt, new) = match existing {
                        Some(hwpt) => (hwpt, None),
                        None => {
                            let reservation = context.objects().reserve()?;
                            let user = Held::new(ioas.arc()).ok_or(Errno::NOENT)?;
                            let hwpt = Arc::new(Hwpt::new(reservation.id(), Arc::clone(&table), user, true));
                            (Held::new(&hwpt).ok_or(Errno::NOENT)?, Some((reservation, hwpt)))
                        }
                    };
                    attach(hwpt.arc(), &table)?;
                    if let Some((reservation, hwpt)) = new {
                        reservation.install(Object::Hwpt(hwpt));
                    }
                    let made = Arc::clone(hwpt.arc());
                    used = Some(hwpt);
                    Ok(made)
                })?;
                used.ok_or(Errno::NOENT)?
            }
            _ => return Err(Errno::INVAL),
        };
        let number = hwpt.id();
        let ioas = hwpt.ioas();
        let joins = joins.is_some();
        let before = match &mut *route {
            None => {
                *route = Some(Open { hwpt, devices: moving.clone() });
                None
            }
            Some(open) if joins => {
                open.devices.extend(moving.clone());
                None
            }
            Some(open) => Some(std::mem::replace(&mut open.hwpt, hwpt)),
        };
        for watched in moving.values().flatten() {
            tell_moved(watched, before.as_ref().and_then(|hwpt| hwpt.ioas()), ioas.clone());
        }
        if let Some(before) = before {
            context.put_hwpt(before);
        }
        Ok(number)
    }

    /// Blocks all of the device's DMA, with PASIDs too, and lets go of its tables.
    pub(crate) fn end(&self, context: &Context) {
        self.detach_pasids();
        self.detach(context);
        // Whoever looks at the status may keep this for a moment longer, and the next owner need not wait.
        self.engines().iter().for_each(Device::unbind);
    }

    /// Blocks the device's requests without a PASID, unless they may be those of another one that is attached, and lets go of their
    /// table.
    pub(crate) fn detach(&self, context: &Context) {
        let mut route = self.plain.lock();
        let Some(open) = &mut *route else { return };
        let Some(watched) = open.devices.remove(&self.rid()) else { return };
        let changing = watched.as_ref().map(|watched| watched.changing());
        for engine in self.engines() {
            engine.detach();
        }
        if let Some(watched) = &watched {
            tell_moved(watched, open.hwpt.ioas(), None);
        }
        drop(changing);
        if let Some(Open { hwpt, .. }) = route.take_if(|open| open.devices.is_empty()) {
            context.put_hwpt(hwpt);
        }
    }
}

/// Tells that a device has been moved from one address space to another, or has come or gone. Its DMA is kept away, so that it
/// does not matter what else happens to the two meanwhile.
fn tell_moved(watched: &Arc<Watched>, from: Option<Arc<Ioas>>, to: Option<Arc<Ioas>>) {
    let stays = matches!((&from, &to), (Some(from), Some(to)) if Arc::ptr_eq(from, to));
    if let Some(from) = from.filter(|_| !stays) {
        from.forget_watched(watched);
    }
    let Some(to) = to else { return watched.detached() };
    watched.attached();
    if !stays {
        to.add_watched(watched);
    }
}
