//! Everything of a system, as it is behind the lock, and each change to it.
//!
//! A change checks all that can be in its way first and does everything after, so that no error leaves half of it behind. Nobody is
//! called from here but queues, which take an event or count it as lost.

use super::events::Queue;
use super::free::FreeIds;
use super::limit::Levels;
use super::records::{Life, NONE, Record, Records};
use super::{
    AllocateError, CreateSetError, Event, Freed, OverCapacity, Owner, Pasid, PasidState, QuotaError,
    SetStatus, Spid, SpidError, Status, SystemStatus, Transition, UnknownPasid, UseError,
};
use slab::Slab;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Everything, behind the lock.
#[derive(Debug)]
pub(super) struct State {
    capacity: u32,
    reserved: u32,
    used: u32,
    free: FreeIds,
    records: Records,
    sets: Slab<Set>,
    owners: HashMap<Owner, u32>,
    pub(super) limits: Levels,
    subscribers: Subscribers,
    sequence: u64,
}

#[derive(Debug)]
struct Set {
    owner: Owner,
    quota: u32,
    used: u32,
    limit: u32,
    /// The youngest of its IDs, of a list through the records.
    first: u32,
    by_spid: HashMap<Spid, Pasid>,
    subscribers: Subscribers,
    /// The owner has given it up; it goes with its last ID.
    abandoned: bool,
}

/// Queues, by priority.
#[derive(Debug, Default)]
pub(super) struct Subscribers(Vec<Arc<Queue>>);

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("priority", &self.priority).finish_non_exhaustive()
    }
}

impl Subscribers {
    pub(super) fn add(&mut self, queue: Arc<Queue>) {
        let place = self.0.partition_point(|other| other.priority <= queue.priority);
        self.0.insert(place, queue);
    }

    pub(super) fn remove(&mut self, queue: &Arc<Queue>) {
        self.0.retain(|other| !Arc::ptr_eq(other, queue));
    }
}

impl State {
    /// A system in which nothing is in use.
    pub(super) fn new(capacity: u32) -> State {
        State {
            capacity,
            reserved: 0,
            used: 0,
            free: FreeIds::new(capacity),
            records: Records::new(capacity),
            sets: Slab::new(),
            owners: HashMap::new(),
            limits: Levels::default(),
            subscribers: Subscribers::default(),
            sequence: 0,
        }
    }

    /// Gives back what was reserved.
    pub(super) fn give_back(&mut self, count: u32) {
        self.reserved -= count;
    }

    pub(super) fn system_status(&self) -> SystemStatus {
        SystemStatus {
            capacity: self.capacity,
            reserved: self.reserved,
            used: self.used,
            sets: self.sets.len(),
            limits: self.limits.len(),
            table_bytes: self.free.bytes() + self.records.bytes(),
        }
    }

    pub(super) fn sets(&self) -> Vec<SetStatus> {
        self.sets.iter().map(|(key, _)| self.set_status(key as u32)).collect()
    }

    /// What an ID of the set is like.
    pub(super) fn lookup(&self, key: u32, pasid: Pasid) -> Result<Status, UnknownPasid> {
        let record = self.records.get(pasid.0).filter(|record| record.set == key);
        record.and_then(|_| self.status(pasid)).ok_or(UnknownPasid { pasid })
    }

    pub(super) fn reserve(&mut self, count: u32) -> Result<(), OverCapacity> {
        let left = self.capacity - self.reserved;
        if count > left {
            return Err(OverCapacity { asked: count, left, capacity: self.capacity });
        }
        self.reserved += count;
        Ok(())
    }

    pub(super) fn create_set(&mut self, owner: Owner, quota: u32, limit: u32) -> Result<u32, CreateSetError> {
        if self.owners.contains_key(&owner) {
            return Err(CreateSetError::OwnerHasOne(owner));
        }
        self.reserve(quota)?;
        self.limits.hold(limit);
        let set = Set {
            owner,
            quota,
            used: 0,
            limit,
            first: NONE,
            by_spid: HashMap::new(),
            subscribers: Subscribers::default(),
            abandoned: false,
        };
        let key = self.sets.insert(set) as u32;
        if owner != Owner::Nobody {
            self.owners.insert(owner, key);
        }
        Ok(key)
    }

    // Sets are there as long as they have an owner or an ID.
    fn set(&self, key: u32) -> &Set {
        &self.sets[key as usize]
    }

    fn set_mut(&mut self, key: u32) -> &mut Set {
        &mut self.sets[key as usize]
    }

    pub(super) fn used(&self, key: u32) -> u32 {
        self.set(key).used
    }

    pub(super) fn set_status(&self, key: u32) -> SetStatus {
        let &Set { owner, quota, used, limit, .. } = self.set(key);
        SetStatus { owner, quota, used, limit: self.limits.usage(limit).name.clone() }
    }

    pub(super) fn allocate(
        &mut self,
        key: u32,
        range: &RangeInclusive<u32>,
        data: u64,
    ) -> Result<Pasid, AllocateError> {
        // All that can fail comes first, and what changes something last.
        let &Set { quota, used, limit, first, .. } = self.set(key);
        if used >= quota {
            return Err(AllocateError::QuotaUsedUp { quota });
        }
        let id = self.free.first_from(*range.start()).filter(|id| range.contains(id));
        let none = AllocateError::NoneFree { first: *range.start(), last: *range.end() };
        let id = id.ok_or(none)?;
        self.limits.charge(limit)?;
        self.free.take(id);
        self.records.enter(id, key, first, data);
        let set = self.set_mut(key);
        (set.first, set.used) = (id, used + 1);
        self.used += 1;
        self.publish(Pasid(id), Transition::Allocate);
        Ok(Pasid(id))
    }

    /// An ID of the set that is not freed.
    fn usable(&mut self, key: u32, pasid: Pasid) -> Result<&mut Record, UseError> {
        let record = self.records.get_mut(pasid.0).filter(|record| record.set == key);
        match record {
            None => Err(UseError::Unknown(UnknownPasid { pasid })),
            Some(record) if record.life == Life::Pending => Err(UseError::FreePending { pasid }),
            Some(record) => Ok(record),
        }
    }

    pub(super) fn hold(&mut self, key: u32, pasid: Pasid) -> Result<(), UseError> {
        let record = self.usable(key, pasid)?;
        let more = record.references.checked_add(1).ok_or(UseError::TooManyReferences { pasid })?;
        record.references = more;
        Ok(())
    }

    pub(super) fn bind(&mut self, key: u32, pasid: Pasid) -> Result<(), UseError> {
        self.hold(key, pasid)?;
        let record = self.usable(key, pasid)?;
        record.bindings += 1;
        if record.bindings == 1 {
            self.publish(pasid, Transition::Bind);
        }
        Ok(())
    }

    /// Lets go of an ID, which is held.
    pub(super) fn release(&mut self, pasid: Pasid, bound: bool) {
        let Some(record) = self.records.get_mut(pasid.0) else { return };
        if bound {
            record.bindings -= 1;
            if record.bindings == 0 {
                self.publish(pasid, Transition::Unbind);
            }
        }
        let Some(record) = self.records.get_mut(pasid.0) else { return };
        record.references -= 1;
        if record.references == 0 && record.life == Life::Pending {
            self.reclaim(pasid);
        }
    }

    pub(super) fn free(&mut self, key: u32, pasid: Pasid) -> Result<Freed, UseError> {
        let record = self.usable(key, pasid)?;
        record.life = Life::Pending;
        let held = record.references > 0;
        self.publish(pasid, Transition::Free);
        // What comes of it from now on, such as that it is unbound, is nothing to whom the private ID is given next.
        let Some(record) = self.records.get_mut(pasid.0) else { return Ok(Freed::Now) };
        let spid = std::mem::replace(&mut record.spid, NONE);
        self.set_mut(key).by_spid.remove(&Spid(spid));
        if held {
            return Ok(Freed::Pending);
        }
        self.reclaim(pasid);
        Ok(Freed::Now)
    }

    /// Makes a parked ID that nobody holds free again.
    fn reclaim(&mut self, pasid: Pasid) {
        let Some(&Record { set: key, .. }) = self.records.get(pasid.0) else { return };
        let Set { first, limit, .. } = *self.set(key);
        let first = self.records.remove(pasid.0, first);
        self.free.give_back(pasid.0);
        self.limits.credit(limit, 1);
        self.used -= 1;
        let set = self.set_mut(key);
        (set.first, set.used) = (first, set.used - 1);
        if set.abandoned {
            set.quota -= 1;
            let empty = set.used == 0;
            self.reserved -= 1;
            if empty {
                self.remove_set(key);
            }
        }
    }

    /// The owner has gone.
    pub(super) fn abandon(&mut self, key: u32) {
        let owner = self.set(key).owner;
        self.owners.remove(&owner);
        let mut next = self.set(key).first;
        while let Some(&Record { life, next: after, .. }) = self.records.get(next) {
            if life == Life::Allocated {
                // It is of this set, and not freed yet.
                let _ = self.free(key, Pasid(next));
            }
            next = after;
        }
        let set = self.set_mut(key);
        set.abandoned = true;
        // Only what is parked counts still.
        let spare = set.quota - set.used;
        set.quota = set.used;
        let empty = set.used == 0;
        self.reserved -= spare;
        if empty {
            self.remove_set(key);
        }
    }

    fn remove_set(&mut self, key: u32) {
        let set = self.sets.remove(key as usize);
        self.limits.release(set.limit);
        set.subscribers.0.iter().for_each(|queue| queue.end());
    }

    pub(super) fn set_quota(&mut self, key: u32, quota: u32) -> Result<(), QuotaError> {
        let &Set { quota: before, used, .. } = self.set(key);
        if quota < used {
            return Err(QuotaError::InUse { used });
        }
        match quota.checked_sub(before) {
            Some(more) => self.reserve(more)?,
            None => self.reserved -= before - quota,
        }
        self.set_mut(key).quota = quota;
        Ok(())
    }

    pub(super) fn charge_to(&mut self, key: u32, limit: u32) {
        let &Set { limit: before, used, .. } = self.set(key);
        self.limits.hold(limit);
        // Back first: what both are below has no peak of it.
        self.limits.credit(before, used);
        self.limits.force(limit, used);
        self.limits.release(before);
        self.set_mut(key).limit = limit;
    }

    pub(super) fn set_spid(&mut self, key: u32, pasid: Pasid, spid: Option<Spid>) -> Result<(), SpidError> {
        let before = self.usable(key, pasid)?.spid;
        let by_spid = &mut self.set_mut(key).by_spid;
        if let Some(spid) = spid {
            match by_spid.entry(spid) {
                Entry::Occupied(entry) if *entry.get() == pasid => return Ok(()),
                Entry::Occupied(entry) => return Err(SpidError::Taken { spid, by: *entry.get() }),
                Entry::Vacant(entry) => entry.insert(pasid),
            };
        }
        by_spid.remove(&Spid(before));
        self.usable(key, pasid)?.spid = spid.map_or(NONE, Spid::get);
        Ok(())
    }

    pub(super) fn find(&self, key: u32, spid: Spid) -> Option<Pasid> {
        self.set(key).by_spid.get(&spid).copied()
    }

    pub(super) fn status(&self, pasid: Pasid) -> Option<Status> {
        let &Record { set, spid, data, references, bindings, life, .. } = self.records.get(pasid.0)?;
        let state = match life {
            Life::Free => return None,
            Life::Pending => PasidState::FreePending,
            Life::Allocated if bindings > 0 => PasidState::Active,
            Life::Allocated => PasidState::Idle,
        };
        let owner = self.set(set).owner;
        Some(Status { pasid, state, spid: Spid::new(spid), owner, data, references, bindings })
    }

    pub(super) fn list(&self, key: u32) -> Vec<Status> {
        let next = |id: u32| self.records.get(id).map(|record| (id, record.next));
        let ids = std::iter::successors(next(self.set(key).first), |(_, after)| next(*after));
        ids.filter_map(|(id, _)| self.status(Pasid(id))).collect()
    }

    pub(super) fn subscribers_of(&mut self, set: Option<u32>) -> &mut Subscribers {
        match set {
            Some(key) => &mut self.set_mut(key).subscribers,
            None => &mut self.subscribers,
        }
    }

    /// The set may have gone, and another one be in its place, which does not know the queue.
    pub(super) fn unsubscribe(&mut self, set: Option<u32>, queue: &Arc<Queue>) {
        match set {
            Some(key) => {
                if let Some(set) = self.sets.get_mut(key as usize) {
                    set.subscribers.remove(queue);
                }
            }
            None => self.subscribers.remove(queue),
        }
    }

    /// Tells who wants to know: those of the set and those of the system, by priority.
    fn publish(&mut self, pasid: Pasid, transition: Transition) {
        let sequence = self.sequence;
        self.sequence += 1;
        let Some(&Record { set, spid, data, .. }) = self.records.get(pasid.0) else { return };
        let set = self.set(set);
        if self.subscribers.0.is_empty() && set.subscribers.0.is_empty() {
            return;
        }
        let event = Event { sequence, transition, pasid, spid: Spid::new(spid), owner: set.owner, data };
        let mut of_set = set.subscribers.0.iter().peekable();
        for queue in &self.subscribers.0 {
            while let Some(before) = of_set.next_if(|other| other.priority < queue.priority) {
                before.put(event);
            }
            queue.put(event);
        }
        of_set.for_each(|queue| queue.put(event));
    }
}
