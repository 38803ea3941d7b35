//! Dma-bufs of an imagined driver: memory of its own that clients map by descriptor, and that it can take back.
//!
//! Its pages are the server's, charged to nobody. Nobody can map them into a process, so giving them back after they were
//! revoked is to have new ones; what was mapped of the old ones stays empty, as in the kernel.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use ioasid::{Backing, Bus};
use ioasid_uapi::iommufd_test as uapi;
use rustix::io::Errno;

use super::super::Call;
use crate::memory::PAGE_SIZE;
use crate::poison::lock;
use crate::{Descriptor, File, FileKind};

/// The longest dma-buf, in bytes.
const LONGEST: u64 = 512 * PAGE_SIZE;

/// How many dma-bufs there may be in a server.
const MOST: usize = 512;

/// The flag of a close-on-exec descriptor.
const CLOSE_ON_EXEC: u32 = rustix::fs::OFlags::CLOEXEC.bits();

/// A dma-buf.
#[derive(Debug)]
pub(crate) struct DmaBuf {
    length: u64,
    bus: Arc<Bus>,
    state: Mutex<State>,
    _counted: Counted,
}

#[derive(Debug)]
struct State {
    backing: Arc<Backing>,
    revoked: bool,
}

/// How many dma-bufs a server has.
#[derive(Debug, Default)]
pub(crate) struct DmaBufs(AtomicUsize);

/// One of them.
#[derive(Debug)]
struct Counted(Arc<DmaBufs>);

impl Counted {
    fn new(all: &Arc<DmaBufs>) -> Result<Self, Errno> {
        let more = |count| (count < MOST).then_some(count + 1);
        match all.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Self(Arc::clone(all))),
            Err(_) => Err(Errno::NOMEM),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl DmaBuf {
    fn new(length: u64, bus: &Arc<Bus>, all: &Arc<DmaBufs>) -> Result<Self, Errno> {
        let counted = Counted::new(all)?;
        Ok(Self {
            length,
            bus: Arc::clone(bus),
            state: Mutex::new(State { backing: memory(bus, length)?, revoked: false }),
            _counted: counted,
        })
    }

    /// In bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Its memory.
    ///
    /// # Errors
    /// `ENODEV`: it is taken back now.
    pub(crate) fn backing(&self) -> Result<Arc<Backing>, Errno> {
        let state = lock(&self.state);
        if state.revoked { Err(Errno::NODEV) } else { Ok(Arc::clone(&state.backing)) }
    }

    /// Takes the memory back from everybody, or has memory again.
    fn set_revoked(&self, revoked: bool) -> Result<(), Errno> {
        let backing = {
            let mut state = lock(&self.state);
            if state.revoked && !revoked {
                state.backing = memory(&self.bus, self.length)?;
            }
            state.revoked = revoked;
            Arc::clone(&state.backing)
        };
        // Waits for operations, so with nothing locked. Nobody gets this memory any more.
        if revoked {
            backing.revoke();
        }
        Ok(())
    }
}

fn memory(bus: &Arc<Bus>, length: u64) -> Result<Arc<Backing>, Errno> {
    Backing::anonymous(bus, length).map_err(|_| Errno::NOMEM)
}

impl Call<'_> {
    /// Makes a dma-buf; the result is its descriptor.
    pub(super) fn get_dma_buf(&self, asked: uapi::DmabufGet) -> Result<u32, Errno> {
        let length = u64::from(asked.length).next_multiple_of(PAGE_SIZE);
        if length == 0 || length > LONGEST {
            return Err(Errno::INVAL);
        }
        let buffer = DmaBuf::new(length, self.context.memory.bus(), self.context.memory.dma_bufs())?;
        let close_on_exec = asked.open_flags & CLOSE_ON_EXEC != 0;
        let file = File::new(self.context.allowance(), || FileKind::DmaBuf(Arc::new(buffer)))?;
        let fd = self.client.give_descriptor(file, close_on_exec)?;
        Ok(fd as u32)
    }

    /// Takes the memory of a dma-buf away, or gives it back.
    pub(super) fn revoke_dma_buf(&self, asked: uapi::DmabufRevoke) -> Result<(), Errno> {
        let Descriptor::Ours(file) = self.client.descriptor(asked.dmabuf_fd)? else {
            return Err(Errno::INVAL);
        };
        file.dma_buf().ok_or(Errno::INVAL)?.set_revoked(asked.revoked != 0)
    }
}
