//! The objects of one open of `/dev/iommu`, and who uses them.
//!
//! Clients name objects by small numbers that start at 1 and are given out again when they are free, lowest first.
//! An object that something uses (another object, an attached device, an ioctl that is running) cannot be destroyed.
//! Both needs are one counter in the object, [`Users`]: whoever wants the object takes a [`Held`] from the table,
//! which fails once the object has been destroyed; destroying fails while anybody holds it. So an object that was
//! found stays whole for as long as it is held, without any lock held.
//!
//! A number is reserved before the object is made and becomes visible when it is installed, so that no other thread
//! of the client meets half an object.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::device::BoundDevice;
use super::hwpt::Hwpt;
use super::ioas::Ioas;
use super::testing::{Access, TestDevice};
use crate::limits::Budget;
use crate::poison::lock;

/// How many times an object is in use, or that it has been destroyed.
#[derive(Debug, Default)]
pub(crate) struct Users(AtomicU32);

const DESTROYED: u32 = u32::MAX;

impl Users {
    /// One more user; false if the object has been destroyed.
    pub(crate) fn acquire(&self) -> bool {
        let more = |users| (users < DESTROYED - 1).then(|| users + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    /// One user less.
    pub(crate) fn release(&self) {
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before != 0 && before != DESTROYED);
    }

    /// Marks the object destroyed if nobody uses it; says whether it did.
    pub(crate) fn retire(&self) -> bool {
        self.0.compare_exchange(0, DESTROYED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// An object that counts its users.
pub(crate) trait Counted {
    /// The counter.
    fn users(&self) -> &Users;
}

/// A use of an object: while it exists the object cannot be destroyed.
#[derive(Debug)]
pub(crate) struct Held<T: Counted>(Arc<T>);

impl<T: Counted> Held<T> {
    /// A new use of `object`; `None` if it has been destroyed.
    pub(crate) fn new(object: &Arc<T>) -> Option<Self> {
        object.users().acquire().then(|| Self(Arc::clone(object)))
    }

    pub(crate) fn arc(&self) -> &Arc<T> {
        &self.0
    }
}

impl<T: Counted> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Counted> Drop for Held<T> {
    fn drop(&mut self) {
        self.0.users().release();
    }
}

/// One object of any kind.
#[derive(Debug, Clone)]
pub(crate) enum Object {
    Ioas(Arc<Ioas>),
    Hwpt(Arc<Hwpt>),
    Device(Arc<BoundDevice>),
    TestDevice(Arc<TestDevice>),
    Access(Arc<Access>),
}

impl Object {
    fn users(&self) -> &Users {
        match self {
            Self::Ioas(ioas) => ioas.users(),
            Self::Hwpt(hwpt) => hwpt.users(),
            Self::Device(device) => device.users(),
            Self::TestDevice(device) => device.users(),
            Self::Access(access) => access.users(),
        }
    }

    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ioas(a), Self::Ioas(b)) => Arc::ptr_eq(a, b),
            (Self::Hwpt(a), Self::Hwpt(b)) => Arc::ptr_eq(a, b),
            (Self::Device(a), Self::Device(b)) => Arc::ptr_eq(a, b),
            (Self::TestDevice(a), Self::TestDevice(b)) => Arc::ptr_eq(a, b),
            (Self::Access(a), Self::Access(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// An object of any kind that is held.
#[derive(Debug)]
pub(crate) enum HeldObject {
    Ioas(Held<Ioas>),
    Hwpt(Held<Hwpt>),
    Device(Held<BoundDevice>),
    TestDevice(Held<TestDevice>),
    /// One that no command works on.
    Other,
}

/// The table of objects. Its lock is taken for a look-up only and is innermost among the server's.
#[derive(Debug)]
pub(crate) struct Objects {
    inner: Mutex<Inner>,
    budget: Arc<Budget>,
}

impl Drop for Objects {
    fn drop(&mut self) {
        self.budget.give_back(lock(&self.inner).by_id.len());
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// `None`: reserved, not installed yet.
    by_id: BTreeMap<u32, Option<Object>>,
    /// Numbers below `used` that are free again.
    free: BTreeSet<u32>,
    /// The highest number ever given out.
    used: u32,
}

/// A number that has been reserved; dropped without [`Reservation::install`] it is free again.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    objects: &'a Objects,
    id: u32,
    installed: bool,
}

impl Objects {
    /// No objects yet; each one is taken from `budget`.
    pub(crate) fn new(budget: Arc<Budget>) -> Self {
        Self { inner: Mutex::default(), budget }
    }

    /// Reserves the lowest free number.
    ///
    /// # Errors
    /// `ENOMEM` at the limit.
    pub(crate) fn reserve(&self) -> Result<Reservation<'_>, Errno> {
        self.budget.take(1)?;
        let mut inner = lock(&self.inner);
        let id = match inner.free.pop_first() {
            Some(id) => id,
            None => {
                inner.used += 1;
                inner.used
            }
        };
        inner.by_id.insert(id, None);
        Ok(Reservation { objects: self, id, installed: false })
    }

    /// Holds the object `id`, whatever it is.
    ///
    /// # Errors
    /// `ENOENT` if there is none.
    pub(crate) fn hold(&self, id: u32) -> Result<HeldObject, Errno> {
        let inner = lock(&self.inner);
        match inner.by_id.get(&id) {
            Some(Some(Object::Ioas(ioas))) => Held::new(ioas).map(HeldObject::Ioas),
            Some(Some(Object::Hwpt(hwpt))) => Held::new(hwpt).map(HeldObject::Hwpt),
            Some(Some(Object::Device(device))) => Held::new(device).map(HeldObject::Device),
            Some(Some(Object::TestDevice(device))) => Held::new(device).map(HeldObject::TestDevice),
            Some(Some(Object::Access(_))) => Some(HeldObject::Other),
            Some(None) | None => None,
        }
        .ok_or(Errno::NOENT)
    }

    /// Holds the I/O address space `id`.
    ///
    /// # Errors
    /// `ENOENT` if there is none, also if the object is of another kind.
    pub(crate) fn hold_ioas(&self, id: u32) -> Result<Held<Ioas>, Errno> {
        match self.hold(id)? {
            HeldObject::Ioas(ioas) => Ok(ioas),
            _ => Err(Errno::NOENT),
        }
    }

    /// Holds the page table `id`.
    ///
    /// # Errors
    /// `ENOENT` if there is none, also if the object is of another kind.
    pub(crate) fn hold_hwpt(&self, id: u32) -> Result<Held<Hwpt>, Errno> {
        match self.hold(id)? {
            HeldObject::Hwpt(hwpt) => Ok(hwpt),
            _ => Err(Errno::NOENT),
        }
    }

    /// Holds the bound device `id`.
    ///
    /// # Errors
    /// `ENOENT` if there is none, also if the object is of another kind.
    pub(crate) fn hold_device(&self, id: u32) -> Result<Held<BoundDevice>, Errno> {
        match self.hold(id)? {
            HeldObject::Device(device) => Ok(device),
            _ => Err(Errno::NOENT),
        }
    }

    /// Holds the test's device `id`.
    ///
    /// # Errors
    /// `ENOENT` if there is none, also if the object is of another kind.
    pub(crate) fn hold_test_device(&self, id: u32) -> Result<Held<TestDevice>, Errno> {
        match self.hold(id)? {
            HeldObject::TestDevice(device) => Ok(device),
            _ => Err(Errno::NOENT),
        }
    }

    /// Takes the object `id` out of the table if nobody uses it. The caller then takes it apart.
    ///
    /// # Errors
    /// `ENOENT` if there is none, `EBUSY` if it is used.
    pub(crate) fn retire(&self, id: u32) -> Result<Object, Errno> {
        let mut inner = lock(&self.inner);
        let Some(Some(object)) = inner.by_id.get(&id) else {
            return Err(Errno::NOENT);
        };
        if !object.users().retire() {
            return Err(Errno::BUSY);
        }
        let object = object.clone();
        self.forget(&mut inner, id);
        Ok(object)
    }

    /// Takes `object` out of the table if it is still the one with the number `id` and nobody uses it; says whether it
    /// did.
    pub(crate) fn retire_exactly(&self, id: u32, object: &Object) -> bool {
        let mut inner = lock(&self.inner);
        let same = matches!(inner.by_id.get(&id), Some(Some(found)) if found.is(object));
        let retired = same && object.users().retire();
        if retired {
            self.forget(&mut inner, id);
        }
        retired
    }

    /// Takes `object` out of the table, used or not, if it is the one with the number `id`.
    pub(crate) fn remove(&self, id: u32, object: &Object) {
        let mut inner = lock(&self.inner);
        if matches!(inner.by_id.get(&id), Some(Some(found)) if found.is(object)) {
            self.forget(&mut inner, id);
        }
    }

    /// Whether no number is in use.
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.inner).by_id.is_empty()
    }

    fn forget(&self, inner: &mut Inner, id: u32) {
        if inner.by_id.remove(&id).is_some() {
            inner.free.insert(id);
            self.budget.give_back(1);
        }
    }

    /// All objects by number.
    pub(crate) fn snapshot(&self) -> Vec<(u32, Object)> {
        let inner = lock(&self.inner);
        inner.by_id.iter().filter_map(|(&id, object)| Some((id, object.clone()?))).collect()
    }
}

impl Reservation<'_> {
    /// The number.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Makes `object` visible under the number.
    pub(crate) fn install(mut self, object: Object) {
        lock(&self.objects.inner).by_id.insert(self.id, Some(object));
        self.installed = true;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.installed {
            self.objects.forget(&mut lock(&self.objects.inner), self.id);
        }
    }
}
