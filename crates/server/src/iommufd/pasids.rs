//! Which PASIDs are in use.
//!
//! At Linux's interface a PASID is whatever number a program says, at the device that it says it of: nobody gives numbers
//! out, and the same number at two devices is two address spaces. The engine wants to be shown that a PASID exists before a
//! device gets a route with it. So the server has one set, in which each number stands for itself: a number is allocated
//! when the first device uses it, held by each device that does, and free again when the last one has let go.
//!
//! The set is made when it is first needed; most programs have no use for PASIDs.

use std::sync::{Arc, Mutex};

use ioasid::pasid::{Limit, MOST_PASIDS, Owner, Pasid, PasidBinding, PasidReference, PasidSet, PasidSystem};
use rustix::io::Errno;

use crate::poison::lock;

/// The PASIDs of a machine.
#[derive(Debug, Default)]
pub(crate) struct Pasids(Mutex<Option<PasidSet>>);

/// A PASID that a device uses.
#[derive(Debug)]
pub(super) struct UsedPasid {
    pasids: Arc<Pasids>,
    pasid: Pasid,
    /// Gone only while this is being dropped.
    reference: Option<PasidReference>,
}

fn whole_set() -> Option<PasidSet> {
    let system = PasidSystem::new(MOST_PASIDS).ok()?;
    system.create_set(Owner::Nobody, MOST_PASIDS, &Limit::new(&system, "devices", None)).ok()
}

impl Pasids {
    /// One more user of a number.
    ///
    /// # Errors
    /// `ENOMEM`: it is used too many times.
    pub(super) fn take(self: &Arc<Self>, pasid: Pasid) -> Result<UsedPasid, Errno> {
        let mut set = lock(&self.0);
        if set.is_none() {
            *set = whole_set();
        }
        let set = set.as_ref().ok_or(Errno::NOMEM)?;
        if set.lookup(pasid).is_err() {
            set.allocate(pasid.get()..=pasid.get(), 0).map_err(|_| Errno::NOMEM)?;
        }
        let reference = set.hold(pasid).map_err(|_| Errno::NOMEM)?;
        Ok(UsedPasid { pasids: Arc::clone(self), pasid, reference: Some(reference) })
    }
}

impl UsedPasid {
    /// What a route of the engine holds.
    ///
    /// # Errors
    /// `ENOMEM`: it is used too many times.
    pub(super) fn bind(&self) -> Result<PasidBinding, Errno> {
        let set = lock(&self.pasids.0);
        let set = set.as_ref().ok_or(Errno::NOMEM)?;
        set.bind(self.pasid).map_err(|_| Errno::NOMEM)
    }
}

impl Drop for UsedPasid {
    fn drop(&mut self) {
        let set = lock(&self.pasids.0);
        drop(self.reference.take());
        let Some(set) = &*set else { return };
        if set.lookup(self.pasid).is_ok_and(|status| status.references == 0) {
            let freed = set.free(self.pasid);
            debug_assert!(freed.is_ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_use(pasids: &Pasids) -> u32 {
        lock(&pasids.0).as_ref().map_or(0, |set| set.status().used)
    }

    #[test]
    fn a_number_is_in_use_until_its_last_user_has_gone() {
        let pasids = Arc::new(Pasids::default());
        let five = Pasid::new(5).unwrap();
        let (first, second) = (pasids.take(five).unwrap(), pasids.take(five).unwrap());
        let other = pasids.take(Pasid::new(MOST_PASIDS - 1).unwrap()).unwrap();
        assert_eq!(first.bind().unwrap().pasid(), five);
        assert_eq!(in_use(&pasids), 2);
        drop(first);
        assert_eq!(in_use(&pasids), 2);
        let binding = second.bind().unwrap();
        drop((other, binding, second));
        assert_eq!(in_use(&pasids), 0);
        assert!(pasids.take(five).is_ok());
    }
}
