//! Attaching a device's requests with a PASID.
//!
//! A PASID leads to a page table that was made for PASIDs (HWPT_ALLOC's flag), and never to what an address space makes for
//! itself. While a device uses PASIDs, or when it is to, its requests without a PASID too must be on such a table, or on none:
//! that is what hardware with one entry for both needs. PASID 0 is what Linux calls the requests without one, and is refused.

use std::sync::Arc;

use ioasid::Table;
use ioasid::pasid::{Pasid, Spid};
use rustix::io::Errno;

use super::super::Context;
use super::super::errno::attach_errno;
use super::super::hwpt::Hwpt;
use super::super::objects::{Held, HeldObject};
use super::super::pasids::UsedPasid;
use super::{Behind, BoundDevice, tell_moved};
use crate::limits::Taken;
use crate::observer::Watched;
use crate::poison::lock;

/// What is expected of a PASID that is to be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PasidAttach {
    /// That it leads nowhere.
    Attach,
    /// That it leads somewhere.
    Replace,
    /// Nothing: VFIO's rule.
    Either,
}

/// Where a PASID leads.
#[derive(Debug)]
pub(super) struct PasidRoute {
    hwpt: Held<Hwpt>,
    watched: Option<Arc<Watched>>,
    used: UsedPasid,
    _share: Taken,
}

impl PasidRoute {
    pub(super) fn hwpt(&self) -> &Hwpt {
        &self.hwpt
    }
}

impl BoundDevice {
    /// How many bits its PASIDs have; 0: it has none.
    pub(crate) fn pasid_bits(&self) -> u32 {
        match &self.behind {
            Behind::Machine { machine, .. } => machine.pasid_bits,
            Behind::Mock(mock) => mock.pasid_bits(),
        }
    }

    /// The PASID of this number, if the device can use it.
    fn pasid(&self, number: u32) -> Option<Pasid> {
        Pasid::new(number).filter(|_| number != 0 && number < 1 << self.pasid_bits())
    }

    /// Points the device's requests with a PASID to the page table `id`, in one step if they are on another one; returns the
    /// table's number.
    ///
    /// # Errors
    /// - `ENOENT`: there is no such object. `EBUSY`: the PASID leads somewhere already.
    /// - `EINVAL`: it leads nowhere, and was to be replaced; the device cannot have this PASID; the object is no page table for PASIDs,
    ///   or not one for the device; the requests without a PASID are on a table that is not for PASIDs.
    /// - `ENOMEM`: too many.
    pub(crate) fn attach_pasid(
        &self,
        context: &Context,
        number: u32,
        id: u32,
        wanted: PasidAttach,
    ) -> Result<u32, Errno> {
        let mut pasids = lock(&self.pasids);
        let hwpt = match context.objects().hold(id)? {
            HeldObject::Hwpt(hwpt) => Some(hwpt),
            // The tables that it would make are not for PASIDs.
            HeldObject::Ioas(_) => None,
            _ => return Err(Errno::INVAL),
        };
        let before = pasids.get(&number);
        match (wanted, before) {
            (PasidAttach::Attach, Some(_)) => return Err(Errno::BUSY),
            (PasidAttach::Replace, None) => return Err(Errno::INVAL),
            _ => {}
        }
        let hwpt = hwpt.ok_or(Errno::INVAL)?;
        if before.is_some_and(|route| Arc::ptr_eq(route.hwpt.arc(), hwpt.arc())) {
            return Ok(id);
        }
        let plain_allows = self.plain.of(self.rid(), Hwpt::is_for_pasids).unwrap_or(true);
        let pasid = self.pasid(number).filter(|_| plain_allows && hwpt.is_for_pasids());
        let pasid = pasid.filter(|_| self.suits(&hwpt)).ok_or(Errno::INVAL)?;
        let table = hwpt.table().ok_or(Errno::NOENT)?;
        match pasids.get_mut(&number) {
            Some(route) => {
                let _changing = route.watched.as_ref().map(|watched| watched.changing());
                self.attach_engine_pasid(&route.used, pasid, &table)?;
                let (from, to) = (route.hwpt.ioas(), hwpt.ioas());
                if let Some(watched) = &route.watched {
                    tell_moved(watched, from, to);
                }
                route.hwpt = hwpt;
            }
            None => {
                let share = Taken::some(&context.allowance().objects, 1)?;
                let used = context.pasids().take(pasid)?;
                let watched = self.watched_pasid(pasid);
                let changing = watched.as_ref().map(|watched| watched.changing());
                self.attach_engine_pasid(&used, pasid, &table)?;
                if let Some(watched) = &watched {
                    tell_moved(watched, None, hwpt.ioas());
                }
                drop(changing);
                pasids.insert(number, PasidRoute { hwpt, watched, used, _share: share });
            }
        }
        Ok(id)
    }

    fn attach_engine_pasid(&self, used: &UsedPasid, pasid: Pasid, table: &Arc<Table>) -> Result<(), Errno> {
        let number = spid(pasid)?;
        let engine = self.engine_for(table)?;
        let before = self.engines().iter().find(|engine| engine.pasid(number).is_some());
        let stays = before.is_some_and(|before| std::ptr::eq(before, engine));
        let attached = match stays {
            true => engine.replace_pasid(number, table),
            false => engine.attach_pasid(number, used.bind()?, table),
        };
        attached.map_err(|error| attach_errno(&error))?;
        // As with requests without a PASID: only mock devices have several engines, and do no DMA.
        if let Some(before) = before.filter(|_| !stays) {
            before.detach_pasid(number);
        }
        Ok(())
    }

    /// Blocks the device's requests with a PASID and lets go of its table. Nothing happens if they are not attached.
    pub(crate) fn detach_pasid(&self, number: u32) {
        let mut pasids = lock(&self.pasids);
        if let Some(route) = pasids.remove(&number) {
            self.end_route(number, route);
        }
    }

    /// The same for all PASIDs.
    pub(super) fn detach_pasids(&self) {
        let mut pasids = lock(&self.pasids);
        while let Some((number, route)) = pasids.pop_first() {
            self.end_route(number, route);
        }
    }

    fn end_route(&self, number: u32, route: PasidRoute) {
        let PasidRoute { hwpt, watched, used, .. } = route;
        let _changing = watched.as_ref().map(|watched| watched.changing());
        for engine in self.engines() {
            if let Some(number) = Spid::new(number) {
                engine.detach_pasid(number);
            }
        }
        // After the engine, which has a binding of it.
        drop(used);
        if let Some(watched) = &watched {
            tell_moved(watched, hwpt.ioas(), None);
        }
    }

    /// The number of the page table that requests with a PASID, or with 0 those without, are attached to.
    pub(crate) fn table_of(&self, number: u32) -> Option<u32> {
        match number {
            0 => self.plain.of(self.rid(), Hwpt::id),
            _ => lock(&self.pasids).get(&number).map(|route| route.hwpt.id()),
        }
    }

    /// Who watches the requests with a PASID.
    fn watched_pasid(&self, pasid: Pasid) -> Option<Arc<Watched>> {
        match &self.behind {
            Behind::Machine { machine, .. } => machine.watched.as_ref().map(|watched| watched.pasid(pasid)),
            Behind::Mock(_) => None,
        }
    }
}

/// What the engine calls the number that a program says: each PASID is called by its own.
fn spid(pasid: Pasid) -> Result<Spid, Errno> {
    Spid::new(pasid.get()).ok_or(Errno::INVAL)
}
