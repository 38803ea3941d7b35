//! A page table as a client sees it (HWPT): an engine table over an address space, with a number.
//!
//! Tables come into being in two ways. HWPT_ALLOC makes one that lives until it is destroyed. Attaching a device to an
//! address space makes one for the device's class, which other devices of the class share, and which goes when the
//! last of them has been detached.

use std::sync::{Arc, Mutex};

use ioasid::Table;
use rustix::io::Errno;

use super::ioas::Ioas;
use super::objects::{Counted, Held, Users};
use crate::poison::lock;

/// A page table object.
#[derive(Debug)]
pub(crate) struct Hwpt {
    id: u32,
    users: Users,
    /// Goes with the last device that was attached to it.
    automatic: bool,
    /// Made to record what devices write.
    dirty_tracking: bool,
    /// Made for requests with PASIDs, and to be used beside them.
    for_pasids: bool,
    /// Empty once the object has been destroyed.
    body: Mutex<Option<Body>>,
}

#[derive(Debug)]
struct Body {
    table: Arc<Table>,
    ioas: Held<Ioas>,
}

impl Counted for Hwpt {
    fn users(&self) -> &Users {
        &self.users
    }
}

impl Hwpt {
    pub(crate) fn new(id: u32, table: Arc<Table>, ioas: Held<Ioas>, automatic: bool) -> Self {
        Self {
            id,
            users: Users::default(),
            automatic,
            dirty_tracking: false,
            for_pasids: false,
            body: Mutex::new(Some(Body { table, ioas })),
        }
    }

    /// The same, and whether it is there to record what devices write.
    pub(crate) fn with_dirty_tracking(self, dirty_tracking: bool) -> Self {
        Self { dirty_tracking, ..self }
    }

    /// The same, and whether it is there for requests with PASIDs.
    pub(crate) fn with_pasids(self, for_pasids: bool) -> Self {
        Self { for_pasids, ..self }
    }

    /// Whether it was made for requests with PASIDs.
    pub(crate) fn is_for_pasids(&self) -> bool {
        self.for_pasids
    }

    /// The engine's table.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if it was not made to record what devices write. `ENOENT` once it has been destroyed.
    pub(crate) fn recording_table(&self) -> Result<Arc<Table>, Errno> {
        if self.dirty_tracking { self.table().ok_or(Errno::NOENT) } else { Err(Errno::OPNOTSUPP) }
    }

    /// What IOVAs of mappings are multiples of, in bytes.
    pub(crate) fn alignment(&self) -> u64 {
        let ioas = lock(&self.body).as_ref().map(|body| Arc::clone(body.ioas.arc()));
        ioas.map_or(1, |ioas| ioas.usable().1)
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Whether it was made to record what devices write.
    pub(crate) fn tracks_writes(&self) -> bool {
        self.dirty_tracking
    }

    pub(crate) fn is_automatic(&self) -> bool {
        self.automatic
    }

    /// The engine's table; `None` once the object has been destroyed.
    pub(crate) fn table(&self) -> Option<Arc<Table>> {
        lock(&self.body).as_ref().map(|body| Arc::clone(&body.table))
    }

    /// Whether it stands for `table`.
    pub(crate) fn is_over(&self, table: &Arc<Table>) -> bool {
        lock(&self.body).as_ref().is_some_and(|body| Arc::ptr_eq(&body.table, table))
    }

    /// The address space that it is a table of; `None` once the object has been destroyed.
    pub(crate) fn ioas(&self) -> Option<Arc<Ioas>> {
        lock(&self.body).as_ref().map(|body| Arc::clone(body.ioas.arc()))
    }

    /// Ends the object: drops the table and the use of the address space.
    pub(crate) fn destroy(&self) {
        let body = lock(&self.body).take();
        if let Some(Body { table, ioas }) = body {
            ioas.remove_table(table);
        }
    }
}
