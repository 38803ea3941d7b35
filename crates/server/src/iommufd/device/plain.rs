//! Where a device's requests without a PASID go.
//!
//! Requests of devices behind one bridge arrive with one requester ID and go one way, so what is attached is the way: the first
//! device opens it, others join it where it leads and nowhere else, and the last one that is detached closes it. Replacing what
//! one of them is attached to moves all of them, as in Linux, which keeps one table for a group. A device that has a requester
//! ID of its own is alone on its way.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use ioasid::Rid;

use super::super::hwpt::Hwpt;
use super::super::objects::Held;
use crate::observer::Watched;
use crate::poison::lock;

/// The way of all requests with one requester ID and no PASID.
#[derive(Debug, Default)]
pub(crate) struct PlainRoute(Mutex<Option<Open>>);

/// A way that leads somewhere.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) hwpt: Held<Hwpt>,
    /// The devices that are attached, and who watches them.
    pub(super) devices: Watchers,
}

/// Devices, and who watches each.
pub(super) type Watchers = BTreeMap<Rid, Option<Arc<Watched>>>;

impl PlainRoute {
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        lock(&self.0)
    }

    /// What a device is attached to, of those whose way this is.
    pub(super) fn of<T>(&self, device: Rid, look: impl FnOnce(&Hwpt) -> T) -> Option<T> {
        let route = self.lock();
        let open = route.as_ref().filter(|open| open.devices.contains_key(&device))?;
        Some(look(&open.hwpt))
    }
}
