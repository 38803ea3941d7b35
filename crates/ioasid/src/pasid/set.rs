//! What the owner of a set does with it.

use super::events::{Priority, Subscription};
use super::limit::Limit;
use super::{
    AllocateError, Freed, NotEmpty, OverCapacity, Pasid, PasidSystem, SetStatus, Spid, SpidError, Status,
    UnknownPasid, UseError,
};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// A set of PASIDs with an owner. Whoever has this may use the IDs in it, and no others.
///
/// Dropping it frees its IDs. Those that are held go with the last reference; until then they count against the limit and the
/// capacity, and the owner may have another set.
pub struct PasidSet {
    pub(super) system: Arc<PasidSystem>,
    pub(super) key: u32,
}

impl PasidSet {
    /// Allocates the lowest free ID of a range, which may reach beyond the capacity. `data` is the caller's own; events
    /// have it.
    ///
    /// # Errors
    /// The quota is used up, a limit is in the way, or the range has no free ID. Nothing is allocated or charged then.
    pub fn allocate(&self, range: RangeInclusive<u32>, data: u64) -> Result<Pasid, AllocateError> {
        self.system.lock().allocate(self.key, &range, data)
    }

    /// Frees an ID. If it is held by somebody, it is parked until they have let go: it is not allocated again before, cannot
    /// be held by anybody else, and its private ID can be given to another one at once.
    ///
    /// # Errors
    /// It is not an ID of this set, or was freed before.
    pub fn free(&self, pasid: Pasid) -> Result<Freed, UseError> {
        self.system.lock().free(self.key, pasid)
    }

    /// Holds an ID, so that it is not used for something else before the reference has gone.
    ///
    /// # Errors
    /// It is not an ID of this set, or is freed already.
    pub fn hold(&self, pasid: Pasid) -> Result<PasidReference, UseError> {
        self.system.lock().hold(self.key, pasid)?;
        Ok(PasidReference { system: self.system.clone(), pasid })
    }

    /// Binds an ID to something that uses it, a device's table or a processor: it is active as long as it is bound to
    /// anything. A binding holds it.
    ///
    /// # Errors
    /// As of [`hold`](Self::hold).
    pub fn bind(&self, pasid: Pasid) -> Result<PasidBinding, UseError> {
        self.system.lock().bind(self.key, pasid)?;
        Ok(PasidBinding { system: self.system.clone(), pasid })
    }

    /// Gives an ID a private one, in place of what it had; `None`: takes it away. A guest's PASID is such an ID.
    ///
    /// # Errors
    /// Another ID of the set has it, or the ID is not one of this set, or is freed.
    pub fn set_spid(&self, pasid: Pasid, spid: Option<Spid>) -> Result<(), SpidError> {
        self.system.lock().set_spid(self.key, pasid, spid)
    }

    /// The ID that has this private one.
    pub fn find(&self, spid: Spid) -> Option<Pasid> {
        self.system.lock().find(self.key, spid)
    }

    /// What an ID is like.
    ///
    /// # Errors
    /// It is not an ID of this set.
    pub fn lookup(&self, pasid: Pasid) -> Result<Status, UnknownPasid> {
        self.system.lock().lookup(self.key, pasid)
    }

    /// All IDs of the set, those that are parked among them; the youngest first.
    pub fn list(&self) -> Vec<Status> {
        self.system.lock().list(self.key)
    }

    /// What the set is like.
    pub fn status(&self) -> SetStatus {
        self.system.lock().set_status(self.key)
    }

    /// Takes more of the system's capacity, or gives some back. Not less than is in use.
    ///
    /// # Errors
    /// There is not so much left, or more is in use.
    pub fn set_quota(&self, quota: u32) -> Result<(), QuotaError> {
        self.system.lock().set_quota(self.key, quota)
    }

    /// Charges the IDs of the set to another limit from now on. This cannot fail: the limit, and those above it, may
    /// have more than their maximum then, and refuse what comes next. A limit of another system changes nothing.
    pub fn charge_to(&self, limit: &Limit) {
        if Arc::ptr_eq(&self.system, &limit.system) {
            self.system.lock().charge_to(self.key, limit.level);
        }
    }

    /// Events of this set from now on. A queue that has `capacity` events loses what comes until some are taken.
    pub fn subscribe(&self, priority: Priority, capacity: usize) -> Subscription {
        self.system.subscribe_to(Some(self.key), priority, capacity)
    }

    /// Ends an empty set, and gives its quota back.
    ///
    /// # Errors
    /// It has IDs, parked ones included. The set comes back, as it is.
    pub fn end(self) -> Result<(), NotEmpty> {
        let used = self.system.lock().used(self.key);
        if used == 0 { Ok(()) } else { Err(NotEmpty { set: self, used }) }
    }
}

impl Drop for PasidSet {
    fn drop(&mut self) {
        self.system.lock().abandon(self.key);
    }
}

impl fmt::Debug for PasidSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PasidSet").field(&self.status()).finish()
    }
}

/// The quota stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuotaError {
    /// The system has not so much left.
    #[error(transparent)]
    Capacity(#[from] OverCapacity),
    /// More IDs are in use.
    #[error("{used} IDs of the set are in use")]
    InUse {
        /// How many, parked ones included.
        used: u32,
    },
}

/// Holds an ID. As long as there is one, the ID is not allocated again.
#[derive(Debug)]
pub struct PasidReference {
    system: Arc<PasidSystem>,
    pasid: Pasid,
}

/// Something uses an ID, which is active as long as there is one.
#[derive(Debug)]
pub struct PasidBinding {
    system: Arc<PasidSystem>,
    pasid: Pasid,
}

impl PasidReference {
    /// Which ID.
    pub fn pasid(&self) -> Pasid {
        self.pasid
    }
}

impl PasidBinding {
    /// Which ID.
    pub fn pasid(&self) -> Pasid {
        self.pasid
    }
}

impl Drop for PasidReference {
    fn drop(&mut self) {
        self.system.lock().release(self.pasid, false);
    }
}

impl Drop for PasidBinding {
    fn drop(&mut self) {
        self.system.lock().release(self.pasid, true);
    }
}
