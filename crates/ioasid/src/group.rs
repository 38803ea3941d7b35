//! Devices that cannot be kept apart, and who may have them.
//!
//! An IOMMU tells devices apart by the requester IDs of their requests, and it sees only requests that come past it. Devices
//! behind a bridge that puts its own ID on their requests are one device to it; devices that reach each other without passing
//! it are not isolated from each other, whatever their tables say. Such devices form a *group*. What the groups are is a fact
//! of the machine, which its IOMMU tells ([`Iommu::group`], [`Iommu::requester`]).
//!
//! # Who may have them
//!
//! Whoever has one device of a group can reach the others, or be reached by them. So all devices of a group that are
//! [bound](crate::Device::bind) have the same [owner](DeviceOwner), and while any is, no driver that does DMA has another
//! one. A group in which something is in the way of that is *not viable*: the bind is refused, and says which device it is
//! and what it is doing ([`DeviceError::NotViable`]).
//!
//! The engine keeps one register of who has which device, and asks it for each member of the group in one step. There is no
//! object for a group that anybody would have to open first, as VFIO's users have to; a device alone is a group of one.
//!
//! # Blocked until attached
//!
//! Binding a device blocks the requests of its whole group, but for those that are attached already: the group has the same
//! owner. Devices whose requests have the same ID have one route. As soon as one of them is attached, the requests of all
//! of them go there, and until it is detached none can be attached elsewhere.
//!
//! # Moving together
//!
//! Devices that must be in one place can only leave it together. So a device that is attached to another table takes along what
//! is attached of its group to the one that it leaves, all or none: a device whose owner accepts that others are elsewhere takes only
//! those whose requests have the same ID. First it is made sure that each of them can use the new table and keeps its reserved
//! addresses there, then one is moved after the other, and if the IOMMU refuses one, those before it are sent back. DMA of
//! each goes through the one table or the other all the time. Nobody but the group's owner is concerned, and each device can be
//! detached for itself, wherever it was taken.
//!
//! # Whose fault it was
//!
//! An IOMMU that reports a fault knows a requester ID. What the device's user has given when it was bound, its
//! [cookie](crate::Device::with_cookie), is told to the IOMMU beforehand, so that a report needs no look-up and no lock. Of
//! several devices with one requester ID nobody knows which it was: then the cookie is said on which all that are bound agree,
//! and none if they do not.

use crate::device::DeviceError;
use crate::iommu::{AttachError, Iommu, Requirements, Rid};
use crate::route::Route;
use crate::sync::{Mutex, MutexGuard, PoisonError, global};
use crate::table::Table;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

global! {
    /// Who has which device, by the IOMMU's address. Whoever has one keeps its IOMMU alive, and with it the address its own.
    static TAKEN: Mutex<BTreeMap<(usize, Rid), Taken>> = Mutex::new(BTreeMap::new());
}

/// Whose devices are: the security object behind them, such as an open `/dev/iommu`.
///
/// Equal are this and its clones, whatever the names.
#[derive(Clone)]
pub struct DeviceOwner(Arc<OwnerFacts>);

#[derive(Debug)]
struct OwnerFacts {
    name: String,
    accepts_peers: bool,
}

impl DeviceOwner {
    /// A new owner. The name is for people: it is how a refused bind says who is in the way.
    pub fn new(name: impl Into<String>) -> DeviceOwner {
        DeviceOwner(Arc::new(OwnerFacts { name: name.into(), accepts_peers: false }))
    }

    /// A new owner that attaches devices of one group to different address spaces, and so accepts that they reach each other
    /// past their tables. Devices that share a requester ID still have one route.
    pub fn accepting_peers(name: impl Into<String>) -> DeviceOwner {
        DeviceOwner(Arc::new(OwnerFacts { name: name.into(), accepts_peers: true }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }
}

impl PartialEq for DeviceOwner {
    fn eq(&self, other: &DeviceOwner) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for DeviceOwner {}

impl fmt::Debug for DeviceOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a device is doing that is in the way of another one of its group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InTheWay {
    /// It is bound.
    #[error("is bound by {owner}; unbind it there, or bind all devices of the group with one owner")]
    Bound {
        /// The owner's name.
        owner: String,
    },
    /// A driver of the machine has it.
    #[error("is driven by {driver}; take it from that driver first")]
    Driven {
        /// The driver's name.
        driver: String,
    },
}

/// Why somebody has a device.
#[derive(Clone)]
enum Claim {
    Bound(DeviceOwner),
    Driven { driver: String, does_dma: bool },
}

impl Claim {
    /// Whether two devices of a group can be had like this at the same time.
    fn goes_with(&self, other: &Claim) -> bool {
        match (self, other) {
            (Claim::Bound(one), Claim::Bound(other)) => one == other,
            (Claim::Bound(_), Claim::Driven { does_dma, .. })
            | (Claim::Driven { does_dma, .. }, Claim::Bound(_)) => !does_dma,
            (Claim::Driven { .. }, Claim::Driven { .. }) => true,
        }
    }

    fn in_the_way(&self) -> InTheWay {
        match self {
            Claim::Bound(owner) => InTheWay::Bound { owner: owner.name().to_owned() },
            Claim::Driven { driver, .. } => InTheWay::Driven { driver: driver.clone() },
        }
    }
}

struct Taken {
    claim: Claim,
    group: Arc<Group>,
}

fn taken() -> MutexGuard<'static, BTreeMap<(usize, Rid), Taken>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(iommu: &Arc<dyn Iommu>, rid: Rid) -> (usize, Rid) {
    (Arc::as_ptr(iommu).cast::<()>().addr(), rid)
}

/// Enters a claim to a device, if that goes with all others to devices of its group.
fn take(iommu: &Arc<dyn Iommu>, rid: Rid, claim: Claim) -> Result<Arc<Group>, DeviceError> {
    let members = iommu.group(rid);
    let mut taken = taken();
    let mut group = None;
    for member in &members {
        let Some(other) = taken.get(&key(iommu, *member)) else { continue };
        if *member == rid && matches!(other.claim, Claim::Bound(_)) {
            return Err(DeviceError::Taken(rid));
        }
        if *member == rid || !claim.goes_with(&other.claim) {
            let because = other.claim.in_the_way();
            return Err(DeviceError::NotViable { device: rid, member: *member, because });
        }
        group = Some(Arc::clone(&other.group));
    }
    let group = group.unwrap_or_else(|| Arc::new(Group { members, bound: Mutex::default() }));
    taken.insert(key(iommu, rid), Taken { claim, group: Arc::clone(&group) });
    Ok(group)
}

fn give_back(iommu: &Arc<dyn Iommu>, rid: Rid) {
    taken().remove(&key(iommu, rid));
}

/// A group of which somebody has a device.
#[derive(Debug)]
pub(crate) struct Group {
    members: Vec<Rid>,
    /// Those that are bound. Held while a member comes, goes, is attached or is detached.
    bound: Mutex<BTreeMap<Rid, Bound>>,
}

/// A member that is bound.
#[derive(Debug)]
struct Bound {
    requester: Rid,
    requirements: Requirements,
    cookie: Option<u64>,
    /// Where requests without a PASID go, if it is attached.
    route: Option<Route>,
}

impl Bound {
    /// The table that it is attached to.
    fn table(&self) -> Option<&Arc<Table>> {
        self.route.as_ref().map(|route| &route.table)
    }
}

/// A device's place in its group, from when it is bound until it is unbound.
pub(crate) struct Membership {
    iommu: Arc<dyn Iommu>,
    rid: Rid,
    requester: Rid,
    owner: DeviceOwner,
    group: Arc<Group>,
}

impl Membership {
    /// Binds a device, and blocks all requests of its group that are not attached.
    pub(crate) fn bind(
        iommu: &Arc<dyn Iommu>,
        rid: Rid,
        requirements: &Requirements,
        owner: &DeviceOwner,
    ) -> Result<Membership, DeviceError> {
        let group = take(iommu, rid, Claim::Bound(owner.clone()))?;
        let requester = iommu.requester(rid);
        let membership = Membership { iommu: Arc::clone(iommu), rid, requester, owner: owner.clone(), group };
        let mut bound = membership.group.bound();
        membership.group.block_idle(iommu, &bound);
        let requirements = requirements.clone();
        bound.insert(rid, Bound { requester, requirements, cookie: None, route: None });
        membership.tell_cookie(&bound);
        drop(bound);
        Ok(membership)
    }

    /// Has the IOMMU say this of the device's requests, unless they may be another device's.
    pub(crate) fn set_cookie(&self, cookie: u64) {
        let mut bound = self.group.bound();
        if let Some(own) = bound.get_mut(&self.rid) {
            own.cookie = Some(cookie);
        }
        self.tell_cookie(&bound);
    }

    /// Tells the IOMMU on what cookie all agree whose requests have this ID.
    fn tell_cookie(&self, bound: &BTreeMap<Rid, Bound>) {
        let same = bound.values().filter(|other| other.requester == self.requester);
        let mut cookies = same.map(|other| other.cookie);
        let first = cookies.next().flatten();
        self.iommu.set_cookie(self.rid, first.filter(|_| cookies.all(|cookie| cookie == first)));
    }

    pub(crate) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// The table that the device is attached to.
    pub(crate) fn table(&self) -> Option<Arc<Table>> {
        self.group.bound().get(&self.rid).and_then(Bound::table).cloned()
    }

    /// Attaches the device to a table, with a route that is made when the group agrees, or moves it there with all that have to move
    /// along. No other device of the group is attached meanwhile.
    pub(crate) fn attach(
        &self,
        table: &Arc<Table>,
        own_route: impl FnOnce() -> Result<Route, AttachError>,
    ) -> Result<(), AttachError> {
        let mut bound = self.group.bound();
        let along = self.taken_along(&bound, table)?;
        let mut routes = vec![(self.rid, own_route()?)];
        for (other, its, route) in along {
            its.requirements.are_met_by(table, other, &*self.iommu)?;
            routes.push((other, route.moved(table, &its.requirements.reserved)?));
        }
        for (moved, (rid, _)) in routes.iter().enumerate() {
            if let Err(error) = self.iommu.attach(*rid, table) {
                self.send_back(&mut bound, &routes[..moved]);
                return Err(error);
            }
        }
        let moved = routes.into_iter();
        let former: Vec<Option<Route>> =
            moved.map(|(rid, route)| bound.get_mut(&rid).and_then(|its| its.route.replace(route))).collect();
        drop(bound);
        // With their tables, perhaps, and what was reserved.
        drop(former);
        Ok(())
    }

    /// What has to move along when the device is attached to a table.
    fn taken_along<'a>(
        &self,
        bound: &'a BTreeMap<Rid, Bound>,
        table: &Arc<Table>,
    ) -> Result<Vec<(Rid, &'a Bound, &'a Route)>, AttachError> {
        let own = bound.get(&self.rid).and_then(Bound::table);
        let leaves = own.filter(|own| !Arc::ptr_eq(own, table));
        let mut along = Vec::new();
        for (&other, its) in bound.iter().filter(|(other, _)| **other != self.rid) {
            let Some(route) = &its.route else { continue };
            let device = self.rid;
            let inseparable = its.requester == self.requester;
            let together = inseparable || !self.owner.0.accepts_peers;
            if together && leaves.is_some_and(|leaves| Arc::ptr_eq(leaves, &route.table)) {
                along.push((other, its, route));
            } else if inseparable && !Arc::ptr_eq(&route.table, table) {
                return Err(AttachError::SharedRequester { device, other, requester: self.requester });
            } else if together && !Arc::ptr_eq(route.table.space(), table.space()) {
                return Err(AttachError::NotIsolated { device, other });
            }
        }
        Ok(along)
    }

    /// Sends devices back to where their routes lead. What cannot be sent back is blocked, and attached to nothing.
    fn send_back(&self, bound: &mut BTreeMap<Rid, Bound>, moved: &[(Rid, Route)]) {
        for (rid, _) in moved {
            let Some(its) = bound.get(rid) else { continue };
            let requester = its.requester;
            if its.table().is_some_and(|table| self.iommu.attach(*rid, table).is_err()) {
                self.iommu.block(*rid);
                bound.values_mut().filter(|its| its.requester == requester).for_each(|its| its.route = None);
            }
        }
    }

    /// Blocks the device's requests, unless they cannot be told from those of another device that is attached. Nothing happens if it is
    /// attached to nothing.
    pub(crate) fn detach(&self) {
        let mut bound = self.group.bound();
        let former = bound.get_mut(&self.rid).and_then(|own| own.route.take());
        if former.is_some() && !Group::is_used(&bound, self.requester) {
            self.iommu.block(self.rid);
        }
        drop(bound);
        drop(former);
    }

    /// Whether the device may use PASIDs, which lead to address spaces that no other device of its group uses.
    pub(crate) fn check_pasids(&self) -> Result<(), AttachError> {
        let (device, iommu) = (self.rid, &self.iommu);
        let mut others = self.group.members().iter().filter(|member| **member != device);
        if self.requester != device || others.clone().any(|other| iommu.requester(*other) == self.requester) {
            return Err(AttachError::NoPasids(device));
        }
        match others.next() {
            Some(other) if !self.owner.0.accepts_peers => {
                Err(AttachError::NotIsolated { device, other: *other })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut bound = self.group.bound();
        bound.remove(&self.rid);
        self.tell_cookie(&bound);
        drop(bound);
        give_back(&self.iommu, self.rid);
    }
}

impl Group {
    /// All devices of the group.
    pub(crate) fn members(&self) -> &[Rid] {
        &self.members
    }

    fn bound(&self) -> MutexGuard<'_, BTreeMap<Rid, Bound>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_used(bound: &BTreeMap<Rid, Bound>, requester: Rid) -> bool {
        bound.values().any(|bound| bound.requester == requester && bound.route.is_some())
    }

    fn block_idle(&self, iommu: &Arc<dyn Iommu>, bound: &BTreeMap<Rid, Bound>) {
        for member in &self.members {
            if !Self::is_used(bound, iommu.requester(*member)) {
                iommu.block(*member);
            }
        }
    }
}

/// That a driver of the machine has a device, until this is dropped. What it does with the device is nothing to the engine but
/// for its DMA, which nobody could own who is to have another device of the group.
///
/// ```
/// # use ioasid::{Device, DeviceOwner, DriverClaim, Iommu, Rid};
/// # use std::sync::Arc;
/// # fn example(iommu: &Arc<dyn Iommu>, [disk, network]: [Rid; 2]) -> Result<(), Box<dyn std::error::Error>> {
/// // Two functions of one device, and the machine's own driver has the first.
/// let driver = DriverClaim::new(iommu.clone(), disk, "nvme")?;
/// let refused = Device::bind(iommu.clone(), network, &DeviceOwner::new("the guest")).unwrap_err();
/// assert!(refused.to_string().contains("is driven by nvme"));
///
/// drop(driver);
/// Device::bind(iommu.clone(), network, &DeviceOwner::new("the guest"))?;
/// # Ok(())
/// # }
/// ```
pub struct DriverClaim {
    iommu: Arc<dyn Iommu>,
    rid: Rid,
}

impl DriverClaim {
    /// A driver that has the device do DMA.
    ///
    /// # Errors
    /// Somebody has the device, or an owner has another device of its group.
    pub fn new(iommu: Arc<dyn Iommu>, rid: Rid, driver: &str) -> Result<DriverClaim, DeviceError> {
        DriverClaim::take(iommu, rid, driver, true)
    }

    /// A driver that does no DMA, such as one that only keeps others away.
    ///
    /// # Errors
    /// Somebody has the device.
    pub fn without_dma(iommu: Arc<dyn Iommu>, rid: Rid, driver: &str) -> Result<DriverClaim, DeviceError> {
        DriverClaim::take(iommu, rid, driver, false)
    }

    fn take(
        iommu: Arc<dyn Iommu>,
        rid: Rid,
        driver: &str,
        does_dma: bool,
    ) -> Result<DriverClaim, DeviceError> {
        iommu.requirements(rid).ok_or(DeviceError::Unknown(rid))?;
        take(&iommu, rid, Claim::Driven { driver: driver.to_owned(), does_dma })?;
        Ok(DriverClaim { iommu, rid })
    }
}

impl Drop for DriverClaim {
    fn drop(&mut self) {
        give_back(&self.iommu, self.rid);
    }
}

impl fmt::Debug for DriverClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverClaim").field("rid", &self.rid).finish_non_exhaustive()
    }
}
