//! Where requests of a device go, and what the spaces that they go to keep free for it.
//!
//! A device may have many routes into one space and one route into each of many: a guest's processes are thousands. So nothing
//! here is looked for by going through all routes of the device. What a space keeps free for it is shared by all that lead there.

use crate::iommu::AttachError;
use crate::pasid::{Pasid, PasidBinding, Spid};
use crate::space::{ReservationOwner, Space, SpaceId};
use crate::table::Table;
use ioasid_pagetable::IovaRange;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

static RESERVATIONS: AtomicU64 = AtomicU64::new(0);

/// How many spaces are remembered before those that no route leads to any more are looked for.
const FEW_SPACES: usize = 64;

/// Where a route leads.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) table: Arc<Table>,
    /// Held for as long as the route lasts.
    pub(crate) reserved: Arc<Reserved>,
}

/// That a space keeps a device's reserved addresses free.
#[derive(Debug)]
pub(crate) struct Reserved {
    space: Arc<Space>,
    owner: ReservationOwner,
}

impl Reserved {
    /// Keeps addresses of a space free for a device.
    fn new(space: &Arc<Space>, ranges: &[IovaRange]) -> Result<Arc<Reserved>, AttachError> {
        let owner = ReservationOwner::Device(RESERVATIONS.fetch_add(1, Ordering::Relaxed));
        space.reserve_all(ranges, owner)?;
        Ok(Arc::new(Reserved { space: Arc::clone(space), owner }))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.space.unreserve(self.owner);
    }
}

impl Route {
    /// Where the route leads when it is moved to `table` together with another device's, whose own [`Reservations`] are not at hand.
    pub(crate) fn moved(&self, table: &Arc<Table>, ranges: &[IovaRange]) -> Result<Route, AttachError> {
        let stays = Arc::ptr_eq(&self.reserved.space, table.space());
        let reserved = if stays { self.reserved.clone() } else { Reserved::new(table.space(), ranges)? };
        Ok(Route { table: table.clone(), reserved })
    }
}

/// What spaces keep free for a device: a space's list is as long as it has devices, however many routes those have.
#[derive(Debug, Default)]
pub(crate) struct Reservations {
    /// Some may have gone.
    by_space: HashMap<SpaceId, Weak<Reserved>>,
    limit: usize,
}

impl Reservations {
    /// Keeps addresses of a space free, unless it does for another route of the device.
    pub(crate) fn of(
        &mut self,
        space: &Arc<Space>,
        ranges: &[IovaRange],
    ) -> Result<Arc<Reserved>, AttachError> {
        if let Some(reserved) = self.by_space.get(&space.id()).and_then(Weak::upgrade) {
            return Ok(reserved);
        }
        let reserved = Reserved::new(space, ranges)?;
        if self.by_space.len() >= self.limit {
            self.by_space.retain(|_, reserved| reserved.strong_count() > 0);
            self.limit = (2 * self.by_space.len()).max(FEW_SPACES);
        }
        self.by_space.insert(space.id(), Arc::downgrade(&reserved));
        Ok(reserved)
    }
}

/// The routes of a device's requests with PASIDs, by what its user calls them.
#[derive(Debug, Default)]
pub(crate) struct PasidRoutes {
    routes: BTreeMap<Spid, (PasidBinding, Route)>,
    /// What each PASID is called.
    numbers: BTreeMap<Pasid, Spid>,
}

impl PasidRoutes {
    /// The PASID that is in the way of another route with this number and PASID, and what it is called.
    pub(crate) fn taken(&self, number: Spid, pasid: Pasid) -> Option<(Pasid, Spid)> {
        let by_number = self.pasid(number).map(|taken| (taken, number));
        by_number.or_else(|| self.numbers.get(&pasid).map(|number| (pasid, *number)))
    }

    /// Adds a route that nothing is in the way of.
    pub(crate) fn insert(&mut self, number: Spid, binding: PasidBinding, route: Route) {
        self.numbers.insert(binding.pasid(), number);
        self.routes.insert(number, (binding, route));
    }

    /// Sends the requests elsewhere; the former route, if there is one of this number.
    pub(crate) fn replace(&mut self, number: Spid, route: Route) -> Option<Route> {
        self.routes.get_mut(&number).map(|(_, former)| std::mem::replace(former, route))
    }

    pub(crate) fn remove(&mut self, number: Spid) -> Option<(PasidBinding, Route)> {
        let (binding, route) = self.routes.remove(&number)?;
        self.numbers.remove(&binding.pasid());
        Some((binding, route))
    }

    /// Takes all of them.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = (PasidBinding, Route)> + use<> {
        std::mem::take(self).routes.into_values()
    }

    pub(crate) fn pasid(&self, number: Spid) -> Option<Pasid> {
        self.routes.get(&number).map(|(binding, _)| binding.pasid())
    }

    pub(crate) fn table(&self, number: Spid) -> Option<&Arc<Table>> {
        self.routes.get(&number).map(|(_, route)| &route.table)
    }
}
