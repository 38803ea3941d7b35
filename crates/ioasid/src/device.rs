//! Devices, and where their DMA goes.
//!
//! A request of a device has the device's requester ID, and may have a PASID beside it. Each (RID) and each (RID, PASID) is a
//! *route*: it leads to one table, or nowhere. An address space has nothing to do with either number; attaching is what
//! chooses the route.
//!
//! # No route has two owners
//!
//! There is one [`Device`] for a requester ID of an IOMMU at any time, and its routes are changed through it alone, one change
//! after the other. A PASID that a device uses for one table is not used for a second one: who wants another table there says
//! so ([`Device::replace_pasid`]), and the device's DMA goes through the one or the other, without a moment of neither or both.
//! As long as a route has a PASID it holds the PASID's binding, so the PASID is not given out anew.
//!
//! # Whose fault
//!
//! Who binds a device can give it a *cookie*, a number that means something to its user ([`Device::with_cookie`]). The IOMMU is
//! told beforehand, and says it in what it reports of the device, together with the [space](crate::Space::id): so a fault
//! finds its way to whoever has to hear of it without anybody looking up what a requester ID stands for at the moment.
//!
//! # Whose numbers
//!
//! Whoever drives the device, a guest perhaps, has numbers of its own for address spaces. A device model is asked to use such a
//! number, and finds the PASID that stands for it at this device ([`Device::pasid`]): the numbers of two devices, or of two
//! guests, have nothing to do with each other.

use crate::group::{DeviceOwner, Group, InTheWay, Membership};
use crate::iommu::{AttachError, Coherency, Iommu, Requirements, Rid, TableClass};
use crate::pasid::{Pasid, PasidBinding, Spid};
use crate::route::{PasidRoutes, Reservations, Route};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::table::Table;
use std::fmt;
use std::sync::Arc;

/// A device behind an IOMMU, bound to its owner. Blocked until it is attached, and again when this is dropped.
///
/// Of devices that share a requester ID all are attached as soon as one is; see [`Device::bind`].
pub struct Device {
    owner: DeviceOwner,
    group: Arc<Group>,
    iommu: Arc<dyn Iommu>,
    rid: Rid,
    requirements: Requirements,
    cookie: Option<u64>,
    routes: Mutex<Routes>,
}

/// Why there is no such [`Device`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The IOMMU does not know it.
    #[error("the IOMMU has no device {0}")]
    Unknown(Rid),
    /// There is one, which somebody has.
    #[error("device {0} is in somebody's hands already")]
    Taken(Rid),
    /// The device's group is not viable: another device of it, or the device itself, is in hands that this would not go
    /// together with.
    #[error("device {device} cannot be had: {member}, in its group, {because}")]
    NotViable {
        /// The device that was wanted.
        device: Rid,
        /// The device in the way.
        member: Rid,
        /// What that is doing.
        because: InTheWay,
    },
}

struct Routes {
    /// Its place in its group, until it is unbound. The route of requests without a PASID is there: it may move with others.
    membership: Option<Membership>,
    pasids: PasidRoutes,
    reservations: Reservations,
}

impl Device {
    /// The device with this requester ID, blocked, and whatever else is in its group: for an owner that has no other
    /// device of the group. [`bind`](Self::bind) is for several.
    ///
    /// # Errors
    /// Those of [`bind`](Self::bind).
    pub fn new(iommu: Arc<dyn Iommu>, rid: Rid) -> Result<Device, DeviceError> {
        Device::bind(iommu, rid, &DeviceOwner::new("an owner without a name"))
    }

    /// The device with this requester ID, for an owner, who may have other devices of its group too.
    ///
    /// It is blocked, and so is every other device of the group that is not attached. If the device's requests cannot be told
    /// from those of one that is, they go where its requests go.
    ///
    /// ```
    /// # use ioasid::{Device, DeviceOwner, Iommu, Rid};
    /// # use std::sync::Arc;
    /// # fn example(iommu: &Arc<dyn Iommu>, [one, other]: [Rid; 2]) -> Result<(), Box<dyn std::error::Error>> {
    /// // Two devices of one group.
    /// let guest = DeviceOwner::new("the guest");
    /// let one = Device::bind(iommu.clone(), one, &guest)?;
    /// let refused = Device::bind(iommu.clone(), other, &DeviceOwner::new("somebody else")).unwrap_err();
    /// assert!(refused.to_string().contains("is bound by the guest"));
    ///
    /// let other = Device::bind(iommu.clone(), other, &guest)?;
    /// assert_eq!(one.group(), other.group());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The IOMMU has no such device; there is a `Device` for it; or its group is not viable, and says why.
    pub fn bind(iommu: Arc<dyn Iommu>, rid: Rid, owner: &DeviceOwner) -> Result<Device, DeviceError> {
        let requirements = iommu.requirements(rid).ok_or(DeviceError::Unknown(rid))?;
        let membership = Membership::bind(&iommu, rid, &requirements, owner)?;
        let (owner, group) = (owner.clone(), Arc::clone(membership.group()));
        let routes = Routes {
            membership: Some(membership),
            pasids: PasidRoutes::default(),
            reservations: Reservations::default(),
        };
        Ok(Device { owner, group, iommu, rid, requirements, cookie: None, routes: Mutex::new(routes) })
    }

    /// The device with a number of its user's, which its IOMMU's reports say: faults of the software IOMMU, for one.
    ///
    /// Devices that share a requester ID cannot be told apart, so reports say a cookie only while all of them that are bound have
    /// the same: who wants to hear of such devices gives it to each.
    ///
    /// ```
    /// # use ioasid::{Device, Iommu, Rid};
    /// # use std::sync::Arc;
    /// # fn example(iommu: &Arc<dyn Iommu>) -> Result<(), Box<dyn std::error::Error>> {
    /// // The guest calls its third device 0x18.
    /// let device = Device::new(iommu.clone(), Rid(8))?.with_cookie(0x18);
    /// assert_eq!(device.cookie(), Some(0x18));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_cookie(mut self, cookie: u64) -> Device {
        self.cookie = Some(cookie);
        if let Some(membership) = &self.routes().membership {
            membership.set_cookie(cookie);
        }
        self
    }

    /// The number that [`with_cookie`](Self::with_cookie) has given it.
    pub fn cookie(&self) -> Option<u64> {
        self.cookie
    }

    /// Whose it is.
    pub fn owner(&self) -> &DeviceOwner {
        &self.owner
    }

    /// The devices that it cannot be kept apart from, itself included, as they were when the first of them was taken.
    pub fn group(&self) -> &[Rid] {
        self.group.members()
    }

    /// Its requester ID.
    pub fn rid(&self) -> Rid {
        self.rid
    }

    /// What it asks of a space.
    pub fn requirements(&self) -> &Requirements {
        &self.requirements
    }

    /// Whether its tables can [record what it writes](Table::record_writes).
    pub fn records_writes(&self) -> bool {
        self.iommu.records_writes(self.rid)
    }

    /// What the device's tables promise unless something else is asked for: that its accesses are coherent, if that can be
    /// had.
    pub fn coherency(&self) -> Coherency {
        match self.class_for(Coherency::Enforced) {
            Some(_) => Coherency::Enforced,
            None => Coherency::AsRequested,
        }
    }

    /// The kind of table that serves the device and keeps this promise; `None` if there is none.
    pub(crate) fn class_for(&self, coherency: Coherency) -> Option<TableClass> {
        match coherency {
            Coherency::Enforced if self.requirements.no_snoop => self.requirements.snooping_class,
            Coherency::Enforced | Coherency::AsRequested => Some(self.requirements.class),
        }
    }

    /// Whether the device can be attached to the table, as far as that depends on the kinds of both.
    pub fn can_use(&self, table: &Table) -> Result<(), AttachError> {
        self.requirements.are_met_by(table, self.rid, &*self.iommu)
    }

    pub(crate) fn iommu(&self) -> &Arc<dyn Iommu> {
        &self.iommu
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches the device's requests without a PASID to a table, or moves them there in one step from the one that they are
    /// attached to. On an error they stay where they were.
    ///
    /// Requests of devices that share the requester ID go the same way. Moving the device moves what is attached of its group to the
    /// same table, all or none, unless its owner [accepts](DeviceOwner::accepting_peers) that they are apart and they have
    /// requester IDs of their own.
    ///
    /// # Errors
    /// The table is not for the device or for one that would move with it, or something is mapped where one of them can have no
    /// mapping; or another device of the group is attached where that does not go together with this, and is named. (A device that
    /// an IOMMU has moved, and refuses to move back when the next one fails, is blocked, and has no [`table`](Self::table).)
    pub fn attach(&self, table: &Arc<Table>) -> Result<(), AttachError> {
        let mut routes = self.routes();
        let Routes { membership, reservations, .. } = &mut *routes;
        let membership = membership.as_ref().ok_or(AttachError::Unbound(self.rid))?;
        membership.attach(table, || self.route(reservations, table))
    }

    /// Blocks the device's requests without a PASID; when this returns, none is running. Nothing happens if they are not attached.
    ///
    /// As long as another device is attached that shares the requester ID, requests with that ID go on.
    pub fn detach(&self) {
        if let Some(membership) = &self.routes().membership {
            membership.detach();
        }
    }

    /// Gives the device back, as dropping it does: for an owner who cannot tell whether somebody is still looking at it. All its
    /// requests are blocked, and somebody else may bind it. From now on it cannot be attached.
    pub fn unbind(&self) {
        let mut routes = self.routes();
        if let Some(membership) = &routes.membership {
            membership.detach();
        }
        for (binding, route) in routes.pasids.take() {
            self.iommu.block_pasid(self.rid, binding.pasid());
            drop(route);
        }
        routes.membership = None;
    }

    /// The table that requests without a PASID are attached to.
    pub fn table(&self) -> Option<Arc<Table>> {
        self.routes().membership.as_ref()?.table()
    }

    /// Attaches the device's requests with a PASID to a table. `number` is what the device's user calls the PASID, at this device.
    /// The route keeps the binding until it is [detached](Self::detach_pasid).
    ///
    /// ```
    /// # use ioasid::pasid::{Limit, Owner, PasidState, PasidSystem, Spid};
    /// # use ioasid::{AttachError, Bus, Device, Iommu, Space, Table};
    /// # fn example(device: &Device) -> Result<(), Box<dyn std::error::Error>> {
    /// let system = PasidSystem::new(1 << 20)?;
    /// let guest = system.create_set(Owner::Machine(7), 100, &Limit::new(&system, "guests", None))?;
    /// let pasid = guest.allocate(1..=u32::MAX, 0)?;
    ///
    /// // The guest has a process whose address space it calls 5.
    /// let process = Space::new(&Bus::new());
    /// let number = Spid::new(5).unwrap();
    /// device.attach_pasid(number, guest.bind(pasid)?, &Table::for_device(&process, device)?)?;
    /// assert_eq!(device.pasid(number), Some(pasid));
    /// assert_eq!(guest.lookup(pasid)?.state, PasidState::Active);
    ///
    /// // It ends. When this has returned, no DMA for it is running.
    /// device.detach_pasid(number);
    /// assert_eq!(guest.lookup(pasid)?.state, PasidState::Idle);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The device uses the number, or the PASID under another number; it is unbound, has no PASIDs, or shares its requester ID; it is
    /// not isolated from other devices, and its owner has not accepted that; or the table is not for it.
    pub fn attach_pasid(
        &self,
        number: Spid,
        binding: PasidBinding,
        table: &Arc<Table>,
    ) -> Result<(), AttachError> {
        let mut routes = self.routes();
        let pasid = binding.pasid();
        if let Some((pasid, number)) = routes.pasids.taken(number, pasid) {
            return Err(AttachError::PasidTaken { device: self.rid, pasid, number });
        }
        routes.membership.as_ref().ok_or(AttachError::Unbound(self.rid))?.check_pasids()?;
        let route = self.route(&mut routes.reservations, table)?;
        self.iommu.attach_pasid(self.rid, pasid, table)?;
        routes.pasids.insert(number, binding, route);
        Ok(())
    }

    /// Moves the device's requests with a PASID from the table that they are attached to to another one, in one step. On an
    /// error they stay where they were.
    ///
    /// # Errors
    /// The device has no PASID of this number, or the table is not for it.
    pub fn replace_pasid(&self, number: Spid, table: &Arc<Table>) -> Result<(), AttachError> {
        let mut routes = self.routes();
        let missing = AttachError::NoSuchPasid { device: self.rid, number };
        let pasid = routes.pasids.pasid(number).ok_or(missing)?;
        let new = self.route(&mut routes.reservations, table)?;
        self.iommu.attach_pasid(self.rid, pasid, table)?;
        drop(routes.pasids.replace(number, new));
        Ok(())
    }

    /// Blocks the device's requests with a PASID. When this returns, none is running, and the binding has gone; `false` if
    /// there was no PASID of this number.
    pub fn detach_pasid(&self, number: Spid) -> bool {
        let mut routes = self.routes();
        let Some((binding, route)) = routes.pasids.remove(number) else { return false };
        self.iommu.block_pasid(self.rid, binding.pasid());
        drop(route);
        true
    }

    /// The PASID that the device puts into requests for what its user calls `number`.
    pub fn pasid(&self, number: Spid) -> Option<Pasid> {
        self.routes().pasids.pasid(number)
    }

    /// The table that requests with the PASID of this number are attached to.
    pub fn table_of_pasid(&self, number: Spid) -> Option<Arc<Table>> {
        self.routes().pasids.table(number).cloned()
    }

    /// A route to `table`, which the IOMMU has yet to be told.
    fn route(&self, reservations: &mut Reservations, table: &Arc<Table>) -> Result<Route, AttachError> {
        self.can_use(table)?;
        let reserved = reservations.of(table.space(), &self.requirements.reserved)?;
        Ok(Route { table: table.clone(), reserved })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.unbind();
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("rid", &self.rid)
            .field("owner", self.owner())
            .field("cookie", &self.cookie)
            .field("requirements", &self.requirements)
            .finish_non_exhaustive()
    }
}
